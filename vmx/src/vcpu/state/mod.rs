//! The guest's registers, one file per group: where each is while the guest
//! runs, where otherwise, and what it may hold. Here are the register blocks in
//! and out: SET_REGS, GET_REGS and the power-up state.

pub(super) mod debug;
pub(super) mod extended;
pub(super) mod modes;
pub(super) mod pdptes;
pub(super) mod pmu;
pub(super) mod registers;
pub(super) mod split_lock;

use abi::vcpu_state::{SegmentDesc, VcpuState};

use super::Inner;
use super::vmcs::Current;
use crate::arch::field::{self, Field, Natural};
use crate::arch::reg::{self, Interruptibility, Rflags};
use crate::arch::segment::AccessRights;
use crate::host::Host;

/// The four fields of a segment register.
#[derive(Clone, Copy)]
pub struct SegmentFields {
    selector: Field<u16>,
    base: Field<Natural>,
    limit: Field<u32>,
    rights: Field<u32>,
}

macro_rules! segments {
    ($($name:ident: $selector:ident $base:ident $limit:ident $rights:ident;)*) => {
        $(
            #[doc = concat!("The fields of ", stringify!($name), ".")]
            pub const $name: SegmentFields = SegmentFields {
                selector: field::$selector,
                base: field::$base,
                limit: field::$limit,
                rights: field::$rights,
            };
        )*
    };
}

segments! {
    ES: GUEST_ES_SELECTOR GUEST_ES_BASE GUEST_ES_LIMIT GUEST_ES_RIGHTS;
    CS: GUEST_CS_SELECTOR GUEST_CS_BASE GUEST_CS_LIMIT GUEST_CS_RIGHTS;
    SS: GUEST_SS_SELECTOR GUEST_SS_BASE GUEST_SS_LIMIT GUEST_SS_RIGHTS;
    DS: GUEST_DS_SELECTOR GUEST_DS_BASE GUEST_DS_LIMIT GUEST_DS_RIGHTS;
    FS: GUEST_FS_SELECTOR GUEST_FS_BASE GUEST_FS_LIMIT GUEST_FS_RIGHTS;
    GS: GUEST_GS_SELECTOR GUEST_GS_BASE GUEST_GS_LIMIT GUEST_GS_RIGHTS;
    LDTR: GUEST_LDTR_SELECTOR GUEST_LDTR_BASE GUEST_LDTR_LIMIT GUEST_LDTR_RIGHTS;
    TR: GUEST_TR_SELECTOR GUEST_TR_BASE GUEST_TR_LIMIT GUEST_TR_RIGHTS;
}

/// Bits of the access rights that may be 1 in the VMCS, SDM 27.3.1.2 "Checks
/// on Guest Segment Registers".
const RIGHTS_DEFINED: u32 = 0x1_f0ff;

impl SegmentFields {
    /// Reads the base alone.
    pub fn base<H: Host>(self, current: &Current<'_, H>) -> u64 {
        current.read(self.base)
    }

    /// Reads the register.
    pub fn read<H: Host>(self, current: &Current<'_, H>) -> SegmentDesc {
        SegmentDesc {
            selector: current.get(self.selector),
            dummy: 0,
            limit: current.get(self.limit),
            base: current.get(self.base),
            ar: current.get(self.rights),
            ipad: 0,
        }
    }

    /// Reads the access rights alone.
    pub fn rights<H: Host>(self, current: &Current<'_, H>) -> u32 {
        current.get(self.rights)
    }

    /// The selector.
    pub fn selector<H: Host>(self, current: &Current<'_, H>) -> u16 {
        current.get(self.selector)
    }

    /// Writes the register as it is given.
    pub fn write_raw<H: Host>(self, current: &Current<'_, H>, value: &SegmentDesc, rights: u32) {
        current.put(self.selector, value.selector);
        current.put(self.base, value.base);
        current.put(self.limit, value.limit);
        current.put(self.rights, rights & RIGHTS_DEFINED);
    }

    /// Writes a register that an instruction has loaded, with all its checks.
    pub fn load<H: Host>(
        self,
        current: &Current<'_, H>,
        selector: u16,
        base: u64,
        limit: u32,
        rights: u32,
    ) {
        self.write_raw(current, &segment(selector, base, limit, rights), rights);
    }

    /// Writes a code or data segment or LDTR. One that is not present is
    /// unusable: clients lose the unusable bit on the way (QEMU keeps no place
    /// for it), and a usable segment is always present. Code or data gets its
    /// accessed bit, as loading it would.
    pub fn write<H: Host>(self, current: &Current<'_, H>, value: &SegmentDesc) {
        let mut rights = AccessRights::from_bits_retain(value.ar);
        if !rights.contains(AccessRights::PRESENT) {
            rights = AccessRights::UNUSABLE;
        } else if rights.contains(AccessRights::NON_SYSTEM) {
            rights |= AccessRights::ACCESSED;
        }
        self.write_raw(current, value, rights.bits());
    }

    /// Writes TR, which is always usable and busy: a 64-bit TSS in IA-32e
    /// mode, and a busy TSS of the kind given otherwise.
    pub fn write_tr<H: Host>(self, current: &Current<'_, H>, value: &SegmentDesc, long: bool) {
        let kind = match value.ar & 0xf {
            1 | 3 if !long => 3,
            _ => 0xb,
        };
        let present = AccessRights::PRESENT.bits();
        let kept = AccessRights::AVL | AccessRights::GRANULARITY;
        let rights = (value.ar & (kept.bits() | 0x60)) | present | kind;
        self.write_raw(current, value, rights);
    }
}

fn segment(selector: u16, base: u64, limit: u32, ar: u32) -> SegmentDesc {
    SegmentDesc {
        selector,
        dummy: 0,
        limit,
        base,
        ar,
        ipad: 0,
    }
}

/// The registers after power-up or reset, as HAXM has them. SDM 10.1.1
/// "Processor State After Reset".
pub fn power_up() -> VcpuState {
    let data = segment(0, 0, 0xffff, 0x93);
    VcpuState {
        rip: 0xfff0,
        rflags: 2,
        cs: segment(0xf000, 0xffff_0000, 0xffff, 0x9b),
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ldt: segment(0, 0, 0xffff, 0x82),
        tr: segment(0, 0, 0xffff, 0x83),
        gdt: segment(0, 0, 0xffff, 0),
        idt: segment(0, 0, 0xffff, 0),
        cr0: 0x6000_0010,
        dr6: reg::DR6_RESET,
        dr7: reg::DR7_RESET,
        ..VcpuState::default()
    }
}

/// SET_REGS: everything but what travels as MSRs and the fields that HAXM
/// ignores (efer, sysenter, activity state, interruptibility, pde).
pub fn set<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>, state: &VcpuState) {
    let before = inner.registers.rip(current);
    let flags = inner.registers.rflags(current);
    // CR0, CR3 and CR4 are all written below: an instruction that waits with one of them
    // starts over.
    inner.unfinished = None;
    for (number, value) in (0u8..).zip(state.regs()) {
        inner.registers.set(number, value);
    }
    inner.registers.set_rip(state.rip);
    inner.registers.set_rflags(state.rflags);
    inner.modes.set_by_client(current, state.cr0, state.cr4);
    inner.cr2 = state.cr2;
    current.put(field::GUEST_CR3, state.cr3);
    ES.write(current, &state.es);
    CS.write(current, &state.cs);
    SS.write(current, &state.ss);
    DS.write(current, &state.ds);
    FS.write(current, &state.fs);
    GS.write(current, &state.gs);
    LDTR.write(current, &state.ldt);
    TR.write_tr(current, &state.tr, inner.modes.is_long_mode());
    current.put(field::GUEST_GDTR_BASE, state.gdt.base);
    current.put(field::GUEST_GDTR_LIMIT, state.gdt.limit & 0xffff);
    current.put(field::GUEST_IDTR_BASE, state.idt.base);
    current.put(field::GUEST_IDTR_LIMIT, state.idt.limit & 0xffff);
    if !inner.debug.is_enabled() {
        inner.debug.set_guest(
            [state.dr0, state.dr1, state.dr2, state.dr3],
            state.dr6,
            state.dr7,
        );
        current.put(field::GUEST_DR7, inner.debug.dr7());
    }
    inner.emulation.forget_registers();
    if state.rip != before {
        // Another instruction: what was under way is not continued.
        inner.abandon(current);
    } else if (flags ^ state.rflags) & (Rflags::IF | Rflags::TF).bits() != 0 {
        // A shadow goes with certain values of both: SDM 27.3.1.5 "Checks on Guest
        // Non-Register State".
        inner.end_blocking(current);
    }
    inner.pdptes_stale = true;
    inner.flush_linear = true;
}

/// GET_REGS, with the fields that HAXM leaves out filled in as well.
pub fn get<H: Host>(inner: &mut Inner<H>, current: &Current<'_, H>) -> VcpuState {
    inner.registers.know_all(current);
    let mut state = VcpuState::default();
    state.set_regs(inner.registers.general.gpr);
    state.rip = inner.registers.known_rip();
    state.rflags = inner.registers.known_rflags();
    state.es = ES.read(current);
    state.cs = CS.read(current);
    state.ss = SS.read(current);
    state.ds = DS.read(current);
    state.fs = FS.read(current);
    state.gs = GS.read(current);
    state.ldt = LDTR.read(current);
    state.tr = TR.read(current);
    let gdt_limit = current.get(field::GUEST_GDTR_LIMIT);
    state.gdt = segment(0, current.get(field::GUEST_GDTR_BASE), gdt_limit, 0);
    let idt_limit = current.get(field::GUEST_IDTR_LIMIT);
    state.idt = segment(0, current.get(field::GUEST_IDTR_BASE), idt_limit, 0);
    state.cr0 = inner.modes.cr0(current);
    state.cr2 = inner.cr2;
    state.cr3 = current.get(field::GUEST_CR3);
    state.cr4 = inner.modes.cr4(current);
    if let Some(waits) = &inner.unfinished {
        // RIP is on the instruction, which has not happened yet.
        match waits.cr {
            0 => state.cr0 = waits.old,
            3 => state.cr3 = waits.old,
            _ => state.cr4 = waits.old,
        }
    }
    let dr = inner.debug.guest_breakpoints();
    [state.dr0, state.dr1, state.dr2, state.dr3] = dr;
    state.dr6 = inner.debug.guest_dr6();
    state.dr7 = inner.debug.guest_dr7();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the defined bits are below 32"
    )]
    {
        state.efer = inner.modes.efer() as u32;
    }
    state.sysenter_cs = current.get(field::GUEST_SYSENTER_CS);
    state.sysenter_esp = current.get(field::GUEST_SYSENTER_ESP);
    state.sysenter_eip = current.get(field::GUEST_SYSENTER_EIP);
    let blocking = current.get(field::GUEST_INTERRUPTIBILITY);
    state.interruptibility_state.raw = blocking & (Interruptibility::all().bits() & 0xf);
    state
}
