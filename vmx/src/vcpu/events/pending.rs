//! Vectors that the client queued by the INTERRUPT request and the guest has
//! not taken yet: one bit each, so a vector queued twice comes once, as in a
//! local APIC's IRR.
//!
//! INTERRUPT may come from any thread while the vCPU runs, so the bits are
//! atomic. Only the thread that runs the vCPU takes a vector out. Who posts a vector then
//! looks for the guest, to interrupt it; the guest is made known before the vectors are
//! looked at. All four are sequentially consistent, so one of the two sees the other.

use core::sync::atomic::{AtomicU64, Ordering};

/// Vectors below this one only an 8259 sends: SDM 11.5.2 "Valid Interrupt
/// Vectors". They do not pass through a local APIC's priorities.
const FIRST_APIC_VECTOR: u8 = 16;

/// The vectors that wait.
#[derive(Debug, Default)]
pub struct PendingVectors {
    /// Vector v is bit `v % 64` of word `v / 64`.
    words: [AtomicU64; 4],
}

const fn bit(vector: u8) -> u64 {
    1u64.wrapping_shl((vector & 63) as u32)
}

/// The highest bit of `word`, which is word `index` of the map, as a vector.
fn highest_bit(index: usize, word: u64) -> Option<u8> {
    let bit = 63u32.checked_sub(word.leading_zeros())?;
    u8::try_from(index.wrapping_mul(64).wrapping_add(bit as usize)).ok()
}

impl PendingVectors {
    /// No vector waits.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            words: [const { AtomicU64::new(0) }; 4],
        }
    }

    fn word(&self, vector: u8) -> Option<&AtomicU64> {
        self.words.get(usize::from(vector >> 6))
    }

    /// Queues a vector; `true` if it did not wait already.
    pub fn post(&self, vector: u8) -> bool {
        self.word(vector)
            .is_some_and(|word| word.fetch_or(bit(vector), Ordering::SeqCst) & bit(vector) == 0)
    }

    /// Takes a vector out; `true` if it waited.
    pub fn take(&self, vector: u8) -> bool {
        self.word(vector)
            .is_some_and(|word| word.fetch_and(!bit(vector), Ordering::AcqRel) & bit(vector) != 0)
    }

    /// The highest vector that waits.
    #[must_use]
    #[cfg_attr(haxm_module, optimize(speed))]
    #[inline]
    pub fn highest(&self) -> Option<u8> {
        let words = self.words.iter().enumerate().rev();
        words
            .map(|(index, word)| (index, word.load(Ordering::SeqCst)))
            .find_map(|(index, word)| highest_bit(index, word))
    }

    /// The vector to deliver next to a guest with this task priority (the TPR
    /// byte, CR8 shifted left by 4), or `None` if none may come now.
    ///
    /// SDM 11.8.3.1 "Task and Processor Priorities": a vector waits unless its
    /// class, bits 7:4, is above the TPR's. What is in service is the client's
    /// APIC's to know. Vectors 0 to 15 come from an 8259, which the TPR does
    /// not hold back.
    #[must_use]
    #[cfg_attr(haxm_module, optimize(speed))]
    #[inline]
    pub fn deliverable(&self, tpr: u8) -> Option<u8> {
        let highest = self.highest()?;
        if highest >> 4 > tpr >> 4 {
            return Some(highest);
        }
        let low = self.words.first()?.load(Ordering::SeqCst);
        highest_bit(0, low & bit(FIRST_APIC_VECTOR).wrapping_sub(1))
    }

    /// The class, 1 to 15, of the highest vector, if this task priority holds it
    /// back.
    #[must_use]
    pub fn held_back(&self, tpr: u8) -> Option<u8> {
        let class = self.highest()? >> 4;
        (class != 0 && class <= tpr >> 4).then_some(class)
    }

    /// No vector waits.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        let [a, b, c, d] = &self.words;
        let load = |word: &AtomicU64| word.load(Ordering::SeqCst);
        load(a) | load(b) | load(c) | load(d) == 0
    }

    /// Forgets all vectors: a reset.
    pub fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::PendingVectors;

    #[test]
    fn every_vector_comes_back_once() {
        let pending = PendingVectors::new();
        assert!(pending.is_empty());
        assert_eq!(pending.highest(), None);
        for vector in 0..=255 {
            assert!(pending.post(vector));
            assert!(!pending.post(vector), "a second post coalesces");
            assert_eq!(pending.highest(), Some(vector));
        }
        for vector in (0..=255).rev() {
            assert_eq!(pending.highest(), Some(vector));
            assert!(pending.take(vector));
            assert!(!pending.take(vector));
        }
        assert!(pending.is_empty());
    }

    #[test]
    fn clear_forgets_every_word() {
        let pending = PendingVectors::new();
        for vector in [0, 64, 128, 255] {
            pending.post(vector);
        }
        pending.clear();
        assert!(pending.is_empty());
    }

    #[test]
    fn the_class_must_be_above_the_task_priority() {
        for vector in 16..=255u8 {
            let pending = PendingVectors::new();
            pending.post(vector);
            for tpr in 0..=255u8 {
                let expected = (vector / 16 > tpr / 16).then_some(vector);
                assert_eq!(pending.deliverable(tpr), expected, "{vector:#x} {tpr:#x}");
                let class = expected.is_none().then_some(vector / 16);
                assert_eq!(pending.held_back(tpr), class, "{vector:#x} {tpr:#x}");
            }
        }
    }

    #[test]
    fn an_8259_vector_is_not_held_back() {
        let pending = PendingVectors::new();
        pending.post(8);
        assert_eq!(pending.deliverable(0), Some(8));
        assert_eq!(pending.deliverable(0xf0), Some(8));
        assert_eq!(pending.held_back(0xf0), None);
        pending.post(0x41);
        assert_eq!(pending.deliverable(0x30), Some(0x41), "the APIC's first");
        assert_eq!(pending.deliverable(0x40), Some(8));
        assert_eq!(pending.held_back(0x40), Some(4));
        pending.take(8);
        assert_eq!(pending.deliverable(0x40), None);
    }
}
