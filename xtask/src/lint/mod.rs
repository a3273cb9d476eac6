//! `cargo xtask lint`: what is checked about the code itself.
//!
//! Each check is a file here with tests that show it fails on bad code and passes on good code.

mod assembly;
pub(crate) mod finding;
mod floors;
mod length;
mod names;
mod paths;
pub(crate) mod source;
mod text;
mod tools;
mod unsafety;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use testbed::folder::workspace_root;

use finding::Finding;
use source::Files;

use crate::mutants;

const HELP: &str = "usage: cargo xtask lint [--source] [--no-module]
Checks the code: format, clippy, floors, unsafe, asm!, names, text, length, the list of breaks, the module object.
  --source     only what reads source files
  --no-module  all but the module object, which takes a compiler with its library source";

/// A check of source files: its name, and what it found.
type SourceCheck = (&'static str, fn(&Files) -> Vec<Finding>);

const SOURCE_CHECKS: &[SourceCheck] = &[
    ("floors", floors::check),
    ("unsafe", unsafety::check),
    ("asm!", assembly::check),
    ("names", names::check),
    ("text", text::check),
    ("length", length::check),
    ("breaks", mutants::list::check),
    ("breaks' syntax", mutants::syntax::check),
];

/// A check that runs a tool: its name, and the tool. The error is what is wrong.
type ToolCheck = (&'static str, fn() -> Result<()>);

const TOOL_CHECKS: &[ToolCheck] = &[("fmt", tools::format), ("clippy", tools::clippy)];

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let mut tools = true;
    let mut module = true;
    for arg in args {
        match arg.as_str() {
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(ExitCode::SUCCESS);
            }
            "--source" => (tools, module) = (false, false),
            "--no-module" => module = false,
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        }
    }
    let mut count = Count::default();
    let files = Files::tracked(&workspace_root())?;
    for (name, check) in SOURCE_CHECKS {
        let findings = check(&files);
        for finding in &findings {
            eprintln!("{finding}");
        }
        count.add(name, findings.is_empty());
    }
    print!("{}", unsafety::table(&files));
    if tools {
        for (name, check) in TOOL_CHECKS {
            count.run(name, *check);
        }
    }
    if module {
        count.run("module", tools::module);
    }
    println!("lint: {} passed, {} failed", count.passed, count.failed);
    Ok(if count.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[derive(Default)]
struct Count {
    passed: u32,
    failed: u32,
}

impl Count {
    fn add(&mut self, name: &str, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
        println!("lint {name} ... {}", if passed { "ok" } else { "FAILED" });
    }

    fn run(&mut self, name: &str, check: fn() -> Result<()>) {
        println!("lint {name} ...");
        let start = Instant::now();
        let result = check();
        if let Err(error) = &result {
            eprintln!("{error:#}");
        }
        let seconds = start.elapsed().as_secs_f64();
        self.add(&format!("{name} ({seconds:.0} s)"), result.is_ok());
    }
}
