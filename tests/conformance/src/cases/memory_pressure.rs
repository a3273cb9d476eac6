//! The host takes pages, moves them, merges them and makes large ones of them while a guest uses them: the
//! guest sees what the client sees, and the driver uses the large pages there are.
//!
//! A sweep of the guest reads all of a buffer, compares every eight bytes with what the client wrote there, and
//! writes others, which the client compares.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};

use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::Exit;
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;
use crate::region::{HUGE, LARGE, PAGE, Pattern, Region, Swap};

pub const CASES: &[Case] = &[
    case!(small_leaves),
    case!(large_leaves),
    case!(huge_leaf),
    case!(large_page_split_and_collapsed),
    case!(swapped_out),
    case!(swapped_out_while_it_runs),
    case!(merged),
    case!(compacted),
];

/// Where the buffer is in the guest.
const GPA: u64 = 0x1000_0000;
const BUFFER: u64 = 4 << 20;

/// RDI, RCX: the buffer and its words. RAX, RBX: what must be there, and its step. RDX, RSI: what is written
/// there, and its step. Stops with HLT where it finds something else.
fn sweep() -> Code {
    guest!(64:
        "2: cmp [rdi], rax", "jne 3f", "mov [rdi], rdx",
        "add rax, rbx", "add rdx, rsi", "add rdi, 8", "dec rcx", "jnz 2b",
        "out 0x80, al", "3: hlt")
}

/// A guest with a buffer.
struct Host {
    machine: Machine,
    region: Region,
    gpa: u64,
}

impl Host {
    fn new(region: Region, gpa: u64) -> Result<Self> {
        let machine = Machine::new(Mode::Long, sweep())?;
        machine.vm.add_ramblock(region.address(), region.size())?;
        machine
            .vm
            .set_ram2(gpa, region.size(), 0, region.address())?;
        Ok(Self {
            machine,
            region,
            gpa,
        })
    }

    fn buffer() -> Result<Self> {
        Self::new(Region::new(BUFFER)?, GPA)
    }

    /// The guest finds one pattern everywhere and leaves the other one.
    fn sweep(&self, found: Pattern, left: Pattern) -> Result<()> {
        self.machine.set(|state| {
            state.rip = self.machine.mode.entry();
            (state.rdi, state.rcx) = (self.gpa, self.region.size() / 8);
            (state.rax, state.rbx) = (found.first, found.step);
            (state.rdx, state.rsi) = (left.first, left.step);
        })?;
        let exit = self.machine.run()?;
        let state = self.machine.regs()?;
        let offset = state.rdi.wrapping_sub(self.gpa);
        ensure!(
            matches!(exit, Exit::Out { .. }),
            "{exit:?}: the guest does not find {:#x} at {offset:#x} of the buffer",
            state.rax
        );
        Ok(())
    }

    /// Both sides see all that the other one writes. `between` is run after each writing.
    fn both_sides(&self, seed: u64, mut between: impl FnMut() -> Result<()>) -> Result<()> {
        let (first, second) = (pattern(seed), pattern(seed + 1));
        self.region.fill(first);
        between()?;
        self.sweep(first, second)?;
        between()?;
        self.sweep(second, first)?;
        between()?;
        self.region.check(first)
    }

    /// Ends the VM; what the driver says of its memory.
    fn finish(self) -> Result<Counters> {
        let log = KernelLog::from_now()?;
        let name = format!("VM {}: memory:", self.machine.vm.id);
        drop(self.machine);
        log.counters(&name)
    }
}

const fn pattern(seed: u64) -> Pattern {
    let first = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Pattern {
        first,
        step: first | 1,
    }
}

/// What the driver counted.
#[derive(Debug)]
struct Counters {
    leaves: [u64; 3],
    tables: u64,
    flushes: u64,
}

/// The kernel's log.
struct KernelLog(fs::File);

impl KernelLog {
    /// What is logged from now on.
    fn from_now() -> Result<Self> {
        let mut file = fs::File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// The counters in the line that has `name` in it: `12 slots, leaves 100/3/0, 9 tables, 4 flushes`.
    fn counters(mut self, name: &str) -> Result<Counters> {
        let mut record = [0; 1024];
        // A read gives one record, and fails after the last one.
        while let Ok(length) = self.0.read(&mut record) {
            let text =
                String::from_utf8_lossy(record.get(..length).unwrap_or_default()).into_owned();
            let Some((_, counters)) = text.split_once(name) else {
                continue;
            };
            let numbers: Vec<u64> = counters
                .lines()
                .next()
                .unwrap_or_default()
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|word| word.parse().ok())
                .collect();
            let [_, small, large, huge, tables, flushes] = numbers.as_slice() else {
                anyhow::bail!("cannot make sense of '{counters}'");
            };
            return Ok(Counters {
                leaves: [*small, *large, *huge],
                tables: *tables,
                flushes: *flushes,
            });
        }
        anyhow::bail!("the driver logs no '{name}'")
    }
}

/// A file of the kernel's with another setting in it until this is dropped.
struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    fn new(path: &'static str, value: &str) -> Result<Self> {
        let text = fs::read_to_string(path).context(path)?;
        // One word, or a choice of words with brackets around the one that holds.
        let chosen = text.split(['[', ']']).nth(1).unwrap_or(&text);
        fs::write(path, value).context(path)?;
        Ok(Self {
            path,
            before: chosen.trim().to_owned(),
        })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // The next case that needs another setting makes it itself.
        drop(fs::write(self.path, &self.before));
    }
}

/// Machines with little memory have large pages switched off.
fn large_pages() -> Result<Setting> {
    Setting::new("/sys/kernel/mm/transparent_hugepage/enabled", "madvise")
}

/// Pages in 4 KB: the tables take at most 0.3 % of guest RAM.
fn small_leaves() -> Outcome {
    const SIZE: u64 = 16 << 20;
    let host = Host::new(Region::new(SIZE)?, GPA)?;
    let zero = Pattern { first: 0, step: 0 };
    host.sweep(zero, pattern(1))?;
    host.region.check(pattern(1))?;
    let counters = host.finish()?;
    ensure!(counters.leaves[0] >= SIZE / PAGE, "{counters:?}");
    ensure!(
        counters.leaves[1] == 0 && counters.leaves[2] == 0,
        "{counters:?}"
    );
    ensure!(
        counters.tables * PAGE * 1000 <= SIZE * 3,
        "more than 0.3 %: {counters:?}"
    );
    Ok(())
}

/// Pages in 2 MB: no table below the directory, which serves a whole gigabyte: 0.01 % of it at most.
fn large_leaves() -> Outcome {
    let _setting = large_pages()?;
    let host = Host::buffer()?;
    host.region.advise(0, BUFFER, libc::MADV_HUGEPAGE)?;
    host.both_sides(2, || Ok(()))?;
    let counters = host.finish()?;
    ensure!(counters.leaves[1] == BUFFER / LARGE, "{counters:?}");
    // Those of the first two megabytes, where pages are small.
    ensure!(
        counters.leaves[0] <= 512 && counters.leaves[2] == 0,
        "{counters:?}"
    );
    ensure!(
        counters.tables * PAGE * 10_000 <= HUGE,
        "more than 0.01 %: {counters:?}"
    );
    Ok(())
}

/// A page of 1 GB, where the host has one to give.
fn huge_leaf() -> Outcome {
    borrowed_only!();
    let pages = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages");
    if !matches!(pages.as_deref().map(str::trim), Ok(count) if count != "0") {
        println!("  no page of 1 GB: huge_leaf has nothing to show");
        return Ok(());
    }
    // The guest's tables reach one gigabyte: its second half is mapped where the first one is, too.
    let machine = Machine::new(
        Mode::Long,
        guest!(64: "mov eax, [rdi]", "mov dword ptr [rdi + 4], 0x22", "hlt"),
    )?;
    let region = Region::huge()?;
    machine.vm.add_ramblock(region.address(), HUGE)?;
    machine.vm.set_ram2(4 * HUGE, HUGE, 0, region.address())?;
    for offset in [0, HUGE / 2 + 0x1234_5678, HUGE - PAGE] {
        let offset = offset & !7;
        // Linear 1 GB: the page that the case is about, in the guest's own page of 1 GB.
        machine
            .ram
            .write_u64(crate::modes::PDPT + 8, (4 * HUGE) | 0xe7);
        region.set(offset, 0x21);
        machine.set(|state| {
            state.rip = machine.mode.entry();
            state.rdi = HUGE + offset;
        })?;
        let exit = machine.run()?;
        ensure!(exit == Exit::Halt, "{exit:?} at {offset:#x}");
        same!(
            (machine.regs()?.rax, region.get(offset)),
            (0x21, 0x22_0000_0021),
            "both sides at {offset:#x}"
        );
    }
    let host = Host {
        machine,
        region,
        gpa: 4 * HUGE,
    };
    let counters = host.finish()?;
    same!(counters.leaves[2], 1, "leaves of 1 GB");
    same!(counters.leaves[1], 0, "leaves of 2 MB");
    Ok(())
}

/// One page given back in the middle of large ones, and the hole closed again.
fn large_page_split_and_collapsed() -> Outcome {
    borrowed_only!();
    const MADV_COLLAPSE: i32 = 25;
    let _setting = large_pages()?;
    let host = Host::buffer()?;
    host.region.advise(0, BUFFER, libc::MADV_HUGEPAGE)?;
    host.both_sides(3, || Ok(()))?;
    for large in 0..BUFFER / LARGE {
        host.region
            .advise(large * LARGE + 7 * PAGE, PAGE, libc::MADV_DONTNEED)?;
    }
    let zero = Pattern { first: 0, step: 0 };
    for large in 0..BUFFER / LARGE {
        let hole = large * LARGE + 7 * PAGE;
        for offset in (hole..hole + PAGE).step_by(8) {
            same!(host.region.get(offset), 0, "the hole");
        }
    }
    host.region.fill(zero);
    host.sweep(zero, pattern(4))?;
    host.region.check(pattern(4))?;
    host.region.advise(0, BUFFER, MADV_COLLAPSE)?;
    host.sweep(pattern(4), pattern(5))?;
    host.region.check(pattern(5))?;
    let counters = host.finish()?;
    ensure!(
        counters.leaves[1] == BUFFER / LARGE,
        "not large again: {counters:?}"
    );
    ensure!(counters.flushes >= BUFFER / LARGE, "{counters:?}");
    Ok(())
}

/// The whole buffer goes to a swap device, though the guest has it mapped.
fn swapped_out() -> Outcome {
    borrowed_only!();
    let _swap = Swap::on("/dev/ram0")?;
    let host = Host::buffer()?;
    host.both_sides(6, || {
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
    let _swap = Swap::on("/dev/ram0")?;
    let host = Host::buffer()?;
    let piece = std::sync::atomic::AtomicU64::new(0);
    let count = disturbed(
        || {
            let at = piece.fetch_add(5, Ordering::Relaxed) % 16;
            host.region
                .advise(at * BUFFER / 16, BUFFER / 16, libc::MADV_PAGEOUT)
        },
        || host.both_sides(8, || Ok(())),
    )?;
    ensure!(count >= 2, "disturbed {count} times");
    Ok(())
}

/// Pages of the same content become one, and the guest's writes part them again.
fn merged() -> Outcome {
    borrowed_only!();
    const KSM: &str = "/sys/kernel/mm/ksm/run";
    let _scan = Setting::new("/sys/kernel/mm/ksm/pages_to_scan", "4096")?;
    let _sleep = Setting::new("/sys/kernel/mm/ksm/sleep_millisecs", "0")?;
    let host = Host::new(Region::new(LARGE)?, GPA)?;
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
    let start = std::time::Instant::now();
    while !merged()? {
        ensure!(start.elapsed().as_secs() < 5, "nothing is merged");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    drop(run);
    // Merged pages are read by both sides, then each gets a content of its own.
    host.sweep(same(0x12), same(0x12))?;
    host.region.check(same(0x12))?;
    fs::write(KSM, "1")?;
    while !merged()? {
        ensure!(start.elapsed().as_secs() < 10, "nothing is merged again");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    fs::write(KSM, "0")?;
    host.sweep(same(0x12), pattern(10))?;
    host.region.check(pattern(10))?;
    fs::write(KSM, "2").context("unmerge")
}

/// The kernel moves pages to other frames while the guest runs.
fn compacted() -> Outcome {
    borrowed_only!();
    let host = Host::buffer()?;
    // Holes between the pages: only pages in 2 MB that are free in part are moved, and only to such.
    let filler = Region::new(4 * BUFFER)?;
    for page in 0..BUFFER / PAGE {
        host.region.set(page * PAGE, 0);
        for beside in 0..3 {
            filler.set((page * 4 + beside) * PAGE, 1);
        }
    }
    drop(filler);
    host.region.fill(pattern(11));
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
    ensure!(moved != 0, "compaction ran {count} times and moved nothing");
    Ok(())
}
