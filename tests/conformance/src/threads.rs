//! Guests that run in threads of their own: two vCPUs, or one while something is done to it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::cases::Outcome;
use crate::client::Vcpu;
use crate::exit::{Exit, halt};
use crate::guest;
use crate::machine::{Machine, expect, prepare, vm_with_ram};
use crate::modes::{self, DATA, Mode};
use crate::process::{Clock, Placed, place, processors};
use crate::ram::Ram;

/// The timer of a kernel with 250 Hz comes after 2 ms in the mean: one event in eight that waits for it comes soon all
/// the same. By [`Clock`], of the thread that is to hear of it: what others do on its processor is not its delay.
pub const SOON: Duration = Duration::from_micros(500);

/// Batches of events of which one has to come soon: one that waits for the timer does not do that three times out of
/// four, and one that does not may be kept waiting now and then.
const BATCHES: u32 = 8;

/// Calls `batch`, which says how many of how many events came soon, until it is three out of four.
pub fn most_come_soon(mut batch: impl FnMut() -> Result<(u32, u32)>) -> Outcome {
    let mut seen = Vec::new();
    for _ in 0..BATCHES {
        let (soon, all) = batch()?;
        if soon * 4 >= all * 3 {
            return Ok(());
        }
        seen.push(soon);
    }
    bail!("so many came soon each time: {seen:?}")
}

/// How long a thread waits for what has to come. Emulated time, and others may want the processors.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Calls `is_so` until it is.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Outcome {
    let start = Instant::now();
    while !is_so()? {
        ensure!(start.elapsed() < PATIENCE, "in {PATIENCE:?}: {what}");
        thread::yield_now();
    }
    Ok(())
}

/// The same for what comes very soon from another processor, without a system call: a thread that gives up its own gets
/// it back when others have had their turn.
pub fn spin_until(what: &str, is_so: impl Fn() -> bool) -> Outcome {
    let start = Instant::now();
    while !is_so() {
        ensure!(start.elapsed() < PATIENCE, "in {PATIENCE:?}: {what}");
        std::hint::spin_loop();
    }
    Ok(())
}

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
    while_clocked(machine, |_| body())
}

/// The same, and `body` gets the clock of the thread that is in RUN.
pub fn while_clocked<T: Send>(
    machine: &Machine,
    body: impl FnOnce(Clock) -> Result<T> + Send,
) -> Result<T> {
    let run = || {
        let exit = machine.run_once()?;
        ensure!(
            matches!(exit, Exit::Interrupt | Exit::Vector(_) | Exit::Out { .. }),
            "{exit:?}"
        );
        Ok(())
    };
    repeating(run, body)
}

/// One thread that does the same again and again until another, apart from it, has done its work.
pub fn while_repeating<T: Send>(
    again: impl Fn() -> Outcome + Sync,
    body: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    repeating(again, |_| body())
}

fn repeating<T: Send>(
    again: impl Fn() -> Outcome + Sync,
    body: impl FnOnce(Clock) -> Result<T> + Send,
) -> Result<T> {
    let stop = AtomicBool::new(false);
    let _apart = stay_apart()?;
    let (ready, clock) = mpsc::channel();
    thread::scope(|scope| {
        let (stop, again) = (&stop, &again);
        let runner = scope.spawn(move || -> Outcome {
            go_apart()?;
            ready.send(Clock::of_this_thread()?)?;
            while !stop.load(Ordering::Acquire) {
                again()?;
            }
            Ok(())
        });
        let result = clock.recv().context("the thread").and_then(body);
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
    let before = ram.u64(DATA);
    wait_until("the guest stands still", || Ok(ram.u64(DATA) != before))
}

/// Whether there are two processors. With one, RUN is over whenever another thread gets to run.
pub fn side_by_side() -> bool {
    processors() > 1
}
