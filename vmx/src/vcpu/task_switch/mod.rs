//! Hardware task switches: SDM 8.3 "Task Switching". VMX operation has none
//! (SDM 26.4.2 "Treatment of Task Switches"), so each is carried out here.
//!
//! Everything is read and checked first, by [`plan`](Vcpu::plan_switch), while
//! nothing has changed: what stops it there leaves the old task as it was, and
//! the switch may be tried again. Then memory is written, every write such that
//! doing it twice is the same, the new task's busy flag last; then the registers.
//! A fault of loading the new task's segments comes in the new task.

pub(super) mod descriptor;
pub(super) mod linear;
mod tss;

use abi::vcpu_state::SegmentDesc;

use self::descriptor::{BUSY, Descriptor, push, unusable, virtual_8086};
use self::linear::{By, Linear, Stop};
use self::tss::{BITS_16, BITS_32, Form, LARGEST, Task};
use super::events::Delivery;
use super::exits::{self, Next};
use super::state::{self, SegmentFields};
use super::vmcs::Current;
use super::{Inner, Vcpu};
use crate::Error;
use crate::arch::event::{Exception, vector};
use crate::arch::field;
use crate::arch::reg::{Cr0, Cr4, Rflags, gpr};
use crate::arch::segment::{AccessRights, SegmentRegister};
use crate::host::Host;
use crate::memory::walk::Paging;

/// What brought the switch: SDM 28.2.1, table 28-2 "Exit Qualification for Task
/// Switches", bits 31:30.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Call,
    Iret,
    Jump,
    /// A task gate in the IDT.
    Gate,
}

/// DR7 bits that a switch clears: L0 to L3 and LE, SDM 18.2.4 "Debug Control
/// Register (DR7)".
const DR7_LOCAL: u64 = 0x155;
/// DR6.BT: the T flag of the new task's TSS.
const DR6_BT: u64 = 1 << 15;
/// EFLAGS bits that a task can have; bit 1 is always 1.
const EFLAGS: u32 = 0x003f_7fd5;
/// The registers of the six selectors in the order of [`Task`].
const SEGMENTS: [(SegmentRegister, SegmentFields); 6] = [
    (SegmentRegister::Es, state::ES),
    (SegmentRegister::Cs, state::CS),
    (SegmentRegister::Ss, state::SS),
    (SegmentRegister::Ds, state::DS),
    (SegmentRegister::Fs, state::FS),
    (SegmentRegister::Gs, state::GS),
];
const CS: usize = SegmentRegister::Cs as usize;
const SS: usize = SegmentRegister::Ss as usize;

/// The old task, and where it is.
struct Old {
    task: Task,
    tr: SegmentDesc,
    gdt: u64,
    gdt_limit: u32,
    paging: Paging,
    source: Source,
    delivery: Option<Delivery>,
}

/// What the switch will do once nothing can stop it any more.
struct Plan {
    form: &'static Form,
    old_form: &'static Form,
    descriptor: Descriptor,
    selector: u16,
    task: Task,
    paging: Paging,
    segments: [SegmentDesc; 6],
    ldtr: SegmentDesc,
    /// Descriptors that get their accessed flag, by address of their byte 5.
    accessed: [Option<(u64, u8)>; 6],
    /// An error code to push: linear address and value.
    error: Option<(u64, u32)>,
    /// A fault in the new task.
    fault: Option<Exception>,
}

/// Error code with a selector: SDM 6.13 "Error Code".
const fn code(selector: u16, external: bool) -> u32 {
    (selector & 0xfffc) as u32 | external as u32
}

impl Old {
    fn external(&self) -> bool {
        self.delivery.is_some_and(Delivery::is_external)
    }

    fn fault(&self, vector: u8, selector: u16) -> Stop {
        Stop::Fault(Exception::with_code(
            vector,
            code(selector, self.external()),
        ))
    }

    #[inline(never)]
    fn read<H: Host>(
        inner: &mut Inner<H>,
        current: &Current<'_, H>,
        source: Source,
        length: u8,
    ) -> Self {
        inner.registers.know_all(current);
        let delivery = inner.events.delivery().filter(|_| source == Source::Gate);
        let length = match (source, delivery) {
            (Source::Gate, Some(delivery)) => delivery.length,
            (Source::Gate, None) => 0,
            _ => length.into(),
        };
        let rflags = inner.registers.known_rflags();
        let low = |value: u64| value as u32;
        let mut task = Task {
            ip: low(inner.registers.known_rip()).wrapping_add(length),
            flags: low(rflags),
            selectors: SEGMENTS.map(|(_, fields)| fields.selector(current)),
            ..Task::default()
        };
        for (number, slot) in task.gpr.iter_mut().enumerate() {
            *slot = low(inner.registers.known_gpr(number));
        }
        Self {
            task,
            tr: state::TR.read(current),
            gdt: current.get(field::GUEST_GDTR_BASE),
            gdt_limit: current.get(field::GUEST_GDTR_LIMIT),
            paging: inner.paging(current),
            source,
            delivery,
        }
    }
}

/// The form of a TSS of this type: bit 3 tells.
const fn form_of(rights: AccessRights) -> &'static Form {
    if rights.kind() & 8 != 0 {
        &BITS_32
    } else {
        &BITS_16
    }
}

impl<H: Host> Vcpu<H> {
    /// Carries out a task switch that exited. `length`: of the instruction.
    #[cold]
    #[inline(never)]
    pub(super) fn task_switch(
        &self,
        inner: &mut Inner<H>,
        qualification: u32,
        length: u8,
    ) -> Result<Next, Error> {
        let source = match qualification >> 30 {
            0 => Source::Call,
            1 => Source::Iret,
            2 => Source::Jump,
            _ => Source::Gate,
        };
        let old = self.with_vmcs(inner, |current, inner| {
            Old::read(inner, current, source, length)
        })?;
        let selector = (qualification & 0xffff) as u16;
        let planned = self
            .plan_switch(&old, selector)
            .and_then(|plan| self.write_switch(&old, &plan).map(|()| plan));
        Ok(match planned {
            Ok(plan) => self.finish_switch(inner, &plan)?,
            Err(stop) => self.stopped(inner, stop),
        })
    }

    /// What follows from a step that could not be done.
    #[inline(never)]
    pub(super) fn stopped(&self, inner: &mut Inner<H>, stop: Stop) -> Next {
        match stop {
            Stop::Fault(exception) => exits::raise(self, inner, exception),
            Stop::Later(next) => next,
            Stop::Protected(gpa) => {
                let access = crate::memory::Access {
                    write: true,
                    ..crate::memory::Access::default()
                };
                self.report_protected(gpa, access)
            }
            Stop::Lost(why) => exits::lost(inner, why),
        }
    }

    #[inline(never)]
    fn plan_switch(&self, old: &Old, selector: u16) -> Result<Plan, Stop> {
        let memory = self.guest().memory();
        let space = Linear {
            memory,
            paging: old.paging,
        };
        let bad_selector = if old.source == Source::Iret {
            vector::TS
        } else {
            vector::GP
        };
        if selector & 4 != 0 || selector < 8 || u32::from(selector | 7) > old.gdt_limit {
            return Err(old.fault(bad_selector, selector));
        }
        let at = old.gdt.wrapping_add(u64::from(selector & 0xfff8));
        let descriptor = read_descriptor(&space, at)?;
        let rights = descriptor.rights();
        let busy = if old.source == Source::Iret { 2 } else { 0 };
        // Types 1 and 9 are available, 3 and 11 busy.
        if rights.contains(AccessRights::NON_SYSTEM) || rights.kind() & 7 != 1 | busy {
            return Err(old.fault(bad_selector, selector));
        }
        if !rights.contains(AccessRights::PRESENT) {
            return Err(old.fault(vector::NP, selector));
        }
        let form = form_of(rights);
        if (descriptor.limit() as usize) < form.size.wrapping_sub(1) {
            return Err(old.fault(vector::TS, selector));
        }
        let old_form = form_of(AccessRights::from_bits_retain(old.tr.ar));
        let (from, to) = old_form.saved();
        if (old.tr.limit as usize) < to.wrapping_sub(1) {
            return Err(old.fault(vector::TS, old.tr.selector));
        }
        let mut bytes = [0; LARGEST];
        let image = bytes.get_mut(..form.size).unwrap_or_default();
        space.read(descriptor.base(), image)?;
        let task = form.load(image);
        let start = old.tr.base.wrapping_add(from as u64);
        space.probe(start, to.wrapping_sub(from), By::Processor)?;
        if matches!(old.source, Source::Call | Source::Gate) {
            space.probe(descriptor.base(), 2, By::Processor)?;
        }
        space.probe(at.wrapping_add(5), 1, By::Processor)?;
        if matches!(old.source, Source::Jump | Source::Iret) {
            let at = old.gdt.wrapping_add(u64::from(old.tr.selector & 0xfff8));
            space.probe(at.wrapping_add(5), 1, By::Processor)?;
        }
        let mut plan = Plan {
            form,
            old_form,
            descriptor,
            selector,
            task,
            paging: old.paging,
            segments: [SegmentDesc::default(); 6],
            ldtr: unusable(task.ldtr, 0),
            accessed: [None; 6],
            error: None,
            fault: None,
        };
        match self.load_task(old, &mut plan) {
            Ok(()) => Ok(plan),
            Err(Stop::Fault(exception)) => {
                plan.fault = Some(exception);
                plan.error = None;
                Ok(plan)
            }
            Err(other) => Err(other),
        }
    }

    /// What the new task's registers become, as far as nothing faults.
    #[inline(never)]
    fn load_task(&self, old: &Old, plan: &mut Plan) -> Result<(), Stop> {
        let flags = plan.task.flags & EFLAGS | 2;
        let v86 = u64::from(flags) & Rflags::VM.bits() != 0;
        let [_, cs, ss, ..] = plan.task.selectors;
        let cpl = if v86 { 3 } else { (cs & 3) as u8 };
        plan.task.flags = flags;
        if matches!(old.source, Source::Call | Source::Gate) {
            plan.task.flags |= Rflags::NT.bits() as u32;
        }
        // Until they are loaded: nothing usable, at the new task's level.
        for (slot, selector) in plan.segments.iter_mut().zip(plan.task.selectors) {
            *slot = if v86 {
                virtual_8086(selector)
            } else {
                unusable(selector, 0)
            };
        }
        if !v86 {
            plan.set_segment(CS, flat_code(cs, cpl));
            plan.set_segment(SS, unusable(ss, cpl));
        }
        plan.paging.cpl = cpl;
        plan.paging.ac = u64::from(flags) & Rflags::AC.bits() != 0;
        let paging = plan.paging.cr0 & Cr0::PG.bits() != 0;
        if let Some(cr3) = plan.task.cr3.filter(|_| paging) {
            plan.paging.cr3 = cr3.into();
            if plan.paging.cr4 & Cr4::PAE.bits() != 0 {
                let entries = self.read_pdptes(cr3.into());
                plan.paging.pdptes = Some(entries.ok_or(Stop::Fault(Exception::gp(0)))?);
            }
        }
        let space = Linear {
            memory: self.guest().memory(),
            paging: plan.paging,
        };
        let external = old.external();
        let invalid =
            |selector| Stop::Fault(Exception::with_code(vector::TS, code(selector, external)));
        let ldtr = plan.task.ldtr;
        if ldtr & 0xfffc != 0 {
            if ldtr & 4 != 0 || u32::from(ldtr | 7) > old.gdt_limit {
                return Err(invalid(ldtr));
            }
            let at = old.gdt.wrapping_add(u64::from(ldtr & 0xfff8));
            let descriptor = read_descriptor(&space, at)?;
            if descriptor
                .refusal(SegmentRegister::Ldtr, ldtr, cpl)
                .is_some()
            {
                return Err(invalid(ldtr));
            }
            plan.ldtr = descriptor.register(ldtr);
        }
        if !v86 {
            // CS first: its RPL is the level that the others are held against.
            for index in [CS, SS, 0, 3, 4, 5] {
                load_segment(&space, old, plan, index, cpl)?;
            }
        }
        let end = plan.segments.get(CS).map_or(0, |cs| cs.limit);
        if plan.task.ip > end {
            return Err(Stop::Fault(Exception::gp(external.into())));
        }
        if let Some(value) = old.delivery.and_then(|delivery| delivery.error_code) {
            let size = plan.form.push_size();
            let ss = plan.segments.get(SS).copied().unwrap_or_default();
            let [_, _, _, _, esp, ..] = plan.task.gpr;
            let (esp, offset) = push(&ss, esp, size);
            let Some(offset) = offset else {
                let code = external.into();
                return Err(Stop::Fault(Exception::with_code(vector::SS, code)));
            };
            let at = ss.base.wrapping_add(offset) & 0xffff_ffff;
            space.probe(at, size as usize, By::Stack)?;
            plan.error = Some((at, value));
            if let Some(slot) = plan.task.gpr.get_mut(gpr::RSP) {
                *slot = esp;
            }
        }
        Ok(())
    }

    /// Memory: the old task's state, busy flags, link, accessed flags, error code.
    #[inline(never)]
    fn write_switch(&self, old: &Old, plan: &Plan) -> Result<(), Stop> {
        let memory = self.guest().memory();
        let space = Linear {
            memory,
            paging: old.paging,
        };
        let mut saved = old.task;
        if old.source == Source::Iret {
            saved.flags &= !(Rflags::NT.bits() as u32);
        }
        let mut bytes = [0; LARGEST];
        plan.old_form.save(&saved, &mut bytes);
        let (from, to) = plan.old_form.saved();
        let part = bytes.get(from..to).unwrap_or_default();
        space.write(old.tr.base.wrapping_add(from as u64), part, By::Processor)?;
        let byte_5 = |selector: u16| {
            let at = u64::from(selector & 0xfff8).wrapping_add(5);
            old.gdt.wrapping_add(at)
        };
        if matches!(old.source, Source::Jump | Source::Iret) {
            let at = byte_5(old.tr.selector);
            let mut byte = [0];
            space.read(at, &mut byte)?;
            let [busy] = byte;
            space.write(at, &[busy & !BUSY], By::Processor)?;
        } else {
            let link = old.tr.selector.to_le_bytes();
            space.write(plan.descriptor.base(), &link, By::Processor)?;
        }
        let new = Linear {
            memory,
            paging: plan.paging,
        };
        for (at, byte) in plan.accessed.iter().flatten() {
            new.write(*at, &[*byte], By::Processor)?;
        }
        if let Some((at, value)) = plan.error {
            let bytes = value.to_le_bytes();
            let part = bytes.get(..plan.form.push_size() as usize);
            new.write(at, part.unwrap_or_default(), By::Stack)?;
        }
        if old.source != Source::Iret {
            let busy = plan.descriptor.byte_5() | BUSY;
            space.write(byte_5(plan.selector), &[busy], By::Processor)?;
        }
        Ok(())
    }

    /// Registers; then what the new task begins with.
    #[inline(never)]
    fn finish_switch(&self, inner: &mut Inner<H>, plan: &Plan) -> Result<Next, Error> {
        let trap = plan.task.trap && plan.fault.is_none();
        let next = self.with_vmcs(inner, |current, inner| {
            inner.write_task(current, plan);
            current.put(field::GUEST_INTERRUPTIBILITY, 0);
            current.put(field::GUEST_PENDING_DEBUG, 0);
            inner.events.delivered(plan.fault.is_some());
            // The monitor trap flag did not see the instruction.
            inner.step_due = inner.debug.steps();
            if trap {
                return exits::exception::debug_trap(self, inner, current, DR6_BT);
            }
            Next::Resume
        })?;
        if let Some(exception) = plan.fault {
            return Ok(exits::raise(self, inner, exception));
        }
        Ok(next)
    }
}

impl Plan {
    fn set_segment(&mut self, index: usize, value: SegmentDesc) {
        if let Some(slot) = self.segments.get_mut(index) {
            *slot = value;
        }
    }
}

/// CS of a task whose own could not be loaded: the fault must come at its
/// level, and a processor always has a usable CS.
fn flat_code(selector: u16, cpl: u8) -> SegmentDesc {
    SegmentDesc {
        ar: 0xc09b | u32::from(cpl) << 5,
        limit: u32::MAX,
        ..unusable(selector, 0)
    }
}

#[inline(never)]
fn read_descriptor<H: Host>(space: &Linear<'_, H>, at: u64) -> Result<Descriptor, Stop> {
    let mut raw = [0; 8];
    space.read(at, &mut raw)?;
    Ok(Descriptor(u64::from_le_bytes(raw)))
}

/// Loads one of the six segment registers of the new task.
#[inline(never)]
fn load_segment<H: Host>(
    space: &Linear<'_, H>,
    old: &Old,
    plan: &mut Plan,
    index: usize,
    cpl: u8,
) -> Result<(), Stop> {
    let Some(((register, _), selector)) = SEGMENTS
        .get(index)
        .zip(plan.task.selectors.get(index).copied())
    else {
        return Ok(());
    };
    let fault = |vector| {
        let code = code(selector, old.external());
        Stop::Fault(Exception::with_code(vector, code))
    };
    if selector & 0xfffc == 0 {
        // Null, which only data registers may be.
        return match index {
            CS | SS => Err(fault(vector::TS)),
            _ => Ok(()),
        };
    }
    let (table, limit) = if selector & 4 == 0 {
        (old.gdt, old.gdt_limit)
    } else if plan.ldtr.ar & AccessRights::UNUSABLE.bits() == 0 {
        (plan.ldtr.base, plan.ldtr.limit)
    } else {
        return Err(fault(vector::TS));
    };
    if u32::from(selector | 7) > limit {
        return Err(fault(vector::TS));
    }
    let at = table.wrapping_add(u64::from(selector & 0xfff8));
    let descriptor = read_descriptor(space, at)?;
    if let Some(vector) = descriptor.refusal(*register, selector, cpl) {
        return Err(fault(vector));
    }
    let mut loaded = descriptor.register(selector);
    if loaded.ar & AccessRights::ACCESSED.bits() == 0 {
        let at = at.wrapping_add(5);
        space.probe(at, 1, By::Processor)?;
        loaded.ar |= AccessRights::ACCESSED.bits();
        if let Some(slot) = plan.accessed.get_mut(index) {
            *slot = Some((at, descriptor.byte_5() | 1));
        }
    }
    plan.set_segment(index, loaded);
    Ok(())
}

impl<H: Host> Inner<H> {
    /// The address space, as the guest's registers have it; RFLAGS is known.
    #[inline(never)]
    pub(super) fn paging(&mut self, current: &Current<'_, H>) -> Paging {
        let ss = AccessRights::from_bits_retain(current.get(field::GUEST_SS_RIGHTS));
        let pdptes = self.modes.uses_pdptes().then(|| {
            [
                current.get(field::GUEST_PDPTE0),
                current.get(field::GUEST_PDPTE1),
                current.get(field::GUEST_PDPTE2),
                current.get(field::GUEST_PDPTE3),
            ]
        });
        Paging {
            cr0: self.modes.cr0(current),
            cr3: current.get(field::GUEST_CR3),
            cr4: self.modes.cr4(current),
            efer: self.modes.efer(),
            ac: self.registers.known_rflags() & Rflags::AC.bits() != 0,
            cpl: ss.dpl(),
            pdptes,
            address_bits: self.features.physical_bits(),
            pages_1g: self.features.has(super::cpuid::Feature::PAGE1GB),
        }
    }

    /// The new task's registers.
    #[inline(never)]
    fn write_task(&mut self, current: &Current<'_, H>, plan: &Plan) {
        for (number, value) in (0u8..).zip(plan.task.gpr) {
            self.registers.set(number, value.into());
        }
        self.registers.set_rip(plan.task.ip.into());
        self.registers.set_rflags(plan.task.flags.into());
        for ((_, fields), value) in SEGMENTS.iter().zip(&plan.segments) {
            fields.write_raw(current, value, value.ar);
        }
        state::LDTR.write_raw(current, &plan.ldtr, plan.ldtr.ar);
        let tr = plan.descriptor.register(plan.selector);
        state::TR.write_tr(current, &tr, false);
        self.modes.set_task_switched(current);
        if plan.paging.cr3 != current.get(field::GUEST_CR3) {
            current.put(field::GUEST_CR3, plan.paging.cr3);
        }
        if let Some(entries) = plan.paging.pdptes {
            state::pdptes::write(current, entries);
        }
        self.flush_linear = true;
        let dr7 = self.debug.guest_dr7() & !DR7_LOCAL;
        self.debug.write(current, 7, dr7);
        self.emulation.forget_registers();
    }
}
