//! What CPUID answers: rows as they are, and what differs between virtual
//! processors or follows their state.

use super::feature::{Feature, Word};
use super::{COMPONENTS, Component, CpuidTable, FIRST_COMPONENT, eax_only, place};
use crate::arch::reg::Cr4;
use crate::cpu::CpuidResult;

/// Size of the legacy region and the header, SDM 13.4 "XSAVE Area".
const XSAVE_BASE_SIZE: u32 = 576;
/// Leaf 6 EAX: the APIC timer never stops; the client's does not.
const ARAT: u32 = 1 << 2;

/// The virtual processor that executes CPUID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Its APIC id.
    pub apic_id: u8,
    /// Virtual processors of the VM: one more than the highest APIC id.
    pub vcpus: u8,
    /// CR4 as it sees it.
    pub cr4: u64,
    /// Its XCR0.
    pub xcr0: u64,
}

/// Bits that the numbers below `count` need: the shift of leaf 0xB.
fn id_bits(count: u8) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
}

impl CpuidTable {
    /// What CPUID with EAX = `leaf`, ECX = `subleaf` returns. A leaf that is
    /// not there is all zero, as in HAXM.
    #[must_use]
    pub fn lookup(&self, leaf: u32, subleaf: u32, view: &View) -> CpuidResult {
        match leaf {
            0 | 0x8000_0000 => return self.row_of(leaf, 0),
            1..0x4000_0000 if leaf > self.row(place::LEAF_0).eax => return CpuidResult::default(),
            0x8000_0001.. if leaf > self.row(place::EXTENDED_0).eax => {
                return CpuidResult::default();
            }
            _ => {}
        }
        match leaf {
            1 => self.leaf_1(view),
            4 => self.cache_leaf(subleaf, view),
            6 => eax_only(ARAT),
            7 => self.row_of(7, subleaf),
            0xb => topology_leaf(subleaf, view),
            0xd => self.xsave_leaf(subleaf, view),
            0x8000_0007 => CpuidResult {
                edx: self.power,
                ..CpuidResult::default()
            },
            _ => self.row_of(leaf, 0),
        }
    }

    fn leaf_1(&self, view: &View) -> CpuidResult {
        const OSXSAVE: u32 = 1 << 27;
        let mut row = self.row(place::LEAF_1);
        // EBX[31:24]: initial APIC id. EBX[23:16]: ids reserved for the package.
        let ids = 1u32.wrapping_shl(id_bits(view.vcpus)).min(0xff);
        row.ebx = (row.ebx & 0xffff) | ids << 16 | u32::from(view.apic_id) << 24;
        row.edx &= !Feature::HTT.mask();
        if view.vcpus > 1 {
            row.edx |= Feature::HTT.mask();
        }
        if view.cr4 & Cr4::OSXSAVE.bits() != 0 && self.has(Feature::XSAVE) {
            row.ecx |= OSXSAVE;
        }
        row
    }

    /// The host's caches; each virtual processor is a core with its own L1 and
    /// L2, and the last level is the package's.
    fn cache_leaf(&self, subleaf: u32, view: &View) -> CpuidResult {
        let place = usize::try_from(subleaf).unwrap_or(usize::MAX);
        let mut cache = self.caches.get(place).copied().unwrap_or_default();
        // EAX[4:0] = 0: no more caches.
        if cache.eax & 0x1f == 0 {
            return CpuidResult::default();
        }
        let ids = 1u32.wrapping_shl(id_bits(view.vcpus)).wrapping_sub(1);
        let level = cache.eax >> 5 & 7;
        let sharing = if level > 2 { ids } else { 0 };
        cache.eax = (cache.eax & 0x3fff) | (sharing & 0xfff) << 14 | (ids & 0x3f) << 26;
        cache
    }

    fn component(&self, number: u32) -> Option<Component> {
        let place = usize::try_from(number.checked_sub(FIRST_COMPONENT)?).ok()?;
        let is_there = self.allowed_xcr0().bits() & 1u64.checked_shl(number)? != 0;
        let component = self.components.get(place).copied();
        component.filter(|_| is_there)
    }

    /// Components of an XCR0, by number.
    fn enabled(&self, xcr0: u64) -> impl Iterator<Item = Component> + '_ {
        (FIRST_COMPONENT..)
            .take(COMPONENTS)
            .filter(move |number| xcr0 & 1u64.wrapping_shl(*number) != 0)
            .filter_map(|number| self.component(number))
    }

    /// Bytes of the standard form, SDM 13.4.3 "Extended Region of an XSAVE Area".
    fn standard_size(&self, xcr0: u64) -> u32 {
        self.enabled(xcr0)
            .map(|component| component.offset.saturating_add(component.size))
            .fold(XSAVE_BASE_SIZE, u32::max)
    }

    /// Bytes of the compacted form, same section.
    fn compacted_size(&self, xcr0: u64) -> u32 {
        self.enabled(xcr0).fold(XSAVE_BASE_SIZE, |size, component| {
            let start = if component.flags & 2 != 0 {
                size.saturating_add(63) & !63
            } else {
                size
            };
            start.saturating_add(component.size)
        })
    }

    /// SDM 13.2 "Enumeration of CPU Support for XSAVE Instructions and
    /// XSAVE-Supported Features".
    pub(super) fn xsave_leaf(&self, subleaf: u32, view: &View) -> CpuidResult {
        let allowed = self.allowed_xcr0().bits();
        if allowed == 0 {
            return CpuidResult::default();
        }
        match subleaf {
            0 => CpuidResult {
                eax: allowed as u32,
                ebx: self.standard_size(view.xcr0),
                ecx: self.standard_size(allowed),
                edx: (allowed >> 32) as u32,
            },
            1 => CpuidResult {
                eax: self.word(Word::LeafDSub1Eax),
                ebx: if self.has(Feature::XSAVEC) {
                    self.compacted_size(view.xcr0)
                } else {
                    0
                },
                ..CpuidResult::default()
            },
            number => self
                .component(number)
                .map_or(CpuidResult::default(), |it| CpuidResult {
                    eax: it.size,
                    ebx: it.offset,
                    ecx: it.flags,
                    edx: 0,
                }),
        }
    }
}

/// Leaf 0xB: one thread per core, all cores in one package. SDM 9.9.2
/// "Hierarchical Mapping of CPUID Extended Topology Leaf".
fn topology_leaf(subleaf: u32, view: &View) -> CpuidResult {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let (eax, ebx, level) = match subleaf {
        0 => (0, 1, THREADS),
        1 => (id_bits(view.vcpus), u32::from(view.vcpus.max(1)), CORES),
        _ => (0, 0, 0),
    };
    CpuidResult {
        eax,
        ebx,
        ecx: (subleaf & 0xff) | level,
        edx: u32::from(view.apic_id),
    }
}
