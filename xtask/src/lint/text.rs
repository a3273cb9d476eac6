//! No file names a folder of somebody's machine or says that something is still to be done.

use super::finding::Finding;
use super::source::Files;

/// Folders that exist on one machine only. Written so that this file has none.
const FOLDERS: &[&str] = &[
    concat!("/", "root"),
    concat!("/", "home"),
    concat!("/", "work"),
];
/// Marks of unfinished work.
const MARKS: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME")];

pub(crate) fn check(files: &Files) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in &files.0 {
        for (index, line) in file.text.lines().enumerate() {
            let folder = FOLDERS.iter().find(|folder| names_folder(line, folder));
            let mark = MARKS.iter().find(|mark| has_word(line, mark));
            for what in folder
                .map(|folder| format!("the folder {folder} of a machine"))
                .into_iter()
                .chain(mark.map(|mark| format!("a {mark}")))
            {
                findings.push(Finding {
                    path: file.path.clone(),
                    line: index + 1,
                    what,
                });
            }
        }
    }
    findings
}

/// Whether a path in the line goes through the folder.
fn names_folder(line: &str, folder: &str) -> bool {
    line.match_indices(folder).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + folder.len()..].chars().next();
        !before.is_some_and(|c| c.is_alphanumeric() || "._-}$)~/*".contains(c))
            && after == Some('/')
    })
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(char::is_alphanumeric) && !after.is_some_and(char::is_alphanumeric)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(line: &str) -> usize {
        check(&Files::of(&[("docs/a.md", line)])).len()
    }

    #[test]
    fn folders_of_a_machine_are_found() {
        for folder in FOLDERS {
            assert_eq!(findings(&format!("see {folder}/x")), 1);
            assert_eq!(findings(&format!("\"{folder}/x\"")), 1);
            assert_eq!(findings(&format!("mkdir {folder}")), 0);
            assert_eq!(
                findings(&format!("target{folder}/x {folder}s $D{folder}")),
                0
            );
        }
    }

    #[test]
    fn marks_are_found() {
        for mark in MARKS {
            assert_eq!(findings(&format!("// {mark}: later")), 1);
            assert_eq!(findings(&format!("MAS{mark}S")), 0);
        }
    }
}
