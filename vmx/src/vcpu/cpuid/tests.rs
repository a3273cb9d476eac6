//! A host made of numbers: what the table takes from it, and what it leaves out.

extern crate std;

mod set;

use std::vec::Vec;

use abi::cpuid::CpuidEntry;

use super::{Answers, CpuidTable, Feature, KEYS, ROWS, View, place};
use crate::arch::control::Secondary;
use crate::arch::reg::{Cr4, Efer, Xcr0};
use crate::cpu::CpuidResult;

const ALL: u32 = !0;

const fn result(eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidResult {
    CpuidResult { eax, ebx, ecx, edx }
}

/// A processor with every feature bit there is.
fn everything(leaf: u32, subleaf: u32) -> CpuidResult {
    match (leaf, subleaf) {
        (0, _) => result(0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69),
        (1, _) => result(0x000c_06f2, 0x4040_0800, ALL, ALL),
        (4, 0) => result(0xfc00_4121, 0x02c0_003f, 0x3f, 0),
        (4, 1) => result(0xfc00_4122, 0x01c0_003f, 0x3f, 0),
        (4, 2) => result(0xfc00_4143, 0x03c0_003f, 0x7ff, 0),
        (4, 3) => result(0xfc1f_c163, 0x0380_003f, 0x1_bfff, 4),
        (7, 0) => result(2, ALL, ALL, ALL),
        (0xa, _) => result(0x0730_0805, 0, 0, 0x8603),
        (0xd, 0) => result(0x6_02e7, 0xa88, 0x2b00, 0),
        (0xd, 1) => result(ALL, 0x2440, 0x1900, 0),
        (0xd, 2) => result(256, 576, 0, 0),
        (0xd, 5) => result(64, 1088, 0, 0),
        (0xd, 6) => result(512, 1152, 2, 0),
        (0xd, 7) => result(1024, 1664, 0, 0),
        (0x15, _) => result(2, 104, 24_000_000, 0),
        (0x16, _) => result(2000, 3000, 100, 0),
        (0x8000_0000, _) => result(0x8000_0008, 0, 0, 0),
        (0x8000_0001, _) => result(0, 0, ALL, ALL),
        (7, 1) | (0x8000_0007, _) => result(ALL, ALL, ALL, ALL),
        (0x8000_0008, _) => result(0x3934, ALL, ALL, ALL),
        _ => result(0, 0, 0, 0),
    }
}

const AVX512: Xcr0 = Xcr0::X87
    .union(Xcr0::SSE)
    .union(Xcr0::AVX)
    .union(super::AVX512_STATE);
const AVX: Xcr0 = Xcr0::X87.union(Xcr0::SSE).union(Xcr0::AVX);

fn table_with(xcr0: Xcr0, secondary: Secondary, cr4: Cr4) -> CpuidTable {
    CpuidTable::build(everything, xcr0, secondary, cr4, 52)
}

fn table() -> CpuidTable {
    let secondary = Secondary::ENABLE_RDTSCP | Secondary::ENABLE_INVPCID;
    table_with(AVX512, secondary, Cr4::from_bits_retain(!0))
}

const UP: View = View {
    apic_id: 0,
    vcpus: 1,
    cr4: 0,
    xcr0: 1,
};

fn entry(function: u32, index: u32, answer: CpuidResult) -> CpuidEntry {
    CpuidEntry {
        function,
        index,
        eax: answer.eax,
        ebx: answer.ebx,
        ecx: answer.ecx,
        edx: answer.edx,
        ..CpuidEntry::default()
    }
}

#[test]
fn rows_are_haxm_s_in_haxm_s_order() {
    let mut out = [CpuidEntry::default(); 20];
    assert_eq!(table().entries(&mut out), 18);
    let keys: Vec<_> = out[..ROWS].iter().map(|e| (e.function, e.index)).collect();
    assert_eq!(keys, KEYS);
    assert_eq!(out[18], CpuidEntry::default(), "no row beyond");
    assert_eq!(table().entries(&mut []), 18);
    for (place, key) in [
        (place::LEAF_0, (0, 0)),
        (place::LEAF_1, (1, 0)),
        (place::LEAF_7, (7, 0)),
        (place::LEAF_7_SUB_1, (7, 1)),
        (place::LEAF_D, (0xd, 0)),
        (place::LEAF_D_SUB_1, (0xd, 1)),
        (place::EXTENDED_0, (0x8000_0000, 0)),
        (place::EXTENDED_1, (0x8000_0001, 0)),
        (place::EXTENDED_8, (0x8000_0008, 0)),
    ] {
        assert_eq!(KEYS[place], key);
    }
}

#[test]
fn fixed_answers() {
    let table = table();
    let at = |leaf| table.lookup(leaf, 0, &UP);
    assert_eq!(at(0), result(0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69));
    assert_eq!(at(1).eax, 0x106f1);
    assert_eq!(at(2), result(0x0302_0101, 0, 0, 0x0c04_0844));
    assert_eq!(at(6), result(4, 0, 0, 0));
    assert_eq!(at(0xa), result(0, 0, 0, 0), "no counters");
    assert_eq!(at(0x15), result(0, 0, 0, 0));
    assert_eq!(at(0x16), result(0, 0, 0, 0));
    let signature = at(0x4000_0000);
    assert_eq!(signature.eax, 0x4000_0000);
    for word in [signature.ebx, signature.ecx, signature.edx] {
        assert_eq!(&word.to_le_bytes(), b"HAXM");
    }
    assert_eq!(at(0x8000_0000), result(0x8000_0008, 0, 0, 0));
    let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .map(at)
        .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
        .flat_map(u32::to_le_bytes)
        .collect();
    assert!(brand.starts_with(b"Virtual CPU \0"));
    assert_eq!(at(0x8000_0006), result(0, 0, 0x0400_8040, 0));
    assert_eq!(
        at(0x8000_0007),
        result(0, 0, 0, 0x100),
        "invariant TSC only"
    );
    assert_eq!(at(0x8000_0008), result(0x3030, 0, 0, 0), "48 and 48 bits");
}

#[test]
fn leaves_that_are_not_there_are_zero() {
    let table = table();
    for leaf in [3, 5, 8, 9, 0xc, 0xe, 0x14, 0x17, 0x1f, 0x20, 0x4000_0001] {
        assert_eq!(table.lookup(leaf, 0, &UP), result(0, 0, 0, 0), "{leaf:#x}");
    }
    for leaf in [0x8000_0005, 0x8000_0009, 0x8000_001f, 0xc000_0000, ALL] {
        assert_eq!(table.lookup(leaf, 0, &UP), result(0, 0, 0, 0), "{leaf:#x}");
    }
    assert_eq!(table.lookup(7, 2, &UP), result(0, 0, 0, 0));
}

/// The words on a processor with every bit, written out by hand.
#[test]
fn only_what_is_virtualised_is_offered() {
    let table = table();
    let leaf_1 = table.lookup(1, 0, &UP);
    assert_eq!(leaf_1.ecx, 0xf6da_3203, "1.ecx {:#x}", leaf_1.ecx);
    assert_eq!(leaf_1.edx, 0x0f8b_fbff, "1.edx {:#x}", leaf_1.edx);
    let leaf_7 = table.lookup(7, 0, &UP);
    let expected = result(1, 0xf1bf_27eb, 0x0040_5f46, 0xbc80_4410);
    assert_eq!(leaf_7, expected, "{leaf_7:#x?}");
    assert_eq!(table.lookup(7, 1, &UP), result(0x1c30, 0, 0, 0));
    let extended = table.lookup(0x8000_0001, 0, &UP);
    assert_eq!(extended, result(0, 0, 0x121, 0x2c10_0800), "{extended:#x?}");
    // Where software could be led to state that nobody switches.
    let leaf_1 = leaf_1.ecx;
    for (name, bit) in [("MONITOR", 3), ("VMX", 5), ("x2APIC", 21), ("deadline", 24)] {
        assert_eq!(leaf_1 & 1 << bit, 0, "{name}");
    }
    for (name, bit) in [("PKU", 3), ("CET", 7), ("LA57", 16), ("WAITPKG", 5)] {
        assert_eq!(leaf_7.ecx & 1 << bit, 0, "{name}");
    }
}

#[test]
fn nothing_the_host_lacks_is_offered() {
    let bare = |leaf, _| match leaf {
        0 => result(0xd, 0, 0, 0),
        1 => result(0x306c3, 0, 0, 0),
        0x8000_0000 => result(0x8000_0008, 0, 0, 0),
        _ => result(0, 0, 0, 0),
    };
    let table = CpuidTable::build(bare, AVX512, Secondary::all(), Cr4::all(), 36);
    let software = |word| {
        Feature::OFFERED
            .iter()
            .filter(|f| f.word == word && f.need == super::Need::Software)
            .fold(0, |bits, f| bits | f.mask())
    };
    for word in super::WORDS {
        assert_eq!(table.word(word), software(word), "{word:?}");
    }
    assert_eq!(table.features().allowed_xcr0(), 0);
    assert_eq!(table.lookup(0xd, 0, &UP), result(0, 0, 0, 0));
    assert_eq!(table.lookup(0x8000_0008, 0, &UP).eax, 0x3024);
    assert_eq!(table.lookup(7, 0, &UP).eax, 0);
}

#[test]
fn data_beyond_the_host_s_highest_leaf_is_ignored() {
    let old = |leaf, subleaf| match leaf {
        0 => result(6, 0, 0, 0),
        7.. if leaf < 0x8000_0000 => result(ALL, ALL, ALL, ALL),
        0x8000_0000 => result(0x8000_0006, 0, 0, 0),
        0x8000_0007.. => result(ALL, ALL, ALL, ALL),
        _ => everything(leaf, subleaf),
    };
    let table = CpuidTable::build(old, AVX512, Secondary::all(), Cr4::all(), 36);
    assert!(!table.features().has(Feature::AVX2));
    assert_eq!(table.lookup(7, 0, &UP), result(0, 0, 0, 0));
    assert_eq!(table.lookup(0xb, 0, &UP), result(0, 0, 0, 0));
    assert_eq!(table.lookup(0x8000_0007, 0, &UP).edx, 0);
}

#[test]
fn controls_and_cr4_gate_their_features() {
    let features = table_with(AVX, Secondary::empty(), Cr4::empty()).features();
    for feature in [
        Feature::RDTSCP,
        Feature::RDPID,
        Feature::INVPCID,
        Feature::PCID,
        Feature::FSGSBASE,
        Feature::SMEP,
        Feature::SMAP,
        Feature::UMIP,
        Feature::XSAVE,
        Feature::AVX,
    ] {
        assert!(!features.has(feature), "{feature:?}");
        assert!(table().features().has(feature), "{feature:?}");
    }
    assert_eq!(features.allowed_cr4(), 0);
}

#[test]
fn avx_follows_xcr0() {
    let without = table_with(Xcr0::X87 | Xcr0::SSE, Secondary::all(), Cr4::all());
    let features = without.features();
    assert!(features.has(Feature::XSAVE));
    for feature in Feature::OFFERED {
        if matches!(feature.need, super::Need::Avx | super::Need::Avx512) {
            assert!(!features.has(*feature), "{feature:?}");
        }
    }
    let features = table_with(AVX, Secondary::all(), Cr4::all()).features();
    assert!(features.has(Feature::AVX2) && !features.has(Feature::AVX512F));
    assert!(!features.has(Feature::AVX512_BF16));
    assert_eq!(features.allowed_xcr0(), 7);
    assert_eq!(table().features().allowed_xcr0(), 0xe7);
    let features = table_with(Xcr0::empty(), Secondary::all(), Cr4::all()).features();
    assert!(!features.has(Feature::XSAVE) && !features.has(Feature::XSAVEOPT));
}

#[test]
fn leaf_1_is_each_virtual_processor_s_own() {
    let table = table();
    let view = View {
        apic_id: 3,
        vcpus: 6,
        cr4: Cr4::OSXSAVE.bits(),
        xcr0: 1,
    };
    let one = table.lookup(1, 0, &view);
    assert_eq!(one.ebx, 0x0308_0800);
    assert_ne!(one.edx & 1 << 28, 0, "HTT");
    assert_ne!(one.ecx & 1 << 27, 0, "OSXSAVE");
    let up = table.lookup(1, 0, &UP);
    assert_eq!(up.ebx, 0x0001_0800);
    assert_eq!(up.edx & 1 << 28, 0);
    assert_eq!(up.ecx & 1 << 27, 0);
    let plain = table_with(Xcr0::empty(), Secondary::all(), Cr4::all());
    assert_eq!(plain.lookup(1, 0, &view).ecx & 1 << 27, 0, "no XSAVE");
}

#[test]
fn topology_is_one_package_of_cores() {
    let table = table();
    for (vcpus, shift) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (16, 4), (64, 6)] {
        let view = View {
            apic_id: vcpus - 1,
            vcpus,
            ..UP
        };
        let id = u32::from(vcpus - 1);
        let threads = table.lookup(0xb, 0, &view);
        assert_eq!(threads, result(0, 1, 0x100, id));
        let cores = table.lookup(0xb, 1, &view);
        assert_eq!(cores, result(shift, u32::from(vcpus), 0x201, id));
        assert_eq!(table.lookup(0xb, 2, &view), result(0, 0, 2, id));
        let ids = 1 << shift;
        assert_eq!(table.lookup(1, 0, &view).ebx >> 16 & 0xff, ids);
        for subleaf in 0..4 {
            let cache = table.lookup(4, subleaf, &view);
            assert_eq!(cache.eax >> 26, ids - 1, "cores");
            let sharing = if subleaf == 3 { ids - 1 } else { 0 };
            assert_eq!(cache.eax >> 14 & 0xfff, sharing);
            let host = everything(4, subleaf);
            assert_eq!(cache.eax & 0x3fff, host.eax & 0x3fff);
            assert_eq!((cache.ebx, cache.ecx), (host.ebx, host.ecx));
        }
        assert_eq!(table.lookup(4, 4, &view), result(0, 0, 0, 0));
    }
}

#[test]
fn xsave_sizes_follow_xcr0() {
    let table = table();
    let at = |subleaf, xcr0| table.lookup(0xd, subleaf, &View { xcr0, ..UP });
    assert_eq!(at(0, 1), result(0xe7, 576, 2688, 0));
    assert_eq!(at(0, 7), result(0xe7, 832, 2688, 0));
    assert_eq!(at(0, 0xe7), result(0xe7, 2688, 2688, 0));
    assert_eq!(at(1, 3), result(7, 576, 0, 0));
    assert_eq!(at(1, 7), result(7, 832, 0, 0));
    // 832 + 64 = 896, aligned to 64 already; + 512 + 1024.
    assert_eq!(at(1, 0xe7), result(7, 2432, 0, 0));
    assert_eq!(at(2, 1), result(256, 576, 0, 0));
    assert_eq!(at(6, 1), result(512, 1152, 2, 0));
    for subleaf in [3, 4, 8, 9, 17, 18, 63, 64, ALL] {
        assert_eq!(at(subleaf, 0xe7), result(0, 0, 0, 0), "{subleaf}");
    }
    let avx = table_with(AVX, Secondary::all(), Cr4::all());
    assert_eq!(avx.lookup(0xd, 0, &UP), result(7, 576, 832, 0));
    assert_eq!(avx.lookup(0xd, 5, &UP), result(0, 0, 0, 0));
}

#[test]
fn compacted_components_are_aligned_where_they_ask_for_it() {
    let odd = |leaf, subleaf| match (leaf, subleaf) {
        (0xd, 5) => result(8, 1088, 0, 0),
        _ => everything(leaf, subleaf),
    };
    let table = CpuidTable::build(odd, AVX512, Secondary::all(), Cr4::all(), 46);
    let answer = table.lookup(0xd, 1, &View { xcr0: 0xe7, ..UP });
    // 832 + 8 = 840, rounded up to 896; + 512 + 1024.
    assert_eq!(answer.ebx, 2432);
    let answer = table.lookup(0xd, 1, &View { xcr0: 0x27, ..UP });
    assert_eq!(answer.ebx, 840);
}

#[test]
fn features_for_the_core() {
    let features = table().features();
    let cr4 = Cr4::from_bits_retain(features.allowed_cr4());
    let expected = Cr4::VME
        | Cr4::PVI
        | Cr4::TSD
        | Cr4::DE
        | Cr4::PSE
        | Cr4::PAE
        | Cr4::MCE
        | Cr4::PGE
        | Cr4::PCE
        | Cr4::OSFXSR
        | Cr4::OSXMMEXCPT
        | Cr4::UMIP
        | Cr4::FSGSBASE
        | Cr4::PCIDE
        | Cr4::OSXSAVE
        | Cr4::SMEP
        | Cr4::SMAP;
    assert_eq!(cr4, expected);
    let efer = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
    assert_eq!(features.allowed_efer(), efer.bits());
    assert_eq!(features.physical_bits(), 48);
}

#[test]
fn each_cr4_bit_goes_with_its_feature() {
    let all = table().features().allowed_cr4();
    for (_, feature) in super::feature::CR4_FEATURES {
        let mut table = table();
        table.set_word(feature.word, table.word(feature.word) & !feature.mask());
        let gone = super::feature::CR4_FEATURES
            .into_iter()
            .filter(|(_, other)| *other == feature)
            .fold(0, |bits, (bit, _)| bits | bit.bits());
        assert_eq!(table.features().allowed_cr4(), all & !gone, "{feature:?}");
    }
    let bit = |bit: Cr4| {
        let place = super::feature::CR4_FEATURES.iter().find(|(b, _)| *b == bit);
        place.map(|(_, feature)| *feature)
    };
    assert_eq!(bit(Cr4::PVI), Some(Feature::VME));
    assert_eq!(bit(Cr4::SMEP), Some(Feature::SMEP));
    assert_eq!(bit(Cr4::SMAP), Some(Feature::SMAP));
    assert_eq!(bit(Cr4::PCIDE), Some(Feature::PCID));
    assert_eq!(bit(Cr4::UMIP), Some(Feature::UMIP));
    assert_eq!(bit(Cr4::FSGSBASE), Some(Feature::FSGSBASE));
}

#[test]
fn a_subleaf_that_does_not_exist_is_ignored() {
    let host = |leaf, subleaf| match (leaf, subleaf) {
        (7, 0) => result(0, ALL, ALL, ALL),
        _ => everything(leaf, subleaf),
    };
    let table = CpuidTable::build(host, AVX512, Secondary::all(), Cr4::all(), 46);
    assert_eq!(table.lookup(7, 0, &UP).eax, 0);
    assert_eq!(table.lookup(7, 1, &UP), result(0, 0, 0, 0));
}

#[test]
fn every_offered_bit_is_named_once() {
    for (i, feature) in Feature::OFFERED.iter().enumerate() {
        let same = |other: &&Feature| other.word == feature.word && other.mask() == feature.mask();
        assert_eq!(Feature::OFFERED.iter().find(same), Some(feature));
        assert_eq!(Feature::OFFERED.iter().filter(same).count(), 1, "{i}");
    }
}

#[test]
fn old_models_keep_their_name() {
    let nehalem = |leaf, subleaf| match leaf {
        1 => result(0x106a5, 0, ALL, ALL),
        _ => everything(leaf, subleaf),
    };
    let table = CpuidTable::build(nehalem, AVX, Secondary::all(), Cr4::all(), 36);
    assert_eq!(table.lookup(1, 0, &UP).eax, 0x106a5);
}

#[test]
fn kept_answers_are_those_of_the_table() {
    let mut table = table();
    let mut answers = Answers::default();
    let osxsave = View {
        cr4: Cr4::OSXSAVE.bits(),
        xcr0: 7,
        ..UP
    };
    let leaves = [
        0,
        1,
        4,
        6,
        7,
        0xb,
        0xd,
        0x21,
        0x4000_0000,
        0x8000_0001,
        u32::MAX,
    ];
    for view in [UP, osxsave, UP] {
        for leaf in leaves.into_iter().chain(leaves) {
            for subleaf in [0, 1, 2, 1] {
                let kept = answers.get(&table, leaf, subleaf, &view);
                assert_eq!(
                    kept,
                    table.lookup(leaf, subleaf, &view),
                    "{leaf:#x} {subleaf}"
                );
            }
        }
    }
    // The same question, and another view.
    for view in [UP, osxsave, UP] {
        let kept = answers.get(&table, 1, 0, &view);
        assert_eq!(kept, table.lookup(1, 0, &view), "{view:?}");
    }
    let before = answers.get(&table, 1, 0, &UP);
    let row = entry(1, 0, result(before.eax, before.ebx, 0, 0));
    table.set(&[row]).unwrap();
    answers.forget();
    assert_ne!(answers.get(&table, 1, 0, &UP), before);
}

#[test]
fn xsaves_needs_its_control() {
    let with = table_with(AVX, Secondary::ENABLE_XSAVES, Cr4::all());
    assert_eq!(with.lookup(0xd, 1, &UP).eax, 0xf);
    // No supervisor component: IA32_XSS stays 0.
    let row = with.lookup(0xd, 1, &UP);
    assert_eq!((row.ecx, row.edx), (0, 0));
    let without = table_with(AVX, Secondary::empty(), Cr4::all());
    assert_eq!(without.lookup(0xd, 1, &UP).eax, 0x7);
}
