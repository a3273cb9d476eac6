//! The emulated PC: what is in it, and a run from power-on to its verdict.

mod chance;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bochs::{Bochs, Build, COUNTERS_ON};
use crate::cpio::Initramfs;
use crate::cpu;
use crate::disk::{Boot, Geometry};
use crate::firmware;
use crate::folder::{WorkFolder, key_of_file, progress};
use crate::guest::Pieces;
use crate::kernel::{Flavour, Kernel};
use crate::outcome::{self, Cause, Outcome};
use crate::packages;

/// Emulated instructions per emulated second: fewer make timer interrupts dearer, more make delays.
pub(crate) const INSTRUCTIONS_PER_SECOND: u32 = 50_000_000;

/// Nothing printed on the console but warnings, no mitigations, no self-tests: 400 M instructions to
/// /init instead of 2600 M. `dmesg` has everything.
const COMMAND_LINE: &str = "console=ttyS0,115200 panic=-1 reboot=t oops=panic quiet mitigations=off \
    tsc=reliable no_timer_check cryptomgr.notests init_on_alloc=0 clearcpuid=rdrand,rdseed";

/// Initialisations left out, with what they take on 6.1 in instructions. Without them there is no
/// tracefs, no cubic congestion control and no kernel function for BPF programs to call.
const LEFT_OUT: &[&str] = &[
    "jent_mod_init",   // random numbers from jitter, with a self-test: hundreds of M
    "trace_eval_init", // in the background, long after /init
    "load_system_certificate_list",
    "ftrace_check_for_weak_functions", // looks 40,000 functions up by address: 76 M
    "tracer_init_tracefs",             // 43 M
    // Any one of these has the kernel's type information parsed: 47 M.
    "cubictcp_register",
    "bpf_tcp_ca_kfunc_init",
    "bpf_prog_test_run_init",
    "bpf_rstat_kfunc_init",
    "bpf_key_sig_kfuncs_init",
    "kfunc_init",
];

/// How often the serial log is read while the emulator runs.
const POLL: Duration = Duration::from_millis(15);

/// Folders of failed runs that are kept.
const KEPT: usize = 8;

/// An emulated PC. Made with [`Pc::new`], filled, then [`Pc::run`].
#[derive(Clone, Debug)]
#[must_use]
pub struct Pc {
    cpu: String,
    cpus: u32,
    memory_mb: u32,
    flavour: Flavour,
    files: Initramfs,
    /// Name, and parameters if it is to be inserted.
    modules: Vec<(String, Option<String>)>,
    script: String,
    timeout: Duration,
    silence: Option<Duration>,
    append: String,
    feature_control: u8,
    ignore_bad_msrs: bool,
    instructions_per_second: u32,
    /// Instructions that one of several processors does before it is another's turn.
    turn: u32,
    report_errors: bool,
    keep: bool,
    profile: bool,
    counters: bool,
}

impl Default for Pc {
    fn default() -> Self {
        Self::new()
    }
}

impl Pc {
    /// One Haswell processor, 256 MiB, Debian's 6.1 kernel, busybox, two minutes.
    pub fn new() -> Self {
        Self {
            cpu: cpu::HASWELL.to_owned(),
            cpus: 1,
            memory_mb: 256,
            flavour: Flavour::default(),
            files: Initramfs::new(),
            modules: Vec::new(),
            script: String::new(),
            timeout: Duration::from_secs(120),
            silence: None,
            append: String::new(),
            feature_control: firmware::LOCKED_ON,
            ignore_bad_msrs: true,
            instructions_per_second: INSTRUCTIONS_PER_SECOND,
            // The emulator's own default.
            turn: 16,
            report_errors: false,
            keep: false,
            profile: false,
            counters: false,
        }
    }

    /// The processor model, one of [`cpu`] or of `bochs --help cpu`.
    pub fn cpu(mut self, model: &str) -> Self {
        model.clone_into(&mut self.cpu);
        self
    }

    /// The number of processors, 1 to 8. Ticks are instruction counts with one only.
    pub fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// Memory in MiB, 128 to 2560. The initramfs takes its size twice, above 96 MiB.
    pub fn memory_mb(mut self, mb: u32) -> Self {
        self.memory_mb = mb;
        self
    }

    /// The kernel.
    pub fn kernel(mut self, flavour: Flavour) -> Self {
        self.flavour = flavour;
        self
    }

    /// Puts a host file into the initramfs.
    pub fn file(mut self, guest: &str, host: impl Into<PathBuf>) -> Self {
        self.files.host_file(guest, host);
        self
    }

    /// Puts bytes into the initramfs as a file with these permission bits.
    pub fn bytes(mut self, guest: &str, bytes: impl Into<Vec<u8>>, mode: u32) -> Self {
        self.files.bytes(guest, bytes, mode);
        self
    }

    /// The initramfs, for what the other methods do not do: links, nodes, directories.
    pub fn files(&mut self) -> &mut Initramfs {
        &mut self.files
    }

    /// Inserts one of the kernel's own modules before the script runs, and what it depends on before it.
    pub fn module(mut self, name: &str, parameters: &str) -> Self {
        self.modules
            .push((name.to_owned(), Some(parameters.to_owned())));
        self
    }

    /// Puts one of the kernel's own modules at `/lib/modules/NAME.ko` for the script to insert; what it
    /// depends on is inserted already.
    pub fn module_file(mut self, name: &str) -> Self {
        self.modules.push((name.to_owned(), None));
        self
    }

    /// What the guest does: a shell script, run by busybox; its exit code is the run's.
    pub fn script(mut self, script: &str) -> Self {
        script.clone_into(&mut self.script);
        self
    }

    /// Wall time after which the run is ended.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Wall time without a word on the serial port after which the run is ended.
    pub fn silence(mut self, limit: Duration) -> Self {
        self.silence = Some(limit);
        self
    }

    /// Adds to the kernel's command line.
    pub fn append(mut self, arguments: &str) -> Self {
        self.append.push(' ');
        self.append.push_str(arguments);
        self
    }

    /// What the firmware leaves in IA32_FEATURE_CONTROL (MSR 3AH) of every processor that has VMX:
    /// 1 is locked with VMX off, 5 (what this BIOS does by default) locked with VMX on, 0 open; Linux
    /// then locks it with VMX on (SDM volume 3, "Enabling and Entering VMX Operation").
    pub fn feature_control(mut self, value: u8) -> Self {
        self.feature_control = value;
        self
    }

    /// Whether MSRs the emulator does not know read as 0 (the default) or raise #GP as on a real
    /// processor. Linux does not boot with the latter: it reads MSR 1A0H before it can take a fault.
    pub fn ignore_bad_msrs(mut self, ignore: bool) -> Self {
        self.ignore_bad_msrs = ignore;
        self
    }

    /// Emulated instructions, and time-stamp counts, per emulated second; 50 million otherwise. More make
    /// a machine on which an exit takes less time, and every delay more instructions.
    pub fn instructions_per_second(mut self, rate: u32) -> Self {
        self.instructions_per_second = rate;
        self
    }

    /// Lets the emulator log which VM-entry check failed and other oddities, in `bochs.log`; noisy.
    /// Implies [`Pc::keep`].
    pub fn report_errors(mut self) -> Self {
        self.report_errors = true;
        self.keep = true;
        self
    }

    /// Uses the emulator that counts instructions between marks (`profiler/instrument.h`): what it counts is in
    /// `profile.txt` of the run's folder. Implies [`Pc::keep`].
    pub fn profile(mut self) -> Self {
        self.profile = true;
        self.keep = true;
        self
    }

    /// Gives the processors performance counters (`patches/bochs-pmu.patch`), by another build of the emulator.
    pub fn counters(mut self) -> Self {
        self.counters = true;
        self
    }

    /// Keeps the run's folder even when it succeeds.
    pub fn keep(mut self) -> Self {
        self.keep = true;
        self
    }

    /// Switches it on, copies the serial port's output to `serial` as it comes, and waits for the end.
    /// What is needed and not there is installed, fetched or built first.
    ///
    /// # Errors
    /// The PC could not be put together, or `serial` cannot be written. A run that goes wrong is no
    /// error but an [`Outcome`].
    pub fn run(&self, serial: &mut dyn Write) -> Result<Outcome> {
        if let Some(seed) = chance::seed()? {
            return chance::perturbed(self.clone(), seed).start(serial);
        }
        self.start(serial)
    }

    fn start(&self, serial: &mut dyn Write) -> Result<Outcome> {
        ensure!(
            (1..=8).contains(&self.cpus),
            "the emulated PC has 1 to 8 processors"
        );
        ensure!(
            (128..=2560).contains(&self.memory_mb),
            "the emulated PC has 128 to 2560 MiB"
        );
        let work = WorkFolder::open()?;
        packages::ensure_packages(packages::NEEDED)?;
        let bochs = if self.profile {
            Bochs::ensure_profiler(&work)?
        } else if self.counters {
            Bochs::ensure_counters(&work)?
        } else {
            Bochs::ensure(&work)?
        };
        let pieces = Pieces::ensure(&work)?;
        let kernel = Kernel::ensure(&work, self.flavour)?;
        let run = RunFolder::new(&work)?;
        let disk = run.path.join("disk.img");
        let geometry = self.write_disk(&disk, &work, &pieces, &kernel)?;
        // Of two runs that do not agree: whether they booted the same.
        progress(&format!("a disk with key {}", key_of_file(&disk)?));
        let bios = firmware::with_feature_control(&fs::read(&bochs.bios)?, self.feature_control)?;
        fs::write(run.path.join("bios.rom"), bios)?;
        let config = self.config(&bochs, &pieces, geometry);
        fs::write(run.path.join("bochsrc"), config)?;
        self.emulate(run, &bochs, &pieces, serial)
    }

    fn write_disk(
        &self,
        path: &Path,
        work: &WorkFolder,
        pieces: &Pieces,
        kernel: &Kernel,
    ) -> Result<Geometry> {
        let mut files = self.files.clone();
        pieces.add_to(&mut files)?;
        let mut steps = String::new();
        let mut inserted = Vec::new();
        for (name, parameters) in &self.modules {
            let order = kernel.module(work, name)?;
            let last = order.len() - 1;
            for (i, (name, file)) in order.into_iter().enumerate() {
                if inserted.contains(&name) {
                    continue;
                }
                let path = format!("/lib/modules/{name}.ko");
                let insert = if i < last {
                    Some("")
                } else {
                    parameters.as_deref()
                };
                if let Some(parameters) = insert {
                    steps.push_str(&format!("insmod {path} {parameters} || exit 1\n"));
                }
                files.host_file(&path, file);
                inserted.push(name);
            }
        }
        steps.push_str(&self.script);
        files.bytes("/steps", steps, 0o755);
        let vmlinux = fs::read(&kernel.vmlinux)
            .with_context(|| format!("cannot read {}", kernel.vmlinux.display()))?;
        Boot {
            boot_sector: &pieces.boot_sector()?,
            vmlinux: &vmlinux,
            initramfs: &files.archive()?,
            command_line: &self.command_line(),
            memory: u64::from(self.memory_mb) << 20,
        }
        .write(path)
    }

    fn command_line(&self) -> String {
        format!(
            "{COMMAND_LINE} initcall_blacklist={}{}{}",
            LEFT_OUT.join(","),
            self.flavour.arguments(self.cpus),
            self.append
        )
    }

    /// The emulator's configuration file. Paths are relative to the run's folder where they can be.
    fn config(&self, bochs: &Bochs, pieces: &Pieces, geometry: Geometry) -> String {
        let own = bochs.build != Build::Debian;
        let display = if own {
            "nogui"
        } else {
            "rfb, options=\"timeout=0\""
        };
        // Debian's 2.7 has a sound thread that dies where there is no sound card.
        let sound = if own { "" } else { "sound: driver=dummy\n" };
        // Debian's 2.7 does not know this option; the kernel's command line hides them from the kernel.
        let exclude = if own {
            ", exclude_features=\"rdrand, rdseed\""
        } else {
            ""
        };
        let bad_msrs = u8::from(self.ignore_bad_msrs);
        let errors = if self.report_errors {
            "report"
        } else {
            "ignore"
        };
        let (cpu, cpus, memory) = (&self.cpu, self.cpus, self.memory_mb);
        let (rate, turn) = (self.instructions_per_second, self.turn);
        // More than it can have at once goes to a file; nothing here uses so much.
        let at_once = memory.min(2048);
        let (rom, cylinders) = (pieces.vga_rom(), geometry.cylinders);
        let rom = rom.display();
        format!(
            "config_interface: textconfig\n{sound}\
             display_library: {display}\n\
             cpu: model={cpu}, count={cpus}, quantum={turn}, ips={rate}, \
             reset_on_triple_fault=0, ignore_bad_msrs={bad_msrs}{exclude}\n\
             memory: guest={memory}, host={at_once}\n\
             romimage: file=bios.rom\n\
             vgaromimage: file={rom}\n\
             vga: extension=none, realtime=0, update_freq=1\n\
             ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n\
             ata0-master: type=disk, path=disk.img, mode=flat, cylinders={cylinders}, heads=16, spt=63\n\
             boot: disk\n\
             com1: enabled=1, mode=file, dev=serial.log\n\
             clock: sync=none, time0=946684800\n\
             log: bochs.log\n\
             panic: action=fatal\n\
             error: action={errors}\n\
             info: action=ignore\n\
             debug: action=ignore\n"
        )
    }

    fn emulate(
        &self,
        run: RunFolder,
        bochs: &Bochs,
        pieces: &Pieces,
        serial: &mut dyn Write,
    ) -> Result<Outcome> {
        let start = Instant::now();
        let output = File::create(run.path.join("bochs.out"))?;
        // util-linux's setpriv: the emulator goes when we go.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&bochs.program);
        command.args(["-q", "-f", "bochsrc"]);
        if bochs.build == Build::Debian {
            // That build starts in its debugger: continue.
            fs::write(run.path.join("debugger"), "c\n")?;
            command.args(["-rc", "debugger"]);
        }
        command
            .current_dir(&run.path)
            .env("LD_PRELOAD", pieces.clock());
        if bochs.build == Build::Counters {
            command.env(COUNTERS_ON, "1");
        }
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let mut child = Running(command.spawn().context("cannot run setpriv (util-linux)")?);

        let mut tail = Tail::new(run.path.join("serial.log"));
        let mut timed_out = false;
        let mut heard = (0, start);
        loop {
            let ended = child.0.try_wait()?.is_some();
            tail.forward(serial)?;
            if ended {
                break;
            }
            if tail.seen.len() != heard.0 {
                heard = (tail.seen.len(), Instant::now());
            }
            let is_silent = self.silence.is_some_and(|limit| heard.1.elapsed() > limit);
            if is_silent || start.elapsed() > self.timeout {
                timed_out = true;
                break;
            }
            std::thread::sleep(POLL);
        }
        drop(child);
        tail.forward(serial)?;
        self.judge(run, &tail.seen, timed_out, start.elapsed())
    }

    fn judge(
        &self,
        run: RunFolder,
        seen: &[u8],
        timed_out: bool,
        wall: Duration,
    ) -> Result<Outcome> {
        let text = |name: &str| {
            let bytes = fs::read(run.path.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let log = text("bochs.log");
        let cause = match outcome::cause(&log) {
            _ if timed_out => Cause::TimedOut,
            // Faults in the configuration are printed before there is a log.
            Cause::NotStarted(reason) => {
                let out = text("bochs.out");
                let lines = || {
                    out.lines()
                        .rev()
                        .filter(|l| l.contains(char::is_alphanumeric))
                };
                let printed = lines()
                    .find(|l| l.contains("PANIC"))
                    .or_else(|| lines().next());
                Cause::NotStarted(printed.unwrap_or(&reason).trim().to_owned())
            }
            cause => cause,
        };
        let serial = String::from_utf8_lossy(seen).replace('\r', "");
        let mut outcome = Outcome {
            code: outcome::code(&serial, &cause),
            cause,
            ticks: outcome::last_tick(&log),
            boot_ticks: outcome::count(&serial, "@@TICKS init"),
            steps_ticks: outcome::count(&serial, "@@TICKS steps"),
            serial,
            wall,
            folder: None,
        };
        outcome.folder = run.finish(self.keep || !outcome.success())?;
        Ok(outcome)
    }
}

/// A running emulator; ended when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Either it has ended, or it is to end now: there is nothing to do about a failure.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Follows a growing file.
struct Tail {
    path: PathBuf,
    file: Option<File>,
    seen: Vec<u8>,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            seen: Vec::new(),
        }
    }

    /// Copies what is new.
    fn forward(&mut self, to: &mut dyn Write) -> io::Result<()> {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok();
        }
        if let Some(file) = &mut self.file {
            let before = self.seen.len();
            file.read_to_end(&mut self.seen)?;
            if self.seen.len() > before {
                to.write_all(&self.seen[before..])?;
                to.flush()?;
            }
        }
        Ok(())
    }
}

/// The folder of one run, under `runs/` in the work folder.
struct RunFolder {
    path: PathBuf,
    keep: bool,
}

impl RunFolder {
    fn new(work: &WorkFolder) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let runs = work.path("runs");
        fs::create_dir_all(&runs)?;
        prune(&runs);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = runs.join(format!("{}-{number}", std::process::id()));
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir(&path)?;
        Ok(Self { path, keep: false })
    }

    /// Removes the folder, or keeps it without the large disk image and gives its place.
    fn finish(mut self, keep: bool) -> Result<Option<PathBuf>> {
        self.keep = keep;
        if !keep {
            return Ok(None);
        }
        fs::remove_file(self.path.join("disk.img"))?;
        Ok(Some(self.path.clone()))
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if !self.keep {
            // Left behind, it is pruned by a later run.
            drop(fs::remove_dir_all(&self.path));
        }
    }
}

/// Removes the folders of processes that are gone, but for the newest few.
fn prune(runs: &Path) {
    let Ok(entries) = fs::read_dir(runs) else {
        return;
    };
    let mut gone: Vec<_> = entries
        .flatten()
        .filter(|e| {
            let name = e.file_name().to_string_lossy().into_owned();
            let process = name.split('-').next().unwrap_or_default();
            !Path::new("/proc").join(process).exists()
        })
        .map(|e| (e.metadata().and_then(|m| m.modified()).ok(), e.path()))
        .collect();
    gone.sort();
    let surplus = gone.len().saturating_sub(KEPT);
    for (_, path) in gone.into_iter().take(surplus) {
        // Another run may be removing it as well.
        drop(fs::remove_dir_all(path));
    }
}
