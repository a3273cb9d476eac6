//! VMX operation on every processor, and which VMCS is where.
//!
//! VMXON happens once per processor when the first VM appears, VMXOFF when
//! the last one goes. If another hypervisor holds a processor in VMX
//! operation already (CR4.VMXE is set), we work inside its VMX operation: its
//! current VMCS is put back before interrupts are possible again, and ours is
//! clear by then, so neither can tell that the other was there.
//!
//! Translations need no flush for that. Those of a guest with EPT are tagged
//! with the address of its EPT's root (SDM 29.4.2 "Creating and Using Cached
//! Translation Information"), a page that is ours alone while the VM lives; and whoever gets
//! a page for a root must execute INVEPT on each processor before the first
//! entry there, whatever was in that page before. We do
//! (`memory::presence`); KVM does for the same reason.
//!
//! Some hosts cannot keep CR4.VMXE set for us ([`Host::keeps_vmxe`]). There
//! VMXON and VMXOFF happen in each loan, with interrupts off between them.
// UNSAFETY: executes VMXON, VMXOFF, VMCLEAR and VMPTRLD by the rules kept here.
#![expect(unsafe_code)]

use alloc::vec::Vec;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::arch::addr::Hpa;
use crate::arch::ept::{InveptKind, InvvpidKind};
use crate::arch::msr;
use crate::arch::reg::Cr4;
use crate::caps::Caps;
use crate::cpu::Cpu;
use crate::fallible::{NoMemory, TryPush};
use crate::host::{Host, InterruptsOff, OwnedPage, Pinned, Turn};

/// Most VMCSs at a time: 64 VMs of 16 vCPUs, the interface's limits.
pub const MAX_VMCS: usize = 64 * 16;

/// No processor.
const NOWHERE: usize = usize::MAX;

struct PerCpu<H: Host> {
    /// The VMXON region.
    region: OwnedPage<H>,
    /// We executed VMXON here.
    ours: AtomicBool,
    /// The VMCS of ours that is current here; 0 if none is.
    current: AtomicU64,
    /// The last VMCS that was here for one loan only, and whose turn it was
    /// ([`Host::thread_turn`]).
    visitor: [AtomicU64; 2],
}

/// Where one VMCS is active.
struct Active {
    /// Its physical address; 0 while the place is free.
    vmcs: AtomicU64,
    /// The processor that may hold parts of it in its caches, or [`NOWHERE`].
    cpu: AtomicUsize,
    /// The processor it was last loaded on, whose host state it holds, or
    /// [`NOWHERE`]. It stays when the VMCS is cleared there.
    last: AtomicUsize,
}

/// VMX operation of this machine.
pub struct Operation<H: Host> {
    host: H,
    cpus: Vec<PerCpu<H>>,
    active: Vec<Active>,
    /// See [`Operation::forget_branches`].
    parts_guests: bool,
    /// Some VM exists: processors that come online enter VMX operation.
    wanted: AtomicBool,
    /// Between [`Operation::suspend`] and [`Operation::resume`].
    asleep: AtomicBool,
    /// What the time-stamp counter was, with `tsc_lost`, when the last processor
    /// went to sleep.
    tsc_before: AtomicU64,
    /// Ticks by which the counter went back in sleeps.
    tsc_lost: AtomicU64,
    /// VPIDs are in use; without them INVVPID may be #UD.
    has_vpid: bool,
}

/// A place in the table of active VMCSs, one per vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(pub usize);

/// A VMCS could not be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotLoaded {
    /// VMX operation could not be entered, or the processor refused the VMCS.
    Refused,
    /// Another hypervisor has set CR4.VMXE and not executed VMXON yet: once its
    /// thread has run, the next try will do.
    Later,
}

impl<H: Host> Operation<H> {
    /// Makes the tables, and a VMXON region for every processor.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(host: &H, caps: &Caps) -> Result<Self, NoMemory> {
        let mut cpus = Vec::new();
        for _ in 0..host.cpu_limit() {
            let region = OwnedPage::new(host)?;
            write_revision(&region, caps);
            cpus.try_push(PerCpu {
                region,
                ours: AtomicBool::new(false),
                current: AtomicU64::new(0),
                visitor: [const { AtomicU64::new(0) }; 2],
            })?;
        }
        let mut active = Vec::new();
        for _ in 0..MAX_VMCS {
            active.try_push(Active {
                vmcs: AtomicU64::new(0),
                cpu: AtomicUsize::new(NOWHERE),
                last: AtomicUsize::new(NOWHERE),
            })?;
        }
        Ok(Self {
            host: host.clone(),
            cpus,
            active,
            parts_guests: caps.speculation.parts_guests,
            wanted: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            tsc_before: AtomicU64::new(0),
            tsc_lost: AtomicU64::new(0),
            has_vpid: caps.has_vpid(),
        })
    }

    /// Drops every EPT and VPID translation of this processor. In VMX operation.
    fn drop_translations(&self) {
        let cpu = self.host.cpu();
        // SAFETY: in VMX operation; VMs exist only with EPT and INVEPT.
        let _ = unsafe { cpu.invept(InveptKind::All, 0) };
        if self.has_vpid {
            // SAFETY: in VMX operation; VPID is used only where INVVPID is.
            let _ = unsafe { cpu.invvpid(InvvpidKind::All, 0, 0) };
        }
    }

    /// Enters VMX operation on every running processor.
    ///
    /// # Errors
    /// [`NotLoaded::Refused`]: a processor refused; then none is left in it by us.
    pub fn start(&self) -> Result<(), NotLoaded> {
        self.wanted.store(true, Ordering::SeqCst);
        let failed = AtomicBool::new(false);
        self.host.run_on_all(&|| {
            if self.enter_here().is_err() {
                failed.store(true, Ordering::SeqCst);
            } else if !self.host.keeps_vmxe() {
                self.leave_here();
            }
        });
        if failed.load(Ordering::SeqCst) {
            self.stop();
            return Err(NotLoaded::Refused);
        }
        Ok(())
    }

    /// Leaves VMX operation wherever we entered it.
    pub fn stop(&self) {
        self.wanted.store(false, Ordering::SeqCst);
        self.host.run_on_all(&|| self.leave_here());
    }

    /// A processor came online, or woke. Called on it, unable to migrate.
    pub fn cpu_online(&self) {
        if self.wanted.load(Ordering::SeqCst) && self.host.keeps_vmxe() {
            let _off = InterruptsOff::new(&self.host);
            // A failure shows again, as an error, at the first load here.
            let _ = self.enter_here();
        }
    }

    /// A processor is about to go offline or to sleep. Called on it, unable
    /// to migrate: everything of ours leaves it.
    pub fn cpu_offline(&self) {
        let _off = InterruptsOff::new(&self.host);
        self.leave_here();
        let number = self.host.current_cpu();
        for active in &self.active {
            // What comes back under this number may have other tables.
            let _ =
                active
                    .last
                    .compare_exchange(number, NOWHERE, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// The last running processor goes to sleep; called on it, with interrupts
    /// off. All others are offline.
    pub fn sleep(&self) {
        let now = self.host.cpu().rdtsc().wrapping_add(self.tsc_lost());
        self.tsc_before.store(now, Ordering::SeqCst);
        self.cpu_offline();
    }

    /// It woke; called on it before any other comes online. If its time-stamp
    /// counter began again meanwhile, as it may where a sleep takes the power
    /// away, the guests' must not go back with it: SDM 18.17 "Time-Stamp Counter"
    /// has it count up until a reset.
    pub fn wake(&self) {
        let lost = self.tsc_lost();
        let now = self.host.cpu().rdtsc().wrapping_add(lost);
        let before = self.tsc_before.load(Ordering::SeqCst);
        if now < before {
            let behind = before.wrapping_sub(now);
            self.tsc_lost
                .store(lost.wrapping_add(behind), Ordering::SeqCst);
        }
        self.cpu_online();
    }

    /// What guests add to the host's time-stamp counter for its going back in
    /// sleeps, in ticks. It changes only while no VMCS is active.
    pub fn tsc_lost(&self) -> u64 {
        self.tsc_lost.load(Ordering::SeqCst)
    }

    /// The machine is about to sleep, hibernate or restart: every processor
    /// leaves, and none of them enters until [`Operation::resume`]. A vCPU that
    /// is run meanwhile is refused.
    pub fn suspend(&self) {
        self.asleep.store(true, Ordering::SeqCst);
        self.host.run_on_all(&|| self.cpu_offline());
    }

    /// The machine woke.
    pub fn resume(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.host.run_on_all(&|| self.cpu_online());
        }
    }

    /// VMXON here, unless this processor is in VMX operation already.
    /// Interrupts are off.
    fn enter_here(&self) -> Result<(), NotLoaded> {
        if self.asleep.load(Ordering::Relaxed) {
            return Err(NotLoaded::Refused);
        }
        let cpu = self.host.cpu();
        let Some(here) = self.cpus.get(self.host.current_cpu()) else {
            return Err(NotLoaded::Refused);
        };
        if cpu.cr4() & Cr4::VMXE.bits() != 0 {
            // Ours from before, or another hypervisor's: both will do.
            return Ok(());
        }
        // SAFETY: the register exists on every processor with VMX.
        let feature = unsafe { cpu.rdmsr(msr::IA32_FEATURE_CONTROL) };
        if feature & msr::FEATURE_CONTROL_LOCKED == 0 {
            let value = feature | msr::FEATURE_CONTROL_LOCKED | msr::FEATURE_CONTROL_VMXON;
            // SAFETY: SDM 24.7: an unlocked register takes the lock and the
            // VMXON bit; firmware left the choice to us.
            unsafe { cpu.wrmsr(msr::IA32_FEATURE_CONTROL, value) };
        } else if feature & msr::FEATURE_CONTROL_VMXON == 0 {
            return Err(NotLoaded::Refused);
        }
        // SAFETY: pinned, and not in VMX operation.
        unsafe { self.host.set_vmxe(true) };
        // SAFETY: the region is ours, has the revision, and lives as long as self.
        if unsafe { cpu.vmxon(here.region.physical()) }.is_err() {
            // SAFETY: VMXON failed, so we are not in VMX operation.
            unsafe { self.host.set_vmxe(false) };
            return Err(NotLoaded::Refused);
        }
        here.ours.store(true, Ordering::SeqCst);
        here.current.store(0, Ordering::SeqCst);
        if self.host.keeps_vmxe() {
            // Translations of an earlier use of VMX operation: SDM 29.4.3.4
            // "Guidelines for Use of the INVEPT Instruction".
            self.drop_translations();
        }
        Ok(())
    }

    /// VMCLEARs everything of ours that is active here, then VMXOFF if the
    /// VMXON was ours. Interrupts are off.
    fn leave_here(&self) {
        let number = self.host.current_cpu();
        let Some(here) = self.cpus.get(number) else {
            return;
        };
        if !here.ours.load(Ordering::SeqCst) {
            return;
        }
        for active in &self.active {
            if active.cpu.load(Ordering::SeqCst) == number {
                self.clear_here(active);
            }
        }
        here.current.store(0, Ordering::SeqCst);
        self.vmxoff_here(here);
    }

    /// VMXOFF of our VMXON. Interrupts are off, and no VMCS of ours is active here.
    fn vmxoff_here(&self, here: &PerCpu<H>) {
        here.ours.store(false, Ordering::SeqCst);
        // SAFETY: our VMXON; nothing of ours is active here any more.
        let _ = unsafe { self.host.cpu().vmxoff() };
        // SAFETY: no longer in VMX operation.
        unsafe { self.host.set_vmxe(false) };
    }

    /// VMCLEAR of one VMCS on the processor that has it. Interrupts are off.
    fn clear_here(&self, active: &Active) {
        let vmcs = active.vmcs.load(Ordering::SeqCst);
        if vmcs != 0 {
            // SAFETY: in VMX operation: a VMCS is active only where that holds;
            // the region stays until `release`.
            let _ = unsafe { self.host.cpu().vmclear(Hpa(vmcs)) };
            if let Some(here) = self.cpus.get(self.host.current_cpu()) {
                let _ = here
                    .current
                    .compare_exchange(vmcs, 0, Ordering::SeqCst, Ordering::SeqCst);
            }
        }
        active.cpu.store(NOWHERE, Ordering::SeqCst);
    }

    /// Takes a place for a VMCS and brings it to the clear state at its first
    /// load. `None` if all are taken.
    pub fn reserve(&self, vmcs: Hpa) -> Option<Place> {
        let taken = |a: &Active| {
            a.vmcs
                .compare_exchange(0, vmcs.0, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        };
        self.active.iter().position(taken).map(Place)
    }

    /// Takes the VMCS from whichever processor has it and frees its place.
    pub fn release(&self, place: Place) {
        self.evict(place);
        if let Some(active) = self.active.get(place.0) {
            active.last.store(NOWHERE, Ordering::SeqCst);
            active.vmcs.store(0, Ordering::SeqCst);
        }
    }

    /// VMCLEARs the VMCS wherever it is active. Not with interrupts off.
    pub fn evict(&self, place: Place) {
        let Some(active) = self.active.get(place.0) else {
            return;
        };
        let cpu = active.cpu.load(Ordering::SeqCst);
        if cpu == NOWHERE {
            return;
        }
        // If it goes offline meanwhile, `leave_here` clears it there.
        let _ = self.host.run_on(cpu, &|| {
            if active.cpu.load(Ordering::SeqCst) == self.host.current_cpu() {
                self.clear_here(active);
            }
        });
    }

    /// Makes a VMCS current on this processor until the loan is dropped.
    ///
    /// # Errors
    /// See [`NotLoaded`].
    pub fn load<'a>(
        &'a self,
        pinned: &'a Pinned<'a, H>,
        place: Place,
    ) -> Result<Loan<'a, H>, NotLoaded> {
        let number = pinned.cpu_number();
        if self.is_elsewhere(place, number) {
            self.evict(place);
        }
        let off = InterruptsOff::new(&self.host);
        self.load_here(place, number, Some(off))
    }

    /// The VMCS, if it is still active on the processor of a guest's turn; if
    /// another one of ours is current there, that changes.
    #[inline]
    pub fn still_active<'a>(&'a self, turn: &'a Turn<'a, H>, place: Place) -> Option<Loaded<'a>> {
        let active = self.active.get(place.0)?;
        let here = self.cpus.get(turn.cpu_number())?;
        if !here.ours.load(Ordering::Relaxed) {
            return None;
        }
        let vmcs = active.vmcs.load(Ordering::Relaxed);
        if here.current.load(Ordering::Relaxed) != vmcs {
            if active.cpu.load(Ordering::SeqCst) != turn.cpu_number() {
                return None;
            }
            self.make_current(here, vmcs).ok()?;
        }
        Some(Loaded(PhantomData))
    }

    /// VMPTRLD of a VMCS that is active here, or clear. In VMX operation of
    /// ours, interrupts off.
    #[inline(never)]
    fn make_current(&self, here: &PerCpu<H>, vmcs: u64) -> Result<(), NotLoaded> {
        // SAFETY: in VMX operation; a reserved VMCS, not active on another processor.
        unsafe { self.host.cpu().vmptrld(Hpa(vmcs)) }.map_err(|_| NotLoaded::Refused)?;
        here.current.store(vmcs, Ordering::SeqCst);
        self.forget_branches(true);
        Ok(())
    }

    /// [`Operation::load`] in a guest's turn. [`Operation::evict`] was called
    /// before it if the VMCS was elsewhere.
    ///
    /// # Errors
    /// See [`NotLoaded`].
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn load_in_turn<'a>(
        &'a self,
        turn: &'a Turn<'a, H>,
        place: Place,
    ) -> Result<Loan<'a, H>, NotLoaded> {
        self.load_here(place, turn.cpu_number(), None)
    }

    /// The VMCS is active on another processor than this one.
    pub fn is_elsewhere(&self, place: Place, number: usize) -> bool {
        let cpu = |active: &Active| active.cpu.load(Ordering::SeqCst);
        self.active
            .get(place.0)
            .map(cpu)
            .is_some_and(|cpu| cpu != number && cpu != NOWHERE)
    }

    /// Makes a VMCS current that is active here or nowhere. Interrupts are off.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn load_here<'a>(
        &'a self,
        place: Place,
        number: usize,
        off: Option<InterruptsOff<'a, H>>,
    ) -> Result<Loan<'a, H>, NotLoaded> {
        let active = self.active.get(place.0).ok_or(NotLoaded::Refused)?;
        let here = self.cpus.get(number).ok_or(NotLoaded::Refused)?;
        if !here.ours.load(Ordering::Relaxed) {
            return self.load_borrowed(active, here, off);
        }
        let vmcs = active.vmcs.load(Ordering::SeqCst);
        let fresh = active.cpu.load(Ordering::SeqCst) != number;
        if fresh {
            // SDM 25.11.3 "Initializing a VMCS": VMCLEAR before the first use.
            // SAFETY: in VMX operation; the region is a reserved VMCS, active nowhere.
            unsafe { self.host.cpu().vmclear(Hpa(vmcs)) }.map_err(|_| NotLoaded::Refused)?;
        }
        if fresh || here.current.load(Ordering::Relaxed) != vmcs {
            self.make_current(here, vmcs)?;
            active.cpu.store(number, Ordering::SeqCst);
        }
        let moved = fresh && active.last.swap(number, Ordering::Relaxed) != number;
        Ok(Loan {
            operation: self,
            fresh,
            moved,
            borrowed: None,
            _off: off,
        })
    }

    /// Another guest than the last one is about to run here, or may be: its predictions must
    /// not be steered by what that one left. SDM vol. 4, table 2-2, IA32_PRED_CMD.
    fn forget_branches(&self, another: bool) {
        if another && self.parts_guests {
            // SAFETY: the register exists, and the write only costs time.
            unsafe { self.host.cpu().wrmsr(msr::IA32_PRED_CMD, 1) };
        }
    }

    /// [`Operation::load`] where VMX operation is another hypervisor's, or not
    /// entered yet.
    fn load_borrowed<'a>(
        &'a self,
        active: &'a Active,
        here: &'a PerCpu<H>,
        off: Option<InterruptsOff<'a, H>>,
    ) -> Result<Loan<'a, H>, NotLoaded> {
        let cpu = self.host.cpu();
        self.enter_here()?;
        let ours = here.ours.load(Ordering::Relaxed);
        let lasts = ours && self.host.keeps_vmxe();
        if !ours && !self.host.is_in_vmx_operation() {
            return Err(NotLoaded::Later);
        }
        // SAFETY: in VMX operation, by our VMXON or as the host has just seen.
        let theirs = if ours { None } else { unsafe { cpu.vmptrst() } };
        let vmcs = active.vmcs.load(Ordering::SeqCst);
        // From here on its drop puts things back, whatever fails.
        let number = self.host.current_cpu();
        let mut loan = Loan {
            operation: self,
            fresh: true,
            moved: false,
            borrowed: (!lasts).then_some(Borrowed {
                ours: Hpa(vmcs),
                theirs,
                leave: ours.then_some(here),
            }),
            _off: off,
        };
        // SAFETY: in VMX operation; reserved and active nowhere: a borrowed loan
        // always ends clear.
        unsafe { cpu.vmclear(Hpa(vmcs)) }.map_err(|_| NotLoaded::Refused)?;
        // SAFETY: as above.
        unsafe { cpu.vmptrld(Hpa(vmcs)) }.map_err(|_| NotLoaded::Refused)?;
        loan.moved = active.last.swap(number, Ordering::Relaxed) != number;
        let same = Self::was_here(here, vmcs, self.host.thread_turn());
        self.forget_branches(!same || loan.moved);
        if lasts {
            here.current.store(vmcs, Ordering::SeqCst);
            active.cpu.store(number, Ordering::SeqCst);
        }
        Ok(loan)
    }

    /// The last guest that ran here is the one of this VMCS: the last loan was its, and
    /// another hypervisor's guest has a thread of its own, which would have ended
    /// the turn of this one. (Of a page that became another VMCS since, the loan
    /// is moved.)
    fn was_here(here: &PerCpu<H>, vmcs: u64, turn: u64) -> bool {
        let [visitor, turns] = &here.visitor;
        let same_vmcs = visitor.swap(vmcs, Ordering::Relaxed) == vmcs;
        let same_turn = turns.swap(turn, Ordering::Relaxed) == turn;
        same_vmcs && same_turn
    }
}

/// What to put back when VMX operation is not ours beyond this loan.
struct Borrowed<'a, H: Host> {
    ours: Hpa,
    /// What was current in the other hypervisor's VMX operation.
    theirs: Option<Hpa>,
    /// Here the loan's own VMX operation ends.
    leave: Option<&'a PerCpu<H>>,
}

/// A VMCS is current on this processor, interrupts are off.
pub struct Loan<'a, H: Host> {
    operation: &'a Operation<H>,
    fresh: bool,
    moved: bool,
    borrowed: Option<Borrowed<'a, H>>,
    /// Unless somebody else keeps them off.
    _off: Option<InterruptsOff<'a, H>>,
}

/// A VMCS of ours is current on this processor, and interrupts are off, for as
/// long as this lives.
#[derive(Clone, Copy)]
pub struct Loaded<'a>(PhantomData<&'a *const ()>);

impl<H: Host> Loan<'_, H> {
    /// What the loan keeps.
    #[must_use]
    pub fn loaded(&self) -> Loaded<'_> {
        Loaded(PhantomData)
    }

    /// It was not active here before: launch it.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// It was loaded elsewhere, or nowhere, before: write the host state that
    /// belongs to the processor, and trust no translation of this vCPU here.
    #[must_use]
    pub fn is_moved(&self) -> bool {
        self.moved
    }
}

impl<H: Host> Drop for Loan<'_, H> {
    fn drop(&mut self) {
        let Some(borrowed) = &self.borrowed else {
            return;
        };
        let cpu = self.operation.host.cpu();
        // SAFETY: interrupts have been off since the load, so VMX operation
        // still stands, ours or the other hypervisor's.
        let _ = unsafe { cpu.vmclear(borrowed.ours) };
        if let Some(here) = borrowed.leave {
            self.operation.vmxoff_here(here);
            return;
        }
        if let Some(theirs) = borrowed.theirs {
            // SAFETY: it was current here when we came.
            let _ = unsafe { cpu.vmptrld(theirs) };
            // The other hypervisor will find it current, and see no other guest
            // between its own.
            self.operation.forget_branches(true);
        }
    }
}

/// Writes the VMCS revision identifier to the start of a region,
/// SDM 25.2 "Format of the VMCS Region".
pub fn write_revision<H: Host>(region: &OwnedPage<H>, caps: &Caps) {
    let word = region.pointer().cast::<u32>();
    // SAFETY: the page is ours, page aligned, and not in use by the processor yet.
    unsafe { word.write_volatile(caps.basic.revision()) };
}
