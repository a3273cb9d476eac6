//! The emulated VT-x PC: a test machine for machines without VT-x.
//!
//! Bochs emulates a PC whose processor has VMX, a stock Debian kernel boots in it in a few seconds,
//! a script runs, and its exit code, its output and the number of instructions come back. Two runs
//! of the same contents are the same to the byte.
//!
//! ```no_run
//! use std::time::Duration;
//! let outcome = testbed::Pc::new()
//!     .cpu(testbed::cpu::HASWELL)
//!     .memory_mb(512)
//!     .file("/haxm.ko", "target/module/haxm.ko")
//!     .script("insmod /haxm.ko && test -c /dev/HAX")
//!     .timeout(Duration::from_secs(60))
//!     .run(&mut std::io::stdout())?;
//! assert!(outcome.success(), "{outcome}");
//! # anyhow::Ok(())
//! ```
//!
//! Everything needed is installed, fetched or built at first use and kept in the [`folder`].

pub mod archive;
pub mod bochs;
pub mod bzimage;
pub mod client;
pub mod command;
pub mod cpio;
pub mod cpu;
pub mod disk;
pub mod elf;
pub mod firmware;
pub mod folder;
pub mod guest;
pub mod kernel;
mod linux_source;
pub mod outcome;
pub mod packages;
mod pc;

pub use folder::WorkFolder;
pub use kernel::{Flavour, Kernel};
pub use outcome::{Cause, Outcome};
pub use packages::ensure_packages;
pub use pc::Pc;
