//! CR8, with and without a TPR shadow: its value, what it holds back, and which exits come of it.

use abi::debug::{DebugControl, VcpuDebug};
use abi::msr::MsrData;
use abi::tunnel::{ExitStatus, offset};
use sim::client::{CODE, Client};
use sim::{Machine, Profile, Step};
use vmx::Vm;

/// MOV to CR8 from RAX.
fn raise(class: u64) -> Step {
    Step::mov_to_cr(8, 0, class)
}

/// An instruction that leaves RUN.
fn out() -> Step {
    Step::output(0x80, 1, 0)
}

/// A guest in 64-bit code that takes interrupts.
fn client(profile: Profile) -> Client {
    let client = Client::new(&Machine::new(profile, 2));
    client.long_mode();
    client.change_regs(|state| state.rflags |= 0x200);
    client
}

/// A Haswell with the shadow, and one without.
fn both() -> [Profile; 2] {
    [Profile::haswell(), Profile::no_tpr_shadow()]
}

fn has_shadow(client: &Client) -> bool {
    client.machine.profile().allows_primary(21)
}

/// The vectors that the guest received since the last look.
fn received(client: &Client) -> Vec<u8> {
    let events = client.machine.take_received();
    events.iter().map(|event| event.vector).collect()
}

/// Exits with this reason so far.
fn exits(client: &Client, reason: u16) -> u64 {
    let counts = client.machine.counts();
    counts.exits.get(&reason).copied().unwrap_or(0)
}

#[test]
fn every_value_is_kept_and_no_exit_comes_of_it_with_a_shadow() {
    for profile in Profile::working() {
        let client = client(profile);
        let all = (0..16).flat_map(|class| {
            let read = Step::mov_from_cr(8, 3);
            [raise(class), read, Step::expect_gpr(3, class)]
        });
        assert_eq!(client.run(all.chain([out()])), ExitStatus::Io);
        let expected = if has_shadow(&client) { 0 } else { 32 };
        assert_eq!(exits(&client, 28), expected);
        assert_eq!(exits(&client, 43), 0);
        // Not even the other registers change it.
        client.change_regs(|state| state.rbx = 0);
        let status = client.run([
            Step::mov_from_cr(8, 3),
            Step::expect_gpr(3, 15),
            raise(16),
            out(),
        ]);
        assert_eq!(status, ExitStatus::Io);
        assert_eq!(received(&client), [13], "a reserved bit is #GP");
        client.finish();
    }
}

#[test]
fn a_vector_comes_as_soon_as_the_class_allows() {
    for profile in both() {
        let client = client(profile);
        assert_eq!(client.run([raise(9), out()]), ExitStatus::Io);
        for vector in [0x51, 0x92, 0x5f, 0x71] {
            client.vcpu.interrupt(vector);
        }
        let lowered = |class| {
            assert_eq!(client.run([raise(class), out()]), ExitStatus::Io);
            received(&client)
        };
        assert_eq!(lowered(10), []);
        assert_eq!(lowered(9), []);
        assert_eq!(lowered(8), [0x92]);
        assert_eq!(lowered(7), []);
        assert_eq!(lowered(15), []);
        assert_eq!(lowered(5), [0x71]);
        assert_eq!(lowered(0), [0x5f, 0x51]);
        assert_eq!(lowered(15), []);
        assert_eq!(lowered(0), []);
        let expected = if has_shadow(&client) { 3 } else { 0 };
        assert_eq!(exits(&client, 43), expected, "one for each class");
        client.finish();
    }
}

/// The threshold is of the vector that waits now: a higher one gets past a lower.
#[test]
fn a_higher_vector_overtakes_one_that_is_held_back() {
    for profile in both() {
        let client = client(profile);
        client.vcpu.interrupt(0x41);
        assert_eq!(client.run([raise(0xb), out()]), ExitStatus::Io);
        // It came before the guest raised its priority.
        assert_eq!(received(&client), [0x41]);
        client.vcpu.interrupt(0x41);
        assert_eq!(client.run([out()]), ExitStatus::Io);
        assert_eq!(client.tunnel().ready_for_interrupt_injection, 1);
        client.vcpu.interrupt(0xc1);
        assert_eq!(client.run([out()]), ExitStatus::Io);
        assert_eq!(received(&client), [0xc1]);
        client.vcpu.interrupt(0x91);
        let steps = [raise(8), raise(4), raise(3), out()];
        assert_eq!(client.run(steps), ExitStatus::Io);
        assert_eq!(received(&client), [0x91, 0x41]);
        client.finish();
    }
}

/// A vector that only IF held back, until the guest raised its priority with no exit.
#[test]
fn the_window_opens_above_the_vector() {
    for profile in both() {
        let client = client(profile);
        client.change_regs(|state| state.rflags &= !0x200);
        client.vcpu.interrupt(0x61);
        let steps = [raise(6), Step::set_if(true), out(), out()];
        assert_eq!(client.run(steps), ExitStatus::Io);
        assert_eq!(client.run([]), ExitStatus::Io);
        assert_eq!(received(&client), []);
        assert_eq!(client.tunnel().ready_for_interrupt_injection, 1);
        assert_eq!(client.run([raise(5), out()]), ExitStatus::Io);
        assert_eq!(received(&client), [0x61]);
        // The client's own window: it opens, whatever CR8 holds back.
        client.vcpu.interrupt(0x31);
        assert_eq!(client.run([raise(3), out()]), ExitStatus::Io);
        let _ = received(&client);
        client.vcpu.interrupt(0x31);
        client.set_tunnel(offset::REQUEST_INTERRUPT_WINDOW, 1);
        assert_eq!(client.run([]), ExitStatus::Interrupt);
        client.set_tunnel(offset::REQUEST_INTERRUPT_WINDOW, 0);
        assert_eq!(client.run([raise(2), out()]), ExitStatus::Io);
        assert_eq!(received(&client), [0x31]);
        client.finish();
    }
}

/// Lowered with interrupts off: the vector comes when they are on.
#[test]
fn lowering_with_if_clear_asks_for_the_window() {
    for profile in both() {
        let client = client(profile);
        let steps = [Step::set_if(false), raise(7), out()];
        assert_eq!(client.run(steps), ExitStatus::Io);
        client.vcpu.interrupt(0x71);
        assert_eq!(client.run([raise(0), raise(2), out()]), ExitStatus::Io);
        assert_eq!(received(&client), []);
        let steps = [Step::set_if(true), out(), out()];
        assert_eq!(client.run(steps), ExitStatus::Io);
        assert_eq!(client.run([]), ExitStatus::Io);
        assert_eq!(received(&client), [0x71]);
        client.finish();
    }
}

#[test]
fn halted_with_a_vector_behind_cr8() {
    for profile in both() {
        let client = client(profile);
        assert_eq!(client.run([raise(4), out()]), ExitStatus::Io);
        client.vcpu.interrupt(0x41);
        assert_eq!(client.run([Step::hlt()]), ExitStatus::Hlt);
        assert_eq!(client.tunnel().ready_for_interrupt_injection, 1);
        client.vcpu.interrupt(0x51);
        assert_eq!(client.run([Step::hlt()]), ExitStatus::Hlt);
        assert_eq!(received(&client), [0x51]);
        // Lowered, so HLT is woken at once.
        assert_eq!(client.run([raise(3), Step::hlt(), out()]), ExitStatus::Hlt);
        assert_eq!(received(&client), [0x41]);
        client.finish();
    }
}

/// As a client resets a machine, and a processor by INIT: CR8 is 0 and nothing waits.
#[test]
fn a_reset_lowers_it() {
    for profile in both() {
        let client = client(profile);
        let power_up = Client::new(&client.machine);
        let registers = power_up.regs();
        assert_eq!(client.run([raise(15), out()]), ExitStatus::Io);
        client.vcpu.interrupt(0xf1);
        assert_eq!(client.run([out()]), ExitStatus::Io);
        client.vcpu.set_regs(&registers).unwrap();
        client.set_msr(0xc000_0080, 0);
        client.long_mode();
        client.change_regs(|state| state.rflags |= 0x200);
        let steps = [
            Step::mov_from_cr(8, 3),
            Step::expect_gpr(3, 0),
            raise(1),
            raise(0),
            out(),
        ];
        assert_eq!(client.run(steps), ExitStatus::Io);
        assert_eq!(received(&client), []);
        client.vcpu.interrupt(0x21);
        assert_eq!(client.run([out()]), ExitStatus::Io);
        assert_eq!(received(&client), [0x21]);
        drop(power_up);
        client.finish();
    }
}

/// Registers that stay in protected mode are no reset.
#[test]
fn other_registers_leave_it() {
    for profile in both() {
        let client = client(profile);
        assert_eq!(client.run([raise(5), out()]), ExitStatus::Io);
        client.vcpu.interrupt(0x51);
        client.change_regs(|state| state.rip = CODE + 0x100);
        let steps = [Step::mov_from_cr(8, 3), Step::expect_gpr(3, 5), out()];
        assert_eq!(client.run(steps), ExitStatus::Io);
        assert_eq!(received(&client), []);
        assert_eq!(client.run([raise(4), out()]), ExitStatus::Io);
        assert_eq!(received(&client), [0x51]);
        client.finish();
    }
}

/// The exit that tells of the TPR takes the place of the one that tells of the step.
#[test]
fn a_debugger_steps_over_it() {
    for profile in both() {
        let client = client(profile);
        assert_eq!(client.run([raise(6), out()]), ExitStatus::Io);
        client.vcpu.interrupt(0x61);
        assert_eq!(client.run([out()]), ExitStatus::Io);
        let rip = client.regs().rip;
        let debug = VcpuDebug {
            control: (DebugControl::ENABLE | DebugControl::STEP).bits(),
            ..VcpuDebug::default()
        };
        client.vcpu.set_debug(&debug).unwrap();
        assert_eq!(client.run([raise(2), raise(3)]), ExitStatus::Debug);
        assert_eq!(client.tunnel().debug().rip, rip + 3);
        assert_eq!(received(&client), []);
        assert_eq!(client.run([]), ExitStatus::Debug);
        assert_eq!(received(&client), [0x61]);
        client.finish();
    }
}

/// A processor that has the shadow and insists that MOV CR8 exits all the same.
#[test]
fn exits_and_a_shadow() {
    let mut profile = Profile::haswell();
    for register in [0x482, 0x48e] {
        *profile.msrs.get_mut(&register).unwrap() |= 3 << 19;
    }
    let client = client(profile);
    assert_eq!(client.run([raise(8), out()]), ExitStatus::Io);
    client.vcpu.interrupt(0x81);
    client.vcpu.interrupt(0x33);
    let steps = [Step::mov_from_cr(8, 3), Step::expect_gpr(3, 8), out()];
    assert_eq!(client.run(steps), ExitStatus::Io);
    assert_eq!(received(&client), []);
    assert_eq!(client.run([raise(3), raise(0), out()]), ExitStatus::Io);
    assert_eq!(received(&client), [0x81, 0x33]);
    assert_eq!(exits(&client, 28), 4);
    client.finish();
}

/// Each vCPU has its own, wherever it runs.
#[test]
fn two_vcpus_have_two() {
    for profile in both() {
        let client = client(profile);
        let other = Vm::create_vcpu(&client.vm, 1).unwrap();
        let mut efer = MsrData {
            nr_msr: 1,
            ..MsrData::default()
        };
        (efer.entries[0].entry, efer.entries[0].value) = (0xc000_0080, 0x900);
        other.set_msrs(&mut efer).unwrap();
        let mut registers = client.regs();
        registers.rip = CODE + 0x800;
        other.set_regs(&registers).unwrap();
        let run_other = |steps: Vec<Step>| {
            client.machine.script(steps);
            other.run().unwrap();
        };
        assert_eq!(client.run([raise(0xc), out()]), ExitStatus::Io);
        run_other(vec![raise(2), out()]);
        client.vcpu.interrupt(0xc1);
        other.interrupt(0x31);
        run_other(vec![Step::mov_from_cr(8, 3), Step::expect_gpr(3, 2), out()]);
        assert_eq!(received(&client), [0x31]);
        let steps = [Step::mov_from_cr(8, 3), Step::expect_gpr(3, 12), out()];
        assert_eq!(client.run(steps), ExitStatus::Io);
        assert_eq!(received(&client), []);
        assert_eq!(client.run([raise(0xb), out()]), ExitStatus::Io);
        assert_eq!(received(&client), [0xc1]);
        drop(other);
        client.finish();
    }
}
