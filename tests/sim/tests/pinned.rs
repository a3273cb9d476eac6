//! Guest memory on a host that cannot report changes of it and so has it pinned. All other tests run on
//! such a host with `SIM_PIN` set.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use abi::tunnel::ExitStatus;
use sim::client::{Client, RAM_SIZE};
use sim::{Machine, Step};
use vmx::arch::addr::Hva;

const STANDALONE: u32 = 0x40;
const INVALID: u32 = 0x80;

fn client() -> Client {
    let machine = Machine::haswell();
    machine.pin_user_memory(true);
    let client = Client::new(&machine);
    client.protected_mode();
    client
}

#[test]
fn what_is_pinned_stays_whatever_the_process_does() {
    let client = client();
    assert_eq!(client.machine.pinned_frames(), 0);
    client.run([Step::write(0x9000, 4, 0x1234, 2)]);
    let pinned = client.machine.pinned_frames();
    assert_eq!(pinned as u64, RAM_SIZE.min(2 << 20) / 4096);
    // No report, and nothing to report: the guest keeps its page.
    let flushes = client.vm.memory_statistics().flushes;
    client.process.discard(Hva(client.ram.0 + 0x9000), 0x1000);
    let status = client.run([Step::read(0x9000, 4, 0x1234, 2)]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.vm.memory_statistics().flushes, flushes);
    assert_eq!(client.machine.pinned_frames(), pinned);
    let machine = client.machine.clone();
    client.finish();
    assert_eq!(machine.pinned_frames(), 0);
}

/// A vCPU writes to stand-alone memory all the time while it is unmapped and mapped; the machine looks, as
/// each frame is let go, for processors that could still reach it.
#[test]
fn a_block_is_let_go_after_the_flush() {
    const GPA: u64 = 0x100_0000;
    const SIZE: u64 = 0x8000;
    let client = client();
    let ram = client.process.map(SIZE);
    let map = || client.vm.set_ram(GPA, SIZE, ram.0, STANDALONE).unwrap();
    map();
    let (machine, vcpu) = (client.machine.clone(), client.vcpu.clone());
    let done = Arc::new(AtomicBool::new(false));
    let writes = Arc::new(AtomicU32::new(0));
    let (stop, written) = (Arc::clone(&done), Arc::clone(&writes));
    let guest = std::thread::spawn(move || {
        while !stop.load(Ordering::SeqCst) {
            machine.script((0..8).map(|n| Step::write(GPA + n * 0x1000, 4, 7, 2)));
            while machine.script_left() > 0 {
                vcpu.run().unwrap();
                written.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    let (mut seen, mut rounds) = (0, 0);
    // When the guest's thread gets to run is the scheduler's business.
    let start = Instant::now();
    while rounds < 200 || seen == 0 || writes.load(Ordering::SeqCst) == 0 {
        assert!(
            start.elapsed().as_secs() < 120,
            "never pinned, or never written to: {rounds} rounds, pinned in {seen}"
        );
        rounds += 1;
        seen += usize::from(client.machine.pinned_frames() != 0);
        client.vm.set_ram(GPA, SIZE, 0, INVALID).unwrap();
        map();
        std::thread::yield_now();
    }
    done.store(true, Ordering::SeqCst);
    guest.join().unwrap();
    client.vm.set_ram(GPA, SIZE, 0, INVALID).unwrap();
    client.finish();
}
