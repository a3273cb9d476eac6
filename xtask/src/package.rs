//! `cargo xtask package`: a Debian package of the Linux module, and what is in it as a folder.
//!
//! The package has no module. It has what one is built from without Rust, the C half and the compiled object, and
//! DKMS builds it for each kernel on the machine where it is installed.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use testbed::folder::workspace_root;
use testbed::{Flavour, Kernel, WorkFolder, command, packages};

use crate::module::{self, VERSION};
use crate::{conformance, setup};

const HELP: &str = "usage: cargo xtask package [--check]
Builds target/package/haxm-dkms_VERSION_amd64.deb, which builds and installs the module by DKMS for each kernel of
the machine it is installed on; needs no Rust there. target/package/files/usr/src/haxm-VERSION is the same for other
distributions: `dkms add` takes it.
  --check   unpack it, build a module from it as DKMS would, and use that on the emulated PC";

/// Files of the package that are files of the workspace: from, to, whether it is a program.
const FILES: &[(&str, &str, bool)] = &[
    ("driver/linux/package/control", "DEBIAN/control", false),
    ("driver/linux/package/postinst", "DEBIAN/postinst", true),
    ("driver/linux/package/prerm", "DEBIAN/prerm", true),
    (
        "driver/linux/package/dkms.conf",
        "usr/src/haxm-@VERSION@/dkms.conf",
        false,
    ),
    (
        "driver/linux/99-haxm.rules",
        "usr/lib/udev/rules.d/99-haxm.rules",
        false,
    ),
    ("LICENSE", "usr/share/doc/haxm-dkms/copyright", false),
    (
        "docs/manual-linux.md",
        "usr/share/doc/haxm-dkms/manual-linux.md",
        false,
    ),
    ("docs/api.md", "usr/share/doc/haxm-dkms/api.md", false),
];

/// Has the module loaded at each start.
const AT_START: (&str, &str) = ("usr/lib/modules-load.d/haxm.conf", "haxm\n");

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    match args {
        [] => {
            println!("package  {}", build()?.display());
            Ok(ExitCode::SUCCESS)
        }
        [word] if word == "--check" => {
            check(&setup::everything(Flavour::Cloud6_1)?)?;
            Ok(ExitCode::SUCCESS)
        }
        [word] if matches!(word.as_str(), "--help" | "-h") => {
            println!("{HELP}");
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("cannot make sense of '{}'\n{HELP}", args.join(" ")),
    }
}

/// Builds the package; returns its path.
///
/// # Errors
/// The module does not compile, or this is not Debian.
pub(crate) fn build() -> Result<PathBuf> {
    let object = module::build_object()?;
    let work = WorkFolder::at(&workspace_root().join("target/package"))?;
    let _lock = work.lock("package")?;
    let root = work.path("files");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fill(&root, &object)?;
    let package = work.path(&format!("haxm-dkms_{VERSION}_amd64.deb"));
    command::output(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "--build"])
            .args([&root, &package]),
    )?;
    Ok(package)
}

fn fill(root: &Path, object: &Path) -> Result<()> {
    let sources = workspace_root();
    module::lay_out(&sources, &root.join(source_folder()), object)?;
    for (from, to, _) in FILES {
        let text = fs::read_to_string(sources.join(from)).with_context(|| (*from).to_owned())?;
        write(&root.join(versioned(to)), &versioned(&text))?;
    }
    let (path, text) = AT_START;
    write(&root.join(path), text)?;
    // Whatever the umask says.
    set_modes(root)?;
    for (_, to, _) in FILES.iter().filter(|(_, _, is_program)| *is_program) {
        fs::set_permissions(root.join(to), fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn source_folder() -> String {
    versioned("usr/src/haxm-@VERSION@")
}

fn versioned(text: &str) -> String {
    text.replace("@VERSION@", VERSION)
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn set_modes(folder: &Path) -> Result<()> {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            set_modes(&path)?;
        } else {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
        }
    }
    Ok(())
}

/// The module that is built from what the package holds loads and works.
///
/// # Errors
/// The package lacks something, or what is in it does not build or not work.
pub(crate) fn check(parts: &setup::Parts) -> Result<()> {
    let kernel = Kernel::ensure(&WorkFolder::open()?, Flavour::Cloud6_1)?;
    let module = build_and_use(&kernel)?;
    let script = conformance::script("pio/out_sizes", false);
    let outcome = conformance::pc(&module, &parts.conformance, &script).run(&mut io::stdout())?;
    println!("package  {outcome}");
    ensure!(outcome.success(), "the package's module does not work");
    Ok(())
}

/// Builds the package and, from what it holds, a module as DKMS does: cleaned first. Returns the module's path.
fn build_and_use(kernel: &Kernel) -> Result<PathBuf> {
    let package = build()?;
    packages::ensure_packages(module::NEEDED)?;
    kernel.ensure_build_packages()?;
    let work = WorkFolder::at(&workspace_root().join("target/package"))?;
    let unpacked = work.path("unpacked");
    if unpacked.exists() {
        fs::remove_dir_all(&unpacked)?;
    }
    command::output(
        Command::new("dpkg-deb")
            .arg("--extract")
            .args([&package, &unpacked]),
    )?;
    let folder = unpacked.join(source_folder());
    for file in [
        "usr/lib/udev/rules.d/99-haxm.rules",
        "usr/lib/modules-load.d/haxm.conf",
    ] {
        ensure!(unpacked.join(file).is_file(), "the package lacks {file}");
    }
    let instructions = fs::read_to_string(folder.join("dkms.conf"))?;
    ensure!(
        instructions.contains(&format!("PACKAGE_VERSION=\"{VERSION}\"")),
        "dkms.conf names another version"
    );
    for (word, log) in [("clean", "clean.log"), ("modules", "build.log")] {
        let mut make = Command::new("make");
        make.arg("-C")
            .arg(&folder)
            .arg(word)
            .arg(format!("KDIR={}", kernel.headers_dir.display()))
            .arg(format!("CC={}", kernel.compiler))
            .env_remove("MAKEFLAGS");
        command::logged(&mut make, &unpacked.join(log))?;
    }
    Ok(folder.join("haxm.ko"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_of_the_package_is_there_and_names_the_version_where_it_must() {
        for (from, _, _) in FILES {
            assert!(workspace_root().join(from).is_file(), "{from}");
        }
        for file in ["control", "postinst", "prerm", "dkms.conf"] {
            let path = workspace_root().join("driver/linux/package").join(file);
            let text = fs::read_to_string(path).unwrap();
            assert!(text.contains("@VERSION@"), "{file}");
            assert!(
                !versioned(&text).contains('@') || file == "control",
                "{file}"
            );
        }
    }
}
