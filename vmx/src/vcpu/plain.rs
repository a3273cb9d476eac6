//! Plain moves to and from device memory, in one pass.
//!
//! Most instructions that touch a device are a MOV between a register and one
//! operand. The processor has told what the emulator would have to find out:
//! which linear address, which guest-physical address, read or write. So such
//! an instruction goes to the client at once, and what is left is remembered:
//! put the answer into a register, move RIP. RIP stays on the instruction, and
//! no register changes, until the client calls RUN again.
//!
//! Why no check is repeated here. An EPT violation on the translation of a
//! linear address is the last thing that can happen to an access: SDM 29.3.3.3
//! "Prioritization of EPT Misconfigurations and EPT Violations" has the guest's
//! own page tables walked, and their rights checked, before; and segment
//! limits, segment rights and canonical form decide whether there is a linear
//! address at all. What the SDM leaves open is alignment, so an operand that
//! could raise #AC goes the long way. So does everything else that is not
//! plain:
//!
//! - the violation is that of a paging-structure entry, or of a fetch;
//! - the operand crosses a page: then the linear address is that of either part.
//!   It is found by comparing it with the one the instruction names, which also
//!   proves that the bytes fetched are those that were executed;
//! - an event was being delivered: the caller has looked;
//! - the instruction's bytes cannot be had at once: end of a page, page fault,
//!   a protected page. The long way reports it.

use abi::tunnel::ExitStatus;

use super::handle::Next;
use super::reload::SEGMENTS;
use super::vmcs::Current;
use super::{Inner, Vcpu};
use crate::Error;
use crate::arch::addr::{Gpa, Gva, PAGE_SHIFT, PAGE_SIZE};
use crate::arch::exit::EptQualification;
use crate::arch::field;
use crate::arch::reg::{Cr0, Cr4, Rflags};
use crate::arch::segment::AccessRights;
use crate::emulate::{Code, Decoded, Gpr, MAX_INSN_LEN, Mode, Seg};
use crate::host::Host;
use crate::memory::walk::{self, Paging, WalkAccess};

/// Device pages remembered; a power of two.
const PAGES: usize = 4;

/// What an EPT violation tells of the access and of where its instruction is.
#[derive(Clone, Copy, Debug)]
struct Touch {
    /// Linear address of the operand.
    linear: u64,
    write: bool,
    rip: u64,
    mode: Mode,
    cpl: u8,
    /// Linear address of the instruction.
    code: u64,
    /// The base of this segment.
    base: Option<(Seg, u64)>,
    paging: PagingState,
}

/// What says how the instruction's address is translated.
#[derive(Clone, Copy, Debug)]
struct PagingState {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    /// With PAE paging, the PDPTE that `Touch::code` needs.
    pdpte: Option<u64>,
}

/// What is left to do when the client has answered.
#[derive(Clone, Copy, Debug)]
struct Rest {
    insn: Decoded,
    next_rip: u64,
}

/// The plain move under way, and what speeds the next one up.
#[derive(Debug)]
pub struct Moves {
    rest: Option<Rest>,
    /// Of the EPT violation that is being handled.
    touch: Option<Touch>,
    /// Pages where the last accesses found a device, by their lowest bits: what
    /// is needed is read while the VMCS is at hand. A wrong guess costs time.
    pages: [u64; PAGES],
    /// The segment the last one used; a guess too.
    segment: Option<Seg>,
}

impl Default for Moves {
    fn default() -> Self {
        Self {
            rest: None,
            touch: None,
            pages: [u64::MAX; PAGES],
            segment: Some(Seg::Ds),
        }
    }
}

impl Moves {
    /// The one under way will not be finished.
    pub(super) fn abandon(&mut self) {
        self.rest = None;
    }

    fn page(&mut self, gpa: Gpa) -> Option<(&mut u64, u64)> {
        let page = gpa.0 >> PAGE_SHIFT;
        let index = page as usize & PAGES.wrapping_sub(1);
        Some((self.pages.get_mut(index)?, page))
    }

    fn expects(&mut self, gpa: Gpa) -> bool {
        self.page(gpa).is_some_and(|(known, page)| *known == page)
    }

    fn expect(&mut self, gpa: Gpa) {
        if let Some((known, page)) = self.page(gpa) {
            *known = page;
        }
    }
}

/// An EPT violation: reads what will be needed if a device is there, as far as
/// that is likely.
pub fn foresee<H: Host>(
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    gpa: Gpa,
    qualification: EptQualification,
) {
    inner.emulation.moves.touch = if inner.emulation.moves.expects(gpa) {
        Touch::read(inner, current, qualification)
    } else {
        None
    };
}

impl Touch {
    /// `None`: not an access that can be a plain move's.
    fn read<H: Host>(
        inner: &mut Inner<H>,
        current: &Current<'_, H>,
        qualification: EptQualification,
    ) -> Option<Self> {
        let write = qualification.is_write();
        let data = write != qualification.is_read() && !qualification.is_fetch();
        if !(data && qualification.is_operand()) {
            return None;
        }
        let rights = AccessRights::from_bits_retain(current.read(field::GUEST_CS_RIGHTS));
        // SDM 27.3.1.2 "Checks on Guest Segment Registers": in a code segment
        // that is not conforming CS.DPL is the CPL; in virtual-8086 mode both
        // are 3. In real-address mode it is 0 or forces the long way.
        if rights.contains(AccessRights::CODE | AccessRights::DOWN_CONFORMING) {
            return None;
        }
        let mode = if inner.modes.is_long_mode() && rights.contains(AccessRights::LONG) {
            Mode::Bits64
        } else if rights.contains(AccessRights::DB) {
            Mode::Bits32
        } else {
            Mode::Bits16
        };
        let rip = inner.registers.rip(current);
        inner.registers.rflags(current);
        let code = match mode {
            Mode::Bits64 => rip,
            _ => (current.read(field::GUEST_CS_BASE)).wrapping_add(rip) & 0xffff_ffff,
        };
        let segment = match (mode, inner.emulation.moves.segment) {
            (Mode::Bits64, Some(seg @ (Seg::Fs | Seg::Gs))) => Some(seg),
            (Mode::Bits64, _) => None,
            (_, seg) => Some(seg.unwrap_or(Seg::Ds)),
        };
        Some(Self {
            linear: current.read(field::GUEST_LINEAR_ADDRESS),
            write,
            rip,
            mode,
            cpl: rights.dpl(),
            code,
            base: segment.map(|seg| (seg, base_of(seg, current))),
            paging: PagingState::read(inner, current, code),
        })
    }
}

fn base_of<H: Host>(seg: Seg, current: &Current<'_, H>) -> u64 {
    SEGMENTS
        .get(seg.number())
        .map_or(0, |fields| fields.base(current))
}

impl PagingState {
    fn read<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>, code: u64) -> Self {
        let (cr0, mut cr4) = inner.modes.intercepted();
        let mut this = Self {
            cr0,
            cr3: 0,
            cr4,
            efer: inner.modes.efer(),
            pdpte: None,
        };
        if cr0 & Cr0::PG.bits() == 0 {
            return this;
        }
        this.cr3 = current.read(field::GUEST_CR3);
        if cr4 & Cr4::PAE.bits() == 0 {
            // The guest sets PSE without an exit, and only here it counts.
            cr4 = inner.modes.cr4(current);
        }
        // SMEP too is the guest's. If it makes a difference, the long way
        // finds out whether it is set.
        this.cr4 = cr4 | Cr4::SMEP.bits();
        if inner.modes.uses_pdptes() {
            this.pdpte = Some(match code >> 30 {
                0 => current.read(field::GUEST_PDPTE0),
                1 => current.read(field::GUEST_PDPTE1),
                2 => current.read(field::GUEST_PDPTE2),
                _ => current.read(field::GUEST_PDPTE3),
            });
        }
        this
    }
}

impl<H: Host> Vcpu<H> {
    /// The instruction at RIP touched a device at `gpa`: goes to the client
    /// with the access, or to the emulator with the instruction.
    ///
    /// # Errors
    /// [`Error::Fault`]: the VMCS could not be loaded.
    pub(super) fn device_access(&self, inner: &mut Inner<H>, gpa: Gpa) -> Result<Next, Error> {
        let touch = match inner.emulation.moves.touch.take() {
            None if inner.emulation.moves.expects(gpa) => None,
            None => {
                inner.emulation.moves.expect(gpa);
                self.with_vmcs(inner, |current, inner| {
                    let qualification = current.read(field::EXIT_QUALIFICATION);
                    Touch::read(inner, current, EptQualification(qualification))
                })?
            }
            known => known,
        };
        let Some(touch) = touch else {
            return self.emulate(inner);
        };
        let decoded = self.code(inner, &touch).and_then(|code| {
            let cache = &mut inner.emulation.cache;
            cache.look_up(touch.rip, code, touch.mode).ok()
        });
        let Some(insn) = decoded else {
            return self.emulate(inner);
        };
        if self.plain_move(inner, &touch, insn, gpa)?.is_some() {
            return Ok(Next::Leave(ExitStatus::FastMmio));
        }
        inner.emulation.begin(insn);
        self.emulate(inner)
    }

    /// The bytes at RIP, as far as they lie in its page.
    fn code(&self, inner: &Inner<H>, touch: &Touch) -> Option<Code> {
        let memory = self.guest().memory();
        let gpa = if touch.paging.cr0 & Cr0::PG.bits() == 0 {
            Gpa(touch.code)
        } else {
            let paging = Paging {
                cr0: touch.paging.cr0,
                cr3: touch.paging.cr3,
                cr4: touch.paging.cr4,
                efer: touch.paging.efer,
                ac: false,
                cpl: touch.cpl,
                // Only that of the address is looked at.
                pdptes: touch.paging.pdpte.map(|entry| [entry; 4]),
                address_bits: inner.features.physical_bits(),
                pages_1g: inner.features.has(super::cpuid::Feature::PAGE1GB),
            };
            let fetch = WalkAccess {
                fetch: true,
                ..WalkAccess::default()
            };
            let found = walk::translate(memory, &paging, Gva(touch.code), fetch);
            found.ok()?.gpa
        };
        let room = PAGE_SIZE.wrapping_sub(gpa.page_offset());
        let known = usize::try_from(room).ok()?.min(MAX_INSN_LEN);
        let mut bytes = [0; 16];
        memory.read(gpa, bytes.get_mut(..known)?).ok()?;
        Some(Code::from_array(bytes, known))
    }

    /// Hands the access of `insn` to the client, if it is a plain move's and
    /// all that `touch` says fits. `None`: nothing was done.
    fn plain_move(
        &self,
        inner: &mut Inner<H>,
        touch: &Touch,
        insn: Decoded,
        gpa: Gpa,
    ) -> Result<Option<()>, Error> {
        let Some(&plain) = inner.emulation.cache.plain(insn) else {
            return Ok(None);
        };
        let base = match (plain.based_on(), touch.base) {
            (None, _) => 0,
            (Some(wanted), Some((seg, base))) if wanted == seg => base,
            (Some(wanted), _) => {
                inner.emulation.moves.segment = Some(wanted);
                self.with_vmcs(inner, |current, _| base_of(wanted, current))?
            }
        };
        let gpr = |reg: Gpr| inner.registers.at_hand(reg.number());
        let size = u64::from(plain.size());
        let last = size.wrapping_sub(1);
        let offset = touch.linear & PAGE_SIZE.wrapping_sub(1);
        let misaligned = touch.linear & last != 0;
        let may_check = touch.cpl == 3 && inner.registers.known_rflags() & Rflags::AC.bits() != 0;
        let fits = plain.linear(touch.rip, base, gpr) == Some(touch.linear)
            && plain.is_store() == touch.write
            && offset == gpa.page_offset()
            && offset.wrapping_add(last) < PAGE_SIZE
            && !(misaligned && may_check);
        if !fits {
            return Ok(None);
        }
        let value = match plain.loads() {
            None => plain.stored(gpr),
            // Part of it may stay as it is.
            Some(reg) => gpr(reg).map(|_| 0),
        };
        let Some(value) = value else {
            return Ok(None);
        };
        let direction = u8::from(touch.write);
        self.channel
            .set_fast_mmio(gpa.0, value, plain.size(), direction);
        inner.emulation.moves.rest = Some(Rest {
            insn,
            next_rip: plain.next_rip(touch.rip),
        });
        Ok(Some(()))
    }

    /// The client has served the access of a plain move: finishes it.
    pub(super) fn finish_move(&self, inner: &mut Inner<H>) {
        let Some(rest) = inner.emulation.moves.rest.take() else {
            return;
        };
        if let Some(plain) = inner.emulation.cache.plain(rest.insn) {
            if let Some(reg) = plain.loads() {
                let old = inner.registers.known_gpr(reg.number());
                let new = plain.loaded(old, self.channel.fast_mmio_value());
                #[expect(clippy::cast_possible_truncation, reason = "numbers are below 16")]
                inner.registers.set(reg.number() as u8, new);
            }
        }
        inner.registers.set_rip(rest.next_rip);
        let flags = inner.registers.known_rflags();
        // RF is clear after any instruction but those that load it (SDM
        // 18.3.1.1 "Instruction-Breakpoint Exception Condition").
        if flags & Rflags::RF.bits() != 0 {
            inner.registers.set_rflags(flags & !Rflags::RF.bits());
        }
        inner.completed = true;
        inner.quiet = false;
    }
}
