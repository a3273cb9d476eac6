//! Performance counters of a processor: SDM 20.2 "Architectural Performance
//! Monitoring". Each instruction of a guest is one event of any kind, and so is
//! each call of the processor's seam for the host.
//!
//! A counter is the host's while selector and count are what the host had when its
//! thread took the processor, and what the counter has counted for it since. Any
//! other is lent to a guest. Neither may count for the other one.

use vmx::arch::msr::{
    IA32_A_PMC0, IA32_PEBS_ENABLE, IA32_PERF_CAPABILITIES, IA32_PERF_GLOBAL_CTRL,
    IA32_PERF_GLOBAL_STATUS, IA32_PERFEVTSEL0, IA32_PMC0,
};

use crate::state::Processor;

const COUNTERS: u32 = 4;
/// Bits of a counter.
const MASK: u64 = 0xffff_ffff_ffff;
/// IA32_PERFEVTSELx: USR or OS, INT, EN.
const RINGS: u64 = 3 << 16;
const INTERRUPT: u64 = 1 << 20;
const ENABLE: u64 = 1 << 22;
/// The write that clears bits of IA32_PERF_GLOBAL_STATUS.
const IA32_PERF_GLOBAL_OVF_CTRL: u32 = 0x390;
/// IA32_PERF_GLOBAL_CTRL: four counters and three fixed ones.
pub(crate) const GLOBAL_BITS: u64 = 0x7_0000_000f;

/// The counters as the host has them.
#[derive(Clone, Copy, Default)]
pub(crate) struct Watch {
    pebs: u64,
    selectors: [u64; COUNTERS as usize],
    counts: [u64; COUNTERS as usize],
}

/// What one event did.
#[derive(Default)]
pub(crate) struct Counted {
    pub(crate) finding: Option<String>,
    /// A counter that interrupts has overflowed.
    pub(crate) interrupt: bool,
}

impl Processor {
    fn value(&self, register: u32) -> u64 {
        self.msrs.get(&register).copied().unwrap_or(0)
    }

    /// The host's thread takes the processor.
    pub(crate) fn watch_counters(&mut self) {
        self.watch.pebs = self.value(IA32_PEBS_ENABLE);
        for n in 0..COUNTERS {
            self.watch.selectors[n as usize] = self.value(IA32_PERFEVTSEL0 + n);
            self.watch.counts[n as usize] = self.value(IA32_PMC0 + n);
        }
    }

    /// IA32_PEBS_ENABLE as the host's thread left it, and now.
    pub(crate) fn pebs(&self) -> [u64; 2] {
        [self.watch.pebs, self.value(IA32_PEBS_ENABLE)]
    }

    fn is_hosts(&self, n: u32) -> bool {
        self.value(IA32_PERFEVTSEL0 + n) == self.watch.selectors[n as usize]
            && self.value(IA32_PMC0 + n) == self.watch.counts[n as usize]
    }

    /// The first counter that is lent to a guest.
    pub(crate) fn lent_counter(&self) -> Option<u32> {
        (0..COUNTERS).find(|n| !self.is_hosts(*n))
    }

    /// The counters that run.
    fn running(&self) -> u64 {
        // Version 1 has no global switch.
        let global = self.msrs.get(&IA32_PERF_GLOBAL_CTRL).copied();
        let global = global.unwrap_or(GLOBAL_BITS);
        if global & 0xf == 0 {
            return 0;
        }
        (0..COUNTERS)
            .filter(|n| {
                let selector = self.value(IA32_PERFEVTSEL0 + n);
                global >> n & 1 != 0 && selector & ENABLE != 0 && selector & RINGS != 0
            })
            .fold(0, |bits, n| bits | 1 << n)
    }

    /// One event of the guest, or of the host while a thread of it cannot leave the
    /// processor.
    pub(crate) fn count_event(&mut self, guest: bool) -> Counted {
        let mut result = Counted::default();
        if self.at_pin.is_none() {
            return result;
        }
        let running = self.running();
        let guest_counts = guest && running != 0 && self.lent_counter().is_some();
        for n in (0..COUNTERS).filter(|n| running >> n & 1 != 0) {
            let hosts = self.is_hosts(n);
            if !guest && !hosts {
                result.finding = Some(format!("a guest's counter {n} counts the host"));
            }
            if hosts && guest_counts {
                result.finding = Some(format!("the host's counter {n} counts a guest"));
            }
            let count = (self.value(IA32_PMC0 + n) + 1) & MASK;
            self.msrs.insert(IA32_PMC0 + n, count);
            if hosts {
                self.watch.counts[n as usize] = count;
            }
            if count == 0 {
                let status = self.value(IA32_PERF_GLOBAL_STATUS) | 1 << n;
                self.msrs.insert(IA32_PERF_GLOBAL_STATUS, status);
                result.interrupt |= self.value(IA32_PERFEVTSEL0 + n) & INTERRUPT != 0;
            }
        }
        result
    }

    /// WRMSR of a register of the counters that exists; `None`: it is none of
    /// them. `Some(false)`: #GP. `kept`: it has an effect.
    pub(crate) fn write_counter_msr(
        &mut self,
        register: u32,
        value: u64,
        kept: bool,
    ) -> Option<bool> {
        let full = IA32_A_PMC0..IA32_A_PMC0 + COUNTERS;
        let (register, value, fits) = match register {
            // 20.2.8 "Full-Width Writes to Performance Counter Registers".
            n if (IA32_PMC0..IA32_PMC0 + COUNTERS).contains(&n) => {
                (n, value as u32 as i32 as u64 & MASK, true)
            }
            n if full.contains(&n) => (n - IA32_A_PMC0 + IA32_PMC0, value, value & !MASK == 0),
            n if (IA32_PERFEVTSEL0..IA32_PERFEVTSEL0 + COUNTERS).contains(&n) => {
                (n, value, value >> 32 == 0)
            }
            IA32_PERF_GLOBAL_CTRL => (register, value, value & !GLOBAL_BITS == 0),
            IA32_PERF_GLOBAL_STATUS | IA32_PERF_CAPABILITIES => (register, value, false),
            IA32_PERF_GLOBAL_OVF_CTRL => {
                let left = self.value(IA32_PERF_GLOBAL_STATUS) & !value;
                (IA32_PERF_GLOBAL_STATUS, left, true)
            }
            _ => return None,
        };
        if fits && kept {
            self.msrs.insert(register, value);
        }
        Some(fits)
    }
}
