//! One boot of the guest: QEMU's command line inside the emulated PC, and the verdict that comes back.

use std::fmt;

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

    /// The board with its options. QEMU gives a microvm no clock chip where it has KVM, and Linux looks for it for
    /// seconds; with `hax` it gives one by itself.
    fn board(self) -> &'static str {
        match self {
            Self::Pc => "pc",
            Self::Microvm => "microvm,rtc=on",
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

/// The form of the kernel that is loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Image {
    /// Compressed, entered in real mode (pc) or 32-bit mode; as on any machine.
    #[default]
    BzImage,
    /// The ELF file, entered through its PVH note: a quarter fewer instructions, but 14 MB large.
    /// `Client::add_to` does not copy it: put it at `/client/vmlinux`.
    Vmlinux,
}

/// One boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// The board.
    pub machine: Machine,
    /// Virtual processors, 1 to 4.
    pub cpus: u32,
    /// Guest memory in MiB, at least 24.
    pub memory_mb: u32,
    /// The kernel's form.
    pub image: Image,
    /// The time-stamp counter's rate in kHz, if it is known: the guest then does not measure it, which
    /// an emulated PC is too slow for.
    pub tsc_khz: Option<u32>,
    /// Lets the kernel print its messages, from its first on; each character is two or three exits.
    pub verbose: bool,
    /// QEMU's accelerator: `hax`, or `kvm` to compare with.
    pub accelerator: &'static str,
    /// The name of the guest's initramfs in [`FOLDER`].
    pub initramfs: &'static str,
}

impl Boot {
    /// One processor, 64 MiB, the time-stamp counter of [`crate::Pc`].
    #[must_use]
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            cpus: 1,
            memory_mb: 64,
            image: Image::default(),
            tsc_khz: Some(crate::pc::INSTRUCTIONS_PER_SECOND / 1000),
            verbose: false,
            accelerator: "hax",
            initramfs: INITRAMFS,
        }
    }

    /// The guest kernel's command line.
    #[must_use]
    pub fn append(&self) -> String {
        // reboot=t: a triple fault, which is a STATECHANGE exit, ends the machine. The IO-APIC's
        // timer check panics where interrupt handlers are slower than the tick.
        let mut words = vec![
            "console=ttyS0".to_owned(),
            "reboot=t".to_owned(),
            "panic=-1".to_owned(),
            "no_timer_check".to_owned(),
            "tsc=reliable".to_owned(),
            format!("guest_cpus={}", self.cpus),
        ];
        if let Some(khz) = self.tsc_khz {
            words.push(format!("tsc_early_khz={khz}"));
            // Time-stamp counts per tick of 10 ms. Otherwise each processor measures for 0.1 s.
            words.push(format!("lpj={}", u64::from(khz) * 10));
        }
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
        let image = match self.image {
            Image::BzImage => "bzImage",
            Image::Vmlinux => "vmlinux",
        };
        let file = |name: &str| format!("{FOLDER}/{name}");
        let firmware = file("firmware");
        let mut words: Vec<String> = Vec::new();
        let mut put = |name: &str, value: String| words.extend([name.to_owned(), value]);
        put("-accel", self.accelerator.to_owned());
        put("-M", self.machine.board().to_owned());
        put("-m", self.memory_mb.to_string());
        // One package each: SeaBIOS lists in the MP table the first processor of a package only.
        put(
            "-smp",
            format!("{0},sockets={0},cores=1,threads=1", self.cpus),
        );
        put("-display", "none".to_owned());
        put("-vga", "none".to_owned());
        put("-serial", "stdio".to_owned());
        put("-bios", format!("{firmware}/{}", self.machine.firmware()));
        put("-L", firmware);
        put("-kernel", file(image));
        put("-initrd", file(self.initramfs));
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
        let append = "'console=ttyS0 reboot=t panic=-1 no_timer_check tsc=reliable guest_cpus=2 \
                      tsc_early_khz=50000 lpj=500000 quiet'";
        assert!(line.contains(append), "{line}");
        assert!(line.ends_with(" -no-reboot </dev/null"), "{line}");
        let line = Boot::new(Machine::Microvm).shell_line();
        assert!(
            line.contains(" -M microvm,rtc=on ") && line.contains("/qboot.rom "),
            "{line}"
        );
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
