//! The processor's walk of the EPT pages that the host handed out.
// UNSAFETY: reads pages that it knows by number.
#![allow(unsafe_code, reason = "not every test file uses every part")]

use std::sync::atomic::{AtomicU64, Ordering};

use super::{FakeHost, PAGE, locked};

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// EPTP: accessed and dirty flags are on.
const FLAGGING: u64 = 1 << 6;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;

impl FakeHost {
    fn word(&self, table: u64, index: u64) -> &AtomicU64 {
        assert!(
            locked(&self.0.pages).contains(&(table as usize)),
            "the processor walks into a page that is not an EPT page"
        );
        let first = table as usize as *mut u64;
        // SAFETY: the page is handed out, so 512 entries are there.
        let entry = unsafe { first.add(index as usize) };
        // SAFETY: aligned, and accessed atomically by everyone.
        unsafe { AtomicU64::from_ptr(entry) }
    }

    /// The entry at `index` of the EPT page at a physical address.
    pub(crate) fn entry(&self, table: u64, index: u64) -> u64 {
        self.word(table, index).load(Ordering::Acquire)
    }

    /// Whether a page is an EPT page now.
    pub(crate) fn is_table(&self, page: u64) -> bool {
        locked(&self.0.pages).contains(&(page as usize))
    }

    /// The lowest table on the way to a guest-physical address, which the
    /// processor may cache.
    pub(crate) fn lowest_table(&self, eptp: u64, gpa: u64) -> u64 {
        let mut table = eptp & ADDRESS;
        for level in (2..=4u32).rev() {
            let entry = self.entry(table, (gpa >> (12 + 9 * (level - 1))) & 511);
            if entry & 7 == 0 || entry & 0x80 != 0 {
                break;
            }
            table = entry & ADDRESS;
        }
        table
    }

    /// What the processor finds for a guest-physical address: the frame of its
    /// 4 KB page, and the entry.
    pub(crate) fn translate(&self, eptp: u64, gpa: u64) -> Option<(u64, u64)> {
        let mut table = eptp & ADDRESS;
        for level in (1..=4u32).rev() {
            let shift = 12 + 9 * (level - 1);
            let entry = self.entry(table, (gpa >> shift) & 511);
            if entry & 7 == 0 {
                assert_eq!(entry, 0);
                return None;
            }
            if level == 1 || entry & 0x80 != 0 {
                assert_eq!(entry & 0x38, 6 << 3, "not write-back");
                assert_eq!(entry & 0x80 != 0, level > 1);
                let base = entry & ADDRESS;
                assert_eq!(base & ((1 << shift) - 1), 0, "a leaf is not aligned");
                return Some(((base + (gpa & ((1 << shift) - 1))) / PAGE, entry));
            }
            assert_eq!(
                entry & !(ADDRESS | ACCESSED),
                7,
                "reserved bits in a table entry"
            );
            table = entry & ADDRESS;
        }
        unreachable!()
    }

    /// As `translate`, for an access that the rights may forbid: sets the flags
    /// that the processor sets, SDM 29.3.5 "Accessed and Dirty Flags for EPT".
    pub(crate) fn walk(&self, eptp: u64, gpa: u64, write: bool) -> Option<(u64, u64)> {
        let found = self.translate(eptp, gpa)?;
        if eptp & FLAGGING == 0 || (write && found.1 & 2 == 0) {
            return Some(found);
        }
        let mut table = eptp & ADDRESS;
        for level in (1..=4u32).rev() {
            let word = self.word(table, (gpa >> (12 + 9 * (level - 1))) & 511);
            let entry = word.fetch_or(ACCESSED, Ordering::AcqRel);
            if level == 1 || entry & 0x80 != 0 {
                word.fetch_or(if write { DIRTY } else { 0 }, Ordering::AcqRel);
                break;
            }
            table = entry & ADDRESS;
        }
        Some(found)
    }
}
