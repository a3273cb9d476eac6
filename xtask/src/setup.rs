//! `cargo xtask setup`: installs Debian packages and builds the emulated PC, once.

use std::process::ExitCode;

pub(crate) fn run(_args: &[String]) -> anyhow::Result<ExitCode> {
    anyhow::bail!("the emulated PC is not in this commit yet")
}
