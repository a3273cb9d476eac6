//! Beside another hypervisor that leaves its guest's values in SYSCALL's registers when its thread
//! goes, as KVM does: they are neither the host's, nor may they be lost. That each register is again
//! what it was when the loan began the simulator sees to.

use sim::client::Client;
use sim::{Machine, Step};

const LSTAR: u32 = 0xc000_0082;
const TSC_AUX: u32 = 0xc000_0103;
const GUESTS: u64 = 0xffff_8000_0000_1000;
const FOREIGN: u64 = 0xffff_ffff_a000_0000;

/// A run of a guest in 64-bit mode that has values of its own.
fn run(client: &Client) {
    client.run([
        Step::rdmsr(LSTAR),
        Step::expect_gpr(0, GUESTS & 0xffff_ffff),
        Step::output(0x80, 1, 0),
    ]);
}

fn client(machine: &Machine) -> Client {
    let client = Client::new(machine);
    client.long_mode();
    client.set_msr(LSTAR, GUESTS);
    client.set_msr(TSC_AUX, 77);
    client
}

/// The other hypervisor's thread was here last, or has been on its way to user space since.
fn other(machine: &Machine, lstar: u64, tsc_aux: u64, foreign: bool) {
    machine.set_msr(0, LSTAR, lstar);
    machine.set_msr(0, TSC_AUX, tsc_aux);
    machine.set_foreign_msrs(foreign);
}

#[test]
fn they_are_not_taken_for_the_hosts() {
    let machine = Machine::haswell();
    let hosts = machine.msr(0, LSTAR).unwrap();
    let client = client(&machine);
    other(&machine, FOREIGN, 9, true);
    run(&client);
    assert_eq!(machine.msr(0, LSTAR), Some(FOREIGN));
    other(&machine, hosts, 0, false);
    run(&client);
    assert_eq!(machine.msr(0, LSTAR), Some(hosts));
    assert_eq!(machine.msr(0, TSC_AUX), Some(0));
    client.finish();
}

#[test]
fn they_are_there_again_afterwards() {
    let machine = Machine::haswell();
    let client = client(&machine);
    run(&client);
    for round in 1..4 {
        other(&machine, FOREIGN + round, 9 + round, true);
        run(&client);
        assert_eq!(machine.msr(0, LSTAR), Some(FOREIGN + round));
        assert_eq!(machine.msr(0, TSC_AUX), Some(9 + round));
    }
    client.finish();
}
