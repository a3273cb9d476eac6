//! Loading segment registers, far branches without a change of privilege, and
//! the instructions that store and load descriptor-table registers. SDM 3A 3.4
//! "Logical and Linear Addresses", 5.5 "Type Checking", 5.6 "Privilege Levels",
//! 5.8 "Privilege Level Checking When Transferring Program Control ..."; 2A "CALL",
//! "IRET", "JMP", "LDS/LES/LFS/LGS/LSS", 2B "MOV", "RET".
//!
//! Firmware brings these here whose GDT lies in ROM: the processor cannot set the
//! accessed bit of a descriptor there, and exits. Call gates, task switches and
//! returns to an outer privilege level are not emulated.

use super::access::{Intent, Place, Span};
use super::address::truncate;
use super::flags::{ZF, mask, when};
use super::{Next, Outcome, RESUME, Run};
use crate::emulate::Step;
use crate::emulate::insn::{Op, Operand};
use crate::emulate::machine::{
    Access, Backing, Blocking, Exception, Gpr, Machine, Seg, SegmentState, Table,
};

/// Bits of a segment's access rights: SDM 3C 25.4.1.
const ACCESSED: u32 = 1 << 0;
const READ_WRITE: u32 = 1 << 1;
const CONFORMING: u32 = 1 << 2;
const CODE: u32 = 1 << 3;
const NON_SYSTEM: u32 = 1 << 4;
const PRESENT: u32 = 1 << 7;
const LONG: u32 = 1 << 13;
const BIG: u32 = 1 << 14;
const GRANULAR: u32 = 1 << 15;
const UNUSABLE: u32 = 1 << 16;
/// S and the type, and the system types: SDM 3A 3.5 "System Descriptor Types",
/// table 3-2.
const TYPE: u32 = 0x1f;
const TSS16: u32 = 1;
const LDT: u32 = 2;
const TSS: u32 = 9;
/// The types a far branch may name, bit n for type n: without and with IA-32e
/// mode.
const GATES: u16 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 12;
const GATES_LONG: u16 = 1 << 12;
/// Makes an available TSS a busy one.
const BUSY: u32 = 2;

const CR4_UMIP: u64 = 1 << 11;
const FLAG_NT: u64 = 1 << 14;
const FLAG_VM: u64 = 1 << 17;

/// The vectors whose error code is a selector.
const NOT_PRESENT: u8 = 11;
const STACK: u8 = 12;
const PROTECTION: u8 = 13;

/// Who loads CS.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Transfer {
    Forward,
    Return,
}

/// A segment register and its descriptor, checked but not loaded.
struct Loaded {
    state: SegmentState,
    /// Where the descriptor is, if a bit is to be set in it, and which of its
    /// rights: accessed or busy.
    mark: Option<(u64, u32)>,
}

const fn dpl(access: u32) -> u8 {
    (access >> 5 & 3) as u8
}

fn refuse<T>(vector: u8, selector: u16) -> Outcome<T> {
    let code = u32::from(selector & 0xfffc);
    Err(Step::Fault(Exception::with_code(vector, code)))
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
        Ok(self.machine.translate(linear, access)?)
    }

    /// Reads a descriptor of 8 or 16 bytes, and tells where it is.
    #[inline(never)]
    fn descriptor(&mut self, selector: u16, len: u8) -> Outcome<(u64, u128)> {
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
            if self.machine.backing(gpa, false)? == Backing::Mmio {
                return Err(Step::Unsupported);
            }
            self.machine.read_ram(gpa, core::slice::from_mut(byte))?;
        }
        Ok((linear, u128::from_le_bytes(bytes)))
    }

    /// The state that a descriptor describes.
    #[inline(never)]
    fn described(selector: u16, raw: u128) -> SegmentState {
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
                return Err(Step::Unsupported);
            }
        }
        if how == Transfer::Return && rpl > cpl {
            return Err(Step::Unsupported);
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
    fn mark(&mut self, loaded: &Loaded) -> Outcome<()> {
        if let Some((linear, bit)) = loaded.mark {
            let gpa = self.system_address(linear.wrapping_add(5), true)?;
            if self.machine.backing(gpa, true)? == Backing::Ram {
                let byte = u128::from(loaded.state.access & 0xff);
                let old = byte & !u128::from(bit);
                if !self.machine.compare_exchange(gpa, 1, old, byte)? {
                    return Err(Step::Again);
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
        self.put(&destination, offset)
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
                false => Err(Step::Unsupported),
            };
        }
        self.check_flag_access()?;
        let (size, long) = (self.size(), self.long());
        let (frame, top) = self.pop_frame(if long { 5 } else { 3 })?;
        let target = Self::popped(&frame, size, 0);
        let selector = Self::popped(&frame, size, 1) as u16;
        let new = Self::popped(&frame, size, 2);
        if protected && !long && size == 4 && new & FLAG_VM != 0 && self.machine.cpl() == 0 {
            return Err(Step::Unsupported);
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

    /// The instructions that UMIP keeps from user programs: SDM 3A 2.5 "Control
    /// Registers".
    fn check_umip(&self) -> Outcome<()> {
        if self.machine.cr4() & CR4_UMIP != 0 && self.machine.cpl() != 0 {
            return Self::fault(Exception::PROTECTION);
        }
        Ok(())
    }

    /// SLDT, STR, SMSW.
    pub(super) fn store_system(&mut self) -> Outcome<()> {
        let value = match self.insn.op {
            Op::Smsw => self.machine.cr0(),
            op => {
                self.require_protected()?;
                let ldt = op == Op::Sldt;
                let table = if ldt { Table::Ldt } else { Table::Task };
                self.machine.table(table).selector.into()
            }
        };
        self.check_umip()?;
        let destination = self.place(0, Intent::Write)?;
        self.put(&destination, value)
    }

    /// SGDT, SIDT, LGDT, LIDT.
    pub(super) fn descriptor_table(&mut self) -> Outcome<()> {
        let Operand::Mem(mem) = self.operand(0) else {
            return Err(Step::Unsupported);
        };
        let op = self.insn.op;
        let table = match op {
            Op::Sgdt | Op::Lgdt => Table::Gdt,
            _ => Table::Idt,
        };
        if matches!(op, Op::Sgdt | Op::Sidt) {
            self.check_umip()?;
            let state = self.machine.table(table);
            let value = u128::from(state.base) << 16 | u128::from(state.limit & 0xffff);
            let span = self.memory(&mem, 0, Intent::Write)?;
            return self.store(&span, value);
        }
        if self.machine.cpl() != 0 {
            return Self::fault(Exception::PROTECTION);
        }
        let span = self.memory(&mem, 0, Intent::Read)?;
        let value = self.load(&span)?;
        let (limit, base) = (value as u16, (value >> 16) as u64);
        let base = match (self.long(), self.size()) {
            (true, _) if !self.is_canonical(base) => return Self::fault(Exception::PROTECTION),
            (true, _) => base,
            (false, 2) => base & 0xff_ffff,
            (false, _) => base & 0xffff_ffff,
        };
        let state = SegmentState {
            base,
            limit: limit.into(),
            ..SegmentState::default()
        };
        self.machine.set_table(table, state);
        Ok(())
    }

    /// #UD in real-address and virtual-8086 mode, which do not know the
    /// instruction.
    fn require_protected(&self) -> Outcome<()> {
        match self.is_protected() {
            true => Ok(()),
            false => Self::fault(Exception::INVALID_OPCODE),
        }
    }

    /// LLDT and LTR. In IA-32e mode the descriptors have 16 bytes, and a base
    /// that is not canonical is refused (SDM 3A 3.5.2 "Segment Descriptor Tables
    /// in IA-32e Mode", 7.2.3 "TSS Descriptor in 64-bit mode").
    #[inline(never)]
    pub(super) fn load_system(&mut self) -> Outcome<()> {
        self.require_protected()?;
        if self.machine.cpl() != 0 {
            return Self::fault(Exception::PROTECTION);
        }
        let task = self.insn.op == Op::Ltr;
        let table = if task { Table::Task } else { Table::Ldt };
        let selector = self.fetch(0)? as u16;
        if selector & 0xfffc == 0 {
            if task {
                return Self::fault(Exception::PROTECTION);
            }
            let state = SegmentState {
                selector,
                access: UNUSABLE,
                ..SegmentState::default()
            };
            self.machine.set_table(table, state);
            return Ok(());
        }
        let long = self.machine.long_mode();
        if selector & 4 != 0 {
            return refuse(PROTECTION, selector);
        }
        let (linear, raw) = self.descriptor(selector, if long { 16 } else { 8 })?;
        let mut state = Self::described(selector, raw);
        let fits = match state.access & TYPE {
            LDT => !task,
            TSS => task,
            TSS16 => task && !long,
            _ => false,
        };
        if !fits || !self.is_canonical(state.base) {
            return refuse(PROTECTION, selector);
        }
        if state.access & PRESENT == 0 {
            return refuse(NOT_PRESENT, selector);
        }
        let mut mark = None;
        if task {
            state.access |= BUSY;
            mark = Some((linear, BUSY));
        }
        self.mark(&Loaded { state, mark })?;
        self.machine.set_table(table, state);
        Ok(())
    }

    /// LAR, LSL, VERR and VERW: is there a descriptor of a fitting type that the
    /// privilege level may look at? What it says, by their rules, or ZF clear.
    #[inline(never)]
    pub(super) fn inspect_segment(&mut self) -> Outcome<()> {
        self.require_protected()?;
        let op = self.insn.op;
        let shows = matches!(op, Op::Lar | Op::Lsl);
        let selector = self.fetch(usize::from(shows))? as u16;
        let found = match self.descriptor(selector, 8) {
            _ if selector & 0xfffc == 0 => None,
            Ok((_, raw)) => self.inspected(Self::described(selector, raw), raw as u64),
            Err(Step::Fault(Exception {
                vector: PROTECTION, ..
            })) => None,
            Err(step) => return Err(step),
        };
        if let (Some(value), true) = (found, shows) {
            let destination = self.place(0, Intent::Write)?;
            self.put(&destination, value)?;
        }
        self.commit_flags(ZF, when(found.is_some(), ZF));
        Ok(())
    }

    /// What LAR or LSL returns of a descriptor; `None` if it fails. SDM 2A "LAR",
    /// "LSL", 2B "VERR/VERW". Bits 19:16 of what LAR returns are undefined.
    fn inspected(&self, state: SegmentState, raw: u64) -> Option<u64> {
        /// Bit n: type n is valid, outside of IA-32e mode and in it.
        const LAR: [u16; 2] = [0b0001_1010_0011_1110, 0b0001_1010_0000_0100];
        const LSL: [u16; 2] = [0b0000_1010_0000_1110, 0b0000_1010_0000_0100];
        let op = self.insn.op;
        let access = state.access;
        let long = usize::from(self.machine.long_mode());
        let system = |types: [u16; 2]| {
            let valid = types.get(long).copied().unwrap_or(0);
            valid.wrapping_shr(access & 0xf) & 1 != 0
        };
        let (code, flag) = (access & CODE != 0, access & READ_WRITE != 0);
        let fits = match op {
            _ if access & NON_SYSTEM == 0 => match op {
                Op::Lar => system(LAR),
                Op::Lsl => system(LSL),
                _ => false,
            },
            Op::Verr => !code || flag,
            Op::Verw => !code && flag,
            _ => true,
        };
        let conforming = NON_SYSTEM | CODE | CONFORMING;
        let rpl = (state.selector & 3) as u8;
        let level_fits =
            access & conforming == conforming || dpl(access) >= rpl.max(self.machine.cpl());
        let value = match op {
            Op::Lar => raw >> 32 & 0xff_ff00,
            _ => state.limit.into(),
        };
        (fits && level_fits).then_some(value)
    }

    /// LMSW: PE can be set and not cleared (SDM 2A "LMSW").
    pub(super) fn load_status(&mut self) -> Outcome<()> {
        if self.machine.cpl() != 0 {
            return Self::fault(Exception::PROTECTION);
        }
        let status = self.fetch(0)? as u16;
        self.machine.load_status(status);
        Ok(())
    }

    /// MOV to a segment register.
    pub(super) fn move_to_segment(&mut self, seg: Seg) -> Outcome<()> {
        let source: Place = self.place(1, Intent::Read)?;
        let selector = self.get(&source)? as u16;
        self.load_segment(seg, selector)
    }
}
