//! Vector moves between memory and XMM or YMM registers. SDM 2B "MOVAPS",
//! "MOVDQU" and the rest; SDM 2A 2.4 "AVX and SSE Instruction Exception
//! Classification".

use super::access::Intent;
use super::{Outcome, Run};
use crate::emulate::Step;
use crate::emulate::insn::{Mem, Op, Operand};
use crate::emulate::machine::{Exception, Machine};

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
/// XCR0's SSE and AVX bits.
const XCR0_AVX: u64 = 6;

/// The low 256 bits of a vector register.
type Bytes = [u8; 32];

/// Copies `from` into `to`, starting `at` bytes in.
fn overlay(to: &mut Bytes, at: usize, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(at).zip(from) {
        *to = *from;
    }
}

/// The first `len` bytes, zeros above.
fn low(value: &Bytes, len: u8) -> Bytes {
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(value).take(usize::from(len)) {
        *to = *from;
    }
    out
}

/// The bytes from `at` on, at the start.
fn shifted_down(value: &Bytes, at: usize) -> Bytes {
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(value.iter().skip(at)) {
        *to = *from;
    }
    out
}

impl<M: Machine> Run<'_, M> {
    /// The instructions of this file.
    pub(super) fn vector(&mut self) -> Outcome<()> {
        self.check_enabled()?;
        match self.operand(0) {
            Operand::Vector { index, size } => self.vector_load(index, size),
            Operand::Mem(mem) => {
                let value = self.vector_result(&mem)?;
                self.vector_write(&mem, &value)
            }
            // MOVD and MOVQ to a general-purpose register.
            _ => {
                let [a, b, c, d, e, f, g, h, ..] = self.vector_operand(1)?;
                let value = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                let destination = self.place(0, Intent::Write)?;
                self.put(&destination, value)
            }
        }
    }

    /// #UD if the operating system has not enabled the registers, #NM if it
    /// switches them lazily.
    fn check_enabled(&self) -> Outcome<()> {
        let usable = if self.insn.prefixes.vex {
            self.machine.cr4() & CR4_OSXSAVE != 0 && self.machine.xcr0() & XCR0_AVX == XCR0_AVX
        } else {
            self.machine.cr4() & CR4_OSFXSR != 0 && self.machine.cr0() & CR0_EM == 0
        };
        if !usable {
            return Self::fault(Exception::INVALID_OPCODE);
        }
        if self.machine.cr0() & CR0_TS != 0 {
            return Self::fault(Exception::NO_DEVICE);
        }
        Ok(())
    }

    /// The bytes of operand `n`; those above its size are zero for memory and
    /// general-purpose registers.
    fn vector_operand(&mut self, n: usize) -> Outcome<Bytes> {
        let mut bytes = [0; 32];
        match self.operand(n) {
            Operand::Vector { index, .. } => bytes = self.machine.vector(index),
            Operand::Mem(mem) => {
                self.check_vector_alignment(&mem)?;
                let span = self.memory(&mem, 0, Intent::Read)?;
                self.read(&span, &mut bytes)?;
            }
            _ => {
                let value = self.fetch(n)?;
                overlay(&mut bytes, 0, &value.to_le_bytes());
            }
        }
        Ok(bytes)
    }

    fn check_vector_alignment(&self, mem: &Mem) -> Outcome<()> {
        match self.insn.op {
            Op::VecMoveAligned => self.require_alignment(mem, mem.size),
            _ => Ok(()),
        }
    }

    /// Loads, and moves between registers. `size` is the destination's.
    fn vector_load(&mut self, index: u8, size: u8) -> Outcome<()> {
        let vex = self.insn.prefixes.vex;
        let old = self.machine.vector(index);
        let source_size = self.operand(1).size();
        let first = self.vector_operand(1)?;
        let (value, len) = match self.insn.op {
            Op::VecMove | Op::VecMoveAligned => (first, size),
            Op::VecLoad => (low(&first, source_size), 16),
            Op::VecMergeLow | Op::VecMergeHigh => {
                let at = if self.insn.op == Op::VecMergeLow {
                    0
                } else {
                    8
                };
                // With VEX the half that is kept comes from the second operand.
                let (mut value, half) = if vex {
                    (first, self.vector_operand(2)?)
                } else {
                    (old, first)
                };
                let [a, b, c, d, e, f, g, h, ..] = half;
                overlay(&mut value, at, &[a, b, c, d, e, f, g, h]);
                (value, 16)
            }
            Op::VecBroadcast => {
                let mut value = [0; 32];
                let count = usize::from(source_size.max(1));
                for chunk in value.chunks_exact_mut(count) {
                    for (to, from) in chunk.iter_mut().zip(first) {
                        *to = from;
                    }
                }
                (value, size)
            }
            Op::VecInsertHalf => {
                let half = self.vector_operand(2)?;
                let high = self.fetch(3)? & 1 != 0;
                let [half, _] = halves(&half);
                let mut value = first;
                overlay(&mut value, if high { 16 } else { 0 }, &half);
                (value, 32)
            }
            _ => return Err(Step::Unsupported),
        };
        let mut result = low(&value, len);
        if !vex {
            // Legacy SSE leaves what is above the XMM register.
            let [_, upper] = halves(&old);
            overlay(&mut result, 16, &upper);
        }
        self.machine.set_vector(index, result, vex);
        Ok(())
    }

    /// What a store writes to memory, in the first bytes.
    fn vector_result(&mut self, mem: &Mem) -> Outcome<Bytes> {
        self.check_vector_alignment(mem)?;
        let source = self.vector_operand(1)?;
        Ok(match self.insn.op {
            Op::VecMove | Op::VecMoveAligned | Op::VecStore => source,
            Op::VecStoreHigh => shifted_down(&source, 8),
            Op::VecExtractHalf => {
                let high = self.fetch(2)? & 1 != 0;
                shifted_down(&source, if high { 16 } else { 0 })
            }
            _ => return Err(Step::Unsupported),
        })
    }

    fn vector_write(&mut self, mem: &Mem, value: &Bytes) -> Outcome<()> {
        let span = self.memory(mem, 0, Intent::Write)?;
        self.write(&span, value)
    }
}

/// The two 128-bit halves.
fn halves(value: &Bytes) -> [[u8; 16]; 2] {
    let mut out = [[0; 16]; 2];
    for (to, from) in out.iter_mut().flatten().zip(value) {
        *to = *from;
    }
    out
}
