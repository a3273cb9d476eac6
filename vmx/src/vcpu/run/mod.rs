//! RUN: into the guest and back until an exit is the client's.
//!
//! Two nested loops. The inner one ([`Vcpu::on_loan`]) keeps the processor:
//! VMCS current, guest registers loaded, interrupts off, no sleeping. Exits
//! that need nothing else are handled there. The outer one does the work that
//! may sleep, with the processor given back. Host interrupts end RUN: clients
//! hear of their own events no other way. The processor comes and goes in
//! [`loan`]; the client hears of an exit by the [`tunnel`].

pub(super) mod loan;
pub(super) mod tunnel;

use core::sync::atomic::Ordering;

use abi::tunnel::{EXIT_REASON_PAUSE, ExitStatus, TunnelPageFault, USER_EVENT_PENDING};
use zerocopy::IntoBytes;

use super::events::Delivery;
use super::exits::decode::Exit;
use super::exits::{self, Next, Work};
use super::guest::NOWHERE;
use super::vmcs::Current;
use super::{Inner, Vcpu};
use crate::Error;
use crate::arch::addr::Gpa;
use crate::arch::control::Primary;
use crate::arch::exit::{ExitReason, IoQualification};
use crate::arch::field;
use crate::arch::reg::{Cr0, Interruptibility, Rflags};
use crate::cpu::VmxFailure;
use crate::host::{Host, Turn};
use crate::memory::{Access, FaultOutcome};
use crate::operation::NotLoaded;

/// Exits handled before the processor is given back for a moment: an interrupt
/// that exits keep from being recognized is then taken at last.
const EXITS_PER_LOAN: u32 = 4096;

/// The address in IA32_APIC_BASE, and the interrupt command register's place
/// in that page: SDM 11.4.1 "The Local APIC Block Diagram", table 11-1.
const APIC_PAGE: u64 = 0x000f_ffff_ffff_f000;
const APIC_COMMAND: u64 = 0x300;

/// Resets the running mark when RUN ends.
struct Running<'a, H: Host>(&'a Vcpu<H>);

impl<'a, H: Host> Running<'a, H> {
    fn start(vcpu: &'a Vcpu<H>) -> Result<Self, Error> {
        if vcpu.running.swap(true, Ordering::AcqRel) {
            return Err(Error::Busy);
        }
        Ok(Self(vcpu))
    }
}

impl<H: Host> Drop for Running<'_, H> {
    fn drop(&mut self) {
        self.0.running.store(false, Ordering::Release);
    }
}

impl<H: Host> Vcpu<H> {
    /// RUN: runs the guest until an exit is the client's; the tunnel says which.
    ///
    /// # Errors
    /// [`Error::Busy`]: another thread is in RUN. [`Error::Invalid`]: the VM
    /// entry failed. [`Error::Fault`]: the VMCS could not be loaded.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn run(&self) -> Result<(), Error> {
        let signals = self.guest().host().signals_sent();
        let running = Running::start(self)?;
        let mut inner = self.inner.lock();
        inner.signals = signals;
        let status = self.until_exit(&mut inner)?;
        self.channel.set_exit_status(status.raw());
        let apic_base = inner.msrs.apic_base();
        self.channel.set_apic_base(apic_base);
        if status == ExitStatus::FastMmio && inner.looks_for_ipis {
            let command = (apic_base & APIC_PAGE).wrapping_add(APIC_COMMAND);
            inner.sent_ipi = self.channel.is_fast_mmio_write_to(command);
        }
        drop(inner);
        drop(running);
        if status == ExitStatus::Unknown {
            return Err(Error::Invalid);
        }
        Ok(())
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn until_exit(&self, inner: &mut Inner<H>) -> Result<ExitStatus, Error> {
        if inner.dead {
            return Ok(ExitStatus::StateChange);
        }
        if self.refresh_cpuid(inner) {
            self.with_vmcs(inner, |current, inner| inner.modes.write_all(current))?;
        }
        if let Some(size) = inner.pending_in.take() {
            let mut data = [0; 4];
            self.channel.read_buffer(0, &mut data);
            inner.finish_in(size, data);
        }
        let mut next = self.finish_plain(inner);
        if core::mem::take(&mut inner.sent_ipi) {
            // The client has it in its APIC by now, and has told the threads of
            // the other vCPUs by a signal, which QEMU's do not hear in RUN here.
            self.guest().kick_others(self.id());
        }
        if inner.emulation.is_under_way() {
            inner.emulation.answer(self.channel.fast_mmio_value());
            next = self.emulate(inner)?;
        }
        if next == Next::Resume && self.channel.exit_reason() == EXIT_REASON_PAUSE {
            return Ok(ExitStatus::Paused);
        }
        loop {
            next = match next {
                Next::Leave(status) => return Ok(status),
                Next::Resume if self.user_event() => return Ok(ExitStatus::Interrupt),
                Next::Resume => self.in_guest(inner)?,
                Next::Work(work) => self.work(inner, work)?,
            };
        }
    }

    /// Work that may sleep.
    #[cfg_attr(haxm_module, optimize(speed))]
    #[inline(never)]
    fn work(&self, inner: &mut Inner<H>, work: Work) -> Result<Next, Error> {
        let host = self.guest().host();
        if host.event_pending() {
            // Nothing is lost: the guest touches the page again, or the
            // emulation goes on at the next RUN.
            return Ok(Next::Leave(ExitStatus::Interrupt));
        }
        match work {
            Work::Memory { gpa, access } => self.memory_fault(inner, gpa, access),
            Work::Emulate => self.emulate(inner),
            Work::Yield => {
                host.yield_now();
                Ok(Next::Resume)
            }
            Work::Pdptes => self.load_pdptes(inner),
            Work::TaskSwitch {
                qualification,
                length,
            } => self.task_switch(inner, qualification, length),
        }
    }

    /// Takes the client's request to return, if there is one.
    fn user_event(&self) -> bool {
        let word = self.channel.user_event();
        if word & USER_EVENT_PENDING == 0 {
            return false;
        }
        self.channel.set_user_event(word & !USER_EVENT_PENDING);
        true
    }

    /// Takes the processor, runs the guest, gives the processor back.
    #[inline(always)]
    fn in_guest(&self, inner: &mut Inner<H>) -> Result<Next, Error> {
        let platform = self.guest().membership().platform();
        let operation = platform.operation();
        let Some(mut turn) = Turn::new(platform.host(), inner.signals) else {
            return Ok(Next::Leave(ExitStatus::Interrupt));
        };
        let mut loan = None;
        let loaded = match operation.still_active(&turn, self.place) {
            Some(loaded) => loaded,
            None => {
                turn = match self.bring_here(turn, inner.signals) {
                    Some(turn) => turn,
                    None => return Ok(Next::Leave(ExitStatus::Interrupt)),
                };
                match self.load_in_turn(inner, &turn, &mut loan) {
                    Ok(loaded) => loaded,
                    Err(NotLoaded::Later) => return Ok(Next::Work(Work::Yield)),
                    Err(NotLoaded::Refused) => return Err(Error::Fault),
                }
            }
        };
        let current = Current::new(platform.host(), loaded);
        inner
            .extended
            .load(current.cpu(), inner.modes.has_osxsave());
        let next = self.on_loan(inner, &current, &turn);
        inner.registers.flush(&current);
        inner.extended.save(current.cpu());
        if current.failure().is_some() {
            inner.dead = true;
            return Err(Error::Fault);
        }
        Ok(next)
    }

    /// The inner loop. Interrupts are off.
    #[inline(always)]
    fn on_loan(&self, inner: &mut Inner<H>, current: &Current<'_, H>, turn: &Turn<'_, H>) -> Next {
        let (cpu, cpu_number) = (current.cpu(), turn.cpu_number());
        inner.host_state.refresh(current);
        let offset = self.guest().tsc_offset();
        if inner.tsc_offset != offset {
            inner.tsc_offset = offset;
            current.write(field::TSC_OFFSET, offset);
        }
        let syscall = inner.modes.has_syscall();
        inner.switched.load(cpu, syscall, turn.has_foreign_msrs());
        inner.registers.general.on_loan = 1;
        inner.debug.load(cpu);
        inner.split_locks.load(cpu);
        self.load_counters(inner, current);
        self.guest().set_position(self.id(), cpu_number);
        let mut left = EXITS_PER_LOAN;
        let next = loop {
            left = left.saturating_sub(1);
            match self.once(inner, current, cpu_number) {
                Next::Resume if left == 0 => break Next::Resume,
                Next::Resume if current.failure().is_some() => {
                    break exits::lost(inner, "VMCS access failed");
                }
                Next::Resume if self.user_event() => break Next::Leave(ExitStatus::Interrupt),
                Next::Resume => {}
                next => break next,
            }
        };
        self.guest().set_position(self.id(), NOWHERE);
        let ready = match next {
            Next::Leave(ExitStatus::Hlt) => true,
            // The client hears of it only if a device is there, and the next RUN
            // finishes the instruction: a shadow has ended by then.
            Next::Work(Work::Memory { .. }) => {
                self.has_nothing_waiting(inner) && has_if(inner, current)
            }
            _ => self.has_nothing_waiting(inner) && can_interrupt(inner, current),
        };
        self.channel.set_ready(u32::from(ready));
        self.unload_counters(inner, current);
        inner.split_locks.restore(cpu);
        inner.debug.restore(cpu);
        inner.registers.general.on_loan = 0;
        inner.switched.restore(cpu);
        inner.host_state.restore(cpu);
        next
    }

    /// One entry and its exit. What comes most often is handled here; all else
    /// in [`Vcpu::exit`].
    #[inline(always)]
    fn once(&self, inner: &mut Inner<H>, current: &Current<'_, H>, cpu_number: usize) -> Next {
        if !self.is_quiet(inner) {
            if let Some(next) = self.prepare(inner, current) {
                return next;
            }
        }
        match self.enter(inner, current, cpu_number) {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => return not_entered(inner, current, failure),
            Err(_) => return exits::lost(inner, "processor without a record"),
        }
        /// The whole field: nothing but the reason is set.
        const CPUID: u32 = ExitReason::CPUID.0 as u32;
        const IO_INSTRUCTION: u32 = ExitReason::IO_INSTRUCTION.0 as u32;
        const RDMSR: u32 = ExitReason::RDMSR.0 as u32;
        const HLT: u32 = ExitReason::HLT.0 as u32;
        let word = current.read(field::EXIT_REASON);
        let reason = ExitReason::from_field(word);
        if let Some(count) = inner.exits.get_mut(usize::from(reason.0)) {
            *count = count.wrapping_add(1);
        }
        self.channel.set_exit_reason(u32::from(reason.0));
        match word {
            IO_INSTRUCTION => {
                let qualification = IoQualification(current.read(field::EXIT_QUALIFICATION));
                exits::io::handle(self, inner, current, qualification)
            }
            CPUID => exits::system::cpuid(self, inner, current),
            RDMSR => exits::system::rdmsr(self, inner, current),
            HLT => exits::system::halt(self, inner, current),
            _ => self.exit(inner, current, word),
        }
    }

    /// Any exit.
    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    fn exit(&self, inner: &mut Inner<H>, current: &Current<'_, H>, word: u32) -> Next {
        let exit = Exit::read(current, word);
        if exit.during_delivery() {
            inner.events.take_interrupted(current);
            inner.quiet &= !inner.events.is_waiting();
        }
        exits::dispatch(self, inner, current, exit)
    }

    /// [`Vcpu::prepare`] would find nothing to do. It found nothing the last
    /// time, and what could have changed that since has cleared `quiet`: an
    /// event to deliver ([`exits::raise`], a delivery that an exit
    /// interrupted), an instruction completed in software ([`Inner::complete`])
    /// or waiting for PDPTEs, and whatever loads the VMCS outside of the loan:
    /// requests, PDPTEs, a task switch. What the client writes at any time is
    /// looked at here; a TPR threshold goes with a vector that waits.
    #[inline(always)]
    fn is_quiet(&self, inner: &Inner<H>) -> bool {
        inner.quiet && !inner.step_due && self.vectors.is_empty() && self.channel.window() == 0
    }

    /// What must be right before an entry; `Some` if there is to be none.
    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    fn prepare(&self, inner: &mut Inner<H>, current: &Current<'_, H>) -> Option<Next> {
        if core::mem::take(&mut inner.completed) {
            exits::completed(inner, current);
        }
        inner.registers.settle_shadow(current);
        if core::mem::take(&mut inner.step_due) {
            return Some(exits::exception::stepped(self, inner, current));
        }
        if inner.pdptes_stale {
            if inner.modes.uses_pdptes() {
                return Some(Next::Work(Work::Pdptes));
            }
            inner.pdptes_stale = false;
        }
        let unrestricted = self.guest().caps().has_unrestricted_guest();
        if !unrestricted && inner.modes.needs_client_emulation(current) {
            return Some(Next::Leave(ExitStatus::RealMode));
        }
        let window = self.inject(inner, current);
        let held_back = self.vectors.held_back(inner.priority.get());
        inner.priority.wait_below(current, held_back);
        if inner.events.is_lost() {
            return Some(exits::lost(inner, "triple fault"));
        }
        self.set_primary(inner, current, window);
        // The event that goes in now has left `events`, and a vector does not
        // come by way of it.
        inner.quiet = unrestricted && !window && !inner.debug.steps() && !inner.events.is_waiting();
        None
    }

    /// Gives the entry an event, if one can be delivered. Returns whether an
    /// exit is wanted as soon as the guest can take an interrupt.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn inject(&self, inner: &mut Inner<H>, current: &Current<'_, H>) -> bool {
        let asked = self.channel.window() != 0;
        let injected = inner.events.is_waiting() && {
            let protected = inner.modes.cr0(current) & Cr0::PE.bits() != 0;
            if inner.events.delivery().is_some_and(Delivery::is_fault) {
                // The entry pushes RFLAGS as they are (SDM 27.6.1.1 "Details of
                // Vectored-Event Injection"), and an exit that an instruction causes
                // saves RF as 0 (28.3.3 "Saving RIP, RSP, RFLAGS, and SSP").
                let flags = inner.registers.rflags(current);
                inner.registers.set_rflags(flags | Rflags::RF.bits());
            }
            inner.events.inject(current, protected)
        };
        let tpr = inner.priority.get();
        let Some(vector) = self.vectors.deliverable(tpr) else {
            return asked;
        };
        if injected || !can_interrupt(inner, current) {
            return true;
        }
        self.vectors.take(vector);
        super::events::Events::inject_vector(current, vector);
        // SDM 27.7.2 "Activity State": an injected event wakes a halted guest;
        // this one is never halted in the VMCS.
        asked || self.vectors.deliverable(tpr).is_some()
    }

    fn set_primary(&self, inner: &mut Inner<H>, current: &Current<'_, H>, window: bool) {
        let mut wanted = super::vmcs::setup::primary(self.guest().caps());
        wanted.set(Primary::INTERRUPT_WINDOW_EXITING, window);
        let steps = inner.debug.steps() && self.guest().caps().has_monitor_trap;
        wanted.set(Primary::MONITOR_TRAP_FLAG, steps);
        if wanted.bits() != inner.primary {
            inner.primary = wanted.bits();
            current.write(field::PRIMARY_CONTROLS, inner.primary);
        }
    }

    /// A vector that INTERRUPT queues is delivered at the next entry, if the guest
    /// can take it and its priority exceeds the TPR. One that the TPR holds back is in
    /// nobody's way: a higher one must get past it.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn has_nothing_waiting(&self, inner: &Inner<H>) -> bool {
        self.vectors.deliverable(inner.priority.get()).is_none() && !inner.events.is_waiting()
    }

    /// An EPT violation.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn memory_fault(&self, inner: &mut Inner<H>, gpa: Gpa, access: Access) -> Result<Next, Error> {
        let outcome = self.guest().memory().fault(gpa, access, &mut inner.reserve);
        Ok(match outcome {
            Ok(FaultOutcome::Mapped | FaultOutcome::Retry) => Next::Resume,
            Ok(FaultOutcome::Interrupted) => Next::Leave(ExitStatus::Interrupt),
            Ok(FaultOutcome::Protected { gpa }) => self.report_protected(gpa, access),
            Ok(outcome @ (FaultOutcome::Mmio | FaultOutcome::RomWrite)) => {
                let rom = matches!(outcome, FaultOutcome::RomWrite);
                match inner.events.delivery() {
                    None => self.device_access(inner, gpa, rom)?,
                    Some(delivery) if rom => self.deliver_over_rom(inner, delivery)?,
                    Some(_) => {
                        log::error!("event delivery through device memory at {gpa:?}");
                        exits::lost(inner, "event delivery through device memory")
                    }
                }
            }
            Err(error) => {
                log::error!("guest memory at {gpa:?}: {error:?}");
                exits::lost(inner, "guest memory cannot be used")
            }
        })
    }

    /// PAGEFAULT: the client is to make the pages of the group accessible.
    pub(super) fn report_protected(&self, gpa: Gpa, access: Access) -> Next {
        let view = TunnelPageFault {
            gpa: gpa.0,
            flags: u32::from(access.read)
                | u32::from(access.write) << 1
                | u32::from(access.fetch) << 2,
            ..TunnelPageFault::default()
        };
        self.channel.set_view(view.as_bytes());
        Next::Leave(ExitStatus::PageFault)
    }
}

#[cfg_attr(haxm_module, optimize(speed))]
fn has_if<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>) -> bool {
    inner.registers.rflags(current) & Rflags::IF.bits() != 0
}

/// The guest can take an external interrupt: SDM 6.8.1 "Masking Maskable
/// Hardware Interrupts", 25.4.2, table 25-3.
#[inline]
fn can_interrupt<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>) -> bool {
    if !has_if(inner, current) {
        return false;
    }
    let shadows = Interruptibility::STI | Interruptibility::MOV_SS;
    inner.registers.has_no_shadow()
        || current.read(field::GUEST_INTERRUPTIBILITY) & shadows.bits() == 0
}

#[cold]
fn not_entered<H: Host>(
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    failure: VmxFailure,
) -> Next {
    let number = current.read(field::INSTRUCTION_ERROR);
    log::error!("VM entry: {failure:?}, instruction error {number}");
    inner.dead = true;
    Next::Leave(ExitStatus::Unknown)
}
