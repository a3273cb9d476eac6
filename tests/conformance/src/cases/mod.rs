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

mod hlt;
mod mmio;
mod pio;
mod string_io;

use crate::modes::Mode;

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
        name: "hlt",
        cases: hlt::CASES,
    },
];
