//! Hardware task switches: what only a simulated host can do to one. Which
//! registers and faults come out of them is for the conformance client.

use abi::tunnel::ExitStatus;
use sim::Step;
use sim::client::{CODE, Client};

const GDT: u64 = 0x2000;
const OLD: u64 = 0x3000;
const NEW: u64 = 0x3ffc;
const JUMP: u64 = 2 << 30;

fn client() -> Client {
    let client = Client::protected();
    let tss = |base: u64, kind: u64| 0x67 | base << 16 | kind << 40;
    for (at, value) in [
        (8, 0x00cf_9b00_0000_ffff),
        (0x10, 0x00cf_9300_0000_ffff),
        (0x18, tss(OLD, 0x8b)),
        (0x20, tss(NEW, 0x89)),
    ] {
        client.load(GDT + at, &u64::to_le_bytes(value));
    }
    for (at, value) in [(0x20, 0x5000u32), (0x24, 0x202), (0x38, 0x7000)] {
        client.load(NEW + at, &value.to_le_bytes());
    }
    for (at, value) in [(0x48, 0x10u32), (0x4c, 8), (0x50, 0x10), (0x54, 0x10)] {
        client.load(NEW + at, &value.to_le_bytes());
    }
    client.change_regs(|state| {
        state.gdt.base = GDT;
        state.gdt.limit = 0x27;
        state.tr.base = OLD;
        state.rbx = 0x1234;
    });
    client
}

fn u32_at(client: &Client, at: u64) -> u32 {
    u32::from_le_bytes(client.bytes(at))
}

fn switched(client: &Client) {
    let state = client.regs();
    assert_eq!((state.rip, state.rsp), (0x5000, 0x7000));
    assert_eq!((state.tr.selector, state.tr.base), (0x20, NEW));
    assert_eq!(u32_at(client, OLD + 0x34), 0x1234);
    assert_eq!(client.bytes::<1>(GDT + 0x18 + 5), [0x89]);
    assert_eq!(client.bytes::<1>(GDT + 0x20 + 5), [0x8b]);
}

#[test]
fn a_jump_across_a_page() {
    let client = client();
    client.run([Step::exits(9, 0x20 | JUMP, 7)]);
    switched(&client);
    assert_eq!(u32_at(&client, OLD + 0x20), CODE as u32 + 7);
    assert_eq!(client.regs().cr0 & 8, 8);
    client.finish();
}

/// RUN returns before the switch; the next RUN does it, once.
#[test]
fn a_signal_comes_first() {
    let client = client();
    let machine = client.machine.clone();
    let status = client.run([
        Step::act(move |_| machine.set_event_pending(true)),
        Step::exits(9, 0x20 | JUMP, 7),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.regs().rip, CODE);
    client.machine.set_event_pending(false);
    client.run([]);
    switched(&client);
    client.finish();
}

/// An interrupt through a task gate comes once, also if its switch faults.
#[test]
fn an_interrupt_through_a_gate() {
    for broken in [false, true] {
        let client = client();
        client.change_regs(|state| state.rflags |= 0x200);
        if broken {
            // SS of the new task is null: #TS in the new task.
            client.load(NEW + 0x50, &[0, 0]);
        }
        client.vcpu.interrupt(0x40);
        client.run([Step::delivery_through_a_task_gate(0x20)]);
        let received = client.machine.take_received();
        if broken {
            let first = received.first().expect("an event");
            assert_eq!((first.vector, first.error_code), (10, Some(1)));
            assert_eq!(received.len(), 1);
        } else {
            assert_eq!(received.len(), 0);
            assert_eq!(client.regs().rflags & 0x4000, 0x4000, "NT");
        }
        assert_eq!(client.regs().tr.selector, 0x20);
        assert_eq!(u32_at(&client, NEW) & 0xffff, 0x18, "link");
        client.finish();
    }
}

/// A fault on top of a fault: the switch for a #GP that finds no SS is a #DF.
#[test]
fn a_fault_in_the_switch_for_a_fault() {
    let client = client();
    client.load(NEW + 0x50, &[0, 0]);
    client.run([
        Step::rdmsr(0x1_2345),
        Step::delivery_through_a_task_gate(0x20),
    ]);
    let received = client.machine.take_received();
    let first = received.first().expect("an event");
    assert_eq!((first.vector, first.error_code), (8, Some(0)));
    assert_eq!(client.regs().tr.selector, 0x20);
    client.finish();
}

/// The task's TSS is where the client's memory is closed: PAGEFAULT, then on.
#[test]
fn protected_memory() {
    let client = client();
    client
        .vm
        .protect_ram(0x4000, 0x1000, 0)
        .expect("PROTECT_RAM");
    let status = client.run([Step::exits(9, 0x20 | JUMP, 7)]);
    assert_eq!(status, ExitStatus::PageFault);
    client
        .vm
        .protect_ram(0x4000, 0x1000, 7)
        .expect("PROTECT_RAM");
    client.run([]);
    switched(&client);
    client.finish();
}

/// A TSS in device memory ends the guest, not the host.
#[test]
fn device_memory() {
    let client = client();
    client.load(
        GDT + 0x20,
        &(0x67 | 0x80_0000u64 << 16 | 0x89 << 40).to_le_bytes(),
    );
    let status = client.run([Step::exits(9, 0x20 | JUMP, 7)]);
    assert_eq!(status, ExitStatus::StateChange);
    client.finish();
}

/// SDM 8.3, table 8-1, "TSS segment limit"; of the old one, what is saved must fit. A fault comes
/// before anything has changed.
#[test]
fn a_segment_that_is_too_small() {
    // The type, bits 3:0 without busy; limits of the new TSS and the old; whose selector is the fault's.
    for (kind, new, old, fault) in [
        (0x81u64, 0x2b_u64, 0x67_u32, None),
        (0x81, 0x2a, 0x67, Some(0x20)),
        (0x89, 0x67, 0x67, None),
        (0x89, 0x66, 0x67, Some(0x20)),
        (0x89, 0, 0x67, Some(0x20)),
        (0x89, 0x67, 0x5f, None),
        (0x89, 0x67, 0x5e, Some(0x18)),
    ] {
        let client = client();
        let descriptor = new | NEW << 16 | kind << 40;
        client.load(GDT + 0x20, &descriptor.to_le_bytes());
        if kind == 0x81 {
            for (at, value) in [(0x22, 0x10u16), (0x24, 8), (0x26, 0x10), (0x28, 0x10)] {
                client.load(NEW + at, &value.to_le_bytes());
            }
        }
        client.change_regs(|state| state.tr.limit = old);
        client.run([Step::exits(9, 0x20 | JUMP, 7)]);
        let received = client.machine.take_received();
        let got: Vec<_> = received.iter().map(|e| (e.vector, e.error_code)).collect();
        let tr = client.regs().tr.selector;
        let name = format!("{kind:#x}, {new:#x}, {old:#x}");
        match fault {
            None => assert_eq!((got, tr), (vec![], 0x20), "{name}"),
            Some(selector) => {
                assert_eq!((got, tr), (vec![(10, Some(selector))], 0x18), "{name}");
                assert_eq!(u32_at(&client, OLD + 0x20), 0, "{name}: saved");
            }
        }
        client.finish();
    }
}
