//! Why a request fails, and the number each operating system's programs get for it.

use abi::{Device, Os, Request};
use vmx::Error;
use vmx::fallible::NoMemory;
use vmx::host::UserFault;

/// What a system's entry point returns: 0 for done; else a negative errno
/// (POSIX) or an NTSTATUS (Windows).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(i32);

impl Status {
    /// Done.
    pub const DONE: Self = Self(0);

    /// The number.
    #[must_use]
    pub const fn code(self) -> i32 {
        self.0
    }

    /// Whether it means done.
    #[must_use]
    pub const fn is_done(self) -> bool {
        self.0 == 0
    }

    const fn errno(number: i32) -> Self {
        Self(number.wrapping_neg())
    }

    const fn nt(number: u32) -> Self {
        Self(number as i32)
    }
}

/// Why a request fails. What was found where decides the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The core refused.
    Core(Error),
    /// The caller's memory could not be read or written.
    User(UserFault),
    /// A buffer is shorter than the argument.
    Short,
    /// A field has a value the layer itself refuses.
    Field,
    /// `nr_msr` is over the limit.
    MsrCount,
    /// `total` of a CPUID table is over the limit.
    CpuidTotal,
    /// GET_CPUID: the table has more entries than the caller has room for.
    CpuidRoom,
    /// No memory.
    NoMemory,
    /// A VM or vCPU that is not there.
    Gone,
    /// A VM or vCPU that has been opened before.
    OpenedBefore,
    /// Another process's.
    Denied,
    /// The device does not know the request.
    Unknown,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Denied => Self::Denied,
            other => Self::Core(other),
        }
    }
}

impl From<UserFault> for Failure {
    fn from(fault: UserFault) -> Self {
        Self::User(fault)
    }
}

impl From<NoMemory> for Failure {
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

/// The errno numbers used here. Those below 35 are the same on all systems.
mod errno {
    pub(super) const EINTR: i32 = 4;
    pub(super) const E2BIG: i32 = 7;
    pub(super) const ENOMEM: i32 = 12;
    pub(super) const EACCES: i32 = 13;
    pub(super) const EFAULT: i32 = 14;
    pub(super) const EBUSY: i32 = 16;
    pub(super) const ENODEV: i32 = 19;
    pub(super) const EINVAL: i32 = 22;
    pub(super) const ENOSYS: i32 = 38;
    pub(super) const ENOSYS_BSD: i32 = 78;
}

/// The NTSTATUS numbers used here.
mod nt {
    pub(super) const SUCCESS: u32 = 0;
    pub(super) const UNSUCCESSFUL: u32 = 0xc000_0001;
    pub(super) const INVALID_HANDLE: u32 = 0xc000_0008;
    pub(super) const INVALID_PARAMETER: u32 = 0xc000_000d;
    pub(super) const INVALID_DEVICE_REQUEST: u32 = 0xc000_0010;
    pub(super) const ACCESS_DENIED: u32 = 0xc000_0022;
    pub(super) const BUFFER_TOO_SMALL: u32 = 0xc000_0023;
    pub(super) const SHARING_VIOLATION: u32 = 0xc000_0043;
    pub(super) const INSUFFICIENT_RESOURCES: u32 = 0xc000_009a;
}

/// What is being done when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    /// Loading, opening.
    Open,
    /// A request on a device; `None` if the device does not know it.
    Request(Device, Option<Request>),
}

/// The number a program gets.
pub(crate) fn status(os: Os, doing: Doing, failure: Failure) -> Status {
    match os {
        Os::Windows => Status::nt(ntstatus(doing, failure)),
        Os::Linux => Status::errno(posix(doing, failure, errno::ENOSYS)),
        Os::Darwin | Os::NetBsd => Status::errno(posix(doing, failure, errno::ENOSYS_BSD)),
    }
}

#[allow(clippy::match_same_arms, reason = "one row of a table each")]
fn posix(doing: Doing, failure: Failure, unknown: i32) -> i32 {
    let request = match doing {
        Doing::Open => None,
        Doing::Request(_, request) => request.map(Request::canonical),
    };
    match (request, failure) {
        // HAXM gives one number for whatever the core says here.
        (Some(Request::CreateVm), Failure::Core(_) | Failure::NoMemory) => errno::ENOMEM,
        (Some(Request::VcpuCreate), Failure::Core(_) | Failure::NoMemory) => errno::EINVAL,
        (_, Failure::Core(error)) => match error {
            Error::Invalid | Error::NotWorking => errno::EINVAL,
            Error::NoMemory | Error::Limit => errno::ENOMEM,
            Error::Busy => errno::EBUSY,
            Error::Denied => errno::EACCES,
            Error::Fault => errno::EFAULT,
            Error::Interrupted => errno::EINTR,
            Error::TooBig => errno::E2BIG,
        },
        (_, Failure::User(UserFault::BadAddress) | Failure::Short | Failure::MsrCount) => {
            errno::EFAULT
        }
        (_, Failure::User(UserFault::Interrupted)) => errno::EINTR,
        (_, Failure::User(UserFault::NoMemory) | Failure::NoMemory | Failure::CpuidRoom) => {
            errno::ENOMEM
        }
        (_, Failure::Field) => errno::EINVAL,
        (_, Failure::CpuidTotal) => errno::E2BIG,
        (_, Failure::Gone) => errno::ENODEV,
        (_, Failure::OpenedBefore) => errno::EBUSY,
        (_, Failure::Denied) => errno::EACCES,
        (_, Failure::Unknown) => unknown,
    }
}

#[allow(clippy::match_same_arms, reason = "one row of a table each")]
fn ntstatus(doing: Doing, failure: Failure) -> u32 {
    match (doing, failure) {
        (_, Failure::Denied | Failure::Core(Error::Denied)) => nt::ACCESS_DENIED,
        (_, Failure::Gone) => nt::INVALID_HANDLE,
        (_, Failure::OpenedBefore) => nt::SHARING_VIOLATION,
        (Doing::Request(Device::System, _), Failure::Unknown) => nt::INVALID_DEVICE_REQUEST,
        (Doing::Request(_, Some(Request::CreateVm)), Failure::Short) => nt::BUFFER_TOO_SMALL,
        (_, Failure::Unknown | Failure::Short | Failure::Field | Failure::MsrCount) => {
            nt::INVALID_PARAMETER
        }
        (
            Doing::Request(_, Some(Request::SetRam | Request::SetRam2 | Request::ProtectRam)),
            Failure::Core(Error::Invalid),
        ) => nt::INVALID_PARAMETER,
        (Doing::Open, Failure::NoMemory) => nt::INSUFFICIENT_RESOURCES,
        // The header with the number needed goes back, so the request is done.
        (_, Failure::CpuidRoom) => nt::SUCCESS,
        (_, Failure::Core(_) | Failure::User(_) | Failure::CpuidTotal | Failure::NoMemory) => {
            nt::UNSUCCESSFUL
        }
    }
}
