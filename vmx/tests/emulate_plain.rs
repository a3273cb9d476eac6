//! Plain moves against the general path, on generated instructions and states;
//! the cache of decoded instructions against the decoder; and that an
//! instruction looks at no segment register but those it names.

mod emulate_machine;

use emulate_machine::{Fake, Kind, Rng};
use haxm_vmx::emulate::{
    Code, DecodeCache, DecodeError, Gpr, MAX_INSN_LEN, Mode, Op, Operand, PlainMove, Seg, Step,
    decode,
};

const MODES: [Mode; 3] = [Mode::Bits16, Mode::Bits32, Mode::Bits64];
const RESUME: u64 = 1 << 16;

/// Opcodes with their map; those of plain moves, each as often as the next.
const OPCODES: [&[u8]; 17] = [
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
];

/// One of the opcodes with prefixes and operands as they come.
fn moving(rng: &mut Rng, mode: Mode) -> (usize, [u8; MAX_INSN_LEN]) {
    let mut bytes = [0; MAX_INSN_LEN];
    for byte in &mut bytes {
        *byte = rng.byte();
    }
    let which = rng.below(OPCODES.len() as u64) as usize;
    let mut head = Vec::new();
    for _ in 0..rng.below(3) {
        head.push(rng.pick(&[0x66, 0x67, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
    }
    if mode == Mode::Bits64 && rng.one_in(2) {
        head.push(0x40 | rng.byte() & 15);
    }
    head.extend(OPCODES[which]);
    if matches!(OPCODES[which], [0xc6 | 0xc7]) {
        head.push(rng.byte() & 0xc7);
    }
    bytes[..head.len()].copy_from_slice(&head);
    (which, bytes)
}

fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// A machine in some state, with devices wherever `plain` touches memory.
fn machine(rng: &mut Rng, mode: Mode, plain: &PlainMove) -> Option<(Fake, u64)> {
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
    let Some(plain) = PlainMove::of(&insn) else {
        return false;
    };
    let Some((mut general, linear)) = machine(rng, mode, &plain) else {
        return false;
    };
    let mut fast = general.clone();
    let (step, asked) = general.run(&insn);
    assert_eq!(step, Step::Done, "{insn:?}");

    let gpr = |reg: Gpr| Some(fast.gpr[reg.number()]);
    let (gpa, size) = (linear, plain.size());
    let asks = match plain.stored(gpr) {
        Some(value) => Step::Write { gpa, size, value },
        None => Step::Read { gpa, size },
    };
    assert_eq!(asked, [asks], "{insn:?}");
    assert_eq!(plain.is_store(), plain.load().is_none());
    match asks {
        Step::Write { value, .. } => {
            fast.poke(linear, &value.to_le_bytes()[..usize::from(size)]);
        }
        _ => {
            let mut read = [0xa5; 8];
            let from = fast.peek(linear, usize::from(size));
            read[..from.len()].copy_from_slice(&from);
            let load = plain.load().expect("no store");
            let to = &mut fast.gpr[load.register().number()];
            *to = load.result(*to, u64::from_le_bytes(read));
        }
    }
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
fn a_plain_move_does_what_the_general_path_does() {
    let mut rng = Rng(0x0bad_5eed_0001);
    for mode in MODES {
        let mut seen = [0u32; OPCODES.len()];
        for _ in 0..20_000 {
            let (which, bytes) = moving(&mut rng, mode);
            seen[which] += u32::from(compare(&mut rng, mode, &bytes));
        }
        for (opcode, count) in OPCODES.iter().zip(seen) {
            // 63 is ARPL outside 64-bit mode.
            let exists = mode == Mode::Bits64 || **opcode != [0x63];
            assert_eq!(count > 100, exists, "{opcode:02x?} in {mode:?}: {count}");
        }
    }
}

/// Nothing that does more than move is taken for plain, and no move is missed.
#[test]
fn only_moves_are_plain() {
    let mut rng = Rng(0x0bad_5eed_0002);
    let mut plain = 0;
    for round in 0..200_000 {
        let mode = MODES[round % 3];
        let bytes: [u8; MAX_INSN_LEN] = std::array::from_fn(|_| rng.byte());
        let bytes = if rng.one_in(4) {
            moving(&mut rng, mode).1
        } else {
            bytes
        };
        let Ok(insn) = decode(&bytes, mode) else {
            continue;
        };
        let [first, second, third, _] = insn.operands;
        let moves = matches!(insn.op, Op::Mov | Op::Movzx | Op::Movsx);
        let number = |operand| {
            matches!(
                operand,
                Operand::Reg { .. } | Operand::HighByte(_) | Operand::Imm(_)
            )
        };
        let one_memory = match (first, second) {
            (Operand::Mem(_), other) | (other, Operand::Mem(_)) => number(other),
            _ => false,
        };
        let expected = moves && one_memory && third == Operand::None;
        assert_eq!(PlainMove::of(&insn).is_some(), expected, "{insn:?}");
        plain += u32::from(expected);
    }
    assert!(plain > 10_000, "{plain}");
}

/// Each of these does something else besides, or moves something else.
#[test]
fn relatives_of_mov_are_not_plain() {
    let others: [&[u8]; 9] = [
        // movbe eax, [esi]; movbe [esi], eax
        &[0x0f, 0x38, 0xf0, 0x06],
        &[0x0f, 0x38, 0xf1, 0x06],
        // xchg [esi], eax; add [esi], eax; cmp [esi], eax; movs; stos
        &[0x87, 0x06],
        &[0x01, 0x06],
        &[0x39, 0x06],
        &[0xa5],
        &[0xab],
        // mov [esi], ds; mov ds, [esi]
        &[0x8c, 0x1e],
        &[0x8e, 0x1e],
    ];
    for bytes in others {
        let insn = decode(bytes, Mode::Bits32).expect("decodes");
        assert_eq!(PlainMove::of(&insn), None, "{insn:?}");
    }
}

/// An address that depends on a register nobody knows is not made up.
#[test]
fn an_unknown_register_gives_no_address_and_no_value() {
    let of = |bytes: &[u8]| {
        let insn = decode(bytes, Mode::Bits32).expect("decodes");
        PlainMove::of(&insn).expect("is plain")
    };
    let known = |reg: Gpr| (reg != Gpr::Rsp).then_some(4);
    // mov eax, [esp]; mov eax, [ebx]; mov [ebx], esp; mov [ebx], eax
    assert_eq!(of(&[0x8b, 0x04, 0x24]).linear(0, 0, known), None);
    assert_eq!(of(&[0x8b, 0x03]).linear(0, 0x10, known), Some(0x14));
    assert_eq!(of(&[0x89, 0x23]).stored(known), None);
    assert_eq!(of(&[0x89, 0x03]).stored(known), Some(4));
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
            0 => last = moving(&mut rng, mode).1,
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
                assert_eq!(cache.plain(at).copied(), PlainMove::of(&insn));
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
