//! An exit, decoded once from the VMCS into what the handlers see.

use super::vmcs::Current;
use crate::arch::addr::Gpa;
use crate::arch::event::InterruptionInfo;
use crate::arch::exit::{CrAccess, DrQualification, EptQualification, ExitReason, IoQualification};
use crate::arch::field;
use crate::host::Host;

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
    /// The guest can take an NMI now.
    NmiWindow,
    /// One instruction was executed under the monitor trap flag.
    MonitorTrap,
    /// A hardware task switch.
    TaskSwitch {
        /// The exit qualification.
        qualification: u64,
    },
    /// CPUID.
    Cpuid,
    /// HLT.
    Hlt,
    /// RDPMC.
    Rdpmc,
    /// A loop of PAUSEs: the guest waits for another of its processors.
    Spin,
    /// An instruction that does nothing here: WBINVD, INVLPG.
    Skip,
    /// A control-register access.
    CrAccess(CrAccess),
    /// A debug-register access.
    DrAccess(DrQualification),
    /// IN, OUT, INS or OUTS.
    Io(IoQualification),
    /// RDMSR.
    Rdmsr,
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
    /// Reads what this exit needs from the VMCS. The second value is the basic
    /// reason, which clients see in the tunnel.
    pub fn read<H: Host>(current: &Current<'_, H>) -> (Self, ExitReason) {
        let word = current.read(field::EXIT_REASON);
        let reason = ExitReason::from_field(word);
        let qualification = || current.read(field::EXIT_QUALIFICATION);
        if word & ExitReason::ENTRY_FAILURE != 0 {
            let exit = Self::EntryFailure {
                reason,
                qualification: qualification(),
            };
            return (exit, reason);
        }
        let gpa = || Gpa(current.read(field::GUEST_PHYSICAL_ADDRESS));
        let exit = match reason {
            ExitReason::EXCEPTION_OR_NMI => Self::Exception {
                info: InterruptionInfo(current.read(field::EXIT_INTERRUPTION_INFO)),
            },
            ExitReason::EXTERNAL_INTERRUPT => Self::ExternalInterrupt,
            ExitReason::TRIPLE_FAULT => Self::TripleFault,
            ExitReason::INTERRUPT_WINDOW => Self::InterruptWindow,
            ExitReason::NMI_WINDOW => Self::NmiWindow,
            ExitReason::TASK_SWITCH => Self::TaskSwitch {
                qualification: qualification(),
            },
            ExitReason::MONITOR_TRAP_FLAG => Self::MonitorTrap,
            ExitReason::CPUID => Self::Cpuid,
            ExitReason::HLT => Self::Hlt,
            ExitReason::RDPMC => Self::Rdpmc,
            // INVD need not write back what the caches hold, and may (SDM vol.
            // 2, "INVD"): memory is coherent without either.
            ExitReason::WBINVD | ExitReason::INVD | ExitReason::INVLPG => Self::Skip,
            ExitReason::PAUSE => Self::Spin,
            ExitReason::CR_ACCESS => Self::CrAccess(CrAccess::from_qualification(qualification())),
            ExitReason::DR_ACCESS => Self::DrAccess(DrQualification(qualification())),
            ExitReason::IO_INSTRUCTION => Self::Io(IoQualification(qualification())),
            ExitReason::RDMSR => Self::Rdmsr,
            ExitReason::WRMSR => Self::Wrmsr,
            ExitReason::XSETBV => Self::Xsetbv,
            ExitReason::EPT_VIOLATION => Self::EptViolation {
                gpa: gpa(),
                qualification: EptQualification(qualification()),
            },
            ExitReason::EPT_MISCONFIGURATION => Self::EptMisconfiguration { gpa: gpa() },
            // Not offered in CPUID, so they do not exist.
            ExitReason::GETSEC
            | ExitReason::RSM
            | ExitReason::VMCALL
            | ExitReason::VMCLEAR
            | ExitReason::VMLAUNCH
            | ExitReason::VMPTRLD
            | ExitReason::VMPTRST
            | ExitReason::VMREAD
            | ExitReason::VMRESUME
            | ExitReason::VMWRITE
            | ExitReason::VMXOFF
            | ExitReason::VMXON
            | ExitReason::INVEPT
            | ExitReason::INVVPID
            | ExitReason::VMFUNC
            | ExitReason::MWAIT
            | ExitReason::MONITOR
            | ExitReason::RDTSCP
            | ExitReason::INVPCID
            | ExitReason::ENCLS
            | ExitReason::XSAVES
            | ExitReason::XRSTORS
            | ExitReason::PCONFIG
            | ExitReason::UMWAIT
            | ExitReason::TPAUSE
            | ExitReason::LOADIWKEY => Self::Undefined,
            other => Self::Unexpected(other),
        };
        (exit, reason)
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
