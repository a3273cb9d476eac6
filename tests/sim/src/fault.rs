//! Running out of memory on purpose.
//!
//! Each thread has a countdown. Allocations that the code under test makes
//! (host pages, locks, user-space handles and, with [`FaultyAllocator`]
//! installed, the heap) count it down; the one that meets zero fails. The
//! simulator's own allocations do not count.
// UNSAFETY: implements a global allocator.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static COUNTDOWN: Cell<Option<u64>> = const { Cell::new(None) };
    static INSIDE: Cell<u32> = const { Cell::new(0) };
    static SEEN: Cell<u64> = const { Cell::new(0) };
    static FIRED: Cell<bool> = const { Cell::new(false) };
}

/// Marks that the simulator itself runs, not the code under test.
pub(crate) struct Inside(());

/// Enters the simulator's own code.
pub(crate) fn inside() -> Inside {
    INSIDE.set(INSIDE.get() + 1);
    Inside(())
}

/// Leaves the simulator for a call back into the code under test.
pub(crate) struct Outside(u32);

/// Enters code under test from within the simulator.
pub(crate) fn outside() -> Outside {
    Outside(INSIDE.replace(0))
}

impl Drop for Outside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(INSIDE.get() - 1);
    }
}

/// One allocation by the code under test: true if it is to fail.
pub(crate) fn strikes() -> bool {
    if INSIDE.get() > 0 {
        return false;
    }
    strikes_now()
}

/// As [`strikes`], for a service the simulator performs.
pub(crate) fn strikes_now() -> bool {
    SEEN.set(SEEN.get() + 1);
    match COUNTDOWN.get() {
        Some(0) => {
            COUNTDOWN.set(None);
            FIRED.set(true);
            true
        }
        Some(left) => {
            COUNTDOWN.set(Some(left - 1));
            false
        }
        None => false,
    }
}

/// Runs `call` with this thread's allocation number `nth` (from 0) failing,
/// that one only. Returns what it returned and whether that allocation happened.
pub fn failing<T>(nth: u64, call: impl FnOnce() -> T) -> (T, bool) {
    COUNTDOWN.set(Some(nth));
    FIRED.set(false);
    let value = call();
    COUNTDOWN.set(None);
    (value, FIRED.replace(false))
}

/// Allocations of this thread that `call` makes.
pub fn counting<T>(call: impl FnOnce() -> T) -> (T, u64) {
    let before = SEEN.get();
    let value = call();
    (value, SEEN.get() - before)
}

/// A global allocator that takes part in [`failing`]. A test program installs
/// it: `#[global_allocator] static HEAP: FaultyAllocator = FaultyAllocator;`
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultyAllocator;

// SAFETY: passes everything to the system's allocator, or returns null.
unsafe impl GlobalAlloc for FaultyAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if strikes() {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract; all memory is the system's.
        unsafe { System.dealloc(pointer, layout) };
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if strikes() {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract; all memory is the system's.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
