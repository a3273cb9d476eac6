//! `unsafe` stands only in files that are listed here and say why, and each block and each `impl`
//! has its SAFETY line. (That a block has one operation is clippy's
//! `multiple_unsafe_ops_per_block`.)

use std::fmt::Write;

use super::finding::Finding;
use super::source::{File, Files, Kind};

/// Files of the kernel that may have `unsafe`.
const FILES: &[&str] = &[
    "driver/linux/src/entry.rs",
    "driver/linux/src/ffi.rs",
    "driver/linux/src/host.rs",
    "driver/linux/src/lock.rs",
    "driver/linux/src/logger.rs",
    "driver/linux/src/runtime.rs",
    "driver/linux/src/shared.rs",
    "driver/linux/src/user.rs",
    "vmx/src/caps.rs",
    "vmx/src/caps/counters.rs",
    "vmx/src/caps/speculation.rs",
    "vmx/src/cpu/mod.rs",
    "vmx/src/cpu/native/mod.rs",
    "vmx/src/cpu/native/world_switch.rs",
    "vmx/src/fallible.rs",
    "vmx/src/host/guard.rs",
    "vmx/src/host/mod.rs",
    "vmx/src/host/user.rs",
    "vmx/src/memory/ept/table.rs",
    "vmx/src/memory/watch.rs",
    "vmx/src/operation.rs",
    "vmx/src/sync.rs",
    "vmx/src/vcpu/events/task_priority.rs",
    "vmx/src/vcpu/msr/switched.rs",
    "vmx/src/vcpu/run/loan.rs",
    "vmx/src/vcpu/run/tunnel.rs",
    "vmx/src/vcpu/state/debug.rs",
    "vmx/src/vcpu/state/extended.rs",
    "vmx/src/vcpu/state/pmu.rs",
    "vmx/src/vcpu/state/split_lock.rs",
    "vmx/src/vcpu/vmcs/host_state.rs",
    "vmx/src/vcpu/vmcs/mod.rs",
];

/// Folders off the kernel that may: tests, and the machine they run on.
const FOLDERS: &[&str] = &["tests/", "driver/tests/", "vmx/tests/"];

/// The line such a file has, at its top or at the one place.
const WHY: &str = "// UNSAFETY:";
/// The line above such a block.
const PROOF: &str = "// SAFETY:";

pub(crate) fn check(files: &Files) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in files.rust() {
        let uses = uses(file);
        let mut find = |line: usize, what: &str| {
            findings.push(Finding {
                path: file.path.clone(),
                line,
                what: what.to_owned(),
            });
        };
        let says_why = file
            .text
            .lines()
            .any(|line| line.trim_start().starts_with(WHY));
        let Some(first) = uses.first() else {
            // In tests it may speak for the modules below it.
            if says_why && FILES.contains(&&*file.path) {
                find(0, "says why it has `unsafe`, and has none");
            }
            continue;
        };
        if !is_allowed(&file.path) {
            find(first.line, "`unsafe` in a file that may not have it");
        }
        if !says_why {
            find(first.line, "`unsafe` in a file without an UNSAFETY line");
        }
        for used in &uses {
            if used.needs_proof && !has_proof(&file.text, used.line) {
                find(used.line, "`unsafe` without a SAFETY line above it");
            }
        }
    }
    for listed in FILES {
        let exists = files.0.iter().any(|file| file.path == *listed);
        if !exists && files.0.iter().any(|file| file.path == LIST) {
            findings.push(Finding {
                path: LIST.to_owned(),
                line: 0,
                what: format!("{listed} is listed, and is not there"),
            });
        }
    }
    findings
}

/// This file.
const LIST: &str = "xtask/src/lint/unsafety.rs";

/// The files with `unsafe` and their number of blocks.
pub(crate) fn table(files: &Files) -> String {
    let mut table = String::new();
    let mut total = 0;
    for file in files.rust().filter(|file| FILES.contains(&&*file.path)) {
        let blocks = uses(file).iter().filter(|used| used.is_block).count();
        total += blocks;
        let _ = writeln!(table, "  {blocks:>4} unsafe blocks in {}", file.path);
    }
    let _ = writeln!(table, "  {total:>4} unsafe blocks in the kernel's Rust");
    table
}

fn is_allowed(path: &str) -> bool {
    FILES.contains(&path) || FOLDERS.iter().any(|folder| path.starts_with(folder))
}

/// A use of the keyword.
struct Use {
    line: usize,
    /// It opens a block.
    is_block: bool,
    /// It claims something, as a block and an `impl` do, and a declaration does not.
    needs_proof: bool,
}

fn uses(file: &File) -> Vec<Use> {
    let mut uses = Vec::new();
    for (at, token) in file.tokens.iter().enumerate() {
        if !token.is_word("unsafe") {
            continue;
        }
        let next = file.tokens.get(at + 1);
        let is_block = next.is_some_and(|next| next.kind == Kind::Open('{'));
        let is_impl = next.is_some_and(|next| next.is_word("impl"));
        uses.push(Use {
            line: token.line,
            is_block,
            needs_proof: is_block || is_impl,
        });
    }
    uses
}

/// Whether a SAFETY comment stands above the statement that reaches this line.
fn has_proof(text: &str, line: usize) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let is_comment = |line: &str| line.starts_with("//");
    let Some(above) = lines.get(..line.saturating_sub(1)) else {
        return false;
    };
    let mut seen_comment = false;
    for line in above.iter().rev() {
        if is_comment(line) {
            if line.starts_with(PROOF) {
                return true;
            }
            seen_comment = true;
        } else if line.starts_with("#[") {
            // An attribute of the block.
        } else if seen_comment || line.is_empty() {
            return false;
        } else if line.ends_with([';', '}', '{']) {
            // The statement before this one ends here.
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "//! What.\n// UNSAFETY: reads a port.\n#![expect(unsafe_code)]\n\
        fn f() {\n    let a = 1;\n    // SAFETY: the port exists,\n    // and is ours.\n    \
        let b =\n        g(unsafe { h(a) });\n}\n// SAFETY: no threads.\nunsafe impl Send for X {}\n\
        /// # Safety\n/// None.\nunsafe fn k() {}\n";

    fn found(path: &str, text: &str) -> Vec<usize> {
        check(&Files::of(&[(path, text)]))
            .iter()
            .map(|found| found.line)
            .collect()
    }

    #[test]
    fn a_proven_block_in_a_listed_file_is_right() {
        assert!(found("vmx/src/cpu/native/mod.rs", GOOD).is_empty());
        assert!(found("tests/sim/src/cpu.rs", GOOD).is_empty());
        assert!(found("abi/src/lib.rs", "// unsafe\n#![forbid(unsafe_code)]").is_empty());
    }

    #[test]
    fn unsafe_elsewhere_is_named() {
        assert_eq!(found("driver/src/vm.rs", GOOD), [9]);
        assert_eq!(found("vmx/src/arch/ept.rs", GOOD), [9]);
    }

    #[test]
    fn a_file_must_say_why() {
        let silent = GOOD.replace("UNSAFETY", "ABOUT");
        assert_eq!(found("vmx/src/cpu/native/mod.rs", &silent), [9]);
        assert_eq!(
            found("vmx/src/cpu/native/mod.rs", "// UNSAFETY: none left.\n"),
            [0]
        );
    }

    #[test]
    fn a_block_or_impl_must_have_its_line() {
        let unproven = GOOD.replace("// SAFETY: the port", "// The port");
        assert_eq!(found("vmx/src/cpu/native/mod.rs", &unproven), [9]);
        let unproven = GOOD.replace("// SAFETY: no threads.\n", "");
        assert_eq!(found("vmx/src/cpu/native/mod.rs", &unproven), [11]);
        let allowed_here = GOOD.replace(
            "    let b =\n        g(",
            "    #[expect(unsafe_code)]\n    // UNSAFETY: here only.\n    (",
        );
        assert!(found("vmx/src/cpu/native/mod.rs", &allowed_here).is_empty());
        // UNSAFETY is not SAFETY, and the line of the statement before does not count.
        let unproven = GOOD.replace("// SAFETY: the port", "// UNSAFETY: the port");
        assert_eq!(found("vmx/src/cpu/native/mod.rs", &unproven), [9]);
        let twice = GOOD.replace("g(unsafe { h(a) });", "1;\n    unsafe { h(a) };");
        assert_eq!(found("vmx/src/cpu/native/mod.rs", &twice), [10]);
    }

    #[test]
    fn blocks_are_counted() {
        let table = table(&Files::of(&[("vmx/src/cpu/native/mod.rs", GOOD)]));
        assert!(table.contains("   1 unsafe blocks in vmx/src/cpu/native/mod.rs\n"));
        assert!(table.ends_with("   1 unsafe blocks in the kernel's Rust\n"));
    }
}
