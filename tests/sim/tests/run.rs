//! The run loop: each exit, injection, and what the client sees.

use abi::debug::VcpuDebug;
use abi::tunnel::{ExitStatus, IoDirection, offset};
use sim::client::{CODE, Client};
use sim::{Machine, Profile, Step};
use vmx::Error;
use vmx::arch::addr::Hva;
use vmx::arch::reg::gpr::{RAX, RBX, RCX, RDX};

#[test]
fn a_fresh_vcpu_enters_on_every_model_with_unrestricted_guest() {
    for profile in Profile::working() {
        let name = profile.name;
        let machine = Machine::new(profile, 2);
        let client = Client::new(&machine);
        let status = client.run([]);
        if machine.profile().allows_secondary(7) {
            assert_eq!(status, ExitStatus::Interrupt, "{name}");
        } else {
            assert_eq!(status, ExitStatus::RealMode, "{name}");
            client.protected_mode();
            // CR0.PG is still clear, which this processor cannot run.
            assert_eq!(client.run([]), ExitStatus::RealMode, "{name}");
            client.long_mode();
            assert_eq!(client.run([]), ExitStatus::Interrupt, "{name}");
        }
        client.finish();
    }
}

#[test]
fn every_mode_enters() {
    let client = Client::new(&Machine::haswell());
    for mode in [Client::real_mode, Client::protected_mode, Client::long_mode] {
        mode(&client);
        assert_eq!(client.run([]), ExitStatus::Interrupt);
    }
    client.finish();
}

#[test]
fn cpuid_stays_in_the_kernel() {
    let client = Client::protected();
    let status = client.run([
        Step::set_gpr(RAX, u64::MAX),
        Step::cpuid(0, 0),
        Step::expect_gpr(RBX, 0x756e_6547),
        Step::expect_gpr(RDX, 0x4965_6e69),
        Step::expect_gpr(RCX, 0x6c65_746e),
        Step::cpuid(1, 0),
        Step::act(|guest| {
            assert_eq!(guest.regs.gpr[RCX] >> 5 & 1, 0, "no VMX for the guest");
            assert_eq!(guest.rip(), CODE + 4);
        }),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.machine.counts().exits_of(10), 2);
    client.finish();
}

#[test]
fn out_hands_the_value_to_the_client() {
    let client = Client::protected();
    for (size, bytes) in [
        (1, vec![0x44]),
        (2, vec![0x44, 0x33]),
        (4, vec![0x44, 0x33, 0x22, 0x11]),
    ] {
        let status = client.run([Step::output(0x3f8, size, 0x1122_3344)]);
        assert_eq!(status, ExitStatus::Io);
        let io = client.tunnel().io();
        assert_eq!(io.direction, IoDirection::Out as u8);
        assert_eq!((io.port, io.size, io.count), (0x3f8, u16::from(size), 1));
        assert_eq!(client.io_buffer()[..usize::from(size)], bytes);
    }
    assert_eq!(client.regs().rip, CODE + 3);
    client.finish();
}

#[test]
fn in_takes_the_value_from_the_client() {
    for (size, expect) in [
        (1, 0xffff_ffff_ffff_ff44),
        (2, 0xffff_ffff_ffff_3344),
        (4, 0x1122_3344),
    ] {
        let client = Client::protected();
        let status = client.run([Step::set_gpr(RAX, u64::MAX), Step::input(0x60, size)]);
        assert_eq!(status, ExitStatus::Io);
        let io = client.tunnel().io();
        assert_eq!(
            (io.direction, io.port, io.size),
            (IoDirection::In as u8, 0x60, u16::from(size))
        );
        client.set_io_buffer(0, &0x1122_3344u32.to_le_bytes());
        let status = client.run([Step::expect_gpr(RAX, expect)]);
        assert_eq!(status, ExitStatus::Interrupt);
        assert_eq!(client.machine.script_left(), 0);
        client.finish();
    }
}

#[test]
fn hlt_goes_to_the_client_unless_an_interrupt_waits() {
    let client = Client::protected();
    client.change_regs(|state| state.rflags |= 0x200);
    assert_eq!(client.run([Step::hlt()]), ExitStatus::Hlt);
    assert_eq!(client.regs().rip, CODE + 1);
    assert_eq!(client.tunnel().ready_for_interrupt_injection, 1);
    client.vcpu.interrupt(0x30);
    assert_eq!(client.run([]), ExitStatus::Interrupt);
    let received = client.machine.take_received();
    assert_eq!(received.len(), 1);
    assert_eq!((received[0].vector, received[0].kind), (0x30, 0));
    // One that comes with the HLT is not lost.
    let vcpu = client.vcpu.clone();
    let status = client.run([Step::hlt().with(move || vcpu.interrupt(0x31))]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.machine.take_received()[0].vector, 0x31);
    client.finish();
}

#[test]
fn interrupts_wait_for_the_window() {
    let client = Client::protected();
    // IF is clear: the vector waits, and comes as soon as STI's shadow ends.
    client.vcpu.interrupt(0x40);
    let status = client.run([
        Step::cpuid(0, 0),
        Step::act(|guest| assert_eq!(guest.field(0x4002) >> 2 & 1, 1, "window asked for")),
        Step::set_if(true),
        Step::act(|guest| assert_eq!(guest.field(0x4824) & 1, 1)),
        Step::cpuid(0, 0),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    let received = client.machine.take_received();
    assert_eq!(
        received.iter().map(|e| e.vector).collect::<Vec<_>>(),
        [0x40]
    );
    // The highest vector first, each once.
    for vector in [0x51, 0x61, 0x51] {
        client.vcpu.interrupt(vector);
    }
    assert_eq!(
        client.run([Step::cpuid(0, 0), Step::cpuid(0, 0)]),
        ExitStatus::Interrupt
    );
    let received = client.machine.take_received();
    assert_eq!(
        received.iter().map(|e| e.vector).collect::<Vec<_>>(),
        [0x61, 0x51]
    );
    client.finish();
}

#[test]
fn the_client_can_ask_for_the_window() {
    let client = Client::protected();
    client.set_tunnel(offset::REQUEST_INTERRUPT_WINDOW, 1);
    let status = client.run([
        Step::cpuid(0, 0),
        Step::set_if(true),
        Step::cpuid(0, 0),
        Step::output(1, 1, 1),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.tunnel().exit_reason, 7);
    assert_eq!(client.tunnel().ready_for_interrupt_injection, 1);
    assert_eq!(client.machine.script_left(), 1);
    client.set_tunnel(offset::REQUEST_INTERRUPT_WINDOW, 0);
    assert_eq!(client.run([]), ExitStatus::Io);
    client.finish();
}

/// Also when the RUN before left nothing to do.
#[test]
fn a_window_asked_for_later_opens_too() {
    let client = Client::protected();
    let status = client.run([Step::cpuid(0, 0), Step::output(1, 1, 1)]);
    assert_eq!(status, ExitStatus::Io);
    client.set_tunnel(offset::REQUEST_INTERRUPT_WINDOW, 1);
    let status = client.run([
        Step::cpuid(0, 0),
        Step::set_if(true),
        Step::cpuid(0, 0),
        Step::output(1, 1, 1),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.tunnel().exit_reason, 7);
    assert_eq!(client.machine.script_left(), 1);
    client.finish();
}

/// The client's thread is in RUN, another of its threads sets the word: an exit later RUN ends.
#[test]
fn a_user_event_ends_run_at_the_next_exit() {
    let client = Client::protected();
    let process = client.process.clone();
    let word = Hva(client.vcpu.tunnel_info().va + offset::USER_EVENT_PENDING as u64);
    let status = client.run([
        Step::new("another thread", 1, move |_| {
            process.poke(word, &1_u32.to_le_bytes());
            Ok(())
        }),
        Step::cpuid(0, 0),
        Step::cpuid(0, 0),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.machine.script_left(), 1);
    client.finish();
}

/// A guest that exits all the time and is never interrupted does not keep the processor.
#[test]
fn the_processor_is_given_back_after_many_exits() {
    let client = Client::protected();
    client.machine.reset_counts();
    client.run((0..5000).map(|_| Step::cpuid(0, 0)));
    assert_eq!(client.machine.script_left(), 0);
    let counts = client.machine.counts();
    assert_eq!((counts.xsave, counts.exits_of(10)), (2, 5000));
    client.finish();
}

#[test]
fn a_vector_that_the_task_priority_holds_back_is_no_reason_to_spin() {
    let client = Client::protected();
    client.change_regs(|state| state.rflags |= 0x200);
    assert_eq!(
        client.run([Step::mov_to_cr(8, RAX, 8)]),
        ExitStatus::Interrupt
    );
    client.vcpu.interrupt(0x41);
    client.set_tunnel(offset::REQUEST_INTERRUPT_WINDOW, 1);
    client.machine.reset_counts();
    assert_eq!(client.run([]), ExitStatus::Interrupt);
    assert_eq!(client.tunnel().exit_reason, 7);
    assert_eq!(client.machine.counts().exits_total(), 1);
    client.set_tunnel(offset::REQUEST_INTERRUPT_WINDOW, 0);
    client.run([Step::cpuid(0, 0)]);
    assert!(client.machine.take_received().is_empty());
    // Lowering the priority lets it through.
    client.run([Step::mov_to_cr(8, RAX, 3), Step::cpuid(0, 0)]);
    assert_eq!(client.machine.take_received()[0].vector, 0x41);
    client.finish();
}

#[test]
fn msrs_of_the_guest() {
    let client = Client::protected();
    let status = client.run([
        // Handled: PAT, EFER, APIC base.
        Step::rdmsr(0x277),
        Step::expect_gpr(RAX, 0x0007_0406),
        Step::wrmsr(0x277, 0x0606_0606_0606_0606),
        Step::rdmsr(0x277),
        Step::expect_gpr(RDX, 0x0606_0606),
        Step::act(|guest| assert_eq!(guest.field(0x2804), 0x0606_0606_0606_0606, "in force")),
        // Reserved bits, unknown register: #GP(0).
        Step::wrmsr(0x277, 2),
        Step::rdmsr(0x4000_1234),
        Step::wrmsr(0x4000_1234, 1),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    let received = client.machine.take_received();
    assert_eq!(received.len(), 3);
    for event in received {
        assert_eq!(
            (event.vector, event.kind, event.error_code),
            (13, 3, Some(0))
        );
        assert!(event.injected);
    }
    assert_eq!(client.msr(0x277), Some(0x0606_0606_0606_0606));
    client.finish();
}

#[test]
fn syscall_msrs_are_the_guests_own() {
    let client = Client::new(&Machine::haswell());
    client.long_mode();
    for (number, value) in [
        (0xc000_0081, 0x0012_0034_0000_0000),
        (0xc000_0082, 0xffff_8000_0000_1234),
        (0xc000_0084, 0x200),
        (0xc000_0102, 0xffff_8000_1111_0000),
        (0x175, 0xffff_8000_0000_5000),
        (0xc000_0100, 0x7f00_0000_0000),
    ] {
        client.set_msr(number, value);
        assert_eq!(client.msr(number), Some(value), "{number:#x}");
        let status = client.run([
            Step::rdmsr(number),
            Step::act(move |guest| {
                let seen = guest.regs.gpr[RDX] << 32 | guest.regs.gpr[RAX];
                assert_eq!(seen, value, "MSR {number:#x}");
            }),
            Step::wrmsr(number, value ^ 0x100),
        ]);
        assert_eq!(status, ExitStatus::Interrupt);
        assert_eq!(client.msr(number), Some(value ^ 0x100), "{number:#x}");
    }
    client.finish();
}

#[test]
fn control_registers() {
    let client = Client::protected();
    let status = client.run([
        // CD is the guest's to see, caching the host's affair.
        Step::mov_to_cr(0, RBX, 0x4000_0011),
        Step::mov_from_cr(0, RAX),
        Step::expect_gpr(RAX, 0x4000_0011),
        Step::act(|guest| assert_eq!(guest.field(0x6800) & 0x4000_0000, 0, "CR0 in force")),
        Step::mov_to_cr(0, RBX, 0x11),
        Step::mov_from_cr(0, RAX),
        Step::act(|guest| assert_eq!(guest.regs.gpr[RAX] & 0x8000_0001, 1)),
        // TS on and off again, by CLTS and LMSW.
        Step::mov_to_cr(0, RBX, 0x19),
        Step::mov_from_cr(0, RAX),
        Step::expect_gpr(RAX, 0x19),
        Step::clts(),
        Step::mov_from_cr(0, RAX),
        Step::expect_gpr(RAX, 0x11),
        Step::lmsw(0xb),
        Step::mov_from_cr(0, RAX),
        Step::expect_gpr(RAX, 0x1b),
        Step::lmsw(0),
        Step::mov_from_cr(0, RAX),
        Step::expect_gpr(RAX, 0x11),
        // CR4: VMXE stays hidden.
        Step::mov_to_cr(4, RCX, 0x600),
        Step::mov_from_cr(4, RAX),
        Step::expect_gpr(RAX, 0x600),
        // Paging without protection: #GP. Reserved bits: #GP.
        Step::mov_to_cr(0, RBX, 0x8000_0010),
        Step::mov_to_cr(4, RBX, 1 << 31),
        Step::mov_from_cr(3, RDX),
        Step::mov_to_cr(3, RDX, 0x5000),
        Step::mov_from_cr(3, RAX),
        Step::expect_gpr(RAX, 0x5000),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.machine.script_left(), 0);
    let received = client.machine.take_received();
    assert_eq!(
        received
            .iter()
            .map(|e| (e.vector, e.error_code))
            .collect::<Vec<_>>(),
        [(13, Some(0)), (13, Some(0))]
    );
    let state = client.regs();
    assert_eq!((state.cr0, state.cr3, state.cr4), (0x11, 0x5000, 0x600));
    client.finish();
}

#[test]
fn debug_registers_are_the_guests_own() {
    let client = Client::protected();
    for cpu in 0..2 {
        client.machine.set_dr(cpu, 7, 0x455);
    }
    let status = client.run([
        Step::mov_to_dr(0, RAX, 0xabc0),
        Step::mov_to_dr(7, RAX, 0x402),
        Step::mov_from_dr(0, RBX),
        Step::expect_gpr(RBX, 0xabc0),
        Step::mov_from_dr(7, RBX),
        Step::expect_gpr(RBX, 0x402),
        Step::act(|guest| assert_eq!(guest.dr(0), 0xabc0, "in force while the guest runs")),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    assert_eq!(client.machine.script_left(), 0);
    let state = client.regs();
    assert_eq!((state.dr0, state.dr7), (0xabc0, 0x402));
    client.finish();
}

#[test]
fn instructions_that_do_not_exist_for_the_guest() {
    let client = Client::protected();
    // GETSEC, RSM, VMCALL, the VMX instructions.
    for reason in [11, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 50, 53] {
        assert_eq!(
            client.run([Step::exits(reason, 0, 3)]),
            ExitStatus::Interrupt
        );
        let received = client.machine.take_received();
        assert_eq!(received.len(), 1, "exit reason {reason}");
        assert_eq!(
            (received[0].vector, received[0].error_code),
            (6, None),
            "exit reason {reason}"
        );
    }
    client.finish();
}

#[test]
fn instructions_that_do_nothing() {
    let client = Client::protected();
    // INVD, WBINVD, PAUSE: past the instruction, no event.
    for reason in [13, 54, 40] {
        let rip = client.regs().rip;
        assert_eq!(
            client.run([Step::exits(reason, 0, 2)]),
            ExitStatus::Interrupt
        );
        assert_eq!(client.machine.take_received(), [], "exit reason {reason}");
        assert_eq!(client.regs().rip, rip + 2, "exit reason {reason}");
    }
    client.finish();
}

#[test]
fn xsetbv_checks_its_value() {
    let client = Client::protected();
    let xsetbv = |index: u64, value: u64| {
        Step::new("XSETBV", 3, move |guest| {
            guest.regs.gpr[RCX] = index;
            guest.regs.gpr[RAX] = value & 0xffff_ffff;
            guest.regs.gpr[RDX] = value >> 32;
            Err(guest.exit_now(55, 0))
        })
    };
    let status = client.run([
        Step::mov_to_cr(4, RBX, 1 << 18),
        xsetbv(0, 7),
        Step::act(|guest| assert_eq!(guest.xcr0(), 7)),
        xsetbv(0, 3),
        Step::act(|guest| assert_eq!(guest.xcr0(), 3)),
        xsetbv(0, 5),
        xsetbv(0, 2),
        xsetbv(1, 1),
        xsetbv(0, 1 << 63 | 3),
    ]);
    assert_eq!(status, ExitStatus::Interrupt);
    let vectors: Vec<u8> = client
        .machine
        .take_received()
        .iter()
        .map(|e| e.vector)
        .collect();
    assert_eq!(vectors, [13; 4]);
    client.finish();
}

#[test]
fn extended_registers_are_switched_whole() {
    let client = Client::protected();
    let other = Client::new(&client.machine);
    other.protected_mode();
    client.run([Step::act(|guest| {
        assert_eq!(guest.xmm(3), 0, "nothing of the host's");
        assert_eq!(guest.ymm_high(3), 0, "nothing of the host's");
        guest.set_xmm(3, 0x1111);
        guest.set_ymm_high(3, 0x2222);
    })]);
    other.run([Step::act(|guest| {
        assert_eq!(guest.xmm(3), 0);
        assert_eq!(guest.ymm_high(3), 0);
        guest.set_xmm(3, 0x3333);
    })]);
    client.run([Step::act(|guest| {
        assert_eq!(guest.xmm(3), 0x1111);
        assert_eq!(guest.ymm_high(3), 0x2222);
    })]);
    assert_eq!(client.vcpu.fpu().mmx_1[3][..2], [0x11, 0x11]);
    let mut image = client.vcpu.fpu();
    image.mmx_1[3] = 0x4444u128.to_le_bytes();
    image.mxcsr = u32::MAX;
    client.vcpu.set_fpu(&image);
    client.run([Step::act(|guest| assert_eq!(guest.xmm(3), 0x4444))]);
    let Client {
        vcpu,
        vm,
        hypervisor,
        ..
    } = other;
    drop((vcpu, vm, hypervisor));
    client.finish();
}

/// RF is set in the frame of a fault, whoever finds it: a handler that looks for breakpoints would
/// meet one on the same instruction again. A trap's frame has it as it was.
#[test]
fn a_fault_sets_rf_in_its_frame() {
    for (step, rf) in [
        (Step::rdmsr(0x1234_5678), true),
        (Step::exits(18, 0, 3), true),
        (Step::exception(17, Some(0), 0), true),
        (Step::exception(1, None, 0x4000), false),
    ] {
        let client = Client::protected();
        client.run([step, Step::hlt()]);
        let received = client.machine.take_received();
        assert_eq!(received.len(), 1);
        assert!(received[0].injected);
        assert_eq!(received[0].resume_flag, rf, "vector {}", received[0].vector);
        assert_eq!(client.regs().rflags >> 16 & 1, 0, "in the handler");
        client.finish();
    }
}

#[test]
fn exceptions_that_exit_go_back_to_the_guest() {
    let client = Client::protected();
    // #DB and #AC always exit; both reach the guest.
    let status = client.run([Step::exception(1, None, 0x4001), Step::act(|_| {})]);
    assert_eq!(status, ExitStatus::Interrupt);
    let received = client.machine.take_received();
    assert_eq!(received[0].vector, 1);
    assert!(received[0].injected);
    assert_eq!(client.regs().dr6 & 0x4001, 0x4001);
    let client = Client::protected();
    client.run([Step::exception(17, Some(0), 0)]);
    let received = client.machine.take_received();
    assert_eq!((received[0].vector, received[0].error_code), (17, Some(0)));
    // #PF does not exit, and CR2 is the guest's from then on.
    client.run([Step::exception(14, Some(2), 0xabcd)]);
    let received = client.machine.take_received();
    assert_eq!((received[0].vector, received[0].injected), (14, false));
    assert_eq!(client.regs().cr2, 0xabcd);
    client.run([Step::act(|guest| assert_eq!(guest.cr2(), 0xabcd))]);
    client.finish();
}

#[test]
fn cr2_is_the_guests_own() {
    let client = Client::protected();
    // The host's is 0xdead0000.
    client.run([Step::act(|guest| assert_eq!(guest.cr2(), 0))]);
    client.change_regs(|state| state.cr2 = 0x1234_5678);
    client.run([Step::act(|guest| assert_eq!(guest.cr2(), 0x1234_5678))]);
    assert_eq!(client.regs().cr2, 0x1234_5678);
    client.finish();
}

#[test]
fn a_debugger_sees_breakpoints_and_steps() {
    let client = Client::protected();
    let enable = |control| VcpuDebug {
        control,
        ..VcpuDebug::default()
    };
    client.vcpu.set_debug(&enable(1 | 4)).unwrap();
    assert_eq!(client.run([Step::exception(3, None, 0)]), ExitStatus::Debug);
    assert_eq!(client.tunnel().debug().rip, CODE);
    client.vcpu.set_debug(&enable(1 | 2)).unwrap();
    client.change_regs(|state| state.rip = 0x2000);
    assert_eq!(
        client.run([Step::new("NOP", 1, |_| Ok(()))]),
        ExitStatus::Debug
    );
    assert_eq!(client.tunnel().debug().rip, 0x2001);
    // An instruction executed by the hypervisor is a step too.
    assert_eq!(client.run([Step::cpuid(0, 0)]), ExitStatus::Debug);
    assert_eq!(client.tunnel().debug().rip, 0x2003);
    client.vcpu.set_debug(&enable(0)).unwrap();
    assert_eq!(
        client.run([Step::new("NOP", 1, |_| Ok(()))]),
        ExitStatus::Interrupt
    );
    client.finish();
}

#[test]
fn a_triple_fault_stops_the_vcpu_for_good() {
    let client = Client::protected();
    assert_eq!(client.run([Step::triple_fault()]), ExitStatus::StateChange);
    let launches = client.machine.counts();
    assert_eq!(client.run([]), ExitStatus::StateChange);
    assert_eq!(client.machine.counts().vmresume, launches.vmresume);
    client.finish();
}

#[test]
fn a_refused_entry_is_an_error_and_stops_the_vcpu() {
    let client = Client::protected();
    // RFLAGS.VM with a real-mode CS: not a state an entry takes.
    client.change_regs(|state| state.tr.base = 0x8000_0000_0000);
    assert_eq!(client.run_fails([]), Error::Invalid);
    assert_eq!(client.tunnel().status(), Some(ExitStatus::Unknown));
    assert_eq!(client.machine.entry_failures().len(), 1);
    assert_eq!(client.run([]), ExitStatus::StateChange);
    client.finish();
}

#[test]
fn an_exit_costs_few_vmcs_accesses() {
    let client = Client::protected();
    client.run([Step::cpuid(0, 0)]);
    client.machine.reset_counts();
    client.run((0..1000).map(|_| Step::cpuid(0, 0)));
    let counts = client.machine.counts();
    assert_eq!(counts.exits_of(10), 1000);
    assert_eq!(counts.vmlaunch, 0);
    assert_eq!(counts.vmptrld, 0);
    assert_eq!(counts.invept, 0);
    println!("VMREAD {} VMWRITE {}", counts.vmread, counts.vmwrite);
    assert!(counts.vmread < 7_000, "{} VMREADs", counts.vmread);
    assert!(counts.vmwrite < 2_000, "{} VMWRITEs", counts.vmwrite);
}
