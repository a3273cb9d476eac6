//! The HAXM ioctl ABI: what a program and the driver say to each other, and nothing about what it does.
//!
//! All 27 requests with their numbers on Linux, macOS, NetBSD and Windows, all 21 structures, every flag,
//! exit status and limit. The four number tables are compiled on every host. Offsets, sizes and request
//! numbers are asserted at compile time, so a crate that builds has the right layout.
//!
//! | module | what it holds |
//! |---|---|
//! | [`request`] | [`Request`], [`Device`], argument size and direction of each request |
//! | [`os`] | [`Os`] and the four number tables: `decode(device, number)`, `number(request)` |
//! | [`module`] | system device: version, capabilities, memory limit; the limits of the whole module |
//! | [`ram`] | RAM blocks, mappings, protection |
//! | [`vcpu_state`] | registers, segments, the FXSAVE image |
//! | [`msr`], [`cpuid`], [`debug`] | the arguments of those vCPU requests |
//! | [`tunnel`] | the shared tunnel page and I/O buffer, [`ExitStatus`] |
//! | [`node`] | device node names |
//! | [`layout`], [`constants`] | the same facts as data, with HAXM's C names, for tools and tests |
//!
//! Structures are plain data without padding holes and convert to and from bytes safely through
//! [`zerocopy`] (`as_bytes`, `read_from_bytes`, `new_zeroed`). Rust fields carry HAXM's names without a leading
//! underscore. Flag fields stay integers in the structures, because any value may arrive from outside; the
//! matching `bitflags` type is read with `from_bits_retain`, which keeps unknown bits.
//!
//! Everything is little-endian, as on the only processors this exists for.
#![no_std]
#![forbid(unsafe_code)]

mod assert;
pub mod constants;
pub mod cpuid;
pub mod debug;
pub mod layout;
pub mod module;
pub mod msr;
pub mod node;
pub mod os;
pub mod ram;
pub mod request;
pub mod tunnel;
pub mod vcpu_state;

pub use zerocopy;

pub use cpuid::{CpuidEntry, CpuidHeader, MAX_CPUID_ENTRIES};
pub use debug::{DebugControl, VcpuDebug};
pub use module::{
    COMPAT_VERSION, CURRENT_VERSION, Capabilities, CapabilityInfo, FailReasons, MAX_VCPUS, MAX_VMS,
    MAX_VMS_NETBSD, ModuleVersion, QemuVersion, SetMemlimit, WorkStatus,
};
pub use msr::{MAX_MSRS, MSR_ARRAY_LEN, MsrData, VmxMsr};
pub use os::Os;
pub use ram::{
    AllocRamInfo, ProtectRamInfo, RamFlags, RamPermissions, RamblockInfo, SetRamInfo, SetRamInfo2,
};
pub use request::{Argument, Device, Direction, Request};
pub use tunnel::{
    EXIT_REASON_PAUSE, ExitStatus, FastMmio, FastMmioDirection, IO_BUFFER_SIZE, IoDirection,
    IoFlags, PageFaultFlags, TUNNEL_SIZE, Tunnel, TunnelDebug, TunnelInfo, TunnelIo, TunnelMmio,
    TunnelPageFault, TunnelState,
};
pub use vcpu_state::{
    FxLayout, Interruptibility, InterruptibilityState, SegmentAccess, SegmentDesc, VcpuState,
};

#[cfg(not(target_endian = "little"))]
compile_error!("the ABI is little-endian");
