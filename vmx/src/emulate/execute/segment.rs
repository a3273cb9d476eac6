//! Loading segment registers, and far branches without a change of privilege.
//! SDM 3A 3.4 "Logical and Linear Addresses", 5.5 "Type Checking", 5.6 "Privilege
//! Levels", 5.8 "Privilege Level Checking When Transferring Program Control ..."; 2A "CALL",
//! "IRET", "JMP", "LDS/LES/LFS/LGS/LSS", 2B "MOV", "RET".
//!
//! Firmware brings these here whose GDT lies in ROM: the processor cannot set the
//! accessed bit of a descriptor there, and exits. Call gates, task switches and
//! returns to an outer privilege level are not emulated.

use super::access::{Intent, Span};
use super::address::truncate;
use super::flags::mask;
use super::{Next, Outcome, RESUME, Run, Stop};
use crate::emulate::insn::{Op, Operand};
use crate::emulate::machine::{
    Access, Backing, Blocking, Exception, Gpr, Machine, Seg, SegmentState, Table,
};

/// Bits of a segment's access rights: SDM 3C 25.4.1.
const ACCESSED: u32 = 1 << 0;
pub(super) const READ_WRITE: u32 = 1 << 1;
pub(super) const CONFORMING: u32 = 1 << 2;
pub(super) const CODE: u32 = 1 << 3;
pub(super) const NON_SYSTEM: u32 = 1 << 4;
pub(super) const PRESENT: u32 = 1 << 7;
const LONG: u32 = 1 << 13;
const BIG: u32 = 1 << 14;
const GRANULAR: u32 = 1 << 15;
pub(super) const UNUSABLE: u32 = 1 << 16;
/// The types a far branch may name, bit n for type n: without and with IA-32e
/// mode.
const GATES: u16 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 12;
const GATES_LONG: u16 = 1 << 12;

const FLAG_NT: u64 = 1 << 14;
const FLAG_VM: u64 = 1 << 17;

/// The vectors whose error code is a selector.
pub(super) const NOT_PRESENT: u8 = 11;
const STACK: u8 = 12;
pub(super) const PROTECTION: u8 = 13;

/// Who loads CS.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Transfer {
    Forward,
    Return,
}

/// A segment register and its descriptor, checked but not loaded.
pub(super) struct Loaded {
    pub(super) state: SegmentState,
    /// Where the descriptor is, if a bit is to be set in it, and which of its
    /// rights: accessed or busy.
    pub(super) mark: Option<(u64, u32)>,
}

pub(super) const fn dpl(access: u32) -> u8 {
    (access >> 5 & 3) as u8
}

pub(super) fn refuse<T>(vector: u8, selector: u16) -> Outcome<T> {
    let code = u32::from(selector & 0xfffc);
    Err(Stop::exception(Exception::with_code(vector, code)))
}

impl<M: Machine> Run<'_, M> {
    /// A far pointer in memory: the offset and the selector.
    fn far_pointer(&mut self, n: usize) -> Outcome<(u64, u16)> {
        let Operand::Mem(mem) = self.operand(n) else {
            let offset = self.fetch(0)?;
            return Ok((offset, self.fetch(1)? as u16));
        };
        let span = self.memory(&mem, 0, Intent::Read)?;
        let value = self.load(&span)?;
        let bits = u32::from(self.size()).wrapping_mul(8);
        let offset = value as u64 & mask(self.size());
        Ok((offset, value.wrapping_shr(bits) as u16))
    }

    /// One page of a system structure, which is accessed as by CPL 0.
    fn system_address(&mut self, linear: u64, write: bool) -> Outcome<u64> {
        let access = Access { write, user: false };
        self.served(|machine| machine.translate(linear, access))
    }

    /// Reads a descriptor of 8 or 16 bytes, and tells where it is.
    #[inline(never)]
    pub(super) fn descriptor(&mut self, selector: u16, len: u8) -> Outcome<(u64, u128)> {
        let table = if selector & 4 == 0 {
            Table::Gdt
        } else {
            Table::Ldt
        };
        let table = self.machine.table(table);
        let offset = u64::from(selector & 0xfff8);
        if table.access & UNUSABLE != 0
            || offset.wrapping_add(len.into()) > u64::from(table.limit).wrapping_add(1)
        {
            return refuse(PROTECTION, selector);
        }
        let linear = table.base.wrapping_add(offset);
        let mut bytes = [0u8; 16];
        for (at, byte) in (0u64..).zip(bytes.iter_mut().take(len.into())) {
            let mut linear = linear.wrapping_add(at);
            if !self.machine.long_mode() {
                linear = truncate(linear, 4);
            }
            let gpa = self.system_address(linear, false)?;
            if self.served(|machine| machine.backing(gpa, false))? == Backing::Mmio {
                return Err(Stop::UNSUPPORTED);
            }
            self.served(|machine| machine.read_ram(gpa, core::slice::from_mut(byte)))?;
        }
        Ok((linear, u128::from_le_bytes(bytes)))
    }

    /// The state that a descriptor describes.
    #[inline(never)]
    pub(super) fn described(selector: u16, raw: u128) -> SegmentState {
        let low = raw as u64;
        let access = (low >> 40) as u32 & 0xf0ff;
        let limit = (low & 0xffff | low >> 32 & 0xf_0000) as u32;
        let limit = if access & GRANULAR != 0 {
            limit.wrapping_shl(12) | 0xfff
        } else {
            limit
        };
        let base = low >> 16 & 0xff_ffff | low >> 32 & 0xff00_0000;
        SegmentState {
            selector,
            base: base | ((raw >> 64) as u64).wrapping_shl(32),
            limit,
            access,
        }
    }

    /// The state of a segment of code or data.
    #[inline(never)]
    fn ordinary(&mut self, selector: u16) -> Outcome<Loaded> {
        let (linear, raw) = self.descriptor(selector, 8)?;
        let mut state = Self::described(selector, raw);
        let unaccessed = state.access & (NON_SYSTEM | ACCESSED) == NON_SYSTEM;
        if unaccessed {
            state.access |= ACCESSED;
        }
        Ok(Loaded {
            state,
            mark: unaccessed.then_some((linear, ACCESSED)),
        })
    }

    /// The state of a segment in real-address and virtual-8086 mode: only the base
    /// follows the selector.
    fn real_segment(&self, seg: Seg, selector: u16) -> Loaded {
        let state = SegmentState {
            selector,
            base: u64::from(selector) << 4,
            ..self.machine.segment(seg)
        };
        Loaded { state, mark: None }
    }

    /// Checks the load of a data segment register or SS.
    fn data_segment(&mut self, seg: Seg, selector: u16) -> Outcome<Loaded> {
        if !self.is_protected() {
            return Ok(self.real_segment(seg, selector));
        }
        let cpl = self.machine.cpl();
        let rpl = (selector & 3) as u8;
        if selector & 0xfffc == 0 {
            // A null selector; SS takes one in 64-bit mode only.
            if seg == Seg::Ss && !(self.long() && cpl != 3 && rpl == cpl) {
                return Self::fault(Exception::PROTECTION);
            }
            let state = SegmentState {
                selector,
                access: UNUSABLE | u32::from(cpl) << 5,
                ..SegmentState::default()
            };
            return Ok(Loaded { state, mark: None });
        }
        let loaded = self.ordinary(selector)?;
        let access = loaded.state.access;
        let level = dpl(access);
        let code = access & CODE != 0;
        let usable = match seg {
            Seg::Ss => !code && access & READ_WRITE != 0 && level == cpl && rpl == cpl,
            _ if code && access & READ_WRITE == 0 => false,
            _ if code && access & CONFORMING != 0 => true,
            _ => level >= rpl.max(cpl),
        };
        if access & NON_SYSTEM == 0 || !usable {
            return refuse(PROTECTION, selector);
        }
        if access & PRESENT == 0 {
            let vector = if seg == Seg::Ss { STACK } else { NOT_PRESENT };
            return refuse(vector, selector);
        }
        Ok(loaded)
    }

    /// Checks the load of CS without a change of privilege, and the target in it.
    fn code_segment(&mut self, selector: u16, target: u64, how: Transfer) -> Outcome<Loaded> {
        if !self.is_protected() {
            let loaded = self.real_segment(Seg::Cs, selector);
            return Self::within(loaded, target);
        }
        if selector & 0xfffc == 0 {
            return Self::fault(Exception::PROTECTION);
        }
        let mut loaded = self.ordinary(selector)?;
        let access = loaded.state.access;
        let (cpl, rpl) = (self.machine.cpl(), (selector & 3) as u8);
        if access & NON_SYSTEM == 0 && how == Transfer::Forward {
            // A call gate; outside of IA-32e mode a task gate or an available TSS
            // too. The other types are as wrong as data.
            let types = match self.machine.long_mode() {
                true => GATES_LONG,
                false => GATES,
            };
            if types.wrapping_shr(access & 0xf) & 1 != 0 {
                return Err(Stop::UNSUPPORTED);
            }
        }
        if how == Transfer::Return && rpl > cpl {
            return Err(Stop::UNSUPPORTED);
        }
        let level_fits = match access & CONFORMING != 0 {
            true => dpl(access) <= cpl,
            false => dpl(access) == cpl && rpl <= cpl,
        };
        let rpl_fits = how == Transfer::Forward || rpl == cpl;
        let long = self.machine.long_mode() && access & LONG != 0;
        let fits = access & (NON_SYSTEM | CODE) == NON_SYSTEM | CODE
            && level_fits
            && rpl_fits
            && !(long && access & BIG != 0);
        if !fits {
            return refuse(PROTECTION, selector);
        }
        if access & PRESENT == 0 {
            return refuse(NOT_PRESENT, selector);
        }
        loaded.state.selector = selector & 0xfffc | u16::from(cpl);
        if !long {
            return Self::within(loaded, target);
        }
        if self.is_canonical(target) {
            Ok(loaded)
        } else {
            Self::fault(Exception::PROTECTION)
        }
    }

    fn within(loaded: Loaded, target: u64) -> Outcome<Loaded> {
        if target <= u64::from(loaded.state.limit) {
            Ok(loaded)
        } else {
            Self::fault(Exception::PROTECTION)
        }
    }

    /// Sets the accessed or busy bit of a descriptor by a locked update of its
    /// byte; ROM keeps what it has.
    #[inline(never)]
    pub(super) fn mark(&mut self, loaded: &Loaded) -> Outcome<()> {
        if let Some((linear, bit)) = loaded.mark {
            let gpa = self.system_address(linear.wrapping_add(5), true)?;
            if self.served(|machine| machine.backing(gpa, true))? == Backing::Ram {
                let byte = u128::from(loaded.state.access & 0xff);
                let old = byte & !u128::from(bit);
                if !self.served(|machine| machine.compare_exchange(gpa, 1, old, byte))? {
                    return Err(Stop::AGAIN);
                }
            }
        }
        Ok(())
    }

    /// Loads a register that was checked.
    fn commit_segment(&mut self, seg: Seg, loaded: &Loaded) -> Outcome<()> {
        self.mark(loaded)?;
        self.machine.set_segment(seg, loaded.state);
        Ok(())
    }

    /// MOV to a segment register, and POP of one: the stack is popped when the load
    /// has succeeded.
    pub(super) fn load_segment(&mut self, seg: Seg, selector: u16) -> Outcome<()> {
        let loaded = self.data_segment(seg, selector)?;
        self.commit_segment(seg, &loaded)?;
        if seg == Seg::Ss {
            self.machine.set_blocking(Blocking::MovSs);
        }
        Ok(())
    }

    /// LDS, LES, LSS, LFS, LGS.
    pub(super) fn load_far(&mut self, seg: Seg) -> Outcome<()> {
        let (offset, selector) = self.far_pointer(1)?;
        // LSS needs no shadow: it sets rSP as well.
        let loaded = self.data_segment(seg, selector)?;
        self.commit_segment(seg, &loaded)?;
        let destination = self.place(0, Intent::Write)?;
        self.put(destination, offset)
    }

    /// CALL and JMP, far.
    #[inline(never)]
    pub(super) fn far_branch(&mut self) -> Outcome<Next> {
        let call = self.insn.op == Op::CallFar;
        let (target, selector) = self.far_pointer(0)?;
        let loaded = self.code_segment(selector, target, Transfer::Forward)?;
        if call {
            let size = self.size();
            let old = self.machine.segment(Seg::Cs).selector;
            let bits = u32::from(size).wrapping_mul(8);
            let frame = u128::from(old).wrapping_shl(bits) | u128::from(self.next_rip());
            let (span, top) = self.room(size.wrapping_mul(2))?;
            self.store(&span, frame)?;
            self.commit_segment(Seg::Cs, &loaded)?;
            self.set_stack_pointer(top);
        } else {
            self.commit_segment(Seg::Cs, &loaded)?;
        }
        Ok(Next::Jump(target))
    }

    /// An element of what a far return pops.
    fn popped(frame: &[u8; 40], size: u8, index: usize) -> u64 {
        let mut value = [0u8; 8];
        let from = usize::from(size).wrapping_mul(index);
        let until = from.wrapping_add(size.into());
        for (to, from) in value
            .iter_mut()
            .zip(frame.get(from..until).unwrap_or_default())
        {
            *to = *from;
        }
        u64::from_le_bytes(value)
    }

    fn pop_frame(&mut self, elements: u8) -> Outcome<([u8; 40], u64)> {
        let mut frame = [0; 40];
        let (span, top): (Span, u64) = self.top(self.size().wrapping_mul(elements))?;
        self.read(&span, &mut frame)?;
        Ok((frame, top))
    }

    /// RET, far, to the same privilege level.
    #[inline(never)]
    pub(super) fn far_return(&mut self) -> Outcome<Next> {
        let size = self.size();
        let (frame, top) = self.pop_frame(2)?;
        let target = Self::popped(&frame, size, 0);
        let selector = Self::popped(&frame, size, 1) as u16;
        let released = match self.operand(0) {
            Operand::Imm(count) => count,
            _ => 0,
        };
        let loaded = self.code_segment(selector, target, Transfer::Return)?;
        self.commit_segment(Seg::Cs, &loaded)?;
        self.set_stack_pointer(top.wrapping_add(released));
        Ok(Next::Jump(target))
    }

    /// IRET to the same privilege level. In 64-bit mode it loads the stack too (SDM 3A
    /// 6.14.3 "IRET in IA-32e Mode").
    #[inline(never)]
    pub(super) fn interrupt_return(&mut self) -> Outcome<Next> {
        let flags = self.machine.rflags();
        let protected = self.is_protected();
        if protected && flags & FLAG_NT != 0 {
            // A task return; in long mode there are none.
            return match self.machine.long_mode() {
                true => Self::fault(Exception::PROTECTION),
                false => Err(Stop::UNSUPPORTED),
            };
        }
        self.check_flag_access()?;
        let (size, long) = (self.size(), self.long());
        let (frame, top) = self.pop_frame(if long { 5 } else { 3 })?;
        let target = Self::popped(&frame, size, 0);
        let selector = Self::popped(&frame, size, 1) as u16;
        let new = Self::popped(&frame, size, 2);
        if protected && !long && size == 4 && new & FLAG_VM != 0 && self.machine.cpl() == 0 {
            return Err(Stop::UNSUPPORTED);
        }
        let code = self.code_segment(selector, target, Transfer::Return)?;
        if long {
            let stack = Self::popped(&frame, size, 4) as u16;
            let stack = self.data_segment(Seg::Ss, stack)?;
            self.commit_segment(Seg::Ss, &stack)?;
        }
        self.commit_segment(Seg::Cs, &code)?;
        if long {
            self.set_reg(Gpr::Rsp, size, Self::popped(&frame, size, 3));
        } else {
            self.set_stack_pointer(top);
        }
        self.set_flags(new, size, if size == 2 { 0 } else { RESUME });
        self.machine.set_blocking(Blocking::NmiEnds);
        Ok(match size {
            2 => Next::Jump(target),
            _ => Next::Return(target),
        })
    }

    /// MOV to a segment register.
    pub(super) fn move_to_segment(&mut self, seg: Seg) -> Outcome<()> {
        let source = self.place(1, Intent::Read)?;
        let selector = self.get(source)? as u16;
        self.load_segment(seg, selector)
    }
}
