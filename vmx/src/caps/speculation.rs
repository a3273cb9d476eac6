//! What this processor gives away to code that speculates, and the registers by
//! which that is held back.
//!
//! And one erratum that is held back in the same way, where the host wants such things.
//!
//! SDM vol. 4, table 2-2: IA32_SPEC_CTRL, IA32_PRED_CMD, IA32_FLUSH_CMD,
//! IA32_ARCH_CAPABILITIES; vol. 2, CPUID, leaf 7, EDX 26 to 31.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::arch::msr;
use crate::cpu::{Cpu, CpuidResult, how};
use crate::host::Mitigations;

/// IA32_ARCH_CAPABILITIES, the bits that are used here.
mod cap {
    pub const RDCL_NO: u64 = 1 << 0;
    pub const IBRS_ALL: u64 = 1 << 1;
    pub const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    pub const MDS_NO: u64 = 1 << 5;
    pub const IF_PSCHANGE_MC_NO: u64 = 1 << 6;
    pub const TAA_NO: u64 = 1 << 8;
    /// No stale data by memory-mapped I/O: SBDR_SSDP_NO, FBSDP_NO, PSDP_NO.
    pub const MMIO_NO: u64 = 7 << 13;
    pub const FB_CLEAR: u64 = 1 << 17;
    pub const PBRSB_NO: u64 = 1 << 24;
    pub const RFDS_NO: u64 = 1 << 27;
    pub const RFDS_CLEAR: u64 = 1 << 28;
}

/// Bits of IA32_ARCH_CAPABILITIES that are true of a guest too: what it need not
/// fear, and how its own VERW works. Not those that announce further registers.
const FOR_GUESTS: u64 = 0x7f | 1 << 8 | 7 << 13 | 1 << 17 | 3 << 19 | 1 << 24 | 7 << 26;

/// Bits of these that say what there is to fear: RSBA, RRSBA.
const FEARS: u64 = 1 << 2 | 1 << 19;

/// What the processor needs and has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Speculation {
    /// IA32_FLUSH_CMD exists.
    pub has_flush: bool,
    /// IA32_ARCH_CAPABILITIES for a guest; `None`: there is none.
    pub arch_capabilities: Option<u64>,
    /// Code must not run from large EPT leaves. Otherwise a guest that changes the size of a page
    /// under its own code can stop the processor with a machine check (SDM vol. 4, table 2-2,
    /// IA32_ARCH_CAPABILITIES.IF_PSCHANGE_MC_NO is where it cannot).
    pub needs_small_code: bool,
    /// What each entry has to do: bits of [`how`].
    pub how: u64,
    /// Another guest than the last gets a processor by an IBPB: IA32_PRED_CMD
    /// bit 0, CPUID.7.0:EDX\[26\].
    pub parts_guests: bool,
}

impl Speculation {
    /// Asks the processor that this runs on.
    pub fn examine(cpu: &impl Cpu) -> Self {
        let features = if cpu.cpuid(0, 0).eax >= 7 {
            cpu.cpuid(7, 0)
        } else {
            CpuidResult::default()
        };
        let has = |bit: u32| features.edx >> bit & 1 != 0;
        let has_rtm = features.ebx & (1 << 11) != 0;
        let known = has(29).then(|| {
            // SAFETY: CPUID.7.0:EDX[29] says that the register exists.
            #[expect(unsafe_code)]
            // UNSAFETY: RDMSR of a register that was just shown to exist.
            unsafe {
                cpu.rdmsr(msr::IA32_ARCH_CAPABILITIES)
            }
        });
        let bits = known.unwrap_or(0);
        let safe = |all: u64| bits & all == all;
        let (clears, has_flush) = (has(10), has(28));
        let leaks_buffers = (clears && !safe(cap::MDS_NO))
            || (clears && has_rtm && !safe(cap::TAA_NO))
            || (safe(cap::FB_CLEAR) && !safe(cap::MMIO_NO))
            || (safe(cap::RFDS_CLEAR) && !safe(cap::RFDS_NO));
        let leaks_l1d = has_flush && !safe(cap::RDCL_NO) && !safe(cap::SKIP_L1DFL_VMENTRY);
        let mut how = 0;
        if leaks_buffers {
            how |= how::CLEAR_BUFFERS;
        }
        if leaks_l1d {
            how |= how::FLUSH_L1D;
        }
        if !(safe(cap::IBRS_ALL) && safe(cap::PBRSB_NO)) {
            how |= how::FILL_RETURNS;
        }
        // Without IBRS_ALL the bit holds back what a less privileged mode has taught the
        // predictor only if it is written after each exit, though it is 1 already (Intel,
        // "Speculative Execution Side Channel Mitigations", 336996, 2.4.1).
        let host_restricts = || {
            // SAFETY: CPUID.7.0:EDX[26] says that the register exists.
            #[expect(unsafe_code)]
            // UNSAFETY: RDMSR of a register that was just shown to exist.
            let value = unsafe { cpu.rdmsr(msr::IA32_SPEC_CTRL) };
            value & 1 != 0
        };
        if has(26) && !safe(cap::IBRS_ALL) && host_restricts() {
            how |= how::SPEC_CTRL;
        }
        Self {
            has_flush,
            needs_small_code: !safe(cap::IF_PSCHANGE_MC_NO),
            arch_capabilities: known.map(|bits| (bits & FOR_GUESTS) | cap::SKIP_L1DFL_VMENTRY),
            how,
            parts_guests: has(26),
        }
    }

    /// Does what the host wants of it.
    pub fn settle(&mut self, wanted: Mitigations) {
        match wanted {
            Mitigations::Off => {
                self.how = 0;
                self.parts_guests = false;
                self.needs_small_code = false;
            }
            Mitigations::Needed => {}
            Mitigations::All => {
                self.needs_small_code = true;
                self.how |= how::CLEAR_BUFFERS | how::FILL_RETURNS;
                if self.has_flush {
                    self.how |= how::FLUSH_L1D;
                }
            }
        }
    }
}

/// What any processor of the machine needs: they may differ, as cores of two kinds do.
pub struct Weakest {
    how: AtomicU64,
    needs_small_code: AtomicBool,
    told: AtomicU64,
}

impl Weakest {
    /// What this one needs.
    #[must_use]
    pub fn of(first: &Speculation) -> Self {
        Self {
            how: AtomicU64::new(first.how),
            needs_small_code: AtomicBool::new(first.needs_small_code),
            told: AtomicU64::new(first.arch_capabilities.unwrap_or(0)),
        }
    }

    /// And another one.
    pub fn add(&self, other: &Speculation) {
        self.how.fetch_or(other.how, Ordering::SeqCst);
        self.needs_small_code
            .fetch_or(other.needs_small_code, Ordering::SeqCst);
        let told = other.arch_capabilities.unwrap_or(0);
        self.told.fetch_and(told | FEARS, Ordering::SeqCst);
        self.told.fetch_or(told & FEARS, Ordering::SeqCst);
    }

    /// All that was added.
    pub fn apply(self, to: &mut Speculation) {
        to.how = self.how.into_inner();
        to.needs_small_code = self.needs_small_code.into_inner();
        let told = self.told.into_inner();
        to.arch_capabilities = to.arch_capabilities.map(|_| told);
    }
}
