//! Guest-physical memory: RAM blocks, mappings of guest pages onto them, access
//! protection, the extended page tables, and the guest's own page tables.
//!
//! [`AddressSpace`] is one VM's memory. Guest RAM stays the process's: a page
//! is looked up when the guest touches it and forgotten when the host says so
//! (`docs/memory.md` tells the whole story).
//!
//! What a vCPU does with it:
//! - around every entry: [`AddressSpace::before_entry`], INVEPT if asked,
//!   [`AddressSpace::flushed`], then [`AddressSpace::after_exit`];
//! - on an EPT violation: [`AddressSpace::fault`] with its own [`Reserve`];
//! - to read operands, strings and page tables: [`AddressSpace::read`],
//!   [`AddressSpace::write`], [`AddressSpace::compare_exchange`], and
//!   [`walk::translate`] with an [`AddressSpace::reader`].

mod access;
mod age;
mod around;
mod block;
mod change;
#[cfg(not(haxm_module))]
mod check;
mod ept;
mod fault;
mod invalidate;
mod merge;
mod pin;
pub mod presence;
mod protect;
mod slot;
mod space;
mod tree;
pub mod walk;
mod watch;

pub use access::Reader;
pub use ept::{LeafSize, Reserve};
pub use presence::Flush;
pub use space::AddressSpace;

use crate::Error;
use crate::arch::addr::Gpa;

/// What the guest did to a guest-physical address, from the exit qualification
/// of an EPT violation (SDM 28.2.1 "Basic VM-Exit Information", table 28-7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Access {
    /// Bit 0: a data read.
    pub read: bool,
    /// Bit 1: a data write. With accessed and dirty flags for EPT the processor
    /// reports its own accesses to the guest's paging structures as writes too.
    pub write: bool,
    /// Bit 2: an instruction fetch.
    pub fetch: bool,
    /// Bit 7 set and bit 8 clear: the address is that of a guest
    /// paging-structure entry, not of what a linear address translates to.
    pub walk: bool,
}

impl Access {
    /// A data read.
    pub const READ: Self = Self {
        read: true,
        write: false,
        fetch: false,
        walk: false,
    };
    /// A data write.
    pub const WRITE: Self = Self {
        read: false,
        write: true,
        fetch: false,
        walk: false,
    };
    /// An instruction fetch.
    pub const FETCH: Self = Self {
        read: false,
        write: false,
        fetch: true,
        walk: false,
    };

    /// From the exit qualification of an EPT violation.
    #[must_use]
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            read: qualification & 1 != 0,
            write: qualification & 2 != 0,
            fetch: qualification & 4 != 0,
            walk: qualification & 0x180 == 0x80,
        }
    }
}

/// What [`AddressSpace::fault`] made of an EPT violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// The EPT now allows the access: enter the guest again.
    Mapped,
    /// Nothing is mapped there: the client's device answers.
    Mmio,
    /// A write to a read-only mapping: the client's device answers. Reads of
    /// the same address come from memory.
    RomWrite,
    /// The 2 MB group of the address has a protected page: exit PAGEFAULT.
    Protected {
        /// The lowest protected page of the group.
        gpa: Gpa,
    },
    /// The map changed meanwhile: enter the guest again, it will fault again.
    Retry,
    /// A signal wants the thread: leave RUN; the guest will fault again.
    Interrupted,
}

/// Why the kernel could not read or write guest memory for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessError {
    /// Nothing is mapped at this address.
    Mmio(Gpa),
    /// A write to a read-only mapping, at this address.
    RomWrite(Gpa),
    /// The 2 MB group of the address has protected pages; this is the lowest.
    Protected(Gpa),
    /// The client's memory behind a mapping could not be used:
    /// [`Error::Fault`], [`Error::NoMemory`] or [`Error::Interrupted`]; or the
    /// arguments were wrong: [`Error::Invalid`].
    Host(Error),
}

/// Counters of a VM's memory, for logs, tests and benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Mappings (memslots).
    pub slots: usize,
    /// RAM blocks, stand-alone ones included.
    pub blocks: usize,
    /// Ranges of protected pages.
    pub protected_ranges: usize,
    /// Pages that hold EPT paging structures, the root included.
    pub tables: u64,
    /// EPT leaves of 4 KB, 2 MB and 1 GB.
    pub leaves: [u64; 3],
    /// Pages of the client's memory that are pinned.
    pub pinned: u64,
    /// Times a translation was taken away or aged (the flush generation).
    pub flushes: u64,
    /// Times that leaves were taken away because a larger one can be there.
    pub merges: u64,
}
