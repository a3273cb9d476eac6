//! Two tasks for hardware task switches: the one that runs, and another of 32 or 16 bits, with their TSSs, descriptors
//! and gates.

use anyhow::Result;

use crate::code::Code;
use crate::machine::Machine;
use crate::modes::{CODE, DATA, IDT, Mode, RING0_STACK, selector};

pub const GDT: u64 = 0x1000;
pub const OLD_TSS: u64 = 0xb000;
/// The other task: 32 bits, and 16 bits.
pub const TASK: u64 = DATA;
pub const TASK_16: u64 = DATA + 0x200;
pub const LDT: u64 = DATA + 0x300;
/// Its code and stack.
pub const TASK_CODE: u64 = CODE + 0x1000;
pub const TASK_STACK: u64 = DATA + 0xf00;
/// Selectors beyond those of every case.
pub const TSS: u16 = 0x60;
pub const GATE: u16 = 0x68;
pub const TSS_16: u16 = 0x70;
pub const LDT_SELECTOR: u16 = 0x78;
pub const SPARE: u16 = 0x80;

/// A descriptor of `base`, `limit` and bits 47:40.
pub fn descriptor(base: u64, limit: u64, flags: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | flags << 40
        | (base >> 24) << 56
        | (limit >> 16) << 48
}

/// Where a selector's descriptor is.
pub fn entry(selector: u16) -> u64 {
    GDT + u64::from(selector)
}

/// Two tasks: the one that runs, and one that will run `code`.
pub fn tasks(mode: Mode, first: Code, code: &[u8]) -> Result<Machine> {
    let machine = Machine::new(mode, first)?;
    let ram = &machine.ram;
    ram.write(TASK_CODE, code);
    ram.write_u64(entry(TSS), descriptor(TASK, 0x67, 0x89));
    ram.write_u64(entry(GATE), u64::from(TSS) << 16 | 0x85 << 40);
    ram.write_u64(entry(TSS_16), descriptor(TASK_16, 0x2b, 0x81));
    ram.write_u64(entry(LDT_SELECTOR), descriptor(LDT, 0x1f, 0x82));
    // The task that runs is busy.
    ram.write(entry(selector::TSS) + 5, &[0x8b]);
    let state = machine.regs()?;
    for tss in [OLD_TSS, TASK] {
        ram.write_u32(tss + 0x1c, state.cr3 as u32);
    }
    ram.write_u32(TASK + 0x20, TASK_CODE as u32);
    ram.write_u32(TASK + 0x24, 2);
    for index in 0..8 {
        ram.write_u32(TASK + 0x28 + index * 4, 0x1111_1111 * (index as u32 + 1));
    }
    ram.write_u32(TASK + 0x38, TASK_STACK as u32);
    for (index, value) in [
        selector::DATA,
        selector::CODE32,
        selector::DATA,
        selector::DATA,
        0,
        selector::DATA,
    ]
    .into_iter()
    .enumerate()
    {
        ram.write_u32(TASK + 0x48 + index as u64 * 4, value.into());
    }
    // SS0 and ESP0.
    ram.write_u32(TASK + 4, RING0_STACK as u32);
    ram.write_u32(TASK + 8, selector::DATA.into());
    machine.set(|state| {
        state.gdt.limit = 0xff;
        // An L, an LE and a G bit.
        state.rbx = 0xbbbb_0001;
        state.rbp = 0xbbbb_0002;
    })?;
    Ok(machine)
}

/// Whether a TSS's descriptor says busy.
pub fn busy(machine: &Machine, selector: u16) -> bool {
    machine.ram.number(entry(selector) + 5, 1) & 2 != 0
}

/// The task of 16 bits, which begins at `code` with the other task's stack.
pub fn write_task_16(machine: &Machine, code: u16) {
    let ram = &machine.ram;
    ram.write_u16(TASK_16 + 0x0e, code);
    ram.write_u16(TASK_16 + 0x10, 2);
    for index in 0..8 {
        ram.write_u16(TASK_16 + 0x12 + index * 2, 0x1111 * (index as u16 + 1));
    }
    ram.write_u16(TASK_16 + 0x1a, TASK_STACK as u16);
    // 16-bit code at 1_0000h.
    ram.write_u64(entry(SPARE), descriptor(CODE, 0xffff, 0x9a));
    for (index, value) in [selector::DATA, SPARE, selector::DATA, selector::DATA, 0]
        .into_iter()
        .enumerate()
    {
        ram.write_u16(TASK_16 + 0x22 + index as u64 * 2, value);
    }
}

/// A task gate in the IDT.
pub fn gate(machine: &Machine, number: u64, selector: u16) {
    machine
        .ram
        .write_u64(IDT + number * 8, u64::from(selector) << 16 | 0xe5 << 40);
}

/// A copy of the good parts of the second task.
pub fn copy_task(machine: &Machine, to: u64) {
    let ram = &machine.ram;
    ram.write(to, &ram.read(TASK, 104));
    ram.write_u32(to + 0x60, 0);
    for (index, value) in [
        selector::DATA,
        selector::CODE32,
        selector::DATA,
        selector::DATA,
        0,
        0,
    ]
    .into_iter()
    .enumerate()
    {
        ram.write_u32(to + 0x48 + index as u64 * 4, value.into());
    }
}
