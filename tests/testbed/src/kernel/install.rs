//! Fetches a kernel and its headers and makes them usable where they lie.
//!
//! A kernel of a later release of Debian brings tools linked with that release's libraries, and
//! wants that release's compiler. The tools get their libraries, and run by their own loader; for
//! the compiler a script stands in, which drops what this machine's does not know.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::{BUILD_PACKAGES, COMPILER};
use crate::archive::Archive;
use crate::folder::{WorkFolder, progress};
use crate::{bzimage, packages};

/// The numbers of a version, for comparing.
pub(crate) fn numbers(version: &str) -> Vec<u64> {
    let digits = version.split(|c: char| !c.is_ascii_digit());
    digits.filter_map(|d| d.parse().ok()).collect()
}

/// Releases of a series that end so and have an image and headers, oldest first.
///
/// # Errors
/// The lists cannot be read.
pub(super) fn candidates(archive: &Archive, series: &str, suffix: &str) -> Result<Vec<String>> {
    let headers = archive.names(&format!("linux-headers-{series}."))?;
    let images = archive.names(&format!("linux-image-{series}."))?;
    Ok(select(&headers, &images, suffix))
}

/// `release` of each linux-headers package that has an image, signed or not, oldest first.
fn select(headers: &[String], images: &[String], suffix: &str) -> Vec<String> {
    let images: BTreeSet<&str> = images
        .iter()
        .filter_map(|i| i.strip_prefix("linux-image-"))
        .map(|i| i.strip_suffix("-unsigned").unwrap_or(i))
        .collect();
    let mut found: Vec<String> = headers
        .iter()
        .filter_map(|h| h.strip_prefix("linux-headers-"))
        .filter(|r| r.ends_with(suffix) && images.contains(r))
        .map(str::to_owned)
        .collect();
    found.sort_by_key(|r| numbers(r));
    found.dedup();
    found
}

/// Fetches and unpacks a kernel into `kernel-<release>`.
///
/// # Errors
/// It cannot be fetched, or is not laid out as expected.
pub(super) fn install(work: &WorkFolder, archive: &Archive, release: &str) -> Result<PathBuf> {
    work.once(&format!("kernel-{release}"), |dir| {
        progress(&format!(
            "fetching Debian's kernel {release} and its headers (about 45 MB)"
        ));
        let headers = format!("linux-headers-{release}");
        let more = archive.dependencies(&headers)?;
        let more = more.iter().filter(|d| {
            d.starts_with("linux-kbuild-")
                || (d.starts_with("linux-headers-")
                    && (d.ends_with("-common") || d.ends_with("-common-rt")))
        });
        let mut wanted = vec![headers.clone()];
        wanted.extend(more.cloned());
        ensure!(
            wanted.len() == 3,
            "{headers} has unusual dependencies: {wanted:?}"
        );
        wanted.extend(image(archive, release)?);
        let (compilers, libraries) = build_packages(archive, &headers)?;
        let here = compilers.iter().all(|c| has(&Archive::machine(), c));
        let mut build = vec!["make".to_owned()];
        if here {
            build.extend(compilers);
            build.extend(libraries);
        } else {
            build.push("gcc".to_owned());
            wanted.extend(libraries.into_iter().filter(|l| l != "pahole"));
            wanted.extend(["libc6", "libzstd1"].map(str::to_owned));
            wanted.sort();
            wanted.dedup();
        }
        let names: Vec<&str> = wanted.iter().map(String::as_str).collect();
        packages::unpack(&archive.fetch(work, &names)?, dir)?;
        fs::write(dir.join(BUILD_PACKAGES), build.join("\n"))?;
        relocate_headers(&dir.join("usr/src").join(&headers))?;
        if !here {
            fs::write(dir.join(COMPILER), STAND_IN)?;
            make_executable(&dir.join(COMPILER))?;
            wrap_tools(dir)?;
        }
        tidy(dir, release)
    })
}

/// One place for modules and the kernel unpacked, and nothing that is not used again.
fn tidy(dir: &Path, release: &str) -> Result<()> {
    let merged = dir.join("usr/lib/modules").join(release);
    if merged.exists() {
        fs::create_dir_all(dir.join("lib/modules"))?;
        fs::rename(&merged, dir.join("lib/modules").join(release))?;
    }
    let modules = dir.join("lib/modules").join(release);
    let mut places = vec![dir.join("boot").join(format!("vmlinuz-{release}"))];
    places.extend(["vmlinuz", "vmlinuz.unsigned"].map(|name| modules.join(name)));
    let packed = places.iter().find(|p| p.exists());
    let image = fs::read(packed.context("the kernel's packages hold no kernel")?)?;
    fs::write(dir.join("vmlinux"), bzimage::vmlinux(&image)?)?;
    for path in ["usr/share", "boot"] {
        let path = dir.join(path);
        if path.exists() {
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

fn has(archive: &Archive, package: &str) -> bool {
    let names = archive.names(package).unwrap_or_default();
    names.iter().any(|name| name == package)
}

/// The packages with the kernel and its modules. The unsigned kernel is the same; one of the two is
/// always in the archive.
fn image(archive: &Archive, release: &str) -> Result<Vec<String>> {
    let either = |unsigned: String, signed: String| {
        if has(archive, &unsigned) {
            unsigned
        } else {
            signed
        }
    };
    let modules = format!("linux-modules-{release}");
    if archive.names(&modules)?.contains(&modules) {
        let kernel = either(
            format!("linux-binary-unsigned-{release}"),
            format!("linux-binary-{release}"),
        );
        return Ok(vec![kernel, modules]);
    }
    let image = format!("linux-image-{release}");
    Ok(vec![either(format!("{image}-unsigned"), image)])
}

/// The compiler that the headers want, and what their tools are linked with.
fn build_packages(archive: &Archive, headers: &str) -> Result<(Vec<String>, Vec<String>)> {
    let mut compilers = BTreeSet::new();
    let mut libraries = BTreeSet::new();
    for name in archive.dependencies(headers)? {
        if name.starts_with("linux-kbuild-") {
            libraries.extend(archive.dependencies(&name)?);
        } else if let Some(compiler) = name.strip_prefix("linux-compiler-") {
            // linux-compiler-gcc-12-x86 is an empty package that wants gcc-12.
            compilers.insert(compiler.trim_end_matches("-x86").to_owned());
        } else if name.starts_with("gcc-") {
            compilers.insert(name);
        }
    }
    Ok((
        compilers.into_iter().collect(),
        libraries.into_iter().collect(),
    ))
}

/// Debian's headers include their common part by its place after installation: make it relative.
fn relocate_headers(headers: &Path) -> Result<()> {
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile)?;
    let here = "$(dir $(lastword $(MAKEFILE_LIST)))../";
    // The place of this file is known while it is read, not later.
    let changed = text
        .replace("/usr/src/", here)
        .replace("KBUILD_OUTPUT=", "KBUILD_OUTPUT:=");
    ensure!(changed != text, "{} is not as expected", makefile.display());
    fs::write(&makefile, changed)?;
    // With the kernel's types there, the build would add the module's, by a program of its release.
    let types = headers.join("vmlinux");
    if types.exists() {
        fs::remove_file(types)?;
    }
    let modpost = headers.join("scripts/mod/modpost");
    ensure!(
        modpost.exists(),
        "the headers' scripts are not where they should be"
    );
    Ok(())
}

/// Stands in for a compiler that is not here.
const STAND_IN: &str = "#!/usr/bin/env bash
# This machine's compiler, without the options that only later ones know.
arguments=()
for argument in \"$@\"; do
    case $argument in
        -fmin-function-alignment=*) arguments+=(\"-falign-functions=${argument#*=}\") ;;
        *) arguments+=(\"$argument\") ;;
    esac
done
exec gcc \"${arguments[@]}\"
";

/// The tools that a build runs, below `usr/lib/linux-kbuild-*`, and the program each of them really is:
/// Debian's modpost and objtool only choose another program.
const TOOLS: &[(&str, &str)] = &[
    ("scripts/basic/fixdep", "scripts/basic/fixdep"),
    ("scripts/mod/modpost", "scripts/mod/modpost.real-lsb-64"),
    ("tools/objtool/objtool", "tools/objtool/objtool.real-x86"),
];

/// Has the tools run with the libraries that were unpacked with them.
fn wrap_tools(dir: &Path) -> Result<()> {
    let mut folders = fs::read_dir(dir.join("usr/lib"))?.flatten();
    let is_kbuild = |name: &str| name.starts_with("linux-kbuild-");
    let kbuild = folders
        .find(|f| is_kbuild(&f.file_name().to_string_lossy()))
        .context("the headers have no tools")?
        .path();
    for (tool, program) in TOOLS {
        let tool = kbuild.join(tool);
        fs::rename(kbuild.join(program), tool.with_extension("program"))
            .with_context(|| format!("the headers have no {program}"))?;
        fs::write(&tool, WRAPPER)?;
        make_executable(&tool)?;
    }
    Ok(())
}

/// Runs the program beside it, by the loader of its release.
const WRAPPER: &str = "#!/usr/bin/env bash
tool=$(readlink -f \"${BASH_SOURCE[0]}\")
libraries=${tool%/usr/lib/linux-kbuild-*}/usr/lib/x86_64-linux-gnu
exec \"$libraries/ld-linux-x86-64.so.2\" --library-path \"$libraries\" \"$tool.program\" \"$@\"
";

fn make_executable(path: &Path) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot change {}", path.display()))
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
        let found = select(&headers, &images, "-cloud-amd64");
        assert_eq!(found, ["6.1.0-9-cloud-amd64", "6.1.0-50-cloud-amd64"]);
    }
}
