//! One boot of the emulated PC with the driver and a guest: what `run`, `vectors` and the tests share.

use std::io::Write;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use testbed::client::{Boot, Verdict, verdict};
use testbed::{Flavour, Outcome, Pc, WorkFolder};

use crate::setup;

/// A guest that takes longer hangs. It takes half a minute at most on an idle machine.
const LIMIT: Duration = Duration::from_secs(1800);

/// Instructions per emulated second where Linux measures its clock: with fewer it finds that reading
/// another clock, an exit, takes too long to compare with.
const CLOCK_RATE: u32 = 400_000_000;

/// Boots one guest on this emulated PC of [`machine`].
///
/// # Errors
/// The emulated PC could not be started. What happens in it is in the outcome.
pub(crate) fn run(
    parts: &setup::Parts,
    guest: &Boot,
    pc: Pc,
    serial: &mut dyn Write,
) -> Result<Outcome> {
    let (before, after) = match guest.accelerator {
        "hax" => (DRIVER_IN, DRIVER_OUT),
        _ => ("", ""),
    };
    let script = format!(
        "{before}\ntick start\n{}\ncode=$?\ntick end\n{after}\nexit $code",
        guest.shell_script()
    );
    let mut pc = pc.memory_mb(guest.system.host_memory_mb()).script(&script);
    if guest.accelerator == "kvm" {
        pc = pc.module("kvm-intel", "");
    }
    if guest.clock_seconds.is_some() {
        pc = pc.instructions_per_second(CLOCK_RATE);
    }
    parts.client.add_to(pc.files());
    guest
        .system
        .ensure(&WorkFolder::open()?)?
        .add_to(pc.files());
    println!(
        "run: QEMU -accel {}, {} on {} with {} CPU(s)",
        guest.accelerator,
        guest.system.name(),
        guest.machine.name(),
        guest.cpus
    );
    pc.run(serial)
}

/// The start of a script that uses the driver.
pub(crate) const DRIVER_IN: &str = "insmod /haxm.ko || exit 3
echo \"haxm.ko $(cat /sys/module/haxm/version) loaded\"
/conformance probe || exit 4";

/// And its end, before the exit.
pub(crate) const DRIVER_OUT: &str = "rmmod haxm || exit 5
dmesg | grep 'haxm:'";

/// An emulated PC that has the driver's module and the client that probes it.
pub(crate) fn machine(parts: &setup::Parts, flavour: Flavour) -> Pc {
    Pc::new()
        .kernel(flavour)
        .file("/haxm.ko", &parts.module)
        .file("/conformance", &parts.conformance)
        .timeout(LIMIT)
}

/// The guest said PASS, and the script around it ended well.
///
/// # Errors
/// What did not.
pub(crate) fn judge(outcome: &Outcome) -> Result<()> {
    ensure!(
        outcome.success(),
        "{}, code {}",
        outcome.cause,
        outcome.code
    );
    match verdict(&outcome.serial) {
        Some(Verdict::Pass) => Ok(()),
        Some(fail) => bail!("the guest: {fail}"),
        None => bail!("the guest came to no verdict"),
    }
}
