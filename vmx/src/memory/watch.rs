//! Registers an address space with the host's reports, for as long as it lives.
// UNSAFETY: hands the host a pointer to the listener.
#![expect(unsafe_code)]

use core::ops::Deref;
use core::ptr::NonNull;

use crate::fallible::{NoMemory, Shared};
use crate::host::{Host, Invalidate, UserSpace};

use super::space::Inner;

/// While it lives, the host reports to the address space. It keeps the address
/// space in place.
pub(super) struct Watch<H: Host>(Shared<Inner<H>>);

impl<H: Host> Watch<H> {
    /// Starts the reports.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub(super) fn new(inner: &Shared<Inner<H>>) -> Result<Self, NoMemory> {
        let kept = inner.clone();
        let listener: &dyn Invalidate = kept.deref();
        let listener = NonNull::from(listener);
        // SAFETY: `kept` holds the listener in place; it is dropped only after
        // `unwatch` has returned.
        unsafe { kept.user.watch(listener) }?;
        Ok(Self(kept))
    }
}

impl<H: Host> Drop for Watch<H> {
    fn drop(&mut self) {
        self.0.user.unwatch();
    }
}
