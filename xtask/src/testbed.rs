//! `cargo xtask testbed`: boots the emulated VT-x PC.

use std::process::ExitCode;

pub(crate) fn run(_args: &[String]) -> anyhow::Result<ExitCode> {
    anyhow::bail!("the emulated PC is not in this commit yet")
}
