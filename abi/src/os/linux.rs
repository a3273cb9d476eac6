//! Linux: `direction << 30 | size << 16 | type << 8 | nr` with type 0 (the kernel's asm-generic rule).

use super::numbers;
use crate::debug::VcpuDebug;
use crate::module::{CapabilityInfo, ModuleVersion, QemuVersion, SetMemlimit};
use crate::msr::MsrData;
use crate::ram::{AllocRamInfo, ProtectRamInfo, RamblockInfo, SetRamInfo, SetRamInfo2};
use crate::tunnel::TunnelInfo;
use crate::vcpu_state::{FxLayout, VcpuState};

/// The argument of the CPUID requests: the address of the table, in a 64-bit process.
type CpuidPointer = u64;
/// The same in a 32-bit process.
type CpuidPointer32 = u32;

/// Direction bits: none.
const NONE: u32 = 0;
/// Direction bits: the caller gives data.
const WRITE: u32 = 1;
/// Direction bits: the caller gets data.
const READ: u32 = 2;

/// Lowest bit of the size field.
const SIZE_SHIFT: u32 = 16;
/// Largest value of the size field.
const SIZE_MASK: u32 = 0x3fff;

const fn encode(direction: u32, size: usize, nr: u32) -> u32 {
    assert!(size <= SIZE_MASK as usize);
    direction << 30 | (size as u32) << SIZE_SHIFT | nr
}

const fn io(nr: u32) -> u32 {
    encode(NONE, 0, nr)
}

const fn ior<T>(nr: u32) -> u32 {
    encode(READ, size_of::<T>(), nr)
}

const fn iow<T>(nr: u32) -> u32 {
    encode(WRITE, size_of::<T>(), nr)
}

const fn iowr<T>(nr: u32) -> u32 {
    encode(READ | WRITE, size_of::<T>(), nr)
}

/// Bytes of the argument as the number itself says: 4 tells a 32-bit caller's CPUID request.
#[must_use]
pub const fn argument_size(number: u32) -> u32 {
    number >> SIZE_SHIFT & SIZE_MASK
}

// `VCPU_DESTROY_QEMU`: QEMU's header gives that request the other direction.
numbers! {
    numbers {
        Version, System, HAX_IOCTL_VERSION = iowr::<ModuleVersion>(0x20), 0xc0080020;
        CreateVm, System, HAX_IOCTL_CREATE_VM = iowr::<u32>(0x21), 0xc0040021;
        DestroyVm, System, HAX_IOCTL_DESTROY_VM = iow::<u32>(0x22), 0x40040022;
        Capability, System, HAX_IOCTL_CAPABILITY = ior::<CapabilityInfo>(0x23), 0x80100023;
        SetMemlimit, System, HAX_IOCTL_SET_MEMLIMIT = iowr::<SetMemlimit>(0x24), 0xc0100024;
        VcpuCreateOrig, Vm, HAX_VM_IOCTL_VCPU_CREATE_ORIG = ior::<u32>(0x80), 0x80040080;
        VcpuCreate, Vm, HAX_VM_IOCTL_VCPU_CREATE = iowr::<u32>(0x80), 0xc0040080;
        AllocRam, Vm, HAX_VM_IOCTL_ALLOC_RAM = iowr::<AllocRamInfo>(0x81), 0xc0100081;
        SetRam, Vm, HAX_VM_IOCTL_SET_RAM = iowr::<SetRamInfo>(0x82), 0xc0180082;
        VcpuDestroy, Vm, HAX_VM_IOCTL_VCPU_DESTROY = ior::<u32>(0x83), 0x80040083;
        NotifyQemuVersion, Vm, HAX_VM_IOCTL_NOTIFY_QEMU_VERSION = iow::<QemuVersion>(0x84), 0x40080084;
        AddRamblock, Vm, HAX_VM_IOCTL_ADD_RAMBLOCK = iow::<RamblockInfo>(0x85), 0x40180085;
        SetRam2, Vm, HAX_VM_IOCTL_SET_RAM2 = iowr::<SetRamInfo2>(0x86), 0xc0280086;
        ProtectRam, Vm, HAX_VM_IOCTL_PROTECT_RAM = iowr::<ProtectRamInfo>(0x87), 0xc0180087;
        Run, Vcpu, HAX_VCPU_IOCTL_RUN = io(0xc0), 0x000000c0;
        SetMsrs, Vcpu, HAX_VCPU_IOCTL_SET_MSRS = iowr::<MsrData>(0xc1), 0xc20800c1;
        GetMsrs, Vcpu, HAX_VCPU_IOCTL_GET_MSRS = iowr::<MsrData>(0xc2), 0xc20800c2;
        SetFpu, Vcpu, HAX_VCPU_IOCTL_SET_FPU = iow::<FxLayout>(0xc3), 0x420000c3;
        GetFpu, Vcpu, HAX_VCPU_IOCTL_GET_FPU = ior::<FxLayout>(0xc4), 0x820000c4;
        SetupTunnel, Vcpu, HAX_VCPU_IOCTL_SETUP_TUNNEL = iowr::<TunnelInfo>(0xc5), 0xc01800c5;
        Interrupt, Vcpu, HAX_VCPU_IOCTL_INTERRUPT = iowr::<u32>(0xc6), 0xc00400c6;
        SetRegs, Vcpu, HAX_VCPU_SET_REGS = iowr::<VcpuState>(0xc7), 0xc20000c7;
        GetRegs, Vcpu, HAX_VCPU_GET_REGS = iowr::<VcpuState>(0xc8), 0xc20000c8;
        VcpuDebug, Vcpu, HAX_IOCTL_VCPU_DEBUG = iow::<VcpuDebug>(0xc9), 0x404800c9;
        SetCpuid, Vcpu, HAX_VCPU_IOCTL_SET_CPUID = iow::<CpuidPointer>(0xca), 0x400800ca;
        GetCpuid, Vcpu, HAX_VCPU_IOCTL_GET_CPUID = iow::<CpuidPointer>(0xcb), 0x400800cb;
    }
    absent { Kickoff }
    also {
        VCPU_DESTROY_QEMU, VcpuDestroy, Vm = iow::<u32>(0x83), 0x40040083;
        SET_CPUID_32, SetCpuid, Vcpu = iow::<CpuidPointer32>(0xca), 0x400400ca;
        GET_CPUID_32, GetCpuid, Vcpu = iow::<CpuidPointer32>(0xcb), 0x400400cb;
    }
}
