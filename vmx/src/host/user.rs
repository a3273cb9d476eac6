//! A process's memory, where guest RAM lives: found, copied, held in place, and
//! watched for changes.
// UNSAFETY: declares what the host promises about memory that is not ours.
#![expect(unsafe_code)]

use core::ptr::NonNull;

use crate::arch::addr::{Hva, Pfn};
use crate::fallible::NoMemory;

/// Why an access to a process's memory failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserFault {
    /// Nothing is mapped there, or not for this kind of access.
    BadAddress,
    /// The host has no memory to bring it in.
    NoMemory,
    /// A signal wants this thread; try again later.
    Interrupted,
}

/// The host memory behind an address of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFrame {
    /// The 4 KB page behind the address.
    pub frame: Pfn,
    /// Whether the process may write it.
    pub writable: bool,
    /// log2 of the bytes of the largest naturally aligned piece around the
    /// address, in the process's addresses and in host-physical ones alike,
    /// that the host maps as one: 12, 21 or 30.
    pub shift: u32,
}

/// Bytes of a cache line. A locked access that stays inside one is atomic
/// whatever its alignment; one that crosses into the next is a split lock, which
/// processors may refuse (SDM 9.1.2.3 "Features to Disable Bus Locks").
pub const ATOMIC_LINE: u64 = 64;

/// A 4 KB page of a process as the host's page tables have it now, or none.
///
/// Bit 0: there is one; bit 1: it may be written; bits 51:12: its address. The
/// value 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct PresentPage(u64);

impl PresentPage {
    /// No page.
    pub const NONE: Self = Self(0);

    /// The page in this frame.
    #[must_use]
    pub const fn new(frame: Pfn, writable: bool) -> Self {
        Self(frame.address().0 | (writable as u64) << 1 | 1)
    }

    /// From the bits above.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The frame, if there is one.
    #[must_use]
    pub const fn frame(self) -> Option<Pfn> {
        if self.0 & 1 == 0 {
            return None;
        }
        Some(Pfn((self.0 & 0x000f_ffff_ffff_f000) >> 12))
    }

    /// Whether it may be written.
    #[must_use]
    pub const fn is_writable(self) -> bool {
        self.0 & 2 != 0
    }
}

/// How a process's memory becomes guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lending {
    /// Borrowed: [`UserSpace::fault_in`] tells where a page is *now*, and the
    /// host says through [`Invalidate`] when that ends. Whoever uses the answer
    /// holds the lock under which the invalidations are counted, and compares
    /// the count from before the call (see `memory`).
    Borrowed,
    /// Held in place by [`UserSpace::pin`], for hosts that cannot report
    /// changes. The guest keeps what was there when a piece was pinned.
    Pinned,
}

/// Pages of a process held in place until dropped.
///
/// # Safety
/// The frames stay the process's, for all uses of the processor, until then.
pub unsafe trait PinnedPages: Send + Sync {
    /// The page of this number in what was pinned; none beyond the end.
    fn page(&self, index: usize) -> PresentPage;
}

/// For hosts that never pin.
#[derive(Debug)]
pub enum NeverPinned {}

// SAFETY: there is no such value.
unsafe impl PinnedPages for NeverPinned {
    fn page(&self, _index: usize) -> PresentPage {
        match *self {}
    }
}

/// A process's address space: where guest RAM lives.
///
/// # Safety
/// Between `watch` and `unwatch` every change of what `fault_in` and `present`
/// reported is preceded by `Invalidate::begin` and followed by `Invalidate::end`.
/// What `lending` says stays the same.
pub unsafe trait UserSpace: Send + Sync {
    /// Pages held in place.
    type Pins: PinnedPages;

    /// Whether the memory is borrowed, or has to be pinned. If pinned,
    /// `fault_in`, `present` and `watch` are not used; if borrowed, `pin` is not.
    fn lending(&self) -> Lending;

    /// Brings in and holds `pages` pages (at most 512) from `start` on, for
    /// writing where the process may write. May sleep. On a thread of the
    /// process.
    ///
    /// # Errors
    /// See [`UserFault`]; nothing is held then.
    fn pin(&self, start: Hva, pages: usize) -> Result<Self::Pins, UserFault>;

    /// Whether the calling thread belongs to this process.
    fn is_current(&self) -> bool;

    /// Whether the process has ended: no thread of it will ever run again.
    fn has_ended(&self) -> bool;

    /// Where the page behind `address` is, brought in if need be. May sleep.
    /// If it had to be brought in, up to `ahead` pages that follow it may be
    /// brought in too, where they are of the same kind, private, and cost no
    /// wait; nothing is said of them.
    ///
    /// # Errors
    /// See [`UserFault`], of the page itself.
    fn fault_in(&self, address: Hva, write: bool, ahead: u32) -> Result<HostFrame, UserFault>;

    /// Which of the pages from `first` on are there as pages of 4 KB: fills in
    /// those of `pages`, and leaves the others as they are. Brings nothing in.
    /// Looks at no other page if number `wanted` is not there, and need not
    /// look beyond the 2 MB that are around it. On a thread of the process.
    ///
    /// A page is reported writable only if the host counts it as written
    /// already: it is not told when the guest writes.
    fn present(&self, first: Hva, wanted: usize, pages: &mut [PresentPage]);

    /// Copies out of the process. May sleep. The calling thread belongs to it.
    ///
    /// # Errors
    /// [`UserFault::BadAddress`]; `bytes` may be partly filled.
    fn read(&self, address: Hva, bytes: &mut [u8]) -> Result<(), UserFault>;

    /// Copies into the process. May sleep. The calling thread belongs to it.
    ///
    /// # Errors
    /// [`UserFault::BadAddress`]; part of it may have been written.
    fn write(&self, address: Hva, bytes: &[u8]) -> Result<(), UserFault>;

    /// Atomically replaces `old` by `new` in `size` (1, 2, 4 or 8) bytes of one
    /// [`ATOMIC_LINE`], or in 16 naturally aligned bytes; returns what was
    /// there. Bytes of `new` above `size` are zero. May sleep.
    ///
    /// # Errors
    /// [`UserFault::BadAddress`].
    fn compare_exchange(
        &self,
        address: Hva,
        size: u8,
        old: u128,
        new: u128,
    ) -> Result<u128, UserFault>;

    /// Starts reports to `listener`.
    ///
    /// # Errors
    /// [`NoMemory`]: there will be no reports.
    ///
    /// # Safety
    /// `listener` stays valid and in place until `unwatch` returns. At most
    /// one listener at a time.
    unsafe fn watch(&self, listener: NonNull<dyn Invalidate>) -> Result<(), NoMemory>;

    /// Ends the reports; when it returns none is running or will come. May
    /// sleep; not called from a report.
    fn unwatch(&self);
}

/// What [`Invalidate::young`] does besides looking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aging {
    /// Nothing.
    Look,
    /// Counts the pages as unused from now on. A processor that still caches a
    /// translation may use it unnoticed until it drops that for another reason.
    Clear,
    /// As `Clear`, and each processor's uses are noticed from its next entry on.
    ClearAndFlush,
}

/// Hears that host memory is about to change under a process's addresses, and
/// is asked which of it is in use. Called by any thread, not from interrupts;
/// must not sleep, and may be called with spin locks of the host's held.
pub trait Invalidate: Sync {
    /// Translations of `start..end` are no longer good: when this returns no
    /// processor uses one. New ones are not made until the matching `end`.
    fn begin(&self, start: Hva, end: Hva);
    /// The change is done.
    fn end(&self, start: Hva, end: Hva);
    /// Whether a guest has used a page of `start..end` since it was last counted
    /// as unused. `true` where that is not known.
    fn young(&self, start: Hva, end: Hva, aging: Aging) -> bool;
}
