//! `asm!` stands only behind the processor seam.

use super::finding::Finding;
use super::source::Files;

/// Folders of code that ends up in a kernel.
const KERNEL: &[&str] = &["abi/", "vmx/", "driver/"];
/// Where the seam is.
const ALLOWED: &str = "vmx/src/cpu/";
/// The macros.
const MACROS: &[&str] = &["asm", "global_asm", "naked_asm"];

pub(crate) fn check(files: &Files) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in files.rust() {
        let in_kernel = KERNEL.iter().any(|folder| file.path.starts_with(folder));
        if !in_kernel || file.path.starts_with(ALLOWED) {
            continue;
        }
        for pair in file.tokens.windows(2) {
            let Some(word) = pair[0].word() else { continue };
            if MACROS.contains(&word) && pair[1].is_sign('!') {
                findings.push(Finding {
                    path: file.path.clone(),
                    line: pair[0].line,
                    what: format!("`{word}!` outside {ALLOWED}"),
                });
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_seam_has_assembly() {
        let text = "// asm!\nfn f() {\n unsafe { core::arch::asm!(\"hlt\") } }";
        let found = check(&Files::of(&[
            ("vmx/src/cpu/native/mod.rs", text),
            ("tests/conformance/src/main.rs", text),
            ("vmx/src/vcpu/enter.rs", text),
            ("driver/linux/src/lib.rs", "global_asm!(\"\");"),
            ("abi/src/lib.rs", "fn asm() { \"asm!\"; }"),
        ]));
        let lines: Vec<_> = found.iter().map(|f| (f.path.as_str(), f.line)).collect();
        assert_eq!(
            lines,
            [("vmx/src/vcpu/enter.rs", 3), ("driver/linux/src/lib.rs", 1)]
        );
    }
}
