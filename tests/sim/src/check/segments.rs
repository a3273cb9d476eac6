//! SDM 27.3.1.2 "Checks on Guest Segment Registers".

use super::{Check, Failed, View};

/// One segment register of the guest.
struct Segment {
    selector: u64,
    base: u64,
    limit: u64,
    rights: u64,
}

/// Index of a register in the VMCS: ES, CS, SS, DS, FS, GS, LDTR, TR.
const CS: u32 = 1;
const SS: u32 = 2;
const LDTR: u32 = 6;
const TR: u32 = 7;

impl Segment {
    fn of(v: &View<'_>, index: u32) -> Self {
        Self {
            selector: v.get(0x0800 + index * 2),
            base: v.get(0x6806 + index * 2),
            limit: v.get(0x4800 + index * 2),
            rights: v.get(0x4814 + index * 2),
        }
    }

    fn usable(&self) -> bool {
        self.rights >> 16 & 1 == 0
    }

    fn kind(&self) -> u64 {
        self.rights & 0xf
    }

    fn dpl(&self) -> u64 {
        self.rights >> 5 & 3
    }

    fn rpl(&self) -> u64 {
        self.selector & 3
    }

    /// Bits 11:8 and 31:17.
    fn reserved(&self) -> bool {
        self.rights & 0xfffe_0f00 != 0
    }

    fn s(&self) -> bool {
        self.rights >> 4 & 1 != 0
    }

    fn p(&self) -> bool {
        self.rights >> 7 & 1 != 0
    }

    /// G must be 0 if bits 11:0 of the limit are not all 1, and 1 if any of
    /// bits 31:20 is.
    fn g_wrong(&self) -> bool {
        let g = self.rights >> 15 & 1 != 0;
        self.limit & 0xfff != 0xfff && g || self.limit >> 20 != 0 && !g
    }
}

pub(super) fn check(v: &View<'_>, f: &mut Failed) {
    let v86 = v.get(0x6820) >> 17 & 1 != 0;
    let (cs, ss) = (Segment::of(v, CS), Segment::of(v, SS));
    let (tr, ldtr) = (Segment::of(v, TR), Segment::of(v, LDTR));
    f.when(tr.selector & 4 != 0, Check::TrTi);
    f.when(ldtr.usable() && ldtr.selector & 4 != 0, Check::LdtrTi);
    let unrestricted = v.secondary(7);
    f.when(!v86 && !unrestricted && ss.rpl() != cs.rpl(), Check::SsRpl);
    bases(v, f);
    if v86 {
        for index in 0..6 {
            let s = Segment::of(v, index);
            f.when(s.base != s.selector << 4, Check::V86Base);
            f.when(s.limit != 0xffff, Check::V86Limit);
            f.when(s.rights != 0xf3, Check::V86Rights);
        }
    } else {
        code(v, f, &cs, &ss);
        stack(v, f, &cs, &ss);
        data(v, f);
    }
    system(v, f, &tr, &ldtr);
}

fn bases(v: &View<'_>, f: &mut Failed) {
    for (index, when) in [
        (4, true),
        (5, true),
        (TR, true),
        (LDTR, Segment::of(v, LDTR).usable()),
    ] {
        let base = Segment::of(v, index).base;
        f.when(
            when && !v.profile.canonical(base),
            Check::SegmentBaseCanonical,
        );
    }
    for index in [0, CS, SS, 3] {
        let s = Segment::of(v, index);
        let counts = index == CS || s.usable();
        f.when(counts && s.base >> 32 != 0, Check::SegmentBaseHigh);
    }
}

fn code(v: &View<'_>, f: &mut Failed, cs: &Segment, ss: &Segment) {
    let data_allowed = v.secondary(7) && cs.kind() == 3;
    f.when(
        !matches!(cs.kind(), 9 | 11 | 13 | 15) && !data_allowed,
        Check::CsType,
    );
    let dpl_bad = match cs.kind() {
        3 => cs.dpl() != 0,
        9 | 11 => cs.dpl() != ss.dpl(),
        13 | 15 => cs.dpl() > ss.dpl(),
        _ => false,
    };
    f.when(dpl_bad, Check::CsDpl);
    f.when(!cs.s(), Check::SegmentS);
    f.when(!cs.p(), Check::SegmentP);
    f.when(cs.reserved(), Check::SegmentReserved);
    let both = cs.rights >> 13 & 1 != 0 && cs.rights >> 14 & 1 != 0;
    f.when(v.ia32e() && both, Check::CsDb);
    f.when(cs.g_wrong(), Check::SegmentG);
}

fn stack(v: &View<'_>, f: &mut Failed, cs: &Segment, ss: &Segment) {
    // These two hold for an unusable SS as well.
    f.when(!v.secondary(7) && ss.dpl() != ss.rpl(), Check::SsDpl);
    let real = v.get(0x6800) & 1 == 0;
    f.when((cs.kind() == 3 || real) && ss.dpl() != 0, Check::SsDpl);
    if !ss.usable() {
        return;
    }
    f.when(!matches!(ss.kind(), 3 | 7), Check::SsType);
    common(f, ss);
}

fn data(v: &View<'_>, f: &mut Failed) {
    for index in [0, 3, 4, 5] {
        let s = Segment::of(v, index);
        if !s.usable() {
            continue;
        }
        let code = s.kind() & 8 != 0;
        f.when(
            s.kind() & 1 == 0 || code && s.kind() & 2 == 0,
            Check::DataType,
        );
        let conforming = s.kind() >= 12;
        f.when(
            !v.secondary(7) && !conforming && s.dpl() < s.rpl(),
            Check::DataDpl,
        );
        common(f, &s);
    }
}

fn common(f: &mut Failed, s: &Segment) {
    f.when(!s.s(), Check::SegmentS);
    f.when(!s.p(), Check::SegmentP);
    f.when(s.reserved(), Check::SegmentReserved);
    f.when(s.g_wrong(), Check::SegmentG);
}

fn system(v: &View<'_>, f: &mut Failed, tr: &Segment, ldtr: &Segment) {
    let tr_type = tr.kind() == 11 || tr.kind() == 3 && !v.ia32e();
    f.when(!tr_type, Check::TrType);
    f.when(
        tr.s() || !tr.p() || tr.reserved() || !tr.usable(),
        Check::TrRights,
    );
    f.when(tr.g_wrong(), Check::TrG);
    if ldtr.usable() {
        f.when(ldtr.kind() != 2, Check::LdtrType);
        f.when(ldtr.s() || !ldtr.p() || ldtr.reserved(), Check::LdtrRights);
        f.when(ldtr.g_wrong(), Check::LdtrG);
    }
}
