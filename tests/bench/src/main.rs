//! Measures a hypervisor's paths in ticks of the time-stamp counter.
//!
//! `haxm-bench haxm` measures `/dev/HAX`, `haxm-bench kvm` measures `/dev/kvm`. Guest code, loops and samples are the
//! same; only [`haxm`] and [`kvm`] differ. Each row is a line `@@ROW NAME MEDIAN MEAN LEAST COUNT`.

mod api;
mod growth;
mod guest;
mod haxm;
mod kvm;
mod mark;
mod memory;
mod ram;
mod rows;
mod sample;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (side, filter) = match words.as_slice() {
        [side] => (*side, ""),
        [side, filter] => (*side, *filter),
        _ => ("", ""),
    };
    let failed = match side {
        "haxm" => rows::all::<haxm::Haxm>(filter),
        "kvm" => rows::all::<kvm::KvmApi>(filter),
        "symbols" => match mark::send_symbols() {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("the kernel's symbols: {error:#}");
                1
            }
        },
        _ => {
            eprintln!("usage: haxm-bench haxm|kvm [FILTER,FILTER...] | symbols");
            return ExitCode::from(2);
        }
    };
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
