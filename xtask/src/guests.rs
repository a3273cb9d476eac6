//! The stages of `cargo xtask test` that run guests under QEMU.

use anyhow::Result;
use testbed::Flavour;
use testbed::client::{Boot, Machine, System};

use crate::vectors::{self, Registers};
use crate::{boot, setup};

/// A guest, the emulated PC's kernel for it, and the PC's processors; or two that use vector registers.
#[derive(Clone, Debug)]
pub(crate) enum Stage {
    One {
        boot: Boot,
        flavour: Flavour,
        host_cpus: u32,
    },
    Vectors(Registers),
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
    let guests = [
        (on(System::Tiny, microvm, 1), Cloud6_1),
        (on(System::Tiny, microvm, 2), Cloud6_1),
        (on(System::Tiny, microvm, 4), Cloud6_1),
        (on(System::Tiny, microvm, 1), Cloud6_12),
        (on(System::Tiny, pc, 1), Cloud6_1),
        (on(System::Tiny, pc, 2), Cloud6_1),
        (on(System::Mach, pc, 1), Cloud6_1),
        (on(System::Memtest, pc, 1), Cloud6_1),
        (on(System::Ipxe, pc, 1), Cloud6_1),
        (on(System::DebianI386, pc, 1), Cloud6_1),
        (on(System::Debian6_12, microvm, 1), Cloud6_1),
        (clock, Cloud6_12),
    ]
    .map(|(boot, flavour)| (boot, flavour, 1));
    // Virtual processors that run at the same time, more of them than real ones.
    let side_by_side = [
        (on(System::Tiny, microvm, 4), Cloud6_1, 2),
        (on(System::Debian6_12, pc, 2), Cloud6_1, 2),
    ];
    let guests = guests.into_iter().chain(side_by_side);
    let guests = guests.map(|(boot, flavour, host_cpus)| Stage::One {
        boot,
        flavour,
        host_cpus,
    });
    let vectors = Registers::ALL.map(Stage::Vectors);
    guests.chain(vectors).collect()
}

impl Stage {
    /// What it says while it runs.
    pub(crate) fn name(&self) -> String {
        let (boot, flavour, host_cpus) = match self {
            Self::One {
                boot,
                flavour,
                host_cpus,
            } => (boot, flavour, host_cpus),
            Self::Vectors(registers) => {
                return format!("{} of two guests and the host", registers.name());
            }
        };
        let clock = match boot.clock_seconds {
            Some(_) => ", its clock",
            None => "",
        };
        format!(
            "guest {}, {} with {} CPU(s), on {host_cpus} with kernel {}{clock}",
            boot.system.name(),
            boot.machine.name(),
            boot.cpus,
            flavour.series()
        )
    }

    /// The emulated PC's kernel.
    pub(crate) fn flavour(&self) -> Flavour {
        match self {
            Self::One { flavour, .. } => *flavour,
            Self::Vectors(_) => Flavour::Cloud6_1,
        }
    }

    /// Runs it, with the parts of its flavour.
    ///
    /// # Errors
    /// The guest did not pass, or could not be started.
    pub(crate) fn run(&self, parts: &setup::Parts) -> Result<()> {
        let mut serial = Vec::new();
        let (outcome, judged) = match self {
            Self::One {
                boot,
                flavour,
                host_cpus,
            } => {
                let pc = boot::machine(parts, *flavour).cpus(*host_cpus);
                let outcome = boot::run(parts, boot, pc, &mut serial)?;
                let judged = boot::judge(&outcome);
                (outcome, judged)
            }
            Self::Vectors(registers) => {
                let pc = boot::machine(parts, self.flavour());
                let outcome = vectors::run(parts, pc, *registers, &mut serial)?;
                let judged = vectors::judge(&outcome, *registers);
                (outcome, judged)
            }
        };
        if judged.is_err() {
            println!("{}", outcome.serial);
        }
        println!("test: {outcome}");
        judged
    }
}
