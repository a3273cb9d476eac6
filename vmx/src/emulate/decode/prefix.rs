//! The first stage of decoding: legacy prefixes, REX, VEX and EVEX, up to the
//! opcode.
//!
//! SDM 2A 2.1.1 "Instruction Prefixes", 2.2.1 "REX Prefixes", 2.3 "Intel
//! Advanced Vector Extensions (Intel AVX)", 2.7 "Intel AVX-512 Encoding".

use super::{Cursor, DecodeError};
use crate::emulate::insn::{Prefixes, Repeat};
use crate::emulate::machine::{Mode, Seg};

/// The opcode tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Map {
    /// One-byte opcodes.
    One,
    /// 0F.
    Two,
    /// 0F 38.
    Three38,
    /// 0F 3A.
    Three3A,
}

/// A prefix that is part of the opcode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mandatory {
    None,
    P66,
    PF3,
    PF2,
}

/// Everything before ModRM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) prefixes: Prefixes,
    pub(super) map: Map,
    pub(super) opcode: u8,
    pub(super) mandatory: Mandatory,
    /// REX.W or VEX.W.
    pub(super) wide: bool,
    /// REX.R, REX.X, REX.B (or VEX's), each 0 or 8; EVEX.R' adds 16.
    pub(super) reg_high: u8,
    pub(super) index_high: u8,
    pub(super) base_high: u8,
    /// VEX.vvvv, un-inverted; 0 without VEX. EVEX.V' is bit 4.
    pub(super) vvvv: u8,
    /// Bytes of a vector: 16; by VEX.L 32, by EVEX.L'L 64.
    pub(super) vector_bytes: u8,
    /// The rest of an EVEX prefix.
    pub(super) evex: Option<Evex>,
}

/// What EVEX has that VEX has not: EVEX.z, EVEX.b and EVEX.aaa.
#[derive(Clone, Copy, Debug)]
pub(super) struct Evex {
    pub(super) zeroing: bool,
    pub(super) broadcast: bool,
    pub(super) opmask: u8,
}

impl Head {
    /// With EVEX the X bit is bit 4 of a vector register in ModRM.rm.
    pub(super) fn vector_rm_high(&self) -> u8 {
        match self.evex {
            Some(_) => self.index_high << 1,
            None => 0,
        }
    }
}

/// Reads prefixes and opcode.
#[inline(never)]
pub(super) fn parse(cursor: &mut Cursor<'_>, mode: Mode) -> Result<Head, DecodeError> {
    let mut prefixes = Prefixes {
        lock: false,
        repeat: Repeat::No,
        operand_size: false,
        address_size: false,
        segment: None,
        rex: 0,
        vex: false,
        evex: false,
    };
    let long = mode == Mode::Bits64;
    let first = loop {
        let byte = cursor.byte()?;
        match byte {
            0xf0 => prefixes.lock = true,
            0xf2 => prefixes.repeat = Repeat::NotEqual,
            0xf3 => prefixes.repeat = Repeat::Equal,
            0x66 => prefixes.operand_size = true,
            0x67 => prefixes.address_size = true,
            // In 64-bit mode these four are accepted and ignored (SDM 1 3.4.2.1
            // "Segment Registers in 64-Bit Mode").
            0x26 | 0x2e | 0x36 | 0x3e => {
                if !long {
                    prefixes.segment = Seg::from_bits(byte >> 3 & 3);
                }
            }
            0x64 => prefixes.segment = Some(Seg::Fs),
            0x65 => prefixes.segment = Some(Seg::Gs),
            // A REX that another prefix follows has no effect.
            0x40..=0x4f if long => {
                prefixes.rex = byte;
                continue;
            }
            _ => break byte,
        }
        prefixes.rex = 0;
    };
    match first {
        // LES and LDS share these with VEX: outside 64-bit mode a VEX prefix has
        // the two bits set that would make ModRM name a register.
        // BOUND and EVEX likewise.
        0xc4 | 0xc5 if long || cursor.peek()? >= 0xc0 => parse_vex(cursor, mode, prefixes, first),
        0x62 if long || cursor.peek()? >= 0xc0 => parse_evex(cursor, mode, prefixes),
        _ => parse_legacy(cursor, prefixes, first),
    }
}

fn parse_legacy(
    cursor: &mut Cursor<'_>,
    prefixes: Prefixes,
    first: u8,
) -> Result<Head, DecodeError> {
    let (map, opcode) = if first == 0x0f {
        match cursor.byte()? {
            0x38 => (Map::Three38, cursor.byte()?),
            0x3a => (Map::Three3A, cursor.byte()?),
            opcode => (Map::Two, opcode),
        }
    } else {
        (Map::One, first)
    };
    let mandatory = match prefixes.repeat {
        Repeat::Equal => Mandatory::PF3,
        Repeat::NotEqual => Mandatory::PF2,
        Repeat::No if prefixes.operand_size => Mandatory::P66,
        Repeat::No => Mandatory::None,
    };
    let rex = prefixes.rex;
    Ok(Head {
        prefixes,
        map,
        opcode,
        mandatory,
        wide: rex & 8 != 0,
        reg_high: rex << 1 & 8,
        index_high: rex << 2 & 8,
        base_high: rex << 3 & 8,
        vvvv: 0,
        vector_bytes: 16,
        evex: None,
    })
}

#[inline(never)]
fn parse_vex(
    cursor: &mut Cursor<'_>,
    mode: Mode,
    mut prefixes: Prefixes,
    first: u8,
) -> Result<Head, DecodeError> {
    // SDM 2A 2.3.2 "VEX and the LOCK prefix", 2.3.3 "VEX and the 66H, F2H, and
    // F3H prefixes", 2.3.4 "VEX and the REX prefix": #UD.
    refuse_legacy(&prefixes)?;
    let (first_payload, last_payload, map) = if first == 0xc5 {
        let byte = cursor.byte()?;
        // One payload byte: X and B read as if set, W as if clear.
        (byte | 0x60, byte & 0x7f, Map::Two)
    } else {
        let byte = cursor.byte()?;
        let map = vector_map(byte & 0x1f)?;
        (byte, cursor.byte()?, map)
    };
    prefixes.vex = true;
    let long = mode == Mode::Bits64;
    let high = |bit: u8| {
        if long && first_payload & bit == 0 {
            8
        } else {
            0
        }
    };
    Ok(Head {
        prefixes,
        map,
        opcode: cursor.byte()?,
        mandatory: mandatory(last_payload),
        wide: last_payload & 0x80 != 0,
        reg_high: high(0x80),
        index_high: high(0x40),
        base_high: high(0x20),
        vvvv: !(last_payload >> 3) & 15,
        vector_bytes: if last_payload & 4 != 0 { 32 } else { 16 },
        evex: None,
    })
}

#[inline(never)]
fn parse_evex(
    cursor: &mut Cursor<'_>,
    mode: Mode,
    mut prefixes: Prefixes,
) -> Result<Head, DecodeError> {
    refuse_legacy(&prefixes)?;
    let (p0, p1, p2) = (cursor.byte()?, cursor.byte()?, cursor.byte()?);
    // SDM 2A 2.7.11.1 "State Dependent #UD", 2.7.1: fixed bits, and no length of
    // 1024 bits.
    let length = p2 >> 5 & 3;
    if p0 & 8 != 0 || p1 & 4 == 0 || length == 3 {
        return Err(DecodeError::Unsupported);
    }
    let map = vector_map(p0 & 7)?;
    prefixes.vex = true;
    prefixes.evex = true;
    let long = mode == Mode::Bits64;
    // The bits are inverted; outside 64-bit mode they mean nothing.
    let high = |byte: u8, bit: u8, value: u8| {
        if long && byte & bit == 0 { value } else { 0 }
    };
    if !long && p2 & 8 == 0 {
        return Err(DecodeError::Unsupported);
    }
    Ok(Head {
        prefixes,
        map,
        opcode: cursor.byte()?,
        mandatory: mandatory(p1),
        wide: p1 & 0x80 != 0,
        reg_high: high(p0, 0x80, 8) | high(p0, 0x10, 16),
        index_high: high(p0, 0x40, 8),
        base_high: high(p0, 0x20, 8),
        vvvv: !(p1 >> 3) & 15 | high(p2, 8, 16),
        vector_bytes: 16u8.wrapping_shl(length.into()),
        evex: Some(Evex {
            zeroing: p2 & 0x80 != 0,
            broadcast: p2 & 0x10 != 0,
            opmask: p2 & 7,
        }),
    })
}

fn refuse_legacy(prefixes: &Prefixes) -> Result<(), DecodeError> {
    let any = prefixes.lock
        || prefixes.operand_size
        || prefixes.repeat != Repeat::No
        || prefixes.rex != 0;
    if any {
        return Err(DecodeError::Unsupported);
    }
    Ok(())
}

fn vector_map(bits: u8) -> Result<Map, DecodeError> {
    Ok(match bits {
        1 => Map::Two,
        2 => Map::Three38,
        3 => Map::Three3A,
        _ => return Err(DecodeError::Unsupported),
    })
}

fn mandatory(bits: u8) -> Mandatory {
    match bits & 3 {
        0 => Mandatory::None,
        1 => Mandatory::P66,
        2 => Mandatory::PF3,
        _ => Mandatory::PF2,
    }
}
