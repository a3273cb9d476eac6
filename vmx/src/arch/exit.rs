//! Exit reasons and exit qualifications.
//!
//! SDM appendix C "VMX Basic Exit Reasons"; SDM 28.2.1 "Basic VM-Exit
//! Information", tables 28-3 to 28-7.

/// A basic exit reason: bits 15:0 of the exit-reason field. Numbers this code
/// does not know stay numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct ExitReason(pub u16);

macro_rules! reasons {
    ($($name:ident = $number:expr, $text:expr;)*) => {
        impl ExitReason {
            $(
                #[doc = $text]
                pub const $name: Self = Self($number);
            )*
            /// Every reason that has a name, with its text.
            pub const NAMED: &'static [(Self, &'static str)] = &[$((Self($number), $text)),*];
        }
    };
}

reasons! {
    EXCEPTION_OR_NMI = 0, "exception or NMI";
    EXTERNAL_INTERRUPT = 1, "external interrupt";
    TRIPLE_FAULT = 2, "triple fault";
    INIT = 3, "INIT signal";
    SIPI = 4, "start-up IPI";
    IO_SMI = 5, "I/O SMI";
    OTHER_SMI = 6, "other SMI";
    INTERRUPT_WINDOW = 7, "interrupt window";
    NMI_WINDOW = 8, "NMI window";
    TASK_SWITCH = 9, "task switch";
    CPUID = 10, "CPUID";
    GETSEC = 11, "GETSEC";
    HLT = 12, "HLT";
    INVD = 13, "INVD";
    INVLPG = 14, "INVLPG";
    RDPMC = 15, "RDPMC";
    RDTSC = 16, "RDTSC";
    RSM = 17, "RSM";
    VMCALL = 18, "VMCALL";
    VMCLEAR = 19, "VMCLEAR";
    VMLAUNCH = 20, "VMLAUNCH";
    VMPTRLD = 21, "VMPTRLD";
    VMPTRST = 22, "VMPTRST";
    VMREAD = 23, "VMREAD";
    VMRESUME = 24, "VMRESUME";
    VMWRITE = 25, "VMWRITE";
    VMXOFF = 26, "VMXOFF";
    VMXON = 27, "VMXON";
    CR_ACCESS = 28, "control-register access";
    DR_ACCESS = 29, "debug-register access";
    IO_INSTRUCTION = 30, "I/O instruction";
    RDMSR = 31, "RDMSR";
    WRMSR = 32, "WRMSR";
    INVALID_GUEST_STATE = 33, "VM-entry failure: invalid guest state";
    MSR_LOADING = 34, "VM-entry failure: MSR loading";
    MWAIT = 36, "MWAIT";
    MONITOR_TRAP_FLAG = 37, "monitor trap flag";
    MONITOR = 39, "MONITOR";
    PAUSE = 40, "PAUSE";
    ENTRY_MACHINE_CHECK = 41, "VM-entry failure: machine check";
    TPR_BELOW_THRESHOLD = 43, "TPR below threshold";
    APIC_ACCESS = 44, "APIC access";
    VIRTUALIZED_EOI = 45, "virtualized EOI";
    GDTR_IDTR_ACCESS = 46, "access to GDTR or IDTR";
    LDTR_TR_ACCESS = 47, "access to LDTR or TR";
    EPT_VIOLATION = 48, "EPT violation";
    EPT_MISCONFIGURATION = 49, "EPT misconfiguration";
    INVEPT = 50, "INVEPT";
    RDTSCP = 51, "RDTSCP";
    PREEMPTION_TIMER = 52, "VMX-preemption timer";
    INVVPID = 53, "INVVPID";
    WBINVD = 54, "WBINVD or WBNOINVD";
    XSETBV = 55, "XSETBV";
    APIC_WRITE = 56, "APIC write";
    RDRAND = 57, "RDRAND";
    INVPCID = 58, "INVPCID";
    VMFUNC = 59, "VMFUNC";
    ENCLS = 60, "ENCLS";
    RDSEED = 61, "RDSEED";
    PML_FULL = 62, "page-modification log full";
    XSAVES = 63, "XSAVES";
    XRSTORS = 64, "XRSTORS";
    PCONFIG = 65, "PCONFIG";
    SPP = 66, "SPP-related event";
    UMWAIT = 67, "UMWAIT";
    TPAUSE = 68, "TPAUSE";
    LOADIWKEY = 69, "LOADIWKEY";
    ENCLV = 70, "ENCLV";
    ENQCMD_PASID = 72, "ENQCMD PASID translation failure";
    ENQCMDS_PASID = 73, "ENQCMDS PASID translation failure";
    BUS_LOCK = 74, "bus lock";
    INSTRUCTION_TIMEOUT = 75, "instruction timeout";
    SEAMCALL = 76, "SEAMCALL";
    TDCALL = 77, "TDCALL";
    RDMSRLIST = 78, "RDMSRLIST";
    WRMSRLIST = 79, "WRMSRLIST";
}

impl ExitReason {
    /// One past the largest number that has a name.
    pub const COUNT: usize = 80;
    /// Bit 31 of the exit-reason field: the VM entry failed.
    pub const ENTRY_FAILURE: u32 = 1 << 31;

    /// The basic reason in an exit-reason field.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub const fn from_field(field: u32) -> Self {
        Self(field as u16)
    }

    /// What the SDM calls it; `"unknown"` for a number it does not list.
    #[must_use]
    pub fn text(self) -> &'static str {
        Self::NAMED
            .iter()
            .find(|(reason, _)| *reason == self)
            .map_or("unknown", |(_, text)| text)
    }
}

/// SDM 28.2.1, table 28-5 "Exit Qualification for I/O Instructions".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct IoQualification(pub u64);

impl IoQualification {
    /// Bytes of one access: 1, 2 or 4.
    #[must_use]
    pub const fn size(self) -> u8 {
        match self.0 & 7 {
            0 => 1,
            1 => 2,
            _ => 4,
        }
    }

    /// IN or INS.
    #[must_use]
    pub const fn is_in(self) -> bool {
        self.0 & (1 << 3) != 0
    }

    /// INS or OUTS.
    #[must_use]
    pub const fn is_string(self) -> bool {
        self.0 & (1 << 4) != 0
    }

    /// With a REP prefix.
    #[must_use]
    pub const fn is_rep(self) -> bool {
        self.0 & (1 << 5) != 0
    }

    /// The port.
    #[must_use]
    pub const fn port(self) -> u16 {
        ((self.0 >> 16) & 0xffff) as u16
    }
}

/// What a control-register access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccess {
    /// MOV to a control register.
    Write {
        /// Which control register.
        cr: u8,
        /// The general register that holds the value.
        gpr: u8,
    },
    /// MOV from a control register.
    Read {
        /// Which control register.
        cr: u8,
        /// The general register that takes the value.
        gpr: u8,
    },
    /// CLTS.
    Clts,
    /// LMSW.
    Lmsw {
        /// The operand, bits 15:0.
        source: u16,
    },
}

impl CrAccess {
    /// From the exit qualification, SDM 28.2.1, table 28-3 "Exit Qualification
    /// for Control-Register Accesses".
    #[must_use]
    pub const fn from_qualification(qualification: u64) -> Self {
        let cr = (qualification & 0xf) as u8;
        let gpr = ((qualification >> 8) & 0xf) as u8;
        match (qualification >> 4) & 3 {
            0 => Self::Write { cr, gpr },
            1 => Self::Read { cr, gpr },
            2 => Self::Clts,
            _ => Self::Lmsw {
                source: ((qualification >> 16) & 0xffff) as u16,
            },
        }
    }
}

/// SDM 28.2.1, table 28-4 "Exit Qualification for MOV DR".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct DrQualification(pub u64);

impl DrQualification {
    /// Which debug register, 0 to 7.
    #[must_use]
    pub const fn dr(self) -> u8 {
        (self.0 & 7) as u8
    }

    /// MOV from the debug register.
    #[must_use]
    pub const fn is_read(self) -> bool {
        self.0 & (1 << 4) != 0
    }

    /// The general register.
    #[must_use]
    pub const fn gpr(self) -> u8 {
        ((self.0 >> 8) & 0xf) as u8
    }
}

/// SDM 28.2.1, table 28-7 "Exit Qualification for EPT Violations".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct EptQualification(pub u64);

impl EptQualification {
    /// The access was a data read.
    #[must_use]
    pub const fn is_read(self) -> bool {
        self.0 & 1 != 0
    }

    /// The access was a data write.
    #[must_use]
    pub const fn is_write(self) -> bool {
        self.0 & 2 != 0
    }

    /// The access was an instruction fetch.
    #[must_use]
    pub const fn is_fetch(self) -> bool {
        self.0 & 4 != 0
    }

    /// The guest-linear address is valid, and the guest-physical address is its
    /// translation rather than that of a paging-structure entry: bits 7 and 8.
    #[must_use]
    pub const fn is_operand(self) -> bool {
        self.0 & 0x180 == 0x180
    }
}
