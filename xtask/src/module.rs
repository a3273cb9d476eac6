//! `cargo xtask module`: builds `haxm.ko` for a kernel.
//!
//! 1. [`sysroot`]: `core` and `alloc` from the compiler's own library source, with the flags a
//!    kernel needs, once per compiler and flags.
//! 2. Cargo on top of it: the crates below `driver/linux` as one relocatable object, the same for
//!    every kernel.
//! 3. [`object`]: what that object may hold is checked.
//! 4. Kbuild: the C half, the kernel's objtool over both, and the link, per kernel.

pub(crate) mod object;
pub(crate) mod sysroot;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use testbed::folder::workspace_root;
use testbed::{Flavour, Kernel, WorkFolder, command, packages};

const HELP: &str =
    "usage: cargo xtask module [--kernel 6.1|6.12|7|6.1-rt|7-rt|debug|kasan|DIR]... [--object]
Builds target/module/KERNEL/haxm.ko. KERNEL is a series of the test machine (default 6.1), or the
folder of a kernel's headers, such as /lib/modules/$(uname -r)/build; its module then goes to
target/module/RELEASE.
  --object   stop after the Rust object and its checks";

/// What building a module needs besides the compiler (see [`sysroot::Compiler::find`]).
pub(crate) const NEEDED: &[&str] = &[
    "gcc",
    "make",
    "libc6-dev",
    "libelf-dev",
    "binutils",
    "xz-utils",
];

/// The C half and its build files, below `driver/linux`.
const SHIM: &[&str] = &[
    "Kbuild", "Makefile", "haxm.h", "user.h", "module.c", "device.c", "memory.c", "user.c",
    "fault.c", "pin.c", "copy.c", "shared.c", "cpu.c", "signal.c",
];

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let mut targets = Vec::new();
    let mut object_only = false;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(ExitCode::SUCCESS);
            }
            "--object" => object_only = true,
            "--kernel" => targets.push(args.next().context("--kernel wants a value")?.clone()),
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        }
    }
    if targets.is_empty() {
        targets.push(Flavour::default().series().to_owned());
    }
    let start = Instant::now();
    if object_only {
        build_object()?;
    } else {
        for target in &targets {
            println!("module   {}", build(target)?.display());
        }
    }
    println!("built in {:.1} s", start.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

/// Builds the module for a kernel: a series of the test machine, or the folder of a kernel's
/// headers. Returns the path of `haxm.ko`.
///
/// # Errors
/// Something is missing, does not build, or does not pass the checks.
pub(crate) fn build(kernel: &str) -> Result<PathBuf> {
    let headers = Headers::find(kernel)?;
    let work = WorkFolder::at(&folder())?;
    let sources = workspace_root();
    let object = if kernel == Flavour::Kasan.series() {
        packages::ensure_packages(NEEDED)?;
        let _lock = work.lock("object-kasan")?;
        compile_object(&sources, &work, "-kasan", "none", sysroot::KASAN)?
    } else {
        build_object()?
    };
    let _lock = work.lock(&headers.name)?;
    build_for(&sources, &headers, &object)
}

/// [`build`], the same code with line tables, in a folder of its own, for `cargo xtask profile`.
///
/// # Errors
/// Something is missing or does not build.
pub(crate) fn build_with_lines(kernel: &str) -> Result<PathBuf> {
    let mut headers = Headers::find(kernel)?;
    headers.name.push_str("-lines");
    packages::ensure_packages(NEEDED)?;
    let work = WorkFolder::at(&folder())?;
    let _lock = work.lock(&headers.name)?;
    let sources = workspace_root();
    let object = compile_object(&sources, &work, "-lines", "line-tables-only", &[])?;
    build_for(&sources, &headers, &object)
}

/// [`build`] from a copy of the workspace that is broken on purpose, in a folder of its own; the object is not checked.
///
/// # Errors
/// Something is missing or does not build.
pub(crate) fn build_broken(sources: &Path, kernel: &str) -> Result<PathBuf> {
    let mut headers = Headers::find(kernel)?;
    headers.name.push_str("-broken");
    packages::ensure_packages(NEEDED)?;
    let work = WorkFolder::at(&folder())?;
    let _lock = work.lock(&headers.name)?;
    let object = compile_object(sources, &work, "-broken", "none", &[])?;
    build_for(sources, &headers, &object)
}

/// `target/module` of the workspace.
fn folder() -> PathBuf {
    workspace_root().join("target").join("module")
}

/// Compiles the Rust half into one checked object; returns its path.
///
/// # Errors
/// It does not compile, or the object holds what it must not (each finding is in the text).
pub(crate) fn build_object() -> Result<PathBuf> {
    packages::ensure_packages(NEEDED)?;
    let work = WorkFolder::at(&folder())?;
    let _lock = work.lock("object")?;
    let object = compile_object(&workspace_root(), &work, "", "none", &[])?;
    let report = object::check(&object)?;
    ensure!(
        report.findings.is_empty(),
        "{} must not be loaded:\n  {}",
        object.display(),
        report.findings.join("\n  ")
    );
    println!("object   {}: {report}", object.display());
    Ok(object)
}

/// Compiles the Rust half of this workspace into one object, unchecked; returns its path. `suffix` tells apart what was
/// compiled with different debugging information, `debug` as Cargo names it, or with `more` of the compiler's flags.
///
/// # Errors
/// It does not compile.
fn compile_object(
    sources: &Path,
    work: &WorkFolder,
    suffix: &str,
    debug: &str,
    more: &[&str],
) -> Result<PathBuf> {
    let compiler = sysroot::Compiler::find()?.with_flags(more);
    let sysroot = compiler.sysroot(work)?;
    let target_dir = work.path(&format!("cargo{suffix}"));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let flags = compiler.flags_of_crates(&sysroot);
    let status = Command::new(cargo)
        .current_dir(sources)
        .args(["build", "--quiet", "--locked", "--profile", "module"])
        .args(["--package", "haxm-object", "--target", sysroot::TARGET])
        .env("RUSTC", &compiler.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("CARGO_PROFILE_MODULE_DEBUG", debug)
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTFLAGS")
        .env_remove("MAKEFLAGS")
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the Rust half does not compile");
    let archive = target_dir
        .join(sysroot::TARGET)
        .join("module/libhaxm_object.a");
    let object = work.path(&format!("core{suffix}.o"));
    extract(&archive, &object)?;
    Ok(object)
}

/// Takes our one object out of the archive: with fat LTO and one codegen unit there is exactly one.
fn extract(archive: &Path, object: &Path) -> Result<()> {
    let list = command::output(Command::new("ar").arg("t").arg(archive))?;
    let members: Vec<&str> = list
        .lines()
        .filter(|l| l.starts_with("haxm_object-"))
        .collect();
    let [member] = members.as_slice() else {
        bail!(
            "{}: expected one object of ours, found {members:?}",
            archive.display()
        );
    };
    let out = Command::new("ar")
        .arg("p")
        .arg(archive)
        .arg(member)
        .output()
        .context("cannot run ar")?;
    ensure!(
        out.status.success(),
        "ar cannot read {member} of {}",
        archive.display()
    );
    let temporary = object.with_extension("o.part");
    fs::write(&temporary, out.stdout)?;
    fs::rename(&temporary, object)?;
    Ok(())
}

/// A kernel to build for.
struct Headers {
    /// Name of the folder below `target/module`.
    name: String,
    /// What `make -C` wants.
    dir: PathBuf,
    /// The compiler the kernel was built with, if it is installed.
    compiler: Option<String>,
}

impl Headers {
    fn find(target: &str) -> Result<Self> {
        if let Ok(flavour) = Flavour::from_series(target) {
            let kernel = Kernel::ensure(&WorkFolder::open()?, flavour)?;
            kernel.ensure_build_packages()?;
            return Ok(Self {
                name: target.to_owned(),
                dir: kernel.headers_dir,
                compiler: Some(kernel.compiler),
            });
        }
        let dir = PathBuf::from(target).canonicalize().with_context(|| {
            format!("'{target}' is neither a kernel series nor a folder\n{HELP}")
        })?;
        let release = fs::read_to_string(dir.join("include/generated/utsrelease.h"))
            .with_context(|| format!("{} is not a kernel's build folder", dir.display()))?;
        let name = release
            .split('"')
            .nth(1)
            .context("utsrelease.h names no release")?;
        let config = fs::read_to_string(dir.join("include/config/auto.conf")).unwrap_or_default();
        let compiler = config
            .lines()
            .find_map(|l| l.strip_prefix("CONFIG_CC_VERSION_TEXT=\""))
            .and_then(|l| l.split([' ', '"']).next())
            .filter(|name| Command::new(name).arg("--version").output().is_ok());
        Ok(Self {
            name: name.to_owned(),
            dir,
            compiler: compiler.map(str::to_owned),
        })
    }
}

/// Runs Kbuild over the C half of this workspace and the object; returns the path of `haxm.ko`.
fn build_for(sources: &Path, headers: &Headers, object: &Path) -> Result<PathBuf> {
    let dir = folder().join(&headers.name);
    lay_out(sources, &dir, object)?;
    make(&dir, headers)?;
    Ok(dir.join("haxm.ko"))
}

/// Fills a folder with what a module is built from without Rust: the C half, its build files and the object.
///
/// # Errors
/// A file cannot be read or written.
pub(crate) fn lay_out(sources: &Path, dir: &Path, object: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let sources = sources.join("driver/linux");
    for file in SHIM {
        replace(&dir.join(file), &fs::read(sources.join(file))?)?;
    }
    replace(&dir.join("core.compiled"), &without_notes(object)?)?;
    replace(&dir.join("VERSION"), VERSION.as_bytes())
}

/// The module's version.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Runs the Makefile of such a folder for a kernel.
fn make(dir: &Path, headers: &Headers) -> Result<()> {
    let log = dir.join("build.log");
    let mut make = Command::new("make");
    make.arg("-C")
        .arg(dir)
        .arg(format!("KDIR={}", headers.dir.display()))
        .env_remove("MAKEFLAGS");
    if let Some(compiler) = &headers.compiler {
        make.arg(format!("CC={compiler}"));
    }
    command::logged(&mut make, &log)?;
    let text = fs::read_to_string(&log)?;
    let warnings = warnings(&text);
    ensure!(
        warnings.is_empty(),
        "the build for {} is not clean ({}):\n  {}",
        headers.name,
        log.display(),
        warnings.join("\n  ")
    );
    Ok(())
}

/// Writes a file only if its contents change, so that make sees what is new.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// The object without the sections that only [`object::check`] reads.
fn without_notes(object: &Path) -> Result<Vec<u8>> {
    let stripped = object.with_extension("stripped.o");
    command::output(
        Command::new("objcopy")
            .args(["--remove-section=.stack_sizes", "--remove-section=.comment"])
            .arg(object)
            .arg(&stripped),
    )?;
    Ok(fs::read(stripped)?)
}

/// The lines of a build's log that warn, but for what a kernel's headers say about themselves.
fn warnings(log: &str) -> Vec<String> {
    log.lines()
        .filter(|l| l.to_lowercase().contains("warning"))
        // Debian's own compiler of a later security upload; no types are made with pahole.
        .filter(|l| !l.contains("the compiler differs from the one used to build the kernel"))
        .filter(|l| !l.contains("pahole version differs from the one used to build the kernel"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_seen_and_the_known_notice_is_not() {
        let log = "  CC [M] x.o\nwarning: the compiler differs from the one used to build the kernel\n\
                   x.o: warning: objtool: 'naked' return found\n";
        assert_eq!(
            warnings(log),
            ["x.o: warning: objtool: 'naked' return found"]
        );
    }

    #[test]
    fn words_that_mean_nothing_are_refused() {
        assert!(run(&["--kernels".to_owned()]).is_err());
        assert!(run(&["--kernel".to_owned()]).is_err());
        assert!(Headers::find("/").is_err());
        assert!(Headers::find("5.4").is_err());
    }
}
