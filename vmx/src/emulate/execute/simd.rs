//! Vector moves between memory and MMX, XMM, YMM or ZMM registers. SDM 2B
//! "MOVAPS", "MOVDQU" and the rest; SDM 2A 2.4 "AVX and SSE Instruction Exception
//! Classification", 2.8 "Exception Classifications of EVEX-Encoded Instructions".

use core::ops::Range;

use super::access::{Intent, Span};
use super::{Outcome, Run, Stop};
use crate::emulate::insn::{Mem, Op, Operand};
use crate::emulate::machine::{Backing, Exception, Machine, VectorBytes as Bytes};

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
/// XCR0's SSE and AVX bits, and with them the three of AVX-512.
const XCR0_AVX: u64 = 6;
const XCR0_AVX512: u64 = 0xe6;

/// Copies `from` into `to`, starting `at` bytes in.
fn overlay(to: &mut Bytes, at: usize, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(at).zip(from) {
        *to = *from;
    }
}

/// A bit for each of the first `len` bytes.
const fn first(len: u8) -> u64 {
    if len >= 64 {
        u64::MAX
    } else {
        (1u64 << len).wrapping_sub(1)
    }
}

/// The bytes of `from` whose bits are set, those of `to` elsewhere.
#[inline(never)]
fn blend(to: &mut Bytes, from: &Bytes, bits: u64) {
    for (at, (to, from)) in to.iter_mut().zip(from).enumerate() {
        if bits.wrapping_shr(at as u32) & 1 != 0 {
            *to = *from;
        }
    }
}

/// The bytes from `at` on, at the start.
fn shifted_down(value: &Bytes, at: usize) -> Bytes {
    let mut out = [0; 64];
    for (to, from) in out.iter_mut().zip(value.iter().skip(at)) {
        *to = *from;
    }
    out
}

fn low_u64(value: &Bytes) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *value;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// A bit for each byte of the elements whose last byte has its sign bit set.
fn chosen(by: &Bytes, len: u8, element: u8) -> u64 {
    let mut bits = 0;
    let mut at = 0u8;
    while at < len {
        let next = at.wrapping_add(element.max(1));
        let sign = by.get(usize::from(next.wrapping_sub(1)));
        if sign.is_some_and(|byte| *byte & 0x80 != 0) {
            bits |= first(next) & !first(at);
        }
        at = next;
    }
    bits
}

/// A bit for each byte of the elements whose bit in `opmask` is set.
fn spread(opmask: u64, element: u8) -> u64 {
    let mut bits = 0;
    for at in 0..64u8 {
        let element_bit = opmask.wrapping_shr(u32::from(at >> element.trailing_zeros()));
        bits |= (element_bit & 1).wrapping_shl(at.into());
    }
    bits
}

/// Which bytes of an element of `len` bytes end up in those whose bits are set,
/// when copies of it fill them.
fn folded(bits: u64, len: u8) -> u64 {
    let mut rest = bits;
    let mut found = 0;
    while rest != 0 && len != 0 {
        found |= rest & first(len);
        rest = rest.checked_shr(len.into()).unwrap_or(0);
    }
    found
}

/// Does something with one run of bytes of an operand.
type EachRun<'a, R> = dyn FnMut(&mut R, Range<usize>, &Span) -> Outcome<()> + 'a;

impl<M: Machine> Run<'_, M> {
    /// The instructions of this file, but for MMX.
    #[inline(never)]
    pub(super) fn vector(&mut self) -> Outcome<()> {
        if matches!(self.operand(1), Operand::Mmx(_)) {
            // MASKMOVQ.
            return self.mmx();
        }
        self.check_enabled()?;
        match self.operand(0) {
            Operand::Vector { index, size } => self.vector_load(index, size),
            Operand::Mem(mem) => self.vector_store(&mem),
            // MOVD and MOVQ to a general-purpose register.
            _ => {
                let value = low_u64(&self.vector_operand(1, 0)?);
                let destination = self.place(0, Intent::Write)?;
                self.put(destination, value)
            }
        }
    }

    /// #UD if the operating system has not enabled the registers, #NM if it
    /// switches them lazily.
    fn check_enabled(&self) -> Outcome<()> {
        let prefixes = self.insn.prefixes;
        let usable = if prefixes.vex {
            let needed = if prefixes.evex { XCR0_AVX512 } else { XCR0_AVX };
            self.machine.cr4() & CR4_OSXSAVE != 0 && self.machine.xcr0() & needed == needed
        } else {
            self.machine.cr4() & CR4_OSFXSR != 0 && self.machine.cr0() & CR0_EM == 0
        };
        self.check_available(usable)
    }

    fn check_available(&self, usable: bool) -> Outcome<()> {
        if !usable {
            return Self::fault(Exception::INVALID_OPCODE);
        }
        if self.machine.cr0() & CR0_TS != 0 {
            return Self::fault(Exception::NO_DEVICE);
        }
        Ok(())
    }

    /// The bytes of operand `n`; of memory those in `bits`. What is not read is
    /// zero for memory and general-purpose registers.
    fn vector_operand(&mut self, n: usize, bits: u64) -> Outcome<Bytes> {
        let mut bytes = [0; 64];
        match self.operand(n) {
            Operand::Vector { index, .. } => bytes = self.machine.vector(index),
            Operand::Mem(mem) => {
                self.check_vector_alignment(&mem, bits)?;
                self.read_bytes(&mem, bits, &mut bytes)?;
            }
            _ => {
                let value = self.fetch(n)?;
                overlay(&mut bytes, 0, &value.to_le_bytes());
            }
        }
        Ok(bytes)
    }

    /// Processors look at the alignment only if they move anything.
    fn check_vector_alignment(&self, mem: &Mem, bits: u64) -> Outcome<()> {
        match self.insn.op {
            Op::VecMoveAligned if bits != 0 => self.require_alignment(mem, mem.size),
            _ => Ok(()),
        }
    }

    /// Which of the `size` bytes of the operand the instruction moves.
    fn moved(&self, size: u8) -> u64 {
        let all = first(size);
        if self.insn.op == Op::VecMasked {
            let Operand::Vector { index, .. } = self.operand(1) else {
                return 0;
            };
            let element = self.insn.mask.map_or(4, |mask| mask.element);
            return chosen(&self.machine.vector(index), size, element);
        }
        match self.insn.mask {
            Some(mask) => all & spread(self.machine.opmask(mask.register), mask.element),
            None => all,
        }
    }

    /// Where the element of `len` bytes is that operand `n` numbers, in a vector
    /// of `size` bytes.
    fn element_at(&mut self, n: usize, size: u8, len: u8) -> Outcome<usize> {
        let start = (self.fetch(n)? as u8).wrapping_mul(len);
        Ok(usize::from(start & size.wrapping_sub(1)))
    }

    /// Loads, and moves between registers. `size` is the destination's.
    fn vector_load(&mut self, index: u8, size: u8) -> Outcome<()> {
        let op = self.insn.op;
        let vex = self.insn.prefixes.vex;
        let old = self.machine.vector(index);
        let source_size = self.size_of(1);
        let source = if op == Op::VecMasked { 2 } else { 1 };
        let (bits, read) = if op == Op::VecBroadcast {
            let bits = self.moved(size);
            (bits, folded(bits, source_size))
        } else {
            let bits = self.moved(self.size_of(source));
            (bits, bits)
        };
        let mut value = self.vector_operand(source, read)?;
        let len = match op {
            Op::VecLoad => source_size,
            Op::VecBroadcast => {
                let element = value;
                for at in (0..64usize).step_by(source_size.max(1).into()) {
                    let element = element.get(..source_size.into()).unwrap_or_default();
                    overlay(&mut value, at, element);
                }
                size
            }
            Op::VecInsert => {
                let len = self.size_of(2);
                let element = self.vector_operand(2, first(len))?;
                let at = self.element_at(3, size, len)?;
                overlay(
                    &mut value,
                    at,
                    element.get(..len.into()).unwrap_or_default(),
                );
                size
            }
            _ => size,
        };
        let mut result = [0; 64];
        let mut written = first(len);
        if let Some(mask) = self.insn.mask {
            written &= bits;
            if !mask.zeroing {
                blend(&mut result, &old, first(len));
            }
        }
        if !vex {
            // Legacy SSE leaves what is above the XMM register.
            blend(&mut result, &old, !first(16));
        }
        blend(&mut result, &value, written);
        self.machine.set_vector(index, &result);
        Ok(())
    }

    /// Stores.
    fn vector_store(&mut self, mem: &Mem) -> Outcome<()> {
        let op = self.insn.op;
        let from = if op == Op::VecMasked { 2 } else { 1 };
        let source = self.vector_operand(from, 0)?;
        let (value, bits) = match op {
            Op::VecMove | Op::VecMoveAligned | Op::VecStore | Op::VecMasked => {
                (source, self.moved(mem.size))
            }
            Op::VecMaskedBytes => {
                let by = self.vector_operand(2, 0)?;
                self.memory(mem, 0, Intent::Write)?;
                (source, chosen(&by, mem.size, 1))
            }
            Op::VecExtract => {
                // SDM 2A 2.8, class E6NF: a mask suppresses no fault.
                self.memory(mem, 0, Intent::Write)?;
                let at = self.element_at(2, self.size_of(1), mem.size)?;
                (shifted_down(&source, at), self.moved(mem.size))
            }
            _ => return Err(Stop::UNSUPPORTED),
        };
        self.check_vector_alignment(mem, bits)?;
        self.write_bytes(mem, bits, &value)
    }

    /// Calls `each` for every run of bytes in `bits`, resolved: where it starts, how
    /// many bytes it has. A run counts on from the operand's offset; an address
    /// size of two bytes does not cut it again.
    #[inline(never)]
    fn runs(
        &mut self,
        mem: &Mem,
        bits: u64,
        intent: Intent,
        each: &mut EachRun<'_, Self>,
    ) -> Outcome<()> {
        let offset = self.offset(mem, 0);
        let mut rest = bits;
        while rest != 0 {
            let start = rest.trailing_zeros();
            let size = (!rest.wrapping_shr(start)).trailing_zeros();
            let size = size.min(64u32.wrapping_sub(start));
            let mut at = offset.wrapping_add(start.into());
            if !self.long() {
                at &= 0xffff_ffff;
            }
            let span = self.segmented(mem.seg, at, size as u8, intent)?;
            let end = start.wrapping_add(size) as usize;
            each(self, start as usize..end, &span)?;
            rest &= !first(size as u8).wrapping_shl(start);
        }
        Ok(())
    }

    /// Reads the bytes of an operand whose bits are set. All runs are checked
    /// before the first is read.
    fn read_bytes(&mut self, mem: &Mem, bits: u64, into: &mut Bytes) -> Outcome<()> {
        self.runs(mem, bits, Intent::Read, &mut |_, _, _| Ok(()))?;
        self.runs(
            mem,
            bits,
            Intent::Read,
            &mut |run, place, span| match into.get_mut(place) {
                Some(bytes) => run.read(span, bytes),
                None => Err(Stop::UNSUPPORTED),
            },
        )
    }

    /// Writes the bytes of an operand whose bits are set: device memory first,
    /// because each piece ends the call.
    fn write_bytes(&mut self, mem: &Mem, bits: u64, from: &Bytes) -> Outcome<()> {
        self.runs(mem, bits, Intent::Write, &mut |_, _, _| Ok(()))?;
        for backing in [Backing::Mmio, Backing::Ram] {
            self.runs(
                mem,
                bits,
                Intent::Write,
                &mut |run, place, span| match from.get(place) {
                    Some(bytes) => run.write_backed(span, bytes, backing),
                    None => Err(Stop::UNSUPPORTED),
                },
            )?;
        }
        Ok(())
    }

    /// LDMXCSR and STMXCSR. SDM 2A "LDMXCSR": #GP for a reserved bit.
    pub(super) fn mxcsr(&mut self) -> Outcome<()> {
        self.check_enabled()?;
        if self.insn.op == Op::Stmxcsr {
            let value = self.machine.mxcsr();
            let destination = self.place(0, Intent::Write)?;
            return self.put(destination, value.into());
        }
        let value = self.fetch(0)? as u32;
        if self.machine.set_mxcsr(value) {
            Ok(())
        } else {
            Self::fault(Exception::PROTECTION)
        }
    }

    /// MMX moves and MASKMOVQ. MASKMOVQ and MASKMOVDQU fault for bytes they do not
    /// store too, as processors do (SDM 2B "MASKMOVDQU" leaves it open). SDM 3A 13.3 "Saving and Restoring the MMX State and
    /// Registers", 13.1 "Emulation of the MMX Instruction Set".
    pub(super) fn mmx(&mut self) -> Outcome<()> {
        self.check_available(self.machine.cr0() & CR0_EM == 0)?;
        if self.machine.x87_error() {
            return Self::fault(Exception::FLOATING_POINT);
        }
        let source = match self.operand(1) {
            Operand::Mmx(index) => self.machine.mmx(index),
            _ => self.fetch(1)?,
        };
        let write = match (self.operand(0), self.operand(2)) {
            (Operand::Mmx(index), _) => Some((index, source)),
            (Operand::Mem(mem), Operand::Mmx(by)) => {
                let (mut value, mut chooser) = ([0; 64], [0; 64]);
                overlay(&mut value, 0, &source.to_le_bytes());
                overlay(&mut chooser, 0, &self.machine.mmx(by).to_le_bytes());
                self.memory(&mem, 0, Intent::Write)?;
                self.write_bytes(&mem, chosen(&chooser, 8, 1), &value)?;
                None
            }
            _ => {
                let destination = self.place(0, Intent::Write)?;
                self.put(destination, source)?;
                None
            }
        };
        self.machine.end_mmx(write);
        Ok(())
    }
}
