//! What two boots of the same contents differ in, drawn from a number: equal contents boot equally, so a test that
//! fails by chance passes a hundred times on one machine, and fails on the next, which has built other bytes.

use anyhow::{Context, Result};

use super::Pc;

/// Names the number that every PC of this process is drawn with.
pub const ENVIRONMENT: &str = "HAXM_TESTBED_SEED";

/// What the kernel can be told that changes who runs when and where, and no result.
const WORDS: &[&str] = &[
    "nohz=off",
    "highres=off",
    "threadirqs",
    "skew_tick=1",
    "preempt=full",
    "preempt=none",
    "idle=halt",
    "page_alloc.shuffle=1",
    "nokaslr",
    "slab_nomerge",
    "rcupdate.rcu_expedited=1",
];

/// What runs beside the script, in one boot of two: processes that never wait, as nice as the tests and nicer, and some
/// that come, sleep and go.
const BESIDE: &[&str] = &[
    "while :; do :; done &\n",
    "nice -n 19 sh -c 'while :; do :; done' &\n",
    "while :; do usleep 700; done &\n",
];

/// Draws (SplitMix64).
struct Draws(u64);

impl Draws {
    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end.max(1)
    }

    /// One of these words.
    fn of(&mut self, words: &[&'static str]) -> &'static str {
        words[self.below(words.len() as u64) as usize]
    }
}

/// The number that the environment names.
///
/// # Errors
/// It is no number.
pub(super) fn seed() -> Result<Option<u64>> {
    let Ok(text) = std::env::var(ENVIRONMENT) else {
        return Ok(None);
    };
    let seed = text.parse();
    seed.map(Some)
        .with_context(|| format!("{ENVIRONMENT} is '{text}', not a number"))
}

/// The same PC as it comes out with this number: where things are in memory, how many instructions a processor does
/// before it is another's turn, how many there are between two interrupts of the clock, what the kernel is told, when the
/// script starts and what runs beside it. The same number gives the same boot.
pub(super) fn perturbed(mut pc: Pc, seed: u64) -> Pc {
    let mut draws = Draws(seed);
    let rate = u64::from(pc.instructions_per_second) * (80 + draws.below(60)) / 100;
    pc.instructions_per_second = u32::try_from(rate).unwrap_or(u32::MAX);
    pc.memory_mb = (pc.memory_mb + draws.below(48) as u32).min(2560);
    pc.turn = 1 + draws.below(32) as u32;
    let padding = vec![0x5a; draws.below(0x1_0000) as usize];
    pc.files.bytes("/chance", padding, 0o644);
    pc.append.push_str(" chance=");
    pc.append
        .push_str(&"x".repeat(1 + draws.below(40) as usize));
    for _ in 0..draws.below(3) {
        pc.append.push(' ');
        pc.append.push_str(draws.of(WORDS));
    }
    // Each round takes some hundred instructions.
    let rounds = draws.below(2000);
    let mut script = format!("i=0; while [ $i -lt {rounds} ]; do i=$((i+1)); done\n");
    if draws.below(2) == 1 {
        let beside = draws.of(BESIDE);
        for _ in 0..=draws.below(u64::from(pc.cpus)) {
            script.push_str(beside);
        }
    }
    script.push_str(&pc.script);
    pc.script = script;
    pc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_a_boot() {
        let drawn = |seed| {
            let pc = perturbed(Pc::new().cpus(2).script("exit 7\n"), seed);
            assert!((1..=32).contains(&pc.turn) && (256..304).contains(&pc.memory_mb));
            assert!((40_000_000..70_000_000).contains(&pc.instructions_per_second));
            assert!(pc.script.ends_with("done\nexit 7\n") || pc.script.ends_with("&\nexit 7\n"));
            format!("{pc:?}")
        };
        let all: std::collections::BTreeSet<String> = (0..100).map(drawn).collect();
        assert_eq!(all.len(), 100);
        assert!((0..100).map(drawn).all(|pc| all.contains(&pc)));
    }
}
