//! Guests' kernels that the emulated PC itself does not run, from Debian's packages: 32-bit ones, of
//! Debian's archive for i386, firmware with the kernel it boots, and programs that need no system.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::archive::Archive;
use crate::bzimage::{self, Packing};
use crate::folder::{WorkFolder, progress};
use crate::kernel::numbers;
use crate::packages;

/// The last release of Debian that has kernels of 32 bits.
const RELEASE: &str = "bookworm";
/// Debian's Linux for 32-bit processors with physical address extension. Of each release there is a
/// package with this name, whatever becomes of the signed ones.
const LINUX: (&str, &str) = ("linux-image-6.1.", "-686-pae-unsigned");
/// The same for 64-bit processors, which can do more than the cloud configuration.
const GENERIC: (&str, &str) = ("linux-image-6.1.", "-amd64-unsigned");
const MACH: &str = "gnumach-image-1.8-486";

/// Kernels of 32 bits.
#[derive(Clone, Debug)]
pub(super) struct I386 {
    /// Linux 6.1, uncompressed, with its PVH entry.
    pub(super) linux: PathBuf,
    /// GNU Mach, uncompressed, with a multiboot header.
    pub(super) mach: PathBuf,
}

impl I386 {
    /// Fetches them, once: they stay the same until the work folder is removed.
    ///
    /// # Errors
    /// The archive does not answer or has not got them.
    pub(super) fn ensure(work: &WorkFolder) -> Result<Self> {
        let folder = work.once("guest-i386-1", |dir| {
            progress("fetching 32-bit kernels (62 MB with Debian's list of packages)");
            let archive = Archive::of(work, &[RELEASE], "i386")?;
            fetch(work, dir, &archive).context("no 32-bit kernels for the guests")
        })?;
        Ok(Self {
            linux: folder.join("vmlinux"),
            mach: folder.join("gnumach"),
        })
    }
}

fn fetch(work: &WorkFolder, dir: &Path, archive: &Archive) -> Result<()> {
    let names = releases(&archive.names(LINUX.0)?, LINUX.1);
    let name = names.last().context("the archive has no such Linux")?;
    let release = name.trim_start_matches("linux-image-");
    let release = release.trim_end_matches("-unsigned");
    let scratch = dir.join("scratch");
    packages::unpack(&archive.fetch(work, &[name, MACH])?, &scratch)?;
    let image = fs::read(scratch.join(format!("boot/vmlinuz-{release}")))?;
    fs::write(dir.join("vmlinux"), bzimage::vmlinux(&image)?)?;
    let packed = fs::read(scratch.join("boot/gnumach-1.8-486.gz"))?;
    let mach = Packing::Gzip.unpack(&packed)?;
    ensure!(mach.starts_with(b"\x7fELF"), "{MACH} holds no ELF file");
    fs::write(dir.join("gnumach"), mach)?;
    fs::remove_dir_all(scratch)?;
    Ok(())
}

/// The packages of Linux whose names end so, oldest first.
fn releases(names: &[String], end: &str) -> Vec<String> {
    let others = ["-rt-", "-cloud-"];
    let wanted =
        |name: &&String| name.ends_with(end) && !others.iter().any(|other| name.contains(other));
    let mut found: Vec<String> = names.iter().filter(wanted).cloned().collect();
    found.sort_by_key(|name| numbers(name));
    found
}

/// Memtest86+ for 64-bit processors, in the form of a Linux kernel.
///
/// # Errors
/// The archive does not answer, or the package is not as expected.
pub(super) fn memtest(work: &WorkFolder) -> Result<PathBuf> {
    image(work, "memtest86+", "boot/memtest86+x64.bin")
}

/// iPXE, in the form of a Linux kernel.
///
/// # Errors
/// As [`memtest`].
pub(super) fn ipxe(work: &WorkFolder) -> Result<PathBuf> {
    image(work, "ipxe", "boot/ipxe.lkrn")
}

/// OVMF, UEFI firmware for QEMU's PC, with its variables in one image.
///
/// # Errors
/// As [`memtest`].
pub(super) fn ovmf(work: &WorkFolder) -> Result<PathBuf> {
    image(work, "ovmf", "usr/share/ovmf/OVMF.fd")
}

/// Debian's Linux 6.1 for 64-bit machines of any kind, compressed: an EFI program too.
///
/// # Errors
/// The archive does not answer or has not got it.
pub(super) fn generic(work: &WorkFolder) -> Result<PathBuf> {
    let folder = work.once("guest-linux-generic-1", |dir| {
        progress("fetching Debian's generic kernel (71 MB)");
        let archive = Archive::machine();
        let names = releases(&archive.names(GENERIC.0)?, GENERIC.1);
        let name = names.last().context("the archive has no such Linux")?;
        let release = name.trim_start_matches("linux-image-");
        let release = release.trim_end_matches("-unsigned");
        let scratch = dir.join("scratch");
        packages::unpack(&archive.fetch(work, &[name])?, &scratch)?;
        fs::rename(
            scratch.join(format!("boot/vmlinuz-{release}")),
            dir.join("vmlinuz"),
        )?;
        Ok(fs::remove_dir_all(scratch)?)
    })?;
    Ok(folder.join("vmlinuz"))
}

/// A file of a package.
fn image(work: &WorkFolder, package: &str, file: &str) -> Result<PathBuf> {
    let folder = work.once(&format!("guest-{package}-1"), |dir| {
        let scratch = dir.join("scratch");
        packages::unpack(&Archive::machine().fetch(work, &[package])?, &scratch)?;
        fs::rename(scratch.join(file), dir.join("image"))
            .with_context(|| format!("Debian's {package} has no {file} any more"))?;
        fs::remove_dir_all(scratch)?;
        Ok(())
    })?;
    Ok(folder.join("image"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_release_comes_last() {
        let names = [
            "linux-image-6.1.0-50-686-pae-unsigned",
            "linux-image-6.1.0-9-686-pae-unsigned",
            "linux-image-6.1.0-51-rt-686-pae-unsigned",
            "linux-image-6.1.0-51-686-unsigned",
            "linux-image-6.1.0-51-686-pae",
            "linux-image-6.1.0-52-686-pae-dbg",
        ]
        .map(str::to_owned);
        let expected = [
            "linux-image-6.1.0-9-686-pae-unsigned",
            "linux-image-6.1.0-50-686-pae-unsigned",
        ];
        assert_eq!(releases(&names, LINUX.1), expected);
    }
}
