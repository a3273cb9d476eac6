//! A kernel for the emulated PC, with its modules and the headers to build more: a stock one of Debian's,
//! resolved in the archive when first wanted, unpacked and never installed, or one of our configuration.

mod install;
mod watching;

pub(crate) use install::numbers;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::archive::Archive;
use crate::bzimage::Packing;
use crate::command;
use crate::folder::{WorkFolder, progress};
use crate::packages;

/// Which kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flavour {
    /// Linux 6.1, cloud configuration: Debian 12's own, and the quickest to boot.
    #[default]
    Cloud6_1,
    /// Linux 6.12, cloud configuration, of Debian 12's backports.
    Cloud6_12,
    /// The newest Linux 7, cloud configuration, that Debian 13's backports have: what users of
    /// newer systems have, and what the module must build for next.
    Cloud7,
    /// Linux 6.1 with PREEMPT_RT, of Debian 12.
    Rt6_1,
    /// As [`Flavour::Cloud7`], with PREEMPT_RT.
    Rt7,
    /// Linux 6.1, built here with the kernel's checks of locks (lockdep), sleep, lists, objects and memory.
    Debug,
    /// The same with each access to memory checked (KASAN) and undefined behaviour of C (UBSAN).
    Kasan,
}

impl Flavour {
    /// All of them.
    pub const ALL: &[Flavour] = &[
        Flavour::Cloud6_1,
        Flavour::Cloud6_12,
        Flavour::Cloud7,
        Flavour::Rt6_1,
        Flavour::Rt7,
        Flavour::Debug,
        Flavour::Kasan,
    ];

    /// The series, as people and package names write it.
    #[must_use]
    pub fn series(self) -> &'static str {
        match self {
            Flavour::Cloud6_1 => "6.1",
            Flavour::Cloud6_12 => "6.12",
            Flavour::Cloud7 => "7",
            Flavour::Rt6_1 => "6.1-rt",
            Flavour::Rt7 => "7-rt",
            Flavour::Debug => "debug",
            Flavour::Kasan => "kasan",
        }
    }

    /// How the name of its package begins, after `linux-image-`, and how it ends.
    fn package(self) -> (&'static str, &'static str) {
        let (series, real_time) = match self.series().strip_suffix("-rt") {
            Some(series) => (series, true),
            None => (self.series(), false),
        };
        (
            series,
            if real_time {
                "-rt-amd64"
            } else {
                "-cloud-amd64"
            },
        )
    }

    /// Whether it comes from a later release of Debian's than this machine's.
    fn is_later(self) -> bool {
        matches!(self, Flavour::Cloud7 | Flavour::Rt7)
    }

    /// Whether it watches itself, which takes memory and some times the instructions.
    #[must_use]
    pub fn is_watching(self) -> bool {
        matches!(self, Flavour::Debug | Flavour::Kasan)
    }

    /// What its command line ends with on a PC of so many processors.
    ///
    /// A store to the monitored line ends MWAIT (SDM 9.10.4 "MONITOR/MWAIT Instruction"), but Bochs 3.0 misses some: its
    /// MONITOR drops TLB entries as if the physical address were the linear one, so a processor with an entry for the
    /// page writes on unseen. This kernel then sleeps for minutes with work to do; one in HLT is woken by interrupt.
    pub(crate) fn arguments(self, cpus: u32) -> &'static str {
        if self.is_watching() && cpus > 1 {
            " idle=halt"
        } else {
            ""
        }
    }

    /// The flavour with this series.
    ///
    /// # Errors
    /// There is none.
    pub fn from_series(series: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|f| f.series() == series);
        found.copied().with_context(|| {
            format!("no kernel series '{series}' (6.1, 6.12, 7, 6.1-rt, 7-rt, debug, kasan)")
        })
    }
}

/// The suites that [`Flavour::Cloud7`] comes from.
const LATER: &[&str] = &["trixie", "trixie-backports"];
/// The file in a kernel's folder that lists [`Kernel::build_packages`].
const BUILD_PACKAGES: &str = "build-packages";
/// The file in a kernel's folder that stands for a compiler this machine does not have.
const COMPILER: &str = "cc";

/// A kernel in the work folder.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` prints it.
    pub release: String,
    /// The uncompressed kernel.
    pub vmlinux: PathBuf,
    /// `lib/modules/<release>`; modules may be packed (`.ko.xz`).
    pub modules_dir: PathBuf,
    /// What `make -C` wants for building modules (`KDIR`).
    pub headers_dir: PathBuf,
    /// The compiler Debian built it with, for modules: `gcc-12`. The path of a script where this
    /// release of Debian does not have that one.
    pub compiler: String,
    /// The Debian packages that building a module needs installed.
    pub build_packages: Vec<String>,
}

impl Kernel {
    /// The newest kernel of this flavour whose headers are in the archive too, or the one built from source; once
    /// found it stays the same until the work folder is removed.
    ///
    /// # Errors
    /// None is found, or it cannot be fetched, unpacked or built.
    pub fn ensure(work: &WorkFolder, flavour: Flavour) -> Result<Self> {
        if flavour.is_watching() {
            let (dir, release) = watching::ensure(work, flavour)?;
            return Self::open(&dir, &release);
        }
        let memo = format!("kernel-{}.release", flavour.series());
        if let Some(release) = work.read(&memo) {
            let known = work.path(&format!("kernel-{}", release.trim()));
            if known.exists() {
                return Self::open(&known, release.trim());
            }
        }
        let archive = if flavour.is_later() {
            Archive::of(work, LATER, "amd64")?
        } else {
            Archive::machine()
        };
        let (series, suffix) = flavour.package();
        let mut releases = install::candidates(&archive, series, suffix)?;
        if releases.is_empty() && !flavour.is_later() {
            packages::refresh_lists()?;
            releases = install::candidates(&archive, series, suffix)?;
        }
        let mut failure = None;
        // The lists may name a version that the mirror has no more: try the next ones too.
        for release in releases.iter().rev().take(3) {
            match install::install(work, &archive, release) {
                Ok(dir) => {
                    work.write(&memo, release)?;
                    return Self::open(&dir, release);
                }
                Err(error) => {
                    progress(&format!("kernel {release}: {error:#}"));
                    failure = Some(error);
                }
            }
        }
        let none = || anyhow::anyhow!("no Linux {} in the archive", flavour.series());
        Err(failure.unwrap_or_else(none))
    }

    fn open(dir: &Path, release: &str) -> Result<Self> {
        let headers_dir = dir.join("usr/src").join(format!("linux-headers-{release}"));
        let config = fs::read_to_string(headers_dir.join(".config"))
            .with_context(|| format!("{} is damaged: remove it", dir.display()))?;
        // CONFIG_CC_VERSION_TEXT="gcc-12 (Debian ...) ..."
        let named = config
            .lines()
            .find_map(|l| l.strip_prefix("CONFIG_CC_VERSION_TEXT=\""))
            .and_then(|l| l.split(' ').next())
            .unwrap_or("gcc");
        let instead = dir.join(COMPILER);
        let compiler = if instead.exists() {
            instead.display().to_string()
        } else {
            // Some configurations name it with its target in front; the package has the plain name.
            let plain = named.strip_prefix("x86_64-linux-gnu-");
            plain.unwrap_or(named).to_owned()
        };
        let build_packages = fs::read_to_string(dir.join(BUILD_PACKAGES))
            .with_context(|| format!("{} is damaged: remove it", dir.display()))?;
        Ok(Self {
            release: release.to_owned(),
            vmlinux: dir.join("vmlinux"),
            modules_dir: dir.join("lib/modules").join(release),
            headers_dir,
            compiler,
            build_packages: build_packages.lines().map(str::to_owned).collect(),
        })
    }

    /// Installs what building a module against `headers_dir` needs: the compiler, make, and the
    /// libraries and programs of the headers' own tools.
    ///
    /// # Errors
    /// See [`packages::ensure_packages`].
    pub fn ensure_build_packages(&self) -> Result<()> {
        let names: Vec<&str> = self.build_packages.iter().map(String::as_str).collect();
        packages::ensure_packages(&names)
    }

    /// The modules to insert for `name`, in the order of insertion, `name` last: each with its name
    /// and its file, unpacked and without local symbols and type information. (Insertion looks every
    /// traced function up in the module's symbols, one by one, and checks every type.)
    ///
    /// # Errors
    /// The kernel has no such module.
    pub fn module(&self, work: &WorkFolder, name: &str) -> Result<Vec<(String, PathBuf)>> {
        let mut all = Vec::new();
        collect_modules(&self.modules_dir.join("kernel"), &mut all)?;
        let mut order = Vec::new();
        self.add_module(work, name, &all, &mut order, &mut BTreeSet::new())?;
        Ok(order)
    }

    /// A module's file in the work folder, ready to insert.
    fn ready_module(&self, work: &WorkFolder, name: &str, packed: &Path) -> Result<PathBuf> {
        let file = format!("{name}.ko");
        let folder = work.once(&format!("module-{}-{name}-1", self.release), |dir| {
            let bytes = fs::read(packed)?;
            let bytes = match Packing::of(&bytes) {
                Some(packing) => packing.unpack(&bytes)?,
                None => bytes,
            };
            let path = dir.join(&file);
            fs::write(&path, bytes)?;
            let mut strip = Command::new("strip");
            strip
                .args(["--strip-unneeded", "--remove-section=.BTF"])
                .arg(&path);
            command::output(&mut strip).map(drop)
        })?;
        Ok(folder.join(&file))
    }

    fn add_module(
        &self,
        work: &WorkFolder,
        name: &str,
        all: &[PathBuf],
        order: &mut Vec<(String, PathBuf)>,
        seen: &mut BTreeSet<String>,
    ) -> Result<()> {
        // Files say kvm-intel, the kernel says kvm_intel.
        let wanted = name.replace('-', "_");
        if !seen.insert(wanted.clone()) {
            return Ok(());
        }
        let stem = |p: &Path| {
            let file = p
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            file.split(".ko").next().unwrap_or_default().to_owned()
        };
        let path = all.iter().find(|p| stem(p).replace('-', "_") == wanted);
        let Some(path) = path else {
            bail!(
                "kernel {} has no module {name} (or has it built in)",
                self.release
            );
        };
        let file = self.ready_module(work, &stem(path), path)?;
        for needed in module_depends(&fs::read(&file)?) {
            self.add_module(work, &needed, all, order, seen)?;
        }
        order.push((stem(path), file));
        Ok(())
    }
}

/// The `depends=` string of a module's `.modinfo`.
fn module_depends(bytes: &[u8]) -> Vec<String> {
    const TAG: &[u8] = b"\0depends=";
    let Some(at) = bytes.windows(TAG.len()).position(|w| w == TAG) else {
        return Vec::new();
    };
    let text = bytes[at + TAG.len()..]
        .split(|&b| b == 0)
        .next()
        .unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    text.split(',')
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
        .collect()
}

fn collect_modules(dir: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect_modules(&entry.path(), into)?;
        } else if entry.file_name().to_string_lossy().contains(".ko") {
            into.push(entry.path());
        }
    }
    into.sort();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_watches_itself_halts_several_processors() {
        assert_eq!(Flavour::Debug.arguments(2), " idle=halt");
        assert_eq!(Flavour::Debug.arguments(1), "");
        assert_eq!(Flavour::Cloud6_1.arguments(2), "");
    }

    #[test]
    fn dependencies_of_a_module_are_read() {
        let elf = b"\x7fELF...\0license=GPL\0depends=kvm,irqbypass\0name=x\0";
        assert_eq!(module_depends(elf), ["kvm", "irqbypass"]);
        assert!(module_depends(b"\0depends=\0name=x\0").is_empty());
    }
}
