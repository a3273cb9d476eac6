//! A guest that sweeps a buffer: it reads all of it, compares every eight bytes with what the client wrote there,
//! and writes others, which the client compares. And what the driver and the kernel say of the buffer then.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail, ensure};

use crate::code::Code;
use crate::exit::Exit;
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;
use crate::region::{LARGE_PAGES, Pattern, Region, has_large_pages};

/// Where the buffer is in the guest.
pub const GPA: u64 = 0x1000_0000;
/// Its bytes, unless a case wants others.
pub const BUFFER: u64 = 4 << 20;

/// RDI, RCX: the buffer and its words. RAX, RBX: what must be there, and its step. RDX, RSI: what is written
/// there, and its step. Stops with HLT where it finds something else.
fn sweep() -> Code {
    guest!(64:
        "2: cmp [rdi], rax", "jne 3f", "mov [rdi], rdx",
        "add rax, rbx", "add rdx, rsi", "add rdi, 8", "dec rcx", "jnz 2b",
        "out 0x80, al", "3: hlt")
}

/// A guest with a buffer.
pub struct Swept {
    pub machine: Machine,
    pub region: Region,
    pub gpa: u64,
}

impl Swept {
    /// With all of `region` mapped at `gpa`.
    pub fn new(region: Region, gpa: u64) -> Result<Self> {
        Self::with(sweep(), region, gpa)
    }

    /// The same with other code.
    pub fn with(code: Code, region: Region, gpa: u64) -> Result<Self> {
        let machine = Machine::new(Mode::Long, code)?;
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

    /// With [`BUFFER`] bytes at [`GPA`].
    pub fn buffer() -> Result<Self> {
        Self::new(Region::new(BUFFER)?, GPA)
    }

    /// The guest finds one pattern everywhere and leaves the other one.
    pub fn sweep(&self, found: Pattern, left: Pattern) -> Result<()> {
        self.sweep_part(0, self.region.size(), found, left)
    }

    /// The same of `size` bytes from `offset` on.
    pub fn sweep_part(&self, offset: u64, size: u64, found: Pattern, left: Pattern) -> Result<()> {
        let (found, left) = (found.from(offset), left.from(offset));
        self.machine.set(|state| {
            state.rip = self.machine.mode.entry();
            (state.rdi, state.rcx) = (self.gpa + offset, size / 8);
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
    pub fn both_sides(&self, seed: u64, mut between: impl FnMut() -> Result<()>) -> Result<()> {
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
    pub fn finish(self) -> Result<Counters> {
        let log = KernelLog::from_now()?;
        let name = format!("VM {}: memory:", self.machine.vm.id);
        drop(self.machine);
        log.counters(&name)
    }
}

/// What the driver counts of a guest's memory fits, in one of a few attempts: the kernel moves pages on its own, and has
/// no large one to give at times.
pub fn counted(
    attempt: impl Fn() -> Result<Counters>,
    fits: impl Fn(&Counters) -> bool,
) -> Result<()> {
    let mut seen = Vec::new();
    for _ in 0..5 {
        let counters = attempt()?;
        if fits(&counters) {
            return Ok(());
        }
        seen.push(counters);
        // Pages in use go to one end of memory: large ones are free at the other.
        fs::write("/proc/sys/vm/compact_memory", "1").context("compact_memory")?;
    }
    bail!("{seen:?}")
}

/// One of many patterns.
pub const fn pattern(seed: u64) -> Pattern {
    let first = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Pattern {
        first,
        step: first | 1,
    }
}

/// What the driver counted.
#[derive(Debug)]
pub struct Counters {
    /// Of 4 KB, 2 MB and 1 GB.
    pub leaves: [u64; 3],
    pub tables: u64,
    pub flushes: u64,
    pub merges: u64,
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

    /// The counters in the line that has `name` in it: `12 slots, leaves 100/3/0, 9 tables, 4 flushes, 1 merges`.
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
            let [_, small, large, huge, tables, flushes, merges] = numbers.as_slice() else {
                anyhow::bail!("cannot make sense of '{counters}'");
            };
            return Ok(Counters {
                leaves: [*small, *large, *huge],
                tables: *tables,
                flushes: *flushes,
                merges: *merges,
            });
        }
        anyhow::bail!("the driver logs no '{name}'")
    }
}

/// A file of the kernel's with another setting in it until this is dropped.
pub struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    /// Writes `value` there.
    pub fn new(path: &'static str, value: &str) -> Result<Self> {
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

/// Machines with little memory have large pages switched off. `None` where the kernel has none.
pub fn large_pages() -> Result<Option<Setting>> {
    if !has_large_pages() {
        println!("  the kernel has no large pages");
        return Ok(None);
    }
    Setting::new(LARGE_PAGES, "madvise").map(Some)
}
