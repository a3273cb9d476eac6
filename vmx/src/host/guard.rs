//! What the host lends for as long as a value lives.
// UNSAFETY: the guards undo what an unsafe seam did.
#![expect(unsafe_code)]

use core::marker::PhantomData;

use super::{Host, HostPage, Taken};
use crate::arch::addr::Hpa;
use crate::fallible::NoMemory;

/// Proof that this thread cannot leave its processor; ends when dropped.
pub struct Pinned<'h, H: Host> {
    host: &'h H,
    not_send: PhantomData<*const ()>,
}

impl<'h, H: Host> Pinned<'h, H> {
    /// Pins the calling thread.
    pub fn new(host: &'h H) -> Self {
        host.preempt_off();
        Self {
            host,
            not_send: PhantomData,
        }
    }

    /// The host that lent the proof.
    #[must_use]
    pub fn host(&self) -> &'h H {
        self.host
    }

    /// The processor, steady while this proof lives.
    #[must_use]
    pub fn cpu_number(&self) -> usize {
        self.host.current_cpu()
    }
}

impl<H: Host> Drop for Pinned<'_, H> {
    fn drop(&mut self) {
        // SAFETY: pairs with the `preempt_off` in `new`; not Send, so same thread.
        unsafe { self.host.preempt_on() };
    }
}

/// A guest's turn on this processor: preemption and interrupts are masked, and
/// the extended registers are ours. Ends when dropped.
pub struct Turn<'h, H: Host> {
    host: &'h H,
    taken: Taken,
    not_send: PhantomData<*const ()>,
}

impl<'h, H: Host> Turn<'h, H> {
    /// Takes the processor; `None` if the host wants the thread for something
    /// else, or a signal came since [`Host::signals_sent`] was `signals`.
    #[inline]
    pub fn new(host: &'h H, signals: u32) -> Option<Self> {
        let taken = host.guest_begin(signals)?;
        Some(Self {
            host,
            taken,
            not_send: PhantomData,
        })
    }

    /// The processor, steady while this proof lives.
    #[must_use]
    pub fn cpu_number(&self) -> usize {
        self.taken.cpu
    }

    /// What [`Host::has_foreign_msrs`] said.
    #[must_use]
    pub fn has_foreign_msrs(&self) -> bool {
        self.taken.foreign_msrs
    }
}

impl<H: Host> Drop for Turn<'_, H> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: pairs with the `guest_begin` in `new`; who puts another XCR0
        // or GDTR in force puts the host's back before.
        unsafe { self.host.guest_end(self.taken) };
    }
}

/// Proof that interrupts are masked on this processor; ends when dropped.
pub struct InterruptsOff<'h, H: Host> {
    host: &'h H,
    saved: usize,
    not_send: PhantomData<*const ()>,
}

impl<'h, H: Host> InterruptsOff<'h, H> {
    /// Masks interrupts.
    pub fn new(host: &'h H) -> Self {
        Self {
            host,
            saved: host.interrupts_save(),
            not_send: PhantomData,
        }
    }
}

impl<H: Host> Drop for InterruptsOff<'_, H> {
    fn drop(&mut self) {
        // SAFETY: pairs with the `interrupts_save` in `new`; guards drop innermost first.
        unsafe { self.host.interrupts_restore(self.saved) };
    }
}

/// A zeroed page of ours, given back when dropped.
pub struct OwnedPage<H: Host> {
    host: H,
    page: HostPage,
}

impl<H: Host> OwnedPage<H> {
    /// A new page.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(host: &H) -> Result<Self, NoMemory> {
        Ok(Self {
            host: host.clone(),
            page: host.alloc_page()?,
        })
    }

    /// Where the processor sees it.
    #[must_use]
    pub fn physical(&self) -> Hpa {
        self.page.physical
    }

    /// Where the kernel sees it. The processor or a user may write it too, so
    /// this stays a pointer.
    #[must_use]
    pub fn pointer(&self) -> *mut u8 {
        self.page.address.as_ptr()
    }
}

impl<H: Host> Drop for OwnedPage<H> {
    fn drop(&mut self) {
        let page = HostPage {
            address: self.page.address,
            physical: self.page.physical,
        };
        // SAFETY: the page came from this host; its owner is being dropped and
        // has taken it from the processor before.
        unsafe { self.host.free_page(page) };
    }
}
