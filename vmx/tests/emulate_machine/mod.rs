//! A machine for the emulator's tests: an array of registers, flat guest memory
//! made of 4 KB pages that are RAM, MMIO or absent, and a random number
//! generator with a fixed seed.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test file uses its own part"
)]

use std::collections::BTreeMap;

use haxm_vmx::emulate::{
    Access, Backing, Blocking, Exception, Fault, Gpr, Insn, Machine, MmioLog, Mode,
    PORT_BUFFER_LEN, Seg, SegmentState, Step, Table, VectorBytes, execute,
};

/// All status flags.
pub const STATUS: u64 = 0x8d5;

/// xorshift64*: small, and the same on every machine.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn byte(&mut self) -> u8 {
        (self.next() >> 32) as u8
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number that is often a corner case.
    pub fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => u64::from(self.byte()),
            5 => u64::from(self.byte()) as i8 as u64,
            _ => self.next(),
        }
    }
}

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ram,
    /// Reads and writes go to the log, and to the bytes kept here.
    Mmio,
    /// RAM when read, MMIO when written.
    Rom,
    /// Translation refuses writes.
    ReadOnly,
}

#[derive(Clone)]
pub struct Page {
    pub kind: Kind,
    pub bytes: Vec<u8>,
}

/// The machine. Linear and guest-physical addresses are the same.
#[derive(Clone)]
pub struct Fake {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr4: u64,
    pub xcr0: u64,
    pub cpl: u8,
    pub wide_linear: bool,
    pub segments: [SegmentState; 6],
    pub vectors: [VectorBytes; 32],
    pub mxcsr: u32,
    pub opmasks: [u64; 8],
    pub mmx: [u64; 8],
    /// MMX instructions that ended.
    pub mmx_ended: u32,
    pub x87_error: bool,
    pub long_mode: bool,
    /// In the order of [`Table`].
    pub tables: [SegmentState; 4],
    pub blocking: Option<Blocking>,
    pub pages: BTreeMap<u64, Page>,
    pub port_buffer: [u8; PORT_BUFFER_LEN],
    /// Another processor changes the byte here after each RAM read, this many
    /// times.
    pub interference: u32,
    pub atomics: u32,
    /// Split locks that the processor takes over.
    pub split_locks: u32,
    pub pause: bool,
    pub blocked_page: Option<u64>,
    /// What the emulator said it touches: address, length, write.
    pub noted: Vec<(u64, u8, bool)>,
}

pub fn flat(access: u32) -> SegmentState {
    SegmentState {
        selector: 8,
        base: 0,
        limit: u32::MAX,
        access,
    }
}

impl Fake {
    /// Ring 0, flat segments, SSE and AVX enabled.
    pub fn new(mode: Mode) -> Self {
        let size = match mode {
            Mode::Bits16 => 0,
            _ => 0x4000,
        };
        let mut segments = [flat(0x8093 | size); 6];
        segments[Seg::Cs.number()] = flat(0x809b | size);
        Self {
            gpr: [0; 16],
            rip: 0x1000,
            rflags: 2,
            cr0: 0x8000_0031,
            cr4: 0x4_0620,
            xcr0: 0xe7,
            cpl: 0,
            wide_linear: false,
            segments,
            vectors: [[0; 64]; 32],
            mxcsr: 0x1f80,
            opmasks: [0; 8],
            mmx: [0; 8],
            mmx_ended: 0,
            x87_error: false,
            long_mode: mode == Mode::Bits64,
            tables: [SegmentState::default(); 4],
            blocking: None,
            pages: BTreeMap::new(),
            port_buffer: [0; PORT_BUFFER_LEN],
            interference: 0,
            atomics: 0,
            split_locks: 0,
            pause: false,
            blocked_page: None,
            noted: Vec::new(),
        }
    }

    pub fn map(&mut self, address: u64, kind: Kind) -> &mut Page {
        self.pages.entry(address >> 12).or_insert(Page {
            kind,
            bytes: vec![0; 4096],
        })
    }

    pub fn set_kind(&mut self, address: u64, kind: Kind) {
        self.pages.get_mut(&(address >> 12)).expect("mapped").kind = kind;
    }

    pub fn poke(&mut self, address: u64, bytes: &[u8]) {
        for (at, byte) in (address..).zip(bytes) {
            let page = self.pages.get_mut(&(at >> 12)).expect("mapped");
            page.bytes[(at & 0xfff) as usize] = *byte;
        }
    }

    pub fn peek(&self, address: u64, len: usize) -> Vec<u8> {
        (address..)
            .take(len)
            .map(|at| self.pages[&(at >> 12)].bytes[(at & 0xfff) as usize])
            .collect()
    }

    pub fn segment_of(&self, seg: Seg) -> SegmentState {
        self.segments[seg.number()]
    }

    pub fn peek64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.peek(address, 8).try_into().expect("8 bytes"))
    }

    /// Executes to the end, answering every request from the pages' bytes.
    /// Returns the last step and the requests.
    pub fn run(&mut self, insn: &Insn) -> (Step, Vec<Step>) {
        let mut log = MmioLog::new();
        let mut asked = Vec::new();
        loop {
            let before = self.clone_if_mmio();
            let start = self.rip;
            let step = execute(insn, self, &mut log);
            match step {
                Step::Read { gpa, size } => {
                    let mut value = [0; 8];
                    value[..usize::from(size)].copy_from_slice(&self.peek(gpa, size.into()));
                    // Junk above the size must be ignored.
                    for byte in &mut value[usize::from(size)..] {
                        *byte = 0xa5;
                    }
                    self.assert_untouched(before.as_ref(), insn);
                    log.answer(u64::from_le_bytes(value));
                }
                Step::Write { gpa, size, value } => {
                    self.assert_untouched(before.as_ref(), insn);
                    let size = usize::from(size);
                    assert!(
                        value.to_le_bytes()[size..].iter().all(|byte| *byte == 0),
                        "junk above the written value"
                    );
                    self.poke(gpa, &value.to_le_bytes()[..size]);
                    log.answer(0);
                }
                // RIP stays; a caller with nothing else to do goes on.
                Step::Again => {
                    assert!(log.is_empty());
                    assert_eq!(self.rip, start);
                    if self.pause {
                        return (step, asked);
                    }
                    continue;
                }
                _ => {
                    assert!(log.is_empty(), "{step:?} left entries in the log");
                    return (step, asked);
                }
            }
            asked.push(step);
            assert!(asked.len() < 100_000);
        }
    }

    fn clone_if_mmio(&self) -> Option<Self> {
        let ram = |page: &Page| matches!(page.kind, Kind::Ram | Kind::ReadOnly);
        (!self.pages.values().all(ram)).then(|| self.clone())
    }

    /// An exit to user space shows nothing the instruction does, apart from
    /// whole iterations of a repeated one.
    fn assert_untouched(&self, before: Option<&Self>, insn: &Insn) {
        let before = before.expect("an exit without MMIO");
        assert_eq!(self.rip, before.rip);
        if !insn.op.is_string() {
            assert_eq!(self.gpr, before.gpr, "{insn:?}");
            assert_eq!(self.rflags, before.rflags, "{insn:?}");
            assert_eq!(self.vectors, before.vectors);
            assert_eq!((self.mmx, self.mmx_ended), (before.mmx, before.mmx_ended));
            assert_eq!(self.segments, before.segments);
            assert_eq!(self.tables, before.tables);
            for (page, now) in &self.pages {
                assert!(before.pages[page].bytes == now.bytes, "RAM changed early");
            }
        }
    }

    fn bytes_of(&mut self, gpa: u64, len: usize, write: bool) -> &mut [u8] {
        assert!((gpa & 0xfff) as usize + len <= 4096, "crosses a page");
        let page = self.pages.get_mut(&(gpa >> 12)).expect("translated");
        let ram = match page.kind {
            Kind::Ram | Kind::ReadOnly => true,
            Kind::Rom => !write,
            Kind::Mmio => false,
        };
        assert!(ram, "direct access to MMIO");
        let at = (gpa & 0xfff) as usize;
        &mut page.bytes[at..at + len]
    }
}

impl Machine for Fake {
    fn gpr(&self, reg: Gpr) -> u64 {
        self.gpr[reg.number()]
    }
    fn set_gpr(&mut self, reg: Gpr, value: u64) {
        self.gpr[reg.number()] = value;
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn set_rip(&mut self, value: u64) {
        self.rip = value;
    }
    fn rflags(&self) -> u64 {
        self.rflags
    }
    fn set_rflags(&mut self, value: u64) {
        self.rflags = value;
    }
    fn cr0(&self) -> u64 {
        self.cr0
    }
    fn cr4(&self) -> u64 {
        self.cr4
    }
    fn xcr0(&self) -> u64 {
        assert!(self.cr4 & 1 << 18 != 0, "XCR0 asked for without OSXSAVE");
        self.xcr0
    }
    fn cpl(&self) -> u8 {
        self.cpl
    }
    fn wide_linear(&self) -> bool {
        self.wide_linear
    }
    fn segment(&self, seg: Seg) -> SegmentState {
        self.segments[seg.number()]
    }
    fn set_segment(&mut self, seg: Seg, state: SegmentState) {
        self.segments[seg.number()] = state;
    }
    fn table(&self, table: Table) -> SegmentState {
        self.tables[table as usize]
    }
    fn set_table(&mut self, table: Table, state: SegmentState) {
        self.tables[table as usize] = state;
    }
    fn load_status(&mut self, status: u16) {
        self.cr0 = self.cr0 & !0xe | u64::from(status) & 0xf;
    }
    fn mxcsr(&self) -> u32 {
        self.mxcsr
    }
    fn set_mxcsr(&mut self, value: u32) -> bool {
        let fits = value & !0xffff == 0;
        if fits {
            self.mxcsr = value;
        }
        fits
    }
    fn long_mode(&self) -> bool {
        self.long_mode
    }
    fn set_blocking(&mut self, blocking: Blocking) {
        self.blocking = Some(blocking);
    }
    fn vector(&self, index: u8) -> VectorBytes {
        self.vectors[usize::from(index)]
    }
    fn set_vector(&mut self, index: u8, value: &VectorBytes) {
        self.vectors[usize::from(index)] = *value;
    }
    fn opmask(&self, index: u8) -> u64 {
        self.opmasks[usize::from(index)]
    }
    fn mmx(&self, index: u8) -> u64 {
        self.mmx[usize::from(index)]
    }
    fn end_mmx(&mut self, write: Option<(u8, u64)>) {
        self.mmx_ended += 1;
        if let Some((index, value)) = write {
            self.mmx[usize::from(index)] = value;
        }
    }
    fn x87_error(&self) -> bool {
        self.x87_error
    }
    fn translate(&mut self, linear: u64, access: Access) -> Result<u64, Fault> {
        let code = u32::from(access.write) << 1 | u32::from(access.user) << 2;
        match self.pages.get(&(linear >> 12)) {
            None => Err(Fault::Exception(Exception::page_fault(code, linear))),
            Some(page) if page.kind == Kind::ReadOnly && access.write => {
                Err(Fault::Exception(Exception::page_fault(code | 1, linear)))
            }
            Some(_) => Ok(linear),
        }
    }
    fn backing(&mut self, gpa: u64, write: bool) -> Result<Backing, Fault> {
        if self.blocked_page == Some(gpa >> 12) {
            return Err(Fault::Blocked);
        }
        Ok(match self.pages[&(gpa >> 12)].kind {
            Kind::Ram | Kind::ReadOnly => Backing::Ram,
            Kind::Rom if !write => Backing::Ram,
            Kind::Mmio | Kind::Rom => Backing::Mmio,
        })
    }
    fn read_ram(&mut self, gpa: u64, into: &mut [u8]) -> Result<(), Fault> {
        let from = self.bytes_of(gpa, into.len(), false);
        into.copy_from_slice(from);
        if self.interference > 0 {
            self.interference -= 1;
            let byte = &mut self.bytes_of(gpa, 1, false)[0];
            *byte = byte.wrapping_add(1);
        }
        Ok(())
    }
    fn write_ram(&mut self, gpa: u64, from: &[u8]) -> Result<(), Fault> {
        self.bytes_of(gpa, from.len(), true).copy_from_slice(from);
        Ok(())
    }
    fn compare_exchange(&mut self, gpa: u64, len: u8, old: u128, new: u128) -> Result<bool, Fault> {
        self.atomics += 1;
        let len = usize::from(len);
        assert!(matches!(len, 1 | 2 | 4 | 8 | 16));
        assert!(gpa as usize % 64 + len <= 64, "split lock");
        assert!(len < 16 || gpa % 16 == 0, "unaligned pair");
        let bytes = self.bytes_of(gpa, len, true);
        if *bytes != old.to_le_bytes()[..len] {
            return Ok(false);
        }
        assert!(new.to_le_bytes()[len..].iter().all(|byte| *byte == 0));
        bytes.copy_from_slice(&new.to_le_bytes()[..len]);
        Ok(true)
    }
    fn retry_split_lock(&mut self) -> bool {
        let taken = self.split_locks > 0;
        self.split_locks = self.split_locks.saturating_sub(1);
        taken
    }
    fn read_port_buffer(&mut self, offset: usize, into: &mut [u8]) {
        into.copy_from_slice(&self.port_buffer[offset..offset + into.len()]);
    }
    fn write_port_buffer(&mut self, offset: usize, from: &[u8]) {
        self.port_buffer[offset..offset + from.len()].copy_from_slice(from);
    }
    fn note_access(&mut self, linear: u64, len: u8, write: bool) {
        let access = (linear, len, write);
        if !self.noted.contains(&access) {
            self.noted.push(access);
        }
    }
    fn should_pause(&self) -> bool {
        self.pause
    }
}
