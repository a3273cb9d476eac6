//! VMX instructions: each error number, and what would be a fault or silent
//! damage on a real machine.
// UNSAFETY: executes the simulated processor's instructions.
#![expect(unsafe_code)]

use sim::rig::Rig;
use sim::{Machine, Profile, SimCpu, error};
use vmx::arch::addr::Hpa;
use vmx::arch::ept::{InveptKind, InvvpidKind};
use vmx::cpu::{Cpu, VmxFailure};
use vmx::host::Host;

fn vmclear(cpu: &SimCpu, at: u64) -> Result<(), VmxFailure> {
    // SAFETY: the processor is simulated.
    unsafe { cpu.vmclear(Hpa(at)) }
}

fn vmptrld(cpu: &SimCpu, at: u64) -> Result<(), VmxFailure> {
    // SAFETY: the processor is simulated.
    unsafe { cpu.vmptrld(Hpa(at)) }
}

fn vmxon(cpu: &SimCpu, at: u64) -> Result<(), VmxFailure> {
    // SAFETY: the processor is simulated.
    unsafe { cpu.vmxon(Hpa(at)) }
}

fn vmxoff(cpu: &SimCpu) -> Result<(), VmxFailure> {
    // SAFETY: the processor is simulated.
    unsafe { cpu.vmxoff() }
}

fn vmptrst(cpu: &SimCpu) -> Option<Hpa> {
    // SAFETY: the processor is simulated.
    unsafe { cpu.vmptrst() }
}

/// The instruction failed with this error number in the current VMCS.
fn failed_with(rig: &Rig, result: Result<(), VmxFailure>, number: u64) {
    assert_eq!(result, Err(VmxFailure::Valid));
    assert_eq!(rig.read(0x4400), number);
}

fn found(machine: &Machine, text: &str) {
    let findings = machine.take_findings();
    assert!(
        findings.iter().any(|f| f.contains(text)),
        "{text:?} is not in {findings:?}"
    );
}

#[test]
fn addresses_are_checked() {
    let rig = Rig::new(Profile::haswell());
    let cpu = rig.cpu();
    for bad in [0x123, 1 << 39] {
        failed_with(&rig, vmclear(cpu, bad), error::VMCLEAR_ADDRESS);
        failed_with(&rig, vmptrld(cpu, bad), error::VMPTRLD_ADDRESS);
    }
    let region = rig.vmxon_region().0;
    failed_with(&rig, vmclear(cpu, region), error::VMCLEAR_VMXON);
    failed_with(&rig, vmptrld(cpu, region), error::VMPTRLD_VMXON);
    failed_with(&rig, vmptrld(cpu, rig.spare(0)), error::VMPTRLD_REVISION);
    failed_with(&rig, vmxon(cpu, region), error::VMXON_IN_ROOT);
    assert_eq!(vmptrst(cpu), Some(rig.vmcs_region()));
}

#[test]
fn launch_state_is_checked() {
    let mut rig = Rig::new(Profile::haswell());
    assert_eq!(rig.enter_as(true), Err(Some(error::RESUME_NOT_LAUNCHED)));
    assert_eq!(rig.enter_as(false), Ok(1));
    assert_eq!(rig.enter_as(false), Err(Some(error::LAUNCH_NOT_CLEAR)));
    assert_eq!(rig.enter_as(true), Ok(1));
    // VMCLEAR makes it clear again, and no longer current.
    vmclear(rig.cpu(), rig.vmcs_region().0).unwrap();
    assert_eq!(vmptrst(rig.cpu()), None);
    assert_eq!(rig.enter_as(true), Err(None));
    vmptrld(rig.cpu(), rig.vmcs_region().0).unwrap();
    assert_eq!(rig.enter_as(true), Err(Some(error::RESUME_NOT_LAUNCHED)));
    assert_eq!(rig.enter_as(false), Ok(1));
}

#[test]
fn fields_have_widths_and_exist_by_capability() {
    let rig = Rig::new(Profile::haswell());
    rig.write(0x0800, 0x12345).unwrap();
    assert_eq!(rig.read(0x0800), 0x2345);
    rig.write(0x4004, u64::MAX).unwrap();
    assert_eq!(rig.read(0x4004), 0xffff_ffff);
    rig.write(0x2010, 0x1111_2222_3333_4444).unwrap();
    assert_eq!(rig.read(0x2011), 0x1111_2222);
    rig.write(0x2011, 5).unwrap();
    assert_eq!(rig.read(0x2010), 0x5_3333_4444);
    for unknown in [0x200e, 0x0006, 0x6828, 0x6801, 0x2032] {
        failed_with(&rig, rig.write(unknown, 0), error::UNSUPPORTED_FIELD);
    }
    // This model says that exit information can be written (MISC bit 29).
    rig.write(0x4402, 1).unwrap();

    drop(rig);
    let penryn = Rig::new(Profile::no_ept());
    for absent in [0x201a, 0x2400, 0x280a, 0x0000, 0x2c02] {
        failed_with(&penryn, penryn.write(absent, 0), error::UNSUPPORTED_FIELD);
    }
    failed_with(&penryn, penryn.write(0x4402, 1), error::READ_ONLY_FIELD);
}

#[test]
fn invept_and_invvpid_check_their_operands() {
    let rig = Rig::new(Profile::haswell());
    let cpu = rig.cpu();
    let eptp = rig.read(0x201a);
    // SAFETY: the processor is simulated.
    let invept = |kind, eptp| unsafe { cpu.invept(kind, eptp) };
    // SAFETY: the processor is simulated.
    let invvpid = |kind, vpid, at| unsafe { cpu.invvpid(kind, vpid, at) };
    invept(InveptKind::Single, eptp).unwrap();
    invept(InveptKind::All, 0).unwrap();
    failed_with(
        &rig,
        invept(InveptKind::Single, eptp | 0x80),
        error::INVALIDATE_OPERAND,
    );
    failed_with(
        &rig,
        invept(InveptKind::Single, (eptp & !7) | 1),
        error::INVALIDATE_OPERAND,
    );
    invvpid(InvvpidKind::Single, 1, 0).unwrap();
    invvpid(InvvpidKind::All, 0, 0).unwrap();
    failed_with(
        &rig,
        invvpid(InvvpidKind::Single, 0, 0),
        error::INVALIDATE_OPERAND,
    );
    let hole = 0x8000_0000_0000;
    failed_with(
        &rig,
        invvpid(InvvpidKind::Address, 1, hole),
        error::INVALIDATE_OPERAND,
    );
    assert_eq!(rig.machine.counts().invept, 4);
    assert_eq!(rig.machine.counts().invvpid, 4);

    drop(rig);
    let penryn = Rig::new(Profile::no_ept());
    // SAFETY: the processor is simulated.
    let result = unsafe { penryn.cpu().invept(InveptKind::All, 0) };
    assert_eq!(result, Err(VmxFailure::Invalid));
    found(&penryn.machine, "#UD: INVEPT");
}

#[test]
fn vmxon_wants_everything_in_place() {
    for (profile, cr4, text) in [
        (Profile::haswell(), false, "#UD: VMXON"),
        (Profile::locked_off(), true, "#GP: VMXON"),
        (Profile::unlocked(), true, "#GP: VMXON"),
    ] {
        let rig = Rig::off(Machine::new(profile, 1));
        if cr4 {
            // SAFETY: pinned.
            unsafe { rig.host().set_vmxe(true) };
        }
        assert_eq!(
            vmxon(rig.cpu(), rig.vmxon_region().0),
            Err(VmxFailure::Invalid)
        );
        found(&rig.machine, text);
    }
    let rig = Rig::off(Machine::haswell());
    // SAFETY: pinned.
    unsafe { rig.host().set_vmxe(true) };
    // Without the revision identifier, misaligned, or beyond the width.
    for bad in [rig.spare(0), rig.vmxon_region().0 + 8, 1 << 39] {
        assert_eq!(vmxon(rig.cpu(), bad), Err(VmxFailure::Invalid));
    }
    rig.poke(rig.spare(0), 1 << 31 | 0x2b);
    assert_eq!(vmxon(rig.cpu(), rig.spare(0)), Err(VmxFailure::Invalid));
    vmxon(rig.cpu(), rig.vmxon_region().0).unwrap();
    // No current VMCS yet: VMfailInvalid, whatever the error would be.
    assert_eq!(
        vmxon(rig.cpu(), rig.vmxon_region().0),
        Err(VmxFailure::Invalid)
    );
    assert_eq!(vmptrld(rig.cpu(), 1), Err(VmxFailure::Invalid));
}

#[test]
fn outside_vmx_operation_is_undefined() {
    let mut rig = Rig::off(Machine::haswell());
    assert_eq!(
        vmclear(rig.cpu(), rig.vmcs_region().0),
        Err(VmxFailure::Invalid)
    );
    found(&rig.machine, "#UD: VMCLEAR");
    assert_eq!(rig.write(0x6800, 0), Err(VmxFailure::Invalid));
    found(&rig.machine, "#UD: VMWRITE");
    assert_eq!(vmxoff(rig.cpu()), Err(VmxFailure::Invalid));
    found(&rig.machine, "#UD: VMXOFF");
    assert_eq!(rig.enter_as(false), Err(None));
    found(&rig.machine, "#UD: VM entry");
}

#[test]
fn damage_is_found() {
    let rig = Rig::new(Profile::haswell());
    let vmcs = rig.vmcs_region().0;
    let other = 1 - rig.host().current_cpu();
    // The VMCS is active here: VMXOFF would lose its data.
    vmxoff(rig.cpu()).unwrap();
    found(&rig.machine, "VMXOFF while VMCS");
    vmxon(rig.cpu(), rig.vmxon_region().0).unwrap();
    vmptrld(rig.cpu(), vmcs).unwrap();
    // SAFETY: in VMX operation.
    unsafe { rig.host().set_vmxe(false) };
    found(&rig.machine, "CR4.VMXE cleared in VMX operation");
    // Another processor takes the VMCS while it is active here.
    let page = rig.spare(0);
    rig.poke(page, 0x2b);
    let machine = rig.machine.clone();
    std::thread::spawn(move || {
        machine.set_affinity(Some(other));
        let host = machine.host();
        host.preempt_off();
        // SAFETY: pinned.
        unsafe { host.set_vmxe(true) };
        vmxon(host.cpu(), page).unwrap();
        vmptrld(host.cpu(), vmcs).unwrap();
        vmclear(host.cpu(), vmcs).unwrap();
        vmxoff(host.cpu()).unwrap();
        // SAFETY: pinned.
        unsafe { host.set_vmxe(false) };
        // SAFETY: pairs with `preempt_off`.
        unsafe { host.preempt_on() };
    })
    .join()
    .unwrap();
    found(&rig.machine, "fatal: VMCS");
}

#[test]
fn unknown_msrs_and_bad_values_are_host_faults() {
    let rig = Rig::off(Machine::new(Profile::no_vmx(), 1));
    // SAFETY: the processor is simulated.
    let read = |msr| unsafe { rig.cpu().rdmsr(msr) };
    // SAFETY: the processor is simulated.
    let write = |msr, value| unsafe { rig.cpu().wrmsr(msr, value) };
    assert_eq!(read(0xc000_0080), 0xd01);
    assert_eq!(rig.machine.findings(), Vec::<String>::new());
    read(0x480);
    found(&rig.machine, "#GP: RDMSR 0x480");
    write(0xc000_0080, 0xd03);
    found(&rig.machine, "#GP: WRMSR");
    write(0x277, 2);
    found(&rig.machine, "#GP: WRMSR");
    write(0xc000_0082, 0x8000_0000_0000);
    found(&rig.machine, "#GP: WRMSR");
}
