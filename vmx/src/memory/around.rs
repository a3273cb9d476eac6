//! What is mapped besides the page that was touched.
//!
//! An exit and a look at the host's page tables cost far more than one more EPT
//! entry. So a fault also maps the pages around the touched one that the host
//! has already; that takes no memory, as they share the touched page's EPT
//! table. Where a guest goes through its memory page by page, a fault also asks
//! the host for pages that it does not have yet, twice as many each time. At
//! most as many pages can be brought in for nothing as the guest has touched in
//! that run before, and at most [`MOST_AHEAD`].

use crate::arch::addr::{Hva, PAGE_SHIFT, PAGE_SIZE};
use crate::host::PresentPage;

use super::slot::Slot;

/// Pages of the naturally aligned piece of guest-physical memory that one fault
/// can map: 256 KB. They are in one EPT table.
pub(super) const PAGES: usize = 64;
const BYTES: u64 = PAGES as u64 * PAGE_SIZE;

/// Pages brought in by one fault, the touched one included.
const MOST_AHEAD: u32 = 32;

/// Runs of touches that are told apart, for one vCPU.
const STREAMS: usize = 4;

/// The touched page and those around it, in the same slot.
pub(super) struct Around {
    /// Guest-physical address of the first page.
    pub(super) start: u64,
    /// The client's address of it.
    pub(super) hva: Hva,
    /// The number of the touched page.
    wanted: usize,
    count: usize,
    pages: [PresentPage; PAGES],
}

impl Around {
    /// Nothing known yet about the pages around `gpa`, which is in `slot`.
    pub(super) fn new(gpa: u64, slot: &Slot) -> Self {
        let block = gpa & BYTES.wrapping_neg();
        let start = block.max(slot.start);
        let end = block.wrapping_add(BYTES).min(slot.end);
        let pages = |bytes: u64| (bytes.wrapping_shr(PAGE_SHIFT) as usize).min(PAGES);
        Self {
            start,
            hva: Hva(slot.hva_of(start)),
            wanted: pages(gpa.wrapping_sub(start)),
            count: pages(end.wrapping_sub(start)),
            pages: [PresentPage::NONE; PAGES],
        }
    }

    /// The pages, to be filled in, and the number of the touched one.
    pub(super) fn fill_in(&mut self) -> (usize, &mut [PresentPage]) {
        let pages = self.pages.get_mut(..self.count).unwrap_or_default();
        (self.wanted, pages)
    }

    pub(super) fn pages(&self) -> &[PresentPage] {
        self.pages.get(..self.count).unwrap_or_default()
    }

    /// The guest-physical address of the touched page.
    pub(super) const fn touched_address(&self) -> u64 {
        self.start
            .wrapping_add((self.wanted as u64).wrapping_shl(PAGE_SHIFT))
    }

    /// Whether the host has said something about the pages.
    pub(super) fn is_known(&self) -> bool {
        self.touched().frame().is_some()
    }

    /// What is known of the touched page.
    pub(super) fn touched(&self) -> PresentPage {
        self.pages().get(self.wanted).copied().unwrap_or_default()
    }

    /// The client's address past the last page.
    pub(super) const fn client_end(&self) -> u64 {
        self.hva
            .0
            .wrapping_add((self.count as u64).wrapping_shl(PAGE_SHIFT))
    }

    /// The pages behind the touched one.
    pub(super) fn room(&self) -> u32 {
        let room = self.count.saturating_sub(self.wanted).saturating_sub(1);
        u32::try_from(room).unwrap_or(0)
    }

    /// The guest-physical address where the run of pages that begins with the
    /// touched one ends.
    pub(super) fn run_end(&self) -> u64 {
        let behind = self.pages().iter().skip(self.wanted).skip(1);
        let run = behind.take_while(|page| page.frame().is_some()).count();
        let pages = self.wanted.saturating_add(run).saturating_add(1) as u64;
        self.start.wrapping_add(pages.wrapping_shl(PAGE_SHIFT))
    }
}

/// A run of touches: where it would go on, and pages last brought in at once.
#[derive(Clone, Copy)]
struct Stream {
    next: u64,
    pages: u32,
}

/// The runs of touches that a vCPU makes.
pub(super) struct Streams {
    streams: [Stream; STREAMS],
    oldest: usize,
}

impl Streams {
    /// No run yet.
    pub(super) const fn new() -> Self {
        // Address 0 continues a run that nobody began: it costs one page.
        let none = Stream { next: 0, pages: 0 };
        Self {
            streams: [none; STREAMS],
            oldest: 0,
        }
    }

    /// How many pages behind the touched one at `gpa` the host should bring in
    /// with it.
    pub(super) fn ahead(&self, gpa: u64) -> u32 {
        let stream = self.streams.iter().find(|stream| stream.next == gpa);
        stream.map_or(0, |stream| grown(stream.pages).saturating_sub(1))
    }

    /// The pages from `gpa` up to `end` are mapped now, of which the host was
    /// asked to bring in `asked`.
    pub(super) fn mapped(&mut self, gpa: u64, end: u64, asked: u32) {
        let known = self.streams.iter_mut().find(|stream| stream.next == gpa);
        if let Some(stream) = known {
            stream.next = end;
            if asked != 0 {
                stream.pages = grown(stream.pages);
            }
            return;
        }
        if let Some(stream) = self.streams.get_mut(self.oldest) {
            *stream = Stream {
                next: end,
                pages: 1,
            };
        }
        self.oldest = self.oldest.wrapping_add(1) % STREAMS;
    }
}

/// The number of pages after `pages`: 1, 2, 4 ...
fn grown(pages: u32) -> u32 {
    pages.saturating_mul(2).clamp(1, MOST_AHEAD)
}
