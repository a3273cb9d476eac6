//! Windows: `CTL_CODE` with device type 0x4000, METHOD_BUFFERED and FILE_ANY_ACCESS. Sizes are not encoded.
//!
//! Function 0x910 means CAPABILITY on the system device and NOTIFY_QEMU_VERSION on a VM, so a number says
//! nothing until the device is known. Function 0x912 is unused.

use super::numbers;
use crate::module::WINDOWS_DEVICE_TYPE;

/// `METHOD_BUFFERED` and `FILE_ANY_ACCESS` are both 0.
const fn ctl_code(function: u32) -> u32 {
    WINDOWS_DEVICE_TYPE << 16 | function << 2
}

numbers! {
    numbers {
        Version, System, HAX_IOCTL_VERSION = ctl_code(0x900), 0x40002400;
        CreateVm, System, HAX_IOCTL_CREATE_VM = ctl_code(0x901), 0x40002404;
        Capability, System, HAX_IOCTL_CAPABILITY = ctl_code(0x910), 0x40002440;
        SetMemlimit, System, HAX_IOCTL_SET_MEMLIMIT = ctl_code(0x911), 0x40002444;
        VcpuCreate, Vm, HAX_VM_IOCTL_VCPU_CREATE = ctl_code(0x902), 0x40002408;
        AllocRam, Vm, HAX_VM_IOCTL_ALLOC_RAM = ctl_code(0x903), 0x4000240c;
        SetRam, Vm, HAX_VM_IOCTL_SET_RAM = ctl_code(0x904), 0x40002410;
        VcpuDestroy, Vm, HAX_VM_IOCTL_VCPU_DESTROY = ctl_code(0x905), 0x40002414;
        NotifyQemuVersion, Vm, HAX_VM_IOCTL_NOTIFY_QEMU_VERSION = ctl_code(0x910), 0x40002440;
        AddRamblock, Vm, HAX_VM_IOCTL_ADD_RAMBLOCK = ctl_code(0x913), 0x4000244c;
        SetRam2, Vm, HAX_VM_IOCTL_SET_RAM2 = ctl_code(0x914), 0x40002450;
        ProtectRam, Vm, HAX_VM_IOCTL_PROTECT_RAM = ctl_code(0x915), 0x40002454;
        Run, Vcpu, HAX_VCPU_IOCTL_RUN = ctl_code(0x906), 0x40002418;
        SetMsrs, Vcpu, HAX_VCPU_IOCTL_SET_MSRS = ctl_code(0x907), 0x4000241c;
        GetMsrs, Vcpu, HAX_VCPU_IOCTL_GET_MSRS = ctl_code(0x908), 0x40002420;
        SetFpu, Vcpu, HAX_VCPU_IOCTL_SET_FPU = ctl_code(0x909), 0x40002424;
        GetFpu, Vcpu, HAX_VCPU_IOCTL_GET_FPU = ctl_code(0x90a), 0x40002428;
        SetupTunnel, Vcpu, HAX_VCPU_IOCTL_SETUP_TUNNEL = ctl_code(0x90b), 0x4000242c;
        Interrupt, Vcpu, HAX_VCPU_IOCTL_INTERRUPT = ctl_code(0x90c), 0x40002430;
        SetRegs, Vcpu, HAX_VCPU_SET_REGS = ctl_code(0x90d), 0x40002434;
        GetRegs, Vcpu, HAX_VCPU_GET_REGS = ctl_code(0x90e), 0x40002438;
        Kickoff, Vcpu, HAX_VCPU_IOCTL_KICKOFF = ctl_code(0x90f), 0x4000243c;
        VcpuDebug, Vcpu, HAX_IOCTL_VCPU_DEBUG = ctl_code(0x916), 0x40002458;
        SetCpuid, Vcpu, HAX_VCPU_IOCTL_SET_CPUID = ctl_code(0x917), 0x4000245c;
        GetCpuid, Vcpu, HAX_VCPU_IOCTL_GET_CPUID = ctl_code(0x918), 0x40002460;
    }
    absent { DestroyVm, VcpuCreateOrig }
    also {}
}
