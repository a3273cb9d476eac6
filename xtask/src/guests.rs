//! The stages of `cargo xtask test` that run guests under QEMU.

use anyhow::Result;
use testbed::Flavour;
use testbed::client::{Boot, Machine, System};

use crate::test::verdict;
use crate::{run, setup};

/// A guest, and the emulated PC's kernel for it.
#[derive(Clone, Debug)]
pub(crate) struct Stage {
    boot: Boot,
    flavour: Flavour,
}

/// All of them, the quickest first.
pub(crate) fn stages() -> Vec<Stage> {
    use Flavour::{Cloud6_1, Cloud6_12};
    let on = |system, machine, cpus| Boot {
        cpus,
        ..Boot::of(system, machine)
    };
    let (pc, microvm) = (Machine::Pc, Machine::Microvm);
    let clock = Boot {
        tsc_khz: None,
        clock_seconds: Some(5),
        ..on(System::Debian6_1, pc, 2)
    };
    [
        (on(System::Tiny, microvm, 1), Cloud6_1),
        (on(System::Tiny, microvm, 2), Cloud6_1),
        (on(System::Tiny, microvm, 4), Cloud6_1),
        (on(System::Tiny, microvm, 1), Cloud6_12),
        (on(System::Tiny, pc, 1), Cloud6_1),
        (on(System::Tiny, pc, 2), Cloud6_1),
        (on(System::Mach, pc, 1), Cloud6_1),
        (on(System::Memtest, pc, 1), Cloud6_1),
        (on(System::DebianI386, pc, 1), Cloud6_1),
        (on(System::Debian6_12, microvm, 1), Cloud6_1),
        (clock, Cloud6_12),
    ]
    .map(|(boot, flavour)| Stage { boot, flavour })
    .into()
}

impl Stage {
    /// What it says while it runs.
    pub(crate) fn name(&self) -> String {
        let clock = match self.boot.clock_seconds {
            Some(_) => ", its clock",
            None => "",
        };
        format!(
            "guest {}, {} with {} CPU(s), kernel {}{clock}",
            self.boot.system.name(),
            self.boot.machine.name(),
            self.boot.cpus,
            self.flavour.series()
        )
    }

    /// The emulated PC's kernel.
    pub(crate) fn flavour(&self) -> Flavour {
        self.flavour
    }

    /// Runs it, with the parts of its flavour.
    ///
    /// # Errors
    /// The guest did not pass, or could not be started.
    pub(crate) fn run(&self, parts: &setup::Parts) -> Result<()> {
        let mut serial = Vec::new();
        let outcome = run::boot(parts, &self.boot, self.flavour, &mut serial)?;
        let passed = run::passed(&outcome);
        if !passed {
            println!("{}", outcome.serial);
        }
        verdict(&outcome, passed)
    }
}
