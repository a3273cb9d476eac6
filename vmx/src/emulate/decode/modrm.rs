//! The last stage of decoding: ModRM, SIB, displacement and immediates become
//! operands. SDM 2A 2.1.5 "Addressing-Mode Encoding of ModR/M and SIB Bytes",
//! 2.2.1 "REX Prefixes".

use super::opcode::{Arg, Form, ModRm, Width};
use super::prefix::Head;
use super::{Cursor, DecodeError};
use crate::emulate::insn::{Mem, Operand};
use crate::emulate::machine::{Gpr, Mode, Seg};

/// The sizes in effect, and ModRM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) mode: Mode,
    /// Operand size in bytes: 2, 4 or 8.
    pub(super) operand: u8,
    /// Address size in bytes: 2, 4 or 8.
    pub(super) address: u8,
    pub(super) modrm: ModRm,
}

impl Sizes {
    pub(super) fn new(head: &Head, mode: Mode, modrm: ModRm) -> Self {
        let prefixes = head.prefixes;
        let operand = match mode {
            Mode::Bits64 if head.wide => 8,
            Mode::Bits16 if prefixes.operand_size => 4,
            Mode::Bits16 => 2,
            _ if prefixes.operand_size => 2,
            _ => 4,
        };
        let address = match (mode, prefixes.address_size) {
            (Mode::Bits64, false) => 8,
            (Mode::Bits64 | Mode::Bits16, true) | (Mode::Bits32, false) => 4,
            (Mode::Bits32, true) | (Mode::Bits16, false) => 2,
        };
        Self {
            mode,
            operand,
            address,
            modrm,
        }
    }

    /// Bytes of an operand of this width.
    #[expect(clippy::match_same_arms, reason = "one row for each width")]
    fn bytes(&self, width: Width, head: &Head) -> u8 {
        let long = self.mode == Mode::Bits64;
        let wide = head.wide && long;
        match width {
            Width::Zero => 0,
            Width::Byte => 1,
            Width::Word => 2,
            Width::Dword => 4,
            Width::Qword => 8,
            Width::Oword => 16,
            Width::Yword => 32,
            Width::Opsize => self.operand,
            Width::Opsize32 => self.operand.min(4),
            Width::Wide if wide => 8,
            Width::Wide => 4,
            Width::Pair if wide => 16,
            Width::Pair => 8,
            Width::Stack if long && self.operand != 2 => 8,
            Width::Branch if long => 8,
            Width::Stack | Width::Branch => self.operand,
            Width::Vector => head.vector_bytes,
            Width::Far => self.operand.wrapping_add(2),
            Width::Bounds => self.operand.wrapping_mul(2),
            Width::Table if long => 10,
            Width::Table => 6,
        }
    }
}

/// Builds the operands of a form, reading what is left of the instruction.
#[inline(never)]
pub(super) fn operands(
    cursor: &mut Cursor<'_>,
    head: &Head,
    form: &Form,
    sizes: &Sizes,
    has_modrm: bool,
) -> Result<[Operand; 4], DecodeError> {
    // The address comes before any immediate, whatever the operands' order.
    let address = if has_modrm && sizes.modrm.mode() != 3 {
        Some(memory(cursor, head, sizes)?)
    } else {
        None
    };
    let mut out = [Operand::None; 4];
    for (to, arg) in out.iter_mut().zip(form.args) {
        *to = operand(cursor, head, arg, sizes, address)?;
    }
    Ok(out)
}

#[inline(never)]
fn operand(
    cursor: &mut Cursor<'_>,
    head: &Head,
    arg: Arg,
    sizes: &Sizes,
    address: Option<Mem>,
) -> Result<Operand, DecodeError> {
    let bytes = |width| sizes.bytes(width, head);
    // With EVEX a displacement of one byte counts operands (SDM 2A 2.7.5
    // "Compressed Displacement (disp8*N) Support in EVEX").
    let scaled = head.evex.is_some() && sizes.modrm.mode() == 1;
    let sized = |width| {
        address.map(|mem| {
            let size = bytes(width);
            let times = if scaled { u64::from(size) } else { 1 };
            let disp = mem.disp.wrapping_mul(times);
            Operand::Mem(Mem { size, disp, ..mem })
        })
    };
    let reg_field = sizes.modrm.reg() | head.reg_high;
    let rm_field = sizes.modrm.rm() | head.base_high;
    // Outside 64-bit mode there are eight registers and the highest bit of the
    // field means nothing (SDM 2A 2.3.5.6).
    let v_field = match sizes.mode {
        Mode::Bits64 => head.vvvv,
        _ => head.vvvv & 7,
    };
    let vector = |index, width| Operand::Vector {
        index,
        size: bytes(width),
    };
    Ok(match arg {
        Arg::None => Operand::None,
        Arg::Rm(width) => sized(width).unwrap_or_else(|| gpr(rm_field, bytes(width), head)),
        Arg::RmSplit(in_register, in_memory) => {
            sized(in_memory).unwrap_or_else(|| gpr(rm_field, bytes(in_register), head))
        }
        Arg::Mem(width) => sized(width).ok_or(DecodeError::Unsupported)?,
        Arg::Reg(width) => gpr(reg_field, bytes(width), head),
        Arg::Vreg(width) => gpr(v_field, bytes(width), head),
        Arg::OpReg(width) => gpr(head.opcode & 7 | head.base_high, bytes(width), head),
        Arg::Implied(reg, width) => Operand::Reg {
            reg,
            size: bytes(width),
        },
        Arg::Sreg => {
            Operand::Seg(Seg::from_bits(sizes.modrm.reg()).ok_or(DecodeError::Unsupported)?)
        }
        Arg::OpSreg => {
            Operand::Seg(Seg::from_bits(head.opcode >> 3 & 7).ok_or(DecodeError::Unsupported)?)
        }
        Arg::MmxReg => Operand::Mmx(sizes.modrm.reg()),
        Arg::MmxRm => sized(Width::Qword).unwrap_or(Operand::Mmx(sizes.modrm.rm())),
        Arg::VecRm(width) => {
            sized(width).unwrap_or_else(|| vector(rm_field | head.vector_rm_high(), width))
        }
        Arg::VecReg(width) => vector(reg_field, width),
        Arg::VecVreg(width) => vector(v_field, width),
        Arg::ImmSigned => Operand::Imm(cursor.signed(1)?),
        Arg::ImmByte => Operand::Imm(cursor.unsigned(1)?),
        Arg::ImmWord => Operand::Imm(cursor.unsigned(2)?),
        Arg::Imm => Operand::Imm(cursor.signed(sizes.operand.min(4))?),
        Arg::ImmFull => Operand::Imm(cursor.unsigned(sizes.operand)?),
        Arg::ImmStack => Operand::Imm(cursor.signed(bytes(Width::Stack).min(4))?),
        Arg::ImmBranch => Operand::Imm(cursor.signed(bytes(Width::Branch).min(4))?),
        Arg::Constant(value) => Operand::Imm(value.into()),
        Arg::Offset(width) => {
            implied_memory(head, None, cursor.unsigned(sizes.address)?, bytes(width))
        }
        Arg::Source(width) => implied_memory(head, Some(Gpr::Rsi), 0, bytes(width)),
        Arg::Table => implied_memory(head, Some(Gpr::Rbx), 0, 1),
        Arg::AtRdi(width) => implied_memory(head, Some(Gpr::Rdi), 0, bytes(width)),
        // No override applies to the destination (SDM 1 7.3.9).
        Arg::Destination(width) => Operand::Mem(Mem {
            seg: Seg::Es,
            base: Some(Gpr::Rdi),
            index: None,
            scale: 0,
            disp: 0,
            rip_relative: false,
            size: bytes(width),
        }),
    })
}

fn implied_memory(head: &Head, base: Option<Gpr>, disp: u64, size: u8) -> Operand {
    Operand::Mem(Mem {
        seg: head.prefixes.segment.unwrap_or(Seg::Ds),
        base,
        index: None,
        scale: 0,
        disp,
        rip_relative: false,
        size,
    })
}

/// A general-purpose register operand. Byte registers 4 to 7 are AH to BH
/// unless there is a REX prefix (SDM 2A 2.2.1.2).
fn gpr(number: u8, size: u8, head: &Head) -> Operand {
    let no_rex = head.prefixes.rex == 0 && !head.prefixes.vex;
    if size == 1 && no_rex && number & 12 == 4 {
        return Operand::HighByte(Gpr::from_bits(number & 3));
    }
    Operand::Reg {
        reg: Gpr::from_bits(number),
        size,
    }
}

#[inline(never)]
fn memory(cursor: &mut Cursor<'_>, head: &Head, sizes: &Sizes) -> Result<Mem, DecodeError> {
    let mut mem = if sizes.address == 2 {
        memory16(cursor, sizes.modrm)?
    } else {
        memory32(cursor, head, sizes)?
    };
    if let Some(seg) = head.prefixes.segment {
        mem.seg = seg;
    }
    Ok(mem)
}

fn memory16(cursor: &mut Cursor<'_>, modrm: ModRm) -> Result<Mem, DecodeError> {
    let (base, index) = match (modrm.rm(), modrm.mode()) {
        (0, _) => (Some(Gpr::Rbx), Some(Gpr::Rsi)),
        (1, _) => (Some(Gpr::Rbx), Some(Gpr::Rdi)),
        (2, _) => (Some(Gpr::Rbp), Some(Gpr::Rsi)),
        (3, _) => (Some(Gpr::Rbp), Some(Gpr::Rdi)),
        (4, _) => (Some(Gpr::Rsi), None),
        (5, _) => (Some(Gpr::Rdi), None),
        (6, 0) => (None, None),
        (6, _) => (Some(Gpr::Rbp), None),
        _ => (Some(Gpr::Rbx), None),
    };
    let disp = match modrm.mode() {
        0 if base.is_none() => cursor.signed(2)?,
        0 => 0,
        1 => cursor.signed(1)?,
        _ => cursor.signed(2)?,
    };
    Ok(Mem {
        seg: default_segment(base),
        base,
        index,
        scale: 0,
        disp,
        rip_relative: false,
        size: 0,
    })
}

#[inline(never)]
fn memory32(cursor: &mut Cursor<'_>, head: &Head, sizes: &Sizes) -> Result<Mem, DecodeError> {
    let modrm = sizes.modrm;
    let mut rip_relative = false;
    let mut index = None;
    let mut scale = 0;
    let mut base = if modrm.rm() == 4 {
        let sib = ModRm(cursor.byte()?);
        let number = sib.reg() | head.index_high;
        // Index 4 means none; with REX.X it is R12 (SDM 2A 2.2.1.2).
        if number != 4 {
            index = Some(Gpr::from_bits(number));
            scale = sib.mode();
        }
        let no_base = sib.rm() == 5 && modrm.mode() == 0;
        (!no_base).then_some(Gpr::from_bits(sib.rm() | head.base_high))
    } else {
        Some(Gpr::from_bits(modrm.rm() | head.base_high))
    };
    if modrm.mode() == 0 && modrm.rm() == 5 {
        base = None;
        rip_relative = sizes.mode == Mode::Bits64;
    }
    let disp = match modrm.mode() {
        0 if base.is_none() => cursor.signed(4)?,
        0 => 0,
        1 => cursor.signed(1)?,
        _ => cursor.signed(4)?,
    };
    Ok(Mem {
        seg: default_segment(base),
        base,
        index,
        scale,
        disp,
        rip_relative,
        size: 0,
    })
}

fn default_segment(base: Option<Gpr>) -> Seg {
    match base {
        Some(Gpr::Rsp | Gpr::Rbp) => Seg::Ss,
        _ => Seg::Ds,
    }
}
