//! What HAXM's interface promises of guest memory, said page by page.

use std::collections::{BTreeMap, BTreeSet};

use haxm_vmx::Error;
use haxm_vmx::arch::addr::Gpa;
use haxm_vmx::memory::FaultOutcome;

use crate::memory_host::{FakeHost, PAGE};

pub(crate) const ROM: u32 = 1;
pub(crate) const STANDALONE: u32 = 0x40;
pub(crate) const INVALID: u32 = 0x80;

/// Pages of a protection group, and of a large leaf.
pub(crate) const GROUP: u64 = 512;
/// The guest's physical-address width.
pub(crate) const ADDRESS_BITS: u8 = 40;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Page {
    pub(crate) client: u64,
    pub(crate) rom: bool,
    block: u64,
}

impl Page {
    /// Whether `other`, so many pages further, is in the same slot.
    pub(crate) fn continues_at(&self, pages: u64, other: &Self) -> bool {
        self.client + pages == other.client && self.rom == other.rom && self.block == other.block
    }
}

/// What HAXM's interface promises, page by page.
#[derive(Default)]
pub(crate) struct Model {
    pub(crate) pages: BTreeMap<u64, Page>,
    /// Start page to end page, and whether it is stand-alone.
    pub(crate) blocks: BTreeMap<u64, (u64, bool)>,
    protected: BTreeSet<u64>,
    highest: u64,
}

/// First and last page, if the range is made of whole pages.
fn whole_pages(start: u64, size: u64) -> Result<(u64, u64), Error> {
    let end = start.checked_add(size).ok_or(Error::Invalid)?;
    if size == 0 || start % PAGE != 0 || size % PAGE != 0 {
        return Err(Error::Invalid);
    }
    Ok((start / PAGE, end / PAGE))
}

fn guest_pages(start: u64, size: u64) -> Result<(u64, u64), Error> {
    let (first, last) = whole_pages(start, size)?;
    if last > 1 << (ADDRESS_BITS - 12) {
        return Err(Error::Invalid);
    }
    Ok((first, last))
}

impl Model {
    pub(crate) fn overlaps(&self, first: u64, last: u64) -> bool {
        self.blocks
            .iter()
            .any(|(start, (end, _))| *start < last && *end > first)
    }

    pub(crate) fn add_ram_block(&mut self, va: u64, size: u64) -> Result<(), Error> {
        let (first, last) = whole_pages(va, size)?;
        if va == 0 || self.overlaps(first, last) {
            return Err(Error::Invalid);
        }
        self.blocks.insert(first, (last, false));
        Ok(())
    }

    pub(crate) fn set_ram(
        &mut self,
        gpa: u64,
        size: u64,
        va: u64,
        flags: u32,
    ) -> Result<(), Error> {
        let (first, last) = guest_pages(gpa, size)?;
        if flags & !(ROM | STANDALONE | INVALID) != 0 {
            return Err(Error::Invalid);
        }
        if flags & INVALID != 0 {
            if flags != INVALID || va != 0 {
                return Err(Error::Invalid);
            }
            self.pages.retain(|page, _| *page < first || *page >= last);
        } else {
            let (client, client_last) = whole_pages(va, size)?;
            if va == 0 {
                return Err(Error::Invalid);
            }
            let block = if flags & STANDALONE != 0 {
                if self.overlaps(client, client_last) {
                    return Err(Error::Invalid);
                }
                self.blocks.insert(client, (client_last, true));
                client
            } else {
                let found = self
                    .blocks
                    .iter()
                    .find(|(start, (end, _))| **start <= client && client_last <= *end);
                *found.ok_or(Error::Invalid)?.0
            };
            for page in first..last {
                let mapped = Page {
                    client: client + page - first,
                    rom: flags & ROM != 0,
                    block,
                };
                self.pages.insert(page, mapped);
            }
        }
        let used: BTreeSet<u64> = self.pages.values().map(|page| page.block).collect();
        self.blocks
            .retain(|start, (_, standalone)| !*standalone || used.contains(start));
        self.highest = self.highest.max(last);
        Ok(())
    }

    pub(crate) fn protect_ram(&mut self, gpa: u64, size: u64, flags: u32) -> Result<(), Error> {
        let (first, last) = guest_pages(gpa, size)?;
        if last > self.highest {
            return Err(Error::Invalid);
        }
        match flags & 7 {
            0 => self.protected.extend(first..last),
            7 => self.protected.retain(|page| *page < first || *page >= last),
            _ => return Err(Error::Invalid),
        }
        Ok(())
    }

    /// The lowest protected page of the group that `page` is in.
    pub(crate) fn barrier(&self, page: u64) -> Option<u64> {
        let group = page / GROUP * GROUP;
        self.protected.range(group..group + GROUP).next().copied()
    }

    pub(crate) fn fault(
        &self,
        host: &FakeHost,
        page: u64,
        write: bool,
    ) -> Result<FaultOutcome, Error> {
        let Some(mapped) = self.pages.get(&page) else {
            return Ok(FaultOutcome::Mmio);
        };
        if let Some(first) = self.barrier(page) {
            return Ok(FaultOutcome::Protected {
                gpa: Gpa(first * PAGE),
            });
        }
        if mapped.rom && write {
            return Ok(FaultOutcome::RomWrite);
        }
        match host.lent(mapped.client) {
            Some(backing) if backing.writable || !write => Ok(FaultOutcome::Mapped),
            _ => Err(Error::Fault),
        }
    }

    /// Whether a guest may have this translation now.
    pub(crate) fn permits(&self, host: &FakeHost, page: u64, frame: u64, write: bool) -> bool {
        let Some(mapped) = self.pages.get(&page) else {
            return false;
        };
        let Some(backing) = host.usable(mapped.client) else {
            return false;
        };
        self.barrier(page).is_none()
            && backing.frame == frame
            && (!write || (!mapped.rom && backing.writable))
    }

    /// Slots, if neighbours that continue each other are one.
    pub(crate) fn runs(&self) -> usize {
        let mut runs = 0;
        let mut before: Option<(u64, Page)> = None;
        for (page, mapped) in &self.pages {
            let goes_on =
                before.is_some_and(|(last, old)| last + 1 == *page && old.continues_at(1, mapped));
            runs += usize::from(!goes_on);
            before = Some((*page, *mapped));
        }
        runs
    }

    pub(crate) fn protected_runs(&self) -> usize {
        self.protected
            .iter()
            .filter(|page| **page == 0 || !self.protected.contains(&(**page - 1)))
            .count()
    }
}
