//! What a guest reaches: memory behind the client's addresses, and touches of it.

use haxm_vmx::Error;
use haxm_vmx::arch::addr::Gpa;
use haxm_vmx::memory::{Access, AddressSpace, FaultOutcome, Reserve};

use super::{Backing, FakeHost, PAGE};

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
