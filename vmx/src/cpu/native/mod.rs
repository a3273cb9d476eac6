//! The real processor. Only this folder has `asm!`.
//!
//! VMX instructions report through CF and ZF (SDM 31.2 "Conventions"); the
//! flags are captured in the same statement as the instruction.
// UNSAFETY: this file is the hardware boundary.
#![expect(unsafe_code)]

mod world_switch;

use core::arch::asm;

use self::world_switch::world_switch;
use super::{
    Cpu, CpuidResult, GuestRegs, KernelSelectors, TableRegister, UserSelectors, VmxFailure,
};
use crate::arch::addr::Hpa;
use crate::arch::ept::{InveptKind, InvvpidKind};

/// The processor this code runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Native;

/// SGDT's and SIDT's operand.
#[repr(C, packed)]
struct PseudoDescriptor {
    limit: u16,
    base: u64,
}

/// INVEPT's and INVVPID's operand.
#[repr(C, align(16))]
struct InvalidateDescriptor {
    first: u64,
    second: u64,
}

fn outcome(carry: u8, zero: u8) -> Result<(), VmxFailure> {
    if carry != 0 {
        Err(VmxFailure::Invalid)
    } else if zero != 0 {
        Err(VmxFailure::Valid)
    } else {
        Ok(())
    }
}

macro_rules! read_register {
    ($name:ident, $text:literal) => {
        fn $name(&self) -> u64 {
            let value: u64;
            // SAFETY: reading a control register in kernel mode changes nothing.
            unsafe { asm!($text, out(reg) value, options(nomem, nostack, preserves_flags)) };
            value
        }
    };
}

macro_rules! vmx_on_memory {
    ($name:ident, $text:literal) => {
        unsafe fn $name(&self, region: Hpa) -> Result<(), VmxFailure> {
            let operand = region.0;
            let (carry, zero): (u8, u8);
            // SAFETY: the caller keeps the trait's contract for this instruction.
            unsafe {
                asm!($text, "setc {carry}", "setz {zero}",
                     operand = in(reg) &raw const operand,
                     carry = out(reg_byte) carry, zero = lateout(reg_byte) zero,
                     options(nostack));
            }
            outcome(carry, zero)
        }
    };
}

macro_rules! read_selector {
    ($text:literal) => {{
        let selector: u32;
        // SAFETY: storing a selector changes nothing.
        unsafe { asm!($text, out(reg) selector, options(nomem, nostack, preserves_flags)) };
        (selector & 0xffff) as u16
    }};
}

impl Cpu for Native {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
        CpuidResult {
            eax: r.eax,
            ebx: r.ebx,
            ecx: r.ecx,
            edx: r.edx,
        }
    }

    unsafe fn rdmsr(&self, msr: u32) -> u64 {
        let (low, high): (u32, u32);
        // SAFETY: the caller says the register exists.
        unsafe {
            asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high,
                 options(nostack, preserves_flags));
        }
        (u64::from(high) << 32) | u64::from(low)
    }

    #[allow(clippy::cast_possible_truncation)]
    unsafe fn wrmsr(&self, msr: u32, value: u64) {
        // SAFETY: the caller says the register takes the value.
        unsafe {
            asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32,
                 options(nostack, preserves_flags));
        }
    }

    unsafe fn fs_base(&self) -> u64 {
        let base: u64;
        // SAFETY: the caller says CR4.FSGSBASE is set.
        unsafe { asm!("rdfsbase {}", out(reg) base, options(nomem, nostack, preserves_flags)) };
        base
    }

    unsafe fn exchange_kernel_gs_base(&self, value: u64) -> u64 {
        let before: u64;
        // SAFETY: the caller's contract: no instruction faults, and what can
        // interrupt them finds its own way to its data. None uses GS.
        unsafe {
            asm!("swapgs", "rdgsbase {before}", "wrgsbase {value}", "swapgs",
                 before = out(reg) before, value = in(reg) value,
                 options(nostack, preserves_flags));
        }
        before
    }

    read_register!(cr0, "mov {}, cr0");
    read_register!(cr2, "mov {}, cr2");
    read_register!(cr3, "mov {}, cr3");
    read_register!(cr4, "mov {}, cr4");

    unsafe fn set_cr2(&self, value: u64) {
        // SAFETY: CR2 only matters to a page-fault handler; the caller excludes one.
        unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
    }

    fn dr(&self, index: u8) -> u64 {
        let value: u64;
        macro_rules! get {
            ($text:literal) => {
                // SAFETY: reading a debug register in kernel mode changes nothing.
                unsafe { asm!($text, out(reg) value, options(nomem, nostack, preserves_flags)) }
            };
        }
        match index {
            0 => get!("mov {}, dr0"),
            1 => get!("mov {}, dr1"),
            2 => get!("mov {}, dr2"),
            3 => get!("mov {}, dr3"),
            6 => get!("mov {}, dr6"),
            _ => get!("mov {}, dr7"),
        }
        value
    }

    unsafe fn set_dr(&self, index: u8, value: u64) {
        macro_rules! set {
            ($text:literal) => {
                // SAFETY: the caller puts the host's value back in time.
                unsafe { asm!($text, in(reg) value, options(nomem, nostack, preserves_flags)) }
            };
        }
        match index {
            0 => set!("mov dr0, {}"),
            1 => set!("mov dr1, {}"),
            2 => set!("mov dr2, {}"),
            3 => set!("mov dr3, {}"),
            6 => set!("mov dr6, {}"),
            _ => set!("mov dr7, {}"),
        }
    }

    fn rdtsc(&self) -> u64 {
        let (low, high): (u32, u32);
        // SAFETY: RDTSC changes nothing.
        unsafe {
            asm!("rdtsc", out("eax") low, out("edx") high,
                 options(nomem, nostack, preserves_flags));
        }
        (u64::from(high) << 32) | u64::from(low)
    }

    fn gdtr(&self) -> TableRegister {
        let mut table = PseudoDescriptor { limit: 0, base: 0 };
        // SAFETY: the operand is ten writable bytes.
        unsafe {
            asm!("sgdt [{}]", in(reg) &raw mut table, options(nostack, preserves_flags));
        }
        TableRegister {
            base: table.base,
            limit: table.limit,
        }
    }

    fn idtr(&self) -> TableRegister {
        let mut table = PseudoDescriptor { limit: 0, base: 0 };
        // SAFETY: the operand is ten writable bytes.
        unsafe {
            asm!("sidt [{}]", in(reg) &raw mut table, options(nostack, preserves_flags));
        }
        TableRegister {
            base: table.base,
            limit: table.limit,
        }
    }

    fn kernel_selectors(&self) -> KernelSelectors {
        KernelSelectors {
            cs: read_selector!("mov {:e}, cs"),
            ss: read_selector!("mov {:e}, ss"),
            tr: read_selector!("str {:e}"),
        }
    }

    fn user_selectors(&self) -> UserSelectors {
        UserSelectors {
            ds: read_selector!("mov {:e}, ds"),
            es: read_selector!("mov {:e}, es"),
            fs: read_selector!("mov {:e}, fs"),
            gs: read_selector!("mov {:e}, gs"),
            ldtr: read_selector!("sldt {:e}"),
        }
    }

    unsafe fn restore_segmentation(&self, gdtr: TableRegister, selectors: &UserSelectors) {
        let table = PseudoDescriptor {
            limit: gdtr.limit,
            base: gdtr.base,
        };
        // SAFETY: the table is the one this processor used before the entry.
        unsafe {
            asm!("lgdt [{}]", in(reg) &raw const table, options(nostack, preserves_flags));
        }
        macro_rules! reload {
            ($selector:expr, $text:literal) => {
                if $selector != 0 {
                    // SAFETY: the register held this selector before the entry.
                    unsafe {
                        asm!($text, in("ax") $selector, options(nostack, preserves_flags));
                    }
                }
            };
        }
        reload!(selectors.ldtr, "lldt ax");
        reload!(selectors.ds, "mov ds, ax");
        reload!(selectors.es, "mov es, ax");
        reload!(selectors.fs, "mov fs, ax");
        // In the kernel GS's base is the kernel's; the selector is the user's.
        reload!(selectors.gs, "swapgs; mov gs, ax; swapgs");
    }

    /// SDM 8.2.3 "TSS Descriptor in 64-bit mode", figure 8-4.
    fn tr_base(&self) -> u64 {
        let table = self.gdtr();
        let offset = u64::from(self.kernel_selectors().tr & !7);
        let descriptor = table.base.wrapping_add(offset) as *const u64;
        // SAFETY: TR holds a selector of the current GDT, so the descriptor is there.
        let low = unsafe { descriptor.read_volatile() };
        let upper_half = descriptor.wrapping_add(1);
        // SAFETY: a TSS descriptor is 16 bytes in 64-bit mode.
        let high = unsafe { upper_half.read_volatile() };
        ((low >> 16) & 0x00ff_ffff) | ((low >> 32) & 0xff00_0000) | (high << 32)
    }

    unsafe fn xcr0(&self) -> u64 {
        let (low, high): (u32, u32);
        // SAFETY: the caller says CR4.OSXSAVE is set.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
                 options(nomem, nostack, preserves_flags));
        }
        (u64::from(high) << 32) | u64::from(low)
    }

    #[allow(clippy::cast_possible_truncation)]
    unsafe fn set_xcr0(&self, value: u64) {
        // SAFETY: the caller says the processor supports the value.
        unsafe {
            asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
                 options(nomem, nostack, preserves_flags));
        }
    }

    #[allow(clippy::cast_possible_truncation)]
    #[inline]
    unsafe fn xsave(&self, area: *mut u8, mask: u64) {
        if mask != 0 {
            // SAFETY: the caller gives an area of the right size and alignment.
            unsafe {
                asm!("xsave64 [{}]", in(reg) area, in("eax") mask as u32,
                     in("edx") (mask >> 32) as u32, options(nostack, preserves_flags));
            }
        } else {
            // SAFETY: as above, 512 bytes.
            unsafe { asm!("fxsave64 [{}]", in(reg) area, options(nostack, preserves_flags)) };
        }
    }

    #[allow(clippy::cast_possible_truncation)]
    #[inline]
    unsafe fn xrstor(&self, area: *const u8, mask: u64) {
        if mask != 0 {
            // SAFETY: the caller gives an image that the processor accepts.
            unsafe {
                asm!("xrstor64 [{}]", in(reg) area, in("eax") mask as u32,
                     in("edx") (mask >> 32) as u32, options(nostack, preserves_flags));
            }
        } else {
            // SAFETY: as above, 512 bytes.
            unsafe { asm!("fxrstor64 [{}]", in(reg) area, options(nostack, preserves_flags)) };
        }
    }

    unsafe fn raise_nmi(&self) {
        // SAFETY: the caller stands right behind an NMI exit; the host's NMI
        // handler preserves every register.
        unsafe { asm!("int 2") };
    }

    unsafe fn raise_machine_check(&self) {
        // SAFETY: the caller stands right behind a machine-check exit; the
        // host's handler reads the banks and preserves every register.
        unsafe { asm!("int 18") };
    }

    vmx_on_memory!(vmxon, "vmxon qword ptr [{operand}]");
    vmx_on_memory!(vmclear, "vmclear qword ptr [{operand}]");
    vmx_on_memory!(vmptrld, "vmptrld qword ptr [{operand}]");

    unsafe fn vmxoff(&self) -> Result<(), VmxFailure> {
        let (carry, zero): (u8, u8);
        // SAFETY: the caller executed the VMXON.
        unsafe {
            asm!("vmxoff", "setc {carry}", "setz {zero}",
                 carry = out(reg_byte) carry, zero = lateout(reg_byte) zero, options(nostack));
        }
        outcome(carry, zero)
    }

    unsafe fn vmptrst(&self) -> Option<Hpa> {
        let mut pointer = u64::MAX;
        // SAFETY: the caller is in VMX operation; the operand is 8 writable bytes.
        unsafe { asm!("vmptrst qword ptr [{}]", in(reg) &raw mut pointer, options(nostack)) };
        (pointer != u64::MAX).then_some(Hpa(pointer))
    }

    #[inline(always)]
    unsafe fn vmread(&self, field: u32) -> Result<u64, VmxFailure> {
        let value: u64;
        let failed: u8;
        // SAFETY: the caller is in VMX operation.
        unsafe {
            asm!("vmread {value}, {field}", "setna {failed}",
                 value = out(reg) value, field = in(reg) u64::from(field),
                 failed = lateout(reg_byte) failed, options(nostack));
        }
        if failed == 0 {
            Ok(value)
        } else {
            Err(self.failure())
        }
    }

    #[inline(always)]
    unsafe fn vmwrite(&self, field: u32, value: u64) -> Result<(), VmxFailure> {
        let failed: u8;
        // SAFETY: the caller keeps the trait's contract.
        unsafe {
            asm!("vmwrite {field}, {value}", "setna {failed}",
                 value = in(reg) value, field = in(reg) u64::from(field),
                 failed = lateout(reg_byte) failed, options(nostack));
        }
        if failed == 0 {
            Ok(())
        } else {
            Err(self.failure())
        }
    }

    unsafe fn invept(&self, kind: InveptKind, eptp: u64) -> Result<(), VmxFailure> {
        let descriptor = InvalidateDescriptor {
            first: eptp,
            second: 0,
        };
        let (carry, zero): (u8, u8);
        // SAFETY: the caller is in VMX operation; the operand is 16 bytes.
        unsafe {
            asm!("invept {kind}, xmmword ptr [{operand}]", "setc {carry}", "setz {zero}",
                 kind = in(reg) kind as u64, operand = in(reg) &raw const descriptor,
                 carry = out(reg_byte) carry, zero = lateout(reg_byte) zero,
                 options(nostack));
        }
        outcome(carry, zero)
    }

    unsafe fn invvpid(&self, kind: InvvpidKind, vpid: u16, address: u64) -> Result<(), VmxFailure> {
        let descriptor = InvalidateDescriptor {
            first: u64::from(vpid),
            second: address,
        };
        let (carry, zero): (u8, u8);
        // SAFETY: the caller is in VMX operation; the operand is 16 bytes.
        unsafe {
            asm!("invvpid {kind}, xmmword ptr [{operand}]", "setc {carry}", "setz {zero}",
                 kind = in(reg) kind as u64, operand = in(reg) &raw const descriptor,
                 carry = out(reg_byte) carry, zero = lateout(reg_byte) zero,
                 options(nostack));
        }
        outcome(carry, zero)
    }

    unsafe fn enter(&self, regs: &mut GuestRegs) -> Result<(), VmxFailure> {
        // SAFETY: the caller keeps the trait's contract.
        let failed = unsafe { world_switch(regs) };
        if failed & 1 == 0 {
            Ok(())
        } else {
            Err(self.failure())
        }
    }
}

impl Native {
    /// Which of the two failures a VMX instruction had whose CF or ZF was set:
    /// without a current VMCS it can only be VMfailInvalid, with one only
    /// VMfailValid (SDM 31.2 "Conventions"). In VMX operation.
    #[cold]
    #[inline(never)]
    fn failure(&self) -> VmxFailure {
        // SAFETY: the instruction that failed needs VMX operation, too.
        match unsafe { self.vmptrst() } {
            Some(_) => VmxFailure::Valid,
            None => VmxFailure::Invalid,
        }
    }
}
