//! `cargo xtask mutants`: breaks the code on purpose, one place at a time, and demands that the tests named for that
//! place fail.
//!
//! The list is in `tests/mutants` ([`list`]). All breaks are compiled into one copy of the workspace, each behind a
//! number ([`copy`]), so one build serves all of them: a host test gets the number by environment variable
//! ([`host`]), the module by parameter ([`guest`]). With number 0 the copy is the code as it is, and passes.

mod copy;
mod guest;
mod host;
pub(crate) mod list;
mod report;
pub(crate) mod syntax;

use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use testbed::folder::workspace_root;

use crate::lint::source::Files;
use list::{Mutant, Mutants};
use report::Results;

const HELP: &str = "usage: cargo xtask mutants [OPTIONS] [NAME...]
Breaks the code in one place at a time and demands that the named tests fail. NAME: those whose name contains it.
  --host     only what host tests are to catch
  --guest    only what conformance cases are to catch
  --build    only build the module with all the breaks in it
  --list     print the list, which is checked first, and do nothing
  --cases    print the conformance cases that no break has been seen to fail";

/// What the words say.
#[derive(Default)]
struct Options {
    host: bool,
    guest: bool,
    build: bool,
    list: bool,
    cases: bool,
    names: Vec<String>,
}

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let mut options = Options::default();
    for arg in args {
        match arg.as_str() {
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(ExitCode::SUCCESS);
            }
            "--host" => options.host = true,
            "--guest" => options.guest = true,
            "--build" => options.build = true,
            "--list" => options.list = true,
            "--cases" => options.cases = true,
            word if !word.starts_with('-') => options.names.push(word.to_owned()),
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        }
    }
    let files = Files::tracked(&workspace_root())?;
    let mutants = checked(&files)?;
    if options.cases {
        return Ok(report::cases(&files, &mutants));
    }
    let both = options.host == options.guest;
    let chosen: Vec<&Mutant> = mutants
        .iter()
        .filter(|m| options.names.is_empty() || options.names.iter().any(|n| m.name.contains(n)))
        .filter(|m| both || (options.host && m.is_host()) || (options.guest && m.is_guest()))
        .collect();
    ensure!(!chosen.is_empty(), "no break has such a name");
    if options.list {
        for mutant in &chosen {
            println!("{mutant}");
        }
        println!("{} breaks", chosen.len());
        return Ok(ExitCode::SUCCESS);
    }
    let copy = copy::Copy::new(&files)?;
    if options.build {
        guest::build(&copy, &mutants)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut results = Results::new(&mutants);
    if both || options.host {
        host::run(&copy, &mutants, &chosen, &mut results)?;
    }
    if both || options.guest {
        guest::run(&copy, &mutants, &chosen, &mut results)?;
    }
    Ok(results.finish())
}

/// The list, if there is nothing wrong with it.
fn checked(files: &Files) -> Result<Mutants> {
    let (mutants, findings) = list::read(files);
    for finding in &findings {
        eprintln!("{finding}");
    }
    ensure!(findings.is_empty(), "the list of breaks is not in order");
    Ok(mutants)
}
