//! The host takes pages, moves them and merges them while a guest uses them: the guest sees what the client sees,
//! and the host hears which pages the guest uses.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};

use super::{Case, Outcome};
use crate::region::{LARGE, PAGE, Pattern, Region, Swap};
use crate::swept::{BUFFER, GPA, Setting, Swept, pattern};
use crate::threads::PATIENCE;

pub const CASES: &[Case] = &[
    case!(swapped_out),
    case!(swapped_out_while_it_runs),
    case!(merged),
    case!(compacted),
    case!(what_the_guest_uses_stays),
];

/// The whole buffer goes to a swap device, though the guest has it mapped.
fn swapped_out() -> Outcome {
    borrowed_only!();
    let _swap = Swap::on("/dev/ram0")?;
    let host = Swept::buffer()?;
    host.both_sides(6, || {
        // The first time a kernel may leave what the guest has just used, and count it as unused.
        host.region.advise(0, BUFFER, libc::MADV_PAGEOUT)?;
        host.region.advise(0, BUFFER, libc::MADV_PAGEOUT)?;
        let pages = host.region.pages()?;
        let swapped = pages.iter().filter(|page| page.is_swapped()).count();
        ensure!(
            swapped * 10 >= pages.len() * 9,
            "{swapped} of {} pages are swapped out",
            pages.len()
        );
        Ok(())
    })
}

/// Runs `disturb` over and over in another thread while `body` runs; how often.
fn disturbed(
    disturb: impl Fn() -> Result<()> + Sync,
    body: impl FnOnce() -> Result<()>,
) -> Result<u32> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let disturber = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                disturb()?;
                count += 1;
                std::thread::yield_now();
            }
            Ok(count)
        });
        let result = body();
        stop.store(true, Ordering::Relaxed);
        let count = disturber
            .join()
            .unwrap_or_else(|_| anyhow::bail!("the other thread panicked"));
        result.and(count)
    })
}

/// The same in pieces while the guest runs.
fn swapped_out_while_it_runs() -> Outcome {
    borrowed_only!();
    const ENOUGH: usize = 16;
    let _swap = Swap::on("/dev/ram0")?;
    let host = Swept::buffer()?;
    // From here on the guest has mapped it.
    host.both_sides(7, || Ok(()))?;
    let (piece, most) = (AtomicU64::new(0), AtomicUsize::new(0));
    disturbed(
        || {
            let at = piece.fetch_add(5, Ordering::Relaxed) % 16 * (BUFFER / 16);
            // Twice, as in `swapped_out`.
            for _ in 0..2 {
                host.region.advise(at, BUFFER / 16, libc::MADV_PAGEOUT)?;
            }
            let pages = host.region.pages()?;
            let swapped = pages.iter().filter(|page| page.is_swapped()).count();
            most.fetch_max(swapped, Ordering::Relaxed);
            Ok(())
        },
        || {
            // How often the other thread gets to run, and whether the guest uses a piece between the two requests, is
            // the scheduler's choice.
            for _ in 0..100 {
                let enough = most.load(Ordering::Relaxed) >= ENOUGH;
                host.both_sides(8, || Ok(()))?;
                if enough {
                    return Ok(());
                }
            }
            bail!("at most {most:?} pages were swapped out at once")
        },
    )
    .map(drop)
}

/// Pages of the same content become one, and the guest's writes part them again.
fn merged() -> Outcome {
    borrowed_only!();
    const KSM: &str = "/sys/kernel/mm/ksm/run";
    let _scan = Setting::new("/sys/kernel/mm/ksm/pages_to_scan", "4096")?;
    let _sleep = Setting::new("/sys/kernel/mm/ksm/sleep_millisecs", "0")?;
    let host = Swept::new(Region::new(LARGE)?, GPA)?;
    let same = |value| Pattern {
        first: value,
        step: 0,
    };
    host.region.advise(0, LARGE, libc::MADV_MERGEABLE)?;
    host.region.fill(same(0x11));
    host.sweep(same(0x11), same(0x12))?;
    let run = Setting::new(KSM, "1")?;
    // Pages in one frame, at most 256 to a frame by default.
    let merged = || -> Result<bool> {
        let mut frames: Vec<_> = host
            .region
            .pages()?
            .into_iter()
            .map(crate::region::PageState::frame)
            .collect();
        frames.sort_unstable();
        frames.dedup();
        Ok(frames.len() <= 16)
    };
    // The kernel's thread for it is nice to others.
    let until_merged = || -> Result<()> {
        let start = std::time::Instant::now();
        while !merged()? {
            ensure!(start.elapsed() < PATIENCE, "nothing is merged");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(())
    };
    until_merged()?;
    drop(run);
    // Merged pages are read by both sides, then each gets a content of its own.
    host.sweep(same(0x12), same(0x12))?;
    host.region.check(same(0x12))?;
    fs::write(KSM, "1")?;
    until_merged().context("again")?;
    fs::write(KSM, "0")?;
    host.sweep(same(0x12), pattern(10))?;
    host.region.check(pattern(10))?;
    // The kernel starts over for each signal, and gets to no end if one comes all the time.
    crate::process::alarm_every(0);
    fs::write(KSM, "2").context("unmerge")
}

/// The kernel moves pages to other frames while the guest runs. It moves from one end of memory to the other, so
/// where the pages are at the wrong end they are given others, from behind what is taken first.
fn compacted() -> Outcome {
    borrowed_only!();
    let quarter = u64::try_from(super::lifecycle::free_kilobytes()?)? * 1024 / 4;
    let mut count = 0;
    for taken_first in [0, quarter, 2 * quarter, 3 * quarter] {
        let (runs, moved) = compact(taken_first / PAGE * PAGE)?;
        if moved != 0 {
            return Ok(());
        }
        count += runs;
    }
    bail!("compaction ran {count} times and moved nothing");
}

/// How often compaction ran while the guest did, and how many of its pages it moved.
fn compact(taken_first: u64) -> Result<(u32, usize)> {
    let first = Region::new(taken_first.max(PAGE))?;
    for page in 0..taken_first / PAGE {
        first.set(page * PAGE, 1);
    }
    let host = Swept::buffer()?;
    // Holes between the pages: only pages in 2 MB that are free in part are moved, and only to such.
    let filler = Region::new(4 * BUFFER)?;
    for page in 0..BUFFER / PAGE {
        host.region.set(page * PAGE, 0);
        for beside in 0..3 {
            filler.set((page * 4 + beside) * PAGE, 1);
        }
    }
    drop(filler);
    drop(first);
    host.region.fill(pattern(10));
    host.sweep(pattern(10), pattern(11))?;
    let before = host.region.pages()?;
    let count = disturbed(
        || fs::write("/proc/sys/vm/compact_memory", "1").context("compact_memory"),
        || host.both_sides(11, || Ok(())),
    )?;
    let after = host.region.pages()?;
    let moved = before
        .iter()
        .zip(&after)
        .filter(|(before, after)| before != after)
        .count();
    Ok((count, moved))
}

/// A control group for this process's memory, until it is dropped.
struct MemoryGroup;

impl MemoryGroup {
    const ROOT: &'static str = "/control";
    const GROUP: &'static str = "/control/aging";

    fn join() -> Result<Self> {
        fs::create_dir_all(Self::ROOT)?;
        crate::region::mount_control_groups(Path::new(Self::ROOT))?;
        let group = Self;
        fs::write("/control/cgroup.subtree_control", "+memory").context("memory controller")?;
        fs::create_dir_all(Self::GROUP)?;
        fs::write("/control/aging/cgroup.procs", "0").context("joining")?;
        Ok(group)
    }

    /// Has the kernel reclaim about so many bytes of the group, in the way it does when memory is short.
    fn reclaim(bytes: u64) {
        // It fails where it has found less.
        drop(fs::write(
            "/control/aging/memory.reclaim",
            bytes.to_string(),
        ));
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // What is still charged to the group keeps it in existence; nobody else uses it.
        drop(fs::write("/control/cgroup.procs", "0"));
        drop(fs::remove_dir(Self::GROUP));
        crate::region::unmount(Path::new(Self::ROOT));
    }
}

/// Memory gets short: what the guest uses all the time stays, what it has used once goes. The client uses none of
/// it, so that only the driver can tell the kernel which is which.
fn what_the_guest_uses_stays() -> Outcome {
    borrowed_only!();
    const HOT: u64 = BUFFER / 4;
    let _swap = Swap::on("/dev/ram0")?;
    let group = MemoryGroup::join()?;
    let host = Swept::buffer()?;
    let zero = Pattern { first: 0, step: 0 };
    host.sweep(zero, pattern(12))?;
    let swapped = || -> Result<(usize, usize)> {
        let pages = host.region.pages()?;
        let (hot, cold) = pages.split_at((HOT / PAGE) as usize);
        let count = |pages: &[crate::region::PageState]| {
            pages.iter().filter(|page| page.is_swapped()).count()
        };
        Ok((count(hot), count(cold)))
    };
    // Pages that are new count as used. The first reclaim finds that so, and what it takes is no matter.
    MemoryGroup::reclaim(PAGE * 16);
    let (mut lost, mut gone, mut rounds) = (0, 0, 0);
    while gone < (BUFFER - HOT) / PAGE / 2 {
        host.sweep_part(0, HOT, pattern(12), pattern(12))?;
        MemoryGroup::reclaim(PAGE * 64);
        let (hot, cold) = swapped()?;
        (lost, gone, rounds) = (lost + hot as u64, cold as u64, rounds + 1);
        ensure!(rounds < 100, "only {gone} pages are swapped out");
    }
    println!(
        "  {rounds} reclaims: {gone} pages swapped out that were used once, {lost} of those in use"
    );
    ensure!(
        lost * 50 <= gone,
        "{lost} pages in use were swapped out beside {gone} others"
    );
    drop(group);
    host.sweep(pattern(12), pattern(13))?;
    host.region.check(pattern(13))
}
