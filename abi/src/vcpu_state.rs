//! Processor state of a vCPU: registers and segments (SET_REGS, GET_REGS) and the FXSAVE image (SET_FPU,
//! GET_FPU).

use bitflags::bitflags;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::assert::assert_layout;

bitflags! {
    /// `ar` of [`SegmentDesc`]: the access-rights format of the VMCS (SDM 25.4.1 "Guest Register State").
    /// The segment type is bits 3:0 and the DPL bits 6:5.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SegmentAccess: u32 {
        /// Descriptor type: 0 system, 1 code or data.
        const DESC = 1 << 4;
        /// Present.
        const PRESENT = 1 << 7;
        /// Available to software.
        const AVAILABLE = 1 << 12;
        /// 64-bit code segment.
        const LONG_MODE = 1 << 13;
        /// Default operation size: 0 16-bit, 1 32-bit.
        const OPERAND_SIZE = 1 << 14;
        /// Limit in pages.
        const GRANULARITY = 1 << 15;
        /// Unusable.
        const NULL = 1 << 16;
    }

    /// `raw` of [`InterruptibilityState`] (SDM 25.4.2 "Guest Non-Register State").
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Interruptibility: u32 {
        /// Blocking by STI.
        const STI_BLOCKING = 1 << 0;
        /// Blocking by MOV SS.
        const MOVSS_BLOCKING = 1 << 1;
        /// Blocking by SMI.
        const SMI_BLOCKING = 1 << 2;
        /// Blocking by NMI.
        const NMI_BLOCKING = 1 << 3;
    }
}

/// Segment type in `ar`.
pub const SEGMENT_TYPE_MASK: u32 = 0xf;
/// DPL in `ar`.
pub const SEGMENT_DPL_MASK: u32 = 3 << SEGMENT_DPL_SHIFT;
/// Lowest bit of the DPL in `ar`.
pub const SEGMENT_DPL_SHIFT: u32 = 5;

/// A segment register, or with `limit` and `base` only, GDTR or IDTR.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SegmentDesc {
    /// Selector.
    pub selector: u16,
    /// Ignored.
    pub dummy: u16,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Linear base.
    pub base: u64,
    /// Access rights: [`SegmentAccess`].
    pub ar: u32,
    /// Ignored.
    pub ipad: u32,
}

assert_layout! { SegmentDesc, size 24, align 8;
selector 0..2, dummy 2..4, limit 4..8, base 8..16, ar 16..20, ipad 20..24 }

/// Interruptibility, padded to 8 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct InterruptibilityState {
    /// [`Interruptibility`].
    pub raw: u32,
    /// The upper half of HAXM's union, which its 64-bit member `pad` covers too.
    pub high: u32,
}

assert_layout! { InterruptibilityState, size 8, align 4;
raw 0..4, high 4..8 }

/// Argument of SET_REGS and GET_REGS.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
#[allow(missing_docs, reason = "each field is the register it is named after")]
pub struct VcpuState {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cs: SegmentDesc,
    pub ss: SegmentDesc,
    pub ds: SegmentDesc,
    pub es: SegmentDesc,
    pub fs: SegmentDesc,
    pub gs: SegmentDesc,
    pub ldt: SegmentDesc,
    pub tr: SegmentDesc,
    pub gdt: SegmentDesc,
    pub idt: SegmentDesc,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub dr0: u64,
    pub dr1: u64,
    pub dr2: u64,
    pub dr3: u64,
    pub dr6: u64,
    pub dr7: u64,
    /// No register: HAXM never uses it.
    pub pde: u64,
    /// Low half of IA32_EFER.
    pub efer: u32,
    pub sysenter_cs: u32,
    pub sysenter_eip: u64,
    pub sysenter_esp: u64,
    /// VMCS activity state (SDM 25.4.2): 0 active, 1 HLT, 2 shutdown, 3 wait for SIPI.
    pub activity_state: u32,
    /// Ignored.
    pub pad: u32,
    pub interruptibility_state: InterruptibilityState,
}

assert_layout! { VcpuState, size 512, align 8;
rax 0..8, rcx 8..16, rdx 16..24, rbx 24..32, rsp 32..40, rbp 40..48, rsi 48..56, rdi 56..64,
r8 64..72, r9 72..80, r10 80..88, r11 88..96, r12 96..104, r13 104..112, r14 112..120, r15 120..128,
rip 128..136, rflags 136..144,
cs 144..168, ss 168..192, ds 192..216, es 216..240, fs 240..264, gs 264..288,
ldt 288..312, tr 312..336, gdt 336..360, idt 360..384,
cr0 384..392, cr2 392..400, cr3 400..408, cr4 408..416,
dr0 416..424, dr1 424..432, dr2 432..440, dr3 440..448, dr6 448..456, dr7 456..464, pde 464..472,
efer 472..476, sysenter_cs 476..480, sysenter_eip 480..488, sysenter_esp 488..496,
activity_state 496..500, pad 500..504, interruptibility_state 504..512 }

impl VcpuState {
    /// The general registers by their encoding in an instruction: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI,
    /// R8–R15.
    #[must_use]
    pub const fn regs(&self) -> [u64; 16] {
        [
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
            self.r8, self.r9, self.r10, self.r11, self.r12, self.r13, self.r14, self.r15,
        ]
    }

    /// Sets the general registers, in the order of [`VcpuState::regs`].
    pub const fn set_regs(&mut self, regs: [u64; 16]) {
        [
            self.rax, self.rcx, self.rdx, self.rbx, self.rsp, self.rbp, self.rsi, self.rdi,
            self.r8, self.r9, self.r10, self.r11, self.r12, self.r13, self.r14, self.r15,
        ] = regs;
    }
}

/// Argument of SET_FPU and GET_FPU: the FXSAVE image in its 64-bit form (SDM volume 1, 10.5.1 "FXSAVE
/// Area"). HAXM aligns it to 16 bytes, QEMU's copy of the header to 8; the caller's buffer may be aligned
/// to either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(16))]
pub struct FxLayout {
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// Abridged x87 tag word.
    pub ftw: u8,
    /// Reserved.
    pub res1: u8,
    /// Last x87 opcode.
    pub fop: u16,
    /// Last x87 instruction pointer (32-bit form: offset, selector, reserved).
    pub fpu_ip: u64,
    /// Last x87 data pointer (32-bit form: offset, selector, reserved).
    pub fpu_dp: u64,
    /// MXCSR.
    pub mxcsr: u32,
    /// Bits of MXCSR that may be set.
    pub mxcsr_mask: u32,
    /// ST0–ST7, ten bytes each and six of padding.
    pub st_mm: [[u8; 16]; 8],
    /// XMM0–XMM7.
    pub mmx_1: [[u8; 16]; 8],
    /// XMM8–XMM15.
    pub mmx_2: [[u8; 16]; 8],
    /// Reserved and software-available bytes.
    pub pad: [u8; 96],
}

assert_layout! { FxLayout, size 512, align 16;
fcw 0..2, fsw 2..4, ftw 4..5, res1 5..6, fop 6..8, fpu_ip 8..16, fpu_dp 16..24,
mxcsr 24..28, mxcsr_mask 28..32, st_mm 32..160, mmx_1 160..288, mmx_2 288..416, pad 416..512 }

impl Default for FxLayout {
    fn default() -> Self {
        Self::new_zeroed()
    }
}
