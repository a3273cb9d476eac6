//! The argument of SET_MSRS and GET_MSRS.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert::assert_layout;

/// Length of the array in [`MsrData`].
pub const MSR_ARRAY_LEN: usize = 0x20;
/// Most MSRs one request may carry: HAXM refuses `nr_msr` from [`MSR_ARRAY_LEN`] on, although that many
/// would fit.
pub const MAX_MSRS: u16 = 31;

/// One MSR.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VmxMsr {
    /// MSR index; only the low 32 bits name an MSR.
    pub entry: u64,
    /// Its value.
    pub value: u64,
}

assert_layout! { VmxMsr, size 16, align 8;
entry 0..8, value 8..16 }

/// Argument of SET_MSRS and GET_MSRS.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MsrData {
    /// Entries in use: at most [`MAX_MSRS`].
    pub nr_msr: u16,
    /// Out: entries handled before the first refused one.
    pub done: u16,
    /// Ignored.
    pub pad: [u16; 2],
    /// The MSRs.
    pub entries: [VmxMsr; MSR_ARRAY_LEN],
}

assert_layout! { MsrData, size 520, align 8;
nr_msr 0..2, done 2..4, pad 4..8, entries 8..520 }
