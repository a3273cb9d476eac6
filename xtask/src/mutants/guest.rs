//! Conformance cases: one module built from the copy is loaded with the number of a break as its parameter, many
//! times in one boot of the emulated PC. After each break the module is loaded unbroken and the same cases must pass:
//! what a break leaves behind is not taken for the next one's.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testbed::{Flavour, Outcome};

use super::copy::Copy;
use super::host::number_of;
use super::list::{Machine, Mutant, Mutants};
use super::report::{Results, Verdict};
use crate::{conformance, module};

/// The PC says nothing for so long: it hangs. In wall time, of a machine that may be busy.
const SILENCE: Duration = Duration::from_secs(600);

/// Breaks in one boot.
const AT_ONCE: usize = 24;

/// What the PC does: functions, then a line for each break. `broken N CASES` loads the module with break N and runs
/// the cases; lines that begin with @@ are read by [`sections`].
const FUNCTIONS: &str = r#"export CONFORMANCE_VERBOSE=1
complaints='BUG|WARNING|Oops|Call Trace|scheduling while atomic|possible recursive|bad page|internal error|leak'
attempt() {
  number=$1; shift
  dmesg -c > /dev/null
  insmod /haxm.ko broken=$number || { echo '@@DIED insmod'; return; }
  timeout -s KILL 200 /conformance run $*
  code=$?
  [ $code -lt 2 ] || echo '@@DIED the client'
  rmmod haxm || { echo '@@DIED rmmod'; exit 1; }
  said=$(dmesg | grep -E "$complaints" | head -3)
  [ -z "$said" ] || { echo "$said"; echo '@@DIED the kernel complains'; }
  echo @@CODE $code
}
broken() {
  echo @@BREAK $1
  attempt $*
  shift
  echo @@CONTROL
  attempt 0 $*
  [ $code = 0 ] || exit 1
}
"#;

/// Runs the conformance cases of the chosen breaks.
pub(super) fn run(
    copy: &Copy,
    mutants: &Mutants,
    chosen: &[&Mutant],
    results: &mut Results,
) -> Result<()> {
    let of_guest: Vec<&Mutant> = chosen.iter().copied().filter(|m| m.is_guest()).collect();
    if of_guest.is_empty() {
        return Ok(());
    }
    let client = conformance::build()?;
    let (rebuilt, switched): (Vec<&Mutant>, Vec<&Mutant>) =
        of_guest.iter().partition(|m| m.rebuild);
    if !switched.is_empty() {
        let module = build(copy, mutants)?;
        let numbers = |m: &&Mutant| number_of(mutants, m);
        let machines: BTreeSet<Machine> = switched.iter().map(|m| m.pc).collect();
        for machine in machines {
            let some: Vec<&Mutant> = switched
                .iter()
                .copied()
                .filter(|m| m.pc == machine)
                .collect();
            boots(&module, &client, &some, &numbers, results)?;
        }
    }
    for mutant in rebuilt {
        copy.write(mutants, Some(mutant))?;
        let module = module_of(copy)?;
        // Unbroken it is not there to be compared with; nothing else runs in this boot.
        boots(&module, &client, &[mutant], &|_| 0, results)?;
    }
    Ok(())
}

/// The module with all the breaks in it that can be switched.
///
/// # Errors
/// One of them does not build.
pub(super) fn build(copy: &Copy, mutants: &Mutants) -> Result<PathBuf> {
    copy.write(mutants, None)?;
    module_of(copy)
}

fn module_of(copy: &Copy) -> Result<PathBuf> {
    println!("mutants: building the module");
    let module = module::build_broken(copy.root(), Flavour::default().series())?;
    conformance::stripped(&module)
}

/// Boots until each of these, which want the same PC, has a verdict.
fn boots(
    module: &Path,
    client: &Path,
    mutants: &[&Mutant],
    number: &dyn Fn(&&Mutant) -> usize,
    results: &mut Results,
) -> Result<()> {
    let mut left = mutants;
    while !left.is_empty() {
        let some = left.get(..AT_ONCE.min(left.len())).unwrap_or_default();
        let mut script = FUNCTIONS.to_owned();
        if some.first().is_some_and(|m| m.pc.kvm) {
            script.insert_str(0, conformance::KVM_ALONE);
        }
        for mutant in some {
            writeln!(
                script,
                "broken {} {}",
                number(mutant),
                mutant.guest.join(" ")
            )?;
        }
        let start = Instant::now();
        let machine = some.first().map(|m| m.pc).unwrap_or_default();
        let pc = match machine {
            Machine {
                huge_page: true, ..
            } => conformance::huge_page_pc,
            Machine { counters: true, .. } => conformance::counters_pc,
            Machine { kvm: true, .. } => conformance::kvm_pc,
            Machine { .. } => conformance::pc,
        };
        let outcome = pc(module, client, &script)
            .cpus(machine.cpus)
            .timeout(Duration::from_secs(3600))
            .silence(SILENCE)
            .run(&mut io::sink())?;
        let sections = sections(&outcome.serial);
        ensure!(
            !sections.is_empty(),
            "the emulated PC did not start: {outcome}"
        );
        let share = start.elapsed() / u32::try_from(sections.len())?;
        let is_alone = sections.len() == 1;
        // One that may spoil the machine gets a boot of its own to show that it is the one that did.
        let spoilt = |(mutant, section): &(&&Mutant, &Section)| mutant.dies && section.is_spoilt();
        let last = some.iter().zip(&sections).next_back();
        let again = usize::from(!is_alone && last.is_some_and(|last| spoilt(&last)));
        let judged = sections.len() - again;
        for (mutant, section) in some.iter().zip(&sections).take(judged) {
            let verdict = judge(mutant, section, &outcome, is_alone);
            results.add(mutant, verdict, share)?;
        }
        left = left.get(judged..).unwrap_or_default();
    }
    Ok(())
}

/// What was said during one break.
#[derive(Debug, Default, PartialEq, Eq)]
struct Section {
    /// Cases that failed.
    failed: Vec<String>,
    /// The case that began last.
    last: String,
    /// How the run died, if it did.
    died: Option<String>,
    /// Whether the cases came to an end.
    ended: bool,
    /// Whether what was said is about the module unbroken.
    control: bool,
    /// Cases that failed unbroken.
    wrong: Vec<String>,
    /// Whether the cases came to an end unbroken.
    control_ended: bool,
}

impl Section {
    /// Cases failed unbroken too.
    fn is_spoilt(&self) -> bool {
        self.control_ended && !self.wrong.is_empty()
    }
}

fn sections(serial: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for line in serial.lines() {
        if line.starts_with("@@BREAK ") {
            sections.push(Section::default());
        }
        let Some(section) = sections.last_mut() else {
            continue;
        };
        if line.starts_with("@@CONTROL") {
            section.control = true;
        } else if line.starts_with("@@CODE") {
            if section.control {
                section.control_ended = true;
            } else {
                section.ended = true;
            }
        } else if let Some(how) = line.strip_prefix("@@DIED ") {
            if !section.control {
                section.died = Some(how.to_owned());
            }
        } else if let Some(name) = line.strip_prefix("FAILED ") {
            let name = name.split(": ").next().unwrap_or(name).to_owned();
            if section.control {
                section.wrong.push(name);
            } else {
                section.failed.push(name);
            }
        } else if let Some(name) = line.strip_prefix("  ")
            && !section.control
            && name.contains('/')
        {
            name.clone_into(&mut section.last);
        }
    }
    sections
}

/// The verdict on one break.
fn judge(mutant: &Mutant, section: &Section, outcome: &Outcome, is_alone: bool) -> Verdict {
    let mut caught = Vec::new();
    let died = match &section.died {
        Some(how) => Some(how.clone()),
        None if !section.ended => Some(outcome.cause.to_string()),
        None => None,
    };
    if let Some(how) = &died {
        if !mutant.dies {
            return Verdict::Survived(format!("{how} in {}", section.last));
        }
        caught.push(format!("{} ({how})", section.last));
    }
    let mut passed = Vec::new();
    for part in &mutant.guest {
        let before = caught.len();
        let failed = section.failed.iter().filter(|name| name.contains(part));
        caught.extend(failed.cloned());
        if caught.len() == before {
            passed.push(part.as_str());
        }
    }
    if died.is_none() && !passed.is_empty() {
        let others = if caught.is_empty() {
            String::new()
        } else {
            format!("; others fail: {}", caught.join(" "))
        };
        return Verdict::Survived(format!("passed: {}{others}", passed.join(" ")));
    }
    // A machine that died or was taken down has no say on the module unbroken, nor has one that is built anew.
    if !mutant.rebuild && section.is_spoilt() {
        let wrong = section.wrong.join(" ");
        // In a boot of its own there was nothing before it: what is wrong now it has left behind.
        if !(is_alone && mutant.dies) {
            return Verdict::Survived(format!("unbroken afterwards {wrong} fail too"));
        }
    }
    Verdict::Caught(caught)
}

#[cfg(test)]
mod tests {
    use super::*;
    use testbed::Cause;

    const SERIAL: &str = "@@BREAK 3\n  pio/in/real\nFAILED pio/in/real: exit 0: 1 instead of 2\n\
        0 passed, 1 failed\n@@CODE 1\n@@CONTROL\n  pio/in/real\n@@CODE 0\n@@BREAK 4\n  hlt/wakes\n";

    fn outcome() -> Outcome {
        Outcome {
            code: 0,
            cause: Cause::TripleFault,
            ticks: 0,
            boot_ticks: 0,
            steps_ticks: 0,
            serial: SERIAL.to_owned(),
            wall: Duration::ZERO,
            folder: None,
        }
    }

    fn mutant(guest: &[&str], dies: bool) -> Mutant {
        Mutant {
            guest: guest.iter().map(|&part| part.to_owned()).collect(),
            dies,
            ..Mutant::default()
        }
    }

    #[test]
    fn a_failed_case_catches_and_a_dead_machine_does_not() {
        let sections = sections(SERIAL);
        assert_eq!(sections.len(), 2);
        let judge = |mutant: &Mutant, n: usize| judge(mutant, &sections[n], &outcome(), false);
        let caught = Verdict::Caught(vec!["pio/in/real".to_owned()]);
        assert_eq!(judge(&mutant(&["pio/in"], false), 0), caught);
        let survived = |verdict| matches!(verdict, Verdict::Survived(_));
        assert!(survived(judge(&mutant(&["pio/in", "pio/out"], false), 0)));
        assert!(survived(judge(&mutant(&["hlt/"], false), 1)));
        assert!(!survived(judge(&mutant(&["hlt/"], true), 1)));
    }

    #[test]
    fn what_fails_unbroken_too_catches_nothing() {
        let text = SERIAL.replace("@@CODE 0", "FAILED pio/in/real: x\n@@CODE 1");
        let sections = sections(&text);
        let verdict = judge(&mutant(&["pio/in"], false), &sections[0], &outcome(), false);
        assert!(matches!(verdict, Verdict::Survived(why) if why.contains("unbroken")));
    }

    /// The functions as a shell of this machine runs them, with a kernel that says `line`.
    fn attempted(line: &str) -> String {
        let script = format!(
            "{FUNCTIONS}\ndmesg() {{ [ $# = 1 ] || echo '{line}'; }}\n\
             insmod() {{ :; }}\nrmmod() {{ :; }}\ntimeout() {{ :; }}\nattempt 7 pio/in\n"
        );
        let output = std::process::Command::new("sh")
            .args(["-c", &script])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn what_the_kernel_complains_of_is_told() {
        assert_eq!(attempted("[1.2] haxm: loaded"), "@@CODE 0\n");
        for line in ["Call Trace:", "BUG: sleeping", "haxm: internal error"] {
            let told = attempted(line);
            assert_eq!(
                told,
                format!("{line}\n@@DIED the kernel complains\n@@CODE 0\n")
            );
        }
    }
}
