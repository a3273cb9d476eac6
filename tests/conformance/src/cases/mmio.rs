//! Instructions that touch device memory: what comes out as FAST_MMIO, and what the guest gets.

use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::{Step, halt, read, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, DEVICE, Mode};

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
];

/// Starts with EDI at the device, ESI at the data, and runs through the steps.
pub fn with(mode: Mode, code: Code, steps: &[Step]) -> anyhow::Result<Machine> {
    let machine = Machine::with_kernel_code(mode, code)?;
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
