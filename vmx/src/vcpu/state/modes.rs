//! CR0, CR4, EFER and the mode they make: what the guest believes, what the
//! VMCS holds, and which changes the architecture refuses.
//!
//! SDM 2.5 "Control Registers", 25.6.6 "Guest/Host Masks and Read Shadows for
//! CR0 and CR4", 10.8.5 "Initializing IA-32e Mode".

use crate::arch::control::Entry;
use crate::arch::event::Exception;
use crate::arch::field;
use crate::arch::reg::{Cr0, Cr4, Efer};
use crate::arch::segment::AccessRights;
use crate::caps::Caps;
use crate::host::Host;
use crate::vcpu::cpuid::Features;
use crate::vcpu::msr::{GpFault, valid_efer};
use crate::vcpu::vmcs::Current;

/// CR0 bits that exist; a write drops the others.
const CR0_DEFINED: Cr0 = Cr0::PE
    .union(Cr0::MP)
    .union(Cr0::EM)
    .union(Cr0::TS)
    .union(Cr0::ET)
    .union(Cr0::NE)
    .union(Cr0::WP)
    .union(Cr0::AM)
    .union(Cr0::NW)
    .union(Cr0::CD)
    .union(Cr0::PG);
/// CR0 bits the guest changes without an exit, with unrestricted guest.
const CR0_OWNED: Cr0 = Cr0::PE
    .union(Cr0::MP)
    .union(Cr0::EM)
    .union(Cr0::TS)
    .union(Cr0::WP)
    .union(Cr0::AM);
/// CR4 bits the guest changes without an exit, where its CPUID offers them.
/// PAE decides the paging mode with bits of ours; OSXSAVE switches XCR0.
const CR4_OWNED: Cr4 = Cr4::VME
    .union(Cr4::PVI)
    .union(Cr4::TSD)
    .union(Cr4::DE)
    .union(Cr4::PSE)
    .union(Cr4::PGE)
    .union(Cr4::PCE)
    .union(Cr4::OSFXSR)
    .union(Cr4::OSXMMEXCPT)
    .union(Cr4::FSGSBASE)
    .union(Cr4::SMEP)
    .union(Cr4::SMAP);

/// What has to follow a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Consequences {
    /// The register before the write, for [`Modes::undo`].
    pub old: u64,
    /// The PDPTEs are to be loaded from memory (SDM 4.4.1 "PDPTE Registers").
    pub pdptes: bool,
    /// Translations of the guest's linear addresses are to be dropped (SDM
    /// 4.10.4.1 "Operations that Invalidate TLBs and Paging-Structure Caches").
    pub flush: bool,
}

/// The guest's mode.
#[derive(Clone, Copy, Debug)]
pub struct Modes {
    /// What the guest last wrote to CR0; of its own bits the VMCS knows better.
    cr0: u64,
    /// What the guest last wrote to CR4; likewise.
    cr4: u64,
    efer: u64,
    cr0_mask: u64,
    cr4_mask: u64,
    /// Hardware bits that must be 1: fixed bits, without those that
    /// unrestricted guest frees.
    cr0_forced: u64,
    cr4_forced: u64,
    /// CR4 bits the guest may set.
    cr4_allowed: u64,
    entry: Entry,
}

impl Modes {
    /// As after reset. `cr4_allowed` comes from the guest's CPUID.
    pub fn new(caps: &Caps, cr4_allowed: u64) -> Self {
        let unrestricted = caps.has_unrestricted_guest();
        let mut owned = CR0_OWNED;
        let mut freed = Cr0::empty();
        if unrestricted {
            // SDM 27.3.1.1 "Checks on Guest Control Registers, Debug
            // Registers, and MSRs": PE and PG need not be 1.
            freed = Cr0::PE | Cr0::PG;
        } else {
            owned.remove(Cr0::PE);
        }
        let mut modes = Self {
            cr0: 0,
            cr4: 0,
            efer: 0,
            cr0_mask: !owned.bits() | caps.cr0_fixed0 & !freed.bits(),
            cr4_mask: 0,
            cr0_forced: caps.cr0_fixed0 & !freed.bits(),
            // A machine check in the guest is the host's machine check.
            cr4_forced: caps.cr4_fixed0 | Cr4::MCE.bits(),
            cr4_allowed: 0,
            entry: caps.entry,
        };
        modes.allow_cr4(cr4_allowed);
        modes
    }

    /// The guest's CPUID changed. Its CR4 stays; the masks reach the VMCS with
    /// [`Modes::write_all`].
    pub fn allow_cr4(&mut self, allowed: u64) {
        self.cr4_allowed = allowed;
        self.cr4_mask = !(CR4_OWNED.bits() & allowed) | self.cr4_forced;
    }

    /// Guest-physical address space, EFER and all, into the VMCS.
    pub fn write_all<H: Host>(&self, current: &Current<'_, H>) {
        current.put(field::CR0_MASK, self.cr0_mask);
        current.put(field::CR4_MASK, self.cr4_mask);
        self.write_cr0(current);
        self.write_cr4(current);
        self.write_efer(current);
    }

    fn write_cr0<H: Host>(&self, current: &Current<'_, H>) {
        current.write(field::CR0_SHADOW, self.cr0);
        // Caching is the host's affair: the guest's CD and NW stay a shadow.
        let hardware = (self.cr0 | self.cr0_forced) & !(Cr0::CD | Cr0::NW).bits();
        current.write(field::GUEST_CR0, hardware);
    }

    fn write_cr4<H: Host>(&self, current: &Current<'_, H>) {
        current.write(field::CR4_SHADOW, self.cr4);
        current.write(field::GUEST_CR4, self.cr4 | self.cr4_forced);
    }

    /// VM entry loads IA32_PERF_GLOBAL_CTRL, or no longer.
    pub fn set_counting<H: Host>(&mut self, current: &Current<'_, H>, on: bool) {
        self.entry.set(Entry::LOAD_PERF_GLOBAL_CTRL, on);
        self.write_efer(current);
    }

    fn write_efer<H: Host>(&self, current: &Current<'_, H>) {
        current.put(field::GUEST_EFER, self.efer);
        let mut entry = self.entry;
        entry.set(Entry::IA32E_MODE_GUEST, self.is_long_mode());
        current.put(field::ENTRY_CONTROLS, entry.bits());
    }

    /// CR0 as the guest would read it.
    pub fn cr0<H: Host>(&mut self, current: &Current<'_, H>) -> u64 {
        let hardware = current.read(field::GUEST_CR0);
        self.cr0 = (self.cr0 & self.cr0_mask) | (hardware & !self.cr0_mask);
        self.cr0
    }

    /// CR4 as the guest would read it.
    pub fn cr4<H: Host>(&mut self, current: &Current<'_, H>) -> u64 {
        let hardware = current.read(field::GUEST_CR4);
        self.cr4 = (self.cr4 & self.cr4_mask) | (hardware & !self.cr4_mask);
        self.cr4
    }

    /// CR0 and CR4 without reading the VMCS, right in the bits whose change
    /// always exits. CR0.PG, CR4.PAE and CR4.LA57 are among them.
    pub fn intercepted(&self) -> (u64, u64) {
        (self.cr0, self.cr4)
    }

    /// IA32_EFER.
    pub fn efer(&self) -> u64 {
        self.efer
    }

    /// EFER.LMA.
    pub fn is_long_mode(&self) -> bool {
        self.efer & Efer::LMA.bits() != 0
    }

    /// CR4.OSXSAVE; a change of it always exits.
    pub fn has_osxsave(&self) -> bool {
        self.cr4 & Cr4::OSXSAVE.bits() != 0
    }

    /// The guest can execute SYSCALL.
    pub fn has_syscall(&self) -> bool {
        let both = (Efer::SCE | Efer::LMA).bits();
        self.efer & both == both
    }

    /// Paging with PDPTEs: PAE, and not IA-32e.
    pub fn uses_pdptes(&self) -> bool {
        self.cr0 & Cr0::PG.bits() != 0 && self.cr4 & Cr4::PAE.bits() != 0 && !self.is_long_mode()
    }

    /// EFER.LMA follows LME and CR0.PG.
    fn follow_lma<H: Host>(&mut self, current: &Current<'_, H>) {
        let paging = self.cr0 & Cr0::PG.bits() != 0;
        let active = paging && self.efer & Efer::LME.bits() != 0;
        if active != self.is_long_mode() {
            self.efer ^= Efer::LMA.bits();
            if active {
                // SDM 27.3.1.2 "Checks on Guest Segment Registers": in IA-32e
                // mode TR is a busy 64-bit TSS. A processor makes no such check
                // when software enters the mode before LTR.
                let rights = current.get(field::GUEST_TR_RIGHTS);
                current.put(field::GUEST_TR_RIGHTS, (rights & !0xf) | 0xb);
            }
        }
        self.write_efer(current);
    }

    /// A task switch sets CR0.TS.
    pub fn set_task_switched<H: Host>(&mut self, current: &Current<'_, H>) {
        self.cr0 = self.cr0(current) | Cr0::TS.bits();
        self.write_cr0(current);
    }

    /// Takes back a write of CR0, CR3 or CR4 that ends in a fault.
    pub fn undo<H: Host>(&mut self, current: &Current<'_, H>, cr: u8, old: u64) {
        match cr {
            0 => {
                self.cr0 = old;
                self.write_cr0(current);
                self.follow_lma(current);
            }
            3 => current.put(field::GUEST_CR3, old),
            _ => {
                self.cr4 = old;
                self.write_cr4(current);
            }
        }
    }

    /// The guest writes CR0.
    ///
    /// # Errors
    /// #GP.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn guest_write_cr0<H: Host>(
        &mut self,
        current: &Current<'_, H>,
        value: u64,
    ) -> Result<Consequences, Exception> {
        let new = Cr0::from_bits_retain(value);
        let old = Cr0::from_bits_retain(self.cr0(current));
        let long = self.efer & Efer::LME.bits() != 0;
        let cr4 = Cr4::from_bits_retain(self.cr4(current));
        let in_64bit_code = || {
            let rights = AccessRights::from_bits_retain(current.read(field::GUEST_CS_RIGHTS));
            rights.contains(AccessRights::LONG)
        };
        let refused = value >> 32 != 0
            || (new.contains(Cr0::NW) && !new.contains(Cr0::CD))
            || (new.contains(Cr0::PG) && !new.contains(Cr0::PE));
        let starts = new.contains(Cr0::PG) && !old.contains(Cr0::PG);
        let stops = !new.contains(Cr0::PG) && old.contains(Cr0::PG);
        let refused = refused
            || (starts && long && (!cr4.contains(Cr4::PAE) || in_64bit_code()))
            || (stops && (cr4.contains(Cr4::PCIDE) || (self.is_long_mode() && in_64bit_code())));
        if refused {
            return Err(Exception::gp(0));
        }
        self.cr0 = ((new & CR0_DEFINED) | Cr0::ET).bits();
        self.write_cr0(current);
        if starts || stops {
            self.follow_lma(current);
        }
        let changed = old ^ Cr0::from_bits_retain(self.cr0);
        Ok(Consequences {
            old: old.bits(),
            pdptes: self.uses_pdptes() && changed.intersects(Cr0::PG | Cr0::CD | Cr0::NW),
            flush: changed.intersects(Cr0::PG | Cr0::WP),
        })
    }

    /// LMSW: sets PE, but does not clear it; MP, EM and TS become what `status`
    /// says (SDM 2A "LMSW").
    ///
    /// # Errors
    /// None that these bits can cause.
    pub fn load_status<H: Host>(
        &mut self,
        current: &Current<'_, H>,
        status: u16,
    ) -> Result<Consequences, Exception> {
        let old = self.cr0(current);
        self.guest_write_cr0(current, (old & !0xe) | (u64::from(status) & 0xf))
    }

    /// The guest writes CR4. `cr3` is its CR3.
    ///
    /// # Errors
    /// #GP.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn guest_write_cr4<H: Host>(
        &mut self,
        current: &Current<'_, H>,
        value: u64,
        cr3: u64,
    ) -> Result<Consequences, Exception> {
        let new = Cr4::from_bits_retain(value);
        let old = Cr4::from_bits_retain(self.cr4(current));
        let sets_pcide = new.contains(Cr4::PCIDE) && !old.contains(Cr4::PCIDE);
        if value & !self.cr4_allowed != 0
            || (self.is_long_mode() && !new.contains(Cr4::PAE))
            || (sets_pcide && (!self.is_long_mode() || cr3 & 0xfff != 0))
        {
            return Err(Exception::gp(0));
        }
        self.cr4 = value;
        self.write_cr4(current);
        let changed = old ^ new;
        let paging = Cr4::PAE | Cr4::PGE | Cr4::PSE | Cr4::SMEP;
        // PAE belongs to the mode, so PDPTEs and LMA depend on CR0 as well.
        self.cr0(current);
        Ok(Consequences {
            old: old.bits(),
            pdptes: self.uses_pdptes() && changed.intersects(paging),
            flush: changed.intersects(paging | Cr4::PCIDE | Cr4::SMAP),
        })
    }

    /// IA32_EFER is written: by the guest, or by its client, which may set LME
    /// whatever CR0.PG is.
    ///
    /// # Errors
    /// The value is refused.
    pub fn write_msr_efer<H: Host>(
        &mut self,
        current: &Current<'_, H>,
        value: u64,
        features: &Features,
        by_guest: bool,
    ) -> Result<(), GpFault> {
        let cr0 = self.cr0(current);
        // LMA is set by `follow_lma`, which knows what else that means.
        let lma = Efer::LMA.bits();
        let new = valid_efer(self.efer, value, cr0, features, by_guest)?;
        self.efer = (new & !lma) | (self.efer & lma);
        self.follow_lma(current);
        Ok(())
    }

    /// The client sets CR0 and CR4. No check here: it may set EFER afterwards,
    /// and entry finds what does not fit.
    pub fn set_by_client<H: Host>(&mut self, current: &Current<'_, H>, cr0: u64, cr4: u64) {
        self.cr0 = (cr0 & CR0_DEFINED.bits()) | Cr0::ET.bits();
        self.cr4 = cr4 & self.cr4_allowed;
        self.follow_lma(current);
        self.write_cr0(current);
        self.write_cr4(current);
    }

    /// The processor cannot run this mode: no unrestricted guest, and paging
    /// is off.
    pub fn needs_client_emulation<H: Host>(&mut self, current: &Current<'_, H>) -> bool {
        let missing = Cr0::from_bits_retain(self.cr0_forced & !self.cr0(current));
        missing.intersects(Cr0::PE | Cr0::PG)
    }
}
