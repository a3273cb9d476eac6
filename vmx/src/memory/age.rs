//! Which pages the guest uses: what the host's page reclaim asks, so that it
//! takes others.
//!
//! The processor sets the accessed flag of an EPT entry when it uses it for a
//! translation that it does not cache already (SDM 29.3.5 "Accessed and Dirty
//! Flags for EPT"). After the flag is cleared, a processor that caches the
//! translation need not set it again before INVEPT (SDM 29.4.3.4 "Guidelines for
//! Use of the INVEPT Instruction"). Nothing is freed, so nobody waits for that: each
//! processor executes INVEPT before its next entry, and an entry follows every
//! interrupt of the host's.

use core::sync::atomic::Ordering;

use crate::arch::ept::EPTP_ACCESSED_DIRTY;
use crate::host::{Aging, Host};

use super::ept::LeafSize;
use super::space::Inner;
use super::tree::Span;

/// What is looked at per hold of the spin lock: a table of leaves.
const PIECE: u64 = LeafSize::Large.bytes();

/// Pieces looked at for one question: a page of 1 GB at two places of the guest,
/// or one of 4 KB at a thousand. The host holds a lock of its own meanwhile; what
/// is beyond counts as used.
const MOST_PIECES: usize = 1024;

impl<H: Host> Inner<H> {
    /// See [`crate::host::Invalidate::young`].
    pub(super) fn age(&self, start: u64, end: u64, aging: Aging) -> bool {
        // Without the flags a translation that is there is all there is to know,
        // and the next use is noticed only if it faults.
        if aging != Aging::Look && !self.flagging() {
            return self.take_away(start, end);
        }
        let mut young = false;
        let (mut after, mut resume) = (None, 0);
        for _ in 0..MOST_PIECES {
            let core = self.core.lock();
            let Some(mirror) = core.slots.touched(after, start, end) else {
                return young;
            };
            let (from, until) = mirror.guest_range(start, end);
            let from = from.max(resume);
            let next = (from | PIECE.wrapping_sub(1)).saturating_add(1).min(until);
            if core.ept.age(from, next, aging, self.flagging()) {
                young = true;
                match aging {
                    Aging::Look => return true,
                    Aging::Clear => {}
                    Aging::ClearAndFlush => self.presence.advance(),
                }
            }
            resume = next;
            if next == until {
                (after, resume) = (Some(mirror.key()), 0);
            }
        }
        true
    }

    /// Whether the EPT's accessed and dirty flags are on.
    pub(super) fn flagging(&self) -> bool {
        self.eptp.load(Ordering::Acquire) & EPTP_ACCESSED_DIRTY != 0
    }
}
