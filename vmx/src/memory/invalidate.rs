//! The host takes memory back: its reports, and the count that keeps a fault
//! under way from using an answer that is no longer true.

use crate::arch::addr::Hva;
use crate::host::{Aging, Host, Invalidate};

use super::ept::Graveyard;
use super::slot::Leftover;
use super::space::{Core, Inner};
use super::tree::{Key, Span};

/// Slots looked at per hold of the spin lock.
const BATCH: usize = 64;

/// Invalidations under way, and how many things have changed so far.
pub(super) struct Invalidations {
    sequence: u64,
    running: u64,
    /// Covers every invalidation under way.
    start: u64,
    end: u64,
}

impl Invalidations {
    pub(super) const fn new() -> Self {
        Self {
            sequence: 0,
            running: 0,
            start: 0,
            end: 0,
        }
    }

    /// Changes with every finished invalidation, and with every change of slots
    /// or protection: what was looked up under another number may be wrong.
    pub(super) const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Notes a change.
    pub(super) fn advance(&mut self) {
        self.sequence = self.sequence.wrapping_add(1);
    }

    /// Whether something in `start..end` is being invalidated right now.
    pub(super) const fn running_in(&self, start: u64, end: u64) -> bool {
        self.running != 0 && start < self.end && self.start < end
    }

    fn begin(&mut self, start: u64, end: u64) {
        if self.running == 0 {
            (self.start, self.end) = (start, end);
        } else {
            self.start = self.start.min(start);
            self.end = self.end.max(end);
        }
        self.running = self.running.saturating_add(1);
    }

    fn end(&mut self) {
        self.running = self.running.saturating_sub(1);
        self.advance();
    }
}

impl<H: Host> Core<H> {
    /// Clears what was mapped by slots that a change has made part of another, if that is being
    /// invalidated. `take_away` goes by client address and lets changes in between: it may
    /// have passed the slot that these are part of now, and not yet come to them.
    pub(super) fn clear_passed(&mut self, left: &Leftover, grave: &mut Graveyard<H>) -> bool {
        let mut cleared = false;
        for node in left.merged.iter().flatten() {
            let slot = &node.item;
            let (start, end) = (slot.hva, slot.hva_of(slot.end));
            if self.invalidations.running_in(start, end) {
                cleared |= self.ept.clear(slot.start, slot.end, grave);
            }
        }
        cleared
    }
}

impl<H: Host> Inner<H> {
    /// Clears what the next few slots after `after` translate to
    /// `start..end`; returns where to go on, and whether there was something.
    fn clear_some(
        &self,
        after: Option<Key>,
        start: u64,
        end: u64,
        grave: &mut Graveyard<H>,
    ) -> (Option<Key>, bool) {
        let mut core = self.core.lock();
        let mut after = after;
        let mut cleared = false;
        for _ in 0..BATCH {
            let Some(mirror) = core.slots.touched(after, start, end) else {
                after = None;
                break;
            };
            after = Some(mirror.key());
            let (from, until) = mirror.guest_range(start, end);
            cleared |= core.ept.clear(from, until, grave);
        }
        if cleared {
            self.presence.advance();
        }
        (after, cleared)
    }

    /// Takes every translation to `start..end` of the client's memory away;
    /// returns whether there was one.
    pub(super) fn take_away(&self, start: u64, end: u64) -> bool {
        let mut grave = Graveyard::new();
        let (mut after, mut any) = self.clear_some(None, start, end, &mut grave);
        while after.is_some() {
            let (next, cleared) = self.clear_some(after, start, end, &mut grave);
            after = next;
            any |= cleared;
        }
        // Also if nothing was cleared: another thread may have cleared it and
        // still be waiting for the processors.
        self.finish_flush();
        grave.bury(&self.counters);
        any
    }
}

impl<H: Host> Invalidate for Inner<H> {
    fn begin(&self, start: Hva, end: Hva) {
        // From here on no leaf is written for this range, so the rest need not
        // be done in one hold of the lock.
        self.core.lock().invalidations.begin(start.0, end.0);
        self.take_away(start.0, end.0);
    }

    fn end(&self, _start: Hva, _end: Hva) {
        self.core.lock().invalidations.end();
    }

    fn young(&self, start: Hva, end: Hva, aging: Aging) -> bool {
        self.age(start.0, end.0, aging)
    }
}
