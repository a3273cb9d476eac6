//! Stack and string instructions, and vector moves, that touch device memory.

use super::mmio::with;
use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::{halt, read, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, DEVICE, Mode};

pub const CASES: &[Case] = &[
    case!(push_from_device in SIZES),
    case!(pop_to_device in SIZES),
    case!(movs_to_device in ALL),
    case!(movs_from_device in ALL),
    case!(movs_between_devices in SIZES),
    case!(movs_downwards in SIZES),
    case!(stos_and_lods in SIZES),
    case!(scas_and_cmps in SIZES),
    case!(rep_zero_touches_nothing in SIZES),
    case!(movups in SIZES),
    case!(movq_and_movd in SIZES),
];

fn push_from_device(mode: Mode) -> Outcome {
    let code = Code {
        bits16: crate::blob!(".code16", "push dword ptr [edi]", "hlt"),
        bits32: crate::blob!(".code32", "push dword ptr [edi]", "hlt"),
        bits64: crate::blob!(".code64", "push qword ptr [edi]", "hlt"),
    };
    let size = if mode == Mode::Long { 8 } else { 4 };
    let machine = with(mode, code, &[read(DEVICE, size, 0x77665544), halt()])?;
    let state = machine.regs()?;
    same!(state.rsp, crate::modes::STACK - u64::from(size), "RSP");
    same!(
        machine.ram.number(state.rsp, size.into()),
        0x77665544,
        "pushed"
    );
    Ok(())
}

fn pop_to_device(mode: Mode) -> Outcome {
    let code = Code {
        bits16: crate::blob!(".code16", "push 0x1234", "pop word ptr [edi]", "hlt"),
        bits32: crate::blob!(".code32", "push 0x1234", "pop dword ptr [edi]", "hlt"),
        bits64: crate::blob!(".code64", "push 0x1234", "pop qword ptr [edi]", "hlt"),
    };
    let machine = with(
        mode,
        code,
        &[write(DEVICE, mode.slot() as u8, 0x1234), halt()],
    )?;
    same!(machine.regs()?.rsp, crate::modes::STACK, "RSP");
    Ok(())
}

fn movs_to_device(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov ecx, 3",
        "rep movsd dword ptr es:[edi], dword ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine
        .ram
        .write(DATA, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rsi = DATA;
    })?;
    machine.expect(&[
        write(DEVICE, 4, 1),
        write(DEVICE + 4, 4, 2),
        write(DEVICE + 8, 4, 3),
        halt(),
    ])?;
    let state = machine.regs()?;
    same!(state.rcx, 0, "ECX");
    same!(
        (state.rsi, state.rdi),
        (DATA + 12, DEVICE + 12),
        "ESI and EDI"
    );
    Ok(())
}

fn movs_from_device(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov ecx, 3",
        "rep movsw word ptr es:[edi], word ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.rsi = DEVICE;
        state.rdi = DATA;
    })?;
    machine.expect(&[
        read(DEVICE, 2, 0x1111),
        read(DEVICE + 2, 2, 0x2222),
        read(DEVICE + 4, 2, 0x3333),
        halt(),
    ])?;
    let wanted = [0x11, 0x11, 0x22, 0x22, 0x33, 0x33, 0, 0];
    same!(machine.ram.read(DATA, 8), wanted.to_vec(), "memory");
    Ok(())
}

fn movs_between_devices(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 2",
        "rep movsb byte ptr es:[edi], byte ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.rsi = DEVICE;
        state.rdi = DEVICE + 0x100;
    })?;
    machine.expect(&[
        read(DEVICE, 1, 0xa1),
        write(DEVICE + 0x100, 1, 0xa1),
        read(DEVICE + 1, 1, 0xb2),
        write(DEVICE + 0x101, 1, 0xb2),
        halt(),
    ])
}

fn movs_downwards(mode: Mode) -> Outcome {
    let code = guest!(
        "std",
        "mov ecx, 2",
        "rep movsd dword ptr es:[edi], dword ptr [esi]",
        "cld",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.write_u32(DATA, 0xaaaa);
    machine.ram.write_u32(DATA + 4, 0xbbbb);
    machine.set(|state| {
        state.rsi = DATA + 4;
        state.rdi = DEVICE + 4;
    })?;
    machine.expect(&[
        write(DEVICE + 4, 4, 0xbbbb),
        write(DEVICE, 4, 0xaaaa),
        halt(),
    ])
}

fn stos_and_lods(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov eax, 0xd1d2d3d4",
        "mov ecx, 2",
        "rep stosd dword ptr es:[edi], eax",
        "lodsb al, byte ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rsi = DEVICE + 0x20;
    })?;
    machine.expect(&[
        write(DEVICE, 4, 0xd1d2d3d4),
        write(DEVICE + 4, 4, 0xd1d2d3d4),
        read(DEVICE + 0x20, 1, 0x7e),
        halt(),
    ])?;
    same!(machine.regs()?.rax, 0xd1d2d37e, "EAX");
    Ok(())
}

fn scas_and_cmps(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov al, 5",
        "mov ecx, 10",
        "repne scasb al, byte ptr es:[edi]",
        "mov ebx, ecx",
        "mov ecx, 10",
        "repe cmpsb byte ptr [esi], byte ptr es:[edi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.write(DATA, &[7, 8]);
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rsi = DATA;
    })?;
    machine.expect(&[
        read(DEVICE, 1, 1),
        read(DEVICE + 1, 1, 5),
        read(DEVICE + 2, 1, 7),
        read(DEVICE + 3, 1, 9),
        halt(),
    ])?;
    let state = machine.regs()?;
    same!((state.rbx, state.rcx), (8, 8), "ECX after SCAS and CMPS");
    // CMPS compares [ESI] with [EDI]: 8 - 9.
    same!(state.rflags & 0x41, 1, "ZF and CF");
    Ok(())
}

/// Nor when it is the client that leaves no count, while it has an element.
fn rep_zero_touches_nothing(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 0",
        "rep stosb byte ptr es:[edi], al",
        "mov ecx, 3",
        "rep stosb byte ptr es:[edi], al",
        "hlt"
    );
    let machine = with(mode, code, &[write(DEVICE, 1, 0)])?;
    machine.set(|state| state.rcx = 0)?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rcx, 0, "ECX");
    Ok(())
}

fn movups(mode: Mode) -> Outcome {
    let code = guest!("movups xmm1, [edi]", "movups [edi + 32], xmm1", "hlt");
    let steps = [
        read(DEVICE, 8, 0x1111_2222_3333_4444),
        read(DEVICE + 8, 8, 0x5555_6666_7777_8888),
        write(DEVICE + 32, 8, 0x1111_2222_3333_4444),
        write(DEVICE + 40, 8, 0x5555_6666_7777_8888),
        halt(),
    ];
    let machine = with(mode, code, &steps)?;
    let fpu = machine.vcpu.fpu()?;
    same!(fpu.mmx_1[1][..2], [0x44, 0x44], "XMM1");
    same!(fpu.mmx_1[1][14..], [0x55, 0x55], "XMM1");
    Ok(())
}

fn movq_and_movd(mode: Mode) -> Outcome {
    let code = guest!(
        "movq xmm0, qword ptr [edi]",
        "movq qword ptr [edi + 8], xmm0",
        "movd dword ptr [edi + 16], xmm0",
        "hlt"
    );
    let steps = [
        read(DEVICE, 8, 0x0123_4567_89ab_cdef),
        write(DEVICE + 8, 8, 0x0123_4567_89ab_cdef),
        write(DEVICE + 16, 4, 0x89ab_cdef),
        halt(),
    ];
    with(mode, code, &steps).map(drop)
}
