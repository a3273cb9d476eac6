//! VM entry and the guest's run, until its exit.
//!
//! SDM chapter 27 "VM Entries".

use vmx::arch::msr;
use vmx::cpu::{GuestRegs, VmxFailure};
use vmx::host::Mitigations;

use crate::check::{Verdict, load_msrs};
use crate::cores::thread_id;
use crate::exit::{ENTRY_INFO, Exit, Injected, finish, load_host};
use crate::guest::{ExitInfo, Guest, Stop};
use crate::instructions::error;
use crate::profile::Profile;
use crate::state::{Inner, Received, State};
use crate::step::{EXCEPTION, InFlight};

/// Where every exit of the simulated world switch returns to.
const RETURN: u64 = 0xffff_ffff_c010_2040;
const HOST_RSP: u32 = 0x6c14;
const HOST_RIP: u32 = 0x6c16;
const RIP: u32 = 0x681e;
const RFLAGS: u32 = 0x6820;
/// Resume flag.
const RF: u64 = 1 << 16;
const INTERRUPTIBILITY: u32 = 0x4824;
/// Entries in which nothing is done before the test is taken to hang.
const IDLE_LIMIT: u64 = 20_000;
/// Runs of one step before the hypervisor is taken to make no progress.
const RERUN_LIMIT: u32 = 20_000;

/// The kernel stack of the calling thread.
fn stack() -> u64 {
    0xffff_c900_0000_0000 + thread_id() * 0x4000 + 0x3e40
}

pub(crate) fn enter(
    inner: &Inner,
    cpu: usize,
    regs: &mut GuestRegs,
    launched: bool,
) -> Result<(), VmxFailure> {
    let entered = {
        let mut state = inner.state();
        let p = &inner.profile;
        if regs.host_rsp != stack() {
            regs.host_rsp = stack();
            let _ = state.vmwrite(p, cpu, HOST_RSP, stack());
        }
        if !launched {
            let _ = state.vmwrite(p, cpu, HOST_RIP, RETURN);
        }
        begin(&mut state, p, cpu, launched)?
    };
    if let Some((vmcs, injected)) = entered {
        if inner.wanted() != Mitigations::Off {
            inner.state().train(cpu, vmcs);
        }
        let exit = run(inner, cpu, vmcs, regs, injected);
        finish(inner, cpu, vmcs, &exit);
        inner.state().leave_ibrs(cpu);
    }
    Ok(())
}

/// Everything up to the first guest instruction. `None`: the entry failed late
/// and has exited already.
fn begin(
    state: &mut State,
    p: &Profile,
    cpu: usize,
    launched: bool,
) -> Result<Option<(u64, Injected)>, VmxFailure> {
    if launched {
        state.counts.vmresume += 1;
    } else {
        state.counts.vmlaunch += 1;
    }
    if state.cpus[cpu].vmxon.is_none() {
        state.finding("host #UD: VM entry outside VMX operation");
        return Err(VmxFailure::Invalid);
    }
    let Some((pointer, vmcs)) = state.current(cpu) else {
        return Err(VmxFailure::Invalid);
    };
    let (foreign, is_launched) = (vmcs.foreign, vmcs.launched);
    if foreign {
        state.finding("VM entry with another hypervisor's VMCS");
    }
    if !launched && is_launched {
        return Err(state.vm_fail(cpu, error::LAUNCH_NOT_CLEAR));
    }
    if launched && !is_launched {
        return Err(state.vm_fail(cpu, error::RESUME_NOT_LAUNCHED));
    }
    match state.check_entry(p, cpu) {
        Verdict::Good => {}
        Verdict::Error(number) => return Err(state.vm_fail(cpu, number)),
        Verdict::Exit(reason, qualification) => {
            late_failure(state, cpu, pointer, reason, qualification);
            return Ok(None);
        }
    }
    check_way_back(state, pointer);
    let processor = &state.cpus[cpu];
    let on = |register| processor.msrs.get(&register).copied().unwrap_or(0);
    if on(msr::IA32_PEBS_ENABLE) != 0 {
        state.finding("the host's PEBS records go to the guest's addresses");
    }
    load_guest(state, cpu, pointer);
    if std::mem::take(&mut state.check_at_entry) {
        // 27.9 "Machine-Check Events During VM Entry".
        late_failure(state, cpu, pointer, 41, 0);
        return Ok(None);
    }
    let vmcs = &state.vmcss[&pointer];
    let (area, count) = (vmcs.get(0x200a), vmcs.get(0x4014));
    if let Err(entry) = load_msrs(state, p, cpu, area, count) {
        state.failures.push(crate::check::EntryFailure {
            stage: crate::check::Stage::MsrLoading,
            checks: vec![crate::check::Check::MsrLoad],
            vmcs: pointer,
        });
        late_failure(state, cpu, pointer, 34, entry);
        return Ok(None);
    }
    let vmcs = state.vmcss.entry(pointer).or_default();
    vmcs.launched = true;
    let info = vmcs.get(ENTRY_INFO);
    let injected = (info >> 31 & 1 != 0).then(|| (info, vmcs.get(0x4018)));
    let eptp = if vmcs.get(0x4002) >> 31 & vmcs.get(0x401e) >> 1 & 1 != 0 {
        vmcs.get(0x201a)
    } else {
        0
    };
    // Secondary control 5, "enable VPID".
    let uses_vpid = vmcs.get(0x4002) >> 31 & vmcs.get(0x401e) >> 5 & 1 != 0;
    let vpid = if uses_vpid {
        u16::try_from(vmcs.get(0)).unwrap_or(0)
    } else {
        0
    };
    state.cpus[cpu].in_guest = Some(eptp);
    state.note_combined(cpu, vpid, eptp);
    if eptp != 0 && !state.eptps.contains(&eptp) {
        state.eptps.push(eptp);
    }
    Ok(Some((pointer, injected)))
}

/// The exit must return into this call: HOST_RSP and HOST_RIP are this thread's.
fn check_way_back(state: &mut State, pointer: u64) {
    let vmcs = &state.vmcss[&pointer];
    let (rsp, rip) = (vmcs.get(HOST_RSP), vmcs.get(HOST_RIP));
    if rsp != stack() {
        state.finding(format!("the exit would return to the stack at {rsp:#x}"));
    }
    if rip != RETURN {
        state.finding(format!("the exit would return to {rip:#x}"));
    }
}

/// 27.8 "VM-Entry Failures During or After Loading Guest State": the exit
/// reason and qualification are written, the host state loaded; nothing else.
fn late_failure(state: &mut State, cpu: usize, pointer: u64, reason: u64, qualification: u64) {
    let vmcs = state.vmcss.entry(pointer).or_default();
    vmcs.set(0x4402, reason | 1 << 31);
    vmcs.set(0x6400, qualification);
    *state.counts.exits.entry(reason as u16).or_default() += 1;
    load_host(state, cpu, pointer);
}

/// 27.3.2 "Loading Guest State", the part that lives in the processor.
fn load_guest(state: &mut State, cpu: usize, pointer: u64) {
    let vmcs = &state.vmcss[&pointer];
    let processor = &mut state.cpus[cpu];
    let entry = vmcs.get(0x4012);
    let efer = processor.msrs.entry(msr::IA32_EFER).or_default();
    if entry >> 15 & 1 != 0 {
        *efer = vmcs.get(0x2806);
    } else {
        let long = entry >> 9 & 1 != 0;
        *efer = *efer & !0x400 | u64::from(long) << 10;
        if vmcs.get(0x6800) >> 31 & 1 != 0 {
            *efer = *efer & !0x100 | u64::from(long) << 8;
        }
    }
    if entry >> 14 & 1 != 0 {
        processor.msrs.insert(msr::IA32_PAT, vmcs.get(0x2804));
    }
    if entry >> 13 & 1 != 0 {
        let enabled = vmcs.get(0x2808);
        processor.msrs.insert(msr::IA32_PERF_GLOBAL_CTRL, enabled);
    }
}

/// Delivers an event: what it does to the guest besides its handler.
fn deliver(
    state: &mut State,
    cpu: usize,
    pointer: u64,
    info: u64,
    error_code: u64,
    injected: bool,
) {
    let cr2 = state.cpus[cpu].cr2;
    let kind = u8::try_from(info >> 8 & 7).unwrap_or(0);
    let vmcs = state.vmcss.entry(pointer).or_default();
    // 27.6.1.1: an entry pushes RFLAGS as the field has them. A fault of the guest's own sets RF.
    let fault = kind == 3 && !matches!(info & 0xff, 1 | 8 | 18);
    let resume_flag = if injected {
        vmcs.get(RFLAGS) & RF != 0
    } else {
        fault
    };
    vmcs.update(RFLAGS, |flags| flags & !RF);
    state.received.push(Received {
        vector: u8::try_from(info & 0xff).unwrap_or(0),
        kind,
        error_code: (info >> 11 & 1 != 0).then(|| u32::try_from(error_code).unwrap_or(0)),
        injected,
        cr2,
        resume_flag,
    });
    let vmcs = state.vmcss.entry(pointer).or_default();
    vmcs.set(0x4826, 0);
    // Injection unblocks STI and MOV SS; an NMI blocks further NMIs.
    vmcs.update(INTERRUPTIBILITY, |v| v & !3 | if kind == 2 { 8 } else { 0 });
    if injected && matches!(kind, 4..=6) {
        let length = vmcs.get(0x401a);
        vmcs.update(RIP, |rip| rip.wrapping_add(length));
    }
}

/// Runs the guest until it exits.
fn run(inner: &Inner, cpu: usize, vmcs: u64, regs: &mut GuestRegs, injected: Injected) -> Exit {
    let mut parked = inner.scripts().parked(vmcs);
    if let Some((info, error_code)) = injected {
        if let Some(exit) = deliver_injected(inner, cpu, vmcs, regs, info, error_code) {
            if let Some(step) = parked {
                inner.scripts().park(vmcs, step);
            }
            return exit;
        }
        // A hardware exception ends the instruction it hit; a #DB may come from
        // elsewhere, unless the instruction was there to raise it.
        let raised = parked
            .as_ref()
            .is_some_and(|flight| flight.step.name == EXCEPTION);
        if info >> 8 & 7 == 3 && (info & 0xff != 1 || raised) {
            if let Some(flight) = parked.take() {
                skip(inner, vmcs, flight.rip, flight.step.length);
            }
        }
    }
    if let Some(flight) = parked {
        if flight.rip == field(inner, vmcs, RIP) {
            assert!(
                flight.runs < RERUN_LIMIT,
                "no progress: step {:?} exits for ever",
                flight.step.name
            );
            let mut scripts = inner.scripts();
            scripts.put_back(flight.step);
            drop(scripts);
            return steps(inner, cpu, vmcs, regs, flight.runs + 1);
        }
    }
    steps(inner, cpu, vmcs, regs, 0)
}

fn field(inner: &Inner, vmcs: u64, encoding: u32) -> u64 {
    inner.state().vmcss[&vmcs].get(encoding)
}

/// The guest's handler goes on behind the instruction at `rip`.
fn skip(inner: &Inner, vmcs: u64, rip: u64, length: u64) {
    if let Some(vmcs) = inner.state().vmcss.get_mut(&vmcs) {
        if vmcs.get(RIP) == rip {
            vmcs.set(RIP, rip.wrapping_add(length));
        }
    }
}

fn deliver_injected(
    inner: &Inner,
    cpu: usize,
    vmcs: u64,
    regs: &mut GuestRegs,
    info: u64,
    error_code: u64,
) -> Option<Exit> {
    if inner.scripts().next_is_delivery() {
        let mut step = inner.scripts().next()?;
        let mut guest = Guest {
            inner,
            cpu,
            vmcs,
            length: 0,
            regs,
        };
        if let Err(Stop::Exit(exit)) = (step.run)(&mut guest) {
            // The access runs again when the event is delivered again.
            inner.scripts().put_back(step);
            return Some(Exit {
                exit,
                vectoring: Some((info & !(1 << 12), error_code)),
            });
        }
    }
    deliver(&mut inner.state(), cpu, vmcs, info, error_code, true);
    None
}

/// What exits at an instruction boundary, in order of priority (SDM 7.9
/// "Prioritization of Concurrent Events", 26.2 "Other Causes of VM Exits").
fn boundary(inner: &Inner, cpu: usize, vmcs: u64) -> Option<ExitInfo> {
    let get = |encoding| field(inner, vmcs, encoding);
    let blocking = get(INTERRUPTIBILITY);
    if inner.cores.take_nmi(cpu) {
        if get(0x4000) >> 3 & 1 == 0 {
            inner.finding("a host NMI goes to the guest");
        }
        return Some(ExitInfo {
            interruption: 1 << 31 | 2 << 8 | 2,
            ..ExitInfo::default()
        });
    }
    if get(0x4002) >> 22 & 1 != 0 && blocking & 0xb == 0 {
        return Some(ExitInfo {
            reason: 8,
            ..ExitInfo::default()
        });
    }
    // Before external interrupts: a hypervisor that never lets the guest go on
    // would never let the host have the processor either.
    let open = get(0x6820) >> 9 & 1 != 0 && blocking & 3 == 0;
    if get(0x4002) >> 2 & 1 != 0 && open {
        stands_still(&mut inner.state());
        return Some(ExitInfo {
            reason: 7,
            ..ExitInfo::default()
        });
    }
    if inner.cores.interrupt_waits(cpu) {
        if get(0x4000) & 1 == 0 {
            inner.finding("a host interrupt goes to the guest");
        }
        let mut exit = ExitInfo {
            reason: 1,
            ..ExitInfo::default()
        };
        if get(0x400c) >> 15 & 1 != 0 {
            // Acknowledged: whoever handles the exit must call the handler.
            inner.cores.acknowledge(cpu);
            exit.interruption = 1 << 31 | 0xef;
            inner.finding("an interrupt is acknowledged at exit: the host never sees it");
        }
        return Some(exit);
    }
    None
}

fn steps(inner: &Inner, cpu: usize, vmcs: u64, regs: &mut GuestRegs, mut runs: u32) -> Exit {
    let mut timer = preemption_timer(inner, vmcs);
    loop {
        if let Some(exit) = boundary(inner, cpu, vmcs) {
            return exit.into();
        }
        if timer == Some(0) {
            return ExitInfo {
                reason: 52,
                ..ExitInfo::default()
            }
            .into();
        }
        timer = timer.map(|left| left - 1);
        let halted = field(inner, vmcs, 0x4826) != 0;
        let next = if halted { None } else { inner.scripts().next() };
        let Some(mut step) = next else {
            idle(inner, cpu);
            continue;
        };
        if step.on_delivery {
            inner.scripts().put_back(step);
            idle(inner, cpu);
            continue;
        }
        inner.state().idle = 0;
        let rip = field(inner, vmcs, RIP);
        let length = step.length;
        let mut guest = Guest {
            inner,
            cpu,
            vmcs,
            length,
            regs,
        };
        let result = (step.run)(&mut guest);
        let stopped = match result {
            Ok(()) => None,
            Err(Stop::Exit(exit)) => Some(exit),
            Err(Stop::Fault {
                vector,
                error_code,
                cr2,
            }) => guest_fault(inner, cpu, vmcs, vector, error_code, cr2),
        };
        if let Some(exit) = stopped {
            inner.scripts().park(vmcs, InFlight { step, rip, runs });
            return exit.into();
        }
        runs = 0;
        if length > 0 {
            skip(inner, vmcs, rip, length);
            end_shadow(inner, vmcs, step.name);
            count(inner, cpu);
        }
        if length > 0 && field(inner, vmcs, 0x4002) >> 27 & 1 != 0 {
            return ExitInfo {
                reason: 37,
                ..ExitInfo::default()
            }
            .into();
        }
    }
}

/// An instruction of the guest has retired.
fn count(inner: &Inner, cpu: usize) {
    let mut state = inner.state();
    let counted = state.cpus[cpu].count_event(true);
    if let Some(text) = counted.finding {
        state.finding(text);
    }
    drop(state);
    if counted.interrupt {
        inner.cores.raise_nmi(cpu);
    }
}

/// Blocking by STI and MOV SS ends with the next instruction.
fn end_shadow(inner: &Inner, vmcs: u64, name: &str) {
    if name != "STI" {
        if let Some(vmcs) = inner.state().vmcss.get_mut(&vmcs) {
            vmcs.update(INTERRUPTIBILITY, |v| v & !3);
        }
    }
}

fn preemption_timer(inner: &Inner, vmcs: u64) -> Option<u64> {
    let on = field(inner, vmcs, 0x4000) >> 6 & 1 != 0;
    on.then(|| field(inner, vmcs, 0x482e))
}

/// A guest with nothing to do spins until the host's timer interrupts it.
fn idle(inner: &Inner, cpu: usize) {
    stands_still(&mut inner.state());
    inner.cores.raise(cpu);
}

/// An entry in which the guest does nothing, after the last in which it did.
fn stands_still(state: &mut State) {
    state.idle += 1;
    assert!(
        state.idle < IDLE_LIMIT,
        "the guest does nothing and is entered for ever"
    );
}

/// An exception of the guest's own: an exit if the exception bitmap says so
/// (SDM 26.2), else it is delivered.
fn guest_fault(
    inner: &Inner,
    cpu: usize,
    pointer: u64,
    vector: u8,
    error_code: Option<u32>,
    cr2: u64,
) -> Option<ExitInfo> {
    let mut state = inner.state();
    let vmcs = state.vmcss.entry(pointer).or_default();
    let mut wanted = vmcs.get(0x4004) >> vector & 1 != 0;
    let code = u64::from(error_code.unwrap_or(0));
    if vector == 14 {
        let matches = code & vmcs.get(0x4006) == vmcs.get(0x4008);
        wanted = wanted == matches;
    }
    let kind = if matches!(vector, 3 | 4) { 6 } else { 3 };
    let info = 1 << 31 | u64::from(error_code.is_some()) << 11 | kind << 8 | u64::from(vector);
    if wanted {
        return Some(ExitInfo {
            interruption: info,
            error_code: code,
            qualification: if matches!(vector, 1 | 14) { cr2 } else { 0 },
            length: matches!(kind, 6).then_some(1),
            ..ExitInfo::default()
        });
    }
    match vector {
        1 => state.cpus[cpu].dr[6] |= cr2 & 0xe00f,
        14 => state.cpus[cpu].cr2 = cr2,
        _ => {}
    }
    deliver(&mut state, cpu, pointer, info, code, false);
    None
}
