//! What is done about each basic exit reason: SDM appendix C "VMX Basic Exit
//! Reasons", all of them.
//!
//! The decoder asks here about the reasons that it does not name itself.
//! `docs/exits.md` says the same in words; `tests/sim` compares the three.

use crate::arch::control::{Pin, Primary};
use crate::arch::exit::ExitReason;
use crate::caps::NEVER_SECONDARY;

/// What is done about an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A handler of its own.
    Handled,
    /// Nothing: the instruction has no effect that a guest could miss.
    Skipped,
    /// #UD: the instruction is not offered.
    Undefined,
    /// The VM entry failed: the vCPU ends, and the log says why.
    Fails,
    /// Cannot happen: the control that allows it is 0.
    Off(Control),
    /// Cannot happen: SMM's dual-monitor treatment, or an activity state that no
    /// guest is in.
    Outside,
    /// The manual gives the number to nothing.
    Unused,
}

/// A control that is never 1. `caps` refuses a processor that insists on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Pin-based.
    Pin(Pin),
    /// Primary processor-based.
    Primary(Primary),
    /// Secondary processor-based, the bit: SDM 25.6.2, table 25-7.
    Secondary(u8),
    /// Any of the tertiary ones, which are not activated.
    Tertiary,
    /// Any bit of the XSS-exiting bitmap.
    XssBitmap,
}

impl Answer {
    /// The answer to a reason.
    #[must_use]
    pub const fn to(reason: ExitReason) -> Self {
        match reason {
            ExitReason::EXCEPTION_OR_NMI
            | ExitReason::EXTERNAL_INTERRUPT
            | ExitReason::TRIPLE_FAULT
            | ExitReason::INIT
            | ExitReason::INTERRUPT_WINDOW
            | ExitReason::TASK_SWITCH
            | ExitReason::CPUID
            | ExitReason::HLT
            | ExitReason::RDPMC
            | ExitReason::CR_ACCESS
            | ExitReason::DR_ACCESS
            | ExitReason::IO_INSTRUCTION
            | ExitReason::RDMSR
            | ExitReason::WRMSR
            | ExitReason::MONITOR_TRAP_FLAG
            | ExitReason::PAUSE
            | ExitReason::TPR_BELOW_THRESHOLD
            | ExitReason::EPT_VIOLATION
            | ExitReason::EPT_MISCONFIGURATION
            | ExitReason::XSETBV => Self::Handled,
            // INVD need not write back what the caches hold, and may (SDM vol.
            // 2, "INVD"): memory is coherent without either.
            ExitReason::INVD | ExitReason::WBINVD => Self::Skipped,
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
            | ExitReason::MWAIT
            | ExitReason::MONITOR
            | ExitReason::INVEPT
            | ExitReason::INVVPID
            // No control keeps these from exiting where the processor has them.
            | ExitReason::SEAMCALL
            | ExitReason::TDCALL => Self::Undefined,
            ExitReason::INVALID_GUEST_STATE
            | ExitReason::MSR_LOADING
            | ExitReason::ENTRY_MACHINE_CHECK => Self::Fails,
            ExitReason::SIPI
            | ExitReason::IO_SMI
            | ExitReason::OTHER_SMI => Self::Outside,
            ExitReason::INVLPG | ExitReason::INVPCID => {
                Self::Off(Control::Primary(Primary::INVLPG_EXITING))
            }
            ExitReason::RDTSC | ExitReason::RDTSCP => {
                Self::Off(Control::Primary(Primary::RDTSC_EXITING))
            }
            ExitReason::NMI_WINDOW => Self::Off(Control::Primary(Primary::NMI_WINDOW_EXITING)),
            ExitReason::PREEMPTION_TIMER => Self::Off(Control::Pin(Pin::PREEMPTION_TIMER)),
            ExitReason::APIC_ACCESS => Self::Off(Control::Secondary(0)),
            ExitReason::GDTR_IDTR_ACCESS | ExitReason::LDTR_TR_ACCESS => {
                Self::Off(Control::Secondary(2))
            }
            ExitReason::APIC_WRITE => Self::Off(Control::Secondary(8)),
            ExitReason::VIRTUALIZED_EOI => Self::Off(Control::Secondary(9)),
            ExitReason::RDRAND => Self::Off(Control::Secondary(11)),
            ExitReason::VMFUNC => Self::Off(Control::Secondary(13)),
            ExitReason::ENCLS => Self::Off(Control::Secondary(15)),
            ExitReason::RDSEED => Self::Off(Control::Secondary(16)),
            ExitReason::PML_FULL => Self::Off(Control::Secondary(17)),
            ExitReason::ENQCMD_PASID | ExitReason::ENQCMDS_PASID => {
                Self::Off(Control::Secondary(21))
            }
            ExitReason::SPP => Self::Off(Control::Secondary(23)),
            ExitReason::UMWAIT | ExitReason::TPAUSE => Self::Off(Control::Secondary(26)),
            ExitReason::PCONFIG => Self::Off(Control::Secondary(27)),
            ExitReason::ENCLV => Self::Off(Control::Secondary(28)),
            ExitReason::BUS_LOCK => Self::Off(Control::Secondary(30)),
            ExitReason::INSTRUCTION_TIMEOUT => Self::Off(Control::Secondary(31)),
            ExitReason::XSAVES | ExitReason::XRSTORS => Self::Off(Control::XssBitmap),
            ExitReason::LOADIWKEY | ExitReason::RDMSRLIST | ExitReason::WRMSRLIST => {
                Self::Off(Control::Tertiary)
            }
            _ => Self::Unused,
        }
    }
}

/// The secondary controls that the answers rest on.
const fn rested_on() -> u32 {
    let mut bits = 0u32;
    let mut number = 0;
    while number < ExitReason::COUNT {
        if let Answer::Off(Control::Secondary(bit)) = Answer::to(ExitReason(number as u16)) {
            bits |= 1u32.wrapping_shl(bit as u32);
        }
        number = number.wrapping_add(1);
    }
    bits
}

const _: () = assert!(rested_on() == NEVER_SECONDARY);
