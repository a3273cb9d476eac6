//! The memory manager at its limits: no memory, and very many slots.
// UNSAFETY: installs the global allocator that fails on demand.
#![allow(unsafe_code)]

mod memory_host;

use std::time::{Duration, Instant};

use haxm_vmx::Error;
use haxm_vmx::arch::addr::{Gpa, Hva};
use haxm_vmx::memory::{Access, AddressSpace, FaultOutcome, Reserve};
use memory_host::access::{ALL, GB, INVALID, MB, STANDALONE};
use memory_host::{Allocator, Backing, FakeHost, PAGE, with_failure};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// Every allocation of every call fails once; nothing changes, nothing leaks.
#[test]
fn a_call_that_lacks_memory_changes_nothing() {
    let host = FakeHost::new(2);
    let mut fail_in = 0;
    let space = loop {
        let (space, failed) = with_failure(Some(fail_in), || AddressSpace::new(&host, ALL, 48));
        match space {
            Ok(space) => break space,
            Err(error) => {
                assert!(failed && error == Error::NoMemory);
                assert_eq!(host.pages(), 0);
            }
        }
        fail_in += 1;
    };
    assert!(fail_in >= 14, "only {fail_in} allocations");
    for page in 0..MB / PAGE {
        let backing = Backing {
            frame: 0x1000 + page,
            writable: true,
            shift: 12,
        };
        host.back(GB / PAGE + page, backing);
    }
    space.add_ram_block(Hva(GB), MB).unwrap();
    space.set_ram(0, MB, GB, 0).unwrap();
    space.protect_ram(0, MB, 0).unwrap();
    space.protect_ram(0, MB, 7).unwrap();
    type Call<'a> = &'a dyn Fn(&AddressSpace<FakeHost>) -> Result<(), Error>;
    let mapped = |space: &AddressSpace<FakeHost>| {
        let mut reserve = Reserve::new();
        space
            .fault(Gpa(0x5000), Access::WRITE, &mut reserve)
            .map(|outcome| {
                assert_eq!(outcome, FaultOutcome::Mapped);
            })
    };
    let calls: [(&str, Call<'_>, u32); 5] = [
        ("fault", &mapped, 9),
        (
            "cut in two",
            // The upper rest's nodes are left over from the first mapping.
            &|space| space.set_ram(0x8000, PAGE, 2 * GB, STANDALONE),
            3,
        ),
        ("unmap", &|space| space.set_ram(0, PAGE, 0, INVALID), 3),
        (
            "add block",
            &|space| space.add_ram_block(Hva(3 * GB), MB),
            1,
        ),
        ("protect", &|space| space.protect_ram(0x6000, PAGE, 0), 1),
    ];
    for (name, call, least) in calls {
        let before = space.statistics();
        let mut fail_in = 0;
        loop {
            let (result, failed) = with_failure(Some(fail_in), || call(&space));
            if !failed {
                assert_eq!(result, Ok(()), "{name}");
                break;
            }
            assert_eq!(result, Err(Error::NoMemory), "{name}");
            assert_eq!(space.statistics(), before, "{name}");
            assert_eq!(host.pages(), before.tables as usize, "{name}");
            fail_in += 1;
        }
        assert!(fail_in >= least, "{name}: only {fail_in} allocations");
    }
    drop(space);
    assert_eq!(host.pages(), 0);
}

/// Time for one map and unmap with `slots` slots in place, the best of a few.
fn map_and_unmap(slots: u64) -> Duration {
    let host = FakeHost::new(1);
    let space = AddressSpace::new(&host, ALL, 48).unwrap();
    space
        .add_ram_block(Hva(GB), 2 * PAGE * (slots + 1))
        .unwrap();
    for slot in 0..slots {
        // Every other page, so that no two slots become one.
        let offset = slot.wrapping_mul(0x9e37_79b1) % slots * 2 * PAGE;
        space.set_ram(offset, PAGE, GB + offset, 0).unwrap();
    }
    let present = space.statistics().slots as u64;
    assert!(present > slots / 2);
    let mut best = Duration::MAX;
    for round in 0..20 {
        let start = Instant::now();
        for i in 0..50 {
            let offset = (round * 50 + i) * 7919 % slots * 2 * PAGE + PAGE;
            space.set_ram(offset, PAGE, GB, 0).unwrap();
            space.set_ram(offset, PAGE, 0, INVALID).unwrap();
        }
        best = best.min(start.elapsed());
    }
    assert_eq!(space.statistics().slots as u64, present);
    best / 50
}

#[test]
fn a_hundred_thousand_slots_cost_little_more_than_a_hundred() {
    let few = map_and_unmap(100);
    let many = map_and_unmap(100_000);
    // By looking at each it would be a thousand times as much. Less than ten it is, but for what else goes on here.
    assert!(
        many < few * 50,
        "{many:?} with 100,000 slots, {few:?} with 100"
    );
}
