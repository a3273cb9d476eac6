//! Instructions that touch device memory: what comes out as FAST_MMIO, and what the guest gets.

use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::{Step, fault, halt, read, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, DEVICE, LOW_END, Mode};

pub const CASES: &[Case] = &[
    case!(mov_store in ALL),
    case!(mov_load in ALL),
    case!(mov_immediate in SIZES),
    case!(mov_accumulator_offset in WIDE),
    case!(mov_64 in LONG),
    case!(load_clears_the_upper_half in LONG),
    case!(movzx_movsx in ALL),
    case!(movsxd in LONG),
    case!(rmw_add_or in SIZES),
    case!(alu_flags in SIZES),
    case!(inc_not_neg in SIZES),
    case!(shift in SIZES),
    case!(bit_test in SIZES),
    case!(cmp_and_test_only_read in SIZES),
    case!(xchg in SIZES),
    case!(xadd in SIZES),
    case!(cmpxchg_equal in SIZES),
    case!(cmpxchg_different in SIZES),
    case!(cmpxchg8b in SIZES),
    case!(setcc_and_cmov in SIZES),
    case!(mul_and_div in SIZES),
    case!(bswap_moves in SIZES),
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
    case!(unaligned_size_4 in SIZES),
    case!(crosses_out_of_ram in SIZES),
    case!(crosses_into_rom in SIZES),
    case!(rom_reads_and_writes in ALL),
    case!(execute_from_device in PROTECTED),
    case!(high_address in WIDE),
    case!(sixteen_bit_addressing),
    case!(rip_relative in LONG),
    case!(segment_base),
    case!(trap_flag in SIZES),
    case!(interrupt_between in SIZES),
    case!(client_spoils_the_record in SIZES),
    case!(client_moves_on in SIZES),
    case!(many in SIZES),
];

/// Starts with EDI at the device, ESI at the data, and runs through the steps.
fn with(mode: Mode, code: Code, steps: &[Step]) -> anyhow::Result<Machine> {
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rsi = DATA;
    })?;
    machine.expect(steps)?;
    Ok(machine)
}

fn mov_store(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0x44332211",
        "mov [edi], al",
        "mov [edi + 1], ah",
        "mov [edi + 2], ax",
        "mov [edi + 4], eax",
        "hlt"
    );
    let steps = [
        write(DEVICE, 1, 0x11),
        write(DEVICE + 1, 1, 0x22),
        write(DEVICE + 2, 2, 0x2211),
        write(DEVICE + 4, 4, 0x44332211),
        halt(),
    ];
    with(mode, code, &steps).map(drop)
}

fn mov_load(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0x44332211",
        "mov ebx, eax",
        "mov ecx, eax",
        "mov al, [edi]",
        "mov bh, [edi + 1]",
        "mov cx, [edi + 2]",
        "mov edx, [edi + 4]",
        "hlt"
    );
    let steps = [
        read(DEVICE, 1, 0xaa),
        read(DEVICE + 1, 1, 0xbb),
        read(DEVICE + 2, 2, 0xccdd),
        read(DEVICE + 4, 4, 0xdeadbeef),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rax, 0x443322aa, "AL");
    same!(state.rbx, 0x4433bb11, "BH");
    same!(state.rcx, 0x4433ccdd, "CX");
    same!(state.rdx, 0xdeadbeef, "EDX");
    Ok(())
}

fn mov_immediate(mode: Mode) -> Outcome {
    let code = guest!(
        "mov byte ptr [edi], 0x5a",
        "mov word ptr [edi + 2], 0x1234",
        "mov dword ptr [edi + 4], 0x89abcdef",
        "hlt"
    );
    let steps = [
        write(DEVICE, 1, 0x5a),
        write(DEVICE + 2, 2, 0x1234),
        write(DEVICE + 4, 4, 0x89abcdef),
        halt(),
    ];
    with(mode, code, &steps).map(drop)
}

/// A0 to A3: MOV between the accumulator and an address in the instruction.
fn mov_accumulator_offset(mode: Mode) -> Outcome {
    let code = Code {
        bits16: &[],
        // mov al, [d0000h]; mov [d0004h], eax; hlt
        bits32: &[
            0xa0, 0x00, 0x00, 0x0d, 0x00, 0xa3, 0x04, 0x00, 0x0d, 0x00, 0xf4,
        ],
        bits64: &[
            0xa0, 0x00, 0x00, 0x0d, 0x00, 0, 0, 0, 0, 0xa3, 0x04, 0x00, 0x0d, 0x00, 0, 0, 0, 0,
            0xf4,
        ],
    };
    let steps = [read(DEVICE, 1, 0x77), write(DEVICE + 4, 4, 0x77), halt()];
    with(mode, code, &steps).map(drop)
}

fn mov_64(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov rax, 0x8877665544332211",
        "mov [rdi], rax",
        "mov r9, [rdi + 8]",
        "mov qword ptr [rdi + 16], -2",
        "movnti [rdi + 24], rax",
        "hlt");
    let steps = [
        write(DEVICE, 8, 0x8877665544332211),
        read(DEVICE + 8, 8, 0x0102030405060708),
        write(DEVICE + 16, 8, 0xffff_ffff_ffff_fffe),
        write(DEVICE + 24, 8, 0x8877665544332211),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.r9, 0x0102030405060708, "R9");
    Ok(())
}

fn load_clears_the_upper_half(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov rax, -1", "mov rbx, -1", "mov rcx, -1",
        "mov eax, [rdi]", "mov bx, [rdi]", "mov cl, [rdi]", "hlt");
    let steps = [
        read(DEVICE, 4, 0x80000000),
        read(DEVICE, 2, 0),
        read(DEVICE, 1, 0),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rax, 0x80000000, "RAX");
    same!(state.rbx, 0xffff_ffff_ffff_0000, "RBX");
    same!(state.rcx, 0xffff_ffff_ffff_ff00, "RCX");
    Ok(())
}

fn movzx_movsx(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, -1",
        "mov ebx, -1",
        "mov ecx, 0",
        "mov edx, 0",
        "movzx eax, byte ptr [edi]",
        "movzx ebx, word ptr [edi]",
        "movsx ecx, byte ptr [edi]",
        "movsx edx, word ptr [edi]",
        "movsx bp, byte ptr [edi]",
        "hlt"
    );
    let steps = [
        read(DEVICE, 1, 0x80),
        read(DEVICE, 2, 0x8001),
        read(DEVICE, 1, 0x80),
        read(DEVICE, 2, 0x8001),
        read(DEVICE, 1, 0x90),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rax, 0x80, "MOVZX byte");
    same!(state.rbx, 0x8001, "MOVZX word");
    same!(state.rcx, 0xffff_ff80, "MOVSX byte");
    same!(state.rdx, 0xffff_8001, "MOVSX word");
    same!(state.rbp, 0xff90, "MOVSX byte to word");
    Ok(())
}

fn movsxd(mode: Mode) -> Outcome {
    let code = guest!(64: "movsxd rax, dword ptr [rdi]", "hlt");
    let steps = [read(DEVICE, 4, 0x80000000), halt()];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rax, 0xffff_ffff_8000_0000, "RAX");
    Ok(())
}

fn rmw_add_or(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0x10",
        "add [edi], al",
        "or dword ptr [edi + 4], 0x80000000",
        "lock and word ptr [edi + 8], 0x0ff0",
        "xor dword ptr [edi + 12], eax",
        "sub byte ptr [edi + 16], 1",
        "hlt"
    );
    let steps = [
        read(DEVICE, 1, 0xf8),
        write(DEVICE, 1, 0x08),
        read(DEVICE + 4, 4, 1),
        write(DEVICE + 4, 4, 0x80000001),
        read(DEVICE + 8, 2, 0xffff),
        write(DEVICE + 8, 2, 0x0ff0),
        read(DEVICE + 12, 4, 0x11),
        write(DEVICE + 12, 4, 0x01),
        read(DEVICE + 16, 1, 0),
        write(DEVICE + 16, 1, 0xff),
        halt(),
    ];
    with(mode, code, &steps).map(drop)
}

/// CF of an ADD whose destination is the device reaches the next ADC, whose source is.
fn alu_flags(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 1",
        "mov ebx, 5",
        "add [edi], eax",
        "adc ebx, [edi + 4]",
        "sbb ecx, ecx",
        "hlt"
    );
    let steps = [
        read(DEVICE, 4, 0xffff_ffff),
        write(DEVICE, 4, 0),
        read(DEVICE + 4, 4, 0xffff_ffff),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rbx, 5, "EBX: 5 + ffffffff + CF");
    same!(state.rcx, 0xffff_ffff, "CF of the ADC");
    Ok(())
}

fn inc_not_neg(mode: Mode) -> Outcome {
    let code = guest!(
        "inc dword ptr [edi]",
        "dec word ptr [edi]",
        "not byte ptr [edi]",
        "neg dword ptr [edi]",
        "hlt"
    );
    let steps = [
        read(DEVICE, 4, 0x7fff_ffff),
        write(DEVICE, 4, 0x8000_0000),
        read(DEVICE, 2, 0),
        write(DEVICE, 2, 0xffff),
        read(DEVICE, 1, 0x0f),
        write(DEVICE, 1, 0xf0),
        read(DEVICE, 4, 1),
        write(DEVICE, 4, 0xffff_ffff),
        halt(),
    ];
    with(mode, code, &steps).map(drop)
}

fn shift(mode: Mode) -> Outcome {
    let code = guest!(
        "mov cl, 4",
        "shl dword ptr [edi], cl",
        "shr word ptr [edi], 1",
        "sar byte ptr [edi], 3",
        "rol dword ptr [edi], 8",
        "hlt"
    );
    let steps = [
        read(DEVICE, 4, 0x12345678),
        write(DEVICE, 4, 0x23456780),
        read(DEVICE, 2, 0x8000),
        write(DEVICE, 2, 0x4000),
        read(DEVICE, 1, 0x80),
        write(DEVICE, 1, 0xf0),
        read(DEVICE, 4, 0x12345678),
        write(DEVICE, 4, 0x34567812),
        halt(),
    ];
    with(mode, code, &steps).map(drop)
}

fn bit_test(mode: Mode) -> Outcome {
    let code = guest!(
        "bt dword ptr [edi], 3",
        "sbb ebx, ebx",
        "bts dword ptr [edi], 31",
        "sbb ecx, ecx",
        "mov eax, 33",
        "btr dword ptr [edi], eax",
        "sbb edx, edx",
        "hlt"
    );
    let steps = [
        read(DEVICE, 4, 8),
        read(DEVICE, 4, 1),
        write(DEVICE, 4, 0x8000_0001),
        // Bit 33 is bit 1 of the next doubleword.
        read(DEVICE + 4, 4, 3),
        write(DEVICE + 4, 4, 1),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rbx, 0xffff_ffff, "CF of BT");
    same!(state.rcx, 0, "CF of BTS");
    same!(state.rdx, 0xffff_ffff, "CF of BTR");
    Ok(())
}

fn cmp_and_test_only_read(mode: Mode) -> Outcome {
    let code = guest!(
        "cmp dword ptr [edi], 7",
        "sete bl",
        "test byte ptr [edi], 0x80",
        "setnz cl",
        "cmp eax, [edi]",
        "setb dl",
        "hlt"
    );
    let steps = [
        read(DEVICE, 4, 7),
        read(DEVICE, 1, 0x80),
        read(DEVICE, 4, 1),
        halt(),
    ];
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rdx = 0;
    })?;
    machine.expect(&steps)?;
    let state = machine.regs()?;
    same!((state.rbx, state.rcx, state.rdx), (1, 1, 1), "conditions");
    Ok(())
}

fn xchg(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0x11",
        "xchg eax, [edi]",
        "xchg [edi + 4], al",
        "hlt"
    );
    let steps = [
        read(DEVICE, 4, 0xfeedf00d),
        write(DEVICE, 4, 0x11),
        read(DEVICE + 4, 1, 0x22),
        write(DEVICE + 4, 1, 0x0d),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rax, 0xfeedf022, "EAX");
    Ok(())
}

fn xadd(mode: Mode) -> Outcome {
    let code = guest!("mov eax, 3", "lock xadd [edi], eax", "hlt");
    let steps = [read(DEVICE, 4, 40), write(DEVICE, 4, 43), halt()];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rax, 40, "EAX");
    Ok(())
}

fn cmpxchg_equal(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 5",
        "mov ebx, 9",
        "lock cmpxchg [edi], ebx",
        "setz cl",
        "hlt"
    );
    let steps = [read(DEVICE, 4, 5), write(DEVICE, 4, 9), halt()];
    let state = with(mode, code, &steps)?.regs()?;
    same!((state.rax, state.rcx), (5, 1), "EAX and ZF");
    Ok(())
}

/// The accumulator takes the old value, which is also written back (SDM volume 2, "CMPXCHG").
fn cmpxchg_different(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 5",
        "mov ebx, 9",
        "cmpxchg [edi], ebx",
        "setz cl",
        "hlt"
    );
    let steps = [read(DEVICE, 4, 6), write(DEVICE, 4, 6), halt()];
    let state = with(mode, code, &steps)?.regs()?;
    same!((state.rax, state.rcx), (6, 0), "EAX and ZF");
    Ok(())
}

fn cmpxchg8b(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 1",
        "mov edx, 2",
        "mov ebx, 3",
        "mov ecx, 4",
        "lock cmpxchg8b [edi]",
        "hlt"
    );
    let steps = [
        read(DEVICE, 8, 0x0000_0002_0000_0001),
        write(DEVICE, 8, 0x0000_0004_0000_0003),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rflags & 0x40, 0x40, "ZF");
    Ok(())
}

fn setcc_and_cmov(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 1",
        "mov ebx, 2",
        "cmp eax, eax",
        "setz byte ptr [edi]",
        "cmovz eax, [edi + 4]",
        "cmovnz ebx, [edi + 8]",
        "hlt"
    );
    let steps = [
        write(DEVICE, 1, 1),
        read(DEVICE + 4, 4, 0x99),
        // SDM volume 2, "CMOVcc": memory is read whatever the condition.
        read(DEVICE + 8, 4, 0x88),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!((state.rax, state.rbx), (0x99, 2), "EAX and EBX");
    Ok(())
}

fn mul_and_div(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0x10000",
        "mul dword ptr [edi]",
        "mov ebx, edx",
        "mov edx, 0",
        "mov eax, 100",
        "div dword ptr [edi + 4]",
        "imul ecx, dword ptr [edi + 8], -3",
        "hlt"
    );
    let steps = [
        read(DEVICE, 4, 0x20000),
        read(DEVICE + 4, 4, 7),
        read(DEVICE + 8, 4, 5),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rbx, 2, "high half of the product");
    same!((state.rax, state.rdx), (14, 2), "quotient and remainder");
    same!(state.rcx, 0xffff_fff1, "IMUL");
    Ok(())
}

fn bswap_moves(mode: Mode) -> Outcome {
    let code = guest!("movbe eax, [edi]", "movbe [edi + 4], eax", "hlt");
    let steps = [
        read(DEVICE, 4, 0x11223344),
        write(DEVICE + 4, 4, 0x11223344),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(state.rax, 0x44332211, "EAX");
    Ok(())
}

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

fn rep_zero_touches_nothing(mode: Mode) -> Outcome {
    let code = guest!("mov ecx, 0", "rep stosb byte ptr es:[edi], al", "hlt");
    with(mode, code, &[halt()]).map(drop)
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

/// An access inside one page is one exit, aligned or not.
fn unaligned_size_4(mode: Mode) -> Outcome {
    let code = guest!("mov eax, [edi + 3]", "mov [edi + 5], eax", "hlt");
    let steps = [
        read(DEVICE + 3, 4, 0x12345678),
        write(DEVICE + 5, 4, 0x12345678),
        halt(),
    ];
    with(mode, code, &steps).map(drop)
}

/// Half of the operand is RAM, half is device.
fn crosses_out_of_ram(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, [edi]",
        "mov ebx, 0xddccbbaa",
        "mov [edi], ebx",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.write(LOW_END - 2, &[0x11, 0x22]);
    machine.set(|state| state.rdi = LOW_END - 2)?;
    let mut seen = Vec::new();
    // How the device's half is cut up is the driver's choice.
    loop {
        match machine.run()? {
            crate::exit::Exit::Read { gpa, size } => {
                let value = 0x4433_u64 >> ((gpa - LOW_END) * 8);
                machine.vcpu.tunnel.set_fast_mmio_value(value);
                seen.push((gpa, size, false, 0));
            }
            crate::exit::Exit::Write { gpa, size, value } => seen.push((gpa, size, true, value)),
            crate::exit::Exit::Halt => break,
            other => anyhow::bail!("{other:?}"),
        }
    }
    same!(machine.regs()?.rax, 0x44332211, "EAX, {seen:?}");
    same!(machine.ram.read(LOW_END - 2, 2), vec![0xaa, 0xbb], "RAM");
    let mut written = [0_u8; 2];
    for (gpa, size, is_write, value) in seen {
        anyhow::ensure!(
            gpa >= LOW_END && gpa + u64::from(size) <= LOW_END + 2,
            "exit for {gpa:#x} size {size}"
        );
        if is_write {
            let at = (gpa - LOW_END) as usize;
            let bytes = value.to_le_bytes();
            written[at..at + usize::from(size)].copy_from_slice(&bytes[..usize::from(size)]);
        }
    }
    same!(written, [0xcc, 0xdd], "device's half");
    Ok(())
}

/// A write that begins in RAM and ends in ROM: RAM changes, ROM does not.
fn crosses_into_rom(mode: Mode) -> Outcome {
    let code = guest!("mov eax, 0x44332211", "mov [edi], eax", "hlt");
    let machine = Machine::new(mode, code)?;
    let rom = DATA + 0x1000;
    machine
        .vm
        .set_ram(rom, 0x1000, 1, machine.ram.address() + rom)?;
    machine.set(|state| state.rdi = rom - 2)?;
    loop {
        match machine.run()? {
            crate::exit::Exit::Write { gpa, size, .. } => {
                anyhow::ensure!(gpa >= rom, "write exit at {gpa:#x} size {size}");
            }
            crate::exit::Exit::Halt => break,
            other => anyhow::bail!("{other:?}"),
        }
    }
    same!(
        machine.ram.read(rom - 2, 4),
        vec![0x11, 0x22, 0, 0],
        "memory"
    );
    Ok(())
}

fn rom_reads_and_writes(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, [edi]",
        "mov byte ptr [edi], 1",
        "add [edi + 4], eax",
        "mov ebx, [edi + 4]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.write_u32(DATA, 0x1000);
    machine.ram.write_u32(DATA + 4, 0x2000);
    machine
        .vm
        .set_ram(DATA, 0x1000, 1, machine.ram.address() + DATA)?;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[write(DATA, 1, 1)])?;
    // The read half of the ADD may come from the page itself.
    let mut last = machine.run()?;
    if last
        == (crate::exit::Exit::Read {
            gpa: DATA + 4,
            size: 4,
        })
    {
        machine.vcpu.tunnel.set_fast_mmio_value(0x2000);
        last = machine.run()?;
    }
    same!(last, write(DATA + 4, 4, 0x3000).exit, "the sum");
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!((state.rax, state.rbx), (0x1000, 0x2000), "EAX and EBX");
    same!(machine.ram.u32(DATA + 4), 0x2000, "ROM");
    Ok(())
}

/// Nothing to execute there: the guest gets an exception, and lives.
fn execute_from_device(mode: Mode) -> Outcome {
    let code = guest!(32: "mov eax, 0xd0000", "jmp eax");
    let code = Code {
        bits64: crate::blob!(".code64", "mov eax, 0xd0000", "jmp rax"),
        ..code
    };
    Machine::new(mode, code)?.expect(&[fault(6)])
}

fn high_address(mode: Mode) -> Outcome {
    let code = guest!("mov eax, [edi]", "mov [edi + 4], eax", "hlt");
    // The IOAPIC's and the local APIC's pages: paging is off, or maps one gigabyte.
    let base = if mode == Mode::Long {
        0x3ec0_0000
    } else {
        0xfee0_0000
    };
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rdi = base)?;
    machine.expect(&[read(base, 4, 0x50014), write(base + 4, 4, 0x50014), halt()])
}

fn sixteen_bit_addressing() -> Outcome {
    let code = guest!(16:
        "mov ax, 0xd000",
        "mov es, ax",
        "mov bx, 0x10",
        "mov si, 0x20",
        "mov al, es:[bx + si + 4]",
        "mov di, 0x100",
        "mov cx, 2",
        "mov ax, 0x6162",
        "rep stosw",
        "hlt");
    let machine = Machine::new(Mode::Real, code)?;
    machine.expect(&[
        read(DEVICE + 0x34, 1, 1),
        write(DEVICE + 0x100, 2, 0x6162),
        write(DEVICE + 0x102, 2, 0x6162),
        halt(),
    ])
}

fn rip_relative(mode: Mode) -> Outcome {
    // The next instruction is at 10006h; bffFAh more is the device.
    let code = guest!(64: "mov eax, [rip + 0xbfffa]", "hlt");
    with(mode, code, &[read(DEVICE, 4, 5), halt()]).map(drop)
}

fn segment_base() -> Outcome {
    let code = guest!(64: "mov eax, fs:[rdi]", "mov gs:[rdi + 4], eax", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    machine.set(|state| {
        state.rdi = 0x10;
        state.fs.base = DEVICE;
        state.gs.base = DEVICE + 0x1000;
    })?;
    machine.expect(&[
        read(DEVICE + 0x10, 4, 3),
        write(DEVICE + 0x1014, 4, 3),
        halt(),
    ])
}

/// TF: a #DB after the access, as after any other instruction.
fn trap_flag(mode: Mode) -> Outcome {
    let code = guest!("mov eax, [edi]", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rflags |= 0x100;
    })?;
    machine.expect(&[read(DEVICE, 4, 9), fault(1)])?;
    let length = if mode == Mode::Protected {
        2
    } else if mode == Mode::Real {
        4
    } else {
        3
    };
    same!(
        machine.frame_rip(false)?,
        mode.entry() + length,
        "RIP in the frame"
    );
    same!(machine.regs()?.dr6 & 0x4000, 0x4000, "DR6.BS");
    Ok(())
}

/// An interrupt queued at an MMIO exit comes after the instruction, and the access is made once.
fn interrupt_between(mode: Mode) -> Outcome {
    let code = guest!("sti", "nop", "mov eax, [edi]", "nop", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rdi = DEVICE)?;
    let access = read(DEVICE, 4, 0x1234);
    machine.expect(std::slice::from_ref(&access))?;
    machine.vcpu.interrupt(0x44)?;
    machine.answer(&access);
    machine.expect(&[crate::exit::vector(0x44), halt()])?;
    same!(machine.regs()?.rax, 0x1234, "EAX");
    Ok(())
}

/// Nothing of the record but the value of a read is looked at again.
fn client_spoils_the_record(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0x11223344",
        "mov al, [edi]",
        "mov [edi], al",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rdi = DEVICE)?;
    machine.expect(&[read(DEVICE, 1, 0xffff_ffff_ffff_ff05)])?;
    machine.vcpu.tunnel.spoil_fast_mmio(0, 0xff, 0xff);
    machine.expect(&[write(DEVICE, 1, 5)])?;
    machine.vcpu.tunnel.spoil_fast_mmio(u64::MAX, 0, 2);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0x11223305, "EAX");
    Ok(())
}

/// SET_REGS with another RIP gives the access up.
fn client_moves_on(mode: Mode) -> Outcome {
    let code = guest!("mov eax, [edi]", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.ram.write(crate::modes::CODE + 0x100, &[0xf4]);
    machine.set(|state| {
        state.rdi = DEVICE;
        state.rax = 0x42;
    })?;
    machine.expect(&[read(DEVICE, 4, 9)])?;
    machine.set(|state| state.rip = mode.entry() + 0x100)?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(state.rax, 0x42, "EAX");
    same!(state.rip, mode.entry() + 0x101, "RIP");
    Ok(())
}

fn many(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 100",
        "2: add ebx, [edi]",
        "mov [edi + 4], ebx",
        "dec ecx",
        "jnz 2b",
        "hlt"
    );
    let mut steps = Vec::new();
    let mut sum = 0;
    for value in 0..100 {
        sum += value;
        steps.push(read(DEVICE, 4, value));
        steps.push(write(DEVICE + 4, 4, sum));
    }
    steps.push(halt());
    with(mode, code, &steps).map(drop)
}
