//! Request numbers, one table per operating system, all compiled everywhere.
//!
//! Each table has the numbers as constants with HAXM's C names, built by that system's own rule from the
//! argument's type, and asserted equal to the number written beside it.

pub mod darwin;
pub mod linux;
pub mod netbsd;
pub mod windows;

mod bsd;

use crate::module::{MAX_VMS, MAX_VMS_NETBSD};
use crate::request::{Device, Request};

/// An operating system HAXM ran on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Os {
    /// Linux.
    Linux,
    /// macOS.
    Darwin,
    /// NetBSD.
    NetBsd,
    /// Windows.
    Windows,
}

impl Os {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Linux, Self::Darwin, Self::NetBsd, Self::Windows];

    /// VMs that can exist at once.
    #[must_use]
    pub const fn max_vms(self) -> u32 {
        match self {
            Self::NetBsd => MAX_VMS_NETBSD,
            Self::Linux | Self::Darwin | Self::Windows => MAX_VMS,
        }
    }

    /// The number of a request, or `None` where this system has none.
    #[must_use]
    pub const fn number(self, request: Request) -> Option<u32> {
        match self {
            Self::Linux => linux::number(request),
            Self::Darwin => darwin::number(request),
            Self::NetBsd => netbsd::number(request),
            Self::Windows => windows::number(request),
        }
    }

    /// The request a number means on a device, or `None` if the device does not know it.
    #[must_use]
    pub const fn decode(self, device: Device, number: u32) -> Option<Request> {
        match self {
            Self::Linux => linux::decode(device, number),
            Self::Darwin => darwin::decode(device, number),
            Self::NetBsd => netbsd::decode(device, number),
            Self::Windows => windows::decode(device, number),
        }
    }
}

/// Constants, `number` and `decode` of one system. Rows: request, device, C name, number by rule, number as
/// the ABI lists it. `absent`: requests the system lacks. `also`: further numbers a request is known by.
macro_rules! numbers {
    (
        numbers { $($request:ident, $device:ident, $name:ident = $rule:expr, $literal:literal;)+ }
        absent { $($absent:ident),* }
        also {
            $($also_name:ident, $also_request:ident, $also_device:ident = $also_rule:expr, $also_literal:literal;)*
        }
    ) => {
        $(
            #[doc = concat!("Number of [`Request::", stringify!($request), "`](crate::Request::", stringify!($request), ").")]
            pub const $name: u32 = $rule;
            static_assertions::const_assert_eq!($name, $literal);
        )+
        $(
            #[doc = concat!("Another number of [`Request::", stringify!($also_request), "`](crate::Request::", stringify!($also_request), ").")]
            pub const $also_name: u32 = $also_rule;
            static_assertions::const_assert_eq!($also_name, $also_literal);
        )*

        /// The number of a request, or `None` where this system has none.
        #[must_use]
        pub const fn number(request: $crate::request::Request) -> Option<u32> {
            use $crate::request::Request;
            match request {
                $(Request::$request => Some($name),)+
                $(Request::$absent => None,)*
            }
        }

        /// The request a number means on a device, or `None` if the device does not know it.
        #[must_use]
        pub const fn decode(
            device: $crate::request::Device,
            number: u32,
        ) -> Option<$crate::request::Request> {
            use $crate::request::{Device, Request};
            match (device, number) {
                $((Device::$device, $name) => Some(Request::$request),)+
                $((Device::$also_device, $also_name) => Some(Request::$also_request),)*
                _ => None,
            }
        }
    };
}
pub(crate) use numbers;
