//! VMX operation on many processors, other hypervisors, refusals, shortage of
//! memory, and leaving without a trace.

use abi::tunnel::ExitStatus;
use sim::client::Client;
use sim::fault::{self, FaultyAllocator};
use sim::{Machine, Profile, Step};
use vmx::caps::{Refusal, examine};
use vmx::host::Host;
use vmx::{Error, Hypervisor, StartError, Vm};

#[global_allocator]
static HEAP: FaultyAllocator = FaultyAllocator;

#[test]
fn vmx_operation_lasts_while_a_vm_exists() {
    let machine = Machine::new(Profile::haswell(), 3);
    let hypervisor = Hypervisor::new(machine.host()).unwrap();
    assert!(!machine.in_vmx(0));
    let first = hypervisor.create_vm().unwrap();
    let second = hypervisor.create_vm().unwrap();
    assert_eq!((first.id(), second.id()), (0, 1));
    assert!((0..3).all(|cpu| machine.in_vmx(cpu)));
    assert_eq!(machine.counts().vmxon, 3);
    drop(first);
    assert!(machine.in_vmx(2));
    assert_eq!(hypervisor.create_vm().unwrap().id(), 0);
    drop(second);
    assert!((0..3).all(|cpu| !machine.in_vmx(cpu)));
    drop(hypervisor);
    machine.assert_clean();
}

#[test]
fn there_are_64_vms_and_16_vcpus() {
    let machine = Machine::haswell();
    let hypervisor = Hypervisor::new(machine.host()).unwrap();
    let vms: Vec<_> = (0..64).map(|_| hypervisor.create_vm().unwrap()).collect();
    assert_eq!(hypervisor.create_vm().err(), Some(Error::Limit));
    let vcpus: Vec<_> = (0..16)
        .map(|id| Vm::create_vcpu(&vms[5], id).unwrap())
        .collect();
    assert_eq!(Vm::create_vcpu(&vms[5], 3).err(), Some(Error::Busy));
    assert_eq!(Vm::create_vcpu(&vms[5], 16).err(), Some(Error::Invalid));
    drop((vcpus, vms, hypervisor));
    machine.assert_clean();
}

#[test]
fn machines_that_cannot_say_why() {
    for profile in [
        Profile::no_vmx(),
        Profile::locked_off(),
        Profile::no_external_interrupt_exiting(),
        Profile::no_ept(),
        Profile::hidden_ept(),
    ] {
        let name = profile.name;
        let machine = Machine::new(profile, 2);
        match Hypervisor::new(machine.host()) {
            Err(StartError::Unsupported(why)) => {
                assert_eq!(name, "no_vmx");
                assert_eq!(why, Refusal::NoVmx);
            }
            Err(other) => panic!("{name}: {other:?}"),
            Ok(hypervisor) => {
                let capability = hypervisor.capability();
                match (name, capability.refusal) {
                    ("locked_off", Some(Refusal::VmxLockedOff))
                    | ("no_ept" | "hidden_ept", None) => {}
                    (
                        "no_external_interrupt_exiting",
                        Some(Refusal::Control {
                            word,
                            missing,
                            stuck,
                        }),
                    ) => {
                        assert_eq!((word, missing, stuck), ("pin-based", 1, 0));
                    }
                    other => panic!("{other:?}"),
                }
                assert!(!capability.ept, "{name}");
                let refused = hypervisor.create_vm().err();
                assert_eq!(refused, Some(Error::NotWorking), "{name}");
            }
        }
        machine.assert_clean();
    }
}

/// SWAPGS is undefined there, and INT 2 no NMI: a vCPU would be the end of the host.
#[test]
fn a_host_with_fred_is_told_so() {
    let mut profile = Profile::haswell();
    profile.host_cr4 |= 1 << 32;
    *profile.msrs.entry(0x489).or_default() |= 1 << 32;
    let machine = Machine::new(profile, 1);
    machine.set_host_selectors(0x2b, 0);
    let hypervisor = Hypervisor::new(machine.host()).unwrap();
    let why = hypervisor.capability().refusal;
    assert_eq!(why, Some(Refusal::Fred));
    assert_eq!(hypervisor.create_vm().err(), Some(Error::NotWorking));
    drop(hypervisor);
    machine.assert_clean();
}

#[test]
fn one_processor_that_cannot_is_enough() {
    let machine = Machine::new(Profile::haswell(), 3);
    machine.set_affinity(Some(0));
    machine.set_msr(2, 0x3a, 1);
    let hypervisor = Hypervisor::new(machine.host()).unwrap();
    assert!(hypervisor.capability().refusal.is_some());
    assert_eq!(hypervisor.create_vm().err(), Some(Error::NotWorking));
    drop(hypervisor);
    machine.set_affinity(None);
    machine.assert_clean();
}

#[test]
fn an_open_feature_control_register_is_locked_with_vmx_on() {
    let machine = Machine::new(Profile::unlocked(), 2);
    let client = Client::new(&machine);
    assert_eq!(machine.msr(0, 0x3a), Some(5));
    assert_eq!(machine.msr(1, 0x3a), Some(5));
    assert_eq!(client.run([]), ExitStatus::Interrupt);
    client.finish();
}

#[test]
fn a_vcpu_follows_its_thread_from_processor_to_processor() {
    let machine = Machine::new(Profile::skylake_x(), 4);
    machine.set_migrate(true);
    let client = Client::new(&machine);
    client.protected_mode();
    for round in 0..20u64 {
        let status = client.run([
            Step::write(0x3000, 8, round, 2),
            Step::read(0x3000, 8, round, 2),
            Step::act(move |guest| {
                let value = u128::from(round);
                assert_eq!(guest.xmm(1), value);
                guest.set_xmm(1, value + 1);
            }),
            Step::cpuid(0, 0),
        ]);
        assert_eq!(status, ExitStatus::Interrupt);
    }
    let counts = machine.counts();
    assert!(counts.vmlaunch >= 20, "each processor launches anew");
    assert_eq!(machine.script_left(), 0);
    client.finish();
}

#[test]
fn a_vcpu_that_stays_is_resumed() {
    let machine = Machine::haswell();
    let client = Client::new(&machine);
    client.run([]);
    machine.reset_counts();
    for _ in 0..50 {
        client.run([Step::cpuid(0, 0)]);
    }
    let counts = machine.counts();
    assert_eq!((counts.vmlaunch, counts.vmptrld, counts.vmclear), (0, 0, 0));
    assert_eq!((counts.invept, counts.invvpid), (0, 0));
    client.finish();
}

#[test]
fn a_32_bit_process_gets_its_segments_back() {
    let machine = Machine::haswell();
    machine.set_host_selectors(0x2b, 0x58);
    let client = Client::new(&machine);
    assert_eq!(client.run([Step::cpuid(0, 0)]), ExitStatus::Interrupt);
    client.finish();
}

#[test]
fn beside_another_hypervisor() {
    for migrate in [false, true] {
        let machine = Machine::haswell();
        machine.add_foreign_hypervisor();
        machine.set_migrate(migrate);
        let client = Client::new(&machine);
        client.protected_mode();
        for round in 0..10 {
            let status = client.run([
                Step::write(0x3000, 8, round, 2),
                Step::read(0x3000, 8, round, 2),
                Step::cpuid(0, 0),
            ]);
            assert_eq!(status, ExitStatus::Interrupt);
        }
        assert_eq!(machine.counts().vmxon, 0);
        assert_eq!(machine.counts().vmxoff, 0);
        client.finish();
    }
}

/// Its thread is interrupted between CR4.VMXE and VMXON: RUN and the short
/// accesses wait for it.
#[test]
fn beside_a_hypervisor_that_is_not_there_yet() {
    let machine = Machine::haswell();
    machine.add_foreign_hypervisor();
    let client = Client::new(&machine);
    client.protected_mode();
    machine.delay_foreign_vmxon(3);
    let status = client.run([Step::cpuid(0, 0)]);
    assert_eq!(status, ExitStatus::Interrupt);
    machine.delay_foreign_vmxon(3);
    let regs = client.regs();
    machine.delay_foreign_vmxon(u32::MAX);
    assert_eq!(client.vcpu.set_regs(&regs), Err(Error::Busy));
    machine.set_event_pending(true);
    assert_eq!(client.run([]), ExitStatus::Interrupt);
    machine.set_event_pending(false);
    machine.delay_foreign_vmxon(0);
    client.finish();
}

/// Linux 7 lets nobody but KVM keep CR4.VMXE.
#[test]
fn where_the_host_keeps_cr4_to_itself() {
    let machine = Machine::haswell();
    machine.set_keeps_vmxe(false);
    let client = Client::new(&machine);
    assert!(!machine.in_vmx(0));
    client.protected_mode();
    client.run([Step::write(0x3000, 8, 1, 2)]);
    machine.reset_counts();
    client.run([Step::read(0x3000, 8, 1, 2), Step::cpuid(0, 0)]);
    let counts = machine.counts();
    assert_eq!((counts.vmxon, counts.vmxoff), (1, 1));
    // On the same processor as before nothing is dropped.
    assert_eq!((counts.invept, counts.invvpid), (0, 0));
    assert!(!machine.in_vmx(0));
    client.finish();
}

#[test]
fn processors_come_and_go() {
    let machine = Machine::new(Profile::haswell(), 3);
    let client = Client::new(&machine);
    let on = |cpu: usize, call: &(dyn Fn() + Sync)| {
        use vmx::host::Host;
        machine.host().run_on(cpu, call).unwrap();
    };
    client.machine.set_affinity(Some(1));
    client.run([Step::cpuid(0, 0)]);
    client.machine.set_affinity(None);
    on(1, &|| client.hypervisor.cpu_offline());
    assert!(!machine.in_vmx(1));
    machine.set_online(1, false);
    // Its VMCS was cleared there, so it can run elsewhere.
    client.machine.set_affinity(Some(0));
    assert_eq!(client.run([Step::cpuid(0, 0)]), ExitStatus::Interrupt);
    machine.set_online(1, true);
    on(1, &|| client.hypervisor.cpu_online());
    assert!(machine.in_vmx(1));
    client.machine.set_affinity(Some(1));
    assert_eq!(client.run([Step::cpuid(0, 0)]), ExitStatus::Interrupt);
    client.machine.set_affinity(None);
    client.finish();
}

#[test]
fn suspend_takes_every_processor_out_and_resume_back() {
    let machine = Machine::haswell();
    let client = Client::new(&machine);
    client.run([Step::cpuid(0, 0)]);
    client.hypervisor.suspend();
    assert!((0..2).all(|cpu| !machine.in_vmx(cpu)));
    // Until then nothing brings a processor back into VMX operation.
    assert_eq!(client.run_fails([]), Error::Fault);
    assert_eq!(client.vcpu.regs().err(), Some(Error::Fault));
    assert!(client.hypervisor.create_vm().is_ok_and(|vm| vm.id() == 1));
    client.hypervisor.cpu_online();
    assert!((0..2).all(|cpu| !machine.in_vmx(cpu)));
    client.hypervisor.resume();
    assert!((0..2).all(|cpu| machine.in_vmx(cpu)));
    assert_eq!(client.run([Step::cpuid(0, 0)]), ExitStatus::Interrupt);
    client.finish();
}

#[test]
fn only_the_owner_may() {
    let machine = Machine::haswell();
    let client = Client::new(&machine);
    assert_eq!(client.vm.check_owner(), Ok(()));
    let stranger = sim::Process::new(&machine);
    assert_eq!(
        stranger.enter(|| client.vm.check_owner()),
        Err(Error::Denied)
    );
    client.finish();
}

#[test]
fn the_memory_limit_is_settable_without_vms() {
    let machine = Machine::haswell();
    let hypervisor = Hypervisor::new(machine.host()).unwrap();
    hypervisor.set_memory_limit(Some(1 << 30)).unwrap();
    assert_eq!(hypervisor.capability().memory_quota, Some(1 << 30));
    let vm = hypervisor.create_vm().unwrap();
    assert_eq!(hypervisor.set_memory_limit(None), Err(Error::Busy));
    drop((vm, hypervisor));
    machine.assert_clean();
}

/// Everything a VM does on its way, with one allocation failing: it may fail,
/// with [`Error::NoMemory`], and leaves nothing behind.
#[test]
fn no_allocation_failure_leaves_anything_behind() {
    let life = |machine: &Machine| -> Result<(), Error> {
        let hypervisor = Hypervisor::new(machine.host()).map_err(|error| match error {
            StartError::NoMemory => Error::NoMemory,
            StartError::Unsupported(why) => panic!("{why}"),
        })?;
        let vm = hypervisor.create_vm()?;
        let process = machine.process();
        let ram = process.map(0x10_0000);
        vm.add_ram_block(ram, 0x10_0000)?;
        vm.set_ram(0, 0x10_0000, ram.0, 0)?;
        vm.set_ram(0x4000, 0x1000, 0, 0x80)?;
        vm.protect_ram(0x8000, 0x1000, 0)?;
        let vcpu = Vm::create_vcpu(&vm, 0)?;
        vcpu.run()
    };
    let machine = Machine::haswell();
    let (result, allocations) = fault::counting(|| life(&machine));
    assert_eq!(result, Ok(()));
    machine.assert_clean();
    assert!(allocations > 20, "{allocations}");
    let mut failed = 0;
    for nth in 0.. {
        let machine = Machine::haswell();
        let (result, happened) = fault::failing(nth, || life(&machine));
        machine.assert_clean();
        if !happened {
            assert_eq!(result, Ok(()));
            break;
        }
        if let Err(error) = result {
            assert_eq!(error, Error::NoMemory, "allocation {nth}");
            failed += 1;
        }
    }
    assert!(failed > 20, "{failed}");
}

/// The same for memory that is needed while the guest runs.
#[test]
fn a_guest_that_touches_memory_when_there_is_none() {
    for nth in 0.. {
        let machine = Machine::haswell();
        let client = Client::new(&machine);
        client.protected_mode();
        machine.script([Step::write(0x5000, 8, 1, 2), Step::write(0x5000, 8, 2, 2)]);
        let (result, happened) = fault::failing(nth, || client.vcpu.run());
        assert!(result.is_ok(), "allocation {nth}: {result:?}");
        client.finish();
        if !happened {
            break;
        }
    }
}

/// Models whose errata are known do not offer a guest what they do wrong.
#[test]
fn errata() {
    const PCIDE: u64 = 1 << 17;
    let caps = |model, host_cr4| {
        let mut profile = Profile::haswell();
        profile.cpuid.get_mut(&(1, 0)).unwrap().eax = model;
        profile.host_cr4 = profile.host_cr4 & !PCIDE | host_cr4;
        examine(Machine::new(profile, 1).host().cpu()).expect("a usable processor")
    };
    // Alder Lake without and with the microcode that mends it, as its host sees it.
    assert_eq!(caps(0x9_06a3, 0).cr4_fixed1 & PCIDE, 0);
    assert_eq!(caps(0x9_06a3, PCIDE).cr4_fixed1 & PCIDE, PCIDE);
    assert_eq!(caps(0x5_0654, 0).cr4_fixed1 & PCIDE, PCIDE);
    // Nehalem's switch of the counters.
    assert_eq!(caps(0x1_06a5, 0).counters.leaf.eax, 0);
    assert_ne!(caps(0x2_06a7, 0).counters.leaf.eax, 0);
}
