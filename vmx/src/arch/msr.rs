//! Model-specific registers by number, SDM vol. 4 chapter 2 "Model-Specific
//! Registers (MSRs)". The `x86` crate's names, plus what it lacks.

pub use x86::msr::{
    IA32_CSTAR, IA32_DEBUGCTL, IA32_EFER, IA32_FEATURE_CONTROL, IA32_FMASK, IA32_FS_BASE,
    IA32_GS_BASE, IA32_KERNEL_GSBASE, IA32_LSTAR, IA32_PAT, IA32_STAR, IA32_SYSENTER_CS,
    IA32_SYSENTER_EIP, IA32_SYSENTER_ESP, IA32_TSC_AUX, IA32_VMX_BASIC, IA32_VMX_CR0_FIXED0,
    IA32_VMX_CR0_FIXED1, IA32_VMX_CR4_FIXED0, IA32_VMX_CR4_FIXED1, IA32_VMX_ENTRY_CTLS,
    IA32_VMX_EPT_VPID_CAP, IA32_VMX_EXIT_CTLS, IA32_VMX_MISC, IA32_VMX_PINBASED_CTLS,
    IA32_VMX_PROCBASED_CTLS, IA32_VMX_PROCBASED_CTLS2, IA32_VMX_TRUE_ENTRY_CTLS,
    IA32_VMX_TRUE_EXIT_CTLS, IA32_VMX_TRUE_PINBASED_CTLS, IA32_VMX_TRUE_PROCBASED_CTLS,
};

/// Time-stamp counter.
pub const IA32_TSC: u32 = 0x10;
/// Local APIC base.
pub const IA32_APIC_BASE: u32 = 0x1b;
/// TSC adjustment.
pub const IA32_TSC_ADJUST: u32 = 0x3b;
/// What memory accesses may do, SDM 9.1.2.3 "Features to Disable Bus Locks".
pub const MSR_MEMORY_CTRL: u32 = 0x33;
/// Of that: split locks raise #AC.
pub const SPLIT_LOCK_DISABLE: u64 = 1 << 29;
/// What the core can do.
pub const IA32_CORE_CAPABILITIES: u32 = 0xcf;
/// Of that: [`SPLIT_LOCK_DISABLE`].
pub const SPLIT_LOCK_DISABLE_SUPPORTED: u64 = 1 << 5;
/// Speculation control.
pub const IA32_SPEC_CTRL: u32 = 0x48;
/// Prediction command.
pub const IA32_PRED_CMD: u32 = 0x49;
/// Cache flush command.
pub const IA32_FLUSH_CMD: u32 = 0x10b;
/// Architectural capabilities.
pub const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// The first performance counter; the others follow.
pub const IA32_PMC0: u32 = 0xc1;
/// The same with writes of its whole width, where IA32_PERF_CAPABILITIES says so.
pub const IA32_A_PMC0: u32 = 0x4c1;
/// What the first counter counts; the others follow.
pub const IA32_PERFEVTSEL0: u32 = 0x186;
/// Features that have switches of their own; what is missing.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// What the performance counters can do.
pub const IA32_PERF_CAPABILITIES: u32 = 0x345;
/// Counters that have overflowed.
pub const IA32_PERF_GLOBAL_STATUS: u32 = 0x38e;
/// Counters that may count.
pub const IA32_PERF_GLOBAL_CTRL: u32 = 0x38f;
/// Counters whose overflows are written to memory.
pub const IA32_PEBS_ENABLE: u32 = 0x3f1;
/// Supervisor XSAVE features.
pub const IA32_XSS: u32 = 0xda0;

/// IA32_FEATURE_CONTROL: the register is locked until reset.
pub const FEATURE_CONTROL_LOCKED: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: VMXON works outside SMX operation.
pub const FEATURE_CONTROL_VMXON: u64 = 1 << 2;
/// IA32_PAT after reset, SDM 12.12.4 "Programming the PAT".
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
