//! Control-register and debug-register accesses.

use super::{Next, Work, advance, lost, raise};
use crate::arch::event::{Exception, vector};
use crate::arch::exit::{CrAccess, DrQualification};
use crate::arch::field;
use crate::arch::reg::{Cr0, Cr4, DR7_GD, Efer};
use crate::arch::segment::AccessRights;
use crate::host::Host;
use crate::vcpu::state::modes::Consequences;
use crate::vcpu::state::pdptes::Unfinished;
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu};

/// DR6.BD: the next instruction accesses a debug register under DR7.GD.
const DR6_BD: u64 = 1 << 13;

/// MOV to and from CR0, CR3, CR4, CR8; LMSW. The processor has checked
/// the privilege level.
#[cfg_attr(haxm_module, optimize(speed))]
pub fn register<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    access: CrAccess,
) -> Next {
    let result = match access {
        CrAccess::Write { cr, gpr } => {
            let value = operand(inner, current, gpr);
            write(inner, current, cr, value)
        }
        CrAccess::Read { cr, gpr } => {
            let value = match cr {
                0 => inner.modes.cr0(current),
                3 => current.get(field::GUEST_CR3),
                4 => inner.modes.cr4(current),
                _ => u64::from(inner.priority.get() >> 4),
            };
            inner.registers.set(gpr, value);
            Ok(Consequences::default())
        }
        // SDM 26.1.3: not while CR0.TS is the guest's own, which it always is.
        CrAccess::Clts => return lost(inner, "CLTS that exits"),
        CrAccess::Lmsw { source } => inner.modes.load_status(current, source),
    };
    match result {
        Ok(consequences) => {
            inner.flush_linear |= consequences.flush;
            if consequences.pdptes {
                return wait_for_pdptes(inner, current, access, consequences.old);
            }
            advance(inner, current);
            // XCR0 counts for the guest only while CR4.OSXSAVE is set.
            inner
                .extended
                .apply_xcr0(current.cpu(), inner.modes.has_osxsave());
            inner
                .switched
                .start_syscall(current.cpu(), inner.modes.has_syscall());
            Next::Resume
        }
        Err(exception) => raise(vcpu, inner, exception),
    }
}

/// The write faults if a PDPTE is not as it should be, so it is not over yet.
#[cold]
fn wait_for_pdptes<H: Host>(
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    access: CrAccess,
    old: u64,
) -> Next {
    let cr = match access {
        CrAccess::Write { cr, .. } => cr,
        _ => 0,
    };
    inner.pdptes_stale = true;
    // RUN may return before they are read: an event waits for the host's thread.
    inner.quiet = false;
    inner.unfinished = Some(Unfinished {
        cr,
        old,
        length: current.get(field::EXIT_INSTRUCTION_LENGTH),
    });
    Next::Work(Work::Pdptes)
}

/// The operand of MOV to a control register: 32 bits outside 64-bit mode.
#[cfg_attr(haxm_module, optimize(speed))]
fn operand<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>, gpr: u8) -> u64 {
    let value = inner.registers.get(current, gpr);
    if value >> 32 == 0 {
        return value;
    }
    let rights = AccessRights::from_bits_retain(current.get(field::GUEST_CS_RIGHTS));
    if inner.modes.efer() & Efer::LMA.bits() != 0 && rights.contains(AccessRights::LONG) {
        value
    } else {
        value & 0xffff_ffff
    }
}

#[cfg_attr(haxm_module, optimize(speed))]
fn write<H: Host>(
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    cr: u8,
    value: u64,
) -> Result<Consequences, Exception> {
    match cr {
        0 => inner.modes.guest_write_cr0(current, value),
        3 => {
            // Exits only where the processor cannot let it pass.
            let pcide = inner.modes.cr4(current) & Cr4::PCIDE.bits() != 0;
            let keep = pcide && value >> 63 != 0;
            let old = current.get(field::GUEST_CR3);
            current.put(field::GUEST_CR3, value & !(u64::from(pcide) << 63));
            Ok(Consequences {
                old,
                pdptes: inner.modes.uses_pdptes(),
                flush: !keep,
            })
        }
        4 => {
            let cr3 = current.get(field::GUEST_CR3);
            inner.modes.guest_write_cr4(current, value, cr3)
        }
        // SDM 11.8.6 "Task Priority in IA-32e Mode": bits 63:4 are reserved.
        _ if value > 0xf => Err(Exception::gp(0)),
        _ => {
            inner.priority.set_class((value & 0xf) as u8);
            Ok(Consequences::default())
        }
    }
}

/// MOV to and from a debug register. The processor has not checked CR4.DE or
/// DR7.GD: SDM 26.1.3 "Instructions That Cause VM Exits Conditionally", the
/// exit takes priority over both.
pub fn debug_register<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    access: DrQualification,
) -> Next {
    let index = access.dr();
    if matches!(index, 4 | 5) && inner.modes.cr4(current) & Cr4::DE.bits() != 0 {
        return raise(vcpu, inner, Exception::UD);
    }
    let rights = AccessRights::from_bits_retain(current.get(field::GUEST_SS_RIGHTS));
    let protected = inner.modes.cr0(current) & Cr0::PE.bits() != 0;
    if protected && rights.dpl() != 0 {
        return raise(vcpu, inner, Exception::gp(0));
    }
    if inner.debug.guest_dr7() & DR7_GD != 0 {
        inner.debug.record(DR6_BD);
        inner.debug.clear_general_detect(current);
        return raise(vcpu, inner, Exception::plain(vector::DB));
    }
    if access.is_read() {
        let value = inner.debug.read(index);
        inner.registers.set(access.gpr(), value);
    } else {
        let value = operand(inner, current, access.gpr());
        if !inner.debug.write(current, index, value) {
            return raise(vcpu, inner, Exception::gp(0));
        }
        inner.debug.load(current.cpu());
    }
    advance(inner, current);
    Next::Resume
}
