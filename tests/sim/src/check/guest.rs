//! SDM 27.3.1 "Checks on the Guest State Area" without the segment registers,
//! and 27.4 "Loading MSRs".

use super::{Check, EFER_BITS, Failed, View, pat_valid};
use crate::cpu::msr_accepts;
use crate::instructions::revision;
use crate::pmu::GLOBAL_BITS;
use crate::profile::Profile;
use crate::state::{Processor, State};

pub(super) fn check(v: &View<'_>, f: &mut Failed) {
    control_registers(v, f);
    msrs(v, f);
    tables_and_flags(v, f);
    activity(v, f);
    interruptibility(v, f);
    pending_debug(v, f);
    link_pointer(v, f);
    pdptes(v, f);
}

/// 27.3.1.1 "Checks on Guest Control Registers, Debug Registers, and MSRs".
fn control_registers(v: &View<'_>, f: &mut Failed) {
    let p = v.profile;
    let (cr0, cr4) = (v.get(0x6800), v.get(0x6804));
    let free = if v.secondary(7) { 1 | 1 << 31 } else { 0 };
    // CD and NW (bits 30:29) are never checked: VM entry does not change them.
    let required = p.msr(0x486) & !free & !0x6000_0000;
    let allowed = p.msr(0x487) | 0x6000_0000;
    f.when(required & !cr0 != 0 || cr0 & !allowed != 0, Check::GuestCr0);
    f.when(cr0 >> 31 & 1 != 0 && cr0 & 1 == 0, Check::GuestPgWithoutPe);
    let cr4_bad = p.msr(0x488) & !cr4 != 0 || cr4 & !p.msr(0x489) != 0;
    f.when(cr4_bad, Check::GuestCr4);
    if v.ia32e() {
        f.when(cr0 >> 31 & 1 == 0 || cr4 >> 5 & 1 == 0, Check::GuestIa32e);
    } else {
        f.when(cr4 >> 17 & 1 != 0, Check::GuestPcide);
    }
    f.when(!p.physical(v.get(0x6802)), Check::GuestCr3);
    if v.entry(2) {
        f.when(v.get(0x2802) & !0xffc3 != 0, Check::GuestDebugctl);
        f.when(v.get(0x681a) >> 32 != 0, Check::GuestDr7);
    }
}

fn msrs(v: &View<'_>, f: &mut Failed) {
    f.when(
        !v.canonical(0x6824) || !v.canonical(0x6826),
        Check::GuestSysenter,
    );
    if v.entry(14) {
        f.when(!pat_valid(v.get(0x2804)), Check::GuestPat);
    }
    if v.entry(13) {
        let enabled = v.get(0x2808);
        f.when(enabled & !GLOBAL_BITS != 0, Check::GuestPerfGlobalCtrl);
    }
    if v.entry(15) {
        let efer = v.get(0x2806);
        let (lme, lma) = (efer >> 8 & 1 != 0, efer >> 10 & 1 != 0);
        let paging = v.get(0x6800) >> 31 & 1 != 0;
        let bad = efer & !EFER_BITS != 0 || lma != v.ia32e() || paging && lma != lme;
        f.when(bad, Check::GuestEfer);
    }
}

/// 27.3.1.3 "Checks on Guest Descriptor-Table Registers" and 27.3.1.4 "Checks on
/// Guest RIP, RFLAGS, and SSP".
fn tables_and_flags(v: &View<'_>, f: &mut Failed) {
    f.when(
        !v.canonical(0x6816) || !v.canonical(0x6818),
        Check::TableBase,
    );
    f.when(
        v.get(0x4810) >> 16 != 0 || v.get(0x4812) >> 16 != 0,
        Check::TableLimit,
    );
    let (rip, rflags) = (v.get(0x681e), v.get(0x6820));
    let long_code = v.ia32e() && v.get(0x4816) >> 13 & 1 != 0;
    let rip_bad = if long_code {
        !v.profile.canonical(rip)
    } else {
        rip >> 32 != 0
    };
    f.when(rip_bad, Check::GuestRip);
    let reserved = rflags >> 22 != 0 || rflags & 0x8028 != 0 || rflags & 2 == 0;
    f.when(reserved, Check::RflagsReserved);
    let no_v86 = v.ia32e() || v.get(0x6800) & 1 == 0;
    f.when(rflags >> 17 & 1 != 0 && no_v86, Check::RflagsVm);
    let interrupt = matches!(v.event(), Some((0, _)));
    f.when(interrupt && rflags >> 9 & 1 == 0, Check::RflagsIf);
}

/// 27.3.1.5 "Checks on Guest Non-Register State": the activity state.
fn activity(v: &View<'_>, f: &mut Failed) {
    let activity = v.get(0x4826);
    let supported = match activity {
        0 => true,
        1..=3 => v.profile.msr(0x485) >> (5 + activity) & 1 != 0,
        _ => false,
    };
    f.when(!supported, Check::ActivityUnsupported);
    let ss_dpl = v.get(0x4818) >> 5 & 3;
    f.when(activity == 1 && ss_dpl != 0, Check::ActivityHltDpl);
    f.when(
        activity != 0 && v.get(0x4824) & 3 != 0,
        Check::ActivityBlocking,
    );
    if let Some((kind, vector)) = v.event() {
        let deliverable = match activity {
            1 => matches!((kind, vector), (0 | 2, _) | (3, 1 | 18) | (7, 0)),
            2 => matches!((kind, vector), (2, _) | (3, 18)),
            3 => false,
            _ => true,
        };
        f.when(!deliverable, Check::ActivityEvent);
    }
}

fn interruptibility(v: &View<'_>, f: &mut Failed) {
    let state = v.get(0x4824);
    let (sti, mov_ss) = (state & 1 != 0, state & 2 != 0);
    // Bit 4, enclave interruption, exists with SGX only.
    f.when(state >> 4 != 0, Check::InterruptibilityReserved);
    f.when(sti && mov_ss, Check::StiAndMovSs);
    f.when(sti && v.get(0x6820) >> 9 & 1 == 0, Check::StiWithoutIf);
    f.when(state & 4 != 0, Check::BlockingSmi);
    match v.event() {
        Some((0, _)) => f.when(sti || mov_ss, Check::BlockingInterrupt),
        Some((2, _)) => {
            f.when(mov_ss, Check::BlockingNmiMovSs);
            f.when(sti, Check::BlockingNmiSti);
            f.when(v.pin(5) && state & 8 != 0, Check::BlockingVirtualNmi);
        }
        _ => {}
    }
}

fn pending_debug(v: &View<'_>, f: &mut Failed) {
    let pending = v.get(0x6822);
    // Bits 3:0, 12 and 14 exist; bit 16 with RTM, which no model here has.
    f.when(pending & !0x500f != 0, Check::PendingDebugReserved);
    let blocked = v.get(0x4824) & 3 != 0 || v.get(0x4826) == 1;
    if blocked {
        let stepping = v.get(0x6820) >> 8 & 1 != 0 && v.get(0x2802) >> 1 & 1 == 0;
        f.when((pending >> 14 & 1 != 0) != stepping, Check::PendingDebugBs);
    }
}

fn link_pointer(v: &View<'_>, f: &mut Failed) {
    let link = v.get(0x2800);
    if link == u64::MAX {
        return;
    }
    let aligned = link & 0xfff == 0 && v.profile.physical(link) && link != v.pointer;
    let shadow = u32::from(v.secondary(14)) << 31;
    let identified = aligned && v.memory.revision(link) == Some(revision(v.profile) | shadow);
    f.when(!identified, Check::LinkPointer);
}

/// 27.3.1.6 "Checks on Guest Page-Directory-Pointer-Table Entries".
fn pdptes(v: &View<'_>, f: &mut Failed) {
    let pae = v.get(0x6800) >> 31 & 1 != 0 && v.get(0x6804) >> 5 & 1 != 0 && !v.ia32e();
    if !pae {
        return;
    }
    for n in 0..4 {
        let entry = if v.secondary(1) {
            v.get(0x280a + n * 2)
        } else {
            let at = (v.get(0x6802) & 0xffff_ffe0) + u64::from(n) * 8;
            v.memory.load(at).unwrap_or(0)
        };
        let reserved = entry & 0x1e6 != 0 || !v.profile.physical(entry);
        f.when(entry & 1 != 0 && reserved, Check::Pdptes);
    }
}

/// 27.4 "Loading MSRs": `Err` is the number, from 1, of the entry that fails.
pub(crate) fn load_msrs(
    state: &mut State,
    profile: &Profile,
    cpu: usize,
    area: u64,
    count: u64,
) -> Result<(), u64> {
    for n in 0..count {
        let at = area + n * 16;
        let (Some(head), Some(value)) = (state.memory.load(at), state.memory.load(at + 8)) else {
            return Err(n + 1);
        };
        let number = u32::try_from(head & 0xffff_ffff).unwrap_or(0);
        let forbidden = matches!(number, 0xc000_0100 | 0xc000_0101 | 0x9e) || number >> 8 == 8;
        if head >> 32 != 0 || forbidden {
            return Err(n + 1);
        }
        let processor: &mut Processor = &mut state.cpus[cpu];
        let efer = number == 0xc000_0080;
        let fits = processor.msrs.contains_key(&number) && msr_accepts(profile, number, value);
        if !fits || efer && (value ^ processor.msrs[&number]) & 0x100 != 0 {
            return Err(n + 1);
        }
        processor.msrs.insert(number, value);
    }
    Ok(())
}
