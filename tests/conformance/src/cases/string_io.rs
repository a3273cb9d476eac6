//! INS and OUTS: both directions, DF, more than a buffer full, page borders, faults in the middle.

use super::{Case, Outcome};
use crate::exit::{Exit, fault_code, halt, ins, outs};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, Mode};

pub const CASES: &[Case] = &[
    case!(single_elements in ALL),
    case!(rep_outs in ALL),
    case!(rep_ins in ALL),
    case!(rep_outs_downwards in SIZES),
    case!(rep_ins_downwards in SIZES),
    case!(outs_over_the_buffer in SIZES),
    case!(ins_over_the_buffer in SIZES),
    case!(rep_zero in SIZES),
    case!(outs_across_a_page in SIZES),
    case!(ins_across_a_page in SIZES),
    case!(sixteen_bit_registers),
    case!(segment_override in WIDE),
    case!(outs_page_fault in PAGING),
    case!(ins_page_fault in PAGING),
    case!(ins_into_rom in SIZES),
    case!(interrupt_in_the_middle in SIZES),
    case!(client_spoils_the_tunnel in SIZES),
];

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + 3) as u8).collect()
}

/// What an `outs` or `ins` series of exits adds up to, in the order of the elements.
struct Series {
    data: Vec<u8>,
    exits: usize,
}

/// Serves string OUTs until HLT.
fn collect_outs(machine: &Machine, port: u16, size: u16, down: u8) -> anyhow::Result<Series> {
    let mut series = Series {
        data: Vec::new(),
        exits: 0,
    };
    loop {
        match machine.run()? {
            Exit::Out {
                port: at,
                size: got,
                mut data,
                df,
            } => {
                same!((at, got, df), (port, size, down), "OUTS exit");
                if down == 1 {
                    // The buffer is in address order; the elements went out from the highest.
                    data = data.rchunks(size.into()).flatten().copied().collect();
                }
                series.data.extend(data);
                series.exits += 1;
            }
            Exit::Halt => return Ok(series),
            other => anyhow::bail!("{other:?}"),
        }
    }
}

/// Serves string INs until HLT with the elements of `data`, in their order.
fn feed_ins(machine: &Machine, size: u16, down: u8, data: &[u8]) -> anyhow::Result<usize> {
    let mut at = 0;
    loop {
        match machine.run()? {
            Exit::In {
                count,
                size: got,
                df,
                ..
            } => {
                same!((got, df), (size, down), "INS exit");
                let length = usize::from(count) * usize::from(size);
                anyhow::ensure!(at + length <= data.len(), "more than was asked for");
                let mut part = data[at..at + length].to_vec();
                if down == 1 {
                    part = part.rchunks(size.into()).flatten().copied().collect();
                }
                machine.vcpu.tunnel.set_buffer(&part);
                at += length;
            }
            Exit::Halt => return Ok(at),
            other => anyhow::bail!("{other:?}"),
        }
    }
}

fn single_elements(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x70",
        "outsb dx, byte ptr [esi]",
        "outsw dx, word ptr [esi]",
        "outsd dx, dword ptr [esi]",
        "insb byte ptr es:[edi], dx",
        "insw word ptr es:[edi], dx",
        "insd dword ptr es:[edi], dx",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.write(DATA, &[1, 2, 3, 4, 5, 6, 7]);
    machine.set(|state| {
        state.rsi = DATA;
        state.rdi = DATA + 0x100;
    })?;
    machine.expect(&[
        outs(0x70, 1, &[1], 0),
        outs(0x70, 2, &[2, 3], 0),
        outs(0x70, 4, &[4, 5, 6, 7], 0),
        ins(0x70, 1, &[0xa], 0),
        ins(0x70, 2, &[0xb, 0xc], 0),
        ins(0x70, 4, &[0xd, 0xe, 0xf, 0x10], 0),
        halt(),
    ])?;
    let wanted = vec![0xa, 0xb, 0xc, 0xd, 0xe, 0xf, 0x10, 0];
    same!(machine.ram.read(DATA + 0x100, 8), wanted, "memory");
    let state = machine.regs()?;
    same!(
        (state.rsi, state.rdi),
        (DATA + 7, DATA + 0x107),
        "ESI and EDI"
    );
    Ok(())
}

fn rep_outs(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x71",
        "mov ecx, 5",
        "rep outsw dx, word ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let data = pattern(10);
    machine.ram.write(DATA, &data);
    machine.set(|state| state.rsi = DATA)?;
    machine.expect(&[outs(0x71, 2, &data, 0), halt()])?;
    let state = machine.regs()?;
    same!((state.rcx, state.rsi), (0, DATA + 10), "ECX and ESI");
    Ok(())
}

fn rep_ins(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x72",
        "mov ecx, 5",
        "rep insd dword ptr es:[edi], dx",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let data = pattern(20);
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[ins(0x72, 4, &data, 0), halt()])?;
    same!(machine.ram.read(DATA, 20), data, "memory");
    let state = machine.regs()?;
    same!((state.rcx, state.rdi), (0, DATA + 20), "ECX and EDI");
    Ok(())
}

/// With DF the buffer is still in ascending address order.
fn rep_outs_downwards(mode: Mode) -> Outcome {
    let code = guest!(
        "std",
        "mov dx, 0x73",
        "mov ecx, 3",
        "rep outsw dx, word ptr [esi]",
        "cld",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.write(DATA, &[1, 2, 3, 4, 5, 6]);
    machine.set(|state| state.rsi = DATA + 4)?;
    machine.expect(&[outs(0x73, 2, &[1, 2, 3, 4, 5, 6], 1), halt()])?;
    same!(machine.regs()?.rsi, DATA - 2, "ESI");
    Ok(())
}

fn rep_ins_downwards(mode: Mode) -> Outcome {
    let code = guest!(
        "std",
        "mov dx, 0x73",
        "mov ecx, 3",
        "rep insb byte ptr es:[edi], dx",
        "cld",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rdi = DATA + 2)?;
    machine.expect(&[ins(0x73, 1, &[7, 8, 9], 1), halt()])?;
    same!(machine.ram.read(DATA, 4), vec![7, 8, 9, 0], "memory");
    same!(machine.regs()?.rdi, DATA - 1, "EDI");
    Ok(())
}

fn outs_over_the_buffer(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x74",
        "mov ecx, 250",
        "rep outsd dx, dword ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let data = pattern(1000);
    machine.ram.write(DATA, &data);
    machine.set(|state| state.rsi = DATA)?;
    let series = collect_outs(&machine, 0x74, 4, 0)?;
    same!(series.data, data, "what came out");
    anyhow::ensure!(series.exits <= 20, "{} exits for 1000 bytes", series.exits);
    same!(machine.regs()?.rcx, 0, "ECX");
    Ok(())
}

fn ins_over_the_buffer(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x74",
        "mov ecx, 333",
        "rep insb byte ptr es:[edi], dx",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let data = pattern(333);
    machine.set(|state| state.rdi = DATA + 1)?;
    same!(feed_ins(&machine, 1, 0, &data)?, 333, "bytes asked for");
    same!(machine.ram.read(DATA + 1, 333), data, "memory");
    same!(machine.ram.read(DATA + 334, 1), vec![0], "behind it");
    Ok(())
}

fn rep_zero(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 0",
        "rep outsb dx, byte ptr [esi]",
        "rep insb byte ptr es:[edi], dx",
        "hlt"
    );
    Machine::new(mode, code)?.expect(&[halt()])
}

fn outs_across_a_page(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x75",
        "mov ecx, 6",
        "rep outsw dx, word ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let data = pattern(12);
    // The third element has a byte on either page.
    machine.ram.write(DATA + 0xffb, &data);
    machine.set(|state| state.rsi = DATA + 0xffb)?;
    same!(
        collect_outs(&machine, 0x75, 2, 0)?.data,
        data,
        "what came out"
    );
    Ok(())
}

fn ins_across_a_page(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x75",
        "mov ecx, 6",
        "rep insd dword ptr es:[edi], dx",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let data = pattern(24);
    machine.set(|state| state.rdi = DATA + 0xff5)?;
    same!(feed_ins(&machine, 4, 0, &data)?, 24, "bytes asked for");
    same!(machine.ram.read(DATA + 0xff5, 24), data, "memory");
    Ok(())
}

/// SI and DI wrap at 64 KB; the upper halves stay.
fn sixteen_bit_registers() -> Outcome {
    let code = guest!(16: "cld", "mov dx, 0x76", "mov cx, 4", "rep outsb", "hlt");
    let machine = Machine::new(Mode::Real, code)?;
    machine.ram.write(0xfffe, &[1, 2]);
    machine.ram.write(0, &[3, 4]);
    machine.set(|state| {
        state.rsi = 0x0005_fffe;
        state.rcx = 0x0007_0000;
    })?;
    same!(
        collect_outs(&machine, 0x76, 1, 0)?.data,
        vec![1, 2, 3, 4],
        "what came out"
    );
    let state = machine.regs()?;
    same!(
        (state.rsi, state.rcx),
        (0x0005_0002, 0x0007_0000),
        "ESI and ECX"
    );
    Ok(())
}

fn segment_override(mode: Mode) -> Outcome {
    let code = guest!("cld", "mov dx, 0x77", "outsb dx, byte ptr fs:[esi]", "hlt");
    let code = crate::code::Code {
        bits32: crate::blob!(
            ".code32",
            "cld",
            "mov dx, 0x77",
            "outsb dx, fs:[esi]",
            "hlt"
        ),
        bits64: crate::blob!(
            ".code64",
            "cld",
            "mov dx, 0x77",
            "outsb dx, fs:[rsi]",
            "hlt"
        ),
        ..code
    };
    let machine = Machine::new(mode, code)?;
    machine.ram.write(DATA + 0x40, &[0x5c]);
    machine.set(|state| {
        state.rsi = 0x40;
        state.fs.base = DATA;
    })?;
    machine.expect(&[outs(0x77, 1, &[0x5c], 0), halt()])
}

/// The second page is not there: what fits comes out, then #PF with the registers at the element.
fn outs_page_fault(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x78",
        "mov ecx, 8",
        "rep outsb dx, byte ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let (entry, size) = mode.page_entry((DATA >> 12) + 1);
    machine.ram.fill(entry, size, 0);
    machine.ram.write(DATA + 0xffd, &[1, 2, 3]);
    machine.set(|state| state.rsi = DATA + 0xffd)?;
    machine.expect(&[outs(0x78, 1, &[1, 2, 3], 0), fault_code(14, 0)])?;
    let state = machine.regs()?;
    same!((state.rcx, state.rsi), (5, DATA + 0x1000), "ECX and ESI");
    same!(state.cr2, DATA + 0x1000, "CR2");
    Ok(())
}

/// No byte is read from a port that memory has no place for.
fn ins_page_fault(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x78",
        "mov ecx, 2",
        "rep insb byte ptr es:[edi], dx",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let page = DATA >> 12;
    let (entry, size) = mode.page_entry(page + 1);
    // Present, not writable: a fault because CR0.WP is set.
    machine
        .ram
        .write(entry, &(((page + 1) << 12) | 0x61).to_le_bytes()[..size]);
    machine.set(|state| state.rdi = DATA + 0xfff)?;
    machine.expect(&[ins(0x78, 1, &[0x31], 0), fault_code(14, 3)])?;
    let state = machine.regs()?;
    same!((state.rcx, state.rdi), (1, DATA + 0x1000), "ECX and EDI");
    same!(state.cr2, DATA + 0x1000, "CR2");
    same!(machine.ram.read(DATA + 0xfff, 2), vec![0x31, 0], "memory");
    Ok(())
}

/// INS into ROM: the port is read, the write comes out as MMIO.
fn ins_into_rom(mode: Mode) -> Outcome {
    let code = guest!("cld", "mov dx, 0x79", "insb byte ptr es:[edi], dx", "hlt");
    let machine = Machine::new(mode, code)?;
    machine
        .vm
        .set_ram(DATA, 0x1000, 1, machine.ram.address() + DATA)?;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[
        ins(0x79, 1, &[0x3c], 0),
        crate::exit::write(DATA, 1, 0x3c),
        halt(),
    ])?;
    same!(machine.ram.read(DATA, 1), vec![0], "ROM");
    Ok(())
}

/// An interrupt between two parts of a long OUTS: no element is lost or sent twice.
fn interrupt_in_the_middle(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "sti",
        "mov dx, 0x7a",
        "mov ecx, 200",
        "rep outsb dx, byte ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    let data = pattern(200);
    machine.ram.write(DATA, &data);
    machine.set(|state| state.rsi = DATA)?;
    let mut got = Vec::new();
    let mut vectors = 0;
    loop {
        match machine.run()? {
            Exit::Out { data, .. } => {
                if got.is_empty() {
                    machine.vcpu.interrupt(0x60)?;
                }
                got.extend(data);
            }
            Exit::Vector(0x60) => vectors += 1,
            Exit::Halt => break,
            other => anyhow::bail!("{other:?}"),
        }
    }
    same!(got, data, "what came out");
    same!(vectors, 1, "interrupts");
    Ok(())
}

/// INS completes by what the driver remembers, not by what is in the tunnel.
fn client_spoils_the_tunnel(mode: Mode) -> Outcome {
    let code = guest!(
        "cld",
        "mov dx, 0x7b",
        "mov ecx, 4",
        "rep insb byte ptr es:[edi], dx",
        "hlt"
    );
    for byte in [0, 0x41, 0xff] {
        let machine = Machine::new(mode, code)?;
        machine.set(|state| state.rdi = DATA)?;
        machine.expect(&[ins(0x7b, 1, &[1, 2, 3, 4], 0)])?;
        machine.vcpu.tunnel.spoil_io(byte);
        machine.expect(&[halt()])?;
        same!(machine.ram.read(DATA, 6), vec![1, 2, 3, 4, 0, 0], "memory");
    }
    Ok(())
}
