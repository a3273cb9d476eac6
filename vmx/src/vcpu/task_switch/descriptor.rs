//! Segment descriptors, and the rules by which a task switch loads them: SDM
//! 3.4.5 "Segment Descriptors", 8.3 "Task Switching", table 8-1 "Exception
//! Conditions Checked During a Task Switch".

use abi::vcpu_state::SegmentDesc;

use crate::arch::event::vector;
use crate::arch::segment::{AccessRights, SegmentRegister};

/// A descriptor as memory has it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Descriptor(pub u64);

/// Bit 41 of a TSS descriptor: busy.
pub const BUSY: u8 = 2;

impl Descriptor {
    /// Byte 5: type, S, DPL, P.
    pub const fn byte_5(self) -> u8 {
        (self.0 >> 40) as u8
    }

    /// As the VMCS has access rights.
    pub const fn rights(self) -> AccessRights {
        AccessRights::from_bits_retain((self.0 >> 40) as u32 & 0xf0ff)
    }

    pub const fn base(self) -> u64 {
        (self.0 >> 16 & 0xff_ffff) | (self.0 >> 32 & 0xff00_0000)
    }

    /// In bytes.
    pub const fn limit(self) -> u32 {
        let raw = (self.0 as u32 & 0xffff) | ((self.0 >> 32) as u32 & 0xf_0000);
        if self.rights().contains(AccessRights::GRANULARITY) {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }

    /// The register that holds it.
    pub fn register(self, selector: u16) -> SegmentDesc {
        SegmentDesc {
            selector,
            base: self.base(),
            limit: self.limit(),
            ar: self.rights().bits(),
            ..SegmentDesc::default()
        }
    }

    /// The vector of the fault of loading this into `register` in a task whose
    /// CS has RPL `cpl`; `None`: it fits.
    pub fn refusal(self, register: SegmentRegister, selector: u16, cpl: u8) -> Option<u8> {
        let rights = self.rights();
        let kind = rights.kind();
        let rpl = (selector & 3) as u8;
        let dpl = rights.dpl();
        let is_code = kind & 8 != 0;
        let conforming = kind & 0xc == 0xc;
        let writable = kind & 0xa == 2;
        let readable = !is_code || kind & 2 != 0;
        let present = rights.contains(AccessRights::PRESENT);
        let memory = rights.contains(AccessRights::NON_SYSTEM);
        let (fits, missing) = match register {
            SegmentRegister::Ldtr => (!memory && kind == 2, vector::TS),
            SegmentRegister::Cs => {
                let level = if conforming { dpl <= rpl } else { dpl == rpl };
                (memory && is_code && level, vector::NP)
            }
            SegmentRegister::Ss => (memory && writable && dpl == cpl && rpl == cpl, vector::SS),
            _ => {
                let level = conforming || (dpl >= cpl && dpl >= rpl);
                (memory && readable && level, vector::NP)
            }
        };
        if !fits {
            Some(vector::TS)
        } else if !present {
            Some(missing)
        } else {
            None
        }
    }
}

/// A register of virtual-8086 mode: SDM 21.1.1 "Registers Supported".
pub fn virtual_8086(selector: u16) -> SegmentDesc {
    SegmentDesc {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        ar: 0xf3,
        ..SegmentDesc::default()
    }
}

/// A register that holds nothing usable. `level`: of SS, where the CPL is kept.
pub fn unusable(selector: u16, level: u8) -> SegmentDesc {
    SegmentDesc {
        selector,
        ar: AccessRights::UNUSABLE.bits() | u32::from(level) << 5,
        ..SegmentDesc::default()
    }
}

/// Where a push of `size` bytes goes: the new ESP, and the offset if it lies
/// within the segment (SDM 6.2.3, 5.3 "Limit Checking").
pub fn push(ss: &SegmentDesc, esp: u32, size: u32) -> (u32, Option<u64>) {
    let rights = AccessRights::from_bits_retain(ss.ar);
    let big = rights.contains(AccessRights::DB);
    let mask = if big { u32::MAX } else { 0xffff };
    let offset = esp.wrapping_sub(size) & mask;
    let last = offset.wrapping_add(size.wrapping_sub(1));
    let fits = if rights.contains(AccessRights::UNUSABLE) {
        false
    } else if rights.contains(AccessRights::DOWN_CONFORMING) {
        offset > ss.limit && last >= offset && last <= mask
    } else {
        last >= offset && last <= ss.limit
    };
    let esp = (esp & !mask) | offset;
    (esp, fits.then_some(offset.into()))
}
