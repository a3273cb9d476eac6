//! Exception vectors, error codes and the interruption-information word.

use bitflags::bitflags;

/// Exception vectors, SDM 6.3.1 "External Interrupts", table 6-1.
pub mod vector {
    /// Divide error.
    pub const DE: u8 = 0;
    /// Debug.
    pub const DB: u8 = 1;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// Breakpoint (INT3).
    pub const BP: u8 = 3;
    /// Overflow (INTO).
    pub const OF: u8 = 4;
    /// BOUND range exceeded.
    pub const BR: u8 = 5;
    /// Invalid opcode.
    pub const UD: u8 = 6;
    /// Device not available.
    pub const NM: u8 = 7;
    /// Double fault.
    pub const DF: u8 = 8;
    /// Invalid TSS.
    pub const TS: u8 = 10;
    /// Segment not present.
    pub const NP: u8 = 11;
    /// Stack-segment fault.
    pub const SS: u8 = 12;
    /// General protection.
    pub const GP: u8 = 13;
    /// Page fault.
    pub const PF: u8 = 14;
    /// Alignment check.
    pub const AC: u8 = 17;
    /// Machine check.
    pub const MC: u8 = 18;
}

bitflags! {
    /// Page-fault error code, SDM 4.7 "Page-Fault Exceptions".
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PageFault: u32 {
        /// The translation was present.
        const PRESENT = 1 << 0;
        /// The access was a write.
        const WRITE = 1 << 1;
        /// The access was a user-mode access.
        const USER = 1 << 2;
        /// A reserved bit was set in a paging entry.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch.
        const FETCH = 1 << 4;
        /// A protection key forbade it.
        const PROTECTION_KEY = 1 << 5;
        const _ = !0;
    }
}

/// The kind of event in an interruption-information word,
/// SDM 25.8.3 "VM-Entry Controls for Event Injection", table 25-17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// External interrupt.
    Interrupt = 0,
    /// Non-maskable interrupt.
    Nmi = 2,
    /// Hardware exception.
    Exception = 3,
    /// INT n.
    SoftwareInterrupt = 4,
    /// INT1.
    PrivilegedSoftwareException = 5,
    /// INT3 or INTO.
    SoftwareException = 6,
    /// Reserved or "other event".
    Other = 7,
}

/// An interruption-information word, as in the VM-exit interruption
/// information, the IDT-vectoring information and the VM-entry interruption
/// information. SDM 25.9.2 "Information for VM Exits Due to Vectored Events".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct InterruptionInfo(pub u32);

impl InterruptionInfo {
    /// Bit 31.
    pub const VALID: u32 = 1 << 31;
    /// Bit 11: the event delivers an error code.
    pub const ERROR_CODE: u32 = 1 << 11;

    /// A valid word for an event.
    #[must_use]
    pub const fn new(kind: EventKind, vector: u8, has_error_code: bool) -> Self {
        let code = if has_error_code { Self::ERROR_CODE } else { 0 };
        Self(Self::VALID | code | ((kind as u32) << 8) | vector as u32)
    }

    /// Whether the word describes an event at all.
    #[must_use]
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// Bits 7:0.
    #[must_use]
    pub const fn vector(self) -> u8 {
        (self.0 & 0xff) as u8
    }

    /// Bits 10:8.
    #[must_use]
    pub const fn kind(self) -> EventKind {
        match (self.0 >> 8) & 7 {
            0 => EventKind::Interrupt,
            2 => EventKind::Nmi,
            3 => EventKind::Exception,
            4 => EventKind::SoftwareInterrupt,
            5 => EventKind::PrivilegedSoftwareException,
            6 => EventKind::SoftwareException,
            _ => EventKind::Other,
        }
    }

    /// Whether an error code goes with it.
    #[must_use]
    pub const fn has_error_code(self) -> bool {
        self.0 & Self::ERROR_CODE != 0
    }
}

/// An exception to be delivered to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The vector, one of [`vector`].
    pub vector: u8,
    /// The error code, for the vectors that have one.
    pub error_code: Option<u32>,
    /// The faulting linear address, for #PF.
    pub cr2: Option<u64>,
}

impl Exception {
    /// #UD.
    pub const UD: Self = Self::plain(vector::UD);

    /// An exception without an error code.
    #[must_use]
    pub const fn plain(vector: u8) -> Self {
        Self {
            vector,
            error_code: None,
            cr2: None,
        }
    }

    /// An exception with an error code.
    #[must_use]
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self {
            vector,
            error_code: Some(code),
            cr2: None,
        }
    }

    /// #GP with this error code.
    #[must_use]
    pub const fn gp(code: u32) -> Self {
        Self::with_code(vector::GP, code)
    }

    /// #PF at a linear address.
    #[must_use]
    pub const fn page_fault(address: u64, code: PageFault) -> Self {
        Self {
            vector: vector::PF,
            error_code: Some(code.bits()),
            cr2: Some(address),
        }
    }
}
