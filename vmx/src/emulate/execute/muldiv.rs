//! Multiplication and division. SDM 2A "DIV", "IDIV", "IMUL", 2B "MUL", "MULX".
//!
//! SF, ZF, AF and PF after a multiplication and all flags after a division are
//! undefined and left as they are.

use super::access::Intent;
use super::flags::{CF, OF, extend, mask, sign, when};
use super::{Outcome, Run};
use crate::emulate::insn::{Op, Operand};
use crate::emulate::machine::{Exception, Gpr, Machine};

const fn bits(size: u8) -> u32 {
    (size as u32).wrapping_mul(8)
}

/// The full product of two `size`-byte numbers: low half, high half.
fn product(a: u64, b: u64, signed: bool, size: u8) -> (u64, u64) {
    let wide = if signed {
        let (a, b) = (extend(a, size) as i64, extend(b, size) as i64);
        i128::from(a).wrapping_mul(i128::from(b)) as u128
    } else {
        u128::from(a).wrapping_mul(u128::from(b))
    };
    let high = (wide >> bits(size)) as u64;
    (wide as u64 & mask(size), high & mask(size))
}

/// `high:low / divisor`, unsigned: quotient and remainder, or `None` if the
/// quotient needs more than 64 bits. Bit by bit, so that no 128-bit division
/// routine has to be linked into a kernel.
fn divide_unsigned(high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    if divisor == 0 || high >= divisor {
        return None;
    }
    if high == 0 {
        return Some((low.checked_div(divisor)?, low.checked_rem(divisor)?));
    }
    let (mut rest, mut quotient) = (high, 0u64);
    for bit in (0..64u32).rev() {
        let carry = rest & sign(8) != 0;
        rest = rest << 1 | low.wrapping_shr(bit) & 1;
        quotient <<= 1;
        if carry || rest >= divisor {
            rest = rest.wrapping_sub(divisor);
            quotient |= 1;
        }
    }
    Some((quotient, rest))
}

/// The division of a double-width number by a `size`-byte one; `None` is #DE.
fn quotient(high: u64, low: u64, divisor: u64, signed: bool, size: u8) -> Option<(u64, u64)> {
    let dividend = u128::from(high) << bits(size) | u128::from(low);
    if !signed {
        let (found, rest) = divide_unsigned((dividend >> 64) as u64, dividend as u64, divisor)?;
        return (found <= mask(size)).then_some((found, rest));
    }
    let unused = 128u32.wrapping_sub(bits(size).wrapping_mul(2));
    let dividend = (dividend.wrapping_shl(unused) as i128).wrapping_shr(unused);
    let divisor = extend(divisor, size) as i64;
    let magnitude = dividend.unsigned_abs();
    let (found, rest) = divide_unsigned(
        (magnitude >> 64) as u64,
        magnitude as u64,
        divisor.unsigned_abs(),
    )?;
    let negative = (dividend < 0) != (divisor < 0);
    // The largest magnitude is one more for a negative quotient.
    let most = if negative {
        sign(size)
    } else {
        sign(size).wrapping_sub(1)
    };
    if found > most {
        return None;
    }
    let found = if negative {
        found.wrapping_neg()
    } else {
        found
    };
    let rest = if dividend < 0 {
        rest.wrapping_neg()
    } else {
        rest
    };
    Some((found & mask(size), rest & mask(size)))
}

impl<M: Machine> Run<'_, M> {
    /// The double-width accumulator of MUL and DIV: AX for bytes, else rDX:rAX.
    fn wide_accumulator(&self, size: u8) -> (u64, u64) {
        if size == 1 {
            let ax = self.reg(Gpr::Rax, 2);
            return (ax & 0xff, ax >> 8);
        }
        (self.reg(Gpr::Rax, size), self.reg(Gpr::Rdx, size))
    }

    fn set_wide_accumulator(&mut self, size: u8, low: u64, high: u64) {
        if size == 1 {
            self.set_reg(Gpr::Rax, 2, high << 8 | low);
        } else {
            self.set_reg(Gpr::Rax, size, low);
            self.set_reg(Gpr::Rdx, size, high);
        }
    }

    /// MUL, and IMUL with one operand.
    #[inline(never)]
    pub(super) fn multiply_wide(&mut self) -> Outcome<()> {
        let signed = self.insn.op == Op::ImulWide;
        let size = self.size_of(0);
        let source = self.fetch(0)?;
        let (low, high) = product(self.reg(Gpr::Rax, size), source, signed, size);
        let fits = if signed && low & sign(size) != 0 {
            high == mask(size)
        } else {
            high == 0
        };
        self.set_wide_accumulator(size, low, high);
        self.commit_flags(CF | OF, when(!fits, CF | OF));
        Ok(())
    }

    /// IMUL with two or three operands.
    pub(super) fn multiply(&mut self) -> Outcome<()> {
        let size = self.size_of(0);
        let (a, b) = if self.operand(2) == Operand::None {
            (self.fetch(0)?, self.fetch(1)?)
        } else {
            (self.fetch(1)?, self.fetch(2)? & mask(size))
        };
        let (low, high) = product(a, b, true, size);
        let fits = high == when(low & sign(size) != 0, mask(size));
        let destination = self.place(0, Intent::Write)?;
        self.put(destination, low)?;
        self.commit_flags(CF | OF, when(!fits, CF | OF));
        Ok(())
    }

    /// MULX: the high half goes to the first operand, the low half to the second;
    /// if they are the same register it gets the high half.
    pub(super) fn multiply_without_flags(&mut self) -> Outcome<()> {
        let size = self.size_of(0);
        let source = self.fetch(2)?;
        let (low, high) = product(self.reg(Gpr::Rdx, size), source, false, size);
        let low_place = self.place(1, Intent::Write)?;
        let high_place = self.place(0, Intent::Write)?;
        self.put(low_place, low)?;
        self.put(high_place, high)
    }

    /// DIV and IDIV.
    #[inline(never)]
    pub(super) fn divide(&mut self) -> Outcome<()> {
        let signed = self.insn.op == Op::Idiv;
        let size = self.size_of(0);
        let divisor = self.fetch(0)?;
        let (low, high) = self.wide_accumulator(size);
        match quotient(high, low, divisor, signed, size) {
            Some((quotient, rest)) => {
                self.set_wide_accumulator(size, quotient, rest);
                Ok(())
            }
            None => Self::fault(Exception::DIVIDE),
        }
    }
}
