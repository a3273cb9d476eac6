//! Physical memory: real memory of this process behind made-up physical
//! addresses, with a record of who owns each page. Freed pages are poisoned
//! and kept until the machine goes, so a late write is seen; unless a test wants them
//! used again ([`Memory::reuse`]).
// UNSAFETY: hands out and writes raw memory, as physical memory is.
#![expect(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

const PAGE: usize = 4096;
const POISON: u8 = 0xdb;

/// Who a run of pages belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// `Host::alloc_page`.
    Kernel,
    /// `Host::shared_page`.
    Shared,
    /// A process's memory.
    User,
    /// The page of zeros that reads of untouched memory share.
    Zero,
    /// Another hypervisor's.
    Foreign,
}

struct Block {
    pages: u64,
    memory: *mut u8,
    layout: Layout,
    owner: Owner,
    /// Pages not yet given back.
    live: Vec<bool>,
}

// SAFETY: a block is plain memory, reached only through raw pointers.
unsafe impl Send for Block {}

#[derive(Default)]
pub(crate) struct Memory {
    blocks: BTreeMap<u64, Block>,
    next: u64,
    /// Single pages of the kernel's that were given back, if they are to be used again.
    freed: Option<BTreeSet<u64>>,
}

impl Memory {
    /// From now on pages that were given back are used again, the lowest first.
    pub(crate) fn reuse(&mut self) {
        self.freed.get_or_insert_default();
    }

    fn take_freed(&mut self) -> Option<u64> {
        let frame = self.freed.as_mut()?.pop_first()?;
        let block = self.blocks.get_mut(&frame)?;
        block.live.fill(true);
        // SAFETY: the page lies in the block, which lives as long as `self`.
        unsafe { block.memory.write_bytes(0, PAGE) };
        Some(frame)
    }

    /// Pages in a run of their own, zeroed, aligned to their size. Returns the
    /// first frame.
    pub(crate) fn allocate(&mut self, pages: u64, owner: Owner) -> u64 {
        if let Some(frame) = (pages == 1 && owner == Owner::Kernel)
            .then(|| self.take_freed())
            .flatten()
        {
            return frame;
        }
        let pages_usize = usize::try_from(pages).expect("a run fits in memory");
        // 2 MB and 1 GB runs need only page alignment in this process.
        let layout = Layout::from_size_align(pages_usize * PAGE, PAGE).expect("a valid layout");
        // SAFETY: the layout is not of size zero.
        let memory = unsafe { alloc_zeroed(layout) };
        assert!(
            !memory.is_null(),
            "the machine that runs the tests is out of memory"
        );
        // A gap follows each run.
        let frame = self
            .next
            .max(0x10_0000)
            .next_multiple_of(pages.next_power_of_two());
        self.next = frame + pages + 1;
        self.blocks.insert(
            frame,
            Block {
                pages,
                memory,
                layout,
                owner,
                live: vec![true; pages_usize],
            },
        );
        frame
    }

    fn find(&self, frame: u64) -> Option<(&Block, usize)> {
        let (first, block) = self.blocks.range(..=frame).next_back()?;
        let index = frame - first;
        (index < block.pages).then(|| (block, usize::try_from(index).unwrap_or(0)))
    }

    /// The owner of a page that is in use.
    pub(crate) fn owner(&self, frame: u64) -> Option<Owner> {
        let (block, index) = self.find(frame)?;
        block.live[index].then_some(block.owner)
    }

    /// Where this process sees a page, live or freed.
    pub(crate) fn pointer(&self, frame: u64) -> Option<*mut u8> {
        let (block, index) = self.find(frame)?;
        Some(block.memory.wrapping_add(index * PAGE))
    }

    /// Where this process sees a physical address of a live page.
    pub(crate) fn at(&self, physical: u64) -> Option<*mut u8> {
        self.owner(physical >> 12)?;
        let offset = usize::try_from(physical & 0xfff).unwrap_or(0);
        Some(self.pointer(physical >> 12)?.wrapping_add(offset))
    }

    /// Gives a page back: false if it is not in use.
    pub(crate) fn release(&mut self, frame: u64) -> bool {
        let Some((first, block)) = self.blocks.range_mut(..=frame).next_back() else {
            return false;
        };
        let Ok(index) = usize::try_from(frame - first) else {
            return false;
        };
        let Some(live) = block.live.get_mut(index) else {
            return false;
        };
        if !std::mem::take(live) {
            return false;
        }
        let page = block.memory.wrapping_add(index * PAGE);
        // SAFETY: the page lies in the block, which lives as long as `self`.
        unsafe { page.write_bytes(POISON, PAGE) };
        if let Some(freed) = self.freed.as_mut().filter(|_| block.owner == Owner::Kernel) {
            freed.insert(frame);
        }
        true
    }

    /// Pages in use by this owner.
    pub(crate) fn count(&self, owner: Owner) -> usize {
        self.blocks
            .values()
            .filter(|block| block.owner == owner)
            .map(|block| block.live.iter().filter(|live| **live).count())
            .sum()
    }

    /// Freed pages that somebody wrote since.
    pub(crate) fn written_after_free(&self) -> Vec<u64> {
        let mut found = Vec::new();
        for (first, block) in &self.blocks {
            for (index, live) in block.live.iter().enumerate() {
                let page = block.memory.wrapping_add(index * PAGE);
                let intact = *live
                    || (0..PAGE).all(|at| {
                        // SAFETY: within the page, which lives as long as `self`.
                        unsafe { page.wrapping_add(at).read_volatile() == POISON }
                    });
                if !intact {
                    found.push(first + index as u64);
                }
            }
        }
        found
    }

    /// Copies from physical memory; the range stays within a page.
    pub(crate) fn read(&self, physical: u64, bytes: &mut [u8]) -> bool {
        assert!((physical & 0xfff) as usize + bytes.len() <= PAGE);
        let Some(from) = self.at(physical) else {
            return false;
        };
        for (i, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: the range lies in a live page.
            *byte = unsafe { from.wrapping_add(i).read_volatile() };
        }
        true
    }

    /// Copies to physical memory; the range stays within a page.
    pub(crate) fn write(&self, physical: u64, bytes: &[u8]) -> bool {
        assert!((physical & 0xfff) as usize + bytes.len() <= PAGE);
        let Some(to) = self.at(physical) else {
            return false;
        };
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: the range lies in a live page.
            unsafe { to.wrapping_add(i).write_volatile(*byte) };
        }
        true
    }

    /// The aligned 8 bytes at a physical address, as the page walker sees them.
    pub(crate) fn atomic(&self, physical: u64) -> Option<&AtomicU64> {
        assert_eq!(physical & 7, 0);
        let at = self.at(physical)?;
        // SAFETY: aligned, live for as long as `self`, and others that write
        // it at the same time do so in single stores, as processors need.
        Some(unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// The aligned 8 bytes at a physical address.
    pub(crate) fn load(&self, physical: u64) -> Option<u64> {
        Some(self.atomic(physical)?.load(Ordering::Acquire))
    }

    /// The 4 bytes at the start of a page, as VMXON and VMPTRLD read them.
    pub(crate) fn revision(&self, region: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        self.read(region, &mut bytes)
            .then(|| u32::from_le_bytes(bytes))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for block in self.blocks.values() {
            // SAFETY: allocated in `allocate` with this layout, freed once.
            unsafe { dealloc(block.memory, block.layout) };
        }
    }
}
