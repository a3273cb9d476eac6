//! What the vCPUs of one VM share.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use abi::cpuid::CpuidEntry;

use super::cpuid::CpuidTable;
use crate::Error;
use crate::caps::Caps;
use crate::cpu::Cpu;
use crate::fallible::{NoMemory, Shared, try_box};
use crate::host::Host;
use crate::memory::AddressSpace;
use crate::platform::Membership;
use crate::sync::{Lock, LockClass};

/// Most vCPUs of a VM: the interface's limit.
pub const MAX_VCPUS: u32 = abi::MAX_VCPUS;

/// Not in the guest.
pub const NOWHERE: usize = usize::MAX;

/// One VM below its vCPUs.
pub struct Guest<H: Host> {
    /// Guest-physical memory. Before `membership`, so that it is gone when VMX
    /// operation ends.
    memory: AddressSpace<H>,
    cpuid: Lock<H::Mutex, Box<CpuidTable>>,
    /// Counts changes of the CPUID table.
    cpuid_version: AtomicU32,
    /// One bit per vCPU that exists.
    vcpus: AtomicU32,
    /// The processor that each vCPU's guest has, or [`NOWHERE`].
    positions: [AtomicUsize; MAX_VCPUS as usize],
    /// What all vCPUs add to the time-stamp counter, but for `tsc_lost`.
    tsc_offset: AtomicU64,
    /// `Operation::tsc_lost` when a VMCS of this VM was last made active.
    tsc_lost: AtomicU64,
    /// IA32_TSC_ADJUST of all vCPUs.
    tsc_adjust: AtomicU64,
    membership: Membership<H>,
}

impl<H: Host> Guest<H> {
    /// A VM of the calling process, without memory or vCPUs. Its time-stamp
    /// counter starts at 0.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn new(membership: Membership<H>) -> Result<Shared<Self>, Error> {
        let platform = membership.platform();
        let (host, caps) = (platform.host(), platform.caps());
        let cpuid = try_box(CpuidTable::new(host.cpu(), caps))?;
        let memory = AddressSpace::new(host, caps.ept_vpid, caps.physical_bits)?;
        if caps.speculation.needs_small_code {
            memory.keep_code_small();
        }
        let lost = platform.operation().tsc_lost();
        let now = host.cpu().rdtsc().wrapping_add(lost);
        let guest = Shared::new(Self {
            memory,
            cpuid: Lock::new(LockClass::Vm, cpuid)?,
            cpuid_version: AtomicU32::new(0),
            vcpus: AtomicU32::new(0),
            positions: [const { AtomicUsize::new(NOWHERE) }; MAX_VCPUS as usize],
            tsc_offset: AtomicU64::new(now.wrapping_neg()),
            tsc_lost: AtomicU64::new(lost),
            tsc_adjust: AtomicU64::new(0),
            membership,
        })?;
        Ok(guest)
    }

    /// Guest-physical memory.
    pub fn memory(&self) -> &AddressSpace<H> {
        &self.memory
    }

    /// The VM's number and machine.
    pub fn membership(&self) -> &Membership<H> {
        &self.membership
    }

    /// The host.
    pub fn host(&self) -> &H {
        self.membership.platform().host()
    }

    /// What the processor can do.
    pub fn caps(&self) -> &Caps {
        self.membership.platform().caps()
    }

    /// A copy of the CPUID table, and its version.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn cpuid(&self) -> Result<(Box<CpuidTable>, u32), NoMemory> {
        let table = self.cpuid.lock();
        Ok((try_box(**table)?, self.cpuid_version()))
    }

    /// Copies the CPUID table; returns its version.
    pub fn copy_cpuid(&self, into: &mut CpuidTable) -> u32 {
        let table = self.cpuid.lock();
        *into = **table;
        self.cpuid_version()
    }

    /// GET_CPUID: fills `entries` as far as it goes; returns the rows there are.
    pub fn cpuid_entries(&self, entries: &mut [CpuidEntry]) -> usize {
        self.cpuid.lock().entries(entries)
    }

    /// The version of the CPUID table, without its lock.
    pub fn cpuid_version(&self) -> u32 {
        self.cpuid_version.load(Ordering::Acquire)
    }

    /// Changes the CPUID table for all vCPUs, or nothing if `change` fails.
    ///
    /// # Errors
    /// What `change` returns.
    pub fn change_cpuid(
        &self,
        change: impl FnOnce(&mut CpuidTable) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut table = self.cpuid.lock();
        let mut copy = try_box(**table)?;
        change(&mut copy)?;
        *table = copy;
        self.cpuid_version.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// What the vCPUs add to the time-stamp counter, ticks modulo 2^64.
    pub fn tsc_offset(&self) -> u64 {
        let lost = self.tsc_lost.load(Ordering::Relaxed);
        self.tsc_offset.load(Ordering::Relaxed).wrapping_add(lost)
    }

    /// Sets it for all vCPUs.
    pub fn set_tsc_offset(&self, offset: u64) {
        let lost = self.tsc_lost.load(Ordering::Relaxed);
        self.tsc_offset
            .store(offset.wrapping_sub(lost), Ordering::Relaxed);
    }

    /// A VMCS of this VM is made active: for the first time, on another processor, or after the
    /// machine slept. Each vCPU stores the same.
    pub fn catch_up(&self) {
        let lost = self.membership.platform().operation().tsc_lost();
        self.tsc_lost.store(lost, Ordering::Relaxed);
    }

    /// IA32_TSC_ADJUST.
    pub fn tsc_adjust(&self) -> u64 {
        self.tsc_adjust.load(Ordering::Relaxed)
    }

    /// Sets it for all vCPUs.
    pub fn set_tsc_adjust(&self, value: u64) {
        self.tsc_adjust.store(value, Ordering::Relaxed);
    }

    /// Takes a vCPU number.
    ///
    /// # Errors
    /// [`Error::Invalid`]: above 15. [`Error::Busy`]: taken.
    pub fn take_vcpu(&self, id: u32) -> Result<(), Error> {
        if id >= MAX_VCPUS {
            return Err(Error::Invalid);
        }
        let before = self.vcpus.fetch_or(1 << id, Ordering::AcqRel);
        if before & (1 << id) != 0 {
            return Err(Error::Busy);
        }
        Ok(())
    }

    /// Says that a vCPU's guest has this processor from now on, or
    /// [`NOWHERE`].
    pub fn set_position(&self, id: u32, cpu: usize) {
        if let Some(position) = self.positions.get(id as usize) {
            position.store(cpu, Ordering::SeqCst);
        }
    }

    /// Interrupts the processor that has this vCPU's guest, if one has.
    pub fn kick(&self, id: u32) {
        let position = self.positions.get(id as usize);
        let cpu = position.map_or(NOWHERE, |at| at.load(Ordering::SeqCst));
        if cpu != NOWHERE {
            self.host().kick(cpu);
        }
    }

    /// Interrupts the guests of all vCPUs but one.
    pub fn kick_others(&self, than: u32) {
        let others = self.vcpus.load(Ordering::Acquire) & !(1 << than);
        for id in (0..MAX_VCPUS).filter(|id| others & (1 << id) != 0) {
            self.kick(id);
        }
    }

    /// Gives a vCPU number back.
    pub fn free_vcpu(&self, id: u32) {
        self.vcpus.fetch_and(!(1 << id), Ordering::AcqRel);
    }
}

/// Tells what the VM's memory came to: whether the host's large pages were used, and what the tables
/// took.
impl<H: Host> Drop for Guest<H> {
    fn drop(&mut self) {
        let memory = self.memory.statistics();
        let [small, large, huge] = memory.leaves;
        log::info!(
            "VM {}: memory: {} slots, leaves {small}/{large}/{huge}, {} tables, {} flushes, {} merges",
            self.membership.number(),
            memory.slots,
            memory.tables,
            memory.flushes,
            memory.merges
        );
    }
}
