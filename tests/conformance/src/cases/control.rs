//! Control registers, XCR0, and descriptor tables.

use super::{Case, Outcome};
use crate::code::Code;
use crate::exit::{fault, fault_code, halt, out};
use crate::guest;
use crate::machine::Machine;
use crate::modes::{DATA, Mode, PDPT_PAE};

pub const CASES: &[Case] = &[
    case!(reads_back in WIDE),
    case!(cr0_cd_and_nw in WIDE),
    case!(cr0_reserved_high in LONG),
    case!(cr0_pg_without_pe in SIZES),
    case!(cr0_pg_in_64_bit_code in LONG),
    case!(cr0_nw_without_cd in WIDE),
    case!(cr4_reserved in WIDE),
    case!(cr4_vmxe_is_refused in WIDE),
    case!(cr4_pae_stays_in_long_mode in LONG),
    case!(cr4_tsd_and_rdtsc in LONG),
    case!(clts_and_lmsw in SIZES),
    case!(smsw in SIZES),
    case!(invd_and_wbinvd in SIZES),
    case!(invlpg in PAGING),
    case!(pdpte_reserved_bits),
    case!(pdpte_reserved_bits_by_cr0_and_cr4),
    case!(pdptes_while_signals_come),
    case!(efer_lme_while_paging in LONG),
    case!(efer_nxe in LONG),
    case!(syscall_and_sysret),
    case!(sysenter),
    case!(swapgs),
    case!(xsetbv in LONG),
    case!(xsetbv_refused in LONG),
    case!(xgetbv_without_osxsave in LONG),
    case!(descriptor_tables in SIZES),
    case!(rdpmc in SIZES),
    case!(pause_and_nop in SIZES),
    case!(rdtscp in LONG),
];

fn reads_back(mode: Mode) -> Outcome {
    let code = Code {
        bits16: &[],
        bits32: crate::blob!(
            ".code32",
            "mov eax, cr0",
            "mov ebx, cr3",
            "mov ecx, cr4",
            "mov edx, 0x123450",
            "mov cr2, edx",
            "hlt"
        ),
        bits64: crate::blob!(
            ".code64",
            "mov rax, cr0",
            "mov rbx, cr3",
            "mov rcx, cr4",
            "mov edx, 0x123450",
            "mov cr2, rdx",
            "hlt"
        ),
    };
    let machine = Machine::new(mode, code)?;
    let before = machine.regs()?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(
        (state.rax, state.rbx, state.rcx),
        (before.cr0, before.cr3, before.cr4),
        "CR0, CR3, CR4"
    );
    same!(state.cr2, 0x123450, "CR2");
    Ok(())
}

fn cr0_cd_and_nw(mode: Mode) -> Outcome {
    let code = Code {
        bits16: &[],
        bits32: crate::blob!(
            ".code32",
            "mov eax, cr0",
            "or eax, 0x60000000",
            "mov cr0, eax",
            "mov ebx, cr0",
            "hlt"
        ),
        bits64: crate::blob!(
            ".code64",
            "mov rax, cr0",
            "or eax, 0x60000000",
            "mov cr0, rax",
            "mov rbx, cr0",
            "hlt"
        ),
    };
    let machine = Machine::new(mode, code)?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(state.rbx, state.rax, "CR0 read back");
    same!(state.cr0, state.rax, "CR0 by GET_REGS");
    Ok(())
}

fn cr0_reserved_high(mode: Mode) -> Outcome {
    let code = guest!(64: "mov rax, cr0", "bts rax, 40", "mov cr0, rax", "hlt");
    Machine::new(mode, code)?.expect(&[fault_code(13, 0)])
}

/// There is no 64-bit code without paging: it has to leave by way of compatibility mode.
fn cr0_pg_in_64_bit_code(mode: Mode) -> Outcome {
    let code = guest!(64: "mov rax, cr0", "btr rax, 31", "mov cr0, rax", "hlt");
    Machine::new(mode, code)?.expect(&[fault_code(13, 0)])
}

fn cr0_pg_without_pe(mode: Mode) -> Outcome {
    let code = Code {
        bits16: crate::blob!(".code16", "mov eax, 0x80000010", "mov cr0, eax", "hlt"),
        bits32: crate::blob!(".code32", "mov eax, 0x80000010", "mov cr0, eax", "hlt"),
        bits64: crate::blob!(".code64", "mov eax, 0x80000010", "mov cr0, rax", "hlt"),
    };
    let wanted = if mode == Mode::Real {
        fault(13)
    } else {
        fault_code(13, 0)
    };
    Machine::new(mode, code)?.expect(&[wanted])
}

fn cr0_nw_without_cd(mode: Mode) -> Outcome {
    let code = Code {
        bits16: &[],
        bits32: crate::blob!(
            ".code32",
            "mov eax, cr0",
            "or eax, 0x20000000",
            "mov cr0, eax",
            "hlt"
        ),
        bits64: crate::blob!(
            ".code64",
            "mov rax, cr0",
            "or eax, 0x20000000",
            "mov cr0, rax",
            "hlt"
        ),
    };
    Machine::new(mode, code)?.expect(&[fault_code(13, 0)])
}

fn set_cr4_bit(bit: u32) -> Code {
    match bit {
        13 => Code {
            bits16: &[],
            bits32: crate::blob!(
                ".code32",
                "mov eax, cr4",
                "bts eax, 13",
                "mov cr4, eax",
                "hlt"
            ),
            bits64: crate::blob!(
                ".code64",
                "mov rax, cr4",
                "bts rax, 13",
                "mov cr4, rax",
                "hlt"
            ),
        },
        _ => Code {
            bits16: &[],
            bits32: crate::blob!(
                ".code32",
                "mov eax, cr4",
                "bts eax, 31",
                "mov cr4, eax",
                "hlt"
            ),
            bits64: crate::blob!(
                ".code64",
                "mov rax, cr4",
                "bts rax, 31",
                "mov cr4, rax",
                "hlt"
            ),
        },
    }
}

fn cr4_reserved(mode: Mode) -> Outcome {
    Machine::new(mode, set_cr4_bit(31))?.expect(&[fault_code(13, 0)])
}

fn cr4_vmxe_is_refused(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, set_cr4_bit(13))?;
    machine.expect(&[fault_code(13, 0)])?;
    same!(machine.regs()?.cr4 & 0x2000, 0, "CR4.VMXE");
    Ok(())
}

fn cr4_pae_stays_in_long_mode(mode: Mode) -> Outcome {
    let code = guest!(64: "mov rax, cr4", "btr rax, 5", "mov cr4, rax", "hlt");
    Machine::new(mode, code)?.expect(&[fault_code(13, 0)])
}

/// CR4.TSD is the guest's own affair: ring 3 gets #GP, ring 0 the counter.
fn cr4_tsd_and_rdtsc(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!(64: "rdtsc", "hlt"))?;
    machine.set(|state| state.cr4 |= 4)?;
    machine.expect(&[halt()])?;
    let machine = Machine::new(mode, guest!(64: "rdtsc", "hlt"))?;
    machine.set(|state| {
        state.cr4 |= 4;
        super::enter_user(mode, state);
    })?;
    machine.expect(&[fault_code(13, 0)])?;
    same!(machine.frame_rip(true)?, mode.entry(), "RIP of RDTSC");
    Ok(())
}

fn clts_and_lmsw(mode: Mode) -> Outcome {
    let code = guest!(
        "smsw bx",
        "or bx, 8",
        "lmsw bx",
        "smsw cx",
        "out 0x80, al",
        "clts",
        "smsw dx",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.rcx = 0;
        state.rdx = 0;
    })?;
    machine.expect(&[out(0x80, 1, 0)])?;
    same!(machine.regs()?.cr0 & 8, 8, "TS after LMSW by GET_REGS");
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(
        (state.rcx & 8, state.rdx & 8),
        (8, 0),
        "TS after LMSW and CLTS"
    );
    same!(state.cr0 & 8, 0, "TS after CLTS by GET_REGS");
    Ok(())
}

/// NE, which VMX operation wants to be 1, is what the guest made it.
fn smsw(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("smsw ax", "smsw word ptr [edi]", "hlt"))?;
    machine.set(|state| {
        state.cr0 &= !(1 << 5);
        state.rax = 0xffff_0000;
        state.rdi = DATA;
    })?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(state.rax, 0xffff_0000 | state.cr0 & 0xffff, "AX");
    same!(machine.ram.number(DATA, 2), state.cr0 & 0xffff, "memory");
    same!(state.cr0 & 1 << 5, 0, "NE");
    Ok(())
}

fn invd_and_wbinvd(mode: Mode) -> Outcome {
    let machine = Machine::new(
        mode,
        guest!(
            "mov dword ptr [edi], 7",
            "invd",
            "wbinvd",
            "mov eax, [edi]",
            "hlt"
        ),
    )?;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 7, "memory was not lost");
    Ok(())
}

/// A page moves: the old translation is used no more after INVLPG.
fn invlpg(mode: Mode) -> Outcome {
    let code = guest!(
        "mov eax, [edi]",
        "out 0x80, al",
        "invlpg [edi]",
        "mov eax, [edi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.write_u32(DATA, 0x11);
    machine.ram.write_u32(DATA + 0x1000, 0x22);
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[out(0x80, 1, 0x11)])?;
    let (at, size) = mode.page_entry(DATA >> 12);
    machine
        .ram
        .write(at, &((DATA + 0x1000) | 0x67).to_le_bytes()[..size]);
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0x22, "what is read");
    Ok(())
}

/// SDM 4.4.1: #GP, at the instruction that would have loaded them.
fn pdpte_reserved_bits() -> Outcome {
    let code = guest!(32: "mov eax, cr3", "out 0x80, al", "mov cr3, eax", "hlt");
    let machine = Machine::new(Mode::Pae, code)?;
    machine.expect(&[out(0x80, 1, 0)])?;
    machine.ram.write_u64(PDPT_PAE + 24, 0x1e7);
    machine.expect(&[fault_code(13, 0)])?;
    same!(
        machine.frame_rip(true)?,
        crate::modes::CODE + 5,
        "RIP of MOV to CR3"
    );
    Ok(())
}

/// The instruction that loads them faults, and has changed nothing.
fn pdpte_reserved_bits_by_cr0_and_cr4() -> Outcome {
    let with_cr0 =
        guest!(32: "mov eax, cr0", "btc eax, 30", "out 0x80, al", "mov cr0, eax", "inc edx", "hlt");
    let with_cr4 =
        guest!(32: "mov eax, cr4", "btc eax, 7", "out 0x80, al", "mov cr4, eax", "inc edx", "hlt");
    let turned_on =
        guest!(32: "mov eax, cr0", "bts eax, 31", "out 0x80, al", "mov cr0, eax", "inc edx", "hlt");
    for (code, paging) in [(with_cr0, true), (with_cr4, true), (turned_on, false)] {
        for bad in [1 << 1, 1 << 5, 1 << 8, 1 << 50] {
            let machine = Machine::new(Mode::Pae, code)?;
            if !paging {
                machine.set(|state| state.cr0 &= !(1 << 31))?;
            }
            let before = machine.regs()?;
            let exit = machine.run()?;
            anyhow::ensure!(matches!(exit, crate::exit::Exit::Out { .. }), "{exit:?}");
            let good = machine.ram.u64(PDPT_PAE + 24);
            machine.ram.write_u64(PDPT_PAE + 24, bad | 1);
            machine.expect(&[fault_code(13, 0)])?;
            let state = machine.regs()?;
            let at = crate::modes::CODE + 9;
            same!(machine.frame_rip(true)?, at, "RIP in the frame");
            same!(
                (state.cr0, state.cr4),
                (before.cr0, before.cr4),
                "CR0 and CR4"
            );
            // Once they are right it goes through.
            machine.ram.write_u64(PDPT_PAE + 24, good);
            machine.set(|state| {
                state.rip = at;
                state.rsp = before.rsp;
                state.rdx = 0;
            })?;
            machine.expect(&[halt()])?;
            let after = machine.regs()?;
            same!(after.rdx, 1, "EDX");
            anyhow::ensure!(
                (after.cr0, after.cr4) != (before.cr0, before.cr4),
                "nothing changed"
            );
        }
    }
    Ok(())
}

/// RUN returns between the instruction and the PDPTEs that it waits for.
fn pdptes_while_signals_come() -> Outcome {
    crate::process::with_alarms(|| {
        for _ in 0..4 {
            pdpte_reserved_bits_by_cr0_and_cr4()?;
        }
        Ok(())
    })
}

fn efer_lme_while_paging(mode: Mode) -> Outcome {
    let code = guest!(64: "mov ecx, 0xc0000080", "rdmsr", "btr eax, 8", "wrmsr", "hlt");
    Machine::new(mode, code)?.expect(&[fault_code(13, 0)])
}

/// A page that is not to be executed; with EFER.NXE clear the same bit is reserved.
fn efer_nxe(mode: Mode) -> Outcome {
    let code = guest!(64:
        "jmp rdi");
    let machine = Machine::new(mode, code)?;
    let (at, _) = mode.page_entry(DATA >> 12);
    machine.ram.write_u64(at, DATA | 0x67 | 1 << 63);
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[fault_code(14, 0x11)])?;
    let code =
        guest!(64: "mov ecx, 0xc0000080", "rdmsr", "btr eax, 11", "wrmsr", "mov al, [rdi]", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.ram.write_u64(at, DATA | 0x67 | 1 << 63);
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[fault_code(14, 9)])
}

fn syscall_and_sysret() -> Outcome {
    let code = guest!(64:
        "mov ebx, 1", "syscall", "mov bl, 3", "in al, 0x70", "hlt",
        ".balign 64",
        "out 0x80, al", "mov rdi, rcx", "mov rsi, r11", "pushfq", "pop rdx", "mov ebp, cs", "sysretq");
    let machine = Machine::new(Mode::Long, code)?;
    let done = machine.vcpu.set_msrs(&[
        (0xc000_0081, 0x0023_0018_0000_0000),
        (0xc000_0082, crate::modes::CODE + 64),
        (0xc000_0084, 0x200),
    ])?;
    same!(done, 3, "SET_MSRS");
    // The TSS has no I/O bitmap: its base is at the limit.
    machine.ram.write_u16(0xb066, 0x68);
    machine.set(|state| {
        super::enter_user(Mode::Long, state);
        state.rflags |= 0x200;
    })?;
    // IN is not for ring 3, where SYSRET has gone back to.
    machine.expect(&[out(0x80, 1, 0), fault_code(13, 0)])?;
    let state = machine.regs()?;
    let behind = crate::modes::CODE + 7;
    same!(state.rdi, behind, "RCX: behind SYSCALL");
    same!(state.rsi & 0x200, 0x200, "R11: RFLAGS");
    same!(state.rdx & 0x200, 0, "IF, by FMASK");
    same!(state.rbp, 0x18, "CS");
    same!(state.rbx, 3, "BL");
    // Behind the error code: RIP, CS, RFLAGS, RSP, SS.
    let frame = [machine.stack(1)?, machine.stack(2)?, machine.stack(5)?];
    same!(
        frame,
        [behind + 2, 0x33, 0x2b],
        "RIP, CS and SS after SYSRET"
    );
    same!(machine.stack(3)? & 0x200, 0x200, "IF after SYSRET");
    Ok(())
}

fn sysenter() -> Outcome {
    let code = guest!(32: "sysenter", ".balign 64", "out 0x80, al", "hlt");
    let machine = Machine::new(Mode::Pae, code)?;
    let done = machine.vcpu.set_msrs(&[
        (0x174, 8),
        (0x175, 0xb800),
        (0x176, crate::modes::CODE + 64),
    ])?;
    same!(done, 3, "SET_MSRS");
    machine.set(|state| super::enter_user(Mode::Pae, state))?;
    machine.expect(&[out(0x80, 1, 0), halt()])?;
    let state = machine.regs()?;
    same!(
        (state.cs.selector, state.ss.selector),
        (8, 0x10),
        "CS and SS"
    );
    same!(state.rsp, 0xb800, "ESP");
    Ok(())
}

/// KERNEL_GS_BASE goes with the vCPU though SWAPGS never exits.
fn swapgs() -> Outcome {
    let code = guest!(64:
        "swapgs", "mov eax, gs:[0]", "out 0x80, al",
        "swapgs", "mov eax, gs:[0]", "hlt");
    let machine = Machine::new(Mode::Long, code)?;
    machine.ram.write_u32(DATA, 0x77);
    machine.ram.write_u32(DATA + 0x1000, 0x66);
    machine.vcpu.set_msrs(&[(0xc000_0102, DATA + 0x1000)])?;
    machine.set(|state| state.gs.base = DATA)?;
    machine.expect(&[out(0x80, 1, 0x66)])?;
    same!(
        machine.vcpu.msrs(&[0xc000_0102])?,
        vec![DATA],
        "KERNEL_GS_BASE between"
    );
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0x77, "EAX");
    same!(
        machine.vcpu.msrs(&[0xc000_0102])?,
        vec![DATA + 0x1000],
        "KERNEL_GS_BASE"
    );
    Ok(())
}

fn xsetbv(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov rax, cr4", "bts rax, 18", "mov cr4, rax",
        "xor ecx, ecx", "xgetbv", "mov ebx, eax",
        "xor ecx, ecx", "xor edx, edx", "mov eax, 7", "xsetbv",
        "xor eax, eax", "xgetbv", "mov esi, eax", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!((state.rbx, state.rsi), (1, 7), "XCR0 before and after");
    Ok(())
}

fn xsetbv_refused(mode: Mode) -> Outcome {
    // Without x87, AVX without SSE, a bit nobody has, another register.
    for (index, value) in [(0, 6), (0, 5), (0, 1 << 30 | 7), (1, 7)] {
        let code = guest!(64:
            "mov rax, cr4", "bts rax, 18", "mov cr4, rax", "mov rax, rbx", "xor edx, edx", "xsetbv", "hlt");
        let machine = Machine::new(mode, code)?;
        machine.set(|state| {
            state.rbx = value;
            state.rcx = index;
        })?;
        machine.expect(&[fault_code(13, 0)])?;
    }
    Ok(())
}

fn xgetbv_without_osxsave(mode: Mode) -> Outcome {
    for code in [
        guest!(64: "xor ecx, ecx", "xgetbv"),
        guest!(64: "xor ecx, ecx", "xsetbv"),
    ] {
        Machine::new(mode, code)?.expect(&[fault(6)])?;
    }
    Ok(())
}

fn descriptor_tables(mode: Mode) -> Outcome {
    let code = guest!(
        "sgdt [edi]",
        "sidt [edi + 16]",
        "lidt [esi]",
        "sidt [edi + 32]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine
        .ram
        .write(DATA + 0x100, &[0xff, 0x01, 0x00, 0x20, 0x0a, 0, 0, 0, 0, 0]);
    machine.set(|state| {
        state.rdi = DATA;
        state.rsi = DATA + 0x100;
    })?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    let before = crate::modes::registers(mode);
    for (at, table, name) in [(DATA, before.gdt, "SGDT"), (DATA + 16, before.idt, "SIDT")] {
        let stored = (machine.ram.number(at, 2), machine.ram.number(at + 2, 3));
        same!(stored, (u64::from(table.limit), table.base), "{name}");
    }
    same!(
        (state.gdt.base, state.gdt.limit),
        (before.gdt.base, before.gdt.limit),
        "GDTR by GET_REGS"
    );
    same!((state.idt.base, state.idt.limit), (0xa2000, 0x1ff), "LIDT");
    same!(machine.ram.number(DATA + 34, 3), 0xa2000, "SIDT after LIDT");
    Ok(())
}

fn rdpmc(mode: Mode) -> Outcome {
    let wanted = if mode == Mode::Real {
        fault(13)
    } else {
        fault_code(13, 0)
    };
    let code = guest!("mov ecx, 0x7f", "rdpmc", "hlt");
    Machine::new(mode, code)?.expect(&[wanted])
}

/// So many that the loop exits: SDM 25.6.13 "Controls for PAUSE-Loop Exiting".
fn pause_and_nop(mode: Mode) -> Outcome {
    let code = guest!(
        "mov ecx, 5000",
        "2: pause",
        "nop",
        "dec ecx",
        "jnz 2b",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rcx, 0, "RCX");
    Ok(())
}

/// The counter, and TSC_AUX in ECX.
fn rdtscp(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!(64: "rdtscp", "mov ebx, ecx", "hlt"))?;
    let done = machine.vcpu.set_msrs(&[(0xc000_0103, 0x1234)])?;
    same!(done, 1, "SET_MSRS(TSC_AUX)");
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(state.rbx, 0x1234, "TSC_AUX");
    Ok(())
}
