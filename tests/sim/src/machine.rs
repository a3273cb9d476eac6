//! The simulated machine: processors, VMCSs, memory, and what went wrong.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmx::arch::msr;
use vmx::cpu::{KernelSelectors, TableRegister, UserSelectors};
use vmx::host::Mitigations;

use crate::check::EntryFailure;
use crate::cores::Cores;
use crate::ept::Tlb;
use crate::extended::Extended;
use crate::memory::{Memory, Owner};
use crate::pmu::Watch;
use crate::predictor::Predictor;
use crate::profile::Profile;
use crate::step::{Scripts, Step};
use crate::user::Process;
use crate::vmcs::Vmcs;

/// How often each instruction was executed by the code under test, and each
/// exit taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Counts {
    pub vmread: u64,
    pub vmwrite: u64,
    pub vmlaunch: u64,
    pub vmresume: u64,
    pub vmxon: u64,
    pub vmxoff: u64,
    pub vmclear: u64,
    pub vmptrld: u64,
    pub vmptrst: u64,
    pub invept: u64,
    pub invvpid: u64,
    pub rdmsr: u64,
    pub wrmsr: u64,
    pub swapgs: u64,
    pub cpuid: u64,
    pub xsave: u64,
    pub xrstor: u64,
    pub xsetbv: u64,
    pub raise_nmi: u64,
    pub raise_machine_check: u64,
    pub host_interrupts: u64,
    /// Entries with nothing against speculation.
    pub plain_entries: u64,
    pub cleared_buffers: u64,
    pub filled_returns: u64,
    pub flushed_l1d: u64,
    /// IBPBs of the host's.
    pub forgot_branches: u64,
    /// Exits by basic reason.
    pub exits: BTreeMap<u16, u64>,
}

impl Counts {
    /// Exits of one reason.
    #[must_use]
    pub fn exits_of(&self, reason: u16) -> u64 {
        self.exits.get(&reason).copied().unwrap_or(0)
    }

    /// All exits.
    #[must_use]
    pub fn exits_total(&self) -> u64 {
        self.exits.values().sum()
    }
}

/// An event the guest received through its IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The vector.
    pub vector: u8,
    /// Interruption type, SDM table 25-17.
    pub kind: u8,
    /// Its error code, if it pushed one.
    pub error_code: Option<u32>,
    /// VM entry injected it; otherwise the guest raised it itself.
    pub injected: bool,
    /// CR2 at delivery.
    pub cr2: u64,
}

/// The limit of the host's task-state segment, with its I/O bitmap.
pub(crate) const TR_LIMIT: u64 = 0x206f;

/// One logical processor.
pub(crate) struct Processor {
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) dr: [u64; 8],
    pub(crate) msrs: BTreeMap<u32, u64>,
    pub(crate) gdtr: TableRegister,
    pub(crate) idtr: TableRegister,
    pub(crate) kernel_selectors: KernelSelectors,
    pub(crate) user_selectors: UserSelectors,
    pub(crate) tr_base: u64,
    /// TR's limit; an exit makes it 0x67.
    pub(crate) tr_limit: u64,
    pub(crate) xcr0: u64,
    pub(crate) extended: Extended,
    /// The VMXON region while in VMX operation.
    pub(crate) vmxon: Option<u64>,
    /// Another hypervisor executed the VMXON.
    pub(crate) foreign: Option<u64>,
    /// The current-VMCS pointer.
    pub(crate) current: Option<u64>,
    pub(crate) tlb: Tlb,
    /// The EPTP of the guest that runs here now.
    pub(crate) in_guest: Option<u64>,
    /// What `fpu_begin` put away.
    pub(crate) host_extended: Option<(Extended, u64)>,
    /// Host registers when the current owner took the processor.
    pub(crate) at_pin: Option<HostRegisters>,
    /// Its performance counters.
    pub(crate) watch: Watch,
    pub(crate) predictor: Predictor,
}

/// The host registers that must be the same when preemption is possible again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostRegisters(pub(crate) Vec<(&'static str, u64)>);

/// MSRs that belong to the host or its processes, by name.
const HOST_MSRS: &[(u32, &str)] = &[
    (msr::MSR_MEMORY_CTRL, "MSR_MEMORY_CTRL"),
    (msr::IA32_SYSENTER_CS, "IA32_SYSENTER_CS"),
    (msr::IA32_SYSENTER_ESP, "IA32_SYSENTER_ESP"),
    (msr::IA32_SYSENTER_EIP, "IA32_SYSENTER_EIP"),
    (msr::IA32_DEBUGCTL, "IA32_DEBUGCTL"),
    (msr::IA32_PAT, "IA32_PAT"),
    (msr::IA32_EFER, "IA32_EFER"),
    (msr::IA32_STAR, "IA32_STAR"),
    (msr::IA32_LSTAR, "IA32_LSTAR"),
    (msr::IA32_CSTAR, "IA32_CSTAR"),
    (msr::IA32_FMASK, "IA32_FMASK"),
    (msr::IA32_FS_BASE, "IA32_FS_BASE"),
    (msr::IA32_GS_BASE, "IA32_GS_BASE"),
    (msr::IA32_KERNEL_GSBASE, "IA32_KERNEL_GSBASE"),
    (msr::IA32_TSC_AUX, "IA32_TSC_AUX"),
    (msr::IA32_SPEC_CTRL, "IA32_SPEC_CTRL"),
    (msr::IA32_XSS, "IA32_XSS"),
    (msr::IA32_PERF_GLOBAL_CTRL, "IA32_PERF_GLOBAL_CTRL"),
];

impl Processor {
    fn new(profile: &Profile, number: usize) -> Self {
        let stride = 0x10_0000 * number as u64;
        let mut msrs = profile.msrs.clone();
        for base in [msr::IA32_GS_BASE, msr::IA32_FS_BASE] {
            if let Some(value) = msrs.get_mut(&base) {
                *value += stride;
            }
        }
        msrs.insert(msr::IA32_TSC_AUX, number as u64);
        let osxsave = profile.host_cr4 >> 18 & 1 != 0;
        Self {
            cr0: 0x8005_0033,
            cr2: 0xdead_0000,
            cr3: 0x123_4000
                | if profile.host_cr4 >> 17 & 1 != 0 {
                    5
                } else {
                    0
                },
            cr4: profile.host_cr4,
            dr: [0x1000, 0x2000, 0x3000, 0x4000, 0, 0, 0xffff_0ff0, 0x400],
            msrs,
            gdtr: TableRegister {
                base: 0xffff_fe00_0000_1000 + stride,
                limit: 0x7f,
            },
            idtr: TableRegister {
                base: 0xffff_fe00_0000_0000,
                limit: 0xfff,
            },
            kernel_selectors: KernelSelectors {
                cs: 0x10,
                ss: 0x18,
                tr: 0x40,
            },
            user_selectors: UserSelectors::default(),
            tr_base: 0xffff_fe00_0000_3000 + stride,
            tr_limit: TR_LIMIT,
            xcr0: if osxsave { profile.xcr0_supported } else { 0 },
            extended: Extended::pattern(profile, 0x40 + u8::try_from(number).unwrap_or(0)),
            vmxon: None,
            foreign: None,
            current: None,
            tlb: Tlb::default(),
            in_guest: None,
            host_extended: None,
            at_pin: None,
            watch: Watch::default(),
            predictor: Predictor::default(),
        }
    }

    /// A thread of the host takes the processor.
    pub(crate) fn pin(&mut self) {
        self.at_pin = Some(self.host_registers());
        self.watch_counters();
    }

    /// What the host wants back. CR0.TS is the host's to change; the limit of
    /// IDTR becomes 0xffff at any exit (SDM 28.5.2 "Loading Host Segment and
    /// Descriptor-Table Registers") and no host minds.
    pub(crate) fn host_registers(&self) -> HostRegisters {
        let mut all = vec![
            ("CR0", self.cr0 & !8),
            ("CR3", self.cr3),
            ("CR4", self.cr4 & !(1 << 13)),
            ("DR0", self.dr[0]),
            ("DR1", self.dr[1]),
            ("DR2", self.dr[2]),
            ("DR3", self.dr[3]),
            ("DR7", self.dr[7]),
            ("XCR0", self.xcr0),
            ("GDTR base", self.gdtr.base),
            ("GDTR limit", u64::from(self.gdtr.limit)),
            ("LDTR", u64::from(self.user_selectors.ldtr)),
            ("IDTR base", self.idtr.base),
            ("TR base", self.tr_base),
            ("TR limit", self.tr_limit),
            ("CS", u64::from(self.kernel_selectors.cs)),
            ("SS", u64::from(self.kernel_selectors.ss)),
            ("DS", u64::from(self.user_selectors.ds)),
            ("ES", u64::from(self.user_selectors.es)),
            ("FS", u64::from(self.user_selectors.fs)),
            ("GS", u64::from(self.user_selectors.gs)),
            ("TR", u64::from(self.kernel_selectors.tr)),
        ];
        for (number, name) in HOST_MSRS {
            if let Some(value) = self.msrs.get(number) {
                all.push((name, *value));
            }
        }
        HostRegisters(all)
    }
}

/// What is known of a pinned frame.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pin {
    /// How often it is pinned.
    pub(crate) count: u64,
    /// The process has it no more: it is freed with the last pin.
    pub(crate) orphan: bool,
}

/// Everything behind the machine's lock.
pub(crate) struct State {
    pub(crate) cpus: Vec<Processor>,
    pub(crate) vmcss: HashMap<u64, Vmcs>,
    pub(crate) memory: Memory,
    pub(crate) counts: Counts,
    pub(crate) findings: Vec<String>,
    pub(crate) failures: Vec<EntryFailure>,
    /// The next VM entry meets a machine check.
    pub(crate) check_at_entry: bool,
    pub(crate) received: Vec<Received>,
    /// Every EPTP a guest ran with.
    pub(crate) eptps: Vec<u64>,
    /// By VPID and EPT root, the processor where such a guest was entered last.
    pub(crate) ran_last: HashMap<(u16, u64), usize>,
    /// See [`Machine::delay_foreign_vmxon`].
    pub(crate) foreign_late: u32,
    /// User frames that are pinned.
    pub(crate) pinned: BTreeMap<u64, Pin>,
    pub(crate) tsc: u64,
    pub(crate) idle: u64,
}

impl State {
    /// Records that the code under test did what it must not.
    pub(crate) fn finding(&mut self, text: impl Into<String>) {
        let text = text.into();
        if std::env::var_os("SIM_TRACE").is_some() {
            eprintln!(
                "finding: {text}\n{}",
                std::backtrace::Backtrace::force_capture()
            );
        }
        self.findings.push(text);
    }

    /// The current VMCS of a processor.
    pub(crate) fn current(&mut self, cpu: usize) -> Option<(u64, &mut Vmcs)> {
        let pointer = self.cpus[cpu].current?;
        Some((pointer, self.vmcss.get_mut(&pointer)?))
    }
}

pub(crate) struct Inner {
    pub(crate) profile: Profile,
    pub(crate) state: Mutex<State>,
    pub(crate) cores: Cores,
    pub(crate) scripts: Mutex<Scripts>,
    pub(crate) process: Mutex<Option<Process>>,
    pub(crate) clock: AtomicU64,
    pub(crate) event_pending: AtomicBool,
    pub(crate) foreign_msrs: AtomicBool,
    pub(crate) signals: AtomicU32,
    pub(crate) keeps_vmxe: AtomicBool,
    pub(crate) tolerates_gs: AtomicBool,
    /// User memory is pinned, not borrowed.
    pub(crate) pins: AtomicBool,
    pub(crate) mitigations: Mutex<Mitigations>,
    pub(crate) locks: AtomicUsize,
    pub(crate) listeners: AtomicUsize,
    pub(crate) zero_frame: u64,
}

impl Inner {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn scripts(&self) -> MutexGuard<'_, Scripts> {
        self.scripts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn finding(&self, text: impl Into<String>) {
        self.state().finding(text);
    }

    /// What is to be done against speculation.
    pub(crate) fn wanted(&self) -> Mitigations {
        *self
            .mitigations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let late = self.state().memory.written_after_free();
        if !late.is_empty() {
            self.finding(format!("pages written after they were freed: {late:x?}"));
        }
        let pinned = self.state().pinned.len();
        if pinned != 0 {
            self.finding(format!("{pinned} frames are still pinned"));
        }
        let findings = std::mem::take(&mut self.state().findings);
        if !findings.is_empty() && !std::thread::panicking() {
            panic!("the simulated machine found:\n  {}", findings.join("\n  "));
        }
    }
}

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
