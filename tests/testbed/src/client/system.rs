//! What can be booted in the virtual machine: three Linux kernels of Debian's and a small one, with our
//! /init; a fourth, started by UEFI firmware; GNU Mach with our first task; and two programs that need
//! no system at all.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::foreign::{self, I386};
use super::{FOLDER, Machine, guest_init};
use crate::cpio::Initramfs;
use crate::folder::WorkFolder;
use crate::kernel::{Flavour, Kernel};

/// A guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum System {
    /// A Linux 6.1 with only what our /init needs, compressed: in the work of the driver the quickest.
    #[default]
    Tiny,
    /// Debian's Linux 6.1, cloud configuration.
    Debian6_1,
    /// Debian's Linux 6.12, cloud configuration.
    Debian6_12,
    /// Debian's 32-bit Linux 6.1, with physical address extension.
    DebianI386,
    /// The GNU Mach microkernel, 32 bits, of Debian's package.
    Mach,
    /// Memtest86+, of Debian's package.
    Memtest,
    /// The boot loader iPXE, of Debian's package: 32-bit code that calls the firmware in real mode for
    /// each key and letter.
    Ipxe,
    /// UEFI firmware, OVMF, which starts Debian's generic Linux 6.1 as an EFI program.
    Ovmf,
}

/// How a run of a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The guest resets the machine, which ends QEMU, after a verdict of its own.
    Reset,
    /// It runs for ever: QEMU is ended when its output has `enough`. All is well if the output has
    /// `good` and has not `bad`. These are basic regular expressions.
    Seen {
        enough: &'static str,
        good: &'static str,
        bad: &'static str,
    },
}

impl System {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::Tiny,
        Self::Debian6_1,
        Self::Debian6_12,
        Self::DebianI386,
        Self::Mach,
        Self::Memtest,
        Self::Ipxe,
        Self::Ovmf,
    ];

    /// What the command line calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tiny => "tiny",
            Self::Debian6_1 => "debian-6.1",
            Self::Debian6_12 => "debian-6.12",
            Self::DebianI386 => "debian-i386",
            Self::Mach => "gnumach",
            Self::Memtest => "memtest86+",
            Self::Ipxe => "ipxe",
            Self::Ovmf => "ovmf",
        }
    }

    /// The guest called this.
    ///
    /// # Errors
    /// There is none; the text names all.
    pub fn from_name(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|s| s.name() == name);
        let names: Vec<&str> = Self::ALL.iter().map(|s| s.name()).collect();
        found
            .copied()
            .with_context(|| format!("no guest '{name}' ({})", names.join(", ")))
    }

    /// It runs our /init.
    #[must_use]
    pub fn is_linux(self) -> bool {
        !matches!(self, Self::Mach | Self::Memtest | Self::Ipxe)
    }

    /// The board it runs on quickest; the small one has not all that others need.
    #[must_use]
    pub fn machine(self) -> Machine {
        if self.is_linux() && self != Self::Ovmf {
            Machine::Microvm
        } else {
            Machine::Pc
        }
    }

    /// Virtual processors it can use.
    #[must_use]
    pub fn most_cpus(self) -> u32 {
        match self {
            Self::Tiny => 4,
            // Memtest86+ wakes processors by NMI, which QEMU's hax accelerator does not deliver.
            Self::Mach | Self::Memtest | Self::Ipxe => 1,
            _ => 16,
        }
    }

    /// Timer ticks a second of its kernel.
    pub(super) fn hz(self) -> u64 {
        match self {
            Self::Tiny => 100,
            _ => 250,
        }
    }

    /// Guest memory in MiB that is enough.
    #[must_use]
    pub fn memory_mb(self) -> u32 {
        match self {
            Self::Tiny => 64,
            Self::Debian6_1 | Self::DebianI386 => 192,
            Self::Debian6_12 | Self::Ovmf => 256,
            Self::Mach | Self::Ipxe => 32,
            Self::Memtest => 16,
        }
    }

    /// Memory of the emulated PC in MiB that is enough for QEMU with this guest. Its files are in the
    /// PC's memory twice while it boots.
    #[must_use]
    pub fn host_memory_mb(self) -> u32 {
        match self {
            Self::Debian6_1 | Self::Debian6_12 | Self::Ovmf => 1024,
            _ => 512,
        }
    }

    /// The kernel file, in the emulated PC.
    pub(super) fn kernel(self) -> String {
        match self {
            Self::Tiny => format!("{FOLDER}/bzImage"),
            _ => format!("{FOLDER}/kernel"),
        }
    }

    /// QEMU's `-initrd`: an initramfs, `tiny` that of the tiny Linux; for Mach a multiboot module and the kernel's orders for it.
    pub(super) fn initrd(self, tiny: &str) -> Option<String> {
        match self {
            Self::Tiny => Some(format!("{FOLDER}/{tiny}")),
            Self::Debian6_1 | Self::Debian6_12 | Self::DebianI386 | Self::Ovmf => {
                Some(format!("{FOLDER}/guest-initramfs"))
            }
            Self::Mach => Some(format!("{FOLDER}/task $(task-create) $(task-resume)")),
            Self::Memtest | Self::Ipxe => None,
        }
    }

    /// A firmware image of its own, in place of the board's.
    pub(super) fn firmware(self) -> Option<String> {
        (self == Self::Ovmf).then(|| format!("{FOLDER}/ovmf"))
    }

    pub(super) fn end(self) -> End {
        match self {
            // To the last letter: the guest writes one after the other.
            Self::Mach | Self::Ipxe => End::Seen {
                enough: r"GUEST: PASS\|GUEST: FAIL",
                good: "GUEST: PASS",
                bad: "GUEST: FAIL",
            },
            // It announces each of its tests by number. It has then ended those before.
            Self::Memtest => End::Seen {
                enough: "#4 ",
                good: "Errors: 0 ",
                bad: "Errors: *[1-9]",
            },
            _ => End::Reset,
        }
    }

    /// Fetches and builds what is not there yet.
    ///
    /// # Errors
    /// A package is missing and cannot be installed, the archive does not answer, or a build fails.
    pub fn ensure(self, work: &WorkFolder) -> Result<Files> {
        let debian = |flavour| -> Result<Files> {
            let kernel = Kernel::ensure(work, flavour)?.vmlinux;
            Ok(self.files(kernel, Some(guest_init::ensure(work)?)))
        };
        match self {
            // Client::add_to has them.
            Self::Tiny => Ok(Files(Vec::new())),
            Self::Debian6_1 => debian(Flavour::Cloud6_1),
            Self::Debian6_12 => debian(Flavour::Cloud6_12),
            Self::DebianI386 => {
                let kernel = I386::ensure(work)?.linux;
                Ok(self.files(kernel, Some(guest_init::ensure_i386(work)?)))
            }
            Self::Mach => {
                let kernel = I386::ensure(work)?.mach;
                Ok(self.files(kernel, Some(guest_init::ensure_task(work)?)))
            }
            Self::Memtest => Ok(self.files(foreign::memtest(work)?, None)),
            Self::Ovmf => {
                let (kernel, init) = (foreign::generic(work)?, guest_init::ensure(work)?);
                let mut files = self.files(kernel, Some(init));
                let firmware = foreign::ovmf(work)?;
                files.0.extend(self.firmware().map(|name| (name, firmware)));
                Ok(files)
            }
            Self::Ipxe => Ok(self.files(foreign::ipxe(work)?, None)),
        }
    }

    fn files(self, kernel: PathBuf, second: Option<PathBuf>) -> Files {
        let mut all = vec![(self.kernel(), kernel)];
        if let (Some(words), Some(file)) = (self.initrd(""), second) {
            let name = words.split(' ').next().unwrap_or_default();
            all.push((name.to_owned(), file));
        }
        Files(all)
    }
}

/// The files of a guest: where the emulated PC has them, and where they are here.
#[derive(Clone, Debug)]
pub struct Files(Vec<(String, PathBuf)>);

impl Files {
    /// Puts them into the emulated PC's initramfs.
    pub fn add_to(&self, files: &mut Initramfs) {
        for (guest, host) in &self.0 {
            files.host_file(guest, host);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_guests() {
        for system in System::ALL {
            assert_eq!(System::from_name(system.name()).unwrap(), *system);
        }
        let error = System::from_name("beos").unwrap_err().to_string();
        assert!(
            error.contains("debian-i386") && error.contains("gnumach"),
            "{error}"
        );
    }

    #[test]
    fn files_lie_where_the_command_looks_for_them() {
        let (kernel, task) = (PathBuf::from("a"), PathBuf::from("b"));
        let files = System::Mach.files(kernel, Some(task));
        let mut all = Initramfs::new();
        files.add_to(&mut all);
        let boot = super::super::Boot::of(System::Mach, Machine::Pc);
        let line = boot.shell_line();
        for file in ["/client/kernel", "/client/task"] {
            assert!(all.contains(file) && line.contains(file), "{file}: {line}");
        }
        // The dollars are the kernel's, not the shell's.
        assert!(
            line.contains("'/client/task $(task-create) $(task-resume)'"),
            "{line}"
        );
    }
}
