//! The guest's own page tables: linear to guest-physical, as the processor
//! would do it.
//!
//! Used for string I/O, for the emulator and for fetching its instructions. All
//! four paging modes (SDM chapter 4 "Paging"): 32-bit with PSE and PSE-36, PAE,
//! 4-level, 5-level; write protection, execute-disable, SMEP, SMAP, reserved
//! bits, accessed and dirty flags. Protection keys are not handled: they are
//! not offered to guests.

use crate::Error;
use crate::arch::addr::{Gpa, Gva};
use crate::arch::event::{Exception, PageFault};
use crate::arch::reg::{Cr0, Cr4, Efer};

use super::AccessError;

/// Times a walk starts again because another processor changed an entry.
const ATTEMPTS: u32 = 16;

/// Entry bits, SDM tables 4-4 to 4-20.
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const PAGE_SIZE_FLAG: u64 = 1 << 7;
const EXECUTE_DISABLE: u64 = 1 << 63;

/// The registers that say how the guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Paging {
    /// CR0 as the guest sees it: PG and WP count.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4 as the guest sees it: PSE, PAE, LA57, SMEP and SMAP count.
    pub cr4: u64,
    /// IA32_EFER: LMA and NXE count.
    pub efer: u64,
    /// RFLAGS.AC: supervisor code may touch user pages despite SMAP.
    pub ac: bool,
    /// The current privilege level.
    pub cpl: u8,
    /// With PAE paging, the four PDPTEs that the processor has loaded; `None`
    /// reads the one needed from memory at CR3.
    pub pdptes: Option<[u64; 4]>,
    /// The guest's physical-address width, CPUID 80000008H EAX 7:0; 32 to 52.
    pub address_bits: u8,
    /// The guest has 1 GB pages, CPUID 80000001H EDX bit 26.
    pub pages_1g: bool,
}

/// What the access wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WalkAccess {
    /// A write.
    pub write: bool,
    /// An instruction fetch.
    pub fetch: bool,
    /// An implicit supervisor access (to a descriptor table or TSS), whatever
    /// the privilege level.
    pub implicit: bool,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address.
    pub gpa: Gpa,
    /// log2 of the bytes of the page: 12, 21, 22 or 30.
    pub shift: u32,
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkFault {
    /// #PF for the guest, CR2 and error code included.
    Guest(Exception),
    /// A paging structure lies where no memory is mapped.
    Hole(Gpa),
    /// A paging structure lies in a 2 MB group with protected pages; this is
    /// the lowest.
    Protected(Gpa),
    /// Another processor keeps changing the entries; try again.
    Retry,
    /// The client's memory could not be used.
    Host(Error),
}

impl From<AccessError> for WalkFault {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Mmio(gpa) | AccessError::RomWrite(gpa) => Self::Hole(gpa),
            AccessError::Protected(gpa) => Self::Protected(gpa),
            AccessError::Host(error) => Self::Host(error),
        }
    }
}

/// Guest memory as the walker sees it: [`super::Reader`].
pub trait TableMemory {
    /// Reads `size` (4 or 8) naturally aligned bytes.
    ///
    /// # Errors
    /// [`AccessError`].
    fn entry(&self, gpa: Gpa, size: u8) -> Result<u64, AccessError>;
    /// Atomically replaces an entry; returns what was there.
    ///
    /// # Errors
    /// [`AccessError`].
    fn exchange(&self, gpa: Gpa, size: u8, old: u64, new: u64) -> Result<u64, AccessError>;
}

/// Translates `address` and sets accessed and dirty flags as the processor
/// would. In long mode `address` is canonical (the caller has raised #GP or #SS
/// otherwise); outside of it bits 63:32 are ignored. Accessed flags are set only
/// if the whole translation succeeds.
///
/// # Errors
/// [`WalkFault`].
#[cfg_attr(haxm_module, optimize(speed))]
pub fn translate<M: TableMemory + ?Sized>(
    memory: &M,
    paging: &Paging,
    address: Gva,
    access: WalkAccess,
) -> Result<Translation, WalkFault> {
    let walk = Walk::new(paging, address, access);
    let Some(first) = walk.first_level() else {
        return Ok(Translation {
            gpa: Gpa(walk.address),
            shift: 12,
        });
    };
    for _ in 0..ATTEMPTS {
        if let Some(translation) = walk.attempt(memory, first)? {
            return Ok(translation);
        }
    }
    Err(WalkFault::Retry)
}

/// The paging modes, SDM 4.1.1 "Four Paging Modes".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Off,
    Bits32,
    Pae,
    Long { levels: u32 },
}

/// One translation: the request and what the registers make of it.
struct Walk<'a> {
    paging: &'a Paging,
    access: WalkAccess,
    address: u64,
    mode: Mode,
    /// A user-mode access, SDM 4.6 "Access Rights".
    user: bool,
}

/// A page found at the end of a walk.
struct Leaf {
    entry: u64,
    shift: u32,
}

/// An entry that the walk used, for its accessed flag.
#[derive(Clone, Copy, Default)]
struct Used {
    gpa: Gpa,
    entry: u64,
}

impl<'a> Walk<'a> {
    fn new(paging: &'a Paging, address: Gva, access: WalkAccess) -> Self {
        let mode = if paging.cr0 & Cr0::PG.bits() == 0 {
            Mode::Off
        } else if paging.cr4 & Cr4::PAE.bits() == 0 {
            Mode::Bits32
        } else if paging.efer & Efer::LMA.bits() == 0 {
            Mode::Pae
        } else if paging.cr4 & Cr4::LA57.bits() == 0 {
            Mode::Long { levels: 4 }
        } else {
            Mode::Long { levels: 5 }
        };
        let address = match mode {
            Mode::Long { .. } => address.0,
            _ => address.0 & 0xffff_ffff,
        };
        Self {
            paging,
            access,
            address,
            mode,
            user: paging.cpl == 3 && !access.implicit,
        }
    }

    /// The level of the first table and where it is; `None` without paging.
    fn first_level(&self) -> Option<(u32, u64)> {
        let cr3 = self.paging.cr3;
        match self.mode {
            Mode::Off => None,
            // SDM 4.3: CR3 bits 31:12.
            Mode::Bits32 => Some((2, cr3 & 0xffff_f000)),
            // SDM 4.4.1: CR3 bits 31:5.
            Mode::Pae => Some((3, cr3 & 0xffff_ffe0)),
            Mode::Long { levels } => Some((levels, cr3 & self.frame_mask())),
        }
    }

    /// Bits 51:12 as far as the guest has them.
    fn frame_mask(&self) -> u64 {
        self.address_mask() & !0xfff
    }

    /// The bits of a physical address.
    fn address_mask(&self) -> u64 {
        let bits = u32::from(self.paging.address_bits).clamp(32, 52);
        1u64.wrapping_shl(bits).wrapping_sub(1)
    }

    const fn entry_size(&self) -> u8 {
        if matches!(self.mode, Mode::Bits32) {
            4
        } else {
            8
        }
    }

    /// log2 of what an entry of `level` covers.
    const fn shift(&self, level: u32) -> u32 {
        let bits = if matches!(self.mode, Mode::Bits32) {
            10
        } else {
            9
        };
        12u32.wrapping_add(level.wrapping_sub(1).wrapping_mul(bits))
    }

    /// Where the entry for the address is in a table of `level`.
    fn entry_address(&self, table: u64, level: u32) -> Gpa {
        let mask = match (self.mode, level) {
            (Mode::Bits32, _) => 1023,
            (Mode::Pae, 3) => 3,
            _ => 511,
        };
        let index = self.address.wrapping_shr(self.shift(level)) & mask;
        let offset = index.wrapping_mul(u64::from(self.entry_size()));
        Gpa(table.wrapping_add(offset))
    }

    /// One walk from the top. `None`: an entry changed under it.
    #[cfg_attr(haxm_module, optimize(speed))]
    fn attempt<M: TableMemory + ?Sized>(
        &self,
        memory: &M,
        (first, root): (u32, u64),
    ) -> Result<Option<Translation>, WalkFault> {
        let size = self.entry_size();
        let mut used = [Used::default(); 5];
        let mut count = 0usize;
        let mut table = root;
        let mut rights = WRITABLE | USER;
        let mut execute_disable = 0;
        let mut level = first;
        let leaf = loop {
            let gpa = self.entry_address(table, level);
            let pdpte = self.mode == Mode::Pae && level == 3;
            let entry = match self.paging.pdptes {
                Some(loaded) if pdpte => self.loaded_pdpte(loaded),
                _ => memory.entry(gpa, size)?,
            };
            if entry & PRESENT == 0 {
                return Err(self.fault(PageFault::empty()));
            }
            if pdpte {
                // No rights and no accessed flag in it, SDM table 4-8. Its
                // reserved bits were checked when CR3 was loaded.
                table = entry & self.frame_mask();
                level = 2;
                continue;
            }
            let large = self.is_leaf(entry, level);
            if entry & self.reserved(level, large) != 0 {
                return Err(self.fault(PageFault::PRESENT | PageFault::RESERVED));
            }
            rights &= entry;
            execute_disable |= entry & EXECUTE_DISABLE;
            if let Some(slot) = used.get_mut(count) {
                *slot = Used { gpa, entry };
                count = count.saturating_add(1);
            }
            if large {
                let shift = self.shift(level);
                break Leaf { entry, shift };
            }
            table = entry & self.frame_mask();
            level = level.wrapping_sub(1);
        };
        // In 32-bit paging bit 63 does not exist; elsewhere it is reserved
        // without NXE, so here it means what it says.
        if !self.allowed(rights, execute_disable != 0) {
            return Err(self.fault(PageFault::PRESENT));
        }
        let used = used.get(..count).unwrap_or_default();
        if !self.set_flags(memory, used)? {
            return Ok(None);
        }
        Ok(Some(self.translation(&leaf)))
    }

    fn loaded_pdpte(&self, loaded: [u64; 4]) -> u64 {
        let index = (self.address.wrapping_shr(30) & 3) as usize;
        loaded.get(index).copied().unwrap_or(0)
    }

    /// Whether a present entry maps a page.
    fn is_leaf(&self, entry: u64, level: u32) -> bool {
        match (self.mode, level) {
            (_, 1) => true,
            (Mode::Bits32, 2) => {
                entry & PAGE_SIZE_FLAG != 0 && self.paging.cr4 & Cr4::PSE.bits() != 0
            }
            (_, 2) => entry & PAGE_SIZE_FLAG != 0,
            (Mode::Long { .. }, 3) => entry & PAGE_SIZE_FLAG != 0 && self.paging.pages_1g,
            _ => false,
        }
    }

    /// The bits of an entry that must be 0: SDM 4.3 (32-bit), tables 4-9 to
    /// 4-11 (PAE), tables 4-14 to 4-20 (4- and 5-level).
    fn reserved(&self, level: u32, large: bool) -> u64 {
        let above = !self.address_mask();
        if self.mode == Mode::Bits32 {
            if !(large && level == 2) {
                return 0;
            }
            // Bits 20:13 are address bits 39:32; those the guest does not
            // have, and bit 21, are reserved.
            let bits = u32::from(self.paging.address_bits).clamp(32, 40);
            let existing = 1u64.wrapping_shl(bits.wrapping_sub(32)).wrapping_sub(1);
            return (1 << 21) | ((0xff & !existing) << 13);
        }
        let no_execute = if self.paging.efer & Efer::NXE.bits() == 0 {
            EXECUTE_DISABLE
        } else {
            0
        };
        let high = match self.mode {
            // PAE entries have no ignored bits: all of 62:MAXPHYADDR.
            Mode::Pae => above & !EXECUTE_DISABLE,
            _ => above & 0x000f_ffff_ffff_ffff,
        };
        let low = match (large, level) {
            (true, 2) => 0x1f_e000,
            (true, 3) => 0x3fff_e000,
            // Where an entry of this level cannot map a page, PS must be 0.
            (false, 3..) => PAGE_SIZE_FLAG,
            _ => 0,
        };
        no_execute | high | low
    }

    /// SDM 4.6.1 "Determination of Access Rights": `rights` are R/W and U/S of
    /// all entries together.
    fn allowed(&self, rights: u64, execute_disable: bool) -> bool {
        let user_page = rights & USER != 0;
        let writable = rights & WRITABLE != 0;
        let cr4 = Cr4::from_bits_retain(self.paging.cr4);
        let executable = !execute_disable || self.paging.efer & Efer::NXE.bits() == 0;
        if self.user {
            return user_page
                && (!self.access.write || writable)
                && (!self.access.fetch || executable);
        }
        if self.access.fetch {
            return executable && !(user_page && cr4.contains(Cr4::SMEP));
        }
        if user_page && cr4.contains(Cr4::SMAP) && (self.access.implicit || !self.paging.ac) {
            return false;
        }
        !self.access.write || writable || self.paging.cr0 & Cr0::WP.bits() == 0
    }

    /// Sets the accessed flags and, for a write, the dirty flag of the last
    /// entry, SDM 4.8 "Accessed and Dirty Flags". False: an entry changed.
    fn set_flags<M: TableMemory + ?Sized>(
        &self,
        memory: &M,
        used: &[Used],
    ) -> Result<bool, WalkFault> {
        let last = used.len().wrapping_sub(1);
        for (index, Used { gpa, entry }) in used.iter().enumerate() {
            let dirty = if index == last && self.access.write {
                DIRTY
            } else {
                0
            };
            let wanted = entry | ACCESSED | dirty;
            if wanted == *entry {
                continue;
            }
            match memory.exchange(*gpa, self.entry_size(), *entry, wanted) {
                Ok(found) if found == *entry => {}
                Ok(_) => return Ok(false),
                // Page tables in ROM keep their flags as they are.
                Err(AccessError::RomWrite(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    fn translation(&self, leaf: &Leaf) -> Translation {
        let offset = 1u64.wrapping_shl(leaf.shift).wrapping_sub(1);
        let mut base = leaf.entry & self.frame_mask() & !offset;
        if leaf.shift == 22 {
            // PSE-36, SDM table 4-4: bits 31:22, and 39:32 in bits 20:13.
            base = (leaf.entry & 0xffc0_0000) | ((leaf.entry >> 13) & 0xff) << 32;
        }
        Translation {
            gpa: Gpa(base | (self.address & offset)),
            shift: leaf.shift,
        }
    }

    /// #PF with what the access adds to the error code, SDM 4.7 "Page-Fault
    /// Exceptions".
    fn fault(&self, mut code: PageFault) -> WalkFault {
        let fetches_count = self.paging.cr4 & Cr4::SMEP.bits() != 0
            || (self.paging.cr4 & Cr4::PAE.bits() != 0 && self.paging.efer & Efer::NXE.bits() != 0);
        code.set(PageFault::WRITE, self.access.write);
        code.set(PageFault::USER, self.user);
        code.set(PageFault::FETCH, self.access.fetch && fetches_count);
        WalkFault::Guest(Exception::page_fault(self.address, code))
    }
}
