//! The core and the device layer name no operating system; a shim names no VMCS field.

use std::collections::BTreeSet;

use super::finding::Finding;
use super::source::{File, Files, Token};

/// Words that name an operating system in an identifier.
const SYSTEMS: &[&str] = &[
    "linux", "windows", "macos", "darwin", "netbsd", "freebsd", "unix",
];
/// Conditions on the system a crate is built for.
const CONDITIONS: &[&str] = &["target_os", "target_family", "target_vendor", "target_env"];

/// Shims, by folder.
const SHIMS: &[&str] = &[
    "driver/linux/",
    "driver/windows/",
    "driver/macos/",
    "driver/netbsd/",
];
/// Modules of the core that a shim may not use: they are about VMX.
const VMX_ONLY: &[&str] = &[
    "field", "control", "exit", "event", "ept", "vmx_caps", "vcpu", "emulate",
];
/// Words that name a VMX instruction or structure.
const VMX_WORDS: &[&str] = &[
    "vmcs", "vmread", "vmwrite", "vmptrld", "vmptrst", "vmclear", "vmlaunch", "vmresume", "vmxon",
    "vmxoff", "invept", "invvpid",
];

pub(crate) fn check(files: &Files) -> Vec<Finding> {
    let mut findings = Vec::new();
    let fields = field_names(files);
    for file in &files.0 {
        let core = file.in_source_of("vmx");
        let layer = file.in_source_of("driver");
        if file.is_rust() && (core || layer) {
            systems(file, layer, &mut findings);
        }
        if SHIMS.iter().any(|shim| file.path.starts_with(shim)) {
            if file.is_rust() {
                shim_paths(file, &mut findings);
            }
            shim_words(file, &fields, &mut findings);
        }
    }
    findings
}

/// The words an identifier is made of, in lower case.
fn parts(identifier: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut was_lower = false;
    for c in identifier.chars() {
        if c == '_' || (c.is_uppercase() && was_lower) {
            parts.push(String::new());
        }
        was_lower = c.is_lowercase() || c.is_ascii_digit();
        if c != '_'
            && let Some(last) = parts.last_mut()
        {
            last.extend(c.to_lowercase());
        }
    }
    parts
}

/// The operating system an identifier names, also as two words: `NetBsd`.
fn system_in(identifier: &str) -> Option<&'static str> {
    let parts = parts(identifier);
    let pairs = parts.windows(2).map(<[String]>::concat);
    let names: Vec<String> = parts.iter().cloned().chain(pairs).collect();
    SYSTEMS
        .iter()
        .copied()
        .find(|system| names.iter().any(|name| name == system))
}

fn systems(file: &File, layer: bool, findings: &mut Vec<Finding>) {
    for (at, token) in file.tokens.iter().enumerate() {
        let Some(word) = token.word() else { continue };
        let named = system_in(word);
        let what = if CONDITIONS.contains(&word) {
            format!("a condition on `{word}`")
        } else if let Some(system) = named {
            // A slice has windows; the layer picks `abi`'s tables by entry.
            let method = at >= 1 && file.tokens[at - 1].is_sign('.');
            if method || (layer && is_entry(&file.tokens, at)) {
                continue;
            }
            format!("`{word}` names the operating system {system}")
        } else {
            continue;
        };
        findings.push(Finding {
            path: file.path.clone(),
            line: token.line,
            what,
        });
    }
}

/// Whether the word is `Os::Word` or `os::word`.
fn is_entry(tokens: &[Token], at: usize) -> bool {
    at >= 3
        && tokens[at - 1].is_sign(':')
        && tokens[at - 2].is_sign(':')
        && (tokens[at - 3].is_word("Os") || tokens[at - 3].is_word("os"))
}

/// Names of the VMCS fields: the constants of `vmx/src/arch/field.rs`.
fn field_names(files: &Files) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for file in files.rust() {
        if file.path != "vmx/src/arch/field.rs" {
            continue;
        }
        for token in &file.tokens {
            if let Some(word) = token.word() {
                let shouted = word.trim_matches('_').contains('_')
                    && word
                        .chars()
                        .all(|c| c.is_ascii_uppercase() || c == '_' || c.is_ascii_digit());
                if shouted {
                    names.insert(word.to_owned());
                }
            }
        }
    }
    names
}

fn shim_paths(file: &File, findings: &mut Vec<Finding>) {
    let mut in_core = false;
    for token in &file.tokens {
        if token.is_sign(';') {
            in_core = false;
        }
        let Some(word) = token.word() else { continue };
        if word == "vmx" {
            in_core = true;
        } else if in_core && VMX_ONLY.contains(&word) {
            findings.push(Finding {
                path: file.path.clone(),
                line: token.line,
                what: format!("a shim uses `vmx::…::{word}`"),
            });
        }
    }
}

/// C and Rust alike: words outside comments and strings.
fn shim_words(file: &File, fields: &BTreeSet<String>, findings: &mut Vec<Finding>) {
    let mut find = |line: usize, word: &str| {
        let vmx = parts(word)
            .iter()
            .any(|part| VMX_WORDS.contains(&part.as_str()));
        if vmx || fields.contains(word) {
            findings.push(Finding {
                path: file.path.clone(),
                line,
                what: format!("a shim names `{word}`"),
            });
        }
    };
    if file.is_rust() {
        for token in &file.tokens {
            if let Some(word) = token.word() {
                find(token.line, word);
            }
        }
    } else if file.path.ends_with(".c") || file.path.ends_with(".h") {
        for (line, words) in (1..).zip(c_words(&file.text)) {
            for word in words {
                find(line, &word);
            }
        }
    }
}

/// The identifiers of each line of C.
fn c_words(text: &str) -> Vec<Vec<String>> {
    let mut lines = Vec::new();
    let mut in_comment = false;
    for line in text.lines() {
        let mut code = String::new();
        let mut rest = line;
        while !rest.is_empty() {
            if in_comment {
                let Some((_, after)) = rest.split_once("*/") else {
                    break;
                };
                in_comment = false;
                rest = after;
            } else if let Some((before, after)) = rest.split_once("/*") {
                code.push_str(before);
                code.push(' ');
                in_comment = true;
                rest = after;
            } else {
                code.push_str(rest.split("//").next().unwrap_or_default());
                break;
            }
        }
        // Every other piece between quotes is a string.
        let outside: Vec<&str> = code.split('"').step_by(2).collect();
        let words = outside
            .join(" ")
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect();
        lines.push(words);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let field = "fields! { GUEST_RIP: Natural = 1; }";
        let files = [("vmx/src/arch/field.rs", field), (path, text)];
        check(&Files::of(&files))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn the_core_names_no_system() {
        assert_eq!(
            found("vmx/src/vm.rs", "\nfn linux_only() {}"),
            ["vmx/src/vm.rs:2: `linux_only` names the operating system linux"]
        );
        assert_eq!(
            found("vmx/src/vm.rs", "#[cfg(target_os = \"none\")] fn f() {}").len(),
            1
        );
        assert_eq!(found("vmx/src/vm.rs", "#[cfg(windows)] fn f() {}").len(), 1);
        assert_eq!(found("vmx/src/vm.rs", "use abi::Os::NetBsd;").len(), 1);
        let fine = "//! Linux\nfn f(a: &[u8]) { a.windows(2); m(\"Linux\"); let count = hint; }";
        assert!(found("vmx/src/vm.rs", fine).is_empty());
    }

    #[test]
    fn the_layer_names_a_system_only_as_an_entry() {
        let entry = "fn f() { Os::Linux; abi::os::darwin::argument_size(1) }";
        assert!(found("driver/src/vm.rs", entry).is_empty());
        assert_eq!(found("driver/src/vm.rs", "struct WindowsShim;").len(), 1);
        assert_eq!(found("driver/src/vm.rs", "#[cfg(unix)] fn f() {}").len(), 1);
        assert!(found("driver/linux/src/lib.rs", "struct LinuxShim;").is_empty());
    }

    #[test]
    fn a_shim_names_no_field() {
        let path = "driver/linux/src/host.rs";
        assert!(
            found(
                path,
                "use vmx::arch::addr::Hva; use vmx::cpu::native::Native;"
            )
            .is_empty()
        );
        assert_eq!(found(path, "use vmx::arch::{addr::Hva, field};").len(), 1);
        assert_eq!(found(path, "fn f() { set(GUEST_RIP) }").len(), 1);
        assert_eq!(found(path, "fn read_vmcs() {}").len(), 1);
        let c = "driver/linux/cpu.c";
        assert_eq!(
            found(c, "/* vmcs\n vmxon */\nint f(void) { return vmread(1); }"),
            ["driver/linux/cpu.c:3: a shim names `vmread`"]
        );
        assert!(found(c, "// vmxon\nint f(void) { g(\"vmxon\"); }").is_empty());
        assert_eq!(found(c, "int x = GUEST_RIP;").len(), 1);
    }
}
