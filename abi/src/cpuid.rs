//! The argument of SET_CPUID and GET_CPUID: a header and `total` entries behind it.
//!
//! On POSIX hosts the ioctl argument is the address of a variable that holds the address of the header. On
//! Windows the request's buffer is the header and its entries.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert::assert_layout;

/// Most entries a request may carry.
pub const MAX_CPUID_ENTRIES: u32 = 0x40;

/// What stands before the entries.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CpuidHeader {
    /// Entries that follow. GET_CPUID writes how many there are, also when the caller's room is too small.
    pub total: u32,
    /// Ignored.
    pub pad: u32,
}

assert_layout! { CpuidHeader, size 8, align 4;
total 0..4, pad 4..8 }

/// Offset of the first entry from the header, in bytes.
pub const CPUID_ENTRIES_OFFSET: usize = size_of::<CpuidHeader>();

/// One leaf or subleaf.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CpuidEntry {
    /// Leaf (EAX in).
    pub function: u32,
    /// Subleaf (ECX in).
    pub index: u32,
    /// HAXM gives these no meaning.
    pub flags: u32,
    /// EAX out.
    pub eax: u32,
    /// EBX out.
    pub ebx: u32,
    /// ECX out.
    pub ecx: u32,
    /// EDX out.
    pub edx: u32,
    /// Ignored.
    pub pad: [u32; 3],
}

assert_layout! { CpuidEntry, size 40, align 4;
function 0..4, index 4..8, flags 8..12, eax 12..16, ebx 16..20, ecx 20..24, edx 24..28, pad 28..40 }

/// Bytes of a header with `total` entries, or `None` if `total` is 0 or over [`MAX_CPUID_ENTRIES`].
#[must_use]
pub const fn cpuid_size(total: u32) -> Option<usize> {
    if total == 0 || total > MAX_CPUID_ENTRIES {
        return None;
    }
    // At most 8 + 64 * 40 bytes: cannot wrap.
    Some(CPUID_ENTRIES_OFFSET.wrapping_add((total as usize).wrapping_mul(size_of::<CpuidEntry>())))
}
