//! What the device layer asks of the core, as traits: the core itself implements them, below, and so
//! does the scripted core of the host tests.
//!
//! Errors are the core's. A call that fails has changed nothing.

use abi::{CpuidEntry, FailReasons, FxLayout, MsrData, TunnelInfo, VcpuDebug, VcpuState};
use vmx::arch::addr::Hva;
use vmx::caps::Refusal;
use vmx::fallible::Shared;
use vmx::host::Host;
use vmx::{Error, Hypervisor, Vcpu, Vm};

/// What this machine can do, as CAPABILITY reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capability {
    /// Why guests cannot run; `None` if they can.
    pub refusal: Option<FailReasons>,
    /// Extended page tables.
    pub ept: bool,
    /// Unrestricted guest.
    pub unrestricted_guest: bool,
    /// Bytes of guest memory allowed, if limited.
    pub memory_quota: Option<u64>,
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
    ///
    /// # Errors
    /// [`Error::Busy`]: VMs exist.
    fn set_memory_limit(&self, limit: Option<u64>) -> Result<(), Error>;
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
    /// Whether the process that made this VM has ended.
    fn owner_has_ended(&self) -> bool;
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
    /// The registers.
    ///
    /// # Errors
    /// See [`Error`].
    fn regs(&self) -> Result<VcpuState, Error>;
    /// Sets the FXSAVE image.
    fn set_fpu(&self, fpu: &FxLayout);
    /// The FXSAVE image.
    fn fpu(&self) -> FxLayout;
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
    fn interrupt(&self, vector: u8);
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
    fn cpuid(&self, entries: &mut [CpuidEntry]) -> usize;
    /// Makes the vCPU leave the guest.
    fn kick(&self);
}

impl<H: Host> Core for Hypervisor<H> {
    type Vm = Vm<H>;
    type Vcpu = Vcpu<H>;

    fn capability(&self) -> Capability {
        let capability = self.capability();
        let reason = |refusal: Refusal| {
            if refusal.is_nx() {
                FailReasons::NX
            } else {
                FailReasons::VT
            }
        };
        Capability {
            refusal: capability.refusal.map(reason),
            ept: capability.ept,
            unrestricted_guest: capability.unrestricted_guest,
            memory_quota: capability.memory_quota,
        }
    }

    fn set_memory_limit(&self, limit: Option<u64>) -> Result<(), Error> {
        self.set_memory_limit(limit)
    }

    fn create_vm(this: &Shared<Self>) -> Result<Shared<Vm<H>>, Error> {
        (**this).create_vm()
    }
}

impl<H: Host> CoreVm for Vm<H> {
    type Vcpu = Vcpu<H>;

    fn id(&self) -> u32 {
        self.id()
    }

    fn check_owner(&self) -> Result<(), Error> {
        self.check_owner()
    }

    fn owner_has_ended(&self) -> bool {
        self.owner_has_ended()
    }

    fn create_vcpu(this: &Shared<Self>, id: u32) -> Result<Shared<Vcpu<H>>, Error> {
        Self::create_vcpu(this, id)
    }

    fn add_ram_block(&self, va: u64, size: u64) -> Result<(), Error> {
        self.add_ram_block(Hva(va), size)
    }

    fn set_ram(&self, gpa: u64, size: u64, va: u64, flags: u32) -> Result<(), Error> {
        self.set_ram(gpa, size, va, flags)
    }

    fn protect_ram(&self, gpa: u64, size: u64, flags: u32) -> Result<(), Error> {
        self.protect_ram(gpa, size, flags)
    }

    fn notify_version(&self, current: u32, least: u32) {
        self.notify_version(current, least);
    }
}

impl<H: Host> CoreVcpu for Vcpu<H> {
    fn id(&self) -> u32 {
        self.id()
    }

    fn check_owner(&self) -> Result<(), Error> {
        if self.guest().memory().is_owner() {
            Ok(())
        } else {
            Err(Error::Denied)
        }
    }

    fn tunnel_info(&self) -> TunnelInfo {
        self.tunnel_info()
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn run(&self) -> Result<(), Error> {
        self.run()
    }

    fn set_regs(&self, regs: &VcpuState) -> Result<(), Error> {
        self.set_regs(regs)
    }

    fn regs(&self) -> Result<VcpuState, Error> {
        self.regs()
    }

    fn set_fpu(&self, fpu: &FxLayout) {
        self.set_fpu(fpu);
    }

    fn fpu(&self) -> FxLayout {
        self.fpu()
    }

    fn set_msrs(&self, msrs: &mut MsrData) -> Result<(), Error> {
        self.set_msrs(msrs)
    }

    fn msrs(&self, msrs: &mut MsrData) -> Result<(), Error> {
        self.msrs(msrs)
    }

    fn interrupt(&self, vector: u8) {
        self.interrupt(vector);
    }

    fn set_debug(&self, debug: &VcpuDebug) -> Result<(), Error> {
        self.set_debug(debug)
    }

    fn set_cpuid(&self, entries: &[CpuidEntry]) -> Result<(), Error> {
        self.set_cpuid(entries)
    }

    fn cpuid(&self, entries: &mut [CpuidEntry]) -> usize {
        self.cpuid(entries)
    }

    fn kick(&self) {
        self.kick();
    }
}
