//! Vector registers of three owners at once: two guests, each with two processes that hold patterns in
//! them, and a process of the emulated PC, on one processor if it has no more. None may see another's.

use std::io::Write;

use anyhow::{Result, ensure};
use testbed::client::{Boot, Machine, guest_init};
use testbed::{Outcome, Pc, WorkFolder, cpu};

use crate::{boot, setup};

/// What the three use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registers {
    /// 16 of 256 bits.
    Avx,
    /// 32 of 512 bits, and masks.
    Avx512,
}

impl Registers {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::Avx, Self::Avx512];

    /// As the programs call them.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Avx => "AVX",
            Self::Avx512 => "AVX-512",
        }
    }

    /// A processor that has them and no wider ones.
    fn cpu(self) -> &'static str {
        match self {
            Self::Avx => cpu::HASWELL,
            Self::Avx512 => cpu::SKYLAKE_X,
        }
    }
}

/// Runs all three on this emulated PC of [`boot::machine`].
///
/// # Errors
/// The emulated PC could not be started. What happens in it is in the outcome.
pub(crate) fn run(
    parts: &setup::Parts,
    pc: Pc,
    registers: Registers,
    serial: &mut dyn Write,
) -> Result<Outcome> {
    let program = guest_init::ensure_vectors(&WorkFolder::open()?)?;
    let mut pc = pc
        .cpu(registers.cpu())
        // Otherwise a later model's kernel believes CPUID, and every pause is very long.
        .append("tsc_early_khz=50000")
        .memory_mb(512)
        .file("/vectors", program)
        .script(&script());
    parts.client.add_to(pc.files());
    pc.run(serial)
}

/// Ends with code 7 if the emulated PC's own process lost a register, 8 if the three were never at
/// work at the same time.
fn script() -> String {
    let guest = |seed| Boot {
        vectors: Some(seed),
        memory_mb: 32,
        ..Boot::new(Machine::Microvm)
    };
    format!(
        "{}
{} >/tmp/a 2>&1 &
a=$!
{} >/tmp/b 2>&1 &
b=$!
while [ ! -e /tmp/end ]; do /vectors 3000 2 || exit 1; done &
host=$!
together=no
while kill -0 $a 2>/dev/null && kill -0 $b 2>/dev/null; do
    if grep -q 'vectors begin' /tmp/a && grep -q 'vectors begin' /tmp/b &&
        ! grep -q 'vectors end' /tmp/a /tmp/b; then together=yes; fi
    sleep 0.2
done
wait $a
wait $b
touch /tmp/end
wait $host || code=7
cat /tmp/a /tmp/b
[ $together = yes ] || code=8
{}
exit ${{code:-0}}",
        boot::DRIVER_IN,
        guest(1000).shell_line(),
        guest(2000).shell_line(),
        boot::DRIVER_OUT
    )
}

/// Both guests passed with these registers, and the process of the emulated PC kept its own.
///
/// # Errors
/// Which of them did not.
pub(crate) fn judge(outcome: &Outcome, registers: Registers) -> Result<()> {
    ensure!(
        outcome.code != 7,
        "a process of the emulated PC lost a register"
    );
    ensure!(
        outcome.code != 8,
        "the guests did not use them at the same time"
    );
    boot::judge(outcome)?;
    let count = |line: &str| outcome.serial.lines().filter(|l| l.trim() == line).count();
    let begin = format!("guest: vectors begin, {}", registers.name());
    ensure!(
        count(&begin) == 2,
        "the guests do not see {}",
        registers.name()
    );
    ensure!(
        count("guest: vectors end") == 2 && count("GUEST: PASS") == 2,
        "one guest only"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use testbed::Cause;

    use super::*;

    fn outcome(code: u8, serial: &str) -> Outcome {
        Outcome {
            code,
            cause: Cause::PowerOff,
            ticks: 1,
            boot_ticks: 1,
            steps_ticks: 1,
            serial: serial.to_owned(),
            wall: Duration::ZERO,
            folder: None,
        }
    }

    #[test]
    fn two_guests_and_the_host_must_keep_theirs() {
        let one = "guest: vectors begin, AVX\nguest: vectors end\nGUEST: PASS\n";
        let both = one.repeat(2);
        assert!(judge(&outcome(0, &both), Registers::Avx).is_ok());
        assert!(judge(&outcome(0, &both), Registers::Avx512).is_err());
        assert!(judge(&outcome(0, one), Registers::Avx).is_err());
        assert!(judge(&outcome(7, &both), Registers::Avx).is_err());
        assert!(judge(&outcome(8, &both), Registers::Avx).is_err());
        let lost = both.replacen("GUEST: PASS", "GUEST: FAIL vectors: YMM3 changed", 1);
        assert!(judge(&outcome(0, &lost), Registers::Avx).is_err());
    }
}
