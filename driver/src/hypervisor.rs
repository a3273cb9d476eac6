//! What the device layer asks of the core, as traits: the core itself implements them, and so does
//! the scripted core of the host tests.
//!
//! Errors are the core's. A call that fails has changed nothing.

use abi::{CpuidEntry, FxLayout, MsrData, TunnelInfo, VcpuDebug, VcpuState};
use vmx::Error;
use vmx::fallible::Shared;

/// What this machine can do, as CAPABILITY reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capability {
    /// Guests can run.
    pub working: bool,
    /// Not working because VT-x is missing, incomplete or locked off.
    pub vt_disabled: bool,
    /// Not working because execute-disable is missing or off.
    pub nx_disabled: bool,
    /// Extended page tables.
    pub ept: bool,
    /// Unrestricted guest.
    pub ug: bool,
    /// Bytes of guest memory allowed, if limited.
    pub mem_quota: Option<u64>,
}

/// The hypervisor.
pub trait Core: Send + Sync + 'static {
    /// A VM. Its id is free again when the last reference is dropped.
    type Vm: CoreVm<Vcpu = Self::Vcpu>;
    /// A vCPU.
    type Vcpu: CoreVcpu;

    /// What CAPABILITY reports.
    fn capability(&self) -> Capability;
    /// Sets or removes the memory quota, in bytes.
    fn set_memory_limit(&self, limit: Option<u64>);
    /// VMs that exist.
    fn vm_count(&self) -> usize;
    /// Makes a VM of the calling process, with the lowest free id.
    ///
    /// # Errors
    /// See [`Error`].
    fn create_vm(this: &Shared<Self>) -> Result<Shared<Self::Vm>, Error>
    where
        Self: Sized;
}

/// A VM.
pub trait CoreVm: Send + Sync + 'static {
    /// Its vCPUs, each of which holds a reference to the VM.
    type Vcpu: CoreVcpu;

    /// Its id.
    fn id(&self) -> u32;
    /// Whether the calling process made this VM.
    ///
    /// # Errors
    /// [`Error::Denied`]: it did not.
    fn check_owner(&self) -> Result<(), Error>;
    /// Makes a vCPU and its shared pages in the calling process.
    ///
    /// # Errors
    /// See [`Error`].
    fn create_vcpu(this: &Shared<Self>, id: u32) -> Result<Shared<Self::Vcpu>, Error>
    where
        Self: Sized;
    /// Registers `size` bytes at the process's address `va` as a RAM block.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::NoMemory`].
    fn add_ram_block(&self, va: u64, size: u64) -> Result<(), Error>;
    /// Maps or unmaps `size` bytes at guest-physical `gpa`; flags are [`abi::RamFlags`].
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::NoMemory`].
    fn set_ram(&self, gpa: u64, size: u64, va: u64, flags: u32) -> Result<(), Error>;
    /// Opens or closes `size` bytes at `gpa`; flags are [`abi::RamPermissions`].
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::NoMemory`].
    fn protect_ram(&self, gpa: u64, size: u64, flags: u32) -> Result<(), Error>;
    /// The client's API version and the least it can use.
    fn notify_version(&self, current: u32, least: u32);
}

/// A vCPU. Waiting for a RUN in progress is the core's part.
pub trait CoreVcpu: Send + Sync + 'static {
    /// Its id in its VM.
    fn id(&self) -> u32;
    /// Whether the calling process made its VM.
    ///
    /// # Errors
    /// [`Error::Denied`]: it did not.
    fn check_owner(&self) -> Result<(), Error>;
    /// Where its shared pages are.
    fn tunnel_info(&self) -> TunnelInfo;
    /// Runs the guest until something needs the client. Being interrupted is
    /// no error but an exit status.
    ///
    /// # Errors
    /// [`Error::Invalid`]: VM entry failed.
    fn run(&self) -> Result<(), Error>;
    /// Sets registers.
    ///
    /// # Errors
    /// See [`Error`].
    fn set_regs(&self, regs: &VcpuState) -> Result<(), Error>;
    /// Fills `regs`, which the caller has zeroed.
    ///
    /// # Errors
    /// See [`Error`].
    fn regs(&self, regs: &mut VcpuState) -> Result<(), Error>;
    /// Sets the FXSAVE image.
    ///
    /// # Errors
    /// See [`Error`].
    fn set_fpu(&self, fpu: &FxLayout) -> Result<(), Error>;
    /// Fills `fpu`, which the caller has zeroed.
    ///
    /// # Errors
    /// See [`Error`].
    fn fpu(&self, fpu: &mut FxLayout) -> Result<(), Error>;
    /// Writes `nr_msr` (at most [`abi::MAX_MSRS`]) MSRs up to the first
    /// refused one, and sets `done`.
    ///
    /// # Errors
    /// See [`Error`]; a refused MSR is none.
    fn set_msrs(&self, msrs: &mut MsrData) -> Result<(), Error>;
    /// Reads MSRs the same way.
    ///
    /// # Errors
    /// See [`Error`]; a refused MSR is none.
    fn msrs(&self, msrs: &mut MsrData) -> Result<(), Error>;
    /// Queues an interrupt vector.
    ///
    /// # Errors
    /// See [`Error`].
    fn interrupt(&self, vector: u8) -> Result<(), Error>;
    /// Sets debug control.
    ///
    /// # Errors
    /// See [`Error`].
    fn set_debug(&self, debug: &VcpuDebug) -> Result<(), Error>;
    /// Replaces the settable leaves of the VM's CPUID table that are given.
    ///
    /// # Errors
    /// See [`Error`].
    fn set_cpuid(&self, entries: &[CpuidEntry]) -> Result<(), Error>;
    /// Fills `entries` from the CPUID table as far as they reach; returns the
    /// number of entries the table has.
    ///
    /// # Errors
    /// See [`Error`].
    fn cpuid(&self, entries: &mut [CpuidEntry]) -> Result<usize, Error>;
    /// Makes the vCPU leave the guest.
    fn kick(&self);
}
