//! The Rust half of `haxm.ko`: the host seam over the C half, and the entry points the C half
//! calls. See `haxm.h` for the border; only integers and opaque pointers cross it.
//!
//! `cargo xtask module` compiles this crate, and all below it, into one object for every kernel.
#![no_std]
#![cfg_attr(haxm_module, feature(optimize_attribute))]
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
// Checked on a host, the crate borrows its panic handler and allocator.
#[cfg(not(target_os = "none"))]
extern crate std;

mod entry;
mod ffi;
mod host;
mod lock;
mod logger;
#[cfg(target_os = "none")]
mod runtime;
mod shared;
mod shim;
mod usage;
mod user;
