//! The two forms of a task-state segment: SDM 8.2.1 "Task-State Segment (TSS)",
//! figure 8-2, and 8.6 "16-Bit Task-State Segment (TSS)", figure 8-10.

/// Bytes of the larger form that a switch reads: up to the T flag's word.
pub const LARGEST: usize = 104;

/// Where things are.
pub struct Form {
    /// Bytes of the segment at least.
    pub size: usize,
    /// EIP; EFLAGS and the eight general registers follow.
    ip: usize,
    /// Bytes of each of those.
    width: usize,
    /// ES, CS, SS, DS and, in the larger form, FS and GS; then LDTR.
    selectors: usize,
    /// Selectors without LDTR.
    count: usize,
    /// Bytes from one selector to the next.
    step: usize,
}

pub const BITS_16: Form = Form {
    size: 44,
    ip: 0x0e,
    width: 2,
    selectors: 0x22,
    count: 4,
    step: 2,
};

pub const BITS_32: Form = Form {
    size: LARGEST,
    ip: 0x20,
    width: 4,
    selectors: 0x48,
    count: 6,
    step: 4,
};

/// CR3 and the T flag of the larger form.
const CR3: usize = 0x1c;
const TRAP: usize = 0x64;

/// A task's registers.
#[derive(Clone, Copy, Default)]
pub struct Task {
    pub ip: u32,
    pub flags: u32,
    /// EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI: as instructions encode them.
    pub gpr: [u32; 8],
    /// ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    pub ldtr: u16,
    /// Of the larger form only.
    pub cr3: Option<u32>,
    /// T: a #DB before the task's first instruction.
    pub trap: bool,
}

#[inline(never)]
fn get(bytes: &[u8], at: usize, width: usize) -> u32 {
    let mut word = [0; 4];
    let end = at.wrapping_add(width);
    for (to, from) in word.iter_mut().zip(bytes.get(at..end).unwrap_or_default()) {
        *to = *from;
    }
    u32::from_le_bytes(word)
}

#[inline(never)]
fn put(bytes: &mut [u8], at: usize, width: usize, value: u32) {
    let end = at.wrapping_add(width);
    let slots = bytes.get_mut(at..end).unwrap_or_default();
    for (to, from) in slots.iter_mut().zip(value.to_le_bytes()) {
        *to = from;
    }
}

impl Form {
    /// What a switch away from the task writes: where from and to.
    pub const fn saved(&self) -> (usize, usize) {
        (
            self.ip,
            self.selectors
                .wrapping_add(self.count.wrapping_mul(self.step)),
        )
    }

    /// Bytes of an error code on the task's stack.
    pub const fn push_size(&self) -> u32 {
        self.width as u32
    }

    fn register(&self, index: usize) -> usize {
        self.ip.wrapping_add(self.width.wrapping_mul(index))
    }

    fn selector(&self, index: usize) -> usize {
        self.selectors.wrapping_add(self.step.wrapping_mul(index))
    }

    /// Reads a task. The smaller form leaves the upper halves 0, FS and GS null.
    #[expect(clippy::cast_possible_truncation, reason = "selectors have 16 bits")]
    pub fn load(&self, bytes: &[u8]) -> Task {
        let wide = self.width == 4;
        let mut task = Task {
            ip: get(bytes, self.register(0), self.width),
            flags: get(bytes, self.register(1), self.width),
            ldtr: get(bytes, self.selector(self.count), 2) as u16,
            cr3: wide.then(|| get(bytes, CR3, 4)),
            trap: wide && get(bytes, TRAP, 2) & 1 != 0,
            ..Task::default()
        };
        for (index, slot) in (2..).zip(&mut task.gpr) {
            *slot = get(bytes, self.register(index), self.width);
        }
        for (index, slot) in (0..self.count).zip(&mut task.selectors) {
            *slot = get(bytes, self.selector(index), 2) as u16;
        }
        task
    }

    /// Writes what a switch saves of a task: not LDTR, not CR3.
    pub fn save(&self, task: &Task, bytes: &mut [u8]) {
        put(bytes, self.register(0), self.width, task.ip);
        put(bytes, self.register(1), self.width, task.flags);
        for (index, value) in (2..).zip(task.gpr) {
            put(bytes, self.register(index), self.width, value);
        }
        for (index, value) in (0..self.count).zip(task.selectors) {
            put(bytes, self.selector(index), self.step, value.into());
        }
    }
}
