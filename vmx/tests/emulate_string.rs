//! Repeated string instructions: both directions, page crossings, MMIO on
//! either side, the bound on one call, single-step, pauses; and strings to and
//! from ports.

mod emulate_machine;

use emulate_machine::{Fake, Kind};
use haxm_vmx::emulate::{
    Exception, Gpr, Insn, MAX_ITERATIONS, MmioLog, Mode, PORT_BUFFER_LEN, Step, decode, execute,
};

const SOURCE: u64 = 0x5000;
const TARGET: u64 = 0x8000;
const DF: u64 = 0x400;
const TF: u64 = 0x100;
const ZF: u64 = 0x40;
const PORT: u16 = 0x510;

fn insn(code: &[u8]) -> Insn {
    decode(code, Mode::Bits64).expect("an emulated instruction")
}

/// Two source pages and two target pages.
fn machine(source: Kind, target: Kind) -> Fake {
    let mut fake = Fake::new(Mode::Bits64);
    for (base, kind, step) in [(SOURCE, source, 7), (TARGET, target, 0)] {
        for page in [base, base + 0x1000] {
            for (at, byte) in fake.map(page, kind).bytes.iter_mut().enumerate() {
                *byte = (at * step + (page >> 12) as usize) as u8;
            }
        }
    }
    fake
}

fn set(fake: &mut Fake, rsi: u64, rdi: u64, rcx: u64) {
    fake.gpr[Gpr::Rsi.number()] = rsi;
    fake.gpr[Gpr::Rdi.number()] = rdi;
    fake.gpr[Gpr::Rcx.number()] = rcx;
}

fn get(fake: &Fake) -> (u64, u64, u64) {
    (
        fake.gpr[Gpr::Rsi.number()],
        fake.gpr[Gpr::Rdi.number()],
        fake.gpr[Gpr::Rcx.number()],
    )
}

#[test]
fn rep_movs_copies_both_ways_across_pages() {
    for (source, target) in [
        (Kind::Ram, Kind::Ram),
        (Kind::Mmio, Kind::Ram),
        (Kind::Ram, Kind::Mmio),
        (Kind::Mmio, Kind::Mmio),
        (Kind::Rom, Kind::Rom),
    ] {
        for (code, size) in [
            (&[0xf3, 0xa4][..], 1),
            (&[0xf3, 0xa5], 4),
            (&[0xf3, 0x48, 0xa5], 8),
        ] {
            for down in [false, true] {
                let count = 40 / size;
                let mut fake = machine(source, target);
                let wanted = fake.peek(SOURCE + 0xff0, 40);
                let last = if down { 40 - size } else { 0 };
                let (rsi, rdi) = (SOURCE + 0xff0, TARGET + 0xfe5);
                set(&mut fake, rsi + last, rdi + last, count);
                fake.rflags |= if down { DF } else { 0 };
                let (step, asked) = fake.run(&insn(code));
                assert_eq!(step, Step::Done);
                assert_eq!(fake.peek(rdi, 40), wanted);
                let end = |from: u64| {
                    if down {
                        from.wrapping_sub(size)
                    } else {
                        from + 40
                    }
                };
                assert_eq!(get(&fake), (end(rsi), end(rdi), 0));
                assert_eq!(fake.rip, 0x1000 + code.len() as u64);
                // One element of an MMIO side is one request, more only where it
                // crosses a page.
                let sides = u64::from(source == Kind::Mmio) + u64::from(target != Kind::Ram);
                assert!(asked.len() as u64 >= sides * count);
                assert!(asked.len() as u64 <= sides * (count + 4));
            }
        }
    }
}

#[test]
fn rep_of_nothing_does_nothing() {
    let mut fake = machine(Kind::Mmio, Kind::Mmio);
    set(&mut fake, 0xbad_0000, 0xbad_0000, 0);
    assert_eq!(fake.run(&insn(&[0xf3, 0xa4])), (Step::Done, vec![]));
    assert_eq!(get(&fake), (0xbad_0000, 0xbad_0000, 0));
    assert_eq!(fake.rip, 0x1002);
    // Only the low half of RCX counts with 32-bit addresses.
    set(&mut fake, 0xbad_0000, 0xbad_0000, 1 << 32);
    fake.rip = 0x1000;
    assert_eq!(fake.run(&insn(&[0x67, 0xf3, 0xa4])), (Step::Done, vec![]));
}

#[test]
fn comparisons_stop_where_they_differ() {
    // repe cmpsb over twenty equal bytes and one other
    for kind in [Kind::Ram, Kind::Mmio] {
        let mut fake = machine(kind, kind);
        fake.poke(SOURCE + 0xff0, &[5; 40]);
        fake.poke(TARGET + 0xff8, &[5; 40]);
        fake.poke(TARGET + 0xff8 + 20, &[6]);
        set(&mut fake, SOURCE + 0xff0, TARGET + 0xff8, 40);
        assert_eq!(fake.run(&insn(&[0xf3, 0xa6])).0, Step::Done);
        assert_eq!(get(&fake), (SOURCE + 0xff0 + 21, TARGET + 0xff8 + 21, 19));
        // 5 - 6: below.
        assert_eq!(fake.rflags & (ZF | 1), 1);
        // repne scasb for the six
        set(&mut fake, 0, TARGET + 0xff8, 40);
        fake.gpr[0] = 6;
        assert_eq!(fake.run(&insn(&[0xf2, 0xae])).0, Step::Done);
        assert_eq!(get(&fake), (0, TARGET + 0xff8 + 21, 19));
        assert_ne!(fake.rflags & ZF, 0);
        // repe cmpsb that runs out
        set(&mut fake, SOURCE + 0xff0, TARGET + 0xff8, 20);
        assert_eq!(fake.run(&insn(&[0xf3, 0xa6])).0, Step::Done);
        assert_eq!(get(&fake).2, 0);
        assert_ne!(fake.rflags & ZF, 0);
    }
}

#[test]
fn a_fault_keeps_the_finished_iterations() {
    // rep stosd that runs off the second page
    let mut fake = machine(Kind::Ram, Kind::Mmio);
    set(&mut fake, 0, TARGET + 0x2000 - 12, 8);
    let (step, asked) = fake.run(&insn(&[0xf3, 0xab]));
    let end = TARGET + 0x2000;
    assert_eq!(step, Step::Fault(Exception::page_fault(2, end)));
    assert_eq!(asked.len(), 3);
    assert_eq!(get(&fake), (0, end, 5));
    assert_eq!(fake.rip, 0x1000);
}

#[test]
fn one_call_is_bounded() {
    let mut fake = machine(Kind::Ram, Kind::Ram);
    let count = u64::from(MAX_ITERATIONS) + 1000;
    set(&mut fake, 0, TARGET, count);
    fake.gpr[0] = 0xab;
    let insn = insn(&[0xf3, 0xaa]);
    let mut log = MmioLog::new();
    assert_eq!(execute(&insn, &mut fake, &mut log), Step::Again);
    assert_eq!(get(&fake).2, 1000);
    assert_eq!(fake.rip, 0x1000);
    assert_eq!(execute(&insn, &mut fake, &mut log), Step::Done);
    assert_eq!(get(&fake), (0, TARGET + count, 0));
    assert!(
        fake.peek(TARGET, count as usize)
            .iter()
            .all(|byte| *byte == 0xab)
    );
}

#[test]
fn a_pause_is_taken_between_iterations() {
    let mut fake = machine(Kind::Mmio, Kind::Mmio);
    set(&mut fake, SOURCE, TARGET, 3);
    let insn = insn(&[0xf3, 0xa4]);
    let mut log = MmioLog::new();
    fake.pause = true;
    assert!(matches!(
        execute(&insn, &mut fake, &mut log),
        Step::Read { .. }
    ));
    log.answer(1);
    assert!(matches!(
        execute(&insn, &mut fake, &mut log),
        Step::Write { .. }
    ));
    log.answer(0);
    assert_eq!(execute(&insn, &mut fake, &mut log), Step::Again);
    assert!(log.is_empty());
    assert_eq!(get(&fake), (SOURCE + 1, TARGET + 1, 2));
}

#[test]
fn single_step_sees_every_iteration() {
    let mut fake = machine(Kind::Ram, Kind::Mmio);
    set(&mut fake, SOURCE, TARGET, 2);
    fake.rflags |= TF;
    let insn = insn(&[0xf3, 0xa4]);
    assert_eq!(fake.run(&insn).0, Step::Done);
    assert_eq!((fake.rip, get(&fake).2), (0x1000, 1));
    assert_eq!(fake.run(&insn).0, Step::Done);
    assert_eq!((fake.rip, get(&fake).2), (0x1002, 0));
}

/// Runs an instruction that writes to a port; returns what each exit carried.
fn outs(fake: &mut Fake, code: &[u8]) -> Vec<(u16, bool, Vec<u8>)> {
    let insn = insn(code);
    let mut log = MmioLog::new();
    let mut exits = Vec::new();
    loop {
        match execute(&insn, fake, &mut log) {
            Step::Out {
                port,
                size,
                count,
                down,
            } => {
                assert_eq!(port, PORT);
                let len = usize::from(count) * usize::from(size);
                exits.push((count, down, fake.port_buffer[..len].to_vec()));
                fake.port_buffer = [0xee; PORT_BUFFER_LEN];
                log.answer(0);
            }
            Step::Read { gpa, size } => {
                let value = fake.peek(gpa, size.into());
                let mut bytes = [0; 8];
                bytes[..value.len()].copy_from_slice(&value);
                log.answer(u64::from_le_bytes(bytes));
            }
            Step::Done => return exits,
            step => panic!("{step:?}"),
        }
    }
}

/// Runs an instruction that reads from a port, feeding it `data`.
fn ins(fake: &mut Fake, code: &[u8], mut data: &[u8]) -> (Step, Vec<u16>) {
    let insn = insn(code);
    let mut log = MmioLog::new();
    let mut counts = Vec::new();
    loop {
        match execute(&insn, fake, &mut log) {
            Step::In {
                port,
                size,
                count,
                down,
            } => {
                assert_eq!(port, PORT);
                let size = usize::from(size);
                let len = usize::from(count) * size;
                let (now, later) = data.split_at(len);
                for (i, element) in now.chunks(size).enumerate() {
                    let place = if down { usize::from(count) - 1 - i } else { i };
                    fake.port_buffer[place * size..][..size].copy_from_slice(element);
                }
                data = later;
                counts.push(count);
                log.answer(0);
            }
            Step::Write { gpa, size, value } => {
                fake.poke(gpa, &value.to_le_bytes()[..usize::from(size)]);
                // The request went through the same page.
                fake.port_buffer = [0xee; PORT_BUFFER_LEN];
                log.answer(0);
            }
            step => return (step, counts),
        }
    }
}

#[test]
fn outs_fills_the_port_buffer() {
    let mut fake = machine(Kind::Ram, Kind::Ram);
    fake.gpr[Gpr::Rdx.number()] = 0xffff_0000 | u64::from(PORT);
    // rep outsb, a hundred bytes: two exits
    set(&mut fake, SOURCE + 3, 0, 100);
    let wanted = fake.peek(SOURCE + 3, 100);
    let exits = outs(&mut fake, &[0xf3, 0x6e]);
    let counts: Vec<_> = exits.iter().map(|exit| exit.0).collect();
    assert_eq!(counts, [64, 36]);
    assert_eq!(exits.concat_data(), wanted);
    assert_eq!(get(&fake), (SOURCE + 103, 0, 0));
    assert_eq!(fake.rip, 0x1002);
    // rep outsd downwards across a page: the crossing element alone
    fake.rip = 0x1000;
    fake.rflags |= DF;
    set(&mut fake, SOURCE + 0x1006, 0, 6);
    let exits = outs(&mut fake, &[0xf3, 0x6f]);
    let counts: Vec<_> = exits.iter().map(|exit| (exit.0, exit.1)).collect();
    assert_eq!(counts, [(2, true), (1, true), (3, true)]);
    // Elements lie as in memory; the first sent is the last in the buffer.
    assert_eq!(exits[0].2, fake.peek(SOURCE + 0x1002, 8));
    assert_eq!(exits[1].2, fake.peek(SOURCE + 0xffe, 4));
    assert_eq!(exits[2].2, fake.peek(SOURCE + 0xff2, 12));
    assert_eq!(get(&fake), (SOURCE + 0x1006 - 24, 0, 0));
    // outsw without REP moves one and leaves RCX alone
    fake.rflags &= !DF;
    set(&mut fake, SOURCE, 0, 9);
    let exits = outs(&mut fake, &[0x66, 0x6f]);
    assert_eq!((exits.len(), exits[0].0, exits[0].2.len()), (1, 1, 2));
    assert_eq!(get(&fake), (SOURCE + 2, 0, 9));
}

trait Data {
    fn concat_data(&self) -> Vec<u8>;
}

impl Data for Vec<(u16, bool, Vec<u8>)> {
    fn concat_data(&self) -> Vec<u8> {
        self.iter().flat_map(|exit| exit.2.clone()).collect()
    }
}

#[test]
fn outs_reads_mmio_one_element_at_a_time() {
    let mut fake = machine(Kind::Mmio, Kind::Ram);
    fake.gpr[Gpr::Rdx.number()] = u64::from(PORT);
    set(&mut fake, SOURCE, 0, 3);
    let exits = outs(&mut fake, &[0xf3, 0x6f]);
    assert_eq!(exits.len(), 3);
    assert_eq!(exits.concat_data(), fake.peek(SOURCE, 12));
}

#[test]
fn ins_stores_what_the_port_gave() {
    let data: Vec<u8> = (1..=200).collect();
    let mut fake = machine(Kind::Ram, Kind::Ram);
    fake.gpr[Gpr::Rdx.number()] = u64::from(PORT);
    // rep insw: 32 words an exit, less at the page's end
    set(&mut fake, 0, TARGET + 0xfb0, 100);
    let (step, counts) = ins(&mut fake, &[0x66, 0xf3, 0x6d], &data);
    assert_eq!(step, Step::Done);
    assert_eq!(counts, [32, 8, 32, 28]);
    assert_eq!(fake.peek(TARGET + 0xfb0, 200), data);
    assert_eq!(get(&fake), (0, TARGET + 0xfb0 + 200, 0));
    // rep insb downwards
    fake.rflags |= DF;
    fake.rip = 0x1000;
    set(&mut fake, 0, TARGET + 69, 70);
    let (step, counts) = ins(&mut fake, &[0xf3, 0x6c], &data);
    assert_eq!((step, counts), (Step::Done, vec![64, 6]));
    let mut wanted = data[..70].to_vec();
    wanted.reverse();
    assert_eq!(fake.peek(TARGET, 70), wanted);
}

#[test]
fn ins_into_mmio_keeps_the_element() {
    let data: Vec<u8> = (1..=12).collect();
    let mut fake = machine(Kind::Ram, Kind::Mmio);
    fake.gpr[Gpr::Rdx.number()] = u64::from(PORT);
    // The second element crosses a page: two writes, each of which overwrites
    // the page the element came in.
    set(&mut fake, 0, TARGET + 0xffa, 3);
    let (step, counts) = ins(&mut fake, &[0xf3, 0x6d], &data);
    assert_eq!((step, counts), (Step::Done, vec![1, 1, 1]));
    assert_eq!(fake.peek(TARGET + 0xffa, 12), data);
}

#[test]
fn ins_faults_before_the_port_is_read() {
    let mut fake = machine(Kind::Ram, Kind::ReadOnly);
    fake.gpr[Gpr::Rdx.number()] = u64::from(PORT);
    set(&mut fake, 0, TARGET, 4);
    let (step, counts) = ins(&mut fake, &[0xf3, 0x6c], &[]);
    assert_eq!(step, Step::Fault(Exception::page_fault(3, TARGET)));
    assert!(counts.is_empty());
    // The elements before a segment's end arrive, the one beyond faults.
    let mut fake = machine(Kind::Ram, Kind::Ram);
    fake.gpr[Gpr::Rdx.number()] = u64::from(PORT);
    let code = decode(&[0xf3, 0x6c], Mode::Bits32).expect("emulated");
    fake.segments[0].limit = (TARGET + 2) as u32;
    set(&mut fake, 0, TARGET, 5);
    let mut log = MmioLog::new();
    for left in [5, 4, 3] {
        let step = execute(&code, &mut fake, &mut log);
        assert_eq!(get(&fake).2, left);
        assert!(matches!(step, Step::In { count: 1, .. }), "{step:?}");
        log.answer(0);
    }
    let step = execute(&code, &mut fake, &mut log);
    assert_eq!(step, Step::Fault(Exception::PROTECTION));
    assert_eq!(get(&fake), (0, TARGET + 3, 2));
}

#[test]
fn addresses_wrap_at_their_size() {
    // 16-bit code: DI goes from ffff to 0000, the rest of RDI stays.
    let mut fake = Fake::new(Mode::Bits16);
    fake.map(0xf000, Kind::Ram);
    fake.map(0, Kind::Ram);
    set(&mut fake, 0, 0x1234_ffff, 0x9999_0002);
    fake.gpr[0] = 0x77;
    let code = decode(&[0xf3, 0xaa], Mode::Bits16).expect("emulated");
    assert_eq!(fake.run(&code).0, Step::Done);
    assert_eq!(fake.peek(0xffff, 1), [0x77]);
    assert_eq!(fake.peek(0, 1), [0x77]);
    assert_eq!(get(&fake), (0, 0x1234_0001, 0x9999_0000));
}

#[test]
fn a_batch_does_not_reach_past_offset_zero() {
    // addr32 rep outsb gs:[esi] downwards: below offset 0 lies offset 2^32 - 1.
    let mut fake = machine(Kind::Ram, Kind::Ram);
    fake.gpr[Gpr::Rdx.number()] = u64::from(PORT);
    fake.segments[5].base = SOURCE + 0x800;
    fake.rflags |= DF;
    set(&mut fake, 2, 0, 8);
    let code = insn(&[0x65, 0x67, 0xf3, 0x6e]);
    let mut log = MmioLog::new();
    for left in [8, 7, 6] {
        let step = execute(&code, &mut fake, &mut log);
        assert!(matches!(step, Step::Out { count: 1, .. }), "{step:?}");
        assert_eq!(get(&fake).2, left);
        log.answer(0);
    }
    let beyond = SOURCE + 0x800 + 0xffff_ffff;
    let step = execute(&code, &mut fake, &mut log);
    assert_eq!(step, Step::Fault(Exception::page_fault(0, beyond)));
}

/// A request that is asked again before it is served carries its data again; once it is served, memory is not looked
/// at any more.
#[test]
fn a_request_that_is_asked_again_has_its_data() {
    const FROM: u64 = 0x5000;
    let mut fake = Fake::new(Mode::Bits64);
    fake.map(FROM, Kind::Ram);
    fake.poke(FROM, &[1, 2, 3, 4]);
    fake.gpr[Gpr::Rsi.number()] = FROM;
    fake.gpr[Gpr::Rcx.number()] = 4;
    fake.gpr[Gpr::Rdx.number()] = 0x80;
    // rep outsb
    let insn = decode(&[0xf3, 0x6e], Mode::Bits64).expect("decodes");
    let mut log = MmioLog::new();
    for _ in 0..2 {
        fake.port_buffer = [0; 64];
        let step = execute(&insn, &mut fake, &mut log);
        assert!(matches!(step, Step::Out { count: 4, .. }), "{step:?}");
        assert_eq!(fake.port_buffer[..4], [1, 2, 3, 4]);
    }
    log.answer(0);
    fake.port_buffer = [0; 64];
    fake.poke(FROM, &[9; 4]);
    assert_eq!(execute(&insn, &mut fake, &mut log), Step::Done);
    assert_eq!(fake.port_buffer, [0; 64]);
    assert_eq!(fake.gpr[Gpr::Rsi.number()], FROM + 4);
    assert_eq!(fake.gpr[Gpr::Rcx.number()], 0);
}
