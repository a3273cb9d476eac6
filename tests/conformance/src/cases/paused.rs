//! `_exit_reason` = 8: finish what is open, then come back without entering the guest.

use super::{Case, Outcome};
use crate::exit::{Exit, halt, input, ins, out, paused, read, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, DEVICE, Mode};

pub const CASES: &[Case] = &[
    case!(nothing_open in SIZES),
    case!(finishes_an_in in SIZES),
    case!(finishes_an_mmio_read in SIZES),
    case!(finishes_an_mmio_write in SIZES),
    case!(goes_on_with_a_string in SIZES),
    case!(finishes_ins in SIZES),
    case!(read_modify_write_goes_on in SIZES),
    case!(is_not_sticky in SIZES),
    case!(keeps_interrupts in SIZES),
    case!(after_out in SIZES),
];

/// Asks for the pause, as a client does.
fn pause(machine: &Machine) {
    machine.vcpu.tunnel.set_exit_reason(abi::EXIT_REASON_PAUSE);
}

fn nothing_open(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov bl, 1", "hlt"))?;
    pause(&machine);
    machine.expect(&[paused()])?;
    let state = machine.regs()?;
    same!(
        (state.rip, state.rbx),
        (mode.entry(), 0),
        "nothing was executed"
    );
    Ok(())
}

fn finishes_an_in(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("in al, 0x70", "mov bl, al", "hlt"))?;
    machine.expect(&[input(0x70, 1, 0x5d)])?;
    pause(&machine);
    machine.expect(&[paused()])?;
    let state = machine.regs()?;
    same!(
        (state.rip, state.rax),
        (mode.entry() + 2, 0x5d),
        "RIP and AL"
    );
    same!(state.rbx, 0, "BL: the next instruction was not executed");
    machine.vcpu.tunnel.set_exit_reason(0);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rbx, 0x5d, "BL");
    Ok(())
}

fn finishes_an_mmio_read(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov eax, [edi]", "mov ebx, eax", "hlt"))?;
    machine.set(|state| state.rdi = DEVICE)?;
    machine.expect(&[read(DEVICE, 4, 0x1357)])?;
    pause(&machine);
    machine.expect(&[paused()])?;
    let state = machine.regs()?;
    same!((state.rax, state.rbx), (0x1357, 0), "EAX and EBX");
    anyhow::ensure!(state.rip > mode.entry(), "RIP has not moved");
    machine.vcpu.tunnel.set_exit_reason(0);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rbx, 0x1357, "EBX");
    Ok(())
}

fn finishes_an_mmio_write(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov [edi], eax", "hlt"))?;
    machine.set(|state| state.rdi = DEVICE)?;
    machine.expect(&[write(DEVICE, 4, 0)])?;
    pause(&machine);
    machine.expect(&[paused()])?;
    anyhow::ensure!(machine.regs()?.rip > mode.entry(), "RIP has not moved");
    machine.vcpu.tunnel.set_exit_reason(0);
    machine.expect(&[halt()])
}

/// A string to the device: PAUSED comes between elements or at the end; none is lost or doubled.
fn goes_on_with_a_string(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 4",
        "rep movsb byte ptr es:[edi], byte ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.write(DATA, &[1, 2, 3, 4]);
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rsi = DATA;
    })?;
    let mut seen = Vec::new();
    loop {
        match machine.run()? {
            Exit::Write {
                gpa,
                size: 1,
                value,
            } => {
                seen.push((gpa, value));
                pause(&machine);
            }
            Exit::Paused => machine.vcpu.tunnel.set_exit_reason(0),
            Exit::Halt => break,
            other => anyhow::bail!("{other:?}"),
        }
        anyhow::ensure!(seen.len() <= 4, "too many writes: {seen:x?}");
    }
    let wanted: Vec<(u64, u64)> = (0..4).map(|at| (DEVICE + at, at + 1)).collect();
    same!(seen, wanted, "writes");
    Ok(())
}

fn finishes_ins(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 3",
        "mov dx, 0x71",
        "rep insb byte ptr es:[edi], dx",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[ins(0x71, 1, &[7, 8, 9], 0)])?;
    pause(&machine);
    machine.expect(&[paused()])?;
    same!(machine.ram.read(DATA, 4), vec![7, 8, 9, 0], "memory");
    same!(machine.regs()?.rcx, 0, "ECX");
    machine.vcpu.tunnel.set_exit_reason(0);
    machine.expect(&[halt()])
}

/// Its second half is another exit; the pause comes when both are done.
fn read_modify_write_goes_on(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("add dword ptr [edi], 2", "hlt"))?;
    machine.set(|state| state.rdi = DEVICE)?;
    machine.expect(&[read(DEVICE, 4, 40)])?;
    pause(&machine);
    machine.expect(&[write(DEVICE, 4, 42)])?;
    pause(&machine);
    machine.expect(&[paused()])?;
    machine.vcpu.tunnel.set_exit_reason(0);
    machine.expect(&[halt()])
}

/// A pause that the client takes back is none.
fn is_not_sticky(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("out 0x80, al", "hlt"))?;
    pause(&machine);
    machine.expect(&[paused()])?;
    machine.vcpu.tunnel.set_exit_reason(0);
    machine.expect(&[out(0x80, 1, 0), halt()])
}

fn keeps_interrupts(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("sti", "nop", "in al, 0x70", "nop", "hlt"))?;
    machine.expect(&[input(0x70, 1, 3)])?;
    machine.vcpu.interrupt(0x52)?;
    pause(&machine);
    machine.expect(&[paused()])?;
    machine.vcpu.tunnel.set_exit_reason(0);
    machine.expect(&[crate::exit::vector(0x52), halt()])
}

fn after_out(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("out 0x80, al", "hlt"))?;
    machine.expect(&[out(0x80, 1, 0)])?;
    pause(&machine);
    machine.expect(&[paused()])?;
    same!(machine.regs()?.rip, mode.entry() + 2, "RIP");
    machine.vcpu.tunnel.set_exit_reason(0);
    machine.expect(&[halt()])
}
