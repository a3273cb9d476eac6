//! The checks of a VM entry, SDM chapter 27 "VM Entries": each has a name.

mod controls;
mod guest;
mod host;
mod segments;

use crate::memory::Memory;
use crate::profile::Profile;
use crate::state::{Processor, State};
use crate::vmcs::Vmcs;

pub(crate) use guest::load_msrs;

/// At which step a VM entry failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// VM-instruction error 7.
    Controls,
    /// VM-instruction error 8.
    HostState,
    /// Exit reason 33.
    GuestState,
    /// Exit reason 34.
    MsrLoading,
}

/// A VM entry that failed, and every check of that stage that did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryFailure {
    /// Where.
    pub stage: Stage,
    /// Which checks.
    pub checks: Vec<Check>,
    /// The VMCS.
    pub vmcs: u64,
}

macro_rules! checks {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// One check of a VM entry.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Check {
            $($(#[$doc])* $name,)*
        }

        impl Check {
            /// Every check.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
        }
    };
}

checks! {
    // 27.2.1.1 "VM-Execution Control Fields"
    /// Pin-based controls against the capability register.
    PinReserved,
    /// Primary controls against the capability register.
    PrimaryReserved,
    /// Secondary controls against the capability register.
    SecondaryReserved,
    /// CR3-target count at most what IA32_VMX_MISC says.
    Cr3TargetCount,
    /// I/O bitmaps page aligned and within the physical-address width.
    IoBitmapAddress,
    /// MSR bitmaps likewise.
    MsrBitmapAddress,
    /// Virtual-APIC page likewise.
    VirtualApicAddress,
    /// TPR threshold within 4 bits and not above VTPR.
    TprThreshold,
    /// x2APIC, register and interrupt virtualization need the TPR shadow.
    TprShadowNeeded,
    /// Virtual NMIs need NMI exiting.
    VirtualNmisNeedExiting,
    /// NMI-window exiting needs virtual NMIs.
    NmiWindowNeedsVirtualNmis,
    /// APIC-access page aligned; not with x2APIC mode.
    ApicAccess,
    /// Virtual-interrupt delivery needs external-interrupt exiting.
    VirtualInterruptDelivery,
    /// Posted interrupts' needs.
    PostedInterrupts,
    /// VPID not 0.
    Vpid,
    /// EPTP: memory type, walk length, flags, reserved bits, width.
    Eptp,
    /// Page-modification logging needs EPT and an aligned page.
    PageModificationLog,
    /// Unrestricted guest needs EPT.
    UnrestrictedGuestNeedsEpt,
    /// VM functions: bits, EPT, list address.
    VmFunctions,
    /// Shadow VMCS bitmaps' addresses.
    ShadowBitmaps,
    /// #VE information address.
    VirtualizationException,
    // 27.2.1.2 "VM-Exit Control Fields"
    /// VM-exit controls against the capability register.
    ExitReserved,
    /// Saving the preemption timer needs the timer.
    PreemptionTimerSave,
    /// VM-exit MSR-store area.
    ExitMsrStoreArea,
    /// VM-exit MSR-load area.
    ExitMsrLoadArea,
    // 27.2.1.3 "VM-Entry Control Fields"
    /// VM-entry controls against the capability register.
    EntryReserved,
    /// Interruption type reserved or not supported.
    InjectType,
    /// Vector does not fit the type.
    InjectVector,
    /// Deliver-error-code bit wrong for the event.
    InjectErrorCodeBit,
    /// Reserved bits 30:12 of the information field.
    InjectReserved,
    /// Bits 31:16 of the error code.
    InjectErrorCode,
    /// Instruction length of a software event.
    InjectLength,
    /// VM-entry MSR-load area.
    EntryMsrLoadArea,
    /// SMM controls outside SMM.
    EntrySmm,
    // 27.2.2 "Checks on Host Control Registers, MSRs, and SSP"
    /// Host CR0 fixed bits.
    HostCr0,
    /// Host CR4 fixed bits.
    HostCr4,
    /// Host CR3 within the physical-address width.
    HostCr3,
    /// Host SYSENTER addresses canonical.
    HostSysenter,
    /// Host PAT entries.
    HostPat,
    /// Host EFER reserved bits, LMA and LME.
    HostEfer,
    /// Reserved bits of the host's IA32_PERF_GLOBAL_CTRL.
    HostPerfGlobalCtrl,
    // 27.2.3 "Checks on Host Segment and Descriptor-Table Registers"
    /// RPL and TI of a host selector.
    HostSelectorBits,
    /// Host CS selector is 0.
    HostCsNull,
    /// Host TR selector is 0.
    HostTrNull,
    /// Host SS selector is 0 for a 32-bit host.
    HostSsNull,
    /// Host FS, GS, GDTR, IDTR, TR base canonical.
    HostBases,
    // 27.2.4 "Checks Related to Address-Space Size"
    /// Controls agree with the mode the entry is made from.
    HostAddressSpace,
    /// 64-bit host: CR4.PAE; 32-bit host: no PCIDE, no 64-bit guest.
    HostModeCr4,
    /// Host RIP.
    HostRip,
    // 27.3.1.1 "Checks on Guest Control Registers, Debug Registers, and MSRs"
    /// Guest CR0 fixed bits (PE and PG free for an unrestricted guest).
    GuestCr0,
    /// Guest CR0.PG without PE.
    GuestPgWithoutPe,
    /// Guest CR4 fixed bits.
    GuestCr4,
    /// Reserved bits of IA32_DEBUGCTL.
    GuestDebugctl,
    /// IA-32e guest without PG or PAE.
    GuestIa32e,
    /// PCIDE outside IA-32e mode.
    GuestPcide,
    /// Guest CR3 within the physical-address width.
    GuestCr3,
    /// DR7 bits 63:32.
    GuestDr7,
    /// Guest SYSENTER addresses canonical.
    GuestSysenter,
    /// Guest PAT entries.
    GuestPat,
    /// Guest EFER reserved bits, LMA, LME.
    GuestEfer,
    /// Reserved bits of the guest's IA32_PERF_GLOBAL_CTRL.
    GuestPerfGlobalCtrl,
    // 27.3.1.2 "Checks on Guest Segment Registers"
    /// TI of TR.
    TrTi,
    /// TI of LDTR.
    LdtrTi,
    /// RPL of SS equals RPL of CS.
    SsRpl,
    /// Base of a segment in virtual-8086 mode.
    V86Base,
    /// Base of TR, FS, GS or LDTR canonical.
    SegmentBaseCanonical,
    /// Bits 63:32 of the base of CS, SS, DS or ES.
    SegmentBaseHigh,
    /// Limit of a segment in virtual-8086 mode.
    V86Limit,
    /// Access rights of a segment in virtual-8086 mode.
    V86Rights,
    /// Type of CS.
    CsType,
    /// Type of SS.
    SsType,
    /// Type of DS, ES, FS or GS.
    DataType,
    /// S bit of a code or data segment.
    SegmentS,
    /// DPL of CS.
    CsDpl,
    /// DPL of SS.
    SsDpl,
    /// DPL of DS, ES, FS or GS.
    DataDpl,
    /// P bit of a code or data segment.
    SegmentP,
    /// Reserved access-rights bits of a code or data segment.
    SegmentReserved,
    /// CS.L and CS.D together in IA-32e mode.
    CsDb,
    /// G bit of a code or data segment against its limit.
    SegmentG,
    /// Type of TR.
    TrType,
    /// S, P, reserved bits or usability of TR.
    TrRights,
    /// G bit of TR.
    TrG,
    /// Type of LDTR.
    LdtrType,
    /// S, P or reserved bits of LDTR.
    LdtrRights,
    /// G bit of LDTR.
    LdtrG,
    // 27.3.1.3 "Checks on Guest Descriptor-Table Registers"
    /// GDTR or IDTR base canonical.
    TableBase,
    /// GDTR or IDTR limit within 16 bits.
    TableLimit,
    // 27.3.1.4 "Checks on Guest RIP, RFLAGS, and SSP"
    /// RIP.
    GuestRip,
    /// Reserved bits of RFLAGS.
    RflagsReserved,
    /// RFLAGS.VM in IA-32e mode or without PE.
    RflagsVm,
    /// RFLAGS.IF with an external interrupt to inject.
    RflagsIf,
    // 27.3.1.5 "Checks on Guest Non-Register State"
    /// Activity state not supported.
    ActivityUnsupported,
    /// HLT with SS.DPL not 0.
    ActivityHltDpl,
    /// Not active while blocking by STI or MOV SS.
    ActivityBlocking,
    /// Event cannot be injected in this activity state.
    ActivityEvent,
    /// Reserved bits of the interruptibility state.
    InterruptibilityReserved,
    /// Blocking by STI and by MOV SS.
    StiAndMovSs,
    /// Blocking by STI with IF clear.
    StiWithoutIf,
    /// Blocking with an external interrupt to inject.
    BlockingInterrupt,
    /// Blocking by MOV SS with an NMI to inject.
    BlockingNmiMovSs,
    /// Blocking by STI with an NMI to inject.
    BlockingNmiSti,
    /// Blocking by SMI outside SMM.
    BlockingSmi,
    /// Virtual NMIs: blocking by NMI with an NMI to inject.
    BlockingVirtualNmi,
    /// Reserved bits of the pending debug exceptions.
    PendingDebugReserved,
    /// BS of the pending debug exceptions against TF and BTF.
    PendingDebugBs,
    /// VMCS link pointer.
    LinkPointer,
    // 27.3.1.6 "Checks on Guest Page-Directory-Pointer-Table Entries"
    /// Reserved bits of a present PDPTE.
    Pdptes,
    // 27.4 "Loading MSRs"
    /// An entry of the VM-entry MSR-load area.
    MsrLoad,
}

/// What the checks look at.
pub(crate) struct View<'a> {
    pub(crate) profile: &'a Profile,
    pub(crate) vmcs: &'a Vmcs,
    pub(crate) cpu: &'a Processor,
    pub(crate) memory: &'a Memory,
    pub(crate) pointer: u64,
}

impl View<'_> {
    pub(crate) fn get(&self, field: u32) -> u64 {
        self.vmcs.get(field)
    }

    fn bit(&self, field: u32, bit: u32) -> bool {
        self.get(field) >> bit & 1 != 0
    }

    fn pin(&self, bit: u32) -> bool {
        self.bit(0x4000, bit)
    }

    fn primary(&self, bit: u32) -> bool {
        self.bit(0x4002, bit)
    }

    /// A secondary control; all are 0 unless they are activated.
    pub(crate) fn secondary(&self, bit: u32) -> bool {
        self.primary(31) && self.bit(0x401e, bit)
    }

    fn exit(&self, bit: u32) -> bool {
        self.bit(0x400c, bit)
    }

    fn entry(&self, bit: u32) -> bool {
        self.bit(0x4012, bit)
    }

    fn ia32e(&self) -> bool {
        self.entry(9)
    }

    /// A page-aligned address within the physical-address width.
    fn page(&self, field: u32) -> bool {
        let address = self.get(field);
        address & 0xfff == 0 && self.profile.physical(address)
    }

    fn canonical(&self, field: u32) -> bool {
        self.profile.canonical(self.get(field))
    }

    fn reserved(&self, field: u32, caps: u64) -> bool {
        let value = self.get(field);
        let (required, allowed) = (caps & 0xffff_ffff, caps >> 32);
        required & !value != 0 || value & !allowed != 0
    }

    /// The event to inject.
    fn event(&self) -> Option<(u64, u64)> {
        let info = self.get(0x4016);
        (info >> 31 & 1 != 0).then_some((info >> 8 & 7, info & 0xff))
    }
}

/// The checks that fail, in order.
#[derive(Default)]
pub(crate) struct Failed(Vec<Check>);

impl Failed {
    fn when(&mut self, bad: bool, check: Check) {
        if bad && !self.0.contains(&check) {
            self.0.push(check);
        }
    }
}

/// PAT entries, SDM 12.12.4 "Programming the PAT".
fn pat_valid(value: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|t| matches!(t, 0 | 1 | 4..=7))
}

/// EFER bits that exist: SCE, LME, LMA, NXE.
const EFER_BITS: u64 = 0xd01;

/// Result of all checks before the guest runs.
pub(crate) enum Verdict {
    Good,
    /// VM-instruction error.
    Error(u64),
    /// Exit reason and qualification.
    Exit(u64, u64),
}

impl State {
    /// Runs the checks of the current VMCS of `cpu` in the SDM's order.
    pub(crate) fn check_entry(&mut self, profile: &Profile, cpu: usize) -> Verdict {
        let Some(pointer) = self.cpus[cpu].current else {
            return Verdict::Good;
        };
        let Some(vmcs) = self.vmcss.get(&pointer) else {
            return Verdict::Good;
        };
        let view = View {
            profile,
            vmcs,
            cpu: &self.cpus[cpu],
            memory: &self.memory,
            pointer,
        };
        let mut failed = Failed::default();
        controls::check(&view, &mut failed);
        let mut result = (Stage::Controls, Verdict::Error(7));
        if failed.0.is_empty() {
            host::check(&view, &mut failed);
            result = (Stage::HostState, Verdict::Error(8));
        }
        if failed.0.is_empty() {
            guest::check(&view, &mut failed);
            segments::check(&view, &mut failed);
            let qualification = failed.0.first().map_or(0, |check| match check {
                Check::Pdptes => 2,
                Check::BlockingNmiSti => 3,
                Check::LinkPointer => 4,
                _ => 0,
            });
            result = (Stage::GuestState, Verdict::Exit(33, qualification));
        }
        if failed.0.is_empty() {
            return Verdict::Good;
        }
        self.failures.push(EntryFailure {
            stage: result.0,
            checks: failed.0,
            vmcs: pointer,
        });
        result.1
    }
}
