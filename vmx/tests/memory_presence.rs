//! The entry and flush protocol, model-checked: in every interleaving, and with
//! every reordering that the memory model allows, no processor uses a page that
//! a flusher has let go.

use std::marker::PhantomData;

use haxm_vmx::memory::presence::{Presence, Word};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::sync::{Arc, Mutex};
use loom::thread;

/// What a word's fence does.
trait Fence: Send + Sync + 'static {
    fn fence();
}

struct Real;
impl Fence for Real {
    fn fence() {
        fence(Ordering::SeqCst);
    }
}

/// A protocol without its fences, which must be found wrong.
struct Missing;
impl Fence for Missing {
    fn fence() {}
}

/// The model checker's word.
struct Checked<F>(AtomicU64, PhantomData<F>);

impl<F: Fence> Word for Checked<F> {
    fn new(value: u64) -> Self {
        Self(AtomicU64::new(value), PhantomData)
    }
    fn load(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
    fn store(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }
    fn increment(&self) -> u64 {
        self.0.fetch_add(1, Ordering::AcqRel) + 1
    }
    fn raise(&self, value: u64) {
        self.0.fetch_max(value, Ordering::AcqRel);
    }
    fn fence() {
        F::fence();
    }
}

/// A machine: two pages, each mapped by one EPT entry.
struct Machine<F: Fence> {
    presence: Presence<Checked<F>>,
    /// The EPT entries: 1 maps the page.
    entries: [AtomicU64; 2],
    /// The spin lock under which the entries are changed.
    lock: Mutex<()>,
    /// The pages: used by guests, let go by writing them. The checker reports
    /// a use and a letting go that nothing orders.
    pages: [UnsafeCell<()>; 2],
    /// Held while a processor has interrupts off.
    interrupts: [Mutex<()>; 2],
    /// What each processor has cached. Only the processor itself uses it.
    tlbs: [Mutex<[bool; 2]>; 2],
}

impl<F: Fence> Machine<F> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            presence: Presence::new(2).unwrap(),
            entries: [AtomicU64::new(1), AtomicU64::new(1)],
            lock: Mutex::new(()),
            pages: [UnsafeCell::new(()), UnsafeCell::new(())],
            interrupts: [Mutex::new(()), Mutex::new(())],
            tlbs: [Mutex::new([false; 2]), Mutex::new([false; 2])],
        })
    }

    /// One entry into the guest on processor `cpu`; the guest touches the first
    /// `pages` pages.
    fn enter(&self, cpu: usize, pages: usize) {
        let interrupts_off = self.interrupts[cpu].lock().unwrap();
        let mut tlb = self.tlbs[cpu].lock().unwrap();
        if let Some(flush) = self.presence.before_entry(cpu).unwrap() {
            *tlb = [false; 2];
            self.presence.flushed(cpu, flush);
        }
        for page in 0..pages {
            tlb[page] |= self.entries[page].load(Ordering::Acquire) == 1;
            if tlb[page] {
                self.pages[page].with(|_| ());
            }
        }
        self.presence.after_exit(cpu);
        drop(tlb);
        drop(interrupts_off);
    }

    /// Takes the translation away and returns when nobody can use it.
    fn forget(&self, page: usize) {
        let lock = self.lock.lock().unwrap();
        if self.entries[page].swap(0, Ordering::AcqRel) == 1 {
            self.presence.advance();
        }
        drop(lock);
        self.presence
            .finish(|_| (), |cpu| drop(self.interrupts[cpu].lock().unwrap()));
    }

    fn forget_and_let_go(&self, page: usize) {
        self.forget(page);
        self.pages[page].with_mut(|_| ());
    }
}

/// Runs a model in every interleaving with at most `preemptions` switches
/// away from a thread that could go on.
fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

fn one_processor_and_one_flusher<F: Fence>() {
    let machine = Machine::<F>::new();
    let guest = machine.clone();
    let guest = thread::spawn(move || {
        guest.enter(0, 1);
        guest.enter(0, 1);
    });
    machine.forget_and_let_go(0);
    guest.join().unwrap();
}

#[test]
fn a_flusher_waits_for_whoever_may_use_the_page() {
    check(3, one_processor_and_one_flusher::<Real>);
}

/// Shows that the check above can fail.
#[test]
#[should_panic(expected = "Causality violation")]
fn without_its_fences_the_protocol_is_wrong() {
    check(3, one_processor_and_one_flusher::<Missing>);
}

/// The second flusher finds the entry cleared already, and must not return
/// before the first one's flush is complete.
#[test]
fn a_flusher_waits_for_another_ones_flush() {
    check(2, || {
        let machine = Machine::<Real>::new();
        let guest = machine.clone();
        let guest = thread::spawn(move || guest.enter(0, 1));
        let first = machine.clone();
        let first = thread::spawn(move || first.forget(0));
        machine.forget_and_let_go(0);
        guest.join().unwrap();
        first.join().unwrap();
    });
}

/// Two flushers, each with a page of its own, let both go.
#[test]
fn flushers_of_different_pages_do_not_mislead_each_other() {
    check(2, || {
        let machine = Machine::<Real>::new();
        let guest = machine.clone();
        let guest = thread::spawn(move || guest.enter(0, 2));
        let other = machine.clone();
        let other = thread::spawn(move || other.forget_and_let_go(1));
        machine.forget_and_let_go(0);
        guest.join().unwrap();
        other.join().unwrap();
    });
}

/// A vCPU moves to another processor and back; each has its own translations.
#[test]
fn a_vcpu_that_moves_leaves_nothing_behind() {
    check(2, || {
        let machine = Machine::<Real>::new();
        let guest = machine.clone();
        let guest = thread::spawn(move || {
            guest.enter(0, 1);
            guest.enter(1, 1);
            guest.enter(0, 1);
        });
        machine.forget_and_let_go(0);
        guest.join().unwrap();
    });
}

/// Two vCPUs take turns on one processor.
#[test]
fn two_vcpus_share_a_processor() {
    check(2, || {
        let machine = Machine::<Real>::new();
        let vcpus =
            [machine.clone(), machine.clone()].map(|vcpu| thread::spawn(move || vcpu.enter(0, 1)));
        machine.forget_and_let_go(0);
        for vcpu in vcpus {
            vcpu.join().unwrap();
        }
    });
}

/// Without a model checker: what is asked for, and when.
#[test]
fn each_processor_flushes_once_per_generation() {
    let presence: Presence = Presence::new(2).unwrap();
    let enter = |cpu| {
        let flush = presence.before_entry(cpu).unwrap();
        let asked = flush.is_some();
        if let Some(flush) = flush {
            presence.flushed(cpu, flush);
        }
        presence.after_exit(cpu);
        asked
    };
    assert!(enter(0), "the first entry on a processor flushes");
    assert!(!enter(0));
    assert!(enter(1));
    presence.advance();
    assert!(enter(1));
    assert!(!enter(1));
    assert!(enter(0));
    // A flush that was asked for but not executed is asked for again.
    presence.advance();
    assert!(presence.before_entry(0).unwrap().is_some());
    presence.after_exit(0);
    assert!(enter(0));
    assert!(presence.before_entry(2).is_err());
}
