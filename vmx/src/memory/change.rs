//! The client changes the map: ALLOC_RAM, ADD_RAMBLOCK, SET_RAM, SET_RAM2,
//! PROTECT_RAM.
//!
//! Each call checks and allocates first, then changes everything in one hold of
//! the spin lock, then waits for the processors and for copies under way, and
//! only then lets go of what was there before. A call that fails has changed
//! nothing.

use core::sync::atomic::Ordering;

use abi::ram::{RamFlags, RamPermissions};

use crate::Error;
use crate::arch::addr::{Hva, PAGE_MASK};
use crate::host::Host;

use super::AddressSpace;
use super::block::NewBlock;
use super::ept::Graveyard;
use super::protect::{Range, group};
use super::slot::{Leftover, Slot, Spare};
use super::space::{Inner, Map};
use super::tree::{Node, Tree};

/// Slots, and protected ranges, that one VM can have: what bounds the kernel
/// memory a client can make us use.
const MOST: usize = 1 << 20;

/// Slots forgotten per hold of the spin lock.
const BATCH: usize = 32;

impl<H: Host> AddressSpace<H> {
    /// ALLOC_RAM and ADD_RAMBLOCK: registers `size` bytes at `start`, whole
    /// pages, as memory that SET_RAM may name.
    ///
    /// # Errors
    /// [`Error::Invalid`]: 0, unaligned, wraps, or overlaps another block;
    /// [`Error::NoMemory`].
    pub fn add_ram_block(&self, start: Hva, size: u64) -> Result<(), Error> {
        let end = range_end(start.0, size)?;
        if start.0 == 0 {
            return Err(Error::Invalid);
        }
        let mut map = self.inner.map.lock();
        let block = map.blocks.prepare(start.0, end, false)?;
        map.blocks.register(block);
        Ok(())
    }

    /// SET_RAM and SET_RAM2: maps `size` bytes at `gpa` to the client's `va`,
    /// or unmaps them. `flags` are [`RamFlags`]. Whatever was mapped there
    /// before is no longer in use, by any vCPU, when this returns.
    ///
    /// # Errors
    /// [`Error::Invalid`]: an unknown flag; INVALID with another flag or a
    /// `va`; anything not a multiple of 4096, 0 in size, wrapping, or beyond
    /// the guest's physical addresses; `va` in no block, or the range not whole
    /// in it; STANDALONE over any other block. [`Error::NoMemory`]. Nothing has
    /// changed then.
    pub fn set_ram(&self, gpa: u64, size: u64, va: u64, flags: u32) -> Result<(), Error> {
        let flags = RamFlags::from_bits(flags).ok_or(Error::Invalid)?;
        let range = self.inner.guest_range(gpa, size)?;
        if flags.contains(RamFlags::INVALID) {
            if flags != RamFlags::INVALID || va != 0 {
                return Err(Error::Invalid);
            }
            let mut map = self.inner.map.lock();
            return self.inner.apply(&mut map, range, None, None);
        }
        if va == 0 {
            return Err(Error::Invalid);
        }
        let end = range_end(va, size)?;
        let mut map = self.inner.map.lock();
        let (block, fresh) = if flags.contains(RamFlags::STANDALONE) {
            (va, Some(map.blocks.prepare(va, end, true)?))
        } else {
            (map.blocks.around(va, end).ok_or(Error::Invalid)?, None)
        };
        let slot = Slot {
            start: range.start,
            end: range.end,
            hva: va,
            block,
            rom: flags.contains(RamFlags::ROM),
            id: 0,
        };
        self.inner.apply(&mut map, range, Some(slot), fresh)
    }

    /// PROTECT_RAM: forbids (`flags` 0) or allows (7) all guest access to
    /// `size` bytes at `gpa`; bits of `flags` above the low three are ignored.
    /// While a page is protected, a guest access to any page of its 2 MB group
    /// ends in [`super::FaultOutcome::Protected`]. In effect on every vCPU when
    /// this returns.
    ///
    /// # Errors
    /// [`Error::Invalid`]: other permissions; not whole pages, none, or beyond
    /// every address that a SET_RAM has named; [`Error::NoMemory`]. Nothing has
    /// changed then.
    pub fn protect_ram(&self, gpa: u64, size: u64, flags: u32) -> Result<(), Error> {
        let permissions = RamPermissions::from_bits_truncate(flags);
        if !permissions.is_empty() && permissions != RamPermissions::RWX {
            return Err(Error::Invalid);
        }
        let range = self.inner.guest_range(gpa, size)?;
        let mut map = self.inner.map.lock();
        if range.end > map.highest {
            return Err(Error::Invalid);
        }
        self.inner.protect(&mut map, range, permissions.is_empty())
    }
}

/// The end of a range of whole pages.
fn range_end(start: u64, size: u64) -> Result<u64, Error> {
    if size == 0 || (start | size) & PAGE_MASK != 0 {
        return Err(Error::Invalid);
    }
    start.checked_add(size).ok_or(Error::Invalid)
}

impl<H: Host> Inner<H> {
    fn guest_range(&self, gpa: u64, size: u64) -> Result<Range, Error> {
        let end = range_end(gpa, size)?;
        if end > self.limit {
            return Err(Error::Invalid);
        }
        Ok(Range { start: gpa, end })
    }

    /// Makes `range` what `slot` says, or nothing.
    fn apply(
        &self,
        map: &mut Map,
        range: Range,
        slot: Option<Slot>,
        block: Option<NewBlock>,
    ) -> Result<(), Error> {
        // One for the slot, one for the upper rest of a slot it cuts in two.
        if map.slots.saturating_add(2) > MOST {
            return Err(Error::NoMemory);
        }
        let ids = [map.next_id, map.next_id.wrapping_add(1)];
        map.spare.fill(ids)?;
        // Nothing fails from here on.
        map.next_id = map.next_id.wrapping_add(2);
        map.highest = map.highest.max(range.end);
        if let Some(block) = block {
            map.blocks.register(block);
        } else if let Some(slot) = slot {
            let core = self.core.lock();
            let same = core
                .slots
                .find(slot.start)
                .is_some_and(|old| old.covers(&slot));
            if same {
                return Ok(());
            }
        }
        let spare = core::mem::replace(&mut map.spare, Spare::new());
        let mut grave = Graveyard::new();
        let mut core = self.core.lock();
        let left = core.slots.change(range.start, range.end, slot, spare);
        let mut cleared = core.ept.clear(range.start, range.end, &mut grave);
        cleared |= core.clear_passed(&left, &mut grave);
        let merges = core.merge(range, &mut grave);
        if cleared || merges != 0 {
            self.presence.advance();
        }
        self.counters.merges.fetch_add(merges, Ordering::Relaxed);
        core.invalidations.advance();
        drop(core);
        self.finish_flush();
        self.settle();
        grave.bury(&self.counters);
        self.account(map, slot, left);
        Ok(())
    }

    /// Counts slots and their uses of blocks, and frees what is left over.
    fn account(&self, map: &mut Map, slot: Option<Slot>, left: Leftover) {
        for block in [slot.map(|slot| slot.block), left.cut]
            .into_iter()
            .flatten()
        {
            map.blocks.hold(block);
            map.slots = map.slots.saturating_add(1);
        }
        for node in left.merged.into_iter().flatten() {
            self.release(map, node.item.block);
        }
        map.spare = left.spare;
        let mut removed = left.removed;
        while !removed.is_empty() {
            self.forget_some(map, &mut removed);
        }
    }

    /// One slot less uses the block; with the last one go a stand-alone block and
    /// what is pinned of it. Every processor has been flushed.
    fn release(&self, map: &mut Map, block: u64) {
        map.slots = map.slots.saturating_sub(1);
        if let Some((start, end)) = map.blocks.release(block) {
            self.unpin(start, end);
        }
    }

    fn forget_some(&self, map: &mut Map, removed: &mut Tree<Slot>) {
        let mut nodes = [const { None }; BATCH];
        for node in &mut nodes {
            *node = removed.pop_first();
            if node.is_none() {
                break;
            }
        }
        let mut mirrors = [const { None }; BATCH];
        let mut core = self.core.lock();
        for (node, mirror) in nodes.iter().flatten().zip(&mut mirrors) {
            *mirror = core.slots.forget(&node.item);
        }
        drop(core);
        for node in nodes.into_iter().flatten() {
            self.release(map, node.item.block);
            map.spare.keep_slot(node);
        }
        for mirror in mirrors.into_iter().flatten() {
            map.spare.keep_mirror(mirror);
        }
    }

    fn protect(&self, map: &mut Map, range: Range, forbid: bool) -> Result<(), Error> {
        if map.protected_ranges >= MOST {
            return Err(Error::NoMemory);
        }
        let spare = Node::new(range)?;
        let mut grave = Graveyard::new();
        let mut core = self.core.lock();
        let left = if forbid {
            core.protected.add(range, spare)
        } else {
            core.protected.remove(range, spare)
        };
        // Whole groups: every page of a group with a protected page is out of
        // reach, and no larger leaf may reach into one.
        let (first, last) = (group(range.start), group(range.end.wrapping_sub(1)));
        if forbid && core.ept.clear(first.start, last.end, &mut grave) {
            self.presence.advance();
        }
        core.invalidations.advance();
        drop(core);
        if forbid {
            self.finish_flush();
            self.settle();
        }
        grave.bury(&self.counters);
        let (gone, added) = left.settle();
        map.protected_ranges = map
            .protected_ranges
            .saturating_add(usize::from(added))
            .saturating_sub(gone);
        Ok(())
    }
}
