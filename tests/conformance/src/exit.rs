//! What RUN came back with, decoded, and what a case may expect of it.

use std::fmt;

/// An exit.
#[derive(Clone, PartialEq, Eq)]
pub enum Exit {
    /// OUT: the bytes in the I/O buffer.
    Out {
        port: u16,
        size: u16,
        data: Vec<u8>,
        df: u8,
    },
    /// IN: so many elements are wanted.
    In {
        port: u16,
        size: u16,
        count: u16,
        df: u8,
    },
    /// An MMIO read.
    Read { gpa: u64, size: u8 },
    /// An MMIO write.
    Write { gpa: u64, size: u8, value: u64 },
    /// HLT in the case's own code.
    Halt,
    /// The stub of an exception was reached; with the error code its frame has.
    Exception { vector: u8, error: Option<u64> },
    /// The stub of an interrupt told its vector.
    Vector(u8),
    /// INTERRUPT.
    Interrupt,
    /// STATECHANGE.
    Lost,
    /// PAUSED.
    Paused,
    /// PAGEFAULT.
    PageFault { gpa: u64, flags: u32 },
    /// DEBUG.
    Debug { rip: u64, dr6: u64 },
    /// Any other status.
    Other(u32),
}

impl fmt::Debug for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Out {
                port,
                size,
                data,
                df,
            } => {
                write!(f, "OUT {port:#x} size {size} df {df} {data:02x?}")
            }
            Self::In {
                port,
                size,
                count,
                df,
            } => {
                write!(f, "IN {port:#x} size {size} count {count} df {df}")
            }
            Self::Read { gpa, size } => write!(f, "MMIO read {gpa:#x} size {size}"),
            Self::Write { gpa, size, value } => {
                write!(f, "MMIO write {gpa:#x} size {size} value {value:#x}")
            }
            Self::Halt => f.write_str("HLT"),
            Self::Exception { vector, error } => {
                write!(f, "exception {vector} error {error:x?}")
            }
            Self::Vector(vector) => write!(f, "interrupt {vector:#x}"),
            Self::Interrupt => f.write_str("INTERRUPT"),
            Self::Lost => f.write_str("STATECHANGE"),
            Self::Paused => f.write_str("PAUSED"),
            Self::PageFault { gpa, flags } => write!(f, "PAGEFAULT {gpa:#x} flags {flags:#x}"),
            Self::Debug { rip, dr6 } => write!(f, "DEBUG rip {rip:#x} dr6 {dr6:#x}"),
            Self::Other(status) => write!(f, "status {status}"),
        }
    }
}

/// An exit that is expected, and the client's answer to it.
#[derive(Clone, Debug)]
pub struct Step {
    /// What must come.
    pub exit: Exit,
    /// What the client answers: the bytes of an IN or an MMIO read.
    pub answer: Vec<u8>,
}

fn step(exit: Exit) -> Step {
    Step {
        exit,
        answer: Vec::new(),
    }
}

fn low_bytes(value: u64, size: usize) -> Vec<u8> {
    value.to_le_bytes().into_iter().take(size).collect()
}

/// One OUT.
pub fn out(port: u16, size: u16, value: u64) -> Step {
    step(Exit::Out {
        port,
        size,
        data: low_bytes(value, usize::from(size)),
        df: 0,
    })
}

/// OUTS: elements in ascending address order.
pub fn outs(port: u16, size: u16, data: &[u8], df: u8) -> Step {
    let data = data.to_vec();
    step(Exit::Out {
        port,
        size,
        data,
        df,
    })
}

/// One IN, answered.
pub fn input(port: u16, size: u16, value: u64) -> Step {
    Step {
        exit: Exit::In {
            port,
            size,
            count: 1,
            df: 0,
        },
        answer: low_bytes(value, usize::from(size)),
    }
}

/// INS, answered with elements in ascending address order.
pub fn ins(port: u16, size: u16, data: &[u8], df: u8) -> Step {
    Step {
        exit: Exit::In {
            port,
            size,
            count: (data.len() / usize::from(size)) as u16,
            df,
        },
        answer: data.to_vec(),
    }
}

/// An MMIO read, answered.
pub fn read(gpa: u64, size: u8, value: u64) -> Step {
    Step {
        exit: Exit::Read { gpa, size },
        answer: value.to_le_bytes().to_vec(),
    }
}

/// An MMIO write.
pub fn write(gpa: u64, size: u8, value: u64) -> Step {
    step(Exit::Write { gpa, size, value })
}

/// HLT.
pub fn halt() -> Step {
    step(Exit::Halt)
}

/// An exception without an error code.
pub fn fault(vector: u8) -> Step {
    step(Exit::Exception {
        vector,
        error: None,
    })
}

/// An exception with one.
pub fn fault_code(vector: u8, error: u64) -> Step {
    step(Exit::Exception {
        vector,
        error: Some(error),
    })
}

/// An interrupt that arrives.
pub fn vector(vector: u8) -> Step {
    step(Exit::Vector(vector))
}

/// STATECHANGE.
pub fn lost() -> Step {
    step(Exit::Lost)
}

/// PAUSED.
pub fn paused() -> Step {
    step(Exit::Paused)
}
