//! The entry points the C half calls, as `haxm.h` declares them.
// UNSAFETY: exports functions to another language, and takes pointers from it.
#![expect(unsafe_code)]

use alloc::boxed::Box;
use core::ffi::{c_int, c_long, c_void};
use core::mem::ManuallyDrop;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, Ordering};

use abi::Os;
use driver::{Devices, LoadError, Node, Opened};
use vmx::arch::addr::Hva;
use vmx::fallible::{NoMemory, Shared, try_box};
use vmx::host::Aging;
use vmx::{Hypervisor, StartError};

use crate::host::Linux;
use crate::{host, logger, shim, usage, user};

/// The devices of this module, from the end of load to the start of unload. `Some` then: the place
/// is made before the devices, so that nothing can fail after them.
static DEVICES: AtomicPtr<Option<Devices<Linux>>> = AtomicPtr::new(null_mut());

// errno values of the generic Linux ABI, as the kernel returns them.
const EAGAIN: c_int = -11;
const ENOMEM: c_int = -12;
const ENODEV: c_int = -19;
const EIO: c_int = -5;

fn devices() -> Option<&'static Devices<Linux>> {
    // SAFETY: null, or a place that lasts until unload; the module cannot be unloaded while
    // something runs in it.
    let place = unsafe { DEVICES.load(Ordering::Acquire).as_ref() };
    place.and_then(Option::as_ref)
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_set_log_level(level: u32) {
    logger::set_level(level);
}

/// Pages that the module holds.
#[unsafe(no_mangle)]
extern "C" fn haxm_core_pages() -> u64 {
    usage::pages()
}

/// Bytes that it holds besides.
#[unsafe(no_mangle)]
extern "C" fn haxm_core_bytes() -> u64 {
    usage::bytes()
}

fn load() -> Result<(), c_int> {
    let core = Hypervisor::new(Linux).map_err(|error| match error {
        // HAXM's answer; the reason is in the log.
        StartError::Unsupported(_) => EAGAIN,
        StartError::NoMemory => ENOMEM,
    })?;
    let mut place = try_box(None).map_err(|NoMemory| ENOMEM)?;
    let devices = Devices::load(Linux, core, Os::Linux).map_err(|error| match error {
        LoadError::NoMemory => ENOMEM,
        LoadError::Node => EIO,
    })?;
    *place = Some(devices);
    DEVICES.store(Box::into_raw(place), Ordering::Release);
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_load() -> c_int {
    logger::install();
    match load() {
        Ok(()) => {
            log::info!("version {} loaded", env!("CARGO_PKG_VERSION"));
            0
        }
        Err(errno) => {
            log::error!("not loaded (error {errno})");
            errno
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_unload() {
    let place = DEVICES.swap(null_mut(), Ordering::AcqRel);
    if place.is_null() {
        return;
    }
    // SAFETY: made by `load`, taken once; nothing is open and the C half has ended the calls about
    // processors, so nobody else has a reference.
    let place = unsafe { Box::from_raw(place) };
    if let Some(devices) = place.as_ref() {
        devices.unload();
    }
    drop(place);
    log::info!("unloaded");
}

/// # Safety
/// `handle` can be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_open(
    kind: u32,
    vm: u32,
    vcpu: u32,
    handle: *mut *mut c_void,
) -> c_int {
    let Some((devices, node)) = devices().zip(shim::node(kind, vm, vcpu)) else {
        return ENODEV;
    };
    match devices.open(node) {
        Ok(opened) => {
            let raw = Shared::into_raw(opened).cast_mut().cast();
            // SAFETY: the caller's contract.
            unsafe { handle.write(raw) };
            0
        }
        Err(status) => status.code(),
    }
}

/// # Safety
/// `handle` came from `haxm_core_open` and is not used after this.
#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_release(handle: *mut c_void) {
    // SAFETY: the caller's contract: taken back once.
    let opened: Opened<Linux> = unsafe { Shared::from_raw(handle.cast_const().cast()) };
    if let Some(devices) = devices() {
        devices.close(opened);
    }
}

/// # Safety
/// `handle` came from `haxm_core_open` and stays open meanwhile.
#[unsafe(no_mangle)]
#[cfg_attr(haxm_module, optimize(speed))]
unsafe extern "C" fn haxm_core_ioctl(handle: *mut c_void, number: u32, argument: u64) -> c_long {
    // SAFETY: the file keeps the reference; this one is never dropped.
    let opened: Opened<Linux> = unsafe { Shared::from_raw(handle.cast_const().cast()) };
    let opened = ManuallyDrop::new(opened);
    let status = devices().map_or(ENODEV, |devices| {
        devices.ioctl(&opened, number, argument).code()
    });
    c_long::from(status)
}

/// Runs what `run_on` and `run_on_all` gave.
///
/// # Safety
/// `call` is what they gave, and its giver waits.
#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_call(call: *mut c_void) {
    // SAFETY: the caller's contract.
    unsafe { host::run_call(call) };
}

/// # Safety
/// `listener` was given to `haxm_os_user_watch`, and the watch has not ended.
#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_invalidate_begin(listener: *mut c_void, start: u64, end: u64) {
    // SAFETY: the caller's contract.
    unsafe { user::report(listener, |l| l.begin(Hva(start), Hva(end))) };
}

/// # Safety
/// As `haxm_core_invalidate_begin`.
#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_invalidate_end(listener: *mut c_void, start: u64, end: u64) {
    // SAFETY: the caller's contract.
    unsafe { user::report(listener, |l| l.end(Hva(start), Hva(end))) };
}

/// # Safety
/// As `haxm_core_invalidate_begin`.
#[unsafe(no_mangle)]
unsafe extern "C" fn haxm_core_young(
    listener: *mut c_void,
    start: u64,
    end: u64,
    aging: u32,
) -> u32 {
    // HAXM_AGING_* of `haxm.h`.
    let aging = match aging {
        0 => Aging::Look,
        1 => Aging::Clear,
        _ => Aging::ClearAndFlush,
    };
    // SAFETY: the caller's contract.
    u32::from(unsafe { user::report(listener, |l| l.young(Hva(start), Hva(end), aging)) })
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_cpu_online() {
    if let Some(devices) = devices() {
        devices.core().cpu_online();
    }
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_cpu_offline() {
    if let Some(devices) = devices() {
        devices.core().cpu_offline();
    }
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_sleep() {
    if let Some(devices) = devices() {
        devices.core().sleep();
    }
}

#[unsafe(no_mangle)]
extern "C" fn haxm_core_wake() {
    if let Some(devices) = devices() {
        devices.core().wake();
    }
}

/// The machine restarts or halts.
#[unsafe(no_mangle)]
extern "C" fn haxm_core_reboot() {
    if let Some(devices) = devices() {
        devices.core().suspend();
    }
}

// Kinds of nodes are checked against the other side of the border.
const _: () = {
    assert!(matches!(shim::node(0, 0, 0), Some(Node::System)));
    assert!(matches!(shim::node(1, 5, 0), Some(Node::Vm(5))));
    assert!(shim::node(3, 0, 0).is_none());
};
