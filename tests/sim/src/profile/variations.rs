//! What a processor model may have otherwise: performance counters, split locks that fault.

use vmx::arch::msr;

use super::Profile;

impl Profile {
    /// The same with performance counters of another version; 0: none.
    #[must_use]
    pub fn with_counters(mut self, version: u32) -> Self {
        if let Some(leaf) = self.cpuid.get_mut(&(0xa, 0)) {
            leaf.eax = if version == 0 {
                0
            } else {
                leaf.eax & !0xff | version
            };
        }
        if version < 2 {
            let global = msr::IA32_PERF_GLOBAL_STATUS..=0x390;
            self.msrs.retain(|number, _| !global.contains(number));
            self = self.without_counter_switching();
        }
        if version == 0 {
            let counters = |first| first..first + 4;
            self.msrs.retain(|number, _| {
                !counters(msr::IA32_PMC0).contains(number)
                    && !counters(msr::IA32_PERFEVTSEL0).contains(number)
                    && !counters(msr::IA32_A_PMC0).contains(number)
                    && *number != msr::IA32_PEBS_ENABLE
            });
        }
        self
    }

    /// VM entry and exit cannot load IA32_PERF_GLOBAL_CTRL.
    #[must_use]
    pub fn without_counter_switching(mut self) -> Self {
        for (number, bit) in [(0x483, 12), (0x48f, 12), (0x484, 13), (0x490, 13)] {
            if let Some(value) = self.msrs.get_mut(&number) {
                *value &= !(1 << (bit + 32));
            }
        }
        self
    }

    /// Counters take only 32 bits, and are extended by sign.
    #[must_use]
    pub fn without_full_width_writes(mut self) -> Self {
        self.msrs.insert(msr::IA32_PERF_CAPABILITIES, 0x11c3);
        let full = msr::IA32_A_PMC0..msr::IA32_A_PMC0 + 4;
        self.msrs.retain(|number, _| !full.contains(number));
        self
    }

    /// CPUID shows counters, and what is written to them is lost, as in some emulators.
    #[must_use]
    pub fn with_counters_for_show(mut self) -> Self {
        for n in 0..4 {
            self.msrs.insert(msr::IA32_PMC0 + n, 0);
            self.msrs.insert(msr::IA32_PERFEVTSEL0 + n, 0);
        }
        self.keeps_counts = false;
        self
    }

    /// Split locks fault, as its host wants it; IA32_CORE_CAPABILITIES says that they can if
    /// `told`.
    #[must_use]
    pub fn with_split_lock_faults(mut self, told: bool) -> Self {
        self.msrs
            .insert(msr::MSR_MEMORY_CTRL, msr::SPLIT_LOCK_DISABLE);
        if told {
            self.cpuid.entry((7, 0)).or_default().edx |= 1 << 30;
            self.msrs.insert(
                msr::IA32_CORE_CAPABILITIES,
                msr::SPLIT_LOCK_DISABLE_SUPPORTED,
            );
        }
        self
    }
}
