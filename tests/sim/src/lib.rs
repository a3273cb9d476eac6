//! A simulated processor with VMX and a simulated operating system, behind the
//! core's two seams, so that everything above them runs under `cargo test`.
//!
//! The processor refuses like hardware: VMX instructions fail with the SDM's
//! error numbers, VM entries are checked as chapter 27 says, and each check has
//! a name ([`Check`]). What would be a #GP, a #UD or silent damage on a real
//! machine becomes a finding that fails the test. Guests are scripts: queues
//! of [`Step`]s. See README.md for how to use it.
//!
//! SDM citations: combined volumes, revision 325462-083US.

mod check;
pub mod client;
mod cores;
mod cpu;
mod entry;
mod ept;
mod exit;
mod extended;
pub mod fault;
mod guest;
mod host;
mod instructions;
mod lock;
mod machine;
mod memory;
mod pmu;
mod predictor;
mod profile;
pub mod rig;
mod state;
mod step;
mod user;
mod user_space;
mod vmcs;

pub use check::{Check, EntryFailure, Stage};
pub use cpu::SimCpu;
pub use ept::Access;
pub use guest::{ExitInfo, Guest, Stop, StringIo};
pub use host::{SimHost, SimSharedPage};
pub use instructions::error;
pub use lock::{SimMutex, SimSpin};
pub use machine::Machine;
pub use profile::Profile;
pub use state::{Counts, Received};
pub use step::Step;
pub use user::Process;
pub use user_space::{SimPins, SimUserSpace};
