//! Samples of a row.

/// Ticks, one per repetition.
#[derive(Default)]
pub struct Samples(Vec<u64>);

impl Samples {
    pub fn push(&mut self, ticks: u64) {
        self.0.push(ticks);
    }

    /// Prints the row.
    pub fn print(mut self, name: &str) {
        self.0.sort_unstable();
        let count = self.0.len().max(1) as u64;
        let median = self.0.get(self.0.len() / 2).copied().unwrap_or(0);
        let least = self.0.first().copied().unwrap_or(0);
        let sum: u64 = self.0.iter().sum();
        println!("@@ROW {name} {median} {} {least} {count}", sum / count);
    }
}

impl FromIterator<u64> for Samples {
    fn from_iter<I: IntoIterator<Item = u64>>(ticks: I) -> Self {
        Self(ticks.into_iter().collect())
    }
}

/// The time-stamp counter.
#[inline]
pub fn now() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC, and Linux lets programs use it.
    // UNSAFETY: an instruction.
    #[allow(unsafe_code, unused_unsafe)]
    unsafe {
        core::arch::x86_64::_rdtsc()
    }
}

/// Ticks that `body` takes.
#[inline]
pub fn ticks<R>(body: impl FnOnce() -> R) -> (u64, R) {
    let start = now();
    let result = body();
    (now().wrapping_sub(start), result)
}
