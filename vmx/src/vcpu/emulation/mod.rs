//! Executing one guest instruction in software: what is kept of it while the
//! client has one of its accesses, and what its steps mean for the vCPU. The
//! emulator sees the vCPU as [`machine`] says; [`plain`] does the frequent
//! instructions without it.

mod machine;
pub(super) mod plain;
mod reload;

use abi::tunnel::{ExitStatus, IoDirection, IoFlags, TunnelIo};
use alloc::boxed::Box;
use core::cell::Cell;
use zerocopy::IntoBytes;

use self::plain::Moves;
use self::reload::Reload;
use super::exits::{self, Next, Work};
use super::{Inner, Vcpu};
use crate::Error;
use crate::arch::event::{Exception, vector};
use crate::emulate::{self, DecodeCache, Decoded, Fault, Insn, MmioLog, Step};
use crate::fallible::{NoMemory, try_box};
use crate::host::Host;
use crate::memory;
use machine::{Blocked, Snapshot, Virtual};

/// The instruction under way, if one waits for the client.
pub struct Emulation {
    pub(super) cache: Box<DecodeCache>,
    /// Which of the cache's. It looks nothing up until this one is done.
    insn: Option<Decoded>,
    log: MmioLog,
    /// RIP of a split lock that was left to the processor.
    split_lock: Option<u64>,
    /// How many instructions were not emulated.
    unsupported: u32,
    /// What the VMCS held when the instruction began. Nothing but a request of
    /// the client's can change it before the guest runs again.
    snapshot: Option<Snapshot>,
    /// The plain moves, which do without the rest.
    pub(super) moves: Moves,
}

/// Apart and never inlined: a kernel's stack is small.
#[inline(never)]
fn empty_cache() -> Result<Box<DecodeCache>, NoMemory> {
    try_box(DecodeCache::new())
}

impl Emulation {
    /// None under way.
    #[inline(never)]
    pub fn boxed() -> Result<Box<Self>, NoMemory> {
        try_box(Self {
            cache: empty_cache()?,
            insn: None,
            log: MmioLog::new(),
            split_lock: None,
            unsupported: 0,
            snapshot: None,
            moves: Moves::default(),
        })
    }

    /// The instruction at RIP is this one.
    pub(super) fn begin(&mut self, insn: Decoded) {
        self.insn = Some(insn);
        self.snapshot = None;
    }

    /// An instruction waits to be continued.
    pub fn is_under_way(&self) -> bool {
        self.insn.is_some()
    }

    /// The client has served the request; a read returned `value`.
    pub fn answer(&mut self, value: u64) {
        self.log.answer(value);
    }

    /// The instruction will not be continued.
    pub fn abandon(&mut self) {
        self.insn = None;
        self.log.clear();
        self.moves.abandon();
    }

    /// The client changed registers: they are read again before the
    /// instruction is continued.
    pub fn forget_registers(&mut self) {
        self.snapshot = None;
    }
}

const fn for_guest(exception: emulate::Exception) -> Exception {
    Exception {
        vector: exception.vector,
        error_code: exception.error_code,
        cr2: exception.cr2,
    }
}

impl<H: Host> Vcpu<H> {
    /// Executes the instruction at RIP, or continues the one under way.
    ///
    /// # Errors
    /// [`Error::Fault`]: the VMCS could not be loaded.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub(super) fn emulate(&self, inner: &mut Inner<H>) -> Result<Next, Error> {
        let known = inner.emulation.insn;
        if known.is_none() || inner.emulation.snapshot.is_none() {
            let insn = known.and_then(|at| inner.emulation.cache.insn(at));
            let named = insn.map_or(u8::MAX, Insn::segments);
            self.with_vmcs(inner, |current, inner| {
                inner.emulation.snapshot = Some(Snapshot::read(inner, current, named));
            })?;
        }
        let emulation = &mut *inner.emulation;
        let Some(snapshot) = &emulation.snapshot else {
            return Err(Error::Fault);
        };
        let mut machine = Virtual {
            vcpu: self,
            registers: &mut inner.registers,
            extended: &mut inner.extended,
            snapshot,
            split_lock: &mut emulation.split_lock,
            unsupported: &mut emulation.unsupported,
            reload: Reload::default(),
            debug: &inner.debug,
            hits: 0,
            blocked: Cell::new(None),
        };
        let insn = match known {
            Some(insn) => Ok(insn),
            None => machine.decode(&mut emulation.cache),
        };
        let mut repeats = false;
        let step = match insn {
            Ok(decoded) => {
                emulation.insn = Some(decoded);
                match emulation.cache.insn(decoded) {
                    Some(insn) if insn.uses_tables() && snapshot.tables.is_none() => {
                        return self.with_tables(inner);
                    }
                    Some(insn) => {
                        repeats = insn.op.is_string();
                        emulate::execute(insn, &mut machine, &mut emulation.log)
                    }
                    None => Step::Unsupported,
                }
            }
            Err(Fault::Exception(exception)) => Step::Fault(exception),
            Err(Fault::Blocked) => Step::Blocked,
        };
        if step == Step::Unsupported {
            machine.tell_unsupported();
        }
        let blocked = machine.blocked.get();
        let hits = machine.hits;
        // Large, and hardly ever used.
        let needed = step == Step::Done && machine.reload.is_needed();
        let reload = needed.then(|| core::mem::take(&mut machine.reload));
        let next = self.act(inner, step, blocked);
        if let Some(reload) = reload {
            self.with_vmcs(inner, |current, inner| reload.apply(inner, current))?;
        }
        if hits != 0 && (step == Step::Done || step == Step::Again && repeats) {
            self.with_vmcs(inner, |current, _| reload::pend_breakpoints(current, hits))?;
        }
        Ok(next)
    }

    /// Reads the descriptor-table registers too, and goes on.
    fn with_tables(&self, inner: &mut Inner<H>) -> Result<Next, Error> {
        self.with_vmcs(inner, |current, inner| {
            if let Some(snapshot) = &mut inner.emulation.snapshot {
                snapshot.tables = Some(reload::tables(current));
            }
        })?;
        Ok(Next::Work(Work::Emulate))
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn act(&self, inner: &mut Inner<H>, step: Step, blocked: Option<Blocked>) -> Next {
        match step {
            Step::Done => {
                inner.emulation.insn = None;
                inner.complete();
                Next::Resume
            }
            Step::Again => {
                inner.emulation.insn = None;
                Next::Resume
            }
            Step::Read { gpa, size } => {
                self.channel.set_fast_mmio(gpa, 0, size, 0);
                Next::Leave(ExitStatus::FastMmio)
            }
            Step::Write { gpa, size, value } => {
                self.channel.set_fast_mmio(gpa, value, size, 1);
                Next::Leave(ExitStatus::FastMmio)
            }
            Step::In {
                port,
                size,
                count,
                down,
            } => self.string_io(IoDirection::In, port, size, count, down),
            Step::Out {
                port,
                size,
                count,
                down,
            } => self.string_io(IoDirection::Out, port, size, count, down),
            Step::Fault(exception) => {
                inner.emulation.abandon();
                exits::raise(self, inner, for_guest(exception))
            }
            Step::Unsupported => {
                inner.emulation.abandon();
                exits::raise(self, inner, Exception::plain(vector::UD))
            }
            Step::Blocked => self.wait(inner, blocked),
        }
    }

    fn wait(&self, inner: &mut Inner<H>, blocked: Option<Blocked>) -> Next {
        match blocked {
            Some(Blocked::Protected { gpa, write }) => {
                let access = if write {
                    memory::Access::WRITE
                } else {
                    memory::Access::READ
                };
                self.report_protected(gpa, access)
            }
            Some(Blocked::Interrupted) => Next::Leave(ExitStatus::Interrupt),
            Some(Blocked::Again) | None => Next::Work(Work::Emulate),
            Some(Blocked::Broken(error)) => {
                log::error!("guest memory in the middle of an instruction: {error:?}");
                exits::lost(inner, "guest memory cannot be used")
            }
        }
    }

    #[cfg_attr(haxm_module, optimize(speed))]
    fn string_io(
        &self,
        direction: IoDirection,
        port: u16,
        size: u8,
        count: u16,
        down: bool,
    ) -> Next {
        let view = TunnelIo {
            direction: direction as u8,
            df: u8::from(down),
            size: u16::from(size),
            port,
            count,
            flags: IoFlags::STRING.bits(),
            ..TunnelIo::default()
        };
        self.channel.set_view(view.as_bytes());
        Next::Leave(ExitStatus::Io)
    }
}
