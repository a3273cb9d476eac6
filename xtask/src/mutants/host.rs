//! Host tests: built once from the copy, and run with the number of a break in their environment.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::folder::workspace_root;

use super::copy::{Copy, ENVIRONMENT};
use super::list::{HostTest, Mutant, Mutants};
use super::report::{Results, Verdict};

/// A test that runs longer hangs. Most take less than a second on an idle machine, some a few.
const LIMIT: Duration = Duration::from_secs(600);

/// Test programs by the files of their roots.
type Programs = BTreeMap<String, PathBuf>;

/// Runs the host tests of the chosen breaks.
pub(super) fn run(
    copy: &Copy,
    mutants: &Mutants,
    chosen: &[&Mutant],
    results: &mut Results,
) -> Result<()> {
    let of_host: Vec<&Mutant> = chosen.iter().copied().filter(|m| m.is_host()).collect();
    let tests: BTreeSet<&HostTest> = of_host.iter().flat_map(|m| &m.host).collect();
    if tests.is_empty() {
        return Ok(());
    }
    copy.write(mutants, None)?;
    println!("mutants: building the host tests");
    let programs = build(copy, &tests)?;
    for test in &tests {
        let run = once(copy, &programs, test, 0)?;
        ensure!(
            run.status.is_some_and(|s| s.success()) && run.ran != 0,
            "{} {} does not pass unbroken, or is no test:\n{}",
            test.file,
            test.filters.join(" "),
            run.output
        );
    }
    let switched = of_host.iter().filter(|m| !m.rebuild);
    for mutant in switched {
        let number = number_of(mutants, mutant);
        one(copy, &programs, mutant, number, results)?;
    }
    for mutant in of_host.iter().filter(|m| m.rebuild) {
        copy.write(mutants, Some(mutant))?;
        let programs = build(copy, &mutant.host.iter().collect())?;
        one(copy, &programs, mutant, 0, results)?;
    }
    Ok(())
}

/// The number of a break.
pub(super) fn number_of(mutants: &Mutants, mutant: &Mutant) -> usize {
    let place = mutants.iter().position(|m| m.name == mutant.name);
    place.map_or(0, |index| index + 1)
}

/// Runs the tests of one break.
fn one(
    copy: &Copy,
    programs: &Programs,
    mutant: &Mutant,
    number: usize,
    results: &mut Results,
) -> Result<()> {
    let start = Instant::now();
    let mut failed = Vec::new();
    let mut verdict = None;
    for test in &mutant.host {
        let run = once(copy, programs, test, number)?;
        let names = run.failed();
        if names.is_empty() {
            let passed = run.status.is_some_and(|s| s.success());
            let what = match run.status {
                Some(_) if passed => format!("{} passes", test.file),
                Some(status) => format!("{} dies ({status})", test.file),
                None => format!("{} hangs", test.file),
            };
            if passed || !mutant.dies {
                verdict = Some(Verdict::Survived(what));
                break;
            }
            failed.push(what);
        }
        failed.extend(names);
    }
    let verdict = verdict.unwrap_or(Verdict::Caught(failed));
    results.add(mutant, verdict, start.elapsed())
}

/// A run of some tests.
struct Run {
    /// None: it was ended because its time was up.
    status: Option<ExitStatus>,
    output: String,
    ran: usize,
}

impl Run {
    /// Names of the tests that failed.
    fn failed(&self) -> Vec<String> {
        let lines = self.output.lines();
        lines
            .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
            .map(str::to_owned)
            .collect()
    }
}

fn once(copy: &Copy, programs: &Programs, test: &HostTest, number: usize) -> Result<Run> {
    let program = programs
        .get(&test.file)
        .with_context(|| format!("{} is no program of tests", test.file))?;
    let log = workspace_root().join("target/mutants/test.log");
    let file = File::create(&log)?;
    let mut child = Command::new(program)
        .args(&test.filters)
        .current_dir(copy.root().join(test.package()))
        .env(ENVIRONMENT, number.to_string())
        .env("CARGO_MANIFEST_DIR", copy.root().join(test.package()))
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let output = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let ran = output.lines().filter(|l| l.starts_with("test ")).count();
    Ok(Run {
        // "test result: …" is a line of them.
        ran: ran.saturating_sub(1),
        status,
        output,
    })
}

/// Builds the programs of these tests.
fn build(copy: &Copy, tests: &BTreeSet<&HostTest>) -> Result<Programs> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(copy.root())
        .args(["test", "--no-run", "--quiet", "--locked"])
        // The workspace's own: what it uses of others is built already.
        .env("CARGO_TARGET_DIR", workspace_root().join("target"))
        .arg("--message-format=json")
        .stderr(Stdio::inherit());
    let packages: BTreeSet<&str> = tests.iter().map(|test| test.package()).collect();
    for package in packages {
        command.args(["--package", &package_name(copy, package)?]);
    }
    let targets: BTreeSet<&str> = tests.iter().map(|test| test.file.as_str()).collect();
    for file in targets {
        match file.rsplit_once("/tests/") {
            Some((_, name)) => command.args(["--test", name.trim_end_matches(".rs")]),
            None => command.arg("--lib"),
        };
    }
    let output = command.output().context("cannot run cargo")?;
    let mut programs = Programs::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        // What is broken warns of parentheses and of variables that nobody reads; only errors are shown.
        if let (Some("error"), Some(text)) = (
            message["message"]["level"].as_str(),
            message["message"]["rendered"].as_str(),
        ) {
            eprint!("{text}");
        }
        if let (Some(program), Some(source)) = (
            message["executable"].as_str(),
            message["target"]["src_path"].as_str(),
        ) && let Ok(file) = PathBuf::from(source).strip_prefix(copy.root())
        {
            programs.insert(file.to_string_lossy().into_owned(), program.into());
        }
    }
    ensure!(output.status.success(), "the broken copy does not build");
    Ok(programs)
}

/// The name of the package in this folder.
fn package_name(copy: &Copy, folder: &str) -> Result<String> {
    let manifest = fs::read_to_string(copy.root().join(folder).join("Cargo.toml"))?;
    let line = manifest.lines().find(|line| line.starts_with("name = "));
    let name = line.and_then(|line| line.split('"').nth(1));
    Ok(name.context("a package without a name")?.to_owned())
}
