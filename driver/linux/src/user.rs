//! A process's address space.
// UNSAFETY: hands the C half the pointers it gave, and addresses of locals.
#![expect(unsafe_code)]

use alloc::boxed::Box;
use core::ffi::{c_int, c_void};
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicPtr, Ordering};

use vmx::arch::addr::{Hva, Pfn};
use vmx::fallible::{NoMemory, try_box};
use vmx::host::{HostFrame, Invalidate, Lending, PinnedPages, PresentPage, UserFault, UserSpace};

use crate::ffi;

/// What the C half keeps for a watched process: one thin pointer to the wide one.
type Listener = NonNull<dyn Invalidate>;

/// An address space, held until dropped.
pub(crate) struct Process {
    handle: NonNull<c_void>,
    /// Null unless watched. Owned.
    listener: AtomicPtr<Listener>,
}

// SAFETY: the handle may be used by any thread.
unsafe impl Send for Process {}
// SAFETY: as above.
unsafe impl Sync for Process {}

impl Process {
    /// That of the calling thread.
    ///
    /// # Errors
    /// No memory, or the thread has none.
    pub(crate) fn current() -> Result<Self, NoMemory> {
        let handle = NonNull::new(ffi::haxm_os_user_get()).ok_or(NoMemory)?;
        Ok(Self {
            handle,
            listener: AtomicPtr::new(null_mut()),
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.unwatch();
        // SAFETY: the handle is ours and not used after this.
        unsafe { ffi::haxm_os_user_put(self.handle.as_ptr()) };
    }
}

// errno values of the generic Linux ABI.
const ENOMEM: c_int = 12;
const EINTR: c_int = 4;
const ERESTARTSYS: c_int = 512;

/// Pages held in place.
pub(crate) struct Pins(NonNull<c_void>);

// SAFETY: the handle may be used by any thread.
unsafe impl Send for Pins {}
// SAFETY: as above; it does not change.
unsafe impl Sync for Pins {}

// SAFETY: the kernel holds the pages until the drop.
unsafe impl PinnedPages for Pins {
    fn page(&self, index: usize) -> PresentPage {
        // SAFETY: the handle lives as long as self; the C half checks the index.
        PresentPage::from_bits(unsafe { ffi::haxm_os_user_pinned(self.0.as_ptr(), index) })
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used after this.
        unsafe { ffi::haxm_os_user_unpin(self.0.as_ptr()) };
    }
}

/// The C half's result: 0, or a negative errno.
pub(crate) fn outcome(result: c_int) -> Result<(), UserFault> {
    match result.saturating_neg() {
        0 => Ok(()),
        ENOMEM => Err(UserFault::NoMemory),
        EINTR | ERESTARTSYS => Err(UserFault::Interrupted),
        _ => Err(UserFault::BadAddress),
    }
}

/// Copies from the calling process.
#[cfg_attr(haxm_module, optimize(speed))]
pub(crate) fn copy_in(address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
    // SAFETY: the C half writes at most `len` bytes, and takes any user address.
    outcome(unsafe { ffi::haxm_os_copy_in(address, bytes.as_mut_ptr(), bytes.len()) })
}

/// Copies to the calling process.
pub(crate) fn copy_out(address: u64, bytes: &[u8]) -> Result<(), UserFault> {
    // SAFETY: the C half reads `len` bytes, and takes any user address.
    outcome(unsafe { ffi::haxm_os_copy_out(address, bytes.as_ptr(), bytes.len()) })
}

// SAFETY: the kernel's MMU notifier precedes each change of what `fault_in` and `present` reported, and the C half
// forwards each pair of its calls; the end of the process is a report about everything.
unsafe impl UserSpace for Process {
    type Pins = Pins;

    fn lending(&self) -> Lending {
        if ffi::haxm_os_user_pins() == 0 {
            Lending::Borrowed
        } else {
            Lending::Pinned
        }
    }

    fn pin(&self, start: Hva, pages: usize) -> Result<Pins, UserFault> {
        let mut pins = null_mut();
        // SAFETY: the handle lives as long as self; the C half checks the range; the result is our
        // local.
        outcome(unsafe {
            ffi::haxm_os_user_pin(self.handle.as_ptr(), start.0, pages, &raw mut pins)
        })?;
        NonNull::new(pins).map(Pins).ok_or(UserFault::BadAddress)
    }

    fn is_current(&self) -> bool {
        // SAFETY: the handle lives as long as self.
        unsafe { ffi::haxm_os_user_is_current(self.handle.as_ptr()) != 0 }
    }

    fn has_ended(&self) -> bool {
        // SAFETY: as above.
        unsafe { ffi::haxm_os_user_has_ended(self.handle.as_ptr()) != 0 }
    }

    fn fault_in(&self, address: Hva, write: bool, ahead: u32) -> Result<HostFrame, UserFault> {
        let (mut frame, mut writable, mut shift) = (0, 0, 0);
        // SAFETY: the handle lives as long as self; the results are our locals.
        outcome(unsafe {
            ffi::haxm_os_user_fault_in(
                self.handle.as_ptr(),
                address.0,
                u32::from(write),
                ahead,
                &raw mut frame,
                &raw mut writable,
                &raw mut shift,
            )
        })?;
        Ok(HostFrame {
            frame: Pfn(frame),
            writable: writable != 0,
            shift,
        })
    }

    fn present(&self, first: Hva, wanted: usize, pages: &mut [PresentPage]) {
        let count = pages.len();
        // SAFETY: the handle lives as long as self; the C half writes at most `count` words.
        unsafe {
            ffi::haxm_os_user_present(
                self.handle.as_ptr(),
                first.0,
                wanted,
                pages.as_mut_ptr().cast(),
                count,
            );
        }
    }

    fn read(&self, address: Hva, bytes: &mut [u8]) -> Result<(), UserFault> {
        if !self.is_current() {
            return Err(UserFault::BadAddress);
        }
        copy_in(address.0, bytes)
    }

    fn write(&self, address: Hva, bytes: &[u8]) -> Result<(), UserFault> {
        if !self.is_current() {
            return Err(UserFault::BadAddress);
        }
        copy_out(address.0, bytes)
    }

    fn compare_exchange(
        &self,
        address: Hva,
        size: u8,
        old: u128,
        new: u128,
    ) -> Result<u128, UserFault> {
        if !self.is_current() {
            return Err(UserFault::BadAddress);
        }
        let halves = |value: u128| [value as u64, (value >> 64) as u64];
        let (mut found, new) = (halves(old), halves(new));
        let size = u32::from(size);
        // SAFETY: the C half checks address and size, reads two words of each
        // array and writes the first; both are our locals.
        outcome(unsafe {
            ffi::haxm_os_user_compare_exchange(address.0, size, found.as_mut_ptr(), new.as_ptr())
        })?;
        let [low, high] = found;
        Ok(u128::from(high) << 64 | u128::from(low))
    }

    unsafe fn watch(&self, listener: Listener) -> Result<(), NoMemory> {
        let slot = Box::into_raw(try_box(listener)?);
        let unused =
            self.listener
                .compare_exchange(null_mut(), slot, Ordering::AcqRel, Ordering::Acquire);
        let watched = unused.is_ok() && {
            // SAFETY: the slot stays until `unwatch` has ended the reports.
            let result = unsafe { ffi::haxm_os_user_watch(self.handle.as_ptr(), slot.cast()) };
            if result != 0 {
                self.listener.store(null_mut(), Ordering::Release);
            }
            result == 0
        };
        if watched {
            return Ok(());
        }
        // SAFETY: made above, and nobody else has it.
        drop(unsafe { Box::from_raw(slot) });
        Err(NoMemory)
    }

    fn unwatch(&self) {
        let slot = self.listener.swap(null_mut(), Ordering::AcqRel);
        if slot.is_null() {
            return;
        }
        // SAFETY: the process is being watched: only then is there a slot.
        unsafe { ffi::haxm_os_user_unwatch(self.handle.as_ptr()) };
        // SAFETY: made by `watch`, taken once, and no report uses it any more.
        drop(unsafe { Box::from_raw(slot) });
    }
}

/// A report of the C half about the process that `listener` watches.
///
/// # Safety
/// `listener` was given to `haxm_os_user_watch`, and the watch has not ended.
pub(crate) unsafe fn report<T>(
    listener: *const c_void,
    tell: impl FnOnce(&dyn Invalidate) -> T,
) -> T {
    // SAFETY: it is the slot of a `Process` that is being watched.
    let wide = unsafe { listener.cast::<Listener>().read() };
    // SAFETY: the caller of `watch` keeps the listener valid until `unwatch` returns.
    tell(unsafe { wide.as_ref() })
}
