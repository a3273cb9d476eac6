//! Shifts and rotates. SDM 2B "RCL/RCR/ROL/ROR-Rotate", "SAL/SAR/SHL/SHR-Shift",
//! "SHLD", "SHRD", 2C "SARX/SHLX/SHRX".
//!
//! Flags the SDM leaves undefined (OF for counts other than one, AF) are left as
//! they are.

use super::access::Intent;
use super::flags::{self, AF, CF, OF, STATUS, mask, sign, when};
use super::{Outcome, Run, Stop};
use crate::emulate::insn::Op;
use crate::emulate::machine::Machine;

/// A result, the flags, and which of them are defined.
type Shifted = (u64, u64, u64);

const fn bits(size: u8) -> u32 {
    (size as u32).wrapping_mul(8)
}

/// The count an instruction uses: five bits, six for 8-byte operands.
const fn masked_count(count: u64, size: u8) -> u32 {
    (count & if size == 8 { 63 } else { 31 }) as u32
}

/// Shifts that may be as wide as the number.
const fn left(value: u128, count: u32) -> u128 {
    if count > 127 { 0 } else { value << count }
}

const fn right(value: u128, count: u32) -> u128 {
    if count > 127 { 0 } else { value >> count }
}

/// SHL, SHR and SAR with a count that is not zero.
fn shift(op: Op, value: u64, count: u32, size: u8) -> Shifted {
    let wide = u128::from(value);
    let width = bits(size);
    let (result, carry) = match op {
        Op::Shl => {
            let all = left(wide, count);
            (all as u64, right(all, width) & 1 != 0)
        }
        Op::Shr => (
            right(wide, count) as u64,
            right(wide, count.wrapping_sub(1)) & 1 != 0,
        ),
        _ => {
            let signed = flags::extend(value, size) as i64;
            let by = |count: u32| signed.wrapping_shr(count.min(63));
            (by(count) as u64, by(count.wrapping_sub(1)) & 1 != 0)
        }
    };
    let result = result & mask(size);
    let overflow = match op {
        Op::Shl => (result & sign(size) != 0) != carry,
        Op::Shr => value & sign(size) != 0,
        _ => false,
    };
    let defined = if count == 1 { STATUS } else { STATUS & !OF };
    let found = flags::of_result(result, size) | when(carry, CF) | when(overflow, OF);
    (result, found, defined & !AF)
}

/// ROL and ROR with a count that is not zero.
fn rotate(op: Op, value: u64, count: u32, size: u8) -> Shifted {
    let width = bits(size);
    let turns = count & width.wrapping_sub(1);
    let turns = if op == Op::Rol {
        turns
    } else {
        width.wrapping_sub(turns) & width.wrapping_sub(1)
    };
    let wide = u128::from(value);
    let turned = left(wide, turns) | right(wide, width.wrapping_sub(turns));
    let result = turned as u64 & mask(size);
    let top = result & sign(size) != 0;
    let (carry, overflow) = if op == Op::Rol {
        (result & 1 != 0, top != (result & 1 != 0))
    } else {
        (top, top != (result & (sign(size) >> 1) != 0))
    };
    let defined = if count == 1 { CF | OF } else { CF };
    (result, when(carry, CF) | when(overflow, OF), defined)
}

/// RCL and RCR with a count that is not zero: a rotate of one bit more, the
/// carry.
fn rotate_carry(op: Op, value: u64, carry: bool, count: u32, size: u8) -> Shifted {
    let width = bits(size).wrapping_add(1);
    let turns = count.checked_rem(width).unwrap_or(0);
    let turns = if op == Op::Rcl {
        turns
    } else {
        width.wrapping_sub(turns)
    };
    let wide = u128::from(value) | left(u128::from(carry), bits(size));
    let turned = left(wide, turns) | right(wide, width.wrapping_sub(turns));
    let result = turned as u64 & mask(size);
    let carry = right(turned, bits(size)) & 1 != 0;
    let top = result & sign(size) != 0;
    let overflow = if op == Op::Rcl {
        top != carry
    } else {
        top != (result & (sign(size) >> 1) != 0)
    };
    let defined = if count == 1 { CF | OF } else { CF };
    (result, when(carry, CF) | when(overflow, OF), defined)
}

/// SHLD and SHRD with a count that is not zero. A count above 16 with 2-byte
/// operands has no defined result.
fn double(op: Op, value: u64, filler: u64, count: u32, size: u8) -> Shifted {
    let width = bits(size);
    let (value, filler) = (u128::from(value), u128::from(filler));
    let (result, carry) = if op == Op::Shld {
        let joined = left(value, width) | filler;
        let shifted = left(joined, count);
        let out = right(joined, width.wrapping_mul(2).wrapping_sub(count));
        (right(shifted, width), out & 1 != 0)
    } else {
        let joined = left(filler, width) | value;
        let out = right(joined, count.wrapping_sub(1));
        (right(joined, count), out & 1 != 0)
    };
    let result = result as u64 & mask(size);
    let changed_sign = (result ^ value as u64) & sign(size) != 0;
    let defined = if count == 1 { STATUS } else { STATUS & !OF };
    let found = flags::of_result(result, size) | when(carry, CF) | when(changed_sign, OF);
    (result, found, defined & !AF)
}

impl<M: Machine> Run<'_, M> {
    /// ROL, ROR, RCL, RCR, SHL, SHR, SAR.
    pub(super) fn shift(&mut self) -> Outcome<()> {
        let op = self.insn.op;
        let size = self.size_of(0);
        let count = masked_count(self.fetch(1)?, size);
        let carry = self.machine.rflags() & CF != 0;
        let destination = self.place(0, Intent::Modify)?;
        let (found, defined) = self.modify(destination, false, |old| {
            let value = old as u64;
            let (new, found, defined) = match op {
                _ if count == 0 => (value, 0, 0),
                Op::Rol | Op::Ror => rotate(op, value, count, size),
                Op::Rcl | Op::Rcr => rotate_carry(op, value, carry, count, size),
                _ => shift(op, value, count, size),
            };
            (u128::from(new), (found, defined))
        })?;
        self.commit_flags(defined, found);
        Ok(())
    }

    /// SHLD and SHRD.
    #[inline(never)]
    pub(super) fn double_shift(&mut self) -> Outcome<()> {
        let op = self.insn.op;
        let size = self.size_of(0);
        let filler = self.fetch(1)?;
        let count = masked_count(self.fetch(2)?, size);
        let destination = self.place(0, Intent::Modify)?;
        let (found, defined) = self.modify(destination, false, |old| {
            let value = old as u64;
            let (new, found, defined) = if count == 0 {
                (value, 0, 0)
            } else {
                double(op, value, filler, count, size)
            };
            (u128::from(new), (found, defined))
        })?;
        self.commit_flags(defined, found);
        Ok(())
    }

    /// RORX, SARX, SHLX, SHRX.
    #[inline(never)]
    pub(super) fn shift_without_flags(&mut self) -> Outcome<()> {
        let size = self.size_of(0);
        let value = self.fetch(1)?;
        let count = masked_count(self.fetch(2)?, size);
        let result = match self.insn.op {
            _ if count == 0 => value,
            Op::Rorx => rotate(Op::Ror, value, count, size).0,
            Op::Sarx => shift(Op::Sar, value, count, size).0,
            Op::Shlx => shift(Op::Shl, value, count, size).0,
            Op::Shrx => shift(Op::Shr, value, count, size).0,
            _ => return Err(Stop::UNSUPPORTED),
        };
        let destination = self.place(0, Intent::Write)?;
        self.put(destination, result)
    }
}
