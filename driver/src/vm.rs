//! Requests on a VM.

use abi::{
    AllocRamInfo, Os, ProtectRamInfo, QemuVersion, RamblockInfo, Request, SetRamInfo, SetRamInfo2,
};
use vmx::fallible::Shared;

use crate::argument::Argument;
use crate::devices::Devices;
use crate::hypervisor::{Core, CoreVm};
use crate::shim::Shim;
use crate::status::Failure;

type Vm<S> = <<S as Shim>::Core as Core>::Vm;

pub(crate) fn request<S: Shim, A: Argument>(
    devices: &Devices<S>,
    vm: &Shared<Vm<S>>,
    request: Request,
    argument: &mut A,
) -> Result<(), Failure> {
    vm.check_owner()?;
    match request {
        Request::VcpuCreate => {
            let id: u32 = argument.get()?;
            devices.create_vcpu(vm, id)
        }
        Request::AllocRam => {
            let info: AllocRamInfo = argument.get()?;
            Ok(vm.add_ram_block(info.va, info.size.into())?)
        }
        Request::AddRamblock => {
            let info: RamblockInfo = argument.get()?;
            refuse_unless(info.reserved == 0)?;
            Ok(vm.add_ram_block(info.start_va, info.size)?)
        }
        Request::SetRam => {
            let info: SetRamInfo = argument.get()?;
            Ok(vm.set_ram(info.pa_start, info.size.into(), info.va, info.flags.into())?)
        }
        Request::SetRam2 => {
            let info: SetRamInfo2 = argument.get()?;
            refuse_unless(info.reserved1 == 0 && info.reserved2 == 0)?;
            Ok(vm.set_ram(info.pa_start, info.size, info.va, info.flags)?)
        }
        Request::ProtectRam => {
            let info: ProtectRamInfo = argument.get()?;
            refuse_unless(info.reserved == 0)?;
            Ok(vm.protect_ram(info.pa_start, info.size, info.flags)?)
        }
        Request::NotifyQemuVersion => {
            let version: QemuVersion = argument.get()?;
            vm.notify_version(version.cur_version, version.least_version);
            Ok(())
        }
        // As DESTROY_VM: nothing, which Linux calls done.
        Request::VcpuDestroy if devices.os() == Os::Linux => Ok(()),
        _ => Err(Failure::Unknown),
    }
}

fn refuse_unless(allowed: bool) -> Result<(), Failure> {
    allowed.then_some(()).ok_or(Failure::Field)
}
