//! The most vCPUs there may be write to their pages all the time while threads of the client put other memory
//! behind these pages and protect them.
//!
//! A page has two buffers. After each change nothing may be written any more to the one it had, and with protection to
//! none.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::{Case, Outcome};
use crate::client::{Vcpu, Vm};
use crate::exit::Exit;
use crate::guest;
use crate::machine::{prepare, run, vm_with_ram};
use crate::modes::{self, Mode};
use crate::ram::Ram;
use crate::region::{PAGE, Region};

pub const CASES: &[Case] = &[case!(sixteen_vcpus_while_it_changes)];

const VCPUS: u64 = 16;
const GPA: u64 = 0x1000_0000;
/// Threads that change the map, and what each of them does.
const CHANGERS: u64 = 2;
const CHANGES: u64 = 192;
const OPEN: u32 = 7;

struct Crowd {
    vm: Vm,
    ram: Ram,
    vcpus: Vec<Vcpu>,
    buffers: [Region; 2],
    /// Threads still at work.
    changers: AtomicU64,
}

/// RDI is the vCPU's page, R8 counts.
fn sixteen_vcpus_while_it_changes() -> Outcome {
    let (vm, ram) = vm_with_ram()?;
    modes::write_tables(Mode::Long, &ram);
    let code = guest!(64:
        "2: inc r8", "mov [rdi], r8", "test r8w, 0xfff", "jnz 2b", "out 0x80, al", "jmp 2b");
    ram.write(modes::CODE, code.bits64);
    let buffers = [Region::new(VCPUS * PAGE)?, Region::new(VCPUS * PAGE)?];
    for buffer in &buffers {
        vm.add_ramblock(buffer.address(), buffer.size())?;
    }
    vm.set_ram2(GPA, VCPUS * PAGE, 0, buffers[0].address())?;
    let vcpus: Result<Vec<Vcpu>> = (0..VCPUS)
        .map(|number| {
            let vcpu = vm.create_vcpu(u32::try_from(number)?)?;
            prepare(&vcpu, Mode::Long)?;
            let mut state = vcpu.regs()?;
            (state.rdi, state.r8) = (GPA + number * PAGE, 0);
            vcpu.set_regs(&state)?;
            Ok(vcpu)
        })
        .collect();
    let crowd = Crowd {
        vm,
        ram,
        vcpus: vcpus?,
        buffers,
        changers: AtomicU64::new(CHANGERS),
    };
    thread::scope(|scope| -> Outcome {
        let runners: Vec<_> = crowd
            .vcpus
            .iter()
            .map(|vcpu| scope.spawn(|| crowd.serve(vcpu)))
            .collect();
        let changers: Vec<_> = (0..CHANGERS)
            .map(|number| {
                let crowd = &crowd;
                scope.spawn(move || {
                    let result = crowd.change(number);
                    crowd.changers.fetch_sub(1, Ordering::SeqCst);
                    result
                })
            })
            .collect();
        for thread in changers.into_iter().chain(runners) {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    })?;
    for number in 0..VCPUS {
        for buffer in &crowd.buffers {
            let count = buffer.get(number * PAGE);
            ensure!(count != 0, "vCPU {number} never reached a buffer");
        }
    }
    Ok(())
}

impl Crowd {
    /// Runs a vCPU until nothing changes any more.
    fn serve(&self, vcpu: &Vcpu) -> Outcome {
        while self.changers.load(Ordering::SeqCst) != 0 {
            match run(vcpu, Mode::Long, &self.ram)? {
                Exit::Out { .. } => {}
                // Whoever closed the page opens it.
                Exit::PageFault { .. } => thread::yield_now(),
                other => anyhow::bail!("{other:?}"),
            }
        }
        Ok(())
    }

    /// What is in both buffers at the pages.
    fn written(&self, pages: std::ops::Range<u64>) -> Vec<[u64; 2]> {
        let at = |page| {
            self.buffers
                .each_ref()
                .map(|buffer| buffer.get(page * PAGE))
        };
        pages.map(at).collect()
    }

    fn change(&self, number: u64) -> Outcome {
        let mut homes = vec![0_usize; (VCPUS / CHANGERS) as usize];
        for round in 0..CHANGES {
            let index = round % (VCPUS / CHANGERS);
            let page = index * CHANGERS + number;
            let gpa = GPA + page * PAGE;
            if round % 7 == 6 {
                // One page closes the 2 MB, for every vCPU.
                self.vm.protect_ram(gpa, PAGE, 0)?;
                let before = self.written(page..page + 1);
                (0..20).for_each(|_| thread::yield_now());
                same!(
                    self.written(page..page + 1),
                    before,
                    "protected page {page}"
                );
                self.vm.protect_ram(gpa, PAGE, OPEN)?;
                continue;
            }
            let home = homes.get_mut(index as usize).context("no such page")?;
            let (old, new) = (*home, 1 - *home);
            let buffer = self.buffers.get(new).context("no such buffer")?;
            let va = buffer.address() + page * PAGE;
            self.vm.set_ram2(gpa, PAGE, 0, va)?;
            *home = new;
            let left = self.buffers.get(old).map(|b| b.get(page * PAGE));
            let here = buffer.get(page * PAGE);
            let start = Instant::now();
            while buffer.get(page * PAGE) == here {
                ensure!(
                    start.elapsed() < Duration::from_secs(20),
                    "vCPU {page} does not reach what was put behind its page"
                );
                thread::yield_now();
            }
            let now = self.buffers.get(old).map(|b| b.get(page * PAGE));
            same!(now, left, "what was taken from page {page}");
        }
        Ok(())
    }
}
