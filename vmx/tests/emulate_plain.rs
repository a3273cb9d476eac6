//! Plain instructions against the general path, on generated instructions and states;
//! the cache of decoded instructions against the decoder; and that an
//! instruction looks at no segment register but those it names.

mod emulate_machine;

use emulate_machine::{Fake, Kind, Rng};
use haxm_vmx::emulate::{
    Code, DecodeCache, DecodeError, Gpr, MAX_INSN_LEN, Mode, Op, Operand, Plain, Rest, Seg, Step,
    decode,
};

const MODES: [Mode; 3] = [Mode::Bits16, Mode::Bits32, Mode::Bits64];
const RESUME: u64 = 1 << 16;

/// Opcodes with their map; those of plain instructions, each as often as the next.
const OPCODES: [&[u8]; 59] = [
    &[0x88],
    &[0x89],
    &[0x8a],
    &[0x8b],
    &[0xa0],
    &[0xa1],
    &[0xa2],
    &[0xa3],
    &[0xc6],
    &[0xc7],
    &[0x63],
    &[0x0f, 0xb6],
    &[0x0f, 0xb7],
    &[0x0f, 0xbe],
    &[0x0f, 0xbf],
    &[0x0f, 0xc3],
    &[0x0f, 0x38, 0xf9],
    &[0x00],
    &[0x01],
    &[0x02],
    &[0x03],
    &[0x08],
    &[0x09],
    &[0x0a],
    &[0x0b],
    &[0x10],
    &[0x11],
    &[0x12],
    &[0x13],
    &[0x18],
    &[0x19],
    &[0x1a],
    &[0x1b],
    &[0x20],
    &[0x21],
    &[0x22],
    &[0x23],
    &[0x28],
    &[0x29],
    &[0x2a],
    &[0x2b],
    &[0x30],
    &[0x31],
    &[0x32],
    &[0x33],
    &[0x38],
    &[0x39],
    &[0x3a],
    &[0x3b],
    &[0x80],
    &[0x81],
    &[0x82],
    &[0x83],
    &[0x84],
    &[0x85],
    &[0xf6],
    &[0xf7],
    &[0xfe],
    &[0xff],
];

/// One of the opcodes with prefixes and operands as they come.
fn plain_bytes(rng: &mut Rng, mode: Mode) -> (usize, [u8; MAX_INSN_LEN]) {
    let mut bytes = [0; MAX_INSN_LEN];
    for byte in &mut bytes {
        *byte = rng.byte();
    }
    let which = rng.below(OPCODES.len() as u64) as usize;
    let mut head = Vec::new();
    for _ in 0..rng.below(3) {
        head.push(rng.pick(&[0x66, 0x67, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0xf0]));
    }
    if mode == Mode::Bits64 && rng.one_in(2) {
        head.push(0x40 | rng.byte() & 15);
    }
    head.extend(OPCODES[which]);
    match OPCODES[which] {
        [0xc6 | 0xc7] => head.push(rng.byte() & 0xc7),
        // TEST, NOT and NEG of eight.
        [0xf6 | 0xf7] => head.push(rng.byte() & 0xdf),
        // INC and DEC.
        [0xfe | 0xff] => head.push(rng.byte() & 0xcf),
        _ => {}
    }
    bytes[..head.len()].copy_from_slice(&head);
    (which, bytes)
}

fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// A machine in some state, with devices wherever `plain` touches memory.
fn machine(rng: &mut Rng, mode: Mode, plain: &Plain) -> Option<(Fake, u64)> {
    let mut fake = Fake::new(mode);
    for reg in &mut fake.gpr {
        *reg = rng.value();
    }
    // As in real-address mode, so that CS can be written too.
    let data = fake.segments[Seg::Ds.number()];
    for segment in &mut fake.segments {
        *segment = data;
        segment.base = rng.next()
            & if mode == Mode::Bits16 {
                0xf_fff0
            } else {
                0xffff_ffff
            };
    }
    for seg in [Seg::Fs, Seg::Gs] {
        if mode == Mode::Bits64 {
            fake.segments[seg.number()].base = rng.value();
        }
    }
    fake.rip = rng.next()
        & if mode == Mode::Bits64 {
            0x7fff_ffff_ffff
        } else {
            0xffff_ffff
        };
    fake.rflags = 2 | rng.next() & (emulate_machine::STATUS | RESUME | 0x400);
    let base = plain
        .based_on()
        .map_or(0, |seg| fake.segments[seg.number()].base);
    let gpr = |reg: Gpr| Some(fake.gpr[reg.number()]);
    let linear = plain.linear(fake.rip, base, gpr).expect("all are known");
    let last = linear.wrapping_add(u64::from(plain.size()) - 1);
    if linear >> 12 != last >> 12 || last > u64::MAX - 16 || !is_canonical(linear) {
        return None;
    }
    fake.map(linear, Kind::Mmio);
    fake.poke(
        linear,
        &rng.next().to_le_bytes()[..usize::from(plain.size())],
    );
    Some((fake, linear))
}

/// What the general path does, and what the shortcut does.
fn compare(rng: &mut Rng, mode: Mode, bytes: &[u8]) -> bool {
    let Ok(insn) = decode(bytes, mode) else {
        return false;
    };
    let Some(plain) = Plain::of(&insn) else {
        return false;
    };
    let Some((mut general, linear)) = machine(rng, mode, &plain) else {
        return false;
    };
    let mut fast = general.clone();
    let (step, asked) = general.run(&insn);
    assert_eq!(step, Step::Done, "{insn:?}");

    let registers = fast.gpr;
    let gpr = |reg: Gpr| Some(registers[reg.number()]);
    let (gpa, size) = (linear, plain.size());
    let sent = plain.sent(gpr).expect("all are known");
    let mut asks = Vec::new();
    if plain.is_store() {
        asks.push(Step::Write {
            gpa,
            size,
            value: sent,
        });
    } else {
        assert_eq!(sent, 0);
        asks.push(Step::Read { gpa, size });
    }
    // What is above the bytes read means nothing.
    let mut read = [0xa5; 8];
    let from = fast.peek(linear, usize::from(size));
    read[..from.len()].copy_from_slice(&from);
    let read = u64::from_le_bytes(read);
    match plain.rest() {
        Rest::Nothing => fast.poke(linear, &sent.to_le_bytes()[..usize::from(size)]),
        Rest::Load(load) => {
            let to = &mut fast.gpr[load.register().number()];
            *to = load.result(*to, read);
        }
        Rest::Compute(compute) => {
            assert_eq!(compute.size(), size);
            let outcome = compute.outcome(read, fast.rflags, &gpr);
            let outcome = outcome.expect("all are known");
            let (defined, found) = outcome.flags;
            fast.rflags = fast.rflags & !defined | found & defined;
            if let Some((to, value)) = outcome.register {
                fast.gpr[to.number()] = value;
            }
            if let Some(value) = outcome.memory {
                asks.push(Step::Write { gpa, size, value });
                fast.poke(linear, &value.to_le_bytes()[..usize::from(size)]);
            }
        }
    }
    let writes = asks.iter().any(|ask| matches!(ask, Step::Write { .. }));
    assert_eq!(plain.writes(), writes, "{insn:?}");
    assert_eq!(asked, asks, "{insn:?}");
    fast.rip = plain.next_rip(fast.rip);
    fast.rflags &= !RESUME;
    assert_eq!(fast.gpr, general.gpr, "{insn:?}");
    assert_eq!(fast.rip, general.rip, "{insn:?}");
    assert_eq!(fast.rflags, general.rflags, "{insn:?}");
    assert_eq!(fast.vectors, general.vectors);
    let page = |fake: &Fake| fake.pages[&(linear >> 12)].bytes.clone();
    assert!(page(&fast) == page(&general), "{insn:?}: memory differs");
    true
}

#[test]
fn a_plain_instruction_does_what_the_general_path_does() {
    let mut rng = Rng(0x0bad_5eed_0001);
    for mode in MODES {
        let mut seen = [0u32; OPCODES.len()];
        for _ in 0..90_000 {
            let (which, bytes) = plain_bytes(&mut rng, mode);
            seen[which] += u32::from(compare(&mut rng, mode, &bytes));
        }
        for (opcode, count) in OPCODES.iter().zip(seen) {
            // 63 is ARPL outside 64-bit mode; 82 is only there.
            let exists = match **opcode {
                [0x63] => mode == Mode::Bits64,
                [0x82] => mode != Mode::Bits64,
                _ => true,
            };
            assert_eq!(count > 100, exists, "{opcode:02x?} in {mode:?}: {count}");
        }
    }
}

/// Nothing that does more is taken for plain, and nothing plain is missed.
#[test]
fn no_more_and_no_fewer_are_plain() {
    let mut rng = Rng(0x0bad_5eed_0002);
    let mut plain = 0;
    for round in 0..200_000 {
        let mode = MODES[round % 3];
        let bytes: [u8; MAX_INSN_LEN] = std::array::from_fn(|_| rng.byte());
        let bytes = if rng.one_in(4) {
            plain_bytes(&mut rng, mode).1
        } else {
            bytes
        };
        let Ok(insn) = decode(&bytes, mode) else {
            continue;
        };
        let [first, second, third, _] = insn.operands;
        let (moves, computes) = match insn.op {
            Op::Mov | Op::Movzx | Op::Movsx => (true, false),
            Op::Add
            | Op::Or
            | Op::Adc
            | Op::Sbb
            | Op::And
            | Op::Sub
            | Op::Xor
            | Op::Cmp
            | Op::Test
            | Op::Inc
            | Op::Dec
            | Op::Not
            | Op::Neg => (false, true),
            _ => (false, false),
        };
        let number = |operand| {
            matches!(
                operand,
                Operand::Reg { .. } | Operand::HighByte(_) | Operand::Imm(_)
            )
        };
        let one_memory = match (first, second) {
            (Operand::Mem(_), Operand::None) => computes,
            (Operand::Mem(_), other) | (other, Operand::Mem(_)) => number(other),
            _ => false,
        };
        let expected = (moves || computes) && one_memory && third == Operand::None;
        assert_eq!(Plain::of(&insn).is_some(), expected, "{insn:?}");
        plain += u32::from(expected);
    }
    assert!(plain > 10_000, "{plain}");
}

/// Each of these does something else besides, or moves something else.
#[test]
fn relatives_of_mov_are_not_plain() {
    let others: [&[u8]; 10] = [
        // movbe eax, [esi]; movbe [esi], eax
        &[0x0f, 0x38, 0xf0, 0x06],
        &[0x0f, 0x38, 0xf1, 0x06],
        // xchg [esi], eax; imul eax, [esi]; shl [esi], 1; push [esi]; movs; stos
        &[0x87, 0x06],
        &[0x0f, 0xaf, 0x06],
        &[0xd1, 0x26],
        &[0xff, 0x36],
        &[0xa5],
        &[0xab],
        // mov [esi], ds; mov ds, [esi]
        &[0x8c, 0x1e],
        &[0x8e, 0x1e],
    ];
    for bytes in others {
        let insn = decode(bytes, Mode::Bits32).expect("decodes");
        assert_eq!(Plain::of(&insn), None, "{insn:?}");
    }
}

/// An address that depends on a register nobody knows is not made up.
#[test]
fn an_unknown_register_gives_no_address_and_no_value() {
    let of = |bytes: &[u8]| {
        let insn = decode(bytes, Mode::Bits32).expect("decodes");
        Plain::of(&insn).expect("is plain")
    };
    let known = |reg: Gpr| (reg != Gpr::Rsp).then_some(4);
    // mov eax, [esp]; mov eax, [ebx]; mov [ebx], esp; mov [ebx], eax
    assert_eq!(of(&[0x8b, 0x04, 0x24]).linear(0, 0, known), None);
    assert_eq!(of(&[0x8b, 0x03]).linear(0, 0x10, known), Some(0x14));
    assert_eq!(of(&[0x89, 0x23]).sent(known), None);
    assert_eq!(of(&[0x89, 0x03]).sent(known), Some(4));
    // mov esp, [ebx]; cmp [ebx], esp; add esp, [ebx]; add [ebx], eax
    for code in [[0x8b, 0x23], [0x39, 0x23], [0x03, 0x23]] {
        assert_eq!(of(&code).sent(known), None);
    }
    assert_eq!(of(&[0x01, 0x03]).sent(known), Some(0));
}

/// Whatever was decoded at the same address before: the answer is the decoder's.
#[test]
fn the_cache_answers_as_the_decoder() {
    let mut rng = Rng(0x0bad_5eed_0003);
    let mut cache = DecodeCache::new();
    let mut last = [0; MAX_INSN_LEN];
    let mut found = 0;
    for _ in 0..300_000 {
        let mode = rng.pick(&MODES);
        // Often the bytes of the last time, or those with one changed.
        match rng.below(4) {
            0 => last = plain_bytes(&mut rng, mode).1,
            1 => last = std::array::from_fn(|_| rng.byte()),
            2 => last[rng.below(MAX_INSN_LEN as u64) as usize] ^= 1 << rng.below(8),
            _ => {}
        }
        let known = if rng.one_in(3) {
            rng.below(MAX_INSN_LEN as u64 + 1) as usize
        } else {
            MAX_INSN_LEN
        };
        let bytes = &last[..known];
        let rip = rng.below(2);
        let wanted = decode(bytes, mode);
        let answer = cache.look_up(rip, Code::new(bytes), mode);
        match wanted {
            Err(error) => assert_eq!(answer, Err(error), "{bytes:02x?}"),
            Ok(insn) => {
                let at = answer.expect("decodes");
                assert_eq!(cache.insn(at), Some(&insn), "{bytes:02x?}");
                assert_eq!(cache.plain(at).copied(), Plain::of(&insn));
                found += 1;
            }
        }
    }
    assert!(found > 50_000, "{found}");
}

#[test]
fn bytes_that_are_not_there_do_not_count() {
    let mut cache = DecodeCache::new();
    // mov eax, [0]: the address is all zeros, as unknown bytes are.
    let bytes = [0xa1, 0, 0, 0, 0];
    let whole = cache.look_up(0, Code::new(&bytes), Mode::Bits32);
    assert!(whole.is_ok());
    let part = cache.look_up(0, Code::new(&bytes[..3]), Mode::Bits32);
    assert_eq!(part, Err(DecodeError::TooShort));
}

/// A register that `Insn::segments` leaves out may hold anything: same result, same fault, same linear address in it.
#[test]
fn no_segment_counts_but_those_named() {
    let mut rng = Rng(0x0bad_5eed_0004);
    let mut checked = [0u32; 3];
    for round in 0..60_000 {
        let mode = MODES[round % 3];
        let mut bytes: [u8; MAX_INSN_LEN] = std::array::from_fn(|_| rng.byte());
        if rng.one_in(2) {
            bytes[0] = 0x0f;
        }
        let Ok(insn) = decode(&bytes, mode) else {
            continue;
        };
        let named = insn.segments();
        if named == 0x3f || insn.memory().is_none() {
            continue;
        }
        let mut right = Fake::new(mode);
        for reg in &mut right.gpr {
            *reg = rng.value();
        }
        for segment in &mut right.segments {
            segment.base = rng.next() & 0xffff_ffff;
            if rng.one_in(4) {
                segment.limit = rng.next() as u32 & 0xffff;
            }
        }
        // The address as it is leads nowhere: the page fault tells it. Or to a device.
        let (step, _) = right.clone().run(&insn);
        if let Step::Fault(exception) = step
            && let Some(linear) = exception.cr2
            && linear < u64::MAX - 0x2000
        {
            right.map(linear, Kind::Mmio);
            right.map(linear + 0x1000, Kind::Ram);
        }
        let mut wrong = right.clone();
        for (number, segment) in wrong.segments.iter_mut().enumerate() {
            if named >> number & 1 == 0 {
                // Where the code is, and the mode and privilege level, are always known.
                let keeps_base = number == Seg::Cs.number();
                let keeps_rights = keeps_base || number == Seg::Ss.number();
                segment.selector ^= 0x55;
                segment.limit = 0;
                segment.base = if keeps_base { segment.base } else { rng.next() };
                segment.access = if keeps_rights {
                    segment.access
                } else {
                    0x1_0000
                };
            }
        }
        let outcome = right.run(&insn);
        assert_eq!(wrong.run(&insn), outcome, "{insn:?}");
        assert_eq!(wrong.gpr, right.gpr, "{insn:?}");
        assert_eq!((wrong.rip, wrong.rflags), (right.rip, right.rflags));
        assert_eq!(wrong.vectors, right.vectors);
        checked[round % 3] += u32::from(outcome.0 == Step::Done);
    }
    assert!(checked.iter().all(|count| *count > 500), "{checked:?}");
}
