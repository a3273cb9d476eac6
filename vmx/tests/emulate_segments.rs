//! Loading segment registers, far branches, the flags POPF and IRET may change,
//! and the descriptor-table instructions: what a user program cannot compare with
//! the processor. Descriptors in RAM and in ROM, operands in RAM and in MMIO.

mod emulate_machine;

use emulate_machine::{Fake, Kind};
use haxm_vmx::emulate::{Blocking, Exception, Gpr, Mode, Seg, SegmentState, Step, Table, decode};

const GDT: u64 = 0x4000;
const PAGE: u64 = 0x5000;
const STACK: u64 = 0x6800;
const GP: Step = Step::Fault(Exception::PROTECTION);
const UD: Step = Step::Fault(Exception::INVALID_OPCODE);

/// The GDT of the tests, by index.
const DESCRIPTORS: &[u64] = &[
    0,
    // 08h, 10h: flat code and data, accessed.
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    // 18h, 20h: data at 12345678h, limit 1ffffh, not accessed; the same at DPL 3.
    0x1241_9234_5678_ffff,
    0x1241_f234_5678_ffff,
    // 28h: data, not present. 30h: execute-only code. 38h: a call gate.
    0x00cf_1300_0000_ffff,
    0x00cf_9900_0000_ffff,
    0x0000_8c00_0008_0000,
    // 40h: readable conforming code at DPL 0. 48h: 64-bit code, not accessed.
    0x00cf_9f00_0000_ffff,
    0x00af_9a00_0000_ffff,
    // 50h: read-only data. 58h: 16-bit code of 100h bytes. 60h: code at DPL 3.
    0x00cf_9100_0000_ffff,
    0x0000_9b00_0000_00ff,
    0x00cf_fb00_0000_ffff,
];

fn fault(vector: u8, selector: u32) -> Step {
    Step::Fault(Exception::with_code(vector, selector))
}

fn machine(mode: Mode) -> Fake {
    let mut fake = Fake::new(mode);
    fake.map(GDT, Kind::Ram);
    fake.map(PAGE, Kind::Mmio);
    fake.map(STACK, Kind::Ram);
    for (index, descriptor) in (0u64..).zip(DESCRIPTORS) {
        fake.poke(GDT + index * 8, &descriptor.to_le_bytes());
    }
    fake.tables[Table::Gdt as usize] = SegmentState {
        base: GDT,
        limit: DESCRIPTORS.len() as u32 * 8 - 1,
        ..SegmentState::default()
    };
    fake.segments[Seg::Cs.number()].selector = 8;
    fake.segments[Seg::Ss.number()].selector = 0x10;
    for reg in [Gpr::Rbx, Gpr::Rsi] {
        fake.gpr[reg.number()] = PAGE;
    }
    fake.gpr[Gpr::Rsp.number()] = STACK;
    fake
}

fn run(fake: &mut Fake, mode: Mode, code: &[u8]) -> Step {
    fake.run(&decode(code, mode).expect("an emulated instruction"))
        .0
}

/// mov SREG, [rbx]: the same bytes in 32- and 64-bit code.
fn load(fake: &mut Fake, mode: Mode, seg: Seg, selector: u16) -> Step {
    fake.poke(PAGE, &selector.to_le_bytes());
    fake.blocking = None;
    run(fake, mode, &[0x8e, 0x03 | (seg as u8) << 3])
}

const DATA_SEGMENTS: [Seg; 4] = [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs];

#[test]
fn a_data_segment_gets_what_its_descriptor_says() {
    for mode in [Mode::Bits32, Mode::Bits64] {
        for seg in DATA_SEGMENTS {
            let mut fake = machine(mode);
            // Limits count only outside 64-bit mode; leave DS flat for the operand.
            assert_eq!(load(&mut fake, mode, seg, 0x18), Step::Done);
            let wanted = SegmentState {
                selector: 0x18,
                base: 0x1234_5678,
                limit: 0x1_ffff,
                access: 0x4093,
            };
            assert_eq!(fake.segment_of(seg), wanted);
            assert_eq!(fake.peek(GDT + 0x1d, 1), [0x93], "accessed");
            assert_eq!(fake.atomics, 1, "set by a locked update");
            assert_eq!(fake.blocking, None);
            // Accessed already: nothing to write.
            let mut fake = machine(mode);
            assert_eq!(load(&mut fake, mode, seg, 0x10), Step::Done);
            assert_eq!(fake.segment_of(seg).access, 0xc093);
            assert_eq!(fake.segment_of(seg).limit, u32::MAX);
            assert_eq!(fake.atomics, 0);
        }
    }
}

/// The reason these instructions are here: firmware whose GDT lies in ROM.
#[test]
fn a_descriptor_in_rom_keeps_its_accessed_bit() {
    let mut fake = machine(Mode::Bits32);
    fake.set_kind(GDT, Kind::Rom);
    let code = decode(&[0x8e, 0xd8], Mode::Bits32).expect("mov ds, eax");
    fake.gpr[0] = 0x18;
    assert_eq!(fake.run(&code), (Step::Done, Vec::new()));
    assert_eq!(fake.segment_of(Seg::Ds).base, 0x1234_5678);
    assert_eq!(fake.peek(GDT + 0x1d, 1), [0x92]);
    // jmp 48h:1234h
    let jump = decode(&[0xea, 0x34, 0x12, 0, 0, 0x48, 0], Mode::Bits32).expect("far jump");
    fake.long_mode = true;
    assert_eq!(fake.run(&jump), (Step::Done, Vec::new()));
    assert_eq!(fake.segment_of(Seg::Cs).access, 0xa09b);
    assert_eq!(
        (fake.rip, fake.segment_of(Seg::Cs).selector),
        (0x1234, 0x48)
    );
    // A table in device memory is not supported.
    let mut fake = machine(Mode::Bits32);
    fake.set_kind(GDT, Kind::Mmio);
    fake.gpr[0] = 0x18;
    assert_eq!(fake.run(&code).0, Step::Unsupported);
}

#[test]
fn what_may_not_be_loaded_faults_and_changes_nothing() {
    const BITS: Mode = Mode::Bits32;
    // CPL, register, selector, outcome.
    let rows: &[(u8, Seg, u16, Step)] = &[
        (0, Seg::Ds, 0x68, fault(13, 0x68)),
        (0, Seg::Ds, 0x1c, fault(13, 0x1c)),
        (0, Seg::Ds, 0x28, fault(11, 0x28)),
        (0, Seg::Ds, 0x30, fault(13, 0x30)),
        (0, Seg::Ds, 0x38, fault(13, 0x38)),
        (0, Seg::Ds, 0x08, Step::Done),
        (0, Seg::Ds, 0x50, Step::Done),
        (0, Seg::Ds, 0x13, fault(13, 0x10)),
        (3, Seg::Ds, 0x13, fault(13, 0x10)),
        (3, Seg::Ds, 0x23, Step::Done),
        (3, Seg::Ds, 0x20, Step::Done),
        (3, Seg::Ds, 0x43, Step::Done),
        (3, Seg::Ds, 0x0b, fault(13, 0x08)),
        (0, Seg::Es, 0, Step::Done),
        (3, Seg::Fs, 3, Step::Done),
        (0, Seg::Ss, 0x10, Step::Done),
        (0, Seg::Ss, 0x11, fault(13, 0x10)),
        (0, Seg::Ss, 0x20, fault(13, 0x20)),
        (0, Seg::Ss, 0x50, fault(13, 0x50)),
        (0, Seg::Ss, 0x08, fault(13, 0x08)),
        (0, Seg::Ss, 0x28, fault(12, 0x28)),
        (0, Seg::Ss, 0, GP),
        (3, Seg::Ss, 0x23, Step::Done),
    ];
    for (cpl, seg, selector, wanted) in rows {
        let mut fake = machine(BITS);
        fake.cpl = *cpl;
        let before = fake.segments;
        let step = load(&mut fake, BITS, *seg, *selector);
        assert_eq!(step, *wanted, "{seg:?} {selector:#x} at CPL {cpl}");
        if step == Step::Done {
            assert_eq!(fake.segment_of(*seg).selector, *selector);
            let shadow = (*seg == Seg::Ss).then_some(Blocking::MovSs);
            assert_eq!(fake.blocking, shadow);
        } else {
            assert_eq!(fake.segments, before);
            assert_eq!(fake.blocking, None);
        }
    }
    // A null selector leaves the register unusable.
    let mut fake = machine(BITS);
    assert_eq!(load(&mut fake, BITS, Seg::Es, 0), Step::Done);
    assert_ne!(fake.segment_of(Seg::Es).access & 1 << 16, 0);
    // SS takes one in 64-bit mode below CPL 3.
    for (cpl, selector, wanted) in [
        (0, 0, Step::Done),
        (0, 1, GP),
        (3, 3, GP),
        (1, 1, Step::Done),
    ] {
        let mut fake = machine(Mode::Bits64);
        fake.cpl = cpl;
        assert_eq!(load(&mut fake, Mode::Bits64, Seg::Ss, selector), wanted);
    }
    // No LDT.
    let mut fake = machine(BITS);
    fake.tables[Table::Ldt as usize].access = 1 << 16;
    assert_eq!(load(&mut fake, BITS, Seg::Ds, 0x0c), fault(13, 0x0c));
    fake.tables[Table::Ldt as usize] = fake.tables[Table::Gdt as usize];
    assert_eq!(load(&mut fake, BITS, Seg::Ds, 0x14), Step::Done);
}

#[test]
fn real_mode_changes_only_the_base() {
    const BITS: Mode = Mode::Bits16;
    for (cr0, rflags) in [(0x30, 2), (0x31, 0x3_3002)] {
        let mut fake = machine(BITS);
        (fake.cr0, fake.rflags) = (cr0, rflags);
        fake.gpr[Gpr::Rbx.number()] = PAGE;
        fake.poke(PAGE, &[0x34, 0x12]);
        let old = fake.segment_of(Seg::Es);
        // mov es, [bx]
        assert_eq!(run(&mut fake, BITS, &[0x8e, 0x07]), Step::Done);
        let wanted = SegmentState {
            selector: 0x1234,
            base: 0x1_2340,
            ..old
        };
        assert_eq!(fake.segment_of(Seg::Es), wanted);
        // lds cx, [bx]; the offset, then the selector
        fake.poke(PAGE, &[0x78, 0x56, 0x00, 0x20]);
        assert_eq!(run(&mut fake, BITS, &[0xc5, 0x0f]), Step::Done);
        assert_eq!(fake.gpr[Gpr::Rcx.number()], 0x5678);
        assert_eq!(fake.segment_of(Seg::Ds).base, 0x2_0000);
        // jmp far 2000:0010
        assert_eq!(run(&mut fake, BITS, &[0xea, 0x10, 0, 0, 0x20]), Step::Done);
        assert_eq!((fake.rip, fake.segment_of(Seg::Cs).base), (0x10, 0x2_0000));
        // Beyond the limit.
        fake.segments[Seg::Cs.number()].limit = 0xff;
        assert_eq!(run(&mut fake, BITS, &[0xea, 0, 1, 0, 0x20]), GP);
    }
}

#[test]
fn pop_of_a_segment_keeps_the_stack_pointer_if_it_faults() {
    const BITS: Mode = Mode::Bits32;
    // pop ds
    let mut fake = machine(BITS);
    fake.poke(STACK, &0x18u32.to_le_bytes());
    assert_eq!(run(&mut fake, BITS, &[0x1f]), Step::Done);
    assert_eq!(fake.gpr[Gpr::Rsp.number()], STACK + 4);
    fake.poke(STACK + 4, &0x68u32.to_le_bytes());
    assert_eq!(run(&mut fake, BITS, &[0x1f]), fault(13, 0x68));
    assert_eq!(fake.gpr[Gpr::Rsp.number()], STACK + 4);
    // pop ss has the shadow, lss not.
    let mut fake = machine(BITS);
    fake.poke(STACK, &0x10u32.to_le_bytes());
    assert_eq!(run(&mut fake, BITS, &[0x17]), Step::Done);
    assert_eq!(fake.blocking, Some(Blocking::MovSs));
    let mut fake = machine(BITS);
    fake.poke(PAGE, &[0, 0x70, 0, 0, 0x10, 0]);
    assert_eq!(run(&mut fake, BITS, &[0x0f, 0xb2, 0x23]), Step::Done);
    assert_eq!(fake.gpr[Gpr::Rsp.number()], 0x7000);
    assert_eq!(fake.blocking, None);
}

#[test]
fn a_push_of_a_segment_writes_two_bytes() {
    const BITS: Mode = Mode::Bits32;
    let mut fake = machine(BITS);
    fake.poke(STACK - 4, &[0xaa; 4]);
    assert_eq!(run(&mut fake, BITS, &[0x16]), Step::Done);
    assert_eq!(fake.peek(STACK - 4, 4), [0x10, 0, 0xaa, 0xaa]);
    assert_eq!(fake.gpr[Gpr::Rsp.number()], STACK - 4);
}

#[test]
fn far_branches() {
    const BITS: Mode = Mode::Bits32;
    // CPL, selector, target, outcome.
    let rows: &[(u8, u16, u32, Step)] = &[
        (0, 0x08, 0x1234, Step::Done),
        (0, 0x0b, 0x1234, fault(13, 0x08)),
        (0, 0x40, 0x1234, Step::Done),
        (3, 0x43, 0x1234, Step::Done),
        (3, 0x0b, 0x1234, fault(13, 0x08)),
        (3, 0x63, 0x1234, Step::Done),
        (0, 0x60, 0x1234, fault(13, 0x60)),
        (0, 0, 0, GP),
        (0, 0x10, 0, fault(13, 0x10)),
        (0, 0x58, 0xff, Step::Done),
        (0, 0x58, 0x100, GP),
        (0, 0x38, 0, Step::Unsupported),
        (0, 0x70, 0, fault(13, 0x70)),
    ];
    for (cpl, selector, target, wanted) in rows {
        // jmp far [rbx], call far [rbx], from device memory.
        for code in [[0xff, 0x2b], [0xff, 0x1b]] {
            let call = code[1] == 0x1b;
            let mut fake = machine(BITS);
            fake.cpl = *cpl;
            fake.poke(PAGE, &target.to_le_bytes());
            fake.poke(PAGE + 4, &selector.to_le_bytes());
            let before = fake.segments;
            let step = run(&mut fake, BITS, &code);
            assert_eq!(step, *wanted, "{selector:#x} at CPL {cpl}");
            if step != Step::Done {
                assert_eq!((fake.segments, fake.rip), (before, 0x1000));
                assert_eq!(fake.gpr[Gpr::Rsp.number()], STACK);
                continue;
            }
            assert_eq!(fake.rip, u64::from(*target));
            let cs = fake.segment_of(Seg::Cs).selector;
            assert_eq!(cs, selector & !3 | u16::from(*cpl));
            if call {
                assert_eq!(fake.gpr[Gpr::Rsp.number()], STACK - 8);
                assert_eq!(fake.peek64(STACK - 8), 8 << 32 | 0x1002);
            }
        }
    }
}

#[test]
fn far_returns_stay_at_the_privilege_level() {
    const BITS: Mode = Mode::Bits32;
    // CPL, selector, outcome.
    let rows: &[(u8, u16, Step)] = &[
        (0, 0x08, Step::Done),
        (0, 0x40, Step::Done),
        // To an outer level.
        (0, 0x63, Step::Unsupported),
        // To an inner one.
        (3, 0x08, fault(13, 0x08)),
        (3, 0x63, Step::Done),
        (0, 0x38, fault(13, 0x38)),
        (0, 0, GP),
    ];
    for (cpl, selector, wanted) in rows {
        // retf; retf 8; iret
        for (code, popped) in [(&[0xcb][..], 8), (&[0xca, 8, 0], 16), (&[0xcf], 12)] {
            let mut fake = machine(BITS);
            fake.cpl = *cpl;
            fake.poke(STACK, &0x2345u32.to_le_bytes());
            fake.poke(STACK + 4, &u32::from(*selector).to_le_bytes());
            fake.poke(STACK + 8, &0x8d7u32.to_le_bytes());
            let step = run(&mut fake, BITS, code);
            assert_eq!(step, *wanted, "{code:02x?} {selector:#x} at CPL {cpl}");
            let sp = fake.gpr[Gpr::Rsp.number()];
            if step == Step::Done {
                assert_eq!((fake.rip, sp), (0x2345, STACK + popped));
                let iret = code[0] == 0xcf;
                assert_eq!(fake.rflags, if iret { 0x8d7 } else { 2 });
                assert_eq!(fake.blocking, iret.then_some(Blocking::NmiEnds));
            } else {
                assert_eq!((fake.rip, sp, fake.rflags), (0x1000, STACK, 2));
            }
        }
    }
    // retfq in 64-bit code.
    let mut fake = machine(Mode::Bits64);
    fake.poke(STACK, &0x1_2345_6789u64.to_le_bytes());
    fake.poke(STACK + 8, &0x48u64.to_le_bytes());
    assert_eq!(run(&mut fake, Mode::Bits64, &[0x48, 0xcb]), Step::Done);
    assert_eq!(fake.rip, 0x1_2345_6789);
    assert_eq!(fake.gpr[Gpr::Rsp.number()], STACK + 16);
    // iretq in 64-bit code: five elements, the stack among them.
    let mut fake = machine(Mode::Bits64);
    for (at, value) in (0u64..).zip([0x2345u64, 0x48, 0x8d7, 0x1_2345_6789, 0x10]) {
        fake.poke(STACK + at * 8, &value.to_le_bytes());
    }
    assert_eq!(run(&mut fake, Mode::Bits64, &[0x48, 0xcf]), Step::Done);
    assert_eq!((fake.rip, fake.rflags), (0x2345, 0x8d7));
    assert_eq!(fake.gpr[Gpr::Rsp.number()], 0x1_2345_6789);
    assert_eq!(fake.segment_of(Seg::Ss).selector, 0x10);
    assert_eq!(fake.segment_of(Seg::Cs).access, 0xa09b);
    // An SS that may not be loaded; a nested task.
    let mut fake = machine(Mode::Bits64);
    for (at, value) in (0u64..).zip([0x2345u64, 0x48, 0x8d7, 0x6000, 0x50]) {
        fake.poke(STACK + at * 8, &value.to_le_bytes());
    }
    assert_eq!(run(&mut fake, Mode::Bits64, &[0x48, 0xcf]), fault(13, 0x50));
    assert_eq!((fake.rip, fake.gpr[Gpr::Rsp.number()]), (0x1000, STACK));
    fake.rflags |= 1 << 14;
    assert_eq!(run(&mut fake, Mode::Bits64, &[0x48, 0xcf]), GP);
    let mut fake = machine(Mode::Bits64);
    fake.poke(STACK, &0x1_2345_6789u64.to_le_bytes());
    fake.poke(STACK + 8, &0x48u64.to_le_bytes());
    assert_eq!(run(&mut fake, Mode::Bits64, &[0x48, 0xcb]), Step::Done);
    // Not canonical.
    fake.poke(STACK + 16, &0x8000_0000_0000u64.to_le_bytes());
    fake.poke(STACK + 24, &0x48u64.to_le_bytes());
    assert_eq!(run(&mut fake, Mode::Bits64, &[0x48, 0xcb]), GP);
}

/// POPF and IRET at each CPL and IOPL, from all flags clear and all set.
#[test]
fn flags_that_may_be_loaded() {
    const IOPL: u64 = 0x3000;
    const IF: u64 = 0x200;
    const ALL: u64 = 0x24_7fd5;
    const RF: u64 = 1 << 16;
    const VIRTUAL: u64 = 0x18_0000;
    for cpl in [0u8, 1, 3] {
        for iopl in [0u64, 1, 3] {
            for set in [false, true] {
                let mut fake = machine(Mode::Bits32);
                fake.cpl = cpl;
                let others = if set {
                    ALL & !IOPL & !0x4100 | VIRTUAL
                } else {
                    0
                };
                fake.rflags = 2 | iopl << 12 | others;
                let before = fake.rflags;
                let image: u64 = if set { 0 } else { ALL | RF | VIRTUAL };
                fake.poke(STACK, &image.to_le_bytes());
                // popfd
                assert_eq!(run(&mut fake, Mode::Bits32, &[0x9d]), Step::Done);
                let mut writable = ALL;
                if cpl != 0 {
                    writable &= !IOPL;
                }
                if u64::from(cpl) > iopl {
                    writable &= !IF;
                }
                let wanted = before & !writable | image & writable;
                assert_eq!(fake.rflags, wanted, "CPL {cpl} IOPL {iopl} {set}");
                // popf of two bytes leaves the rest.
                fake.rflags = before;
                fake.rip = 0x1000;
                fake.gpr[Gpr::Rsp.number()] = STACK;
                assert_eq!(run(&mut fake, Mode::Bits32, &[0x66, 0x9d]), Step::Done);
                let writable = writable & 0xffff;
                assert_eq!(fake.rflags, before & !writable | image & writable);
                assert_eq!(fake.gpr[Gpr::Rsp.number()], STACK + 2);
            }
        }
    }
    // IRET loads RF, and leaves it loaded.
    let mut fake = machine(Mode::Bits32);
    fake.poke(STACK, &(8u64 << 32 | 0x2000).to_le_bytes());
    fake.poke(STACK + 8, &0x1_0002u32.to_le_bytes());
    assert_eq!(run(&mut fake, Mode::Bits32, &[0xcf]), Step::Done);
    assert_eq!(fake.rflags, 0x1_0002);
    // Virtual-8086 mode needs IOPL 3, with CR4.VME it is not emulated; nor are
    // task returns and returns to virtual-8086 mode.
    for code in [&[0x9d][..], &[0xcf], &[0x9c]] {
        let mut fake = machine(Mode::Bits16);
        fake.rflags = 0x2_0002;
        assert_eq!(run(&mut fake, Mode::Bits16, code), GP);
        fake.cr4 |= 1;
        assert_eq!(run(&mut fake, Mode::Bits16, code), Step::Unsupported);
    }
    let mut fake = machine(Mode::Bits32);
    fake.rflags |= 1 << 14;
    assert_eq!(run(&mut fake, Mode::Bits32, &[0xcf]), Step::Unsupported);
    let mut fake = machine(Mode::Bits32);
    fake.poke(STACK, &(8u64 << 32).to_le_bytes());
    fake.poke(STACK + 8, &0x2_0002u32.to_le_bytes());
    assert_eq!(run(&mut fake, Mode::Bits32, &[0xcf]), Step::Unsupported);
}

#[test]
fn descriptor_tables() {
    let table = |base, limit| SegmentState {
        base,
        limit,
        ..SegmentState::default()
    };
    // sgdt [rbx], sidt [rbx]
    for (code, name) in [
        ([0x0f, 0x01, 0x03], Table::Gdt),
        ([0x0f, 0x01, 0x0b], Table::Idt),
    ] {
        for mode in [Mode::Bits32, Mode::Bits64] {
            let mut fake = machine(mode);
            fake.tables[name as usize] = table(0x1122_3344_5566_7788, 0xabcd);
            fake.poke(PAGE, &[0xee; 16]);
            assert_eq!(run(&mut fake, mode, &code), Step::Done);
            let mut wanted = [0xee; 16];
            let bytes = [0xcd, 0xab, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
            let len = if mode == Mode::Bits64 { 10 } else { 6 };
            wanted[..len].copy_from_slice(&bytes[..len]);
            assert_eq!(fake.peek(PAGE, 16), wanted);
            // UMIP.
            fake.cr4 |= 1 << 11;
            assert_eq!(run(&mut fake, mode, &code), Step::Done);
            fake.cpl = 3;
            assert_eq!(run(&mut fake, mode, &code), GP);
        }
    }
    // lgdt [rbx], lidt [rbx], and with 66 a base of 24 bits
    for (code, name) in [(0x13, Table::Gdt), (0x1b, Table::Idt)] {
        let image = [0xcd, 0xab, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11];
        for (mode, prefix, base) in [
            (Mode::Bits32, None, 0x5566_7788),
            (Mode::Bits32, Some(0x66), 0x66_7788),
            (Mode::Bits64, None, 0x3344_5566_7788),
        ] {
            let mut image = image;
            if mode == Mode::Bits64 {
                image[8..].copy_from_slice(&[0, 0]);
            }
            let bytes: Vec<u8> = prefix.into_iter().chain([0x0f, 0x01, code]).collect();
            let mut fake = machine(mode);
            fake.poke(PAGE, &image);
            assert_eq!(run(&mut fake, mode, &bytes), Step::Done);
            assert_eq!(fake.tables[name as usize], table(base, 0xabcd));
            fake.cpl = 3;
            assert_eq!(run(&mut fake, mode, &bytes), GP);
        }
        let mut fake = machine(Mode::Bits64);
        fake.poke(PAGE, &image);
        assert_eq!(
            run(&mut fake, Mode::Bits64, &[0x0f, 0x01, code]),
            GP,
            "canonical"
        );
    }
    // sldt, str, smsw [rbx]: two bytes, whatever the operand size.
    for (code, wanted) in [
        ([0x0f, 0x00, 0x03], 0x1111),
        ([0x0f, 0x00, 0x0b], 0x2222),
        ([0x0f, 0x01, 0x23], 0x31u16),
    ] {
        let mut fake = machine(Mode::Bits32);
        fake.tables[Table::Ldt as usize].selector = 0x1111;
        fake.tables[Table::Task as usize].selector = 0x2222;
        fake.poke(PAGE, &[0xee; 4]);
        assert_eq!(run(&mut fake, Mode::Bits32, &code), Step::Done);
        let [low, high] = wanted.to_le_bytes();
        assert_eq!(fake.peek(PAGE, 4), [low, high, 0xee, 0xee]);
        fake.cr0 &= !1;
        let real = if code[1] == 0 { UD } else { Step::Done };
        assert_eq!(run(&mut fake, Mode::Bits32, &code), real);
    }
}
