//! An exit, decoded once from the VMCS into what the handlers see. The most
//! frequent ones, I/O, CPUID, RDMSR and HLT, do not come here: `Vcpu::once`
//! gives them to their handlers itself.

use super::table::Answer;
use crate::arch::addr::Gpa;
use crate::arch::event::InterruptionInfo;
use crate::arch::exit::{CrAccess, DrQualification, EptQualification, ExitReason};
use crate::arch::field;
use crate::host::Host;
use crate::vcpu::vmcs::Current;

/// Why the guest stopped, with what its handler needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An exception that is intercepted, or an NMI for the host.
    Exception {
        /// What happened.
        info: InterruptionInfo,
    },
    /// An interrupt for the host.
    ExternalInterrupt,
    /// The guest is lost.
    TripleFault,
    /// The guest can take an interrupt now.
    InterruptWindow,
    /// The guest lowered its task priority below the threshold.
    TprBelowThreshold,
    /// One instruction was executed under the monitor trap flag.
    MonitorTrap,
    /// A hardware task switch.
    TaskSwitch {
        /// The exit qualification.
        qualification: u64,
    },
    /// RDPMC.
    Rdpmc,
    /// A loop of PAUSEs: the guest waits for another of its processors.
    Spin,
    /// An instruction that does nothing here: WBINVD, INVD.
    Skip,
    /// A control-register access.
    CrAccess(CrAccess),
    /// A debug-register access.
    DrAccess(DrQualification),
    /// WRMSR.
    Wrmsr,
    /// XSETBV.
    Xsetbv,
    /// A guest-physical access that EPT does not allow.
    EptViolation {
        /// Where.
        gpa: Gpa,
        /// How.
        qualification: EptQualification,
    },
    /// An EPT entry that the processor refuses.
    EptMisconfiguration {
        /// Where.
        gpa: Gpa,
    },
    /// An instruction that does not exist for this guest.
    Undefined,
    /// The entry failed.
    EntryFailure {
        /// Which of the failures.
        reason: ExitReason,
        /// Its qualification.
        qualification: u64,
    },
    /// A reason that no control of ours allows.
    Unexpected(ExitReason),
}

impl Exit {
    /// Reads what this exit needs from the VMCS; `word` is its exit reason
    /// field.
    pub fn read<H: Host>(current: &Current<'_, H>, word: u32) -> Self {
        let reason = ExitReason::from_field(word);
        let qualification = || current.read(field::EXIT_QUALIFICATION);
        if word & ExitReason::ENTRY_FAILURE != 0 {
            return Self::EntryFailure {
                reason,
                qualification: qualification(),
            };
        }
        let gpa = || Gpa(current.read(field::GUEST_PHYSICAL_ADDRESS));
        match reason {
            ExitReason::EXCEPTION_OR_NMI => Self::Exception {
                info: InterruptionInfo(current.read(field::EXIT_INTERRUPTION_INFO)),
            },
            // INIT is blocked in VMX operation: the exit is all that came of it
            // (SDM 26.2 "Other Causes of VM Exits"), and it is no guest's.
            ExitReason::EXTERNAL_INTERRUPT | ExitReason::INIT => Self::ExternalInterrupt,
            ExitReason::TRIPLE_FAULT => Self::TripleFault,
            ExitReason::INTERRUPT_WINDOW => Self::InterruptWindow,
            ExitReason::TPR_BELOW_THRESHOLD => Self::TprBelowThreshold,
            ExitReason::TASK_SWITCH => Self::TaskSwitch {
                qualification: qualification(),
            },
            ExitReason::MONITOR_TRAP_FLAG => Self::MonitorTrap,
            ExitReason::RDPMC => Self::Rdpmc,
            ExitReason::PAUSE => Self::Spin,
            ExitReason::CR_ACCESS => Self::CrAccess(CrAccess::from_qualification(qualification())),
            ExitReason::DR_ACCESS => Self::DrAccess(DrQualification(qualification())),
            ExitReason::WRMSR => Self::Wrmsr,
            ExitReason::XSETBV => Self::Xsetbv,
            ExitReason::EPT_VIOLATION => Self::EptViolation {
                gpa: gpa(),
                qualification: EptQualification(qualification()),
            },
            ExitReason::EPT_MISCONFIGURATION => Self::EptMisconfiguration { gpa: gpa() },
            other => match Answer::to(other) {
                Answer::Skipped => Self::Skip,
                Answer::Undefined => Self::Undefined,
                _ => Self::Unexpected(other),
            },
        }
    }

    /// The exit can have come in the middle of delivering an event through the
    /// IDT, so the IDT-vectoring information counts: SDM 28.2.4 "Information
    /// for VM Exits During Event Delivery".
    pub fn during_delivery(&self) -> bool {
        matches!(
            self,
            Self::Exception { .. }
                | Self::TaskSwitch { .. }
                | Self::EptViolation { .. }
                | Self::EptMisconfiguration { .. }
                | Self::TripleFault
        )
    }
}
