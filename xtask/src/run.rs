//! `cargo xtask run`: the main job. Boots the emulated PC, loads haxm.ko, and boots a guest with QEMU's
//! hax accelerator on it.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use testbed::client::{Boot, Machine, System};
use testbed::{Flavour, Outcome};

use crate::vectors::{self, Registers};
use crate::{boot, setup};

const HELP: &str = "usage: cargo xtask run [OPTIONS]
Boots the emulated PC, loads haxm.ko, probes /dev/HAX, and boots a guest under QEMU -accel hax.
The guest's console comes as it boots; the exit code is 0 only if the guest passed.
  --guest G    tiny (the default), debian-6.1, debian-6.12, debian-i386: Linux;
               gnumach: another system; memtest86+, ipxe: none
  --smp N      virtual processors of the guest, 1 to 16, tiny: to 4 (default 1)
  --machine M  pc (SeaBIOS) or microvm (qboot; the default, where the guest runs on it)
  --cpus N     processors of the emulated PC (default 1)
  --kernel K   the emulated PC's kernel, 6.1 (the default), 6.12, 7, debug or kasan
  --clock N    Linux measures its clock by itself, and it must be good for N seconds
  --kvm        under KVM instead of haxm.ko
  --vectors R  instead, AVX or AVX-512: two tiny guests and a process of the emulated PC all use them
  --verbose    a Linux guest prints all its messages";

/// What the command line asks for.
struct Options {
    boot: Boot,
    flavour: Flavour,
    cpus: u32,
    vectors: Option<Registers>,
}

fn options(args: &[String]) -> Result<Option<Options>> {
    let mut system = System::default();
    let mut machine = None;
    let mut flavour = Flavour::default();
    let mut boot = Boot::new(Machine::Microvm);
    let mut cpus = 1;
    let mut vectors = None;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            "--help" | "-h" => return Ok(None),
            "--guest" => system = System::from_name(value()?)?,
            "--smp" => boot.cpus = value()?.parse().context("--smp wants a number")?,
            "--machine" => {
                let named = Machine::from_name(value()?);
                machine = Some(named.context("--machine wants pc or microvm")?);
            }
            "--cpus" => cpus = value()?.parse().context("--cpus wants a number")?,
            "--kernel" => flavour = Flavour::from_series(value()?)?,
            "--clock" => {
                boot.clock_seconds = Some(value()?.parse().context("--clock wants seconds")?);
                boot.tsc_khz = None;
            }
            "--vectors" => {
                let name = value()?;
                let found = Registers::ALL.iter().find(|r| r.name() == name);
                vectors = Some(*found.context("--vectors wants AVX or AVX-512")?);
            }
            "--kvm" => {
                boot.accelerator = "kvm";
                // What KVM offers its guests beside a processor is not to be compared.
                boot.cpu = Some("host,kvm=off");
            }
            "--verbose" => boot.verbose = true,
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        }
    }
    let most = system.most_cpus();
    ensure!(
        (1..=most).contains(&boot.cpus),
        "--smp wants 1 to {most} for {}",
        system.name()
    );
    let usual = system.machine();
    boot.machine = machine.unwrap_or(usual);
    ensure!(
        boot.machine == usual || usual == Machine::Microvm,
        "{} runs on --machine {} only",
        system.name(),
        usual.name()
    );
    boot.system = system;
    boot.memory_mb = system.memory_mb();
    Ok(Some(Options {
        boot,
        flavour,
        cpus,
        vectors,
    }))
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
        "run: all parts ready after {:.1} s; Debian's {} kernel with {} CPU(s)",
        start.elapsed().as_secs_f64(),
        options.flavour.series(),
        options.cpus
    );
    let serial = &mut std::io::stdout();
    let pc = boot::machine(&parts, options.flavour).cpus(options.cpus);
    let (outcome, judged) = match options.vectors {
        Some(registers) => {
            let outcome = vectors::run(&parts, pc, registers, serial)?;
            let judged = vectors::judge(&outcome, registers);
            (outcome, judged)
        }
        None => {
            let outcome = boot::run(&parts, &options.boot, pc, serial)?;
            let judged = boot::judge(&outcome);
            (outcome, judged)
        }
    };
    report(&outcome);
    println!("run: {:.1} s in all", start.elapsed().as_secs_f64());
    match judged {
        Ok(()) => {
            println!("run: PASSED");
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            println!("run: FAILED: {why}\n{outcome}");
            Ok(ExitCode::FAILURE)
        }
    }
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
