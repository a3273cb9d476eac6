//! The tunnel and the I/O buffer: two pages shared with the client.
//!
//! The client can write both at any time, so nothing here is a reference to
//! them: each word is one volatile access, and what is read is checked where
//! it is used. What this vCPU must remember it remembers elsewhere.
// UNSAFETY: volatile access to pages that a user-space process can write.
#![expect(unsafe_code)]

use abi::tunnel::{FastMmio, Tunnel};
use core::mem::offset_of;

use crate::arch::addr::Hva;
use crate::fallible::NoMemory;
use crate::host::{Host, SharedPage};

/// Bytes of the I/O buffer that the interface defines.
pub const IO_BUFFER_SIZE: usize = abi::tunnel::IO_BUFFER_SIZE;

/// The two shared pages of a vCPU.
pub struct Channel<H: Host> {
    tunnel: H::SharedPage,
    buffer: H::SharedPage,
}

impl<H: Host> Channel<H> {
    /// Makes both pages and maps them into the calling process.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(host: &H) -> Result<Self, NoMemory> {
        Ok(Self {
            tunnel: host.shared_page()?,
            buffer: host.shared_page()?,
        })
    }

    /// Where the client sees the tunnel.
    pub fn tunnel_address(&self) -> Hva {
        self.tunnel.user()
    }

    /// Where the client sees the I/O buffer.
    pub fn buffer_address(&self) -> Hva {
        self.buffer.user()
    }

    fn get<T: Copy>(&self, offset: usize) -> T {
        let at = self
            .tunnel
            .kernel()
            .as_ptr()
            .wrapping_add(offset)
            .cast::<T>();
        // SAFETY: offset_of!(Tunnel, ..) of a T lies in the page and is aligned
        // for T; T is an integer, so any bytes are a value.
        unsafe { at.read_volatile() }
    }

    fn set<T: Copy>(&self, offset: usize, value: T) {
        let at = self
            .tunnel
            .kernel()
            .as_ptr()
            .wrapping_add(offset)
            .cast::<T>();
        // SAFETY: as in `get`.
        unsafe { at.write_volatile(value) };
    }

    /// The basic exit reason, or the client's request to pause.
    pub fn exit_reason(&self) -> u32 {
        self.get(offset_of!(Tunnel, exit_reason))
    }

    /// Tells the basic exit reason.
    pub fn set_exit_reason(&self, reason: u32) {
        self.set(offset_of!(Tunnel, exit_reason), reason);
    }

    /// Tells why RUN returned.
    pub fn set_exit_status(&self, status: u32) {
        self.set(offset_of!(Tunnel, exit_status), status);
    }

    /// Bit 0: the client wants RUN to return.
    pub fn user_event(&self) -> u32 {
        self.get(offset_of!(Tunnel, user_event_pending))
    }

    /// Takes the client's wish away.
    pub fn set_user_event(&self, value: u32) {
        self.set(offset_of!(Tunnel, user_event_pending), value);
    }

    /// 1: INTERRUPT would be queued and delivered soon.
    pub fn set_ready(&self, value: u32) {
        self.set(offset_of!(Tunnel, ready_for_interrupt_injection), value);
    }

    /// Non-zero: return as soon as the guest can take an interrupt.
    pub fn window(&self) -> u32 {
        self.get(offset_of!(Tunnel, request_interrupt_window))
    }

    /// Tells the guest's IA32_APIC_BASE.
    pub fn set_apic_base(&self, value: u64) {
        self.set(offset_of!(Tunnel, apic_base), value);
    }

    /// Stores `bytes`, at most 24, in the exit's own part of the tunnel: in
    /// words, the last of which may end with zeros.
    pub fn set_view(&self, bytes: &[u8]) {
        let start = offset_of!(Tunnel, view);
        for (i, part) in bytes.chunks(8).take(3).enumerate() {
            let mut word = [0; 8];
            if let Some(used) = word.get_mut(..part.len()) {
                used.copy_from_slice(part);
            }
            let at = start.wrapping_add(i.wrapping_mul(8));
            self.set(at, u64::from_le_bytes(word));
        }
    }

    /// [`Channel::set_view`] of all 24 bytes.
    #[inline]
    pub fn set_view_words(&self, words: [u64; 3]) {
        let start = offset_of!(Tunnel, view);
        let [first, second, third] = words;
        self.set(start, first);
        self.set(start.wrapping_add(8), second);
        self.set(start.wrapping_add(16), third);
    }

    /// Puts the low 1, 2 or 4 bytes of a value at the start of the I/O buffer.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "the low bytes are meant")]
    pub fn set_element(&self, value: u64, size: u8) {
        match size {
            1 => self.set_record(0, value as u8),
            2 => self.set_record(0, value as u16),
            _ => self.set_record(0, value as u32),
        }
    }

    /// Copies from the I/O buffer; what lies past its 64 bytes stays as it is.
    pub fn read_buffer(&self, offset: usize, into: &mut [u8]) {
        let room = IO_BUFFER_SIZE.saturating_sub(offset);
        for (i, byte) in into.iter_mut().take(room).enumerate() {
            let at = offset.wrapping_add(i);
            let from = self.buffer.kernel().as_ptr().wrapping_add(at);
            // SAFETY: `at` is below 64, inside the page.
            *byte = unsafe { from.read_volatile() };
        }
    }

    /// Copies to the I/O buffer; what lies past its 64 bytes is dropped.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn write_buffer(&self, offset: usize, from: &[u8]) {
        let room = IO_BUFFER_SIZE.saturating_sub(offset).min(from.len());
        let from = from.get(..room).unwrap_or_default();
        let mut to = self.buffer.kernel().as_ptr().wrapping_add(offset);
        for part in from.chunks(8) {
            if let (Ok(word), 0) = (<[u8; 8]>::try_from(part), offset & 7) {
                let word = u64::from_ne_bytes(word);
                // SAFETY: eight bytes below 64, inside the page, and aligned.
                unsafe { to.cast::<u64>().write_volatile(word) };
                to = to.wrapping_add(8);
                continue;
            }
            for byte in part {
                // SAFETY: below 64, inside the page.
                unsafe { to.write_volatile(*byte) };
                to = to.wrapping_add(1);
            }
        }
    }

    /// Fills the fast-MMIO record: `direction` 0 is a read, 1 a write.
    pub fn set_fast_mmio(&self, gpa: u64, value: u64, size: u8, direction: u8) {
        self.set_record(offset_of!(FastMmio, gpa), gpa);
        self.set_record(offset_of!(FastMmio, value), value);
        self.set_record(offset_of!(FastMmio, size), size);
        self.set_record(offset_of!(FastMmio, direction), direction);
    }

    /// Whether the fast-MMIO record is a write to this address, unless the
    /// client has changed it.
    pub fn is_fast_mmio_write_to(&self, gpa: u64) -> bool {
        let place = self.buffer.kernel().as_ptr();
        let at = place.wrapping_add(offset_of!(FastMmio, gpa));
        // SAFETY: inside the page and aligned, by the record's layout.
        let address = unsafe { at.cast::<u64>().read_volatile() };
        let at = place.wrapping_add(offset_of!(FastMmio, direction));
        // SAFETY: as above.
        address == gpa && unsafe { at.read_volatile() } == 1
    }

    /// The value a client put into the fast-MMIO record for a read.
    pub fn fast_mmio_value(&self) -> u64 {
        let place = self.buffer.kernel().as_ptr();
        let at = place.wrapping_add(offset_of!(FastMmio, value));
        // SAFETY: inside the page and aligned, by the record's layout.
        unsafe { at.cast::<u64>().read_volatile() }
    }

    /// Sets a field of the fast-MMIO record, or the first element.
    #[inline]
    fn set_record<T: Copy>(&self, offset: usize, value: T) {
        let at = self.buffer.kernel().as_ptr().wrapping_add(offset);
        // SAFETY: offset_of!(FastMmio, ..) of a T, or 0, lies in the page and
        // is aligned for T.
        unsafe { at.cast::<T>().write_volatile(value) };
    }
}
