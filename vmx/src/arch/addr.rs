//! Addresses as types, so that bytes and pages, guest and host never mix.

use core::fmt;

/// log2 of the smallest page.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// The offset-in-page bits of an address.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// Bytes above the start of the 4 KB page.
            #[must_use]
            pub const fn page_offset(self) -> u64 {
                self.0 & PAGE_MASK
            }

            /// The start of the 4 KB page that holds this address.
            #[must_use]
            pub const fn page_start(self) -> Self {
                Self(self.0 & !PAGE_MASK)
            }

            /// Whether the address is a multiple of `align`, a power of two.
            #[must_use]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & align.wrapping_sub(1) == 0
            }

            /// `self + bytes`, or `None` past the end of the address space.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// `self + bytes` modulo 2^64.
            #[must_use]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:#x})", stringify!($name), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

macro_rules! frame {
    ($(#[$doc:meta])* $name:ident, $address:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The first byte of the page.
            #[must_use]
            pub const fn address(self) -> $address {
                $address(self.0 << PAGE_SHIFT)
            }
        }

        impl $address {
            /// The 4 KB page that holds this address.
            #[must_use]
            pub const fn frame(self) -> $name {
                $name(self.0 >> PAGE_SHIFT)
            }
        }
    };
}

address! {
    /// Guest-physical address, bytes.
    Gpa
}
address! {
    /// Guest-linear ("virtual") address, bytes.
    Gva
}
address! {
    /// Address in the process that owns the VM, bytes.
    Hva
}
address! {
    /// Host-physical address, bytes.
    Hpa
}
frame! {
    /// Guest page number: guest-physical address / 4096.
    Gfn, Gpa
}
frame! {
    /// Host page number: host-physical address / 4096.
    Pfn, Hpa
}
