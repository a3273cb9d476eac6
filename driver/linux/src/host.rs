//! The host seam: what Linux lends the core.
// UNSAFETY: implements an unsafe trait over the C half.
#![expect(unsafe_code)]

use core::ffi::c_void;
use core::ptr::NonNull;

use vmx::arch::addr::Hpa;
use vmx::cpu::native::Native;
use vmx::fallible::NoMemory;
use vmx::host::{CpuOffline, Host, HostPage, Mitigations, Taken};

use crate::lock::{Mutex, Spin};
use crate::shared::Page;
use crate::user::Process;
use crate::{ffi, usage};

/// Linux, on this machine.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Linux;

/// What `run_on` and `run_on_all` pass through the C half: a thin pointer to this.
type Call<'a> = &'a (dyn Fn() + Sync);

/// Runs what a [`Call`] of `run_on` or `run_on_all` points to.
///
/// # Safety
/// `call` is what they gave the C half, and they have not returned.
pub(crate) unsafe fn run_call(call: *const c_void) {
    // SAFETY: the caller's contract.
    let call = unsafe { call.cast::<Call<'_>>().read() };
    call();
}

fn thin(call: &Call<'_>) -> *mut c_void {
    (&raw const *call).cast_mut().cast()
}

// SAFETY: each method is the kernel's own means to that end; pages are the kernel's and stay until
// freed, its preemption count pins, its cross calls run where they say, its locks exclude.
unsafe impl Host for Linux {
    type Cpu = Native;
    type Mutex = Mutex;
    type Spin = Spin;
    type UserSpace = Process;
    type SharedPage = Page;

    fn cpu(&self) -> &Native {
        &Native
    }

    fn alloc_page(&self) -> Result<HostPage, NoMemory> {
        let mut physical = 0;
        // SAFETY: the result is our local.
        let page = unsafe { ffi::haxm_os_page_alloc(&raw mut physical) };
        let address = NonNull::new(page.cast()).ok_or(NoMemory)?;
        usage::page_taken();
        Ok(HostPage {
            address,
            physical: Hpa(physical),
        })
    }

    unsafe fn free_page(&self, page: HostPage) {
        usage::page_given_back();
        // SAFETY: the caller gives back a page of `alloc_page`.
        unsafe { ffi::haxm_os_page_free(page.address.as_ptr().cast()) };
    }

    fn cpu_limit(&self) -> usize {
        ffi::haxm_os_cpu_limit() as usize
    }

    fn current_cpu(&self) -> usize {
        ffi::haxm_os_cpu_current() as usize
    }

    fn preempt_off(&self) {
        ffi::haxm_os_preempt_off();
    }

    unsafe fn preempt_on(&self) {
        // SAFETY: the caller pairs it.
        unsafe { ffi::haxm_os_preempt_on() };
    }

    fn interrupts_save(&self) -> usize {
        ffi::haxm_os_irq_save()
    }

    unsafe fn interrupts_restore(&self, saved: usize) {
        // SAFETY: the caller pairs it.
        unsafe { ffi::haxm_os_irq_restore(saved) };
    }

    fn run_on(&self, cpu: usize, call: &(dyn Fn() + Sync)) -> Result<(), CpuOffline> {
        let cpu = u32::try_from(cpu).map_err(|_| CpuOffline)?;
        // SAFETY: the C half waits for the call, so it outlives it.
        match unsafe { ffi::haxm_os_run_on(cpu, thin(&call)) } {
            0 => Ok(()),
            _ => Err(CpuOffline),
        }
    }

    fn run_on_all(&self, call: &(dyn Fn() + Sync)) {
        // SAFETY: the C half waits for all calls, so it outlives them.
        unsafe { ffi::haxm_os_run_on_all(thin(&call)) };
    }

    fn kick(&self, cpu: usize) {
        if let Ok(cpu) = u32::try_from(cpu) {
            ffi::haxm_os_kick(cpu);
        }
    }

    unsafe fn set_vmxe(&self, on: bool) {
        // SAFETY: the caller is pinned, and not in VMX operation when it clears the bit.
        unsafe { ffi::haxm_os_set_vmxe(u32::from(on)) };
    }

    fn keeps_vmxe(&self) -> bool {
        ffi::haxm_os_keeps_vmxe() != 0
    }

    fn is_in_vmx_operation(&self) -> bool {
        ffi::haxm_os_in_vmx_operation() != 0
    }

    fn mitigations(&self) -> Mitigations {
        match ffi::haxm_os_mitigations() {
            0 => Mitigations::Off,
            1 => Mitigations::Needed,
            _ => Mitigations::All,
        }
    }

    /// The kernel's own reading of that register (`__rdgsbase_inactive`) relies on it.
    fn tolerates_gs(&self) -> bool {
        true
    }

    fn guest_left(&self) {
        ffi::haxm_os_guest_left();
    }

    fn hears_signals(&self) -> bool {
        ffi::haxm_os_hears_signals() != 0
    }

    fn signals_sent(&self) -> u32 {
        ffi::haxm_os_signals_sent()
    }

    fn thread_turn(&self) -> u64 {
        ffi::haxm_os_thread_turn()
    }

    fn yield_now(&self) {
        ffi::haxm_os_yield();
    }

    fn event_pending(&self) -> bool {
        ffi::haxm_os_event_pending() != 0
    }

    fn guest_begin(&self, signals: u32) -> Option<Taken> {
        // Interrupts are on at a request, so there is nothing to save.
        let begun = ffi::haxm_os_guest_begin(signals);
        let (cpu, foreign_msrs) = match usize::try_from(begun) {
            Ok(cpu) => (cpu, false),
            Err(_) if begun == ffi::BEGUN_WITH_FOREIGN_MSRS => (self.current_cpu(), true),
            Err(_) => return None,
        };
        Some(Taken {
            cpu,
            saved: 0,
            foreign_msrs,
        })
    }

    unsafe fn guest_end(&self, _: Taken) {
        // SAFETY: the caller pairs it, and has put XCR0 and GDTR back.
        unsafe { ffi::haxm_os_guest_end() };
    }

    fn fpu_begin(&self) {
        ffi::haxm_os_fpu_begin();
    }

    unsafe fn fpu_end(&self) {
        // SAFETY: the caller pairs it, and has put XCR0 back.
        unsafe { ffi::haxm_os_fpu_end() };
    }

    fn monotonic_ns(&self) -> u64 {
        ffi::haxm_os_monotonic_ns()
    }

    fn user_space(&self) -> Result<Process, NoMemory> {
        Process::current()
    }

    fn shared_page(&self) -> Result<Page, NoMemory> {
        Page::new()
    }
}
