//! One VM's guest-physical memory: what it is made of, and how processors are
//! made to forget.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::Error;
use crate::arch::addr::{Gpa, PAGE_SHIFT};
use crate::arch::ept::{EPTP_ACCESSED_DIRTY, EptVpidCaps};
use crate::fallible::{Shared, TryPush};
use crate::host::{CpuOffline, Host, Lending, UserSpace};
use crate::sync::{Lock, LockClass};

use super::block::Blocks;
use super::ept::{ADDRESS_BITS, Counters, Ept, LeafSize, Reserve};
use super::invalidate::Invalidations;
use super::pin::Pins;
use super::presence::{Flush, Presence};
use super::protect::Protected;
use super::slot::{Slots, Spare};
use super::watch::Watch;
use super::{Access, FaultOutcome, Statistics};

/// Copies to and from guest memory that can be under way without waiting for
/// each other.
const COPY_LANES: usize = 8;

/// What the exit path and the invalidations see, under the spin lock.
pub(super) struct Core<H: Host> {
    pub(super) slots: Slots,
    pub(super) protected: Protected,
    pub(super) ept: Ept<H>,
    pub(super) invalidations: Invalidations,
    pub(super) pins: Pins<H>,
}

/// What only those who change the map see, under the sleeping lock.
pub(super) struct Map {
    pub(super) blocks: Blocks,
    pub(super) slots: usize,
    pub(super) protected_ranges: usize,
    /// The highest guest-physical end that a SET_RAM has named.
    pub(super) highest: u64,
    /// Numbers for slots; never used twice.
    pub(super) next_id: u64,
    /// Nodes for the next change.
    pub(super) spare: Spare,
}

pub(super) struct Inner<H: Host> {
    pub(super) host: H,
    pub(super) user: H::UserSpace,
    pub(super) map: Lock<H::Mutex, Map>,
    pub(super) core: Lock<H::Spin, Core<H>>,
    /// One is held by each copy under way; see `settle`.
    pub(super) lanes: Vec<Lock<H::Mutex, ()>>,
    pub(super) presence: Presence,
    pub(super) counters: Counters,
    pub(super) eptp: AtomicU64,
    /// First guest-physical address that does not exist.
    pub(super) limit: u64,
}

/// One VM's guest-physical memory.
pub struct AddressSpace<H: Host> {
    /// Ends the host's reports, if there are any; declared first, so dropped first.
    _watch: Option<Watch<H>>,
    pub(super) inner: Shared<Inner<H>>,
}

impl<H: Host> AddressSpace<H> {
    /// From now on the guest's code runs from leaves of 4 KB only: see
    /// `Speculation::needs_small_code`. Before the first fault.
    pub fn keep_code_small(&self) {
        self.inner.core.lock().ept.keep_code_small();
    }

    /// An empty memory for a VM of the calling process. `address_bits` is the
    /// physical-address width that the guest and the processor both have; more
    /// than 48 counts as 48, what a four-level EPT translates.
    ///
    /// # Errors
    /// [`Error::NoMemory`].
    pub fn new(host: &H, caps: EptVpidCaps, address_bits: u8) -> Result<Self, Error> {
        let counters = Counters::default();
        let ept = Ept::new(host, caps, &counters)?;
        let eptp = AtomicU64::new(ept.pointer(caps));
        let core = Core {
            slots: Slots::new(),
            protected: Protected::new(),
            ept,
            invalidations: Invalidations::new(),
            pins: Pins::new(),
        };
        let map = Map {
            blocks: Blocks::new(),
            slots: 0,
            protected_ranges: 0,
            highest: 0,
            next_id: 0,
            spare: Spare::new(),
        };
        let mut lanes = Vec::new();
        for _ in 0..COPY_LANES {
            lanes.try_push(Lock::new(LockClass::GuestCopy, ())?)?;
        }
        let bits = u32::from(address_bits).min(ADDRESS_BITS);
        let inner = Shared::new(Inner {
            user: host.user_space()?,
            map: Lock::new(LockClass::MemoryMap, map)?,
            core: Lock::new(LockClass::Ept, core)?,
            lanes,
            presence: Presence::new(host.cpu_limit())?,
            counters,
            eptp,
            limit: 1u64.wrapping_shl(bits),
            host: host.clone(),
        })?;
        let watch = match inner.user.lending() {
            Lending::Borrowed => Some(Watch::new(&inner)?),
            Lending::Pinned => None,
        };
        Ok(Self {
            _watch: watch,
            inner,
        })
    }

    /// Whether the calling thread belongs to the process that owns the VM.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.inner.user.is_current()
    }

    /// Whether that process has ended.
    #[must_use]
    pub fn owner_has_ended(&self) -> bool {
        self.inner.user.has_ended()
    }

    /// The EPT pointer for the VMCS. It can change (only its accessed-and-dirty
    /// flag, from 1 to 0); then every processor's next `before_entry` asks for
    /// a flush, so it is enough to compare it when that happens.
    #[must_use]
    pub fn eptp(&self) -> u64 {
        self.inner.eptp.load(Ordering::Acquire)
    }

    /// Announces that this processor, `cpu`, is about to enter the guest.
    /// Interrupts are off and stay off until after the exit. If it returns a
    /// [`Flush`], the caller executes INVEPT (single-context with
    /// [`AddressSpace::eptp`], or all) and then calls
    /// [`AddressSpace::flushed`] before VMLAUNCH or VMRESUME. `after_exit` must
    /// follow, entered or not.
    ///
    /// # Errors
    /// [`CpuOffline`]: no such processor; do not enter.
    pub fn before_entry(&self, cpu: usize) -> Result<Option<Flush>, CpuOffline> {
        self.inner.presence.before_entry(cpu)
    }

    /// Notes that the INVEPT asked for by `before_entry` was executed.
    pub fn flushed(&self, cpu: usize, flush: Flush) {
        self.inner.presence.flushed(cpu, flush);
    }

    /// Says that `cpu` has left the guest, before interrupts are on again.
    pub fn after_exit(&self, cpu: usize) {
        self.inner.presence.after_exit(cpu);
    }

    /// Answers an EPT violation at `gpa`. May sleep: not pinned, no spin lock
    /// held. Any thread of the owner's process.
    ///
    /// # Errors
    /// [`Error::Fault`]: a slot is there but the client's memory behind it is
    /// not, or is read-only and the access a write; [`Error::NoMemory`].
    pub fn fault(
        &self,
        gpa: Gpa,
        access: Access,
        reserve: &mut Reserve<H>,
    ) -> Result<FaultOutcome, Error> {
        self.inner.fault(gpa, access, reserve)
    }

    /// Counters. Takes both locks for a moment.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let map = self.inner.map.lock();
        let counters = &self.inner.counters;
        Statistics {
            slots: map.slots,
            blocks: map.blocks.count(),
            protected_ranges: map.protected_ranges,
            tables: counters.tables.load(Ordering::Relaxed),
            leaves: counters
                .leaves
                .each_ref()
                .map(|count| count.load(Ordering::Relaxed)),
            pinned: self.inner.core.lock().pins.pages(),
            flushes: self.inner.presence.generation(),
            merges: counters.merges.load(Ordering::Relaxed),
        }
    }

    /// Calls `visit` with every EPT leaf in `start..end`: its guest-physical
    /// address, size, entry. For tests and diagnosis: looks at one leaf at a time.
    pub fn visit_leaves(&self, start: Gpa, end: Gpa, visit: &mut dyn FnMut(Gpa, LeafSize, u64)) {
        let mut gpa = start.0;
        while gpa < end.0.min(self.inner.limit) {
            let found = self.inner.core.lock().ept.lookup(Gpa(gpa));
            let step = match found {
                Ok((entry, size)) => {
                    visit(Gpa(gpa & size.bytes().wrapping_neg()), size, entry.bits());
                    size.bytes()
                }
                // Nothing below the table that has no entry here.
                Err(missing) => 1u64.wrapping_shl(PAGE_SHIFT.wrapping_add(missing.wrapping_mul(9))),
            };
            gpa = (gpa & step.wrapping_neg()).wrapping_add(step);
        }
    }
}

impl<H: Host> Inner<H> {
    /// Turns the accessed and dirty flags for EPT off, for good. With them the
    /// processor's reads of the guest's page tables count as writes (SDM
    /// 29.3.3.2 "EPT Violations"), so that a guest whose page tables are in ROM
    /// could not run.
    pub(super) fn stop_flagging(&self) {
        let core = self.core.lock();
        self.eptp.fetch_and(!EPTP_ACCESSED_DIRTY, Ordering::AcqRel);
        self.presence.advance();
        drop(core);
        self.finish_flush();
    }

    /// Waits until no processor uses a translation that was cleared before the
    /// call, by whomever. Interrupts are on and no lock is needed.
    pub(super) fn finish_flush(&self) {
        self.presence.finish(
            |cpu| self.host.kick(cpu),
            |cpu| {
                // A processor that is not running is not in the guest.
                let _ = self.host.run_on(cpu, &|| {});
            },
        );
    }

    /// Waits for the copies to and from guest memory that may have looked up an
    /// address before the change that was just made.
    pub(super) fn settle(&self) {
        for lane in &self.lanes {
            drop(lane.lock());
        }
    }
}
