//! The EPT walker and the cache of what it found.
//!
//! SDM 29.3.2 "EPT Translation Mechanism", 29.3.3 "EPT-Induced VM Exits",
//! 29.4 "Caching Translation Information". Every translation is cached until
//! INVEPT, so code that forgets one is caught using a stale page.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::Ordering;

use vmx::arch::ept::{ADDRESS_MASK, EptEntry, EptVpidCaps};

use crate::memory::{Memory, Owner};
use crate::profile::Profile;
use crate::state::State;

/// What a guest does to memory. The bits are those of the exit qualification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Access {
    /// A data read.
    Read = 1,
    /// A data write.
    Write = 2,
    /// An instruction fetch.
    Fetch = 4,
}

/// A cached guest-physical mapping of one 4 KB page.
#[derive(Clone, Copy, Debug)]
struct Cached {
    frame: u64,
    rights: u64,
    /// The leaf is larger than the page.
    large: bool,
    /// A write has set the dirty flag already.
    dirty: bool,
}

/// The guest-physical mappings that one processor caches, by EPTP bits 51:12
/// and guest page.
#[derive(Default)]
pub(crate) struct Tlb {
    physical: HashMap<(u64, u64), Cached>,
    /// VPID and EPT root of the guests that left combined translations.
    combined: HashSet<(u16, u64)>,
}

impl Tlb {
    pub(crate) fn flush_all(&mut self) {
        self.physical.clear();
        self.combined.clear();
    }

    pub(crate) fn flush(&mut self, eptp: u64) {
        self.physical
            .retain(|(tag, _), _| *tag != eptp & ADDRESS_MASK);
        self.combined
            .retain(|(_, root)| *root != eptp & ADDRESS_MASK);
    }

    /// INVVPID: of one VPID, or of all but 0.
    pub(crate) fn flush_combined(&mut self, vpid: Option<u16>) {
        self.combined
            .retain(|(tag, _)| *tag == 0 || vpid.is_some_and(|v| *tag != v));
    }

    fn holds(&self, eptp: u64, frames: &Range<u64>) -> bool {
        self.physical
            .iter()
            .any(|((tag, _), c)| *tag == eptp & ADDRESS_MASK && frames.contains(&c.frame))
    }
}

impl State {
    /// A guest is entered here. With a VPID its combined translations outlive
    /// its exits; what it did on another processor since it left some here did
    /// not drop them.
    pub(crate) fn note_combined(&mut self, cpu: usize, vpid: u16, eptp: u64) {
        if vpid == 0 || eptp == 0 {
            return;
        }
        let tag = (vpid, eptp & ADDRESS_MASK);
        let before = self.ran_last.insert(tag, cpu);
        let known = !self.cpus[cpu].tlb.combined.insert(tag);
        if known && before.is_some_and(|before| before != cpu) {
            self.finding(format!(
                "VPID {vpid} came back to processor {cpu} with translations of its last stay"
            ));
        }
    }
}

/// Why a guest-physical access did not reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EptFault {
    /// With the rights that all levels together give (bits 2:0).
    Violation(u64),
    Misconfiguration,
}

struct Walk {
    frame: u64,
    rights: u64,
    large: bool,
    leaf_at: u64,
}

fn reserved(profile: &Profile, entry: u64, level: u32) -> bool {
    let caps = EptVpidCaps::from_bits_retain(profile.msr(0x48c));
    let bits = EptEntry::from_bits_retain(entry);
    let leaf = level == 0 || bits.contains(EptEntry::LARGE);
    let width = (1u64 << profile.physical_bits) - 1;
    if entry & ADDRESS_MASK & !width != 0 {
        return true;
    }
    // Write without read; execute-only where that is not supported.
    if !bits.contains(EptEntry::READ) {
        let execute_only = caps.contains(EptVpidCaps::EXECUTE_ONLY);
        if bits.contains(EptEntry::WRITE) || (bits.contains(EptEntry::EXECUTE) && !execute_only) {
            return true;
        }
    }
    if !leaf {
        // Bits 7:3 of an entry that references a table; a PML4 entry has no bit 7.
        return entry >> 3 & 0xf != 0;
    }
    if matches!(entry >> 3 & 7, 2 | 3 | 7) {
        return true;
    }
    match level {
        0 => false,
        1 => !caps.contains(EptVpidCaps::PAGE_2M) || entry & 0x1f_f000 != 0,
        2 => !caps.contains(EptVpidCaps::PAGE_1G) || entry & 0x3fff_f000 != 0,
        _ => true,
    }
}

fn walk(memory: &Memory, profile: &Profile, eptp: u64, gpa: u64) -> Result<Walk, EptFault> {
    let mut table = eptp & ADDRESS_MASK;
    let mut rights = 7;
    if gpa >> 48 != 0 {
        return Err(EptFault::Violation(0));
    }
    for level in (0..4).rev() {
        let at = table + (gpa >> (12 + 9 * level) & 0x1ff) * 8;
        let entry = memory.load(at).ok_or(EptFault::Misconfiguration)?;
        if entry & 7 == 0 {
            return Err(EptFault::Violation(0));
        }
        if reserved(profile, entry, level) {
            return Err(EptFault::Misconfiguration);
        }
        rights &= entry & 7;
        if eptp & 1 << 6 != 0 {
            if let Some(slot) = memory.atomic(at) {
                slot.fetch_or(EptEntry::ACCESSED.bits(), Ordering::AcqRel);
            }
        }
        if level == 0 || entry & EptEntry::LARGE.bits() != 0 {
            let inside = gpa >> 12 & ((1 << (9 * level)) - 1);
            return Ok(Walk {
                frame: ((entry & ADDRESS_MASK) >> 12) + inside,
                rights,
                large: level != 0,
                leaf_at: at,
            });
        }
        table = entry & ADDRESS_MASK;
    }
    Err(EptFault::Misconfiguration)
}

/// Calls `visit` with the frames of every leaf, level by level.
fn leaves(
    memory: &Memory,
    table: u64,
    level: u32,
    gpa: u64,
    visit: &mut impl FnMut(u64, Range<u64>),
) {
    for index in 0..512 {
        let Some(entry) = memory.load(table + index * 8) else {
            return;
        };
        if entry & 7 == 0 {
            continue;
        }
        let gpa = gpa | index << (12 + 9 * level);
        if level == 0 || entry & EptEntry::LARGE.bits() != 0 {
            let first = (entry & ADDRESS_MASK) >> 12;
            visit(gpa, first..first + (1 << (9 * level)));
        } else {
            leaves(memory, entry & ADDRESS_MASK, level - 1, gpa, visit);
        }
    }
}

impl State {
    /// Translates one access; the cache first, as a processor does. `small_code`: code in a
    /// large leaf could stop the processor.
    pub(crate) fn translate(
        &mut self,
        profile: &Profile,
        small_code: bool,
        cpu: usize,
        eptp: u64,
        gpa: u64,
        access: Access,
    ) -> Result<u64, EptFault> {
        let key = (eptp & ADDRESS_MASK, gpa >> 12);
        let need = access as u64;
        let cached = self.cpus[cpu].tlb.physical.get(&key).copied();
        let dirty_done = cached.is_some_and(|c| c.dirty) || access != Access::Write;
        let (frame, large) = match cached.filter(|c| c.rights & need != 0 && dirty_done) {
            Some(hit) => (hit.frame, hit.large),
            None => {
                // A violation also drops what was cached for the address
                // (29.4.3.1 "Operations that Invalidate Cached Mappings").
                self.cpus[cpu].tlb.physical.remove(&key);
                let found = walk(&self.memory, profile, eptp, gpa)?;
                if found.rights & need == 0 {
                    return Err(EptFault::Violation(found.rights));
                }
                let dirty = access == Access::Write;
                if dirty && eptp & 1 << 6 != 0 {
                    if let Some(slot) = self.memory.atomic(found.leaf_at) {
                        slot.fetch_or(EptEntry::DIRTY.bits(), Ordering::AcqRel);
                    }
                }
                self.cpus[cpu].tlb.physical.insert(
                    key,
                    Cached {
                        frame: found.frame,
                        rights: found.rights,
                        large: found.large,
                        dirty,
                    },
                );
                (found.frame, found.large)
            }
        };
        if access == Access::Fetch && large && small_code {
            self.finding(format!("code runs from a large leaf at {gpa:#x}"));
        }
        self.check_guest_frame(gpa, frame, access);
        Ok(frame << 12 | gpa & 0xfff)
    }

    /// A guest may only reach memory of a process.
    fn check_guest_frame(&mut self, gpa: u64, frame: u64, access: Access) {
        match self.memory.owner(frame) {
            Some(Owner::User) => {}
            Some(Owner::Zero) if access != Access::Write => {}
            Some(Owner::Zero) => {
                self.finding(format!("the guest writes the page of zeros at {gpa:#x}"));
            }
            Some(owner) => {
                self.finding(format!("the guest reaches a page of {owner:?} at {gpa:#x}"));
            }
            None => self.finding(format!(
                "the guest reaches freed or absent memory (frame {frame:#x}) at {gpa:#x}"
            )),
        }
    }

    /// Host frames are about to be given back: nobody may be able to reach them.
    pub(crate) fn check_frames_unused(&mut self, profile: &Profile, frames: Range<u64>) {
        let _ = profile;
        let mut found = Vec::new();
        for (number, cpu) in self.cpus.iter().enumerate() {
            if cpu
                .in_guest
                .is_some_and(|eptp| cpu.tlb.holds(eptp, &frames))
            {
                found.push(format!(
                    "host frames {frames:x?} are freed while the guest on processor {number} can still reach them"
                ));
            }
        }
        for eptp in &self.eptps {
            if self.memory.owner(eptp >> 12 & ((1 << 40) - 1)) != Some(Owner::Kernel) {
                continue;
            }
            leaves(&self.memory, eptp & ADDRESS_MASK, 3, 0, &mut |gpa, leaf| {
                if leaf.start < frames.end && frames.start < leaf.end {
                    found.push(format!(
                        "host frames {frames:x?} are freed while EPT {eptp:#x} maps them at {gpa:#x}"
                    ));
                }
            });
        }
        for text in found {
            self.finding(text);
        }
    }
}
