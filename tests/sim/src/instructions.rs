//! VMX instructions, SDM chapter 31 "VMX Instruction Reference"; error numbers
//! from 31.4 "VM Instruction Error Numbers".

use vmx::cpu::VmxFailure;

use crate::profile::Profile;
use crate::state::State;
use crate::vmcs::{read_only, supported};

/// VM-instruction error numbers.
pub mod error {
    /// VMCLEAR with invalid physical address.
    pub const VMCLEAR_ADDRESS: u64 = 2;
    /// VMCLEAR with VMXON pointer.
    pub const VMCLEAR_VMXON: u64 = 3;
    /// VMLAUNCH with non-clear VMCS.
    pub const LAUNCH_NOT_CLEAR: u64 = 4;
    /// VMRESUME with non-launched VMCS.
    pub const RESUME_NOT_LAUNCHED: u64 = 5;
    /// VM entry with invalid control field(s).
    pub const CONTROLS: u64 = 7;
    /// VM entry with invalid host-state field(s).
    pub const HOST_STATE: u64 = 8;
    /// VMPTRLD with invalid physical address.
    pub const VMPTRLD_ADDRESS: u64 = 9;
    /// VMPTRLD with VMXON pointer.
    pub const VMPTRLD_VMXON: u64 = 10;
    /// VMPTRLD with incorrect VMCS revision identifier.
    pub const VMPTRLD_REVISION: u64 = 11;
    /// VMREAD or VMWRITE from or to unsupported VMCS component.
    pub const UNSUPPORTED_FIELD: u64 = 12;
    /// VMWRITE to read-only VMCS component.
    pub const READ_ONLY_FIELD: u64 = 13;
    /// VMXON executed in VMX root operation.
    pub const VMXON_IN_ROOT: u64 = 15;
    /// Invalid operand to INVEPT or INVVPID.
    pub const INVALIDATE_OPERAND: u64 = 28;
}

/// The VM-instruction error field.
const INSTRUCTION_ERROR: u32 = 0x4400;

impl State {
    /// VMfail: with a current VMCS the error goes there, else VMfailInvalid.
    pub(crate) fn vm_fail(&mut self, cpu: usize, error: u64) -> VmxFailure {
        match self.current(cpu) {
            Some((_, vmcs)) => {
                vmcs.set(INSTRUCTION_ERROR, error);
                VmxFailure::Valid
            }
            None => VmxFailure::Invalid,
        }
    }

    /// #UD outside VMX operation.
    fn in_vmx(&mut self, cpu: usize, what: &str) -> Result<(), VmxFailure> {
        if self.cpus[cpu].vmxon.is_some() {
            return Ok(());
        }
        self.finding(format!(
            "host #UD: {what} outside VMX operation on processor {cpu}"
        ));
        Err(VmxFailure::Invalid)
    }

    pub(crate) fn vmxon(&mut self, p: &Profile, cpu: usize, region: u64) -> Result<(), VmxFailure> {
        self.counts.vmxon += 1;
        let c = &self.cpus[cpu];
        let cr4 = c.cr4;
        if !p.msrs.contains_key(&0x480) || cr4 >> 13 & 1 == 0 {
            self.finding(format!("host #UD: VMXON with CR4 = {cr4:#x}"));
            return Err(VmxFailure::Invalid);
        }
        if c.vmxon.is_some() {
            return Err(self.vm_fail(cpu, error::VMXON_IN_ROOT));
        }
        let cr0_bad = !fixed(p, 0x486, c.cr0) || !fixed(p, 0x488, cr4);
        let feature = c.msrs.get(&0x3a).copied().unwrap_or(0);
        if cr0_bad || feature & 5 != 5 {
            self.finding(format!(
                "host #GP: VMXON with IA32_FEATURE_CONTROL = {feature:#x}, CR4 = {cr4:#x}"
            ));
            return Err(VmxFailure::Invalid);
        }
        if region & 0xfff != 0 || !p.physical(region) {
            return Err(VmxFailure::Invalid);
        }
        // The identifier is bits 30:0; bit 31 must be 0.
        if self.memory.revision(region) != Some(revision(p)) {
            return Err(VmxFailure::Invalid);
        }
        if self.cpus.iter().any(|other| other.vmxon == Some(region)) {
            self.finding("one VMXON region for two processors");
        }
        self.cpus[cpu].vmxon = Some(region);
        self.cpus[cpu].current = None;
        Ok(())
    }

    pub(crate) fn vmxoff(&mut self, cpu: usize) -> Result<(), VmxFailure> {
        self.counts.vmxoff += 1;
        self.in_vmx(cpu, "VMXOFF")?;
        if self.cpus[cpu].foreign == self.cpus[cpu].vmxon {
            self.finding(format!(
                "VMXOFF of another hypervisor's VMX operation on processor {cpu}"
            ));
        }
        let active: Vec<u64> = self
            .vmcss
            .iter()
            .filter(|(_, vmcs)| vmcs.active_on == Some(cpu))
            .map(|(pointer, _)| *pointer)
            .collect();
        for pointer in active {
            self.finding(format!(
                "VMXOFF while VMCS {pointer:#x} is active on processor {cpu}"
            ));
        }
        self.cpus[cpu].vmxon = None;
        self.cpus[cpu].current = None;
        Ok(())
    }

    pub(crate) fn vmclear(
        &mut self,
        p: &Profile,
        cpu: usize,
        address: u64,
    ) -> Result<(), VmxFailure> {
        self.counts.vmclear += 1;
        self.in_vmx(cpu, "VMCLEAR")?;
        if address & 0xfff != 0 || !p.physical(address) {
            return Err(self.vm_fail(cpu, error::VMCLEAR_ADDRESS));
        }
        if self.cpus[cpu].vmxon == Some(address) {
            return Err(self.vm_fail(cpu, error::VMCLEAR_VMXON));
        }
        if self.memory.owner(address >> 12).is_none() {
            self.finding(format!("VMCLEAR of {address:#x}, which is not memory"));
        }
        let vmcs = self.vmcss.entry(address).or_default();
        let active = vmcs.active_on.take();
        let foreign = vmcs.foreign;
        vmcs.launched = false;
        if active.is_some_and(|other| other != cpu) {
            self.finding(format!(
                "VMCLEAR on processor {cpu} of VMCS {address:#x}, active on another: its data is lost"
            ));
        }
        if foreign {
            self.finding(format!("VMCLEAR of another hypervisor's VMCS {address:#x}"));
        }
        if self.cpus[cpu].current == Some(address) {
            self.cpus[cpu].current = None;
        }
        Ok(())
    }

    pub(crate) fn vmptrld(
        &mut self,
        p: &Profile,
        cpu: usize,
        address: u64,
    ) -> Result<(), VmxFailure> {
        self.counts.vmptrld += 1;
        self.in_vmx(cpu, "VMPTRLD")?;
        if address & 0xfff != 0 || !p.physical(address) {
            return Err(self.vm_fail(cpu, error::VMPTRLD_ADDRESS));
        }
        if self.cpus[cpu].vmxon == Some(address) {
            return Err(self.vm_fail(cpu, error::VMPTRLD_VMXON));
        }
        let foreign = self.vmcss.get(&address).is_some_and(|vmcs| vmcs.foreign);
        if !foreign && self.memory.revision(address) != Some(revision(p)) {
            return Err(self.vm_fail(cpu, error::VMPTRLD_REVISION));
        }
        let vmcs = self.vmcss.entry(address).or_default();
        let before = vmcs.active_on.replace(cpu);
        self.cpus[cpu].current = Some(address);
        if let Some(other) = before.filter(|other| *other != cpu) {
            self.finding(format!(
                "fatal: VMCS {address:#x} made active on processor {cpu} while active on processor {other}"
            ));
        }
        Ok(())
    }

    pub(crate) fn vmptrst(&mut self, cpu: usize) -> Option<u64> {
        self.counts.vmptrst += 1;
        self.in_vmx(cpu, "VMPTRST").ok()?;
        self.cpus[cpu].current
    }

    pub(crate) fn vmread(
        &mut self,
        p: &Profile,
        cpu: usize,
        field: u32,
    ) -> Result<u64, VmxFailure> {
        self.counts.vmread += 1;
        self.in_vmx(cpu, "VMREAD")?;
        if self.cpus[cpu].current.is_none() {
            return Err(VmxFailure::Invalid);
        }
        if !supported(p, field) {
            return Err(self.vm_fail(cpu, error::UNSUPPORTED_FIELD));
        }
        Ok(self.current(cpu).map_or(0, |(_, vmcs)| vmcs.get(field)))
    }

    pub(crate) fn vmwrite(
        &mut self,
        p: &Profile,
        cpu: usize,
        field: u32,
        value: u64,
    ) -> Result<(), VmxFailure> {
        self.counts.vmwrite += 1;
        self.in_vmx(cpu, "VMWRITE")?;
        if self.cpus[cpu].current.is_none() {
            return Err(VmxFailure::Invalid);
        }
        if !supported(p, field) {
            return Err(self.vm_fail(cpu, error::UNSUPPORTED_FIELD));
        }
        // IA32_VMX_MISC bit 29: any supported field can be written.
        if read_only(field) && p.msr(0x485) >> 29 & 1 == 0 {
            return Err(self.vm_fail(cpu, error::READ_ONLY_FIELD));
        }
        if let Some((pointer, vmcs)) = self.current(cpu) {
            let foreign = vmcs.foreign;
            vmcs.set(field, value);
            if foreign {
                self.finding(format!("VMWRITE to another hypervisor's VMCS {pointer:#x}"));
            }
        }
        Ok(())
    }

    pub(crate) fn invept(
        &mut self,
        p: &Profile,
        cpu: usize,
        kind: u64,
        eptp: u64,
    ) -> Result<(), VmxFailure> {
        self.counts.invept += 1;
        self.in_vmx(cpu, "INVEPT")?;
        let caps = p.msr(0x48c);
        if caps >> 20 & 1 == 0 {
            self.finding("host #UD: INVEPT on a processor without it");
            return Err(VmxFailure::Invalid);
        }
        let known = matches!(kind, 1 | 2) && caps >> (24 + kind) & 1 != 0;
        // Single-context: the EPTP must be one that VM entry would accept.
        if !known || kind == 1 && !eptp_valid(p, eptp) {
            return Err(self.vm_fail(cpu, error::INVALIDATE_OPERAND));
        }
        if kind == 1 {
            self.cpus[cpu].tlb.flush(eptp);
        } else {
            self.cpus[cpu].tlb.flush_all();
        }
        Ok(())
    }

    pub(crate) fn invvpid(
        &mut self,
        p: &Profile,
        cpu: usize,
        kind: u64,
        vpid: u16,
        address: u64,
    ) -> Result<(), VmxFailure> {
        self.counts.invvpid += 1;
        self.in_vmx(cpu, "INVVPID")?;
        let caps = p.msr(0x48c);
        if caps >> 32 & 1 == 0 {
            self.finding("host #UD: INVVPID on a processor without it");
            return Err(VmxFailure::Invalid);
        }
        let known = kind <= 3 && caps >> (40 + kind) & 1 != 0;
        let needs_vpid = kind != 2;
        if !known || needs_vpid && vpid == 0 || kind == 0 && !p.canonical(address) {
            return Err(self.vm_fail(cpu, error::INVALIDATE_OPERAND));
        }
        // One address (0) or all but global ones (3) leave others behind.
        match kind {
            1 => self.cpus[cpu].tlb.flush_combined(Some(vpid)),
            2 => self.cpus[cpu].tlb.flush_combined(None),
            _ => {}
        }
        Ok(())
    }
}

/// The VMCS revision identifier.
pub(crate) fn revision(p: &Profile) -> u32 {
    u32::try_from(p.msr(0x480) & 0x7fff_ffff).unwrap_or(0)
}

/// Whether a control register has every bit that FIXED0 wants and none that
/// FIXED1 forbids, SDM appendix A.7 and A.8.
pub(crate) fn fixed(p: &Profile, fixed0: u32, value: u64) -> bool {
    let (zero, one) = (p.msr(fixed0), p.msr(fixed0 + 1));
    zero & !value == 0 && value & !one == 0
}

/// The rules on an EPTP, SDM 27.2.1.1 "VM-Execution Control Fields".
pub(crate) fn eptp_valid(p: &Profile, eptp: u64) -> bool {
    let caps = p.msr(0x48c);
    let memory_type = match eptp & 7 {
        0 => caps >> 8 & 1 != 0,
        6 => caps >> 14 & 1 != 0,
        _ => false,
    };
    let walk = eptp >> 3 & 7 == 3 && caps >> 6 & 1 != 0;
    let flags = eptp >> 6 & 1 == 0 || caps >> 21 & 1 != 0;
    memory_type && walk && flags && eptp & 0xf80 == 0 && p.physical(eptp & !0xfff)
}
