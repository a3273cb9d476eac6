//! What iced-x86 says of an instruction, in the emulator's terms.
#![allow(unreachable_pub, missing_docs, reason = "a test's own part")]

use haxm_vmx::emulate::{Gpr, Insn, Op, Operand, Seg};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// Our operation for an instruction of iced's, `None` if we do not emulate it.
/// What iced calls EVEX or XOP, or a register form of a move that we take from
/// or to memory only, is left out.
pub fn expected_op(insn: &Instruction) -> Option<Op> {
    use Mnemonic as M;
    let name = format!("{:?}", insn.code());
    if name.starts_with("XOP") || name.starts_with("MVEX") {
        return None;
    }
    if name.starts_with("EVEX") {
        return expected_evex(insn);
    }
    let memory = (0..insn.op_count()).any(|i| is_memory(insn.op_kind(i)));
    let xmm = |i: u32| {
        i < insn.op_count()
            && insn.op_kind(i) == OpKind::Register
            && insn.op_register(i).is_vector_register()
    };
    let mmx = |i: u32| {
        i < insn.op_count() && insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_mm()
    };
    let store = is_memory(insn.op_kind(0));
    Some(match insn.mnemonic() {
        M::Add => Op::Add,
        M::Or => Op::Or,
        M::Adc => Op::Adc,
        M::Sbb => Op::Sbb,
        M::And => Op::And,
        M::Sub => Op::Sub,
        M::Xor => Op::Xor,
        M::Cmp => Op::Cmp,
        M::Test => Op::Test,
        M::Mov if mov_is_ours(insn) => Op::Mov,
        M::Movnti | M::Movdiri => Op::Mov,
        M::Movzx => Op::Movzx,
        M::Movsx | M::Movsxd => Op::Movsx,
        // 90 to 97 name registers only and are not emulated.
        M::Xchg if name.starts_with("Xchg_rm") => Op::Xchg,
        M::Cmpxchg if !name.contains("486") => Op::Cmpxchg,
        M::Cmpxchg8b | M::Cmpxchg16b => Op::CmpxchgPair,
        M::Xadd => Op::Xadd,
        M::Inc => Op::Inc,
        M::Dec => Op::Dec,
        M::Not => Op::Not,
        M::Neg => Op::Neg,
        M::Mul => Op::Mul,
        M::Imul if insn.op_count() == 1 => Op::ImulWide,
        M::Imul => Op::Imul,
        M::Div => Op::Div,
        M::Idiv => Op::Idiv,
        M::Rol => Op::Rol,
        M::Ror => Op::Ror,
        M::Rcl => Op::Rcl,
        M::Rcr => Op::Rcr,
        M::Shl | M::Sal => Op::Shl,
        M::Shr => Op::Shr,
        M::Sar => Op::Sar,
        M::Shld => Op::Shld,
        M::Shrd => Op::Shrd,
        M::Seto => Op::Set(0),
        M::Setno => Op::Set(1),
        M::Setb => Op::Set(2),
        M::Setae => Op::Set(3),
        M::Sete => Op::Set(4),
        M::Setne => Op::Set(5),
        M::Setbe => Op::Set(6),
        M::Seta => Op::Set(7),
        M::Sets => Op::Set(8),
        M::Setns => Op::Set(9),
        M::Setp => Op::Set(10),
        M::Setnp => Op::Set(11),
        M::Setl => Op::Set(12),
        M::Setge => Op::Set(13),
        M::Setle => Op::Set(14),
        M::Setg => Op::Set(15),
        M::Cmovo => Op::Cmov(0),
        M::Cmovno => Op::Cmov(1),
        M::Cmovb => Op::Cmov(2),
        M::Cmovae => Op::Cmov(3),
        M::Cmove => Op::Cmov(4),
        M::Cmovne => Op::Cmov(5),
        M::Cmovbe => Op::Cmov(6),
        M::Cmova => Op::Cmov(7),
        M::Cmovs => Op::Cmov(8),
        M::Cmovns => Op::Cmov(9),
        M::Cmovp => Op::Cmov(10),
        M::Cmovnp => Op::Cmov(11),
        M::Cmovl => Op::Cmov(12),
        M::Cmovge => Op::Cmov(13),
        M::Cmovle => Op::Cmov(14),
        M::Cmovg => Op::Cmov(15),
        M::Movbe => Op::Movbe,
        M::Bt => Op::Bt,
        M::Bts => Op::Bts,
        M::Btr => Op::Btr,
        M::Btc => Op::Btc,
        M::Bsf => Op::Bsf,
        M::Bsr => Op::Bsr,
        M::Tzcnt => Op::Tzcnt,
        M::Lzcnt => Op::Lzcnt,
        M::Popcnt => Op::Popcnt,
        M::Crc32 => Op::Crc32,
        M::Adcx => Op::Adcx,
        M::Adox => Op::Adox,
        M::Andn => Op::Andn,
        M::Bextr => Op::Bextr,
        M::Bzhi => Op::Bzhi,
        M::Blsr => Op::Blsr,
        M::Blsmsk => Op::Blsmsk,
        M::Blsi => Op::Blsi,
        M::Pdep => Op::Pdep,
        M::Pext => Op::Pext,
        M::Mulx => Op::Mulx,
        M::Rorx => Op::Rorx,
        M::Sarx => Op::Sarx,
        M::Shlx => Op::Shlx,
        M::Shrx => Op::Shrx,
        M::Push => Op::Push,
        M::Pop => Op::Pop,
        M::Popf | M::Popfd | M::Popfq => Op::Popf,
        M::Enter => Op::Enter,
        M::Bound => Op::Bound,
        M::Les => Op::LoadFar(Seg::Es),
        M::Lds => Op::LoadFar(Seg::Ds),
        M::Lss => Op::LoadFar(Seg::Ss),
        M::Lfs => Op::LoadFar(Seg::Fs),
        M::Lgs => Op::LoadFar(Seg::Gs),
        M::Call if insn.is_call_far() || insn.is_call_far_indirect() => Op::CallFar,
        M::Jmp if insn.is_jmp_far() || insn.is_jmp_far_indirect() => Op::JmpFar,
        M::Retf => Op::RetFar,
        M::Iret | M::Iretd | M::Iretq => Op::Iret,
        M::Sgdt => Op::Sgdt,
        M::Sidt => Op::Sidt,
        M::Lgdt => Op::Lgdt,
        M::Lidt => Op::Lidt,
        M::Sldt => Op::Sldt,
        M::Str => Op::Str,
        M::Smsw => Op::Smsw,
        M::Lldt => Op::Lldt,
        M::Ltr => Op::Ltr,
        M::Lmsw => Op::Lmsw,
        M::Lar => Op::Lar,
        M::Lsl => Op::Lsl,
        M::Verr => Op::Verr,
        M::Verw => Op::Verw,
        M::Ldmxcsr | M::Vldmxcsr => Op::Ldmxcsr,
        M::Stmxcsr | M::Vstmxcsr => Op::Stmxcsr,
        M::Movd | M::Movq if mmx(0) || mmx(1) => Op::MmxMove,
        M::Movntq => Op::MmxMove,
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => Op::VecMaskedBytes,
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => Op::VecMasked,
        M::Pusha | M::Pushad => Op::Pusha,
        M::Popa | M::Popad => Op::Popa,
        M::Pushf | M::Pushfd | M::Pushfq => Op::Pushf,
        M::Leave => Op::Leave,
        M::Call => Op::Call,
        M::Jmp if insn.is_jmp_near_indirect() => Op::Jmp,
        M::Ret => Op::Ret,
        M::Xlatb => Op::Xlat,
        M::Movsb | M::Movsw | M::Movsq => Op::Movs,
        M::Movsd if insn.is_string_instruction() => Op::Movs,
        M::Cmpsb | M::Cmpsw | M::Cmpsq => Op::Cmps,
        M::Cmpsd if insn.is_string_instruction() => Op::Cmps,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => Op::Stos,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => Op::Lods,
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => Op::Scas,
        M::Insb | M::Insw | M::Insd => Op::Ins,
        M::Outsb | M::Outsw | M::Outsd => Op::Outs,
        M::Clflush | M::Clflushopt | M::Clwb => Op::Hint,
        M::Movups
        | M::Movupd
        | M::Movdqu
        | M::Lddqu
        | M::Vmovups
        | M::Vmovupd
        | M::Vmovdqu
        | M::Vlddqu => Op::VecMove,
        M::Movaps
        | M::Movapd
        | M::Movdqa
        | M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Movntps
        | M::Movntpd
        | M::Movntdq
        | M::Movntdqa
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa => Op::VecMoveAligned,
        M::Movss | M::Movsd | M::Vmovss | M::Vmovsd if memory => {
            if store {
                Op::VecStore
            } else {
                Op::VecLoad
            }
        }
        M::Movd | M::Vmovd if xmm(0) => Op::VecLoad,
        M::Movd | M::Vmovd if xmm(1) => Op::VecStore,
        // Two encodings; D6 between registers is not emulated.
        M::Movq | M::Vmovq if xmm(0) && !name.contains("xmmm64_xmm") => Op::VecLoad,
        M::Movq | M::Vmovq if xmm(1) && (memory || !xmm(0)) => Op::VecStore,
        M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd if memory => {
            if store {
                Op::VecStore
            } else {
                Op::VecInsert
            }
        }
        M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd if memory => {
            if store {
                Op::VecExtract
            } else {
                Op::VecInsert
            }
        }
        M::Vbroadcastss
        | M::Vbroadcastsd
        | M::Vbroadcastf128
        | M::Vbroadcasti128
        | M::Vpbroadcastb
        | M::Vpbroadcastw
        | M::Vpbroadcastd
        | M::Vpbroadcastq
            if memory =>
        {
            Op::VecBroadcast
        }
        M::Vinsertf128 | M::Vinserti128 if memory => Op::VecInsert,
        M::Vextractf128 | M::Vextracti128 if memory => Op::VecExtract,
        _ if memory => element_of(insn)?,
        _ => return None,
    })
}

/// The moves of one element, from or to memory. PINSRW of an MMX register is
/// left out.
fn element_of(insn: &Instruction) -> Option<Op> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Pinsrw if insn.op_register(0).is_mm() => return None,
        M::Pinsrb
        | M::Pinsrw
        | M::Pinsrd
        | M::Pinsrq
        | M::Vpinsrb
        | M::Vpinsrw
        | M::Vpinsrd
        | M::Vpinsrq => Op::VecInsert,
        M::Pextrb
        | M::Pextrw
        | M::Pextrd
        | M::Pextrq
        | M::Extractps
        | M::Vpextrb
        | M::Vpextrw
        | M::Vpextrd
        | M::Vpextrq
        | M::Vextractps => Op::VecExtract,
        _ => return None,
    })
}

/// Where our operands are in iced's list: without VEX the destination of an
/// insertion is its second operand too, and MOVLPS and MOVHPS number no element.
pub fn places(insn: &Insn, theirs: &Instruction) -> Vec<usize> {
    let count = theirs.op_count() as usize;
    if insn.op == Op::VecInsert && !insn.prefixes.vex {
        assert_eq!(insn.operand(0), insn.operand(1));
        return vec![0, 2, 3][..count].to_vec();
    }
    (0..count).collect()
}

/// The operands that iced does not list.
pub fn implied(insn: &Insn, theirs: &Instruction) -> Operand {
    use Mnemonic as M;
    match (insn.op, theirs.mnemonic()) {
        (Op::VecInsert, M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd) => Operand::Imm(0),
        (Op::VecInsert | Op::VecExtract, M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd) => {
            Operand::Imm(1)
        }
        _ => Operand::None,
    }
}

/// The moves of EVEX.
fn expected_evex(insn: &Instruction) -> Option<Op> {
    use Mnemonic as M;
    let memory = (0..insn.op_count()).any(|i| is_memory(insn.op_kind(i)));
    let store = is_memory(insn.op_kind(0));
    let vector = |i: u32| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_xmm();
    let name = format!("{:?}", insn.code());
    Some(match insn.mnemonic() {
        M::Vmovups | M::Vmovupd | M::Vmovdqu8 | M::Vmovdqu16 | M::Vmovdqu32 | M::Vmovdqu64 => {
            Op::VecMove
        }
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa32
        | M::Vmovdqa64
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa => Op::VecMoveAligned,
        M::Vmovss | M::Vmovsd | M::Vmovlps | M::Vmovlpd if memory && store => Op::VecStore,
        M::Vmovss | M::Vmovsd if memory => Op::VecLoad,
        M::Vmovd if vector(0) => Op::VecLoad,
        M::Vmovd => Op::VecStore,
        // Two encodings; D6 between registers is not emulated.
        M::Vmovq if vector(0) && !name.contains("xmmm64_xmm") => Op::VecLoad,
        M::Vmovq if memory || !vector(0) => Op::VecStore,
        M::Vmovhps | M::Vmovhpd if memory && store => Op::VecExtract,
        M::Vmovlps | M::Vmovlpd | M::Vmovhps | M::Vmovhpd if memory => Op::VecInsert,
        M::Vbroadcastss
        | M::Vbroadcastsd
        | M::Vbroadcastf32x2
        | M::Vbroadcastf32x4
        | M::Vbroadcastf64x2
        | M::Vbroadcastf32x8
        | M::Vbroadcastf64x4
        | M::Vbroadcasti32x2
        | M::Vbroadcasti32x4
        | M::Vbroadcasti64x2
        | M::Vbroadcasti32x8
        | M::Vbroadcasti64x4
        | M::Vpbroadcastb
        | M::Vpbroadcastw
        | M::Vpbroadcastd
        | M::Vpbroadcastq
            if memory =>
        {
            Op::VecBroadcast
        }
        M::Vinsertf32x4
        | M::Vinsertf64x2
        | M::Vinsertf32x8
        | M::Vinsertf64x4
        | M::Vinserti32x4
        | M::Vinserti64x2
        | M::Vinserti32x8
        | M::Vinserti64x4
            if memory =>
        {
            Op::VecInsert
        }
        M::Vextractf32x4
        | M::Vextractf64x2
        | M::Vextractf32x8
        | M::Vextractf64x4
        | M::Vextracti32x4
        | M::Vextracti64x2
        | M::Vextracti32x8
        | M::Vextracti64x4
            if memory =>
        {
            Op::VecExtract
        }
        _ if memory => element_of(insn)?,
        _ => return None,
    })
}

/// The opmask, zeroing and element of a masked move.
pub fn same_mask(insn: &Insn, theirs: &Instruction) -> bool {
    let register = match theirs.op_mask() {
        Register::None => 0,
        register => register as u8 - Register::K0 as u8,
    };
    match insn.mask {
        _ if insn.op == Op::VecMasked => {
            let wide = matches!(
                theirs.mnemonic(),
                Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq
            );
            insn.mask.map(|mask| mask.element) == Some(if wide { 8 } else { 4 })
        }
        None => register == 0 && !theirs.zeroing_masking(),
        Some(mask) => {
            let element = match theirs.mnemonic() {
                Mnemonic::Vmovdqu8 | Mnemonic::Vpbroadcastb => 1,
                Mnemonic::Vmovdqu16 | Mnemonic::Vpbroadcastw => 2,
                Mnemonic::Vbroadcastsd
                | Mnemonic::Vbroadcastf64x2
                | Mnemonic::Vbroadcastf64x4
                | Mnemonic::Vbroadcasti64x2
                | Mnemonic::Vbroadcasti64x4
                | Mnemonic::Vpbroadcastq
                | Mnemonic::Vinsertf64x2
                | Mnemonic::Vinsertf64x4
                | Mnemonic::Vinserti64x2
                | Mnemonic::Vinserti64x4
                | Mnemonic::Vextractf64x2
                | Mnemonic::Vextractf64x4
                | Mnemonic::Vextracti64x2
                | Mnemonic::Vextracti64x4
                | Mnemonic::Vmovdqu64
                | Mnemonic::Vmovdqa64
                | Mnemonic::Vmovupd
                | Mnemonic::Vmovapd
                | Mnemonic::Vmovsd => 8,
                _ => 4,
            };
            mask.register == register
                && mask.zeroing == theirs.zeroing_masking()
                && mask.element == element
        }
    }
}

/// The hint space 0F 0D, 0F 18 and 0F 1F with memory: iced names some by what
/// they became.
pub fn is_hint(insn: &Instruction) -> bool {
    let name = format!("{:?}", insn.code());
    let ours = name.starts_with("Prefetch")
        || name.starts_with("Nop_rm")
        || ["0F0D", "0F18", "0F1F"]
            .iter()
            .any(|end| name.ends_with(end));
    ours && is_memory(insn.op_kind(0))
}

fn mov_is_ours(insn: &Instruction) -> bool {
    // Not control and debug registers.
    (0..insn.op_count()).all(|i| {
        insn.op_kind(i) != OpKind::Register
            || gpr_of(insn.op_register(i)).is_some()
            || seg_of(insn.op_register(i)).is_some()
    })
}

pub fn is_memory(kind: OpKind) -> bool {
    use OpKind as K;
    matches!(
        kind,
        K::Memory
            | K::MemorySegSI
            | K::MemorySegESI
            | K::MemorySegRSI
            | K::MemorySegDI
            | K::MemorySegEDI
            | K::MemorySegRDI
            | K::MemoryESDI
            | K::MemoryESEDI
            | K::MemoryESRDI
    )
}

pub fn gpr_of(register: Register) -> Option<Operand> {
    if !register.is_gpr() {
        return None;
    }
    let high = match register {
        Register::AH => Some(Gpr::Rax),
        Register::CH => Some(Gpr::Rcx),
        Register::DH => Some(Gpr::Rdx),
        Register::BH => Some(Gpr::Rbx),
        _ => None,
    };
    Some(match high {
        Some(reg) => Operand::HighByte(reg),
        None => Operand::Reg {
            reg: Gpr::from_bits(register.full_register() as u8 - Register::RAX as u8),
            size: register.size() as u8,
        },
    })
}

pub fn seg_of(register: Register) -> Option<Seg> {
    Some(match register {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::DS => Seg::Ds,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => return None,
    })
}
