//! The client of the driver: QEMU with its `hax` accelerator, and the Linux guest it runs.
//!
//! QEMU 7.2 and the guest's kernel are built from Debian's sources, once, and kept in the work
//! folder; the guest's /init is ours (`guest/linux/`). All of it goes into the emulated PC under
//! [`FOLDER`], where [`Boot::command`] starts it.
//!
//! ```no_run
//! use testbed::client::{Boot, Client, Machine, Verdict, verdict};
//! let client = Client::ensure(&testbed::WorkFolder::open()?)?;
//! let boot = Boot { cpus: 2, ..Boot::new(Machine::Microvm) };
//! let mut pc = testbed::Pc::new().memory_mb(512).script(&boot.shell_line());
//! client.add_to(pc.files());
//! let outcome = pc.run(&mut std::io::stdout())?;
//! assert_eq!(verdict(&outcome.serial), Some(Verdict::Pass));
//! # anyhow::Ok(())
//! ```

mod boot;
mod foreign;
pub mod guest_init;
pub mod guest_kernel;
pub mod qemu;
mod source;
mod system;

pub use boot::{Boot, FOLDER, INITRAMFS, MEASURING, Machine, Verdict, verdict};
pub use guest_kernel::GuestKernel;
pub use qemu::Qemu;
pub use system::{Files, System};

use std::path::PathBuf;

use anyhow::Result;

use crate::cpio::Initramfs;
use crate::folder::WorkFolder;
use crate::packages;

/// Everything the emulated PC needs to run a guest; other guests than the tiny Linux have more
/// [`Files`].
#[derive(Clone, Debug)]
pub struct Client {
    /// The virtual machine monitor.
    pub qemu: Qemu,
    /// The guest's kernel.
    pub kernel: GuestKernel,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
}

/// Debian packages that [`Client::ensure`] installs if they are missing. To install all of the test
/// bed's packages in one go, give these to [`packages::ensure_packages`] with the others.
#[must_use]
pub fn needed() -> Vec<&'static str> {
    let mut all = [qemu::NEEDED, guest_kernel::NEEDED, guest_init::NEEDED].concat();
    all.sort_unstable();
    all.dedup();
    all
}

impl Client {
    /// Fetches and builds what is not there yet: about five minutes of processor time the first
    /// time, nothing afterwards.
    ///
    /// # Errors
    /// A package is missing and cannot be installed, the archive does not answer, or a build fails;
    /// the text says which, and where the log is.
    pub fn ensure(work: &WorkFolder) -> Result<Self> {
        packages::ensure_packages(&needed())?;
        Ok(Self {
            qemu: qemu::ensure(work)?,
            kernel: guest_kernel::ensure(work)?,
            initramfs: guest_init::ensure(work)?,
        })
    }

    /// Puts all of it under [`FOLDER`] in the emulated PC's initramfs.
    pub fn add_to(&self, files: &mut Initramfs) {
        files.host_file(&format!("{FOLDER}/qemu"), &self.qemu.binary);
        for name in qemu::FIRMWARE {
            let host = self.qemu.firmware_dir.join(name);
            files.host_file(&format!("{FOLDER}/firmware/{name}"), host);
        }
        files.host_file(&format!("{FOLDER}/bzImage"), &self.kernel.bzimage);
        files.host_file(&format!("{FOLDER}/{INITRAMFS}"), &self.initramfs);
    }

    /// Puts the guest that measures there too.
    ///
    /// # Errors
    /// Its /init does not build.
    pub fn add_measuring_to(work: &WorkFolder, files: &mut Initramfs) -> Result<()> {
        let host = guest_init::ensure_measuring(work)?;
        files.host_file(&format!("{FOLDER}/{MEASURING}"), host);
        Ok(())
    }
}
