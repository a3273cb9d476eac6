//! The extended page tables: guest-physical to host-physical, four levels,
//! leaves of 4 KB, 2 MB and 1 GB.
//!
//! Everything here runs under the spin lock of the address space and neither
//! allocates nor frees: new tables come out of a [`Reserve`], tables that are
//! no longer used go to a [`Graveyard`] and are freed after the flush.
//!
//! SDM 29.3.2 "EPT Translation Mechanism".

mod table;

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::arch::addr::{Gpa, PAGE_SHIFT, Pfn};
use crate::arch::ept::{
    ADDRESS_MASK, EPTP_ACCESSED_DIRTY, EPTP_WALK_4, EPTP_WB, EptEntry, EptVpidCaps, LEAF_WB,
};
use crate::fallible::NoMemory;
use crate::host::{Aging, Host, PresentPage};

use super::Access;
use super::around::Streams;
use table::{ENTRIES, Table};

/// The level of the root table; a leaf's level is 1, 2 or 3.
const ROOT_LEVEL: u32 = 4;
/// Address bits that four levels translate.
pub(super) const ADDRESS_BITS: u32 = 48;

/// What one entry of a table of this level covers, as a shift.
const fn shift_of(level: u32) -> u32 {
    PAGE_SHIFT.wrapping_add(level.wrapping_sub(1).wrapping_mul(9))
}

const fn index_of(gpa: u64, level: u32) -> usize {
    (gpa.wrapping_shr(shift_of(level)) & 511) as usize
}

/// The size of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeafSize {
    /// 4 KB.
    Small,
    /// 2 MB.
    Large,
    /// 1 GB.
    Huge,
}

impl LeafSize {
    pub(super) const fn level(self) -> u32 {
        match self {
            Self::Small => 1,
            Self::Large => 2,
            Self::Huge => 3,
        }
    }

    /// log2 of its bytes.
    #[must_use]
    pub const fn shift(self) -> u32 {
        shift_of(self.level())
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1u64.wrapping_shl(self.shift())
    }
}

/// A leaf to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    pub(super) size: LeafSize,
    /// The first page of it.
    pub(super) frame: Pfn,
    pub(super) write: bool,
    /// log2 of the bytes that the host has in one piece there, aligned alike on
    /// its side: as much as the leaf, or more.
    pub(super) piece: u32,
}

impl Leaf {
    /// `large_code`: code may run from any leaf.
    fn bits(self, large_code: bool) -> u64 {
        let is_small = self.size == LeafSize::Small;
        let mut flags = EptEntry::READ;
        flags.set(EptEntry::EXECUTE, large_code || is_small);
        flags.set(EptEntry::WRITE, self.write);
        flags.set(EptEntry::LARGE, !is_small);
        (self.frame.address().0 & ADDRESS_MASK) | LEAF_WB | flags.bits()
    }
}

/// What came of writing a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Install {
    /// It is there.
    Done,
    /// Something else is mapped in `start..end`, which must be cleared and
    /// flushed first (SDM 29.4.3.4 "Guidelines for Use of the INVEPT
    /// Instruction": an entry is not changed from one page size or address to
    /// another under a processor that may use both).
    Conflict {
        start: u64,
        end: u64,
        /// It is smaller leaves.
        smaller: bool,
    },
    /// The reserve has too few tables.
    Short,
}

/// What a vCPU keeps for its faults: tables made before the lock is taken, the
/// most that one leaf can need, and the runs of its touches.
pub struct Reserve<H: Host> {
    pub(super) streams: Streams,
    interior: [Option<Box<Table<H>>>; 2],
    bottom: Option<Box<Table<H>>>,
}

impl<H: Host> Reserve<H> {
    /// An empty reserve; [`super::AddressSpace::fault`] fills it as needed.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            streams: Streams::new(),
            interior: [None, None],
            bottom: None,
        }
    }

    /// Makes sure that `missing` tables, counted from the bottom, are there.
    ///
    /// # Errors
    /// [`NoMemory`].
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn fill(&mut self, host: &H, missing: u32) -> Result<(), NoMemory> {
        if missing > 0 && self.bottom.is_none() {
            self.bottom = Some(Table::boxed(host, false)?);
        }
        for (slot, needed) in self.interior.iter_mut().zip([missing > 1, missing > 2]) {
            if needed && slot.is_none() {
                *slot = Some(Table::boxed(host, true)?);
            }
        }
        Ok(())
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn take(&mut self, level: u32) -> Option<Box<Table<H>>> {
        if level == 1 {
            self.bottom.take()
        } else {
            self.interior.iter_mut().find_map(Option::take)
        }
    }
}

impl<H: Host> Default for Reserve<H> {
    fn default() -> Self {
        Self::new()
    }
}

/// Pages and leaves in use, counted without the lock.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) tables: AtomicU64,
    /// By level: 4 KB, 2 MB, 1 GB.
    pub(super) leaves: [AtomicU64; 3],
    /// Times that leaves gave way to a larger one.
    pub(super) merges: AtomicU64,
}

impl Counters {
    fn add(&self, level: u32, count: u64) {
        let index = level.wrapping_sub(1) as usize;
        if let Some(counter) = self.leaves.get(index) {
            counter.fetch_add(count, Ordering::Relaxed);
        }
    }

    fn sub(&self, level: u32, count: u64) {
        let index = level.wrapping_sub(1) as usize;
        if let Some(counter) = self.leaves.get(index) {
            counter.fetch_sub(count, Ordering::Relaxed);
        }
    }
}

/// Tables taken out of the tree, and leaves cleared. To be dropped only after
/// every processor has been flushed.
pub(super) struct Graveyard<H: Host> {
    head: [Option<Box<Table<H>>>; 3],
    leaves: [u64; 3],
}

impl<H: Host> Graveyard<H> {
    pub(super) const fn new() -> Self {
        Self {
            head: [None, None, None],
            leaves: [0; 3],
        }
    }

    fn add_leaf(&mut self, level: u32) {
        if let Some(count) = self.leaves.get_mut(level.wrapping_sub(1) as usize) {
            *count = count.wrapping_add(1);
        }
    }

    fn add_table(&mut self, mut table: Box<Table<H>>, level: u32) {
        if let Some(head) = self.head.get_mut(level.wrapping_sub(1) as usize) {
            table.next = head.take();
            *head = Some(table);
        }
    }

    /// Frees what is in it. No lock is held, and every processor was flushed.
    pub(super) fn bury(mut self, counters: &Counters) {
        for (level, count) in (1..).zip(self.leaves) {
            counters.sub(level, count);
        }
        // From the top down: a table's children join the chain below it, so
        // that nothing recurses.
        for level in (1..ROOT_LEVEL).rev() {
            while let Some(mut table) = self.pop(level) {
                let mut below = 0u16;
                for child in core::mem::take(&mut table.children).into_iter().flatten() {
                    below = below.wrapping_add(1);
                    self.add_table(child, level.wrapping_sub(1));
                }
                counters.sub(level, u64::from(table.live.wrapping_sub(below)));
                counters.tables.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    fn pop(&mut self, level: u32) -> Option<Box<Table<H>>> {
        let head = self.head.get_mut(level.wrapping_sub(1) as usize)?;
        let mut table = head.take()?;
        *head = table.next.take();
        Some(table)
    }
}

/// The tables of one VM.
pub(super) struct Ept<H: Host> {
    root: Table<H>,
    large: bool,
    huge: bool,
    /// Code may run from leaves of these sizes too.
    large_code: bool,
}

impl<H: Host> Ept<H> {
    /// No translation at all.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub(super) fn new(host: &H, caps: EptVpidCaps, counters: &Counters) -> Result<Self, NoMemory> {
        let root = Table::new(host, true)?;
        counters.tables.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            root,
            large: caps.contains(EptVpidCaps::PAGE_2M),
            huge: caps.contains(EptVpidCaps::PAGE_1G),
            large_code: true,
        })
    }

    /// From now on code runs from leaves of 4 KB only. There are no leaves yet.
    pub(super) fn keep_code_small(&mut self) {
        self.large_code = false;
    }

    /// The EPT pointer, SDM 25.6.11 "Extended-Page-Table Pointer (EPTP)".
    pub(super) fn pointer(&self, caps: EptVpidCaps) -> u64 {
        let flags = if caps.contains(EptVpidCaps::ACCESSED_DIRTY) {
            EPTP_ACCESSED_DIRTY
        } else {
            0
        };
        self.root.physical().0 | EPTP_WB | EPTP_WALK_4 | flags
    }

    /// Whether the processor has leaves of this size.
    pub(super) const fn has(&self, size: LeafSize) -> bool {
        match size {
            LeafSize::Small => true,
            LeafSize::Large => self.large,
            LeafSize::Huge => self.huge,
        }
    }

    /// The level of the largest leaf that code, or data beside code, may have at `gpa`. Where
    /// code needs small ones, those that are there stay: data beside the code would bring a
    /// larger one back, and the code take it away, in turn.
    #[inline]
    pub(super) fn most_level(&self, gpa: Gpa, fetch: bool) -> u32 {
        if self.large_code {
            return ROOT_LEVEL;
        }
        if fetch { 1 } else { self.lowest(gpa.0).2 }
    }

    /// The lowest entry on the way to the 4 KB page at `gpa`: its table, its index
    /// there, and the table's level.
    fn lowest(&self, gpa: u64) -> (&Table<H>, usize, u32) {
        let mut table = &self.root;
        let mut level = ROOT_LEVEL;
        loop {
            let index = index_of(gpa, level);
            let Some(Some(child)) = table.children.get(index) else {
                return (table, index, level);
            };
            table = child;
            level = level.wrapping_sub(1);
        }
    }

    /// The leaf that translates `gpa`, and its size; or how many tables are
    /// missing on the way to a 4 KB leaf.
    pub(super) fn lookup(&self, gpa: Gpa) -> Result<(EptEntry, LeafSize), u32> {
        let (table, index, level) = self.lowest(gpa.0);
        let size = match level {
            1 => LeafSize::Small,
            2 => LeafSize::Large,
            _ => LeafSize::Huge,
        };
        match table.get(index) {
            0 => Err(level.wrapping_sub(1)),
            entry => Ok((EptEntry::from_bits_retain(entry), size)),
        }
    }

    /// Whether a leaf of an address in `start..end` has been used; unless `aging`
    /// is to look only, it then counts as unused. Without `flagging` a leaf that
    /// is there counts as used.
    pub(super) fn age(&self, start: u64, end: u64, aging: Aging, flagging: bool) -> bool {
        let mut young = false;
        let mut gpa = start;
        while gpa < end {
            let (table, index, level) = self.lowest(gpa);
            let entry = EptEntry::from_bits_retain(table.get(index));
            if !entry.is_empty() && (!flagging || entry.contains(EptEntry::ACCESSED)) {
                young = true;
                if aging == Aging::Look {
                    break;
                }
                table.remove_flag(index, EptEntry::ACCESSED.bits());
            }
            let bytes = 1u64.wrapping_shl(shift_of(level));
            gpa = (gpa & bytes.wrapping_neg()).wrapping_add(bytes);
        }
        young
    }

    /// Whether the tables already allow `access` at `gpa`.
    pub(super) fn allows(&self, gpa: Gpa, access: Access) -> bool {
        let Ok((entry, _)) = self.lookup(gpa) else {
            return false;
        };
        (!access.read || entry.contains(EptEntry::READ))
            && (!access.write || entry.contains(EptEntry::WRITE))
            && (!access.fetch || entry.contains(EptEntry::EXECUTE))
    }

    /// Writes a leaf for the piece of guest-physical memory around `gpa`.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn install(
        &mut self,
        gpa: Gpa,
        leaf: Leaf,
        reserve: &mut Reserve<H>,
        counters: &Counters,
    ) -> Install {
        let target = leaf.size.level();
        let mut table = &mut self.root;
        let mut level = ROOT_LEVEL;
        while level > target {
            let index = index_of(gpa.0, level);
            let entry = table.get(index);
            let Some(slot) = table.children.get_mut(index) else {
                return Install::Short;
            };
            if slot.is_none() {
                if entry != 0 {
                    return conflict(gpa, level, false);
                }
                let Some(fresh) = reserve.take(level.wrapping_sub(1)) else {
                    return Install::Short;
                };
                let all = EptEntry::READ | EptEntry::WRITE | EptEntry::EXECUTE;
                let physical = fresh.physical().0;
                *slot = Some(fresh);
                table.live = table.live.wrapping_add(1);
                table.set(index, physical | all.bits());
                counters.tables.fetch_add(1, Ordering::Relaxed);
            }
            let Some(Some(child)) = table.children.get_mut(index) else {
                return Install::Short;
            };
            table = child;
            table.in_one_piece = shift_of(level) <= leaf.piece
                && match level {
                    2 => self.large,
                    3 => self.huge,
                    _ => false,
                };
            level = level.wrapping_sub(1);
        }
        write_leaf(table, gpa, leaf, self.large_code, counters)
    }

    /// Writes a leaf of 4 KB for each of `pages` that is there and has none yet.
    /// They follow each other from `first`, in the range of one table, which is
    /// there; `write` is whether any may be written.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn fill(
        &mut self,
        first: Gpa,
        pages: &[PresentPage],
        write: bool,
        counters: &Counters,
    ) {
        let large_code = self.large_code;
        let Some(table) = self.bottom(first) else {
            return;
        };
        let mut written = 0u16;
        for (index, page) in (index_of(first.0, 1)..ENTRIES).zip(pages) {
            let Some(frame) = page.frame() else {
                continue;
            };
            if table.get(index) != 0 {
                continue;
            }
            let leaf = Leaf {
                size: LeafSize::Small,
                frame,
                write: write && page.is_writable(),
                piece: PAGE_SHIFT,
            };
            table.set(index, leaf.bits(large_code));
            written = written.wrapping_add(1);
        }
        table.live = table.live.wrapping_add(written);
        counters.add(1, written.into());
    }

    /// Whether there are smaller leaves at `gpa` where the host had enough in one
    /// piece for a leaf of this size.
    pub(super) fn is_split(&self, gpa: u64, size: LeafSize) -> bool {
        let mut table = &self.root;
        for level in (size.level()..=ROOT_LEVEL).rev() {
            match table.children.get(index_of(gpa, level)) {
                Some(Some(child)) => table = child,
                _ => return false,
            }
        }
        table.in_one_piece
    }

    /// The table that has the 4 KB leaf of `gpa`, if it is there.
    fn bottom(&mut self, gpa: Gpa) -> Option<&mut Table<H>> {
        let mut table = &mut self.root;
        for level in (2..=ROOT_LEVEL).rev() {
            table = table.children.get_mut(index_of(gpa.0, level))?.as_mut()?;
        }
        Some(table)
    }

    /// Clears every translation of an address in `start..end`; a leaf that
    /// reaches further goes as a whole. Returns whether there was one.
    pub(super) fn clear(&mut self, start: u64, end: u64, grave: &mut Graveyard<H>) -> bool {
        clear(&mut self.root, ROOT_LEVEL, 0, start, end, grave)
    }
}

fn conflict(gpa: Gpa, level: u32, smaller: bool) -> Install {
    let bytes = 1u64.wrapping_shl(shift_of(level));
    let start = gpa.0 & bytes.wrapping_neg();
    Install::Conflict {
        start,
        end: start.wrapping_add(bytes),
        smaller,
    }
}

fn write_leaf<H: Host>(
    table: &mut Table<H>,
    gpa: Gpa,
    leaf: Leaf,
    large_code: bool,
    counters: &Counters,
) -> Install {
    let level = leaf.size.level();
    let index = index_of(gpa.0, level);
    let old = table.get(index);
    let new = leaf.bits(large_code);
    if old == 0 {
        table.live = table.live.wrapping_add(1);
        table.set(index, new);
        counters.add(level, 1);
        return Install::Done;
    }
    let is_table = matches!(table.children.get(index), Some(Some(_)));
    if is_table || (old ^ new) & ADDRESS_MASK != 0 {
        return conflict(gpa, level, is_table);
    }
    // The same page with more rights: a processor that still has the old
    // translation faults, and that drops it (SDM 29.4.3.1). Rights that the
    // entry has already stay: taking them away would need a flush. So do the
    // flags that the processor sets meanwhile.
    table.add_flags(index, new);
    Install::Done
}

fn clear<H: Host>(
    table: &mut Table<H>,
    level: u32,
    base: u64,
    start: u64,
    end: u64,
    grave: &mut Graveyard<H>,
) -> bool {
    let bytes = 1u64.wrapping_shl(shift_of(level));
    let whole = bytes.wrapping_mul(ENTRIES as u64);
    let from = start.max(base);
    let until = end.min(base.saturating_add(whole));
    if from >= until {
        return false;
    }
    let mut cleared = false;
    for index in index_of(from, level)..=index_of(until.wrapping_sub(1), level) {
        if table.get(index) == 0 {
            continue;
        }
        let here = base.wrapping_add(bytes.wrapping_mul(index as u64));
        let covered = start <= here && here.wrapping_add(bytes) <= end;
        if let Some(Some(child)) = table.children.get_mut(index) {
            if !covered {
                cleared |= clear(child, level.wrapping_sub(1), here, start, end, grave);
                if child.live != 0 {
                    continue;
                }
            }
            table.clear(index);
            table.live = table.live.wrapping_sub(1);
            if let Some(child) = table.children.get_mut(index).and_then(Option::take) {
                grave.add_table(child, level.wrapping_sub(1));
            }
        } else {
            table.clear(index);
            table.live = table.live.wrapping_sub(1);
            grave.add_leaf(level);
        }
        cleared = true;
    }
    cleared
}
