//! The small pieces compiled for every boot: boot sector, /init, the clock shim, a VGA ROM; and
//! busybox, which gives the guest a shell.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::cpio::Initramfs;
use crate::folder::{WorkFolder, key, progress};
use crate::packages;

const BOOT: &str = include_str!("boot.S");
const INIT: &str = include_str!("../guest/init.c");
const CLOCK: &str = include_str!("../guest/clock.c");

/// The pieces, in the work folder.
#[derive(Clone, Debug)]
pub struct Pieces {
    folder: PathBuf,
}

impl Pieces {
    /// Builds them, once per version of their sources.
    ///
    /// # Errors
    /// A compiler is missing or fails, or busybox cannot be fetched.
    pub fn ensure(work: &WorkFolder) -> Result<Self> {
        let name = format!("pieces-{}", key(&[BOOT, INIT, CLOCK, "1"]));
        let folder = work.once(&name, |dir| {
            progress("building the boot sector and /init");
            compile(dir).context("the emulated PC's own programs do not build")?;
            let busybox = packages::fetch(work, &["busybox-static"])?;
            packages::unpack(&busybox, dir)?;
            let list = command::output(Command::new(dir.join("bin/busybox")).arg("--list"))?;
            fs::write(dir.join("applets"), list)?;
            Ok(())
        })?;
        Ok(Self { folder })
    }

    /// The boot sector's bytes.
    ///
    /// # Errors
    /// The work folder is damaged.
    pub fn boot_sector(&self) -> Result<Vec<u8>> {
        let path = self.folder.join("boot.bin");
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// The library that hides the host's clock from the emulator.
    #[must_use]
    pub fn clock(&self) -> PathBuf {
        self.folder.join("clock.so")
    }

    /// A VGA ROM that does nothing.
    #[must_use]
    pub fn vga_rom(&self) -> PathBuf {
        self.folder.join("vga.rom")
    }

    /// Puts /init, the console's node, busybox and its commands into an initramfs. What is already
    /// there under one of the names stays.
    ///
    /// # Errors
    /// The work folder is damaged.
    pub fn add_to(&self, fs: &mut Initramfs) -> Result<()> {
        let init = fs::read(self.folder.join("init"))?;
        fs.bytes("/init", init, 0o755)
            .symlink("/bin/tick", "../init");
        fs.char_device("/dev/console", 5, 1);
        for dir in ["/proc", "/sys", "/tmp", "/root", "/etc"] {
            fs.directory(dir);
        }
        fs.host_file("/bin/busybox", self.folder.join("bin/busybox"));
        for applet in fs::read_to_string(self.folder.join("applets"))?.lines() {
            let path = format!("/bin/{applet}");
            if applet != "busybox" && !fs.contains(&path) {
                fs.symlink(&path, "busybox");
            }
        }
        Ok(())
    }
}

fn compile(dir: &Path) -> Result<()> {
    let source = |name: &str, text: &str| -> Result<PathBuf> {
        let path = dir.join(name);
        fs::write(&path, text)?;
        Ok(path)
    };
    let (boot, init, clock) = (
        source("boot.S", BOOT)?,
        source("init.c", INIT)?,
        source("clock.c", CLOCK)?,
    );
    let object = dir.join("boot.o");
    let run = |program: &str, words: &[&str], files: &[&Path]| {
        command::output(Command::new(program).args(words).args(files)).map(drop)
    };
    run("as", &["--32", "-o"], &[&object, &boot])?;
    let flat = [
        "-m",
        "elf_i386",
        "-Ttext=0x7c00",
        "--oformat=binary",
        "-e",
        "_start",
        "-o",
    ];
    run("ld", &flat, &[&dir.join("boot.bin"), &object])?;
    run(
        "gcc",
        &["-O2", "-Wall", "-static", "-s", "-o"],
        &[&dir.join("init"), &init],
    )?;
    run(
        "gcc",
        &["-O2", "-Wall", "-shared", "-fPIC", "-o"],
        &[&dir.join("clock.so"), &clock],
    )?;
    fs::write(dir.join("vga.rom"), vga_rom())?;
    Ok(())
}

/// The smallest option ROM a BIOS accepts: signature, one block of 512 bytes, `retf`, and a byte
/// that brings the sum to 0.
fn vga_rom() -> Vec<u8> {
    let mut rom = vec![0_u8; 512];
    rom[..4].copy_from_slice(&[0x55, 0xaa, 1, 0xcb]);
    let sum = rom.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b));
    rom[511] = sum.wrapping_neg();
    rom
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rom_sums_to_zero() {
        assert_eq!(vga_rom().iter().fold(0_u8, |s, b| s.wrapping_add(*b)), 0);
    }

    #[test]
    fn the_sources_build_and_the_boot_sector_is_one_sector() {
        // Where there is no compiler the test bed cannot be used anyway.
        if Command::new("gcc").arg("--version").output().is_err() {
            return;
        }
        let dir = std::env::temp_dir().join(format!("haxm-pieces-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        compile(&dir).unwrap();
        let boot = fs::read(dir.join("boot.bin")).unwrap();
        assert_eq!((boot.len(), &boot[510..]), (512, &[0x55, 0xaa][..]));
        fs::remove_dir_all(&dir).unwrap();
    }
}
