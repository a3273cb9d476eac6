//! How large the leaves are: large ones where they can be, small ones where they
//! must be, and large ones again.
// UNSAFETY: installs the global allocator that watches for spin locks.
#![allow(unsafe_code)]

mod memory_host;

use haxm_vmx::arch::addr::Hva;
use haxm_vmx::arch::ept::EptVpidCaps;
use haxm_vmx::memory::AddressSpace;
use memory_host::access::{ALL, GB, INVALID, MB, ROM, back, frame_at, machine};
use memory_host::{Allocator, Backing, FakeHost, PAGE};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

#[test]
fn leaves_are_as_large_as_host_processor_and_slot_allow() {
    for (caps, expected) in [
        (ALL, [0, 0, 1]),
        (EptVpidCaps::PAGE_2M, [0, 1, 0]),
        (EptVpidCaps::empty(), [1, 0, 0]),
    ] {
        let host = FakeHost::new(1);
        let space = AddressSpace::new(&host, caps, 48).unwrap();
        // One touched page is all that the test needs backed.
        let page = 0x12345;
        let backing = Backing {
            frame: 0x4_0000 * 9 + page,
            writable: true,
            shift: 30,
        };
        host.back(GB / PAGE * 3 + page, backing);
        space.add_ram_block(Hva(3 * GB), GB).unwrap();
        space.set_ram(5 * GB, GB, 3 * GB, 0).unwrap();
        let found = frame_at(&host, &space, 5 * GB + page * PAGE);
        assert_eq!(found, Some(backing.frame));
        assert_eq!(space.statistics().leaves, expected);
        // A slot that is off by a page cannot have a large leaf.
        space.set_ram(5 * GB, GB - PAGE, 3 * GB + PAGE, 0).unwrap();
        let found = frame_at(&host, &space, 5 * GB + (page - 1) * PAGE);
        assert_eq!(found, Some(backing.frame));
        assert_eq!(space.statistics().leaves, [1, 0, 0]);
        // Nor one that ends a page early one of the whole size.
        let smaller = [expected[0], expected[1] + expected[2], 0];
        space.set_ram(6 * GB - PAGE, PAGE, 0, INVALID).unwrap();
        space.set_ram(5 * GB, GB - PAGE, 3 * GB, 0).unwrap();
        frame_at(&host, &space, 5 * GB + page * PAGE);
        assert_eq!(space.statistics().leaves, smaller);
        // Nor one with a protected page somewhere else.
        space.set_ram(5 * GB, GB, 3 * GB, 0).unwrap();
        space.protect_ram(5 * GB, PAGE, 0).unwrap();
        frame_at(&host, &space, 5 * GB + page * PAGE);
        assert_eq!(space.statistics().leaves, smaller);
    }
}

#[test]
fn a_large_leaf_gives_way_to_small_ones_and_comes_back() {
    let (host, space) = machine(ALL);
    let large = |frame: u64| {
        move |page: u64| Backing {
            frame: frame + page,
            writable: true,
            shift: 21,
        }
    };
    back(&host, GB, 4 * MB, 0x10_0000, 21);
    space.add_ram_block(Hva(GB), 4 * MB).unwrap();
    space.set_ram(0, 4 * MB, GB, 0).unwrap();
    frame_at(&host, &space, MB).unwrap();
    assert_eq!(space.statistics().leaves, [0, 1, 0]);
    // One page becomes ROM: the rest is mapped by small leaves.
    space.set_ram(PAGE, PAGE, GB + PAGE, ROM).unwrap();
    frame_at(&host, &space, PAGE).unwrap();
    frame_at(&host, &space, MB).unwrap();
    assert_eq!(space.statistics().leaves, [2, 0, 0]);
    // RAM again: a fault finds that a large leaf will do, and takes the small
    // ones away.
    space.set_ram(PAGE, PAGE, GB + PAGE, 0).unwrap();
    assert_eq!(space.statistics().slots, 1);
    frame_at(&host, &space, 7 * PAGE).unwrap();
    assert_eq!(space.statistics().leaves, [0, 1, 0]);
    assert_eq!(space.statistics().tables, 3);
    // The host takes one page out of the middle (MADV_DONTNEED).
    let first = GB / PAGE;
    host.change(first + 9, first + 10, |process| {
        for page in 0..512 {
            process.get_mut(&(first + page)).unwrap().shift = 12;
        }
        process.get_mut(&(first + 9)).unwrap().frame = 0x77;
    });
    assert_eq!(space.statistics().tables, 1);
    assert_eq!(frame_at(&host, &space, 9 * PAGE), Some(0x77));
    assert_eq!(frame_at(&host, &space, 8 * PAGE), Some(0x10_0008));
    // It makes one piece of it again (khugepaged).
    host.change(first, first + 512, |process| {
        let new = large(0x20_0000);
        for page in 0..512 {
            process.insert(first + page, new(page));
        }
    });
    assert_eq!(frame_at(&host, &space, 9 * PAGE), Some(0x20_0009));
    assert_eq!(space.statistics().leaves, [0, 1, 0]);
}

/// Whether processor 0 is asked for INVEPT, which it executes.
fn flush_is_due(space: &AddressSpace<FakeHost>) -> bool {
    let flush = space.before_entry(0).unwrap();
    if let Some(flush) = flush {
        space.flushed(0, flush);
    }
    space.after_exit(0);
    flush.is_some()
}

/// What parts a large page, and ends: afterwards a page that had a small leaf all
/// the time gets the large one, though no other page is touched.
#[test]
fn a_large_leaf_comes_back_whichever_page_is_touched() {
    type Change = fn(&AddressSpace<FakeHost>);
    let part_and_mend: [(Change, Change); 5] = [
        // ROM in the middle.
        (
            |space| space.set_ram(9 * PAGE, PAGE, GB + 9 * PAGE, ROM).unwrap(),
            |space| space.set_ram(9 * PAGE, PAGE, GB + 9 * PAGE, 0).unwrap(),
        ),
        // A hole at the end.
        (
            |space| space.set_ram(MB, MB, 0, INVALID).unwrap(),
            |space| space.set_ram(MB, MB, GB + MB, 0).unwrap(),
        ),
        // Other memory in the middle, and the change back reaches beyond.
        (
            |space| space.set_ram(9 * PAGE, PAGE, GB + 5 * MB, 0).unwrap(),
            |space| space.set_ram(9 * PAGE, 3 * MB, GB + 9 * PAGE, 0).unwrap(),
        ),
        // The first page alone, and all of it.
        (
            |space| space.set_ram(PAGE, 2 * MB - PAGE, 0, INVALID).unwrap(),
            |space| space.set_ram(PAGE, 2 * MB - PAGE, GB + PAGE, 0).unwrap(),
        ),
        // Protection forbids the whole group meanwhile.
        (
            |space| space.protect_ram(9 * PAGE, PAGE, 0).unwrap(),
            |space| space.protect_ram(9 * PAGE, PAGE, 7).unwrap(),
        ),
    ];
    for (part, mend) in part_and_mend {
        let (host, space) = machine(ALL);
        back(&host, GB, 6 * MB, 0x10_0000, 21);
        space.add_ram_block(Hva(GB), 6 * MB).unwrap();
        space.set_ram(0, 4 * MB, GB, 0).unwrap();
        part(&space);
        let parted = frame_at(&host, &space, 0).is_some();
        assert_eq!(space.statistics().leaves, [u64::from(parted), 0, 0]);
        assert_eq!(space.statistics().merges, 0);
        assert!(flush_is_due(&space));
        mend(&space);
        // A processor may cache the table that goes.
        assert_eq!(flush_is_due(&space), parted);
        // No more leaves than were there before, and the table below is gone.
        assert_eq!(space.statistics().leaves, [0, 0, 0]);
        assert_eq!(space.statistics().tables, 1);
        assert_eq!(space.statistics().merges, u64::from(parted));
        assert_eq!(frame_at(&host, &space, 0), Some(0x10_0000));
        assert_eq!(space.statistics().leaves, [0, 1, 0]);
    }
}

/// The change that makes one slot of it ends in the large page, or begins in one
/// and ends in another.
#[test]
fn a_large_leaf_comes_back_at_either_end_of_the_change() {
    let (host, space) = machine(ALL);
    back(&host, GB, 8 * MB, 0x10_0000, 21);
    space.add_ram_block(Hva(GB), 8 * MB).unwrap();
    space.set_ram(0, 6 * MB, GB, 0).unwrap();
    for first in [2 * MB, 4 * MB] {
        space.set_ram(first, PAGE, GB + first, ROM).unwrap();
        frame_at(&host, &space, first + 5 * PAGE).unwrap();
    }
    assert_eq!(space.statistics().leaves, [2, 0, 0]);
    space.set_ram(MB, MB + PAGE, GB + MB, 0).unwrap();
    assert_eq!(space.statistics().leaves, [1, 0, 0]);
    // Pages that were not mapped with these two: the first half of one, the second of the other.
    space.set_ram(MB, 2 * MB, 0, INVALID).unwrap();
    frame_at(&host, &space, 0).unwrap();
    frame_at(&host, &space, 3 * MB).unwrap();
    assert_eq!(space.statistics().leaves, [3, 0, 0]);
    space.set_ram(MB, 2 * MB, GB + MB, 0).unwrap();
    assert_eq!(space.statistics().leaves, [1, 0, 0]);
    assert_eq!(space.statistics().merges, 3);
}

/// A protected page anywhere in a gigabyte keeps its one leaf away.
#[test]
fn no_huge_leaf_reaches_over_a_protected_page() {
    let (host, space) = machine(ALL);
    let backing = Backing {
        frame: 0x4_0000 * 3,
        writable: true,
        shift: 30,
    };
    host.back(GB / PAGE, backing);
    space.add_ram_block(Hva(GB), GB).unwrap();
    space.set_ram(0, GB, GB, 0).unwrap();
    space.protect_ram(700 * MB, PAGE, 0).unwrap();
    frame_at(&host, &space, 0).unwrap();
    assert_eq!(space.statistics().leaves, [0, 1, 0]);
    assert_eq!(frame_at(&host, &space, 701 * MB), None);
    // Open again, the first touch of what was closed shows that one leaf will do.
    space.protect_ram(700 * MB, PAGE, 7).unwrap();
    let opened = Backing {
        frame: backing.frame + 700 * MB / PAGE,
        ..backing
    };
    host.back((GB + 700 * MB) / PAGE, opened);
    assert_eq!(frame_at(&host, &space, 700 * MB), Some(opened.frame));
    assert_eq!(space.statistics().leaves, [0, 0, 1]);
}

/// Small leaves stay where a large one cannot be, and beside what has changed.
#[test]
fn leaves_that_cannot_be_larger_are_left_alone() {
    let (host, space) = machine(ALL);
    // The host has the first two large pages in one piece each, the third in pages.
    back(&host, GB, 4 * MB, 0x10_0000, 21);
    back(&host, GB + 4 * MB, 2 * MB, 0x20_0000, 12);
    space.add_ram_block(Hva(GB), 8 * MB).unwrap();
    space.set_ram(0, 6 * MB, GB, 0).unwrap();
    for group in 0..3 {
        let gpa = group * 2 * MB;
        space
            .set_ram(gpa + PAGE, PAGE, GB + gpa + PAGE, ROM)
            .unwrap();
        space
            .set_ram(gpa + 9 * PAGE, PAGE, GB + gpa + 9 * PAGE, ROM)
            .unwrap();
        frame_at(&host, &space, gpa).unwrap();
        // One of two obstacles goes.
        space.set_ram(gpa + PAGE, PAGE, GB + gpa + PAGE, 0).unwrap();
    }
    assert_eq!(space.statistics().leaves, [3, 0, 0]);
    // Another change beside them, of a group that stays in pieces.
    space.set_ram(6 * MB, PAGE, GB + 6 * MB, 0).unwrap();
    assert_eq!(space.statistics().leaves, [3, 0, 0]);
    // The other obstacle: where the host has pages only, nothing is gained.
    space
        .set_ram(4 * MB + 9 * PAGE, PAGE, GB + 4 * MB + 9 * PAGE, 0)
        .unwrap();
    assert_eq!(space.statistics().leaves, [3, 0, 0]);
    frame_at(&host, &space, 4 * MB).unwrap();
    frame_at(&host, &space, 5 * MB).unwrap();
    assert_eq!(space.statistics().leaves, [4, 0, 0]);
    // In protected memory nothing is mapped that could be merged.
    space.protect_ram(2 * MB, PAGE, 0).unwrap();
    space
        .set_ram(2 * MB + 9 * PAGE, PAGE, GB + 2 * MB + 9 * PAGE, 0)
        .unwrap();
    assert_eq!(space.statistics().leaves, [3, 0, 0]);
    assert_eq!(space.statistics().merges, 0);
}

/// The same with 1 GB: leaves of 2 MB beside a page that is ROM for a while.
#[test]
fn a_huge_leaf_comes_back() {
    let (host, space) = machine(ALL);
    for page in [0, 512] {
        let frame = 0x4_0000 * 3 + page;
        host.back(
            GB / PAGE + page,
            Backing {
                frame,
                writable: true,
                shift: 30,
            },
        );
    }
    space.add_ram_block(Hva(GB), GB).unwrap();
    space.set_ram(0, GB, GB, 0).unwrap();
    space.set_ram(9 * PAGE, PAGE, GB + 9 * PAGE, ROM).unwrap();
    frame_at(&host, &space, 0).unwrap();
    frame_at(&host, &space, 2 * MB).unwrap();
    assert_eq!(space.statistics().leaves, [1, 1, 0]);
    space.set_ram(9 * PAGE, PAGE, GB + 9 * PAGE, 0).unwrap();
    assert_eq!(space.statistics().tables, 1);
    frame_at(&host, &space, 2 * MB).unwrap();
    assert_eq!(space.statistics().leaves, [0, 0, 1]);
}
