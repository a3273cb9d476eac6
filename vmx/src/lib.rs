//! The hypervisor core.
//!
//! Knows Intel VT-x and the semantics of HAXM's interface; knows no operating
//! system. Everything privileged goes through two seams: [`cpu::Cpu`], one
//! method per privileged instruction, and [`host::Host`], what an operating
//! system must lend us. `tests/sim` implements both on an ordinary machine.
//!
//! Floors, lowest first; a module uses only lower ones:
//! `arch` < `cpu`, `host`, `sync`, `fallible` < `caps`, `operation`, `platform`,
//! `memory`, `emulate` < `vcpu` < `vm` < `hypervisor`.
//!
//! Processor facts cite the Intel SDM, combined volumes, revision
//! 325462-083US, by section number and title.
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
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

extern crate alloc;

pub mod arch;
pub mod caps;
pub mod cpu;
pub mod emulate;
pub mod error;
pub mod fallible;
pub mod host;
pub mod hypervisor;
pub mod memory;
pub mod operation;
pub mod platform;
pub mod sync;
pub mod vcpu;
pub mod vm;

pub use error::Error;
pub use hypervisor::{Capability, Hypervisor, StartError};
pub use vcpu::Vcpu;
pub use vm::Vm;
