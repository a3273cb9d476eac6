//! Seam 2: the operating system, and what it must lend us.
//!
//! Each shim implements [`Host`] and its companions once; so does `tests/sim`.
//! No OS is named above or below this folder.
// UNSAFETY: declares the methods whose misuse breaks the host.
#![expect(unsafe_code)]

mod guard;
mod user;

pub use guard::{InterruptsOff, OwnedPage, Pinned, Turn};
pub use user::{
    ATOMIC_LINE, Aging, HostFrame, Invalidate, Lending, NeverPinned, PinnedPages, PresentPage,
    UserFault, UserSpace,
};

use core::ptr::NonNull;

use crate::arch::addr::{Hpa, Hva};
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
