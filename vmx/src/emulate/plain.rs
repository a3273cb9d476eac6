//! Plain moves: instructions that make one access to memory and do nothing
//! else but put what they read, extended or not, into a register.
//!
//! MOV, MOVZX, MOVSX, MOVSXD, MOVNTI and MOVDIRI with one memory operand. Such
//! an instruction needs no second pass when user space has answered: a store
//! has nothing left to do, and a load has its value. What it means is the same
//! as in [`super::execute`]; `vmx/tests/emulate_plain.rs` compares the two.

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
    /// what memory gave, of which only the low [`PlainMove::size`] bytes count.
    /// Four bytes clear the upper half, fewer keep the rest (SDM 1 3.4.1.1
    /// "General-Purpose Registers in 64-Bit Mode").
    #[must_use]
    pub const fn result(&self, old: u64, read: u64) -> u64 {
        let value = match (self.signed, self.size) {
            (true, 1) => read as u8 as i8 as u64,
            (true, 2) => read as u16 as i16 as u64,
            (true, 4) => read as u32 as i32 as u64,
            (_, size) => read & mask(size),
        };
        match self.to.size {
            1 if self.to.high => old & !0xff00 | (value & 0xff) << 8,
            1 => old & !0xff | value & 0xff,
            2 => old & !0xffff | value & 0xffff,
            size => value & mask(size),
        }
    }
}

/// What moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Memory to a register.
    Load(Load),
    /// A register to memory.
    Store(Register),
    /// An immediate to memory.
    StoreConstant(u64),
}

/// A plain move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlainMove {
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

const fn register(operand: Operand) -> Option<Register> {
    match operand {
        Operand::Reg { reg, size } => Some(Register {
            gpr: reg,
            size,
            high: false,
        }),
        Operand::HighByte(reg) => Some(Register {
            gpr: reg,
            size: 1,
            high: true,
        }),
        _ => None,
    }
}

impl PlainMove {
    /// `insn` as a plain move, if it is one.
    #[must_use]
    pub fn of(insn: &Insn) -> Option<Self> {
        let signed = match insn.op {
            Op::Mov | Op::Movzx => false,
            Op::Movsx => true,
            _ => return None,
        };
        let (kind, mem) = match (insn.operand(0), insn.operand(1)) {
            (Operand::Mem(mem), Operand::Imm(value)) => (Kind::StoreConstant(value), mem),
            (Operand::Mem(mem), source) => (Kind::Store(register(source)?), mem),
            (to, Operand::Mem(mem)) => {
                let to = register(to)?;
                let size = mem.size;
                (Kind::Load(Load { to, size, signed }), mem)
            }
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

    /// It writes memory.
    #[must_use]
    pub const fn is_store(&self) -> bool {
        !matches!(self.kind, Kind::Load(_))
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
    /// [`PlainMove::based_on`]; `gpr` knows the registers. `None`: it does not
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

    /// What a store writes, bytes above [`PlainMove::size`] zero. `None`: it
    /// is no store, or `gpr` does not know the register.
    #[must_use]
    pub fn stored(&self, gpr: impl Fn(Gpr) -> Option<u64>) -> Option<u64> {
        let value = match self.kind {
            Kind::Load(_) => return None,
            Kind::StoreConstant(value) => value,
            Kind::Store(from) if from.high => gpr(from.gpr)? >> 8,
            Kind::Store(from) => gpr(from.gpr)?,
        };
        Some(value & mask(self.mem.size))
    }

    /// What is left to do when memory has been read; `None` for a store, of
    /// which nothing is.
    #[must_use]
    pub const fn load(&self) -> Option<Load> {
        match self.kind {
            Kind::Load(load) => Some(load),
            _ => None,
        }
    }
}
