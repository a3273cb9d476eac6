//! String instructions, one element at a time; INS and OUTS in batches that one
//! exit can carry. SDM 1 7.3.9 "String Operations", 2B "REP/REPE/REPZ/REPNE/
//! REPNZ-Repeat String Operation Prefix".
//!
//! Each iteration commits rSI, rDI and rCX and empties the log. RIP stays on the
//! instruction until the last one.

use super::access::{Intent, Span};
use super::flags::{self, DF, STATUS, ZF};
use super::{Next, Outcome, Run, Stop, TRAP};
use crate::emulate::Step;
use crate::emulate::insn::{Mem, Op, Operand, Repeat};
use crate::emulate::machine::{Gpr, Machine, PORT_BUFFER_LEN};
use crate::emulate::mmio::{Kind, Recall};

/// Most iterations of a repeated string instruction in one call.
pub const MAX_ITERATIONS: u32 = 4096;

/// The elements one pass of INS or OUTS moves: all in RAM in one page, or a
/// single one anywhere.
struct Batch {
    span: Span,
    count: u64,
    bytes: u8,
    port: u16,
    down: bool,
}

/// What one pass did.
struct Pass {
    /// Elements moved or compared.
    count: u64,
    /// The status flags of a comparison.
    found: Option<u64>,
}

/// A repeated comparison also stops on ZF.
fn ends_early(repeat: Repeat, found: Option<u64>) -> bool {
    found.is_some_and(|flags| (flags & ZF != 0) != (repeat == Repeat::Equal))
}

impl<M: Machine> Run<'_, M> {
    /// Runs a string instruction until it is complete or has to stop.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn string(&mut self) -> Outcome<Next> {
        let repeat = self.insn.prefixes.repeat;
        if repeat == Repeat::No {
            let found = self.pass(1)?.found;
            self.commit_comparison(found);
            return Ok(Next::Sequential);
        }
        let width = self.insn.address_size;
        let trap = self.machine.rflags() & TRAP != 0;
        for _ in 0..MAX_ITERATIONS {
            let count = self.reg(Gpr::Rcx, width);
            if count == 0 {
                return Ok(Next::Sequential);
            }
            let done = self.pass(if trap { 1 } else { count })?;
            let left = count.wrapping_sub(done.count);
            self.set_reg(Gpr::Rcx, width, left);
            self.log.clear();
            if left == 0 || ends_early(repeat, done.found) {
                self.commit_comparison(done.found);
                return Ok(Next::Sequential);
            }
            if trap {
                return Ok(Next::Stay(Step::Done));
            }
            if self.machine.should_pause() {
                break;
            }
        }
        Ok(Next::Stay(Step::Again))
    }

    /// Only the last comparison shows in the flags: an interrupted or faulting
    /// CMPS or SCAS has those it began with (SDM 2B "REP").
    fn commit_comparison(&mut self, found: Option<u64>) {
        if let Some(found) = found {
            self.commit_flags(STATUS, found);
        }
    }

    /// One iteration, or up to `most` for INS and OUTS.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn pass(&mut self, most: u64) -> Outcome<Pass> {
        let mut pass = Pass {
            count: 1,
            found: None,
        };
        match self.insn.op {
            Op::Ins => pass.count = self.input(most)?,
            Op::Outs => pass.count = self.output(most)?,
            Op::Movs => self.move_element()?,
            Op::Stos => self.store_element()?,
            Op::Lods => self.load_element()?,
            _ => pass.found = Some(self.compare_element()?),
        }
        Ok(pass)
    }

    /// The memory operand in place `n`.
    fn element(&self, n: usize) -> Outcome<Mem> {
        match self.operand(n) {
            Operand::Mem(mem) => Ok(mem),
            _ => Err(Stop::UNSUPPORTED),
        }
    }

    /// Moves an index register by `bytes` in the direction of DF.
    fn advance(&mut self, reg: Gpr, bytes: u8) {
        let width = self.insn.address_size;
        let old = self.machine.gpr(reg);
        let bytes = u64::from(bytes);
        let new = if self.is_down() {
            old.wrapping_sub(bytes)
        } else {
            old.wrapping_add(bytes)
        };
        self.set_reg(reg, width, new);
    }

    fn is_down(&self) -> bool {
        self.machine.rflags() & DF != 0
    }

    fn move_element(&mut self) -> Outcome<()> {
        let (to, from) = (self.element(0)?, self.element(1)?);
        let source = self.memory(&from, 0, Intent::Read)?;
        let destination = self.memory(&to, 0, Intent::Write)?;
        let value = self.load(&source)?;
        self.store(&destination, value)?;
        self.advance(Gpr::Rsi, from.size);
        self.advance(Gpr::Rdi, to.size);
        Ok(())
    }

    fn store_element(&mut self) -> Outcome<()> {
        let to = self.element(0)?;
        let value = self.reg(Gpr::Rax, to.size);
        let destination = self.memory(&to, 0, Intent::Write)?;
        self.store(&destination, u128::from(value))?;
        self.advance(Gpr::Rdi, to.size);
        Ok(())
    }

    fn load_element(&mut self) -> Outcome<()> {
        let from = self.element(1)?;
        let source = self.memory(&from, 0, Intent::Read)?;
        let value = self.load(&source)? as u64;
        self.set_reg(Gpr::Rax, from.size, value);
        self.advance(Gpr::Rsi, from.size);
        Ok(())
    }

    /// CMPS subtracts the element at rDI from the one at rSI, SCAS from rAX.
    /// Returns the status flags.
    fn compare_element(&mut self) -> Outcome<u64> {
        let size = self.size_of(1);
        // Processors look at rDI first; the order shows when both fault.
        let second = self.place(1, Intent::Read)?;
        let first = self.place(0, Intent::Read)?;
        let a = self.get(first)?;
        let b = self.get(second)?;
        let (_, found) = flags::sub(a, b, false, size);
        if self.insn.op == Op::Cmps {
            self.advance(Gpr::Rsi, size);
        }
        self.advance(Gpr::Rdi, size);
        Ok(found)
    }

    /// Finds how many elements of INS or OUTS one exit can carry.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn batch(&mut self, mem: &Mem, most: u64, intent: Intent) -> Outcome<Batch> {
        let size = u64::from(mem.size);
        let port = self.reg(Gpr::Rdx, 2) as u16;
        let down = self.is_down();
        let offset = self.offset(mem, 0);
        let linear = self.linear(mem.seg, offset, mem.size, intent)?;
        let in_page = linear & 0xfff;
        let room = if down {
            in_page.wrapping_add(size)
        } else {
            0x1000u64.wrapping_sub(in_page)
        };
        let fits = room.min(PORT_BUFFER_LEN as u64).checked_div(size);
        let count = most.min(fits.unwrap_or(1));
        if count > 1 && in_page.wrapping_add(size) <= 0x1000 {
            let bytes = count.wrapping_mul(size);
            let back = if down { bytes.wrapping_sub(size) } else { 0 };
            let start = offset.wrapping_sub(back);
            // A refusal, or MMIO, or a wrapped offset: then one at a time, which
            // finds the element it belongs to.
            if start <= offset {
                let whole = self.segmented(mem.seg, start, bytes as u8, intent).ok();
                if let Some(span) = whole.filter(|span| span.is_ram(intent == Intent::Write)) {
                    return Ok(Batch {
                        span,
                        count,
                        bytes: bytes as u8,
                        port,
                        down,
                    });
                }
            }
        }
        Ok(Batch {
            span: self.segmented(mem.seg, offset, mem.size, intent)?,
            count: 1,
            bytes: mem.size,
            port,
            down,
        })
    }

    /// INS. The privilege to use the port is checked by hardware before the exit
    /// (SDM 3C 26.1.1 "Relative Priority of Faults and VM Exits").
    fn input(&mut self, most: u64) -> Outcome<u64> {
        let mem = self.element(0)?;
        let batch = self.batch(&mem, most, Intent::Write)?;
        let count = batch.count as u16;
        let (port, size, down) = (batch.port, mem.size, batch.down);
        match self.log.recall(Kind::In, u64::from(port), size, count) {
            Recall::Answered(_) => {}
            Recall::Ask => {
                return Err(self.keep(Step::In {
                    port,
                    size,
                    count,
                    down,
                }));
            }
            Recall::Lost => return Err(Stop::AGAIN),
            Recall::Full => return Err(Stop::UNSUPPORTED),
        }
        let mut bytes = [0u8; PORT_BUFFER_LEN];
        if let Some(used) = bytes.get_mut(..usize::from(batch.bytes)) {
            self.machine.read_port_buffer(0, used);
        }
        if batch.span.is_ram(true) {
            self.write(&batch.span, &bytes)?;
        } else {
            // Writing to the device goes through the same page as the port
            // buffer: keep the element.
            let [a, b, c, d, ..] = bytes;
            let value = u64::from(u32::from_le_bytes([a, b, c, d]));
            let value = self.log.keep(value);
            self.store(&batch.span, u128::from(value))?;
        }
        self.advance(Gpr::Rdi, batch.bytes);
        Ok(batch.count)
    }

    /// OUTS.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn output(&mut self, most: u64) -> Outcome<u64> {
        let mem = self.element(1)?;
        let batch = self.batch(&mem, most, Intent::Read)?;
        let mut bytes = [0u8; PORT_BUFFER_LEN];
        // What has gone to the port is not looked at again. MMIO is, for the log.
        if !(self.log.has_answer() && batch.span.is_ram(false)) {
            self.read(&batch.span, &mut bytes)?;
        }
        let count = batch.count as u16;
        let (port, size, down) = (batch.port, mem.size, batch.down);
        match self.log.recall(Kind::Out, u64::from(port), size, count) {
            Recall::Answered(_) => {}
            Recall::Ask => {
                if let Some(used) = bytes.get(..usize::from(batch.bytes)) {
                    self.machine.write_port_buffer(0, used);
                }
                return Err(self.keep(Step::Out {
                    port,
                    size,
                    count,
                    down,
                }));
            }
            Recall::Lost => return Err(Stop::AGAIN),
            Recall::Full => return Err(Stop::UNSUPPORTED),
        }
        self.advance(Gpr::Rsi, batch.bytes);
        Ok(batch.count)
    }
}
