//! How a guest's touch of a page becomes an EPT entry.

use core::sync::atomic::Ordering;

use crate::Error;
use crate::arch::addr::{Gpa, Hva, PAGE_SHIFT, PAGE_SIZE, Pfn};
use crate::host::{Host, HostFrame, Lending, UserFault, UserSpace};

use super::around::Around;
use super::ept::{Graveyard, Install, Leaf, LeafSize, Reserve};
use super::pin;
use super::protect::group;
use super::slot::Slot;
use super::space::{Core, Inner};
use super::{Access, FaultOutcome};

/// What the guest did.
#[derive(Clone, Copy)]
struct Touch {
    gpa: Gpa,
    access: Access,
}

/// What the first look at a faulting address found.
enum Look {
    Known(FaultOutcome),
    /// A page walk in ROM that the accessed-and-dirty flags turned into a write.
    FlaggedWalk,
    Fetch {
        slot: Slot,
        sequence: u64,
        missing: u32,
    },
}

impl<H: Host> Inner<H> {
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn fault(
        &self,
        gpa: Gpa,
        access: Access,
        reserve: &mut Reserve<H>,
    ) -> Result<FaultOutcome, Error> {
        let (slot, sequence, missing) = match self.look(gpa, access) {
            Look::Known(outcome) => return Ok(outcome),
            Look::FlaggedWalk => {
                self.stop_flagging();
                return Ok(FaultOutcome::Retry);
            }
            Look::Fetch {
                slot,
                sequence,
                missing,
            } => (slot, sequence, missing),
        };
        reserve.fill(&self.host, missing)?;
        let mut around = Around::new(gpa.page_start().0, &slot);
        let fetched = match self.user.lending() {
            Lending::Borrowed => self.borrow(&slot, access, &mut around, reserve).map(Some),
            Lending::Pinned => self.pin(&slot, sequence, &mut around),
        };
        let frame = match fetched {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(FaultOutcome::Retry),
            Err(UserFault::Interrupted) => return Ok(FaultOutcome::Interrupted),
            Err(fault) => return Err(fault.into()),
        };
        if access.write && !frame.writable {
            return Err(Error::Fault);
        }
        let touch = Touch { gpa, access };
        Ok(self.map(touch, &slot, sequence, frame, &around, reserve))
    }

    /// Where the touched page is, brought in if need be, and which of those
    /// around it are there too.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn borrow(
        &self,
        slot: &Slot,
        access: Access,
        around: &mut Around,
        reserve: &mut Reserve<H>,
    ) -> Result<HostFrame, UserFault> {
        let gpa = around.touched_address();
        let hva = Hva(slot.hva_of(gpa));
        let present = |around: &mut Around| {
            let first = around.hva;
            let (wanted, pages) = around.fill_in();
            self.user.present(first, wanted, pages);
        };
        present(around);
        let touched = around.touched();
        if let Some(frame) = touched
            .frame()
            .filter(|_| touched.is_writable() || !access.write)
        {
            reserve.streams.mapped(gpa, around.run_end(), 0);
            return Ok(HostFrame {
                frame,
                writable: touched.is_writable(),
                shift: PAGE_SHIFT,
            });
        }
        let ahead = if slot.rom || touched.frame().is_some() {
            0
        } else {
            reserve.streams.ahead(gpa).min(around.room())
        };
        let frame = self.user.fault_in(hva, access.write, ahead)?;
        if frame.shift == PAGE_SHIFT {
            if ahead != 0 {
                present(around);
            }
            reserve.streams.mapped(gpa, around.run_end(), ahead);
        }
        Ok(frame)
    }

    /// As `borrow`, from what is pinned, or is pinned now. `None`: the map has
    /// changed.
    fn pin(
        &self,
        slot: &Slot,
        sequence: u64,
        around: &mut Around,
    ) -> Result<Option<HostFrame>, UserFault> {
        let hva = slot.hva_of(around.touched_address());
        let gap = {
            let core = self.core.lock();
            if core.invalidations.sequence() != sequence {
                return Ok(None);
            }
            if let Some(frame) = core.pins.find(hva, around) {
                return Ok(Some(frame));
            }
            core.pins.gap(hva, slot)
        };
        let piece = pin::pin::<H>(&self.user, gap, Hva(hva))?;
        let mut core = self.core.lock();
        // The slot is still there, so its block is, with which the piece will go.
        let unused = if core.invalidations.sequence() == sequence {
            core.pins.add(piece)
        } else {
            Some(piece)
        };
        let found = core.pins.find(hva, around);
        drop(core);
        drop(unused);
        Ok(found)
    }

    /// Lets go of what is pinned in `start..end` of the client's memory. No
    /// processor uses it any more.
    pub(super) fn unpin(&self, start: u64, end: u64) {
        loop {
            let piece = self.core.lock().pins.take(start, end);
            if piece.is_none() {
                return;
            }
        }
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn look(&self, gpa: Gpa, access: Access) -> Look {
        // The tables below would take the address modulo 2^48.
        if gpa.0 >= self.limit {
            return Look::Known(FaultOutcome::Mmio);
        }
        let core = self.core.lock();
        let Some(slot) = core.slots.find(gpa.0) else {
            return Look::Known(FaultOutcome::Mmio);
        };
        // Another processor may have been here first.
        if core.ept.allows(gpa, access) {
            return Look::Known(FaultOutcome::Mapped);
        }
        let here = group(gpa.0);
        if let Some(first) = core.protected.first_in(here.start, here.end) {
            return Look::Known(FaultOutcome::Protected { gpa: Gpa(first) });
        }
        if slot.rom && access.write {
            return if access.walk && self.flagging() {
                Look::FlaggedWalk
            } else {
                Look::Known(FaultOutcome::RomWrite)
            };
        }
        Look::Fetch {
            slot,
            sequence: core.invalidations.sequence(),
            missing: core.ept.lookup(gpa).err().unwrap_or(0),
        }
    }

    /// Writes the leaf, if nothing has changed since `look`.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn map(
        &self,
        touch: Touch,
        slot: &Slot,
        sequence: u64,
        frame: HostFrame,
        around: &Around,
        reserve: &mut Reserve<H>,
    ) -> FaultOutcome {
        let mut grave = Graveyard::new();
        let mut core = self.core.lock();
        // Any change of slots or protection counts too, so what `look` saw of
        // them still holds.
        if core.invalidations.sequence() != sequence {
            return FaultOutcome::Retry;
        }
        let Some(size) = leaf_size(&core, touch, slot, frame) else {
            return FaultOutcome::Retry;
        };
        let pages = size.bytes().wrapping_shr(PAGE_SHIFT);
        let leaf = Leaf {
            size,
            frame: Pfn(frame.frame.0 & pages.wrapping_neg()),
            write: frame.writable && !slot.rom,
            piece: frame.shift,
        };
        match core.ept.install(touch.gpa, leaf, reserve, &self.counters) {
            Install::Done => {
                let changing = |core: &Core<H>| {
                    let (start, end) = (around.hva.0, around.client_end());
                    core.invalidations.running_in(start, end)
                };
                if size == LeafSize::Small && around.is_known() && !changing(&core) {
                    core.ept
                        .fill(Gpa(around.start), around.pages(), !slot.rom, &self.counters);
                }
                FaultOutcome::Mapped
            }
            Install::Short => FaultOutcome::Retry,
            Install::Conflict {
                start,
                end,
                smaller,
            } => {
                if core.ept.clear(start, end, &mut grave) {
                    self.presence.advance();
                }
                self.counters
                    .merges
                    .fetch_add(smaller.into(), Ordering::Relaxed);
                drop(core);
                self.finish_flush();
                grave.bury(&self.counters);
                FaultOutcome::Retry
            }
        }
    }
}

/// The largest leaf for `gpa` that host, processor, slot and protection allow,
/// with no part of it being invalidated right now; `None` if not even the page
/// itself will do.
fn leaf_size<H: Host>(
    core: &Core<H>,
    touch: Touch,
    slot: &Slot,
    frame: HostFrame,
) -> Option<LeafSize> {
    let Touch { gpa, access } = touch;
    let hva = slot.hva_of(gpa.page_start().0);
    let most = core.ept.most_level(gpa, access.fetch);
    [LeafSize::Huge, LeafSize::Large, LeafSize::Small]
        .into_iter()
        .find(|size| {
            let bytes = size.bytes();
            let start = gpa.0 & bytes.wrapping_neg();
            let end = start.wrapping_add(bytes);
            let client = hva & bytes.wrapping_neg();
            let offset = hva.wrapping_sub(client);
            let host_offset = frame.frame.address().0 & bytes.wrapping_sub(1);
            core.ept.has(*size)
                && size.level() <= most
                && frame.shift >= size.shift()
                && gpa.page_start().0.wrapping_sub(start) == offset
                && host_offset == offset
                && slot.start <= start
                && end <= slot.end
                && core.protected.first_in(start, end).is_none()
                && !core
                    .invalidations
                    .running_in(client, client.wrapping_add(bytes))
        })
}

const _: () = assert!(LeafSize::Small.bytes() == PAGE_SIZE);
