//! The device layer: what `/dev/HAX` and its children do, the same on every operating system.
//!
//! A shim implements [`Shim`] (device nodes, copies from and to the caller) and forwards what its
//! system calls into [`Devices`]; the core behind is reached through [`Core`]. Nothing here names
//! an operating system except as an entry of `abi`'s tables, picked once at load.
//!
//! How a shim uses it:
//! 1. load: [`Devices::load`]; the system node exists when it returns.
//! 2. open of a node: [`Devices::open`]; keep the [`Opened`] with the file ([`Shared::into_raw`]).
//! 3. a request: [`Devices::ioctl`], [`Devices::ioctl_copied`] or [`Devices::ioctl_buffered`],
//!    by the way the system passes arguments.
//! 4. last close: [`Devices::close`].
//! 5. unload, once [`Devices::open_handles`] is 0: [`Devices::unload`].
//!
//! [`Shared::into_raw`]: vmx::fallible::Shared::into_raw
#![no_std]
#![cfg_attr(haxm_module, feature(optimize_attribute))]
#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::unreachable,
    clippy::todo
)]

extern crate alloc;

mod argument;
mod cpuid;
mod devices;
mod hypervisor;
mod shim;
mod status;
mod system;
mod table;
mod vcpu;
mod vm;

pub use devices::{Devices, Handle, LoadError, Opened};
pub use hypervisor::{Capability, Core, CoreVcpu, CoreVm};
pub use shim::{Node, NodeFailed, Shim};
pub use status::Status;
