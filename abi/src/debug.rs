//! The argument of VCPU_DEBUG.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert::assert_layout;

bitflags! {
    /// `control` of [`VcpuDebug`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DebugControl: u32 {
        /// Debugging is on. Without it all the rest is cleared.
        const ENABLE = 1 << 0;
        /// Exit after each guest instruction.
        const STEP = 1 << 1;
        /// Exit on guest INT3 (#BP).
        const USE_SW_BP = 1 << 2;
        /// Take DR0–DR3 and DR7 from `dr`.
        const USE_HW_BP = 1 << 3;
    }
}

/// Argument of VCPU_DEBUG.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VcpuDebug {
    /// [`DebugControl`].
    pub control: u32,
    /// Ignored.
    pub reserved: u32,
    /// Debug registers by number; 0–3 and 7 are used, with [`DebugControl::USE_HW_BP`].
    pub dr: [u64; 8],
}

assert_layout! { VcpuDebug, size 72, align 8;
control 0..4, reserved 4..8, dr 8..72 }
