//! The kernel's symbols, as `/proc/kallsyms` lists them.

use std::collections::BTreeMap;

/// Functions by address.
#[derive(Default)]
pub(crate) struct Symbols(BTreeMap<u64, Symbol>);

struct Symbol {
    name: String,
    /// The module it belongs to, if any.
    module: Option<String>,
}

impl Symbols {
    /// Reads the list. Lines that are not functions are left out.
    pub(crate) fn read(text: &str) -> Self {
        let mut symbols = BTreeMap::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(address), Some(kind), Some(name)) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            // A function's padding in front, on newer kernels.
            let function = matches!(kind, "t" | "T" | "w" | "W") && !name.starts_with("__pfx_");
            let Some(address) = u64::from_str_radix(address, 16).ok().filter(|_| function) else {
                continue;
            };
            let module = words.next().map(|m| m.trim_matches(['[', ']']).to_owned());
            let name = name.to_owned();
            symbols.entry(address).or_insert(Symbol { name, module });
        }
        Self(symbols)
    }

    /// The function that holds an address, as tables show it.
    pub(crate) fn name(&self, address: u64) -> String {
        match self.0.range(..=address).next_back() {
            None => format!("{address:#x}"),
            Some((_, symbol)) => match &symbol.module {
                None => symbol.name.clone(),
                Some(module) => format!("{module}: {}", symbol.name),
            },
        }
    }

    /// The module that holds an address.
    pub(crate) fn module(&self, address: u64) -> Option<&str> {
        let (_, symbol) = self.0.range(..=address).next_back()?;
        symbol.module.as_deref()
    }

    /// Where a module's function is.
    pub(crate) fn address(&self, module: &str, name: &str) -> Option<u64> {
        let is_it =
            |symbol: &Symbol| symbol.name == name && symbol.module.as_deref() == Some(module);
        self.0.iter().find(|(_, s)| is_it(s)).map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_s_function_is_found_both_ways() {
        let symbols = Symbols::read(
            "10 T first\n20 t second\t[haxm]\n28 b data\t[haxm]\n18 T __pfx_second\n",
        );
        assert_eq!(symbols.name(0x27), "haxm: second");
        assert_eq!(symbols.name(0x1f), "first");
        assert_eq!(symbols.name(1), "0x1");
        assert_eq!(symbols.module(0x30), Some("haxm"));
        assert_eq!(symbols.module(0x10), None);
        assert_eq!(symbols.address("haxm", "second"), Some(0x20));
        assert_eq!(symbols.address("haxm", "first"), None);
    }
}
