//! How much kernel memory the module holds, for whoever asks: the parameter `memory`.

use core::sync::atomic::{AtomicU64, Ordering};

/// Pages given by the kernel for the processor's structures.
static PAGES: AtomicU64 = AtomicU64::new(0);
/// Bytes asked for by Rust's allocator, before the kernel rounds them up.
static BYTES: AtomicU64 = AtomicU64::new(0);

pub(crate) fn page_taken() {
    PAGES.fetch_add(1, Ordering::Relaxed);
}

pub(crate) fn page_given_back() {
    PAGES.fetch_sub(1, Ordering::Relaxed);
}

#[cfg_attr(
    not(target_os = "none"),
    expect(dead_code, reason = "the allocator is not linked")
)]
pub(crate) fn taken(bytes: usize) {
    BYTES.fetch_add(bytes as u64, Ordering::Relaxed);
}

#[cfg_attr(
    not(target_os = "none"),
    expect(dead_code, reason = "the allocator is not linked")
)]
pub(crate) fn given_back(bytes: usize) {
    BYTES.fetch_sub(bytes as u64, Ordering::Relaxed);
}

/// Pages in use.
pub(crate) fn pages() -> u64 {
    PAGES.load(Ordering::Relaxed)
}

/// Bytes in use, besides the pages.
pub(crate) fn bytes() -> u64 {
    BYTES.load(Ordering::Relaxed)
}
