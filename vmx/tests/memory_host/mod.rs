//! A host for the tests of guest memory: pages with a ledger, locks that check
//! their order, an allocator that fails on demand, a process whose pages the
//! test moves about, and processors that can be waited for.
// UNSAFETY: implements the host seam and a global allocator.
#![allow(unsafe_code, reason = "not every test file uses every part")]
#![allow(dead_code, reason = "not every test file uses every part")]

pub(crate) mod access;
mod cpu;
mod pins;
mod process;
mod walk;
mod watched;

use std::alloc::Layout;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use haxm_vmx::arch::addr::{Hpa, Hva};
use haxm_vmx::fallible::NoMemory;
use haxm_vmx::host::{Aging, CpuOffline, Host, HostPage, Invalidate, SharedPage};

use cpu::NoCpu;
use process::FakeProcess;
#[allow(unused_imports, reason = "not every test file uses every part")]
pub(crate) use watched::{Allocator, UNDER_SPIN, after_spins, unwatched, with_failure};
use watched::{FakeLock, fails, undisturbed};

pub(crate) const PAGE: u64 = 4096;

thread_local! {
    /// The processor this thread is on.
    static CPU: Cell<usize> = const { Cell::new(0) };
}

/// Puts the calling thread on a processor.
pub(crate) fn run_as_cpu(cpu: usize) {
    CPU.set(cpu);
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A processor: `inside` is held while a guest runs there with interrupts off.
#[derive(Default)]
pub(crate) struct Processor {
    pub(crate) inside: Mutex<()>,
    /// An interrupt wants the guest to exit.
    pub(crate) kicked: AtomicBool,
    /// Times it was waited for.
    pub(crate) waits: AtomicUsize,
}

/// The frame that backs a client page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backing {
    pub(crate) frame: u64,
    pub(crate) writable: bool,
    pub(crate) shift: u32,
}

struct Listener(NonNull<dyn Invalidate>);

// SAFETY: `watch`'s contract keeps the target valid until `unwatch`.
unsafe impl Send for Listener {}
// SAFETY: the target is Sync.
unsafe impl Sync for Listener {}

/// What is done when a frame is pinned (true), or no longer is.
pub(crate) type Pinning = Box<dyn Fn(u64, bool) + Send + Sync>;

/// What happens in the middle of a `fault_in`.
pub(crate) type Interlude = Box<dyn FnOnce(&FakeHost) + Send>;

/// What a test sees of the machine.
pub(crate) struct State {
    /// EPT pages handed out, by address.
    pages: Mutex<BTreeSet<usize>>,
    /// The client's pages, by page number.
    pub(crate) process: Mutex<BTreeMap<u64, Backing>>,
    /// What the frames hold.
    pub(crate) contents: Mutex<BTreeMap<u64, Vec<u8>>>,
    listener: RwLock<Option<Listener>>,
    pub(crate) processors: Vec<Processor>,
    /// Called once in the middle of the next `fault_in`, or `present` that finds
    /// its page, when the answer is already known.
    pub(crate) interlude: Mutex<Option<Interlude>>,
    /// The memory is pinned, not borrowed.
    pins: bool,
    /// What pages were when they were pinned, and how often they are.
    pinned: Mutex<BTreeMap<u64, (Backing, u64)>>,
    pub(crate) pinning: Mutex<Option<Pinning>>,
    /// Pages that `present` finds; the others have to be brought in.
    pub(crate) resident: Mutex<BTreeSet<u64>>,
    /// What each `fault_in` asked for: the first page and how many.
    pub(crate) asked: Mutex<Vec<(u64, u64)>>,
    /// Called once at the start of the next copy.
    pub(crate) copying: Mutex<Option<Interlude>>,
    /// Times each `fault_in` yields at that point.
    pub(crate) pause: AtomicU64,
}

/// The host of these tests.
#[derive(Clone)]
pub(crate) struct FakeHost(pub(crate) Arc<State>);

impl FakeHost {
    pub(crate) fn new(cpus: usize) -> Self {
        Self::lending(cpus, false)
    }

    /// A host that cannot report changes.
    pub(crate) fn pinning(cpus: usize) -> Self {
        Self::lending(cpus, true)
    }

    pub(crate) fn lending(cpus: usize, pins: bool) -> Self {
        Self(Arc::new(State {
            pins,
            pinned: Mutex::default(),
            pinning: Mutex::default(),
            pages: Mutex::default(),
            process: Mutex::default(),
            contents: Mutex::default(),
            listener: RwLock::new(None),
            processors: (0..cpus).map(|_| Processor::default()).collect(),
            interlude: Mutex::default(),
            resident: Mutex::default(),
            asked: Mutex::default(),
            copying: Mutex::default(),
            pause: AtomicU64::new(0),
        }))
    }

    /// EPT pages in use.
    pub(crate) fn pages(&self) -> usize {
        locked(&self.0.pages).len()
    }

    /// Backs the client's page `page` (a number) with something.
    pub(crate) fn back(&self, page: u64, backing: Backing) {
        locked(&self.0.process).insert(page, backing);
    }

    pub(crate) fn backing(&self, page: u64) -> Option<Backing> {
        locked(&self.0.process).get(&page).copied()
    }

    /// Whether memory is pinned.
    pub(crate) fn pins(&self) -> bool {
        self.0.pins
    }

    fn tell(&self, frame: u64, pinned: bool) {
        if let Some(pinning) = &*locked(&self.0.pinning) {
            pinning(frame, pinned);
        }
    }

    /// Client pages that are pinned.
    pub(crate) fn pinned(&self) -> Vec<u64> {
        locked(&self.0.pinned).keys().copied().collect()
    }

    /// What a guest is to find at a client page: what was pinned, or what is there.
    pub(crate) fn lent(&self, page: u64) -> Option<Backing> {
        let pinned = locked(&self.0.pinned)
            .get(&page)
            .map(|(backing, _)| *backing);
        pinned.or_else(|| self.backing(page))
    }

    /// What a processor may use for a client page now.
    pub(crate) fn usable(&self, page: u64) -> Option<Backing> {
        if self.0.pins {
            return locked(&self.0.pinned)
                .get(&page)
                .map(|(backing, _)| *backing);
        }
        self.backing(page)
    }

    /// Changes the client's pages `first..last` as an operating system does:
    /// report, change, report.
    pub(crate) fn change(
        &self,
        first: u64,
        last: u64,
        change: impl FnOnce(&mut BTreeMap<u64, Backing>),
    ) {
        if self.0.pins {
            // Nobody hears of it, and pinned pages stay what they are.
            change(&mut locked(&self.0.process));
            return;
        }
        let (start, end) = (Hva(first * PAGE), Hva(last * PAGE));
        self.report(|listener| listener.begin(start, end));
        change(&mut locked(&self.0.process));
        locked(&self.0.resident).retain(|page| !(first..last).contains(page));
        self.report(|listener| listener.end(start, end));
    }

    /// Asks about the client's pages `first..last` as page reclaim does.
    pub(crate) fn age(&self, first: u64, last: u64, aging: Aging) -> bool {
        let mut young = false;
        self.report(|listener| {
            young = listener.young(Hva(first * PAGE), Hva(last * PAGE), aging);
        });
        young
    }

    pub(crate) fn report(&self, call: impl FnOnce(&dyn Invalidate)) {
        let listener = self.0.listener.read().unwrap();
        if let Some(listener) = &*listener {
            // SAFETY: valid until `unwatch`, which needs this lock for writing.
            call(unsafe { listener.0.as_ref() });
        }
    }
}

fn layout() -> Layout {
    Layout::from_size_align(4096, 4096).unwrap()
}

// SAFETY: pages are fresh and zeroed; the locks exclude; a thread stays on its
// pretended processor; `run_on` waits for it to be out of the guest.
unsafe impl Host for FakeHost {
    type Cpu = NoCpu;
    type Mutex = FakeLock<false>;
    type Spin = FakeLock<true>;
    type UserSpace = FakeProcess;
    type SharedPage = NoPage;

    fn cpu(&self) -> &NoCpu {
        &NoCpu
    }

    fn alloc_page(&self) -> Result<HostPage, NoMemory> {
        if fails() {
            return Err(NoMemory);
        }
        undisturbed(|| {
            // SAFETY: the layout is not empty.
            let raw = unsafe { std::alloc::alloc_zeroed(layout()) };
            let address = NonNull::new(raw).unwrap();
            assert!(locked(&self.0.pages).insert(raw as usize));
            Ok(HostPage {
                address,
                physical: Hpa(raw as u64),
            })
        })
    }

    unsafe fn free_page(&self, page: HostPage) {
        let raw = page.address.as_ptr();
        undisturbed(|| {
            assert!(locked(&self.0.pages).remove(&(raw as usize)), "freed twice");
        });
        // SAFETY: it came from `alloc_page`, and the ledger says once.
        unsafe { std::alloc::dealloc(raw, layout()) };
    }

    fn cpu_limit(&self) -> usize {
        self.0.processors.len()
    }
    fn current_cpu(&self) -> usize {
        CPU.get()
    }
    fn preempt_off(&self) {}
    unsafe fn preempt_on(&self) {}
    fn interrupts_save(&self) -> usize {
        0
    }
    unsafe fn interrupts_restore(&self, _saved: usize) {}

    fn run_on(&self, cpu: usize, call: &(dyn Fn() + Sync)) -> Result<(), CpuOffline> {
        let processor = self.0.processors.get(cpu).ok_or(CpuOffline)?;
        undisturbed(|| {
            processor.waits.fetch_add(1, Ordering::Relaxed);
            processor.kicked.store(true, Ordering::Release);
            let _out = locked(&processor.inside);
            call();
        });
        Ok(())
    }

    fn run_on_all(&self, call: &(dyn Fn() + Sync)) {
        for cpu in 0..self.cpu_limit() {
            self.run_on(cpu, call).unwrap();
        }
    }

    fn kick(&self, cpu: usize) {
        self.0.processors[cpu].kicked.store(true, Ordering::Release);
    }

    fn is_in_vmx_operation(&self) -> bool {
        false
    }

    unsafe fn set_vmxe(&self, _on: bool) {
        unimplemented!()
    }
    fn thread_turn(&self) -> u64 {
        unimplemented!()
    }
    fn yield_now(&self) {
        std::thread::yield_now();
    }
    fn guest_left(&self) {
        unimplemented!()
    }
    fn event_pending(&self) -> bool {
        false
    }
    fn fpu_begin(&self) {
        unimplemented!()
    }
    unsafe fn fpu_end(&self) {
        unimplemented!()
    }
    fn monotonic_ns(&self) -> u64 {
        0
    }

    fn user_space(&self) -> Result<FakeProcess, NoMemory> {
        Ok(FakeProcess(self.clone()))
    }
    fn shared_page(&self) -> Result<NoPage, NoMemory> {
        unimplemented!()
    }
}

/// No test here shares a page.
pub(crate) struct NoPage;

// SAFETY: there is none.
unsafe impl SharedPage for NoPage {
    fn kernel(&self) -> NonNull<u8> {
        unimplemented!()
    }
    fn user(&self) -> Hva {
        unimplemented!()
    }
}

/// A small random generator, the same on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    /// True once in `n`.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
