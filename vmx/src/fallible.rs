//! Allocation that can fail, and says so.
//!
//! Nothing in a module may end the kernel because memory is short: these
//! replace `Box::new`, `Vec::push` and `Arc::new`.
// UNSAFETY: talks to the allocator and counts references by hand.
#![expect(unsafe_code)]

use alloc::alloc::{Layout, alloc};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering, fence};

/// The host has no memory for this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory;

/// Moves a value to the heap.
///
/// # Errors
/// [`NoMemory`]; the value is dropped.
pub fn try_box<T>(value: T) -> Result<Box<T>, NoMemory> {
    let layout = Layout::new::<T>();
    if layout.size() == 0 {
        let dangling = NonNull::<T>::dangling().as_ptr();
        // SAFETY: a box of a zero-sized type owns no allocation.
        return Ok(unsafe { Box::from_raw(dangling) });
    }
    // SAFETY: the layout is not of size zero.
    let raw = unsafe { alloc(layout) }.cast::<T>();
    if raw.is_null() {
        return Err(NoMemory);
    }
    // SAFETY: `raw` is fresh memory of the layout of T.
    unsafe { raw.write(value) };
    // SAFETY: `raw` came from the global allocator with T's layout and holds a T.
    Ok(unsafe { Box::from_raw(raw) })
}

/// Pushing that reports a lack of memory.
pub trait TryPush<T> {
    /// Appends `value`.
    ///
    /// # Errors
    /// [`NoMemory`]; the vector is unchanged and the value is dropped.
    fn try_push(&mut self, value: T) -> Result<(), NoMemory>;
}

impl<T> TryPush<T> for Vec<T> {
    fn try_push(&mut self, value: T) -> Result<(), NoMemory> {
        if self.len() == self.capacity() {
            self.try_reserve(1).map_err(|_| NoMemory)?;
        }
        let length = self.len();
        let Some(slot) = self.spare_capacity_mut().first_mut() else {
            return Err(NoMemory);
        };
        slot.write(value);
        // SAFETY: the element at `length` was just written, within capacity.
        unsafe { self.set_len(length.saturating_add(1)) };
        Ok(())
    }
}

/// A vector of `count` copies of `value`.
///
/// # Errors
/// [`NoMemory`].
pub fn try_filled<T: Copy>(value: T, count: usize) -> Result<Vec<T>, NoMemory> {
    let mut vector = Vec::new();
    vector.try_reserve_exact(count).map_err(|_| NoMemory)?;
    for _ in 0..count {
        vector.try_push(value)?;
    }
    Ok(vector)
}

struct Counted<T> {
    count: AtomicUsize,
    value: T,
}

/// A shared, counted value: `Arc` whose creation can fail.
pub struct Shared<T>(NonNull<Counted<T>>);

// SAFETY: as for Arc: shared access needs Sync, the last drop needs Send.
unsafe impl<T: Send + Sync> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// A new value with one reference.
    ///
    /// # Errors
    /// [`NoMemory`]; the value is dropped.
    pub fn new(value: T) -> Result<Self, NoMemory> {
        let counted = try_box(Counted {
            count: AtomicUsize::new(1),
            value,
        })?;
        Ok(Self(NonNull::from(Box::leak(counted))))
    }

    /// Whether two references share one value.
    #[must_use]
    pub fn same(a: &Self, b: &Self) -> bool {
        a.0 == b.0
    }

    /// Gives the reference away as a raw pointer, for a host object to keep.
    #[must_use]
    pub fn into_raw(self) -> *const () {
        let raw = self.0.as_ptr();
        core::mem::forget(self);
        raw.cast_const().cast()
    }

    /// Takes back a reference given away by [`Shared::into_raw`].
    ///
    /// # Safety
    /// `raw` came from `into_raw` of the same type, and is taken back once.
    pub unsafe fn from_raw(raw: *const ()) -> Self {
        // SAFETY: `into_raw` never returns null.
        Self(unsafe { NonNull::new_unchecked(raw.cast_mut().cast()) })
    }

    /// A further reference to a value whose reference a host object keeps.
    ///
    /// # Safety
    /// `raw` came from `into_raw` of the same type and has not been taken back.
    pub unsafe fn clone_from_raw(raw: *const ()) -> Self {
        // SAFETY: the caller's contract; forgotten below, so the kept reference stays.
        let kept = unsafe { Self::from_raw(raw) };
        let further = kept.clone();
        core::mem::forget(kept);
        further
    }

    fn counted(&self) -> &Counted<T> {
        // SAFETY: this reference keeps the allocation alive.
        unsafe { self.0.as_ref() }
    }
}

/// Counts a reference. A count that would wrap is held at the top: the value
/// then leaks, which is safe, instead of being freed early.
#[inline(never)]
fn one_more(count: &AtomicUsize) {
    let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
        (n < usize::MAX).then(|| n.saturating_add(1))
    });
}

/// Counts a reference less; whether it was the last.
#[inline(never)]
fn one_less(count: &AtomicUsize) -> bool {
    let before = count.fetch_update(Ordering::Release, Ordering::Relaxed, |n| {
        (n < usize::MAX).then(|| n.saturating_sub(1))
    });
    if before != Ok(1) {
        return false;
    }
    fence(Ordering::Acquire);
    true
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        one_more(&self.counted().count);
        Self(self.0)
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.counted().value
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        if one_less(&self.counted().count) {
            // SAFETY: the count reached zero, so this was the last reference,
            // and the allocation came from `try_box`.
            drop(unsafe { Box::from_raw(self.0.as_ptr()) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    struct CountsDrops<'a>(&'a Cell<u32>);
    impl Drop for CountsDrops<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }

    #[test]
    fn shared_is_dropped_once_with_its_last_reference() {
        let drops = Cell::new(0);
        let a = Shared::new(CountsDrops(&drops)).unwrap();
        let raw = a.clone().into_raw();
        // SAFETY: `raw` came from `into_raw` just above.
        let b = unsafe { Shared::<CountsDrops<'_>>::clone_from_raw(raw) };
        assert!(Shared::same(&a, &b));
        drop((a, b));
        assert_eq!(drops.get(), 0);
        // SAFETY: as above, taken back once.
        drop(unsafe { Shared::<CountsDrops<'_>>::from_raw(raw) });
        assert_eq!(drops.get(), 1);
    }

    #[test]
    fn push_grows_and_keeps_order() {
        let mut v = Vec::new();
        for i in 0..100 {
            v.try_push(i).unwrap();
        }
        assert!(v.iter().copied().eq(0..100));
        assert_eq!(try_filled(7u8, 3).unwrap(), [7, 7, 7]);
    }
}
