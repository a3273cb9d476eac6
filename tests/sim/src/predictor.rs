//! What guests leave behind in a processor's branch predictor, where it can be told to
//! forget: IA32_PRED_CMD bit 0, the IBPB (SDM vol. 4, table 2-2).

use vmx::arch::msr;

use crate::state::State;

/// The branch predictor of one processor.
#[derive(Default)]
pub(crate) struct Predictor {
    /// The VMCS of the last guest that ran since it forgot; 0 if that is gone.
    trained_by: Option<u64>,
    /// IA32_SPEC_CTRL.IBRS was 1 before the exit, and has not been written since.
    stale_ibrs: bool,
    /// Threads that had the processor, one after the other.
    pub(crate) turns: u64,
    /// The last of them.
    pub(crate) thread: u64,
}

impl Predictor {
    /// An IBPB.
    pub(crate) fn forget(&mut self) {
        self.trained_by = None;
    }

    /// IA32_SPEC_CTRL is written.
    pub(crate) fn write_ibrs(&mut self) {
        self.stale_ibrs = false;
    }
}

impl State {
    /// A guest has left the processor. Without IA32_ARCH_CAPABILITIES.IBRS_ALL, IBRS counts only if it
    /// is written after that.
    pub(crate) fn leave_ibrs(&mut self, cpu: usize) {
        let processor = &mut self.cpus[cpu];
        let value = |number| processor.msrs.get(&number).copied().unwrap_or(0);
        let needs_writes = value(msr::IA32_ARCH_CAPABILITIES) >> 1 & 1 == 0;
        processor.predictor.stale_ibrs = needs_writes && value(msr::IA32_SPEC_CTRL) & 1 != 0;
    }

    /// The world switch is over: the host goes on as if IBRS held.
    pub(crate) fn rely_on_ibrs(&mut self, cpu: usize) {
        if self.cpus[cpu].predictor.stale_ibrs {
            self.finding(format!(
                "IBRS was not written after the exit on processor {cpu}"
            ));
        }
    }

    /// The guest of this VMCS runs on a processor, and must not be steered by what
    /// another one left there.
    pub(crate) fn train(&mut self, cpu: usize, vmcs: u64) {
        if !self.cpus[cpu].msrs.contains_key(&msr::IA32_PRED_CMD) {
            return;
        }
        let before = self.cpus[cpu].predictor.trained_by.replace(vmcs);
        if let Some(other) = before.filter(|other| *other != vmcs) {
            self.finding(format!(
                "the guest of VMCS {vmcs:#x} finds predictions of that of {other:#x} on processor {cpu}"
            ));
        }
    }

    /// A VMCS is freed: what its page becomes is another guest.
    pub(crate) fn forget_guest(&mut self, vmcs: u64) {
        for cpu in &mut self.cpus {
            if cpu.predictor.trained_by == Some(vmcs) {
                cpu.predictor.trained_by = Some(0);
            }
        }
    }

    /// A thread takes a processor.
    pub(crate) fn take_turn(&mut self, cpu: usize, thread: u64) {
        let predictor = &mut self.cpus[cpu].predictor;
        if predictor.thread != thread {
            predictor.thread = thread;
            predictor.turns += 1;
        }
    }
}
