//! A virtual processor: its VMCS, its registers, and the run loop.
//!
//! [`Vcpu::run`] enters the guest and handles exits until one is the client's
//! ([`run`]). What an exit needs is decoded once; the handlers ([`exits`]) see
//! that, a [`Current`] VMCS and the [`Inner`] state of the vCPU.

mod cpuid;
mod emulation;
mod events;
mod exits;
mod guest;
mod msr;
mod run;
mod state;
mod task_switch;
mod vmcs;

pub use exits::table as exit_table;
pub use guest::{Guest, MAX_VCPUS};
pub use vmcs::entry_checks;

use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, Ordering};

use abi::cpuid::CpuidEntry;
use abi::debug::VcpuDebug;
use abi::msr::MsrData;
use abi::tunnel::TunnelInfo;
use abi::vcpu_state::{FxLayout, VcpuState};

use crate::Error;
use crate::arch::exit::ExitReason;
use crate::arch::field;
use crate::arch::reg::{Cr0, Interruptibility};
use crate::cpu::Cpu;
use crate::fallible::{NoMemory, Shared, try_box};
use crate::host::{Host, OwnedPage};
use crate::memory::Reserve;
use crate::operation::{Place, write_revision};
use crate::sync::{Lock, LockClass};

use cpuid::{Answers, CpuidTable, Features};
use emulation::Emulation;
use events::Events;
use events::pending::PendingVectors;
use events::task_priority::TaskPriority;
use msr::MsrStore;
use msr::switched::SwitchedMsrs;
use run::loan;
use run::tunnel::Channel;
use state::debug::DebugRegisters;
use state::extended::Extended;
use state::modes::Modes;
use state::pdptes::Unfinished;
use state::pmu::Pmu;
use state::registers::Registers;
use state::split_lock::SplitLocks;
use vmcs::Current;
use vmcs::host_state::HostState;
use vmcs::setup;

/// MSRs that do not exist and are counted, by number.
const UNKNOWN_MSRS: usize = 16;

/// What only the thread that holds the vCPU's lock touches.
pub struct Inner<H: Host> {
    registers: Registers,
    modes: Modes,
    /// The guest's CR2, which no VMCS field holds.
    cr2: u64,
    priority: TaskPriority<H>,
    events: Events,
    extended: Extended<H>,
    switched: SwitchedMsrs,
    msrs: Box<MsrStore>,
    pmu: Box<Pmu>,
    debug: DebugRegisters,
    split_locks: SplitLocks,
    host_state: HostState,
    emulation: Box<Emulation>,
    reserve: Reserve<H>,
    cpuid: Box<CpuidTable>,
    /// What that table answered.
    answers: Box<Answers>,
    /// What that table offers.
    features: Features,
    cpuid_version: u32,
    /// The primary controls as the VMCS has them.
    primary: u32,
    /// The TSC offset as the VMCS has it.
    tsc_offset: u64,
    /// MSRs the guest asked for in vain: number and times.
    unknown_msrs: Box<[(u32, u32); UNKNOWN_MSRS]>,
    /// An IN that the client answers before the next RUN: bytes.
    pending_in: Option<u8>,
    /// The PDPTEs in the VMCS are older than CR0, CR3 or CR4.
    pdptes_stale: bool,
    /// A write of CR0 or CR4 that waits for them.
    unfinished: Option<Unfinished>,
    /// Linear translations are to be dropped before the next entry.
    flush_linear: bool,
    /// The emulator completed an instruction; its effects on the VMCS are due.
    completed: bool,
    /// A client that single-steps has not heard of the last instruction.
    step_due: bool,
    /// The last look found nothing to do before an entry, and nothing has
    /// happened since that could change that: see `Vcpu::is_quiet`.
    quiet: bool,
    /// The guest sent an interprocessor interrupt by the client's APIC, which
    /// knows it when the next RUN comes.
    sent_ipi: bool,
    /// [`Host::signals_sent`] when RUN was called: one that comes later ends it.
    signals: u32,
    /// Nothing else would tell the other vCPUs: see [`Host::hears_signals`].
    looks_for_ipis: bool,
    /// The guest is lost; every RUN says so.
    dead: bool,
    /// Exits so far, by basic reason.
    exits: Box<[u64; ExitReason::COUNT]>,
}

/// A virtual processor.
pub struct Vcpu<H: Host> {
    place: Place,
    inner: Lock<H::Mutex, Box<Inner<H>>>,
    vectors: PendingVectors,
    channel: Channel<H>,
    /// Some thread is in RUN.
    running: AtomicBool,
    /// Kept for the processor, which has their addresses.
    _vmcs: OwnedPage<H>,
    msr_bitmap: OwnedPage<H>,
    number: Number<H>,
}

/// A vCPU's number, given back when dropped, and its VM.
struct Number<H: Host> {
    id: u32,
    guest: Shared<Guest<H>>,
}

impl<H: Host> Number<H> {
    fn take(guest: &Shared<Guest<H>>, id: u32) -> Result<Self, Error> {
        guest.take_vcpu(id)?;
        Ok(Self {
            id,
            guest: guest.clone(),
        })
    }
}

impl<H: Host> Drop for Number<H> {
    fn drop(&mut self) {
        self.guest.free_vcpu(self.id);
    }
}

impl<H: Host> Inner<H> {
    /// The state of a vCPU whose VMCS nobody has written yet. Boxed part by
    /// part, and never inlined: a kernel's stack is small.
    #[inline(never)]
    fn new(guest: &Guest<H>, id: u32) -> Result<Box<Self>, NoMemory> {
        let host = guest.host();
        let caps = guest.caps();
        let (cpuid, cpuid_version) = guest.cpuid()?;
        let features = cpuid.features();
        try_box(Self {
            registers: Registers::new(caps.speculation.how),
            modes: Modes::new(caps, features.allowed_cr4()),
            cr2: 0,
            priority: TaskPriority::new(host, caps)?,
            events: Events::default(),
            extended: Extended::new(host)?,
            switched: SwitchedMsrs::new(host),
            msrs: try_box(MsrStore::new(id == 0))?,
            pmu: try_box(Pmu::new(caps.has_pebs))?,
            debug: DebugRegisters::default(),
            split_locks: SplitLocks::default(),
            host_state: HostState::default(),
            emulation: Emulation::boxed()?,
            reserve: Reserve::new(),
            cpuid,
            answers: try_box(Answers::default())?,
            features,
            cpuid_version,
            primary: setup::primary(caps).bits(),
            tsc_offset: guest.tsc_offset(),
            unknown_msrs: try_box([(0, 0); UNKNOWN_MSRS])?,
            pending_in: None,
            pdptes_stale: false,
            unfinished: None,
            flush_linear: false,
            completed: false,
            step_due: false,
            quiet: false,
            sent_ipi: false,
            signals: 0,
            looks_for_ipis: !host.hears_signals(),
            dead: false,
            exits: try_box([0; ExitReason::COUNT])?,
        })
    }

    /// Counts an MSR that the guest asked for in vain; the first few numbers.
    #[cold]
    fn count_unknown_msr(&mut self, number: u32) {
        let place = |entry: &&mut (u32, u32)| entry.0 == number || entry.1 == 0;
        if let Some((slot, count)) = self.unknown_msrs.iter_mut().find(place) {
            *slot = number;
            *count = count.saturating_add(1);
        }
    }

    /// An instruction was completed in software.
    fn complete(&mut self) {
        self.completed = true;
        self.quiet = false;
    }

    /// Drops what the last RUN left unfinished: the client moved the vCPU to
    /// another instruction.
    fn abandon(&mut self, current: &Current<'_, H>) {
        self.emulation.abandon();
        self.pending_in = None;
        self.events.clear();
        self.end_blocking(current);
        current.put(field::GUEST_ACTIVITY, 0);
    }

    /// Ends the shadow of STI or MOV SS, and what it holds back.
    fn end_blocking(&mut self, current: &Current<'_, H>) {
        let shadows = Interruptibility::STI | Interruptibility::MOV_SS;
        let blocking = current.get(field::GUEST_INTERRUPTIBILITY);
        current.put(field::GUEST_INTERRUPTIBILITY, blocking & !shadows.bits());
        current.put(field::GUEST_PENDING_DEBUG, 0);
    }
}

impl<H: Host> Vcpu<H> {
    /// A vCPU in its power-up state, with its tunnel mapped into the calling
    /// process.
    ///
    /// # Errors
    /// [`Error::Invalid`]: number above 15; [`Error::Busy`]: number taken;
    /// [`Error::NoMemory`]; [`Error::Fault`]: the processor refused the VMCS.
    pub fn new(guest: &Shared<Guest<H>>, id: u32) -> Result<Shared<Self>, Error> {
        let number = Number::take(guest, id)?;
        let host = guest.host();
        let caps = guest.caps();
        let vmcs = OwnedPage::new(host)?;
        write_revision(&vmcs, caps);
        let msr_bitmap = OwnedPage::new(host)?;
        loan::fill_bitmap(&msr_bitmap);
        let inner = Lock::new(LockClass::Vcpu, Inner::new(guest, id)?)?;
        let channel = Channel::new(host)?;
        let operation = guest.membership().platform().operation();
        let address = vmcs.physical();
        let place = operation.reserve(address).ok_or(Error::Limit)?;
        let vcpu = Self {
            place,
            inner,
            vectors: PendingVectors::new(),
            channel,
            running: AtomicBool::new(false),
            _vmcs: vmcs,
            msr_bitmap,
            number,
        };
        vcpu.initialize()?;
        Ok(Shared::new(vcpu)?)
    }

    /// Writes the whole VMCS for the first time.
    fn initialize(&self) -> Result<(), Error> {
        let mut inner = self.inner.lock();
        let pointers = setup::Pointers {
            msr_bitmap: self.msr_bitmap.physical(),
            virtual_apic: inner.priority.page(),
            eptp: self.guest().memory().eptp(),
            vpid: self.vpid(),
        };
        self.with_vmcs(&mut inner, |current, inner| {
            setup::write_constant(current, self.guest().caps(), &pointers);
            current.put(field::TSC_OFFSET, inner.tsc_offset);
            current.put(field::GUEST_PAT, inner.msrs.pat());
            current.put(field::GUEST_SYSENTER_CS, 0);
            current.put(field::GUEST_SYSENTER_ESP, 0);
            current.put(field::GUEST_SYSENTER_EIP, 0);
            inner.modes.write_all(current);
            state::set(inner, current, &state::power_up());
            inner
                .registers
                .set(2, u64::from(self.guest().host().cpu().cpuid(1, 0).eax));
        })
    }

    /// The tag in the TLB: not 0, and unlike every other vCPU's.
    #[expect(clippy::cast_possible_truncation, reason = "at most 1024 places")]
    fn vpid(&self) -> u16 {
        (self.place.0 as u16).wrapping_add(1)
    }

    /// Its number in the VM, 0 to 15.
    pub fn id(&self) -> u32 {
        self.number.id
    }

    /// What it shares with the VM's other vCPUs.
    pub fn guest(&self) -> &Shared<Guest<H>> {
        &self.number.guest
    }

    /// SETUP_TUNNEL: where the client finds the tunnel and the I/O buffer.
    pub fn tunnel_info(&self) -> TunnelInfo {
        TunnelInfo {
            va: self.channel.tunnel_address().0,
            io_va: self.channel.buffer_address().0,
            size: abi::tunnel::TUNNEL_SIZE,
            ..TunnelInfo::default()
        }
    }

    /// SET_REGS. Waits while another thread is in RUN. Back into real mode is a
    /// reset or an INIT, which the client has no other way to tell of.
    ///
    /// # Errors
    /// [`Error::Fault`]: the VMCS could not be loaded.
    pub fn set_regs(&self, registers: &VcpuState) -> Result<(), Error> {
        let mut inner = self.inner.lock();
        self.with_vmcs(&mut inner, |current, inner| {
            let protected = inner.modes.cr0(current) & Cr0::PE.bits() != 0;
            if protected && registers.cr0 & Cr0::PE.bits() == 0 {
                // SDM 11.4.7 "Local APIC State": TPR and IRR are 0 after both.
                inner.priority.set_class(0);
                self.vectors.clear();
            }
            state::set(inner, current, registers);
        })
    }

    /// GET_REGS. Waits while another thread is in RUN.
    ///
    /// # Errors
    /// [`Error::Fault`]: the VMCS could not be loaded.
    pub fn regs(&self) -> Result<VcpuState, Error> {
        let mut inner = self.inner.lock();
        self.with_vmcs(&mut inner, |current, inner| state::get(inner, current))
    }

    /// SET_FPU.
    pub fn set_fpu(&self, image: &FxLayout) {
        self.inner.lock().extended.set_fx(image);
    }

    /// GET_FPU.
    pub fn fpu(&self) -> FxLayout {
        self.inner.lock().extended.fx()
    }

    /// SET_MSRS: in order, up to the first that is refused; `done` counts.
    ///
    /// # Errors
    /// [`Error::TooBig`]: more than 31 entries. [`Error::Fault`]: the VMCS
    /// could not be loaded.
    pub fn set_msrs(&self, data: &mut MsrData) -> Result<(), Error> {
        let mut inner = self.inner.lock();
        self.refresh_cpuid(&mut inner);
        inner.emulation.forget_registers();
        self.with_vmcs(&mut inner, |current, inner| {
            msr::list::set(self, inner, current, data)
        })?
    }

    /// GET_MSRS: in order, up to the first that is refused; `done` counts.
    ///
    /// # Errors
    /// As [`Vcpu::set_msrs`].
    pub fn msrs(&self, data: &mut MsrData) -> Result<(), Error> {
        let mut inner = self.inner.lock();
        self.refresh_cpuid(&mut inner);
        self.with_vmcs(&mut inner, |current, inner| {
            msr::list::get(self, inner, current, data)
        })?
    }

    /// INTERRUPT: queues a vector; one that waits already is not queued twice. If the guest
    /// runs, in another thread, it exits.
    pub fn interrupt(&self, vector: u8) {
        if self.vectors.post(vector) {
            self.guest().kick(self.id());
        }
    }

    /// VCPU_DEBUG.
    ///
    /// # Errors
    /// [`Error::Fault`]: the VMCS could not be loaded.
    pub fn set_debug(&self, debug: &VcpuDebug) -> Result<(), Error> {
        let mut inner = self.inner.lock();
        self.with_vmcs(&mut inner, |current, inner| {
            inner.debug.configure(current, debug);
            let bitmap = setup::ALWAYS_INTERCEPTED | inner.debug.intercepts();
            current.put(field::EXCEPTION_BITMAP, bitmap);
        })
    }

    /// SET_CPUID, for all vCPUs of the VM.
    ///
    /// # Errors
    /// [`Error::Invalid`]; [`Error::Fault`]: this vCPU is running.
    pub fn set_cpuid(&self, entries: &[CpuidEntry]) -> Result<(), Error> {
        if self.running.load(Ordering::Acquire) {
            return Err(Error::Fault);
        }
        self.guest().change_cpuid(|table| table.set(entries))
    }

    /// GET_CPUID: fills `entries` as far as it goes; returns the rows there are.
    pub fn cpuid(&self, entries: &mut [CpuidEntry]) -> usize {
        self.guest().cpuid_entries(entries)
    }

    /// KICKOFF: makes a running guest exit.
    pub fn kick(&self) {
        self.guest().kick(self.id());
    }

    /// Takes up a CPUID table that changed since the last look.
    #[inline(always)]
    fn refresh_cpuid(&self, inner: &mut Inner<H>) -> bool {
        let changed = inner.cpuid_version != self.guest().cpuid_version();
        if changed {
            self.take_cpuid(inner);
        }
        changed
    }

    #[cold]
    #[inline(never)]
    fn take_cpuid(&self, inner: &mut Inner<H>) {
        inner.emulation.forget_registers();
        inner.cpuid_version = self.guest().copy_cpuid(&mut inner.cpuid);
        inner.answers.forget();
        inner.features = inner.cpuid.features();
        inner.modes.allow_cr4(inner.features.allowed_cr4());
        inner.pmu.limit(inner.features.counters());
    }
}

impl<H: Host> Drop for Vcpu<H> {
    fn drop(&mut self) {
        // The processor must let go of the VMCS before its page is freed.
        let operation = self.guest().membership().platform().operation();
        operation.release(self.place);
        let inner = self.inner.get_mut();
        let (exits, unknown) = (&inner.exits, &inner.unknown_msrs);
        log::info!(
            "VM {} vCPU {}: {} exits",
            self.number.guest.membership().number(),
            self.number.id,
            exits.iter().fold(0u64, |sum, n| sum.wrapping_add(*n)),
        );
        for (reason, count) in (0u16..).map(ExitReason).zip(exits.iter()) {
            if *count != 0 {
                log::info!("  {count} {}", reason.text());
            }
        }
        for (number, count) in unknown.iter().filter(|(_, count)| *count != 0) {
            log::info!("  {count} #GP for MSR {number:#x}");
        }
    }
}
