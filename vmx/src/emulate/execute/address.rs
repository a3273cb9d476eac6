//! Effective and linear addresses: address size, segment base, limit and
//! rights, canonical form, alignment.

use super::access::{Intent, Span};
use super::{Outcome, Run};
use crate::emulate::insn::Mem;
use crate::emulate::machine::{Exception, Machine, Mode, Seg, SegmentState};

/// CR0.PE, CR0.AM, RFLAGS.VM, RFLAGS.AC.
const CR0_PE: u64 = 1 << 0;
const CR0_AM: u64 = 1 << 18;
const FLAG_VM: u64 = 1 << 17;
const FLAG_AC: u64 = 1 << 18;

/// Bits of a segment's access rights: SDM 3C 25.4.1.
const TYPE_WRITE_OR_READ: u32 = 1 << 1;
const TYPE_EXPAND_DOWN: u32 = 1 << 2;
const TYPE_CODE: u32 = 1 << 3;
const PRESENT: u32 = 1 << 7;
const BIG: u32 = 1 << 14;
const UNUSABLE: u32 = 1 << 16;

/// Cuts an address down to `size` bytes.
pub(super) const fn truncate(address: u64, size: u8) -> u64 {
    match size {
        2 => address & 0xffff,
        4 => address & 0xffff_ffff,
        _ => address,
    }
}

impl<M: Machine> Run<'_, M> {
    /// Protected mode without virtual-8086 mode: segment types count.
    pub(super) fn is_protected(&self) -> bool {
        self.machine.cr0() & CR0_PE != 0 && self.machine.rflags() & FLAG_VM == 0
    }

    /// The offset a memory operand names, plus `extra`, within the address size.
    #[inline(never)]
    pub(super) fn offset(&self, mem: &Mem, extra: u64) -> u64 {
        let mut offset = mem.disp.wrapping_add(extra);
        if let Some(base) = mem.base {
            offset = offset.wrapping_add(self.machine.gpr(base));
        }
        if let Some(index) = mem.index {
            let index = self.machine.gpr(index);
            offset = offset.wrapping_add(index.wrapping_shl(u32::from(mem.scale)));
        }
        if mem.rip_relative {
            offset = offset.wrapping_add(self.next_rip());
        }
        truncate(offset, self.insn.address_size)
    }

    /// Resolves a memory operand, with `extra` added to its offset.
    #[inline(never)]
    pub(super) fn memory(&mut self, mem: &Mem, extra: u64, intent: Intent) -> Outcome<Span> {
        let offset = self.offset(mem, extra);
        self.segmented(mem.seg, offset, mem.size, intent)
    }

    /// Checks and translates `size` bytes at `offset` in a segment.
    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn segmented(
        &mut self,
        seg: Seg,
        offset: u64,
        size: u8,
        intent: Intent,
    ) -> Outcome<Span> {
        let linear = self.linear(seg, offset, size, intent)?;
        let span = self.span(linear, size, intent)?;
        self.check_alignment(linear, size)?;
        self.machine
            .note_access(linear, size, intent != Intent::Read);
        Ok(span)
    }

    /// The linear address of `size` bytes at `offset`, or #GP, or #SS if the
    /// segment is SS.
    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn linear(
        &mut self,
        seg: Seg,
        offset: u64,
        size: u8,
        intent: Intent,
    ) -> Outcome<u64> {
        let state = self.machine.segment(seg);
        let refused = if seg == Seg::Ss {
            Exception::STACK
        } else {
            Exception::PROTECTION
        };
        let more = u64::from(size.max(1)).wrapping_sub(1);
        let linear = self.unchecked_linear(seg, offset);
        if self.insn.mode == Mode::Bits64 {
            let last = linear.wrapping_add(more);
            if !(self.is_canonical(linear) && self.is_canonical(last)) {
                return Self::fault(refused);
            }
            return Ok(linear);
        }
        let rights_hold = !self.is_protected() || may_access(&state, intent);
        if !rights_hold || !within_limit(&state, offset, offset.wrapping_add(more)) {
            return Self::fault(refused);
        }
        Ok(linear)
    }

    /// Segment base plus offset.
    pub(super) fn unchecked_linear(&self, seg: Seg, offset: u64) -> u64 {
        let base = self.machine.segment(seg).base;
        match (self.insn.mode, seg) {
            // Only FS and GS have a base there (SDM 1 3.4.2.1).
            (Mode::Bits64, Seg::Fs | Seg::Gs) => base.wrapping_add(offset),
            (Mode::Bits64, _) => offset,
            _ => truncate(base.wrapping_add(offset), 4),
        }
    }

    /// #GP for an address that is not a multiple of `size`, whatever the segment
    /// and before its limit is looked at.
    pub(super) fn require_alignment(&self, mem: &Mem, size: u8) -> Outcome<()> {
        let linear = self.unchecked_linear(mem.seg, self.offset(mem, 0));
        if linear & u64::from(size).wrapping_sub(1) != 0 {
            return Self::fault(Exception::PROTECTION);
        }
        Ok(())
    }

    /// SDM 1 3.3.7.1 "Canonical Addressing".
    #[inline(never)]
    pub(super) fn is_canonical(&self, address: u64) -> bool {
        let unused = if self.machine.wide_linear() { 7 } else { 16 };
        let extended = (address.wrapping_shl(unused) as i64).wrapping_shr(unused);
        extended as u64 == address
    }

    /// #AC, for the operands that are numbers. SDM 3A 6.15 "Interrupt
    /// 17-Alignment Check Exception (#AC)".
    fn check_alignment(&self, linear: u64, size: u8) -> Outcome<()> {
        let misaligned = match size {
            2 | 4 | 8 => linear & u64::from(size).wrapping_sub(1) != 0,
            _ => false,
        };
        let enabled = || {
            self.machine.cr0() & CR0_AM != 0
                && self.machine.rflags() & FLAG_AC != 0
                && self.machine.cpl() == 3
        };
        if misaligned && enabled() {
            return Self::fault(Exception::ALIGNMENT);
        }
        Ok(())
    }
}

/// SDM 3A 5.5 "Type Checking": may this segment be used so?
fn may_access(state: &SegmentState, intent: Intent) -> bool {
    let access = state.access;
    if access & UNUSABLE != 0 || access & PRESENT == 0 {
        return false;
    }
    let code = access & TYPE_CODE != 0;
    let allowed = access & TYPE_WRITE_OR_READ != 0;
    match intent {
        Intent::Read => !code || allowed,
        Intent::Write | Intent::Modify => !code && allowed,
    }
}

/// SDM 3A 5.3 "Limit Checking".
fn within_limit(state: &SegmentState, first: u64, last: u64) -> bool {
    let limit = u64::from(state.limit);
    let data = state.access & TYPE_CODE == 0;
    if data && state.access & TYPE_EXPAND_DOWN != 0 {
        let top = if state.access & BIG != 0 {
            0xffff_ffff
        } else {
            0xffff
        };
        return first > limit && last <= top;
    }
    // With the largest limit an access that wraps "may or may not cause the
    // indicated exceptions": processors let it wrap.
    last <= limit || state.limit == u32::MAX
}
