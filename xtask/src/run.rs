//! `cargo xtask run`: the main job. Boots the emulated PC, loads haxm.ko, and boots a Linux guest
//! with QEMU's hax accelerator on it.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use testbed::client::{Boot, Machine, Verdict, verdict};
use testbed::{Flavour, Outcome, Pc};

use crate::setup;

const HELP: &str = "usage: cargo xtask run [--smp N] [--machine pc|microvm] [--kernel 6.1|6.12|7] [--verbose]
Boots the emulated PC, loads haxm.ko, probes /dev/HAX, and boots a Linux guest under QEMU -accel hax.
The guest's console comes as it boots; the exit code is 0 only if the guest passed.
  --smp N      virtual processors of the guest, 1 to 4 (default 1)
  --machine M  pc (SeaBIOS) or microvm (qboot, the default)
  --kernel K   the emulated PC's kernel (default 6.1)
  --verbose    the guest's kernel prints all its messages";

/// What the guest may take.
const LIMIT: Duration = Duration::from_secs(240);

/// What the command line asks for.
struct Options {
    boot: Boot,
    flavour: Flavour,
}

fn options(args: &[String]) -> Result<Option<Options>> {
    let mut boot = Boot::new(Machine::Microvm);
    let mut flavour = Flavour::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            "--help" | "-h" => return Ok(None),
            "--smp" => boot.cpus = value()?.parse().context("--smp wants a number")?,
            "--machine" => {
                boot.machine =
                    Machine::from_name(value()?).context("--machine wants pc or microvm")?;
            }
            "--kernel" => flavour = Flavour::from_series(value()?)?,
            "--verbose" => boot.verbose = true,
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        }
    }
    if !(1..=4).contains(&boot.cpus) {
        bail!("--smp wants 1 to 4");
    }
    Ok(Some(Options { boot, flavour }))
}

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let Some(options) = options(args)? else {
        println!("{HELP}");
        return Ok(ExitCode::SUCCESS);
    };
    let start = Instant::now();
    let parts = setup::everything(options.flavour)?;
    println!(
        "run: all parts ready after {:.1} s",
        start.elapsed().as_secs_f64()
    );
    let outcome = boot(
        &parts,
        &options.boot,
        options.flavour,
        &mut std::io::stdout(),
    )?;
    report(&outcome);
    println!("run: {:.1} s in all", start.elapsed().as_secs_f64());
    if passed(&outcome) {
        println!("run: PASSED");
        return Ok(ExitCode::SUCCESS);
    }
    println!("run: FAILED\n{outcome}");
    Ok(ExitCode::FAILURE)
}

/// Boots one guest on the emulated PC.
///
/// # Errors
/// The emulated PC could not be started. What happens in it is in the outcome.
pub(crate) fn boot(
    parts: &setup::Parts,
    boot: &Boot,
    flavour: Flavour,
    serial: &mut dyn Write,
) -> Result<Outcome> {
    let script = format!(
        "insmod /haxm.ko || exit 3\n\
         echo \"haxm.ko $(cat /sys/module/haxm/version) loaded\"\n\
         /conformance probe || exit 4\n\
         tick start\n\
         {}\n\
         code=$?\n\
         tick end\n\
         rmmod haxm || exit 5\n\
         dmesg | grep 'haxm:'\n\
         exit $code",
        boot.shell_line()
    );
    let mut pc = Pc::new()
        .kernel(flavour)
        .memory_mb(512)
        .file("/haxm.ko", &parts.module)
        .file("/conformance", &parts.conformance)
        .script(&script)
        .timeout(LIMIT);
    parts.client.add_to(pc.files());
    println!(
        "run: QEMU -accel hax, {} with {} CPU(s), on Debian's {} kernel",
        boot.machine.name(),
        boot.cpus,
        flavour.series()
    );
    pc.run(serial)
}

/// The guest said PASS, and the script around it ended well.
pub(crate) fn passed(outcome: &Outcome) -> bool {
    outcome.success() && verdict(&outcome.serial) == Some(Verdict::Pass)
}

/// Prints what a run used.
fn report(outcome: &Outcome) {
    let tick = |label: &str| {
        let mark = format!("@@TICK {label} ");
        let line = outcome
            .serial
            .lines()
            .find_map(|l| l.trim().strip_prefix(&mark).map(str::to_owned));
        line.and_then(|n| n.trim().parse::<u64>().ok())
    };
    if let (Some(start), Some(end)) = (tick("start"), tick("end")) {
        println!(
            "run: QEMU start to exit {} M ticks",
            (end - start) / 1_000_000
        );
    }
    println!(
        "run: {} M ticks in all, {:.1} s of wall time",
        outcome.ticks / 1_000_000,
        outcome.wall.as_secs_f64()
    );
}
