//! What the system device says about the module: version, capabilities, memory limit, and the limits of
//! the whole module.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert::assert_layout;

/// API version this ABI is: what VERSION returns as `cur_version`. It never changed in HAXM's public
/// history; features are announced by [`Capabilities`] instead.
pub const CURRENT_VERSION: u32 = 4;
/// Oldest API version a client may have been written for: what VERSION returns as `compat_version`.
pub const COMPAT_VERSION: u32 = 1;

/// VMs that can exist at once, except on NetBSD.
pub const MAX_VMS: u32 = 64;
/// VMs that can exist at once on NetBSD, where three bits of a minor number name the VM.
pub const MAX_VMS_NETBSD: u32 = 8;
/// vCPUs of one VM; ids are `0..MAX_VCPUS`.
pub const MAX_VCPUS: u32 = 16;

/// Memory limit, and so the quota, of a module on which nobody has called SET_MEMLIMIT. Bytes.
pub const DEFAULT_MEM_QUOTA: u64 = 1 << 48;
/// Bytes in the unit of [`SetMemlimit::memory_limit`].
pub const MEM_LIMIT_UNIT: u64 = 1 << 20;

/// Windows device type in every request number.
pub const WINDOWS_DEVICE_TYPE: u32 = 0x4000;
/// Code selector of a 64-bit macOS kernel, as HAXM's headers name it. Not part of any argument.
pub const KERNEL64_CS: u16 = 0x80;
/// Code selector of a 32-bit macOS kernel, as HAXM's headers name it. Not part of any argument.
pub const KERNEL32_CS: u16 = 0x08;

/// Argument of VERSION.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ModuleVersion {
    /// Oldest client API version served: [`COMPAT_VERSION`].
    pub compat_version: u32,
    /// API version of the module: [`CURRENT_VERSION`].
    pub cur_version: u32,
}

assert_layout! { ModuleVersion, size 8, align 4;
compat_version 0..4, cur_version 4..8 }

bitflags! {
    /// `wstatus` of [`CapabilityInfo`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct WorkStatus: u16 {
        /// Guests can run here. Without it `winfo` holds [`FailReasons`].
        const WORKING = 1 << 0;
        /// `mem_quota` is valid.
        const MEMQUOTA = 1 << 1;
    }

    /// `winfo` of [`CapabilityInfo`] when [`WorkStatus::WORKING`] is clear.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FailReasons: u16 {
        /// VT-x is missing, incomplete or locked off.
        const VT = 1 << 0;
        /// Execute-disable is missing or off.
        const NX = 1 << 1;
    }

    /// `winfo` of [`CapabilityInfo`] when [`WorkStatus::WORKING`] is set.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Capabilities: u16 {
        /// Extended page tables are in use.
        const EPT = 1 << 0;
        /// MMIO is reported as FAST_MMIO exits.
        const FASTMMIO = 1 << 1;
        /// Unrestricted guest: real mode runs without REALMODE exits.
        const UG = 1 << 2;
        /// ADD_RAMBLOCK exists.
        const RAMBLOCK_64BIT = 1 << 3;
        /// SET_RAM2 exists.
        const SETRAM_64BIT = 1 << 4;
        /// The tunnel is a whole page.
        const TUNNEL_PAGE = 1 << 5;
        /// PROTECT_RAM and the PAGEFAULT exit exist.
        const RAM_PROTECTION = 1 << 6;
        /// VCPU_DEBUG and the DEBUG exit exist.
        const DEBUG = 1 << 7;
        /// The STANDALONE flag of SET_RAM2 exists.
        const IMPLICIT_RAMBLOCK = 1 << 8;
        /// SET_CPUID and GET_CPUID exist.
        const CPUID = 1 << 9;
    }
}

/// Mask of the bit of `wstatus` that says whether the module works.
pub const WORKSTATUS_MASK: u16 = 1;

/// Argument of CAPABILITY.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CapabilityInfo {
    /// [`WorkStatus`].
    pub wstatus: u16,
    /// [`Capabilities`] if working, else [`FailReasons`].
    pub winfo: u16,
    /// Windows: reference count of the system device object. Elsewhere 0.
    pub win_refcount: u32,
    /// Guest memory that may still be used, in bytes. Valid with [`WorkStatus::MEMQUOTA`].
    pub mem_quota: u64,
}

assert_layout! { CapabilityInfo, size 16, align 8;
wstatus 0..2, winfo 2..4, win_refcount 4..8, mem_quota 8..16 }

/// Argument of SET_MEMLIMIT.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SetMemlimit {
    /// 0 removes the limit; anything else sets it.
    pub enable_memlimit: u8,
    /// Ignored.
    pub pad: [u8; 7],
    /// The limit in units of [`MEM_LIMIT_UNIT`] (MB).
    pub memory_limit: u64,
}

assert_layout! { SetMemlimit, size 16, align 8;
enable_memlimit 0..1, pad 1..8, memory_limit 8..16 }

/// Argument of NOTIFY_QEMU_VERSION: the API versions of the client.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct QemuVersion {
    /// API version the client was written for.
    pub cur_version: u32,
    /// Oldest API version the client can use.
    pub least_version: u32,
}

assert_layout! { QemuVersion, size 8, align 4;
cur_version 0..4, least_version 4..8 }
