//! The decoder against iced-x86: a million byte strings, random and structured,
//! in 16-, 32- and 64-bit code. Length, operation and every operand must agree,
//! and what we refuse must be something iced refuses or we do not emulate.

mod emulate_machine;

use std::collections::BTreeMap;

use emulate_machine::Rng;
use haxm_vmx::emulate::{
    DecodeError, Gpr, Insn, MAX_INSN_LEN, Mem, Mode, Op, Operand, Seg, decode,
};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

const CASES: u32 = 1_000_000;
const IP: u64 = 0x12_3400;

/// Our operation for an instruction of iced's, `None` if we do not emulate it.
/// What iced calls EVEX or XOP, or a register form of a move that we take from
/// or to memory only, is left out.
fn expected_op(insn: &Instruction) -> Option<Op> {
    use Mnemonic as M;
    let name = format!("{:?}", insn.code());
    if name.starts_with("XOP") || name.starts_with("MVEX") {
        return None;
    }
    if name.starts_with("EVEX") {
        return expected_evex(insn);
    }
    let vex = name.starts_with("VEX");
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
                Op::VecMergeLow
            }
        }
        M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd if memory => {
            if store {
                Op::VecStoreHigh
            } else {
                Op::VecMergeHigh
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
            if memory && vex =>
        {
            Op::VecBroadcast
        }
        M::Vinsertf128 | M::Vinserti128 if memory => Op::VecInsertHalf,
        M::Vextractf128 | M::Vextracti128 if memory => Op::VecExtractHalf,
        _ => return None,
    })
}

/// The moves of EVEX; those of SSE's list that broadcast, insert or extract are
/// left out.
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
        M::Vmovlps | M::Vmovlpd if memory => Op::VecMergeLow,
        M::Vmovhps | M::Vmovhpd if memory && store => Op::VecStoreHigh,
        M::Vmovhps | M::Vmovhpd if memory => Op::VecMergeHigh,
        _ => return None,
    })
}

/// The opmask, zeroing and element of a masked move.
fn same_mask(insn: &Insn, theirs: &Instruction) -> bool {
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
                Mnemonic::Vmovdqu8 => 1,
                Mnemonic::Vmovdqu16 => 2,
                Mnemonic::Vmovdqu64
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
fn is_hint(insn: &Instruction) -> bool {
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

fn is_memory(kind: OpKind) -> bool {
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

fn gpr_of(register: Register) -> Option<Operand> {
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

fn seg_of(register: Register) -> Option<Seg> {
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

fn same_base(ours: Option<Gpr>, theirs: Register) -> bool {
    match (ours, gpr_of(theirs)) {
        (None, None) => true,
        (Some(ours), Some(Operand::Reg { reg, .. })) => ours == reg,
        _ => false,
    }
}

fn same_memory(ours: &Mem, theirs: &Instruction, op: u32, insn: &Insn) -> bool {
    use OpKind as K;
    let size_agrees = insn.op == Op::Hint || usize::from(ours.size) == theirs.memory_size().size();
    let (base, seg) = match theirs.op_kind(op) {
        K::MemorySegSI | K::MemorySegESI | K::MemorySegRSI => (Some(Gpr::Rsi), Register::DS),
        K::MemoryESDI | K::MemoryESEDI | K::MemoryESRDI => (Some(Gpr::Rdi), Register::ES),
        K::MemorySegDI | K::MemorySegEDI | K::MemorySegRDI => (Some(Gpr::Rdi), Register::DS),
        _ if insn.op == Op::Xlat => (Some(Gpr::Rbx), Register::DS),
        K::Memory => {
            let width = insn.address_size * 8;
            let keep = u64::MAX >> (64 - width);
            let place = if ours.rip_relative {
                ours.disp.wrapping_add(theirs.next_ip())
            } else {
                ours.disp
            };
            let rip = matches!(theirs.memory_base(), Register::RIP | Register::EIP);
            let scale = 1 << ours.scale;
            return size_agrees
                && rip == ours.rip_relative
                && (rip || same_base(ours.base, theirs.memory_base()))
                && same_base(ours.index, theirs.memory_index())
                && (ours.index.is_none() || scale == theirs.memory_index_scale())
                && place & keep == theirs.memory_displacement64() & keep
                && same_segment(ours.seg, theirs, insn);
        }
        _ => return false,
    };
    let seg_agrees = if seg == Register::ES {
        ours.seg == Seg::Es
    } else {
        same_segment(ours.seg, theirs, insn)
    };
    size_agrees && ours.base == base && ours.index.is_none() && seg_agrees
}

/// iced reports an ES, CS, SS or DS prefix in 64-bit mode although it is
/// ignored there.
fn same_segment(ours: Seg, theirs: &Instruction, insn: &Insn) -> bool {
    let theirs_seg = seg_of(theirs.memory_segment());
    let ignored = insn.mode == Mode::Bits64
        && matches!(
            theirs.segment_prefix(),
            Register::ES | Register::CS | Register::SS | Register::DS
        );
    if ignored {
        matches!(ours, Seg::Ds | Seg::Ss)
    } else {
        theirs_seg == Some(ours)
    }
}

fn same_operand(ours: Operand, theirs: &Instruction, op: u32, insn: &Insn) -> bool {
    use OpKind as K;
    match (ours, theirs.op_kind(op)) {
        (Operand::Mem(mem), _) => same_memory(&mem, theirs, op, insn),
        (Operand::Imm(value), K::NearBranch16) => {
            theirs.next_ip().wrapping_add(value) as u16 == theirs.near_branch16()
        }
        (Operand::Imm(value), K::NearBranch32) => {
            theirs.next_ip().wrapping_add(value) as u32 == theirs.near_branch32()
        }
        (Operand::Imm(value), K::NearBranch64) => {
            theirs.next_ip().wrapping_add(value) == theirs.near_branch64()
        }
        (Operand::Imm(value), kind) => {
            let bits = match kind {
                K::Immediate8 | K::Immediate8_2nd => 8,
                K::Immediate16 | K::Immediate8to16 => 16,
                K::Immediate32 | K::Immediate8to32 => 32,
                K::Immediate64 | K::Immediate8to64 | K::Immediate32to64 => 64,
                _ => return false,
            };
            let keep = u64::MAX >> (64 - bits);
            value & keep == theirs.immediate(op) & keep
        }
        (Operand::Seg(seg), K::Register) => seg_of(theirs.op_register(op)) == Some(seg),
        (Operand::Vector { index, size }, K::Register) => {
            let register = theirs.op_register(op);
            let (first, width) = match register {
                _ if register.is_zmm() => (Register::ZMM0, 64),
                _ if register.is_ymm() => (Register::YMM0, 32),
                _ => (Register::XMM0, 16),
            };
            register.is_vector_register()
                && register as u32 - first as u32 == u32::from(index)
                && (size == width || size < 16)
        }
        (Operand::Mmx(index), K::Register) => {
            let register = theirs.op_register(op);
            register.is_mm() && register as u32 - Register::MM0 as u32 == u32::from(index)
        }
        (operand, K::Register) => gpr_of(theirs.op_register(op)) == Some(operand),
        _ => false,
    }
}

fn check(bytes: &[u8], mode: Mode) -> bool {
    let bits = match mode {
        Mode::Bits16 => 16,
        Mode::Bits32 => 32,
        Mode::Bits64 => 64,
    };
    let options = DecoderOptions::NONE;
    let theirs = Decoder::with_ip(bits, bytes, IP, options).decode();
    let ours = decode(bytes, mode);
    let context = || {
        format!(
            "{bits}-bit {bytes:02x?}: ours {ours:?}, iced {theirs:?} {:?}",
            theirs.code()
        )
    };
    let wanted = if theirs.code() == Code::INVALID {
        None
    } else {
        expected_op(&theirs).or(is_hint(&theirs).then_some(Op::Hint))
    };
    match ours {
        Ok(insn) => {
            assert_eq!(Some(insn.op), wanted, "{}", context());
            assert_eq!(usize::from(insn.len), theirs.len(), "{}", context());
            // The hint space has a second operand that means nothing.
            let far = matches!(theirs.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32);
            let count = if insn.op == Op::Hint {
                1
            } else {
                theirs.op_count()
            };
            if far {
                let offset = if theirs.op0_kind() == OpKind::FarBranch16 {
                    theirs.far_branch16().into()
                } else {
                    theirs.far_branch32().into()
                };
                let selector = theirs.far_branch_selector().into();
                let wanted = [Operand::Imm(offset), Operand::Imm(selector)];
                assert_eq!(insn.operands[..2], wanted, "{}", context());
                return true;
            }
            assert!(same_mask(&insn, &theirs), "{}", context());
            for op in 0..count {
                let ours = insn.operand(op as usize);
                assert!(
                    same_operand(ours, &theirs, op, &insn),
                    "operand {op}: {}",
                    context()
                );
            }
            assert_eq!(insn.operand(count as usize), Operand::None, "{}", context());
            assert_eq!(
                insn.prefixes.lock,
                theirs.has_lock_prefix(),
                "{}",
                context()
            );
            if insn.op.is_string() {
                let repeats = insn.prefixes.repeat != haxm_vmx::emulate::Repeat::No;
                let theirs = theirs.has_rep_prefix() || theirs.has_repne_prefix();
                assert_eq!(repeats, theirs, "{}", context());
            }
            let whole = usize::from(insn.len);
            assert_eq!(decode(&bytes[..whole], mode), Ok(insn));
            for short in 0..whole {
                assert_eq!(
                    decode(&bytes[..short], mode),
                    Err(DecodeError::TooShort),
                    "{short} of {}",
                    context()
                );
            }
            true
        }
        Err(DecodeError::Unsupported) => {
            assert_eq!(wanted, None, "{}", context());
            false
        }
        Err(DecodeError::TooLong) => {
            assert_eq!(theirs.code(), Code::INVALID, "{}", context());
            false
        }
        Err(DecodeError::TooShort) => panic!("15 bytes are enough: {}", context()),
    }
}

/// Prefixes, then an opcode from a map that has emulated instructions, then
/// random bytes.
fn structured(rng: &mut Rng) -> [u8; MAX_INSN_LEN] {
    let mut bytes = [0; MAX_INSN_LEN];
    for byte in &mut bytes {
        *byte = rng.byte();
    }
    let mut at = 0;
    let mut put = |byte: u8| {
        bytes[at] = byte;
        at += 1;
    };
    for _ in 0..rng.pick(&[0, 0, 0, 0, 1, 1, 1, 2, 3]) {
        put(rng.pick(&[
            0x66, 0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65,
        ]));
    }
    if rng.one_in(3) {
        put(0x40 | rng.byte() & 15);
    }
    match rng.below(10) {
        0..=2 => {}
        3 => put(0x0f),
        4 => {
            put(0x0f);
            put(rng.pick(&[0x00, 0x01, 0xb8, 0xbc, 0xbd, 0xc7, 0xf7, 0x6e, 0x7e, 0xd6]));
        }
        5 => {
            put(0x0f);
            put(0x38);
            put(rng.pick(&[0xf0, 0xf1, 0xf6, 0xf9, 0x2a]));
        }
        6 | 7 => {
            put(0x62);
            put(rng.byte() & 0xf0 | rng.pick(&[0xc1, 0xd1, 1, 1, 2, 3, 5]));
            put(rng.byte() | rng.pick(&[4, 0x7c, 0x7c, 0x7c, 0x7c, 0]));
            let tail = rng.byte() & 0xef | rng.pick(&[0, 8, 8, 8, 8, 0x10]);
            put(if rng.one_in(2) { 8 } else { tail });
            put(rng.pick(&[
                0x10, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x2a, 0x2b, 0x6e, 0x6f, 0x6f, 0x7e,
                0x7f, 0x7f, 0xd6, 0xe7, 0x58,
            ]));
        }
        8 => {
            put(0xc5);
            put(rng.byte() | 0x78);
        }
        _ => {
            put(0xc4);
            let map = rng.pick(&[0xc1, 0xc2, 0xc2, 3, 1, 2, 2, 0xc3, 3]);
            put(rng.byte() & 0xe0 | map);
            put(match rng.below(3) {
                0 => rng.byte() | 0x78,
                1 => rng.byte() & 0xfb,
                _ => rng.byte() & 0x80,
            });
            let opcode = if map & 3 == 3 {
                rng.pick(&[0xf0, 0x18, 0x19, 0x38, 0x39])
            } else if rng.one_in(2) {
                rng.pick(&[
                    0xf2, 0xf3, 0xf3, 0xf5, 0xf6, 0xf7, 0x18, 0x19, 0x1a, 0x58, 0x59, 0x5a, 0x78,
                    0x79, 0x2c, 0x2d, 0x2e, 0x2f, 0x8c, 0x8e,
                ])
            } else {
                rng.byte()
            };
            put(opcode);
            if opcode == 0xf3 {
                put(rng.byte() & 0xc7 | rng.pick(&[0x08, 0x10, 0x18, 0x20]));
            }
        }
    }
    bytes
}

#[test]
fn agrees_with_iced() {
    let mut rng = Rng(0x5eed_0000_0001);
    let mut decoded = 0u32;
    let mut seen = BTreeMap::new();
    for case in 0..CASES {
        let bytes = if case % 4 == 0 {
            let mut bytes = [0; MAX_INSN_LEN];
            bytes[..8].copy_from_slice(&rng.next().to_le_bytes());
            bytes[7..].copy_from_slice(&rng.next().to_le_bytes());
            bytes
        } else {
            structured(&mut rng)
        };
        let mode = rng.pick(&[Mode::Bits16, Mode::Bits32, Mode::Bits64]);
        if check(&bytes, mode) {
            decoded += 1;
            let insn = decode(&bytes, mode).expect("checked");
            let name = match insn.op {
                Op::Set(_) => "Set".into(),
                Op::Cmov(_) => "Cmov".into(),
                op if insn.prefixes.evex => format!("{op:?}, EVEX"),
                op => format!("{op:?}"),
            };
            *seen.entry(name).or_insert(0u32) += 1;
        }
    }
    // All operations, and nine of them with EVEX.
    let rare: Vec<_> = seen.iter().filter(|(_, count)| **count < 25).collect();
    assert!(rare.is_empty(), "{rare:?}");
    assert_eq!(seen.len(), 129, "{seen:?}");
    // The comparison is worth something only if much of it decodes.
    assert!(decoded > CASES / 3, "{decoded} decoded");
}

#[test]
fn refuses_what_is_too_long() {
    // Fourteen prefixes leave room for one byte.
    let mut bytes = [0x66; 20];
    bytes[14] = 0x90;
    assert_eq!(decode(&bytes, Mode::Bits64), Err(DecodeError::Unsupported));
    bytes[13] = 0x8b;
    bytes[14] = 0x00;
    assert_eq!(decode(&bytes, Mode::Bits64).map(|insn| insn.len), Ok(15));
    bytes[14] = 0x40;
    assert_eq!(decode(&bytes, Mode::Bits64), Err(DecodeError::TooLong));
    assert_eq!(
        decode(&bytes[..15], Mode::Bits64),
        Err(DecodeError::TooLong)
    );
    assert_eq!(
        decode(&bytes[..14], Mode::Bits64),
        Err(DecodeError::TooShort)
    );
    assert_eq!(decode(&[], Mode::Bits64), Err(DecodeError::TooShort));
}
