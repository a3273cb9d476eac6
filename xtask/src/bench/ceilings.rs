//! Ceilings: what was measured last, so that a path that becomes slower does not do so unseen.
//!
//! A row's ceiling is its part of KVM's figure of the same boot, and not a number of ticks: the kernel's own part of a
//! path changes with each of Debian's updates, but for both sides. Another compiler may choose other instructions;
//! then the ceilings are wider. The size of the module is held as it is.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use testbed::Flavour;
use testbed::folder::workspace_root;

use super::read::Measured;
use super::rows;
use super::table::Line;

/// The groups that have the rows with ceilings, as a filter. Of the rest, some depend on the order of what the kernel
/// allocates, and some take long.
const GROUPS: &str = "null,out,in,mmio,hlt,cpuid,msr,cr,touch,fault,growth_vcpus,growth_vms";

/// A row may be so much of its ceiling, and this many ticks more: some rows are a handful of instructions.
const MARGIN: f64 = 1.03;
const MARGIN_OTHER_COMPILER: f64 = 1.10;
const TICKS: f64 = 2.0;

/// One kernel series' ceilings.
#[derive(Debug, PartialEq)]
struct Ceilings {
    /// The compiler they were measured with.
    compiler: String,
    /// Parts of KVM's figure by row.
    ratios: BTreeMap<String, f64>,
    /// Bytes of code and constants.
    text: u64,
}

impl Ceilings {
    fn of(measured: &Measured) -> Result<Self> {
        let mut ratios = BTreeMap::new();
        for row in rows::all().filter(|row| row.held) {
            let ratio = Line::of(row, measured).ratio;
            let ratio = ratio.with_context(|| format!("{} was not measured", row.name))?;
            ratios.insert(row.name.to_owned(), ratio);
        }
        let text = measured.haxm.get("text").context("no size was measured")?;
        Ok(Self {
            compiler: measured.compiler.clone(),
            ratios,
            text: text.median,
        })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let ratios = value.get("ratios")?.as_object()?.iter();
        Some(Self {
            compiler: value.get("compiler")?.as_str()?.to_owned(),
            ratios: ratios
                .map(|(name, ratio)| Some((name.clone(), ratio.as_f64()?)))
                .collect::<Option<_>>()?,
            text: value.get("text")?.as_u64()?,
        })
    }

    /// Six digits: a difference of less is none.
    fn to_json(&self) -> Value {
        let rounded = |ratio: &f64| (ratio * 1e6).ceil() / 1e6;
        let ratios: BTreeMap<&String, f64> = self
            .ratios
            .iter()
            .map(|(name, ratio)| (name, rounded(ratio)))
            .collect();
        json!({"compiler": self.compiler, "ratios": ratios, "text": self.text})
    }

    /// What is above its ceiling, a line each.
    fn exceeded(&self, measured: &Measured) -> Vec<String> {
        let same = self.compiler == measured.compiler;
        let margin = if same { MARGIN } else { MARGIN_OTHER_COMPILER };
        let mut found = Vec::new();
        for row in rows::all().filter(|row| row.held) {
            let Some(ratio) = self.ratios.get(row.name) else {
                found.push(format!("{} has no ceiling", row.name));
                continue;
            };
            let line = Line::of(row, measured);
            let Some((ours, kvm)) = line.ours.zip(line.kvm) else {
                found.push(format!("{} was not measured", row.name));
                continue;
            };
            let most = (kvm as f64 * ratio).mul_add(margin, TICKS);
            if ours as f64 > most {
                found.push(format!(
                    "{} ({}): {ours} ticks, at most {most:.0}",
                    row.name, row.what
                ));
            }
        }
        let text = measured.haxm.get("text").map_or(0, |f| f.median);
        let most = self.text as f64 * margin;
        if text as f64 > most {
            found.push(format!(
                "text: {text} bytes of code and constants, at most {most:.0}"
            ));
        }
        found
    }
}

fn path() -> PathBuf {
    workspace_root().join("tests/bench/ceilings.json")
}

fn file() -> Result<Value> {
    let path = path();
    let text = fs::read_to_string(&path);
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
}

/// Measures the rows with ceilings.
fn measure(flavour: Flavour) -> Result<Measured> {
    let parts = super::Parts::ensure(flavour)?;
    let outcome = parts.boot(flavour, GROUPS)?;
    ensure!(
        outcome.success() && !outcome.serial.contains("@@FAILED"),
        "the rows could not be measured: {outcome}"
    );
    let mut measured = super::new(flavour)?;
    measured.read(&outcome)?;
    parts.sizes(&mut measured)?;
    Ok(measured)
}

/// Measures the rows and writes what they are now as this series' ceilings.
///
/// # Errors
/// A row could not be measured, or the file not be written.
pub(crate) fn set(flavour: Flavour) -> Result<()> {
    let new = Ceilings::of(&measure(flavour)?)?;
    let mut all = file().unwrap_or_else(|_| json!({}));
    let series = all.as_object_mut().context("the ceilings are no object")?;
    series.insert(flavour.series().to_owned(), new.to_json());
    let path = path();
    let text = serde_json::to_string_pretty(&all)? + "\n";
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("bench: {}", path.display());
    Ok(())
}

/// Measures the rows and compares them with this series' ceilings.
///
/// # Errors
/// A row is above its ceiling, has none, or could not be measured.
pub(crate) fn check(flavour: Flavour) -> Result<()> {
    let all = file()?;
    let of_series = all.get(flavour.series()).and_then(Ceilings::from_json);
    let ceilings = of_series.with_context(|| {
        format!(
            "{} has no ceilings for {}",
            path().display(),
            flavour.series()
        )
    })?;
    let measured = measure(flavour)?;
    if ceilings.compiler != measured.compiler {
        println!(
            "bench: the ceilings are of {}, this is {}: they are wider",
            ceilings.compiler, measured.compiler
        );
    }
    let found = ceilings.exceeded(&measured);
    if !found.is_empty() {
        bail!(
            "above the ceilings (if that is meant: cargo xtask bench --set-ceilings):\n  {}",
            found.join("\n  ")
        );
    }
    println!("bench: {} rows below their ceilings", ceilings.ratios.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::read::Figures;
    use super::*;

    /// All rows with ceilings: ours and KVM's.
    fn measured(ours: u64, kvm: u64) -> Measured {
        let side = |value: u64| {
            rows::all()
                .filter(|row| row.held)
                .map(|row| (row.name.to_owned(), Figures::one(value)))
                .chain([("text".to_owned(), Figures::one(value))])
                .collect()
        };
        Measured {
            compiler: "rustc 1".to_owned(),
            haxm: side(ours),
            kvm: side(kvm),
            ..Measured::default()
        }
    }

    fn exceeded(ceilings: &Ceilings, mut now: Measured, row: &str, ours: u64) -> Vec<String> {
        now.haxm.insert(row.to_owned(), Figures::one(ours));
        ceilings.exceeded(&now)
    }

    #[test]
    fn a_row_may_grow_by_three_per_cent_and_no_more() -> Result<()> {
        let ceilings = Ceilings::of(&measured(1000, 2000))?;
        let now = || measured(1000, 2000);
        assert!(exceeded(&ceilings, now(), "out", 1032).is_empty());
        let found = exceeded(&ceilings, now(), "out", 1033);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("out ("), "{found:?}");
        assert_eq!(exceeded(&ceilings, now(), "text", 1031).len(), 1);
        assert!(exceeded(&ceilings, now(), "text", 1030).is_empty());
        Ok(())
    }

    #[test]
    fn what_grows_for_both_is_the_kernels() -> Result<()> {
        let ceilings = Ceilings::of(&measured(1000, 2000))?;
        let mut now = measured(1200, 2400);
        now.haxm.insert("text".to_owned(), Figures::one(1000));
        assert_eq!(ceilings.exceeded(&now), [""; 0]);
        Ok(())
    }

    #[test]
    fn another_compiler_may_differ_more() -> Result<()> {
        let mut ceilings = Ceilings::of(&measured(1000, 2000))?;
        ceilings.compiler = "rustc 2".to_owned();
        let now = || measured(1000, 2000);
        assert!(exceeded(&ceilings, now(), "out", 1100).is_empty());
        assert_eq!(exceeded(&ceilings, now(), "out", 1103).len(), 1);
        Ok(())
    }

    #[test]
    fn a_row_without_a_figure_or_a_ceiling_is_told() -> Result<()> {
        let mut ceilings = Ceilings::of(&measured(1000, 2000))?;
        let mut now = measured(1000, 2000);
        now.haxm.remove("in");
        assert_eq!(ceilings.exceeded(&now), ["in was not measured"]);
        assert!(Ceilings::of(&now).is_err());
        ceilings.ratios.remove("out");
        let now = measured(1000, 2000);
        assert_eq!(ceilings.exceeded(&now), ["out has no ceiling"]);
        Ok(())
    }

    #[test]
    fn the_file_keeps_them() -> Result<()> {
        let ceilings = Ceilings::of(&measured(1000, 2000))?;
        assert_eq!(Ceilings::from_json(&ceilings.to_json()), Some(ceilings));
        assert_eq!(Ceilings::from_json(&json!({})), None);
        Ok(())
    }
}
