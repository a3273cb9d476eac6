//! Guests, clients and the host at once: vCPUs touch memory all the time while
//! it is mapped, unmapped, protected, moved and taken away.
//!
//! A frame carries what it may be used for. A guest checks that at every touch,
//! inside the guest, from what its processor has cached; whoever takes a frame
//! away marks it only after the call that takes it away has returned. So a
//! touch of a marked frame is a touch too late.
// UNSAFETY: installs the global allocator that watches for spin locks.
#![allow(unsafe_code)]

mod memory_host;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use haxm_vmx::arch::addr::{Gpa, Hva};
use haxm_vmx::arch::ept::EptVpidCaps;
use haxm_vmx::memory::{Access, AddressSpace, FaultOutcome, Reserve};
use memory_host::access::{INVALID, STANDALONE};
use memory_host::{Allocator, Backing, FakeHost, PAGE, Random, UNDER_SPIN, run_as_cpu, unwatched};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

const GROUP: u64 = 512;
const VCPUS: usize = 3;
/// The client's memory: pages `CLIENT..CLIENT + PAGES`, mapped at GPA 0.
const CLIENT: u64 = 2 * GROUP;
const PAGES: u64 = 2 * GROUP;
/// Frames there are; the first is aligned for large leaves.
const FRAMES: u64 = 64 * GROUP;
const FIRST_FRAME: u64 = 1024 * GROUP;

/// What a processor has cached: frames by guest page, EPT tables by group.
#[derive(Clone, Default)]
struct Cached {
    frames: BTreeMap<u64, u64>,
    tables: BTreeMap<u64, u64>,
}

struct World {
    host: FakeHost,
    space: AddressSpace<FakeHost>,
    /// By frame: the host has it back.
    freed: Vec<AtomicBool>,
    /// Per guest page: no guest may reach it now.
    closed: Vec<AtomicBool>,
    stop: AtomicBool,
    touches: AtomicU64,
    large: AtomicU64,
    refused: AtomicU64,
    changes: AtomicU64,
    late: AtomicUsize,
}

/// The blocks of a pinned world: the pages that end with their last slot.
fn blocks() -> impl Iterator<Item = (u64, u64)> {
    let small = (GROUP..PAGES).step_by(32).map(|first| (first, first + 32));
    std::iter::once((0, GROUP)).chain(small)
}

impl World {
    fn new(pins: bool) -> Arc<Self> {
        let host = FakeHost::lending(VCPUS + 1, pins);
        let caps = EptVpidCaps::PAGE_2M | EptVpidCaps::ACCESSED_DIRTY;
        let space = AddressSpace::new(&host, caps, 40).unwrap();
        if pins {
            for (first, last) in blocks() {
                let va = (CLIENT + first) * PAGE;
                let size = (last - first) * PAGE;
                space.set_ram(first * PAGE, size, va, STANDALONE).unwrap();
            }
        } else {
            space
                .add_ram_block(Hva(CLIENT * PAGE), PAGES * PAGE)
                .unwrap();
            space.set_ram(0, PAGES * PAGE, CLIENT * PAGE, 0).unwrap();
        }
        let flags = |count| (0..count).map(|_| AtomicBool::new(false)).collect();
        let world = Self {
            host,
            space,
            freed: flags(FRAMES),
            closed: flags(PAGES),
            stop: AtomicBool::new(false),
            touches: AtomicU64::new(0),
            large: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            late: AtomicUsize::new(0),
        };
        for frame in 2 * GROUP..FRAMES {
            world.freed[frame as usize].store(true, Ordering::Relaxed);
        }
        for page in 0..PAGES {
            let frame = FIRST_FRAME + page;
            world.host.back(
                CLIENT + page,
                Backing {
                    frame,
                    writable: true,
                    shift: 21,
                },
            );
        }
        world.host.0.pause.store(2, Ordering::Relaxed);
        let world = Arc::new(world);
        let freed = Arc::downgrade(&world);
        *world.host.0.pinning.lock().unwrap() = Some(Box::new(move |frame, pinned| {
            if let Some(world) = freed.upgrade() {
                world.freed(frame).store(!pinned, Ordering::SeqCst);
            }
        }));
        world
    }

    /// Everything that is to be seen happened often enough.
    fn saw_enough(&self) -> bool {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        count(&self.touches) > 1000
            && count(&self.changes) > 50
            && count(&self.refused) > 0
            && count(&self.large) > 0
    }

    fn freed(&self, frame: u64) -> &AtomicBool {
        &self.freed[(frame - FIRST_FRAME) as usize]
    }

    /// A vCPU that changes its processor now and then.
    fn vcpu(&self, number: usize) {
        let mut random = Random(number as u64);
        let mut reserve = Reserve::new();
        let mut tlbs: Vec<Cached> = vec![Cached::default(); VCPUS + 1];
        let mut generation = [0; VCPUS + 1];
        let mut cpu = number;
        while !self.stop.load(Ordering::Relaxed) {
            if random.one_in(16) {
                cpu = (number + random.below(2) as usize) % VCPUS;
            }
            run_as_cpu(cpu);
            let page = random.below(PAGES);
            if self.enter(cpu, page, &mut tlbs[cpu], &mut generation[cpu], &mut random) {
                let access = if random.one_in(2) {
                    Access::WRITE
                } else {
                    Access::READ
                };
                match self
                    .space
                    .fault(Gpa(page * PAGE), access, &mut reserve)
                    .unwrap()
                {
                    FaultOutcome::Mapped | FaultOutcome::Retry => {}
                    FaultOutcome::Mmio | FaultOutcome::Protected { .. } => {
                        self.refused.fetch_add(1, Ordering::Relaxed);
                    }
                    other => panic!("{other:?}"),
                }
                if self.space.statistics().leaves[1] > 0 {
                    self.large.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    /// One stay in the guest: touches `page`, and others while nobody wants the
    /// processor. Returns whether `page` has no translation.
    fn enter(
        &self,
        cpu: usize,
        page: u64,
        cached: &mut Cached,
        seen: &mut u64,
        random: &mut Random,
    ) -> bool {
        let processor = &self.host.0.processors[cpu];
        let off = processor.inside.lock().unwrap();
        processor.kicked.store(false, Ordering::Relaxed);
        let flush = self.space.before_entry(cpu).unwrap();
        // A processor's translations are its own, but here each vCPU keeps a
        // copy: it must also drop them when another vCPU did the INVEPT.
        let flushes = self.flush_count(cpu, flush.is_some());
        if *seen != flushes {
            *seen = flushes;
            *cached = Cached::default();
        }
        if let Some(flush) = flush {
            self.space.flushed(cpu, flush);
        }
        let mut missing = false;
        for turn in 0..32 {
            let touched = if turn == 0 { page } else { random.below(PAGES) };
            let frame = cached.frames.get(&touched).copied().or_else(|| {
                let eptp = self.space.eptp();
                let table = self.host.lowest_table(eptp, touched * PAGE);
                cached.tables.insert(touched / GROUP, table);
                let (frame, _) = self.host.translate(eptp, touched * PAGE)?;
                cached.frames.insert(touched, frame);
                Some(frame)
            });
            // A page walk may start from a cached table at any time.
            let lost = cached
                .tables
                .values()
                .any(|table| !self.host.is_table(*table));
            self.late.fetch_add(usize::from(lost), Ordering::Relaxed);
            missing |= turn == 0 && frame.is_none();
            if let Some(frame) = frame {
                let late = self.freed(frame).load(Ordering::SeqCst)
                    || self.closed[touched as usize].load(Ordering::SeqCst);
                self.late.fetch_add(usize::from(late), Ordering::Relaxed);
                self.touches.fetch_add(1, Ordering::Relaxed);
            }
            if processor.kicked.load(Ordering::Relaxed) {
                break;
            }
        }
        self.space.after_exit(cpu);
        drop(off);
        missing
    }

    /// How often this processor was flushed; counted by whoever is on it.
    fn flush_count(&self, cpu: usize, now: bool) -> u64 {
        static COUNTS: [AtomicU64; VCPUS + 1] = [const { AtomicU64::new(1) }; VCPUS + 1];
        COUNTS[cpu].fetch_add(u64::from(now), Ordering::SeqCst) + u64::from(now)
    }

    /// The client unmaps and protects parts, checks that they are out of reach,
    /// and gives them back.
    fn client(&self) {
        let mut random = Random(99);
        run_as_cpu(VCPUS);
        while !self.stop.load(Ordering::Relaxed) {
            let first = random.below(PAGES);
            let last = (first + 1 + random.below(100)).min(PAGES);
            let (gpa, size) = (first * PAGE, (last - first) * PAGE);
            let protect = random.one_in(2);
            if protect {
                self.space.protect_ram(gpa, size, 0).unwrap();
            } else {
                self.space.set_ram(gpa, size, 0, INVALID).unwrap();
            }
            let closed = &self.closed[first as usize..last as usize];
            for page in closed {
                page.store(true, Ordering::SeqCst);
            }
            std::thread::yield_now();
            for page in closed {
                page.store(false, Ordering::SeqCst);
            }
            if protect {
                self.space.protect_ram(gpa, size, 7).unwrap();
            } else {
                let va = (CLIENT + first) * PAGE;
                self.space.set_ram(gpa, size, va, 0).unwrap();
            }
            self.changes.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The client ends whole blocks, and what was pinned of them, and makes them
    /// anew. Their frames are the host's in between.
    fn client_of_blocks(&self) {
        let mut random = Random(99);
        run_as_cpu(VCPUS);
        let blocks: Vec<_> = blocks().collect();
        while !self.stop.load(Ordering::Relaxed) {
            let (first, last) = blocks[random.below(blocks.len() as u64) as usize];
            let (gpa, size) = (first * PAGE, (last - first) * PAGE);
            let pinned = |host: &FakeHost| {
                let pages = host.pinned();
                let here = CLIENT + first..CLIENT + last;
                pages.iter().filter(|page| here.contains(page)).count()
            };
            let before = pinned(&self.host);
            self.space.set_ram(gpa, size, 0, INVALID).unwrap();
            // A fault under way may hold them a moment longer.
            let begun = Instant::now();
            while pinned(&self.host) != 0 {
                assert!(
                    begun.elapsed().as_secs() < 20,
                    "pinned for a block that has ended"
                );
                std::thread::yield_now();
            }
            let va = (CLIENT + first) * PAGE;
            self.space.set_ram(gpa, size, va, STANDALONE).unwrap();
            self.changes
                .fetch_add(u64::from(before != 0), Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The host moves pages: `begin`, the old frames are free, `end`.
    fn host(&self) {
        let mut random = Random(7);
        let mut next = 2 * GROUP;
        while !self.stop.load(Ordering::Relaxed) {
            let large = random.one_in(2);
            let piece = random.below(PAGES / GROUP) * GROUP;
            let (first, count) = if large {
                (piece, GROUP)
            } else {
                (piece + random.below(GROUP), 1)
            };
            let frame = if next + 2 * GROUP >= FRAMES { 0 } else { next };
            next = frame + if large { GROUP } else { 1 };
            let frame = if large {
                frame.next_multiple_of(GROUP)
            } else {
                frame
            };
            next = next.max(frame + count);
            self.move_pages(piece, first, count, FIRST_FRAME + frame, large);
            self.changes.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn move_pages(&self, piece: u64, first: u64, count: u64, frame: u64, large: bool) {
        let in_use: Vec<u64> = (0..PAGES)
            .map(|page| self.host.backing(CLIENT + page).unwrap().frame)
            .collect();
        if (frame..frame + count).any(|frame| in_use.contains(&frame)) {
            return;
        }
        let mut old = Vec::new();
        let (start, end) = (CLIENT + first, CLIENT + first + count);
        self.host.change(start, end, |process| {
            // `begin` has returned: the old frames are the host's.
            for page in start..end {
                old.push(process[&page].frame);
            }
            for frame in &old {
                self.freed(*frame).store(true, Ordering::SeqCst);
            }
            for page in CLIENT + piece..CLIENT + piece + GROUP {
                process.get_mut(&page).unwrap().shift = 12;
            }
            for page in start..end {
                let frame = frame + page - start;
                self.freed(frame).store(false, Ordering::SeqCst);
                let shift = if large { 21 } else { 12 };
                process.insert(
                    page,
                    Backing {
                        frame,
                        writable: true,
                        shift,
                    },
                );
            }
        });
    }
}

fn run(duration: Duration, pins: bool) {
    let world = World::new(pins);
    let others = if pins { 1 } else { 2 };
    let start = Arc::new(Barrier::new(VCPUS + others));
    let threads: Vec<_> = (0..VCPUS + others)
        .map(|number| {
            let (world, start) = (world.clone(), start.clone());
            std::thread::spawn(move || {
                start.wait();
                match number {
                    VCPUS if pins => world.client_of_blocks(),
                    VCPUS => world.client(),
                    number if number > VCPUS => world.host(),
                    number => world.vcpu(number),
                }
            })
        })
        .collect();
    let begun = Instant::now();
    let failed = || threads.iter().any(std::thread::JoinHandle::is_finished);
    // A busy machine gets more time to come to something.
    while !failed() && begun.elapsed() < duration * 100 {
        if begun.elapsed() > duration && world.saw_enough() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let enough = world.saw_enough();
    world.stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let seen = format!(
        "{} touches, {} changes, {} refusals, large leaves {} times",
        count(&world.touches),
        count(&world.changes),
        count(&world.refused),
        count(&world.large)
    );
    println!("{seen}");
    assert_eq!(
        world.late.load(Ordering::Relaxed),
        0,
        "touches too late; {seen}"
    );
    assert_eq!(UNDER_SPIN.load(Ordering::Relaxed), 0);
    assert!(enough, "{seen}");
    unwatched(|| world.space.check_map());
    let World { host, space, .. } = Arc::into_inner(world).unwrap();
    drop(space);
    assert_eq!(host.pages(), 0);
    assert_eq!(host.pinned(), []);
}

#[test]
fn nobody_touches_what_was_taken_away() {
    run(Duration::from_secs(3), false);
}

#[test]
fn nobody_touches_what_was_unpinned() {
    run(Duration::from_secs(3), true);
}

/// An hour of it: `MEMORY_SECONDS`, 60 if not given.
#[test]
#[ignore = "takes as long as one lets it"]
fn nobody_touches_what_was_taken_away_for_long() {
    let seconds = std::env::var("MEMORY_SECONDS").ok();
    let seconds = seconds
        .and_then(|seconds| seconds.parse().ok())
        .unwrap_or(60);
    run(Duration::from_secs(seconds), false);
    run(Duration::from_secs(seconds), true);
}
