//! The host's side of a VMCS, and what exits take from the host besides.
//!
//! Host-state fields are written when their value changed: what belongs to the
//! processor when the VMCS comes to it, what belongs to the thread at each
//! loan. SDM 25.5 "Host-State Area", 28.5 "Loading Host State".
// UNSAFETY: reads MSRs that exist and restores host registers.
#![expect(unsafe_code)]

use super::Current;
use crate::arch::reg::Cr4;
use crate::arch::{field, msr};
use crate::cpu::{Cpu, TableRegister, UserSelectors};
use crate::host::Host;

/// DR7 as an exit leaves it, SDM 28.5.1 "Loading Host Control Registers,
/// Debug Registers, MSRs".
const DR7_AFTER_EXIT: u64 = 0x400;

/// What the VMCS holds, and what is to be put back when the guest has left.
#[derive(Default)]
pub struct HostState {
    cr3: u64,
    cr4: u64,
    fs_base: u64,
    gdtr: TableRegister,
    /// What to put back, if `has_selectors`.
    selectors: UserSelectors,
    /// Some register that a process may use holds a selector.
    has_selectors: bool,
    dr7: u64,
    debugctl: u64,
}

fn read_msr(cpu: &impl Cpu, register: u32) -> u64 {
    // SAFETY: called below with registers that every processor in 64-bit mode
    // with VMX has.
    unsafe { cpu.rdmsr(register) }
}

impl HostState {
    /// Writes what belongs to this processor. After this the thread's fields
    /// are written at the next [`HostState::refresh`] whatever they were.
    pub fn write_for_processor<H: Host>(&mut self, current: &Current<'_, H>) {
        let cpu = current.cpu();
        let selectors = cpu.kernel_selectors();
        self.gdtr = cpu.gdtr();
        current.put(field::HOST_CR0, cpu.cr0());
        current.put(field::HOST_CS_SELECTOR, selectors.cs & !7);
        current.put(field::HOST_SS_SELECTOR, selectors.ss & !7);
        current.put(field::HOST_TR_SELECTOR, selectors.tr & !7);
        // SDM 27.2.3 "Checks on Host Segment and Descriptor-Table Registers":
        // RPL and TI must be 0, so a user's selector cannot stand here.
        // `restore` puts it back.
        current.put(field::HOST_DS_SELECTOR, 0);
        current.put(field::HOST_ES_SELECTOR, 0);
        current.put(field::HOST_FS_SELECTOR, 0);
        current.put(field::HOST_GS_SELECTOR, 0);
        current.put(field::HOST_GDTR_BASE, self.gdtr.base);
        current.put(field::HOST_IDTR_BASE, cpu.idtr().base);
        current.put(field::HOST_TR_BASE, cpu.tr_base());
        current.put(field::HOST_GS_BASE, read_msr(cpu, msr::IA32_GS_BASE));
        current.put(field::HOST_EFER, read_msr(cpu, msr::IA32_EFER));
        current.put(field::HOST_PAT, read_msr(cpu, msr::IA32_PAT));
        #[expect(clippy::cast_possible_truncation, reason = "the register has 32 bits")]
        current.put(
            field::HOST_SYSENTER_CS,
            read_msr(cpu, msr::IA32_SYSENTER_CS) as u32,
        );
        let esp = read_msr(cpu, msr::IA32_SYSENTER_ESP);
        current.put(field::HOST_SYSENTER_ESP, esp);
        let eip = read_msr(cpu, msr::IA32_SYSENTER_EIP);
        current.put(field::HOST_SYSENTER_EIP, eip);
        self.cr3 = cpu.cr3();
        current.put(field::HOST_CR3, self.cr3);
        self.cr4 = cpu.cr4();
        current.put(field::HOST_CR4, self.cr4);
        self.fs_base = read_msr(cpu, msr::IA32_FS_BASE);
        current.put(field::HOST_FS_BASE, self.fs_base);
    }

    /// Writes what belongs to this thread, where it changed, and notes what
    /// the exits will take.
    pub fn refresh<H: Host>(&mut self, current: &Current<'_, H>) {
        let cpu = current.cpu();
        let cr3 = cpu.cr3();
        if cr3 != self.cr3 {
            self.cr3 = cr3;
            current.write(field::HOST_CR3, cr3);
        }
        let cr4 = cpu.cr4();
        if cr4 != self.cr4 {
            self.cr4 = cr4;
            current.write(field::HOST_CR4, cr4);
        }
        let fs_base = if cr4 & Cr4::FSGSBASE.bits() != 0 {
            // SAFETY: CR4.FSGSBASE is set.
            unsafe { cpu.fs_base() }
        } else {
            read_msr(cpu, msr::IA32_FS_BASE)
        };
        if fs_base != self.fs_base {
            self.fs_base = fs_base;
            current.write(field::HOST_FS_BASE, fs_base);
        }
        let now = cpu.user_selectors();
        self.has_selectors = now.ds | now.es | now.fs | now.gs | now.ldtr != 0;
        if self.has_selectors {
            self.selectors = now;
        }
        self.dr7 = cpu.dr(7);
        self.debugctl = read_msr(cpu, msr::IA32_DEBUGCTL);
    }

    /// Puts back what the exits took. Interrupts are off.
    pub fn restore(&self, cpu: &impl Cpu) {
        if self.has_selectors {
            self.restore_selectors(cpu);
        } else {
            // SAFETY: it was read on this processor before the entry.
            unsafe { cpu.restore_segmentation(self.gdtr, &UserSelectors::default()) };
        }
        if self.dr7 != DR7_AFTER_EXIT {
            // SAFETY: the host's own value.
            unsafe { cpu.set_dr(7, self.dr7) };
        }
        if self.debugctl != 0 {
            // SAFETY: the host's own value.
            unsafe { cpu.wrmsr(msr::IA32_DEBUGCTL, self.debugctl) };
        }
    }

    #[cold]
    fn restore_selectors(&self, cpu: &impl Cpu) {
        // The host's again by now; loading GS loses it.
        let kernel_gs = (self.selectors.gs != 0).then(|| read_msr(cpu, msr::IA32_KERNEL_GSBASE));
        // SAFETY: both were read on this processor before the entry.
        unsafe { cpu.restore_segmentation(self.gdtr, &self.selectors) };
        if let Some(base) = kernel_gs {
            // SAFETY: the value read just before.
            unsafe { cpu.wrmsr(msr::IA32_KERNEL_GSBASE, base) };
        }
        if self.selectors.fs != 0 {
            // SAFETY: the value read before the entry; loading FS lost it.
            unsafe { cpu.wrmsr(msr::IA32_FS_BASE, self.fs_base) };
        }
    }
}
