//! The restart by replay: which requests an instruction makes, in which order
//! and in which pieces; that none is made for an instruction that faults; LOCK;
//! and what happens when the guest or the caller interferes.

mod emulate_machine;

use emulate_machine::{Fake, Kind, Rng};
use haxm_vmx::emulate::{Exception, Gpr, Insn, MmioLog, Mode, Step, decode, execute};

const PAGE: u64 = 0x5000;
const NEXT: u64 = 0x6000;

fn insn(code: &[u8]) -> Insn {
    decode(code, Mode::Bits64).expect("an emulated instruction")
}

/// Two pages of the kinds given, RSI in the first.
fn machine(first: Kind, second: Kind, rsi: u64) -> Fake {
    let mut fake = Fake::new(Mode::Bits64);
    for (address, kind) in [(PAGE, first), (NEXT, second)] {
        for (at, byte) in fake.map(address, kind).bytes.iter_mut().enumerate() {
            *byte = (at % 251) as u8;
        }
    }
    fake.gpr[Gpr::Rsi.number()] = rsi;
    fake.gpr[Gpr::Rdi.number()] = rsi;
    fake.gpr[Gpr::Rsp.number()] = NEXT + 0x800;
    fake
}

fn read(gpa: u64, size: u8) -> Step {
    Step::Read { gpa, size }
}

/// The request's place and size, whatever the value.
fn place(step: &Step) -> (char, u64, u8) {
    match *step {
        Step::Read { gpa, size } => ('r', gpa, size),
        Step::Write { gpa, size, .. } => ('w', gpa, size),
        _ => panic!("{step:?}"),
    }
}

#[test]
fn a_read_modify_write_is_one_read_and_one_write() {
    // lock add [rsi], eax
    let mut fake = machine(Kind::Mmio, Kind::Ram, PAGE + 16);
    fake.poke(PAGE + 16, &5u32.to_le_bytes());
    fake.gpr[0] = 7;
    let (step, asked) = fake.run(&insn(&[0xf0, 0x01, 0x06]));
    assert_eq!(step, Step::Done);
    let write = Step::Write {
        gpa: PAGE + 16,
        size: 4,
        value: 12,
    };
    assert_eq!(asked, [read(PAGE + 16, 4), write]);
    assert_eq!(fake.atomics, 0);
}

#[test]
fn accesses_are_cut_into_pieces_devices_know() {
    let r = |gpa, size| ('r', gpa, size);
    let w = |gpa, size| ('w', gpa, size);
    // The instruction, where it points, and the requests.
    type Row<'a> = (&'a [u8], u64, &'a [(char, u64, u8)]);
    let rows: &[Row<'_>] = &[
        // mov rax, [rsi]
        (&[0x48, 0x8b, 0x06], PAGE + 8, &[r(PAGE + 8, 8)]),
        // An access that is only misaligned stays whole.
        (&[0x48, 0x8b, 0x06], PAGE + 3, &[r(PAGE + 3, 8)]),
        (
            &[0x48, 0x8b, 0x06],
            NEXT - 3,
            &[r(NEXT - 3, 2), r(NEXT - 1, 1), r(NEXT, 4), r(NEXT + 4, 1)],
        ),
        // mov [rsi], eax
        (
            &[0x89, 0x06],
            NEXT - 1,
            &[w(NEXT - 1, 1), w(NEXT, 2), w(NEXT + 2, 1)],
        ),
        // movups xmm0, [rsi]
        (
            &[0x0f, 0x10, 0x06],
            PAGE + 8,
            &[r(PAGE + 8, 8), r(PAGE + 16, 8)],
        ),
        // vmovdqa [rsi], ymm0
        (
            &[0xc5, 0xfd, 0x7f, 0x06],
            PAGE + 32,
            &[
                w(PAGE + 32, 8),
                w(PAGE + 40, 8),
                w(PAGE + 48, 8),
                w(PAGE + 56, 8),
            ],
        ),
        // lock cmpxchg16b [rsi]
        (
            &[0xf0, 0x48, 0x0f, 0xc7, 0x0e],
            PAGE,
            &[r(PAGE, 8), r(PAGE + 8, 8), w(PAGE, 8), w(PAGE + 8, 8)],
        ),
        // movsq from one device page to itself, crossing into the other
        (
            &[0x48, 0xa5],
            NEXT - 4,
            &[r(NEXT - 4, 4), r(NEXT, 4), w(NEXT - 4, 4), w(NEXT, 4)],
        ),
    ];
    for (code, rsi, wanted) in rows {
        let mut fake = machine(Kind::Mmio, Kind::Mmio, *rsi);
        let (step, asked) = fake.run(&insn(code));
        assert_eq!(step, Step::Done, "{code:02x?}");
        let asked: Vec<_> = asked.iter().map(place).collect();
        assert_eq!(asked, *wanted, "{code:02x?} at {rsi:#x}");
    }
}

#[test]
fn the_longest_log_is_long_enough() {
    // popa and pusha with a stack in MMIO that crosses a page badly, in 32-bit
    // code, and a 32-byte vector with one byte in the second page.
    for (code, mode, offset) in [
        (&[0x61u8][..], Mode::Bits32, 15),
        (&[0x60], Mode::Bits32, 15),
        (&[0xc5, 0xfe, 0x6f, 0x06], Mode::Bits64, 1),
        (&[0xc5, 0xfe, 0x7f, 0x06], Mode::Bits64, 17),
    ] {
        let mut fake = machine(Kind::Mmio, Kind::Mmio, NEXT - offset);
        fake.segments = Fake::new(mode).segments;
        fake.gpr[Gpr::Rsp.number()] = NEXT - offset + if code == [0x60] { 32 } else { 0 };
        let insn = decode(code, mode).expect("emulated");
        let (step, asked) = fake.run(&insn);
        assert_eq!(step, Step::Done, "{code:02x?}");
        assert!(asked.len() >= 5 && asked.len() <= 16, "{}", asked.len());
    }
}

#[test]
fn half_ram_half_mmio() {
    // mov [rsi], rax across RAM and MMIO: the device first, RAM when it is done.
    for (kinds, device) in [
        ((Kind::Ram, Kind::Mmio), NEXT),
        ((Kind::Mmio, Kind::Ram), NEXT - 4),
    ] {
        let mut fake = machine(kinds.0, kinds.1, NEXT - 4);
        fake.gpr[0] = 0x8877_6655_4433_2211;
        let (step, asked) = fake.run(&insn(&[0x48, 0x89, 0x06]));
        assert_eq!(step, Step::Done);
        assert_eq!(
            asked.iter().map(place).collect::<Vec<_>>(),
            [('w', device, 4)]
        );
        assert_eq!(fake.peek64(NEXT - 4), 0x8877_6655_4433_2211);
    }
}

#[test]
fn rom_reads_are_direct_and_writes_are_requests() {
    // or byte [rsi], 0x80
    let mut fake = machine(Kind::Rom, Kind::Ram, PAGE + 1);
    let (step, asked) = fake.run(&insn(&[0x80, 0x0e, 0x80]));
    assert_eq!(step, Step::Done);
    assert_eq!(
        asked,
        [Step::Write {
            gpa: PAGE + 1,
            size: 1,
            value: 0x81
        }]
    );
}

#[test]
fn a_fault_comes_before_any_request() {
    let fault = |code, address| Step::Fault(Exception::page_fault(code, address));
    let unmapped = 0x9000;
    // movsb from MMIO to nowhere
    let mut fake = machine(Kind::Mmio, Kind::Ram, PAGE);
    fake.gpr[Gpr::Rdi.number()] = unmapped;
    assert_eq!(fake.run(&insn(&[0xa4])), (fault(2, unmapped), vec![]));
    // add [rsi], eax: MMIO, then a page that refuses writes
    let mut fake = machine(Kind::Mmio, Kind::ReadOnly, NEXT - 2);
    assert_eq!(fake.run(&insn(&[0x01, 0x06])), (fault(3, NEXT), vec![]));
    // mov [rsi], eax: MMIO, then nothing
    let mut fake = machine(Kind::Ram, Kind::Mmio, NEXT + 0xffe);
    let before = fake.pages[&(NEXT >> 12)].bytes.clone();
    assert_eq!(
        fake.run(&insn(&[0x89, 0x06])),
        (fault(2, NEXT + 0x1000), vec![])
    );
    assert!(fake.pages[&(NEXT >> 12)].bytes == before);
    // push qword [rsi]: MMIO, and a stack that is not there
    let mut fake = machine(Kind::Mmio, Kind::Ram, PAGE);
    fake.gpr[Gpr::Rsp.number()] = unmapped + 8;
    assert_eq!(fake.run(&insn(&[0xff, 0x36])), (fault(2, unmapped), vec![]));
    // call [rsi]: the same
    assert_eq!(fake.run(&insn(&[0xff, 0x16])), (fault(2, unmapped), vec![]));
    // pop qword [rsi]: stack in MMIO, destination not there
    let mut fake = machine(Kind::Mmio, Kind::Ram, unmapped);
    fake.gpr[Gpr::Rsp.number()] = PAGE;
    assert_eq!(fake.run(&insn(&[0x8f, 0x06])), (fault(2, unmapped), vec![]));
    // The same in user mode says so.
    fake.cpl = 3;
    assert_eq!(fake.run(&insn(&[0x8f, 0x06])), (fault(6, unmapped), vec![]));
}

#[test]
fn the_open_request_is_repeated_until_it_is_answered() {
    let mut fake = machine(Kind::Mmio, Kind::Ram, PAGE);
    let insn = insn(&[0x8b, 0x06]);
    let mut log = MmioLog::new();
    for _ in 0..3 {
        assert_eq!(execute(&insn, &mut fake, &mut log), read(PAGE, 4));
        assert!(log.is_waiting() && !log.is_empty());
    }
    log.answer(0xdead_beef_0000_0001);
    assert!(!log.is_waiting());
    // A second answer has nothing to answer.
    log.answer(99);
    assert_eq!(execute(&insn, &mut fake, &mut log), Step::Done);
    assert_eq!(fake.gpr[0], 1);
    assert!(log.is_empty());
    assert_eq!(fake.rip, 0x1002);
}

#[test]
fn a_page_table_changed_meanwhile_starts_over() {
    let mut fake = machine(Kind::Mmio, Kind::Mmio, PAGE);
    let insn = insn(&[0x01, 0x06]);
    let mut log = MmioLog::new();
    assert_eq!(execute(&insn, &mut fake, &mut log), read(PAGE, 4));
    log.answer(1);
    // The register stands for the translation here.
    fake.gpr[Gpr::Rsi.number()] = NEXT;
    assert_eq!(execute(&insn, &mut fake, &mut log), Step::Again);
    assert!(log.is_empty());
    assert_eq!(execute(&insn, &mut fake, &mut log), read(NEXT, 4));
}

#[test]
fn a_blocked_page_keeps_what_was_answered() {
    // add eax read from MMIO into RAM: movsd
    let mut fake = machine(Kind::Mmio, Kind::Ram, PAGE);
    fake.gpr[Gpr::Rdi.number()] = NEXT;
    let insn = insn(&[0xa5]);
    let mut log = MmioLog::new();
    fake.blocked_page = Some(NEXT >> 12);
    assert_eq!(execute(&insn, &mut fake, &mut log), Step::Blocked);
    assert!(log.is_empty());
    fake.blocked_page = None;
    assert_eq!(execute(&insn, &mut fake, &mut log), read(PAGE, 4));
    log.answer(0x1234_5678);
    fake.blocked_page = Some(NEXT >> 12);
    assert_eq!(execute(&insn, &mut fake, &mut log), Step::Blocked);
    assert_eq!(fake.rip, 0x1000);
    fake.blocked_page = None;
    assert_eq!(execute(&insn, &mut fake, &mut log), Step::Done);
    assert_eq!(fake.peek(NEXT, 4), [0x78, 0x56, 0x34, 0x12]);
}

#[test]
fn completion_clears_rf_and_a_fault_does_not() {
    const RF: u64 = 1 << 16;
    let mut fake = machine(Kind::Mmio, Kind::Ram, PAGE);
    fake.rflags |= RF;
    assert_eq!(fake.run(&insn(&[0x8b, 0x06])).0, Step::Done);
    assert_eq!(fake.rflags & RF, 0);
    fake.rflags |= RF;
    fake.gpr[Gpr::Rsi.number()] = 0x9000;
    assert!(matches!(fake.run(&insn(&[0x8b, 0x06])).0, Step::Fault(_)));
    assert_ne!(fake.rflags & RF, 0);
}

#[test]
fn locked_updates_of_ram_are_atomic() {
    // The instruction and whether it must use compare-and-exchange.
    let rows: &[(&[u8], bool)] = &[
        (&[0xf0, 0x01, 0x06], true),
        (&[0x01, 0x06], false),
        (&[0xf0, 0x0f, 0xc1, 0x06], true),
        (&[0xf0, 0x0f, 0xb1, 0x0e], true),
        (&[0xf0, 0x48, 0x0f, 0xc7, 0x0e], true),
        (&[0xf0, 0x0f, 0xba, 0x2e, 3], true),
        (&[0xf0, 0xfe, 0x06], true),
        (&[0xf0, 0xf7, 0x1e], true),
        // XCHG is locked without a prefix.
        (&[0x87, 0x06], true),
        (&[0x48, 0x87, 0x06], true),
    ];
    for (code, atomic) in rows {
        let mut fake = machine(Kind::Ram, Kind::Ram, PAGE + 16);
        // Another processor changes the first byte twice while we try.
        fake.interference = if *atomic { 2 } else { 0 };
        let (step, asked) = fake.run(&insn(code));
        assert_eq!((step, asked.len()), (Step::Done, 0), "{code:02x?}");
        let tries = if *atomic { 3 } else { 0 };
        assert_eq!(fake.atomics, tries, "{code:02x?}");
    }
}

#[test]
fn the_value_an_atomic_update_saw_is_the_one_it_reports() {
    // lock xadd [rsi], eax, with the byte raised by two meanwhile
    let mut fake = machine(Kind::Ram, Kind::Ram, PAGE + 16);
    fake.poke(PAGE + 16, &10u64.to_le_bytes());
    fake.gpr[0] = 5;
    fake.interference = 2;
    assert_eq!(fake.run(&insn(&[0xf0, 0x0f, 0xc1, 0x06])).0, Step::Done);
    assert_eq!(fake.gpr[0], 12);
    assert_eq!(fake.peek64(PAGE + 16), 17);
}

#[test]
fn a_lock_inside_a_cache_line_is_atomic_whatever_its_alignment() {
    for offset in 0..=56 {
        // lock add [rsi], rax
        let mut fake = machine(Kind::Ram, Kind::Ram, PAGE + 64 + offset);
        fake.interference = 2;
        let (step, _) = fake.run(&insn(&[0xf0, 0x48, 0x01, 0x06]));
        assert_eq!((step, fake.atomics), (Step::Done, 3), "{offset}");
    }
}

/// A lock across two lines, or pages, is left to the processor where that helps.
#[test]
fn a_split_lock_is_the_processors() {
    for at in [PAGE + 61, NEXT - 2] {
        let mut fake = machine(Kind::Ram, Kind::Ram, at);
        fake.poke(at, &5u32.to_le_bytes());
        fake.gpr[0] = 2;
        fake.split_locks = 1;
        fake.pause = true;
        let code = insn(&[0xf0, 0x01, 0x06]);
        assert_eq!(fake.run(&code), (Step::Again, Vec::new()));
        assert_eq!(fake.peek(at, 4), [5, 0, 0, 0], "nothing was written");
        assert_eq!(fake.run(&code), (Step::Done, Vec::new()));
        assert_eq!(fake.peek(at, 4), [7, 0, 0, 0]);
        assert_eq!(fake.atomics, 0);
        // Without LOCK the processor is not asked.
        fake.split_locks = 1;
        fake.rip = 0x1000;
        assert_eq!(fake.run(&insn(&[0x01, 0x06])).0, Step::Done);
        assert_eq!(fake.split_locks, 1);
    }
}

#[test]
fn endless_contention_ends_the_call() {
    let mut fake = machine(Kind::Ram, Kind::Ram, PAGE);
    fake.interference = u32::MAX;
    fake.pause = true;
    let before = fake.gpr;
    assert_eq!(fake.run(&insn(&[0xf0, 0x01, 0x06])).0, Step::Again);
    assert_eq!((fake.gpr, fake.rip), (before, 0x1000));
}

/// Random instructions, registers and answers: nothing panics, every call ends,
/// and the log is empty when it should be.
#[test]
fn survives_anything() {
    let mut rng = Rng(0xfee1_600d);
    let mut completed = 0;
    for _ in 0..200_000 {
        let mode = rng.pick(&[Mode::Bits16, Mode::Bits32, Mode::Bits64]);
        let mut code = [0; 15];
        for byte in &mut code {
            *byte = rng.byte();
        }
        let Ok(insn) = decode(&code, mode) else {
            continue;
        };
        let mut fake = Fake::new(mode);
        fake.map(0, Kind::Ram);
        fake.map(0x1000, Kind::Mmio);
        fake.map(0x2000, Kind::Rom);
        fake.map(0xffff_f000, Kind::Mmio);
        for reg in &mut fake.gpr {
            *reg = match rng.below(4) {
                0 => rng.value(),
                1 => 0xffff_ffff - rng.below(8),
                _ => rng.below(0x3000),
            };
        }
        fake.rflags = rng.next() & 0x3f_7fd5 | 2;
        fake.cpl = rng.pick(&[0, 3]);
        fake.cr0 = rng.next();
        fake.cr4 = rng.next();
        for segment in &mut fake.segments {
            segment.limit = rng.pick(&[0, 0xfff, 0xffff, u32::MAX]);
            segment.base = rng.pick(&[0, 0, 0x1000, rng.0]);
            segment.access = rng.pick(&[segment.access, rng.0 as u32]);
        }
        let mut log = MmioLog::new();
        for _ in 0..40 {
            match execute(&insn, &mut fake, &mut log) {
                Step::Read { size, .. } | Step::Write { size, .. } => {
                    assert!(matches!(size, 1 | 2 | 4 | 8));
                    log.answer(rng.next());
                }
                Step::In { size, count, .. } | Step::Out { size, count, .. } => {
                    assert!(matches!(size, 1 | 2 | 4));
                    assert!(count >= 1 && count * u16::from(size) <= 64);
                    log.answer(0);
                }
                Step::Again => assert!(log.is_empty()),
                Step::Done => {
                    assert!(log.is_empty());
                    completed += 1;
                    break;
                }
                Step::Fault(_) | Step::Unsupported => {
                    assert!(log.is_empty());
                    break;
                }
                Step::Blocked => panic!("nothing is blocked"),
            }
        }
    }
    assert!(completed > 20_000, "{completed}");
}
