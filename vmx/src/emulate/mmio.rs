//! The record of what user space has already done for the instruction in
//! flight: the memory of the restart by replay.

/// Most accesses one instruction (or one iteration) makes: every second byte of
/// 64, stored under a mask.
const CAPACITY: usize = 32;

/// The kinds of request that leave for user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    In,
    Out,
}

/// One request: what was asked and whether it is answered.
#[derive(Clone, Copy, Debug)]
struct Entry {
    kind: Kind,
    /// Bytes of an element.
    size: u8,
    /// Elements; 1 for memory.
    count: u16,
    /// Guest-physical address, or the port.
    address: u64,
    /// What a read returned.
    value: u64,
}

const EMPTY: Entry = Entry {
    kind: Kind::Read,
    size: 0,
    count: 0,
    address: 0,
    value: 0,
};

/// What the log knows about an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recall {
    /// Served; reads carry the value.
    Answered(u64),
    /// Now, or still, the open request: leave for user space.
    Ask,
    /// The instruction no longer makes the accesses it made before: the guest
    /// changed a page table under it. The log is empty now.
    Lost,
    /// More accesses than the log holds; no instruction makes so many.
    Full,
}

/// The accesses of the instruction in flight that user space has served.
///
/// Lives in the vCPU beside the [`super::Insn`] it belongs to. Empty between
/// instructions. About 800 bytes.
#[derive(Clone, Debug)]
pub struct MmioLog {
    entries: [Entry; CAPACITY],
    /// Entries in use; the last one is open while `waiting`.
    len: usize,
    /// The next entry to hand out in this replay.
    cursor: usize,
    waiting: bool,
}

impl MmioLog {
    /// An empty log.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            entries: [EMPTY; CAPACITY],
            len: 0,
            cursor: 0,
            waiting: false,
        }
    }

    /// Forgets everything: the instruction in flight will not be continued.
    pub fn clear(&mut self) {
        self.len = 0;
        self.cursor = 0;
        self.waiting = false;
    }

    /// No instruction is in flight.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A request has gone to user space and [`MmioLog::answer`] was not called
    /// since.
    #[must_use]
    pub const fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// User space has served the open request. `value` is what a
    /// [`super::Step::Read`] returned (bytes above its size are ignored); for
    /// the other requests it means nothing. Without an open request nothing
    /// happens.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn answer(&mut self, value: u64) {
        if !self.waiting {
            return;
        }
        if let Some(entry) = self.entries.get_mut(self.len.wrapping_sub(1)) {
            entry.value = value;
        }
        self.waiting = false;
    }

    /// Starts a replay.
    pub(super) fn rewind(&mut self) {
        self.cursor = 0;
    }

    /// Keeps what the port buffer held for the last recalled entry. The first
    /// call, right after the answer, stores `value`; when later accesses have
    /// been logged the stored value comes back.
    pub(super) fn keep(&mut self, value: u64) -> u64 {
        let last = self.cursor == self.len;
        match self.entries.get_mut(self.cursor.wrapping_sub(1)) {
            Some(entry) if last => {
                entry.value = value;
                value
            }
            Some(entry) => entry.value,
            None => value,
        }
    }

    /// The next access of the instruction is one that user space has served.
    pub(super) const fn has_answer(&self) -> bool {
        self.cursor < self.len && !self.waiting
    }

    /// Looks up the next access of the instruction.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn recall(&mut self, kind: Kind, address: u64, size: u8, count: u16) -> Recall {
        if self.cursor < self.len {
            let Some(entry) = self.entries.get(self.cursor) else {
                self.clear();
                return Recall::Lost;
            };
            if entry.kind != kind
                || entry.address != address
                || entry.size != size
                || entry.count != count
            {
                self.clear();
                return Recall::Lost;
            }
            let value = entry.value;
            self.cursor = self.cursor.wrapping_add(1);
            if self.waiting && self.cursor == self.len {
                return Recall::Ask;
            }
            return Recall::Answered(value);
        }
        let Some(entry) = self.entries.get_mut(self.len) else {
            return Recall::Full;
        };
        *entry = Entry {
            kind,
            size,
            count,
            address,
            value: 0,
        };
        self.len = self.len.wrapping_add(1);
        self.cursor = self.len;
        self.waiting = true;
        Recall::Ask
    }
}

impl Default for MmioLog {
    fn default() -> Self {
        Self::new()
    }
}
