//! The guest's instructions, with the exit conditions of SDM chapter 26 "VMX
//! Non-Root Operation" and the exit information of 28.2 "Recording VM-Exit
//! Information and Updating VM-Entry Control Fields".

use vmx::arch::msr;

use super::{ExitInfo, Guest, Stop, StringIo, msr_field};
use crate::cpu::msr_accepts;

/// MSRs that a guest may reach without an exit.
fn may_pass(number: u32) -> bool {
    matches!(
        number,
        msr::IA32_TSC
            | msr::IA32_SPEC_CTRL
            | msr::IA32_PRED_CMD
            | msr::IA32_FLUSH_CMD
            | msr::IA32_SYSENTER_CS
            | msr::IA32_SYSENTER_ESP
            | msr::IA32_SYSENTER_EIP
            | msr::IA32_PAT
            | msr::IA32_EFER
            | msr::IA32_STAR
            | msr::IA32_LSTAR
            | msr::IA32_CSTAR
            | msr::IA32_FMASK
            | msr::IA32_FS_BASE
            | msr::IA32_GS_BASE
            | msr::IA32_KERNEL_GSBASE
            | msr::IA32_TSC_AUX
    )
}

const GP: Stop = Stop::Fault {
    vector: 13,
    error_code: Some(0),
    cr2: 0,
};
const UD: Stop = Stop::Fault {
    vector: 6,
    error_code: None,
    cr2: 0,
};

impl Guest<'_> {
    /// CPUID: always exits.
    pub(crate) fn cpuid(&mut self, leaf: u32, subleaf: u32) -> Result<(), Stop> {
        self.regs.gpr[0] = u64::from(leaf);
        self.regs.gpr[1] = u64::from(subleaf);
        Err(self.exit_now(10, 0))
    }

    /// Whether the MSR bitmap, or its absence, makes the access exit; SDM 26.1.3
    /// "Instructions That Cause VM Exits Conditionally".
    fn msr_exits(&self, number: u32, write: bool) -> bool {
        if !self.primary(28) {
            return true;
        }
        let quarter = match number {
            0..=0x1fff => 0,
            0xc000_0000..=0xc000_1fff => 1,
            _ => return true,
        };
        let byte = quarter * 1024 + if write { 2048 } else { 0 } + u64::from(number & 0x1fff) / 8;
        self.bitmap_bit(0x2004, byte, number & 7)
    }

    fn bitmap_bit(&self, field: u32, byte: u64, bit: u32) -> bool {
        let at = self.field(field) + byte;
        let mut value = [0xff];
        if !self.inner.state().memory.read(at, &mut value) {
            self.finding(format!("a bitmap at {at:#x} is not memory"));
        }
        value[0] >> bit & 1 != 0
    }

    /// RDMSR.
    pub(crate) fn rdmsr(&mut self, number: u32) -> Result<(), Stop> {
        self.regs.gpr[1] = u64::from(number);
        if self.msr_exits(number, false) {
            return Err(self.exit_now(31, 0));
        }
        if !may_pass(number) {
            self.finding(format!("the guest reads the host's MSR {number:#x}"));
        }
        let offset = if self.primary(3) {
            self.field(0x2010)
        } else {
            0
        };
        let value = match msr_field(number) {
            Some(field) => Some(self.field(field)),
            None => {
                let state = self.inner.state();
                state.cpus[self.cpu].read_msr(state.tsc.wrapping_add(offset), number)
            }
        };
        let value = value.ok_or(GP)?;
        self.regs.gpr[0] = value & 0xffff_ffff;
        self.regs.gpr[2] = value >> 32;
        Ok(())
    }

    /// An access to two cache lines under LOCK.
    pub(crate) fn split_lock(&self) -> Result<(), Stop> {
        let control = self.inner.state().cpus[self.cpu]
            .msrs
            .get(&msr::MSR_MEMORY_CTRL)
            .copied();
        if control.unwrap_or(0) & msr::SPLIT_LOCK_DISABLE != 0 {
            return Err(Stop::Fault {
                vector: 17,
                error_code: Some(0),
                cr2: 0,
            });
        }
        Ok(())
    }

    /// WRMSR.
    pub(crate) fn wrmsr(&mut self, number: u32, value: u64) -> Result<(), Stop> {
        self.regs.gpr[1] = u64::from(number);
        self.regs.gpr[0] = value & 0xffff_ffff;
        self.regs.gpr[2] = value >> 32;
        if self.msr_exits(number, true) {
            return Err(self.exit_now(32, 0));
        }
        if !may_pass(number) || number == msr::IA32_TSC {
            self.finding(format!("the guest writes the host's MSR {number:#x}"));
        }
        let profile = &self.inner.profile;
        if let Some(field) = msr_field(number) {
            if !msr_accepts(profile, number, value) {
                return Err(GP);
            }
            self.set_field(field, value);
            return Ok(());
        }
        let mut state = self.inner.state();
        let fine = state.cpus[self.cpu].write_msr(profile, number, value);
        if fine { Ok(()) } else { Err(GP) }
    }

    /// Whether an I/O instruction exits, SDM 26.1.3.
    fn port_exits(&self, port: u16, size: u8) -> bool {
        if !self.primary(25) {
            return self.primary(24);
        }
        let last = u32::from(port) + u32::from(size) - 1;
        // An access that wraps around the port space always exits.
        last > 0xffff
            || (u32::from(port)..=last).any(|p| {
                let field = if p < 0x8000 { 0x2000 } else { 0x2002 };
                self.bitmap_bit(field, u64::from(p & 0x7fff) / 8, p & 7)
            })
    }

    /// IN or OUT with the port in DX.
    pub(crate) fn port(&mut self, port: u16, size: u8, input: bool) -> Result<(), Stop> {
        self.regs.gpr[2] = self.regs.gpr[2] & !0xffff | u64::from(port);
        if self.port_exits(port, size) {
            let q = (u64::from(size) - 1) | u64::from(input) << 3 | u64::from(port) << 16;
            return Err(self.exit_now(30, q));
        }
        self.finding(format!("the guest reaches the host's port {port:#x}"));
        Ok(())
    }

    /// INS or OUTS.
    pub(crate) fn string_io(&mut self, io: StringIo) -> Result<(), Stop> {
        self.regs.gpr[2] = self.regs.gpr[2] & !0xffff | u64::from(io.port);
        let mask = match io.address_size {
            1 => 0xffff,
            2 => 0xffff_ffff,
            _ => u64::MAX,
        };
        if io.rep && self.regs.gpr[1] & mask == 0 {
            return Ok(());
        }
        if !self.port_exits(io.port, io.size) {
            self.finding(format!("the guest reaches the host's port {:#x}", io.port));
            return Ok(());
        }
        let qualification = (u64::from(io.size) - 1)
            | u64::from(io.input) << 3
            | 1 << 4
            | u64::from(io.rep) << 5
            | u64::from(io.port) << 16;
        // SDM 28.2.5, table 28-9: bits 9:7 address size, 17:15 segment (OUTS).
        let segment = if io.input { 0 } else { io.segment };
        let information = u64::from(io.address_size - 1) << 7 | u64::from(segment) << 15;
        Err(Stop::Exit(ExitInfo {
            reason: 30,
            qualification,
            length: Some(self.length),
            linear: Some(io.linear),
            instruction: (self.inner.profile.msr(0x480) >> 54 & 1 != 0).then_some(information),
            ..ExitInfo::default()
        }))
    }

    /// HLT: exits, or waits for an interrupt.
    pub(crate) fn hlt(&mut self) -> Result<(), Stop> {
        if self.primary(7) {
            return Err(self.exit_now(12, 0));
        }
        self.set_field(0x4826, 1);
        Ok(())
    }

    /// 64-bit code runs: operands have 64 bits.
    fn is_64_bit(&self) -> bool {
        self.field(0x4012) >> 9 & 1 != 0 && self.field(0x4816) >> 13 & 1 != 0
    }

    /// MOV to a control register, SDM 26.1.3 and 26.3 "Changes to Instruction
    /// Behavior in VMX Non-Root Operation".
    pub(crate) fn mov_to_cr(&mut self, cr: u8, gpr: usize) -> Result<(), Stop> {
        let wide = self.register(gpr);
        let value = if self.is_64_bit() {
            wide
        } else {
            wide & 0xffff_ffff
        };
        let exit = self.exit_now(28, u64::from(cr) | (gpr as u64) << 8);
        match cr {
            0 | 4 => {
                let (mask, shadow, field) = if cr == 0 {
                    (self.field(0x6000), self.field(0x6004), 0x6800)
                } else {
                    (self.field(0x6002), self.field(0x6006), 0x6804)
                };
                if mask & (value ^ shadow) != 0 {
                    return Err(exit);
                }
                let merged = self.field(field) & mask | value & !mask;
                self.check_free_bits(cr, merged)?;
                self.set_field(field, merged);
                Ok(())
            }
            3 => {
                let targets = u32::try_from(self.field(0x400a)).unwrap_or(0).min(4);
                let listed = (0..targets).any(|n| self.field(0x6008 + n * 2) == value);
                if self.primary(15) && !listed {
                    return Err(exit);
                }
                // SDM vol. 2, "MOV - Move to/from Control Registers": reserved
                // bits are #GP; bit 63 is an instruction's own with PCIDE.
                let pcide = self.field(0x6804) >> 17 & 1;
                let address = value & !(pcide << 63);
                if !self.inner.profile.physical(address) {
                    return Err(GP);
                }
                self.set_field(0x6802, address);
                Ok(())
            }
            8 if self.primary(19) => Err(exit),
            8 if self.primary(21) => self.write_vtpr(value),
            8 => {
                self.finding("the guest writes the host's CR8".into());
                Ok(())
            }
            _ => Err(UD),
        }
    }

    /// Where VTPR is, SDM 30.1.1 "Virtualized APIC Registers".
    fn vtpr_address(&self) -> u64 {
        self.field(0x2012) + 0x80
    }

    /// The byte of VTPR that MOV CR8 uses.
    fn vtpr(&self) -> u8 {
        let mut byte = [0];
        let at = self.vtpr_address();
        if !self.inner.state().memory.read(at, &mut byte) {
            self.finding(format!("VTPR at {at:#x} is not memory"));
        }
        byte[0]
    }

    /// MOV to CR8 with a TPR shadow, SDM 30.3 "Virtualizing CR8-Based TPR
    /// Accesses"; the exit comes behind the instruction (30.1.2).
    fn write_vtpr(&mut self, value: u64) -> Result<(), Stop> {
        if value > 0xf {
            return Err(GP);
        }
        let (at, tpr) = (self.vtpr_address(), (value as u32) << 4);
        if !self.inner.state().memory.write(at, &tpr.to_le_bytes()) {
            self.finding(format!("VTPR at {at:#x} is not memory"));
        }
        if value >= self.field(0x401c) & 0xf {
            return Ok(());
        }
        self.set_field(0x681e, self.rip().wrapping_add(self.length));
        self.set_field(0x4824, self.field(0x4824) & !3);
        Err(Stop::Exit(ExitInfo {
            reason: 43,
            ..ExitInfo::default()
        }))
    }

    /// A bit that the guest owns but may not have: #GP, SDM 26.3.
    fn check_free_bits(&self, cr: u8, value: u64) -> Result<(), Stop> {
        let profile = &self.inner.profile;
        let (zero, one) = if cr == 0 {
            let free = if self.secondary(7) { 1 | 1 << 31 } else { 0 };
            (profile.msr(0x486) & !free, profile.msr(0x487))
        } else {
            (profile.msr(0x488), profile.msr(0x489))
        };
        let wrong = zero & !value != 0 || value & !one != 0;
        if wrong { Err(GP) } else { Ok(()) }
    }

    /// MOV from a control register.
    pub(crate) fn mov_from_cr(&mut self, cr: u8, gpr: usize) -> Result<(), Stop> {
        let exit = self.exit_now(28, u64::from(cr) | 1 << 4 | (gpr as u64) << 8);
        let value = match cr {
            0 => {
                let mask = self.field(0x6000);
                self.field(0x6800) & !mask | self.field(0x6004) & mask
            }
            2 => self.inner.state().cpus[self.cpu].cr2,
            3 if self.primary(16) => return Err(exit),
            3 => self.field(0x6802),
            4 => {
                let mask = self.field(0x6002);
                self.field(0x6804) & !mask | self.field(0x6006) & mask
            }
            8 if self.primary(20) => return Err(exit),
            8 if self.primary(21) => u64::from(self.vtpr() >> 4),
            8 => {
                self.finding("the guest reads the host's CR8".into());
                0
            }
            _ => return Err(UD),
        };
        self.set_register(gpr, value);
        Ok(())
    }

    /// CLTS.
    pub(crate) fn clts(&mut self) -> Result<(), Stop> {
        let (mask, shadow) = (self.field(0x6000), self.field(0x6004));
        if mask & shadow & 8 != 0 {
            return Err(self.exit_now(28, 2 << 4));
        }
        if mask & 8 == 0 {
            let cr0 = self.field(0x6800);
            self.set_field(0x6800, cr0 & !8);
        }
        Ok(())
    }

    /// LMSW with a register operand.
    pub(crate) fn lmsw(&mut self, value: u16) -> Result<(), Stop> {
        let (mask, shadow) = (self.field(0x6000), self.field(0x6004));
        let source = u64::from(value);
        // PE can only be set; MP, EM and TS follow the source.
        let sets_pe = mask & 1 != 0 && source & 1 != 0 && shadow & 1 == 0;
        if sets_pe || mask & (source ^ shadow) & 0xe != 0 {
            return Err(self.exit_now(28, 3 << 4 | source << 16));
        }
        let change = !mask & 0xf;
        let cr0 = self.field(0x6800);
        let merged = cr0 & !(change & 0xe) | source & change;
        self.set_field(0x6800, merged);
        Ok(())
    }

    /// MOV to or from a debug register.
    pub(crate) fn mov_dr(&mut self, dr: u8, gpr: usize, read: bool) -> Result<(), Stop> {
        if self.primary(23) {
            let q = u64::from(dr) | u64::from(read) << 4 | (gpr as u64) << 8;
            return Err(self.exit_now(29, q));
        }
        let index = usize::from(dr & 7);
        if read {
            let value = if dr == 7 {
                self.field(0x681a)
            } else {
                self.inner.state().cpus[self.cpu].dr[index]
            };
            self.set_register(gpr, value);
        } else if dr == 7 {
            self.set_field(0x681a, self.register(gpr));
        } else {
            let value = self.register(gpr);
            self.inner.state().cpus[self.cpu].dr[index] = value;
        }
        Ok(())
    }

    /// RDTSC.
    pub(crate) fn rdtsc(&mut self) -> Result<(), Stop> {
        if self.primary(12) {
            return Err(self.exit_now(16, 0));
        }
        let offset = if self.primary(3) {
            self.field(0x2010)
        } else {
            0
        };
        let mut state = self.inner.state();
        state.tsc += 20;
        let value = state.tsc.wrapping_add(offset);
        drop(state);
        self.regs.gpr[0] = value & 0xffff_ffff;
        self.regs.gpr[2] = value >> 32;
        Ok(())
    }

    pub(crate) fn set_if(&mut self, on: bool) {
        let rflags = self.field(0x6820);
        let was = rflags >> 9 & 1 != 0;
        self.set_field(0x6820, if on { rflags | 0x200 } else { rflags & !0x200 });
        if on && !was {
            let state = self.field(0x4824);
            self.set_field(0x4824, state | 1);
        }
    }
}
