//! The modes guests are tested in, and what each needs in registers and memory: GDT, IDT, TSS, page tables.
//!
//! Every mode sees guest-physical memory one to one, and every data segment is flat, in real mode too
//! ("unreal"): one source text serves all.

use abi::{SegmentDesc, VcpuState};

use crate::ram::Ram;

/// A processor mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real-address mode.
    Real,
    /// Protected mode without paging, 32-bit segments.
    Protected,
    /// Protected mode, 32-bit paging.
    Paged,
    /// Protected mode, PAE paging.
    Pae,
    /// 64-bit mode.
    Long,
}

/// All of them.
pub const ALL: &[Mode] = &[
    Mode::Real,
    Mode::Protected,
    Mode::Paged,
    Mode::Pae,
    Mode::Long,
];
/// Those with descriptors.
pub const PROTECTED: &[Mode] = &[Mode::Protected, Mode::Paged, Mode::Pae, Mode::Long];
/// One of each code size.
pub const SIZES: &[Mode] = &[Mode::Real, Mode::Protected, Mode::Long];
/// 32- and 64-bit code.
pub const WIDE: &[Mode] = &[Mode::Protected, Mode::Long];
/// 32-bit code only, without paging and with.
pub const WIDE32: &[Mode] = &[Mode::Protected, Mode::Pae];
/// Those with hardware tasks.
pub const LEGACY: &[Mode] = &[Mode::Protected, Mode::Paged, Mode::Pae];
/// 32-bit code with paging.
pub const PAGED32: &[Mode] = &[Mode::Paged, Mode::Pae];
/// 64-bit code only.
pub const LONG: &[Mode] = &[Mode::Long];
/// Those with paging.
pub const PAGING: &[Mode] = &[Mode::Paged, Mode::Pae, Mode::Long];

impl Mode {
    /// For the name of a case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Real => "real16",
            Self::Protected => "protected32",
            Self::Paged => "paged32",
            Self::Pae => "pae32",
            Self::Long => "long64",
        }
    }

    /// Bytes a push takes by default.
    pub const fn slot(self) -> usize {
        match self {
            Self::Real => 2,
            Self::Protected | Self::Paged | Self::Pae => 4,
            Self::Long => 8,
        }
    }

    /// RIP of the first byte at [`CODE`].
    pub const fn entry(self) -> u64 {
        match self {
            Self::Real => 0,
            _ => CODE,
        }
    }

    /// Address of entry `index` of the page table that maps the first megabytes in 4 KB pages, and the bytes
    /// of an entry.
    pub const fn page_entry(self, page: u64) -> (u64, usize) {
        match self {
            Self::Paged => (PT32 + page * 4, 4),
            _ => (PT + page * 8, 8),
        }
    }
}

/// RAM: from 0, and from 1 MB; the hole between is device memory.
pub const RAM_SIZE: u64 = 2 << 20;
/// End of the first part.
pub const LOW_END: u64 = 0xc0000;
/// Start of the second part.
pub const HIGH_START: u64 = 0x100000;
/// Some address nothing is mapped at.
pub const DEVICE: u64 = 0xd0000;

pub const GDT: u64 = 0x1000;
/// Interrupt descriptors; in real mode the vectors are at 0.
pub const IDT: u64 = 0x2000;
/// Page-map level 4.
pub const PML4: u64 = 0x3000;
/// Page-directory pointers of long mode.
pub const PDPT: u64 = 0x4000;
/// Page directory of PAE and long mode.
pub const PD: u64 = 0x5000;
const PT: u64 = 0x6000;
/// Page-directory pointers of PAE paging.
pub const PDPT_PAE: u64 = 0x7000;
const PD32: u64 = 0x8000;
const PT32: u64 = 0x9000;
/// One stub of 16 bytes per vector.
pub const STUBS: u64 = 0xa000;
const TSS: u64 = 0xb000;
/// Free for cases: two pages.
pub const DATA: u64 = 0xc000;
/// Top of the stack, which has a page.
pub const STACK: u64 = 0xf000;
/// Where the code starts.
pub const CODE: u64 = 0x10000;
/// Stack for a change to ring 0.
pub const RING0_STACK: u64 = 0xbf00;

/// Port an interrupt's stub writes its vector to.
pub const VECTOR_PORT: u16 = 0xe9;
/// First vector whose stub tells of it and returns; those below stop.
pub const FIRST_RETURNING: u8 = 0x20;

/// Selectors of the GDT.
pub mod selector {
    pub const CODE32: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE64: u16 = 0x18;
    pub const USER_CODE32: u16 = 0x23;
    pub const USER_DATA: u16 = 0x2b;
    pub const USER_CODE64: u16 = 0x33;
    pub const TSS: u16 = 0x38;
    pub const CODE16: u16 = 0x48;
}

/// IA32_EFER.
pub const EFER: u64 = 0xc000_0080;
/// SCE, LME, LMA, NXE.
pub const EFER_LONG: u64 = 0xd01;

fn segment(selector: u16, base: u64, limit: u32, ar: u32) -> SegmentDesc {
    SegmentDesc {
        selector,
        limit,
        base,
        ar,
        ..SegmentDesc::default()
    }
}

/// Registers a case starts with.
pub fn registers(mode: Mode) -> VcpuState {
    let real = mode == Mode::Real;
    let (code, data) = match mode {
        Mode::Real => (
            segment(0x1000, CODE, 0xffff, 0x9b),
            segment(0, 0, u32::MAX, 0x8093),
        ),
        Mode::Long => (
            segment(selector::CODE64, 0, u32::MAX, 0xa09b),
            segment(selector::DATA, 0, u32::MAX, 0xc093),
        ),
        _ => (
            segment(selector::CODE32, 0, u32::MAX, 0xc09b),
            segment(selector::DATA, 0, u32::MAX, 0xc093),
        ),
    };
    let stack = if real {
        segment(0, 0, 0xffff, 0x93)
    } else {
        data
    };
    let (cr0, cr3, cr4) = match mode {
        Mode::Real => (0x30, 0, 0x600),
        Mode::Protected => (0x31, 0, 0x600),
        Mode::Paged => (0x8001_0031, PD32, 0x610),
        Mode::Pae => (0x8001_0031, PDPT_PAE, 0x620),
        Mode::Long => (0x8001_0031, PML4, 0x620),
    };
    let (idt_base, idt_limit) = if real { (0, 0x3ff) } else { (IDT, 0xfff) };
    VcpuState {
        rip: mode.entry(),
        rsp: STACK,
        rflags: 2,
        cs: code,
        ss: stack,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ldt: segment(0, 0, 0xffff, 0x82),
        tr: segment(selector::TSS, TSS, 0x67, 0x8b),
        gdt: segment(0, GDT, 0x5f, 0),
        idt: segment(0, idt_base, idt_limit, 0),
        cr0,
        cr3,
        cr4,
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        ..VcpuState::default()
    }
}

/// Writes what the mode's registers point at. `ram` is guest-physical memory from 0.
pub fn write_tables(mode: Mode, ram: &Ram) {
    write_stubs(mode, ram);
    if mode == Mode::Real {
        for vector in 0..=255_u64 {
            let segment = (STUBS >> 4) as u16;
            ram.write_u16(vector * 4, (vector * 16) as u16);
            ram.write_u16(vector * 4 + 2, segment);
        }
        return;
    }
    write_gdt(ram);
    write_idt(mode, ram);
    match mode {
        Mode::Paged => write_tables_32(ram),
        Mode::Pae | Mode::Long => write_tables_pae(ram),
        Mode::Real | Mode::Protected => {}
    }
}

/// HLT for exceptions; for interrupts, the vector to a port and a return.
fn write_stubs(mode: Mode, ram: &Ram) {
    for vector in 0..=255_u8 {
        let at = STUBS + u64::from(vector) * 16;
        if vector < FIRST_RETURNING {
            ram.write(at, &[0xf4, 0xeb, 0xfd]); // hlt; jmp back
            continue;
        }
        // push ax; mov al, vector; out port, al; pop ax; iret
        let port = VECTOR_PORT as u8;
        ram.write(at, &[0x50, 0xb0, vector, 0xe6, port, 0x58]);
        let back: &[u8] = if mode == Mode::Long {
            &[0x48, 0xcf]
        } else {
            &[0xcf]
        };
        ram.write(at + 6, back);
    }
}

fn write_gdt(ram: &Ram) {
    let descriptors: [u64; 12] = [
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_9b00_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        // The TSS: base b000h, limit 67h, available; its upper half in long mode.
        0x0000_8900_b000_0067,
        0,
        0x000f_9b00_0000_ffff,
        0x000f_9300_0000_ffff,
        0,
    ];
    for (index, descriptor) in (0u64..).zip(descriptors) {
        ram.write_u64(GDT + index * 8, descriptor);
    }
    // ESP0 and SS0 of a 32-bit TSS, RSP0 of a 64-bit one. Both start at 4.
    ram.write_u64(TSS + 4, RING0_STACK);
    ram.write_u64(TSS + 8, u64::from(selector::DATA));
}

fn write_idt(mode: Mode, ram: &Ram) {
    for vector in 0..=255_u64 {
        let target = STUBS + vector * 16;
        if mode == Mode::Long {
            let gate = target | u64::from(selector::CODE64) << 16 | 0xee00 << 32;
            ram.write_u64(IDT + vector * 16, gate);
            ram.write_u64(IDT + vector * 16 + 8, 0);
        } else {
            let gate = target | u64::from(selector::CODE32) << 16 | 0xee00 << 32;
            ram.write_u64(IDT + vector * 8, gate);
        }
    }
    if mode == Mode::Long {
        // RSP0.
        ram.write_u64(TSS + 4, RING0_STACK);
    }
}

/// Present, writable, user.
const TABLE: u64 = 7;
/// The same, accessed, dirty, a large page.
const LARGE: u64 = 0xe7;
/// The same in 4 KB.
const SMALL: u64 = 0x67;

fn write_tables_32(ram: &Ram) {
    ram.write_u32(PD32, (PT32 | TABLE) as u32);
    for index in 0..1024_u64 {
        ram.write_u32(PT32 + index * 4, ((index << 12) | SMALL) as u32);
        if index != 0 {
            ram.write_u32(PD32 + index * 4, ((index << 22) | LARGE) as u32);
        }
    }
}

/// One gigabyte, its first 2 MB in small pages.
fn write_tables_pae(ram: &Ram) {
    ram.write_u64(PML4, PDPT | TABLE);
    ram.write_u64(PDPT, PD | TABLE);
    ram.write_u64(PDPT_PAE, PD | 1);
    ram.write_u64(PD, PT | TABLE);
    for index in 0..512_u64 {
        ram.write_u64(PT + index * 8, (index << 12) | SMALL);
        if index != 0 {
            ram.write_u64(PD + index * 8, (index << 21) | LARGE);
        }
    }
}
