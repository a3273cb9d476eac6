//! Samples of a row.

/// Ticks, one per repetition.
#[derive(Default)]
pub struct Samples(Vec<u64>);

impl Samples {
    pub fn push(&mut self, ticks: u64) {
        self.0.push(ticks);
    }

    /// Of several passes of one row, the one with the least mean: a short pass that an interrupt of the host's timer
    /// hits has a tenth more.
    pub fn quietest(passes: Vec<Self>) -> Self {
        passes
            .into_iter()
            .min_by_key(Self::mean)
            .unwrap_or_default()
    }

    fn mean(&self) -> u64 {
        self.0.iter().sum::<u64>() / self.count()
    }

    fn count(&self) -> u64 {
        self.0.len().max(1) as u64
    }

    /// Prints the row.
    pub fn print(mut self, name: &str) {
        self.0.sort_unstable();
        let median = self.0.get(self.0.len() / 2).copied().unwrap_or(0);
        let least = self.0.first().copied().unwrap_or(0);
        let (mean, count) = (self.mean(), self.count());
        println!("@@ROW {name} {median} {mean} {least} {count}");
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
