//! Why the core refused.

use crate::fallible::NoMemory;
use crate::host::UserFault;

/// Why a call into the core failed. A call that fails has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// An argument is not allowed.
    Invalid,
    /// The host has no memory for it.
    NoMemory,
    /// The object is in use.
    Busy,
    /// The caller is not the owner.
    Denied,
    /// All identifiers are taken.
    Limit,
    /// The processor cannot virtualize, or may not.
    NotWorking,
    /// User memory could not be accessed, or a VMCS not be loaded.
    Fault,
    /// A signal wants the thread first.
    Interrupted,
    /// More entries than the interface allows.
    TooBig,
}

impl From<NoMemory> for Error {
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

impl From<UserFault> for Error {
    fn from(fault: UserFault) -> Self {
        match fault {
            UserFault::BadAddress => Self::Fault,
            UserFault::NoMemory => Self::NoMemory,
            UserFault::Interrupted => Self::Interrupted,
        }
    }
}
