//! The driver uses the large pages that the host has, and gets along with small ones.

use std::fs;

use abi::ram::RamFlags;
use anyhow::{Result, ensure};

use super::{Case, Outcome};
use crate::exit::{Exit, halt};
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;
use crate::process::after_fork;
use crate::region::{HUGE, LARGE, PAGE, Pattern, Region};
use crate::swept::{BUFFER, Counters, GPA, Swept, counted, large_pages, pattern};

pub const CASES: &[Case] = &[
    case!(small_leaves),
    case!(large_leaves),
    case!(large_pages_stay_shared_while_they_are_read),
    case!(huge_leaf),
    case!(large_page_split_and_collapsed),
    case!(large_again_after_rom),
    case!(large_again_after_protection),
];

/// Pages in 4 KB: the tables take at most 0.3 % of guest RAM.
fn small_leaves() -> Outcome {
    const SIZE: u64 = 16 << 20;
    let attempt = || {
        let host = Swept::new(Region::new(SIZE)?, GPA)?;
        let zero = Pattern { first: 0, step: 0 };
        host.sweep(zero, pattern(1))?;
        host.region.check(pattern(1))?;
        host.finish()
    };
    counted(attempt, |counters| {
        counters.leaves[0] >= SIZE / PAGE
            && counters.leaves[1..] == [0, 0]
            && counters.tables * PAGE * 1000 <= SIZE * 3
    })
}

/// Pages in 2 MB: no table below the directory, which serves a whole gigabyte: 0.01 % of it at most.
fn large_leaves() -> Outcome {
    let Some(_setting) = large_pages()? else {
        return Ok(());
    };
    let attempt = || {
        let host = Swept::buffer()?;
        host.region.advise(0, BUFFER, libc::MADV_HUGEPAGE)?;
        host.both_sides(2, || Ok(()))?;
        host.finish()
    };
    counted(attempt, |counters| {
        all_large(counters) && counters.leaves[2] == 0 && counters.tables * PAGE * 10_000 <= HUGE
    })
}

/// The buffer in large leaves; small are those of the first two megabytes only, where pages are small.
fn all_large(counters: &Counters) -> bool {
    counters.leaves[1] == BUFFER / LARGE && counters.leaves[0] <= 512
}

/// What a child shares since a fork may only be read. A guest that reads it does not have it copied, which would
/// take the large pages apart.
fn large_pages_stay_shared_while_they_are_read() -> Outcome {
    borrowed_only!();
    let Some(_setting) = large_pages()? else {
        return Ok(());
    };
    counted(read_beside_a_child, all_large)
}

fn read_beside_a_child() -> Result<Counters> {
    let read_all = guest!(64: "2: mov rax, [rdi]", "add rdi, 4096", "dec rcx", "jnz 2b", "hlt");
    let host = Swept::with(read_all, Region::new(BUFFER)?, GPA)?;
    host.region.advise(0, BUFFER, libc::MADV_HUGEPAGE)?;
    host.region.fill(pattern(6));
    let parent = || {
        host.machine
            .set(|state| (state.rdi, state.rcx) = (GPA, BUFFER / PAGE))?;
        host.machine.expect(&[halt()])
    };
    let seen = after_fork(parent, || host.region.check(pattern(6)).is_ok().into())?;
    same!(seen, 1, "what the child sees");
    host.finish()
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
    let host = Swept {
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
    let Some(_setting) = large_pages()? else {
        return Ok(());
    };
    counted(split_and_collapsed, |counters| {
        counters.leaves[1] == BUFFER / LARGE && counters.flushes >= BUFFER / LARGE
    })
}

fn split_and_collapsed() -> Result<Counters> {
    const MADV_COLLAPSE: i32 = 25;
    let host = Swept::buffer()?;
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
    // The kernel says EAGAIN where somebody else is busy with a page.
    for _ in 0..20 {
        if host.region.advise(0, BUFFER, MADV_COLLAPSE).is_ok() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    host.sweep(pattern(4), pattern(5))?;
    host.region.check(pattern(5))?;
    host.finish()
}

/// One page of each large one is ROM for a while. The guest then touches none but pages that had small leaves all the
/// time, and gets the large ones again. (What is pinned in pieces by parted slots stays in pieces.)
fn large_again_after_rom() -> Outcome {
    borrowed_only!();
    let Some(_setting) = large_pages()? else {
        return Ok(());
    };
    counted(rom_for_a_while, |counters| {
        counters.merges == BUFFER / LARGE && all_large(counters)
    })
}

fn rom_for_a_while() -> Result<Counters> {
    let host = Swept::buffer()?;
    host.region.advise(0, BUFFER, libc::MADV_HUGEPAGE)?;
    host.region.fill(pattern(20));
    let rom = |on: bool| -> Outcome {
        for large in 0..BUFFER / LARGE {
            let at = large * LARGE + LARGE / 2;
            let flags = if on { RamFlags::ROM } else { RamFlags::empty() };
            let va = host.region.address() + at;
            host.machine.vm.set_ram2(GPA + at, PAGE, flags.bits(), va)?;
        }
        Ok(())
    };
    // Of each large page the first half.
    let halves = || -> Outcome {
        for large in 0..BUFFER / LARGE {
            host.sweep_part(large * LARGE, LARGE / 2, pattern(20), pattern(20))?;
        }
        Ok(())
    };
    rom(true)?;
    halves()?;
    rom(false)?;
    halves()?;
    host.region.check(pattern(20))?;
    host.finish()
}

/// The same with protection, which takes the whole 2 MB away.
fn large_again_after_protection() -> Outcome {
    let Some(_setting) = large_pages()? else {
        return Ok(());
    };
    let attempt = || {
        let host = Swept::buffer()?;
        host.region.advise(0, BUFFER, libc::MADV_HUGEPAGE)?;
        host.both_sides(22, || {
            for flags in [0, 7] {
                host.machine.vm.protect_ram(GPA + 5 * PAGE, PAGE, flags)?;
            }
            Ok(())
        })?;
        host.sweep(pattern(22), pattern(22))?;
        host.finish()
    };
    counted(attempt, all_large)
}
