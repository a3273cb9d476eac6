//! Every register of the list, every value that must not get through.

extern crate std;

use super::{GpFault, Msr, MsrStore, accept, canonical, classify, valid_efer, valid_pat};
use crate::arch::control::Secondary;
use crate::arch::reg::{Cr0, Cr4, Xcr0};
use crate::cpu::CpuidResult;
use crate::vcpu::cpuid::{CpuidTable, Features};
use std::vec::Vec;

fn features_of(secondary: Secondary) -> Features {
    let host = |leaf, _| CpuidResult {
        eax: match leaf {
            0 => 0xd,
            0x8000_0000 | 0x8000_0008 => 0x8000_0008,
            _ => 0,
        },
        ebx: !0,
        ecx: !0,
        edx: !0,
    };
    CpuidTable::build(host, Xcr0::empty(), secondary, Cr4::all(), 39).features()
}

fn features() -> Features {
    features_of(Secondary::all())
}

#[test]
fn every_register_has_one_home() {
    let features = features();
    let store = MsrStore::new(true);
    let mut stored = Vec::new();
    for register in (0..0x2000)
        .chain(0x4000_0000..0x4000_0200)
        .chain(0xc000_0000..0xc001_2000)
    {
        if register == 0xda0 {
            // IA32_XSS: only with XSAVES, which these features have not.
            assert_eq!(classify(register, &features), Msr::Unknown);
            continue;
        }
        let home = classify(register, &features);
        let mut copy = store;
        let here = matches!(home, Msr::Stored | Msr::ApicBase | Msr::Pat);
        let value = store.read(register);
        if register != 0x79 {
            assert_eq!(value.is_ok(), here, "{register:#x}");
        }
        let written = copy.write(register, value.unwrap_or(0), &features, true);
        assert!(here || written == Err(GpFault), "{register:#x}");
        if here {
            stored.push(register);
        }
    }
    let expected: Vec<u32> = [
        0..=1,
        0x17..=0x17,
        0x1b..=0x1b,
        0x2a..=0x2c,
        0x34..=0x35,
        0x3a..=0x3a,
    ]
    .into_iter()
    .chain([
        0x3f..=0x3f,
        0x79..=0x79,
        0x8b..=0x8b,
        0xc1..=0xc4,
        0xcd..=0xcd,
    ])
    .chain([
        0xce..=0xce,
        0xee..=0xee,
        0xfe..=0xfe,
        0x11e..=0x11e,
        0x140..=0x140,
    ])
    .chain([0x179..=0x17b, 0x186..=0x189, 0x198..=0x199, 0x1a0..=0x1a0])
    .chain([0x1ad..=0x1ad, 0x1d9..=0x1d9, 0x1db..=0x1de, 0x1fc..=0x1fc])
    .chain([0x200..=0x213])
    .chain([0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x277..=0x277])
    .chain([0x280..=0x288, 0x2ff..=0x403, 0x478..=0x478, 0x606..=0x606])
    .chain([0x611..=0x611, 0x619..=0x619, 0x639..=0x639, 0x641..=0x641])
    .flatten()
    .collect();
    assert_eq!(stored, expected);
}

#[test]
fn homes_outside_the_store() {
    let features = features();
    for (register, home) in [
        (0x10, Msr::Tsc),
        (0x3b, Msr::TscAdjust),
        (0x1b, Msr::ApicBase),
        (0x174, Msr::SysenterCs),
        (0x175, Msr::SysenterEsp),
        (0x176, Msr::SysenterEip),
        (0x277, Msr::Pat),
        (0xc000_0080, Msr::Efer),
        (0xc000_0081, Msr::Switched),
        (0xc000_0082, Msr::Switched),
        (0xc000_0083, Msr::Switched),
        (0xc000_0084, Msr::Switched),
        (0xc000_0100, Msr::FsBase),
        (0xc000_0101, Msr::GsBase),
        (0xc000_0102, Msr::Switched),
        (0xc000_0103, Msr::Switched),
        (0x48, Msr::SpecCtrl),
        (0x49, Msr::Command),
        (0x10a, Msr::ArchCapabilities),
        (0x10b, Msr::Command),
        // TSX_CTRL, TSC_DEADLINE, x2APIC, Hyper-V's and KVM's.
        (0x122, Msr::Unknown),
        (0x6e0, Msr::Unknown),
        (0x802, Msr::Unknown),
        (0x4000_0000, Msr::Unknown),
        (0x4b56_4d00, Msr::Unknown),
    ] {
        assert_eq!(classify(register, &features), home, "{register:#x}");
    }
    let without = features_of(Secondary::empty());
    assert_eq!(classify(0xc000_0103, &without), Msr::Unknown);
    assert_eq!(accept(0xc000_0103, 0, &without), Err(GpFault));
}

#[test]
fn values_that_would_fault_on_the_host_are_refused() {
    let features = features();
    let high = 0x8000_0000_0000u64;
    for register in [
        0x175,
        0x176,
        0xc000_0082,
        0xc000_0083,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
    ] {
        assert_eq!(
            accept(register, high, &features),
            Err(GpFault),
            "{register:#x}"
        );
        assert_eq!(accept(register, high - 1, &features), Ok(high - 1));
        assert_eq!(accept(register, !0, &features), Ok(!0));
    }
    for register in [0xc000_0084, 0xc000_0103] {
        assert_eq!(accept(register, 1 << 32, &features), Err(GpFault));
        assert_eq!(accept(register, 0xffff_ffff, &features), Ok(0xffff_ffff));
    }
    assert_eq!(accept(0xc000_0081, !0, &features), Ok(!0));
    assert_eq!(accept(0x174, 0x1_0000_0010, &features), Ok(0x10));
    assert_eq!(accept(0x48, 0, &features), Err(GpFault));
    assert!(canonical(0xffff_8000_0000_0000) && !canonical(0xffff_0000_0000_0000));
    assert!(canonical(0x7fff_ffff_ffff) && !canonical(0x8000_0000_0000));
}

#[test]
fn efer_keeps_lma_to_itself() {
    let features = features();
    let pg = Cr0::PG.bits();
    let check = |old, new, cr0, by_guest| valid_efer(old, new, cr0, &features, by_guest);
    assert_eq!(check(0, 0x101, 0, true), Ok(0x101));
    assert_eq!(check(0, 0x501, 0, true), Ok(0x101), "LMA without paging");
    assert_eq!(check(0x500, 0x901, pg, true), Ok(0xd01), "LMA stays");
    assert_eq!(check(0x500, 0x801, pg, true), Err(GpFault), "LME goes");
    assert_eq!(check(0, 0x100, pg, true), Err(GpFault), "LME comes");
    assert_eq!(check(0, 0x100, pg, false), Ok(0x500), "the client may");
    for bit in [1, 2, 9, 12, 13, 14, 63] {
        assert_eq!(check(0, 1 << bit, 0, true), Err(GpFault), "{bit}");
        assert_eq!(check(0, 1 << bit, 0, false), Err(GpFault), "{bit}");
    }
}

#[test]
fn pat_types() {
    for memory_type in 0..=255u8 {
        let good = [0, 1, 4, 5, 6, 7].contains(&memory_type);
        for place in 0..8 {
            let value = u64::from(memory_type) << (8 * place);
            assert_eq!(valid_pat(value), good, "{value:#x}");
        }
    }
    let mut store = MsrStore::new(true);
    assert_eq!(store.pat(), 0x0007_0406_0007_0406);
    assert_eq!(store.write(0x277, 2, &features(), false), Err(GpFault));
    assert_eq!(store.write(0x277, 0x0606, &features(), true), Ok(()));
    assert_eq!((store.pat(), store.read(0x277)), (0x606, Ok(0x606)));
}

#[test]
fn apic_base_stays_where_it_is() {
    let features = features();
    for (bootstrap, value) in [(true, 0xfee0_0900), (false, 0xfee0_0800)] {
        let mut store = MsrStore::new(bootstrap);
        assert_eq!(store.apic_base(), value);
        let mut write = |value, by_guest| store.write(0x1b, value, &features, by_guest);
        for bad in [0xfec0_0900, 0xfee0_0c00, 0xfee0_0801, 0x1_fee0_0800, 0] {
            assert_eq!(write(bad, true), Err(GpFault), "{bad:#x}");
            assert_eq!(write(bad, false), Err(GpFault), "{bad:#x}");
        }
        assert_eq!(write(0xfee0_0000, true), Ok(()), "off");
        assert_eq!(write(0xfee0_0900, true).is_ok(), bootstrap);
        assert_eq!(
            store.apic_base(),
            if bootstrap { value } else { 0xfee0_0000 }
        );
    }
}

#[test]
fn mtrrs_hold_what_the_guest_may_write() {
    let features = features();
    let mut store = MsrStore::new(true);
    assert_eq!(store.read(0xfe), Ok(0x508));
    // What SeaBIOS writes and repeats from a table of 32: all off, 11 fixed ranges, each pair, one pair
    // again for the hole of PCI, and on.
    let pairs = store.read(0xfe).map(|capability| capability & 0xff);
    assert!(pairs.is_ok_and(|pairs| 1 + 11 + 2 * pairs + 2 < 32));
    let places = (0x200..=0x213)
        .chain([0x250, 0x258, 0x259, 0x2ff])
        .chain(0x268..=0x26f);
    // A value of its own for each, to see that none shares a place.
    let value = |register: u32| match register {
        0x2ff => 0xc06,
        0x200..=0x213 if register & 1 == 1 => u64::from(register) << 12 | 0x800,
        0x200..=0x213 => u64::from(register) << 12 | 6,
        // The register's low bits, one per byte, as types 0 and 1.
        _ => (0..8).fold(0, |bits, i| bits | u64::from(register >> i & 1) << (8 * i)),
    };
    for register in places.clone() {
        let result = store.write(register, value(register), &features, true);
        assert_eq!(result, Ok(()), "{register:#x}");
    }
    for register in places {
        assert_eq!(store.read(register), Ok(value(register)), "{register:#x}");
    }
}

#[test]
fn mtrrs_refuse_reserved_bits_of_the_guest_only() {
    let features = features();
    let mut store = MsrStore::new(true);
    let bad = [
        (0x200, 2),
        (0x200, 0x100),
        (0x200, 0x800),
        (0x212, 1 << 39),
        (0x201, 1),
        (0x201, 0x400),
        (0x213, 1 << 39),
        (0x250, 2),
        (0x250, 0x0700),
        (0x26f, 0x03 << 56),
        (0x2ff, 2),
        (0x2ff, 0x100),
        (0x2ff, 0x1000),
    ];
    for (register, value) in bad {
        let before = store;
        let guest = store.write(register, value, &features, true);
        assert_eq!(guest, Err(GpFault), "{register:#x} {value:#x}");
        assert_eq!(store, before);
        assert_eq!(store.write(register, value, &features, false), Ok(()));
        assert_eq!(store.read(register), Ok(value));
    }
    let fits = store.write(0x201, (1 << 39) - 0x800, &features, true);
    assert_eq!(fits, Ok(()), "39 address bits");
}

#[test]
fn constants_are_haxm_s() {
    let features = features();
    let mut store = MsrStore::new(true);
    for (register, value, writable) in [
        (0x0, 0, false),
        (0x1, 0, false),
        (0x17, 0x18_0000_0000_0000, false),
        (0x2a, 0, true),
        (0x3a, 5, false),
        (0x3f, 0, false),
        (0x8b, 0x6731_1111, true),
        (0xc1, 0, true),
        (0xcd, 4, false),
        (0xee, 0x8679_1b00, false),
        (0xfe, 0x508, false),
        (0x11e, 0xbe70_2111, false),
        (0x179, 1, false),
        (0x17a, 0, true),
        (0x17b, 3, false),
        (0x189, 0, true),
        (0x1a0, 0x1801, true),
        (0x1d9, 0, true),
        (0x288, 0, true),
        (0x300, 0, true),
        (0x345, 0, false),
        (0x38f, 0, true),
        (0x400, 0, true),
        (0x403, 0, true),
    ] {
        assert_eq!(store.read(register), Ok(value), "{register:#x}");
        let written = store.write(register, !0, &features, true);
        assert_eq!(written.is_ok(), writable, "{register:#x}");
        assert_eq!(store.read(register), Ok(value), "{register:#x}");
    }
    assert_eq!(store.read(0x79), Err(GpFault));
    assert_eq!(store.write(0x79, 0x1234, &features, true), Ok(()));
    assert_eq!(store.write(0xfe, 0x508, &features, false), Ok(()));
    assert_eq!(store.write(0xfe, 0x50a, &features, false), Err(GpFault));
    assert_eq!(store.read(0x478), Ok(!0));
    assert_eq!(store.write(0x478, 5, &features, true), Ok(()));
    assert_eq!(store.read(0x478), Ok(5));
}
