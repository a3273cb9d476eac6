//! Instructions that move data or swap it and compute nothing, or next to
//! nothing: MOV and its kin, XCHG, CMPXCHG, XADD, SETcc, CMOVcc.

use super::access::Intent;
use super::flags::{self, STATUS, ZF, condition, extend, mask, when};
use super::{Outcome, Run, Stop};
use crate::emulate::insn::{Mem, Op, Operand};
use crate::emulate::machine::{Exception, Gpr, Machine};

impl<M: Machine> Run<'_, M> {
    /// Dispatches the instructions of this file.
    #[inline(never)]
    pub(super) fn data_move(&mut self) -> Outcome<()> {
        match self.insn.op {
            Op::Mov if let Operand::Seg(seg) = self.operand(0) => self.move_to_segment(seg),
            Op::Mov | Op::Movzx => self.mov(|value, _| value),
            Op::Movsx => self.mov(extend),
            Op::Movbe => self.mov(|value, size| {
                let unused = 64u32.wrapping_sub(u32::from(size).wrapping_mul(8));
                value.swap_bytes().wrapping_shr(unused)
            }),
            Op::Xchg => self.exchange(),
            Op::Xadd => self.exchange_add(),
            Op::Cmpxchg => self.compare_exchange(),
            Op::CmpxchgPair => self.compare_exchange_pair(),
            Op::Set(code) => {
                let holds = condition(code, self.machine.rflags());
                let destination = self.place(0, Intent::Write)?;
                self.put(destination, u64::from(holds))
            }
            Op::Cmov(code) => self.conditional_move(code),
            Op::Bound => self.bound(),
            Op::Xlat => self.translate_byte(),
            Op::Hint => self.hint(),
            _ => Err(Stop::UNSUPPORTED),
        }
    }

    /// A move from the second operand to the first; `convert` gets the value and
    /// the source's size.
    fn mov(&mut self, convert: impl Fn(u64, u8) -> u64) -> Outcome<()> {
        let source_size = self.size_of(1);
        let destination = self.place(0, Intent::Write)?;
        let value = self.fetch(1)?;
        self.put(destination, convert(value, source_size))
    }

    /// The source is read even when the condition does not hold, and a 4-byte
    /// destination loses its upper half even then (SDM 2A "CMOVcc").
    fn conditional_move(&mut self, code: u8) -> Outcome<()> {
        let source = self.fetch(1)?;
        let destination = self.place(0, Intent::Modify)?;
        let old = self.get(destination)?;
        let holds = condition(code, self.machine.rflags());
        self.put(destination, if holds { source } else { old })
    }

    /// XCHG; always atomic with memory (SDM 3A 9.1.2.1 "Automatic Locking").
    fn exchange(&mut self) -> Outcome<()> {
        let first = self.place(0, Intent::Modify)?;
        let second = self.place(1, Intent::Modify)?;
        let value = self.get(second)?;
        let old = self.modify(first, true, |old| (u128::from(value), old as u64))?;
        self.put(second, old)
    }

    /// XADD. If both operands are one register it ends up with the sum.
    #[inline(never)]
    fn exchange_add(&mut self) -> Outcome<()> {
        let size = self.size_of(0);
        let first = self.place(0, Intent::Modify)?;
        let second = self.place(1, Intent::Modify)?;
        let value = self.get(second)?;
        let sum_of = |old: u128| flags::add(old as u64, value, false, size);
        let found = if self.is_memory(first) {
            let (old, found) = self.modify(first, self.insn.prefixes.lock, |old| {
                let (sum, found) = sum_of(old);
                (u128::from(sum), (old as u64, found))
            })?;
            self.put(second, old)?;
            found
        } else {
            let old = self.get(first)?;
            let (sum, found) = sum_of(u128::from(old));
            self.put(second, old)?;
            self.put(first, sum)?;
            found
        };
        self.commit_flags(STATUS, found);
        Ok(())
    }

    /// CMPXCHG. Memory is written in either case, with its old value if the
    /// comparison fails.
    #[inline(never)]
    fn compare_exchange(&mut self) -> Outcome<()> {
        let size = self.size_of(0);
        let destination = self.place(0, Intent::Modify)?;
        let expected = self.reg(Gpr::Rax, size);
        let replacement = self.fetch(1)?;
        let (old, found) = if self.is_memory(destination) {
            self.modify(destination, self.insn.prefixes.lock, |old| {
                let old = old as u64;
                let new = if old == expected { replacement } else { old };
                let (_, found) = flags::sub(expected, old, false, size);
                (u128::from(new), (old, found))
            })?
        } else {
            let old = self.get(destination)?;
            if old == expected {
                self.put(destination, replacement)?;
            }
            (old, flags::sub(expected, old, false, size).1)
        };
        if old != expected {
            self.set_reg(Gpr::Rax, size, old);
        }
        self.commit_flags(STATUS, found);
        Ok(())
    }

    /// CMPXCHG8B and CMPXCHG16B.
    #[inline(never)]
    fn compare_exchange_pair(&mut self) -> Outcome<()> {
        let Operand::Mem(mem) = self.operand(0) else {
            return Err(Stop::UNSUPPORTED);
        };
        let half = mem.size >> 1;
        let width = u32::from(half).wrapping_mul(8);
        let pair = |high: u64, low: u64| u128::from(high) << width | u128::from(low);
        let expected = pair(self.reg(Gpr::Rdx, half), self.reg(Gpr::Rax, half));
        let replacement = pair(self.reg(Gpr::Rcx, half), self.reg(Gpr::Rbx, half));
        if mem.size == 16 {
            self.require_alignment(&mem, 16)?;
        }
        let span = self.memory(&mem, 0, Intent::Modify)?;
        let place = self.resolved_to(0, span);
        let old = self.modify(place, self.insn.prefixes.lock, |old| {
            let new = if old == expected { replacement } else { old };
            (new, old)
        })?;
        if old != expected {
            self.set_reg(Gpr::Rax, half, old as u64 & mask(half));
            self.set_reg(Gpr::Rdx, half, (old >> width) as u64 & mask(half));
        }
        self.commit_flags(ZF, when(old == expected, ZF));
        Ok(())
    }

    /// BOUND: an index outside its two bounds is #BR.
    fn bound(&mut self) -> Outcome<()> {
        let size = self.size_of(0);
        let index = extend(self.fetch(0)?, size) as i64;
        let Operand::Mem(mem) = self.operand(1) else {
            return Err(Stop::UNSUPPORTED);
        };
        // Two accesses; the second is not made if the first decides.
        let mem = Mem { size, ..mem };
        for (at, below) in [(0, true), (size, false)] {
            let span = self.memory(&mem, at.into(), Intent::Read)?;
            let bound = extend(self.load(&span)? as u64, size) as i64;
            let outside = if below { index < bound } else { index > bound };
            if outside {
                return Self::fault(Exception::BOUND);
            }
        }
        Ok(())
    }

    /// XLAT: AL indexes the table at rBX.
    fn translate_byte(&mut self) -> Outcome<()> {
        let Operand::Mem(mem) = self.operand(0) else {
            return Err(Stop::UNSUPPORTED);
        };
        let index = self.reg(Gpr::Rax, 1);
        let span = self.memory(&mem, index, Intent::Read)?;
        let value = self.load(&span)? as u64;
        self.set_reg(Gpr::Rax, 1, value);
        Ok(())
    }

    /// NOP and prefetches touch nothing; CLFLUSH and CLWB fault as a read does
    /// and then have nothing to flush.
    fn hint(&mut self) -> Outcome<()> {
        match self.operand(0) {
            Operand::Mem(mem) if mem.size != 0 => {
                self.memory(&mem, 0, Intent::Read)?;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
