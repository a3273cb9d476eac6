//! The performance counters that a guest can be lent: architectural version 1, as
//! HAXM offered them.
//!
//! SDM vol. 2, CPUID, leaf 0xA; vol. 3, 20.2 "Architectural Performance Monitoring".

use crate::arch::{msr, pmu};
use crate::cpu::{Cpu, CpuidResult};

/// The most counters a guest gets, as HAXM.
pub const MAX_COUNTERS: usize = 4;
/// Events of leaf 0xA that a guest is told of, as HAXM.
const MAX_EVENTS: u32 = 7;

/// What there is to lend. All zero: nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counters {
    /// CPUID leaf 0xA for a guest: version 1.
    pub leaf: CpuidResult,
    /// IA32_A_PMCx exist: a counter can be given any value.
    pub full_width: bool,
}

impl Counters {
    /// Asks the processor that this runs on. `switched`: VM entry and exit can
    /// load IA32_PERF_GLOBAL_CTRL. That register, which stops and starts all
    /// counters at once, comes with version 2; every processor with EPT has both.
    pub fn examine(cpu: &impl Cpu, switched: bool) -> Self {
        if !switched || cpu.cpuid(0, 0).eax < 0xa {
            return Self::default();
        }
        let host = cpu.cpuid(0xa, 0);
        let [version, counters, width, events] = host.eax.to_le_bytes();
        let counters = u32::from(counters).min(MAX_COUNTERS as u32);
        if version < 2 || counters == 0 || !(32..64).contains(&width) {
            return Self::default();
        }
        let events = u32::from(events).min(MAX_EVENTS);
        let features = cpu.cpuid(1, 0);
        let capabilities = || {
            // SAFETY: asked only with PDCM, the register's feature bit.
            #[expect(unsafe_code)]
            // UNSAFETY: RDMSR of a register that was just shown to exist.
            unsafe {
                cpu.rdmsr(msr::IA32_PERF_CAPABILITIES)
            }
        };
        let has_pdcm = features.ecx & (1 << 15) != 0;
        Self {
            leaf: CpuidResult {
                eax: 1 | counters << 8 | u32::from(width) << 16 | events << 24,
                ebx: host.ebx & 0x7f,
                ecx: 0,
                edx: 0,
            },
            full_width: has_pdcm && capabilities() & pmu::FULL_WIDTH_WRITES != 0,
        }
    }

    /// A counter's bits.
    #[must_use]
    pub fn mask(&self) -> u64 {
        let [_, _, width, _] = self.leaf.eax.to_le_bytes();
        !(!0u64).checked_shl(width.into()).unwrap_or(0)
    }

    /// Some emulators and hypervisors show the leaf without the counters: what is
    /// written to one must be read back. Asked of this processor's first counter, and
    /// only while it stands still and holds nothing to lose; one that the host uses is
    /// real. Interrupts are off.
    pub fn are_real(&self, cpu: &impl Cpu) -> bool {
        /// Any value of bits 30:0, which WRMSR of IA32_PMCx writes as they are.
        const PATTERN: u64 = 0x5a5a_a5a5;
        let read = |register| {
            // SAFETY: `examine` found version 2 and a counter.
            #[expect(unsafe_code)]
            // UNSAFETY: RDMSR of the first counter's registers.
            unsafe {
                cpu.rdmsr(register)
            }
        };
        let write = |value| {
            // SAFETY: as above; the value has 31 bits.
            #[expect(unsafe_code)]
            // UNSAFETY: WRMSR of the first counter.
            unsafe {
                cpu.wrmsr(msr::IA32_PMC0, value);
            }
        };
        let before = read(msr::IA32_PMC0);
        if read(msr::IA32_PERFEVTSEL0) & pmu::EventSelect::ENABLE.bits() != 0 || before >> 31 != 0 {
            return true;
        }
        write(PATTERN);
        let kept = read(msr::IA32_PMC0) == PATTERN;
        write(before);
        kept
    }
}

/// IA32_PEBS_ENABLE exists, and IA32_PERF_GLOBAL_CTRL, which comes with version 2: SDM 20.9
/// "PEBS Facility".
pub fn has_pebs(cpu: &impl Cpu) -> bool {
    if cpu.cpuid(0, 0).eax < 0xa {
        return false;
    }
    let [version, ..] = cpu.cpuid(0xa, 0).eax.to_le_bytes();
    let features = cpu.cpuid(1, 0);
    let (has_pdcm, has_ds) = (features.ecx & (1 << 15), features.edx & (1 << 21));
    if has_pdcm == 0 || has_ds == 0 || version < 2 {
        return false;
    }
    // SAFETY: the register exists where DS does.
    #[expect(unsafe_code)]
    // UNSAFETY: RDMSR of a register that was just shown to exist.
    let enabled = unsafe { cpu.rdmsr(msr::IA32_MISC_ENABLE) };
    enabled & pmu::PEBS_UNAVAILABLE == 0
}
