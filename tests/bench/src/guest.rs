//! Guests: where things are in their memory, and their code.
//!
//! All start in flat 32-bit protected mode without paging.

use anyhow::Result;

use crate::api::{Api, Exit, Vcpu, Vm, enter};
use crate::ram::Ram;

/// Start of the descriptor tables.
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
/// Bytes of the tables, less one.
pub const GDT_LIMIT: u16 = 0x1f;
pub const IDT_LIMIT: u16 = 0x7ff;
/// Selectors.
pub const CODE_SELECTOR: u16 = 0x08;
pub const DATA_SELECTOR: u16 = 0x10;
/// Top of the stack.
pub const STACK: u64 = 0xf000;
/// First instruction.
pub const CODE: u64 = 0x10000;
/// What the guest measured: doublewords.
const RESULTS: u64 = 0x100000;
/// Memory for the touch rows: a whole number of 2 MB pages.
pub const TOUCHED: u64 = 0x400000;
/// Bytes of it: 1024 pages.
pub const TOUCHED_SIZE: u64 = 4 << 20;
/// All memory; device memory is far above.
pub const RAM_SIZE: u64 = 16 << 20;
/// The vector of the handler, and the ports of the code.
pub const VECTOR: u8 = 0x30;
pub const PORT: u16 = 0x80;
pub const OTHER_PORT: u16 = 0x81;
/// Bytes of the string row.
pub const STRING: usize = 4096;

/// The bytes between two addresses of this program's read-only data.
pub fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    let length = (end as usize).saturating_sub(start as usize);
    // SAFETY: `code!` gives the ends of one piece of read-only data, which lives as long as the program.
    // UNSAFETY: two addresses become a slice.
    #[expect(unsafe_code)]
    unsafe {
        std::slice::from_raw_parts(start, length)
    }
}

/// Assembles 32-bit code with this program.
#[macro_export]
macro_rules! code {
    ($($line:literal),+ $(,)?) => {{
        let start: *const u8;
        let end: *const u8;
        // SAFETY: emits data into another section, and reads two addresses.
        #[allow(unsafe_code)]
        unsafe {
            core::arch::asm!(
                ".pushsection .rodata.guest, \"a\", @progbits",
                "772:",
                ".code32",
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
        $crate::guest::between(start, end)
    }};
}

/// A guest that measures one piece of code 1024 times by itself. The code may use all registers but ESI, EDI, EBP,
/// and EBX is its own. With `64:` it is 64-bit code, and needs [`Guest::write_page_tables`].
#[macro_export]
macro_rules! measured {
    (64: $($line:literal),* $(,)?) => {
        $crate::measured!(@
            [
                "mov eax, cr4",
                "or eax, 0x20",
                "mov cr4, eax",
                "mov eax, 0x3000",
                "mov cr3, eax",
                "mov ecx, 0xc0000080",
                "rdmsr",
                "or eax, 0x100",
                "wrmsr",
                "mov eax, cr0",
                "or eax, 0x80000000",
                "mov cr0, eax",
                "push 0x18",
                ".byte 0x68",
                ".long 0x10000 + (3f - 772b)",
                "retf",
                ".code64",
                "3:",
            ]
            $($line),*
        )
    };
    (@ [$($start:literal),* $(,)?] $($line:literal),*) => {
        $crate::code!(
            $($start,)*
            "mov edi, 0x100000",
            "mov ebp, 1024",
            "mov ebx, 0x400000",
            // The marks of `crate::mark`: NOPs.
            "2: .byte 0x0f, 0x1f, 0x80",
            ".long 0x4d584149",
            "rdtsc",
            "mov esi, eax",
            $($line,)*
            "rdtsc",
            ".byte 0x0f, 0x1f, 0x80",
            ".long 0x4d58414a",
            "sub eax, esi",
            "stosd",
            "dec ebp",
            "jnz 2b",
            "hlt",
        )
    };
    ($($line:literal),* $(,)?) => {
        $crate::measured!(@ [] $($line),*)
    };
}

/// A VM with its memory and a vCPU at the first instruction. Dropped in this order.
pub struct Guest<A: Api> {
    pub vcpu: <A::Vm as Vm>::Vcpu,
    pub vm: A::Vm,
    pub ram: Ram,
}

impl<A: Api> Guest<A> {
    pub fn new(api: &A, code: &[u8], ram: Ram) -> Result<Self> {
        let vm = api.create_vm()?;
        ram.write(CODE, code);
        ram.touch(RESULTS, 4096);
        for (index, descriptor) in [
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_9b00_0000_ffff_u64,
        ]
        .iter()
        .enumerate()
        {
            ram.write(GDT + 8 * index as u64, &descriptor.to_le_bytes());
        }
        let handler = STACK + 0x100;
        // out 81h, al; iretd
        ram.write(handler, &[0xe6, OTHER_PORT as u8, 0xcf]);
        let gate = handler | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32;
        ram.write(IDT + 8 * u64::from(VECTOR), &gate.to_le_bytes());
        vm.declare(ram.address(), ram.size())?;
        vm.map(0, 0, ram.size(), ram.address())?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.start()?;
        Ok(Self { vcpu, vm, ram })
    }

    /// Page tables for 64-bit code: all memory, one to one, in 2 MB pages.
    pub fn write_page_tables(&self) {
        const PML4: u64 = 0x3000;
        let entry = |at: u64, value: u64| self.ram.write(at, &value.to_le_bytes());
        entry(PML4, (PML4 + 0x1000) | 3);
        entry(PML4 + 0x1000, (PML4 + 0x2000) | 3);
        for page in 0..RAM_SIZE >> 21 {
            entry(PML4 + 0x2000 + page * 8, page << 21 | 0x83);
        }
    }

    /// Enters until the guest has something to say.
    #[inline]
    pub fn run(&self) -> Result<Exit> {
        run(&self.vcpu)
    }

    /// Runs, and wants this exit.
    #[inline]
    pub fn expect(&self, wanted: Exit) -> Result<()> {
        expect(&self.vcpu, wanted)
    }

    /// What a [`measured!`] guest wrote.
    pub fn results(&self) -> impl Iterator<Item = u64> + '_ {
        self.first_results(1024)
    }

    /// The first `count` of them.
    pub fn first_results(&self, count: u64) -> impl Iterator<Item = u64> + '_ {
        (0..count).map(|index| u64::from(self.ram.u32(RESULTS + 4 * index)))
    }
}

/// Enters until the guest has something to say.
#[inline]
pub fn run<V: Vcpu>(vcpu: &V) -> Result<Exit> {
    loop {
        let result = enter(vcpu);
        anyhow::ensure!(result >= 0, "RUN: {}", std::io::Error::last_os_error());
        match vcpu.exit() {
            Exit::Again => {}
            exit => return Ok(exit),
        }
    }
}

/// Runs, and wants this exit.
#[inline]
pub fn expect<V: Vcpu>(vcpu: &V, wanted: Exit) -> Result<()> {
    let exit = run(vcpu)?;
    anyhow::ensure!(exit == wanted, "{exit:?} instead of {wanted:?}");
    Ok(())
}
