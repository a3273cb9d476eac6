//! CPUID as the guest sees it, and the client's table.

use abi::CpuidEntry;

use super::{Case, Outcome};
use crate::client::Refused;
use crate::exit::halt;
use crate::guest;
use crate::machine::{Machine, prepare, run, vm_with_ram};
use crate::modes::{self, Mode};

pub const CASES: &[Case] = &[
    case!(vendor in SIZES),
    case!(hypervisor_bit_and_leaf in LONG),
    case!(no_vmx_no_monitor in LONG),
    case!(apic_id_per_vcpu),
    case!(osxsave_follows_cr4 in LONG),
    case!(leaf_7 in LONG),
    case!(leaf_d_follows_xcr0 in LONG),
    case!(beyond_the_highest_leaf in LONG),
    case!(extended_leaves in LONG),
    case!(clears_upper_halves in LONG),
    case!(get_cpuid_sizes),
    case!(get_cpuid_agrees_with_the_guest),
    case!(set_cpuid_changes_the_guest),
    case!(set_cpuid_cannot_add_what_is_not_there),
    case!(set_cpuid_changes_all_vcpus),
    case!(set_cpuid_errors),
];

/// EAX, EBX, ECX, EDX of a leaf as the guest gets them.
fn leaf(machine: &Machine, leaf: u32, subleaf: u32) -> anyhow::Result<[u32; 4]> {
    machine.set(|state| {
        state.rip = modes::CODE;
        state.rax = leaf.into();
        state.rcx = subleaf.into();
    })?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    Ok([state.rax, state.rbx, state.rcx, state.rdx].map(|value| value as u32))
}

fn asking() -> anyhow::Result<Machine> {
    Machine::new(Mode::Long, guest!(64: "cpuid", "hlt"))
}

fn vendor(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov eax, 0", "cpuid", "hlt"))?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    let mut text = Vec::new();
    for register in [state.rbx, state.rdx, state.rcx] {
        text.extend((register as u32).to_le_bytes());
    }
    same!(String::from_utf8_lossy(&text), "GenuineIntel", "vendor");
    anyhow::ensure!(state.rax >= 7, "highest leaf {:#x}", state.rax);
    Ok(())
}

fn hypervisor_bit_and_leaf(_: Mode) -> Outcome {
    let machine = asking()?;
    same!(leaf(&machine, 1, 0)?[2] >> 31, 1, "hypervisor bit");
    let [_, ebx, ecx, edx] = leaf(&machine, 0x4000_0000, 0)?;
    let haxm = u32::from_le_bytes(*b"HAXM");
    same!([ebx, ecx, edx], [haxm; 3], "hypervisor's name");
    Ok(())
}

fn no_vmx_no_monitor(_: Mode) -> Outcome {
    let [_, _, ecx, _] = leaf(&asking()?, 1, 0)?;
    same!(ecx & (1 << 5 | 1 << 6 | 1 << 3), 0, "VMX, SMX, MONITOR");
    same!(ecx & (1 << 21 | 1 << 24), 0, "x2APIC, TSC deadline");
    Ok(())
}

fn apic_id_per_vcpu() -> Outcome {
    let (vm, ram) = vm_with_ram()?;
    modes::write_tables(Mode::Long, &ram);
    let code = guest!(64: "mov eax, 1", "cpuid", "mov edi, ebx", "mov eax, 11", "xor ecx, ecx", "cpuid", "hlt");
    ram.write(modes::CODE, code.bits64);
    for id in 0..4_u32 {
        let vcpu = vm.create_vcpu(id)?;
        prepare(&vcpu, Mode::Long)?;
        same!(run(&vcpu, Mode::Long, &ram)?, halt().exit, "exit");
        let state = vcpu.regs()?;
        same!(state.rdi as u32 >> 24, id, "APIC id of leaf 1");
        same!(state.rdx as u32, id, "x2APIC id of leaf 11");
    }
    Ok(())
}

fn osxsave_follows_cr4(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov eax, 1", "cpuid", "mov edi, ecx",
        "mov rax, cr4", "bts rax, 18", "mov cr4, rax",
        "mov eax, 1", "cpuid", "mov esi, ecx",
        "mov rax, cr4", "btr rax, 18", "mov cr4, rax",
        "mov eax, 1", "cpuid", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    let bit = |value: u64| value >> 27 & 1;
    same!(
        [bit(state.rdi), bit(state.rsi), bit(state.rcx)],
        [0, 1, 0],
        "OSXSAVE"
    );
    same!(state.rdi >> 26 & 1, 1, "XSAVE");
    Ok(())
}

/// The emulated processor is a Haswell: what it has and can be virtualised is there.
fn leaf_7(_: Mode) -> Outcome {
    let machine = asking()?;
    let [_, ebx, _, _] = leaf(&machine, 7, 0)?;
    for (bit, name) in [
        (0, "FSGSBASE"),
        (3, "BMI1"),
        (5, "AVX2"),
        (7, "SMEP"),
        (8, "BMI2"),
        (10, "INVPCID"),
    ] {
        same!(ebx >> bit & 1, 1, "{name}");
    }
    same!(leaf(&machine, 7, 5)?, [0; 4], "a subleaf that is not there");
    Ok(())
}

fn leaf_d_follows_xcr0(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov rax, cr4", "bts rax, 18", "mov cr4, rax",
        "mov eax, 13", "xor ecx, ecx", "cpuid", "mov edi, ebx",
        "xor ecx, ecx", "xor edx, edx", "mov eax, 7", "xsetbv",
        "mov eax, 13", "xor ecx, ecx", "cpuid", "mov esi, ebx", "mov r8d, ecx",
        "mov eax, 13", "mov ecx, 2", "cpuid", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    // SDM 13.4: 512 + 64 bytes, and 256 for the upper halves of YMM.
    same!(
        (state.rdi, state.rsi, state.r8),
        (576, 832, 832),
        "EBX before and after, ECX"
    );
    same!(
        (state.rax, state.rbx),
        (256, 576),
        "size and offset of the AVX state"
    );
    Ok(())
}

fn beyond_the_highest_leaf(_: Mode) -> Outcome {
    let machine = asking()?;
    same!(leaf(&machine, 0x1000, 0)?, [0; 4], "leaf 1000h");
    same!(leaf(&machine, 0x8000_1000, 0)?, [0; 4], "leaf 80001000h");
    // The client lowers both: leaves that were there are not.
    let (_, _, entries) = machine.vcpu.cpuid(64);
    let mut leaf_0 = find(&entries, 0)?;
    leaf_0.eax = 6;
    let mut extended_0 = find(&entries, 0x8000_0000)?;
    extended_0.eax = 0x8000_0007;
    machine.vcpu.set_cpuid(2, &[leaf_0, extended_0])?;
    for (number, there) in [
        (1, true),
        (7, false),
        (0xb, false),
        (0xd, false),
        (0x4000_0000, true),
        (0x8000_0001, true),
        (0x8000_0008, false),
    ] {
        let answer = leaf(&machine, number, 0)?;
        same!(answer != [0; 4], there, "leaf {number:x}h is there");
    }
    Ok(())
}

fn extended_leaves(_: Mode) -> Outcome {
    let machine = asking()?;
    anyhow::ensure!(leaf(&machine, 0x8000_0000, 0)?[0] >= 0x8000_0008, "highest");
    let [_, _, _, edx] = leaf(&machine, 0x8000_0001, 0)?;
    for (bit, name) in [
        (11, "SYSCALL"),
        (20, "NX"),
        (27, "RDTSCP"),
        (29, "long mode"),
    ] {
        same!(edx >> bit & 1, 1, "{name}");
    }
    let [eax, ..] = leaf(&machine, 0x8000_0008, 0)?;
    same!(eax >> 8 & 0xff, 48, "linear address bits");
    anyhow::ensure!(
        (32..=48).contains(&(eax & 0xff)),
        "physical address bits {}",
        eax & 0xff
    );
    Ok(())
}

fn clears_upper_halves(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov rbx, -1", "mov rdx, -1", "mov rcx, 0xffffffff00000000", "mov rax, 0xffffffff00000000",
        "cpuid", "out 0x80, al", "hlt");
    let machine = Machine::new(mode, code)?;
    let exit = machine.run()?;
    anyhow::ensure!(matches!(exit, crate::exit::Exit::Out { .. }), "{exit:?}");
    let state = machine.regs()?;
    for (value, name) in [
        (state.rax, "RAX"),
        (state.rbx, "RBX"),
        (state.rcx, "RCX"),
        (state.rdx, "RDX"),
    ] {
        same!(value >> 32, 0, "upper half of {name}");
    }
    Ok(())
}

fn get_cpuid_sizes() -> Outcome {
    let machine = asking()?;
    for room in [0, 1, 17] {
        let (result, total, _) = machine.vcpu.cpuid(room);
        same!(
            result,
            Err(Refused(libc::ENOMEM)),
            "GET_CPUID with room for {room}"
        );
        same!(total, 18, "entries needed");
    }
    for room in [18, 30, 64] {
        let (result, total, entries) = machine.vcpu.cpuid(room);
        same!(result, Ok(()), "GET_CPUID with room for {room}");
        same!((total, entries.len()), (18, 18), "entries");
    }
    Ok(())
}

fn get_cpuid_agrees_with_the_guest() -> Outcome {
    let machine = asking()?;
    let (_, _, entries) = machine.vcpu.cpuid(18);
    for entry in entries {
        // Leaf 1 has the APIC id, leaf 13 the enabled size; both are the vCPU's own.
        if matches!(entry.function, 1 | 0xd) {
            continue;
        }
        let got = leaf(&machine, entry.function, entry.index)?;
        let wanted = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        same!(
            got,
            wanted,
            "leaf {:x} subleaf {}",
            entry.function,
            entry.index
        );
    }
    Ok(())
}

fn find(entries: &[CpuidEntry], function: u32) -> anyhow::Result<CpuidEntry> {
    let found = entries
        .iter()
        .find(|entry| entry.function == function && entry.index == 0);
    found
        .copied()
        .ok_or_else(|| anyhow::anyhow!("no leaf {function:#x}"))
}

fn set_cpuid_changes_the_guest() -> Outcome {
    let machine = asking()?;
    let (_, _, entries) = machine.vcpu.cpuid(64);
    let mut leaf_1 = find(&entries, 1)?;
    anyhow::ensure!(
        leaf_1.ecx & 1 << 28 != 0,
        "AVX is not there to be taken away"
    );
    leaf_1.ecx &= !(1 << 28);
    machine.vcpu.set_cpuid(1, &[leaf_1])?;
    let [_, _, ecx, _] = leaf(&machine, 1, 0)?;
    same!(ecx & 1 << 28, 0, "AVX");
    let (_, _, entries) = machine.vcpu.cpuid(64);
    same!(find(&entries, 1)?.ecx & 1 << 28, 0, "AVX by GET_CPUID");
    Ok(())
}

/// The host's limits stay: VMX, AVX-512 on a Haswell.
fn set_cpuid_cannot_add_what_is_not_there() -> Outcome {
    let machine = asking()?;
    let (_, _, entries) = machine.vcpu.cpuid(64);
    let mut leaf_1 = find(&entries, 1)?;
    leaf_1.ecx |= 1 << 5 | 1 << 3;
    let mut leaf_7 = find(&entries, 7)?;
    leaf_7.ebx |= 1 << 16;
    machine.vcpu.set_cpuid(2, &[leaf_1, leaf_7])?;
    same!(
        leaf(&machine, 1, 0)?[2] & (1 << 5 | 1 << 3),
        0,
        "VMX and MONITOR"
    );
    same!(leaf(&machine, 7, 0)?[1] & 1 << 16, 0, "AVX-512");
    Ok(())
}

fn set_cpuid_changes_all_vcpus() -> Outcome {
    let machine = asking()?;
    let other = machine.vm.create_vcpu(1)?;
    let (_, _, entries) = machine.vcpu.cpuid(64);
    let mut leaf_1 = find(&entries, 1)?;
    leaf_1.ecx &= !(1 << 28);
    other.set_cpuid(1, &[leaf_1])?;
    same!(leaf(&machine, 1, 0)?[2] & 1 << 28, 0, "AVX");
    Ok(())
}

fn set_cpuid_errors() -> Outcome {
    let machine = asking()?;
    same!(
        machine.vcpu.set_cpuid(0, &[]),
        Err(Refused(libc::EINVAL)),
        "total 0"
    );
    same!(
        machine.vcpu.set_cpuid(65, &[]),
        Err(Refused(libc::E2BIG)),
        "total 65"
    );
    let request = abi::os::linux::HAX_VCPU_IOCTL_SET_CPUID;
    let mut pointer = 8_u64;
    let result = machine.vcpu.node.with(request, &mut pointer);
    same!(result, Err(Refused(libc::EFAULT)), "a table at address 8");
    same!(
        machine.vcpu.node.raw(request, 8),
        Err(Refused(libc::EFAULT)),
        "a pointer at address 8"
    );
    Ok(())
}
