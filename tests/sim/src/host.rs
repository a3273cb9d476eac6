//! The simulated operating system: seam 2.
// UNSAFETY: implements the host seam.
#![expect(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmx::arch::addr::{Hpa, Hva};
use vmx::fallible::NoMemory;
use vmx::host::{CpuOffline, Host, HostPage, Mitigations, SharedPage};

use crate::cores::{Cores, thread, use_machine};
use crate::cpu::SimCpu;
use crate::fault;
use crate::lock::{SimMutex, SimSpin, check_may_sleep};
use crate::machine::Machine;
use crate::memory::Owner;
use crate::state::{Inner, TR_LIMIT};
use crate::user::Process;
use crate::user_space::SimUserSpace;

/// The host of a [`Machine`].
#[derive(Clone)]
pub struct SimHost {
    pub(crate) cpu: SimCpu,
}

impl SimHost {
    pub(crate) fn new(machine: &Machine) -> Self {
        Self {
            cpu: SimCpu {
                inner: Arc::clone(&machine.0),
            },
        }
    }

    /// The machine behind this host.
    #[must_use]
    pub fn machine(&self) -> Machine {
        Machine(Arc::clone(&self.cpu.inner))
    }

    fn inner(&self) -> &Arc<Inner> {
        use_machine(&self.cpu.inner);
        &self.cpu.inner
    }

    /// The process of the calling thread.
    #[must_use]
    pub fn current_process(&self) -> Process {
        thread(|t| t.process.borrow().clone()).unwrap_or_else(|| self.machine().process())
    }
}

// SAFETY: pages come from `Memory`, which keeps them in place; a thread owns
// its processor while pinned; `run_on` and the locks are as `Cores` and `Raw` say.
unsafe impl Host for SimHost {
    type Cpu = SimCpu;
    type Mutex = SimMutex;
    type Spin = SimSpin;
    type UserSpace = SimUserSpace;
    type SharedPage = SimSharedPage;

    fn cpu(&self) -> &SimCpu {
        use_machine(&self.cpu.inner);
        &self.cpu
    }

    fn alloc_page(&self) -> Result<HostPage, NoMemory> {
        let fails = fault::strikes();
        let _inside = fault::inside();
        check_may_sleep(self.inner(), "alloc_page");
        if fails {
            return Err(NoMemory);
        }
        let mut state = self.inner().state();
        let frame = state.memory.allocate(1, Owner::Kernel);
        let address = state
            .memory
            .pointer(frame)
            .and_then(NonNull::new)
            .ok_or(NoMemory)?;
        Ok(HostPage {
            address,
            physical: Hpa(frame << 12),
        })
    }

    unsafe fn free_page(&self, page: HostPage) {
        let _inside = fault::inside();
        let mut state = self.inner().state();
        let physical = page.physical.0;
        if state.memory.owner(physical >> 12) != Some(Owner::Kernel) {
            state.finding(format!(
                "free_page of {physical:#x}, which is not an allocated page"
            ));
            return;
        }
        if state.memory.pointer(physical >> 12) != Some(page.address.as_ptr()) {
            state.finding(format!("free_page of {physical:#x} with another address"));
        }
        state.forget_guest(physical);
        if let Some(vmcs) = state.vmcss.remove(&physical) {
            if let Some(cpu) = vmcs.active_on {
                state.finding(format!(
                    "VMCS {physical:#x} is freed while active on processor {cpu}"
                ));
            }
        }
        for number in 0..state.cpus.len() {
            let cpu = &state.cpus[number];
            if cpu.vmxon == Some(physical) {
                state.finding(format!(
                    "the VMXON region of processor {number} is freed in use"
                ));
            } else if cpu.in_guest.is_some_and(|eptp| eptp & !0xfff == physical) {
                state.finding(format!(
                    "the EPT root of the guest on processor {number} is freed"
                ));
            }
        }
        state.memory.release(physical >> 12);
    }

    fn cpu_limit(&self) -> usize {
        self.inner().cores.count()
    }

    fn current_cpu(&self) -> usize {
        self.inner().cores.current()
    }

    fn preempt_off(&self) {
        let _inside = fault::inside();
        thread(|t| t.preempt.set(t.preempt.get() + 1));
        Cores::acquire(self.inner());
        Cores::service(self.inner());
    }

    unsafe fn preempt_on(&self) {
        let _inside = fault::inside();
        let depth = thread(|t| t.preempt.get());
        if depth == 0 {
            self.inner().finding("preempt_on without preempt_off");
            return;
        }
        thread(|t| t.preempt.set(depth - 1));
        Cores::release(self.inner());
    }

    fn interrupts_save(&self) -> usize {
        let _inside = fault::inside();
        let depth = thread(|t| t.masked.get());
        thread(|t| t.masked.set(depth + 1));
        Cores::acquire(self.inner());
        depth
    }

    unsafe fn interrupts_restore(&self, saved: usize) {
        let _inside = fault::inside();
        let depth = thread(|t| t.masked.get());
        if depth != saved + 1 {
            self.inner().finding(format!(
                "interrupts_restore({saved}) with interrupts masked {depth} times"
            ));
        }
        if saved == 0 {
            self.check_vmxe();
        }
        thread(|t| t.masked.set(saved));
        Cores::service(self.inner());
        Cores::release(self.inner());
    }

    fn run_on(&self, cpu: usize, call: &(dyn Fn() + Sync)) -> Result<(), CpuOffline> {
        let _inside = fault::inside();
        self.check_may_call("run_on");
        if Cores::run_on(self.inner(), cpu, call) {
            Ok(())
        } else {
            Err(CpuOffline)
        }
    }

    fn run_on_all(&self, call: &(dyn Fn() + Sync)) {
        let _inside = fault::inside();
        self.check_may_call("run_on_all");
        for cpu in 0..self.inner().cores.count() {
            if self.inner().cores.is_online(cpu) {
                Cores::run_on(self.inner(), cpu, call);
            }
        }
    }

    fn kick(&self, cpu: usize) {
        let _inside = fault::inside();
        self.inner().cores.raise(cpu);
    }

    unsafe fn set_vmxe(&self, on: bool) {
        let _inside = fault::inside();
        let cpu = self.inner().cores.current();
        if !Cores::is_pinned() {
            self.inner().finding("set_vmxe while not pinned");
        }
        let mut state = self.inner().state();
        if !on && state.cpus[cpu].vmxon.is_some() {
            state.finding(format!(
                "CR4.VMXE cleared in VMX operation on processor {cpu}: #GP"
            ));
            return;
        }
        if on && !state.cpus[cpu].msrs.contains_key(&0x480) {
            state.finding("CR4.VMXE set on a processor without VMX: #GP");
            return;
        }
        let bit = 1 << 13;
        let cr4 = &mut state.cpus[cpu].cr4;
        *cr4 = if on { *cr4 | bit } else { *cr4 & !bit };
    }

    fn keeps_vmxe(&self) -> bool {
        self.inner().keeps_vmxe.load(Ordering::SeqCst)
    }

    fn is_in_vmx_operation(&self) -> bool {
        let _inside = fault::inside();
        if thread(|t| t.masked.get() == 0) {
            self.inner()
                .finding("is_in_vmx_operation with interrupts on");
        }
        let cpu = self.inner().cores.current();
        let mut state = self.inner().state();
        // The other hypervisor's thread was interrupted before its VMXON.
        if state.foreign_late > 0 && state.cpus[cpu].foreign.is_some() {
            state.foreign_late -= 1;
            return false;
        }
        state.cpus[cpu].vmxon.is_some()
    }

    fn tolerates_gs(&self) -> bool {
        self.inner().tolerates_gs.load(Ordering::SeqCst)
    }

    fn mitigations(&self) -> Mitigations {
        self.inner().wanted()
    }

    fn guest_left(&self) {
        let _inside = fault::inside();
        let cpu = self.inner().cores.current();
        if thread(|t| t.masked.get() == 0) {
            self.inner().finding("guest_left with interrupts on");
        }
        self.inner().state().cpus[cpu].tr_limit = TR_LIMIT;
    }

    fn signals_sent(&self) -> u32 {
        self.inner().signals.load(Ordering::SeqCst)
    }

    fn thread_turn(&self) -> u64 {
        let _inside = fault::inside();
        if thread(|t| t.masked.get() == 0) {
            self.inner().finding("thread_turn with interrupts on");
        }
        let cpu = self.inner().cores.current();
        let predictor = &self.inner().state().cpus[cpu].predictor;
        predictor.thread << 32 | predictor.turns
    }

    fn yield_now(&self) {
        std::thread::yield_now();
    }

    fn event_pending(&self) -> bool {
        let _inside = fault::inside();
        Cores::service(self.inner());
        self.inner().event_pending.load(Ordering::SeqCst)
    }

    fn has_foreign_msrs(&self) -> bool {
        self.inner().foreign_msrs.load(Ordering::SeqCst)
    }

    fn fpu_begin(&self) {
        let _inside = fault::inside();
        self.preempt_off();
        thread(|t| t.fpu.set(t.fpu.get() + 1));
        let inner = self.inner();
        let cpu = inner.cores.current();
        let mut state = inner.state();
        let processor = &mut state.cpus[cpu];
        if processor.host_extended.is_some() {
            state.finding("fpu_begin inside fpu_begin");
            return;
        }
        processor.host_extended = Some((processor.extended.clone(), processor.xcr0));
    }

    unsafe fn fpu_end(&self) {
        let _inside = fault::inside();
        let inner = self.inner();
        let cpu = inner.cores.current();
        let mut state = inner.state();
        match state.cpus[cpu].host_extended.take() {
            Some((registers, xcr0)) => {
                let now = state.cpus[cpu].xcr0;
                if now != xcr0 {
                    state.finding(format!("fpu_end with XCR0 {now:#x} instead of {xcr0:#x}"));
                }
                state.cpus[cpu].extended = registers;
            }
            None => state.finding("fpu_end without fpu_begin"),
        }
        drop(state);
        thread(|t| t.fpu.set(t.fpu.get().saturating_sub(1)));
        // SAFETY: pairs with the `preempt_off` in `fpu_begin`.
        unsafe { self.preempt_on() };
    }

    fn monotonic_ns(&self) -> u64 {
        self.inner().clock.fetch_add(100, Ordering::SeqCst)
    }

    fn user_space(&self) -> Result<SimUserSpace, NoMemory> {
        let fails = fault::strikes();
        let _inside = fault::inside();
        check_may_sleep(self.inner(), "user_space");
        if fails {
            return Err(NoMemory);
        }
        Ok(SimUserSpace::new(self.current_process()))
    }

    fn shared_page(&self) -> Result<SimSharedPage, NoMemory> {
        let fails = fault::strikes();
        let _inside = fault::inside();
        check_may_sleep(self.inner(), "shared_page");
        if fails {
            return Err(NoMemory);
        }
        let frame = self.inner().state().memory.allocate(1, Owner::Shared);
        let kernel = self.inner().state().memory.pointer(frame);
        let process = self.current_process();
        Ok(SimSharedPage {
            inner: Arc::clone(self.inner()),
            frame,
            kernel: kernel.and_then(NonNull::new).ok_or(NoMemory)?,
            user: process.map_frame(frame),
            process,
        })
    }
}

impl SimHost {
    /// Interrupts come on: a host that keeps its own CR4 would now write it.
    fn check_vmxe(&self) {
        let inner = self.inner();
        if inner.keeps_vmxe.load(Ordering::SeqCst) {
            return;
        }
        let cpu = inner.cores.current();
        let mut state = inner.state();
        let processor = &state.cpus[cpu];
        if processor.foreign.is_none() && processor.cr4 & 1 << 13 != 0 {
            state.finding(format!(
                "CR4.VMXE set with interrupts on, on processor {cpu}, and the host does not know"
            ));
        }
    }

    fn check_may_call(&self, what: &str) {
        if thread(|t| t.masked.get() > 0 || t.in_call.get() > 0) {
            self.inner()
                .finding(format!("{what} with interrupts masked or from a call"));
        }
    }
}

/// A page that the kernel and a process both map.
pub struct SimSharedPage {
    inner: Arc<Inner>,
    frame: u64,
    kernel: NonNull<u8>,
    process: Process,
    user: Hva,
}

// SAFETY: the page is memory, and stays until the drop.
unsafe impl Send for SimSharedPage {}
// SAFETY: as above.
unsafe impl Sync for SimSharedPage {}

// SAFETY: the page stays in `Memory` for the life of the value.
unsafe impl SharedPage for SimSharedPage {
    fn kernel(&self) -> NonNull<u8> {
        self.kernel
    }

    fn user(&self) -> Hva {
        self.user
    }
}

impl Drop for SimSharedPage {
    fn drop(&mut self) {
        let _inside = fault::inside();
        self.process.unmap_frame(self.user);
        self.inner.state().memory.release(self.frame);
    }
}
