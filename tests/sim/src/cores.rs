//! Which thread is on which processor, and interrupts between them.
//!
//! A thread that masks preemption or interrupts owns a processor until it
//! unmasks both. A call for a processor that nobody owns runs in the caller's
//! thread under that processor's identity; otherwise its owner runs it at the
//! next point where it takes interrupts.
// UNSAFETY: passes a borrowed closure to another thread, as an IPI does.
#![expect(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vmx::sync::LockClass;

use crate::state::Inner;

/// Longer than any wait in a test that works.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a thread holds.
#[derive(Default)]
pub(crate) struct Thread {
    id: Cell<u64>,
    /// The processor this thread owns.
    cpu: Cell<Option<usize>>,
    /// The processor whose identity it has borrowed to run a call.
    borrowed: Cell<Option<usize>>,
    affinity: Cell<Option<usize>>,
    last: Cell<usize>,
    pub(crate) preempt: Cell<u32>,
    pub(crate) masked: Cell<usize>,
    /// Nesting of calls run for other threads, or by `run_on`.
    pub(crate) in_call: Cell<u32>,
    pub(crate) fpu: Cell<u32>,
    pub(crate) held: RefCell<Vec<(LockClass, bool)>>,
    pub(crate) process: RefCell<Option<crate::user::Process>>,
    machine: RefCell<Weak<Inner>>,
}

thread_local! {
    static THREAD: Thread = Thread::default();
}

/// This thread's record.
pub(crate) fn thread<T>(f: impl FnOnce(&Thread) -> T) -> T {
    THREAD.with(f)
}

/// A number for this thread, never 0.
pub(crate) fn thread_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread(|t| {
        if t.id.get() == 0 {
            t.id.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        t.id.get()
    })
}

/// Notes which machine this thread works on, for locks made without a host.
pub(crate) fn use_machine(inner: &Arc<Inner>) {
    thread(|t| *t.machine.borrow_mut() = Arc::downgrade(inner));
}

/// The machine this thread works on.
pub(crate) fn machine() -> Option<Arc<Inner>> {
    thread(|t| t.machine.borrow().upgrade())
}

pub(crate) fn set_affinity(cpu: Option<usize>) {
    thread(|t| t.affinity.set(cpu));
}

/// A closure of another thread, which waits until `done`.
struct Call {
    run: *const (dyn Fn() + Sync),
    done: Arc<AtomicBool>,
}

// SAFETY: the closure is Sync, and its thread keeps it alive until `done`.
unsafe impl Send for Call {}

#[derive(Default)]
struct Slot {
    owner: Option<u64>,
    calls: VecDeque<Call>,
    interrupt: bool,
    nmi: bool,
    offline: bool,
}

pub(crate) struct Cores {
    slots: Mutex<Vec<Slot>>,
    changed: Condvar,
    migrate: AtomicBool,
}

impl Cores {
    pub(crate) fn new(count: usize) -> Self {
        Self {
            slots: Mutex::new((0..count).map(|_| Slot::default()).collect()),
            changed: Condvar::new(),
            migrate: AtomicBool::new(false),
        }
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count(&self) -> usize {
        self.slots().len()
    }

    pub(crate) fn set_migrate(&self, migrate: bool) {
        self.migrate.store(migrate, Ordering::SeqCst);
    }

    pub(crate) fn set_online(&self, cpu: usize, online: bool) {
        self.slots()[cpu].offline = !online;
    }

    pub(crate) fn is_online(&self, cpu: usize) -> bool {
        self.slots().get(cpu).is_some_and(|slot| !slot.offline)
    }

    pub(crate) fn raise(&self, cpu: usize) {
        self.slots()[cpu].interrupt = true;
        self.changed.notify_all();
    }

    pub(crate) fn raise_nmi(&self, cpu: usize) {
        self.slots()[cpu].nmi = true;
        self.changed.notify_all();
    }

    /// Whether an interrupt waits at a processor.
    pub(crate) fn interrupt_waits(&self, cpu: usize) -> bool {
        let slots = self.slots();
        slots[cpu].interrupt || !slots[cpu].calls.is_empty()
    }

    pub(crate) fn acknowledge(&self, cpu: usize) {
        self.slots()[cpu].interrupt = false;
    }

    pub(crate) fn take_nmi(&self, cpu: usize) -> bool {
        std::mem::take(&mut self.slots()[cpu].nmi)
    }

    /// Waits until an interrupt or NMI waits at a processor.
    pub(crate) fn wait_for_interrupt(&self, cpu: usize) {
        let start = Instant::now();
        let mut slots = self.slots();
        while !slots[cpu].interrupt && !slots[cpu].nmi && slots[cpu].calls.is_empty() {
            assert!(start.elapsed() < PATIENCE, "the guest waits for ever");
            slots = self
                .changed
                .wait_timeout(slots, Duration::from_millis(50))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The processor this thread is on, or was last.
    pub(crate) fn current(&self) -> usize {
        let count = self.count();
        thread(|t| {
            t.borrowed
                .get()
                .or(t.cpu.get())
                .or(t.affinity.get())
                .unwrap_or_else(|| t.last.get() % count)
        })
    }

    /// Whether this thread cannot leave its processor.
    pub(crate) fn is_pinned() -> bool {
        thread(|t| t.preempt.get() > 0 || t.masked.get() > 0 || t.in_call.get() > 0)
    }

    /// Takes a processor for this thread, if it has none.
    pub(crate) fn acquire(inner: &Inner) {
        let this = &inner.cores;
        if thread(|t| t.cpu.get().is_some() || t.borrowed.get().is_some()) {
            return;
        }
        let me = thread_id();
        let (affinity, last) = thread(|t| (t.affinity.get(), t.last.get()));
        let start = Instant::now();
        let mut slots = this.slots();
        let count = slots.len();
        let first = if this.migrate.load(Ordering::SeqCst) {
            last + 1
        } else {
            last
        };
        let cpu = loop {
            let free = (first..first + count).map(|n| n % count).find(|n| {
                affinity.is_none_or(|a| a == *n) && slots[*n].owner.is_none() && !slots[*n].offline
            });
            if let Some(cpu) = free {
                break cpu;
            }
            assert!(start.elapsed() < PATIENCE, "no processor becomes free");
            slots = this
                .changed
                .wait_timeout(slots, Duration::from_millis(50))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        slots[cpu].owner = Some(me);
        drop(slots);
        thread(|t| {
            t.cpu.set(Some(cpu));
            t.last.set(cpu);
        });
        let mut state = inner.state();
        state.cpus[cpu].pin();
        state.take_turn(cpu, me);
    }

    /// Gives the processor up, if nothing keeps this thread on it.
    pub(crate) fn release(inner: &Inner) {
        let this = &inner.cores;
        let keep =
            thread(|t| t.preempt.get() > 0 || t.masked.get() > 0 || t.borrowed.get().is_some());
        let Some(cpu) = thread(|t| t.cpu.get()).filter(|_| !keep) else {
            return;
        };
        inner.check_release(cpu);
        loop {
            Self::service(inner);
            let mut slots = this.slots();
            if slots[cpu].calls.is_empty() {
                slots[cpu].owner = None;
                slots[cpu].interrupt = false;
                break;
            }
        }
        thread(|t| t.cpu.set(None));
        this.changed.notify_all();
    }

    /// Takes the interrupts that wait at this thread's processor, if it has
    /// one and interrupts are on.
    pub(crate) fn service(inner: &Inner) {
        if thread(|t| t.masked.get() > 0 || t.in_call.get() > 0 || t.borrowed.get().is_some()) {
            return;
        }
        let Some(cpu) = thread(|t| t.cpu.get()) else {
            return;
        };
        loop {
            let mut slots = inner.cores.slots();
            let interrupt = std::mem::take(&mut slots[cpu].interrupt);
            let call = slots[cpu].calls.pop_front();
            drop(slots);
            if interrupt {
                inner.state().counts.host_interrupts += 1;
            }
            let Some(call) = call else {
                return;
            };
            // SAFETY: its thread waits for `done`, set below.
            let run = unsafe { &*call.run };
            Self::run_here(run);
            call.done.store(true, Ordering::SeqCst);
            inner.cores.changed.notify_all();
        }
    }

    fn run_here(run: &(dyn Fn() + Sync)) {
        thread(|t| {
            t.in_call.set(t.in_call.get() + 1);
            t.masked.set(t.masked.get() + 1);
        });
        {
            let _outside = crate::fault::outside();
            run();
        }
        thread(|t| {
            t.in_call.set(t.in_call.get() - 1);
            t.masked.set(t.masked.get() - 1);
        });
    }

    /// `Host::run_on`; false if the processor is offline.
    pub(crate) fn run_on(inner: &Inner, cpu: usize, run: &(dyn Fn() + Sync)) -> bool {
        let this = &inner.cores;
        if thread(|t| t.cpu.get() == Some(cpu)) {
            Self::run_here(run);
            return this.is_online(cpu);
        }
        let me = thread_id();
        let mut slots = this.slots();
        if slots.get(cpu).is_none_or(|slot| slot.offline) {
            return false;
        }
        if slots[cpu].owner.is_none() {
            slots[cpu].owner = Some(me);
            drop(slots);
            inner.state().cpus[cpu].pin();
            thread(|t| t.borrowed.set(Some(cpu)));
            Self::run_here(run);
            thread(|t| t.borrowed.set(None));
            inner.check_release(cpu);
            this.give_up(inner, cpu);
            return true;
        }
        let done = Arc::new(AtomicBool::new(false));
        // SAFETY: only the lifetime changes; this thread waits for `done`.
        let erased = unsafe {
            std::mem::transmute::<*const (dyn Fn() + Sync + '_), *const (dyn Fn() + Sync + 'static)>(
                run,
            )
        };
        slots[cpu].calls.push_back(Call {
            run: erased,
            done: Arc::clone(&done),
        });
        drop(slots);
        this.changed.notify_all();
        this.wait_done(inner, &done);
        true
    }

    /// Ends a borrowed ownership; late calls are run by this thread.
    fn give_up(&self, inner: &Inner, cpu: usize) {
        loop {
            let mut slots = self.slots();
            let Some(call) = slots[cpu].calls.pop_front() else {
                slots[cpu].owner = None;
                drop(slots);
                self.changed.notify_all();
                return;
            };
            drop(slots);
            thread(|t| t.borrowed.set(Some(cpu)));
            // SAFETY: its thread waits for `done`, set below.
            Self::run_here(unsafe { &*call.run });
            thread(|t| t.borrowed.set(None));
            call.done.store(true, Ordering::SeqCst);
            inner.check_release(cpu);
        }
    }

    fn wait_done(&self, inner: &Inner, done: &AtomicBool) {
        let start = Instant::now();
        while !done.load(Ordering::SeqCst) {
            Self::service(inner);
            let slots = self.slots();
            if done.load(Ordering::SeqCst) {
                break;
            }
            if start.elapsed() > PATIENCE {
                // The closure must not be left behind: stop everything.
                eprintln!("a processor does not take its interrupts");
                std::process::abort();
            }
            drop(
                self.changed
                    .wait_timeout(slots, Duration::from_millis(2))
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }
}

impl Inner {
    /// What must hold when a thread leaves a processor.
    fn check_release(&self, cpu: usize) {
        let mut state = self.state();
        let now = state.cpus[cpu].host_registers();
        if let Some(before) = state.cpus[cpu].at_pin.take() {
            for ((name, was), (_, is)) in before.0.iter().zip(&now.0) {
                if was != is {
                    state.finding(format!(
                        "the host's {name} changed from {was:#x} to {is:#x} on processor {cpu}"
                    ));
                }
            }
        }
        if let Some(n) = state.cpus[cpu].lent_counter() {
            state.finding(format!(
                "the host's performance counter {n} is not put back on processor {cpu}"
            ));
        }
        if state.cpus[cpu].foreign.is_some() {
            let current = state.cpus[cpu].current;
            let theirs = current
                .and_then(|pointer| state.vmcss.get(&pointer))
                .is_some_and(|vmcs| vmcs.foreign);
            if !theirs {
                state.finding(format!(
                    "the other hypervisor's VMCS is not current on processor {cpu} when preemption is possible"
                ));
            }
            let ours: Vec<u64> = state
                .vmcss
                .iter()
                .filter(|(_, vmcs)| vmcs.active_on == Some(cpu) && !vmcs.foreign)
                .map(|(pointer, _)| *pointer)
                .collect();
            for pointer in ours {
                state.finding(format!(
                    "VMCS {pointer:#x} is left active on processor {cpu} beside another hypervisor"
                ));
            }
        }
    }
}
