//! Each operation once by hand, with its answer: run with all flags clear and
//! with all flags set, from RAM and from MMIO. Flags the instruction does not
//! write, registers it does not name and memory around the operand must stay.

mod emulate_machine;

use emulate_machine::{Fake, Kind, STATUS};
use haxm_vmx::emulate::Gpr::{R8, Rax, Rbx, Rcx, Rdi, Rdx, Rsp};
use haxm_vmx::emulate::{Gpr, Mode, Step, decode};

const CF: u64 = 1;
const PF: u64 = 4;
const AF: u64 = 0x10;
const ZF: u64 = 0x40;
const SF: u64 = 0x80;
const OF: u64 = 0x800;
const NONE: u64 = 0;

/// Everything in RFLAGS a program or a kernel can set, without TF, RF and VM,
/// which the emulator looks at.
const OTHERS: u64 = 0x3c_7600;

/// The operand lies at [rsi].
const PLACE: u64 = 0x5100;
const STACK: u64 = 0x6800;

/// Registers and what they hold.
type Values = &'static [(Gpr, u64)];

/// One form: its bytes, what it starts from, what it must leave.
struct Form {
    name: &'static str,
    code: &'static [u8],
    /// The eight bytes at [rsi], before and after.
    memory: (u64, u64),
    /// Registers before; the rest hold a pattern.
    before: Values,
    /// Registers that change.
    after: Values,
    /// Flags it writes, and those of them that end up set.
    flags: (u64, u64),
    /// What differs when all flags were set: for the instructions that read them.
    flagged: Option<(u64, Values, u64)>,
}

const fn form(
    name: &'static str,
    code: &'static [u8],
    memory: (u64, u64),
    before: Values,
    after: Values,
    flags: (u64, u64),
) -> Form {
    Form {
        name,
        code,
        memory,
        before,
        after,
        flags,
        flagged: None,
    }
}

/// A form that reads flags: memory, registers and flags when all were set.
const fn reads(mut form: Form, memory: u64, after: Values, flags: u64) -> Form {
    form.flagged = Some((memory, after, flags));
    form
}

const M: u64 = 0x1122_3344_5566_7788;
const ALL: u64 = u64::MAX;

#[rustfmt::skip]
const ARITHMETIC: &[Form] = &[
    form("add dword [rsi], eax", &[0x01, 0x06], (0x1122_3344_ffff_ffff, 0x1122_3344_0000_0000), &[(Rax, 1)], &[], (STATUS, CF | PF | AF | ZF)),
    form("add rax, [rsi]", &[0x48, 0x03, 0x06], (0x7fff_ffff_ffff_ffff, 0x7fff_ffff_ffff_ffff), &[(Rax, 1)], &[(Rax, 1 << 63)], (STATUS, SF | OF | AF | PF)),
    form("add byte [rsi], 0x80", &[0x80, 0x06, 0x80], (M, 0x1122_3344_5566_7708), &[], &[], (STATUS, CF | OF)),
    form("or word [rsi], ax", &[0x66, 0x09, 0x06], (0, 0x8001), &[(Rax, 0x8001)], &[], (STATUS, SF)),
    reads(form("adc dword [rsi], ecx", &[0x11, 0x0e], (0xffff_fffe, 0xffff_ffff), &[(Rcx, 1)], &[], (STATUS, SF | PF)), 0, &[], CF | ZF | PF | AF),
    reads(form("sbb dword [rsi], ecx", &[0x19, 0x0e], (1, 0), &[(Rcx, 1)], &[], (STATUS, ZF | PF)), 0xffff_ffff, &[], CF | SF | PF | AF),
    form("and qword [rsi], 0x0f", &[0x48, 0x83, 0x26, 0x0f], (M, 8), &[], &[], (STATUS, NONE)),
    form("sub byte [rsi], al", &[0x28, 0x06], (0, 0xff), &[(Rax, 1)], &[], (STATUS, CF | SF | PF | AF)),
    form("xor [rsi], rdx", &[0x48, 0x31, 0x16], (M, 0), &[(Rdx, M)], &[], (STATUS, ZF | PF)),
    form("cmp [rsi], rdx", &[0x48, 0x39, 0x16], (1, 1), &[(Rdx, 2)], &[], (STATUS, CF | SF | PF | AF)),
    form("cmp dl, [rsi]", &[0x3a, 0x16], (0x01, 0x01), &[(Rdx, 0x80)], &[], (STATUS, OF | AF)),
    form("test dword [rsi], 0x80000000", &[0xf7, 0x06, 0, 0, 0, 0x80], (0x8000_0001, 0x8000_0001), &[], &[], (STATUS, SF | PF)),
    form("inc byte [rsi]", &[0xfe, 0x06], (0x7f, 0x80), &[], &[], (STATUS & !CF, SF | OF | AF)),
    form("dec qword [rsi]", &[0x48, 0xff, 0x0e], (0, ALL), &[], &[], (STATUS & !CF, SF | PF | AF)),
    form("not dword [rsi]", &[0xf7, 0x16], (M, 0x1122_3344_aa99_8877), &[], &[], (0, NONE)),
    form("neg word [rsi]", &[0x66, 0xf7, 0x1e], (1, 0xffff), &[], &[], (STATUS, CF | SF | PF | AF)),
    reads(form("adcx rax, [rsi]", &[0x66, 0x48, 0x0f, 0x38, 0xf6, 0x06], (ALL, ALL), &[(Rax, 0)], &[(Rax, ALL)], (CF, NONE)), ALL, &[(Rax, 0)], CF),
    reads(form("adox eax, [rsi]", &[0xf3, 0x0f, 0x38, 0xf6, 0x06], (ALL, ALL), &[(Rax, 0)], &[(Rax, 0xffff_ffff)], (OF, NONE)), ALL, &[(Rax, 0)], OF),
    form("mul byte [rsi]", &[0xf6, 0x26], (0x80, 0x80), &[(Rax, 0x7704)], &[(Rax, 0x0200)], (CF | OF, CF | OF)),
    form("mul qword [rsi]", &[0x48, 0xf7, 0x26], (ALL, ALL), &[(Rax, 2)], &[(Rax, ALL - 1), (Rdx, 1)], (CF | OF, CF | OF)),
    form("imul dword [rsi]", &[0xf7, 0x2e], (0xffff_ffff, 0xffff_ffff), &[(Rax, 5)], &[(Rax, 0xffff_fffb), (Rdx, 0xffff_ffff)], (CF | OF, NONE)),
    form("imul eax, [rsi], 3", &[0x6b, 0x06, 3], (0x4000_0000, 0x4000_0000), &[(Rax, 9)], &[(Rax, 0xc000_0000)], (CF | OF, CF | OF)),
    form("imul rax, [rsi]", &[0x48, 0x0f, 0xaf, 0x06], (7, 7), &[(Rax, ALL)], &[(Rax, ALL - 6)], (CF | OF, NONE)),
    form("div byte [rsi]", &[0xf6, 0x36], (10, 10), &[(Rax, 0x1_0067)], &[(Rax, 0x1_030a)], (0, NONE)),
    form("div qword [rsi]", &[0x48, 0xf7, 0x36], (3, 3), &[(Rax, 1), (Rdx, 2)], &[(Rax, 0xaaaa_aaaa_aaaa_aaab), (Rdx, 0)], (0, NONE)),
    form("idiv dword [rsi]", &[0xf7, 0x3e], (0xffff_fffe, 0xffff_fffe), &[(Rax, 7), (Rdx, 0)], &[(Rax, 0xffff_fffd), (Rdx, 1)], (0, NONE)),
];

#[rustfmt::skip]
const BITS: &[Form] = &[
    form("rol byte [rsi], 1", &[0xd0, 0x06], (0x81, 0x03), &[], &[], (CF | OF, CF | OF)),
    form("ror dword [rsi], cl", &[0xd3, 0x0e], (0x0000_0001, 0x8000_0000), &[(Rcx, 0xff21)], &[], (CF | OF, CF | OF)),
    reads(form("rcl word [rsi], 1", &[0x66, 0xd1, 0x16], (0x8000, 0), &[], &[], (CF | OF, CF | OF)), 1, &[], CF | OF),
    reads(form("rcr qword [rsi], 1", &[0x48, 0xd1, 0x1e], (1, 0), &[], &[], (CF | OF, CF)), 1 << 63, &[], CF | OF),
    form("shl dword [rsi], 1", &[0xd1, 0x26], (0xc000_0000, 0x8000_0000), &[], &[], (STATUS & !AF, CF | SF | PF)),
    form("shl dword [rsi], 32", &[0xc1, 0x26, 32], (M, M), &[], &[], (0, NONE)),
    form("shr byte [rsi], 1", &[0xd0, 0x2e], (0x81, 0x40), &[], &[], (STATUS & !AF, CF | OF)),
    form("sar qword [rsi], 1", &[0x48, 0xd1, 0x3e], (ALL, ALL), &[], &[], (STATUS & !AF, CF | SF | PF)),
    form("shld dword [rsi], eax, 1", &[0x0f, 0xa4, 0x06, 1], (0x4000_0000, 0x8000_0001), &[(Rax, 0x8000_0000)], &[], (STATUS & !AF, SF | OF)),
    form("shrd word [rsi], ax, 1", &[0x66, 0x0f, 0xac, 0x06, 1], (0x0001, 0x8000), &[(Rax, 1)], &[], (STATUS & !AF, CF | SF | OF | PF)),
    form("bt dword [rsi], 31", &[0x0f, 0xba, 0x26, 31], (0x8000_0000, 0x8000_0000), &[], &[], (CF, CF)),
    form("bts dword [rsi], eax", &[0x0f, 0xab, 0x06], (0, 1 << 35), &[(Rax, 35)], &[], (CF, NONE)),
    form("btr qword [rsi], 0", &[0x48, 0x0f, 0xba, 0x36, 0], (3, 2), &[], &[], (CF, CF)),
    form("btc word [rsi], ax", &[0x66, 0x0f, 0xbb, 0x06], (0, 1 << 63), &[(Rax, 63)], &[], (CF, NONE)),
    form("bsf eax, [rsi]", &[0x0f, 0xbc, 0x06], (0x50, 0x50), &[(Rax, 9)], &[(Rax, 4)], (ZF, NONE)),
    form("bsf eax, [rsi] of zero", &[0x0f, 0xbc, 0x06], (0, 0), &[(Rax, 9)], &[], (ZF, ZF)),
    form("bsr rax, [rsi]", &[0x48, 0x0f, 0xbd, 0x06], (0x50, 0x50), &[(Rax, 9)], &[(Rax, 6)], (ZF, NONE)),
    form("tzcnt eax, [rsi]", &[0xf3, 0x0f, 0xbc, 0x06], (0, 0), &[(Rax, 9)], &[(Rax, 32)], (CF | ZF, CF)),
    form("lzcnt ax, [rsi]", &[0x66, 0xf3, 0x0f, 0xbd, 0x06], (0x8000, 0x8000), &[(Rax, 9)], &[(Rax, 0)], (CF | ZF, ZF)),
    form("popcnt rax, [rsi]", &[0xf3, 0x48, 0x0f, 0xb8, 0x06], (ALL, ALL), &[(Rax, 9)], &[(Rax, 64)], (STATUS, NONE)),
    // Entry 1 of everyone's CRC-32C table.
    form("crc32 eax, byte [rsi]", &[0xf2, 0x0f, 0x38, 0xf0, 0x06], (1, 1), &[(Rax, 0)], &[(Rax, 0xf26b_8303)], (0, NONE)),
    form("andn eax, ecx, [rsi]", &[0xc4, 0xe2, 0x70, 0xf2, 0x06], (M, M), &[(Rcx, 0x5566_0000)], &[(Rax, 0x7788)], (CF | OF | ZF | SF, NONE)),
    form("bextr eax, [rsi], ecx", &[0xc4, 0xe2, 0x70, 0xf7, 0x06], (M, M), &[(Rcx, 0x0804)], &[(Rax, 0x78)], (CF | OF | ZF, NONE)),
    form("bzhi rax, [rsi], rcx", &[0xc4, 0xe2, 0xf0, 0xf5, 0x06], (M, M), &[(Rcx, 12)], &[(Rax, 0x788)], (CF | OF | ZF | SF, NONE)),
    form("blsr eax, [rsi]", &[0xc4, 0xe2, 0x78, 0xf3, 0x0e], (0x18, 0x18), &[], &[(Rax, 0x10)], (CF | OF | ZF | SF, NONE)),
    form("blsmsk eax, [rsi]", &[0xc4, 0xe2, 0x78, 0xf3, 0x16], (0x18, 0x18), &[], &[(Rax, 0x0f)], (CF | OF | ZF | SF, NONE)),
    form("blsi eax, [rsi]", &[0xc4, 0xe2, 0x78, 0xf3, 0x1e], (0x18, 0x18), &[], &[(Rax, 8)], (CF | OF | ZF | SF, CF)),
    form("pdep eax, ecx, [rsi]", &[0xc4, 0xe2, 0x73, 0xf5, 0x06], (0xf0f0, 0xf0f0), &[(Rcx, 0x5a)], &[(Rax, 0x50a0)], (0, NONE)),
    form("pext eax, ecx, [rsi]", &[0xc4, 0xe2, 0x72, 0xf5, 0x06], (0xf0f0, 0xf0f0), &[(Rcx, 0x57a5)], &[(Rax, 0x5a)], (0, NONE)),
    form("mulx rax, rcx, [rsi]", &[0xc4, 0xe2, 0xf3, 0xf6, 0x06], (ALL, ALL), &[(Rdx, 2)], &[(Rax, 1), (Rcx, ALL - 1)], (0, NONE)),
    form("rorx eax, [rsi], 4", &[0xc4, 0xe3, 0x7b, 0xf0, 0x06, 4], (0x1f, 0x1f), &[], &[(Rax, 0xf000_0001)], (0, NONE)),
    form("sarx eax, [rsi], ecx", &[0xc4, 0xe2, 0x72, 0xf7, 0x06], (0x8000_0000, 0x8000_0000), &[(Rcx, 31)], &[(Rax, 0xffff_ffff)], (0, NONE)),
    form("shlx rax, [rsi], rcx", &[0xc4, 0xe2, 0xf1, 0xf7, 0x06], (1, 1), &[(Rcx, 63)], &[(Rax, 1 << 63)], (0, NONE)),
    form("shrx eax, [rsi], ecx", &[0xc4, 0xe2, 0x73, 0xf7, 0x06], (0x8000_0000, 0x8000_0000), &[(Rcx, 63)], &[(Rax, 1)], (0, NONE)),
];

#[rustfmt::skip]
const MOVES: &[Form] = &[
    form("mov [rsi], ah", &[0x88, 0x26], (M, 0x1122_3344_5566_77ab), &[(Rax, 0xab00)], &[], (0, NONE)),
    form("mov ch, [rsi]", &[0x8a, 0x2e], (M, M), &[(Rcx, ALL)], &[(Rcx, 0xffff_ffff_ffff_88ff)], (0, NONE)),
    form("mov eax, [rsi]", &[0x8b, 0x06], (M, M), &[(Rax, ALL)], &[(Rax, 0x5566_7788)], (0, NONE)),
    form("mov [rsi], r8w", &[0x66, 0x44, 0x89, 0x06], (M, 0x1122_3344_5566_1234), &[(R8, 0x1234)], &[], (0, NONE)),
    form("mov qword [rsi], -1", &[0x48, 0xc7, 0x06, 0xff, 0xff, 0xff, 0xff], (M, ALL), &[], &[], (0, NONE)),
    form("mov al, [PLACE]", &[0xa0, 0x00, 0x51, 0, 0, 0, 0, 0, 0], (M, M), &[(Rax, 0)], &[(Rax, 0x88)], (0, NONE)),
    form("mov [rsi], ds", &[0x8c, 0x1e], (M, 0x1122_3344_5566_0008), &[], &[], (0, NONE)),
    form("movzx rax, word [rsi]", &[0x48, 0x0f, 0xb7, 0x06], (M, M), &[(Rax, ALL)], &[(Rax, 0x7788)], (0, NONE)),
    form("movsx ax, byte [rsi]", &[0x66, 0x0f, 0xbe, 0x06], (M, M), &[(Rax, 0)], &[(Rax, 0xff88)], (0, NONE)),
    form("movsxd rax, [rsi]", &[0x48, 0x63, 0x06], (0x8000_0000, 0x8000_0000), &[], &[(Rax, 0xffff_ffff_8000_0000)], (0, NONE)),
    form("movbe rax, [rsi]", &[0x48, 0x0f, 0x38, 0xf0, 0x06], (M, M), &[], &[(Rax, 0x8877_6655_4433_2211)], (0, NONE)),
    form("movbe [rsi], ax", &[0x66, 0x0f, 0x38, 0xf1, 0x06], (M, 0x1122_3344_5566_3412), &[(Rax, 0x1234)], &[], (0, NONE)),
    form("movnti [rsi], rax", &[0x48, 0x0f, 0xc3, 0x06], (M, 77), &[(Rax, 77)], &[], (0, NONE)),
    form("stmxcsr [rsi]", &[0x0f, 0xae, 0x1e], (M, 0x1122_3344_0000_1f80), &[], &[], (0, NONE)),
    form("ldmxcsr [rsi]", &[0x0f, 0xae, 0x16], (0x1fa0, 0x1fa0), &[], &[], (0, NONE)),
    form("vstmxcsr [rsi]", &[0xc5, 0xf8, 0xae, 0x1e], (M, 0x1122_3344_0000_1f80), &[], &[], (0, NONE)),
    form("pextrb [rsi], xmm3, 5", &[0x66, 0x0f, 0x3a, 0x14, 0x1e, 5], (M, 0x1122_3344_5566_7700), &[], &[], (0, NONE)),
    form("lmsw [rsi]", &[0x0f, 0x01, 0x36], (M, M), &[], &[], (0, NONE)),
    // No such descriptor: nothing changes but ZF.
    form("lar rax, [rsi]", &[0x48, 0x0f, 0x02, 0x06], (M, M), &[(Rax, ALL)], &[], (ZF, NONE)),
    form("lsl eax, [rsi]", &[0x0f, 0x03, 0x06], (M, M), &[(Rax, ALL)], &[], (ZF, NONE)),
    form("verr [rsi]", &[0x0f, 0x00, 0x26], (M, M), &[], &[], (ZF, NONE)),
    form("verw [rsi]", &[0x0f, 0x00, 0x2e], (M, M), &[], &[], (ZF, NONE)),
    form("movdiri [rsi], eax", &[0x0f, 0x38, 0xf9, 0x06], (M, 0x1122_3344_0000_004d), &[(Rax, 77)], &[], (0, NONE)),
    form("xchg [rsi], al", &[0x86, 0x06], (M, 0x1122_3344_5566_7701), &[(Rax, 1)], &[(Rax, 0x88)], (0, NONE)),
    form("xadd [rsi], ecx", &[0x0f, 0xc1, 0x0e], (0xffff_ffff, 1), &[(Rcx, 2)], &[(Rcx, 0xffff_ffff)], (STATUS, CF | AF)),
    form("cmpxchg [rsi], ecx, equal", &[0x0f, 0xb1, 0x0e], (5, 9), &[(Rax, 0xff_0000_0005), (Rcx, 9)], &[], (STATUS, ZF | PF)),
    form("cmpxchg [rsi], ecx, other", &[0x0f, 0xb1, 0x0e], (6, 6), &[(Rax, 5), (Rcx, 9)], &[(Rax, 6)], (STATUS, CF | SF | PF | AF)),
    form("cmpxchg8b [rsi], equal", &[0x0f, 0xc7, 0x0e], (M, 0x3_0000_0004), &[(Rax, 0xff_5566_7788), (Rdx, 0xff_1122_3344), (Rcx, 3), (Rbx, 4)], &[], (ZF, ZF)),
    form("cmpxchg8b [rsi], other", &[0x0f, 0xc7, 0x0e], (M, M), &[(Rax, 0), (Rdx, 0)], &[(Rax, 0x5566_7788), (Rdx, 0x1122_3344)], (ZF, NONE)),
    reads(form("setnz [rsi]", &[0x0f, 0x95, 0x06], (M, 0x1122_3344_5566_7701), &[], &[], (0, NONE)), 0x1122_3344_5566_7700, &[], NONE),
    reads(form("cmovc eax, [rsi]", &[0x0f, 0x42, 0x06], (M, M), &[(Rax, ALL)], &[(Rax, 0xffff_ffff)], (0, NONE)), M, &[(Rax, 0x5566_7788)], NONE),
    form("xlat", &[0xd7], (M, M), &[(Rbx, PLACE - 0x83), (Rax, 0x1_0085)], &[(Rax, 0x1_0066)], (0, NONE)),
    form("push qword [rsi]", &[0xff, 0x36], (M, M), &[], &[(Rsp, STACK - 8)], (0, NONE)),
    form("pop qword [rsi]", &[0x8f, 0x06], (M, 0x0807_0605_0403_0201), &[], &[(Rsp, STACK + 8)], (0, NONE)),
    form("prefetcht0 [rsi]", &[0x0f, 0x18, 0x0e], (M, M), &[], &[], (0, NONE)),
    form("clflush [rsi]", &[0x0f, 0xae, 0x3e], (M, M), &[], &[], (0, NONE)),
    form("lodsd", &[0xad], (M, M), &[(Rax, ALL)], &[(Rax, 0x5566_7788), (Gpr::Rsi, PLACE + 4)], (0, NONE)),
    form("cmpsb", &[0xa6], (M, M), &[(Rdi, PLACE + 1)], &[(Gpr::Rsi, PLACE + 1), (Rdi, PLACE + 2)], (STATUS, OF | PF)),
    form("stosw", &[0x66, 0xab], (M, 0x1122_3344_5566_1234), &[(Rax, 0x1234), (Rdi, PLACE)], &[(Rdi, PLACE + 2)], (0, NONE)),
    form("scasb", &[0xae], (M, M), &[(Rax, 0x88), (Rdi, PLACE)], &[(Rdi, PLACE + 1)], (STATUS, ZF | PF)),
    form("movsb", &[0xa4], (M, 0x1122_3344_5566_8888), &[(Rdi, PLACE + 1)], &[(Gpr::Rsi, PLACE + 1), (Rdi, PLACE + 2)], (0, NONE)),
];

fn machine(form: &Form, kind: Kind, flags: u64) -> Fake {
    let mut fake = Fake::new(Mode::Bits64);
    for (number, reg) in fake.gpr.iter_mut().enumerate() {
        *reg = 0x0101_0101_0101_0101 * number as u64;
    }
    fake.gpr[Gpr::Rsi.number()] = PLACE;
    fake.gpr[Rsp.number()] = STACK;
    for (reg, value) in form.before {
        fake.gpr[reg.number()] = *value;
    }
    fake.rflags = 2 | flags;
    for (address, kind) in [(PLACE, kind), (STACK, Kind::Ram)] {
        fake.map(address, kind).bytes.fill(0xcc);
    }
    fake.poke(PLACE, &form.memory.0.to_le_bytes());
    fake.poke(STACK, &[1, 2, 3, 4, 5, 6, 7, 8]);
    fake
}

fn check(form: &Form, kind: Kind, all_set: bool) {
    let name = form.name;
    // DF would turn the string instructions round; it has tests of its own.
    let flags = if all_set {
        (STATUS | OTHERS) & !0x400
    } else {
        0
    };
    let mut fake = machine(form, kind, flags);
    let before = fake.clone();
    let insn = decode(form.code, Mode::Bits64).unwrap_or_else(|error| panic!("{name}: {error:?}"));
    assert_eq!(usize::from(insn.len), form.code.len(), "{name}");
    let (step, _) = fake.run(&insn);
    assert_eq!(step, Step::Done, "{name}");
    assert_eq!(fake.rip, before.rip + form.code.len() as u64, "{name}");
    let (memory, after, set) = match form.flagged {
        Some(flagged) if all_set => flagged,
        _ => (form.memory.1, form.after, form.flags.1),
    };
    assert_eq!(
        fake.peek64(PLACE),
        memory,
        "{name}: memory {:#x}",
        fake.peek64(PLACE)
    );
    let mut wanted = before.gpr;
    for (reg, value) in after {
        wanted[reg.number()] = *value;
    }
    assert_eq!(fake.gpr, wanted, "{name}: registers {:x?}", fake.gpr);
    let written = form.flags.0;
    assert_eq!(
        fake.rflags,
        before.rflags & !written | set,
        "{name}: flags {:#x} all_set {all_set}",
        fake.rflags
    );
    // Nothing but the operand changes, and the stack only where it was pushed.
    let mut around = fake.pages[&(PLACE >> 12)].bytes.clone();
    around[(PLACE & 0xfff) as usize..][..8].fill(0xcc);
    assert!(
        around.iter().all(|byte| *byte == 0xcc),
        "{name}: memory around"
    );
    assert_eq!(fake.vectors, before.vectors, "{name}");
}

#[test]
fn every_form_with_both_poles_of_flags() {
    for form in ARITHMETIC.iter().chain(BITS).chain(MOVES) {
        for kind in [Kind::Ram, Kind::Mmio] {
            check(form, kind, false);
            check(form, kind, true);
        }
    }
}

#[test]
fn pushes_what_memory_holds() {
    let form = MOVES
        .iter()
        .find(|form| form.name.starts_with("push"))
        .expect("in the table");
    let mut fake = machine(form, Kind::Mmio, 0);
    let insn = decode(form.code, Mode::Bits64).expect("decodes");
    assert_eq!(fake.run(&insn).0, Step::Done);
    assert_eq!(fake.peek64(STACK - 8), M);
}
