//! Performance counters: SDM 20.2 "Architectural Performance Monitoring".

use bitflags::bitflags;

bitflags! {
    /// IA32_PERFEVTSELx, SDM 20.2.1.1 "Architectural Performance Monitoring
    /// Version 1 Facilities", figure 20-1. Bits 15:0 are event and unit mask, bits
    /// 31:24 the counter mask.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EventSelect: u64 {
        /// Counts at CPL 1 to 3.
        const USR = 1 << 16;
        /// Counts at CPL 0.
        const OS = 1 << 17;
        /// Counts edges.
        const EDGE = 1 << 18;
        /// Drives a pin.
        const PIN_CONTROL = 1 << 19;
        /// An overflow raises an interrupt.
        const INT = 1 << 20;
        /// The counter is enabled.
        const ENABLE = 1 << 22;
        /// The counter mask is inverted.
        const INVERT = 1 << 23;
        const _ = !0;
    }
}

/// Bits that version 1 reserves: 21, which later versions call AnyThread, and
/// the upper half.
pub const EVENT_SELECT_RESERVED: u64 = 0xffff_ffff_0020_0000;

/// IA32_PERF_CAPABILITIES: IA32_A_PMCx exist, SDM 20.2.8 "Full-Width Writes to
/// Performance Counter Registers".
pub const FULL_WIDTH_WRITES: u64 = 1 << 13;
/// IA32_MISC_ENABLE: there is no PEBS, SDM vol. 4, table 2-2.
pub const PEBS_UNAVAILABLE: u64 = 1 << 12;
/// IA32_PERF_GLOBAL_STATUS: bits that announce no interrupt, and that some
/// processors keep set: 60, an enclave has run; 63, the counters' condition changed.
/// SDM 20.2.4.2 "IA32_PERF_GLOBAL_STATUS and IA32_PERF_GLOBAL_STATUS_RESET".
pub const STATUS_NO_INTERRUPT: u64 = 1 << 60 | 1 << 63;
