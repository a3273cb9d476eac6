//! The programs that the guests run first: `guest/linux/init.c` in an initramfs, for 64 and for 32 bits, or
//! `measure.c`, which does nothing but measure; and `guest/mach/task.c`, the first task of GNU Mach. And one that works against them in the emulated
//! PC, `guest/vectors.c`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::cpio::Initramfs;
use crate::folder::{WorkFolder, key, progress};
use crate::packages;

/// Packages to be installed to build what runs on 64 bits.
pub const NEEDED: &[&str] = &["gcc", "libc6-dev"];

/// The sources, by their place below `guest/`.
const SOURCES: &[(&str, &str)] = &[
    ("linux/init.c", include_str!("../../guest/linux/init.c")),
    (
        "linux/measure.c",
        include_str!("../../guest/linux/measure.c"),
    ),
    ("mach/task.c", include_str!("../../guest/mach/task.c")),
    ("vectors.c", include_str!("../../guest/vectors.c")),
    ("vectors.h", include_str!("../../guest/vectors.h")),
];

/// What /init is made of.
const INIT: &[&str] = &["linux/init.c", "vectors.c"];

/// No fused or reordered arithmetic: the program compares results to the bit.
const FLAGS: &[&str] = &[
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-static",
    "-no-pie",
    "-s",
    "-Wl,--build-id=none",
];
/// Doubles in SSE registers, as on 64 bits: the program compares results to the bit.
const I386_FLAGS: &[&str] = &["-m32", "-msse2", "-mfpmath=sse"];
/// No library, no SSE: only the kernel's traps.
const TASK_FLAGS: &[&str] = &[
    "-m32",
    "-ffreestanding",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-mno-sse",
    "-nostdlib",
];

/// Builds the initramfs of the 64-bit Linux guests, once per version of its source.
///
/// # Errors
/// There is no compiler and it cannot be installed, or it fails.
pub fn ensure(work: &WorkFolder) -> Result<PathBuf> {
    initramfs(work, "guest-init", INIT, &[], &[])
}

/// The same of the guest that measures.
///
/// # Errors
/// As [`ensure`].
pub fn ensure_measuring(work: &WorkFolder) -> Result<PathBuf> {
    initramfs(work, "guest-measure", &["linux/measure.c"], &[], &[])
}

/// The same for 32-bit Linux.
///
/// # Errors
/// As [`ensure`].
pub fn ensure_i386(work: &WorkFolder) -> Result<PathBuf> {
    let version = command::output(Command::new("gcc").arg("-dumpversion"));
    let version = version.context("there is no gcc")?;
    // Not gcc-multilib, which conflicts with cross compilers.
    let multilib = format!("gcc-{}-multilib", version.trim());
    initramfs(
        work,
        "guest-init-i386",
        INIT,
        I386_FLAGS,
        &["libc6-dev-i386", &multilib],
    )
}

fn initramfs(
    work: &WorkFolder,
    name: &str,
    sources: &[&str],
    flags: &[&str],
    needed: &[&str],
) -> Result<PathBuf> {
    let folder = work.once(&format!("{name}-{}", recipe(flags)), |dir| {
        packages::ensure_packages(&[NEEDED, needed].concat())?;
        progress("building a guest's /init");
        compile(dir, "init", sources, flags)?;
        let mut files = Initramfs::new();
        // The kernel gives /init a console from this node.
        files
            .char_device("/dev/console", 5, 1)
            .host_file("/init", dir.join("init"));
        fs::write(dir.join("initramfs"), files.archive()?)?;
        Ok(())
    })?;
    Ok(folder.join("initramfs"))
}

/// Builds the first task of GNU Mach.
///
/// # Errors
/// As [`ensure`].
pub fn ensure_task(work: &WorkFolder) -> Result<PathBuf> {
    program(work, "task", &["mach/task.c"], TASK_FLAGS)
}

/// Builds the program that uses vector registers in the emulated PC.
///
/// # Errors
/// As [`ensure`].
pub fn ensure_vectors(work: &WorkFolder) -> Result<PathBuf> {
    program(work, "vectors", &["vectors.c"], &["-DSTANDALONE"])
}

fn program(work: &WorkFolder, name: &str, sources: &[&str], flags: &[&str]) -> Result<PathBuf> {
    let folder = work.once(&format!("guest-{name}-{}", recipe(flags)), |dir| {
        packages::ensure_packages(NEEDED)?;
        compile(dir, name, sources, flags)
    })?;
    Ok(folder.join(name))
}

fn recipe(flags: &[&str]) -> String {
    let mut recipe = [FLAGS, flags].concat();
    recipe.extend(SOURCES.iter().map(|(_, text)| *text));
    key(&recipe)
}

/// Compiles `sources` in `dir/source` to the program `dir/name`.
fn compile(dir: &Path, name: &str, sources: &[&str], flags: &[&str]) -> Result<()> {
    let folder = dir.join("source");
    for (file, text) in SOURCES {
        let path = folder.join(file);
        fs::create_dir_all(path.parent().unwrap_or(&folder))?;
        fs::write(path, text)?;
    }
    let mut gcc = Command::new("gcc");
    // For -m32, which does not look where Debian has the kernel's headers.
    let headers = ["-idirafter", "/usr/include/x86_64-linux-gnu"];
    gcc.args(FLAGS).args(flags).args(headers);
    gcc.arg("-o").arg(dir.join(name));
    gcc.args(sources).current_dir(&folder);
    if !flags.contains(&"-nostdlib") {
        gcc.arg("-lm");
    }
    command::output(&mut gcc)
        .map(drop)
        .with_context(|| format!("a guest's program {name} could not be built"))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    /// Compiles in a folder of its own, and hands on the program's output; `None` where there is no
    /// compiler: the test bed cannot be used there anyway.
    fn run<S: AsRef<OsStr>>(
        name: &str,
        sources: &[&str],
        flags: &[&str],
        arguments: &[S],
    ) -> Option<std::process::Output> {
        Command::new("gcc").arg("--version").output().ok()?;
        let dir = std::env::temp_dir().join(format!("haxm-guest-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        compile(&dir, name, sources, flags).unwrap();
        let out = Command::new(dir.join(name)).args(arguments).output();
        fs::remove_dir_all(&dir).unwrap();
        out.ok()
    }

    #[test]
    fn init_compiles_and_runs_in_no_other_place() {
        for sources in [INIT, &["linux/measure.c"]] {
            if let Some(out) = run::<&str>("init", sources, &[], &[]) {
                assert_eq!((out.status.code(), out.stdout.len()), (Some(2), 0));
            }
        }
    }

    #[test]
    fn vector_registers_survive_on_this_machine() {
        let flags = ["-DSTANDALONE"];
        if let Some(out) = run("vectors", &["vectors.c"], &flags, &["7", "20"]) {
            // 2 where the processor has no AVX.
            assert!(matches!(out.status.code(), Some(0 | 2)), "{out:?}");
        }
    }

    #[test]
    fn a_lost_vector_register_is_named() {
        // As if the kernel had not kept it: the system call in the middle clears one.
        let flags = ["-DSTANDALONE", "-DSPOIL"];
        if let Some(out) = run("spoilt", &["vectors.c"], &flags, &["7", "20"]) {
            let text = String::from_utf8_lossy(&out.stdout);
            let code = out.status.code();
            assert!(
                code == Some(2) || (code == Some(1) && text.contains("MM9 changed in round 0")),
                "{out:?}"
            );
        }
    }
}
