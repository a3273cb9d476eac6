//! Events whose delivery writes to ROM: the accessed bit of a code descriptor, or the frame. ROM forgets the write, and
//! the handler runs. Each event is delivered by the processor too, with the same descriptors in RAM, and all must be
//! the same.

use super::emulated::gdt_in_rom;
use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::{Step, fault, fault_code, halt, out, vector, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{Mode, selector};

pub const CASES: &[Case] = &[
    case!(interrupt in PROTECTED),
    case!(fault_without_a_code in PROTECTED),
    case!(fault_with_a_code in PROTECTED),
    case!(page_fault in PAGING),
    case!(software_interrupt in PROTECTED),
    case!(breakpoint in PROTECTED),
    case!(trap_gate in PROTECTED),
    case!(stack_in_rom in WIDE),
    case!(the_level_changes in WIDE),
];

const ROM: u64 = 0x5_1000;
const RF: u64 = 1 << 16;

fn code_selector(mode: Mode) -> u16 {
    match mode {
        Mode::Long => selector::CODE64,
        _ => selector::CODE32,
    }
}

/// What the handler finds: registers, and the frame with what is above it.
fn found(machine: &Machine) -> anyhow::Result<(Vec<u64>, Vec<u64>)> {
    let state = machine.regs()?;
    let registers = vec![
        state.rip,
        state.rsp,
        state.rflags & !RF,
        state.cs.selector.into(),
        state.cs.base,
        state.cs.limit.into(),
        state.cs.ar.into(),
        state.ss.selector.into(),
        state.cr2,
    ];
    let mut frame = Vec::new();
    for index in 0..7 {
        // RF in the image of RFLAGS: Bochs sets it for no fault.
        let slot = machine.stack(index)?;
        let is_flags = slot & 0xffff_ffff & !(RF | 0x200) == 2;
        frame.push(if is_flags { slot & !RF } else { slot });
    }
    Ok((registers, frame))
}

/// Runs to the handler of an event, by the processor and over ROM.
fn compare(
    mode: Mode,
    code: Code,
    before: impl Fn(&Machine) -> Outcome,
    steps: &[Step],
) -> anyhow::Result<Machine> {
    let processor = Machine::new(mode, code)?;
    before(&processor)?;
    processor.expect(steps)?;
    let wanted = found(&processor)?;
    drop(processor);
    let machine = Machine::new(mode, code)?;
    gdt_in_rom(&machine, &[code_selector(mode)])?;
    before(&machine)?;
    machine.expect(steps)?;
    same!(found(&machine)?, wanted, "registers and frame over ROM");
    Ok(machine)
}

fn nothing(_: &Machine) -> Outcome {
    Ok(())
}

/// And back: the IRET loads the descriptor too.
fn interrupt(mode: Mode) -> Outcome {
    let code = guest!("sti", "nop", "out 0x80, al", "mov bl, 7", "hlt");
    let queue = |machine: &Machine| {
        machine.expect(&[out(0x80, 1, 0)])?;
        machine.vcpu.interrupt(0x41)?;
        Ok(())
    };
    let machine = compare(mode, code, queue, &[vector(0x41)])?;
    same!(machine.regs()?.rflags & 0x200, 0, "IF in the handler");
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rbx, 7, "BL");
    Ok(())
}

fn fault_without_a_code(mode: Mode) -> Outcome {
    // In 64-bit mode the frame is aligned to 16 bytes.
    compare(mode, guest!("push 5", "ud2"), nothing, &[fault(6)])?;
    Ok(())
}

fn fault_with_a_code(mode: Mode) -> Outcome {
    let code = guest!("mov eax, 0x70", "mov ds, eax", "hlt");
    compare(mode, code, nothing, &[fault_code(13, 0x70)])?;
    Ok(())
}

fn page_fault(mode: Mode) -> Outcome {
    let code = guest!("mov [edi], al", "hlt");
    let unmap = |machine: &Machine| {
        let (at, size) = machine.mode.page_entry(0x60);
        machine.ram.write(at, &[0; 8][..size]);
        machine.set(|state| state.rdi = 0x6_0123)
    };
    let machine = compare(mode, code, unmap, &[fault_code(14, 2)])?;
    same!(machine.regs()?.cr2, 0x6_0123, "CR2");
    Ok(())
}

/// The frame has the next instruction.
fn software_interrupt(mode: Mode) -> Outcome {
    let code = guest!("int 0x66", "mov bl, 7", "hlt");
    let machine = compare(mode, code, nothing, &[vector(0x66)])?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rbx, 7, "BL");
    Ok(())
}

fn breakpoint(mode: Mode) -> Outcome {
    compare(mode, guest!("nop", "int3", "hlt"), nothing, &[fault(3)])?;
    Ok(())
}

/// It leaves IF.
fn trap_gate(mode: Mode) -> Outcome {
    let set = |machine: &Machine| {
        let size = if machine.mode == Mode::Long { 16 } else { 8 };
        machine
            .ram
            .write(crate::modes::IDT + 0x66 * size + 5, &[0xef]);
        machine.set(|state| state.rflags |= 0x200)
    };
    let machine = compare(mode, guest!("int 0x66", "hlt"), set, &[vector(0x66)])?;
    same!(machine.regs()?.rflags & 0x200, 0x200, "IF in the handler");
    machine.expect(&[halt()])
}

/// The frame is gone. The handler's own PUSH is an access of the guest's, and the client hears of it.
fn stack_in_rom(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("int 0x66", "hlt"))?;
    let rom = machine.ram.address() + ROM;
    machine.vm.set_ram(ROM, 0x1000, 1, rom)?;
    let top = ROM + 0xf00;
    machine.set(|state| (state.rsp, state.rax) = (top, 0x1234))?;
    let slot = mode.slot() as u64;
    let slots = if mode == Mode::Long { 6 } else { 4 };
    let pushed = write(top - slots * slot, slot as u8, 0x1234);
    machine.expect(&[pushed, vector(0x66)])?;
    same!(
        machine.ram.read(ROM, 0x1000),
        vec![0; 0x1000],
        "the ROM's bytes"
    );
    Ok(())
}

/// A change of level is not done here: the guest ends, and nobody else.
fn the_level_changes(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("int 0x66", "hlt"))?;
    machine.set(|state| super::enter_user(mode, state))?;
    gdt_in_rom(&machine, &[code_selector(mode)])?;
    machine.expect(&[crate::exit::lost()])
}
