//! The kernel of the Linux guest: Debian's linux-source-6.1, unmodified, in a configuration with only
//! what our guest needs (`guest/linux/kernel.config`). Costs about 200 seconds of processor time.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::folder::WorkFolder;
use crate::linux_source::{self, Kernel};

/// Packages to be installed to build it.
pub const NEEDED: &[&str] = linux_source::NEEDED;

const KERNEL: Kernel<'_> = Kernel {
    name: "guest-kernel",
    progress: "the guest's kernel (about 2 minutes on 2 cores)",
    config: include_str!("../../guest/linux/kernel.config"),
    folders: FOLDERS,
    arguments: &[],
};

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
    let folder = work.once(&format!("guest-kernel-{}", KERNEL.key()), |dir| {
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
    let objects = scratch.join("objects");
    fs::create_dir_all(&objects)?;
    KERNEL.build(work, &scratch, Some(&objects), &[], &["bzImage"])?;
    fs::rename(objects.join("arch/x86/boot/bzImage"), dir.join("bzImage"))?;
    fs::rename(objects.join("System.map"), dir.join("System.map"))?;
    linux_source::strip(&objects.join("vmlinux"), &dir.join("vmlinux"))?;
    fs::remove_dir_all(&scratch)?;
    Ok(())
}
