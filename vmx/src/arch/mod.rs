//! Definitions only: what the processor's manuals define, with no behaviour.
//!
//! Numbers come from the `x86` crate where it has them; what it lacks is
//! declared here with its section of the SDM.
#![forbid(unsafe_code)]

pub mod addr;
pub mod control;
pub mod ept;
pub mod event;
pub mod exit;
pub mod field;
pub mod msr;
pub mod pmu;
pub mod reg;
pub mod segment;
pub mod vmx_caps;
