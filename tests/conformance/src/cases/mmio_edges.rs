//! Device memory at its edges: page crossings, ROM, addressing forms, traps, and clients that meddle.

use super::mmio::with;
use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::{Exit, fault, halt, read, write};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, DEVICE, LOW_END, Mode};

pub const CASES: &[Case] = &[
    case!(unaligned_size_4 in SIZES),
    case!(crosses_out_of_ram in SIZES),
    case!(crosses_a_page_of_devices in SIZES),
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

/// An access inside one page is one exit, aligned or not. XCHG does not go the short way.
fn unaligned_size_4(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, [edi + 3]",
        "mov [edi + 5], eax",
        "xchg [edi + 6], eax",
        "hlt"
    );
    let steps = [
        read(DEVICE + 3, 4, 0x12345678),
        write(DEVICE + 5, 4, 0x12345678),
        read(DEVICE + 6, 4, 0x55),
        write(DEVICE + 6, 4, 0x12345678),
        halt(),
    ];
    with(mode, code, &steps).map(drop)
}

/// Two devices may be there: one access for each page.
fn crosses_a_page_of_devices(mode: Mode) -> Outcome {
    let code = guest!("mov eax, [edi]", "mov [edi + 0x2000], eax", "hlt");
    let machine = Machine::with_kernel_code(mode, code)?;
    let at = DEVICE + 0xffe;
    machine.set(|state| state.rdi = at)?;
    machine.expect(&[read(at, 2, 0x2211), read(at + 2, 2, 0x4433)])?;
    // The driver may write either half first.
    let mut halves = [machine.run()?, machine.run()?];
    halves.sort_by_key(|exit| matches!(exit, Exit::Write { value: 0x4433, .. }));
    let half = |gpa, value| Exit::Write {
        gpa,
        size: 2,
        value,
    };
    same!(
        halves,
        [half(at + 0x2000, 0x2211), half(at + 0x2002, 0x4433)],
        "the store's halves"
    );
    machine.expect(&[halt()])
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
            Exit::Read { gpa, size } => {
                let value = 0x4433_u64 >> ((gpa - LOW_END) * 8);
                machine.vcpu.tunnel.set_fast_mmio_value(value);
                seen.push((gpa, size, false, 0));
            }
            Exit::Write { gpa, size, value } => seen.push((gpa, size, true, value)),
            Exit::Halt => break,
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
            Exit::Write { gpa, size, .. } => {
                anyhow::ensure!(gpa >= rom, "write exit at {gpa:#x} size {size}");
            }
            Exit::Halt => break,
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
        == (Exit::Read {
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
    // The next instruction is at 10006h; bfffah more is the device. XCHG does not go the short way.
    let code = guest!(64: "mov eax, [rip + 0xbfffa]", "xchg [rip + 0xbfff8], eax", "hlt");
    let steps = [
        read(DEVICE, 4, 5),
        read(DEVICE + 4, 4, 6),
        write(DEVICE + 4, 4, 5),
        halt(),
    ];
    with(mode, code, &steps).map(drop)
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
