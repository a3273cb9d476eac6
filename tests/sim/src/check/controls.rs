//! SDM 27.2.1 "Checks on VMX Controls".

use super::{Check, Failed, View};
use crate::instructions::eptp_valid;

pub(super) fn check(v: &View<'_>, f: &mut Failed) {
    execution(v, f);
    optional_features(v, f);
    exit(v, f);
    entry(v, f);
}

/// 27.2.1.1 "VM-Execution Control Fields".
fn execution(v: &View<'_>, f: &mut Failed) {
    let p = v.profile;
    f.when(
        v.reserved(0x4000, p.control_caps(0x481)),
        Check::PinReserved,
    );
    f.when(
        v.reserved(0x4002, p.control_caps(0x482)),
        Check::PrimaryReserved,
    );
    if v.primary(31) {
        f.when(v.reserved(0x401e, p.msr(0x48b)), Check::SecondaryReserved);
    }
    f.when(
        v.get(0x400a) > p.msr(0x485) >> 16 & 0x1ff,
        Check::Cr3TargetCount,
    );
    if v.primary(25) {
        f.when(!v.page(0x2000) || !v.page(0x2002), Check::IoBitmapAddress);
    }
    if v.primary(28) {
        f.when(!v.page(0x2004), Check::MsrBitmapAddress);
    }
    if v.primary(21) {
        tpr_shadow(v, f);
    } else {
        let needy = v.secondary(4) || v.secondary(8) || v.secondary(9);
        f.when(needy, Check::TprShadowNeeded);
    }
    f.when(!v.pin(3) && v.pin(5), Check::VirtualNmisNeedExiting);
    f.when(!v.pin(5) && v.primary(22), Check::NmiWindowNeedsVirtualNmis);
    if v.secondary(5) {
        f.when(v.get(0x0000) == 0, Check::Vpid);
    }
    if v.secondary(1) {
        f.when(!eptp_valid(p, v.get(0x201a)), Check::Eptp);
    }
    f.when(
        v.secondary(7) && !v.secondary(1),
        Check::UnrestrictedGuestNeedsEpt,
    );
}

fn tpr_shadow(v: &View<'_>, f: &mut Failed) {
    f.when(!v.page(0x2012), Check::VirtualApicAddress);
    if v.secondary(9) {
        return;
    }
    let threshold = v.get(0x401c);
    let mut vtpr = [0];
    let known = v.page(0x2012) && v.memory.read(v.get(0x2012) + 0x80, &mut vtpr);
    let above = known && !v.secondary(0) && threshold & 0xf > u64::from(vtpr[0] >> 4);
    f.when(threshold >> 4 != 0 || above, Check::TprThreshold);
}

fn optional_features(v: &View<'_>, f: &mut Failed) {
    if v.secondary(0) {
        f.when(!v.page(0x2014) || v.secondary(4), Check::ApicAccess);
    }
    f.when(v.secondary(9) && !v.pin(0), Check::VirtualInterruptDelivery);
    if v.pin(7) {
        let descriptor = v.get(0x2016);
        let bad = !v.secondary(9)
            || !v.exit(15)
            || v.get(0x0002) > 0xff
            || descriptor & 0x3f != 0
            || !v.profile.physical(descriptor);
        f.when(bad, Check::PostedInterrupts);
    }
    if v.secondary(17) {
        f.when(
            !v.secondary(1) || !v.page(0x200e),
            Check::PageModificationLog,
        );
    }
    if v.secondary(13) {
        let functions = v.get(0x2018);
        let list = functions & 1 != 0 && (!v.secondary(1) || !v.page(0x2024));
        let unknown = functions & !v.profile.msr(0x491) != 0;
        f.when(unknown || list, Check::VmFunctions);
    }
    if v.secondary(14) {
        f.when(!v.page(0x2026) || !v.page(0x2028), Check::ShadowBitmaps);
    }
    if v.secondary(18) {
        f.when(!v.page(0x202a), Check::VirtualizationException);
    }
}

/// An MSR area: 16-byte aligned, its last byte within the physical width.
fn msr_area(v: &View<'_>, address: u32, count: u32) -> bool {
    let (address, count) = (v.get(address), v.get(count));
    let last = address.wrapping_add(count * 16).wrapping_sub(1);
    count == 0 || address & 0xf == 0 && v.profile.physical(address) && v.profile.physical(last)
}

/// 27.2.1.2 "VM-Exit Control Fields".
fn exit(v: &View<'_>, f: &mut Failed) {
    f.when(
        v.reserved(0x400c, v.profile.control_caps(0x483)),
        Check::ExitReserved,
    );
    f.when(!v.pin(6) && v.exit(22), Check::PreemptionTimerSave);
    f.when(!msr_area(v, 0x2006, 0x400e), Check::ExitMsrStoreArea);
    f.when(!msr_area(v, 0x2008, 0x4010), Check::ExitMsrLoadArea);
}

/// Whether an exception pushes an error code, SDM 6.15 "Exception and Interrupt
/// Reference".
pub(crate) fn has_error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

/// 27.2.1.3 "VM-Entry Control Fields".
fn entry(v: &View<'_>, f: &mut Failed) {
    f.when(
        v.reserved(0x4012, v.profile.control_caps(0x484)),
        Check::EntryReserved,
    );
    f.when(v.entry(10) || v.entry(11), Check::EntrySmm);
    f.when(!msr_area(v, 0x200a, 0x4014), Check::EntryMsrLoadArea);
    let Some((kind, vector)) = v.event() else {
        return;
    };
    let info = v.get(0x4016);
    let mtf = v.profile.allows_primary(27);
    f.when(kind == 1 || kind == 7 && !mtf, Check::InjectType);
    let wrong_vector = match kind {
        2 => vector != 2,
        3 => vector > 31,
        7 => vector != 0,
        _ => false,
    };
    f.when(wrong_vector, Check::InjectVector);
    // The guest's CR0.PE decides, SDM 27.2.1.3.
    let wants_code = kind == 3 && has_error_code(vector) && v.get(0x6800) & 1 != 0;
    let has_code = info >> 11 & 1 != 0;
    f.when(has_code != wants_code, Check::InjectErrorCodeBit);
    f.when(info >> 12 & 0x7_ffff != 0, Check::InjectReserved);
    if has_code {
        f.when(v.get(0x4018) >> 16 != 0, Check::InjectErrorCode);
    }
    if matches!(kind, 4..=6) {
        let length = v.get(0x401a);
        let zero_allowed = v.profile.msr(0x485) >> 30 & 1 != 0;
        f.when(
            length > 15 || length == 0 && !zero_allowed,
            Check::InjectLength,
        );
    }
}
