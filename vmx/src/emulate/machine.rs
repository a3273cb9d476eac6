//! What the emulator borrows from a virtual processor: registers, segments,
//! address translation, guest RAM and the port buffer.

/// Bytes in the port buffer, that is the most one string I/O exit carries. The
/// interface gives a client 64 bytes.
pub const PORT_BUFFER_LEN: usize = 64;

/// A general-purpose register, by its number in an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the registers' own names")]
pub enum Gpr {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

impl Gpr {
    /// The register with this number; only the low four bits count.
    #[must_use]
    pub const fn from_bits(number: u8) -> Self {
        match number & 15 {
            0 => Self::Rax,
            1 => Self::Rcx,
            2 => Self::Rdx,
            3 => Self::Rbx,
            4 => Self::Rsp,
            5 => Self::Rbp,
            6 => Self::Rsi,
            7 => Self::Rdi,
            8 => Self::R8,
            9 => Self::R9,
            10 => Self::R10,
            11 => Self::R11,
            12 => Self::R12,
            13 => Self::R13,
            14 => Self::R14,
            _ => Self::R15,
        }
    }

    /// The register's number, 0 to 15.
    #[must_use]
    pub const fn number(self) -> usize {
        self as usize
    }
}

/// A segment register, by its number in an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the registers' own names")]
pub enum Seg {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

impl Seg {
    /// The register with this number; `None` for 6 and above.
    #[must_use]
    pub const fn from_bits(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Es,
            1 => Self::Cs,
            2 => Self::Ss,
            3 => Self::Ds,
            4 => Self::Fs,
            5 => Self::Gs,
            _ => return None,
        })
    }

    /// The register's number, 0 to 5.
    #[must_use]
    pub const fn number(self) -> usize {
        self as usize
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentState {
    /// The visible selector.
    pub selector: u16,
    /// Linear address of the segment's first byte.
    pub base: u64,
    /// Last valid offset in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights in the VMCS' format: SDM 3C 25.4.1 "Guest Register State"
    /// (type 3:0, S 4, DPL 6:5, P 7, L 13, D/B 14, G 15, unusable 16).
    pub access: u32,
}

/// What a descriptor-table register or a system segment register names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// GDTR.
    Gdt,
    /// LDTR.
    Ldt,
    /// IDTR.
    Idt,
    /// TR.
    Task,
}

/// A change in what interrupts may come: SDM 3C 25.4.2 "Guest Non-Register State".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// SS was loaded: none until the next instruction is done.
    MovSs,
    /// IRET: NMIs are no longer blocked.
    NmiEnds,
}

/// The bits of a vector register.
pub type VectorBytes = [u8; 64];

/// The size of code the processor is running: CS.L and CS.D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real-address mode, virtual-8086 mode, or a code segment with D clear.
    Bits16,
    /// A code segment with D set.
    Bits32,
    /// 64-bit mode: IA32_EFER.LMA and CS.L both set.
    Bits64,
}

/// The right a translation must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The data will be written (read-modify-write counts as a write).
    pub write: bool,
    /// CPL is 3: a user-mode access.
    pub user: bool,
}

/// What answers at a guest-physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Guest RAM, or ROM when read.
    Ram,
    /// User space: nothing is mapped, or it is ROM and the access a write.
    Mmio,
}

/// An exception to inject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// The new CR2, for #PF.
    pub cr2: Option<u64>,
}

impl Exception {
    /// #DE, divide error.
    pub const DIVIDE: Self = Self::plain(0);
    /// #BR, BOUND range exceeded.
    pub const BOUND: Self = Self::plain(5);
    /// #MF, x87 floating-point error.
    pub const FLOATING_POINT: Self = Self::plain(16);
    /// #UD, invalid opcode.
    pub const INVALID_OPCODE: Self = Self::plain(6);
    /// #NM, device not available.
    pub const NO_DEVICE: Self = Self::plain(7);
    /// #SS with error code 0.
    pub const STACK: Self = Self::with_code(12, 0);
    /// #GP with error code 0.
    pub const PROTECTION: Self = Self::with_code(13, 0);
    /// #AC with error code 0.
    pub const ALIGNMENT: Self = Self::with_code(17, 0);

    /// An exception without an error code.
    #[must_use]
    pub const fn plain(vector: u8) -> Self {
        Self {
            vector,
            error_code: None,
            cr2: None,
        }
    }

    /// An exception with an error code.
    #[must_use]
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self {
            vector,
            error_code: Some(code),
            cr2: None,
        }
    }

    /// #PF with its error code and the linear address for CR2.
    #[must_use]
    pub const fn page_fault(code: u32, linear: u64) -> Self {
        Self {
            vector: 14,
            error_code: Some(code),
            cr2: Some(linear),
        }
    }
}

/// Why a machine refuses an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The guest gets an exception.
    Exception(Exception),
    /// The machine cannot serve this RAM access now and knows why; the
    /// emulator returns [`super::Step::Blocked`] with nothing changed.
    Blocked,
}

/// A virtual processor, as far as the emulator needs it.
///
/// The emulator asks for RAM in two steps, so that everything that can fail
/// has failed before anything is changed: it translates each page and asks what
/// backs it, and only then reads and writes.
pub trait Machine {
    /// All 64 bits of a general-purpose register.
    fn gpr(&self, reg: Gpr) -> u64;
    /// Sets all 64 bits of a general-purpose register.
    fn set_gpr(&mut self, reg: Gpr, value: u64);
    /// RIP; during [`super::execute`] the address of the instruction.
    fn rip(&self) -> u64;
    /// Sets RIP.
    fn set_rip(&mut self, value: u64);
    /// RFLAGS.
    fn rflags(&self) -> u64;
    /// Sets RFLAGS; only bits an instruction may change differ.
    fn set_rflags(&mut self, value: u64);
    /// CR0.
    fn cr0(&self) -> u64;
    /// CR4.
    fn cr4(&self) -> u64;
    /// XCR0. Asked for only when CR4.OSXSAVE is set.
    fn xcr0(&self) -> u64;
    /// The current privilege level, 0 to 3; 0 in real-address mode, 3 in
    /// virtual-8086 mode.
    fn cpl(&self) -> u8;
    /// Linear addresses are 57 bits wide rather than 48 (CR4.LA57 in long
    /// mode): SDM 1 3.3.7.1 "Canonical Addressing".
    fn wide_linear(&self) -> bool;
    /// A segment register.
    fn segment(&self, seg: Seg) -> SegmentState;
    /// Sets a segment register; every check has been made. CS and SS keep the
    /// privilege level.
    fn set_segment(&mut self, seg: Seg, state: SegmentState);
    /// A descriptor table. Asked for only if [`super::Insn::uses_tables`].
    fn table(&self, table: Table) -> SegmentState;
    /// Sets a descriptor-table register, of GDTR and IDTR base and limit; every
    /// check has been made.
    fn set_table(&mut self, table: Table, state: SegmentState);
    /// LMSW: sets the four lowest bits of CR0, but does not clear PE.
    fn load_status(&mut self, status: u16);
    /// IA32_EFER.LMA.
    fn long_mode(&self) -> bool;
    /// Told when the instruction changes what interrupts may come.
    fn set_blocking(&mut self, blocking: Blocking);

    /// Vector register `index` (0 to 31); bits the processor lacks are zero.
    fn vector(&self, index: u8) -> VectorBytes;
    /// Sets vector register `index`, all of it. Bits the processor lacks are
    /// ignored.
    fn set_vector(&mut self, index: u8, value: &VectorBytes);
    /// MXCSR.
    fn mxcsr(&self) -> u32;
    /// Sets MXCSR; `false`, and nothing, if a bit is reserved.
    fn set_mxcsr(&mut self, value: u32) -> bool;
    /// Opmask register `index` (0 to 7).
    fn opmask(&self, index: u8) -> u64;
    /// MMX register `index` (0 to 7).
    fn mmx(&self, index: u8) -> u64;
    /// An MMX instruction is done: the x87 stack is one of MMX registers now
    /// (SDM 1 9.5.1 "MMX Instructions and the x87 FPU Tag Word"), and `write`
    /// tells which register it set.
    fn end_mmx(&mut self, write: Option<(u8, u64)>);
    /// An x87 exception waits (the status word's ES bit).
    fn x87_error(&self) -> bool;

    /// Translates a linear address through the guest's page tables, setting
    /// accessed and dirty bits. Returns the guest-physical address, or the #PF
    /// (made with [`Exception::page_fault`]). `linear` is canonical; without
    /// 64-bit mode it is below 2^32.
    ///
    /// # Errors
    /// The page fault, or [`Fault::Blocked`].
    fn translate(&mut self, linear: u64, access: Access) -> Result<u64, Fault>;
    /// What answers at this guest-physical address. The answer must hold for
    /// the rest of its 4 KB page and until the call to `execute` returns.
    ///
    /// # Errors
    /// [`Fault::Blocked`] when RAM is there but may not be touched now.
    fn backing(&mut self, gpa: u64, write: bool) -> Result<Backing, Fault>;
    /// Reads RAM. The range lies in one 4 KB page that [`Machine::backing`] has
    /// called [`Backing::Ram`]. A naturally aligned 1, 2, 4 or 8 bytes should be
    /// read in one piece: guests rely on it (SDM 3A 9.1.1 "Guaranteed Atomic
    /// Operations").
    ///
    /// # Errors
    /// [`Fault::Blocked`].
    fn read_ram(&mut self, gpa: u64, into: &mut [u8]) -> Result<(), Fault>;
    /// Writes RAM; the range as for [`Machine::read_ram`], with `write` set.
    ///
    /// # Errors
    /// [`Fault::Blocked`]; not after another page's write has succeeded.
    fn write_ram(&mut self, gpa: u64, from: &[u8]) -> Result<(), Fault>;
    /// Atomically replaces `len` bytes (1, 2, 4, 8 or 16) at `gpa` by `new` if
    /// they equal `old`. Returns whether they did. The range as for
    /// [`Machine::write_ram`]; it lies in one cache line of 64 bytes, and 16 bytes
    /// are aligned.
    ///
    /// # Errors
    /// [`Fault::Blocked`].
    fn compare_exchange(&mut self, gpa: u64, len: u8, old: u128, new: u128) -> Result<bool, Fault>;

    /// A locked instruction updates RAM on both sides of the border of a cache
    /// line. Can the processor try it itself? Then `execute` returns
    /// [`super::Step::Again`]. After a no it updates the RAM like an instruction
    /// without LOCK.
    fn retry_split_lock(&mut self) -> bool {
        false
    }

    /// Copies from the port buffer what user space read from the port.
    /// `offset + into.len()` is at most [`PORT_BUFFER_LEN`]. Elements lie in the
    /// order of guest memory, also when RFLAGS.DF is set.
    fn read_port_buffer(&mut self, offset: usize, into: &mut [u8]);
    /// Copies into the port buffer what user space is to write to the port.
    fn write_port_buffer(&mut self, offset: usize, from: &[u8]);

    /// Told of each range of linear addresses the instruction touches, once its
    /// translation has succeeded: what a data breakpoint compares with (SDM 3B
    /// 18.2.4 "Debug Control Register (DR7)"). A replay tells again, and an
    /// instruction that then faults or waits has told too, so act on it only
    /// when `execute` returns [`super::Step::Done`] or [`super::Step::Again`]. To
    /// stop a repeated instruction after the iteration that matched, answer
    /// [`Machine::should_pause`] with yes.
    fn note_access(&mut self, linear: u64, len: u8, write: bool) {
        let _ = (linear, len, write);
    }

    /// Asked between two iterations of a repeated string instruction: should
    /// `execute` return [`super::Step::Again`] so that an interrupt can be
    /// taken?
    fn should_pause(&self) -> bool {
        false
    }
}
