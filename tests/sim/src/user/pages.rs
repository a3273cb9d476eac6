//! What the host does with a process's pages: brings them in, holds them, and
//! tells which are there.

use vmx::arch::addr::{Hva, Pfn};
use vmx::host::{HostFrame, PresentPage, UserFault};

use super::{Mapped, PAGE, Process};
use crate::memory::Owner;

impl Process {
    /// The page behind an address, brought in as the host's fault handler does.
    pub(crate) fn resolve(&self, address: u64, write: bool) -> Result<HostFrame, UserFault> {
        let inner = self.machine();
        loop {
            let mut table = self.table();
            let (area_start, area) = table.area(address).ok_or(UserFault::BadAddress)?;
            if !area.allows(write) {
                return Err(UserFault::BadAddress);
            }
            if let Some((start, mapped)) = table.page(address) {
                if write && !mapped.writable {
                    drop(table);
                    self.make_writable(start, mapped);
                    continue;
                }
                let frame = mapped.frame + ((address - start) >> 12);
                return Ok(HostFrame {
                    frame: Pfn(frame),
                    writable: mapped.writable,
                    shift: mapped.shift,
                });
            }
            let size = 1u64 << area.shift;
            let start = address & !(size - 1);
            let whole = area.shift > 12 && start >= area_start && start + size <= area.end;
            let (start, shift) = if whole {
                (start, area.shift)
            } else {
                (address & !(PAGE - 1), 12)
            };
            let clear = table
                .pages
                .range(start..start + (1 << shift))
                .next()
                .is_none();
            let (start, shift) = if clear {
                (start, shift)
            } else {
                (address & !(PAGE - 1), 12)
            };
            let mapped = if !write && shift == 12 {
                Mapped {
                    frame: inner.zero_frame,
                    writable: false,
                    shift,
                }
            } else {
                let frame = inner
                    .state()
                    .memory
                    .allocate(1 << (shift - 12), Owner::User);
                Mapped {
                    frame,
                    writable: area.writable,
                    shift,
                }
            };
            table.pages.insert(start, mapped);
        }
    }

    /// Brings in pages of the area that a touched page just below is in.
    pub(crate) fn bring_in(&self, first: u64, count: u32) {
        let area = self.table().area(first - PAGE);
        let end = area.map_or(0, |(_, area)| if area.writable { area.end } else { 0 });
        let end = end.min(first + u64::from(count) * PAGE);
        for address in (first..end).step_by(PAGE as usize) {
            if self.resolve(address, true).is_err() {
                return;
            }
        }
    }

    /// The pages of 4 KB that are mapped now. One that reads share is none: in
    /// the simulated host as in others it is not an ordinary page.
    pub(crate) fn present(&self, first: u64, wanted: usize, pages: &mut [PresentPage]) {
        let zero = self.machine().zero_frame;
        let table = self.table();
        let at = |index: usize| {
            let address = first + index as u64 * PAGE;
            let (_, mapped) = table.page(address)?;
            (mapped.shift == 12 && mapped.frame != zero)
                .then(|| PresentPage::new(Pfn(mapped.frame), mapped.writable))
        };
        if at(wanted).is_none() {
            return;
        }
        for (index, page) in pages.iter_mut().enumerate() {
            *page = at(index).unwrap_or_default();
        }
    }

    /// The first write to a page that reads share, or that was write-protected.
    fn make_writable(&self, start: u64, seen: Mapped) {
        let range = start..start + (1 << seen.shift);
        self.changing(range, |this, _| {
            let inner = this.machine();
            let mut table = this.table();
            let Some(mapped) = table
                .pages
                .get_mut(&start)
                .filter(|now| now.frame == seen.frame)
            else {
                return;
            };
            if mapped.frame == inner.zero_frame {
                mapped.frame = inner.state().memory.allocate(1, Owner::User);
            }
            mapped.writable = true;
        });
    }

    /// Brings in pages and holds their frames: those it could not, none.
    pub(crate) fn pin(&self, start: Hva, pages: usize) -> Result<Vec<PresentPage>, UserFault> {
        let mut found = Vec::new();
        for address in (start.0..).step_by(PAGE as usize).take(pages) {
            match self.pin_one(address) {
                Ok(page) => found.push(page),
                Err(fault) => {
                    self.unpin(&found);
                    return Err(fault);
                }
            }
        }
        Ok(found)
    }

    fn pin_one(&self, address: u64) -> Result<PresentPage, UserFault> {
        loop {
            let page = self
                .resolve(address, true)
                .or_else(|_| self.resolve(address, false))?;
            // The page may have gone again; while the table is held it cannot.
            let table = self.table();
            let mapped = table.page(address);
            let frame = mapped.map(|(start, mapped)| mapped.frame + ((address - start) >> 12));
            if frame == Some(page.frame.0) {
                let inner = self.machine();
                inner.state().pinned.entry(page.frame.0).or_default().count += 1;
                return Ok(PresentPage::new(page.frame, page.writable));
            }
        }
    }

    /// Ends what `pin` began. Nobody may be able to reach the frames any more.
    pub(crate) fn unpin(&self, pages: &[PresentPage]) {
        let inner = self.machine();
        let mut state = inner.state();
        for frame in pages.iter().filter_map(|page| page.frame()) {
            let frame = frame.0;
            let Some(pin) = state.pinned.get_mut(&frame) else {
                state.finding(format!("host frame {frame:#x} is unpinned twice"));
                continue;
            };
            pin.count -= 1;
            if pin.count != 0 {
                continue;
            }
            let orphan = pin.orphan;
            state.pinned.remove(&frame);
            state.check_frames_unused(&inner.profile, frame..frame + 1);
            if orphan && state.memory.owner(frame) == Some(Owner::User) {
                state.memory.release(frame);
            }
        }
    }
}
