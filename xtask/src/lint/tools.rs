//! Checks that other programs make.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use testbed::folder::workspace_root;

/// The packages that become a kernel object: they have no tests and no standard library.
const KERNEL_OBJECT: [&str; 2] = ["haxm-linux", "haxm-object"];

fn cargo(folder: &Path, words: &[&str]) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let status = Command::new(program)
        .current_dir(folder)
        .args(words)
        .status()?;
    ensure!(status.success(), "`cargo {}` failed", words.join(" "));
    Ok(())
}

/// `cargo fmt --check` over all crates; names the files it would change.
pub(crate) fn format() -> Result<()> {
    format_in(&workspace_root())
}

fn format_in(folder: &Path) -> Result<()> {
    cargo(
        folder,
        &["fmt", "--all", "--check", "--", "--files-with-diff"],
    )
}

/// Clippy over all crates with their tests, and over the kernel object without.
pub(crate) fn clippy() -> Result<()> {
    let root = workspace_root();
    let [ours, linked] = KERNEL_OBJECT;
    clippy_in(
        &root,
        &[
            "--workspace",
            "--exclude",
            ours,
            "--exclude",
            linked,
            "--all-targets",
        ],
    )?;
    clippy_in(&root, &["--package", ours, "--package", linked])
}

fn clippy_in(folder: &Path, what: &[&str]) -> Result<()> {
    let words = ["clippy", "--quiet", "--locked", "--keep-going"];
    cargo(
        folder,
        &[&words[..], what, &["--", "-D", "warnings"]].concat(),
    )
}

/// The module's Rust object: no panics, bounds checks, overflow checks or allocation errors, no
/// large stack frames.
pub(crate) fn module() -> Result<()> {
    crate::module::build_object().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;

    /// A package of one file, apart from the workspace.
    fn package(name: &str, source: &str) -> PathBuf {
        let folder = workspace_root().join("target/lint-tests").join(name);
        fs::create_dir_all(folder.join("src")).unwrap();
        let package = format!("name = \"{name}\"\nversion = \"0.0.0\"\n");
        let manifest = format!("[package]\n{package}edition = \"2024\"\n[workspace]\n");
        fs::write(folder.join("Cargo.toml"), manifest).unwrap();
        let lock = format!("version = 4\n\n[[package]]\n{package}");
        fs::write(folder.join("Cargo.lock"), lock).unwrap();
        fs::write(folder.join("src/lib.rs"), source).unwrap();
        folder
    }

    #[test]
    fn code_out_of_format_fails() {
        let good = package("good-format", "//! Good.\n\nfn _f() {}\n");
        assert!(format_in(&good).is_ok());
        let bad = package("bad-format", "//! Bad.\n\nfn _f( ) { }\n");
        assert!(format_in(&bad).is_err());
    }

    #[test]
    fn what_clippy_warns_of_fails() {
        let all = ["--workspace", "--all-targets"];
        let good = package("good-clippy", "//! Good.\nfn _f() {}\n");
        assert!(clippy_in(&good, &all).is_ok());
        let bad = package(
            "bad-clippy",
            "//! Bad.\nfn _f(a: &u8) -> u8 { a.clone() }\n",
        );
        assert!(clippy_in(&bad, &all).is_err());
    }
}
