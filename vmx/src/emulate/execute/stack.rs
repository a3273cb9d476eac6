//! The stack instructions and the near branches that use it or memory. SDM 2B
//! "PUSH", "POP", 2A "CALL", "JMP", "LEAVE", 2B "RET"; SDM 1 6.2 "Stacks".

use super::access::{Intent, Span};
use super::address::truncate;
use super::flags::mask;
use super::{Next, Outcome, RESUME, Run, Stop};
use crate::emulate::insn::Operand;
use crate::emulate::machine::{Exception, Gpr, Machine, Seg};

/// The flags POPF loads at CPL 0: SDM 2B "POPF/POPFD/POPFQ", table 4-16. ID, AC, NT,
/// IOPL, OF, DF, IF, TF and the status flags.
const FLAGS_LOADED: u64 = 0x24_7fd5;
const FLAG_IF: u64 = 1 << 9;
/// RFLAGS.VM, RFLAGS.IOPL, CR4.VME, and the B bit in SS' access rights.
const FLAG_VM: u64 = 1 << 17;
const FLAG_IOPL: u64 = 3 << 12;
const CR4_VME: u64 = 1 << 0;
const BIG: u32 = 1 << 14;

/// The order PUSHA stores in, from the lowest address up.
const ALL: [Gpr; 8] = [
    Gpr::Rdi,
    Gpr::Rsi,
    Gpr::Rbp,
    Gpr::Rsp,
    Gpr::Rbx,
    Gpr::Rdx,
    Gpr::Rcx,
    Gpr::Rax,
];

impl<M: Machine> Run<'_, M> {
    /// Bytes of the stack pointer in use (SDM 1 6.2.3 "Address-Size Attributes
    /// for Stack Accesses").
    fn stack_size(&self) -> u8 {
        if self.long() {
            8
        } else if self.machine.segment(Seg::Ss).access & BIG != 0 {
            4
        } else {
            2
        }
    }

    /// Bytes of an element, where no operand tells it.
    fn element_size(&self) -> u8 {
        if self.long() && self.size() != 2 {
            8
        } else {
            self.size()
        }
    }

    /// Bytes of a branch target.
    fn branch_size(&self) -> u8 {
        if self.long() { 8 } else { self.size() }
    }

    /// Room for `size` bytes on top of the stack, and the new stack pointer.
    #[inline(never)]
    pub(super) fn room(&mut self, size: u8) -> Outcome<(Span, u64)> {
        let width = self.stack_size();
        let top = self.machine.gpr(Gpr::Rsp).wrapping_sub(u64::from(size));
        let top = truncate(top, width);
        Ok((self.segmented(Seg::Ss, top, size, Intent::Write)?, top))
    }

    /// The `size` bytes on top of the stack, and the stack pointer after them.
    #[inline(never)]
    pub(super) fn top(&mut self, size: u8) -> Outcome<(Span, u64)> {
        let width = self.stack_size();
        let top = truncate(self.machine.gpr(Gpr::Rsp), width);
        let span = self.segmented(Seg::Ss, top, size, Intent::Read)?;
        Ok((span, truncate(top.wrapping_add(u64::from(size)), width)))
    }

    #[inline(never)]
    pub(super) fn set_stack_pointer(&mut self, value: u64) {
        let width = self.stack_size();
        self.set_reg(Gpr::Rsp, width, value);
    }

    #[inline(never)]
    fn push_value(&mut self, value: u64, size: u8) -> Outcome<()> {
        let (span, top) = self.room(size)?;
        self.store(&span, u128::from(value))?;
        self.set_stack_pointer(top);
        Ok(())
    }

    /// PUSH.
    #[inline(never)]
    pub(super) fn push(&mut self) -> Outcome<()> {
        let size = self.element_size();
        if let Operand::Seg(seg) = self.operand(0) {
            return self.push_segment(seg, size);
        }
        let source = self.place(0, Intent::Read)?;
        // Find the stack's faults before a device is read.
        self.room(size)?;
        let value = self.get(source)?;
        self.push_value(value, size)
    }

    /// PUSH of a segment register: processors write the selector's two bytes and
    /// leave what is above them (SDM 2B "PUSH").
    fn push_segment(&mut self, seg: Seg, size: u8) -> Outcome<()> {
        let selector = self.machine.segment(seg).selector;
        let width = self.stack_size();
        let top = self.machine.gpr(Gpr::Rsp).wrapping_sub(u64::from(size));
        let top = truncate(top, width);
        let span = self.segmented(Seg::Ss, top, 2, Intent::Write)?;
        self.store(&span, u128::from(selector))?;
        self.set_stack_pointer(top);
        Ok(())
    }

    /// POP. A destination addressed through rSP uses its new value; a
    /// destination that is rSP keeps what was popped.
    #[inline(never)]
    pub(super) fn pop(&mut self) -> Outcome<()> {
        let (span, top) = self.top(self.element_size())?;
        if let Operand::Seg(seg) = self.operand(0) {
            let selector = self.load(&span)? as u16;
            // A new SS may have another size of stack pointer: set the old one.
            let width = self.stack_size();
            self.load_segment(seg, selector)?;
            self.set_reg(Gpr::Rsp, width, top);
            return Ok(());
        }
        let destination = match self.operand(0) {
            Operand::Mem(mem) => {
                let moved = if mem.base == Some(Gpr::Rsp) {
                    let old = self.machine.gpr(Gpr::Rsp);
                    let kept = match self.stack_size() {
                        2 => old & !0xffff,
                        _ => 0,
                    };
                    (kept | top).wrapping_sub(old)
                } else {
                    0
                };
                let span = self.memory(&mem, moved, Intent::Write)?;
                self.resolved_to(0, span)
            }
            operand => self.resolve(0, operand, Intent::Write)?,
        };
        let value = self.load(&span)? as u64;
        if self.is_memory(destination) {
            self.put(destination, value)?;
            self.set_stack_pointer(top);
            return Ok(());
        }
        self.set_stack_pointer(top);
        self.put(destination, value)
    }

    /// PUSHA and PUSHAD, as one access.
    #[inline(never)]
    pub(super) fn push_all(&mut self) -> Outcome<()> {
        let size = self.size();
        let mut bytes = [0u8; 32];
        for (to, reg) in bytes.chunks_exact_mut(usize::from(size.max(1))).zip(ALL) {
            let value = self.machine.gpr(reg).to_le_bytes();
            for (to, from) in to.iter_mut().zip(value) {
                *to = from;
            }
        }
        let (span, top) = self.room(size.wrapping_mul(8))?;
        self.write(&span, &bytes)?;
        self.set_stack_pointer(top);
        Ok(())
    }

    /// POPA and POPAD; the stored stack pointer is skipped.
    #[inline(never)]
    pub(super) fn pop_all(&mut self) -> Outcome<()> {
        let size = self.size();
        let (span, top) = self.top(size.wrapping_mul(8))?;
        let mut bytes = [0u8; 32];
        self.read(&span, &mut bytes)?;
        for (from, reg) in bytes.chunks_exact(usize::from(size.max(1))).zip(ALL) {
            let mut value = [0u8; 8];
            for (to, from) in value.iter_mut().zip(from) {
                *to = *from;
            }
            if reg != Gpr::Rsp {
                self.set_reg(reg, size, u64::from_le_bytes(value));
            }
        }
        self.set_stack_pointer(top);
        Ok(())
    }

    /// PUSHF. In virtual-8086 mode it needs IOPL 3; with CR4.VME and a lower
    /// IOPL it would push the virtual interrupt flag, which is not emulated.
    pub(super) fn push_flags(&mut self) -> Outcome<()> {
        self.check_flag_access()?;
        let flags = self.machine.rflags();
        self.push_value(flags & !(FLAG_VM | RESUME), self.element_size())
    }

    /// PUSHF, POPF and IRET in virtual-8086 mode.
    pub(super) fn check_flag_access(&self) -> Outcome<()> {
        let flags = self.machine.rflags();
        if flags & FLAG_VM != 0 && flags & FLAG_IOPL != FLAG_IOPL {
            if self.machine.cr4() & CR4_VME != 0 {
                return Err(Stop::UNSUPPORTED);
            }
            return Self::fault(Exception::PROTECTION);
        }
        Ok(())
    }

    /// POPF.
    pub(super) fn pop_flags(&mut self) -> Outcome<()> {
        self.check_flag_access()?;
        let size = self.element_size();
        let (span, top) = self.top(size)?;
        let value = self.load(&span)? as u64;
        self.set_stack_pointer(top);
        self.set_flags(value, size, 0);
        Ok(())
    }

    /// Loads `size` bytes of RFLAGS as POPF and IRET do, with `more` flags that only
    /// the caller may change: IOPL only at CPL 0, IF only up to IOPL.
    pub(super) fn set_flags(&mut self, value: u64, size: u8, more: u64) {
        let old = self.machine.rflags();
        let cpl = u64::from(self.machine.cpl());
        let mut writable = FLAGS_LOADED | more;
        if cpl != 0 {
            writable &= !FLAG_IOPL;
        }
        if cpl > old >> 12 & 3 {
            writable &= !FLAG_IF;
        }
        self.commit_flags(writable & mask(size), value);
    }

    /// ENTER. The frame pointer, the copied frame pointers and the new one go onto
    /// the stack as one access; deep nesting does not fit into one.
    #[inline(never)]
    pub(super) fn enter(&mut self) -> Outcome<()> {
        let (size, width) = (self.element_size(), self.stack_size());
        let (Operand::Imm(locals), Operand::Imm(level)) = (self.operand(0), self.operand(1)) else {
            return Err(Stop::UNSUPPORTED);
        };
        let level = level as u8 & 31;
        let count = level.wrapping_add(1);
        let mut bytes = [0u8; 64];
        let used = usize::from(size).wrapping_mul(count.into());
        if used > bytes.len() {
            return Err(Stop::UNSUPPORTED);
        }
        let old_top = self.machine.gpr(Gpr::Rsp);
        let frame = truncate(old_top.wrapping_sub(size.into()), width);
        // Pushed one by one, so the highest faults first.
        for index in 0..u64::from(count) {
            let place = frame.wrapping_sub(index.wrapping_mul(size.into()));
            self.segmented(Seg::Ss, truncate(place, width), size, Intent::Write)?;
        }
        // On a 16-bit stack the rest of the stack pointer stays.
        let kept = if width == 2 { old_top & !0xffff } else { 0 };
        let frame = kept | frame;
        let (room, bottom) = self.room(used as u8)?;
        // A write at the final stack pointer must be possible.
        let top = truncate(bottom.wrapping_sub(locals), width);
        self.segmented(Seg::Ss, top, size, Intent::Write)?;
        let frame_pointer = self.machine.gpr(Gpr::Rbp);
        let mut from = frame_pointer;
        for index in 0..count {
            // The first is the highest.
            let at = usize::from(level.wrapping_sub(index)).wrapping_mul(size.into());
            let value = if index == 0 {
                frame_pointer
            } else if index == level {
                frame
            } else {
                from = from.wrapping_sub(size.into());
                let source = truncate(from, width);
                let span = self.segmented(Seg::Ss, source, size, Intent::Read)?;
                let mut copied = (self.load(&span)? as u64).to_le_bytes();
                // What was pushed a moment ago is not in memory yet.
                let pushed = at.wrapping_add(size.into());
                for (offset, byte) in (0u64..).zip(copied.iter_mut()) {
                    let ahead = source.wrapping_add(offset).wrapping_sub(bottom);
                    let place = usize::try_from(ahead).unwrap_or(used);
                    if (pushed..used).contains(&place) {
                        *byte = bytes.get(place).copied().unwrap_or(0);
                    }
                }
                u64::from_le_bytes(copied) & mask(size)
            };
            let to = bytes.iter_mut().skip(at).take(size.into());
            for (to, from) in to.zip(value.to_le_bytes()) {
                *to = from;
            }
        }
        self.write(&room, &bytes)?;
        self.set_reg(Gpr::Rbp, size, frame);
        self.set_stack_pointer(top);
        Ok(())
    }

    /// LEAVE.
    pub(super) fn leave(&mut self) -> Outcome<()> {
        let (size, width) = (self.element_size(), self.stack_size());
        let frame = self.reg(Gpr::Rbp, width);
        let span = self.segmented(Seg::Ss, frame, size, Intent::Read)?;
        let value = self.load(&span)? as u64;
        self.set_stack_pointer(frame.wrapping_add(u64::from(size)));
        self.set_reg(Gpr::Rbp, size, value);
        Ok(())
    }

    /// Checks a branch target: canonical in 64-bit mode, else within CS.
    fn target(&self, value: u64) -> Outcome<u64> {
        let target = value & mask(self.branch_size());
        let valid = if self.long() {
            self.is_canonical(target)
        } else {
            target <= u64::from(self.machine.segment(Seg::Cs).limit)
        };
        if valid {
            Ok(target)
        } else {
            Self::fault(Exception::PROTECTION)
        }
    }

    /// The target of CALL or JMP.
    #[inline(never)]
    fn branch_target(&mut self) -> Outcome<u64> {
        let value = match self.operand(0) {
            Operand::Imm(ahead) => self.next_rip().wrapping_add(ahead),
            _ => self.fetch(0)?,
        };
        self.target(value)
    }

    /// CALL, near.
    pub(super) fn call(&mut self) -> Outcome<Next> {
        let size = self.branch_size();
        // Find the operand's faults, then the stack's, before a device is read.
        self.place(0, Intent::Read)?;
        self.room(size)?;
        let target = self.branch_target()?;
        self.push_value(self.next_rip(), size)?;
        Ok(Next::Jump(target))
    }

    /// JMP, near, through a register or memory.
    pub(super) fn jump(&mut self) -> Outcome<Next> {
        Ok(Next::Jump(self.branch_target()?))
    }

    /// RET, near.
    pub(super) fn ret(&mut self) -> Outcome<Next> {
        let (span, top) = self.top(self.branch_size())?;
        let value = self.load(&span)? as u64;
        let target = self.target(value)?;
        let released = match self.operand(0) {
            Operand::Imm(count) => count,
            _ => 0,
        };
        self.set_stack_pointer(top.wrapping_add(released));
        Ok(Next::Jump(target))
    }
}
