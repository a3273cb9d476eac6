//! Registers at their edges: bits that are always one, operands that are cut, what SET_REGS makes fit.

use abi::tunnel::ExitStatus;
use sim::Step;
use sim::client::Client;
use vmx::arch::reg::gpr::{RAX, RBX};

/// SET_REGS with zeroes in bits that are always one.
#[test]
fn debug_registers_keep_their_fixed_bits() {
    let client = Client::protected();
    client.change_regs(|state| (state.dr6, state.dr7) = (1 << 16, 0));
    let state = client.regs();
    assert_eq!((state.dr6, state.dr7), (0xffff_0ff0, 0x400));
    client.change_regs(|state| (state.dr6, state.dr7) = (!0, 0xffff_ffff));
    assert_eq!(client.regs().dr7, 0xffff_2fff);
    client.change_regs(|state| state.dr7 = 0x400);
    client.finish();
}

/// MOV DR exits whatever the privilege level is: SDM 26.1.3 "Instructions That Cause VM Exits Conditionally".
#[test]
fn debug_registers_are_not_for_user_code() {
    let client = Client::protected();
    client.change_regs(|state| {
        state.cs.selector |= 3;
        state.ss.selector |= 3;
        state.cs.ar |= 0x60;
        state.ss.ar |= 0x60;
    });
    let steps = [Step::mov_from_dr(7, RBX), Step::mov_to_dr(0, RAX, 0xabc0)];
    assert_eq!(client.run(steps), ExitStatus::Interrupt);
    let received = client.machine.take_received();
    let errors: Vec<_> = received.iter().map(|e| (e.vector, e.error_code)).collect();
    assert_eq!(errors, [(13, Some(0)), (13, Some(0))]);
    assert_eq!(client.regs().dr0, 0);
    client.finish();
}

/// Outside 64-bit code they have 32 bits, whatever the register holds.
#[test]
fn operands_of_control_and_debug_registers() {
    const HIGH: u64 = 0x1234_5678_0000_0000;
    let client = Client::protected();
    let status = client.run([
        Step::mov_to_cr(0, RBX, HIGH | 0x4000_0011),
        Step::mov_from_cr(0, RAX),
        Step::expect_gpr(RAX, 0x4000_0011),
        Step::mov_to_dr(0, RBX, HIGH | 0xabc0),
        Step::mov_from_dr(0, RAX),
        Step::expect_gpr(RAX, 0xabc0),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.machine.script_left(), 0);
    client.finish();
}

/// Outside 64-bit code it has 32 bits.
#[test]
fn the_instruction_pointer_wraps_at_four_gigabytes() {
    let client = Client::protected();
    client.change_regs(|state| state.rip = 0xffff_fffe);
    assert_eq!(client.run([Step::cpuid(0, 0)]), ExitStatus::Interrupt);
    assert_eq!(client.regs().rip, 0);
    client.finish();
}

/// VM entry wants accessed segments and no bit of CR4 that the guest has not.
#[test]
fn what_set_regs_makes_fit_for_an_entry() {
    const FOREIGN: u64 = 1 << 13 | 1 << 14 | 1 << 22 | 1 << 31;
    let client = Client::protected();
    client.change_regs(|state| {
        state.cr4 |= FOREIGN;
        state.rflags = 0;
        (state.gdt.limit, state.idt.limit) = (0x1_ffff, 0x7_ffff);
        state.cs.ar &= !1;
        state.ss.ar &= !1;
        state.ds.ar &= !1;
    });
    assert_eq!(client.run([Step::cpuid(0, 0)]), ExitStatus::Interrupt);
    let state = client.regs();
    assert_eq!(state.cr4 & FOREIGN, 0);
    assert_eq!(state.cs.ar & state.ss.ar & state.ds.ar & 1, 1);
    client.finish();
}
