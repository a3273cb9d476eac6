//! Borrowing the processor: the VMCS alone for a short access, or everything
//! for running the guest.
// UNSAFETY: INVVPID and INVEPT, the MSR bitmap's page, and VM entry.
#![expect(unsafe_code)]

use crate::Error;
use crate::arch::ept::{EptVpidCaps, InveptKind, InvvpidKind};
use crate::arch::field;
use crate::cpu::{Cpu, VmxFailure, how};
use crate::host::{CpuOffline, Host, OwnedPage, Pinned, Turn};
use crate::operation::{Loaded, Loan, NotLoaded};
use crate::vcpu::msr::bitmap;
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu};

/// How often a short access waits for another hypervisor to finish its VMXON.
const TRIES: u32 = 1000;

/// Fills the MSR bitmap's page before the processor gets its address.
pub fn fill_bitmap<H: Host>(page: &OwnedPage<H>) {
    // SAFETY: a page that is ours and not yet the processor's.
    unsafe {
        page.pointer().write_bytes(0xff, bitmap::MSR_BITMAP_SIZE);
    };
    for (register, write) in bitmap::passed() {
        pass_through(page, register, write);
    }
}

/// From now on the guest reads, or writes, the register without an exit.
pub fn pass_through<H: Host>(page: &OwnedPage<H>, register: u32, write: bool) {
    if let Some((offset, bit)) = bitmap::place_of(register, write) {
        let at = page.pointer().wrapping_add(usize::from(offset));
        // SAFETY: inside a page that is ours; the processor reads it only while
        // the guest runs, which it does not now.
        let byte = unsafe { at.read_volatile() };
        // SAFETY: as above.
        unsafe { at.write_volatile(byte & !bit) };
    }
}

impl<H: Host> Vcpu<H> {
    /// What follows from where the VMCS was before.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn taken_up(&self, inner: &mut Inner<H>, loan: &Loan<'_, H>, current: &Current<'_, H>) {
        if loan.is_fresh() {
            self.guest().catch_up();
            inner.registers.general.how &= !how::LAUNCHED;
        }
        if loan.is_moved() {
            inner.registers.general.host_rsp = 0;
            inner.switched.moved();
            inner.host_state.write_for_processor(current);
            // What this vCPU left in the TLB here may be out of date.
            inner.flush_linear = true;
        }
    }

    /// Takes the VMCS from another processor, if it is there. The turn ends for
    /// that; `None` if the host wants the thread for something else then.
    #[inline(never)]
    pub(super) fn bring_here<'a>(&'a self, turn: Turn<'a, H>, signals: u32) -> Option<Turn<'a, H>> {
        let platform = self.guest().membership().platform();
        let operation = platform.operation();
        if !operation.is_elsewhere(self.place, turn.cpu_number()) {
            return Some(turn);
        }
        drop(turn);
        // Nobody else makes it active again: the vCPU is locked.
        operation.evict(self.place);
        Turn::new(platform.host(), signals)
    }

    /// Loads the VMCS, which is active here or nowhere, until `slot` is dropped.
    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn load_in_turn<'a, 's>(
        &'a self,
        inner: &mut Inner<H>,
        turn: &'a Turn<'a, H>,
        slot: &'s mut Option<Loan<'a, H>>,
    ) -> Result<Loaded<'s>, NotLoaded> {
        let platform = self.guest().membership().platform();
        let loan = platform.operation().load_in_turn(turn, self.place)?;
        let loan = slot.insert(loan);
        let current = Current::new(platform.host(), loan.loaded());
        self.taken_up(inner, loan, &current);
        Ok(loan.loaded())
    }

    /// Runs `call` with the VMCS current and interrupts off.
    pub(in crate::vcpu) fn with_vmcs<R>(
        &self,
        inner: &mut Inner<H>,
        call: impl FnOnce(&Current<'_, H>, &mut Inner<H>) -> R,
    ) -> Result<R, Error> {
        let (mut call, mut result) = (Some(call), None);
        self.on_short_loan(inner, &mut |current, inner| {
            result = call.take().map(|call| call(current, inner));
        })?;
        result.ok_or(Error::Fault)
    }

    /// [`Vcpu::with_vmcs`], once for all callers. `call` is called at most once.
    #[inline(never)]
    fn on_short_loan(
        &self,
        inner: &mut Inner<H>,
        call: &mut dyn FnMut(&Current<'_, H>, &mut Inner<H>),
    ) -> Result<(), Error> {
        let host = self.guest().host();
        let operation = self.guest().membership().platform().operation();
        for _ in 0..TRIES {
            let pinned = Pinned::new(host);
            match operation.load(&pinned, self.place) {
                Ok(loan) => {
                    let current = Current::new(host, loan.loaded());
                    self.taken_up(inner, &loan, &current);
                    inner.quiet = false;
                    inner.registers.settle_shadow(&current);
                    call(&current, inner);
                    inner.registers.flush(&current);
                    if current.failure().is_some() {
                        inner.dead = true;
                        return Err(Error::Fault);
                    }
                    return Ok(());
                }
                Err(NotLoaded::Refused) => return Err(Error::Fault),
                Err(NotLoaded::Later) => {}
            }
            drop(pinned);
            host.yield_now();
        }
        Err(Error::Busy)
    }

    /// Drops this vCPU's linear translations: SDM 29.4.3.1 "Operations that
    /// Invalidate Cached Mappings".
    fn flush_linear(&self, current: &Current<'_, H>) {
        let caps = self.guest().caps();
        if !caps.has_vpid() {
            // Entry and exit drop them: SDM 29.4.3.1.
            return;
        }
        let kind = if caps.ept_vpid.contains(EptVpidCaps::INVVPID_SINGLE) {
            InvvpidKind::Single
        } else {
            InvvpidKind::All
        };
        // SAFETY: in VMX operation: a VMCS is current. The kind is supported.
        let _ = unsafe { current.cpu().invvpid(kind, self.vpid(), 0) };
    }

    /// Drops guest-physical translations that may be out of date here.
    fn flush_physical(&self, current: &Current<'_, H>) {
        let caps = self.guest().caps();
        let eptp = self.guest().memory().eptp();
        current.write(field::EPT_POINTER, eptp);
        let kind = if caps.ept_vpid.contains(EptVpidCaps::INVEPT_SINGLE) {
            InveptKind::Single
        } else {
            InveptKind::All
        };
        // SAFETY: in VMX operation: a VMCS is current. The kind is supported.
        let _ = unsafe { current.cpu().invept(kind, eptp) };
    }

    /// Enters the guest once. The inner error is the entry instruction's.
    pub(super) fn enter(
        &self,
        inner: &mut Inner<H>,
        current: &Current<'_, H>,
        cpu_number: usize,
    ) -> Result<Result<(), VmxFailure>, CpuOffline> {
        let memory = self.guest().memory();
        let flush = match memory.before_entry(cpu_number) {
            Ok(flush) => flush,
            Err(offline) => {
                memory.after_exit(cpu_number);
                return Err(offline);
            }
        };
        if let Some(flush) = flush {
            self.flush_physical(current);
            memory.flushed(cpu_number, flush);
        }
        if inner.flush_linear {
            inner.flush_linear = false;
            self.flush_linear(current);
        }
        inner.registers.flush(current);
        let cpu = current.cpu();
        if cpu.cr2() != inner.cr2 {
            // SAFETY: interrupts are off; the host reads CR2 only in its
            // page-fault handler, right after a fault of its own.
            unsafe { cpu.set_cr2(inner.cr2) };
        }
        // SAFETY: interrupts are off, our VMCS is current, `write_for_processor`
        // and `refresh` wrote a host state that returns here, and `how`
        // follows VMCLEAR and VMLAUNCH.
        let result = unsafe { cpu.enter(&mut inner.registers.general) };
        memory.after_exit(cpu_number);
        if result.is_ok() {
            inner.cr2 = cpu.cr2();
            inner.registers.forget();
        }
        Ok(result)
    }

    /// Sends a machine check that caused an exit to the host.
    pub(in crate::vcpu) fn raise_host_machine_check(current: &Current<'_, H>) {
        // SAFETY: called once, right after a machine-check exit.
        unsafe { current.cpu().raise_machine_check() };
    }

    /// Sends an NMI that caused an exit to the host.
    pub(in crate::vcpu) fn raise_host_nmi(current: &Current<'_, H>) {
        // SAFETY: called once, right after an NMI exit.
        unsafe { current.cpu().raise_nmi() };
    }
}
