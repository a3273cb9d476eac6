//! Exceptions in the guest: vector, error code, CR2, RIP in the frame; double and triple faults.

use super::{Case, Outcome, enter_user};
use crate::code::Code;
use crate::exit::{Exit, fault, fault_code, halt, input, lost, out, read};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, DEVICE, IDT, Mode};

pub const CASES: &[Case] = &[
    case!(divide_error in ALL),
    case!(breakpoint in ALL),
    case!(overflow in WIDE32),
    case!(bound in WIDE32),
    case!(undefined in ALL),
    case!(vmx_instructions in WIDE),
    case!(vmx_instructions_in_real_mode),
    case!(monitor_and_mwait in SIZES),
    case!(getsec in SIZES),
    case!(rsm in SIZES),
    case!(rdmsr_unknown in SIZES),
    case!(wrmsr_unknown in SIZES),
    case!(wrmsr_reserved_bits in SIZES),
    case!(not_canonical in LONG),
    case!(stack_not_canonical in LONG),
    case!(segment_not_present in PROTECTED),
    case!(segment_beyond_the_table in PROTECTED),
    case!(page_fault_read in PAGING),
    case!(page_fault_write in PAGING),
    case!(page_fault_user in PAGING),
    case!(page_fault_fetch in PAGING),
    case!(page_fault_reserved_bit in LONG),
    case!(page_fault_is_restartable in PAGING),
    case!(page_fault_in_emulated_instruction in PAGING),
    case!(emulated_user_access in PAGING),
    case!(alignment_check in LONG),
    case!(device_not_available in SIZES),
    case!(simd_error in SIZES),
    case!(privileged_in_user_mode in WIDE),
    case!(port_in_user_mode in WIDE),
    case!(int_through_missing_gate in PROTECTED),
    case!(double_fault in PROTECTED),
    case!(triple_fault in PROTECTED),
    case!(triple_fault_is_sticky in LONG),
    case!(exception_after_an_exit in SIZES),
    case!(faults_set_rf in WIDE),
    case!(icebp in SIZES),
];

fn expect_fault_at(mode: Mode, code: Code, wanted: &crate::exit::Step, at: u64) -> Outcome {
    let machine = Machine::new(mode, code)?;
    machine.expect(std::slice::from_ref(wanted))?;
    let has_error = matches!(wanted.exit, Exit::Exception { error: Some(_), .. });
    same!(
        machine.frame_rip(has_error)?,
        mode.entry() + at,
        "RIP in the frame"
    );
    Ok(())
}

/// The error code, in modes that have one.
fn with_code(mode: Mode, vector: u8, error: u64) -> crate::exit::Step {
    if mode == Mode::Real {
        fault(vector)
    } else {
        fault_code(vector, error)
    }
}

fn divide_error(mode: Mode) -> Outcome {
    expect_fault_at(mode, guest!("nop", "div bl", "hlt"), &fault(0), 1)
}

fn breakpoint(mode: Mode) -> Outcome {
    expect_fault_at(mode, guest!("int3", "hlt"), &fault(3), 1)
}

fn overflow(mode: Mode) -> Outcome {
    let code = guest!(32: "mov al, 0x7f", "add al, 1", "into", "hlt");
    expect_fault_at(mode, code, &fault(4), 5)
}

fn bound(mode: Mode) -> Outcome {
    let code = guest!(32: "mov eax, 5", "bound eax, [edi]", "hlt");
    expect_fault_at(mode, code, &fault(5), 5)
}

fn undefined(mode: Mode) -> Outcome {
    expect_fault_at(mode, guest!("nop", "ud2", "hlt"), &fault(6), 1)
}

fn undefined_each(mode: Mode, codes: &[Code]) -> Outcome {
    for code in codes {
        expect_fault_at(mode, *code, &fault(6), 0)?;
    }
    Ok(())
}

/// No VMX in the guest: CR4.VMXE is clear, so all of them are #UD; they exit all the same.
fn vmx_instructions(mode: Mode) -> Outcome {
    undefined_each(
        mode,
        &[
            guest!("vmcall"),
            guest!("vmlaunch"),
            guest!("vmresume"),
            guest!("vmxoff"),
            guest!("vmxon [edi]"),
            guest!("vmclear [edi]"),
            guest!("vmptrld [edi]"),
            guest!("vmptrst [edi]"),
            guest!("vmfunc"),
            Code {
                bits16: &[],
                bits32: crate::blob!(".code32", "vmread eax, ebx"),
                bits64: crate::blob!(".code64", "vmread rax, rbx"),
            },
            Code {
                bits16: &[],
                bits32: crate::blob!(".code32", "vmwrite eax, ebx"),
                bits64: crate::blob!(".code64", "vmwrite rax, rbx"),
            },
            Code {
                bits16: &[],
                bits32: crate::blob!(".code32", "invept eax, [ebx]"),
                bits64: crate::blob!(".code64", "invept rax, [rbx]"),
            },
            Code {
                bits16: &[],
                bits32: crate::blob!(".code32", "invvpid eax, [ebx]"),
                bits64: crate::blob!(".code64", "invvpid rax, [rbx]"),
            },
        ],
    )
}

fn vmx_instructions_in_real_mode() -> Outcome {
    undefined_each(Mode::Real, &[guest!("vmlaunch"), guest!("vmxon [edi]")])?;
    // VMCALL has no check of the mode in front of its exit.
    undefined_each(Mode::Real, &[guest!("vmcall")])
}

fn monitor_and_mwait(mode: Mode) -> Outcome {
    // CPUID does not offer them.
    let monitor = Code {
        bits16: &[0x0f, 0x01, 0xc8],
        bits32: &[0x0f, 0x01, 0xc8],
        bits64: &[0x0f, 0x01, 0xc8],
    };
    let mwait = Code {
        bits16: &[0x0f, 0x01, 0xc9],
        bits32: &[0x0f, 0x01, 0xc9],
        bits64: &[0x0f, 0x01, 0xc9],
    };
    undefined_each(mode, &[monitor, mwait])
}

fn getsec(mode: Mode) -> Outcome {
    undefined_each(mode, &[guest!("getsec")])
}

fn rsm(mode: Mode) -> Outcome {
    undefined_each(mode, &[guest!("rsm")])
}

/// So that a breakpoint on the instruction is not met again: by the processor's faults, and by
/// those that an exit became.
fn faults_set_rf(mode: Mode) -> Outcome {
    const RF: u64 = 1 << 16;
    for (code, wanted) in [
        (guest!("out 0x80, al", "ud2"), fault(6)),
        (guest!("out 0x80, al", "vmcall"), fault(6)),
        (
            guest!("out 0x80, al", "mov ecx, 0x12345", "rdmsr"),
            fault_code(13, 0),
        ),
    ] {
        let machine = Machine::new(mode, code)?;
        machine.expect(&[out(0x80, 1, 0)])?;
        let start = machine.regs()?;
        let has_error = matches!(wanted.exit, Exit::Exception { error: Some(_), .. });
        // The first time brings in the pages of table and stack, and Bochs sets RF for that.
        machine.expect(std::slice::from_ref(&wanted))?;
        machine.set(|state| {
            *state = start;
            state.rflags = 2;
        })?;
        machine.expect(std::slice::from_ref(&wanted))?;
        let frame = machine.stack(2 + u64::from(has_error))?;
        same!(frame & RF, RF, "RF in the frame");
        same!(machine.regs()?.rflags & RF, 0, "RF in the handler");
    }
    Ok(())
}

fn rdmsr_unknown(mode: Mode) -> Outcome {
    let code = guest!("mov ecx, 0x12345", "nop", "rdmsr", "hlt");
    let at = if mode == Mode::Real { 7 } else { 6 };
    expect_fault_at(mode, code, &with_code(mode, 13, 0), at)
}

fn wrmsr_unknown(mode: Mode) -> Outcome {
    let code = guest!("mov ecx, 0xc0012345", "wrmsr", "hlt");
    let at = if mode == Mode::Real { 6 } else { 5 };
    expect_fault_at(mode, code, &with_code(mode, 13, 0), at)
}

fn wrmsr_reserved_bits(mode: Mode) -> Outcome {
    // IA32_PAT with type 2, IA32_EFER bit 1, IA32_APIC_BASE bit 0.
    for code in [
        guest!("mov ecx, 0x277", "mov eax, 2", "wrmsr"),
        guest!("mov ecx, 0xc0000080", "mov eax, 2", "wrmsr"),
        guest!("mov ecx, 0x1b", "mov eax, 0xfee00901", "wrmsr"),
    ] {
        Machine::new(mode, code)?.expect(&[with_code(mode, 13, 0)])?;
    }
    Ok(())
}

fn not_canonical(mode: Mode) -> Outcome {
    let code = guest!(64: "mov rdi, 0x1234000000000000", "mov al, [rdi]", "hlt");
    expect_fault_at(mode, code, &fault_code(13, 0), 10)
}

fn stack_not_canonical(mode: Mode) -> Outcome {
    let code = guest!(64: "mov rbp, 0x1234000000000000", "mov al, [rbp]", "hlt");
    expect_fault_at(mode, code, &fault_code(12, 0), 10)
}

fn segment_not_present(mode: Mode) -> Outcome {
    let code = guest!("mov eax, 0x10", "mov es, eax", "hlt");
    let machine = Machine::new(mode, code)?;
    // Clears the present bit of the data segment.
    machine.ram.write(0x1010 + 5, &[0x13]);
    machine.expect(&[fault_code(11, 0x10)])
}

fn segment_beyond_the_table(mode: Mode) -> Outcome {
    let code = guest!("mov eax, 0x1000", "mov es, eax", "hlt");
    Machine::new(mode, code)?.expect(&[fault_code(13, 0x1000)])
}

/// Changes the entry of one of the first pages.
fn set_page(machine: &Machine, page: u64, flags: u64) {
    let (at, size) = machine.mode.page_entry(page);
    let entry = (page << 12 | flags).to_le_bytes();
    machine.ram.write(at, &entry[..size]);
}

fn page_fault_read(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov eax, [edi]", "hlt"))?;
    set_page(&machine, DATA >> 12, 0);
    machine.set(|state| state.rdi = DATA + 0x123)?;
    machine.expect(&[fault_code(14, 0)])?;
    same!(machine.regs()?.cr2, DATA + 0x123, "CR2");
    Ok(())
}

fn page_fault_write(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov [edi], eax", "hlt"))?;
    set_page(&machine, DATA >> 12, 0x61);
    machine.set(|state| state.rdi = DATA + 0x456)?;
    machine.expect(&[fault_code(14, 3)])?;
    same!(machine.regs()?.cr2, DATA + 0x456, "CR2");
    Ok(())
}

fn page_fault_user(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov eax, [edi]", "hlt"))?;
    set_page(&machine, DATA >> 12, 0x63);
    machine.set(|state| {
        enter_user(mode, state);
        state.rdi = DATA;
    })?;
    machine.expect(&[fault_code(14, 5)])?;
    same!(machine.regs()?.cr2, DATA, "CR2");
    Ok(())
}

fn page_fault_fetch(mode: Mode) -> Outcome {
    let code = Code {
        bits16: &[],
        bits32: crate::blob!(".code32", "jmp edi"),
        bits64: crate::blob!(".code64", "jmp rdi"),
    };
    let machine = Machine::new(mode, code)?;
    set_page(&machine, DATA >> 12, 0);
    machine.set(|state| state.rdi = DATA)?;
    // The fetch bit of the error code exists where EFER.NXE is set (SDM 4.7).
    let error = if mode == Mode::Long { 0x10 } else { 0 };
    machine.expect(&[fault_code(14, error)])?;
    same!(machine.regs()?.cr2, DATA, "CR2");
    same!(machine.frame_rip(true)?, DATA, "RIP in the frame");
    Ok(())
}

fn page_fault_reserved_bit(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov eax, [edi]", "hlt"))?;
    set_page(&machine, DATA >> 12, 0x67 | 1 << 51);
    machine.set(|state| state.rdi = DATA + 0x789)?;
    machine.expect(&[fault_code(14, 9)])?;
    same!(machine.regs()?.cr2, DATA + 0x789, "CR2");
    Ok(())
}

/// The page comes back and the instruction is repeated.
fn page_fault_is_restartable(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("add dword ptr [edi], 5", "hlt"))?;
    set_page(&machine, DATA >> 12, 0);
    machine.ram.write_u32(DATA, 37);
    machine.set(|state| state.rdi = DATA)?;
    let before = machine.regs()?;
    machine.expect(&[fault_code(14, 2)])?;
    same!(machine.regs()?.cr2, DATA, "CR2");
    set_page(&machine, DATA >> 12, 0x67);
    machine.set(|state| {
        state.rip = before.rip;
        state.rsp = before.rsp;
        state.cs = before.cs;
    })?;
    machine.expect(&[halt()])?;
    same!(machine.ram.u32(DATA), 42, "memory");
    Ok(())
}

/// MOVS from a device to a page that is not there: the driver's own walk finds the fault, before the device
/// is read or after, but the registers are still at the element.
fn page_fault_in_emulated_instruction(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 2",
        "rep movsd dword ptr es:[edi], dword ptr [esi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    set_page(&machine, (DATA >> 12) + 1, 0);
    machine.set(|state| {
        state.rsi = DEVICE;
        state.rdi = DATA + 0xffc;
    })?;
    machine.expect(&[read(DEVICE, 4, 0x77)])?;
    let mut exit = machine.run()?;
    if exit
        == (Exit::Read {
            gpa: DEVICE + 4,
            size: 4,
        })
    {
        exit = machine.run()?;
    }
    same!(exit, fault_code(14, 2).exit, "exit");
    let state = machine.regs()?;
    same!(state.cr2, DATA + 0x1000, "CR2");
    same!((state.rcx, state.rdi), (1, DATA + 0x1000), "ECX and EDI");
    same!(machine.ram.u32(DATA + 0xffc), 0x77, "memory");
    Ok(())
}

/// The page is there for the kernel only: a string instruction of user code that the driver executes must not
/// reach it.
fn emulated_user_access(mode: Mode) -> Outcome {
    let code = guest!("movsd dword ptr es:[edi], dword ptr [esi]", "hlt");
    let machine = Machine::new(mode, code)?;
    set_page(&machine, DATA >> 12, 0x63);
    machine.set(|state| {
        enter_user(mode, state);
        state.rsi = DEVICE;
        state.rdi = DATA;
    })?;
    let mut exit = machine.run()?;
    if matches!(exit, Exit::Read { .. }) {
        exit = machine.run()?;
    }
    same!(exit, fault_code(14, 7).exit, "exit");
    same!(machine.ram.u32(DATA), 0, "memory");
    Ok(())
}

fn alignment_check(mode: Mode) -> Outcome {
    let code = guest!(64: "mov eax, [rdi]", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        enter_user(mode, state);
        state.cr0 |= 1 << 18;
        state.rflags |= 1 << 18;
        state.rdi = DATA + 1;
    })?;
    machine.expect(&[fault_code(17, 0)])
}

fn device_not_available(mode: Mode) -> Outcome {
    for (code, bits) in [
        (guest!("fninit", "hlt"), 1 << 2),
        (guest!("fninit", "hlt"), 1 << 3),
        (guest!("movups xmm0, xmm1", "hlt"), 1 << 3),
    ] {
        let machine = Machine::new(mode, code)?;
        machine.set(|state| state.cr0 |= bits)?;
        machine.expect(&[fault(7)])?;
    }
    Ok(())
}

fn simd_error(mode: Mode) -> Outcome {
    let code = guest!("ldmxcsr [edi]", "divss xmm0, xmm1", "hlt");
    let machine = Machine::new(mode, code)?;
    // Division by zero unmasked: 1 / 0.
    machine.ram.write_u32(DATA, 0x1f80 & !0x200);
    let mut fpu = machine.vcpu.fpu()?;
    fpu.mmx_1[0][..4].copy_from_slice(&1.0_f32.to_le_bytes());
    machine.vcpu.set_fpu(&fpu)?;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[fault(19)])
}

fn privileged_in_user_mode(mode: Mode) -> Outcome {
    for code in [
        guest!("hlt"),
        guest!("clts"),
        guest!("wbinvd"),
        guest!("invd"),
        guest!("rdmsr"),
        guest!("wrmsr"),
        guest!("lmsw ax"),
        guest!("invlpg [edi]"),
    ] {
        let machine = Machine::new(mode, code)?;
        machine.set(|state| enter_user(mode, state))?;
        machine.expect(&[fault_code(13, 0)])?;
    }
    Ok(())
}

/// IOPL is 0 and the TSS has no I/O bitmap: port instructions are #GP and reach no client.
fn port_in_user_mode(mode: Mode) -> Outcome {
    for code in [
        guest!("in al, 0x70"),
        guest!("out 0x70, al"),
        guest!("outsb dx, byte ptr [esi]"),
        guest!("insb byte ptr es:[edi], dx"),
        guest!("cli"),
    ] {
        let machine = Machine::new(mode, code)?;
        // I/O map base at the limit.
        machine.ram.write_u16(0xb066, 0x68);
        machine.set(|state| {
            enter_user(mode, state);
            state.rdi = DATA;
            state.rsi = DATA;
        })?;
        machine.expect(&[fault_code(13, 0)])?;
    }
    Ok(())
}

fn clear_gate(machine: &Machine, vector: u64) {
    let size = if machine.mode == Mode::Long { 16 } else { 8 };
    machine.ram.fill(IDT + vector * size, size as usize, 0);
}

fn int_through_missing_gate(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("int 0x50", "hlt"))?;
    clear_gate(&machine, 0x50);
    // SDM 6.13: index, and bit 1: the IDT. The gate's type is checked before its present bit.
    machine.expect(&[fault_code(13, 0x50 << 3 | 2)])
}

/// The processor makes this one: the second fault is its own. What the driver pairs is
/// task_switch/pairs_of_exceptions.
fn double_fault(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("mov ecx, 0x12345", "rdmsr", "hlt"))?;
    clear_gate(&machine, 13);
    machine.expect(&[fault_code(8, 0)])
}

fn triple_fault(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("ud2"))?;
    machine.set(|state| state.idt.limit = 0)?;
    machine.expect(&[lost()])
}

/// Every later RUN says so too, and nothing hangs.
fn triple_fault_is_sticky(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("ud2"))?;
    machine.set(|state| state.idt.limit = 0)?;
    machine.expect(&[lost(), lost(), lost()])?;
    machine.vcpu.interrupt(0x40)?;
    machine.regs()?;
    machine.expect(&[lost()])?;
    // An instruction that would not fault is not executed either.
    machine
        .ram
        .write(crate::modes::CODE, guest!(64: "hlt").bits64);
    machine.expect(&[lost()])
}

/// A fault right after an instruction the driver has executed.
fn exception_after_an_exit(mode: Mode) -> Outcome {
    let code = guest!("in al, 0x70", "ud2");
    expect_after(mode, code, &input(0x70, 1, 1), 2)?;
    let code = guest!("out 0x70, al", "ud2");
    expect_after(mode, code, &out(0x70, 1, 0), 2)
}

fn expect_after(mode: Mode, code: Code, first: &crate::exit::Step, at: u64) -> Outcome {
    let machine = Machine::new(mode, code)?;
    machine.expect(&[first.clone(), fault(6)])?;
    same!(
        machine.frame_rip(false)?,
        mode.entry() + at,
        "RIP in the frame"
    );
    Ok(())
}

/// INT1: a #DB that is no fault.
fn icebp(mode: Mode) -> Outcome {
    let code = Code {
        bits16: &[0xf1, 0xf4],
        bits32: &[0xf1, 0xf4],
        bits64: &[0xf1, 0xf4],
    };
    expect_fault_at(mode, code, &fault(1), 1)
}
