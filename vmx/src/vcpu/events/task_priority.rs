//! The task-priority register of one vCPU, CR8.
//!
//! With a TPR shadow MOV CR8 does not exit: it reads and writes a byte of a page
//! that the vCPU has for it (SDM 30.3 "Virtualizing CR8-Based TPR Accesses"). A
//! write that goes below the threshold exits behind the instruction (30.1.2
//! "TPR Virtualization"), and a threshold is set only while the register holds a
//! vector back. Without a shadow MOV CR8 exits.
// UNSAFETY: access to a byte that the processor writes too.
#![expect(unsafe_code)]

use crate::arch::addr::Hpa;
use crate::arch::field;
use crate::caps::Caps;
use crate::fallible::NoMemory;
use crate::host::{Host, OwnedPage};
use crate::vcpu::vmcs::Current;

/// Where VTPR is in the virtual-APIC page: SDM 30.1.1 "Virtualized APIC Registers".
const VTPR: usize = 0x80;

/// The register, and the threshold that goes with it.
pub struct TaskPriority<H: Host> {
    /// The virtual-APIC page, where the processor has a TPR shadow.
    page: Option<OwnedPage<H>>,
    /// The register, where it has none.
    exiting: u8,
    /// The threshold as the VMCS has it, 0 to 15.
    threshold: u8,
}

impl<H: Host> TaskPriority<H> {
    /// A register of 0.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(host: &H, caps: &Caps) -> Result<Self, NoMemory> {
        let page = if caps.has_tpr_shadow() {
            Some(OwnedPage::new(host)?)
        } else {
            None
        };
        Ok(Self {
            page,
            exiting: 0,
            threshold: 0,
        })
    }

    /// The address of the virtual-APIC page, if there is one.
    pub fn page(&self) -> Option<Hpa> {
        self.page.as_ref().map(OwnedPage::physical)
    }

    /// The TPR: the class below which vectors wait, CR8, is in bits 7:4.
    pub fn get(&self) -> u8 {
        let Some(page) = &self.page else {
            return self.exiting;
        };
        let from = page.pointer().wrapping_add(VTPR);
        // SAFETY: inside a page of this vCPU; the processor writes it only while
        // the guest runs, which it does not now.
        unsafe { from.read_volatile() }
    }

    /// Writes CR8. The next entry must look at the threshold.
    pub fn set_class(&mut self, class: u8) {
        let tpr = class.wrapping_shl(4);
        let Some(page) = &self.page else {
            self.exiting = tpr;
            return;
        };
        let to = page.pointer().wrapping_add(VTPR);
        // SAFETY: as in `get`.
        unsafe { to.write_volatile(tpr) };
    }

    /// Has the guest exit when the TPR gets below the class of a vector that it
    /// holds back; `None`: when nothing waits for that. The class is not above the
    /// TPR's, as a VM entry demands (SDM 27.2.1.1 "VM-Execution Control Fields").
    pub fn wait_below(&mut self, current: &Current<'_, H>, class: Option<u8>) {
        let threshold = class.unwrap_or(0);
        if self.page.is_some() && self.threshold != threshold {
            self.threshold = threshold;
            current.write(field::TPR_THRESHOLD, threshold.into());
        }
    }
}
