//! A processor that nobody asks anything: guest memory needs none.
// UNSAFETY: implements the unsafe methods of the processor seam.
#![expect(unsafe_code)]

use haxm_vmx::arch::addr::Hpa;
use haxm_vmx::arch::ept::{InveptKind, InvvpidKind};
use haxm_vmx::cpu::{
    Cpu, CpuidResult, GuestRegs, KernelSelectors, TableRegister, UserSelectors, VmxFailure,
};

/// The processor of [`super::FakeHost`].
pub(crate) struct NoCpu;

macro_rules! never {
    ($($(#[$u:tt])? fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*) => {
        $(never!(@ $($u)? $name, ($($arg: $ty),*), ($($ret)?));)*
    };
    (@ raw $name:ident, ($($arg:ident: $ty:ty),*), ($($ret:ty)?)) => {
        unsafe fn $name(&self, $($arg: $ty),*) $(-> $ret)? {
            $(let _ = $arg;)*
            unimplemented!()
        }
    };
    (@ $name:ident, ($($arg:ident: $ty:ty),*), ($($ret:ty)?)) => {
        fn $name(&self, $($arg: $ty),*) $(-> $ret)? {
            $(let _ = $arg;)*
            unimplemented!()
        }
    };
}

impl Cpu for NoCpu {
    never! {
        fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult;
        #[raw] fn rdmsr(msr: u32) -> u64;
        #[raw] fn wrmsr(msr: u32, value: u64);
        #[raw] fn fs_base() -> u64;
        #[raw] fn exchange_kernel_gs_base(value: u64) -> u64;
        fn cr0() -> u64;
        fn cr2() -> u64;
        fn cr3() -> u64;
        fn cr4() -> u64;
        #[raw] fn set_cr2(value: u64);
        fn dr(index: u8) -> u64;
        #[raw] fn set_dr(index: u8, value: u64);
        fn rdtsc() -> u64;
        fn gdtr() -> TableRegister;
        fn idtr() -> TableRegister;
        fn kernel_selectors() -> KernelSelectors;
        fn user_selectors() -> UserSelectors;
        fn tr_base() -> u64;
        #[raw] fn restore_segmentation(gdtr: TableRegister, selectors: &UserSelectors);
        #[raw] fn xcr0() -> u64;
        #[raw] fn set_xcr0(value: u64);
        #[raw] fn xsave(area: *mut u8, mask: u64);
        #[raw] fn xrstor(area: *const u8, mask: u64);
        #[raw] fn raise_nmi();
        #[raw] fn raise_machine_check();
        #[raw] fn vmxon(region: Hpa) -> Result<(), VmxFailure>;
        #[raw] fn vmxoff() -> Result<(), VmxFailure>;
        #[raw] fn vmclear(vmcs: Hpa) -> Result<(), VmxFailure>;
        #[raw] fn vmptrld(vmcs: Hpa) -> Result<(), VmxFailure>;
        #[raw] fn vmptrst() -> Option<Hpa>;
        #[raw] fn vmread(field: u32) -> Result<u64, VmxFailure>;
        #[raw] fn vmwrite(field: u32, value: u64) -> Result<(), VmxFailure>;
        #[raw] fn invept(kind: InveptKind, eptp: u64) -> Result<(), VmxFailure>;
        #[raw] fn invvpid(kind: InvvpidKind, vpid: u16, address: u64) -> Result<(), VmxFailure>;
        #[raw] fn enter(regs: &mut GuestRegs) -> Result<(), VmxFailure>;
    }
}
