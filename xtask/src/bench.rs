//! `cargo xtask bench`: our driver and Debian's KVM, measured one after the other in the same boot of the emulated
//! PC with the same client and guest code. One tick is one emulated instruction.

mod table;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testbed::client::{Boot, Machine};
use testbed::folder::workspace_root;
use testbed::{Flavour, Kernel, Outcome, Pc, WorkFolder, command, packages};

use crate::{module, run, setup};

const HELP: &str = "usage: cargo xtask bench [OPTIONS] [FILTER]
Measures haxm.ko and KVM in one boot of the emulated PC, then a Linux guest under QEMU -accel hax.
Prints a table and writes target/bench/KERNEL.json.
  --kernel 6.1|6.12|7   Debian's kernel (6.1)
  --no-linux          leave the Linux guest out
  --docs              write the table into docs/performance.md
With FILTER, words that commas separate, only the groups of rows whose name contains one; no Linux guest.";

/// The client runs on the emulated PC whatever the host is.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What KVM is made of, in the order it is inserted.
pub(crate) const KVM: &[&str] = &["irqbypass", "kvm", "kvm-intel"];

/// One row of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Figures {
    pub(crate) median: u64,
    pub(crate) mean: u64,
    pub(crate) least: u64,
    pub(crate) count: u64,
}

impl Figures {
    const fn one(value: u64) -> Self {
        Self {
            median: value,
            mean: value,
            least: value,
            count: 1,
        }
    }
}

/// The rows of one side by name.
pub(crate) type Side = BTreeMap<String, Figures>;

/// All that was measured.
pub(crate) struct Measured {
    pub(crate) kernel: String,
    pub(crate) haxm: Side,
    pub(crate) kvm: Side,
}

struct Options {
    series: String,
    filter: String,
    linux: bool,
    docs: bool,
}

fn options(args: &[String]) -> Result<Option<Options>> {
    let mut options = Options {
        series: Flavour::default().series().to_owned(),
        filter: String::new(),
        linux: true,
        docs: false,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--help" | "-h" => return Ok(None),
            "--kernel" => args
                .next()
                .context("--kernel wants a value")?
                .clone_into(&mut options.series),
            "--no-linux" => options.linux = false,
            "--docs" => options.docs = true,
            word if options.filter.is_empty() && !word.is_empty() && is_filter(word) => {
                word.clone_into(&mut options.filter);
            }
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        }
    }
    ensure!(
        !options.docs || options.filter.is_empty(),
        "the document wants all rows: no FILTER with --docs"
    );
    Ok(Some(options))
}

/// Words that commas separate. They become part of a shell script.
pub(crate) fn is_filter(word: &str) -> bool {
    word.chars()
        .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ',')
}

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let Some(options) = options(args)? else {
        println!("{HELP}");
        return Ok(ExitCode::SUCCESS);
    };
    let flavour = Flavour::from_series(&options.series)?;
    let parts = Parts::ensure(flavour)?;
    let outcome = parts.boot(flavour, &options.filter)?;
    let mut measured = read(&options.series, &outcome)?;
    let failed = outcome.serial.contains("@@FAILED") || !outcome.success();
    if failed {
        println!("bench: {outcome}");
    }
    parts.sizes(&mut measured)?;
    if options.linux && options.filter.is_empty() {
        measured
            .haxm
            .insert("linux".to_owned(), Figures::one(linux_guest(flavour)?));
    }
    let table = table::markdown(&measured);
    println!("\n{table}");
    let folder = workspace_root().join("target/bench");
    fs::create_dir_all(&folder)?;
    // Some of the rows are not the figures of a kernel.
    let part = if options.filter.is_empty() {
        ""
    } else {
        "-part"
    };
    let path = folder.join(format!("{}{part}.json", options.series));
    let json = serde_json::to_string_pretty(&table::json(&measured))?;
    fs::write(&path, json).with_context(|| format!("cannot write {}", path.display()))?;
    println!("bench: {}", path.display());
    if failed {
        return Ok(ExitCode::FAILURE);
    }
    if options.docs {
        table::write_document(&workspace_root().join("docs/performance.md"), &table)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is measured, and what measures it.
struct Parts {
    haxm: PathBuf,
    kvm: Vec<(String, PathBuf)>,
    client: PathBuf,
}

impl Parts {
    fn ensure(flavour: Flavour) -> Result<Self> {
        let haxm = stripped(&module::build(flavour.series())?)?;
        let work = WorkFolder::open()?;
        let kvm = Kernel::ensure(&work, flavour)?.module(&work, "kvm-intel")?;
        let names: Vec<&str> = kvm.iter().map(|(name, _)| name.as_str()).collect();
        ensure!(names == KVM, "kvm-intel wants {names:?} inserted");
        let client = build_client()?;
        Ok(Self { haxm, kvm, client })
    }

    /// Both sides in one boot; neither module is there while the other is measured.
    fn boot(&self, flavour: Flavour, filter: &str) -> Result<Outcome> {
        let script = script(filter);
        let mut pc = Pc::new()
            .kernel(flavour)
            .memory_mb(512)
            .file("/haxm.ko", &self.haxm)
            .file("/bench", &self.client)
            .script(&script)
            .timeout(Duration::from_secs(300));
        for (name, path) in &self.kvm {
            pc = pc.file(&format!("/kvm/{name}.ko"), path);
        }
        pc.run(&mut std::io::stdout())
    }

    /// Bytes of code and constants, as binutils' `size` counts them.
    fn sizes(&self, measured: &mut Measured) -> Result<()> {
        let haxm = Figures::one(text_size(&self.haxm)?);
        let mut kvm = 0;
        for (_, path) in &self.kvm {
            kvm += text_size(path)?;
        }
        measured.haxm.insert("text".to_owned(), haxm);
        measured.kvm.insert("text".to_owned(), Figures::one(kvm));
        Ok(())
    }
}

/// KVM, then ours. 2 MB pages are for who asks for them: with little memory Linux switches them off.
fn script(filter: &str) -> String {
    let insert: Vec<String> = KVM
        .iter()
        .map(|name| format!("insmod /kvm/{name}.ko || exit 10"))
        .collect();
    let remove: Vec<String> = KVM
        .iter()
        .rev()
        .map(|name| format!("rmmod {name} || exit 11"))
        .collect();
    let side = |name: &str, insert: &str, remove: &str| {
        format!(
            "echo @@SIDE {name}\ntick load\n{insert}\ntick loaded\n\
             /bench {name} {filter} || code=1\n\
             tick unload\n{remove}\ntick unloaded\n"
        )
    };
    format!(
        "code=0\necho madvise >/sys/kernel/mm/transparent_hugepage/enabled || exit 9\n{}{}exit $code\n",
        side("kvm", &insert.join("\n"), &remove.join("\n")),
        side(
            "haxm",
            "insmod /haxm.ko || exit 12",
            "rmmod haxm || exit 13"
        ),
    )
}

/// Takes the rows out of what the client and the script printed.
fn read(kernel: &str, outcome: &Outcome) -> Result<Measured> {
    let mut sides: BTreeMap<String, Side> = BTreeMap::new();
    let mut current = String::new();
    let mut ticks: BTreeMap<String, u64> = BTreeMap::new();
    for line in outcome.serial.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let side = sides.entry(current.clone()).or_default();
        match words.as_slice() {
            ["@@SIDE", name] => (*name).clone_into(&mut current),
            ["@@ROW", name, median, mean, least, count] => {
                let figures = Figures {
                    median: median.parse()?,
                    mean: mean.parse()?,
                    least: least.parse()?,
                    count: count.parse()?,
                };
                side.insert((*name).to_owned(), figures);
            }
            ["@@TICK", label, count] => {
                let now: u64 = count.parse()?;
                let row = match *label {
                    "loaded" => ticks.get("load").map(|start| ("module_load", start)),
                    "unloaded" => ticks.get("unload").map(|start| ("module_unload", start)),
                    _ => None,
                };
                if let Some((row, start)) = row {
                    side.insert(row.to_owned(), Figures::one(now.saturating_sub(*start)));
                }
                ticks.insert((*label).to_owned(), now);
            }
            _ => {}
        }
    }
    let mut take = |name: &str| {
        let side = sides.remove(name);
        side.with_context(|| format!("nothing was measured of {name}: {outcome}"))
    };
    Ok(Measured {
        kernel: kernel.to_owned(),
        haxm: take("haxm")?,
        kvm: take("kvm")?,
    })
}

/// QEMU start to exit, of `cargo xtask run`'s guest.
fn linux_guest(flavour: Flavour) -> Result<u64> {
    let parts = setup::everything(flavour)?;
    let boot = Boot::new(Machine::Microvm);
    let outcome = run::boot(&parts, &boot, flavour, &mut std::io::sink())?;
    ensure!(run::passed(&outcome), "the Linux guest failed: {outcome}");
    let tick = |label: &str| {
        let mark = format!("@@TICK {label} ");
        let mut lines = outcome.serial.lines();
        let count = lines.find_map(|l| l.trim().strip_prefix(&mark).map(str::to_owned));
        count.and_then(|n| n.trim().parse::<u64>().ok())
    };
    let (start, end) = tick("start")
        .zip(tick("end"))
        .context("the run has no tick lines")?;
    Ok(end.saturating_sub(start))
}

/// Without local symbols a module is inserted far quicker (see the test machine's README); Debian's are treated so.
fn stripped(module: &Path) -> Result<PathBuf> {
    let stripped = module.with_extension("bench.ko");
    let mut strip = Command::new("strip");
    strip
        .args(["--strip-unneeded", "--remove-section=.BTF", "-o"])
        .arg(&stripped)
        .arg(module);
    command::output(&mut strip)?;
    Ok(stripped)
}

fn text_size(module: &Path) -> Result<u64> {
    let text = command::output(Command::new("size").arg(module))?;
    let line = text.lines().nth(1).context("size printed nothing")?;
    let word = line.split_whitespace().next();
    let word = word.context("size printed no number")?;
    word.parse().context("size printed no number")
}

/// Builds the client in its own target folder and returns the path of the binary.
pub(crate) fn build_client() -> Result<PathBuf> {
    // The C library's archive, and a linker.
    packages::ensure_packages(&["libc6-dev", "gcc"])?;
    let target_dir = workspace_root().join("target/bench/build");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let flags = ["-C", "target-feature=+crt-static", "-C", "strip=symbols"];
    let status = Command::new(cargo)
        .current_dir(workspace_root())
        .args(["build", "--quiet", "--locked", "--release"])
        .args(["--package", "haxm-bench", "--target", TARGET])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env("CARGO_TARGET_DIR", &target_dir)
        .env_remove("RUSTFLAGS")
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the client does not build");
    Ok(target_dir.join(TARGET).join("release/haxm-bench"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use testbed::outcome::Cause;

    fn outcome(serial: &str) -> Outcome {
        Outcome {
            code: 0,
            cause: Cause::PowerOff,
            ticks: 0,
            boot_ticks: 0,
            steps_ticks: 0,
            serial: serial.to_owned(),
            wall: Duration::ZERO,
            folder: None,
        }
    }

    #[test]
    fn rows_go_to_the_side_that_printed_them() -> Result<()> {
        let serial = "@@SIDE kvm\n@@TICK load 5\n@@TICK loaded 25\n@@ROW out 3 4 2 9\n\
                      @@SIDE haxm\n@@TICK load 100\n@@TICK loaded 107\n@@ROW out 1 2 1 9\n";
        let measured = read("6.1", &outcome(serial))?;
        assert_eq!(measured.kvm["out"].median, 3);
        assert_eq!(measured.kvm["module_load"], Figures::one(20));
        assert_eq!(measured.haxm["out"].mean, 2);
        assert_eq!(measured.haxm["module_load"], Figures::one(7));
        Ok(())
    }

    #[test]
    fn a_side_that_is_missing_is_an_error() {
        assert!(read("6.1", &outcome("@@SIDE kvm\n@@ROW out 3 4 2 9\n")).is_err());
    }

    #[test]
    fn words_that_mean_nothing_are_refused() {
        for words in [["--kernel", ""], ["out; reboot", ""], ["--docs", "out"]] {
            let words: Vec<String> = words
                .iter()
                .filter(|w| !w.is_empty())
                .map(|w| (*w).to_owned())
                .collect();
            assert!(options(&words).is_err(), "{words:?}");
        }
    }
}
