//! Addition, subtraction and logic: everything that writes its first operand
//! and sets the status flags from the result, and the compares.

use super::access::Intent;
use super::flags::{self, CF, OF, STATUS, when};
use super::{Outcome, Run, Stop};
use crate::emulate::insn::Op;
use crate::emulate::machine::Machine;

/// The result and flags of one operation, and which flags it defines. AF after
/// a logical operation is undefined in the SDM; processors clear it.
#[inline(never)]
#[cfg_attr(haxm_module, optimize(speed))]
pub(in crate::emulate) fn compute(
    op: Op,
    a: u64,
    b: u64,
    carry: bool,
    size: u8,
) -> Option<(u64, u64, u64)> {
    let logic = |value: u64| (value, flags::of_result(value, size), STATUS);
    let full = |(value, found)| (value, found, STATUS);
    Some(match op {
        Op::Add => full(flags::add(a, b, false, size)),
        Op::Adc => full(flags::add(a, b, carry, size)),
        Op::Sub | Op::Cmp => full(flags::sub(a, b, false, size)),
        Op::Sbb => full(flags::sub(a, b, carry, size)),
        Op::And | Op::Test => logic(a & b),
        Op::Or => logic(a | b),
        Op::Xor => logic(a ^ b),
        Op::Neg => full(flags::sub(0, a, false, size)),
        Op::Not => (!a, 0, 0),
        // INC and DEC leave CF alone.
        Op::Inc => {
            let (value, found) = flags::add(a, 1, false, size);
            (value, found, STATUS & !CF)
        }
        Op::Dec => {
            let (value, found) = flags::sub(a, 1, false, size);
            (value, found, STATUS & !CF)
        }
        _ => return None,
    })
}

impl<M: Machine> Run<'_, M> {
    /// ADD, OR, ADC, SBB, AND, SUB, XOR, INC, DEC, NOT, NEG.
    pub(super) fn update(&mut self) -> Outcome<()> {
        let op = self.insn.op;
        let size = self.size_of(0);
        let one_operand = matches!(op, Op::Inc | Op::Dec | Op::Not | Op::Neg);
        let destination = self.place(0, Intent::Modify)?;
        let source = if one_operand { 0 } else { self.fetch(1)? };
        let carry = self.machine.rflags() & CF != 0;
        let locked = self.insn.prefixes.lock;
        let (found, defined) = self.modify(destination, locked, |old| {
            match compute(op, old as u64, source, carry, size) {
                Some((value, found, defined)) => (u128::from(value), (found, defined)),
                None => (old, (0, 0)),
            }
        })?;
        self.commit_flags(defined, found);
        Ok(())
    }

    /// CMP and TEST.
    pub(super) fn compare(&mut self) -> Outcome<()> {
        let size = self.size_of(0);
        let a = self.fetch(0)?;
        let b = self.fetch(1)?;
        let Some((_, found, defined)) = compute(self.insn.op, a, b, false, size) else {
            return Err(Stop::UNSUPPORTED);
        };
        self.commit_flags(defined, found);
        Ok(())
    }

    /// ADCX and ADOX: an addition whose carry goes through one flag only.
    pub(super) fn add_one_flag(&mut self) -> Outcome<()> {
        let flag = if self.insn.op == Op::Adcx { CF } else { OF };
        let size = self.size_of(0);
        let source = self.fetch(1)?;
        let destination = self.place(0, Intent::Modify)?;
        let old = self.get(destination)?;
        let carry = self.machine.rflags() & flag != 0;
        let (sum, found) = flags::add(old, source, carry, size);
        self.put(destination, sum)?;
        self.commit_flags(flag, when(found & CF != 0, flag));
        Ok(())
    }
}
