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
  --kernel 6.1|6.12|7       Debian's kernel (6.1); 6.1-rt, 7-rt: with PREEMPT_RT; debug, kasan: ones that watch themselves
  --file GUEST=HOST       put a file into the initramfs; may be repeated
  --module NAME[:PARAMS]  insert one of the kernel's modules first; may be repeated
  --append ARGUMENTS      add to the kernel command line
  --feature-control N     what the firmware leaves in MSR 3AH (1: VT-x locked off)
  --report                emulator's own complaints in bochs.log; keeps the run's folder
  --keep                  keep the run's folder
  --timeout SECONDS       (120)";

/// Prints what the processor offers and loads Debian's KVM, which checks it far better than we would.
const SELF_TEST: &str = "
uname -r
grep -m1 'model name' /proc/cpuinfo
grep -m1 'vmx flags' /proc/cpuinfo || { echo 'no VMX'; exit 1; }
for p in ept vpid unrestricted_guest; do echo \"$p $(cat /sys/module/kvm_intel/parameters/$p)\"; done
test -c /dev/kvm
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
