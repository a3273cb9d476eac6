//! What was measured as a table, as JSON, and in the document.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Figures, Measured};

/// Which figure of a row is compared.
#[derive(Clone, Copy)]
enum By {
    Median,
    /// For rows whose cost is in few of the samples.
    Mean,
}

/// A row of the table.
struct Row {
    name: &'static str,
    what: &'static str,
    by: By,
    target: Target,
    /// HAXM 7.8, measured once on the same emulated PC by other means.
    haxm_7_8: Option<u64>,
}

#[derive(Clone, Copy)]
enum Target {
    None,
    /// Of KVM's figure.
    Ratio(f64),
    /// At most so much.
    Most(u64),
}

const fn row(name: &'static str, what: &'static str, target: Target) -> Row {
    Row {
        name,
        what,
        by: By::Median,
        target,
        haxm_7_8: None,
    }
}

const fn known(name: &'static str, what: &'static str, target: Target, haxm_7_8: u64) -> Row {
    Row {
        name,
        what,
        by: By::Median,
        target,
        haxm_7_8: Some(haxm_7_8),
    }
}

const fn mean(name: &'static str, what: &'static str, target: Target) -> Row {
    Row {
        name,
        what,
        by: By::Mean,
        target,
        haxm_7_8: None,
    }
}

use Target::{Most, Ratio};

const ROWS: &[Row] = &[
    row(
        "bad_descriptor",
        "system call that does nothing",
        Target::None,
    ),
    row(
        "null_ioctl",
        "ioctl that no driver knows, on the vCPU",
        Target::None,
    ),
    known("out", "OUT to user space and back", Ratio(0.5), 6222),
    row("in", "IN from user space", Target::None),
    known("mmio_write", "MMIO write to user space", Ratio(0.5), 7384),
    known("mmio_read", "MMIO read from user space", Ratio(0.5), 7335),
    row("outs_4096", "REP OUTSB of 4096 bytes", Target::None),
    row(
        "outs_4096_exits",
        "the same: returns to user space",
        Target::None,
    ),
    row(
        "hlt_wake",
        "HLT to user space, INTERRUPT, handler, HLT",
        Target::None,
    ),
    row("inject", "INTERRUPT to the handler's OUT", Target::None),
    known("cpuid", "CPUID", Ratio(0.3), 5332),
    row("rdmsr", "RDMSR (IA32_PAT)", Target::None),
    row("wrmsr", "WRMSR (IA32_PAT)", Target::None),
    row("wrmsr_sysenter", "WRMSR (IA32_SYSENTER_CS)", Target::None),
    row("cr0_ts", "CR0.TS changed", Target::None),
    row("cr0_wp", "CR0.WP changed", Target::None),
    row("cr0_cd", "CR0.CD changed", Target::None),
    row("cr4_pge", "CR4.PGE changed", Target::None),
    row("cr4_pae", "CR4.PAE changed", Target::None),
    known(
        "touch_first",
        "first touch of a 4 KB page",
        Ratio(0.5),
        3989,
    ),
    known(
        "touch_host_4k",
        "touch of a 4 KB page the host has, 4 KB backing",
        Target::None,
        468,
    ),
    mean(
        "touch_host_2m",
        "the same, 2 MB backing, mean of 1024 pages",
        Most(20),
    ),
    row(
        "slots_1",
        "one slot mapped and unmapped, 1 other",
        Target::None,
    ),
    row("slots_100", "the same, 100 others", Target::None),
    row("slots_10000", "the same, 10,000 others", Target::None),
    row("vm_create", "VM created and open", Target::None),
    row("vm_close", "VM closed", Target::None),
    row("vcpu_create", "vCPU created and open", Target::None),
    row("module_load", "module loaded (KVM: three)", Target::None),
    row("module_unload", "module unloaded", Target::None),
    known(
        "text",
        "bytes of code and constants in the module",
        Most(200 << 10),
        207 << 10,
    ),
    row("linux", "Linux under QEMU, start to exit", Target::None),
];

fn pick(figures: Figures, by: By) -> u64 {
    match by {
        By::Median => figures.median,
        By::Mean => figures.mean,
    }
}

/// 1234567 as 1,234,567.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index != 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// One row's figures.
struct Line {
    ours: Option<u64>,
    kvm: Option<u64>,
    ratio: Option<f64>,
    met: Option<bool>,
}

impl Line {
    fn of(row: &Row, measured: &Measured) -> Self {
        let of = |side: &super::Side| side.get(row.name).map(|f| pick(*f, row.by));
        let (ours, kvm) = (of(&measured.haxm), of(&measured.kvm));
        let ratio = ours
            .zip(kvm.filter(|kvm| *kvm != 0))
            .map(|(ours, kvm)| ours as f64 / kvm as f64);
        let met = match row.target {
            Target::None => None,
            Ratio(most) => ratio.map(|ratio| ratio <= most),
            Most(most) => ours.map(|ours| ours <= most),
        };
        Self {
            ours,
            kvm,
            ratio,
            met,
        }
    }
}

/// The table.
pub(crate) fn markdown(measured: &Measured) -> String {
    let mut text = format!(
        "| path | haxm-rs | KVM {} | ratio | target | HAXM 7.8 |\n|---|---:|---:|---:|---|---:|\n",
        measured.kernel
    );
    let number = |value: Option<u64>| value.map_or_else(|| "–".to_owned(), grouped);
    for row in ROWS {
        let line = Line::of(row, measured);
        if line.ours.is_none() && line.kvm.is_none() {
            continue;
        }
        let ratio = line
            .ratio
            .map_or_else(|| "–".to_owned(), |r| format!("{r:.2}"));
        let target = match row.target {
            Target::None => String::new(),
            Ratio(most) => format!("{most} of KVM"),
            Most(most) => grouped(most),
        };
        let met = match line.met {
            Some(true) => ", met",
            Some(false) => ", missed",
            None => "",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {ratio} | {target}{met} | {} |",
            row.what,
            number(line.ours),
            number(line.kvm),
            number(row.haxm_7_8)
        );
    }
    text
}

/// All figures of both sides, and what the table says of them.
pub(crate) fn json(measured: &Measured) -> Value {
    let figures = |figures: Option<&Figures>| {
        figures.map(
            |f| json!({"median": f.median, "mean": f.mean, "least": f.least, "count": f.count}),
        )
    };
    let rows: Vec<Value> = ROWS
        .iter()
        .map(|row| {
            let line = Line::of(row, measured);
            json!({
                "name": row.name,
                "what": row.what,
                "haxm": figures(measured.haxm.get(row.name)),
                "kvm": figures(measured.kvm.get(row.name)),
                "ratio": line.ratio,
                "met": line.met,
            })
        })
        .collect();
    json!({"kernel": measured.kernel, "unit": "ticks", "rows": rows})
}

const BEGIN: &str = "<!-- cargo xtask bench --docs: begin -->";
const END: &str = "<!-- cargo xtask bench --docs: end -->";

/// Puts the table between the document's marks.
pub(crate) fn write_document(path: &Path, table: &str) -> Result<()> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let new = replaced(&text, table)
        .with_context(|| format!("{} has no marks for the table", path.display()))?;
    fs::write(path, new).with_context(|| format!("cannot write {}", path.display()))
}

fn replaced(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{table}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(ours: u64, kvm: u64) -> Measured {
        let side = |value| [("out".to_owned(), Figures::one(value))].into();
        Measured {
            kernel: "6.1".to_owned(),
            haxm: side(ours),
            kvm: side(kvm),
        }
    }

    #[test]
    fn a_target_is_met_up_to_its_ratio() {
        assert!(
            markdown(&measured(500, 1000)).contains("| 500 | 1,000 | 0.50 | 0.5 of KVM, met |")
        );
        assert!(markdown(&measured(501, 1000)).contains("0.5 of KVM, missed"));
    }

    #[test]
    fn only_the_table_in_a_document_changes() {
        let old = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = replaced(&old, "new\n").unwrap_or_default();
        assert_eq!(new, format!("a\n{BEGIN}\n\nnew\n\n{END}\nb\n"));
        assert_eq!(replaced(&new, "new\n"), Some(new.clone()));
        assert_eq!(replaced("no marks", "new"), None);
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}
