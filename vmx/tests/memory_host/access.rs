//! What a guest reaches: memory behind the client's addresses, and touches of it.

use haxm_vmx::Error;
use haxm_vmx::arch::addr::Gpa;
use haxm_vmx::arch::ept::EptVpidCaps;
use haxm_vmx::memory::{Access, AddressSpace, FaultOutcome, Reserve};

use super::{Backing, FakeHost, PAGE};

pub(crate) const MB: u64 = 1 << 20;
pub(crate) const GB: u64 = 1 << 30;

/// SET_RAM's flags.
pub(crate) const ROM: u32 = 1;
pub(crate) const STANDALONE: u32 = 0x40;
pub(crate) const INVALID: u32 = 0x80;

/// EPT with leaves of each size, and accessed and dirty flags.
pub(crate) const ALL: EptVpidCaps = EptVpidCaps::PAGE_2M
    .union(EptVpidCaps::PAGE_1G)
    .union(EptVpidCaps::ACCESSED_DIRTY);

/// A machine with four processors, and an empty address space on it.
pub(crate) fn machine(caps: EptVpidCaps) -> (FakeHost, AddressSpace<FakeHost>) {
    let host = FakeHost::new(4);
    let space = AddressSpace::new(&host, caps, 48).unwrap();
    (host, space)
}

/// Backs `size` bytes of the client from `va` with frames from `frame` up.
pub(crate) fn back(host: &FakeHost, va: u64, size: u64, frame: u64, shift: u32) {
    for page in 0..size / PAGE {
        let backing = Backing {
            frame: frame + page,
            writable: true,
            shift,
        };
        host.back(va / PAGE + page, backing);
    }
}

/// Faults until the answer is final.
pub(crate) fn fault(
    space: &AddressSpace<FakeHost>,
    gpa: u64,
    access: Access,
) -> Result<FaultOutcome, Error> {
    let mut reserve = Reserve::new();
    for _ in 0..4 {
        match space.fault(Gpa(gpa), access, &mut reserve) {
            Ok(FaultOutcome::Retry) => {}
            other => return other,
        }
    }
    Ok(FaultOutcome::Retry)
}

/// The frame that the guest reaches at `gpa`, after a fault.
pub(crate) fn frame_at(host: &FakeHost, space: &AddressSpace<FakeHost>, gpa: u64) -> Option<u64> {
    match fault(space, gpa, Access::READ) {
        Ok(FaultOutcome::Mapped) => Some(host.translate(space.eptp(), gpa).unwrap().0),
        _ => None,
    }
}
