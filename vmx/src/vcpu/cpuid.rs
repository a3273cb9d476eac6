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

use abi::cpuid::{CpuidEntry, MAX_CPUID_ENTRIES};

use super::extended;
use crate::arch::control::Secondary;
use crate::arch::reg::{Cr4, Efer, Xcr0};
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
/// Size of the legacy region and the header, SDM 13.4 "XSAVE Area".
const XSAVE_BASE_SIZE: u32 = 576;
/// XCR0 components from here on have a subleaf of leaf 0xD.
const FIRST_COMPONENT: u32 = 2;
/// AVX, two of MPX that are never offered, three of AVX-512.
const COMPONENTS: usize = 6;
/// Cache levels kept from leaf 4.
const CACHES: usize = 4;
/// XCR0 bits of AVX-512, all or none.
const AVX512_STATE: Xcr0 = Xcr0::OPMASK.union(Xcr0::ZMM_HI256).union(Xcr0::HI16_ZMM);

/// A register of a row that is a set of features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Leaf1Ecx,
    Leaf1Edx,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    Leaf7Sub1Eax,
    LeafDSub1Eax,
    ExtendedEcx,
    ExtendedEdx,
}

const WORDS: [Word; 9] = [
    Word::Leaf1Ecx,
    Word::Leaf1Edx,
    Word::Leaf7Ebx,
    Word::Leaf7Ecx,
    Word::Leaf7Edx,
    Word::Leaf7Sub1Eax,
    Word::LeafDSub1Eax,
    Word::ExtendedEcx,
    Word::ExtendedEdx,
];

impl Word {
    const fn row(self) -> usize {
        match self {
            Self::Leaf1Ecx | Self::Leaf1Edx => 1,
            Self::Leaf7Ebx | Self::Leaf7Ecx | Self::Leaf7Edx => 3,
            Self::Leaf7Sub1Eax => 4,
            Self::LeafDSub1Eax => 7,
            Self::ExtendedEcx | Self::ExtendedEdx => 12,
        }
    }

    fn of(self, result: &mut CpuidResult) -> &mut u32 {
        match self {
            Self::Leaf7Sub1Eax | Self::LeafDSub1Eax => &mut result.eax,
            Self::Leaf7Ebx => &mut result.ebx,
            Self::Leaf1Ecx | Self::Leaf7Ecx | Self::ExtendedEcx => &mut result.ecx,
            Self::Leaf1Edx | Self::Leaf7Edx | Self::ExtendedEdx => &mut result.edx,
        }
    }
}

/// What a feature needs besides the bit in the host's CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Nothing.
    Host,
    /// Not even that: this core or the client provides it.
    Software,
    /// The secondary control without which RDTSCP and RDPID are #UD.
    Rdtscp,
    /// The secondary control without which INVPCID is #UD.
    Invpcid,
    /// XCR0 exists for the guest.
    Xsave,
    /// The guest can set XCR0.AVX.
    Avx,
    /// The guest can set XCR0's AVX-512 bits.
    Avx512,
    /// This CR4 bit may be 1 in VMX operation.
    Cr4(Cr4),
}

/// A feature that a guest can be offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    word: Word,
    bit: u32,
    need: Need,
}

macro_rules! features {
    ($($name:ident $text:literal $word:ident $bit:literal $need:expr;)*) => {
        impl Feature {
            $(
                #[doc = $text]
                pub const $name: Self = Self { word: Word::$word, bit: $bit, need: $need };
            )*
            /// Each after those it rests on.
            const OFFERED: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

// Not offered, with the reason:
// x2APIC, TSC-deadline: the client's APIC has neither. MONITOR, VMX, SMX: their
// instructions are not virtualised. DTES64, DS, PDCM, PBE: no PMU state is
// switched. EIST, TM, TM2, ACPI: no MSRs behind them. PKU, CET, LA57, MPX, AMX,
// Key Locker, XSAVES, WAITPKG: state or a control that is not switched. HLE,
// RTM: gone from most processors. SPEC_CTRL's group: its MSRs are not switched.
features! {
    FPU "x87." Leaf1Edx 0 Need::Host;
    VME "Virtual-8086 extensions." Leaf1Edx 1 Need::Host;
    DE "Debugging extensions." Leaf1Edx 2 Need::Host;
    PSE "4 MB pages." Leaf1Edx 3 Need::Host;
    TSC "RDTSC." Leaf1Edx 4 Need::Host;
    MSR "RDMSR and WRMSR." Leaf1Edx 5 Need::Host;
    PAE "Physical address extension." Leaf1Edx 6 Need::Host;
    MCE "Machine-check exception." Leaf1Edx 7 Need::Host;
    CX8 "CMPXCHG8B." Leaf1Edx 8 Need::Host;
    APIC "Local APIC: the client's." Leaf1Edx 9 Need::Software;
    SEP "SYSENTER." Leaf1Edx 11 Need::Host;
    // Kept and echoed: firmware sets them and Linux has no PAT without. Guest
    // memory is write-back whatever they say (the EPT's type, then the PAT).
    MTRR "Memory type range registers." Leaf1Edx 12 Need::Software;
    PGE "Global pages." Leaf1Edx 13 Need::Host;
    MCA "Machine-check architecture: one empty bank." Leaf1Edx 14 Need::Software;
    CMOV "CMOVcc." Leaf1Edx 15 Need::Host;
    PAT "Page attribute table." Leaf1Edx 16 Need::Host;
    // The processor walks the guest's tables, and our own walk knows the form.
    PSE36 "4 MB pages above 4 GB." Leaf1Edx 17 Need::Host;
    CLFSH "CLFLUSH." Leaf1Edx 19 Need::Host;
    MMX "MMX." Leaf1Edx 23 Need::Host;
    FXSR "FXSAVE and FXRSTOR." Leaf1Edx 24 Need::Host;
    SSE "SSE." Leaf1Edx 25 Need::Host;
    SSE2 "SSE2." Leaf1Edx 26 Need::Host;
    SS "Self-snoop." Leaf1Edx 27 Need::Host;
    HTT "EBX[23:16] of leaf 1 counts." Leaf1Edx 28 Need::Software;

    SSE3 "SSE3." Leaf1Ecx 0 Need::Host;
    PCLMULQDQ "PCLMULQDQ." Leaf1Ecx 1 Need::Host;
    SSSE3 "SSSE3." Leaf1Ecx 9 Need::Host;
    CX16 "CMPXCHG16B." Leaf1Ecx 13 Need::Host;
    PCID "Process-context identifiers." Leaf1Ecx 17 Need::Cr4(Cr4::PCIDE);
    SSE4_1 "SSE4.1." Leaf1Ecx 19 Need::Host;
    SSE4_2 "SSE4.2." Leaf1Ecx 20 Need::Host;
    MOVBE "MOVBE." Leaf1Ecx 22 Need::Host;
    POPCNT "POPCNT." Leaf1Ecx 23 Need::Host;
    AES "AES-NI." Leaf1Ecx 25 Need::Host;
    XSAVE "XSAVE and XCR0." Leaf1Ecx 26 Need::Xsave;
    AVX "AVX." Leaf1Ecx 28 Need::Avx;
    FMA "FMA." Leaf1Ecx 12 Need::Avx;
    F16C "Half-precision conversion." Leaf1Ecx 29 Need::Avx;
    RDRAND "RDRAND." Leaf1Ecx 30 Need::Host;
    HYPERVISOR "A hypervisor is there." Leaf1Ecx 31 Need::Software;

    FSGSBASE "RDFSBASE and its family." Leaf7Ebx 0 Need::Cr4(Cr4::FSGSBASE);
    TSC_ADJUST "IA32_TSC_ADJUST." Leaf7Ebx 1 Need::Software;
    BMI1 "BMI1." Leaf7Ebx 3 Need::Host;
    AVX2 "AVX2." Leaf7Ebx 5 Need::Avx;
    FDP_EXCPTN_ONLY "x87 data pointer kept on exceptions only." Leaf7Ebx 6 Need::Host;
    SMEP "Supervisor-mode execution prevention." Leaf7Ebx 7 Need::Cr4(Cr4::SMEP);
    BMI2 "BMI2." Leaf7Ebx 8 Need::Host;
    ERMS "Fast REP MOVSB and STOSB." Leaf7Ebx 9 Need::Host;
    INVPCID "INVPCID." Leaf7Ebx 10 Need::Invpcid;
    NO_FPU_CS_DS "x87 CS and DS are not kept." Leaf7Ebx 13 Need::Host;
    AVX512F "AVX-512 foundation." Leaf7Ebx 16 Need::Avx512;
    AVX512DQ "AVX-512 DQ." Leaf7Ebx 17 Need::Avx512;
    RDSEED "RDSEED." Leaf7Ebx 18 Need::Host;
    ADX "ADCX and ADOX." Leaf7Ebx 19 Need::Host;
    SMAP "Supervisor-mode access prevention." Leaf7Ebx 20 Need::Cr4(Cr4::SMAP);
    AVX512_IFMA "AVX-512 IFMA." Leaf7Ebx 21 Need::Avx512;
    CLFLUSHOPT "CLFLUSHOPT." Leaf7Ebx 23 Need::Host;
    CLWB "CLWB." Leaf7Ebx 24 Need::Host;
    AVX512CD "AVX-512 CD." Leaf7Ebx 28 Need::Avx512;
    SHA "SHA." Leaf7Ebx 29 Need::Host;
    AVX512BW "AVX-512 BW." Leaf7Ebx 30 Need::Avx512;
    AVX512VL "AVX-512 VL." Leaf7Ebx 31 Need::Avx512;

    AVX512_VBMI "AVX-512 VBMI." Leaf7Ecx 1 Need::Avx512;
    UMIP "User-mode instruction prevention." Leaf7Ecx 2 Need::Cr4(Cr4::UMIP);
    AVX512_VBMI2 "AVX-512 VBMI2." Leaf7Ecx 6 Need::Avx512;
    GFNI "GFNI." Leaf7Ecx 8 Need::Host;
    VAES "AES on YMM and ZMM." Leaf7Ecx 9 Need::Avx;
    VPCLMULQDQ "PCLMULQDQ on YMM and ZMM." Leaf7Ecx 10 Need::Avx;
    AVX512_VNNI "AVX-512 VNNI." Leaf7Ecx 11 Need::Avx512;
    AVX512_BITALG "AVX-512 BITALG." Leaf7Ecx 12 Need::Avx512;
    AVX512_VPOPCNTDQ "AVX-512 VPOPCNT." Leaf7Ecx 14 Need::Avx512;
    RDPID "RDPID." Leaf7Ecx 22 Need::Rdtscp;

    FSRM "Fast short REP MOVSB." Leaf7Edx 4 Need::Host;
    MD_CLEAR "VERW clears buffers." Leaf7Edx 10 Need::Host;
    SERIALIZE "SERIALIZE." Leaf7Edx 14 Need::Host;
    AVX512_FP16 "AVX-512 FP16." Leaf7Edx 23 Need::Avx512;

    AVX_VNNI "AVX VNNI." Leaf7Sub1Eax 4 Need::Avx;
    AVX512_BF16 "AVX-512 BF16." Leaf7Sub1Eax 5 Need::Avx512;
    FZLRM "Fast zero-length REP MOVSB." Leaf7Sub1Eax 10 Need::Host;
    FSRS "Fast short REP STOSB." Leaf7Sub1Eax 11 Need::Host;
    FSRCS "Fast short REP CMPSB and SCASB." Leaf7Sub1Eax 12 Need::Host;

    XSAVEOPT "XSAVEOPT." LeafDSub1Eax 0 Need::Xsave;
    XSAVEC "XSAVEC and compacted XRSTOR." LeafDSub1Eax 1 Need::Xsave;
    XGETBV1 "XGETBV with ECX = 1." LeafDSub1Eax 2 Need::Xsave;

    LAHF "LAHF and SAHF in 64-bit mode." ExtendedEcx 0 Need::Host;
    LZCNT "LZCNT." ExtendedEcx 5 Need::Host;
    PREFETCHW "PREFETCHW." ExtendedEcx 8 Need::Host;
    SYSCALL "SYSCALL." ExtendedEdx 11 Need::Host;
    NX "Execute disable." ExtendedEdx 20 Need::Host;
    PAGE_1GB "1 GB pages." ExtendedEdx 26 Need::Host;
    RDTSCP "RDTSCP." ExtendedEdx 27 Need::Rdtscp;
    LM "64-bit mode." ExtendedEdx 29 Need::Host;
}

impl Feature {
    const fn mask(self) -> u32 {
        1u32.wrapping_shl(self.bit)
    }
}

/// Bits that SET_CPUID cannot take away, as in HAXM.
const FORCED: [Feature; 2] = [Feature::HYPERVISOR, Feature::APIC];

/// CR4 bits and the feature that brings each, SDM 2.5 "Control Registers".
const CR4_FEATURES: [(Cr4, Feature); 17] = [
    (Cr4::VME, Feature::VME),
    (Cr4::PVI, Feature::VME),
    (Cr4::TSD, Feature::TSC),
    (Cr4::DE, Feature::DE),
    (Cr4::PSE, Feature::PSE),
    (Cr4::PAE, Feature::PAE),
    (Cr4::MCE, Feature::MCE),
    (Cr4::PGE, Feature::PGE),
    (Cr4::OSFXSR, Feature::FXSR),
    (Cr4::OSXMMEXCPT, Feature::SSE),
    (Cr4::UMIP, Feature::UMIP),
    (Cr4::FSGSBASE, Feature::FSGSBASE),
    (Cr4::PCIDE, Feature::PCID),
    (Cr4::OSXSAVE, Feature::XSAVE),
    (Cr4::SMEP, Feature::SMEP),
    (Cr4::SMAP, Feature::SMAP),
    // RDPMC is older than the feature bits; it exits and counts nothing.
    (Cr4::PCE, Feature::APIC),
];

/// The virtual processor that executes CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// What the table lets a guest use, for the rest of the core. Small: keep a
/// copy, take a new one when the table has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    words: [u32; WORDS.len()],
    xcr0: u64,
    cr4: u64,
    physical_bits: u8,
}

impl Features {
    /// The guest has this feature.
    #[must_use]
    pub fn has(&self, feature: Feature) -> bool {
        let word = self.words.get(feature.word as usize);
        word.is_some_and(|word| word & feature.mask() != 0)
    }

    /// CR4 bits that the guest may set; the others are reserved.
    #[must_use]
    pub const fn allowed_cr4(&self) -> u64 {
        self.cr4
    }

    /// XCR0 bits that the guest may set; 0 if it has no XSAVE.
    #[must_use]
    pub const fn allowed_xcr0(&self) -> u64 {
        self.xcr0
    }

    /// EFER bits that the guest may set, LMA included, SDM 2.2.1 "Extended
    /// Feature Enable Register".
    #[must_use]
    pub fn allowed_efer(&self) -> u64 {
        let mut bits = Efer::empty();
        bits.set(Efer::SCE, self.has(Feature::SYSCALL));
        bits.set(Efer::LME | Efer::LMA, self.has(Feature::LM));
        bits.set(Efer::NXE, self.has(Feature::NX));
        bits.bits()
    }

    /// Bits of a physical address, MAXPHYADDR.
    #[must_use]
    pub const fn physical_bits(&self) -> u8 {
        self.physical_bits
    }
}

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
/// Leaf 6 EAX: the APIC timer never stops; the client's does not.
const ARAT: u32 = 1 << 2;
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

/// Bits that the numbers below `count` need: the shift of leaf 0xB.
fn id_bits(count: u8) -> u32 {
    u32::from(count.max(1)).next_power_of_two().trailing_zeros()
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
    }

    /// The table for a host that answers CPUID with `host`, lends XCR0 bits
    /// `host_xcr0`, and has these VMX capabilities.
    fn build(
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
            this.set_row(4, CpuidResult::default());
        }
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
            (7 | 0xd, 1) | (0x8000_0008, _) => eax_only(host.eax),
            (0x15 | 0x16, _) => host,
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
            // 0xA: no performance counter is virtualised. 0xD.0 and
            // 0x80000008 are worked out in `settle`.
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

    /// The row of a leaf whose subleaf 0 is in the table.
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
                Need::Xsave => self.host_xcr0.contains(Xcr0::X87 | Xcr0::SSE),
                Need::Avx => self.allowed_xcr0().contains(Xcr0::AVX),
                Need::Avx512 => self.allowed_xcr0().contains(AVX512_STATE),
                _ => true,
            };
            // XSAVE and AVX-512F themselves open what the others rest on.
            let rests_on = match *feature {
                Feature::AVX => self.has(Feature::XSAVE) && self.host_xcr0.contains(Xcr0::AVX),
                Feature::AVX512F => self.has(Feature::AVX) && self.host_xcr0.contains(AVX512_STATE),
                Feature::XSAVEOPT | Feature::XSAVEC | Feature::XGETBV1 => {
                    founded && self.has(Feature::XSAVE)
                }
                _ => founded,
            };
            if !rests_on {
                self.set_word(feature.word, self.word(feature.word) & !feature.mask());
            }
        }
        // The highest subleaf of leaf 7: 1 only where there is something in it.
        if self.word(Word::Leaf7Sub1Eax) == 0 {
            let row = self.row(3);
            self.set_row(3, CpuidResult { eax: 0, ..row });
        }
        let all = View {
            apic_id: 0,
            vcpus: 1,
            cr4: 0,
            xcr0: self.allowed_xcr0().bits(),
        };
        self.set_row(6, self.xsave_leaf(0, &all));
        self.set_row(7, self.xsave_leaf(1, &all));
        let bits = (self.row(17).eax & 0xff).clamp(32, self.physical_bits);
        self.set_row(17, eax_only(LINEAR_BITS << 8 | bits));
    }

    /// XCR0 bits of the features in the table.
    fn allowed_xcr0(&self) -> Xcr0 {
        let mut bits = self.host_xcr0;
        if !self.has(Feature::XSAVE) {
            return Xcr0::empty();
        }
        if !self.has(Feature::AVX) {
            bits.remove(Xcr0::AVX | AVX512_STATE);
        }
        if !self.has(Feature::AVX512F) {
            bits.remove(AVX512_STATE);
        }
        bits
    }

    /// What the rest of the core wants to know of the table.
    #[must_use]
    pub fn features(&self) -> Features {
        let mut words = [0; WORDS.len()];
        for (word, value) in WORDS.into_iter().zip(&mut words) {
            *value = self.word(word);
        }
        let cr4 = CR4_FEATURES
            .into_iter()
            .filter(|(_, feature)| self.has(*feature))
            .fold(Cr4::empty(), |bits, (bit, _)| bits | bit);
        Features {
            words,
            xcr0: self.allowed_xcr0().bits(),
            cr4: (cr4 & self.cr4).bits(),
            physical_bits: self.row(17).eax as u8,
        }
    }

    /// What CPUID with EAX = `leaf`, ECX = `subleaf` returns. A leaf that is
    /// not there is all zero, as in HAXM.
    #[must_use]
    pub fn lookup(&self, leaf: u32, subleaf: u32, view: &View) -> CpuidResult {
        match leaf {
            0 | 0x8000_0000 => return self.row_of(leaf, 0),
            1..0x4000_0000 if leaf > self.row(0).eax => return CpuidResult::default(),
            0x8000_0001.. if leaf > self.row(11).eax => return CpuidResult::default(),
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
        let mut row = self.row(1);
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
    fn xsave_leaf(&self, subleaf: u32, view: &View) -> CpuidResult {
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
            (2 | 0x15 | 0x4000_0000 | 0x8000_0002..=0x8000_0004, _) => verbatim,
            // 0xA has no counters to describe; 0xD is not settable.
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
