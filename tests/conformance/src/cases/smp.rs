//! Two vCPUs in two threads; requests from other threads while a vCPU runs; memory that changes under running
//! guests. With one processor the threads take turns.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use super::{Case, Outcome};
use crate::client::{Refused, Vcpu};
use crate::exit::{Exit, halt};
use crate::guest;
use crate::machine::{Machine, expect, prepare, run, vm_with_ram};
use crate::modes::{self, DATA, Mode};
use crate::process::Clock;
use crate::ram::Ram;
use crate::threads::{
    SOON, counts, join, most_come_soon, pair, run_both, side_by_side, spin_until, spinning,
    wait_until, while_clocked, while_repeating, while_running,
};

pub const CASES: &[Case] = &[
    case!(two_vcpus_count),
    case!(two_vcpus_locked_add),
    case!(hand_over),
    case!(device_access_from_both),
    case!(second_run_is_refused),
    case!(set_cpuid_while_running),
    case!(get_regs_while_running),
    case!(interrupt_from_another_thread),
    case!(user_event_from_another_thread),
    case!(tsc_agrees),
    case!(tsc_set_on_one),
    case!(vcpu_moves_between_threads),
    case!(remap_under_running_guest),
    case!(protect_under_running_guest),
    case!(discard_under_running_guest),
    case!(create_vms_while_another_runs),
    case!(avx_in_two_vcpus),
    case!(sixteen_threads),
    case!(sixteen_under_requests),
];

/// Each its own counter.
fn two_vcpus_count() -> Outcome {
    let code = guest!(64:
        "mov ecx, 200000", "2: inc dword ptr [rbx * 4 + 0xc000]", "dec ecx", "jnz 2b", "hlt");
    let (machine, two) = pair(code.bits64)?;
    run_both(&machine, &two)?;
    same!(
        (machine.ram.u32(DATA), machine.ram.u32(DATA + 4)),
        (200000, 200000),
        "counts"
    );
    Ok(())
}

/// Both the same counter, with LOCK.
fn two_vcpus_locked_add() -> Outcome {
    let code = guest!(64:
        "mov ecx, 200000", "2: lock inc dword ptr [0xc000]", "dec ecx", "jnz 2b", "hlt");
    let (machine, two) = pair(code.bits64)?;
    run_both(&machine, &two)?;
    same!(machine.ram.u32(DATA), 400000, "count");
    Ok(())
}

/// They pass a token to and fro, and write down who had it. One that spins for it on the only processor lets the other
/// run, and not with the next tick of the host's clock.
fn hand_over() -> Outcome {
    /// Twenty ticks at 250 Hz, for forty turns; of processor time, which others do not take from us.
    const SOON: Duration = Duration::from_millis(80);
    let code = guest!(64:
        "mov ecx, 20", "mov edx, ebx", "xor edx, 1",
        "2: pause", "cmp [0xc000], ebx", "jne 2b",
        "mov eax, [0xc004]", "mov [rax + 0xc008], bl", "inc dword ptr [0xc004]", "mov [0xc000], edx",
        "dec ecx", "jnz 2b", "hlt");
    let (machine, two) = pair(code.bits64)?;
    let start = Clock::of_this_process().now();
    run_both(&machine, &two)?;
    let time = Clock::of_this_process().now() - start;
    same!(machine.ram.u32(DATA + 4), 40, "turns");
    same!(machine.ram.read(DATA + 8, 40), [0, 1].repeat(20), "whose");
    ensure!(time < SOON || side_by_side(), "it took {time:?}");
    Ok(())
}

fn device_access_from_both() -> Outcome {
    let code = guest!(64:
        "mov ecx, 100", "mov edi, 0xd0000", "shl ebx, 8", "add edi, ebx",
        "2: mov [rdi], ecx", "mov eax, [rdi + 4]", "add esi, eax", "dec ecx", "jnz 2b", "hlt");
    let (machine, two) = pair(code.bits64)?;
    let serve = |vcpu: &Vcpu, base: u64| -> Outcome {
        let mut steps = Vec::new();
        for count in (1..=100).rev() {
            steps.push(crate::exit::write(base, 4, count));
            steps.push(crate::exit::read(base + 4, 4, count * 3));
        }
        steps.push(halt());
        expect(vcpu, Mode::Long, &machine.ram, &steps)?;
        same!(vcpu.regs()?.rsi, 5050 * 3, "sum");
        Ok(())
    };
    thread::scope(|scope| {
        let first = scope.spawn(|| serve(&machine.vcpu, modes::DEVICE));
        let second = scope.spawn(|| serve(&two, modes::DEVICE + 0x100));
        join(first).context("vCPU 0")?;
        join(second).context("vCPU 1")
    })
}

/// EBUSY for as long as another thread is in RUN; that one goes on. Either thread can be the second: between two RUNs of
/// the one the other may get in.
fn second_run_is_refused() -> Outcome {
    let machine = spinning()?;
    let refused = AtomicU32::new(0);
    let run = || {
        match machine.vcpu.run() {
            Ok(_) => {}
            Err(Refused(libc::EBUSY)) => {
                refused.fetch_add(1, Ordering::Relaxed);
            }
            Err(other) => anyhow::bail!("RUN: {other}"),
        }
        Ok(())
    };
    while_repeating(run, || {
        counts(&machine.ram)?;
        if side_by_side() {
            wait_until("never refused", || {
                run()?;
                Ok(refused.load(Ordering::Relaxed) > 3)
            })?;
        } else {
            (0..20).try_for_each(|_| run())?;
        }
        counts(&machine.ram)
    })
}

fn set_cpuid_while_running() -> Outcome {
    let machine = spinning()?;
    while_running(&machine, || {
        counts(&machine.ram)?;
        let (_, _, entries) = machine.vcpu.cpuid(64);
        let set = || match machine.vcpu.set_cpuid(1, &entries[..1]) {
            Err(Refused(libc::EFAULT)) => Ok(true),
            Ok(()) => Ok(false),
            Err(other) => Err(anyhow!("SET_CPUID: {other}")),
        };
        if side_by_side() {
            return wait_until("never refused", set);
        }
        (0..20).try_for_each(|_| set().map(drop))
    })
}

/// It waits for the end of RUN, and what it gets is whole, and of now.
fn get_regs_while_running() -> Outcome {
    let code = guest!(64: "2: inc rax", "mov rcx, rax", "jmp 2b");
    let machine = Machine::new(Mode::Long, code)?;
    while_running(&machine, || {
        let (mut last, mut moved) = (0, 0);
        wait_until("the guest stands still", || {
            let state = machine.regs()?;
            ensure!(state.rax >= last, "RAX {:#x} after {last:#x}", state.rax);
            ensure!(
                state.rax == state.rcx || state.rax == state.rcx + 1,
                "RAX {:#x} RCX {:#x}",
                state.rax,
                state.rcx
            );
            moved += u32::from(state.rax > last);
            last = state.rax;
            Ok(moved >= 10)
        })
    })
}

/// At once: the guest is interrupted for it, and RUN again.
fn interrupt_from_another_thread() -> Outcome {
    let code = guest!(64: "sti", "2: inc qword ptr [0xc000]", "jmp 2b");
    let machine = Machine::new(Mode::Long, code)?;
    // The stub's OUT is replaced by a count in memory: inc dword [c008h + 4 * vector]; iretq.
    for number in 0x20..0x30_u64 {
        let mut stub = vec![0xff, 0x04, 0x25];
        stub.extend(((DATA + 8 + 4 * number) as u32).to_le_bytes());
        stub.extend([0x48, 0xcf]);
        machine.ram.write(modes::STUBS + number * 16, &stub);
    }
    let came = |number: u32| machine.ram.u32(DATA + 8 + 4 * u64::from(number));
    let together = side_by_side();
    let batch = |clock: Clock| {
        let mut soon = 0;
        for number in 0x20..0x30_u32 {
            // The guest runs, and not in step with the host's timer.
            counts(&machine.ram)?;
            thread::sleep(Duration::from_micros(137) * (number - 0x20));
            counts(&machine.ram)?;
            let (start, before) = (clock.now(), came(number));
            machine.vcpu.interrupt(number)?;
            let has_come = || came(number) != before;
            if together {
                spin_until("the vector does not come", has_come)?;
            } else {
                wait_until("the vector does not come", || Ok(has_come()))?;
            }
            soon += u32::from(clock.now() - start < SOON);
        }
        // On one processor it comes when the guest's thread has its turn.
        Ok((if together { soon } else { 16 }, 16))
    };
    while_clocked(&machine, |clock| most_come_soon(|| batch(clock)))
}

fn user_event_from_another_thread() -> Outcome {
    let machine = spinning()?;
    while_running(&machine, || {
        for _ in 0..10 {
            machine.vcpu.tunnel.set_user_event(1);
            let is_taken = || Ok(machine.vcpu.tunnel.user_event() & 1 == 0);
            wait_until("the event is not taken", is_taken)?;
        }
        Ok(())
    })
}

/// One clock: what a vCPU or the client reads after another has read is later.
fn tsc_agrees() -> Outcome {
    let code = guest!(64: "2: rdtsc", "shl rdx, 32", "or rax, rdx", "out 0x80, al", "jmp 2b");
    let (machine, two) = pair(code.bits64)?;
    let mut last = 0;
    let mut later = |now: u64| {
        let fits = now > last && (last == 0 || now - last < 1 << 36);
        ensure!(fits, "{now:#x} after {last:#x}");
        last = now;
        Ok(())
    };
    for _ in 0..50 {
        for vcpu in [&machine.vcpu, &two] {
            let exit = run(vcpu, Mode::Long, &machine.ram)?;
            ensure!(matches!(exit, Exit::Out { .. }), "{exit:?}");
            later(vcpu.regs()?.rax)?;
            later(vcpu.msrs(&[0x10])?[0])?;
        }
    }
    Ok(())
}

/// QEMU restores the counter of each vCPU in turn: they agree afterwards.
fn tsc_set_on_one() -> Outcome {
    let (machine, two) = pair(guest!(64: "hlt").bits64)?;
    let value = 1 << 45;
    let mut last = 0;
    for vcpu in [&machine.vcpu, &two] {
        same!(vcpu.set_msrs(&[(0x10, value)])?, 1, "SET_MSRS");
        // Of the second only a value far away counts: the clock does not go back.
        for _ in 0..5 {
            let now = vcpu.msrs(&[0x10])?[0];
            ensure!(now > last, "{now:#x} after {last:#x}");
            last = now;
        }
    }
    for _ in 0..20 {
        for vcpu in [&machine.vcpu, &two] {
            let now = vcpu.msrs(&[0x10])?[0];
            ensure!(now > last && now >= value, "{now:#x} after {last:#x}");
            last = now;
        }
    }
    ensure!(last < value + (1 << 34), "{last:#x}");
    // Another value is another time, from any of them.
    same!(two.set_msrs(&[(0x10, value << 4)])?, 1, "SET_MSRS");
    let now = machine.vcpu.msrs(&[0x10])?[0];
    ensure!(now >= value << 4, "{now:#x}");
    Ok(())
}

/// Made by one thread, set up by a second, run by a third.
fn vcpu_moves_between_threads() -> Outcome {
    let machine = Machine::new(
        Mode::Long,
        guest!(64: "inc eax", "out 0x80, al", "inc eax", "hlt"),
    )?;
    for exit in [crate::exit::out(0x80, 1, 1), halt()] {
        thread::scope(|scope| join(scope.spawn(|| machine.expect(std::slice::from_ref(&exit)))))?;
    }
    same!(machine.regs()?.rax, 2, "EAX");
    Ok(())
}

/// A page goes to and fro between two buffers while the guest counts in it: when SET_RAM has returned, the
/// buffer that is out changes no more.
fn remap_under_running_guest() -> Outcome {
    let machine = spinning()?;
    let other = Ram::new(0x1000);
    machine.vm.add_ramblock(other.address(), 0x1000)?;
    while_running(&machine, || {
        for _ in 0..20 {
            counts(&machine.ram)?;
            machine.vm.set_ram(DATA, 0x1000, 0, other.address())?;
            let (first, before) = (machine.ram.u64(DATA), other.u64(0));
            wait_until("the guest stands still", || Ok(other.u64(0) != before))?;
            same!(
                machine.ram.u64(DATA),
                first,
                "the buffer that is not mapped"
            );
            let va = machine.ram.address() + DATA;
            machine.vm.set_ram(DATA, 0x1000, 0, va)?;
            let second = other.u64(0);
            counts(&machine.ram)?;
            same!(other.u64(0), second, "the other one");
        }
        Ok(())
    })
}

/// PROTECT_RAM stops a running guest at the page.
fn protect_under_running_guest() -> Outcome {
    let code = guest!(64: "2: inc qword ptr [rdi]", "jmp 2b");
    let machine = Machine::new(Mode::Long, code)?;
    let ram = Ram::new(0x1000);
    let gpa = 0x60_0000;
    machine.vm.set_ram2(gpa, 0x1000, 0x40, ram.address())?;
    machine.set(|state| state.rdi = gpa)?;
    thread::scope(|scope| {
        let runner = scope.spawn(|| machine.run());
        wait_until("the guest does not start", || Ok(ram.u64(0) != 0))?;
        machine.vm.protect_ram(gpa, 0x1000, 0)?;
        let count = ram.u64(0);
        let exit = join(runner)?;
        let Exit::PageFault { gpa: at, .. } = exit else {
            anyhow::bail!("{exit:?}");
        };
        same!(at, gpa, "GPA");
        same!(
            ram.u64(0),
            count,
            "nothing was written after PROTECT_RAM had returned"
        );
        Ok(())
    })
}

fn discard_under_running_guest() -> Outcome {
    borrowed_only!();
    let machine = spinning()?;
    while_running(&machine, || {
        for _ in 0..20 {
            counts(&machine.ram)?;
            machine.ram.discard(DATA, 0x1000);
        }
        counts(&machine.ram)
    })
}

fn create_vms_while_another_runs() -> Outcome {
    let machine = spinning()?;
    while_running(&machine, || {
        for _ in 0..5 {
            let other = Machine::new(Mode::Protected, guest!("inc eax", "hlt"))?;
            other.expect(&[halt()])?;
            same!(other.regs()?.rax, 1, "EAX");
        }
        counts(&machine.ram)
    })
}

/// Each vCPU keeps its own YMM registers while both run.
fn avx_in_two_vcpus() -> Outcome {
    let code = guest!(64:
        "mov rax, cr4", "bts rax, 18", "mov cr4, rax",
        "xor ecx, ecx", "xor edx, edx", "mov eax, 7", "xsetbv",
        "lea eax, [rbx + 0x55]", "vmovd xmm0, eax", "vpbroadcastd ymm5, xmm0",
        "mov ecx, 300000", "2: vpcmpeqd ymm6, ymm5, ymm5", "dec ecx", "jnz 2b",
        "shl ebx, 5", "vmovups [rbx + 0xc000], ymm5", "hlt");
    let (machine, two) = pair(code.bits64)?;
    run_both(&machine, &two)?;
    for (number, byte) in [(0_u64, 0x55_u8), (1, 0x56)] {
        let wanted = [byte, 0, 0, 0].repeat(8);
        same!(
            machine.ram.read(DATA + number * 32, 32),
            wanted,
            "YMM5 of vCPU {number}"
        );
    }
    Ok(())
}

/// As many vCPUs as there may be, all at once.
fn sixteen_threads() -> Outcome {
    let (vm, ram) = vm_with_ram()?;
    modes::write_tables(Mode::Long, &ram);
    let code =
        guest!(64: "mov ecx, 20000", "2: lock inc dword ptr [0xc000]", "dec ecx", "jnz 2b", "hlt");
    ram.write(modes::CODE, code.bits64);
    let vcpus: Result<Vec<Vcpu>> = (0..16)
        .map(|id| {
            let vcpu = vm.create_vcpu(id)?;
            prepare(&vcpu, Mode::Long)?;
            Ok(vcpu)
        })
        .collect();
    let vcpus = vcpus?;
    thread::scope(|scope| -> Outcome {
        let runners: Vec<_> = vcpus
            .iter()
            .map(|vcpu| scope.spawn(|| expect(vcpu, Mode::Long, &ram, &[halt()])))
            .collect();
        for runner in runners {
            join(runner)?;
        }
        Ok(())
    })?;
    same!(ram.u32(DATA), 16 * 20000, "count");
    Ok(())
}

/// RUN of vCPUs that are running, in turn, until it was refused some times.
fn run_again(vcpus: &[Vcpu]) -> Outcome {
    let mut refused = 0;
    let mut round = || {
        for vcpu in vcpus {
            // So that this RUN ends at once, if it is the one that gets in.
            vcpu.tunnel.set_user_event(1);
            match vcpu.run() {
                Err(Refused(libc::EBUSY)) => refused += 1,
                Ok(_) => {}
                Err(other) => anyhow::bail!("RUN: {other}"),
            }
        }
        Ok(refused > 3)
    };
    if side_by_side() {
        return wait_until("no second RUN was refused", round);
    }
    (0..20).try_for_each(|_| round().map(drop))
}

/// Whatever can be set of a vCPU that is running, when it has counted further.
fn set_all(ram: &Ram, id: u64, vcpu: &Vcpu) -> Outcome {
    let counter = || ram.u64(DATA + 0x800 + id * 8);
    let before = counter();
    wait_until("a vCPU stands still", || Ok(counter() != before))?;
    let mut state = vcpu.regs()?;
    same!(state.rbx, id, "RBX of vCPU {id}");
    state.rcx = 0x1000 + id;
    vcpu.set_regs(&state)?;
    same!(vcpu.set_msrs(&[(0x174, 0x100 + id)])?, 1, "SET_MSRS");
    let mut fpu = vcpu.fpu()?;
    fpu.fcw = 0x340 | id as u16;
    vcpu.set_fpu(&fpu)?;
    vcpu.interrupt(0x40)?;
    vcpu.set_debug(0, [0; 8])?;
    Ok(())
}

/// As many vCPUs as there may be, all of them running, and every request on each from one more thread: a second RUN is
/// refused, what reads or writes registers waits, and nobody gets another's.
fn sixteen_under_requests() -> Outcome {
    let (vm, ram) = vm_with_ram()?;
    modes::write_tables(Mode::Long, &ram);
    let code = guest!(64: "2: inc qword ptr [rbx * 8 + 0xc800]", "jmp 2b");
    ram.write(modes::CODE, code.bits64);
    let vcpus: Result<Vec<Vcpu>> = (0..16)
        .map(|id| {
            let vcpu = vm.create_vcpu(id)?;
            prepare(&vcpu, Mode::Long)?;
            let mut state = vcpu.regs()?;
            state.rbx = id.into();
            vcpu.set_regs(&state)?;
            Ok(vcpu)
        })
        .collect();
    let vcpus = vcpus?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> Outcome {
        let runners: Vec<_> = vcpus
            .iter()
            .map(|vcpu| {
                scope.spawn(|| -> Outcome {
                    while !stop.load(Ordering::Acquire) {
                        match vcpu.run() {
                            Ok(_) | Err(Refused(libc::EBUSY)) => {}
                            Err(other) => anyhow::bail!("RUN: {other}"),
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        let result = run_again(&vcpus).and_then(|()| {
            (0..)
                .zip(&vcpus)
                .try_for_each(|(id, vcpu)| set_all(&ram, id, vcpu))
        });
        stop.store(true, Ordering::Release);
        for runner in runners {
            join(runner)?;
        }
        result
    })?;
    for (id, vcpu) in (0..).zip(&vcpus) {
        let state = vcpu.regs()?;
        same!(
            (state.rbx, state.rcx),
            (id, 0x1000 + id),
            "RBX and RCX of vCPU {id}"
        );
        same!(
            vcpu.msrs(&[0x174])?,
            [0x100 + id],
            "IA32_SYSENTER_CS of vCPU {id}"
        );
        same!(vcpu.fpu()?.fcw, 0x340 | id as u16, "FCW of vCPU {id}");
    }
    Ok(())
}
