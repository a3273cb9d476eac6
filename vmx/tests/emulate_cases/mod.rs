//! Generated cases for the comparison with a processor: instruction bytes that
//! favour what is emulated, the segments they run with, and what the SDM leaves
//! undefined.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "a test's own part")]

use haxm_vmx::emulate::{Gpr, Insn, MAX_INSN_LEN, Mode, Op, Operand, SegmentState};

use crate::emulate_host::{CODE, DATA, Host, Selectors};
use crate::emulate_machine::{Fake, Rng, STATUS};

const CF: u64 = 1;
const PF: u64 = 4;
const AF: u64 = 0x10;
const ZF: u64 = 0x40;
const SF: u64 = 0x80;
const OF: u64 = 0x800;

/// A way to run code: mode and segments, for both sides.
#[derive(Clone, Copy)]
pub struct Flavor {
    pub mode: Mode,
    pub selectors: Selectors,
    pub cs: SegmentState,
    pub ss: SegmentState,
    pub data: SegmentState,
    pub fs_base: u64,
    pub gs_base: u64,
}

fn segment(base: u64, limit: u32, access: u32) -> SegmentState {
    SegmentState {
        selector: 0,
        base,
        limit,
        access,
    }
}

/// Bits of `user_desc`'s last word.
const SEG_32BIT: u32 = 1;
const CONTENTS_EXPAND_DOWN: u32 = 1 << 1;
const CONTENTS_CODE: u32 = 2 << 1;
const READ_EXEC_ONLY: u32 = 1 << 3;

pub fn flavors(host: &mut Host) -> Vec<Flavor> {
    const GS_BASE: u64 = 0x1234_5678;
    host.set_gs_base(GS_BASE);
    let fs_base = host.fs_base();
    let flat_code = segment(0, u32::MAX, 0xc0fb);
    let flat_data = segment(0, u32::MAX, 0xc0f3);
    let base = Flavor {
        mode: Mode::Bits64,
        selectors: Selectors {
            cs: 0x33,
            ss: 0x2b,
            data: 0,
        },
        cs: segment(0, u32::MAX, 0xa0fb),
        ss: flat_data,
        data: flat_data,
        fs_base,
        gs_base: GS_BASE,
    };
    let flat32 = Flavor {
        mode: Mode::Bits32,
        selectors: Selectors {
            cs: 0x23,
            ss: 0x2b,
            data: 0x2b,
        },
        cs: flat_code,
        ..base
    };
    let mut flavors = vec![base, base, base, flat32, flat32];
    match segmented(host, flat32) {
        Some(more) => flavors.extend(more),
        None => eprintln!("no modify_ldt in this kernel: no 16-bit code, no segment limits"),
    }
    flavors
}

/// 16-bit code, and data segments that end in the middle of the second page,
/// begin there, or may not be written.
fn segmented(host: &mut Host, flat32: Flavor) -> Option<Vec<Flavor>> {
    let code16 = host.set_descriptor(0, CODE as u32, 0xffff, CONTENTS_CODE)?;
    let small = host.set_descriptor(1, DATA as u32, 0x17ff, SEG_32BIT)?;
    let down = host.set_descriptor(2, DATA as u32, 0x7ff, SEG_32BIT | CONTENTS_EXPAND_DOWN)?;
    let down16 = host.set_descriptor(3, DATA as u32, 0x17fe, CONTENTS_EXPAND_DOWN)?;
    let fixed = host.set_descriptor(4, DATA as u32, 0xffff, READ_EXEC_ONLY)?;
    let data16 = host.set_descriptor(5, DATA as u32, 0xffff, 0)?;
    let small_data = segment(DATA, 0x17ff, 0x40f3);
    let down_data = segment(DATA, 0x7ff, 0x40f7);
    let down16_data = segment(DATA, 0x17fe, 0x00f7);
    let fixed_data = segment(DATA, 0xffff, 0x00f1);
    let data16_data = segment(DATA, 0xffff, 0x00f3);
    let with_data = |flavor: Flavor, selector: u16, data: SegmentState| Flavor {
        selectors: Selectors {
            data: selector,
            ..flavor.selectors
        },
        data,
        ..flavor
    };
    let flat16 = Flavor {
        mode: Mode::Bits16,
        selectors: Selectors {
            cs: code16,
            ss: data16,
            data: data16,
        },
        cs: segment(CODE, 0xffff, 0x00fb),
        ss: data16_data,
        data: data16_data,
        ..flat32
    };
    let small_stack = Flavor {
        selectors: Selectors {
            ss: small,
            ..flat16.selectors
        },
        ss: small_data,
        ..flat16
    };
    Some(vec![
        with_data(flat32, small, small_data),
        with_data(flat32, down, down_data),
        with_data(flat32, fixed, fixed_data),
        flat16,
        flat16,
        with_data(flat16, down16, down16_data),
        with_data(flat16, small, small_data),
        small_stack,
    ])
}

/// Opcodes of every emulated instruction, so that none is rare.
pub fn random_bytes(rng: &mut Rng, mode: Mode) -> [u8; MAX_INSN_LEN] {
    let mut bytes = [0; MAX_INSN_LEN];
    for byte in &mut bytes {
        *byte = rng.byte();
    }
    let mut at = 0;
    let mut put = |byte: u8| {
        bytes[at] = byte;
        at += 1;
    };
    let vex = rng.one_in(6);
    for _ in 0..rng.pick(&[0, 0, 0, 1, 1, 2]) {
        put(if vex {
            rng.pick(&[0x67, 0x2e, 0x36, 0x64, 0x65])
        } else {
            rng.pick(&[0x66, 0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x64, 0x65])
        });
    }
    if mode == Mode::Bits64 && !vex && rng.one_in(3) {
        put(0x40 | rng.byte() & 15);
    }
    if !vex && rng.one_in(9) {
        // EVEX moves, half of them with a mask.
        put(0x62);
        let outside = if mode == Mode::Bits64 { 0 } else { 0xc0 };
        let map = rng.pick(&[1, 1, 1, 2, 3]);
        put(rng.byte() & 0xf0 | map | outside);
        // All but the moves of map 1 have the prefix 66; insertions have a third register.
        let inserts = map == 3 && rng.one_in(2);
        let third = if inserts { rng.byte() & 0x78 } else { 0x78 };
        put(if map == 1 {
            rng.byte() & 0x83 | 0x7c
        } else {
            rng.byte() & 0x80 | third | 5
        });
        put(if rng.one_in(2) {
            8
        } else {
            rng.byte() & 0xe7 | 8
        } & 0xef
            | rng.byte() & 0x60);
        let opcodes: &[u8] = match map {
            1 => &[
                0x10, 0x11, 0x28, 0x29, 0x6f, 0x7f, 0x6f, 0x7f, 0x2b, 0xe7, 0x6e, 0x7e, 0xd6, 0x13,
            ],
            2 => &[0x18, 0x19, 0x1a, 0x1b, 0x58, 0x59, 0x5a, 0x5b, 0x78, 0x79],
            _ => &[
                0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x20, 0x22, 0x38, 0x39, 0x3a, 0x3b,
            ],
        };
        put(rng.pick(opcodes));
        return bytes;
    }
    match if vex { 11 } else { rng.below(11) } {
        0..=2 => put(rng.byte() & 0x3b),
        3 | 4 => {
            let opcode = rng.pick(&[
                0x50, 0x58, 0x60, 0x61, 0x63, 0x68, 0x69, 0x6a, 0x6b, 0x80, 0x81, 0x83, 0x84, 0x85,
                0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8f, 0x9c, 0x9d, 0x62, 0xc8, 0x06, 0x1e, 0xa0,
                0xa1, 0xa2, 0xa3, 0xc2, 0xc3, 0xc6, 0xc7, 0xc9, 0xd7, 0xe8, 0xff, 0xff,
            ]);
            put(opcode);
            if opcode == 0xc8 {
                let (size, level) = (
                    rng.pick(&[0, 8, 0x40, 0xff]),
                    rng.pick(&[0, 0, 1, 2, 5, 33]),
                );
                put(size);
                put(0);
                put(level);
                return bytes;
            }
            if opcode == 0x8f {
                // POP, half the time through rSP or something added to it.
                put(rng.byte() & 0xc7);
                if rng.one_in(2) {
                    bytes[at - 1] = bytes[at - 1] & 0xc0 | 4;
                    bytes[at] = bytes[at] & 0xf8 | 4;
                }
                return bytes;
            }
        }
        5 => put(rng.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf])),
        6 => put(rng.pick(&[
            0xc0, 0xc1, 0xd0, 0xd1, 0xd2, 0xd3, 0xf6, 0xf7, 0xf6, 0xf7, 0xfe, 0xff,
        ])),
        7 => {
            if rng.one_in(4) {
                // POPCNT, TZCNT, LZCNT.
                put(0xf3);
                put(0x0f);
                put(rng.pick(&[0xb8, 0xbc, 0xbd]));
                return bytes;
            }
            put(0x0f);
            let opcode = rng.pick(&[
                0xa3, 0xab, 0xb3, 0xbb, 0xba, 0xa4, 0xa5, 0xac, 0xad, 0xae, 0xaf, 0xb0, 0xb1, 0xb6,
                0xb7, 0xb8, 0xbc, 0xbd, 0xbe, 0xbf, 0xc0, 0xc1, 0xc3, 0xc7, 0x1f, 0x18, 0x0d,
            ]);
            put(opcode);
            if opcode == 0xc7 {
                // CMPXCHG8B.
                put(rng.byte() & 0xc7 | 8);
            }
        }
        8 => {
            put(0x0f);
            put(rng.pick(&[0x40, 0x90]) | rng.byte() & 15);
        }
        9 => {
            put(0x0f);
            put(0x38);
            put(rng.pick(&[0xf0, 0xf1, 0xf6, 0xf9, 0x2a]));
        }
        10 if rng.one_in(4) => {
            put(0x66);
            put(0x0f);
            put(0x3a);
            put(rng.pick(&[0x14, 0x15, 0x16, 0x17, 0x20, 0x22]));
        }
        10 => {
            put(0x0f);
            put(rng.pick(&[
                0x10, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x2b, 0x6e, 0x6f, 0x7e, 0x7f, 0xd6,
                0xe7, 0xf0, 0x6e, 0x6f, 0x7e, 0x7f, 0xf7, 0xc4, 0xae,
            ]));
        }
        _ => {
            put(0xc4);
            let map = rng.pick(&[1, 2, 2, 3]);
            // Outside 64-bit mode C4 is VEX only with the two upper bits set.
            let outside = if mode == Mode::Bits64 { 0 } else { 0xc0 };
            put(rng.byte() & 0xe0 | map | outside);
            put(if rng.one_in(2) {
                rng.byte() | 0x78
            } else {
                rng.byte()
            });
            let opcode = match map {
                1 => rng.pick(&[
                    0x10, 0x11, 0x12, 0x13, 0x16, 0x17, 0x28, 0x29, 0x2b, 0x6e, 0x6f, 0x7e, 0x7f,
                    0xd6, 0xe7, 0xf0, 0xc4, 0xae,
                ]),
                2 => rng.pick(&[
                    0xf2, 0xf3, 0xf5, 0xf6, 0xf7, 0xf2, 0xf3, 0xf5, 0xf6, 0xf7, 0x18, 0x19, 0x1a,
                    0x2a, 0x58, 0x59, 0x5a, 0x78, 0x79, 0x2c, 0x2d, 0x2e, 0x2f, 0x8c, 0x8e,
                ]),
                _ => rng.pick(&[
                    0xf0, 0xf0, 0x18, 0x19, 0x38, 0x39, 0x14, 0x15, 0x16, 0x17, 0x20, 0x22,
                ]),
            };
            put(opcode);
            if opcode == 0xf3 {
                // BLSR, BLSMSK, BLSI.
                put(rng.byte() & 0xc7 | rng.pick(&[0x08, 0x10, 0x18]));
            }
        }
    }
    bytes
}

/// Flags an instruction leaves undefined, given its inputs; `None` if its result
/// is undefined as well.
pub fn undefined_flags(insn: &Insn, before: &Fake) -> Option<u64> {
    let size = u64::from(insn.operand(0).size());
    let count_of = |operand: Operand| match operand {
        Operand::Imm(value) => value,
        _ => before.gpr[Gpr::Rcx.number()],
    };
    let mask = if size == 8 { 63 } else { 31 };
    Some(match insn.op {
        Op::Shl | Op::Shr | Op::Sar => {
            let count = count_of(insn.operand(1)) & mask;
            let overflow = if count == 1 { 0 } else { OF };
            let carry = if count >= size * 8 && insn.op != Op::Sar {
                CF
            } else {
                0
            };
            if count == 0 { 0 } else { AF | overflow | carry }
        }
        Op::Rol | Op::Ror | Op::Rcl | Op::Rcr => {
            let count = count_of(insn.operand(1)) & mask;
            if count <= 1 { 0 } else { OF }
        }
        Op::Shld | Op::Shrd => {
            let count = count_of(insn.operand(2)) & mask;
            if count > size * 8 {
                return None;
            }
            match count {
                0 => 0,
                1 => AF,
                _ => AF | OF,
            }
        }
        Op::Mul | Op::ImulWide | Op::Imul => SF | ZF | AF | PF,
        Op::Div | Op::Idiv => STATUS,
        Op::Bt | Op::Bts | Op::Btr | Op::Btc | Op::Tzcnt | Op::Lzcnt => OF | SF | AF | PF,
        Op::Bsf | Op::Bsr => STATUS & !ZF,
        Op::Andn | Op::Bzhi | Op::Blsr | Op::Blsmsk | Op::Blsi => AF | PF,
        Op::Bextr => AF | PF | SF,
        Op::And | Op::Or | Op::Xor | Op::Test => AF,
        _ => 0,
    })
}

/// Does this processor have the instruction?
pub fn supported(insn: &Insn) -> bool {
    use std::is_x86_feature_detected as has;
    if insn.prefixes.evex {
        return has_avx512();
    }
    match insn.op {
        Op::Adcx | Op::Adox => has!("adx"),
        Op::Andn | Op::Bextr | Op::Blsr | Op::Blsmsk | Op::Blsi | Op::Tzcnt => has!("bmi1"),
        Op::Bzhi | Op::Pdep | Op::Pext | Op::Mulx => has!("bmi2"),
        Op::Rorx | Op::Sarx | Op::Shlx | Op::Shrx => has!("bmi2"),
        Op::Lzcnt => has!("lzcnt"),
        Op::Popcnt => has!("popcnt"),
        Op::Movbe => has!("movbe"),
        Op::Crc32 => has!("sse4.2"),
        _ => true,
    }
}

/// Processors other than Intel's may do it in another way: PUSH of a segment register writes zeros above the selector
/// (which SDM 2B "PUSH" allows too), a near branch with prefix 66 in 64-bit mode has two bytes, and VEX.W makes VPINSRD and
/// VPEXTRD outside of 64-bit mode undefined rather than nothing.
pub fn differs_by_maker(insn: &Insn) -> bool {
    let segment = insn.op == Op::Push && matches!(insn.operand(0), Operand::Seg(_));
    let short = matches!(insn.op, Op::Call | Op::Jmp | Op::Ret)
        && insn.mode == Mode::Bits64
        && insn.prefixes.operand_size;
    let outside = matches!(insn.op, Op::VecInsert | Op::VecExtract)
        && insn.mode != Mode::Bits64
        && insn.prefixes.vex
        && insn.memory().is_some_and(|mem| mem.size == 4);
    // Where a masked operand passes the end of a segment.
    let masked = insn.mode != Mode::Bits64 && (insn.op == Op::VecMasked || insn.mask.is_some());
    let moves = matches!(insn.op, Op::VecInsert | Op::VecExtract | Op::VecBroadcast);
    outside || (masked && moves) || (!is_intel() && (segment || short || masked))
}

pub fn is_intel() -> bool {
    std::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Genu")
}

/// MOVDIRI, CLFLUSHOPT and CLWB have no detection in the library.
pub fn is_undetectable(bytes: &[u8], insn: &Insn) -> bool {
    insn.op == Op::Hint && bytes.windows(2).any(|pair| pair == [0x0f, 0xae])
        || bytes.windows(3).any(|triple| triple == [0x0f, 0x38, 0xf9])
}

/// Everything emulated, apart from INS and OUTS, which a program may not use.
pub const OPERATIONS: [&str; 93] = [
    "Add",
    "Or",
    "Adc",
    "Sbb",
    "And",
    "Sub",
    "Xor",
    "Cmp",
    "Test",
    "Mov",
    "Movzx",
    "Movsx",
    "Xchg",
    "Cmpxchg",
    "CmpxchgPair",
    "Xadd",
    "Inc",
    "Dec",
    "Not",
    "Neg",
    "Mul",
    "ImulWide",
    "Imul",
    "Div",
    "Idiv",
    "Rol",
    "Ror",
    "Rcl",
    "Rcr",
    "Shl",
    "Shr",
    "Sar",
    "Shld",
    "Shrd",
    "Set",
    "Cmov",
    "Movbe",
    "Bt",
    "Bts",
    "Btr",
    "Btc",
    "Bsf",
    "Bsr",
    "Tzcnt",
    "Lzcnt",
    "Popcnt",
    "Crc32",
    "Adcx",
    "Adox",
    "Andn",
    "Bextr",
    "Bzhi",
    "Blsr",
    "Blsmsk",
    "Blsi",
    "Pdep",
    "Pext",
    "Mulx",
    "Rorx",
    "Sarx",
    "Shlx",
    "Shrx",
    "Push",
    "Pop",
    "Pusha",
    "Popa",
    "Pushf",
    "Leave",
    "Call",
    "Jmp",
    "Ret",
    "Xlat",
    "Movs",
    "Cmps",
    "Stos",
    "Lods",
    "Scas",
    "Hint",
    "VecMove",
    "VecMoveAligned",
    "VecLoad",
    "VecStore",
    "VecBroadcast",
    "VecInsert",
    "VecExtract",
    "Ldmxcsr",
    "Stmxcsr",
    "Popf",
    "Enter",
    "Bound",
    "MmxMove",
    "VecMasked",
    "VecMaskedBytes",
];

/// The processor has the AVX-512 that EVEX moves need.
pub fn has_avx512() -> bool {
    use std::is_x86_feature_detected as has;
    has!("avx512f") && has!("avx512bw") && has!("avx512vl")
}

/// The processor has every extension in the list.
pub fn has_all() -> bool {
    use std::is_x86_feature_detected as has;
    has!("adx")
        && has!("bmi1")
        && has!("bmi2")
        && has!("lzcnt")
        && has!("popcnt")
        && has!("movbe")
        && has!("sse4.2")
}
