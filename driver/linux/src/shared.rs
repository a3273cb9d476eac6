//! A page that the kernel and one process map.
// UNSAFETY: hands the C half the pointers it gave.
#![expect(unsafe_code)]

use core::ffi::c_void;
use core::ptr::{NonNull, null_mut};

use vmx::arch::addr::Hva;
use vmx::fallible::NoMemory;
use vmx::host::SharedPage;

use crate::ffi;

/// The page; both mappings end when it is dropped.
pub(crate) struct Page {
    handle: NonNull<c_void>,
    kernel: NonNull<u8>,
    user: Hva,
}

// SAFETY: memory and a counted handle, not tied to a thread.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

impl Page {
    /// A zeroed page, mapped into the calling process.
    pub(crate) fn new() -> Result<Self, NoMemory> {
        let (mut kernel, mut user) = (null_mut(), 0);
        // SAFETY: the results are our locals.
        let handle = unsafe { ffi::haxm_os_shared_new(&raw mut kernel, &raw mut user) };
        Ok(Self {
            handle: NonNull::new(handle).ok_or(NoMemory)?,
            kernel: NonNull::new(kernel.cast()).ok_or(NoMemory)?,
            user: Hva(user),
        })
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used after this.
        unsafe { ffi::haxm_os_shared_free(self.handle.as_ptr()) };
    }
}

// SAFETY: the handle holds the page, which the kernel always maps.
unsafe impl SharedPage for Page {
    fn kernel(&self) -> NonNull<u8> {
        self.kernel
    }

    fn user(&self) -> Hva {
        self.user
    }
}
