//! Guests that run in threads of their own: two vCPUs, or one while something is done to it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::cases::Outcome;
use crate::client::Vcpu;
use crate::exit::{Exit, halt};
use crate::guest;
use crate::machine::{Machine, expect, prepare, vm_with_ram};
use crate::modes::{self, DATA, Mode};
use crate::process::{Placed, place, processors};
use crate::ram::Ram;

/// The timer of a kernel with 250 Hz comes after 2 ms in the mean.
pub const SOON: Duration = Duration::from_micros(500);

/// The result of a thread.
pub fn join<T>(handle: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    handle.join().map_err(|_| anyhow!("a thread panicked"))?
}

/// Two vCPUs at one code; RBX is the vCPU's number.
pub fn pair(code: &[u8]) -> Result<(Machine, Vcpu)> {
    let (vm, ram) = vm_with_ram()?;
    modes::write_tables(Mode::Long, &ram);
    ram.write(modes::CODE, code);
    let one = vm.create_vcpu(0)?;
    let two = vm.create_vcpu(1)?;
    for (vcpu, number) in [(&one, 0), (&two, 1)] {
        prepare(vcpu, Mode::Long)?;
        let mut state = vcpu.regs()?;
        state.rbx = number;
        state.rsp = modes::STACK - number * 0x800;
        vcpu.set_regs(&state)?;
    }
    let machine = Machine {
        vcpu: one,
        vm,
        ram,
        mode: Mode::Long,
    };
    Ok((machine, two))
}

/// Runs both to HLT, each in its thread.
pub fn run_both(machine: &Machine, two: &Vcpu) -> Outcome {
    thread::scope(|scope| {
        let first = scope.spawn(|| machine.expect(&[halt()]));
        let second = scope.spawn(|| expect(two, Mode::Long, &machine.ram, &[halt()]));
        join(first).context("vCPU 0")?;
        join(second).context("vCPU 1")
    })
}

/// Keeps this thread on the first processor, if there are several; [`go_apart`] is for the thread it looks at. On one
/// processor a thread that waits by spinning has to be interrupted before the other can do anything.
pub fn stay_apart() -> Result<Option<Placed>> {
    side_by_side().then(|| Placed::on(0)).transpose()
}

/// Moves this thread to another processor than [`stay_apart`]'s, if there is one.
pub fn go_apart() -> Outcome {
    if side_by_side() { place(0, 1) } else { Ok(()) }
}

/// A guest in a thread of its own that runs until it is told to stop.
pub fn while_running<T: Send>(
    machine: &Machine,
    body: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let run = || {
        let exit = machine.run_once()?;
        ensure!(
            matches!(exit, Exit::Interrupt | Exit::Vector(_) | Exit::Out { .. }),
            "{exit:?}"
        );
        Ok(())
    };
    while_repeating(run, body)
}

/// One thread that does the same again and again until another, apart from it, has done its work.
pub fn while_repeating<T: Send>(
    again: impl Fn() -> Outcome + Sync,
    body: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let stop = AtomicBool::new(false);
    let _apart = stay_apart()?;
    thread::scope(|scope| {
        let runner = scope.spawn(|| -> Outcome {
            go_apart()?;
            while !stop.load(Ordering::Acquire) {
                again()?;
            }
            Ok(())
        });
        let result = body();
        stop.store(true, Ordering::Release);
        join(runner)?;
        result
    })
}

/// A guest that counts in memory without end.
pub fn spinning() -> Result<Machine> {
    Machine::new(
        Mode::Long,
        guest!(64: "2: inc qword ptr [0xc000]", "jmp 2b"),
    )
}

/// Waits until the guest has counted further.
pub fn counts(ram: &Ram) -> Outcome {
    let (start, before) = (Instant::now(), ram.u64(DATA));
    while ram.u64(DATA) == before {
        ensure!(
            start.elapsed() < Duration::from_secs(2),
            "the guest stands still"
        );
        thread::yield_now();
    }
    Ok(())
}

/// Whether there are two processors. With one, RUN is over whenever another thread gets to run.
pub fn side_by_side() -> bool {
    processors() > 1
}
