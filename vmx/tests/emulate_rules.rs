//! The rules around an access: segment rights and limits, canonical addresses,
//! alignment, whether vector registers are enabled, privilege of PUSHF, branch
//! targets.

mod emulate_machine;

use emulate_machine::{Fake, Kind, flat};
use haxm_vmx::emulate::{Exception, Gpr, Machine, Mode, Seg, Step, decode};

const PAGE: u64 = 0x5000;
const GP: Step = Step::Fault(Exception::PROTECTION);
const SS: Step = Step::Fault(Exception::STACK);
const AC: Step = Step::Fault(Exception::ALIGNMENT);
const UD: Step = Step::Fault(Exception::INVALID_OPCODE);
const NM: Step = Step::Fault(Exception::NO_DEVICE);

/// mov [rbx], al / mov al, [rbx] / mov al, [rbp] / mov cs:[rbx], al: the same
/// bytes in 32- and 64-bit code.
const STORE: &[u8] = &[0x88, 0x03];
const LOAD: &[u8] = &[0x8a, 0x03];
const LOAD_STACK: &[u8] = &[0x8a, 0x45, 0];
const STORE_CODE: &[u8] = &[0x2e, 0x88, 0x03];
const LOAD_CODE: &[u8] = &[0x2e, 0x8a, 0x03];
const LOAD_DWORD: &[u8] = &[0x8b, 0x03];

fn machine(mode: Mode) -> Fake {
    let mut fake = Fake::new(mode);
    fake.map(PAGE, Kind::Mmio);
    fake.map(PAGE + 0x1000, Kind::Ram);
    for reg in [Gpr::Rbx, Gpr::Rbp, Gpr::Rsp] {
        fake.gpr[reg.number()] = PAGE;
    }
    fake
}

fn run(fake: &mut Fake, mode: Mode, code: &[u8]) -> Step {
    fake.run(&decode(code, mode).expect("an emulated instruction"))
        .0
}

#[test]
fn segment_rights() {
    const BITS: Mode = Mode::Bits32;
    let with = |seg: Seg, access: u32, code: &[u8]| {
        let mut fake = machine(BITS);
        fake.segments[seg.number()] = flat(access);
        run(&mut fake, BITS, code)
    };
    assert_eq!(with(Seg::Ds, 0xc093, STORE), Step::Done);
    // Read-only data.
    assert_eq!(with(Seg::Ds, 0xc091, STORE), GP);
    assert_eq!(with(Seg::Ds, 0xc091, LOAD), Step::Done);
    // Unusable, as a null selector leaves it; not present.
    assert_eq!(with(Seg::Ds, 0x1_c093, LOAD), GP);
    assert_eq!(with(Seg::Ds, 0xc013, LOAD), GP);
    assert_eq!(with(Seg::Ss, 0x1_c093, LOAD_STACK), SS);
    // Code: never written, read only if readable.
    assert_eq!(with(Seg::Cs, 0xc09b, STORE_CODE), GP);
    assert_eq!(with(Seg::Cs, 0xc09b, LOAD_CODE), Step::Done);
    assert_eq!(with(Seg::Cs, 0xc099, LOAD_CODE), GP);
}

#[test]
fn real_and_virtual_8086_mode_have_no_rights_but_limits() {
    // mov cs:[bx], al; mov ax, [bx]; mov ax, [bp]
    let (store_code, load, load_stack) = (&[0x2e, 0x88, 0x07], &[0x8b, 0x07], &[0x8b, 0x46, 0]);
    let mode = Mode::Bits16;
    for virtual_8086 in [false, true] {
        let mut fake = machine(mode);
        if virtual_8086 {
            fake.rflags |= 1 << 17;
            fake.cpl = 3;
        } else {
            fake.cr0 &= !1;
        }
        for segment in &mut fake.segments {
            segment.limit = 0xffff;
        }
        fake.map(0xf000, Kind::Ram);
        assert_eq!(run(&mut fake, mode, store_code), Step::Done);
        fake.gpr[Gpr::Rbx.number()] = 0xffff;
        fake.gpr[Gpr::Rbp.number()] = 0xffff;
        assert_eq!(run(&mut fake, mode, load), GP);
        assert_eq!(run(&mut fake, mode, load_stack), SS);
        fake.gpr[Gpr::Rbx.number()] = 0xfffe;
        assert_eq!(run(&mut fake, mode, load), Step::Done);
    }
}

#[test]
fn limits_up_and_down() {
    const BITS: Mode = Mode::Bits32;
    let with = |access: u32, limit: u64, code: &[u8]| {
        let mut fake = machine(BITS);
        let mut segment = flat(access);
        segment.limit = limit as u32;
        fake.segments[Seg::Ds.number()] = segment;
        run(&mut fake, BITS, code)
    };
    assert_eq!(with(0x4093, PAGE + 3, LOAD_DWORD), Step::Done);
    assert_eq!(with(0x4093, PAGE + 2, LOAD_DWORD), GP);
    // Expand-down: everything above the limit.
    assert_eq!(with(0x4097, PAGE - 1, LOAD_DWORD), Step::Done);
    assert_eq!(with(0x4097, PAGE, LOAD_DWORD), GP);
    // With a 64 KB top the same offset is inside, one beyond is not.
    assert_eq!(with(0x0097, PAGE - 1, LOAD_DWORD), Step::Done);
    let mut fake = machine(BITS);
    fake.map(0xf000, Kind::Ram);
    fake.map(0x1_0000, Kind::Ram);
    fake.segments[Seg::Ds.number()] = flat(0x0097);
    fake.segments[Seg::Ds.number()].limit = 0xfff;
    fake.gpr[Gpr::Rbx.number()] = 0xfffd;
    assert_eq!(run(&mut fake, BITS, LOAD_DWORD), GP);
    fake.gpr[Gpr::Rbx.number()] = 0xfffc;
    assert_eq!(run(&mut fake, BITS, LOAD_DWORD), Step::Done);
}

#[test]
fn segment_bases() {
    // Outside 64-bit mode every base counts and addresses wrap at 4 GB.
    let mut fake = machine(Mode::Bits32);
    fake.segments[Seg::Ds.number()].base = 0xffff_f000;
    fake.gpr[Gpr::Rbx.number()] = PAGE + 0x1000;
    fake.poke(PAGE, &[0x5a]);
    assert_eq!(run(&mut fake, Mode::Bits32, LOAD), Step::Done);
    assert_eq!(fake.gpr[0], 0x5a);
    // So does the second part of an access.
    fake.map(0xffff_f000, Kind::Ram);
    fake.map(0, Kind::Mmio);
    fake.poke(0xffff_fffe, &[1, 2]);
    fake.poke(0, &[3, 4]);
    fake.gpr[Gpr::Rbx.number()] = 0xffe;
    assert_eq!(run(&mut fake, Mode::Bits32, LOAD_DWORD), Step::Done);
    assert_eq!(fake.gpr[0], 0x0403_0201);
    // In 64-bit mode only FS and GS have one, and limits and rights do not.
    let mut fake = machine(Mode::Bits64);
    for segment in &mut fake.segments {
        *segment = flat(0x1_0000);
        segment.limit = 0;
        segment.base = 0x1000;
    }
    fake.poke(PAGE, &[0x5a]);
    fake.poke(PAGE + 0x1000, &[0xa5]);
    assert_eq!(run(&mut fake, Mode::Bits64, LOAD), Step::Done);
    assert_eq!(fake.gpr[0], 0x5a);
    assert_eq!(
        run(&mut fake, Mode::Bits64, &[0x65, 0x8a, 0x03]),
        Step::Done
    );
    assert_eq!(fake.gpr[0], 0xa5);
}

#[test]
fn canonical_addresses() {
    let mode = Mode::Bits64;
    for (wide, edge) in [(false, 1u64 << 47), (true, 1 << 56)] {
        let mut fake = machine(mode);
        fake.wide_linear = wide;
        let mut at = |address: u64, code: &[u8]| {
            fake.gpr[Gpr::Rbx.number()] = address;
            fake.gpr[Gpr::Rbp.number()] = address;
            run(&mut fake, mode, code)
        };
        let fault = |address| Step::Fault(Exception::page_fault(0, address));
        assert_eq!(at(edge, LOAD), GP);
        assert_eq!(at(edge, LOAD_STACK), SS);
        assert_eq!(at(edge.wrapping_neg().wrapping_sub(1), LOAD), GP);
        // The last byte counts as well as the first.
        assert_eq!(at(edge - 2, LOAD_DWORD), GP);
        assert_eq!(at(edge - 4, LOAD_DWORD), fault(edge - 4));
        assert_eq!(at(edge.wrapping_neg(), LOAD), fault(edge.wrapping_neg()));
    }
}

#[test]
fn alignment_check() {
    const AM: u64 = 1 << 18;
    let with = |cr0: u64, flag: u64, cpl: u8, code: &[u8], address: u64| {
        let mut fake = machine(Mode::Bits64);
        fake.cr0 |= cr0;
        fake.rflags |= flag;
        fake.cpl = cpl;
        fake.gpr[Gpr::Rbx.number()] = address;
        run(&mut fake, Mode::Bits64, code)
    };
    assert_eq!(with(AM, AM, 3, LOAD_DWORD, PAGE + 2), AC);
    assert_eq!(with(AM, AM, 3, LOAD_DWORD, PAGE + 4), Step::Done);
    assert_eq!(with(AM, AM, 3, LOAD, PAGE + 1), Step::Done);
    assert_eq!(with(AM, AM, 0, LOAD_DWORD, PAGE + 2), Step::Done);
    assert_eq!(with(0, AM, 3, LOAD_DWORD, PAGE + 2), Step::Done);
    assert_eq!(with(AM, 0, 3, LOAD_DWORD, PAGE + 2), Step::Done);
}

#[test]
fn vector_registers_must_be_enabled() {
    // movups xmm0, [rbx]; vmovups ymm0, [rbx]
    let (sse, avx) = (&[0x0f, 0x10, 0x03][..], &[0xc5, 0xfc, 0x10, 0x03][..]);
    let with = |change: fn(&mut Fake), code: &[u8]| {
        let mut fake = machine(Mode::Bits64);
        change(&mut fake);
        run(&mut fake, Mode::Bits64, code)
    };
    assert_eq!(with(|_| {}, sse), Step::Done);
    assert_eq!(with(|_| {}, avx), Step::Done);
    assert_eq!(with(|fake| fake.cr0 |= 4, sse), UD);
    assert_eq!(with(|fake| fake.cr4 &= !(1 << 9), sse), UD);
    assert_eq!(with(|fake| fake.cr0 |= 8, sse), NM);
    assert_eq!(with(|fake| fake.cr0 |= 8, avx), NM);
    assert_eq!(with(|fake| fake.cr4 &= !(1 << 18), avx), UD);
    assert_eq!(with(|fake| fake.xcr0 = 3, avx), UD);
    // CR0.EM and CR4.OSFXSR say nothing about AVX.
    assert_eq!(with(|fake| fake.cr0 |= 4, avx), Step::Done);
    assert_eq!(with(|fake| fake.cr4 &= !(1 << 9), avx), Step::Done);
    // No VEX in real and virtual-8086 mode, not even for ANDN.
    for avx in [
        &[0xc5u8, 0xfc, 0x10, 0x07][..],
        &[0xc4, 0xe2, 0x70, 0xf2, 0x07],
    ] {
        for real in [true, false] {
            let mut fake = machine(Mode::Bits16);
            if real {
                fake.cr0 &= !1;
            } else {
                fake.rflags |= 1 << 17;
            }
            assert_eq!(run(&mut fake, Mode::Bits16, avx), UD);
        }
    }
}

#[test]
fn vector_moves_keep_or_clear_what_is_above() {
    let start = [0xeeu8; 64];
    let with = |code: &[u8]| {
        let mut fake = machine(Mode::Bits64);
        let bytes: Vec<u8> = (1..=64).collect();
        fake.poke(PAGE, &bytes);
        fake.vectors = [start; 32];
        assert_eq!(
            run(&mut fake, Mode::Bits64, code),
            Step::Done,
            "{code:02x?}"
        );
        fake.vector(0)
    };
    let expect = |first: usize, fill: u8, rest: u8| {
        let mut out = [rest; 64];
        out[..16].fill(fill);
        for (i, byte) in out[..first].iter_mut().enumerate() {
            *byte = i as u8 + 1;
        }
        out
    };
    // Legacy SSE keeps bits 255:128, VEX clears everything above.
    assert_eq!(with(&[0x0f, 0x10, 0x03]), expect(16, 0, 0xee));
    assert_eq!(with(&[0xc5, 0xf8, 0x10, 0x03]), expect(16, 0, 0));
    assert_eq!(with(&[0xc5, 0xfc, 0x10, 0x03]), expect(32, 0, 0));
    // EVEX of each length.
    assert_eq!(
        with(&[0x62, 0xf1, 0x7c, 0x08, 0x10, 0x03]),
        expect(16, 0, 0)
    );
    assert_eq!(
        with(&[0x62, 0xf1, 0x7c, 0x28, 0x10, 0x03]),
        expect(32, 0, 0)
    );
    assert_eq!(
        with(&[0x62, 0xf1, 0x7c, 0x48, 0x10, 0x03]),
        expect(64, 0, 0)
    );
    // Loads of an element clear the rest of the XMM register.
    assert_eq!(with(&[0xf3, 0x0f, 0x10, 0x03]), expect(4, 0, 0xee));
    assert_eq!(with(&[0xf2, 0x0f, 0x10, 0x03]), expect(8, 0, 0xee));
    assert_eq!(with(&[0xf3, 0x0f, 0x7e, 0x03]), expect(8, 0, 0xee));
    // MOVLPS keeps the other half.
    assert_eq!(with(&[0x0f, 0x12, 0x03]), expect(8, 0xee, 0xee));
}

/// What a mask leaves out is neither read nor written, and cannot fault.
#[test]
fn masked_moves_touch_what_the_mask_says() {
    const EDGE: u64 = PAGE + 0x1ff0;
    // vmovdqu8 zmm0{k1}, [rbx]; with {z}; vmovdqu8 [rbx]{k1}, zmm0
    let merging = [0x62, 0xf1, 0x7f, 0x49, 0x6f, 0x03];
    let zeroing = [0x62, 0xf1, 0x7f, 0xc9, 0x6f, 0x03];
    let store = [0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x03];
    let machine = |at: u64, mask: u64| {
        let mut fake = machine(Mode::Bits64);
        let bytes: Vec<u8> = (1..=16).collect();
        fake.poke(EDGE, &bytes);
        fake.gpr[Gpr::Rbx.number()] = at;
        fake.vectors[0] = [0xee; 64];
        fake.opmasks[1] = mask;
        fake
    };
    for (code, rest) in [(merging, 0xee), (zeroing, 0)] {
        // 16 bytes are there, and the page behind is not.
        let mut fake = machine(EDGE, 0xf00f);
        assert_eq!(run(&mut fake, Mode::Bits64, &code), Step::Done);
        let mut wanted = [rest; 64];
        wanted[..4].copy_from_slice(&[1, 2, 3, 4]);
        wanted[12..16].copy_from_slice(&[13, 14, 15, 16]);
        assert_eq!(fake.vectors[0], wanted);
        let mut fake = machine(EDGE, 1 << 16);
        let fault = run(&mut fake, Mode::Bits64, &code);
        assert_eq!(fault, Step::Fault(Exception::page_fault(0, PAGE + 0x2000)));
        assert_eq!(fake.vectors[0], [0xee; 64]);
    }
    let mut fake = machine(EDGE, 0xf00f);
    assert_eq!(run(&mut fake, Mode::Bits64, &store), Step::Done);
    let wanted = [
        0xee, 0xee, 0xee, 0xee, 5, 6, 7, 8, 9, 10, 11, 12, 0xee, 0xee, 0xee, 0xee,
    ];
    assert_eq!(fake.peek(EDGE, 16), wanted);
    // Device memory sees the chosen bytes only, in the pieces it knows; the RAM
    // behind it is written last.
    let mut fake = machine(PAGE + 0xff0, 0x3_f00c);
    let (step, asked) = fake.run(&decode(&store, Mode::Bits64).expect("emulated"));
    let write = |at: u64, size: u8| Step::Write {
        gpa: PAGE + 0xff0 + at,
        size,
        value: u64::MAX >> (64 - 8 * u32::from(size)) & 0xeeee_eeee_eeee_eeee,
    };
    assert_eq!((step, asked), (Step::Done, vec![write(2, 2), write(12, 4)]));
    assert_eq!(fake.peek(PAGE + 0x1000, 3), [0xee, 0xee, 0]);
    // Every second byte, all of them requests.
    let mut fake = machine(PAGE, 0x5555_5555_5555_5555);
    let (step, asked) = fake.run(&decode(&store, Mode::Bits64).expect("emulated"));
    assert_eq!((step, asked.len()), (Step::Done, 32));
    // Nothing chosen, nothing there.
    let mut fake = machine(1 << 32, 0);
    assert_eq!(run(&mut fake, Mode::Bits64, &store), Step::Done);
}

#[test]
fn avx_512_must_be_enabled() {
    // vmovdqu64 zmm0, [rbx]
    let code = [0x62, 0xf1, 0xfe, 0x48, 0x6f, 0x03];
    for (xcr0, wanted) in [
        (0xe7, Step::Done),
        (7, UD),
        (0x67, UD),
        (0xa7, UD),
        (0xc7, UD),
    ] {
        let mut fake = machine(Mode::Bits64);
        fake.xcr0 = xcr0;
        assert_eq!(run(&mut fake, Mode::Bits64, &code), wanted, "{xcr0:#x}");
    }
}

#[test]
fn mmx_needs_the_x87_unit() {
    const MF: Step = Step::Fault(Exception::FLOATING_POINT);
    // movq mm3, [rbx]; movq [rbx], mm3; movntq [rbx], mm3
    for code in [[0x0f, 0x6f, 0x1b], [0x0f, 0x7f, 0x1b], [0x0f, 0xe7, 0x1b]] {
        let with = |change: fn(&mut Fake)| {
            let mut fake = machine(Mode::Bits32);
            fake.mmx[3] = 0x1122_3344_5566_7788;
            change(&mut fake);
            let step = run(&mut fake, Mode::Bits32, &code);
            assert_eq!(fake.mmx_ended, u32::from(step == Step::Done));
            step
        };
        assert_eq!(with(|_| {}), Step::Done);
        // CR4.OSFXSR says nothing about MMX.
        assert_eq!(with(|fake| fake.cr4 = 0), Step::Done);
        assert_eq!(with(|fake| fake.cr0 |= 4), UD);
        assert_eq!(with(|fake| fake.cr0 |= 8), NM);
        assert_eq!(with(|fake| fake.x87_error = true), MF);
    }
}

#[test]
fn aligned_vector_moves_must_be_aligned() {
    // movaps, vmovaps ymm, lock cmpxchg16b
    for (code, size) in [
        (&[0x0f, 0x28, 0x03][..], 16),
        (&[0x0f, 0x29, 0x03], 16),
        (&[0xc5, 0xfc, 0x28, 0x03], 32),
        (&[0x66, 0x0f, 0xe7, 0x03], 16),
        (&[0xf0, 0x48, 0x0f, 0xc7, 0x0b], 16),
    ] {
        let mut fake = machine(Mode::Bits64);
        assert_eq!(
            run(&mut fake, Mode::Bits64, code),
            Step::Done,
            "{code:02x?}"
        );
        for wrong in [1, 8, size / 2] {
            fake.gpr[Gpr::Rbx.number()] = PAGE + wrong;
            assert_eq!(
                run(&mut fake, Mode::Bits64, code),
                GP,
                "{code:02x?} {wrong}"
            );
        }
        // Through SS it is #GP too.
        fake.gpr[Gpr::Rbx.number()] = 1 << 47 | 1;
        assert_eq!(run(&mut fake, Mode::Bits64, code), GP);
    }
}

#[test]
fn pushf_in_virtual_8086_mode_needs_iopl() {
    let mode = Mode::Bits16;
    let mut fake = machine(mode);
    fake.rflags |= 1 << 17 | 1 << 16;
    fake.cpl = 3;
    fake.cr4 &= !1;
    fake.gpr[Gpr::Rsp.number()] = PAGE + 0x100;
    let insn = decode(&[0x9c], mode).expect("emulated");
    assert_eq!(fake.run(&insn).0, GP);
    fake.cr4 |= 1;
    assert_eq!(fake.run(&insn).0, Step::Unsupported);
    fake.rflags |= 3 << 12;
    assert_eq!(fake.run(&insn).0, Step::Done);
    // A 32-bit image has neither VM nor RF.
    let insn = decode(&[0x66, 0x9c], mode).expect("emulated");
    fake.rflags |= 1 << 16;
    assert_eq!(fake.run(&insn).0, Step::Done);
    let pushed = fake.peek64(fake.gpr[Gpr::Rsp.number()]) as u32;
    assert_eq!(pushed, 0x3002);
}

#[test]
fn branch_targets_are_checked_before_the_stack_changes() {
    // jmp [rbx] and call [rbx] to a non-canonical address
    let mut fake = machine(Mode::Bits64);
    fake.gpr[Gpr::Rsp.number()] = PAGE + 0x1800;
    fake.poke(PAGE, &(1u64 << 47).to_le_bytes());
    let before = fake.clone();
    for code in [&[0xff, 0x23], &[0xff, 0x13]] {
        assert_eq!(run(&mut fake, Mode::Bits64, code), GP);
        assert_eq!((fake.gpr, fake.rip), (before.gpr, before.rip));
        assert!(fake.pages[&6].bytes == before.pages[&6].bytes);
    }
    // Beyond the limit of CS in 32-bit code.
    let mut fake = machine(Mode::Bits32);
    fake.segments[Seg::Cs.number()].limit = 0xffff;
    fake.gpr[Gpr::Rsp.number()] = PAGE + 0x1800;
    fake.poke(PAGE, &0x1_0000u32.to_le_bytes());
    assert_eq!(run(&mut fake, Mode::Bits32, &[0xff, 0x13]), GP);
    fake.poke(PAGE, &0xffffu32.to_le_bytes());
    assert_eq!(run(&mut fake, Mode::Bits32, &[0xff, 0x13]), Step::Done);
    assert_eq!(fake.rip, 0xffff);
    assert_eq!(fake.peek(PAGE + 0x17fc, 4), 0x1002u32.to_le_bytes());
}

#[test]
fn division_errors_change_nothing() {
    // div byte [rbx], idiv dword [rbx], div qword [rbx]
    let rows: &[(&[u8], u64, u64, u64)] = &[
        (&[0xf6, 0x33], 0, 1, 0),
        (&[0xf6, 0x33], 1, 0x100, 0),
        (&[0xf7, 0x3b], 0xffff_ffff, 0x8000_0000, 0xffff_ffff),
        (&[0x48, 0xf7, 0x33], 5, 0, 5),
    ];
    for (code, divisor, rax, rdx) in rows {
        let mut fake = machine(Mode::Bits64);
        fake.poke(PAGE, &divisor.to_le_bytes());
        fake.gpr[0] = *rax;
        fake.gpr[Gpr::Rdx.number()] = *rdx;
        let before = fake.gpr;
        let step = run(&mut fake, Mode::Bits64, code);
        assert_eq!(step, Step::Fault(Exception::DIVIDE), "{code:02x?}");
        assert_eq!((fake.gpr, fake.rip), (before, 0x1000));
    }
}

#[test]
fn pop_addresses_its_operand_with_the_new_stack_pointer() {
    // pop qword [rsp + 8]
    let mut fake = machine(Mode::Bits64);
    fake.poke(PAGE, &0x1234u64.to_le_bytes());
    assert_eq!(
        run(&mut fake, Mode::Bits64, &[0x8f, 0x44, 0x24, 8]),
        Step::Done
    );
    assert_eq!(fake.peek64(PAGE + 16), 0x1234);
    assert_eq!(fake.gpr[Gpr::Rsp.number()], PAGE + 8);
    // pop word [esp] on a 16-bit stack that wraps: SP goes from fffe to 0, the
    // rest of ESP stays.
    let mut fake = machine(Mode::Bits16);
    fake.map(0xf000, Kind::Ram);
    fake.map(0x2_0000, Kind::Ram);
    fake.gpr[Gpr::Rsp.number()] = 0x2_fffe;
    fake.poke(0xfffe, &[0x78, 0x56]);
    assert_eq!(
        run(&mut fake, Mode::Bits16, &[0x67, 0x8f, 0x04, 0x24]),
        Step::Done
    );
    assert_eq!(fake.peek(0x2_0000, 2), [0x78, 0x56]);
    assert_eq!(fake.gpr[Gpr::Rsp.number()], 0x2_0000);
}

#[test]
fn accesses_are_noted_for_data_breakpoints() {
    let stack = PAGE + 0x1800;
    // The instruction and what it touches.
    type Row<'a> = (&'a [u8], &'a [(u64, u8, bool)]);
    let rows: &[Row<'_>] = &[
        (LOAD, &[(PAGE, 1, false)]),
        (STORE, &[(PAGE, 1, true)]),
        // add [rbx], eax
        (&[0x01, 0x03], &[(PAGE, 4, true)]),
        // movups xmm0, [rbx]
        (&[0x0f, 0x10, 0x03], &[(PAGE, 16, false)]),
        // push qword [rbx]
        (&[0xff, 0x33], &[(PAGE, 8, false), (stack - 8, 8, true)]),
        // movsq
        (&[0x48, 0xa5], &[(PAGE, 8, false), (stack, 8, true)]),
        // nop [rbx]
        (&[0x0f, 0x1f, 0x03], &[]),
    ];
    for (code, wanted) in rows {
        let mut fake = machine(Mode::Bits64);
        fake.gpr[Gpr::Rsp.number()] = stack;
        fake.gpr[Gpr::Rsi.number()] = PAGE;
        fake.gpr[Gpr::Rdi.number()] = stack;
        assert_eq!(run(&mut fake, Mode::Bits64, code), Step::Done);
        assert_eq!(fake.noted, *wanted, "{code:02x?}");
    }
}

#[test]
fn the_instruction_pointer_wraps_at_four_gigabytes() {
    for (mode, wanted) in [(Mode::Bits32, 0), (Mode::Bits64, 1 << 32)] {
        let mut fake = machine(mode);
        fake.rip = 0xffff_fffe;
        assert_eq!(run(&mut fake, mode, LOAD), Step::Done);
        assert_eq!(fake.rip, wanted);
    }
}

/// A masked extraction faults for all of its operand, a masked move only for what it moves.
#[test]
fn a_mask_hides_no_fault_of_an_extraction() {
    // vextracti32x4 [rbx] {k1}, zmm0, 0; vmovdqu32 [rbx] {k1}, xmm0. The second half lies in no page.
    let extract: &[u8] = &[0x62, 0xf3, 0x7d, 0x49, 0x39, 0x03, 0];
    let store: &[u8] = &[0x62, 0xf1, 0x7e, 0x09, 0x7f, 0x03];
    for (code, faults) in [(extract, true), (store, false)] {
        let mut fake = machine(Mode::Bits64);
        fake.gpr[Gpr::Rbx.number()] = PAGE + 0x2000 - 8;
        fake.opmasks[1] = 3;
        let step = run(&mut fake, Mode::Bits64, code);
        let fault = matches!(step, Step::Fault(Exception { vector: 14, .. }));
        assert_eq!(fault, faults, "{code:02x?}: {step:?}");
    }
}

/// One element goes into a register, or out of one, where the instruction says; the rest stays.
#[test]
fn elements_of_vectors() {
    let pattern: Vec<u8> = (0x80..0xc0).collect();
    // Code, and the bytes of the register that change.
    let insertions: [(&[u8], std::ops::Range<usize>); 7] = [
        // pinsrb, pinsrw, pinsrd, pinsrq xmm0, [rbx], number; bits beyond the last element mean nothing.
        (&[0x66, 0x0f, 0x3a, 0x20, 0x03, 0xf5], 5..6),
        (&[0x66, 0x0f, 0xc4, 0x03, 0x0e], 12..14),
        (&[0x66, 0x0f, 0x3a, 0x22, 0x03, 0x07], 12..16),
        (&[0x66, 0x48, 0x0f, 0x3a, 0x22, 0x03, 0x01], 8..16),
        // movlps, movhps.
        (&[0x0f, 0x12, 0x03], 0..8),
        (&[0x0f, 0x16, 0x03], 8..16),
        // vinserti32x4 zmm0, zmm0, [rbx], 2.
        (&[0x62, 0xf3, 0x7d, 0x48, 0x38, 0x03, 2], 32..48),
    ];
    for (code, place) in insertions {
        let mut fake = machine(Mode::Bits64);
        fake.poke(PAGE, &pattern);
        fake.vectors = [[0x11; 64]; 32];
        let mut wanted = [0x11; 64];
        wanted[place.clone()].copy_from_slice(&pattern[..place.len()]);
        assert_eq!(run(&mut fake, Mode::Bits64, code), Step::Done);
        assert_eq!(fake.vector(0), wanted, "{code:02x?}");
    }
    let extractions: [(&[u8], std::ops::Range<usize>); 6] = [
        (&[0x66, 0x0f, 0x3a, 0x14, 0x03, 0x1d], 13..14),
        (&[0x66, 0x0f, 0x3a, 0x15, 0x03, 0x03], 6..8),
        (&[0x66, 0x0f, 0x3a, 0x16, 0x03, 0x02], 8..12),
        (&[0x66, 0x0f, 0x3a, 0x17, 0x03, 0x03], 12..16),
        (&[0x0f, 0x17, 0x03], 8..16),
        // vextracti64x4 [rbx], zmm0, 1.
        (&[0x62, 0xf3, 0xfd, 0x48, 0x3b, 0x03, 1], 32..64),
    ];
    for (code, place) in extractions {
        let mut fake = machine(Mode::Bits64);
        fake.vectors[0].copy_from_slice(&pattern);
        assert_eq!(run(&mut fake, Mode::Bits64, code), Step::Done);
        let mut wanted = pattern[place.clone()].to_vec();
        wanted.extend([0; 8]);
        assert_eq!(fake.peek(PAGE, wanted.len()), wanted, "{code:02x?}");
    }
}
