//! What is true of a VM's map between two changes. For tests: not in the module.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::host::Host;

use super::AddressSpace;
use super::block::Blocks;
use super::protect::Protected;
use super::slot::{Slot, Slots};
use super::tree::Span;

/// Neighbours, in order.
fn pairs<T>(items: &[T]) -> impl Iterator<Item = (&T, &T)> {
    items.iter().zip(items.iter().skip(1))
}

impl<H: Host> AddressSpace<H> {
    /// Checks the trees of slots, blocks and protected ranges: each by itself, and against
    /// each other. Takes both locks.
    ///
    /// # Panics
    /// If something is not as it should be.
    pub fn check_map(&self) {
        let map = self.inner.map.lock();
        let core = self.inner.core.lock();
        let uses = core.slots.check();
        let slots: usize = uses.values().map(Vec::len).sum();
        assert_eq!(slots, map.slots, "slots are miscounted");
        map.blocks.check(&uses);
        let protected = core.protected.check();
        assert_eq!(protected, map.protected_ranges, "ranges are miscounted");
    }
}

impl Slots {
    /// The pieces of each block that slots use, by the block's start.
    pub(super) fn check(&self) -> BTreeMap<u64, Vec<(u64, u64)>> {
        let slots = self.by_gpa.checked();
        for (one, next) in pairs(&slots) {
            assert!(one.end <= next.start, "{one:x?} overlaps {next:x?}");
            assert!(!one.continues_in(next), "{one:x?} and {next:x?} are one");
        }
        let mut mirrors: Vec<_> = slots.iter().map(Slot::mirror).collect();
        mirrors.sort_by_key(Span::key);
        let found = self.by_hva.checked();
        assert_eq!(found, mirrors, "mirrors that are no slots', or the reverse");
        let mut uses = BTreeMap::<u64, Vec<_>>::new();
        for slot in &slots {
            assert!(slot.start < slot.end, "{slot:x?} is empty");
            let piece = (slot.hva, slot.hva_of(slot.end));
            uses.entry(slot.block).or_default().push(piece);
        }
        uses
    }
}

impl Blocks {
    /// `uses`: what [`Slots::check`] has found.
    fn check(&self, uses: &BTreeMap<u64, Vec<(u64, u64)>>) {
        let blocks = self.tree.checked();
        assert_eq!(blocks.len(), self.count(), "blocks are miscounted");
        for (one, next) in pairs(&blocks) {
            assert!(one.end() <= next.key().0, "{one:x?} overlaps {next:x?}");
        }
        for block in &blocks {
            let pieces = uses.get(&block.key().0).map_or(&[][..], Vec::as_slice);
            let inside = |piece: &(u64, u64)| block.key().0 <= piece.0 && piece.1 <= block.end();
            assert!(pieces.iter().all(inside), "a slot leaves {block:x?}");
            assert_eq!(pieces.len(), block.slots, "uses of {block:x?}");
            assert!(
                block.slots != 0 || !block.standalone,
                "{block:x?} has no use"
            );
        }
        let known = |start: &u64| blocks.iter().any(|block| block.key().0 == *start);
        assert!(uses.keys().all(known), "a slot of no block");
    }
}

impl Protected {
    /// How many ranges there are.
    fn check(&self) -> usize {
        let ranges = self.tree.checked();
        for (one, next) in pairs(&ranges) {
            assert!(one.end < next.start, "{one:x?} touches {next:x?}");
        }
        ranges.len()
    }
}
