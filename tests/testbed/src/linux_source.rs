//! Debian's Linux source package, from which kernels of configurations of our own are built: for guests, and for the
//! emulated PC itself where it is to watch what a module does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::folder::{WorkFolder, key, progress};
use crate::{command, packages};

/// Packages to be installed to build a kernel.
pub(crate) const NEEDED: &[&str] = &[
    "bc",
    "bison",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "lz4",
    "make",
    "perl",
    "xz-utils",
];

/// The package's name.
const PACKAGE: &str = "linux-source-6.1";

/// Arguments of make: the same source gives the same kernel, whoever builds it.
const IDENTITY: &[&str] = &[
    "ARCH=x86_64",
    "KBUILD_BUILD_USER=haxm",
    "KBUILD_BUILD_HOST=testbed",
    "KBUILD_BUILD_TIMESTAMP=2023-01-01",
];

/// A kernel of a configuration of our own.
pub(crate) struct Kernel<'a> {
    /// Its logs in the work folder begin with this.
    pub(crate) name: &'a str,
    /// What it is, and how long it takes, for whoever waits.
    pub(crate) progress: &'a str,
    /// The options that are on; all others are off.
    pub(crate) config: &'a str,
    /// The folders that are compiled or hold headers and tools for it.
    pub(crate) folders: &'a [&'a str],
    /// Arguments of make besides [`IDENTITY`].
    pub(crate) arguments: &'a [&'a str],
}

impl Kernel<'_> {
    /// The same for kernels that are built alike.
    pub(crate) fn key(&self) -> String {
        let mut recipe = [self.folders, IDENTITY, self.arguments].concat();
        recipe.extend([self.config, PACKAGE, "1"]);
        key(&recipe)
    }

    /// Fetches the source and makes `targets`. Returns the source's folder, below `scratch`. What is built is there,
    /// or where `options`, arguments of make, say that `objects` are.
    ///
    /// # Errors
    /// A package is missing and cannot be installed, the archive does not answer, an option did not take effect, or
    /// the build fails; the text names the log.
    pub(crate) fn build(
        &self,
        work: &WorkFolder,
        scratch: &Path,
        objects: Option<&Path>,
        options: &[String],
        targets: &[&str],
    ) -> Result<PathBuf> {
        packages::ensure_packages(NEEDED)?;
        let source = scratch.join("source");
        fs::create_dir_all(scratch)?;
        unpack(scratch, &source, self.folders)?;
        let fragment = scratch.join("kernel.config");
        fs::write(&fragment, self.config)?;

        progress(&format!("building {}", self.progress));
        let make = |targets: &[&str], step: &str| {
            let mut make = make(&source);
            make.args(self.arguments).args(targets).args(options);
            if let Some(objects) = objects {
                make.arg(format!("O={}", objects.display()));
            }
            make.arg(format!("KCONFIG_ALLCONFIG={}", fragment.display()));
            command::logged(&mut make, &work.path(&format!("{}-{step}.log", self.name)))
        };
        make(&["allnoconfig"], "configure")?;
        let made = objects.unwrap_or(&source).join(".config");
        check_configuration(self.config, &fs::read_to_string(made)?)?;
        make(&[&["-j2"], targets].concat(), "make")?;
        Ok(source)
    }
}

/// Copies an ELF file without its symbols.
///
/// # Errors
/// strip fails.
pub(crate) fn strip(from: &Path, to: &Path) -> Result<()> {
    command::output(Command::new("strip").arg("-o").arg(to).arg(from)).map(drop)
}

/// Fetches the source and unpacks `folders` of it, and the Kconfig files and makefiles of the rest, at `source`. The
/// package is not kept: it is 139 MB and not wanted again.
///
/// # Errors
/// The archive does not answer, or the package is not as expected.
fn unpack(scratch: &Path, source: &Path, folders: &[&str]) -> Result<()> {
    progress("fetching Linux's source (139 MB)");
    let fetched = scratch.join("packages");
    fs::create_dir_all(&fetched)?;
    let download = || {
        let mut apt = Command::new("apt-get");
        apt.args(["-q", "download", PACKAGE]).current_dir(&fetched);
        command::output(&mut apt)
    };
    if download().is_err() {
        // The lists may be absent or name a version that has been replaced.
        packages::refresh_lists()?;
        download().with_context(|| format!("the package archive gives no {PACKAGE}"))?;
    }
    let file = fs::read_dir(&fetched)?
        .filter_map(|e| Some(e.ok()?.path()))
        .next();
    let file = file.with_context(|| format!("apt-get fetched no {PACKAGE}"))?;
    let mut patterns = ["Kconfig", "Makefile", "Kbuild"]
        .map(|n| format!("*/{n}*"))
        .to_vec();
    patterns.extend(folders.iter().map(|folder| format!("{PACKAGE}/{folder}")));
    let tarball = format!("usr/src/{PACKAGE}.tar.xz");
    unpack_part(
        &file,
        &tarball,
        &patterns,
        &scratch.join("unpacked"),
        source,
    )
}

/// Unpacks, from the tarball in a package such as linux-source-6.1, only what `patterns` match.
/// The tarball's top folder becomes `into`.
///
/// # Errors
/// There is no tarball in the package, or tar fails.
fn unpack_part(
    package: &Path,
    tarball: &str,
    patterns: &[String],
    scratch: &Path,
    into: &Path,
) -> Result<()> {
    packages::unpack(&[package.to_owned()], scratch)?;
    let path = scratch.join(tarball);
    if !path.is_file() {
        bail!("{} has no {tarball}", package.display());
    }
    fs::create_dir_all(into)?;
    let mut tar = Command::new("tar");
    // Debian's tarballs are compressed in blocks: two threads halve the time.
    tar.args([
        "--use-compress-program",
        "xz -T2",
        "--strip-components=1",
        "--wildcards",
    ]);
    tar.arg("-xf").arg(path).arg("-C").arg(into).args(patterns);
    command::output(&mut tar).map(drop)
}

/// `make` in `source`, with the arguments that every build has.
fn make(source: &Path) -> Command {
    let mut make = Command::new("make");
    make.args(IDENTITY).current_dir(source);
    // A surrounding make or cargo must not hand its job server down.
    make.env_remove("MAKEFLAGS").env_remove("CARGO_MAKEFLAGS");
    make
}

/// Whether each option of `wanted` is in the configuration `made` from it: Kconfig drops an option whose conditions
/// are not met without a word.
///
/// # Errors
/// Names those that are not.
fn check_configuration(wanted: &str, made: &str) -> Result<()> {
    let wanted = wanted.lines().filter(|l| l.starts_with("CONFIG_"));
    let lost: Vec<&str> = wanted.filter(|w| !made.lines().any(|l| l == *w)).collect();
    if !lost.is_empty() {
        bail!("these did not take effect: {}", lost.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_options_are_named() {
        let wanted = "# A remark\nCONFIG_64BIT=y\nCONFIG_SMP=y\n";
        let made = "CONFIG_64BIT=y\n# CONFIG_SMP is not set\n";
        let error = check_configuration(wanted, made).unwrap_err().to_string();
        assert_eq!(error, "these did not take effect: CONFIG_SMP=y");
        check_configuration(wanted, "CONFIG_SMP=y\nCONFIG_X=m\nCONFIG_64BIT=y\n").unwrap();
    }
}
