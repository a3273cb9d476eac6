//! SET_REGS, GET_REGS, SET_FPU, GET_FPU: what goes in comes out, by ioctl and by guest code.

use abi::{ExitStatus, FxLayout, VcpuState};

use super::{Case, Outcome};
use crate::exit::{halt, out};
use crate::guest;
use crate::machine::{Machine, vm_with_ram};
use crate::modes::{DATA, Mode};

pub const CASES: &[Case] = &[
    case!(power_up_state),
    case!(round_trip in ALL),
    case!(general_registers_reach_the_guest in LONG),
    case!(guest_changes_come_back in LONG),
    case!(run_from_the_reset_vector),
    case!(null_segment_comes_back),
    case!(ignored_fields),
    case!(no_stray_bytes),
    case!(order_of_regs_and_msrs),
    case!(invalid_state_is_refused_at_run),
    case!(sixteen_bit_protected),
    case!(virtual_8086),
    case!(fpu_round_trip),
    case!(fpu_reaches_the_guest in SIZES),
    case!(fpu_comes_back in SIZES),
    case!(fpu_reserved_mxcsr),
    case!(fpu_survives_exits in LONG),
    case!(avx_survives_exits in LONG),
    case!(avx_is_not_shared in LONG),
    case!(host_vectors_survive in LONG),
    case!(x87_stack in SIZES),
    case!(debug_registers_round_trip in LONG),
];

fn power_up_state() -> Outcome {
    let (vm, _ram) = vm_with_ram()?;
    let vcpu = vm.create_vcpu(0)?;
    let state = vcpu.regs()?;
    same!((state.rip, state.rflags), (0xfff0, 2), "RIP and RFLAGS");
    same!(state.cr0, 0x6000_0010, "CR0");
    same!(
        (state.cs.selector, state.cs.base),
        (0xf000, 0xffff_0000),
        "CS"
    );
    same!(state.cs.limit, 0xffff, "CS limit");
    for segment in [state.ss, state.ds, state.es, state.fs, state.gs] {
        same!(
            (segment.selector, segment.base, segment.limit),
            (0, 0, 0xffff),
            "segment"
        );
        same!(segment.ar, 0x93, "access rights");
    }
    same!(
        (state.ldt.ar & 0xff, state.tr.limit),
        (0x82, 0xffff),
        "LDT and TR"
    );
    same!((state.dr6, state.dr7), (0xffff_0ff0, 0x400), "DR6 and DR7");
    let fpu = vcpu.fpu()?;
    same!((fpu.fcw, fpu.mxcsr), (0x37f, 0x1f80), "FCW and MXCSR");
    Ok(())
}

fn round_trip(mode: Mode) -> Outcome {
    let machine = Machine::new(mode, guest!("hlt"))?;
    let mut wanted = machine.regs()?;
    let mut value = 0x0123_4567_89ab_cdef_u64;
    wanted.set_regs(wanted.regs().map(|_| {
        value = value.rotate_left(7).wrapping_add(1);
        value
    }));
    wanted.rip = 0x1234;
    wanted.rflags = 0xad7;
    wanted.cr2 = 0x7fff_1234_5678;
    wanted.fs.base = 0x1000_0000;
    wanted.gs.base = 0x2000_0000;
    wanted.gdt.base = 0x7000;
    wanted.idt.limit = 0x123;
    wanted.dr0 = 0x1111;
    wanted.dr3 = 0x3333;
    machine.vcpu.set_regs(&wanted)?;
    same!(machine.regs()?, wanted, "registers");
    Ok(())
}

fn general_registers_reach_the_guest(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov [0xc000], rax", "mov [0xc008], rcx", "mov [0xc010], rdx", "mov [0xc018], rbx",
        "mov [0xc020], rsp", "mov [0xc028], rbp", "mov [0xc030], rsi", "mov [0xc038], rdi",
        "mov [0xc040], r8", "mov [0xc048], r9", "mov [0xc050], r10", "mov [0xc058], r11",
        "mov [0xc060], r12", "mov [0xc068], r13", "mov [0xc070], r14", "mov [0xc078], r15", "hlt");
    let machine = Machine::new(mode, code)?;
    let mut state = machine.regs()?;
    let mut count = 0_u64;
    state.set_regs([0; 16].map(|_: u64| {
        count += 1;
        count * 0x0101_0101_0101_0101
    }));
    machine.vcpu.set_regs(&state)?;
    machine.expect(&[halt()])?;
    for (index, value) in state.regs().into_iter().enumerate() {
        same!(
            machine.ram.u64(DATA + index as u64 * 8),
            value,
            "register {index}"
        );
    }
    same!(machine.regs()?.regs(), state.regs(), "registers afterwards");
    Ok(())
}

fn guest_changes_come_back(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov rax, 1", "mov rcx, 2", "mov rdx, 3", "mov rbx, 4", "mov rsp, 5", "mov rbp, 6", "mov rsi, 7",
        "mov rdi, 8", "mov r8, 9", "mov r9, 10", "mov r10, 11", "mov r11, 12", "mov r12, 13", "mov r13, 14",
        "mov r14, 15", "mov r15, 16", "stc", "std", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    let wanted: Vec<u64> = (1..=16).collect();
    same!(state.regs().to_vec(), wanted, "registers");
    same!(state.rflags & 0x401, 0x401, "DF and CF");
    Ok(())
}

/// A firmware's first instruction, on a page mapped twice.
fn run_from_the_reset_vector() -> Outcome {
    let (vm, ram) = vm_with_ram()?;
    let vcpu = vm.create_vcpu(0)?;
    // jmp f000:e05b, as every BIOS has it; there: mov al, 5; out 80h, al; hlt.
    ram.write(0x1f_fff0, &[0xea, 0x5b, 0xe0, 0x00, 0xf0]);
    ram.write(0x1f_e05b, &[0xb0, 5, 0xe6, 0x80, 0xf4]);
    for gpa in [0xf0000, 0xffff_0000] {
        vm.set_ram(gpa, 0x10000, 1, ram.address() + 0x1f_0000)?;
    }
    crate::machine::expect(&vcpu, Mode::Real, &ram, &[out(0x80, 1, 5), halt()])?;
    let state = vcpu.regs()?;
    same!(
        (state.cs.base, state.rip),
        (0xf0000, 0xe060),
        "CS base and RIP"
    );
    Ok(())
}

fn null_segment_comes_back() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "xor eax, eax", "mov es, eax", "hlt"))?;
    machine.set(|state| {
        state.ds.ar = 0;
        state.fs.ar = 0x10000;
    })?;
    let state = machine.regs()?;
    same!(
        (state.ds.ar >> 16, state.fs.ar >> 16),
        (1, 1),
        "unusable bit of DS and FS"
    );
    machine.expect(&[halt()])?;
    same!(
        machine.regs()?.es.ar >> 16,
        1,
        "unusable bit of ES, loaded with 0"
    );
    Ok(())
}

/// EFER, SYSENTER, activity, interruptibility and PDE travel otherwise.
fn ignored_fields() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    machine.vcpu.set_msrs(&[(0x174, 0x33)])?;
    machine.set(|state| {
        state.efer = 0;
        state.sysenter_cs = 0x99;
        state.activity_state = 2;
        state.interruptibility_state.raw = 0xf;
        state.pde = 7;
    })?;
    let efer = machine.vcpu.msrs(&[crate::modes::EFER, 0x174])?;
    same!(
        efer,
        vec![crate::modes::EFER_LONG, 0x33],
        "EFER and SYSENTER_CS"
    );
    machine.expect(&[halt()])
}

/// Two GET_REGS over different old contents give the same bytes: none is left unwritten.
fn no_stray_bytes() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let request = abi::os::linux::HAX_VCPU_GET_REGS;
    let mut seen = Vec::new();
    for byte in [0x00_u8, 0xff, 0x5a] {
        let mut bytes = [byte; size_of::<VcpuState>()];
        machine.vcpu.node.with(request, &mut bytes)?;
        seen.push(bytes);
    }
    same!(seen[1], seen[0], "bytes over ff");
    same!(seen[2], seen[0], "bytes over 5a");
    let request = abi::os::linux::HAX_VCPU_IOCTL_GET_FPU;
    let mut seen = Vec::new();
    for byte in [0x00_u8, 0xff] {
        let mut bytes = [byte; size_of::<FxLayout>()];
        machine.vcpu.node.with(request, &mut bytes)?;
        seen.push(bytes);
    }
    anyhow::ensure!(seen[0] == seen[1], "bytes of GET_FPU stay as they were");
    Ok(())
}

/// Clients send CR0 and CR4 first and EFER afterwards, and the other way on the way back.
fn order_of_regs_and_msrs() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "mov rax, 0x1122334455667788", "hlt"))?;
    let long = machine.regs()?;
    let real = crate::modes::registers(Mode::Real);
    machine.vcpu.set_regs(&real)?;
    machine.vcpu.set_msrs(&[(crate::modes::EFER, 0)])?;
    machine.vcpu.set_regs(&long)?;
    machine
        .vcpu
        .set_msrs(&[(crate::modes::EFER, crate::modes::EFER_LONG)])?;
    machine.expect(&[halt()])?;
    same!(machine.regs()?.rax, 0x1122334455667788, "RAX");
    Ok(())
}

/// SET_REGS takes it; the VM entry does not; the guest is lost, the host is not.
fn invalid_state_is_refused_at_run() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    machine.set(|state| state.cs.ar = 0xc09b | 0x2000)?;
    // The host may want the processor before the entry is tried.
    let result = loop {
        let result = machine.vcpu.run();
        if result.is_err() || machine.vcpu.tunnel.exit_status() != ExitStatus::Interrupt.raw() {
            break result;
        }
    };
    same!(result, Err(crate::client::Refused(libc::EINVAL)), "RUN");
    same!(machine.vcpu.tunnel.exit_status(), 5, "exit status");
    machine.regs().map(drop)
}

fn sixteen_bit_protected() -> Outcome {
    let code = guest!(16: "mov ax, 0x50", "mov ds, ax", "mov bx, 0xc000", "mov ax, [bx]", "out 0x80, ax", "hlt");
    let code = crate::code::Code {
        bits32: code.bits16,
        ..code
    };
    let machine = Machine::new(Mode::Protected, code)?;
    machine.ram.write_u16(DATA, 0x4321);
    machine.set(|state| {
        state.cs.selector = crate::modes::selector::CODE16;
        state.cs.ar = 0x9b;
        state.cs.limit = 0xfffff;
    })?;
    machine.expect(&[out(0x80, 2, 0x4321), halt()])
}

/// IOPL 3 and no redirection: what V8086 code may do, and a #GP into the monitor for HLT.
fn virtual_8086() -> Outcome {
    let code = guest!(16: "mov ax, 0x1234", "mov bx, 0xc000", "mov [bx], ax", "in al, 0x70", "hlt");
    let code = crate::code::Code {
        bits32: code.bits16,
        ..code
    };
    let machine = Machine::new(Mode::Paged, code)?;
    machine.set(|state| {
        let segment = |selector: u16| abi::SegmentDesc {
            selector,
            base: u64::from(selector) << 4,
            limit: 0xffff,
            ar: 0xf3,
            ..abi::SegmentDesc::default()
        };
        state.rflags = 0x2_3002;
        state.cs = segment(0x1000);
        state.ss = segment(0);
        state.ds = segment(0);
        state.es = segment(0);
        state.fs = segment(0);
        state.gs = segment(0);
        state.rip = 0;
        state.rsp = 0xe000;
    })?;
    // In virtual-8086 mode the I/O bitmap decides, whatever IOPL is: all ports open.
    machine.ram.write_u16(0xb066, 0x68);
    machine.ram.fill(0xb068, 0x40, 0);
    machine.set(|state| state.tr.limit = 0x68 + 0x40)?;
    machine.expect(&[
        crate::exit::input(0x70, 1, 7),
        crate::exit::fault_code(13, 0),
    ])?;
    same!(machine.ram.number(DATA, 2), 0x1234, "memory");
    same!(machine.regs()?.rflags & 0x20000, 0, "VM in the monitor");
    Ok(())
}

fn filled_fpu() -> FxLayout {
    let mut image = crate::machine::fpu_after_reset();
    image.fcw = 0x27f;
    image.fsw = 0x3800;
    image.ftw = 0xff;
    image.fop = 0x123;
    image.fpu_ip = 0x1234_5678;
    image.fpu_dp = 0x8765_4321;
    image.mxcsr = 0x1fa0;
    for (index, register) in image.st_mm.iter_mut().enumerate() {
        register[..10].fill(0x10 + index as u8);
    }
    for (index, register) in image.mmx_1.iter_mut().chain(&mut image.mmx_2).enumerate() {
        register.fill(0xa0 + index as u8);
    }
    image
}

/// What the format defines; the rest is reserved.
fn same_fpu(got: &FxLayout, wanted: &FxLayout) -> Outcome {
    same!(
        (got.fcw, got.fsw, got.ftw, got.fop, got.mxcsr),
        (wanted.fcw, wanted.fsw, wanted.ftw, wanted.fop, wanted.mxcsr),
        "control, status, tag, opcode, MXCSR"
    );
    for (index, (got, wanted)) in got.st_mm.iter().zip(&wanted.st_mm).enumerate() {
        same!(got[..10], wanted[..10], "ST{index}");
    }
    same!(got.mmx_1, wanted.mmx_1, "XMM0 to 7");
    same!(got.mmx_2, wanted.mmx_2, "XMM8 to 15");
    Ok(())
}

fn fpu_round_trip() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let wanted = filled_fpu();
    machine.vcpu.set_fpu(&wanted)?;
    same_fpu(&machine.vcpu.fpu()?, &wanted)?;
    machine.expect(&[halt()])?;
    same_fpu(&machine.vcpu.fpu()?, &wanted)
}

fn fpu_reaches_the_guest(mode: Mode) -> Outcome {
    let code = guest!(
        "movups [edi], xmm0",
        "movups [edi + 16], xmm7",
        "stmxcsr [edi + 32]",
        "fnstcw [edi + 36]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.vcpu.set_fpu(&filled_fpu())?;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[halt()])?;
    same!(machine.ram.read(DATA, 16), vec![0xa0; 16], "XMM0");
    same!(machine.ram.read(DATA + 16, 16), vec![0xa7; 16], "XMM7");
    same!(machine.ram.u32(DATA + 32), 0x1fa0, "MXCSR");
    same!(machine.ram.number(DATA + 36, 2), 0x27f, "control word");
    Ok(())
}

fn fpu_comes_back(mode: Mode) -> Outcome {
    let code = guest!(
        "movups xmm3, [edi]",
        "ldmxcsr [edi + 16]",
        "fldcw [edi + 20]",
        "fld1",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.ram.write(DATA, &[0x5c; 16]);
    machine.ram.write_u32(DATA + 16, 0x1f81);
    machine.ram.write_u16(DATA + 20, 0x17f);
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[halt()])?;
    let fpu = machine.vcpu.fpu()?;
    same!(fpu.mmx_1[3], [0x5c; 16], "XMM3");
    same!(
        (fpu.mxcsr, fpu.fcw),
        (0x1f81, 0x17f),
        "MXCSR and control word"
    );
    same!(fpu.ftw, 0x80, "tag word after FLD1");
    same!(fpu.st_mm[0][7..10], [0x80, 0xff, 0x3f], "ST0: 1.0");
    Ok(())
}

/// Reserved MXCSR bits would make the processor's load fault in the kernel.
fn fpu_reserved_mxcsr() -> Outcome {
    let machine = Machine::new(Mode::Long, guest!(64: "hlt"))?;
    let mut image = filled_fpu();
    image.mxcsr = u32::MAX;
    image.mxcsr_mask = u32::MAX;
    image.pad = [0xff; 96];
    image.res1 = 0xff;
    machine.vcpu.set_fpu(&image)?;
    machine.expect(&[halt()])?;
    same!(machine.vcpu.fpu()?.mxcsr & !0xffff, 0, "reserved bits");
    Ok(())
}

fn fpu_survives_exits(mode: Mode) -> Outcome {
    let code = guest!(64:
        "movups xmm15, [rdi]", "mov ecx, 20",
        "2: out 0x80, al", "mov [0xd0000], al", "dec ecx", "jnz 2b",
        "movups [rdi + 16], xmm15", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.ram.write(DATA, b"sixteen byte txt");
    machine.set(|state| state.rdi = DATA)?;
    let mut steps = Vec::new();
    for _ in 0..20 {
        steps.push(out(0x80, 1, 0));
        steps.push(crate::exit::write(crate::modes::DEVICE, 1, 0));
    }
    steps.push(halt());
    machine.expect(&steps)?;
    same!(
        machine.ram.read(DATA + 16, 16),
        b"sixteen byte txt".to_vec(),
        "XMM15"
    );
    Ok(())
}

/// Loads all YMM registers from a pattern, exits often, stores them.
fn avx_code() -> crate::code::Code {
    guest!(64:
        "mov rax, cr4", "bts rax, 18", "mov cr4, rax",
        "xor ecx, ecx", "xor edx, edx", "mov eax, 7", "xsetbv",
        "vmovups ymm0, [rdi]", "vmovups ymm7, [rdi + 32]", "vmovups ymm15, [rdi + 64]",
        "mov ecx, 10",
        "2: out 0x80, al", "mov edx, 20000", "3: dec edx", "jnz 3b", "dec ecx", "jnz 2b",
        "vmovups [rdi + 96], ymm0", "vmovups [rdi + 128], ymm7", "vmovups [rdi + 160], ymm15", "hlt")
}

fn avx_machine(mode: Mode, seed: u8) -> anyhow::Result<(Machine, Vec<u8>)> {
    let machine = Machine::new(mode, avx_code())?;
    let pattern: Vec<u8> = (0..96).map(|at: u8| at.wrapping_mul(11) ^ seed).collect();
    machine.ram.write(DATA, &pattern);
    machine.set(|state| state.rdi = DATA)?;
    Ok((machine, pattern))
}

fn avx_survives_exits(mode: Mode) -> Outcome {
    let (machine, pattern) = avx_machine(mode, 0x3c)?;
    for _ in 0..10 {
        machine.expect(&[out(0x80, 1, 7)])?;
        dirty_vectors(0x99);
    }
    machine.expect(&[halt()])?;
    same!(
        machine.ram.read(DATA + 96, 96),
        pattern,
        "YMM0, YMM7, YMM15"
    );
    Ok(())
}

/// Two guests in turn on one processor.
fn avx_is_not_shared(mode: Mode) -> Outcome {
    let (one, first) = avx_machine(mode, 0x11)?;
    let (two, second) = avx_machine(mode, 0xee)?;
    for _ in 0..10 {
        one.expect(&[out(0x80, 1, 7)])?;
        two.expect(&[out(0x80, 1, 7)])?;
    }
    one.expect(&[halt()])?;
    two.expect(&[halt()])?;
    same!(one.ram.read(DATA + 96, 96), first, "the first guest's YMM");
    same!(
        two.ram.read(DATA + 96, 96),
        second,
        "the second guest's YMM"
    );
    // A guest without AVX finds zeroes, not another's registers.
    let code = guest!(64:
        "mov rax, cr4", "bts rax, 18", "mov cr4, rax",
        "xor ecx, ecx", "xor edx, edx", "mov eax, 7", "xsetbv",
        "vmovups [rdi], ymm7", "hlt");
    let fresh = Machine::new(mode, code)?;
    fresh.ram.fill(DATA, 32, 0xff);
    fresh.set(|state| state.rdi = DATA)?;
    fresh.expect(&[halt()])?;
    same!(fresh.ram.read(DATA, 32), vec![0; 32], "YMM7 of a new guest");
    Ok(())
}

/// Fills this process's own YMM registers.
// UNSAFETY: AVX instructions of the test itself.
#[allow(unsafe_code)]
fn dirty_vectors(byte: u8) {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return;
    }
    let value = u32::from_le_bytes([byte; 4]);
    // SAFETY: the processor has AVX2; all changed registers are named.
    unsafe {
        std::arch::asm!(
            "vmovd xmm0, {0:e}", "vpbroadcastd ymm0, xmm0", "vmovups ymm7, ymm0", "vmovups ymm15, ymm0",
            in(reg) value, out("ymm0") _, out("ymm7") _, out("ymm15") _,
            options(nomem, nostack)
        );
    }
}

/// The host's own YMM registers and MXCSR are as they were after a RUN in which the guest changed all.
// UNSAFETY: AVX instructions of the test itself, around the request.
#[allow(unsafe_code)]
fn host_vectors_survive(mode: Mode) -> Outcome {
    anyhow::ensure!(
        std::arch::is_x86_feature_detected!("avx2"),
        "the test machine has AVX2"
    );
    let (machine, _) = avx_machine(mode, 0x77)?;
    let mut before = [0_u8; 64];
    for (at, byte) in before.iter_mut().enumerate() {
        *byte = at as u8 ^ 0xc3;
    }
    let mut after = [0_u8; 64];
    let fd = i64::from(machine.vcpu.node.fd());
    let mut result = 16_i64; // the ioctl system call
    // SAFETY: a system call with no memory argument, between loads and stores of our own arrays; the
    // registers it and we change are named.
    unsafe {
        std::arch::asm!(
            "vmovups ymm0, [r8]", "vmovups ymm15, [r8 + 32]",
            "syscall",
            "vmovups [r9], ymm0", "vmovups [r9 + 32], ymm15",
            inout("rax") result, in("rdi") fd, in("rsi") 0xc0_u64, in("rdx") 0_u64,
            in("r8") before.as_ptr(), in("r9") after.as_mut_ptr(),
            out("rcx") _, out("r11") _, out("ymm0") _, out("ymm15") _,
            options(nostack)
        );
    }
    same!(result, 0, "RUN");
    same!(after, before, "YMM0 and YMM15 of the host");
    Ok(())
}

fn x87_stack(mode: Mode) -> Outcome {
    let code = guest!(
        "fninit",
        "fld1",
        "fldpi",
        "out 0x80, al",
        "faddp",
        "fistp dword ptr [edi]",
        "hlt"
    );
    let machine = Machine::new(mode, code)?;
    machine.set(|state| state.rdi = DATA)?;
    machine.expect(&[out(0x80, 1, 0), halt()])?;
    same!(machine.ram.u32(DATA), 4, "1 + pi, rounded");
    Ok(())
}

fn debug_registers_round_trip(mode: Mode) -> Outcome {
    let code = guest!(64:
        "mov rax, dr0", "mov rbx, dr3", "mov rcx, dr6", "mov rdx, dr7",
        "mov esi, 0x1234", "mov dr1, rsi", "hlt");
    let machine = Machine::new(mode, code)?;
    machine.set(|state| {
        state.dr0 = 0x1_0000_0000;
        state.dr3 = 0xdead_0000;
    })?;
    machine.expect(&[halt()])?;
    let state = machine.regs()?;
    same!(
        (state.rax, state.rbx),
        (0x1_0000_0000, 0xdead_0000),
        "DR0 and DR3"
    );
    same!((state.rcx, state.rdx), (0xffff_0ff0, 0x400), "DR6 and DR7");
    same!(state.dr1, 0x1234, "DR1");
    Ok(())
}
