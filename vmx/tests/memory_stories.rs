//! The memory manager in named situations: what clients do, what HAXM got
//! wrong, and what the host may do meanwhile.
// UNSAFETY: installs the global allocator that fails on demand.
#![allow(unsafe_code)]

mod memory_host;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use haxm_vmx::Error;
use haxm_vmx::arch::addr::{Gpa, Hva};
use haxm_vmx::memory::{Access, AccessError, FaultOutcome, Reserve};
use memory_host::access::{ALL, GB, INVALID, MB, ROM, STANDALONE, back, fault, frame_at, machine};
use memory_host::{Allocator, PAGE, after_spins};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// The story this project started from: the Android Emulator maps short-lived
/// buffers, and the second overlaps the first in the client's memory.
#[test]
fn a_standalone_buffer_can_be_mapped_unmapped_and_mapped_from_an_overlapping_one() {
    let (host, space) = machine(ALL);
    let (gpa, size) = (0x7dffff000, 512 * MB);
    for (number, hva) in [0x14e070000, 0x14de70000, 0x14e070000]
        .into_iter()
        .enumerate()
    {
        let frame = 0x100_0000 * (number as u64 + 1);
        // Only what is touched needs backing.
        for offset in [0, 256 * MB, size - PAGE] {
            back(&host, hva + offset, PAGE, frame + offset / PAGE, 12);
        }
        space.set_ram(gpa, size, hva, STANDALONE).unwrap();
        assert_eq!(space.statistics().blocks, 1);
        for offset in [0, 256 * MB, size - PAGE] {
            let found = frame_at(&host, &space, gpa + offset);
            assert_eq!(found, Some(frame + offset / PAGE));
        }
        // Both ends belong to the buffer, and nothing beyond them.
        assert_eq!(
            fault(&space, gpa - PAGE, Access::READ),
            Ok(FaultOutcome::Mmio)
        );
        assert_eq!(
            fault(&space, gpa + size, Access::READ),
            Ok(FaultOutcome::Mmio)
        );
        space.set_ram(gpa, size, 0, INVALID).unwrap();
        let after = space.statistics();
        assert_eq!((after.blocks, after.slots, after.tables), (0, 0, 1));
        assert_eq!(fault(&space, gpa, Access::WRITE), Ok(FaultOutcome::Mmio));
    }
    drop(space);
    assert_eq!(host.pages(), 0);
}

#[test]
fn a_standalone_block_lives_as_long_as_a_slot_uses_it() {
    let (_host, space) = machine(ALL);
    let (gpa, va) = (0x10_0000, 0x4000_0000);
    space.set_ram(gpa, 16 * PAGE, va, STANDALONE).unwrap();
    // The same memory cannot be a block twice.
    let again = space.set_ram(4 * GB, 16 * PAGE, va, STANDALONE);
    assert_eq!(again, Err(Error::Invalid));
    assert_eq!(
        space.add_ram_block(Hva(va + PAGE), PAGE),
        Err(Error::Invalid)
    );
    // An ordinary mapping may point into it and keeps it.
    space.set_ram(GB, PAGE, va + 4 * PAGE, 0).unwrap();
    // A hole in the middle makes two slots of one.
    space.set_ram(gpa + 4 * PAGE, PAGE, 0, INVALID).unwrap();
    assert_eq!(space.statistics().slots, 3);
    space.set_ram(gpa, 16 * PAGE, 0, INVALID).unwrap();
    assert_eq!(space.statistics().blocks, 1);
    space.set_ram(GB, PAGE, 0, INVALID).unwrap();
    assert_eq!(space.statistics().blocks, 0);
    space.add_ram_block(Hva(va + PAGE), PAGE).unwrap();
    // Two blocks side by side do not become one slot.
    space.set_ram(gpa, PAGE, va + 2 * PAGE, STANDALONE).unwrap();
    space
        .set_ram(gpa + PAGE, PAGE, va + 3 * PAGE, STANDALONE)
        .unwrap();
    assert_eq!(space.statistics().slots, 2);
}

#[test]
fn an_ordinary_block_stays_when_its_last_slot_goes() {
    let (_host, space) = machine(ALL);
    space.add_ram_block(Hva(GB), MB).unwrap();
    space.set_ram(0, MB, GB, 0).unwrap();
    space.set_ram(0, MB, 0, INVALID).unwrap();
    space.set_ram(0, MB, GB, 0).unwrap();
    // Unmapping what was never mapped is no error.
    space.set_ram(GB, MB, 0, INVALID).unwrap();
}

/// HAXM kept the old buffer when a mapped range was mapped to another.
#[test]
fn a_remap_takes_effect() {
    let (host, space) = machine(ALL);
    let (old, new) = (GB, 2 * GB);
    back(&host, old, MB, 0x1000, 12);
    back(&host, new, MB, 0x8000, 12);
    space.add_ram_block(Hva(old), MB).unwrap();
    space.add_ram_block(Hva(new), MB).unwrap();
    space.set_ram(0, MB, old, 0).unwrap();
    assert_eq!(frame_at(&host, &space, 5 * PAGE), Some(0x1005));
    space.set_ram(0, MB, new, 0).unwrap();
    assert_eq!(frame_at(&host, &space, 5 * PAGE), Some(0x8005));
    // Shifted within the same buffer.
    space.set_ram(0, MB / 2, new + 8 * PAGE, 0).unwrap();
    assert_eq!(frame_at(&host, &space, 5 * PAGE), Some(0x800d));
    // Back to stand-alone memory, whose block is new.
    back(&host, 3 * GB, PAGE, 0x9000, 12);
    space.set_ram(5 * PAGE, PAGE, 3 * GB, STANDALONE).unwrap();
    assert_eq!(frame_at(&host, &space, 5 * PAGE), Some(0x9000));
    assert_eq!(frame_at(&host, &space, 4 * PAGE), Some(0x800c));
}

#[test]
fn a_write_to_rom_is_for_the_device_whatever_made_the_mapping() {
    let (host, space) = machine(ALL);
    back(&host, GB, MB, 0x1000, 12);
    for flags in [ROM, ROM | STANDALONE] {
        if flags == ROM {
            space.add_ram_block(Hva(GB), PAGE).unwrap();
            space.set_ram(0, PAGE, GB, flags).unwrap();
        } else {
            space.set_ram(0, PAGE, GB + PAGE, flags).unwrap();
        }
        assert_eq!(fault(&space, 8, Access::FETCH), Ok(FaultOutcome::Mapped));
        assert_eq!(fault(&space, 8, Access::WRITE), Ok(FaultOutcome::RomWrite));
        assert_eq!(
            space.write(Gpa(8), &[1]),
            Err(AccessError::RomWrite(Gpa(8)))
        );
        assert_eq!(space.read(Gpa(8), &mut [0; 4]), Ok(()));
    }
}

#[test]
fn hostile_arguments_are_refused() {
    let (_host, space) = machine(ALL);
    space.add_ram_block(Hva(GB), MB).unwrap();
    let top = 1u64 << 48;
    for (gpa, size, va, flags) in [
        (0, MB, GB, 2),
        (0, MB, GB, 0x100),
        (0, MB, 0, 0),
        (0, MB, 0, STANDALONE),
        (0, 0, GB, 0),
        (1, MB, GB, 0),
        (0, MB - 1, GB, 0),
        (0, PAGE, GB + 8, 0),
        (0, MB + PAGE, GB, 0),
        (0, 2 * PAGE, GB + MB - PAGE, 0),
        (0, MB, 2 * GB, 0),
        (0, MB, GB, INVALID),
        (0, MB, 0, INVALID | STANDALONE),
        (0, MB, 0, INVALID | ROM),
        (top - PAGE, 2 * PAGE, GB, 0),
        (top, PAGE, 0, INVALID),
        (u64::MAX - PAGE + 1, PAGE, GB, 0),
        (PAGE, u64::MAX - PAGE + 1, GB, 0),
        (0, 2 * PAGE, u64::MAX - PAGE + 1, STANDALONE),
    ] {
        let result = space.set_ram(gpa, size, va, flags);
        assert_eq!(
            result,
            Err(Error::Invalid),
            "{gpa:#x} {size:#x} {va:#x} {flags:#x}"
        );
    }
    for (start, size) in [
        (0, MB),
        (GB, 0),
        (GB + 1, MB),
        (3 * GB, 1),
        (GB - MB, MB + PAGE),
        (u64::MAX - PAGE + 1, 2 * PAGE),
    ] {
        let result = space.add_ram_block(Hva(start), size);
        assert_eq!(result, Err(Error::Invalid), "{start:#x} {size:#x}");
    }
    // Nothing named yet, so nothing to protect.
    assert_eq!(space.protect_ram(0, PAGE, 0), Err(Error::Invalid));
    space.set_ram(0, MB, GB, 0).unwrap();
    for (gpa, size, flags) in [
        (0, 0, 0),
        (0, PAGE, 1),
        (0, PAGE, 6),
        (1, PAGE, 0),
        (0, PAGE + 1, 0),
        (MB, PAGE, 0),
        (PAGE, u64::MAX - PAGE + 1, 0),
    ] {
        let result = space.protect_ram(gpa, size, flags);
        assert_eq!(result, Err(Error::Invalid), "{gpa:#x} {size:#x} {flags}");
    }
    // The bits above the permissions mean nothing.
    assert_eq!(space.protect_ram(0, PAGE, 0x10), Ok(()));
    assert_eq!(space.statistics().protected_ranges, 1);
}

/// Snapshot loading on demand: protect everything, then open group by group.
#[test]
fn protection_works_in_groups_of_two_megabytes() {
    let (host, space) = machine(ALL);
    back(&host, GB, 8 * MB, 0x1000, 12);
    space.add_ram_block(Hva(GB), 8 * MB).unwrap();
    space.set_ram(0, 8 * MB, GB, 0).unwrap();
    assert!(frame_at(&host, &space, 3 * MB).is_some());
    space.protect_ram(0, 8 * MB, 0).unwrap();
    assert_eq!(space.statistics().protected_ranges, 1);
    assert_eq!(space.statistics().tables, 1);
    let blocked = |first| Ok(FaultOutcome::Protected { gpa: Gpa(first) });
    assert_eq!(fault(&space, 3 * MB, Access::READ), blocked(2 * MB));
    assert_eq!(
        space.read(Gpa(3 * MB), &mut [0; 8]),
        Err(AccessError::Protected(Gpa(2 * MB)))
    );
    space.protect_ram(2 * MB, 2 * MB, 7).unwrap();
    assert_eq!(
        fault(&space, 3 * MB, Access::WRITE),
        Ok(FaultOutcome::Mapped)
    );
    assert_eq!(fault(&space, 4 * MB, Access::WRITE), blocked(4 * MB));
    // One page left protected holds up its whole group.
    space.protect_ram(4 * MB, 2 * MB, 7).unwrap();
    space.protect_ram(5 * MB, PAGE, 0).unwrap();
    assert_eq!(fault(&space, 4 * MB, Access::FETCH), blocked(5 * MB));
    space.protect_ram(0, 8 * MB, 7).unwrap();
    assert_eq!(space.statistics().protected_ranges, 0);
    assert_eq!(
        fault(&space, 4 * MB, Access::FETCH),
        Ok(FaultOutcome::Mapped)
    );
}

#[test]
fn what_changed_during_a_fault_is_not_mapped() {
    let (host, space) = machine(ALL);
    back(&host, GB, 2 * MB, 0x10_0000, 21);
    space.add_ram_block(Hva(GB), 4 * MB).unwrap();
    space.set_ram(0, 2 * MB, GB, 0).unwrap();
    let first = GB / PAGE;
    let mut reserve = Reserve::new();
    let mut try_fault = |interlude: memory_host::Interlude| {
        *host.0.interlude.lock().unwrap() = Some(interlude);
        let outcome = space.fault(Gpa(PAGE), Access::READ, &mut reserve).unwrap();
        (outcome, host.translate(space.eptp(), PAGE))
    };
    // The page moves after the host has said where it is.
    let moved = try_fault(Box::new(move |host| {
        host.change(first + 1, first + 2, |process| {
            process.get_mut(&(first + 1)).unwrap().frame = 0x99;
            process.get_mut(&(first + 1)).unwrap().shift = 12;
        });
    }));
    assert_eq!(moved, (FaultOutcome::Retry, None));
    // It is still moving when the fault comes to its end.
    let moving = try_fault(Box::new(move |host| {
        host.report(|listener| listener.begin(Hva((first + 1) * PAGE), Hva((first + 2) * PAGE)));
    }));
    assert_eq!(moving, (FaultOutcome::Retry, None));
    host.report(|listener| listener.end(Hva((first + 1) * PAGE), Hva((first + 2) * PAGE)));
    assert_eq!(frame_at(&host, &space, PAGE), Some(0x99));
    // A neighbour is moving: the page may be mapped, but not as a large leaf,
    // which would reach it.
    let neighbour = (Hva((first + 9) * PAGE), Hva((first + 10) * PAGE));
    host.change(first, first + 512, |_| {});
    *host.0.interlude.lock().unwrap() = Some(Box::new(move |host| {
        host.report(|listener| listener.begin(neighbour.0, neighbour.1));
    }));
    let outcome = space.fault(Gpa(2 * PAGE), Access::READ, &mut reserve);
    assert_eq!(outcome, Ok(FaultOutcome::Mapped));
    assert_eq!(space.statistics().leaves, [1, 0, 0]);
    assert_eq!(host.translate(space.eptp(), 9 * PAGE), None);
    host.report(|listener| listener.end(neighbour.0, neighbour.1));
}

/// A client page that many guest pages are aliases of: one report takes them
/// all away.
#[test]
fn an_invalidation_reaches_every_alias() {
    let (host, space) = machine(ALL);
    back(&host, GB, PAGE, 0x1000, 12);
    space.add_ram_block(Hva(GB), PAGE).unwrap();
    for alias in 0..300 {
        space.set_ram(2 * alias * PAGE, PAGE, GB, 0).unwrap();
        assert_eq!(frame_at(&host, &space, 2 * alias * PAGE), Some(0x1000));
    }
    assert_eq!(space.statistics().leaves, [300, 0, 0]);
    host.change(GB / PAGE, GB / PAGE + 1, |_| {});
    assert_eq!(space.statistics().leaves, [0, 0, 0]);
}

/// The client changes the map while a fault is between its two looks at it.
/// An invalidation goes on from slot to slot, by the client's addresses, and lets others in
/// between. There a slot may become part of one that it has passed.
#[test]
fn an_invalidation_reaches_a_slot_that_joins_one_behind_it() {
    let (host, space) = machine(ALL);
    let space = Arc::new(space);
    back(&host, GB, 4 * PAGE, 0x1000, 12);
    space.add_ram_block(Hva(GB), 4 * PAGE).unwrap();
    // Two pages with a hole between them, and 63 aliases before the second.
    space.set_ram(0, PAGE, GB, 0).unwrap();
    space.set_ram(2 * PAGE, PAGE, GB + 2 * PAGE, 0).unwrap();
    for alias in 1..63 {
        space.set_ram(alias * MB, PAGE, GB, 0).unwrap();
    }
    space.set_ram(63 * MB, PAGE, GB + PAGE, 0).unwrap();
    assert_eq!(frame_at(&host, &space, 2 * PAGE), Some(0x1002));
    let change = {
        let space = space.clone();
        move || space.set_ram(PAGE, PAGE, GB + PAGE, 0).unwrap()
    };
    // After the range is marked and the first 64 slots are through.
    after_spins(2, change);
    host.report(|listener| {
        listener.begin(Hva(GB), Hva(GB + 4 * PAGE));
        assert_eq!(space.statistics().slots, 64, "the hole was not filled");
        let left = host.translate(space.eptp(), 2 * PAGE);
        assert_eq!(left, None, "the guest still has the page");
        listener.end(Hva(GB), Hva(GB + 4 * PAGE));
    });
}

#[test]
fn a_slot_that_changed_during_a_fault_is_not_mapped() {
    let (host, space) = machine(ALL);
    back(&host, GB, MB, 0x1000, 12);
    space.add_ram_block(Hva(GB), MB).unwrap();
    let space = Arc::new(space);
    for change in 0..3 {
        space.set_ram(0, MB, GB, 0).unwrap();
        let other = space.clone();
        *host.0.interlude.lock().unwrap() = Some(Box::new(move |_| {
            match change {
                0 => other.set_ram(0, MB, 0, INVALID),
                1 => other.set_ram(0, MB, GB, ROM),
                _ => other.protect_ram(0, MB, 0),
            }
            .unwrap();
        }));
        let outcome = space.fault(Gpa(0), Access::WRITE, &mut Reserve::new());
        assert_eq!(outcome, Ok(FaultOutcome::Retry));
        assert_eq!(host.translate(space.eptp(), 0), None);
    }
}

/// A guest whose page tables are in ROM (coreboot's early ones are) could not
/// run with the accessed and dirty flags on.
#[test]
fn page_tables_in_rom_turn_the_flags_off() {
    let (host, space) = machine(ALL);
    back(&host, GB, PAGE, 0x1000, 12);
    space.add_ram_block(Hva(GB), PAGE).unwrap();
    space.set_ram(0, PAGE, GB, ROM).unwrap();
    let flags = 1 << 6;
    assert_ne!(space.eptp() & flags, 0);
    let before = space.before_entry(0).unwrap().unwrap();
    space.flushed(0, before);
    space.after_exit(0);
    let walk = Access {
        read: true,
        walk: true,
        ..Access::WRITE
    };
    // After the first retry the processor does not call it a write any more.
    let outcome = space.fault(Gpa(8), walk, &mut Reserve::new());
    assert_eq!(outcome, Ok(FaultOutcome::Retry));
    assert_eq!(space.eptp() & flags, 0);
    assert!(
        space.before_entry(0).unwrap().is_some(),
        "no flush is asked for"
    );
    space.after_exit(0);
    assert_eq!(fault(&space, 8, Access::READ), Ok(FaultOutcome::Mapped));
    // The guest's own write is still the device's.
    assert_eq!(fault(&space, 8, Access::WRITE), Ok(FaultOutcome::RomWrite));
}

#[test]
fn only_processors_in_the_guest_are_waited_for() {
    let (host, space) = machine(ALL);
    back(&host, GB, MB, 0x1000, 12);
    space.add_ram_block(Hva(GB), MB).unwrap();
    space.set_ram(0, MB, GB, 0).unwrap();
    let waits = || -> Vec<usize> {
        let processors = host.0.processors.iter();
        processors
            .map(|p| p.waits.load(Ordering::Relaxed))
            .collect()
    };
    frame_at(&host, &space, 0).unwrap();
    for cpu in [1, 2] {
        let flush = space.before_entry(cpu).unwrap().unwrap();
        space.flushed(cpu, flush);
    }
    space.after_exit(1);
    space.set_ram(0, PAGE, 0, INVALID).unwrap();
    assert_eq!(waits(), [0, 0, 1, 0]);
    space.after_exit(2);
    // Nothing was mapped there, so nothing is flushed.
    assert!(space.before_entry(2).unwrap().is_some());
    space.set_ram(GB, MB, 0, INVALID).unwrap();
    space.set_ram(GB, MB, GB, 0).unwrap();
    host.change(0, 1, |_| {});
    assert_eq!(waits(), [0, 0, 1, 0]);
    space.after_exit(2);
}

fn until(flag: &AtomicBool) {
    while !flag.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
}

/// The kernel is in the middle of a copy to a buffer when the client unmaps
/// it: the client may use the buffer for something else once the call returns.
#[test]
fn a_change_waits_for_copies_under_way() {
    let (host, space) = machine(ALL);
    back(&host, GB, MB, 0x1000, 12);
    space.add_ram_block(Hva(GB), MB).unwrap();
    for protect in [false, true] {
        space.set_ram(0, MB, GB, 0).unwrap();
        let [copying, calling, returned] = [(); 3].map(|()| Arc::new(AtomicBool::new(false)));
        let flags = [copying.clone(), calling.clone(), returned.clone()];
        *host.0.copying.lock().unwrap() = Some(Box::new(move |_| {
            let [copying, calling, returned] = &flags;
            copying.store(true, Ordering::SeqCst);
            until(calling);
            std::thread::sleep(Duration::from_millis(50));
            assert!(!returned.load(Ordering::SeqCst), "the buffer is gone");
        }));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                until(&copying);
                calling.store(true, Ordering::SeqCst);
                if protect {
                    space.protect_ram(0, MB, 0).unwrap();
                } else {
                    space.set_ram(0, MB, 0, INVALID).unwrap();
                }
                returned.store(true, Ordering::SeqCst);
            });
            space.write(Gpa(8), &[1, 2, 3]).unwrap();
        });
        assert!(returned.load(Ordering::SeqCst));
    }
}

#[test]
fn compare_exchange_is_checked_and_exact() {
    let (host, space) = machine(ALL);
    back(&host, GB, PAGE, 0x1000, 12);
    space.add_ram_block(Hva(GB), PAGE).unwrap();
    space.set_ram(0, PAGE, GB, 0).unwrap();
    space
        .write(Gpa(8), &0x1122_3344_5566_7788u64.to_le_bytes())
        .unwrap();
    assert_eq!(
        space.compare_exchange(Gpa(8), 4, 0x5566_7788, 0xaabb_ccdd),
        Ok(0x5566_7788)
    );
    assert_eq!(
        space.compare_exchange(Gpa(8), 8, 1, 2),
        Ok(0x1122_3344_aabb_ccdd)
    );
    let mut bytes = [0; 8];
    space.read(Gpa(8), &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), 0x1122_3344_aabb_ccdd);
    // Unaligned inside a cache line, and 16 aligned bytes.
    let found = space.compare_exchange(Gpa(9), 4, 0x22aa_bbcc, 1);
    assert_eq!(found, Ok(0x44aa_bbcc));
    let found = space.compare_exchange(Gpa(9), 4, 0x44aa_bbcc, 0x0102_0304);
    assert_eq!(found, Ok(0x44aa_bbcc));
    let (old, new) = (0x1122_3301_0203_04dd_u128 << 64, 7 << 64 | 9);
    assert_eq!(space.compare_exchange(Gpa(0), 16, old, new), Ok(old));
    assert_eq!(space.compare_exchange(Gpa(0), 16, 0, 0), Ok(new));
    for (gpa, size) in [(61, 4), (8, 3), (8, 0), (8, 16), (0xfff, 2)] {
        let result = space.compare_exchange(Gpa(gpa), size, 0, 0);
        assert_eq!(result, Err(AccessError::Host(Error::Invalid)));
    }
    let hole = space.compare_exchange(Gpa(PAGE), 8, 0, 0);
    assert_eq!(hole, Err(AccessError::Mmio(Gpa(PAGE))));
}

/// What a series of reads has looked up stays good until the series ends, and a change waits for that.
#[test]
fn a_change_waits_for_a_series_of_reads() {
    let (host, space) = machine(ALL);
    back(&host, GB, MB, 0x1000, 12);
    space.add_ram_block(Hva(GB), MB).unwrap();
    for protect in [false, true] {
        space.set_ram(0, MB, GB, 0).unwrap();
        space.write(Gpa(PAGE), &[7]).unwrap();
        let (calling, returned) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let reader = space.reader();
            let mut byte = [0];
            reader.read(Gpa(0), &mut byte).unwrap();
            scope.spawn(|| {
                calling.store(true, Ordering::SeqCst);
                if protect {
                    space.protect_ram(0, MB, 0).unwrap();
                } else {
                    space.set_ram(0, MB, 0, INVALID).unwrap();
                }
                returned.store(true, Ordering::SeqCst);
            });
            until(&calling);
            std::thread::sleep(Duration::from_millis(50));
            reader.read(Gpa(PAGE), &mut byte).unwrap();
            assert_eq!(byte, [7]);
            assert!(!returned.load(Ordering::SeqCst), "the buffer is gone");
        });
        assert!(returned.load(Ordering::SeqCst));
        let refused = if protect {
            AccessError::Protected(Gpa(0))
        } else {
            AccessError::Mmio(Gpa(PAGE))
        };
        let result = space.reader().read(Gpa(PAGE), &mut [0]);
        assert_eq!(result, Err(refused));
    }
}

/// A series of reads goes from slot to slot, back and forth, and finds what a single read finds.
#[test]
fn a_series_of_reads_keeps_slots_apart() {
    let (host, space) = machine(ALL);
    back(&host, GB, 4 * PAGE, 0x1000, 12);
    space.add_ram_block(Hva(GB), 4 * PAGE).unwrap();
    // The second page is a hole, the third the block's last.
    space.set_ram(0, PAGE, GB, 0).unwrap();
    space.set_ram(2 * PAGE, PAGE, GB + 3 * PAGE, 0).unwrap();
    space.write(Gpa(PAGE - 8), &[1; 8]).unwrap();
    space.write(Gpa(2 * PAGE), &[2; 8]).unwrap();
    let reader = space.reader();
    let mut bytes = [0; 8];
    for _ in 0..2 {
        reader.read(Gpa(PAGE - 8), &mut bytes).unwrap();
        assert_eq!(bytes, [1; 8]);
        let hole = reader.read(Gpa(PAGE), &mut bytes);
        assert_eq!(hole, Err(AccessError::Mmio(Gpa(PAGE))));
        reader.read(Gpa(2 * PAGE), &mut bytes).unwrap();
        assert_eq!(bytes, [2; 8]);
    }
}
