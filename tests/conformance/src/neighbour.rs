//! A guest of KVM's beside ours: `/dev/kvm` as a small client uses it, without KVM's interrupt controller.
// UNSAFETY: guest memory is given to the kernel by its address; a signal's handler.
#![expect(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use abi::SegmentDesc;
use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::modes::EFER_LONG;
use crate::ram::Ram;
use crate::sentinel::{Values, told};

/// Is given where KVM has to be there: `alone`, or `neighbour` where another process has a VM of its already.
const EXPECTED: &str = "CONFORMANCE_KVM";

/// Rounds that take a guest longer than the kernel lets a thread run at a time: it is preempted in KVM.
pub const LONG: u32 = 200;

/// Whether KVM is there.
///
/// # Errors
/// It is not, and should be.
pub fn is_there() -> Result<bool> {
    let found = std::path::Path::new("/dev/kvm").exists();
    anyhow::ensure!(
        found || std::env::var_os(EXPECTED).is_none(),
        "there is no /dev/kvm"
    );
    Ok(found)
}

/// Whether another process has a VM of KVM's.
pub fn is_another_there() -> bool {
    std::env::var(EXPECTED).is_ok_and(|value| value == "neighbour")
}

/// A VM of KVM's with a [`crate::sentinel`] in it. The fields are dropped in this order.
pub struct Neighbour {
    vcpu: VcpuFd,
    _vm: VmFd,
    _ram: Ram,
}

impl Neighbour {
    /// A VM, and its vCPU at the first instruction.
    ///
    /// # Errors
    /// A request is refused. CREATE_VM's errno is in the chain.
    pub fn new(values: &Values) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        let ram = values.ram();
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: ram.size(),
            userspace_addr: ram.address(),
            flags: 0,
        };
        // SAFETY: the memory outlives the VM, and this program accesses it as volatile memory only.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        start(&vcpu)?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _ram: ram,
        })
    }

    /// KVM_RUN until the guest tells how many rounds it has made. `None`: a signal came first.
    ///
    /// # Errors
    /// The guest has lost something, or has come to an end.
    pub fn turn(&mut self) -> Result<Option<u32>> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => return told(port, data).map(Some),
                // A lowered CR8 is its client's business too, which has nothing to do here.
                Ok(VcpuExit::SetTpr) => {}
                Ok(VcpuExit::Hlt) => {
                    let rip = self.vcpu.get_regs()?.rip;
                    bail!("KVM's guest is at an exception's handler, {rip:#x}")
                }
                Ok(other) => bail!("KVM_RUN ended with {other:?}"),
                Err(error) if error.errno() == libc::EINTR => return Ok(None),
                Err(error) => return Err(error).context("KVM_RUN"),
            }
        }
    }
}

/// Our ABI's form of a segment is the processor's.
fn segment(from: &SegmentDesc) -> kvm_segment {
    let bits = |shift: u32, mask: u32| (from.ar >> shift & mask) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: bits(0, 15),
        s: bits(4, 1),
        dpl: bits(5, 3),
        present: bits(7, 1),
        avl: bits(12, 1),
        l: bits(13, 1),
        db: bits(14, 1),
        g: bits(15, 1),
        ..Default::default()
    }
}

fn table(from: &SegmentDesc) -> kvm_dtable {
    kvm_dtable {
        base: from.base,
        limit: from.limit as u16,
        ..Default::default()
    }
}

fn start(vcpu: &VcpuFd) -> Result<()> {
    let state = Values::registers();
    let sregs = kvm_sregs {
        cs: segment(&state.cs),
        ds: segment(&state.ds),
        es: segment(&state.es),
        fs: segment(&state.fs),
        gs: segment(&state.gs),
        ss: segment(&state.ss),
        tr: segment(&state.tr),
        ldt: segment(&state.ldt),
        gdt: table(&state.gdt),
        idt: table(&state.idt),
        cr0: state.cr0,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: EFER_LONG,
        ..vcpu.get_sregs().context("KVM_GET_SREGS")?
    };
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let mut regs = vcpu.get_regs().context("KVM_GET_REGS")?;
    (regs.rip, regs.rsp, regs.rflags) = (state.rip, state.rsp, state.rflags);
    vcpu.set_regs(&regs).context("KVM_SET_REGS")
}

static ENOUGH: AtomicBool = AtomicBool::new(false);

extern "C" fn enough(_signal: i32) {
    ENOUGH.store(true, Ordering::Relaxed);
}

/// `neighbour`: runs one until SIGTERM. Success if it lost nothing and was at work.
pub fn run() -> ExitCode {
    let handler: extern "C" fn(i32) = enough;
    // SAFETY: the handler stores to an atomic.
    unsafe { libc::signal(libc::SIGTERM, handler as libc::sighandler_t) };
    // A tenth of what others get of a processor that all want: it is to be in their way, not to take their time.
    // SAFETY: changes a number of this process.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
    match until_enough() {
        Ok(0) => {
            println!("neighbour: never at work");
            ExitCode::FAILURE
        }
        Ok(rounds) => {
            println!("neighbour: {rounds} rounds");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("neighbour: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn until_enough() -> Result<u32> {
    let mut neighbour = Neighbour::new(&Values::kvms(LONG))?;
    let mut rounds = 0;
    while !ENOUGH.load(Ordering::Relaxed) {
        rounds = neighbour.turn()?.unwrap_or(rounds);
    }
    Ok(rounds)
}
