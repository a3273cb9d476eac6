//! Whether the code is still well-formed with the breaks in it. One that is not would be found when all of them are
//! built, which takes minutes and tells of nothing else.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::copy::broken;
use super::list::{self, Mutant};
use crate::lint::finding::Finding;
use crate::lint::source::{File, Files};

/// The check of `cargo xtask lint`.
pub(crate) fn check(files: &Files) -> Vec<Finding> {
    let (mutants, _) = list::read(files);
    let mut findings = Vec::new();
    for file in files.0.iter().filter(|file| file.path.ends_with(".rs")) {
        if mutants.iter().any(|m| m.file == file.path) {
            findings.extend(check_file(file, &mutants));
        }
    }
    findings
}

/// All breaks of a file at once, and each of those that take a build of their own.
fn check_file(file: &File, mutants: &[Mutant]) -> Vec<Finding> {
    let finding = |what: String| Finding {
        path: file.path.clone(),
        line: 0,
        what,
    };
    let here = || mutants.iter().filter(|m| m.file == file.path);
    let mut findings = Vec::new();
    if let Err(all) = parse(&broken(&file.path, &file.text, mutants, None)) {
        // Which of them it is.
        let alone = here().filter_map(|m| {
            let text = broken(&file.path, &file.text, std::slice::from_ref(m), None);
            let error = parse(&text).err()?;
            Some(finding(format!("{} is not well-formed: {error}", m.name)))
        });
        findings.extend(alone);
        if findings.is_empty() {
            findings.push(finding(format!("with its breaks: {all}")));
        }
    }
    for mutant in here().filter(|m| m.rebuild) {
        if let Err(error) = parse(&broken(&file.path, &file.text, mutants, Some(mutant))) {
            findings.push(finding(format!("{}: {error}", mutant.name)));
        }
    }
    findings
}

/// Whether this is a Rust file; if not, what the formatter says.
fn parse(text: &str) -> Result<()> {
    let mut formatter = Command::new("rustfmt")
        .args(["--edition", "2024"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run rustfmt")?;
    let written = formatter
        .stdin
        .take()
        .map(|mut stdin| stdin.write_all(text.as_bytes()));
    let output = formatter.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    // A line of the breaks' may be too long, which fails nothing.
    match said.lines().find(|line| line.starts_with("error: ")) {
        Some(error) if !output.status.success() => anyhow::bail!("{error}"),
        _ => Ok(written.transpose().map(drop)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(code: &str, instead: &str, more: &str) -> Vec<String> {
        let list = format!(
            "name n\nfile vmx/src/a.rs\ncode {code}\nbroken {instead}\n{more}host vmx/tests/t.rs\n"
        );
        let files = Files::of(&[
            ("tests/mutants/a.txt", &list),
            (
                "vmx/src/a.rs",
                "fn f() {\n    let x = a && b;\n    g(x);\n}\n",
            ),
            ("vmx/tests/t.rs", ""),
        ]);
        assert_eq!(list::check(&files).len(), 0);
        check(&files).into_iter().map(|f| f.what).collect()
    }

    #[test]
    fn what_is_not_well_formed_is_found_and_named() {
        assert_eq!(found("let x = [[a && b]];", "a", ""), Vec::<String>::new());
        assert_eq!(found("g(x);", "", ""), Vec::<String>::new());
        for (code, instead) in [
            ("[[a &&]] b", "a"),
            ("[[a]] && b", "a &&"),
            ("g(x);", "g(x;"),
        ] {
            let findings = found(code, instead, "");
            assert!(
                matches!(findings.as_slice(), [f] if f.starts_with("n is not")),
                "{findings:?}"
            );
        }
    }

    #[test]
    fn one_that_is_built_alone_is_looked_at_alone() {
        assert_eq!(
            found("[[a &&]] b", "a ||", "rebuild\n"),
            Vec::<String>::new()
        );
        assert_eq!(found("[[a &&]] b", "a", "rebuild\n").len(), 1);
    }
}
