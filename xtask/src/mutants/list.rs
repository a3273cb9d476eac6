//! The list of breaks: the files `tests/mutants/*.txt`, and what must be true of them.
//!
//! An entry is a block of lines, each a word and its value; blocks are separated by empty lines, `#` begins a comment.
//!
//!     name   zero-extension
//!     file   vmx/src/vcpu/emulation/plain.rs
//!     code   let value = [[u64::from(low)]];
//!     broken high | u64::from(low)
//!     host   vmx/tests/emulate_plain.rs a_load_clears
//!     guest  mmio/load_clears_the_upper_half
//!
//! - `code`: text of one line that occurs exactly once in the file; what is between `[[` and `]]`, or all of it, is
//!   replaced. It is an expression, or statements that end in a semicolon.
//! - `broken`: what stands there instead; without it, nothing.
//! - `host`: a file of tests (`src/lib.rs` for those inside a crate) and words that a test's name contains. One of the
//!   tests must fail. `guest`: conformance cases, by words that their names contain; one must fail for each word. Each
//!   of the lines may be there several times.
//! - `cpus 2`: the conformance cases want so many processors. `counters`: they want performance counters; or
//!   `huge-page`: a PC with a page of 1 GB; or `kvm`: KVM beside the module.
//! - `dies`: a test that hangs or ends the process or the machine is caught too.
//! - `rebuild`: the place is no expression (a constant, a pattern): it is replaced before a build of its own.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use crate::lint::finding::Finding;
use crate::lint::source::Files;

/// Where the list is.
const FOLDER: &str = "tests/mutants/";

/// One place, how it is broken, and what must fail then.
#[derive(Debug, Default)]
pub(crate) struct Mutant {
    /// Unique in the list.
    pub(crate) name: String,
    /// Path below the workspace.
    pub(crate) file: String,
    /// What is replaced: bytes of the file.
    pub(crate) place: Range<usize>,
    /// What stands there instead.
    pub(crate) broken: String,
    /// Host tests, one of each must fail.
    pub(crate) host: Vec<HostTest>,
    /// Conformance cases by parts of their names; for each part one must fail.
    pub(crate) guest: Vec<String>,
    /// The emulated PC of the conformance cases.
    pub(crate) pc: Machine,
    /// Whether an end without a verdict counts.
    pub(crate) dies: bool,
    /// Whether it takes a build of its own.
    pub(crate) rebuild: bool,
}

/// An emulated PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Machine {
    /// Processors.
    pub(crate) cpus: u32,
    /// They have performance counters.
    pub(crate) counters: bool,
    /// It has KVM loaded.
    pub(crate) kvm: bool,
    /// It has a page of 1 GB to give, and no counters.
    pub(crate) huge_page: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            cpus: 1,
            counters: false,
            kvm: false,
            huge_page: false,
        }
    }
}

/// Tests of one program.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HostTest {
    /// The file, below the workspace: the root of the program.
    pub(crate) file: String,
    /// Parts of names; all tests if there is none.
    pub(crate) filters: Vec<String>,
}

impl HostTest {
    /// The folder of the crate.
    pub(crate) fn package(&self) -> &str {
        let end = ["/tests/", "/src/"]
            .iter()
            .find_map(|part| self.file.rfind(part));
        self.file.get(..end.unwrap_or(0)).unwrap_or_default()
    }
}

/// All of them. Their numbers are their places in the list, from 1.
pub(crate) type Mutants = Vec<Mutant>;

impl Mutant {
    /// Whether host tests are to catch it.
    pub(crate) fn is_host(&self) -> bool {
        !self.host.is_empty()
    }

    /// Whether conformance cases are to catch it.
    pub(crate) fn is_guest(&self) -> bool {
        !self.guest.is_empty()
    }
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<44} {}", self.name, self.file)?;
        for test in &self.host {
            write!(f, "  {} {}", test.file, test.filters.join(" "))?;
        }
        for case in &self.guest {
            write!(f, "  {case}")?;
        }
        Ok(())
    }
}

/// The check of `cargo xtask lint`.
pub(crate) fn check(files: &Files) -> Vec<Finding> {
    read(files).1
}

/// The list, and what is wrong with it.
pub(crate) fn read(files: &Files) -> (Mutants, Vec<Finding>) {
    let cases = cases(files);
    let mut reader = Reader {
        files,
        cases: &cases,
        mutants: Vec::new(),
        findings: Vec::new(),
    };
    for file in &files.0 {
        if file.path.starts_with(FOLDER) && file.path.ends_with(".txt") {
            reader.file(&file.path, &file.text);
        }
    }
    reader.whole();
    (reader.mutants, reader.findings)
}

/// All conformance cases, `group/case`: the tables of `tests/conformance`.
pub(crate) fn cases(files: &Files) -> BTreeSet<String> {
    let mut cases = BTreeSet::new();
    for file in &files.0 {
        let group = file
            .path
            .strip_prefix("tests/conformance/src/cases/")
            .and_then(|name| name.strip_suffix(".rs"));
        let Some(group) = group.filter(|group| *group != "mod") else {
            continue;
        };
        for part in file.text.split("case!(").skip(1) {
            let name = part.split([')', ' ']).next().unwrap_or_default();
            cases.insert(format!("{group}/{name}"));
        }
    }
    cases
}

/// Whether a part of a name can be one of this case's, with or without a mode.
fn matches(case: &str, part: &str) -> bool {
    let with_mode = part
        .strip_prefix(case)
        .is_some_and(|rest| rest.starts_with('/'));
    with_mode || format!("{case}/").contains(part)
}

struct Reader<'a> {
    files: &'a Files,
    cases: &'a BTreeSet<String>,
    mutants: Mutants,
    findings: Vec<Finding>,
}

impl Reader<'_> {
    fn file(&mut self, path: &str, text: &str) {
        let mut block: Vec<&str> = Vec::new();
        let mut start = 1;
        for (number, line) in (1..).zip(text.lines().chain([""])) {
            if line.starts_with('#') {
                continue;
            }
            if !line.trim().is_empty() {
                if block.is_empty() {
                    start = number;
                }
                block.push(line);
            } else if !block.is_empty() {
                match self.entry(&block) {
                    Ok(mutant) => self.mutants.push(mutant),
                    Err(what) => self.findings.push(Finding {
                        path: path.to_owned(),
                        line: start,
                        what,
                    }),
                }
                block.clear();
            }
        }
    }

    fn entry(&self, block: &[&str]) -> Result<Mutant, String> {
        let mut mutant = Mutant::default();
        let mut code = "";
        for line in block {
            let (word, value) = line.split_once(' ').unwrap_or((line, ""));
            let value = value.trim();
            match word {
                "name" => value.clone_into(&mut mutant.name),
                "file" => value.clone_into(&mut mutant.file),
                "code" => code = value,
                "broken" => value.clone_into(&mut mutant.broken),
                "host" => mutant.host.push(self.host_test(value)?),
                "guest" => self.guest_cases(value, &mut mutant.guest)?,
                "cpus" => mutant.pc.cpus = value.parse().map_err(|_| format!("cpus {value}"))?,
                "huge-page" => mutant.pc.huge_page = true,
                "counters" => mutant.pc.counters = true,
                "kvm" => mutant.pc.kvm = true,
                "dies" => mutant.dies = true,
                "rebuild" => mutant.rebuild = true,
                _ => return Err(format!("'{word}' means nothing here")),
            }
        }
        let name = &mutant.name;
        if name.is_empty() || mutant.file.is_empty() || code.is_empty() {
            return Err(format!("'{name}' wants a name, a file and code"));
        }
        if mutant.host.is_empty() && mutant.guest.is_empty() {
            return Err(format!("nothing is said to catch {name}"));
        }
        mutant.place = self
            .place(&mutant.file, code)
            .map_err(|what| format!("{name}: {what}"))?;
        let is_statement = |text: &str| text.is_empty() || text.ends_with([';', '}']);
        if !mutant.rebuild && code_of(code).ends_with(';') && !is_statement(&mutant.broken) {
            return Err(format!("{name}: a statement is replaced by an expression"));
        }
        if !mutant.rebuild && !code_of(code).ends_with(';') && mutant.broken.is_empty() {
            return Err(format!("{name}: an expression is replaced by nothing"));
        }
        Ok(mutant)
    }

    fn place(&self, path: &str, code: &str) -> Result<Range<usize>, String> {
        let file = self.files.0.iter().find(|file| file.path == path);
        let text = &file.ok_or(format!("there is no file {path}"))?.text;
        let (before, inside, after) = parts(code);
        let whole = format!("{before}{inside}{after}");
        let mut found = text.match_indices(&whole);
        let (Some((at, _)), None) = (found.next(), found.next()) else {
            let times = text.matches(&whole).count();
            let hint = "write the line as it is now, or take the break off the list";
            return Err(format!("'{whole}' occurs {times} times in {path}: {hint}"));
        };
        let start = at + before.len();
        Ok(start..start + inside.len())
    }

    fn host_test(&self, value: &str) -> Result<HostTest, String> {
        let mut words = value.split_whitespace().map(str::to_owned);
        let file = words.next().unwrap_or_default();
        if !self.files.0.iter().any(|f| f.path == file) {
            return Err(format!("there is no file of tests '{file}'"));
        }
        Ok(HostTest {
            file,
            filters: words.collect(),
        })
    }

    fn guest_cases(&self, value: &str, parts: &mut Vec<String>) -> Result<(), String> {
        for part in value.split_whitespace() {
            if !self.cases.iter().any(|case| matches(case, part)) {
                return Err(format!("no case is called '{part}'"));
            }
            parts.push(part.to_owned());
        }
        Ok(())
    }

    /// What is true of the list as a whole: names are unique, and places that are not the same do not overlap.
    fn whole(&mut self) {
        let mut names = BTreeSet::new();
        let mut whats = Vec::new();
        for (index, mutant) in self.mutants.iter().enumerate() {
            if !names.insert(&mutant.name) {
                whats.push(format!("two breaks are called {}", mutant.name));
            }
            for other in self.mutants.iter().take(index) {
                let apart = other.file != mutant.file
                    || other.place == mutant.place
                    || other.place.end <= mutant.place.start
                    || mutant.place.end <= other.place.start;
                if !apart {
                    let (one, two) = (&other.name, &mutant.name);
                    whats.push(format!("the places of {one} and {two} overlap"));
                }
            }
        }
        self.findings.extend(whats.into_iter().map(|what| Finding {
            path: FOLDER.to_owned(),
            line: 0,
            what,
        }));
    }
}

/// What is before, between and after the brackets of `code`.
fn parts(code: &str) -> (&str, &str, &str) {
    if let Some((before, rest)) = code.split_once("[[")
        && let Some((inside, after)) = rest.rsplit_once("]]")
    {
        return (before, inside, after);
    }
    ("", code, "")
}

/// What is to be replaced.
fn code_of(code: &str) -> &str {
    parts(code).1
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASES: (&str, &str) = (
        "tests/conformance/src/cases/hlt.rs",
        "case!(runs_on in SIZES),\ncase!(wakes),",
    );

    fn read_with(list: &str, code: &str) -> (Mutants, Vec<String>) {
        let files = Files::of(&[
            ("tests/mutants/a.txt", list),
            ("vmx/src/a.rs", code),
            ("vmx/tests/t.rs", ""),
            CASES,
        ]);
        let (mutants, findings) = read(&files);
        (mutants, findings.into_iter().map(|f| f.what).collect())
    }

    const ENTRY: &str = "# comment\nname n\nfile vmx/src/a.rs\ncode let x = [[a < b]];\nbroken a <= b\n\
                         host vmx/tests/t.rs word\nguest hlt/runs_on hlt/wakes\n";

    #[test]
    fn an_entry_is_read() {
        let (mutants, findings) = read_with(ENTRY, "let x = a < b;");
        assert_eq!(findings, Vec::<String>::new());
        let [mutant] = mutants.as_slice() else {
            panic!("{mutants:?}")
        };
        assert_eq!(mutant.place, 8..13);
        assert_eq!(mutant.broken, "a <= b");
        assert_eq!(mutant.guest, ["hlt/runs_on", "hlt/wakes"]);
        assert_eq!(mutant.host[0].package(), "vmx");
        assert_eq!(mutant.host[0].filters, ["word"]);
        assert!(!mutant.dies && !mutant.rebuild);
    }

    #[test]
    fn code_that_is_gone_or_there_twice_is_found() {
        for code in ["let x = a > b;", "let x = a < b;\nlet x = a < b;"] {
            let findings = read_with(ENTRY, code).1;
            assert!(matches!(findings.as_slice(), [f] if f.contains("times")));
        }
    }

    #[test]
    fn what_is_not_there_is_found() {
        let code = "let x = a < b;";
        for (from, to) in [
            ("hlt/wakes", "hlt/sleeps"),
            ("vmx/tests/t.rs", "vmx/tests/u.rs"),
            ("vmx/src/a.rs", "vmx/src/b.rs"),
            ("name n\n", ""),
            ("host", "hosts"),
            ("broken a <= b\n", ""),
        ] {
            let findings = read_with(&ENTRY.replace(from, to), code).1;
            assert_eq!(findings.len(), 1, "{to}: {findings:?}");
        }
        assert_eq!(read_with("name n\nfile f\ncode c\n", code).1.len(), 1);
    }

    #[test]
    fn the_same_name_and_places_that_overlap_are_found() {
        let code = "let x = a < b;";
        assert_eq!(read_with(&format!("{ENTRY}\n{ENTRY}"), code).1.len(), 1);
        let other = ENTRY.replace("name n", "name m");
        assert_eq!(read_with(&format!("{ENTRY}\n{other}"), code).1.len(), 0);
        let wider = other
            .replace("[[a < b]];", "[[a < b;]]")
            .replace("<= b", "<= b;");
        assert_eq!(read_with(&format!("{ENTRY}\n{wider}"), code).1.len(), 1);
    }
}
