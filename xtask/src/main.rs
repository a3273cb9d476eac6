//! `cargo xtask COMMAND`: everything that is more than `cargo build`.
//!
//! To add a command: a `mod` line and one line in [`COMMANDS`]. A command gets the words after its
//! name and returns the exit code of the process; an error is printed with its causes and is exit code 1.

mod abi;
mod bench;
mod boot;
mod conformance;
mod guests;
mod lint;
mod module;
mod mutants;
mod package;
mod profile;
mod run;
mod setup;
mod test;
mod testbed;
mod vectors;

use std::process::ExitCode;

/// One subcommand.
struct Command {
    /// The word after `cargo xtask`.
    name: &'static str,
    /// Its arguments and what it does, for the usage text.
    about: &'static str,
    /// The command itself; it gets the words after its name.
    run: fn(&[String]) -> anyhow::Result<ExitCode>,
}

/// All subcommands, in the order of the usage text.
const COMMANDS: &[Command] = &[
    Command {
        name: "abi",
        about: "[--json]  print request numbers, structures and constants",
        run: abi::run,
    },
    Command {
        name: "bench",
        about: "[--kernel K] [--no-guests] [--docs] [FILTER]  measure the driver beside KVM",
        run: bench::run,
    },
    Command {
        name: "conformance",
        about: "[--cpus N] [FILTER]  the driver's own tests on the emulated PC",
        run: conformance::run,
    },
    Command {
        name: "lint",
        about: "[--source] [--no-module]  check the code itself",
        run: lint::run,
    },
    Command {
        name: "module",
        about: "[--kernel 6.1|6.12|7|6.1-rt|7-rt|debug|kasan|DIR]  build haxm.ko",
        run: module::run,
    },
    Command {
        name: "mutants",
        about: "[--host] [--guest] [--list] [--cases] [NAME...]  break the code on purpose: tests must fail",
        run: mutants::run,
    },
    Command {
        name: "package",
        about: "[--check]  build a Debian package: DKMS builds the module where it is installed",
        run: package::run,
    },
    Command {
        name: "profile",
        about: "[--kernel K] [--kvm] [ROW...]  where the ticks of a bench row go, function by function",
        run: profile::run,
    },
    Command {
        name: "run",
        about: "[--guest G] [--smp N] [--machine pc|microvm]  boot a guest through /dev/HAX",
        run: run::run,
    },
    Command {
        name: "setup",
        about: "install and build what the other commands need",
        run: setup::run,
    },
    Command {
        name: "test",
        about: "[--host]  lints, host tests, and the driver's tests on the emulated PC",
        run: test::run,
    },
    Command {
        name: "testbed",
        about: "[--help]  boot the emulated VT-x PC: a self test, or a script of yours",
        run: testbed::run,
    },
];

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let Some((name, rest)) = words.split_first() else {
        usage();
        return ExitCode::from(2);
    };
    if matches!(name.as_str(), "help" | "-h" | "--help") {
        usage();
        return ExitCode::SUCCESS;
    }
    let Some(command) = COMMANDS.iter().find(|c| c.name == name) else {
        eprintln!("xtask: there is no command '{name}'");
        usage();
        return ExitCode::from(2);
    };
    match (command.run)(rest) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask {name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn usage() {
    eprintln!("usage: cargo xtask COMMAND [ARGUMENTS]");
    for c in COMMANDS {
        eprintln!("  {:<12} {}", c.name, c.about);
    }
}
