//! The kernel's locks, made by the C half with one lockdep class for each lock class of the core.
// UNSAFETY: hands the C half the pointers it gave.
#![expect(unsafe_code)]

use core::ffi::{CStr, c_void};
use core::ptr::NonNull;

use vmx::fallible::NoMemory;
use vmx::sync::{LockClass, RawLock};

use crate::ffi;

/// What lockdep calls a class.
const fn name(class: LockClass) -> &'static CStr {
    match class {
        LockClass::Devices => c"haxm: devices",
        LockClass::Hypervisor => c"haxm: hypervisor",
        LockClass::Vcpu => c"haxm: vcpu",
        LockClass::Vm => c"haxm: vm",
        LockClass::MemoryMap => c"haxm: memory map",
        LockClass::GuestCopy => c"haxm: guest copy",
        LockClass::Ept => c"haxm: ept",
    }
}

/// `HAXM_LOCK_CLASSES` of `haxm.h`.
const CLASSES: u32 = 16;
// The last class has a place there, so all have.
const _: () = assert!((LockClass::Ept as u32) < CLASSES);

macro_rules! lock {
    ($(#[$doc:meta])* $name:ident, $new:ident, $take:ident, $give:ident) => {
        $(#[$doc])*
        pub(crate) struct $name(NonNull<c_void>);

        // SAFETY: the kernel's lock may be used by any thread.
        unsafe impl Send for $name {}
        // SAFETY: as above; that is what it is for.
        unsafe impl Sync for $name {}

        // SAFETY: the kernel's lock excludes, with acquire and release ordering.
        unsafe impl RawLock for $name {
            fn new(class: LockClass) -> Result<Self, NoMemory> {
                // SAFETY: the name is a static C string.
                let lock = unsafe { ffi::$new(class as u32, name(class).as_ptr()) };
                NonNull::new(lock).map(Self).ok_or(NoMemory)
            }

            fn lock(&self) {
                // SAFETY: the lock was made by the C half and lives as long as self.
                unsafe { ffi::$take(self.0.as_ptr()) };
            }

            unsafe fn unlock(&self) {
                // SAFETY: as above; the caller holds it.
                unsafe { ffi::$give(self.0.as_ptr()) };
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: made by the C half's allocator; nobody holds or awaits a
                // lock that is being dropped.
                unsafe { ffi::haxm_os_free(self.0.as_ptr()) };
            }
        }
    };
}

lock! {
    /// A `struct mutex`.
    Mutex, haxm_os_mutex_new, haxm_os_mutex_lock, haxm_os_mutex_unlock
}
lock! {
    /// A `raw_spinlock_t`: preemption is off while it is held.
    Spin, haxm_os_spin_new, haxm_os_spin_lock, haxm_os_spin_unlock
}
