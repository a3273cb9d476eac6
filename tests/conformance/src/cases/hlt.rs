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
