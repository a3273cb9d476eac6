//! The guest's MSRs: where each one lives, which values each one takes, and
//! the store for those that no VMCS field and no processor register holds.
//! [`list`] reads and writes any of them, [`switched`] has those that the
//! processor holds, and [`bitmap`] says which accesses exit.
//!
//! The list is HAXM's, so that GET_MSRS and SET_MSRS take what clients send.
//! Added are those of speculation, where the host has them, and what current
//! systems look at without asking CPUID. An MSR that is not on it does not exist:
//! #GP, counted by number.
//!
//! Numbers and fields: SDM vol. 4, chapter 2, table 2-2 "IA-32 Architectural
//! MSRs", unless a line says otherwise.

pub(super) mod bitmap;
pub(super) mod list;
pub(super) mod switched;
#[cfg(test)]
mod tests;

use super::cpuid::{Feature, Features};
use crate::arch::msr;
use crate::arch::reg::{Cr0, Efer};

/// The access is a #GP with error code 0, or ends GET_MSRS or SET_MSRS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpFault;

/// Where a guest's MSR lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Msr {
    /// The time-stamp counter: host's plus offset.
    Tsc,
    /// IA32_TSC_ADJUST: moves with the counter.
    TscAdjust,
    /// The [`MsrStore`]; the tunnel shows it to the client.
    ApicBase,
    /// The VMCS; [`valid_efer`] says which values.
    Efer,
    /// The VMCS; [`accept`] says which values.
    FsBase,
    /// The VMCS; [`accept`] says which values.
    GsBase,
    /// `SwitchedMsrs`; [`accept`] says which values.
    Switched,
    /// The VMCS; [`accept`] says which values.
    SysenterCs,
    /// The VMCS; [`accept`] says which values.
    SysenterEsp,
    /// The VMCS; [`accept`] says which values.
    SysenterEip,
    /// The [`MsrStore`]; the VMCS gets a copy.
    Pat,
    /// The [`MsrStore`], and nothing follows from a change.
    Stored,
    /// IA32_SPEC_CTRL: `GuestRegs`, switched from its first use on.
    SpecCtrl,
    /// IA32_PRED_CMD and IA32_FLUSH_CMD: go to the processor at once.
    Command,
    /// IA32_ARCH_CAPABILITIES: of the capabilities.
    ArchCapabilities,
    /// IA32_PMCx by number: `Pmu`.
    Counter(u8),
    /// IA32_PERFEVTSELx by number: `Pmu`; it says which values.
    EventSelect(u8),
    /// Nowhere: #GP.
    Unknown,
}

/// Pairs of IA32_MTRR_PHYSBASEn and IA32_MTRR_PHYSMASKn; HAXM had so many.
const VARIABLE_MTRRS: usize = 10;
/// The pairs that the guest is told of. SeaBIOS repeats on each further processor
/// what it wrote to the MTRRs of the first, and has room for 32 writes: with ten
/// pairs the last, which enables them, is lost, and Linux finds its processors
/// inconsistent. KVM tells of eight too.
const TOLD_VARIABLE_MTRRS: u64 = 8;
/// Fixed-range MTRRs: one of 64 KB, two of 16 KB, eight of 4 KB.
const FIXED_MTRRS: usize = 11;
/// IA32_MTRRCAP: the pairs above, fixed ranges, write-combining. SDM 12.11.1
/// "MTRR Feature Identification".
const MTRRCAP: u64 = TOLD_VARIABLE_MTRRS | 1 << 8 | 1 << 10;
/// IA32_MISC_ENABLE: fast strings (CPUID offers ERMS, and Linux takes it back
/// without this bit), no branch trace storage, no PEBS. HAXM lacks the first.
const MISC_ENABLE: u64 = 1 << 0 | 1 << 11 | 1 << 12;
/// IA32_APIC_BASE, SDM 11.4.4 "Local APIC Status and Location".
const APIC_BASE_BSP: u64 = 1 << 8;
const APIC_BASE_ENABLE: u64 = 1 << 11;
/// The only place for the APIC: its page is the client's.
const APIC_BASE_ADDRESS: u64 = 0xfee0_0000;

/// Where `register` lives for a guest with these features.
#[must_use]
#[cfg_attr(haxm_module, optimize(speed))]
pub fn classify(register: u32, features: &Features) -> Msr {
    match register {
        msr::IA32_TSC => Msr::Tsc,
        msr::IA32_TSC_ADJUST if features.has(Feature::TSC_ADJUST) => Msr::TscAdjust,
        msr::IA32_APIC_BASE => Msr::ApicBase,
        msr::IA32_EFER => Msr::Efer,
        msr::IA32_FS_BASE => Msr::FsBase,
        msr::IA32_GS_BASE => Msr::GsBase,
        msr::IA32_TSC_AUX if !has_tsc_aux(features) => Msr::Unknown,
        msr::IA32_KERNEL_GSBASE
        | msr::IA32_STAR
        | msr::IA32_LSTAR
        | msr::IA32_CSTAR
        | msr::IA32_FMASK
        | msr::IA32_TSC_AUX => Msr::Switched,
        msr::IA32_SYSENTER_CS => Msr::SysenterCs,
        msr::IA32_SYSENTER_ESP => Msr::SysenterEsp,
        msr::IA32_SYSENTER_EIP => Msr::SysenterEip,
        msr::IA32_PAT => Msr::Pat,
        msr::IA32_SPEC_CTRL if features.allowed_spec_ctrl() != 0 => Msr::SpecCtrl,
        msr::IA32_PRED_CMD if features.has(Feature::IBRS_IBPB) => Msr::Command,
        msr::IA32_FLUSH_CMD if features.has(Feature::L1D_FLUSH) => Msr::Command,
        msr::IA32_ARCH_CAPABILITIES if features.has(Feature::ARCH_CAPABILITIES) => {
            Msr::ArchCapabilities
        }
        0xc1..=0xc4 | 0x186..=0x189 if features.counters() != 0 => counter(register, features),
        msr::IA32_XSS if !features.has(Feature::XSAVES) => Msr::Unknown,
        _ if Home::of(register).is_some() => Msr::Stored,
        _ => Msr::Unknown,
    }
}

/// A register of a guest that has performance counters. Those of the counters
/// that it lacks are HAXM's.
fn counter(register: u32, features: &Features) -> Msr {
    let number = |first: u32| {
        let number = register.wrapping_sub(first);
        (number < features.counters().into()).then_some(number as u8)
    };
    number(msr::IA32_PMC0)
        .map(Msr::Counter)
        .or_else(|| number(msr::IA32_PERFEVTSEL0).map(Msr::EventSelect))
        .unwrap_or(Msr::Stored)
}

/// What the [`MsrStore`] does with a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    ApicBase,
    Pat,
    DefType,
    FeatureMask,
    /// Place in `mtrr_variable`.
    Variable(u32),
    /// Place in `mtrr_fixed`.
    Fixed(u32),
    /// Reads as this, takes any write and forgets it.
    Deaf(u64),
    /// Reads as this, takes no write.
    ReadOnly(u64),
    /// As `ReadOnly`, but SET_MSRS may write what it has read.
    Capability(u64),
    /// Reads as 0, takes only 0.
    Zero,
    /// Takes any write and forgets it, cannot be read.
    WriteOnly,
}

impl Home {
    /// HAXM's list, with HAXM's values where the processor's would say nothing
    /// that is true of a guest.
    #[cfg_attr(haxm_module, optimize(speed))]
    const fn of(register: u32) -> Option<Self> {
        Some(match register {
            msr::IA32_APIC_BASE => Self::ApicBase,
            msr::IA32_PAT => Self::Pat,
            // IA32_MTRRCAP, PHYSBASE0 to PHYSMASK9, FIX64K_00000, FIX16K_80000
            // and FIX16K_A0000, FIX4K_C0000 to FIX4K_F8000, DEF_TYPE.
            0xfe => Self::Capability(MTRRCAP),
            0x200..=0x213 => Self::Variable(register.wrapping_sub(0x200)),
            0x250 => Self::Fixed(0),
            0x258..=0x259 => Self::Fixed(register.wrapping_sub(0x257)),
            0x268..=0x26f => Self::Fixed(register.wrapping_sub(0x265)),
            0x2ff => Self::DefType,
            // IA32_P5_MC_ADDR, IA32_P5_MC_TYPE, THERM_DIODE_OFFSET,
            // IA32_PERF_CAPABILITIES.
            0x0 | 0x1 | 0x3f | 0x345 => Self::ReadOnly(0),
            // IA32_PLATFORM_ID, FSB_FREQ, TEMP_TARGET, BBL_CR_CTL3.
            0x17 => Self::ReadOnly(0x18_0000_0000_0000),
            0xcd => Self::ReadOnly(4),
            0xee => Self::ReadOnly(0x8679_1b00),
            0x11e => Self::ReadOnly(0xbe70_2111),
            msr::IA32_FEATURE_CONTROL => {
                Self::ReadOnly(msr::FEATURE_CONTROL_LOCKED | msr::FEATURE_CONTROL_VMXON)
            }
            // Looked at without a CPUID bit. MSR_SMI_COUNT, MSR_CORE_THREAD_COUNT
            // (one of each), MSR_PLATFORM_INFO (no CPUID faulting, so
            // MISC_FEATURES_ENABLES stays 0), IA32_PERF_STATUS, MSR_TURBO_RATIO_LIMIT,
            // last branch records, RAPL's units and energies: nothing to tell.
            0x34 | 0xce | 0x198 | 0x1ad | 0x1db..=0x1de | 0x606 | 0x611 | 0x619 | 0x639 | 0x641 => {
                Self::ReadOnly(0)
            }
            0x35 => Self::ReadOnly(0x1_0001),
            // IA32_XSS: no supervisor state component is offered.
            0x140 | msr::IA32_XSS => Self::Zero,
            // IA32_BIOS_UPDT_TRIG, IA32_BIOS_SIGN_ID (revision 0, in its high half).
            0x79 => Self::WriteOnly,
            0x8b => Self::Deaf(0x6731_1111),
            // IA32_MCG_CAP: one bank. IA32_MCG_CTL: not there by the capability,
            // yet HAXM lets it be read.
            0x179 => Self::ReadOnly(1),
            0x17b => Self::ReadOnly(3),
            0x1a0 => Self::Deaf(MISC_ENABLE),
            0x478 => Self::FeatureMask,
            // EBC_HARD_POWERON to EBC_FREQUENCY_ID, IA32_PMC0 to 3, IA32_MCG_STATUS,
            // IA32_PERFEVTSEL0 to 3, IA32_DEBUGCTL, IA32_MC0_CTL2 to IA32_MC8_CTL2,
            // the counters' range, IA32_MC0_CTL to IA32_MC0_MISC.
            // IA32_PERF_CTL and MSR_POWER_CTL are the host's business.
            0x2a..=0x2c
            | 0x199
            | 0x1fc
            | 0xc1..=0xc4
            | 0x17a
            | 0x186..=0x189
            | msr::IA32_DEBUGCTL
            | 0x280..=0x288
            | 0x300..=0x3ff
            | 0x400..=0x403 => Self::Deaf(0),
            _ => return None,
        })
    }
}

/// IA32_TSC_AUX comes with RDTSCP or RDPID.
fn has_tsc_aux(features: &Features) -> bool {
    features.has(Feature::RDTSCP) || features.has(Feature::RDPID)
}

/// The address is canonical with 48-bit linear addresses, SDM vol. 1, 3.3.7.1
/// "Canonical Addressing".
#[must_use]
pub const fn canonical(address: u64) -> bool {
    let sign_extended = (address << 16) as i64 >> 16;
    sign_extended as u64 == address
}

/// The value to keep for an MSR that lives in the VMCS or in `SwitchedMsrs`.
/// Whoever writes it: the processor would refuse the others on the way in.
///
/// # Errors
/// The value is not allowed (SDM vol. 2, WRMSR, "Protected Mode Exceptions"),
/// or the guest has no such register.
pub fn accept(register: u32, value: u64, features: &Features) -> Result<u64, GpFault> {
    let fits = match register {
        msr::IA32_FS_BASE
        | msr::IA32_GS_BASE
        | msr::IA32_KERNEL_GSBASE
        | msr::IA32_LSTAR
        | msr::IA32_CSTAR
        | msr::IA32_SYSENTER_ESP
        | msr::IA32_SYSENTER_EIP => canonical(value),
        msr::IA32_FMASK => value >> 32 == 0,
        msr::IA32_TSC_AUX => has_tsc_aux(features) && value >> 32 == 0,
        // The VMCS field has 32 bits: the rest is not kept.
        msr::IA32_SYSENTER_CS => return Ok(value & 0xffff_ffff),
        msr::IA32_STAR => true,
        _ => false,
    };
    if fits { Ok(value) } else { Err(GpFault) }
}

/// The EFER to keep for a guest with EFER `old` and this CR0. LMA is never
/// taken from the value: it is LME and CR0.PG, SDM 10.8.5 "Initializing IA-32e
/// Mode".
///
/// # Errors
/// A reserved bit; or the guest changes LME while paging is on. The client may:
/// it restores CR0 before EFER.
pub fn valid_efer(
    old: u64,
    new: u64,
    cr0: u64,
    features: &Features,
    by_guest: bool,
) -> Result<u64, GpFault> {
    let lme = Efer::LME.bits();
    let lma = Efer::LMA.bits();
    let paging = cr0 & Cr0::PG.bits() != 0;
    if new & !features.allowed_efer() != 0 || (by_guest && paging && (old ^ new) & lme != 0) {
        return Err(GpFault);
    }
    let active = paging && new & lme != 0;
    Ok((new & !lma) | if active { lma } else { 0 })
}

/// IA32_PAT takes this value: eight types, SDM 12.12.2 "IA32_PAT MSR".
#[must_use]
pub fn valid_pat(value: u64) -> bool {
    let mut types = value.to_le_bytes().into_iter();
    types.all(|memory_type| matches!(memory_type, 0 | 1 | 4..=7))
}

/// A memory type of an MTRR, SDM table 12-8 "Memory Types That Can Be Encoded in
/// MTRRs".
const fn is_mtrr_type(value: u8) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

/// The registers that need no VMCS: kept, or the same for everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrStore {
    is_bootstrap: bool,
    apic_base: u64,
    pat: u64,
    mtrr_def_type: u64,
    mtrr_fixed: [u64; FIXED_MTRRS],
    /// Base and mask, in turn.
    mtrr_variable: [u64; VARIABLE_MTRRS * 2],
    cpuid_feature_mask: u64,
}

impl MsrStore {
    /// As after power-up. `bootstrap`: this is the bootstrap processor.
    #[must_use]
    pub const fn new(bootstrap: bool) -> Self {
        Self {
            is_bootstrap: bootstrap,
            apic_base: APIC_BASE_ADDRESS
                | APIC_BASE_ENABLE
                | if bootstrap { APIC_BASE_BSP } else { 0 },
            pat: msr::PAT_RESET,
            mtrr_def_type: 0,
            mtrr_fixed: [0; FIXED_MTRRS],
            mtrr_variable: [0; VARIABLE_MTRRS * 2],
            cpuid_feature_mask: !0,
        }
    }

    /// IA32_APIC_BASE, for the tunnel.
    #[must_use]
    pub const fn apic_base(&self) -> u64 {
        self.apic_base
    }

    /// IA32_PAT, for the VMCS.
    #[must_use]
    pub const fn pat(&self) -> u64 {
        self.pat
    }

    /// Reads a register that [`classify`] puts here, for guest or client.
    ///
    /// # Errors
    /// It does not live here, or cannot be read.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn read(&self, register: u32) -> Result<u64, GpFault> {
        let variable = |place| self.mtrr_variable.get(place as usize).copied();
        let fixed = |place| self.mtrr_fixed.get(place as usize).copied();
        match Home::of(register).ok_or(GpFault)? {
            Home::ApicBase => Ok(self.apic_base),
            Home::Pat => Ok(self.pat),
            Home::DefType => Ok(self.mtrr_def_type),
            Home::FeatureMask => Ok(self.cpuid_feature_mask),
            Home::Variable(place) => variable(place).ok_or(GpFault),
            Home::Fixed(place) => fixed(place).ok_or(GpFault),
            Home::Deaf(value) | Home::ReadOnly(value) | Home::Capability(value) => Ok(value),
            Home::Zero => Ok(0),
            Home::WriteOnly => Err(GpFault),
        }
    }

    /// Writes a register that [`classify`] puts here. `by_guest`: WRMSR rather
    /// than SET_MSRS, which may put anything into the MTRRs, as in HAXM:
    /// nothing follows from them.
    ///
    /// # Errors
    /// It does not live here, is read-only, or does not take the value. Nothing
    /// has changed.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn write(
        &mut self,
        register: u32,
        value: u64,
        features: &Features,
        by_guest: bool,
    ) -> Result<(), GpFault> {
        let (fits, slot) = match Home::of(register).ok_or(GpFault)? {
            Home::ApicBase => (self.valid_apic_base(value), Some(&mut self.apic_base)),
            Home::Pat => (valid_pat(value), Some(&mut self.pat)),
            Home::FeatureMask => (true, Some(&mut self.cpuid_feature_mask)),
            Home::DefType => (
                !by_guest || valid_def_type(value),
                Some(&mut self.mtrr_def_type),
            ),
            Home::Variable(place) => (
                !by_guest || valid_variable(place, value, features.physical_bits()),
                self.mtrr_variable.get_mut(place as usize),
            ),
            Home::Fixed(place) => (
                !by_guest || value.to_le_bytes().into_iter().all(is_mtrr_type),
                self.mtrr_fixed.get_mut(place as usize),
            ),
            Home::Deaf(_) | Home::WriteOnly => (true, None),
            Home::Zero => (value == 0, None),
            Home::Capability(has) => (!by_guest && value == has, None),
            Home::ReadOnly(_) => (false, None),
        };
        if !fits {
            return Err(GpFault);
        }
        if let Some(slot) = slot {
            *slot = value;
        }
        Ok(())
    }

    const fn valid_apic_base(&self, value: u64) -> bool {
        let bootstrap = if self.is_bootstrap { APIC_BASE_BSP } else { 0 };
        value & !(APIC_BASE_ENABLE | bootstrap) == APIC_BASE_ADDRESS
    }
}

/// SDM 12.11.2.1 "IA32_MTRR_DEF_TYPE MSR": type, fixed enable, enable.
const fn valid_def_type(value: u64) -> bool {
    value & !0xcff == 0 && is_mtrr_type(value as u8)
}

/// SDM 12.11.2.3 "Variable Range MTRRs": an even place is a base with its
/// type, an odd one a mask with its valid bit.
fn valid_variable(place: u32, value: u64, physical_bits: u8) -> bool {
    let above = (!0u64).checked_shl(physical_bits.into()).unwrap_or(0);
    if value & above != 0 {
        return false;
    }
    if place & 1 == 0 {
        value & 0xf00 == 0 && is_mtrr_type(value as u8)
    } else {
        value & 0x7ff == 0
    }
}
