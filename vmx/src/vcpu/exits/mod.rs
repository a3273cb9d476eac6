//! VM exits: what is done about each reason ([`table`]), what is read of it
//! ([`decode`]), and the handlers, one file per family. A handler sees the
//! decoded exit, the vCPU's state and the current VMCS, and says what comes next.

mod control;
pub(super) mod decode;
pub(super) mod exception;
pub(super) mod io;
pub(super) mod system;
pub mod table;

use abi::tunnel::ExitStatus;

use self::decode::Exit;
use super::emulation::plain;
use super::vmcs::Current;
use super::vmcs::entry_checks::first_violated;
use super::{Inner, Vcpu};
use crate::arch::addr::Gpa;
use crate::arch::event::Exception;
use crate::arch::exit::ExitReason;
use crate::arch::field;
use crate::arch::reg::Rflags;
use crate::arch::segment::AccessRights;
use crate::host::Host;
use crate::memory::Access;

/// What follows an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Enter the guest again.
    Resume,
    /// RUN returns with this status.
    Leave(ExitStatus),
    /// Work that may sleep, so not with the VMCS on loan.
    Work(Work),
}

/// Work that may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// An EPT violation.
    Memory {
        /// Where.
        gpa: Gpa,
        /// How.
        access: Access,
    },
    /// Execute the instruction at RIP in software.
    Emulate,
    /// Let another thread run: the guest spins.
    Yield,
    /// Load the PDPTEs from guest memory.
    Pdptes,
    /// A hardware task switch.
    TaskSwitch {
        /// The exit qualification.
        qualification: u32,
        /// Bytes of the instruction.
        length: u8,
    },
}

/// Handles one exit, if it is not one of those that `Vcpu::once` handles.
#[cfg_attr(haxm_module, optimize(speed))]
pub fn dispatch<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    exit: Exit,
) -> Next {
    match exit {
        Exit::ExternalInterrupt => Next::Leave(ExitStatus::Interrupt),
        Exit::EptViolation { gpa, qualification } => {
            let quiet = inner.quiet;
            plain::foresee(inner, current, gpa, qualification, quiet);
            Next::Work(Work::Memory {
                gpa,
                access: Access::from_qualification(qualification.0),
            })
        }
        Exit::InterruptWindow => system::interrupt_window(vcpu, inner),
        Exit::TprBelowThreshold => system::tpr_below_threshold(inner),
        Exit::CrAccess(access) => control::register(vcpu, inner, current, access),
        Exit::DrAccess(access) => control::debug_register(vcpu, inner, current, access),
        Exit::Wrmsr => system::wrmsr(vcpu, inner, current),
        Exit::Xsetbv => system::xsetbv(vcpu, inner, current),
        Exit::Exception { info } => exception::handle(vcpu, inner, current, info),
        Exit::MonitorTrap => exception::stepped(vcpu, inner, current),
        Exit::Skip => {
            advance(inner, current);
            Next::Resume
        }
        Exit::Spin => {
            advance(inner, current);
            Next::Work(Work::Yield)
        }
        Exit::Undefined => raise(vcpu, inner, Exception::UD),
        Exit::Rdpmc => system::rdpmc(vcpu, inner, current),
        Exit::TripleFault => lost(inner, "triple fault"),
        #[expect(clippy::cast_possible_truncation, reason = "32 bits; at most 15 bytes")]
        Exit::TaskSwitch { qualification } => Next::Work(Work::TaskSwitch {
            qualification: qualification as u32,
            length: current.get(field::EXIT_INSTRUCTION_LENGTH) as u8,
        }),
        Exit::EptMisconfiguration { gpa } => {
            log::error!("EPT misconfiguration at {gpa:?}: internal error");
            lost(inner, "EPT misconfiguration")
        }
        Exit::EntryFailure {
            reason,
            qualification,
        } => entry_failed(vcpu, inner, current, reason, qualification),
        Exit::Unexpected(reason) => {
            log::error!(
                "exit {} ({}) that no control allows",
                reason.0,
                reason.text()
            );
            lost(inner, "unexpected exit")
        }
    }
}

/// The guest cannot go on: every RUN from now on returns STATECHANGE.
pub fn lost<H: Host>(inner: &mut Inner<H>, why: &str) -> Next {
    inner.dead = true;
    log::warn!("vCPU stopped: {why}");
    Next::Leave(ExitStatus::StateChange)
}

#[cold]
fn entry_failed<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    reason: ExitReason,
    qualification: u64,
) -> Next {
    inner.dead = true;
    if reason == ExitReason::ENTRY_MACHINE_CHECK {
        // The host's, as an #MC in the guest is: SDM 27.9 "Machine-Check Events
        // During VM Entry".
        Vcpu::raise_host_machine_check(current);
    }
    let get = |encoding| current.peek(encoding).unwrap_or(0);
    let check = match reason {
        ExitReason::INVALID_GUEST_STATE => first_violated(get, vcpu.guest().caps()),
        _ => None,
    };
    log::error!(
        "{}, qualification {qualification:#x}, check {}",
        reason.text(),
        check.unwrap_or("unknown")
    );
    for (encoding, name) in field::ALL {
        if let Some(value) = current.peek(*encoding) {
            log::debug!("  {name} = {value:#x}");
        }
    }
    Next::Leave(ExitStatus::Unknown)
}

/// Raises an exception in the guest.
pub fn raise<H: Host>(vcpu: &Vcpu<H>, inner: &mut Inner<H>, exception: Exception) -> Next {
    if let Some(address) = exception.cr2 {
        inner.cr2 = address;
    }
    inner.quiet = false;
    inner.events.raise(exception, &vcpu.vectors);
    Next::Resume
}

/// Moves past the instruction that caused the exit, as completing it would:
/// the shadow of STI or MOV SS ends, and a trap flag pends its #DB (SDM
/// 18.3.1.4 "Single-Step Exception Condition", 25.4.2, table 25-4).
#[inline(never)]
#[cfg_attr(haxm_module, optimize(speed))]
pub fn advance<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>) {
    advance_here(inner, current);
}

/// [`advance`], for the handlers of frequent exits: a call less.
#[inline(always)]
pub fn advance_here<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>) {
    let length = u64::from(current.read(field::EXIT_INSTRUCTION_LENGTH));
    let old = inner.registers.rip(current);
    let mut new = old.wrapping_add(length);
    // Outside 64-bit code RIP has 32 bits.
    if (old ^ new) >> 32 != 0 {
        new = wrapped(inner, current, new);
    }
    inner.registers.move_rip(current, new);
    inner.registers.end_shadow();
    let traps = inner.registers.rflags(current) & Rflags::TF.bits() != 0;
    if traps || inner.debug.is_used() {
        debugged(inner, current);
    }
}

#[cold]
#[inline(never)]
fn debugged<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>) {
    completed(inner, current);
}

/// RIP that went past 4 GB.
#[cold]
fn wrapped<H: Host>(inner: &Inner<H>, current: &Current<'_, H>, rip: u64) -> u64 {
    let rights = AccessRights::from_bits_retain(current.get(field::GUEST_CS_RIGHTS));
    if inner.modes.is_long_mode() && rights.contains(AccessRights::LONG) {
        return rip;
    }
    rip & 0xffff_ffff
}

/// What completing an instruction does besides.
pub fn completed<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>) {
    inner.registers.end_shadow();
    inner.registers.settle_shadow(current);
    if inner.registers.rflags(current) & Rflags::TF.bits() != 0 {
        pend_step(current);
    }
    // The monitor trap flag does not see an instruction that was executed here.
    inner.step_due = inner.debug.steps();
}

/// The #DB of the trap flag.
fn pend_step<H: Host>(current: &Current<'_, H>) {
    /// Bit 14, BS, of the pending debug exceptions.
    const BS: u64 = 1 << 14;
    let pending = current.get(field::GUEST_PENDING_DEBUG);
    current.put(field::GUEST_PENDING_DEBUG, pending | BS);
}
