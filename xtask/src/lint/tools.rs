//! Checks that other programs make.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Result, ensure};
use testbed::folder::workspace_root;

/// Packages whose code ends up in a kernel object: not tests, no standard library.
const KERNEL_OBJECT: &str = "haxm-linux";

fn cargo(words: &[&str]) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let status = Command::new(program)
        .current_dir(workspace_root())
        .args(words)
        .status()?;
    ensure!(status.success(), "`cargo {}` failed", words.join(" "));
    Ok(())
}

/// `cargo fmt --check` over all crates.
pub(crate) fn format() -> Result<()> {
    cargo(&["fmt", "--all", "--check"])
}

/// Clippy over all crates with their tests, and over the kernel object without.
pub(crate) fn clippy() -> Result<()> {
    let words = ["clippy", "--quiet", "--locked"];
    let deny = ["--", "-D", "warnings"];
    let host = ["--workspace", "--exclude", KERNEL_OBJECT, "--all-targets"];
    cargo(&[&words[..], &host, &deny].concat())?;
    cargo(&[&words[..], &["--package", KERNEL_OBJECT], &deny].concat())
}

/// The module's Rust object: no panics, bounds checks, overflow checks or allocation errors, no
/// large stack frames.
pub(crate) fn module() -> Result<()> {
    crate::module::build_object().map(drop)
}
