//! Source packages from Debian's archive.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command;

/// Where apt keeps its sources.
const APT: &str = "/etc/apt";

/// Fetches the newest source package `name` that this machine's archive has, and unpacks it, with
/// Debian's patches, at `into`, which must not exist. Its files and apt's lists of sources are kept
/// in `scratch`. Needs no root and leaves apt's own configuration alone.
///
/// # Errors
/// The archive does not answer or has no such package, or dpkg-source fails.
pub(super) fn unpack(name: &str, scratch: &Path, into: &Path) -> Result<()> {
    let lists = apt_with_sources(scratch)?;
    let apt = || {
        let mut apt = Command::new("apt-get");
        apt.arg("-q").args(&lists).current_dir(scratch);
        apt
    };
    let hint = "is this machine's package archive reachable (apt-get update)?";
    command::output(apt().arg("update")).context(hint)?;
    command::output(apt().args(["source", "--download-only", name])).context(hint)?;
    let description = fs::read_dir(scratch)?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.extension().is_some_and(|e| e == "dsc"))
        .with_context(|| format!("apt-get fetched no source package {name}"))?;
    // apt has checked the signed lists' sums.
    let mut unpack = Command::new("dpkg-source");
    unpack.args(["--no-check", "--no-copy", "-x"]);
    command::output(unpack.arg(description).arg(into)).map(drop)
}

/// A private copy of apt's sources in which every entry of Debian's is one for source packages, and
/// the options that make apt use it. No name of a mirror is written down anywhere else.
fn apt_with_sources(scratch: &Path) -> Result<Vec<String>> {
    let parts = scratch.join("sources.d");
    for dir in [
        &parts,
        &scratch.join("lists/partial"),
        &scratch.join("cache/archives/partial"),
    ] {
        fs::create_dir_all(dir)?;
    }
    let mut found = false;
    for path in apt_files() {
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let one_line = path.extension().is_some_and(|e| e == "list");
        let text = if one_line {
            from_lines(&text)
        } else {
            from_stanzas(&text)
        };
        found |= !text.is_empty();
        let name = path.file_name().context("a file without a name")?;
        fs::write(parts.join(name), text)?;
    }
    ensure!(found, "{APT} names no Debian archive to fetch sources from");
    let scratch = scratch
        .to_str()
        .context("the work folder's name is not UTF-8")?;
    let mut options = Vec::new();
    for option in [
        format!("Dir::Etc::SourceParts={scratch}/sources.d"),
        "Dir::Etc::SourceList=/dev/null".to_owned(),
        format!("Dir::State::Lists={scratch}/lists"),
        format!("Dir::Cache={scratch}/cache"),
        // Run by root it would otherwise fetch as a user who may not write here.
        "APT::Sandbox::User=root".to_owned(),
    ] {
        options.extend(["-o".to_owned(), option]);
    }
    Ok(options)
}

fn apt_files() -> Vec<PathBuf> {
    let mut files = vec![Path::new(APT).join("sources.list")];
    let parts = fs::read_dir(Path::new(APT).join("sources.list.d"));
    files.extend(
        parts
            .into_iter()
            .flatten()
            .filter_map(|e| Some(e.ok()?.path())),
    );
    files.retain(|p| p.is_file() && p.extension().is_some_and(|e| e == "list" || e == "sources"));
    files.sort();
    files
}

/// Debian's archives have a component called main; other publishers' may have no sources.
fn is_debian(words: &[&str]) -> bool {
    words.contains(&"main")
}

/// Entries of the form `deb [options] URI suite component...`.
fn from_lines(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.first() == Some(&"deb") && is_debian(&words) {
            out.push_str("deb-src ");
            out.push_str(&words[1..].join(" "));
            out.push('\n');
        }
    }
    out
}

/// Entries of the form `Types: deb` and so on, separated by empty lines.
fn from_stanzas(text: &str) -> String {
    let mut out = String::new();
    let text: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    for stanza in text.split(|l| l.trim().is_empty()) {
        let field = |name: &str| {
            let line = stanza
                .iter()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default()
                .split_whitespace()
                .collect::<Vec<_>>()
        };
        if field("Types").is_empty() || !is_debian(&field("Components")) {
            continue;
        }
        for line in stanza {
            let types = line.starts_with("Types:");
            out.push_str(if types { "Types: deb-src" } else { line });
            out.push('\n');
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_entries_become_sources() {
        let text = "# deb http://a.example/debian old main\n\
                    deb [signed-by=/k] http://a.example/debian bookworm main contrib # ours\n\
                    deb-src http://a.example/debian bookworm main\n\
                    deb http://b.example/apt sdk extra\n";
        let expected = "deb-src [signed-by=/k] http://a.example/debian bookworm main contrib\n";
        assert_eq!(from_lines(text), expected);
    }

    #[test]
    fn stanzas_become_sources() {
        let text = "Types: deb deb-src\n# a remark\nURIs: http://a.example/debian\n\
                    Suites: bookworm bookworm-updates\nComponents: main\n\n\n\
                    Types: deb\nURIs: http://b.example/x\nSuites: nodistro\nComponents: extra\n";
        let expected = "Types: deb-src\nURIs: http://a.example/debian\n\
                        Suites: bookworm bookworm-updates\nComponents: main\n\n";
        assert_eq!(from_stanzas(text), expected);
    }
}
