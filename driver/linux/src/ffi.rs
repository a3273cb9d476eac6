//! The C half's functions, as `haxm.h` declares them. They are opaque: what they stand for in the
//! kernel differs between kernels.
// UNSAFETY: declares functions of another language.
#![expect(unsafe_code)]

use core::ffi::{c_char, c_int, c_void};

/// `HAXM_BEGUN_WITH_FOREIGN_MSRS`.
pub(crate) const BEGUN_WITH_FOREIGN_MSRS: c_int = -2;

unsafe extern "C" {
    /// Length in bytes; no terminator.
    pub(crate) fn haxm_os_log(level: u32, text: *const u8, length: usize);

    pub(crate) fn haxm_os_free(memory: *mut c_void);
    /// A zeroed page; its physical address goes to `physical`.
    pub(crate) fn haxm_os_page_alloc(physical: *mut u64) -> *mut c_void;
    pub(crate) fn haxm_os_page_free(page: *mut c_void);

    /// The name is NUL-terminated and static. Freed with `haxm_os_free`; so is a spin lock.
    pub(crate) fn haxm_os_mutex_new(class: u32, name: *const c_char) -> *mut c_void;
    pub(crate) fn haxm_os_mutex_lock(lock: *mut c_void);
    pub(crate) fn haxm_os_mutex_unlock(lock: *mut c_void);
    pub(crate) fn haxm_os_spin_new(class: u32, name: *const c_char) -> *mut c_void;
    pub(crate) fn haxm_os_spin_lock(lock: *mut c_void);
    pub(crate) fn haxm_os_spin_unlock(lock: *mut c_void);

    pub(crate) safe fn haxm_os_cpu_limit() -> u32;
    pub(crate) safe fn haxm_os_cpu_current() -> u32;
    pub(crate) safe fn haxm_os_preempt_off();
    pub(crate) fn haxm_os_preempt_on();
    pub(crate) safe fn haxm_os_irq_save() -> usize;
    pub(crate) fn haxm_os_irq_restore(saved: usize);
    /// Calls `haxm_core_call(call)` there, and waits. 0, or the processor is offline.
    pub(crate) fn haxm_os_run_on(cpu: u32, call: *mut c_void) -> c_int;
    pub(crate) fn haxm_os_run_on_all(call: *mut c_void);
    pub(crate) safe fn haxm_os_kick(cpu: u32);
    pub(crate) fn haxm_os_set_vmxe(on: u32);
    pub(crate) safe fn haxm_os_keeps_vmxe() -> u32;
    pub(crate) safe fn haxm_os_in_vmx_operation() -> u32;
    /// 0 none, 1 what the processor needs, 2 all.
    pub(crate) safe fn haxm_os_mitigations() -> u32;
    pub(crate) safe fn haxm_os_guest_left();
    pub(crate) safe fn haxm_os_event_pending() -> u32;
    pub(crate) safe fn haxm_os_thread_turn() -> u64;
    pub(crate) safe fn haxm_os_yield();
    /// The processor's number; or [`BEGUN_WITH_FOREIGN_MSRS`]; or -1: an event is pending, and nothing was taken.
    pub(crate) safe fn haxm_os_guest_begin(signals: u32) -> c_int;
    pub(crate) fn haxm_os_guest_end();
    pub(crate) safe fn haxm_os_fpu_begin();
    pub(crate) fn haxm_os_fpu_end();
    pub(crate) safe fn haxm_os_monotonic_ns() -> u64;

    pub(crate) safe fn haxm_os_hears_signals() -> u32;
    pub(crate) safe fn haxm_os_signals_sent() -> u32;

    /// The calling process; null if there is none, or no memory.
    pub(crate) safe fn haxm_os_user_get() -> *mut c_void;
    pub(crate) fn haxm_os_user_put(user: *mut c_void);
    pub(crate) fn haxm_os_user_is_current(user: *mut c_void) -> u32;
    pub(crate) fn haxm_os_user_has_ended(user: *mut c_void) -> u32;
    pub(crate) fn haxm_os_user_fault_in(
        user: *mut c_void,
        address: u64,
        write: u32,
        ahead: u32,
        frame: *mut u64,
        writable: *mut u32,
        shift: *mut u32,
    ) -> c_int;
    /// Writes pages as `vmx::host::PresentPage` has them.
    pub(crate) fn haxm_os_user_present(
        user: *mut c_void,
        first: u64,
        wanted: usize,
        pages: *mut u64,
        count: usize,
    );
    /// Whether processes' memory is to be pinned.
    pub(crate) safe fn haxm_os_user_pins() -> u32;
    pub(crate) fn haxm_os_user_pin(
        user: *mut c_void,
        start: u64,
        count: usize,
        pins: *mut *mut c_void,
    ) -> c_int;
    /// A page as `vmx::host::PresentPage` has it.
    pub(crate) fn haxm_os_user_pinned(pins: *mut c_void, index: usize) -> u64;
    pub(crate) fn haxm_os_user_unpin(pins: *mut c_void);
    pub(crate) fn haxm_os_user_compare_exchange(
        address: u64,
        size: u32,
        old: *mut u64,
        new: *const u64,
    ) -> c_int;
    pub(crate) fn haxm_os_user_watch(user: *mut c_void, listener: *mut c_void) -> c_int;
    pub(crate) fn haxm_os_user_unwatch(user: *mut c_void);
    pub(crate) fn haxm_os_copy_in(address: u64, to: *mut u8, length: usize) -> c_int;
    pub(crate) fn haxm_os_copy_out(address: u64, from: *const u8, length: usize) -> c_int;
    pub(crate) fn haxm_os_shared_new(kernel: *mut *mut c_void, user: *mut u64) -> *mut c_void;
    pub(crate) fn haxm_os_shared_free(shared: *mut c_void);

    pub(crate) safe fn haxm_os_node_create(kind: u32, vm: u32, vcpu: u32) -> c_int;
    pub(crate) safe fn haxm_os_node_remove(kind: u32, vm: u32, vcpu: u32);
}

#[cfg(target_os = "none")]
unsafe extern "C" {
    /// May sleep. Null if there is no memory.
    pub(crate) safe fn haxm_os_alloc(size: usize, align: usize) -> *mut c_void;
    /// Logs and stops the machine, or at least this thread.
    pub(crate) fn haxm_os_panic(text: *const u8, length: usize);
}
