//! The files of the workspace, and Rust files as tokens: comments are gone, strings are literals,
//! and what stands inside a macro call is there like everything else.

use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use anyhow::{Result, ensure};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A text file.
pub(crate) struct File {
    /// Path below the workspace, with `/`.
    pub(crate) path: String,
    /// Its text.
    pub(crate) text: String,
    /// Its tokens, if it is Rust that can be read as such.
    pub(crate) tokens: Vec<Token>,
}

/// All text files.
pub(crate) struct Files(pub(crate) Vec<File>);

/// What a token is. Groups are flattened to their brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An identifier or keyword.
    Word(String),
    /// One character of punctuation.
    Sign(char),
    /// An opening bracket.
    Open(char),
    /// A closing bracket.
    Close(char),
    /// A literal.
    Literal,
}

/// A token and its line, from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) kind: Kind,
    pub(crate) line: usize,
}

impl Token {
    /// The word, if it is one.
    pub(crate) fn word(&self) -> Option<&str> {
        match &self.kind {
            Kind::Word(word) => Some(word),
            _ => None,
        }
    }

    /// Whether it is this word.
    pub(crate) fn is_word(&self, word: &str) -> bool {
        self.word() == Some(word)
    }

    /// Whether it is this sign.
    pub(crate) fn is_sign(&self, sign: char) -> bool {
        self.kind == Kind::Sign(sign)
    }
}

impl File {
    /// A file from its text.
    pub(crate) fn new(path: &str, text: &str) -> Self {
        let mut tokens = Vec::new();
        if is_rust(path)
            && let Ok(stream) = TokenStream::from_str(text)
        {
            flatten(stream, &mut tokens);
        }
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
            tokens,
        }
    }

    /// Whether it is Rust.
    pub(crate) fn is_rust(&self) -> bool {
        is_rust(&self.path)
    }

    /// Its crate's folder, if it is source of a crate (not its tests).
    pub(crate) fn in_source_of(&self, folder: &str) -> bool {
        self.path
            .strip_prefix(folder)
            .is_some_and(|rest| rest.starts_with("/src/"))
    }
}

impl Files {
    /// Files that git tracks, and new ones it does not ignore.
    pub(crate) fn tracked(root: &Path) -> Result<Self> {
        let output = Command::new("git")
            .current_dir(root)
            .args([
                "ls-files",
                "-z",
                "--cached",
                "--others",
                "--exclude-standard",
            ])
            .output()?;
        ensure!(output.status.success(), "git cannot list the files");
        let mut files = Vec::new();
        for path in String::from_utf8(output.stdout)?.split_terminator('\0') {
            // Gone from the folder but not from git, or not text.
            let Ok(text) = std::fs::read_to_string(root.join(path)) else {
                continue;
            };
            files.push(File::new(path, &text));
        }
        ensure!(!files.is_empty(), "there are no files");
        Ok(Self(files))
    }

    /// Files from their texts.
    #[cfg(test)]
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        Self(
            files
                .iter()
                .map(|(path, text)| File::new(path, text))
                .collect(),
        )
    }

    /// The Rust files.
    pub(crate) fn rust(&self) -> impl Iterator<Item = &File> {
        self.0.iter().filter(|file| file.is_rust())
    }
}

fn is_rust(path: &str) -> bool {
    path.ends_with(".rs")
}

fn flatten(stream: TokenStream, tokens: &mut Vec<Token>) {
    for tree in stream {
        let line = tree.span().start().line;
        match tree {
            TokenTree::Ident(word) => tokens.push(Token {
                kind: Kind::Word(word.to_string()),
                line,
            }),
            TokenTree::Punct(sign) => tokens.push(Token {
                kind: Kind::Sign(sign.as_char()),
                line,
            }),
            TokenTree::Literal(_) => tokens.push(Token {
                kind: Kind::Literal,
                line,
            }),
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ('(', ')'),
                    Delimiter::Brace => ('{', '}'),
                    Delimiter::Bracket => ('[', ']'),
                    Delimiter::None => (' ', ' '),
                };
                tokens.push(Token {
                    kind: Kind::Open(open),
                    line,
                });
                flatten(group.stream(), tokens);
                tokens.push(Token {
                    kind: Kind::Close(close),
                    line: group.span_close().start().line,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_no_words() {
        let file = File::new(
            "a.rs",
            "//! unsafe\n/* asm! */ fn f<'a>() -> &'a str {\n \"unsafe\" }\nm!{ word }",
        );
        let words: Vec<_> = file
            .tokens
            .iter()
            .filter_map(|token| Some((token.word()?, token.line)))
            .collect();
        assert!(words.contains(&("fn", 2)));
        assert!(words.contains(&("word", 4)));
        assert!(
            !words
                .iter()
                .any(|(word, _)| ["unsafe", "asm"].contains(word))
        );
    }
}
