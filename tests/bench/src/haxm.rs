//! Our side: `/dev/HAX`.
// UNSAFETY: ioctls with addresses; pages shared with the driver, always accessed volatile.
#![expect(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, RawFd};

use abi::os::linux as number;
use abi::tunnel::{fastmmio_offset, offset};
use abi::{
    ExitStatus, FxLayout, QemuVersion, RamFlags, RamblockInfo, SegmentDesc, SetRamInfo2,
    TunnelInfo, VcpuState,
};
use anyhow::{Context, Result, bail};

use crate::api::{Api, Exit, Vcpu, Vm};
use crate::guest;

fn open(path: &str) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.open(path).with_context(|| path.to_owned())
}

fn with<T>(file: &File, request: u32, argument: &mut T) -> Result<()> {
    let address = std::ptr::from_mut(argument);
    // SAFETY: the argument is the structure of the request, alive for the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), u64::from(request), address) };
    if result < 0 {
        bail!("request {request:#x}: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

/// `/dev/HAX`.
pub struct Haxm(File);

impl Api for Haxm {
    type Vm = HaxmVm;

    const MOST_SLOTS: u32 = 1 << 20;

    fn memory() -> Option<u64> {
        let text = std::fs::read_to_string("/sys/module/haxm/parameters/memory").ok()?;
        let (pages, bytes) = text.trim().split_once(' ')?;
        Some(pages.parse::<u64>().ok()? * 4096 + bytes.parse::<u64>().ok()?)
    }

    fn open() -> Result<Self> {
        open("/dev/HAX").map(Self)
    }

    fn create_vm(&self) -> Result<HaxmVm> {
        let mut id = u32::MAX;
        with(&self.0, number::HAX_IOCTL_CREATE_VM, &mut id)?;
        let node = open(&format!("/dev/hax_vm/vm{id:02}"))?;
        Ok(HaxmVm { node, id })
    }
}

pub struct HaxmVm {
    node: File,
    id: u32,
}

impl HaxmVm {
    fn set_ram(&self, gpa: u64, size: u64, va: u64, flags: RamFlags) -> Result<()> {
        let mut argument = SetRamInfo2 {
            pa_start: gpa,
            size,
            va,
            flags: flags.bits(),
            ..SetRamInfo2::default()
        };
        with(&self.node, number::HAX_VM_IOCTL_SET_RAM2, &mut argument)
    }
}

impl Vm for HaxmVm {
    type Vcpu = HaxmVcpu;

    fn declare(&self, start: u64, size: u64) -> Result<()> {
        let mut version = QemuVersion {
            cur_version: 4,
            least_version: 4,
        };
        with(
            &self.node,
            number::HAX_VM_IOCTL_NOTIFY_QEMU_VERSION,
            &mut version,
        )?;
        let mut block = RamblockInfo {
            start_va: start,
            size,
            reserved: 0,
        };
        with(&self.node, number::HAX_VM_IOCTL_ADD_RAMBLOCK, &mut block)
    }

    fn map(&self, _slot: u32, gpa: u64, size: u64, va: u64) -> Result<()> {
        self.set_ram(gpa, size, va, RamFlags::empty())
    }

    fn unmap(&self, _slot: u32, gpa: u64, size: u64) -> Result<()> {
        self.set_ram(gpa, size, 0, RamFlags::INVALID)
    }

    fn create_vcpu(&self, id: u32) -> Result<HaxmVcpu> {
        with(
            &self.node,
            number::HAX_VM_IOCTL_VCPU_CREATE,
            &mut id.clone(),
        )?;
        let node = open(&format!("/dev/hax_vm{:02}/vcpu{id:02}", self.id))?;
        let mut info = TunnelInfo::default();
        with(&node, number::HAX_VCPU_IOCTL_SETUP_TUNNEL, &mut info)?;
        Ok(HaxmVcpu {
            node,
            tunnel: info.va,
            buffer: info.io_va,
        })
    }
}

pub struct HaxmVcpu {
    node: File,
    tunnel: u64,
    buffer: u64,
}

/// A value of one of the shared pages.
#[inline]
fn get<T: Copy>(page: u64, at: usize) -> T {
    let from = (page as *const u8).wrapping_add(at).cast::<T>();
    // SAFETY: an offset of the ABI inside a page that is mapped as long as the vCPU's node is open; T is an integer.
    unsafe { from.read_volatile() }
}

fn segment(selector: u16, limit: u32, ar: u32) -> SegmentDesc {
    SegmentDesc {
        selector,
        limit,
        ar,
        ..SegmentDesc::default()
    }
}

impl Vcpu for HaxmVcpu {
    const RUN: u64 = number::HAX_VCPU_IOCTL_RUN as u64;

    fn fd(&self) -> RawFd {
        self.node.as_raw_fd()
    }

    fn start(&self) -> Result<()> {
        let data = segment(guest::DATA_SELECTOR, u32::MAX, 0xc093);
        let table = |base, limit: u16| SegmentDesc {
            base,
            limit: limit.into(),
            ..SegmentDesc::default()
        };
        let mut state = VcpuState {
            rip: guest::CODE,
            rsp: guest::STACK,
            rflags: 2,
            cs: segment(guest::CODE_SELECTOR, u32::MAX, 0xc09b),
            ss: data,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ldt: segment(0, 0xffff, 0x82),
            tr: segment(0, 0xffff, 0x8b),
            gdt: table(guest::GDT, guest::GDT_LIMIT),
            idt: table(guest::IDT, guest::IDT_LIMIT),
            cr0: 0x31,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            ..VcpuState::default()
        };
        with(&self.node, number::HAX_VCPU_SET_REGS, &mut state)?;
        let mut fpu = FxLayout {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..FxLayout::default()
        };
        with(&self.node, number::HAX_VCPU_IOCTL_SET_FPU, &mut fpu)
    }

    #[inline]
    fn exit(&self) -> Exit {
        let raw: u32 = get(self.tunnel, offset::EXIT_STATUS);
        match ExitStatus::from_raw(raw) {
            Some(ExitStatus::Io) => {
                let port = get(self.tunnel, offset::IO_PORT);
                let direction: u8 = get(self.tunnel, offset::IO_DIRECTION);
                if direction == 1 {
                    return Exit::In { port };
                }
                let size: u16 = get(self.tunnel, offset::IO_SIZE);
                let count: u16 = get(self.tunnel, offset::IO_COUNT);
                let bytes = usize::from(size) * usize::from(count);
                Exit::Out { port, bytes }
            }
            Some(ExitStatus::FastMmio) => {
                let direction: u8 = get(self.buffer, fastmmio_offset::DIRECTION);
                if direction == 1 {
                    Exit::MmioWrite
                } else {
                    Exit::MmioRead
                }
            }
            Some(ExitStatus::Hlt) => Exit::Halt,
            Some(ExitStatus::Interrupt) => Exit::Again,
            _ => Exit::Other(raw),
        }
    }

    #[inline]
    fn answer(&self, value: u32) {
        let raw: u32 = get(self.tunnel, offset::EXIT_STATUS);
        let at = if raw == ExitStatus::Io.raw() {
            0
        } else {
            fastmmio_offset::VALUE
        };
        let to = (self.buffer as *mut u8).wrapping_add(at).cast::<u32>();
        // SAFETY: as in `get`.
        unsafe { to.write_volatile(value) };
    }

    fn interrupt(&self, vector: u8) -> Result<()> {
        let mut vector = u32::from(vector);
        with(&self.node, number::HAX_VCPU_IOCTL_INTERRUPT, &mut vector)
    }
}
