//! Memory of this process that becomes a guest's.
// UNSAFETY: mmap, and access to memory that a guest writes too, always volatile.
#![expect(unsafe_code)]

use anyhow::{Result, ensure};

const LARGE: u64 = 2 << 20;

/// Anonymous memory that starts on a 2 MB boundary and is not populated.
pub struct Ram {
    mapping: u64,
    length: u64,
    start: u64,
    size: u64,
}

impl Ram {
    /// Memory in 4 KB pages.
    pub fn new(size: u64) -> Result<Self> {
        let length = size + LARGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let got =
            unsafe { libc::mmap(std::ptr::null_mut(), length as usize, access, flags, -1, 0) };
        ensure!(got != libc::MAP_FAILED, "no memory for a guest");
        let mapping = got as u64;
        let ram = Self {
            mapping,
            length,
            start: mapping.next_multiple_of(LARGE),
            size,
        };
        ram.advise(0, size, libc::MADV_NOHUGEPAGE)?;
        Ok(ram)
    }

    fn advise(&self, offset: u64, size: u64, advice: i32) -> Result<()> {
        let at = (self.start + offset) as *mut libc::c_void;
        // SAFETY: inside our mapping; neither advice changes what is there.
        let result = unsafe { libc::madvise(at, size as usize, advice) };
        ensure!(result == 0, "madvise: {}", std::io::Error::last_os_error());
        Ok(())
    }

    /// Lets the kernel use 2 MB pages for a range.
    pub fn large(&self, offset: u64, size: u64) -> Result<()> {
        self.advise(offset, size, libc::MADV_HUGEPAGE)
    }

    pub const fn address(&self) -> u64 {
        self.start
    }

    pub const fn size(&self) -> u64 {
        self.size
    }

    fn place(&self, offset: u64, length: u64) -> *mut u8 {
        assert!(offset + length <= self.size, "outside the guest's memory");
        (self.start + offset) as *mut u8
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.place(offset, bytes.len() as u64);
        for (at, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping, by `place`.
            unsafe { to.wrapping_add(at).write_volatile(*byte) };
        }
    }

    pub fn u32(&self, offset: u64) -> u32 {
        let from = self.place(offset, 4).cast::<u32>();
        // SAFETY: inside the mapping, by `place`; offsets are multiples of four.
        unsafe { from.read_volatile() }
    }

    /// Has the host populate a range.
    pub fn touch(&self, offset: u64, size: u64) {
        for page in (offset..offset + size).step_by(4096) {
            self.write(page, &[1]);
        }
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: our mapping; nothing refers to it any more.
        unsafe { libc::munmap(self.mapping as *mut libc::c_void, self.length as usize) };
    }
}
