//! Plain instructions: those that access memory through one operand, and do
//! nothing else but change a register, the status flags, or that operand.
//!
//! MOV and its kin (MOVZX, MOVSX, MOVSXD, MOVNTI, MOVDIRI); CMP and TEST; ADD,
//! OR, ADC, SBB, AND, SUB, XOR, INC, DEC, NOT and NEG. Such an instruction needs
//! no second pass when user space has answered: a store has nothing left to do,
//! and for the others the value read is all that was missing. What they mean is
//! the same as in [`super::execute`]; `vmx/tests/emulate_plain.rs` compares the
//! two.

use super::execute::{CF, compute};
use super::insn::{Insn, Mem, Op, Operand};
use super::machine::{Gpr, Mode, Seg};

/// A register operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Register {
    gpr: Gpr,
    /// Bytes: 1, 2, 4 or 8.
    size: u8,
    /// AH, CH, DH or BH.
    high: bool,
}

impl Register {
    /// What the whole register holds when `value` is put into this part of it.
    /// Four bytes clear the upper half, fewer keep the rest (SDM 1 3.4.1.1
    /// "General-Purpose Registers in 64-Bit Mode").
    const fn merged(self, old: u64, value: u64) -> u64 {
        match self.size {
            1 if self.high => old & !0xff00 | (value & 0xff) << 8,
            1 => old & !0xff | value & 0xff,
            2 => old & !0xffff | value & 0xffff,
            size => value & mask(size),
        }
    }
}

/// An operand that is a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Register(Register),
    Constant(u64),
}

impl Number {
    /// The bytes above its size mean nothing. `None`: `gpr` does not know the
    /// register.
    #[cfg_attr(haxm_module, optimize(speed))]
    #[inline]
    fn value(self, gpr: impl Fn(Gpr) -> Option<u64>) -> Option<u64> {
        Some(match self {
            Self::Constant(value) => value,
            Self::Register(from) if from.high => gpr(from.gpr)? >> 8,
            Self::Register(from) => gpr(from.gpr)?,
        })
    }
}

/// What is left of a load when memory has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    to: Register,
    /// Bytes of memory: 1, 2, 4 or 8.
    size: u8,
    /// Extends the sign.
    signed: bool,
}

impl Load {
    /// The register it changes.
    #[must_use]
    pub const fn register(&self) -> Gpr {
        self.to.gpr
    }

    /// What that register holds afterwards: `old` is what it holds now, `read`
    /// what memory gave, of which only the low [`Plain::size`] bytes count.
    #[must_use]
    pub const fn result(&self, old: u64, read: u64) -> u64 {
        let value = match (self.signed, self.size) {
            (true, 1) => read as u8 as i8 as u64,
            (true, 2) => read as u16 as i16 as u64,
            (true, 4) => read as u32 as i32 as u64,
            (_, size) => read & mask(size),
        };
        self.to.merged(old, value)
    }
}

/// Where the result of a computation goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Nowhere,
    Register(Register),
    Memory,
}

/// What is left of a computation when memory has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    op: Op,
    /// The operand that is not memory.
    other: Number,
    /// Memory is the second operand.
    memory_second: bool,
    to: Target,
    /// Bytes of each operand: 1, 2, 4 or 8.
    size: u8,
}

/// What a [`Compute`] changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Computed {
    /// All of a register.
    pub register: Option<(Gpr, u64)>,
    /// The memory operand, bytes above its size zero.
    pub memory: Option<u64>,
    /// The flags that it sets, and which of them become 1.
    pub flags: (u64, u64),
}

impl Compute {
    /// Bytes of memory: 1, 2, 4 or 8.
    #[must_use]
    pub const fn size(&self) -> u8 {
        self.size
    }

    /// `read` is what memory gave, `flags` RFLAGS; `gpr` knows the registers.
    /// `None`: it does not know the one that is an operand.
    #[inline(never)]
    pub fn outcome(
        &self,
        read: u64,
        flags: u64,
        gpr: &dyn Fn(Gpr) -> Option<u64>,
    ) -> Option<Computed> {
        let other = self.other.value(gpr)?;
        let (a, b) = if self.memory_second {
            (other, read)
        } else {
            (read, other)
        };
        let (value, found, defined) = compute(self.op, a, b, flags & CF != 0, self.size)?;
        Some(Computed {
            register: match self.to {
                Target::Register(to) => Some((to.gpr, to.merged(gpr(to.gpr)?, value))),
                _ => None,
            },
            memory: (self.to == Target::Memory).then_some(value & mask(self.size)),
            flags: (defined, found),
        })
    }
}

/// What is left when memory has been accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest<'a> {
    /// A store: nothing.
    Nothing,
    /// Memory was read and goes to a register.
    Load(&'a Load),
    /// Memory was read and is an operand; it may be written next.
    Compute(&'a Compute),
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Memory to a register.
    Load(Load),
    /// A register or an immediate to memory.
    Store(Number),
    /// An operation with memory as an operand.
    Compute(Compute),
}

/// A plain instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plain {
    kind: Kind,
    mem: Mem,
    /// Ones in the bits an offset has.
    offset_mask: u64,
    len: u8,
    mode: Mode,
}

/// Ones in the low `size` bytes.
const fn mask(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

const fn number(operand: Operand) -> Option<Number> {
    let (gpr, size, high) = match operand {
        Operand::Imm(value) => return Some(Number::Constant(value)),
        Operand::Reg { reg, size } => (reg, size, false),
        Operand::HighByte(reg) => (reg, 1, true),
        _ => return None,
    };
    Some(Number::Register(Register { gpr, size, high }))
}

/// An operation with the operands `number` and `mem`, in this order if
/// `memory_second`.
fn computation(op: Op, number: Number, mem: Mem, memory_second: bool) -> Option<Kind> {
    let to = match (op, number) {
        (Op::Cmp | Op::Test, _) => Target::Nowhere,
        (_, Number::Register(register)) if memory_second => Target::Register(register),
        _ => Target::Memory,
    };
    Some(Kind::Compute(Compute {
        op,
        other: number,
        memory_second,
        to,
        size: mem.size,
    }))
}

impl Plain {
    /// `insn` as a plain instruction, if it is one.
    #[must_use]
    pub fn of(insn: &Insn) -> Option<Self> {
        let (other, mem, memory_second) = match (insn.operand(0), insn.operand(1)) {
            (Operand::Mem(mem), Operand::None) => (Number::Constant(0), mem, false),
            (Operand::Mem(mem), other) => (number(other)?, mem, false),
            (other, Operand::Mem(mem)) => (number(other)?, mem, true),
            _ => return None,
        };
        let kind = match (insn.op, other) {
            (op @ (Op::Mov | Op::Movzx | Op::Movsx), Number::Register(to)) if memory_second => {
                Kind::Load(Load {
                    to,
                    size: mem.size,
                    signed: op == Op::Movsx,
                })
            }
            (Op::Mov, from) => Kind::Store(from),
            (op, _) if op.is_computed() => computation(op, other, mem, memory_second)?,
            _ => return None,
        };
        Some(Self {
            kind,
            mem,
            offset_mask: mask(insn.address_size),
            len: insn.len,
            mode: insn.mode,
        })
    }

    /// Its first access to memory is a write.
    #[must_use]
    pub const fn is_store(&self) -> bool {
        matches!(self.kind, Kind::Store(_))
    }

    /// It writes memory, if not at first.
    #[must_use]
    pub const fn writes(&self) -> bool {
        match self.kind {
            Kind::Load(_) => false,
            Kind::Store(_) => true,
            Kind::Compute(Compute { to, .. }) => matches!(to, Target::Memory),
        }
    }

    /// Bytes of memory: 1, 2, 4 or 8.
    #[must_use]
    pub const fn size(&self) -> u8 {
        self.mem.size
    }

    /// The segment whose base is part of the address; `None` if there is no
    /// base to add: 64-bit code has one in FS and GS only (SDM 1 3.4.2.1
    /// "Segment Registers in 64-Bit Mode").
    #[must_use]
    pub fn based_on(&self) -> Option<Seg> {
        match (self.mode, self.mem.seg) {
            (Mode::Bits64, Seg::Fs | Seg::Gs) => Some(self.mem.seg),
            (Mode::Bits64, _) => None,
            (_, seg) => Some(seg),
        }
    }

    /// RIP of the next instruction; `rip` is its own.
    #[must_use]
    pub fn next_rip(&self, rip: u64) -> u64 {
        let next = rip.wrapping_add(u64::from(self.len));
        if self.mode == Mode::Bits64 {
            next
        } else {
            next & mask(4)
        }
    }

    /// The linear address of the first byte of memory. `base` is that of
    /// [`Plain::based_on`]; `gpr` knows the registers. `None`: it does not
    /// know one of them.
    #[must_use]
    pub fn linear(&self, rip: u64, base: u64, gpr: impl Fn(Gpr) -> Option<u64>) -> Option<u64> {
        let mut offset = self.mem.disp;
        if let Some(reg) = self.mem.base {
            offset = offset.wrapping_add(gpr(reg)?);
        }
        if let Some(reg) = self.mem.index {
            let scaled = gpr(reg)?.wrapping_shl(u32::from(self.mem.scale));
            offset = offset.wrapping_add(scaled);
        }
        if self.mem.rip_relative {
            offset = offset.wrapping_add(self.next_rip(rip));
        }
        let linear = base.wrapping_add(offset & self.offset_mask);
        Some(if self.mode == Mode::Bits64 {
            linear
        } else {
            linear & mask(4)
        })
    }

    /// What it writes first, bytes above [`Plain::size`] zero; 0 if it reads.
    /// `None`: `gpr` does not know the operand that is a register, of which part
    /// may stay as it is.
    #[must_use]
    pub fn sent(&self, gpr: impl Fn(Gpr) -> Option<u64>) -> Option<u64> {
        let value = match self.kind {
            Kind::Load(load) => return gpr(load.to.gpr).map(|_| 0),
            Kind::Compute(compute) => return compute.other.value(gpr).map(|_| 0),
            Kind::Store(from) => from.value(gpr)?,
        };
        Some(value & mask(self.mem.size))
    }

    /// What is left to do when the first access is done.
    #[must_use]
    pub const fn rest(&self) -> Rest<'_> {
        match &self.kind {
            Kind::Load(load) => Rest::Load(load),
            Kind::Store(_) => Rest::Nothing,
            Kind::Compute(compute) => Rest::Compute(compute),
        }
    }
}
