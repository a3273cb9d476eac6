//! A client or a guest that means harm: the host stays up, and other guests do not notice.

use std::time::Duration;

use abi::VcpuState;
use abi::zerocopy::{FromBytes, IntoBytes};
use anyhow::Context;

use super::{Case, Outcome};
use crate::client::{Refused, System};
use crate::exit::{Exit, fault, halt, lost, out, write};
use crate::guest;
use crate::machine::{self, Machine};
use crate::modes::{CODE, DATA, DEVICE, Mode};
use crate::process::Clock;

pub const CASES: &[Case] = &[
    case!(random_registers),
    case!(random_tunnel),
    case!(random_requests),
    case!(random_code in ALL),
    case!(garbage_in_page_tables in PAGING),
    case!(tables_in_device_memory in PAGING),
    case!(stack_in_device_memory in PROTECTED),
    case!(interrupt_table_in_device_memory in PROTECTED),
    case!(code_in_a_hole_of_ram in SIZES),
    case!(self_modifying in SIZES),
    case!(endless_faults in PROTECTED),
    case!(endless_debug in LONG),
    case!(instruction_across_pages in SIZES),
    case!(instruction_into_device),
    case!(longest_instruction in LONG),
    case!(other_guest_does_not_notice),
    case!(run_after_everything),
    case!(task_switch_is_no_loss),
    case!(msr_sweep),
    case!(port_sweep),
];

/// Numbers that are the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64*, with Marsaglia's constants.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = self.next() as u8;
        }
    }
}

/// A guest that does what it should: nothing before has done harm.
fn still_works() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "mov eax, 7", "out 0x80, al", "hlt"))?;
    machine.expect(&[out(0x80, 1, 7), halt()])
}

/// RUN a few times, whatever comes. An entry that the processor refuses is EINVAL, and the end of this guest. Whether
/// it came to that.
fn poke(machine: &Machine) -> anyhow::Result<bool> {
    for _ in 0..4 {
        match machine.vcpu.run() {
            Ok(_) if machine.vcpu.tunnel.exit_status() == 7 => break,
            Ok(_) => {}
            Err(Refused(libc::EINVAL)) => {
                machine.expect(&[lost()])?;
                return Ok(true);
            }
            Err(other) => anyhow::bail!("RUN: {other}"),
        }
    }
    Ok(false)
}

/// What SET_REGS takes as it is, whatever it is.
fn taken(state: &VcpuState) -> Vec<u64> {
    let segments = [
        state.es, state.cs, state.ss, state.ds, state.fs, state.gs, state.ldt,
    ];
    let mut all = state.regs().to_vec();
    all.extend([
        state.rip,
        state.cr2,
        state.cr3,
        state.gdt.base,
        state.idt.base,
    ]);
    for segment in segments {
        all.extend([segment.selector.into(), segment.base, segment.limit.into()]);
    }
    all
}

/// SET_REGS with one field of nonsense, or all of them: what is set comes back, and many an entry is refused.
fn random_registers() -> Outcome {
    let mut random = Random(1);
    let mut refused = 0;
    for round in 0..150 {
        let machine = Machine::new(Mode::Long, guest!(64: "2: nop", "jmp 2b"))?;
        let mut bytes = [0_u8; size_of::<VcpuState>()];
        if round % 5 == 0 {
            random.fill(&mut bytes);
        } else {
            let good = machine.regs()?;
            bytes.copy_from_slice(good.as_bytes());
            for _ in 0..=round % 3 {
                let at = random.next() as usize % (bytes.len() / 4) * 4;
                random.fill(&mut bytes[at..at + 4]);
            }
        }
        let set = VcpuState::read_from_bytes(&bytes).map_err(|e| anyhow::anyhow!("{e}"))?;
        let request = abi::os::linux::HAX_VCPU_SET_REGS;
        machine.vcpu.node.with(request, &mut bytes)?;
        same!(taken(&machine.regs()?), taken(&set), "round {round}");
        if random.next() & 1 == 0 {
            let efer = random.next() & 0xd01;
            machine.vcpu.set_msrs(&[(0xc000_0080, efer)])?;
        }
        refused += u32::from(poke(&machine).with_context(|| format!("round {round}"))?);
        machine.regs()?;
    }
    anyhow::ensure!(refused >= 30, "{refused} of 150 entries were refused");
    still_works()
}

/// Every word of the tunnel and of the buffer is nonsense at every RUN: the guest goes on from one access to the next.
fn random_tunnel() -> Outcome {
    let code = guest!(64:
        "2: in al, 0x70", "mov eax, [0xd0000]", "mov edi, 0xc000", "mov ecx, 70", "rep insb",
        "add dword ptr [0xd0008], 3", "mov esi, 0xc000", "mov ecx, 70", "rep outsb", "jmp 2b");
    // Kind, place, and elements or bytes.
    let accesses = [
        ("in", 0x70, 1),
        ("read", DEVICE, 4),
        ("in", 0, 64),
        ("in", 0, 6),
        ("read", DEVICE + 8, 4),
        ("write", DEVICE + 8, 4),
        ("out", 0, 64),
        ("out", 0, 6),
    ];
    let mut random = Random(2);
    for number in 0..10 {
        // Every other one goes the short way to its device.
        let machine = match number % 2 {
            0 => Machine::new(Mode::Long, code)?,
            _ => Machine::with_kernel_code(Mode::Long, code)?,
        };
        let mut wanted = accesses.iter().cycle();
        for round in 0..60 {
            let access = match machine.run_once()? {
                Exit::Interrupt | Exit::Paused => None,
                Exit::In { port, count, .. } => Some(("in", port.into(), count.into())),
                Exit::Out { port, data, .. } => Some(("out", port.into(), data.len())),
                Exit::Read { gpa, size } => Some(("read", gpa, size.into())),
                Exit::Write { gpa, size, .. } => Some(("write", gpa, size.into())),
                other => anyhow::bail!("{other:?}"),
            };
            if let Some(access) = access {
                same!(Some(&access), wanted.next(), "exit {round}");
            }
            let tunnel = machine.vcpu.tunnel;
            let mut buffer = [0; 64];
            random.fill(&mut buffer);
            tunnel.set_buffer(&buffer);
            tunnel.spoil_io(random.next() as u8);
            tunnel.set_exit_status(random.next() as u32);
            tunnel.set_window(random.next() as u32);
            tunnel.set_exit_reason(random.next() as u32 % 12);
        }
    }
    still_works()
}

/// All requests with arguments of nonsense, in any order.
fn random_requests() -> Outcome {
    let mut random = Random(3);
    let system = System::open()?;
    for _ in 0..10 {
        let machine = Machine::new(Mode::Long, guest!(64: "2: nop", "jmp 2b"))?;
        for _ in 0..100 {
            let request = abi::Request::ALL[random.next() as usize % abi::Request::ALL.len()];
            let Some(number) = abi::os::linux::number(request) else {
                continue;
            };
            // These would leave VMs that nobody can close.
            if matches!(request, abi::Request::CreateVm | abi::Request::SetMemlimit) {
                continue;
            }
            let mut argument = [0_u8; 4096];
            let spread = [1, 8, 16, 64, 520][random.next() as usize % 5];
            random.fill(&mut argument[..spread]);
            let node = match request.device() {
                abi::Device::System => &system.0,
                abi::Device::Vm => &machine.vm.node,
                abi::Device::Vcpu => &machine.vcpu.node,
            };
            // GET_CPUID writes where the argument says; only addresses of no one.
            if matches!(request, abi::Request::GetCpuid | abi::Request::SetCpuid) {
                argument[..8].copy_from_slice(&(random.next() | 1 << 63).to_le_bytes());
            }
            // One thread alone, with arguments that are all its own.
            if let Err(Refused(errno)) = node.with(number, &mut argument) {
                let known = [libc::EINVAL, libc::EFAULT, libc::ENOSYS, libc::E2BIG];
                anyhow::ensure!(known.contains(&errno), "{request:?}: {}", Refused(errno));
            }
        }
    }
    still_works()
}

/// What a system is made of: the rest of the bytes is nonsense.
const OPENINGS: &[&[u8]] = &[
    &[],
    // MOV to and from CR and DR, CLTS, WRMSR, RDMSR.
    &[0x0f, 0x22],
    &[0x0f, 0x20],
    &[0x0f, 0x23],
    &[0x0f, 0x21],
    &[0x0f, 0x06],
    &[0x0f, 0x30],
    &[0x0f, 0x32],
    // SLDT to VERW, SGDT to XGETBV, FXSAVE to SFENCE, CMPXCHG8B to VMPTRST.
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    // MOV and POP to a segment register, far branches, INT, IRET, POPF.
    &[0x8e],
    &[0x1f],
    &[0xea],
    &[0xff],
    &[0xcd],
    &[0xcf],
    &[0x9d],
    // Ports and strings.
    &[0xe6],
    &[0xed],
    &[0xf3, 0x6c],
    &[0xf3, 0x6f],
    &[0xf3, 0xa4],
    &[0xf2, 0xaf],
    // Prefixes; INT1, HLT, CLI, STI.
    &[0x66],
    &[0xf0],
    &[0x0f],
    &[0xf1],
    &[0xf4],
    &[0xfa],
    &[0xfb],
];

/// A guest of random bytes: each exit is whole, and none of what a guest does makes an entry fail.
fn random_code(mode: Mode) -> Outcome {
    let mut random = Random(4 + mode as u64);
    let mut machine = Machine::new(mode, guest!("hlt"))?;
    for round in 0..200_u64 {
        if round % 50 == 0 {
            machine = Machine::new(mode, guest!("hlt"))?;
        }
        let mut bytes = [0; 64];
        random.fill(&mut bytes);
        let opening = OPENINGS[random.next() as usize % OPENINGS.len()];
        bytes[..opening.len()].copy_from_slice(opening);
        machine::prepare(&machine.vcpu, mode)?;
        // Not where the last one was, which is given up so.
        let at = round % 8 * 64;
        machine.ram.write(CODE + at, &bytes);
        machine.set(|state| {
            let mut values = state.regs();
            for value in &mut values {
                *value = match random.next() % 4 {
                    0 => DEVICE + random.next() % 0x1000,
                    1 => DATA + random.next() % 0x1000,
                    2 => random.next(),
                    _ => random.next() % 256,
                };
            }
            state.set_regs(values);
            // Most of them find their handlers.
            if round % 4 != 0 {
                state.rsp = crate::modes::STACK;
            }
            state.rip = mode.entry() + at;
        })?;
        for _ in 0..6 {
            let exit = machine
                .run_once()
                .with_context(|| format!("round {round}: {bytes:02x?}"))?;
            match exit {
                Exit::Lost => machine = Machine::new(mode, guest!("hlt"))?,
                Exit::Halt | Exit::Exception { .. } => {}
                _ => continue,
            }
            break;
        }
    }
    still_works()
}

/// No instruction is found, and no handler.
fn garbage_in_page_tables(mode: Mode) -> Outcome {
    let mut random = Random(9);
    for round in 0..15 {
        let machine = Machine::new(mode, guest!("out 0x80, al", "mov eax, [edi]", "hlt"))?;
        machine.expect(&[out(0x80, 1, 0)])?;
        let mut page = [0; 4096];
        random.fill(&mut page);
        let table = if mode == Mode::Paged { 0x8000 } else { 0x5000 };
        machine.ram.write(table, &page);
        machine.set(|state| state.rdi = random.next() & 0x3fff_ffff)?;
        machine
            .expect(&[lost()])
            .with_context(|| format!("round {round}"))?;
    }
    still_works()
}

/// CR3 points at the device: an entry that nobody answers for, a fault that nobody can take.
fn tables_in_device_memory(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("hlt"))?;
    machine.set(|state| state.cr3 = DEVICE)?;
    machine.expect(&[lost()])?;
    still_works()
}

fn stack_in_device_memory(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("push 5", "hlt"))?;
    machine.set(|state| state.rsp = DEVICE + 0x100)?;
    let size = mode.slot() as u64;
    machine.expect(&[write(DEVICE + 0x100 - size, size as u8, 5), halt()])?;
    // An exception's frame cannot go there.
    let machine = Machine::new(mode, guest!("ud2"))?;
    machine.set(|state| state.rsp = DEVICE + 0x100)?;
    let exit = machine.run()?;
    anyhow::ensure!(matches!(exit, Exit::Lost | Exit::Write { .. }), "{exit:?}");
    still_works()
}

fn interrupt_table_in_device_memory(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("int 0x40", "hlt"))?;
    machine.set(|state| state.idt.base = DEVICE)?;
    let exit = machine.run()?;
    anyhow::ensure!(matches!(exit, Exit::Lost | Exit::Read { .. }), "{exit:?}");
    still_works()
}

/// The page with the code is unmapped while it runs: no instruction to execute, no loop without end.
fn code_in_a_hole_of_ram(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("out 0x80, al", "out 0x80, al", "hlt"))?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.vm.unmap(CODE, 0x1000)?;
    machine.expect(&[fault(6)])?;
    still_works()
}

/// Changes the constant of the store behind it, which the driver then reads, three times over.
fn self_modifying(mode: Mode) -> Outcome {
    let code = guest!(
        "2: mov byte ptr [edi], al",
        "mov byte ptr [esi], 0x55",
        "inc eax",
        "cmp eax, 3",
        "jb 2b",
        "hlt"
    );
    let machine = Machine::with_kernel_code(mode, code)?;
    // 16- and 64-bit code has a prefix for EDI and one for ESI.
    let constant = match mode {
        Mode::Real | Mode::Long => 6,
        _ => 4,
    };
    machine.set(|state| (state.rdi, state.rsi) = (CODE + constant, DEVICE))?;
    machine.expect(&[
        write(DEVICE, 1, 0),
        write(DEVICE, 1, 1),
        write(DEVICE, 1, 2),
        halt(),
    ])
}

/// A fault whose handler is the faulting instruction: until there is no stack left.
fn endless_faults(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("ud2"))?;
    // Vector 6 leads to the UD2, and its stack has room for a while.
    let target = CODE as u16;
    let size = if mode == Mode::Long { 16 } else { 8 };
    machine.ram.write_u16(crate::modes::IDT + 6 * size, target);
    machine
        .ram
        .write_u16(crate::modes::IDT + 6 * size + 6, (CODE >> 16) as u16);
    machine.set(|state| state.rsp = 0x1f_f000)?;
    machine.expect(&[lost()])?;
    still_works()
}

/// #DB in its own handler, which exits each time, until there is no stack left. RUN comes back all the same, whenever
/// the host has something to do: with each tick of its clock.
fn endless_debug(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!(64: "2: .byte 0xf1", "jmp 2b"))?;
    let size = 16;
    machine.ram.write_u16(crate::modes::IDT + size, CODE as u16);
    machine
        .ram
        .write_u16(crate::modes::IDT + size + 6, (CODE >> 16) as u16);
    machine.set(|state| state.rsp = 0x1f_f000)?;
    // Of this thread's own time: what others have in between is not RUN's.
    let clock = Clock::of_this_thread()?;
    let (start, mut came_back) = (clock.now(), 0);
    let end = loop {
        match machine.run_once()? {
            Exit::Interrupt => came_back += 1,
            exit => break exit,
        }
    };
    same!(end, Exit::Lost, "the end");
    // A tick is 4 ms at 250 Hz.
    let time = clock.now() - start;
    anyhow::ensure!(
        time < Duration::from_millis(12) * came_back,
        "RUN came back {came_back} times in {time:?}"
    );
    still_works()
}

/// An instruction the driver has to read whole lies on two pages.
fn instruction_across_pages(mode: Mode) -> Outcome {
    // In 16-bit code the address prefix is part of it.
    let code = guest!("mov dword ptr [edi], 0x12345678", "hlt");
    let machine = Machine::new(mode, code)?;
    let bytes = match mode {
        Mode::Real => code.bits16,
        Mode::Long => code.bits64,
        _ => code.bits32,
    };
    for before in 1..bytes.len() as u64 - 1 {
        let at = CODE + 0x1000 - before;
        machine.ram.write(at, bytes);
        machine.set(|state| {
            state.rip = mode.entry() + 0x1000 - before;
            state.rdi = DEVICE;
        })?;
        machine.expect(&[write(DEVICE, 4, 0x12345678), halt()])?;
    }
    Ok(())
}

/// Its second half is in device memory: no bytes to execute.
fn instruction_into_device() -> Outcome {
    let code = guest!(64: "mov dword ptr [rdi], 0x12345678", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    let end = crate::modes::LOW_END;
    machine.ram.write(end - 3, &code.bits64[..3]);
    machine.set(|state| {
        state.rip = end - 3;
        state.rdi = DEVICE;
    })?;
    machine.expect(&[fault(6)])?;
    still_works()
}

/// Fifteen bytes are an instruction, sixteen are #GP.
fn longest_instruction(mode: Mode) -> Outcome {
    for prefixes in [11, 12, 13] {
        let machine = Machine::new(mode, guest!(64: "hlt"))?;
        let mut bytes = vec![0x3e; prefixes];
        // mov [rdi], al; hlt
        bytes.extend([0x88, 0x07, 0xf4]);
        machine.ram.write(CODE, &bytes);
        machine.set(|state| state.rdi = DEVICE)?;
        machine.expect(&[write(DEVICE, 1, 0), halt()])?;
    }
    let machine = Machine::new(mode, guest!(64: "hlt"))?;
    let mut bytes = vec![0x3e; 14];
    bytes.extend([0x88, 0x07, 0xf4]);
    machine.ram.write(CODE, &bytes);
    machine.set(|state| state.rdi = DEVICE)?;
    machine.expect(&[crate::exit::fault_code(13, 0)])
}

fn other_guest_does_not_notice() -> Outcome {
    let good = Machine::new(
        Mode::Long,
        guest!(64: "2: inc ebx", "out 0x80, al", "jmp 2b"),
    )?;
    for round in 1..10_u64 {
        good.expect(&[out(0x80, 1, 0)])?;
        same!(good.regs()?.rbx, round, "EBX");
        let bad = Machine::new(Mode::Long, guest!(64: "ud2"))?;
        bad.set(|state| state.idt.limit = 0)?;
        bad.expect(&[lost()])?;
    }
    Ok(())
}

/// A lost vCPU answers every request, none of them hangs, and none brings it back.
fn run_after_everything() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "ud2"))?;
    machine.set(|state| state.idt.limit = 0)?;
    machine.expect(&[lost()])?;
    let state = machine.regs()?;
    machine.vcpu.set_regs(&state)?;
    machine.set(|state| (state.idt.limit, state.rsp) = (0xfff, crate::modes::STACK))?;
    machine.vcpu.set_fpu(&machine.vcpu.fpu()?)?;
    machine.vcpu.msrs(&[0x10])?;
    machine.vcpu.interrupt(0x30)?;
    machine.vcpu.set_debug(0, [0; 8])?;
    machine.vcpu.tunnel_info()?;
    machine.expect(&[lost(), lost()])
}

/// Hardware task switches to tasks of nonsense: a fault, or the end of this guest, but nothing that the processor
/// refuses to enter.
fn task_switch_is_no_loss() -> Outcome {
    let code = guest!(32: ".byte 0xea, 0, 0, 0, 0, 0x58, 0", "hlt");
    let mut random = Random(11);
    for round in 0..60 {
        let machine = Machine::new(Mode::Protected, code)?;
        // An available TSS at selector 58h.
        machine.ram.write_u64(0x1058, 0x0000_8900_b800_0067);
        let mut task = [0; 104];
        random.fill(&mut task);
        // ES to GS: most are selectors that there are. An LDT there is not.
        for slot in task[0x48..0x60].chunks_exact_mut(4) {
            if random.next() % 4 != 0 {
                slot[..2].copy_from_slice(&[random.next() as u8 % 12 * 8, 0]);
            }
        }
        if random.next() % 4 != 0 {
            task[0x60..0x62].fill(0);
        }
        machine.ram.write(0xb800, &task);
        for _ in 0..3 {
            let exit = machine
                .run_once()
                .with_context(|| format!("round {round}: {task:02x?}"))?;
            if exit == Exit::Lost {
                break;
            }
        }
    }
    still_works()
}

/// RDMSR of every number in the two ranges that have names: a value or #GP, nothing else.
fn msr_sweep() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "rdmsr", "hlt"))?;
    let start = machine.regs()?;
    let mut readable = 0;
    for msr in (0..0x500).chain(0xc000_0000..0xc000_0120) {
        let mut state = start;
        state.rcx = msr;
        machine.vcpu.set_regs(&state)?;
        match machine.run()? {
            Exit::Halt => readable += 1,
            Exit::Exception { vector: 13, .. } => {}
            other => anyhow::bail!("RDMSR {msr:#x}: {other:?}"),
        }
    }
    anyhow::ensure!((30..700).contains(&readable), "{readable} MSRs can be read");
    Ok(())
}

/// Every port there is comes out as itself: none reaches the host's hardware.
fn port_sweep() -> Outcome {
    let code = guest!(64: "xor edx, edx", "2: out dx, al", "add edx, 0x101", "cmp edx, 0x10000", "jb 2b", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    for port in (0..0x1_0000_u32).step_by(0x101) {
        let exit = machine.run()?;
        let Exit::Out { port: got, .. } = exit else {
            anyhow::bail!("{exit:?}");
        };
        same!(u32::from(got), port, "port");
    }
    machine.expect(&[halt()])
}
