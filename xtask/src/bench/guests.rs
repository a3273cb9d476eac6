//! Whole guests under QEMU, with KVM as QEMU uses it by default and then with ours, in the same boot.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::client::{Boot, Client, MEASURING, Machine, Verdict, verdict};
use testbed::{Flavour, Outcome, Pc, WorkFolder};

use super::{Parts, side_script};

/// How often a machine boots: the first boot also pays for what Linux does once.
const BOOTS: u32 = 2;

/// QEMU start to exit, by machine: rows `linux_MACHINE` of the last boot.
pub(super) fn linux(parts: &Parts, client: &Client, flavour: Flavour) -> Result<Outcome> {
    let run = |accelerator: &'static str| {
        let mut script = String::new();
        for machine in Machine::ALL {
            let name = machine.name();
            let boot = Boot {
                accelerator,
                ..Boot::new(machine)
            };
            for _ in 0..BOOTS {
                script.push_str(&format!(
                    "tick linux_{name}\n{} || code=1\ntick linux_{name}_end\n",
                    boot.shell_line()
                ));
            }
        }
        script
    };
    let passes = BOOTS as usize * Machine::ALL.len();
    let pc = parts.pc(flavour);
    start(pc, client, &run, passes)
}

/// Two processors of a guest that interrupt each other: rows `ipi` and `ipi_none`. The emulated PC has two as well,
/// so the figures are not instruction counts.
pub(super) fn interrupts(parts: &Parts, client: &Client, flavour: Flavour) -> Result<Outcome> {
    let run = |accelerator: &'static str| {
        let boot = Boot {
            accelerator,
            cpus: 2,
            initramfs: MEASURING,
            ..Boot::new(Machine::Microvm)
        };
        format!("{} || code=1\n", boot.shell_line())
    };
    let mut pc = parts.pc(flavour).cpus(2);
    Client::add_measuring_to(&WorkFolder::open()?, pc.files())?;
    start(pc, client, &run, 1)
}

/// Boots the emulated PC with the client in it; `passes` guests of each side have to end well.
fn start(
    mut pc: Pc,
    client: &Client,
    run: &dyn Fn(&'static str) -> String,
    passes: usize,
) -> Result<Outcome> {
    client.add_to(pc.files());
    let script = side_script(&run("kvm"), &run("hax"));
    let outcome = pc
        .script(&script)
        .timeout(Duration::from_secs(1800))
        .run(&mut io::sink())?;
    ensure!(outcome.success(), "the guests failed: {outcome}");
    let mut sides = outcome.serial.split("@@SIDE ").skip(1);
    for name in ["kvm", "haxm"] {
        let side = sides.next().context("a side is missing")?;
        let passed = side.lines().filter(|l| l.trim() == "GUEST: PASS").count();
        ensure!(
            side.starts_with(name) && verdict(side) == Some(Verdict::Pass) && passed == passes,
            "a guest of {name} failed: {outcome}"
        );
    }
    Ok(outcome)
}
