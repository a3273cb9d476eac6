//! The same bytes twice: with their operand in RAM, where the processor executes them, and in a device, where the
//! driver does. Registers, flags, the exception with its error code, the operand and the GDT must end equal.

use abi::VcpuState;
use abi::vcpu_state::SegmentDesc;
use abi::zerocopy::IntoBytes;
use anyhow::Context;

use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::{Exit, Step};
use crate::guest;
use crate::machine::{self, Machine};
use crate::modes::{self, CODE, DATA, DEVICE, Mode};

pub const CASES: &[Case] = &[
    case!(descriptors_looked_at in WIDE),
    case!(system_registers in WIDE),
    case!(far_jumps in WIDE),
    case!(machine_status in WIDE),
    case!(arithmetic in WIDE),
    case!(elements_of_vectors in WIDE),
];

const GDT: u64 = 0x1000;
/// The first of the 64 descriptors of the cases: 16 bytes each, as system descriptors have in long mode.
const FIRST: u64 = 0x100;
/// Bytes of the operand.
const OPERAND: usize = 64;

/// Each type with S, at DPL 0 and 3, present; where they point does no harm.
fn descriptors(mode: Mode) -> impl Iterator<Item = (u64, u64)> {
    (0..64u64).map(move |index| {
        let (kind, dpl) = (index & 31, if index < 32 { 0 } else { 3 });
        let (base, size) = match (kind & 0x10, mode) {
            (0, _) => (0xb000, 0),
            (_, Mode::Long) => (0, 0xa),
            _ => (0, 0xc),
        };
        let rights = kind | dpl << 5 | 0x80;
        let raw = 0xfff | base << 16 | rights << 40 | size << 52;
        (FIRST + index * 16, raw)
    })
}

/// The selectors: each descriptor with RPL 0 and 3, null, the LDT, and past the table.
fn selectors() -> Vec<u16> {
    let mut all = vec![0, 3, 0xc, 0xfff8];
    for (offset, _) in descriptors(Mode::Long) {
        all.extend([offset as u16, offset as u16 | 3]);
    }
    all
}

/// What may differ between the two, and must not.
#[derive(Debug, PartialEq, Eq)]
struct End {
    exit: Exit,
    registers: [u64; 15],
    rip: u64,
    flags: u64,
    cr0: u64,
    segments: Vec<(u16, u64, u32, u32)>,
    operand: Vec<u8>,
    gdt: Vec<u8>,
    fpu: Vec<u8>,
}

/// Two guests of one code, one for each side.
struct Pair {
    mode: Mode,
    machines: [(Machine, u64); 2],
}

impl Pair {
    fn new(mode: Mode, code: impl Fn() -> Code) -> anyhow::Result<Self> {
        let machines = [
            (Machine::new(mode, code())?, DATA),
            (Machine::new(mode, code())?, DEVICE),
        ];
        Ok(Self { mode, machines })
    }

    /// Runs both on one operand. `change` comes before.
    fn same(&self, operand: &[u8], change: impl Fn(&mut VcpuState)) -> anyhow::Result<End> {
        let [ram, device] = &self.machines;
        let ram = self.end(ram, operand, &change)?;
        let device = self.end(device, operand, &change)?;
        if ram == device {
            return Ok(ram);
        }
        let (of_ram, of_device) = (format!("{ram:#x?}"), format!("{device:#x?}"));
        let mut lines = of_ram.lines().zip(of_device.lines()).enumerate();
        let (line, (left, right)) = lines
            .find(|(_, (left, right))| left != right)
            .context("equal after all")?;
        let exits = (&ram.exit, &device.exit);
        anyhow::bail!("{operand:02x?}: line {line}: RAM {left}, device {right}; {exits:?}")
    }

    fn end(
        &self,
        (machine, at): &(Machine, u64),
        operand: &[u8],
        change: impl Fn(&mut VcpuState),
    ) -> anyhow::Result<End> {
        let ram = &machine.ram;
        modes::write_tables(self.mode, ram);
        for (offset, raw) in descriptors(self.mode) {
            ram.write_u64(GDT + offset, raw);
            ram.write_u64(GDT + offset + 8, 0);
        }
        let mut memory = [0; OPERAND];
        memory[..operand.len()].copy_from_slice(operand);
        ram.write(DATA, &memory);
        machine::prepare(&machine.vcpu, self.mode)?;
        machine.set(|state| {
            state.gdt.limit = 0x4ff;
            state.rdi = *at;
            change(state);
        })?;
        let exit = loop {
            match machine.run()? {
                Exit::Read { gpa, size } => {
                    let from = (gpa - DEVICE) as usize;
                    let mut answer = vec![0xa5; 8];
                    answer[..size.into()].copy_from_slice(&memory[from..][..size.into()]);
                    let exit = Exit::Read { gpa, size };
                    machine.answer(&Step { exit, answer });
                }
                Exit::Write { gpa, size, value } => {
                    let from = (gpa - DEVICE) as usize;
                    let size = usize::from(size);
                    memory[from..from + size].copy_from_slice(&value.to_le_bytes()[..size]);
                }
                exit => break exit,
            }
        };
        if *at == DATA {
            memory.copy_from_slice(&ram.read(DATA, OPERAND));
        }
        let state = machine.regs()?;
        // An unusable register has no more than its selector.
        let segment = |s: SegmentDesc| match s.ar >> 16 & 1 {
            0 => (s.selector, s.base, s.limit, s.ar),
            _ => (s.selector, 0, 0, 1 << 16),
        };
        let mut registers = [0; 15];
        let all = state.regs();
        let others = all.iter().enumerate().filter(|(number, _)| *number != 7);
        for (to, (_, from)) in registers.iter_mut().zip(others) {
            *to = *from;
        }
        Ok(End {
            exit,
            registers,
            rip: state.rip,
            flags: state.rflags,
            cr0: state.cr0,
            segments: [
                state.cs, state.ss, state.ds, state.es, state.fs, state.gs, state.ldt, state.tr,
            ]
            .map(segment)
            .to_vec(),
            operand: memory.to_vec(),
            gdt: ram.read(GDT, 0x500),
            fpu: machine.vcpu.fpu()?.as_bytes()[..416].to_vec(),
        })
    }
}

/// LAR, LSL, VERR and VERW of every type, with and without the right to look.
fn descriptors_looked_at(mode: Mode) -> Outcome {
    let pair = Pair::new(mode, || {
        guest!(
            "lar eax, word ptr [edi]",
            "setz bl",
            "lsl ecx, word ptr [edi]",
            "setz bh",
            "verr word ptr [edi]",
            "setz dl",
            "verw word ptr [edi]",
            "setz dh",
            "lar si, word ptr [edi]",
            "hlt"
        )
    })?;
    let mut found = 0;
    for selector in selectors() {
        let end = pair.same(&selector.to_le_bytes(), |state| state.rcx = 0x1_2345_6789)?;
        found += u32::from(end.registers[3] & 1 != 0);
    }
    anyhow::ensure!(found > 40, "{found} by LAR");
    Ok(())
}

/// LLDT and LTR of every type: the register, the busy bit, and the fault.
fn system_registers(mode: Mode) -> Outcome {
    for code in [
        || guest!("lldt word ptr [edi]", "hlt"),
        || guest!("ltr word ptr [edi]", "hlt"),
    ] {
        let pair = Pair::new(mode, code)?;
        let mut loaded = 0;
        for selector in selectors() {
            let end = pair.same(&selector.to_le_bytes(), |_| {})?;
            loaded += u32::from(end.exit == Exit::Halt);
        }
        anyhow::ensure!(loaded >= 4, "{loaded} loaded");
    }
    Ok(())
}

/// Far jumps to every type, but for the gates and TSSs that the emulator refuses.
fn far_jumps(mode: Mode) -> Outcome {
    // jmp far [edi]; the target is the HLT.
    let pair = Pair::new(mode, || {
        let bits32 = crate::blob!(".code32", ".byte 0xff, 0x2f", "ud2", "hlt");
        let bits64 = crate::blob!(".code64", ".byte 0xff, 0x2f", "ud2", "hlt");
        Code {
            bits16: &[],
            bits32,
            bits64,
        }
    })?;
    let mut arrived = 0;
    // A call gate; in protected mode also a task gate and an available TSS, and a gate of 16 bits.
    let gates: &[u16] = match mode {
        Mode::Long => &[12],
        _ => &[1, 4, 5, 9, 12],
    };
    let gate = |selector: &u16| {
        let index = (selector & !3).wrapping_sub(FIRST as u16) / 16;
        index < 64 && gates.contains(&(index & 31))
    };
    for selector in selectors().into_iter().filter(|selector| !gate(selector)) {
        for target in [CODE + 4, 0x1000_0000] {
            let mut pointer = (target as u32).to_le_bytes().to_vec();
            pointer.extend(selector.to_le_bytes());
            let end = pair.same(&pointer, |_| {})?;
            arrived += u32::from(end.exit == Exit::Halt);
        }
    }
    anyhow::ensure!(arrived >= 8, "{arrived} arrived");
    Ok(())
}

/// LMSW with all values of its four bits, from CR0 with and without them.
fn machine_status(mode: Mode) -> Outcome {
    let pair = Pair::new(mode, || guest!("lmsw word ptr [edi]", "smsw eax", "hlt"))?;
    for value in 0..16u16 {
        for before in [0, 0xe] {
            pair.same(&(value | 0xfff0).to_le_bytes(), |state| state.cr0 |= before)?;
        }
    }
    Ok(())
}

/// What is finished in one pass, with the flags of each instruction.
fn arithmetic(mode: Mode) -> Outcome {
    let pair = Pair::new(mode, || {
        guest!(
            "cmp dword ptr [edi], eax",
            "setc bl",
            "seto bh",
            "cmp al, byte ptr [edi + 1]",
            "setz dl",
            "sets dh",
            "test word ptr [edi + 2], 0x8001",
            "setp cl",
            "stc",
            "adc dword ptr [edi], eax",
            "sbb eax, dword ptr [edi + 4]",
            "add byte ptr [edi + 8], ah",
            "or word ptr [edi + 10], 0x1234",
            "and dword ptr [edi + 12], ecx",
            "lock xor dword ptr [edi + 12], edx",
            "sub word ptr [edi + 16], 3",
            "inc dword ptr [edi + 20]",
            "dec byte ptr [edi + 24]",
            "neg dword ptr [edi + 28]",
            "not word ptr [edi + 32]",
            "sbb dword ptr [edi + 36], -1",
            "hlt"
        )
    })?;
    let mut seed = 0x1234_5678_9abc_def1u64;
    for round in 0..48 {
        let mut operand = [0; OPERAND];
        for byte in &mut operand {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            *byte = match round % 3 {
                0 => (seed >> 56) as u8,
                1 => 0,
                _ => 0xff,
            };
        }
        let value = seed >> 32;
        pair.same(&operand, |state| {
            state.rax = if round % 4 == 0 { 0 } else { value };
        })?;
    }
    Ok(())
}

/// Elements between vector registers and memory, and MXCSR.
fn elements_of_vectors(mode: Mode) -> Outcome {
    let pair = Pair::new(mode, || {
        guest!(
            "movups xmm1, [esi]",
            "pinsrb xmm1, byte ptr [edi], 0x15",
            "pinsrw xmm1, word ptr [edi + 2], 0x7f",
            "pinsrd xmm1, dword ptr [edi + 4], 0xfe",
            "movlps xmm2, qword ptr [edi + 8]",
            "movhps xmm2, qword ptr [edi + 16]",
            "pextrb byte ptr [edi + 24], xmm1, 3",
            "pextrw word ptr [edi + 26], xmm1, 5",
            "pextrd dword ptr [edi + 28], xmm1, 2",
            "extractps dword ptr [edi + 32], xmm2, 3",
            "movhpd qword ptr [edi + 40], xmm1",
            "stmxcsr dword ptr [edi + 48]",
            "ldmxcsr dword ptr [edi + 52]",
            "hlt"
        )
    })?;
    for (mxcsr, wanted) in [(0x9fa5u32, true), (0x1_1f80, false), (0, true)] {
        let mut operand: [u8; OPERAND] = std::array::from_fn(|at| 0x80 + at as u8);
        operand[52..56].copy_from_slice(&mxcsr.to_le_bytes());
        let end = pair.same(&operand, |state| {
            state.rsi = modes::STUBS;
            state.cr4 |= 0x600;
        })?;
        same!(end.exit == Exit::Halt, wanted, "LDMXCSR {mxcsr:#x}");
    }
    Ok(())
}
