//! Probing, and every request's error paths: bad addresses, unknown numbers, wrong devices, other processes.

use abi::os::linux as number;
use abi::{
    COMPAT_VERSION, CURRENT_VERSION, CapabilityInfo, ModuleVersion, RamblockInfo, Request,
    SetRamInfo2, WorkStatus,
};

use super::{Case, Outcome};
use crate::client::{Node, Refused, System, Vcpu};
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;
use crate::process::{in_child, request_in_child};
use crate::ram::Ram;

pub const CASES: &[Case] = &[
    case!(version),
    case!(capability),
    case!(capability_is_written_whole),
    case!(system_opens_often),
    case!(memory_limit),
    case!(memory_limit_with_a_vm),
    case!(unknown_numbers),
    case!(requests_on_the_wrong_device),
    case!(destroy_requests_do_nothing),
    case!(bad_addresses),
    case!(half_a_structure),
    case!(read_only_results),
    case!(both_numbers_of_vcpu_create),
    case!(notify_any_version),
    case!(reserved_fields),
    case!(tunnel_is_the_same_each_time),
    case!(another_process_is_refused),
    case!(another_process_cannot_open),
    case!(another_process_may_use_the_system_device),
    case!(read_write_and_mmap_are_refused),
];

fn refused(errno: i32) -> Result<i32, Refused> {
    Err(Refused(errno))
}

fn version() -> Outcome {
    let wanted = ModuleVersion {
        compat_version: COMPAT_VERSION,
        cur_version: CURRENT_VERSION,
    };
    same!(System::open()?.version()?, wanted, "version");
    Ok(())
}

fn capability() -> Outcome {
    let info = System::open()?.capability()?;
    same!(info.wstatus, 3, "wstatus: WORKING and MEMQUOTA");
    same!(info.winfo, 0x3ff, "winfo: all capabilities");
    same!(info.mem_quota, 1 << 48, "quota");
    same!(info.win_refcount, 0, "win_refcount");
    Ok(())
}

fn capability_is_written_whole() -> Outcome {
    let system = System::open()?;
    let mut seen = Vec::new();
    for byte in [0_u8, 0xff] {
        let mut bytes = [byte; size_of::<CapabilityInfo>()];
        system.0.with(number::HAX_IOCTL_CAPABILITY, &mut bytes)?;
        seen.push(bytes);
    }
    same!(seen[0], seen[1], "bytes");
    Ok(())
}

fn system_opens_often() -> Outcome {
    let open: Result<Vec<System>, Refused> = (0..20).map(|_| System::open()).collect();
    for system in open? {
        system.version()?;
    }
    Ok(())
}

fn memory_limit() -> Outcome {
    let system = System::open()?;
    system.set_memlimit(Some(100))?;
    same!(system.capability()?.mem_quota, 100 << 20, "quota in bytes");
    system.set_memlimit(None)?;
    let status = WorkStatus::from_bits_retain(system.capability()?.wstatus);
    same!(status, WorkStatus::WORKING, "status without a limit");
    system.set_memlimit(Some(1 << 28))?;
    same!(system.capability()?.mem_quota, 1 << 48, "quota");
    Ok(())
}

fn memory_limit_with_a_vm() -> Outcome {
    let system = System::open()?;
    let vm = system.create_vm()?;
    same!(
        system.set_memlimit(Some(1)),
        Err(Refused(libc::EINVAL)),
        "with a VM"
    );
    drop(vm);
    system.set_memlimit(Some(1 << 28))?;
    Ok(())
}

fn unknown_numbers() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let system = System::open()?;
    let mut room = [0_u64; 128];
    for unknown in [0, 1, 0x5401, 0xc008_0019, 0xc0ff_00ee, u32::MAX] {
        for node in [&system.0, &machine.vm.node, &machine.vcpu.node] {
            same!(
                node.with(unknown, &mut room),
                refused(libc::ENOSYS),
                "{unknown:#x}"
            );
        }
    }
    Ok(())
}

fn requests_on_the_wrong_device() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let system = System::open()?;
    let nodes = [
        (abi::Device::System, &system.0),
        (abi::Device::Vm, &machine.vm.node),
        (abi::Device::Vcpu, &machine.vcpu.node),
    ];
    let mut room = [0_u64; 128];
    for request in Request::ALL {
        let Some(number) = number::number(request) else {
            continue;
        };
        for (device, node) in nodes {
            if device != request.device() {
                let result = node.with(number, &mut room);
                same!(
                    result,
                    refused(libc::ENOSYS),
                    "{} on {device:?}",
                    request.name()
                );
            }
        }
    }
    Ok(())
}

fn destroy_requests_do_nothing() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let mut id = machine.vm.id;
    same!(
        System::open()?
            .0
            .with(number::HAX_IOCTL_DESTROY_VM, &mut id),
        Ok(0),
        "DESTROY_VM"
    );
    let mut id = 0_u32;
    for number in [number::HAX_VM_IOCTL_VCPU_DESTROY, number::VCPU_DESTROY_QEMU] {
        same!(machine.vm.node.with(number, &mut id), Ok(0), "VCPU_DESTROY");
    }
    machine.expect(&[crate::exit::halt()])
}

/// Null, an unmapped page, the kernel's half, a non-canonical address, the very end.
const BAD: &[u64] = &[
    0,
    0x10,
    0xffff_8000_0000_0000,
    0x8000_0000_0000_0000,
    u64::MAX - 3,
];

fn bad_addresses() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let system = System::open()?;
    let before = machine.regs()?;
    for request in Request::ALL {
        let Some(number) = number::number(request) else {
            continue;
        };
        if matches!(
            request,
            Request::Run | Request::DestroyVm | Request::VcpuDestroy
        ) {
            continue;
        }
        let node = match request.device() {
            abi::Device::System => &system.0,
            abi::Device::Vm => &machine.vm.node,
            abi::Device::Vcpu => &machine.vcpu.node,
        };
        for address in BAD {
            let result = node.raw(number, *address);
            same!(
                result,
                refused(libc::EFAULT),
                "{} at {address:#x}",
                request.name()
            );
        }
    }
    same!(machine.regs()?, before, "registers");
    // CREATE_VM could not tell its id: that VM is gone, and its id is free.
    let vm = system.create_vm()?;
    same!(vm.id, machine.vm.id + 1, "id of the next VM");
    machine.expect(&[crate::exit::halt()])
}

/// Arguments whose second half is on a page that is not there.
fn half_a_structure() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let page = Ram::new(0x2000);
    page.unmap(0x1000, 0x1000);
    let before = machine.regs()?;
    for request in [
        Request::SetRegs,
        Request::GetRegs,
        Request::SetFpu,
        Request::GetFpu,
        Request::SetMsrs,
        Request::GetMsrs,
        Request::VcpuDebug,
        Request::SetupTunnel,
    ] {
        let size = u64::from(request.argument().size);
        let address = page.address() + 0x1000 - size / 2;
        let number = number::number(request).unwrap_or(0);
        let result = machine.vcpu.node.raw(number, address);
        same!(result, refused(libc::EFAULT), "{}", request.name());
    }
    same!(machine.regs()?, before, "registers");
    Ok(())
}

fn read_only_results() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let page = Ram::new(0x1000);
    page.protect(0, 0x1000, libc::PROT_READ);
    for request in [Request::GetRegs, Request::GetFpu, Request::SetupTunnel] {
        let number = number::number(request).unwrap_or(0);
        let result = machine.vcpu.node.raw(number, page.address());
        same!(result, refused(libc::EFAULT), "{}", request.name());
    }
    let system = System::open()?;
    for request in [Request::Version, Request::Capability, Request::CreateVm] {
        let number = number::number(request).unwrap_or(0);
        same!(
            system.0.raw(number, page.address()),
            refused(libc::EFAULT),
            "{}",
            request.name()
        );
    }
    same!(
        system.create_vm()?.id,
        machine.vm.id + 1,
        "id of the next VM"
    );
    Ok(())
}

fn both_numbers_of_vcpu_create() -> Outcome {
    let vm = System::open()?.create_vm()?;
    for (id, number) in [
        (0_u32, number::HAX_VM_IOCTL_VCPU_CREATE),
        (1, number::HAX_VM_IOCTL_VCPU_CREATE_ORIG),
    ] {
        let mut id_out = id;
        same!(vm.node.with(number, &mut id_out), Ok(0), "VCPU_CREATE");
        Vcpu::open(vm.id, id)?;
    }
    Ok(())
}

fn notify_any_version() -> Outcome {
    let vm = System::open()?.create_vm()?;
    for (current, least) in [(4, 4), (0, 0), (1, 9), (u32::MAX, u32::MAX)] {
        same!(
            vm.notify_version(current, least),
            Ok(()),
            "{current} {least}"
        );
    }
    Ok(())
}

fn reserved_fields() -> Outcome {
    let vm = System::open()?.create_vm()?;
    let ram = Ram::new(0x4000);
    let mut block = RamblockInfo {
        start_va: ram.address(),
        size: 0x4000,
        reserved: 1,
    };
    let result = vm.node.with(number::HAX_VM_IOCTL_ADD_RAMBLOCK, &mut block);
    same!(result, refused(libc::EINVAL), "ADD_RAMBLOCK");
    vm.add_ramblock(ram.address(), 0x4000)?;
    for (reserved1, reserved2) in [(1, 0), (0, 1)] {
        let mut argument = SetRamInfo2 {
            pa_start: 0,
            size: 0x4000,
            va: ram.address(),
            flags: 0,
            reserved1,
            reserved2,
        };
        let result = vm.node.with(number::HAX_VM_IOCTL_SET_RAM2, &mut argument);
        same!(
            result,
            refused(libc::EINVAL),
            "SET_RAM2 {reserved1} {reserved2}"
        );
    }
    vm.set_ram2(0, 0x4000, 0, ram.address())?;
    let mut argument = abi::ProtectRamInfo {
        pa_start: 0,
        size: 0x1000,
        flags: 0,
        reserved: 1,
    };
    let result = vm
        .node
        .with(number::HAX_VM_IOCTL_PROTECT_RAM, &mut argument);
    same!(result, refused(libc::EINVAL), "PROTECT_RAM");
    Ok(())
}

fn tunnel_is_the_same_each_time() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let first = machine.vcpu.tunnel_info()?;
    machine.expect(&[crate::exit::halt()])?;
    same!(machine.vcpu.tunnel_info()?, first, "SETUP_TUNNEL");
    same!(first.size, 4096, "size");
    anyhow::ensure!(first.va != first.io_va, "one page for both");
    Ok(())
}

/// The nodes are inherited over fork; the VM is not.
fn another_process_is_refused() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let room = Box::new([0_u64; 128]);
    let address = std::ptr::from_ref(&*room) as u64;
    for request in Request::ALL {
        let Some(number) = number::number(request) else {
            continue;
        };
        let node = match request.device() {
            abi::Device::System => continue,
            abi::Device::Vm => &machine.vm.node,
            abi::Device::Vcpu => &machine.vcpu.node,
        };
        let errno = request_in_child(node, number, address)?;
        same!(i32::from(errno), libc::EACCES, "{}", request.name());
    }
    machine.expect(&[crate::exit::halt()])
}

fn another_process_cannot_open() -> Outcome {
    let vm = System::open()?.create_vm()?;
    vm.create_vcpu_only(0)?;
    let path = Vcpu::path(vm.id, 0);
    let errno = in_child(|| match Node::open(&path) {
        Ok(_) => 0,
        Err(refused) => refused.0 as u8,
    })?;
    same!(i32::from(errno), libc::EACCES, "open in a child");
    // It was not used up by the attempt.
    Vcpu::open(vm.id, 0)?;
    Ok(())
}

fn another_process_may_use_the_system_device() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let works = in_child(|| {
        let own = System::open().and_then(|system| system.create_vm());
        u8::from(own.and_then(|vm| vm.create_vcpu(0)).is_ok())
    })?;
    same!(works, 1, "a VM of the child's own");
    machine.expect(&[crate::exit::halt()])
}

/// No node has any of them.
fn read_write_and_mmap_are_refused() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let system = System::open()?;
    for (name, node) in [
        ("/dev/HAX", &system.0),
        ("the VM", &machine.vm.node),
        ("the vCPU", &machine.vcpu.node),
    ] {
        same!(node.read(), Err(Refused(libc::EINVAL)), "read of {name}");
        same!(node.write(), Err(Refused(libc::EINVAL)), "write of {name}");
        same!(node.map(), Err(Refused(libc::ENODEV)), "mmap of {name}");
    }
    machine.expect(&[crate::exit::halt()])
}
