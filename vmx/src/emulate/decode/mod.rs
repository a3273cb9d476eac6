//! From instruction bytes to an [`Insn`]. Stages run in one order: prefixes
//! and opcode ([`prefix`]), the form ([`opcode`]), operands ([`modrm`]).

mod modrm;
mod opcode;
mod prefix;
mod vector;

use super::insn::{Insn, Operand};
use super::machine::Mode;
use modrm::Sizes;
use opcode::ModRm;

/// The longest instruction, in bytes: SDM 2A 2.3.11 "AVX Instruction Length".
pub const MAX_INSN_LEN: usize = 15;

/// Why bytes do not decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes end inside the instruction: fetch more (up to
    /// [`MAX_INSN_LEN`]) and decode again.
    TooShort,
    /// Longer than [`MAX_INSN_LEN`]: the guest gets #GP(0).
    TooLong,
    /// Not an instruction, or not one that is emulated: the guest gets #UD.
    Unsupported,
}

/// Decodes one instruction from the start of `bytes`. Bytes after it do not
/// matter.
///
/// # Errors
/// See [`DecodeError`].
#[inline(never)]
pub fn decode(bytes: &[u8], mode: Mode) -> Result<Insn, DecodeError> {
    let mut cursor = Cursor { bytes, at: 0 };
    let head = prefix::parse(&mut cursor, mode)?;
    let has_modrm = opcode::has_modrm(&head);
    let modrm = ModRm(if has_modrm { cursor.byte()? } else { 0 });
    let (form, mask) = opcode::lookup(&head, modrm, mode).ok_or(DecodeError::Unsupported)?;
    let sizes = Sizes::new(&head, mode, modrm);
    let operands = modrm::operands(&mut cursor, &head, &form, &sizes, has_modrm)?;
    let prefixes = head.prefixes;
    if prefixes.lock {
        let on_memory = matches!(operands.first(), Some(Operand::Mem(_)));
        if !(form.op.is_lockable() && on_memory) {
            return Err(DecodeError::Unsupported);
        }
    }
    Ok(Insn {
        op: form.op,
        operands,
        operand_size: sizes.operand,
        address_size: sizes.address,
        mask,
        len: cursor.at as u8,
        mode,
        prefixes,
    })
}

/// The bytes and how far they have been read.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    /// The next byte, left in place.
    fn peek(&self) -> Result<u8, DecodeError> {
        if self.at >= MAX_INSN_LEN {
            return Err(DecodeError::TooLong);
        }
        self.bytes
            .get(self.at)
            .copied()
            .ok_or(DecodeError::TooShort)
    }

    #[inline(never)]
    fn byte(&mut self) -> Result<u8, DecodeError> {
        let byte = self.peek()?;
        self.at = self.at.wrapping_add(1);
        Ok(byte)
    }

    /// A little-endian number of `size` bytes, zero-extended.
    #[inline(never)]
    fn unsigned(&mut self, size: u8) -> Result<u64, DecodeError> {
        let mut value = [0u8; 8];
        for to in value.iter_mut().take(usize::from(size)) {
            *to = self.byte()?;
        }
        Ok(u64::from_le_bytes(value))
    }

    /// A little-endian number of `size` bytes (1 to 8), sign-extended.
    fn signed(&mut self, size: u8) -> Result<u64, DecodeError> {
        let value = self.unsigned(size)?;
        let unused = 64u32.wrapping_sub(u32::from(size).wrapping_mul(8));
        Ok((value.wrapping_shl(unused) as i64).wrapping_shr(unused) as u64)
    }
}
