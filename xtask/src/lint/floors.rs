//! The floors of the house: a module of the core uses only modules below it, and a crate only
//! crates below it.

use std::collections::BTreeMap;

use super::finding::Finding;
use super::paths::{module_path, named_modules, reexports};
use super::source::{File, Files};

/// The core's folder.
const CORE: &str = "vmx";

/// The core's modules, lowest floor first. Those of one floor do not use each other.
const FLOORS: &[&[&str]] = &[
    &["arch", "fallible"],
    &["cpu", "sync"],
    &["host"],
    &["error"],
    &["caps"],
    &["operation"],
    &["platform"],
    &["memory", "emulate"],
    &["vcpu"],
    &["vm"],
    &["hypervisor"],
];

/// Crates of the workspace by folder, and the crates of the workspace each may use. Crates that
/// run on the developer's machine only are not listed.
const CRATES: &[(&str, &[&str])] = &[
    ("abi", &[]),
    ("vmx", &["abi"]),
    ("driver", &["abi", "vmx"]),
    ("driver/linux", &["abi", "vmx", "driver"]),
    ("driver/linux/object", &[]),
    ("driver/windows", &["abi", "vmx", "driver"]),
    ("driver/macos", &["abi", "vmx", "driver"]),
    ("driver/netbsd", &["abi", "vmx", "driver"]),
    ("tests/conformance", &["abi"]),
];

/// Modules of the core that allocate nothing.
const NO_ALLOC: &[&str] = &["arch", "cpu", "emulate"];

pub(crate) fn check(files: &Files) -> Vec<Finding> {
    let mut findings = Vec::new();
    let root = files.0.iter().find(|file| file.path == "vmx/src/lib.rs");
    let names = root.map(reexports).unwrap_or_default();
    for file in files.rust().filter(|file| file.in_source_of(CORE)) {
        core_file(file, &names, &mut findings);
    }
    for file in &files.0 {
        if let Some(folder) = file.path.strip_suffix("/Cargo.toml") {
            manifest(folder, file, &mut findings);
        }
    }
    findings
}

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

fn core_file(file: &File, names: &BTreeMap<String, String>, findings: &mut Vec<Finding>) {
    let below = file.path.strip_prefix("vmx/src/").unwrap_or(&file.path);
    let path = module_path(below);
    let mut find = |line: usize, what: String| {
        findings.push(Finding {
            path: file.path.clone(),
            line,
            what,
        });
    };
    // The root ties all floors together.
    let Some(module) = path.first() else {
        return;
    };
    let Some(floor) = floor_of(module) else {
        find(
            0,
            format!("module `{module}` has no floor; give it one in xtask/src/lint/floors.rs"),
        );
        return;
    };
    for named in named_modules(file, &path) {
        let used = names.get(&named.segment).unwrap_or(&named.segment);
        if used == module {
            continue;
        }
        match floor_of(used) {
            Some(other) if other < floor => {}
            Some(_) => find(
                named.line,
                format!("`{module}` uses `{used}`, which is not below it"),
            ),
            None => find(named.line, format!("`{used}` has no floor")),
        }
    }
    if NO_ALLOC.contains(&module.as_str()) {
        for pair in file.tokens.windows(2) {
            if pair[0].is_word("alloc") && pair[1].is_sign(':') {
                find(pair[0].line, format!("`{module}` allocates"));
            }
        }
    }
}

fn manifest(folder: &str, file: &File, findings: &mut Vec<Finding>) {
    let Some((_, allowed)) = CRATES.iter().find(|(known, _)| *known == folder) else {
        return;
    };
    let mut in_dependencies = false;
    for (index, line) in file.text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with('[') {
            in_dependencies = line.trim_matches(['[', ']']).ends_with("dependencies")
                && !line.contains("dev-dependencies");
            continue;
        }
        let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
        if in_dependencies && OURS.contains(&name) && !allowed.contains(&name) {
            findings.push(Finding {
                path: file.path.clone(),
                line: index + 1,
                what: format!("`{folder}` uses `{name}`, which is not below it"),
            });
        }
    }
}

/// Names of the workspace's crates in manifests.
const OURS: &[&str] = &["abi", "vmx", "driver", "sim", "testbed", "xtask"];

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        check(&Files::of(files))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn using_a_lower_floor_is_right() {
        let text = "use crate::{Error, memory::Space, arch::addr::Gpa};\nuse super::modes::M;";
        let root = ("vmx/src/lib.rs", "pub use error::Error;\nuse vm::Vm;");
        assert!(found(&[root, ("vmx/src/vcpu/run/mod.rs", text)]).is_empty());
        assert!(found(&[("driver/src/lib.rs", "use vmx::host::Host;")]).is_empty());
    }

    #[test]
    fn using_a_higher_or_the_same_floor_is_named() {
        let up = (
            "vmx/src/memory/slot.rs",
            "use crate::arch::A;\nuse crate::vcpu::Vcpu;",
        );
        assert_eq!(
            found(&[up]),
            ["vmx/src/memory/slot.rs:2: `memory` uses `vcpu`, which is not below it"]
        );
        let side = ("vmx/src/emulate/mod.rs", "fn f() { super::memory::g() }");
        assert_eq!(found(&[side]).len(), 1);
        let alias = [
            ("vmx/src/lib.rs", "pub use vm::Vm;"),
            ("vmx/src/vcpu/mod.rs", "use crate::Vm;"),
        ];
        assert_eq!(
            found(&alias),
            ["vmx/src/vcpu/mod.rs:1: `vcpu` uses `vm`, which is not below it"]
        );
    }

    #[test]
    fn a_module_without_a_floor_is_named() {
        assert_eq!(found(&[("vmx/src/helper.rs", "")]).len(), 1);
    }

    #[test]
    fn the_emulator_does_not_allocate() {
        let text = "use alloc::vec::Vec;";
        assert_eq!(found(&[("vmx/src/emulate/mod.rs", text)]).len(), 1);
        assert!(found(&[("vmx/src/memory/mod.rs", text)]).is_empty());
    }

    #[test]
    fn a_crate_uses_only_crates_below() {
        let bad = "[package]\nname = \"x\"\n[dependencies]\nlog = \"1\"\ndriver.workspace = true\n";
        assert_eq!(
            found(&[("vmx/Cargo.toml", bad)]),
            ["vmx/Cargo.toml:5: `vmx` uses `driver`, which is not below it"]
        );
        assert!(found(&[("driver/linux/Cargo.toml", bad)]).is_empty());
        let tests_only = "[dependencies]\nabi.workspace = true\n[dev-dependencies]\nsim = \"1\"\n";
        assert!(found(&[("vmx/Cargo.toml", tests_only)]).is_empty());
        let target = "[target.x.dependencies]\nvmx = { path = \"../vmx\" }\n";
        assert_eq!(found(&[("abi/Cargo.toml", target)]).len(), 1);
    }
}
