//! A guest: a VM with RAM, one vCPU in a mode, code, and a run loop that serves exits as QEMU would.

use std::time::Instant;

use abi::{ExitStatus, FxLayout, VcpuState};
use anyhow::{Context, Result, bail, ensure};

use crate::client::{System, Vcpu, Vm};
use crate::code::Code;
use crate::exit::{Exit, Step};
use crate::modes::{self, FIRST_RETURNING, HIGH_START, LOW_END, Mode, RAM_SIZE, STUBS};
use crate::ram::Ram;
use crate::threads::PATIENCE;

/// A VM with RAM, and its vCPU 0. The fields are dropped in this order.
pub struct Machine {
    pub vcpu: Vcpu,
    pub vm: Vm,
    pub ram: Ram,
    pub mode: Mode,
}

/// A VM with RAM at 0 and at 1 MB, without a vCPU.
pub fn vm_with_ram() -> Result<(Vm, Ram)> {
    let ram = Ram::new(RAM_SIZE);
    let vm = System::open()?.create_vm().context("CREATE_VM")?;
    vm.notify_version(4, 4)?;
    vm.add_ramblock(ram.address(), RAM_SIZE)
        .context("ADD_RAMBLOCK")?;
    vm.set_ram(0, LOW_END as u32, 0, ram.address())
        .context("SET_RAM")?;
    let high = (RAM_SIZE - HIGH_START) as u32;
    vm.set_ram(HIGH_START, high, 0, ram.address() + HIGH_START)
        .context("SET_RAM")?;
    Ok((vm, ram))
}

/// The x87 and SSE state after FNINIT and reset of MXCSR.
pub fn fpu_after_reset() -> FxLayout {
    FxLayout {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..FxLayout::default()
    }
}

/// Puts a vCPU into a mode, at the code's first byte.
pub fn prepare(vcpu: &Vcpu, mode: Mode) -> Result<()> {
    vcpu.set_regs(&modes::registers(mode)).context("SET_REGS")?;
    vcpu.set_fpu(&fpu_after_reset()).context("SET_FPU")?;
    let efer = if mode == Mode::Long {
        modes::EFER_LONG
    } else {
        0
    };
    let done = vcpu.set_msrs(&[(modes::EFER, efer)]).context("SET_MSRS")?;
    ensure!(done == 1, "SET_MSRS refused EFER {efer:#x}");
    Ok(())
}

impl Machine {
    /// A guest that will start at the first byte of the code.
    pub fn new(mode: Mode, code: Code) -> Result<Self> {
        let (vm, ram) = vm_with_ram()?;
        let vcpu = vm.create_vcpu(0).context("VCPU_CREATE")?;
        let bytes = match mode {
            Mode::Real => code.bits16,
            Mode::Protected | Mode::Paged | Mode::Pae => code.bits32,
            Mode::Long => code.bits64,
        };
        ensure!(!bytes.is_empty(), "the case has no code for this mode");
        modes::write_tables(mode, &ram);
        ram.write(modes::CODE, bytes);
        prepare(&vcpu, mode)?;
        Ok(Self {
            vcpu,
            vm,
            ram,
            mode,
        })
    }

    /// A guest whose code is in pages of the kernel's, as code that works with devices is. Only there, in modes with
    /// paging, does the driver take the short way for plain instructions on devices: it does not know CR4.SMEP, which
    /// would forbid to execute a page of the user's.
    pub fn with_kernel_code(mode: Mode, code: Code) -> Result<Self> {
        let machine = Self::new(mode, code)?;
        if matches!(mode, Mode::Paged | Mode::Pae | Mode::Long) {
            for page in [0, 1] {
                let (at, size) = mode.page_entry((modes::CODE >> 12) + page);
                let [low] = machine.ram.read(at, 1)[..] else {
                    bail!("no page table");
                };
                ensure!(size >= 4 && low & 5 == 5, "entry {low:#x}");
                machine.ram.write(at, &[low & !4]);
            }
        }
        Ok(machine)
    }

    /// Changes registers.
    pub fn set(&self, change: impl FnOnce(&mut VcpuState)) -> Result<()> {
        let mut state = self.regs()?;
        change(&mut state);
        self.vcpu.set_regs(&state).context("SET_REGS")
    }

    /// The registers.
    pub fn regs(&self) -> Result<VcpuState> {
        self.vcpu.regs().context("GET_REGS")
    }

    /// RUN once.
    pub fn run_once(&self) -> Result<Exit> {
        let result = self.vcpu.run().context("RUN")?;
        ensure!(result == 0, "RUN returned {result}");
        decode(&self.vcpu, self.mode, &self.ram)
    }

    /// RUN until an exit other than INTERRUPT.
    pub fn run(&self) -> Result<Exit> {
        run(&self.vcpu, self.mode, &self.ram)
    }

    /// RUN to the end of a list of exits, each one as it must be, and answered.
    pub fn expect(&self, steps: &[Step]) -> Result<()> {
        expect(&self.vcpu, self.mode, &self.ram, steps)
    }

    /// Answers the last exit.
    pub fn answer(&self, step: &Step) {
        answer(&self.vcpu, step);
    }

    /// The stack's top, `index` slots up.
    pub fn stack(&self, index: u64) -> Result<u64> {
        let slot = self.mode.slot();
        let at = self.regs()?.rsp + index * slot as u64;
        Ok(self.ram.number(at, slot))
    }

    /// The return address of the exception whose stub was reached, and the registers in the stub.
    pub fn frame_rip(&self, has_error: bool) -> Result<u64> {
        self.stack(u64::from(has_error))
    }
}

/// RUN until an exit other than INTERRUPT.
pub fn run(vcpu: &Vcpu, mode: Mode, ram: &Ram) -> Result<Exit> {
    let start = Instant::now();
    loop {
        let result = vcpu.run().context("RUN")?;
        ensure!(result == 0, "RUN returned {result}");
        match decode(vcpu, mode, ram)? {
            Exit::Interrupt => {}
            exit => return Ok(exit),
        }
        // A guest that has run this long without an exit of its own runs in a circle.
        if start.elapsed() > PATIENCE {
            let rip = vcpu.regs()?.rip;
            bail!("no exit in {PATIENCE:?}, rip {rip:#x}");
        }
    }
}

/// As [`Machine::expect`].
pub fn expect(vcpu: &Vcpu, mode: Mode, ram: &Ram, steps: &[Step]) -> Result<()> {
    for (index, step) in steps.iter().enumerate() {
        let exit =
            run(vcpu, mode, ram).with_context(|| format!("exit {index}: {:?}", step.exit))?;
        if exit != step.exit {
            let state = vcpu.regs()?;
            bail!(
                "exit {index}: {exit:?} instead of {:?}; rip {:#x} rsp {:#x}",
                step.exit,
                state.rip,
                state.rsp
            );
        }
        answer(vcpu, step);
    }
    Ok(())
}

/// Puts the answer where the driver looks for it.
pub fn answer(vcpu: &Vcpu, step: &Step) {
    match step.exit {
        Exit::In { .. } => vcpu.tunnel.set_buffer(&step.answer),
        Exit::Read { .. } => {
            let bytes: [u8; 8] = step.answer.as_slice().try_into().unwrap_or_default();
            vcpu.tunnel.set_fast_mmio_value(u64::from_le_bytes(bytes));
        }
        _ => {}
    }
}

fn decode(vcpu: &Vcpu, mode: Mode, ram: &Ram) -> Result<Exit> {
    let tunnel = vcpu.tunnel;
    let number = tunnel.exit_status();
    let Some(status) = ExitStatus::from_raw(number) else {
        return Ok(Exit::Other(number));
    };
    Ok(match status {
        ExitStatus::Io => port_access(vcpu)?,
        ExitStatus::FastMmio => {
            let (gpa, value, size, direction) = tunnel.fast_mmio();
            match direction {
                0 => Exit::Read { gpa, size },
                1 => Exit::Write { gpa, size, value },
                _ => bail!("FAST_MMIO direction {direction}"),
            }
        }
        ExitStatus::Hlt => halted(vcpu, mode, ram)?,
        ExitStatus::Interrupt => Exit::Interrupt,
        ExitStatus::StateChange => Exit::Lost,
        ExitStatus::Paused => Exit::Paused,
        ExitStatus::PageFault => {
            let (gpa, flags) = tunnel.page_fault();
            Exit::PageFault { gpa, flags }
        }
        ExitStatus::Debug => {
            let (rip, dr6, _) = tunnel.debug();
            Exit::Debug { rip, dr6 }
        }
        ExitStatus::Mmio | ExitStatus::RealMode | ExitStatus::Unknown => Exit::Other(number),
    })
}

fn port_access(vcpu: &Vcpu) -> Result<Exit> {
    let (direction, df, size, port, count) = vcpu.tunnel.io();
    ensure!(matches!(size, 1 | 2 | 4), "IO size {size}");
    let total = usize::from(size) * usize::from(count);
    ensure!(
        count != 0 && total <= abi::IO_BUFFER_SIZE,
        "IO count {count} of size {size}"
    );
    if direction == 1 {
        return Ok(Exit::In {
            port,
            size,
            count,
            df,
        });
    }
    let data = vcpu.tunnel.buffer(total);
    if port == modes::VECTOR_PORT
        && let [number] = data.as_slice()
    {
        return Ok(Exit::Vector(*number));
    }
    Ok(Exit::Out {
        port,
        size,
        data,
        df,
    })
}

/// A HLT: the code's own, or that of an exception's stub.
fn halted(vcpu: &Vcpu, mode: Mode, ram: &Ram) -> Result<Exit> {
    let state = vcpu.regs()?;
    let at = state.cs.base.wrapping_add(state.rip).wrapping_sub(1);
    let stubs = STUBS..STUBS + u64::from(FIRST_RETURNING) * 16;
    if !stubs.contains(&at) {
        return Ok(Exit::Halt);
    }
    let vector = ((at - STUBS) / 16) as u8;
    // SDM table 6-1 "Protected-Mode Exceptions and Interrupts"; none in real mode.
    let has_error = mode != Mode::Real && matches!(vector, 8 | 10..=14 | 17);
    let error = has_error.then(|| ram.number(state.rsp, mode.slot()));
    Ok(Exit::Exception { vector, error })
}
