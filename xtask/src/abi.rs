//! `cargo xtask abi [--json]`: prints the ioctl ABI: request numbers, structures, constants.
//!
//! Everything printed is read from the `abi` crate's definitions, the ones the driver is built with.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use abi::constants::CONSTANTS;
use abi::layout::STRUCTS;
use abi::{Os, Request};
use anyhow::bail;
use serde_json::{Map, Value, json};

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> anyhow::Result<ExitCode> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let text = match words.as_slice() {
        [] => table(),
        ["--json"] => format!("{:#}\n", document()),
        ["--help" | "-h"] => "usage: cargo xtask abi [--json]\n".to_owned(),
        _ => bail!("usage: cargo xtask abi [--json]"),
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        // A reader that has seen enough (`| head`) is no failure.
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Key of a system in the JSON document.
fn key(os: Os) -> &'static str {
    match os {
        Os::Linux => "linux",
        Os::Darwin => "darwin",
        Os::NetBsd => "netbsd",
        Os::Windows => "windows",
    }
}

fn hex(number: u32) -> String {
    format!("0x{number:08x}")
}

/// `{"ioctls":[…],"structs":[…],"constants":{…}}`.
fn document() -> Value {
    let ioctls: Vec<Value> = Request::ALL
        .iter()
        .map(|request| {
            let mut entry = Map::new();
            entry.insert("name".into(), request.name().into());
            for os in Os::ALL {
                entry.insert(key(os).into(), os.number(*request).map(hex).into());
            }
            entry.insert("size".into(), request.argument().size.into());
            Value::Object(entry)
        })
        .collect();
    let structs: Vec<Value> = STRUCTS
        .iter()
        .map(|structure| {
            let fields: Vec<Value> = structure
                .fields
                .iter()
                .map(|f| json!({"name": f.name, "offset": f.offset, "size": f.size}))
                .collect();
            json!({"name": structure.name, "size": structure.size, "fields": fields})
        })
        .collect();
    let constants: Map<String, Value> = CONSTANTS
        .iter()
        .map(|c| (c.name.to_owned(), c.value.into()))
        .collect();
    json!({"ioctls": ioctls, "structs": structs, "constants": constants})
}

/// The same for a reader.
fn table() -> String {
    let mut out = String::new();
    // Writing to a String cannot fail, so the results say nothing.
    let _ = writeln!(
        out,
        "{:<34}{:>12}{:>12}{:>12}{:>12}{:>6}",
        "request", "Linux", "macOS", "NetBSD", "Windows", "size"
    );
    for request in Request::ALL {
        let _ = write!(out, "{:<34}", request.name());
        for os in Os::ALL {
            let _ = write!(
                out,
                "{:>12}",
                os.number(request).map_or("-".to_owned(), hex)
            );
        }
        let _ = writeln!(out, "{:>6}", request.argument().size);
    }
    for structure in STRUCTS {
        let _ = writeln!(out, "\n{} ({} bytes)", structure.name, structure.size);
        for field in structure.fields {
            let _ = writeln!(
                out,
                "  {:>3}:{:<4} {}",
                field.offset, field.size, field.name
            );
        }
    }
    let _ = writeln!(out);
    for constant in CONSTANTS {
        let _ = writeln!(out, "{:<30}{:>#8x}", constant.name, constant.value);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_every_request_structure_and_constant() {
        let document = document();
        assert_eq!(document["ioctls"].as_array().map(Vec::len), Some(27));
        assert_eq!(document["structs"].as_array().map(Vec::len), Some(21));
        assert_eq!(document["constants"]["HAX_EXIT_FAST_MMIO"], 9);
        // Names are unique, or a later one would have replaced an earlier one.
        assert_eq!(
            document["constants"].as_object().map(Map::len),
            Some(CONSTANTS.len())
        );
    }

    #[test]
    fn numbers_are_hexadecimal_strings_or_null() {
        let document = document();
        let find = |name: &str| {
            let all = document["ioctls"].as_array().expect("an array");
            all.iter()
                .find(|entry| entry["name"] == name)
                .expect("listed")
                .clone()
        };
        assert_eq!(
            find("HAX_VCPU_IOCTL_RUN"),
            json!({"name": "HAX_VCPU_IOCTL_RUN", "linux": "0x000000c0", "darwin": "0x200000c0",
                "netbsd": "0x200000c0", "windows": "0x40002418", "size": 0})
        );
        assert_eq!(find("HAX_VCPU_IOCTL_KICKOFF")["linux"], Value::Null);
        assert_eq!(find("HAX_VCPU_IOCTL_GET_CPUID")["netbsd"], Value::Null);
        assert_eq!(find("HAX_IOCTL_DESTROY_VM")["windows"], Value::Null);
    }

    #[test]
    fn the_table_names_everything() {
        let table = table();
        for request in Request::ALL {
            assert!(table.contains(request.name()));
        }
        for structure in STRUCTS {
            assert!(table.contains(structure.name));
        }
    }

    #[test]
    fn other_words_are_refused() {
        assert!(run(&["--xml".to_owned()]).is_err());
    }
}
