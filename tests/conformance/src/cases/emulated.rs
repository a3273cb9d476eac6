//! Instructions beyond plain loads, stores and arithmetic that the driver carries out: segment loads, far
//! branches, the stack, MMX, masks, locks; and what it leaves to the guest as undefined.

use super::mmio::with;
use super::{Case, Outcome};
use crate::exit::{Exit, fault, fault_code, halt, read, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{self, CODE, DATA, DEVICE, Mode, RAM_SIZE, selector};

pub const CASES: &[Case] = &[
    case!(descriptors_in_rom in WIDE),
    case!(segment_that_may_not_be_loaded in WIDE),
    case!(shadow_of_a_segment_in_rom in WIDE),
    case!(segment_from_a_device in SIZES),
    case!(segment_in_user_mode in PAGING),
    case!(far_pointer_from_a_device in WIDE32),
    case!(far_branch_through_a_device in WIDE32),
    case!(stack_in_a_device in WIDE32),
    case!(frame_in_a_device in WIDE32),
    case!(bound_in_a_device in WIDE32),
    case!(descriptor_table_registers in WIDE),
    case!(mmx_moves in WIDE),
    case!(masked_moves in LONG),
    case!(locks_when_ram_appears in LONG),
    case!(not_emulated in SIZES),
];

const GDT: u64 = 0x1000;
const ROM: u64 = 0x5_0000;

/// The GDT moves to ROM, where these descriptors were never accessed.
pub(super) fn gdt_in_rom(machine: &Machine, fresh: &[u16]) -> anyhow::Result<()> {
    let ram = &machine.ram;
    ram.write(ROM, &ram.read(GDT, 256));
    for selector in fresh.iter().copied() {
        let at = ROM + u64::from(selector) + 5;
        ram.write(at, &[ram.read(at, 1)[0] & !1]);
    }
    machine.vm.set_ram(ROM, 0x1000, 1, ram.address() + ROM)?;
    machine.set(|state| state.gdt.base = ROM)
}

/// Firmware does this on its way to protected mode: data segments, the stack, and CS.
fn descriptors_in_rom(mode: Mode) -> Outcome {
    let code = crate::code::Code {
        bits16: &[],
        bits32: crate::blob!(
            ".code32",
            "mov ax, 0x10",
            "mov ds, eax",
            "mov es, ax",
            "mov ss, ax",
            "push 0x10",
            "pop fs",
            "call 2f",
            "2: pop ebx",
            "push 8",
            "add ebx, 10",
            "push ebx",
            "retf",
            "ud2",
            "mov bl, 1",
            "hlt"
        ),
        bits64: crate::blob!(
            ".code64",
            "mov ax, 0x10",
            "mov ds, eax",
            "mov es, ax",
            "mov ss, ax",
            "push 0x10",
            "pop fs",
            "push 0x18",
            "lea rbx, [rip + 3f]",
            "push rbx",
            ".byte 0x48, 0xcb",
            "ud2",
            "3: mov bl, 1",
            "hlt"
        ),
    };
    let machine = Machine::new(mode, code)?;
    let fresh = [selector::CODE32, selector::DATA, selector::CODE64];
    gdt_in_rom(&machine, &fresh)?;
    machine.set(|state| {
        // Segments that would do harm if they stayed.
        for segment in [&mut state.ds, &mut state.es] {
            segment.base = 0x1000_0000;
        }
    })?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(state.rbx & 0xff, 1, "BL");
    for (name, segment) in [("DS", state.ds), ("ES", state.es), ("SS", state.ss)] {
        same!(segment.selector, selector::DATA, "{name}");
        same!((segment.base, segment.limit), (0, u32::MAX), "{name}");
        same!(segment.ar, 0xc093, "{name}'s rights");
    }
    let at = ROM + u64::from(selector::DATA) + 5;
    same!(machine.ram.read(at, 1), vec![0x92], "the descriptor");
    Ok(())
}

/// The checks are the processor's, with the selector as error code.
fn segment_that_may_not_be_loaded(mode: Mode) -> Outcome {
    // Code that may not be read; data that is not present; beyond the table.
    for (vector, selector) in [(13, 0x58), (11, 0x50), (13, 0x7f8)] {
        let machine = Machine::new(mode, guest!("nop", "mov ds, [edi]", "hlt"))?;
        machine.ram.write_u64(GDT + 0x58, 0x00cf_9800_0000_ffff);
        machine.ram.write_u64(GDT + 0x50, 0x00cf_1200_0000_ffff);
        machine.set(|state| state.rdi = DEVICE)?;
        machine.expect(&[read(DEVICE, 2, selector), fault_code(vector, selector)])?;
        same!(
            machine.frame_rip(true)?,
            mode.entry() + 1,
            "RIP in the frame"
        );
    }
    Ok(())
}

/// MOV SS that the driver carried out keeps an interrupt back for one instruction.
fn shadow_of_a_segment_in_rom(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, 0x10",
        "sti",
        "mov ss, eax",
        "mov bl, 1",
        "mov cl, 1",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    gdt_in_rom(&machine, &[selector::DATA])?;
    // STI's own shadow ends with MOV SS.
    machine.vcpu.interrupt(0x52)?;
    machine.expect(&[crate::exit::vector(0x52)])?;
    let state = machine.regs()?;
    same!((state.rbx & 0xff, state.rcx & 0xff), (1, 0), "BL and CL");
    machine.expect(&[halt()])
}

fn segment_from_a_device(mode: Mode) -> Outcome {
    let code = guest!("mov es, [edi]", "hlt");
    let (selector, base) = match mode {
        Mode::Real => (0x1234, 0x1_2340),
        _ => (selector::DATA, 0),
    };
    let steps = [read(DEVICE, 2, selector.into()), halt()];
    let machine = with(mode, code, &steps)?;
    let state = machine.regs()?;
    same!((state.es.selector, state.es.base), (selector, base), "ES");
    Ok(())
}

fn far_pointer_from_a_device(mode: Mode) -> Outcome {
    let code = guest!(32: "lgs ebx, [edi]", "les ecx, [edi + 8]", "hlt");
    let steps = [
        read(DEVICE, 4, 0x1234_5678),
        read(DEVICE + 4, 2, 0x10),
        read(DEVICE + 8, 4, 0x9abc_def0),
        read(DEVICE + 12, 2, 0),
        halt(),
    ];
    let state = with(mode, code, &steps)?.regs()?;
    same!(
        (state.rbx, state.rcx),
        (0x1234_5678, 0x9abc_def0),
        "offsets"
    );
    same!(
        (state.gs.selector, state.es.selector),
        (0x10, 0),
        "selectors"
    );
    Ok(())
}

fn far_branch_through_a_device(mode: Mode) -> Outcome {
    // call far [edi], jmp far [edi + 8]
    let code = guest!(32: ".byte 0xff, 0x1f", "ud2", ".byte 0xff, 0x6f, 8", "ud2", "hlt");
    let steps = [
        read(DEVICE, 4, CODE + 4),
        read(DEVICE + 4, 2, 8),
        read(DEVICE + 8, 4, CODE + 9),
        read(DEVICE + 12, 2, 8),
        halt(),
    ];
    let machine = with(mode, code, &steps)?;
    same!(machine.regs()?.cs.selector, 8, "CS");
    same!(machine.stack(0)?, CODE + 2, "return address");
    same!(machine.stack(1)?, 8, "CS on the stack");
    Ok(())
}

fn stack_in_a_device(mode: Mode) -> Outcome {
    // pushfd, popfd, push ds, pop gs
    let code = guest!(32: "pushfd", "popfd", ".byte 0x1e", ".byte 0x0f, 0xa9", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rsp = DEVICE + 0x100)?;
    machine.expect(&[
        write(DEVICE + 0xfc, 4, 2),
        read(DEVICE + 0xfc, 4, 0x8d7),
        write(DEVICE + 0xfc, 2, selector::DATA.into()),
        read(DEVICE + 0xfc, 4, 0),
        halt(),
    ])?;
    let state = machine.regs()?;
    same!(state.rflags & 0x8d7, 0x8d7, "flags");
    same!(
        (state.rsp, state.gs.selector),
        (DEVICE + 0x100, 0),
        "ESP, GS"
    );
    Ok(())
}

fn frame_in_a_device(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!(32: "enter 0x10, 1", "leave", "hlt"))?;
    machine.set(|state| {
        state.rsp = DEVICE + 0x100;
        state.rbp = 0x1234;
    })?;
    let frame = DEVICE + 0xfc;
    machine.expect(&[
        write(DEVICE + 0xf8, 8, 0x1234 << 32 | frame),
        read(frame, 4, 0x5678),
        halt(),
    ])?;
    let state = machine.regs()?;
    same!((state.rbp, state.rsp), (0x5678, DEVICE + 0x100), "EBP, ESP");
    Ok(())
}

fn bound_in_a_device(mode: Mode) -> Outcome {
    let code = || guest!(32: "mov eax, 5", "bound eax, [edi]", "hlt");
    let bounds = |low, high| [read(DEVICE, 4, low), read(DEVICE + 4, 4, high)];
    let [low, high] = bounds(5, 5);
    with(mode, code(), &[low, high, halt()])?;
    let [low, high] = bounds(0xffff_fff0, 4);
    with(mode, code(), &[low, high, fault(5)])?;
    let [low, _] = bounds(6, 9);
    with(mode, code(), &[low, fault(5)]).map(drop)
}

fn descriptor_table_registers(mode: Mode) -> Outcome {
    let code = guest!("sgdt [edi]", "lidt [edi + 16]", "sidt [esi]", "hlt");
    let state = modes::registers(mode);
    let (base, limit) = (state.gdt.base, u64::from(state.gdt.limit));
    let long = mode == Mode::Long;
    let mut steps = if long {
        vec![
            write(DEVICE, 8, base << 16 | limit),
            write(DEVICE + 8, 2, 0),
        ]
    } else {
        vec![
            write(DEVICE, 4, (base << 16 | limit) & 0xffff_ffff),
            write(DEVICE + 4, 2, 0),
        ]
    };
    let idt = 0x1122_3344_0fff_u64;
    if long {
        steps.extend([read(DEVICE + 16, 8, idt), read(DEVICE + 24, 2, 0)]);
    } else {
        steps.extend([
            read(DEVICE + 16, 4, idt & 0xffff_ffff),
            read(DEVICE + 20, 2, idt >> 32),
        ]);
    }
    steps.push(halt());
    let machine = with(mode, code, &steps)?;
    same!(
        machine.ram.number(DATA, 6),
        idt,
        "IDTR as the guest sees it"
    );
    Ok(())
}

/// With values on the x87 stack: an MMX instruction makes it one of MMX registers, wherever its top was.
fn mmx_moves(mode: Mode) -> Outcome {
    let code = guest!(
        "fninit",
        "fld1",
        "movq mm1, qword ptr [edi]",
        "movq qword ptr [edi + 8], mm1",
        "movq qword ptr [esi], mm1",
        "movq qword ptr [esi + 8], mm7",
        "fnstenv [esi + 16]",
        "hlt"
    );
    let value = 0x1122_3344_5566_7788;
    let steps = [read(DEVICE, 8, value), write(DEVICE + 8, 8, value), halt()];
    let machine = with(mode, code, &steps)?;
    same!(machine.ram.number(DATA, 8), value, "MM1");
    same!(
        machine.ram.number(DATA + 8, 8),
        1 << 63,
        "MM7: the significand of 1.0"
    );
    same!(machine.ram.number(DATA + 20, 2) & 0x3800, 0, "TOP");
    // #UD with CR0.EM, #NM with CR0.TS.
    for (bit, vector) in [(4, 6), (8, 7)] {
        let machine = Machine::new(mode, guest!("movq mm1, qword ptr [edi]", "hlt"))?;
        machine.set(|state| {
            state.rdi = DEVICE;
            state.cr0 |= bit;
        })?;
        machine.expect(&[fault(vector)])?;
    }
    Ok(())
}

fn masked_moves(mode: Mode) -> Outcome {
    let code = guest!(64:
        "xor ecx, ecx", "mov eax, 7", "xor edx, edx", "xsetbv",
        "vmovdqu ymm1, [rsi]", "vmovdqu ymm2, [rsi + 32]",
        "vmaskmovps [rdi], ymm1, ymm2",
        "vmaskmovpd ymm3, ymm1, [rdi + 64]",
        "vmovdqu [rsi + 64], ymm3", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.cr4 |= 1 << 18;
        state.rdi = DEVICE;
        state.rsi = DATA;
    })?;
    // Elements 1, 2, 3 and 7 of four bytes; 0, 1 and 3 of eight.
    for element in [1, 2, 3, 7] {
        machine.ram.write_u32(DATA + element * 4, 0x8000_0000);
    }
    for byte in 0..32 {
        machine.ram.write(DATA + 32 + byte, &[byte as u8]);
    }
    machine.expect(&[
        write(DEVICE + 4, 8, 0x0b0a_0908_0706_0504),
        write(DEVICE + 12, 4, 0x0f0e_0d0c),
        write(DEVICE + 28, 4, 0x1f1e_1d1c),
        read(DEVICE + 64, 8, 11),
        read(DEVICE + 72, 8, 22),
        read(DEVICE + 88, 8, 44),
        halt(),
    ])?;
    let loaded: Vec<u64> = (0..4)
        .map(|i| machine.ram.number(DATA + 64 + i * 8, 8))
        .collect();
    same!(loaded, vec![11, 22, 0, 44], "YMM3");
    Ok(())
}

/// Descriptors are the processor's own reads: the page with the GDT is out of user code's reach.
fn segment_in_user_mode(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov es, [edi]", "hlt"))?;
    let (at, size) = mode.page_entry(modes::GDT >> 12);
    let entry = machine.ram.number(at, size) & !4;
    machine.ram.write(at, &entry.to_le_bytes()[..size]);
    machine.set(|state| {
        super::enter_user(mode, state);
        state.rdi = DEVICE;
    })?;
    // HLT is not for user code.
    machine.expect(&[
        read(DEVICE, 2, selector::USER_DATA.into()),
        fault_code(13, 0),
    ])?;
    same!(machine.regs()?.es.selector, selector::USER_DATA, "ES");
    Ok(())
}

/// The client maps RAM while a locked instruction waits for it: the update is the driver's own, by a locked
/// instruction of the host. Aligned, unaligned, 16 bytes; across a cache line and across a page it is the
/// processor's again.
fn locks_when_ram_appears(mode: Mode) -> Outcome {
    let add = || guest!(64: "lock add dword ptr [rdi], 5", "hlt");
    let exchange = || {
        guest!(64: "mov eax, 1", "xor edx, edx", "mov ebx, 2", "mov ecx, 3",
            "lock cmpxchg16b [rdi]", "hlt")
    };
    let page = RAM_SIZE - 0x2000;
    // Offset, code, what is there, what is to be there.
    let rows: [(u64, crate::code::Code, [u64; 2], [u64; 2]); 7] = [
        (0, add(), [0xffff_fffe, 9], [3, 9]),
        (9, add(), [1, 9], [6, 9]),
        (61, add(), [0x1_ffff_ffff, 9], [0x1_0000_0004, 9]),
        (0xffe, add(), [0x1_fffe_ffff, 9], [0x1_ffff_0004, 9]),
        (16, exchange(), [1, 0], [2, 3]),
        (16, exchange(), [1, 1], [1, 1]),
        (0xff0, exchange(), [1, 0], [2, 3]),
    ];
    for (offset, code, before, after) in rows {
        let machine = Machine::new(mode, code)?;
        let ram = &machine.ram;
        ram.write_u64(page + offset, before[0]);
        ram.write_u64(page + offset + 8, before[1]);
        machine.set(|state| state.rdi = DEVICE + offset)?;
        let exit = machine.run()?;
        anyhow::ensure!(matches!(exit, Exit::Read { .. }), "{exit:?}");
        machine
            .vm
            .set_ram(DEVICE, 0x2000, 0, ram.address() + page)?;
        machine.expect(&[halt()])?;
        let found = [0, 8].map(|at| ram.number(page + offset + at, 8));
        same!(found, after, "at {offset:#x}");
        if after[1] == 3 || before == [1, 1] {
            let state = machine.regs()?;
            let (zero, pair) = (state.rflags & 0x40 != 0, (state.rax, state.rdx));
            same!((zero, pair), (after[1] == 3, (1, before[1])), "ZF, RDX:RAX");
        }
    }
    Ok(())
}

/// #UD, with RIP on the instruction.
fn not_emulated(mode: Mode) -> Outcome {
    for code in [
        guest!("nop", "fld dword ptr [edi]", "hlt"),
        guest!("nop", "addps xmm0, [edi]", "hlt"),
        guest!("nop", "fxsave [edi]", "hlt"),
    ] {
        let machine = Machine::new(mode, code)?;
        machine.set(|state| state.rdi = DEVICE)?;
        machine.expect(&[fault(6)])?;
        same!(
            machine.frame_rip(false)?,
            mode.entry() + 1,
            "RIP in the frame"
        );
    }
    Ok(())
}
