//! A processor that may not run code from large leaves: code has small ones, data keeps its large
//! ones, and neither takes the other's away again and again.
// UNSAFETY: installs the global allocator that watches for spin locks.
#![allow(unsafe_code)]

mod memory_host;

use haxm_vmx::arch::addr::Hva;
use haxm_vmx::arch::ept::EptVpidCaps;
use haxm_vmx::memory::{Access, AddressSpace, FaultOutcome};
use memory_host::access::{back, fault};
use memory_host::{Allocator, FakeHost, PAGE};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

const MB: u64 = 1 << 20;
const GB: u64 = 1 << 30;
const READ: u64 = 1;
const FETCH: u64 = 4;

/// 4 GB from HVA 4 GB in pieces of 1 GB, or, with `shift` 21, 8 MB in pieces of 2 MB.
fn machine(shift: u32) -> (FakeHost, AddressSpace<FakeHost>) {
    let host = FakeHost::new(2);
    let caps = EptVpidCaps::PAGE_2M | EptVpidCaps::PAGE_1G | EptVpidCaps::ACCESSED_DIRTY;
    let space = AddressSpace::new(&host, caps, 48).unwrap();
    space.keep_code_small();
    back(&host, 4 * GB, 8 * MB, 0x40_0000, shift);
    let size = if shift == 30 { GB } else { 8 * MB };
    space.add_ram_block(Hva(4 * GB), size).unwrap();
    space.set_ram(0, size, 4 * GB, 0).unwrap();
    (host, space)
}

/// A touch, after which the guest reaches the page, with these rights and no others of the two.
fn touch(host: &FakeHost, space: &AddressSpace<FakeHost>, page: u64, access: Access) -> u64 {
    let outcome = fault(space, page * PAGE, access);
    assert_eq!(outcome, Ok(FaultOutcome::Mapped), "page {page:#x}");
    let (frame, entry) = host.translate(space.eptp(), page * PAGE).unwrap();
    assert_eq!(frame, 0x40_0000 + page);
    entry & (READ | FETCH)
}

#[test]
fn data_has_large_leaves_without_the_right_to_run() {
    for (shift, leaves) in [(21, [0, 1, 0]), (30, [0, 0, 1])] {
        let (host, space) = machine(shift);
        assert_eq!(touch(&host, &space, 7, Access::WRITE), READ);
        assert_eq!(space.statistics().leaves, leaves);
    }
}

#[test]
fn code_in_a_large_leaf_takes_it_apart() {
    for shift in [21, 30] {
        let (host, space) = machine(shift);
        touch(&host, &space, 7, Access::WRITE);
        let flushes = space.statistics().flushes;
        assert_eq!(touch(&host, &space, 9, Access::FETCH), READ | FETCH);
        // No processor has both sizes of the page.
        assert!(space.statistics().flushes > flushes);
        assert_eq!(space.statistics().leaves[1..], [0, 0]);
        // Other memory is as large as it can be beside that.
        assert_eq!(touch(&host, &space, 0x200, Access::READ), READ);
        assert_eq!(space.statistics().leaves[1..], [1, 0]);
    }
}

#[test]
fn data_beside_code_stays_small() {
    for shift in [21, 30] {
        let (host, space) = machine(shift);
        touch(&host, &space, 9, Access::FETCH);
        let flushes = space.statistics().flushes;
        for round in 0..4 {
            for page in [9, 100, 511 - round] {
                for access in [Access::READ, Access::WRITE, Access::FETCH] {
                    assert_eq!(touch(&host, &space, page, access), READ | FETCH);
                }
            }
        }
        let statistics = space.statistics();
        assert_eq!(statistics.leaves[1..], [0, 0]);
        assert_eq!((statistics.merges, statistics.flushes), (0, flushes));
    }
}

/// As on all other processors.
#[test]
fn without_need_code_runs_from_large_leaves() {
    let host = FakeHost::new(2);
    let space = AddressSpace::new(&host, EptVpidCaps::PAGE_2M, 48).unwrap();
    back(&host, 4 * GB, 8 * MB, 0x40_0000, 21);
    space.add_ram_block(Hva(4 * GB), 8 * MB).unwrap();
    space.set_ram(0, 8 * MB, 4 * GB, 0).unwrap();
    assert_eq!(touch(&host, &space, 9, Access::FETCH), READ | FETCH);
    assert_eq!(space.statistics().leaves, [0, 1, 0]);
}
