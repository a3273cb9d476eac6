//! The simulated machine as a test holds it: made, told what to do, and asked.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmx::host::Mitigations;

use crate::check::EntryFailure;
use crate::cores::Cores;
use crate::memory::{Memory, Owner};
use crate::profile::Profile;
use crate::state::{Counts, Inner, Processor, Received, State};
use crate::step::{Scripts, Step};
use crate::user::Process;

/// A handle to a simulated machine, for tests. The code under test sees it
/// through [`crate::SimHost`]. When the last handle goes, what was found and
/// not taken by [`Machine::take_findings`] fails the test.
#[derive(Clone)]
pub struct Machine(pub(crate) Arc<Inner>);

impl Machine {
    /// A machine with `cpus` logical processors of one model.
    #[must_use]
    pub fn new(profile: Profile, cpus: usize) -> Self {
        let mut memory = Memory::default();
        let zero_frame = memory.allocate(1, Owner::Zero);
        let state = State {
            cpus: (0..cpus).map(|n| Processor::new(&profile, n)).collect(),
            vmcss: HashMap::new(),
            memory,
            counts: Counts::default(),
            findings: Vec::new(),
            failures: Vec::new(),
            check_at_entry: false,
            received: Vec::new(),
            eptps: Vec::new(),
            ran_last: HashMap::new(),
            foreign_late: 0,
            pinned: BTreeMap::new(),
            tsc: 1_000_000,
            idle: 0,
        };
        let machine = Self(Arc::new(Inner {
            profile,
            state: Mutex::new(state),
            cores: Cores::new(cpus),
            scripts: Mutex::new(Scripts::default()),
            process: Mutex::new(None),
            clock: AtomicU64::new(1),
            event_pending: AtomicBool::new(false),
            foreign_msrs: AtomicBool::new(false),
            signals: AtomicU32::new(0),
            keeps_vmxe: AtomicBool::new(true),
            tolerates_gs: AtomicBool::new(true),
            pins: AtomicBool::new(std::env::var_os("SIM_PIN").is_some()),
            mitigations: Mutex::new(Mitigations::Needed),
            locks: AtomicUsize::new(0),
            listeners: AtomicUsize::new(0),
            zero_frame,
        }));
        let first = Process::new(&machine);
        *machine
            .0
            .process
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(first);
        crate::cores::use_machine(&machine.0);
        machine
    }

    /// A Haswell with two processors.
    #[must_use]
    pub fn haswell() -> Self {
        Self::new(Profile::haswell(), 2)
    }

    /// Whether this host pins user memory because it cannot report changes of
    /// it. Without a word it does if `SIM_PIN` is set. To be said before the
    /// first VM is made.
    pub fn pin_user_memory(&self, pins: bool) {
        self.0.pins.store(pins, Ordering::SeqCst);
    }

    /// Whether it does.
    #[must_use]
    pub fn pins_user_memory(&self) -> bool {
        self.0.pins.load(Ordering::SeqCst)
    }

    /// Pages that the code under test gives back it gets again, the lowest first, as long
    /// as there are some. Writes after free go unseen then.
    pub fn reuse_pages(&self) {
        self.0.state().memory.reuse();
    }

    /// Frames of user memory that are pinned.
    #[must_use]
    pub fn pinned_frames(&self) -> usize {
        self.0.state().pinned.len()
    }

    /// The host, as the code under test takes it.
    #[must_use]
    pub fn host(&self) -> crate::SimHost {
        crate::SimHost::new(self)
    }

    /// The model.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.0.profile
    }

    /// The process that threads belong to unless told otherwise.
    ///
    /// # Panics
    /// Never: a machine has one from the start.
    #[must_use]
    pub fn process(&self) -> Process {
        self.0
            .process
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .expect("made with the machine")
    }

    /// Appends steps to what guests run by the calling thread do next.
    pub fn script(&self, steps: impl IntoIterator<Item = Step>) {
        self.0.scripts().push_here(steps);
    }

    /// Steps that no guest has finished, of this thread.
    #[must_use]
    pub fn script_left(&self) -> usize {
        self.0.scripts().left_here()
    }

    /// What was executed so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.state().counts.clone()
    }

    /// Starts counting anew.
    pub fn reset_counts(&self) {
        self.0.state().counts = Counts::default();
    }

    /// VM entries that failed, oldest first.
    #[must_use]
    pub fn entry_failures(&self) -> Vec<EntryFailure> {
        self.0.state().failures.clone()
    }

    /// Events that guests received since the last call.
    #[must_use]
    pub fn take_received(&self) -> Vec<Received> {
        std::mem::take(&mut self.0.state().received)
    }

    /// What the code under test did wrong so far.
    #[must_use]
    pub fn findings(&self) -> Vec<String> {
        self.0.state().findings.clone()
    }

    /// Takes the findings, so that they do not fail the test.
    #[must_use]
    pub fn take_findings(&self) -> Vec<String> {
        std::mem::take(&mut self.0.state().findings)
    }

    /// Sends an interrupt to a processor.
    pub fn interrupt(&self, cpu: usize) {
        self.0.cores.raise(cpu);
    }

    /// Sends an NMI to a processor: the guest there exits if it should.
    pub fn nmi(&self, cpu: usize) {
        self.0.cores.raise_nmi(cpu);
    }

    /// The next `times` looks find the other hypervisor between setting
    /// CR4.VMXE and its VMXON.
    pub fn delay_foreign_vmxon(&self, times: u32) {
        self.0.state().foreign_late = times;
    }

    /// What [`vmx::host::Host::mitigations`] says. Before the hypervisor.
    ///
    /// # Panics
    /// Never: nothing panics with the lock.
    pub fn set_mitigations(&self, wanted: Mitigations) {
        *self.0.mitigations.lock().unwrap() = wanted;
    }

    /// What [`vmx::host::Host::keeps_vmxe`] says. Before the first VM.
    pub fn set_keeps_vmxe(&self, keeps: bool) {
        self.0.keeps_vmxe.store(keeps, Ordering::SeqCst);
    }

    /// What [`vmx::host::Host::tolerates_gs`] says. Before the first vCPU.
    pub fn set_tolerates_gs(&self, tolerates: bool) {
        self.0.tolerates_gs.store(tolerates, Ordering::SeqCst);
    }

    /// A machine check comes while the next VM entry loads the guest's state.
    pub fn machine_check_at_entry(&self) {
        self.0.state().check_at_entry = true;
    }

    /// What [`vmx::host::Host::has_foreign_msrs`] says.
    pub fn set_foreign_msrs(&self, foreign: bool) {
        self.0.foreign_msrs.store(foreign, Ordering::SeqCst);
    }

    /// What [`vmx::host::Host::event_pending`] says.
    pub fn set_event_pending(&self, pending: bool) {
        self.0.event_pending.store(pending, Ordering::SeqCst);
    }

    /// A signal is sent to a thread that blocks it and is not in the guest: no interrupt
    /// comes of it.
    pub fn send_signal(&self) {
        self.0.signals.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether each time a thread takes a processor it gets another one.
    pub fn set_migrate(&self, migrate: bool) {
        self.0.cores.set_migrate(migrate);
    }

    /// Binds the calling thread to a processor, or frees it.
    pub fn set_affinity(&self, cpu: Option<usize>) {
        crate::cores::set_affinity(cpu);
    }

    /// Takes a processor away, or gives it back: `run_on` refuses it.
    pub fn set_online(&self, cpu: usize, online: bool) {
        self.0.cores.set_online(cpu, online);
    }

    /// Moves the host's clock.
    pub fn advance_ns(&self, ns: u64) {
        self.0.clock.fetch_add(ns, Ordering::SeqCst);
    }

    /// Host pages, shared pages and locks in use by the code under test.
    #[must_use]
    pub fn in_use(&self) -> (usize, usize, usize) {
        let state = self.0.state();
        (
            state.memory.count(Owner::Kernel),
            state.memory.count(Owner::Shared),
            self.0.locks.load(Ordering::SeqCst),
        )
    }

    /// Checks that the code under test has given everything back: pages, locks,
    /// listeners, VMX operation, CR4.VMXE.
    ///
    /// # Panics
    /// With what is left, or with what was found so far.
    pub fn assert_clean(&self) {
        let (pages, shared, locks) = self.in_use();
        assert_eq!(pages, 0, "host pages not given back");
        assert_eq!(shared, 0, "shared pages not given back");
        assert_eq!(locks, 0, "locks not given back");
        let listeners = self.0.listeners.load(Ordering::SeqCst);
        assert_eq!(listeners, 0, "listeners not taken back");
        let state = self.0.state();
        for (number, cpu) in state.cpus.iter().enumerate() {
            assert_eq!(
                cpu.vmxon, cpu.foreign,
                "processor {number} is left in VMX operation"
            );
            let vmxe = cpu.cr4 >> 13 & 1 != 0;
            assert_eq!(
                vmxe,
                cpu.foreign.is_some(),
                "CR4.VMXE of processor {number}"
            );
            if cpu.foreign.is_some() {
                let current = cpu.current.and_then(|pointer| state.vmcss.get(&pointer));
                assert!(
                    current.is_some_and(|vmcs| vmcs.foreign),
                    "the other hypervisor's VMCS is not current on processor {number}"
                );
            }
        }
        assert!(state.findings.is_empty(), "found: {:#?}", state.findings);
    }

    /// Puts every processor in VMX operation for another hypervisor, with a
    /// VMCS of its own current.
    pub fn add_foreign_hypervisor(&self) {
        let mut state = self.0.state();
        let state = &mut *state;
        for cpu in &mut state.cpus {
            let region = state.memory.allocate(1, Owner::Foreign) << 12;
            let vmcs = state.memory.allocate(1, Owner::Foreign) << 12;
            cpu.cr4 |= 1 << 13;
            cpu.vmxon = Some(region);
            cpu.foreign = Some(region);
            cpu.current = Some(vmcs);
        }
        for (number, cpu) in state.cpus.iter().enumerate() {
            let entry = state.vmcss.entry(cpu.current.unwrap_or(0)).or_default();
            entry.foreign = true;
            entry.active_on = Some(number);
        }
    }

    /// The other hypervisor's thread gets a processor and runs its guest there. Its VMCS is
    /// still current, so it executes no IBPB.
    pub fn run_foreign_guest(&self, cpu: usize) {
        let mut state = self.0.state();
        state.take_turn(cpu, 0);
        let vmcs = state.cpus[cpu].current.unwrap_or(0);
        state.train(cpu, vmcs);
    }

    /// A VMCS field of a VMCS region, for tests that look behind the code.
    #[must_use]
    pub fn vmcs_field(&self, vmcs: u64, encoding: u32) -> Option<u64> {
        Some(self.0.state().vmcss.get(&vmcs)?.get(encoding))
    }

    /// The current VMCS of a processor.
    #[must_use]
    pub fn current_vmcs(&self, cpu: usize) -> Option<u64> {
        self.0.state().cpus[cpu].current
    }

    /// Whether a processor is in VMX operation.
    #[must_use]
    pub fn in_vmx(&self, cpu: usize) -> bool {
        self.0.state().cpus[cpu].vmxon.is_some()
    }

    /// An MSR of a processor.
    #[must_use]
    pub fn msr(&self, cpu: usize, number: u32) -> Option<u64> {
        self.0.state().cpus[cpu].msrs.get(&number).copied()
    }

    /// Changes an MSR of a processor from outside.
    pub fn set_msr(&self, cpu: usize, number: u32, value: u64) {
        self.0.state().cpus[cpu].msrs.insert(number, value);
    }

    /// Changes the time-stamp counter of all processors from outside.
    pub fn set_tsc(&self, value: u64) {
        self.0.state().tsc = value;
    }

    /// Changes a debug register of a processor from outside.
    pub fn set_dr(&self, cpu: usize, index: usize, value: u64) {
        self.0.state().cpus[cpu].dr[index] = value;
    }

    /// Sets the data segment selectors and LDTR of the host, as a 32-bit
    /// process has them.
    pub fn set_host_selectors(&self, data: u16, ldtr: u16) {
        for cpu in &mut self.0.state().cpus {
            cpu.user_selectors.ds = data;
            cpu.user_selectors.es = data;
            cpu.user_selectors.fs = data;
            cpu.user_selectors.gs = data;
            cpu.user_selectors.ldtr = ldtr;
        }
    }
}
