//! `cargo xtask testbed`: boots the emulated VT-x PC, for its self test or with a script.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::{Flavour, Outcome, Pc};

const HELP: &str = "usage: cargo xtask testbed [OPTIONS] [SCRIPT]
Boots the emulated VT-x PC and runs a shell script in it; its exit code becomes ours (124: timed out,
125: it died without a verdict, 126: it did not start). Without SCRIPT: a self test.
  --cpu MODEL             processor (default corei7_haswell_4770)
  --cpus N                processors (1)
  --memory MB             memory (256)
  --kernel 6.1|6.12       Debian's kernel (6.1)
  --file GUEST=HOST       put a file into the initramfs; may be repeated
  --module NAME[:PARAMS]  insert one of the kernel's modules first; may be repeated
  --append ARGUMENTS      add to the kernel command line
  --feature-control N     what the firmware leaves in MSR 3AH (1: VT-x locked off)
  --report                emulator's own complaints in bochs.log; keeps the run's folder
  --keep                  keep the run's folder
  --timeout SECONDS       (120)
  --models                boot every processor model the tests use and compare what it offers";

/// Prints what the processor offers and loads Debian's KVM, which checks it far better than we would.
const SELF_TEST: &str = "
uname -r
grep -m1 'model name' /proc/cpuinfo
grep -m1 'vmx flags' /proc/cpuinfo || { echo 'no VMX'; exit 1; }
for p in ept vpid unrestricted_guest; do echo \"$p $(cat /sys/module/kvm_intel/parameters/$p)\"; done
test -c /dev/kvm
";

/// Models the tests use, and whether they have VMX, EPT and unrestricted guest.
const MODELS: &[(&str, &str)] = &[
    ("p4_prescott_celeron_336", "no VMX"),
    ("core2_penryn_t9600", "VMX, no EPT"),
    ("corei5_lynnfield_750", "VMX, EPT, no UG"),
    ("corei7_sandy_bridge_2600k", "VMX, EPT, UG"),
    ("corei7_haswell_4770", "VMX, EPT, UG"),
    ("corei7_skylake_x", "VMX, EPT, UG"),
];

/// One word per line of MODELS, from what the kernel and its KVM say.
const MODEL_TEST: &str = "
grep -q -w vmx /proc/cpuinfo || { echo '=no VMX'; exit 0; }
insmod /lib/modules/kvm-intel.ko ept=1 unrestricted_guest=1 || exit 1
y() { test \"$(cat /sys/module/kvm_intel/parameters/$1)\" = Y; }
y ept && e='EPT' || e='no EPT'
test \"$e\" = 'no EPT' && { echo '=VMX, no EPT'; exit 0; }
y unrestricted_guest && echo '=VMX, EPT, UG' || echo '=VMX, EPT, no UG'
";

pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let mut pc = Pc::new();
    let mut script: Option<String> = None;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || {
            args.next()
                .with_context(|| format!("{arg} wants a value\n{HELP}"))
        };
        pc = match arg.as_str() {
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(ExitCode::SUCCESS);
            }
            "--cpu" => pc.cpu(value()?),
            "--cpus" => pc.cpus(value()?.parse()?),
            "--memory" => pc.memory_mb(value()?.parse()?),
            "--kernel" => pc.kernel(Flavour::from_series(value()?)?),
            "--file" => {
                let (guest, host) = value()?
                    .split_once('=')
                    .context("--file wants GUEST=HOST")?;
                pc.file(guest, host)
            }
            "--module" => {
                let words = value()?;
                let (name, parameters) = words.split_once(':').unwrap_or((words, ""));
                pc.module(name, parameters)
            }
            "--append" => pc.append(value()?),
            "--feature-control" => pc.feature_control(value()?.parse()?),
            "--report" => pc.report_errors(),
            "--keep" => pc.keep(),
            "--timeout" => pc.timeout(Duration::from_secs(value()?.parse()?)),
            "--models" => return models(),
            _ if !arg.starts_with('-') && script.is_none() => {
                script = Some(arg.clone());
                pc
            }
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        };
    }
    pc = match script {
        Some(script) => pc.script(&script),
        None => pc
            .module("kvm-intel", "ept=1 unrestricted_guest=1")
            .script(SELF_TEST),
    };
    let outcome = pc.run(&mut io::stdout())?;
    eprintln!("testbed: {outcome}");
    Ok(exit_code(&outcome))
}

/// The guest's code; a guest that said 0 and then died is a failure too.
fn exit_code(outcome: &Outcome) -> ExitCode {
    match outcome.code {
        0 if !outcome.success() => ExitCode::from(testbed::outcome::NO_VERDICT),
        code => ExitCode::from(code),
    }
}

fn models() -> Result<ExitCode> {
    let mut good = true;
    for (model, expected) in MODELS {
        let pc = Pc::new()
            .cpu(model)
            .module_file("kvm-intel")
            .script(MODEL_TEST);
        let outcome = pc.run(&mut io::sink())?;
        let found = outcome
            .serial
            .lines()
            .find_map(|l| l.strip_prefix('='))
            .unwrap_or("?");
        let right = outcome.success() && found == *expected;
        good &= right;
        println!(
            "{:<6} {model:<28} {found:<18} {outcome}",
            if right { "ok" } else { "WRONG" }
        );
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
