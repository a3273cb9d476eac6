//! What became of the breaks: the table, the closing line, and which conformance cases were seen to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use testbed::folder::workspace_root;

use super::list::{self, Mutant, Mutants};
use crate::lint::source::Files;

/// What became of one break.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The tests that failed, or how they ended.
    Caught(Vec<String>),
    /// What did not fail.
    Survived(String),
}

/// What became of all of them.
pub(super) struct Results {
    caught: BTreeSet<String>,
    survived: BTreeMap<String, String>,
    /// Conformance cases that failed as they were to, by break: of this run, and of earlier ones.
    failed: BTreeMap<String, BTreeSet<String>>,
}

impl Results {
    /// None yet, but for what earlier runs have seen.
    pub(super) fn new(mutants: &Mutants) -> Self {
        Self {
            caught: BTreeSet::new(),
            survived: BTreeMap::new(),
            failed: seen(mutants),
        }
    }

    /// Takes down a verdict, prints its line of the table and keeps what was seen for [`cases`].
    ///
    /// # Errors
    /// It cannot be kept.
    pub(super) fn add(&mut self, mutant: &Mutant, verdict: Verdict, time: Duration) -> Result<()> {
        let seconds = time.as_secs_f64();
        let name = &mutant.name;
        let mut failed = BTreeSet::new();
        match verdict {
            Verdict::Caught(by) => {
                println!("caught    {name:<44} {seconds:>5.1} s  {}", shortened(&by));
                let cases = by.iter().filter(|name| name.contains('/'));
                failed.extend(cases.map(|name| case_of(name)));
                self.caught.insert(name.clone());
            }
            Verdict::Survived(why) => {
                println!("SURVIVED  {name:<44} {seconds:>5.1} s  {why}");
                self.survived.insert(name.clone(), why);
            }
        }
        // Host tests say nothing about cases.
        if !failed.is_empty() {
            self.failed.insert(name.clone(), failed);
        }
        let mut text = String::new();
        for (name, cases) in &self.failed {
            for case in cases {
                text.push_str(&format!("{name} {case}\n"));
            }
        }
        Ok(fs::write(place(), text)?)
    }

    /// Prints the closing lines.
    pub(super) fn finish(self) -> ExitCode {
        for (name, why) in &self.survived {
            println!("survived: {name}: {why}");
        }
        // Caught by one kind of test and not by the other is not caught.
        let both = |name: &&String| self.survived.contains_key(*name);
        let caught = self.caught.len() - self.caught.iter().filter(both).count();
        println!("{caught} caught, {} survived", self.survived.len());
        if self.survived.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// A few names of many.
fn shortened(names: &[String]) -> String {
    let more = names.len().saturating_sub(3);
    let mut text = names.iter().take(3).cloned().collect::<Vec<_>>().join(" ");
    if more != 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// `group/case` of `group/case/mode` and what may follow.
fn case_of(name: &str) -> String {
    let name = name.split(' ').next().unwrap_or(name);
    name.splitn(3, '/').take(2).collect::<Vec<_>>().join("/")
}

/// Where it is kept what was seen.
fn place() -> PathBuf {
    workspace_root().join("target/mutants/failed.txt")
}

/// What earlier runs have seen of the breaks that are still there.
fn seen(mutants: &Mutants) -> BTreeMap<String, BTreeSet<String>> {
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let text = fs::read_to_string(place()).unwrap_or_default();
    for (name, case) in text.lines().filter_map(|line| line.split_once(' ')) {
        if mutants.iter().any(|m| m.name == name) {
            seen.entry(name.to_owned())
                .or_default()
                .insert(case.to_owned());
        }
    }
    seen
}

/// Prints the conformance cases that no break was seen to fail.
pub(super) fn cases(files: &Files, mutants: &Mutants) -> ExitCode {
    let all = list::cases(files);
    let seen: BTreeSet<String> = seen(mutants).into_values().flatten().collect();
    let left: Vec<&String> = all.difference(&seen).collect();
    for case in &left {
        println!("{case}");
    }
    println!(
        "{} of {} cases were seen to fail",
        all.len() - left.len(),
        all.len()
    );
    ExitCode::SUCCESS
}
