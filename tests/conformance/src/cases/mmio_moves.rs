//! A MOV to or from a device, while the client has its access and when it is executed again.

use super::mmio::with;
use super::{Case, Outcome};
use crate::exit::{fault, halt, read, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{CODE, DATA, DEVICE, Mode};

pub const CASES: &[Case] = &[
    case!(waits_for_the_client in ALL),
    case!(client_writes_registers in SIZES),
    case!(code_that_rewrites_itself in ALL),
    case!(client_rewrites_the_code in ALL),
    case!(code_is_mapped_elsewhere in PAGING),
    case!(instruction_across_pages in ALL),
    case!(watched_device in SIZES),
    case!(many_pages in SIZES),
];

/// Bytes of `mov eax, [edi]` before its opcode.
const fn prefixes(mode: Mode) -> u64 {
    match mode {
        Mode::Real => 2,
        Mode::Long => 1,
        _ => 0,
    }
}

/// Until RUN is called again RIP is on the instruction and no register has changed.
fn waits_for_the_client(mode: Mode) -> Outcome {
    let code = guest!("mov eax, [edi]", "mov [edi], eax", "hlt");
    let machine = Machine::with_kernel_code(mode, code)?;
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rax = 0x55;
    })?;
    let access = read(DEVICE, 4, 0x1234);
    machine.expect(std::slice::from_ref(&access))?;
    let state = machine.regs()?;
    same!((state.rip, state.rax), (mode.entry(), 0x55), "RIP and EAX");
    machine.answer(&access);
    machine.expect(&[write(DEVICE, 4, 0x1234)])?;
    let length = prefixes(mode) + 2;
    let state = machine.regs()?;
    same!(state.rip, mode.entry() + length, "RIP at the second access");
    same!(state.rax, 0x1234, "EAX");
    machine.expect(&[halt()])
}

/// SET_REGS that leaves RIP alone: what it sets counts, and the access is not made again.
fn client_writes_registers(mode: Mode) -> Outcome {
    let machine = Machine::with_kernel_code(mode, guest!("mov al, [edi]", "mov ebx, eax", "hlt"))?;
    machine.set(|state| state.rdi = DEVICE)?;
    let access = read(DEVICE, 1, 0x42);
    machine.expect(std::slice::from_ref(&access))?;
    machine.set(|state| {
        state.rax = 0x1122_3344;
        state.rdx = 7;
    })?;
    machine.answer(&access);
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!((state.rbx, state.rdx), (0x1122_3342, 7), "EBX and EDX");
    Ok(())
}

/// At the same address a load, and then a store.
fn code_that_rewrites_itself(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 2",
        "2: mov eax, [edi]",
        "mov byte ptr [esi], 0x89",
        "dec ecx",
        "jnz 2b",
        "hlt"
    );
    let before = if mode == Mode::Real { 6 } else { 5 };
    let machine = Machine::with_kernel_code(mode, code)?;
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rsi = CODE + before + prefixes(mode);
    })?;
    machine.expect(&[read(DEVICE, 4, 0x1234), write(DEVICE, 4, 0x1234), halt()])
}

fn client_rewrites_the_code(mode: Mode) -> Outcome {
    let machine = Machine::with_kernel_code(mode, guest!("mov eax, [edi]", "hlt"))?;
    machine.set(|state| state.rdi = DEVICE)?;
    for (opcode, step) in [
        (0x8b, read(DEVICE, 4, 1)),
        (0x89, write(DEVICE, 4, 1)),
        (0x8a, read(DEVICE, 1, 2)),
        (0x88, write(DEVICE, 1, 2)),
        (0x8b, read(DEVICE, 4, 3)),
    ] {
        machine.ram.write(CODE + prefixes(mode), &[opcode]);
        machine.set(|state| state.rip = mode.entry())?;
        machine.expect(&[step, halt()])?;
    }
    same!(machine.regs()?.rax, 3, "EAX");
    Ok(())
}

/// The code's page is another one the second time.
fn code_is_mapped_elsewhere(mode: Mode) -> Outcome {
    let machine = Machine::with_kernel_code(mode, guest!("mov eax, [edi]", "hlt"))?;
    machine.set(|state| state.rdi = DEVICE)?;
    machine.expect(&[read(DEVICE, 4, 1), halt()])?;
    // mov [edi], eax: the second page has the same but for the opcode.
    let other = CODE + 0x4000;
    let bytes = machine.ram.read(CODE, 16);
    machine.ram.write(other, &bytes);
    machine.ram.write(other + prefixes(mode), &[0x89]);
    let (entry, size) = mode.page_entry(CODE >> 12);
    let mut table = machine.ram.read(entry, size);
    let frame = other.to_le_bytes();
    table[1] = table[1] & 0xf | frame[1];
    table[2] = frame[2];
    machine.ram.write(entry, &table);
    // SET_REGS drops the processor's translations.
    machine.set(|state| state.rip = mode.entry())?;
    machine.expect(&[write(DEVICE, 4, 1), halt()])
}

/// The first byte is the last of its page.
fn instruction_across_pages(mode: Mode) -> Outcome {
    let code = guest!("mov eax, [edi]", "mov [edi + 8], eax", "hlt");
    let machine = Machine::with_kernel_code(mode, code)?;
    let bytes = machine.ram.read(CODE, 32);
    machine.ram.write(CODE + 0xfff, &bytes);
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rip = mode.entry() + 0xfff;
    })?;
    machine.expect(&[read(DEVICE, 4, 9), write(DEVICE + 8, 4, 9), halt()])
}

/// A data breakpoint of the guest's on the device: the access is made, once, and has its result.
fn watched_device(mode: Mode) -> Outcome {
    let code = guest!("mov eax, [edi]", "mov ebx, eax", "hlt");
    let machine = Machine::with_kernel_code(mode, code)?;
    machine.set(|state| {
        state.rdi = DEVICE;
        state.dr0 = DEVICE;
        // L0, reads and writes, four bytes.
        state.dr7 = 0x400 | 1 | 0xf << 16;
    })?;
    machine.expect(&[read(DEVICE, 4, 6), fault(1)])?;
    let state = machine.regs()?;
    same!((state.rax, state.rbx), (6, 0), "EAX and EBX at the trap");
    same!(state.dr6 & 0xf, 1, "DR6");
    Ok(())
}

/// More pages of devices than are remembered, with RAM in between.
fn many_pages(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, [edi]",
        "mov [edi + 0x1000], eax",
        "mov [edi + 0x4000], al",
        "mov [esi], eax",
        "mov ebx, [edi + 0x5000]",
        "mov [edi + 0x8000], ebx",
        "mov ecx, [edi]",
        "hlt"
    );
    let steps = [
        read(DEVICE, 4, 0x31),
        write(DEVICE + 0x1000, 4, 0x31),
        write(DEVICE + 0x4000, 1, 0x31),
        read(DEVICE + 0x5000, 4, 0x77),
        write(DEVICE + 0x8000, 4, 0x77),
        read(DEVICE, 4, 5),
        halt(),
    ];
    let machine = with(mode, code, &steps)?;
    same!(machine.ram.read(DATA, 4), vec![0x31, 0, 0, 0], "RAM");
    same!(machine.regs()?.rcx, 5, "ECX");
    Ok(())
}
