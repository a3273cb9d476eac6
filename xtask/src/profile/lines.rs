//! Source functions of the module's instructions, inlined ones too, by binutils' `addr2line`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use testbed::command;

use super::symbols::Symbols;

/// A function of `.text` that the symbols of the running kernel name, too: it tells where the section is.
const KNOWN: &str = "haxm_core_ioctl";

/// Folders of ours in the tree; what else is inlined, the standard library, belongs to its caller.
const OURS: &[&str] = &["/vmx/src/", "/driver/src/", "/driver/linux/", "/abi/src/"];

/// Names by address.
#[derive(Default)]
pub(crate) struct Lines(BTreeMap<u64, String>);

impl Lines {
    /// Looks up those of the addresses that are the module's.
    pub(crate) fn read(
        module: &Path,
        symbols: &Symbols,
        addresses: impl Iterator<Item = u64>,
    ) -> Result<Self> {
        let list = command::output(Command::new("nm").arg(module))?;
        let offset = list
            .lines()
            .find_map(|line| line.strip_suffix(&format!(" T {KNOWN}")))
            .with_context(|| format!("{} has no {KNOWN}", module.display()))?;
        let offset = u64::from_str_radix(offset.trim(), 16)?;
        let start = symbols.address("haxm", KNOWN);
        let start = start.with_context(|| format!("the kernel has no {KNOWN}"))? - offset;
        let ours = |address: &u64| symbols.module(*address) == Some("haxm") && *address >= start;
        let addresses: BTreeSet<u64> = addresses.filter(ours).collect();
        let mut child = Command::new("addr2line")
            .args(["--addresses", "--functions", "--inlines", "--demangle"])
            .args(["--section=.text", "-e"])
            .arg(module)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run addr2line (binutils)")?;
        let mut to = child.stdin.take().context("no pipe to addr2line")?;
        let asked: String = addresses
            .iter()
            .map(|at| format!("{:#x}\n", at - start))
            .collect();
        // It answers while it reads: the questions come from a thread.
        let writer = std::thread::spawn(move || to.write_all(asked.as_bytes()));
        let answer = child.wait_with_output()?;
        writer.join().ok().context("addr2line was not asked")??;
        ensure!(answer.status.success(), "addr2line failed");
        Ok(Self(parse(&String::from_utf8_lossy(&answer.stdout), start)))
    }

    /// The function that an instruction came from.
    pub(crate) fn function(&self, address: u64) -> Option<&str> {
        self.0.get(&address).map(String::as_str)
    }
}

/// Answers: the address, then pairs of lines, function and place, innermost first.
fn parse(text: &str, start: u64) -> BTreeMap<u64, String> {
    let mut names = BTreeMap::new();
    let mut address = None;
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(at) = line.strip_prefix("0x") {
            address = u64::from_str_radix(at, 16).ok().map(|at| at + start);
            continue;
        }
        let place = lines.next().unwrap_or_default();
        if let Some((address, name)) = address.zip(label(line, place)) {
            names.entry(address).or_insert(name);
        }
    }
    names
}

/// How a table shows a function of ours: its file, and its name without types.
fn label(function: &str, place: &str) -> Option<String> {
    let file = place.rsplit_once(':').map_or(place, |(file, _)| file);
    // The C half is compiled in target/module.
    let built = file
        .contains("/target/module/")
        .then(|| file.rsplit('/').next());
    let file = match built.flatten() {
        Some(name) => format!("driver/linux/{name}"),
        None => {
            let at = OURS.iter().find_map(|folder| file.find(folder))?;
            file.get(at + 1..)?.to_owned()
        }
    };
    let mut name = String::new();
    let mut depth = 0_u32;
    for c in function.chars() {
        match c {
            '<' => depth += 1,
            '>' => depth = depth.saturating_sub(1),
            _ if depth == 0 => name.push(c),
            _ => {}
        }
    }
    // A closure is its function's, and a type argument at the end leaves its colons.
    let part = |part: &&str| !part.is_empty() && !part.starts_with("{closure");
    let name = name.rsplit("::").find(part).unwrap_or(function).to_owned();
    Some(format!("haxm: {name} ({file})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_function_of_ours_counts() {
        let text = "0x0000000000000010\n<core::option::Option<T>>::map\n/rustc/x/core/src/option.rs:5\n\
                    <haxm_vmx::vcpu::Vcpu<haxm_linux::host::Linux>>::once::<T>::{closure#0}\n/a/vmx/src/vcpu/run/mod.rs:7\n\
                    outer\n/a/vmx/src/vcpu/mod.rs:9\n0x20\nhaxm_os_kick\n/a/target/module/6.1-lines/cpu.c:3\n";
        let names = parse(text, 0x100);
        assert_eq!(names[&0x110], "haxm: once (vmx/src/vcpu/run/mod.rs)");
        assert_eq!(names[&0x120], "haxm: haxm_os_kick (driver/linux/cpu.c)");
        assert_eq!(names.len(), 2);
    }
}
