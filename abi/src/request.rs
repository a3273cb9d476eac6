//! The 27 requests, whatever their numbers: which device takes them, what their argument is.

use crate::cpuid::CpuidHeader;
use crate::debug::VcpuDebug;
use crate::module::{CapabilityInfo, ModuleVersion, QemuVersion, SetMemlimit};
use crate::msr::MsrData;
use crate::ram::{AllocRamInfo, ProtectRamInfo, RamblockInfo, SetRamInfo, SetRamInfo2};
use crate::tunnel::TunnelInfo;
use crate::vcpu_state::{FxLayout, VcpuState};

/// Kind of device a request is made on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// `/dev/HAX`.
    System,
    /// A VM.
    Vm,
    /// A vCPU.
    Vcpu,
}

/// What the driver does with the argument. The direction bits in a request number are often wider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// There is no argument.
    None,
    /// The driver reads it.
    In,
    /// The driver writes it.
    Out,
    /// The driver reads it and writes it back.
    InOut,
    /// A CPUID table. POSIX: the argument is the address of a variable that holds the address of a
    /// [`CpuidHeader`] and its entries; size is that of the variable. Windows: the buffer is the header and
    /// its entries.
    CpuidTable,
}

/// Argument of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Argument {
    /// Bytes, for a 64-bit caller.
    pub size: u32,
    /// Who reads and who writes it.
    pub direction: Direction,
}

/// Bytes of the argument of SET_CPUID and GET_CPUID for a 64-bit POSIX caller: one pointer.
pub const CPUID_POINTER_SIZE: u32 = 8;
/// The same for a 32-bit caller, whose request numbers differ.
pub const CPUID_POINTER_SIZE_32: u32 = 4;

/// Shortest buffer SET_CPUID and GET_CPUID take on Windows: the header.
pub const CPUID_MIN_BUFFER: u32 = size_of::<CpuidHeader>() as u32;

macro_rules! requests {
    ($($(#[$doc:meta])* $variant:ident, $name:literal, $device:ident, $direction:ident, $size:expr;)+) => {
        /// A request, on any operating system.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Request {
            $($(#[$doc])* $variant,)+
        }

        impl Request {
            /// All of them.
            pub const ALL: [Self; 27] = [$(Self::$variant),+];

            /// HAXM's C name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// The device it is made on.
            #[must_use]
            #[allow(clippy::match_same_arms, reason = "one row of a table each")]
            pub const fn device(self) -> Device {
                match self { $(Self::$variant => Device::$device,)+ }
            }

            /// Its argument.
            #[must_use]
            #[allow(clippy::match_same_arms, reason = "one row of a table each")]
            pub const fn argument(self) -> Argument {
                match self {
                    $(Self::$variant => Argument { size: $size as u32, direction: Direction::$direction },)+
                }
            }
        }
    };
}

requests! {
    /// Module version out: [`ModuleVersion`].
    Version, "HAX_IOCTL_VERSION", System, Out, size_of::<ModuleVersion>();
    /// Makes a VM; its id (u32) out.
    CreateVm, "HAX_IOCTL_CREATE_VM", System, Out, size_of::<u32>();
    /// Defined, and handled by no HAXM: closing the VM destroys it.
    DestroyVm, "HAX_IOCTL_DESTROY_VM", System, In, size_of::<u32>();
    /// Capabilities out: [`CapabilityInfo`].
    Capability, "HAX_IOCTL_CAPABILITY", System, Out, size_of::<CapabilityInfo>();
    /// Memory limit in: [`SetMemlimit`].
    SetMemlimit, "HAX_IOCTL_SET_MEMLIMIT", System, In, size_of::<SetMemlimit>();
    /// [`Request::VcpuCreate`] under the number old QEMU uses; see [`Request::canonical`].
    VcpuCreateOrig, "HAX_VM_IOCTL_VCPU_CREATE_ORIG", Vm, In, size_of::<u32>();
    /// Makes a vCPU; its id (u32) in.
    VcpuCreate, "HAX_VM_IOCTL_VCPU_CREATE", Vm, In, size_of::<u32>();
    /// Registers a RAM block: [`AllocRamInfo`].
    AllocRam, "HAX_VM_IOCTL_ALLOC_RAM", Vm, In, size_of::<AllocRamInfo>();
    /// Maps or unmaps: [`SetRamInfo`].
    SetRam, "HAX_VM_IOCTL_SET_RAM", Vm, In, size_of::<SetRamInfo>();
    /// Defined, and handled by no HAXM: closing the vCPU destroys it.
    VcpuDestroy, "HAX_VM_IOCTL_VCPU_DESTROY", Vm, In, size_of::<u32>();
    /// API version of the client in: [`QemuVersion`].
    NotifyQemuVersion, "HAX_VM_IOCTL_NOTIFY_QEMU_VERSION", Vm, In, size_of::<QemuVersion>();
    /// Registers a RAM block: [`RamblockInfo`].
    AddRamblock, "HAX_VM_IOCTL_ADD_RAMBLOCK", Vm, In, size_of::<RamblockInfo>();
    /// Maps or unmaps: [`SetRamInfo2`].
    SetRam2, "HAX_VM_IOCTL_SET_RAM2", Vm, In, size_of::<SetRamInfo2>();
    /// Allows or forbids access: [`ProtectRamInfo`].
    ProtectRam, "HAX_VM_IOCTL_PROTECT_RAM", Vm, In, size_of::<ProtectRamInfo>();
    /// Runs the guest until something needs the client.
    Run, "HAX_VCPU_IOCTL_RUN", Vcpu, None, 0;
    /// Writes MSRs: [`MsrData`].
    SetMsrs, "HAX_VCPU_IOCTL_SET_MSRS", Vcpu, InOut, size_of::<MsrData>();
    /// Reads MSRs: [`MsrData`].
    GetMsrs, "HAX_VCPU_IOCTL_GET_MSRS", Vcpu, InOut, size_of::<MsrData>();
    /// FXSAVE image in: [`FxLayout`].
    SetFpu, "HAX_VCPU_IOCTL_SET_FPU", Vcpu, In, size_of::<FxLayout>();
    /// FXSAVE image out: [`FxLayout`].
    GetFpu, "HAX_VCPU_IOCTL_GET_FPU", Vcpu, Out, size_of::<FxLayout>();
    /// Addresses of the shared pages out: [`TunnelInfo`].
    SetupTunnel, "HAX_VCPU_IOCTL_SETUP_TUNNEL", Vcpu, Out, size_of::<TunnelInfo>();
    /// Interrupt vector (u32) in.
    Interrupt, "HAX_VCPU_IOCTL_INTERRUPT", Vcpu, In, size_of::<u32>();
    /// Registers in: [`VcpuState`].
    SetRegs, "HAX_VCPU_SET_REGS", Vcpu, In, size_of::<VcpuState>();
    /// Registers out: [`VcpuState`].
    GetRegs, "HAX_VCPU_GET_REGS", Vcpu, Out, size_of::<VcpuState>();
    /// Forces the vCPU out of the guest. Windows only.
    Kickoff, "HAX_VCPU_IOCTL_KICKOFF", Vcpu, None, 0;
    /// Debug control in: [`VcpuDebug`].
    VcpuDebug, "HAX_IOCTL_VCPU_DEBUG", Vcpu, In, size_of::<VcpuDebug>();
    /// CPUID table in.
    SetCpuid, "HAX_VCPU_IOCTL_SET_CPUID", Vcpu, CpuidTable, CPUID_POINTER_SIZE;
    /// CPUID table out.
    GetCpuid, "HAX_VCPU_IOCTL_GET_CPUID", Vcpu, CpuidTable, CPUID_POINTER_SIZE;
}

impl Request {
    /// The request itself, or the one it is an old name of.
    #[must_use]
    pub const fn canonical(self) -> Self {
        match self {
            Self::VcpuCreateOrig => Self::VcpuCreate,
            other => other,
        }
    }
}
