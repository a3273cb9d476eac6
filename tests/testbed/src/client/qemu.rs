//! QEMU 7.2 with its accelerators `hax` and, to compare with, `kvm`, built from Debian's source package: static, stripped, only
//! the machines `pc` and `microvm`; and the firmware they start from.
//!
//! Debian's own binary has no `hax`. QEMU's build system enables it on Linux when asked to, without
//! a change to its source. Costs about 110 seconds of processor time.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::source;
use crate::command;
use crate::folder::{WorkFolder, key, progress};
use crate::packages;

/// Packages to be installed to build it.
pub const NEEDED: &[&str] = &[
    "dpkg-dev",
    "gcc",
    "libc6-dev",
    "libfdt-dev",
    "libglib2.0-dev",
    "libpixman-1-dev",
    "meson",
    "ninja-build",
    "patch",
    "pkg-config",
    "python3",
    "xz-utils",
    "zlib1g-dev",
];

/// Files it reads at run time: two BIOSes, and the option ROMs that load a kernel on the pc machine.
pub const FIRMWARE: &[&str] = &[
    "bios-256k.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "multiboot_dma.bin",
    "pvh.bin",
    "qboot.rom",
];

/// Where Debian's packages seabios and qemu-system-data have them.
const FIRMWARE_FOLDERS: &[&str] = &["usr/share/seabios", "usr/share/qemu"];

/// Without it a second virtual processor never starts: see the patch.
const SIPI: &str = include_str!("../../patches/qemu-sipi.patch");
const DEVICES: &str = include_str!("../../guest/linux/devices.mak");

const CONFIGURE: &[&str] = &[
    "--target-list=x86_64-softmmu",
    "--meson=/usr/bin/meson",
    "--static",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=guest",
    "--enable-system",
    "--enable-hax",
    "--enable-kvm",
    "--disable-tcg",
    "--enable-fdt=system",
    "--enable-trace-backends=nop",
    "--disable-containers",
    "--disable-debug-info",
    "--disable-docs",
    "--disable-pie",
    "--disable-qom-cast-debug",
    "--disable-stack-protector",
    "--disable-werror",
    // -O1 takes a sixth less time to compile than -Os, and the program is as quick.
    "--extra-cflags=-O1 -Wno-invalid-pch -ffunction-sections -fdata-sections",
    "--extra-ldflags=-Wl,--gc-sections",
];

const TARGET: &str = "qemu-system-x86_64";

/// A QEMU ready to run. It runs anywhere: it is one static file and its firmware.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// The program; it knows the accelerators `hax` and `kvm`.
    pub binary: PathBuf,
    /// The folder that holds [`FIRMWARE`].
    pub firmware_dir: PathBuf,
}

/// Fetches and builds it, once.
///
/// # Errors
/// A package is missing and cannot be installed, the archive does not answer, or the build fails; the
/// text names the log.
pub fn ensure(work: &WorkFolder) -> Result<Qemu> {
    let mut recipe = CONFIGURE.to_vec();
    recipe.extend([SIPI, DEVICES, "3"]);
    let folder = work.once(&format!("qemu-{}", key(&recipe)), |dir| {
        packages::ensure_packages(NEEDED)?;
        build(work, dir).context("QEMU could not be built")
    })?;
    Ok(Qemu {
        binary: folder.join(TARGET),
        firmware_dir: folder.join("firmware"),
    })
}

fn build(work: &WorkFolder, dir: &Path) -> Result<()> {
    let scratch = dir.join("build");
    let (source, objects) = (scratch.join("source"), scratch.join("objects"));
    fs::create_dir_all(&objects)?;
    collect_firmware(work, dir)?;

    progress("fetching QEMU's source package");
    source::unpack("qemu", &scratch, &source)?;
    fs::write(
        source.join("configs/devices/x86_64-softmmu/guest.mak"),
        DEVICES,
    )?;
    clear_start_up_requests(&scratch, &source)?;

    progress("building QEMU (about 1 minute on 2 cores)");
    let run = |program: &str, arguments: &[&str], log: &str| {
        let mut command = tool(program, &objects);
        command::logged(command.args(arguments), &work.path(log))
    };
    // Names of source files are in the program: the same wherever it is built.
    let map = format!(
        "--extra-cflags=-ffile-prefix-map={}=/source",
        source.display()
    );
    let configure = [CONFIGURE, &[&map]].concat();
    run("../source/configure", &configure, "qemu-configure.log")?;
    run("ninja", &["config-poison.h"], "qemu-build.log")?;
    precompile_header(&objects)?;
    run("ninja", &["-j2", TARGET], "qemu-build.log")?;
    let (built, kept) = (objects.join(TARGET), dir.join(TARGET));
    command::output(Command::new("strip").arg("-o").arg(&kept).arg(built))?;
    check(&kept)?;
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

/// A program of the build, run in the folder `objects`.
fn tool(program: &str, objects: &Path) -> Command {
    let mut command = Command::new(program);
    // The system's Python has the system's meson. A surrounding cargo must not be seen.
    let mut path = OsString::from("/usr/bin:/bin:");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    command
        .env("PATH", path)
        .env_remove("MAKEFLAGS")
        .env_remove("CARGO_MAKEFLAGS");
    command.current_dir(objects);
    command
}

fn collect_firmware(work: &WorkFolder, dir: &Path) -> Result<()> {
    let (unpacked, firmware) = (dir.join("build/firmware"), dir.join("firmware"));
    packages::unpack(
        &packages::fetch(work, &["seabios", "qemu-system-data"])?,
        &unpacked,
    )?;
    fs::create_dir_all(&firmware)?;
    for name in FIRMWARE {
        let found = FIRMWARE_FOLDERS
            .iter()
            .map(|f| unpacked.join(f).join(name))
            .find(|p| p.exists());
        let found = found.with_context(|| format!("Debian's packages have no {name} any more"))?;
        fs::copy(found, firmware.join(name))?;
    }
    Ok(())
}

/// Applies our patch, unless the source does what it is for.
fn clear_start_up_requests(scratch: &Path, source: &Path) -> Result<()> {
    let text = fs::read_to_string(source.join("hw/intc/apic.c"))?;
    let function = text
        .split_once("void apic_sipi(")
        .and_then(|(_, rest)| rest.split_once("\n}\n"));
    let (body, _) = function.context("QEMU's hw/intc/apic.c has no function apic_sipi any more")?;
    if body.contains("CPU_INTERRUPT_SIPI") {
        return Ok(());
    }
    let patch = scratch.join("qemu-sipi.patch");
    fs::write(&patch, SIPI)?;
    let mut command = Command::new("patch");
    command
        .args(["-p1", "--fuzz=0", "--batch", "-i"])
        .arg(&patch)
        .current_dir(source);
    command::output(&mut command)
        .map(drop)
        .context("patches/qemu-sipi.patch does not apply")
}

/// Compiles the header that every file of QEMU includes first, for the two sets of options there are.
/// That takes a third off the build. Where the compiler cannot use the result it ignores it.
fn precompile_header(objects: &Path) -> Result<()> {
    let commands = command::output(tool("ninja", objects).args(["-t", "commands", TARGET]))?;
    let header = "../source/include/qemu/osdep.h";
    fs::create_dir_all(objects.join(format!("{header}.gch")))?;
    for (name, mark) in [("common", "libcommon.fa.p/"), ("target", "-DNEED_CPU_H")] {
        let compile = commands
            .lines()
            .find_map(|l| l.contains(mark).then(|| l.split_once(" -MD ")));
        let (compile, _) = compile
            .flatten()
            .context("ninja lists no compiler command")?;
        let line = format!("{compile} -x c-header {header} -o {header}.gch/{name}");
        command::output(tool("sh", objects).args(["-c", &line]))?;
    }
    Ok(())
}

/// The program starts, and has the accelerator and both machines.
fn check(binary: &Path) -> Result<()> {
    for (question, answers) in [
        ("-accel", &["hax", "kvm"][..]),
        ("-M", &["pc", "microvm"][..]),
    ] {
        let text = command::output(Command::new(binary).args([question, "help"]))?;
        for answer in answers {
            let listed = text
                .lines()
                .any(|l| l.split_whitespace().next() == Some(answer));
            ensure!(listed, "the built QEMU has no {question} {answer}: {text}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the patch step on a tree with this text in the file it changes.
    fn patched(name: &str, text: &str) -> Result<String> {
        let dir = std::env::temp_dir().join(format!("haxm-sipi-{name}-{}", std::process::id()));
        let file = dir.join("hw/intc/apic.c");
        fs::create_dir_all(dir.join("hw/intc"))?;
        fs::write(&file, text)?;
        let result = clear_start_up_requests(&dir, &dir);
        let text = fs::read_to_string(&file)?;
        fs::remove_dir_all(&dir)?;
        result.map(|()| text)
    }

    #[test]
    fn a_source_that_clears_the_request_is_left_alone() {
        let text = "void apic_sipi(int d)\n{\n    clear(CPU_INTERRUPT_SIPI);\n}\n";
        assert_eq!(patched("has", text).unwrap(), text);
    }

    #[test]
    fn a_source_that_the_patch_does_not_fit_is_refused() {
        let other = "void apic_sipi(int d)\n{\n}\nint x = CPU_INTERRUPT_SIPI;\n";
        let error = patched("other", other).unwrap_err().to_string();
        assert!(error.contains("does not apply"), "{error}");
        let error = patched("none", "int x;\n").unwrap_err().to_string();
        assert!(error.contains("no function apic_sipi"), "{error}");
    }

    #[test]
    fn the_patch_adds_one_statement() {
        let added: Vec<&str> = SIPI
            .lines()
            .filter(|l| l.starts_with('+') && l.len() > 1)
            .collect();
        let line = "+    cpu_reset_interrupt(CPU(s->cpu), CPU_INTERRUPT_SIPI);";
        assert_eq!(added, ["+++ b/hw/intc/apic.c", line]);
        assert!(
            !SIPI
                .lines()
                .any(|l| l.starts_with('-') && !l.starts_with("---"))
        );
    }
}
