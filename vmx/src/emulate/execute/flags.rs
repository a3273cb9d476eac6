//! The status flags and the arithmetic that sets them. SDM 1 3.4.3.1 "Status
//! Flags", appendix A "EFLAGS Cross-Reference", appendix B "EFLAGS Condition
//! Codes".

pub(in crate::emulate) const CF: u64 = 1 << 0;
pub(super) const PF: u64 = 1 << 2;
pub(super) const AF: u64 = 1 << 4;
pub(super) const ZF: u64 = 1 << 6;
pub(super) const SF: u64 = 1 << 7;
pub(super) const DF: u64 = 1 << 10;
pub(super) const OF: u64 = 1 << 11;
/// All six.
pub(super) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// `flag` if `on`.
pub(super) const fn when(on: bool, flag: u64) -> u64 {
    if on { flag } else { 0 }
}

/// Ones in the low `size` bytes.
pub(super) const fn mask(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// The sign bit of a `size`-byte number.
pub(super) const fn sign(size: u8) -> u64 {
    mask(size) ^ (mask(size) >> 1)
}

/// Sign-extends the low `size` bytes to 64 bits.
pub(super) const fn extend(value: u64, size: u8) -> u64 {
    match size {
        1 => value as u8 as i8 as u64,
        2 => value as u16 as i16 as u64,
        4 => value as u32 as i32 as u64,
        _ => value,
    }
}

/// ZF, SF and PF of a result.
pub(super) const fn of_result(value: u64, size: u8) -> u64 {
    let value = value & mask(size);
    when(value == 0, ZF)
        | when(value & sign(size) != 0, SF)
        | when((value as u8).count_ones() & 1 == 0, PF)
}

/// `a + b + carry`: the sum and all status flags.
pub(super) const fn add(a: u64, b: u64, carry: bool, size: u8) -> (u64, u64) {
    let (a, b) = (a & mask(size), b & mask(size));
    let sum = a.wrapping_add(b).wrapping_add(carry as u64) & mask(size);
    let carries = a & b | (a | b) & !sum;
    let overflows = (a ^ sum) & (b ^ sum);
    let flags = of_result(sum, size)
        | when(carries & sign(size) != 0, CF)
        | when(overflows & sign(size) != 0, OF)
        | (a ^ b ^ sum) & AF;
    (sum, flags)
}

/// `a - b - borrow`: the difference and all status flags.
pub(super) const fn sub(a: u64, b: u64, borrow: bool, size: u8) -> (u64, u64) {
    let (a, b) = (a & mask(size), b & mask(size));
    let difference = a.wrapping_sub(b).wrapping_sub(borrow as u64) & mask(size);
    let borrows = !a & b | (!a | b) & difference;
    let overflows = (a ^ b) & (a ^ difference);
    let flags = of_result(difference, size)
        | when(borrows & sign(size) != 0, CF)
        | when(overflows & sign(size) != 0, OF)
        | (a ^ b ^ difference) & AF;
    (difference, flags)
}

/// Does condition `code` (the low four bits of Jcc, SETcc, CMOVcc) hold?
pub(super) const fn condition(code: u8, flags: u64) -> bool {
    let less = (flags & SF != 0) != (flags & OF != 0);
    let holds = match code >> 1 & 7 {
        0 => flags & OF != 0,
        1 => flags & CF != 0,
        2 => flags & ZF != 0,
        3 => flags & (CF | ZF) != 0,
        4 => flags & SF != 0,
        5 => flags & PF != 0,
        6 => less,
        _ => less || flags & ZF != 0,
    };
    holds != (code & 1 != 0)
}
