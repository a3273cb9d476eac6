//! The opcode tables of the vector instructions: SSE, VEX and EVEX.

use super::opcode::{Arg, Form, ModRm, Width, form};
use super::prefix::{Head, Mandatory, Map};
use crate::emulate::insn::{Mask, Op};

/// What a form demands of its VEX prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vex {
    /// Must have one with L = 0.
    L0,
    /// Must have one with L = 1, or with EVEX 2.
    L1,
    /// Must be EVEX with L'L = 2.
    L2,
    /// Must have one, L as it likes.
    Any,
}

/// Finds the form of an instruction with VEX or EVEX, and what masks it.
pub(super) fn lookup(head: &Head, modrm: ModRm) -> Option<(Form, Option<Mask>)> {
    let (vex, found) = match head.map {
        Map::One => return None,
        Map::Two => sse_two(head, modrm)?,
        Map::Three38 => vex_three_38(head, modrm)?,
        Map::Three3A => three_3a(head)?,
    };
    let found = found?;
    let fits = match vex {
        Vex::L0 => head.vector_bytes == 16,
        Vex::L1 => head.vector_bytes >= 32,
        Vex::L2 => head.vector_bytes == 64,
        Vex::Any => true,
    };
    let uses_vvvv = found
        .args
        .iter()
        .any(|arg| matches!(arg, Arg::Vreg(_) | Arg::VecVreg(_)));
    // SDM 2A 2.3.5.6: an unused vvvv field must be all ones.
    if !fits || !uses_vvvv && head.vvvv != 0 {
        return None;
    }
    let mask = match head.evex {
        Some(_) => evex(head, modrm)?,
        // VMASKMOVPD and VPMASKMOVQ move 8 bytes at a time.
        None => (found.op == Op::VecMasked).then(|| {
            let wide = head.wide || matches!(head.opcode, 0x2d | 0x2f);
            Mask {
                register: 0,
                zeroing: true,
                element: if wide { 8 } else { 4 },
            }
        }),
    };
    Some((found, mask))
}

/// Is this move one of EVEX's, with the right W bit, and may it be masked so?
/// The inner `None`: it moves all elements.
fn evex(head: &Head, modrm: ModRm) -> Option<Option<Mask>> {
    use Mandatory as P;
    let bits = head.evex?;
    // The element's size without W, which W there may be, and whether it takes a
    // mask.
    let (both, w0, w1) = ((true, true), (true, false), (false, true));
    let singles = matches!(head.mandatory, P::None | P::PF3);
    let of_element = if singles { w0 } else { w1 };
    let (narrow, (narrow_ok, wide_ok), maskable) = match (head.map, head.opcode, head.mandatory) {
        (Map::Two, 0xc4, _) | (Map::Three3A, 0x15, _) => (2, both, false),
        (Map::Three3A, 0x14 | 0x20, _) => (1, both, false),
        (Map::Three38, 0x18 | 0x58, _) => (4, w0, true),
        (Map::Three38, 0x78, _) => (1, w0, true),
        (Map::Three38, 0x79, _) => (2, w0, true),
        (Map::Two, 0x6f | 0x7f, P::PF2) => (1, both, true),
        (Map::Two, 0x6f | 0x7f, _)
        | (Map::Three38, 0x19..=0x1b | 0x59..=0x5b, _)
        | (Map::Three3A, 0x18..=0x1b | 0x38..=0x3b, _) => (4, both, true),
        (Map::Two, 0x6e, _) | (Map::Two, 0x7e, P::P66) | (Map::Three3A, 0x16 | 0x17 | 0x22, _) => {
            (4, both, false)
        }
        (Map::Two, 0xe7, _) | (Map::Three38, 0x2a, _) => (4, w0, false),
        (Map::Two, 0x7e | 0xd6, _) => (4, w1, false),
        (Map::Two, 0x10 | 0x11 | 0x28 | 0x29, _) => (4, of_element, true),
        (Map::Two, 0x12 | 0x13 | 0x16 | 0x17 | 0x2b, _) => (4, of_element, false),
        _ => return None,
    };
    let allowed = if head.wide { wide_ok } else { narrow_ok };
    let masked = bits.opmask != 0;
    let store = !modrm.is_register()
        && matches!(
            (head.map, head.opcode),
            (Map::Two, 0x11 | 0x29 | 0x7f) | (Map::Three3A, 0x19 | 0x1b | 0x39 | 0x3b)
        );
    if !allowed || bits.broadcast || masked && !maskable || bits.zeroing && (!masked || store) {
        return None;
    }
    Some(masked.then_some(Mask {
        register: bits.opmask,
        zeroing: bits.zeroing,
        element: if head.wide { narrow << 1 } else { narrow },
    }))
}

/// The vector instructions of map 0F without VEX.
pub(super) fn legacy(head: &Head, modrm: ModRm) -> Option<Form> {
    use Mandatory as P;
    let wide_rm = Arg::Rm(Width::Wide);
    let register = modrm.is_register();
    match (head.opcode, head.mandatory) {
        (0x6e, P::None) => form(Op::MmxMove, &[Arg::MmxReg, wide_rm]),
        (0x7e, P::None) => form(Op::MmxMove, &[wide_rm, Arg::MmxReg]),
        (0x6f, P::None) => form(Op::MmxMove, &[Arg::MmxReg, Arg::MmxRm]),
        (0x7f, P::None) => form(Op::MmxMove, &[Arg::MmxRm, Arg::MmxReg]),
        (0xe7, P::None) if !register => form(Op::MmxMove, &[Arg::MmxRm, Arg::MmxReg]),
        (0xf7, P::None) if register => form(
            Op::VecMaskedBytes,
            &[Arg::AtRdi(Width::Qword), Arg::MmxReg, Arg::MmxRm],
        ),
        _ => sse_two(head, modrm)?.1,
    }
}

/// The vector moves of map 0F that have the same shape with and without VEX.
/// Without VEX a vector is 16 bytes because VEX.L reads as clear.
#[expect(clippy::match_same_arms, reason = "a table in the opcodes' order")]
fn sse_two(head: &Head, modrm: ModRm) -> Option<(Vex, Option<Form>)> {
    use Mandatory as P;
    let load = |op, width| form(op, &[Arg::VecReg(width), Arg::VecRm(width)]);
    let store = |op, width| form(op, &[Arg::VecRm(width), Arg::VecReg(width)]);
    let vector = Width::Vector;
    let memory = !modrm.is_register();
    Some(match (head.opcode, head.mandatory) {
        (0x10, P::None | P::P66) => (Vex::Any, load(Op::VecMove, vector)),
        (0x11, P::None | P::P66) => (Vex::Any, store(Op::VecMove, vector)),
        (0x10, P::PF3) if memory => (Vex::Any, load(Op::VecLoad, Width::Dword)),
        (0x10, P::PF2) if memory => (Vex::Any, load(Op::VecLoad, Width::Qword)),
        (0x11, P::PF3) if memory => (Vex::Any, store(Op::VecStore, Width::Dword)),
        (0x11, P::PF2) if memory => (Vex::Any, store(Op::VecStore, Width::Qword)),
        (0x12 | 0x16, P::None | P::P66) => {
            let high = Arg::Constant(head.opcode >> 2 & 1);
            (Vex::L0, insert(head, Width::Oword, Width::Qword, high))
        }
        (0x13, P::None | P::P66) if memory => (Vex::L0, store(Op::VecStore, Width::Qword)),
        (0x17, P::None | P::P66) => (
            Vex::L0,
            extract(Width::Oword, Width::Qword, Arg::Constant(1)),
        ),
        (0xc4, P::P66) => (
            Vex::L0,
            insert(head, Width::Oword, Width::Word, Arg::ImmByte),
        ),
        (0xae, P::None) if modrm.reg() == 2 => {
            (Vex::L0, form(Op::Ldmxcsr, &[Arg::Mem(Width::Dword)]))
        }
        (0xae, P::None) if modrm.reg() == 3 => {
            (Vex::L0, form(Op::Stmxcsr, &[Arg::Mem(Width::Dword)]))
        }
        (0x28, P::None | P::P66) | (0x6f, P::P66) => (Vex::Any, load(Op::VecMoveAligned, vector)),
        (0x29, P::None | P::P66) | (0x7f, P::P66) => (Vex::Any, store(Op::VecMoveAligned, vector)),
        (0x2b, P::None | P::P66) | (0xe7, P::P66) if memory => {
            (Vex::Any, store(Op::VecMoveAligned, vector))
        }
        (0x6e, P::P66) => (
            Vex::L0,
            form(
                Op::VecLoad,
                &[Arg::VecReg(Width::Wide), Arg::Rm(Width::Wide)],
            ),
        ),
        (0x7e, P::P66) => (
            Vex::L0,
            form(
                Op::VecStore,
                &[Arg::Rm(Width::Wide), Arg::VecReg(Width::Wide)],
            ),
        ),
        (0x7e, P::PF3) => (Vex::L0, load(Op::VecLoad, Width::Qword)),
        (0xd6, P::P66) if memory => (Vex::L0, store(Op::VecStore, Width::Qword)),
        (0x6f, P::PF3) => (Vex::Any, load(Op::VecMove, vector)),
        (0x7f, P::PF3) => (Vex::Any, store(Op::VecMove, vector)),
        (0xf0, P::PF2) if memory => (Vex::Any, load(Op::VecMove, vector)),
        (0x6f, P::PF2) if head.evex.is_some() => (Vex::Any, load(Op::VecMove, vector)),
        (0x7f, P::PF2) if head.evex.is_some() => (Vex::Any, store(Op::VecMove, vector)),
        (0xf7, P::P66) if !memory => (
            Vex::L0,
            form(
                Op::VecMaskedBytes,
                &[Arg::AtRdi(vector), Arg::VecReg(vector), Arg::VecRm(vector)],
            ),
        ),
        _ => return None,
    })
}

/// A load of one element; without VEX what is kept is the destination's.
fn insert(head: &Head, to: Width, element: Width, which: Arg) -> Option<Form> {
    let kept = match head.prefixes.vex {
        true => Arg::VecVreg(to),
        false => Arg::VecReg(to),
    };
    let args = [Arg::VecReg(to), kept, Arg::Mem(element), which];
    form(Op::VecInsert, &args)
}

/// A store of one element.
fn extract(from: Width, element: Width, which: Arg) -> Option<Form> {
    form(
        Op::VecExtract,
        &[Arg::Mem(element), Arg::VecReg(from), which],
    )
}

#[inline(never)]
fn vex_three_38(head: &Head, modrm: ModRm) -> Option<(Vex, Option<Form>)> {
    use Mandatory as P;
    let memory = !modrm.is_register();
    let reg = Arg::Reg(Width::Wide);
    let rm = Arg::Rm(Width::Wide);
    let vreg = Arg::Vreg(Width::Wide);
    let w0 = !head.wide;
    let any_w = w0 || head.evex.is_some();
    let broadcast = |width| {
        form(
            Op::VecBroadcast,
            &[Arg::VecReg(Width::Vector), Arg::Mem(width)],
        )
    };
    let masked = |store| {
        let (reg, rm) = (Arg::VecReg(Width::Vector), Arg::VecRm(Width::Vector));
        let chosen = Arg::VecVreg(Width::Vector);
        let args = if store {
            [rm, chosen, reg]
        } else {
            [reg, chosen, rm]
        };
        (Vex::Any, form(Op::VecMasked, &args))
    };
    Some(match (head.opcode, head.mandatory) {
        (0x18 | 0x58, P::P66) if w0 => (Vex::Any, broadcast(Width::Dword)),
        (0x19, P::P66) if any_w => (Vex::L1, broadcast(Width::Qword)),
        (0x59, P::P66) if any_w => (Vex::Any, broadcast(Width::Qword)),
        (0x1a | 0x5a, P::P66) if any_w => (Vex::L1, broadcast(Width::Oword)),
        (0x1b | 0x5b, P::P66) => (Vex::L2, broadcast(Width::Yword)),
        (0x78, P::P66) if w0 => (Vex::Any, broadcast(Width::Byte)),
        (0x79, P::P66) if w0 => (Vex::Any, broadcast(Width::Word)),
        (0x2a, P::P66) if memory => (
            Vex::Any,
            form(
                Op::VecMoveAligned,
                &[Arg::VecReg(Width::Vector), Arg::VecRm(Width::Vector)],
            ),
        ),
        (0x2c | 0x2d, P::P66) if memory && w0 => masked(false),
        (0x2e | 0x2f, P::P66) if memory && w0 => masked(true),
        (0x8c, P::P66) if memory => masked(false),
        (0x8e, P::P66) if memory => masked(true),
        (0xf2, P::None) => (Vex::L0, form(Op::Andn, &[reg, vreg, rm])),
        (0xf3, P::None) => {
            let op = match modrm.reg() {
                1 => Op::Blsr,
                2 => Op::Blsmsk,
                3 => Op::Blsi,
                _ => return None,
            };
            (Vex::L0, form(op, &[vreg, rm]))
        }
        (0xf5, P::None) => (Vex::L0, form(Op::Bzhi, &[reg, rm, vreg])),
        (0xf5, P::PF3) => (Vex::L0, form(Op::Pext, &[reg, vreg, rm])),
        (0xf5, P::PF2) => (Vex::L0, form(Op::Pdep, &[reg, vreg, rm])),
        (0xf6, P::PF2) => (Vex::L0, form(Op::Mulx, &[reg, vreg, rm])),
        (0xf7, P::None) => (Vex::L0, form(Op::Bextr, &[reg, rm, vreg])),
        (0xf7, P::P66) => (Vex::L0, form(Op::Shlx, &[reg, rm, vreg])),
        (0xf7, P::PF3) => (Vex::L0, form(Op::Sarx, &[reg, rm, vreg])),
        (0xf7, P::PF2) => (Vex::L0, form(Op::Shrx, &[reg, rm, vreg])),
        _ => return None,
    })
}

/// Map 0F 3A, with and without VEX.
#[inline(never)]
pub(super) fn three_3a(head: &Head) -> Option<(Vex, Option<Form>)> {
    let (vex, evex) = (head.prefixes.vex, head.evex.is_some());
    let any_w = vex && !head.wide || evex;
    let put = |to, element| insert(head, to, element, Arg::ImmByte);
    let take = |from, element| extract(from, element, Arg::ImmByte);
    let (xmm, vector) = (Width::Oword, Width::Vector);
    Some(match (head.opcode, head.mandatory) {
        (0x14, Mandatory::P66) => (Vex::L0, take(xmm, Width::Byte)),
        (0x15, Mandatory::P66) => (Vex::L0, take(xmm, Width::Word)),
        (0x16, Mandatory::P66) => (Vex::L0, take(xmm, Width::Wide)),
        (0x17, Mandatory::P66) => (Vex::L0, take(xmm, Width::Dword)),
        (0x20, Mandatory::P66) => (Vex::L0, put(xmm, Width::Byte)),
        (0x22, Mandatory::P66) => (Vex::L0, put(xmm, Width::Wide)),
        (0x18 | 0x38, Mandatory::P66) if any_w => (Vex::L1, put(vector, Width::Oword)),
        (0x19 | 0x39, Mandatory::P66) if any_w => (Vex::L1, take(vector, Width::Oword)),
        (0x1a | 0x3a, Mandatory::P66) if evex => (Vex::L2, put(vector, Width::Yword)),
        (0x1b | 0x3b, Mandatory::P66) if evex => (Vex::L2, take(vector, Width::Yword)),
        (0xf0, Mandatory::PF2) if vex => (
            Vex::L0,
            form(
                Op::Rorx,
                &[Arg::Reg(Width::Wide), Arg::Rm(Width::Wide), Arg::ImmByte],
            ),
        ),
        _ => return None,
    })
}
