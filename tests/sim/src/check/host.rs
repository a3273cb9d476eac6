//! SDM 27.2.2 to 27.2.4: checks on the host state.

use super::{Check, EFER_BITS, Failed, View, pat_valid};
use crate::instructions::fixed;
use crate::pmu::GLOBAL_BITS;

pub(super) fn check(v: &View<'_>, f: &mut Failed) {
    let p = v.profile;
    // 27.2.2 "Checks on Host Control Registers, MSRs, and SSP"
    f.when(!fixed(p, 0x486, v.get(0x6c00)), Check::HostCr0);
    f.when(!fixed(p, 0x488, v.get(0x6c04)), Check::HostCr4);
    f.when(!p.physical(v.get(0x6c02)), Check::HostCr3);
    f.when(
        !v.canonical(0x6c10) || !v.canonical(0x6c12),
        Check::HostSysenter,
    );
    if v.exit(19) {
        f.when(!pat_valid(v.get(0x2c00)), Check::HostPat);
    }
    if v.exit(12) {
        let enabled = v.get(0x2c04);
        f.when(enabled & !GLOBAL_BITS != 0, Check::HostPerfGlobalCtrl);
    }
    let long = v.exit(9);
    if v.exit(21) {
        let efer = v.get(0x2c02);
        let mode = (efer >> 10 & 1 != 0) == long && (efer >> 8 & 1 != 0) == long;
        f.when(efer & !EFER_BITS != 0 || !mode, Check::HostEfer);
    }
    // 27.2.3 "Checks on Host Segment and Descriptor-Table Registers"
    for selector in (0x0c00..=0x0c0c).step_by(2) {
        f.when(v.get(selector) & 7 != 0, Check::HostSelectorBits);
    }
    f.when(v.get(0x0c02) == 0, Check::HostCsNull);
    f.when(v.get(0x0c0c) == 0, Check::HostTrNull);
    f.when(!long && v.get(0x0c04) == 0, Check::HostSsNull);
    for base in (0x6c06..=0x6c0e).step_by(2) {
        f.when(!v.canonical(base), Check::HostBases);
    }
    address_space(v, f, long);
}

/// 27.2.4 "Checks Related to Address-Space Size".
fn address_space(v: &View<'_>, f: &mut Failed, long: bool) {
    let from_long = v
        .cpu
        .msrs
        .get(&0xc000_0080)
        .is_some_and(|efer| efer >> 10 & 1 != 0);
    let mismatch = if from_long { !long } else { long || v.ia32e() };
    f.when(mismatch, Check::HostAddressSpace);
    let cr4 = v.get(0x6c04);
    let rip = v.get(0x6c16);
    if long {
        f.when(cr4 >> 5 & 1 == 0, Check::HostModeCr4);
        f.when(!v.profile.canonical(rip), Check::HostRip);
    } else {
        f.when(v.ia32e() || cr4 >> 17 & 1 != 0, Check::HostModeCr4);
        f.when(rip >> 32 != 0, Check::HostRip);
    }
}
