//! What CPUID tells the guest.
//!
//! A VM has one table of the 18 rows that HAXM has, which GET_CPUID returns
//! and SET_CPUID changes. No row ever says more than the processor has and
//! this core can give. What differs between virtual processors or with their
//! state is worked out at each CPUID: the APIC id, the topology, OSXSAVE, the
//! sizes of leaf 0xD.
//!
//! Numbers of leaves and bits: SDM vol. 2, CPUID, table 3-8 "Information
//! Returned by CPUID Instruction".

mod answer;
mod cache;
mod feature;
#[cfg(test)]
mod tests;

pub use answer::View;
pub use cache::Answers;
pub use feature::{Feature, Features};

use abi::cpuid::{CpuidEntry, MAX_CPUID_ENTRIES};

use self::feature::{FORCED, Need, WORDS, Word};
use super::state::extended;
use crate::arch::control::Secondary;
use crate::arch::reg::{Cr4, Xcr0};
use crate::caps::Caps;
use crate::cpu::{Cpu, CpuidResult};
use crate::error::Error;

/// Rows of the table: leaf and subleaf, in HAXM's order.
const KEYS: [(u32, u32); ROWS] = [
    (0, 0),
    (1, 0),
    (2, 0),
    (7, 0),
    (7, 1),
    (0xa, 0),
    (0xd, 0),
    (0xd, 1),
    (0x15, 0),
    (0x16, 0),
    (0x4000_0000, 0),
    (0x8000_0000, 0),
    (0x8000_0001, 0),
    (0x8000_0002, 0),
    (0x8000_0003, 0),
    (0x8000_0004, 0),
    (0x8000_0006, 0),
    (0x8000_0008, 0),
];
/// Rows that GET_CPUID returns.
pub const ROWS: usize = 18;

/// Places in [`KEYS`] of the rows that have rules of their own.
mod place {
    pub(super) const LEAF_0: usize = 0;
    pub(super) const LEAF_1: usize = 1;
    pub(super) const LEAF_7: usize = 3;
    pub(super) const LEAF_7_SUB_1: usize = 4;
    pub(super) const LEAF_A: usize = 5;
    pub(super) const LEAF_D: usize = 6;
    pub(super) const LEAF_D_SUB_1: usize = 7;
    pub(super) const EXTENDED_0: usize = 11;
    pub(super) const EXTENDED_1: usize = 12;
    pub(super) const EXTENDED_8: usize = 17;
}

/// Highest basic leaf, as HAXM.
const MAX_BASIC: u32 = 0x16;
/// Highest extended leaf, as HAXM.
const MAX_EXTENDED: u32 = 0x8000_0008;
/// Family 6, model 1Fh, stepping 1: what HAXM calls every later model, so
/// that no guest looks for model-specific registers that are not there.
const SIGNATURE: u32 = 0x106f1;
const SIGNATURE_MODEL: u32 = 0x1f;
/// Bits of a guest-physical address that a 4-level EPT walk translates, SDM
/// 29.3.2 "EPT Translation Mechanism".
const EPT_BITS: u32 = 48;
/// Bits of a linear address; 57-bit ones are not offered.
const LINEAR_BITS: u32 = 48;
/// XCR0 components from here on have a subleaf of leaf 0xD.
const FIRST_COMPONENT: u32 = 2;
/// AVX, two of MPX that are never offered, three of AVX-512.
const COMPONENTS: usize = 6;
/// Cache levels kept from leaf 4.
const CACHES: usize = 4;
/// XCR0 bits of AVX-512, all or none.
const AVX512_STATE: Xcr0 = Xcr0::OPMASK.union(Xcr0::ZMM_HI256).union(Xcr0::HI16_ZMM);

/// Size and place of a component in the XSAVE area, from leaf 0xD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Component {
    size: u32,
    offset: u32,
    /// ECX: bit 1 = aligned to 64 bytes in the compacted form.
    flags: u32,
}

/// The CPUID table of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidTable {
    rows: [CpuidResult; ROWS],
    /// Most that each word may say.
    limits: [u32; WORDS.len()],
    /// XCR0 bits that the host lets a guest have.
    host_xcr0: Xcr0,
    /// CR4 bits that may be 1 in VMX operation.
    cr4: Cr4,
    physical_bits: u32,
    components: [Component; COMPONENTS],
    caches: [CpuidResult; CACHES],
    /// CPUID.80000007H:EDX: invariant TSC.
    power: u32,
    /// The most that leaf 0xA may say.
    counters: CpuidResult,
}

/// "Virt", "ual ", "CPU ": the brand string, as HAXM.
const BRAND: CpuidResult = CpuidResult {
    eax: 0x7472_6956,
    ebx: 0x206c_6175,
    ecx: 0x2055_5043,
    edx: 0,
};
/// "HAXM" three times.
const HAXM: u32 = 0x4d58_4148;
/// One 1 MB L2 and small L1 caches, as HAXM. Guests prefer leaf 4.
const LEAF_2: CpuidResult = CpuidResult {
    eax: 0x0302_0101,
    ebx: 0,
    ecx: 0,
    edx: 0x0c04_0844,
};
/// The same L2 in the form of leaf 80000006H.
const L2_CACHE: u32 = 0x0400_8040;
/// Leaf 1 EBX at rest: one logical processor, CLFLUSH of 8 * 8 bytes.
const LEAF_1_EBX: u32 = 0x0001_0800;
/// Leaf 80000007H EDX: the TSC keeps its rate, in every sleep state.
const INVARIANT_TSC: u32 = 1 << 8;

const fn eax_only(eax: u32) -> CpuidResult {
    CpuidResult {
        eax,
        ebx: 0,
        ecx: 0,
        edx: 0,
    }
}

/// Family, model and stepping as a guest sees them.
const fn signature(host: u32) -> u32 {
    // SDM vol. 2, CPUID, figure 3-6 "Version Information Returned by CPUID in EAX".
    let family = (host >> 8) & 0xf;
    let model = (host >> 12 & 0xf0) | (host >> 4 & 0xf);
    if family == 6 && model > SIGNATURE_MODEL {
        SIGNATURE
    } else {
        host
    }
}

impl CpuidTable {
    /// The table of a new VM on this processor.
    pub fn new<C: Cpu>(cpu: &C, caps: &Caps) -> Self {
        Self::build(
            |leaf, subleaf| cpu.cpuid(leaf, subleaf),
            extended::available(cpu),
            caps.secondary,
            Cr4::from_bits_retain(caps.cr4_fixed1),
            caps.physical_bits.into(),
        )
        .with_counters(caps.counters.leaf)
    }

    /// The table with the performance counters of leaf 0xA.
    pub(super) fn with_counters(mut self, leaf: CpuidResult) -> Self {
        self.counters = leaf;
        self.set_row(place::LEAF_A, leaf);
        self
    }

    /// The table for a host that answers CPUID with `host`, lends XCR0 bits
    /// `host_xcr0`, and has these VMX capabilities.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn build(
        host: impl Fn(u32, u32) -> CpuidResult,
        host_xcr0: Xcr0,
        secondary: Secondary,
        cr4: Cr4,
        physical_bits: u32,
    ) -> Self {
        let max_basic = host(0, 0).eax;
        let max_extended = host(0x8000_0000, 0).eax;
        // Beyond the highest leaf a processor answers with another leaf's data.
        let host = |leaf: u32, subleaf| {
            let max = if leaf < 0x8000_0000 {
                max_basic
            } else {
                max_extended
            };
            if leaf <= max {
                host(leaf, subleaf)
            } else {
                CpuidResult::default()
            }
        };
        let mut this = Self {
            rows: [CpuidResult::default(); ROWS],
            limits: [0; WORDS.len()],
            host_xcr0,
            cr4,
            physical_bits: physical_bits.clamp(32, EPT_BITS),
            components: [Component::default(); COMPONENTS],
            caches: [CpuidResult::default(); CACHES],
            power: host(0x8000_0007, 0).edx & INVARIANT_TSC,
            counters: CpuidResult::default(),
        };
        for (number, component) in (FIRST_COMPONENT..).zip(&mut this.components) {
            let answer = host(0xd, number);
            *component = Component {
                size: answer.eax,
                offset: answer.ebx,
                flags: answer.ecx & 2,
            };
        }
        for (number, cache) in (0..).zip(&mut this.caches) {
            *cache = host(4, number);
        }
        for ((leaf, subleaf), row) in KEYS.iter().zip(&mut this.rows) {
            *row = Self::fresh_row(*leaf, *subleaf, host(*leaf, *subleaf));
        }
        // Subleaf 1 of leaf 7 may not exist, and then answers anything.
        if host(7, 0).eax == 0 {
            this.set_row(place::LEAF_7_SUB_1, CpuidResult::default());
        }
        this.set_row(place::EXTENDED_8, eax_only(this.physical_bits));
        this.limit(secondary);
        this.settle();
        this
    }

    /// A row before its feature words are limited.
    fn fresh_row(leaf: u32, subleaf: u32, host: CpuidResult) -> CpuidResult {
        match (leaf, subleaf) {
            (0, _) => CpuidResult {
                eax: host.eax.min(MAX_BASIC),
                ..host
            },
            (1, _) => CpuidResult {
                eax: signature(host.eax),
                ebx: LEAF_1_EBX,
                ..host
            },
            (2, _) => LEAF_2,
            (7, 0) => CpuidResult {
                eax: host.eax.min(1),
                ..host
            },
            (7 | 0xd, 1) => eax_only(host.eax),
            (0x4000_0000, _) => CpuidResult {
                eax: 0x4000_0000,
                ebx: HAXM,
                ecx: HAXM,
                edx: HAXM,
            },
            (0x8000_0000, _) => eax_only(MAX_EXTENDED),
            (0x8000_0001, _) => CpuidResult {
                eax: 0,
                ebx: 0,
                ..host
            },
            (0x8000_0002, _) => BRAND,
            (0x8000_0006, _) => CpuidResult {
                ecx: L2_CACHE,
                ..CpuidResult::default()
            },
            // 0xA: `with_counters`. 0xD and 0x80000008: `settle` and `build`
            // make them. 0x15 and 0x16: Linux takes the
            // crystal's frequency for the APIC timer's, which is the client's
            // business, so the host's would be wrong; SET_CPUID may give true
            // ones.
            _ => CpuidResult::default(),
        }
    }

    fn row(&self, place: usize) -> CpuidResult {
        self.rows.get(place).copied().unwrap_or_default()
    }

    fn set_row(&mut self, place: usize, value: CpuidResult) {
        if let Some(row) = self.rows.get_mut(place) {
            *row = value;
        }
    }

    /// The row with this key, or zeros.
    fn row_of(&self, leaf: u32, subleaf: u32) -> CpuidResult {
        let place = KEYS.iter().position(|key| *key == (leaf, subleaf));
        place.map_or(CpuidResult::default(), |place| self.row(place))
    }

    fn word(&self, word: Word) -> u32 {
        *word.of(&mut self.row(word.row()))
    }

    fn set_word(&mut self, word: Word, value: u32) {
        if let Some(row) = self.rows.get_mut(word.row()) {
            *word.of(row) = value;
        }
    }

    fn has(&self, feature: Feature) -> bool {
        self.word(feature.word) & feature.mask() != 0
    }

    /// Fixes the most that the rows may say: what we offer of what the host
    /// has and VMX operation allows.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn limit(&mut self, secondary: Secondary) {
        let mut limits = [0; WORDS.len()];
        for feature in Feature::OFFERED {
            let possible = match feature.need {
                Need::Software => true,
                Need::Rdtscp => self.has(*feature) && secondary.contains(Secondary::ENABLE_RDTSCP),
                Need::Invpcid => {
                    self.has(*feature) && secondary.contains(Secondary::ENABLE_INVPCID)
                }
                Need::Cr4(bit) => self.has(*feature) && self.cr4.contains(bit),
                Need::Xsaves => self.has(*feature) && secondary.contains(Secondary::ENABLE_XSAVES),
                Need::Xsave => self.has(*feature) && self.cr4.contains(Cr4::OSXSAVE),
                Need::Host | Need::Avx | Need::Avx512 => self.has(*feature),
            };
            if let Some(limit) = limits.get_mut(feature.word as usize) {
                *limit |= if possible { feature.mask() } else { 0 };
            }
        }
        self.limits = limits;
        for word in WORDS {
            let software = Feature::OFFERED
                .iter()
                .filter(|feature| feature.word == word && feature.need == Need::Software)
                .fold(0, |bits, feature| bits | feature.mask());
            self.set_word(word, self.word(word) | software);
        }
    }

    /// Takes back what the limits or a missing foundation forbid, and works
    /// out the rows that follow from others.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn settle(&mut self) {
        // Not settable: what a foundation that came back brings back.
        let [.., limit_d, _, _] = self.limits;
        self.set_word(Word::LeafDSub1Eax, limit_d);
        for (word, limit) in WORDS.into_iter().zip(self.limits) {
            self.set_word(word, self.word(word) & limit);
        }
        for feature in FORCED {
            self.set_word(feature.word, self.word(feature.word) | feature.mask());
        }
        for feature in Feature::OFFERED {
            let founded = match feature.need {
                Need::Xsave | Need::Xsaves => self.host_xcr0.contains(Xcr0::X87 | Xcr0::SSE),
                Need::Avx => self.allowed_xcr0().contains(Xcr0::AVX),
                Need::Avx512 => self.allowed_xcr0().contains(AVX512_STATE),
                _ => true,
            };
            // AVX and AVX-512F themselves open what the others rest on.
            let rests_on = match *feature {
                Feature::AVX => self.has(Feature::XSAVE) && self.host_xcr0.contains(Xcr0::AVX),
                Feature::AVX512F => self.has(Feature::AVX) && self.host_xcr0.contains(AVX512_STATE),
                _ => founded,
            };
            if !rests_on {
                self.set_word(feature.word, self.word(feature.word) & !feature.mask());
            }
        }
        // The highest subleaf of leaf 7: 1 only where there is something in it.
        if self.word(Word::Leaf7Sub1Eax) == 0 {
            let row = self.row(place::LEAF_7);
            self.set_row(place::LEAF_7, CpuidResult { eax: 0, ..row });
        }
        let all = View {
            apic_id: 0,
            vcpus: 1,
            cr4: 0,
            xcr0: self.allowed_xcr0().bits(),
        };
        self.set_row(place::LEAF_A, self.fewer_counters(self.row(place::LEAF_A)));
        self.set_row(place::LEAF_D, self.xsave_leaf(0, &all));
        self.set_row(place::LEAF_D_SUB_1, self.xsave_leaf(1, &all));
        let given = self.row(place::EXTENDED_8).eax & 0xff;
        // Not clamp(), which panics where its limits cross.
        let bits = given.min(self.physical_bits).max(32);
        self.set_row(place::EXTENDED_8, eax_only(LINEAR_BITS << 8 | bits));
    }

    /// Leaf 0xA as `wanted`, but no more than there is: version, counters, events.
    /// Their width is the processor's. EBX has a bit for each missing event.
    fn fewer_counters(&self, wanted: CpuidResult) -> CpuidResult {
        let [version, counters, _, events] = wanted.eax.to_le_bytes();
        let [has_version, has_counters, width, has_events] = self.counters.eax.to_le_bytes();
        let version = version.min(has_version);
        let counters = counters.min(has_counters);
        if version == 0 || counters == 0 {
            return CpuidResult::default();
        }
        let events = events.min(has_events);
        CpuidResult {
            eax: u32::from_le_bytes([version, counters, width, events]),
            ebx: (wanted.ebx & 0x7f) | self.counters.ebx,
            ecx: 0,
            edx: 0,
        }
    }

    /// XCR0 bits of the features in the table.
    fn allowed_xcr0(&self) -> Xcr0 {
        let mut bits = self.host_xcr0;
        if !self.has(Feature::XSAVE) {
            return Xcr0::empty();
        }
        if !self.has(Feature::AVX) {
            bits.remove(Xcr0::AVX);
        }
        if !self.has(Feature::AVX512F) {
            bits.remove(AVX512_STATE);
        }
        bits
    }

    /// What the rest of the core wants to know of the table.
    #[must_use]
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn features(&self) -> Features {
        let mut words = [0; WORDS.len()];
        for (word, value) in WORDS.into_iter().zip(&mut words) {
            *value = self.word(word);
        }
        Features::new(
            words,
            self.allowed_xcr0().bits(),
            self.cr4,
            self.row(place::EXTENDED_8).eax as u8,
            self.row(place::LEAF_A).eax,
        )
    }

    /// SET_CPUID: replaces each row that may be replaced and is in `entries`
    /// (the first one counts), then takes back what the host or this core does
    /// not have. Leaf 0xD follows the features.
    ///
    /// # Errors
    /// [`Error::Invalid`] without entries, [`Error::TooBig`] with more than
    /// [`MAX_CPUID_ENTRIES`].
    pub fn set(&mut self, entries: &[CpuidEntry]) -> Result<(), Error> {
        if entries.is_empty() {
            return Err(Error::Invalid);
        }
        if entries.len() > MAX_CPUID_ENTRIES as usize {
            return Err(Error::TooBig);
        }
        for (place, (leaf, subleaf)) in KEYS.iter().enumerate() {
            let wanted = entries
                .iter()
                .find(|entry| entry.function == *leaf && entry.index == *subleaf);
            if let Some(wanted) = wanted {
                let row = self.row(place);
                self.set_row(place, Self::replaced_row(*leaf, *subleaf, row, wanted));
            }
        }
        self.settle();
        Ok(())
    }

    /// A row after SET_CPUID, before it is limited. The rules are HAXM's.
    fn replaced_row(leaf: u32, subleaf: u32, row: CpuidResult, wanted: &CpuidEntry) -> CpuidResult {
        let verbatim = CpuidResult {
            eax: wanted.eax,
            ebx: wanted.ebx,
            ecx: wanted.ecx,
            edx: wanted.edx,
        };
        match (leaf, subleaf) {
            (0, _) => CpuidResult {
                eax: wanted.eax.min(MAX_BASIC),
                ..row
            },
            // The CLFLUSH size is the processor's; the rest of EBX above the
            // brand is each virtual processor's own.
            (1, _) => CpuidResult {
                ebx: (row.ebx & !0xff) | (wanted.ebx & 0xff),
                ..verbatim
            },
            (7, 0) => CpuidResult {
                eax: wanted.eax.min(1),
                ..verbatim
            },
            (7 | 0x8000_0008, _) => eax_only(wanted.eax),
            (0x15, _) if wanted.eax == 0 || wanted.ebx == 0 => row,
            (0x16, _) if wanted.eax == 0 || wanted.ebx == 0 || wanted.ecx == 0 => row,
            (0x16, _) => CpuidResult {
                eax: wanted.eax & 0xffff,
                ebx: wanted.ebx & 0xffff,
                ecx: wanted.ecx & 0xffff,
                edx: 0,
            },
            (0x8000_0000, _) => CpuidResult {
                eax: wanted.eax.min(MAX_EXTENDED),
                ..row
            },
            (0x8000_0001, _) => CpuidResult { ebx: 0, ..verbatim },
            (0x8000_0006, _) => CpuidResult {
                ecx: wanted.ecx,
                ..row
            },
            (2 | 0xa | 0x15 | 0x4000_0000 | 0x8000_0002..=0x8000_0004, _) => verbatim,
            // 0xD is not settable.
            _ => row,
        }
    }

    /// GET_CPUID: writes the rows in HAXM's order and returns how many there
    /// are, also if `out` has room for fewer.
    pub fn entries(&self, out: &mut [CpuidEntry]) -> usize {
        let rows = KEYS.iter().zip(&self.rows);
        for ((key, row), entry) in rows.zip(out) {
            *entry = CpuidEntry {
                function: key.0,
                index: key.1,
                flags: 0,
                eax: row.eax,
                ebx: row.ebx,
                ecx: row.ecx,
                edx: row.edx,
                pad: [0; 3],
            };
        }
        ROWS
    }
}
