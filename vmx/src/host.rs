//! Seam 2: the operating system, and what it must lend us.
//!
//! Each shim implements [`Host`] and its companions once; so does `tests/sim`.
//! No OS is named above or below this file.
// UNSAFETY: the guards below undo what an unsafe seam did.
#![expect(unsafe_code)]

use core::marker::PhantomData;
use core::ptr::NonNull;

use crate::arch::addr::{Hpa, Hva, Pfn};
use crate::cpu::Cpu;
use crate::fallible::NoMemory;
use crate::sync::RawLock;

/// A page from the host: 4096 bytes, page aligned, mapped for the kernel.
#[derive(Debug)]
pub struct HostPage {
    /// Where the kernel sees it.
    pub address: NonNull<u8>,
    /// Where the processor sees it.
    pub physical: Hpa,
}

// SAFETY: a page is memory, not tied to a thread.
unsafe impl Send for HostPage {}
// SAFETY: as above; access goes through whoever owns it.
unsafe impl Sync for HostPage {}

/// The processor asked for is not running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOffline;

/// What is done against speculation, beside what costs nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mitigations {
    /// Nothing.
    Off,
    /// What the processor needs.
    Needed,
    /// Everything that the processor can do.
    All,
}

/// What [`Host::guest_begin`] took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The processor.
    pub cpu: usize,
    /// What `interrupts_restore` needs.
    pub saved: usize,
    /// What [`Host::has_foreign_msrs`] says.
    pub foreign_msrs: bool,
}

/// What an operating system must lend us.
///
/// The value is a handle: cheap to clone, often of size zero.
///
/// # Safety
/// Pages are what [`HostPage`] says and stay until freed; `pin` keeps the
/// thread on its processor; `run_on` runs where it says; locks exclude.
pub unsafe trait Host: Clone + Send + Sync + 'static {
    /// The processor behind this host.
    type Cpu: Cpu;
    /// A lock that sleeps. Never taken while pinned.
    type Mutex: RawLock;
    /// A lock that spins with preemption masked. Interrupts stay on, so it is
    /// never taken by an interrupt handler (nor in `run_on`).
    type Spin: RawLock;
    /// A process's address space.
    type UserSpace: UserSpace;
    /// A page that the kernel and one process both map.
    type SharedPage: SharedPage;

    /// The processor.
    fn cpu(&self) -> &Self::Cpu;

    /// A zeroed page, with its physical address. May sleep.
    ///
    /// # Errors
    /// [`NoMemory`].
    fn alloc_page(&self) -> Result<HostPage, NoMemory>;

    /// Gives a page back. Does not sleep.
    ///
    /// # Safety
    /// The page came from `alloc_page` and nobody, the processor included,
    /// uses it any more.
    unsafe fn free_page(&self, page: HostPage);

    /// Processor numbers are below this; fixed while the module is loaded.
    fn cpu_limit(&self) -> usize;

    /// The number of the processor this thread is on; steady while pinned.
    fn current_cpu(&self) -> usize;

    /// Masks preemption. Nests. Use [`Pinned::new`].
    fn preempt_off(&self);

    /// Undoes one `preempt_off`.
    ///
    /// # Safety
    /// Pairs with a `preempt_off` of this thread.
    unsafe fn preempt_on(&self);

    /// Masks interrupts here; returns what `interrupts_restore` needs.
    fn interrupts_save(&self) -> usize;

    /// Restores the interrupt mask.
    ///
    /// # Safety
    /// Pairs with an `interrupts_save` of this thread, innermost first.
    unsafe fn interrupts_restore(&self, saved: usize);

    /// Runs `call` on one processor, interrupts masked there, and waits. Not
    /// to be called with interrupts masked or from `call`.
    ///
    /// # Errors
    /// [`CpuOffline`]: it was not run.
    fn run_on(&self, cpu: usize, call: &(dyn Fn() + Sync)) -> Result<(), CpuOffline>;

    /// Runs `call` on every running processor, this one included, interrupts
    /// masked, and waits for all. Not to be called with interrupts masked.
    fn run_on_all(&self, call: &(dyn Fn() + Sync));

    /// Interrupts a processor, so that a guest running there exits. Does not
    /// wait.
    fn kick(&self, cpu: usize);

    /// Sets or clears CR4.VMXE on this processor, in step with whatever copy
    /// of CR4 the host keeps.
    ///
    /// # Safety
    /// Pinned; not cleared while in VMX operation.
    unsafe fn set_vmxe(&self, on: bool);

    /// Whether CR4.VMXE, once set by [`Host::set_vmxe`], is still set after
    /// interrupts were possible. `false` where the host writes CR4 from a copy
    /// that a driver cannot change: VMX operation then begins and ends with
    /// interrupts off, within one RUN, and nothing of ours outlasts it.
    fn keeps_vmxe(&self) -> bool {
        true
    }

    /// Whether this processor, whose CR4.VMXE is set, is in VMX operation. Who
    /// sets the bit executes VMXON next, but may be interrupted before. To
    /// find out, the host executes a VMX instruction that may fault.
    /// Interrupts are off.
    fn is_in_vmx_operation(&self) -> bool;

    /// What is to be done against speculation.
    fn mitigations(&self) -> Mitigations {
        Mitigations::Needed
    }

    /// A guest has left this processor: the exits set the limits of GDTR and
    /// IDTR to 0xffff and TR's to 0x67 (SDM 28.5.2 "Loading Host Segment and
    /// Descriptor-Table Registers"). GDTR is put right already; the host does
    /// what it needs for TR. Interrupts are off.
    fn guest_left(&self);

    /// NMIs and machine checks of this host may come while the GS base in kernel mode is any
    /// value: where CR4.FSGSBASE is set, their handlers save it and load their own.
    fn tolerates_gs(&self) -> bool {
        false
    }

    /// A signal waits for this thread, or the scheduler wants the processor:
    /// RUN should return to user space.
    fn event_pending(&self) -> bool;

    /// A signal that is sent to a thread in RUN ends it, as an interrupt does, even if
    /// the thread blocks it.
    fn hears_signals(&self) -> bool {
        false
    }

    /// A number that differs from all earlier ones once this thread has given the
    /// processor to another, and between threads. Interrupts are off.
    fn thread_turn(&self) -> u64;

    /// A number that changes when this thread is sent a signal that it blocks; with others'
    /// too, perhaps. 0 where the host does not tell.
    fn signals_sent(&self) -> u32 {
        0
    }

    /// Lets another thread have the processor for a while. May sleep.
    fn yield_now(&self);

    /// Takes the extended (x87, SSE, AVX ...) registers from the host: saves
    /// what it keeps there and lets this thread use them until `fpu_end`.
    /// Masks preemption meanwhile.
    fn fpu_begin(&self);

    /// Gives the extended registers back to the host.
    ///
    /// # Safety
    /// Pairs with `fpu_begin`; XCR0 is the host's again.
    unsafe fn fpu_end(&self);

    /// SYSCALL's registers and TSC_AUX hold values of another hypervisor's guest on this processor.
    ///
    /// KVM leaves them there when its thread goes, gives the host its own back on the way to user
    /// space, and until then counts on finding what it left.
    fn has_foreign_msrs(&self) -> bool {
        false
    }

    /// Takes this processor for a guest: the extended registers, as `fpu_begin`
    /// does, preemption, and last the interrupts. `None` if by then an event is
    /// pending, or `signals_sent` is not `signals` any more; nothing is taken. What comes
    /// later interrupts the processor. Use [`Turn::new`].
    ///
    /// One call because it is made for each RUN: a host can do better than the
    /// sum of the parts.
    fn guest_begin(&self, signals: u32) -> Option<Taken> {
        if self.event_pending() {
            return None;
        }
        self.preempt_off();
        self.fpu_begin();
        let taken = Taken {
            saved: self.interrupts_save(),
            cpu: self.current_cpu(),
            foreign_msrs: self.has_foreign_msrs(),
        };
        if self.signals_sent() != signals {
            // SAFETY: pairs with what was just taken; no guest ran.
            unsafe { self.guest_end(taken) };
            return None;
        }
        Some(taken)
    }

    /// Undoes `guest_begin`, `guest_left` included.
    ///
    /// # Safety
    /// Pairs with a `guest_begin` of this thread; XCR0 and GDTR are the host's.
    unsafe fn guest_end(&self, taken: Taken) {
        self.guest_left();
        // SAFETY: pairs with `guest_begin`, innermost first.
        unsafe { self.interrupts_restore(taken.saved) };
        // SAFETY: as above.
        unsafe { self.fpu_end() };
        // SAFETY: as above.
        unsafe { self.preempt_on() };
    }

    /// Nanoseconds from a clock that never steps.
    fn monotonic_ns(&self) -> u64;

    /// The calling process's address space.
    ///
    /// # Errors
    /// [`NoMemory`], or the thread has none.
    fn user_space(&self) -> Result<Self::UserSpace, NoMemory>;

    /// A fresh zeroed page mapped writable into the calling process and the
    /// kernel. May sleep.
    ///
    /// # Errors
    /// [`NoMemory`].
    fn shared_page(&self) -> Result<Self::SharedPage, NoMemory>;
}

/// Why an access to a process's memory failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserFault {
    /// Nothing is mapped there, or not for this kind of access.
    BadAddress,
    /// The host has no memory to bring it in.
    NoMemory,
    /// A signal wants this thread; try again later.
    Interrupted,
}

/// The host memory behind an address of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFrame {
    /// The 4 KB page behind the address.
    pub frame: Pfn,
    /// Whether the process may write it.
    pub writable: bool,
    /// log2 of the bytes of the largest naturally aligned piece around the
    /// address, in the process's addresses and in host-physical ones alike,
    /// that the host maps as one: 12, 21 or 30.
    pub shift: u32,
}

/// Bytes of a cache line. A locked access that stays inside one is atomic
/// whatever its alignment; one that crosses into the next is a split lock, which
/// processors may refuse (SDM 9.1.2.3 "Features to Disable Bus Locks").
pub const ATOMIC_LINE: u64 = 64;

/// A 4 KB page of a process as the host's page tables have it now, or none.
///
/// Bit 0: there is one; bit 1: it may be written; bits 51:12: its address. The
/// value 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct PresentPage(u64);

impl PresentPage {
    /// No page.
    pub const NONE: Self = Self(0);

    /// The page in this frame.
    #[must_use]
    pub const fn new(frame: Pfn, writable: bool) -> Self {
        Self(frame.address().0 | (writable as u64) << 1 | 1)
    }

    /// From the bits above.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The frame, if there is one.
    #[must_use]
    pub const fn frame(self) -> Option<Pfn> {
        if self.0 & 1 == 0 {
            return None;
        }
        Some(Pfn((self.0 & 0x000f_ffff_ffff_f000) >> 12))
    }

    /// Whether it may be written.
    #[must_use]
    pub const fn is_writable(self) -> bool {
        self.0 & 2 != 0
    }
}

/// How a process's memory becomes guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lending {
    /// Borrowed: [`UserSpace::fault_in`] tells where a page is *now*, and the
    /// host says through [`Invalidate`] when that ends. Whoever uses the answer
    /// holds the lock under which the invalidations are counted, and compares
    /// the count from before the call (see `memory`).
    Borrowed,
    /// Held in place by [`UserSpace::pin`], for hosts that cannot report
    /// changes. The guest keeps what was there when a piece was pinned.
    Pinned,
}

/// Pages of a process held in place until dropped.
///
/// # Safety
/// The frames stay the process's, for all uses of the processor, until then.
pub unsafe trait PinnedPages: Send + Sync {
    /// The page of this number in what was pinned; none beyond the end.
    fn page(&self, index: usize) -> PresentPage;
}

/// For hosts that never pin.
#[derive(Debug)]
pub enum NeverPinned {}

// SAFETY: there is no such value.
unsafe impl PinnedPages for NeverPinned {
    fn page(&self, _index: usize) -> PresentPage {
        match *self {}
    }
}

/// A process's address space: where guest RAM lives.
///
/// # Safety
/// Between `watch` and `unwatch` every change of what `fault_in` and `present`
/// reported is preceded by `Invalidate::begin` and followed by `Invalidate::end`.
/// What `lending` says stays the same.
pub unsafe trait UserSpace: Send + Sync {
    /// Pages held in place.
    type Pins: PinnedPages;

    /// Whether the memory is borrowed, or has to be pinned. If pinned,
    /// `fault_in`, `present` and `watch` are not used; if borrowed, `pin` is not.
    fn lending(&self) -> Lending;

    /// Brings in and holds `pages` pages (at most 512) from `start` on, for
    /// writing where the process may write. May sleep. On a thread of the
    /// process.
    ///
    /// # Errors
    /// See [`UserFault`]; nothing is held then.
    fn pin(&self, start: Hva, pages: usize) -> Result<Self::Pins, UserFault>;

    /// Whether the calling thread belongs to this process.
    fn is_current(&self) -> bool;

    /// Whether the process has ended: no thread of it will ever run again.
    fn has_ended(&self) -> bool;

    /// Where the page behind `address` is, brought in if need be. May sleep.
    /// If it had to be brought in, up to `ahead` pages that follow it may be
    /// brought in too, where they are of the same kind, private, and cost no
    /// wait; nothing is said of them.
    ///
    /// # Errors
    /// See [`UserFault`], of the page itself.
    fn fault_in(&self, address: Hva, write: bool, ahead: u32) -> Result<HostFrame, UserFault>;

    /// Which of the pages from `first` on are there as pages of 4 KB: fills in
    /// those of `pages`, and leaves the others as they are. Brings nothing in.
    /// Looks at no other page if number `wanted` is not there, and need not
    /// look beyond the 2 MB that are around it. On a thread of the process.
    ///
    /// A page is reported writable only if the host counts it as written
    /// already: it is not told when the guest writes.
    fn present(&self, first: Hva, wanted: usize, pages: &mut [PresentPage]);

    /// Copies out of the process. May sleep. The calling thread belongs to it.
    ///
    /// # Errors
    /// [`UserFault::BadAddress`]; `bytes` may be partly filled.
    fn read(&self, address: Hva, bytes: &mut [u8]) -> Result<(), UserFault>;

    /// Copies into the process. May sleep. The calling thread belongs to it.
    ///
    /// # Errors
    /// [`UserFault::BadAddress`]; part of it may have been written.
    fn write(&self, address: Hva, bytes: &[u8]) -> Result<(), UserFault>;

    /// Atomically replaces `old` by `new` in `size` (1, 2, 4 or 8) bytes of one
    /// [`ATOMIC_LINE`], or in 16 naturally aligned bytes; returns what was
    /// there. Bytes of `new` above `size` are zero. May sleep.
    ///
    /// # Errors
    /// [`UserFault::BadAddress`].
    fn compare_exchange(
        &self,
        address: Hva,
        size: u8,
        old: u128,
        new: u128,
    ) -> Result<u128, UserFault>;

    /// Starts reports to `listener`.
    ///
    /// # Errors
    /// [`NoMemory`]: there will be no reports.
    ///
    /// # Safety
    /// `listener` stays valid and in place until `unwatch` returns. At most
    /// one listener at a time.
    unsafe fn watch(&self, listener: NonNull<dyn Invalidate>) -> Result<(), NoMemory>;

    /// Ends the reports; when it returns none is running or will come. May
    /// sleep; not called from a report.
    fn unwatch(&self);
}

/// What [`Invalidate::young`] does besides looking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aging {
    /// Nothing.
    Look,
    /// Counts the pages as unused from now on. A processor that still caches a
    /// translation may use it unnoticed until it drops that for another reason.
    Clear,
    /// As `Clear`, and each processor's uses are noticed from its next entry on.
    ClearAndFlush,
}

/// Hears that host memory is about to change under a process's addresses, and
/// is asked which of it is in use. Called by any thread, not from interrupts;
/// must not sleep, and may be called with spin locks of the host's held.
pub trait Invalidate: Sync {
    /// Translations of `start..end` are no longer good: when this returns no
    /// processor uses one. New ones are not made until the matching `end`.
    fn begin(&self, start: Hva, end: Hva);
    /// The change is done.
    fn end(&self, start: Hva, end: Hva);
    /// Whether a guest has used a page of `start..end` since it was last counted
    /// as unused. `true` where that is not known.
    fn young(&self, start: Hva, end: Hva, aging: Aging) -> bool;
}

/// A page that the kernel and one process both map. Dropping it ends both.
///
/// # Safety
/// The kernel's mapping stays for the life of the value. The process can write
/// the page at any time: never form a reference to it.
pub unsafe trait SharedPage: Send + Sync {
    /// Where the kernel sees it.
    fn kernel(&self) -> NonNull<u8>;
    /// Where the process sees it.
    fn user(&self) -> Hva;
}

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
