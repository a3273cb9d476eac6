//! One page of EPT entries, and the tables that hang below it.
// UNSAFETY: the entries live in a raw page that the processor reads and writes.
#![expect(unsafe_code)]

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::arch::addr::Hpa;
use crate::fallible::{NoMemory, TryPush, try_box};
use crate::host::{Host, OwnedPage};

/// Entries in a table, SDM 29.3.2 "EPT Translation Mechanism".
pub(super) const ENTRIES: usize = 512;

/// A page of entries. The kernel cannot follow a physical address, so a table
/// that can have tables below it keeps them in `children`, by index.
pub(super) struct Table<H: Host> {
    page: OwnedPage<H>,
    /// [`ENTRIES`] long, or empty for a table of 4 KB leaves.
    pub(super) children: Vec<Option<Box<Self>>>,
    /// Entries that are not zero.
    pub(super) live: u16,
    /// The host had all that the table covers in one piece, good for one leaf,
    /// when something was mapped here last.
    pub(super) in_one_piece: bool,
    /// Chains tables that are out of use and wait to be freed.
    pub(super) next: Option<Box<Self>>,
}

impl<H: Host> Table<H> {
    /// A table of zero entries; `interior` if it can have tables below it.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub(super) fn new(host: &H, interior: bool) -> Result<Self, NoMemory> {
        let mut children = Vec::new();
        if interior {
            children.try_reserve_exact(ENTRIES).map_err(|_| NoMemory)?;
            for _ in 0..ENTRIES {
                children.try_push(None)?;
            }
        }
        Ok(Self {
            page: OwnedPage::new(host)?,
            children,
            live: 0,
            in_one_piece: false,
            next: None,
        })
    }

    /// As `new`, on the heap.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub(super) fn boxed(host: &H, interior: bool) -> Result<Box<Self>, NoMemory> {
        try_box(Self::new(host, interior)?)
    }

    /// Where the processor finds it.
    pub(super) fn physical(&self) -> Hpa {
        self.page.physical()
    }

    fn entry(&self, index: usize) -> &AtomicU64 {
        let first = self.page.pointer().cast::<u64>();
        // SAFETY: the page holds 512 entries, and the index is cut to that.
        let entry = unsafe { first.add(index % ENTRIES) };
        // SAFETY: aligned, part of a page that lives as long as `self`, and
        // only ever accessed atomically, by us and by the processor.
        unsafe { AtomicU64::from_ptr(entry) }
    }

    /// Entry `index`, modulo 512.
    pub(super) fn get(&self, index: usize) -> u64 {
        self.entry(index).load(Ordering::Acquire)
    }

    /// Writes entry `index`. What it points to is visible before it is.
    pub(super) fn set(&self, index: usize, value: u64) {
        self.entry(index).store(value, Ordering::Release);
    }

    /// Sets bits of entry `index`.
    pub(super) fn add_flags(&self, index: usize, flags: u64) {
        self.entry(index).fetch_or(flags, Ordering::AcqRel);
    }

    /// Clears bits of entry `index`.
    pub(super) fn remove_flag(&self, index: usize, flag: u64) {
        self.entry(index).fetch_and(!flag, Ordering::AcqRel);
    }

    /// Zeroes entry `index` and returns what it was, with the flags that the
    /// processor set until then.
    pub(super) fn clear(&self, index: usize) -> u64 {
        self.entry(index).swap(0, Ordering::AcqRel)
    }
}
