//! The simulated machine behind its lock: processors, VMCSs, memory, and what
//! went wrong.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmx::arch::msr;
use vmx::cpu::{KernelSelectors, TableRegister, UserSelectors};
use vmx::host::Mitigations;

use crate::check::EntryFailure;
use crate::cores::Cores;
use crate::ept::Tlb;
use crate::extended::Extended;
use crate::memory::Memory;
use crate::pmu::Watch;
use crate::predictor::Predictor;
use crate::profile::Profile;
use crate::step::Scripts;
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
    /// RF in the RFLAGS that the frame got.
    pub resume_flag: bool,
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
    pub(crate) fn new(profile: &Profile, number: usize) -> Self {
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
            ("DR6", self.dr[6]),
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
