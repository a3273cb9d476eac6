//! The emulator: Bochs 3.0 built from Debian's source tarball, or Debian's own Bochs 2.7 where the
//! tarball is not to be had (slower: three times the boot).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command;
use crate::folder::{WorkFolder, key, progress};
use crate::packages;

/// Set to `own` or `debian` to choose the emulator.
pub const ENVIRONMENT: &str = "HAXM_TESTBED_BOCHS";

const TARBALL: &str = "bochs_3.0+dfsg.orig.tar.xz";
const SHA256: &str = "78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b";

/// Without it a guest that has interrupts masked when it is entered is never interrupted: see the patch.
const EXTERNAL_INTERRUPT: &str = include_str!("../patches/bochs-external-interrupt.patch");

/// Without it exits and faults right after an exception report a wrong RIP on several processors: see the patch.
const SMP_RIP: &str = include_str!("../patches/bochs-smp-rip.patch");

/// Performance counters, which Bochs has none of: see the patch.
const COUNTERS: &str = include_str!("../patches/bochs-pmu.patch");

/// The variable that switches them on, in that build.
pub(crate) const COUNTERS_ON: &str = "BOCHS_PMU";

/// What counts instructions in the profiler's build, in the place of Bochs's own empty hooks.
const INSTRUMENT: [(&str, &str); 2] = [
    ("instrument.h", include_str!("../profiler/instrument.h")),
    ("instrument.cc", include_str!("../profiler/instrument.cc")),
];

/// No debugger, no plugins, no window: twice as quick as a distribution's build.
const CONFIGURE: &[&str] = &[
    "CFLAGS=-O2 -pipe",
    "CXXFLAGS=-O2 -pipe",
    "--with-nogui",
    "--without-x",
    "--disable-docbook",
    "--enable-smp",
    "--enable-x86-64",
    "--enable-cpu-level=6",
    "--enable-all-optimizations",
    "--enable-vmx=2",
    "--enable-svm",
    "--enable-avx",
    "--enable-evex",
    "--enable-pci",
    "--enable-memtype",
    "--enable-protection-keys",
    "--enable-x86-debugger",
    // Its timer handler can deadlock with the log.
    "--disable-show-ips",
];

/// Which build it is; the two want different configuration files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// 3.0, built here.
    Own,
    /// The same, and it counts instructions: see `profiler/instrument.h`.
    Profiler,
    /// The same, and its processors can have performance counters.
    Counters,
    /// 2.7, Debian's package.
    Debian,
}

/// An emulator ready to run.
#[derive(Clone, Debug)]
pub struct Bochs {
    /// Which build.
    pub build: Build,
    /// The program.
    pub program: PathBuf,
    /// The BIOS image.
    pub bios: PathBuf,
}

impl Bochs {
    /// Fetches and builds the emulator, once.
    ///
    /// # Errors
    /// Neither build is to be had; the text gives both reasons.
    pub fn ensure(work: &WorkFolder) -> Result<Self> {
        match std::env::var(ENVIRONMENT).as_deref() {
            Ok("own") => return own(work, Build::Own),
            Ok("debian") => return debian(work),
            Ok(other) => bail!("{ENVIRONMENT} is '{other}', not own or debian"),
            Err(_) => {}
        }
        // A failed attempt is remembered, so that it is not made at each run.
        if work.read("bochs.fallback").is_some() {
            return debian(work);
        }
        own(work, Build::Own).or_else(|error| {
            progress(&format!("Bochs 3.0 is not to be had: {error:#}"));
            progress("using Debian's own Bochs, which is slower");
            let bochs =
                debian(work).with_context(|| format!("no Bochs 3.0 ({error:#}), and no other"))?;
            work.write("bochs.fallback", &format!("{error:#}\n"))?;
            Ok(bochs)
        })
    }

    /// Fetches and builds the emulator that counts instructions, once.
    ///
    /// # Errors
    /// It is not to be had.
    pub fn ensure_profiler(work: &WorkFolder) -> Result<Self> {
        own(work, Build::Profiler)
    }

    /// Fetches and builds the emulator whose processors can have performance counters, once. It is a build of its
    /// own, so that no other run depends on it.
    ///
    /// # Errors
    /// It is not to be had.
    pub fn ensure_counters(work: &WorkFolder) -> Result<Self> {
        own(work, Build::Counters)
    }
}

fn own(work: &WorkFolder, build: Build) -> Result<Bochs> {
    let mut recipe = CONFIGURE.to_vec();
    recipe.extend([TARBALL, SHA256, EXTERNAL_INTERRUPT, SMP_RIP, "1"]);
    let kind = match build {
        Build::Profiler => {
            recipe.extend(INSTRUMENT.iter().map(|(_, text)| *text));
            "profiler-"
        }
        Build::Counters => {
            recipe.push(COUNTERS);
            "counters-"
        }
        Build::Own | Build::Debian => "",
    };
    let name = format!("bochs-3.0-{kind}{}", key(&recipe));
    let folder = work.once(&name, |dir| {
        // Kept when interrupted, so that make goes on where it was.
        let source = work.path(&format!("{name}.source"));
        if !source.exists() {
            unpack_and_configure(work, &source, build)?;
        }
        progress("building Bochs 3.0 (about 2 minutes on 2 cores)");
        let jobs = std::thread::available_parallelism().map_or(2, usize::from);
        let mut make = Command::new("make");
        make.arg(format!("-j{jobs}")).current_dir(&source);
        // A surrounding make or cargo must not hand its job server down.
        make.env_remove("MAKEFLAGS").env_remove("CARGO_MAKEFLAGS");
        let made = command::logged(&mut make, &work.path("bochs-make.log"));
        if made.is_err() {
            // Perhaps an object file was cut short: the next attempt starts anew.
            fs::remove_dir_all(&source)?;
        }
        made?;
        fs::rename(source.join("bochs"), dir.join("bochs"))?;
        packages::unpack(&packages::fetch(work, &["bochsbios"])?, dir)?;
        Ok(fs::remove_dir_all(&source)?)
    })?;
    Ok(Bochs {
        build,
        program: folder.join("bochs"),
        bios: bios(&folder)?,
    })
}

/// Makes the folder `source`, ready for make.
fn unpack_and_configure(work: &WorkFolder, source: &Path, build: Build) -> Result<()> {
    let tarball = work.path(TARBALL);
    if !tarball.exists() {
        progress("fetching the source of Bochs 3.0 (4 MB)");
        packages::fetch_from_pool("bochsbios", TARBALL, SHA256, &tarball)?;
    }
    let part = source.with_extension("source.part");
    if part.exists() {
        fs::remove_dir_all(&part)?;
    }
    fs::create_dir(&part)?;
    let mut tar = Command::new("tar");
    tar.arg("xJf")
        .arg(&tarball)
        .arg("--strip-components=1")
        .arg("-C")
        .arg(&part);
    command::output(&mut tar)?;
    apply(EXTERNAL_INTERRUPT, &part)?;
    apply(SMP_RIP, &part)?;
    if build == Build::Counters {
        apply(COUNTERS, &part)?;
    }
    let mut configure = Command::new("./configure");
    configure.args(CONFIGURE).current_dir(&part);
    if build == Build::Profiler {
        for (file, text) in INSTRUMENT {
            fs::write(part.join("instrument/stubs").join(file), text)?;
        }
        configure.arg("--enable-instrumentation");
    }
    command::logged(&mut configure, &work.path("bochs-configure.log"))?;
    Ok(fs::rename(&part, source)?)
}

/// Applies a patch of ours to a source tree. The tarball's hash is known, so it fits.
fn apply(patch: &str, source: &Path) -> Result<()> {
    packages::ensure_packages(&["patch"])?;
    let file = source.join("haxm.patch");
    fs::write(&file, patch)?;
    let mut command = Command::new("patch");
    command
        .args(["-p1", "--fuzz=0", "--batch", "-i"])
        .arg(&file)
        .current_dir(source);
    command::output(&mut command).map(drop)
}

fn debian(work: &WorkFolder) -> Result<Bochs> {
    packages::ensure_packages(&["bochs", "bochsbios"])?;
    let folder = work.once("bochs-debian", |dir| {
        packages::unpack(&packages::fetch(work, &["bochsbios"])?, dir)
    })?;
    Ok(Bochs {
        build: Build::Debian,
        program: PathBuf::from("bochs"),
        bios: bios(&folder)?,
    })
}

fn bios(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("usr/share/bochs/BIOS-bochs-latest");
    let metadata = fs::metadata(&path);
    metadata.with_context(|| {
        format!(
            "{} is not there: remove {}",
            path.display(),
            folder.display()
        )
    })?;
    Ok(path)
}
