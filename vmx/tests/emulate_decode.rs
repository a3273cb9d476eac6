//! The decoder against iced-x86: a million byte strings, random and structured,
//! in 16-, 32- and 64-bit code. Length, operation and every operand must agree,
//! and what we refuse must be something iced refuses or we do not emulate.

mod emulate_iced;
mod emulate_machine;

use std::collections::BTreeMap;

use emulate_iced::{expected_op, gpr_of, implied, is_hint, places, same_mask, seg_of};
use emulate_machine::Rng;
use haxm_vmx::emulate::{
    DecodeError, Gpr, Insn, MAX_INSN_LEN, Mem, Mode, Op, Operand, Seg, decode,
};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};

const CASES: u32 = 1_000_000;
const IP: u64 = 0x12_3400;

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
            let places = if insn.op == Op::Hint {
                vec![0]
            } else {
                places(&insn, &theirs)
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
            for (op, place) in (0..).zip(&places) {
                let ours = insn.operand(*place);
                assert!(
                    same_operand(ours, &theirs, op, &insn),
                    "operand {op}: {}",
                    context()
                );
            }
            let next = places.last().map_or(0, |last| last + 1);
            let rest = implied(&insn, &theirs);
            assert_eq!(insn.operand(next), rest, "{}", context());
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
            put(rng.pick(&[
                0x00, 0x01, 0x02, 0x03, 0xae, 0xc4, 0xb8, 0xbc, 0xbd, 0xc7, 0xf7, 0x6e, 0x7e, 0xd6,
            ]));
        }
        5 if rng.one_in(2) => {
            put(0x0f);
            put(0x38);
            put(rng.pick(&[0xf0, 0xf1, 0xf6, 0xf9, 0x2a]));
        }
        5 => {
            put(0x0f);
            put(0x3a);
            put(rng.pick(&[0x14, 0x15, 0x16, 0x17, 0x20, 0x22]));
        }
        6 | 7 => {
            put(0x62);
            put(rng.byte() & 0xf0 | rng.pick(&[0xc1, 0xd1, 1, 1, 2, 3, 5]));
            put(rng.byte() | rng.pick(&[4, 0x7c, 0x7c, 0x7c, 0x7c, 0]));
            let tail = rng.byte() & 0xef | rng.pick(&[0, 8, 8, 8, 8, 0x10]);
            put(if rng.one_in(2) { 8 } else { tail });
            put(rng.pick(&[
                0x10, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x2a, 0x2b, 0x6e, 0x6f, 0x6f, 0x7e,
                0x7f, 0x7f, 0xd6, 0xe7, 0x58, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x20,
                0x22, 0x38, 0x39, 0x3a, 0x3b, 0x59, 0x5a, 0x5b, 0x78, 0x79, 0xc4,
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
                rng.pick(&[
                    0xf0, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x20, 0x22, 0x38, 0x39,
                ])
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
    // All operations, and seven of them with EVEX.
    let rare: Vec<_> = seen.iter().filter(|(_, count)| **count < 25).collect();
    assert!(rare.is_empty(), "{rare:?}");
    assert_eq!(seen.len(), 125, "{seen:?}");
    // The comparison is worth something only if much of it decodes.
    assert!(decoded > CASES / 3, "{decoded} decoded");
}

/// Each opcode of each map with EVEX and VEX, with each W, length and mandatory prefix, an operand in memory, with and
/// without a second register and a mask: chance finds too few of them.
#[test]
fn every_vector_opcode_agrees_with_iced() {
    let mut decoded = 0u32;
    for case in 0..3 * 0x100 * 0x100u32 {
        let [opcode, bits, map, _] = case.to_le_bytes();
        let (map, wide, prefix, length) = (map + 1, bits & 0x80, bits & 3, bits >> 2 & 3);
        let second = if bits & 0x10 == 0 { 0x78 } else { 0x28 };
        let masked = if bits & 0x20 == 0 {
            0
        } else {
            3 | bits << 1 & 0x80
        };
        let evex = [
            0x62,
            0xf0 | map,
            wide | second | 4 | prefix,
            length << 5 | 8 | masked,
        ];
        let vex = [0xc4, 0xe0 | map, wide | second | (length & 1) << 2 | prefix];
        for head in [&evex[..], &vex] {
            let mut bytes = [0x11; MAX_INSN_LEN];
            bytes[..head.len()].copy_from_slice(head);
            // [rsi + 11h], and an immediate if there is one.
            bytes[head.len()..][..2].copy_from_slice(&[opcode, 0x46]);
            decoded += u32::from(check(&bytes, Mode::Bits64));
        }
    }
    assert!(decoded > 2_000, "{decoded}");
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
