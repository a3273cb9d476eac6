//! The machine sleeps, and its time-stamp counter may begin again meanwhile.

use sim::client::Client;
use sim::{Machine, Step};
use vmx::Vm;
use vmx::host::Host;

const TSC: u32 = 0x10;

/// What the guest reads.
fn counter(client: &Client) -> u64 {
    client.run([Step::rdtsc()]);
    let regs = client.regs();
    regs.rdx << 32 | regs.rax
}

/// As Linux does it: all processors but one go offline, and that one sleeps.
fn sleep(client: &Client, counter: Option<u64>) {
    let machine = &client.machine;
    let on = |cpu: usize, call: &(dyn Fn() + Sync)| machine.host().run_on(cpu, call).unwrap();
    on(1, &|| client.hypervisor.cpu_offline());
    machine.set_online(1, false);
    on(0, &|| client.hypervisor.sleep());
    assert!((0..2).all(|cpu| !machine.in_vmx(cpu)));
    if let Some(counter) = counter {
        machine.set_tsc(counter);
    }
    on(0, &|| client.hypervisor.wake());
    machine.set_online(1, true);
    on(1, &|| client.hypervisor.cpu_online());
    assert!((0..2).all(|cpu| machine.in_vmx(cpu)));
}

#[test]
fn a_guests_counter_does_not_go_back() {
    let client = Client::new(&Machine::haswell());
    let machine = &client.machine;
    machine.set_tsc(1 << 40);
    let mut before = counter(&client);
    // Each time less than at the end before.
    for begin in [5000, 300, 0] {
        sleep(&client, Some(begin));
        let after = counter(&client);
        assert!(after > before, "{after} after {before}");
        assert!(after - before < 10_000, "{after} long after {before}");
        // The client sees the same.
        let told = client.msr(TSC).unwrap();
        assert!(told > after && told - after < 10_000, "{told} {after}");
        before = counter(&client);
    }
    // Times that the client sets are those of the guest.
    client.set_msr(TSC, 1 << 50);
    let set = counter(&client);
    assert!(set - (1 << 50) < 10_000, "{set}");
    sleep(&client, Some(7));
    let after = counter(&client);
    assert!(after > set && after - set < 10_000, "{after} after {set}");
    client.finish();
}

#[test]
fn a_counter_that_went_on_is_left_alone() {
    let client = Client::new(&Machine::haswell());
    let before = counter(&client);
    sleep(&client, None);
    let at = counter(&client);
    assert!(at > before && at - before < 10_000, "{at} after {before}");
    sleep(&client, Some(1 << 36));
    assert!(counter(&client) - at > 1 << 35, "the time asleep counts");
    client.finish();
}

#[test]
fn a_vm_made_after_it_begins_at_0() {
    let client = Client::new(&Machine::haswell());
    client.machine.set_tsc(1 << 40);
    sleep(&client, Some(0));
    let vm = client.hypervisor.create_vm().unwrap();
    let vcpu = Vm::create_vcpu(&vm, 0).unwrap();
    let mut data = abi::MsrData {
        nr_msr: 1,
        ..abi::MsrData::default()
    };
    data.entries[0].entry = TSC.into();
    vcpu.msrs(&mut data).unwrap();
    assert_eq!(data.done, 1);
    assert!(
        data.entries[0].value < 10_000,
        "{:#x}",
        data.entries[0].value
    );
    drop((vcpu, vm));
    client.finish();
}
