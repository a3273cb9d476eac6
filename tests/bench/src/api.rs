//! What both hypervisors offer, as the rows need it.
// UNSAFETY: the one ioctl that both sides are measured with.
#![expect(unsafe_code)]

use std::os::fd::RawFd;

use anyhow::Result;

/// Why a guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// OUT of so many bytes in all.
    Out { port: u16, bytes: usize },
    /// IN.
    In { port: u16 },
    /// A read of device memory.
    MmioRead,
    /// A write of device memory.
    MmioWrite,
    /// HLT.
    Halt,
    /// The host had something else to do: enter again.
    Again,
    /// Anything else, by the API's own number.
    Other(u32),
}

/// A hypervisor.
pub trait Api: Sized {
    type Vm: Vm;
    /// Mappings that a VM can have.
    const MOST_SLOTS: u32;
    /// Bytes of kernel memory that its modules hold, if they say so.
    fn memory() -> Option<u64>;
    fn open() -> Result<Self>;
    /// A new VM, open, without memory.
    fn create_vm(&self) -> Result<Self::Vm>;
}

/// A VM.
pub trait Vm {
    type Vcpu: Vcpu;
    /// Names memory of this process that [`Vm::map`] will use, if the API wants that.
    fn declare(&self, start: u64, size: u64) -> Result<()>;
    /// Puts memory of this process at a guest-physical address. `slot` numbers the mapping.
    fn map(&self, slot: u32, gpa: u64, size: u64, va: u64) -> Result<()>;
    /// Takes a whole mapping away.
    fn unmap(&self, slot: u32, gpa: u64, size: u64) -> Result<()>;
    /// A new vCPU with its shared memory.
    fn create_vcpu(&self, id: u32) -> Result<Self::Vcpu>;
}

/// A vCPU.
pub trait Vcpu {
    /// The request that enters the guest.
    const RUN: u64;
    /// Its descriptor.
    fn fd(&self) -> RawFd;
    /// Puts it into flat 32-bit protected mode at the guest's code.
    fn start(&self) -> Result<()>;
    /// Why the last [`enter`] returned.
    fn exit(&self) -> Exit;
    /// Answers an IN or a read of device memory.
    fn answer(&self, value: u32);
    /// Queues an interrupt.
    fn interrupt(&self, vector: u8) -> Result<()>;
}

/// An ioctl, without anything around it: negative is an error.
#[inline]
pub fn request(fd: RawFd, number: u64, argument: u64) -> i32 {
    // SAFETY: only called with requests that take no address: RUN, and numbers nobody knows.
    unsafe { libc::ioctl(fd, number, argument) }
}

/// Enters the guest once.
#[inline]
pub fn enter<V: Vcpu>(vcpu: &V) -> i32 {
    request(vcpu.fd(), V::RUN, 0)
}
