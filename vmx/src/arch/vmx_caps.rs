//! The layout of the VMX capability MSRs, SDM appendix A "VMX Capability
//! Reporting Facility".

use bitflags::bitflags;

bitflags! {
    /// IA32_VMX_BASIC, SDM appendix A.1 "Basic VMX Information".
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct VmxBasic: u64 {
        /// Physical addresses of VMX structures are limited to 32 bits.
        const ADDRESS_32 = 1 << 48;
        /// INS and OUTS fill the instruction-information field.
        const STRING_IO_INFORMATION = 1 << 54;
        /// The TRUE control MSRs exist.
        const TRUE_CONTROLS = 1 << 55;
        const _ = !0;
    }
}

impl VmxBasic {
    /// The VMCS revision identifier, bits 30:0.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub const fn revision(self) -> u32 {
        (self.bits() & 0x7fff_ffff) as u32
    }

    /// Bytes of a VMXON region or VMCS, bits 44:32; at most 4096.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub const fn region_size(self) -> u32 {
        ((self.bits() >> 32) & 0x1fff) as u32
    }

    /// The memory type VMX structures should have, bits 53:50; 6 is write-back.
    #[must_use]
    pub const fn memory_type(self) -> u8 {
        ((self.bits() >> 50) & 0xf) as u8
    }
}

/// A control capability MSR: low half = bits that must be 1, high half = bits
/// that may be 1. SDM appendix A.2 "Reserved Controls and Default Settings".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct ControlCaps(pub u64);

impl ControlCaps {
    /// Bits that must be 1.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub const fn required(self) -> u32 {
        self.0 as u32
    }

    /// Bits that may be 1.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub const fn allowed(self) -> u32 {
        (self.0 >> 32) as u32
    }
}
