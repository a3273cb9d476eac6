//! Protected pages: guest accesses to them leave the guest with PAGEFAULT.
//!
//! Kept as ranges, so that nothing protected costs nothing and all of memory
//! protected costs one entry. Independent of the slots, as in HAXM: protection
//! stays when a range is mapped anew.

use alloc::boxed::Box;

use abi::ram::PROTECTION_GROUP_SIZE;

use super::tree::{Key, Node, Span, Tree};

/// A range of protected guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Span for Range {
    fn key(&self) -> Key {
        (self.start, 0)
    }
    fn end(&self) -> u64 {
        self.end
    }
}

/// The 2 MB group that an address is in.
pub(super) const fn group(gpa: u64) -> Range {
    let start = gpa & PROTECTION_GROUP_SIZE.wrapping_neg();
    Range {
        start,
        end: start.wrapping_add(PROTECTION_GROUP_SIZE),
    }
}

/// The protected ranges of a VM: apart from each other, none touching another.
pub(super) struct Protected {
    pub(super) tree: Tree<Range>,
}

/// What a change left over, to be freed without the spin lock.
pub(super) struct Leftover {
    /// Ranges that are gone, by how many there are more or fewer now.
    removed: Tree<Range>,
    node: Option<Box<Node<Range>>>,
}

impl Leftover {
    /// How many ranges are gone, and how many new ones there are (0 or 1,
    /// out of `spare`).
    pub(super) fn settle(mut self) -> (usize, bool) {
        let mut gone = 0usize;
        while self.removed.pop_first().is_some() {
            gone = gone.saturating_add(1);
        }
        (gone, self.node.is_none())
    }
}

impl Protected {
    pub(super) const fn new() -> Self {
        Self { tree: Tree::new() }
    }

    /// The lowest protected address in `start..end`.
    pub(super) fn first_in(&self, start: u64, end: u64) -> Option<u64> {
        let found = self.tree.overlap(None, start, end)?;
        Some(found.start.max(start))
    }

    /// Protects `range`. Does not fail, allocate or free.
    pub(super) fn add(&mut self, range: Range, mut spare: Box<Node<Range>>) -> Leftover {
        let mut whole = range;
        let mut removed = self.tree.split_off((range.start, 0));
        let mut above = removed.split_off((range.end, 0));
        if let Some(below) = self.tree.pop_last() {
            if below.item.end >= range.start {
                whole.start = below.item.start;
                whole.end = whole.end.max(below.item.end);
                removed.insert(below);
            } else {
                self.tree.insert(below);
            }
        }
        if let Some(last) = removed.pop_last() {
            whole.end = whole.end.max(last.item.end);
            removed.insert(last);
        }
        if let Some(next) = above.pop_first() {
            if next.item.start <= whole.end {
                whole.end = whole.end.max(next.item.end);
                removed.insert(next);
            } else {
                above.insert(next);
            }
        }
        spare.item = whole;
        self.tree.insert(spare);
        self.tree.append(above);
        Leftover {
            removed,
            node: None,
        }
    }

    /// Ends the protection of `range`. Does not fail, allocate or free.
    pub(super) fn remove(&mut self, range: Range, spare: Box<Node<Range>>) -> Leftover {
        let mut spare = Some(spare);
        let mut removed = self.tree.split_off((range.start, 0));
        let mut above = removed.split_off((range.end, 0));
        if let Some(mut below) = self.tree.pop_last() {
            let end = below.item.end;
            if end > range.start {
                below.item.end = range.start;
                if end > range.end {
                    if let Some(mut rest) = spare.take() {
                        rest.item = Range {
                            start: range.end,
                            end,
                        };
                        above.insert(rest);
                    }
                }
            }
            self.tree.insert(below);
        }
        if let Some(mut last) = removed.pop_last() {
            if last.item.end > range.end {
                last.item.start = range.end;
                above.insert(last);
            } else {
                removed.insert(last);
            }
        }
        self.tree.append(above);
        Leftover {
            removed,
            node: spare,
        }
    }
}
