//! Who may be using a translation: the protocol between processors that enter
//! the guest and threads that take translations away.
//!
//! A processor caches guest-physical translations until it executes INVEPT
//! (SDM 29.4.3.1 "Operations that Invalidate Cached Mappings"). So after an EPT
//! entry is cleared, each processor must either execute INVEPT before it enters
//! the guest again, or, if it is in the guest, be forced out first. One record
//! per processor and VM says which:
//!
//! ```text
//! processor c, interrupts off          flusher; entries were cleared and the
//!   inside[c] = busy                   generation advanced under the lock
//!   fence                                target = generation
//!   g = generation                       fence
//!   inside[c] = g                        for each c:
//!   if flushed[c] != g:                    if inside[c] is busy or < target:
//!     INVEPT; flushed[c] = g                 interrupt c, wait until taken
//!   VMRESUME ... exit                    completed = max(completed, target)
//!   inside[c] = out
//!   interrupts on
//! ```
//!
//! Store, fence, load on both sides (Dekker): either the processor reads the
//! new generation and executes INVEPT, or the flusher sees it inside. An
//! interrupt forces an exit and is only taken after it, with `inside` already
//! `out`. Whoever waits for all processors may therefore let the page go.
//!
//! INVEPT works on one logical processor and on all its translations of one
//! EPTP, whichever virtual processor made them. So `flushed` belongs to the
//! pair (VM, processor): a vCPU that moves, and two vCPUs that share a
//! processor, need no more than this. A record starts at 0 and the generation
//! above it: the first entry on each processor executes INVEPT, which also ends
//! what is left of an older VM whose EPT had its root in the same page.
//!
//! The words are behind a trait so that a model checker can supply them
//! (`tests/memory_presence.rs`).

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use crate::fallible::{NoMemory, TryPush};
use crate::host::CpuOffline;

/// Not in the guest.
const OUT: u64 = 0;
/// About to enter, generation not yet read. Older than every generation.
const BUSY: u64 = 1;
/// The first generation, above the marks.
const FIRST: u64 = 2;

/// A shared 64-bit word, as the processor has it or as a model checker does.
pub trait Word: Send + Sync {
    /// A word with this value.
    fn new(value: u64) -> Self;
    /// An acquiring load.
    fn load(&self) -> u64;
    /// A releasing store.
    fn store(&self, value: u64);
    /// Adds one, acquiring and releasing; returns the new value.
    fn increment(&self) -> u64;
    /// Raises the word to at least `value`, acquiring and releasing.
    fn raise(&self, value: u64);
    /// A sequentially consistent fence.
    fn fence();
}

impl Word for AtomicU64 {
    fn new(value: u64) -> Self {
        Self::new(value)
    }
    fn load(&self) -> u64 {
        self.load(Ordering::Acquire)
    }
    fn store(&self, value: u64) {
        self.store(value, Ordering::Release);
    }
    fn increment(&self) -> u64 {
        self.fetch_add(1, Ordering::AcqRel).wrapping_add(1)
    }
    fn raise(&self, value: u64) {
        self.fetch_max(value, Ordering::AcqRel);
    }
    fn fence() {
        fence(Ordering::SeqCst);
    }
}

/// An INVEPT that this processor owes before it may enter the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the guest must not be entered before INVEPT was executed"]
pub struct Flush {
    generation: u64,
}

/// One processor, as one VM sees it. Only that processor writes it, at every
/// entry and exit, so each has a cache line of its own.
#[repr(align(64))]
struct Record<W> {
    /// [`OUT`], [`BUSY`], or the generation it entered with.
    inside: W,
    /// The generation at its last INVEPT; 0 before the first entry.
    flushed: W,
}

/// The records of all processors for one VM.
pub struct Presence<W: Word = AtomicU64> {
    generation: W,
    /// No processor is inside with a generation below this one.
    completed: W,
    processors: Vec<Record<W>>,
}

impl<W: Word> Presence<W> {
    /// Records for processors 0 to `limit - 1`.
    ///
    /// # Errors
    /// [`NoMemory`].
    pub fn new(limit: usize) -> Result<Self, NoMemory> {
        let mut processors = Vec::new();
        processors.try_reserve_exact(limit).map_err(|_| NoMemory)?;
        for _ in 0..limit {
            processors.try_push(Record {
                inside: W::new(OUT),
                flushed: W::new(0),
            })?;
        }
        Ok(Self {
            generation: W::new(FIRST),
            completed: W::new(FIRST),
            processors,
        })
    }

    /// Announces that processor `cpu` is about to enter the guest. Interrupts
    /// are off, and stay off until the exit and [`Presence::after_exit`].
    /// Whatever is returned, `after_exit` must follow.
    ///
    /// # Errors
    /// [`CpuOffline`]: no such processor; the guest must not be entered.
    pub fn before_entry(&self, cpu: usize) -> Result<Option<Flush>, CpuOffline> {
        let record = self.processors.get(cpu).ok_or(CpuOffline)?;
        record.inside.store(BUSY);
        W::fence();
        let generation = self.generation.load();
        record.inside.store(generation);
        Ok((record.flushed.load() != generation).then_some(Flush { generation }))
    }

    /// Notes that the INVEPT asked for by `before_entry` was executed here.
    pub fn flushed(&self, cpu: usize, flush: Flush) {
        if let Some(record) = self.processors.get(cpu) {
            record.flushed.store(flush.generation);
        }
    }

    /// Says that `cpu` has left the guest. Interrupts are still off.
    pub fn after_exit(&self, cpu: usize) {
        if let Some(record) = self.processors.get(cpu) {
            record.inside.store(OUT);
        }
    }

    /// Starts a flush: the entries to forget have been cleared.
    pub fn advance(&self) {
        self.generation.increment();
    }

    /// The current generation.
    pub fn generation(&self) -> u64 {
        self.generation.load()
    }

    /// Waits until no processor can use a translation that was taken away
    /// before the last [`Presence::advance`] that this thread knows of, its own
    /// or another thread's.
    ///
    /// `kick` interrupts a processor without waiting; `wait` returns when the
    /// processor has taken an interrupt sent after the call.
    pub fn finish(&self, kick: impl Fn(usize), wait: impl Fn(usize)) {
        let target = self.generation.load();
        // Another thread may have cleared what we wanted cleared and still be
        // waiting: only a completed flush lets us return.
        if self.completed.load() >= target {
            return;
        }
        W::fence();
        let inside = |record: &Record<W>| {
            let inside = record.inside.load();
            inside != OUT && inside < target
        };
        for (cpu, record) in self.processors.iter().enumerate() {
            if inside(record) {
                kick(cpu);
            }
        }
        for (cpu, record) in self.processors.iter().enumerate() {
            if inside(record) {
                wait(cpu);
            }
        }
        self.completed.raise(target);
    }
}
