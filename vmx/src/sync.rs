//! Locks, built from what the host lends.
//!
//! A host lock is made at a fixed place and may fail to be made; the guard
//! types here carry the discipline. Order, outermost first: see
//! [`LockClass`].
// UNSAFETY: a lock hands out exclusive references to what it protects.
#![expect(unsafe_code)]

use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

use crate::fallible::NoMemory;

/// What a lock protects. Each class is its own lockdep class, and the order
/// here is the locking order: a thread that holds a lock may only take one of
/// a later class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LockClass {
    /// The device layer's table of VMs, vCPUs and their handles (sleeping).
    Devices,
    /// The table of VMs and the use count of VMX operation (sleeping).
    Hypervisor,
    /// A vCPU, held for a whole RUN (sleeping).
    Vcpu,
    /// A VM's CPUID table, which a vCPU copies (sleeping).
    Vm,
    /// Writers of a VM's memory map (sleeping).
    MemoryMap,
    /// A copy to or from guest memory in flight, one of several per VM
    /// (sleeping).
    GuestCopy,
    /// A VM's memory map and EPT as the exit path sees them (spinning).
    Ept,
}

/// A lock as the host makes it.
///
/// # Safety
/// Between a return from `lock` and the matching `unlock` no other thread
/// returns from `lock` of the same lock, with acquire and release ordering.
pub unsafe trait RawLock: Send + Sync + Sized {
    /// Makes an unlocked lock.
    ///
    /// # Errors
    /// [`NoMemory`] if the host cannot.
    fn new(class: LockClass) -> Result<Self, NoMemory>;
    /// Takes the lock, waiting for it.
    fn lock(&self);
    /// Gives the lock back.
    ///
    /// # Safety
    /// This thread holds the lock.
    unsafe fn unlock(&self);
}

/// A value behind a host lock.
pub struct Lock<R: RawLock, T> {
    raw: R,
    value: UnsafeCell<T>,
}

// SAFETY: the raw lock gives one thread at a time access to the value.
unsafe impl<R: RawLock, T: Send> Sync for Lock<R, T> {}
// SAFETY: both parts may move between threads.
unsafe impl<R: RawLock, T: Send> Send for Lock<R, T> {}

impl<R: RawLock, T> Lock<R, T> {
    /// Puts `value` behind a new lock.
    ///
    /// # Errors
    /// [`NoMemory`] if the host cannot make a lock.
    pub fn new(class: LockClass, value: T) -> Result<Self, NoMemory> {
        Ok(Self {
            raw: R::new(class)?,
            value: UnsafeCell::new(value),
        })
    }

    /// Waits for the lock and takes it.
    pub fn lock(&self) -> Guard<'_, R, T> {
        self.raw.lock();
        Guard {
            lock: self,
            not_send: PhantomData,
        }
    }

    /// The value, when nobody else can hold the lock.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

/// Holds a lock until dropped. Stays on its thread.
pub struct Guard<'a, R: RawLock, T> {
    lock: &'a Lock<R, T>,
    not_send: PhantomData<*const ()>,
}

impl<R: RawLock, T> Deref for Guard<'_, R, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard holds the lock, so nobody else has a reference.
        unsafe { &*self.lock.value.get() }
    }
}

impl<R: RawLock, T> DerefMut for Guard<'_, R, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard holds the lock, so nobody else has a reference.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<R: RawLock, T> Drop for Guard<'_, R, T> {
    fn drop(&mut self) {
        // SAFETY: the guard was made by `lock` on this thread and is not Send.
        unsafe { self.lock.raw.unlock() };
    }
}
