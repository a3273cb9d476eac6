//! `probe`: what the driver says of itself, for people.

use std::process::ExitCode;

use abi::{Capabilities, FailReasons, WorkStatus};

use crate::client::System;

/// Prints version, status, capabilities and quota. Success if guests can run.
pub fn run() -> ExitCode {
    match tell() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("/dev/HAX: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn names<F: bitflags_names::Named>(flags: &F) -> String {
    let names = flags.names();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(" ")
    }
}

/// The names of flag words, one way for the three of them.
mod bitflags_names {
    use abi::{Capabilities, FailReasons, WorkStatus};

    pub trait Named {
        fn names(&self) -> Vec<&'static str>;
    }

    macro_rules! named {
        ($($flags:ident),+) => {
            $(impl Named for $flags {
                fn names(&self) -> Vec<&'static str> {
                    self.iter_names().map(|(name, _)| name).collect()
                }
            })+
        };
    }
    named!(WorkStatus, Capabilities, FailReasons);
}

fn tell() -> anyhow::Result<bool> {
    if let Ok(version) = std::fs::read_to_string("/sys/module/haxm/version") {
        println!("module version {}", version.trim());
    }
    let system = System::open()?;
    let version = system.version()?;
    println!(
        "API version {}, compatible with {}",
        version.cur_version, version.compat_version
    );
    let info = system.capability()?;
    let status = WorkStatus::from_bits_retain(info.wstatus);
    println!("status 0x{:x}: {}", info.wstatus, names(&status));
    let works = status.contains(WorkStatus::WORKING);
    if works {
        let capabilities = Capabilities::from_bits_retain(info.winfo);
        println!("capabilities 0x{:x}: {}", info.winfo, names(&capabilities));
    } else {
        let reasons = FailReasons::from_bits_retain(info.winfo);
        println!(
            "not working, reasons 0x{:x}: {}",
            info.winfo,
            names(&reasons)
        );
    }
    if status.contains(WorkStatus::MEMQUOTA) {
        println!("memory quota 0x{:x} bytes", info.mem_quota);
    }
    Ok(works)
}
