//! A plain instruction on a device: the client has the access, the instruction waits to be finished.

use abi::tunnel::{ExitStatus, offset};
use sim::Step;
use sim::client::{CODE, Client};

/// Device memory.
const DEVICE: u64 = 0xd000_0000;
/// Where the fast-MMIO record has its value.
const VALUE: usize = 8;
/// RFLAGS.RF and RFLAGS.TF.
const RF: u64 = 1 << 16;
const TF: u64 = 1 << 8;

/// mov eax, [d0000000h]
const LOAD: [u8; 5] = [0xa1, 0, 0, 0, 0xd0];
/// mov al, [d0000000h]
const LOAD_BYTE: [u8; 5] = [0xa0, 0, 0, 0, 0xd0];
/// mov [d0000000h], eax
const STORE: [u8; 5] = [0xa3, 0, 0, 0, 0xd0];
/// test dword ptr [d0000000h], 80000001h
const TEST: [u8; 10] = [0xf7, 0x05, 0, 0, 0, 0xd0, 1, 0, 0, 0x80];
/// add [d0000000h], eax
const ADD: [u8; 6] = [0x01, 0x05, 0, 0, 0, 0xd0];
/// CF, PF, ZF, SF, OF.
const STATUS: u64 = 0x8c5;

fn guest(code: &[u8]) -> Client {
    let client = Client::protected();
    client.load(CODE, code);
    client
}

/// A read that the client has.
fn reading(code: &[u8], size: usize) -> Client {
    let client = guest(code);
    let step = Step::read(DEVICE, size, 0, code.len() as u64);
    assert_eq!(client.run([step]), ExitStatus::FastMmio);
    client
}

/// Answers, and comes back as soon as the instruction is done.
fn answer(client: &Client, value: u64) {
    client.set_io_buffer(VALUE, &value.to_le_bytes());
    client.set_tunnel(offset::USER_EVENT_PENDING, 1);
    assert_eq!(client.run([]), ExitStatus::Interrupt);
}

#[test]
fn nothing_has_happened_until_run_is_called_again() {
    let client = guest(&LOAD);
    client.change_regs(|state| {
        state.rax = 0x1111_2222_3333_4444;
        state.rflags |= RF;
    });
    let status = client.run([Step::read(DEVICE, 4, 0, 5)]);
    assert_eq!(status, ExitStatus::FastMmio);
    let state = client.regs();
    assert_eq!((state.rip, state.rax), (CODE, 0x1111_2222_3333_4444));
    answer(&client, 0xffff_ffff_8765_4321);
    let state = client.regs();
    assert_eq!((state.rip, state.rax), (CODE + 5, 0x8765_4321));
    assert_eq!(state.rflags & RF, 0, "RF");
    client.finish();
}

/// SET_REGS that leaves RIP alone does not give the instruction up, and what it sets counts.
#[test]
fn it_is_finished_with_the_registers_the_client_set() {
    let client = reading(&LOAD_BYTE, 1);
    client.change_regs(|state| {
        state.rax = 0x5566_7788;
        state.rbx = 9;
    });
    answer(&client, 0x42);
    let state = client.regs();
    assert_eq!(
        (state.rip, state.rax, state.rbx),
        (CODE + 5, 0x5566_7742, 9)
    );
    client.finish();
}

#[test]
fn another_rip_gives_it_up() {
    let client = reading(&LOAD, 4);
    client.change_regs(|state| {
        state.rip = CODE + 0x100;
        state.rax = 7;
    });
    answer(&client, 0x42);
    let state = client.regs();
    assert_eq!((state.rip, state.rax), (CODE + 0x100, 7));
    client.finish();
}

/// What the client writes to the record after RUN has taken the answer, or into a store's, is nothing to the guest.
#[test]
fn a_store_takes_nothing_from_the_record() {
    let client = guest(&STORE);
    client.change_regs(|state| state.rax = 0x1_2345_6789);
    let status = client.run([Step::write(DEVICE, 4, 0, 5)]);
    assert_eq!(status, ExitStatus::FastMmio);
    let record = client.fast_mmio();
    assert_eq!((record.gpa, record.size, record.direction), (DEVICE, 4, 1));
    assert_eq!(record.value, 0x2345_6789);
    answer(&client, u64::MAX);
    let state = client.regs();
    assert_eq!((state.rip, state.rax), (CODE + 5, 0x1_2345_6789));
    client.finish();
}

/// The same address, another instruction: once because the client wrote the code, once because the guest did.
#[test]
fn changed_code_is_read_again() {
    let client = reading(&LOAD, 4);
    answer(&client, 1);
    for (code, size) in [(LOAD_BYTE, 1), (LOAD, 4), (LOAD_BYTE, 1)] {
        client.load(CODE, &code);
        client.change_regs(|state| {
            state.rip = CODE;
            state.rax = 0xaaaa_aaaa;
        });
        let status = client.run([Step::read(DEVICE, size, 0, 5)]);
        assert_eq!(status, ExitStatus::FastMmio);
        assert_eq!(usize::from(client.fast_mmio().size), size);
        answer(&client, 0x1111_1111);
        let wanted = if size == 1 { 0xaaaa_aa11 } else { 0x1111_1111 };
        assert_eq!(client.regs().rax, wanted);
    }
    client.finish();
}

/// The code names another address than the processor touched: what was executed is not what is there now, so the
/// access is not made up from both. Likewise a read that was a write.
#[test]
fn code_that_does_not_fit_the_access_goes_the_long_way() {
    let client = guest(&[0xa1, 0x10, 0, 0, 0xd0]);
    let status = client.run([Step::read(DEVICE, 4, 0, 5)]);
    assert_eq!(status, ExitStatus::FastMmio);
    assert_eq!(client.fast_mmio().gpa, DEVICE + 0x10);
    client.change_regs(|state| state.rip = CODE + 5);
    client.load(CODE + 5, &LOAD);
    let status = client.run([Step::write(DEVICE, 4, 0, 5)]);
    assert_eq!(status, ExitStatus::FastMmio);
    assert_eq!(client.fast_mmio().direction, 0);
}

/// Segment bases count, whichever segment it is and whichever the last instruction used.
#[test]
fn the_base_is_that_of_the_segment() {
    let client = guest(&[]);
    client.change_regs(|state| {
        state.es.base = 0x1000;
        state.fs.base = 0x2000;
        state.ss.base = 0x3000;
        state.rbp = DEVICE;
    });
    // es, fs, ds: mov eax, [d0000000h]; mov eax, [ebp]
    let cases: [(&[u8], u64); 8] = [
        (&[0x26, 0xa1, 0, 0, 0, 0xd0], 0x1000),
        (&[0x64, 0xa1, 0, 0, 0, 0xd0], 0x2000),
        (&[0xa1, 0, 0, 0, 0xd0], 0),
        (&[0x8b, 0x45, 0x00], 0x3000),
        (&[0x8b, 0x45, 0x00], 0x3000),
        (&[0x26, 0xa1, 0, 0, 0, 0xd0], 0x1000),
        (&[0xa1, 0, 0, 0, 0xd0], 0),
        (&[0xa1, 0, 0, 0, 0xd0], 0),
    ];
    for (code, base) in cases {
        client.load(CODE, code);
        client.change_regs(|state| state.rip = CODE);
        let step = Step::read(DEVICE + base, 4, 0, code.len() as u64);
        assert_eq!(client.run([step]), ExitStatus::FastMmio);
        assert_eq!(client.fast_mmio().gpa, DEVICE + base, "{code:02x?}");
        answer(&client, base + 1);
        let state = client.regs();
        assert_eq!((state.rip, state.rax), (CODE + code.len() as u64, base + 1));
    }
    client.finish();
}

/// A register that is in the VMCS, as the address, as the source and as the target.
#[test]
fn the_stack_pointer_is_a_register_too() {
    // mov [d0000000h], esp; mov sp, [d0000000h]; mov eax, [esp]
    let code = [
        0x89, 0x25, 0, 0, 0, 0xd0, 0x66, 0x8b, 0x25, 0, 0, 0, 0xd0, 0x8b, 0x04, 0x24,
    ];
    let client = guest(&code);
    client.change_regs(|state| state.rsp = 0xd000_8000);
    assert_eq!(
        client.run([Step::write(DEVICE, 4, 0, 6)]),
        ExitStatus::FastMmio
    );
    assert_eq!(client.fast_mmio().value, 0xd000_8000);
    let steps = [Step::read(DEVICE, 2, 0, 7)];
    assert_eq!(client.run(steps), ExitStatus::FastMmio);
    client.set_io_buffer(VALUE, &0x1_9000u64.to_le_bytes());
    let steps = [Step::read(0xd000_9000, 4, 0, 3)];
    assert_eq!(client.run(steps), ExitStatus::FastMmio);
    assert_eq!(client.fast_mmio().gpa, 0xd000_9000);
    answer(&client, 5);
    let state = client.regs();
    assert_eq!(
        (state.rip, state.rsp, state.rax),
        (CODE + 16, 0xd000_9000, 5)
    );
    client.finish();
}

/// TF: the #DB is pending once the instruction is done, and not before.
#[test]
fn a_trap_flag_traps_when_it_is_done() {
    let client = guest(&LOAD);
    client.change_regs(|state| state.rflags |= TF);
    let status = client.run([Step::read(DEVICE, 4, 0, 5)]);
    assert_eq!(status, ExitStatus::FastMmio);
    client.set_io_buffer(VALUE, &3u64.to_le_bytes());
    let pending = Step::act(|guest| {
        // BS of the pending debug exceptions.
        assert_ne!(guest.field(0x6822) & (1 << 14), 0, "no trap is pending");
        assert_eq!(guest.regs.gpr[0], 3);
    });
    client.run([pending, Step::hlt()]);
}

/// Blocking by STI or MOV SS ends with the instruction, and not before.
#[test]
fn a_shadow_ends_with_it() {
    /// Interruptibility state, and its two lowest bits.
    const FIELD: u32 = 0x4824;
    for (blocking, field) in [(1, 0x2), (2, 0x202)] {
        let client = guest(&LOAD);
        client.change_regs(|state| state.rflags = field);
        // Twice: the second time the page is known.
        for _ in 0..2 {
            client.change_regs(|state| state.rip = CODE);
            let block = Step::act(move |guest| guest.set_field(FIELD, blocking));
            let status = client.run([block, Step::read(DEVICE, 4, 0, 5)]);
            assert_eq!(status, ExitStatus::FastMmio);
            assert_eq!(
                u64::from(client.regs().interruptibility_state.raw),
                blocking
            );
            let over = Step::act(move |guest| assert_eq!(guest.field(FIELD), 0));
            client.run([over, Step::hlt()]);
        }
    }
}

/// A client that turns single-stepping on while it has the access hears of the instruction's end.
#[test]
fn a_client_that_begins_to_step_sees_it_end() {
    let client = reading(&LOAD, 4);
    answer(&client, 1);
    client.change_regs(|state| state.rip = CODE);
    let status = client.run([Step::read(DEVICE, 4, 0, 5)]);
    assert_eq!(status, ExitStatus::FastMmio);
    let control = abi::debug::DebugControl::ENABLE | abi::debug::DebugControl::STEP;
    let debug = abi::debug::VcpuDebug {
        control: control.bits(),
        ..abi::debug::VcpuDebug::default()
    };
    client.vcpu.set_debug(&debug).unwrap();
    assert_eq!(client.run([]), ExitStatus::Debug);
    assert_eq!(client.regs().rip, CODE + 5);
}

/// No flag changes before the answer is there, and then all do: ZF, PF, SF by the value, CF and OF clear.
#[test]
fn a_test_sets_flags_when_it_is_done() {
    let client = guest(&TEST);
    for (value, flags) in [(0x8000_0000u32, 0x84u64), (1, 0), (6, 0x44)] {
        client.change_regs(|state| {
            state.rip = CODE;
            state.rflags = 2 | STATUS;
        });
        let status = client.run([Step::read(DEVICE, 4, 0, 10)]);
        assert_eq!(status, ExitStatus::FastMmio);
        let record = client.fast_mmio();
        assert_eq!((record.gpa, record.size, record.direction), (DEVICE, 4, 0));
        assert_eq!(client.regs().rflags & STATUS, STATUS);
        answer(&client, u64::from(value));
        let state = client.regs();
        assert_eq!((state.rip, state.rflags & STATUS), (CODE + 10, flags));
    }
    client.finish();
}

/// The register is the second operand of one and the first of the other.
#[test]
fn a_compare_knows_its_first_operand() {
    // cmp [d0000000h], eax; cmp eax, [d0000000h]; sub eax, [d0000000h]
    let code = [
        0x39, 0x05, 0, 0, 0, 0xd0, 0x3b, 0x05, 0, 0, 0, 0xd0, 0x2b, 0x05, 0, 0, 0, 0xd0,
    ];
    let client = guest(&code);
    client.change_regs(|state| state.rax = 5);
    for (carry, result) in [(1, 5), (0, 5), (0, 1)] {
        let status = client.run([Step::read(DEVICE, 4, 0, 6)]);
        assert_eq!(status, ExitStatus::FastMmio);
        answer(&client, 4);
        let state = client.regs();
        assert_eq!((state.rflags & 1, state.rax), (carry, result));
    }
    client.finish();
}

/// A read and a write, and nothing of the guest's changes until both are done.
#[test]
fn an_update_is_a_read_and_a_write() {
    let client = guest(&ADD);
    for both in [false, true] {
        client.change_regs(|state| {
            state.rip = CODE;
            state.rax = 0x8000_0001;
            state.rflags = 2 | RF;
        });
        assert_eq!(
            client.run([Step::update(DEVICE, both, 6)]),
            ExitStatus::FastMmio
        );
        let record = client.fast_mmio();
        assert_eq!((record.gpa, record.size, record.direction), (DEVICE, 4, 0));
        client.set_io_buffer(VALUE, &0xffff_ffff_8000_0005u64.to_le_bytes());
        assert_eq!(client.run([]), ExitStatus::FastMmio);
        let record = client.fast_mmio();
        assert_eq!((record.gpa, record.size, record.direction), (DEVICE, 4, 1));
        assert_eq!(record.value, 6);
        let state = client.regs();
        assert_eq!((state.rip, state.rflags & (STATUS | RF)), (CODE, RF));
        answer(&client, u64::MAX);
        let state = client.regs();
        assert_eq!((state.rip, state.rax), (CODE + 6, 0x8000_0001));
        // CF, PF, OF.
        assert_eq!(state.rflags & (STATUS | RF), 0x805);
    }
    client.finish();
}

/// Between the two accesses of an update: with another RIP nothing more happens.
#[test]
fn another_rip_gives_an_update_up() {
    let client = guest(&ADD);
    let status = client.run([Step::write(DEVICE, 4, 0, 6)]);
    assert_eq!(status, ExitStatus::FastMmio);
    assert_eq!(client.run([]), ExitStatus::FastMmio);
    client.change_regs(|state| {
        state.rip = CODE + 0x100;
        state.rflags = 2 | STATUS;
    });
    answer(&client, 0x42);
    let state = client.regs();
    assert_eq!(state.rip, CODE + 0x100);
    assert_eq!(state.rflags & STATUS, STATUS);
    client.finish();
}

/// ROM that an instruction reads and writes: it is read, and the client has the write alone.
#[test]
fn an_update_of_rom_is_a_write() {
    let client = guest(&[]);
    let rom = 0x40_0000;
    let buffer = client.process.map(0x1000);
    client.process.poke(buffer, &0x1122_3344u32.to_le_bytes());
    let flags = abi::ram::RamFlags::ROM | abi::ram::RamFlags::STANDALONE;
    client
        .vm
        .set_ram(rom, 0x1000, buffer.0, flags.bits())
        .unwrap();
    // add [rom], eax
    let mut code = ADD;
    code[2..6].copy_from_slice(&(rom as u32).to_le_bytes());
    for _ in 0..2 {
        client.load(CODE, &code);
        client.change_regs(|state| {
            state.rip = CODE;
            state.rax = 3;
        });
        let status = client.run([Step::write(rom, 4, 0, 6)]);
        assert_eq!(status, ExitStatus::FastMmio);
        let record = client.fast_mmio();
        assert_eq!((record.gpa, record.size, record.direction), (rom, 4, 1));
        assert_eq!(record.value, 3 + 0x1122_3344);
        answer(&client, 0);
        assert_eq!(client.regs().rip, CODE + 6);
    }
    client.finish();
}

/// The emulator looks, and the client is not asked.
#[test]
fn alignment_is_checked_in_user_code() {
    let client = guest(&[0xa1, 1, 0, 0, 0xd0]);
    client.change_regs(|state| {
        state.cs.selector |= 3;
        state.ss.selector |= 3;
        state.cs.ar |= 0x60;
        state.ss.ar |= 0x60;
        state.cr0 |= 1 << 18;
        state.rflags |= 1 << 18;
    });
    let status = client.run([Step::read(DEVICE + 1, 4, 0, 5)]);
    assert_eq!(status, ExitStatus::Interrupt);
    let received = client.machine.take_received();
    let events: Vec<_> = received.iter().map(|e| (e.vector, e.error_code)).collect();
    assert_eq!(events, [(17, Some(0))]);
    client.finish();
}
