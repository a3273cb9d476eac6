//! Hardware task switches: SDM 8.3 "Task Switching", table 8-1. The driver carries them out; what is asserted
//! here is what the manual says a processor does.

use super::{Case, Outcome};
use crate::exit::{Exit, Step, fault, fault_code, halt, out, vector};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{self, CODE, DATA, IDT, Mode, STACK, selector};
use crate::tasks::{
    GDT, LDT, LDT_SELECTOR, OLD_TSS, SPARE, TASK, TASK_16, TASK_CODE, TASK_STACK, TSS, TSS_16,
    busy, copy_task, descriptor, entry, gate, tasks, write_task_16,
};

pub const CASES: &[Case] = &[
    case!(jump in LEGACY),
    case!(jump_through_a_gate in LEGACY),
    case!(call_and_return in LEGACY),
    case!(call_twice in WIDE32),
    case!(jump_to_16_bits_and_back in LEGACY),
    case!(interrupt_through_a_gate in LEGACY),
    case!(software_interrupt_through_a_gate in LEGACY),
    case!(exception_through_a_gate in LEGACY),
    case!(error_code_on_a_16_bit_stack in WIDE32),
    case!(double_fault_task in LEGACY),
    case!(other_page_tables in PAGED32),
    case!(local_descriptors in WIDE32),
    case!(virtual_8086_task in LEGACY),
    case!(trap_flag_of_the_task in WIDE32),
    case!(fault_in_the_old_task in PAGED32),
    case!(faults_in_the_new_task in WIDE32),
    case!(fault_of_an_event_is_external in WIDE32),
    case!(pairs_of_exceptions in WIDE32),
    case!(return_to_a_task_that_is_not_busy in WIDE32),
    case!(debug_registers in WIDE32),
    case!(rom_descriptors in WIDE32),
];

/// `jmp selector:0`, then HLT.
macro_rules! far {
    ($opcode:literal, $selector:literal) => {
        guest!(32: $opcode, ".long 0", $selector, "mov al, 0x77", "out 0x81, al", "hlt")
    };
}

const OUT_AND_HALT: &[u8] = &[0xe6, 0x80, 0xf4];

fn check_jump(machine: &Machine) -> Outcome {
    machine.expect(&[out(0x80, 1, 0x11), halt()])?;
    let state = machine.regs()?;
    same!(state.rip, TASK_CODE + 3, "RIP");
    same!(state.rcx, 0x2222_2222, "ECX");
    same!(state.rdi, 0x8888_8888, "EDI");
    same!(state.rsp, TASK_STACK, "ESP");
    same!(state.tr.selector, TSS, "TR");
    same!(
        (state.tr.base, state.tr.limit, state.tr.ar & 0xff),
        (TASK, 0x67, 0x8b),
        "TR's hidden part"
    );
    same!(
        (state.fs.selector, state.fs.ar & 1 << 16),
        (0, 1 << 16),
        "FS is null"
    );
    same!(
        (state.gs.selector, state.gs.ar),
        (selector::DATA, 0xc093),
        "GS"
    );
    same!(state.rflags & 0x4000, 0, "NT");
    same!(state.cr0 & 8, 8, "CR0.TS");
    same!(busy(machine, selector::TSS), false, "the old task is busy");
    same!(busy(machine, TSS), true, "the new task is busy");
    let ram = &machine.ram;
    same!(ram.u32(OLD_TSS + 0x20), CODE as u32 + 7, "saved EIP");
    same!(ram.u32(OLD_TSS + 0x24), 2, "saved EFLAGS");
    same!(ram.u32(OLD_TSS + 0x34), 0xbbbb_0001, "saved EBX");
    same!(ram.u32(OLD_TSS + 0x38), STACK as u32, "saved ESP");
    same!(ram.u32(OLD_TSS + 0x3c), 0xbbbb_0002, "saved EBP");
    same!(
        ram.u32(OLD_TSS + 0x4c),
        u32::from(selector::CODE32),
        "saved CS"
    );
    same!(
        ram.u32(OLD_TSS + 0x5c),
        u32::from(selector::DATA),
        "saved GS"
    );
    same!(ram.u32(OLD_TSS) & 0xffff, 0, "link of the old task");
    Ok(())
}

fn jump(mode: Mode) -> Outcome {
    check_jump(&tasks(
        mode,
        far!(".byte 0xea", ".word 0x60"),
        OUT_AND_HALT,
    )?)
}

fn jump_through_a_gate(mode: Mode) -> Outcome {
    check_jump(&tasks(
        mode,
        far!(".byte 0xea", ".word 0x68"),
        OUT_AND_HALT,
    )?)
}

fn call_and_return(mode: Mode) -> Outcome {
    // pushfd; pop eax; out 0x80, eax; iretd
    let code = &[0x9c, 0x58, 0xe7, 0x80, 0xcf];
    let machine = tasks(mode, far!(".byte 0x9a", ".word 0x60"), code)?;
    machine.expect(&[out(0x80, 4, 0x4002)])?;
    same!(
        machine.ram.u32(TASK) & 0xffff,
        u32::from(selector::TSS),
        "link"
    );
    same!(
        (busy(&machine, selector::TSS), busy(&machine, TSS)),
        (true, true),
        "busy"
    );
    machine.expect(&[out(0x81, 1, 0x77), halt()])?;
    let state = machine.regs()?;
    same!(state.tr.selector, selector::TSS, "TR");
    same!((state.rbx, state.rsp), (0xbbbb_0001, STACK), "EBX and ESP");
    same!(state.rflags & 0x4000, 0, "NT");
    same!(
        (busy(&machine, selector::TSS), busy(&machine, TSS)),
        (true, false),
        "busy after IRET"
    );
    // IRET saved its task, without NT.
    same!(
        machine.ram.u32(TASK + 0x20),
        TASK_CODE as u32 + 5,
        "saved EIP"
    );
    same!(machine.ram.u32(TASK + 0x24), 2, "saved EFLAGS");
    same!(machine.ram.u32(TASK + 0x28), 0x4002, "saved EAX");
    Ok(())
}

/// The second call goes on behind the IRET.
fn call_twice(mode: Mode) -> Outcome {
    let first = guest!(32:
        ".byte 0x9a", ".long 0", ".word 0x60",
        ".byte 0x9a", ".long 0", ".word 0x60",
        "hlt");
    let code = &[0xe6, 0x80, 0xcf, 0xe6, 0x82, 0xcf];
    let machine = tasks(mode, first, code)?;
    machine.expect(&[out(0x80, 1, 0x11), out(0x82, 1, 0x11), halt()])
}

fn jump_to_16_bits_and_back(mode: Mode) -> Outcome {
    // out 0x80, ax; jmp far 0x38:0
    let code = &[0xe7, 0x80, 0xea, 0, 0, 0x38, 0];
    let machine = tasks(mode, far!(".byte 0xea", ".word 0x70"), code)?;
    write_task_16(&machine, 0x1000);
    machine.expect(&[out(0x80, 2, 0x1111)])?;
    let state = machine.regs()?;
    same!(state.tr.ar & 0xff, 0x83, "TR's type");
    same!(
        (state.rcx & 0xffff, state.rsp & 0xffff),
        (0x2222, TASK_STACK & 0xffff),
        "CX and SP"
    );
    same!(state.fs.ar & 1 << 16, 1 << 16, "FS");
    same!(state.cs.ar & 0x4000, 0, "CS.D");
    // Its descriptor has been accessed.
    same!(
        machine.ram.number(entry(SPARE) + 5, 1),
        0x9b,
        "the code descriptor"
    );
    machine.expect(&[out(0x81, 1, 0x77), halt()])?;
    same!(machine.ram.number(TASK_16 + 0x0e, 2), 0x1007, "saved IP");
    same!(
        machine.ram.number(TASK_16 + 0x24, 2),
        u64::from(SPARE),
        "saved CS"
    );
    same!(
        (busy(&machine, selector::TSS), busy(&machine, TSS_16)),
        (true, false),
        "busy"
    );
    Ok(())
}

fn interrupt_through_a_gate(mode: Mode) -> Outcome {
    let first = guest!(32: "sti", "in al, 0x70", "mov al, 0x55", "out 0x81, al", "hlt");
    let machine = tasks(mode, first, &[0xe6, 0x80, 0xcf])?;
    gate(&machine, 0x40, TSS);
    machine.expect(&[crate::exit::input(0x70, 1, 0)])?;
    machine.vcpu.interrupt(0x40)?;
    machine.expect(&[out(0x80, 1, 0x11), out(0x81, 1, 0x55), halt()])?;
    // It came once, with the flags as they were.
    same!(machine.regs()?.rflags & 0x4200, 0x200, "IF and NT");
    same!(busy(&machine, TSS), false, "busy");
    Ok(())
}

fn software_interrupt_through_a_gate(mode: Mode) -> Outcome {
    let first = guest!(32: "int 0x41", "mov al, 0x55", "out 0x81, al", "hlt");
    let machine = tasks(mode, first, &[0xe6, 0x80, 0xcf])?;
    gate(&machine, 0x41, TSS);
    machine.expect(&[out(0x80, 1, 0x11)])?;
    same!(
        machine.ram.u32(OLD_TSS + 0x20),
        CODE as u32 + 2,
        "saved EIP"
    );
    machine.expect(&[out(0x81, 1, 0x55), halt()])
}

fn exception_through_a_gate(mode: Mode) -> Outcome {
    let first = guest!(32: "mov eax, 0x1000", "mov es, eax", "mov al, 0x55", "out 0x81, al", "hlt");
    // pop eax; out 0x80, eax; iretd
    let machine = tasks(mode, first, &[0x58, 0xe7, 0x80, 0xcf])?;
    gate(&machine, 13, TSS);
    machine.expect(&[out(0x80, 4, 0x1000)])?;
    same!(machine.regs()?.rsp, TASK_STACK, "ESP after POP");
    same!(
        machine.ram.u32(OLD_TSS + 0x20),
        CODE as u32 + 5,
        "saved EIP"
    );
    // A fault's saved EFLAGS have RF: SDM 18.3.1.1.
    same!(
        machine.ram.u32(OLD_TSS + 0x24) & 0x1_0000,
        0x1_0000,
        "saved RF"
    );
    // The old task gets a selector that works.
    machine.ram.write_u32(OLD_TSS + 0x28, selector::DATA.into());
    machine.expect(&[out(0x81, 1, 0x55), halt()])
}

fn error_code_on_a_16_bit_stack(mode: Mode) -> Outcome {
    let first = guest!(32: "mov eax, 0x1000", "mov es, eax", "hlt");
    // pop ax; out 0x80, ax; hlt
    let machine = tasks(mode, first, &[0x58, 0xe7, 0x80, 0xf4])?;
    write_task_16(&machine, 0x1000);
    gate(&machine, 13, TSS_16);
    machine.expect(&[out(0x80, 2, 0x1000), halt()])?;
    same!(
        machine.regs()?.rsp & 0xffff,
        TASK_STACK & 0xffff,
        "SP after POP"
    );
    Ok(())
}

/// What task gates are still used for: a #DF whose stack is bad.
fn double_fault_task(mode: Mode) -> Outcome {
    let first =
        guest!(32: "mov esp, 0xd0000", "xor eax, eax", "mov ds, eax", "mov eax, [eax]", "hlt");
    let machine = tasks(mode, first, &[0x58, 0xe7, 0x80, 0xf4])?;
    gate(&machine, 8, TSS);
    // #GP through a gate whose code segment is not there.
    machine.ram.write_u64(IDT + 13 * 8, 0x0000_8e00_0ff8_0000);
    machine.expect(&[out(0x80, 4, 0), halt()])?;
    same!(machine.regs()?.tr.selector, TSS, "TR");
    Ok(())
}

/// CR3 of the new task: another page behind the same address.
fn other_page_tables(mode: Mode) -> Outcome {
    // mov eax, [0xd800]; out 0x80, eax; iretd
    let code = &[0xa1, 0x00, 0xd8, 0, 0, 0xe7, 0x80, 0xcf];
    let first = guest!(32:
        ".byte 0x9a", ".long 0", ".word 0x60",
        "mov eax, dword ptr [0xd800]", "out 0x81, eax", "hlt");
    let machine = tasks(mode, first, code)?;
    let ram = &machine.ram;
    ram.write_u32(0xd800, 1);
    ram.write_u32(0x2_0800, 2);
    // Copies of the tables at 3_0000h; page dh leads to 2_0000h.
    let copy = |from: u64, to: u64| {
        ram.write(to, &ram.read(from, 4096));
    };
    let root = if mode == Mode::Pae {
        copy(modes::PDPT_PAE, 0x3_0000);
        copy(modes::PD, 0x3_1000);
        let (entry, _) = mode.page_entry(0);
        copy(entry, 0x3_2000);
        ram.write_u64(0x3_0000, 0x3_1001);
        ram.write_u64(0x3_1000, 0x3_2067);
        ram.write_u64(0x3_2000 + 0xd * 8, 0x2_0067);
        0x3_0000
    } else {
        let (entry, _) = mode.page_entry(0);
        copy(machine.regs()?.cr3, 0x3_1000);
        copy(entry, 0x3_2000);
        ram.write_u32(0x3_1000, 0x3_2067);
        ram.write_u32(0x3_2000 + 0xd * 4, 0x2_0067);
        0x3_1000
    };
    ram.write_u32(TASK + 0x1c, root);
    let before = machine.regs()?.cr3;
    // IRET goes back to the CR3 in the old TSS, which no switch writes.
    ram.write_u32(OLD_TSS + 0x1c, before as u32);
    machine.expect(&[out(0x80, 4, 2)])?;
    same!(machine.regs()?.cr3, u64::from(root), "CR3");
    machine.expect(&[out(0x81, 4, 1), halt()])
}

fn local_descriptors(mode: Mode) -> Outcome {
    // mov eax, [0]; out 0x80, eax; hlt
    let code = &[0xa1, 0, 0, 0, 0, 0xe7, 0x80, 0xf4];
    let machine = tasks(mode, far!(".byte 0xea", ".word 0x60"), code)?;
    let ram = &machine.ram;
    ram.write_u32(TASK + 0x60, LDT_SELECTOR.into());
    ram.write_u64(LDT + 8, descriptor(0xd900, 0xff, 0x92));
    ram.write_u32(TASK + 0x54, 0xc); // DS: the local table's first
    ram.write_u32(0xd900, 0x4c44_5421);
    machine.expect(&[out(0x80, 4, 0x4c44_5421), halt()])?;
    let state = machine.regs()?;
    same!(
        (state.ldt.selector, state.ldt.base, state.ldt.limit),
        (LDT_SELECTOR, LDT, 0x1f),
        "LDTR"
    );
    same!(
        (state.ds.base, state.ds.limit, state.ds.ar & 0xff),
        (0xd900, 0xff, 0x93),
        "DS"
    );
    Ok(())
}

fn virtual_8086_task(mode: Mode) -> Outcome {
    // mov ax, cs; out 0x80, ax; int 0x42
    let code = &[0x8c, 0xc8, 0xe7, 0x80, 0xcd, 0x42];
    let machine = tasks(mode, far!(".byte 0xea", ".word 0x60"), code)?;
    let ram = &machine.ram;
    ram.write_u32(TASK + 0x24, 0x2_3002); // VM, IOPL 3
    ram.write_u32(TASK + 0x20, 0);
    ram.write_u32(TASK + 0x38, 0x800);
    for (index, value) in [
        0xd00u32,
        (TASK_CODE >> 4) as u32,
        0xd10,
        0xd20,
        0xd30,
        0xd40,
    ]
    .into_iter()
    .enumerate()
    {
        ram.write_u32(TASK + 0x48 + index as u64 * 4, value);
    }
    machine.expect(&[out(0x80, 2, TASK_CODE >> 4)])?;
    let state = machine.regs()?;
    same!(
        (state.cs.base, state.cs.limit, state.cs.ar),
        (TASK_CODE, 0xffff, 0xf3),
        "CS"
    );
    same!(
        (state.es.base, state.gs.base),
        (0xd000, 0xd400),
        "ES and GS"
    );
    machine.expect(&[vector(0x42)])
}

fn trap_flag_of_the_task(mode: Mode) -> Outcome {
    let machine = tasks(mode, far!(".byte 0xea", ".word 0x60"), OUT_AND_HALT)?;
    machine.ram.write_u32(TASK + 0x64, 1);
    machine.expect(&[fault(1)])?;
    same!(machine.frame_rip(false)?, TASK_CODE, "RIP in the frame");
    same!(machine.regs()?.dr6, 0xffff_8ff0, "DR6");
    Ok(())
}

/// The new TSS is in a page that is not there: nothing has changed.
fn fault_in_the_old_task(mode: Mode) -> Outcome {
    let machine = tasks(mode, far!(".byte 0xea", ".word 0x60"), OUT_AND_HALT)?;
    machine
        .ram
        .write_u64(entry(TSS), descriptor(0x4_0000, 0x67, 0x89));
    let (at, size) = mode.page_entry(0x40);
    machine.ram.write(at, &[0; 8][..size]);
    machine.expect(&[fault_code(14, 0)])?;
    let state = machine.regs()?;
    same!(state.cr2, 0x4_0000, "CR2");
    same!(machine.frame_rip(true)?, CODE, "RIP in the frame");
    same!(
        (busy(&machine, selector::TSS), busy(&machine, TSS)),
        (true, false),
        "busy"
    );
    same!(state.tr.selector, selector::TSS, "TR");
    Ok(())
}

/// Each is a change to the new task's TSS, or to a descriptor, and the fault that follows in the new task.
fn faults_in_the_new_task(mode: Mode) -> Outcome {
    let not_present = 0x13;
    let spare = u64::from(SPARE);
    // Offset in the TSS, selector, access byte of SPARE's descriptor, fault.
    let table: [(u64, u32, u64, Step); 16] = [
        (0x60, 0x7fc, 0, fault_code(10, 0x7fc)),   // LDT in an LDT
        (0x60, 0x7f8, 0, fault_code(10, 0x7f8)),   // LDT beyond the table
        (0x60, 0x10, 0, fault_code(10, 0x10)),     // LDT is data
        (0x60, 0x80, 0x02, fault_code(10, spare)), // LDT not present
        (0x4c, 0, 0, fault_code(10, 0)),           // CS null
        (0x4c, 0x7f8, 0, fault_code(10, 0x7f8)),   // CS beyond the table
        (0x4c, 0x10, 0, fault_code(10, 0x10)),     // CS is data
        (0x4c, 0x80, 0xfb, fault_code(10, spare)), // CS with DPL 3, RPL 0
        (0x4c, 0x80, 0x1b, fault_code(11, spare)), // CS not present
        (0x50, 0, 0, fault_code(10, 0)),           // SS null
        (0x50, 0x80, 0xf3, fault_code(10, spare)), // SS with DPL 3
        (0x50, 0x80, 0x91, fault_code(10, spare)), // SS read only
        (0x50, 0x80, not_present, fault_code(12, spare)), // SS not present
        (0x54, 0x7c, 0, fault_code(10, 0x7c)),     // DS in an LDT that is not there
        (0x54, 0x80, 0x99, fault_code(10, spare)), // DS execute only
        (0x58, 0x80, not_present, fault_code(11, spare)), // FS not present
    ];
    for (at, selector, access, wanted) in table {
        let machine = tasks(mode, far!(".byte 0xea", ".word 0x60"), OUT_AND_HALT)?;
        let ram = &machine.ram;
        // 4 GB flat.
        ram.write_u64(entry(SPARE), 0x00cf_0000_0000_ffff | access << 40);
        ram.write_u32(TASK + at, selector);
        // A stack of the new task's may not be there: the handlers of these faults are tasks' business, so a
        // second task takes them.
        ram.write_u64(entry(0x88), descriptor(DATA + 0x400, 0x67, 0x89));
        copy_task(&machine, DATA + 0x400);
        ram.write(TASK_CODE + 0x100, &[0x58, 0xe7, 0x84, 0xf4]);
        ram.write_u32(DATA + 0x420, TASK_CODE as u32 + 0x100);
        let Exit::Exception { vector, error } = wanted.exit else {
            anyhow::bail!("the table is wrong");
        };
        gate(&machine, vector.into(), 0x88);
        machine
            .expect(&[out(0x84, 4, error.unwrap_or_default())])
            .map_err(|e| {
                e.context(format!(
                    "selector {selector:#x} at {at:#x}, access {access:#x}"
                ))
            })?;
        // In the new task, whose state was saved in turn.
        same!(machine.regs()?.tr.selector, 0x88, "TR");
        same!(ram.u32(DATA + 0x400) & 0xffff, u32::from(TSS), "link");
        same!(
            ram.u32(TASK + 0x20),
            TASK_CODE as u32,
            "EIP of the new task"
        );
        same!(ram.u32(TASK + at) & 0xffff, selector, "the selector");
        same!(
            (busy(&machine, selector::TSS), busy(&machine, TSS)),
            (false, true),
            "busy"
        );
    }
    // EIP beyond CS.
    let machine = tasks(mode, far!(".byte 0xea", ".word 0x60"), OUT_AND_HALT)?;
    machine
        .ram
        .write_u64(entry(SPARE), descriptor(0, 0xffff, 0x409b));
    machine.ram.write_u64(entry(SPARE), 0x0040_9b00_0000_ffff);
    machine.ram.write_u32(TASK + 0x4c, SPARE.into());
    machine.expect(&[fault_code(13, 0)])?;
    same!(machine.frame_rip(true)?, TASK_CODE, "RIP in the frame");
    Ok(())
}

/// The fault of a switch that an interrupt brings has EXT in its error code; one that INT brings has not.
fn fault_of_an_event_is_external(mode: Mode) -> Outcome {
    for external in [false, true] {
        let first = if external {
            guest!(32: "sti", "in al, 0x70", "hlt")
        } else {
            guest!(32: "in al, 0x70", "int 0x43", "hlt")
        };
        let machine = tasks(mode, first, OUT_AND_HALT)?;
        machine.ram.write_u32(TASK + 0x54, 0x7f8); // DS
        gate(&machine, 0x43, TSS);
        machine.expect(&[crate::exit::input(0x70, 1, 0)])?;
        if external {
            machine.vcpu.interrupt(0x43)?;
        }
        machine.expect(&[fault_code(10, 0x7f8 | u64::from(external))])?;
    }
    Ok(())
}

/// SDM table 6-5: a fault while another exception is delivered. The driver raises the second, because
/// the task's DS is none.
fn pairs_of_exceptions(mode: Mode) -> Outcome {
    let general = || guest!(32: "xor eax, eax", "mov ds, eax", "mov eax, [eax]");
    let page = || guest!(32: "mov eax, 0x80000000", "mov eax, [eax]");
    let benign = fault_code(10, 0x7f8 | 1);
    let double = fault_code(8, 0);
    // The first exception's vector and the code that raises it, and what becomes of it.
    let mut rows = vec![
        (6, guest!(32: "ud2"), benign),
        (13, general(), double.clone()),
    ];
    if mode == Mode::Pae {
        rows.push((14, page(), double));
    }
    for (first, code, wanted) in rows {
        let machine = tasks(mode, code, OUT_AND_HALT)?;
        machine.ram.write_u32(TASK + 0x54, 0x7f8);
        gate(&machine, first, TSS);
        machine.expect(&[wanted])?;
    }
    // A fault of the double fault's own task.
    let machine = tasks(mode, general(), OUT_AND_HALT)?;
    machine.ram.write_u32(TASK + 0x54, 0x7f8);
    machine.ram.write_u64(IDT + 13 * 8, 0x0000_8e00_0ff8_0000);
    gate(&machine, 8, TSS);
    machine.expect(&[crate::exit::lost()])
}

fn return_to_a_task_that_is_not_busy(mode: Mode) -> Outcome {
    let first = guest!(32: "pushfd", "or dword ptr [esp], 0x4000", "popfd", "iretd");
    let machine = tasks(mode, first, OUT_AND_HALT)?;
    machine.ram.write_u16(OLD_TSS, TSS);
    machine.expect(&[fault_code(10, TSS.into())])
}

/// A switch clears the local breakpoints and keeps the global ones.
fn debug_registers(mode: Mode) -> Outcome {
    let machine = tasks(mode, far!(".byte 0xea", ".word 0x60"), OUT_AND_HALT)?;
    machine.set(|state| {
        state.dr0 = 0x9999;
        state.dr7 = 0x400 | 0x303;
    })?;
    machine.expect(&[out(0x80, 1, 0x11), halt()])?;
    same!(machine.regs()?.dr7, 0x602, "DR7");
    Ok(())
}

/// ROM takes the busy flag and forgets it.
fn rom_descriptors(mode: Mode) -> Outcome {
    let machine = tasks(mode, far!(".byte 0xea", ".word 0x60"), OUT_AND_HALT)?;
    let ram = &machine.ram;
    ram.write(0x5_0000, &ram.read(GDT, 256));
    let rom = ram.address() + 0x5_0000;
    machine.vm.set_ram(0x5_0000, 0x1000, 1, rom)?;
    machine.set(|state| state.gdt.base = 0x5_0000)?;
    machine.expect(&[out(0x80, 1, 0x11), halt()])?;
    same!(machine.regs()?.tr.selector, TSS, "TR");
    same!(
        ram.number(0x5_0000 + u64::from(TSS) + 5, 1),
        0x89,
        "the descriptor"
    );
    Ok(())
}
