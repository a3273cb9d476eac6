//! A stock Debian kernel for the emulated PC, with its modules and the headers to build more:
//! resolved in the archive when first wanted, unpacked and never installed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::bzimage::{self, Packing};
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
}

impl Flavour {
    /// All of them.
    pub const ALL: &[Flavour] = &[Flavour::Cloud6_1, Flavour::Cloud6_12];

    /// The series, as people and package names write it.
    #[must_use]
    pub fn series(self) -> &'static str {
        match self {
            Flavour::Cloud6_1 => "6.1",
            Flavour::Cloud6_12 => "6.12",
        }
    }

    /// The flavour with this series.
    ///
    /// # Errors
    /// There is none.
    pub fn from_series(series: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|f| f.series() == series);
        found
            .copied()
            .with_context(|| format!("no kernel series '{series}' (6.1, 6.12)"))
    }
}

const SUFFIX: &str = "-cloud-amd64";
/// The file in a kernel's folder that lists [`Kernel::build_packages`].
const BUILD_PACKAGES: &str = "build-packages";

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
    /// The compiler Debian built it with, for modules: `gcc-12`.
    pub compiler: String,
    /// The Debian packages that building a module needs installed.
    pub build_packages: Vec<String>,
}

impl Kernel {
    /// The newest kernel of this flavour whose headers are in the archive too; once found it stays
    /// the same until the work folder is removed.
    ///
    /// # Errors
    /// None is found, or it cannot be fetched or unpacked.
    pub fn ensure(work: &WorkFolder, flavour: Flavour) -> Result<Self> {
        let memo = format!("kernel-{}.release", flavour.series());
        if let Some(release) = work.read(&memo) {
            let known = work.path(&format!("kernel-{}", release.trim()));
            if known.exists() {
                return Self::open(&known, release.trim());
            }
        }
        let mut releases = candidates(flavour)?;
        if releases.is_empty() {
            packages::refresh_lists()?;
            releases = candidates(flavour)?;
        }
        let mut failure = None;
        // The lists may name a version that the mirror has no more: try the next ones too.
        for release in releases.iter().rev().take(3) {
            match install(work, release) {
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
        let compiler = config
            .lines()
            .find_map(|l| l.strip_prefix("CONFIG_CC_VERSION_TEXT=\""))
            .and_then(|l| l.split(' ').next())
            .unwrap_or("gcc");
        let build_packages = fs::read_to_string(dir.join(BUILD_PACKAGES))
            .with_context(|| format!("{} is damaged: remove it", dir.display()))?;
        Ok(Self {
            release: release.to_owned(),
            vmlinux: dir.join("vmlinux"),
            modules_dir: dir.join("lib/modules").join(release),
            headers_dir,
            compiler: compiler.to_owned(),
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

/// The numbers of a version, for comparing.
fn numbers(version: &str) -> Vec<u64> {
    let digits = version.split(|c: char| !c.is_ascii_digit());
    digits.filter_map(|d| d.parse().ok()).collect()
}

/// Releases that have an image and headers, oldest first.
fn candidates(flavour: Flavour) -> Result<Vec<String>> {
    let series = flavour.series();
    let headers = packages::names(&format!("linux-headers-{series}."))?;
    let images = packages::names(&format!("linux-image-{series}."))?;
    Ok(select(&headers, &images))
}

/// `release` of each linux-headers package that has an image, signed or not, oldest first.
fn select(headers: &[String], images: &[String]) -> Vec<String> {
    let images: BTreeSet<&str> = images
        .iter()
        .filter_map(|i| i.strip_prefix("linux-image-"))
        .map(|i| i.strip_suffix("-unsigned").unwrap_or(i))
        .collect();
    let mut found: Vec<String> = headers
        .iter()
        .filter_map(|h| h.strip_prefix("linux-headers-"))
        .filter(|r| r.ends_with(SUFFIX) && images.contains(r))
        .map(str::to_owned)
        .collect();
    found.sort_by_key(|r| numbers(r));
    found.dedup();
    found
}

/// Fetches and unpacks a kernel into `kernel-<release>`.
fn install(work: &WorkFolder, release: &str) -> Result<PathBuf> {
    work.once(&format!("kernel-{release}"), |dir| {
        progress(&format!(
            "fetching Debian's kernel {release} and its headers (about 45 MB)"
        ));
        let headers = format!("linux-headers-{release}");
        let more = packages::dependencies(&headers)?;
        let more = more.iter().filter(|d| {
            d.starts_with("linux-kbuild-")
                || (d.starts_with("linux-headers-") && d.ends_with("-common"))
        });
        let mut wanted = vec![headers.as_str()];
        wanted.extend(more.map(String::as_str));
        ensure!(
            wanted.len() == 3,
            "{headers} has unusual dependencies: {wanted:?}"
        );
        // The unsigned image is the same kernel; one of the two is always in the archive.
        let (unsigned, signed) = (
            format!("linux-image-{release}-unsigned"),
            format!("linux-image-{release}"),
        );
        let known = packages::names(&unsigned)?;
        wanted.push(if known.contains(&unsigned) {
            &unsigned
        } else {
            &signed
        });
        let files = packages::fetch(work, &wanted)?;
        packages::unpack(&files, dir)?;
        fs::write(
            dir.join(BUILD_PACKAGES),
            build_packages(&headers)?.join("\n"),
        )?;
        relocate_headers(&dir.join("usr/src").join(&headers))?;
        let image = fs::read(dir.join("boot").join(format!("vmlinuz-{release}")))?;
        fs::write(dir.join("vmlinux"), bzimage::vmlinux(&image)?)?;
        // Documentation and the packed kernel are not used again.
        for path in ["usr/share", "boot"] {
            fs::remove_dir_all(dir.join(path))?;
        }
        Ok(())
    })
}

/// What the dependencies of the headers and of their tools come to, without the headers themselves.
fn build_packages(headers: &str) -> Result<Vec<String>> {
    let mut all = BTreeSet::from(["make".to_owned()]);
    for name in packages::dependencies(headers)? {
        if name.starts_with("linux-kbuild-") {
            all.extend(packages::dependencies(&name)?);
        } else if let Some(compiler) = name.strip_prefix("linux-compiler-") {
            // linux-compiler-gcc-12-x86 is an empty package that wants gcc-12.
            all.insert(compiler.trim_end_matches("-x86").to_owned());
        } else if name.starts_with("gcc-") {
            all.insert(name);
        }
    }
    Ok(all.into_iter().collect())
}

/// Debian's headers include their common part by its place after installation: make it relative.
fn relocate_headers(headers: &Path) -> Result<()> {
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile)?;
    let here = "$(dir $(lastword $(MAKEFILE_LIST)))../";
    let changed = text.replace("/usr/src/", here);
    ensure!(changed != text, "{} is not as expected", makefile.display());
    fs::write(&makefile, changed)?;
    // Their own tools are built for Debian's libraries: see here, not in a build, if they do not run.
    let modpost = headers.join("scripts/mod/modpost");
    command::output(Command::new("test").arg("-x").arg(&modpost))
        .map(drop)
        .context("the headers' scripts are not where they should be")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_release_with_headers_wins() {
        let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let headers = names(&[
            "linux-headers-6.1.0-9-cloud-amd64",
            "linux-headers-6.1.0-50-cloud-amd64",
            "linux-headers-6.1.0-51-cloud-amd64",
            "linux-headers-6.1.0-52-amd64",
            "linux-headers-6.1.0-52-common",
        ]);
        let images = names(&[
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-50-cloud-amd64-unsigned",
            "linux-image-6.1.0-52-amd64",
            "linux-image-6.1.0-51-cloud-amd64-dbg",
        ]);
        let found = select(&headers, &images);
        assert_eq!(found, ["6.1.0-9-cloud-amd64", "6.1.0-50-cloud-amd64"]);
    }

    #[test]
    fn dependencies_of_a_module_are_read() {
        let elf = b"\x7fELF...\0license=GPL\0depends=kvm,irqbypass\0name=x\0";
        assert_eq!(module_depends(elf), ["kvm", "irqbypass"]);
        assert!(module_depends(b"\0depends=\0name=x\0").is_empty());
    }
}
