//! The client's process, whose pages the test moves about.
// UNSAFETY: implements the host seam.
#![allow(unsafe_code, reason = "not every test file uses every part")]

use std::ptr::NonNull;
use std::sync::atomic::Ordering;

use haxm_vmx::arch::addr::{Hva, Pfn};
use haxm_vmx::fallible::NoMemory;
use haxm_vmx::host::{HostFrame, Invalidate, Lending, PresentPage, UserFault, UserSpace};

use super::pins::FakePins;
use super::{FakeHost, Listener, PAGE, fails, locked, undisturbed};

/// The client's process.
pub(crate) struct FakeProcess(pub(super) FakeHost);

impl FakeProcess {
    /// Calls `each` with the contents of each page of `length` bytes at
    /// `address`: the bytes, the offset in them, and that in the request.
    fn pieces(
        &self,
        address: Hva,
        length: usize,
        write: bool,
        each: &mut dyn FnMut(&mut [u8], usize),
    ) -> Result<(), UserFault> {
        undisturbed(|| {
            let interlude = locked(&self.0.0.copying).take();
            if let Some(interlude) = interlude {
                interlude(&self.0);
            }
            let mut done = 0;
            while done < length {
                let here = address.0 + done as u64;
                let offset = (here % PAGE) as usize;
                let part = (4096 - offset).min(length - done);
                let backing = self.0.backing(here / PAGE).ok_or(UserFault::BadAddress)?;
                if write && !backing.writable {
                    return Err(UserFault::BadAddress);
                }
                let mut contents = locked(&self.0.0.contents);
                let page = contents
                    .entry(backing.frame)
                    .or_insert_with(|| vec![0; 4096]);
                each(&mut page[offset..offset + part], done);
                done += part;
            }
            Ok(())
        })
    }
}

// SAFETY: the only changes of what `fault_in` said are made by
// `FakeHost::change`, which reports them.
unsafe impl UserSpace for FakeProcess {
    type Pins = FakePins;

    fn lending(&self) -> Lending {
        if self.0.0.pins {
            Lending::Pinned
        } else {
            Lending::Borrowed
        }
    }

    fn pin(&self, start: Hva, pages: usize) -> Result<FakePins, UserFault> {
        assert!(self.0.0.pins && start.0 % PAGE == 0 && (1..=512).contains(&pages));
        if fails() {
            return Err(UserFault::NoMemory);
        }
        undisturbed(|| {
            let first = start.0 / PAGE;
            let found: Option<Vec<_>> = (first..first + pages as u64)
                .map(|page| self.0.lent(page))
                .collect();
            let backings = found.ok_or(UserFault::BadAddress)?;
            for (page, backing) in (first..).zip(&backings) {
                let mut pinned = locked(&self.0.0.pinned);
                let (_, count) = pinned.entry(page).or_insert((*backing, 0));
                *count += 1;
                if *count == 1 {
                    self.0.tell(backing.frame, true);
                }
            }
            let interlude = locked(&self.0.0.interlude).take();
            if let Some(interlude) = interlude {
                interlude(&self.0);
            }
            for _ in 0..self.0.0.pause.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            Ok(FakePins {
                host: self.0.clone(),
                first,
                backings,
            })
        })
    }

    /// It lives as long as the test.
    fn has_ended(&self) -> bool {
        false
    }

    fn is_current(&self) -> bool {
        true
    }

    fn fault_in(&self, address: Hva, write: bool, ahead: u32) -> Result<HostFrame, UserFault> {
        if fails() {
            return Err(UserFault::NoMemory);
        }
        undisturbed(|| {
            assert_eq!(address.0 % PAGE, 0);
            let found = self.0.backing(address.0 / PAGE);
            let interlude = locked(&self.0.0.interlude).take();
            if let Some(interlude) = interlude {
                interlude(&self.0);
            }
            for _ in 0..self.0.0.pause.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            let backing = found.ok_or(UserFault::BadAddress)?;
            if write && !backing.writable {
                return Err(UserFault::BadAddress);
            }
            let first = address.0 / PAGE;
            locked(&self.0.0.asked).push((first, 1 + u64::from(ahead)));
            let small = |page: &u64| self.0.backing(*page).is_some_and(|b| b.shift == 12);
            let brought_in = (first..=first + u64::from(ahead)).take_while(small);
            locked(&self.0.0.resident).extend(brought_in);
            Ok(HostFrame {
                frame: Pfn(backing.frame),
                writable: backing.writable,
                shift: backing.shift,
            })
        })
    }

    fn present(&self, first: Hva, wanted: usize, pages: &mut [PresentPage]) {
        undisturbed(|| {
            assert_eq!(first.0 % PAGE, 0);
            assert!(wanted < pages.len());
            let touched = first.0 / PAGE + wanted as u64;
            let at = |page: &u64| {
                let resident = locked(&self.0.0.resident).contains(page);
                let backing = self
                    .0
                    .backing(*page)
                    .filter(|b| resident && b.shift == 12)?;
                Some(PresentPage::new(Pfn(backing.frame), backing.writable))
            };
            if at(&touched).is_none() {
                return;
            }
            for (page, found) in (first.0 / PAGE..).zip(pages) {
                if page / 512 == touched / 512 {
                    *found = at(&page).unwrap_or_default();
                }
            }
            let interlude = locked(&self.0.0.interlude).take();
            if let Some(interlude) = interlude {
                interlude(&self.0);
            }
            for _ in 0..self.0.0.pause.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
        });
    }

    fn read(&self, address: Hva, bytes: &mut [u8]) -> Result<(), UserFault> {
        let length = bytes.len();
        self.pieces(address, length, false, &mut |page, done| {
            bytes[done..done + page.len()].copy_from_slice(page);
        })
    }

    fn write(&self, address: Hva, bytes: &[u8]) -> Result<(), UserFault> {
        self.pieces(address, bytes.len(), true, &mut |page, done| {
            page.copy_from_slice(&bytes[done..done + page.len()]);
        })
    }

    fn compare_exchange(
        &self,
        address: Hva,
        size: u8,
        old: u128,
        new: u128,
    ) -> Result<u128, UserFault> {
        let size = usize::from(size);
        let mut found = [0; 16];
        self.pieces(address, size, true, &mut |page, _| {
            found[..size].copy_from_slice(page);
            if page == &old.to_le_bytes()[..size] {
                page.copy_from_slice(&new.to_le_bytes()[..size]);
            }
        })?;
        Ok(u128::from_le_bytes(found))
    }

    unsafe fn watch(&self, listener: NonNull<dyn Invalidate>) -> Result<(), NoMemory> {
        assert!(!self.0.0.pins);
        if fails() {
            return Err(NoMemory);
        }
        undisturbed(|| {
            let before = self
                .0
                .0
                .listener
                .write()
                .unwrap()
                .replace(Listener(listener));
            assert!(before.is_none());
        });
        Ok(())
    }

    fn unwatch(&self) {
        undisturbed(|| {
            let before = self.0.0.listener.write().unwrap().take();
            assert!(before.is_some());
        });
    }
}
