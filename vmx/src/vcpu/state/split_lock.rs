//! Split locks: locked accesses that are in two cache lines at once.
//!
//! They stop the memory bus of the whole machine, so a host may have them fault: #AC
//! at any level, whatever CR0.AM and EFLAGS.AC are (SDM 9.1.2.3 "Features to Disable
//! Bus Locks"). Linux does, where the processor can. A guest knows nothing of that,
//! and dies of an exception that it never asked for. From its first one on, they are
//! allowed while this vCPU runs.
// UNSAFETY: WRMSR of a register that exists, the host's value put back by `restore`.
#![expect(unsafe_code)]

use crate::arch::msr::{self, SPLIT_LOCK_DISABLE};
use crate::caps::Caps;
use crate::cpu::Cpu;

/// What is to be done about them.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// The guest has not met the fault.
    #[default]
    Unknown,
    /// Allowed while the guest runs.
    Allowed,
    /// Allowed now; the host's value of MSR_MEMORY_CTRL.
    Loaded(u64),
}

/// The split locks of a vCPU.
#[derive(Default)]
pub struct SplitLocks(State);

impl SplitLocks {
    /// The guest has met an #AC that no alignment check explains, while its values are
    /// loaded. `false`: no split lock does either.
    pub fn allow(&mut self, cpu: &impl Cpu, caps: &Caps) -> bool {
        if !caps.has_split_lock_disable {
            return false;
        }
        self.0 = State::Allowed;
        self.load(cpu);
        self.0 != State::Allowed
    }

    /// Gives the processor the guest's behaviour.
    #[inline]
    pub fn load(&mut self, cpu: &impl Cpu) {
        if self.0 != State::Unknown {
            self.load_allowed(cpu);
        }
    }

    #[cold]
    fn load_allowed(&mut self, cpu: &impl Cpu) {
        // SAFETY: the register exists: `allow`.
        let host = unsafe { cpu.rdmsr(msr::MSR_MEMORY_CTRL) };
        if host & SPLIT_LOCK_DISABLE != 0 {
            // SAFETY: as above; the host's value but for a bit that may be 0.
            unsafe { cpu.wrmsr(msr::MSR_MEMORY_CTRL, host & !SPLIT_LOCK_DISABLE) };
            self.0 = State::Loaded(host);
        }
    }

    /// Gives the processor the host's value back.
    #[inline]
    pub fn restore(&mut self, cpu: &impl Cpu) {
        if let State::Loaded(host) = self.0 {
            self.0 = State::Allowed;
            // SAFETY: the register exists; the host's own value.
            unsafe { cpu.wrmsr(msr::MSR_MEMORY_CTRL, host) };
        }
    }
}
