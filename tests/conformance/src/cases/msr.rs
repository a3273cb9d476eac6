//! MSRs: by the guest's RDMSR and WRMSR, and by GET_MSRS and SET_MSRS.

use super::{Case, Outcome};
use crate::client::Refused;
use crate::exit::{Exit, halt, out};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{self, EFER, Mode};

pub const CASES: &[Case] = &[
    case!(qemu_list_round_trip),
    case!(power_up_values),
    case!(stops_at_the_first_unknown),
    case!(done_counts_from_zero),
    case!(more_than_31),
    case!(upper_half_of_the_number),
    case!(refused_values_by_client),
    case!(guest_and_client_see_the_same),
    case!(apic_base),
    case!(mtrrs),
    case!(pat),
    case!(tsc_by_guest_in_order in LONG),
    case!(tsc_by_client),
    case!(tsc_offset_of_a_new_vm),
    case!(tsc_adjust),
    case!(microcode in LONG),
    case!(misc_enable in LONG),
    case!(speculation),
    case!(looked_at_without_asking),
    case!(fs_and_gs_base in LONG),
];

const TSC: u64 = 0x10;
const APIC_BASE: u64 = 0x1b;
const PAT: u64 = 0x277;

fn machine() -> anyhow::Result<Machine> {
    Machine::new(Mode::Long, guest!(64: "rdmsr", "hlt"))
}

/// RDMSR in the guest; `None` for #GP.
fn guest_reads(machine: &Machine, msr: u64) -> anyhow::Result<Option<u64>> {
    machine
        .ram
        .write(modes::CODE, guest!(64: "rdmsr", "hlt").bits64);
    machine.set(|state| {
        state.rip = modes::CODE;
        state.rsp = modes::STACK;
        state.rcx = msr;
    })?;
    match machine.run()? {
        Exit::Halt => {
            let state = machine.regs()?;
            Ok(Some(state.rdx << 32 | state.rax))
        }
        Exit::Exception { vector: 13, .. } => Ok(None),
        other => anyhow::bail!("RDMSR {msr:#x}: {other:?}"),
    }
}

/// WRMSR in the guest; whether it was taken.
fn guest_writes(machine: &Machine, msr: u64, value: u64) -> anyhow::Result<bool> {
    machine
        .ram
        .write(modes::CODE, guest!(64: "wrmsr", "hlt").bits64);
    machine.set(|state| {
        state.rip = modes::CODE;
        state.rsp = modes::STACK;
        state.rcx = msr;
        state.rax = value & 0xffff_ffff;
        state.rdx = value >> 32;
    })?;
    match machine.run()? {
        Exit::Halt => Ok(true),
        Exit::Exception { vector: 13, .. } => Ok(false),
        other => anyhow::bail!("WRMSR {msr:#x}: {other:?}"),
    }
}

/// The ten MSRs QEMU sends.
fn qemu_list_round_trip() -> Outcome {
    let machine = machine()?;
    let list = [
        (0x174, 0x10),
        (0x175, 0x7fff_0000_1000),
        (0x176, 0xffff_ffff_8000_1000),
        (EFER, modes::EFER_LONG),
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_ffff_8100_0000),
        (0xc000_0083, 0xffff_ffff_8200_0000),
        (0xc000_0084, 0x47700),
        (0xc000_0102, 0xffff_8880_1234_0000),
    ];
    same!(machine.vcpu.set_msrs(&list)?, 9, "done");
    let (names, values): (Vec<u64>, Vec<u64>) = list.into_iter().unzip();
    same!(machine.vcpu.msrs(&names)?, values, "values");
    let state = machine.regs()?;
    same!(
        (state.sysenter_cs, state.sysenter_esp, state.sysenter_eip),
        (0x10, list[1].1, list[2].1),
        "SYSENTER's by GET_REGS"
    );
    same!(u64::from(state.efer), modes::EFER_LONG, "EFER by GET_REGS");
    // They survive a run.
    machine.set(|state| state.rcx = 0x174)?;
    machine.expect(&[halt()])?;
    same!(machine.vcpu.msrs(&names)?, values, "values after RUN");
    same!(machine.regs()?.rax, 0x10, "RDMSR");
    Ok(())
}

fn power_up_values() -> Outcome {
    let (vm, _ram) = crate::machine::vm_with_ram()?;
    for id in 0..2 {
        let vcpu = vm.create_vcpu(id)?;
        let bsp = if id == 0 { 0x100 } else { 0 };
        let list = [APIC_BASE, PAT, EFER, 0x174, 0x175, 0x176, 0xc000_0102];
        let wanted = vec![0xfee0_0800 | bsp, 0x0007_0406_0007_0406, 0, 0, 0, 0, 0];
        same!(vcpu.msrs(&list)?, wanted, "MSRs of vCPU {id}");
    }
    Ok(())
}

fn stops_at_the_first_unknown() -> Outcome {
    let machine = machine()?;
    let done = machine
        .vcpu
        .set_msrs(&[(0x174, 5), (0x12345, 0), (0x175, 6)])?;
    same!(done, 1, "done by SET_MSRS");
    same!(machine.vcpu.msrs(&[0x174, 0x175])?, vec![5, 0], "values");
    same!(
        machine.vcpu.msrs(&[0x174, 0x175, 0x12345, 0x176])?,
        vec![5, 0],
        "GET_MSRS"
    );
    Ok(())
}

fn done_counts_from_zero() -> Outcome {
    let machine = machine()?;
    same!(machine.vcpu.set_msrs(&[])?, 0, "done by an empty list");
    same!(machine.vcpu.msrs(&[0x12345])?, vec![], "values");
    Ok(())
}

/// 31 are taken, 32 are not, though the array has room.
fn more_than_31() -> Outcome {
    let machine = machine()?;
    same!(machine.vcpu.set_msrs(&[(0x174, 1); 31])?, 31, "31 entries");
    same!(
        machine.vcpu.set_msrs(&[(0x174, 2); 32]),
        Err(Refused(libc::EFAULT)),
        "32 entries"
    );
    same!(
        machine.vcpu.msrs(&[0x174; 32]),
        Err(Refused(libc::EFAULT)),
        "32 entries read"
    );
    same!(machine.vcpu.msrs(&[0x174])?, vec![1], "nothing was done");
    Ok(())
}

fn upper_half_of_the_number() -> Outcome {
    let machine = machine()?;
    let done = machine.vcpu.set_msrs(&[(0x1_0000_0174, 9)])?;
    let value = machine.vcpu.msrs(&[0x174])?;
    same!((done, value[0]), (0, 0), "it is refused");
    Ok(())
}

fn refused_values_by_client() -> Outcome {
    let machine = machine()?;
    for (msr, value) in [
        (EFER, 2),
        (PAT, 2),
        (0xc000_0082, 0x1234_0000_0000_0000),
        (0xc000_0102, 0x8000_0000_0000_0000),
        (0x175, 0x1234_0000_0000_0000),
        (0xc000_0084, 1 << 40),
    ] {
        same!(
            machine.vcpu.set_msrs(&[(msr, value)])?,
            0,
            "MSR {msr:#x} = {value:#x}"
        );
    }
    machine.set(|state| state.rcx = 0x174)?;
    machine.expect(&[halt()])
}

fn guest_and_client_see_the_same() -> Outcome {
    let machine = machine()?;
    for (msr, value) in [
        (0x174, 0x33),
        (0x175, 0xffff_8000_0000_1234),
        (0x176, 0x7fff_ffff_f000),
        (0xc000_0081, 0x1234_5678_9abc_def0),
        (0xc000_0082, 0x7fff_ffff_0000),
        (0xc000_0083, 0x7fff_ffff_0010),
        (0xc000_0084, 0x700),
        (0xc000_0102, 0xffff_ffff_ffff_f000),
        (0xc000_0103, 0x5),
        (PAT, 0x0006_0504_0100_0706),
    ] {
        anyhow::ensure!(
            guest_writes(&machine, msr, value)?,
            "WRMSR {msr:#x} is refused"
        );
        same!(
            machine.vcpu.msrs(&[msr])?,
            vec![value],
            "MSR {msr:#x} by GET_MSRS"
        );
        same!(
            guest_reads(&machine, msr)?,
            Some(value),
            "MSR {msr:#x} by RDMSR"
        );
        same!(
            machine.vcpu.set_msrs(&[(msr, 0)])?,
            1,
            "MSR {msr:#x} by SET_MSRS"
        );
        same!(
            guest_reads(&machine, msr)?,
            Some(0),
            "MSR {msr:#x} by RDMSR"
        );
    }
    Ok(())
}

/// The tunnel shows it after each RUN.
fn apic_base() -> Outcome {
    let machine = machine()?;
    same!(
        guest_reads(&machine, APIC_BASE)?,
        Some(0xfee0_0900),
        "RDMSR"
    );
    same!(machine.vcpu.tunnel.apic_base(), 0xfee0_0900, "tunnel");
    anyhow::ensure!(
        guest_writes(&machine, APIC_BASE, 0xfee0_0100)?,
        "disabling is refused"
    );
    same!(
        machine.vcpu.tunnel.apic_base(),
        0xfee0_0100,
        "tunnel after WRMSR"
    );
    Ok(())
}

fn mtrrs() -> Outcome {
    let machine = machine()?;
    let cap = guest_reads(&machine, 0xfe)?.unwrap_or(0);
    // With more pairs SeaBIOS does not set up the second processor's as it does the first's.
    same!(cap & 0xff, 8, "MTRRCAP {cap:#x}");
    for msr in [
        0x200, 0x201, 0x20f, 0x250, 0x258, 0x259, 0x268, 0x26f, 0x2ff,
    ] {
        let value = match msr {
            0x2ff => 0xc06,
            0x200 => 0x8000_0006,
            0x201 | 0x20f => 0x8_0000_0800,
            _ => 0x0606_0606_0606_0606,
        };
        anyhow::ensure!(
            guest_writes(&machine, msr, value)?,
            "MTRR {msr:#x} is refused"
        );
        same!(guest_reads(&machine, msr)?, Some(value), "MTRR {msr:#x}");
    }
    anyhow::ensure!(!guest_writes(&machine, 0xfe, 0)?, "MTRRCAP can be written");
    anyhow::ensure!(
        !guest_writes(&machine, 0x2ff, 2)?,
        "memory type 2 is accepted"
    );
    Ok(())
}

fn pat() -> Outcome {
    let machine = machine()?;
    same!(
        guest_reads(&machine, PAT)?,
        Some(0x0007_0406_0007_0406),
        "at first"
    );
    for value in [2, 3 << 8, 8 << 56] {
        anyhow::ensure!(
            !guest_writes(&machine, PAT, value)?,
            "PAT {value:#x} is accepted"
        );
    }
    same!(
        guest_reads(&machine, PAT)?,
        Some(0x0007_0406_0007_0406),
        "after refusals"
    );
    Ok(())
}

/// It never runs backwards, by RDTSC and RDMSR in turn.
fn tsc_by_guest_in_order(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov esi, 200", "xor edi, edi",
        "2: rdtsc", "shl rdx, 32", "or rax, rdx", "cmp rax, rdi", "jb 3f", "mov rdi, rax",
        "mov ecx, 0x10", "rdmsr", "shl rdx, 32", "or rax, rdx", "cmp rax, rdi", "jb 3f", "mov rdi, rax",
        "out 0x80, al",
        "dec esi", "jnz 2b", "hlt", "3: ud2");
    let machine = Machine::new(mode, code)?;
    loop {
        match machine.run()? {
            Exit::Out { .. } => {}
            Exit::Halt => return Ok(()),
            other => anyhow::bail!("{other:?}"),
        }
    }
}

fn tsc_by_client() -> Outcome {
    let machine = machine()?;
    let far = 1_u64 << 50;
    same!(machine.vcpu.set_msrs(&[(TSC, far)])?, 1, "SET_MSRS");
    let now = guest_reads(&machine, TSC)?.unwrap_or(0);
    anyhow::ensure!(
        now >= far && now < far + (1 << 34),
        "TSC {now:#x} soon after {far:#x}"
    );
    let later = machine.vcpu.msrs(&[TSC])?[0];
    anyhow::ensure!(later >= now, "{later:#x} after {now:#x}");
    Ok(())
}

/// It starts at 0: that of a VM made later is behind, by what it takes to make one. The older is read first: it is ahead
/// of the later one all the same, unless more comes in between than it took to make that, as an interrupt may.
fn tsc_offset_of_a_new_vm() -> Outcome {
    let first = machine()?;
    let second = machine()?;
    let read = |machine: &Machine| Ok::<_, anyhow::Error>(guest_reads(machine, TSC)?.unwrap_or(0));
    let mut seen = Vec::new();
    for _ in 0..20 {
        let (new, old, later) = (read(&second)?, read(&first)?, read(&second)?);
        anyhow::ensure!(new < later && later < 1 << 32, "{new:#x}, then {later:#x}");
        if old > later {
            return Ok(());
        }
        seen.push((old, later));
    }
    anyhow::bail!("the older is never ahead: {seen:x?}")
}

fn tsc_adjust() -> Outcome {
    const ADJUST: u64 = 0x3b;
    let machine = machine()?;
    let Some(before) = guest_reads(&machine, ADJUST)? else {
        // CPUID does not offer it here; then it is #GP, as it was.
        return Ok(());
    };
    same!(before, 0, "TSC_ADJUST at first");
    let tsc = guest_reads(&machine, TSC)?.unwrap_or(0);
    anyhow::ensure!(guest_writes(&machine, ADJUST, 1 << 40)?, "it is refused");
    let moved = guest_reads(&machine, TSC)?.unwrap_or(0).wrapping_sub(tsc);
    anyhow::ensure!(moved >> 36 == 1 << 4, "the counter moved by {moved:#x}");
    same!(guest_reads(&machine, ADJUST)?, Some(1 << 40), "TSC_ADJUST");
    // SDM 18.17.3 "Time-Stamp Counter Adjustment": a write of the counter moves it too.
    anyhow::ensure!(guest_writes(&machine, TSC, 1 << 44)?, "TSC is refused");
    let adjust = guest_reads(&machine, ADJUST)?.unwrap_or(0);
    anyhow::ensure!(
        adjust.wrapping_add(1 << 36) >> 40 == 0x10,
        "TSC_ADJUST {adjust:#x}"
    );
    Ok(())
}

fn microcode(_: Mode) -> Outcome {
    let machine = machine()?;
    anyhow::ensure!(
        guest_writes(&machine, 0x8b, 0)?,
        "writing the revision is refused"
    );
    anyhow::ensure!(
        guest_reads(&machine, 0x8b)?.is_some(),
        "reading it is refused"
    );
    Ok(())
}

fn misc_enable(_: Mode) -> Outcome {
    let machine = machine()?;
    let value = guest_reads(&machine, 0x1a0)?.unwrap_or(0);
    same!(value & 1, 1, "fast strings");
    anyhow::ensure!(
        guest_writes(&machine, 0x1a0, value)?,
        "writing it back is refused"
    );
    Ok(())
}

fn fs_and_gs_base(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov ecx, 0xc0000100", "mov eax, 0xc000", "xor edx, edx", "wrmsr", "mov al, fs:[0]", "out 0x80, al",
        "mov ecx, 0xc0000101", "mov eax, 0xc001", "xor edx, edx", "wrmsr", "mov al, gs:[0]", "out 0x80, al", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.ram.write(modes::DATA, &[0x1a, 0x2b]);
    machine.expect(&[out(0x80, 1, 0x1a), out(0x80, 1, 0x2b), halt()])?;
    let state = machine.regs()?;
    same!(
        (state.fs.base, state.gs.base),
        (modes::DATA, modes::DATA + 1),
        "bases"
    );
    let list = [
        (0xc000_0100, 0x7fff_1234_0000),
        (0xc000_0101, 0xffff_8000_0000_5678),
    ];
    same!(machine.vcpu.set_msrs(&list)?, 2, "done");
    let state = machine.regs()?;
    same!(
        (state.fs.base, state.gs.base),
        (list[0].1, list[1].1),
        "bases by SET_MSRS"
    );
    Ok(())
}

/// IA32_SPEC_CTRL and the others, where the processor has them; #GP where it has not.
fn speculation() -> Outcome {
    let machine = machine()?;
    let code = guest!(64: "mov eax, 7", "xor ecx, ecx", "cpuid", "hlt");
    machine.ram.write(modes::CODE, code.bits64);
    machine.expect(&[halt()])?;
    let features = machine.regs()?.rdx;
    let (spec, flush, caps) = (features >> 26 & 1, features >> 28 & 1, features >> 29 & 1);
    for (msr, there) in [(0x48, spec), (0x10a, caps)] {
        let value = guest_reads(&machine, msr)?;
        same!(value.is_some(), there == 1, "RDMSR {msr:#x}");
    }
    for (msr, there) in [(0x49, spec), (0x10b, flush)] {
        same!(guest_reads(&machine, msr)?, None, "RDMSR {msr:#x}");
        same!(
            guest_writes(&machine, msr, 2)?,
            false,
            "reserved bit of {msr:#x}"
        );
        for _ in 0..3 {
            same!(
                guest_writes(&machine, msr, 1)?,
                there == 1,
                "WRMSR {msr:#x}"
            );
        }
    }
    same!(
        guest_writes(&machine, 0x10a, 0)?,
        false,
        "WRMSR of the capabilities"
    );
    same!(
        guest_writes(&machine, 0x48, 1 << 20)?,
        false,
        "reserved bit of IA32_SPEC_CTRL"
    );
    if spec == 1 {
        for value in [0, 1, 3, 2] {
            same!(
                guest_writes(&machine, 0x48, value)?,
                true,
                "IA32_SPEC_CTRL = {value}"
            );
            same!(guest_reads(&machine, 0x48)?, Some(value), "IA32_SPEC_CTRL");
            same!(machine.vcpu.msrs(&[0x48])?, [value], "GET_MSRS");
        }
        // The guest has it to itself, and the host its own.
        same!(machine.vcpu.set_msrs(&[(0x48, 1)])?, 1, "SET_MSRS");
        same!(guest_reads(&machine, 0x48)?, Some(1), "after SET_MSRS");
        same!(
            guest_writes(&machine, 0x48, 1 << 20)?,
            false,
            "reserved bit, later"
        );
    }
    Ok(())
}

/// What systems read without a CPUID bit that says they may.
fn looked_at_without_asking() -> Outcome {
    let machine = machine()?;
    for (msr, value) in [
        (0x34, 0),
        (0x35, 0x1_0001),
        (0xce, 0),
        (0x140, 0),
        (0x198, 0),
        (0x199, 0),
        (0x1ad, 0),
        (0x1db, 0),
        (0x1fc, 0),
        (0x606, 0),
        (0x611, 0),
        (0x641, 0),
    ] {
        same!(guest_reads(&machine, msr)?, Some(value), "RDMSR {msr:#x}");
    }
    for (msr, value, taken) in [
        (0x199, 0x1800, true),
        (0x1fc, 1, true),
        (0x140, 0, true),
        (0x140, 1, false),
        (0x34, 1, false),
        (0xce, 0, false),
        (0x606, 0, false),
        (0x6e0, 0, false),
        (0x808, 0, false),
        (0x4000_0000, 0, false),
    ] {
        same!(guest_writes(&machine, msr, value)?, taken, "WRMSR {msr:#x}");
    }
    same!(guest_reads(&machine, 0x199)?, Some(0), "IA32_PERF_CTL");
    Ok(())
}
