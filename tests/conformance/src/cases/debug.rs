//! VCPU_DEBUG, debug registers, and the trap flag.

use super::{Case, Outcome};
use crate::exit::{Exit, fault, halt, out, read, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{CODE, DATA, DEVICE, Mode};
use crate::watchpoint::Watched;

pub const CASES: &[Case] = &[
    case!(single_step in SIZES),
    case!(step_over_sti in SIZES),
    case!(step_over_mov_ss in WIDE),
    case!(step_over_io in SIZES),
    case!(step_over_mmio in SIZES),
    case!(step_over_rep in SIZES),
    case!(step_over_cpuid_and_msr in WIDE),
    case!(step_hides_nothing_in_flags in SIZES),
    case!(step_off in SIZES),
    case!(software_breakpoint in SIZES),
    case!(breakpoint_of_the_guest in SIZES),
    case!(hardware_breakpoint in SIZES),
    case!(hardware_watchpoint in SIZES),
    case!(hardware_watchpoint_on_a_device in SIZES),
    case!(debugging_leaves_guest_registers in LONG),
    case!(set_regs_leaves_debug_registers_while_debugging in LONG),
    case!(breakpoints_end_with_the_next_request in SIZES),
    case!(guest_trap_flag in ALL),
    case!(guest_trap_flag_over_sti in ALL),
    case!(guest_breakpoint_register in SIZES),
    case!(breakpoint_set_by_the_guest in SIZES),
    case!(guest_watchpoint in SIZES),
    case!(guest_watchpoint_on_a_device in SIZES),
    case!(guest_watchpoint_in_a_repeated_move in SIZES),
    case!(guest_general_detect in WIDE),
    case!(dr4_with_de in WIDE),
    case!(dr6_upper_half in LONG),
    case!(dr_in_user_mode in WIDE),
    case!(host_debug_registers in LONG),
];

const ENABLE: u32 = 1;
const STEP: u32 = 2;
const SOFTWARE: u32 = 4;
const HARDWARE: u32 = 8;
const BS: u64 = 1 << 14;

/// Offsets from the code's start at which DEBUG exits say RIP is, until HLT.
fn steps(machine: &Machine) -> anyhow::Result<Vec<u64>> {
    let mut seen = Vec::new();
    loop {
        match machine.run()? {
            Exit::Debug { rip, dr6 } => {
                same!(dr6 & BS, BS, "DR6.BS");
                same!(rip, machine.regs()?.rip, "RIP by GET_REGS");
                seen.push(rip - machine.mode.entry());
            }
            Exit::Halt => return Ok(seen),
            other => anyhow::bail!("{other:?} after {seen:?}"),
        }
        anyhow::ensure!(seen.len() < 100, "no end: {seen:?}");
    }
}

fn stepping(mode: Mode, code: crate::code::Code) -> anyhow::Result<Machine> {
    let machine = Machine::new(mode, code)?;
    machine.vcpu.set_debug(ENABLE | STEP, [0; 8])?;
    Ok(machine)
}

fn single_step(mode: Mode) -> Outcome {
    let code = guest!("nop", "mov al, 1", "jmp 2f", "ud2", "2: nop", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.dr7 = 0x500)?;
    machine.vcpu.set_debug(ENABLE | STEP, [0; 8])?;
    let seen = steps(&machine)?;
    same!(seen.get(..4), Some(&[1, 3, 7, 8][..]), "RIPs");
    // The guest's is not in force.
    let (told, own) = (machine.vcpu.tunnel.debug().2, machine.regs()?.dr7);
    same!(
        (told, own),
        (0x400, 0x500),
        "DR7 in the tunnel, the guest's"
    );
    Ok(())
}

/// The step after STI and the one in its shadow both come, and the guest lives.
fn step_over_sti(mode: Mode) -> Outcome {
    let machine = stepping(mode, guest!("sti", "nop", "nop", "hlt"))?;
    let seen = steps(&machine)?;
    same!(seen.get(..3), Some(&[1, 2, 3][..]), "RIPs");
    Ok(())
}

fn step_over_mov_ss(mode: Mode) -> Outcome {
    let machine = stepping(
        mode,
        guest!("mov eax, ss", "mov ss, eax", "nop", "nop", "hlt"),
    )?;
    let seen = steps(&machine)?;
    anyhow::ensure!(
        seen.starts_with(&[2, 4, 5, 6]) || seen.starts_with(&[2, 5, 6]),
        "RIPs {seen:?}"
    );
    Ok(())
}

fn step_over_io(mode: Mode) -> Outcome {
    let machine = stepping(mode, guest!("out 0x80, al", "nop", "hlt"))?;
    machine.expect(&[out(0x80, 1, 0)])?;
    let seen = steps(&machine)?;
    same!(seen.get(..2), Some(&[2, 3][..]), "RIPs");
    Ok(())
}

fn step_over_mmio(mode: Mode) -> Outcome {
    let machine = stepping(mode, guest!("nop", "mov al, [edi]", "nop", "hlt"))?;
    machine.set(|state| state.rdi = DEVICE)?;
    let length = if mode == Mode::Protected { 2 } else { 3 };
    let at = |rip: u64| Exit::Debug {
        rip: mode.entry() + rip,
        dr6: BS,
    };
    same!(machine.run()?, at(1), "after NOP");
    machine.expect(&[read(DEVICE, 1, 7)])?;
    same!(machine.run()?, at(1 + length), "after the access");
    same!(machine.run()?, at(2 + length), "after NOP");
    Ok(())
}

/// One stop for each element or one for all: in either case the count and the memory are right.
fn step_over_rep(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 3",
        "rep stosb byte ptr es:[edi], al",
        "nop",
        "hlt"
    );
    let machine = stepping(mode, code)?;
    machine.set(|state| {
        state.rdi = DATA;
        state.rax = 0x55;
    })?;
    let seen = steps(&machine)?;
    same!(
        machine.ram.read(DATA, 4),
        vec![0x55, 0x55, 0x55, 0],
        "memory"
    );
    anyhow::ensure!((3..=8).contains(&seen.len()), "stops {seen:?}");
    Ok(())
}

fn step_over_cpuid_and_msr(mode: Mode) -> Outcome {
    let code = guest!(
        "xor eax, eax",
        "cpuid",
        "mov ecx, 0x1b",
        "rdmsr",
        "nop",
        "hlt"
    );
    let seen = steps(&stepping(mode, code)?)?;
    same!(seen.get(..5), Some(&[2, 4, 9, 11, 12][..]), "RIPs");
    Ok(())
}

/// PUSHF while stepped shows no trap flag of the client's.
fn step_hides_nothing_in_flags(mode: Mode) -> Outcome {
    let machine = stepping(mode, guest!("pushf", "nop", "hlt"))?;
    let seen = steps(&machine)?;
    let length = if mode == Mode::Protected { 2 } else { 1 };
    same!(seen.get(..2), Some(&[length, length + 1][..]), "RIPs");
    same!(machine.stack(0)? & 0x100, 0, "TF pushed");
    same!(machine.regs()?.rflags & 0x100, 0, "TF");
    Ok(())
}

fn step_off(mode: Mode) -> Outcome {
    let machine = stepping(mode, guest!("nop", "nop", "nop", "hlt"))?;
    anyhow::ensure!(matches!(machine.run()?, Exit::Debug { .. }), "no step");
    // Without ENABLE the rest of the control word is nothing.
    machine.vcpu.set_debug(STEP, [0; 8])?;
    machine.expect(&[halt()])
}

fn software_breakpoint(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("nop", "int3", "nop", "hlt"))?;
    machine.vcpu.set_debug(ENABLE | SOFTWARE, [0; 8])?;
    let wanted = Exit::Debug {
        rip: mode.entry() + 1,
        dr6: 0,
    };
    same!(machine.run()?, wanted, "exit: RIP is on the INT3");
    same!(machine.vcpu.tunnel.debug().2, 0, "DR7 in the tunnel");
    // A debugger puts the instruction back and goes on.
    machine.ram.write(CODE + 1, &[0x90]);
    machine.expect(&[halt()])
}

/// Without the client's wish, INT3 is the guest's.
fn breakpoint_of_the_guest(mode: Mode) -> Outcome {
    for control in [0, SOFTWARE, ENABLE, ENABLE | HARDWARE] {
        let machine = Machine::new(mode, guest!("int3", "hlt"))?;
        machine.vcpu.set_debug(control, [0; 8])?;
        machine.expect(&[fault(3)])?;
    }
    Ok(())
}

fn hardware_breakpoint(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("nop", "nop", "mov bl, 1", "hlt"))?;
    let mut dr = [0; 8];
    dr[1] = CODE + 2;
    dr[7] = 1 << 3;
    machine.set(|state| state.dr7 = 0x500)?;
    machine.vcpu.set_debug(ENABLE | HARDWARE, dr)?;
    let exit = machine.run()?;
    let Exit::Debug { rip, dr6 } = exit else {
        anyhow::bail!("{exit:?}");
    };
    same!((rip, dr6 & 0xf), (mode.entry() + 2, 2), "RIP and B1");
    let told = machine.vcpu.tunnel.debug().2;
    same!(told, 0x408, "DR7: the client's, with its fixed bit");
    same!(machine.regs()?.dr7, 0x500, "DR7: the guest's");
    machine.vcpu.set_debug(0, [0; 8])?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rbx, 1, "BL");
    Ok(())
}

fn hardware_watchpoint(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov al, [edi]", "mov [edi], al", "nop", "hlt"))?;
    let mut dr = [0; 8];
    dr[0] = DATA;
    // Writes of one byte.
    dr[7] = 1 << 1 | 1 << 16;
    machine.vcpu.set_debug(ENABLE | HARDWARE, dr)?;
    machine.set(|state| state.rdi = DATA)?;
    let length = if mode == Mode::Protected { 2 } else { 3 };
    let exit = machine.run()?;
    let Exit::Debug { rip, dr6 } = exit else {
        anyhow::bail!("{exit:?}");
    };
    same!(
        (rip, dr6 & 0xf),
        (mode.entry() + 2 * length, 1),
        "RIP and B0"
    );
    machine.expect(&[halt()])
}

/// The driver carries the access out, and the trap comes all the same, behind the instruction.
fn hardware_watchpoint_on_a_device(mode: Mode) -> Outcome {
    let code = guest!(
        "mov al, [edi]",
        "mov [edi], al",
        "inc byte ptr [edi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let mut dr = [0; 8];
    dr[2] = DEVICE;
    // Writes of one byte.
    dr[7] = 1 << 4 | 1 << 24;
    machine.vcpu.set_debug(ENABLE | HARDWARE, dr)?;
    machine.set(|state| state.rdi = DEVICE)?;
    let length = if mode == Mode::Protected { 2 } else { 3 };
    let accesses = [
        vec![read(DEVICE, 1, 7), write(DEVICE, 1, 7)],
        vec![read(DEVICE, 1, 8), write(DEVICE, 1, 9)],
    ];
    for (count, steps) in (2..).zip(accesses) {
        machine.expect(&steps)?;
        let exit = machine.run()?;
        let Exit::Debug { rip, dr6 } = exit else {
            anyhow::bail!("{exit:?}");
        };
        same!(
            (rip, dr6 & 0xf),
            (mode.entry() + count * length, 4),
            "RIP and B2"
        );
    }
    machine.expect(&[halt()])
}

fn debugging_leaves_guest_registers(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!(64: "mov rax, dr0", "mov rbx, dr7", "hlt"))?;
    machine.set(|state| {
        state.dr0 = 0x1234;
        state.dr7 = 0x400;
    })?;
    let mut dr = [0; 8];
    dr[0] = 0x5678;
    dr[7] = 2;
    machine.vcpu.set_debug(ENABLE | HARDWARE, dr)?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(
        (state.rax, state.rbx),
        (0x1234, 0x400),
        "DR0 and DR7 of the guest"
    );
    Ok(())
}

/// A client that sets all registers to the values it knows would end what its debugger has set.
fn set_regs_leaves_debug_registers_while_debugging(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!(64: "nop", "mov rbx, dr0", "hlt"))?;
    machine.set(|state| state.dr0 = 0x1234)?;
    let mut dr = [0; 8];
    dr[0] = CODE + 1;
    dr[7] = 2;
    machine.vcpu.set_debug(ENABLE | HARDWARE, dr)?;
    machine.set(|state| {
        state.dr0 = 0x9999;
        state.dr7 = 0x400;
    })?;
    let exit = machine.run()?;
    let Exit::Debug { rip, .. } = exit else {
        anyhow::bail!("{exit:?}");
    };
    same!(rip, mode.entry() + 1, "RIP at the client's breakpoint");
    machine.vcpu.set_debug(0, [0; 8])?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rbx, 0x1234, "DR0 of the guest");
    machine.set(|state| state.dr0 = 0x9999)?;
    same!(machine.regs()?.dr0, 0x9999, "DR0 without debugging");
    Ok(())
}

/// VCPU_DEBUG is the whole of what is asked for: without USE_HW_BP no breakpoint stays.
fn breakpoints_end_with_the_next_request(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("nop", "nop", "hlt"))?;
    let mut dr = [0; 8];
    dr[0] = CODE + 1;
    dr[7] = 2;
    machine.vcpu.set_debug(ENABLE | HARDWARE, dr)?;
    machine.vcpu.set_debug(ENABLE | SOFTWARE, dr)?;
    machine.expect(&[halt()])
}

fn guest_trap_flag(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("nop", "nop", "hlt"))?;
    machine.set(|state| state.rflags |= 0x100)?;
    machine.expect(&[fault(1)])?;
    same!(
        machine.frame_rip(false)?,
        mode.entry() + 1,
        "RIP in the frame"
    );
    let state = machine.regs()?;
    same!(state.dr6 & BS, BS, "DR6.BS");
    same!(state.rflags & 0x100, 0, "TF in the handler");
    Ok(())
}

/// The trap behind STI comes in its shadow; the guest's handler gets it, or the client, and both go on.
fn guest_trap_flag_over_sti(mode: Mode) -> Outcome {
    let code = || guest!("sti", "nop", "nop", "hlt");
    let machine = Machine::new(mode, code())?;
    machine.set(|state| state.rflags |= 0x100)?;
    machine.expect(&[fault(1)])?;
    same!(
        machine.frame_rip(false)?,
        mode.entry() + 1,
        "RIP in the frame"
    );
    let machine = Machine::new(mode, code())?;
    machine.set(|state| state.rflags |= 0x100)?;
    machine.vcpu.set_debug(ENABLE | HARDWARE, [0; 8])?;
    let seen = steps(&machine)?;
    same!(seen.get(..3), Some(&[1, 2, 3][..]), "RIPs");
    Ok(())
}

fn guest_breakpoint_register(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("nop", "nop", "nop", "hlt"))?;
    machine.set(|state| {
        state.dr2 = CODE + 2;
        state.dr7 = 0x400 | 1 << 4;
        // Of an earlier one, which goes.
        state.dr6 = 0xffff_0ff1;
    })?;
    machine.expect(&[fault(1)])?;
    same!(
        machine.frame_rip(false)?,
        mode.entry() + 2,
        "RIP in the frame"
    );
    same!(machine.regs()?.dr6 & 0xf, 4, "DR6");
    Ok(())
}

/// The same by its own MOV to DR0 and DR7.
fn breakpoint_set_by_the_guest(mode: Mode) -> Outcome {
    let code = crate::code::Code {
        bits16: crate::blob!(
            ".code16",
            "mov dr0, esi",
            "mov eax, 0x402",
            "mov dr7, eax",
            "jmp si"
        ),
        bits32: crate::blob!(
            ".code32",
            "mov dr0, esi",
            "mov eax, 0x402",
            "mov dr7, eax",
            "jmp esi"
        ),
        bits64: crate::blob!(
            ".code64",
            "mov dr0, rsi",
            "mov eax, 0x402",
            "mov dr7, rax",
            "jmp rsi"
        ),
    };
    let machine = Machine::new(mode, code)?;
    // The low half of the linear address is the offset in real mode's segment.
    machine.ram.write(CODE + 0x20, &[0xf4]);
    machine.set(|state| state.rsi = CODE + 0x20)?;
    machine.expect(&[fault(1)])?;
    same!(
        machine.frame_rip(false)?,
        mode.entry() + 0x20,
        "RIP in the frame"
    );
    same!(machine.regs()?.dr6 & 0xf, 1, "DR6");
    Ok(())
}

fn guest_watchpoint(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov [edi], eax", "nop", "hlt"))?;
    machine.set(|state| {
        state.rdi = DATA;
        state.dr3 = DATA;
        // L3, writes, four bytes.
        state.dr7 = 0x400 | 1 << 6 | 0xd << 28;
    })?;
    machine.expect(&[fault(1)])?;
    same!(machine.regs()?.dr6 & 0xf, 8, "DR6");
    Ok(())
}

fn guest_watchpoint_on_a_device(mode: Mode) -> Outcome {
    // R/W and LEN of DR1: reads too, four bytes; writes, two bytes; disabled.
    for (control, traps) in [
        (0xf << 20 | 4, true),
        (5 << 20 | 4, false),
        (0xf << 20, false),
    ] {
        let machine = Machine::new(mode, guest!("mov eax, [edi]", "nop", "hlt"))?;
        machine.set(|state| {
            state.rdi = DEVICE + 1;
            state.dr1 = DEVICE + 4;
            state.dr7 = 0x400 | control;
        })?;
        machine.expect(&[read(DEVICE + 1, 4, 7)])?;
        if !traps {
            machine.expect(&[halt()])?;
            continue;
        }
        machine.expect(&[fault(1)])?;
        let length = if mode == Mode::Protected { 2 } else { 4 };
        let length = if mode == Mode::Long { 3 } else { length };
        same!(
            machine.frame_rip(false)?,
            mode.entry() + length,
            "RIP in the frame"
        );
        same!(machine.regs()?.dr6 & 0xf, 2, "DR6");
    }
    Ok(())
}

/// The trap comes behind the iteration that met it.
fn guest_watchpoint_in_a_repeated_move(mode: Mode) -> Outcome {
    let code = guest!("rep movsb byte ptr es:[edi], byte ptr [esi]", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.rsi = DATA;
        state.rdi = DEVICE;
        state.rcx = 5;
        state.dr0 = DATA + 2;
        state.dr7 = 0x400 | 3 << 16 | 1;
    })?;
    machine.expect(&[
        write(DEVICE, 1, 0),
        write(DEVICE + 1, 1, 0),
        write(DEVICE + 2, 1, 0),
        fault(1),
    ])?;
    let state = machine.regs()?;
    same!((state.rcx, state.dr6 & 0xf), (2, 1), "ECX and DR6");
    same!(machine.frame_rip(false)?, mode.entry(), "RIP in the frame");
    Ok(())
}

/// DR7.GD: #DB in front of the access, DR6.BD, and GD is clear afterwards.
fn guest_general_detect(mode: Mode) -> Outcome {
    let code = crate::code::Code {
        bits16: &[],
        bits32: crate::blob!(".code32", "mov eax, dr0", "hlt"),
        bits64: crate::blob!(".code64", "mov rax, dr0", "hlt"),
    };
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.dr7 = 0x400 | 1 << 13)?;
    machine.expect(&[fault(1)])?;
    same!(machine.frame_rip(false)?, mode.entry(), "RIP in the frame");
    let state = machine.regs()?;
    same!(state.dr6 & 1 << 13, 1 << 13, "DR6.BD");
    same!(state.dr7 & 1 << 13, 0, "DR7.GD");
    Ok(())
}

/// DR4 is DR6, unless CR4.DE makes it undefined.
fn dr4_with_de(mode: Mode) -> Outcome {
    let code = crate::code::Code {
        bits16: &[],
        bits32: &[0x0f, 0x21, 0xe0, 0xf4],
        bits64: &[0x0f, 0x21, 0xe0, 0xf4],
    };
    let machine = Machine::new(mode, code)?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0xffff_0ff0, "DR4 without CR4.DE");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.cr4 |= 8)?;
    machine.expect(&[fault(6)])
}

fn dr6_upper_half(mode: Mode) -> Outcome {
    for code in [
        guest!(64: "mov rax, 0x100000000", "mov dr6, rax", "hlt"),
        guest!(64: "mov rax, 0x100000000", "mov dr7, rax", "hlt"),
    ] {
        Machine::new(mode, code)?.expect(&[crate::exit::fault_code(13, 0)])?;
    }
    Ok(())
}

fn dr_in_user_mode(mode: Mode) -> Outcome {
    let code = crate::code::Code {
        bits16: &[],
        bits32: crate::blob!(".code32", "mov eax, dr7", "hlt"),
        bits64: crate::blob!(".code64", "mov rax, dr7", "hlt"),
    };
    let machine = Machine::new(mode, code)?;
    machine.set(|state| super::enter_user(mode, state))?;
    machine.expect(&[crate::exit::fault_code(13, 0)])
}

/// A breakpoint of the guest's is none of this process's, which executes the same linear address; and one of this
/// process's still works when a guest has run, with breakpoints of its own or without.
fn host_debug_registers(mode: Mode) -> Outcome {
    let here = host_debug_registers as fn(Mode) -> Outcome as usize as u64;
    let mut watched = Watched::new()?;
    same!(watched.write()?, 1, "writes seen before");
    for (seen, breakpoints) in [(2, 0x403), (3, 0x400), (4, 0x4ff)] {
        let machine = Machine::new(mode, guest!(64: "nop", "hlt"))?;
        machine.set(|state| {
            [state.dr0, state.dr1, state.dr2, state.dr3] = [here; 4];
            state.dr7 = breakpoints;
        })?;
        machine.expect(&[halt()])?;
        same!(
            watched.write()?,
            seen,
            "writes seen after a guest with DR7 {breakpoints:#x}"
        );
    }
    // Would be a SIGTRAP.
    Machine::new(mode, guest!(64: "hlt"))?.expect(&[halt()])
}
