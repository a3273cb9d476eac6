//! The guest as a step sees it: its registers, its memory through EPT, and its
//! instructions ([`instructions`]).

mod instructions;

use vmx::arch::msr;
use vmx::cpu::GuestRegs;
use vmx::host::Mitigations;

use crate::ept::{Access, EptFault};
use crate::state::Inner;
use crate::vmcs::Vmcs;

/// Why a step did not finish.
#[derive(Clone, Debug)]
pub enum Stop {
    /// A VM exit.
    Exit(ExitInfo),
    /// An exception in the guest, which may become an exit.
    Fault {
        /// The vector.
        vector: u8,
        /// Its error code.
        error_code: Option<u32>,
        /// The address of a page fault.
        cr2: u64,
    },
}

/// What an exit leaves in the VMCS. `None`: undefined, so filled with garbage.
#[derive(Clone, Debug, Default)]
pub struct ExitInfo {
    pub(crate) reason: u16,
    pub(crate) qualification: u64,
    pub(crate) length: Option<u64>,
    pub(crate) interruption: u64,
    pub(crate) error_code: u64,
    pub(crate) linear: Option<u64>,
    pub(crate) physical: Option<u64>,
    pub(crate) instruction: Option<u64>,
}

/// An INS or OUTS.
#[derive(Clone, Copy, Debug)]
pub struct StringIo {
    /// The port.
    pub port: u16,
    /// 1, 2 or 4.
    pub size: u8,
    /// INS.
    pub input: bool,
    /// With REP.
    pub rep: bool,
    /// The linear address of the first element.
    pub linear: u64,
    /// log2 of the address size in bytes: 1, 2 or 3.
    pub address_size: u32,
    /// The segment: 0 ES, 1 CS, 2 SS, 3 DS, 4 FS, 5 GS.
    pub segment: u32,
}

/// A running guest.
pub struct Guest<'a> {
    pub(crate) inner: &'a Inner,
    pub(crate) cpu: usize,
    pub(crate) vmcs: u64,
    /// Length of the instruction that runs.
    pub(crate) length: u64,
    /// The general registers. RSP (index 4) is in the VMCS.
    pub regs: &'a mut GuestRegs,
}

/// The VMCS field that holds a guest MSR.
pub(crate) fn msr_field(number: u32) -> Option<u32> {
    match number {
        msr::IA32_SYSENTER_CS => Some(0x482a),
        msr::IA32_SYSENTER_ESP => Some(0x6824),
        msr::IA32_SYSENTER_EIP => Some(0x6826),
        msr::IA32_FS_BASE => Some(0x680e),
        msr::IA32_GS_BASE => Some(0x6810),
        msr::IA32_DEBUGCTL => Some(0x2802),
        _ => None,
    }
}

impl Guest<'_> {
    fn with<T>(&self, f: impl FnOnce(&mut Vmcs) -> T) -> T {
        let mut state = self.inner.state();
        f(state.vmcss.entry(self.vmcs).or_default())
    }

    /// A VMCS field.
    #[must_use]
    pub fn field(&self, encoding: u32) -> u64 {
        self.with(|vmcs| vmcs.get(encoding))
    }

    /// Changes a VMCS field, as the running guest changes its state.
    pub fn set_field(&self, encoding: u32, value: u64) {
        self.with(|vmcs| vmcs.set(encoding, value));
    }

    /// RIP.
    #[must_use]
    pub fn rip(&self) -> u64 {
        self.field(0x681e)
    }

    /// The processor that runs the guest.
    #[must_use]
    pub fn cpu(&self) -> usize {
        self.cpu
    }

    /// The VMCS that runs.
    #[must_use]
    pub fn vmcs(&self) -> u64 {
        self.vmcs
    }

    /// A general register, RSP too.
    #[must_use]
    pub fn register(&self, index: usize) -> u64 {
        if index == 4 {
            self.field(0x681c)
        } else {
            self.regs.gpr[index]
        }
    }

    /// Writes a general register, RSP too.
    pub fn set_register(&mut self, index: usize, value: u64) {
        if index == 4 {
            self.set_field(0x681c, value);
        } else {
            self.regs.gpr[index] = value;
        }
    }

    fn primary(&self, bit: u32) -> bool {
        self.field(0x4002) >> bit & 1 != 0
    }

    /// A secondary control; 0 if they are not activated.
    #[must_use]
    pub fn secondary(&self, bit: u32) -> bool {
        self.primary(31) && self.field(0x401e) >> bit & 1 != 0
    }

    fn finding(&self, text: String) {
        self.inner.finding(text);
    }

    /// The exit that the instruction causes.
    #[must_use]
    pub fn exit_now(&self, reason: u16, qualification: u64) -> Stop {
        Stop::Exit(ExitInfo {
            reason,
            qualification,
            length: Some(self.length),
            ..ExitInfo::default()
        })
    }

    /// One access to guest-physical memory with an equal linear address.
    /// Returns the host-physical address.
    ///
    /// # Errors
    /// The exit or fault it causes.
    pub fn touch(&mut self, gpa: u64, access: Access) -> Result<u64, Stop> {
        self.touch_at(gpa, Some(gpa), access)
    }

    /// One access to guest-physical memory. `linear` is the address the guest
    /// used; `None` if it had none.
    ///
    /// # Errors
    /// The exit it causes.
    pub fn touch_at(&mut self, gpa: u64, linear: Option<u64>, access: Access) -> Result<u64, Stop> {
        let eptp = self.field(0x201a);
        if !self.secondary(1) {
            self.finding("the guest accesses memory without EPT".into());
        }
        let profile = &self.inner.profile;
        // Some processors stop with a machine check (IA32_ARCH_CAPABILITIES.IF_PSCHANGE_MC_NO).
        let small_code = self.inner.wanted() != Mitigations::Off
            && profile.msr(msr::IA32_ARCH_CAPABILITIES) >> 6 & 1 == 0;
        let mut state = self.inner.state();
        let result = state.translate(profile, small_code, self.cpu, eptp, gpa, access);
        drop(state);
        let (reason, qualification) = match result {
            Ok(physical) => return Ok(physical),
            Err(EptFault::Violation(rights)) => {
                // Bits 7 and 8: a linear address, and its translation accessed.
                let valid = if linear.is_some() { 0x180 } else { 0 };
                (48, access as u64 | rights << 3 | valid)
            }
            Err(EptFault::Misconfiguration) => (49, 0),
        };
        Err(Stop::Exit(ExitInfo {
            reason,
            qualification,
            linear,
            physical: Some(gpa),
            ..ExitInfo::default()
        }))
    }

    /// Reads up to 8 bytes of guest-physical memory, within a page.
    ///
    /// # Errors
    /// The exit it causes.
    pub fn read(&mut self, gpa: u64, size: usize) -> Result<u64, Stop> {
        let at = self.touch(gpa, Access::Read)?;
        let mut bytes = [0; 8];
        self.inner.state().memory.read(at, &mut bytes[..size]);
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes up to 8 bytes of guest-physical memory, within a page.
    ///
    /// # Errors
    /// The exit it causes.
    pub fn write(&mut self, gpa: u64, size: usize, value: u64) -> Result<(), Stop> {
        let at = self.touch(gpa, Access::Write)?;
        self.inner
            .state()
            .memory
            .write(at, &value.to_le_bytes()[..size]);
        Ok(())
    }

    /// CR2, which VM entry and exit leave alone.
    #[must_use]
    pub fn cr2(&self) -> u64 {
        self.inner.state().cpus[self.cpu].cr2
    }

    /// XCR0 while the guest runs.
    #[must_use]
    pub fn xcr0(&self) -> u64 {
        self.inner.state().cpus[self.cpu].xcr0
    }

    /// Debug register 0 to 3 or 6 while the guest runs.
    #[must_use]
    pub fn dr(&self, index: usize) -> u64 {
        self.inner.state().cpus[self.cpu].dr[index]
    }

    /// An MSR of the processor while the guest runs.
    #[must_use]
    pub fn msr(&self, number: u32) -> u64 {
        match msr_field(number) {
            Some(field) => self.field(field),
            None => self.inner.state().cpus[self.cpu]
                .msrs
                .get(&number)
                .copied()
                .unwrap_or(0),
        }
    }

    fn fpu(&self) {
        if self.inner.state().cpus[self.cpu].host_extended.is_none() {
            self.finding("the guest uses the host's extended registers".into());
        }
    }

    /// An XMM register.
    #[must_use]
    pub fn xmm(&self, index: usize) -> u128 {
        self.fpu();
        self.inner.state().cpus[self.cpu].extended.xmm(index)
    }

    /// Writes an XMM register.
    pub fn set_xmm(&mut self, index: usize, value: u128) {
        self.fpu();
        self.inner.state().cpus[self.cpu]
            .extended
            .set_xmm(index, value);
    }

    /// The upper half of a YMM register.
    #[must_use]
    pub fn ymm_high(&self, index: usize) -> u128 {
        self.fpu();
        self.inner.state().cpus[self.cpu].extended.ymm_high(index)
    }

    /// Writes the upper half of a YMM register.
    pub fn set_ymm_high(&mut self, index: usize, value: u128) {
        self.fpu();
        self.inner.state().cpus[self.cpu]
            .extended
            .set_ymm_high(index, value);
    }

    /// Sends a host interrupt to this processor.
    pub fn raise_host_interrupt(&self) {
        self.inner.cores.raise(self.cpu);
    }

    /// Sends a host NMI to this processor.
    pub fn raise_host_nmi(&self) {
        self.inner.cores.raise_nmi(self.cpu);
    }

    /// Whether a host interrupt waits at this processor.
    #[must_use]
    pub fn host_interrupt_waits(&self) -> bool {
        self.inner.cores.interrupt_waits(self.cpu)
    }

    /// Waits for a host interrupt to be sent to this processor.
    pub fn wait_for_host_interrupt(&self) {
        self.inner.cores.wait_for_interrupt(self.cpu);
    }
}
