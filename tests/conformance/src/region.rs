//! Buffers that the host moves, merges, swaps out and maps in large pages while a guest uses them: how the
//! process asks for it, and how it sees what has happened.
// UNSAFETY: memory mapping calls; memory that a guest writes too is only read and written as volatile.
#![expect(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Bytes of a page.
pub const PAGE: u64 = 0x1000;
/// Bytes of a large page.
pub const LARGE: u64 = 2 << 20;
/// Bytes of a huge page.
pub const HUGE: u64 = 1 << 30;

/// What every eight bytes of a buffer hold: `first`, and `step` more each time.
#[derive(Clone, Copy, Debug)]
pub struct Pattern {
    pub first: u64,
    pub step: u64,
}

impl Pattern {
    /// The same from this byte on, a multiple of 8.
    pub const fn from(self, offset: u64) -> Self {
        let first = self.first.wrapping_add(self.step.wrapping_mul(offset / 8));
        Self { first, ..self }
    }
}

/// The setting of large pages; a kernel with PREEMPT_RT has none.
pub const LARGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Whether the kernel has large pages for ordinary memory.
pub fn has_large_pages() -> bool {
    Path::new(LARGE_PAGES).exists()
}

/// Memory of this process, not populated.
pub struct Region {
    mapping: u64,
    length: u64,
    start: u64,
    size: u64,
}

impl Region {
    /// Anonymous memory that starts on a 2 MB boundary, in pages of 4 KB unless it is advised otherwise.
    pub fn new(size: u64) -> Result<Self> {
        let mut region = Self::mapped(size + LARGE, libc::MAP_NORESERVE)?;
        region.start = region.mapping.next_multiple_of(LARGE);
        region.size = size;
        // A kernel without large pages does not know the advice.
        if has_large_pages() {
            region.advise(0, size, libc::MADV_NOHUGEPAGE)?;
        }
        Ok(region)
    }

    /// A page of 1 GB of hugetlbfs.
    pub fn huge() -> Result<Self> {
        Self::mapped(HUGE, libc::MAP_HUGETLB | libc::MAP_HUGE_1GB)
    }

    fn mapped(length: u64, flags: i32) -> Result<Self> {
        Self::map(length, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags, -1)
    }

    /// The start of a file, shared with it or copied from it.
    pub fn of_file(file: &File, size: u64, shared: bool) -> Result<Self> {
        let flags = if shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        Self::map(size, flags, file.as_raw_fd())
    }

    fn map(length: u64, flags: i32, file: i32) -> Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let place = std::ptr::null_mut();
        // SAFETY: a new mapping where the kernel likes.
        let got = unsafe { libc::mmap(place, length as usize, access, flags, file, 0) };
        ensure!(
            got != libc::MAP_FAILED,
            "mmap: {}",
            io::Error::last_os_error()
        );
        let mapping = got as u64;
        Ok(Self {
            mapping,
            length,
            start: mapping,
            size: length,
        })
    }

    /// Address of the first byte.
    pub const fn address(&self) -> u64 {
        self.start
    }

    /// Bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// `madvise` of a range.
    pub fn advise(&self, offset: u64, length: u64, advice: i32) -> Result<()> {
        ensure!(offset + length <= self.size, "outside the buffer");
        let at = (self.start + offset) as *mut libc::c_void;
        // SAFETY: inside our mapping, into which nobody holds a reference.
        let result = unsafe { libc::madvise(at, length as usize, advice) };
        ensure!(
            result == 0,
            "madvise {advice}: {}",
            io::Error::last_os_error()
        );
        Ok(())
    }

    fn place(&self, offset: u64) -> *mut u64 {
        assert!(offset + 8 <= self.size && offset % 8 == 0);
        (self.start + offset) as *mut u64
    }

    /// Eight bytes.
    pub fn get(&self, offset: u64) -> u64 {
        // SAFETY: inside the mapping, by `place`.
        unsafe { self.place(offset).read_volatile() }
    }

    /// Writes eight bytes.
    pub fn set(&self, offset: u64, value: u64) {
        // SAFETY: inside the mapping, by `place`.
        unsafe { self.place(offset).write_volatile(value) };
    }

    /// Writes the pattern over the whole buffer.
    pub fn fill(&self, pattern: Pattern) {
        let mut value = pattern.first;
        for offset in (0..self.size).step_by(8) {
            self.set(offset, value);
            value = value.wrapping_add(pattern.step);
        }
    }

    /// Fails unless the whole buffer holds the pattern.
    pub fn check(&self, pattern: Pattern) -> Result<()> {
        let mut value = pattern.first;
        for offset in (0..self.size).step_by(8) {
            let found = self.get(offset);
            ensure!(
                found == value,
                "{found:#x} instead of {value:#x} at {offset:#x} of the buffer"
            );
            value = value.wrapping_add(pattern.step);
        }
        Ok(())
    }

    /// Fills the buffer from the start of a file.
    pub fn read_from(&self, file: &File) -> Result<()> {
        let to = self.start as *mut libc::c_void;
        // SAFETY: inside our mapping, into which nobody holds a reference.
        let got = unsafe { libc::pread(file.as_raw_fd(), to, self.size as usize, 0) };
        ensure!(
            got == self.size as isize,
            "read {got}: {}",
            io::Error::last_os_error()
        );
        Ok(())
    }

    /// The kernel's word on each 4 KB page.
    pub fn pages(&self) -> Result<Vec<PageState>> {
        let file = File::open("/proc/self/pagemap").context("pagemap")?;
        let mut bytes = vec![0; (self.size / PAGE * 8) as usize];
        file.read_exact_at(&mut bytes, self.start / PAGE * 8)?;
        let words = bytes
            .chunks_exact(8)
            .filter_map(|word| word.try_into().ok());
        Ok(words
            .map(|word| PageState(u64::from_le_bytes(word)))
            .collect())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: our mapping, which nobody uses any more.
        unsafe { libc::munmap(self.mapping as *mut libc::c_void, self.length as usize) };
    }
}

/// An entry of `/proc/self/pagemap`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PageState(u64);

impl PageState {
    /// On the swap device.
    pub const fn is_swapped(self) -> bool {
        self.0 & (1 << 62) != 0
    }

    /// Written since `/proc/self/clear_refs` was last written "4".
    pub const fn is_soft_dirty(self) -> bool {
        self.0 & (1 << 55) != 0
    }

    /// The host's page frame, if it is in memory.
    pub const fn frame(self) -> Option<u64> {
        if self.0 & (1 << 63) == 0 {
            return None;
        }
        Some(self.0 & ((1 << 55) - 1))
    }
}

/// A file in memory, of zeros.
pub fn memory_file(size: u64) -> Result<File> {
    // SAFETY: a C string and no flags.
    let file = unsafe { libc::memfd_create(c"guest".as_ptr(), 0) };
    ensure!(file >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: new, and nobody else has it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(file) });
    file.set_len(size)?;
    Ok(file)
}

/// Makes a hole of a range of a file.
pub fn punch(file: &File, offset: u64, length: u64) -> Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the file is open.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, length as i64) };
    ensure!(result == 0, "fallocate: {}", io::Error::last_os_error());
    Ok(())
}

/// A swap area on a block device, in use until it is dropped.
pub struct Swap(std::ffi::CString);

impl Swap {
    /// Writes a swap area's header on the device and uses it.
    pub fn on(device: &str) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(device)
            .with_context(|| device.to_owned())?;
        let pages = io::Seek::seek(&mut &file, io::SeekFrom::End(0))? / PAGE;
        // Behind 1 KB for a boot loader: version 1, the last page, no bad pages; the end tells what it is.
        let mut header = vec![0; PAGE as usize];
        header.splice(1024..1028, 1_u32.to_le_bytes());
        header.splice(1028..1032, (pages as u32 - 1).to_le_bytes());
        header.splice(PAGE as usize - 10.., *b"SWAPSPACE2");
        file.write_all_at(&header, 0)?;
        file.sync_all()?;
        let path = std::ffi::CString::new(device)?;
        // SAFETY: the path is a C string.
        let result = unsafe { libc::swapon(path.as_ptr(), 0) };
        ensure!(result == 0, "swapon: {}", io::Error::last_os_error());
        Ok(Self(path))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: the path is a C string.
        unsafe { libc::swapoff(self.0.as_ptr()) };
    }
}

/// Mounts the control groups (version 2) on a directory.
pub fn mount_control_groups(at: &Path) -> Result<()> {
    let at = std::ffi::CString::new(at.as_os_str().as_encoded_bytes())?;
    let kind = c"cgroup2".as_ptr();
    // SAFETY: three C strings and no data.
    let result = unsafe { libc::mount(kind, at.as_ptr(), kind, 0, std::ptr::null()) };
    ensure!(result == 0, "mount: {}", io::Error::last_os_error());
    Ok(())
}

/// Unmounts what is mounted on a directory, when nobody uses it any more.
pub fn unmount(at: &Path) {
    let Ok(at) = std::ffi::CString::new(at.as_os_str().as_encoded_bytes()) else {
        return;
    };
    // SAFETY: a C string.
    unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH) };
}
