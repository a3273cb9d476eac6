//! The instructions that look at descriptors (LAR, LSL, VERR, VERW) and that load LDTR, TR and the machine status word:
//! all but the first four are the kernel's alone, so there is no processor to compare with. The operand is in MMIO.

mod emulate_machine;

use emulate_machine::{Fake, Kind, STATUS};
use haxm_vmx::emulate::{Exception, Gpr, Mode, SegmentState, Step, Table, decode};

const GDT: u64 = 0x4000;
const PAGE: u64 = 0x5000;
const ZF: u64 = 0x40;
const GP: Step = Step::Fault(Exception::PROTECTION);
const UD: Step = Step::Fault(Exception::INVALID_OPCODE);

const LAR: &[u8] = &[0x0f, 0x02, 0x03];
const LSL: &[u8] = &[0x0f, 0x03, 0x03];
const LLDT: &[u8] = &[0x0f, 0x00, 0x13];
const LTR: &[u8] = &[0x0f, 0x00, 0x1b];
const VERR: &[u8] = &[0x0f, 0x00, 0x23];
const VERW: &[u8] = &[0x0f, 0x00, 0x2b];
const LMSW: &[u8] = &[0x0f, 0x01, 0x33];

/// A descriptor of 1234h bytes at 55667788h with these type, S, DPL and P bits.
const fn descriptor(rights: u64) -> u64 {
    0x5500_0066_7788_1234 | rights << 40
}

fn fault(vector: u8, selector: u32) -> Step {
    Step::Fault(Exception::with_code(vector, selector))
}

/// GDT entry 1 is `low`, entry 2 `high`; the table ends there.
fn machine(mode: Mode, low: u64, high: u64) -> Fake {
    let mut fake = Fake::new(mode);
    fake.map(GDT, Kind::Ram);
    fake.map(PAGE, Kind::Mmio);
    fake.poke(GDT + 8, &low.to_le_bytes());
    fake.poke(GDT + 16, &high.to_le_bytes());
    fake.tables[Table::Gdt as usize] = SegmentState {
        base: GDT,
        limit: 0x17,
        ..SegmentState::default()
    };
    fake.gpr[Gpr::Rbx.number()] = PAGE;
    fake.gpr[Gpr::Rax.number()] = u64::MAX;
    fake
}

/// Runs `code` with `selector` in device memory at [rbx].
fn run(fake: &mut Fake, mode: Mode, code: &[u8], selector: u16) -> Step {
    fake.poke(PAGE, &selector.to_le_bytes());
    let insn = decode(code, mode).expect("an emulated instruction");
    let (step, asked) = fake.run(&insn);
    let reads = [Step::Read { gpa: PAGE, size: 2 }];
    assert!(asked == reads || step == UD || step == GP, "{asked:?}");
    step
}

/// What the four say of a descriptor with these rights, by bits: LAR 8, LSL 4, VERR 2, VERW 1.
fn verdict(rights: u64, selector: u16, cpl: u8, long_mode: bool) -> u8 {
    let mut all = 0;
    for (bit, code) in [(8, LAR), (4, LSL), (2, VERR), (1, VERW)] {
        for flags in [0, STATUS] {
            let mut fake = machine(Mode::Bits32, descriptor(rights), 0);
            (fake.cpl, fake.long_mode) = (cpl, long_mode);
            fake.rflags |= flags;
            assert_eq!(run(&mut fake, Mode::Bits32, code, selector), Step::Done);
            let found = fake.rflags & ZF != 0;
            assert_eq!(fake.rflags & !ZF, 2 | flags & !ZF, "only ZF changes");
            let wanted = match bit {
                8 if found => 0xff00 & rights << 8,
                4 if found => 0x1234,
                _ => u64::MAX,
            };
            assert_eq!(
                fake.gpr[Gpr::Rax.number()],
                wanted,
                "{code:02x?} {rights:#x}"
            );
            assert_eq!(fake.atomics, 0, "no accessed bit is set");
            if flags == 0 {
                all |= if found { bit } else { 0 };
            } else {
                assert_eq!(found, all & bit != 0);
            }
        }
    }
    all
}

/// SDM 2A "LAR" and "LSL", 2B "VERR/VERW", at CPL 0.
#[test]
fn types_that_may_be_looked_at() {
    // Type of a system segment: outcome in protected mode, and in compatibility mode.
    let system: [(u8, u8); 16] = [
        (0, 0),
        (0xc, 0),
        (0xc, 0xc),
        (0xc, 0),
        (8, 0),
        (8, 0),
        (0, 0),
        (0, 0),
        (0, 0),
        (0xc, 0xc),
        (0, 0),
        (0xc, 0xc),
        (8, 8),
        (0, 0),
        (0, 0),
        (0, 0),
    ];
    for (kind, (legacy, long)) in (0x80..).zip(system) {
        assert_eq!(verdict(kind, 8, 0, false), legacy, "{kind:#x}");
        assert_eq!(verdict(kind, 8, 0, true), long, "{kind:#x}");
    }
    // Data: read-only, writable, both also expand-down; code: execute-only, readable, both also conforming.
    let ordinary = [0xe, 0xf, 0xe, 0xf, 0xc, 0xe, 0xc, 0xe];
    for (kind, wanted) in (0u64..).zip(ordinary) {
        for long in [false, true] {
            for accessed in [0, 1] {
                let rights = 0x90 | kind << 1 | accessed;
                assert_eq!(verdict(rights, 8, 0, long), wanted, "{rights:#x}");
            }
        }
    }
    // Not present is no hindrance.
    assert_eq!(verdict(0x12, 8, 0, false), 0xf);
}

#[test]
fn privilege_levels_decide() {
    // Rights, selector, CPL.
    let rows = [
        // Writable data at DPL 0, then 2.
        (0x92, 8, 0, 0xf),
        (0x92, 9, 0, 0),
        (0x92, 8, 1, 0),
        (0xd2, 0xa, 2, 0xf),
        (0xd2, 0xb, 2, 0),
        (0xd2, 8, 3, 0),
        // Readable conforming code at DPL 0; a TSS at DPL 0 and 3.
        (0x9e, 0xb, 3, 0xe),
        (0x89, 0xb, 3, 0),
        (0xe9, 0xb, 3, 0xc),
    ];
    for (rights, selector, cpl, wanted) in rows {
        let found = verdict(rights, selector, cpl, false);
        assert_eq!(found, wanted, "{rights:#x} by {selector:#x} at {cpl}");
    }
    // No descriptor: null selectors, past the end of the table, no LDT.
    for selector in [0, 3, 0x18, 0xfff8, 0xc] {
        let found = verdict(0x92, selector, 0, false);
        // The test's machine has an LDT of one byte.
        assert_eq!(found, 0, "{selector:#x}");
    }
}

#[test]
fn limits_are_scaled_and_cut_to_the_operand() {
    // 16 bits: only the low half of EAX, of the rights and of a limit of 12345fffh.
    let raw = descriptor(0x92) & !0xffff | 0x0081_0000_0000_2345;
    for (code, wanted) in [
        (&[0x0f, 0x02, 0x03][..], 0x0081_9200),
        (&[0x66, 0x0f, 0x02, 0x03], 0xffff_ffff_ffff_9200),
        (&[0x0f, 0x03, 0x03], 0x1234_5fff),
        (&[0x66, 0x0f, 0x03, 0x03], 0xffff_ffff_ffff_5fff),
    ] {
        let mut fake = machine(Mode::Bits32, raw, 0);
        assert_eq!(run(&mut fake, Mode::Bits32, code, 8), Step::Done);
        assert_eq!(fake.gpr[Gpr::Rax.number()], wanted, "{code:02x?}");
    }
}

/// A page fault on the descriptor is a page fault.
#[test]
fn a_descriptor_that_is_not_there_faults() {
    let mut fake = machine(Mode::Bits32, 0, 0);
    fake.tables[Table::Gdt as usize].base = 0x9000;
    let step = run(&mut fake, Mode::Bits32, VERR, 8);
    assert!(
        matches!(step, Step::Fault(Exception { vector: 14, .. })),
        "{step:?}"
    );
}

#[test]
fn real_mode_knows_none_but_lmsw() {
    for code in [LAR, LSL, VERR, VERW, LLDT, LTR] {
        for (cr0, rflags) in [(0x30, 2), (0x31, 0x2_0002)] {
            let mut fake = machine(Mode::Bits32, descriptor(0x92), 0);
            (fake.cr0, fake.rflags) = (cr0, rflags);
            assert_eq!(run(&mut fake, Mode::Bits32, code, 8), UD, "{code:02x?}");
        }
    }
}

#[test]
fn a_local_descriptor_table() {
    let ldt = |fake: &Fake| fake.tables[Table::Ldt as usize];
    let mut fake = machine(Mode::Bits32, descriptor(0x82), 0);
    assert_eq!(run(&mut fake, Mode::Bits32, LLDT, 0xb), Step::Done);
    let wanted = SegmentState {
        selector: 0xb,
        base: 0x5566_7788,
        limit: 0x1234,
        access: 0x82,
    };
    assert_eq!(ldt(&fake), wanted);
    assert_eq!(fake.atomics, 0);
    // None.
    assert_eq!(run(&mut fake, Mode::Bits32, LLDT, 3), Step::Done);
    assert_eq!(ldt(&fake).access, 1 << 16);
    assert_eq!(ldt(&fake).selector, 3);
    // Rights, selector, CPL, outcome.
    let rows = [
        (0x02, 8, 0, fault(11, 8)),
        (0x89, 8, 0, fault(13, 8)),
        (0x92, 8, 0, fault(13, 8)),
        (0x82, 0xc, 0, fault(13, 0xc)),
        (0x82, 0x18, 0, fault(13, 0x18)),
        (0x82, 8, 1, GP),
    ];
    for (rights, selector, cpl, wanted) in rows {
        let mut fake = machine(Mode::Bits32, descriptor(rights), 0);
        fake.cpl = cpl;
        let before = fake.tables;
        let step = run(&mut fake, Mode::Bits32, LLDT, selector);
        assert_eq!(step, wanted, "{rights:#x}");
        assert_eq!(fake.tables, before);
    }
}

#[test]
fn a_task_register() {
    // Rights, selector, CPL, outcome, and in compatibility mode.
    let rows = [
        (0x89, 8, 0, Step::Done, Step::Done),
        (0x81, 8, 0, Step::Done, fault(13, 8)),
        (0x8b, 8, 0, fault(13, 8), fault(13, 8)),
        (0x83, 8, 0, fault(13, 8), fault(13, 8)),
        (0x82, 8, 0, fault(13, 8), fault(13, 8)),
        (0x99, 8, 0, fault(13, 8), fault(13, 8)),
        (0x09, 8, 0, fault(11, 8), fault(11, 8)),
        (0x89, 0xc, 0, fault(13, 0xc), fault(13, 0xc)),
        (0x89, 0, 0, GP, GP),
        (0x89, 8, 3, GP, GP),
    ];
    for (rights, selector, cpl, legacy, long) in rows {
        for (long_mode, wanted) in [(false, legacy), (true, long)] {
            let mut fake = machine(Mode::Bits32, descriptor(rights), 0);
            (fake.cpl, fake.long_mode) = (cpl, long_mode);
            let before = fake.tables;
            let step = run(&mut fake, Mode::Bits32, LTR, selector);
            assert_eq!(step, wanted, "{rights:#x}");
            let byte = fake.peek(GDT + 13, 1)[0];
            if step != Step::Done {
                assert_eq!((fake.tables, u64::from(byte)), (before, rights));
                continue;
            }
            // Busy, in the descriptor by a locked update and in the register.
            assert_eq!((u64::from(byte), fake.atomics), (rights | 2, 1));
            let task = fake.tables[Table::Task as usize];
            assert_eq!(u64::from(task.access), rights | 2);
            assert_eq!((task.selector, task.base), (8, 0x5566_7788));
        }
    }
    // Firmware whose GDT lies in ROM: the descriptor keeps what it has.
    let mut fake = machine(Mode::Bits32, descriptor(0x89), 0);
    fake.set_kind(GDT, Kind::Rom);
    fake.gpr[Gpr::Rax.number()] = 8;
    let insn = decode(&[0x0f, 0x00, 0xd8], Mode::Bits32).expect("ltr ax");
    assert_eq!(fake.run(&insn), (Step::Done, Vec::new()));
    assert_eq!(fake.tables[Table::Task as usize].access, 0x8b);
    assert_eq!(fake.peek(GDT + 13, 1), [0x89]);
}

/// In IA-32e mode a system descriptor has 16 bytes, all within the table, and the base must be canonical.
#[test]
fn system_descriptors_of_sixteen_bytes() {
    for (code, table, rights) in [(LLDT, Table::Ldt, 0x82), (LTR, Table::Task, 0x89)] {
        let mut fake = machine(Mode::Bits64, descriptor(rights), 0xffff_8001);
        assert_eq!(run(&mut fake, Mode::Bits64, code, 8), Step::Done);
        assert_eq!(fake.tables[table as usize].base, 0xffff_8001_5566_7788);
        let mut fake = machine(Mode::Bits64, descriptor(rights), 0x8001);
        assert_eq!(run(&mut fake, Mode::Bits64, code, 8), fault(13, 8));
        let mut fake = machine(Mode::Bits64, descriptor(rights), 0);
        fake.tables[Table::Gdt as usize].limit = 0x16;
        assert_eq!(run(&mut fake, Mode::Bits64, code, 8), fault(13, 8));
    }
}

/// LMSW sets PE but does not clear it, and leaves all but the four lowest bits.
#[test]
fn the_machine_status_word() {
    for (mode, cr0, status, wanted) in [
        (Mode::Bits16, 0x6000_0010u64, 0xfff1, 0x6000_0011),
        (Mode::Bits16, 0x10, 0xe, 0x1e),
        (Mode::Bits32, 0x8000_003f, 0, 0x8000_0031),
        (Mode::Bits64, 0x8000_0031, 0xa, 0x8000_003b),
    ] {
        let mut fake = machine(mode, 0, 0);
        fake.cr0 = cr0;
        let code: &[u8] = if mode == Mode::Bits16 {
            // lmsw [bx]
            &[0x0f, 0x01, 0x37]
        } else {
            LMSW
        };
        assert_eq!(run(&mut fake, mode, code, status), Step::Done);
        assert_eq!(fake.cr0, wanted);
        fake.cpl = 3;
        assert_eq!(run(&mut fake, mode, code, 0), GP);
        assert_eq!(fake.cr0, wanted);
    }
}
