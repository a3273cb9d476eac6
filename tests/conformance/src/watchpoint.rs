//! A hardware watchpoint of this process's own, set by way of perf: it counts writes to a variable.
// UNSAFETY: perf_event_open and reading its counter.
#![expect(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, ensure};

/// `struct perf_event_attr` as far as its second published form goes, by `perf_event_open(2)`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint_type: u32,
    breakpoint_address: u64,
    breakpoint_length: u64,
}

const PERF_TYPE_BREAKPOINT: u32 = 5;
const HW_BREAKPOINT_W: u32 = 2;

/// A variable that is watched while this lives.
pub struct Watched {
    variable: Box<AtomicU64>,
    event: File,
}

impl Watched {
    /// Takes one of the processor's four breakpoints.
    pub fn new() -> Result<Self> {
        let variable = Box::new(AtomicU64::new(0));
        let attributes = Attributes {
            kind: PERF_TYPE_BREAKPOINT,
            size: size_of::<Attributes>() as u32,
            breakpoint_type: HW_BREAKPOINT_W,
            breakpoint_address: (&raw const *variable) as u64,
            breakpoint_length: 8,
            ..Attributes::default()
        };
        // SAFETY: the kernel reads as much of the attributes as their size says; this thread, any processor.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                0,
                -1,
                -1,
                0,
            )
        };
        ensure!(
            fd >= 0,
            "perf_event_open: {}",
            std::io::Error::last_os_error()
        );
        // SAFETY: a descriptor that nobody else has.
        let event = unsafe { File::from_raw_fd(fd as i32) };
        Ok(Self { variable, event })
    }

    /// Writes the variable once, and tells how many writes were seen so far.
    pub fn write(&mut self) -> Result<u64> {
        self.variable.store(1, Ordering::SeqCst);
        let mut count = [0; 8];
        self.event.read_exact(&mut count)?;
        Ok(u64::from_ne_bytes(count))
    }
}
