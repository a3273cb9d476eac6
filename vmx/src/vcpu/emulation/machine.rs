//! The vCPU as the emulator's [`Machine`]: its registers, read once for an
//! instruction, its guest's page tables and memory.

use core::cell::Cell;

use super::reload::{self, Reload, Tables};
use crate::Error;
use crate::arch::addr::{Gpa, Gva, PAGE_SIZE};
use crate::arch::event::{Exception, PageFault};
use crate::arch::field;
use crate::arch::reg::{Cr0, Cr4, Efer, Rflags};
use crate::arch::segment::AccessRights;
use crate::emulate::{
    self, Access, Backing, Blocking, Code, DecodeCache, DecodeError, Decoded, Fault, Gpr,
    MAX_INSN_LEN, Machine, Mode, Seg, SegmentState, Table, VectorBytes,
};
use crate::host::Host;
use crate::memory::AccessError;
use crate::memory::walk::{self, Paging, WalkAccess, WalkFault};
use crate::vcpu::state::debug::DebugRegisters;
use crate::vcpu::state::extended::Extended;
use crate::vcpu::state::registers::Registers;
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu, cpuid};

/// Why guest memory could not be used in the middle of an instruction.
#[derive(Clone, Copy, Debug)]
pub(super) enum Blocked {
    Protected { gpa: Gpa, write: bool },
    Again,
    Interrupted,
    Broken(Error),
}

/// The registers that live in the VMCS, read once for an instruction.
pub(super) struct Snapshot {
    paging: Paging,
    mode: Mode,
    segments: [SegmentState; 6],
    /// For the few instructions that need them.
    pub(super) tables: Option<Tables>,
}

impl Snapshot {
    /// `named`: see [`reload::read_some`].
    pub(super) fn read<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>, named: u8) -> Self {
        inner.registers.know_all(current);
        let cr0 = inner.modes.cr0(current);
        let cr4 = inner.modes.cr4(current);
        let segments = reload::read_some(named, current);
        let rights = |seg: Seg| {
            let access = segments.get(seg.number()).map_or(0, |s| s.access);
            AccessRights::from_bits_retain(access)
        };
        let code = rights(Seg::Cs);
        let rflags = inner.registers.known_rflags();
        let protected = cr0 & Cr0::PE.bits() != 0;
        // SDM 25.4.1 "Guest Register State": SS.DPL is the CPL.
        let cpl = match protected {
            false => 0,
            true if rflags & Rflags::VM.bits() != 0 => 3,
            true => rights(Seg::Ss).dpl(),
        };
        let mode = if inner.modes.is_long_mode() && code.contains(AccessRights::LONG) {
            Mode::Bits64
        } else if code.contains(AccessRights::DB) {
            Mode::Bits32
        } else {
            Mode::Bits16
        };
        let pdptes = inner.modes.uses_pdptes().then(|| {
            [
                current.get(field::GUEST_PDPTE0),
                current.get(field::GUEST_PDPTE1),
                current.get(field::GUEST_PDPTE2),
                current.get(field::GUEST_PDPTE3),
            ]
        });
        Self {
            paging: Paging {
                cr0,
                cr3: current.get(field::GUEST_CR3),
                cr4,
                efer: inner.modes.efer(),
                ac: rflags & Rflags::AC.bits() != 0,
                cpl,
                pdptes,
                address_bits: inner.features.physical_bits(),
                pages_1g: inner.features.has(cpuid::Feature::PAGE1GB),
            },
            mode,
            segments,
            tables: None,
        }
    }
}

/// The vCPU while one of its instructions is executed in software.
pub(super) struct Virtual<'a, H: Host> {
    pub(super) vcpu: &'a Vcpu<H>,
    pub(super) registers: &'a mut Registers,
    pub(super) extended: &'a mut Extended<H>,
    pub(super) snapshot: &'a Snapshot,
    pub(super) split_lock: &'a mut Option<u64>,
    /// How many instructions were not emulated.
    pub(super) unsupported: &'a mut u32,
    pub(super) reload: Reload,
    pub(super) debug: &'a DebugRegisters,
    /// Data breakpoints met, as bits of DR6.
    pub(super) hits: u8,
    pub(super) blocked: Cell<Option<Blocked>>,
}

impl<H: Host> Virtual<'_, H> {
    fn block(&self, blocked: Blocked) -> Fault {
        self.blocked.set(Some(blocked));
        Fault::Blocked
    }

    /// An access to RAM that was RAM a moment ago.
    fn refused(&self, error: AccessError, write: bool) -> Fault {
        self.block(match error {
            // The map changed under the instruction: look again.
            AccessError::Mmio(_) | AccessError::RomWrite(_) => Blocked::Again,
            AccessError::Protected(gpa) => Blocked::Protected { gpa, write },
            AccessError::Host(Error::Interrupted) => Blocked::Interrupted,
            AccessError::Host(error) => Blocked::Broken(error),
        })
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn walk(&self, linear: u64, access: WalkAccess, cpl: u8) -> Result<u64, Fault> {
        if self.snapshot.paging.cr0 & Cr0::PG.bits() == 0 {
            return Ok(linear & 0xffff_ffff);
        }
        let paging = Paging {
            cpl,
            ..self.snapshot.paging
        };
        let memory = self.vcpu.guest().memory().reader();
        let found = walk::translate(&memory, &paging, Gva(linear), access);
        drop(memory);
        let fault = match found {
            Ok(translation) => return Ok(translation.gpa.0),
            Err(fault) => fault,
        };
        Err(match fault {
            WalkFault::Guest(exception) => Fault::Exception(for_emulator(exception)),
            WalkFault::Hole(gpa) => {
                // Nothing answers there, so the entry reads as all ones, and
                // its reserved bits are set.
                log::warn!("guest paging structure at {gpa:?}, where no memory is");
                let mut code = PageFault::PRESENT | PageFault::RESERVED;
                code.set(PageFault::WRITE, access.write);
                code.set(PageFault::USER, cpl == 3);
                Fault::Exception(for_emulator(Exception::page_fault(linear, code)))
            }
            WalkFault::Protected(gpa) => self.block(Blocked::Protected { gpa, write: false }),
            WalkFault::Retry => self.block(Blocked::Again),
            WalkFault::Host(Error::Interrupted) => self.block(Blocked::Interrupted),
            WalkFault::Host(error) => self.block(Blocked::Broken(error)),
        })
    }

    /// Reads the bytes of the instruction at RIP: at least `wanted` of them,
    /// as many as lie in the page where that is enough. Returns how many.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn fetch(&self, bytes: &mut [u8; MAX_INSN_LEN], wanted: usize) -> Result<usize, Fault> {
        let code = self.segment(Seg::Cs);
        let start = self.registers.known_rip();
        let mut have = 0usize;
        while have < wanted {
            let offset = start.wrapping_add(have as u64);
            let linear = if self.snapshot.mode == Mode::Bits64 {
                offset
            } else {
                code.base.wrapping_add(offset & 0xffff_ffff) & 0xffff_ffff
            };
            let access = WalkAccess {
                fetch: true,
                ..WalkAccess::default()
            };
            let gpa = Gpa(self.walk(linear, access, self.snapshot.paging.cpl)?);
            let in_page = PAGE_SIZE.wrapping_sub(gpa.page_offset());
            let end = have
                .saturating_add(usize::try_from(in_page).unwrap_or(0))
                .min(MAX_INSN_LEN);
            let Some(part) = bytes.get_mut(have..end) else {
                break;
            };
            let memory = self.vcpu.guest().memory();
            memory.read(gpa, part).map_err(|error| match error {
                AccessError::Mmio(_) => Fault::Exception(emulate::Exception::INVALID_OPCODE),
                other => self.refused(other, false),
            })?;
            have = end;
        }
        Ok(have)
    }

    /// Counts and logs an instruction that is not emulated: the first ones, then
    /// ever fewer, because a guest can repeat them.
    pub(super) fn tell_unsupported(&mut self) {
        *self.unsupported = self.unsupported.saturating_add(1);
        let count = *self.unsupported;
        if count > 16 && !count.is_power_of_two() {
            return;
        }
        let mut bytes = [0; MAX_INSN_LEN];
        let have = self.fetch(&mut bytes, 1).unwrap_or(0);
        let known = bytes.get(..have).unwrap_or_default();
        let (rip, mode) = (self.registers.known_rip(), self.snapshot.mode);
        log::warn!(
            "instruction not emulated: {known:02x?} at {rip:#x}, {mode:?}; {count} on this vCPU"
        );
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn decode(&mut self, cache: &mut DecodeCache) -> Result<Decoded, Fault> {
        let mut bytes = [0; MAX_INSN_LEN];
        let mut have = self.fetch(&mut bytes, 1)?;
        loop {
            let known = bytes.get(..have).unwrap_or_default();
            let rip = self.registers.known_rip();
            let error = match cache.look_up(rip, Code::new(known), self.snapshot.mode) {
                Ok(insn) => return Ok(insn),
                Err(error) => error,
            };
            match error {
                DecodeError::TooShort if have < MAX_INSN_LEN => {
                    have = self.fetch(&mut bytes, have.saturating_add(1))?;
                }
                DecodeError::TooShort | DecodeError::TooLong => {
                    return Err(Fault::Exception(emulate::Exception::PROTECTION));
                }
                DecodeError::Unsupported => {
                    self.tell_unsupported();
                    return Err(Fault::Exception(emulate::Exception::INVALID_OPCODE));
                }
            }
        }
    }
}

/// The emulator has its own type, so that it depends on nothing.
const fn for_emulator(exception: Exception) -> emulate::Exception {
    emulate::Exception {
        vector: exception.vector,
        error_code: exception.error_code,
        cr2: exception.cr2,
    }
}

impl<H: Host> Machine for Virtual<'_, H> {
    fn gpr(&self, reg: Gpr) -> u64 {
        self.registers.known_gpr(reg.number())
    }

    #[expect(clippy::cast_possible_truncation, reason = "numbers are below 16")]
    fn set_gpr(&mut self, reg: Gpr, value: u64) {
        self.registers.set(reg.number() as u8, value);
    }

    fn rip(&self) -> u64 {
        self.registers.known_rip()
    }

    fn set_rip(&mut self, value: u64) {
        self.registers.set_rip(value);
    }

    fn rflags(&self) -> u64 {
        self.registers.known_rflags()
    }

    fn set_rflags(&mut self, value: u64) {
        self.registers.set_rflags(value);
    }

    fn cr0(&self) -> u64 {
        self.snapshot.paging.cr0
    }

    fn cr4(&self) -> u64 {
        self.snapshot.paging.cr4
    }

    fn xcr0(&self) -> u64 {
        self.extended.xcr0()
    }

    fn cpl(&self) -> u8 {
        self.snapshot.paging.cpl
    }

    fn wide_linear(&self) -> bool {
        self.snapshot.paging.cr4 & Cr4::LA57.bits() != 0
    }

    fn segment(&self, seg: Seg) -> SegmentState {
        self.snapshot
            .segments
            .get(seg.number())
            .copied()
            .unwrap_or_default()
    }

    fn set_segment(&mut self, seg: Seg, state: SegmentState) {
        self.reload.set_segment(seg, state);
    }

    fn table(&self, table: Table) -> SegmentState {
        let tables = self.snapshot.tables.unwrap_or_default();
        tables.get(table as usize).copied().unwrap_or_default()
    }

    fn set_table(&mut self, table: Table, state: SegmentState) {
        self.reload.set_table(table, state);
    }

    fn load_status(&mut self, status: u16) {
        self.reload.set_status(status);
    }

    fn long_mode(&self) -> bool {
        self.snapshot.paging.efer & Efer::LMA.bits() != 0
    }

    fn set_blocking(&mut self, blocking: Blocking) {
        self.reload.set_blocking(blocking);
    }

    fn vector(&self, index: u8) -> VectorBytes {
        self.extended.vector(index)
    }

    fn set_vector(&mut self, index: u8, value: &VectorBytes) {
        self.extended.set_vector(index, value);
    }

    fn mxcsr(&self) -> u32 {
        self.extended.fx().mxcsr
    }

    fn set_mxcsr(&mut self, value: u32) -> bool {
        self.extended.set_mxcsr(value)
    }

    fn opmask(&self, index: u8) -> u64 {
        self.extended.opmask(index)
    }

    fn mmx(&self, index: u8) -> u64 {
        self.extended.mmx(index)
    }

    fn end_mmx(&mut self, write: Option<(u8, u64)>) {
        self.extended.end_mmx(write);
    }

    fn x87_error(&self) -> bool {
        self.extended.x87_error()
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn translate(&mut self, linear: u64, access: Access) -> Result<u64, Fault> {
        let cpl = if access.user {
            3
        } else {
            self.snapshot.paging.cpl.min(2)
        };
        let wanted = WalkAccess {
            write: access.write,
            ..WalkAccess::default()
        };
        self.walk(linear, wanted, cpl)
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn backing(&mut self, gpa: u64, write: bool) -> Result<Backing, Fault> {
        match self.vcpu.guest().memory().check(Gpa(gpa), 1, write) {
            Ok(()) => Ok(Backing::Ram),
            Err(AccessError::Mmio(_) | AccessError::RomWrite(_)) => Ok(Backing::Mmio),
            Err(error) => Err(self.refused(error, write)),
        }
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn read_ram(&mut self, gpa: u64, into: &mut [u8]) -> Result<(), Fault> {
        let result = self.vcpu.guest().memory().read(Gpa(gpa), into);
        result.map_err(|error| self.refused(error, false))
    }

    fn write_ram(&mut self, gpa: u64, from: &[u8]) -> Result<(), Fault> {
        let result = self.vcpu.guest().memory().write(Gpa(gpa), from);
        result.map_err(|error| self.refused(error, true))
    }

    fn compare_exchange(&mut self, gpa: u64, len: u8, old: u128, new: u128) -> Result<bool, Fault> {
        let memory = self.vcpu.guest().memory();
        let found = memory.compare_exchange(Gpa(gpa), len, old, new);
        found
            .map(|found| found == old)
            .map_err(|error| self.refused(error, true))
    }

    /// RAM brings an instruction here when the map changed since its exit: the
    /// processor does it now. If it comes back, its page tables are what exits.
    fn retry_split_lock(&mut self) -> bool {
        let rip = Some(self.registers.known_rip());
        let tried = *self.split_lock == rip;
        *self.split_lock = if tried { None } else { rip };
        !tried
    }

    fn read_port_buffer(&mut self, offset: usize, into: &mut [u8]) {
        self.vcpu.channel.read_buffer(offset, into);
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn write_port_buffer(&mut self, offset: usize, from: &[u8]) {
        self.vcpu.channel.write_buffer(offset, from);
    }

    fn note_access(&mut self, linear: u64, len: u8, write: bool) {
        if self.debug.is_watching() {
            self.hits |= self.debug.matches(linear, len, write);
        }
    }

    fn should_pause(&self) -> bool {
        self.hits != 0 || self.vcpu.guest().host().event_pending()
    }
}
