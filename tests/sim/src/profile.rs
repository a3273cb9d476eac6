//! Which processor is simulated: its capability registers, its CPUID leaves,
//! its other MSRs. Capability values were read from real or emulated models.

mod variations;

use std::collections::BTreeMap;

use vmx::arch::msr;
use vmx::cpu::CpuidResult;

/// CPUID.1:ECX.OSXSAVE mirrors CR4.OSXSAVE.
pub(crate) const CPUID_OSXSAVE: u32 = 1 << 27;
const CPUID_VMX: u32 = 1 << 5;
const SECONDARY_EPT: u64 = 1 << (32 + 1);
const SECONDARY_UG: u64 = 1 << (32 + 7);

/// One extended component that XSAVE manages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Component {
    /// Its bit in XCR0.
    pub(crate) bit: u32,
    /// Bytes into the standard-form area.
    pub(crate) offset: usize,
    /// Bytes.
    pub(crate) size: usize,
}

/// A processor model.
#[derive(Clone, Debug)]
pub struct Profile {
    /// For messages.
    pub name: &'static str,
    /// Every MSR and its value at start. An access to another is a #GP.
    pub msrs: BTreeMap<u32, u64>,
    /// CPUID by leaf and subleaf; subleaf 0 also answers for subleaves not listed
    /// of leaves that have none.
    pub cpuid: BTreeMap<(u32, u32), CpuidResult>,
    /// Bits of a physical address.
    pub physical_bits: u32,
    /// Bits of a linear address.
    pub linear_bits: u32,
    /// CR4 of the host before VMXE is set.
    pub host_cr4: u64,
    /// XCR0 bits that XSETBV accepts.
    pub xcr0_supported: u64,
    /// Performance counters that CPUID shows are there.
    pub keeps_counts: bool,
    pub(crate) components: Vec<Component>,
}

/// Whether `address` is canonical where addresses have this many bits.
pub(crate) fn canonical_in(bits: u32, address: u64) -> bool {
    let copies = address >> (bits - 1);
    copies == 0 || copies == u64::MAX >> (bits - 1)
}

fn regs(eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidResult {
    CpuidResult { eax, ebx, ecx, edx }
}

/// `text` as the four registers of a leaf, in the order given.
fn text_leaf(text: &[u8; 16]) -> CpuidResult {
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&text[at..at + 4]);
        u32::from_le_bytes(bytes)
    };
    regs(word(0), word(4), word(8), word(12))
}

/// MSRs that every model here has, with plausible values.
fn common_msrs() -> BTreeMap<u32, u64> {
    let mut msrs = BTreeMap::from([
        (msr::IA32_TSC, 0),
        (0x17, 0),
        (msr::IA32_APIC_BASE, 0xfee0_0900),
        (msr::IA32_FEATURE_CONTROL, 5),
        (msr::IA32_TSC_ADJUST, 0),
        (0x8b, 0x28_0000_0000),
        (0xfe, 0x508),
        (msr::IA32_SYSENTER_CS, 0x10),
        (msr::IA32_SYSENTER_ESP, 0xffff_8880_0000_1000),
        (msr::IA32_SYSENTER_EIP, 0xffff_ffff_8180_0000),
        (0x179, 0xc09),
        (0x17a, 0),
        (0x1a0, 0x85_0089),
        (msr::IA32_DEBUGCTL, 0),
        (msr::IA32_PAT, 0x0407_0105_0007_0106),
        (0x2ff, 0xc00),
        (0x309, 0),
        (0x38d, 0),
        (0x38e, 0),
        (msr::IA32_PERF_GLOBAL_CTRL, 0x7_0000_000f),
        (msr::IA32_PERF_CAPABILITIES, 0x31c3),
        (msr::IA32_PEBS_ENABLE, 0),
        (0x390, 0),
        (msr::IA32_EFER, 0xd01),
        (msr::IA32_STAR, 0x0023_0010_0000_0000),
        (msr::IA32_LSTAR, 0xffff_ffff_8190_0000),
        (msr::IA32_CSTAR, 0xffff_ffff_8190_1000),
        (msr::IA32_FMASK, 0x4_7700),
        (msr::IA32_FS_BASE, 0x7f12_3456_7000),
        (msr::IA32_GS_BASE, 0xffff_8880_3fc0_0000),
        (msr::IA32_KERNEL_GSBASE, 0x7f12_0000_1000),
        (msr::IA32_TSC_AUX, 0),
    ]);
    for n in 0..16 {
        msrs.insert(0x200 + n, 0);
    }
    // The host counts cycles to find processors that are stuck.
    for n in 0..4 {
        let selector = if n == 0 { 0x53_003c } else { 0 };
        msrs.insert(msr::IA32_PERFEVTSEL0 + n, selector);
        msrs.insert(msr::IA32_PMC0 + n, 0xffff_8000_0001);
        msrs.insert(msr::IA32_A_PMC0 + n, 0);
    }
    for n in [
        0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
    ] {
        msrs.insert(n, 0x0606_0606_0606_0606);
    }
    msrs
}

fn common_cpuid(physical_bits: u32) -> BTreeMap<(u32, u32), CpuidResult> {
    BTreeMap::from([
        ((0, 0), regs(0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69)),
        ((2, 0), regs(0x7603_6301, 0x00f0_b5ff, 0, 0x00c1_0000)),
        ((4, 0), regs(0x1c00_4121, 0x01c0_003f, 0x3f, 0)),
        ((4, 1), regs(0x1c00_4122, 0x01c0_003f, 0x3f, 0)),
        ((4, 2), regs(0x1c00_4143, 0x01c0_003f, 0x1ff, 0)),
        ((4, 3), regs(0x1c03_c163, 0x03c0_003f, 0x1fff, 6)),
        ((4, 4), CpuidResult::default()),
        ((5, 0), regs(0x40, 0x40, 3, 0x4_2120)),
        ((6, 0), regs(0x77, 2, 9, 0)),
        ((0xa, 0), regs(0x0730_0403, 0, 0, 0x603)),
        ((0xb, 0), regs(1, 2, 0x100, 0)),
        ((0xb, 1), regs(4, 8, 0x201, 0)),
        ((0xb, 2), regs(0, 0, 2, 0)),
        ((0x8000_0000, 0), regs(0x8000_0008, 0, 0, 0)),
        ((0x8000_0001, 0), regs(0, 0, 0x21, 0x2c10_0800)),
        ((0x8000_0002, 0), text_leaf(b"Simulated proces")),
        ((0x8000_0003, 0), text_leaf(b"sor with VMX\0\0\0\0")),
        ((0x8000_0004, 0), text_leaf(&[0; 16])),
        ((0x8000_0006, 0), regs(0, 0, 0x100_6040, 0)),
        ((0x8000_0007, 0), regs(0, 0, 0, 0x100)),
        ((0x8000_0008, 0), regs(0x3000 | physical_bits, 0, 0, 0)),
    ])
}

impl Profile {
    /// A Haswell: EPT with accessed and dirty flags, 1 GB pages, unrestricted
    /// guest; the values of the emulated test machine.
    #[must_use]
    pub fn haswell() -> Self {
        let mut msrs = common_msrs();
        msrs.extend([
            (0x480, 0x00d8_1000_0000_002b),
            (0x481, 0x0000_007f_0000_0016),
            (0x482, 0xfff9_fffe_0401_e172),
            (0x483, 0x407f_ffff_0003_6dff),
            (0x484, 0x0000_ffff_0000_11ff),
            (0x485, 0x0000_0000_2004_01e0),
            (0x486, 0x8000_0021),
            (0x487, 0xffff_ffff),
            (0x488, 0x2000),
            (0x489, 0x17_27ff),
            (0x48a, 0x50),
            (0x48b, 0x0004_77ff_0000_0000),
            (0x48c, 0x0000_0f01_0633_4141),
            (0x48d, 0x0000_007f_0000_0016),
            (0x48e, 0xfff9_fffe_0400_6172),
            (0x48f, 0x407f_ffff_0003_6dfb),
            (0x490, 0x0000_ffff_0000_11fb),
            (0x491, 1),
            (msr::IA32_ARCH_CAPABILITIES, 0),
        ]);
        let mut cpuid = common_cpuid(39);
        cpuid.extend([
            ((1, 0), regs(0x306c3, 0x0010_0800, 0x3ffa_fbff, 0xbfeb_fbff)),
            ((7, 0), regs(0, 0x27ab, 0, 0)),
            ((0xd, 0), regs(7, 832, 832, 0)),
            ((0xd, 1), regs(1, 0, 0, 0)),
            ((0xd, 2), regs(256, 576, 0, 0)),
        ]);
        Self {
            name: "haswell",
            msrs,
            cpuid,
            physical_bits: 39,
            linear_bits: 48,
            host_cr4: 0x17_06e0,
            xcr0_supported: 7,
            keeps_counts: true,
            components: vec![Component {
                bit: 2,
                offset: 576,
                size: 256,
            }],
        }
    }

    /// A Skylake server: AVX-512, XSAVES, speculation control, PML, TSC scaling.
    #[must_use]
    pub fn skylake_x() -> Self {
        let mut this = Self::haswell();
        this.name = "skylake_x";
        this.msrs.extend([
            (0x481, 0x0000_00ff_0000_0016),
            (0x485, 0x6004_01e0),
            (0x489, 0x37_27ff),
            (0x48b, 0x0256_77ff_0000_0000),
            (0x48c, 0x0000_0f01_0673_4141),
            (0x48d, 0x0000_00ff_0000_0016),
            (msr::IA32_SPEC_CTRL, 1),
            (msr::IA32_PRED_CMD, 0),
            (msr::IA32_FLUSH_CMD, 0),
            (msr::IA32_XSS, 0),
            (msr::IA32_ARCH_CAPABILITIES, 0x2b),
        ]);
        this.physical_bits = 46;
        this.host_cr4 |= 1 << 21;
        this.xcr0_supported = 0xe7;
        this.components.extend([
            Component {
                bit: 5,
                offset: 1088,
                size: 64,
            },
            Component {
                bit: 6,
                offset: 1152,
                size: 512,
            },
            Component {
                bit: 7,
                offset: 1664,
                size: 1024,
            },
        ]);
        this.cpuid.extend([
            ((1, 0), regs(0x50654, 0x0010_0800, 0x7ffe_fbff, 0xbfeb_fbff)),
            ((7, 0), regs(0, 0xd39f_ffeb, 8, 0xbc00_0000)),
            ((0xd, 0), regs(0xe7, 2688, 2688, 0)),
            ((0xd, 1), regs(0xf, 2688, 0, 0)),
            ((0xd, 5), regs(64, 1088, 0, 0)),
            ((0xd, 6), regs(512, 1152, 0, 0)),
            ((0xd, 7), regs(1024, 1664, 0, 0)),
            ((0x8000_0008, 0), regs(0x302e, 0, 0, 0)),
        ]);
        this
    }

    /// A Penryn: no EPT, no VPID, no unrestricted guest, no TRUE controls, no
    /// PAT or EFER switching, no XSAVE in use.
    #[must_use]
    pub fn no_ept() -> Self {
        let mut this = Self::haswell();
        this.name = "no_ept";
        for gone in [
            0x48c,
            0x48d,
            0x48e,
            0x48f,
            0x490,
            0x491,
            msr::IA32_ARCH_CAPABILITIES,
        ] {
            this.msrs.remove(&gone);
        }
        this.msrs.extend([
            (0x480, 0x005a_0800_0000_000d),
            (0x481, 0x0000_003f_0000_0016),
            (0x482, 0xf7f9_fffe_0401_e172),
            (0x483, 0x0003_ffff_0003_6dff),
            (0x484, 0x0000_3fff_0000_11ff),
            (0x485, 0x0004_03c0),
            (0x489, 0x67ff),
            (0x48a, 0x2c),
            (0x48b, 0x0000_0041_0000_0000),
        ]);
        this.physical_bits = 36;
        this.host_cr4 = 0x6e0;
        this.xcr0_supported = 0;
        this.components.clear();
        this.cpuid.retain(|(leaf, _), _| *leaf != 0xd && *leaf != 7);
        this.cpuid.extend([
            ((0, 0), regs(0xa, 0x756e_6547, 0x6c65_746e, 0x4965_6e69)),
            ((1, 0), regs(0x10676, 0x0002_0800, 0x0008_e3fd, 0xbfeb_fbff)),
            ((0x8000_0001, 0), regs(0, 0, 1, 0x2010_0800)),
            ((0x8000_0008, 0), regs(0x3024, 0, 0, 0)),
        ]);
        this
    }

    /// A Lynnfield: EPT and VPID, but no unrestricted guest.
    #[must_use]
    pub fn no_unrestricted_guest() -> Self {
        let mut this = Self::haswell();
        this = this.without_full_width_writes();
        this.name = "no_unrestricted_guest";
        this.msrs.remove(&0x491);
        this.msrs.extend([
            (0x489, 0x67ff),
            (0x48b, 0x0000_006f_0000_0000),
            (0x48c, 0x0000_0f01_0611_4141),
        ]);
        debug_assert_eq!(this.msrs[&0x48b] & SECONDARY_UG, 0);
        debug_assert_ne!(this.msrs[&0x48b] & SECONDARY_EPT, 0);
        this.physical_bits = 36;
        this.host_cr4 = 0x6e0;
        this.xcr0_supported = 0;
        this.components.clear();
        this.cpuid.retain(|(leaf, _), _| *leaf != 0xd && *leaf != 7);
        this.cpuid.extend([
            ((0, 0), regs(0xb, 0x756e_6547, 0x6c65_746e, 0x4965_6e69)),
            ((1, 0), regs(0x106e5, 0x0010_0800, 0x0098_e3fd, 0xbfeb_fbff)),
            ((0x8000_0008, 0), regs(0x3024, 0, 0, 0)),
        ]);
        this
    }

    /// A Haswell under a hypervisor that hides EPT, VPID and unrestricted guest.
    #[must_use]
    pub fn hidden_ept() -> Self {
        let mut this = Self::haswell();
        this.name = "hidden_ept";
        this.msrs.remove(&0x48c);
        this.msrs.remove(&0x491);
        this.msrs.insert(0x48b, 0x0000_104d_0000_0000);
        this
    }

    /// A Haswell under a hypervisor that hides VPID: INVVPID is #UD.
    #[must_use]
    pub fn no_vpid() -> Self {
        let mut this = Self::haswell();
        this.name = "no_vpid";
        this.msrs.insert(0x48b, 0x0004_77df_0000_0000);
        this.msrs.insert(0x48c, 0x0000_0000_0633_4141);
        this
    }

    /// A Haswell under a hypervisor that has no virtual APIC page for its guests:
    /// MOV CR8 exits.
    #[must_use]
    pub fn no_tpr_shadow() -> Self {
        let mut this = Self::haswell();
        this.name = "no_tpr_shadow";
        for msr in [0x482, 0x48e] {
            if let Some(value) = this.msrs.get_mut(&msr) {
                *value &= !(1 << (32 + 21));
            }
        }
        this
    }

    /// A processor without VMX: no CPUID bit, none of its MSRs.
    #[must_use]
    pub fn no_vmx() -> Self {
        let mut this = Self::haswell();
        this.name = "no_vmx";
        this.msrs
            .retain(|msr, _| !(0x480..=0x491).contains(msr) && *msr != msr::IA32_FEATURE_CONTROL);
        if let Some(leaf) = this.cpuid.get_mut(&(1, 0)) {
            leaf.ecx &= !CPUID_VMX;
        }
        this
    }

    /// VMX is there, but the firmware locked it off.
    #[must_use]
    pub fn locked_off() -> Self {
        let mut this = Self::haswell();
        this.name = "locked_off";
        this.msrs.insert(msr::IA32_FEATURE_CONTROL, 1);
        this
    }

    /// VMX is there, and the firmware left IA32_FEATURE_CONTROL as at reset.
    #[must_use]
    pub fn unlocked() -> Self {
        let mut this = Self::haswell();
        this.name = "unlocked";
        this.msrs.insert(msr::IA32_FEATURE_CONTROL, 0);
        this
    }

    /// A processor that insists on control bits nobody has named (pin 8, primary
    /// 18, exit 16, entry 8), and whose MISC register forbids writes to exit
    /// information.
    #[must_use]
    pub fn odd_required_bits() -> Self {
        let mut this = Self::haswell();
        this.name = "odd_required_bits";
        let mut require = |msr: u32, bit: u32| {
            if let Some(value) = this.msrs.get_mut(&msr) {
                *value |= (1u64 << bit) | (1u64 << (bit + 32));
            }
        };
        for msr in [0x481, 0x48d] {
            require(msr, 8);
        }
        for msr in [0x482, 0x48e] {
            require(msr, 18);
        }
        for msr in [0x483, 0x48f] {
            require(msr, 16);
        }
        for msr in [0x484, 0x490] {
            require(msr, 8);
        }
        this.msrs.insert(0x485, 0x0004_01e0);
        this
    }

    /// A processor that cannot do external-interrupt exiting: of no use, so the
    /// core must refuse it.
    #[must_use]
    pub fn no_external_interrupt_exiting() -> Self {
        let mut this = Self::haswell();
        this.name = "no_external_interrupt_exiting";
        for msr in [0x481, 0x48d] {
            if let Some(value) = this.msrs.get_mut(&msr) {
                *value &= !(1 << 32);
            }
        }
        this
    }

    /// Every profile on which guests can run.
    #[must_use]
    pub fn working() -> Vec<Self> {
        vec![
            Self::haswell(),
            Self::skylake_x(),
            Self::no_unrestricted_guest(),
            Self::odd_required_bits(),
            Self::no_vpid(),
            Self::no_tpr_shadow(),
        ]
    }

    /// The value of an MSR at start; 0 if it is not there.
    #[must_use]
    pub fn msr(&self, number: u32) -> u64 {
        self.msrs.get(&number).copied().unwrap_or(0)
    }

    /// Whether the secondary control `bit` may be 1.
    #[must_use]
    pub fn allows_secondary(&self, bit: u32) -> bool {
        self.allows_primary(31) && self.msr(0x48b) >> (32 + bit) & 1 != 0
    }

    /// Whether the primary control `bit` may be 1.
    #[must_use]
    pub fn allows_primary(&self, bit: u32) -> bool {
        self.control_caps(0x482) >> (32 + bit) & 1 != 0
    }

    /// Whether the pin-based control `bit` may be 1.
    #[must_use]
    pub fn allows_pin(&self, bit: u32) -> bool {
        self.control_caps(0x481) >> (32 + bit) & 1 != 0
    }

    /// Whether the VM-exit control `bit` may be 1.
    #[must_use]
    pub fn allows_exit(&self, bit: u32) -> bool {
        self.control_caps(0x483) >> (32 + bit) & 1 != 0
    }

    /// Whether the VM-entry control `bit` may be 1.
    #[must_use]
    pub fn allows_entry(&self, bit: u32) -> bool {
        self.control_caps(0x484) >> (32 + bit) & 1 != 0
    }

    /// The capability register that rules a control word (0x481 to 0x484): its
    /// TRUE form if the processor has one.
    #[must_use]
    pub fn control_caps(&self, base: u32) -> u64 {
        if self.msr(0x480) >> 55 & 1 != 0 {
            self.msr(base + 0xc)
        } else {
            self.msr(base)
        }
    }

    /// Whether `address` is canonical on this processor.
    #[must_use]
    pub fn canonical(&self, address: u64) -> bool {
        canonical_in(self.linear_bits, address)
    }

    /// Whether `address` lies within the physical-address width.
    #[must_use]
    pub fn physical(&self, address: u64) -> bool {
        address >> self.physical_bits == 0
    }

    /// CPUID as the processor answers it, with CR4.OSXSAVE `osxsave`, in a
    /// processor numbered `cpu`, with this XCR0.
    pub(crate) fn cpuid_answer(
        &self,
        leaf: u32,
        subleaf: u32,
        osxsave: bool,
        cpu: u32,
        xcr0: u64,
    ) -> CpuidResult {
        let indexed = matches!(leaf, 4 | 7 | 0xb | 0xd);
        let key = (leaf, if indexed { subleaf } else { 0 });
        let mut found = self.cpuid.get(&key).copied().unwrap_or_default();
        match leaf {
            1 => {
                if osxsave {
                    found.ecx |= CPUID_OSXSAVE;
                } else {
                    found.ecx &= !CPUID_OSXSAVE;
                }
                found.ebx = (found.ebx & 0x00ff_ffff) | (cpu << 24);
            }
            0xb => found.edx = cpu,
            0xd if subleaf == 0 && found.eax != 0 => {
                found.ebx = u32::try_from(self.xsave_size(xcr0)).unwrap_or(0);
            }
            _ => {}
        }
        found
    }

    /// Bytes of a standard-form XSAVE area for these components.
    pub(crate) fn xsave_size(&self, components: u64) -> usize {
        self.components
            .iter()
            .filter(|c| components >> c.bit & 1 != 0)
            .map(|c| c.offset + c.size)
            .max()
            .unwrap_or(576)
            .max(576)
    }
}
