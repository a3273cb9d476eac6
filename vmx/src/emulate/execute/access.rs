//! Reads and writes of operands: registers at once, RAM through the machine,
//! MMIO through the log.

use super::flags::mask;
use super::{MAX_ATTEMPTS, Outcome, Run, Stop};
use crate::emulate::Step;
use crate::emulate::insn::Operand;
use crate::emulate::machine::{Access, Backing, Gpr, Machine, Seg};
use crate::emulate::mmio::{Kind, Recall};

/// What an instruction does with a memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Intent {
    Read,
    Write,
    /// Reads, then writes. The right to write is asked for first, so that a
    /// device is not read for an instruction that faults.
    Modify,
}

/// Bytes within which the host updates memory atomically: a cache line.
const ATOMIC_LINE: u64 = 64;

/// Bytes in one page.
#[derive(Clone, Copy, Debug)]
struct Part {
    gpa: u64,
    len: u8,
    read: Backing,
    write: Backing,
}

const NO_PART: Part = Part {
    gpa: 0,
    len: 0,
    read: Backing::Ram,
    write: Backing::Ram,
};

/// A translated memory operand of at most 64 bytes, in one or two pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    parts: [Part; 2],
    len: u8,
}

impl Span {
    /// No byte of it is MMIO when written (or read, if `write` is false).
    pub(super) fn is_ram(&self, write: bool) -> bool {
        self.parts.iter().all(|part| {
            let backing = if write { part.write } else { part.read };
            part.len == 0 || backing == Backing::Ram
        })
    }

    /// The guest-physical address, if all of it lies in one cache line, as every
    /// aligned operand does: the case that can be updated atomically.
    fn line_gpa(&self) -> Option<u64> {
        let [first, _] = self.parts;
        let room = ATOMIC_LINE.wrapping_sub(first.gpa & ATOMIC_LINE.wrapping_sub(1));
        (u64::from(self.len) <= room).then_some(first.gpa)
    }
}

/// A resolved operand.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Reg { reg: Gpr, size: u8 },
    HighByte(Gpr),
    Memory(Span),
    Constant(u64),
}

/// Operands that are kept resolved: the first two, and one more for a short time.
pub(super) const PLACES: usize = 3;

/// A resolved operand, as its place in [`Run::places`]: a [`Place`] is large, and
/// handed from function to function all the time.
#[derive(Clone, Copy)]
pub(super) struct Resolved(usize);

impl<M: Machine> Run<'_, M> {
    /// Resolves an operand of at most 8 bytes, the instruction's `n`-th.
    #[inline(never)]
    pub(super) fn resolve(
        &mut self,
        n: usize,
        operand: Operand,
        intent: Intent,
    ) -> Outcome<Resolved> {
        let place = match operand {
            Operand::Reg { reg, size } => Place::Reg { reg, size },
            Operand::HighByte(reg) => Place::HighByte(reg),
            Operand::Mem(mem) => Place::Memory(self.memory(&mem, 0, intent)?),
            Operand::Imm(value) => Place::Constant(value),
            Operand::Seg(seg) => Place::Constant(u64::from(self.selector(seg))),
            Operand::Vector { .. } | Operand::Mmx(_) | Operand::None => {
                return Err(Stop::UNSUPPORTED);
            }
        };
        Ok(self.resolved(n, place))
    }

    /// The `n`-th operand is in memory, here.
    #[inline(never)]
    pub(super) fn resolved_to(&mut self, n: usize, span: Span) -> Resolved {
        self.resolved(n, Place::Memory(span))
    }

    fn resolved(&mut self, n: usize, place: Place) -> Resolved {
        let at = n.min(PLACES.wrapping_sub(1));
        if let Some(slot) = self.places.get_mut(at) {
            *slot = place;
        }
        Resolved(at)
    }

    fn place_of(&self, at: Resolved) -> Place {
        self.places.get(at.0).copied().unwrap_or(Place::Constant(0))
    }

    pub(super) fn is_memory(&self, at: Resolved) -> bool {
        matches!(self.places.get(at.0), Some(Place::Memory(_)))
    }

    fn selector(&self, seg: Seg) -> u16 {
        self.machine.segment(seg).selector
    }

    /// Translates `size` bytes (1 to 64) and finds out what backs them.
    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn span(&mut self, linear: u64, size: u8, intent: Intent) -> Outcome<Span> {
        let to_page_end = 0x1000u64.wrapping_sub(linear & 0xfff);
        let first_len = u64::from(size).min(to_page_end) as u8;
        let first = self.part(linear, first_len, intent)?;
        let rest = size.wrapping_sub(first_len);
        let second = if rest == 0 {
            NO_PART
        } else {
            let mut next = linear.wrapping_add(u64::from(first_len));
            if !self.long() {
                next &= 0xffff_ffff;
            }
            self.part(next, rest, intent)?
        };
        Ok(Span {
            parts: [first, second],
            len: size,
        })
    }

    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    fn part(&mut self, linear: u64, len: u8, intent: Intent) -> Outcome<Part> {
        let access = Access {
            write: intent != Intent::Read,
            user: self.machine.cpl() == 3,
        };
        let gpa = self.served(|machine| machine.translate(linear, access))?;
        let mut part = Part {
            gpa,
            len,
            ..NO_PART
        };
        if intent != Intent::Write {
            part.read = self.served(|machine| machine.backing(gpa, false))?;
        }
        if intent != Intent::Read {
            part.write = self.served(|machine| machine.backing(gpa, true))?;
        }
        Ok(part)
    }

    /// Reads a span into the first bytes of `into`.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn read(&mut self, span: &Span, into: &mut [u8]) -> Outcome<()> {
        let mut rest = into;
        for part in span.parts {
            let Some((bytes, after)) = rest.split_at_mut_checked(usize::from(part.len)) else {
                return Err(Stop::UNSUPPORTED);
            };
            if part.len != 0 {
                match part.read {
                    Backing::Ram => self.served(|machine| machine.read_ram(part.gpa, bytes))?,
                    Backing::Mmio => self.read_mmio(part.gpa, bytes)?,
                }
            }
            rest = after;
        }
        Ok(())
    }

    #[inline(never)]
    fn read_mmio(&mut self, gpa: u64, into: &mut [u8]) -> Outcome<()> {
        let mut gpa = gpa;
        let mut rest = into;
        while !rest.is_empty() {
            let size = piece(rest.len());
            let value = match self.log.recall(Kind::Read, gpa, size, 1) {
                Recall::Answered(value) => value,
                Recall::Ask => return Err(self.keep(Step::Read { gpa, size })),
                Recall::Lost => return Err(Stop::AGAIN),
                Recall::Full => return Err(Stop::UNSUPPORTED),
            };
            let Some((bytes, after)) = rest.split_at_mut_checked(usize::from(size)) else {
                return Err(Stop::UNSUPPORTED);
            };
            for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
            gpa = gpa.wrapping_add(u64::from(size));
            rest = after;
        }
        Ok(())
    }

    /// Writes the first bytes of `from` to a span: all MMIO first, because each
    /// piece ends the call; RAM when nothing can stop the instruction any more.
    pub(super) fn write(&mut self, span: &Span, from: &[u8]) -> Outcome<()> {
        self.write_backed(span, from, Backing::Mmio)?;
        self.write_backed(span, from, Backing::Ram)
    }

    /// Writes those of the bytes that lie in `backing`.
    #[inline(never)]
    pub(super) fn write_backed(
        &mut self,
        span: &Span,
        from: &[u8],
        backing: Backing,
    ) -> Outcome<()> {
        let [first, second] = span.parts;
        let Some((low, high)) = from.split_at_checked(usize::from(first.len)) else {
            return Err(Stop::UNSUPPORTED);
        };
        let Some(high) = high.get(..usize::from(second.len)) else {
            return Err(Stop::UNSUPPORTED);
        };
        for (part, bytes) in [(first, low), (second, high)] {
            if part.len == 0 || part.write != backing {
                continue;
            }
            match backing {
                Backing::Mmio => self.write_mmio(part.gpa, bytes)?,
                Backing::Ram => self.served(|machine| machine.write_ram(part.gpa, bytes))?,
            }
        }
        Ok(())
    }

    #[inline(never)]
    fn write_mmio(&mut self, gpa: u64, from: &[u8]) -> Outcome<()> {
        let mut gpa = gpa;
        let mut rest = from;
        while !rest.is_empty() {
            let size = piece(rest.len());
            let Some((bytes, after)) = rest.split_at_checked(usize::from(size)) else {
                return Err(Stop::UNSUPPORTED);
            };
            match self.log.recall(Kind::Write, gpa, size, 1) {
                Recall::Answered(_) => {}
                Recall::Ask => {
                    let mut value = [0u8; 8];
                    for (to, from) in value.iter_mut().zip(bytes) {
                        *to = *from;
                    }
                    let value = u64::from_le_bytes(value);
                    return Err(self.keep(Step::Write { gpa, size, value }));
                }
                Recall::Lost => return Err(Stop::AGAIN),
                Recall::Full => return Err(Stop::UNSUPPORTED),
            }
            gpa = gpa.wrapping_add(u64::from(size));
            rest = after;
        }
        Ok(())
    }

    /// Reads a span of at most 16 bytes as a number.
    #[inline(never)]
    pub(super) fn load(&mut self, span: &Span) -> Outcome<u128> {
        let mut bytes = [0u8; 16];
        self.read(span, &mut bytes)?;
        Ok(u128::from_le_bytes(bytes))
    }

    /// Writes a number to a span of at most 16 bytes.
    #[inline(never)]
    pub(super) fn store(&mut self, span: &Span, value: u128) -> Outcome<()> {
        self.write(span, &value.to_le_bytes())
    }

    /// The value of a resolved operand, zero-extended.
    #[inline(never)]
    pub(super) fn get(&mut self, at: Resolved) -> Outcome<u64> {
        Ok(match self.place_of(at) {
            Place::Reg { reg, size } => self.reg(reg, size),
            Place::HighByte(reg) => self.machine.gpr(reg) >> 8 & 0xff,
            Place::Memory(span) => self.load(&span)? as u64,
            Place::Constant(value) => value,
        })
    }

    /// Writes a resolved operand. For memory this is the point of no return.
    #[inline(never)]
    pub(super) fn put(&mut self, at: Resolved, value: u64) -> Outcome<()> {
        match self.place_of(at) {
            Place::Reg { reg, size } => self.set_reg(reg, size, value),
            Place::HighByte(reg) => {
                let old = self.machine.gpr(reg);
                self.machine
                    .set_gpr(reg, old & !0xff00 | (value & 0xff) << 8);
            }
            Place::Memory(span) => self.store(&span, u128::from(value))?,
            Place::Constant(_) => return Err(Stop::UNSUPPORTED),
        }
        Ok(())
    }

    /// Replaces a resolved operand by what `change` makes of its old value, and
    /// returns what else `change` found out. With `atomic` RAM is updated by
    /// compare-and-exchange, so `change` may run more than once. RAM that crosses a
    /// cache line is the processor's to update, if the machine can have it try
    /// again. What is left is a read and a write: no device can be part of an
    /// atomic access of ours.
    pub(super) fn modify<T: Default>(
        &mut self,
        at: Resolved,
        atomic: bool,
        change: impl Fn(u128) -> (u128, T),
    ) -> Outcome<T> {
        let mut last = T::default();
        self.update_place(at, atomic, &mut |old| {
            let (new, found) = change(old);
            last = found;
            new
        })?;
        Ok(last)
    }

    #[inline(never)]
    fn update_place(
        &mut self,
        at: Resolved,
        atomic: bool,
        change: &mut dyn FnMut(u128) -> u128,
    ) -> Outcome<()> {
        let Place::Memory(span) = &self.place_of(at) else {
            let new = change(u128::from(self.get(at)?));
            return self.put(at, new as u64);
        };
        let atomic = atomic && span.is_ram(false) && span.is_ram(true);
        let (true, Some(gpa)) = (atomic, span.line_gpa()) else {
            if atomic && self.machine.retry_split_lock() {
                return Err(Stop::AGAIN);
            }
            let new = change(self.load(span)?);
            return self.store(span, new);
        };
        for _ in 0..MAX_ATTEMPTS {
            let old = self.load(span)?;
            let new = change(old);
            let bits = u128::from(mask(span.len));
            let new = if span.len == 16 { new } else { new & bits };
            if self.served(|machine| machine.compare_exchange(gpa, span.len, old, new))? {
                return Ok(());
            }
        }
        Err(Stop::AGAIN)
    }
}

/// The largest piece of `len` bytes that one exit carries: a power of two up to
/// 8, because devices know no other sizes.
const fn piece(len: usize) -> u8 {
    match len {
        0 | 1 => 1,
        2 | 3 => 2,
        4..=7 => 4,
        _ => 8,
    }
}
