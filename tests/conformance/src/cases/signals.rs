//! Signals that a vCPU's thread blocks, as QEMU's do: its threads tell each other so. RUN returns
//! without waiting for the host's timer, and the signal waits on. With one processor RUN is over
//! whenever another thread gets to run.
// UNSAFETY: signals.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::{Case, Outcome};
use crate::exit::{Exit, halt};
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;
use crate::threads::{SOON, counts, go_apart, join, side_by_side, spinning, stay_apart};

pub const CASES: &[Case] = &[
    case!(a_blocked_signal_ends_run),
    case!(a_blocked_signal_on_the_way_into_the_guest),
];

/// Blocks SIGUSR1 in this thread, which is returned.
fn block() -> libc::pthread_t {
    // SAFETY: a set of signals on the stack.
    let mut blocked = unsafe { std::mem::zeroed::<libc::sigset_t>() };
    // SAFETY: as above.
    unsafe { libc::sigaddset(&raw mut blocked, libc::SIGUSR1) };
    // SAFETY: as above; a mask of this thread only.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, std::ptr::null_mut()) };
    // SAFETY: a number.
    unsafe { libc::pthread_self() }
}

/// Whether SIGUSR1 waits for this thread.
fn is_pending() -> bool {
    // SAFETY: a set of signals on the stack.
    let mut pending = unsafe { std::mem::zeroed::<libc::sigset_t>() };
    // SAFETY: as above.
    unsafe { libc::sigpending(&raw mut pending) };
    // SAFETY: as above.
    unsafe { libc::sigismember(&raw const pending, libc::SIGUSR1) == 1 }
}

/// Sends SIGUSR1; how long it takes `returns` to change.
fn send(thread: libc::pthread_t, returns: &AtomicU32, before: u32) -> anyhow::Result<Duration> {
    let start = Instant::now();
    // SAFETY: the thread runs until it is told to stop.
    unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
    while returns.load(Ordering::Acquire) == before {
        ensure!(
            start.elapsed() < Duration::from_secs(2),
            "RUN does not return"
        );
        std::hint::spin_loop();
    }
    Ok(start.elapsed())
}

/// The sender has run guests before, but not just now: what a vCPU's thread sends in the middle of its work is heard
/// when that calls RUN again.
fn a_blocked_signal_ends_run() -> Outcome {
    const ROUNDS: u32 = 40;
    if !side_by_side() {
        return Ok(());
    }
    let _apart = stay_apart()?;
    Machine::new(Mode::Long, guest!("hlt"))?.expect(&[halt()])?;
    thread::sleep(Duration::from_millis(20));
    let machine = spinning()?;
    let (returns, stop) = (AtomicU32::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let (ready, thread_of) = mpsc::channel();
        let (returns, stop, machine) = (&returns, &stop, &machine);
        let runner = scope.spawn(move || -> Outcome {
            go_apart()?;
            ready.send(block())?;
            while !stop.load(Ordering::Acquire) {
                same!(machine.run_once()?, Exit::Interrupt, "RUN");
                returns.fetch_add(1, Ordering::AcqRel);
            }
            same!(is_pending(), true, "SIGUSR1 is pending");
            Ok(())
        });
        let result = thread_of.recv().context("the thread").and_then(|thread| {
            let mut soon = 0;
            for round in 0..ROUNDS {
                counts(&machine.ram)?;
                // Not in step with the timer.
                thread::sleep(Duration::from_micros(u64::from(round) * 137));
                counts(&machine.ram)?;
                let took = send(thread, returns, returns.load(Ordering::Acquire))?;
                soon += u32::from(took < SOON);
            }
            ensure!(
                soon >= ROUNDS * 3 / 4,
                "only {soon} of {ROUNDS} returned soon"
            );
            Ok(())
        });
        stop.store(true, Ordering::Release);
        join(runner)?;
        result
    })
}

/// The signal comes at any time of a RUN that brings in a page before the guest counts on.
fn a_blocked_signal_on_the_way_into_the_guest() -> Outcome {
    const ROUNDS: u32 = 100;
    /// A page that the guest touches once per RUN, and the host has not.
    const PAGE: u64 = 0x2_0000;
    if !side_by_side() {
        return Ok(());
    }
    let _apart = stay_apart()?;
    let machine = Machine::new(
        Mode::Long,
        guest!(64: "2: inc qword ptr [0xc000]", "mov [0x20000], al", "jmp 2b"),
    )?;
    let (starts, returns) = (AtomicU32::new(0), AtomicU32::new(0));
    thread::scope(|scope| {
        let (ready, thread_of) = mpsc::channel();
        let (starts, returns, machine) = (&starts, &returns, &machine);
        let runner = scope.spawn(move || -> Outcome {
            go_apart()?;
            ready.send(block())?;
            for round in 0..ROUNDS {
                machine.ram.discard(PAGE, 0x1000);
                starts.fetch_add(1, Ordering::AcqRel);
                same!(machine.run_once()?, Exit::Interrupt, "RUN");
                returns.store(round + 1, Ordering::Release);
            }
            Ok(())
        });
        let result = thread_of.recv().context("the thread").and_then(|thread| {
            let mut late = Vec::new();
            for round in 0..ROUNDS {
                while starts.load(Ordering::Acquire) <= round {
                    ensure!(!runner.is_finished(), "the vCPU's thread is over");
                    std::hint::spin_loop();
                }
                let begin = Instant::now();
                let delay = Duration::from_nanos(500 * u64::from(round));
                while begin.elapsed() < delay {
                    std::hint::spin_loop();
                }
                if send(thread, returns, round)? >= SOON {
                    late.push(round);
                }
            }
            ensure!(late.len() < 5, "late: {late:?}");
            Ok(())
        });
        join(runner)?;
        result
    })
}
