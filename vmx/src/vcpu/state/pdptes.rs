//! The PDPTE registers of PAE paging: SDM 4.4.1 "PDPTE Registers". With EPT an
//! entry takes them from the VMCS, so a write of CR0, CR3 or CR4 that exits and loads them
//! waits until they are read: a reserved bit faults that instruction.

use crate::Error;
use crate::arch::addr::Gpa;
use crate::arch::event::Exception;
use crate::arch::field;
use crate::arch::reg::PDPTE_RESERVED;
use crate::host::Host;
use crate::vcpu::exits::{self, Next};
use crate::vcpu::vmcs::Current;
use crate::vcpu::{Inner, Vcpu};

/// A write that waits for the PDPTEs. RIP is still on it.
#[derive(Clone, Copy)]
pub struct Unfinished {
    /// 0, 3 or 4.
    pub cr: u8,
    /// The register before it.
    pub old: u64,
    /// Bytes of the instruction.
    pub length: u32,
}

/// Writes the four registers.
pub fn write<H: Host>(current: &Current<'_, H>, entries: [u64; 4]) {
    let [e0, e1, e2, e3] = entries;
    current.put(field::GUEST_PDPTE0, e0);
    current.put(field::GUEST_PDPTE1, e1);
    current.put(field::GUEST_PDPTE2, e2);
    current.put(field::GUEST_PDPTE3, e3);
}

impl<H: Host> Vcpu<H> {
    /// The entries at `cr3`; `None` if one has a reserved bit. Where no memory
    /// is they are not present.
    #[inline(never)]
    pub(in crate::vcpu) fn read_pdptes(&self, cr3: u64) -> Option<[u64; 4]> {
        let mut bytes = [0; 32];
        let table = Gpa(cr3 & 0xffff_ffe0);
        if let Err(error) = self.guest().memory().read(table, &mut bytes) {
            log::warn!("PDPTEs at {table:?}: {error:?}");
        }
        let mut entries = [0; 4];
        for (entry, raw) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
            *entry = u64::from_le_bytes(raw.try_into().unwrap_or_default());
        }
        let bits = u32::from(self.guest().caps().physical_bits.min(52));
        let above = (!0u64).checked_shl(bits).unwrap_or(0);
        let bad = |entry: &u64| entry & 1 != 0 && entry & (PDPTE_RESERVED | above) != 0;
        (!entries.iter().any(bad)).then_some(entries)
    }

    /// Loads the PDPTEs, and finishes the instruction that waits for them.
    #[cold]
    #[inline(never)]
    pub(in crate::vcpu) fn load_pdptes(&self, inner: &mut Inner<H>) -> Result<Next, Error> {
        let cr3 = self.with_vmcs(inner, |current, _| current.get(field::GUEST_CR3))?;
        let entries = self.read_pdptes(cr3);
        let waits = inner.unfinished.take();
        inner.pdptes_stale = false;
        self.with_vmcs(inner, |current, inner| match (entries, waits) {
            (Some(entries), waits) => {
                write(current, entries);
                if let Some(waits) = waits {
                    let rip = inner.registers.rip(current);
                    let next = rip.wrapping_add(waits.length.into());
                    inner.registers.set_rip(next & 0xffff_ffff);
                    inner.complete();
                }
                Next::Resume
            }
            (None, waits) => {
                if let Some(waits) = waits {
                    inner.modes.undo(current, waits.cr, waits.old);
                }
                exits::raise(self, inner, Exception::gp(0))
            }
        })
    }
}
