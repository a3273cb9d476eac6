//! What an emulated instruction reads and changes in the VMCS besides the
//! registers every instruction has: segments, descriptor tables, blocking.
//!
//! The emulator works without the VMCS; what it sets is kept here until the
//! instruction is done.

use crate::arch::field;
use crate::arch::reg::Interruptibility;
use crate::emulate::{Blocking, Seg, SegmentState, Table};
use crate::host::Host;
use crate::vcpu::Inner;
use crate::vcpu::state::{self, SegmentFields};
use crate::vcpu::vmcs::Current;

/// The fields of ES to GS, by their numbers in instructions.
pub const SEGMENTS: [SegmentFields; 6] = [
    state::ES,
    state::CS,
    state::SS,
    state::DS,
    state::FS,
    state::GS,
];

/// Reads one segment register.
pub fn read<H: Host>(fields: SegmentFields, current: &Current<'_, H>) -> SegmentState {
    let value = fields.read(current);
    SegmentState {
        selector: value.selector,
        base: value.base,
        limit: value.limit,
        access: value.ar,
    }
}

/// Reads those that are named, bit n for register n, and of CS and SS what says
/// mode and privilege level and where the code is.
pub fn read_some<H: Host>(named: u8, current: &Current<'_, H>) -> [SegmentState; 6] {
    let mut segments = [SegmentState::default(); 6];
    for (number, (state, fields)) in segments.iter_mut().zip(SEGMENTS).enumerate() {
        if named.wrapping_shr(number as u32) & 1 != 0 {
            *state = read(fields, current);
        } else if number == Seg::Cs.number() {
            state.base = fields.base(current);
            state.access = fields.rights(current);
        } else if number == Seg::Ss.number() {
            state.access = fields.rights(current);
        }
    }
    segments
}

/// The descriptor-table registers, in the order of [`Table`].
pub type Tables = [SegmentState; 4];

/// Reads them.
pub fn tables<H: Host>(current: &Current<'_, H>) -> Tables {
    let table = |base, limit| SegmentState {
        base,
        limit,
        ..SegmentState::default()
    };
    [
        table(
            current.get(field::GUEST_GDTR_BASE),
            current.get(field::GUEST_GDTR_LIMIT),
        ),
        read(state::LDTR, current),
        table(
            current.get(field::GUEST_IDTR_BASE),
            current.get(field::GUEST_IDTR_LIMIT),
        ),
        read(state::TR, current),
    ]
}

/// An instruction, or an iteration of one, met data breakpoints: the traps come
/// with the next entry. SDM 25.4.2, table 25-4 "Format of Pending-Debug-Exceptions".
pub fn pend_breakpoints<H: Host>(current: &Current<'_, H>, hits: u8) {
    /// Bit 12: at least one enabled breakpoint was met.
    const ENABLED: u64 = 1 << 12;
    let pending = current.get(field::GUEST_PENDING_DEBUG);
    current.put(
        field::GUEST_PENDING_DEBUG,
        pending | ENABLED | u64::from(hits),
    );
}

/// Changes that wait for the VMCS.
#[derive(Default)]
pub struct Reload {
    segments: [Option<SegmentState>; 6],
    tables: [Option<SegmentState>; 4],
    /// LMSW's operand.
    status: Option<u16>,
    blocking: Option<Blocking>,
    any: bool,
}

impl Reload {
    /// A segment register gets a new value.
    pub fn set_segment(&mut self, seg: Seg, state: SegmentState) {
        if let Some(slot) = self.segments.get_mut(seg.number()) {
            *slot = Some(state);
        }
        self.any = true;
    }

    /// A descriptor-table register does.
    pub fn set_table(&mut self, table: Table, state: SegmentState) {
        if let Some(slot) = self.tables.get_mut(table as usize) {
            *slot = Some(state);
        }
        self.any = true;
    }

    /// The lowest bits of CR0 do.
    pub fn set_status(&mut self, status: u16) {
        self.status = Some(status);
        self.any = true;
    }

    /// Interrupts are blocked, or no longer.
    pub fn set_blocking(&mut self, blocking: Blocking) {
        self.blocking = Some(blocking);
        self.any = true;
    }

    /// There is something to apply.
    pub fn is_needed(&self) -> bool {
        self.any
    }

    /// Writes the changes of a completed instruction. SS keeps interrupts and
    /// debug traps back for one more instruction (SDM 6.8.3 "Masking Exceptions and
    /// Interrupts When Switching Stacks").
    pub fn apply<H: Host>(&self, inner: &mut Inner<H>, current: &Current<'_, H>) {
        let [gdtr, ldtr, idtr, tr] = self.tables;
        let system = [(state::LDTR, ldtr), (state::TR, tr)];
        let segments = SEGMENTS.into_iter().zip(self.segments);
        for (fields, state) in segments.chain(system) {
            if let Some(state) = state {
                fields.load(
                    current,
                    state.selector,
                    state.base,
                    state.limit,
                    state.access,
                );
            }
        }
        if let Some(SegmentState { base, limit, .. }) = gdtr {
            current.put(field::GUEST_GDTR_BASE, base);
            current.put(field::GUEST_GDTR_LIMIT, limit);
        }
        if let Some(SegmentState { base, limit, .. }) = idtr {
            current.put(field::GUEST_IDTR_BASE, base);
            current.put(field::GUEST_IDTR_LIMIT, limit);
        }
        if let Some(status) = self.status {
            // No consequences: neither PG nor WP changes.
            let _ = inner.modes.load_status(current, status);
        }
        let Some(blocking) = self.blocking else {
            return;
        };
        inner.registers.forget_shadow();
        let old = current.get(field::GUEST_INTERRUPTIBILITY);
        let new = match blocking {
            Blocking::MovSs => {
                inner.completed = false;
                inner.step_due = inner.debug.steps();
                (old & !Interruptibility::STI.bits()) | Interruptibility::MOV_SS.bits()
            }
            Blocking::NmiEnds => old & !Interruptibility::NMI.bits(),
        };
        current.put(field::GUEST_INTERRUPTIBILITY, new);
    }
}
