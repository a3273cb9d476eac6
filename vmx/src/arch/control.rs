//! VM-execution, VM-exit and VM-entry controls.
//!
//! SDM 25.6 "VM-Execution Control Fields", 25.7 "VM-Exit Control Fields",
//! 25.8 "VM-Entry Control Fields". Bits we have no name for are kept.

use bitflags::bitflags;
use x86::vmx::vmcs::control::{
    EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls,
};

bitflags! {
    /// SDM 25.6.1 "Pin-Based VM-Execution Controls".
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Pin: u32 {
        /// External interrupts cause exits.
        const EXTERNAL_INTERRUPT_EXITING = PinbasedControls::EXTERNAL_INTERRUPT_EXITING.bits();
        /// NMIs cause exits.
        const NMI_EXITING = PinbasedControls::NMI_EXITING.bits();
        /// Guest NMI blocking is tracked apart from the host's.
        const VIRTUAL_NMIS = PinbasedControls::VIRTUAL_NMIS.bits();
        /// Exit when the VMX-preemption timer has run down.
        const PREEMPTION_TIMER = PinbasedControls::VMX_PREEMPTION_TIMER.bits();
        const _ = !0;
    }

    /// SDM 25.6.2 "Processor-Based VM-Execution Controls", primary.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Primary: u32 {
        /// Exit as soon as the guest can take an interrupt.
        const INTERRUPT_WINDOW_EXITING = PrimaryControls::INTERRUPT_WINDOW_EXITING.bits();
        /// RDTSC and friends add the TSC offset.
        const USE_TSC_OFFSETTING = PrimaryControls::USE_TSC_OFFSETTING.bits();
        /// HLT exits.
        const HLT_EXITING = PrimaryControls::HLT_EXITING.bits();
        /// INVLPG exits.
        const INVLPG_EXITING = PrimaryControls::INVLPG_EXITING.bits();
        /// MWAIT exits.
        const MWAIT_EXITING = PrimaryControls::MWAIT_EXITING.bits();
        /// RDPMC exits.
        const RDPMC_EXITING = PrimaryControls::RDPMC_EXITING.bits();
        /// RDTSC exits.
        const RDTSC_EXITING = PrimaryControls::RDTSC_EXITING.bits();
        /// MOV to CR3 exits.
        const CR3_LOAD_EXITING = PrimaryControls::CR3_LOAD_EXITING.bits();
        /// MOV from CR3 exits.
        const CR3_STORE_EXITING = PrimaryControls::CR3_STORE_EXITING.bits();
        /// MOV to CR8 exits.
        const CR8_LOAD_EXITING = PrimaryControls::CR8_LOAD_EXITING.bits();
        /// MOV from CR8 exits.
        const CR8_STORE_EXITING = PrimaryControls::CR8_STORE_EXITING.bits();
        /// CR8 accesses go to the virtual-APIC page.
        const USE_TPR_SHADOW = PrimaryControls::USE_TPR_SHADOW.bits();
        /// Exit as soon as the guest can take an NMI.
        const NMI_WINDOW_EXITING = PrimaryControls::NMI_WINDOW_EXITING.bits();
        /// MOV to and from debug registers exits.
        const MOV_DR_EXITING = PrimaryControls::MOV_DR_EXITING.bits();
        /// Every port access exits.
        const UNCONDITIONAL_IO_EXITING = PrimaryControls::UNCOND_IO_EXITING.bits();
        /// Port accesses exit as the bitmaps say.
        const USE_IO_BITMAPS = PrimaryControls::USE_IO_BITMAPS.bits();
        /// Exit after every instruction.
        const MONITOR_TRAP_FLAG = PrimaryControls::MONITOR_TRAP_FLAG.bits();
        /// RDMSR and WRMSR exit as the bitmap says.
        const USE_MSR_BITMAPS = PrimaryControls::USE_MSR_BITMAPS.bits();
        /// MONITOR exits.
        const MONITOR_EXITING = PrimaryControls::MONITOR_EXITING.bits();
        /// PAUSE exits.
        const PAUSE_EXITING = PrimaryControls::PAUSE_EXITING.bits();
        /// The secondary controls are in force.
        const ACTIVATE_SECONDARY = PrimaryControls::SECONDARY_CONTROLS.bits();
        const _ = !0;
    }

    /// SDM 25.6.2 "Processor-Based VM-Execution Controls", secondary.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Secondary: u32 {
        /// Guest-physical addresses go through EPT.
        const ENABLE_EPT = SecondaryControls::ENABLE_EPT.bits();
        /// LGDT, SIDT and the rest exit.
        const DESCRIPTOR_TABLE_EXITING = SecondaryControls::DTABLE_EXITING.bits();
        /// RDTSCP does not #UD.
        const ENABLE_RDTSCP = SecondaryControls::ENABLE_RDTSCP.bits();
        /// TLB entries are tagged with a VPID.
        const ENABLE_VPID = SecondaryControls::ENABLE_VPID.bits();
        /// WBINVD exits.
        const WBINVD_EXITING = SecondaryControls::WBINVD_EXITING.bits();
        /// CR0.PE and CR0.PG may be clear in the guest.
        const UNRESTRICTED_GUEST = SecondaryControls::UNRESTRICTED_GUEST.bits();
        /// A spin loop of PAUSEs exits.
        const PAUSE_LOOP_EXITING = SecondaryControls::PAUSE_LOOP_EXITING.bits();
        /// INVPCID does not #UD.
        const ENABLE_INVPCID = SecondaryControls::ENABLE_INVPCID.bits();
        /// XSAVES and XRSTORS do not #UD.
        const ENABLE_XSAVES = SecondaryControls::ENABLE_XSAVES_XRSTORS.bits();
        const _ = !0;
    }

    /// SDM 25.7.1 "VM-Exit Controls".
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Exit: u32 {
        /// DR7 and IA32_DEBUGCTL are saved on exit.
        const SAVE_DEBUG_CONTROLS = ExitControls::SAVE_DEBUG_CONTROLS.bits();
        /// The host is in 64-bit mode after the exit.
        const HOST_ADDRESS_SPACE_SIZE = ExitControls::HOST_ADDRESS_SPACE_SIZE.bits();
        /// The interrupt that caused the exit is acknowledged.
        const ACKNOWLEDGE_INTERRUPT = ExitControls::ACK_INTERRUPT_ON_EXIT.bits();
        /// IA32_PAT is saved on exit.
        const SAVE_PAT = ExitControls::SAVE_IA32_PAT.bits();
        /// IA32_PAT is loaded on exit.
        const LOAD_PAT = ExitControls::LOAD_IA32_PAT.bits();
        /// IA32_EFER is saved on exit.
        const SAVE_EFER = ExitControls::SAVE_IA32_EFER.bits();
        /// IA32_EFER is loaded on exit.
        const LOAD_EFER = ExitControls::LOAD_IA32_EFER.bits();
        /// IA32_PERF_GLOBAL_CTRL is loaded on exit.
        const LOAD_PERF_GLOBAL_CTRL = ExitControls::LOAD_IA32_PERF_GLOBAL_CTRL.bits();
        const _ = !0;
    }

    /// SDM 25.8.1 "VM-Entry Controls".
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Entry: u32 {
        /// DR7 and IA32_DEBUGCTL are loaded on entry.
        const LOAD_DEBUG_CONTROLS = EntryControls::LOAD_DEBUG_CONTROLS.bits();
        /// The guest is in IA-32e mode after the entry.
        const IA32E_MODE_GUEST = EntryControls::IA32E_MODE_GUEST.bits();
        /// IA32_PAT is loaded on entry.
        const LOAD_PAT = EntryControls::LOAD_IA32_PAT.bits();
        /// IA32_EFER is loaded on entry.
        const LOAD_EFER = EntryControls::LOAD_IA32_EFER.bits();
        /// IA32_PERF_GLOBAL_CTRL is loaded on entry.
        const LOAD_PERF_GLOBAL_CTRL = EntryControls::LOAD_IA32_PERF_GLOBAL_CTRL.bits();
        const _ = !0;
    }
}
