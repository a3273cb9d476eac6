//! The machine as all VMs share it: capabilities, VMX operation, VM numbers.

use crate::Error;
use crate::caps::Caps;
use crate::fallible::{NoMemory, Shared};
use crate::host::Host;
use crate::operation::Operation;
use crate::sync::{Lock, LockClass};

/// Most VMs at a time: the interface's limit.
pub const MAX_VMS: u32 = abi::MAX_VMS;

/// The machine below all VMs.
pub struct Platform<H: Host> {
    host: H,
    caps: Caps,
    operation: Operation<H>,
    /// One bit per VM number in use. VMX operation lasts while any is.
    numbers: Lock<H::Mutex, u64>,
}

impl<H: Host> Platform<H> {
    /// Makes the tables; VMX operation starts with the first VM.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(host: H, caps: Caps) -> Result<Self, NoMemory> {
        Ok(Self {
            operation: Operation::new(&host, &caps)?,
            numbers: Lock::new(LockClass::Hypervisor, 0)?,
            caps,
            host,
        })
    }

    /// The host.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// What the processor can do.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// VMX operation.
    pub fn operation(&self) -> &Operation<H> {
        &self.operation
    }

    /// VMs that exist.
    pub fn vm_count(&self) -> u32 {
        self.numbers.lock().count_ones()
    }

    /// Takes the lowest free VM number, and VMX operation with the first.
    ///
    /// # Errors
    /// [`Error::Limit`]: 64 VMs exist. [`Error::NotWorking`]: a processor
    /// refused VMX operation, or has no EPT.
    pub fn join(this: &Shared<Self>) -> Result<Membership<H>, Error> {
        if !this.caps.has_ept() {
            return Err(Error::NotWorking);
        }
        let mut numbers = this.numbers.lock();
        let number = numbers.trailing_ones();
        if number >= MAX_VMS {
            return Err(Error::Limit);
        }
        if *numbers == 0 {
            this.operation.start().map_err(|_| Error::NotWorking)?;
        }
        *numbers |= 1 << number;
        drop(numbers);
        Ok(Membership {
            platform: this.clone(),
            number,
        })
    }
}

/// A VM's number and its share in VMX operation; given back when dropped.
pub struct Membership<H: Host> {
    platform: Shared<Platform<H>>,
    number: u32,
}

impl<H: Host> Membership<H> {
    /// The machine.
    pub fn platform(&self) -> &Platform<H> {
        &self.platform
    }

    /// The VM's number, 0 to 63.
    pub fn number(&self) -> u32 {
        self.number
    }
}

impl<H: Host> Drop for Membership<H> {
    fn drop(&mut self) {
        let mut numbers = self.platform.numbers.lock();
        *numbers &= !(1 << self.number);
        if *numbers == 0 {
            self.platform.operation.stop();
        }
    }
}
