//! The smallest hypervisor there is: one VMCS with a valid 64-bit guest, for
//! the simulator's own tests and for fuzzing single fields.
// UNSAFETY: executes the simulated processor's instructions.
#![expect(unsafe_code)]

use std::cell::Cell;

use vmx::arch::addr::{Hpa, Hva};
use vmx::arch::ept::{EPTP_ACCESSED_DIRTY, EPTP_WALK_4, EPTP_WB};
use vmx::cpu::{Cpu, GuestRegs, TableRegister, UserSelectors, VmxFailure};
use vmx::host::{Host, HostPage};

use crate::host::SimHost;
use crate::machine::Machine;
use crate::memory::Owner;
use crate::profile::Profile;

/// A field of the VMCS and a value.
pub type FieldValue = (u32, u64);

/// One processor in VMX operation with one VMCS current. Preemption and
/// interrupts are masked while it lives, except in [`Rig::interrupts_on`].
pub struct Rig {
    /// The machine.
    pub machine: Machine,
    host: SimHost,
    vmxon: Option<HostPage>,
    vmcs: Option<HostPage>,
    pages: Vec<HostPage>,
    ept: u64,
    saved: usize,
    gdtr: TableRegister,
    selectors: UserSelectors,
    launched: Cell<bool>,
    /// The guest's registers.
    pub regs: GuestRegs,
}

/// Why an entry did not happen: VM-instruction error, `None` for VMfailInvalid.
pub type EntryError = Option<u64>;

impl Rig {
    /// VMXON, VMCLEAR, VMPTRLD and a VMCS that passes every check.
    ///
    /// # Panics
    /// If that does not work.
    #[must_use]
    pub fn new(profile: Profile) -> Self {
        let mut this = Self::off(Machine::new(profile, 2));
        this.on();
        this
    }

    /// The pages, but no VMX operation yet.
    ///
    /// # Panics
    /// If a page cannot be had.
    #[must_use]
    pub fn off(machine: Machine) -> Self {
        let host = machine.host();
        let page = || host.alloc_page().expect("a page");
        let revision = crate::instructions::revision(machine.profile());
        let (vmxon, vmcs) = (page(), page());
        for region in [&vmxon, &vmcs] {
            machine
                .0
                .state()
                .memory
                .write(region.physical.0, &revision.to_le_bytes());
        }
        let pages: Vec<HostPage> = (0..6).map(|_| page()).collect();
        host.preempt_off();
        let saved = host.interrupts_save();
        let (gdtr, selectors) = (host.cpu().gdtr(), host.cpu().user_selectors());
        Self {
            ept: pages[0].physical.0,
            machine,
            host,
            vmxon: Some(vmxon),
            vmcs: Some(vmcs),
            pages,
            saved,
            gdtr,
            selectors,
            launched: Cell::new(false),
            regs: GuestRegs::default(),
        }
    }

    /// Enters VMX operation and makes the VMCS valid and current.
    ///
    /// # Panics
    /// If an instruction fails.
    pub fn on(&mut self) {
        let (vmxon, vmcs) = (self.vmxon_region(), self.vmcs_region());
        // SAFETY: pinned, not in VMX operation.
        unsafe { self.host.set_vmxe(true) };
        // SAFETY: the region is ours and holds the revision identifier.
        unsafe { self.cpu().vmxon(vmxon) }.expect("VMXON");
        // SAFETY: in VMX operation, the region is ours.
        unsafe { self.cpu().vmclear(vmcs) }.expect("VMCLEAR");
        // SAFETY: as above.
        unsafe { self.cpu().vmptrld(vmcs) }.expect("VMPTRLD");
        for (field, value) in self.valid_state() {
            self.write(field, value).expect("VMWRITE");
        }
    }

    /// The processor.
    #[must_use]
    pub fn cpu(&self) -> &crate::SimCpu {
        self.host.cpu()
    }

    /// The host.
    #[must_use]
    pub fn host(&self) -> &SimHost {
        &self.host
    }

    /// The processor that the rig is on.
    #[must_use]
    pub fn host_cpu(&self) -> usize {
        self.host.current_cpu()
    }

    /// The VMXON region.
    ///
    /// # Panics
    /// Never while the rig lives.
    #[must_use]
    pub fn vmxon_region(&self) -> Hpa {
        self.vmxon.as_ref().expect("kept until the drop").physical
    }

    /// The VMCS region.
    ///
    /// # Panics
    /// Never while the rig lives.
    #[must_use]
    pub fn vmcs_region(&self) -> Hpa {
        self.vmcs.as_ref().expect("kept until the drop").physical
    }

    /// Physical address of a spare zeroed page, 0 to 2.
    #[must_use]
    pub fn spare(&self, index: usize) -> u64 {
        self.pages[3 + index].physical.0
    }

    /// Writes 8 bytes of physical memory.
    pub fn poke(&self, physical: u64, value: u64) {
        let done = self
            .machine
            .0
            .state()
            .memory
            .write(physical, &value.to_le_bytes());
        assert!(done, "{physical:#x} is not memory");
    }

    /// Reads 8 bytes of physical memory.
    #[must_use]
    pub fn peek(&self, physical: u64) -> u64 {
        self.machine.0.state().memory.load(physical).unwrap_or(0)
    }

    /// VMWRITE.
    ///
    /// # Errors
    /// As the instruction.
    pub fn write(&self, field: u32, value: u64) -> Result<(), VmxFailure> {
        // SAFETY: in VMX operation; the machine is simulated.
        unsafe { self.cpu().vmwrite(field, value) }
    }

    /// VMREAD.
    ///
    /// # Panics
    /// If it fails.
    #[must_use]
    pub fn read(&self, field: u32) -> u64 {
        // SAFETY: in VMX operation.
        unsafe { self.cpu().vmread(field) }.expect("VMREAD")
    }

    /// Enters the guest; VMLAUNCH first, VMRESUME afterwards. Returns the
    /// exit-reason field.
    ///
    /// # Errors
    /// The VM-instruction error.
    pub fn enter(&mut self) -> Result<u64, EntryError> {
        let launched = self.launched.get();
        let result = self.enter_as(launched);
        // A failed entry (bit 31) leaves the launch state as it was.
        if matches!(result, Ok(reason) if reason >> 31 == 0) {
            self.launched.set(true);
        }
        result
    }

    /// VMLAUNCH or VMRESUME as told.
    ///
    /// # Errors
    /// The VM-instruction error.
    pub fn enter_as(&mut self, launched: bool) -> Result<u64, EntryError> {
        let host = self.host.clone();
        self.regs.how = u64::from(launched);
        // SAFETY: interrupts are off, the VMCS is ours.
        let result = unsafe { host.cpu().enter(&mut self.regs) };
        // SAFETY: interrupts are off; both were read on this processor.
        unsafe {
            host.cpu().restore_segmentation(self.gdtr, &self.selectors);
        };
        host.guest_left();
        match result {
            Ok(()) => Ok(self.read(0x4402)),
            Err(VmxFailure::Valid) => Err(Some(self.read(0x4400))),
            Err(VmxFailure::Invalid) => Err(None),
        }
    }

    /// Takes the interrupts that wait.
    pub fn interrupts_on(&mut self) {
        // SAFETY: pairs with the `interrupts_save` before.
        unsafe { self.host.interrupts_restore(self.saved) };
        self.saved = self.host.interrupts_save();
    }

    /// Maps guest page `gpa` (below 2 MB) to a frame of a process, with these rights (bits 2:0).
    pub fn map(&self, gpa: u64, frame: u64, rights: u64) {
        assert!(gpa < 1 << 21);
        let tables: Vec<u64> = self.pages.iter().map(|page| page.physical.0).collect();
        self.poke(tables[0], tables[1] | 7);
        self.poke(tables[1], tables[2] | 7);
        self.poke(tables[2], self.page_table() | 7);
        let leaf = if rights == 0 {
            0
        } else {
            frame << 12 | 6 << 3 | rights
        };
        self.poke(self.page_table() + (gpa >> 12) * 8, leaf);
    }

    fn page_table(&self) -> u64 {
        self.pages[5].physical.0
    }

    /// Where the EPT entry of guest page `gpa` is.
    #[must_use]
    pub fn leaf_address(&self, gpa: u64) -> u64 {
        self.page_table() + (gpa >> 12) * 8
    }

    /// A page of the process's memory and its frame.
    #[must_use]
    pub fn user_page(&self) -> (Hva, u64) {
        let process = self.machine.process();
        let at = process.map(4096);
        process.poke(at, &[0]);
        (at, process.frame_of(at).unwrap_or(0))
    }

    /// Whether the model has EPT.
    #[must_use]
    pub fn has_ept(&self) -> bool {
        self.machine.profile().allows_secondary(1)
    }

    /// A state that passes every check on this model: a 64-bit guest at CPL 0.
    #[must_use]
    pub fn valid_state(&self) -> Vec<FieldValue> {
        let p = self.machine.profile();
        let want = |caps: u64, bits: u64| (bits | caps & 0xffff_ffff) & caps >> 32;
        let mut state = vec![
            (0x4000, want(p.control_caps(0x481), 1 | 8 | 1 << 5)),
            (0x4002, want(p.control_caps(0x482), 1 << 7 | 1 << 31)),
            (
                0x400c,
                want(p.control_caps(0x483), 1 << 9 | 0xf << 18 | 1 << 2),
            ),
            (
                0x4012,
                want(p.control_caps(0x484), 1 << 9 | 3 << 14 | 1 << 2),
            ),
            (0x401e, want(p.msr(0x48b), 1 << 1 | 1 << 7)),
        ];
        if self.has_ept() {
            let flags = if p.msr(0x48c) >> 21 & 1 != 0 {
                EPTP_ACCESSED_DIRTY
            } else {
                0
            };
            state.push((0x201a, self.ept | EPTP_WALK_4 | EPTP_WB | flags));
        }
        state.extend(self.host_state());
        state.extend(guest_state(p));
        state
    }

    fn host_state(&self) -> Vec<FieldValue> {
        let p = self.machine.profile();
        let cpu = self.cpu();
        let (k, s) = (cpu.kernel_selectors(), cpu.user_selectors());
        let get = |number| {
            self.machine
                .msr(self.host.current_cpu(), number)
                .unwrap_or(0)
        };
        let mut state = vec![
            (0x0c00, u64::from(s.es)),
            (0x0c02, u64::from(k.cs)),
            (0x0c04, u64::from(k.ss)),
            (0x0c06, u64::from(s.ds)),
            (0x0c08, u64::from(s.fs)),
            (0x0c0a, u64::from(s.gs)),
            (0x0c0c, u64::from(k.tr)),
            (0x4c00, get(0x174)),
            (0x6c00, cpu.cr0()),
            (0x6c02, cpu.cr3()),
            (0x6c04, cpu.cr4()),
            (0x6c06, get(0xc000_0100)),
            (0x6c08, get(0xc000_0101)),
            (0x6c0a, cpu.tr_base()),
            (0x6c0c, cpu.gdtr().base),
            (0x6c0e, cpu.idtr().base),
            (0x6c10, get(0x175)),
            (0x6c12, get(0x176)),
        ];
        if p.allows_exit(12) {
            state.push((0x2c04, get(0x38f)));
        }
        if p.allows_exit(19) {
            state.push((0x2c00, get(0x277)));
        }
        if p.allows_exit(21) {
            state.push((0x2c02, get(0xc000_0080)));
        }
        state
    }
}

/// A 64-bit guest that passes every check.
fn guest_state(p: &Profile) -> Vec<FieldValue> {
    let mut state = vec![
        (0x2800, u64::MAX),
        (0x6800, 0x8000_0031),
        (0x6802, 0x1000),
        (0x6804, 0x2020),
        (0x681a, 0x400),
        (0x681c, 0x8000),
        (0x681e, 0x10_0000),
        (0x6820, 0x202),
        (0x4810, 0xffff),
        (0x4812, 0xffff),
        (0x6816, 0x5000),
        (0x6818, 0x6000),
    ];
    if p.allows_entry(14) {
        state.push((0x2804, 0x0007_0406_0007_0406));
    }
    if p.allows_entry(15) {
        state.push((0x2806, 0xd00));
    }
    // ES, CS, SS, DS, FS, GS: flat; LDTR unusable; TR a busy 64-bit TSS.
    for index in 0..8 {
        let (selector, limit, rights) = match index {
            1 => (8, 0xffff_ffff, 0xa09b),
            6 => (0, 0, 1 << 16),
            7 => (0x18, 0x67, 0x8b),
            _ => (0x10, 0xffff_ffff, 0xc093),
        };
        state.push((0x0800 + index * 2, selector));
        state.push((0x4800 + index * 2, limit));
        state.push((0x4814 + index * 2, rights));
        state.push((0x6806 + index * 2, 0));
    }
    state
}

impl Drop for Rig {
    fn drop(&mut self) {
        let number = self.host.current_cpu();
        if self.machine.in_vmx(number) {
            // SAFETY: in VMX operation, the region is ours.
            let _ = unsafe { self.cpu().vmclear(self.vmcs_region()) };
            // SAFETY: the rig executed the VMXON.
            let _ = unsafe { self.cpu().vmxoff() };
        }
        // SAFETY: pinned, no longer in VMX operation.
        unsafe { self.host.set_vmxe(false) };
        // SAFETY: pairs with the `interrupts_save` in `off`.
        unsafe { self.host.interrupts_restore(self.saved) };
        // SAFETY: pairs with the `preempt_off` in `off`.
        unsafe { self.host.preempt_on() };
        for page in self
            .vmxon
            .take()
            .into_iter()
            .chain(self.vmcs.take())
            .chain(self.pages.drain(..))
        {
            // SAFETY: allocated by the rig; the processor has left VMX operation.
            unsafe { self.host.free_page(page) };
        }
        debug_assert_eq!(self.machine.0.state().memory.count(Owner::Kernel), 0);
    }
}
