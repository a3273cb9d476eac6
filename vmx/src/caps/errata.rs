//! Models that say they can do what they do wrong. By CPUID, as nothing else tells.

use crate::arch::reg::Cr4;
use crate::cpu::Cpu;

/// Family and model, without the stepping: SDM vol. 2, CPUID, figure 3-6 "Version Information
/// Returned by CPUID in EAX".
pub fn model(cpu: &impl Cpu) -> u32 {
    cpu.cpuid(1, 0).eax & 0x0fff_3ff0
}

/// VM entry and exit load IA32_PERF_GLOBAL_CTRL as they should. Not on Nehalem and Westmere:
/// errata AAK155, AAP115, AAT100, BC86, AAY89, BD102, BA97.
pub fn switches_counters(cpu: &impl Cpu) -> bool {
    !matches!(
        model(cpu),
        0x1_06a0 | 0x1_06e0 | 0x2_0650 | 0x2_06c0 | 0x2_06e0
    )
}

/// With CR4.PCIDE INVLPG drops global translations, as it should. On Alder Lake, Raptor Lake and
/// Gracemont it may not (errata ADL063, RPL042) before a microcode which a host knows: one that
/// uses PCIDs itself.
pub fn has_pcids(cpu: &impl Cpu) -> bool {
    let affected = matches!(
        model(cpu),
        0x9_0670 | 0x9_06a0 | 0xb_0670 | 0xb_06a0 | 0xb_06e0 | 0xb_06f0
    );
    !affected || Cr4::from_bits_retain(cpu.cr4()).contains(Cr4::PCIDE)
}
