//! Pinned pieces of the client's memory, where the host cannot say when a page
//! changes.
//!
//! The first touch of a page pins what is around it: the 2 MB, as far as the
//! slot reaches and nothing is pinned yet. A piece belongs to the RAM block
//! that the slot is in and goes with it: the caller lets it go when no
//! processor can use it any more.

use alloc::boxed::Box;

use crate::arch::addr::{Hva, PAGE_SHIFT, PAGE_SIZE};
use crate::fallible::NoMemory;
use crate::host::{Host, HostFrame, PinnedPages, PresentPage, UserFault, UserSpace};

use super::around::Around;
use super::ept::LeafSize;
use super::slot::Slot;
use super::tree::{Key, Node, Span, Tree};

/// The most that is pinned at once.
const PIECE: u64 = LeafSize::Large.bytes();

type PinsOf<H> = <<H as Host>::UserSpace as UserSpace>::Pins;

/// Client addresses that are pinned together.
pub(super) struct Piece<P> {
    start: u64,
    end: u64,
    /// In one piece and writable or not as a whole, so good for a leaf of 2 MB.
    whole: bool,
    pins: P,
}

impl<P> Span for Piece<P> {
    fn key(&self) -> Key {
        (self.start, 0)
    }
    fn end(&self) -> u64 {
        self.end
    }
}

/// A piece, outside the tree or in it.
pub(super) type PinnedPiece<H> = Box<Node<Piece<PinsOf<H>>>>;

/// A range of client addresses, whole pages.
#[derive(Clone, Copy)]
pub(super) struct Gap {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// Pins what is in `gap`, or if not all of it can be had, the page `hva` alone.
///
/// # Errors
/// [`UserFault`]: not even that.
pub(super) fn pin<H: Host>(
    user: &H::UserSpace,
    gap: Gap,
    hva: Hva,
) -> Result<PinnedPiece<H>, UserFault> {
    let alone = Gap {
        start: hva.0,
        end: hva.0.wrapping_add(PAGE_SIZE),
    };
    let hold = |gap: Gap| {
        let pages = gap.end.wrapping_sub(gap.start).wrapping_shr(PAGE_SHIFT) as usize;
        Ok((user.pin(Hva(gap.start), pages)?, gap))
    };
    let (pins, gap) = match hold(gap) {
        Err(UserFault::BadAddress) => hold(alone)?,
        other => other?,
    };
    let piece = Piece {
        whole: is_whole(gap, &pins),
        start: gap.start,
        end: gap.end,
        pins,
    };
    Node::new(piece).map_err(|NoMemory| UserFault::NoMemory)
}

/// Whether 2 MB of pins are one piece of host memory, aligned like it.
fn is_whole(gap: Gap, pins: &impl PinnedPages) -> bool {
    let first = pins.page(0);
    let Some(frame) = first.frame() else {
        return false;
    };
    let size = gap.end.wrapping_sub(gap.start);
    size == PIECE
        && gap.start & PIECE.wrapping_sub(1) == 0
        && frame.address().is_aligned(PIECE)
        && (0..PIECE.wrapping_shr(PAGE_SHIFT)).all(|index| {
            let page = pins.page(index as usize);
            page.is_writable() == first.is_writable()
                && page.frame().map(|found| found.0) == frame.0.checked_add(index)
        })
}

/// What is pinned for one VM.
pub(super) struct Pins<H: Host> {
    pieces: Tree<Piece<PinsOf<H>>>,
    pages: u64,
}

impl<H: Host> Pins<H> {
    pub(super) const fn new() -> Self {
        Self {
            pieces: Tree::new(),
            pages: 0,
        }
    }

    /// Pages that are pinned.
    pub(super) const fn pages(&self) -> u64 {
        self.pages
    }

    /// Where the page of the client's at `hva` is, if it is pinned; and those of
    /// `around` in the same piece.
    pub(super) fn find(&self, hva: u64, around: &mut Around) -> Option<HostFrame> {
        let piece = self.pieces.containing(hva)?;
        let at = |hva: u64| {
            let offset = hva.checked_sub(piece.start)?;
            let page = piece.pins.page(offset.wrapping_shr(PAGE_SHIFT) as usize);
            page.frame().map(|_| page)
        };
        let touched = at(hva)?;
        let first = around.hva.0;
        let (_, pages) = around.fill_in();
        for (index, page) in (0u64..).zip(pages) {
            let hva = first.wrapping_add(index.wrapping_shl(PAGE_SHIFT));
            *page = at(hva).unwrap_or(PresentPage::NONE);
        }
        Some(HostFrame {
            frame: touched.frame()?,
            writable: touched.is_writable(),
            shift: if piece.whole {
                LeafSize::Large.shift()
            } else {
                PAGE_SHIFT
            },
        })
    }

    /// What may be pinned around the page at `hva`, which is not: the 2 MB, as
    /// far as the slot reaches and nothing is pinned.
    pub(super) fn gap(&self, hva: u64, slot: &Slot) -> Gap {
        let group = hva & PIECE.wrapping_neg();
        let mut gap = Gap {
            start: group.max(slot.hva),
            end: group.wrapping_add(PIECE).min(slot.hva_of(slot.end)),
        };
        if let Some(below) = self.pieces.floor((hva, 0)) {
            gap.start = gap.start.max(below.end);
        }
        if let Some(above) = self.pieces.overlap(Some((hva, 0)), hva, gap.end) {
            gap.end = gap.end.min(above.start);
        }
        gap
    }

    /// Adds a piece, unless a page of it has been pinned meanwhile: then it comes
    /// back, to be dropped without the lock.
    pub(super) fn add(&mut self, piece: PinnedPiece<H>) -> Option<PinnedPiece<H>> {
        let (start, end) = (piece.item.start, piece.item.end);
        if self.pieces.overlap(None, start, end).is_some() {
            return Some(piece);
        }
        self.pages = self.pages.wrapping_add(pages(start, end));
        self.pieces.insert(piece);
        None
    }

    /// Takes one piece of `start..end` out, to be dropped without the lock.
    pub(super) fn take(&mut self, start: u64, end: u64) -> Option<PinnedPiece<H>> {
        let key = self.pieces.overlap(None, start, end)?.key();
        let piece = self.pieces.remove(key)?;
        let gone = pages(piece.item.start, piece.item.end);
        self.pages = self.pages.wrapping_sub(gone);
        Some(piece)
    }
}

const fn pages(start: u64, end: u64) -> u64 {
    end.wrapping_sub(start).wrapping_shr(PAGE_SHIFT)
}
