//! What was measured as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use super::read::{Figures, Measured, Side};
use super::rows::{self, By, GROUPS, Row, Target};

pub(crate) fn pick(figures: Figures, by: By) -> u64 {
    match by {
        By::Median => figures.median,
        By::Mean => figures.mean,
    }
}

/// 1234567 as 1,234,567.
pub(crate) fn grouped(value: u64) -> String {
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
pub(crate) struct Line {
    pub(crate) ours: Option<u64>,
    pub(crate) kvm: Option<u64>,
    pub(crate) ratio: Option<f64>,
    met: Option<bool>,
}

impl Line {
    pub(crate) fn of(row: &Row, measured: &Measured) -> Self {
        let of = |side: &Side| side.get(row.name).map(|f| pick(*f, row.by));
        let (ours, kvm) = (of(&measured.haxm), of(&measured.kvm));
        let ratio = ours
            .zip(kvm.filter(|kvm| *kvm != 0))
            .map(|(ours, kvm)| ours as f64 / kvm as f64);
        let met = match row.target {
            Target::None => None,
            Target::Ratio(most) => ratio.map(|ratio| ratio <= most),
            Target::Most(most) => ours.map(|ours| ours <= most),
        };
        Self {
            ours,
            kvm,
            ratio,
            met,
        }
    }

    fn is_empty(&self) -> bool {
        self.ours.is_none() && self.kvm.is_none()
    }
}

/// The table.
pub(crate) fn markdown(measured: &Measured) -> String {
    let mut text = format!(
        "| path | haxm-rs | KVM {} | ratio | target | HAXM 7.8 |\n|---|---:|---:|---:|---|---:|\n",
        measured.series
    );
    for (group, rows) in GROUPS {
        let lines: Vec<(&Row, Line)> = rows
            .iter()
            .map(|row| (row, Line::of(row, measured)))
            .filter(|(_, line)| !line.is_empty())
            .collect();
        if !lines.is_empty() {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "| **{group}** | | | | | |");
        }
        for (row, line) in lines {
            write_line(&mut text, row, &line);
        }
    }
    text
}

fn write_line(text: &mut String, row: &Row, line: &Line) {
    let number = |value: Option<u64>| value.map_or_else(|| "–".to_owned(), grouped);
    let ratio = line
        .ratio
        .map_or_else(|| "–".to_owned(), |r| format!("{r:.2}"));
    let target = match row.target {
        Target::None => String::new(),
        Target::Ratio(most) => format!("{most:.1} of KVM"),
        Target::Most(most) => grouped(most),
    };
    let met = match line.met {
        Some(true) => ", met",
        Some(false) => ", missed",
        None => "",
    };
    let _ = writeln!(
        text,
        "| {} | {} | {} | {ratio} | {target}{met} | {} |",
        row.what,
        number(line.ours),
        number(line.kvm),
        number(row.haxm_7_8)
    );
}

/// All figures of both sides, and what the table says of them.
pub(crate) fn json(measured: &Measured) -> Value {
    let figures = |figures: Option<&Figures>| {
        figures.map(
            |f| json!({"median": f.median, "mean": f.mean, "least": f.least, "count": f.count}),
        )
    };
    let rows: Vec<Value> = rows::all()
        .map(|row| {
            let line = Line::of(row, measured);
            let (ratio, most) = match row.target {
                Target::None => (None, None),
                Target::Ratio(ratio) => (Some(ratio), None),
                Target::Most(most) => (None, Some(most)),
            };
            json!({
                "name": row.name,
                "what": row.what,
                "compared": match row.by { By::Median => "median", By::Mean => "mean" },
                "haxm": figures(measured.haxm.get(row.name)),
                "kvm": figures(measured.kvm.get(row.name)),
                "haxm_7_8": row.haxm_7_8,
                "ratio": line.ratio,
                "target_ratio": ratio,
                "target_most": most,
                "met": line.met,
            })
        })
        .collect();
    json!({
        "kernel": measured.series,
        "release": measured.release,
        "commit": measured.commit,
        "compiler": measured.compiler,
        "unit": "ticks",
        "rows": rows,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(ours: u64, kvm: u64) -> Measured {
        let side = |value| [("out".to_owned(), Figures::one(value))].into();
        Measured {
            series: "6.1".to_owned(),
            haxm: side(ours),
            kvm: side(kvm),
            ..Measured::default()
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
    fn groups_without_figures_are_left_out() {
        let text = markdown(&measured(500, 1000));
        assert_eq!(text.matches("**").count(), 2, "{text}");
    }

    #[test]
    fn every_row_has_a_name_of_its_own() {
        let mut names: Vec<&str> = rows::all().map(|row| row.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}
