//! The guest's performance counters: architectural version 1, SDM 20.2.1
//! "Architectural Performance Monitoring Version 1".
//!
//! A guest that has no counter enabled has none of the processor's either: its
//! registers are values here, and the host's counters run on. With the first
//! enable bit the counters that the guest uses are its own for each loan. The
//! host's stand still meanwhile: IA32_PERF_GLOBAL_CTRL is 0, VM entry loads it
//! with the guest's counters, VM exit with 0. So no counter counts for both.
//!
//! The processor's counters start at 0 in each loan, and what they show at its end
//! is added to the guest's. They never overflow that way: no bit appears in
//! IA32_PERF_GLOBAL_STATUS that the host would take for its own.
// UNSAFETY: RDMSR and WRMSR of counters that CPUID shows; `unload` puts the
// host's values back.
#![expect(unsafe_code)]

use crate::arch::control::Exit;
use crate::arch::pmu::{EVENT_SELECT_RESERVED, EventSelect, STATUS_NO_INTERRUPT};
use crate::arch::{field, msr};
use crate::caps::{Counters, MAX_COUNTERS};
use crate::cpu::Cpu;
use crate::host::Host;
use crate::vcpu::msr::GpFault;
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu};

/// The bits of counters in [`Pmu::busy`] and [`Pmu::loaded`].
const COUNTERS: u8 = 0xf;
/// Set in [`Pmu::busy`]: VM entry and exit load IA32_PERF_GLOBAL_CTRL.
const SWITCHING: u8 = 1 << 7;
/// Set in [`Pmu::busy`]: the processor has PEBS. In [`Pmu::loaded`]: the host's is off.
const PEBS: u8 = 1 << 6;

/// What only the guest's own selector may do. An overflow raises no interrupt, as
/// none reaches the guest; no pin moves.
const NOT_IN_HARDWARE: u64 = EventSelect::INT.bits() | EventSelect::PIN_CONTROL.bits();

/// The guest's counters, and the host's while they are away.
#[derive(Default)]
pub struct Pmu {
    /// IA32_PERFEVTSELx.
    selectors: [u64; MAX_COUNTERS],
    /// IA32_PMCx, without what the processor has counted in this loan.
    counts: [u64; MAX_COUNTERS],
    /// A bit for each selector that enables its counter; [`SWITCHING`], [`PEBS`].
    busy: u8,
    /// The counters that the processor runs for this guest, a bit each; or [`PEBS`].
    loaded: u8,
    /// What the VMCS loads on entry.
    global: u8,
    host: HostCounters,
}

/// What the host had in the registers of the loaded counters.
#[derive(Default)]
struct HostCounters {
    global: u64,
    pebs: u64,
    selectors: [u64; MAX_COUNTERS],
    counts: [u64; MAX_COUNTERS],
}

fn read(cpu: &impl Cpu, register: u32) -> u64 {
    // SAFETY: a register of the counters, and there are some: `Counters::examine`.
    unsafe { cpu.rdmsr(register) }
}

fn write(cpu: &impl Cpu, register: u32, value: u64) {
    // SAFETY: as in `read`. A guest's selector has passed `accept`; other values are
    // the host's own, or 0.
    unsafe { cpu.wrmsr(register, value) };
}

/// The registers of a counter.
fn selector_of(number: u8) -> u32 {
    msr::IA32_PERFEVTSEL0.wrapping_add(number.into())
}

fn counter_of(number: u8) -> u32 {
    msr::IA32_PMC0.wrapping_add(number.into())
}

/// What a counter holds after WRMSR of IA32_PMCx without full-width writes: bits
/// 31:0, sign-extended (SDM 20.2.8 "Full-Width Writes to Performance Counter
/// Registers").
const fn sign_extended(value: u64) -> u64 {
    value as i32 as i64 as u64
}

/// The value of IA32_PMCx that is written. A client puts back all of what it has
/// read.
pub const fn written(value: u64, by_guest: bool) -> u64 {
    if by_guest {
        sign_extended(value)
    } else {
        value
    }
}

/// A value for IA32_PERFEVTSELx.
///
/// # Errors
/// A reserved bit.
pub fn accept(value: u64) -> Result<(), GpFault> {
    if value & EVENT_SELECT_RESERVED != 0 {
        return Err(GpFault);
    }
    Ok(())
}

/// The numbers of the bits that are set.
fn numbers(bits: u8) -> impl Iterator<Item = u8> {
    (0..MAX_COUNTERS as u8).filter(move |number| bits.wrapping_shr((*number).into()) & 1 != 0)
}

impl Pmu {
    /// All 0.
    pub fn new(has_pebs: bool) -> Self {
        Self {
            busy: if has_pebs { PEBS } else { 0 },
            ..Self::default()
        }
    }

    /// Stops the host's PEBS. The processor would write the records of counters that
    /// overflow in the guest, and of those that have just done so, by the guest's page
    /// tables: to addresses that mean something else there. Its counters stand still.
    fn stop_pebs(&mut self, cpu: &impl Cpu) {
        let pebs = read(cpu, msr::IA32_PEBS_ENABLE);
        if pebs != 0 {
            self.host.pebs = pebs;
            self.host.global = read(cpu, msr::IA32_PERF_GLOBAL_CTRL);
            write(cpu, msr::IA32_PERF_GLOBAL_CTRL, self.host.global & !pebs);
            write(cpu, msr::IA32_PEBS_ENABLE, 0);
            self.loaded = PEBS;
        }
    }

    /// IA32_PERFEVTSELx.
    pub fn selector(&self, number: u8) -> u64 {
        let selector = self.selectors.get(usize::from(number));
        selector.copied().unwrap_or(0)
    }

    /// IA32_PMCx, up to this moment.
    pub fn count(&self, cpu: &impl Cpu, has: &Counters, number: u8) -> u64 {
        let count = self.counts.get(usize::from(number)).copied().unwrap_or(0);
        let counted = if self.loaded.wrapping_shr(number.into()) & 1 != 0 {
            read(cpu, counter_of(number))
        } else {
            0
        };
        count.wrapping_add(counted) & has.mask()
    }

    /// Sets IA32_PMCx, which is not loaded.
    pub fn set_count(&mut self, number: u8, value: u64) {
        if let Some(slot) = self.counts.get_mut(usize::from(number)) {
            *slot = value;
        }
    }

    /// Sets IA32_PERFEVTSELx, which is not loaded, to what [`accept`] accepts.
    pub fn set_selector(&mut self, number: u8, value: u64) {
        if let Some(slot) = self.selectors.get_mut(usize::from(number)) {
            *slot = value;
        }
        self.busy &= SWITCHING | PEBS;
        for (bit, selector) in (0u32..).zip(self.selectors) {
            if selector & EventSelect::ENABLE.bits() != 0 {
                self.busy |= 1u8.wrapping_shl(bit);
            }
        }
    }

    /// The guest has only so many counters from now on. None is loaded.
    pub fn limit(&mut self, counters: u8) {
        for number in counters..MAX_COUNTERS as u8 {
            self.set_selector(number, 0);
            self.set_count(number, 0);
        }
    }

    /// Takes the enabled counters from the host, unless it needs them now.
    fn take(&mut self, cpu: &impl Cpu, has: &Counters) {
        let wanted = self.busy & COUNTERS;
        let global = read(cpu, msr::IA32_PERF_GLOBAL_CTRL);
        if global != 0 {
            write(cpu, msr::IA32_PERF_GLOBAL_CTRL, 0);
        }
        self.host.global = global;
        if host_needs_them(cpu) || !self.host.save(cpu, has, wanted) {
            // Unless a handler of the host's has started them by now.
            if global != 0 && read(cpu, msr::IA32_PERF_GLOBAL_CTRL) == 0 {
                write(cpu, msr::IA32_PERF_GLOBAL_CTRL, global);
            }
            return;
        }
        for number in numbers(wanted) {
            let selector = self.selector(number) & !NOT_IN_HARDWARE;
            write(cpu, selector_of(number), selector);
            write(cpu, counter_of(number), 0);
        }
        self.loaded = wanted;
    }

    /// Keeps what the guest has counted, and gives the counters back to the host.
    fn give_back(&mut self, cpu: &impl Cpu, has: &Counters) {
        for number in numbers(self.loaded) {
            let count = self.count(cpu, has, number);
            self.set_count(number, count);
            self.host.restore(cpu, has, number);
        }
        if self.loaded & PEBS != 0 {
            write(cpu, msr::IA32_PEBS_ENABLE, self.host.pebs);
        }
        self.loaded = 0;
        if self.host.global != 0 {
            write(cpu, msr::IA32_PERF_GLOBAL_CTRL, self.host.global);
        }
    }
}

/// An overflow of the host's has been noted and its interrupt may be under way, or came just
/// now and its handler started the counters again. Asked with the counters stopped.
fn host_needs_them(cpu: &impl Cpu) -> bool {
    read(cpu, msr::IA32_PERF_GLOBAL_STATUS) & !STATUS_NO_INTERRUPT != 0
        || read(cpu, msr::IA32_PERF_GLOBAL_CTRL) != 0
}

impl HostCounters {
    /// Reads the registers of these counters; `false` if one holds a value that
    /// [`HostCounters::restore`] could not write.
    fn save(&mut self, cpu: &impl Cpu, has: &Counters, wanted: u8) -> bool {
        for number in numbers(wanted) {
            let count = read(cpu, counter_of(number));
            if !has.full_width && sign_extended(count) & has.mask() != count {
                return false;
            }
            let slots = self.selectors.iter_mut().zip(&mut self.counts);
            if let Some((selector, slot)) = slots.into_iter().nth(number.into()) {
                *selector = read(cpu, selector_of(number));
                *slot = count;
            }
        }
        true
    }

    fn restore(&self, cpu: &impl Cpu, has: &Counters, number: u8) {
        let mut values = self.selectors.iter().zip(&self.counts);
        let Some((selector, count)) = values.nth(number.into()) else {
            return;
        };
        let (first, count) = if has.full_width {
            (msr::IA32_A_PMC0, *count)
        } else {
            (msr::IA32_PMC0, *count & 0xffff_ffff)
        };
        write(cpu, first.wrapping_add(number.into()), count);
        write(cpu, selector_of(number), *selector);
    }
}

impl<H: Host> Vcpu<H> {
    /// Gives the guest its counters, if it counts. Interrupts are off.
    #[inline(always)]
    pub(in crate::vcpu) fn load_counters(&self, inner: &mut Inner<H>, current: &Current<'_, H>) {
        if inner.pmu.busy != 0 {
            self.load_busy_counters(inner, current);
        }
    }

    #[cold]
    #[inline(never)]
    fn load_busy_counters(&self, inner: &mut Inner<H>, current: &Current<'_, H>) {
        let caps = self.guest().caps();
        let pmu = &mut inner.pmu;
        if pmu.busy & PEBS != 0 && pmu.loaded == 0 {
            pmu.stop_pebs(current.cpu());
        }
        // Not both: the host's counters are about to go on.
        if pmu.busy & COUNTERS != 0 && pmu.loaded == 0 {
            pmu.take(current.cpu(), &caps.counters);
        }
        let on = pmu.loaded & COUNTERS != 0;
        if on != (pmu.busy & SWITCHING != 0) {
            pmu.busy ^= SWITCHING;
            inner.modes.set_counting(current, on);
            let mut exit = caps.exit;
            exit.set(Exit::LOAD_PERF_GLOBAL_CTRL, on);
            current.write(field::EXIT_CONTROLS, exit.bits());
        }
        if on && pmu.global != pmu.loaded {
            pmu.global = pmu.loaded;
            current.write(field::GUEST_PERF_GLOBAL_CTRL, pmu.global.into());
        }
    }

    /// Gives the host its counters back, if the guest has them.
    #[inline(always)]
    pub(in crate::vcpu) fn unload_counters(&self, inner: &mut Inner<H>, current: &Current<'_, H>) {
        if inner.pmu.loaded != 0 {
            self.unload_loaded_counters(inner, current);
        }
    }

    #[cold]
    #[inline(never)]
    fn unload_loaded_counters(&self, inner: &mut Inner<H>, current: &Current<'_, H>) {
        let has = &self.guest().caps().counters;
        inner.pmu.give_back(current.cpu(), has);
    }

    /// Changes registers of the counters, by the guest or the client.
    pub(in crate::vcpu) fn change_counters(
        &self,
        inner: &mut Inner<H>,
        current: &Current<'_, H>,
        change: impl FnOnce(&mut Pmu),
    ) {
        if inner.pmu.loaded & COUNTERS != 0 {
            self.unload_loaded_counters(inner, current);
        }
        change(&mut inner.pmu);
        if inner.registers.general.on_loan != 0 && inner.pmu.busy & !PEBS != 0 {
            self.load_counters(inner, current);
        }
    }
}
