//! What is done against speculation: where it is needed, and nowhere else; and
//! the guest's own registers for it.

use abi::tunnel::ExitStatus;
use sim::client::Client;
use sim::{Machine, Profile, Step};
use vmx::arch::reg::gpr::RAX;
use vmx::host::Mitigations;

const SPEC_CTRL: u32 = 0x48;
const PRED_CMD: u32 = 0x49;
const FLUSH_CMD: u32 = 0x10b;
const ARCH_CAPABILITIES: u32 = 0x10a;

fn on(profile: Profile, wanted: Mitigations) -> Client {
    let machine = Machine::new(profile, 2);
    machine.set_mitigations(wanted);
    let client = Client::new(&machine);
    client.protected_mode();
    client
}

/// Two RUNs with three exits that stay in the kernel.
fn some_exits(client: &Client) {
    client.run([Step::cpuid(0, 0), Step::cpuid(0, 0)]);
    client.machine.reset_counts();
    for _ in 0..2 {
        client.run([Step::cpuid(0, 0), Step::cpuid(0, 0), Step::cpuid(0, 0)]);
    }
}

fn with_feature(bit: u32, capabilities: Option<u64>) -> Profile {
    let mut profile = Profile::skylake_x();
    let leaf = profile.cpuid.get_mut(&(7, 0)).unwrap();
    leaf.edx |= 1 << bit;
    if let Some(value) = capabilities {
        profile.msrs.insert(ARCH_CAPABILITIES, value);
    }
    profile
}

const RDCL_NO: u64 = 1;
const IBRS_ALL: u64 = 2;
const MDS_NO: u64 = 1 << 5;
const TAA_NO: u64 = 1 << 8;
/// SBDR_SSDP_NO, FBSDP_NO, PSDP_NO.
const MMIO_NO: u64 = 7 << 13;
const PBRSB_NO: u64 = 1 << 24;
const ALL_NO: u64 = RDCL_NO | IBRS_ALL | MDS_NO | TAA_NO | PBRSB_NO;

#[test]
fn a_host_that_wants_nothing_pays_nothing() {
    for profile in [Profile::haswell(), with_feature(10, Some(0))] {
        let client = on(profile, Mitigations::Off);
        some_exits(&client);
        let counts = client.machine.counts();
        assert_eq!(counts.plain_entries, counts.vmresume);
        assert_eq!(counts.vmresume, 8);
        client.finish();
    }
}

#[test]
fn a_processor_that_needs_nothing_pays_nothing() {
    let client = on(with_feature(10, Some(ALL_NO)), Mitigations::Needed);
    some_exits(&client);
    let counts = client.machine.counts();
    assert_eq!(counts.plain_entries, counts.vmresume);
    client.finish();
}

#[test]
fn each_weakness_gets_its_remedy() {
    // What the processor says, and how often each is done in 8 entries of 2 loans.
    for (bit, capabilities, buffers, returns, l1d) in [
        (10, ALL_NO & !MDS_NO, 8, 0, 0),
        (10, ALL_NO & !IBRS_ALL, 0, 8, 0),
        (10, ALL_NO & !PBRSB_NO, 0, 8, 0),
        (10, ALL_NO & !RDCL_NO, 0, 0, 2),
        // SKIP_L1DFL_VMENTRY.
        (10, ALL_NO & !RDCL_NO | 1 << 3, 0, 0, 0),
        // With RTM, which this model has.
        (10, ALL_NO & !TAA_NO, 8, 0, 0),
        // FB_CLEAR without one of MMIO's three, RFDS_CLEAR without RFDS_NO, and with them.
        (10, ALL_NO | 1 << 17, 8, 0, 0),
        (10, ALL_NO | 1 << 17 | MMIO_NO & !(1 << 13), 8, 0, 0),
        (10, ALL_NO | 1 << 17 | MMIO_NO & !(1 << 14), 8, 0, 0),
        (10, ALL_NO | 1 << 17 | MMIO_NO, 0, 0, 0),
        (10, ALL_NO | 1 << 28, 8, 0, 0),
        (10, ALL_NO | 1 << 28 | 1 << 27, 0, 0, 0),
        // No VERW that clears.
        (12, ALL_NO & !MDS_NO, 0, 0, 0),
    ] {
        let client = on(with_feature(bit, Some(capabilities)), Mitigations::Needed);
        some_exits(&client);
        let counts = client.machine.counts();
        let done = (
            counts.cleared_buffers,
            counts.filled_returns,
            counts.flushed_l1d,
        );
        assert_eq!(done, (buffers, returns, l1d), "{capabilities:#x}");
        client.finish();
    }
    let client = on(with_feature(10, Some(ALL_NO)), Mitigations::All);
    some_exits(&client);
    let counts = client.machine.counts();
    let done = (
        counts.cleared_buffers,
        counts.filled_returns,
        counts.flushed_l1d,
    );
    assert_eq!(done, (8, 8, 2));
    client.finish();
}

/// Cores of two kinds: each guest gets what any of them needs, and hears what is true of both.
#[test]
fn the_weakest_processor_counts() {
    const RRSBA: u64 = 1 << 19;
    for weak in [0, 1] {
        let machine = Machine::new(with_feature(10, Some(ALL_NO)), 2);
        machine.set_msr(weak, ARCH_CAPABILITIES, ALL_NO & !MDS_NO | RRSBA);
        let client = Client::new(&machine);
        client.protected_mode();
        some_exits(&client);
        assert_eq!(client.machine.counts().cleared_buffers, 8);
        let told = client.msr(ARCH_CAPABILITIES).expect("the register");
        assert_eq!(told & (MDS_NO | TAA_NO | RRSBA), TAA_NO | RRSBA);
        client.finish();
    }
}

#[test]
fn without_transactions_nobody_leaks_by_them() {
    let mut profile = with_feature(10, Some(ALL_NO & !TAA_NO));
    profile.cpuid.get_mut(&(7, 0)).unwrap().ebx &= !(1 << 11);
    let client = on(profile, Mitigations::Needed);
    some_exits(&client);
    assert_eq!(client.machine.counts().cleared_buffers, 0);
    client.finish();
}

/// A host that restricts its predictions by IBRS, on a processor where only a write after the exit
/// counts, gets that write, whatever the guest does with the register; the guest does not run with
/// the host's value. The simulator reports an exit without it.
#[test]
fn ibrs_is_written_after_each_exit() {
    let client = on(
        with_feature(10, Some(ALL_NO & !IBRS_ALL)),
        Mitigations::Needed,
    );
    client.run([
        Step::rdmsr(SPEC_CTRL),
        Step::expect_gpr(RAX, 0),
        Step::wrmsr(SPEC_CTRL, 0),
        Step::act(|guest| assert_eq!(guest.msr(SPEC_CTRL), 0)),
        Step::wrmsr(SPEC_CTRL, 1),
    ]);
    client.machine.reset_counts();
    client.run([
        Step::rdmsr(SPEC_CTRL),
        Step::expect_gpr(RAX, 1),
        Step::wrmsr(SPEC_CTRL, 4),
    ]);
    let counts = client.machine.counts();
    assert_eq!((counts.exits_of(31), counts.exits_of(32)), (0, 0));
    assert_eq!(client.msr(SPEC_CTRL), Some(4));
    assert_eq!(client.machine.msr(0, SPEC_CTRL), Some(1));
    client.finish();
    // A host that does not, does not pay.
    let mut profile = with_feature(10, Some(ALL_NO & !IBRS_ALL));
    profile.msrs.insert(SPEC_CTRL, 0);
    let client = on(profile, Mitigations::Needed);
    client.run([Step::cpuid(0, 0)]);
    client.machine.reset_counts();
    client.run([Step::cpuid(0, 0)]);
    assert_eq!(client.machine.counts().wrmsr, 0);
    client.finish();
}

/// The host's SPEC_CTRL is 1 on this model; the simulator compares it whenever
/// preemption becomes possible.
#[test]
fn spec_ctrl_is_the_guests_from_its_first_bit_on() {
    let client = on(Profile::skylake_x(), Mitigations::Off);
    client.run([
        Step::rdmsr(SPEC_CTRL),
        Step::expect_gpr(RAX, 0),
        Step::wrmsr(SPEC_CTRL, 0),
        Step::cpuid(0, 0),
    ]);
    client.machine.reset_counts();
    client.run([Step::cpuid(0, 0)]);
    let counts = client.machine.counts();
    assert_eq!(counts.plain_entries, counts.vmresume, "nobody wrote it yet");
    client.run([Step::wrmsr(SPEC_CTRL, 4)]);
    client.machine.reset_counts();
    // No exit any more.
    client.run([
        Step::rdmsr(SPEC_CTRL),
        Step::expect_gpr(RAX, 4),
        Step::wrmsr(SPEC_CTRL, 6),
    ]);
    let counts = client.machine.counts();
    assert_eq!((counts.exits_of(31), counts.exits_of(32)), (0, 0));
    assert_eq!(client.msr(SPEC_CTRL), Some(6));
    // On another processor, and by the client.
    client.machine.set_affinity(Some(1));
    client.run([Step::rdmsr(SPEC_CTRL), Step::expect_gpr(RAX, 6)]);
    client.set_msr(SPEC_CTRL, 1);
    client.run([Step::rdmsr(SPEC_CTRL), Step::expect_gpr(RAX, 1)]);
    client.machine.set_affinity(None);
    assert!(!client.try_set_msr(SPEC_CTRL, 8));
    client.finish();
}

#[test]
fn reserved_bits_and_missing_registers() {
    let client = on(Profile::skylake_x(), Mitigations::Off);
    for (register, value) in [
        (SPEC_CTRL, 8),
        (PRED_CMD, 2),
        (FLUSH_CMD, 2),
        (ARCH_CAPABILITIES, 0),
    ] {
        client.run([Step::wrmsr(register, value)]);
        assert_eq!(
            client.machine.take_received()[0].vector,
            13,
            "{register:#x}"
        );
    }
    for register in [PRED_CMD, FLUSH_CMD] {
        client.run([Step::rdmsr(register)]);
        assert_eq!(
            client.machine.take_received()[0].vector,
            13,
            "{register:#x}"
        );
    }
    client.finish();
    let client = on(Profile::haswell(), Mitigations::Off);
    for register in [SPEC_CTRL, PRED_CMD, FLUSH_CMD, ARCH_CAPABILITIES, 0xda0] {
        assert_eq!(client.msr(register), None, "{register:#x}");
        client.run([Step::wrmsr(register, 1)]);
        assert_eq!(
            client.machine.take_received()[0].vector,
            13,
            "{register:#x}"
        );
    }
    client.finish();
}

#[test]
fn commands_go_to_the_processor() {
    let client = on(Profile::skylake_x(), Mitigations::Off);
    for register in [PRED_CMD, FLUSH_CMD] {
        client.machine.reset_counts();
        assert_eq!(
            client.run([
                Step::wrmsr(register, 0),
                Step::wrmsr(register, 1),
                Step::wrmsr(register, 1)
            ]),
            ExitStatus::Interrupt
        );
        // The third without an exit.
        assert_eq!(client.machine.counts().exits_of(32), 2, "{register:#x}");
        assert_eq!(client.machine.take_received().len(), 0);
        assert_eq!(client.machine.script_left(), 0);
    }
    client.finish();
}

#[test]
fn capabilities_for_a_guest() {
    // TSX_CTRL (7), MISC_PACKAGE_CTLS (10), XAPIC_DISABLE (21), OVERCLOCKING (23)
    // announce registers that are not there.
    let all = !0u64;
    let client = on(with_feature(10, Some(all)), Mitigations::Needed);
    let seen = client.msr(ARCH_CAPABILITIES).unwrap();
    assert_eq!(seen & (1 << 7 | 1 << 10 | 1 << 21 | 1 << 23), 0);
    assert_eq!(seen & ALL_NO, ALL_NO);
    // No guest below this one need empty the cache for its own guests.
    assert_eq!(seen & 8, 8);
    // Saved state can be put back.
    assert!(client.try_set_msr(ARCH_CAPABILITIES, seen));
    assert!(!client.try_set_msr(ARCH_CAPABILITIES, seen ^ 1));
    client.finish();
}

#[test]
fn xss_exists_with_xsaves_and_is_zero() {
    let client = on(Profile::skylake_x(), Mitigations::Off);
    assert_eq!(client.msr(0xda0), Some(0));
    assert!(!client.try_set_msr(0xda0, 0x100));
    client.run([
        Step::wrmsr(0xda0, 0),
        Step::rdmsr(0xda0),
        Step::expect_gpr(RAX, 0),
    ]);
    assert_eq!(client.machine.take_received().len(), 0);
    client.finish();
    // A host that uses supervisor states keeps them to itself.
    let mut profile = Profile::skylake_x();
    profile.msrs.insert(0xda0, 0x800);
    let client = on(profile, Mitigations::Off);
    assert_eq!(client.msr(0xda0), None);
    client.finish();
}
