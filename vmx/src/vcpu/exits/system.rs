//! CPUID, HLT, MSR accesses, XSETBV, and the interrupt window.

use abi::tunnel::ExitStatus;

use super::{Next, advance, advance_here, raise};
use crate::arch::event::Exception;
use crate::arch::reg::{Cr4, Rflags};
use crate::host::Host;
use crate::vcpu::cpuid::View;
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu, msr};

/// Bits 31:0, what 32-bit operands leave.
const LOW: u64 = 0xffff_ffff;

#[expect(
    clippy::cast_possible_truncation,
    reason = "EAX and ECX are the low halves"
)]
#[inline(always)]
pub fn cpuid<H: Host>(vcpu: &Vcpu<H>, inner: &mut Inner<H>, current: &Current<'_, H>) -> Next {
    let [leaf, subleaf, ..] = inner.registers.general.gpr;
    let view = View {
        apic_id: vcpu.id() as u8,
        // Each vCPU is a package of its own, as in HAXM: SeaBIOS lists only
        // the first of a package in the MP table, and a guest without ACPI
        // would not find the others.
        vcpus: 1,
        // Only OSXSAVE counts, and a change of it always exits.
        cr4: if inner.modes.has_osxsave() {
            Cr4::OSXSAVE.bits()
        } else {
            0
        },
        xcr0: inner.extended.xcr0(),
    };
    let result = inner
        .answers
        .get(&inner.cpuid, leaf as u32, subleaf as u32, &view);
    inner.registers.set(0, u64::from(result.eax));
    inner.registers.set(1, u64::from(result.ecx));
    inner.registers.set(2, u64::from(result.edx));
    inner.registers.set(3, u64::from(result.ebx));
    advance_here(inner, current);
    Next::Resume
}

/// HLT with nothing to wake it is the client's: it waits for an interrupt. A
/// vector that IF holds back wakes nobody (SDM vol. 2, "HLT").
#[cfg_attr(haxm_module, optimize(speed))]
pub fn halt<H: Host>(vcpu: &Vcpu<H>, inner: &mut Inner<H>, current: &Current<'_, H>) -> Next {
    advance(inner, current);
    let wakes = inner.registers.rflags(current) & Rflags::IF.bits() != 0
        && vcpu.vectors.deliverable(inner.priority.get()).is_some();
    if wakes || inner.events.is_waiting() {
        return Next::Resume;
    }
    Next::Leave(ExitStatus::Hlt)
}

/// The guest can take an interrupt: ours if one waits, or the client's.
/// A vector that the task priority holds back is neither.
pub fn interrupt_window<H: Host>(vcpu: &Vcpu<H>, inner: &Inner<H>) -> Next {
    let ours = vcpu.vectors.deliverable(inner.priority.get()).is_some();
    if !ours && vcpu.channel.window() != 0 {
        return Next::Leave(ExitStatus::Interrupt);
    }
    Next::Resume
}

/// The guest lowered CR8, and a vector can come that CR8 held back. The MOV is
/// done: the exit comes behind it, in the place of the one that tells of a step
/// (SDM 30.1.2 "TPR Virtualization").
pub fn tpr_below_threshold<H: Host>(inner: &mut Inner<H>) -> Next {
    inner.step_due = inner.debug.steps();
    Next::Resume
}

#[expect(clippy::cast_possible_truncation, reason = "ECX is the low half")]
#[cfg_attr(haxm_module, optimize(speed))]
pub fn rdmsr<H: Host>(vcpu: &Vcpu<H>, inner: &mut Inner<H>, current: &Current<'_, H>) -> Next {
    let msr = inner.registers.get(current, 1) as u32;
    match msr::list::read(vcpu, inner, current, msr) {
        Ok(value) => {
            inner.registers.set(0, value & LOW);
            inner.registers.set(2, value >> 32);
            advance(inner, current);
            Next::Resume
        }
        Err(_) => {
            log::debug!("RDMSR {msr:#x}: #GP");
            inner.count_unknown_msr(msr);
            raise(vcpu, inner, Exception::gp(0))
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "ECX is the low half")]
#[cfg_attr(haxm_module, optimize(speed))]
pub fn wrmsr<H: Host>(vcpu: &Vcpu<H>, inner: &mut Inner<H>, current: &Current<'_, H>) -> Next {
    let msr = inner.registers.get(current, 1) as u32;
    let low = inner.registers.get(current, 0) & LOW;
    let high = inner.registers.get(current, 2) & LOW;
    let value = high << 32 | low;
    match msr::list::write(vcpu, inner, current, msr, value, true) {
        Ok(()) => {
            inner
                .switched
                .start_syscall(current.cpu(), inner.modes.has_syscall());
            advance(inner, current);
            Next::Resume
        }
        Err(_) => {
            log::debug!("WRMSR {msr:#x} = {value:#x}: #GP");
            if msr::list::is_unknown(inner, msr) {
                inner.count_unknown_msr(msr);
            }
            raise(vcpu, inner, Exception::gp(0))
        }
    }
}

/// RDPMC, where CR4.PCE and the privilege level allow it: elsewhere it faults
/// before it exits (SDM 26.1.1 "Relative Priority of Faults and VM Exits"). ECX is a
/// counter's number; bit 30, for fixed counters, comes with version 2.
pub fn rdpmc<H: Host>(vcpu: &Vcpu<H>, inner: &mut Inner<H>, current: &Current<'_, H>) -> Next {
    let number = inner.registers.get(current, 1) & LOW;
    if number >= u64::from(inner.features.counters()) {
        return raise(vcpu, inner, Exception::gp(0));
    }
    let count = inner
        .pmu
        .count(current.cpu(), &vcpu.guest().caps().counters, number as u8);
    inner.registers.set(0, count & LOW);
    inner.registers.set(2, count >> 32);
    advance(inner, current);
    Next::Resume
}

/// XSETBV at CPL 0 (elsewhere it faults before it exits): SDM 26.1.2
/// "Instructions That Cause VM Exits Unconditionally".
pub fn xsetbv<H: Host>(vcpu: &Vcpu<H>, inner: &mut Inner<H>, current: &Current<'_, H>) -> Next {
    let index = inner.registers.get(current, 1) & LOW;
    let low = inner.registers.get(current, 0) & LOW;
    let high = inner.registers.get(current, 2) & LOW;
    let allowed = inner.features.allowed_xcr0();
    if index != 0 || !inner.extended.set_xcr0(high << 32 | low, allowed) {
        return raise(vcpu, inner, Exception::gp(0));
    }
    inner
        .extended
        .apply_xcr0(current.cpu(), inner.modes.has_osxsave());
    advance(inner, current);
    Next::Resume
}
