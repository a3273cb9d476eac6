//! The two pages a vCPU shares with its client, read and written one field at a time.
// UNSAFETY: the driver writes these pages behind the compiler's back, so every access is volatile.
#![expect(unsafe_code)]

use abi::tunnel::{fastmmio_offset, offset};
use abi::{IO_BUFFER_SIZE, TUNNEL_SIZE, TunnelInfo};

/// Addresses of the tunnel page and the I/O buffer.
#[derive(Clone, Copy)]
pub struct Tunnel {
    page: u64,
    buffer: u64,
}

impl Tunnel {
    /// The pages SETUP_TUNNEL told of; `None` if what it told cannot be true.
    pub fn at(info: &TunnelInfo) -> Option<Self> {
        let fits = info.va != 0
            && info.io_va != 0
            && info.va % 4096 == 0
            && info.io_va % 4096 == 0
            && info.size == TUNNEL_SIZE;
        fits.then_some(Self {
            page: info.va,
            buffer: info.io_va,
        })
    }

    fn get<T: Copy>(self, at: usize) -> T {
        let from = (self.page as *const u8).wrapping_add(at).cast::<T>();
        // SAFETY: `at` is an offset of the ABI's, aligned for T and inside the page the driver mapped, which
        // stays as long as the vCPU's node is open. T is an integer.
        unsafe { from.read_volatile() }
    }

    fn set<T: Copy>(self, at: usize, value: T) {
        let to = (self.page as *mut u8).wrapping_add(at).cast::<T>();
        // SAFETY: as in `get`.
        unsafe { to.write_volatile(value) };
    }

    pub fn exit_reason(self) -> u32 {
        self.get(offset::EXIT_REASON)
    }

    pub fn set_exit_reason(self, value: u32) {
        self.set(offset::EXIT_REASON, value);
    }

    pub fn exit_status(self) -> u32 {
        self.get(offset::EXIT_STATUS)
    }

    pub fn set_exit_status(self, value: u32) {
        self.set(offset::EXIT_STATUS, value);
    }

    pub fn user_event(self) -> u32 {
        self.get(offset::USER_EVENT_PENDING)
    }

    pub fn set_user_event(self, value: u32) {
        self.set(offset::USER_EVENT_PENDING, value);
    }

    pub fn ready(self) -> u32 {
        self.get(offset::READY_FOR_INTERRUPT_INJECTION)
    }

    pub fn set_window(self, value: u32) {
        self.set(offset::REQUEST_INTERRUPT_WINDOW, value);
    }

    pub fn apic_base(self) -> u64 {
        self.get(offset::APIC_BASE)
    }

    /// Direction, DF, size, port and count of an IO exit.
    pub fn io(self) -> (u8, u8, u16, u16, u16) {
        (
            self.get(offset::IO_DIRECTION),
            self.get(offset::IO_DF),
            self.get(offset::IO_SIZE),
            self.get(offset::IO_PORT),
            self.get(offset::IO_COUNT),
        )
    }

    /// Overwrites what an IO exit told: a client that means harm.
    pub fn spoil_io(self, byte: u8) {
        for at in offset::VIEW..offset::APIC_BASE {
            self.set(at, byte);
        }
    }

    /// GPA and flags of a PAGEFAULT exit.
    pub fn page_fault(self) -> (u64, u32) {
        (
            self.get(offset::PAGEFAULT_GPA),
            self.get(offset::PAGEFAULT_FLAGS),
        )
    }

    /// RIP, DR6 and DR7 of a DEBUG exit.
    pub fn debug(self) -> (u64, u64, u64) {
        (
            self.get(offset::DEBUG_RIP),
            self.get(offset::DEBUG_DR6),
            self.get(offset::DEBUG_DR7),
        )
    }

    /// The first `count` bytes of the I/O buffer.
    pub fn buffer(self, count: usize) -> Vec<u8> {
        let count = count.min(IO_BUFFER_SIZE);
        (0..count).map(|at| self.buffer_get(at)).collect()
    }

    fn buffer_get<T: Copy>(self, at: usize) -> T {
        let from = (self.buffer as *const u8).wrapping_add(at).cast::<T>();
        // SAFETY: as in `get`, for the other page.
        unsafe { from.read_volatile() }
    }

    /// Puts bytes at the start of the I/O buffer.
    pub fn set_buffer(self, bytes: &[u8]) {
        for (at, byte) in bytes.iter().take(IO_BUFFER_SIZE).enumerate() {
            self.buffer_set(at, *byte);
        }
    }

    fn buffer_set<T: Copy>(self, at: usize, value: T) {
        let to = (self.buffer as *mut u8).wrapping_add(at).cast::<T>();
        // SAFETY: as in `get`, for the other page.
        unsafe { to.write_volatile(value) };
    }

    /// GPA, value, size and direction of a FAST_MMIO exit.
    pub fn fast_mmio(self) -> (u64, u64, u8, u8) {
        (
            self.buffer_get(fastmmio_offset::GPA),
            self.buffer_get(fastmmio_offset::VALUE),
            self.buffer_get(fastmmio_offset::SIZE),
            self.buffer_get(fastmmio_offset::DIRECTION),
        )
    }

    /// The value a FAST_MMIO read returns.
    pub fn set_fast_mmio_value(self, value: u64) {
        self.buffer_set(fastmmio_offset::VALUE, value);
    }

    /// Overwrites a FAST_MMIO record: a client that means harm.
    pub fn spoil_fast_mmio(self, gpa: u64, size: u8, direction: u8) {
        self.buffer_set(fastmmio_offset::GPA, gpa);
        self.buffer_set(fastmmio_offset::SIZE, size);
        self.buffer_set(fastmmio_offset::DIRECTION, direction);
    }
}
