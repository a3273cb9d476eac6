//! The guest's initramfs: one static program, `guest/linux/init.c`; or `measure.c`, which does nothing but measure.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::cpio::Initramfs;
use crate::folder::{WorkFolder, key, progress};
use crate::packages;

/// Packages to be installed to build it.
pub const NEEDED: &[&str] = &["gcc", "libc6-dev"];

const INIT: &str = include_str!("../../guest/linux/init.c");
const MEASURE: &str = include_str!("../../guest/linux/measure.c");

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

/// Builds it, once per version of its source.
///
/// # Errors
/// There is no compiler and it cannot be installed, or it fails.
pub fn ensure(work: &WorkFolder) -> Result<PathBuf> {
    initramfs(work, "guest-init", INIT)
}

/// The same of the guest that measures.
///
/// # Errors
/// As [`ensure`].
pub fn ensure_measuring(work: &WorkFolder) -> Result<PathBuf> {
    initramfs(work, "guest-measure", MEASURE)
}

fn initramfs(work: &WorkFolder, name: &str, source: &str) -> Result<PathBuf> {
    let mut recipe = FLAGS.to_vec();
    recipe.extend([source, "1"]);
    let folder = work.once(&format!("{name}-{}", key(&recipe)), |dir| {
        packages::ensure_packages(NEEDED)?;
        progress("building the guest's /init");
        compile(dir, source).context("the guest's /init could not be built")?;
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

fn compile(dir: &Path, text: &str) -> Result<()> {
    let source = dir.join("init.c");
    fs::write(&source, text)?;
    let mut gcc = Command::new("gcc");
    gcc.args(FLAGS)
        .arg("-o")
        .arg(dir.join("init"))
        .arg(&source)
        .arg("-lm");
    command::output(&mut gcc).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_compiles_and_runs_in_no_other_place() {
        // Where there is no compiler the test bed cannot be used anyway.
        if Command::new("gcc").arg("--version").output().is_err() {
            return;
        }
        let dir = std::env::temp_dir().join(format!("haxm-guest-init-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for source in [INIT, MEASURE] {
            compile(&dir, source).unwrap();
            let out = Command::new(dir.join("init")).output().unwrap();
            assert_eq!((out.status.code(), out.stdout.len()), (Some(2), 0));
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
