//! Guest code: assembled with this program, for 16-, 32- and 64-bit code segments.
//!
//! The same text may be assembled for all three. Labels are numbers (`2:` and `jmp 2b`); in text meant for all
//! modes, memory operands have 32-bit address registers, which every mode can encode.

/// One text in the three encodings; empty where it was not assembled.
#[derive(Clone, Copy)]
pub struct Code {
    pub bits16: &'static [u8],
    pub bits32: &'static [u8],
    pub bits64: &'static [u8],
}

/// The bytes between two addresses of this program's read-only data.
pub fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    let length = (end as usize).saturating_sub(start as usize);
    // SAFETY: `blob!` gives the ends of one piece of read-only data, which lives as long as the program.
    // UNSAFETY: two addresses become a slice.
    #[expect(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts(start, length)
    }
}

/// Bytes assembled under one directive (`.code16`, `.code32`, `.code64`); `.balign` up to 64 counts from their
/// start.
#[macro_export]
macro_rules! blob {
    ($bits:literal, $($line:literal),+ $(,)?) => {{
        let start: *const u8;
        let end: *const u8;
        // SAFETY: emits data into another section, and reads two addresses.
        #[allow(unsafe_code)]
        unsafe {
            core::arch::asm!(
                ".pushsection .rodata.guest, \"a\", @progbits",
                ".balign 64",
                "772:",
                $bits,
                $($line,)+
                ".code64",
                "773:",
                ".popsection",
                "lea rax, [rip + 772b]",
                "lea rcx, [rip + 773b]",
                out("rax") start,
                out("rcx") end,
                options(raw, nomem, nostack, preserves_flags)
            );
        }
        $crate::code::between(start, end)
    }};
}

/// [`Code`] for all modes: `guest!("mov al, 1", "hlt")`, or for one: `guest!(64: "mov rax, 1", "hlt")`.
#[macro_export]
macro_rules! guest {
    (16: $($line:literal),+ $(,)?) => {
        $crate::code::Code { bits16: $crate::blob!(".code16", $($line),+), bits32: &[], bits64: &[] }
    };
    (32: $($line:literal),+ $(,)?) => {
        $crate::code::Code { bits16: &[], bits32: $crate::blob!(".code32", $($line),+), bits64: &[] }
    };
    (64: $($line:literal),+ $(,)?) => {
        $crate::code::Code { bits16: &[], bits32: &[], bits64: $crate::blob!(".code64", $($line),+) }
    };
    ($($line:literal),+ $(,)?) => {
        $crate::code::Code {
            bits16: $crate::blob!(".code16", $($line),+),
            bits32: $crate::blob!(".code32", $($line),+),
            bits64: $crate::blob!(".code64", $($line),+),
        }
    };
}
