//! The page a vCPU and its client share, and the I/O buffer beside it.
//!
//! Both sides write to them at any time, so neither may hold a Rust reference to them. [`offset`] and
//! [`fastmmio_offset`] give the place of each field for single volatile accesses; the structures are for copies.
//!
//! HAXM's union in the middle of the tunnel is [`Tunnel::view`]: 24 bytes that mean [`TunnelIo`],
//! [`TunnelPageFault`] or [`TunnelDebug`], by [`ExitStatus`].

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::assert::assert_layout;

/// Bytes of the tunnel: a whole page.
pub const TUNNEL_SIZE: u16 = 4096;
/// Bytes of the I/O buffer a client may rely on, and so the most one IO exit moves.
pub const IO_BUFFER_SIZE: usize = 64;
/// What a client writes to `exit_reason` before RUN to have pending I/O completed and come back with
/// [`ExitStatus::Paused`], without entering the guest.
pub const EXIT_REASON_PAUSE: u32 = 8;
/// The bit of `user_event_pending` a client sets; the driver clears it when it has seen it.
pub const USER_EVENT_PENDING: u32 = 1;

/// Argument of SETUP_TUNNEL: where the shared pages are, in the address space of the process that created
/// the vCPU.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TunnelInfo {
    /// Address of the tunnel.
    pub va: u64,
    /// Address of the I/O buffer.
    pub io_va: u64,
    /// Bytes of the tunnel: [`TUNNEL_SIZE`].
    pub size: u16,
    /// 0.
    pub pad: [u16; 3],
}

assert_layout! { TunnelInfo, size 24, align 8;
va 0..8, io_va 8..16, size 16..18, pad 18..24 }

/// `exit_status` of the tunnel: why RUN came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ExitStatus {
    /// Port I/O: see [`TunnelIo`]; the data is in the I/O buffer.
    Io = 1,
    /// MMIO by linear address. Never produced; [`ExitStatus::FastMmio`] took its place.
    Mmio = 2,
    /// Real mode on a processor without unrestricted guest.
    RealMode = 3,
    /// A host interrupt, a user event, or the interrupt window the client asked for.
    Interrupt = 4,
    /// VM entry failed.
    Unknown = 5,
    /// HLT with no interrupt to deliver.
    Hlt = 6,
    /// The vCPU cannot go on. It stays so.
    StateChange = 7,
    /// The client asked for it by [`EXIT_REASON_PAUSE`].
    Paused = 8,
    /// MMIO: see [`FastMmio`] in the I/O buffer.
    FastMmio = 9,
    /// Access to a range PROTECT_RAM closed: see [`TunnelPageFault`].
    PageFault = 10,
    /// #DB or #BP that VCPU_DEBUG asked for: see [`TunnelDebug`].
    Debug = 11,
}

impl ExitStatus {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::Io,
        Self::Mmio,
        Self::RealMode,
        Self::Interrupt,
        Self::Unknown,
        Self::Hlt,
        Self::StateChange,
        Self::Paused,
        Self::FastMmio,
        Self::PageFault,
        Self::Debug,
    ];

    /// The number in the tunnel.
    #[must_use]
    pub const fn raw(self) -> u32 {
        self as u32
    }

    /// The status a number of the tunnel means, if it means one.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Option<Self> {
        Some(match raw {
            1 => Self::Io,
            2 => Self::Mmio,
            3 => Self::RealMode,
            4 => Self::Interrupt,
            5 => Self::Unknown,
            6 => Self::Hlt,
            7 => Self::StateChange,
            8 => Self::Paused,
            9 => Self::FastMmio,
            10 => Self::PageFault,
            11 => Self::Debug,
            _ => return None,
        })
    }

    /// HAXM's C name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Io => "HAX_EXIT_IO",
            Self::Mmio => "HAX_EXIT_MMIO",
            Self::RealMode => "HAX_EXIT_REALMODE",
            Self::Interrupt => "HAX_EXIT_INTERRUPT",
            Self::Unknown => "HAX_EXIT_UNKNOWN",
            Self::Hlt => "HAX_EXIT_HLT",
            Self::StateChange => "HAX_EXIT_STATECHANGE",
            Self::Paused => "HAX_EXIT_PAUSED",
            Self::FastMmio => "HAX_EXIT_FAST_MMIO",
            Self::PageFault => "HAX_EXIT_PAGEFAULT",
            Self::Debug => "HAX_EXIT_DEBUG",
        }
    }
}

/// The tunnel.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Tunnel {
    /// Driver: VMX basic exit reason. Client: [`EXIT_REASON_PAUSE`] asks for a pause.
    pub exit_reason: u32,
    /// Ignored.
    pub pad0: u32,
    /// [`ExitStatus`]. The client must leave it alone.
    pub exit_status: u32,
    /// Client sets [`USER_EVENT_PENDING`]; the driver tests and clears it and comes back with INTERRUPT.
    pub user_event_pending: u32,
    /// Driver: 1 if an interrupt queued now can be delivered at once.
    pub ready_for_interrupt_injection: u32,
    /// Client: non-zero asks for an INTERRUPT exit when the guest can take an interrupt.
    pub request_interrupt_window: u32,
    /// The union, as bytes: read it with [`Tunnel::io`], [`Tunnel::pagefault`] or [`Tunnel::debug`].
    pub view: [u8; 24],
    /// Driver, after each RUN: IA32_APIC_BASE. QEMU's copy of the structure ends before it.
    pub apic_base: u64,
}

assert_layout! { Tunnel, size 56, align 8;
exit_reason 0..4, pad0 4..8, exit_status 8..12, user_event_pending 12..16,
ready_for_interrupt_injection 16..20, request_interrupt_window 20..24, view 24..48, apic_base 48..56 }

impl Tunnel {
    /// The union as an IO exit fills it.
    #[must_use]
    pub fn io(&self) -> TunnelIo {
        zerocopy::transmute!(self.view)
    }

    /// The union as a PAGEFAULT exit fills it.
    #[must_use]
    pub fn pagefault(&self) -> TunnelPageFault {
        zerocopy::transmute!(self.view)
    }

    /// The union as a DEBUG exit fills it.
    #[must_use]
    pub fn debug(&self) -> TunnelDebug {
        zerocopy::transmute!(self.view)
    }

    /// [`ExitStatus`] of `exit_status`, if it is one.
    #[must_use]
    pub const fn status(&self) -> Option<ExitStatus> {
        ExitStatus::from_raw(self.exit_status)
    }
}

/// Direction of port I/O, in [`TunnelIo::direction`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum IoDirection {
    /// From the guest.
    Out = 0,
    /// To the guest.
    In = 1,
}

bitflags! {
    /// `flags` of [`TunnelIo`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IoFlags: u8 {
        /// A string instruction (INS, OUTS). HAXM's own comment calls it bit 1, its code uses the value 1.
        const STRING = 1 << 0;
    }

    /// `flags` of [`TunnelPageFault`], as HAXM's header names the bits. HAXM itself stores bits 5:0 of the
    /// exit qualification (SDM 28.2.1 "Basic VM-Exit Information"), so its PERM bits lie one lower; both
    /// agree that they are clear, because a protected page allows nothing.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PageFaultFlags: u32 {
        /// The access was a read.
        const ACC_R = 1 << 0;
        /// The access was a write.
        const ACC_W = 1 << 1;
        /// The access was an instruction fetch.
        const ACC_X = 1 << 2;
        /// Reads were allowed.
        const PERM_R = 1 << 4;
        /// Writes were allowed.
        const PERM_W = 1 << 5;
        /// Instruction fetches were allowed.
        const PERM_X = 1 << 6;
    }
}

/// The union of the tunnel after [`ExitStatus::Io`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TunnelIo {
    /// [`IoDirection`].
    pub direction: u8,
    /// 1 if a string instruction runs downwards.
    pub df: u8,
    /// Bytes of one element: 1, 2 or 4.
    pub size: u16,
    /// Port.
    pub port: u16,
    /// Elements: 1 unless it is a string instruction; `size * count` is at most [`IO_BUFFER_SIZE`].
    pub count: u16,
    /// [`IoFlags`]. The driver's own.
    pub flags: u8,
    /// Ignored.
    pub pad0: u8,
    /// Ignored.
    pub pad1: u16,
    /// Ignored.
    pub pad2: u32,
    /// Guest linear address of a string instruction. The driver's own.
    pub vaddr: u64,
}

assert_layout! { TunnelIo, size 24, align 8;
direction 0..1, df 1..2, size 2..4, port 4..6, count 6..8, flags 8..9, pad0 9..10, pad1 10..12,
pad2 12..16, vaddr 16..24 }

/// The union of the tunnel after [`ExitStatus::Mmio`], which is never produced.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TunnelMmio {
    /// Guest linear address.
    pub gla: u64,
}

assert_layout! { TunnelMmio, size 8, align 8; gla 0..8 }

/// The union of the tunnel after [`ExitStatus::PageFault`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TunnelPageFault {
    /// First protected page of the 2 MB group that was touched.
    pub gpa: u64,
    /// [`PageFaultFlags`].
    pub flags: u32,
    /// 0.
    pub reserved1: u32,
    /// 0.
    pub reserved2: u64,
}

assert_layout! { TunnelPageFault, size 24, align 8;
gpa 0..8, flags 8..12, reserved1 12..16, reserved2 16..24 }

/// A view of the union nothing uses.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TunnelState {
    /// Unused.
    pub dummy: u64,
}

assert_layout! { TunnelState, size 8, align 8; dummy 0..8 }

/// The union of the tunnel after [`ExitStatus::Debug`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct TunnelDebug {
    /// RIP at the exception.
    pub rip: u64,
    /// What a #DB would have put in DR6; 0 for #BP.
    pub dr6: u64,
    /// DR7 in force at #DB, which is the debugger's own; 0 for #BP.
    pub dr7: u64,
}

assert_layout! { TunnelDebug, size 24, align 8;
rip 0..8, dr6 8..16, dr7 16..24 }

/// Direction of an MMIO access, in [`FastMmio::direction`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FastMmioDirection {
    /// The guest reads: the client puts the value into `value`.
    Read = 0,
    /// The guest writes `value`.
    Write = 1,
    /// Copy `size` bytes from `gpa` to the address in `value`. API version 4 clients know it; HAXM no
    /// longer produces it.
    Copy = 2,
}

/// At the start of the I/O buffer after [`ExitStatus::FastMmio`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct FastMmio {
    /// Guest-physical address.
    pub gpa: u64,
    /// Value read or written; HAXM's union names it `gpa2` for [`FastMmioDirection::Copy`].
    pub value: u64,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// [`FastMmioDirection`].
    pub direction: u8,
    /// Obsolete.
    pub reg_index: u16,
    /// Ignored.
    pub pad0: u32,
    /// No longer filled.
    pub cr0: u64,
    /// No longer filled.
    pub cr2: u64,
    /// No longer filled.
    pub cr3: u64,
    /// No longer filled.
    pub cr4: u64,
}

assert_layout! { FastMmio, size 56, align 8;
gpa 0..8, value 8..16, size 16..17, direction 17..18, reg_index 18..20, pad0 20..24,
cr0 24..32, cr2 32..40, cr3 40..48, cr4 48..56 }

/// Byte offsets in the tunnel page; the width of each field is that of the field of [`Tunnel`] or of the
/// view named.
pub mod offset {
    use super::{Tunnel, TunnelDebug, TunnelIo, TunnelPageFault};
    use memoffset::offset_of;

    /// [`Tunnel::exit_reason`], u32.
    pub const EXIT_REASON: usize = offset_of!(Tunnel, exit_reason);
    /// [`Tunnel::exit_status`], u32.
    pub const EXIT_STATUS: usize = offset_of!(Tunnel, exit_status);
    /// [`Tunnel::user_event_pending`], u32.
    pub const USER_EVENT_PENDING: usize = offset_of!(Tunnel, user_event_pending);
    /// [`Tunnel::ready_for_interrupt_injection`], u32.
    pub const READY_FOR_INTERRUPT_INJECTION: usize =
        offset_of!(Tunnel, ready_for_interrupt_injection);
    /// [`Tunnel::request_interrupt_window`], u32.
    pub const REQUEST_INTERRUPT_WINDOW: usize = offset_of!(Tunnel, request_interrupt_window);
    /// [`Tunnel::view`], 24 bytes.
    pub const VIEW: usize = offset_of!(Tunnel, view);
    /// [`Tunnel::apic_base`], u64.
    pub const APIC_BASE: usize = offset_of!(Tunnel, apic_base);

    /// [`TunnelIo::direction`], u8.
    pub const IO_DIRECTION: usize = VIEW + offset_of!(TunnelIo, direction);
    /// [`TunnelIo::df`], u8.
    pub const IO_DF: usize = VIEW + offset_of!(TunnelIo, df);
    /// [`TunnelIo::size`], u16.
    pub const IO_SIZE: usize = VIEW + offset_of!(TunnelIo, size);
    /// [`TunnelIo::port`], u16.
    pub const IO_PORT: usize = VIEW + offset_of!(TunnelIo, port);
    /// [`TunnelIo::count`], u16.
    pub const IO_COUNT: usize = VIEW + offset_of!(TunnelIo, count);
    /// [`TunnelIo::flags`], u8.
    pub const IO_FLAGS: usize = VIEW + offset_of!(TunnelIo, flags);
    /// [`TunnelIo::vaddr`], u64.
    pub const IO_VADDR: usize = VIEW + offset_of!(TunnelIo, vaddr);

    /// [`TunnelPageFault::gpa`], u64.
    pub const PAGEFAULT_GPA: usize = VIEW + offset_of!(TunnelPageFault, gpa);
    /// [`TunnelPageFault::flags`], u32.
    pub const PAGEFAULT_FLAGS: usize = VIEW + offset_of!(TunnelPageFault, flags);
    /// [`TunnelPageFault::reserved1`], u32.
    pub const PAGEFAULT_RESERVED1: usize = VIEW + offset_of!(TunnelPageFault, reserved1);
    /// [`TunnelPageFault::reserved2`], u64.
    pub const PAGEFAULT_RESERVED2: usize = VIEW + offset_of!(TunnelPageFault, reserved2);

    /// [`TunnelDebug::rip`], u64.
    pub const DEBUG_RIP: usize = VIEW + offset_of!(TunnelDebug, rip);
    /// [`TunnelDebug::dr6`], u64.
    pub const DEBUG_DR6: usize = VIEW + offset_of!(TunnelDebug, dr6);
    /// [`TunnelDebug::dr7`], u64.
    pub const DEBUG_DR7: usize = VIEW + offset_of!(TunnelDebug, dr7);
}

/// Byte offsets in the I/O buffer of the fields of [`FastMmio`] that are used.
pub mod fastmmio_offset {
    use super::FastMmio;
    use memoffset::offset_of;

    /// [`FastMmio::gpa`], u64.
    pub const GPA: usize = offset_of!(FastMmio, gpa);
    /// [`FastMmio::value`], u64.
    pub const VALUE: usize = offset_of!(FastMmio, value);
    /// [`FastMmio::size`], u8.
    pub const SIZE: usize = offset_of!(FastMmio, size);
    /// [`FastMmio::direction`], u8.
    pub const DIRECTION: usize = offset_of!(FastMmio, direction);
}
