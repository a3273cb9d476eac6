//! The copy of the workspace with all breaks in it, each behind its number.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testbed::folder::workspace_root;

use super::list::Mutant;
use crate::lint::source::Files;

/// The environment variable and, for the module, the parameter `broken` say which break is in force.
pub(super) const ENVIRONMENT: &str = "HAXM_BROKEN";

/// What is added to the crate that all others use. On a host the number is read before `main`: a test may count what
/// is allocated later, and where.
const NUMBER: &str = r#"
/// Which break is in force.
pub mod broken {
    use core::sync::atomic::{AtomicU32, Ordering};

    /// Set when the module is loaded, or before `main`.
    pub static NUMBER: AtomicU32 = AtomicU32::new(0);

    /// Whether it is this one.
    #[inline(always)]
    pub fn is(number: u32) -> bool {
        NUMBER.load(Ordering::Relaxed) == number
    }

    #[cfg(not(target_os = "none"))]
    extern crate std;

    #[cfg(not(target_os = "none"))]
    extern "C" fn read() {
        let number = std::env::var("HAXM_BROKEN").ok().and_then(|text| text.parse().ok());
        NUMBER.store(number.unwrap_or(0), Ordering::Relaxed);
    }

    #[cfg(not(target_os = "none"))]
    #[used]
    #[unsafe(link_section = ".init_array")]
    static READ: extern "C" fn() = read;
}
"#;

/// What is added to the module's Rust half.
const SETTER: &str = r#"
#[unsafe(no_mangle)]
extern "C" fn haxm_core_set_broken(number: u32) {
    abi::broken::NUMBER.store(number, Ordering::Relaxed);
}
"#;

/// The module's parameter.
const PARAMETER: &str = "
unsigned int haxm_broken;
module_param_named(broken, haxm_broken, uint, 0444);
void haxm_core_set_broken(u32 number);
";

/// Where the module sets the number: before anything else is done.
const LOAD: &str = "	haxm_core_set_log_level(haxm_log_level);\n	err = haxm_devices_init();";

/// Where the lints of the whole workspace begin, and what makes them quiet.
const LINTS: &str = "[workspace.lints.rust]\n";
const NO_LINTS: &str = "unused = { level = \"allow\", priority = -1 }\n";

/// The copy.
pub(super) struct Copy {
    root: PathBuf,
    /// Text files of the workspace as they are.
    texts: BTreeMap<String, String>,
}

impl Copy {
    /// Copies the workspace's text files below `target/mutants`; others that are there are removed.
    ///
    /// # Errors
    /// A file cannot be written.
    pub(super) fn new(files: &Files) -> Result<Self> {
        let root = workspace_root().join("target/mutants/copy");
        let texts = files.0.iter().map(|f| (f.path.clone(), f.text.clone()));
        let copy = Self {
            root,
            texts: texts.collect(),
        };
        fs::create_dir_all(&copy.root)?;
        remove_others(&copy.root, &copy.root, &copy.texts.keys().collect())?;
        Ok(copy)
    }

    /// Its folder.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Puts all breaks that take no build of their own behind their numbers, and this one, if it is given, in the
    /// place of what it breaks.
    ///
    /// # Errors
    /// A file cannot be written, or the module's C half is not as expected.
    pub(super) fn write(&self, mutants: &[Mutant], rebuilt: Option<&Mutant>) -> Result<()> {
        for (path, text) in &self.texts {
            let text = with_number(path, broken(path, text, mutants, rebuilt))?;
            write(&self.root.join(path), &text)?;
        }
        Ok(())
    }
}

/// A file with its breaks, as [`Copy::write`] says.
pub(super) fn broken(
    path: &str,
    text: &str,
    mutants: &[Mutant],
    rebuilt: Option<&Mutant>,
) -> String {
    let in_const = switched(path, mutants).any(|m| is_in_const_fn(text, m.place.start));
    let mut text = text.to_owned();
    for (place, choices) in places(path, mutants, rebuilt) {
        let old = text.get(place.clone()).unwrap_or_default().to_owned();
        text.replace_range(place, &replacement(path, &old, &choices));
    }
    // A number cannot be asked for while constants are evaluated; who needs that says `rebuild`.
    if in_const {
        text = text.replace("const fn ", "fn ");
    }
    text
}

/// The breaks of a file that are behind numbers.
fn switched<'a>(path: &'a str, mutants: &'a [Mutant]) -> impl Iterator<Item = &'a Mutant> {
    let here = move |m: &&Mutant| m.file == path && !m.rebuild;
    mutants.iter().filter(here)
}

/// Whether the function that this place is in is a `const fn`.
fn is_in_const_fn(text: &str, place: usize) -> bool {
    let before = text.get(..place).unwrap_or_default();
    let head = before.lines().rev().map(str::trim_start).find(|line| {
        ["fn ", "pub", "const fn ", "unsafe fn "]
            .iter()
            .any(|word| line.starts_with(word))
            && line.contains("fn ")
    });
    head.is_some_and(|line| line.contains("const fn "))
}

/// A number and what stands there if it is in force; without a number, in any case.
type Choice<'a> = (Option<usize>, &'a str);

/// The places of a file, the last first, and what may stand there.
fn places<'a>(
    path: &str,
    mutants: &'a [Mutant],
    rebuilt: Option<&'a Mutant>,
) -> Vec<(Range<usize>, Vec<Choice<'a>>)> {
    let mut places: BTreeMap<usize, (Range<usize>, Vec<Choice<'a>>)> = BTreeMap::new();
    for (number, mutant) in (1..).zip(mutants).filter(|(_, m)| m.file == path) {
        let is_rebuilt = rebuilt.is_some_and(|r| r.name == mutant.name);
        if mutant.rebuild && !is_rebuilt {
            continue;
        }
        let choice = ((!is_rebuilt).then_some(number), mutant.broken.as_str());
        let place = places
            .entry(mutant.place.start)
            .or_insert_with(|| (mutant.place.clone(), Vec::new()));
        if is_rebuilt {
            place.1.clear();
        }
        place.1.push(choice);
    }
    places.into_values().rev().collect()
}

/// What is written for a place.
fn replacement(path: &str, old: &str, choices: &[Choice<'_>]) -> String {
    let is_c = !path.ends_with(".rs");
    let is_statement = old.ends_with(';');
    let test = |number: usize| match path {
        _ if is_c => format!("(haxm_broken == {number})"),
        _ if path.starts_with("abi/") => format!("crate::broken::is({number})"),
        _ => format!("::abi::broken::is({number})"),
    };
    let mut text = String::new();
    for (number, broken) in choices {
        let Some(number) = number else {
            return (*broken).to_owned();
        };
        let test = test(*number);
        text.push_str(&match (is_c, is_statement) {
            (true, false) => format!("{test} ? ({broken}) : "),
            (false, false) | (_, true) => format!("if {test} {{ {broken} }} else "),
        });
    }
    match (is_c, is_statement) {
        (true, false) => format!("({text}({old}))"),
        (false, false) => format!("({text}{{ {old} }})"),
        (_, true) => format!("{text}{{ {old} }}"),
    }
}

/// Adds what tells which break is in force.
fn with_number(path: &str, mut text: String) -> Result<String> {
    match path {
        // What is broken has parentheses too many, and variables that nobody reads.
        "Cargo.toml" => text = text.replace(LINTS, &format!("{LINTS}{NO_LINTS}")),
        "abi/src/lib.rs" => {
            text = text.replace("#![forbid(unsafe_code)]", "#![allow(unsafe_code)]");
            text.push_str(NUMBER);
        }
        "driver/linux/src/entry.rs" => text.push_str(SETTER),
        "driver/linux/module.c" => {
            ensure!(text.contains(LOAD), "{path} does not load as expected");
            text = text.replace(
                LOAD,
                &format!("	haxm_core_set_broken(haxm_broken);\n{LOAD}"),
            );
            text = text.replace(
                "#include \"haxm.h\"\n",
                &format!("#include \"haxm.h\"\n{PARAMETER}"),
            );
        }
        _ if path.starts_with("driver/linux/") && path.ends_with(".c") => {
            let declared = "#include \"haxm.h\"\nextern unsigned int haxm_broken;\n";
            text = text.replace("#include \"haxm.h\"\n", declared);
        }
        _ => {}
    }
    Ok(text)
}

/// Writes a file only if its contents change, so that what did not change is not built again.
fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Removes files that the workspace does not have (any more).
fn remove_others(root: &Path, folder: &Path, wanted: &BTreeSet<&String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(root, &path, wanted)?;
            continue;
        }
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        if !wanted.contains(&name) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mutant(name: &str, place: Range<usize>, broken: &str, rebuild: bool) -> Mutant {
        Mutant {
            name: name.to_owned(),
            file: "vmx/src/a.rs".to_owned(),
            place,
            broken: broken.to_owned(),
            rebuild,
            ..Mutant::default()
        }
    }

    #[test]
    fn an_expression_and_a_statement_are_switched() {
        let rust = replacement("vmx/src/a.rs", "a < b", &[(Some(7), "a <= b")]);
        assert_eq!(rust, "(if ::abi::broken::is(7) { a <= b } else { a < b })");
        let two = replacement("abi/src/a.rs", "f();", &[(Some(1), ""), (Some(2), "g();")]);
        assert_eq!(
            two,
            "if crate::broken::is(1) {  } else if crate::broken::is(2) { g(); } else { f(); }"
        );
        let c = replacement("driver/linux/a.c", "x", &[(Some(3), "y")]);
        assert_eq!(c, "((haxm_broken == 3) ? (y) : (x))");
        let c = replacement("driver/linux/a.c", "f();", &[(Some(3), "g();")]);
        assert_eq!(c, "if (haxm_broken == 3) { g(); } else { f(); }");
    }

    #[test]
    fn a_const_fn_is_told_from_others() {
        let text = "const fn a() -> u8 {\n    1\n}\npub fn b() -> u8 {\n    2\n}\n";
        let at = |what| text.find(what).unwrap();
        assert!(is_in_const_fn(text, at("1")));
        assert!(!is_in_const_fn(text, at("2")));
    }

    #[test]
    fn the_last_place_comes_first_and_one_that_is_rebuilt_is_alone() {
        let list = [
            mutant("one", 0..2, "x", false),
            mutant("two", 5..6, "y", false),
            mutant("three", 0..2, "z", true),
        ];
        let all = places("vmx/src/a.rs", &list, None);
        assert_eq!(
            all,
            [(5..6, vec![(Some(2), "y")]), (0..2, vec![(Some(1), "x")])]
        );
        let rebuilt = places("vmx/src/a.rs", &list, list.get(2));
        assert_eq!(rebuilt[1], (0..2, vec![(None, "z")]));
        assert_eq!(places("vmx/src/b.rs", &list, None), []);
    }
}
