//! Plain instructions on device memory, in one pass.
//!
//! Most instructions that touch a device are a MOV between a register and one
//! operand, or compare one with a number, or set and clear bits of it. The
//! processor has told what the emulator would have to find out: which linear
//! address, which guest-physical address, read or write. So such an instruction
//! goes to the client at once, and what is left is remembered: put the answer
//! into a register, compute with it, write the result back (a second exit to the
//! client, without the guest in between), set flags, move RIP. RIP stays on the
//! instruction, and no register or flag changes, until the last answer is there.
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
//! - it writes ROM after it has read it: the client has only the write;
//! - an event was being delivered: the caller has looked;
//! - a breakpoint register is enabled;
//! - the instruction's bytes cannot be had at once: end of a page, page fault,
//!   a protected page. The long way reports it.

use abi::tunnel::ExitStatus;

use super::reload::SEGMENTS;
use crate::Error;
use crate::arch::addr::{Gpa, Gva, PAGE_SHIFT, PAGE_SIZE};
use crate::arch::exit::EptQualification;
use crate::arch::field;
use crate::arch::reg::{Cr0, Cr4, Rflags};
use crate::arch::segment::AccessRights;
use crate::emulate::{Code, Compute, Decoded, Gpr, Load, MAX_INSN_LEN, Mode, Plain, Rest, Seg};
use crate::host::Host;
use crate::memory::walk::{self, Paging, WalkAccess};
use crate::vcpu::cpuid::Feature;
use crate::vcpu::exits::Next;
use crate::vcpu::state::registers::Registers;
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu};

/// Device pages remembered; a power of two.
const PAGES: usize = 4;

/// What an EPT violation tells of the access and of where its instruction is.
#[derive(Clone, Copy, Debug, Default)]
struct Touch {
    /// Linear address of the operand.
    linear: u64,
    write: bool,
    rip: u64,
    mode: Option<Mode>,
    /// Linear address of the instruction.
    code: u64,
    /// The base of this segment.
    base: Option<(Seg, u64)>,
    /// RFLAGS.AC is set at privilege level 3.
    may_check_alignment: bool,
    /// Nothing was to be done before the last entry: see `Vcpu::is_quiet`.
    quiet: bool,
    paging: Paging,
}

/// The instruction the client has an access of.
#[derive(Clone, Copy, Debug)]
struct Unfinished {
    /// The cache looks nothing up before it is finished.
    insn: Decoded,
    /// The access is the write of its result; the flags that it defines, and
    /// those of them that become 1.
    flags: Option<(u64, u64)>,
    gpa: Gpa,
    next_rip: u64,
}

/// The plain instruction under way, and what speeds the next one up.
#[derive(Debug)]
pub struct Moves {
    unfinished: Option<Unfinished>,
    /// Of the EPT violation that is being handled, if `touched`.
    touch: Touch,
    touched: bool,
    /// Pages where the last accesses found a device, by their lowest bits: what
    /// is needed is read while the VMCS is at hand. A wrong guess costs time.
    pages: [u64; PAGES],
    /// The segment the last one used; a guess too.
    segment: Option<Seg>,
}

impl Default for Moves {
    fn default() -> Self {
        Self {
            unfinished: None,
            touch: Touch::default(),
            touched: false,
            pages: [u64::MAX; PAGES],
            segment: Some(Seg::Ds),
        }
    }
}

impl Moves {
    /// The one under way will not be finished.
    pub(in crate::vcpu) fn abandon(&mut self) {
        self.unfinished = None;
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
/// that is likely. `quiet`: nothing was to be done before the last entry.
#[cfg_attr(haxm_module, optimize(speed))]
pub fn foresee<H: Host>(
    inner: &mut Inner<H>,
    current: &Current<'_, H>,
    gpa: Gpa,
    qualification: EptQualification,
    quiet: bool,
) {
    inner.emulation.moves.touched = false;
    inner.emulation.moves.touch.quiet = quiet;
    if inner.emulation.moves.expects(gpa) {
        read(inner, current, qualification);
    }
}

/// Reads all of the [`Touch`] but `quiet`, if the access can be a plain
/// instruction's.
#[cfg_attr(haxm_module, optimize(speed))]
fn read<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>, qualification: EptQualification) {
    // One that reads and then writes is a write, and may be a read too.
    let write = qualification.is_write();
    if qualification.is_fetch() || !qualification.is_operand() {
        return;
    }
    let rights = AccessRights::from_bits_retain(current.read(field::GUEST_CS_RIGHTS));
    // SDM 27.3.1.2 "Checks on Guest Segment Registers": in a code segment that
    // is not conforming CS.DPL is the CPL; in virtual-8086 mode both are 3. In
    // real-address mode there is no paging, and 3 forces the long way.
    if rights.contains(AccessRights::CODE | AccessRights::DOWN_CONFORMING) {
        return;
    }
    let cpl = rights.dpl();
    let rip = inner.registers.rip(current);
    let flags = Rflags::from_bits_retain(inner.registers.rflags(current));
    let moves = &mut inner.emulation.moves;
    let touch = &mut moves.touch;
    touch.linear = current.read(field::GUEST_LINEAR_ADDRESS);
    touch.write = write;
    touch.rip = rip;
    touch.may_check_alignment = cpl == 3 && flags.contains(Rflags::AC);
    if inner.modes.is_long_mode() && rights.contains(AccessRights::LONG) {
        touch.mode = Some(Mode::Bits64);
        touch.code = rip;
        touch.base = match moves.segment {
            Some(seg @ (Seg::Fs | Seg::Gs)) => Some((seg, base_of(seg, current))),
            _ => None,
        };
    } else {
        touch.mode = Some(if rights.contains(AccessRights::DB) {
            Mode::Bits32
        } else {
            Mode::Bits16
        });
        touch.code = current.read(field::GUEST_CS_BASE).wrapping_add(rip) & 0xffff_ffff;
        let seg = moves.segment.unwrap_or(Seg::Ds);
        touch.base = Some((seg, base_of(seg, current)));
    }
    moves.touched = true;
    let (cr0, cr4) = inner.modes.intercepted();
    touch.paging.cr0 = cr0;
    if cr0 & Cr0::PG.bits() != 0 {
        read_paging(inner, current, cr4, cpl);
    }
}

/// Reads what the instruction's address is translated by.
#[inline(never)]
#[cfg_attr(haxm_module, optimize(speed))]
fn read_paging<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>, known_cr4: u64, cpl: u8) {
    // The guest sets PSE without an exit, and it counts without PAE only.
    let cr4 = if known_cr4 & Cr4::PAE.bits() == 0 {
        inner.modes.cr4(current)
    } else {
        known_cr4
    };
    let touch = &mut inner.emulation.moves.touch;
    // With PAE paging only the PDPTE of the address is looked at.
    let pdpte = inner.modes.uses_pdptes().then(|| match touch.code >> 30 {
        0 => current.read(field::GUEST_PDPTE0),
        1 => current.read(field::GUEST_PDPTE1),
        2 => current.read(field::GUEST_PDPTE2),
        _ => current.read(field::GUEST_PDPTE3),
    });
    touch.paging = Paging {
        cr0: touch.paging.cr0,
        cr3: current.read(field::GUEST_CR3),
        // SMEP too is the guest's. If it makes a difference, the long way finds
        // out whether it is set.
        cr4: cr4 | Cr4::SMEP.bits(),
        efer: inner.modes.efer(),
        ac: false,
        cpl,
        pdptes: pdpte.map(|entry| [entry; 4]),
        address_bits: inner.features.physical_bits(),
        pages_1g: inner.features.has(Feature::PAGE1GB),
    };
}

fn base_of<H: Host>(seg: Seg, current: &Current<'_, H>) -> u64 {
    SEGMENTS
        .get(seg.number())
        .map_or(0, |fields| fields.base(current))
}

impl<H: Host> Vcpu<H> {
    /// The instruction at RIP touched a device at `gpa`, or with `rom` wrote
    /// ROM there: goes to the client with the access, or to the emulator with
    /// the instruction.
    ///
    /// # Errors
    /// [`Error::Fault`]: the VMCS could not be loaded.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(in crate::vcpu) fn device_access(
        &self,
        inner: &mut Inner<H>,
        gpa: Gpa,
        rom: bool,
    ) -> Result<Next, Error> {
        if !inner.emulation.moves.touched && !inner.emulation.moves.expects(gpa) {
            inner.emulation.moves.expect(gpa);
            self.with_vmcs(inner, |current, inner| {
                let qualification = current.read(field::EXIT_QUALIFICATION);
                read(inner, current, EptQualification(qualification));
            })?;
        }
        if !core::mem::take(&mut inner.emulation.moves.touched) {
            return self.emulate(inner);
        }
        let code = self.code(&inner.emulation.moves.touch);
        let Touch {
            rip, mode, base, ..
        } = inner.emulation.moves.touch;
        let (Some(code), Some(mode)) = (code, mode) else {
            return self.emulate(inner);
        };
        let Ok(insn) = inner.emulation.cache.look_up(rip, code, mode) else {
            return self.emulate(inner);
        };
        let wanted = inner.emulation.cache.plain(insn).map(Plain::based_on);
        if let Some(Some(seg)) = wanted {
            if base.is_none_or(|(read, _)| read != seg) {
                let base = self.with_vmcs(inner, |current, _| base_of(seg, current))?;
                inner.emulation.moves.segment = Some(seg);
                inner.emulation.moves.touch.base = Some((seg, base));
            }
        }
        if self.begin_plain(inner, insn, gpa, rom).is_some() {
            return Ok(Next::Leave(ExitStatus::FastMmio));
        }
        inner.emulation.begin(insn);
        self.emulate(inner)
    }

    /// The bytes at RIP, as far as they lie in its page.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn code(&self, touch: &Touch) -> Option<Code> {
        let memory = self.guest().memory().reader();
        let gpa = if touch.paging.cr0 & Cr0::PG.bits() == 0 {
            Gpa(touch.code)
        } else {
            let fetch = WalkAccess {
                fetch: true,
                ..WalkAccess::default()
            };
            let found = walk::translate(&memory, &touch.paging, Gva(touch.code), fetch);
            found.ok()?.gpa
        };
        let room = PAGE_SIZE.wrapping_sub(gpa.page_offset());
        let known = usize::try_from(room).ok()?.min(MAX_INSN_LEN);
        let mut bytes = [0; 16];
        memory.read(gpa, bytes.get_mut(..known)?).ok()?;
        Some(Code::from_array(bytes, known))
    }

    /// Hands the first access of `insn` to the client, if it is a plain
    /// instruction and all that is known of the access fits. `None`: nothing was
    /// done.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn begin_plain(&self, inner: &mut Inner<H>, insn: Decoded, gpa: Gpa, rom: bool) -> Option<()> {
        let plain = inner.emulation.cache.plain(insn)?;
        let touch = &inner.emulation.moves.touch;
        let base = match touch.base {
            Some((_, base)) if plain.based_on().is_some() => base,
            _ => 0,
        };
        let gpr = |reg: Gpr| inner.registers.at_hand(reg.number());
        let last = u64::from(plain.size()).wrapping_sub(1);
        let offset = touch.linear & PAGE_SIZE.wrapping_sub(1);
        let misaligned = touch.linear & last != 0;
        let store = plain.is_store();
        let fits = !inner.debug.is_watching()
            && plain.linear(touch.rip, base, gpr)? == touch.linear
            && plain.writes() == touch.write
            && (store || !rom)
            && offset == gpa.page_offset()
            && offset.wrapping_add(last) < PAGE_SIZE
            && !(misaligned && touch.may_check_alignment);
        if !fits {
            return None;
        }
        let value = plain.sent(gpr)?;
        self.channel
            .set_fast_mmio(gpa.0, value, plain.size(), u8::from(store));
        let quiet = touch.quiet;
        inner.emulation.moves.unfinished = Some(Unfinished {
            insn,
            flags: None,
            gpa,
            next_rip: plain.next_rip(touch.rip),
        });
        // Nothing has changed but what `finish_plain` looks at.
        inner.quiet = quiet;
        Some(())
    }

    /// The client has served an access of a plain instruction: finishes it, or
    /// goes to the client with its result. Without one nothing happens.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(in crate::vcpu) fn finish_plain(&self, inner: &mut Inner<H>) -> Next {
        let Some(unfinished) = inner.emulation.moves.unfinished.take() else {
            return Next::Resume;
        };
        if let Some((defined, found)) = unfinished.flags {
            set_flags(&mut inner.registers, defined, found);
        } else {
            let plain = inner.emulation.cache.plain(unfinished.insn);
            match plain.map(Plain::rest) {
                Some(Rest::Load(load)) => self.finish_load(&mut inner.registers, load),
                Some(Rest::Compute(compute)) => {
                    let flags = self.compute(&mut inner.registers, unfinished.gpa, compute);
                    if flags.is_some() {
                        let unfinished = Unfinished {
                            flags,
                            ..unfinished
                        };
                        inner.emulation.moves.unfinished = Some(unfinished);
                        return Next::Leave(ExitStatus::FastMmio);
                    }
                }
                Some(Rest::Nothing) | None => {}
            }
        }
        inner.registers.set_rip(unfinished.next_rip);
        let flags = inner.registers.known_rflags();
        // RF is clear after any instruction but those that load it (SDM
        // 18.3.1.1 "Instruction-Breakpoint Exception Condition").
        if flags & Rflags::RF.bits() != 0 {
            inner.registers.set_rflags(flags & !Rflags::RF.bits());
        }
        inner.registers.end_shadow();
        if flags & Rflags::TF.bits() != 0 || inner.debug.is_used() {
            inner.complete();
        }
        Next::Resume
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn finish_load(&self, registers: &mut Registers, load: &Load) {
        let number = load.register().number();
        let old = registers.known_gpr(number);
        let new = load.result(old, self.channel.fast_mmio_value());
        #[expect(clippy::cast_possible_truncation, reason = "numbers are below 16")]
        registers.set(number as u8, new);
    }

    /// The operand in memory is there: sets register and flags, or asks the
    /// client to write the result and returns the flags (see [`Unfinished`]).
    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    fn compute(
        &self,
        registers: &mut Registers,
        gpa: Gpa,
        compute: &Compute,
    ) -> Option<(u64, u64)> {
        let read = self.channel.fast_mmio_value();
        let known = |reg: Gpr| Some(registers.known_gpr(reg.number()));
        let computed = compute.outcome(read, registers.known_rflags(), &known)?;
        if let Some(value) = computed.memory {
            self.channel.set_fast_mmio(gpa.0, value, compute.size(), 1);
            return Some(computed.flags);
        }
        if let Some((reg, value)) = computed.register {
            #[expect(clippy::cast_possible_truncation, reason = "numbers are below 16")]
            registers.set(reg.number() as u8, value);
        }
        let (defined, found) = computed.flags;
        set_flags(registers, defined, found);
        None
    }
}

/// Of these flags, these become 1 and the others 0.
fn set_flags(registers: &mut Registers, defined: u64, found: u64) {
    let old = registers.known_rflags();
    let new = old & !defined | found & defined;
    // A loop that waits for a device finds the same each time.
    if new != old {
        registers.set_rflags(new);
    }
}
