//! Exceptions that exit, NMIs, and single-stepping for a client.

use abi::tunnel::{ExitStatus, TunnelDebug};
use zerocopy::IntoBytes;

use super::{Next, advance, lost, raise};
use crate::arch::event::{EventKind, Exception, InterruptionInfo, vector};
use crate::arch::field;
use crate::arch::reg::{Cr0, Rflags};
use crate::arch::segment::AccessRights;
use crate::host::Host;
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu};

/// DR6.BS: single step.
const DR6_BS: u64 = 1 << 14;

pub fn handle<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    info: InterruptionInfo,
) -> Next {
    if info.kind() == EventKind::Nmi {
        // The host's handler looks for counters that overflowed, and starts its own.
        vcpu.unload_counters(inner, current);
        Vcpu::raise_host_nmi(current);
        vcpu.load_counters(inner, current);
        return Next::Resume;
    }
    match info.vector() {
        vector::DB => {
            if info.kind() == EventKind::PrivilegedSoftwareException {
                // INT1 is a trap: its frame has the next instruction, and the
                // exit left RIP on it (SDM 28.3.3 "Saving RIP, RSP, RFLAGS,
                // and SSP").
                advance(inner, current);
            } else {
                // The trap behind an STI comes in its shadow, and the exit saves the one
                // without the other: with TF set no entry takes that state (SDM 27.3.1.5
                // "Checks on Guest Non-Register State", BS of the pending debug
                // exceptions). The shadow ends here, as delivery would end it.
                inner.registers.end_shadow();
                inner.registers.settle_shadow(current);
            }
            debug_exception(vcpu, inner, current)
        }
        vector::BP if inner.debug.takes_breakpoints() => {
            // RIP is on the INT3, as HAXM reports it.
            report(vcpu, inner, current, 0, 0)
        }
        vector::MC => {
            // The host's handler decides what it means for the host; this
            // guest was running when it came and cannot be trusted.
            Vcpu::raise_host_machine_check(current);
            log::error!("machine check while the guest ran");
            lost(inner, "machine check")
        }
        vector::AC
            if !checks_alignment(inner, current)
                && inner.split_locks.allow(current.cpu(), vcpu.guest().caps()) =>
        {
            log::info!("the guest uses split locks: they are allowed while it runs");
            Next::Resume
        }
        number => {
            let error_code = info
                .has_error_code()
                .then(|| current.get(field::EXIT_INTERRUPTION_ERROR));
            let exception = Exception {
                vector: number,
                error_code,
                cr2: None,
            };
            raise(vcpu, inner, exception)
        }
    }
}

/// An #AC can be an alignment check, SDM 6.15 "Interrupt 17". All three are as they were at
/// the access.
fn checks_alignment<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>) -> bool {
    let user = AccessRights::from_bits_retain(current.get(field::GUEST_SS_RIGHTS)).dpl() == 3;
    let masked = current.read(field::GUEST_CR0) & Cr0::AM.bits() == 0;
    user && !masked && inner.registers.rflags(current) & Rflags::AC.bits() != 0
}

fn debug_exception<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
) -> Next {
    let conditions = current.get(field::EXIT_QUALIFICATION);
    debug_trap(vcpu, inner, current, conditions)
}

/// A #DB for these conditions, DR6's bits: the client's, or the guest's.
pub fn debug_trap<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    conditions: u64,
) -> Next {
    if inner.debug.takes_debug_exceptions() {
        return report(vcpu, inner, current, conditions, inner.debug.dr7());
    }
    inner.debug.record(conditions);
    inner.debug.clear_general_detect(current);
    raise(vcpu, inner, Exception::plain(vector::DB))
}

/// One instruction was executed under the monitor trap flag.
pub fn stepped<H: Host>(vcpu: &Vcpu<H>, inner: &mut Inner<H>, current: &Current<'_, H>) -> Next {
    if !inner.debug.steps() {
        return Next::Resume;
    }
    report(vcpu, inner, current, DR6_BS, inner.debug.dr7())
}

/// Tells the client's debugger. `dr7` is the one in force, which is its own, as HAXM has it; 0 for #BP.
fn report<H: Host>(
    vcpu: &Vcpu<H>,
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    dr6: u64,
    dr7: u64,
) -> Next {
    let view = TunnelDebug {
        rip: inner.registers.rip(current),
        dr6,
        dr7,
    };
    vcpu.channel.set_view(view.as_bytes());
    Next::Leave(ExitStatus::Debug)
}
