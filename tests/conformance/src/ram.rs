//! Buffers of this process that become guest memory. The guest writes them, so there are no references into
//! them: bytes are copied in and out.
// UNSAFETY: memory mapping calls, and copies to and from mapped memory.
#![expect(unsafe_code)]

use std::io;
use std::ptr;

/// An anonymous private mapping of whole pages.
pub struct Ram {
    start: u64,
    size: u64,
}

impl Ram {
    /// Zeroed memory, populated when it is touched. Panics if there is none: the test machine is too small.
    pub fn new(size: u64) -> Self {
        Self::mapped(0, size, 0)
    }

    /// The same at this address. Panics if something else is there.
    pub fn at(address: u64, size: u64) -> Self {
        Self::mapped(address, size, libc::MAP_FIXED_NOREPLACE)
    }

    /// Zeroed memory in the lowest 2 GB, wherever there is room.
    pub fn low(size: u64) -> Self {
        Self::mapped(0, size, libc::MAP_32BIT)
    }

    fn mapped(address: u64, size: u64, flags: i32) -> Self {
        let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let at = ptr::without_provenance_mut(address as usize);
        // SAFETY: a new mapping, where there is none.
        let got = unsafe { libc::mmap(at, size as usize, access, flags, -1, 0) };
        assert!(
            got != libc::MAP_FAILED,
            "mmap of {size:#x}: {}",
            io::Error::last_os_error()
        );
        Self {
            start: got as u64,
            size,
        }
    }

    /// Address of the first byte.
    pub const fn address(&self) -> u64 {
        self.start
    }

    /// Bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    fn place(&self, offset: u64, length: usize) -> *mut u8 {
        let end = offset.checked_add(length as u64);
        assert!(
            end.is_some_and(|end| end <= self.size),
            "{offset:#x} + {length:#x} is outside a buffer of {:#x} bytes",
            self.size
        );
        (self.start + offset) as *mut u8
    }

    /// Copies bytes in.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.place(offset, bytes.len());
        for (at, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping, by `place`.
            unsafe { to.wrapping_add(at).write_volatile(*byte) };
        }
    }

    /// Copies bytes out.
    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let from = self.place(offset, length);
        let byte = |at| {
            // SAFETY: inside the mapping, by `place`.
            unsafe { from.wrapping_add(at).read_volatile() }
        };
        (0..length).map(byte).collect()
    }

    /// Fills a range with one byte.
    pub fn fill(&self, offset: u64, length: usize, byte: u8) {
        let to = self.place(offset, length);
        // SAFETY: inside the mapping, by `place`.
        unsafe { ptr::write_bytes(to, byte, length) };
    }

    pub fn write_u16(&self, offset: u64, value: u16) {
        self.write(offset, &value.to_le_bytes());
    }

    pub fn write_u32(&self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    pub fn write_u64(&self, offset: u64, value: u64) {
        self.write(offset, &value.to_le_bytes());
    }

    /// A little-endian number of up to eight bytes.
    pub fn number(&self, offset: u64, length: usize) -> u64 {
        let bytes = self.read(offset, length);
        let fold = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        bytes.iter().rev().fold(0, fold)
    }

    pub fn u32(&self, offset: u64) -> u32 {
        self.number(offset, 4) as u32
    }

    pub fn u64(&self, offset: u64) -> u64 {
        self.number(offset, 8)
    }

    /// Gives the pages back: they are zero when touched again.
    pub fn discard(&self, offset: u64, length: u64) {
        let at = self.place(offset, length as usize);
        // SAFETY: inside the mapping, by `place`.
        let result = unsafe { libc::madvise(at.cast(), length as usize, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "madvise: {}", io::Error::last_os_error());
    }

    /// Forbids or allows this process access to a range.
    pub fn protect(&self, offset: u64, length: u64, access: i32) {
        let at = self.place(offset, length as usize);
        // SAFETY: inside the mapping, by `place`; nothing holds a reference into it.
        let result = unsafe { libc::mprotect(at.cast(), length as usize, access) };
        assert_eq!(result, 0, "mprotect: {}", io::Error::last_os_error());
    }

    /// Takes a range out of the process's address space. It must not be touched any more.
    pub fn unmap(&self, offset: u64, length: u64) {
        let at = self.place(offset, length as usize);
        // SAFETY: inside the mapping, by `place`; nothing holds a reference into it.
        let result = unsafe { libc::munmap(at.cast(), length as usize) };
        assert_eq!(result, 0, "munmap: {}", io::Error::last_os_error());
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: our mapping; unmapping what is unmapped already does nothing.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.size as usize) };
    }
}
