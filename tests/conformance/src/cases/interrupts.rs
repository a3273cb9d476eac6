//! INTERRUPT, the window, the ready flag, shadows, CR8, and the host's own interrupts.

use std::time::Instant;

use super::{Case, Outcome};
use crate::exit::{Exit, fault_code, halt, input, out, vector};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, DEVICE, Mode, STACK};
use crate::process::Clock;
use crate::threads::PATIENCE;

pub const CASES: &[Case] = &[
    case!(waits_for_if in ALL),
    case!(delivered_before_the_next_instruction in SIZES),
    case!(highest_first in SIZES),
    case!(queued_twice_comes_once in SIZES),
    case!(all_vectors),
    case!(only_the_low_byte_counts),
    case!(frame in ALL),
    case!(ready_follows_if in SIZES),
    case!(ready_while_queued in SIZES),
    case!(window_opens in ALL),
    case!(window_open_at_once in SIZES),
    case!(window_with_if_clear_waits in SIZES),
    case!(sti_shadow in SIZES),
    case!(mov_ss_shadow in WIDE),
    case!(popf_has_no_shadow in SIZES),
    case!(cr8_holds_back in LONG),
    case!(cr8_holds_back_only_what_is_below in LONG),
    case!(cr8_keeps_its_value in LONG),
    case!(cr8_reserved_bits in LONG),
    case!(software_interrupt in ALL),
    case!(interrupt_at_in in SIZES),
    case!(interrupt_at_rom_write in SIZES),
    case!(not_lost_by_page_faults in LONG),
    case!(during_delivery_through_cold_stack in PAGING),
    case!(exception_through_cold_stack in PROTECTED),
    case!(user_event in SIZES),
    case!(user_event_stays_off in SIZES),
    case!(host_interrupts_end_run in SIZES),
    case!(host_interrupts_change_nothing in LONG),
    case!(signal_ends_run in SIZES),
    case!(set_regs_keeps_vectors in SIZES),
    case!(into_ring_0 in WIDE),
];

fn waits_for_if(mode: Mode) -> Outcome {
    let code = guest!("out 0x80, al", "sti", "nop", "nop", "out 0x81, al", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.vcpu.interrupt(0x31)?;
    machine.expect(&[out(0x80, 1, 0), vector(0x31), out(0x81, 1, 0), halt()])
}

fn delivered_before_the_next_instruction(mode: Mode) -> Outcome {
    let code = guest!("sti", "nop", "out 0x80, al", "mov bl, 1", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vcpu.interrupt(0x32)?;
    machine.expect(&[vector(0x32)])?;
    same!(machine.regs()?.rbx, 0, "BL");
    machine.expect(&[halt()])
}

fn highest_first(mode: Mode) -> Outcome {
    let code = guest!("sti", "nop", "nop", "nop", "nop", "hlt");
    let machine = Machine::new(mode, code)?;
    for number in [0x30, 0xf1, 0x80, 0x81, 0x20] {
        machine.vcpu.interrupt(number)?;
    }
    machine.expect(&[
        vector(0xf1),
        vector(0x81),
        vector(0x80),
        vector(0x30),
        vector(0x20),
        halt(),
    ])
}

fn queued_twice_comes_once(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("sti", "nop", "nop", "hlt"))?;
    machine.vcpu.interrupt(0x55)?;
    machine.vcpu.interrupt(0x55)?;
    machine.expect(&[vector(0x55), halt()])
}

fn all_vectors() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "sti", "2: hlt", "jmp 2b"))?;
    machine.expect(&[halt()])?;
    for number in 0x20..=0xff_u8 {
        machine.vcpu.interrupt(number.into())?;
        machine.expect(&[vector(number), halt()])?;
    }
    Ok(())
}

fn only_the_low_byte_counts() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "sti", "nop", "nop", "hlt"))?;
    machine.vcpu.interrupt(0x1234_5640)?;
    machine.expect(&[vector(0x40), halt()])
}

/// What delivery pushes: RIP, CS, RFLAGS, and in 64-bit mode RSP and SS; IF is clear in the handler.
fn frame(mode: Mode) -> Outcome {
    let code = guest!("sti", "nop", "out 0x80, al", "nop", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    let before = machine.regs()?;
    machine.vcpu.interrupt(0x41)?;
    machine.expect(&[vector(0x41)])?;
    let state = machine.regs()?;
    same!(state.rflags & 0x200, 0, "IF in the handler");
    // The stub has pushed AX.
    same!(machine.stack(1)?, before.rip, "RIP");
    same!(machine.stack(2)?, u64::from(before.cs.selector), "CS");
    // RF in the image is the emulator's choice; IRET takes it back.
    same!(machine.stack(3)? & !0x10000, before.rflags, "RFLAGS");
    if mode == Mode::Long {
        same!(machine.stack(4)?, before.rsp, "RSP");
        same!(machine.stack(5)?, u64::from(before.ss.selector), "SS");
    }
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rsp, STACK, "RSP after IRET");
    Ok(())
}

fn ready_follows_if(mode: Mode) -> Outcome {
    let code = guest!(
        "out 0x80, al",
        "sti",
        "nop",
        "out 0x81, al",
        "cli",
        "out 0x82, al",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let tunnel = machine.vcpu.tunnel;
    machine.expect(&[out(0x80, 1, 0)])?;
    same!(tunnel.ready(), 0, "ready with IF clear");
    machine.expect(&[out(0x81, 1, 0)])?;
    same!(tunnel.ready(), 1, "ready with IF set");
    machine.expect(&[out(0x82, 1, 0)])?;
    same!(tunnel.ready(), 0, "ready after CLI");
    Ok(())
}

fn ready_while_queued(mode: Mode) -> Outcome {
    let code = guest!(
        "out 0x80, al",
        "out 0x80, al",
        "sti",
        "nop",
        "nop",
        "out 0x81, al",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vcpu.interrupt(0x33)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    same!(machine.vcpu.tunnel.ready(), 0, "ready with a vector queued");
    machine.expect(&[vector(0x33), out(0x81, 1, 0)])?;
    same!(machine.vcpu.tunnel.ready(), 1, "ready when it is gone");
    Ok(())
}

/// RUN until INTERRUPT with the ready flag set: what a client that asked for the window waits for.
fn until_window(machine: &Machine) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let exit = machine.run_once()?;
        same!(exit, Exit::Interrupt, "exit while waiting for the window");
        if machine.vcpu.tunnel.ready() != 0 {
            return Ok(());
        }
        anyhow::ensure!(start.elapsed() < PATIENCE, "the window never opens");
    }
}

fn window_opens(mode: Mode) -> Outcome {
    let code = guest!("out 0x80, al", "sti", "nop", "2: inc ebx", "jmp 2b");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vcpu.tunnel.set_window(1);
    until_window(&machine)?;
    let state = machine.regs()?;
    same!(state.rflags & 0x200, 0x200, "IF");
    same!(
        (state.rip, state.rbx),
        (mode.entry() + 4, 0),
        "RIP and EBX: behind the one instruction of STI's shadow"
    );
    machine.vcpu.interrupt(0x45)?;
    machine.vcpu.tunnel.set_window(0);
    machine.expect(&[vector(0x45)])
}

fn window_open_at_once(mode: Mode) -> Outcome {
    let code = guest!("sti", "nop", "out 0x80, al", "2: inc ebx", "jmp 2b");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vcpu.tunnel.set_window(1);
    same!(machine.run_once()?, Exit::Interrupt, "exit");
    same!(machine.vcpu.tunnel.ready(), 1, "ready");
    same!(machine.regs()?.rbx, 0, "EBX: nothing was executed");
    Ok(())
}

fn window_with_if_clear_waits(mode: Mode) -> Outcome {
    let code = guest!("nop", "nop", "out 0x80, al", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.vcpu.tunnel.set_window(1);
    machine.expect(&[out(0x80, 1, 0), halt()])
}

/// The instruction behind STI is executed first.
fn sti_shadow(mode: Mode) -> Outcome {
    let code = guest!("sti", "out 0x80, al", "mov bl, 1", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.vcpu.interrupt(0x36)?;
    machine.expect(&[out(0x80, 1, 0), vector(0x36)])?;
    same!(machine.regs()?.rbx, 0, "BL");
    machine.expect(&[halt()])
}

/// The same for MOV to SS.
fn mov_ss_shadow(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, ss",
        "sti",
        "nop",
        "in al, 0x70",
        "mov ss, ecx",
        "out 0x80, al",
        "mov bl, 1",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.expect(&[input(0x70, 1, 0)])?;
    machine.set(|state| state.rflags &= !0x200)?;
    // IF is set again by an interrupt's IRET only; so set it here, in front of MOV SS.
    machine.set(|state| state.rflags |= 0x200)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vcpu.interrupt(0x37)?;
    machine.expect(&[vector(0x37)])?;
    same!(machine.regs()?.rbx, 0, "BL");
    machine.expect(&[halt()])
}

fn popf_has_no_shadow(mode: Mode) -> Outcome {
    let code = guest!("push 0x202", "popf", "out 0x80, al", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.vcpu.interrupt(0x38)?;
    machine.expect(&[vector(0x38), out(0x80, 1, 0), halt()])
}

fn cr8_holds_back(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov eax, 5", "mov cr8, rax", "sti", "nop", "out 0x80, al",
        "mov eax, 4", "mov cr8, rax", "nop", "out 0x81, al", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.vcpu.interrupt(0x51)?;
    machine.vcpu.interrupt(0x5f)?;
    machine.vcpu.interrupt(0x61)?;
    machine.expect(&[
        vector(0x61),
        out(0x80, 1, 5),
        vector(0x5f),
        vector(0x51),
        out(0x81, 1, 4),
        halt(),
    ])
}

/// A vector behind the TPR must not keep a client from queueing a higher one: the guest may spin for it. The
/// window opens although the lower one waits.
fn cr8_holds_back_only_what_is_below(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov eax, 5", "mov cr8, rax", "sti", "nop", "out 0x80, al", "nop", "out 0x81, al",
        "xor eax, eax", "mov cr8, rax", "nop", "hlt");
    let machine = Machine::new(mode, code)?;
    let tunnel = machine.vcpu.tunnel;
    machine.expect(&[out(0x80, 1, 5)])?;
    same!(tunnel.ready(), 1, "ready");
    machine.vcpu.interrupt(0x51)?;
    machine.expect(&[out(0x81, 1, 5)])?;
    same!(tunnel.ready(), 1, "ready, with a vector behind the TPR");
    let rip = machine.regs()?.rip;
    tunnel.set_window(1);
    until_window(&machine)?;
    same!(machine.regs()?.rip, rip, "RIP: nothing was executed");
    machine.vcpu.interrupt(0x81)?;
    tunnel.set_window(0);
    machine.expect(&[vector(0x81), vector(0x51), halt()])
}

fn cr8_keeps_its_value(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov rbx, cr8", "mov eax, 0xd", "mov cr8, rax", "out 0x80, al", "mov rcx, cr8", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[out(0x80, 1, 0xd), halt()])?;
    let state = machine.regs()?;
    same!((state.rbx, state.rcx), (0, 0xd), "CR8 before and after");
    Ok(())
}

fn cr8_reserved_bits(mode: Mode) -> Outcome {
    let code = guest!(64: "mov eax, 0x10", "mov cr8, rax", "hlt");
    Machine::new(mode, code)?.expect(&[fault_code(13, 0)])
}

/// The same for an instruction's own events: INT's length and an exception's error code are kept.
fn exception_through_cold_stack(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("int 0x66", "mov bl, 7", "hlt"))?;
    machine.set(|state| state.rsp = 0x18_0800)?;
    machine.expect(&[vector(0x66), halt()])?;
    same!(machine.regs()?.rbx, 7, "BL");
    let machine = Machine::new(mode, guest!("mov eax, 0x1000", "mov es, eax", "hlt"))?;
    machine.set(|state| state.rsp = 0x18_0800)?;
    machine.expect(&[fault_code(13, 0x1000)])
}

fn software_interrupt(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("int 0x66", "mov bl, 7", "hlt"))?;
    machine.expect(&[vector(0x66), halt()])?;
    same!(machine.regs()?.rbx, 7, "BL");
    Ok(())
}

/// Queued while an IN is open: the IN completes first.
fn interrupt_at_in(mode: Mode) -> Outcome {
    let code = guest!("sti", "nop", "in al, 0x70", "mov bl, al", "hlt");
    let machine = Machine::new(mode, code)?;
    let access = input(0x70, 1, 0x5b);
    machine.expect(std::slice::from_ref(&access))?;
    machine.vcpu.interrupt(0x47)?;
    machine.answer(&access);
    machine.expect(&[vector(0x47), halt()])?;
    same!(machine.regs()?.rbx, 0x5b, "BL");
    Ok(())
}

fn interrupt_at_rom_write(mode: Mode) -> Outcome {
    let code = guest!("sti", "nop", "mov [edi], al", "mov bl, 1", "hlt");
    let machine = Machine::new(mode, code)?;
    machine
        .vm
        .set_ram(DATA, 0x1000, 1, machine.ram.address() + DATA)?;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[crate::exit::write(DATA, 1, 0)])?;
    machine.vcpu.interrupt(0x48)?;
    machine.expect(&[vector(0x48), halt()])
}

/// Each page the guest touches is an EPT violation of ours: interrupts in between are all delivered.
fn not_lost_by_page_faults(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov edi, 0x110000", "mov ecx, 100", "sti",
        "2: mov [rdi], ecx", "add edi, 4096", "out 0x80, al", "dec ecx", "jnz 2b", "hlt");
    let machine = Machine::new(mode, code)?;
    let mut vectors = 0;
    loop {
        match machine.run()? {
            Exit::Out { .. } => machine.vcpu.interrupt(0x70)?,
            Exit::Vector(0x70) => vectors += 1,
            Exit::Halt => break,
            other => anyhow::bail!("{other:?}"),
        }
    }
    same!(vectors, 100, "interrupts");
    Ok(())
}

/// Delivery itself touches a page nobody has mapped yet: it is repeated, not lost.
fn during_delivery_through_cold_stack(mode: Mode) -> Outcome {
    let code = guest!("sti", "nop", "out 0x80, al", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rsp = 0x180000)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    for round in 0..5_u64 {
        // A fresh page for the stack each time.
        machine.set(|state| {
            state.rsp = 0x180000 + round * 0x2000;
            state.rip -= if round == 0 { 0 } else { 2 };
        })?;
        if round != 0 {
            machine.expect(&[out(0x80, 1, 0)])?;
        }
        machine.vcpu.interrupt(0x71)?;
        machine.expect(&[vector(0x71), halt()])?;
        machine.set(|state| state.rip -= 1)?;
    }
    Ok(())
}

fn user_event(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("2: inc ebx", "jmp 2b"))?;
    let tunnel = machine.vcpu.tunnel;
    tunnel.set_user_event(1);
    same!(machine.run_once()?, Exit::Interrupt, "exit");
    same!(tunnel.user_event() & 1, 0, "the event is taken");
    same!(machine.regs()?.rbx, 0, "EBX: nothing was executed");
    Ok(())
}

/// Without bit 0 it is no event.
fn user_event_stays_off(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov bl, 1", "hlt"))?;
    machine.vcpu.tunnel.set_user_event(0xffff_fffe);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rbx, 1, "BL");
    Ok(())
}

/// RUN of a guest that never exits by itself comes back by the host's timer, so many times: the timer of all kernels
/// here ticks at least every 10 ms. A signal ends a RUN that it does not end, too late.
pub(super) fn ends_by_the_timer(machine: &Machine, times: u32) -> Outcome {
    // Of this thread's own time: what others have in between is not RUN's.
    let clock = Clock::of_this_thread()?;
    let start = clock.now();
    crate::process::with_alarm(300_000, || {
        for _ in 0..times {
            same!(machine.run_once()?, Exit::Interrupt, "exit");
        }
        Ok(())
    })?;
    let time = clock.now() - start;
    anyhow::ensure!(
        time.as_millis() < u128::from(times) * 20,
        "{times} times RUN took {time:?}"
    );
    Ok(())
}

fn host_interrupts_end_run(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("2: inc ebx", "jmp 2b"))?;
    ends_by_the_timer(&machine, 5)?;
    anyhow::ensure!(machine.regs()?.rbx != 0, "nothing was executed");
    Ok(())
}

/// A sum over registers and memory is right however often the host interrupts, which it does every few milliseconds.
fn host_interrupts_change_nothing(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov ecx, 2000000", "xor eax, eax",
        "2: add rax, rcx", "mov [rsi], rax", "add rdx, [rsi]", "dec rcx", "jnz 2b", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rsi = DATA)?;
    let clock = Clock::of_this_thread()?;
    let (mut interrupts, start) = (0, clock.now());
    loop {
        match machine.run_once()? {
            Exit::Interrupt => interrupts += 1,
            Exit::Halt => break,
            other => anyhow::bail!("{other:?}"),
        }
    }
    let time = clock.now() - start;
    let (mut sum, mut sums) = (0_u64, 0_u64);
    for count in (1..=2_000_000_u64).rev() {
        sum += count;
        sums = sums.wrapping_add(sum);
    }
    let state = machine.regs()?;
    same!((state.rax, state.rdx), (sum, sums), "sums");
    anyhow::ensure!(
        interrupts * 20 > time.as_millis(),
        "the host interrupted {interrupts} times in {time:?}"
    );
    Ok(())
}

/// A pending signal ends RUN with INTERRUPT and 0, not with EINTR.
fn signal_ends_run(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("2: inc ebx", "jmp 2b"))?;
    crate::process::with_alarm(1500, || {
        for _ in 0..20 {
            same!(machine.run_once()?, Exit::Interrupt, "exit");
        }
        Ok(())
    })
}

fn set_regs_keeps_vectors(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("hlt", "sti", "nop", "nop", "hlt"))?;
    machine.vcpu.interrupt(0x49)?;
    machine.set(|state| state.rip += 1)?;
    machine.expect(&[vector(0x49), halt()])
}

/// From ring 3 the stack changes to the TSS's.
fn into_ring_0(mode: Mode) -> Outcome {
    let code = guest!("mov [edi], al", "2: jmp 2b");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        crate::cases::enter_user(mode, state);
        state.rflags |= 0x200;
        state.rdi = DEVICE;
    })?;
    machine.expect(&[crate::exit::write(DEVICE, 1, 0)])?;
    machine.vcpu.interrupt(0x4a)?;
    machine.expect(&[vector(0x4a)])?;
    let state = machine.regs()?;
    same!(state.cs.selector & 3, 0, "CPL");
    anyhow::ensure!(
        state.rsp < crate::modes::RING0_STACK && state.rsp > crate::modes::RING0_STACK - 64,
        "RSP {:#x}",
        state.rsp
    );
    Ok(())
}
