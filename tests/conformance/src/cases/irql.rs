//! Interrupt levels as 64-bit Windows keeps them: CR8 is the IRQL, a handler raises it to its vector's class, lets
//! interrupts in, and lowers it again before it returns.

use std::thread;

use anyhow::{Context, Result, anyhow};

use super::{Case, Outcome};
use crate::client::Vcpu;
use crate::exit::{Exit, Step, halt, input, out, vector};
use crate::guest;
use crate::machine::{Machine, answer, expect, prepare, run};
use crate::modes::{self, CODE, IDT, Mode, selector};

pub const CASES: &[Case] = &[
    case!(lowered_in_stages),
    case!(before_the_next_instruction),
    case!(raised_above_what_if_holds_back),
    case!(handlers_nest_by_class),
    case!(a_handler_lowers_itself),
    case!(halt_at_a_raised_level),
    case!(lower_and_higher_wait),
    case!(reset_lowers_it),
    case!(step_over_a_lowering),
    case!(two_processors_have_two_levels),
    case!(any_order),
];

/// A 64-bit guest.
fn machine(code: crate::code::Code) -> Result<Machine> {
    Machine::new(Mode::Long, code)
}

/// A handler of the case's own, so many bytes behind the code's start.
fn set_handler(machine: &Machine, number: u8, offset: u64) {
    let gate =
        (CODE & 0xffff) | u64::from(selector::CODE64) << 16 | 0x8e00 << 32 | (CODE >> 16) << 48;
    machine
        .ram
        .write_u64(IDT + u64::from(number) * 16, gate + offset);
}

/// The classes 15 to 0, one after the other; each tells of itself.
fn lowered_in_stages() -> Outcome {
    let machine = machine(guest!(64:
        "mov eax, 15", "mov cr8, rax", "sti", "nop", "out 0x80, al",
        "2: mov cr8, rax", "out 0x81, al", "dec eax", "jns 2b", "hlt"))?;
    machine.expect(&[out(0x80, 1, 15)])?;
    let queued = [0x31, 0x3f, 0x52, 0xd1, 0xe0, 0x21];
    for number in queued {
        machine.vcpu.interrupt(number.into())?;
    }
    for class in (0..16_u8).rev() {
        let mut now: Vec<u8> = queued.into_iter().filter(|v| v >> 4 == class + 1).collect();
        now.sort_unstable();
        for number in now.into_iter().rev() {
            machine.expect(&[vector(number)])?;
        }
        machine.expect(&[out(0x81, 1, class.into())])?;
        same!(machine.vcpu.tunnel.ready(), 1, "ready at class {class}");
    }
    machine.expect(&[halt()])
}

/// The MOV to CR8 that lets a vector in is the last instruction before its handler.
fn before_the_next_instruction() -> Outcome {
    let machine = machine(guest!(64:
        "mov eax, 8", "mov cr8, rax", "sti", "nop", "out 0x80, al",
        "mov eax, 7", "mov cr8, rax", "mov bl, 1", "hlt"))?;
    machine.expect(&[out(0x80, 1, 8)])?;
    machine.vcpu.interrupt(0x80)?;
    machine.expect(&[vector(0x80)])?;
    same!(machine.regs()?.rbx, 0, "BL");
    same!(
        machine.stack(1)?,
        CODE + 2 + 5 + 4 + 2 + 5 + 4,
        "RIP of the frame"
    );
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rbx, 1, "BL");
    Ok(())
}

/// Only IF holds the vector back; then its class does.
fn raised_above_what_if_holds_back() -> Outcome {
    let machine = machine(guest!(64:
        "out 0x80, al", "nop", "mov eax, 6", "mov cr8, rax", "sti", "nop", "out 0x81, al",
        "cli", "mov eax, 5", "mov cr8, rax", "out 0x82, al", "sti", "nop", "out 0x83, al", "hlt"))?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vcpu.interrupt(0x65)?;
    machine.expect(&[out(0x81, 1, 6)])?;
    same!(
        machine.vcpu.tunnel.ready(),
        1,
        "ready, with a vector behind CR8"
    );
    machine.expect(&[out(0x82, 1, 5), vector(0x65), out(0x83, 1, 5), halt()])
}

/// The code of a handler that works at the level of its class, and of what it interrupts.
macro_rules! nested {
    () => {
        guest!(64:
            "sti", "nop", "out 0x80, al", "nop", "mov rdx, cr8", "out 0x81, al", "hlt",
            // At 64: class 5.
            ".balign 64",
            "push rax", "mov rax, cr8", "push rax", "mov eax, 5", "mov cr8, rax", "sti",
            "out 0x85, al", "nop", "out 0x86, al", "cli", "pop rax", "mov cr8, rax", "pop rax",
            "iretq",
            // At 128: class 13.
            ".balign 64",
            "push rax", "mov rax, cr8", "push rax", "mov eax, 13", "mov cr8, rax", "sti",
            "out 0x8d, al", "nop", "out 0x8e, al", "cli", "pop rax", "mov cr8, rax", "pop rax",
            "iretq")
    };
}

/// A higher class interrupts a handler, an equal one and a lower one wait until it has lowered its level.
fn handlers_nest_by_class() -> Outcome {
    let machine = machine(nested!())?;
    set_handler(&machine, 0x51, 64);
    set_handler(&machine, 0xd1, 128);
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vcpu.interrupt(0x51)?;
    machine.expect(&[out(0x85, 1, 5)])?;
    // An equal one, a lower one and a higher one, in the handler of class 5.
    for number in [0x52, 0x33, 0xd1] {
        machine.vcpu.interrupt(number)?;
    }
    machine.expect(&[out(0x8d, 1, 13)])?;
    machine.vcpu.interrupt(0x72)?;
    machine.expect(&[out(0x8e, 1, 13)])?;
    // The inner handler has lowered to 5 with interrupts off: its IRET lets the one between in.
    machine.expect(&[vector(0x72), out(0x86, 1, 5)])?;
    // The outer one has lowered to 0.
    machine.expect(&[vector(0x52), vector(0x33), out(0x81, 1, 0), halt()])?;
    let state = machine.regs()?;
    same!((state.rdx, state.rsp), (0, modes::STACK), "CR8 and RSP");
    Ok(())
}

/// As a handler that ends in deferred work: it lowers its level with interrupts on, and is interrupted at once by
/// what has waited.
fn a_handler_lowers_itself() -> Outcome {
    let machine = machine(guest!(64:
        "sti", "nop", "out 0x80, al", "nop", "out 0x81, al", "hlt",
        ".balign 64",
        "push rax", "mov eax, 9", "mov cr8, rax", "sti", "out 0x89, al",
        "mov eax, 2", "mov cr8, rax", "out 0x82, al",
        "xor eax, eax", "cli", "mov cr8, rax", "pop rax", "iretq"))?;
    set_handler(&machine, 0x91, 64);
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vcpu.interrupt(0x91)?;
    machine.expect(&[out(0x89, 1, 9)])?;
    for number in [0x99, 0x31, 0x2f] {
        machine.vcpu.interrupt(number)?;
    }
    machine.expect(&[
        vector(0x99),
        vector(0x31),
        out(0x82, 1, 2),
        vector(0x2f),
        out(0x81, 1, 0),
        halt(),
    ])?;
    same!(machine.regs()?.rsp, modes::STACK, "RSP");
    Ok(())
}

/// A vector that CR8 holds back wakes nobody from HLT; a higher one does.
fn halt_at_a_raised_level() -> Outcome {
    let machine = machine(guest!(64:
        "mov eax, 4", "mov cr8, rax", "sti", "hlt", "nop", "hlt",
        "mov eax, 3", "mov cr8, rax", "hlt", "out 0x80, al", "hlt"))?;
    machine.expect(&[halt()])?;
    machine.vcpu.interrupt(0x41)?;
    // RUN goes on behind HLT: it is the client that waits.
    machine.expect(&[halt()])?;
    same!(machine.vcpu.tunnel.ready(), 1, "ready");
    machine.set(|state| state.rip -= 1)?;
    machine.vcpu.interrupt(0x52)?;
    machine.expect(&[vector(0x52), halt()])?;
    machine.expect(&[vector(0x41), halt(), out(0x80, 1, 3), halt()])
}

/// A lower and a higher one wait for IF and CR8 both.
fn lower_and_higher_wait() -> Outcome {
    let machine = machine(guest!(64:
        "mov eax, 12", "mov cr8, rax", "out 0x80, al",
        "mov eax, 10", "mov cr8, rax", "out 0x81, al", "sti", "nop", "out 0x82, al",
        "mov eax, 14", "mov cr8, rax", "mov eax, 4", "mov cr8, rax", "out 0x83, al",
        "mov eax, 3", "mov cr8, rax", "out 0x84, al", "hlt"))?;
    machine.expect(&[out(0x80, 1, 12)])?;
    machine.vcpu.interrupt(0x41)?;
    machine.vcpu.interrupt(0xb1)?;
    machine.expect(&[
        out(0x81, 1, 10),
        vector(0xb1),
        out(0x82, 1, 10),
        out(0x83, 1, 4),
        vector(0x41),
        out(0x84, 1, 3),
        halt(),
    ])
}

/// The client resets the machine while the guest is at the highest level: SDM 11.4.7.1 "Local APIC State After
/// Power-Up or Reset".
fn reset_lowers_it() -> Outcome {
    let machine = machine(guest!(64:
        "mov rbx, cr8", "mov eax, 15", "mov cr8, rax", "sti", "nop", "out 0x80, al", "hlt"))?;
    machine.expect(&[out(0x80, 1, 15)])?;
    machine.vcpu.interrupt(0x71)?;
    machine.expect(&[halt()])?;
    machine.vcpu.set_regs(&modes::registers(Mode::Real))?;
    prepare(&machine.vcpu, Mode::Long)?;
    machine.set(|state| state.rbx = 1)?;
    machine.expect(&[out(0x80, 1, 15), halt()])?;
    same!(machine.regs()?.rbx, 0, "CR8 after the reset");
    Ok(())
}

/// A debugger of the client hears of the MOV to CR8 that lets a vector in like of any other.
fn step_over_a_lowering() -> Outcome {
    let machine = machine(guest!(64:
        "mov eax, 6", "mov cr8, rax", "sti", "nop", "out 0x80, al",
        "nop", "mov eax, 5", "mov cr8, rax", "nop", "nop", "hlt"))?;
    machine.expect(&[out(0x80, 1, 6)])?;
    machine.vcpu.interrupt(0x61)?;
    machine.vcpu.set_debug(3, [0; 8])?;
    let rip = machine.regs()?.rip;
    let debug = |rip| Step {
        exit: Exit::Debug { rip, dr6: 1 << 14 },
        answer: Vec::new(),
    };
    // Some of the client's steps may be of OUT itself.
    let first = machine.run()?;
    let start = if first == debug(rip).exit {
        rip
    } else {
        rip + 1
    };
    if start == rip {
        machine.expect(&[debug(rip + 1)])?;
    } else {
        same!(first, debug(rip + 1).exit, "the step over NOP");
    }
    machine.expect(&[debug(rip + 6), debug(rip + 10)])?;
    machine.vcpu.set_debug(0, [0; 8])?;
    machine.expect(&[vector(0x61)])?;
    same!(machine.stack(1)?, rip + 10, "RIP of the frame");
    machine.expect(&[halt()])
}

/// A guest that takes each new level from a port, and tells of it.
macro_rules! follows_a_port {
    () => {
        guest!(64: "sti", "2: in al, 0x70", "movzx eax, al", "mov cr8, rax", "out 0x80, al", "jmp 2b")
    };
}

/// Its next level; the client queues `vectors` while the IN waits. What has to come of it, in order.
fn follow(
    vcpu: &Vcpu,
    ram: &crate::ram::Ram,
    model: &mut Model,
    class: u8,
    vectors: &[u8],
) -> Outcome {
    let access = input(0x70, 1, class.into());
    expect(vcpu, Mode::Long, ram, std::slice::from_ref(&access))?;
    for number in vectors {
        vcpu.interrupt((*number).into())?;
        model.waiting[usize::from(*number)] = true;
    }
    answer(vcpu, &access);
    let mut steps: Vec<Step> = model.deliverable();
    model.class = class;
    steps.extend(model.deliverable());
    steps.push(out(0x80, 1, class.into()));
    for (index, step) in steps.iter().enumerate() {
        let exit = run(vcpu, Mode::Long, ram)?;
        same!(exit, step.exit, "exit {index} on the way to class {class}");
    }
    Ok(())
}

/// What waits, and the level.
struct Model {
    class: u8,
    waiting: [bool; 256],
}

impl Model {
    fn new() -> Self {
        Self {
            class: 0,
            waiting: [false; 256],
        }
    }

    /// Takes out what the level lets in, highest first.
    fn deliverable(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        for number in (0x20..=255_u8).rev().filter(|v| v >> 4 > self.class) {
            if std::mem::take(&mut self.waiting[usize::from(number)]) {
                steps.push(vector(number));
            }
        }
        steps
    }
}

/// One follows its own levels while the other stays at the highest, in two threads.
fn two_processors_have_two_levels() -> Outcome {
    let machine = machine(follows_a_port!())?;
    let two = machine.vm.create_vcpu(1)?;
    prepare(&two, Mode::Long)?;
    let mut state = two.regs()?;
    state.rsp -= 0x800;
    two.set_regs(&state)?;
    let follow_levels = |vcpu: &Vcpu, levels: [u8; 4]| {
        let mut model = Model::new();
        for (round, class) in (0..40_u8).zip(levels.into_iter().cycle()) {
            let number = 0x20 + round.wrapping_mul(37) % 0xe0;
            follow(vcpu, &machine.ram, &mut model, class, &[number])
                .with_context(|| format!("round {round}"))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let one = scope.spawn(|| follow_levels(&machine.vcpu, [15, 9, 3, 12]));
        let two = scope.spawn(|| follow_levels(&two, [2, 15, 15, 15]));
        for (name, handle) in [("vCPU 0", one), ("vCPU 1", two)] {
            let result: Outcome = handle.join().map_err(|_| anyhow!("a thread panicked"))?;
            result.context(name)?;
        }
        Ok(())
    })
}

/// Levels and vectors in any order, against a model.
fn any_order() -> Outcome {
    let machine = machine(follows_a_port!())?;
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 33) % below
    };
    let mut model = Model::new();
    for round in 0..400 {
        let vectors: Vec<u8> = (0..random(4)).map(|_| 0x20 + random(0xe0) as u8).collect();
        let class = random(16) as u8;
        follow(&machine.vcpu, &machine.ram, &mut model, class, &vectors)
            .with_context(|| format!("round {round}"))?;
    }
    Ok(())
}
