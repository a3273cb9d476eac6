//! The entry points the C half calls; `haxm.h` declares them again.
// UNSAFETY: exports functions to another language, and takes pointers from it.
#![expect(unsafe_code)]

use core::ffi::{c_int, c_long, c_void};

use vmx::arch::addr::Hva;

use crate::{ffi, host, logger, user};

const ENODEV: c_int = 19;

/// See `haxm.h`.
#[unsafe(no_mangle)]
extern "C" fn haxm_core_set_log_level(level: u32) {
    logger::set_level(level);
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_load() -> c_int {
    logger::install();
    let result = ffi::haxm_os_node_create(0, 0, 0);
    log::info!("version {} loaded", env!("CARGO_PKG_VERSION"));
    result
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_unload() {
    ffi::haxm_os_node_remove(0, 0, 0);
    log::info!("unloaded");
}

#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_open(_: u32, _: u32, _: u32, _: *mut *mut c_void) -> c_int {
    ENODEV.saturating_neg()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_release(_: *mut c_void) {}

#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_ioctl(_: *mut c_void, _: u32, _: u64) -> c_long {
    c_long::from(ENODEV.saturating_neg())
}

/// Runs what `run_on` and `run_on_all` gave.
#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_call(call: *mut c_void) {
    // SAFETY: the C half passes on what it got, while its giver waits.
    unsafe { host::run_call(call) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_invalidate_begin(listener: *mut c_void, start: u64, end: u64) {
    // SAFETY: the C half reports to what it was given, until the watch ends.
    unsafe { user::report(listener, |l| l.begin(Hva(start), Hva(end))) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_invalidate_end(listener: *mut c_void, start: u64, end: u64) {
    // SAFETY: as above.
    unsafe { user::report(listener, |l| l.end(Hva(start), Hva(end))) };
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_cpu_online(_cpu: u32) {}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_cpu_offline(_cpu: u32) {}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_suspend() {}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_resume() {}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_reboot() {}
