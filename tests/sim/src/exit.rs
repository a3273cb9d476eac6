//! VM exit: SDM chapter 28 "VM Exits".

use vmx::arch::msr;

use crate::check::load_msrs;
use crate::guest::{ExitInfo, msr_field};
use crate::state::{Inner, State};
use crate::vmcs::Vmcs;

pub(crate) const ENTRY_INFO: u32 = 0x4016;
/// Written to exit fields that the SDM leaves undefined for an exit.
const UNDEFINED: u64 = 0x7ff7_dead_beef;

/// An event that VM entry injects: information and error code.
pub(crate) type Injected = Option<(u64, u64)>;

/// An exit on its way.
pub(crate) struct Exit {
    pub(crate) exit: ExitInfo,
    /// The event whose delivery was under way.
    pub(crate) vectoring: Injected,
}

impl From<ExitInfo> for Exit {
    fn from(exit: ExitInfo) -> Self {
        Self {
            exit,
            vectoring: None,
        }
    }
}

/// 28.2 "Recording VM-Exit Information", 28.3 "Saving Guest State", 28.5
/// "Loading Host State".
pub(crate) fn finish(inner: &Inner, cpu: usize, pointer: u64, result: &Exit) {
    let mut state = inner.state();
    let exit = &result.exit;
    *state.counts.exits.entry(exit.reason).or_default() += 1;
    let live_efer = state.cpus[cpu]
        .msrs
        .get(&msr::IA32_EFER)
        .copied()
        .unwrap_or(0);
    let live_pat = state.cpus[cpu]
        .msrs
        .get(&msr::IA32_PAT)
        .copied()
        .unwrap_or(0);
    let vmcs = state.vmcss.entry(pointer).or_default();
    record(vmcs, exit, result.vectoring);
    vmcs.update(ENTRY_INFO, |info| info & !(1 << 31));
    let controls = vmcs.get(0x400c);
    if controls >> 20 & 1 != 0 {
        vmcs.set(0x2806, live_efer);
    }
    if controls >> 18 & 1 != 0 {
        vmcs.set(0x2804, live_pat);
    }
    // EFER.LMA goes to the "IA-32e mode guest" control.
    if vmcs.get(0x4002) >> 31 & vmcs.get(0x401e) >> 7 & 1 != 0 {
        vmcs.update(0x4012, |v| v & !(1 << 9) | (live_efer >> 10 & 1) << 9);
    }
    store_msrs(&mut state, cpu, pointer);
    load_host(&mut state, cpu, pointer);
    let vmcs = &state.vmcss[&pointer];
    let (area, count) = (vmcs.get(0x2008), vmcs.get(0x4010));
    if load_msrs(&mut state, &inner.profile, cpu, area, count).is_err() {
        state.finding("VMX abort: the VM-exit MSR-load area");
    }
    state.cpus[cpu].in_guest = None;
}

fn record(vmcs: &mut Vmcs, exit: &ExitInfo, vectoring: Injected) {
    vmcs.set(0x4402, u64::from(exit.reason));
    vmcs.set(0x6400, exit.qualification);
    vmcs.set(0x4404, exit.interruption);
    let has_code = exit.interruption >> 11 & 1 != 0;
    vmcs.set(0x4406, if has_code { exit.error_code } else { UNDEFINED });
    let (info, code) = vectoring.unwrap_or((0, UNDEFINED));
    vmcs.set(0x4408, info);
    let vectoring_code = info >> 11 & 1 != 0;
    vmcs.set(0x440a, if vectoring_code { code } else { UNDEFINED });
    // Delivery of a software event leaves its length.
    let software = info >> 31 & 1 != 0 && matches!(info >> 8 & 7, 4..=6);
    let length = if software {
        Some(vmcs.get(0x401a))
    } else {
        exit.length
    };
    vmcs.set(0x440c, length.unwrap_or(UNDEFINED));
    vmcs.set(0x440e, exit.instruction.unwrap_or(UNDEFINED));
    vmcs.set(0x640a, exit.linear.unwrap_or(UNDEFINED));
    vmcs.set(0x2400, exit.physical.unwrap_or(UNDEFINED & 0xffff_ffff));
}

/// 28.4 "Saving MSRs".
fn store_msrs(state: &mut State, cpu: usize, pointer: u64) {
    let vmcs = &state.vmcss[&pointer];
    let (area, count) = (vmcs.get(0x2006), vmcs.get(0x400e));
    for n in 0..count {
        let at = area + n * 16;
        let number = state.memory.load(at).unwrap_or(u64::MAX);
        let value = u32::try_from(number)
            .ok()
            .and_then(|number| match msr_field(number) {
                Some(field) => Some(state.vmcss[&pointer].get(field)),
                None => state.cpus[cpu].read_msr(state.tsc, number),
            });
        let Some(value) = value else {
            state.finding(format!("VMX abort: the VM-exit MSR-store area, entry {n}"));
            return;
        };
        state.memory.write(at + 8, &value.to_le_bytes());
    }
}

/// 28.5 "Loading Host State".
pub(crate) fn load_host(state: &mut State, cpu: usize, pointer: u64) {
    let vmcs = &state.vmcss[&pointer];
    let get = |encoding| vmcs.get(encoding);
    let processor = &mut state.cpus[cpu];
    let controls = get(0x400c);
    // CD, NW, ET and the reserved bits of CR0 keep their values.
    let kept = 0x6000_0010;
    processor.cr0 = get(0x6c00) & !kept | processor.cr0 & kept;
    processor.cr3 = get(0x6c02);
    processor.cr4 = get(0x6c04);
    processor.dr[7] = 0x400;
    let long = controls >> 9 & 1;
    let efer = processor.msrs.entry(msr::IA32_EFER).or_default();
    if controls >> 21 & 1 != 0 {
        *efer = get(0x2c02);
    } else {
        *efer = *efer & !0x500 | long << 10 | long << 8;
    }
    let mut load = vec![
        (msr::IA32_DEBUGCTL, 0),
        (msr::IA32_SYSENTER_CS, get(0x4c00)),
        (msr::IA32_SYSENTER_ESP, get(0x6c10)),
        (msr::IA32_SYSENTER_EIP, get(0x6c12)),
        (msr::IA32_FS_BASE, get(0x6c06)),
        (msr::IA32_GS_BASE, get(0x6c08)),
    ];
    if controls >> 19 & 1 != 0 {
        load.push((msr::IA32_PAT, get(0x2c00)));
    }
    if controls >> 12 & 1 != 0 {
        load.push((msr::IA32_PERF_GLOBAL_CTRL, get(0x2c04)));
    }
    processor.msrs.extend(load);
    let selector = |encoding| u16::try_from(get(encoding)).unwrap_or(0);
    processor.user_selectors.es = selector(0x0c00);
    processor.kernel_selectors.cs = selector(0x0c02);
    processor.kernel_selectors.ss = selector(0x0c04);
    processor.user_selectors.ds = selector(0x0c06);
    processor.user_selectors.fs = selector(0x0c08);
    processor.user_selectors.gs = selector(0x0c0a);
    processor.kernel_selectors.tr = selector(0x0c0c);
    processor.user_selectors.ldtr = 0;
    processor.tr_base = get(0x6c0a);
    processor.tr_limit = 0x67;
    processor.gdtr.base = get(0x6c0c);
    processor.gdtr.limit = 0xffff;
    processor.idtr.base = get(0x6c0e);
    processor.idtr.limit = 0xffff;
    processor.in_guest = None;
}
