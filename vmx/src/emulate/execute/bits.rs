//! Bit tests, bit counts, CRC32 and the BMI1 and BMI2 instructions.

use super::access::Intent;
use super::flags::{CF, OF, SF, STATUS, ZF, extend, mask, sign, when};
use super::{Outcome, Run, Stop};
use crate::emulate::insn::{Op, Operand};
use crate::emulate::machine::Machine;

/// CRC-32C, reflected: SDM 2A "CRC32-Accumulate CRC32 Value" names 11EDC6F41.
const CRC32C: u32 = 0x82f6_3b78;

const fn bits(size: u8) -> u32 {
    (size as u32).wrapping_mul(8)
}

/// The lowest `count` bits set; all of them from 64 up.
const fn low_bits(count: u32) -> u64 {
    if count >= 64 {
        u64::MAX
    } else {
        (1u64 << count).wrapping_sub(1)
    }
}

/// PDEP: the low bits of `value` go to the set bits of `places`.
fn deposit(value: u64, places: u64) -> u64 {
    let (mut left, mut value, mut out) = (places, value, 0);
    while left != 0 {
        let lowest = left & left.wrapping_neg();
        if value & 1 != 0 {
            out |= lowest;
        }
        value >>= 1;
        left ^= lowest;
    }
    out
}

/// PEXT: the bits of `value` at the set bits of `places`, packed.
fn extract(value: u64, places: u64) -> u64 {
    let (mut left, mut to, mut out) = (places, 1u64, 0);
    while left != 0 {
        let lowest = left & left.wrapping_neg();
        if value & lowest != 0 {
            out |= to;
        }
        to = to.wrapping_shl(1);
        left ^= lowest;
    }
    out
}

impl<M: Machine> Run<'_, M> {
    /// BT, BTS, BTR, BTC. A bit number in a register reaches beyond a memory
    /// operand: SDM 2A "BT-Bit Test", 3.1.1.9 "BitBase".
    #[inline(never)]
    pub(super) fn bit_test(&mut self) -> Outcome<()> {
        let op = self.insn.op;
        let size = self.size_of(0);
        let number = self.fetch(1)?;
        let intent = if op == Op::Bt {
            Intent::Read
        } else {
            Intent::Modify
        };
        let place = match (self.operand(0), self.operand(1)) {
            (Operand::Mem(mem), Operand::Reg { .. }) => {
                let element =
                    (extend(number, size) as i64).wrapping_shr(bits(size).trailing_zeros());
                let ahead = (element as u64).wrapping_mul(u64::from(size));
                let span = self.memory(&mem, ahead, intent)?;
                self.resolved_to(0, span)
            }
            (operand, _) => self.resolve(0, operand, intent)?,
        };
        let bit = 1u64.wrapping_shl((number as u32) & bits(size).wrapping_sub(1));
        let was_set = if op == Op::Bt {
            self.get(place)? & bit != 0
        } else {
            self.modify(place, self.insn.prefixes.lock, |old| {
                let value = old as u64;
                let new = match op {
                    Op::Bts => value | bit,
                    Op::Btr => value & !bit,
                    _ => value ^ bit,
                };
                (u128::from(new), value & bit != 0)
            })?
        };
        self.commit_flags(CF, when(was_set, CF));
        Ok(())
    }

    /// BSF, BSR, TZCNT, LZCNT, POPCNT.
    #[inline(never)]
    pub(super) fn bit_count(&mut self) -> Outcome<()> {
        let op = self.insn.op;
        let size = self.size_of(0);
        let value = self.fetch(1)?;
        let width = bits(size);
        let trailing = value.trailing_zeros().min(width);
        let leading = value
            .leading_zeros()
            .wrapping_sub(64u32.wrapping_sub(width));
        let (result, defined, found) = match op {
            // Without a set bit the destination keeps its value: undefined in
            // the SDM's operation, and what processors do.
            Op::Bsf | Op::Bsr if value == 0 => {
                self.commit_flags(ZF, ZF);
                return Ok(());
            }
            Op::Bsf => (trailing, ZF, 0),
            Op::Bsr => (width.wrapping_sub(1).wrapping_sub(leading), ZF, 0),
            Op::Popcnt => (value.count_ones(), STATUS, when(value == 0, ZF)),
            _ => {
                let count = if op == Op::Tzcnt { trailing } else { leading };
                let found = when(count == width, CF) | when(count == 0, ZF);
                (count, CF | ZF, found)
            }
        };
        let destination = self.place(0, Intent::Write)?;
        self.put(destination, u64::from(result))?;
        self.commit_flags(defined, found);
        Ok(())
    }

    /// CRC32.
    pub(super) fn crc32(&mut self) -> Outcome<()> {
        let size = self.size_of(1);
        let source = self.fetch(1)?;
        let destination = self.place(0, Intent::Modify)?;
        let mut crc = self.get(destination)? as u32;
        for byte in source.to_le_bytes().into_iter().take(usize::from(size)) {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                let low = crc & 1 != 0;
                crc = crc >> 1 ^ if low { CRC32C } else { 0 };
            }
        }
        self.put(destination, u64::from(crc))
    }

    /// ANDN, BEXTR, BZHI, BLSR, BLSMSK, BLSI, PDEP, PEXT.
    #[inline(never)]
    pub(super) fn bit_field(&mut self) -> Outcome<()> {
        let op = self.insn.op;
        let size = self.size_of(0);
        let (result, defined, carry) = match op {
            Op::Andn => {
                let inverted = !self.fetch(1)?;
                (inverted & self.fetch(2)?, CF | OF | ZF | SF, false)
            }
            Op::Bextr => {
                let source = self.fetch(1)?;
                let control = self.fetch(2)?;
                let (start, len) = (control as u8, (control >> 8) as u8);
                let shifted = source.checked_shr(u32::from(start)).unwrap_or(0);
                (shifted & low_bits(u32::from(len)), CF | OF | ZF, false)
            }
            Op::Bzhi => {
                let source = self.fetch(1)?;
                let count = u32::from(self.fetch(2)? as u8);
                let kept = source & low_bits(count);
                (kept, CF | OF | ZF | SF, count >= bits(size))
            }
            Op::Blsr | Op::Blsmsk | Op::Blsi => {
                let value = self.fetch(1)?;
                let below = value.wrapping_sub(1);
                match op {
                    Op::Blsr => (value & below, CF | OF | ZF | SF, value == 0),
                    Op::Blsmsk => (value ^ below, CF | OF | ZF | SF, value == 0),
                    _ => (value & value.wrapping_neg(), CF | OF | ZF | SF, value != 0),
                }
            }
            Op::Pdep => {
                let value = self.fetch(1)?;
                (deposit(value, self.fetch(2)?), 0, false)
            }
            Op::Pext => {
                let value = self.fetch(1)?;
                (extract(value, self.fetch(2)?), 0, false)
            }
            _ => return Err(Stop::UNSUPPORTED),
        };
        let result = result & mask(size);
        let found = when(carry, CF) | when(result == 0, ZF) | when(result & sign(size) != 0, SF);
        let destination = self.place(0, Intent::Write)?;
        self.put(destination, result)?;
        self.commit_flags(defined, found);
        Ok(())
    }
}
