//! What a guest does: a queue of steps, one instruction each.
//!
//! A step that causes a VM exit stays at the front. At the next entry of the
//! same VMCS it is done if RIP moved (the hypervisor emulated it), and runs again
//! if RIP did not (the hypervisor repaired something). A fault injected into
//! it ends it too: the guest's handler is taken to skip the instruction.

use std::collections::{HashMap, VecDeque};

use crate::cores::thread_id;
use crate::ept::Access;
use crate::guest::{Guest, Stop, StringIo};

/// The name of a step that raises an exception.
pub(crate) const EXCEPTION: &str = "exception";

type Run = Box<dyn FnMut(&mut Guest<'_>) -> Result<(), Stop> + Send>;

/// One instruction of a guest, or one action of a test in its place.
pub struct Step {
    pub(crate) name: &'static str,
    /// Bytes of the instruction; 0 for an action that is none.
    pub(crate) length: u64,
    /// Runs while an injected event is being delivered.
    pub(crate) on_delivery: bool,
    pub(crate) run: Run,
}

impl Step {
    /// An instruction of `length` bytes. It may run more than once.
    pub fn new(
        name: &'static str,
        length: u64,
        run: impl FnMut(&mut Guest<'_>) -> Result<(), Stop> + Send + 'static,
    ) -> Self {
        Self {
            name,
            length,
            on_delivery: false,
            run: Box::new(run),
        }
    }

    /// No instruction: the test looks at the guest or changes it.
    pub fn act(mut act: impl FnMut(&mut Guest<'_>) + Send + 'static) -> Self {
        Self::new("act", 0, move |guest| {
            act(guest);
            Ok(())
        })
    }

    /// The same instruction, with something that happens while it exits.
    #[must_use]
    pub fn with(mut self, mut act: impl FnMut() + Send + 'static) -> Self {
        let mut run = self.run;
        self.run = Box::new(move |guest| {
            act();
            run(guest)
        });
        self
    }

    /// Writes a general register.
    #[must_use]
    pub fn set_gpr(index: usize, value: u64) -> Self {
        Self::act(move |guest| guest.regs.gpr[index] = value)
    }

    /// Checks a general register.
    #[must_use]
    pub fn expect_gpr(index: usize, value: u64) -> Self {
        Self::act(move |guest| {
            assert_eq!(guest.regs.gpr[index], value, "general register {index}");
        })
    }

    /// An access to guest-physical memory made while the event injected at the
    /// next entry is delivered.
    #[must_use]
    pub fn delivery_access(gpa: u64, access: Access) -> Self {
        let mut step = Self::new("delivery access", 0, move |guest| {
            guest.touch(gpa, access).map(|_| ())
        });
        step.on_delivery = true;
        step
    }

    /// The same step while the event injected at the next entry is delivered.
    #[must_use]
    pub fn during_delivery(mut self) -> Self {
        self.on_delivery = true;
        self
    }

    /// A task gate in the IDT: the delivery of the event injected at the next
    /// entry exits for a switch to the TSS that `selector` selects. Once: the
    /// delivery after it succeeds.
    #[must_use]
    pub fn delivery_through_a_task_gate(selector: u16) -> Self {
        let mut first = true;
        let mut step = Self::new("task gate", 0, move |guest| {
            if std::mem::take(&mut first) {
                return Err(guest.exit_now(9, u64::from(selector) | 3 << 30));
            }
            Ok(())
        });
        step.on_delivery = true;
        step
    }

    /// CPUID.
    #[must_use]
    pub fn cpuid(leaf: u32, subleaf: u32) -> Self {
        Self::new("CPUID", 2, move |guest| guest.cpuid(leaf, subleaf))
    }

    /// RDMSR to EDX:EAX.
    #[must_use]
    pub fn rdmsr(number: u32) -> Self {
        Self::new("RDMSR", 2, move |guest| guest.rdmsr(number))
    }

    /// WRMSR.
    #[must_use]
    pub fn wrmsr(number: u32, value: u64) -> Self {
        Self::new("WRMSR", 2, move |guest| guest.wrmsr(number, value))
    }

    /// IN from a port in DX to AL, AX or EAX.
    #[must_use]
    pub fn input(port: u16, size: u8) -> Self {
        Self::new("IN", 1, move |guest| guest.port(port, size, true))
    }

    /// OUT to a port in DX.
    #[must_use]
    pub fn output(port: u16, size: u8, value: u32) -> Self {
        Self::new("OUT", 1, move |guest| {
            guest.regs.gpr[0] = guest.regs.gpr[0] & !0xffff_ffff | u64::from(value);
            guest.port(port, size, false)
        })
    }

    /// INS or OUTS, with or without REP; registers are as they are.
    #[must_use]
    pub fn string_io(io: StringIo) -> Self {
        Self::new("INS/OUTS", if io.rep { 2 } else { 1 }, move |guest| {
            guest.string_io(io)
        })
    }

    /// HLT.
    #[must_use]
    pub fn hlt() -> Self {
        Self::new("HLT", 1, |guest: &mut Guest<'_>| guest.hlt())
    }

    /// MOV to CR0, CR3, CR4 or CR8 from a general register, which gets `value` first.
    #[must_use]
    pub fn mov_to_cr(cr: u8, gpr: usize, value: u64) -> Self {
        Self::new("MOV to CR", 3, move |guest| {
            guest.set_register(gpr, value);
            guest.mov_to_cr(cr, gpr)
        })
    }

    /// MOV from CR0, CR3, CR4 or CR8.
    #[must_use]
    pub fn mov_from_cr(cr: u8, gpr: usize) -> Self {
        Self::new("MOV from CR", 3, move |guest| guest.mov_from_cr(cr, gpr))
    }

    /// CLTS.
    #[must_use]
    pub fn clts() -> Self {
        Self::new("CLTS", 2, |guest: &mut Guest<'_>| guest.clts())
    }

    /// LMSW of a register operand.
    #[must_use]
    pub fn lmsw(value: u16) -> Self {
        Self::new("LMSW", 3, move |guest| guest.lmsw(value))
    }

    /// MOV to a debug register from a general register, which gets `value` first.
    #[must_use]
    pub fn mov_to_dr(dr: u8, gpr: usize, value: u64) -> Self {
        Self::new("MOV to DR", 3, move |guest| {
            guest.set_register(gpr, value);
            guest.mov_dr(dr, gpr, false)
        })
    }

    /// MOV from a debug register.
    #[must_use]
    pub fn mov_from_dr(dr: u8, gpr: usize) -> Self {
        Self::new("MOV from DR", 3, move |guest| guest.mov_dr(dr, gpr, true))
    }

    /// Reads guest-physical memory (linear address equal) and checks the value,
    /// if it was memory. For an instruction of `length` bytes.
    #[must_use]
    pub fn read(gpa: u64, size: usize, expect: u64, length: u64) -> Self {
        Self::new("read", length, move |guest| {
            let value = guest.read(gpa, size)?;
            assert_eq!(value, expect, "guest memory at {gpa:#x}");
            Ok(())
        })
    }

    /// Writes guest-physical memory (linear address equal), by an instruction
    /// of `length` bytes.
    #[must_use]
    pub fn write(gpa: u64, size: usize, value: u64, length: u64) -> Self {
        Self::new("write", length, move |guest| guest.write(gpa, size, value))
    }

    /// Reads device memory and writes it, by one instruction of `length` bytes.
    /// The exit is called a write, and with `both` a read too: processors differ.
    #[must_use]
    pub fn update(gpa: u64, both: bool, length: u64) -> Self {
        Self::new("update", length, move |guest| {
            guest.write(gpa, 1, 0).map_err(|stop| match stop {
                Stop::Exit(mut exit) => {
                    exit.qualification |= u64::from(both);
                    Stop::Exit(exit)
                }
                fault @ Stop::Fault { .. } => fault,
            })
        })
    }

    /// Fetches from guest-physical memory.
    #[must_use]
    pub fn fetch(gpa: u64) -> Self {
        Self::new("fetch", 0, move |guest| {
            guest.touch(gpa, Access::Fetch).map(|_| ())
        })
    }

    /// Raises an exception in the guest by itself, as an instruction of 2
    /// bytes (INT3 and INTO: 1) does.
    #[must_use]
    pub fn exception(vector: u8, error_code: Option<u32>, cr2: u64) -> Self {
        let length = if matches!(vector, 3 | 4) { 1 } else { 2 };
        Self::new(EXCEPTION, length, move |_| {
            Err(Stop::Fault {
                vector,
                error_code,
                cr2,
            })
        })
    }

    /// A locked instruction whose operand is in two cache lines, SDM 9.1.2.3 "Features to
    /// Disable Bus Locks".
    #[must_use]
    pub fn split_lock() -> Self {
        Self::new("split lock", 3, |guest| guest.split_lock())
    }

    /// An instruction that exits whatever the controls say, or one the test
    /// knows to: exit reason, qualification, length.
    #[must_use]
    pub fn exits(reason: u16, qualification: u64, length: u64) -> Self {
        Self::new("exits", length, move |guest| {
            Err(guest.exit_now(reason, qualification))
        })
    }

    /// An instruction that exits if a control is set: `field` is the control
    /// word, `bit` its bit. Otherwise it does nothing.
    #[must_use]
    pub fn exits_if(field: u32, bit: u32, reason: u16, length: u64) -> Self {
        Self::new("conditional", length, move |guest| {
            let on = if field == 0x401e {
                guest.secondary(bit)
            } else {
                guest.field(field) >> bit & 1 != 0
            };
            if on {
                Err(guest.exit_now(reason, 0))
            } else {
                Ok(())
            }
        })
    }

    /// RDTSC to EDX:EAX.
    #[must_use]
    pub fn rdtsc() -> Self {
        Self::new("RDTSC", 2, |guest: &mut Guest<'_>| guest.rdtsc())
    }

    /// Triple fault.
    #[must_use]
    pub fn triple_fault() -> Self {
        Self::exits(2, 0, 0)
    }

    /// An interrupt for the host arrives at this processor.
    #[must_use]
    pub fn host_interrupt() -> Self {
        Self::act(|guest| guest.raise_host_interrupt())
    }

    /// An NMI for the host arrives at this processor.
    #[must_use]
    pub fn host_nmi() -> Self {
        Self::act(|guest| guest.raise_host_nmi())
    }

    /// The guest loops until a host interrupt comes from elsewhere.
    #[must_use]
    pub fn spin_until_interrupt() -> Self {
        Self::act(|guest| guest.wait_for_host_interrupt())
    }

    /// STI or CLI, with STI's shadow.
    #[must_use]
    pub fn set_if(on: bool) -> Self {
        Self::new(if on { "STI" } else { "CLI" }, 1, move |guest| {
            guest.set_if(on);
            Ok(())
        })
    }

    /// IRET of an NMI handler: unblocks NMIs.
    #[must_use]
    pub fn iret_from_nmi() -> Self {
        Self::new("IRET", 2, |guest| {
            let state = guest.field(0x4824);
            guest.set_field(0x4824, state & !8);
            Ok(())
        })
    }
}

/// A step that exited.
pub(crate) struct InFlight {
    pub(crate) step: Step,
    pub(crate) rip: u64,
    pub(crate) runs: u32,
}

/// The queues of all threads.
#[derive(Default)]
pub(crate) struct Scripts {
    queues: HashMap<u64, VecDeque<Step>>,
    in_flight: HashMap<u64, InFlight>,
}

impl Scripts {
    pub(crate) fn push_here(&mut self, steps: impl IntoIterator<Item = Step>) {
        self.queues.entry(thread_id()).or_default().extend(steps);
    }

    pub(crate) fn left_here(&self) -> usize {
        self.queues.get(&thread_id()).map_or(0, VecDeque::len)
    }

    pub(crate) fn next(&mut self) -> Option<Step> {
        self.queues.get_mut(&thread_id())?.pop_front()
    }

    pub(crate) fn next_is_delivery(&self) -> bool {
        self.queues
            .get(&thread_id())
            .and_then(VecDeque::front)
            .is_some_and(|step| step.on_delivery)
    }

    pub(crate) fn put_back(&mut self, step: Step) {
        self.queues.entry(thread_id()).or_default().push_front(step);
    }

    pub(crate) fn park(&mut self, vmcs: u64, in_flight: InFlight) {
        self.in_flight.insert(vmcs, in_flight);
    }

    pub(crate) fn parked(&mut self, vmcs: u64) -> Option<InFlight> {
        self.in_flight.remove(&vmcs)
    }
}
