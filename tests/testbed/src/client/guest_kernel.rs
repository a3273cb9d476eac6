//! The kernel of the Linux guest: Debian's linux-source-6.1, unmodified, in a configuration with only
//! what our guest needs (`guest/linux/kernel.config`). Costs about 200 seconds of processor time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::source;
use crate::command;
use crate::folder::{WorkFolder, key, progress};
use crate::packages;

/// Packages to be installed to build it.
pub const NEEDED: &[&str] = &[
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

const PACKAGE: &str = "linux-source-6.1";
const CONFIG: &str = include_str!("../../guest/linux/kernel.config");

/// The folders that are compiled or hold headers and tools for it. Of the rest only Kconfig files
/// and makefiles are unpacked: a sixth of the whole.
const FOLDERS: &[&str] = &[
    "arch/x86",
    "block",
    "certs",
    "crypto",
    "drivers/base",
    "drivers/char",
    "drivers/clocksource",
    "drivers/firmware",
    "drivers/irqchip",
    "drivers/rtc",
    "drivers/tty",
    "fs",
    "include",
    "init",
    "io_uring",
    "ipc",
    "kernel",
    "lib",
    "mm",
    "scripts",
    "security",
    "tools/arch/x86",
    "tools/build",
    "tools/include",
    "tools/lib",
    "tools/objtool",
    "tools/scripts",
    "usr",
    "virt",
];

/// So that the same source gives the same kernel, whoever builds it.
const IDENTITY: &[&str] = &[
    "ARCH=x86_64",
    "KBUILD_BUILD_USER=haxm",
    "KBUILD_BUILD_HOST=testbed",
    "KBUILD_BUILD_TIMESTAMP=2023-01-01",
];

/// A built kernel.
#[derive(Clone, Debug)]
pub struct GuestKernel {
    /// Compressed, 1.1 MB, for any boot loader.
    pub bzimage: PathBuf,
    /// The ELF file without symbols, 14 MB, for loaders that know its PVH entry.
    pub vmlinux: PathBuf,
    /// Addresses of its symbols.
    pub system_map: PathBuf,
}

/// Fetches and builds it, once.
///
/// # Errors
/// A package is missing and cannot be installed, the archive does not answer, or the build fails; the
/// text names the log.
pub fn ensure(work: &WorkFolder) -> Result<GuestKernel> {
    let mut recipe = [FOLDERS, IDENTITY].concat();
    recipe.extend([CONFIG, PACKAGE, "1"]);
    let folder = work.once(&format!("guest-kernel-{}", key(&recipe)), |dir| {
        packages::ensure_packages(NEEDED)?;
        build(work, dir).context("the guest's kernel could not be built")
    })?;
    Ok(GuestKernel {
        bzimage: folder.join("bzImage"),
        vmlinux: folder.join("vmlinux"),
        system_map: folder.join("System.map"),
    })
}

fn build(work: &WorkFolder, dir: &Path) -> Result<()> {
    let scratch = dir.join("build");
    let (source, objects) = (scratch.join("source"), scratch.join("objects"));
    fs::create_dir_all(&objects)?;
    unpack(&scratch, &source)?;
    let fragment = scratch.join("kernel.config");
    fs::write(&fragment, CONFIG)?;

    progress("building the guest's kernel (about 2 minutes on 2 cores)");
    let make = |arguments: &[&str], log: &str| {
        let mut make = Command::new("make");
        make.args(IDENTITY).args(arguments).current_dir(&source);
        make.arg(format!("O={}", objects.display()));
        make.arg(format!("KCONFIG_ALLCONFIG={}", fragment.display()));
        // A surrounding make or cargo must not hand its job server down.
        make.env_remove("MAKEFLAGS").env_remove("CARGO_MAKEFLAGS");
        command::logged(&mut make, &work.path(log))
    };
    make(&["allnoconfig"], "guest-kernel-configure.log")?;
    check_configuration(&fs::read_to_string(objects.join(".config"))?)?;
    make(&["-j2", "bzImage"], "guest-kernel-make.log")?;

    fs::rename(objects.join("arch/x86/boot/bzImage"), dir.join("bzImage"))?;
    fs::rename(objects.join("System.map"), dir.join("System.map"))?;
    let (built, kept) = (objects.join("vmlinux"), dir.join("vmlinux"));
    command::output(Command::new("strip").arg("-o").arg(kept).arg(built))?;
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

/// The package is not kept: it is 139 MB and not wanted again.
fn unpack(scratch: &Path, source: &Path) -> Result<()> {
    progress("fetching the guest kernel's source (139 MB)");
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
    patterns.extend(FOLDERS.iter().map(|folder| format!("{PACKAGE}/{folder}/*")));
    let tarball = format!("usr/src/{PACKAGE}.tar.xz");
    source::unpack_part(
        &file,
        &tarball,
        &patterns,
        &scratch.join("unpacked"),
        source,
    )
}

/// Kconfig drops an option whose conditions are not met without a word.
fn check_configuration(made: &str) -> Result<()> {
    let wanted = CONFIG.lines().filter(|l| l.starts_with("CONFIG_"));
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
        let mut made = CONFIG.replace("CONFIG_SMP=y\n", "# CONFIG_SMP is not set\n");
        let error = check_configuration(&made).unwrap_err().to_string();
        assert_eq!(error, "these did not take effect: CONFIG_SMP=y");
        made.push_str("CONFIG_SMP=y\n");
        check_configuration(&made).unwrap();
    }
}
