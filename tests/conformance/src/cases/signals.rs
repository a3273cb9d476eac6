//! Signals that a vCPU's thread blocks, as QEMU's do: its threads tell each other so. RUN returns
//! without waiting for the host's timer, and the signal waits on. With one processor RUN is over
//! whenever another thread gets to run.
// UNSAFETY: signals.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::{Case, Outcome};
use crate::exit::{Exit, halt};
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;
use crate::process::Clock;
use crate::threads::{
    SOON, counts, go_apart, join, most_come_soon, side_by_side, spin_until, spinning, stay_apart,
};

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

/// A vCPU's thread that blocks SIGUSR1, as another one sees it.
struct Runner {
    thread: libc::pthread_t,
    clock: Clock,
    /// How often RUN has returned, and what the clock showed then.
    returns: AtomicU32,
    returned: AtomicU64,
}

impl Runner {
    /// This thread.
    fn new() -> anyhow::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            thread: block(),
            clock: Clock::of_this_thread()?,
            returns: AtomicU32::new(0),
            returned: AtomicU64::new(0),
        }))
    }

    /// RUN until it returns, which it does for the signal or for the timer.
    fn run_once(&self, machine: &Machine) -> Outcome {
        let exit = machine.run_once()?;
        let now = self.clock.now().as_nanos() as u64;
        self.returned.store(now, Ordering::Relaxed);
        self.returns.fetch_add(1, Ordering::AcqRel);
        same!(exit, Exit::Interrupt, "RUN");
        Ok(())
    }

    /// Sends it SIGUSR1 and waits until RUN, which had returned so often before, has returned once more. What its clock
    /// showed then. No system call in between: it could take as long as what is looked for.
    fn returns(&self, before: u32) -> anyhow::Result<Duration> {
        // SAFETY: the thread runs until it is told to stop.
        unsafe { libc::pthread_kill(self.thread, libc::SIGUSR1) };
        spin_until("RUN does not return", || {
            self.returns.load(Ordering::Acquire) != before
        })?;
        Ok(Duration::from_nanos(self.returned.load(Ordering::Relaxed)))
    }
}

/// The sender has run guests before, but not just now: what a vCPU's thread sends in the middle of its work is heard
/// when that calls RUN again.
fn a_blocked_signal_ends_run() -> Outcome {
    const ROUNDS: u32 = 40;
    if !side_by_side() {
        return Ok(());
    }
    let _apart = stay_apart()?;
    let machine = spinning()?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let (ready, runner) = mpsc::channel();
        let (stop, machine) = (&stop, &machine);
        let thread = scope.spawn(move || -> Outcome {
            go_apart()?;
            let this = Runner::new()?;
            ready.send(this.clone())?;
            while !stop.load(Ordering::Acquire) {
                this.run_once(machine)?;
            }
            same!(is_pending(), true, "SIGUSR1 is pending");
            Ok(())
        });
        let batch = |runner: &Runner| {
            // What it owes it owes from here on.
            Machine::new(Mode::Long, guest!("hlt"))?.expect(&[halt()])?;
            thread::sleep(Duration::from_millis(20));
            let mut soon = 0;
            for round in 0..ROUNDS {
                counts(&machine.ram)?;
                // Not in step with the timer.
                thread::sleep(Duration::from_micros(u64::from(round) * 137));
                counts(&machine.ram)?;
                let before = runner.returns.load(Ordering::Acquire);
                let start = runner.clock.now();
                let end = runner.returns(before)?;
                soon += u32::from(end.saturating_sub(start) < SOON);
            }
            Ok((soon, ROUNDS))
        };
        let result = runner.recv().context("the thread");
        let result = result.and_then(|runner| most_come_soon(|| batch(&runner)));
        stop.store(true, Ordering::Release);
        join(thread)?;
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
    let (starts, stop) = (AtomicU32::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let (ready, runner) = mpsc::channel();
        let (starts, stop, machine) = (&starts, &stop, &machine);
        let thread = scope.spawn(move || -> Outcome {
            go_apart()?;
            let this = Runner::new()?;
            ready.send(this.clone())?;
            while !stop.load(Ordering::Acquire) {
                machine.ram.discard(PAGE, 0x1000);
                starts.fetch_add(1, Ordering::AcqRel);
                this.run_once(machine)?;
            }
            Ok(())
        });
        let batch = |runner: &Runner| {
            let mut soon = 0;
            for round in 0..ROUNDS {
                let before = runner.returns.load(Ordering::Acquire);
                let start = runner.clock.now();
                spin_until("RUN does not start", || {
                    starts.load(Ordering::Acquire) > before || thread.is_finished()
                })?;
                let begin = Instant::now();
                let delay = Duration::from_nanos(500 * u64::from(round));
                while begin.elapsed() < delay {
                    std::hint::spin_loop();
                }
                let end = runner.returns(before)?;
                soon += u32::from(end.saturating_sub(start) < SOON);
            }
            Ok((soon, ROUNDS))
        };
        let result = runner.recv().context("the thread");
        let result = result.and_then(|runner| most_come_soon(|| batch(&runner)));
        stop.store(true, Ordering::Release);
        join(thread)?;
        result
    })
}
