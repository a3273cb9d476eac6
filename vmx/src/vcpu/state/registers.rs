//! Guest registers: the general ones that software switches, and RIP, RSP and
//! RFLAGS, which live in the VMCS and are read when first asked for and written
//! back only when changed.

use crate::arch::field;
use crate::arch::reg::{Interruptibility, Rflags, gpr};
use crate::cpu::GuestRegs;
use crate::host::Host;
use crate::vcpu::vmcs::Current;

const RIP: u8 = 1 << 0;
const RSP: u8 = 1 << 1;
const RFLAGS: u8 = 1 << 2;
/// There is no shadow of STI or MOV SS: the interruptibility state in the VMCS
/// need not be read to know that.
const NO_SHADOW: u8 = 1 << 3;
/// But there was one perhaps, which has ended, and the VMCS may still have it.
const STALE_SHADOW: u8 = 1 << 4;

/// The registers of a vCPU, with what is known of those in the VMCS.
#[derive(Default)]
pub struct Registers {
    /// What entry loads and exit stores. Slot 4 is RSP if it is known.
    pub general: GuestRegs,
    rip: u64,
    rflags: u64,
    /// Of RIP, RSP, RFLAGS: the copy is right. And [`NO_SHADOW`], [`STALE_SHADOW`].
    known: u8,
    /// The copy is newer than the VMCS.
    changed: u8,
}

impl Registers {
    /// All 0; `how` the guest is entered.
    pub fn new(how: u64) -> Self {
        let mut this = Self::default();
        this.general.how = how;
        this
    }

    /// RIP.
    #[inline]
    pub fn rip<H: Host>(&mut self, current: &Current<'_, H>) -> u64 {
        if self.known & RIP == 0 {
            self.rip = current.read(field::GUEST_RIP);
            self.known |= RIP;
        }
        self.rip
    }

    /// Sets RIP.
    pub fn set_rip(&mut self, value: u64) {
        self.rip = value;
        self.known |= RIP;
        self.changed |= RIP;
    }

    /// Moves RIP on at once, in the VMCS too.
    #[inline]
    pub fn move_rip<H: Host>(&mut self, current: &Current<'_, H>, value: u64) {
        current.write(field::GUEST_RIP, value);
        self.rip = value;
        self.known |= RIP;
        self.changed &= !RIP;
    }

    /// An instruction was completed: a shadow of STI or MOV SS has ended. Whether
    /// the VMCS has one is not looked at before [`Registers::settle_shadow`].
    ///
    /// An entry that finds it there all the same holds back, for one instruction,
    /// an interrupt that this entry injects (it is refused even), an exit for an
    /// interrupt window, and debug exceptions: SDM 25.4.2, table 25-3, and 27.3.1.5
    /// "Checks on Guest Non-Register State". Without any of these nothing tells
    /// the difference. RFLAGS.IF does not change meanwhile: blocking by STI is not
    /// allowed without it.
    #[inline]
    pub fn end_shadow(&mut self) {
        self.known |= NO_SHADOW | STALE_SHADOW;
    }

    /// Sees to it that the VMCS has no shadow that has ended.
    #[inline]
    pub fn settle_shadow<H: Host>(&mut self, current: &Current<'_, H>) {
        if self.known & STALE_SHADOW != 0 {
            self.remove_shadow(current);
        }
    }

    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    fn remove_shadow<H: Host>(&mut self, current: &Current<'_, H>) {
        let shadows = (Interruptibility::STI | Interruptibility::MOV_SS).bits();
        let blocking = current.read(field::GUEST_INTERRUPTIBILITY);
        if blocking & shadows != 0 {
            current.write(field::GUEST_INTERRUPTIBILITY, blocking & !shadows);
        }
        self.known &= !STALE_SHADOW;
    }

    /// There is a shadow again, or there may be.
    pub fn forget_shadow(&mut self) {
        self.known &= !(NO_SHADOW | STALE_SHADOW);
    }

    /// An instruction was completed since the last exit, so there is no shadow of
    /// STI or MOV SS; `false` if that is not known.
    pub fn has_no_shadow(&self) -> bool {
        self.known & NO_SHADOW != 0
    }

    /// RFLAGS.
    #[inline]
    pub fn rflags<H: Host>(&mut self, current: &Current<'_, H>) -> u64 {
        if self.known & RFLAGS == 0 {
            self.rflags = current.read(field::GUEST_RFLAGS);
            self.known |= RFLAGS;
        }
        self.rflags
    }

    /// Sets RFLAGS; bit 1 is forced to 1 and undefined bits to 0, as the
    /// processor demands at entry (SDM 27.3.1.4 "Checks on Guest RIP, RFLAGS,
    /// and SSP").
    pub fn set_rflags(&mut self, value: u64) {
        self.rflags = (value & crate::arch::reg::RFLAGS_DEFINED) | Rflags::FIXED.bits();
        self.known |= RFLAGS;
        self.changed |= RFLAGS;
    }

    /// A general register by number; RSP too.
    #[inline]
    pub fn get<H: Host>(&mut self, current: &Current<'_, H>, number: u8) -> u64 {
        let number = usize::from(number & 15);
        if number == gpr::RSP && self.known & RSP == 0 {
            self.set_slot(number, current.read(field::GUEST_RSP));
            self.known |= RSP;
        }
        self.slot(number)
    }

    /// Sets a general register by number; RSP too.
    #[inline]
    pub fn set(&mut self, number: u8, value: u64) {
        let number = usize::from(number & 15);
        self.set_slot(number, value);
        if number == gpr::RSP {
            self.known |= RSP;
            self.changed |= RSP;
        }
    }

    fn slot(&self, number: usize) -> u64 {
        self.general.gpr.get(number).copied().unwrap_or(0)
    }

    fn set_slot(&mut self, number: usize, value: u64) {
        if let Some(slot) = self.general.gpr.get_mut(number) {
            *slot = value;
        }
    }

    /// All three copies are right after this.
    pub fn know_all<H: Host>(&mut self, current: &Current<'_, H>) {
        self.rip(current);
        self.rflags(current);
        #[expect(clippy::cast_possible_truncation, reason = "the number is 4")]
        self.get(current, gpr::RSP as u8);
    }

    /// RIP, after [`Registers::know_all`].
    pub fn known_rip(&self) -> u64 {
        self.rip
    }

    /// RFLAGS, after [`Registers::know_all`] or [`Registers::rflags`].
    pub fn known_rflags(&self) -> u64 {
        self.rflags
    }

    /// A general register, RSP after [`Registers::know_all`].
    pub fn known_gpr(&self, number: usize) -> u64 {
        self.slot(number)
    }

    /// A general register, if it is known without the VMCS.
    pub fn at_hand(&self, number: usize) -> Option<u64> {
        if number == gpr::RSP && self.known & RSP == 0 {
            return None;
        }
        self.general.gpr.get(number).copied()
    }

    /// Writes the changed ones to the VMCS.
    #[inline]
    pub fn flush<H: Host>(&mut self, current: &Current<'_, H>) {
        if self.changed != 0 {
            self.write_back(current);
        }
    }

    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    fn write_back<H: Host>(&mut self, current: &Current<'_, H>) {
        if self.changed & RIP != 0 {
            current.write(field::GUEST_RIP, self.rip);
        }
        if self.changed & RSP != 0 {
            current.write(field::GUEST_RSP, self.slot(gpr::RSP));
        }
        if self.changed & RFLAGS != 0 {
            current.write(field::GUEST_RFLAGS, self.rflags);
        }
        self.changed = 0;
    }

    /// The guest ran: the copies are no longer right.
    #[inline]
    pub fn forget(&mut self) {
        self.known = 0;
    }
}
