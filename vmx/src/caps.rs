//! What the processor can do, read once, and why it may not do.
//!
//! The requirements read top to bottom in [`examine`]; each refusal has a
//! name that ends in the log and decides what user space is told.

mod counters;
mod errata;
mod speculation;

pub use counters::{Counters, MAX_COUNTERS};
pub use speculation::{Speculation, Weakest};

use crate::arch::control::{Entry, Exit, Pin, Primary, Secondary};
use crate::arch::ept::EptVpidCaps;
use crate::arch::msr;
use crate::arch::reg::{Cr4, Efer};
use crate::arch::vmx_caps::{ControlCaps, VmxBasic};
use crate::cpu::Cpu;
use core::fmt;

/// Why this machine cannot run guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// CPUID.1:ECX.VMX is 0: the processor has no VT-x, or firmware hides it.
    NoVmx,
    /// CPUID.80000001H:EDX.NX is 0.
    NoNx,
    /// IA32_FEATURE_CONTROL is locked without VMXON outside SMX.
    VmxLockedOff,
    /// IA32_EFER.NXE is 0: the host runs without NX.
    NxDisabled,
    /// CR4.FRED is 1: the host's events go other ways than those known here.
    Fred,
    /// A control that everything here depends on cannot be set so.
    Control {
        /// Which control word.
        word: &'static str,
        /// Bits that must be 1 and cannot be.
        missing: u32,
        /// Bits that must be 0 and cannot be.
        stuck: u32,
    },
    /// This processor would do, and another one of the machine would not.
    OtherProcessor {
        /// It lacks VT-x or NX for good.
        for_good: bool,
        /// NX is what it lacks.
        nx: bool,
    },
}

impl Refusal {
    /// The processor lacks it for good: the module does not load. The other
    /// refusals let it load and say so when asked.
    #[must_use]
    pub const fn is_unsupported(self) -> bool {
        matches!(
            self,
            Self::NoVmx | Self::NoNx | Self::OtherProcessor { for_good: true, .. }
        )
    }

    /// NX rather than VT-x is what is missing.
    #[must_use]
    pub const fn is_nx(self) -> bool {
        matches!(
            self,
            Self::NoNx | Self::NxDisabled | Self::OtherProcessor { nx: true, .. }
        )
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVmx => f.write_str("the processor has no VT-x (CPUID.1:ECX.VMX is 0)"),
            Self::NoNx => f.write_str("the processor has no NX (CPUID.80000001H:EDX.NX is 0)"),
            Self::VmxLockedOff => {
                f.write_str("VT-x is locked off by firmware (IA32_FEATURE_CONTROL)")
            }
            Self::NxDisabled => f.write_str("NX is disabled (IA32_EFER.NXE is 0)"),
            Self::Fred => f.write_str("the host uses FRED (CR4.FRED is 1)"),
            Self::Control {
                word,
                missing,
                stuck,
            } => write!(
                f,
                "VMX {word} controls: bits {missing:#x} cannot be 1, bits {stuck:#x} cannot be 0"
            ),
            Self::OtherProcessor { nx, .. } => write!(
                f,
                "a processor of this machine, though not this one, has no usable {}",
                if *nx { "NX" } else { "VT-x" }
            ),
        }
    }
}

/// Controls of one word as we want them.
struct Wanted {
    word: &'static str,
    /// Must be 1.
    required: u32,
    /// 1 if the processor can.
    optional: u32,
    /// Must be 0.
    forbidden: u32,
}

impl Wanted {
    /// SDM appendix A.3.1 "Pin-Based VM-Execution Controls": low half of the
    /// capability = must be 1, high half = may be 1.
    fn resolve(&self, caps: ControlCaps) -> Result<u32, Refusal> {
        let missing = self.required & !caps.allowed();
        let stuck = self.forbidden & caps.required();
        if missing != 0 || stuck != 0 {
            return Err(Refusal::Control {
                word: self.word,
                missing,
                stuck,
            });
        }
        Ok(caps.required() | self.required | (self.optional & caps.allowed()))
    }
}

/// What this kind of processor offers; the same on every processor of a host.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// IA32_VMX_BASIC.
    pub basic: VmxBasic,
    /// Pin-based controls to use.
    pub pin: Pin,
    /// Primary processor-based controls to use.
    pub primary: Primary,
    /// The monitor trap flag exists: single-stepping for a client's debugger.
    pub has_monitor_trap: bool,
    /// Secondary processor-based controls to use.
    pub secondary: Secondary,
    /// VM-exit controls to use.
    pub exit: Exit,
    /// VM-entry controls to use.
    pub entry: Entry,
    /// IA32_VMX_EPT_VPID_CAP; empty without EPT.
    pub ept_vpid: EptVpidCaps,
    /// CR0 bits that must be 1 in VMX operation.
    pub cr0_fixed0: u64,
    /// CR0 bits that may be 1 in VMX operation.
    pub cr0_fixed1: u64,
    /// CR4 bits that must be 1 in VMX operation.
    pub cr4_fixed0: u64,
    /// CR4 bits that may be 1 in VMX operation, and that a guest can use.
    pub cr4_fixed1: u64,
    /// What the processor gives away, and how that is held back.
    pub speculation: Speculation,
    /// Performance counters for guests.
    pub counters: Counters,
    /// The host may have PEBS records written.
    pub has_pebs: bool,
    /// XSAVES and XRSTORS work in a guest, whose IA32_XSS is 0 like the host's.
    pub has_xsaves: bool,
    /// The host may have made split locks fault.
    pub has_split_lock_disable: bool,
    /// Bits of a physical address, CPUID.80000008H:EAX\[7:0\].
    pub physical_bits: u8,
}

impl Caps {
    /// Guest memory is behind EPT. Without it no VM can be made.
    #[must_use]
    pub const fn has_ept(&self) -> bool {
        self.secondary.contains(Secondary::ENABLE_EPT)
    }

    /// Real mode and unpaged protected mode run on the processor.
    #[must_use]
    pub const fn has_unrestricted_guest(&self) -> bool {
        self.secondary.contains(Secondary::UNRESTRICTED_GUEST)
    }

    /// MOV CR8 works on a byte of memory.
    #[must_use]
    pub const fn has_tpr_shadow(&self) -> bool {
        self.primary.contains(Primary::USE_TPR_SHADOW)
    }

    /// TLB entries are tagged.
    #[must_use]
    pub const fn has_vpid(&self) -> bool {
        self.secondary.contains(Secondary::ENABLE_VPID)
    }
}

const PIN: Wanted = Wanted {
    word: "pin-based",
    required: Pin::EXTERNAL_INTERRUPT_EXITING.bits() | Pin::NMI_EXITING.bits(),
    // The guest's IRET and blocking then have nothing to do with the host's NMIs.
    optional: Pin::VIRTUAL_NMIS.bits(),
    forbidden: Pin::PREEMPTION_TIMER.bits(),
};

const PRIMARY: Wanted = Wanted {
    word: "primary processor-based",
    required: Primary::USE_TSC_OFFSETTING.bits()
        | Primary::HLT_EXITING.bits()
        | Primary::MWAIT_EXITING.bits()
        | Primary::RDPMC_EXITING.bits()
        | Primary::MOV_DR_EXITING.bits()
        | Primary::UNCONDITIONAL_IO_EXITING.bits()
        | Primary::USE_MSR_BITMAPS.bits()
        | Primary::MONITOR_EXITING.bits(),
    optional: Primary::ACTIVATE_SECONDARY.bits() | Primary::USE_TPR_SHADOW.bits(),
    forbidden: Primary::RDTSC_EXITING.bits()
        | Primary::INVLPG_EXITING.bits()
        // No NMI is ever injected: the interface has no request for one.
        | Primary::NMI_WINDOW_EXITING.bits()
        | Primary::MONITOR_TRAP_FLAG.bits(),
};

/// The same where CR8 has no shadow.
const PRIMARY_WITHOUT_SHADOW: Wanted = Wanted {
    required: PRIMARY.required
        | Primary::CR8_LOAD_EXITING.bits()
        | Primary::CR8_STORE_EXITING.bits(),
    ..PRIMARY
};

/// Secondary controls that are never 1, by bit: SDM 25.6.2, table 25-7. The
/// exits that they bring are answered with "cannot happen" (`vcpu::exit_table`).
pub const NEVER_SECONDARY: u32 = 1 << 0 // virtualize APIC accesses
    | 1 << 2 // descriptor-table exiting
    | 1 << 8 // APIC-register virtualization
    | 1 << 9 // virtual-interrupt delivery
    | 1 << 11 // RDRAND exiting
    | 1 << 13 // VM functions
    | 1 << 15 // ENCLS exiting
    | 1 << 16 // RDSEED exiting
    | 1 << 17 // page-modification logging
    | 1 << 21 // PASID translation
    | 1 << 23 // sub-page write permissions
    | 1 << 26 // user wait and pause
    | 1 << 27 // PCONFIG
    | 1 << 28 // ENCLV exiting
    | 1 << 30 // bus-lock detection
    | 1 << 31; // instruction timeout

const SECONDARY: Wanted = Wanted {
    word: "secondary processor-based",
    required: 0,
    optional: Secondary::ENABLE_EPT.bits()
        | Secondary::ENABLE_VPID.bits()
        | Secondary::UNRESTRICTED_GUEST.bits()
        | Secondary::PAUSE_LOOP_EXITING.bits()
        // A guest's WBINVD would empty the host's caches.
        | Secondary::WBINVD_EXITING.bits()
        | Secondary::ENABLE_RDTSCP.bits()
        | Secondary::ENABLE_INVPCID.bits()
        | Secondary::ENABLE_XSAVES.bits(),
    forbidden: NEVER_SECONDARY,
};

// The interrupt that ends a run is left for the host to take, so it must not
// be acknowledged by the exit.
const EXIT: Wanted = Wanted {
    word: "VM-exit",
    required: Exit::HOST_ADDRESS_SPACE_SIZE.bits()
        | Exit::LOAD_EFER.bits()
        | Exit::LOAD_PAT.bits()
        | Exit::SAVE_DEBUG_CONTROLS.bits(),
    optional: 0,
    // The other one is for guests that count: `vcpu::pmu`.
    forbidden: Exit::ACKNOWLEDGE_INTERRUPT.bits() | Exit::LOAD_PERF_GLOBAL_CTRL.bits(),
};

const ENTRY: Wanted = Wanted {
    word: "VM-entry",
    required: Entry::LOAD_DEBUG_CONTROLS.bits() | Entry::LOAD_EFER.bits() | Entry::LOAD_PAT.bits(),
    optional: 0,
    forbidden: Entry::IA32E_MODE_GUEST.bits() | Entry::LOAD_PERF_GLOBAL_CTRL.bits(),
};

/// Bits that EPT itself needs: a 4-level walk of write-back tables, and INVEPT.
const EPT_NEEDED: EptVpidCaps = EptVpidCaps::WALK_4
    .union(EptVpidCaps::MEMORY_TYPE_WB)
    .union(EptVpidCaps::INVEPT)
    .union(EptVpidCaps::INVEPT_ALL);

/// Examines the processor that this runs on.
///
/// # Errors
/// The first requirement that is not met.
pub fn examine(cpu: &impl Cpu) -> Result<Caps, Refusal> {
    // SDM 24.6 "Discovering Support for VMX".
    if cpu.cpuid(1, 0).ecx & (1 << 5) == 0 {
        return Err(Refusal::NoVmx);
    }
    // EPT entries and long-mode guests rest on NX.
    let extended = cpu.cpuid(0x8000_0000, 0).eax;
    if extended < 0x8000_0001 || cpu.cpuid(0x8000_0001, 0).edx & (1 << 20) == 0 {
        return Err(Refusal::NoNx);
    }
    let read = |register| {
        // SAFETY: SDM appendix A: with CPUID.VMX every register read through
        // this closure exists, given the conditions checked before each use.
        #[expect(unsafe_code)]
        // UNSAFETY: RDMSR of registers that were just shown to exist.
        unsafe {
            cpu.rdmsr(register)
        }
    };
    if read(msr::IA32_EFER) & Efer::NXE.bits() == 0 {
        return Err(Refusal::NxDisabled);
    }
    // Intel document 346446, "Flexible Return and Event Delivery": SWAPGS is #UD, and INT n
    // an event of a type of its own, so that INT 2 is no NMI to the host, nor
    // INT 18 a machine check.
    if Cr4::from_bits_retain(cpu.cr4()).contains(Cr4::FRED) {
        return Err(Refusal::Fred);
    }
    // SDM 24.7 "Enabling and Entering VMX Operation": unlocked is fine, we lock it.
    let feature = read(msr::IA32_FEATURE_CONTROL);
    if feature & msr::FEATURE_CONTROL_LOCKED != 0 && feature & msr::FEATURE_CONTROL_VMXON == 0 {
        return Err(Refusal::VmxLockedOff);
    }

    let basic = VmxBasic::from_bits_retain(read(msr::IA32_VMX_BASIC));
    // SDM appendix A.2: the TRUE registers tell which default-1 bits may be 0.
    let word = |plain, exact| {
        let register = if basic.contains(VmxBasic::TRUE_CONTROLS) {
            exact
        } else {
            plain
        };
        ControlCaps(read(register))
    };
    let primary_caps = word(
        msr::IA32_VMX_PROCBASED_CTLS,
        msr::IA32_VMX_TRUE_PROCBASED_CTLS,
    );
    let mut secondary = Secondary::empty();
    if primary_caps.allowed() & Primary::ACTIVATE_SECONDARY.bits() != 0 {
        let caps = ControlCaps(read(msr::IA32_VMX_PROCBASED_CTLS2));
        secondary = Secondary::from_bits_retain(SECONDARY.resolve(caps)?);
    }
    // The guest's IA32_XSS is 0 and is not switched, so the host's must be. The
    // register exists with XSAVES, SDM 13.3 "Enabling the XSAVE Feature Set".
    let has_xsaves = secondary.contains(Secondary::ENABLE_XSAVES)
        && cpu.cpuid(0, 0).eax >= 0xd
        && cpu.cpuid(0xd, 1).eax & (1 << 3) != 0
        && read(msr::IA32_XSS) == 0;
    secondary.set(Secondary::ENABLE_XSAVES, has_xsaves);
    let mut ept_vpid = EptVpidCaps::empty();
    // SDM appendix A.10: the register exists with either control.
    if secondary.intersects(Secondary::ENABLE_EPT | Secondary::ENABLE_VPID) {
        ept_vpid = EptVpidCaps::from_bits_retain(read(msr::IA32_VMX_EPT_VPID_CAP));
    }
    if !ept_vpid.contains(EPT_NEEDED) {
        secondary.remove(Secondary::ENABLE_EPT);
    }
    let has_ept = secondary.contains(Secondary::ENABLE_EPT);
    // SDM 27.2.1.1 "VM-Execution Control Fields": unrestricted guest needs EPT.
    secondary.set(
        Secondary::UNRESTRICTED_GUEST,
        has_ept && secondary.contains(Secondary::UNRESTRICTED_GUEST),
    );
    // Recycling a VPID needs a way to flush it.
    if !ept_vpid.contains(EptVpidCaps::INVVPID | EptVpidCaps::INVVPID_ALL) {
        secondary.remove(Secondary::ENABLE_VPID);
    }
    // Without EPT no guest will run, so nothing else has to be there: the
    // client learns from the missing capability bit.
    let settle = |wanted: &Wanted, caps: ControlCaps| {
        if has_ept {
            wanted.resolve(caps)
        } else {
            Ok(caps.required())
        }
    };
    let pin_caps = word(
        msr::IA32_VMX_PINBASED_CTLS,
        msr::IA32_VMX_TRUE_PINBASED_CTLS,
    );
    let pin = settle(&PIN, pin_caps)?;
    let wanted = if primary_caps.allowed() & Primary::USE_TPR_SHADOW.bits() != 0 {
        &PRIMARY
    } else {
        &PRIMARY_WITHOUT_SHADOW
    };
    let primary = Primary::from_bits_retain(settle(wanted, primary_caps)?);
    let exit_caps = word(msr::IA32_VMX_EXIT_CTLS, msr::IA32_VMX_TRUE_EXIT_CTLS);
    let exit = settle(&EXIT, exit_caps)?;
    let entry_caps = word(msr::IA32_VMX_ENTRY_CTLS, msr::IA32_VMX_TRUE_ENTRY_CTLS);
    let entry = settle(&ENTRY, entry_caps)?;
    let switches_counters = has_ept
        && errata::switches_counters(cpu)
        && exit_caps.allowed() & Exit::LOAD_PERF_GLOBAL_CTRL.bits() != 0
        && entry_caps.allowed() & Entry::LOAD_PERF_GLOBAL_CTRL.bits() != 0;
    let mut cr4_fixed1 = read(msr::IA32_VMX_CR4_FIXED1);
    if !errata::has_pcids(cpu) {
        cr4_fixed1 &= !Cr4::PCIDE.bits();
    }
    let physical_bits = if extended >= 0x8000_0008 {
        (cpu.cpuid(0x8000_0008, 0).eax & 0xff) as u8
    } else {
        36
    };
    Ok(Caps {
        basic,
        pin: Pin::from_bits_retain(pin),
        primary,
        has_monitor_trap: primary_caps.allowed() & Primary::MONITOR_TRAP_FLAG.bits() != 0,
        secondary,
        exit: Exit::from_bits_retain(exit),
        entry: Entry::from_bits_retain(entry),
        ept_vpid,
        cr0_fixed0: read(msr::IA32_VMX_CR0_FIXED0),
        cr0_fixed1: read(msr::IA32_VMX_CR0_FIXED1),
        cr4_fixed0: read(msr::IA32_VMX_CR4_FIXED0),
        cr4_fixed1,
        speculation: Speculation::examine(cpu),
        counters: Counters::examine(cpu, switches_counters),
        has_pebs: counters::has_pebs(cpu),
        has_xsaves,
        has_split_lock_disable: has_split_lock_disable(cpu),
        physical_bits,
    })
}

/// SDM 9.1.2.3 "Features to Disable Bus Locks". Ice Lake's have it without saying so (SDM
/// vol. 4, the tables of 06_6AH, 06_6CH and 06_7EH).
fn has_split_lock_disable(cpu: &impl Cpu) -> bool {
    if matches!(errata::model(cpu), 0x6_06a0 | 0x6_06c0 | 0x7_06e0) {
        return true;
    }
    let has_capabilities = cpu.cpuid(0, 0).eax >= 7 && cpu.cpuid(7, 0).edx & (1 << 30) != 0;
    // SAFETY: CPUID.7.0:EDX[30] says that the register exists.
    #[expect(unsafe_code)]
    // UNSAFETY: RDMSR of a register that was just shown to exist.
    let read = || unsafe { cpu.rdmsr(msr::IA32_CORE_CAPABILITIES) };
    has_capabilities && read() & msr::SPLIT_LOCK_DISABLE_SUPPORTED != 0
}
