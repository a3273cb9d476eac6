//! Guest memory: mapping on demand, MMIO, protection, and what happens when
//! the host changes its mind about a page.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use abi::tunnel::{ExitStatus, FastMmioDirection, IoFlags};
use sim::client::{CODE, Client, RAM_SIZE};
use sim::{Access, Machine, Profile, Step, StringIo};
use vmx::arch::addr::Hva;
use vmx::arch::msr;
use vmx::arch::reg::gpr::{RAX, RCX};
use vmx::host::{Aging, Mitigations};
use vmx::{Error, Vm};

const ROM: u32 = 1;
const STANDALONE: u32 = 0x40;
const INVALID: u32 = 0x80;
/// Guest addresses where nothing is mapped.
const DEVICE: u64 = 0xfee0_0000;

/// On a host that reports changes, also where the others pin.
fn borrowing_client() -> Client {
    let machine = Machine::haswell();
    machine.pin_user_memory(false);
    let client = Client::new(&machine);
    client.protected_mode();
    client
}

/// `mov eax, [address]` in 32-bit code.
fn mov_eax_from(address: u64) -> [u8; 5] {
    let a = u32::try_from(address).unwrap().to_le_bytes();
    [0xa1, a[0], a[1], a[2], a[3]]
}

/// `mov [address], eax` in 32-bit code.
fn mov_eax_to(address: u64) -> [u8; 5] {
    let a = u32::try_from(address).unwrap().to_le_bytes();
    [0xa3, a[0], a[1], a[2], a[3]]
}

#[test]
fn ram_is_mapped_when_it_is_touched() {
    let client = Client::protected();
    client.load(0x5000, &0x1122_3344u32.to_le_bytes());
    let status = client.run([
        Step::read(0x5000, 4, 0x1122_3344, 2),
        Step::write(0x5008, 8, 0x8877_6655_4433_2211, 2),
        Step::read(0x5008, 8, 0x8877_6655_4433_2211, 2),
        Step::fetch(0x5000),
        Step::write(RAM_SIZE - 8, 8, 1, 2),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.machine.script_left(), 0);
    assert_eq!(
        u64::from_le_bytes(client.bytes(0x5008)),
        0x8877_6655_4433_2211
    );
    // One exit a page at most.
    assert!(client.machine.counts().exits_of(48) <= 3);
    client.finish();
}

#[test]
fn a_page_read_first_can_be_written_later() {
    let client = Client::protected();
    // The host backs the read with its page of zeros, which must not be written.
    let status = client.run([
        Step::read(0x7000, 8, 0, 2),
        Step::write(0x7000, 8, 5, 2),
        Step::read(0x7000, 8, 5, 2),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.bytes::<1>(0x7000), [5]);
    client.finish();
}

#[test]
fn mmio_goes_to_the_client() {
    let client = Client::protected();
    client.load(CODE, &mov_eax_to(DEVICE + 0x30));
    client.load(CODE + 5, &mov_eax_from(DEVICE + 0x20));
    let status = client.run([
        Step::set_gpr(RAX, 0xcafe_babe),
        Step::write(DEVICE + 0x30, 4, 0xcafe_babe, 5),
    ]);
    assert_eq!(status, ExitStatus::FastMmio);
    let mmio = client.fast_mmio();
    assert_eq!(
        (mmio.gpa, mmio.value, mmio.size),
        (DEVICE + 0x30, 0xcafe_babe, 4)
    );
    assert_eq!(mmio.direction, FastMmioDirection::Write as u8);
    let status = client.run([Step::read(DEVICE + 0x20, 4, 0, 5)]);
    assert_eq!(status, ExitStatus::FastMmio);
    let mmio = client.fast_mmio();
    assert_eq!((mmio.gpa, mmio.size), (DEVICE + 0x20, 4));
    assert_eq!(mmio.direction, FastMmioDirection::Read as u8);
    client.set_io_buffer(8, &0x0102_0304u64.to_le_bytes());
    let status = client.run([Step::expect_gpr(RAX, 0x0102_0304)]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.regs().rip, CODE + 10);
    client.finish();
}

#[test]
fn an_unknown_instruction_on_mmio_does_not_kill_the_guest() {
    let client = Client::protected();
    // UD2 where the guest claims to have accessed a device.
    client.load(CODE, &[0x0f, 0x0b]);
    let status = client.run([Step::read(DEVICE, 4, 0, 2)]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.machine.take_received()[0].vector, 6);
    client.finish();
}

#[test]
fn strings_of_ports() {
    let client = Client::protected();
    client.load(0x6000, b"hello, world");
    client.load(CODE, &[0xf3, 0x6e]);
    client.change_regs(|state| {
        state.rcx = 12;
        state.rsi = 0x6000;
        state.rdx = 0x3f8;
    });
    let outs = StringIo {
        port: 0x3f8,
        size: 1,
        input: false,
        rep: true,
        linear: 0x6000,
        address_size: 2,
        segment: 3,
    };
    let mut seen = Vec::new();
    client
        .machine
        .script([Step::string_io(outs), Step::cpuid(0, 0)]);
    while client.run([]) == ExitStatus::Io {
        let io = client.tunnel().io();
        assert_eq!((io.port, io.size, io.direction), (0x3f8, 1, 0));
        assert_eq!(io.flags & IoFlags::STRING.bits(), IoFlags::STRING.bits());
        seen.extend_from_slice(&client.io_buffer()[..usize::from(io.count)]);
    }
    assert_eq!(seen, b"hello, world");
    let state = client.regs();
    assert_eq!((state.rsi, state.rip), (0x600c, CODE + 4));

    client.load(0x2000, &[0xf3, 0x6d]);
    client.change_regs(|state| {
        state.rcx = 3;
        state.rdi = 0x6100;
        state.rip = 0x2000;
    });
    let ins = StringIo {
        port: 0x1f0,
        size: 4,
        input: true,
        linear: 0x6100,
        segment: 0,
        ..outs
    };
    client.machine.script([Step::string_io(ins)]);
    let mut given = 1u32;
    while client.run([]) == ExitStatus::Io {
        let io = client.tunnel().io();
        assert_eq!((io.port, io.size, io.direction), (0x1f0, 4, 1));
        for n in 0..usize::from(io.count) {
            client.set_io_buffer(n * 4, &given.to_le_bytes());
            given += 1;
        }
    }
    assert_eq!(given, 4);
    assert_eq!(client.bytes(0x6100), [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
    client.finish();
}

#[test]
fn rom_reads_like_memory_and_writes_like_a_device() {
    let client = Client::protected();
    let rom = client.process.map(0x2000);
    client.process.poke(rom, &[0x77; 16]);
    client
        .vm
        .set_ram(0x40_0000, 0x2000, rom.0, ROM | STANDALONE)
        .unwrap();
    client.load(CODE, &mov_eax_to(0x40_0008));
    let status = client.run([
        Step::read(0x40_0000, 4, 0x7777_7777, 0),
        Step::set_gpr(RAX, 0x55),
        Step::write(0x40_0008, 4, 0x55, 5),
    ]);
    assert_eq!(status, ExitStatus::FastMmio);
    assert_eq!(
        (client.fast_mmio().gpa, client.fast_mmio().value),
        (0x40_0008, 0x55)
    );
    assert_eq!(client.run([]), ExitStatus::Interrupt);
    let mut bytes = [0; 16];
    client.process.peek(rom, &mut bytes);
    assert_eq!(bytes, [0x77; 16]);
    client.finish();
}

#[test]
fn a_remap_takes_effect() {
    let client = Client::protected();
    let first = client.process.map(0x1000);
    let second = client.process.map(0x1000);
    client.process.poke(first, &[1]);
    client.process.poke(second, &[2]);
    let gpa = 0x50_0000;
    client.vm.set_ram(gpa, 0x1000, first.0, STANDALONE).unwrap();
    client.run([Step::read(gpa, 1, 1, 2), Step::write(gpa + 8, 1, 9, 2)]);
    client
        .vm
        .set_ram(gpa, 0x1000, second.0, STANDALONE)
        .unwrap();
    client.run([Step::read(gpa, 1, 2, 2)]);
    client.vm.set_ram(gpa, 0x1000, 0, INVALID).unwrap();
    client.load(CODE + 6, &mov_eax_from(gpa));
    let status = client.run([Step::read(gpa, 4, 0, 5)]);
    assert_eq!(status, ExitStatus::FastMmio);
    client.finish();
}

#[test]
fn protected_pages_come_to_the_client() {
    let client = Client::protected();
    client.run([Step::write(0x8000, 4, 7, 2)]);
    client.vm.protect_ram(0x8000, 0x1000, 0).unwrap();
    let status = client.run([Step::write(0x8004, 4, 8, 2)]);
    assert_eq!(status, ExitStatus::PageFault);
    let fault = client.tunnel().pagefault();
    assert_eq!((fault.gpa, fault.flags & 7), (0x8000, 2));
    // Not yet allowed: again.
    assert_eq!(client.run([]), ExitStatus::PageFault);
    client.vm.protect_ram(0x8000, 0x1000, 7).unwrap();
    assert_eq!(
        client.run([Step::read(0x8004, 4, 8, 2)]),
        ExitStatus::Interrupt
    );
    assert_eq!(client.bytes::<1>(0x8004), [8]);
    client.finish();
}

#[test]
fn the_host_takes_pages_away() {
    let client = borrowing_client();
    let page = Hva(client.ram.0 + 0x9000);
    client.run([Step::write(0x9000, 4, 1, 2), Step::read(0xa000, 4, 0, 2)]);
    // Moved: contents stay.
    client.process.migrate(client.ram, 0x10000);
    client.run([Step::read(0x9000, 4, 1, 2), Step::write(0x9000, 4, 2, 2)]);
    assert_eq!(client.bytes::<1>(0x9000), [2]);
    // Discarded: zeros.
    client.process.discard(page, 0x1000);
    client.run([Step::read(0x9000, 4, 0, 2)]);
    // Write-protected and writable again.
    client.process.protect(page, 0x1000, false);
    client.run([Step::read(0x9000, 4, 0, 2)]);
    client.process.protect(page, 0x1000, true);
    client.run([Step::write(0x9000, 4, 3, 2), Step::read(0x9000, 4, 3, 2)]);
    // One large page, and small ones again.
    client.process.discard(client.ram, RAM_SIZE);
    client.finish();
}

#[test]
fn memory_that_is_gone_stops_the_vcpu_not_the_host() {
    let client = Client::protected();
    client.process.unmap(Hva(client.ram.0 + 0xb000), 0x1000);
    let status = client.run([Step::write(0xb000, 4, 1, 2)]);
    assert_eq!(status, ExitStatus::StateChange);
    client.finish();
}

#[test]
fn large_pages_are_mapped_as_such_and_split() {
    let machine = Machine::haswell();
    machine.pin_user_memory(false);
    let client = Client::new(&machine);
    client.protected_mode();
    let size = 8 << 20;
    let ram = client.process.map_with(size, 21);
    let gpa = 0x100_0000;
    client.vm.add_ram_block(ram, size).unwrap();
    client.vm.set_ram(gpa, size, ram.0, 0).unwrap();
    client.machine.reset_counts();
    client.run((0..512).map(|n| Step::write(gpa + n * 4096, 8, n, 2)));
    let violations = client.machine.counts().exits_of(48);
    assert_eq!(violations, 1, "one exit for 2 MB");
    // One 4 KB page of it goes: the others stay as they are.
    client.process.discard(Hva(ram.0 + 0x5000), 0x1000);
    client.run([
        Step::read(gpa + 0x5000, 8, 0, 2),
        Step::read(gpa + 0x6000, 8, 6, 2),
    ]);
    // And becomes whole again.
    client.process.collapse(ram);
    client.run([
        Step::read(gpa + 0x7000, 8, 7, 2),
        Step::write(gpa + 0x5000, 8, 1, 2),
    ]);
    client.finish();
}

/// Which leaves code may have depends on the processor's errata and on what the host wants done about
/// them. That code does not run from a large one where it must not the simulator sees to.
#[test]
fn code_has_small_leaves_where_it_needs_them() {
    let no_erratum = |mut profile: Profile| {
        *profile.msrs.entry(msr::IA32_ARCH_CAPABILITIES).or_default() |= 1 << 6;
        profile
    };
    for (profile, wanted, small) in [
        (Profile::haswell(), Mitigations::Needed, true),
        (Profile::haswell(), Mitigations::Off, false),
        (no_erratum(Profile::skylake_x()), Mitigations::Needed, false),
        (no_erratum(Profile::skylake_x()), Mitigations::All, true),
    ] {
        let machine = Machine::new(profile, 1);
        machine.set_mitigations(wanted);
        machine.pin_user_memory(false);
        let client = Client::new(&machine);
        client.protected_mode();
        let size = 2 << 20;
        let ram = client.process.map_with(size, 21);
        let gpa = 0x100_0000;
        client.vm.add_ram_block(ram, size).unwrap();
        client.vm.set_ram(gpa, size, ram.0, 0).unwrap();
        client.run([Step::write(gpa + 0x5000, 8, 1, 2)]);
        client.machine.reset_counts();
        client.run([Step::fetch(gpa + 0x3000), Step::read(gpa + 0x5000, 8, 1, 2)]);
        let violations = client.machine.counts().exits_of(48);
        assert_eq!(violations != 0, small, "{wanted:?}");
        client.finish();
    }
}

#[test]
fn a_fault_in_that_a_signal_interrupts_is_repeated() {
    let client = Client::protected();
    client.process.interrupt_fault_in(0);
    let status = client.run([Step::write(0xc000, 4, 1, 2)]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.run([]), ExitStatus::Interrupt);
    assert_eq!(client.bytes::<1>(0xc000), [1]);
    client.finish();
}

#[test]
fn delivery_through_a_fresh_page_is_repeated() {
    let client = Client::protected();
    client.change_regs(|state| state.rflags |= 0x200);
    client.vcpu.interrupt(0x55);
    // Delivering the vector touches the stack, which is not mapped yet.
    let status = client.run([Step::delivery_access(0x7ff8, Access::Write)]);
    assert_eq!(status, ExitStatus::Interrupt);
    let received = client.machine.take_received();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].vector, 0x55);
    client.finish();
}

/// And keeps its error code: #PF of a CMPXCHG that the core carries out for the guest, above what is mapped.
#[test]
fn a_repeated_exception_keeps_its_error_code() {
    const UNMAPPED: u64 = 0xd000_0000;
    let client = Client::new(&Machine::haswell());
    client.long_mode();
    // cmpxchg [rdi], ecx
    client.load(CODE, &[0x0f, 0xb1, 0x0f]);
    let status = client.run([
        Step::set_gpr(7, UNMAPPED),
        Step::write(UNMAPPED, 4, 0, 3),
        Step::delivery_access(0x7ff8, Access::Write),
        Step::output(1, 1, 1),
    ]);
    assert_eq!(status, ExitStatus::Io);
    let received = client.machine.take_received();
    assert_eq!(received.len(), 1);
    assert_eq!((received[0].vector, received[0].error_code), (14, Some(2)));
    assert_eq!(received[0].cr2, UNMAPPED);
    client.finish();
}

#[test]
fn a_guest_that_runs_loses_a_page_at_once() {
    let client = borrowing_client();
    let machine = client.machine.clone();
    let vcpu = client.vcpu.clone();
    let done = Arc::new(AtomicBool::new(false));
    let (send, receive) = std::sync::mpsc::channel();
    let guest_done = Arc::clone(&done);
    let thread = std::thread::spawn(move || {
        machine.script([
            Step::write(0xd000, 4, 1, 2),
            Step::act(move |_| send.send(()).unwrap()),
            // Stays in the guest until the host wants the processor.
            Step::act(move |guest| {
                while !guest.host_interrupt_waits() && !guest_done.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            }),
            // By now the page may be another one; the test program looks below.
            Step::write(0xd008, 4, 2, 2),
        ]);
        while machine.script_left() > 0 {
            vcpu.run().unwrap();
        }
        vcpu.run().unwrap();
    });
    receive.recv().unwrap();
    // Returns only when the guest cannot reach the old page any more; a use of
    // it afterwards, or a freed page still mapped, fails the test.
    client.process.discard(Hva(client.ram.0 + 0xd000), 0x1000);
    assert_eq!(client.bytes::<4>(0xd000), [0; 4]);
    done.store(true, Ordering::SeqCst);
    thread.join().unwrap();
    assert_eq!(client.bytes::<1>(0xd008), [2]);
    client.finish();
}

#[test]
fn pages_come_and_go_while_two_vcpus_run() {
    let client = Client::protected();
    let second = Vm::create_vcpu(&client.vm, 1).unwrap();
    second.set_regs(&client.regs()).unwrap();
    let threads: Vec<_> = [client.vcpu.clone(), second]
        .into_iter()
        .map(|vcpu| {
            let machine = client.machine.clone();
            std::thread::spawn(move || {
                for round in 0..40u64 {
                    machine
                        .script((0..16).map(|n| Step::write(0x1_0000 + n * 0x1000, 8, round, 2)));
                    while machine.script_left() > 0 {
                        vcpu.run().unwrap();
                    }
                    vcpu.run().unwrap();
                }
            })
        })
        .collect();
    let mut round = 0;
    while threads.iter().any(|thread| !thread.is_finished()) {
        let page = Hva(client.ram.0 + 0x1_0000 + (round % 16) * 0x1000);
        match round % 3 {
            0 => client.process.discard(page, 0x1000),
            1 => client.process.migrate(page, 0x2000),
            _ => client.vm.set_ram(0, RAM_SIZE, client.ram.0, 0).unwrap(),
        }
        round += 1;
        std::thread::yield_now();
    }
    for thread in threads {
        thread.join().unwrap();
    }
    client.finish();
}

#[test]
fn requests_that_make_no_sense_change_nothing() {
    let client = Client::protected();
    let ram = client.ram.0;
    for (gpa, size, va, flags) in [
        (0x123, 0x1000, ram, 0),
        (0, 0x123, ram, 0),
        (0, 0, ram, 0),
        (0, 0x1000, ram + 1, 0),
        (0, 0x1000, ram + RAM_SIZE, 0),
        (0, RAM_SIZE + 0x1000, ram, 0),
        (1 << 39, 0x1000, ram, 0),
        (u64::MAX - 0xfff, 0x2000, ram, 0),
        (0, 0x1000, ram, INVALID),
        (0, 0x1000, 0, INVALID | ROM),
        (0, 0x1000, ram, 2),
    ] {
        assert_eq!(
            client.vm.set_ram(gpa, size, va, flags),
            Err(Error::Invalid),
            "{gpa:#x} {size:#x} {va:#x} {flags:#x}"
        );
    }
    assert_eq!(
        client.run([Step::set_gpr(RCX, 1), Step::write(0, 4, 1, 2)]),
        ExitStatus::Interrupt
    );
    client.finish();
}

/// Page reclaim asks what the guest uses: the processor's own flags tell, and after they are cleared each
/// entry's INVEPT sees to it that the next use is noticed.
#[test]
fn the_host_hears_which_pages_the_guest_uses() {
    let client = borrowing_client();
    let page = |gpa: u64| Hva(client.ram.0 + gpa);
    let young = |gpa, aging| client.process.age(page(gpa), 0x1000, aging);
    client.run([Step::write(0x9000, 4, 1, 2), Step::read(0xa000, 4, 0, 2)]);
    assert!(young(0x9000, Aging::Look) && young(0xa000, Aging::ClearAndFlush));
    assert!(young(0x9000, Aging::Look) && !young(0xa000, Aging::Look));
    // The processor still has both translations.
    client.run([Step::read(0xa000, 4, 0, 2)]);
    assert!(young(0xa000, Aging::Look));
    assert!(!young(0xb000, Aging::ClearAndFlush));
    // Without a flush it uses what it has cached unnoticed.
    assert!(young(0xa000, Aging::Clear));
    client.run([Step::read(0xa000, 4, 0, 2)]);
    assert!(!young(0xa000, Aging::ClearAndFlush));
    client.finish();
}
