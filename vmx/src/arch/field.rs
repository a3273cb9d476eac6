//! VMCS fields: encodings that know their width and whether they can be written.
//!
//! SDM appendix B "Field Encoding in VMCS"; SDM 25.11.2 "VMREAD, VMWRITE, and
//! Encodings of VMCS Fields": bits 14:13 of an encoding are the width, bits
//! 11:10 the type (1 = VM-exit information, read-only unless the processor
//! says otherwise).

use core::marker::PhantomData;
use x86::vmx::vmcs::{control, guest, host, ro};

/// A width of VMCS field. `Value` is what VMREAD of it yields.
pub trait Width: Copy {
    /// The unsigned integer that holds the field.
    type Value: Copy + Into<u64>;
    /// Bits 14:13 of the encoding.
    const CODE: u32;
    /// Cuts what VMREAD returned to the field's width.
    fn truncate(raw: u64) -> Self::Value;
}

/// Marks a natural-width field: 64 bits on every processor we run on.
#[derive(Clone, Copy, Debug)]
pub struct Natural;

macro_rules! width {
    ($marker:ty, $value:ty, $code:expr) => {
        impl Width for $marker {
            type Value = $value;
            const CODE: u32 = $code;
            #[allow(clippy::cast_possible_truncation)]
            fn truncate(raw: u64) -> $value {
                raw as $value
            }
        }
    };
}
width!(u16, u16, 0);
width!(u64, u64, 1);
width!(u32, u32, 2);
width!(Natural, u64, 3);

/// A VMCS field that can be read and written.
#[derive(Clone, Copy, Debug)]
pub struct Field<W: Width>(u32, PhantomData<W>);

/// A VM-exit information field: it can only be read.
#[derive(Clone, Copy, Debug)]
pub struct RoField<W: Width>(u32, PhantomData<W>);

const fn width_code(encoding: u32) -> u32 {
    (encoding >> 13) & 3
}

const fn type_code(encoding: u32) -> u32 {
    (encoding >> 10) & 3
}

impl<W: Width> Field<W> {
    /// A field from its encoding. Used in constants, where a wrong width or a
    /// read-only field stops the build.
    #[must_use]
    pub const fn new(encoding: u32) -> Self {
        assert!(width_code(encoding) == W::CODE, "field of another width");
        assert!(type_code(encoding) != 1, "read-only field");
        Self(encoding, PhantomData)
    }

    /// The encoding that VMREAD and VMWRITE take.
    #[must_use]
    pub const fn encoding(self) -> u32 {
        self.0
    }
}

impl<W: Width> RoField<W> {
    /// A read-only field from its encoding; see [`Field::new`].
    #[must_use]
    pub const fn new(encoding: u32) -> Self {
        assert!(width_code(encoding) == W::CODE, "field of another width");
        assert!(type_code(encoding) == 1, "field can be written");
        Self(encoding, PhantomData)
    }

    /// The encoding that VMREAD takes.
    #[must_use]
    pub const fn encoding(self) -> u32 {
        self.0
    }
}

/// A field that VMREAD can read: every [`Field`] and every [`RoField`].
pub trait Readable {
    /// Its width.
    type Width: Width;
    /// Its encoding.
    fn encoding(self) -> u32;
}

impl<W: Width> Readable for Field<W> {
    type Width = W;
    fn encoding(self) -> u32 {
        self.0
    }
}

impl<W: Width> Readable for RoField<W> {
    type Width = W;
    fn encoding(self) -> u32 {
        self.0
    }
}

macro_rules! fields {
    ($($kind:ident $name:ident: $width:ty = $encoding:expr;)*) => {
        $(
            #[doc = concat!("VMCS field ", stringify!($name), ", SDM appendix B.")]
            pub const $name: $kind<$width> = $kind::new($encoding);
        )*
        /// Every field named here: encoding and name, for logs and for the simulator.
        pub const ALL: &[(u32, &str)] = &[$(($encoding, stringify!($name))),*];
    };
}

fields! {
    Field VPID: u16 = control::VPID;
    Field GUEST_ES_SELECTOR: u16 = guest::ES_SELECTOR;
    Field GUEST_CS_SELECTOR: u16 = guest::CS_SELECTOR;
    Field GUEST_SS_SELECTOR: u16 = guest::SS_SELECTOR;
    Field GUEST_DS_SELECTOR: u16 = guest::DS_SELECTOR;
    Field GUEST_FS_SELECTOR: u16 = guest::FS_SELECTOR;
    Field GUEST_GS_SELECTOR: u16 = guest::GS_SELECTOR;
    Field GUEST_LDTR_SELECTOR: u16 = guest::LDTR_SELECTOR;
    Field GUEST_TR_SELECTOR: u16 = guest::TR_SELECTOR;
    Field HOST_ES_SELECTOR: u16 = host::ES_SELECTOR;
    Field HOST_CS_SELECTOR: u16 = host::CS_SELECTOR;
    Field HOST_SS_SELECTOR: u16 = host::SS_SELECTOR;
    Field HOST_DS_SELECTOR: u16 = host::DS_SELECTOR;
    Field HOST_FS_SELECTOR: u16 = host::FS_SELECTOR;
    Field HOST_GS_SELECTOR: u16 = host::GS_SELECTOR;
    Field HOST_TR_SELECTOR: u16 = host::TR_SELECTOR;

    Field IO_BITMAP_A: u64 = control::IO_BITMAP_A_ADDR_FULL;
    Field IO_BITMAP_B: u64 = control::IO_BITMAP_B_ADDR_FULL;
    Field MSR_BITMAPS: u64 = control::MSR_BITMAPS_ADDR_FULL;
    Field EXIT_MSR_STORE_ADDRESS: u64 = control::VMEXIT_MSR_STORE_ADDR_FULL;
    Field EXIT_MSR_LOAD_ADDRESS: u64 = control::VMEXIT_MSR_LOAD_ADDR_FULL;
    Field ENTRY_MSR_LOAD_ADDRESS: u64 = control::VMENTRY_MSR_LOAD_ADDR_FULL;
    Field TSC_OFFSET: u64 = control::TSC_OFFSET_FULL;
    Field VIRTUAL_APIC_ADDRESS: u64 = control::VIRT_APIC_ADDR_FULL;
    Field EPT_POINTER: u64 = control::EPTP_FULL;
    Field XSS_EXITING_BITMAP: u64 = control::XSS_EXITING_BITMAP_FULL;
    RoField GUEST_PHYSICAL_ADDRESS: u64 = ro::GUEST_PHYSICAL_ADDR_FULL;
    Field VMCS_LINK_POINTER: u64 = guest::LINK_PTR_FULL;
    Field GUEST_DEBUGCTL: u64 = guest::IA32_DEBUGCTL_FULL;
    Field GUEST_PAT: u64 = guest::IA32_PAT_FULL;
    Field GUEST_EFER: u64 = guest::IA32_EFER_FULL;
    Field GUEST_PERF_GLOBAL_CTRL: u64 = guest::IA32_PERF_GLOBAL_CTRL_FULL;
    Field GUEST_PDPTE0: u64 = guest::PDPTE0_FULL;
    Field GUEST_PDPTE1: u64 = guest::PDPTE1_FULL;
    Field GUEST_PDPTE2: u64 = guest::PDPTE2_FULL;
    Field GUEST_PDPTE3: u64 = guest::PDPTE3_FULL;
    Field HOST_PAT: u64 = host::IA32_PAT_FULL;
    Field HOST_EFER: u64 = host::IA32_EFER_FULL;
    Field HOST_PERF_GLOBAL_CTRL: u64 = host::IA32_PERF_GLOBAL_CTRL_FULL;

    Field PIN_CONTROLS: u32 = control::PINBASED_EXEC_CONTROLS;
    Field PRIMARY_CONTROLS: u32 = control::PRIMARY_PROCBASED_EXEC_CONTROLS;
    Field EXCEPTION_BITMAP: u32 = control::EXCEPTION_BITMAP;
    Field PAGE_FAULT_ERROR_MASK: u32 = control::PAGE_FAULT_ERR_CODE_MASK;
    Field PAGE_FAULT_ERROR_MATCH: u32 = control::PAGE_FAULT_ERR_CODE_MATCH;
    Field CR3_TARGET_COUNT: u32 = control::CR3_TARGET_COUNT;
    Field EXIT_CONTROLS: u32 = control::VMEXIT_CONTROLS;
    Field EXIT_MSR_STORE_COUNT: u32 = control::VMEXIT_MSR_STORE_COUNT;
    Field EXIT_MSR_LOAD_COUNT: u32 = control::VMEXIT_MSR_LOAD_COUNT;
    Field ENTRY_CONTROLS: u32 = control::VMENTRY_CONTROLS;
    Field ENTRY_MSR_LOAD_COUNT: u32 = control::VMENTRY_MSR_LOAD_COUNT;
    Field ENTRY_INTERRUPTION_INFO: u32 = control::VMENTRY_INTERRUPTION_INFO_FIELD;
    Field ENTRY_ERROR_CODE: u32 = control::VMENTRY_EXCEPTION_ERR_CODE;
    Field ENTRY_INSTRUCTION_LENGTH: u32 = control::VMENTRY_INSTRUCTION_LEN;
    Field TPR_THRESHOLD: u32 = control::TPR_THRESHOLD;
    Field SECONDARY_CONTROLS: u32 = control::SECONDARY_PROCBASED_EXEC_CONTROLS;
    Field PLE_GAP: u32 = control::PLE_GAP;
    Field PLE_WINDOW: u32 = control::PLE_WINDOW;
    RoField INSTRUCTION_ERROR: u32 = ro::VM_INSTRUCTION_ERROR;
    RoField EXIT_REASON: u32 = ro::EXIT_REASON;
    RoField EXIT_INTERRUPTION_INFO: u32 = ro::VMEXIT_INTERRUPTION_INFO;
    RoField EXIT_INTERRUPTION_ERROR: u32 = ro::VMEXIT_INTERRUPTION_ERR_CODE;
    RoField IDT_VECTORING_INFO: u32 = ro::IDT_VECTORING_INFO;
    RoField IDT_VECTORING_ERROR: u32 = ro::IDT_VECTORING_ERR_CODE;
    RoField EXIT_INSTRUCTION_LENGTH: u32 = ro::VMEXIT_INSTRUCTION_LEN;
    RoField EXIT_INSTRUCTION_INFO: u32 = ro::VMEXIT_INSTRUCTION_INFO;
    Field GUEST_ES_LIMIT: u32 = guest::ES_LIMIT;
    Field GUEST_CS_LIMIT: u32 = guest::CS_LIMIT;
    Field GUEST_SS_LIMIT: u32 = guest::SS_LIMIT;
    Field GUEST_DS_LIMIT: u32 = guest::DS_LIMIT;
    Field GUEST_FS_LIMIT: u32 = guest::FS_LIMIT;
    Field GUEST_GS_LIMIT: u32 = guest::GS_LIMIT;
    Field GUEST_LDTR_LIMIT: u32 = guest::LDTR_LIMIT;
    Field GUEST_TR_LIMIT: u32 = guest::TR_LIMIT;
    Field GUEST_GDTR_LIMIT: u32 = guest::GDTR_LIMIT;
    Field GUEST_IDTR_LIMIT: u32 = guest::IDTR_LIMIT;
    Field GUEST_ES_RIGHTS: u32 = guest::ES_ACCESS_RIGHTS;
    Field GUEST_CS_RIGHTS: u32 = guest::CS_ACCESS_RIGHTS;
    Field GUEST_SS_RIGHTS: u32 = guest::SS_ACCESS_RIGHTS;
    Field GUEST_DS_RIGHTS: u32 = guest::DS_ACCESS_RIGHTS;
    Field GUEST_FS_RIGHTS: u32 = guest::FS_ACCESS_RIGHTS;
    Field GUEST_GS_RIGHTS: u32 = guest::GS_ACCESS_RIGHTS;
    Field GUEST_LDTR_RIGHTS: u32 = guest::LDTR_ACCESS_RIGHTS;
    Field GUEST_TR_RIGHTS: u32 = guest::TR_ACCESS_RIGHTS;
    Field GUEST_INTERRUPTIBILITY: u32 = guest::INTERRUPTIBILITY_STATE;
    Field GUEST_ACTIVITY: u32 = guest::ACTIVITY_STATE;
    Field GUEST_SYSENTER_CS: u32 = guest::IA32_SYSENTER_CS;
    Field HOST_SYSENTER_CS: u32 = host::IA32_SYSENTER_CS;

    Field CR0_MASK: Natural = control::CR0_GUEST_HOST_MASK;
    Field CR4_MASK: Natural = control::CR4_GUEST_HOST_MASK;
    Field CR0_SHADOW: Natural = control::CR0_READ_SHADOW;
    Field CR4_SHADOW: Natural = control::CR4_READ_SHADOW;
    RoField EXIT_QUALIFICATION: Natural = ro::EXIT_QUALIFICATION;
    RoField GUEST_LINEAR_ADDRESS: Natural = ro::GUEST_LINEAR_ADDR;
    Field GUEST_CR0: Natural = guest::CR0;
    Field GUEST_CR3: Natural = guest::CR3;
    Field GUEST_CR4: Natural = guest::CR4;
    Field GUEST_ES_BASE: Natural = guest::ES_BASE;
    Field GUEST_CS_BASE: Natural = guest::CS_BASE;
    Field GUEST_SS_BASE: Natural = guest::SS_BASE;
    Field GUEST_DS_BASE: Natural = guest::DS_BASE;
    Field GUEST_FS_BASE: Natural = guest::FS_BASE;
    Field GUEST_GS_BASE: Natural = guest::GS_BASE;
    Field GUEST_LDTR_BASE: Natural = guest::LDTR_BASE;
    Field GUEST_TR_BASE: Natural = guest::TR_BASE;
    Field GUEST_GDTR_BASE: Natural = guest::GDTR_BASE;
    Field GUEST_IDTR_BASE: Natural = guest::IDTR_BASE;
    Field GUEST_DR7: Natural = guest::DR7;
    Field GUEST_RSP: Natural = guest::RSP;
    Field GUEST_RIP: Natural = guest::RIP;
    Field GUEST_RFLAGS: Natural = guest::RFLAGS;
    Field GUEST_PENDING_DEBUG: Natural = guest::PENDING_DBG_EXCEPTIONS;
    Field GUEST_SYSENTER_ESP: Natural = guest::IA32_SYSENTER_ESP;
    Field GUEST_SYSENTER_EIP: Natural = guest::IA32_SYSENTER_EIP;
    Field HOST_CR0: Natural = host::CR0;
    Field HOST_CR3: Natural = host::CR3;
    Field HOST_CR4: Natural = host::CR4;
    Field HOST_FS_BASE: Natural = host::FS_BASE;
    Field HOST_GS_BASE: Natural = host::GS_BASE;
    Field HOST_TR_BASE: Natural = host::TR_BASE;
    Field HOST_GDTR_BASE: Natural = host::GDTR_BASE;
    Field HOST_IDTR_BASE: Natural = host::IDTR_BASE;
    Field HOST_SYSENTER_ESP: Natural = host::IA32_SYSENTER_ESP;
    Field HOST_SYSENTER_EIP: Natural = host::IA32_SYSENTER_EIP;
    Field HOST_RSP: Natural = host::RSP;
    Field HOST_RIP: Natural = host::RIP;
}

/// The name of a field for logs; `"?"` if it is not one of ours.
#[must_use]
pub fn name(encoding: u32) -> &'static str {
    ALL.iter()
        .find(|(code, _)| *code == encoding)
        .map_or("?", |(_, name)| name)
}
