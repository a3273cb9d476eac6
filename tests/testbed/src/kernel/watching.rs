//! Kernels that watch themselves: Debian's linux-source-6.1, unmodified, with the kernel's own checks of locks, lists,
//! objects and memory switched on (`debug/*.config`). Laid out as the fetched ones are.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{BUILD_PACKAGES, Flavour};
use crate::folder::WorkFolder;
use crate::linux_source::{self, Kernel};

const DEBUG: Kernel<'_> = Kernel {
    name: "debug-kernel",
    progress: "a kernel that watches itself (5 to 10 minutes on 2 cores)",
    config: concat!(
        include_str!("../../debug/kernel.config"),
        include_str!("../../debug/pages.config")
    ),
    folders: FOLDERS,
    arguments: &[],
};

const KASAN: Kernel<'_> = Kernel {
    name: "kasan-kernel",
    progress: "a kernel that checks each access (10 minutes on 2 cores)",
    config: concat!(
        include_str!("../../debug/kernel.config"),
        include_str!("../../debug/kasan.config")
    ),
    folders: FOLDERS,
    // They run before there is a shadow to ask: the PVH entry, and the memcmp it calls.
    arguments: &["KASAN_SANITIZE_enlighten.o=n", "KASAN_SANITIZE_string.o=n"],
};

const FOLDERS: &[&str] = &[
    "arch/x86",
    "block",
    "certs",
    "crypto",
    "drivers/acpi",
    "drivers/base",
    "drivers/block",
    "drivers/char",
    "drivers/clocksource",
    "drivers/cpuidle",
    "drivers/firmware",
    "drivers/irqchip",
    "drivers/net/Space.c",
    "drivers/net/loopback.c",
    "drivers/pci",
    "drivers/pnp",
    "drivers/rtc",
    "drivers/thermal",
    "drivers/tty",
    "fs",
    "include",
    "init",
    "io_uring",
    "ipc",
    "kernel",
    "lib",
    "mm",
    "net",
    "scripts",
    "security",
    "tools/arch/x86",
    "tools/build",
    "tools/include",
    "tools/lib",
    "tools/objtool",
    "tools/scripts",
    "usr",
    "virt",
];

/// What is not needed once the kernel is built. Building a module needs headers, makefiles and scripts.
const BUILT_FROM: &[&str] = &["a", "c", "cmd", "ko", "mod", "o", "S"];

/// Builds it, once: `kernel-<series>-<key>` of the work folder, and its release.
///
/// # Errors
/// A package is missing and cannot be installed, the archive does not answer, or the build fails; the
/// text names the log.
pub(super) fn ensure(work: &WorkFolder, flavour: Flavour) -> Result<(PathBuf, String)> {
    let kernel = if flavour == Flavour::Kasan {
        KASAN
    } else {
        DEBUG
    };
    let name = format!("{}-{}", flavour.series(), kernel.key());
    let dir = work.once(&format!("kernel-{name}"), |dir| {
        // Modules of one build do not load in another.
        let version = format!("LOCALVERSION=-{name}");
        build(work, &kernel, dir, &version)
            .context("the kernel that watches itself could not be built")
    })?;
    let release = fs::read_to_string(dir.join("release"))
        .with_context(|| format!("{} is damaged: remove it", dir.display()))?;
    Ok((dir, release))
}

fn build(work: &WorkFolder, kernel: &Kernel<'_>, dir: &Path, version: &str) -> Result<()> {
    let scratch = dir.join("build");
    // In the source's own folder: then nothing in it depends on where it is.
    let options = [version.to_owned()];
    let source = kernel.build(work, &scratch, None, &options, &["vmlinux", "modules"])?;

    let release = fs::read_to_string(source.join("include/config/kernel.release"))?;
    let release = release.trim();
    let built = source.join("vmlinux");
    linux_source::strip(&built, &dir.join("vmlinux"))?;
    fs::remove_file(built)?;
    let modules = dir.join("lib/modules").join(release).join("kernel");
    fs::create_dir_all(&modules)?;
    let order = fs::read_to_string(source.join("modules.order"))?;
    for module in order.lines() {
        // modules.order names the objects.
        let module = source.join(module).with_extension("ko");
        let name = module.file_name().context("a module without a name")?;
        fs::copy(&module, modules.join(name))
            .with_context(|| format!("cannot copy {}", module.display()))?;
    }
    remove_built_from(&source)?;
    let headers = dir.join("usr/src").join(format!("linux-headers-{release}"));
    fs::create_dir_all(dir.join("usr/src"))?;
    fs::rename(&source, headers)?;
    fs::write(dir.join(BUILD_PACKAGES), "make\ngcc\nlibelf-dev")?;
    fs::write(dir.join("release"), release)?;
    fs::remove_dir_all(&scratch)?;
    Ok(())
}

/// Takes the files of [`BUILT_FROM`] out of a folder and those below it.
fn remove_built_from(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            remove_built_from(&path)?;
        } else if path
            .extension()
            .is_some_and(|e| BUILT_FROM.iter().any(|b| e == *b))
        {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}
