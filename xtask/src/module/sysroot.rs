//! The compiler and its private sysroot.
//!
//! The prebuilt `core` of `x86_64-unknown-none` has relocations that the kernel's loader does not
//! know, and neither thunks nor landing pads. So `core` and `alloc` are compiled here from the
//! library source that came with the compiler, with the flags of our own crates. Cargo's own way to
//! do that wants the network, and its `compiler_builtins` would replace the kernel's `memcpy`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use testbed::folder::{key, progress, workspace_root};
use testbed::{WorkFolder, command, packages};

/// Soft float, no SSE, no red zone, abort on panic.
pub(crate) const TARGET: &str = "x86_64-unknown-none";

/// Names a compiler to use instead of what is found.
const ENVIRONMENT: &str = "HAXM_RUSTC";
/// Names that compiler's library source where it is not below its sysroot.
const SOURCE_ENVIRONMENT: &str = "RUST_LIB_SRC";

/// An empty stand-in: `memcpy` and its like then stay undefined, and the kernel has them.
const NO_BUILTINS: &str =
    "#![feature(compiler_builtins)]\n#![compiler_builtins]\n#![no_builtins]\n#![no_std]\n";

/// Flags for a kernel with KASAN: each access asks it, by a call, and goes on after a report. What lies beside variables
/// of the stack and statics is not watched.
pub(crate) const KASAN: &[&str] = &[
    "-Zsanitizer=kernel-address",
    "-Zsanitizer-recover=kernel-address",
    "-Cllvm-args=-asan-mapping-offset=0xdffffc0000000000",
    "-Cllvm-args=-asan-instrumentation-with-call-threshold=0",
    "-Cllvm-args=-asan-globals=0",
    "-Cllvm-args=-asan-constructor-kind=none",
    "-Cllvm-args=-asan-stack=0",
];

/// A compiler that has its library source.
pub(crate) struct Compiler {
    /// The program.
    pub(crate) rustc: PathBuf,
    /// The folder with `core` and `alloc`.
    library: PathBuf,
    /// What `rustc -vV` says.
    version: String,
    /// Code generation, for `core`, `alloc` and our crates alike.
    flags: Vec<String>,
}

impl Compiler {
    /// The first with its source of: `HAXM_RUSTC`, `rustc` on the path, the distribution's; which
    /// is installed where there is none.
    ///
    /// # Errors
    /// None is found and none can be installed.
    pub(crate) fn find() -> Result<Self> {
        if let Some(named) = std::env::var_os(ENVIRONMENT) {
            let named = PathBuf::from(named);
            return Self::open(&named)
                .with_context(|| format!("{ENVIRONMENT}={} does not serve", named.display()));
        }
        let candidates = [PathBuf::from("rustc"), PathBuf::from("/usr/bin/rustc")];
        let found = || candidates.iter().find_map(|c| Self::open(c).ok());
        if let Some(compiler) = found() {
            return Ok(compiler);
        }
        // Debian 12 has a current compiler under this name; later releases under the plain one.
        let old = packages::names("rustc-web")?
            .iter()
            .any(|n| n == "rustc-web");
        let wanted: &[&str] = if old {
            &["rustc-web", "rust-web-src"]
        } else {
            &["rustc", "rust-src"]
        };
        packages::ensure_packages(wanted)?;
        found().context(
            "no compiler with its library source: install Debian's rustc-web and rust-web-src, or \
             run 'rustup component add rust-src'",
        )
    }

    fn open(rustc: &Path) -> Result<Self> {
        // RUSTUP_TOOLCHAIN and the like reach it as they reach cargo.
        let ask = |what: &[&str]| {
            let mut c = Command::new(rustc);
            command::output(c.env("RUSTC_BOOTSTRAP", "1").args(what))
        };
        let root = ask(&["--print", "sysroot"])?;
        let beside = Path::new(root.trim()).join("lib/rustlib/src/rust/library");
        let library = std::env::var_os(SOURCE_ENVIRONMENT).map_or(beside, PathBuf::from);
        if !library.join("core/src/lib.rs").is_file() {
            bail!("{} has no library source", rustc.display());
        }
        Ok(Self {
            rustc: rustc.to_owned(),
            library: library.canonicalize()?,
            version: ask(&["-vV"])?,
            flags: flags(&ask(&["-Chelp"])?, &ask(&["-Zhelp"])?),
        })
    }

    /// The same with more flags.
    pub(crate) fn with_flags(mut self, more: &[&str]) -> Self {
        self.flags.extend(more.iter().map(|f| (*f).to_owned()));
        self
    }

    /// Its name and version: the first line of `rustc -vV`.
    pub(crate) fn name(&self) -> String {
        self.version.lines().next().unwrap_or_default().to_owned()
    }

    /// The folder to give as `--sysroot`; made at first use of this compiler with these flags.
    ///
    /// # Errors
    /// The library does not compile.
    pub(crate) fn sysroot(&self, work: &WorkFolder) -> Result<PathBuf> {
        let mut recipe = vec![self.version.clone(), NO_BUILTINS.to_owned()];
        recipe.extend(self.flags.iter().cloned());
        let key = key(&recipe);
        work.once(&format!("sysroot-{key}"), |dir| {
            progress("compiling core and alloc for the kernel (half a minute, once)");
            let builtins = dir.join("compiler_builtins.rs");
            fs::write(&builtins, NO_BUILTINS)?;
            let source = |name: &str| self.library.join(name).join("src/lib.rs");
            self.compile(dir, "core", &source("core"), &key)?;
            self.compile(dir, "compiler_builtins", &builtins, &key)?;
            self.compile(dir, "alloc", &source("alloc"), &key)
        })
    }

    fn compile(&self, dir: &Path, name: &str, source: &Path, key: &str) -> Result<()> {
        let out = dir.join("lib/rustlib").join(TARGET).join("lib");
        fs::create_dir_all(&out)?;
        let mut rustc = Command::new(&self.rustc);
        rustc
            .env("RUSTC_BOOTSTRAP", "1")
            .args(["--crate-name", name, "--crate-type", "rlib"])
            .args(["--edition", &self.edition(name), "--target", TARGET])
            .args(&self.flags)
            .args(["-Copt-level=2", "-Cpanic=abort", "-Ccodegen-units=1"])
            .args(["-Cembed-bitcode=y", "-Zforce-unstable-if-unmarked"])
            .args(["--cap-lints=allow", &format!("-Cmetadata={key}")])
            .arg(format!(
                "--remap-path-prefix={}=library",
                self.library.display()
            ))
            .arg("--sysroot")
            .arg(dir)
            .arg("--out-dir")
            .arg(out)
            .arg(source);
        command::logged(&mut rustc, &dir.join(format!("{name}.log")))
    }

    /// The edition a crate of the library is written in: it differs between compilers.
    fn edition(&self, name: &str) -> String {
        let manifest = self.library.join(name).join("Cargo.toml");
        let text = fs::read_to_string(manifest).unwrap_or_default();
        edition_of(&text).unwrap_or("2021").to_owned()
    }

    /// Flags for cargo's crates on top of `sysroot`.
    pub(crate) fn flags_of_crates(&self, sysroot: &Path) -> Vec<String> {
        let mut flags = self.flags.clone();
        flags.push("-Zemit-stack-sizes".to_owned());
        // Lets them mark what is compiled for speed, which is not in the stable language.
        flags.push("--cfg=haxm_module".to_owned());
        flags.push(format!(
            "--remap-path-prefix={}=haxm",
            workspace_root().display()
        ));
        flags.push("--sysroot".to_owned());
        flags.push(sysroot.display().to_string());
        flags
    }
}

/// The line `edition = "2024"` of a manifest.
fn edition_of(manifest: &str) -> Option<&str> {
    let line = manifest.lines().find(|l| l.starts_with("edition"))?;
    line.split('"').nth(1)
}

/// The flags of a kernel object, in the spelling this compiler knows. Each is needed by one of
/// Debian's kernels and harmless on the others.
fn flags(codegen: &str, unstable: &str) -> Vec<String> {
    let has = |help: &str, name: &str| {
        let mut words = help.split_whitespace();
        words.any(|w| {
            w.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('='))
        })
    };
    let mut flags: Vec<&str> = vec![
        // As the kernel's own code.
        "-Crelocation-model=static",
        "-Ccode-model=kernel",
        "-Cno-redzone=y",
        "-Cforce-unwind-tables=no",
        // The kernel unwinds by tables of its own, and these have an entry for each push, pop and
        // change of RSP where no frame pointer is: half as many with one. A function that calls
        // nothing has one entry without.
        "-Cforce-frame-pointers=non-leaf",
        "-Zunstable-options",
        // Calls to memcpy go straight, not through a table the loader would not fill.
        "-Zplt=yes",
        "-Zfunction-sections=n",
        // objtool knows Rust's functions that never return by these names.
        "-Csymbol-mangling-version=v0",
        // Indirect branch tracking: landing pads, and no jumps to what has none.
        "-Zcf-protection=branch",
        // Return thunks, and room for call padding.
        "-Zfunction-return=thunk-extern",
        "-Zpatchable-function-entry=16,16",
    ];
    flags.push(if has(codegen, "jump-tables") {
        "-Cjump-tables=n"
    } else {
        "-Zno-jump-tables"
    });
    // Retpolines through the kernel's thunks.
    if has(unstable, "retpoline-external-thunk") {
        flags.push("-Zretpoline-external-thunk");
    } else {
        flags.push(
            "-Ctarget-feature=+retpoline-external-thunk,+retpoline-indirect-branches,\
             +retpoline-indirect-calls",
        );
    }
    if has(unstable, "indirect-branch-cs-prefix") {
        flags.push("-Zindirect-branch-cs-prefix");
    }
    flags.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_follow_what_the_compiler_knows() {
        let new = flags(
            "    -C   jump-tables=val -- allow",
            "    -Z retpoline-external-thunk=val -- x\n    -Z indirect-branch-cs-prefix=val -- y",
        );
        assert!(new.iter().any(|f| f == "-Cjump-tables=n"));
        assert!(new.iter().any(|f| f == "-Zretpoline-external-thunk"));
        assert!(new.iter().any(|f| f == "-Zindirect-branch-cs-prefix"));
        let old = flags("", "    -Z no-jump-tables=val -- z");
        assert!(old.iter().any(|f| f == "-Zno-jump-tables"));
        assert!(
            old.iter()
                .any(|f| f.starts_with("-Ctarget-feature=+retpoline"))
        );
        assert!(!old.iter().any(|f| f == "-Zindirect-branch-cs-prefix"));
    }

    #[test]
    fn the_edition_is_read() {
        assert_eq!(
            edition_of("[package]\nname = \"core\"\nedition = \"2024\"\n"),
            Some("2024")
        );
        assert_eq!(edition_of("[package]\n"), None);
    }
}
