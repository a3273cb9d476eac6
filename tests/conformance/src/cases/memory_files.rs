//! Guest RAM that is a file's, and what the host counts as written: whoever asks it finds the guest's writes.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use anyhow::{Context, ensure};

use super::{Case, Outcome};
use crate::exit::halt;
use crate::guest;
use crate::region::{PAGE, Pattern, Region, Swap, memory_file, punch};
use crate::swept::{BUFFER, GPA, Swept, pattern};

pub const CASES: &[Case] = &[
    case!(shared_file),
    case!(written_after_a_read),
    case!(private_copy_of_a_file),
    case!(written_back),
    case!(freed_lazily),
    case!(soft_dirty),
];

/// Bytes of the smaller buffers.
const SIZE: u64 = 64 * PAGE;

/// The buffer's bytes as a file has them.
fn bytes(pattern: Pattern, size: u64) -> Vec<u8> {
    let word = |offset: u64| pattern.from(offset).first.to_le_bytes();
    (0..size).step_by(8).flat_map(word).collect()
}

/// A file in memory that others have mapped or read too, and a hole made in it while the guest has it mapped.
fn shared_file() -> Outcome {
    borrowed_only!();
    let file = memory_file(BUFFER)?;
    let other = Region::of_file(&file, BUFFER, true)?;
    let host = Swept::new(Region::of_file(&file, BUFFER, true)?, GPA)?;
    host.both_sides(30, || Ok(()))?;
    host.sweep(pattern(30), pattern(31))?;
    other.check(pattern(31))?;
    other.fill(pattern(32));
    host.sweep(pattern(32), pattern(33))?;
    punch(&file, 0, BUFFER)?;
    let zero = Pattern { first: 0, step: 0 };
    host.sweep(zero, pattern(34))?;
    other.check(pattern(34))
}

/// The client has only read the pages, so nothing of its own says that they are written.
fn written_after_a_read() -> Outcome {
    borrowed_only!();
    let _swap = Swap::on("/dev/ram0")?;
    let file = memory_file(SIZE)?;
    let host = Swept::new(Region::of_file(&file, SIZE, true)?, GPA)?;
    let zero = Pattern { first: 0, step: 0 };
    host.region.check(zero)?;
    host.sweep(zero, pattern(37))?;
    for _ in 0..3 {
        host.region.advise(0, SIZE, libc::MADV_PAGEOUT)?;
    }
    host.region.check(pattern(37))
}

/// The guest reads the file's page, and gets its own when it writes.
fn private_copy_of_a_file() -> Outcome {
    let file = memory_file(SIZE)?;
    file.write_all_at(&bytes(pattern(35), SIZE), 0)?;
    let host = Swept::new(Region::of_file(&file, SIZE, false)?, GPA)?;
    host.sweep(pattern(35), pattern(36))?;
    host.region.check(pattern(36))?;
    let mut kept = vec![0; SIZE as usize];
    file.read_exact_at(&mut kept, 0)?;
    ensure!(
        kept == bytes(pattern(35), SIZE),
        "the guest wrote into the file"
    );
    Ok(())
}

/// What is written back to a device is clean, and the guest's next write is to be heard of: it is on the device after
/// the next writing back.
fn written_back() -> Outcome {
    const DEVICE: &str = "/dev/ram0";
    borrowed_only!();
    let open = |flags| {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(DEVICE);
        file.context(DEVICE)
    };
    let file = open(0)?;
    let host = Swept::new(Region::of_file(&file, SIZE, true)?, GPA)?;
    host.region.fill(pattern(40));
    for round in 40..44 {
        host.sweep(pattern(round), pattern(round + 1))?;
        file.sync_all()?;
        // Past the kernel's own copy.
        let device = open(libc::O_DIRECT)?;
        let aligned = Region::new(SIZE)?;
        aligned.read_from(&device)?;
        aligned
            .check(pattern(round + 1))
            .with_context(|| format!("on the device after round {round}"))?;
    }
    Ok(())
}

/// Memory given back for whenever the host wants it is the client's again once the guest has written it.
fn freed_lazily() -> Outcome {
    borrowed_only!();
    let _swap = Swap::on("/dev/ram0")?;
    // Reads all pages, so that they are mapped, and writes each one's number into it.
    let code = guest!(64:
        "mov rsi, rdi", "mov rdx, rcx",
        "2: mov rax, [rsi]", "add rsi, 4096", "dec rdx", "jnz 2b",
        "3: mov [rdi], rcx", "add rdi, 4096", "dec rcx", "jnz 3b", "hlt");
    let host = Swept::with(code, Region::new(SIZE)?, GPA)?;
    host.region.fill(pattern(50));
    host.region.advise(0, SIZE, libc::MADV_FREE)?;
    host.machine
        .set(|state| (state.rdi, state.rcx) = (GPA, SIZE / PAGE))?;
    host.machine.expect(&[halt()])?;
    for _ in 0..3 {
        host.region.advise(0, SIZE, libc::MADV_PAGEOUT)?;
    }
    for page in 0..SIZE / PAGE {
        let found = host.region.get(page * PAGE);
        same!(found, SIZE / PAGE - page, "page {page}");
    }
    Ok(())
}

/// Whoever saves a process by what has changed (CRIU) finds the guest's writes, not only the first ones.
fn soft_dirty() -> Outcome {
    borrowed_only!();
    let host = Swept::new(Region::new(SIZE)?, GPA)?;
    host.both_sides(60, || Ok(()))?;
    for round in 60..63 {
        fs::write("/proc/self/clear_refs", "4")?;
        let half = SIZE / 2;
        host.sweep_part(0, half, pattern(round), pattern(round + 1))?;
        let pages = host.region.pages()?;
        let dirty = pages.iter().filter(|page| page.is_soft_dirty()).count() as u64;
        same!(dirty, half / PAGE, "pages that count as written");
        host.sweep_part(half, half, pattern(round), pattern(round + 1))?;
    }
    Ok(())
}
