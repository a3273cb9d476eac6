//! What was measured, put into docs/performance.md.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::read::Measured;
use super::{chart, table};

const BEGIN: &str = "<!-- cargo xtask bench --docs: begin -->";
const END: &str = "<!-- cargo xtask bench --docs: end -->";

/// The chart, beside the document.
const CHART: &str = "performance.svg";

/// Writes the chart, and the table between the document's marks.
///
/// # Errors
/// The document has no marks, or a file cannot be read or written.
pub(crate) fn write(docs: &Path, measured: &Measured) -> Result<()> {
    let path = docs.join("performance.md");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let part = format!(
        "![Ticks of each path as a part of KVM's]({CHART})\n\n\
         Kernel {}, commit {}, {}.\n\n{}",
        measured.release,
        measured.commit,
        measured.compiler,
        table::markdown(measured)
    );
    let new = replaced(&text, &part)
        .with_context(|| format!("{} has no marks for the table", path.display()))?;
    fs::write(&path, new).with_context(|| format!("cannot write {}", path.display()))?;
    let path = docs.join(CHART);
    fs::write(&path, chart::svg(measured))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn replaced(text: &str, part: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{part}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_part_between_the_marks_changes() {
        let old = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = replaced(&old, "new\n").unwrap_or_default();
        assert_eq!(new, format!("a\n{BEGIN}\n\nnew\n\n{END}\nb\n"));
        assert_eq!(replaced(&new, "new\n"), Some(new.clone()));
        assert_eq!(replaced("no marks", "new"), None);
    }
}
