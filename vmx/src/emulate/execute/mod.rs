//! Executes a decoded instruction on a [`Machine`].
//!
//! Every instruction keeps one order: resolve its memory operands (all faults
//! are found here), read, compute, write memory, and only then change flags and
//! registers. Any step before the last may end the call with a [`Step`]; the
//! next call starts over and finds the answers in the log.

mod access;
mod address;
mod arith;
mod bits;
mod flags;
mod moves;
mod muldiv;
mod segment;
mod shift;
mod simd;
mod stack;
mod stop;
mod string;
mod system;

use super::Step;
use super::insn::{Insn, Op, Operand};
use super::machine::{Exception, Gpr, Machine, Mode};
use super::mmio::MmioLog;
use access::{Intent, PLACES, Place, Resolved};
use stop::Stop;

pub(super) use arith::compute;
pub(super) use flags::CF;
pub use string::MAX_ITERATIONS;

/// Tries of an atomic update before the call ends with [`Step::Again`].
const MAX_ATTEMPTS: u32 = 64;

/// RFLAGS.TF and RFLAGS.RF.
const TRAP: u64 = 1 << 8;
const RESUME: u64 = 1 << 16;

/// An early end of the call, or the value asked for.
type Outcome<T> = Result<T, Stop>;

/// Where execution goes after an instruction.
enum Next {
    /// The instruction after it.
    Sequential,
    /// A branch target, already checked.
    Jump(u64),
    /// The target of IRET, which loaded RF.
    Return(u64),
    /// Not complete: a repeated string instruction that stops between two
    /// iterations.
    Stay(Step),
}

/// Executes `insn`, which lies at the machine's RIP, with what `log` remembers
/// of earlier calls. See the module's text for what to do with the result.
#[cfg_attr(haxm_module, optimize(speed))]
pub fn execute<M: Machine>(insn: &Insn, machine: &mut M, log: &mut MmioLog) -> Step {
    log.rewind();
    let mut run = Run {
        insn,
        machine,
        log,
        kept: Step::Done,
        places: [Place::Constant(0); PLACES],
    };
    match run.operation() {
        Ok(Next::Sequential) => {
            let next = run.next_rip();
            run.retire(next)
        }
        Ok(Next::Jump(target)) => run.retire(target),
        Ok(Next::Return(target)) => {
            run.machine.set_rip(target);
            run.log.clear();
            Step::Done
        }
        Ok(Next::Stay(step)) => {
            run.log.clear();
            step
        }
        Err(stop) => {
            let step = run.step_of(stop);
            if matches!(step, Step::Fault(_) | Step::Unsupported) {
                run.log.clear();
            }
            step
        }
    }
}

/// One call of [`execute`].
struct Run<'a, M> {
    insn: &'a Insn,
    machine: &'a mut M,
    log: &'a mut MmioLog,
    /// How the call ends, if a [`Stop`] is too small to tell.
    kept: Step,
    /// The operands that are resolved, by number.
    places: [Place; PLACES],
}

impl<M: Machine> Run<'_, M> {
    fn long(&self) -> bool {
        self.insn.mode == Mode::Bits64
    }

    /// The address of the next instruction.
    fn next_rip(&self) -> u64 {
        let next = self.machine.rip().wrapping_add(u64::from(self.insn.len));
        if self.long() {
            next
        } else {
            next & 0xffff_ffff
        }
    }

    /// Completes the instruction. RF is clear after any instruction but those
    /// that load it (SDM 3A 18.3.1.1 "Instruction-Breakpoint Exception
    /// Condition").
    fn retire(&mut self, rip: u64) -> Step {
        self.machine.set_rip(rip);
        let flags = self.machine.rflags();
        if flags & RESUME != 0 {
            self.machine.set_rflags(flags & !RESUME);
        }
        self.log.clear();
        Step::Done
    }

    fn operand(&self, n: usize) -> Operand {
        self.insn.operand(n)
    }

    /// Bytes of operand `n`.
    #[inline(never)]
    fn size_of(&self, n: usize) -> u8 {
        self.insn.operand(n).size()
    }

    /// The effective operand size in bytes.
    fn size(&self) -> u8 {
        self.insn.operand_size
    }

    /// Resolves operand `n`.
    #[inline(never)]
    fn place(&mut self, n: usize, intent: Intent) -> Outcome<Resolved> {
        let operand = self.operand(n);
        self.resolve(n, operand, intent)
    }

    /// Resolves and reads operand `n`.
    #[inline(never)]
    fn fetch(&mut self, n: usize) -> Outcome<u64> {
        let place = self.place(n, Intent::Read)?;
        self.get(place)
    }

    /// Replaces the flags in `mask` by those in `value`.
    #[inline(never)]
    fn commit_flags(&mut self, mask: u64, value: u64) {
        let old = self.machine.rflags();
        let new = old & !mask | value & mask;
        self.machine.set_rflags(new);
    }

    /// Writes the low `size` bytes of a register as an instruction does: four
    /// bytes clear the upper half, fewer keep the rest (SDM 1 3.4.1.1).
    fn set_reg(&mut self, reg: Gpr, size: u8, value: u64) {
        let old = self.machine.gpr(reg);
        let new = match size {
            1 => old & !0xff | value & 0xff,
            2 => old & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
        self.machine.set_gpr(reg, new);
    }

    /// The low `size` bytes of a register.
    fn reg(&self, reg: Gpr, size: u8) -> u64 {
        self.machine.gpr(reg) & flags::mask(size)
    }

    fn fault<T>(exception: Exception) -> Outcome<T> {
        Err(Stop::exception(exception))
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn operation(&mut self) -> Outcome<Next> {
        // SDM 2A 2.4.8: no VEX in real-address and virtual-8086 mode.
        if self.insn.prefixes.vex && !self.is_protected() {
            return Self::fault(Exception::INVALID_OPCODE);
        }
        match self.insn.op {
            Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas | Op::Ins | Op::Outs => {
                return self.string();
            }
            Op::Call => return self.call(),
            Op::Jmp => return self.jump(),
            Op::Ret => return self.ret(),
            Op::CallFar | Op::JmpFar => return self.far_branch(),
            Op::RetFar => return self.far_return(),
            Op::Iret => return self.interrupt_return(),
            _ => self.straight()?,
        }
        Ok(Next::Sequential)
    }

    /// The instructions that neither repeat nor branch.
    #[inline(never)]
    fn straight(&mut self) -> Outcome<()> {
        match self.insn.op {
            Op::Add
            | Op::Or
            | Op::Adc
            | Op::Sbb
            | Op::And
            | Op::Sub
            | Op::Xor
            | Op::Inc
            | Op::Dec
            | Op::Not
            | Op::Neg => self.update(),
            Op::Cmp | Op::Test => self.compare(),
            Op::Adcx | Op::Adox => self.add_one_flag(),
            Op::Rol | Op::Ror | Op::Rcl | Op::Rcr | Op::Shl | Op::Shr | Op::Sar => self.shift(),
            Op::Shld | Op::Shrd => self.double_shift(),
            Op::Rorx | Op::Sarx | Op::Shlx | Op::Shrx => self.shift_without_flags(),
            Op::Mul | Op::ImulWide => self.multiply_wide(),
            Op::Imul => self.multiply(),
            Op::Mulx => self.multiply_without_flags(),
            Op::Div | Op::Idiv => self.divide(),
            Op::Bt | Op::Bts | Op::Btr | Op::Btc => self.bit_test(),
            Op::Bsf | Op::Bsr | Op::Tzcnt | Op::Lzcnt | Op::Popcnt => self.bit_count(),
            Op::Crc32 => self.crc32(),
            Op::Andn
            | Op::Bextr
            | Op::Bzhi
            | Op::Blsr
            | Op::Blsmsk
            | Op::Blsi
            | Op::Pdep
            | Op::Pext => self.bit_field(),
            Op::Push => self.push(),
            Op::Pop => self.pop(),
            Op::Pusha => self.push_all(),
            Op::Popa => self.pop_all(),
            Op::Pushf => self.push_flags(),
            Op::Popf => self.pop_flags(),
            Op::Enter => self.enter(),
            Op::Leave => self.leave(),
            Op::LoadFar(seg) => self.load_far(seg),
            Op::Sgdt | Op::Sidt | Op::Lgdt | Op::Lidt => self.descriptor_table(),
            Op::Sldt | Op::Str | Op::Smsw => self.store_system(),
            Op::Lldt | Op::Ltr => self.load_system(),
            Op::Lmsw => self.load_status(),
            Op::Lar | Op::Lsl | Op::Verr | Op::Verw => self.inspect_segment(),
            Op::Ldmxcsr | Op::Stmxcsr => self.mxcsr(),
            Op::MmxMove => self.mmx(),
            Op::VecMove
            | Op::VecMoveAligned
            | Op::VecLoad
            | Op::VecStore
            | Op::VecBroadcast
            | Op::VecInsert
            | Op::VecExtract
            | Op::VecMasked
            | Op::VecMaskedBytes => self.vector(),
            _ => self.data_move(),
        }
    }
}
