//! The requests of the ABI as functions: device nodes, ioctls, and their arguments.
//!
//! Nothing here knows what a right answer is. A refused request is a [`Refused`] with its errno, so that a
//! case can say which one it wants.
// UNSAFETY: ioctl takes addresses.
#![expect(unsafe_code)]

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use abi::os::linux as number;
use abi::{
    AllocRamInfo, CapabilityInfo, CpuidEntry, FxLayout, ModuleVersion, MsrData, ProtectRamInfo,
    QemuVersion, RamblockInfo, SetMemlimit, SetRamInfo, SetRamInfo2, TunnelInfo, VcpuDebug,
    VcpuState, VmxMsr,
};

use crate::tunnel::Tunnel;

/// An errno.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Refused(pub i32);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            libc::EACCES => "EACCES",
            libc::EBUSY => "EBUSY",
            libc::EFAULT => "EFAULT",
            libc::EINVAL => "EINVAL",
            libc::ENODEV => "ENODEV",
            libc::ENOENT => "ENOENT",
            libc::ENOMEM => "ENOMEM",
            libc::ENOSYS => "ENOSYS",
            libc::E2BIG => "E2BIG",
            other => return write!(f, "errno {other}"),
        };
        f.write_str(name)
    }
}

impl fmt::Debug for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Refused {}

fn refused(error: &io::Error) -> Refused {
    Refused(error.raw_os_error().unwrap_or(libc::EIO))
}

/// What a request gives back.
pub type Answer<T> = Result<T, Refused>;

/// An open device node.
pub struct Node(File);

impl Node {
    /// Opens a node for reading and writing.
    pub fn open(path: &str) -> Answer<Self> {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => Ok(Self(file)),
            Err(error) => Err(refused(&error)),
        }
    }

    /// The descriptor.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// A request with any argument: what the error paths are tried with.
    pub fn raw(&self, request: u32, argument: u64) -> Answer<i32> {
        // SAFETY: the driver is to refuse addresses that are not ours; that is what is tested. Callers that
        // pass the address of something give a live one of the right size.
        let result = unsafe { libc::ioctl(self.fd(), u64::from(request), argument) };
        if result < 0 {
            return Err(refused(&io::Error::last_os_error()));
        }
        Ok(result)
    }

    /// A request whose argument is a structure.
    pub fn with<T>(&self, request: u32, argument: &mut T) -> Answer<i32> {
        self.raw(request, std::ptr::from_mut(argument) as u64)
    }

    /// read of some bytes.
    pub fn read(&self) -> Answer<usize> {
        (&self.0)
            .read(&mut [0; 16])
            .map_err(|error| refused(&error))
    }

    /// write of some bytes.
    pub fn write(&self) -> Answer<usize> {
        (&self.0).write(&[0; 16]).map_err(|error| refused(&error))
    }

    /// mmap of the first page.
    pub fn map(&self) -> Answer<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let (at, fd) = (std::ptr::null_mut(), self.fd());
        // SAFETY: a new mapping, where there is none.
        let got = unsafe { libc::mmap(at, 4096, access, libc::MAP_SHARED, fd, 0) };
        if got == libc::MAP_FAILED {
            return Err(refused(&io::Error::last_os_error()));
        }
        // SAFETY: the mapping just made.
        unsafe { libc::munmap(got, 4096) };
        Ok(())
    }

    fn done<T>(&self, request: u32, mut argument: T) -> Answer<()> {
        self.with(request, &mut argument).map(drop)
    }
}

/// `/dev/HAX`.
pub struct System(pub Node);

impl System {
    pub fn open() -> Answer<Self> {
        Node::open("/dev/HAX").map(Self)
    }

    pub fn version(&self) -> Answer<ModuleVersion> {
        let mut version = ModuleVersion::default();
        self.0.with(number::HAX_IOCTL_VERSION, &mut version)?;
        Ok(version)
    }

    pub fn capability(&self) -> Answer<CapabilityInfo> {
        let mut info = CapabilityInfo::default();
        self.0.with(number::HAX_IOCTL_CAPABILITY, &mut info)?;
        Ok(info)
    }

    /// `None` removes the limit; otherwise megabytes.
    pub fn set_memlimit(&self, megabytes: Option<u64>) -> Answer<()> {
        let argument = SetMemlimit {
            enable_memlimit: u8::from(megabytes.is_some()),
            memory_limit: megabytes.unwrap_or(0),
            ..SetMemlimit::default()
        };
        self.0.done(number::HAX_IOCTL_SET_MEMLIMIT, argument)
    }

    /// The id of a new VM, which nobody has opened.
    pub fn create_vm_id(&self) -> Answer<u32> {
        let mut id = u32::MAX;
        self.0.with(number::HAX_IOCTL_CREATE_VM, &mut id)?;
        Ok(id)
    }

    /// A new VM, opened.
    pub fn create_vm(&self) -> Answer<Vm> {
        Vm::open(self.create_vm_id()?)
    }
}

/// A VM's node.
pub struct Vm {
    pub node: Node,
    pub id: u32,
}

impl Vm {
    /// Path of a VM's node.
    pub fn path(id: u32) -> String {
        format!("/dev/hax_vm/vm{id:02}")
    }

    pub fn open(id: u32) -> Answer<Self> {
        let node = Node::open(&Self::path(id))?;
        Ok(Self { node, id })
    }

    pub fn notify_version(&self, current: u32, least: u32) -> Answer<()> {
        let argument = QemuVersion {
            cur_version: current,
            least_version: least,
        };
        let request = number::HAX_VM_IOCTL_NOTIFY_QEMU_VERSION;
        self.node.done(request, argument)
    }

    pub fn alloc_ram(&self, va: u64, size: u32) -> Answer<()> {
        let argument = AllocRamInfo { size, pad: 0, va };
        self.node.done(number::HAX_VM_IOCTL_ALLOC_RAM, argument)
    }

    pub fn add_ramblock(&self, start_va: u64, size: u64) -> Answer<()> {
        let argument = RamblockInfo {
            start_va,
            size,
            reserved: 0,
        };
        self.node.done(number::HAX_VM_IOCTL_ADD_RAMBLOCK, argument)
    }

    pub fn set_ram(&self, gpa: u64, size: u32, flags: u8, va: u64) -> Answer<()> {
        let argument = SetRamInfo {
            pa_start: gpa,
            size,
            flags,
            pad: [0; 3],
            va,
        };
        self.node.done(number::HAX_VM_IOCTL_SET_RAM, argument)
    }

    pub fn set_ram2(&self, gpa: u64, size: u64, flags: u32, va: u64) -> Answer<()> {
        let argument = SetRamInfo2 {
            pa_start: gpa,
            size,
            va,
            flags,
            ..SetRamInfo2::default()
        };
        self.node.done(number::HAX_VM_IOCTL_SET_RAM2, argument)
    }

    pub fn unmap(&self, gpa: u64, size: u64) -> Answer<()> {
        self.set_ram2(gpa, size, abi::RamFlags::INVALID.bits(), 0)
    }

    pub fn protect_ram(&self, gpa: u64, size: u64, flags: u32) -> Answer<()> {
        let argument = ProtectRamInfo {
            pa_start: gpa,
            size,
            flags,
            reserved: 0,
        };
        self.node.done(number::HAX_VM_IOCTL_PROTECT_RAM, argument)
    }

    /// Creates a vCPU and leaves it unopened.
    pub fn create_vcpu_only(&self, id: u32) -> Answer<()> {
        self.node.done(number::HAX_VM_IOCTL_VCPU_CREATE, id)
    }

    pub fn create_vcpu(&self, id: u32) -> Answer<Vcpu> {
        self.create_vcpu_only(id)?;
        Vcpu::open(self.id, id)
    }
}

/// A vCPU's node and its shared pages.
pub struct Vcpu {
    pub node: Node,
    pub tunnel: Tunnel,
}

impl Vcpu {
    /// Path of a vCPU's node.
    pub fn path(vm: u32, id: u32) -> String {
        format!("/dev/hax_vm{vm:02}/vcpu{id:02}")
    }

    pub fn open(vm: u32, id: u32) -> Answer<Self> {
        let node = Node::open(&Self::path(vm, id))?;
        let mut info = TunnelInfo::default();
        node.with(number::HAX_VCPU_IOCTL_SETUP_TUNNEL, &mut info)?;
        let tunnel = Tunnel::at(&info).ok_or(Refused(libc::EIO))?;
        Ok(Self { node, tunnel })
    }

    pub fn tunnel_info(&self) -> Answer<TunnelInfo> {
        let mut info = TunnelInfo::default();
        let request = number::HAX_VCPU_IOCTL_SETUP_TUNNEL;
        self.node.with(request, &mut info)?;
        Ok(info)
    }

    /// RUN; the exit status is in the tunnel.
    pub fn run(&self) -> Answer<i32> {
        self.node.raw(number::HAX_VCPU_IOCTL_RUN, 0)
    }

    pub fn regs(&self) -> Answer<VcpuState> {
        let mut state = VcpuState::default();
        self.node.with(number::HAX_VCPU_GET_REGS, &mut state)?;
        Ok(state)
    }

    pub fn set_regs(&self, state: &VcpuState) -> Answer<()> {
        self.node.done(number::HAX_VCPU_SET_REGS, *state)
    }

    pub fn fpu(&self) -> Answer<FxLayout> {
        let mut image = FxLayout::default();
        self.node.with(number::HAX_VCPU_IOCTL_GET_FPU, &mut image)?;
        Ok(image)
    }

    pub fn set_fpu(&self, image: &FxLayout) -> Answer<()> {
        self.node.done(number::HAX_VCPU_IOCTL_SET_FPU, *image)
    }

    /// SET_MSRS; how many were taken.
    pub fn set_msrs(&self, list: &[(u64, u64)]) -> Answer<u16> {
        let mut data = msr_data(list);
        let request = number::HAX_VCPU_IOCTL_SET_MSRS;
        self.node.with(request, &mut data)?;
        Ok(data.done)
    }

    /// GET_MSRS; the values that were read.
    pub fn msrs(&self, list: &[u64]) -> Answer<Vec<u64>> {
        let list: Vec<(u64, u64)> = list.iter().map(|msr| (*msr, 0)).collect();
        let mut data = msr_data(&list);
        let request = number::HAX_VCPU_IOCTL_GET_MSRS;
        self.node.with(request, &mut data)?;
        let done = data.entries.iter().take(usize::from(data.done));
        Ok(done.map(|entry| entry.value).collect())
    }

    pub fn interrupt(&self, vector: u32) -> Answer<()> {
        self.node.done(number::HAX_VCPU_IOCTL_INTERRUPT, vector)
    }

    pub fn set_debug(&self, control: u32, dr: [u64; 8]) -> Answer<()> {
        let argument = VcpuDebug {
            control,
            reserved: 0,
            dr,
        };
        self.node.done(number::HAX_IOCTL_VCPU_DEBUG, argument)
    }

    /// SET_CPUID. `total` is what the header says, whatever the number of entries.
    pub fn set_cpuid(&self, total: u32, entries: &[CpuidEntry]) -> Answer<()> {
        let mut table = CpuidTable::new(total, entries);
        table.request(&self.node, number::HAX_VCPU_IOCTL_SET_CPUID)
    }

    /// GET_CPUID with room for `total` entries: what the header says afterwards, and the entries.
    pub fn cpuid(&self, total: u32) -> (Answer<()>, u32, Vec<CpuidEntry>) {
        let mut table = CpuidTable::new(total, &[]);
        let result = table.request(&self.node, number::HAX_VCPU_IOCTL_GET_CPUID);
        let found = (table.total as usize).min(table.entries.len());
        let entries = table.entries.iter().take(found).copied().collect();
        (result, table.total, entries)
    }
}

fn msr_data(list: &[(u64, u64)]) -> MsrData {
    let mut data = MsrData {
        nr_msr: u16::try_from(list.len()).unwrap_or(u16::MAX),
        done: 0xdead,
        ..MsrData::default()
    };
    for (slot, (entry, value)) in data.entries.iter_mut().zip(list) {
        *slot = VmxMsr {
            entry: *entry,
            value: *value,
        };
    }
    data
}

/// The argument of the CPUID requests, behind the pointer that is the ioctl's argument.
#[repr(C)]
struct CpuidTable {
    total: u32,
    pad: u32,
    entries: [CpuidEntry; abi::MAX_CPUID_ENTRIES as usize],
}

impl CpuidTable {
    fn new(total: u32, entries: &[CpuidEntry]) -> Self {
        let mut table = Self {
            total,
            pad: 0,
            entries: [CpuidEntry::default(); abi::MAX_CPUID_ENTRIES as usize],
        };
        for (slot, entry) in table.entries.iter_mut().zip(entries) {
            *slot = *entry;
        }
        table
    }

    fn request(&mut self, node: &Node, request: u32) -> Answer<()> {
        let mut pointer = std::ptr::from_mut(self) as u64;
        node.with(request, &mut pointer).map(drop)
    }
}
