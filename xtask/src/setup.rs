//! `cargo xtask setup`: installs Debian packages and fetches and builds the emulated PC, once.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use std::path::PathBuf;
use testbed::client::{self, Client};
use testbed::{Flavour, Kernel, WorkFolder, bochs::Bochs, guest::Pieces, packages};

use crate::{conformance, module};

const HELP: &str = "usage: cargo xtask setup [--kernel 6.1|6.12|7|6.1-rt|7-rt|debug|kasan]...
Installs the Debian packages the emulated PC needs (the only step that asks for root), builds its
emulator and fetches its kernel. What is there already is left alone.";

pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let mut flavours = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match (arg.as_str(), args.as_slice().first()) {
            ("--help" | "-h", _) => {
                println!("{HELP}");
                return Ok(ExitCode::SUCCESS);
            }
            ("--kernel", Some(series)) => {
                flavours.push(Flavour::from_series(series)?);
                args.next();
            }
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        }
    }
    if flavours.is_empty() {
        flavours.push(Flavour::default());
    }
    let start = Instant::now();
    packages::ensure_packages(packages::NEEDED)?;
    let work = WorkFolder::open()?;
    // The emulator is long at the compiler and the kernel at the network: side by side.
    let (bochs, kernels) = std::thread::scope(|scope| {
        let bochs = scope.spawn(|| Bochs::ensure(&work));
        let kernels: Result<Vec<Kernel>> =
            flavours.iter().map(|f| Kernel::ensure(&work, *f)).collect();
        (bochs.join(), kernels)
    });
    let bochs = bochs.map_err(|_| anyhow::anyhow!("the build of Bochs stopped"))??;
    Pieces::ensure(&work)?;
    println!("work folder  {}", work.root().display());
    println!(
        "emulator     {} ({:?})",
        bochs.program.display(),
        bochs.build
    );
    for kernel in kernels? {
        kernel.ensure_build_packages()?;
        println!(
            "kernel       {} (headers {})",
            kernel.release,
            kernel.headers_dir.display()
        );
    }
    println!("ready in {:.1} s", start.elapsed().as_secs_f64());
    Ok(ExitCode::SUCCESS)
}

/// Everything a run on the emulated PC needs.
pub(crate) struct Parts {
    /// haxm.ko for the kernel asked for.
    pub(crate) module: PathBuf,
    /// QEMU and its guest.
    pub(crate) client: Client,
    /// The conformance client.
    pub(crate) conformance: PathBuf,
}

/// Installs, fetches and builds all of it; what is there already is left alone. The long builds
/// (Bochs, QEMU, the guest's kernel) run beside each other and beside our own.
///
/// # Errors
/// The first part that could not be made; the text says what to do.
pub(crate) fn everything(flavour: Flavour) -> Result<Parts> {
    let needed = [packages::NEEDED, module::NEEDED, &client::needed()].concat();
    packages::ensure_packages(&needed)?;
    module::sysroot::Compiler::find()?;
    let work = WorkFolder::open()?;
    let kernel = Kernel::ensure(&work, flavour)?;
    kernel.ensure_build_packages()?;
    std::thread::scope(|scope| {
        let bochs = scope.spawn(|| Bochs::ensure(&work).and_then(|_| Pieces::ensure(&work)));
        let client = scope.spawn(|| Client::ensure(&work));
        let module = conformance::stripped(&module::build(flavour.series())?)?;
        let conformance = conformance::build()?;
        let stopped = |what| anyhow::anyhow!("the build of {what} stopped");
        bochs.join().map_err(|_| stopped("Bochs"))??;
        Ok(Parts {
            module,
            client: client.join().map_err(|_| stopped("the client"))??,
            conformance,
        })
    })
}
