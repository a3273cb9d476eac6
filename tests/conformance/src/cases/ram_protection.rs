//! Memory that the client closes, discards or takes away under a guest.

use super::ram::{STANDALONE, einval};
use super::{Case, Outcome};
use crate::exit::{Exit, halt, out};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, DEVICE, Mode};
use crate::ram::Ram;

pub const CASES: &[Case] = &[
    case!(protect_errors),
    case!(protect_and_open in SIZES),
    case!(protect_write_and_fetch),
    case!(protect_groups),
    case!(protected_tables),
    case!(protected_in_emulation),
    case!(discard_under_the_guest in SIZES),
    case!(munmap_under_the_guest),
    case!(read_only_buffer),
    case!(write_protected_under_the_guest),
    case!(beyond_four_gigabytes in LONG),
    case!(map_from_another_thread),
    case!(many_slots),
];

fn protect_errors() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    for flags in 1..7 {
        same!(
            machine.vm.protect_ram(0, 0x1000, flags),
            einval(),
            "permissions {flags}"
        );
    }
    same!(machine.vm.protect_ram(0, 0, 0), einval(), "size 0");
    same!(
        machine.vm.protect_ram(1 << 40, 0x1000, 0),
        einval(),
        "beyond what was mapped"
    );
    machine.vm.protect_ram(0, 0x1000, 7)?;
    machine.expect(&[halt()])
}

/// PAGEFAULT, again until it is opened, then the guest's access goes through.
fn protect_and_open(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov eax, [edi]", "hlt"))?;
    // Data in another group of 2 MB than the code.
    let (gpa, ram) = other_group(&machine)?;
    ram.write_u32(0x1234, 0x4567);
    machine.set(|state| state.rdi = gpa + 0x1234)?;
    machine.vm.protect_ram(gpa, 0x4000, 0)?;
    let wanted = Exit::PageFault { gpa, flags: 1 };
    same!(machine.run()?, wanted, "exit");
    same!(machine.run()?, wanted, "exit of RUN again");
    machine.vm.protect_ram(gpa, 0x4000, 7)?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0x4567, "EAX");
    Ok(())
}

/// Four pages of RAM at 6 MB.
fn other_group(machine: &Machine) -> anyhow::Result<(u64, Ram)> {
    let ram = Ram::new(0x4000);
    machine.vm.add_ramblock(ram.address(), 0x4000)?;
    machine.vm.set_ram(0x60_0000, 0x4000, 0, ram.address())?;
    Ok((0x60_0000, ram))
}

fn protect_write_and_fetch() -> Outcome {
    for (code, flags) in [
        (guest!(64: "mov [rdi], eax", "hlt"), 2),
        (guest!(64: "jmp rdi"), 4),
        (guest!(64: "mov eax, [rdi]", "hlt"), 1),
    ] {
        let machine = Machine::new(Mode::Long, code)?;
        let (gpa, ram) = other_group(&machine)?;
        ram.write(0, &[0xf4]);
        machine.set(|state| state.rdi = gpa)?;
        machine.vm.protect_ram(gpa, 0x4000, 0)?;
        let exit = machine.run()?;
        let Exit::PageFault {
            gpa: at,
            flags: got,
        } = exit
        else {
            anyhow::bail!("{exit:?}");
        };
        same!((at, got & 7), (gpa, flags), "GPA and access");
        machine.vm.protect_ram(gpa, 0x4000, 7)?;
        machine.expect(&[halt()])?;
    }
    Ok(())
}

/// Any page of a 2 MB group reports the group's first closed page.
fn protect_groups() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "mov eax, [rdi]", "hlt"))?;
    let (gpa, _ram) = other_group(&machine)?;
    machine.set(|state| state.rdi = gpa)?;
    machine.vm.protect_ram(gpa + 0x2000, 0x2000, 0)?;
    let wanted = Exit::PageFault {
        gpa: gpa + 0x2000,
        flags: 1,
    };
    same!(
        machine.run()?,
        wanted,
        "access to an open page of the group"
    );
    machine.vm.protect_ram(gpa + 0x2000, 0x1000, 7)?;
    let wanted = Exit::PageFault {
        gpa: gpa + 0x3000,
        flags: 1,
    };
    same!(machine.run()?, wanted, "the next closed page");
    machine.vm.protect_ram(gpa + 0x3000, 0x1000, 7)?;
    machine.expect(&[halt()])
}

/// Everything is closed, the page tables and the code too: a snapshot that is loaded on demand.
fn protected_tables() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "mov eax, [rdi]", "hlt"))?;
    let (gpa, ram) = other_group(&machine)?;
    ram.write_u32(0, 0x88);
    machine.set(|state| state.rdi = gpa)?;
    machine.vm.protect_ram(0, gpa + 0x4000, 0)?;
    let mut faults = 0;
    loop {
        match machine.run()? {
            Exit::PageFault { gpa, .. } => {
                machine.vm.protect_ram(
                    gpa & !0x1f_ffff,
                    0x20_0000.min(0x60_4000 - (gpa & !0x1f_ffff)),
                    7,
                )?;
                faults += 1;
                anyhow::ensure!(faults < 20, "no end of page faults");
            }
            Exit::Halt => break,
            other => anyhow::bail!("{other:?}"),
        }
    }
    anyhow::ensure!(faults >= 2, "{faults} page faults");
    same!(machine.regs()?.rax, 0x88, "EAX");
    Ok(())
}

/// Closed memory under an instruction that the driver executes: MOVS from a device.
fn protected_in_emulation() -> Outcome {
    let code = guest!(64: "mov ecx, 2", "rep movsd", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    let (gpa, ram) = other_group(&machine)?;
    machine.set(|state| {
        state.rsi = DEVICE;
        state.rdi = gpa;
    })?;
    machine.vm.protect_ram(gpa, 0x4000, 0)?;
    let (mut reads, mut faults) = (0, 0);
    loop {
        match machine.run()? {
            Exit::PageFault { gpa: at, flags } => {
                same!((at, flags & 7), (gpa, 2), "GPA and access");
                faults += 1;
                machine.vm.protect_ram(gpa, 0x4000, 7)?;
            }
            Exit::Read { .. } => {
                reads += 1;
                machine.vcpu.tunnel.set_fast_mmio_value(reads);
            }
            Exit::Halt => break,
            other => anyhow::bail!("{other:?}"),
        }
        anyhow::ensure!(reads <= 2, "the device is read again");
    }
    same!(faults, 1, "page faults");
    same!((ram.u32(0), ram.u32(4)), (1, 2), "memory");
    Ok(())
}

/// MADV_DONTNEED: the guest sees zero, as the client does, and its next write is the client's page.
fn discard_under_the_guest(mode: Mode) -> Outcome {
    borrowed_only!();
    let code = guest!(
        "mov dword ptr [edi], 0x55",
        "out 0x80, al",
        "mov eax, [edi]",
        "mov dword ptr [edi + 4], 0x66",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.ram.discard(DATA, 0x1000);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0, "EAX");
    same!(machine.ram.u32(DATA + 4), 0x66, "client's page");
    Ok(())
}

/// The client takes the memory away: the guest is lost, the host is not.
fn munmap_under_the_guest() -> Outcome {
    borrowed_only!();
    let machine = Machine::new(
        Mode::Long,
        guest!(64: "mov eax, [rdi]", "out 0x80, al", "mov eax, [rdi]", "hlt"),
    )?;
    let (gpa, ram) = other_group(&machine)?;
    machine.set(|state| state.rdi = gpa)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    ram.unmap(0, 0x4000);
    machine.expect(&[crate::exit::lost()])
}

/// A buffer that the client may only read: the guest's write does not change it.
fn read_only_buffer() -> Outcome {
    let machine = Machine::new(
        Mode::Long,
        guest!(64: "mov eax, [rdi]", "out 0x80, al", "mov [rdi], ebx", "hlt"),
    )?;
    let (gpa, ram) = other_group(&machine)?;
    ram.write_u32(0, 0x13);
    ram.protect(0, 0x4000, libc::PROT_READ);
    machine.set(|state| {
        state.rdi = gpa;
        state.rbx = 0x99;
    })?;
    let first = machine.run()?;
    // Refused at once or at the write; never written.
    if first != crate::exit::lost().exit {
        same!(first, out(0x80, 1, 0x13).exit, "exit");
        let second = machine.run()?;
        anyhow::ensure!(second != Exit::Halt, "the write went through");
    }
    same!(ram.u32(0), 0x13, "buffer");
    Ok(())
}

/// The client takes the right to write away (mprotect) from a page that the guest writes, and gives it back.
fn write_protected_under_the_guest() -> Outcome {
    borrowed_only!();
    let machine = Machine::new(
        Mode::Long,
        guest!(64:
            "mov dword ptr [rdi], 0x55", "out 0x80, al",
            "mov eax, [rdi]", "out 0x80, al",
            "mov dword ptr [rdi], 0x66", "out 0x80, al",
            "mov dword ptr [rdi], 0x77", "hlt"),
    )?;
    let (gpa, ram) = other_group(&machine)?;
    let protect = |access| ram.protect(0, 0x4000, access);
    machine.set(|state| state.rdi = gpa)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    protect(libc::PROT_READ);
    machine.expect(&[out(0x80, 1, 0x55)])?;
    protect(libc::PROT_READ | libc::PROT_WRITE);
    machine.expect(&[out(0x80, 1, 0x55)])?;
    same!(ram.u32(0), 0x66, "written again");
    protect(libc::PROT_READ);
    let exit = machine.run()?;
    anyhow::ensure!(exit != Exit::Halt, "the write went through");
    same!(ram.u32(0), 0x66, "buffer");
    Ok(())
}

fn beyond_four_gigabytes(mode: Mode) -> Outcome {
    let code =
        guest!(64: "mov rdi, 0x40000000", "mov eax, [rdi]", "mov dword ptr [rdi + 4], 0x22", "hlt");
    let machine = Machine::new(mode, code)?;
    let ram = Ram::new(0x1000);
    let gpa = 0x12_3456_7000_u64;
    machine.vm.add_ramblock(ram.address(), 0x1000)?;
    machine.vm.set_ram2(gpa, 0x1000, 0, ram.address())?;
    ram.write_u32(0, 0x21);
    // Linear 1 GB: a directory and a table of its own.
    let (pd, pt) = (0x190000, 0x191000);
    machine.ram.write_u64(crate::modes::PDPT + 8, pd | 7);
    machine.ram.write_u64(pd, pt | 7);
    machine.ram.write_u64(pt, gpa | 7);
    machine.expect(&[halt()])?;
    same!(
        (machine.regs()?.rax, ram.u32(4)),
        (0x21, 0x22),
        "both sides"
    );
    Ok(())
}

fn map_from_another_thread() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "mov eax, [rdi]", "hlt"))?;
    let ram = Ram::new(0x1000);
    ram.write_u32(0, 0x31);
    let gpa = 0x30_0000;
    machine.set(|state| state.rdi = gpa)?;
    let result = std::thread::scope(|scope| {
        let mapper = scope.spawn(|| machine.vm.set_ram2(gpa, 0x1000, STANDALONE, ram.address()));
        mapper.join()
    });
    anyhow::ensure!(matches!(result, Ok(Ok(()))), "SET_RAM2 of a thread");
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0x31, "EAX");
    Ok(())
}

/// Every second page mapped, from one buffer, backwards.
fn many_slots() -> Outcome {
    let code = guest!(64:
        "mov edi, 0x300000", "mov ecx, 200", "xor eax, eax",
        "2: add eax, [rdi]", "add edi, 0x2000", "dec ecx", "jnz 2b", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    let ram = Ram::new(200 * 0x1000);
    machine.vm.add_ramblock(ram.address(), ram.size())?;
    let mut sum = 0;
    for index in 0..200_u64 {
        let page = 199 - index;
        ram.write_u32(page * 0x1000, (page * page) as u32);
        sum += page * page;
        machine.vm.set_ram(
            0x300000 + index * 0x2000,
            0x1000,
            0,
            ram.address() + page * 0x1000,
        )?;
    }
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, sum, "sum");
    Ok(())
}
