//! What SET_CPUID can and cannot do.

extern crate std;

use std::vec::Vec;

use super::{ALL, AVX, UP, entry, result, table, table_with};
use crate::Error;
use crate::arch::control::Secondary;
use crate::arch::reg::Cr4;
use crate::cpu::CpuidResult;
use crate::vcpu::cpuid::{Feature, KEYS, View, WORDS};

#[test]
fn set_lowers_the_highest_extended_leaf() {
    let mut table = table();
    let lower = result(0x8000_0004, 1, 2, 3);
    table.set(&[entry(0x8000_0000, 0, lower)]).unwrap();
    let zero = table.lookup(0x8000_0000, 0, &UP);
    assert_eq!(zero, result(0x8000_0004, 0, 0, 0));
    assert_ne!(table.lookup(0x8000_0002, 0, &UP), result(0, 0, 0, 0));
    assert_eq!(table.lookup(0x8000_0008, 0, &UP), result(0, 0, 0, 0));
}

#[test]
fn set_cannot_add_what_is_not_there() {
    let mut table = table_with(AVX, Secondary::empty(), Cr4::empty());
    let before = table;
    let all = result(ALL, ALL, ALL, ALL);
    let entries: Vec<_> = KEYS.iter().map(|(f, i)| entry(*f, *i, all)).collect();
    table.set(&entries).unwrap();
    for word in WORDS {
        assert_eq!(table.word(word), before.word(word), "{word:?}");
    }
    assert_eq!(table.features(), before.features());
    let up = View { xcr0: 7, ..UP };
    for (leaf, subleaf) in [(0xa, 0), (0xd, 0), (0xd, 1), (0xd, 2), (0x8000_0000, 0)] {
        assert_eq!(
            table.lookup(leaf, subleaf, &up),
            before.lookup(leaf, subleaf, &up)
        );
    }
    assert_eq!(table.lookup(0, 0, &UP), before.lookup(0, 0, &UP));
    assert_eq!(table.lookup(1, 0, &UP).ebx, 0x0001_08ff, "only the brand");
    assert_eq!(table.lookup(0x8000_0008, 0, &UP), result(0x3030, 0, 0, 0));
    assert_eq!(table.lookup(0x8000_0006, 0, &UP), result(0, 0, ALL, 0));
    for leaf in [2, 0x15, 0x4000_0000, 0x8000_0002, 0x8000_0004] {
        assert_eq!(table.lookup(leaf, 0, &UP), all, "verbatim");
    }
    assert_eq!(
        table.lookup(0x16, 0, &UP),
        result(0xffff, 0xffff, 0xffff, 0)
    );
}

#[test]
fn set_takes_away_and_gives_back() {
    let mut table = table();
    let fresh = table;
    let leaf_1 = fresh.lookup(1, 0, &UP);
    let clear = |bit: u32| CpuidResult {
        ecx: leaf_1.ecx & !(1 << bit),
        ..leaf_1
    };
    table.set(&[entry(1, 0, clear(28))]).unwrap();
    let features = table.features();
    assert!(!features.has(Feature::AVX) && !features.has(Feature::AVX2));
    assert!(!features.has(Feature::AVX512F) && features.has(Feature::XSAVE));
    assert_eq!(features.allowed_xcr0(), 3);
    assert_eq!(table.lookup(0xd, 0, &UP), result(3, 576, 576, 0));
    assert_eq!(table.lookup(0xd, 2, &UP), result(0, 0, 0, 0));

    table.set(&[entry(1, 0, clear(26))]).unwrap();
    assert_eq!(table.features().allowed_xcr0(), 0);
    assert_eq!(table.features().allowed_cr4() & Cr4::OSXSAVE.bits(), 0);
    assert_eq!(table.lookup(0xd, 1, &UP), result(0, 0, 0, 0));

    let leaf_7 = fresh.lookup(7, 0, &UP);
    table
        .set(&[
            entry(1, 0, leaf_1),
            entry(7, 0, leaf_7),
            entry(7, 1, result(ALL, 0, 0, 0)),
        ])
        .unwrap();
    // The same, but HTT, which is worked out at each CPUID.
    assert_eq!(table.features().allowed_xcr0(), 0xe7);
    for leaf in [1, 7, 0xd] {
        for subleaf in 0..2 {
            assert_eq!(
                table.lookup(leaf, subleaf, &UP),
                fresh.lookup(leaf, subleaf, &UP)
            );
        }
    }
}

#[test]
fn set_keeps_what_it_must() {
    let mut table = table();
    table
        .set(&[
            entry(1, 0, result(0x306c3, 0, 0, 0)),
            entry(0x15, 0, result(0, 5, 6, 7)),
            entry(0x16, 0, result(1, 2, 0, 0)),
            entry(0, 0, result(7, 1, 2, 3)),
            entry(0x8000_0008, 0, result(0x2020, 0, 0, 0)),
        ])
        .unwrap();
    let one = table.lookup(1, 0, &UP);
    assert_eq!(one, result(0x306c3, 0x0001_0800, 1 << 31, 1 << 9));
    assert_eq!(table.row(8), result(0, 0, 0, 0), "no zero in leaf 0x15");
    assert_eq!(table.row(9), result(0, 0, 0, 0), "no zero in leaf 0x16");
    let zero = table.lookup(0, 0, &UP);
    assert_eq!(zero, result(7, 0x756e_6547, 0x6c65_746e, 0x4965_6e69));
    assert_eq!(table.lookup(0xb, 0, &UP), result(0, 0, 0, 0), "beyond 7");
    assert_eq!(table.features().physical_bits(), 32);
}

#[test]
fn the_first_entry_of_a_leaf_counts() {
    let mut table = table();
    table
        .set(&[
            entry(2, 1, result(9, 9, 9, 9)),
            entry(2, 0, result(1, 2, 3, 4)),
            entry(2, 0, result(5, 6, 7, 8)),
        ])
        .unwrap();
    assert_eq!(table.lookup(2, 0, &UP), result(1, 2, 3, 4));
}

#[test]
fn set_refuses_none_and_too_many() {
    let mut table = table();
    let before = table;
    assert_eq!(table.set(&[]), Err(Error::Invalid));
    let many = std::vec![entry(2, 0, result(1, 2, 3, 4)); 65];
    assert_eq!(table.set(&many), Err(Error::TooBig));
    assert_eq!(table, before);
    assert_eq!(table.set(&many[..64]), Ok(()));
}
