//! Pinned pages of the client, with a ledger.
// UNSAFETY: implements the host seam.
#![allow(unsafe_code, reason = "not every test file uses every part")]

use std::sync::atomic::Ordering;

use haxm_vmx::arch::addr::Pfn;
use haxm_vmx::host::{PinnedPages, PresentPage};

use super::{Backing, FakeHost, locked, undisturbed};

/// Pinned pages of the client.
pub(crate) struct FakePins {
    pub(super) host: FakeHost,
    pub(super) first: u64,
    pub(super) backings: Vec<Backing>,
}

// SAFETY: the ledger holds the frames; nothing else uses them.
unsafe impl PinnedPages for FakePins {
    fn page(&self, index: usize) -> PresentPage {
        let page = |backing: &Backing| PresentPage::new(Pfn(backing.frame), backing.writable);
        self.backings.get(index).map(page).unwrap_or_default()
    }
}

impl Drop for FakePins {
    fn drop(&mut self) {
        undisturbed(|| {
            for (page, backing) in (self.first..).zip(&self.backings) {
                let mut pinned = locked(&self.host.0.pinned);
                let (_, count) = pinned.get_mut(&page).expect("unpinned twice");
                *count -= 1;
                if *count == 0 {
                    pinned.remove(&page);
                    self.host.tell(backing.frame, false);
                }
            }
            // Time for a late use to be seen.
            for _ in 0..16 * self.host.0.pause.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
        });
    }
}
