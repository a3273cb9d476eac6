//! Host locks that check their own use: order by class, no sleeping where a
//! kernel cannot sleep, no lock taken twice.
// UNSAFETY: implements the lock seam.
#![expect(unsafe_code)]

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use vmx::fallible::NoMemory;
use vmx::sync::{LockClass, RawLock};

use crate::cores::{Cores, machine, thread, thread_id};
use crate::fault;
use crate::state::Inner;

/// What both kinds of lock share.
struct Raw {
    class: LockClass,
    /// The thread that holds it; 0 if nobody.
    holder: Mutex<u64>,
    freed: Condvar,
    machine: Weak<Inner>,
}

impl Raw {
    fn new(class: LockClass) -> Result<Self, NoMemory> {
        if fault::strikes() {
            return Err(NoMemory);
        }
        let machine = machine();
        if let Some(inner) = &machine {
            inner.locks.fetch_add(1, Ordering::SeqCst);
        }
        Ok(Self {
            class,
            holder: Mutex::new(0),
            freed: Condvar::new(),
            machine: machine
                .as_ref()
                .map(std::sync::Arc::downgrade)
                .unwrap_or_default(),
        })
    }

    fn finding(&self, text: String) {
        match self.machine.upgrade() {
            Some(inner) => inner.finding(text),
            None => panic!("{text}"),
        }
    }

    fn check_order(&self, spin: bool) {
        let worst = thread(|t| t.held.borrow().iter().map(|(class, _)| *class).max());
        if let Some(held) = worst.filter(|held| *held >= self.class) {
            self.finding(format!(
                "lock order: {:?} taken while {held:?} is held",
                self.class
            ));
        }
        if thread(|t| t.in_call.get() > 0) {
            self.finding(format!("{:?} taken in an interrupt", self.class));
        }
        if !spin {
            check_may_sleep_in(self.machine.upgrade().as_deref(), "a sleeping lock");
        }
        assert_ne!(
            *self.holder.lock().unwrap_or_else(PoisonError::into_inner),
            thread_id(),
            "{:?} taken twice by one thread",
            self.class
        );
        thread(|t| t.held.borrow_mut().push((self.class, spin)));
    }

    fn take(&self) {
        let me = thread_id();
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        while *holder != 0 {
            holder = self
                .freed
                .wait_timeout(holder, Duration::from_millis(2))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            if *holder != 0 {
                drop(holder);
                // A spinning processor takes its interrupts.
                if let Some(inner) = self.machine.upgrade() {
                    Cores::service(&inner);
                }
                holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
            }
        }
        *holder = me;
    }

    fn give(&self) {
        let me = thread_id();
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(*holder, me, "{:?} given back by another thread", self.class);
        *holder = 0;
        drop(holder);
        self.freed.notify_one();
        thread(|t| {
            let mut held = t.held.borrow_mut();
            if let Some(at) = held.iter().rposition(|(class, _)| *class == self.class) {
                held.remove(at);
            }
        });
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(inner) = self.machine.upgrade() {
            inner.locks.fetch_sub(1, Ordering::SeqCst);
        }
        if *self.holder.lock().unwrap_or_else(PoisonError::into_inner) != 0
            && !std::thread::panicking()
        {
            self.finding(format!("{:?} dropped while held", self.class));
        }
    }
}

/// Records a finding if this thread may not sleep now.
pub(crate) fn check_may_sleep(inner: &Inner, what: &str) {
    check_may_sleep_in(Some(inner), what);
}

fn check_may_sleep_in(inner: Option<&Inner>, what: &str) {
    let spinning = thread(|t| t.held.borrow().iter().any(|(_, spin)| *spin));
    if Cores::is_pinned() || spinning {
        let text = format!("{what} may sleep, but preemption or interrupts are masked");
        match inner {
            Some(inner) => inner.finding(text),
            None => panic!("{text}"),
        }
    }
}

/// A lock that sleeps.
pub struct SimMutex(Raw);

// SAFETY: `take` returns to one thread at a time, by a mutex.
unsafe impl RawLock for SimMutex {
    fn new(class: LockClass) -> Result<Self, NoMemory> {
        Raw::new(class).map(Self)
    }

    fn lock(&self) {
        let _inside = fault::inside();
        self.0.check_order(false);
        self.0.take();
    }

    unsafe fn unlock(&self) {
        let _inside = fault::inside();
        self.0.give();
    }
}

/// A lock that spins with preemption masked.
pub struct SimSpin(Raw);

// SAFETY: as for SimMutex.
unsafe impl RawLock for SimSpin {
    fn new(class: LockClass) -> Result<Self, NoMemory> {
        Raw::new(class).map(Self)
    }

    fn lock(&self) {
        let _inside = fault::inside();
        self.0.check_order(true);
        if let Some(inner) = self.0.machine.upgrade() {
            thread(|t| t.preempt.set(t.preempt.get() + 1));
            Cores::acquire(&inner);
        }
        self.0.take();
    }

    unsafe fn unlock(&self) {
        let _inside = fault::inside();
        self.0.give();
        if let Some(inner) = self.0.machine.upgrade() {
            thread(|t| t.preempt.set(t.preempt.get() - 1));
            Cores::release(&inner);
        }
    }
}
