//! Guest memory: blocks, mappings, aliases, ROM, stand-alone buffers, protection.

use abi::RamFlags;

use super::{Case, Outcome};
use crate::client::{Refused, System, Vm};
use crate::exit::{Exit, halt, out, read, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, HIGH_START, Mode};
use crate::ram::Ram;

pub const CASES: &[Case] = &[
    case!(block_errors),
    case!(alloc_ram_errors),
    case!(map_errors),
    case!(map_must_lie_in_its_block),
    case!(unmap_errors),
    case!(highest_address),
    case!(unknown_flags_are_refused),
    case!(seen_from_both_sides in SIZES),
    case!(every_byte_is_where_it_belongs),
    case!(alias),
    case!(remap_takes_effect in SIZES),
    case!(remap_while_a_guest_used_it),
    case!(unmap_makes_it_device in SIZES),
    case!(split_in_the_middle),
    case!(rom_and_back in SIZES),
    case!(rom_over_ram_and_neighbours),
    case!(standalone_story),
    case!(standalone_overlap),
    case!(standalone_rom),
    case!(standalone_ends_with_its_last_part),
];

const INVALID: u32 = RamFlags::INVALID.bits();
pub const STANDALONE: u32 = RamFlags::STANDALONE.bits();
const ROM: u32 = RamFlags::ROM.bits();

pub const fn einval() -> Result<(), Refused> {
    Err(Refused(libc::EINVAL))
}

fn vm() -> anyhow::Result<Vm> {
    Ok(System::open()?.create_vm()?)
}

fn block_errors() -> Outcome {
    let vm = vm()?;
    let ram = Ram::new(0x10000);
    let at = ram.address();
    for (start, size) in [
        (0, 0x1000),
        (at, 0),
        (at + 1, 0x1000),
        (at, 0xfff),
        (u64::MAX - 0xfff, 0x2000),
    ] {
        same!(
            vm.add_ramblock(start, size),
            einval(),
            "{start:#x} + {size:#x}"
        );
    }
    vm.add_ramblock(at + 0x4000, 0x4000)?;
    for (start, size) in [
        (at, 0x5000),
        (at + 0x4000, 0x4000),
        (at + 0x7000, 0x2000),
        (at, 0x10000),
    ] {
        same!(
            vm.add_ramblock(start, size),
            einval(),
            "overlap {start:#x} + {size:#x}"
        );
    }
    vm.add_ramblock(at, 0x4000)?;
    vm.add_ramblock(at + 0x8000, 0x8000)?;
    Ok(())
}

fn alloc_ram_errors() -> Outcome {
    let vm = vm()?;
    let ram = Ram::new(0x8000);
    same!(vm.alloc_ram(0, 0x1000), einval(), "address 0");
    same!(vm.alloc_ram(ram.address(), 0), einval(), "size 0");
    vm.alloc_ram(ram.address(), 0x8000)?;
    same!(vm.alloc_ram(ram.address(), 0x8000), einval(), "twice");
    vm.set_ram(0, 0x8000, 0, ram.address())?;
    Ok(())
}

fn map_errors() -> Outcome {
    let vm = vm()?;
    let ram = Ram::new(0x10000);
    let at = ram.address();
    same!(vm.set_ram(0, 0x1000, 0, at), einval(), "no block");
    vm.add_ramblock(at, 0x10000)?;
    for (gpa, size, va) in [
        (0, 0, at),
        (0, 0x1000, 0),
        (0x123, 0x1000, at),
        (0, 0x1001, at),
        (0, 0x800, at),
        (0, 0x1000, at + 0x10),
        (u64::MAX - 0xfff, 0x2000, at),
    ] {
        same!(
            vm.set_ram2(gpa, size, 0, va),
            einval(),
            "{gpa:#x} {size:#x} {va:#x}"
        );
    }
    vm.set_ram2(0, 0x10000, 0, at)?;
    Ok(())
}

fn map_must_lie_in_its_block() -> Outcome {
    let vm = vm()?;
    let ram = Ram::new(0x10000);
    let at = ram.address();
    vm.add_ramblock(at, 0x4000)?;
    vm.add_ramblock(at + 0x4000, 0x4000)?;
    same!(
        vm.set_ram2(0, 0x5000, 0, at),
        einval(),
        "out of the first block into the second"
    );
    same!(
        vm.set_ram2(0, 0x5000, 0, at + 0x4000),
        einval(),
        "out of the second"
    );
    same!(
        vm.set_ram2(0, 0x1000, 0, at + 0x8000),
        einval(),
        "behind both"
    );
    vm.set_ram2(0, 0x4000, 0, at)?;
    vm.set_ram2(0x4000, 0x4000, 0, at + 0x4000)?;
    Ok(())
}

fn unmap_errors() -> Outcome {
    let vm = vm()?;
    let ram = Ram::new(0x4000);
    vm.add_ramblock(ram.address(), 0x4000)?;
    same!(
        vm.set_ram2(0, 0x1000, INVALID, ram.address()),
        einval(),
        "with an address"
    );
    same!(
        vm.set_ram2(0, 0x1000, INVALID | ROM, 0),
        einval(),
        "with ROM"
    );
    same!(
        vm.set_ram2(0, 0x1000, INVALID | STANDALONE, 0),
        einval(),
        "with STANDALONE"
    );
    same!(vm.set_ram2(0, 0, INVALID, 0), einval(), "size 0");
    vm.unmap(0x1234_5000, 0x1000)?;
    vm.set_ram(0x4000, 0x1000, INVALID as u8, 0)?;
    Ok(())
}

fn highest_address() -> Outcome {
    let vm = vm()?;
    let ram = Ram::new(0x2000);
    vm.add_ramblock(ram.address(), 0x2000)?;
    same!(
        vm.set_ram2(1 << 43, 0x1000, 0, ram.address()),
        einval(),
        "at 8 TB"
    );
    same!(
        vm.set_ram2(1 << 52, 0x1000, 0, ram.address()),
        einval(),
        "at 2^52"
    );
    same!(
        vm.set_ram2(u64::MAX << 12, 0x1000, 0, ram.address()),
        einval(),
        "at the end"
    );
    Ok(())
}

fn unknown_flags_are_refused() -> Outcome {
    let vm = vm()?;
    let ram = Ram::new(0x2000);
    vm.add_ramblock(ram.address(), 0x2000)?;
    for bit in (0..32).filter(|bit| !matches!(bit, 0 | 6 | 7)) {
        let result = vm.set_ram2(0, 0x2000, 1 << bit, ram.address());
        same!(result, einval(), "flag bit {bit}");
    }
    Ok(())
}

/// In the middle of a slot whose other pages are there too.
fn seen_from_both_sides(mode: Mode) -> Outcome {
    const AT: u64 = 0x15_0000;
    let code = guest!(
        "mov eax, [edi]",
        "add eax, 1",
        "mov [edi + 4], eax",
        "out 0x80, al",
        "mov eax, [edi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.fill(HIGH_START, 0x8_0000, 0x5a);
    machine.ram.write_u32(AT, 0x41);
    machine.set(|state| state.rdi = AT)?;
    machine.expect(&[out(0x80, 1, 0x42)])?;
    same!(machine.ram.u32(AT + 4), 0x42, "what the guest wrote");
    machine.ram.write_u32(AT, 0x99);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0x99, "what the client wrote");
    Ok(())
}

/// The guest writes a pattern over a megabyte; every byte is compared; then the other way round.
fn every_byte_is_where_it_belongs() -> Outcome {
    let code = guest!(64:
        "mov edi, 0x100000", "mov ecx, 0x20000", "mov rax, 0x9e3779b97f4a7c15", "mov rbx, rax",
        "2: mov [rdi], rax", "add rax, rbx", "add rdi, 8", "dec ecx", "jnz 2b", "out 0x80, al",
        "mov edi, 0x100000", "mov ecx, 0x20000", "xor eax, eax",
        "2: rol rax, 7", "xor rax, [rdi]", "add rdi, 8", "dec ecx", "jnz 2b", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    let exit = machine.run()?;
    anyhow::ensure!(matches!(exit, Exit::Out { .. }), "{exit:?}");
    let step = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes = machine.ram.read(0x100000, 0x100000);
    let mut wanted = step;
    for (index, found) in bytes.chunks_exact(8).enumerate() {
        let found = u64::from_le_bytes(found.try_into()?);
        same!(found, wanted, "at {:#x}", 0x100000 + index * 8);
        wanted = wanted.wrapping_add(step);
    }
    let mut sum = 0_u64;
    let mut value = 1_u64;
    let mut text = Vec::with_capacity(0x100000);
    for _ in 0..0x20000 {
        value = value
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        text.extend(value.to_le_bytes());
        sum = sum.rotate_left(7) ^ value;
    }
    machine.ram.write(0x100000, &text);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, sum, "sum of what the client wrote");
    Ok(())
}

/// One page of the buffer at three addresses, two of them side by side.
fn alias() -> Outcome {
    let code = guest!(64: "mov dword ptr [rdi], 0x1234", "mov eax, [rsi]", "mov ebx, [rsi + 0x1000]", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    let second = 0x30_0000;
    for gpa in [second, second + 0x1000] {
        let va = machine.ram.address() + DATA;
        machine.vm.set_ram(gpa, 0x1000, 0, va)?;
    }
    machine.set(|state| {
        state.rdi = DATA + 8;
        state.rsi = second + 8;
    })?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!((state.rax, state.rbx), (0x1234, 0x1234), "EAX and EBX");
    same!(machine.ram.u32(DATA + 8), 0x1234, "buffer");
    Ok(())
}

/// Reads DATA twice, with an exit between.
fn reading_twice() -> crate::code::Code {
    guest!(
        "mov eax, [edi]",
        "out 0x80, al",
        "mov eax, [edi]",
        "out 0x80, al",
        "hlt"
    )
}

fn remap_takes_effect(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, reading_twice())?;
    let other = Ram::new(0x1000);
    machine.vm.add_ramblock(other.address(), 0x1000)?;
    machine.ram.write_u32(DATA, 0x11);
    other.write_u32(0, 0x22);
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[out(0x80, 1, 0x11)])?;
    machine.vm.set_ram(DATA, 0x1000, 0, other.address())?;
    machine.expect(&[out(0x80, 1, 0x22), halt()])?;
    same!(machine.ram.u32(DATA), 0x11, "the first buffer");
    Ok(())
}

/// The same page over and over between two buffers, and its writes go to the right one.
fn remap_while_a_guest_used_it() -> Outcome {
    let code = guest!(64: "2: inc dword ptr [rdi]", "out 0x80, al", "jmp 2b");
    let machine = Machine::new(Mode::Long, code)?;
    let other = Ram::new(0x1000);
    machine.vm.add_ramblock(other.address(), 0x1000)?;
    machine.set(|state| state.rdi = DATA)?;
    for round in 0..50_u32 {
        let (va, _) = (other.address(), round);
        machine.vm.set_ram(DATA, 0x1000, 0, va)?;
        machine.expect(&[out(0x80, 1, 0)])?;
        same!(
            (other.u32(0), machine.ram.u32(DATA)),
            (round + 1, 2 * round),
            "counts"
        );
        machine
            .vm
            .set_ram(DATA, 0x1000, 0, machine.ram.address() + DATA)?;
        machine.expect(&[out(0x80, 1, 0), out(0x80, 1, 0)])?;
        same!(machine.ram.u32(DATA), 2 * round + 2, "the first buffer");
    }
    Ok(())
}

fn unmap_makes_it_device(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, reading_twice())?;
    machine.ram.write_u32(DATA, 0x33);
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[out(0x80, 1, 0x33)])?;
    machine.vm.unmap(DATA, 0x1000)?;
    machine.expect(&[read(DATA, 4, 0x44), out(0x80, 1, 0x44), halt()])
}

fn split_in_the_middle() -> Outcome {
    let code = guest!(64: "mov al, [rdi - 1]", "mov bl, [rdi]", "mov cl, [rdi + 0xfff]", "mov dl, [rdi + 0x1000]", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    let at = 0x120000;
    machine.ram.write(at - 1, &[1]);
    machine.ram.write(at + 0x1000, &[4]);
    machine.vm.unmap(at, 0x1000)?;
    machine.set(|state| state.rdi = at)?;
    machine.expect(&[read(at, 1, 2), read(at + 0xfff, 1, 3), halt()])?;
    let state = machine.regs()?;
    same!(
        [state.rax, state.rbx, state.rcx, state.rdx],
        [1, 2, 3, 4],
        "bytes"
    );
    Ok(())
}

fn rom_and_back(mode: Mode) -> Outcome {
    let code = guest!(
        "mov byte ptr [edi], 1",
        "out 0x80, al",
        "mov byte ptr [edi], 2",
        "out 0x80, al",
        "mov byte ptr [edi], 3",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let va = machine.ram.address() + DATA;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vm.set_ram(DATA, 0x1000, ROM as u8, va)?;
    machine.expect(&[write(DATA, 1, 2), out(0x80, 1, 0)])?;
    same!(machine.ram.read(DATA, 1), vec![1], "ROM");
    machine.vm.set_ram(DATA, 0x1000, 0, va)?;
    machine.expect(&[halt()])?;
    same!(machine.ram.read(DATA, 1), vec![3], "RAM again");
    Ok(())
}

/// QEMU's pattern: ROM on top of RAM, whose parts before and behind stay.
fn rom_over_ram_and_neighbours() -> Outcome {
    let code = guest!(64: "mov byte ptr [rdi - 1], 5", "mov byte ptr [rdi], 6", "mov byte ptr [rdi + 0x2000], 7", "mov al, [rdi]", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    let rom = Ram::new(0x2000);
    rom.fill(0, 0x2000, 0x99);
    machine.vm.add_ramblock(rom.address(), 0x2000)?;
    let at = 0x140000;
    machine.vm.set_ram(at, 0x2000, ROM as u8, rom.address())?;
    machine.set(|state| state.rdi = at)?;
    machine.expect(&[write(at, 1, 6), halt()])?;
    same!(machine.regs()?.rax, 0x99, "AL");
    same!(machine.ram.read(at - 1, 1), vec![5], "before");
    same!(machine.ram.read(at + 0x2000, 1), vec![7], "behind");
    same!(machine.ram.read(at, 1), vec![0], "below");
    Ok(())
}

/// Buffers that come and go: map, unmap, and another whose addresses overlap the first.
fn standalone_story() -> Outcome {
    let code = guest!(64: "2: mov eax, [rdi]", "out 0x80, al", "jmp 2b");
    let machine = Machine::new(Mode::Long, code)?;
    let area = Ram::new(0x20000);
    let gpa = 0x30_0000;
    machine.set(|state| state.rdi = gpa)?;
    for round in 0..20_u64 {
        let start = (round % 4) * 0x1000;
        let size = 0x8000 + (round % 3) * 0x1000;
        area.write_u32(start, round as u32 + 1);
        machine
            .vm
            .set_ram2(gpa, size, STANDALONE, area.address() + start)?;
        machine.expect(&[out(0x80, 1, round + 1)])?;
        machine.vm.unmap(gpa, size)?;
    }
    machine.expect(&[read(gpa, 4, 0x55), out(0x80, 1, 0x55)])
}

fn standalone_overlap() -> Outcome {
    let vm = vm()?;
    let ram = Ram::new(0x10000);
    let at = ram.address();
    vm.set_ram2(0x10_0000, 0x4000, STANDALONE, at)?;
    same!(
        vm.set_ram2(0x20_0000, 0x4000, STANDALONE, at),
        einval(),
        "the same buffer twice"
    );
    same!(
        vm.set_ram2(0x20_0000, 0x4000, STANDALONE, at + 0x3000),
        einval(),
        "overlapping"
    );
    same!(
        vm.add_ramblock(at, 0x10000),
        einval(),
        "ADD_RAMBLOCK over it"
    );
    vm.set_ram2(0x20_0000, 0x4000, STANDALONE, at + 0x4000)?;
    // A plain mapping into it keeps it.
    vm.set_ram2(0x30_0000, 0x1000, 0, at)?;
    vm.unmap(0x10_0000, 0x4000)?;
    same!(
        vm.set_ram2(0x10_0000, 0x4000, STANDALONE, at),
        einval(),
        "still in use"
    );
    vm.unmap(0x30_0000, 0x1000)?;
    vm.set_ram2(0x10_0000, 0x4000, STANDALONE, at)?;
    Ok(())
}

fn standalone_rom() -> Outcome {
    let code = guest!(64: "mov eax, [rdi]", "mov [rdi], ebx", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    let rom = Ram::new(0x1000);
    rom.write_u32(0, 0x77);
    let gpa = 0x30_0000;
    machine
        .vm
        .set_ram2(gpa, 0x1000, STANDALONE | ROM, rom.address())?;
    machine.set(|state| state.rdi = gpa)?;
    machine.expect(&[write(gpa, 4, 0), halt()])?;
    same!(
        (machine.regs()?.rax, rom.u32(0)),
        (0x77, 0x77),
        "EAX and ROM"
    );
    Ok(())
}

fn standalone_ends_with_its_last_part() -> Outcome {
    let vm = vm()?;
    let ram = Ram::new(0x4000);
    vm.set_ram2(0x10_0000, 0x4000, STANDALONE, ram.address())?;
    vm.unmap(0x10_1000, 0x1000)?;
    vm.unmap(0x10_0000, 0x1000)?;
    same!(
        vm.add_ramblock(ram.address(), 0x1000),
        einval(),
        "two pages are left"
    );
    vm.unmap(0x10_2000, 0x2000)?;
    vm.add_ramblock(ram.address(), 0x1000)?;
    Ok(())
}
