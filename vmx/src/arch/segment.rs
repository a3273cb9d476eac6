//! Segment registers as the VMCS and the ABI hold them.

use bitflags::bitflags;

/// The segment registers in the order of the VMCS (SDM 25.4.1 "Guest Register
/// State") and of instruction encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SegmentRegister {
    /// ES.
    Es = 0,
    /// CS.
    Cs = 1,
    /// SS.
    Ss = 2,
    /// DS.
    Ds = 3,
    /// FS.
    Fs = 4,
    /// GS.
    Gs = 5,
    /// LDTR.
    Ldtr = 6,
    /// TR.
    Tr = 7,
}

bitflags! {
    /// Access rights, SDM 25.4.1 "Guest Register State", table 25-2. The ABI's
    /// `ar` has the same bits.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct AccessRights: u32 {
        /// Accessed (data and code).
        const ACCESSED = 1 << 0;
        /// Writable data, readable code; busy in a TSS.
        const READ_WRITE = 1 << 1;
        /// Expand-down data, conforming code.
        const DOWN_CONFORMING = 1 << 2;
        /// Code.
        const CODE = 1 << 3;
        /// Code or data, not system.
        const NON_SYSTEM = 1 << 4;
        /// Present.
        const PRESENT = 1 << 7;
        /// Available to software.
        const AVL = 1 << 12;
        /// 64-bit code.
        const LONG = 1 << 13;
        /// 32-bit operands and addresses, or a 4 GB stack.
        const DB = 1 << 14;
        /// The limit counts 4 KB units.
        const GRANULARITY = 1 << 15;
        /// The register holds nothing usable.
        const UNUSABLE = 1 << 16;
        const _ = !0;
    }
}

impl AccessRights {
    /// Bits 3:0.
    #[must_use]
    pub const fn kind(self) -> u32 {
        self.bits() & 0xf
    }

    /// Bits 6:5.
    #[must_use]
    pub const fn dpl(self) -> u8 {
        ((self.bits() >> 5) & 3) as u8
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base, a linear address.
    pub base: u64,
    /// Limit in bytes, the last valid offset.
    pub limit: u32,
    /// Access rights.
    pub rights: AccessRights,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Base, a linear address.
    pub base: u64,
    /// Limit in bytes, the last valid offset.
    pub limit: u16,
}
