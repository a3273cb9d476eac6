//! HLT: where RIP is, that it can be run again, and that INTERRUPT wakes it.

use super::{Case, Outcome};
use crate::exit::{halt, vector};
use crate::guest;
use crate::machine::Machine;
use crate::modes::Mode;

pub const CASES: &[Case] = &[
    case!(rip_is_behind in ALL),
    case!(runs_on in SIZES),
    case!(interrupt_wakes in ALL),
    case!(ready_at_halt in SIZES),
    case!(a_masked_vector_does_not_wake in SIZES),
    case!(a_queued_vector_wakes_at_once in SIZES),
];

fn rip_is_behind(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("nop", "hlt"))?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rip, mode.entry() + 2, "RIP");
    same!(machine.vcpu.tunnel.exit_reason(), 12, "exit reason");
    Ok(())
}

/// RUN after HLT goes on behind it: it is the client that waits.
fn runs_on(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("hlt", "hlt", "mov al, 9", "hlt"))?;
    machine.expect(&[halt(), halt(), halt()])?;
    same!(machine.regs()?.rax, 9, "RAX");
    Ok(())
}

fn interrupt_wakes(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("sti", "hlt", "mov bl, 3", "hlt"))?;
    machine.expect(&[halt()])?;
    machine.vcpu.interrupt(0x51)?;
    machine.expect(&[vector(0x51), halt()])?;
    let state = machine.regs()?;
    same!(state.rbx, 3, "RBX");
    same!(state.rsp, crate::modes::STACK, "RSP");
    Ok(())
}

fn ready_at_halt(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("hlt"))?;
    machine.expect(&[halt()])?;
    same!(machine.vcpu.tunnel.ready(), 1, "ready, with IF clear");
    Ok(())
}

/// IF is clear: a vector waits, and HLT waits too.
fn a_masked_vector_does_not_wake(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("hlt", "sti", "nop", "hlt"))?;
    machine.vcpu.interrupt(0x52)?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rip, mode.entry() + 1, "RIP");
    machine.expect(&[vector(0x52), halt()])
}

/// The vector came before HLT: nothing is left for the client to wait for.
fn a_queued_vector_wakes_at_once(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("sti", "hlt", "mov bl, 1", "hlt"))?;
    machine.vcpu.interrupt(0x53)?;
    machine.expect(&[vector(0x53), halt()])?;
    same!(machine.regs()?.rbx, 1, "BL");
    Ok(())
}
