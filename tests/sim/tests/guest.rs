//! The simulated guest: exit conditions, exit information, EPT and its cache.

// UNSAFETY: executes the simulated processor's INVEPT.
#![expect(unsafe_code)]

use sim::rig::Rig;
use sim::{Access, Profile, Step, StringIo};
use vmx::arch::ept::InveptKind;
use vmx::cpu::Cpu;

const REASON: u32 = 0x4402;
const QUALIFICATION: u32 = 0x6400;
const LENGTH: u32 = 0x440c;
const PRIMARY: u32 = 0x4002;
const SECONDARY: u32 = 0x401e;
const RIP: u32 = 0x681e;

fn rig() -> Rig {
    Rig::new(Profile::haswell())
}

fn set(rig: &Rig, field: u32, bits: u64) {
    rig.write(field, rig.read(field) | bits).unwrap();
}

fn exit_of(rig: &mut Rig, step: Step) -> (u64, u64, u64) {
    rig.machine.script([step]);
    let reason = rig.enter().unwrap();
    (reason, rig.read(QUALIFICATION), rig.read(LENGTH))
}

fn skip(rig: &Rig) {
    let next = rig.read(RIP) + rig.read(LENGTH);
    rig.write(RIP, next).unwrap();
}

fn found(rig: &Rig, text: &str) {
    let findings = rig.machine.take_findings();
    assert!(
        findings.iter().any(|f| f.contains(text)),
        "{text:?} is not in {findings:?}"
    );
}

#[test]
fn a_step_is_done_when_rip_moves_and_runs_again_when_not() {
    let mut rig = rig();
    rig.machine
        .script([Step::cpuid(7, 1), Step::set_gpr(3, 9), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(10));
    assert_eq!((rig.regs.gpr[0], rig.regs.gpr[1]), (7, 1));
    // RIP as it was: CPUID again.
    assert_eq!(rig.enter(), Ok(10));
    skip(&rig);
    assert_eq!(rig.enter(), Ok(12));
    assert_eq!(rig.regs.gpr[3], 9);
    assert_eq!(rig.read(RIP), 0x10_0002);
}

#[test]
fn a_fault_injected_into_a_step_ends_it() {
    let mut rig = rig();
    rig.machine.script([Step::rdmsr(0x1234), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(31));
    rig.write(0x4016, 1 << 31 | 1 << 11 | 3 << 8 | 13).unwrap();
    rig.write(0x4018, 0).unwrap();
    assert_eq!(rig.enter(), Ok(12));
    assert_eq!(rig.read(0x4016) >> 31, 0, "the valid bit is cleared");
    let received = rig.machine.take_received();
    assert_eq!(received.len(), 1);
    assert_eq!((received[0].vector, received[0].error_code), (13, Some(0)));
}

#[test]
fn msr_bitmaps_decide() {
    let mut rig = rig();
    let bitmap = rig.spare(0);
    set(&rig, PRIMARY, 1 << 28);
    rig.write(0x2004, bitmap).unwrap();
    // An empty bitmap: IA32_LSTAR passes in both directions.
    rig.machine.script([
        Step::wrmsr(0xc000_0102, 0x1234_5000),
        Step::rdmsr(0xc000_0102),
        Step::expect_gpr(0, 0x1234_5000),
        Step::hlt(),
    ]);
    assert_eq!(rig.enter(), Ok(12));
    skip(&rig);
    // The rig does not switch it: put the host's back.
    rig.machine
        .set_msr(rig.host_cpu(), 0xc000_0102, 0x7f12_0000_1000);
    // Each quarter of the bitmap, first and last register.
    for (msr, write, quarter) in [
        (0u32, false, 0u64),
        (0x1fff, false, 0),
        (0xc000_0000, false, 1),
        (0xc000_1fff, false, 1),
        (0, true, 2),
        (0x1fff, true, 2),
        (0xc000_0000, true, 3),
        (0xc000_1fff, true, 3),
    ] {
        let byte = quarter * 1024 + u64::from(msr & 0x1fff) / 8;
        let at = bitmap + (byte & !7);
        rig.poke(at, 1 << ((byte & 7) * 8 + u64::from(msr & 7)));
        let step = if write {
            Step::wrmsr(msr, 0)
        } else {
            Step::rdmsr(msr)
        };
        let (reason, ..) = exit_of(&mut rig, step);
        assert_eq!(reason, if write { 32 } else { 31 }, "{msr:#x}");
        skip(&rig);
        rig.poke(at, 0);
    }
    // Outside both ranges: always.
    assert_eq!(exit_of(&mut rig, Step::rdmsr(0x2000)).0, 31);
    skip(&rig);
    // A register of the host's that nothing keeps from the guest.
    rig.machine.script([Step::rdmsr(0x1b), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    found(&rig, "reads the host's MSR 0x1b");
}

#[test]
fn io_bitmaps_decide() {
    let mut rig = rig();
    // Neither control: the guest reaches the port.
    rig.machine.script([Step::output(0x80, 1, 0), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    found(&rig, "port 0x80");
    skip(&rig);
    set(&rig, PRIMARY, 1 << 25);
    rig.write(0x2000, rig.spare(0)).unwrap();
    rig.write(0x2002, rig.spare(1)).unwrap();
    for port in [0u16, 0x7fff, 0x8000, 0xffff] {
        let page = if port < 0x8000 {
            rig.spare(0)
        } else {
            rig.spare(1)
        };
        let byte = u64::from(port & 0x7fff) / 8;
        rig.poke(
            page + (byte & !7),
            1 << ((byte & 7) * 8 + u64::from(port & 7)),
        );
        let (reason, qualification, length) = exit_of(&mut rig, Step::input(port, 1));
        assert_eq!((reason, length), (30, 1));
        assert_eq!(qualification, 8 | u64::from(port) << 16);
        skip(&rig);
        rig.poke(page + (byte & !7), 0);
    }
    // An access that wraps around exits whatever the bitmap says.
    assert_eq!(exit_of(&mut rig, Step::output(0xffff, 2, 0)).0, 30);
}

#[test]
fn string_io_tells_address_and_segment() {
    let mut rig = rig();
    set(&rig, PRIMARY, 1 << 24);
    rig.regs.gpr[1] = 5;
    let io = StringIo {
        port: 0x1f0,
        size: 2,
        input: false,
        rep: true,
        linear: 0x1234,
        address_size: 3,
        segment: 4,
    };
    let (reason, qualification, length) = exit_of(&mut rig, Step::string_io(io));
    assert_eq!((reason, length), (30, 2));
    assert_eq!(qualification, 1 | 1 << 4 | 1 << 5 | 0x1f0 << 16);
    assert_eq!(rig.read(0x640a), 0x1234);
    assert_eq!(rig.read(0x440e), 2 << 7 | 4 << 15);
    // With RCX 0 a REP does nothing.
    rig.regs.gpr[1] = 0;
    rig.machine.script([Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
}

#[test]
fn masks_and_shadows_of_control_registers() {
    let mut rig = rig();
    rig.write(0x6000, 0x21).unwrap();
    rig.write(0x6004, 0x31).unwrap();
    rig.write(0x6002, 1 << 13).unwrap();
    rig.machine.script([
        // TS is the guest's.
        Step::mov_to_cr(0, 0, 0x8000_0039),
        Step::mov_from_cr(0, 3),
        Step::expect_gpr(3, 0x8000_0039),
        Step::clts(),
        Step::mov_from_cr(4, 3),
        Step::expect_gpr(3, 0x20),
        // NE is not.
        Step::mov_to_cr(0, 0, 0x8000_0011),
    ]);
    assert_eq!(rig.enter(), Ok(28));
    assert_eq!(rig.read(QUALIFICATION), 0);
    assert_eq!(rig.read(0x6800), 0x8000_0031);
    skip(&rig);
    let (reason, qualification, _) = exit_of(&mut rig, Step::mov_to_cr(4, 5, 1 << 13));
    assert_eq!((reason, qualification), (28, 4 | 5 << 8));
    skip(&rig);
    // CR3 exits with its control, except for a target value.
    set(&rig, PRIMARY, 1 << 15);
    rig.write(0x400a, 1).unwrap();
    rig.write(0x6008, 0x7000).unwrap();
    rig.machine
        .script([Step::mov_to_cr(3, 0, 0x7000), Step::mov_to_cr(3, 1, 0x8000)]);
    assert_eq!(rig.enter(), Ok(28));
    assert_eq!(rig.read(QUALIFICATION), 3 | 1 << 8);
    assert_eq!(rig.read(0x6802), 0x7000);
}

#[test]
fn the_exception_bitmap_and_the_page_fault_masks() {
    let mut rig = rig();
    // Not in the bitmap: the guest gets it.
    rig.machine
        .script([Step::exception(6, None, 0), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    assert_eq!(rig.machine.take_received()[0].vector, 6);
    skip(&rig);
    rig.write(0x4004, 1 << 6).unwrap();
    let (reason, _, _) = exit_of(&mut rig, Step::exception(6, None, 0));
    assert_eq!((reason, rig.read(0x4404)), (0, 1 << 31 | 3 << 8 | 6));
    skip(&rig);
    rig.write(RIP, 0x10_1000).unwrap();
    // Bit 14 clear: #PF exits if mask and match do not match.
    rig.write(0x4006, 2).unwrap();
    rig.write(0x4008, 0).unwrap();
    let (reason, qualification, _) = exit_of(&mut rig, Step::exception(14, Some(2), 0xabc));
    assert_eq!((reason, qualification), (0, 0xabc));
    assert_eq!(rig.read(0x4404), 1 << 31 | 1 << 11 | 3 << 8 | 14);
    assert_eq!(rig.read(0x4406), 2);
}

#[test]
fn windows_and_interrupts_come_in_order() {
    let mut rig = rig();
    set(&rig, PRIMARY, 1 << 2);
    assert_eq!(rig.enter(), Ok(7), "IF is set");
    // STI's shadow: one instruction first.
    rig.write(0x4824, 1).unwrap();
    rig.machine.script([Step::new("NOP", 1, |_| Ok(()))]);
    assert_eq!(rig.enter(), Ok(7));
    assert_eq!(rig.read(RIP), 0x10_0001);
    assert_eq!(rig.read(0x4824), 0);
    // It goes before a host interrupt, which waits until the host takes it.
    rig.machine.interrupt(rig.host_cpu());
    assert_eq!(rig.enter(), Ok(7));
    let primary = rig.read(PRIMARY);
    rig.write(PRIMARY, primary & !(1 << 2)).unwrap();
    assert_eq!(rig.enter(), Ok(1));
    assert_eq!(rig.enter(), Ok(1));
    rig.interrupts_on();
    set(&rig, PRIMARY, 1 << 2);
    assert_eq!(rig.enter(), Ok(7));
    // And an NMI before everything.
    rig.machine.nmi(rig.host_cpu());
    assert_eq!(rig.enter(), Ok(0));
    assert_eq!(rig.read(0x4404), 1 << 31 | 2 << 8 | 2);
    assert_eq!(rig.enter(), Ok(7));
}

#[test]
fn an_nmi_blocks_the_next_until_iret() {
    let mut rig = rig();
    rig.write(0x4016, 1 << 31 | 2 << 8 | 2).unwrap();
    rig.machine
        .script([Step::hlt(), Step::iret_from_nmi(), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    assert_eq!(rig.read(0x4824), 8);
    set(&rig, PRIMARY, 1 << 22);
    skip(&rig);
    assert_eq!(rig.enter(), Ok(8));
    assert_eq!(rig.read(0x4824), 0);
}

#[test]
fn ept_translates_and_refuses() {
    let mut rig = rig();
    let (_, frame) = rig.user_page();
    rig.map(0x3000, frame, 7);
    rig.map(0x4000, frame, 5);
    rig.machine.script([
        Step::write(0x3008, 8, 0x1234, 3),
        Step::read(0x4008, 8, 0x1234, 3),
        Step::fetch(0x4000),
        Step::write(0x4010, 8, 1, 3),
    ]);
    assert_eq!(rig.enter(), Ok(48));
    // A write, to a page that may be read and executed; a linear address.
    assert_eq!(rig.read(QUALIFICATION), 2 | 5 << 3 | 0x180);
    assert_eq!(rig.read(0x2400), 0x4010);
    assert_eq!(rig.read(0x640a), 0x4010);
    // Accessed and dirty flags are in the entries.
    assert_eq!(rig.peek(rig.leaf_address(0x3000)) >> 8 & 3, 3);
    assert_eq!(rig.peek(rig.leaf_address(0x4000)) >> 8 & 3, 1);
    // Nothing there, no linear address.
    rig.write(RIP, 0x20_0000).unwrap();
    let step = Step::new("walk", 0, |guest| {
        guest.touch_at(0x9000, None, Access::Read).map(|_| ())
    });
    let (reason, qualification, _) = exit_of(&mut rig, step);
    assert_eq!((reason, qualification), (48, 1));
}

#[test]
fn bad_ept_entries_are_misconfigurations() {
    for (what, bits) in [
        ("write without read", 2u64),
        ("write and execute", 6),
        ("memory type 2", 7 | 2 << 3),
        ("address beyond the width", 7 | 6 << 3 | 1 << 40),
    ] {
        let mut rig = rig();
        let (_, frame) = rig.user_page();
        rig.map(0x3000, frame, 7);
        rig.poke(rig.leaf_address(0x3000), frame << 12 | bits);
        let (reason, ..) = exit_of(&mut rig, Step::read(0x3000, 8, 0, 3));
        assert_eq!(reason, 49, "{what}");
    }
}

#[test]
fn translations_stay_until_invept() {
    let mut rig = rig();
    let (_, first) = rig.user_page();
    let (other, second) = rig.user_page();
    rig.machine.process().poke(other, &[7]);
    rig.map(0x3000, first, 7);
    rig.machine
        .script([Step::read(0x3000, 1, 0, 3), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    skip(&rig);
    // The entry changed, the processor does not know.
    rig.map(0x3000, second, 7);
    rig.machine
        .script([Step::read(0x3000, 1, 0, 3), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    skip(&rig);
    let eptp = rig.read(0x201a);
    // SAFETY: the processor is simulated.
    unsafe { rig.cpu().invept(InveptKind::Single, eptp) }.unwrap();
    rig.machine
        .script([Step::read(0x3000, 1, 7, 3), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    skip(&rig);
    // More rights need no INVEPT: the refused access drops the old entry.
    rig.map(0x5000, first, 1);
    rig.machine
        .script([Step::read(0x5000, 1, 0, 3), Step::write(0x5000, 1, 1, 3)]);
    assert_eq!(rig.enter(), Ok(48));
    rig.map(0x5000, first, 7);
    rig.machine.script([Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
}

#[test]
fn a_stale_translation_to_freed_memory_is_found() {
    let mut rig = rig();
    let (at, frame) = rig.user_page();
    rig.map(0x3000, frame, 7);
    rig.machine
        .script([Step::read(0x3000, 1, 0, 3), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    skip(&rig);
    // Still in the EPT when the host frees it.
    rig.machine.process().unmap(at, 4096);
    found(&rig, "while EPT");
    // Out of the EPT, but still in the cache.
    rig.map(0x3000, 0, 0);
    rig.machine
        .script([Step::read(0x3000, 1, 0, 3), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    found(&rig, "freed or absent memory");
}

#[test]
fn a_guest_that_reaches_the_kernel_is_found() {
    let mut rig = rig();
    rig.map(0x3000, rig.spare(0) >> 12, 7);
    rig.machine
        .script([Step::write(0x3000, 1, 1, 3), Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    found(&rig, "reaches a page of Kernel");
}

#[test]
fn a_delivery_that_faults_leaves_its_event() {
    let mut rig = rig();
    let (_, frame) = rig.user_page();
    rig.map(0x3000, frame, 1);
    rig.write(0x4016, 1 << 31 | 4 << 8 | 0x80).unwrap();
    rig.write(0x401a, 2).unwrap();
    let (reason, ..) = exit_of(&mut rig, Step::delivery_access(0x3000, Access::Write));
    assert_eq!(reason, 48);
    assert_eq!(rig.read(0x4408), 1 << 31 | 4 << 8 | 0x80);
    assert_eq!(rig.read(LENGTH), 2);
    assert!(rig.machine.take_received().is_empty());
    rig.map(0x3000, frame, 7);
    rig.write(0x4016, 1 << 31 | 4 << 8 | 0x80).unwrap();
    rig.machine.script([Step::hlt()]);
    assert_eq!(rig.enter(), Ok(12));
    assert_eq!(rig.machine.take_received()[0].vector, 0x80);
    assert_eq!(rig.read(RIP), 0x10_0002, "behind INT 0x80");
}

#[test]
fn controls_of_single_instructions() {
    let mut rig = rig();
    // Off: nothing happens.
    rig.machine.script([
        Step::exits_if(PRIMARY, 9, 14, 3),
        Step::exits_if(SECONDARY, 6, 54, 2),
        Step::rdtsc(),
        Step::hlt(),
    ]);
    assert_eq!(rig.enter(), Ok(12));
    skip(&rig);
    set(&rig, PRIMARY, 1 << 9 | 1 << 12);
    set(&rig, SECONDARY, 1 << 6);
    assert_eq!(exit_of(&mut rig, Step::exits_if(PRIMARY, 9, 14, 3)).0, 14);
    skip(&rig);
    assert_eq!(exit_of(&mut rig, Step::exits_if(SECONDARY, 6, 54, 2)).0, 54);
    skip(&rig);
    assert_eq!(exit_of(&mut rig, Step::rdtsc()).0, 16);
    skip(&rig);
    // Without HLT exiting the guest waits for the host's timer.
    let primary = rig.read(PRIMARY);
    rig.write(PRIMARY, primary & !(1 << 7)).unwrap();
    assert_eq!(exit_of(&mut rig, Step::hlt()).0, 1);
    assert_eq!(rig.read(0x4826), 1);
}

#[test]
fn undefined_exit_fields_are_garbage() {
    let mut rig = rig();
    rig.machine.script([]);
    assert_eq!(rig.enter(), Ok(1));
    assert_eq!(rig.read(REASON), 1);
    assert_eq!(rig.read(0x4404) >> 31, 0);
    assert_ne!(rig.read(LENGTH), 0);
    assert_ne!(rig.read(0x640a), 0);
}

#[test]
fn msr_areas_are_loaded_and_stored() {
    let mut rig = rig();
    let (load, store) = (rig.spare(0), rig.spare(1));
    rig.poke(load, 0xc000_0103);
    rig.poke(load + 8, 0x77);
    rig.write(0x200a, load).unwrap();
    rig.write(0x4014, 1).unwrap();
    rig.poke(store, 0xc000_0103);
    rig.write(0x2006, store).unwrap();
    rig.write(0x400e, 1).unwrap();
    // Back to the host's value.
    let back = rig.spare(2);
    rig.poke(back, 0xc000_0103);
    rig.poke(back + 8, rig.host_cpu() as u64);
    rig.write(0x2008, back).unwrap();
    rig.write(0x4010, 1).unwrap();
    rig.machine.script([
        Step::act(|guest| assert_eq!(guest.msr(0xc000_0103), 0x77)),
        Step::hlt(),
    ]);
    assert_eq!(rig.enter(), Ok(12));
    assert_eq!(rig.peek(store + 8), 0x77);
    assert_eq!(
        rig.machine.msr(rig.host_cpu(), 0xc000_0103),
        Some(rig.host_cpu() as u64)
    );
}
