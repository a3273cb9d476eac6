//! The module as a whole: may this machine run guests, and the VMs it runs.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::Error;
use crate::caps::{self, Refusal};
use crate::fallible::{NoMemory, Shared};
use crate::host::Host;
use crate::platform::Platform;
use crate::vm::Vm;

/// The memory limit of a fresh module, bytes: none that matters.
pub const DEFAULT_QUOTA: u64 = 1 << 48;

/// The module must not load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartError {
    /// The processor lacks something for good.
    Unsupported(Refusal),
    /// No memory for the tables.
    NoMemory,
}

impl From<NoMemory> for StartError {
    fn from(_: NoMemory) -> Self {
        Self::NoMemory
    }
}

/// What CAPABILITY reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// `None`: guests can run. Otherwise why not.
    pub refusal: Option<Refusal>,
    /// Guest memory is behind EPT.
    pub ept: bool,
    /// Guests may run unpaged and in real mode.
    pub unrestricted_guest: bool,
    /// Bytes of guest memory a VM may have, if there is a limit.
    pub memory_quota: Option<u64>,
}

/// The hypervisor.
pub struct Hypervisor<H: Host> {
    /// `None` while the machine may not run guests, with the reason.
    platform: Result<Shared<Platform<H>>, Refusal>,
    /// Bytes; 0: no limit.
    quota: AtomicU64,
}

impl<H: Host> Hypervisor<H> {
    /// Examines every processor and makes the tables. A machine whose firmware
    /// or host forbids VT-x still gets a hypervisor, which says so.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn new(host: H) -> Result<Shared<Self>, StartError> {
        let platform = match Self::examine_all(&host) {
            Ok(caps) => Ok(Shared::new(Platform::new(host, caps)?)?),
            Err(refusal) if refusal.is_unsupported() => {
                log::error!("cannot run guests: {refusal}");
                return Err(StartError::Unsupported(refusal));
            }
            Err(refusal) => {
                log::warn!("cannot run guests: {refusal}");
                Err(refusal)
            }
        };
        if let Ok(platform) = &platform {
            report(platform);
        }
        Ok(Shared::new(Self {
            platform,
            quota: AtomicU64::new(DEFAULT_QUOTA),
        })?)
    }

    /// The capabilities of this processor, if every other one has them too.
    fn examine_all(host: &H) -> Result<caps::Caps, Refusal> {
        let mut caps = caps::examine(host.cpu())?;
        // The others answer from an interrupt, where no lock may be taken.
        let (any, for_good, nx) = (
            AtomicBool::new(false),
            AtomicBool::new(false),
            AtomicBool::new(false),
        );
        let weakest = caps::Weakest::of(&caps.speculation);
        let lends = caps.counters != caps::Counters::default();
        let counters = AtomicBool::new(lends);
        host.run_on_all(&|| {
            if counters.load(Ordering::SeqCst) && !caps.counters.are_real(host.cpu()) {
                counters.store(false, Ordering::SeqCst);
            }
            match caps::examine(host.cpu()) {
                Ok(other) => weakest.add(&other.speculation),
                Err(why) => {
                    any.store(true, Ordering::SeqCst);
                    for_good.fetch_or(why.is_unsupported(), Ordering::SeqCst);
                    nx.fetch_or(why.is_nx(), Ordering::SeqCst);
                }
            }
        });
        if any.into_inner() {
            return Err(Refusal::OtherProcessor {
                for_good: for_good.into_inner(),
                nx: nx.into_inner(),
            });
        }
        weakest.apply(&mut caps.speculation);
        caps.speculation.settle(host.mitigations());
        if lends && !counters.into_inner() {
            // Nor does what is not there overflow.
            caps.counters = caps::Counters::default();
            caps.has_pebs = false;
        }
        Ok(caps)
    }

    /// What CAPABILITY reports.
    pub fn capability(&self) -> Capability {
        let caps = self.platform.as_ref().map(|platform| platform.caps());
        let quota = self.quota.load(Ordering::Relaxed);
        Capability {
            refusal: caps.err().copied(),
            ept: caps.is_ok_and(caps::Caps::has_ept),
            unrestricted_guest: caps.is_ok_and(caps::Caps::has_unrestricted_guest),
            memory_quota: (quota != 0).then_some(quota),
        }
    }

    /// SET_MEMLIMIT: `None` removes the limit, bytes otherwise.
    ///
    /// # Errors
    /// [`Error::Busy`]: VMs exist.
    pub fn set_memory_limit(&self, limit: Option<u64>) -> Result<(), Error> {
        if self.vm_count() != 0 {
            return Err(Error::Busy);
        }
        self.quota.store(limit.unwrap_or(0), Ordering::Relaxed);
        Ok(())
    }

    /// VMs that exist.
    pub fn vm_count(&self) -> u32 {
        self.platform
            .as_ref()
            .map_or(0, |platform| platform.vm_count())
    }

    /// CREATE_VM, for the calling process.
    ///
    /// # Errors
    /// [`Error::NotWorking`]: this machine may not run guests, or has no EPT;
    /// [`Error::Limit`]: 64 exist; [`Error::NoMemory`].
    pub fn create_vm(&self) -> Result<Shared<Vm<H>>, Error> {
        let platform = self.platform.as_ref().map_err(|_| Error::NotWorking)?;
        Vm::new(Platform::join(platform)?)
    }

    /// A processor came online; called on it, unable to migrate.
    pub fn cpu_online(&self) {
        if let Ok(platform) = &self.platform {
            platform.operation().cpu_online();
        }
    }

    /// This processor is about to go offline; called on it, unable to migrate.
    pub fn cpu_offline(&self) {
        if let Ok(platform) = &self.platform {
            platform.operation().cpu_offline();
        }
    }

    /// The last running processor goes to sleep; called on it, with interrupts off.
    pub fn sleep(&self) {
        if let Ok(platform) = &self.platform {
            platform.operation().sleep();
        }
    }

    /// It woke; called on it before any other comes online.
    pub fn wake(&self) {
        if let Ok(platform) = &self.platform {
            platform.operation().wake();
        }
    }

    /// The machine is about to sleep, hibernate or restart: no processor may
    /// stay in VMX operation, where it would ignore INIT.
    pub fn suspend(&self) {
        if let Ok(platform) = &self.platform {
            platform.operation().suspend();
        }
    }

    /// The machine woke.
    pub fn resume(&self) {
        if let Ok(platform) = &self.platform {
            platform.operation().resume();
        }
    }
}

/// Says at load what this machine lacks, so that a refusal later is no riddle.
fn report<H: Host>(platform: &Platform<H>) {
    let caps = platform.caps();
    if !caps.has_ept() {
        log::warn!("the processor has no EPT: VMs cannot be created");
    } else if !caps.has_unrestricted_guest() {
        log::warn!(
            "the processor has no unrestricted guest: \
             clients must emulate real mode (QEMU will refuse)"
        );
    }
}
