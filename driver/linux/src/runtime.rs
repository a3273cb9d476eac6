//! What Rust itself needs of a kernel: an allocator, and a panic handler that the build then proves
//! is not linked in.
// UNSAFETY: implements the global allocator.
#![expect(unsafe_code)]

use core::alloc::{GlobalAlloc, Layout};
use core::panic::PanicInfo;

use crate::{ffi, usage};

struct KernelMemory;

// SAFETY: the C half gives memory of the size and alignment asked for, or null.
unsafe impl GlobalAlloc for KernelMemory {
    #[inline(never)]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let memory = ffi::haxm_os_alloc(layout.size(), layout.align());
        if !memory.is_null() {
            usage::taken(layout.size());
        }
        memory.cast()
    }

    #[inline(never)]
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        usage::given_back(layout.size());
        // SAFETY: the caller gives back what `alloc` gave.
        unsafe { ffi::haxm_os_free(memory.cast()) };
    }
}

#[global_allocator]
static KERNEL_MEMORY: KernelMemory = KernelMemory;

/// Required by the language; `cargo xtask module` refuses an object that can reach it.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let text = info.location().map_or("", |location| location.file());
    // SAFETY: the text is static.
    unsafe { ffi::haxm_os_panic(text.as_ptr(), text.len()) };
    // The C half ends in BUG() and does not come back.
    loop {
        core::hint::spin_loop();
    }
}
