//! The memory manager against a naive model: a map from guest page to client
//! page, over random operations, sane and hostile, with allocations failing.
// UNSAFETY: installs the global allocator that fails on demand.
#![allow(unsafe_code)]

mod memory_checks;
mod memory_host;
mod memory_naive;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

use haxm_vmx::Error;
use haxm_vmx::arch::addr::{Gpa, Hva};
use haxm_vmx::arch::ept::EptVpidCaps;
use haxm_vmx::host::Aging;
use haxm_vmx::memory::{Access, AccessError, AddressSpace, FaultOutcome, Reserve};
use memory_host::{
    Allocator, Backing, FakeHost, PAGE, Random, UNDER_SPIN, run_as_cpu, unwatched, with_failure,
};
use memory_naive::{ADDRESS_BITS, GROUP, INVALID, Model, ROM, STANDALONE};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

const CPUS: usize = 3;
/// Guest pages that the operations work on.
const GUEST_PAGES: u64 = 6 * GROUP;
/// The first of the client's pages, and how many there are.
const CLIENT_FIRST: u64 = 4 * GROUP;
const CLIENT_PAGES: u64 = 8 * GROUP;
/// The real thing, its model, and three processors with their TLBs.
struct Bench {
    host: FakeHost,
    space: AddressSpace<FakeHost>,
    model: Model,
    random: Random,
    /// Guest page to frame and EPT entry, as each processor has cached it.
    tlbs: [BTreeMap<u64, (u64, u64)>; CPUS],
    /// Code needs small leaves.
    small_code: bool,
    /// Allocations are to fail.
    failing: bool,
    failures: u64,
    next_frame: u64,
    /// The vCPU's.
    reserve: Reserve<FakeHost>,
    /// Guest pages used since the host has counted them as unused.
    used: BTreeSet<u64>,
    /// Groups that were counted as unused without a flush: what a processor
    /// caches of them it uses unnoticed.
    unnoticed: BTreeSet<u64>,
    /// The flush generation when those two were right.
    flushes: u64,
}

/// On every third processor code needs small leaves.
fn small_code(seed: u64) -> bool {
    (seed / 1000) % 3 == 1
}

/// Every fourth processor has no accessed and dirty flags.
fn caps(seed: u64) -> EptVpidCaps {
    let mut caps = EptVpidCaps::PAGE_2M | EptVpidCaps::PAGE_1G;
    caps.set(EptVpidCaps::ACCESSED_DIRTY, (seed / 1000) % 4 != 3);
    caps
}

impl Bench {
    fn new(seed: u64, failing: bool, pins: bool) -> Self {
        let host = FakeHost::lending(CPUS, pins);
        let space = AddressSpace::new(&host, caps(seed), ADDRESS_BITS).unwrap();
        if small_code(seed) {
            space.keep_code_small();
        }
        let mut bench = Self {
            host,
            space,
            model: Model::default(),
            random: Random(seed),
            tlbs: Default::default(),
            small_code: small_code(seed),
            failing,
            failures: 0,
            next_frame: 1 << 20,
            reserve: Reserve::new(),
            used: BTreeSet::new(),
            unnoticed: BTreeSet::new(),
            flushes: 0,
        };
        for piece in 0..CLIENT_PAGES / GROUP {
            bench.back_piece(piece, piece % 2 == 0);
        }
        bench
    }

    /// New frames for a 2 MB piece of the client's memory.
    fn back_piece(&mut self, piece: u64, large: bool) {
        let first = CLIENT_FIRST + piece * GROUP;
        let frame = self.next_frame.next_multiple_of(GROUP);
        self.next_frame = frame + 2 * GROUP;
        let writable = !self.random.one_in(5);
        self.host.change(first, first + GROUP, |process| {
            for page in 0..GROUP {
                let backing = Backing {
                    frame: frame + page * if large { 1 } else { 2 },
                    writable,
                    shift: if large { 21 } else { 12 },
                };
                process.insert(first + page, backing);
            }
        });
    }

    /// One page changes; the piece around it is no longer one.
    fn change_page(&mut self) {
        let page = CLIENT_FIRST + self.random.below(CLIENT_PAGES);
        let frame = self.next_frame;
        self.next_frame += 1;
        let kind = self.random.below(4);
        let piece = page / GROUP * GROUP;
        self.host.change(page, page + 1, |process| {
            for page in piece..piece + GROUP {
                if let Some(backing) = process.get_mut(&page) {
                    backing.shift = 12;
                }
            }
            let new = Backing {
                frame,
                writable: kind != 1,
                shift: 12,
            };
            if kind == 0 {
                process.remove(&page);
            } else {
                process.insert(page, new);
            }
        });
    }

    /// A range of guest pages, now and then not quite one.
    fn guest_range(&mut self) -> (u64, u64) {
        let random = &mut self.random;
        let mut start = random.below(GUEST_PAGES);
        let mut length = match random.below(4) {
            0 => 1 + random.below(4),
            1 => 1 + random.below(GROUP),
            _ => 1 + random.below(3 * GROUP),
        };
        if random.one_in(2) {
            start = start / GROUP * GROUP;
            length = length.next_multiple_of(GROUP);
        }
        length = length.min(GUEST_PAGES - start);
        let (mut gpa, mut size) = (start * PAGE, length * PAGE);
        if random.one_in(20) {
            match random.below(6) {
                0 => gpa += 1 + random.below(PAGE - 1),
                1 => size += 1 + random.below(PAGE - 1),
                2 => size = 0,
                3 => gpa = u64::MAX - (1 + random.below(8)) * PAGE / 2 + 1,
                4 => gpa = (1 << ADDRESS_BITS) - random.below(16) * PAGE,
                _ => size = u64::MAX - (1 + random.below(8)) * PAGE + 1,
            }
        }
        (gpa, size)
    }

    fn client_address(&mut self, gpa: u64) -> u64 {
        let random = &mut self.random;
        let page = CLIENT_FIRST + random.below(CLIENT_PAGES);
        let mut va = page * PAGE;
        if !random.one_in(3) {
            // Aligned with the guest, so that large leaves are possible.
            va = page / GROUP * GROUP * PAGE + gpa % (GROUP * PAGE);
        }
        match random.below(40) {
            0 => va + 1 + random.below(PAGE - 1),
            1 => 0,
            2 => u64::MAX - (1 + random.below(8)) * PAGE + 1,
            _ => va,
        }
    }

    /// Runs a call of the client, perhaps with an allocation failing, and the
    /// same on the model; returns whether it changed something.
    fn call(
        &mut self,
        real: impl FnOnce(&AddressSpace<FakeHost>) -> Result<(), Error>,
        model: impl FnOnce(&mut Model) -> Result<(), Error>,
    ) {
        let fail_in = (self.failing && self.random.one_in(2)).then(|| self.random.below(5) as u32);
        let (result, failed) = with_failure(fail_in, || real(&self.space));
        if failed {
            assert_eq!(result, Err(Error::NoMemory));
            self.failures += 1;
            self.check_counts();
        } else {
            assert_eq!(result, model(&mut self.model));
        }
        unwatched(|| self.space.check_map());
    }

    fn step(&mut self) {
        match self.random.below(44) {
            40 | 41 => self.age(),
            42 | 43 => self.part_or_mend(),
            0 => {
                let (_, size) = self.guest_range();
                let va = self.client_address(0);
                self.call(
                    |space| space.add_ram_block(Hva(va), size),
                    |model| model.add_ram_block(va, size),
                );
            }
            1..=4 => {
                let (gpa, size) = self.guest_range();
                let va = self.client_address(gpa);
                let mut flags =
                    [0, 0, ROM, STANDALONE, STANDALONE | ROM][self.random.below(5) as usize];
                if self.random.one_in(30) {
                    flags = self.random.below(0x200) as u32;
                }
                self.call(
                    |space| space.set_ram(gpa, size, va, flags),
                    |model| model.set_ram(gpa, size, va, flags),
                );
            }
            5 => {
                let (gpa, size) = self.guest_range();
                self.call(
                    |space| space.set_ram(gpa, size, 0, INVALID),
                    |model| model.set_ram(gpa, size, 0, INVALID),
                );
            }
            6 => {
                let (gpa, size) = self.guest_range();
                let flags = if self.random.one_in(10) {
                    3
                } else {
                    self.random.below(2) as u32 * 7
                };
                self.call(
                    |space| space.protect_ram(gpa, size, flags),
                    |model| model.protect_ram(gpa, size, flags),
                );
            }
            7 | 8 => {
                self.call(
                    |space| space.protect_ram(0, GUEST_PAGES * PAGE, 7),
                    |model| model.protect_ram(0, GUEST_PAGES * PAGE, 7),
                );
            }
            9 => self.change_page(),
            10..=12 => {
                let piece = self.random.below(CLIENT_PAGES / GROUP);
                let large = !self.random.one_in(3);
                self.back_piece(piece, large);
            }
            13 => self.copy(),
            _ => self.touch(),
        }
    }

    /// Pages around a mapped one are mapped as it is, or some to the same memory as ROM.
    fn part_or_mend(&mut self) {
        let from = self.random.below(GUEST_PAGES);
        let Some((page, mapped)) = self.model.pages.range(from..GUEST_PAGES).next() else {
            return;
        };
        let (page, mapped) = (*page, *mapped);
        let part = self.random.one_in(2);
        let below = self.random.below(if part { 4 } else { GROUP }).min(page);
        let length = below + 1 + self.random.below(if part { 4 } else { GROUP });
        let length = length.min(GUEST_PAGES - (page - below));
        let gpa = (page - below) * PAGE;
        let va = (mapped.client - below) * PAGE;
        let flags = if part || mapped.rom { ROM } else { 0 };
        self.call(
            |space| space.set_ram(gpa, length * PAGE, va, flags),
            |model| model.set_ram(gpa, length * PAGE, va, flags),
        );
    }

    /// The host asks which pages are in use.
    fn age(&mut self) {
        let first = CLIENT_FIRST + self.random.below(CLIENT_PAGES);
        let last = match self.random.below(4) {
            0 => first + 1 + self.random.below(2 * GROUP),
            _ => first + 1,
        };
        let aging = [Aging::Look, Aging::Clear, Aging::ClearAndFlush];
        let aging = aging[self.random.below(3) as usize];
        self.forget_uses();
        let flagging = self.space.eptp() & 1 << 6 != 0;
        let pages = || {
            let pages = self.model.pages.iter();
            let there = pages.filter(|(_, page)| (first..last).contains(&page.client));
            there.map(|(page, _)| *page)
        };
        // With the flags those say it; without, a leaf that is there.
        let young = |page: u64| {
            let found = self.host.translate(self.space.eptp(), page * PAGE);
            found.is_some_and(|(_, entry)| !flagging || entry & 0x100 != 0)
        };
        let expected = pages().any(young);
        let used = pages().any(|page| self.used.contains(&page));
        let groups: BTreeSet<u64> = pages().map(|page| page / GROUP).collect();
        let watched = !self.host.pins();
        let result = self.host.age(first, last, aging);
        assert_eq!(
            result,
            watched && expected,
            "{first:#x}..{last:#x} {aging:?}"
        );
        assert!(result || !used || !watched, "a use was not noticed");
        if aging == Aging::Look || !watched {
            return;
        }
        assert!(!pages().any(young), "{first:#x}..{last:#x} is still young");
        let flushes = self.space.statistics().flushes;
        let flush = expected && (aging == Aging::ClearAndFlush || !flagging);
        assert_eq!(flushes != self.flushes, flush);
        self.used.retain(|page| !groups.contains(&(page / GROUP)));
        if flush {
            self.flushes = flushes;
            self.unnoticed.clear();
        } else {
            self.unnoticed.extend(groups);
        }
    }

    /// Whatever was flushed may have lost its leaf, and the flag with it.
    fn forget_uses(&mut self) {
        let flushes = self.space.statistics().flushes;
        if flushes != self.flushes {
            self.flushes = flushes;
            self.used.clear();
            self.unnoticed.clear();
        }
    }

    /// A guest on one of the processors touches a page, or several in a row.
    fn touch(&mut self) {
        let cpu = self.random.below(CPUS as u64) as usize;
        run_as_cpu(cpu);
        let page = self.random.below(GUEST_PAGES + 4);
        let access = match self.random.below(6) {
            0 => Access::FETCH,
            1 | 2 => Access::READ,
            _ => Access::WRITE,
        };
        let run = if self.random.one_in(8) {
            1 + self.random.below(100)
        } else {
            1
        };
        for page in page..page + run {
            self.touch_page(cpu, page, access);
        }
    }

    fn touch_page(&mut self, cpu: usize, page: u64, access: Access) {
        let allows = |entry: u64| {
            entry & 1 != 0 && (!access.write || entry & 2 != 0) && (!access.fetch || entry & 4 != 0)
        };
        for attempt in 0..4 {
            // Entry: whatever is still cached must be true, or be flushed now.
            let flush = self.space.before_entry(cpu).unwrap();
            if let Some(flush) = flush {
                self.tlbs[cpu].clear();
                self.space.flushed(cpu, flush);
            }
            if !self.tlbs[cpu].contains_key(&page) {
                let found = self.host.walk(self.space.eptp(), page * PAGE, access.write);
                if let Some(found) = found {
                    let runs = !self.small_code || found.1 & 0x80 == 0;
                    assert_eq!(found.1 & 4 != 0, runs, "page {page:#x}: code");
                    self.tlbs[cpu].insert(page, found);
                }
            }
            let cached = self.tlbs[cpu].get(&page).copied();
            if let Some((frame, entry)) = cached {
                assert!(
                    self.model.permits(&self.host, page, frame, entry & 2 != 0),
                    "page {page:#x}: a processor uses what it may not"
                );
            }
            self.space.after_exit(cpu);
            if cached.is_some_and(|(_, entry)| allows(entry)) {
                self.forget_uses();
                if !self.unnoticed.contains(&(page / GROUP)) {
                    self.used.insert(page);
                }
                return;
            }
            // An EPT violation drops the translation it is about.
            self.tlbs[cpu].remove(&page);
            if !self.fault(page, access, attempt) {
                return;
            }
        }
        panic!("page {page:#x} faults for ever");
    }

    /// Answers a fault; whether the guest should try again.
    fn fault(&mut self, page: u64, access: Access, attempt: u32) -> bool {
        let write = access.write;
        let fail_in = (self.failing && self.random.one_in(3)).then(|| self.random.below(6) as u32);
        let (result, failed) = with_failure(fail_in, || {
            self.space
                .fault(Gpa(page * PAGE + 8), access, &mut self.reserve)
        });
        if failed {
            assert_eq!(result, Err(Error::NoMemory));
            self.failures += 1;
            return false;
        }
        if result == Ok(FaultOutcome::Retry) {
            assert!(attempt < 2, "page {page:#x} is never mapped");
            return true;
        }
        let expected = self.model.fault(&self.host, page, write);
        assert_eq!(result, expected, "page {page:#x}, write {write}");
        if result == Ok(FaultOutcome::Mapped) {
            let (_, entry) = self
                .host
                .translate(self.space.eptp(), page * PAGE)
                .expect("mapped, but not there");
            assert!(entry & 1 != 0 && (!write || entry & 2 != 0));
            assert!(!access.fetch || entry & 4 != 0);
        }
        result == Ok(FaultOutcome::Mapped)
    }

    /// The kernel writes some guest memory and reads it back.
    fn copy(&mut self) {
        let gpa = self.random.below(GUEST_PAGES * PAGE);
        let length = 1 + self.random.below(3 * PAGE) as usize;
        let seed = self.random.below(200) as u8;
        let bytes: Vec<u8> = (0..length).map(|i| seed.wrapping_add(i as u8)).collect();
        let result = self.space.write(Gpa(gpa), &bytes);
        assert_eq!(result, self.expected_access(gpa, length, true));
        let mut read = vec![0; length];
        let readable = self.space.read(Gpa(gpa), &mut read);
        assert_eq!(readable, self.expected_access(gpa, length, false));
        if result.is_ok() && !self.aliased(gpa, length) {
            assert_eq!(read, bytes);
        }
    }

    fn aliased(&self, gpa: u64, length: usize) -> bool {
        let last = (gpa + length as u64 - 1) / PAGE;
        let clients: Vec<_> = (gpa / PAGE..=last)
            .map(|page| self.model.pages[&page].client)
            .collect();
        clients.iter().collect::<BTreeSet<_>>().len() < clients.len()
    }

    fn expected_access(&self, gpa: u64, length: usize, write: bool) -> Result<(), AccessError> {
        let end = gpa + length as u64;
        let mut here = gpa;
        let mut unreadable = false;
        while here < end {
            let page = here / PAGE;
            let mapped = self
                .model
                .pages
                .get(&page)
                .ok_or(AccessError::Mmio(Gpa(here)))?;
            if let Some(first) = self.model.barrier(page) {
                return Err(AccessError::Protected(Gpa(first * PAGE)));
            }
            if write && mapped.rom {
                return Err(AccessError::RomWrite(Gpa(here)));
            }
            let backing = self.host.backing(mapped.client);
            let missing = !backing.is_some_and(|backing| backing.writable || !write);
            // A read finds out on the way, a write looks at the map first.
            if missing && !write {
                return Err(AccessError::Host(Error::Fault));
            }
            unreadable |= missing;
            here = (page + 1) * PAGE;
        }
        if unreadable {
            return Err(AccessError::Host(Error::Fault));
        }
        Ok(())
    }

    /// Ends the VM: every page comes back.
    fn finish(self) {
        self.check_all();
        let pages = self.space.statistics().tables as usize;
        drop(self.reserve);
        assert_eq!(self.host.pages(), pages);
        drop(self.space);
        assert_eq!(self.host.pages(), 0);
        assert_eq!(self.host.pinned(), []);
        assert_eq!(
            UNDER_SPIN.load(Ordering::Relaxed),
            0,
            "allocated under a spin lock"
        );
    }
}

/// Sequences of random operations; in every third one allocations fail.
/// Returns the failures that were come across and the large leaves seen.
fn run(sequences: u64, operations: u64, seed: u64, pins: bool) -> (u64, u64) {
    let (mut failures, mut large) = (0, 0);
    for sequence in 0..sequences {
        let mut bench = Bench::new(seed + sequence * 1000, sequence % 3 == 2, pins);
        for operation in 0..operations {
            bench.step();
            if operation % 8 == 0 {
                bench.check_counts();
            }
            if operation % 64 == 63 {
                bench.check_all();
                large += bench.space.statistics().leaves[1];
            }
        }
        failures += bench.failures;
        bench.finish();
    }
    (failures, large)
}

#[test]
fn random_operations_agree_with_the_model() {
    let (failures, large) = run(50, 1000, 1, false);
    assert!(failures > 500, "only {failures} allocations failed");
    assert!(large > 100, "only {large} large leaves");
}

/// On a host that pins.
#[test]
fn random_operations_with_pinned_memory_agree_with_the_model() {
    let (failures, large) = run(50, 1000, 2, true);
    assert!(failures > 200, "only {failures} allocations failed");
    assert!(large > 100, "only {large} large leaves");
}

/// The nightly size; `MEMORY_SEED` chooses other sequences.
#[test]
#[ignore = "takes minutes"]
fn a_million_random_operations_agree_with_the_model() {
    let seed = std::env::var("MEMORY_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse().ok()).unwrap_or(77);
    run(1000, 1000, seed, false);
    run(200, 1000, seed, true);
}
