//! Guest memory by linear address, as the processor reaches descriptors, task
//! states and stacks in the middle of a task switch or of an event's delivery.

use abi::tunnel::ExitStatus;

use crate::Error;
use crate::arch::addr::{Gpa, Gva, PAGE_SIZE};
use crate::arch::event::{Exception, PageFault};
use crate::arch::reg::Efer;
use crate::host::Host;
use crate::memory::walk::{self, Paging, WalkAccess, WalkFault};
use crate::memory::{AccessError, AddressSpace};
use crate::vcpu::exits::Next;

/// Why a step of the switch could not be done.
#[derive(Clone, Copy)]
pub enum Stop {
    /// The guest gets this.
    Fault(Exception),
    /// Nothing has changed; the switch is tried again after this.
    Later(Next),
    /// The client has to open protected memory first.
    Protected(Gpa),
    /// The guest's structures are where no memory is, or the client's memory
    /// cannot be used.
    Lost(&'static str),
}

/// An address space of the guest.
pub struct Linear<'a, H: Host> {
    pub memory: &'a AddressSpace<H>,
    pub paging: Paging,
}

/// An access: to a stack at the CPL, or the processor's own.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum By {
    Stack,
    Processor,
}

fn host_stop(error: Error) -> Stop {
    match error {
        Error::Interrupted => Stop::Later(Next::Leave(ExitStatus::Interrupt)),
        _ => Stop::Lost("guest memory cannot be used"),
    }
}

impl<H: Host> Linear<'_, H> {
    /// Linear addresses have 32 bits outside of IA-32e mode.
    fn mask(&self) -> u64 {
        if self.paging.efer & Efer::LMA.bits() != 0 {
            u64::MAX
        } else {
            0xffff_ffff
        }
    }

    #[inline(never)]
    fn at(&self, address: u64, write: bool, by: By) -> Result<Gpa, Stop> {
        let access = WalkAccess {
            write,
            fetch: false,
            implicit: by == By::Processor,
        };
        let memory = self.memory.reader();
        let found = walk::translate(&memory, &self.paging, Gva(address), access);
        drop(memory);
        match found {
            Ok(translation) => Ok(translation.gpa),
            Err(WalkFault::Guest(exception)) => Err(Stop::Fault(exception)),
            Err(WalkFault::Hole(_)) => {
                // The entry reads as all ones: its reserved bits are set.
                let mut code = PageFault::PRESENT | PageFault::RESERVED;
                code.set(PageFault::WRITE, write);
                code.set(PageFault::USER, by == By::Stack && self.paging.cpl == 3);
                let address = address & self.mask();
                Err(Stop::Fault(Exception::page_fault(address, code)))
            }
            Err(WalkFault::Protected(gpa)) => Err(Stop::Protected(gpa)),
            Err(WalkFault::Retry) => Err(Stop::Later(Next::Resume)),
            Err(WalkFault::Host(error)) => Err(host_stop(error)),
        }
    }

    /// Calls `piece` for each page's part of the range, with its offset in it.
    #[inline(never)]
    fn each(
        &self,
        address: u64,
        length: usize,
        write: bool,
        by: By,
        piece: &mut dyn FnMut(Gpa, usize, usize) -> Result<(), AccessError>,
    ) -> Result<(), Stop> {
        let mut done = 0usize;
        while done < length {
            let here = address.wrapping_add(done as u64) & self.mask();
            let gpa = self.at(here, write, by)?;
            let left = PAGE_SIZE.wrapping_sub(gpa.page_offset()) as usize;
            let end = done.saturating_add(left).min(length);
            match piece(gpa, done, end) {
                // ROM takes a write and forgets it.
                Ok(()) | Err(AccessError::RomWrite(_)) => {}
                Err(AccessError::Mmio(_)) => {
                    return Err(Stop::Lost("descriptor or stack in device memory"));
                }
                Err(AccessError::Protected(gpa)) => return Err(Stop::Protected(gpa)),
                Err(AccessError::Host(error)) => return Err(host_stop(error)),
            }
            done = end;
        }
        Ok(())
    }

    /// Reads as the processor.
    #[inline(never)]
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let length = bytes.len();
        self.each(
            address,
            length,
            false,
            By::Processor,
            &mut |gpa, from, to| {
                let part = bytes.get_mut(from..to).unwrap_or_default();
                self.memory.read(gpa, part)
            },
        )
    }

    /// The range can be written.
    #[inline(never)]
    pub fn probe(&self, address: u64, length: usize, by: By) -> Result<(), Stop> {
        self.each(address, length, true, by, &mut |gpa, from, to| {
            self.memory.check(gpa, to.wrapping_sub(from), true)
        })
    }

    /// Writes.
    #[inline(never)]
    pub fn write(&self, address: u64, bytes: &[u8], by: By) -> Result<(), Stop> {
        self.each(address, bytes.len(), true, by, &mut |gpa, from, to| {
            let part = bytes.get(from..to).unwrap_or_default();
            self.memory.write(gpa, part)
        })
    }
}
