//! Events for the guest: exceptions to raise, deliveries that an exit
//! interrupted, and the client's interrupts.
//!
//! One event goes in at an entry (SDM 27.6 "Event Injection"). What waits for
//! delivery is kept here; the client's vectors wait in [`PendingVectors`], held
//! back by the [`task_priority`]. [`delivery`] does in software what the
//! processor cannot.

mod delivery;
pub(super) mod pending;
pub(super) mod task_priority;

use self::pending::PendingVectors;
use super::vmcs::Current;
use crate::arch::event::{EventKind, Exception, InterruptionInfo, vector};
use crate::arch::field;
use crate::host::Host;

/// An event to inject at the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    info: InterruptionInfo,
    error_code: u32,
    /// Bytes of the instruction, for software interrupts and exceptions.
    length: u32,
}

/// What waits for an entry.
#[derive(Default)]
pub struct Events {
    waiting: Option<Event>,
    /// A triple fault: the vCPU is to stop.
    lost: bool,
}

/// Exceptions that make a double fault of a second one, SDM 6.15, table 6-5
/// "Conditions for Generating a Double Fault".
const fn is_contributory(number: u8) -> bool {
    matches!(
        number,
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP
    )
}

/// What two exceptions in a row make.
#[derive(Debug, PartialEq, Eq)]
enum Pair {
    /// The second is handled by itself.
    Serial,
    /// #DF.
    Double,
    /// Shutdown.
    Triple,
}

fn pair(first: u8, second: u8) -> Pair {
    match first {
        vector::DF => Pair::Triple,
        vector::PF if second == vector::PF || is_contributory(second) => Pair::Double,
        first if is_contributory(first) && is_contributory(second) => Pair::Double,
        _ => Pair::Serial,
    }
}

/// An event whose delivery an exit interrupted.
#[derive(Clone, Copy)]
pub struct Delivery {
    /// What it is.
    pub kind: EventKind,
    /// Its vector.
    pub vector: u8,
    /// The error code it pushes.
    pub error_code: Option<u32>,
    /// Bytes of the instruction, for software interrupts and exceptions.
    pub length: u32,
}

impl Delivery {
    /// A fault: the RFLAGS that its frame gets have RF set (SDM 18.3.1.1
    /// "Instruction-Breakpoint Exception Condition").
    pub fn is_fault(self) -> bool {
        self.kind == EventKind::Exception
            && !matches!(self.vector, vector::DB | vector::DF | vector::MC)
    }

    /// It is no instruction's: SDM 6.13 "Error Code", EXT.
    pub fn is_external(self) -> bool {
        !matches!(
            self.kind,
            EventKind::SoftwareInterrupt | EventKind::SoftwareException
        )
    }
}

impl Events {
    /// The event whose delivery the last exit interrupted.
    pub fn delivery(&self) -> Option<Delivery> {
        self.waiting.map(|event| Delivery {
            kind: event.info.kind(),
            vector: event.info.vector(),
            error_code: event.info.has_error_code().then_some(event.error_code),
            length: event.length,
        })
    }

    /// A task switch delivered it. If the new task `faults`, an exception still
    /// counts as the first of two.
    pub fn delivered(&mut self, faults: bool) {
        let kind = self.waiting.map(|event| event.info.kind());
        if !(faults && kind == Some(EventKind::Exception)) {
            self.waiting = None;
        }
    }

    /// Something waits.
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Exceptions piled up to a triple fault.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Nothing waits any more: a reset.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Raises an exception in the guest. A delivery that an exit interrupted
    /// counts as the first of a pair; an interrupt that waited goes back to
    /// the vectors.
    pub fn raise(&mut self, exception: Exception, vectors: &PendingVectors) {
        if let Some(first) = self.waiting {
            match first.info.kind() {
                EventKind::Exception => match pair(first.info.vector(), exception.vector) {
                    Pair::Serial => {}
                    Pair::Double => {
                        self.waiting = Some(Event {
                            info: InterruptionInfo::new(EventKind::Exception, vector::DF, true),
                            error_code: 0,
                            length: 0,
                        });
                        return;
                    }
                    Pair::Triple => {
                        self.lost = true;
                        return;
                    }
                },
                EventKind::Interrupt => {
                    vectors.post(first.info.vector());
                }
                _ => {}
            }
        }
        self.waiting = Some(Event {
            info: InterruptionInfo::new(
                EventKind::Exception,
                exception.vector,
                exception.error_code.is_some(),
            ),
            error_code: exception.error_code.unwrap_or(0),
            length: 0,
        });
    }

    /// Takes up a delivery that the last exit interrupted, so that the next
    /// entry repeats it. SDM 28.2.4 "Information for VM Exits During Event
    /// Delivery"; 27.6.1.1 tells what a repeated software interrupt needs. It is no
    /// NMI: those of the host exit, and none is injected.
    pub fn take_interrupted<H: Host>(&mut self, current: &Current<'_, H>) {
        let word = InterruptionInfo(current.get(field::IDT_VECTORING_INFO));
        if !word.is_valid() {
            return;
        }
        let kind = word.kind();
        let error_code = if word.has_error_code() {
            current.get(field::IDT_VECTORING_ERROR)
        } else {
            0
        };
        let length = match kind {
            EventKind::SoftwareInterrupt
            | EventKind::SoftwareException
            | EventKind::PrivilegedSoftwareException => current.get(field::EXIT_INSTRUCTION_LENGTH),
            _ => 0,
        };
        self.waiting = Some(Event {
            info: InterruptionInfo::new(kind, word.vector(), word.has_error_code()),
            error_code,
            length,
        });
    }

    /// Gives the entry its event, if one waits. In real-address mode events
    /// have no error code (SDM 27.2.1.3 "VM-Entry Control Fields").
    pub fn inject<H: Host>(&mut self, current: &Current<'_, H>, protected: bool) -> bool {
        let Some(event) = self.waiting.take() else {
            return false;
        };
        let mut word = event.info.0;
        if !protected {
            word &= !InterruptionInfo::ERROR_CODE;
        }
        if word & InterruptionInfo::ERROR_CODE != 0 {
            current.put(field::ENTRY_ERROR_CODE, event.error_code);
        }
        if event.length != 0 {
            current.put(field::ENTRY_INSTRUCTION_LENGTH, event.length);
        }
        current.write(field::ENTRY_INTERRUPTION_INFO, word);
        true
    }

    /// Gives the entry an external interrupt.
    #[inline]
    pub fn inject_vector<H: Host>(current: &Current<'_, H>, number: u8) {
        let word = InterruptionInfo::new(EventKind::Interrupt, number, false);
        current.write(field::ENTRY_INTERRUPTION_INFO, word.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raised(first: u8, second: u8) -> (Option<u8>, bool) {
        let vectors = PendingVectors::new();
        let mut events = Events::default();
        events.raise(Exception::plain(first), &vectors);
        events.raise(Exception::plain(second), &vectors);
        (events.waiting.map(|e| e.info.vector()), events.lost)
    }

    #[test]
    fn exceptions_pair_as_table_6_5_says() {
        assert_eq!(raised(vector::DB, vector::PF), (Some(vector::PF), false));
        assert_eq!(raised(vector::GP, vector::NP), (Some(vector::DF), false));
        assert_eq!(raised(vector::GP, vector::PF), (Some(vector::PF), false));
        assert_eq!(raised(vector::PF, vector::GP), (Some(vector::DF), false));
        assert_eq!(raised(vector::PF, vector::PF), (Some(vector::DF), false));
        assert_eq!(raised(vector::PF, vector::UD), (Some(vector::UD), false));
        assert!(raised(vector::DF, vector::PF).1);
    }

    #[test]
    fn an_interrupt_that_waited_is_not_lost() {
        let vectors = PendingVectors::new();
        let mut events = Events {
            waiting: Some(Event {
                info: InterruptionInfo::new(EventKind::Interrupt, 0x51, false),
                error_code: 0,
                length: 0,
            }),
            lost: false,
        };
        events.raise(Exception::gp(0), &vectors);
        assert_eq!(vectors.highest(), Some(0x51));
        assert_eq!(events.waiting.map(|e| e.info.vector()), Some(vector::GP));
    }
}
