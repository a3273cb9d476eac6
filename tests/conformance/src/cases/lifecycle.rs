//! VMs and vCPUs come and go: ids, open-once, order of closing, process death, and nothing left behind.

use std::cell::Cell;

use super::{Case, Outcome};
use crate::client::{Node, Refused, System, Vcpu, Vm};
use crate::exit::halt;
use crate::guest;
use crate::machine::{Machine, prepare, run, vm_with_ram};
use crate::modes::{self, Mode};
use crate::process::{after_fork, in_child, killed_child};
use crate::ram::Ram;

pub const CASES: &[Case] = &[
    case!(ids_are_lowest_first),
    case!(made_while_signals_come),
    case!(sixty_four_vms),
    case!(sixteen_vcpus),
    case!(vcpu_ids_in_any_order),
    case!(vcpu_id_comes_back),
    case!(opens_once),
    case!(nodes_appear_and_vanish),
    case!(vcpu_closed_first),
    case!(vm_closed_first),
    case!(vm_node_is_gone_when_closed),
    case!(unopened_vcpu_ends_with_its_vm),
    case!(process_exit),
    case!(process_killed),
    case!(killed_before_it_opens),
    case!(killed_while_running),
    case!(inherited_by_a_child),
    case!(memory_comes_back),
    case!(pages_come_back_with_ram),
    case!(close_while_pending),
];

fn refused<T>(errno: i32) -> Result<T, Refused> {
    Err(Refused(errno))
}

/// The error of an open that must fail.
fn open_error(path: &str) -> Option<i32> {
    Node::open(path).err().map(|refused| refused.0)
}

fn ids_are_lowest_first() -> Outcome {
    let system = System::open()?;
    let first = system.create_vm()?;
    let second = system.create_vm()?;
    let third = system.create_vm()?;
    same!(
        [first.id, second.id, third.id],
        [first.id, first.id + 1, first.id + 2],
        "ids"
    );
    let id = second.id;
    drop(second);
    same!(system.create_vm()?.id, id, "the id that is free again");
    Ok(())
}

fn made_while_signals_come() -> Outcome {
    crate::process::with_alarm(120, || {
        for _ in 0..4 {
            let vm = System::open()?.create_vm()?;
            vm.create_vcpu(0)?;
        }
        Ok(())
    })
}

fn sixty_four_vms() -> Outcome {
    let system = System::open()?;
    let mut vms = Vec::new();
    let error = loop {
        match system.create_vm() {
            Ok(vm) => vms.push(vm),
            Err(error) => break error,
        }
        anyhow::ensure!(vms.len() <= 64, "more than 64 VMs");
    };
    same!(error, Refused(libc::ENOMEM), "the 65th");
    same!(vms.len(), 64, "VMs");
    let ids: Vec<u32> = vms.iter().map(|vm| vm.id).collect();
    same!(ids, (0..64).collect::<Vec<u32>>(), "ids");
    drop(vms.remove(17));
    same!(system.create_vm()?.id, 17, "the id that is free again");
    Ok(())
}

fn sixteen_vcpus() -> Outcome {
    let (vm, ram) = vm_with_ram()?;
    modes::write_tables(Mode::Long, &ram);
    ram.write(modes::CODE, guest!(64: "inc eax", "hlt").bits64);
    let mut vcpus = Vec::new();
    for id in 0..16 {
        let vcpu = vm.create_vcpu(id)?;
        prepare(&vcpu, Mode::Long)?;
        vcpus.push(vcpu);
    }
    for id in [16, 17, 255, u32::MAX] {
        same!(vm.create_vcpu_only(id), refused(libc::EINVAL), "vCPU {id}");
    }
    for vcpu in &vcpus {
        same!(run(vcpu, Mode::Long, &ram)?, halt().exit, "exit");
        same!(vcpu.regs()?.rax, 1, "EAX");
    }
    Ok(())
}

fn vcpu_ids_in_any_order() -> Outcome {
    let (vm, ram) = vm_with_ram()?;
    modes::write_tables(Mode::Long, &ram);
    ram.write(modes::CODE, guest!(64: "mov eax, 1", "cpuid", "hlt").bits64);
    for id in [5, 0, 15, 3] {
        let vcpu = vm.create_vcpu(id)?;
        prepare(&vcpu, Mode::Long)?;
        same!(run(&vcpu, Mode::Long, &ram)?, halt().exit, "exit");
        same!(vcpu.regs()?.rbx as u32 >> 24, id, "APIC id");
    }
    Ok(())
}

fn vcpu_id_comes_back() -> Outcome {
    let vm = System::open()?.create_vm()?;
    let vcpu = vm.create_vcpu(3)?;
    same!(
        vm.create_vcpu_only(3),
        refused(libc::EINVAL),
        "the same id twice"
    );
    drop(vcpu);
    vm.create_vcpu(3)?;
    Ok(())
}

fn opens_once() -> Outcome {
    let vm = System::open()?.create_vm()?;
    let _vcpu = vm.create_vcpu(0)?;
    same!(open_error(&Vm::path(vm.id)), Some(libc::EBUSY), "VM");
    same!(open_error(&Vcpu::path(vm.id, 0)), Some(libc::EBUSY), "vCPU");
    Ok(())
}

fn exists(path: &str) -> bool {
    std::fs::metadata(path).is_ok()
}

fn nodes_appear_and_vanish() -> Outcome {
    let vm = System::open()?.create_vm()?;
    let vcpu = vm.create_vcpu(11)?;
    let (vm_path, vcpu_path) = (Vm::path(vm.id), Vcpu::path(vm.id, 11));
    anyhow::ensure!(exists(&vm_path) && exists(&vcpu_path), "no nodes");
    drop(vcpu);
    anyhow::ensure!(!exists(&vcpu_path), "{vcpu_path} is still there");
    drop(vm);
    anyhow::ensure!(!exists(&vm_path), "{vm_path} is still there");
    Ok(())
}

fn vcpu_closed_first() -> Outcome {
    for _ in 0..5 {
        let Machine { vcpu, vm, .. } = Machine::new(Mode::Long, guest!(64: "hlt"))?;
        drop(vcpu);
        drop(vm);
    }
    same!(System::open()?.create_vm()?.id, 0, "lowest free id");
    Ok(())
}

/// The vCPU runs on without its VM's node.
fn vm_closed_first() -> Outcome {
    for _ in 0..5 {
        let Machine {
            vcpu,
            vm,
            ram,
            mode,
            ..
        } = Machine::new(Mode::Long, guest!(64: "out 0x80, al", "hlt"))?;
        same!(
            run(&vcpu, mode, &ram)?,
            crate::exit::out(0x80, 1, 0).exit,
            "exit"
        );
        drop(vm);
        same!(
            run(&vcpu, mode, &ram)?,
            halt().exit,
            "exit without the VM's node"
        );
        drop(vcpu);
    }
    same!(System::open()?.create_vm()?.id, 0, "lowest free id");
    Ok(())
}

fn vm_node_is_gone_when_closed() -> Outcome {
    let vm = System::open()?.create_vm()?;
    let _vcpu = vm.create_vcpu(0)?;
    let path = Vm::path(vm.id);
    drop(vm);
    anyhow::ensure!(
        matches!(
            open_error(&path),
            Some(libc::ENOENT | libc::ENODEV | libc::EBUSY)
        ),
        "{path} opens again"
    );
    Ok(())
}

fn unopened_vcpu_ends_with_its_vm() -> Outcome {
    let vm = System::open()?.create_vm()?;
    vm.create_vcpu_only(0)?;
    vm.create_vcpu_only(1)?;
    let (id, path) = (vm.id, Vcpu::path(vm.id, 1));
    drop(vm);
    anyhow::ensure!(!exists(&path), "{path} is still there");
    same!(System::open()?.create_vm()?.id, id, "id");
    Ok(())
}

/// A child makes VMs and leaves without closing anything.
fn process_exit() -> Outcome {
    for _ in 0..3 {
        let found = in_child(|| match Machine::new(Mode::Long, guest!(64: "hlt")) {
            Ok(machine) => {
                let halted = machine.run().is_ok_and(|exit| exit == halt().exit);
                std::mem::forget(machine);
                u8::from(halted)
            }
            Err(_) => 0,
        })?;
        same!(found, 1, "the child's guest");
    }
    same!(System::open()?.create_vm()?.id, 0, "lowest free id");
    Ok(())
}

fn process_killed() -> Outcome {
    killed_child(|| {
        let machines: Vec<_> = (0..4)
            .filter_map(|_| Machine::new(Mode::Long, guest!(64: "hlt")).ok())
            .collect();
        let good = machines.len() == 4 && machines.iter().all(|machine| machine.run().is_ok());
        std::mem::forget(machines);
        good
    })?;
    same!(System::open()?.create_vm()?.id, 0, "lowest free id");
    Ok(())
}

/// Between the request that makes a VM and the open of its node.
fn killed_before_it_opens() -> Outcome {
    for _ in 0..2 {
        killed_child(|| System::open().is_ok_and(|system| system.create_vm_id().is_ok()))?;
    }
    same!(System::open()?.create_vm()?.id, 0, "lowest free id");
    Ok(())
}

/// A guest that never stops does not keep its process from being killed.
fn killed_while_running() -> Outcome {
    crate::process::killed_after(20, || {
        let Ok(machine) = Machine::new(Mode::Long, guest!(64: "2: jmp 2b")) else {
            return;
        };
        while machine.vcpu.run().is_ok() {}
    })?;
    same!(System::open()?.create_vm()?.id, 0, "lowest free id");
    Ok(())
}

/// A child's copies of the descriptors keep the VM alive, and end it. Where the parent has the tunnel the child has
/// something of its own, which stays.
fn inherited_by_a_child() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "out 0x80, al", "hlt"))?;
    machine.expect(&[crate::exit::out(0x80, 1, 0)])?;
    same!(in_child(|| 7)?, 7, "child");
    machine.expect(&[halt()])?;
    let tunnel = machine.vcpu.tunnel_info()?;
    // Each of the two processes drops its own.
    let machine = Cell::new(Some(machine));
    let parent = || {
        drop(machine.take());
        same!(
            System::open()?.create_vm()?.id,
            1,
            "id beside the child's VM"
        );
        Ok(())
    };
    let child = || {
        let pages = [tunnel.va, tunnel.io_va].map(|address| Ram::at(address, 0x1000));
        pages.iter().for_each(|page| page.write_u32(0, 77));
        drop(machine.take());
        pages.iter().map(|page| page.u32(0)).sum()
    };
    same!(after_fork(parent, child)?, 2 * 77, "the child's pages");
    same!(System::open()?.create_vm()?.id, 0, "id after the child");
    Ok(())
}

/// Kilobytes of memory the kernel has for itself: what /proc/meminfo calls slab and page tables, and free.
pub(super) fn free_kilobytes() -> anyhow::Result<i64> {
    // Freed things that wait for a grace period are freed first.
    std::thread::sleep(std::time::Duration::from_millis(60));
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let value = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        let word = line.and_then(|line| line.split_whitespace().nth(1));
        word.and_then(|word| word.parse::<i64>().ok()).unwrap_or(0)
    };
    // Each processor keeps some free pages to itself, the more the larger the machine.
    let zones = std::fs::read_to_string("/proc/zoneinfo")?;
    let counts = zones
        .lines()
        .filter_map(|line| line.trim().strip_prefix("count:"));
    let kept: i64 = counts
        .filter_map(|count| count.trim().parse::<i64>().ok())
        .sum();
    Ok(
        value("MemFree:")
            + value("Buffers:")
            + value("Cached:")
            + value("SReclaimable:")
            + 4 * kept,
    )
}

/// 200 VMs with two vCPUs, one after another: a page lost by each would be 800 KB.
fn memory_comes_back() -> Outcome {
    let round = || -> Outcome {
        let vm = System::open()?.create_vm()?;
        let ram = Ram::new(0x10000);
        vm.add_ramblock(ram.address(), 0x10000)?;
        vm.set_ram(0, 0x10000, 0, ram.address())?;
        let _one = vm.create_vcpu(0)?;
        let _two = vm.create_vcpu(1)?;
        Ok(())
    };
    for _ in 0..20 {
        round()?;
    }
    loses_less_than(600, || (0..200).try_for_each(|_| round()))
}

/// `rounds` costs less memory than so many kilobytes. Others take and give some too; what is lost is lost each time.
fn loses_less_than(kilobytes: i64, rounds: impl Fn() -> Outcome) -> Outcome {
    let mut seen = Vec::new();
    for _ in 0..4 {
        let before = free_kilobytes()?;
        rounds()?;
        let lost = before - free_kilobytes()?;
        if lost < kilobytes {
            return Ok(());
        }
        seen.push(lost);
    }
    anyhow::bail!("so many KB less each time: {seen:?}")
}

/// Guests that touch all their memory: RAM, EPT tables and all come back.
fn pages_come_back_with_ram() -> Outcome {
    let round = || -> Outcome {
        let code = guest!(64:
            "mov edi, 0x100000", "2: mov [rdi], edi", "add edi, 4096", "cmp edi, 0x200000", "jb 2b", "hlt");
        let machine = Machine::new(Mode::Long, code)?;
        machine.expect(&[halt()])
    };
    for _ in 0..5 {
        round()?;
    }
    loses_less_than(400, || (0..40).try_for_each(|_| round()))
}

/// An open exit of each kind, and an interrupt queued, when the vCPU is closed.
fn close_while_pending() -> Outcome {
    for code in [
        guest!(64: "in al, 0x70"),
        guest!(64: "mov eax, [0xd0000]"),
        guest!(64: "mov edi, 0xc000", "mov ecx, 100", "rep insb"),
        guest!(64: "hlt"),
    ] {
        let machine = Machine::new(Mode::Long, code)?;
        machine.vcpu.interrupt(0x40)?;
        machine.run()?;
    }
    same!(System::open()?.create_vm()?.id, 0, "lowest free id");
    Ok(())
}
