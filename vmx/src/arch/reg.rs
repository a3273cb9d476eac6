//! Control registers, EFER, RFLAGS, debug registers, XCR0, general registers.

use bitflags::bitflags;

/// Number of a general register in instruction encodings, VMCS qualifications
/// and the ABI's register block alike.
pub mod gpr {
    /// RAX.
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RBP.
    pub const RBP: usize = 5;
    /// RSI.
    pub const RSI: usize = 6;
    /// RDI.
    pub const RDI: usize = 7;
}

bitflags! {
    /// SDM 2.5 "Control Registers".
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr0: u64 {
        /// Protection enable.
        const PE = 1 << 0;
        /// Monitor coprocessor.
        const MP = 1 << 1;
        /// Emulation.
        const EM = 1 << 2;
        /// Task switched.
        const TS = 1 << 3;
        /// Extension type; always 1.
        const ET = 1 << 4;
        /// Numeric error.
        const NE = 1 << 5;
        /// Write protect.
        const WP = 1 << 16;
        /// Alignment mask.
        const AM = 1 << 18;
        /// Not write-through.
        const NW = 1 << 29;
        /// Cache disable.
        const CD = 1 << 30;
        /// Paging.
        const PG = 1 << 31;
        const _ = !0;
    }

    /// SDM 2.5 "Control Registers".
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr4: u64 {
        /// Virtual-8086 mode extensions.
        const VME = 1 << 0;
        /// Protected-mode virtual interrupts.
        const PVI = 1 << 1;
        /// Time stamp disable.
        const TSD = 1 << 2;
        /// Debugging extensions.
        const DE = 1 << 3;
        /// Page size extensions.
        const PSE = 1 << 4;
        /// Physical address extension.
        const PAE = 1 << 5;
        /// Machine-check enable.
        const MCE = 1 << 6;
        /// Page global enable.
        const PGE = 1 << 7;
        /// RDPMC at any privilege.
        const PCE = 1 << 8;
        /// FXSAVE and SSE enabled.
        const OSFXSR = 1 << 9;
        /// Unmasked SIMD exceptions.
        const OSXMMEXCPT = 1 << 10;
        /// User-mode instruction prevention.
        const UMIP = 1 << 11;
        /// 57-bit linear addresses.
        const LA57 = 1 << 12;
        /// VMX enable.
        const VMXE = 1 << 13;
        /// SMX enable.
        const SMXE = 1 << 14;
        /// FSGSBASE instructions.
        const FSGSBASE = 1 << 16;
        /// Process-context identifiers.
        const PCIDE = 1 << 17;
        /// XSAVE and XCR0 enabled.
        const OSXSAVE = 1 << 18;
        /// Key locker.
        const KL = 1 << 19;
        /// Supervisor-mode execution prevention.
        const SMEP = 1 << 20;
        /// Supervisor-mode access prevention.
        const SMAP = 1 << 21;
        /// Protection keys, user pages.
        const PKE = 1 << 22;
        /// Control-flow enforcement.
        const CET = 1 << 23;
        /// Protection keys, supervisor pages.
        const PKS = 1 << 24;
        /// Flexible return and event delivery.
        const FRED = 1 << 32;
        const _ = !0;
    }

    /// SDM 2.2.1 "Extended Feature Enable Register".
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Efer: u64 {
        /// SYSCALL enable.
        const SCE = 1 << 0;
        /// IA-32e mode enable.
        const LME = 1 << 8;
        /// IA-32e mode active.
        const LMA = 1 << 10;
        /// Execute-disable enable.
        const NXE = 1 << 11;
        const _ = !0;
    }

    /// SDM 3.4.3 "EFLAGS Register".
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Rflags: u64 {
        /// Carry.
        const CF = 1 << 0;
        /// Bit 1, always 1.
        const FIXED = 1 << 1;
        /// Parity.
        const PF = 1 << 2;
        /// Auxiliary carry.
        const AF = 1 << 4;
        /// Zero.
        const ZF = 1 << 6;
        /// Sign.
        const SF = 1 << 7;
        /// Trap: single step.
        const TF = 1 << 8;
        /// Interrupt enable.
        const IF = 1 << 9;
        /// Direction: strings run downwards.
        const DF = 1 << 10;
        /// Overflow.
        const OF = 1 << 11;
        /// Nested task.
        const NT = 1 << 14;
        /// Resume: suppress instruction breakpoints once.
        const RF = 1 << 16;
        /// Virtual-8086 mode.
        const VM = 1 << 17;
        /// Alignment check, or SMAP override.
        const AC = 1 << 18;
        /// Virtual interrupt flag.
        const VIF = 1 << 19;
        /// Virtual interrupt pending.
        const VIP = 1 << 20;
        /// CPUID is there.
        const ID = 1 << 21;
        const _ = !0;
    }

    /// Guest interruptibility, SDM 25.4.2 "Guest Non-Register State", table 25-3.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Interruptibility: u32 {
        /// The instruction after STI.
        const STI = 1 << 0;
        /// The instruction after MOV SS or POP SS.
        const MOV_SS = 1 << 1;
        /// Blocking by SMI.
        const SMI = 1 << 2;
        /// Blocking by NMI.
        const NMI = 1 << 3;
        const _ = !0;
    }

    /// XCR0, SDM 13.3 "Enabling the XSAVE Feature Set and XSAVE-Enabled Features".
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Xcr0: u64 {
        /// x87; always 1.
        const X87 = 1 << 0;
        /// XMM registers and MXCSR.
        const SSE = 1 << 1;
        /// Upper halves of the YMM registers.
        const AVX = 1 << 2;
        /// AVX-512 mask registers.
        const OPMASK = 1 << 5;
        /// Upper halves of ZMM0-15.
        const ZMM_HI256 = 1 << 6;
        /// ZMM16-31.
        const HI16_ZMM = 1 << 7;
        const _ = !0;
    }
}

/// Bits of RFLAGS that exist; the others read as 0 (bit 1 as 1).
pub const RFLAGS_DEFINED: u64 = 0x3f_7fd7;
/// DR6 with no condition set, SDM 18.2.3 "Debug Status Register (DR6)".
pub const DR6_RESET: u64 = 0xffff_0ff0;
/// Bits of DR6 that software can set: B0-3, BD, BS, BT, RTM.
pub const DR6_WRITABLE: u64 = 0x1_e00f;
/// DR7 with every breakpoint off, SDM 18.2.4 "Debug Control Register (DR7)".
pub const DR7_RESET: u64 = 0x400;
/// Bits of DR7 that software can set.
pub const DR7_WRITABLE: u64 = 0xffff_2bff;
/// DR7.GD: a debug-register access raises #DB.
pub const DR7_GD: u64 = 1 << 13;

/// Bits of a present PDPTE of PAE paging that must be 0, below the address: SDM
/// 4.4.1 "PDPTE Registers", table 4-8.
pub const PDPTE_RESERVED: u64 = 0x1e6;
