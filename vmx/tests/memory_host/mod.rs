//! A host for the tests of guest memory: pages with a ledger, locks that check
//! their order, an allocator that fails on demand, a process whose pages the
//! test moves about, and processors that can be waited for.
// UNSAFETY: implements the host seam and a global allocator.
#![allow(unsafe_code, reason = "not every test file uses every part")]
#![allow(dead_code, reason = "not every test file uses every part")]

pub(crate) mod access;
mod cpu;
mod pins;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use haxm_vmx::arch::addr::{Hpa, Hva, Pfn};
use haxm_vmx::fallible::NoMemory;
use haxm_vmx::host::{
    CpuOffline, Host, HostFrame, HostPage, Invalidate, Lending, PresentPage, SharedPage, UserFault,
    UserSpace,
};
use haxm_vmx::sync::{LockClass, RawLock};

use cpu::NoCpu;
use pins::FakePins;

pub(crate) const PAGE: u64 = 4096;

thread_local! {
    /// Lock classes this thread holds, innermost last.
    static HELD: RefCell<Vec<LockClass>> = const { RefCell::new(Vec::new()) };
    /// Spin locks this thread holds.
    static SPINNING: Cell<u32> = const { Cell::new(0) };
    /// Allocations left until one fails, while the core runs.
    static FAIL_IN: Cell<Option<u32>> = const { Cell::new(None) };
    /// An allocation was failed.
    static FAILED: Cell<bool> = const { Cell::new(false) };
    /// The processor this thread is on.
    static CPU: Cell<usize> = const { Cell::new(0) };
}

/// Allocations and frees under a spin lock: there must be none.
pub(crate) static UNDER_SPIN: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, failing on demand and watching for spin locks.
pub(crate) struct Allocator;

/// Whether the next allocation is to fail.
fn fails() -> bool {
    match FAIL_IN.get() {
        Some(0) => {
            FAIL_IN.set(None);
            FAILED.set(true);
            true
        }
        Some(left) => {
            FAIL_IN.set(Some(left - 1));
            false
        }
        None => false,
    }
}

fn note_spinning() {
    if SPINNING.get() > 0 {
        UNDER_SPIN.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note_spinning();
        if fails() {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note_spinning();
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Runs `call` with the allocation numbered `fail_in` failing; tells whether it
/// came to that.
pub(crate) fn with_failure<T>(fail_in: Option<u32>, call: impl FnOnce() -> T) -> (T, bool) {
    FAILED.set(false);
    FAIL_IN.set(fail_in);
    let result = call();
    FAIL_IN.set(None);
    (result, FAILED.get())
}

/// Runs `call`, a part of the fake host, with allocations working.
fn undisturbed<T>(call: impl FnOnce() -> T) -> T {
    assert_eq!(SPINNING.get(), 0, "the host was called under a spin lock");
    let fail_in = FAIL_IN.take();
    let result = call();
    FAIL_IN.set(fail_in);
    result
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts the calling thread on a processor.
pub(crate) fn run_as_cpu(cpu: usize) {
    CPU.set(cpu);
}

/// A lock that checks the order of classes. `SPINS`: it is a spin lock.
pub(crate) struct FakeLock<const SPINS: bool> {
    taken: AtomicBool,
    class: LockClass,
}

// SAFETY: the flag admits one thread at a time, acquiring and releasing.
unsafe impl<const SPINS: bool> RawLock for FakeLock<SPINS> {
    fn new(class: LockClass) -> Result<Self, NoMemory> {
        if fails() {
            return Err(NoMemory);
        }
        Ok(Self {
            taken: AtomicBool::new(false),
            class,
        })
    }

    fn lock(&self) {
        let fail_in = FAIL_IN.take();
        HELD.with_borrow_mut(|held| {
            if let Some(last) = held.last() {
                assert!(*last < self.class, "{:?} under {last:?}", self.class);
            }
            held.push(self.class);
        });
        FAIL_IN.set(fail_in);
        while self.taken.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
        SPINNING.set(SPINNING.get() + u32::from(SPINS));
    }

    unsafe fn unlock(&self) {
        SPINNING.set(SPINNING.get() - u32::from(SPINS));
        self.taken.store(false, Ordering::Release);
        HELD.with_borrow_mut(|held| assert_eq!(held.pop(), Some(self.class)));
    }
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

    pub(crate) fn report(&self, call: impl FnOnce(&dyn Invalidate)) {
        let listener = self.0.listener.read().unwrap();
        if let Some(listener) = &*listener {
            // SAFETY: valid until `unwatch`, which needs this lock for writing.
            call(unsafe { listener.0.as_ref() });
        }
    }

    /// The entry at `index` of the EPT page at a physical address.
    pub(crate) fn entry(&self, table: u64, index: u64) -> u64 {
        assert!(
            locked(&self.0.pages).contains(&(table as usize)),
            "the processor walks into a page that is not an EPT page"
        );
        let first = table as usize as *mut u64;
        // SAFETY: the page is handed out, so 512 entries are there.
        let entry = unsafe { first.add(index as usize) };
        // SAFETY: aligned, and accessed atomically by everyone.
        unsafe { AtomicU64::from_ptr(entry) }.load(Ordering::Acquire)
    }

    /// Whether a page is an EPT page now.
    pub(crate) fn is_table(&self, page: u64) -> bool {
        locked(&self.0.pages).contains(&(page as usize))
    }

    /// The lowest table on the way to a guest-physical address, which the
    /// processor may cache.
    pub(crate) fn lowest_table(&self, eptp: u64, gpa: u64) -> u64 {
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let mut table = eptp & ADDRESS;
        for level in (2..=4u32).rev() {
            let entry = self.entry(table, (gpa >> (12 + 9 * (level - 1))) & 511);
            if entry & 7 == 0 || entry & 0x80 != 0 {
                break;
            }
            table = entry & ADDRESS;
        }
        table
    }

    /// What the processor finds for a guest-physical address: the frame of its
    /// 4 KB page, and the entry.
    pub(crate) fn translate(&self, eptp: u64, gpa: u64) -> Option<(u64, u64)> {
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let mut table = eptp & ADDRESS;
        for level in (1..=4u32).rev() {
            let shift = 12 + 9 * (level - 1);
            let entry = self.entry(table, (gpa >> shift) & 511);
            if entry & 7 == 0 {
                assert_eq!(entry, 0);
                return None;
            }
            if level == 1 || entry & 0x80 != 0 {
                assert_eq!(entry & 0x38, 6 << 3, "not write-back");
                assert_eq!(entry & 0x80 != 0, level > 1);
                let base = entry & ADDRESS;
                assert_eq!(base & ((1 << shift) - 1), 0, "a leaf is not aligned");
                return Some(((base + (gpa & ((1 << shift) - 1))) / PAGE, entry));
            }
            assert_eq!(entry & !ADDRESS, 7, "reserved bits in a table entry");
            table = entry & ADDRESS;
        }
        unreachable!()
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

/// The client's process.
pub(crate) struct FakeProcess(FakeHost);

impl FakeProcess {
    /// Calls `each` with the contents of each page of `length` bytes at
    /// `address`: the bytes, the offset in them, and that in the request.
    fn pieces(
        &self,
        address: Hva,
        length: usize,
        write: bool,
        each: &mut dyn FnMut(&mut [u8], usize),
    ) -> Result<(), UserFault> {
        undisturbed(|| {
            let interlude = locked(&self.0.0.copying).take();
            if let Some(interlude) = interlude {
                interlude(&self.0);
            }
            let mut done = 0;
            while done < length {
                let here = address.0 + done as u64;
                let offset = (here % PAGE) as usize;
                let part = (4096 - offset).min(length - done);
                let backing = self.0.backing(here / PAGE).ok_or(UserFault::BadAddress)?;
                if write && !backing.writable {
                    return Err(UserFault::BadAddress);
                }
                let mut contents = locked(&self.0.0.contents);
                let page = contents
                    .entry(backing.frame)
                    .or_insert_with(|| vec![0; 4096]);
                each(&mut page[offset..offset + part], done);
                done += part;
            }
            Ok(())
        })
    }
}

// SAFETY: the only changes of what `fault_in` said are made by
// `FakeHost::change`, which reports them.
unsafe impl UserSpace for FakeProcess {
    type Pins = FakePins;

    fn lending(&self) -> Lending {
        if self.0.0.pins {
            Lending::Pinned
        } else {
            Lending::Borrowed
        }
    }

    fn pin(&self, start: Hva, pages: usize) -> Result<FakePins, UserFault> {
        assert!(self.0.0.pins && start.0 % PAGE == 0 && (1..=512).contains(&pages));
        if fails() {
            return Err(UserFault::NoMemory);
        }
        undisturbed(|| {
            let first = start.0 / PAGE;
            let found: Option<Vec<_>> = (first..first + pages as u64)
                .map(|page| self.0.lent(page))
                .collect();
            let backings = found.ok_or(UserFault::BadAddress)?;
            for (page, backing) in (first..).zip(&backings) {
                let mut pinned = locked(&self.0.0.pinned);
                let (_, count) = pinned.entry(page).or_insert((*backing, 0));
                *count += 1;
                if *count == 1 {
                    self.0.tell(backing.frame, true);
                }
            }
            let interlude = locked(&self.0.0.interlude).take();
            if let Some(interlude) = interlude {
                interlude(&self.0);
            }
            for _ in 0..self.0.0.pause.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            Ok(FakePins {
                host: self.0.clone(),
                first,
                backings,
            })
        })
    }

    fn is_current(&self) -> bool {
        true
    }

    fn fault_in(&self, address: Hva, write: bool, ahead: u32) -> Result<HostFrame, UserFault> {
        if fails() {
            return Err(UserFault::NoMemory);
        }
        undisturbed(|| {
            assert_eq!(address.0 % PAGE, 0);
            let found = self.0.backing(address.0 / PAGE);
            let interlude = locked(&self.0.0.interlude).take();
            if let Some(interlude) = interlude {
                interlude(&self.0);
            }
            for _ in 0..self.0.0.pause.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            let backing = found.ok_or(UserFault::BadAddress)?;
            if write && !backing.writable {
                return Err(UserFault::BadAddress);
            }
            let first = address.0 / PAGE;
            locked(&self.0.0.asked).push((first, 1 + u64::from(ahead)));
            let small = |page: &u64| self.0.backing(*page).is_some_and(|b| b.shift == 12);
            let brought_in = (first..=first + u64::from(ahead)).take_while(small);
            locked(&self.0.0.resident).extend(brought_in);
            Ok(HostFrame {
                frame: Pfn(backing.frame),
                writable: backing.writable,
                shift: backing.shift,
            })
        })
    }

    fn present(&self, first: Hva, wanted: usize, pages: &mut [PresentPage]) {
        undisturbed(|| {
            assert_eq!(first.0 % PAGE, 0);
            assert!(wanted < pages.len());
            let touched = first.0 / PAGE + wanted as u64;
            let at = |page: &u64| {
                let resident = locked(&self.0.0.resident).contains(page);
                let backing = self
                    .0
                    .backing(*page)
                    .filter(|b| resident && b.shift == 12)?;
                Some(PresentPage::new(Pfn(backing.frame), backing.writable))
            };
            if at(&touched).is_none() {
                return;
            }
            for (page, found) in (first.0 / PAGE..).zip(pages) {
                if page / 512 == touched / 512 {
                    *found = at(&page).unwrap_or_default();
                }
            }
            let interlude = locked(&self.0.0.interlude).take();
            if let Some(interlude) = interlude {
                interlude(&self.0);
            }
            for _ in 0..self.0.0.pause.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
        });
    }

    fn read(&self, address: Hva, bytes: &mut [u8]) -> Result<(), UserFault> {
        let length = bytes.len();
        self.pieces(address, length, false, &mut |page, done| {
            bytes[done..done + page.len()].copy_from_slice(page);
        })
    }

    fn write(&self, address: Hva, bytes: &[u8]) -> Result<(), UserFault> {
        self.pieces(address, bytes.len(), true, &mut |page, done| {
            page.copy_from_slice(&bytes[done..done + page.len()]);
        })
    }

    fn compare_exchange(
        &self,
        address: Hva,
        size: u8,
        old: u128,
        new: u128,
    ) -> Result<u128, UserFault> {
        let size = usize::from(size);
        let mut found = [0; 16];
        self.pieces(address, size, true, &mut |page, _| {
            found[..size].copy_from_slice(page);
            if page == &old.to_le_bytes()[..size] {
                page.copy_from_slice(&new.to_le_bytes()[..size]);
            }
        })?;
        Ok(u128::from_le_bytes(found))
    }

    unsafe fn watch(&self, listener: NonNull<dyn Invalidate>) -> Result<(), NoMemory> {
        assert!(!self.0.0.pins);
        if fails() {
            return Err(NoMemory);
        }
        undisturbed(|| {
            let before = self
                .0
                .0
                .listener
                .write()
                .unwrap()
                .replace(Listener(listener));
            assert!(before.is_none());
        });
        Ok(())
    }

    fn unwatch(&self) {
        undisturbed(|| {
            let before = self.0.0.listener.write().unwrap().take();
            assert!(before.is_some());
        });
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
