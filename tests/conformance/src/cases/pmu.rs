//! Performance counters. They are there on an emulated PC that has some itself (`conformance --counters`), which
//! then says so in the environment; elsewhere the cases say that they do not apply.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};

use super::{Case, Outcome, enter_user};
use crate::exit::{Exit, Step, fault, fault_code, halt, out};
use crate::guest;
use crate::machine::{self, Machine};
use crate::modes::{Mode, STUBS};

pub const CASES: &[Case] = &[
    case!(offered),
    case!(exact_over_exits in LONG),
    case!(rings in LONG),
    case!(rdpmc_in_ring_3 in LONG),
    case!(values in LONG),
    case!(two_vcpus),
    case!(the_hosts_stand_still in LONG),
    case!(the_hosts_overflow in LONG),
];

const PMC: u64 = 0xc1;
const SELECT: u64 = 0x186;
const GLOBAL_CTRL: u64 = 0x38f;
/// IA32_PERFEVTSELx: enabled; CPL 0; CPL 3; instructions; an interrupt at overflow.
const ENABLE: u64 = 1 << 22;
const OS: u64 = 1 << 17;
const USR: u64 = 1 << 16;
const INSTRUCTIONS: u64 = 0xc0;
const INTERRUPT: u64 = 1 << 20;
const ALL: u64 = ENABLE | OS | USR | INSTRUCTIONS;

/// Whether there are counters; an error if there should be.
fn has_counters() -> anyhow::Result<bool> {
    let expected = std::env::var_os("CONFORMANCE_COUNTERS").is_some();
    let (vm, _ram) = machine::vm_with_ram()?;
    let vcpu = vm.create_vcpu(0)?;
    let (_, _, rows) = vcpu.cpuid(18);
    let leaf = rows.iter().find(|row| row.function == 0xa);
    let found = leaf.is_some_and(|row| row.eax != 0);
    ensure!(found || !expected, "CPUID leaf 0xA is zero");
    Ok(found)
}

/// Ends a case where there are none.
macro_rules! counters_only {
    () => {
        if !has_counters()? {
            println!("  no performance counters: line {} of {}", line!(), file!());
            return Ok(());
        }
    };
}

fn offered() -> Outcome {
    counters_only!();
    let (vm, _ram) = machine::vm_with_ram()?;
    let (_, _, rows) = vm.create_vcpu(0)?.cpuid(18);
    let row = rows.iter().find(|row| row.function == 0xa).context("0xA")?;
    let words = [row.eax, row.ebx, row.ecx, row.edx];
    same!(words, [0x0730_0401, 0x7c, 0, 0], "leaf 0xA");
    Ok(())
}

/// Neither what the driver does for CPUID nor what this program does for OUT is counted, nor is an instruction
/// that exits.
fn exact_over_exits(mode: Mode) -> Outcome {
    counters_only!();
    let code = guest!(64:
        "mov ecx, 0x186", "mov eax, 0x4300c0", "xor edx, edx", "wrmsr",
        "mov esi, 100",
        "2: xor eax, eax", "cpuid", "out 0x80, al", "nop", "dec esi", "jnz 2b",
        "xor ecx, ecx", "rdpmc", "mov edi, eax",
        "mov ecx, 0xc1", "rdmsr", "hlt");
    let machine = Machine::new(mode, code)?;
    // The highest leaf is what CPUID gave.
    let (_, _, rows) = machine.vcpu.cpuid(18);
    let highest = rows.first().context("leaf 0")?.eax & 0xff;
    let mut steps: Vec<Step> = (0..100).map(|_| out(0x80, 1, highest.into())).collect();
    steps.push(halt());
    machine.expect(&steps)?;
    let state = machine.regs()?;
    // MOV; XOR, NOP, DEC and JNZ each time; XOR.
    same!(state.rdi, 1 + 4 * 100 + 1, "RDPMC");
    same!(state.rax, state.rdi + 2, "RDMSR");
    same!(machine.vcpu.msrs(&[PMC])?, vec![state.rax], "GET_MSRS");
    Ok(())
}

/// 201 instructions at CPL 3, then the handler's at CPL 0.
fn rings(mode: Mode) -> Outcome {
    counters_only!();
    let machine = Machine::new(
        mode,
        guest!(64: "mov ecx, 100", "2: dec ecx", "jnz 2b", "ud2"),
    )?;
    machine.set(|state| enter_user(mode, state))?;
    let list = [
        (SELECT, ENABLE | USR | INSTRUCTIONS),
        (SELECT + 1, ENABLE | OS | INSTRUCTIONS),
        // Cycles; the emulator has one for each instruction.
        (SELECT + 2, ENABLE | USR | 0x3c),
        (SELECT + 3, ENABLE | INSTRUCTIONS),
    ];
    same!(machine.vcpu.set_msrs(&list)?, 4, "SET_MSRS");
    machine.expect(&[fault(6)])?;
    let counts = machine.vcpu.msrs(&[PMC, PMC + 1, PMC + 2, PMC + 3])?;
    same!(counts[0], 201, "CPL 3");
    same!(counts[2], 201, "cycles at CPL 3");
    same!(counts[3], 0, "neither ring");
    ensure!((1..20).contains(&counts[1]), "CPL 0: {}", counts[1]);
    Ok(())
}

fn rdpmc_in_ring_3(mode: Mode) -> Outcome {
    counters_only!();
    for (pce, counter, wanted) in [
        (true, 0, fault(6)),
        (true, 3, fault(6)),
        (true, 4, fault_code(13, 0)),
        (false, 0, fault_code(13, 0)),
    ] {
        let machine = Machine::new(mode, guest!(64: "rdpmc", "ud2"))?;
        let list = [(PMC, 0x1234_5678_9abc), (PMC + 3, 7)];
        same!(machine.vcpu.set_msrs(&list)?, 2, "SET_MSRS");
        machine.set(|state| {
            enter_user(mode, state);
            state.cr4 |= if pce { 1 << 8 } else { 0 };
            state.rcx = counter | 0xffff_ffff << 32;
            (state.rax, state.rdx) = (u64::MAX, u64::MAX);
        })?;
        machine.expect(&[wanted])?;
        let state = machine.regs()?;
        let read = match (pce, counter) {
            (true, 0) => (0x5678_9abc, 0x1234),
            (true, 3) => (7, 0),
            _ => (u64::MAX, u64::MAX),
        };
        same!((state.rax, state.rdx), read, "counter {counter}, PCE {pce}");
    }
    Ok(())
}

/// A guest writes 32 bits, extended by sign, a client all; reserved bits fault.
fn values(mode: Mode) -> Outcome {
    counters_only!();
    let write = |msr: u64, value: u64| -> anyhow::Result<(Exit, Vec<u64>)> {
        let machine = Machine::new(mode, guest!(64: "wrmsr", "hlt"))?;
        machine.set(|state| {
            state.rcx = msr;
            state.rax = value & 0xffff_ffff;
            state.rdx = value >> 32;
        })?;
        Ok((machine.run()?, machine.vcpu.msrs(&[msr])?))
    };
    for (msr, value, kept) in [
        (PMC + 1, 0x7fff_ffff, 0x7fff_ffff),
        (PMC + 1, 0x8000_0000, 0xffff_8000_0000),
        (PMC + 1, 0x5_0000_0001, 1),
        (SELECT + 1, 0xff9f_ffff, 0xff9f_ffff),
    ] {
        same!(write(msr, value)?, (Exit::Halt, vec![kept]), "{msr:#x}");
    }
    for (msr, value) in [(SELECT, 1 << 21), (SELECT, 1 << 32), (0x345, 0)] {
        let (exit, _) = write(msr, value)?;
        ensure!(
            matches!(exit, Exit::Exception { vector: 13, .. }),
            "{msr:#x} = {value:#x}: {exit:?}"
        );
    }
    let machine = Machine::new(mode, guest!(64: "nop", "nop", "hlt"))?;
    let list = [(PMC, 0xffff_ffff_ffff), (SELECT, ALL)];
    same!(machine.vcpu.set_msrs(&list)?, 2, "SET_MSRS");
    machine.expect(&[halt()])?;
    same!(machine.vcpu.msrs(&[PMC, 0x345])?, vec![1, 0], "wrapped");
    Ok(())
}

fn two_vcpus() -> Outcome {
    counters_only!();
    let code = guest!(64: "mov ecx, 1000", "2: dec ecx", "jnz 2b", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    let second = machine.vm.create_vcpu(1)?;
    same!(machine.vcpu.set_msrs(&[(SELECT, ALL)])?, 1, "SET_MSRS");
    let os = ENABLE | OS | INSTRUCTIONS;
    same!(second.set_msrs(&[(SELECT + 1, os)])?, 1, "SET_MSRS");
    for round in 1..=5u64 {
        for vcpu in [&machine.vcpu, &second] {
            machine::prepare(vcpu, Mode::Long)?;
            machine::expect(vcpu, Mode::Long, &machine.ram, &[halt()])?;
        }
        let counts = |vcpu: &crate::client::Vcpu| vcpu.msrs(&[PMC, PMC + 1]);
        same!(counts(&machine.vcpu)?, vec![2001 * round, 0], "vCPU 0");
        same!(counts(&second)?, vec![0, 2001 * round], "vCPU 1");
    }
    Ok(())
}

/// The registers of processor 0, by Linux's module msr.
struct HostMsrs(File);

impl HostMsrs {
    fn open() -> anyhow::Result<Self> {
        let path = Path::new("/dev/cpu/0/msr");
        let file = File::options().read(true).write(true).open(path);
        Ok(Self(file.context("/dev/cpu/0/msr")?))
    }

    fn read(&self, register: u64) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, register)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, register: u64, value: u64) -> anyhow::Result<()> {
        Ok(self.0.write_all_at(&value.to_le_bytes(), register)?)
    }
}

/// Instructions of [`long_loop`], which exits at its end.
const LONG_LOOP: u64 = 2 * 2_000_000 + 1;

fn long_loop(mode: Mode) -> anyhow::Result<Machine> {
    let code = guest!(64: "mov ecx, 2000000", "2: dec ecx", "jnz 2b", "hlt");
    Machine::new(mode, code)
}

/// Instructions of [`interrupted_loop`], with those of the handler.
const INTERRUPTED_LOOP: u64 = 1 + 200 * (2 * 10_000 + 5);

/// As long, but for the interrupts: the emulated PC looks for counters that overflowed when something interrupts the
/// code, and so finds them in the guest.
fn interrupted_loop(mode: Mode) -> anyhow::Result<Machine> {
    let code = guest!(64:
        "mov esi, 200",
        "2: mov ecx, 10000", "3: dec ecx", "jnz 3b", "int 0x41", "dec esi", "jnz 2b", "hlt");
    let machine = Machine::new(mode, code)?;
    // iretq
    machine.ram.write(STUBS + 0x41 * 16, &[0x48, 0xcf]);
    Ok(machine)
}

/// A counter of the host's does not see a guest that counts with the same one, and is as it was afterwards. It does
/// see one that does not count.
fn the_hosts_stand_still(mode: Mode) -> Outcome {
    counters_only!();
    let host = HostMsrs::open()?;
    host.write(SELECT + 3, 0)?;
    host.write(PMC + 3, 0)?;
    host.write(SELECT + 3, ALL)?;
    host.write(GLOBAL_CTRL, host.read(GLOBAL_CTRL)? | 8)?;
    let registers = || -> anyhow::Result<Vec<u64>> {
        let all = [
            SELECT,
            SELECT + 1,
            SELECT + 2,
            SELECT + 3,
            0x38d,
            GLOBAL_CTRL,
        ];
        all.iter().map(|register| host.read(*register)).collect()
    };
    let before = registers()?;
    for counting in [true, false, true] {
        let machine = long_loop(mode)?;
        if counting {
            same!(machine.vcpu.set_msrs(&[(SELECT + 3, ALL)])?, 1, "SET_MSRS");
        }
        let start = host.read(PMC + 3)?;
        machine.expect(&[halt()])?;
        let counted = host.read(PMC + 3)?.wrapping_sub(start);
        let guests = machine.vcpu.msrs(&[PMC + 3])?;
        if counting {
            same!(guests, vec![LONG_LOOP], "the guest's");
            ensure!(
                (1..LONG_LOOP / 2).contains(&counted),
                "the host's: {counted}"
            );
        } else {
            same!(guests, vec![0], "the guest's");
            ensure!(counted >= LONG_LOOP, "the host's: {counted}");
        }
        same!(registers()?, before, "the host's registers");
    }
    host.write(SELECT + 3, 0)
}

/// The host's counters overflow all the time, and each overflow is an NMI, in the guest or not. A loan that meets
/// one on its way does without the guest's counters, so that it counts too little, but never too much.
fn the_hosts_overflow(mode: Mode) -> Outcome {
    counters_only!();
    let host = HostMsrs::open()?;
    let nmis = || -> anyhow::Result<u64> {
        let text = std::fs::read_to_string("/proc/interrupts")?;
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with("NMI:"));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(number.context("NMI")?.parse()?)
    };
    for counting in [false, true] {
        let before = nmis()?;
        for _ in 0..5 {
            host.write(SELECT + 2, 0)?;
            // While the guest runs, if it does not count; somewhere on the way if it does, since the host's stand
            // still in it then.
            let left = if counting {
                0x8000
            } else {
                INTERRUPTED_LOOP / 4
            };
            host.write(PMC + 2, 0xffff_ffff - left)?;
            let machine = interrupted_loop(mode)?;
            let select = if counting { ALL } else { 0 };
            same!(machine.vcpu.set_msrs(&[(SELECT, select)])?, 1, "SET_MSRS");
            host.write(SELECT + 2, ALL | INTERRUPT)?;
            host.write(GLOBAL_CTRL, host.read(GLOBAL_CTRL)? | 4)?;
            machine.expect(&[halt()])?;
            host.write(SELECT + 2, 0)?;
            let count = machine.vcpu.msrs(&[PMC])?;
            let most = if counting { INTERRUPTED_LOOP } else { 0 };
            ensure!(count[0] <= most, "{} instead of {most}", count[0]);
            ensure!(count[0] >= most / 2, "{} of {most}", count[0]);
        }
        let came = nmis()?.wrapping_sub(before);
        ensure!(came >= 5, "{came} NMIs, counting {counting}");
    }
    Ok(())
}
