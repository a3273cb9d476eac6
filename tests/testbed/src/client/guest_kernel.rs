//! The kernel of the Linux guest: Debian's linux-source-6.1, unmodified, in a configuration with only
//! what our guest needs (`guest/linux/kernel.config`). Costs about 200 seconds of processor time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::folder::{WorkFolder, key, progress};
use crate::{command, linux_source, packages};

/// Packages to be installed to build it.
pub const NEEDED: &[&str] = linux_source::NEEDED;

const CONFIG: &str = include_str!("../../guest/linux/kernel.config");

/// The folders that are compiled or hold headers and tools for it.
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
    let mut recipe = [FOLDERS, linux_source::IDENTITY].concat();
    recipe.extend([CONFIG, linux_source::PACKAGE, "1"]);
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
    linux_source::unpack(&scratch, &source, FOLDERS)?;
    let fragment = scratch.join("kernel.config");
    fs::write(&fragment, CONFIG)?;

    progress("building the guest's kernel (about 2 minutes on 2 cores)");
    let make = |arguments: &[&str], log: &str| {
        let mut make = linux_source::make(&source);
        make.args(arguments);
        make.arg(format!("O={}", objects.display()));
        make.arg(format!("KCONFIG_ALLCONFIG={}", fragment.display()));
        command::logged(&mut make, &work.path(log))
    };
    make(&["allnoconfig"], "guest-kernel-configure.log")?;
    linux_source::check_configuration(CONFIG, &fs::read_to_string(objects.join(".config"))?)?;
    make(&["-j2", "bzImage"], "guest-kernel-make.log")?;

    fs::rename(objects.join("arch/x86/boot/bzImage"), dir.join("bzImage"))?;
    fs::rename(objects.join("System.map"), dir.join("System.map"))?;
    let (built, kept) = (objects.join("vmlinux"), dir.join("vmlinux"));
    command::output(Command::new("strip").arg("-o").arg(kept).arg(built))?;
    fs::remove_dir_all(&scratch)?;
    Ok(())
}
