//! The emulator against the processor this test runs on: the same bytes, the
//! same registers, the same memory, at least 100,000 generated cases in 64-, 32-
//! and 16-bit code. Registers, defined flags, memory, and the exception with its
//! error code and CR2 must agree. Each case then runs again with its memory as
//! MMIO, and must end the same.

mod emulate_cases;
mod emulate_host;
mod emulate_machine;

use std::collections::BTreeMap;

use emulate_cases::{
    Flavor, OPERATIONS, differs_by_maker, flavors, has_all, has_avx512, is_intel, is_undetectable,
    random_bytes, supported, undefined_flags,
};
use emulate_host::{CODE, DATA, DATA_PAGES, Host, Outcome, Registers, START};
use emulate_machine::{Fake, Kind, Rng, STATUS};
use haxm_vmx::emulate::{Gpr, Insn, MAX_INSN_LEN, Mem, Mode, Op, Operand, Seg, Step, decode};

/// Cases in CI; HAXM_CASES in the environment is another number, and another
/// choice of cases.
const CASES: u32 = 120_000;

fn cases() -> u32 {
    let wanted = std::env::var("HAXM_CASES").ok();
    wanted.map_or(CASES, |number| number.parse().expect("a number"))
}
const DF: u64 = 0x400;
const TF: u64 = 0x100;
const USER_FLAGS: u64 = 0x202;

/// One case: the instruction and the state it starts from.
struct Case {
    bytes: Vec<u8>,
    insn: Insn,
    flavor: Flavor,
    before: Fake,
    undefined: u64,
}

struct Bench {
    host: Host,
    rng: Rng,
    pristine: Fake,
    flavors: Vec<Flavor>,
    seen: BTreeMap<String, u32>,
    faults: BTreeMap<u8, u32>,
}

impl Bench {
    fn new() -> Option<Self> {
        let mut host = Host::new()?;
        let mut rng = Rng(0x0dd_ba11_0001 ^ u64::from(cases() ^ CASES) << 32);
        let mut pristine = Fake::new(Mode::Bits64);
        for page in 0..DATA_PAGES {
            let bytes: Vec<u8> = (0..4096).map(|_| rng.byte()).collect();
            host.set_data(page, &bytes);
            let kind = if page == DATA_PAGES - 1 {
                Kind::ReadOnly
            } else {
                Kind::Ram
            };
            pristine.map(DATA + page * 4096, kind).bytes = bytes;
        }
        pristine.cpl = 3;
        let flavors = flavors(&mut host);
        Some(Self {
            host,
            rng,
            pristine,
            flavors,
            seen: BTreeMap::new(),
            faults: BTreeMap::new(),
        })
    }

    /// A linear address near something interesting.
    fn target(&mut self) -> u64 {
        match self.rng.below(24) {
            20..=23 => DATA + self.rng.below(0x1f0) * 16,
            0..=9 => DATA + self.rng.below(0x1f00),
            10..=13 => DATA + 0x1000 - self.rng.below(40) + 4,
            14 | 15 => DATA + 0x2000 - self.rng.below(40) + 4,
            16 => DATA + 0x1800 - self.rng.below(40) + 4,
            17 => DATA + 0x800 - self.rng.below(40) + 4,
            18 => DATA + DATA_PAGES * 4096 - self.rng.below(40) + 4,
            _ => DATA + self.rng.below(8) - 4,
        }
    }

    /// Registers such that the operand's address is `target`, as far as the
    /// encoding lets us.
    fn aim(fake: &mut Fake, insn: &Insn, mem: &Mem, width: u8, target: u64) {
        let Some(base) = mem.base else { return };
        let mut offset = target.wrapping_sub(fake.segments[mem.seg.number()].base);
        if insn.mode == Mode::Bits64 && !matches!(mem.seg, Seg::Fs | Seg::Gs) {
            offset = target;
        }
        offset = offset.wrapping_sub(mem.disp);
        if let Some(index) = mem.index {
            if index == base {
                return;
            }
            offset = offset.wrapping_sub(fake.gpr[index.number()] << mem.scale);
        }
        let old = fake.gpr[base.number()];
        // Junk above the address size must not matter.
        fake.gpr[base.number()] = match width {
            2 => old & !0xffff | offset & 0xffff,
            4 => old & !0xffff_ffff | offset & 0xffff_ffff,
            _ => offset,
        };
    }

    /// Random vectors, as far as the processor has them, and opmasks as programs
    /// use them.
    fn prepare_vectors(&mut self, fake: &mut Fake) {
        let wide = has_avx512();
        let (count, len) = if wide { (32, 64) } else { (16, 32) };
        for vector in &mut fake.vectors[..count] {
            for byte in &mut vector[..len] {
                *byte = self.rng.byte();
            }
        }
        fake.mxcsr = self.rng.next() as u32 & 0xffff;
        for mmx in &mut fake.mmx {
            *mmx = self.rng.next();
        }
        for mask in fake.opmasks.iter_mut().filter(|_| wide) {
            let low = u64::MAX >> self.rng.below(64);
            *mask = self
                .rng
                .pick(&[low, low, !low, low << 3, 0, u64::MAX, self.rng.0]);
        }
        if self.rng.one_in(2) {
            // VMASKMOV and MASKMOVDQU: runs of bytes chosen.
            let (from, until) = (self.rng.below(32), self.rng.below(33));
            for vector in &mut fake.vectors[..count] {
                for (at, byte) in (0..).zip(&mut vector[..32]) {
                    *byte = *byte & 0x7f | u8::from(from <= at && at < until) << 7;
                }
            }
        }
    }

    /// Writes to the data pages, where they are.
    fn poke(&mut self, fake: &mut Fake, address: u64, bytes: &[u8]) {
        for (at, byte) in (address..).zip(bytes) {
            let page = (at >> 12).wrapping_sub(DATA >> 12);
            if page < DATA_PAGES {
                self.pristine.poke(at, &[*byte]);
                fake.poke(at, &[*byte]);
                self.host.set_data(page, &fake.pages[&(at >> 12)].bytes);
            }
        }
    }

    /// Fills in registers for an instruction.
    fn prepare(&mut self, insn: &Insn, flavor: &Flavor) -> Fake {
        let mut fake = self.pristine.clone();
        fake.segments = [flavor.data; 6];
        for (seg, selector) in [
            (Seg::Es, flavor.selectors.data),
            (Seg::Ds, flavor.selectors.data),
        ] {
            fake.segments[seg.number()].selector = selector;
        }
        fake.segments[Seg::Cs.number()] = flavor.cs;
        fake.segments[Seg::Ss.number()] = flavor.ss;
        fake.segments[Seg::Fs.number()].base = flavor.fs_base;
        fake.segments[Seg::Gs.number()].base = flavor.gs_base;
        fake.rip = CODE + START - flavor.cs.base;
        if flavor.mode == Mode::Bits64 {
            fake.rip = CODE + START;
        }
        for reg in &mut fake.gpr {
            *reg = self.rng.value();
        }
        self.prepare_vectors(&mut fake);
        let status = match self.rng.below(4) {
            0 => 0,
            1 => STATUS,
            _ => self.rng.next() & STATUS,
        };
        fake.rflags = USER_FLAGS | status | if self.rng.one_in(3) { DF } else { 0 };
        if insn.op == Op::Pushf {
            fake.rflags |= TF;
        }
        if self.rng.one_in(4) {
            // Divisions that do not overflow.
            fake.gpr[Gpr::Rdx.number()] = self.rng.pick(&[0, 0, u64::MAX]);
        }
        if insn.op.is_string() {
            fake.gpr[Gpr::Rcx.number()] = self.rng.pick(&[0, 1, 2, 3, 17, 40]);
        }
        if let (Op::Bt | Op::Bts | Op::Btr | Op::Btc, Operand::Reg { reg, .. }) =
            (insn.op, insn.operand(1))
        {
            fake.gpr[reg.number()] = (self.rng.below(512) as i64 - 256) as u64;
        }
        // The stack pointer first: an operand may be addressed through it.
        let target = self.target();
        let width = match insn.mode {
            Mode::Bits64 => 8,
            _ if flavor.ss.access & 0x4000 != 0 => 4,
            _ => 2,
        };
        let stack = Mem {
            seg: Seg::Ss,
            base: Some(Gpr::Rsp),
            index: None,
            scale: 0,
            disp: 0,
            rip_relative: false,
            size: 8,
        };
        Self::aim(&mut fake, insn, &stack, width, target);
        if insn.op == Op::Popf {
            // Nothing that would stay in force in the signal handler.
            let flags = self.rng.next() & (STATUS | DF) | 2;
            self.poke(&mut fake, target, &flags.to_le_bytes());
        }
        if matches!(insn.op, Op::Leave | Op::Enter) {
            let frame = Mem {
                base: Some(Gpr::Rbp),
                ..stack
            };
            Self::aim(&mut fake, insn, &frame, width, target);
        }
        if insn.op.is_string() && self.rng.one_in(3) {
            // Equal elements, so that comparisons go on.
            let fill = self.rng.byte();
            for page in [0, 1] {
                let bytes = vec![fill; 4096];
                self.host.set_data(page, &bytes);
                for machine in [&mut fake, &mut self.pristine] {
                    machine.map(DATA + page * 4096, Kind::Ram).bytes = bytes.clone();
                }
            }
            fake.gpr[Gpr::Rax.number()] = u64::from_ne_bytes([fill; 8]);
        }
        for operand in insn.operands {
            if let Operand::Mem(mem) = operand {
                let target = self.target();
                Self::aim(&mut fake, insn, &mem, insn.address_size, target);
                if insn.op == Op::Ldmxcsr {
                    // Bits that every processor has, now and then one that none has.
                    let value = self.rng.next() as u32 & 0xffff;
                    let more = if self.rng.one_in(4) { 1 << 20 } else { 0 };
                    self.poke(&mut fake, target, &(value | more).to_le_bytes());
                }
                if insn.op == Op::Bound && self.rng.one_in(2) {
                    // From the least number to the greatest.
                    let bounds: &[u8] = match mem.size {
                        4 => &[0, 0x80, 0xff, 0x7f],
                        _ => &[0, 0, 0, 0x80, 0xff, 0xff, 0xff, 0x7f],
                    };
                    self.poke(&mut fake, target, bounds);
                }
                if self.rng.one_in(2) && target + 16 <= DATA + DATA_PAGES * 4096 && target >= DATA {
                    expect_memory(&mut fake, insn.op, target);
                }
            }
        }
        fake
    }

    /// Absolute and RIP-relative operands get their address by changing the
    /// instruction's displacement.
    fn patch(&mut self, bytes: &mut [u8; MAX_INSN_LEN], insn: &Insn, flavor: &Flavor) {
        let Some(mem) = insn.memory() else { return };
        if mem.base.is_some() || mem.index.is_some() || insn.op.is_string() {
            return;
        }
        let len = usize::from(insn.len);
        let target = self.target();
        let old = mem.disp.to_le_bytes();
        let width = if insn.address_size == 2 { 2 } else { 4 };
        let Some(at) = bytes[1..len]
            .windows(width)
            .position(|window| window == &old[..width])
        else {
            return;
        };
        let base = match mem.seg {
            Seg::Fs => flavor.fs_base,
            Seg::Gs => flavor.gs_base,
            _ if flavor.mode == Mode::Bits64 => 0,
            Seg::Ss => flavor.ss.base,
            Seg::Cs => flavor.cs.base,
            _ => flavor.data.base,
        };
        let mut new = target.wrapping_sub(base);
        if mem.rip_relative {
            new = new.wrapping_sub(CODE + START + len as u64);
        }
        bytes[1 + at..][..width].copy_from_slice(&new.to_le_bytes()[..width]);
    }

    /// Makes a case; `None` if the bytes are not for us.
    fn generate(&mut self) -> Option<Case> {
        let flavor = self.rng.pick(&self.flavors);
        let mut bytes = random_bytes(&mut self.rng, flavor.mode);
        let insn = decode(&bytes, flavor.mode).ok()?;
        self.patch(&mut bytes, &insn, &flavor);
        let insn = decode(&bytes, flavor.mode).ok()?;
        let other_segment = insn.operands.iter().any(|operand| match operand {
            Operand::Mem(mem) => matches!(mem.seg, Seg::Cs | Seg::Fs | Seg::Gs),
            _ => false,
        });
        let skipped = matches!(insn.op, Op::Ins | Op::Outs)
            || !supported(&insn)
            || is_undetectable(&bytes, &insn)
            || differs_by_maker(&insn)
            || flavor.mode != Mode::Bits64 && other_segment
            || insn.uses_tables()
            || matches!(insn.op, Op::Smsw | Op::Lmsw);
        if skipped {
            return None;
        }
        let before = self.prepare(&insn, &flavor);
        Some(Case {
            bytes: bytes[..usize::from(insn.len)].to_vec(),
            insn,
            flavor,
            undefined: undefined_flags(&insn, &before)?,
            before,
        })
    }

    /// One case. Returns whether it was run on the processor.
    fn case(&mut self) -> bool {
        let Some(case) = self.generate() else {
            return false;
        };
        let mut ours = case.before.clone();
        let (step, _) = ours.run(&case.insn);
        if step == Step::Unsupported && case.insn.op == Op::Enter {
            return false;
        }
        if let Step::Fault(exception) = step {
            // The page may belong to this process, or be the code: do not touch it.
            let foreign = |address: u64| address >> 32 != 0 || address & !0xfff == CODE;
            // An operand past the end of a segment of 4 GB may be #GP (SDM 3A 5.3).
            let wraps = |address: u64| address >= 0xffff_ff00 && !is_intel();
            // Where it faults this processor has done a part already: the return
            // address of CALL, some registers of POPA, pushes of ENTER. Ours has done nothing.
            let partial = matches!(case.insn.op, Op::Call | Op::Pusha | Op::Popa | Op::Enter);
            // BOUND may read both bounds at once.
            let half = |(at, len, _): &(u64, u8, bool)| at & 0x7ff > 0x800 - 2 * u64::from(*len);
            let split = case.insn.op == Op::Bound && !is_intel() && ours.noted.iter().any(half);
            let partial = partial || split;
            // Which of two operands faults first, and the flags then.
            let partial = partial || matches!(case.insn.op, Op::Cmps | Op::Scas) && !is_intel();
            if partial || exception.cr2.is_some_and(|at| foreign(at) || wraps(at)) {
                return false;
            }
        }
        let theirs = self.host.run(
            &case.bytes,
            &registers(&case.before),
            case.flavor.selectors,
            case.insn.op.is_string(),
        );
        let story = Story {
            case: &case,
            ours: &ours,
            step,
            theirs: &theirs,
        };
        story.compare_exception();
        story.compare_registers();
        story.compare_memory(&self.host);
        story.compare_mmio();
        for page in 0..DATA_PAGES {
            let bytes = &ours.pages[&((DATA >> 12) + page)].bytes;
            self.pristine.map(DATA + page * 4096, Kind::Ram).bytes = bytes.clone();
        }
        let name = format!("{:?}", case.insn.op);
        let mut name = name.split('(').next().unwrap_or_default().to_string();
        if case.insn.prefixes.evex {
            name = format!("Evex{name}");
        }
        match step {
            Step::Fault(exception) => *self.faults.entry(exception.vector).or_default() += 1,
            _ => *self.seen.entry(name).or_default() += 1,
        }
        true
    }
}

/// Makes a compare-and-exchange succeed, with junk above what it compares.
fn expect_memory(fake: &mut Fake, op: Op, target: u64) {
    let halves = [fake.peek64(target), fake.peek64(target + 8)];
    match op {
        Op::Cmpxchg => fake.gpr[Gpr::Rax.number()] = halves[0],
        Op::CmpxchgPair if target % 32 == 0 => {
            fake.gpr[Gpr::Rax.number()] = halves[0];
            fake.gpr[Gpr::Rdx.number()] = halves[1];
        }
        Op::CmpxchgPair => {
            fake.gpr[Gpr::Rax.number()] = halves[0] & 0xffff_ffff | 0x5a << 32;
            fake.gpr[Gpr::Rdx.number()] = halves[0] >> 32 | 0xa5 << 32;
        }
        _ => {}
    }
}

fn registers(fake: &Fake) -> Registers {
    Registers {
        gpr: fake.gpr,
        rip: fake.rip,
        rflags: fake.rflags,
        vectors: fake.vectors,
        opmasks: fake.opmasks,
        mxcsr: fake.mxcsr,
        mmx: fake.mmx,
    }
}

/// A case with both results; displayed when they differ.
struct Story<'a> {
    case: &'a Case,
    ours: &'a Fake,
    step: Step,
    theirs: &'a Outcome,
}

impl std::fmt::Display for Story<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (case, ours, theirs) = (self.case, self.ours, &self.theirs.registers);
        writeln!(f, "{:02x?} {:?}", case.bytes, case.insn)?;
        writeln!(f, "data segment {:x?}", case.flavor.data)?;
        let before = &case.before;
        writeln!(f, "before {:x?} flags {:x}", before.gpr, before.rflags)?;
        writeln!(f, "ours {:x?}", self.step)?;
        writeln!(
            f,
            "  {:x?} rip {:x} flags {:x}",
            ours.gpr, ours.rip, ours.rflags
        )?;
        let Outcome {
            vector,
            error_code,
            cr2,
            ..
        } = self.theirs;
        writeln!(f, "theirs vector {vector} code {error_code:x} cr2 {cr2:x}")?;
        write!(
            f,
            "  {:x?} rip {:x} flags {:x}",
            theirs.gpr, theirs.rip, theirs.rflags
        )
    }
}

impl Story<'_> {
    fn compare_exception(&self) {
        match self.step {
            Step::Done => assert_eq!(self.theirs.vector, 1, "should fault: {self}"),
            Step::Fault(exception) => {
                assert_eq!(self.theirs.vector, u64::from(exception.vector), "{self}");
                if let Some(code) = exception.error_code {
                    assert_eq!(self.theirs.error_code, u64::from(code), "code: {self}");
                }
                if let Some(cr2) = exception.cr2 {
                    // Which byte of the page a masked move names is the
                    // processor's choice.
                    let insn = &self.case.insn;
                    let masked = insn.mask.is_some() || insn.op == Op::VecMaskedBytes;
                    let keep = if masked { !0xfff } else { !0 };
                    assert_eq!(self.theirs.cr2 & keep, cr2 & keep, "CR2: {self}");
                }
            }
            _ => panic!("unexpected step: {self}"),
        }
    }

    fn compare_registers(&self) {
        let (case, ours, theirs) = (self.case, self.ours, &self.theirs.registers);
        let insn = &case.insn;
        let done = self.step == Step::Done;
        let flags = (STATUS | DF) & !if done { case.undefined } else { 0 };
        assert_eq!(theirs.rflags & flags, ours.rflags & flags, "flags: {self}");
        let width = match insn.mode {
            Mode::Bits64 => u64::MAX,
            _ => 0xffff_ffff,
        };
        assert_eq!(theirs.rip & width, ours.rip & width, "RIP: {self}");
        // A string instruction with 32-bit addresses that faults, or has nothing to
        // do, may cut its registers to 32 bits on some processors.
        let idle = case.before.gpr[Gpr::Rcx.number()] as u32 == 0;
        let cut = insn.op.is_string() && insn.address_size == 4 && (idle || !done);
        let width = if cut { 0xffff_ffff } else { width };
        for (number, (theirs, ours)) in theirs.gpr.iter().zip(ours.gpr).enumerate() {
            if number < 8 || insn.mode == Mode::Bits64 {
                assert_eq!(theirs & width, ours & width, "register {number}: {self}");
            }
        }
        assert_eq!(theirs.vectors, ours.vectors, "vectors: {self}");
        assert_eq!(theirs.mmx, ours.mmx, "MMX: {self}");
        assert_eq!(theirs.opmasks, ours.opmasks, "opmasks: {self}");
        assert_eq!(theirs.mxcsr, ours.mxcsr, "MXCSR: {self}");
    }

    fn compare_memory(&self, host: &Host) {
        for page in 0..DATA_PAGES {
            let theirs = host.data(page);
            let ours = &self.ours.pages[&((DATA >> 12) + page)].bytes;
            if theirs != *ours {
                let at = theirs.iter().zip(ours).position(|(a, b)| a != b);
                panic!("memory page {page} at {at:x?}: {self}");
            }
        }
    }

    /// The same case with user space answering for one page, then for two.
    fn compare_mmio(&self) {
        for second in [false, true] {
            let mut mmio = self.case.before.clone();
            mmio.set_kind(DATA, Kind::Mmio);
            if second {
                mmio.set_kind(DATA + 4096, Kind::Mmio);
            }
            let (last, _) = mmio.run(&self.case.insn);
            let ours = self.ours;
            assert_eq!(last, self.step, "with MMIO: {self}");
            assert_eq!(mmio.gpr, ours.gpr, "with MMIO: {self}");
            assert_eq!(mmio.rip, ours.rip, "with MMIO: {self}");
            assert_eq!(mmio.rflags, ours.rflags, "with MMIO: {self}");
            assert_eq!(mmio.vectors, ours.vectors, "with MMIO: {self}");
            assert_eq!(mmio.mxcsr, ours.mxcsr, "with MMIO: {self}");
            for (page, theirs) in &mmio.pages {
                assert!(theirs.bytes == ours.pages[page].bytes, "with MMIO: {self}");
            }
        }
    }
}

#[test]
fn agrees_with_this_processor() {
    let Some(mut bench) = Bench::new() else {
        eprintln!("skipped: this processor has no AVX2");
        return;
    };
    let mut done = 0;
    while done < cases() {
        done += u32::from(bench.case());
    }
    eprintln!("completed {:?}\nfaulted {:?}", bench.seen, bench.faults);
    // The comparison is worth something only if every operation completes often
    // and faults occur.
    for name in OPERATIONS {
        let count = bench.seen.get(name).copied().unwrap_or(0);
        assert!(count >= 20 || !has_all(), "{name} completed {count} times");
    }
    for name in [
        "EvexVecMove",
        "EvexVecMoveAligned",
        "EvexVecLoad",
        "EvexVecStore",
        "EvexVecBroadcast",
        "EvexVecInsert",
        "EvexVecExtract",
    ] {
        let count = bench.seen.get(name).copied().unwrap_or(0);
        assert!(
            count >= 20 || !has_avx512(),
            "{name} completed {count} times"
        );
    }
    for vector in [0, 5, 12, 13, 14] {
        let count = bench.faults.get(&vector).copied().unwrap_or(0);
        assert!(count >= 100, "vector {vector} occurred {count} times");
    }
}
