//! A file over 600 lines of code is two ideas.

use super::finding::Finding;
use super::source::Files;

/// Most lines of code in a file. Blank lines and lines of comment do not count.
const LIMIT: usize = 600;

pub(crate) fn check(files: &Files) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in &files.0 {
        if ![".rs", ".c", ".h", ".S"]
            .iter()
            .any(|end| file.path.ends_with(end))
        {
            continue;
        }
        let lines = file.text.lines().filter(|line| is_code(line)).count();
        if lines > LIMIT {
            findings.push(Finding {
                path: file.path.clone(),
                line: 0,
                what: format!("{lines} lines of code; {LIMIT} is the limit"),
            });
        }
    }
    findings
}

fn is_code(line: &str) -> bool {
    let line = line.trim();
    !(line.is_empty() || line.starts_with("//") || line.starts_with("/*") || line.starts_with("* "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_counts() {
        let code = "let x = 1;\n";
        let long = code.repeat(LIMIT + 1);
        let fits = format!("{}{}", code.repeat(LIMIT), "// why\n\n".repeat(100));
        assert_eq!(
            check(&Files::of(&[("a.rs", &long), ("b.c", &long)])).len(),
            2
        );
        assert!(check(&Files::of(&[("a.rs", &fits), ("a.md", &long)])).is_empty());
    }
}
