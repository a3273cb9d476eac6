//! What the last instructions decoded to. An entry is found by the bytes
//! themselves, fetched anew each time, so that a guest that changes its code
//! (or maps other code there) is decoded as what it has become.

use super::decode::{DecodeError, MAX_INSN_LEN, decode};
use super::insn::Insn;
use super::machine::Mode;
use super::plain::Plain;

/// Entries; a power of two.
const ENTRIES: usize = 8;

/// The bytes at an instruction's address: [`MAX_INSN_LEN`], or as many as are
/// known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    /// Little endian, those not known zero.
    bytes: u128,
    known: u8,
}

impl Code {
    /// From the first bytes of the instruction.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        let mut all = [0; 16];
        for (to, from) in all.iter_mut().zip(bytes.iter().take(MAX_INSN_LEN)) {
            *to = *from;
        }
        Self::from_array(all, bytes.len().min(MAX_INSN_LEN))
    }

    /// From an array of which `known` bytes count, at most [`MAX_INSN_LEN`].
    #[must_use]
    pub const fn from_array(bytes: [u8; 16], known: usize) -> Self {
        let known = if known < MAX_INSN_LEN {
            known as u8
        } else {
            MAX_INSN_LEN as u8
        };
        Self {
            bytes: u128::from_le_bytes(bytes),
            known,
        }
    }

    /// The first `len` bytes alone; `len` is at most [`MAX_INSN_LEN`].
    const fn first(&self, len: u8) -> u128 {
        let unused = 128u32.wrapping_sub((len as u32).wrapping_mul(8));
        self.bytes.wrapping_shl(unused)
    }
}

/// Decoding depends on the mode and on the instruction's own bytes alone.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// As [`Code::first`] gives them.
    bytes: u128,
    insn: Insn,
    plain: Option<Plain>,
}

/// An entry of a [`DecodeCache`], good until the next
/// [`DecodeCache::look_up`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded(usize);

/// The cache of one vCPU.
#[derive(Clone, Debug)]
pub struct DecodeCache {
    entries: [Option<Entry>; ENTRIES],
}

impl DecodeCache {
    /// An empty one.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            entries: [None; ENTRIES],
        }
    }

    /// The instruction `code` begins with. `rip` spreads the entries and
    /// decides nothing.
    ///
    /// # Errors
    /// As [`decode`].
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn look_up(&mut self, rip: u64, code: Code, mode: Mode) -> Result<Decoded, DecodeError> {
        let index = (rip ^ (rip >> 3)) as usize & ENTRIES.wrapping_sub(1);
        let Some(slot) = self.entries.get_mut(index) else {
            return Err(DecodeError::Unsupported);
        };
        if let Some(entry) = slot {
            let Insn { len, mode: of, .. } = entry.insn;
            if len <= code.known && of == mode && code.first(len) == entry.bytes {
                return Ok(Decoded(index));
            }
        }
        let bytes = code.bytes.to_le_bytes();
        let known = bytes.get(..usize::from(code.known)).unwrap_or_default();
        let insn = decode(known, mode)?;
        *slot = Some(Entry {
            bytes: code.first(insn.len),
            insn,
            plain: Plain::of(&insn),
        });
        Ok(Decoded(index))
    }

    /// The instruction.
    #[must_use]
    pub fn insn(&self, decoded: Decoded) -> Option<&Insn> {
        Some(&self.entries.get(decoded.0)?.as_ref()?.insn)
    }

    /// The instruction as a plain one, if it is.
    #[must_use]
    pub fn plain(&self, decoded: Decoded) -> Option<&Plain> {
        self.entries.get(decoded.0)?.as_ref()?.plain.as_ref()
    }
}

impl Default for DecodeCache {
    fn default() -> Self {
        Self::new()
    }
}
