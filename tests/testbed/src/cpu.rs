//! Processor models of the emulator, named by what they are good for in tests.

/// EPT with accessed and dirty flags, VPID, unrestricted guest; the default. Its time-stamp counter is
/// measured by the kernel, which later models make it believe from CPUID: every delay then costs many
/// times more ticks.
pub const HASWELL: &str = "corei7_haswell_4770";
/// As Haswell, with PML, posted interrupts, mode-based execute control and TSC scaling.
pub const SKYLAKE_X: &str = "corei7_skylake_x";
/// EPT without accessed and dirty flags.
pub const SANDY_BRIDGE: &str = "corei7_sandy_bridge_2600k";
/// VMX with EPT and VPID, but real mode cannot be run directly.
pub const WITHOUT_UNRESTRICTED_GUEST: &str = "corei5_lynnfield_750";
/// VMX without EPT and VPID.
pub const WITHOUT_EPT: &str = "core2_penryn_t9600";
/// A 64-bit Intel processor without VMX.
pub const WITHOUT_VMX: &str = "p4_prescott_celeron_336";
