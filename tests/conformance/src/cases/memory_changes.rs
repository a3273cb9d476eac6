//! A guest reads and writes every page of an area over and over while threads of the client map, remap, unmap
//! and protect its pages.
//!
//! The guest writes the number of its sweep. A page has two buffers; while it has none, the client is the
//! device that answers. After each change the buffer that the guest must not reach any more is watched, and the
//! one (or the device) that it must reach has to be written.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::Exit;
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;
use crate::region::{PAGE, Region};

pub const CASES: &[Case] = &[case!(every_page_while_it_changes)];

const GPA: u64 = 0x1000_0000;
const PAGES: u64 = 32;
/// Where a page is read and written.
const STRIDE: u64 = 512;
const PLACES: u64 = PAGE / STRIDE;
/// Threads that change the map, and what each of them does.
const CHANGERS: u64 = 2;
const CHANGES: u64 = 240;
const OPEN: u32 = 7;

/// Where the guest writes the sweep that is under way, in memory that nobody changes.
const COUNTER: u64 = 0x1010_0000;

/// R8 is the sweep. Stops with HLT where it reads a number that it has not written yet. Leaves the processor
/// seldom of its own accord: what the driver does not take from it, it keeps.
fn sweeps() -> Code {
    guest!(64:
        "2: mov edi, 0x10000000", "mov ecx, 256",
        "3: mov rdx, [rdi]", "cmp rdx, r8", "ja 4f", "mov [rdi], r8",
        "add rdi, 512", "dec ecx", "jnz 3b",
        "inc r8", "mov [0x10100000], r8", "test r8b, 63", "jnz 2b", "out 0x80, al", "jmp 2b",
        "4: hlt")
}

struct Area {
    machine: Machine,
    buffers: [Region; 2],
    device: Vec<AtomicU64>,
    counter: Region,
    /// Threads still at work.
    changers: AtomicU64,
}

fn every_page_while_it_changes() -> Outcome {
    let machine = Machine::new(Mode::Long, sweeps())?;
    let buffers = [Region::new(PAGES * PAGE)?, Region::new(PAGES * PAGE)?];
    for buffer in &buffers {
        machine.vm.add_ramblock(buffer.address(), buffer.size())?;
    }
    machine
        .vm
        .set_ram2(GPA, PAGES * PAGE, 0, buffers[0].address())?;
    let counter = Region::new(PAGE)?;
    counter.set(0, 1);
    machine.vm.add_ramblock(counter.address(), PAGE)?;
    machine.vm.set_ram2(COUNTER, PAGE, 0, counter.address())?;
    machine.set(|state| state.r8 = 1)?;
    let area = Area {
        machine,
        buffers,
        device: (0..PAGES * PLACES).map(|_| AtomicU64::new(0)).collect(),
        counter,
        changers: AtomicU64::new(CHANGERS),
    };
    let homes = thread::scope(|scope| -> Result<Vec<Vec<usize>>> {
        let threads: Vec<_> = (0..CHANGERS)
            .map(|number| {
                let area = &area;
                scope.spawn(move || {
                    let result = area.change(number);
                    area.changers.fetch_sub(1, Ordering::SeqCst);
                    result
                })
            })
            .collect();
        let guest = area.serve(|| area.changers.load(Ordering::SeqCst) == 0);
        if guest.is_err() {
            // Ends those who wait for the guest.
            area.counter.set(0, u64::MAX / 2);
        }
        let changed = threads.into_iter().map(|thread| {
            let result = thread.join();
            result.unwrap_or_else(|_| anyhow::bail!("a thread panicked"))
        });
        let changed: Result<Vec<_>> = changed.collect();
        guest.context("the guest").and(changed)
    })?;
    area.last_sweep(&homes)
}

impl Area {
    /// Runs the guest and is its device until `until` after a sweep.
    fn serve(&self, until: impl Fn() -> bool) -> Outcome {
        let device = |gpa: u64| {
            let place = gpa.wrapping_sub(GPA) / STRIDE;
            let value = self.device.get(place as usize);
            value.with_context(|| format!("an access to {gpa:#x}"))
        };
        loop {
            match self.machine.run()? {
                Exit::Read { gpa, size: 8 } => {
                    let value = device(gpa)?.load(Ordering::SeqCst);
                    self.machine.vcpu.tunnel.set_fast_mmio_value(value);
                }
                Exit::Write {
                    gpa,
                    size: 8,
                    value,
                } => device(gpa)?.store(value, Ordering::SeqCst),
                // Whoever closed the page opens it.
                Exit::PageFault { .. } => thread::yield_now(),
                Exit::Out { .. } => {
                    if until() {
                        return Ok(());
                    }
                }
                Exit::Halt => {
                    let state = self.machine.regs()?;
                    anyhow::bail!(
                        "{:#x} read at {:#x} in sweep {}",
                        state.rdx,
                        state.rdi,
                        state.r8
                    );
                }
                other => anyhow::bail!("{other:?}"),
            }
        }
    }

    /// What the guest has written to a page of a buffer.
    fn written(&self, buffer: usize, page: u64) -> Vec<u64> {
        let places = (0..PLACES).map(|place| page * PAGE + place * STRIDE);
        places
            .filter_map(|at| self.buffers.get(buffer).map(|b| b.get(at)))
            .collect()
    }

    fn device_written(&self, page: u64) -> Vec<u64> {
        let places =
            (page * PLACES..(page + 1) * PLACES).filter_map(|at| self.device.get(at as usize));
        places.map(|value| value.load(Ordering::SeqCst)).collect()
    }

    /// Waits until a sweep that begins now is complete; returns the number of the first one that counts.
    fn another_sweep(&self) -> Result<u64> {
        let next = self.counter.get(0) + 1;
        let start = Instant::now();
        while self.counter.get(0) <= next {
            ensure!(
                start.elapsed() < Duration::from_secs(20),
                "the guest stands still"
            );
            thread::yield_now();
        }
        Ok(next)
    }

    /// Changes this thread's pages; returns the buffer that each of them has in the end.
    fn change(&self, number: u64) -> Result<Vec<usize>> {
        let vm = &self.machine.vm;
        let mut homes = vec![0_usize; (PAGES / CHANGERS) as usize];
        for round in 0..CHANGES {
            let index = (round * 5 % (PAGES / CHANGERS)) as usize;
            let home = homes.get_mut(index).context("no such page")?;
            let page = index as u64 * CHANGERS + number;
            let (gpa, old, new) = (GPA + page * PAGE, *home, 1 - *home);
            let map = |buffer: usize| -> Result<()> {
                let va = self.buffers.get(buffer).map_or(0, Region::address) + page * PAGE;
                Ok(vm.set_ram2(gpa, PAGE, 0, va)?)
            };
            let what = match round % 3 {
                0 => {
                    map(new)?;
                    *home = new;
                    "remapped"
                }
                1 => {
                    vm.unmap(gpa, PAGE)?;
                    "unmapped"
                }
                _ => {
                    vm.protect_ram(gpa, PAGE, 0)?;
                    "protected"
                }
            };
            let left = self.written(old, page);
            let wanted = match what {
                "protected" => {
                    (0..20).for_each(|_| thread::yield_now());
                    0
                }
                _ => self.another_sweep()?,
            };
            same!(self.written(old, page), left, "page {page} that was {what}");
            let reached = match what {
                "remapped" => self.written(new, page),
                "unmapped" => self.device_written(page),
                _ => left,
            };
            ensure!(
                reached.iter().all(|sweep| *sweep >= wanted),
                "page {page} was {what} before sweep {wanted}, which has not come there: {reached:?}"
            );
            match what {
                "unmapped" => map(old)?,
                "protected" => vm.protect_ram(gpa, PAGE, OPEN)?,
                _ => {}
            }
        }
        Ok(homes)
    }

    /// Nothing changes any more: a sweep writes the buffer that each page has, and nothing else.
    fn last_sweep(&self, homes: &[Vec<usize>]) -> Outcome {
        self.serve(|| true)?;
        let sweep = self.machine.regs()?.r8 - 1;
        for page in 0..PAGES {
            let homes = homes.get((page % CHANGERS) as usize);
            let home = homes.and_then(|homes| homes.get((page / CHANGERS) as usize));
            let home = *home.context("no such page")?;
            for at in (page * PAGE..(page + 1) * PAGE).step_by(8) {
                let place = at % STRIDE == 0;
                let found = self.buffers.each_ref().map(|buffer| buffer.get(at));
                let (here, there) = if home == 0 {
                    (found[0], found[1])
                } else {
                    (found[1], found[0])
                };
                same!(here, if place { sweep } else { 0 }, "at {at:#x}");
                ensure!(
                    there < sweep && (place || there == 0),
                    "{there:#x} at {at:#x} of the other buffer"
                );
            }
        }
        Ok(())
    }
}
