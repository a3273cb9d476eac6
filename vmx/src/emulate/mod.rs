//! The instruction emulator: executes one guest instruction that touched
//! memory-mapped I/O, or that moves a string to or from a port.
//!
//! Hardware stops such an instruction before it has changed anything, so the
//! hypervisor must carry it out itself. This module decodes the bytes
//! ([`decode`]) and executes the result ([`execute`]) on a [`Machine`], which
//! lends the registers, the guest's page tables and its RAM. It depends on
//! nothing else in the crate, allocates nothing and never loops without bound.
//!
//! # How the caller drives it
//!
//! 1. Fetch the bytes at CS:RIP and call [`decode`]. [`DecodeError::TooShort`]
//!    asks for more bytes (an instruction has at most [`MAX_INSN_LEN`]); the
//!    caller translates the next page for them, which may fault.
//! 2. Keep the [`Insn`] in the vCPU and call [`execute`] with the vCPU's
//!    [`MmioLog`]. Act on the [`Step`]:
//!    - [`Step::Read`], [`Step::Write`], [`Step::In`], [`Step::Out`]: leave to
//!      user space. When it has answered, call [`MmioLog::answer`] and
//!      `execute` again with the same `Insn`.
//!    - [`Step::Done`]: the instruction (with RFLAGS.TF set: one iteration of a
//!      repeated one) is complete and RIP says where to go on. If TF was set
//!      before the call the caller raises the single-step #DB. It also ends
//!      blocking by STI and MOV SS.
//!    - [`Step::Again`]: nothing is wrong, but enough work was done for one
//!      call, or [`Machine::should_pause`] asked to stop. RIP still points at
//!      the instruction and the log is empty: entering the guest, injecting an
//!      interrupt and calling `execute` again are all correct.
//!    - [`Step::Fault`]: inject the exception. RIP points at the instruction
//!      and the log is empty. The caller sets RFLAGS.RF in the saved image for
//!      a fault as for any other fault it injects.
//!    - [`Step::Blocked`]: the machine refused a RAM access for a reason of its
//!      own (a page user space protected, say). Call `execute` again later; the
//!      log keeps what was answered.
//!    - [`Step::Unsupported`]: inject #UD and log the bytes.
//! 3. If anything but the emulator changes the registers while the log
//!    is not empty, call [`MmioLog::clear`].
//!
//! # Shortcuts
//!
//! A [`DecodeCache`] remembers what bytes decoded to. A [`Plain`] is an
//! instruction that needs no second pass: the caller can make its accesses
//! and finish it by itself.
//!
//! # Restart by replay
//!
//! An instruction that needs an answer from user space is not suspended. It is
//! executed again from its start, and the [`MmioLog`] hands out the answers in
//! the order they were asked for; the first access that has none ends the call.
//! Until all of them are there no register, flag or RAM byte changes. A faulting
//! access is found before the first MMIO access of the instruction (or of the
//! iteration, for a repeated string instruction), so no device sees half of an
//! instruction that then faults.
//!
//! Facts about the processor cite the Intel SDM, 325462-083US, by section
//! number and title.
#![forbid(unsafe_code)]

mod cache;
mod decode;
mod execute;
mod insn;
mod machine;
mod mmio;
mod plain;

pub use cache::{Code, DecodeCache, Decoded};
pub use decode::{DecodeError, MAX_INSN_LEN, decode};
pub use execute::{MAX_ITERATIONS, execute};
pub use insn::{Insn, Mask, Mem, Op, Operand, Prefixes, Repeat};
pub use machine::{
    Access, Backing, Blocking, Exception, Fault, Gpr, Machine, Mode, PORT_BUFFER_LEN, Seg,
    SegmentState, Table, VectorBytes,
};
pub use mmio::MmioLog;
pub use plain::{Compute, Computed, Load, Plain, Rest};

/// What [`execute`] achieved, or needs, in one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The instruction is complete and RIP is past it (or at its target). With
    /// RFLAGS.TF set at the start, one iteration of a repeated string
    /// instruction counts as complete (SDM 3A 18.3.1.4 "Single-Step Exception
    /// Condition").
    Done,
    /// Call again; RIP is still on the instruction. See the module's text.
    Again,
    /// User space must read `size` bytes (1, 2, 4 or 8) at `gpa`.
    Read {
        /// Guest-physical address of the first byte.
        gpa: u64,
        /// Bytes.
        size: u8,
    },
    /// User space must write the low `size` bytes (1, 2, 4 or 8) of `value` at
    /// `gpa`.
    Write {
        /// Guest-physical address of the first byte.
        gpa: u64,
        /// Bytes.
        size: u8,
        /// The bytes, little endian; those above `size` are zero.
        value: u64,
    },
    /// User space must read `count` elements of `size` bytes from `port` into
    /// the port buffer (see [`Machine::read_port_buffer`]).
    In {
        /// The port.
        port: u16,
        /// Bytes in an element: 1, 2 or 4.
        size: u8,
        /// Elements; `count * size` is at most [`PORT_BUFFER_LEN`].
        count: u16,
        /// RFLAGS.DF: the first element is the last in the buffer.
        down: bool,
    },
    /// User space must write `count` elements of `size` bytes to `port`. They
    /// are in the port buffer already (see [`Machine::write_port_buffer`]).
    Out {
        /// The port.
        port: u16,
        /// Bytes in an element: 1, 2 or 4.
        size: u8,
        /// Elements; `count * size` is at most [`PORT_BUFFER_LEN`].
        count: u16,
        /// RFLAGS.DF: the first element is the last in the buffer.
        down: bool,
    },
    /// The instruction faults; nothing it did is visible, except completed
    /// iterations of a repeated string instruction.
    Fault(Exception),
    /// The machine cannot serve a RAM access now ([`Fault::Blocked`]).
    Blocked,
    /// The instruction, or this form of it, is not emulated.
    Unsupported,
}
