//! A decoded instruction: what [`super::decode`] returns and
//! [`super::execute`] consumes.

use super::machine::{Gpr, Mode, Seg};

/// The repeat prefix in effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// None.
    No,
    /// F3: REP or REPE.
    Equal,
    /// F2: REPNE; on an instruction that compares nothing it acts as REP.
    NotEqual,
}

/// The prefixes an instruction had, as far as they matter after decoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefixes {
    /// F0.
    pub lock: bool,
    /// F2 or F3, whichever came last.
    pub repeat: Repeat,
    /// 66.
    pub operand_size: bool,
    /// 67.
    pub address_size: bool,
    /// The segment override in effect. In 64-bit mode only FS and GS count.
    pub segment: Option<Seg>,
    /// The REX prefix, 0 if there is none.
    pub rex: u8,
    /// The instruction has a VEX or EVEX prefix.
    pub vex: bool,
    /// It is an EVEX prefix.
    pub evex: bool,
}

/// Which elements of a vector an instruction moves: SDM 1 15.6.1 "Opmask
/// Register to Predicate Vector Data Processing". [`Op::VecMasked`] chooses by its
/// second operand, and only `element` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask {
    /// The opmask register, 1 to 7; 0 for [`Op::VecMasked`].
    pub register: u8,
    /// Elements that are not moved become zero rather than stay.
    pub zeroing: bool,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element: u8,
}

/// A memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    /// The segment, default or overridden.
    pub seg: Seg,
    /// Base register.
    pub base: Option<Gpr>,
    /// Index register.
    pub index: Option<Gpr>,
    /// The index is shifted left by this much, 0 to 3.
    pub scale: u8,
    /// Displacement, sign-extended to 64 bits.
    pub disp: u64,
    /// The displacement counts from the next instruction.
    pub rip_relative: bool,
    /// Bytes accessed; 0 if the instruction accesses none (a hint).
    pub size: u8,
}

/// One operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// No operand in this place.
    None,
    /// The low `size` bytes of a general-purpose register.
    Reg {
        /// The register.
        reg: Gpr,
        /// Bytes: 1, 2, 4 or 8.
        size: u8,
    },
    /// AH, CH, DH or BH, named by the register they are a part of.
    HighByte(Gpr),
    /// A segment register's selector.
    Seg(Seg),
    /// The low `size` bytes of a vector register.
    Vector {
        /// 0 to 31.
        index: u8,
        /// Bytes: 4, 8, 16, 32 or 64.
        size: u8,
    },
    /// An MMX register, 0 to 7.
    Mmx(u8),
    /// Memory.
    Mem(Mem),
    /// An immediate, already extended to 64 bits as the instruction defines.
    Imm(u64),
}

impl Operand {
    /// Bytes of a register or memory operand; 8 for an immediate, 2 for a
    /// selector.
    #[must_use]
    pub const fn size(&self) -> u8 {
        match self {
            Self::None => 0,
            Self::Reg { size, .. } | Self::Vector { size, .. } => *size,
            Self::HighByte(_) => 1,
            Self::Seg(_) => 2,
            Self::Mem(mem) => mem.size,
            Self::Imm(_) | Self::Mmx(_) => 8,
        }
    }
}

/// The operation. Names are the SDM's mnemonics, one for a family whose members
/// differ only in operand size or element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the SDM's mnemonics")]
pub enum Op {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    Cmp,
    Test,
    Mov,
    Movzx,
    /// MOVSX and MOVSXD.
    Movsx,
    Xchg,
    Cmpxchg,
    /// CMPXCHG8B and CMPXCHG16B, by operand size.
    CmpxchgPair,
    Xadd,
    Inc,
    Dec,
    Not,
    Neg,
    Mul,
    /// IMUL with one operand.
    ImulWide,
    /// IMUL with two or three operands.
    Imul,
    Div,
    Idiv,
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
    Shld,
    Shrd,
    /// SETcc; the condition is the low four bits of the opcode.
    Set(u8),
    /// CMOVcc; the condition is the low four bits of the opcode.
    Cmov(u8),
    Movbe,
    Bt,
    Bts,
    Btr,
    Btc,
    Bsf,
    Bsr,
    Tzcnt,
    Lzcnt,
    Popcnt,
    Crc32,
    Adcx,
    Adox,
    Andn,
    Bextr,
    Bzhi,
    Blsr,
    Blsmsk,
    Blsi,
    Pdep,
    Pext,
    Mulx,
    Rorx,
    Sarx,
    Shlx,
    Shrx,
    Push,
    Pop,
    /// PUSHA and PUSHAD.
    Pusha,
    /// POPA and POPAD.
    Popa,
    Pushf,
    Popf,
    Enter,
    Leave,
    Bound,
    /// CALL, near; relative or through a register or memory.
    Call,
    /// JMP, near, through a register or memory.
    Jmp,
    /// RET, near.
    Ret,
    /// CALL, far.
    CallFar,
    /// JMP, far.
    JmpFar,
    /// RET, far.
    RetFar,
    Iret,
    /// LES, LDS, LSS, LFS, LGS.
    LoadFar(Seg),
    Sgdt,
    Sidt,
    Lgdt,
    Lidt,
    Sldt,
    Str,
    Smsw,
    Lldt,
    Ltr,
    Lmsw,
    Lar,
    Lsl,
    Verr,
    Verw,
    Ldmxcsr,
    Stmxcsr,
    Xlat,
    Movs,
    Cmps,
    Stos,
    Lods,
    Scas,
    Ins,
    Outs,
    /// A hint that accesses nothing: NOP r/m, PREFETCH, CLFLUSH and the like.
    Hint,
    /// MMX moves: MOVD, MOVQ, MOVNTQ.
    MmxMove,
    /// Whole-register vector move, no alignment asked: MOVUPS, MOVUPD, MOVDQU,
    /// LDDQU; with EVEX, VMOVDQU8 to VMOVDQU64.
    VecMove,
    /// Whole-register vector move that must be aligned: MOVAPS, MOVAPD, MOVDQA,
    /// MOVNTPS, MOVNTPD, MOVNTDQ, MOVNTDQA.
    VecMoveAligned,
    /// Load of an element, the rest of the register zeroed: MOVD, MOVQ, MOVSS,
    /// MOVSD.
    VecLoad,
    /// Store of the lowest element: MOVD, MOVQ, MOVSS, MOVSD, MOVLPS, MOVLPD.
    VecStore,
    /// An element copied to the whole register: VBROADCASTSS and the like.
    VecBroadcast,
    /// An element (the third operand) put into the second operand in the place
    /// that the fourth numbers: PINSRB to PINSRQ, VINSERTF128 and the like;
    /// MOVLPS, MOVHPS and their like are these with a place of their own.
    VecInsert,
    /// The element of the second operand that the third numbers, stored: PEXTRB to
    /// PEXTRQ, EXTRACTPS, VEXTRACTF128 and the like; MOVHPS, MOVHPD.
    VecExtract,
    /// Elements chosen by the sign bits of a register: VMASKMOVPS, VMASKMOVPD,
    /// VPMASKMOVD, VPMASKMOVQ.
    VecMasked,
    /// Bytes chosen by a register and stored at rDI: MASKMOVDQU, MASKMOVQ.
    VecMaskedBytes,
}

impl Op {
    /// May carry a LOCK prefix when its first operand is memory (SDM 2A
    /// "LOCK-Assert LOCK# Signal Prefix").
    #[must_use]
    pub const fn is_lockable(self) -> bool {
        matches!(
            self,
            Self::Add
                | Self::Or
                | Self::Adc
                | Self::Sbb
                | Self::And
                | Self::Sub
                | Self::Xor
                | Self::Inc
                | Self::Dec
                | Self::Not
                | Self::Neg
                | Self::Xchg
                | Self::Cmpxchg
                | Self::CmpxchgPair
                | Self::Xadd
                | Self::Bts
                | Self::Btr
                | Self::Btc
        )
    }

    /// Puts a function of its one or two operands into the first, or nowhere,
    /// and sets status flags by it.
    #[must_use]
    pub const fn is_computed(self) -> bool {
        matches!(
            self,
            Self::Add
                | Self::Or
                | Self::Adc
                | Self::Sbb
                | Self::And
                | Self::Sub
                | Self::Xor
                | Self::Cmp
                | Self::Test
                | Self::Inc
                | Self::Dec
                | Self::Not
                | Self::Neg
        )
    }

    /// Touches no memory but its operands, and of the segment registers only
    /// theirs.
    const fn is_arithmetic_or_move(self) -> bool {
        self.is_computed()
            || matches!(
                self,
                Self::Mov
                    | Self::Movzx
                    | Self::Movsx
                    | Self::Movbe
                    | Self::Xchg
                    | Self::Cmpxchg
                    | Self::Xadd
                    | Self::Set(_)
                    | Self::Cmov(_)
                    | Self::Rol
                    | Self::Ror
                    | Self::Shl
                    | Self::Shr
                    | Self::Sar
                    | Self::Bt
                    | Self::Bts
                    | Self::Btr
                    | Self::Btc
                    | Self::Movs
                    | Self::Cmps
                    | Self::Stos
                    | Self::Lods
                    | Self::Scas
                    | Self::VecMove
                    | Self::VecMoveAligned
                    | Self::VecLoad
                    | Self::VecStore
            )
    }

    /// Is a string instruction, the kind a repeat prefix applies to.
    #[must_use]
    pub const fn is_string(self) -> bool {
        matches!(
            self,
            Self::Movs | Self::Cmps | Self::Stos | Self::Lods | Self::Scas | Self::Ins | Self::Outs
        )
    }
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    /// The operation.
    pub op: Op,
    /// Operands in the SDM's order; string instructions have their implied
    /// memory operands here too.
    pub operands: [Operand; 4],
    /// The effective operand size in bytes: 2, 4 or 8.
    pub operand_size: u8,
    /// The effective address size in bytes: 2, 4 or 8.
    pub address_size: u8,
    /// Which elements a vector move touches; all of them without.
    pub mask: Option<Mask>,
    /// Length in bytes, 1 to 15.
    pub len: u8,
    /// The size of code it was decoded for.
    pub mode: Mode,
    /// Its prefixes.
    pub prefixes: Prefixes,
}

impl Insn {
    /// Operand `n`; [`Operand::None`] if there is none.
    #[must_use]
    pub fn operand(&self, n: usize) -> Operand {
        self.operands.get(n).copied().unwrap_or(Operand::None)
    }

    /// It may need the descriptor tables: [`super::Machine::table`].
    #[must_use]
    pub fn uses_tables(&self) -> bool {
        let segment = matches!(self.operand(0), Operand::Seg(_));
        let system = matches!(
            self.op,
            Op::CallFar
                | Op::JmpFar
                | Op::RetFar
                | Op::Iret
                | Op::LoadFar(_)
                | Op::Sgdt
                | Op::Sidt
                | Op::Lgdt
                | Op::Lidt
                | Op::Sldt
                | Op::Str
                | Op::Lldt
                | Op::Ltr
                | Op::Lar
                | Op::Lsl
                | Op::Verr
                | Op::Verw
        );
        system || segment && matches!(self.op, Op::Mov | Op::Pop)
    }

    /// The segment registers that executing it may look at, bit n for register
    /// n. Of a register that is not named the machine need know nothing.
    #[must_use]
    pub fn segments(&self) -> u8 {
        const ALL: u8 = 0x3f;
        if !self.op.is_arithmetic_or_move() {
            return ALL;
        }
        let mut used = 0u8;
        for operand in &self.operands {
            match operand {
                Operand::Seg(_) => return ALL,
                Operand::Mem(Mem { seg, .. }) => used |= 1u8.wrapping_shl(*seg as u32),
                _ => {}
            }
        }
        if self.mode == Mode::Bits64 {
            // The others have neither base nor limit (SDM 1 3.4.2.1 "Segment
            // Registers in 64-Bit Mode").
            used &= 1 << Seg::Fs as u8 | 1 << Seg::Gs as u8;
        }
        used
    }

    /// The first memory operand, if any.
    #[must_use]
    pub fn memory(&self) -> Option<Mem> {
        self.operands.iter().find_map(|operand| match operand {
            Operand::Mem(mem) => Some(*mem),
            _ => None,
        })
    }
}
