//! What was measured, taken out of what the emulated PC wrote.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use testbed::Outcome;

/// One row of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Figures {
    pub(crate) median: u64,
    pub(crate) mean: u64,
    pub(crate) least: u64,
    pub(crate) count: u64,
}

impl Figures {
    pub(crate) const fn one(value: u64) -> Self {
        Self {
            median: value,
            mean: value,
            least: value,
            count: 1,
        }
    }
}

/// The rows of one side by name.
pub(crate) type Side = BTreeMap<String, Figures>;

/// All that was measured.
#[derive(Default)]
pub(crate) struct Measured {
    /// The kernel's series: 6.1 or 6.12.
    pub(crate) series: String,
    /// What the kernel calls itself.
    pub(crate) release: String,
    /// Of this project.
    pub(crate) commit: String,
    /// What compiled the module.
    pub(crate) compiler: String,
    pub(crate) haxm: Side,
    pub(crate) kvm: Side,
}

impl Measured {
    /// Adds the rows of a run with both sides, `@@SIDE NAME` before each:
    ///
    /// - `@@ROW NAME MEDIAN MEAN LEAST COUNT`;
    /// - `@@TICK NAME TICKS` and `@@TICK NAME_end TICKS`, which are the row `NAME`. Of rows that come more than once,
    ///   the last counts.
    ///
    /// # Errors
    /// A side is missing, or a number is none.
    pub(crate) fn read(&mut self, outcome: &Outcome) -> Result<()> {
        let mut sides: BTreeMap<&str, Side> = BTreeMap::new();
        let mut current = "";
        let mut ticks: BTreeMap<&str, u64> = BTreeMap::new();
        for line in outcome.serial.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let side = sides.entry(current).or_default();
            match words.as_slice() {
                ["@@KERNEL", release] => (*release).clone_into(&mut self.release),
                ["@@SIDE", name] => current = name,
                ["@@ROW", name, median, mean, least, count] => {
                    let figures = Figures {
                        median: median.parse()?,
                        mean: mean.parse()?,
                        least: least.parse()?,
                        count: count.parse()?,
                    };
                    side.insert((*name).to_owned(), figures);
                }
                ["@@TICK", label, count] => {
                    let now: u64 = count.parse()?;
                    let row = label.strip_suffix("_end");
                    if let Some((row, start)) = row.and_then(|row| Some((row, ticks.get(row)?))) {
                        side.insert(row.to_owned(), Figures::one(now.saturating_sub(*start)));
                    }
                    ticks.insert(label, now);
                }
                _ => {}
            }
        }
        for (name, all) in [("haxm", &mut self.haxm), ("kvm", &mut self.kvm)] {
            let side = sides.remove(name).unwrap_or_default();
            ensure!(
                !side.is_empty(),
                "nothing was measured of {name}: {outcome}"
            );
            for (row, figures) in side {
                // Of the first boot, which measures it with nothing before.
                if !row.starts_with("module_") || !all.contains_key(&row) {
                    all.insert(row, figures);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use testbed::outcome::Cause;

    fn outcome(serial: &str) -> Outcome {
        Outcome {
            code: 0,
            cause: Cause::PowerOff,
            ticks: 0,
            boot_ticks: 0,
            steps_ticks: 0,
            serial: serial.to_owned(),
            wall: Duration::ZERO,
            folder: None,
        }
    }

    #[test]
    fn rows_go_to_the_side_that_printed_them() -> Result<()> {
        let serial = "@@KERNEL 6.1.0\n@@SIDE kvm\n@@TICK module_load 5\n@@TICK module_load_end 25\n\
                      @@ROW out 3 4 2 9\n\
                      @@SIDE haxm\n@@TICK module_load 100\n@@TICK module_load_end 107\n@@ROW out 1 2 1 9\n";
        let mut measured = Measured::default();
        measured.read(&outcome(serial))?;
        assert_eq!(measured.release, "6.1.0");
        assert_eq!(measured.kvm["out"].median, 3);
        assert_eq!(measured.kvm["module_load"], Figures::one(20));
        assert_eq!(measured.haxm["out"].mean, 2);
        assert_eq!(measured.haxm["module_load"], Figures::one(7));
        Ok(())
    }

    #[test]
    fn a_side_that_is_missing_is_an_error() {
        let serial = "@@SIDE kvm\n@@ROW out 3 4 2 9\n";
        assert!(Measured::default().read(&outcome(serial)).is_err());
    }
}
