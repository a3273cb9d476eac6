//! Another guest than the last gets a processor by an IBPB, and the same guest without: it
//! costs some thousand cycles. That none is missing the simulator finds by itself.

use sim::client::Client;
use sim::{Machine, Profile, SimHost, Step};
use vmx::fallible::Shared;
use vmx::host::Mitigations;
use vmx::{Vcpu, Vm};

const PRED_CMD: u32 = 0x49;

/// How VMX operation is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entered {
    Once,
    /// In each loan, where the host keeps CR4 to itself.
    EachTime,
    /// By another hypervisor.
    Beside,
}

const WAYS: [Entered; 3] = [Entered::Once, Entered::EachTime, Entered::Beside];

fn machine(way: Entered, cpus: usize) -> Machine {
    let machine = Machine::new(Profile::skylake_x(), cpus);
    match way {
        Entered::Once => {}
        Entered::EachTime => machine.set_keeps_vmxe(false),
        Entered::Beside => machine.add_foreign_hypervisor(),
    }
    machine
}

fn run(machine: &Machine, vcpu: &Vcpu<SimHost>) {
    machine.script([Step::cpuid(0, 0), Step::cpuid(0, 0)]);
    vcpu.run().unwrap();
}

/// IBPBs that `work` takes.
fn barriers(machine: &Machine, work: impl FnOnce()) -> u64 {
    machine.reset_counts();
    work();
    machine.counts().forgot_branches
}

/// A second VM with a vCPU, in the same process.
fn another(client: &Client) -> (Shared<Vm<SimHost>>, Shared<Vcpu<SimHost>>) {
    let vm = client.hypervisor.create_vm().unwrap();
    let vcpu = Vm::create_vcpu(&vm, 0).unwrap();
    (vm, vcpu)
}

#[test]
fn from_guest_to_guest() {
    for way in WAYS {
        let machine = machine(way, 1);
        let client = Client::new(&machine);
        let (vm, other) = another(&client);
        let sibling = Vm::create_vcpu(&client.vm, 1).unwrap();
        run(&machine, &client.vcpu);
        for vcpu in [&other, &client.vcpu, &sibling, &client.vcpu] {
            assert!(barriers(&machine, || run(&machine, vcpu)) > 0, "{way:?}");
        }
        drop((other, vm, sibling));
        client.finish();
    }
}

#[test]
fn not_for_the_same_guest() {
    for way in WAYS {
        let machine = machine(way, 2);
        let client = Client::new(&machine);
        run(&machine, &client.vcpu);
        let again = || {
            for _ in 0..3 {
                run(&machine, &client.vcpu);
                let _ = client.regs();
            }
        };
        // A hypervisor whose VMCS is current may enter its guest after each loan.
        let at_the_end = if way == Entered::Beside { 6 } else { 0 };
        assert_eq!(barriers(&machine, again), at_the_end, "{way:?}");
        client.finish();
    }
}

/// A page that was one vCPU's VMCS is the next one's.
#[test]
fn a_new_vcpu_is_another_guest() {
    for way in WAYS {
        let machine = machine(way, 1);
        machine.reuse_pages();
        let client = Client::new(&machine);
        for _ in 0..3 {
            let work = || {
                let (vm, vcpu) = another(&client);
                run(&machine, &vcpu);
                drop((vcpu, vm));
            };
            assert!(barriers(&machine, work) > 0, "{way:?}");
        }
        client.finish();
    }
}

#[test]
fn on_both_sides_of_another_hypervisors_guest() {
    let machine = machine(Entered::Beside, 1);
    let client = Client::new(&machine);
    for _ in 0..3 {
        machine.run_foreign_guest(0);
        assert_eq!(barriers(&machine, || run(&machine, &client.vcpu)), 2);
    }
    machine.run_foreign_guest(0);
    client.finish();
}

/// The guest's thread gave the processor to another one.
#[test]
fn threads_come_and_go() {
    for way in [Entered::EachTime, Entered::Beside] {
        let machine = machine(way, 1);
        let client = Client::new(&machine);
        run(&machine, &client.vcpu);
        let before = barriers(&machine, || run(&machine, &client.vcpu));
        let elsewhere = barriers(&machine, || {
            std::thread::scope(|scope| {
                scope.spawn(|| run(&machine, &client.vcpu));
            });
        });
        assert_eq!(elsewhere, before + 1, "{way:?}");
        client.finish();
    }
}

/// So it is where the processor has none, and where the host wants none.
#[test]
fn where_there_is_none() {
    for wanted in [Mitigations::Needed, Mitigations::Off] {
        let mut profile = Profile::skylake_x();
        if wanted == Mitigations::Needed {
            profile.cpuid.get_mut(&(7, 0)).unwrap().edx &= !(1 << 26);
            profile.msrs.remove(&PRED_CMD);
        }
        let machine = Machine::new(profile, 1);
        machine.set_mitigations(wanted);
        let client = Client::new(&machine);
        let (vm, other) = another(&client);
        let work = || {
            run(&machine, &client.vcpu);
            run(&machine, &other);
        };
        assert_eq!(barriers(&machine, work), 0, "{wanted:?}");
        drop((other, vm));
        client.finish();
    }
}
