//! The data of a VMCS, and which fields a processor has.
//!
//! SDM 25.11.2 "VMREAD, VMWRITE, and Encodings of VMCS Fields", appendix B
//! "Field Encoding in VMCS". Which field exists follows from the capability
//! registers, as appendix B notes field by field.

use std::collections::HashMap;

use crate::profile::Profile;

/// When a field exists.
#[derive(Clone, Copy)]
enum Need {
    Always,
    Pin(u32),
    Primary(u32),
    Secondary(u32),
    /// Any of an entry control and an exit control.
    Either(u32, u32),
    Exit(u32),
}

/// First encoding, last encoding, condition. All encodings step by two.
const FIELDS: &[(u32, u32, Need)] = &[
    (0x0000, 0x0000, Need::Secondary(5)),
    (0x0002, 0x0002, Need::Pin(7)),
    (0x0004, 0x0004, Need::Secondary(18)),
    (0x0800, 0x080e, Need::Always),
    (0x0810, 0x0810, Need::Secondary(9)),
    (0x0812, 0x0812, Need::Secondary(17)),
    (0x0c00, 0x0c0c, Need::Always),
    (0x2000, 0x2002, Need::Always),
    (0x2004, 0x2004, Need::Primary(28)),
    (0x2006, 0x200c, Need::Always),
    (0x200e, 0x200e, Need::Secondary(17)),
    (0x2010, 0x2010, Need::Always),
    (0x2012, 0x2012, Need::Primary(21)),
    (0x2014, 0x2014, Need::Secondary(0)),
    (0x2016, 0x2016, Need::Pin(7)),
    (0x2018, 0x2018, Need::Secondary(13)),
    (0x201a, 0x201a, Need::Secondary(1)),
    (0x201c, 0x2022, Need::Secondary(9)),
    (0x2024, 0x2024, Need::Secondary(13)),
    (0x2026, 0x2028, Need::Secondary(14)),
    (0x202a, 0x202a, Need::Secondary(18)),
    (0x202c, 0x202c, Need::Secondary(20)),
    (0x202e, 0x202e, Need::Secondary(15)),
    (0x2032, 0x2032, Need::Secondary(25)),
    (0x2400, 0x2400, Need::Secondary(1)),
    (0x2800, 0x2802, Need::Always),
    (0x2804, 0x2804, Need::Either(14, 18)),
    (0x2806, 0x2806, Need::Either(15, 20)),
    (0x2808, 0x2808, Need::Either(13, 30)),
    (0x280a, 0x2810, Need::Secondary(1)),
    (0x2812, 0x2812, Need::Either(16, 23)),
    (0x2c00, 0x2c00, Need::Exit(19)),
    (0x2c02, 0x2c02, Need::Exit(21)),
    (0x2c04, 0x2c04, Need::Exit(12)),
    (0x4000, 0x401a, Need::Always),
    (0x401c, 0x401c, Need::Primary(21)),
    (0x401e, 0x401e, Need::Primary(31)),
    (0x4020, 0x4022, Need::Secondary(10)),
    (0x4400, 0x440e, Need::Always),
    (0x4800, 0x482a, Need::Always),
    (0x482e, 0x482e, Need::Pin(6)),
    (0x4c00, 0x4c00, Need::Always),
    (0x6000, 0x600e, Need::Always),
    (0x6400, 0x640a, Need::Always),
    (0x6800, 0x6826, Need::Always),
    (0x6c00, 0x6c16, Need::Always),
];

/// Whether VMREAD knows the encoding.
pub(crate) fn supported(profile: &Profile, encoding: u32) -> bool {
    // The "high" access type exists for 64-bit fields only.
    let high = encoding & 1 != 0;
    if high && encoding >> 13 & 3 != 1 {
        return false;
    }
    let field = encoding & !1;
    FIELDS
        .iter()
        .filter(|(first, last, _)| (*first..=*last).contains(&field))
        .any(|(_, _, need)| match *need {
            Need::Always => true,
            Need::Pin(bit) => profile.allows_pin(bit),
            Need::Primary(bit) => profile.allows_primary(bit),
            Need::Secondary(bit) => profile.allows_secondary(bit),
            Need::Either(entry, exit) => profile.allows_entry(entry) || profile.allows_exit(exit),
            Need::Exit(bit) => profile.allows_exit(bit),
        })
}

/// Whether the field is VM-exit information, which VMWRITE may refuse.
pub(crate) fn read_only(encoding: u32) -> bool {
    encoding >> 10 & 3 == 1
}

/// What a VMCS region stands for. The data is not in the region: the layout
/// is the processor's own, so nothing may depend on it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vmcs {
    values: HashMap<u32, u64>,
    /// Launch state: launched, or clear.
    pub(crate) launched: bool,
    /// The processor on which it is active.
    pub(crate) active_on: Option<usize>,
    /// It belongs to another hypervisor on the same machine.
    pub(crate) foreign: bool,
}

impl Vmcs {
    /// A field by its encoding; 0 if never written.
    pub(crate) fn get(&self, encoding: u32) -> u64 {
        let whole = self.values.get(&(encoding & !1)).copied().unwrap_or(0);
        if encoding & 1 != 0 {
            whole >> 32
        } else {
            whole
        }
    }

    /// Writes a field, cut to its width.
    pub(crate) fn set(&mut self, encoding: u32, value: u64) {
        let slot = self.values.entry(encoding & !1).or_insert(0);
        *slot = match (encoding >> 13 & 3, encoding & 1) {
            (0, _) => value & 0xffff,
            (2, _) => value & 0xffff_ffff,
            (1, 1) => (*slot & 0xffff_ffff) | (value << 32),
            _ => value,
        };
    }

    /// Changes some bits of a field.
    pub(crate) fn update(&mut self, encoding: u32, f: impl FnOnce(u64) -> u64) {
        let value = f(self.get(encoding));
        self.set(encoding, value);
    }
}
