//! Where log lines go: the kernel's log, by way of the C half.
// UNSAFETY: hands a text's address to the C half.
#![expect(unsafe_code)]

use core::fmt::{self, Write};

use log::{LevelFilter, Log, Metadata, Record};

use crate::ffi;

/// Longest line, in bytes; the rest is cut off.
const LINE: usize = 320;

struct KernelLog;

static KERNEL_LOG: KernelLog = KernelLog;

/// A line on the stack: logging allocates nothing.
struct Line {
    bytes: [u8; LINE],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.length).zip(text.bytes()) {
            *to = from;
            self.length = self.length.saturating_add(1);
        }
        Ok(())
    }
}

impl Log for KernelLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut line = Line {
            bytes: [0; LINE],
            length: 0,
        };
        // A line's writer cannot fail; an argument that does loses its text only.
        let _ = line.write_fmt(*record.args());
        // SAFETY: `length` bytes of the line were written, and it outlives the call.
        unsafe { ffi::haxm_os_log(record.level() as u32, line.bytes.as_ptr(), line.length) };
    }

    fn flush(&self) {}
}

/// Sends the `log` crate's lines to the kernel.
pub(crate) fn install() {
    // It fails only when there is one already: ours, as nobody else installs any.
    let _ = log::set_logger(&KERNEL_LOG);
}

/// 0 off, 1 errors, and so on to 5.
pub(crate) fn set_level(level: u32) {
    log::set_max_level(match level {
        0 => LevelFilter::Off,
        1 => LevelFilter::Error,
        2 => LevelFilter::Warn,
        3 => LevelFilter::Info,
        4 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    });
}
