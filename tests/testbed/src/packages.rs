//! Debian's packages: installed where they must be (the only thing here that asks for root), or
//! only fetched and unpacked. No name of a mirror is written down: apt knows its own.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::archive::Archive;
use crate::command;
use crate::folder::{WorkFolder, progress};

/// What the test bed itself needs installed to build and boot the emulated PC.
pub const NEEDED: &[&str] = &["gcc", "g++", "make", "libc6-dev", "lz4", "xz-utils", "zstd"];

/// Those of `packages` that are not installed.
///
/// # Errors
/// dpkg-query cannot be run: this is not Debian.
pub fn missing(packages: &[&str]) -> Result<Vec<String>> {
    // It fails when a package is unknown, and still lists the others.
    let out = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status} ${Package}\\n"])
        .args(packages)
        .output()
        .context("cannot run dpkg-query: the test bed is made for Debian and its derivatives")?;
    let text = String::from_utf8_lossy(&out.stdout);
    let installed: BTreeSet<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix("installed "))
        .collect();
    let wanted = packages.iter().filter(|p| !installed.contains(*p));
    Ok(wanted.map(|p| (*p).to_owned()).collect())
}

/// Installs those of `packages` that are missing; does nothing, and asks for nothing, when all are
/// there.
///
/// # Errors
/// Packages are missing and cannot be installed; the text says what to type.
pub fn ensure_packages(packages: &[&str]) -> Result<()> {
    let wanted = missing(packages)?;
    if wanted.is_empty() {
        return Ok(());
    }
    progress(&format!("installing {}", wanted.join(" ")));
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(wanted.iter().map(String::as_str));
    ensure!(
        is_root() || has_sudo(),
        "packages are missing; as root, type: apt-get update && apt-get {}",
        install.join(" ")
    );
    if as_root(&install).is_err() {
        // The lists may be absent or name versions that are gone.
        as_root(&["update"])?;
        as_root(&install)?;
    }
    let still = missing(packages)?;
    ensure!(
        still.is_empty(),
        "apt-get did not install {}",
        still.join(" ")
    );
    Ok(())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn has_sudo() -> bool {
    Command::new("sudo").arg("-V").output().is_ok()
}

/// Runs apt-get as root: directly, or through sudo.
fn as_root(arguments: &[&str]) -> Result<()> {
    let mut command = if is_root() {
        let mut c = Command::new("apt-get");
        c.env("DEBIAN_FRONTEND", "noninteractive");
        c
    } else {
        let typed = format!("sudo apt-get {}", arguments.join(" "));
        ensure!(
            has_sudo(),
            "this needs root once; as root, type: {}",
            &typed[5..]
        );
        progress(&format!("root is needed for: {typed}"));
        let mut c = Command::new("sudo");
        c.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        c
    };
    command.args([
        "-q",
        "-o",
        "Dpkg::Use-Pty=0",
        "-o",
        "DPkg::Lock::Timeout=300",
    ]);
    command.args(arguments);
    // Password prompts of sudo go to the terminal itself, not through these.
    command::output(&mut command)
        .map(drop)
        .with_context(|| format!("as root, type: apt-get {}", arguments.join(" ")))
}

/// Reads the package lists anew.
///
/// # Errors
/// Not root and no sudo, or the mirror does not answer.
pub fn refresh_lists() -> Result<()> {
    progress("reading the package lists anew (apt-get update)");
    as_root(&["update"])
}

/// All package names of this machine's release that begin with `prefix`.
///
/// # Errors
/// See [`Archive::names`].
pub fn names(prefix: &str) -> Result<Vec<String>> {
    Archive::machine().names(prefix)
}

/// Fetches packages of this machine's release.
///
/// # Errors
/// See [`Archive::fetch`].
pub fn fetch(work: &WorkFolder, packages: &[&str]) -> Result<Vec<PathBuf>> {
    Archive::machine().fetch(work, packages)
}

/// Unpacks package files into a folder, without running anything of theirs.
///
/// # Errors
/// A file is damaged or the folder cannot be written.
pub fn unpack(files: &[PathBuf], into: &Path) -> Result<()> {
    for file in files {
        command::output(Command::new("dpkg").arg("-x").arg(file).arg(into))?;
    }
    Ok(())
}

/// Fetches a file that lies in the archive's pool beside the package `beside`, from the mirror apt
/// would take that package from, by apt's own means (proxies included).
///
/// # Errors
/// The file is not on the mirror, or its SHA-256 is another.
pub fn fetch_from_pool(beside: &str, file: &str, sha256: &str, to: &Path) -> Result<()> {
    let text =
        command::output(Command::new("apt-get").args(["-q", "download", "--print-uris", beside]))?;
    let uri = text.split('\'').nth(1).and_then(|uri| uri.rsplit_once('/'));
    let Some((pool, _)) = uri else {
        bail!("apt does not say where {beside} comes from");
    };
    let uri = format!("{pool}/{}", file.replace('+', "%2b"));
    let temporary = to.with_extension("part");
    command::output(
        Command::new("/usr/lib/apt/apt-helper")
            .args(["download-file", &uri])
            .arg(&temporary)
            .arg(format!("SHA256:{sha256}")),
    )?;
    let sum = command::output(Command::new("sha256sum").arg(&temporary))?;
    ensure!(
        sum.starts_with(sha256),
        "{file} has another SHA-256 than expected"
    );
    fs::rename(&temporary, to)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn installed_and_unknown_packages_are_told_apart() {
        // Where there is no dpkg there is nothing to test.
        let Ok(list) = missing(&["dpkg", "no-such-package-anywhere"]) else {
            return;
        };
        assert_eq!(list, ["no-such-package-anywhere"]);
        ensure_packages(&["dpkg"]).unwrap();
    }
}
