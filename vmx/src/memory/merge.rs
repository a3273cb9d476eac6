//! Large leaves come back after a change of the slots.
//!
//! Small leaves beside a hole or a piece of ROM are all that can be while it is
//! there. When a change makes one slot of it all, they are cleared with the
//! change's own flush, so that the next touch finds a large leaf to be right,
//! whichever page it is of. That costs at most two large pages' leaves of each
//! size, and happens only where the host has had the memory in one piece.

use crate::host::Host;

use super::ept::{Graveyard, LeafSize};
use super::protect::Range;
use super::space::Core;

impl<H: Host> Core<H> {
    /// Clears the smaller leaves around the ends of `changed` that a larger leaf
    /// can take the place of now; returns how many larger ones.
    pub(super) fn merge(&mut self, changed: Range, grave: &mut Graveyard<H>) -> u64 {
        let mut merges = 0u64;
        for size in [LeafSize::Large, LeafSize::Huge] {
            for end in [changed.start, changed.end.wrapping_sub(1)] {
                merges = merges.wrapping_add(u64::from(self.merge_at(end, size, grave)));
            }
        }
        merges
    }

    fn merge_at(&mut self, gpa: u64, size: LeafSize, grave: &mut Graveyard<H>) -> bool {
        let start = gpa & size.bytes().wrapping_neg();
        let end = start.wrapping_add(size.bytes());
        let whole = self.ept.is_split(start, size)
            && self.slots.find(gpa).is_some_and(|slot| {
                slot.start <= start
                    && end <= slot.end
                    && slot.hva_of(start) & size.bytes().wrapping_sub(1) == 0
            })
            && self.protected.first_in(start, end).is_none();
        whole && self.ept.clear(start, end, grave)
    }
}
