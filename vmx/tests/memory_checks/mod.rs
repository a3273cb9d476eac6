//! What must be true of the memory manager whenever it rests: it agrees with the model.

use std::collections::BTreeSet;

use haxm_vmx::arch::addr::Gpa;
use haxm_vmx::memory::LeafSize;

use crate::memory_host::PAGE;
use crate::memory_naive::{ADDRESS_BITS, GROUP};
use crate::{Bench, GUEST_PAGES};

impl Bench {
    pub fn check_counts(&self) {
        let counts = self.space.statistics();
        assert_eq!(counts.slots, self.model.runs());
        assert_eq!(counts.blocks, self.model.blocks.len());
        assert_eq!(counts.protected_ranges, self.model.protected_runs());
        // The vCPU keeps at most one table of each level for its next fault.
        let kept = self.host.pages() - counts.tables as usize;
        assert!(kept <= 3, "{kept} tables are nowhere");
    }

    /// The EPT against the model, page by page, and its tables against its
    /// leaves: none is empty.
    pub fn check_all(&self) {
        self.check_counts();
        let pinned = self.host.pinned();
        assert_eq!(self.space.statistics().pinned, pinned.len() as u64);
        let in_block = |page| self.model.overlaps(page, page + 1);
        assert!(pinned.into_iter().all(in_block), "pinned for no block");
        let eptp = self.space.eptp();
        let mut leaves = [0; 3];
        let mut tables = BTreeSet::from([(4, 0)]);
        let mut mapped = BTreeSet::new();
        let end = Gpa(1 << ADDRESS_BITS);
        self.space.visit_leaves(Gpa(0), end, &mut |gpa, size, _| {
            let level = match size {
                LeafSize::Small => 1,
                LeafSize::Large => 2,
                LeafSize::Huge => 3,
            };
            leaves[level - 1] += 1;
            for level in level..4 {
                tables.insert((level, gpa.0 >> (12 + 9 * level)));
            }
            mapped.extend(gpa.0 / PAGE..(gpa.0 + size.bytes()) / PAGE);
        });
        for page in 0..GUEST_PAGES {
            let found = self.host.translate(eptp, page * PAGE);
            assert_eq!(found.is_some(), mapped.contains(&page));
            if let Some((frame, entry)) = found {
                assert!(
                    self.model.permits(&self.host, page, frame, entry & 2 != 0),
                    "page {page:#x} is mapped and must not be"
                );
            }
        }
        // Beside code they stay small.
        if !self.host.pins() && !self.small_code {
            self.check_large();
        }
        assert!(mapped.last().is_none_or(|last| *last < GUEST_PAGES));
        let counts = self.space.statistics();
        assert_eq!(counts.leaves, leaves);
        assert_eq!(counts.tables as usize, tables.len());
    }

    /// Where a large leaf can be there are no small ones.
    fn check_large(&self) {
        for group in (0..GUEST_PAGES).step_by(GROUP as usize) {
            let pages = group..group + GROUP;
            let Some(first) = self.model.pages.get(&group) else {
                continue;
            };
            let one_slot = first.client % GROUP == 0
                && self.model.barrier(group).is_none()
                && pages.clone().all(|page| {
                    let here = self.model.pages.get(&page);
                    here.is_some_and(|here| first.continues_at(page - group, here))
                });
            let whole = |page: u64| {
                let backing = self.host.backing(first.client + page - group);
                backing.is_some_and(|backing| backing.shift == 21)
            };
            if !one_slot || !pages.clone().all(whole) {
                continue;
            }
            for page in pages {
                let found = self.host.translate(self.space.eptp(), page * PAGE);
                assert!(
                    found.is_none_or(|(_, entry)| entry & 0x80 != 0),
                    "page {page:#x} has a leaf of its own where a large one can be"
                );
            }
        }
    }
}
