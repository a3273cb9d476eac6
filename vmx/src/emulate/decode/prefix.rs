//! The first stage of decoding: legacy prefixes, REX and VEX, up to the opcode.
//!
//! SDM 2A 2.1.1 "Instruction Prefixes", 2.2.1 "REX Prefixes", 2.3 "Intel
//! Advanced Vector Extensions (Intel AVX)".

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
    /// REX.R, REX.X, REX.B (or VEX's), each 0 or 8.
    pub(super) reg_high: u8,
    pub(super) index_high: u8,
    pub(super) base_high: u8,
    /// VEX.vvvv, un-inverted; 0 without VEX.
    pub(super) vvvv: u8,
    /// VEX.L.
    pub(super) vex_256: bool,
}

/// Reads prefixes and opcode.
pub(super) fn parse(cursor: &mut Cursor<'_>, mode: Mode) -> Result<Head, DecodeError> {
    let mut prefixes = Prefixes {
        lock: false,
        repeat: Repeat::No,
        operand_size: false,
        address_size: false,
        segment: None,
        rex: 0,
        vex: false,
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
        0xc4 | 0xc5 if long || cursor.peek()? >= 0xc0 => parse_vex(cursor, mode, prefixes, first),
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
        vex_256: false,
    })
}

fn parse_vex(
    cursor: &mut Cursor<'_>,
    mode: Mode,
    mut prefixes: Prefixes,
    first: u8,
) -> Result<Head, DecodeError> {
    // SDM 2A 2.3.2 "VEX and the LOCK prefix", 2.3.3 "VEX and the 66H, F2H, and
    // F3H prefixes", 2.3.4 "VEX and the REX prefix": #UD.
    if prefixes.lock || prefixes.operand_size || prefixes.repeat != Repeat::No || prefixes.rex != 0
    {
        return Err(DecodeError::Unsupported);
    }
    let (first_payload, last_payload, map) = if first == 0xc5 {
        let byte = cursor.byte()?;
        // One payload byte: X and B read as if set, W as if clear.
        (byte | 0x60, byte & 0x7f, Map::Two)
    } else {
        let byte = cursor.byte()?;
        let map = match byte & 0x1f {
            1 => Map::Two,
            2 => Map::Three38,
            3 => Map::Three3A,
            _ => return Err(DecodeError::Unsupported),
        };
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
        mandatory: match last_payload & 3 {
            0 => Mandatory::None,
            1 => Mandatory::P66,
            2 => Mandatory::PF3,
            _ => Mandatory::PF2,
        },
        wide: last_payload & 0x80 != 0,
        reg_high: high(0x80),
        index_high: high(0x40),
        base_high: high(0x20),
        vvvv: !(last_payload >> 3) & 15,
        vex_256: last_payload & 4 != 0,
    })
}
