//! Which RDMSR and WRMSR of the guest exit: the MSR bitmap as a function of
//! the byte's place, so that nobody needs a reference to the page that the
//! processor reads.
//!
//! SDM 25.6.9 "MSR-Bitmap Address": four maps of 1 KB, a set bit makes the
//! access exit. MSRs outside both ranges always exit.

use crate::arch::msr;

/// Bytes of the bitmap.
pub const MSR_BITMAP_SIZE: usize = 4096;

/// Bytes of one of the four maps.
const MAP_SIZE: u32 = 1024;
/// MSRs of one map.
const MAP_MSRS: u32 = MAP_SIZE * 8;
/// First MSR of the maps for high MSRs.
const HIGH_BASE: u32 = 0xc000_0000;
/// Where the four maps begin, in bytes.
const READ_LOW: u32 = 0;
const READ_HIGH: u32 = 1024;
const WRITE_LOW: u32 = 2048;
const WRITE_HIGH: u32 = 3072;

/// The guest reads and writes these without an exit. They are the guest's own
/// while it runs: the VMCS holds the bases and SYSENTER's (SDM 25.4.1 "Guest
/// Register State"), `SwitchedMsrs` puts KERNEL_GS_BASE in. The processor
/// checks what is written.
const READ_AND_WRITE: [u32; 6] = [
    msr::IA32_FS_BASE,
    msr::IA32_GS_BASE,
    msr::IA32_KERNEL_GSBASE,
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
];

/// The guest reads these without an exit. SDM 26.3 "Changes to Instruction
/// Behavior in VMX Non-root Operation": the TSC offset applies to RDMSR too.
const READ_ONLY: [u32; 1] = [msr::IA32_TSC];

/// Byte and bit of `register` in the pair of maps at `low` and `high`.
const fn place(register: u32, low: u32, high: u32) -> Option<(u32, u8)> {
    let (map, index) = if register < MAP_MSRS {
        (low, register)
    } else {
        (high, register.wrapping_sub(HIGH_BASE))
    };
    if index >= MAP_MSRS {
        return None;
    }
    let bit = 1u8.wrapping_shl(index & 7);
    Some((map.wrapping_add(index >> 3), bit))
}

/// Byte and bit that make a read or a write of `register` exit; `None` for one
/// that always exits.
#[must_use]
pub fn place_of(register: u32, write: bool) -> Option<(u16, u8)> {
    let (low, high) = if write {
        (WRITE_LOW, WRITE_HIGH)
    } else {
        (READ_LOW, READ_HIGH)
    };
    let (byte, bit) = place(register, low, high)?;
    Some((u16::try_from(byte).ok()?, bit))
}

/// What the guest of a new vCPU does without an exit: registers, and whether
/// they are written. All other bits of the bitmap are set.
pub fn passed() -> impl Iterator<Item = (u32, bool)> {
    let read = READ_AND_WRITE.into_iter().chain(READ_ONLY);
    let written = READ_AND_WRITE.into_iter();
    read.map(|register| (register, false))
        .chain(written.map(|register| (register, true)))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::{
        MSR_BITMAP_SIZE, READ_HIGH, READ_LOW, WRITE_HIGH, WRITE_LOW, passed, place, place_of,
    };
    use std::vec::Vec;

    /// The processor's rule, written from the manual, not from `place`.
    fn exits(bitmap: &[u8], register: u32, write: bool) -> bool {
        let map = match register {
            0..=0x1fff => 0,
            0xc000_0000..=0xc000_1fff => 1024,
            _ => return true,
        } + if write { 2048 } else { 0 };
        let index = (register & 0x1fff) as usize;
        bitmap[map + index / 8] & (1 << (index % 8)) != 0
    }

    #[test]
    fn exactly_the_listed_registers_pass() {
        let mut bitmap = [0xff_u8; MSR_BITMAP_SIZE];
        for (register, write) in passed() {
            let (byte, bit) = place_of(register, write).unwrap();
            bitmap[usize::from(byte)] &= !bit;
        }
        let mut reads = Vec::new();
        let mut writes = Vec::new();
        for register in (0..=0x2000).chain(0xbfff_ffff..=0xc000_2000) {
            if !exits(&bitmap, register, false) {
                reads.push(register);
            }
            if !exits(&bitmap, register, true) {
                writes.push(register);
            }
        }
        let both = [0x174, 0x175, 0x176, 0xc000_0100, 0xc000_0101, 0xc000_0102];
        assert_eq!(writes, both);
        assert_eq!(reads[0], 0x10);
        assert_eq!(reads[1..], both);
    }

    #[test]
    fn first_and_last_register_of_each_map() {
        let at = |register, write| {
            let (low, high) = if write {
                (WRITE_LOW, WRITE_HIGH)
            } else {
                (READ_LOW, READ_HIGH)
            };
            place(register, low, high)
        };
        assert_eq!(at(0, false), Some((0, 1)));
        assert_eq!(at(0x1fff, false), Some((1023, 0x80)));
        assert_eq!(at(0xc000_0000, false), Some((1024, 1)));
        assert_eq!(at(0xc000_1fff, false), Some((2047, 0x80)));
        assert_eq!(at(0, true), Some((2048, 1)));
        assert_eq!(at(0x1fff, true), Some((3071, 0x80)));
        assert_eq!(at(0xc000_0000, true), Some((3072, 1)));
        assert_eq!(at(0xc000_1fff, true), Some((4095, 0x80)));
        for outside in [0x2000, 0xbfff_ffff, 0xc000_2000, 0x4000_0000, 0xffff_ffff] {
            assert_eq!(at(outside, false), None);
        }
    }
}
