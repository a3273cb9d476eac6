//! The shadow of STI or MOV SS ends with the instruction behind it, also if that one is executed in
//! software. The VMCS may keep it as long as nothing can tell: not when an event is injected, an
//! interrupt window asked for, a debug exception possible, or a register read.

use abi::debug::{DebugControl, VcpuDebug};
use abi::tunnel::{ExitStatus, offset};
use sim::Step;
use sim::client::{CODE, Client};

/// Guest interruptibility state, and its two lowest bits.
const FIELD: u32 = 0x4824;
const STI: u64 = 1;
const MOV_SS: u64 = 2;
const RFLAGS: u32 = 0x6820;
const PENDING_DEBUG: u32 = 0x6822;
/// DR6.BS: a single step.
const BS: u64 = 1 << 14;
/// Basic exit reason.
const INTERRUPT_WINDOW: u16 = 7;
const DEVICE: u64 = 0xd000_0000;

/// A guest with these flags.
fn guest(rflags: u64) -> Client {
    let client = Client::protected();
    client.change_regs(|state| state.rflags = rflags);
    // The first RUN has much to do before its entry, whatever comes later.
    assert_eq!(client.run([Step::output(0x80, 1, 0)]), ExitStatus::Io);
    client
}

fn block(blocking: u64) -> Step {
    Step::act(move |guest| guest.set_field(FIELD, blocking))
}

fn vectors(client: &Client) -> Vec<u8> {
    let received = client.machine.take_received();
    received.iter().map(|event| event.vector).collect()
}

/// OUT in the shadow, after which the client hears that it may queue a vector.
fn out_in_shadow(client: &Client, blocking: u64) {
    let status = client.run([block(blocking), Step::output(0x80, 1, 0)]);
    assert_eq!(status, ExitStatus::Io);
    assert_eq!(client.tunnel().ready_for_interrupt_injection, 1);
}

#[test]
fn an_interrupt_comes_right_behind() {
    for blocking in [STI, MOV_SS] {
        let client = guest(0x202);
        out_in_shadow(&client, blocking);
        client.vcpu.interrupt(0x40);
        assert_eq!(client.run([]), ExitStatus::Interrupt);
        assert_eq!(vectors(&client), [0x40]);
        client.finish();
    }
}

#[test]
fn a_window_opens_right_behind() {
    for blocking in [STI, MOV_SS] {
        let client = guest(0x202);
        out_in_shadow(&client, blocking);
        client.set_tunnel(offset::REQUEST_INTERRUPT_WINDOW, 1);
        assert_eq!(client.run([Step::cpuid(0, 0)]), ExitStatus::Interrupt);
        assert_eq!(client.machine.script_left(), 1, "nothing was executed");
    }
}

#[test]
fn registers_do_not_show_it() {
    for blocking in [STI, MOV_SS] {
        let client = guest(0x202);
        out_in_shadow(&client, blocking);
        assert_eq!(client.regs().interruptibility_state.raw, 0);
        client.finish();
    }
}

#[test]
fn a_step_is_not_held_back() {
    let client = guest(0x302);
    let status = client.run([block(MOV_SS), Step::output(0x80, 1, 0)]);
    assert_eq!(status, ExitStatus::Io);
    let step = Step::act(|guest| {
        assert_eq!(guest.field(FIELD), 0);
        assert_eq!(guest.field(PENDING_DEBUG), 1 << 14, "BS");
    });
    client.run([step, Step::hlt()]);
}

#[test]
fn a_breakpoint_is_not_held_back() {
    let client = guest(0x202);
    client.run([Step::mov_to_dr(7, 0, 0x401), Step::output(0x80, 1, 0)]);
    out_in_shadow(&client, MOV_SS);
    let over = Step::act(|guest| assert_eq!(guest.field(FIELD), 0));
    client.run([over, Step::hlt()]);
    client.finish();
}

/// Handled in the kernel, so that the entry follows at once.
#[test]
fn nothing_is_lost_on_the_quick_way() {
    for blocking in [STI, MOV_SS] {
        let client = guest(0x202);
        let vcpu = client.vcpu.clone();
        let queue = Step::cpuid(0, 0).with(move || vcpu.interrupt(0x41));
        let status = client.run([block(blocking), queue, Step::output(0x80, 1, 0)]);
        // The interrupt that tells of it.
        assert_eq!(status, ExitStatus::Interrupt);
        assert_eq!(vectors(&client), [0x41]);
        assert_eq!(client.run([]), ExitStatus::Io);
        client.finish();
    }
}

/// An access to a device is finished at the next RUN, and the shadow with it: the client may queue a
/// vector now.
#[test]
fn a_device_access_ends_it() {
    for blocking in [STI, MOV_SS] {
        let client = guest(0x202);
        // The second time the page is known.
        for code in [CODE + 0x100, CODE + 0x200] {
            // mov eax, [d0000000h]
            client.load(code, &[0xa1, 0, 0, 0, 0xd0]);
            client.change_regs(|state| state.rip = code);
            let status = client.run([block(blocking), Step::read(DEVICE, 4, 0, 5)]);
            assert_eq!(status, ExitStatus::FastMmio);
            assert_eq!(client.tunnel().ready_for_interrupt_injection, 1);
            client.vcpu.interrupt(0x42);
            assert_eq!(client.run([]), ExitStatus::Interrupt);
            assert_eq!(vectors(&client), [0x42]);
        }
    }
}

/// A single step of the guest's own over STI: the trap comes in the shadow, which no entry takes
/// together with TF and no step pending. It goes in, or the client hears of it and goes on.
#[test]
fn a_step_over_sti() {
    for to_client in [false, true] {
        let client = guest(0x102);
        if to_client {
            let control = DebugControl::ENABLE | DebugControl::USE_HW_BP;
            let debug = VcpuDebug {
                control: control.bits(),
                ..VcpuDebug::default()
            };
            client.vcpu.set_debug(&debug).expect("VCPU_DEBUG");
        }
        let sti = Step::act(|guest| {
            guest.set_field(RFLAGS, guest.field(RFLAGS) | 0x200);
            guest.set_field(PENDING_DEBUG, 0);
        });
        let status = client.run([sti, block(STI), Step::exception(1, None, BS), Step::hlt()]);
        if to_client {
            assert_eq!(status, ExitStatus::Debug);
            // The simulated instruction traps once more.
            assert_eq!(client.run([]), ExitStatus::Debug);
        } else {
            assert_eq!(status, ExitStatus::Hlt);
            assert_eq!(vectors(&client), [1]);
        }
    }
}

/// A client that changes IF or TF in a shadow, and not RIP, leaves no shadow that the processor
/// would refuse.
#[test]
fn a_client_changes_the_flags_in_it() {
    for (blocking, before, after) in [(STI, 0x202, 2), (MOV_SS, 2, 0x102), (STI, 0x202, 0x302)] {
        let client = guest(before);
        assert_eq!(
            client.run([block(blocking), Step::host_interrupt()]),
            ExitStatus::Interrupt
        );
        client.change_regs(|_| {});
        assert_eq!(client.regs().interruptibility_state.raw, blocking as u32);
        client.change_regs(|state| state.rflags = after);
        assert_eq!(client.regs().interruptibility_state.raw, 0);
        assert_eq!(client.run([Step::hlt()]), ExitStatus::Hlt);
        client.finish();
    }
}

/// The instruction is executed again, so the shadow has not ended.
#[test]
fn a_page_that_was_missing_does_not_end_it() {
    for blocking in [STI, MOV_SS] {
        let client = guest(0x202);
        let vcpu = client.vcpu.clone();
        let queue = Step::write(0x9000, 4, 7, 5).with(move || vcpu.interrupt(0x43));
        let received = client.machine.clone();
        let status = client.run([
            block(blocking),
            queue,
            Step::act(move |_| assert_eq!(received.take_received()[0].vector, 0x43)),
            Step::output(0x80, 1, 0),
        ]);
        assert_eq!(status, ExitStatus::Io);
        assert_eq!(client.bytes(0x9000), 7u32.to_le_bytes());
        let windows = client.machine.counts().exits_of(INTERRUPT_WINDOW);
        assert_eq!(windows, 1, "the vector waited for the write");
        client.finish();
    }
}
