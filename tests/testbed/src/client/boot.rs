//! One boot of the guest: QEMU's command line inside the emulated PC, and the verdict that comes back.

use std::fmt;

use super::system::{End, System};

/// Where the client's files lie in the emulated PC.
pub const FOLDER: &str = "/client";

/// The initramfs that [`super::Client::add_to`] puts there: the guest that checks what it does.
pub const INITRAMFS: &str = "initramfs";
/// Another, which [`super::Client::add_measuring_to`] puts there: the guest that measures.
pub const MEASURING: &str = "measuring";

/// The virtual machine's board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// The PC of 1996 (i440FX) with SeaBIOS: 16-bit code, shadow RAM, some thousand port accesses.
    Pc,
    /// QEMU's smallest board, with qboot.
    Microvm,
}

impl Machine {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Pc, Self::Microvm];

    /// QEMU's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pc => "pc",
            Self::Microvm => "microvm",
        }
    }

    /// The board called this by QEMU.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|m| m.name() == name)
    }

    /// Its firmware image.
    fn firmware(self) -> &'static str {
        match self {
            Self::Pc => "bios-256k.bin",
            Self::Microvm => "qboot.rom",
        }
    }
}

/// One boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// The board.
    pub machine: Machine,
    /// The guest.
    pub system: System,
    /// Virtual processors, 1 to 16; [`System::Tiny`] uses 4.
    pub cpus: u32,
    /// Guest memory in MiB, at least 24 for Linux.
    pub memory_mb: u32,
    /// The time-stamp counter's rate in kHz, if it is known: the guest then does not measure it, which
    /// an emulated PC is too slow for, and trusts it.
    pub tsc_khz: Option<u32>,
    /// Linux holds patterns in vector registers for a while, made from this number.
    pub vectors: Option<u32>,
    /// Linux looks after this many seconds whether the time-stamp counter is still its clock.
    pub clock_seconds: Option<u32>,
    /// Lets the kernel print its messages, from its first on; each character is two or three exits.
    pub verbose: bool,
    /// QEMU's accelerator: `hax`, or `kvm` or `tcg` to try the guest without the driver.
    pub accelerator: &'static str,
    /// QEMU's processor, where the accelerator listens to it: `hax` does not.
    pub cpu: Option<&'static str>,
    /// The name of the tiny Linux's initramfs in [`FOLDER`].
    pub initramfs: &'static str,
}

impl Boot {
    /// One processor, the tiny Linux in 64 MiB, the time-stamp counter of [`crate::Pc`].
    #[must_use]
    pub fn new(machine: Machine) -> Self {
        Self::of(System::Tiny, machine)
    }

    /// One processor and this guest, in as much memory as it needs.
    #[must_use]
    pub fn of(system: System, machine: Machine) -> Self {
        Self {
            machine,
            system,
            cpus: 1,
            memory_mb: system.memory_mb(),
            tsc_khz: Some(crate::pc::INSTRUCTIONS_PER_SECOND / 1000),
            vectors: None,
            clock_seconds: None,
            verbose: false,
            accelerator: "hax",
            cpu: None,
            initramfs: INITRAMFS,
        }
    }

    /// The guest kernel's command line.
    #[must_use]
    pub fn append(&self) -> String {
        match self.system {
            System::Mach => "console=com0".to_owned(),
            // Neither pictures nor speed measurements.
            System::Memtest => "console=ttyS0,115200 nobench nosm nopause nosmp".to_owned(),
            // It runs these.
            System::Ipxe => "echo guest: iPXE runs && set n:int32 41 && inc n && iseq ${n} 42 && \
                             sleep 1 && echo guest: counts and waits && echo GUEST: PASS || \
                             echo GUEST: FAIL ipxe: a command"
                .to_owned(),
            _ => self.append_linux(),
        }
    }

    fn append_linux(&self) -> String {
        // reboot=t: a triple fault, which is a STATECHANGE exit, ends the machine.
        let mut words = vec![
            "console=ttyS0".to_owned(),
            "reboot=t".to_owned(),
            "panic=-1".to_owned(),
        ];
        if self.system != System::Tiny {
            // Seconds of self-tests in the background.
            words.push("cryptomgr.notests".to_owned());
        }
        if let Some(khz) = self.tsc_khz {
            // The IO-APIC's timer check panics where interrupt handlers are slower than the tick.
            words.push("no_timer_check".to_owned());
            words.push("tsc=reliable".to_owned());
            words.push(format!("tsc_early_khz={khz}"));
            // Time-stamp counts per tick. Otherwise each processor measures for 0.1 s.
            words.push(format!("lpj={}", u64::from(khz) * 1000 / self.system.hz()));
        }
        words.push(format!("guest_cpus={}", self.cpus));
        let seed = self.vectors.map(|n| format!("guest_vectors={n}"));
        let seconds = self.clock_seconds.map(|n| format!("guest_clock={n}"));
        words.extend([seed, seconds].into_iter().flatten());
        let print = if self.verbose {
            "earlyprintk=serial"
        } else {
            "quiet"
        };
        words.push(print.to_owned());
        words.join(" ")
    }

    /// QEMU and its arguments, with files where [`super::Client::add_to`] puts them.
    #[must_use]
    pub fn command(&self) -> Vec<String> {
        let file = |name: &str| format!("{FOLDER}/{name}");
        let firmware = file("firmware");
        let mut words: Vec<String> = Vec::new();
        let mut put = |name: &str, value: String| words.extend([name.to_owned(), value]);
        put("-accel", self.accelerator.to_owned());
        // With this SeaBIOS shows on the serial port what a program puts on the screen.
        let screen = match self.system {
            System::Ipxe => ",graphics=off",
            _ => "",
        };
        // QEMU gives a microvm no clock chip where it has KVM, and Linux looks for it for seconds; with
        // `hax` it gives one by itself.
        let clock = match self.machine {
            Machine::Microvm => ",rtc=on",
            Machine::Pc => "",
        };
        put("-M", format!("{}{clock}{screen}", self.machine.name()));
        put("-m", self.memory_mb.to_string());
        // One package each: SeaBIOS lists in the MP table the first processor of a package only.
        put(
            "-smp",
            format!("{0},sockets={0},cores=1,threads=1", self.cpus),
        );
        if let Some(cpu) = self.cpu {
            put("-cpu", cpu.to_owned());
        }
        put("-display", "none".to_owned());
        put("-vga", "none".to_owned());
        put("-serial", "stdio".to_owned());
        let image = self.system.firmware();
        let usual = || format!("{firmware}/{}", self.machine.firmware());
        put("-bios", image.unwrap_or_else(usual));
        put("-L", firmware);
        put("-kernel", self.system.kernel());
        if let Some(initrd) = self.system.initrd(self.initramfs) {
            put("-initrd", initrd);
        }
        put("-append", self.append());
        words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        words.insert(0, file("qemu"));
        words
    }

    /// The command for a shell script, quoted. Standard input is closed to it: QEMU would put the
    /// console into raw mode.
    #[must_use]
    pub fn shell_line(&self) -> String {
        let quoted: Vec<String> = self.command().iter().map(|w| quote(w)).collect();
        format!("{} </dev/null", quoted.join(" "))
    }

    /// Shell commands that run the guest to its end. A guest that does not end by itself is ended
    /// when it has said enough, and its verdict is spoken for it.
    #[must_use]
    pub fn shell_script(&self) -> String {
        let line = self.shell_line();
        let End::Seen { enough, good, bad } = self.system.end() else {
            return line;
        };
        // What is drawn on a screen comes as escape sequences: a line each.
        format!(
            "{line} >/tmp/guest.log 2>&1 &
qemu=$!
until grep -aq '{enough}' /tmp/guest.log || ! kill -0 $qemu 2>/dev/null; do sleep 1; done
kill $qemu 2>/dev/null
wait $qemu 2>/dev/null
tr '\\033' '\\n' </tmp/guest.log >/tmp/guest.lines
tail -n 40 /tmp/guest.lines
grep -q '{enough}' /tmp/guest.lines && grep -q '{good}' /tmp/guest.lines &&
    ! grep -q '{bad}' /tmp/guest.lines && echo 'GUEST: PASS'"
        )
    }
}

/// A word of a shell command, quoted if it must be. There are no quotes in ours.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_/.,=".contains(c);
    if word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{word}'")
    }
}

/// What the guest says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every step gave what it should.
    Pass,
    /// The step that did not, and how.
    Fail(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass => f.write_str("PASS"),
            Self::Fail(what) => write!(f, "FAIL {what}"),
        }
    }
}

/// The verdict in what the guest wrote on its serial port; `None` if it never came to one. A failure
/// anywhere outweighs a pass.
#[must_use]
pub fn verdict(serial: &str) -> Option<Verdict> {
    let mut passed = false;
    for line in serial.lines() {
        match line.trim().strip_prefix("GUEST: ") {
            Some("PASS") => passed = true,
            Some(other) => {
                let what = other.strip_prefix("FAIL").unwrap_or(other).trim();
                return Some(Verdict::Fail(what.to_owned()));
            }
            None => {}
        }
    }
    passed.then_some(Verdict::Pass)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_names_machine_processors_and_firmware() {
        let boot = Boot {
            cpus: 2,
            ..Boot::new(Machine::Pc)
        };
        let line = boot.shell_line();
        assert!(
            line.starts_with("/client/qemu -accel hax -M pc -m 64 -smp 2,sockets=2,"),
            "{line}"
        );
        assert!(
            line.contains(" -bios /client/firmware/bios-256k.bin -L /client/firmware "),
            "{line}"
        );
        let append = "'console=ttyS0 reboot=t panic=-1 no_timer_check tsc=reliable \
                      tsc_early_khz=50000 lpj=500000 guest_cpus=2 quiet'";
        assert!(line.contains(append), "{line}");
        assert!(line.ends_with(" -no-reboot </dev/null"), "{line}");
        let line = Boot::new(Machine::Microvm).shell_line();
        assert!(
            line.contains(" -M microvm,rtc=on ") && line.contains("/qboot.rom "),
            "{line}"
        );
    }

    #[test]
    fn a_guest_that_measures_its_clock_is_told_nothing_of_it() {
        let boot = Boot {
            tsc_khz: None,
            clock_seconds: Some(5),
            ..Boot::of(System::Debian6_1, Machine::Pc)
        };
        let line = boot.append();
        assert!(line.contains(" guest_clock=5 "), "{line}");
        assert!(!line.contains("tsc") && !line.contains("lpj"), "{line}");
    }

    #[test]
    fn guests_that_never_end_are_ended_and_judged() {
        assert!(!Boot::new(Machine::Pc).shell_script().contains("kill"));
        // The script with a program in QEMU's place that prints this and then waits.
        let judged = |system, output: &str| {
            let boot = Boot::of(system, Machine::Pc);
            let log = format!("/tmp/haxm-script-{}", std::process::id());
            let script = boot
                .shell_script()
                .replace(
                    &boot.shell_line(),
                    &format!("{{ echo '{output}'; exec sleep 9; }}"),
                )
                .replace("/tmp/guest", &log);
            let out = std::process::Command::new("sh")
                .args(["-c", &script])
                .output();
            for end in ["log", "lines"] {
                drop(std::fs::remove_file(format!("{log}.{end}")));
            }
            let out = out.unwrap();
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            assert_eq!(
                out.status.success(),
                text.ends_with("GUEST: PASS\n"),
                "{text}"
            );
            out.status.success()
        };
        assert!(judged(System::Mach, "guest: x\nGUEST: PASS"));
        assert!(!judged(System::Mach, "guest: x\nGUEST: FAIL memory: lost"));
        // The rest of the line is on its way.
        let slowly = "guest: x'; printf GUEST:; sleep 2; echo ' PASS";
        assert!(judged(System::Mach, slowly));
        let screen =
            |errors| format!("\x1b[4;35H #4 [x]\x1b[9;1HPass:  0        Errors: {errors} ");
        assert!(judged(System::Memtest, &screen(0)));
        assert!(!judged(System::Memtest, &screen(3)));
    }

    #[test]
    fn names_lead_back_to_machines() {
        for machine in Machine::ALL {
            assert_eq!(Machine::from_name(machine.name()), Some(machine));
        }
        assert_eq!(Machine::from_name("q35"), None);
    }

    #[test]
    fn verdicts_are_read() {
        assert_eq!(
            verdict("guest: sums\r\nGUEST: PASS\r\n"),
            Some(Verdict::Pass)
        );
        assert_eq!(
            verdict("GUEST: FAIL sleep: interrupted\nGUEST: PASS\n"),
            Some(Verdict::Fail("sleep: interrupted".to_owned()))
        );
        assert_eq!(verdict("guest: /init runs\nguest: GUEST: PASS?\n"), None);
        assert_eq!(verdict("GUEST: PA"), Some(Verdict::Fail("PA".to_owned())));
    }
}
