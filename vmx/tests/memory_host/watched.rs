//! An allocator that fails on demand and locks that check their order, so that
//! both can tell when something is allocated under a spin lock.
// UNSAFETY: implements a global allocator and the lock seam.
#![allow(unsafe_code, reason = "not every test file uses every part")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use haxm_vmx::fallible::NoMemory;
use haxm_vmx::sync::{LockClass, RawLock};

thread_local! {
    /// Lock classes this thread holds, innermost last.
    static HELD: RefCell<Vec<LockClass>> = const { RefCell::new(Vec::new()) };
    /// Spin locks this thread holds.
    static SPINNING: Cell<u32> = const { Cell::new(0) };
    /// Allocations left until one fails, while the core runs.
    static FAIL_IN: Cell<Option<u32>> = const { Cell::new(None) };
    /// What this thread does is the test's own.
    static UNWATCHED: Cell<bool> = const { Cell::new(false) };
    /// An allocation was failed.
    static FAILED: Cell<bool> = const { Cell::new(false) };
    /// What happens after this thread has given back so many spin locks more.
    static AFTER_SPINS: RefCell<Option<Later>> = const { RefCell::new(None) };
}

/// What happens when the number has been counted down.
type Later = (u32, Box<dyn FnOnce()>);

/// Once this thread has given back `spins` spin locks more, `call` happens, as if another
/// thread had come between.
#[allow(dead_code, reason = "not every test file uses every part")]
pub(crate) fn after_spins(spins: u32, call: impl FnOnce() + 'static) {
    AFTER_SPINS.set(Some((spins, Box::new(call))));
}

fn spin_given_back() {
    let due = AFTER_SPINS.with_borrow_mut(|waiting| {
        let (left, _) = waiting.as_mut()?;
        *left -= 1;
        if *left == 0 { waiting.take() } else { None }
    });
    if let Some((_, call)) = due {
        call();
    }
}

/// Allocations and frees under a spin lock: there must be none.
pub(crate) static UNDER_SPIN: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, failing on demand and watching for spin locks.
pub(crate) struct Allocator;

/// Whether the next allocation is to fail.
pub(super) fn fails() -> bool {
    match FAIL_IN.get() {
        Some(0) => {
            FAIL_IN.set(None);
            FAILED.set(true);
            true
        }
        Some(left) => {
            FAIL_IN.set(Some(left - 1));
            false
        }
        None => false,
    }
}

/// A look at the core by the test, which may allocate at any time.
#[allow(dead_code, reason = "not every test file uses every part")]
pub(crate) fn unwatched(look: impl FnOnce()) {
    UNWATCHED.set(true);
    look();
    UNWATCHED.set(false);
}

fn note_spinning() {
    if SPINNING.get() > 0 && !UNWATCHED.get() {
        UNDER_SPIN.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note_spinning();
        if fails() {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note_spinning();
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Runs `call` with the allocation numbered `fail_in` failing; tells whether it
/// came to that.
pub(crate) fn with_failure<T>(fail_in: Option<u32>, call: impl FnOnce() -> T) -> (T, bool) {
    FAILED.set(false);
    FAIL_IN.set(fail_in);
    let result = call();
    FAIL_IN.set(None);
    (result, FAILED.get())
}

/// Runs `call`, a part of the fake host, with allocations working.
pub(super) fn undisturbed<T>(call: impl FnOnce() -> T) -> T {
    assert_eq!(SPINNING.get(), 0, "the host was called under a spin lock");
    let fail_in = FAIL_IN.take();
    let result = call();
    FAIL_IN.set(fail_in);
    result
}

/// A lock that checks the order of classes. `SPINS`: it is a spin lock.
pub(crate) struct FakeLock<const SPINS: bool> {
    taken: AtomicBool,
    class: LockClass,
}

// SAFETY: the flag admits one thread at a time, acquiring and releasing.
unsafe impl<const SPINS: bool> RawLock for FakeLock<SPINS> {
    fn new(class: LockClass) -> Result<Self, NoMemory> {
        if fails() {
            return Err(NoMemory);
        }
        Ok(Self {
            taken: AtomicBool::new(false),
            class,
        })
    }

    fn lock(&self) {
        let fail_in = FAIL_IN.take();
        HELD.with_borrow_mut(|held| {
            if let Some(last) = held.last() {
                assert!(*last < self.class, "{:?} under {last:?}", self.class);
            }
            held.push(self.class);
        });
        FAIL_IN.set(fail_in);
        while self.taken.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
        SPINNING.set(SPINNING.get() + u32::from(SPINS));
    }

    unsafe fn unlock(&self) {
        SPINNING.set(SPINNING.get() - u32::from(SPINS));
        self.taken.store(false, Ordering::Release);
        HELD.with_borrow_mut(|held| assert_eq!(held.pop(), Some(self.class)));
        if SPINS {
            spin_given_back();
        }
    }
}
