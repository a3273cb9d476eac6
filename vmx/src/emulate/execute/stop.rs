//! Why a call ends before its instruction is done, small enough for a register:
//! nearly every function here can end so, and a [`Step`] has 40 bytes.

use core::num::NonZeroU64;

use super::Run;
use crate::emulate::Step;
use crate::emulate::machine::{Exception, Fault, Machine};

/// A [`Step`] other than [`Step::Done`]. Bits 7:0 tell which; of an exception,
/// bits 15:8 are the vector, bit 16 is set if there is an error code, and that
/// is in bits 63:32. One with more to tell is in [`Run::kept`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Stop(NonZeroU64);

const AGAIN: u8 = 1;
const UNSUPPORTED: u8 = 2;
const EXCEPTION: u8 = 3;
const KEPT: u8 = 4;

const HAS_CODE: u64 = 1 << 16;

impl Stop {
    pub(super) const AGAIN: Self = Self::from_bits(AGAIN as u64);
    pub(super) const UNSUPPORTED: Self = Self::from_bits(UNSUPPORTED as u64);

    const fn from_bits(bits: u64) -> Self {
        match NonZeroU64::new(bits) {
            Some(bits) => Self(bits),
            // Every kind has a number above 0.
            None => Self(NonZeroU64::MIN),
        }
    }

    /// An exception that is not a page fault: CR2 has no place.
    pub(super) const fn exception(exception: Exception) -> Self {
        let code = match exception.error_code {
            Some(code) => HAS_CODE | (code as u64) << 32,
            None => 0,
        };
        Self::from_bits(EXCEPTION as u64 | (exception.vector as u64) << 8 | code)
    }
}

impl<M: Machine> Run<'_, M> {
    /// Ends the call with any step.
    #[inline(never)]
    pub(super) fn keep(&mut self, step: Step) -> Stop {
        self.kept = step;
        Stop::from_bits(KEPT.into())
    }

    /// Asks the machine for something.
    pub(super) fn served<T>(
        &mut self,
        ask: impl FnOnce(&mut M) -> Result<T, Fault>,
    ) -> Result<T, Stop> {
        ask(self.machine).map_err(|fault| self.refused(fault))
    }

    #[inline(never)]
    fn refused(&mut self, fault: Fault) -> Stop {
        self.keep(match fault {
            Fault::Exception(exception) => Step::Fault(exception),
            Fault::Blocked => Step::Blocked,
        })
    }

    /// The step that `stop` stands for.
    pub(super) fn step_of(&self, stop: Stop) -> Step {
        let bits = stop.0.get();
        let [kind, vector, ..] = bits.to_le_bytes();
        match kind {
            AGAIN => Step::Again,
            EXCEPTION => Step::Fault(Exception {
                vector,
                error_code: (bits & HAS_CODE != 0).then_some((bits >> 32) as u32),
                cr2: None,
            }),
            KEPT => self.kept,
            _ => Step::Unsupported,
        }
    }
}
