//! Requests on a vCPU.
//!
//! Functions with an argument of hundreds of bytes are kept out of line, so
//! that their frames do not add up to more stack than a kernel has to spare.

use abi::zerocopy::IntoBytes;
use abi::{FxLayout, MAX_MSRS, MsrData, Os, Request, VcpuState};

use crate::argument::{Argument, UserArgument};
use crate::cpuid;
use crate::devices::Devices;
use crate::hypervisor::CoreVcpu;
use crate::shim::Shim;
use crate::status::Failure;

/// RUN.
#[cfg_attr(haxm_module, optimize(speed))]
pub(crate) fn run<V: CoreVcpu>(vcpu: &V) -> Result<(), Failure> {
    vcpu.check_owner()?;
    Ok(vcpu.run()?)
}

pub(crate) fn request<S: Shim, V: CoreVcpu, A: Argument>(
    devices: &Devices<S>,
    vcpu: &V,
    request: Request,
    number: u32,
    argument: &mut A,
) -> Result<(), Failure> {
    vcpu.check_owner()?;
    match request {
        Request::Run => Ok(vcpu.run()?),
        Request::SetMsrs => msrs(argument, |data| vcpu.set_msrs(data)),
        Request::GetMsrs => msrs(argument, |data| vcpu.msrs(data)),
        Request::SetFpu => set_fpu(vcpu, argument),
        Request::GetFpu => fpu(vcpu, argument),
        Request::SetupTunnel => argument.write(0, vcpu.tunnel_info().as_bytes()),
        Request::Interrupt => {
            let vector: u32 = argument.get()?;
            let [vector, ..] = vector.to_le_bytes();
            vcpu.interrupt(vector);
            Ok(())
        }
        Request::SetRegs => set_regs(vcpu, argument),
        Request::GetRegs => regs(vcpu, argument),
        Request::Kickoff => {
            vcpu.kick();
            Ok(())
        }
        Request::VcpuDebug => Ok(vcpu.set_debug(&argument.get()?)?),
        Request::SetCpuid => match table(devices, number, argument)? {
            Some(table) => cpuid::set(vcpu, &table),
            None => cpuid::set(vcpu, argument),
        },
        Request::GetCpuid => match table(devices, number, argument)? {
            Some(mut table) => cpuid::get(vcpu, &mut table),
            None => cpuid::get(vcpu, argument),
        },
        _ => Err(Failure::Unknown),
    }
}

/// Where the CPUID table is: at an address that the argument holds, four
/// bytes of it for a 32-bit caller; or, `None`, in the argument itself.
fn table<'d, S: Shim, A: Argument>(
    devices: &'d Devices<S>,
    number: u32,
    argument: &A,
) -> Result<Option<UserArgument<'d, S>>, Failure> {
    let size = match devices.os() {
        Os::Windows => return Ok(None),
        Os::Linux => abi::os::linux::argument_size(number),
        Os::Darwin | Os::NetBsd => abi::os::darwin::argument_size(number),
    };
    let address = if size == abi::request::CPUID_POINTER_SIZE_32 {
        argument.get::<u32>()?.into()
    } else {
        argument.get::<u64>()?
    };
    Ok(Some(UserArgument {
        shim: &devices.shim,
        address,
    }))
}

#[inline(never)]
fn msrs<A: Argument>(
    argument: &mut A,
    call: impl FnOnce(&mut MsrData) -> Result<(), vmx::Error>,
) -> Result<(), Failure> {
    argument.check_room(size_of::<MsrData>())?;
    let mut data = MsrData::default();
    argument.fill(&mut data)?;
    if data.nr_msr > MAX_MSRS {
        return Err(Failure::MsrCount);
    }
    call(&mut data)?;
    argument.write(0, data.as_bytes())
}

#[inline(never)]
fn set_fpu<V: CoreVcpu, A: Argument>(vcpu: &V, argument: &A) -> Result<(), Failure> {
    let mut image = FxLayout::default();
    argument.fill(&mut image)?;
    vcpu.set_fpu(&image);
    Ok(())
}

#[inline(never)]
fn fpu<V: CoreVcpu, A: Argument>(vcpu: &V, argument: &mut A) -> Result<(), Failure> {
    argument.check_room(size_of::<FxLayout>())?;
    argument.write(0, vcpu.fpu().as_bytes())
}

#[inline(never)]
fn set_regs<V: CoreVcpu, A: Argument>(vcpu: &V, argument: &A) -> Result<(), Failure> {
    let mut regs = VcpuState::default();
    argument.fill(&mut regs)?;
    Ok(vcpu.set_regs(&regs)?)
}

#[inline(never)]
fn regs<V: CoreVcpu, A: Argument>(vcpu: &V, argument: &mut A) -> Result<(), Failure> {
    argument.check_room(size_of::<VcpuState>())?;
    argument.write(0, vcpu.regs()?.as_bytes())
}
