//! The cases, by what they are about.

/// Fails unless the two are equal; names what was compared.
#[macro_export]
macro_rules! same {
    ($got:expr, $wanted:expr, $($what:tt)+) => {{
        let (got, wanted) = (&$got, &$wanted);
        anyhow::ensure!(got == wanted, "{}: {got:x?} instead of {wanted:x?}", format!($($what)+));
    }};
}

/// A row of a group's table: `case!(function)`, or `case!(function in MODES)`.
macro_rules! case {
    ($function:ident) => {
        $crate::cases::Case {
            name: stringify!($function),
            body: $crate::cases::Body::Plain($function),
        }
    };
    ($function:ident in $modes:ident) => {
        $crate::cases::Case {
            name: stringify!($function),
            body: $crate::cases::Body::InModes($crate::modes::$modes, $function),
        }
    };
}

/// Ends a case that shows what a host may do with memory that it lends, where the driver pins guest RAM instead.
macro_rules! borrowed_only {
    () => {
        if $crate::cases::is_pinned() {
            println!("  guest RAM is pinned: line {} of {}", line!(), file!());
            return Ok(());
        }
    };
}

mod beside_kvm;
mod compat;
mod control;
mod cpuid;
mod debug;
mod emulated;
mod exceptions;
mod hlt;
mod host;
mod interrupts;
mod irql;
mod lifecycle;
mod memory_changes;
mod memory_crowd;
mod memory_files;
mod memory_leaves;
mod memory_pressure;
mod mmio;
mod mmio_edges;
mod mmio_moves;
mod mmio_strings;
mod mode_changes;
mod msr;
mod oracle;
mod paused;
mod pio;
mod pmu;
mod ram;
mod ram_protection;
mod registers;
mod requests;
mod robustness;
mod rom_delivery;
mod signals;
mod smp;
mod string_io;
mod task_switch;

use abi::VcpuState;

use crate::modes::{Mode, selector};

/// Whether a case passed, and if not, why.
pub type Outcome = anyhow::Result<()>;

/// What a case does.
pub enum Body {
    /// Once.
    Plain(fn() -> Outcome),
    /// Once in each of these modes.
    InModes(&'static [Mode], fn(Mode) -> Outcome),
}

/// A case.
pub struct Case {
    /// Unique in its group.
    pub name: &'static str,
    pub body: Body,
}

/// Cases about one thing.
pub struct Group {
    pub name: &'static str,
    pub cases: &'static [Case],
}

/// All groups, in the order they run.
pub const GROUPS: &[Group] = &[
    Group {
        name: "requests",
        cases: requests::CASES,
    },
    Group {
        name: "compat",
        cases: compat::CASES,
    },
    Group {
        name: "lifecycle",
        cases: lifecycle::CASES,
    },
    Group {
        name: "ram",
        cases: ram::CASES,
    },
    Group {
        name: "ram_protection",
        cases: ram_protection::CASES,
    },
    Group {
        name: "pio",
        cases: pio::CASES,
    },
    Group {
        name: "string_io",
        cases: string_io::CASES,
    },
    Group {
        name: "mmio",
        cases: mmio::CASES,
    },
    Group {
        name: "mmio_strings",
        cases: mmio_strings::CASES,
    },
    Group {
        name: "mmio_edges",
        cases: mmio_edges::CASES,
    },
    Group {
        name: "mmio_moves",
        cases: mmio_moves::CASES,
    },
    Group {
        name: "emulated",
        cases: emulated::CASES,
    },
    Group {
        name: "oracle",
        cases: oracle::CASES,
    },
    Group {
        name: "hlt",
        cases: hlt::CASES,
    },
    Group {
        name: "interrupts",
        cases: interrupts::CASES,
    },
    Group {
        name: "irql",
        cases: irql::CASES,
    },
    Group {
        name: "exceptions",
        cases: exceptions::CASES,
    },
    Group {
        name: "rom_delivery",
        cases: rom_delivery::CASES,
    },
    Group {
        name: "registers",
        cases: registers::CASES,
    },
    Group {
        name: "control",
        cases: control::CASES,
    },
    Group {
        name: "mode_changes",
        cases: mode_changes::CASES,
    },
    Group {
        name: "task_switch",
        cases: task_switch::CASES,
    },
    Group {
        name: "cpuid",
        cases: cpuid::CASES,
    },
    Group {
        name: "msr",
        cases: msr::CASES,
    },
    Group {
        name: "pmu",
        cases: pmu::CASES,
    },
    Group {
        name: "debug",
        cases: debug::CASES,
    },
    Group {
        name: "paused",
        cases: paused::CASES,
    },
    Group {
        name: "smp",
        cases: smp::CASES,
    },
    Group {
        name: "signals",
        cases: signals::CASES,
    },
    Group {
        name: "robustness",
        cases: robustness::CASES,
    },
    Group {
        name: "host",
        cases: host::CASES,
    },
    Group {
        name: "memory_changes",
        cases: memory_changes::CASES,
    },
    Group {
        name: "memory_crowd",
        cases: memory_crowd::CASES,
    },
    Group {
        name: "memory_files",
        cases: memory_files::CASES,
    },
    Group {
        name: "memory_leaves",
        cases: memory_leaves::CASES,
    },
    Group {
        name: "memory_pressure",
        cases: memory_pressure::CASES,
    },
    Group {
        name: "beside_kvm",
        cases: beside_kvm::CASES,
    },
];

/// Puts a vCPU of protected or long mode into ring 3, where it is.
fn enter_user(mode: Mode, state: &mut VcpuState) {
    const RING_3: u32 = 3 << 5;
    state.cs.selector = if mode == Mode::Long {
        selector::USER_CODE64
    } else {
        selector::USER_CODE32
    };
    state.cs.ar |= RING_3;
    for data in [
        &mut state.ss,
        &mut state.ds,
        &mut state.es,
        &mut state.fs,
        &mut state.gs,
    ] {
        data.selector = selector::USER_DATA;
        data.ar |= RING_3;
    }
}

/// Whether the driver pins guest RAM: its parameter.
fn is_pinned() -> bool {
    let text = std::fs::read_to_string("/sys/module/haxm/parameters/pin");
    text.is_ok_and(|text| text.starts_with('Y'))
}
