//! Any instruction from any state: execution ends, never panics, and gives the
//! same result whether its memory is RAM or is answered by user space.
#![no_main]

#[path = "../../../vmx/tests/emulate_machine/mod.rs"]
mod emulate_machine;

use emulate_machine::{Fake, Kind, Rng};
use haxm_vmx::emulate::{MAX_INSN_LEN, Mode, Op, Step, Table, decode};
use libfuzzer_sys::fuzz_target;

/// Three pages, the last refusing writes.
const PAGES: [u64; 3] = [0x1000, 0x2000, 0x3000];

/// Takes numbers from the input; zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    /// A register: near the pages, small, or anything.
    fn register(&mut self) -> u64 {
        let kind = self.byte();
        let low = u64::from(self.byte()) | u64::from(self.byte()) << 8;
        match kind & 3 {
            0 => PAGES[0] + low % 0x3000,
            1 => low,
            2 => (low as u16 as i16) as u64,
            _ => low << (kind >> 2),
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mode = match input.byte() % 3 {
        0 => Mode::Bits16,
        1 => Mode::Bits32,
        _ => Mode::Bits64,
    };
    let mut code = [0; MAX_INSN_LEN];
    for byte in &mut code {
        *byte = input.byte();
    }
    let Ok(insn) = decode(&code, mode) else {
        return;
    };
    if matches!(insn.op, Op::Ins | Op::Outs) {
        return;
    }
    let mut ram = Fake::new(mode);
    let mut rng = Rng(u64::from(input.byte()) + 1);
    for page in PAGES {
        for byte in &mut ram.map(page, Kind::Ram).bytes {
            *byte = rng.byte();
        }
    }
    ram.set_kind(PAGES[2], Kind::ReadOnly);
    for reg in 0..16 {
        ram.gpr[reg] = input.register();
    }
    ram.gpr[1] &= 0xff;
    ram.rflags = 2 | (u64::from(input.byte()) | u64::from(input.byte()) << 8) & 0x4cd5;
    ram.cpl = input.byte() & 3;
    for segment in &mut ram.segments {
        let byte = input.byte();
        if byte & 1 != 0 {
            segment.limit = u32::from(byte) << 6;
        }
        if byte & 2 != 0 {
            segment.base = u64::from(byte) << 4;
        }
    }
    ram.mxcsr = rng.next() as u32 & 0xffff;
    for mask in &mut ram.opmasks {
        *mask = input.register();
    }
    ram.tables[Table::Gdt as usize].base = PAGES[1];
    ram.tables[Table::Gdt as usize].limit = 0x7f;
    let mut mmio = ram.clone();
    let choice = input.byte();
    if choice & 1 != 0 {
        mmio.set_kind(PAGES[0], Kind::Mmio);
    }
    // Descriptors are not read from devices.
    if choice & 2 != 0 && !insn.uses_tables() {
        mmio.set_kind(PAGES[1], Kind::Mmio);
    }
    let (wanted, none) = ram.run(&insn);
    assert!(none.is_empty());
    let partly = matches!(
        insn.op,
        Op::CallFar | Op::JmpFar | Op::RetFar | Op::Iret | Op::Popf | Op::Pushf | Op::Enter
    );
    match wanted {
        Step::Done | Step::Fault(_) => {}
        Step::Unsupported if partly => {}
        _ => panic!("{wanted:?}"),
    }
    let (step, _) = mmio.run(&insn);
    if step == Step::Unsupported && insn.op == Op::Enter {
        // More accesses to a device than one instruction is granted.
        return;
    }
    assert_eq!(step, wanted);
    assert_eq!(mmio.gpr, ram.gpr);
    assert_eq!((mmio.rip, mmio.rflags), (ram.rip, ram.rflags));
    assert_eq!(mmio.vectors, ram.vectors);
    assert_eq!(mmio.mxcsr, ram.mxcsr);
    assert_eq!((mmio.mmx, mmio.mmx_ended), (ram.mmx, ram.mmx_ended));
    assert_eq!((mmio.segments, mmio.tables), (ram.segments, ram.tables));
    assert_eq!(mmio.blocking, ram.blocking);
    for page in PAGES {
        assert!(mmio.peek(page, 4096) == ram.peek(page, 4096));
    }
});
