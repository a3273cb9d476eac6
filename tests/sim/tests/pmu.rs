//! The guest's performance counters: what they count, and that the host's are
//! neither changed nor count for the guest. That the simulator sees by itself;
//! the last tests show that it does.
// UNSAFETY: executes WRMSR and INT 2 as a careless core would.
#![expect(unsafe_code)]

use abi::cpuid::CpuidEntry;
use abi::tunnel::ExitStatus;
use sim::client::Client;
use sim::rig::Rig;
use sim::{Machine, Profile, Step};
use vmx::arch::msr::{
    IA32_PEBS_ENABLE, IA32_PERF_CAPABILITIES, IA32_PERF_GLOBAL_CTRL, IA32_PERF_GLOBAL_STATUS,
    IA32_PERFEVTSEL0, IA32_PMC0,
};
use vmx::arch::reg::gpr::{RAX, RCX, RDX};
use vmx::cpu::{Cpu, CpuidResult};

const RDPMC: u16 = 15;
/// EN, OS, USR, instructions retired.
const INSTRUCTIONS: u64 = 0x43_00c0;
const ENTRY_CONTROLS: u32 = 0x4012;

fn on(profile: Profile) -> Client {
    let client = Client::new(&Machine::new(profile, 2));
    client.protected_mode();
    client
}

/// For a processor without unrestricted guest too.
fn on_paging(profile: Profile) -> Client {
    let client = Client::new(&Machine::new(profile, 2));
    client.long_mode();
    client
}

fn instruction() -> Step {
    Step::new("NOP", 1, |_| Ok(()))
}

fn instructions(count: usize) -> Vec<Step> {
    (0..count).map(|_| instruction()).collect()
}

/// RDPMC of a counter, and what it is to give.
fn rdpmc(number: u64, value: u64) -> [Step; 4] {
    [
        Step::set_gpr(RCX, number),
        Step::exits(RDPMC, 0, 2),
        Step::expect_gpr(RAX, value & 0xffff_ffff),
        Step::expect_gpr(RDX, value >> 32),
    ]
}

fn gp_faults(client: &Client) -> usize {
    let received = client.machine.take_received();
    received.iter().filter(|event| event.vector == 13).count()
}

#[test]
fn a_guest_counts_its_own_instructions() {
    for profile in Profile::working() {
        // A Nehalem's do not stop at an exit.
        if profile.name == "no_unrestricted_guest" {
            continue;
        }
        let client = on_paging(profile);
        let mut steps = vec![Step::wrmsr(IA32_PERFEVTSEL0, INSTRUCTIONS)];
        for round in 1..=5 {
            steps.extend(instructions(3));
            steps.push(Step::cpuid(0, 0));
            steps.extend(rdpmc(0, round * 3));
        }
        steps.push(Step::output(0x80, 1, 0));
        assert_eq!(client.run(steps), ExitStatus::Io);
        assert_eq!(client.msr(IA32_PMC0), Some(15));
        // Over several loans, one of which an NMI cuts in two.
        for _ in 0..3 {
            let mut steps = instructions(2);
            steps.push(Step::host_nmi());
            steps.extend(instructions(2));
            client.run(steps);
        }
        assert_eq!(client.msr(IA32_PMC0), Some(27));
        client.run([
            Step::wrmsr(IA32_PERFEVTSEL0, INSTRUCTIONS & !(1 << 22)),
            instruction(),
            Step::rdmsr(IA32_PMC0),
            Step::expect_gpr(RAX, 27),
        ]);
        client.finish();
    }
}

#[test]
fn counters_are_chosen_and_changed_while_the_guest_runs() {
    let client = on(Profile::haswell());
    let mut steps = vec![
        Step::wrmsr(IA32_PERFEVTSEL0 + 1, INSTRUCTIONS),
        Step::wrmsr(IA32_PMC0 + 1, 0x8000_0000),
        instruction(),
        Step::wrmsr(IA32_PERFEVTSEL0 + 3, INSTRUCTIONS),
        instruction(),
        Step::wrmsr(IA32_PERFEVTSEL0 + 1, 0),
        instruction(),
        Step::wrmsr(IA32_PMC0 + 3, 100),
        instruction(),
    ];
    steps.extend(rdpmc(1, 0xffff_8000_0002));
    steps.extend(rdpmc(3, 101));
    steps.extend(rdpmc(0, 0));
    client.run(steps);
    assert_eq!(client.msr(IA32_PMC0 + 1), Some(0xffff_8000_0002));
    assert_eq!(client.msr(IA32_PMC0 + 3), Some(101));
    client.finish();
}

/// A count beyond 32 bits goes on where the processor could not be given it, and
/// wraps at the width of the counter.
#[test]
fn a_client_restores_the_whole_count() {
    for profile in [
        Profile::haswell(),
        Profile::haswell().without_full_width_writes(),
    ] {
        let client = on_paging(profile);
        client.set_msr(IA32_PERFEVTSEL0, INSTRUCTIONS);
        for start in [0x1234_8000_0000, 0xffff_ffff_fffe] {
            client.set_msr(IA32_PMC0, start);
            assert_eq!(client.msr(IA32_PMC0), Some(start));
            client.run(instructions(5));
            let expected = (start + 5) & 0xffff_ffff_ffff;
            assert_eq!(client.msr(IA32_PMC0), Some(expected));
        }
        // No trace of the wrap on the processor.
        assert_eq!(client.machine.msr(0, IA32_PERF_GLOBAL_STATUS), Some(0));
        client.finish();
    }
}

#[test]
fn the_interrupt_is_remembered_and_never_set() {
    let client = on(Profile::haswell());
    let selector = INSTRUCTIONS | 1 << 20 | 1 << 19;
    client.run([
        Step::wrmsr(IA32_PERFEVTSEL0, selector),
        Step::act(|guest| assert_eq!(guest.msr(IA32_PERFEVTSEL0), INSTRUCTIONS)),
        Step::act(|guest| assert_eq!(guest.msr(IA32_PERF_GLOBAL_CTRL), 1)),
        Step::rdmsr(IA32_PERFEVTSEL0),
        Step::expect_gpr(RAX, selector),
    ]);
    assert_eq!(client.msr(IA32_PERFEVTSEL0), Some(selector));
    client.finish();
}

#[test]
fn what_faults() {
    let client = on(Profile::haswell());
    client.run([
        Step::wrmsr(IA32_PERFEVTSEL0, INSTRUCTIONS | 1 << 21),
        Step::wrmsr(IA32_PERFEVTSEL0, INSTRUCTIONS | 1 << 32),
        Step::wrmsr(IA32_PERF_CAPABILITIES, 0),
        Step::wrmsr(IA32_PERFEVTSEL0 + 4, 0),
        Step::set_gpr(RCX, 4),
        Step::exits(RDPMC, 0, 2),
        Step::set_gpr(RCX, 1 << 30),
        Step::exits(RDPMC, 0, 2),
        Step::set_gpr(RCX, 1 << 31),
        Step::exits(RDPMC, 0, 2),
    ]);
    assert_eq!(gp_faults(&client), 7);
    assert_eq!(client.msr(IA32_PERFEVTSEL0), Some(0));
    assert_eq!(client.msr(IA32_PERF_CAPABILITIES), Some(0));
    assert!(!client.try_set_msr(IA32_PERFEVTSEL0, 1 << 21));
    client.finish();
}

#[test]
fn a_guest_that_does_not_count_pays_for_a_look_at_pebs() {
    let work = |profile| {
        let client = on(profile);
        client.run([Step::cpuid(0, 0)]);
        client.machine.reset_counts();
        for _ in 0..3 {
            client.run([Step::cpuid(0, 0), Step::wrmsr(IA32_PMC0, 5)]);
        }
        let counts = client.machine.counts();
        client.finish();
        counts
    };
    let without = work(Profile::haswell().with_counters(0));
    let mut with = work(Profile::haswell());
    // One for each RUN.
    assert_eq!(with.rdmsr, without.rdmsr + 3);
    with.rdmsr = without.rdmsr;
    assert_eq!(with, without);
}

/// Nor does one that has stopped counting, from the next RUN on.
#[test]
fn a_guest_that_has_stopped_counting_pays_nothing() {
    let client = on(Profile::haswell());
    client.run([Step::cpuid(0, 0)]);
    client.machine.reset_counts();
    client.run([Step::cpuid(0, 0)]);
    let before = client.machine.counts();
    client.set_msr(IA32_PERFEVTSEL0, INSTRUCTIONS);
    client.run([Step::cpuid(0, 0)]);
    client.set_msr(IA32_PERFEVTSEL0, 0);
    client.run([Step::cpuid(0, 0)]);
    client.machine.reset_counts();
    client.run([Step::cpuid(0, 0)]);
    assert_eq!(client.machine.counts(), before);
    client.finish();
}

/// The counters that are on as the host has them.
const HOSTS_GLOBAL: u64 = 0x7_0000_000f;

/// The guest runs without counters of its own, and with these of the host's.
fn runs_uncounted(client: &Client, global: u64) {
    let vmcs = client.machine.current_vmcs(0).unwrap_or(0);
    let mut steps = instructions(3);
    steps.push(Step::act(move |guest| {
        assert_eq!(guest.msr(IA32_PERF_GLOBAL_CTRL), global);
    }));
    client.run(steps);
    let entry = client.machine.vmcs_field(vmcs, ENTRY_CONTROLS).unwrap();
    assert_eq!(entry >> 13 & 1, 0);
}

#[test]
fn a_host_that_needs_its_counters_keeps_them() {
    for (register, value, on_in_guest) in [
        // An overflow whose interrupt is under way; one noted for a fixed counter.
        (IA32_PERF_GLOBAL_STATUS, 1, HOSTS_GLOBAL),
        (IA32_PERF_GLOBAL_STATUS, 1 << 33, HOSTS_GLOBAL),
        (IA32_PEBS_ENABLE, 1, HOSTS_GLOBAL & !1),
    ] {
        let client = on(Profile::haswell());
        client.set_msr(IA32_PERFEVTSEL0, INSTRUCTIONS);
        client.run(instructions(2));
        assert_eq!(client.msr(IA32_PMC0), Some(2));
        client.machine.set_msr(0, register, value);
        runs_uncounted(&client, on_in_guest);
        assert_eq!(client.msr(IA32_PMC0), Some(2));
        client.machine.set_msr(0, register, 0);
        client.run(instructions(2));
        assert_eq!(client.msr(IA32_PMC0), Some(4));
        client.finish();
    }
    // Bits that mean no interrupt are no reason.
    let client = on(Profile::haswell());
    client.set_msr(IA32_PERFEVTSEL0, INSTRUCTIONS);
    client
        .machine
        .set_msr(0, IA32_PERF_GLOBAL_STATUS, 1 << 60 | 1 << 63);
    client.run(instructions(2));
    assert_eq!(client.msr(IA32_PMC0), Some(2));
    client.finish();
}

/// Records of the host's would be written by the guest's page tables; the simulator reports an entry
/// with PEBS on. Its counters stand still, and an NMI's handler finds all as the host has it.
#[test]
fn no_record_of_the_hosts_is_written_in_the_guest() {
    let client = Client::protected();
    client.machine.set_msr(0, IA32_PEBS_ENABLE, 5);
    for _ in 0..2 {
        runs_uncounted(&client, HOSTS_GLOBAL & !5);
        client.run([Step::host_nmi(), Step::cpuid(0, 0), Step::host_interrupt()]);
        let now = |register| client.machine.msr(0, register);
        assert_eq!(now(IA32_PEBS_ENABLE), Some(5));
        assert_eq!(now(IA32_PERF_GLOBAL_CTRL), Some(HOSTS_GLOBAL));
    }
    client.finish();
}

/// Without full-width writes: a count of the host's that could not be put back.
#[test]
fn a_count_that_cannot_be_put_back_is_not_taken() {
    let profile = Profile::haswell().without_full_width_writes();
    let client = on(profile);
    client.set_msr(IA32_PERFEVTSEL0, INSTRUCTIONS);
    client.machine.set_msr(0, IA32_PMC0, 0x8000_0000);
    runs_uncounted(&client, HOSTS_GLOBAL);
    assert_eq!(client.msr(IA32_PMC0), Some(0));
    client.machine.set_msr(0, IA32_PMC0, 0xffff_8000_0000);
    client.run(instructions(2));
    assert_eq!(client.msr(IA32_PMC0), Some(2));
    client.finish();
    // With them any count can be.
    let client = on(Profile::haswell());
    client.set_msr(IA32_PERFEVTSEL0, INSTRUCTIONS);
    client.machine.set_msr(0, IA32_PMC0, 0x1234_8000_0000);
    client.run(instructions(2));
    assert_eq!(client.msr(IA32_PMC0), Some(2));
    client.finish();
}

/// The host does not count, and no PEBS is there, or no IA32_PERF_CAPABILITIES either.
#[test]
fn a_host_without_a_watchdog() {
    for has_capabilities in [false, true] {
        let mut profile = Profile::haswell();
        let leaf = profile.cpuid.get_mut(&(1, 0)).unwrap();
        leaf.edx &= !(1 << 21);
        profile.msrs.insert(IA32_PERF_GLOBAL_CTRL, 0);
        profile.msrs.remove(&IA32_PEBS_ENABLE);
        if !has_capabilities {
            leaf.ecx &= !(1 << 15);
            profile.msrs.remove(&IA32_PERF_CAPABILITIES);
        }
        let client = on(profile);
        client.set_msr(IA32_PERFEVTSEL0, INSTRUCTIONS);
        client.run(instructions(7));
        assert_eq!(client.msr(IA32_PMC0), Some(7));
        client.finish();
    }
}

#[test]
fn two_guests_share_a_processor() {
    let machine = Machine::new(Profile::haswell(), 1);
    let clients = [Client::new(&machine), Client::new(&machine)];
    for (n, client) in (0..).zip(&clients) {
        client.protected_mode();
        client.set_msr(IA32_PERFEVTSEL0 + n, INSTRUCTIONS);
    }
    for round in 1..=3u64 {
        for (n, client) in (0..).zip(&clients) {
            client.run(instructions(4 + n as usize));
            let expected = round * (4 + u64::from(n));
            assert_eq!(client.msr(IA32_PMC0 + n), Some(expected));
            assert_eq!(client.msr(IA32_PMC0 + 1 - n), Some(0));
        }
    }
    let [first, second] = clients;
    drop(first);
    second.finish();
}

fn leaf_a(client: &Client) -> CpuidResult {
    let mut entries = [CpuidEntry::default(); 18];
    client.vcpu.cpuid(&mut entries);
    let row = entries.iter().find(|row| row.function == 0xa).unwrap();
    CpuidResult {
        eax: row.eax,
        ebx: row.ebx,
        ecx: row.ecx,
        edx: row.edx,
    }
}

#[test]
fn counters_are_offered_where_they_can_be_switched() {
    // Version 1 alone, with the controls all the same.
    let mut old = Profile::haswell();
    old.cpuid.get_mut(&(0xa, 0)).unwrap().eax = 0x0730_0401;
    for (profile, eax) in [
        (Profile::haswell(), 0x0730_0401),
        (Profile::haswell().with_counters(5), 0x0730_0401),
        (Profile::haswell().with_counters(2), 0x0730_0401),
        (old, 0),
        (Profile::haswell().with_counters(1), 0),
        (Profile::haswell().with_counters(0), 0),
        (Profile::haswell().without_counter_switching(), 0),
        (Profile::haswell().with_counters_for_show(), 0),
    ] {
        let client = on(profile);
        assert_eq!(leaf_a(&client).eax, eax);
        if eax == 0 {
            client.run([
                Step::wrmsr(IA32_PERFEVTSEL0, INSTRUCTIONS),
                instruction(),
                Step::rdmsr(IA32_PMC0),
                Step::expect_gpr(RAX, 0),
                Step::set_gpr(RCX, 0),
                Step::exits(RDPMC, 0, 2),
            ]);
            assert_eq!(gp_faults(&client), 1);
            assert_eq!(client.msr(IA32_PERFEVTSEL0), Some(0));
        }
        client.finish();
    }
}

#[test]
fn a_client_takes_counters_away() {
    let client = on(Profile::haswell());
    client.set_msr(IA32_PERFEVTSEL0, INSTRUCTIONS);
    client.set_msr(IA32_PERFEVTSEL0 + 2, INSTRUCTIONS);
    client.run(instructions(2));
    let entry = CpuidEntry {
        function: 0xa,
        eax: 0x0720_0101,
        ebx: 4,
        ..CpuidEntry::default()
    };
    client.vcpu.set_cpuid(&[entry]).unwrap();
    let expected = CpuidResult {
        eax: 0x0730_0101,
        ebx: 4,
        ..CpuidResult::default()
    };
    assert_eq!(leaf_a(&client), expected);
    let mut steps = instructions(2);
    steps.push(Step::act(|guest| {
        assert_eq!(guest.msr(IA32_PERF_GLOBAL_CTRL), 1);
    }));
    client.run(steps);
    assert_eq!(client.msr(IA32_PMC0), Some(4));
    assert_eq!(client.msr(IA32_PMC0 + 2), Some(0));
    assert_eq!(client.msr(IA32_PERFEVTSEL0 + 2), Some(0));
    // And more than there is, which it does not get.
    let entry = CpuidEntry {
        eax: 0xff40_ff05,
        ..entry
    };
    client.vcpu.set_cpuid(&[entry]).unwrap();
    assert_eq!(leaf_a(&client).eax, 0x0730_0401);
    client.finish();
}

/// What the simulator finds when a core is careless.
fn found(act: impl FnOnce(&mut Rig), expected: &str) {
    let mut rig = Rig::new(Profile::haswell());
    act(&mut rig);
    let machine = rig.machine.clone();
    drop(rig);
    let findings = machine.take_findings();
    assert!(
        findings.iter().any(|text| text.contains(expected)),
        "{findings:?}"
    );
}

fn wrmsr(rig: &Rig, register: u32, value: u64) {
    // SAFETY: a simulated processor.
    unsafe { rig.cpu().wrmsr(register, value) };
}

#[test]
fn the_simulator_finds_mixed_counters() {
    found(
        |rig| {
            wrmsr(rig, IA32_PERF_GLOBAL_CTRL, 0);
            wrmsr(rig, IA32_PMC0, 0);
            wrmsr(rig, IA32_PERF_GLOBAL_CTRL, 0x7_0000_000f);
        },
        "counter 0 is not put back",
    );
    found(
        |rig| {
            wrmsr(rig, IA32_PERFEVTSEL0 + 1, INSTRUCTIONS);
            rig.cpu().rdtsc();
        },
        "a guest's counter 1 counts the host",
    );
    found(
        |rig| {
            wrmsr(rig, IA32_PERF_GLOBAL_CTRL, 1);
            wrmsr(rig, IA32_PMC0 + 1, 0);
            rig.machine.script([instruction()]);
            rig.enter().unwrap();
        },
        "the host's counter 0 counts a guest",
    );
    found(
        |rig| {
            wrmsr(rig, IA32_PERF_GLOBAL_CTRL, 0);
            wrmsr(rig, IA32_PMC0, 0);
            // SAFETY: a simulated processor.
            unsafe { rig.cpu().raise_nmi() };
        },
        "NMI handler meets a guest's counter 0",
    );
    found(
        |rig| wrmsr(rig, IA32_PERF_GLOBAL_CTRL, 0),
        "IA32_PERF_GLOBAL_CTRL changed",
    );
}
