//! What a fault maps besides the touched page, and guest RAM on hosts that pin it.
// UNSAFETY: installs the global allocator that watches for spin locks.
#![allow(unsafe_code)]

mod memory_host;

use haxm_vmx::Error;
use haxm_vmx::arch::addr::{Gpa, Hva};
use haxm_vmx::arch::ept::EptVpidCaps;
use haxm_vmx::memory::{Access, AddressSpace, FaultOutcome, Reserve};
use memory_host::access::{GB, INVALID, MB, ROM, STANDALONE, back, fault, frame_at, machine};
use memory_host::{Allocator, Backing, FakeHost, PAGE};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// Without accessed and dirty flags.
const PLAIN: EptVpidCaps = EptVpidCaps::PAGE_2M.union(EptVpidCaps::PAGE_1G);

fn pinning_machine() -> (FakeHost, AddressSpace<FakeHost>) {
    let host = FakeHost::pinning(4);
    let space = AddressSpace::new(&host, PLAIN, 48).unwrap();
    (host, space)
}

/// The touched page, and those around it that the host has already: at most
/// 256 KB, within the slot, none that is absent, moving, or of larger pages.
#[test]
fn a_fault_maps_the_pages_around_that_are_there() {
    let (host, space) = machine(PLAIN);
    let first = GB / PAGE;
    back(&host, GB, 2 * MB, 0x10_0000, 12);
    host.0.resident.lock().unwrap().extend(first..first + 512);
    host.0.resident.lock().unwrap().remove(&(first + 70));
    space.add_ram_block(Hva(GB), 2 * MB).unwrap();
    // Guest page 66 is the first of the slot, in the second 256 KB; it ends at 200.
    let from = 66 * PAGE;
    space.set_ram(from, 134 * PAGE, GB + from, 0).unwrap();
    assert_eq!(
        fault(&space, 100 * PAGE, Access::WRITE),
        Ok(FaultOutcome::Mapped)
    );
    for page in 0..512 {
        let found = host.translate(space.eptp(), page * PAGE);
        let expected = (66..128).contains(&page) && page != 70;
        assert_eq!(
            found.map(|f| f.0),
            expected.then_some(0x10_0000 + page),
            "{page}"
        );
    }
    assert_eq!(space.statistics().leaves, [61, 0, 0]);
    // The upper end of the slot.
    assert_eq!(
        fault(&space, 199 * PAGE, Access::READ),
        Ok(FaultOutcome::Mapped)
    );
    assert_eq!(space.statistics().leaves, [61 + 8, 0, 0]);
    // The one that was absent alone, nothing around it is lost.
    assert_eq!(
        fault(&space, 70 * PAGE, Access::READ),
        Ok(FaultOutcome::Mapped)
    );
    assert_eq!(space.statistics().leaves, [61 + 9, 0, 0]);
    assert_eq!(host.0.asked.lock().unwrap().as_slice(), [(first + 70, 1)]);
}

/// What the host lets be read only is mapped for reading only, around a page
/// that is written too; and everything in a read-only slot is.
#[test]
fn pages_around_have_the_rights_that_the_host_gives() {
    let (host, space) = machine(PLAIN);
    let first = GB / PAGE;
    back(&host, GB, MB, 0x10_0000, 12);
    for page in [first + 3, first + 5] {
        let shared = Backing {
            writable: false,
            ..host.backing(page).unwrap()
        };
        host.back(page, shared);
    }
    host.0.resident.lock().unwrap().extend(first..first + 256);
    space.add_ram_block(Hva(GB), MB).unwrap();
    space.set_ram(0, MB / 2, GB, 0).unwrap();
    space.set_ram(MB / 2, MB / 2, GB + MB / 2, ROM).unwrap();
    assert_eq!(fault(&space, 0, Access::WRITE), Ok(FaultOutcome::Mapped));
    assert_eq!(
        fault(&space, MB / 2, Access::READ),
        Ok(FaultOutcome::Mapped)
    );
    for page in (0..64).chain(128..192) {
        let (_, entry) = host.translate(space.eptp(), page * PAGE).unwrap();
        let writable = page < 64 && page != 3 && page != 5;
        assert_eq!(entry & 2 != 0, writable, "{page}");
    }
    assert_eq!(fault(&space, 3 * PAGE, Access::WRITE), Err(Error::Fault));
}

/// What the host said of the pages around is as old as what it said of the
/// touched one, and is dropped for the same reasons.
#[test]
fn pages_around_that_change_meanwhile_are_not_mapped() {
    let (host, space) = machine(PLAIN);
    let first = GB / PAGE;
    back(&host, GB, MB, 0x10_0000, 12);
    host.0.resident.lock().unwrap().extend(first..first + 256);
    space.add_ram_block(Hva(GB), MB).unwrap();
    space.set_ram(0, MB, GB, 0).unwrap();
    let mut reserve = Reserve::new();
    let mut try_fault = |interlude: memory_host::Interlude| {
        *host.0.interlude.lock().unwrap() = Some(interlude);
        space.fault(Gpa(PAGE), Access::READ, &mut reserve).unwrap()
    };
    // One has moved.
    let moved = try_fault(Box::new(move |host| {
        host.change(first + 9, first + 10, |process| {
            process.get_mut(&(first + 9)).unwrap().frame = 0x99;
        });
    }));
    assert_eq!(moved, FaultOutcome::Retry);
    assert_eq!(space.statistics().leaves, [0; 3]);
    // One is moving: the touched page is not concerned, those around it stay out.
    let neighbour = (Hva((first + 9) * PAGE), Hva((first + 10) * PAGE));
    let moving = try_fault(Box::new(move |host| {
        host.report(|listener| listener.begin(neighbour.0, neighbour.1));
    }));
    assert_eq!(moving, FaultOutcome::Mapped);
    assert_eq!(space.statistics().leaves, [1, 0, 0]);
    host.report(|listener| listener.end(neighbour.0, neighbour.1));
    // A page discarded afterwards is only faulted again.
    assert_eq!(frame_at(&host, &space, 2 * PAGE), Some(0x10_0002));
    assert!(host.translate(space.eptp(), 5 * PAGE).is_some());
    host.change(first + 5, first + 6, |process| {
        process.get_mut(&(first + 5)).unwrap().frame = 0x77;
    });
    assert_eq!(host.translate(space.eptp(), 5 * PAGE), None);
    assert_eq!(frame_at(&host, &space, 5 * PAGE), Some(0x77));
}

/// Pages touched one after the other are brought in more and more at a time;
/// pages touched in no order one by one.
#[test]
fn pages_are_brought_in_ahead_of_a_run_of_touches() {
    let (host, space) = machine(PLAIN);
    let first = GB / PAGE;
    back(&host, GB, 4 * MB, 0x10_0000, 12);
    space.add_ram_block(Hva(GB), 4 * MB).unwrap();
    space.set_ram(0, MB, GB, 0).unwrap();
    space.set_ram(MB, PAGE, GB + 2 * MB, ROM).unwrap();
    let mut reserve = Reserve::new();
    let mut touch = |page: u64| {
        if host.translate(space.eptp(), page * PAGE).is_none() {
            let outcome = space.fault(Gpa(page * PAGE), Access::READ, &mut reserve);
            assert_eq!(outcome, Ok(FaultOutcome::Mapped), "{page}");
        }
    };
    let asked = || std::mem::take(&mut *host.0.asked.lock().unwrap());
    let counts = |asked: Vec<(u64, u64)>| -> Vec<u64> { asked.iter().map(|a| a.1).collect() };
    for page in [200, 130, 77, 140, 90] {
        touch(page);
    }
    assert_eq!(counts(asked()), [1; 5]);
    // Two runs at once, one through what was touched already; each stops at 256 KB.
    for page in 0..64 {
        touch(page);
        touch(page + 64);
    }
    let (low, high): (Vec<_>, Vec<_>) = asked().into_iter().partition(|a| a.0 < first + 64);
    assert_eq!(counts(low), [1, 2, 4, 8, 16, 32, 1]);
    assert_eq!(high.iter().map(|a| a.1).max(), Some(32));
    assert!(high.iter().all(|a| a.0 + a.1 <= first + 128));
    // The end of the slot, and ROM behind it.
    for page in 192..257 {
        touch(page);
    }
    let asked = asked();
    assert!(
        asked
            .iter()
            .all(|a| a.0 + a.1 <= first + 256 || a.0 == first + 512)
    );
    assert_eq!(asked.last(), Some(&(first + 512, 1)));
    let resident = host.0.resident.lock().unwrap().len();
    // Both runs, the two single touches, the last 256 KB and the page of ROM.
    assert_eq!(resident, 128 + 2 + 64 + 1);
}

/// The first touch pins 2 MB, as far as the slot reaches; what is pinned stays
/// until the block goes, and then goes at once.
#[test]
fn a_touch_pins_a_piece_that_goes_with_its_block() {
    let (host, space) = pinning_machine();
    let first = GB / PAGE;
    back(&host, GB, 8 * MB, 0x10_0000, 12);
    let flags = STANDALONE;
    space.set_ram(MB, 5 * MB, GB + MB, flags).unwrap();
    assert_eq!(host.pinned(), []);
    assert_eq!(frame_at(&host, &space, MB), Some(0x10_0100));
    // From the slot's start to the end of the 2 MB.
    assert_eq!(
        host.pinned(),
        (first + 256..first + 512).collect::<Vec<_>>()
    );
    assert_eq!(space.statistics().leaves, [64, 0, 0]);
    assert_eq!(frame_at(&host, &space, 3 * MB), Some(0x10_0300));
    assert_eq!(space.statistics().leaves, [64, 1, 0]);
    assert_eq!(space.statistics().pinned, 256 + 512);
    // A part goes: nothing is let go, and it comes back the same, though the
    // process has something else there by now.
    space.set_ram(2 * MB, 2 * MB, 0, INVALID).unwrap();
    assert_eq!(space.statistics().pinned, 256 + 512);
    back(&host, GB, 8 * MB, 0x20_0000, 12);
    assert_eq!(frame_at(&host, &space, MB + PAGE), Some(0x10_0101));
    assert_eq!(frame_at(&host, &space, 5 * MB), Some(0x20_0500));
    // The last slot goes.
    space.set_ram(4 * MB, 2 * MB, 0, INVALID).unwrap();
    assert_eq!(space.statistics().pinned, 256 + 512 + 512);
    space.set_ram(MB, MB, 0, INVALID).unwrap();
    assert_eq!((host.pinned(), space.statistics().pinned), (vec![], 0));
    // Anew, from what is there now.
    space.set_ram(MB, 5 * MB, GB + MB, flags).unwrap();
    assert_eq!(frame_at(&host, &space, MB), Some(0x20_0100));
}

/// Ordinary blocks are pinned until the VM goes, once, whatever slots name them.
#[test]
fn an_ordinary_block_stays_pinned() {
    let (host, space) = pinning_machine();
    back(&host, GB, 4 * MB, 0x10_0000, 12);
    space.add_ram_block(Hva(GB), 4 * MB).unwrap();
    // Two slots that share a 2 MB piece of the client's memory, and an alias.
    space.set_ram(0, MB, GB, 0).unwrap();
    space.set_ram(16 * MB, 3 * MB, GB + MB, 0).unwrap();
    space.set_ram(32 * MB, 4 * MB, GB, ROM).unwrap();
    assert_eq!(frame_at(&host, &space, 0), Some(0x10_0000));
    assert_eq!(space.statistics().pinned, 256);
    assert_eq!(frame_at(&host, &space, 32 * MB + MB), Some(0x10_0100));
    assert_eq!(frame_at(&host, &space, 16 * MB), Some(0x10_0100));
    assert_eq!(frame_at(&host, &space, 17 * MB), Some(0x10_0200));
    assert_eq!(space.statistics().pinned, 1024);
    assert_eq!(
        fault(&space, 32 * MB, Access::WRITE),
        Ok(FaultOutcome::RomWrite)
    );
    space.set_ram(0, 64 * MB, 0, INVALID).unwrap();
    assert_eq!(host.pinned().len(), 1024);
    drop(space);
    assert_eq!((host.pinned(), host.pages()), (vec![], 0));
}

/// Where not all of a piece can be had, the touched page alone is pinned.
#[test]
fn a_hole_in_the_piece_does_not_matter() {
    let (host, space) = pinning_machine();
    let first = GB / PAGE;
    back(&host, GB, 2 * MB, 0x10_0000, 12);
    host.change(first + 9, first + 10, |process| {
        process.remove(&(first + 9));
    });
    space.set_ram(0, 2 * MB, GB, STANDALONE).unwrap();
    assert_eq!(frame_at(&host, &space, 8 * PAGE), Some(0x10_0008));
    assert_eq!(fault(&space, 9 * PAGE, Access::READ), Err(Error::Fault));
    assert_eq!(host.pinned(), [first + 8]);
    // What is below it is whole.
    assert_eq!(frame_at(&host, &space, 0), Some(0x10_0000));
    assert_eq!(host.pinned(), (first..first + 9).collect::<Vec<_>>());
}

/// A slot that ends while a piece of it is being pinned takes that with it; a
/// piece that two vCPUs pin at once is pinned once.
#[test]
fn what_was_pinned_for_nothing_is_let_go() {
    let (host, space) = pinning_machine();
    back(&host, GB, 2 * MB, 0x10_0000, 12);
    let space = std::sync::Arc::new(space);
    space.set_ram(0, 2 * MB, GB, STANDALONE).unwrap();
    let ended = space.clone();
    *host.0.interlude.lock().unwrap() = Some(Box::new(move |_| {
        ended.set_ram(0, 2 * MB, 0, INVALID).unwrap();
    }));
    let outcome = space.fault(Gpa(0), Access::READ, &mut Reserve::new());
    assert_eq!(outcome, Ok(FaultOutcome::Retry));
    assert_eq!(host.pinned(), []);
    space.set_ram(0, 2 * MB, GB, STANDALONE).unwrap();
    let other = space.clone();
    *host.0.interlude.lock().unwrap() = Some(Box::new(move |_| {
        let outcome = other.fault(Gpa(8 * PAGE), Access::WRITE, &mut Reserve::new());
        assert_eq!(outcome, Ok(FaultOutcome::Mapped));
    }));
    let outcome = space.fault(Gpa(0), Access::READ, &mut Reserve::new());
    assert_eq!(outcome, Ok(FaultOutcome::Mapped));
    assert_eq!(space.statistics().pinned, 512);
    assert_eq!(space.statistics().leaves, [0, 1, 0]);
    space.set_ram(0, 2 * MB, 0, INVALID).unwrap();
    assert_eq!(host.pinned(), []);
}
