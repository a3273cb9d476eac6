//! VMX instructions per exit, counted by the simulated processor: what an emulator's instruction count cannot show,
//! for on metal each of them costs tens of cycles. The ceilings
//! are the figures reached; docs/performance.md has them too.

use abi::tunnel::ExitStatus;
use sim::client::{CODE, Client};
use sim::{Machine, Step};

/// Device memory.
const DEVICE: u64 = 0xd000_0000;
/// Exits in a count, after as many that are not counted.
const EXITS: u64 = 20;

/// Instructions of one exit.
#[derive(Debug)]
struct PerExit {
    vmread: u64,
    vmwrite: u64,
    vmptrld: u64,
    rdmsr: u64,
    wrmsr: u64,
    entries: u64,
}

const fn cost(vmread: u64, vmwrite: u64, vmptrld: u64, rdmsr: u64, wrmsr: u64) -> PerExit {
    PerExit {
        vmread,
        vmwrite,
        vmptrld,
        rdmsr,
        wrmsr,
        entries: 1,
    }
}

/// Counts what `exits` does when it is called with a number of exits.
fn count(client: &Client, mut exits: impl FnMut(&Client, u64)) -> PerExit {
    exits(client, EXITS);
    client.machine.reset_counts();
    exits(client, EXITS);
    let small = client.machine.counts();
    client.machine.reset_counts();
    exits(client, 2 * EXITS);
    let large = client.machine.counts();
    // What is paid once, whatever the number, falls out.
    let each = |of: fn(&sim::Counts) -> u64| {
        let sum = of(&large) - of(&small);
        assert_eq!(
            sum % EXITS,
            0,
            "not the same for each exit: {sum} in {EXITS}"
        );
        sum / EXITS
    };
    PerExit {
        vmread: each(|c| c.vmread),
        vmwrite: each(|c| c.vmwrite),
        vmptrld: each(|c| c.vmptrld),
        rdmsr: each(|c| c.rdmsr),
        wrmsr: each(|c| c.wrmsr),
        entries: each(|c| c.vmlaunch + c.vmresume),
    }
}

/// None of the instructions more often than the ceiling says.
fn assert_within(found: &PerExit, ceiling: &PerExit) {
    let all = |c: &PerExit| [c.vmread, c.vmwrite, c.vmptrld, c.rdmsr, c.wrmsr, c.entries];
    let more = all(found).iter().zip(all(ceiling)).any(|(f, c)| *f > c);
    assert!(!more, "{found:?}, and not more than {ceiling:?}");
    // A count that missed them would pass as well.
    assert!(found.vmread != 0 && found.entries != 0, "{found:?}");
}

fn client() -> Client {
    let client = Client::new(&Machine::haswell());
    client.protected_mode();
    client
}

/// One RUN for each exit.
fn runs(step: fn() -> Step, status: ExitStatus) -> impl FnMut(&Client, u64) {
    move |client, exits| {
        for _ in 0..exits {
            assert_eq!(client.run([step()]), status);
        }
    }
}

#[test]
fn out() {
    let client = client();
    let found = count(&client, runs(|| Step::output(0x80, 1, 7), ExitStatus::Io));
    assert_within(&found, &cost(5, 1, 0, 2, 0));
}

#[test]
fn input() {
    let client = client();
    let found = count(&client, runs(|| Step::input(0x80, 1), ExitStatus::Io));
    assert_within(&found, &cost(5, 1, 0, 2, 0));
}

#[test]
fn cpuid() {
    let client = client();
    let found = count(&client, |client, exits| {
        client.run((0..exits).map(|_| Step::cpuid(1, 0)));
    });
    assert_within(&found, &cost(4, 1, 0, 0, 0));
}

/// The emulator reads the instruction, so there is one for each exit.
fn fill(client: &Client, instruction: &[u8]) {
    for index in 0..8 * EXITS {
        client.load(CODE + index * instruction.len() as u64, instruction);
    }
}

#[test]
fn mmio_write() {
    let client = client();
    // mov [d0000000h], eax
    fill(&client, &[0xa3, 0, 0, 0, 0xd0]);
    let step = || Step::write(DEVICE, 4, 0, 5);
    let found = count(&client, runs(step, ExitStatus::FastMmio));
    assert_within(&found, &cost(10, 1, 0, 2, 0));
}

#[test]
fn mmio_read() {
    let client = client();
    // mov eax, [d0000000h]
    fill(&client, &[0xa1, 0, 0, 0, 0xd0]);
    let step = || Step::read(DEVICE, 4, 0, 5);
    let found = count(&client, runs(step, ExitStatus::FastMmio));
    assert_within(&found, &cost(10, 1, 0, 2, 0));
}

#[test]
fn mmio_test() {
    let client = client();
    // test dword ptr [d0000000h], 1
    fill(&client, &[0xf7, 0x05, 0, 0, 0, 0xd0, 1, 0, 0, 0]);
    let step = || Step::read(DEVICE, 4, 0, 10);
    let found = count(&client, runs(step, ExitStatus::FastMmio));
    assert_within(&found, &cost(10, 1, 0, 2, 0));
}

/// Two exits to user space for one instruction.
#[test]
fn mmio_update() {
    let client = client();
    // add [d0000000h], eax
    fill(&client, &[0x01, 0x05, 0, 0, 0, 0xd0]);
    let found = count(&client, |client, exits| {
        for _ in 0..exits {
            let steps = [Step::write(DEVICE, 4, 0, 6)];
            assert_eq!(client.run(steps), ExitStatus::FastMmio);
            assert_eq!(client.run([]), ExitStatus::FastMmio);
        }
    });
    assert_within(&found, &cost(10, 1, 0, 2, 0));
}
