//! A client or a guest that means harm: the host stays up, and other guests do not notice.

use abi::VcpuState;

use super::{Case, Outcome};
use crate::client::System;
use crate::exit::{Exit, halt, lost, out};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{CODE, DATA, DEVICE, Mode};

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

/// RUN a few times, whatever comes.
fn poke(machine: &Machine) {
    for _ in 0..4 {
        if machine.vcpu.run().is_err() || machine.vcpu.tunnel.exit_status() == 7 {
            return;
        }
    }
}

/// SET_REGS with one field of nonsense, or all of them.
fn random_registers() -> Outcome {
    let mut random = Random(1);
    for round in 0..150 {
        let machine = Machine::new(Mode::Long, guest!(64: "2: nop", "jmp 2b"))?;
        let mut bytes = [0_u8; size_of::<VcpuState>()];
        if round % 5 == 0 {
            random.fill(&mut bytes);
        } else {
            let good = machine.regs()?;
            bytes.copy_from_slice(abi::zerocopy::IntoBytes::as_bytes(&good));
            for _ in 0..=round % 3 {
                let at = random.next() as usize % (bytes.len() / 4) * 4;
                random.fill(&mut bytes[at..at + 4]);
            }
        }
        let request = abi::os::linux::HAX_VCPU_SET_REGS;
        machine.vcpu.node.with(request, &mut bytes)?;
        if random.next() & 1 == 0 {
            let efer = random.next() & 0xd01;
            machine.vcpu.set_msrs(&[(0xc000_0080, efer)])?;
        }
        poke(&machine);
        machine.regs()?;
    }
    still_works()
}

/// Every word of the tunnel and of the buffer is nonsense at every RUN.
fn random_tunnel() -> Outcome {
    let code = guest!(64:
        "2: in al, 0x70", "mov eax, [0xd0000]", "mov edi, 0xc000", "mov ecx, 70", "rep insb",
        "add dword ptr [0xd0008], 3", "mov esi, 0xc000", "mov ecx, 70", "rep outsb", "jmp 2b");
    let mut random = Random(2);
    for _ in 0..10 {
        let machine = Machine::new(Mode::Long, code)?;
        for _ in 0..60 {
            machine.vcpu.run()?;
            let tunnel = machine.vcpu.tunnel;
            let status = tunnel.exit_status();
            anyhow::ensure!(matches!(status, 1 | 4 | 8 | 9), "status {status}");
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
            let _ = node.with(number, &mut argument);
        }
    }
    still_works()
}

/// A guest of random bytes.
fn random_code(mode: Mode) -> Outcome {
    let mut random = Random(4 + mode as u64);
    for _ in 0..25 {
        let machine = Machine::new(mode, guest!("hlt"))?;
        let mut bytes = [0; 512];
        random.fill(&mut bytes);
        machine.ram.write(CODE, &bytes);
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
        })?;
        for _ in 0..12 {
            if machine.vcpu.run().is_err() || matches!(machine.vcpu.tunnel.exit_status(), 5 | 7) {
                break;
            }
        }
    }
    still_works()
}

fn garbage_in_page_tables(mode: Mode) -> Outcome {
    let mut random = Random(9);
    for _ in 0..15 {
        let machine = Machine::new(mode, guest!("out 0x80, al", "mov eax, [edi]", "hlt"))?;
        machine.expect(&[out(0x80, 1, 0)])?;
        let mut page = [0; 4096];
        random.fill(&mut page);
        let table = if mode == Mode::Paged { 0x8000 } else { 0x5000 };
        machine.ram.write(table, &page);
        machine.set(|state| state.rdi = random.next() & 0x3fff_ffff)?;
        poke(&machine);
    }
    still_works()
}

/// CR3 points at the device: the guest cannot go on, and says so.
fn tables_in_device_memory(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("hlt"))?;
    machine.set(|state| state.cr3 = DEVICE)?;
    for _ in 0..3 {
        match machine.run() {
            // A page walk that reads nothing but ones or zeroes: a fault nobody can take.
            Ok(Exit::Lost) | Err(_) => return still_works(),
            Ok(Exit::Read { .. } | Exit::Other(_)) => machine.vcpu.tunnel.set_fast_mmio_value(0),
            Ok(other) => anyhow::bail!("{other:?}"),
        }
    }
    still_works()
}

fn stack_in_device_memory(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("push 5", "hlt"))?;
    machine.set(|state| state.rsp = DEVICE + 0x100)?;
    let size = mode.slot() as u64;
    machine.expect(&[
        crate::exit::write(DEVICE + 0x100 - size, size as u8, 5),
        halt(),
    ])?;
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
    let exit = machine.run()?;
    anyhow::ensure!(
        matches!(
            exit,
            Exit::Lost | Exit::Read { .. } | Exit::Exception { .. }
        ),
        "{exit:?}"
    );
    still_works()
}

fn self_modifying(mode: Mode) -> Outcome {
    // Changes the operand of the OUT behind it, which the driver then reads.
    let code = guest!("mov byte ptr [edi], 0x91", "out 0x80, al", "hlt");
    let machine = Machine::new(mode, code)?;
    let at = code_offset(mode);
    machine.set(|state| state.rdi = CODE + at + 1)?;
    machine.expect(&[out(0x91, 1, 0), halt()])
}

/// Length of `mov byte ptr [edi], imm8`.
const fn code_offset(mode: Mode) -> u64 {
    match mode {
        Mode::Real | Mode::Long => 4,
        _ => 3,
    }
}

/// A fault whose handler is the faulting instruction: RUN comes back all the same.
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
    for _ in 0..3 {
        let exit = machine.run_once()?;
        anyhow::ensure!(
            matches!(
                exit,
                Exit::Interrupt | Exit::Lost | Exit::Exception { .. } | Exit::Write { .. }
            ),
            "{exit:?}"
        );
    }
    still_works()
}

/// #DB in its own handler, for ever.
fn endless_debug(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!(64: "2: .byte 0xf1", "jmp 2b"))?;
    let size = 16;
    machine.ram.write_u16(crate::modes::IDT + size, CODE as u16);
    machine
        .ram
        .write_u16(crate::modes::IDT + size + 6, (CODE >> 16) as u16);
    machine.set(|state| state.rsp = 0x1f_f000)?;
    for _ in 0..3 {
        let exit = machine.run_once()?;
        anyhow::ensure!(!matches!(exit, Exit::Halt), "{exit:?}");
    }
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
        machine.expect(&[crate::exit::write(DEVICE, 4, 0x12345678), halt()])?;
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
    let exit = machine.run()?;
    anyhow::ensure!(
        matches!(exit, Exit::Exception { .. } | Exit::Lost),
        "{exit:?}"
    );
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
        machine.expect(&[crate::exit::write(DEVICE, 1, 0), halt()])?;
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

/// A lost vCPU answers every request, and none of them hangs.
fn run_after_everything() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "ud2"))?;
    machine.set(|state| state.idt.limit = 0)?;
    machine.expect(&[lost()])?;
    let state = machine.regs()?;
    machine.vcpu.set_regs(&state)?;
    machine.vcpu.set_fpu(&machine.vcpu.fpu()?)?;
    machine.vcpu.msrs(&[0x10])?;
    machine.vcpu.interrupt(0x30)?;
    machine.vcpu.set_debug(0, [0; 8])?;
    machine.vcpu.tunnel_info()?;
    machine.expect(&[lost(), lost()])
}

/// A hardware task switch: whatever becomes of it, the host goes on and RUN says something.
fn task_switch_is_no_loss() -> Outcome {
    let machine = Machine::new(
        Mode::Protected,
        guest!(32: ".byte 0xea, 0, 0, 0, 0, 0x58, 0", "hlt"),
    )?;
    // An available TSS at selector 58h.
    machine.ram.write_u64(0x1058, 0x0000_8900_b800_0067);
    let exit = machine.run()?;
    anyhow::ensure!(!matches!(exit, Exit::Other(_)), "{exit:?}");
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
