//! What the host's page reclaim asks: which pages a guest has used.
// UNSAFETY: installs the global allocator that watches for spin locks.
#![allow(unsafe_code)]

mod memory_host;

use std::sync::atomic::Ordering;

use haxm_vmx::arch::addr::Hva;
use haxm_vmx::arch::ept::EptVpidCaps;
use haxm_vmx::host::Aging;
use haxm_vmx::memory::{Access, AddressSpace, FaultOutcome};
use memory_host::access::{GB, MB, back, fault};
use memory_host::{Allocator, FakeHost, PAGE, UNDER_SPIN};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// The client's first page.
const FIRST: u64 = GB / PAGE;

const FLAGS: EptVpidCaps = EptVpidCaps::PAGE_2M.union(EptVpidCaps::ACCESSED_DIRTY);

/// A machine whose guest has 4 MB of the client's memory from `GB` up at 0.
struct Rig {
    host: FakeHost,
    space: AddressSpace<FakeHost>,
}

impl Rig {
    fn new(caps: EptVpidCaps, shift: u32) -> Self {
        let host = FakeHost::new(2);
        let space = AddressSpace::new(&host, caps, 48).unwrap();
        back(&host, GB, 4 * MB, 0x10_0000, shift);
        host.0.resident.lock().unwrap().extend(FIRST..FIRST + 1024);
        space.add_ram_block(Hva(GB), 4 * MB).unwrap();
        space.set_ram(0, 4 * MB, GB, 0).unwrap();
        Self { host, space }
    }

    /// Processor 0 enters, touches a page with an empty cache, and leaves.
    fn touch(&self, page: u64) {
        loop {
            let flush = self.space.before_entry(0).unwrap();
            if let Some(flush) = flush {
                self.space.flushed(0, flush);
            }
            let found = self.host.walk(self.space.eptp(), page * PAGE, true);
            self.space.after_exit(0);
            if found.is_some() {
                return;
            }
            let outcome = fault(&self.space, page * PAGE, Access::WRITE);
            assert_eq!(outcome, Ok(FaultOutcome::Mapped));
        }
    }

    /// What reclaim hears of one page.
    fn young(&self, page: u64, aging: Aging) -> bool {
        self.host.age(FIRST + page, FIRST + page + 1, aging)
    }

    fn flush_is_due(&self, cpu: usize) -> bool {
        let due = self.space.before_entry(cpu).unwrap();
        if let Some(flush) = due {
            self.space.flushed(cpu, flush);
        }
        self.space.after_exit(cpu);
        due.is_some()
    }
}

#[test]
fn a_page_is_young_if_the_guest_has_used_it_since_it_was_asked_about() {
    let rig = Rig::new(FLAGS, 12);
    rig.touch(5);
    // Its neighbours were mapped with it, and nobody has used them.
    assert!(rig.space.statistics().leaves[0] > 32);
    assert!(!rig.young(6, Aging::Look));
    for aging in [Aging::Clear, Aging::ClearAndFlush] {
        for _ in 0..2 {
            assert!(rig.young(5, Aging::Look));
        }
        assert!(rig.young(5, aging));
        assert!(!rig.young(5, aging));
        assert!(!rig.young(5, Aging::Look));
        rig.touch(5);
    }
    // Several pages are asked about at once: one is enough, and all are cleared.
    rig.touch(700);
    assert!(rig.host.age(FIRST + 6, FIRST + 1024, Aging::Clear));
    assert!(!rig.host.age(FIRST + 6, FIRST + 1024, Aging::Look));
    assert!(rig.host.age(FIRST, FIRST + 1024, Aging::Look));
    assert!(!rig.host.age(FIRST + 2000, u64::MAX / PAGE, Aging::Look));
    // The translations stay, with all other bits.
    let leaves = rig.space.statistics().leaves;
    let entry = rig.host.translate(rig.space.eptp(), 5 * PAGE).unwrap().1;
    assert_eq!(entry & 0x307, 0x307);
    assert!(rig.young(5, Aging::ClearAndFlush));
    let after = rig.host.translate(rig.space.eptp(), 5 * PAGE).unwrap().1;
    assert_eq!(after, entry & !0x100);
    assert_eq!(rig.space.statistics().leaves, leaves);
    assert_eq!(UNDER_SPIN.load(Ordering::Relaxed), 0);
}

/// A processor that caches a translation does not set its flag again before INVEPT.
#[test]
fn clearing_with_a_flush_asks_each_processor_for_one_and_waits_for_none() {
    let rig = Rig::new(FLAGS, 12);
    rig.touch(5);
    assert!(rig.flush_is_due(1));
    assert!(rig.young(5, Aging::Look) && rig.young(5, Aging::Clear));
    assert!(!rig.flush_is_due(0) && !rig.flush_is_due(1));
    // Nothing was used since: nothing can be cached unnoticed.
    assert!(!rig.young(5, Aging::ClearAndFlush));
    assert!(!rig.flush_is_due(0));
    rig.touch(5);
    let flush = rig.space.before_entry(1).unwrap();
    assert_eq!(flush, None);
    assert!(rig.young(5, Aging::ClearAndFlush));
    rig.space.after_exit(1);
    assert!(rig.flush_is_due(0) && rig.flush_is_due(1));
    let waits = rig
        .host
        .0
        .processors
        .iter()
        .map(|p| p.waits.load(Ordering::Relaxed));
    assert_eq!(waits.sum::<usize>(), 0);
}

/// The flag of a large leaf stands for all of it.
#[test]
fn a_large_leaf_ages_as_a_whole() {
    let rig = Rig::new(FLAGS, 21);
    rig.touch(5);
    assert_eq!(rig.space.statistics().leaves, [0, 1, 0]);
    assert!(rig.young(300, Aging::Look));
    assert!(!rig.young(512, Aging::Look));
    assert!(rig.host.age(FIRST, FIRST + 512, Aging::ClearAndFlush));
    assert!(!rig.young(5, Aging::Look));
}

/// One page of the client's at many places of the guest.
#[test]
fn every_alias_counts() {
    let rig = Rig::new(FLAGS, 12);
    for alias in 0..300 {
        let gpa = GB + 2 * alias * PAGE;
        rig.space.set_ram(gpa, PAGE, GB + 5 * PAGE, 0).unwrap();
    }
    rig.touch((GB + 2 * 299 * PAGE) / PAGE);
    rig.touch((GB + 2 * 150 * PAGE) / PAGE);
    assert!(!rig.young(6, Aging::Look));
    assert!(rig.young(5, Aging::Look));
    assert!(rig.young(5, Aging::Clear));
    assert!(!rig.young(5, Aging::Look));
    // So many that the answer would take too long: it counts as used.
    for alias in 300..1100 {
        let gpa = GB + 2 * alias * PAGE;
        rig.space.set_ram(gpa, PAGE, GB + 5 * PAGE, 0).unwrap();
    }
    assert!(rig.young(5, Aging::Clear));
}

/// Without the flags only a fault tells of a use: the translation goes.
#[test]
fn without_the_flags_a_page_that_is_asked_about_has_to_be_faulted_in_again() {
    let rig = Rig::new(EptVpidCaps::PAGE_2M, 12);
    for aging in [Aging::Clear, Aging::ClearAndFlush] {
        rig.touch(5);
        assert!(rig.young(5, Aging::Look));
        assert!(rig.young(5, aging));
        assert_eq!(rig.host.translate(rig.space.eptp(), 5 * PAGE), None);
        assert!(rig.flush_is_due(0));
        assert!(!rig.young(5, aging) && !rig.young(5, Aging::Look));
    }
    // Nothing else went.
    assert!(rig.host.translate(rig.space.eptp(), 6 * PAGE).is_some());
}
