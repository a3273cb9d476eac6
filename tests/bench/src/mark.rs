//! Marks for the emulator that counts instructions (`tests/testbed/profiler`): NOPs, to everybody else.
//! Guest code has the marks of a sample in `measured!`.
// UNSAFETY: NOPs, and OUT to a port that nothing has.
#![expect(unsafe_code)]

use std::arch::asm;
use std::fs;

use anyhow::{Result, ensure};

/// A row begins, with its name, or (`None`) ends.
pub fn row(name: Option<&str>) {
    let mut text = [0; 16];
    for (to, from) in text.iter_mut().zip(name.unwrap_or_default().bytes()) {
        *to = from;
    }
    let name_is_there = u64::from(name.is_some());
    let text = u128::from_le_bytes(text);
    // SAFETY: a NOP.
    unsafe {
        asm!(".byte 0x0f, 0x1f, 0x80", ".long 0x4d584148",
             in("rax") name_is_there, in("rcx") text as u64, in("rdx") (text >> 64) as u64,
             options(nomem, nostack, preserves_flags));
    }
}

/// A sample begins.
#[inline]
pub fn begin() {
    // SAFETY: a NOP.
    unsafe {
        asm!(
            ".byte 0x0f, 0x1f, 0x80",
            ".long 0x4d584149",
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// A sample ends.
#[inline]
pub fn end() {
    // SAFETY: a NOP.
    unsafe {
        asm!(
            ".byte 0x0f, 0x1f, 0x80",
            ".long 0x4d58414a",
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// Gives the emulator all of `/proc/kallsyms`, and an empty line.
pub fn send_symbols() -> Result<()> {
    const PORT: u16 = 0xe9;
    let mut text = fs::read("/proc/kallsyms")?;
    text.extend(b"\n\n");
    // SAFETY: lets this process use ports; no address.
    let allowed = unsafe { libc::iopl(3) };
    ensure!(allowed == 0, "iopl: {}", std::io::Error::last_os_error());
    // SAFETY: reads the text; the port is the emulator's.
    unsafe {
        asm!("rep outsb", inout("rsi") text.as_ptr() => _, inout("rcx") text.len() => _,
             in("dx") PORT, options(nostack));
    }
    Ok(())
}
