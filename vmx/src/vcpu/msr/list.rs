//! The guest's MSRs, for RDMSR and WRMSR and for GET_MSRS and SET_MSRS.

use abi::msr::{MAX_MSRS, MsrData};

use crate::Error;
use crate::arch::field;
use crate::cpu::{Cpu, how};
use crate::host::Host;
use crate::vcpu::msr::{self, GpFault, Msr};
use crate::vcpu::run::loan;
use crate::vcpu::state::pmu;
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu};

/// Reads an MSR of the guest.
///
/// # Errors
/// There is no such register.
#[cfg_attr(haxm_module, optimize(speed))]
pub fn read<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    register: u32,
) -> Result<u64, GpFault> {
    Ok(match msr::classify(register, &inner.features) {
        Msr::Tsc => current
            .cpu()
            .rdtsc()
            .wrapping_add(vcpu.guest().tsc_offset()),
        Msr::TscAdjust => vcpu.guest().tsc_adjust(),
        Msr::Efer => inner.modes.efer(),
        Msr::FsBase => current.get(field::GUEST_FS_BASE),
        Msr::GsBase => current.get(field::GUEST_GS_BASE),
        Msr::Switched => inner.switched.get(register).ok_or(GpFault)?,
        Msr::SysenterCs => u64::from(current.get(field::GUEST_SYSENTER_CS)),
        Msr::SysenterEsp => current.get(field::GUEST_SYSENTER_ESP),
        Msr::SysenterEip => current.get(field::GUEST_SYSENTER_EIP),
        Msr::ApicBase | Msr::Pat | Msr::Stored => inner.msrs.read(register)?,
        Msr::SpecCtrl => inner.registers.general.spec_ctrl,
        Msr::ArchCapabilities => vcpu
            .guest()
            .caps()
            .speculation
            .arch_capabilities
            .ok_or(GpFault)?,
        Msr::Counter(number) => {
            inner
                .pmu
                .count(current.cpu(), &vcpu.guest().caps().counters, number)
        }
        Msr::EventSelect(number) => inner.pmu.selector(number),
        Msr::Command | Msr::Unknown => return Err(GpFault),
    })
}

/// The guest has no such register.
pub fn is_unknown<H: Host>(inner: &Inner<H>, register: u32) -> bool {
    msr::classify(register, &inner.features) == Msr::Unknown
}

/// Writes an MSR of the guest. `by_guest`: WRMSR rather than SET_MSRS.
///
/// # Errors
/// There is no such register, or it does not take the value.
#[cfg_attr(haxm_module, optimize(speed))]
pub fn write<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    register: u32,
    value: u64,
    by_guest: bool,
) -> Result<(), GpFault> {
    let features = inner.features;
    let home = msr::classify(register, &features);
    match home {
        Msr::Tsc => {
            let host = current.cpu().rdtsc();
            set_counter(vcpu, value.wrapping_sub(host), by_guest);
        }
        Msr::TscAdjust => {
            // One register for the whole VM, like the counter: each vCPU of a
            // guest writes the same value, and the counter moves once.
            let guest = vcpu.guest();
            let moved = value.wrapping_sub(guest.tsc_adjust());
            guest.set_tsc_adjust(value);
            if by_guest {
                guest.set_tsc_offset(guest.tsc_offset().wrapping_add(moved));
            }
        }
        Msr::Efer => {
            inner
                .modes
                .write_msr_efer(current, value, &features, by_guest)?;
        }
        Msr::ApicBase | Msr::Stored => inner.msrs.write(register, value, &features, by_guest)?,
        Msr::Pat => {
            inner.msrs.write(register, value, &features, by_guest)?;
            current.write(field::GUEST_PAT, inner.msrs.pat());
        }
        Msr::SpecCtrl => {
            if value & !features.allowed_spec_ctrl() != 0 {
                return Err(GpFault);
            }
            let registers = &mut inner.registers.general;
            registers.spec_ctrl = value;
            // Nobody pays for the switch before the first bit is set, unless the
            // host's own needs it; then the guest has the register to itself.
            if value != 0 {
                if registers.how & how::SPEC_CTRL == 0 {
                    registers.how |= how::SPEC_CTRL | how::CHANGED;
                }
                loan::pass_through(&vcpu.msr_bitmap, register, false);
                loan::pass_through(&vcpu.msr_bitmap, register, true);
            }
        }
        Msr::Command => {
            if value & !1 != 0 {
                return Err(GpFault);
            }
            if by_guest && value != 0 {
                current.command(register);
                loan::pass_through(&vcpu.msr_bitmap, register, true);
            }
        }
        Msr::ArchCapabilities => {
            let has = vcpu.guest().caps().speculation.arch_capabilities;
            if by_guest || has != Some(value) {
                return Err(GpFault);
            }
        }
        Msr::Counter(number) => {
            let value = pmu::written(value, by_guest);
            vcpu.change_counters(inner, current, |pmu| pmu.set_count(number, value));
        }
        Msr::EventSelect(number) => {
            pmu::accept(value)?;
            vcpu.change_counters(inner, current, |pmu| pmu.set_selector(number, value));
        }
        Msr::Unknown => return Err(GpFault),
        _ => {
            let value = msr::accept(register, value, &features)?;
            match home {
                Msr::FsBase => current.put(field::GUEST_FS_BASE, value),
                Msr::GsBase => current.put(field::GUEST_GS_BASE, value),
                #[expect(clippy::cast_possible_truncation, reason = "the field has 32 bits")]
                Msr::SysenterCs => current.put(field::GUEST_SYSENTER_CS, value as u32),
                Msr::SysenterEsp => current.put(field::GUEST_SYSENTER_ESP, value),
                Msr::SysenterEip => current.put(field::GUEST_SYSENTER_EIP, value),
                _ if inner.switched.set(register, value) => {
                    if inner.registers.general.on_loan != 0 {
                        inner.switched.put(current.cpu(), register);
                    }
                }
                _ => return Err(GpFault),
            }
        }
    }
    Ok(())
}

/// One counter for the whole VM: what a vCPU's TSC is set to, all have. A
/// client restores each vCPU's in turn, a little later each time; those that
/// are near the first are taken for the same moment.
fn set_counter<H: Host>(vcpu: &Vcpu<H>, offset: u64, by_guest: bool) {
    /// Ticks: well over what a client needs between two vCPUs, a third of a
    /// second at 3 GHz.
    const SAME_MOMENT: u64 = 1 << 30;
    let guest = vcpu.guest();
    let now = guest.tsc_offset();
    let moved = offset.wrapping_sub(now);
    let distance = moved.min(moved.wrapping_neg());
    if by_guest {
        // SDM 18.17.3 "Time-Stamp Counter Adjustment": IA32_TSC_ADJUST follows.
        guest.set_tsc_adjust(guest.tsc_adjust().wrapping_add(moved));
        guest.set_tsc_offset(offset);
    } else if vcpu.id() == 0 || distance > SAME_MOMENT {
        guest.set_tsc_offset(offset);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "MSR numbers have 32 bits")]
fn number(entry: u64) -> Result<u32, GpFault> {
    if entry >> 32 != 0 {
        return Err(GpFault);
    }
    Ok(entry as u32)
}

/// SET_MSRS.
///
/// # Errors
/// [`Error::TooBig`]: more than 31 entries.
pub fn set<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    data: &mut MsrData,
) -> Result<(), Error> {
    if data.nr_msr > MAX_MSRS {
        return Err(Error::TooBig);
    }
    data.done = 0;
    for entry in data.entries.iter().take(usize::from(data.nr_msr)) {
        let result = number(entry.entry)
            .and_then(|register| write(vcpu, inner, current, register, entry.value, false));
        if result.is_err() {
            log::debug!("SET_MSRS: {:#x} = {:#x} refused", entry.entry, entry.value);
            break;
        }
        data.done = data.done.saturating_add(1);
    }
    Ok(())
}

/// GET_MSRS.
///
/// # Errors
/// [`Error::TooBig`]: more than 31 entries.
pub fn get<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    data: &mut MsrData,
) -> Result<(), Error> {
    if data.nr_msr > MAX_MSRS {
        return Err(Error::TooBig);
    }
    data.done = 0;
    for entry in data.entries.iter_mut().take(usize::from(data.nr_msr)) {
        let result = number(entry.entry).and_then(|register| read(vcpu, inner, current, register));
        let Ok(value) = result else {
            log::debug!("GET_MSRS: {:#x} refused", entry.entry);
            break;
        };
        entry.value = value;
        data.done = data.done.saturating_add(1);
    }
    Ok(())
}
