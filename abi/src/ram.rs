//! Guest memory: RAM blocks (buffers of the client), mappings of guest-physical ranges onto them, and
//! access protection.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert::assert_layout;

/// First guest frame number (GPA / 4096) that SET_RAM refuses: a mapping must end at or below
/// `MAX_GFN * 4096` bytes less one page (8 TB).
pub const MAX_GFN: u64 = 1 << 31;

/// Bytes of guest memory whose protection is reported as one group by a PAGEFAULT exit.
pub const PROTECTION_GROUP_SIZE: u64 = 2 << 20;

bitflags! {
    /// `flags` of [`SetRamInfo`] and [`SetRamInfo2`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RamFlags: u32 {
        /// The guest may not write; its writes come out as MMIO.
        const ROM = 1 << 0;
        /// Make a RAM block that covers exactly this mapping and dies with it.
        const STANDALONE = 1 << 6;
        /// Unmap. Must be the only flag, with `va` 0.
        const INVALID = 1 << 7;
    }

    /// `flags` of [`ProtectRamInfo`]; the low three bits must be all clear or all set.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct RamPermissions: u32 {
        /// Guest reads.
        const R = 1 << 0;
        /// Guest writes.
        const W = 1 << 1;
        /// Guest instruction fetches.
        const X = 1 << 2;
        /// All accesses allowed. Clear: none.
        const RWX = 7;
    }
}

/// Argument of ALLOC_RAM: registers a RAM block of less than 4 GB.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AllocRamInfo {
    /// Bytes.
    pub size: u32,
    /// Ignored.
    pub pad: u32,
    /// Address of the buffer in the calling process.
    pub va: u64,
}

assert_layout! { AllocRamInfo, size 16, align 8;
size 0..4, pad 4..8, va 8..16 }

/// Argument of ADD_RAMBLOCK: registers a RAM block.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct RamblockInfo {
    /// Address of the buffer in the calling process.
    pub start_va: u64,
    /// Bytes.
    pub size: u64,
    /// Must be 0.
    pub reserved: u64,
}

assert_layout! { RamblockInfo, size 24, align 8;
start_va 0..8, size 8..16, reserved 16..24 }

/// Argument of SET_RAM: maps or unmaps less than 4 GB.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SetRamInfo {
    /// Guest-physical address.
    pub pa_start: u64,
    /// Bytes.
    pub size: u32,
    /// [`RamFlags`].
    pub flags: u8,
    /// Ignored.
    pub pad: [u8; 3],
    /// Address in the calling process that backs `pa_start`.
    pub va: u64,
}

assert_layout! { SetRamInfo, size 24, align 8;
pa_start 0..8, size 8..12, flags 12..13, pad 13..16, va 16..24 }

/// Argument of SET_RAM2: maps or unmaps any size.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SetRamInfo2 {
    /// Guest-physical address.
    pub pa_start: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the calling process that backs `pa_start`.
    pub va: u64,
    /// [`RamFlags`].
    pub flags: u32,
    /// Must be 0.
    pub reserved1: u32,
    /// Must be 0.
    pub reserved2: u64,
}

assert_layout! { SetRamInfo2, size 40, align 8;
pa_start 0..8, size 8..16, va 16..24, flags 24..28, reserved1 28..32, reserved2 32..40 }

/// Argument of PROTECT_RAM: allows or forbids guest access to a range.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ProtectRamInfo {
    /// Guest-physical address.
    pub pa_start: u64,
    /// Bytes.
    pub size: u64,
    /// [`RamPermissions`].
    pub flags: u32,
    /// Must be 0.
    pub reserved: u32,
}

assert_layout! { ProtectRamInfo, size 24, align 8;
pa_start 0..8, size 8..16, flags 16..20, reserved 20..24 }
