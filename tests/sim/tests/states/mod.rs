//! Guest states for `checks.rs`: some that pass every check of a VM entry, and
//! for each check some that fail it. A state is a list of changes to
//! [`Rig::valid_state`].

use sim::Check;
use sim::rig::Rig;

/// A change of one field.
#[derive(Clone, Copy)]
pub(crate) enum To {
    Set(u64),
    Or(u64),
    Clear(u64),
}
use To::{Clear, Or, Set};

pub(crate) type Change = (u32, To);

pub(crate) fn apply(rig: &Rig, changes: &[Change]) {
    for (field, to) in changes {
        let value = match *to {
            Set(value) => value,
            Or(bits) => rig.read(*field) | bits,
            Clear(bits) => rig.read(*field) & !bits,
        };
        rig.write(*field, value).unwrap();
    }
}

const PIN: u32 = 0x4000;
const PRIMARY: u32 = 0x4002;
const SECONDARY: u32 = 0x401e;
const EXIT: u32 = 0x400c;
const ENTRY: u32 = 0x4012;
pub(crate) const INFO: u32 = 0x4016;
const CR0: u32 = 0x6800;
const CR4: u32 = 0x6804;
const RFLAGS: u32 = 0x6820;
const INTERRUPTIBILITY: u32 = 0x4824;
const ACTIVITY: u32 = 0x4826;
const PENDING: u32 = 0x6822;
const VALID: u64 = 1 << 31;

fn rights(index: u32) -> u32 {
    0x4814 + index * 2
}
fn limit(index: u32) -> u32 {
    0x4800 + index * 2
}
fn base(index: u32) -> u32 {
    0x6806 + index * 2
}
fn selector(index: u32) -> u32 {
    0x0800 + index * 2
}
const ES: u32 = 0;
const CS: u32 = 1;
const SS: u32 = 2;
const DS: u32 = 3;
const FS: u32 = 4;
const GS: u32 = 5;
const LDTR: u32 = 6;
const TR: u32 = 7;

/// A 32-bit guest with PAE paging.
fn protected() -> Vec<Change> {
    vec![
        (ENTRY, Clear(1 << 9)),
        (0x2806, Set(0x800)),
        (rights(CS), Set(0xc09b)),
    ]
}

/// A virtual-8086 guest.
fn v86() -> Vec<Change> {
    let mut all = protected();
    all.push((RFLAGS, Or(1 << 17)));
    for index in 0..6 {
        all.push((selector(index), Set(0x100 + u64::from(index))));
        all.push((base(index), Set((0x100 + u64::from(index)) << 4)));
        all.push((limit(index), Set(0xffff)));
        all.push((rights(index), Set(0xf3)));
    }
    all
}

/// A real-mode guest; needs an unrestricted guest.
fn real() -> Vec<Change> {
    let mut all = vec![
        (ENTRY, Clear(1 << 9)),
        (0x2806, Set(0)),
        (CR0, Set(0x30)),
        (RFLAGS, Set(2)),
    ];
    for index in 0..6 {
        all.push((selector(index), Set(0xf000)));
        all.push((base(index), Set(0xf0000)));
        all.push((limit(index), Set(0xffff)));
        all.push((rights(index), Set(if index == CS { 0x9b } else { 0x93 })));
    }
    all
}

fn usable_ldtr() -> Vec<Change> {
    vec![
        (selector(LDTR), Set(0x28)),
        (limit(LDTR), Set(0xff)),
        (rights(LDTR), Set(0x82)),
    ]
}

fn not_unrestricted() -> Vec<Change> {
    vec![(SECONDARY, Clear(1 << 7))]
}

fn inject(kind: u64, vector: u64) -> Vec<Change> {
    vec![(INFO, Set(VALID | kind << 8 | vector))]
}

/// States that pass on a Haswell.
pub(crate) fn good() -> Vec<(&'static str, Vec<Change>)> {
    let real_data_code: Vec<Change> = real()
        .into_iter()
        .chain([(rights(CS), Set(0x93))])
        .collect();
    vec![
        ("64-bit", vec![]),
        ("PAE", protected()),
        ("virtual-8086", v86()),
        ("real", real()),
        ("real, CS with a data type", real_data_code),
        ("LDTR", usable_ldtr()),
        ("without unrestricted guest", not_unrestricted()),
        ("interrupt", inject(0, 0x20)),
        ("NMI", inject(2, 2)),
        ("#UD", inject(3, 6)),
        (
            "#GP",
            vec![
                (INFO, Set(VALID | 1 << 11 | 3 << 8 | 13)),
                (0x4018, Set(0x18)),
            ],
        ),
        (
            "INT n",
            vec![(INFO, Set(VALID | 4 << 8 | 0x80)), (0x401a, Set(2))],
        ),
        (
            "INT3",
            vec![(INFO, Set(VALID | 6 << 8 | 3)), (0x401a, Set(1))],
        ),
        (
            "#GP in real mode",
            real().into_iter().chain(inject(3, 13)).collect(),
        ),
        ("pending MTF", inject(7, 0)),
        ("HLT", vec![(ACTIVITY, Set(1))]),
        ("STI", vec![(INTERRUPTIBILITY, Set(1))]),
        (
            "STI while stepping",
            vec![
                (INTERRUPTIBILITY, Set(1)),
                (RFLAGS, Or(1 << 8)),
                (PENDING, Set(1 << 14)),
            ],
        ),
        (
            "unusable DS",
            vec![(rights(DS), Set(1 << 16)), (limit(DS), Set(0))],
        ),
        (
            "present PDPTE",
            protected()
                .into_iter()
                .chain([(0x280a, Set(0x1001))])
                .collect(),
        ),
        (
            "I/O bitmaps",
            vec![
                (PRIMARY, Or(1 << 25)),
                (0x2000, Set(0x1000)),
                (0x2002, Set(0x2000)),
            ],
        ),
        ("VPID", vec![(SECONDARY, Or(1 << 5)), (0x0000, Set(7))]),
        ("NMI window", vec![(PRIMARY, Or(1 << 22))]),
        ("CR0.CD and NW", vec![(CR0, Or(0x6000_0000))]),
    ]
}

/// States that fail one check on a Haswell, at this stage.
#[allow(clippy::too_many_lines)]
pub(crate) fn bad() -> Vec<(Check, Vec<Change>)> {
    let with = |mut first: Vec<Change>, rest: &[Change]| {
        first.extend_from_slice(rest);
        first
    };
    let far = 1 << 39;
    let hole = 0x8000_0000_0000;
    vec![
        (Check::PinReserved, vec![(PIN, Clear(2))]),
        (Check::PinReserved, vec![(PIN, Or(1 << 7))]),
        (Check::PrimaryReserved, vec![(PRIMARY, Clear(2))]),
        (Check::PrimaryReserved, vec![(PRIMARY, Or(1))]),
        (Check::SecondaryReserved, vec![(SECONDARY, Or(1 << 20))]),
        (Check::Cr3TargetCount, vec![(0x400a, Set(5))]),
        (
            Check::IoBitmapAddress,
            vec![(PRIMARY, Or(1 << 25)), (0x2002, Set(0x800))],
        ),
        (
            Check::IoBitmapAddress,
            vec![(PRIMARY, Or(1 << 25)), (0x2000, Set(far))],
        ),
        (
            Check::MsrBitmapAddress,
            vec![(PRIMARY, Or(1 << 28)), (0x2004, Set(1))],
        ),
        (
            Check::VirtualApicAddress,
            vec![(PRIMARY, Or(1 << 21)), (0x2012, Set(0x10))],
        ),
        (
            Check::TprThreshold,
            vec![(PRIMARY, Or(1 << 21)), (0x401c, Set(0x10))],
        ),
        (Check::TprShadowNeeded, vec![(SECONDARY, Or(1 << 8))]),
        (Check::VirtualNmisNeedExiting, vec![(PIN, Clear(8))]),
        (
            Check::NmiWindowNeedsVirtualNmis,
            vec![(PRIMARY, Or(1 << 22)), (PIN, Clear(1 << 5))],
        ),
        (
            Check::ApicAccess,
            vec![(SECONDARY, Or(1)), (0x2014, Set(0x123))],
        ),
        (
            Check::VirtualInterruptDelivery,
            vec![
                (PRIMARY, Or(1 << 21)),
                (SECONDARY, Or(1 << 9)),
                (PIN, Clear(1)),
            ],
        ),
        (Check::Vpid, vec![(SECONDARY, Or(1 << 5))]),
        (Check::Eptp, vec![(0x201a, Clear(7)), (0x201a, Or(1))]),
        (Check::Eptp, vec![(0x201a, Clear(0x38)), (0x201a, Or(0x20))]),
        (Check::Eptp, vec![(0x201a, Or(0x80))]),
        (Check::Eptp, vec![(0x201a, Or(far))]),
        (
            Check::UnrestrictedGuestNeedsEpt,
            vec![(SECONDARY, Clear(2))],
        ),
        (
            Check::VmFunctions,
            vec![(SECONDARY, Or(1 << 13)), (0x2018, Set(2))],
        ),
        (
            Check::ShadowBitmaps,
            vec![(SECONDARY, Or(1 << 14)), (0x2026, Set(8))],
        ),
        (
            Check::VirtualizationException,
            vec![(SECONDARY, Or(1 << 18)), (0x202a, Set(8))],
        ),
        (Check::ExitReserved, vec![(EXIT, Clear(1))]),
        (Check::ExitReserved, vec![(EXIT, Or(1 << 31))]),
        (Check::PreemptionTimerSave, vec![(EXIT, Or(1 << 22))]),
        (
            Check::ExitMsrStoreArea,
            vec![(0x400e, Set(1)), (0x2006, Set(8))],
        ),
        (
            Check::ExitMsrLoadArea,
            vec![(0x4010, Set(2)), (0x2008, Set(far - 16))],
        ),
        (Check::EntryReserved, vec![(ENTRY, Clear(1))]),
        (Check::EntrySmm, vec![(ENTRY, Or(1 << 10))]),
        (
            Check::EntryMsrLoadArea,
            vec![(0x4014, Set(1)), (0x200a, Set(4))],
        ),
        (Check::InjectType, inject(1, 3)),
        (Check::InjectVector, inject(2, 3)),
        (Check::InjectVector, inject(3, 32)),
        (Check::InjectErrorCodeBit, inject(3, 13)),
        (Check::InjectErrorCodeBit, inject(3, 6 | 1 << 11)),
        (Check::InjectErrorCodeBit, inject(0, 0x20 | 1 << 11)),
        (
            Check::InjectErrorCodeBit,
            with(real(), &inject(3, 13 | 1 << 11)),
        ),
        (Check::InjectReserved, inject(0, 0x20 | 1 << 12)),
        (
            Check::InjectErrorCode,
            with(inject(3, 13 | 1 << 11), &[(0x4018, Set(0x1_0000))]),
        ),
        (
            Check::InjectLength,
            with(inject(4, 0x80), &[(0x401a, Set(16))]),
        ),
        (Check::InjectLength, with(inject(6, 3), &[(0x401a, Set(0))])),
        (Check::HostCr0, vec![(0x6c00, Clear(0x20))]),
        (Check::HostCr0, vec![(0x6c00, Clear(1 << 31))]),
        (Check::HostCr4, vec![(0x6c04, Clear(1 << 13))]),
        (Check::HostCr4, vec![(0x6c04, Or(1 << 12))]),
        (Check::HostCr3, vec![(0x6c02, Or(1 << 63))]),
        (Check::HostSysenter, vec![(0x6c10, Set(hole))]),
        (Check::HostPat, vec![(0x2c00, Set(2))]),
        (
            Check::HostPerfGlobalCtrl,
            vec![(EXIT, Or(1 << 12)), (0x2c04, Set(1 << 4))],
        ),
        (Check::HostEfer, vec![(0x2c02, Clear(1 << 8))]),
        (Check::HostEfer, vec![(0x2c02, Or(2))]),
        (Check::HostSelectorBits, vec![(0x0c06, Set(0x2b))]),
        (Check::HostSelectorBits, vec![(0x0c0c, Or(4))]),
        (Check::HostCsNull, vec![(0x0c02, Set(0))]),
        (Check::HostTrNull, vec![(0x0c0c, Set(0))]),
        (
            Check::HostSsNull,
            vec![(EXIT, Clear(1 << 9)), (0x0c04, Set(0))],
        ),
        (Check::HostBases, vec![(0x6c0e, Set(hole))]),
        (Check::HostAddressSpace, vec![(EXIT, Clear(1 << 9))]),
        (Check::HostModeCr4, vec![(0x6c04, Clear(1 << 5))]),
        (Check::HostRip, vec![(EXIT, Clear(1 << 9))]),
        (Check::GuestCr0, vec![(CR0, Clear(0x20))]),
        (
            Check::GuestCr0,
            with(not_unrestricted(), &[(CR0, Clear(1 << 31))]),
        ),
        (Check::GuestCr0, vec![(CR0, Or(1 << 32))]),
        (Check::GuestPgWithoutPe, with(real(), &[(CR0, Or(1 << 31))])),
        (Check::GuestCr4, vec![(CR4, Clear(1 << 13))]),
        (Check::GuestCr4, vec![(CR4, Or(1 << 22))]),
        (Check::GuestDebugctl, vec![(0x2802, Set(4))]),
        (Check::GuestIa32e, vec![(CR4, Clear(1 << 5))]),
        (Check::GuestPcide, with(protected(), &[(CR4, Or(1 << 17))])),
        (Check::GuestCr3, vec![(0x6802, Or(far))]),
        (Check::GuestDr7, vec![(0x681a, Or(1 << 32))]),
        (Check::GuestSysenter, vec![(0x6826, Set(hole))]),
        (Check::GuestPat, vec![(0x2804, Set(3))]),
        (
            Check::GuestPerfGlobalCtrl,
            vec![
                (EXIT, Or(1 << 12)),
                (ENTRY, Or(1 << 13)),
                (0x2808, Set(1 << 35)),
            ],
        ),
        (Check::GuestEfer, vec![(0x2806, Clear(1 << 10))]),
        (Check::GuestEfer, vec![(0x2806, Clear(1 << 8))]),
        (Check::GuestEfer, vec![(0x2806, Or(1 << 12))]),
        (Check::TrTi, vec![(selector(TR), Or(4))]),
        (
            Check::LdtrTi,
            with(usable_ldtr(), &[(selector(LDTR), Or(4))]),
        ),
        (
            Check::SsRpl,
            with(
                not_unrestricted(),
                &[(selector(SS), Or(3)), (rights(SS), Or(0x60))],
            ),
        ),
        (Check::V86Base, with(v86(), &[(base(ES), Set(0))])),
        (Check::V86Limit, with(v86(), &[(limit(GS), Set(0xfffff))])),
        (Check::V86Rights, with(v86(), &[(rights(CS), Set(0x9b))])),
        (Check::SegmentBaseCanonical, vec![(base(FS), Set(hole))]),
        (Check::SegmentBaseCanonical, vec![(base(TR), Set(hole))]),
        (Check::SegmentBaseHigh, vec![(base(CS), Set(1 << 32))]),
        (Check::SegmentBaseHigh, vec![(base(DS), Set(1 << 32))]),
        (Check::CsType, vec![(rights(CS), Clear(1))]),
        (
            Check::CsType,
            with(not_unrestricted(), &[(rights(CS), Set(0xa093))]),
        ),
        (Check::SsType, vec![(rights(SS), Clear(2))]),
        (Check::DataType, vec![(rights(ES), Clear(1))]),
        (Check::DataType, vec![(rights(DS), Set(0xc099))]),
        (Check::SegmentS, vec![(rights(CS), Clear(0x10))]),
        (Check::SegmentS, vec![(rights(FS), Clear(0x10))]),
        (Check::CsDpl, vec![(rights(CS), Or(0x20))]),
        (Check::CsDpl, vec![(rights(CS), Set(0xa0ff))]),
        (
            Check::SsDpl,
            with(
                not_unrestricted(),
                &[(rights(SS), Or(0x60)), (rights(CS), Or(0x60))],
            ),
        ),
        (
            Check::SsDpl,
            with(real(), &[(rights(SS), Or(0x60)), (rights(CS), Or(0x60))]),
        ),
        (
            Check::DataDpl,
            with(not_unrestricted(), &[(selector(DS), Or(3))]),
        ),
        (Check::SegmentP, vec![(rights(CS), Clear(0x80))]),
        (Check::SegmentP, vec![(rights(GS), Clear(0x80))]),
        (Check::SegmentReserved, vec![(rights(SS), Or(0x100))]),
        (Check::SegmentReserved, vec![(rights(CS), Or(1 << 17))]),
        (Check::CsDb, vec![(rights(CS), Or(1 << 14))]),
        (Check::SegmentG, vec![(limit(DS), Set(0xffff_f000))]),
        (Check::SegmentG, vec![(rights(ES), Clear(1 << 15))]),
        (Check::TrType, vec![(rights(TR), Set(0x89))]),
        (Check::TrType, vec![(rights(TR), Set(0x83))]),
        (Check::TrRights, vec![(rights(TR), Or(1 << 16))]),
        (Check::TrRights, vec![(rights(TR), Clear(0x80))]),
        (Check::TrG, vec![(rights(TR), Or(1 << 15))]),
        (
            Check::LdtrType,
            with(usable_ldtr(), &[(rights(LDTR), Set(0x81))]),
        ),
        (
            Check::LdtrRights,
            with(usable_ldtr(), &[(rights(LDTR), Set(0x02))]),
        ),
        (
            Check::LdtrG,
            with(usable_ldtr(), &[(limit(LDTR), Set(0x10_0000))]),
        ),
        (Check::TableBase, vec![(0x6816, Set(hole))]),
        (Check::TableLimit, vec![(0x4812, Set(0x1_0000))]),
        (Check::GuestRip, vec![(0x681e, Set(hole))]),
        (
            Check::GuestRip,
            with(protected(), &[(0x681e, Set(1 << 32))]),
        ),
        (Check::RflagsReserved, vec![(RFLAGS, Clear(2))]),
        (Check::RflagsReserved, vec![(RFLAGS, Or(1 << 3))]),
        (Check::RflagsReserved, vec![(RFLAGS, Or(1 << 22))]),
        (Check::RflagsVm, vec![(RFLAGS, Or(1 << 17))]),
        (Check::RflagsIf, with(inject(0, 0x20), &[(RFLAGS, Set(2))])),
        (Check::ActivityUnsupported, vec![(ACTIVITY, Set(4))]),
        (
            Check::ActivityHltDpl,
            vec![
                (rights(CS), Or(0x60)),
                (rights(SS), Or(0x60)),
                (ACTIVITY, Set(1)),
            ],
        ),
        (
            Check::ActivityBlocking,
            vec![(ACTIVITY, Set(1)), (INTERRUPTIBILITY, Set(1))],
        ),
        (
            Check::ActivityEvent,
            with(inject(3, 6), &[(ACTIVITY, Set(1))]),
        ),
        (
            Check::ActivityEvent,
            with(inject(0, 0x20), &[(ACTIVITY, Set(2))]),
        ),
        (
            Check::InterruptibilityReserved,
            vec![(INTERRUPTIBILITY, Set(1 << 5))],
        ),
        (Check::StiAndMovSs, vec![(INTERRUPTIBILITY, Set(3))]),
        (
            Check::StiWithoutIf,
            vec![(INTERRUPTIBILITY, Set(1)), (RFLAGS, Set(2))],
        ),
        (
            Check::BlockingInterrupt,
            with(inject(0, 0x20), &[(INTERRUPTIBILITY, Set(2))]),
        ),
        (
            Check::BlockingNmiMovSs,
            with(inject(2, 2), &[(INTERRUPTIBILITY, Set(2))]),
        ),
        (
            Check::BlockingNmiSti,
            with(inject(2, 2), &[(INTERRUPTIBILITY, Set(1))]),
        ),
        (Check::BlockingSmi, vec![(INTERRUPTIBILITY, Set(4))]),
        (
            Check::BlockingVirtualNmi,
            with(inject(2, 2), &[(INTERRUPTIBILITY, Set(8))]),
        ),
        (Check::PendingDebugReserved, vec![(PENDING, Set(1 << 4))]),
        (
            Check::PendingDebugBs,
            vec![(INTERRUPTIBILITY, Set(1)), (RFLAGS, Or(1 << 8))],
        ),
        (
            Check::PendingDebugBs,
            vec![(ACTIVITY, Set(1)), (PENDING, Set(1 << 14))],
        ),
        (Check::LinkPointer, vec![(0x2800, Set(0x10))]),
        (Check::LinkPointer, vec![(0x2800, Set(0))]),
        (Check::Pdptes, with(protected(), &[(0x2810, Set(0x1003))])),
        (Check::MsrLoad, vec![]),
    ]
}

/// Skylake only.
pub(crate) fn bad_on_skylake() -> Vec<(Check, Vec<Change>)> {
    vec![
        (Check::PostedInterrupts, vec![(PIN, Or(1 << 7))]),
        (
            Check::PageModificationLog,
            vec![(SECONDARY, Or(1 << 17)), (0x200e, Set(8))],
        ),
    ]
}
