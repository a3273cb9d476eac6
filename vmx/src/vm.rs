//! A virtual machine as its client sees it: memory and vCPUs.

use crate::Error;
use crate::arch::addr::Hva;
use crate::fallible::Shared;
use crate::host::Host;
use crate::memory::Statistics;
use crate::platform::Membership;
use crate::vcpu::{Guest, Vcpu};

/// A virtual machine. Its vCPUs keep it alive.
pub struct Vm<H: Host> {
    guest: Shared<Guest<H>>,
}

impl<H: Host> Vm<H> {
    pub(crate) fn new(membership: Membership<H>) -> Result<Shared<Self>, Error> {
        let guest = Guest::new(membership)?;
        Ok(Shared::new(Self { guest })?)
    }

    /// Its number, 0 to 63.
    pub fn id(&self) -> u32 {
        self.guest.membership().number()
    }

    /// Whether the calling thread belongs to the process that made the VM.
    ///
    /// # Errors
    /// [`Error::Denied`] if not.
    pub fn check_owner(&self) -> Result<(), Error> {
        if self.guest.memory().is_owner() {
            Ok(())
        } else {
            Err(Error::Denied)
        }
    }

    /// Whether the process that made the VM has ended: nobody can open or use the VM any more.
    pub fn owner_has_ended(&self) -> bool {
        self.guest.memory().owner_has_ended()
    }

    /// ALLOC_RAM and ADD_RAMBLOCK: registers `size` bytes at `start`.
    ///
    /// # Errors
    /// See [`crate::memory::AddressSpace::add_ram_block`].
    pub fn add_ram_block(&self, start: Hva, size: u64) -> Result<(), Error> {
        self.guest.memory().add_ram_block(start, size)
    }

    /// SET_RAM and SET_RAM2.
    ///
    /// # Errors
    /// See [`crate::memory::AddressSpace::set_ram`].
    pub fn set_ram(&self, gpa: u64, size: u64, va: u64, flags: u32) -> Result<(), Error> {
        self.guest.memory().set_ram(gpa, size, va, flags)
    }

    /// PROTECT_RAM.
    ///
    /// # Errors
    /// See [`crate::memory::AddressSpace::protect_ram`].
    pub fn protect_ram(&self, gpa: u64, size: u64, flags: u32) -> Result<(), Error> {
        self.guest.memory().protect_ram(gpa, size, flags)
    }

    /// NOTIFY_QEMU_VERSION: nothing depends on it any more, as in HAXM.
    pub fn notify_version(&self, current: u32, least: u32) {
        log::debug!(
            "VM {}: client interface {current}, least {least}",
            self.id()
        );
    }

    /// VCPU_CREATE, in the process that will use its tunnel.
    ///
    /// # Errors
    /// See [`Vcpu::new`].
    pub fn create_vcpu(this: &Shared<Self>, id: u32) -> Result<Shared<Vcpu<H>>, Error> {
        Vcpu::new(&this.guest, id)
    }

    /// Counters of its memory.
    pub fn memory_statistics(&self) -> Statistics {
        self.guest.memory().statistics()
    }
}
