//! The modules of its own crate that a Rust file names: `crate::…` and `super::…`, in `use` trees
//! and anywhere else.

use std::collections::BTreeMap;

use super::source::{File, Kind, Token};

/// A name below the crate's root, and where it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    /// First segment below the root.
    pub(crate) segment: String,
    /// Line.
    pub(crate) line: usize,
}

/// The module path of a file below its crate's `src` folder.
pub(crate) fn module_path(below_src: &str) -> Vec<String> {
    let stem = below_src.strip_suffix(".rs").unwrap_or(below_src);
    let mut path: Vec<String> = stem.split('/').map(str::to_owned).collect();
    if matches!(
        path.last().map(String::as_str),
        Some("mod" | "lib" | "main")
    ) {
        path.pop();
    }
    path
}

/// Names below the crate's root that the file uses. `path` is its module path.
pub(crate) fn named_modules(file: &File, path: &[String]) -> Vec<Named> {
    let tokens = &file.tokens;
    let mut named = Vec::new();
    // Inline modules around the token, by the depth of braces they opened at.
    let mut inline: Vec<usize> = Vec::new();
    let mut depth = 0_usize;
    let mut at = 0;
    while at < tokens.len() {
        match &tokens[at].kind {
            Kind::Open('{') => {
                if at >= 2 && tokens[at - 2].is_word("mod") && tokens[at - 1].word().is_some() {
                    inline.push(depth);
                }
                depth += 1;
            }
            Kind::Close('}') => {
                depth = depth.saturating_sub(1);
                if inline.last() == Some(&depth) {
                    inline.pop();
                }
            }
            Kind::Word(word) if word == "crate" => {
                after_separator(tokens, at, &mut named);
            }
            Kind::Word(word) if word == "super" && !after_super(tokens, at) => {
                let mut last = at;
                let mut ups = 1;
                while is_separator(tokens, last + 1)
                    && tokens
                        .get(last + 3)
                        .is_some_and(|token| token.is_word("super"))
                {
                    last += 3;
                    ups += 1;
                }
                // Every `super` leaves one module; at the root, what follows is below it.
                if ups == path.len() + inline.len() {
                    after_separator(tokens, last, &mut named);
                } else if ups < path.len() + inline.len() && ups >= inline.len() {
                    // Still inside the file's own top module.
                    if let Some(top) = path.first() {
                        named.push(Named {
                            segment: top.clone(),
                            line: tokens[at].line,
                        });
                    }
                }
            }
            _ => {}
        }
        at += 1;
    }
    named
}

fn is_separator(tokens: &[Token], at: usize) -> bool {
    let colon = |at: usize| tokens.get(at).is_some_and(|token| token.is_sign(':'));
    colon(at) && colon(at + 1)
}

fn after_super(tokens: &[Token], at: usize) -> bool {
    at >= 3 && is_separator(tokens, at - 2) && tokens[at - 3].is_word("super")
}

/// The names that follow `::` after the token: one, or the heads of a group.
fn after_separator(tokens: &[Token], at: usize, named: &mut Vec<Named>) {
    if !is_separator(tokens, at + 1) {
        return;
    }
    let Some(next) = tokens.get(at + 3) else {
        return;
    };
    match &next.kind {
        Kind::Word(word) => named.push(Named {
            segment: word.clone(),
            line: next.line,
        }),
        Kind::Open('{') => heads(&tokens[at + 4..], named),
        _ => {}
    }
}

/// The first word of each part of a `use` group, up to its closing brace.
fn heads(tokens: &[Token], named: &mut Vec<Named>) {
    let mut depth = 0_usize;
    let mut is_head = true;
    for token in tokens {
        match &token.kind {
            Kind::Open(_) => depth += 1,
            Kind::Close(_) if depth == 0 => return,
            Kind::Close(_) => depth -= 1,
            Kind::Sign(',') if depth == 0 => is_head = true,
            Kind::Word(word) if depth == 0 && is_head => {
                named.push(Named {
                    segment: word.clone(),
                    line: token.line,
                });
                is_head = false;
            }
            _ => {}
        }
    }
}

/// What the root file re-exports: each name, and the module it comes from.
pub(crate) fn reexports(root: &File) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    let tokens = &root.tokens;
    for (at, token) in tokens.iter().enumerate() {
        let public = at >= 1 && tokens[at - 1].is_word("pub");
        if !(token.is_word("use") && public) {
            continue;
        }
        let Some(module) = tokens.get(at + 1).and_then(Token::word) else {
            continue;
        };
        let end = tokens[at..]
            .iter()
            .position(|token| token.is_sign(';'))
            .map_or(tokens.len(), |length| at + length);
        for (index, token) in tokens[..end].iter().enumerate().skip(at + 2) {
            let followed = is_separator(tokens, index + 1);
            if let (Some(word), false) = (token.word(), followed) {
                names.insert(word.to_owned(), module.to_owned());
            }
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(path: &str, text: &str) -> Vec<String> {
        let file = File::new(path, text);
        named_modules(&file, &module_path(path))
            .into_iter()
            .map(|named| format!("{}:{}", named.segment, named.line))
            .collect()
    }

    #[test]
    fn files_are_modules() {
        assert_eq!(module_path("memory/ept/mod.rs"), ["memory", "ept"]);
        assert_eq!(
            module_path("memory/ept/table.rs"),
            ["memory", "ept", "table"]
        );
        assert!(module_path("lib.rs").is_empty());
    }

    #[test]
    fn names_are_found_wherever_they_stand() {
        let text = "use crate::vcpu::Run;\nuse crate::{arch::addr::{Gpa, Hva}, cpu};\n\
                    fn f() { crate::vm::g(m!(crate::host::h)); }";
        let found = named("memory/slot.rs", text);
        assert_eq!(found, ["vcpu:1", "arch:2", "cpu:2", "vm:3", "host:3"]);
    }

    #[test]
    fn super_is_followed_to_the_root() {
        assert_eq!(
            named("memory/slot.rs", "use super::super::vm::V;"),
            ["vm:1"]
        );
        assert_eq!(named("memory/slot.rs", "use super::tree::T;"), ["memory:1"]);
        assert_eq!(
            named("memory/mod.rs", "use super::{vm, vcpu::W};"),
            ["vm:1", "vcpu:1"]
        );
        let inner = "mod tests { use super::*; use super::super::vm::V; }";
        assert_eq!(named("memory.rs", inner), ["memory:1", "vm:1"]);
        let after = "mod tests { } use super::vm::V;";
        assert_eq!(named("memory.rs", after), ["vm:1"]);
    }

    #[test]
    fn reexports_name_their_module() {
        let root = File::new(
            "lib.rs",
            "pub use error::Error;\npub use vm::{Vm, id::VmId};",
        );
        let names = reexports(&root);
        assert_eq!(names["Error"], "error");
        assert_eq!((&*names["Vm"], &*names["VmId"]), ("vm", "vm"));
    }
}
