//! The rows of guest memory: `cargo xtask bench memory`.

use anyhow::Result;

use crate::api::{Api, Exit, Vm};
use crate::code;
use crate::growth;
use crate::guest::{Guest, RAM_SIZE, TOUCHED, TOUCHED_SIZE};
use crate::measured;
use crate::ram::Ram;
use crate::rows::{Row, samples_of};
use crate::sample::{Samples, now, ticks};

const MB: u64 = 1 << 20;

pub fn rows<A: Api>() -> [Row<A>; 9] {
    [
        ("memory_host_fault", host_fault),
        ("memory_touch_first", touch_first),
        ("memory_touch_scattered", touch_scattered),
        ("memory_touch_host_4k", touch_host_4k),
        ("memory_touch_host_2m", touch_host_2m),
        ("memory_fault_2m", fault_2m),
        ("memory_slots", slots),
        ("memory_held_4k", held_4k),
        ("memory_held_2m", held_2m),
    ]
}

/// Guests of a row that is a mean over pages, each with its own memory.
const PASSES: u64 = 5;
/// The same where a pass may be as short as half of the time between two interrupts of the host's timer: at least one
/// of them meets none.
const SHORT_PASSES: u64 = 25;
/// Ticks, and so many times the number of a pass, that it begins later: not in step with the host's timer.
const SHIFT: u64 = 7919;

/// What the kernel itself takes for the first write to a page, in a process without any guest.
fn host_fault<A: Api>(_: &A) -> Result<()> {
    let pass = || -> Result<Samples> {
        let ram = Ram::new(RAM_SIZE)?;
        let pages = (TOUCHED..TOUCHED + TOUCHED_SIZE).step_by(4096);
        Ok(pages
            .map(|page| ticks(|| ram.write(page, &[1])).0)
            .collect())
    };
    let passes: Result<Vec<Samples>> = (0..PASSES).map(|_| pass()).collect();
    Samples::quietest(passes?).print("host_fault");
    Ok(())
}

/// The guest runs `code` in memory from `ram`, which measures 1024 pages, so many times.
fn passes<A: Api>(
    api: &A,
    name: &str,
    code: &[u8],
    count: u64,
    ram: impl Fn() -> Result<Ram>,
) -> Result<()> {
    let pass = |number| {
        let guest = Guest::new(api, code, ram()?)?;
        let begin = now() + number * SHIFT;
        while now() < begin {}
        samples_of(&guest, name)
    };
    let passes: Result<Vec<Samples>> = (0..count).map(pass).collect();
    Samples::quietest(passes?).print(name);
    Ok(())
}

/// Writes to 1024 pages, one after the other.
fn touch<A: Api>(api: &A, name: &str, count: u64, ram: impl Fn() -> Result<Ram>) -> Result<()> {
    let code = measured!("mov byte ptr [ebx], 1", "add ebx, 4096");
    passes(api, name, code, count, ram)
}

fn touch_first<A: Api>(api: &A) -> Result<()> {
    touch(api, "touch_first", PASSES, || Ram::new(RAM_SIZE))
}

/// The same pages in no order.
fn touch_scattered<A: Api>(api: &A) -> Result<()> {
    let code = measured!(
        "mov byte ptr [ebx], 1",
        // 389 pages on, within the 4 MB.
        "add ebx, 0x185000",
        "and ebx, 0x3fffff",
        "or ebx, 0x400000",
    );
    passes(api, "touch_scattered", code, PASSES, || Ram::new(RAM_SIZE))
}

fn touch_host_4k<A: Api>(api: &A) -> Result<()> {
    touch(api, "touch_host_4k", SHORT_PASSES, || {
        let ram = Ram::new(RAM_SIZE)?;
        ram.touch(TOUCHED, TOUCHED_SIZE);
        Ok(ram)
    })
}

fn touch_host_2m<A: Api>(api: &A) -> Result<()> {
    touch(api, "touch_host_2m", SHORT_PASSES, || {
        let ram = Ram::new(RAM_SIZE)?;
        ram.large(TOUCHED, TOUCHED_SIZE)?;
        ram.touch(TOUCHED, TOUCHED_SIZE);
        Ok(ram)
    })
}

/// The fault that maps 2 MB: one touch in each of 32 pages of that size.
fn fault_2m<A: Api>(api: &A) -> Result<()> {
    const PAGES: u64 = 32;
    let size = PAGES << 21;
    let ram = Ram::new(TOUCHED + size)?;
    ram.large(TOUCHED, size)?;
    ram.touch(TOUCHED, size);
    let code = code!(
        "mov edi, 0x100000",
        "mov ebp, 32",
        "mov ebx, 0x400000",
        "2: rdtsc",
        "mov esi, eax",
        "mov byte ptr [ebx], 1",
        "add ebx, 0x200000",
        "rdtsc",
        "sub eax, esi",
        "stosd",
        "dec ebp",
        "jnz 2b",
        "hlt",
    );
    let guest = Guest::new(api, code, ram)?;
    guest.expect(Exit::Halt)?;
    let samples: Samples = guest.first_results(PAGES).collect();
    samples.print("fault_2m");
    Ok(())
}

/// One more 4 KB mapping, and its end, in a VM that has others.
fn slots<A: Api>(api: &A) -> Result<()> {
    const OTHERS: [u32; 4] = [1, 100, 10_000, 100_000];
    let most = OTHERS.into_iter().filter(|n| *n < A::MOST_SLOTS).max();
    let most = most.unwrap_or(1);
    let pages = 2 * u64::from(most) + 2;
    let ram = Ram::new(pages * 4096)?;
    let vm = api.create_vm()?;
    vm.declare(ram.address(), ram.size())?;
    // Every other page, so that no two are one range.
    let put = |slot: u32| {
        let at = u64::from(slot) * 8192;
        vm.map(slot, at, 4096, ram.address() + at)
    };
    let mut have = 0;
    for wanted in OTHERS.into_iter().filter(|n| *n <= most) {
        while have < wanted {
            put(have)?;
            have += 1;
        }
        let mut samples = Samples::default();
        for _ in 0..15 {
            let (ticks, result) = ticks(|| {
                put(most)?;
                vm.unmap(most, u64::from(most) * 8192, 4096)
            });
            result?;
            samples.push(ticks);
        }
        samples.print(&format!("slots_{wanted}"));
    }
    Ok(())
}

/// Where the gigabyte of the next rows is, and what backs each piece of it.
const GIGABYTE: u64 = 1 << 30;
const BACKING: u64 = 64 * MB;

/// What the driver holds for a gigabyte of guest RAM, all of it touched. The same 64 MB back it sixteen times: of
/// that the driver's tables know nothing.
fn held<A: Api>(api: &A, name: &str, ram: Ram) -> Result<()> {
    if A::memory().is_none() {
        return Ok(());
    }
    ram.touch(RAM_SIZE, BACKING);
    let guest = Guest::new(
        api,
        code!(
            "mov ebx, 0x40000000",
            "2: or byte ptr [ebx], 1",
            "add ebx, 4096",
            "jns 2b",
            "hlt",
        ),
        ram,
    )?;
    for piece in 0..GIGABYTE / BACKING {
        let slot = 1 + u32::try_from(piece)?;
        let from = guest.ram.address() + RAM_SIZE;
        guest
            .vm
            .map(slot, GIGABYTE + piece * BACKING, BACKING, from)?;
    }
    let (free, before) = (growth::free()?, A::memory().unwrap_or(0));
    guest.expect(Exit::Halt)?;
    let (after, left) = (A::memory().unwrap_or(0), growth::free()?);
    let mut held = Samples::default();
    held.push(after.saturating_sub(before));
    held.print(&format!("held_{name}"));
    let mut host = Samples::default();
    host.push(free.saturating_sub(left));
    host.print(&format!("held_{name}_host"));
    Ok(())
}

fn held_4k<A: Api>(api: &A) -> Result<()> {
    held(api, "4k", Ram::new(RAM_SIZE + BACKING)?)
}

fn held_2m<A: Api>(api: &A) -> Result<()> {
    let ram = Ram::new(RAM_SIZE + BACKING)?;
    ram.large(RAM_SIZE, BACKING)?;
    held(api, "2m", ram)
}
