//! What ends RUN from outside, and what of the host reaches or leaves a processor with a guest.

use abi::tunnel::{ExitStatus, offset};
use sim::client::{CODE, Client};
use sim::{Machine, Profile, Step};
use vmx::Vm;

#[test]
fn host_events_end_run() {
    let client = Client::protected();
    assert_eq!(
        client.run([Step::host_interrupt(), Step::output(1, 1, 1)]),
        ExitStatus::Interrupt
    );
    assert_eq!(client.tunnel().exit_reason, 1);
    assert_eq!(client.machine.counts().host_interrupts, 1);
    assert_eq!(client.run([]), ExitStatus::Io);
    // A signal that waits ends RUN before the guest runs.
    client.machine.set_event_pending(true);
    let before = client.machine.counts();
    assert_eq!(client.run([]), ExitStatus::Interrupt);
    let after = client.machine.counts();
    assert_eq!(before.vmresume, after.vmresume);
    client.machine.set_event_pending(false);
    // So does the client's word, once.
    client.set_tunnel(offset::USER_EVENT_PENDING, 1);
    assert_eq!(client.run([]), ExitStatus::Interrupt);
    assert_eq!(client.tunnel().user_event_pending, 0);
    // And the request to pause.
    client.set_tunnel(offset::EXIT_REASON, abi::tunnel::EXIT_REASON_PAUSE);
    assert_eq!(client.run([]), ExitStatus::Paused);
    client.finish();
}

/// A signal comes while MOV to CR0 waits for the PDPTEs. The guest does not go on before they are read: with paging on,
/// and none, it would be lost.
#[test]
fn a_signal_comes_before_the_pdptes() {
    const TABLE: u64 = 0x8000;
    const GUEST_PDPTE0: u32 = 0x280a;
    for (entry, taken) in [(0x9001_u64, true), (0x9003, false)] {
        let client = Client::protected();
        client.load(TABLE, &entry.to_le_bytes());
        client.change_regs(|state| {
            state.cr3 = TABLE;
            state.cr4 |= 1 << 5;
        });
        let machine = client.machine.clone();
        let status = client.run([
            Step::act(move |_| machine.set_event_pending(true)),
            Step::mov_to_cr(0, 0, 0x8000_0011),
        ]);
        assert_eq!(status, ExitStatus::Interrupt);
        client.machine.set_event_pending(false);
        assert_eq!(client.run([Step::output(1, 1, 1)]), ExitStatus::Io);
        let received = client.machine.take_received();
        let errors: Vec<_> = received.iter().map(|e| (e.vector, e.error_code)).collect();
        let state = client.regs();
        assert_eq!(state.cr0 >> 31 == 1, taken);
        if taken {
            assert_eq!(errors, []);
            let vmcs = client.machine.current_vmcs(0).expect("a VMCS");
            let loaded = client.machine.vmcs_field(vmcs, GUEST_PDPTE0);
            assert_eq!(loaded, Some(entry));
        } else {
            assert_eq!(errors, [(13, Some(0))]);
        }
        client.finish();
    }
}

/// Meanwhile the client sees, and changes, what was before the instruction, which then starts over.
#[test]
fn registers_while_the_pdptes_are_waited_for() {
    const TABLE: u64 = 0x8000;
    const PAGING: u64 = 0x8000_0011;
    const PAE: u64 = 1 << 5;
    const WP: u64 = 1 << 16;
    for (cr, value, changed_cr0) in [
        (0, PAGING, 0x11),
        (0, PAGING, PAGING | WP),
        (4, PAE, PAGING),
        (3, TABLE + 0x20, PAGING),
    ] {
        let client = Client::protected();
        client.load(TABLE, &0x9001_u64.to_le_bytes());
        client.load(TABLE + 0x20, &0xa001_u64.to_le_bytes());
        client.change_regs(|state| {
            state.cr3 = TABLE;
            state.cr4 = if cr == 4 { 0 } else { PAE };
            if cr != 0 {
                state.cr0 = PAGING;
            }
        });
        let before = client.regs();
        let machine = client.machine.clone();
        let mov = if cr == 3 {
            Step::exits(28, 3, 3)
        } else {
            Step::mov_to_cr(cr, 0, value)
        };
        let status = client.run([
            Step::set_gpr(0, value),
            Step::act(move |_| machine.set_event_pending(true)),
            mov,
        ]);
        assert_eq!(status, ExitStatus::Interrupt);
        client.machine.set_event_pending(false);
        let now = client.regs();
        assert_eq!(
            (now.cr0, now.cr3, now.cr4),
            (before.cr0, before.cr3, before.cr4)
        );
        client.change_regs(|state| state.cr0 = changed_cr0);
        assert_eq!(client.run([Step::output(1, 1, 1)]), ExitStatus::Io);
        let now = client.regs();
        let after = match cr {
            0 => now.cr0,
            3 => now.cr3,
            _ => now.cr4,
        };
        assert_eq!(after, value, "CR{cr}");
        assert_eq!(now.rip, before.rip + 3 + 1, "MOV and OUT");
        client.finish();
    }
}

/// A signal that comes after RUN was called and finds the thread outside of the guest, here
/// while a page is mapped. One from before is the client's to see.
#[test]
fn a_signal_on_the_way_into_the_guest() {
    let client = Client::protected();
    client.machine.send_signal();
    assert_eq!(client.run([Step::output(1, 1, 1)]), ExitStatus::Io);
    let machine = client.machine.clone();
    let sent = Step::act(move |_| machine.send_signal());
    let before = client.machine.counts().exits_total();
    assert_eq!(
        client.run([sent, Step::write(0x5000, 1, 1, 2), Step::output(2, 1, 1)]),
        ExitStatus::Interrupt
    );
    assert_eq!(client.machine.counts().exits_total(), before + 1);
    assert_eq!(client.run([]), ExitStatus::Io);
    client.finish();
}

/// Another thread queues a vector while the guest runs.
#[test]
fn an_interrupt_from_another_thread() {
    let client = Client::protected();
    client.change_regs(|state| state.rflags |= 0x200);
    let vcpu = client.vcpu.clone();
    let queue = Step::act(move |_| vcpu.interrupt(0x40));
    let status = client.run([queue, Step::output(1, 1, 1)]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.machine.take_received(), []);
    assert_eq!(client.run([]), ExitStatus::Io);
    assert_eq!(client.machine.take_received()[0].vector, 0x40);
    client.finish();
}

#[test]
fn a_host_nmi_reaches_the_host_once() {
    let client = Client::protected();
    assert_eq!(
        client.run([Step::host_nmi(), Step::output(1, 1, 1)]),
        ExitStatus::Io
    );
    assert_eq!(client.machine.counts().raise_nmi, 1);
    client.finish();
}

/// An NMI is recognized between instructions: behind the delivery that it meets, also if that has to be repeated.
#[test]
fn a_host_nmi_meets_a_delivery() {
    for fresh_stack in [false, true] {
        let client = Client::protected();
        client.change_regs(|state| state.rflags |= 0x200);
        client.vcpu.interrupt(0x55);
        client.vcpu.interrupt(0x33);
        let mut first = true;
        let delivery = Step::new("delivery", 0, move |guest| {
            if std::mem::take(&mut first) {
                guest.raise_host_nmi();
            }
            if fresh_stack {
                guest.touch(0x7ff8, sim::Access::Write)?;
            }
            Ok(())
        });
        let steps = [delivery.during_delivery(), Step::output(1, 1, 1)];
        assert_eq!(client.run(steps), ExitStatus::Io);
        let received = client.machine.take_received();
        let vectors: Vec<u8> = received.iter().map(|event| event.vector).collect();
        assert_eq!(vectors, [0x55, 0x33]);
        assert_eq!(client.machine.counts().raise_nmi, 1);
        client.finish();
    }
}

/// The host's, like any other; and the guest's state is half loaded.
#[test]
fn a_machine_check_at_the_entry_is_the_hosts_and_ends_the_guest() {
    let client = Client::protected();
    assert_eq!(client.run([Step::output(1, 1, 1)]), ExitStatus::Io);
    client.machine.machine_check_at_entry();
    assert_eq!(client.run_fails([]), vmx::Error::Invalid);
    assert_eq!(client.tunnel().status(), Some(ExitStatus::Unknown));
    assert_eq!(client.machine.counts().raise_machine_check, 1);
    assert_eq!(client.run([]), ExitStatus::StateChange);
    assert_eq!(client.machine.counts().raise_machine_check, 1);
    client.finish();
}

#[test]
fn a_machine_check_is_the_hosts_and_ends_the_guest() {
    let client = Client::protected();
    let machine_check = vmx::arch::event::vector::MC;
    assert_eq!(
        client.run([Step::exception(machine_check, None, 0)]),
        ExitStatus::StateChange
    );
    assert_eq!(client.machine.counts().raise_machine_check, 1);
    client.finish();
}

#[test]
fn a_change_of_guest_bars_its_branch_predictions() {
    let client = Client::new(&Machine::new(Profile::skylake_x(), 1));
    let other = Vm::create_vcpu(&client.vm, 1).unwrap();
    let writes = || {
        let before = client.machine.counts().wrmsr;
        assert_eq!(client.run([Step::output(1, 1, 1)]), ExitStatus::Io);
        client.machine.counts().wrmsr - before
    };
    writes();
    let again = writes();
    other.regs().unwrap();
    // IA32_PRED_CMD, and nothing else that the run before did not write.
    assert_eq!(writes(), again + 1);
    assert_eq!(writes(), again);
    drop(other);
    client.finish();
}

#[test]
fn a_kick_ends_a_run_on_another_thread() {
    let client = Client::protected();
    let vcpu = client.vcpu.clone();
    let machine = client.machine.clone();
    let thread = std::thread::spawn(move || {
        machine.script([Step::spin_until_interrupt()]);
        vcpu.run()
    });
    while !thread.is_finished() {
        client.vcpu.kick();
        std::thread::yield_now();
    }
    assert_eq!(thread.join().unwrap(), Ok(()));
    assert_eq!(client.tunnel().status(), Some(ExitStatus::Interrupt));
    client.finish();
}

/// QEMU tells the thread of the other vCPU by a signal that is blocked there:
/// without help it hears of the interrupt at the host's next tick.
#[test]
fn an_interprocessor_interrupt_ends_the_runs_of_the_other_vcpus() {
    let client = Client::protected();
    let machine = &client.machine;
    // One processor each, and no VMCS to be fetched from the other's.
    machine.set_affinity(Some(0));
    let second = Vm::create_vcpu(&client.vm, 1).unwrap();
    second.set_regs(&client.regs()).unwrap();
    let entries = machine.counts().vmlaunch;
    let spinning = machine.clone();
    let thread = std::thread::spawn(move || {
        spinning.set_affinity(Some(1));
        spinning.script([Step::spin_until_interrupt()]);
        second.run()
    });
    while machine.counts().vmlaunch == entries {
        std::thread::yield_now();
    }
    let write_to = |place: u8| {
        // mov [fee00xx0h], eax
        client.load(CODE, &[0xa3, place << 4, place >> 4, 0xe0, 0xfe]);
        client.change_regs(|state| state.rip = CODE);
        let at = 0xfee0_0000 | u64::from(place) << 4;
        assert_eq!(client.run([Step::write(at, 4, 0, 5)]), ExitStatus::FastMmio);
        client.set_tunnel(offset::USER_EVENT_PENDING, 1);
        assert_eq!(client.run([]), ExitStatus::Interrupt);
    };
    for _ in 0..100 {
        write_to(0x31); // its upper half sends nothing
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(!thread.is_finished());
    let mut rounds = 0;
    while !thread.is_finished() {
        rounds += 1;
        assert!(rounds < 1000, "the other RUN goes on");
        write_to(0x30);
        std::thread::yield_now();
    }
    assert_eq!(thread.join().unwrap(), Ok(()));
    client.finish();
}
