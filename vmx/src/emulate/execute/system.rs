//! The instructions that store, load and look at the registers of the system:
//! GDTR, LDTR, IDTR, TR, the machine status word, and descriptors. SDM 2A, 2B
//! "LAR", "LGDT/LIDT", "LLDT", "LMSW", "LSL", "LTR", "SGDT", "SIDT", "SLDT", "SMSW",
//! "STR", "VERR/VERW".

use super::access::Intent;
use super::flags::{ZF, when};
use super::segment::{
    CODE, CONFORMING, Loaded, NON_SYSTEM, NOT_PRESENT, PRESENT, PROTECTION, READ_WRITE, UNUSABLE,
    dpl, refuse,
};
use super::{Outcome, Run, Stop};
use crate::emulate::Step;
use crate::emulate::insn::{Op, Operand};
use crate::emulate::machine::{Exception, Machine, SegmentState, Table};

const CR4_UMIP: u64 = 1 << 11;
/// S and the type, and the system types: SDM 3A 3.5 "System Descriptor Types",
/// table 3-2.
const TYPE: u32 = 0x1f;
const TSS16: u32 = 1;
const LDT: u32 = 2;
const TSS: u32 = 9;
/// Makes an available TSS a busy one.
const BUSY: u32 = 2;

impl<M: Machine> Run<'_, M> {
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
        self.put(destination, value)
    }

    /// SGDT, SIDT, LGDT, LIDT.
    pub(super) fn descriptor_table(&mut self) -> Outcome<()> {
        let Operand::Mem(mem) = self.operand(0) else {
            return Err(Stop::UNSUPPORTED);
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
            Err(stop) => match self.step_of(stop) {
                Step::Fault(Exception {
                    vector: PROTECTION, ..
                }) => None,
                _ => return Err(stop),
            },
        };
        if let (Some(value), true) = (found, shows) {
            let destination = self.place(0, Intent::Write)?;
            self.put(destination, value)?;
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
}
