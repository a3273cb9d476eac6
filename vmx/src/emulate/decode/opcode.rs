//! The opcode tables: from prefix, opcode and ModRM's reg field to an operation
//! and the places its operands come from. SDM 2D appendix A "Opcode Map", with
//! the details of each instruction's own page.

use super::prefix::{Head, Mandatory, Map};
use super::vector;
use crate::emulate::insn::{Mask, Op};
use crate::emulate::machine::{Gpr, Mode, Seg};

/// How wide an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    /// No access at all.
    Zero,
    Byte,
    Word,
    Dword,
    Qword,
    Oword,
    Yword,
    /// The effective operand size.
    Opsize,
    /// The operand size, but never 8: port instructions.
    Opsize32,
    /// 4, or 8 with REX.W or VEX.W in 64-bit mode.
    Wide,
    /// Twice that: CMPXCHG8B and CMPXCHG16B.
    Pair,
    /// The operand size of a stack instruction: in 64-bit mode 8, or 2 with 66.
    Stack,
    /// The operand size of a near branch: 8 in 64-bit mode.
    Branch,
    /// 16, 32 or 64 bytes, by VEX.L or EVEX.L'L.
    Vector,
    /// A far pointer: the operand size and a selector.
    Far,
    /// Two numbers of the operand size.
    Bounds,
    /// The limit and base of a descriptor table.
    Table,
}

/// Where an operand comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arg {
    None,
    /// ModRM.rm: register or memory.
    Rm(Width),
    /// ModRM.rm: register of the first width, or memory of the second.
    RmSplit(Width, Width),
    /// ModRM.rm, memory only.
    Mem(Width),
    /// ModRM.reg.
    Reg(Width),
    /// VEX.vvvv.
    Vreg(Width),
    /// The low three bits of the opcode.
    OpReg(Width),
    /// A register the opcode implies.
    Implied(Gpr, Width),
    /// ModRM.reg, a segment register.
    Sreg,
    /// The opcode's bits 5:3, a segment register.
    OpSreg,
    /// ModRM.reg, an MMX register.
    MmxReg,
    /// ModRM.rm: MMX register or memory.
    MmxRm,
    /// ModRM.rm: vector register or memory.
    VecRm(Width),
    /// ModRM.reg, a vector register.
    VecReg(Width),
    /// VEX.vvvv, a vector register.
    VecVreg(Width),
    /// An immediate byte, sign-extended.
    ImmSigned,
    /// An immediate byte, zero-extended.
    ImmByte,
    /// An immediate word, zero-extended.
    ImmWord,
    /// An immediate of the operand size, at most 4 bytes, sign-extended.
    Imm,
    /// An immediate of the operand size, up to 8 bytes.
    ImmFull,
    /// The same for a stack instruction.
    ImmStack,
    /// A branch displacement.
    ImmBranch,
    /// A constant.
    Constant(u8),
    /// An address in the instruction itself.
    Offset(Width),
    /// DS:rSI, or another segment.
    Source(Width),
    /// ES:rDI.
    Destination(Width),
    /// DS:rBX+AL, or another segment.
    Table,
    /// DS:rDI, or another segment.
    AtRdi(Width),
}

/// One row of the tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form {
    pub(super) op: Op,
    pub(super) args: [Arg; 4],
}

#[inline(never)]
pub(super) fn form(op: Op, args: &[Arg]) -> Option<Form> {
    let mut out = [Arg::None; 4];
    for (to, from) in out.iter_mut().zip(args) {
        *to = *from;
    }
    Some(Form { op, args: out })
}

/// The ModRM byte of an opcode that has one.
#[derive(Clone, Copy, Debug)]
pub(super) struct ModRm(pub(super) u8);

impl ModRm {
    pub(super) fn mode(self) -> u8 {
        self.0 >> 6
    }
    pub(super) fn reg(self) -> u8 {
        self.0 >> 3 & 7
    }
    pub(super) fn rm(self) -> u8 {
        self.0 & 7
    }
    pub(super) fn is_register(self) -> bool {
        self.mode() == 3
    }
}

/// Does this opcode have a ModRM byte? Says yes for opcodes that are not
/// emulated, except where a missing byte would make a complete instruction look
/// short.
pub(super) fn has_modrm(head: &Head) -> bool {
    match head.map {
        Map::One => matches!(
            head.opcode,
            0x00..=0x03 | 0x08..=0x0b | 0x10..=0x13 | 0x18..=0x1b
            | 0x20..=0x23 | 0x28..=0x2b | 0x30..=0x33 | 0x38..=0x3b
            | 0x62 | 0x63 | 0x69 | 0x6b | 0x80..=0x8f | 0xc0 | 0xc1 | 0xc4..=0xc7
            | 0xd0..=0xd3 | 0xf6 | 0xf7 | 0xfe | 0xff
        ),
        Map::Two => !matches!(
            head.opcode,
            0x04..=0x0c | 0x0e | 0x30..=0x3f | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa
            | 0xc8..=0xcf
        ),
        Map::Three38 | Map::Three3A => true,
    }
}

/// Finds the form, or `None` if the instruction does not exist or is not
/// emulated. `modrm` is zero for opcodes without one.
pub(super) fn lookup(head: &Head, modrm: ModRm, mode: Mode) -> Option<(Form, Option<Mask>)> {
    if head.prefixes.vex {
        return vector::lookup(head, modrm);
    }
    let found = match head.map {
        Map::One => one(head.opcode, modrm, mode),
        Map::Two => two(head, modrm),
        Map::Three38 => three_38(head, modrm, mode),
        Map::Three3A => vector::three_3a(head).and_then(|(_, found)| found),
    };
    Some((found?, None))
}

const RM_B: Arg = Arg::Rm(Width::Byte);
const RM_W: Arg = Arg::Rm(Width::Word);
const RM_V: Arg = Arg::Rm(Width::Opsize);
const REG_B: Arg = Arg::Reg(Width::Byte);
const REG_V: Arg = Arg::Reg(Width::Opsize);
const AL: Arg = Arg::Implied(Gpr::Rax, Width::Byte);
const ACC: Arg = Arg::Implied(Gpr::Rax, Width::Opsize);
const CL: Arg = Arg::Implied(Gpr::Rcx, Width::Byte);
const DX: Arg = Arg::Implied(Gpr::Rdx, Width::Word);

/// The byte or full-size variant, by the lowest opcode bit.
fn width_of(opcode: u8) -> Width {
    if opcode & 1 == 0 {
        Width::Byte
    } else {
        Width::Opsize
    }
}

fn arith_op(number: u8) -> Op {
    match number & 7 {
        0 => Op::Add,
        1 => Op::Or,
        2 => Op::Adc,
        3 => Op::Sbb,
        4 => Op::And,
        5 => Op::Sub,
        6 => Op::Xor,
        _ => Op::Cmp,
    }
}

fn shift_op(number: u8) -> Op {
    match number & 7 {
        0 => Op::Rol,
        1 => Op::Ror,
        2 => Op::Rcl,
        3 => Op::Rcr,
        5 => Op::Shr,
        7 => Op::Sar,
        // 6 is an alias of 4 that assemblers do not make.
        _ => Op::Shl,
    }
}

fn bit_op(number: u8) -> Op {
    match number & 3 {
        0 => Op::Bt,
        1 => Op::Bts,
        2 => Op::Btr,
        _ => Op::Btc,
    }
}

#[inline(never)]
fn one(opcode: u8, modrm: ModRm, mode: Mode) -> Option<Form> {
    let long = mode == Mode::Bits64;
    let width = width_of(opcode);
    match opcode {
        0x06 | 0x0e | 0x16 | 0x1e if !long => form(Op::Push, &[Arg::OpSreg]),
        0x07 | 0x17 | 0x1f if !long => form(Op::Pop, &[Arg::OpSreg]),
        0x00..=0x3f => {
            let op = arith_op(opcode >> 3);
            match opcode & 7 {
                0 => form(op, &[RM_B, REG_B]),
                1 => form(op, &[RM_V, REG_V]),
                2 => form(op, &[REG_B, RM_B]),
                3 => form(op, &[REG_V, RM_V]),
                4 => form(op, &[AL, Arg::ImmByte]),
                5 => form(op, &[ACC, Arg::Imm]),
                _ => None,
            }
        }
        0x40..=0x47 if !long => form(Op::Inc, &[Arg::OpReg(Width::Opsize)]),
        0x48..=0x4f if !long => form(Op::Dec, &[Arg::OpReg(Width::Opsize)]),
        0x50..=0x57 => form(Op::Push, &[Arg::OpReg(Width::Stack)]),
        0x58..=0x5f => form(Op::Pop, &[Arg::OpReg(Width::Stack)]),
        0x60 if !long => form(Op::Pusha, &[]),
        0x61 if !long => form(Op::Popa, &[]),
        0x62 if !long => form(Op::Bound, &[REG_V, Arg::Mem(Width::Bounds)]),
        0x63 if long => form(Op::Movsx, &[REG_V, Arg::Rm(Width::Opsize32)]),
        0x68 => form(Op::Push, &[Arg::ImmStack]),
        0x69 => form(Op::Imul, &[REG_V, RM_V, Arg::Imm]),
        0x6a => form(Op::Push, &[Arg::ImmSigned]),
        0x6b => form(Op::Imul, &[REG_V, RM_V, Arg::ImmSigned]),
        0x6c => form(Op::Ins, &[Arg::Destination(Width::Byte), DX]),
        0x6d => form(Op::Ins, &[Arg::Destination(Width::Opsize32), DX]),
        0x6e => form(Op::Outs, &[DX, Arg::Source(Width::Byte)]),
        0x6f => form(Op::Outs, &[DX, Arg::Source(Width::Opsize32)]),
        0x80 => form(arith_op(modrm.reg()), &[RM_B, Arg::ImmByte]),
        0x81 => form(arith_op(modrm.reg()), &[RM_V, Arg::Imm]),
        0x82 if !long => form(arith_op(modrm.reg()), &[RM_B, Arg::ImmByte]),
        0x83 => form(arith_op(modrm.reg()), &[RM_V, Arg::ImmSigned]),
        0x84 | 0x85 => form(Op::Test, &[Arg::Rm(width), Arg::Reg(width)]),
        0x86 | 0x87 => form(Op::Xchg, &[Arg::Rm(width), Arg::Reg(width)]),
        0x88 | 0x89 => form(Op::Mov, &[Arg::Rm(width), Arg::Reg(width)]),
        0x8a | 0x8b => form(Op::Mov, &[Arg::Reg(width), Arg::Rm(width)]),
        0x8c if modrm.reg() < 6 => form(
            Op::Mov,
            &[Arg::RmSplit(Width::Opsize, Width::Word), Arg::Sreg],
        ),
        0x8e if modrm.reg() < 6 && modrm.reg() != 1 => form(
            Op::Mov,
            &[Arg::Sreg, Arg::RmSplit(Width::Opsize, Width::Word)],
        ),
        0x8f if modrm.reg() == 0 => form(Op::Pop, &[Arg::Rm(Width::Stack)]),
        0x9a if !long => form(Op::CallFar, &[Arg::ImmFull, Arg::ImmWord]),
        0x9c => form(Op::Pushf, &[]),
        0x9d => form(Op::Popf, &[]),
        0xa0 => form(Op::Mov, &[AL, Arg::Offset(Width::Byte)]),
        0xa1 => form(Op::Mov, &[ACC, Arg::Offset(Width::Opsize)]),
        0xa2 => form(Op::Mov, &[Arg::Offset(Width::Byte), AL]),
        0xa3 => form(Op::Mov, &[Arg::Offset(Width::Opsize), ACC]),
        0xa4..=0xaf => string(opcode, width),
        0xb0..=0xb7 => form(Op::Mov, &[Arg::OpReg(Width::Byte), Arg::ImmByte]),
        0xb8..=0xbf => form(Op::Mov, &[Arg::OpReg(Width::Opsize), Arg::ImmFull]),
        0xc0 | 0xc1 => form(shift_op(modrm.reg()), &[Arg::Rm(width), Arg::ImmByte]),
        0xc2 => form(Op::Ret, &[Arg::ImmWord]),
        0xc3 => form(Op::Ret, &[]),
        0xc4 if !long => load_far(Seg::Es),
        0xc5 if !long => load_far(Seg::Ds),
        0xc6 if modrm.reg() == 0 => form(Op::Mov, &[RM_B, Arg::ImmByte]),
        0xc7 if modrm.reg() == 0 => form(Op::Mov, &[RM_V, Arg::Imm]),
        0xc8 => form(Op::Enter, &[Arg::ImmWord, Arg::ImmByte]),
        0xc9 => form(Op::Leave, &[]),
        0xca => form(Op::RetFar, &[Arg::ImmWord]),
        0xcb => form(Op::RetFar, &[]),
        0xcf => form(Op::Iret, &[]),
        0xd0 | 0xd1 => form(shift_op(modrm.reg()), &[Arg::Rm(width), Arg::Constant(1)]),
        0xd2 | 0xd3 => form(shift_op(modrm.reg()), &[Arg::Rm(width), CL]),
        0xd7 => form(Op::Xlat, &[Arg::Table]),
        0xe8 => form(Op::Call, &[Arg::ImmBranch]),
        0xea if !long => form(Op::JmpFar, &[Arg::ImmFull, Arg::ImmWord]),
        0xf6 | 0xf7 => group3(modrm, width),
        0xfe | 0xff => group5(opcode, modrm, width),
        _ => None,
    }
}

fn string(opcode: u8, width: Width) -> Option<Form> {
    let source = Arg::Source(width);
    let destination = Arg::Destination(width);
    let acc = Arg::Implied(Gpr::Rax, width);
    match opcode {
        0xa4 | 0xa5 => form(Op::Movs, &[destination, source]),
        0xa6 | 0xa7 => form(Op::Cmps, &[source, destination]),
        0xa8 => form(Op::Test, &[AL, Arg::ImmByte]),
        0xa9 => form(Op::Test, &[ACC, Arg::Imm]),
        0xaa | 0xab => form(Op::Stos, &[destination, acc]),
        0xac | 0xad => form(Op::Lods, &[acc, source]),
        _ => form(Op::Scas, &[acc, destination]),
    }
}

fn group3(modrm: ModRm, width: Width) -> Option<Form> {
    let rm = Arg::Rm(width);
    match modrm.reg() {
        // 1 is an alias of 0 that assemblers do not make.
        0 | 1 if width == Width::Byte => form(Op::Test, &[rm, Arg::ImmByte]),
        0 | 1 => form(Op::Test, &[rm, Arg::Imm]),
        2 => form(Op::Not, &[rm]),
        3 => form(Op::Neg, &[rm]),
        4 => form(Op::Mul, &[rm]),
        5 => form(Op::ImulWide, &[rm]),
        6 => form(Op::Div, &[rm]),
        _ => form(Op::Idiv, &[rm]),
    }
}

fn group5(opcode: u8, modrm: ModRm, width: Width) -> Option<Form> {
    match modrm.reg() {
        0 => form(Op::Inc, &[Arg::Rm(width)]),
        1 => form(Op::Dec, &[Arg::Rm(width)]),
        2 if opcode == 0xff => form(Op::Call, &[Arg::Rm(Width::Branch)]),
        3 if opcode == 0xff => form(Op::CallFar, &[Arg::Mem(Width::Far)]),
        5 if opcode == 0xff => form(Op::JmpFar, &[Arg::Mem(Width::Far)]),
        4 if opcode == 0xff => form(Op::Jmp, &[Arg::Rm(Width::Branch)]),
        6 if opcode == 0xff => form(Op::Push, &[Arg::Rm(Width::Stack)]),
        _ => None,
    }
}

/// LES and its kin.
fn load_far(seg: Seg) -> Option<Form> {
    form(Op::LoadFar(seg), &[REG_V, Arg::Mem(Width::Far)])
}

/// Groups 6 and 7, as far as they address memory.
fn system(opcode: u8, modrm: ModRm) -> Option<Form> {
    let status = Arg::RmSplit(Width::Opsize, Width::Word);
    let table = Arg::Mem(Width::Table);
    match (opcode, modrm.reg()) {
        (0, 0) => form(Op::Sldt, &[status]),
        (0, 1) => form(Op::Str, &[status]),
        (0, 2) => form(Op::Lldt, &[status]),
        (0, 3) => form(Op::Ltr, &[status]),
        (0, 4) => form(Op::Verr, &[status]),
        (0, 5) => form(Op::Verw, &[status]),
        (1, 0) => form(Op::Sgdt, &[table]),
        (1, 1) => form(Op::Sidt, &[table]),
        (1, 2) => form(Op::Lgdt, &[table]),
        (1, 3) => form(Op::Lidt, &[table]),
        (1, 4) => form(Op::Smsw, &[status]),
        (1, 6) => form(Op::Lmsw, &[status]),
        _ => None,
    }
}

#[inline(never)]
fn two(head: &Head, modrm: ModRm) -> Option<Form> {
    let opcode = head.opcode;
    let width = width_of(opcode);
    let selector = Arg::RmSplit(Width::Opsize, Width::Word);
    match opcode {
        0x00 | 0x01 => system(opcode, modrm),
        0x02 => form(Op::Lar, &[REG_V, selector]),
        0x03 => form(Op::Lsl, &[REG_V, selector]),
        // PREFETCHW and the prefetch and hint-NOP space.
        0x0d | 0x18 | 0x1f if !modrm.is_register() => form(Op::Hint, &[Arg::Mem(Width::Zero)]),
        0x40..=0x4f => form(Op::Cmov(opcode & 15), &[REG_V, RM_V]),
        0x90..=0x9f => form(Op::Set(opcode & 15), &[RM_B]),
        0xa0 | 0xa8 => form(Op::Push, &[Arg::OpSreg]),
        0xa1 | 0xa9 => form(Op::Pop, &[Arg::OpSreg]),
        0xb2 => load_far(Seg::Ss),
        0xb4 => load_far(Seg::Fs),
        0xb5 => load_far(Seg::Gs),
        // Bits 4:3 number the four as ModRM.reg does for 0F BA.
        0xa3 | 0xab | 0xb3 | 0xbb => form(bit_op(opcode >> 3), &[RM_V, REG_V]),
        0xa4 => form(Op::Shld, &[RM_V, REG_V, Arg::ImmByte]),
        0xa5 => form(Op::Shld, &[RM_V, REG_V, CL]),
        0xac => form(Op::Shrd, &[RM_V, REG_V, Arg::ImmByte]),
        0xad => form(Op::Shrd, &[RM_V, REG_V, CL]),
        0xae => cache_line(head.mandatory, modrm).or_else(|| vector::legacy(head, modrm)),
        0xaf => form(Op::Imul, &[REG_V, RM_V]),
        0xb0 | 0xb1 => form(Op::Cmpxchg, &[Arg::Rm(width), Arg::Reg(width)]),
        0xb6 => form(Op::Movzx, &[REG_V, RM_B]),
        0xb7 => form(Op::Movzx, &[REG_V, RM_W]),
        0xb8 if head.mandatory == Mandatory::PF3 => form(Op::Popcnt, &[REG_V, RM_V]),
        0xba if modrm.reg() >= 4 => form(bit_op(modrm.reg()), &[RM_V, Arg::ImmByte]),
        0xbc if head.mandatory == Mandatory::PF3 => form(Op::Tzcnt, &[REG_V, RM_V]),
        0xbc => form(Op::Bsf, &[REG_V, RM_V]),
        0xbd if head.mandatory == Mandatory::PF3 => form(Op::Lzcnt, &[REG_V, RM_V]),
        0xbd => form(Op::Bsr, &[REG_V, RM_V]),
        0xbe => form(Op::Movsx, &[REG_V, RM_B]),
        0xbf => form(Op::Movsx, &[REG_V, RM_W]),
        0xc0 | 0xc1 => form(Op::Xadd, &[Arg::Rm(width), Arg::Reg(width)]),
        0xc3 if head.mandatory == Mandatory::None => {
            form(Op::Mov, &[Arg::Mem(Width::Wide), Arg::Reg(Width::Wide)])
        }
        0xc7 if modrm.reg() == 1 => form(Op::CmpxchgPair, &[Arg::Mem(Width::Pair)]),
        _ => vector::legacy(head, modrm),
    }
}

/// CLFLUSH, CLFLUSHOPT and CLWB of an address nothing caches for us.
fn cache_line(mandatory: Mandatory, modrm: ModRm) -> Option<Form> {
    let known = matches!(
        (mandatory, modrm.reg()),
        (Mandatory::None | Mandatory::P66, 7) | (Mandatory::P66, 6)
    );
    if known && !modrm.is_register() {
        form(Op::Hint, &[Arg::Mem(Width::Byte)])
    } else {
        None
    }
}

#[inline(never)]
fn three_38(head: &Head, modrm: ModRm, mode: Mode) -> Option<Form> {
    use Mandatory as P;
    let memory = !modrm.is_register();
    let wide_reg = Arg::Reg(Width::Wide);
    let wide_rm = Arg::Rm(Width::Wide);
    match (head.opcode, head.mandatory) {
        (0x2a, P::P66) if memory => form(
            Op::VecMoveAligned,
            &[Arg::VecReg(Width::Vector), Arg::VecRm(Width::Vector)],
        ),
        (0xf0, P::None | P::P66) if memory => form(Op::Movbe, &[REG_V, Arg::Mem(Width::Opsize)]),
        (0xf1, P::None | P::P66) if memory => form(Op::Movbe, &[Arg::Mem(Width::Opsize), REG_V]),
        (0xf0, P::PF2) => form(Op::Crc32, &[wide_reg, RM_B]),
        (0xf1, P::PF2) => form(Op::Crc32, &[wide_reg, RM_V]),
        (0xf6, P::P66) => form(Op::Adcx, &[wide_reg, wide_rm]),
        (0xf6, P::PF3) => form(Op::Adox, &[wide_reg, wide_rm]),
        // MOVDIRI.
        (0xf9, P::None) if memory && (mode == Mode::Bits64 || !head.wide) => {
            form(Op::Mov, &[Arg::Mem(Width::Wide), wide_reg])
        }
        _ => None,
    }
}
