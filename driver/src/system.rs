//! Requests on the system device.

use abi::zerocopy::IntoBytes;
use abi::{
    COMPAT_VERSION, CURRENT_VERSION, Capabilities, CapabilityInfo, ModuleVersion, Os, Request,
    SetMemlimit, WorkStatus, module::MEM_LIMIT_UNIT,
};
use vmx::Error;

use crate::argument::Argument;
use crate::devices::Devices;
use crate::hypervisor::{Capability, Core};
use crate::shim::Shim;
use crate::status::Failure;

pub(crate) fn request<S: Shim, A: Argument>(
    devices: &Devices<S>,
    request: Request,
    argument: &mut A,
) -> Result<(), Failure> {
    match request {
        Request::Version => argument.write(
            0,
            ModuleVersion {
                compat_version: COMPAT_VERSION,
                cur_version: CURRENT_VERSION,
            }
            .as_bytes(),
        ),
        Request::Capability => {
            let mut info = capability_info(&devices.core.capability());
            if devices.os() == Os::Windows {
                info.win_refcount = devices.system_handles();
            }
            argument.write(0, info.as_bytes())
        }
        Request::SetMemlimit => set_memlimit(&*devices.core, &argument.get()?),
        Request::CreateVm => create_vm(devices, argument),
        // HAXM does nothing for it. Its Linux module says so with 0, which a
        // client may rely on.
        Request::DestroyVm if devices.os() == Os::Linux => Ok(()),
        _ => Err(Failure::Unknown),
    }
}

fn create_vm<S: Shim, A: Argument>(devices: &Devices<S>, argument: &mut A) -> Result<(), Failure> {
    argument.check_room(size_of::<u32>())?;
    let id = devices.create_vm()?;
    argument.write(0, &id.to_le_bytes()).inspect_err(|_| {
        // The caller cannot know the id, so the VM would be lost.
        devices.undo_create_vm(id);
    })
}

fn set_memlimit<C: Core>(core: &C, limit: &SetMemlimit) -> Result<(), Failure> {
    let bytes = if limit.enable_memlimit == 0 {
        None
    } else {
        let bytes = limit.memory_limit.checked_mul(MEM_LIMIT_UNIT);
        Some(bytes.ok_or(Failure::Field)?)
    };
    // HAXM calls it a bad argument that VMs exist.
    core.set_memory_limit(bytes)
        .map_err(|_| Error::Invalid.into())
}

/// The capability word, from what the machine can do and what this driver has.
fn capability_info(capability: &Capability) -> CapabilityInfo {
    let mut status = WorkStatus::empty();
    status.set(WorkStatus::WORKING, capability.refusal.is_none());
    status.set(WorkStatus::MEMQUOTA, capability.memory_quota.is_some());
    let info = if let Some(reasons) = capability.refusal {
        reasons.bits()
    } else {
        let mut able = Capabilities::all();
        able.set(Capabilities::EPT, capability.ept);
        able.set(Capabilities::UG, capability.unrestricted_guest);
        able.bits()
    };
    CapabilityInfo {
        wstatus: status.bits(),
        winfo: info,
        win_refcount: 0,
        mem_quota: capability.memory_quota.unwrap_or(0),
    }
}
