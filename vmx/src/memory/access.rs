//! The kernel reads and writes guest memory for the guest: operands, strings,
//! page tables.
//!
//! A copy goes through the client's addresses, piece by piece. It holds one of
//! a few sleeping locks meanwhile ("lanes"); whoever changes the map takes each
//! lane once afterwards, and so knows that no copy still uses what was mapped
//! before. Which lane a copy takes does not matter; by processor, two rarely
//! meet.

use core::cell::Cell;

use crate::Error;
use crate::arch::addr::{Gpa, Hva};
use crate::host::{ATOMIC_LINE, Host, UserSpace};
use crate::sync::Guard;

use super::protect::group;
use super::space::Inner;
use super::walk::TableMemory;
use super::{AccessError, AddressSpace};

/// The longest run of bytes one call copies; longer ones are refused.
const LONGEST: usize = 1 << 20;

impl<H: Host> AddressSpace<H> {
    /// Whether `length` bytes at `gpa` are guest RAM (for a read, or ROM).
    ///
    /// # Errors
    /// [`AccessError`] for the first byte that is not.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn check(&self, gpa: Gpa, length: usize, write: bool) -> Result<(), AccessError> {
        self.inner.pieces(gpa, length, write, &mut |_, _, _| Ok(()))
    }

    /// Reads guest memory. May sleep; on a thread of the owner's process.
    ///
    /// # Errors
    /// [`AccessError`]; `bytes` may be partly filled.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), AccessError> {
        let _lane = self.inner.lane();
        let user = &self.inner.user;
        self.inner
            .pieces(gpa, bytes.len(), false, &mut |hva, from, until| {
                let part = bytes.get_mut(from..until).ok_or(Error::Invalid)?;
                Ok(user.read(hva, part)?)
            })
    }

    /// Writes guest memory. May sleep; on a thread of the owner's process.
    ///
    /// # Errors
    /// [`AccessError`]; nothing was written, unless it is
    /// [`AccessError::Host`], or the map changed meanwhile.
    pub fn write(&self, gpa: Gpa, bytes: &[u8]) -> Result<(), AccessError> {
        let _lane = self.inner.lane();
        let user = &self.inner.user;
        self.check(gpa, bytes.len(), true)?;
        self.inner
            .pieces(gpa, bytes.len(), true, &mut |hva, from, until| {
                let part = bytes.get(from..until).ok_or(Error::Invalid)?;
                Ok(user.write(hva, part)?)
            })
    }

    /// Atomically replaces `old` by `new` in `size` (1, 2, 4 or 8) bytes of guest
    /// memory that lie in one [`ATOMIC_LINE`], or in 16 naturally aligned bytes;
    /// returns what was there. Atomic towards the other vCPUs, the client and
    /// whoever else maps the memory. May sleep; on a thread of the owner's process.
    ///
    /// # Errors
    /// [`AccessError`]; nothing was written.
    pub fn compare_exchange(
        &self,
        gpa: Gpa,
        size: u8,
        old: u128,
        new: u128,
    ) -> Result<u128, AccessError> {
        let _lane = self.inner.lane();
        self.inner.exchange(gpa, size, old, new)
    }
}

/// Accesses to guest memory that belong together: one lane for all of them, and
/// the slot is looked up only where a read leaves the piece of the last one.
/// Such a piece is good while the lane is held, as it is for a copy. To be
/// dropped before anything else takes a lane.
pub struct Reader<'a, H: Host> {
    inner: &'a Inner<H>,
    _lane: Option<Guard<'a, H::Mutex, ()>>,
    piece: Cell<Piece>,
}

/// Guest-physical addresses in one slot and protection group.
#[derive(Clone, Copy, Default)]
struct Piece {
    start: u64,
    end: u64,
    /// The client's address of `start`.
    hva: u64,
}

impl<H: Host> AddressSpace<H> {
    /// Begins a series of accesses. May sleep; on a thread of the owner's
    /// process.
    pub fn reader(&self) -> Reader<'_, H> {
        Reader {
            inner: &self.inner,
            _lane: self.inner.lane(),
            piece: Cell::default(),
        }
    }
}

impl<H: Host> Reader<'_, H> {
    /// Reads bytes that lie in one page of 4 KB.
    ///
    /// # Errors
    /// [`AccessError`].
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn read(&self, gpa: Gpa, bytes: &mut [u8]) -> Result<(), AccessError> {
        let known = self.piece.get();
        let hva = if known.start <= gpa.0 && gpa.0 < known.end {
            Hva(known.hva.wrapping_add(gpa.0.wrapping_sub(known.start)))
        } else {
            let (hva, room) = self.inner.resolve(gpa, false)?;
            self.piece.set(Piece {
                start: gpa.0,
                end: gpa.0.saturating_add(room),
                hva: hva.0,
            });
            hva
        };
        let result = self.inner.user.read(hva, bytes);
        result.map_err(|fault| AccessError::Host(fault.into()))
    }
}

impl<H: Host> TableMemory for Reader<'_, H> {
    fn entry(&self, gpa: Gpa, size: u8) -> Result<u64, AccessError> {
        let mut bytes = [0; 8];
        let part = bytes
            .get_mut(..usize::from(size))
            .ok_or(AccessError::Host(Error::Invalid))?;
        self.read(gpa, part)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn exchange(&self, gpa: Gpa, size: u8, old: u64, new: u64) -> Result<u64, AccessError> {
        let found = self.inner.exchange(gpa, size, old.into(), new.into())?;
        Ok(found as u64)
    }
}

impl<H: Host> Inner<H> {
    fn lane(&self) -> Option<Guard<'_, H::Mutex, ()>> {
        let index = self.host.current_cpu().checked_rem(self.lanes.len())?;
        Some(self.lanes.get(index)?.lock())
    }

    /// As [`AddressSpace::compare_exchange`]; a lane is held.
    fn exchange(&self, gpa: Gpa, size: u8, old: u128, new: u128) -> Result<u128, AccessError> {
        let last = gpa.0.wrapping_add(u64::from(size).wrapping_sub(1));
        let fits = match size {
            1 | 2 | 4 | 8 => gpa.0 / ATOMIC_LINE == last / ATOMIC_LINE,
            16 => gpa.is_aligned(16),
            _ => false,
        };
        if !fits {
            return Err(AccessError::Host(Error::Invalid));
        }
        let mut found = 0;
        // In one line, so within one page: one piece.
        self.pieces(gpa, usize::from(size), true, &mut |hva, _, _| {
            found = self.user.compare_exchange(hva, size, old, new)?;
            Ok(())
        })?;
        Ok(found)
    }

    /// Calls `each` for every run of the `length` bytes at `gpa` that one slot
    /// backs: its client address, and which of the bytes it is.
    fn pieces(
        &self,
        gpa: Gpa,
        length: usize,
        write: bool,
        each: &mut dyn FnMut(Hva, usize, usize) -> Result<(), Error>,
    ) -> Result<(), AccessError> {
        if length > LONGEST || gpa.checked_add(length as u64).is_none() {
            return Err(AccessError::Host(Error::Invalid));
        }
        let mut done = 0;
        while done < length {
            let here = gpa.wrapping_add(done as u64);
            let (hva, room) = self.resolve(here, write)?;
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            let until = done.saturating_add(room).min(length);
            each(hva, done, until).map_err(AccessError::Host)?;
            done = until;
        }
        Ok(())
    }

    /// The client's address of `gpa`, and how many bytes go on from there in
    /// the same slot and protection group.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn resolve(&self, gpa: Gpa, write: bool) -> Result<(Hva, u64), AccessError> {
        let core = self.core.lock();
        let slot = core.slots.find(gpa.0).ok_or(AccessError::Mmio(gpa))?;
        let here = group(gpa.0);
        if let Some(first) = core.protected.first_in(here.start, here.end) {
            return Err(AccessError::Protected(Gpa(first)));
        }
        if write && slot.rom {
            return Err(AccessError::RomWrite(gpa));
        }
        let end = slot.end.min(here.end);
        Ok((Hva(slot.hva_of(gpa.0)), end.saturating_sub(gpa.0)))
    }
}
