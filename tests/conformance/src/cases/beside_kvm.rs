//! Guests of ours and of KVM's at the same time: neither loses anything to the other, nor does the host. KVM is there
//! if `kvm-intel` is loaded (`conformance --kvm`), which the environment then says; elsewhere the cases say that they
//! do not apply.
// UNSAFETY: a system call and RDTSCP, to see the host's registers.
#![expect(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::{Case, Outcome};
use crate::exit::Exit;
use crate::machine::Machine;
use crate::modes::Mode;
use crate::neighbour::{self, LONG, Neighbour};
use crate::process::{Placed, end_restartable_sequences, place, thread_id};
use crate::sentinel::{Values, told};

pub const CASES: &[Case] = &[
    case!(in_turns),
    case!(on_one_processor),
    case!(on_changing_processors),
    case!(our_vms_come_and_go),
    case!(kvms_come_and_go),
    case!(kvm_ends_while_ours_runs),
];

/// Ends a case where there is no KVM.
macro_rules! kvm_only {
    () => {
        if !neighbour::is_there()? {
            println!("  no KVM: line {} of {}", line!(), file!());
            return Ok(());
        }
    };
}

/// PAUSEs in a round that make the guest exit for them for longer than the kernel lets a thread run: each time its thread
/// gives the processor up in RUN, and KVM's may come.
const SPINNING: Values = Values::ours(300_000);

/// A VM of ours with a guest that watches its state.
fn ours(values: &Values) -> Result<Machine> {
    let machine = Machine::new(Mode::Long, crate::guest!(64: "ud2"))?;
    values.write(&machine.ram);
    machine.vcpu.set_regs(&Values::registers())?;
    Ok(machine)
}

/// RUN until the guest tells how many rounds it has made. The host's own registers are looked at after each.
fn turn(machine: &Machine) -> Result<u32> {
    loop {
        let exit = machine.run_once().context("our guest")?;
        the_host_is_as_it_was()?;
        match exit {
            Exit::Interrupt => {}
            Exit::Out { port, data, .. } => return told(port, &data).context("our guest"),
            other => bail!("our guest: {other:?}, rip {:#x}", machine.regs()?.rip),
        }
    }
}

/// Linux keeps the processor's number in TSC_AUX. The C library asks there too, the kernel knows it by itself.
fn the_host_is_as_it_was() -> Outcome {
    let mut before = processor();
    loop {
        let aux: u32;
        // SAFETY: reads two registers.
        unsafe {
            core::arch::asm!("rdtscp", out("eax") _, out("edx") _, out("ecx") aux, options(nomem, nostack));
        }
        let after = processor();
        if before == after {
            same!(aux & 0xfff, before, "TSC_AUX of the host");
            return Ok(());
        }
        before = after;
    }
}

/// The processor that this thread is on.
fn processor() -> u32 {
    let mut number = 0_u32;
    // SAFETY: the kernel writes the number to where this says.
    unsafe { libc::syscall(libc::SYS_getcpu, &raw mut number, 0_usize, 0_usize) };
    number
}

/// Runs a guest of KVM's on one processor until it is told to stop. It has to have been at work.
fn spin(mut neighbour: Neighbour, processor: usize, stop: &AtomicBool) -> Outcome {
    place(0, processor)?;
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        rounds = neighbour.turn()?.unwrap_or(rounds);
    }
    ensure!(rounds >= LONG, "KVM's guest was hardly at work");
    Ok(())
}

/// Calls `body` while a thread on each of these processors runs a guest of KVM's.
fn beside_spinning_ones(
    processors: std::ops::Range<usize>,
    body: impl FnOnce() -> Outcome,
) -> Outcome {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for number in processors {
            let neighbour = Neighbour::new(&Values::kvms(LONG))?;
            let stop = &stop;
            threads.push(scope.spawn(move || spin(neighbour, number, stop)));
        }
        let result = body();
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        result
    })
}

/// One thread for both: it is in user space between the two.
fn in_turns() -> Outcome {
    kvm_only!();
    let mut theirs = Neighbour::new(&Values::kvms(1))?;
    let machine = ours(&Values::ours(1))?;
    let mut rounds = (0, 0);
    for round in 1..=100 {
        rounds.0 = turn(&machine)?;
        rounds.1 = theirs.turn()?.unwrap_or(rounds.1);
        same!(rounds.0, round, "rounds of our guest");
    }
    ensure!(rounds.1 > 90, "{} rounds of KVM's guest", rounds.1);
    Ok(())
}

/// Six rounds by a thread that does not have to go to user space after each switch of threads. It says which it is.
fn rounds_without_user_space(machine: &Machine, number: &AtomicI32) -> Outcome {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            end_restartable_sequences()?;
            number.store(thread_id(), Ordering::Relaxed);
            (1..=6).try_for_each(|round| {
                same!(turn(machine)?, round, "rounds of our guest");
                Ok(())
            })
        });
        thread.join().map_err(|_| anyhow!("a thread panicked"))?
    })
}

/// KVM leaves its guest's values in SYSCALL's registers and in TSC_AUX when its thread goes, until the processor is on
/// its way to user space. Here it never is: our thread gave it up in RUN, and goes on there.
fn on_one_processor() -> Outcome {
    kvm_only!();
    let _here = Placed::on(0)?;
    beside_spinning_ones(0..1, || {
        let machine = ours(&SPINNING)?;
        rounds_without_user_space(&machine, &AtomicI32::new(0))
    })
}

/// The same with a thread of ours that is moved from processor to processor while it waits in RUN: what the host's
/// registers are it learns on each.
fn on_changing_processors() -> Outcome {
    kvm_only!();
    let processors = thread::available_parallelism()?.get();
    if processors < 2 {
        println!("  one processor: line {} of {}", line!(), file!());
        return Ok(());
    }
    let (stop, number) = (AtomicBool::new(false), AtomicI32::new(0));
    beside_spinning_ones(0..processors, || {
        let machine = ours(&SPINNING)?;
        thread::scope(|scope| {
            let mover = scope.spawn(|| -> Outcome {
                for processor in (0..processors).cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let thread = number.load(Ordering::Relaxed);
                    // 0 would be this thread. One that has made its rounds is gone.
                    if thread != 0 && place(thread, processor).is_err() {
                        ensure!(!exists(thread), "thread {thread} cannot be moved");
                        break;
                    }
                    // Long enough for the scheduler to give it a turn on each: moved every 3 ms it starves.
                    thread::sleep(Duration::from_millis(20));
                }
                Ok(())
            });
            let result = rounds_without_user_space(&machine, &number);
            stop.store(true, Ordering::Relaxed);
            mover.join().map_err(|_| anyhow!("a thread panicked"))??;
            result
        })
    })
}

/// Whether this process has such a thread.
fn exists(thread: i32) -> bool {
    std::path::Path::new(&format!("/proc/self/task/{thread}")).exists()
}

fn our_vms_come_and_go() -> Outcome {
    kvm_only!();
    beside_spinning_ones(0..1, || {
        for _ in 0..10 {
            let machine = ours(&Values::ours(20_000))?;
            for round in 1..=3 {
                same!(turn(&machine)?, round, "rounds of our guest");
            }
        }
        Ok(())
    })
}

/// Calls `body` while a thread runs a guest of ours; that has to have been at work until the end.
fn while_ours_runs(machine: &Machine, body: impl FnOnce() -> Outcome) -> Outcome {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<u32> {
            let mut rounds = turn(machine)?;
            while !stop.load(Ordering::Relaxed) {
                rounds = turn(machine)?;
            }
            // One more with things as they are in the end.
            let last = turn(machine)?;
            same!(last, rounds + 1, "rounds of our guest");
            Ok(last)
        });
        let result = body();
        stop.store(true, Ordering::Relaxed);
        let rounds = thread.join().map_err(|_| anyhow!("a thread panicked"))?;
        ensure!(rounds? > 1, "our guest was hardly at work");
        result
    })
}

/// Guests of KVM's that come and go, with another one that stays: KVM stays in VMX operation.
fn kvms_come_and_go() -> Outcome {
    kvm_only!();
    let _keeper = Neighbour::new(&Values::kvms(1))?;
    let machine = ours(&SPINNING)?;
    while_ours_runs(&machine, || {
        for _ in 0..10 {
            let mut theirs = Neighbour::new(&Values::kvms(1))?;
            for _ in 0..10 {
                theirs.turn()?;
            }
        }
        Ok(())
    })
}

/// KVM's last VM ends, with which an older KVM leaves VMX operation. Ours goes on by itself, and an older KVM comes
/// back once ours is gone.
fn kvm_ends_while_ours_runs() -> Outcome {
    kvm_only!();
    let mut theirs = Neighbour::new(&Values::kvms(1))?;
    let machine = ours(&SPINNING)?;
    while_ours_runs(&machine, || {
        for _ in 0..10 {
            theirs.turn()?;
        }
        drop(theirs);
        thread::sleep(Duration::from_millis(20));
        Ok(())
    })?;
    if stays_in_vmx_operation() || neighbour::is_another_there() {
        while_ours_runs(&machine, some_turns)?;
    } else {
        let again = Neighbour::new(&Values::kvms(1));
        let errno = again.err().map(|error| errno(&error));
        same!(errno, Some(Some(libc::EBUSY)), "KVM_CREATE_VM");
        same!(turn(&machine)? > 1, true, "our guest");
    }
    drop(machine);
    some_turns()
}

fn some_turns() -> Outcome {
    let mut theirs = Neighbour::new(&Values::kvms(1))?;
    for _ in 0..10 {
        theirs.turn()?;
    }
    Ok(())
}

fn errno(error: &anyhow::Error) -> Option<i32> {
    let refused = error.downcast_ref::<kvm_ioctls::Error>();
    refused.map(|refused| refused.errno())
}

/// Whether this KVM is in VMX operation without a VM of its own; since Linux 6.12.
fn stays_in_vmx_operation() -> bool {
    std::fs::read_to_string("/sys/module/kvm/parameters/enable_virt_at_load")
        .is_ok_and(|text| text.starts_with('Y'))
}
