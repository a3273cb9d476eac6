//! A process's memory as the core sees it, borrowed or pinned.
// UNSAFETY: implements the user-space seam.
#![expect(unsafe_code)]

use std::ptr::NonNull;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use vmx::arch::addr::Hva;
use vmx::fallible::NoMemory;
use vmx::host::{
    ATOMIC_LINE, HostFrame, Invalidate, Lending, PinnedPages, PresentPage, UserFault, UserSpace,
};

use crate::fault;
use crate::lock::check_may_sleep;
use crate::user::{Listener, PAGE, Process};

/// A process as the core holds it.
pub struct SimUserSpace {
    process: Process,
    id: u64,
}

impl SimUserSpace {
    pub(crate) fn new(process: Process) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            process,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
        }
    }

    fn may_sleep(&self, what: &str) {
        check_may_sleep(&self.process.machine(), what);
    }

    /// What [`Process::interrupt_fault_in`] has asked for.
    fn interrupted(&self) -> Result<(), UserFault> {
        let mut table = self.process.table();
        match table.interrupt_in {
            Some(0) => {
                table.interrupt_in = None;
                return Err(UserFault::Interrupted);
            }
            Some(left) => table.interrupt_in = Some(left - 1),
            None => {}
        }
        Ok(())
    }

    fn of_caller(&self, what: &str) {
        self.may_sleep(what);
        if !self.process.is_current() {
            self.process
                .machine()
                .finding(format!("{what} from a thread of another process"));
        }
    }
}

// SAFETY: `changing` and `make_writable` frame every change of a present page
// by reports; listeners are called under the lock that `unwatch` takes.
unsafe impl UserSpace for SimUserSpace {
    type Pins = SimPins;

    fn lending(&self) -> Lending {
        if self.process.machine().pins.load(Ordering::SeqCst) {
            Lending::Pinned
        } else {
            Lending::Borrowed
        }
    }

    fn pin(&self, start: Hva, pages: usize) -> Result<SimPins, UserFault> {
        self.may_sleep("pin");
        if fault::strikes() {
            return Err(UserFault::NoMemory);
        }
        let _inside = fault::inside();
        self.interrupted()?;
        Ok(SimPins {
            pages: self.process.pin(start, pages)?,
            process: self.process.clone(),
        })
    }

    fn is_current(&self) -> bool {
        self.process.is_current()
    }

    /// Processes of the simulator do not end.
    fn has_ended(&self) -> bool {
        false
    }

    fn fault_in(&self, address: Hva, write: bool, ahead: u32) -> Result<HostFrame, UserFault> {
        self.may_sleep("fault_in");
        if fault::strikes() {
            return Err(UserFault::NoMemory);
        }
        let _inside = fault::inside();
        self.interrupted()?;
        let found = self.process.resolve(address.0, write)?;
        if found.shift == 12 {
            self.process.bring_in(address.0 + PAGE, ahead);
        }
        Ok(found)
    }

    fn present(&self, first: Hva, wanted: usize, pages: &mut [PresentPage]) {
        let _inside = fault::inside();
        self.of_caller("present");
        self.process.present(first.0, wanted, pages);
    }

    fn read(&self, address: Hva, bytes: &mut [u8]) -> Result<(), UserFault> {
        let _inside = fault::inside();
        self.of_caller("read of user memory");
        self.process
            .copy(address, bytes.len(), false, |inner, at, done, len| {
                inner.state().memory.read(at, &mut bytes[done..done + len]);
            })
    }

    fn write(&self, address: Hva, bytes: &[u8]) -> Result<(), UserFault> {
        let _inside = fault::inside();
        self.of_caller("write of user memory");
        self.process
            .copy(address, bytes.len(), true, |inner, at, done, len| {
                inner.state().memory.write(at, &bytes[done..done + len]);
            })
    }

    fn compare_exchange(
        &self,
        address: Hva,
        size: u8,
        old: u128,
        new: u128,
    ) -> Result<u128, UserFault> {
        let _inside = fault::inside();
        self.of_caller("compare_exchange of user memory");
        let in_line = address.0 % ATOMIC_LINE + u64::from(size) <= ATOMIC_LINE;
        match size {
            1 | 2 | 4 | 8 => assert!(in_line, "split lock in compare_exchange"),
            16 => assert!(address.is_aligned(16), "alignment of compare_exchange"),
            _ => panic!("size of compare_exchange"),
        }
        let frame = self.process.resolve(address.0, true)?;
        let inner = self.process.machine();
        let at = frame.frame.0 << 12 | address.page_offset();
        // The machine's lock makes it atomic among processors of this machine.
        let state = inner.state();
        let mut bytes = [0; 16];
        let length = usize::from(size);
        if !state.memory.read(at, &mut bytes[..length]) {
            return Err(UserFault::BadAddress);
        }
        let was = u128::from_le_bytes(bytes);
        if was == old {
            state.memory.write(at, &new.to_le_bytes()[..length]);
        }
        Ok(was)
    }

    unsafe fn watch(&self, listener: NonNull<dyn Invalidate>) -> Result<(), NoMemory> {
        self.may_sleep("watch");
        if fault::strikes() {
            return Err(NoMemory);
        }
        let _inside = fault::inside();
        let mut all = self
            .process
            .0
            .listeners
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if all.iter().any(|l| l.id == self.id) {
            self.process
                .machine()
                .finding("a second listener on one user space");
        }
        all.push(Listener {
            id: self.id,
            target: listener,
        });
        self.process
            .machine()
            .listeners
            .fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn unwatch(&self) {
        let _inside = fault::inside();
        self.may_sleep("unwatch");
        let mut all = self
            .process
            .0
            .listeners
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let before = all.len();
        all.retain(|l| l.id != self.id);
        let gone = before - all.len();
        self.process
            .machine()
            .listeners
            .fetch_sub(gone, Ordering::SeqCst);
    }
}

impl Drop for SimUserSpace {
    fn drop(&mut self) {
        let left = self
            .process
            .0
            .listeners
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .any(|l| l.id == self.id);
        if left && !std::thread::panicking() {
            self.process
                .machine()
                .finding("user space dropped with its listener left");
        }
    }
}

/// Pinned pages of a process.
pub struct SimPins {
    process: Process,
    pages: Vec<PresentPage>,
}

// SAFETY: the machine keeps the frames until the drop.
unsafe impl PinnedPages for SimPins {
    fn page(&self, index: usize) -> PresentPage {
        self.pages.get(index).copied().unwrap_or_default()
    }
}

impl Drop for SimPins {
    fn drop(&mut self) {
        check_may_sleep(&self.process.machine(), "unpin");
        let _inside = fault::inside();
        self.process.unpin(&self.pages);
    }
}
