//! Processes: sparse address spaces whose owner changes them at will, telling
//! listeners before and after, as an operating system does.
// UNSAFETY: implements the user-space seam; calls listeners by raw pointer.
#![expect(unsafe_code)]

mod pages;

use std::collections::BTreeMap;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};

use vmx::arch::addr::Hva;
use vmx::host::{Aging, Invalidate, UserFault};

use crate::cores::thread;
use crate::fault;
use crate::machine::Machine;
use crate::memory::Owner;
use crate::state::Inner;

pub(crate) const PAGE: u64 = 4096;

/// A range that the process has asked for.
#[derive(Clone, Copy, Debug)]
struct Area {
    end: u64,
    writable: bool,
    /// log2 of the page size wanted.
    shift: u32,
}

/// A mapped page.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    frame: u64,
    /// Mapped for writing now (an area may allow more).
    writable: bool,
    /// log2 of its size.
    shift: u32,
}

#[derive(Default)]
pub(crate) struct Table {
    areas: BTreeMap<u64, Area>,
    pages: BTreeMap<u64, Mapped>,
    next: u64,
    /// Fault-ins left until one fails with `Interrupted`.
    pub(crate) interrupt_in: Option<u64>,
}

pub(crate) struct Listener {
    pub(crate) id: u64,
    pub(crate) target: NonNull<dyn Invalidate>,
}

// SAFETY: `watch`'s contract keeps the target valid until `unwatch`, on any thread.
unsafe impl Send for Listener {}
// SAFETY: the target is Sync.
unsafe impl Sync for Listener {}

pub(crate) struct Space {
    id: u64,
    machine: Weak<Inner>,
    table: Mutex<Table>,
    pub(crate) listeners: RwLock<Vec<Listener>>,
}

/// A process. A handle: clones are the same process.
#[derive(Clone)]
pub struct Process(pub(crate) Arc<Space>);

impl Area {
    fn allows(self, write: bool) -> bool {
        !write || self.writable
    }
}

impl Table {
    fn area(&self, address: u64) -> Option<(u64, Area)> {
        let (start, area) = self.areas.range(..=address).next_back()?;
        (address < area.end).then_some((*start, *area))
    }

    fn page(&self, address: u64) -> Option<(u64, Mapped)> {
        let (start, mapped) = self.pages.range(..=address).next_back()?;
        (address - start < 1 << mapped.shift).then_some((*start, *mapped))
    }
}

impl Process {
    /// A new process on a machine, with nothing mapped.
    #[must_use]
    pub fn new(machine: &Machine) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(Arc::new(Space {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            machine: Arc::downgrade(&machine.0),
            table: Mutex::new(Table {
                next: 0x7f00_0000_0000,
                ..Table::default()
            }),
            listeners: RwLock::new(Vec::new()),
        }))
    }

    pub(crate) fn machine(&self) -> Arc<Inner> {
        self.0
            .machine
            .upgrade()
            .expect("the machine outlives its processes")
    }

    pub(crate) fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `call` with the calling thread in this process.
    pub fn enter<T>(&self, call: impl FnOnce() -> T) -> T {
        struct Back(Option<Process>);
        impl Drop for Back {
            fn drop(&mut self) {
                let before = self.0.take();
                thread(|t| *t.process.borrow_mut() = before);
            }
        }
        let _back = Back(thread(|t| t.process.borrow_mut().replace(self.clone())));
        call()
    }

    /// Maps `size` bytes of zeros, writable, in 4 KB pages.
    #[must_use]
    pub fn map(&self, size: u64) -> Hva {
        self.map_with(size, 12)
    }

    /// Maps `size` bytes of zeros, writable, in pages of 1 << `shift` bytes
    /// (12, 21 or 30); the address is aligned to that.
    #[must_use]
    pub fn map_with(&self, size: u64, shift: u32) -> Hva {
        let _inside = fault::inside();
        let mut table = self.table();
        let start = table.next.next_multiple_of(1 << shift);
        let end = start + size.next_multiple_of(PAGE);
        table.next = end + PAGE;
        table.areas.insert(
            start,
            Area {
                end,
                writable: true,
                shift,
            },
        );
        Hva(start)
    }

    /// Unmaps a range.
    pub fn unmap(&self, start: Hva, size: u64) {
        self.changing(start.0..start.0 + size, |this, range| {
            this.cut_areas(range.clone());
            this.drop_pages(range);
        });
    }

    /// Gives the pages of a range back; they read as zeros afterwards.
    pub fn discard(&self, start: Hva, size: u64) {
        self.changing(start.0..start.0 + size, Self::drop_pages);
    }

    /// Changes whether a range may be written.
    pub fn protect(&self, start: Hva, size: u64, writable: bool) {
        self.changing(start.0..start.0 + size, |this, range| {
            let parts = this.cut_areas(range.clone());
            let mut table = this.table();
            for (at, area) in parts {
                table.areas.insert(at, Area { writable, ..area });
            }
            for (at, mapped) in table.pages.range_mut(range) {
                let _ = at;
                mapped.writable &= writable;
            }
        });
    }

    /// Moves the pages of a range to other frames, contents kept.
    pub fn migrate(&self, start: Hva, size: u64) {
        self.changing(start.0..start.0 + size, |this, range| {
            this.move_pages(range, false);
        });
    }

    /// Moves a 2 MB aligned range into one 2 MB page, contents kept.
    pub fn collapse(&self, start: Hva) {
        assert!(start.is_aligned(1 << 21));
        self.changing(start.0..start.0 + (1 << 21), |this, range| {
            this.move_pages(range, true);
        });
    }

    /// Announces a change of a range without the end of it; [`Self::end`] ends it.
    pub fn begin(&self, start: Hva, size: u64) {
        self.report(&(start.0..start.0 + size), true);
    }

    /// The end that [`Self::begin`] left out.
    pub fn end(&self, start: Hva, size: u64) {
        self.report(&(start.0..start.0 + size), false);
    }

    /// Makes the `nth` next fault-in (from 0) fail with `Interrupted`.
    pub fn interrupt_fault_in(&self, nth: u64) {
        self.table().interrupt_in = Some(nth);
    }

    /// The frame behind an address, if one is mapped.
    #[must_use]
    pub fn frame_of(&self, address: Hva) -> Option<u64> {
        let (start, mapped) = self.table().page(address.0)?;
        Some(mapped.frame + ((address.0 - start) >> 12))
    }

    /// Reads the process's memory, as the process does.
    ///
    /// # Panics
    /// If it is not mapped.
    pub fn peek(&self, address: Hva, bytes: &mut [u8]) {
        let _inside = fault::inside();
        self.copy(address, bytes.len(), false, |inner, at, done, len| {
            assert!(inner.state().memory.read(at, &mut bytes[done..done + len]));
        })
        .expect("mapped");
    }

    /// Writes the process's memory, as the process does.
    ///
    /// # Panics
    /// If it is not mapped writable.
    pub fn poke(&self, address: Hva, bytes: &[u8]) {
        let _inside = fault::inside();
        self.copy(address, bytes.len(), true, |inner, at, done, len| {
            assert!(inner.state().memory.write(at, &bytes[done..done + len]));
        })
        .expect("mapped writable");
    }

    /// Asks whether a guest has used a page of a range, as page reclaim does.
    #[must_use]
    pub fn age(&self, start: Hva, size: u64, aging: Aging) -> bool {
        let _inside = fault::inside();
        let mut young = false;
        self.each_listener(|target| {
            young |= target.young(start, Hva(start.0 + size), aging);
        });
        young
    }

    fn report(&self, range: &Range<u64>, begin: bool) {
        let (start, end) = (Hva(range.start), Hva(range.end));
        self.each_listener(|target| {
            if begin {
                target.begin(start, end);
            } else {
                target.end(start, end);
            }
        });
    }

    fn each_listener(&self, mut call: impl FnMut(&dyn Invalidate)) {
        let listeners = self
            .0
            .listeners
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        for listener in listeners.iter() {
            let _outside = fault::outside();
            // SAFETY: `watch`'s contract: valid until `unwatch`, which waits for us.
            let target = unsafe { listener.target.as_ref() };
            // Reports come with preemption masked at worst: no sleeping.
            thread(|t| t.preempt.set(t.preempt.get() + 1));
            call(target);
            thread(|t| t.preempt.set(t.preempt.get() - 1));
            crate::cores::Cores::release(&self.machine());
        }
    }

    /// Announces, changes, and ends, as an MMU notifier does.
    fn changing(&self, range: Range<u64>, change: impl FnOnce(&Self, Range<u64>)) {
        let _inside = fault::inside();
        let range = range.start & !(PAGE - 1)..range.end.next_multiple_of(PAGE);
        self.report(&range, true);
        change(self, range.clone());
        self.report(&range, false);
    }

    /// Removes a range from the areas and returns the parts removed.
    fn cut_areas(&self, range: Range<u64>) -> Vec<(u64, Area)> {
        let mut table = self.table();
        let hit: Vec<(u64, Area)> = table
            .areas
            .iter()
            .filter(|(start, area)| **start < range.end && area.end > range.start)
            .map(|(start, area)| (*start, *area))
            .collect();
        let mut cut = Vec::new();
        for (start, area) in hit {
            table.areas.remove(&start);
            if start < range.start {
                table.areas.insert(
                    start,
                    Area {
                        end: range.start,
                        ..area
                    },
                );
            }
            if area.end > range.end {
                table.areas.insert(range.end, area);
            }
            let end = area.end.min(range.end);
            cut.push((start.max(range.start), Area { end, ..area }));
        }
        cut
    }

    /// Turns a large page that straddles the range's edge into small ones.
    fn split_edges(table: &mut Table, range: &Range<u64>) {
        for edge in [range.start, range.end] {
            let Some((start, mapped)) = table.page(edge) else {
                continue;
            };
            if mapped.shift == 12 || start == edge {
                continue;
            }
            table.pages.remove(&start);
            for n in 0..(1u64 << (mapped.shift - 12)) {
                table.pages.insert(
                    start + n * PAGE,
                    Mapped {
                        frame: mapped.frame + n,
                        writable: mapped.writable,
                        shift: 12,
                    },
                );
            }
        }
    }

    /// The pages of a range, taken out of the table.
    fn take_pages(&self, range: Range<u64>) -> Vec<(u64, Mapped)> {
        let mut table = self.table();
        Self::split_edges(&mut table, &range);
        let taken: Vec<(u64, Mapped)> = table
            .pages
            .range(range)
            .map(|(at, mapped)| (*at, *mapped))
            .collect();
        for (at, _) in &taken {
            table.pages.remove(at);
        }
        taken
    }

    fn drop_pages(&self, range: Range<u64>) {
        for (_, mapped) in self.take_pages(range) {
            self.release(mapped);
        }
    }

    /// Gives frames back to the machine, which looks for whoever still uses them.
    fn release(&self, mapped: Mapped) {
        let inner = self.machine();
        if mapped.frame == inner.zero_frame {
            return;
        }
        let mut state = inner.state();
        let frames = mapped.frame..mapped.frame + (1 << (mapped.shift - 12));
        if frames
            .clone()
            .all(|frame| !state.pinned.contains_key(&frame))
        {
            state.check_frames_unused(&inner.profile, frames.clone());
        }
        for frame in frames {
            if let Some(pin) = state.pinned.get_mut(&frame) {
                pin.orphan = true;
            } else if state.memory.owner(frame) == Some(Owner::User) {
                state.memory.release(frame);
            }
        }
    }

    fn move_pages(&self, range: Range<u64>, into_one: bool) {
        let taken = self.take_pages(range.clone());
        let inner = self.machine();
        let whole = into_one.then(|| inner.state().memory.allocate(512, Owner::User));
        for (at, mapped) in &taken {
            let pages = 1u64 << (mapped.shift - 12);
            let target = match whole {
                Some(frame) => frame + ((at - range.start) >> 12),
                None => inner.state().memory.allocate(pages, Owner::User),
            };
            let mut bytes = [0; 4096];
            for n in 0..pages {
                let state = inner.state();
                state.memory.read((mapped.frame + n) << 12, &mut bytes);
                state.memory.write((target + n) << 12, &bytes);
            }
            if whole.is_none() {
                self.table().pages.insert(
                    *at,
                    Mapped {
                        frame: target,
                        ..*mapped
                    },
                );
            }
        }
        if let Some(frame) = whole {
            let mapped = Mapped {
                frame,
                writable: true,
                shift: 21,
            };
            self.table().pages.insert(range.start, mapped);
        }
        for (_, mapped) in taken {
            self.release(mapped);
        }
    }

    pub(crate) fn copy(
        &self,
        address: Hva,
        length: usize,
        write: bool,
        mut piece: impl FnMut(&Inner, u64, usize, usize),
    ) -> Result<(), UserFault> {
        let inner = self.machine();
        let mut done = 0;
        while done < length {
            let at = address
                .0
                .checked_add(done as u64)
                .ok_or(UserFault::BadAddress)?;
            let frame = self.resolve(at, write)?;
            let offset = at & (PAGE - 1);
            let piece_len = (length - done).min(usize::try_from(PAGE - offset).unwrap_or(0));
            piece(&inner, frame.frame.0 << 12 | offset, done, piece_len);
            done += piece_len;
        }
        Ok(())
    }

    /// Maps a page of the kernel's at an address of its own choice.
    pub(crate) fn map_frame(&self, frame: u64) -> Hva {
        let at = self.map(PAGE);
        let mapped = Mapped {
            frame,
            writable: true,
            shift: 12,
        };
        self.table().pages.insert(at.0, mapped);
        at
    }

    /// Takes a page mapped by [`Self::map_frame`] out again.
    pub(crate) fn unmap_frame(&self, at: Hva) {
        let mut table = self.table();
        table.areas.remove(&at.0);
        table.pages.remove(&at.0);
    }

    pub(crate) fn is_current(&self) -> bool {
        thread(|t| t.process.borrow().as_ref().map(|p| p.0.id))
            .unwrap_or_else(|| Machine(self.machine()).process().0.id)
            == self.0.id
    }
}
