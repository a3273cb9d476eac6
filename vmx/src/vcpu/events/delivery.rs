//! Events that the processor cannot deliver, because it would write to ROM on
//! the way: it sets the accessed bit of a code descriptor that firmware left
//! clear, and exits there each time. On a machine ROM forgets the write and the
//! delivery goes on, so it is carried out here: SDM 6.12.1 "Exception- or
//! Interrupt-Handler Procedures", 6.14 "Exception and Interrupt Handling in 64-bit
//! Mode".
//!
//! The processor has made its checks by then. Only what firmware does is done: a
//! 32- or 64-bit gate to code at the same level, on the same stack. All is read
//! and checked before memory is written, and writing it twice is the same, so a
//! delivery that is stopped starts over.

use abi::vcpu_state::SegmentDesc;

use super::Delivery;
use crate::Error;
use crate::arch::event::{Exception, vector};
use crate::arch::field;
use crate::arch::reg::{Cr0, Efer, Rflags, gpr};
use crate::arch::segment::AccessRights;
use crate::host::Host;
use crate::memory::walk::Paging;
use crate::vcpu::exits::Next;
use crate::vcpu::msr::canonical;
use crate::vcpu::state;
use crate::vcpu::task_switch::descriptor::{Descriptor, push};
use crate::vcpu::task_switch::linear::{By, Linear, Stop};
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu};

/// What is not done here.
const UNSUPPORTED: Stop = Stop::Lost("event delivery through ROM that is not emulated");

/// What the delivery starts from.
struct Before {
    rip: u64,
    rsp: u64,
    rflags: u64,
    cs: u16,
    ss: SegmentDesc,
    gdt: SegmentDesc,
    idt: u64,
    paging: Paging,
}

/// What the handler starts with.
struct Handler {
    rip: u64,
    rsp: u64,
    rflags: u64,
    cs: SegmentDesc,
}

/// RFLAGS as the frame gets it.
fn pushed_flags(rflags: u64, delivery: Delivery) -> u64 {
    if delivery.is_fault() {
        rflags | Rflags::RF.bits()
    } else {
        rflags
    }
}

impl Before {
    #[inline(never)]
    fn read<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>) -> Self {
        inner.registers.know_all(current);
        Self {
            rip: inner.registers.known_rip(),
            rsp: inner.registers.known_gpr(gpr::RSP),
            rflags: inner.registers.known_rflags(),
            cs: state::CS.selector(current),
            ss: state::SS.read(current),
            gdt: SegmentDesc {
                base: current.get(field::GUEST_GDTR_BASE),
                limit: current.get(field::GUEST_GDTR_LIMIT),
                ..SegmentDesc::default()
            },
            idt: current.get(field::GUEST_IDTR_BASE),
            paging: inner.paging(current),
        }
    }

    fn is_long(&self) -> bool {
        self.paging.efer & Efer::LMA.bits() != 0
    }

    /// The handler's code segment and first instruction, and the type of the gate.
    #[inline(never)]
    fn target<H: Host>(
        &self,
        space: &Linear<'_, H>,
        number: u8,
    ) -> Result<(SegmentDesc, u64, u64), Stop> {
        let long = self.is_long();
        let size = if long { 16 } else { 8 };
        let mut raw = [0; 16];
        let part = raw.get_mut(..size).unwrap_or_default();
        let at = u64::from(number).wrapping_mul(size as u64);
        space.read(self.idt.wrapping_add(at), part)?;
        let raw = u128::from_le_bytes(raw);
        let (low, high) = (raw as u64, (raw >> 64) as u64);
        let rip = low & 0xffff | low >> 32 & 0xffff_0000 | (high & 0xffff_ffff) << 32;
        let selector = (low >> 16) as u16;
        // Bits 12:8, S and the type: an interrupt or a trap gate. Bits 2:0 of
        // the upper half are another stack, in long mode.
        let kind = low >> 40 & 0x1f;
        let stack = long && low >> 32 & 7 != 0;
        let outside = selector & 4 != 0 || u32::from(selector | 7) > self.gdt.limit;
        if kind & !1 != 0xe || stack || outside {
            return Err(UNSUPPORTED);
        }
        let at = self.gdt.base.wrapping_add(u64::from(selector & 0xfff8));
        let mut raw = [0; 8];
        space.read(at, &mut raw)?;
        let descriptor = Descriptor(u64::from_le_bytes(raw));
        let rights = descriptor.rights();
        let code = AccessRights::PRESENT | AccessRights::NON_SYSTEM | AccessRights::CODE;
        let cpl = self.paging.cpl;
        let level = if rights.contains(AccessRights::DOWN_CONFORMING) {
            rights.dpl() <= cpl
        } else {
            rights.dpl() == cpl
        };
        let fits = if long {
            rights & (AccessRights::LONG | AccessRights::DB) == AccessRights::LONG && canonical(rip)
        } else {
            rip <= u64::from(descriptor.limit())
        };
        if !rights.contains(code) || !level || !fits {
            return Err(UNSUPPORTED);
        }
        let mut cs = descriptor.register(selector & 0xfffc | u16::from(cpl));
        cs.ar |= AccessRights::ACCESSED.bits();
        let byte = descriptor.byte_5() | AccessRights::ACCESSED.bits() as u8;
        space.write(at.wrapping_add(5), &[byte], By::Processor)?;
        Ok((cs, rip, kind))
    }

    /// Writes the frame; returns the stack pointer below it.
    #[inline(never)]
    fn push_frame<H: Host>(&self, space: &Linear<'_, H>, delivery: Delivery) -> Result<u64, Stop> {
        let rip = self.rip.wrapping_add(delivery.length.into());
        let rflags = pushed_flags(self.rflags, delivery);
        let error = delivery.error_code.map(u64::from);
        // From the lowest address up; the error code, if there is one, below RIP.
        let values = [
            error.unwrap_or(0),
            rip,
            self.cs.into(),
            rflags,
            self.rsp,
            self.ss.selector.into(),
        ];
        let (slot, last) = if self.is_long() { (8, 6) } else { (4, 4) };
        let first = usize::from(error.is_none());
        let values = values.get(first..last).unwrap_or_default();
        let mut bytes = [0; 48];
        for (to, value) in bytes.chunks_mut(slot).zip(values) {
            for (to, from) in to.iter_mut().zip(value.to_le_bytes()) {
                *to = from;
            }
        }
        let size = slot.wrapping_mul(values.len());
        let (rsp, at) = if self.is_long() {
            // SDM 6.14.2 "64-Bit Mode Stack Frame": aligned to 16 bytes first.
            let rsp = (self.rsp & !0xf).wrapping_sub(size as u64);
            (rsp, canonical(rsp).then_some(rsp))
        } else {
            let (esp, offset) = push(&self.ss, self.rsp as u32, size as u32);
            let at = offset.map(|offset| self.ss.base.wrapping_add(offset));
            (esp.into(), at)
        };
        let Some(at) = at else {
            let external = delivery.is_external().into();
            return Err(Stop::Fault(Exception::with_code(vector::SS, external)));
        };
        let frame = bytes.get(..size).unwrap_or_default();
        space.write(at, frame, By::Stack)?;
        Ok(rsp)
    }
}

impl<H: Host> Vcpu<H> {
    /// Delivers the event whose delivery wrote to ROM.
    #[cold]
    #[inline(never)]
    pub(in crate::vcpu) fn deliver_over_rom(
        &self,
        inner: &mut Inner<H>,
        delivery: Delivery,
    ) -> Result<Next, Error> {
        let before = self.with_vmcs(inner, |current, inner| Before::read(inner, current))?;
        let handler = match self.reach_handler(&before, delivery) {
            Ok(handler) => handler,
            Err(stop) => return Ok(self.stopped(inner, stop)),
        };
        self.with_vmcs(inner, |current, inner| {
            inner.registers.set(gpr::RSP as u8, handler.rsp);
            inner.registers.set_rip(handler.rip);
            inner.registers.set_rflags(handler.rflags);
            state::CS.write_raw(current, &handler.cs, handler.cs.ar);
            current.write(field::GUEST_INTERRUPTIBILITY, 0);
            current.write(field::GUEST_PENDING_DEBUG, 0);
            inner.events.delivered(false);
            inner.emulation.forget_registers();
            inner.step_due = inner.debug.steps();
        })?;
        Ok(Next::Resume)
    }

    fn reach_handler(&self, before: &Before, delivery: Delivery) -> Result<Handler, Stop> {
        let protected = before.paging.cr0 & Cr0::PE.bits() != 0;
        if !protected || before.rflags & Rflags::VM.bits() != 0 {
            return Err(UNSUPPORTED);
        }
        let space = Linear {
            memory: self.guest().memory(),
            paging: before.paging,
        };
        let (cs, rip, kind) = before.target(&space, delivery.vector)?;
        let rsp = before.push_frame(&space, delivery)?;
        // SDM 6.12.1.3 "Flag Usage By Exception- or Interrupt-Handler Procedure":
        // an interrupt gate, the even type, clears IF.
        let mut cleared = Rflags::TF | Rflags::NT | Rflags::RF;
        cleared.set(Rflags::IF, kind & 1 == 0);
        Ok(Handler {
            rip,
            rsp,
            rflags: before.rflags & !cleared.bits(),
            cs,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::event::EventKind;

    #[test]
    fn faults_set_rf_and_nothing_else_does() {
        let pushed = |kind, vector| {
            let delivery = Delivery {
                kind,
                vector,
                error_code: None,
                length: 0,
            };
            pushed_flags(2, delivery)
        };
        let rf = Rflags::RF.bits();
        assert_eq!(pushed(EventKind::Exception, vector::PF), 2 | rf);
        assert_eq!(pushed(EventKind::Exception, vector::DB), 2);
        assert_eq!(pushed(EventKind::Interrupt, 0x30), 2);
        assert_eq!(pushed(EventKind::SoftwareException, vector::BP), 2);
    }
}
