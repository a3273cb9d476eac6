//! KVM's side: `/dev/kvm`, without its interrupt controller, as our ABI has none.
// UNSAFETY: ioctls with addresses; a page shared with the kernel, always accessed volatile.
#![expect(unsafe_code)]

use std::cell::RefCell;
use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    CpuId, KVM_EXIT_HLT, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MMIO,
    KVM_EXIT_SET_TPR, KVM_MAX_CPUID_ENTRIES, kvm_interrupt, kvm_run, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::api::{Api, Exit, Vcpu, Vm};
use crate::guest;

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: u64 = 0xae80;
/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`.
const KVM_INTERRUPT: u64 = 0x4004_ae86;

/// `/dev/kvm`, and the CPUID table it recommends.
pub struct KvmApi(Kvm, CpuId);

impl Api for KvmApi {
    type Vm = KvmVm;

    /// KVM_USER_MEM_SLOTS: SHRT_MAX less three of its own.
    const MOST_SLOTS: u32 = 0x7fff - 3;

    fn memory() -> Option<u64> {
        None
    }

    fn open() -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self(kvm, cpuid))
    }

    fn create_vm(&self) -> Result<KvmVm> {
        Ok(KvmVm(self.0.create_vm()?, self.1.clone()))
    }
}

pub struct KvmVm(VmFd, CpuId);

impl Vm for KvmVm {
    type Vcpu = KvmVcpu;

    fn declare(&self, _start: u64, _size: u64) -> Result<()> {
        Ok(())
    }

    fn map(&self, slot: u32, gpa: u64, size: u64, va: u64) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: va,
            flags: 0,
        };
        // SAFETY: the memory outlives the VM, and this program accesses it as volatile memory only.
        unsafe { self.0.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")
    }

    fn unmap(&self, slot: u32, gpa: u64, _size: u64) -> Result<()> {
        self.map(slot, gpa, 0, 0)
    }

    fn create_vcpu(&self, id: u32) -> Result<KvmVcpu> {
        let mut vcpu = self.0.create_vcpu(id.into())?;
        let page = std::ptr::from_mut(vcpu.get_kvm_run());
        Ok(KvmVcpu {
            fd: vcpu.as_raw_fd(),
            page,
            vcpu: RefCell::new(vcpu),
            cpuid: self.1.clone(),
        })
    }
}

pub struct KvmVcpu {
    fd: RawFd,
    /// Mapped as long as `vcpu` lives.
    page: *mut kvm_run,
    vcpu: RefCell<VcpuFd>,
    cpuid: CpuId,
}

impl KvmVcpu {
    fn at<T>(&self, offset: usize) -> *mut T {
        self.page.cast::<u8>().wrapping_add(offset).cast()
    }

    #[inline]
    fn get<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: an offset of `kvm_run` inside the mapping; T is an integer.
        unsafe { self.at::<T>(offset).read_volatile() }
    }
}

/// Offsets in `struct kvm_run`.
mod offset {
    use kvm_bindings::kvm_run;
    use std::mem::offset_of;

    pub const REASON: usize = offset_of!(kvm_run, exit_reason);
    /// The union: direction u8, size u8, port u16, count u32, data offset u64 of an I/O exit; address u64,
    /// data [u8; 8], length u32, is-write u8 of an MMIO exit.
    pub const VIEW: usize = offset_of!(kvm_run, __bindgen_anon_1);
    pub const IO_SIZE: usize = VIEW + 1;
    pub const IO_PORT: usize = VIEW + 2;
    pub const IO_COUNT: usize = VIEW + 4;
    pub const IO_DATA: usize = VIEW + 8;
    pub const MMIO_DATA: usize = VIEW + 8;
    pub const MMIO_IS_WRITE: usize = VIEW + 20;
}

impl Vcpu for KvmVcpu {
    const RUN: u64 = KVM_RUN;

    #[inline]
    fn fd(&self) -> RawFd {
        self.fd
    }

    fn start(&self) -> Result<()> {
        let vcpu = self.vcpu.borrow_mut();
        vcpu.set_cpuid2(&self.cpuid)?;
        let mut sregs = vcpu.get_sregs()?;
        let code = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: guest::CODE_SELECTOR,
            type_: 0xb,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: guest::DATA_SELECTOR,
            type_: 3,
            ..code
        };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        (sregs.gdt.base, sregs.gdt.limit) = (guest::GDT, guest::GDT_LIMIT);
        (sregs.idt.base, sregs.idt.limit) = (guest::IDT, guest::IDT_LIMIT);
        sregs.cr0 = 0x31;
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        (regs.rip, regs.rsp, regs.rflags) = (guest::CODE, guest::STACK, 2);
        vcpu.set_regs(&regs)?;
        Ok(())
    }

    #[inline]
    fn exit(&self) -> Exit {
        let reason: u32 = self.get(offset::REASON);
        match reason {
            KVM_EXIT_IO => {
                let port = self.get(offset::IO_PORT);
                let direction: u8 = self.get(offset::VIEW);
                if u32::from(direction) == KVM_EXIT_IO_IN {
                    return Exit::In { port };
                }
                let size: u8 = self.get(offset::IO_SIZE);
                let count: u32 = self.get(offset::IO_COUNT);
                let bytes = usize::from(size) * count as usize;
                Exit::Out { port, bytes }
            }
            KVM_EXIT_MMIO => {
                let is_write: u8 = self.get(offset::MMIO_IS_WRITE);
                if is_write != 0 {
                    Exit::MmioWrite
                } else {
                    Exit::MmioRead
                }
            }
            KVM_EXIT_HLT => Exit::Halt,
            // A lowered CR8 is its client's business too, which has nothing to do here.
            KVM_EXIT_INTR | KVM_EXIT_SET_TPR => Exit::Again,
            other => Exit::Other(other),
        }
    }

    #[inline]
    fn answer(&self, value: u32) {
        let reason: u32 = self.get(offset::REASON);
        let at = if reason == KVM_EXIT_IO {
            self.get::<u64>(offset::IO_DATA) as usize
        } else {
            offset::MMIO_DATA
        };
        // SAFETY: where the kernel said it looks for the answer, inside the mapping.
        unsafe { self.at::<u32>(at).write_volatile(value) };
    }

    fn interrupt(&self, vector: u8) -> Result<()> {
        let argument = kvm_interrupt { irq: vector.into() };
        // SAFETY: the argument is the structure of the request, alive for the call.
        let result = unsafe { libc::ioctl(self.fd, KVM_INTERRUPT, &raw const argument) };
        ensure!(
            result == 0,
            "KVM_INTERRUPT: {}",
            std::io::Error::last_os_error()
        );
        Ok(())
    }
}
