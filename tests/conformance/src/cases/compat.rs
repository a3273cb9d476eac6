//! What a 32-bit program gets: the same requests with the same structures, and addresses that it can use.

use abi::os::linux as number;
use abi::{CapabilityInfo, ExitStatus, ModuleVersion};

use super::{Case, Outcome};
use crate::client::{Refused, System, Vcpu};
use crate::compat::{self, request};
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;
use crate::ram::Ram;

pub const CASES: &[Case] = &[
    case!(requests_of_each_device),
    case!(shared_pages_are_within_reach),
    case!(cpuid_table_at_a_32_bit_address),
];

/// Ends a case on a kernel that has no 32-bit programs.
macro_rules! on_32_bits {
    () => {
        if !compat::is_there()? {
            println!("  no 32-bit programs: line {} of {}", line!(), file!());
            return Ok(());
        }
    };
}

fn requests_of_each_device() -> Outcome {
    on_32_bits!();
    let low = Ram::low(0x1000);
    let at = low.address();
    let system = System::open()?;
    same!(
        request(&system.0, number::HAX_IOCTL_VERSION, at),
        Ok(0),
        "VERSION"
    );
    let version = system.version()?;
    let told = ModuleVersion {
        compat_version: low.u32(0),
        cur_version: low.u32(4),
    };
    same!(told, version, "version");
    low.fill(0, size_of::<CapabilityInfo>(), 0xff);
    same!(
        request(&system.0, number::HAX_IOCTL_CAPABILITY, at),
        Ok(0),
        "CAPABILITY"
    );
    same!(low.u64(8), system.capability()?.mem_quota, "quota");

    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    low.write_u32(0, 4);
    low.write_u32(4, 4);
    let notify = number::HAX_VM_IOCTL_NOTIFY_QEMU_VERSION;
    same!(
        request(&machine.vm.node, notify, at),
        Ok(0),
        "NOTIFY_QEMU_VERSION"
    );
    let vcpu = &machine.vcpu;
    loop {
        same!(
            request(&vcpu.node, number::HAX_VCPU_IOCTL_RUN, 0),
            Ok(0),
            "RUN"
        );
        if vcpu.tunnel.exit_status() != ExitStatus::Interrupt.raw() {
            break;
        }
    }
    same!(
        vcpu.tunnel.exit_status(),
        ExitStatus::Hlt.raw(),
        "exit status"
    );
    same!(
        request(&vcpu.node, number::HAX_VCPU_GET_REGS, at),
        Ok(0),
        "GET_REGS"
    );
    same!(low.u64(128), machine.regs()?.rip, "RIP");
    // Bad addresses and unknown requests are refused as to others.
    let nowhere = request(&vcpu.node, number::HAX_VCPU_GET_REGS, at + 0xf00);
    same!(nowhere, Err(Refused(libc::EFAULT)), "GET_REGS half outside");
    let unknown = request(&vcpu.node, 0x5401, at);
    same!(unknown, Err(Refused(libc::ENOSYS)), "TCGETS");
    Ok(())
}

/// VCPU_CREATE maps them into the process, where a 32-bit one can address them.
fn shared_pages_are_within_reach() -> Outcome {
    on_32_bits!();
    let low = Ram::low(0x1000);
    let at = low.address();
    let vm = System::open()?.create_vm()?;
    low.write_u32(0, 0);
    same!(
        request(&vm.node, number::HAX_VM_IOCTL_VCPU_CREATE, at),
        Ok(0),
        "VCPU_CREATE"
    );
    let vcpu = Vcpu::open(vm.id, 0)?;
    let info = vcpu.tunnel_info()?;
    same!(
        (info.va >> 32, info.io_va >> 32),
        (0, 0),
        "upper halves of the addresses"
    );
    same!(
        request(&vcpu.node, number::HAX_VCPU_IOCTL_SETUP_TUNNEL, at),
        Ok(0),
        "SETUP_TUNNEL"
    );
    same!(
        (low.u64(0), low.u64(8)),
        (info.va, info.io_va),
        "addresses told"
    );
    Ok(())
}

/// The argument is the address of four bytes that are the table's address, and the number of the request says so.
fn cpuid_table_at_a_32_bit_address() -> Outcome {
    on_32_bits!();
    const TABLE: u64 = 0x100;
    const ENTRY: usize = size_of::<abi::CpuidEntry>();
    let low = Ram::low(0x2000);
    let at = low.address();
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let (result, total, entries) = machine.vcpu.cpuid(64);
    same!((result, total), (Ok(()), 18), "GET_CPUID");
    low.write_u32(0, (at + TABLE) as u32);
    // Not a part of the address.
    low.write_u32(4, 0xffff_ffff);
    low.write_u32(TABLE, 64);
    let node = &machine.vcpu.node;
    same!(request(node, number::GET_CPUID_32, at), Ok(0), "GET_CPUID");
    same!(low.u32(TABLE), 18, "entries");
    for (index, entry) in entries.iter().enumerate() {
        let row = TABLE + 8 + (index * ENTRY) as u64;
        let told = [0, 4, 12, 16, 20, 24].map(|field| low.u32(row + field));
        let known = [
            entry.function,
            entry.index,
            entry.eax,
            entry.ebx,
            entry.ecx,
            entry.edx,
        ];
        same!(told, known, "entry {index}");
    }
    same!(request(node, number::SET_CPUID_32, at), Ok(0), "SET_CPUID");
    same!(machine.vcpu.cpuid(64).2, entries, "table");
    Ok(())
}
