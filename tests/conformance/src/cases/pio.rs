//! IN and OUT: sizes, ports, what an IN leaves of RAX, and what a client may do in between.

use super::{Case, Outcome};
use crate::exit::{halt, input, out};
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;

pub const CASES: &[Case] = &[
    case!(out_sizes in ALL),
    case!(out_immediate_port in SIZES),
    case!(out_highest_port in SIZES),
    case!(in_sizes in ALL),
    case!(in_keeps_the_rest_of_rax in LONG),
    case!(many_in_a_row in SIZES),
    case!(registers_between in LONG),
    case!(client_moves_on_after_in in SIZES),
    case!(client_spoils_the_tunnel in SIZES),
    case!(flags_survive in SIZES),
];

fn out_sizes(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0x12345678",
        "mov dx, 0x3f8",
        "out dx, al",
        "out dx, ax",
        "out dx, eax",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.expect(&[
        out(0x3f8, 1, 0x78),
        out(0x3f8, 2, 0x5678),
        out(0x3f8, 4, 0x12345678),
        halt(),
    ])
}

fn out_immediate_port(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0xa1b2c3d4",
        "out 0x80, al",
        "out 0xff, ax",
        "out 0x00, eax",
        "hlt"
    );
    Machine::new(mode, code)?.expect(&[
        out(0x80, 1, 0xd4),
        out(0xff, 2, 0xc3d4),
        out(0, 4, 0xa1b2c3d4),
        halt(),
    ])
}

fn out_highest_port(mode: Mode) -> Outcome {
    let code = guest!("mov dx, 0xffff", "mov al, 7", "out dx, al", "hlt");
    Machine::new(mode, code)?.expect(&[out(0xffff, 1, 7), halt()])
}

fn in_sizes(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0x11223344",
        "mov dx, 0x1234",
        "in al, dx",
        "mov ebx, eax",
        "in ax, dx",
        "mov ecx, eax",
        "in eax, dx",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.expect(&[
        input(0x1234, 1, 0xa5),
        input(0x1234, 2, 0xbeef),
        input(0x1234, 4, 0xcafe_f00d),
        halt(),
    ])?;
    let state = machine.regs()?;
    same!(state.rbx, 0x112233a5, "IN AL");
    same!(state.rcx, 0x1122beef, "IN AX");
    same!(state.rax, 0xcafe_f00d, "IN EAX");
    Ok(())
}

fn in_keeps_the_rest_of_rax(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov rax, -1", "in al, 0x10", "mov rbx, rax",
        "mov rax, -1", "in ax, 0x10", "mov rcx, rax",
        "mov rax, -1", "in eax, 0x10", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[
        input(0x10, 1, 0),
        input(0x10, 2, 0),
        input(0x10, 4, 0),
        halt(),
    ])?;
    let state = machine.regs()?;
    same!(state.rbx, 0xffff_ffff_ffff_ff00, "IN AL");
    same!(state.rcx, 0xffff_ffff_ffff_0000, "IN AX");
    same!(state.rax, 0, "IN EAX clears the upper half");
    Ok(())
}

fn many_in_a_row(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 50",
        "2: mov al, cl",
        "out 0x40, al",
        "in al, 0x41",
        "add ebx, eax",
        "dec ecx",
        "jnz 2b",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let mut steps = Vec::new();
    for count in (1..=50).rev() {
        steps.push(out(0x40, 1, count));
        steps.push(input(0x41, 1, 2 * count));
    }
    steps.push(halt());
    machine.expect(&steps)?;
    same!(machine.regs()?.rbx, 50 * 51, "sum of what was read");
    Ok(())
}

/// A client may look at the registers between an exit and the next RUN.
fn registers_between(mode: Mode) -> Outcome {
    let code = guest!(64: "mov rbx, 0x1122334455667788", "in al, 0x70", "hlt");
    let machine = Machine::new(mode, code)?;
    let wanted = input(0x70, 1, 0x42);
    machine.expect(std::slice::from_ref(&wanted))?;
    let state = machine.regs()?;
    same!(state.rbx, 0x1122334455667788, "RBX at the exit");
    machine.answer(&wanted);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax & 0xff, 0x42, "AL");
    Ok(())
}

/// SET_REGS with another RIP gives up the IN: its answer changes nothing.
fn client_moves_on_after_in(mode: Mode) -> Outcome {
    let code = guest!("in al, 0x70", "hlt", "nop", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[input(0x70, 1, 0x99)])?;
    machine.set(|state| {
        state.rip = mode.entry() + 3;
        state.rax = 0x1111;
    })?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(state.rip, mode.entry() + 5, "RIP");
    same!(state.rax, 0x1111, "RAX");
    Ok(())
}

/// What the client writes over the description of an IN does not change how it completes.
fn client_spoils_the_tunnel(mode: Mode) -> Outcome {
    let code = guest!("mov eax, 0x11223344", "in al, 0x70", "hlt");
    for byte in [0, 0x01, 0x40, 0x7f, 0xff] {
        let machine = Machine::new(mode, code)?;
        machine.expect(&[input(0x70, 1, 0x55)])?;
        machine.vcpu.tunnel.spoil_io(byte);
        machine.expect(&[halt()])?;
        same!(
            machine.regs()?.rax,
            0x11223355,
            "RAX, tunnel full of {byte:#x}"
        );
    }
    Ok(())
}

fn flags_survive(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0xffffffff",
        "add eax, 1",
        "out 0x80, al",
        "in al, 0x80",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.expect(&[out(0x80, 1, 0), input(0x80, 1, 0), halt()])?;
    // CF, PF, AF, ZF and the bit that is always set.
    same!(machine.regs()?.rflags & 0x8d5, 0x55, "flags");
    Ok(())
}
