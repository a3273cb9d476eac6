//! Which check of the guest state a failed VM entry did not pass.
//!
//! The processor says only that one did (exit reason 33). This walks through
//! SDM 27.3.1 "Checks on the Guest State Area" in its order, after the failure,
//! for the log. The names are those of the simulator's checks, which compares
//! the two.

use crate::arch::control::{Entry, Pin, Secondary};
use crate::arch::event::{EventKind, InterruptionInfo};
use crate::arch::field::{self, Field, Natural};
use crate::arch::reg::{Cr0, Cr4, Efer, Interruptibility, PDPTE_RESERVED, Rflags};
use crate::arch::segment::{AccessRights, SegmentRegister};
use crate::caps::Caps;
use crate::vcpu::msr::{canonical, valid_pat};

/// CR0 bits that a VM entry never checks, as it does not change them.
const UNCHECKED_CR0: u64 = Cr0::CD.union(Cr0::NW).bits();
/// IA32_DEBUGCTL bits that exist.
const DEBUGCTL: u64 = 0xffc3;
/// RFLAGS bits that are 0: 63:22, 15, 5, 3.
const RFLAGS_ZERO: u64 = !0x3f_ffff | 0x8028;
/// IA32_EFER bits that exist.
const EFER: u64 = Efer::SCE
    .union(Efer::LME)
    .union(Efer::LMA)
    .union(Efer::NXE)
    .bits();
/// Pending debug exceptions that exist: B0 to B3, enabled breakpoint, BS.
const PENDING_DEBUG: u64 = 0x500f;
const PDPTES: [Field<u64>; 4] = [
    field::GUEST_PDPTE0,
    field::GUEST_PDPTE1,
    field::GUEST_PDPTE2,
    field::GUEST_PDPTE3,
];

struct Segment {
    selector: u64,
    base: u64,
    limit: u64,
    rights: u64,
}

impl Segment {
    const fn usable(&self) -> bool {
        self.rights & AccessRights::UNUSABLE.bits() as u64 == 0
    }

    const fn kind(&self) -> u64 {
        self.rights & 0xf
    }

    const fn dpl(&self) -> u64 {
        self.rights >> 5 & 3
    }

    /// S, P, the reserved bits and G of a segment; `system`: S is to be 0.
    fn rights(&self, system: bool, names: [&'static str; 4]) -> Option<&'static str> {
        let [s, p, reserved, granularity] = names;
        let g = self.rights >> 15 & 1 != 0;
        if (self.rights >> 4 & 1 == 0) != system {
            Some(s)
        } else if self.rights >> 7 & 1 == 0 {
            Some(p)
        } else if self.rights & 0xfffe_0f00 != 0 {
            Some(reserved)
        } else if (g && self.limit & 0xfff != 0xfff) || (!g && self.limit >> 20 != 0) {
            Some(granularity)
        } else {
            None
        }
    }
}

const COMMON: [&str; 4] = ["SegmentS", "SegmentP", "SegmentReserved", "SegmentG"];

macro_rules! check {
    ($($name:ident if $bad:expr;)*) => {
        $(if $bad { return Some(stringify!($name)); })*
    };
}

/// What the checks look at.
struct Walk<'a, F: Fn(u32) -> u64> {
    get: F,
    caps: &'a Caps,
    cr0: u64,
    rflags: u64,
    /// The guest will be in IA-32e mode.
    long: bool,
    /// SDM 25.6.2: the control "unrestricted guest".
    unrestricted: bool,
}

/// The first check of the guest state that the VMCS does not pass; `get` reads a
/// field by its encoding.
pub fn first_violated(get: impl Fn(u32) -> u64, caps: &Caps) -> Option<&'static str> {
    let entry = get(field::ENTRY_CONTROLS.encoding());
    let secondary = get(field::SECONDARY_CONTROLS.encoding());
    let walk = Walk {
        caps,
        cr0: get(field::GUEST_CR0.encoding()),
        rflags: get(field::GUEST_RFLAGS.encoding()),
        long: entry & u64::from(Entry::IA32E_MODE_GUEST.bits()) != 0,
        unrestricted: secondary & u64::from(Secondary::UNRESTRICTED_GUEST.bits()) != 0,
        get,
    };
    walk.registers()
        .or_else(|| walk.segments())
        .or_else(|| walk.state())
}

impl<F: Fn(u32) -> u64> Walk<'_, F> {
    fn not_canonical(&self, field: Field<Natural>) -> bool {
        !canonical((self.get)(field.encoding()))
    }

    fn physical(&self, address: u64) -> bool {
        address.checked_shr(self.caps.physical_bits.into()) == Some(0)
    }

    /// 27.3.1.1 "Checks on Guest Control Registers, Debug Registers, and MSRs".
    fn registers(&self) -> Option<&'static str> {
        let (caps, cr0) = (self.caps, self.cr0);
        let cr4 = (self.get)(field::GUEST_CR4.encoding());
        let efer = (self.get)(field::GUEST_EFER.encoding());
        let paging = cr0 & Cr0::PG.bits() != 0;
        let free = if self.unrestricted {
            (Cr0::PE | Cr0::PG).bits()
        } else {
            0
        } | UNCHECKED_CR0;
        let lma = efer & Efer::LMA.bits() != 0;
        let lme = efer & Efer::LME.bits() != 0;
        check! {
            GuestCr0 if caps.cr0_fixed0 & !free & !cr0 != 0
                || cr0 & !(caps.cr0_fixed1 | UNCHECKED_CR0) != 0;
            GuestPgWithoutPe if paging && cr0 & Cr0::PE.bits() == 0;
            GuestCr4 if caps.cr4_fixed0 & !cr4 != 0 || cr4 & !caps.cr4_fixed1 != 0;
            GuestIa32e if self.long && (!paging || cr4 & Cr4::PAE.bits() == 0);
            GuestPcide if !self.long && cr4 & Cr4::PCIDE.bits() != 0;
            GuestCr3 if !self.physical((self.get)(field::GUEST_CR3.encoding()));
            GuestDebugctl if (self.get)(field::GUEST_DEBUGCTL.encoding()) & !DEBUGCTL != 0;
            GuestDr7 if (self.get)(field::GUEST_DR7.encoding()) >> 32 != 0;
            GuestSysenter if self.not_canonical(field::GUEST_SYSENTER_ESP)
                || self.not_canonical(field::GUEST_SYSENTER_EIP);
            GuestPat if !valid_pat((self.get)(field::GUEST_PAT.encoding()));
            GuestEfer if efer & !EFER != 0 || lma != self.long || (paging && lma != lme);
        }
        None
    }

    fn segment(&self, register: SegmentRegister) -> Segment {
        let step = (register as u32).wrapping_mul(2);
        let read = |first: u32| (self.get)(first.wrapping_add(step));
        Segment {
            selector: read(field::GUEST_ES_SELECTOR.encoding()),
            base: read(field::GUEST_ES_BASE.encoding()),
            limit: read(field::GUEST_ES_LIMIT.encoding()),
            rights: read(field::GUEST_ES_RIGHTS.encoding()),
        }
    }

    /// 27.3.1.2 "Checks on Guest Segment Registers".
    fn segments(&self) -> Option<&'static str> {
        use SegmentRegister::{Cs, Ds, Es, Fs, Gs, Ldtr, Ss, Tr};
        let [cs, ss, tr, ldtr] = [Cs, Ss, Tr, Ldtr].map(|register| self.segment(register));
        let v86 = self.rflags & Rflags::VM.bits() != 0;
        check! {
            TrTi if tr.selector & 4 != 0;
            LdtrTi if ldtr.usable() && ldtr.selector & 4 != 0;
            SsRpl if !v86 && !self.unrestricted && (ss.selector ^ cs.selector) & 3 != 0;
            SegmentBaseCanonical if self.not_canonical(field::GUEST_FS_BASE)
                || self.not_canonical(field::GUEST_GS_BASE)
                || !canonical(tr.base)
                || (ldtr.usable() && !canonical(ldtr.base));
        }
        for register in [Es, Cs, Ss, Ds] {
            let segment = self.segment(register);
            let counts = register == Cs || segment.usable();
            check! { SegmentBaseHigh if counts && segment.base >> 32 != 0; }
        }
        if v86 {
            for register in [Es, Cs, Ss, Ds, Fs, Gs] {
                let segment = self.segment(register);
                check! {
                    V86Base if segment.base != segment.selector << 4;
                    V86Limit if segment.limit != 0xffff;
                    V86Rights if segment.rights != 0xf3;
                }
            }
        } else {
            let odd = self.code_and_stack(&cs, &ss);
            if odd.is_some() {
                return odd;
            }
            for register in [Ds, Es, Fs, Gs] {
                let segment = self.segment(register);
                if !segment.usable() {
                    continue;
                }
                let kind = segment.kind();
                let dpl_counts = !self.unrestricted && kind < 12;
                check! {
                    DataType if kind & 1 == 0 || kind & 0xa == 8;
                    DataDpl if dpl_counts && segment.dpl() < segment.selector & 3;
                }
                let odd = segment.rights(false, COMMON);
                if odd.is_some() {
                    return odd;
                }
            }
        }
        check! {
            TrType if tr.kind() != 11 && (tr.kind() != 3 || self.long);
            TrRights if !tr.usable();
        }
        let odd = tr.rights(true, ["TrRights", "TrRights", "TrRights", "TrG"]);
        if odd.is_some() || !ldtr.usable() {
            return odd;
        }
        check! { LdtrType if ldtr.kind() != 2; }
        ldtr.rights(true, ["LdtrRights", "LdtrRights", "LdtrRights", "LdtrG"])
    }

    fn code_and_stack(&self, cs: &Segment, ss: &Segment) -> Option<&'static str> {
        let kind = cs.kind();
        let protected = self.cr0 & Cr0::PE.bits() != 0;
        let data = kind == 3 && self.unrestricted;
        check! {
            CsType if kind & 9 != 9 && !data;
            CsDpl if match kind {
                3 => cs.dpl() != 0,
                9 | 11 => cs.dpl() != ss.dpl(),
                _ => cs.dpl() > ss.dpl(),
            };
        }
        let odd = cs.rights(false, COMMON);
        if odd.is_some() {
            return odd;
        }
        let both = (AccessRights::LONG | AccessRights::DB).bits();
        check! {
            CsDb if self.long && cs.rights as u32 & both == both;
            SsDpl if !self.unrestricted && ss.dpl() != ss.selector & 3;
            SsDpl if (kind == 3 || !protected) && ss.dpl() != 0;
        }
        if !ss.usable() {
            return None;
        }
        check! { SsType if ss.kind() & 0xb != 3; }
        ss.rights(false, COMMON)
    }

    /// 27.3.1.3 to 27.3.1.6: tables, RIP, RFLAGS, non-register state, PDPTEs.
    /// The activity state and the link pointer never change here.
    fn state(&self) -> Option<&'static str> {
        let get = &self.get;
        let (rip, rflags) = (get(field::GUEST_RIP.encoding()), self.rflags);
        let cs = AccessRights::from_bits_retain(get(field::GUEST_CS_RIGHTS.encoding()) as u32);
        let rip_fits = if self.long && cs.contains(AccessRights::LONG) {
            canonical(rip)
        } else {
            rip >> 32 == 0
        };
        let info = InterruptionInfo(get(field::ENTRY_INTERRUPTION_INFO.encoding()) as u32);
        let event = info.is_valid().then(|| info.kind());
        let interrupt = event == Some(EventKind::Interrupt);
        let nmi = event == Some(EventKind::Nmi);
        let blocking = Interruptibility::from_bits_retain(get(
            field::GUEST_INTERRUPTIBILITY.encoding()
        ) as u32);
        let sti = blocking.contains(Interruptibility::STI);
        let mov_ss = blocking.contains(Interruptibility::MOV_SS);
        let enabled = rflags & Rflags::IF.bits() != 0;
        let halted = get(field::GUEST_ACTIVITY.encoding()) == 1;
        let pending = get(field::GUEST_PENDING_DEBUG.encoding());
        // SDM 18.4.1: BTF, bit 1, makes TF step branches.
        let steps =
            rflags & Rflags::TF.bits() != 0 && get(field::GUEST_DEBUGCTL.encoding()) & 2 == 0;
        check! {
            TableBase if self.not_canonical(field::GUEST_GDTR_BASE)
                || self.not_canonical(field::GUEST_IDTR_BASE);
            TableLimit if get(field::GUEST_GDTR_LIMIT.encoding()) >> 16 != 0
                || get(field::GUEST_IDTR_LIMIT.encoding()) >> 16 != 0;
            GuestRip if !rip_fits;
            RflagsReserved if rflags & RFLAGS_ZERO != 0 || rflags & 2 == 0;
            RflagsVm if rflags & Rflags::VM.bits() != 0
                && (self.long || self.cr0 & Cr0::PE.bits() == 0);
            RflagsIf if interrupt && !enabled;
            InterruptibilityReserved if blocking.bits() >> 4 != 0;
            StiAndMovSs if sti && mov_ss;
            StiWithoutIf if sti && !enabled;
            BlockingInterrupt if interrupt && (sti || mov_ss);
            BlockingSmi if blocking.bits() & 4 != 0;
            BlockingNmiMovSs if nmi && mov_ss;
            BlockingNmiSti if nmi && sti;
            BlockingVirtualNmi if nmi
                && blocking.contains(Interruptibility::NMI)
                && self.caps.pin.contains(Pin::VIRTUAL_NMIS);
            PendingDebugReserved if pending & !PENDING_DEBUG != 0;
            PendingDebugBs if (sti || mov_ss || halted) && (pending >> 14 & 1 != 0) != steps;
        }
        let paging = self.cr0 & Cr0::PG.bits() != 0;
        if paging && get(field::GUEST_CR4.encoding()) & Cr4::PAE.bits() != 0 && !self.long {
            for entry in PDPTES.map(|field| get(field.encoding())) {
                let bad = entry & PDPTE_RESERVED != 0 || !self.physical(entry);
                check! { Pdptes if entry & 1 != 0 && bad; }
            }
        }
        None
    }
}
