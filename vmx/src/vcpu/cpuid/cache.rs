//! Answers of CPUID, kept: guests ask for few leaves, and for some of them all
//! the time.

use super::{CpuidTable, View};
use crate::cpu::CpuidResult;

/// Places, a power of two.
const PLACES: usize = 32;

/// One answer.
#[derive(Clone, Copy, Default)]
struct Answer {
    leaf: u32,
    subleaf: u32,
    result: CpuidResult,
}

/// The last answers to one virtual processor. An answer is what
/// [`CpuidTable::lookup`] makes of leaf, subleaf and view, so it stays right
/// until the table or the view changes.
#[derive(Default)]
pub struct Answers {
    /// What the answers below were given to.
    view: View,
    places: [Answer; PLACES],
    /// Bit n: place n holds an answer.
    filled: u32,
}

impl Answers {
    /// The table changed.
    pub fn forget(&mut self) {
        self.filled = 0;
    }

    /// What `table` answers.
    #[inline]
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn get(&mut self, table: &CpuidTable, leaf: u32, subleaf: u32, view: &View) -> CpuidResult {
        // The extended leaves go to the upper half.
        let index = (leaf ^ leaf >> 27) as usize % PLACES;
        if let Some(place) = self.places.get(index) {
            let is_it = self.filled >> index & 1 != 0
                && (place.leaf, place.subleaf) == (leaf, subleaf)
                && self.view == *view;
            if is_it {
                return place.result;
            }
        }
        self.look_up(table, leaf, subleaf, view, index)
    }

    #[inline(never)]
    #[cfg_attr(haxm_module, optimize(speed))]
    fn look_up(
        &mut self,
        table: &CpuidTable,
        leaf: u32,
        subleaf: u32,
        view: &View,
        index: usize,
    ) -> CpuidResult {
        if self.view != *view {
            self.view = *view;
            self.filled = 0;
        }
        let result = table.lookup(leaf, subleaf, view);
        if let Some(place) = self.places.get_mut(index) {
            *place = Answer {
                leaf,
                subleaf,
                result,
            };
            self.filled |= 1 << index;
        }
        result
    }
}
