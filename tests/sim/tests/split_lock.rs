//! A host whose processor raises #AC for locked accesses to two cache lines: its guests go on, and the
//! host keeps its setting (that the simulator sees to).

use sim::client::Client;
use sim::{Machine, Profile, Step};

const AC: u8 = 17;
const SPLIT_LOCK_DISABLE: u64 = 1 << 29;
const MEMORY_CTRL: u32 = 0x33;
/// CR0.AM and EFLAGS.AC.
const ALIGNMENT: u64 = 1 << 18;
const GUEST_CR0: u32 = 0x6800;
const GUEST_RFLAGS: u32 = 0x6820;
const GUEST_CS_RIGHTS: u32 = 0x4816;
const GUEST_SS_RIGHTS: u32 = 0x4818;

fn client(profile: Profile) -> Client {
    let client = Client::new(&Machine::new(profile, 2));
    client.long_mode();
    client
}

/// Runs the guest; the vectors that it received.
fn vectors(client: &Client, steps: impl IntoIterator<Item = Step>) -> Vec<u8> {
    client.run(steps);
    let received = client.machine.take_received().into_iter();
    received.map(|event| event.vector).collect()
}

#[test]
fn the_guest_hears_nothing_of_it() {
    let listed = |model| {
        let mut profile = Profile::skylake_x().with_split_lock_faults(false);
        profile.cpuid.entry((1, 0)).or_default().eax = model;
        profile
    };
    for profile in [
        Profile::haswell().with_split_lock_faults(true),
        listed(0x6_06a6),
        listed(0x7_06e5),
    ] {
        let client = client(profile);
        for _ in 0..3 {
            let steps = [Step::split_lock(), Step::cpuid(0, 0), Step::split_lock()];
            assert_eq!(vectors(&client, steps), [0; 0]);
        }
        // #AC once, and then no more.
        assert_eq!(client.machine.counts().exits_of(0), 1);
        client.finish();
    }
}

#[test]
fn an_alignment_check_is_the_guests() {
    let checks = [
        (ALIGNMENT, ALIGNMENT, 3, true),
        (0, ALIGNMENT, 3, false),
        (ALIGNMENT, 0, 3, false),
        (ALIGNMENT, ALIGNMENT, 0, false),
    ];
    for (cr0, rflags, level, is_one) in checks {
        let client = client(Profile::haswell().with_split_lock_faults(true));
        let prepare = Step::act(move |guest| {
            guest.set_field(GUEST_CR0, guest.field(GUEST_CR0) | cr0);
            guest.set_field(GUEST_RFLAGS, guest.field(GUEST_RFLAGS) | rflags);
            for rights in [GUEST_CS_RIGHTS, GUEST_SS_RIGHTS] {
                guest.set_field(rights, guest.field(rights) | level << 5);
            }
        });
        let expected: &[u8] = if is_one { &[AC] } else { &[] };
        assert_eq!(vectors(&client, [prepare, Step::split_lock()]), expected);
        client.finish();
    }
}

/// What the processor cannot do is not taken back, and nothing is read to find out.
#[test]
fn without_the_register_it_is_the_guests() {
    let client = client(Profile::haswell());
    let steps = [Step::exception(AC, Some(0), 0)];
    assert_eq!(vectors(&client, steps), [AC]);
    client.finish();
}

/// Nor is another cause of #AC taken for a split lock.
#[test]
fn where_they_do_not_fault_it_is_the_guests() {
    let client = client(Profile::haswell().with_split_lock_faults(true));
    client.machine.set_msr(0, MEMORY_CTRL, 1 << 28);
    let steps = [Step::exception(AC, Some(0), 0)];
    assert_eq!(vectors(&client, steps), [AC]);
    assert_eq!(client.machine.msr(0, MEMORY_CTRL), Some(1 << 28));
    client.finish();
}

/// The guest runs on both processors, and neither loses its setting.
#[test]
fn on_each_processor_it_comes_to() {
    let client = client(Profile::haswell().with_split_lock_faults(true));
    for _ in 0..3 {
        for cpu in [0, 1] {
            client.machine.set_affinity(Some(cpu));
            assert_eq!(vectors(&client, [Step::split_lock()]), [0; 0]);
            for cpu in [0, 1] {
                let now = client.machine.msr(cpu, MEMORY_CTRL);
                assert_eq!(now, Some(SPLIT_LOCK_DISABLE));
            }
        }
    }
    client.finish();
}
