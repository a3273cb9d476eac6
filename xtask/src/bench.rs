//! `cargo xtask bench`: our driver and Debian's KVM, measured one after the other in the same boot of the emulated
//! PC with the same client and guest code. One tick is one emulated instruction.

pub(crate) mod ceilings;
mod chart;
mod document;
mod guests;
mod read;
mod rows;
mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testbed::bochs::Bochs;
use testbed::client::Client;
use testbed::folder::workspace_root;
use testbed::{Flavour, Kernel, Outcome, Pc, WorkFolder, command, packages};

use crate::{conformance, module};
use read::{Figures, Measured};

const HELP: &str = "usage: cargo xtask bench [OPTIONS] [FILTER]
Measures haxm.ko and KVM in one boot of the emulated PC, then guests under QEMU with both.
Prints a table and writes target/bench/KERNEL.json.
  --kernel 6.1|6.12|7   Debian's kernel (6.1)
  --no-guests           leave the guests under QEMU out
  --docs                write the table and the chart into docs/performance.md
  --check-ceilings      compare the rows that tests/bench/ceilings.json holds with it, and do nothing else
  --set-ceilings        write what they are now into it, and do nothing else
With FILTER, words that commas separate, only the groups of rows whose name contains one; the guests are the
groups linux_boot and ipi.";

/// The client runs on the emulated PC whatever the host is.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What KVM is made of, in the order it is inserted.
pub(crate) const KVM: &[&str] = &["irqbypass", "kvm", "kvm-intel"];

struct Options {
    series: String,
    filter: String,
    guests: bool,
    docs: bool,
    ceilings: Ceilings,
}

/// What becomes of the ceilings.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ceilings {
    Ignored,
    Set,
    Checked,
}

fn options(args: &[String]) -> Result<Option<Options>> {
    let mut options = Options {
        series: Flavour::default().series().to_owned(),
        filter: String::new(),
        guests: true,
        docs: false,
        ceilings: Ceilings::Ignored,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--help" | "-h" => return Ok(None),
            "--kernel" => args
                .next()
                .context("--kernel wants a value")?
                .clone_into(&mut options.series),
            "--no-guests" => options.guests = false,
            "--docs" => options.docs = true,
            "--set-ceilings" => options.ceilings = Ceilings::Set,
            "--check-ceilings" => options.ceilings = Ceilings::Checked,
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
    match options.ceilings {
        Ceilings::Ignored => {}
        Ceilings::Set => {
            ceilings::set(flavour)?;
            return Ok(ExitCode::SUCCESS);
        }
        Ceilings::Checked => {
            ceilings::check(flavour)?;
            return Ok(ExitCode::SUCCESS);
        }
    }
    let parts = Parts::ensure(flavour)?;
    let mut measured = new(flavour)?;
    let outcome = parts.boot(flavour, &options.filter)?;
    let failed = outcome.serial.contains("@@FAILED") || !outcome.success();
    if failed {
        println!("bench: {outcome}");
    }
    measured.read(&outcome)?;
    parts.sizes(&mut measured)?;
    let wanted = |group: &str| options.filter.split(',').any(|word| group.contains(word));
    let (linux, interrupts) = (wanted("linux_boot"), wanted("ipi"));
    if options.guests && (linux || interrupts) {
        let client = client()?;
        println!("bench: guests under QEMU ...");
        if linux {
            measured.read(&guests::linux(&parts, &client, flavour)?)?;
        }
        if interrupts {
            measured.read(&guests::interrupts(&parts, &client, flavour)?)?;
        }
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
        document::write(&workspace_root().join("docs"), &measured)?;
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
        let side = |name: &str| format!("/bench {name} {filter} || code=1\n");
        self.pc(flavour)
            .file("/bench", &self.client)
            .script(&side_script(&side("kvm"), &side("haxm")))
            .timeout(Duration::from_secs(1800))
            .run(&mut std::io::stdout())
    }

    /// The emulated PC with the files of [`side_script`].
    fn pc(&self, flavour: Flavour) -> Pc {
        let mut pc = Pc::new()
            .kernel(flavour)
            .memory_mb(512)
            .file("/haxm.ko", &self.haxm);
        for (name, path) in &self.kvm {
            pc = pc.file(&format!("/kvm/{name}.ko"), path);
        }
        pc
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

/// What measures KVM, with its modules inserted, and then what measures ours, with KVM removed. Each may set `code`.
/// 2 MB pages are for who asks for them: with little memory Linux switches them off.
fn side_script(kvm: &str, haxm: &str) -> String {
    let each = |modules: &mut dyn Iterator<Item = &&str>, command: &str, code: u32| {
        let lines: Vec<String> = modules
            .map(|name| format!("{} || exit {code}\n", command.replace('*', name)))
            .collect();
        lines.concat()
    };
    let side = |name: &str, modules: &[&str], insert: &str, body: &str, code: u32| {
        format!(
            "echo @@SIDE {name}\ntick module_load\n{}tick module_load_end\n{body}\
             tick module_unload\n{}tick module_unload_end\n",
            each(&mut modules.iter(), insert, code),
            each(&mut modules.iter().rev(), "rmmod *", code + 1),
        )
    };
    format!(
        "code=0\necho @@KERNEL $(uname -r)\n\
         echo madvise >/sys/kernel/mm/transparent_hugepage/enabled || exit 9\n{}{}exit $code\n",
        side("kvm", KVM, "insmod /kvm/*.ko", kvm, 10),
        side("haxm", &["haxm"], "insmod /*.ko", haxm, 12),
    )
}

/// Nothing measured yet.
fn new(flavour: Flavour) -> Result<Measured> {
    Ok(Measured {
        series: flavour.series().to_owned(),
        commit: commit(),
        compiler: module::sysroot::Compiler::find()?.name(),
        ..Measured::default()
    })
}

/// The commit that is measured, as git names it.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        git.current_dir(workspace_root()).args(arguments);
        command::output(&mut git)
    };
    // A source tree without its history can be measured too.
    let Ok(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    // The document and the ceilings are what this command itself writes.
    let changed = git(&[
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ":!docs",
        ":!tests/bench/ceilings.json",
    ]);
    let changed = changed.map_or(true, |files| !files.trim().is_empty());
    let mark = if changed { " with changes" } else { "" };
    format!("{}{mark}", commit.trim())
}

/// QEMU and its guests.
fn client() -> Result<Client> {
    let work = WorkFolder::open()?;
    // Both are long at the compiler: side by side.
    std::thread::scope(|scope| {
        let bochs = scope.spawn(|| Bochs::ensure(&work));
        let client = Client::ensure(&work);
        bochs
            .join()
            .map_err(|_| anyhow::anyhow!("the build of Bochs stopped"))??;
        client
    })
}

/// Without local symbols a module is inserted far quicker (see the test machine's README); Debian's are treated so.
fn stripped(module: &Path) -> Result<PathBuf> {
    let stripped = module.with_extension("bench.ko");
    let mut strip = Command::new("strip");
    strip
        .args([
            "--strip-unneeded",
            "--remove-section=.BTF",
            "--remove-section=.note.gnu.build-id",
            "-o",
        ])
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
    let flags = conformance::program_flags();
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

    #[test]
    fn neither_module_is_there_while_the_other_is_measured() {
        let script = side_script("A\n", "B\n");
        let at = |what: &str| script.find(what).unwrap();
        let order = [
            "@@SIDE kvm",
            "insmod /kvm/kvm.ko",
            "A",
            "rmmod kvm-intel",
            "rmmod kvm ",
            "@@SIDE haxm",
            "insmod /haxm.ko",
            "B",
            "rmmod haxm",
        ];
        assert!(order.windows(2).all(|w| at(w[0]) < at(w[1])), "{script}");
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
