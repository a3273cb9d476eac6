//! Seam 1: the processor, at the instruction.
//!
//! Each method is one instruction, or one fixed sequence where single
//! instructions would make no sense apart. Above this trait everything is
//! ordinary Rust that `tests/sim` can run; below it there is
//! [`native`](self::native), the only folder with `asm!`.
// UNSAFETY: declares the methods whose misuse breaks the host.
#![expect(unsafe_code)]

pub mod native;

use crate::arch::addr::Hpa;
use crate::arch::ept::{InveptKind, InvvpidKind};

/// How a VMX instruction failed, SDM 31.2 "Conventions".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmxFailure {
    /// VMfailInvalid: there is no current VMCS, or VMXON was refused.
    Invalid,
    /// VMfailValid: the VM-instruction error field says why.
    Valid,
}

/// What CPUID returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CpuidResult {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// The guest registers that VM entry and exit leave to software.
///
/// Indexed as instructions encode them ([`crate::arch::reg::gpr`]). Slot 4,
/// RSP, is not loaded or stored by [`Cpu::enter`]: RSP lives in the VMCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct GuestRegs {
    /// RAX, RCX, RDX, RBX, (RSP), RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// The value last written to the HOST_RSP field of the VMCS that these
    /// registers belong to; 0 forces a write. Kept by [`Cpu::enter`].
    pub host_rsp: u64,
    /// How to enter: bits of [`how`]. [`Cpu::enter`] sets LAUNCHED and clears
    /// CHANGED.
    pub how: u64,
    /// The guest's IA32_SPEC_CTRL, with [`how::SPEC_CTRL`].
    pub spec_ctrl: u64,
    /// The host's, while the guest runs.
    pub host_spec_ctrl: u64,
    /// 0: the processor is the host's. 1: it was lent to this guest. Then
    /// [`Cpu::enter`] may make it 2: something was done once for the loan.
    pub on_loan: u64,
    /// For [`Cpu::enter`]: `how` as it was, and a selector.
    pub scratch: [u64; 2],
}

/// How to enter a guest. What is not 1 costs time in those guests that need it
/// and none in others.
pub mod how {
    /// The VMCS is in the launched state: VMRESUME.
    pub const LAUNCHED: u64 = 1 << 0;
    /// The bits below changed since the last entry.
    pub const CHANGED: u64 = 1 << 1;
    /// VERW before the entry: no data in the processor's buffers.
    pub const CLEAR_BUFFERS: u64 = 1 << 2;
    /// Fill the return-stack buffer after the exit.
    pub const FILL_RETURNS: u64 = 1 << 3;
    /// Switch IA32_SPEC_CTRL.
    pub const SPEC_CTRL: u64 = 1 << 4;
    /// Empty the L1 data cache before the first entry of a loan.
    pub const FLUSH_L1D: u64 = 1 << 5;
}

/// GDTR and IDTR as SGDT and SIDT store them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TableRegister {
    /// Linear address of the table.
    pub base: u64,
    /// Last valid byte.
    pub limit: u16,
}

/// Selectors of the kernel, which the host state of a VMCS wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct KernelSelectors {
    /// CS.
    pub cs: u16,
    /// SS.
    pub ss: u16,
    /// TR.
    pub tr: u16,
}

/// Selectors that a process may have chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct UserSelectors {
    /// DS.
    pub ds: u16,
    /// ES.
    pub es: u16,
    /// FS.
    pub fs: u16,
    /// GS.
    pub gs: u16,
    /// LDTR.
    pub ldtr: u16,
}

/// One method per privileged instruction.
///
/// # Contract of the unsafe methods
///
/// The caller runs in the host's kernel mode and cannot migrate to another
/// processor during the call. Each method's own section adds what else must
/// hold.
pub trait Cpu: Send + Sync + 'static {
    /// CPUID.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> CpuidResult;

    /// RDMSR.
    ///
    /// # Safety
    /// The register exists on this processor; otherwise the host takes a #GP.
    unsafe fn rdmsr(&self, msr: u32) -> u64;

    /// WRMSR.
    ///
    /// # Safety
    /// The register exists, takes this value, and the host can live with it
    /// until it is put back.
    unsafe fn wrmsr(&self, msr: u32, value: u64);

    /// RDFSBASE.
    ///
    /// # Safety
    /// CR4.FSGSBASE is set.
    unsafe fn fs_base(&self) -> u64;

    /// Exchanges IA32_KERNEL_GS_BASE, which is returned, for `value`: SWAPGS, RDGSBASE,
    /// WRGSBASE, SWAPGS. None of them waits for the instructions before it, as
    /// WRMSR does (SDM 9.3 "Serializing Instructions").
    ///
    /// # Safety
    /// CR4.FSGSBASE is set and CR4.FRED clear; interrupts are off; `value` is canonical by
    /// CR4.LA57; NMIs and machine checks may find any GS base
    /// ([`Host::tolerates_gs`](crate::host::Host::tolerates_gs)); the host's is put back.
    unsafe fn exchange_kernel_gs_base(&self, value: u64) -> u64;

    /// MOV from CR0.
    fn cr0(&self) -> u64;
    /// MOV from CR2.
    fn cr2(&self) -> u64;
    /// MOV from CR3.
    fn cr3(&self) -> u64;
    /// MOV from CR4.
    fn cr4(&self) -> u64;

    /// MOV to CR2.
    ///
    /// # Safety
    /// Interrupts are off, and no host page fault is being handled.
    unsafe fn set_cr2(&self, value: u64);

    /// MOV from DR0-3, DR6 or DR7.
    fn dr(&self, index: u8) -> u64;

    /// MOV to DR0-3, DR6 or DR7.
    ///
    /// # Safety
    /// The host's value is put back before anything but this code can run.
    unsafe fn set_dr(&self, index: u8, value: u64);

    /// RDTSC.
    fn rdtsc(&self) -> u64;

    /// SGDT.
    fn gdtr(&self) -> TableRegister;
    /// SIDT.
    fn idtr(&self) -> TableRegister;
    /// MOV from CS and SS, STR.
    fn kernel_selectors(&self) -> KernelSelectors;
    /// MOV from DS, ES, FS and GS, SLDT.
    fn user_selectors(&self) -> UserSelectors;
    /// The base in the TSS descriptor that TR selects in the current GDT.
    fn tr_base(&self) -> u64;

    /// Puts back what a VM exit takes from the host's segmentation: GDTR's
    /// limit, and LDTR, DS, ES, FS and GS where they are not null. SDM 28.5.2
    /// "Loading Host Segment and Descriptor-Table Registers". Loading FS
    /// changes its base to the descriptor's; the caller writes IA32_FS_BASE
    /// and IA32_KERNEL_GS_BASE afterwards.
    ///
    /// # Safety
    /// Interrupts are off, CR4.FRED is clear, and both values were read on this processor
    /// before the entry.
    unsafe fn restore_segmentation(&self, gdtr: TableRegister, selectors: &UserSelectors);

    /// XGETBV of XCR0.
    ///
    /// # Safety
    /// CR4.OSXSAVE is set.
    unsafe fn xcr0(&self) -> u64;

    /// XSETBV of XCR0.
    ///
    /// # Safety
    /// CR4.OSXSAVE is set; the processor supports the value; the host's value
    /// is put back before the host uses its extended state.
    unsafe fn set_xcr0(&self, value: u64);

    /// XSAVE of the components in `mask`; with 0, FXSAVE.
    ///
    /// # Safety
    /// `mask` is 0 unless CR4.OSXSAVE is set. `area` is 64-byte aligned, writable and as large as CPUID leaf 0xD says
    /// for the current XCR0 (512 bytes for FXSAVE).
    unsafe fn xsave(&self, area: *mut u8, mask: u64);

    /// XRSTOR of the components in `mask`; with 0, FXRSTOR.
    ///
    /// # Safety
    /// As [`Cpu::xsave`]; the area holds an image that the processor accepts.
    unsafe fn xrstor(&self, area: *const u8, mask: u64);

    /// Raises the host's NMI handler by INT 2, for an NMI that caused an exit.
    ///
    /// # Safety
    /// Called right after that exit, once per exit. CR4.FRED is clear.
    unsafe fn raise_nmi(&self);

    /// Raises the host's machine-check handler by INT 18, for a machine check
    /// that caused an exit.
    ///
    /// # Safety
    /// As [`Cpu::raise_nmi`].
    unsafe fn raise_machine_check(&self);

    /// VMXON with the region at `region`.
    ///
    /// # Safety
    /// The region is ours, page sized, holds the revision identifier, and stays
    /// until VMXOFF on this processor; CR4.VMXE is set.
    unsafe fn vmxon(&self, region: Hpa) -> Result<(), VmxFailure>;

    /// VMXOFF.
    ///
    /// # Safety
    /// This code executed the VMXON; no VMCS of ours is active here.
    unsafe fn vmxoff(&self) -> Result<(), VmxFailure>;

    /// VMCLEAR.
    ///
    /// # Safety
    /// In VMX operation; `vmcs` is a VMCS region.
    unsafe fn vmclear(&self, vmcs: Hpa) -> Result<(), VmxFailure>;

    /// VMPTRLD.
    ///
    /// # Safety
    /// In VMX operation; `vmcs` is a VMCS region that is not active on another
    /// processor.
    unsafe fn vmptrld(&self, vmcs: Hpa) -> Result<(), VmxFailure>;

    /// VMPTRST; `None` if there is no current VMCS (all ones).
    ///
    /// # Safety
    /// In VMX operation.
    unsafe fn vmptrst(&self) -> Option<Hpa>;

    /// VMREAD.
    ///
    /// # Safety
    /// In VMX operation.
    unsafe fn vmread(&self, field: u32) -> Result<u64, VmxFailure>;

    /// VMWRITE.
    ///
    /// # Safety
    /// In VMX operation, and the current VMCS is ours. A host-state field or a
    /// physical address written here is one the host can live with.
    unsafe fn vmwrite(&self, field: u32, value: u64) -> Result<(), VmxFailure>;

    /// INVEPT.
    ///
    /// # Safety
    /// In VMX operation.
    unsafe fn invept(&self, kind: InveptKind, eptp: u64) -> Result<(), VmxFailure>;

    /// INVVPID.
    ///
    /// # Safety
    /// In VMX operation.
    unsafe fn invvpid(&self, kind: InvvpidKind, vpid: u16, address: u64) -> Result<(), VmxFailure>;

    /// Loads the guest's registers, executes VMLAUNCH or VMRESUME as `regs.how`
    /// says, with what else it asks for, and stores the guest's registers after the exit. Writes
    /// HOST_RIP when it launches or `how` changed, and HOST_RSP when it differs from
    /// `regs.host_rsp`.
    ///
    /// # Safety
    /// Interrupts are off; the current VMCS is ours, with a host state that
    /// returns to this context; `regs.how` has its launch state, and SPEC_CTRL
    /// only where the register exists and takes `regs.spec_ctrl`.
    unsafe fn enter(&self, regs: &mut GuestRegs) -> Result<(), VmxFailure>;
}
