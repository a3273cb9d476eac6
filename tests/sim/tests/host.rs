//! The simulated host: what it lends, and what it finds when that is misused.
// UNSAFETY: uses the host seam as the core does.
#![expect(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use sim::fault;
use sim::{Machine, Profile, SimHost, SimMutex, SimSpin};
use vmx::arch::addr::Hva;
use vmx::cpu::Cpu;
use vmx::host::{
    Aging, CpuOffline, Host, HostPage, InterruptsOff, Invalidate, OwnedPage, Pinned, SharedPage,
    UserFault, UserSpace,
};
use vmx::sync::{Lock, LockClass};

fn found(machine: &Machine, text: &str) {
    let findings = machine.take_findings();
    assert!(
        findings.iter().any(|f| f.contains(text)),
        "{text:?} is not in {findings:?}"
    );
}

fn clean(machine: &Machine) {
    assert_eq!(machine.findings(), Vec::<String>::new());
}

#[test]
fn pages_are_counted_and_poisoned() {
    let machine = Machine::haswell();
    let host = machine.host();
    let page = OwnedPage::new(&host).unwrap();
    assert_eq!(machine.in_use().0, 1);
    let copy = HostPage {
        address: NonNull::new(page.pointer()).unwrap(),
        physical: page.physical(),
    };
    let pointer = page.pointer();
    drop(page);
    assert_eq!(machine.in_use().0, 0);
    machine.assert_clean();
    // SAFETY: the simulated host keeps freed pages readable.
    assert_eq!(unsafe { pointer.read() }, 0xdb);
    // SAFETY: not; that is the point.
    unsafe { host.free_page(copy) };
    found(&machine, "which is not an allocated page");
}

#[test]
#[should_panic(expected = "written after they were freed")]
fn a_write_after_free_is_found() {
    let machine = Machine::haswell();
    let host = machine.host();
    let page = OwnedPage::new(&host).unwrap();
    let pointer = page.pointer();
    drop(page);
    // SAFETY: the simulated host keeps freed pages mapped.
    unsafe { pointer.write(1) };
    drop(host);
    drop(machine);
}

#[test]
#[should_panic(expected = "host pages not given back")]
fn a_leak_is_found() {
    let machine = Machine::haswell();
    let _page = machine.host().alloc_page().unwrap();
    machine.assert_clean();
}

#[test]
#[should_panic(expected = "preempt_on without preempt_off")]
fn findings_fail_the_test_in_the_end() {
    let machine = Machine::haswell();
    // SAFETY: not paired; that is the point.
    unsafe { machine.host().preempt_on() };
}

#[test]
fn sleeping_where_a_kernel_cannot() {
    let machine = Machine::haswell();
    let host = machine.host();
    let user = host.user_space().unwrap();
    let at = machine.process().map(4096);
    let mutex: Lock<SimMutex, ()> = Lock::new(LockClass::Vm, ()).unwrap();
    let spin: Lock<SimSpin, ()> = Lock::new(LockClass::Ept, ()).unwrap();
    let sleepers: [(&str, &dyn Fn()); 5] = [
        ("alloc_page", &|| drop(OwnedPage::new(&host))),
        ("fault_in", &|| _ = user.fault_in(at, true, 0)),
        ("read of user", &|| _ = user.read(at, &mut [0])),
        ("sleeping lock", &|| drop(mutex.lock())),
        ("user_space", &|| drop(host.user_space())),
    ];
    for (what, sleep) in sleepers {
        sleep();
        clean(&machine);
        let pinned = Pinned::new(&host);
        sleep();
        found(&machine, what);
        drop(pinned);
        let off = InterruptsOff::new(&host);
        sleep();
        found(&machine, what);
        drop(off);
        let guard = spin.lock();
        sleep();
        found(&machine, what);
        drop(guard);
    }
}

#[test]
fn locks_have_an_order() {
    let machine = Machine::haswell();
    let host = machine.host();
    let vm: Lock<SimMutex, ()> = Lock::new(LockClass::Vm, ()).unwrap();
    let vcpu: Lock<SimMutex, ()> = Lock::new(LockClass::Vcpu, ()).unwrap();
    let spin: Lock<SimSpin, ()> = Lock::new(LockClass::Ept, ()).unwrap();
    {
        let _a = vcpu.lock();
        let _b = vm.lock();
        let _c = spin.lock();
    }
    clean(&machine);
    {
        let _b = vm.lock();
        let _a = vcpu.lock();
    }
    found(&machine, "lock order: Vcpu taken while Vm is held");
    host.run_on(0, &|| drop(spin.lock())).unwrap();
    found(&machine, "Ept taken in an interrupt");
    assert_eq!(machine.in_use().2, 3);
}

#[test]
fn a_lock_excludes() {
    let machine = Machine::new(Profile::haswell(), 4);
    let _host = machine.host();
    let counter: Lock<SimSpin, u64> = Lock::new(LockClass::Ept, 0).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let mut value = counter.lock();
                    let seen = *value;
                    std::hint::black_box(&seen);
                    *value = seen + 1;
                }
            });
        }
    });
    assert_eq!(*counter.lock(), 2000);
}

#[test]
fn pinned_threads_have_processors_of_their_own() {
    let machine = Machine::new(Profile::haswell(), 3);
    let owners: [AtomicUsize; 3] = Default::default();
    std::thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                let host = machine.host();
                for _ in 0..200 {
                    let pinned = Pinned::new(&host);
                    let cpu = pinned.cpu_number();
                    assert_eq!(owners[cpu].fetch_add(1, Ordering::SeqCst), 0);
                    assert_eq!(host.current_cpu(), cpu);
                    owners[cpu].fetch_sub(1, Ordering::SeqCst);
                }
            });
        }
    });
}

#[test]
fn calls_run_on_the_processor_asked_for() {
    let machine = Machine::new(Profile::haswell(), 4);
    let host = machine.host();
    let calls = AtomicU64::new(0);
    for cpu in 0..4 {
        host.run_on(cpu, &|| {
            assert_eq!(host.current_cpu(), cpu);
            // Per-processor registers, and interrupts masked.
            let gs = machine.msr(cpu, 0xc000_0101).unwrap();
            // SAFETY: the processor is simulated.
            assert_eq!(unsafe { host.cpu().rdmsr(0xc000_0101) }, gs);
            calls.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
    }
    host.run_on_all(&|| {
        calls.fetch_add(1 << (8 + host.current_cpu() * 8), Ordering::SeqCst);
    });
    assert_eq!(calls.load(Ordering::SeqCst), 0x1_0101_0104);
    machine.set_online(2, false);
    assert_eq!(host.run_on(2, &|| {}), Err(CpuOffline));
    assert_eq!(host.run_on(9, &|| {}), Err(CpuOffline));
    let off = InterruptsOff::new(&host);
    host.run_on(host.current_cpu(), &|| {}).unwrap();
    found(&machine, "run_on with interrupts masked");
    drop(off);
}

/// Threads that are pinned interrupt each other all the time.
#[test]
fn calls_between_pinned_threads_do_not_deadlock() {
    let machine = Machine::new(Profile::haswell(), 3);
    let calls = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let host: SimHost = machine.host();
                for n in 0..50 {
                    let _pinned = Pinned::new(&host);
                    host.run_on(n % 3, &|| {
                        calls.fetch_add(1, Ordering::SeqCst);
                    })
                    .unwrap();
                }
            });
        }
    });
    assert_eq!(calls.load(Ordering::SeqCst), 200);
}

#[test]
fn the_hosts_registers_must_come_back() {
    let machine = Machine::haswell();
    let host = machine.host();
    let cpu = host.cpu();
    let tests: [(&str, &dyn Fn()); 4] = [
        // SAFETY: the processor is simulated.
        ("DR7", &|| unsafe {
            cpu.set_dr(7, 0x402);
        }),
        // SAFETY: the processor is simulated.
        ("IA32_KERNEL_GSBASE", &|| unsafe {
            cpu.wrmsr(0xc000_0102, 0x1000);
        }),
        // SAFETY: the processor is simulated.
        ("IA32_PAT", &|| unsafe {
            cpu.wrmsr(0x277, 0);
        }),
        // SAFETY: the processor is simulated.
        ("XCR0", &|| unsafe {
            cpu.set_xcr0(1);
        }),
    ];
    for (name, change) in tests {
        let pinned = Pinned::new(&host);
        change();
        clean(&machine);
        drop(pinned);
        found(&machine, &format!("the host's {name} changed"));
    }
    // SAFETY: the processor is simulated.
    unsafe { cpu.wrmsr(0x277, 0) };
    found(&machine, "WRMSR while not pinned");
}

#[repr(align(64))]
struct Area([u8; 832]);

#[test]
fn extended_registers_belong_to_the_host() {
    let machine = Machine::haswell();
    let host = machine.host();
    let mut area = Area([0; 832]);
    host.fpu_begin();
    // SAFETY: aligned and large enough.
    unsafe { host.cpu().xsave(area.0.as_mut_ptr(), 7) };
    assert_eq!(area.0[512], 7);
    assert!(area.0[160..176].iter().all(|b| (0x40..0x42).contains(b)));
    area.0[160] = 0x99;
    // SAFETY: aligned, large enough, an image from XSAVE.
    unsafe { host.cpu().xrstor(area.0.as_ptr(), 7) };
    let mut again = Area([0; 832]);
    // SAFETY: aligned and large enough.
    unsafe { host.cpu().xsave(again.0.as_mut_ptr(), 7) };
    assert_eq!(again.0[160], 0x99);
    // A component not in XSTATE_BV comes back at its reset value.
    area.0[512] = 3;
    // SAFETY: aligned, large enough, an image from XSAVE.
    unsafe { host.cpu().xrstor(area.0.as_ptr(), 7) };
    // SAFETY: aligned and large enough.
    unsafe { host.cpu().xsave(again.0.as_mut_ptr(), 7) };
    assert_eq!(again.0[576..832], [0; 256]);
    clean(&machine);
    for (at, value, text) in [
        (512, 0x80, "XSTATE_BV"),
        (520, 1, "XCOMP_BV"),
        (27, 1, "MXCSR"),
    ] {
        let mut bad = Area(again.0);
        bad.0[at] |= value;
        // SAFETY: aligned and large enough.
        unsafe { host.cpu().xrstor(bad.0.as_ptr(), 7) };
        found(&machine, text);
    }
    // SAFETY: pairs with `fpu_begin`.
    unsafe { host.fpu_end() };
    host.fpu_begin();
    // SAFETY: aligned and large enough.
    unsafe { host.cpu().xsave(again.0.as_mut_ptr(), 7) };
    assert_ne!(again.0[160], 0x99, "the host's registers are back");
    // SAFETY: the processor is simulated.
    unsafe { host.cpu().set_xcr0(3) };
    // SAFETY: pairs with `fpu_begin`.
    unsafe { host.fpu_end() };
    found(&machine, "fpu_end with XCR0 0x3");
    // SAFETY: not paired; that is the point.
    unsafe { host.fpu_end() };
    let _ = machine.take_findings();
}

#[derive(Default)]
struct Heard {
    begins: AtomicU64,
    ends: AtomicU64,
    last: AtomicU64,
}

impl Invalidate for Heard {
    fn begin(&self, start: Hva, _end: Hva) {
        self.begins.fetch_add(1, Ordering::SeqCst);
        self.last.store(start.0, Ordering::SeqCst);
    }
    fn end(&self, _start: Hva, _end: Hva) {
        self.ends.fetch_add(1, Ordering::SeqCst);
    }
    fn young(&self, _start: Hva, _end: Hva, _aging: Aging) -> bool {
        true
    }
}

#[test]
fn every_change_of_a_process_is_announced() {
    let machine = Machine::haswell();
    let user = machine.host().user_space().unwrap();
    let process = machine.process();
    let heard = Heard::default();
    let target: NonNull<dyn Invalidate> = NonNull::from(&heard);
    // SAFETY: `heard` outlives `unwatch` below.
    unsafe { user.watch(target) }.unwrap();
    let at = process.map(0x4000);
    let reports = || heard.begins.load(Ordering::SeqCst);
    // A page that comes is no change; the first write to shared zeros is one.
    let zero = user.fault_in(at, false, 0).unwrap();
    assert!(!zero.writable);
    assert_eq!(reports(), 0);
    let own = user.fault_in(at, true, 0).unwrap();
    assert!(own.writable);
    assert_ne!(own.frame, zero.frame);
    assert_eq!(reports(), 1);
    process.poke(at, &[5]);
    process.migrate(at, 4096);
    assert_ne!(user.fault_in(at, true, 0).unwrap().frame, own.frame);
    let mut byte = [0];
    user.read(at, &mut byte).unwrap();
    assert_eq!(byte, [5]);
    process.protect(at, 4096, false);
    assert_eq!(user.fault_in(at, true, 0), Err(UserFault::BadAddress));
    assert!(!user.fault_in(at, false, 0).unwrap().writable);
    process.protect(at, 4096, true);
    assert!(user.fault_in(at, true, 0).unwrap().writable);
    process.discard(at, 4096);
    user.read(at, &mut byte).unwrap();
    assert_eq!(byte, [0]);
    process.unmap(at, 4096);
    assert_eq!(user.fault_in(at, false, 0), Err(UserFault::BadAddress));
    assert_eq!(user.write(at, &[1]), Err(UserFault::BadAddress));
    assert_eq!(reports(), heard.ends.load(Ordering::SeqCst));
    assert!(reports() >= 7);
    user.unwatch();
    let before = reports();
    process.unmap(at, 0x4000);
    assert_eq!(reports(), before);
    machine.assert_clean();
}

#[test]
fn large_pages_are_whole_aligned_and_split() {
    let machine = Machine::haswell();
    let user = machine.host().user_space().unwrap();
    let process = machine.process();
    let at = process.map_with(4 << 20, 21);
    assert!(at.is_aligned(1 << 21));
    let found = user.fault_in(Hva(at.0 + 0x5000), true, 0).unwrap();
    assert_eq!(found.shift, 21);
    assert_eq!(found.frame.0 & 0x1ff, 5);
    process.poke(Hva(at.0 + 0x6000), &[6]);
    process.discard(Hva(at.0 + 0x5000), 4096);
    assert_eq!(
        user.fault_in(Hva(at.0 + 0x6000), true, 0).unwrap().shift,
        12
    );
    process.collapse(at);
    let found = user.fault_in(Hva(at.0 + 0x6000), true, 0).unwrap();
    assert_eq!(found.shift, 21);
    let mut byte = [0];
    process.peek(Hva(at.0 + 0x6000), &mut byte);
    assert_eq!(byte, [6]);
    assert_eq!(
        user.compare_exchange(Hva(at.0 + 0x6000), 4, 6, 0x1234_5678),
        Ok(6)
    );
    assert_eq!(
        user.compare_exchange(Hva(at.0 + 0x6000), 4, 6, 1),
        Ok(0x1234_5678)
    );
    machine.assert_clean();
}

#[test]
fn shared_pages_are_one_page() {
    let machine = Machine::haswell();
    let page = machine.host().shared_page().unwrap();
    machine.process().poke(page.user(), &[0x42]);
    // SAFETY: the page lives.
    assert_eq!(unsafe { page.kernel().read() }, 0x42);
    assert_eq!(machine.in_use().1, 1);
    drop(page);
    machine.assert_clean();
}

#[test]
fn another_process_is_told_apart() {
    let machine = Machine::haswell();
    let user = machine.host().user_space().unwrap();
    let at = machine.process().map(4096);
    assert!(user.is_current());
    let stranger = sim::Process::new(&machine);
    stranger.enter(|| {
        assert!(!user.is_current());
        assert!(machine.host().user_space().unwrap().is_current());
        user.write(at, &[1]).unwrap();
    });
    found(&machine, "from a thread of another process");
    assert!(user.is_current());
}

#[test]
fn one_allocation_can_be_made_to_fail() {
    let machine = Machine::haswell();
    let host = machine.host();
    let three = || {
        [
            OwnedPage::new(&host).is_ok(),
            Lock::<SimMutex, ()>::new(LockClass::Vm, ()).is_ok(),
            host.shared_page().is_ok(),
        ]
    };
    assert_eq!(fault::counting(three).1, 3);
    assert_eq!(fault::failing(0, three), ([false, true, true], true));
    assert_eq!(fault::failing(1, three), ([true, false, true], true));
    assert_eq!(fault::failing(2, three), ([true, true, false], true));
    assert_eq!(fault::failing(3, three), ([true; 3], false));
    machine.assert_clean();
}
