//! Memslots: which guest-physical range is which piece of the client's memory.
//!
//! Two trees hold them: by guest-physical address for faults, and by the
//! client's address for invalidations. Every slot has exactly one entry in
//! each, tied together by its number. (While a large unmap is under way the
//! second tree may still have entries whose slot is gone; all they can cause is
//! a fault more.)

use alloc::boxed::Box;

use crate::fallible::NoMemory;

use super::tree::{Key, Node, Span, Tree};

/// A memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Guest-physical start.
    pub(super) start: u64,
    /// Guest-physical end.
    pub(super) end: u64,
    /// The client's address of `start`.
    pub(super) hva: u64,
    /// The start of the RAM block that `hva` is in.
    pub(super) block: u64,
    /// The guest may not write.
    pub(super) rom: bool,
    /// Tells its entry in the second tree from that of any other slot.
    pub(super) id: u64,
}

impl Span for Slot {
    fn key(&self) -> Key {
        (self.start, 0)
    }
    fn end(&self) -> u64 {
        self.end
    }
}

impl Slot {
    /// The client's address of a guest-physical address in the slot.
    pub(super) const fn hva_of(&self, gpa: u64) -> u64 {
        self.hva.wrapping_add(gpa.wrapping_sub(self.start))
    }

    /// The part below `end`.
    const fn until(mut self, end: u64) -> Self {
        self.end = end;
        self
    }

    /// The part from `start` up.
    const fn from(mut self, start: u64) -> Self {
        self.hva = self.hva_of(start);
        self.start = start;
        self
    }

    /// Whether `next` could be the continuation of this slot.
    pub(super) const fn continues_in(&self, next: &Self) -> bool {
        self.end == next.start && self.same_kind(next)
    }

    /// Same block, same offset between addresses, same rights.
    const fn same_kind(&self, other: &Self) -> bool {
        self.block == other.block
            && self.hva.wrapping_sub(self.start) == other.hva.wrapping_sub(other.start)
            && self.rom == other.rom
    }

    /// Whether the slot already says all that `new` would.
    pub(super) const fn covers(&self, new: &Self) -> bool {
        self.start <= new.start && new.end <= self.end && self.same_kind(new)
    }

    /// Its entry in the second tree.
    pub(super) const fn mirror(&self) -> Mirror {
        Mirror {
            hva: self.hva,
            end: self.hva_of(self.end),
            gpa: self.start,
            id: self.id,
        }
    }
}

/// A slot as seen from the client's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mirror {
    pub(super) hva: u64,
    end: u64,
    gpa: u64,
    id: u64,
}

impl Span for Mirror {
    fn key(&self) -> Key {
        (self.hva, self.id)
    }
    fn end(&self) -> u64 {
        self.end
    }
}

impl Mirror {
    /// The guest-physical range of the part of `start..end` that is in here.
    pub(super) fn guest_range(&self, start: u64, end: u64) -> (u64, u64) {
        let (from, until) = (start.max(self.hva), end.min(self.end));
        let first = self.gpa.wrapping_add(from.wrapping_sub(self.hva));
        (first, first.wrapping_add(until.saturating_sub(from)))
    }
}

/// What one change of the map needs, made before anything is changed: nodes for
/// a new slot and for the upper rest of one that it cuts in two. What a change
/// does not use, and as many as it frees, are kept for the next one.
pub(super) struct Spare {
    slots: [Option<Box<Node<Slot>>>; 2],
    mirrors: [Option<Box<Node<Mirror>>>; 2],
}

impl Spare {
    /// No nodes.
    pub(super) const fn new() -> Self {
        Self {
            slots: [None, None],
            mirrors: [None, None],
        }
    }

    /// Makes what is missing. The numbers are those of the two slots.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub(super) fn fill(&mut self, ids: [u64; 2]) -> Result<(), NoMemory> {
        let nodes = self.slots.iter_mut().zip(&mut self.mirrors);
        for ((slot, mirror), id) in nodes.zip(ids) {
            let new = Slot {
                start: 0,
                end: 0,
                hva: 0,
                block: 0,
                rom: false,
                id,
            };
            match slot {
                Some(node) => node.item = new,
                None => *slot = Some(Node::new(new)?),
            }
            if mirror.is_none() {
                *mirror = Some(Node::new(new.mirror())?);
            }
        }
        Ok(())
    }

    /// Keeps a slot that is gone, if one is missing.
    pub(super) fn keep_slot(&mut self, node: Box<Node<Slot>>) {
        if let Some(place) = self.slots.iter_mut().find(|place| place.is_none()) {
            *place = Some(node);
        }
    }

    /// Keeps the second entry of a slot that is gone, if one is missing.
    pub(super) fn keep_mirror(&mut self, node: Box<Node<Mirror>>) {
        if let Some(place) = self.mirrors.iter_mut().find(|place| place.is_none()) {
            *place = Some(node);
        }
    }
}

/// What a change left over, to be settled and freed without the spin lock.
pub(super) struct Leftover {
    /// Slots that are gone; their entries in the second tree are still there.
    pub(super) removed: Tree<Slot>,
    /// Slots that became part of a neighbour; wholly gone.
    pub(super) merged: [Option<Box<Node<Slot>>>; 2],
    mirrors: [Option<Box<Node<Mirror>>>; 2],
    /// Nodes that were not used.
    pub(super) spare: Spare,
    /// The block of a slot that was cut in two: one slot more uses it.
    pub(super) cut: Option<u64>,
}

/// The slots of a VM.
pub(super) struct Slots {
    pub(super) by_gpa: Tree<Slot>,
    pub(super) by_hva: Tree<Mirror>,
}

impl Slots {
    pub(super) const fn new() -> Self {
        Self {
            by_gpa: Tree::new(),
            by_hva: Tree::new(),
        }
    }

    /// The slot that `gpa` is in.
    pub(super) fn find(&self, gpa: u64) -> Option<Slot> {
        self.by_gpa.containing(gpa).copied()
    }

    /// The first slot entry after `after` that `start..end` of the client's
    /// addresses touches.
    pub(super) fn touched(&self, after: Option<Key>, start: u64, end: u64) -> Option<Mirror> {
        self.by_hva.overlap(after, start, end).copied()
    }

    /// Takes the second entry of a removed slot out.
    pub(super) fn forget(&mut self, slot: &Slot) -> Option<Box<Node<Mirror>>> {
        self.by_hva.remove(slot.mirror().key())
    }

    /// Makes `start..end` what `new` says, or nothing. O(log n), does not fail,
    /// allocate or free.
    pub(super) fn change(
        &mut self,
        start: u64,
        end: u64,
        new: Option<Slot>,
        spare: Spare,
    ) -> Leftover {
        let mut left = Leftover {
            removed: Tree::new(),
            merged: [None, None],
            mirrors: [None, None],
            spare,
            cut: None,
        };
        if self.change_one(start, end, new, &mut left) {
            return left;
        }
        let mut above = self.carve(start, end, &mut left);
        if let Some(new) = new {
            self.put(new, &mut above, &mut left);
        }
        self.by_gpa.append(above);
        left
    }

    /// The changes that concern one slot only, which is most: a slot where there
    /// is none, next to none that it continues, and the end of a whole slot.
    /// Returns whether it was one.
    fn change_one(&mut self, start: u64, end: u64, new: Option<Slot>, left: &mut Leftover) -> bool {
        match (self.by_gpa.overlap(None, start, end).copied(), new) {
            (None, None) => true,
            (None, Some(new)) => {
                let below = start.checked_sub(1).and_then(|last| self.find(last));
                let joins = below.is_some_and(|below| below.continues_in(&new))
                    || self.find(end).is_some_and(|above| new.continues_in(&above));
                if !joins {
                    self.put_alone(new, left);
                }
                !joins
            }
            (Some(old), None) if old.start == start && old.end == end => {
                if let Some(node) = self.by_gpa.remove(old.key()) {
                    left.removed.insert(node);
                }
                true
            }
            _ => false,
        }
    }

    fn put_alone(&mut self, mut new: Slot, left: &mut Leftover) {
        let [spare, _] = &mut left.spare.slots;
        let [mirror, _] = &mut left.spare.mirrors;
        if let (Some(mut node), Some(mut mirror)) = (spare.take(), mirror.take()) {
            new.id = node.item.id;
            node.item = new;
            mirror.item = new.mirror();
            self.by_gpa.insert(node);
            self.by_hva.insert(mirror);
        }
    }

    /// Empties `start..end`, leaving the slots below in place; returns those
    /// above.
    fn carve(&mut self, start: u64, end: u64, left: &mut Leftover) -> Tree<Slot> {
        let mut removed = self.by_gpa.split_off((start, 0));
        let mut above = removed.split_off((end, 0));
        if let Some(mut node) = self.by_gpa.pop_last() {
            let old = node.item;
            if old.end > start {
                node.item = old.until(start);
                self.move_mirror(&old, &node.item);
                if old.end > end {
                    left.cut = Some(old.block);
                    above = self.add(old.from(end), above, left);
                }
            }
            // A node's cached end is refreshed when it is joined again.
            self.by_gpa.insert(node);
        }
        if let Some(mut node) = removed.pop_last() {
            let old = node.item;
            if old.end > end {
                node.item = old.from(end);
                self.move_mirror(&old, &node.item);
                above.insert(node);
            } else {
                removed.insert(node);
            }
        }
        left.removed = removed;
        above
    }

    /// Adds the upper rest of a slot, with spare nodes, to `above`.
    fn add(&mut self, mut rest: Slot, mut above: Tree<Slot>, left: &mut Leftover) -> Tree<Slot> {
        let [_, spare] = &mut left.spare.slots;
        let [_, mirror] = &mut left.spare.mirrors;
        if let (Some(mut node), Some(mut mirror)) = (spare.take(), mirror.take()) {
            rest.id = node.item.id;
            node.item = rest;
            mirror.item = rest.mirror();
            above.insert(node);
            self.by_hva.insert(mirror);
        }
        above
    }

    /// Puts a slot between those present and those in `above`, as one with its
    /// neighbours where they continue each other.
    fn put(&mut self, mut new: Slot, above: &mut Tree<Slot>, left: &mut Leftover) {
        let [spare, _] = &mut left.spare.slots;
        let [mirror, _] = &mut left.spare.mirrors;
        let (Some(mut node), Some(mut mirror)) = (spare.take(), mirror.take()) else {
            return;
        };
        new.id = node.item.id;
        let [merged_below, merged_above] = &mut left.merged;
        let [mirror_below, mirror_above] = &mut left.mirrors;
        if let Some(below) = self.by_gpa.pop_last() {
            if below.item.continues_in(&new) {
                new.start = below.item.start;
                new.hva = below.item.hva;
                *mirror_below = self.forget(&below.item);
                *merged_below = Some(below);
            } else {
                self.by_gpa.insert(below);
            }
        }
        if let Some(next) = above.pop_first() {
            if new.continues_in(&next.item) {
                new.end = next.item.end;
                *mirror_above = self.forget(&next.item);
                *merged_above = Some(next);
            } else {
                above.insert(next);
            }
        }
        node.item = new;
        mirror.item = new.mirror();
        self.by_gpa.insert(node);
        self.by_hva.insert(mirror);
    }

    fn move_mirror(&mut self, old: &Slot, new: &Slot) {
        if let Some(mut node) = self.forget(old) {
            node.item = new.mirror();
            self.by_hva.insert(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After any change the second tree has exactly the mirrors of the slots
    /// in the first, once those of removed slots are forgotten.
    #[test]
    fn every_slot_has_its_mirror() {
        let mut slots = Slots::new();
        let mut state = 3u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            (state >> 33) % below
        };
        for step in 0..4000u64 {
            let start = random(200) * 4096;
            let end = start + (1 + random(40)) * 4096;
            let new = (random(3) > 0).then(|| Slot {
                start,
                end,
                hva: (1000 + random(3) * 500) * 4096 + start * random(2),
                block: 7,
                rom: random(3) == 0,
                id: 0,
            });
            let mut spare = Spare::new();
            spare.fill([2 * step, 2 * step + 1]).unwrap();
            let mut left = slots.change(start, end, new, spare);
            while let Some(node) = left.removed.pop_first() {
                assert!(slots.forget(&node.item).is_some());
            }
            slots.check();
        }
    }
}
