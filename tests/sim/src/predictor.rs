//! What guests leave behind in a processor's branch predictor, where it can be told to
//! forget: IA32_PRED_CMD bit 0, the IBPB (SDM vol. 4, table 2-2).

use vmx::arch::msr;

use crate::state::State;

/// The branch predictor of one processor.
#[derive(Default)]
pub(crate) struct Predictor {
    /// The VMCS of the last guest that ran since it forgot; 0 if that is gone.
    trained_by: Option<u64>,
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
}

impl State {
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
