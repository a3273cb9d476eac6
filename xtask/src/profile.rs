//! `cargo xtask profile`: where the ticks of a row of the benchmark go.
//!
//! The emulator counts each executed instruction by its address while a sample of the row runs
//! (`tests/testbed/profiler`). The kernel's functions are named by its own symbols, ours by line
//! tables, so that a function is seen wherever it was inlined.

mod lines;
mod symbols;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testbed::folder::workspace_root;
use testbed::{Flavour, Kernel, Outcome, Pc, WorkFolder};

use crate::{bench, module};
use lines::Lines;
use symbols::Symbols;

const HELP: &str = "usage: cargo xtask profile [OPTIONS] [ROW...]
Counts the instructions of a row of the benchmark by function, exactly, on an emulator of its own
(built at the first use), and prints a table for each row. Raw counts go to target/bench/profile.
ROW is a group of rows as in `cargo xtask bench ROW` (out, cpuid, mmio_write, touch_first).
  --kernel 6.1|6.12   Debian's kernel (6.1)
  --kvm               profile Debian's KVM instead of haxm.ko
  --all               leave no function out, however small";

/// What is profiled if nothing is named.
const DEFAULT: &[&str] = &["out", "cpuid", "mmio_write", "touch_first"];

/// What is not in the kernel.
const CLIENT: &str = "(client)";
const GUEST: &str = "(guest)";

/// Shares smaller than this many ticks are added up.
const SMALL: f64 = 4.0;

struct Options {
    flavour: Flavour,
    kvm: bool,
    all: bool,
    rows: Vec<String>,
}

fn options(args: &[String]) -> Result<Option<Options>> {
    let mut options = Options {
        flavour: Flavour::default(),
        kvm: false,
        all: false,
        rows: Vec::new(),
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--help" | "-h" => return Ok(None),
            "--kernel" => {
                let series = args.next().context("--kernel wants a value")?;
                options.flavour = Flavour::from_series(series)?;
            }
            "--kvm" => options.kvm = true,
            "--all" => options.all = true,
            row if !row.is_empty() && bench::is_filter(row) => options.rows.push(row.to_owned()),
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        }
    }
    if options.rows.is_empty() {
        options.rows = DEFAULT.iter().map(|row| (*row).to_owned()).collect();
    }
    Ok(Some(options))
}

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let Some(options) = options(args)? else {
        println!("{HELP}");
        return Ok(ExitCode::SUCCESS);
    };
    let module = (!options.kvm)
        .then(|| module::build_with_lines(options.flavour.series()))
        .transpose()?;
    let outcome = boot(&options, module.as_deref())?;
    ensure!(outcome.success(), "the run failed: {outcome}");
    let folder = outcome.folder.context("the run kept no folder")?;
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let counted = read("profile.txt")?;
    let symbols = Symbols::read(&read("symbols.txt")?);
    let keep = workspace_root().join("target/bench/profile");
    fs::create_dir_all(&keep)?;
    fs::write(keep.join("profile.txt"), &counted)?;
    let rows = rows(&counted)?;
    let lines = match &module {
        Some(module) => {
            let of_module = rows.iter().flat_map(Row::addresses);
            Lines::read(module, &symbols, of_module)?
        }
        None => Lines::default(),
    };
    for row in &rows {
        println!("{}", table(row, &symbols, &lines, options.all));
    }
    println!("profile: {}", keep.display());
    Ok(ExitCode::SUCCESS)
}

fn boot(options: &Options, module: Option<&Path>) -> Result<Outcome> {
    let client = bench::build_client()?;
    let mut pc = Pc::new()
        .kernel(options.flavour)
        .memory_mb(512)
        .file("/bench", &client)
        .timeout(Duration::from_secs(600))
        .profile();
    let (side, insert) = match module {
        Some(module) => {
            pc = pc.file("/haxm.ko", module);
            ("haxm", "insmod /haxm.ko || exit 12\n".to_owned())
        }
        None => {
            let kvm = Kernel::ensure(&WorkFolder::open()?, options.flavour)?
                .module(&WorkFolder::open()?, "kvm-intel")?;
            for (name, path) in &kvm {
                pc = pc.file(&format!("/kvm/{name}.ko"), path);
            }
            let insert = |name: &&str| format!("insmod /kvm/{name}.ko || exit 10\n");
            ("kvm", bench::KVM.iter().map(insert).collect())
        }
    };
    let rows = options.rows.join(",");
    let script = format!(
        "echo madvise >/sys/kernel/mm/transparent_hugepage/enabled || exit 9\n\
         {insert}/bench symbols || exit 13\n/bench {side} {rows}\n"
    );
    pc.script(&script).run(&mut std::io::sink())
}

/// Where an instruction was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Kernel,
    User,
    Guest,
}

/// What was counted of one row.
struct Row {
    name: String,
    /// Samples in the sums.
    samples: f64,
    /// Of one sample, the marks' own edges included.
    ticks: u64,
    exits: u64,
    counts: BTreeMap<(Place, u64), u64>,
}

impl Row {
    /// Addresses in the kernel.
    fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        let kernel =
            |(place, address): &(Place, u64)| (*place == Place::Kernel).then_some(*address);
        self.counts.keys().filter_map(kernel)
    }
}

fn rows(text: &str) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match (words.as_slice(), rows.last_mut()) {
            (["@ROW", name, samples, ticks, exits], _) => rows.push(Row {
                name: (*name).to_owned(),
                samples: samples.parse()?,
                ticks: ticks.parse()?,
                exits: exits.parse()?,
                counts: BTreeMap::new(),
            }),
            ([place, address, count], Some(row)) => {
                let place = match *place {
                    "k" => Place::Kernel,
                    "u" => Place::User,
                    "g" => Place::Guest,
                    _ => bail!("cannot make sense of '{line}'"),
                };
                let key = (place, u64::from_str_radix(address, 16)?);
                *row.counts.entry(key).or_default() += count.parse::<u64>()?;
            }
            _ => bail!("cannot make sense of '{line}'"),
        }
    }
    Ok(rows)
}

/// Ticks of one sample by function.
fn by_function(row: &Row, symbols: &Symbols, lines: &Lines) -> Vec<(String, f64)> {
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for ((place, address), count) in &row.counts {
        let name = match place {
            Place::User => CLIENT.to_owned(),
            Place::Guest => GUEST.to_owned(),
            Place::Kernel => lines
                .function(*address)
                .map_or_else(|| symbols.name(*address), str::to_owned),
        };
        *sums.entry(name).or_default() += count;
    }
    let share = |(name, count): (String, u64)| (name, count as f64 / row.samples);
    let mut sums: Vec<(String, f64)> = sums.into_iter().map(share).collect();
    sums.sort_by(|a, b| b.1.total_cmp(&a.1));
    sums
}

fn table(row: &Row, symbols: &Symbols, lines: &Lines, all: bool) -> String {
    let sums = by_function(row, symbols, lines);
    let share = |wanted: &dyn Fn(&str) -> bool| {
        let of_these = sums.iter().filter(|(name, _)| wanted(name));
        of_these.fold(0.0, |sum, (_, ticks)| sum + ticks)
    };
    let mut text = format!(
        "\n{}: {} ticks, {} exits: client {:.0}, guest {:.0}, haxm {:.0}, kernel {:.0}\n\n\
         | function | ticks |\n|---|---:|\n",
        row.name,
        row.ticks,
        row.exits,
        share(&|name| name == CLIENT),
        share(&|name| name == GUEST),
        share(&|name| name.starts_with("haxm: ")),
        share(&|name| name != CLIENT && name != GUEST && !name.starts_with("haxm: ")),
    );
    let (mut rest, mut functions) = (0.0, 0);
    for (name, ticks) in sums {
        if ticks < SMALL && !all {
            rest += ticks;
            functions += 1;
        } else {
            let _ = writeln!(text, "| {name} | {ticks:.0} |");
        }
    }
    if functions != 0 {
        let _ = writeln!(text, "| {functions} more | {rest:.0} |");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNTED: &str =
        "@ROW out 2 7 1\nk ffffffff81000004 6\nu 401000 4\ng 10000 2\nk ffffffff81000010 2\n";

    #[test]
    fn ticks_go_to_the_function_that_holds_the_address() -> Result<()> {
        let symbols = Symbols::read(
            "ffffffff81000000 T one\nffffffff81000008 t two\nffffffff81000020 D data\n",
        );
        let rows = rows(COUNTED)?;
        let sums = by_function(&rows[0], &symbols, &Lines::default());
        let wanted = [
            ("one", 3.0),
            ("(client)", 2.0),
            ("(guest)", 1.0),
            ("two", 1.0),
        ];
        assert_eq!(sums, wanted.map(|(name, ticks)| (name.to_owned(), ticks)));
        Ok(())
    }

    #[test]
    fn small_shares_are_added_up() -> Result<()> {
        let rows = rows(COUNTED)?;
        let text = table(&rows[0], &Symbols::default(), &Lines::default(), false);
        assert!(text.contains("| 4 more | 7 |"), "{text}");
        Ok(())
    }

    #[test]
    fn lines_that_mean_nothing_are_refused() {
        assert!(rows("k 1 2\n").is_err());
        assert!(rows("@ROW out 2 7 1\nx 1 2\n").is_err());
        assert!(options(&["out; reboot".to_owned()]).is_err());
    }
}
