//! `cargo xtask test`: everything that must hold, on this machine and on the emulated PC.
//!
//! Stages, each counted: the lints; the host tests, also with the code broken; the driver's own tests on the emulated
//! PC, with one processor and with two; machines that may not run guests; and whole guests under QEMU.

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use testbed::folder::workspace_root;
use testbed::{Flavour, Outcome, Pc, cpu, firmware};

use crate::{bench, conformance, guests, lint, mutants, package, setup};

const HELP: &str = "usage: cargo xtask test [--host]
Runs the lints, the host tests, and the driver's tests on the emulated PC.
  --host   only what needs no emulated PC";

/// A stage: what it says while it runs, and what it does.
type Stage<'a> = (String, Box<dyn Fn() -> Result<()> + 'a>);

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let host_only = match args {
        [] => false,
        [word] if word == "--host" => true,
        _ => bail!("cannot make sense of '{}'\n{HELP}", args.join(" ")),
    };
    let start = Instant::now();
    let parts;
    let newer;
    let mut stages: Vec<Stage<'_>> = Vec::new();
    let lint_args = if host_only {
        vec!["--no-module".to_owned()]
    } else {
        Vec::new()
    };
    stages.push(("lint".into(), Box::new(move || lint_stage(&lint_args))));
    stages.push(("host tests".into(), Box::new(host_tests)));
    stages.push((
        "host tests, guest RAM pinned".into(),
        Box::new(pinned_host_tests),
    ));
    stages.push((
        "host tests, the code broken on purpose".into(),
        Box::new(|| broken("--host")),
    ));
    if !host_only {
        parts = setup::everything(Flavour::Cloud6_1)?;
        newer = setup::everything(Flavour::Cloud6_12)?;
        emulated(&parts, &newer, &mut stages);
    }
    finish(&stages, start)
}

/// Runs the stages to the end, whatever fails, and prints the closing line.
fn finish(stages: &[Stage<'_>], start: Instant) -> Result<ExitCode> {
    let mut failed = Vec::new();
    for (number, (name, stage)) in (1..).zip(stages) {
        let begun = Instant::now();
        println!("test: {number}/{} {name} ...", stages.len());
        match stage() {
            Ok(()) => println!("test: {name} ok, {:.1} s", begun.elapsed().as_secs_f64()),
            Err(error) => {
                println!(
                    "test: {name} FAILED, {:.1} s: {error:#}",
                    begun.elapsed().as_secs_f64()
                );
                failed.push(name.as_str());
            }
        }
    }
    for name in &failed {
        println!("test: FAILED: {name}");
    }
    println!("test: {:.0} s in all", start.elapsed().as_secs_f64());
    println!(
        "{} passed, {} failed",
        stages.len() - failed.len(),
        failed.len()
    );
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn lint_stage(args: &[String]) -> Result<()> {
    let code = lint::run(args)?;
    ensure!(code == ExitCode::SUCCESS, "see the findings above");
    Ok(())
}

/// `cargo test` of everything that runs on a host.
fn host_tests() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(workspace_root())
        .args(["test", "--locked"])
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "see the failures above");
    Ok(())
}

/// The simulator's tests once more, on a host that pins guest RAM.
fn pinned_host_tests() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(workspace_root())
        .args(["test", "--locked", "--package", "haxm-sim"])
        .args(["--package", "haxm-driver"])
        .env("SIM_PIN", "1")
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "see the failures above");
    Ok(())
}

/// What is listed in `tests/mutants`: all of it takes a third of an hour, and is for `cargo xtask mutants`.
fn broken(word: &str) -> Result<()> {
    let code = mutants::run(&[word.to_owned()])?;
    ensure!(code == ExitCode::SUCCESS, "a break has survived");
    Ok(())
}

/// The stages on the emulated PC.
fn emulated<'a>(parts: &'a setup::Parts, newer: &'a setup::Parts, stages: &mut Vec<Stage<'a>>) {
    for cpus in [1, 2] {
        stages.push((
            format!("conformance, {cpus} CPU(s), kernel 6.1"),
            Box::new(move || conform(parts, cpus, Flavour::Cloud6_1)),
        ));
    }
    stages.push((
        "conformance, 2 CPU(s), kernel 6.1, guest RAM pinned".into(),
        Box::new(move || {
            let script = conformance::pinned_script("", false);
            let outcome = conformance::pc(&parts.module, &parts.conformance, &script)
                .cpus(2)
                .run(&mut std::io::stdout())?;
            verdict(&outcome, outcome.success())
        }),
    ));
    stages.push((
        "conformance, 1 CPU, kernel 6.12".into(),
        Box::new(move || conform(newer, 1, Flavour::Cloud6_12)),
    ));
    // The kernel of another release of Debian: fetched by the stage that wants it.
    stages.push((
        "conformance, 2 CPU(s), kernel 7".into(),
        Box::new(|| {
            let parts = setup::everything(Flavour::Cloud7)?;
            conform(&parts, 2, Flavour::Cloud7)
        }),
    ));
    stages.push((
        "conformance beside a guest of KVM's, kernel 7".into(),
        Box::new(|| beside_a_guest(&setup::everything(Flavour::Cloud7)?)),
    ));
    for (flavour, cpus) in BESIDE_KVM {
        stages.push((
            format!(
                "KVM before and after, {cpus} CPU(s), kernel {}",
                flavour.series()
            ),
            Box::new(move || beside_kvm(&setup::everything(*flavour)?, *flavour, *cpus)),
        ));
    }
    stages.push((
        "performance counters".into(),
        Box::new(move || {
            let script = conformance::script("pmu/", false);
            let outcome = conformance::counters_pc(&parts.module, &parts.conformance, &script)
                .run(&mut std::io::stdout())?;
            verdict(&outcome, outcome.success())
        }),
    ));
    stages.push((
        "the module with all breaks builds".into(),
        Box::new(|| broken("--build")),
    ));
    stages.push(("a page of 1 GB".into(), Box::new(move || huge_page(parts))));
    stages.push((
        "the package".into(),
        Box::new(move || package::check(parts)),
    ));
    stages.push(("all mitigations".into(), Box::new(move || mitigated(parts))));
    for refusal in REFUSALS {
        stages.push((
            refusal.name.into(),
            Box::new(move || refuse(parts, refusal)),
        ));
    }
    stages.push((
        "speed, beside kernel 6.1's KVM".into(),
        Box::new(|| bench::ceilings::check(Flavour::Cloud6_1)),
    ));
    for stage in guests::stages() {
        let parts = match stage.flavour() {
            Flavour::Cloud6_12 => newer,
            _ => parts,
        };
        stages.push((stage.name(), Box::new(move || stage.run(parts))));
    }
}

fn conform(parts: &setup::Parts, cpus: u32, flavour: Flavour) -> Result<()> {
    let script = conformance::script("", false);
    let outcome = conformance::pc(&parts.module, &parts.conformance, &script)
        .cpus(cpus)
        .kernel(flavour)
        .run(&mut std::io::stdout())?;
    verdict(&outcome, outcome.success())
}

/// All cases beside a guest of KVM's. KVM of this kernel is in VMX operation from the moment it is loaded, and the
/// module may not stay in VMX operation of its own.
fn beside_a_guest(parts: &setup::Parts) -> Result<()> {
    let script = conformance::neighbour_script("", false);
    let outcome = conformance::kvm_pc(&parts.module, &parts.conformance, &script)
        .kernel(Flavour::Cloud7)
        .run(&mut std::io::stdout())?;
    verdict(&outcome, outcome.success())
}

/// With what this processor does not ask for: VERW before each entry, returns filled after each
/// exit. The other way into the guest and out of it must leave the registers alone.
fn mitigated(parts: &setup::Parts) -> Result<()> {
    let script = conformance::script("pio/ mmio/ registers/ control/", false).replacen(
        "insmod /haxm.ko",
        "insmod /haxm.ko mitigations=full",
        1,
    );
    let outcome =
        conformance::pc(&parts.module, &parts.conformance, &script).run(&mut std::io::stdout())?;
    verdict(&outcome, outcome.success())
}

/// Kernels whose KVM differs, and processors of the emulated PC.
const BESIDE_KVM: &[(Flavour, u32)] = &[
    // It enters VMX operation with its first VM.
    (Flavour::Cloud6_1, 2),
    (Flavour::Cloud6_12, 1),
    (Flavour::Cloud7, 2),
];

/// The cases about KVM, with it loaded before the module and after it.
fn beside_kvm(parts: &setup::Parts, flavour: Flavour, cpus: u32) -> Result<()> {
    let script = conformance::kvm_script("beside_kvm/", false);
    let outcome = conformance::kvm_pc(&parts.module, &parts.conformance, &script)
        .cpus(cpus)
        .kernel(flavour)
        .run(&mut std::io::stdout())?;
    verdict(&outcome, outcome.success())
}

fn huge_page(parts: &setup::Parts) -> Result<()> {
    let script = conformance::script("huge_leaf", false);
    let outcome = conformance::huge_page_pc(&parts.module, &parts.conformance, &script)
        .run(&mut std::io::stdout())?;
    verdict(&outcome, outcome.success())
}

fn verdict(outcome: &Outcome, passed: bool) -> Result<()> {
    println!("test: {outcome}");
    ensure!(passed, "it did not pass");
    Ok(())
}

/// A machine that may not, or cannot fully, run guests.
struct Refusal {
    name: &'static str,
    model: &'static str,
    locked: bool,
    /// What the script checks: shell commands that exit with a code of their own where it is wrong.
    script: &'static str,
}

/// `docs/api.md`, CAPABILITY, says what each of them is told.
const REFUSALS: &[Refusal] = &[
    Refusal {
        name: "a processor without VMX",
        model: cpu::WITHOUT_VMX,
        locked: false,
        script: "insmod /haxm.ko && exit 20
dmesg | grep 'haxm: cannot run guests: the processor has no VT-x' || exit 21
[ ! -e /dev/HAX ] || exit 22",
    },
    Refusal {
        name: "a processor without EPT",
        model: cpu::WITHOUT_EPT,
        locked: false,
        script: "insmod /haxm.ko || exit 20
/conformance probe | tee /tmp/probe
grep -q 'capabilities 0x3fa' /tmp/probe || exit 24
dmesg | grep 'haxm: the processor has no EPT' || exit 21
rmmod haxm",
    },
    Refusal {
        name: "a processor without unrestricted guest",
        model: cpu::WITHOUT_UNRESTRICTED_GUEST,
        locked: false,
        script: "insmod /haxm.ko || exit 20
/conformance probe | tee /tmp/probe || exit 23
grep -q 0x3fb /tmp/probe || exit 24
dmesg | grep 'haxm: the processor has no unrestricted guest' || exit 21
rmmod haxm",
    },
    Refusal {
        name: "VT-x locked off by firmware",
        model: cpu::HASWELL,
        locked: true,
        script: "insmod /haxm.ko || exit 20
/conformance probe > /tmp/probe && exit 23
cat /tmp/probe
grep -q 'not working, reasons 0x1' /tmp/probe || exit 24
dmesg | grep 'haxm: cannot run guests: VT-x is locked off by firmware' || exit 21
rmmod haxm",
    },
];

fn refuse(parts: &setup::Parts, refusal: &Refusal) -> Result<()> {
    let mut pc = Pc::new()
        .cpu(refusal.model)
        .file("/haxm.ko", &parts.module)
        .file("/conformance", &parts.conformance)
        .script(refusal.script);
    if refusal.locked {
        pc = pc.feature_control(firmware::LOCKED_OFF);
    }
    let outcome = pc.run(&mut std::io::stdout())?;
    verdict(&outcome, outcome.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failing_stage_fails_the_whole() {
        let good: Stage<'_> = ("good".into(), Box::new(|| Ok(())));
        let bad: Stage<'_> = ("bad".into(), Box::new(|| bail!("on purpose")));
        let code = finish(&[good, bad], Instant::now()).unwrap();
        assert_eq!(code, ExitCode::FAILURE);
    }
}
