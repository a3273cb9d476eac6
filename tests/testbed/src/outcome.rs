//! What became of a run: the guest's exit code from the serial line, the cause of the end from the
//! emulator's log, and the ticks.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Exit code for a run that was ended because its time was up.
pub const TIMED_OUT: u8 = 124;
/// Exit code for a guest that ended without saying its own.
pub const NO_VERDICT: u8 = 125;
/// Exit code for an emulator that did not start.
pub const NOT_STARTED: u8 = 126;

/// Why the emulated PC stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// ACPI power-off: the proper end.
    PowerOff,
    /// The emulator's shutdown port.
    ShutdownPort,
    /// A triple fault; a kernel panic ends this way too (`panic=-1 reboot=t`).
    TripleFault,
    /// The emulator gave up, with its message.
    EmulatorPanic(String),
    /// The time was up.
    TimedOut,
    /// The emulator did not start, with its message.
    NotStarted(String),
    /// None of these: the last line of its log.
    Unknown(String),
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The guest's exit code, or one of [`TIMED_OUT`], [`NO_VERDICT`], [`NOT_STARTED`].
    pub code: u8,
    /// Why it stopped.
    pub cause: Cause,
    /// Ticks from power-on to the end: emulated instructions, one TSC count each. 0 if unknown.
    pub ticks: u64,
    /// The counter when /init started: what firmware and kernel took.
    pub boot_ticks: u64,
    /// What the script took.
    pub steps_ticks: u64,
    /// Everything written to the serial port, without carriage returns.
    pub serial: String,
    /// Wall time.
    pub wall: Duration,
    /// The folder with the emulator's log and configuration, kept if the run did not succeed.
    pub folder: Option<PathBuf>,
}

impl Outcome {
    /// The script ended with 0 and the PC powered off properly.
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == 0 && self.cause == Cause::PowerOff
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "exit code {}, {}; {:.1} M ticks ({:.1} M to /init, {:.1} M script), {:.1} s",
            self.code,
            self.cause,
            self.ticks as f64 / 1e6,
            self.boot_ticks as f64 / 1e6,
            self.steps_ticks as f64 / 1e6,
            self.wall.as_secs_f64()
        )?;
        match &self.folder {
            Some(folder) => write!(f, "; see {}", folder.display()),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::PowerOff => f.write_str("powered off"),
            Cause::ShutdownPort => f.write_str("ended by the shutdown port"),
            Cause::TripleFault => f.write_str("triple fault (a kernel panic ends so too)"),
            Cause::EmulatorPanic(text) => write!(f, "the emulator gave up: {text}"),
            Cause::TimedOut => f.write_str("timed out"),
            Cause::NotStarted(text) => write!(f, "the emulator did not start: {text}"),
            Cause::Unknown(text) => write!(f, "stopped for an unknown reason: {text}"),
        }
    }
}

/// The value of the last line that begins with `tag` and a space.
fn tagged<'a>(serial: &'a str, tag: &str) -> Option<&'a str> {
    let lines = serial.split(['\n', '\r']).rev();
    lines
        .filter_map(|l| l.strip_prefix(tag))
        .find_map(|rest| rest.strip_prefix(' '))
}

/// The count in the last line `tag N`, or 0.
#[must_use]
pub fn count(serial: &str, tag: &str) -> u64 {
    tagged(serial, tag)
        .and_then(|n| n.trim().parse().ok())
        .unwrap_or(0)
}

/// The code of a run.
#[must_use]
pub fn code(serial: &str, cause: &Cause) -> u8 {
    match cause {
        Cause::TimedOut => TIMED_OUT,
        Cause::NotStarted(_) => NOT_STARTED,
        _ => tagged(serial, "@@EXIT")
            .and_then(|n| n.trim().parse().ok())
            .unwrap_or(NO_VERDICT),
    }
}

/// Ticks at the last line of the emulator's log: each begins with an 11-digit count and the letter
/// of its level.
#[must_use]
pub fn last_tick(log: &str) -> u64 {
    let tick = |line: &str| -> Option<u64> {
        let end = line.find(|c: char| !c.is_ascii_digit())?;
        (end >= 11 && line[end..].starts_with(['i', 'e', 'p', 'd']))
            .then(|| line[..end].parse().ok())?
    };
    log.lines().rev().find_map(tick).unwrap_or(0)
}

/// The cause, from the emulator's log.
#[must_use]
pub fn cause(log: &str) -> Cause {
    let message = |line: &str| {
        let text = line
            .split(']')
            .next_back()
            .unwrap_or(line)
            .replace(">>PANIC<<", "");
        text.trim().to_owned()
    };
    // The end of the log decides: a guest may have met its own triple fault before.
    for line in log.lines().rev() {
        if line.contains("soft power off") {
            return Cause::PowerOff;
        }
        if line.contains("shutdown requested") {
            return Cause::ShutdownPort;
        }
        if line.contains("exception with no resolution") {
            return Cause::TripleFault;
        }
        if line.contains(">>PANIC<<") {
            return match last_tick(log) {
                0 => Cause::NotStarted(message(line)),
                _ => Cause::EmulatorPanic(message(line)),
            };
        }
    }
    let last = log
        .lines()
        .rev()
        .find(|l| !l.trim().is_empty())
        .unwrap_or("no log");
    match last_tick(log) {
        0 => Cause::NotStarted(message(last)),
        _ => Cause::Unknown(message(last)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str = "00000000000i[      ] Bochs x86 Emulator 3.0\n00000000000p[      ] x\n";

    #[test]
    fn the_exit_line_is_the_last_at_the_start_of_a_line() {
        let off = Cause::PowerOff;
        assert_eq!(code("a\n@@EXIT 3\n", &off), 3);
        assert_eq!(code("@@EXIT 1\r\nx @@EXIT 2\n@@EXITS 4\n", &off), 1);
        assert_eq!(code("@@EXIT 1\n@@EXIT 0\n", &off), 0);
        assert_eq!(code("nothing", &off), NO_VERDICT);
        assert_eq!(code("@@EXIT 300\n", &off), NO_VERDICT);
        assert_eq!(code("@@EXIT 0\n", &Cause::TimedOut), TIMED_OUT);
        assert_eq!(code("", &Cause::NotStarted(String::new())), NOT_STARTED);
    }

    #[test]
    fn ticks_are_read() {
        assert_eq!(
            last_tick(&format!("{START}00724000123i[ACPI  ] x\n(0) more\n")),
            724_000_123
        );
        assert_eq!(
            last_tick(&format!("{START}123456789012p[ACPI  ] x\n")),
            123_456_789_012
        );
        // Lines that only look like it: too short a number, another letter.
        assert_eq!(last_tick("========\n12i[\n00000000012x[\n"), 0);
        assert_eq!(
            count("@@TICKS init 42\n@@TICKS steps 7\n", "@@TICKS steps"),
            7
        );
        assert_eq!(count("", "@@TICKS init"), 0);
    }

    #[test]
    fn causes_are_told_apart() {
        let end = |line: &str| cause(&format!("{START}{line}\n"));
        assert_eq!(
            end("00000000900p[ACPI  ] >>PANIC<< ACPI control: soft power off"),
            Cause::PowerOff
        );
        assert_eq!(
            end("00000000900p[UNMAP ] >>PANIC<< Shutdown port: shutdown requested"),
            Cause::ShutdownPort
        );
        let triple =
            "00000000900p[CPU0  ] >>PANIC<< exception(): 3rd (13) exception with no resolution";
        assert_eq!(end(triple), Cause::TripleFault);
        assert_eq!(
            end("00000000900p[HD    ] >>PANIC<< broken"),
            Cause::EmulatorPanic("broken".into())
        );
        assert_eq!(
            end("00000000000p[MEM0  ] >>PANIC<< ROM: couldn't open ROM image file 'x'"),
            Cause::NotStarted("ROM: couldn't open ROM image file 'x'".into())
        );
        assert_eq!(end("00000000900i[CPU0  ] hm"), Cause::Unknown("hm".into()));
        assert_eq!(cause(""), Cause::NotStarted("no log".into()));
    }

    #[test]
    fn success_wants_a_proper_end() {
        let mut o = Outcome {
            code: 0,
            cause: Cause::PowerOff,
            ticks: 1,
            boot_ticks: 1,
            steps_ticks: 1,
            serial: String::new(),
            wall: Duration::ZERO,
            folder: None,
        };
        assert!(o.success());
        o.cause = Cause::TripleFault;
        assert!(!o.success());
        o.cause = Cause::PowerOff;
        o.code = 1;
        assert!(!o.success());
    }
}
