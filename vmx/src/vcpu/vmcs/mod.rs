//! The VMCS: [`Current`], the loaded one, is the only way to read or write its
//! fields. What belongs to no guest register is written by [`setup`] and
//! [`host_state`]; [`entry_checks`] tells what a failed entry did not like.
// UNSAFETY: executes VMREAD and VMWRITE on a VMCS that a loan keeps current.
#![expect(unsafe_code)]

pub mod entry_checks;
pub(super) mod host_state;
pub(super) mod setup;

use core::cell::Cell;

use crate::arch::field::{self, Field, Readable, Width};
use crate::cpu::Cpu;
use crate::host::Host;
use crate::operation::Loaded;

/// A VMCS that is current on this processor, with interrupts off.
///
/// VMREAD and VMWRITE of a field that every supported processor has cannot
/// fail on a current VMCS. Should one fail all the same, the first failure is
/// kept, reads give 0, and [`Current::failure`] ends the vCPU: never the host.
pub struct Current<'a, H: Host> {
    cpu: &'a H::Cpu,
    _loaded: Loaded<'a>,
    failed: Cell<Option<u32>>,
}

impl<'a, H: Host> Current<'a, H> {
    /// The VMCS that `loaded` stands for.
    #[inline]
    pub fn new(host: &'a H, loaded: Loaded<'a>) -> Self {
        Self {
            cpu: host.cpu(),
            _loaded: loaded,
            failed: Cell::new(None),
        }
    }

    /// The processor.
    pub fn cpu(&self) -> &'a H::Cpu {
        self.cpu
    }

    /// VMREAD.
    #[inline(always)]
    pub fn read<F: Readable>(&self, field: F) -> <F::Width as Width>::Value {
        let encoding = field.encoding();
        // SAFETY: the loan keeps a VMCS of ours current.
        match unsafe { self.cpu.vmread(encoding) } {
            Ok(raw) => F::Width::truncate(raw),
            Err(_) => {
                self.note(encoding);
                F::Width::truncate(0)
            }
        }
    }

    /// VMWRITE.
    #[inline(always)]
    pub fn write<W: Width>(&self, field: Field<W>, value: W::Value) {
        let encoding = field.encoding();
        // SAFETY: the loan keeps a VMCS of ours current. Host-state fields and
        // physical addresses are written by `setup` only, from values the host
        // itself uses and from pages that the vCPU owns.
        if unsafe { self.cpu.vmwrite(encoding, value.into()) }.is_err() {
            self.note(encoding);
        }
    }

    /// [`Current::read`] off the way of frequent exits: a call, so smaller.
    pub fn get<F: Readable>(&self, field: F) -> <F::Width as Width>::Value {
        F::Width::truncate(self.get_any(field.encoding()))
    }

    #[inline(never)]
    fn get_any(&self, encoding: u32) -> u64 {
        // SAFETY: the loan keeps a VMCS of ours current.
        unsafe { self.cpu.vmread(encoding) }.unwrap_or_else(|_| {
            self.note(encoding);
            0
        })
    }

    /// [`Current::write`] off the way of frequent exits: a call, so smaller.
    pub fn put<W: Width>(&self, field: Field<W>, value: W::Value) {
        self.put_any(field.encoding(), value.into());
    }

    #[inline(never)]
    fn put_any(&self, encoding: u32, value: u64) {
        // SAFETY: as in `write`.
        if unsafe { self.cpu.vmwrite(encoding, value) }.is_err() {
            self.note(encoding);
        }
    }

    /// Writes 1 to IA32_PRED_CMD or IA32_FLUSH_CMD, for the guest.
    pub fn command(&self, register: u32) {
        // SAFETY: the guest's CPUID has the register only if the host's has; the
        // write only costs time.
        unsafe { self.cpu.wrmsr(register, 1) };
    }

    /// VMREAD of any field, for a dump; `None` if the processor has none such.
    #[cold]
    #[inline(never)]
    pub fn peek(&self, encoding: u32) -> Option<u64> {
        // SAFETY: the loan keeps a VMCS of ours current.
        unsafe { self.cpu.vmread(encoding) }.ok()
    }

    #[cold]
    fn note(&self, encoding: u32) {
        if self.failed.get().is_none() {
            self.failed.set(Some(encoding));
            log::error!(
                "VMREAD or VMWRITE of {} ({encoding:#x}) failed",
                field::name(encoding)
            );
        }
    }

    /// The first field whose access failed.
    pub fn failure(&self) -> Option<u32> {
        self.failed.get()
    }
}
