//! `cargo xtask conformance`: the driver's own tests on the emulated PC. The client is one static binary
//! for the PC's bare initramfs; it opens `/dev/HAX` as any other program does.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use testbed::folder::workspace_root;
use testbed::{Flavour, Pc, packages};

use crate::module;

const HELP: &str = "usage: cargo xtask conformance [OPTIONS] [FILTER]
Loads haxm.ko on the emulated PC and runs the cases whose name contains FILTER through /dev/HAX.
  --cpus N            processors (1)
  --kernel 6.1|6.12|7   Debian's kernel (6.1); 6.1-rt and 7-rt: with PREEMPT_RT
  --kernel debug|kasan  ones built here that watch themselves: locks, lists, objects, memory
  --huge-page         a larger PC that has a page of 1 GB to give
  --pin               with the module's parameter pin=1
  --counters          on a PC whose processors have performance counters
  --signals N         a signal comes every N microseconds of the PC's time
  --kvm               with kvm-intel loaded before haxm.ko, and once more the other way round
  --neighbour         beside a guest of KVM's that runs all the time
  --verbose           name each case before it runs";

/// A run that takes longer hangs. Half a minute to two minutes on an idle machine, but who says that it is one?
const HUNG: Duration = Duration::from_secs(1800);

/// The client runs on the emulated PC whatever the host is.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Flags for a program that runs on the emulated PC: all of it in one file, and the same bytes wherever it was built. Two
/// boots with the same bytes do the same, instruction by instruction.
pub(crate) fn program_flags() -> Vec<String> {
    let mut flags: Vec<String> = ["-C", "target-feature=+crt-static", "-C", "strip=symbols"]
        .map(str::to_owned)
        .into();
    // Panics name the file they are in.
    let cargo = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    let registries = cargo.and_then(|cargo| fs::read_dir(cargo.join("registry/src")).ok());
    for registry in registries.into_iter().flatten().flatten() {
        let path = registry.path();
        flags.push(format!("--remap-path-prefix={}=crates", path.display()));
    }
    flags
}

/// Builds the client in its own target folder and returns the path of the binary.
///
/// # Errors
/// It does not build.
pub(crate) fn build() -> Result<PathBuf> {
    // The C library's archive, and a linker.
    packages::ensure_packages(&["libc6-dev", "gcc"])?;
    let target_dir = workspace_root().join("target/conformance");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let flags = program_flags();
    let status = Command::new(cargo)
        .current_dir(workspace_root())
        .args(["build", "--quiet", "--locked", "--release"])
        .args(["--package", "haxm-conformance", "--target", TARGET])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // A case that panics fails, and the next one runs.
        .env("CARGO_PROFILE_RELEASE_PANIC", "unwind")
        .env("CARGO_TARGET_DIR", &target_dir)
        .env_remove("RUSTFLAGS")
        .status()
        .context("cannot run cargo")?;
    ensure!(status.success(), "the conformance client does not build");
    Ok(target_dir.join(TARGET).join("release/haxm-conformance"))
}

/// The module without its local symbols: it is inserted far quicker (see the test machine's README).
///
/// # Errors
/// `strip` fails.
pub(crate) fn stripped(module: &Path) -> Result<PathBuf> {
    let stripped = module.with_extension("stripped.ko");
    let mut strip = Command::new("strip");
    strip
        // The latter tells in which folder it was built.
        .args([
            "--strip-unneeded",
            "--remove-section=.note.gnu.build-id",
            "-o",
        ])
        .arg(&stripped)
        .arg(module);
    testbed::command::output(&mut strip)?;
    Ok(stripped)
}

/// What kernels that watch themselves say when they start, of what they will look for.
const AT_START: &str = "kmemleak: (Kernel memory leak detector|Automatic memory scanning)";

/// What the emulated PC does with `/haxm.ko` and `/conformance`: load, probe, run the cases, unload, and
/// look what the kernel says about it. Exit code 0 if all of it is as it should be.
pub(crate) fn script(filter: &str, verbose: bool) -> String {
    let verbose = if verbose {
        "export CONFORMANCE_VERBOSE=1\n"
    } else {
        ""
    };
    format!(
        "{verbose}insmod /haxm.ko || exit 10
/conformance probe || exit 11
/conformance run {filter}
code=$?
rmmod haxm || {{ echo 'rmmod failed'; code=12; }}
[ -e /dev/HAX ] && {{ echo '/dev/HAX is still there'; code=13; }}
ls -d /dev/hax* 2>/dev/null && {{ echo 'device nodes are still there'; code=14; }}
if dmesg | grep -E 'BUG|WARNING|Oops|Call Trace|scheduling while atomic|possible recursive|\
bad page|internal error|leak|INFO: |blocked for' | grep -vE '{AT_START}'; then
  echo 'the kernel complains'; code=15
fi
[ $code = 0 ] || dmesg | grep haxm | tail -20
exit $code
"
    )
}

/// The same with guest RAM pinned instead of borrowed.
pub(crate) fn pinned_script(filter: &str, verbose: bool) -> String {
    script(filter, verbose).replacen("insmod /haxm.ko", "insmod /haxm.ko pin=1", 1)
}

/// The same with a guest of KVM's beside it from before the module is loaded until after it is unloaded.
pub(crate) fn neighbour_script(filter: &str, verbose: bool) -> String {
    let script = script(filter, verbose).replacen(
        "[ -e /dev/HAX ]",
        "kill $neighbour; wait $neighbour || { echo 'the guest of KVM failed'; code=20; }\n[ -e /dev/HAX ]",
        1,
    );
    format!(
        "export CONFORMANCE_KVM=neighbour
/conformance neighbour &
neighbour=$!
{script}"
    )
}

/// What the cases about KVM are told where it is loaded and has no other guest.
pub(crate) const KVM_ALONE: &str = "export CONFORMANCE_KVM=alone\n";

/// The same with `kvm-intel`, which is loaded already, and then with it loaded after the module and unloaded before it.
pub(crate) fn kvm_script(filter: &str, verbose: bool) -> String {
    let second = script(filter, verbose)
        .replacen(
            "insmod /haxm.ko",
            "insmod /haxm.ko && insmod /lib/modules/kvm-intel.ko",
            1,
        )
        .replacen("rmmod haxm", "rmmod kvm_intel && rmmod haxm", 1);
    format!(
        "{KVM_ALONE}insmod /haxm.ko || exit 10
/conformance run {filter} || {{ dmesg | tail -40; exit 21; }}
rmmod haxm || exit 12
rmmod kvm_intel || exit 22
{second}"
    )
}

/// One of these scripts for a kernel that watches itself: nothing is left allocated, and the kernel has watched to the
/// end. It stops to check locks after its first complaint or when its tables are full.
pub(crate) fn watched_script(script: &str) -> String {
    let end = "mount -t debugfs none /sys/kernel/debug || exit 17
leaks=/sys/kernel/debug/kmemleak
if [ -e $leaks ]; then
  # It reports what is older than five seconds.
  sleep 6; echo scan > $leaks; sleep 1; echo scan > $leaks
  grep . $leaks && { echo 'memory is left'; code=18; }
fi
grep -q '^ *debug_locks: *1' /proc/lockdep_stats || { echo 'locks are not checked any more'; code=19; }
exit $code
";
    script.replacen("exit $code\n", end, 1)
}

/// A PC with what a kernel that watches itself takes: memory, and instructions between two interrupts of its clock.
pub(crate) fn watched(pc: Pc) -> Pc {
    pc.memory_mb(1024).instructions_per_second(200_000_000)
}

/// The PC with the files of [`script`].
pub(crate) fn pc(module: &Path, client: &Path, script: &str) -> Pc {
    Pc::new()
        .file("/haxm.ko", module)
        .file("/conformance", client)
        // A swap device: 32 MB, which take memory when they are written.
        .module("brd", "rd_nr=1 rd_size=32768")
        .script(script)
        .timeout(HUNG)
}

/// The same with more memory, of which Linux keeps a page of 1 GB for hugetlbfs: the second gigabyte, as its own
/// early memory comes from the top.
pub(crate) fn huge_page_pc(module: &Path, client: &Path, script: &str) -> Pc {
    let free = "/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages";
    let script = format!("[ \"$(cat {free})\" = 1 ] || exit 16\n{script}");
    pc(module, client, &script)
        .memory_mb(2304)
        .append("hugepagesz=1G hugepages=1")
}

/// The PC with performance counters, and the cases about them.
pub(crate) fn counters_pc(module: &Path, client: &Path, script: &str) -> Pc {
    let script = format!("export CONFORMANCE_COUNTERS=1\n{script}");
    pc(module, client, &script).module("msr", "").counters()
}

/// The PC with KVM loaded.
pub(crate) fn kvm_pc(module: &Path, client: &Path, script: &str) -> Pc {
    pc(module, client, script).module("kvm-intel", "")
}

/// Runs the command with the words after its name.
pub(crate) fn run(args: &[String]) -> Result<ExitCode> {
    let mut cpus = 1;
    let mut series = Flavour::default().series().to_owned();
    let mut filter = String::new();
    let mut verbose = false;
    let mut huge_page = false;
    let mut pin = false;
    let mut counters = false;
    let mut signals = None;
    let mut kvm = false;
    let mut neighbour = false;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || {
            args.next()
                .with_context(|| format!("{arg} wants a value\n{HELP}"))
        };
        match arg.as_str() {
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(ExitCode::SUCCESS);
            }
            "--cpus" => cpus = value()?.parse()?,
            "--kernel" => series.clone_from(value()?),
            "--signals" => signals = Some(value()?.parse::<u32>()?),
            "--verbose" => verbose = true,
            "--huge-page" => huge_page = true,
            "--pin" => pin = true,
            "--counters" => counters = true,
            "--kvm" => kvm = true,
            "--neighbour" => neighbour = true,
            // The filter becomes part of a shell script.
            word if is_filter(word) && filter.is_empty() => word.clone_into(&mut filter),
            _ => bail!("cannot make sense of '{arg}'\n{HELP}"),
        }
    }
    let built = module::build(&series)?;
    let client = build()?;
    let stripped = stripped(&built)?;
    let machine = match (huge_page, counters) {
        (true, _) => huge_page_pc,
        (_, true) => counters_pc,
        _ if kvm || neighbour => kvm_pc,
        _ => pc,
    };
    let flavour = Flavour::from_series(&series)?;
    // Where there may be a call trace to read, with the names in it.
    let module = if flavour.is_watching() {
        &built
    } else {
        &stripped
    };
    let script = match (pin, kvm, neighbour) {
        (true, ..) => pinned_script,
        (_, true, _) => kvm_script,
        (_, _, true) => neighbour_script,
        _ => script,
    };
    let mut script = script(&filter, verbose);
    if let Some(microseconds) = signals {
        script = format!("export CONFORMANCE_SIGNALS={microseconds}\n{script}");
    }
    if flavour.is_watching() {
        script = watched_script(&script);
    }
    let mut pc = machine(module, &client, &script);
    if flavour.is_watching() {
        pc = watched(pc);
    }
    let outcome = pc.cpus(cpus).kernel(flavour).run(&mut io::stdout())?;
    eprintln!("conformance: {outcome}");
    Ok(if outcome.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn is_filter(word: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_/".contains(c);
    !word.is_empty() && word.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watched_run_asks_before_it_ends() {
        let script = watched_script(&pinned_script("pio", false));
        let (before, after) = script.split_once("kmemleak\n").unwrap();
        assert!(before.contains("pin=1") && before.contains("rmmod"));
        assert_eq!(script.matches("exit $code\n").count(), 1);
        assert!(after.ends_with("exit $code\n"), "{script}");
    }

    #[test]
    fn words_that_mean_nothing_are_refused() {
        assert!(run(&["--cpu".to_owned()]).is_err());
        assert!(run(&["--cpus".to_owned()]).is_err());
        assert!(run(&["pio; reboot".to_owned()]).is_err());
        assert!(run(&["pio".to_owned(), "hlt".to_owned()]).is_err());
    }
}
