//! One VM's guest-physical memory: what it is made of, and how a guest's touch
//! of a page becomes an EPT entry.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::Error;
use crate::arch::addr::{Gpa, Hva, PAGE_SHIFT, PAGE_SIZE, Pfn};
use crate::arch::ept::{EPTP_ACCESSED_DIRTY, EptVpidCaps};
use crate::fallible::{Shared, TryPush};
use crate::host::{CpuOffline, Host, HostFrame, UserFault, UserSpace};
use crate::sync::{Lock, LockClass};

use super::block::Blocks;
use super::ept::{ADDRESS_BITS, Counters, Ept, Graveyard, Install, Leaf, LeafSize, Reserve};
use super::invalidate::Invalidations;
use super::presence::{Flush, Presence};
use super::protect::{Protected, group};
use super::slot::{Slot, Slots};
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
    /// Ends the host's reports; declared first, so dropped first.
    _watch: Watch<H>,
    pub(super) inner: Shared<Inner<H>>,
}

impl<H: Host> AddressSpace<H> {
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
        };
        let map = Map {
            blocks: Blocks::new(),
            slots: 0,
            protected_ranges: 0,
            highest: 0,
            next_id: 0,
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
        Ok(Self {
            _watch: Watch::new(&inner)?,
            inner,
        })
    }

    /// Whether the calling thread belongs to the process that owns the VM.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.inner.user.is_current()
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
            flushes: self.inner.presence.generation(),
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

/// What the first look at a faulting address found.
enum Look {
    Known(FaultOutcome),
    /// A page walk in ROM that the accessed-and-dirty flags turned into a write.
    FlaggedWalk,
    Fetch {
        slot: Slot,
        sequence: u64,
        missing: u32,
    },
}

impl<H: Host> Inner<H> {
    fn fault(
        &self,
        gpa: Gpa,
        access: Access,
        reserve: &mut Reserve<H>,
    ) -> Result<FaultOutcome, Error> {
        let (slot, sequence, missing) = match self.look(gpa, access) {
            Look::Known(outcome) => return Ok(outcome),
            Look::FlaggedWalk => {
                self.stop_flagging();
                return Ok(FaultOutcome::Retry);
            }
            Look::Fetch {
                slot,
                sequence,
                missing,
            } => (slot, sequence, missing),
        };
        reserve.fill(&self.host, missing)?;
        let hva = Hva(slot.hva_of(gpa.page_start().0));
        let frame = match self.user.fault_in(hva, access.write) {
            Ok(frame) => frame,
            Err(UserFault::Interrupted) => return Ok(FaultOutcome::Interrupted),
            Err(fault) => return Err(fault.into()),
        };
        if access.write && !frame.writable {
            return Err(Error::Fault);
        }
        Ok(self.map(gpa, hva, &slot, sequence, frame, reserve))
    }

    fn look(&self, gpa: Gpa, access: Access) -> Look {
        // The tables below would take the address modulo 2^48.
        if gpa.0 >= self.limit {
            return Look::Known(FaultOutcome::Mmio);
        }
        let core = self.core.lock();
        let Some(slot) = core.slots.find(gpa.0) else {
            return Look::Known(FaultOutcome::Mmio);
        };
        // Another processor may have been here first.
        if core.ept.allows(gpa, access) {
            return Look::Known(FaultOutcome::Mapped);
        }
        let here = group(gpa.0);
        if let Some(first) = core.protected.first_in(here.start, here.end) {
            return Look::Known(FaultOutcome::Protected { gpa: Gpa(first) });
        }
        if slot.rom && access.write {
            let flagging = self.eptp.load(Ordering::Acquire) & EPTP_ACCESSED_DIRTY != 0;
            return if access.walk && flagging {
                Look::FlaggedWalk
            } else {
                Look::Known(FaultOutcome::RomWrite)
            };
        }
        Look::Fetch {
            slot,
            sequence: core.invalidations.sequence(),
            missing: core.ept.lookup(gpa).err().unwrap_or(0),
        }
    }

    /// Writes the leaf, if nothing has changed since `look`.
    fn map(
        &self,
        gpa: Gpa,
        hva: Hva,
        slot: &Slot,
        sequence: u64,
        frame: HostFrame,
        reserve: &mut Reserve<H>,
    ) -> FaultOutcome {
        let mut grave = Graveyard::new();
        let mut core = self.core.lock();
        // Any change of slots or protection counts too, so what `look` saw of
        // them still holds.
        if core.invalidations.sequence() != sequence {
            return FaultOutcome::Retry;
        }
        let Some(size) = leaf_size(&core, gpa, hva, slot, frame) else {
            return FaultOutcome::Retry;
        };
        let pages = size.bytes().wrapping_shr(PAGE_SHIFT);
        let leaf = Leaf {
            size,
            frame: Pfn(frame.frame.0 & pages.wrapping_neg()),
            write: frame.writable && !slot.rom,
        };
        match core.ept.install(gpa, leaf, reserve, &self.counters) {
            Install::Done => FaultOutcome::Mapped,
            Install::Short => FaultOutcome::Retry,
            Install::Conflict { start, end } => {
                if core.ept.clear(start, end, &mut grave) {
                    self.presence.advance();
                }
                drop(core);
                self.finish_flush();
                grave.bury(&self.counters);
                FaultOutcome::Retry
            }
        }
    }

    /// Turns the accessed and dirty flags for EPT off, for good. With them the
    /// processor's reads of the guest's page tables count as writes (SDM
    /// 29.3.3.2 "EPT Violations"), so that a guest whose page tables are in ROM
    /// could not run.
    fn stop_flagging(&self) {
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

/// The largest leaf for `gpa` that host, processor, slot and protection allow,
/// with no part of it being invalidated right now; `None` if not even the page
/// itself will do.
fn leaf_size<H: Host>(
    core: &Core<H>,
    gpa: Gpa,
    hva: Hva,
    slot: &Slot,
    frame: HostFrame,
) -> Option<LeafSize> {
    [LeafSize::Huge, LeafSize::Large, LeafSize::Small]
        .into_iter()
        .find(|size| {
            let bytes = size.bytes();
            let start = gpa.0 & bytes.wrapping_neg();
            let end = start.wrapping_add(bytes);
            let client = hva.0 & bytes.wrapping_neg();
            let offset = hva.0.wrapping_sub(client);
            let host_offset = frame.frame.address().0 & bytes.wrapping_sub(1);
            core.ept.has(*size)
                && frame.shift >= size.shift()
                && gpa.page_start().0.wrapping_sub(start) == offset
                && host_offset == offset
                && slot.start <= start
                && end <= slot.end
                && core.protected.first_in(start, end).is_none()
                && !core
                    .invalidations
                    .running_in(client, client.wrapping_add(bytes))
        })
}

const _: () = assert!(LeafSize::Small.bytes() == PAGE_SIZE);
