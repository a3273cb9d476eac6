//! A client of the ABI that tests the driver through `/dev/HAX`.
//!
//! `probe` prints what the driver says of itself; `run [FILTER...]` runs the cases whose name contains one of the
//! filters; `list` prints their names; `neighbour` runs a guest of KVM's until it is told to end. It is one static binary, so that it runs in a bare initramfs.
#![allow(
    clippy::cast_possible_truncation,
    reason = "addresses and sizes of small guests"
)]

mod cases;
mod client;
mod code;
mod compat;
mod exit;
mod machine;
mod modes;
mod neighbour;
mod probe;
mod process;
mod ram;
mod region;
mod sentinel;
mod swept;
mod tasks;
mod threads;
mod tunnel;
mod watchpoint;

use std::io::Write;
use std::panic;
use std::process::ExitCode;
use std::time::Instant;

use cases::{Body, Case, GROUPS};

const USAGE: &str = "usage: haxm-conformance probe | run [FILTER...] | list | neighbour";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["probe"] => probe::run(),
        ["run"] => run(&[""]),
        ["run", filters @ ..] => run(filters),
        ["neighbour"] => neighbour::run(),
        ["list"] => {
            each(&[""], |group, name, _| println!("{group}/{name}"));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// A case in one mode, or without one.
type Attempt = Box<dyn FnOnce() -> cases::Outcome + panic::UnwindSafe>;

/// Calls `with` for each case in each of its modes whose full name contains one of the filters.
fn each(filters: &[&str], mut with: impl FnMut(&str, &str, Attempt)) {
    for group in GROUPS {
        for case in group.cases {
            for (name, attempt) in attempts(case) {
                let full = format!("{}/{name}", group.name);
                if filters.iter().any(|filter| full.contains(filter)) {
                    with(group.name, &name, attempt);
                }
            }
        }
    }
}

fn attempts(case: &'static Case) -> Vec<(String, Attempt)> {
    match case.body {
        Body::Plain(body) => vec![(case.name.to_owned(), Box::new(body))],
        Body::InModes(modes, body) => modes
            .iter()
            .map(|mode| {
                let attempt: Attempt = Box::new(move || body(*mode));
                (format!("{}/{}", case.name, mode.name()), attempt)
            })
            .collect(),
    }
}

/// Cases of one group so far.
#[derive(Default)]
struct Count {
    passed: u32,
    failed: u32,
}

fn run(filters: &[&str]) -> ExitCode {
    let start = Instant::now();
    let mut total = Count::default();
    let mut group = Count::default();
    let mut current = String::new();
    let signals = std::env::var("CONFORMANCE_SIGNALS");
    let signals = signals.ok().and_then(|text| text.parse().ok());
    let report = |name: &str, count: &Count| {
        if !name.is_empty() {
            println!(
                "{name}: {} of {}",
                count.passed,
                count.passed + count.failed
            );
        }
    };
    each(filters, |name, case, attempt| {
        if name != current {
            report(&current, &group);
            name.clone_into(&mut current);
            group = Count::default();
        }
        // Told before it runs: a case that takes the machine down is then known.
        if std::env::var_os("CONFORMANCE_VERBOSE").is_some() {
            println!("  {name}/{case}");
        }
        let _ = std::io::stdout().flush();
        if let Some(microseconds) = signals {
            process::alarm_every(microseconds);
        }
        let failure = match panic::catch_unwind(attempt) {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(format!("{error:#}")),
            Err(_) => Some("panicked".to_owned()),
        };
        if let Some(why) = failure {
            println!("FAILED {name}/{case}: {why}");
            group.failed += 1;
            total.failed += 1;
        } else {
            group.passed += 1;
            total.passed += 1;
        }
    });
    report(&current, &group);
    println!(
        "in {:.1} s of the machine's time",
        start.elapsed().as_secs_f64()
    );
    println!("{} passed, {} failed", total.passed, total.failed);
    // No case at all is a wrong filter, not a success.
    if total.failed != 0 || total.passed == 0 {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
