//! One VM's guest-physical memory, as its vCPUs and its client see it.

use core::marker::PhantomData;

use crate::Error;
use crate::arch::addr::{Gpa, Hva};
use crate::arch::ept::EptVpidCaps;
use crate::host::{CpuOffline, Host};

use super::{Access, AccessError, FaultOutcome, Flush, Statistics};

/// EPT pages that a vCPU keeps ready for its next fault.
pub struct Reserve<H: Host>(PhantomData<H>);

impl<H: Host> Reserve<H> {
    /// An empty reserve; `fault` fills it as needed.
    #[must_use]
    pub const fn new() -> Self {
        Self(PhantomData)
    }
}

/// One VM's guest-physical memory.
pub struct AddressSpace<H: Host>(PhantomData<H>);

impl<H: Host> AddressSpace<H> {
    /// An empty memory for a VM of the calling process. `address_bits` is the
    /// guest's physical-address width; more than 48 counts as 48 (4-level EPT).
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn new(_host: &H, _caps: EptVpidCaps, _address_bits: u8) -> Result<Self, Error> {
        Err(Error::NotWorking)
    }

    /// Whether the calling thread belongs to the process that owns the VM.
    pub fn is_owner(&self) -> bool {
        false
    }

    /// The EPT pointer for the VMCS. May change (the accessed-and-dirty flag
    /// only); then the next `before_entry` asks for a flush, so it is enough to
    /// compare it when that happens.
    pub fn eptp(&self) -> u64 {
        0
    }

    /// Announces that this processor, `cpu`, is about to enter the guest.
    /// Interrupts are off and stay off until after the exit. If it returns a
    /// [`Flush`], the caller executes INVEPT (single-context on
    /// [`AddressSpace::eptp`], or all) and then [`AddressSpace::flushed`] before
    /// VMLAUNCH or VMRESUME. `after_exit` must follow, entered or not.
    ///
    /// # Errors
    /// [`CpuOffline`]: no such processor; do not enter.
    pub fn before_entry(&self, _cpu: usize) -> Result<Option<Flush>, CpuOffline> {
        Err(CpuOffline)
    }

    /// Notes that the INVEPT asked for by `before_entry` was executed.
    pub fn flushed(&self, _cpu: usize, _flush: Flush) {}

    /// Says that `cpu` has left the guest, before interrupts are on again.
    pub fn after_exit(&self, _cpu: usize) {}

    /// Answers an EPT violation. May sleep; not pinned, no spin lock held.
    ///
    /// # Errors
    /// [`Error::Fault`]: the client's memory is gone or read-only;
    /// [`Error::NoMemory`].
    pub fn fault(
        &self,
        _gpa: Gpa,
        _access: Access,
        _reserve: &mut Reserve<H>,
    ) -> Result<FaultOutcome, Error> {
        Err(Error::NotWorking)
    }

    /// ALLOC_RAM and ADD_RAMBLOCK: registers `size` bytes at `start`.
    ///
    /// # Errors
    /// [`Error::Invalid`]: 0, unaligned, wraps, or overlaps another block;
    /// [`Error::NoMemory`].
    pub fn add_ram_block(&self, _start: Hva, _size: u64) -> Result<(), Error> {
        Err(Error::NotWorking)
    }

    /// SET_RAM and SET_RAM2: maps `size` bytes at `gpa` to `va`, or unmaps
    /// them. `flags` are the ABI's.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::NoMemory`]; nothing has changed then.
    pub fn set_ram(&self, _gpa: u64, _size: u64, _va: u64, _flags: u32) -> Result<(), Error> {
        Err(Error::NotWorking)
    }

    /// PROTECT_RAM. `flags` are the ABI's.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::NoMemory`]; nothing has changed then.
    pub fn protect_ram(&self, _gpa: u64, _size: u64, _flags: u32) -> Result<(), Error> {
        Err(Error::NotWorking)
    }

    /// Whether `length` bytes at `gpa` are guest RAM (ROM counts unless
    /// `write`).
    ///
    /// # Errors
    /// [`AccessError`]: the first address that is not.
    pub fn check(&self, _gpa: Gpa, _length: usize, _write: bool) -> Result<(), AccessError> {
        Err(AccessError::Host(Error::NotWorking))
    }

    /// Reads guest memory. May sleep.
    ///
    /// # Errors
    /// [`AccessError`]; `bytes` may be partly filled.
    pub fn read(&self, _gpa: Gpa, _bytes: &mut [u8]) -> Result<(), AccessError> {
        Err(AccessError::Host(Error::NotWorking))
    }

    /// Writes guest memory. May sleep.
    ///
    /// # Errors
    /// [`AccessError`]; nothing was written, unless it is
    /// [`AccessError::Host`].
    pub fn write(&self, _gpa: Gpa, _bytes: &[u8]) -> Result<(), AccessError> {
        Err(AccessError::Host(Error::NotWorking))
    }

    /// Atomically replaces `old` by `new` in `size` (1, 2, 4 or 8) naturally
    /// aligned bytes of guest memory; returns what was there. May sleep.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn compare_exchange(
        &self,
        _gpa: Gpa,
        _size: u8,
        _old: u64,
        _new: u64,
    ) -> Result<u64, AccessError> {
        Err(AccessError::Host(Error::NotWorking))
    }

    /// Counters.
    pub fn statistics(&self) -> Statistics {
        Statistics::default()
    }
}
