//! A 64-bit guest that watches its own state: in a circle it uses SYSCALL, RDTSCP, SWAPGS, a watchpoint, CR8 and the
//! vector registers, and looks whether each is still what it was given. Two of them with different values, one in a
//! VM of ours and one in KVM's, notice when either hypervisor loses something of the other's.

use abi::{SegmentDesc, VcpuState};
use anyhow::{Result, bail};

use crate::code::Code;
use crate::modes::{self, CODE, DATA, GDT, IDT, Mode, registers};
use crate::ram::Ram;

/// A round or several are over: the number so far, four bytes.
pub const ROUNDS_PORT: u16 = 0xf0;
/// Something is not as it was: what, one byte.
pub const LOST_PORT: u16 = 0xf1;

/// The values of a guest.
#[derive(Clone, Copy)]
pub struct Values {
    /// Tells two guests apart.
    kind: u64,
    pauses: u64,
    rounds: u64,
}

/// Where the program finds its values.
const VALUES: u64 = 0x11_0000;
/// Two pages that hold their own address: the guest's GS bases.
const GS_BASES: u64 = 0x11_2000;

/// Behind the two handlers of SYSCALL the one of #DB; each has 64 bytes. R13D says what is looked at.
fn program() -> Code {
    crate::guest!(64:
        "jmp 8f",
        ".balign 64", "mov edi, 0x1111", "mov eax, cs", "pushfq", "pop rdx", "jmp rcx",
        ".balign 64", "mov edi, 0x2222", "mov eax, cs", "pushfq", "pop rdx", "jmp rcx",
        ".balign 64", "push rax", "mov rax, dr6", "and eax, 1", "add r15d, eax",
        "xor eax, eax", "mov dr6, rax", "pop rax", "iretq",

        "8: mov ebp, 0x110000",
        "mov rax, cr4", "bts rax, 18", "mov cr4, rax",
        "xor ecx, ecx", "xor edx, edx", "mov eax, 7", "xsetbv",
        "mov ecx, 0xc0000081", "mov eax, [rbp]", "mov edx, [rbp + 4]", "wrmsr",
        "mov ecx, 0xc0000082", "mov eax, [rbp + 8]", "mov edx, [rbp + 12]", "wrmsr",
        "mov ecx, 0xc0000084", "mov eax, [rbp + 16]", "mov edx, [rbp + 20]", "wrmsr",
        "mov ecx, 0xc0000103", "mov eax, [rbp + 24]", "mov edx, [rbp + 28]", "wrmsr",
        "mov ecx, 0xc0000102", "mov eax, [rbp + 32]", "mov edx, [rbp + 36]", "wrmsr",
        "mov ecx, 0xc0000101", "mov eax, [rbp + 40]", "mov edx, [rbp + 44]", "wrmsr",
        "mov rax, [rbp + 48]", "mov dr0, rax", "mov rax, [rbp + 56]", "mov dr1, rax",
        "mov rax, [rbp + 64]", "mov dr2, rax", "mov rax, [rbp + 72]", "mov dr3, rax",
        "mov rax, [rbp + 80]", "mov dr7, rax",
        "mov rax, [rbp + 88]", "mov cr8, rax",
        "vmovdqu ymm0, [rbp + 0x100]", "vmovdqu ymm1, [rbp + 0x120]", "vmovdqu ymm2, [rbp + 0x140]",
        "vmovdqu ymm3, [rbp + 0x160]", "vmovdqu ymm4, [rbp + 0x180]", "vmovdqu ymm5, [rbp + 0x1a0]",
        "vmovdqu ymm6, [rbp + 0x1c0]", "vmovdqu ymm7, [rbp + 0x1e0]", "vmovdqu ymm8, [rbp + 0x200]",
        "vmovdqu ymm9, [rbp + 0x220]", "vmovdqu ymm10, [rbp + 0x240]", "vmovdqu ymm11, [rbp + 0x260]",
        "vmovdqu ymm12, [rbp + 0x280]", "vmovdqu ymm13, [rbp + 0x2a0]", "vmovdqu ymm14, [rbp + 0x2c0]",
        "vmovdqu ymm15, [rbp + 0x2e0]",
        "xor ebx, ebx",
        "mov r14, [rbp + 112]",

        "2: xor edi, edi", "std", "stc", "syscall", "cld",
        "mov r13d, 1", "cmp edi, [rbp + 120]", "jne 9f",
        "mov r13d, 2", "movzx ecx, word ptr [rbp + 4]", "cmp eax, ecx", "jne 9f",
        "mov r13d, 3", "and edx, 0x401", "cmp edx, [rbp + 128]", "jne 9f",
        "mov r13d, 4", "rdtscp", "cmp ecx, [rbp + 24]", "jne 9f",
        "mov r13d, 5", "mov rax, gs:[0]", "cmp rax, [rbp + 40]", "jne 9f",
        "mov r13d, 6", "swapgs", "mov rax, gs:[0]", "cmp rax, [rbp + 32]", "jne 9f",
        "mov rcx, [rbp + 104]", "3: pause", "dec rcx", "jnz 3b",
        "mov r13d, 7", "mov rax, gs:[0]", "cmp rax, [rbp + 32]", "jne 9f", "swapgs",
        "mov r13d, 8", "xor r15d, r15d", "mov rax, [rbp + 48]", "mov [rax], eax", "cmp r15d, 1", "jne 9f",
        "mov r13d, 9", "mov rax, dr0", "cmp rax, [rbp + 48]", "jne 9f",
        "mov rax, dr3", "cmp rax, [rbp + 72]", "jne 9f", "mov rax, dr7", "cmp rax, [rbp + 80]", "jne 9f",
        "mov r13d, 10", "mov rax, cr8", "cmp rax, [rbp + 88]", "jne 9f",
        "vmovdqu [rbp + 0x300], ymm0", "vmovdqu [rbp + 0x320], ymm1", "vmovdqu [rbp + 0x340], ymm2",
        "vmovdqu [rbp + 0x360], ymm3", "vmovdqu [rbp + 0x380], ymm4", "vmovdqu [rbp + 0x3a0], ymm5",
        "vmovdqu [rbp + 0x3c0], ymm6", "vmovdqu [rbp + 0x3e0], ymm7", "vmovdqu [rbp + 0x400], ymm8",
        "vmovdqu [rbp + 0x420], ymm9", "vmovdqu [rbp + 0x440], ymm10", "vmovdqu [rbp + 0x460], ymm11",
        "vmovdqu [rbp + 0x480], ymm12", "vmovdqu [rbp + 0x4a0], ymm13", "vmovdqu [rbp + 0x4c0], ymm14",
        "vmovdqu [rbp + 0x4e0], ymm15",
        "mov r13d, 11", "lea rsi, [rbp + 0x100]", "lea rdi, [rbp + 0x300]", "mov ecx, 64",
        "repe cmpsq", "jne 9f",
        "inc ebx", "dec r14", "jnz 2b",
        "mov r14, [rbp + 112]", "mov eax, ebx", "out 0xf0, eax", "jmp 2b",
        "9: mov eax, r13d", "out 0xf1, al", "hlt")
}

/// What the program's numbers mean.
const CHECKS: &[&str] = &[
    "",
    "SYSCALL's target",
    "SYSCALL's CS",
    "SYSCALL's flag mask",
    "TSC_AUX",
    "GS base",
    "KERNEL_GS_BASE",
    "GS base after some time",
    "a watchpoint",
    "debug registers",
    "CR8",
    "vector registers",
];

impl Values {
    /// A guest in a VM of ours that executes PAUSE so many times in a round, once at least, and exits to its client
    /// after each.
    pub const fn ours(pauses: u64) -> Self {
        Self {
            kind: 0,
            pauses,
            rounds: 1,
        }
    }

    /// A guest in a VM of KVM's that exits to its client after so many rounds, one at least.
    pub const fn kvms(rounds: u32) -> Self {
        Self {
            kind: 1,
            pauses: 1,
            rounds: rounds as u64,
        }
    }

    /// Writes program and values into memory that has the tables of [`Mode::Long`].
    pub fn write(&self, ram: &Ram) {
        ram.write(CODE, program().bits64);
        // The gate of #DB.
        let handler = CODE + 0xc0;
        ram.write_u16(IDT + 16, handler as u16);
        ram.write_u16(IDT + 16 + 6, (handler >> 16) as u16);
        let code = 0x60 + 0x10 * self.kind;
        // SYSCALL loads CS and SS without a look at the table, IRET with one.
        for selector in [0x60, 0x70] {
            ram.write_u64(GDT + selector, 0x00af_9b00_0000_ffff);
            ram.write_u64(GDT + selector + 8, 0x00cf_9300_0000_ffff);
        }
        let [first, second] = [GS_BASES, GS_BASES + 0x1000];
        ram.write_u64(first, first);
        ram.write_u64(second, second);
        let (base, swapped) = if self.kind == 0 {
            (first, second)
        } else {
            (second, first)
        };
        let watched = DATA + 0x100 + 0x1010 * self.kind;
        let values = [
            code << 32,
            CODE + 0x40 + 0x40 * self.kind,
            // FMASK: the carry flag, or the direction flag.
            0x1 << (10 * self.kind),
            0x5000 + self.kind,
            swapped,
            base,
            watched,
            watched + 0x10,
            watched + 0x20,
            watched + 0x30,
            // L0, a write of four bytes.
            0xd_0401,
            4 + self.kind,
            0,
            self.pauses,
            self.rounds,
            0x1111 * (1 + self.kind),
            0x401 & !(0x1 << (10 * self.kind)),
        ];
        for (index, value) in (0..).zip(values) {
            ram.write_u64(VALUES + index * 8, value);
        }
        for index in 0..64 {
            let pattern = (index + 1) * (0x0101_0101_0101_0101 << self.kind);
            ram.write_u64(VALUES + 0x100 + index * 8, pattern);
        }
    }

    /// Registers to start with.
    pub fn registers() -> VcpuState {
        let state = registers(Mode::Long);
        VcpuState {
            gdt: SegmentDesc {
                limit: 0x7f,
                ..state.gdt
            },
            ..state
        }
    }

    /// RAM with everything in it.
    pub fn ram(&self) -> Ram {
        let ram = Ram::new(modes::RAM_SIZE);
        modes::write_tables(Mode::Long, &ram);
        self.write(&ram);
        ram
    }
}

/// What an OUT of the program says: rounds so far.
///
/// # Errors
/// Something is not as it was; or this is no OUT of the program.
pub fn told(port: u16, data: &[u8]) -> Result<u32> {
    match (port, data) {
        (ROUNDS_PORT, &[a, b, c, d]) => Ok(u32::from_le_bytes([a, b, c, d])),
        (LOST_PORT, &[number]) => {
            let check = CHECKS.get(usize::from(number)).copied();
            bail!("the guest has lost {}", check.unwrap_or("something"))
        }
        _ => bail!("an OUT to {port:#x} of {data:x?}"),
    }
}
