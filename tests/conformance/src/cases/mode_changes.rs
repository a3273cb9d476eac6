//! Modes that a guest enters by itself.

use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::{halt, out};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, EFER, Mode, PD, PDPT_PAE};

pub const CASES: &[Case] = &[
    case!(real_to_protected),
    case!(real_to_protected_and_back),
    case!(protected_to_long),
    case!(long_to_protected),
    case!(compatibility_mode),
    case!(turn_paging_on_pae),
    case!(far_call_16),
];

/// A machine in real mode that has the tables of another.
fn real_with_tables_of(mode: Mode, code: Code) -> anyhow::Result<Machine> {
    let machine = Machine::new(Mode::Real, code)?;
    crate::modes::write_tables(mode, &machine.ram);
    machine.set(|state| {
        state.gdt = crate::modes::registers(mode).gdt;
        state.idt = crate::modes::registers(mode).idt;
    })?;
    Ok(machine)
}

fn real_to_protected() -> Outcome {
    let code = guest!(16:
        "mov eax, cr0", "or al, 1", "mov cr0, eax",
        ".byte 0x66, 0xea, 0x20, 0x00, 0x01, 0x00, 0x08, 0x00", // jmp 8:10020h
        ".balign 32",
        ".code32",
        "mov eax, 0x10", "mov ds, eax", "mov ss, eax", "mov eax, 0x12345678", "out 0x80, eax", "hlt");
    let machine = real_with_tables_of(Mode::Protected, code)?;
    machine.expect(&[out(0x80, 4, 0x12345678), halt()])?;
    let state = machine.regs()?;
    same!(state.cs.selector, 8, "CS");
    same!(state.cs.base, 0, "CS base");
    same!(state.cs.limit, u32::MAX, "CS limit");
    same!(state.cr0 & 1, 1, "CR0.PE");
    Ok(())
}

fn real_to_protected_and_back() -> Outcome {
    let code = guest!(16:
        "mov eax, cr0", "or al, 1", "mov cr0, eax",
        "mov bx, 0x10", "mov fs, bx",
        "and al, 0xfe", "mov cr0, eax",
        "mov ebx, 0x180000", "mov byte ptr fs:[ebx], 0x5e",
        "mov al, 3", "out 0x80, al", "hlt");
    let machine = real_with_tables_of(Mode::Protected, code)?;
    machine.expect(&[out(0x80, 1, 3), halt()])?;
    same!(
        machine.ram.read(0x180000, 1),
        vec![0x5e],
        "above 1 MB, by unreal mode"
    );
    same!(machine.regs()?.cr0 & 1, 0, "CR0.PE");
    Ok(())
}

fn protected_to_long() -> Outcome {
    let code = guest!(32:
        "mov eax, cr4", "or eax, 0x20", "mov cr4, eax",
        "mov eax, 0x3000", "mov cr3, eax",
        "mov ecx, 0xc0000080", "rdmsr", "or eax, 0x100", "wrmsr",
        "mov eax, cr0", "or eax, 0x80000000", "mov cr0, eax",
        "rdmsr", "mov ebx, eax",
        ".byte 0xea, 0x40, 0x00, 0x01, 0x00, 0x18, 0x00", // jmp 18h:10040h
        ".balign 64",
        ".code64",
        "mov rax, 0x1122334455667788", "mov rcx, rax", "out 0x80, al", "hlt");
    let machine = Machine::new(Mode::Protected, code)?;
    crate::modes::write_tables(Mode::Long, &machine.ram);
    machine.expect(&[out(0x80, 1, 0x88), halt()])?;
    let state = machine.regs()?;
    same!(state.rbx & 0x500, 0x500, "EFER: LME and LMA");
    same!(state.rcx, 0x1122334455667788, "RCX");
    same!(state.cs.ar & 0x2000, 0x2000, "CS.L");
    same!(machine.vcpu.msrs(&[EFER])?, vec![0x500], "EFER by GET_MSRS");
    Ok(())
}

fn long_to_protected() -> Outcome {
    let code = guest!(64:
        "push 8", "lea rax, [rip + 2f]", "push rax", ".byte 0x48, 0xcb", // retfq
        ".code32",
        "2: mov eax, cr0", "and eax, 0x7fffffff", "mov cr0, eax",
        "mov ecx, 0xc0000080", "rdmsr", "mov ebx, eax",
        "and eax, 0xfffffeff", "wrmsr", "out 0x80, al", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    machine.expect(&[out(0x80, 1, 1), halt()])?;
    let state = machine.regs()?;
    same!(state.rbx & 0x500, 0x100, "EFER: LME without LMA");
    same!(state.cr0 >> 31, 0, "CR0.PG");
    Ok(())
}

fn compatibility_mode() -> Outcome {
    let code = guest!(64:
        "push 8", "lea rax, [rip + 2f]", "push rax", ".byte 0x48, 0xcb",
        ".code32",
        "2: mov eax, 0x55", "inc eax", "out 0x80, al",
        "mov edi, 0xd0000", "mov [edi], eax",
        "mov ecx, 2", "mov esi, 0xc000", "rep outsb", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    machine.ram.write(DATA, &[8, 9]);
    machine.set(|state| state.rdx = 0x99)?;
    machine.expect(&[
        out(0x80, 1, 0x56),
        crate::exit::write(crate::modes::DEVICE, 4, 0x56),
        crate::exit::outs(0x99, 1, &[8, 9], 0),
        halt(),
    ])
}

/// The guest turns PAE paging on: the PDPTEs are read at MOV to CR0, from then on held by the processor.
fn turn_paging_on_pae() -> Outcome {
    let code = guest!(32:
        "mov eax, cr4", "or eax, 0x20", "mov cr4, eax",
        "mov eax, 0x7000", "mov cr3, eax",
        "mov eax, cr0", "or eax, 0x80000000", "mov cr0, eax",
        "mov eax, [edi]", "out 0x80, al",
        "mov eax, cr3", "mov cr3, eax",
        "mov eax, [edi]", "hlt");
    let machine = Machine::new(Mode::Protected, code)?;
    crate::modes::write_tables(Mode::Pae, &machine.ram);
    machine.ram.write_u32(DATA, 0x33);
    machine.ram.write_u32(DATA + 0x1000, 0x44);
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[out(0x80, 1, 0x33)])?;
    // Another directory and table for the first 2 MB, where data is one page further.
    let (pd, pt) = (0x190000, 0x191000);
    machine.ram.write(pd, &machine.ram.read(PD, 0x1000));
    machine.ram.write(pt, &machine.ram.read(0x6000, 0x1000));
    machine.ram.write_u64(pd, pt | 7);
    machine
        .ram
        .write_u64(pt + (DATA >> 12) * 8, (DATA + 0x1000) | 0x67);
    machine.ram.write_u64(PDPT_PAE, pd | 1);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0x44, "what is read after MOV to CR3");
    Ok(())
}

fn far_call_16() -> Outcome {
    let code = guest!(16:
        ".byte 0x9a, 0x20, 0x00, 0x00, 0x10", // call 1000h:20h
        "mov bl, 1", "hlt",
        ".balign 32", "out 0x80, al", ".byte 0xcb"); // retf
    let machine = Machine::new(Mode::Real, code)?;
    machine.expect(&[out(0x80, 1, 0), halt()])?;
    same!(machine.regs()?.rbx, 1, "BL");
    Ok(())
}
