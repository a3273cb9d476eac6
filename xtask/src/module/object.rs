//! What the Rust object of a kernel module may hold, checked on the object itself.
//!
//! The ELF file gives relocations, undefined symbols and stack frames; the disassembly gives
//! instructions and who refers to whom. Every finding is one line that names its function.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use object::elf;
use object::{Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget};
use testbed::command;

/// Largest stack frame, in bytes: a kernel stack has 16 KB for everything.
pub(crate) const FRAME_LIMIT: u64 = 2048;

/// Relocations the kernel's loader knows and code in its memory model needs.
const RELOCATIONS: &[(u32, &str)] = &[
    (elf::R_X86_64_64, "R_X86_64_64"),
    (elf::R_X86_64_PC32, "R_X86_64_PC32"),
    (elf::R_X86_64_PLT32, "R_X86_64_PLT32"),
    (elf::R_X86_64_32S, "R_X86_64_32S"),
];

/// What the kernel itself gives Rust code; everything else comes from the C half.
const FROM_KERNEL: &[&str] = &[
    "memcpy",
    "memmove",
    "memset",
    "memcmp",
    "bcmp",
    "strlen",
    "__x86_return_thunk",
];
/// Prefixes of the same: the C half, and the kernel's retpolines.
const FROM_KERNEL_PREFIX: &[&str] = &["haxm_os_", "__x86_indirect_thunk_"];

/// Words in the names of functions that end in a panic or in an allocation's failure.
const PANICS: &[&str] = &[
    "panic",
    "bounds",
    "overflow",
    "alloc_error",
    "handle_alloc",
    "unwrap_failed",
    "expect_failed",
    "index_fail",
    "slice_error",
    "len_mismatch",
    "begin_unwind",
];

/// x87 and state-saving instructions of `vmx/src/cpu/native`, which switch the guest's state.
const STATE_SWITCH: &[&str] = &[
    "fxsave",
    "fxsave64",
    "fxrstor",
    "fxrstor64",
    "xsave",
    "xsave64",
    "xrstor",
    "xrstor64",
];

/// What [`check`] saw.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Why the object must not be loaded; empty if it may.
    pub(crate) findings: Vec<String>,
    /// Functions in it.
    pub(crate) functions: usize,
    /// Bytes of code.
    pub(crate) text: u64,
    /// The largest stack frame and its function.
    pub(crate) largest_frame: (u64, String),
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (frame, name) = &self.largest_frame;
        write!(
            f,
            "{} functions, {} bytes of code, largest stack frame {frame} bytes ({name}), {} findings",
            self.functions,
            self.text,
            self.findings.len()
        )
    }
}

/// Checks a relocatable object: relocation types, undefined symbols, panics, floating point, naked
/// returns and branches, stack frames.
///
/// # Errors
/// It cannot be read or disassembled. What it holds is in the report.
pub(crate) fn check(path: &Path) -> Result<Report> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = object::File::parse(bytes.as_slice())
        .with_context(|| format!("{} is not an object", path.display()))?;
    let text = command::output(
        Command::new("objdump")
            .args(["--disassemble", "--reloc", "--no-show-raw-insn", "--wide"])
            .arg(path),
    )?;
    let mut report = Report::default();
    relocations(&file, &mut report);
    undefined(&file, &mut report);
    let functions = disassembled(&text);
    report.functions = functions.len();
    report.text = file
        .sections()
        .filter(|s| s.kind() == object::SectionKind::Text)
        .map(|s| s.size())
        .sum();
    panics(&file, &functions, &mut report);
    instructions(&functions, &mut report);
    frames(&file, &mut report)?;
    Ok(report)
}

/// A readable name.
fn readable(symbol: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(symbol))
}

fn relocations(file: &object::File<'_>, report: &mut Report) {
    let mut seen = BTreeSet::new();
    for section in file.sections() {
        for (_, relocation) in section.relocations() {
            let RelocationFlags::Elf { r_type } = relocation.flags() else {
                continue;
            };
            if RELOCATIONS.iter().any(|(known, _)| *known == r_type) {
                continue;
            }
            let target = target_name(file, relocation.target());
            let name = section.name().unwrap_or("?");
            seen.insert(format!(
                "relocation of type {r_type} in {name} to {}: the kernel's loader does not take it",
                readable(&target)
            ));
        }
    }
    report.findings.extend(seen);
}

fn target_name(file: &object::File<'_>, target: RelocationTarget) -> String {
    let RelocationTarget::Symbol(index) = target else {
        return "?".to_owned();
    };
    let symbol = file.symbol_by_index(index);
    symbol
        .ok()
        .and_then(|s| s.name().ok().map(str::to_owned))
        .unwrap_or_default()
}

fn undefined(file: &object::File<'_>, report: &mut Report) {
    for symbol in file.symbols().filter(ObjectSymbol::is_undefined) {
        let name = symbol.name().unwrap_or("?");
        let known = name.is_empty()
            || FROM_KERNEL.contains(&name)
            || FROM_KERNEL_PREFIX.iter().any(|p| name.starts_with(p));
        if !known {
            report.findings.push(format!(
                "undefined symbol {}: neither of the C half nor of the kernel",
                readable(name)
            ));
        }
    }
}

/// A function as objdump prints it.
struct Function {
    symbol: String,
    /// Its section and its place there, as a relocation may name it.
    section: String,
    start: u64,
    /// Mnemonic and operands, without the names in angle brackets.
    instructions: Vec<String>,
    /// Symbols it refers to.
    refers: BTreeSet<String>,
}

/// Takes objdump's text apart.
fn disassembled(text: &str) -> Vec<Function> {
    let mut all: Vec<Function> = Vec::new();
    let mut section = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("Disassembly of section ") {
            section = name.trim_end_matches(':');
            continue;
        }
        if let Some((start, rest)) = line.split_once(" <")
            && let Some(symbol) = rest.strip_suffix(">:")
            && !line.starts_with([' ', '\t'])
        {
            all.push(Function {
                symbol: symbol.to_owned(),
                section: section.to_owned(),
                start: u64::from_str_radix(start, 16).unwrap_or_default(),
                instructions: Vec::new(),
                refers: BTreeSet::new(),
            });
            continue;
        }
        let Some(function) = all.last_mut() else {
            continue;
        };
        // "   2a: R_X86_64_PLT32	name-0x4" is a relocation, "   2a:	call ..." an instruction.
        if let Some((_, relocation)) = line.split_once(": R_X86_64_") {
            if let Some((kind, target)) = relocation.split_once('\t') {
                function.refers.insert(target_of(kind, target));
            }
        } else if let Some((_, instruction)) = line.split_once(":\t") {
            let (code, reference) = match instruction.split_once('<') {
                Some((code, reference)) => (code, Some(reference)),
                None => (instruction, None),
            };
            function.instructions.push(code.trim().to_owned());
            if let Some(reference) = reference {
                let name = reference.split(['+', '>']).next().unwrap_or(reference);
                function.refers.insert(name.to_owned());
            }
        }
    }
    let starts: BTreeMap<String, String> = all
        .iter()
        .map(|f| (format!("{}+{:#x}", f.section, f.start), f.symbol.clone()))
        .collect();
    for function in &mut all {
        let named = function.refers.iter().filter_map(|r| starts.get(r));
        let named: Vec<String> = named.cloned().collect();
        function.refers.extend(named);
    }
    all
}

/// What a relocation as objdump prints it refers to: a symbol, or `section+0xplace`.
fn target_of(kind: &str, target: &str) -> String {
    let (name, addend) = match target.split_once('+') {
        Some((name, addend)) => (name, Some(addend)),
        None => (target.split('-').next().unwrap_or(target), None),
    };
    let place = addend.and_then(|a| u64::from_str_radix(a.trim_start_matches("0x"), 16).ok());
    match place {
        // What is added to an address relative to the next instruction, 4 bytes on.
        Some(place) if name.starts_with('.') && kind.starts_with('P') => {
            format!("{name}+{:#x}", place + 4)
        }
        Some(place) if name.starts_with('.') => format!("{name}+{place:#x}"),
        _ if name.starts_with('.') => format!("{name}+0x0"),
        _ => name.to_owned(),
    }
}

/// Any symbol whose name tells of a panic, with the functions that refer to it.
fn panics(file: &object::File<'_>, functions: &[Function], report: &mut Report) {
    let mut referrers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for function in functions {
        for target in &function.refers {
            if *target != function.symbol {
                let of = referrers.entry(target).or_default();
                of.push(&function.symbol);
            }
        }
    }
    let mut names: BTreeSet<&str> = file.symbols().filter_map(|s| s.name().ok()).collect();
    names.extend(functions.iter().map(|f| f.symbol.as_str()));
    for name in names {
        let shown = readable(name);
        if !PANICS.iter().any(|word| shown.contains(word)) {
            continue;
        }
        let by = referrers.get(name).map_or(Vec::new(), |list| {
            list.iter().map(|symbol| readable(symbol)).collect()
        });
        let by = if by.is_empty() {
            "nothing in the disassembly".to_owned()
        } else {
            by.join(", ")
        };
        report
            .findings
            .push(format!("{shown} is linked in, by {by}"));
    }
}

fn instructions(functions: &[Function], report: &mut Report) {
    for function in functions {
        for code in &function.instructions {
            if let Some(why) = forbidden(code) {
                let name = readable(&function.symbol);
                report.findings.push(format!("{name}: '{code}': {why}"));
            }
        }
    }
}

/// Why an instruction must not be in a kernel module.
fn forbidden(code: &str) -> Option<&'static str> {
    let mut words = code.split_whitespace();
    let mnemonic = words.find(|w| {
        !matches!(
            *w,
            "lock" | "rep" | "repz" | "repnz" | "cs" | "ds" | "notrack" | "bnd"
        )
    })?;
    let operands = code.split_once(mnemonic).map_or("", |(_, rest)| rest);
    let vector = ["%xmm", "%ymm", "%zmm", "%mm", "%st", "%k1", "%tmm"];
    if vector.iter().any(|register| operands.contains(register)) {
        return Some("uses registers that belong to user space");
    }
    let switching = STATE_SWITCH.contains(&mnemonic);
    if !switching
        && (mnemonic.starts_with('f')
            || matches!(mnemonic, "emms" | "ldmxcsr" | "stmxcsr" | "vzeroupper"))
    {
        return Some("uses the state of user space's floating point");
    }
    if matches!(mnemonic, "ret" | "retq") {
        return Some("a return past the kernel's return thunk");
    }
    if matches!(mnemonic, "call" | "jmp" | "callq" | "jmpq") && operands.trim().starts_with('*') {
        return Some("an indirect branch past the kernel's thunks");
    }
    None
}

/// Reads `.stack_sizes`: an address (a relocation) and a size in ULEB128 for each function.
fn frames(file: &object::File<'_>, report: &mut Report) -> Result<()> {
    let mut names = BTreeMap::new();
    for symbol in file
        .symbols()
        .filter(|s| s.kind() == object::SymbolKind::Text)
    {
        if let (Some(section), Ok(name)) = (symbol.section_index(), symbol.name()) {
            names.insert((section.0, symbol.address()), name);
        }
    }
    for section in file.sections().filter(|s| s.name() == Ok(".stack_sizes")) {
        let data = section.data()?;
        let places: BTreeMap<u64, _> = section.relocations().collect();
        let mut at = 0;
        while at + 8 < data.len() {
            let name = places.get(&(at as u64)).and_then(|relocation| {
                let RelocationTarget::Symbol(index) = relocation.target() else {
                    return None;
                };
                let symbol = file.symbol_by_index(index).ok()?;
                let address = symbol.address().wrapping_add_signed(relocation.addend());
                names.get(&(symbol.section_index()?.0, address)).copied()
            });
            at += 8;
            let (mut size, mut shift) = (0_u64, 0);
            while let Some(&byte) = data.get(at) {
                at += 1;
                size |= u64::from(byte & 0x7f) << shift;
                shift += 7;
                if byte & 0x80 == 0 || shift > 56 {
                    break;
                }
            }
            let name = readable(name.unwrap_or("?"));
            if size > FRAME_LIMIT {
                report.findings.push(format!(
                    "{name}: a stack frame of {size} bytes, more than {FRAME_LIMIT}"
                ));
            }
            if size >= report.largest_frame.0 {
                report.largest_frame = (size, name);
            }
        }
    }
    if report.largest_frame.1.is_empty() && report.functions > 0 {
        report
            .findings
            .push("no stack sizes recorded: frames cannot be checked".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Assembles, checks, and gives the findings.
    fn findings(name: &str, text: &str) -> Vec<String> {
        let base = std::env::temp_dir().join(format!("haxm-object-{name}-{}", std::process::id()));
        let (source, object) = (base.with_extension("s"), base.with_extension("o"));
        std::fs::write(&source, text).unwrap();
        command::output(Command::new("as").arg("-o").arg(&object).arg(&source)).unwrap();
        let report = check(&object).unwrap();
        for file in [source, object] {
            std::fs::remove_file(file).unwrap();
        }
        report.findings
    }

    /// A function with a stack size.
    fn function(name: &str, frame: u32, body: &str) -> String {
        format!(
            ".text\n.type {name}, @function\n{name}:\n{body}\n.size {name}, . - {name}\n\
             .section .stack_sizes,\"o\",@progbits,.text\n.quad {name}\n.uleb128 {frame}\n.text\n"
        )
    }

    #[test]
    fn a_clean_object_passes() {
        let text = function(
            "clean",
            2048,
            "endbr64\ncall haxm_os_log\ncall memcpy\nfxsave64 (%rdi)\nxrstor64 (%rdi)\njmp __x86_return_thunk",
        );
        assert_eq!(findings("clean", &text), Vec::<String>::new());
    }

    #[track_caller]
    fn one(name: &str, text: &str, part: &str) {
        let found = findings(name, text);
        assert!(
            found.len() == 1 && found[0].contains(part),
            "{part:?} expected, found {found:#?}"
        );
    }

    #[test]
    fn each_thing_that_must_not_be_there_is_found() {
        let body = |b: &str| function("f", 8, b);
        one("sse", &body("movaps %xmm0, (%rdi)"), "f: 'movaps");
        one("mmx", &body("movq %mm1, %rax"), "user space");
        one("x87", &body("fld1"), "floating point");
        one("ret", &body("ret"), "return thunk");
        one("call", &body("call *%rax"), "indirect branch");
        one("jump", &body("jmp *8(%rax)"), "indirect branch");
        one("undefined", &body("call printf"), "undefined symbol printf");
        one("got", &body("mov $memcpy, %eax"), "relocation of type");
        one(
            "frame",
            &function("f", 2049, "nop"),
            "f: a stack frame of 2049 bytes",
        );
        one("unmeasured", ".text\nf:\nnop\n", "no stack sizes");
    }

    #[test]
    fn a_panic_is_named_with_what_pulls_it_in() {
        let panic = "_RNvNtCsaaaaaaaaaaa_4core9panicking5panic";
        let text = format!(
            "{}{}",
            function(panic, 0, "ud2"),
            function("caller", 0, &format!("call {panic}"))
        );
        one(
            "panic",
            &text,
            "core::panicking::panic is linked in, by caller",
        );
        let alloc = function(
            "_RNvNtCsaaaaaaaaaaa_5alloc5alloc18handle_alloc_error",
            0,
            "ud2",
        );
        one(
            "alloc",
            &alloc,
            "handle_alloc_error is linked in, by nothing",
        );
    }
}
