//! The features a guest can be offered, what each needs, and the words of the
//! CPUID table they are bits of.

use super::place;
use crate::arch::reg::{Cr4, Efer};
use crate::cpu::CpuidResult;

/// A register of a row that is a set of features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
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

pub(super) const WORDS: [Word; 9] = [
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
    /// The row of the table that the word is in.
    pub(super) const fn row(self) -> usize {
        match self {
            Self::Leaf1Ecx | Self::Leaf1Edx => place::LEAF_1,
            Self::Leaf7Ebx | Self::Leaf7Ecx | Self::Leaf7Edx => place::LEAF_7,
            Self::Leaf7Sub1Eax => place::LEAF_7_SUB_1,
            Self::LeafDSub1Eax => place::LEAF_D_SUB_1,
            Self::ExtendedEcx | Self::ExtendedEdx => place::EXTENDED_1,
        }
    }

    /// The word in that row.
    pub(super) fn of(self, result: &mut CpuidResult) -> &mut u32 {
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
pub(super) enum Need {
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
    /// XCR0 exists, and the secondary control without which XSAVES is #UD is 1.
    Xsaves,
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
    pub(super) word: Word,
    bit: u32,
    pub(super) need: Need,
}

macro_rules! features {
    ($($name:ident $text:literal $word:ident $bit:literal $need:expr;)*) => {
        impl Feature {
            $(
                #[doc = $text]
                pub const $name: Self = Self { word: Word::$word, bit: $bit, need: $need };
            )*
            /// Each after those it rests on.
            pub(super) const OFFERED: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

// Not offered, with the reason:
// x2APIC, TSC-deadline: the client's APIC has neither. MONITOR, VMX, SMX: their
// instructions are not virtualised. DTES64, DS, PDCM, PBE: of the performance
// counters only version 1 is there. EIST, TM, TM2, ACPI: no MSRs behind them. PKU, CET, LA57, MPX, AMX,
// Key Locker, WAITPKG: state or a control that is not switched. HLE,
// RTM: gone from most processors.
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
    IBRS_IBPB "IA32_SPEC_CTRL.IBRS and IA32_PRED_CMD." Leaf7Edx 26 Need::Host;
    STIBP "IA32_SPEC_CTRL.STIBP." Leaf7Edx 27 Need::Host;
    L1D_FLUSH "IA32_FLUSH_CMD." Leaf7Edx 28 Need::Host;
    ARCH_CAPABILITIES "IA32_ARCH_CAPABILITIES." Leaf7Edx 29 Need::Host;
    SSBD "IA32_SPEC_CTRL.SSBD." Leaf7Edx 31 Need::Host;

    AVX_VNNI "AVX VNNI." Leaf7Sub1Eax 4 Need::Avx;
    AVX512_BF16 "AVX-512 BF16." Leaf7Sub1Eax 5 Need::Avx512;
    FZLRM "Fast zero-length REP MOVSB." Leaf7Sub1Eax 10 Need::Host;
    FSRS "Fast short REP STOSB." Leaf7Sub1Eax 11 Need::Host;
    FSRCS "Fast short REP CMPSB and SCASB." Leaf7Sub1Eax 12 Need::Host;

    XSAVEOPT "XSAVEOPT." LeafDSub1Eax 0 Need::Xsave;
    XSAVEC "XSAVEC and compacted XRSTOR." LeafDSub1Eax 1 Need::Xsave;
    XGETBV1 "XGETBV with ECX = 1." LeafDSub1Eax 2 Need::Xsave;
    XSAVES "XSAVES and XRSTORS, of user state." LeafDSub1Eax 3 Need::Xsaves;

    LAHF "LAHF and SAHF in 64-bit mode." ExtendedEcx 0 Need::Host;
    LZCNT "LZCNT." ExtendedEcx 5 Need::Host;
    PREFETCHW "PREFETCHW." ExtendedEcx 8 Need::Host;
    SYSCALL "SYSCALL." ExtendedEdx 11 Need::Host;
    NX "Execute disable." ExtendedEdx 20 Need::Host;
    PAGE1GB "1 GB pages." ExtendedEdx 26 Need::Host;
    RDTSCP "RDTSCP." ExtendedEdx 27 Need::Rdtscp;
    LM "64-bit mode." ExtendedEdx 29 Need::Host;
}

impl Feature {
    /// Its bit of the word.
    pub(super) const fn mask(self) -> u32 {
        1u32.wrapping_shl(self.bit)
    }
}

/// Bits that SET_CPUID cannot take away, as in HAXM.
pub(super) const FORCED: [Feature; 2] = [Feature::HYPERVISOR, Feature::APIC];

/// CR4 bits and the feature that brings each, SDM 2.5 "Control Registers".
pub(super) const CR4_FEATURES: [(Cr4, Feature); 16] = [
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
];

/// What the table lets a guest use, for the rest of the core. Small: keep a
/// copy, take a new one when the table has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    words: [u32; WORDS.len()],
    xcr0: u64,
    cr4: u64,
    physical_bits: u8,
    /// EAX of leaf 0xA.
    counters: u32,
}

impl Features {
    /// The features in `words`, with XCR0 bits `xcr0`, CR4 bits out of
    /// `possible`, physical addresses of `physical_bits` bits, and EAX of leaf 0xA.
    pub(super) fn new(
        words: [u32; WORDS.len()],
        xcr0: u64,
        possible: Cr4,
        physical_bits: u8,
        counters: u32,
    ) -> Self {
        let mut this = Self {
            words,
            xcr0,
            cr4: 0,
            physical_bits,
            counters,
        };
        // RDPMC is older than feature bits: PCE is always there.
        let cr4 = CR4_FEATURES
            .into_iter()
            .filter(|(_, feature)| this.has(*feature))
            .fold(Cr4::PCE, |bits, (bit, _)| bits | bit);
        this.cr4 = (cr4 & possible).bits();
        this
    }

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

    /// IA32_SPEC_CTRL bits that the guest may set; 0: it has no such register.
    #[must_use]
    pub fn allowed_spec_ctrl(&self) -> u64 {
        u64::from(self.has(Feature::IBRS_IBPB))
            | u64::from(self.has(Feature::STIBP)) << 1
            | u64::from(self.has(Feature::SSBD)) << 2
    }

    /// Performance counters that the guest has.
    #[must_use]
    pub const fn counters(&self) -> u8 {
        let [_, counters, _, _] = self.counters.to_le_bytes();
        counters
    }

    /// Bits of a physical address, MAXPHYADDR.
    #[must_use]
    pub const fn physical_bits(&self) -> u8 {
        self.physical_bits
    }
}
