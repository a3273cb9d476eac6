//! Random lives: a guest that does anything, a client that asks for anything, a
//! host that moves memory and threads about. Nothing may be found, nothing may
//! be left. Every life is a seed; a failing one prints it.

use std::collections::{BTreeMap, BTreeSet};

use abi::debug::VcpuDebug;
use abi::tunnel::{ExitStatus, offset};
use abi::vcpu_state::SegmentDesc;
use sim::client::{Client, RAM_SIZE};
use sim::{Access, Guest, Machine, Profile, Step, StringIo};
use vmx::Vm;
use vmx::arch::addr::Hva;

/// SplitMix64: small, seedable, good enough.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap()]
    }

    /// A value that is often at an edge.
    fn value(&mut self) -> u64 {
        let wide = self.next();
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => wide & 0xffff_ffff,
            4 => wide & 0xfff,
            5 => 0x8000_0000_0000,
            6 => (1 << self.below(64)) - 1,
            _ => wide,
        }
    }
}

const MSRS: &[u32] = &[
    0x10,
    0x1b,
    0x3a,
    0x3b,
    0x48,
    0x49,
    0x8b,
    0xc1,
    0xc3,
    0xfe,
    0x10a,
    0x174,
    0x175,
    0x176,
    0x179,
    0x186,
    0x1a0,
    0x1d9,
    0x200,
    0x250,
    0x277,
    0x2ff,
    0x345,
    0x38f,
    0x400,
    0x480,
    0x48c,
    0x6e0,
    0x802,
    0xda0,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
    0xc000_0103,
    0x4000_0000,
    0xffff_ffff,
];

fn guest_address(r: &mut Random) -> u64 {
    match r.below(6) {
        0 => r.below(RAM_SIZE / 8) * 8,
        1 => 0xfee0_0000 + r.below(0x1000) / 8 * 8,
        2 => 0xffff_fff8,
        3 => RAM_SIZE - 8,
        4 => RAM_SIZE,
        _ => r.below(16) * 0x1000,
    }
}

fn string_io(r: &mut Random) -> StringIo {
    StringIo {
        port: u16::try_from(r.below(0x1_0000)).unwrap(),
        size: r.pick(&[1, 2, 4]),
        input: r.one_in(2),
        rep: r.one_in(2),
        linear: guest_address(r),
        address_size: r.pick(&[1, 2, 3]),
        segment: r.pick(&[0, 1, 2, 3, 4, 5]),
    }
}

/// One random instruction or event of the guest.
fn step(r: &mut Random) -> Step {
    let small = usize::try_from(r.below(16)).unwrap();
    let value = r.value();
    match r.below(30) {
        0 => Step::cpuid(u32::try_from(value & 0x8000_00ff).unwrap(), 0),
        1 | 2 => Step::rdmsr(r.pick(MSRS)),
        3 | 4 => Step::wrmsr(r.pick(MSRS), value),
        5 => Step::input(u16::try_from(value & 0xffff).unwrap(), r.pick(&[1, 2, 4])),
        6 => Step::output(
            u16::try_from(value & 0xffff).unwrap(),
            r.pick(&[1, 2, 4]),
            7,
        ),
        7 => Step::string_io(string_io(r)),
        8 => Step::hlt(),
        9 | 10 => Step::mov_to_cr(r.pick(&[0, 3, 4, 8]), small, value),
        11 => Step::mov_from_cr(r.pick(&[0, 3, 4, 8]), small),
        12 => Step::clts(),
        13 => Step::lmsw(u16::try_from(value & 0xffff).unwrap()),
        14 => Step::mov_to_dr(r.pick(&[0, 1, 2, 3, 4, 5, 6, 7]), small, value),
        15 => Step::mov_from_dr(r.pick(&[0, 1, 2, 3, 4, 5, 6, 7]), small),
        16 | 17 => {
            let (at, access) = (
                guest_address(r),
                r.pick(&[Access::Read, Access::Write, Access::Fetch]),
            );
            Step::new("touch", 2, move |guest: &mut Guest<'_>| {
                guest.touch(at, access).map(|_| ())
            })
        }
        18 => {
            let vector = r.pick(&[0, 1, 3, 6, 13, 14, 17]);
            let code = matches!(vector, 13 | 14 | 17).then_some(0);
            Step::exception(vector, code, value)
        }
        19 => {
            let value = r.value();
            Step::new("XSETBV", 3, move |guest| {
                guest.regs.gpr[1] = 0;
                guest.regs.gpr[0] = value & 0xff;
                guest.regs.gpr[2] = 0;
                Err(guest.exit_now(55, 0))
            })
        }
        20 => Step::set_if(r.one_in(2)),
        21 => Step::host_interrupt(),
        22 => Step::host_nmi(),
        23 => Step::exits(r.pick(&[11, 13, 14, 15, 18, 20, 27, 40, 50, 54]), value, 2),
        27 => {
            let selector = r.pick(&[0, 0x41_003c, 0x43_00c0, 0x5b_00c0]);
            Step::wrmsr(r.pick(&[0x186, 0x187, 0x188, 0x189]), selector)
        }
        28 => {
            let number = r.below(5);
            Step::new("RDPMC", 2, move |guest| {
                guest.regs.gpr[1] = number;
                Err(guest.exit_now(15, 0))
            })
        }
        24 => Step::delivery_access(guest_address(r), Access::Write),
        25 | 26 => Step::mov_to_cr(8, small, value & 0xf),
        _ => Step::set_gpr(small, value),
    }
}

fn segment(r: &mut Random) -> SegmentDesc {
    SegmentDesc {
        selector: u16::try_from(r.value() & 0xffff).unwrap(),
        dummy: 0,
        limit: u32::try_from(r.value() & 0xffff_ffff).unwrap(),
        base: r.value(),
        ar: u32::try_from(r.value() & 0x1_ffff).unwrap(),
        ipad: 0,
    }
}

/// Registers that no processor would take, now and then.
fn wild_registers(r: &mut Random, client: &Client) {
    let field = r.below(12);
    let value = r.value();
    let wild = segment(r);
    client.change_regs(|state| match field {
        0 => state.cr0 = value,
        1 => state.cr3 = value,
        2 => state.cr4 = value,
        3 => state.rip = value,
        4 => state.rflags = value,
        5 => state.cs = wild,
        6 => state.ss = wild,
        7 => state.tr = wild,
        8 => state.ldt = wild,
        9 => (state.dr6, state.dr7) = (value, value),
        10 => state.gdt.base = value,
        _ => state.ds = wild,
    });
}

/// One request of the client, or act of the host.
fn request(r: &mut Random, client: &Client, wild: bool) {
    // Up to four pages of RAM.
    let page = Hva(client.ram.0 + r.below(RAM_SIZE / 4096 - 4) * 4096);
    match r.below(17) {
        0 => client.vcpu.interrupt(u8::try_from(r.below(256)).unwrap()),
        1 => drop(client.regs()),
        2 => {
            let _ = client.try_set_msr(r.pick(MSRS), r.value());
        }
        3 => {
            let _ = client.msr(r.pick(MSRS));
        }
        4 => client.process.discard(page, 4096 * (1 + r.below(4))),
        5 => client.process.migrate(page, 4096 * (1 + r.below(4))),
        6 => {
            client.process.protect(page, 4096, false);
            client.process.protect(page, 4096, true);
        }
        7 => {
            let (gpa, size) = (r.below(0x300) * 4096, (1 + r.below(8)) * 4096);
            let flags = r.pick(&[0, 1, 0x40, 0x41, 0x80]);
            let va = if flags == 0x80 {
                0
            } else {
                client.process.map(size).0
            };
            let _ = client.vm.set_ram(gpa, size, va, flags);
        }
        8 => client.vm.set_ram(0, RAM_SIZE, client.ram.0, 0).unwrap(),
        9 => {
            let gpa = r.below(RAM_SIZE / 4096) * 4096;
            let _ = client.vm.protect_ram(gpa, 4096, r.pick(&[0, 7]));
        }
        10 => client.set_tunnel(
            offset::REQUEST_INTERRUPT_WINDOW,
            u32::try_from(r.below(2)).unwrap(),
        ),
        11 => client.set_tunnel(offset::USER_EVENT_PENDING, 1),
        12 => {
            let mut debug = VcpuDebug {
                control: u32::try_from(r.below(16)).unwrap(),
                ..VcpuDebug::default()
            };
            debug.dr = [0; 8].map(|_: u64| r.value());
            client.vcpu.set_debug(&debug).unwrap();
        }
        13 => {
            let mut image = client.vcpu.fpu();
            image.mxcsr = u32::try_from(r.value() & 0xffff_ffff).unwrap();
            image.fcw = u16::try_from(r.value() & 0xffff).unwrap();
            client.vcpu.set_fpu(&image);
        }
        // An overflow of the host's begins or ends.
        15 => toggle_host_msr(r, client, 0x38e),
        14 if wild => wild_registers(r, client),
        _ => client.set_io_buffer(0, &[0xa5; 64]),
    }
}

/// What the host's perf does on a processor: another thread may do so at any time with what only it reads.
fn toggle_host_msr(r: &mut Random, client: &Client, register: u32) {
    let cpu = usize::try_from(r.below(3)).unwrap();
    if let Some(old) = client.machine.msr(cpu, register) {
        client.machine.set_msr(cpu, register, old ^ 1);
    }
}

/// Puts a real access to a device where the guest is, for the emulator.
fn access_device(r: &mut Random, client: &Client) {
    let rip = client.regs().rip;
    if rip >= RAM_SIZE - 16 {
        return;
    }
    let at = 0xfee0_0000 + r.below(0x100) * 8;
    // MOV [RDI], EAX or MOV EAX, [RDI].
    let (opcode, access) = r.pick(&[(0x89, Access::Write), (0x8b, Access::Read)]);
    client.load(rip, &[opcode, 0x07]);
    client.machine.script([
        Step::set_gpr(7, at),
        Step::new("device", 2, move |guest: &mut Guest<'_>| {
            guest.touch(at, access).map(|_| ())
        }),
    ]);
}

/// What the lives of one test did, so that none of them is empty.
#[derive(Default)]
struct Seen {
    exits: BTreeMap<u16, u64>,
    statuses: BTreeSet<u32>,
}

fn life(seed: u64, profile: Profile, wild: bool, seen: &mut Seen) {
    let mut r = Random(seed);
    let machine = Machine::new(profile, 3);
    machine.set_migrate(r.one_in(2));
    if r.one_in(4) {
        machine.add_foreign_hypervisor();
    }
    machine.set_keeps_vmxe(!r.one_in(4));
    let client = Client::new(&machine);
    let modes: &[fn(&Client)] = if machine.profile().allows_secondary(7) {
        &[Client::real_mode, Client::protected_mode, Client::long_mode]
    } else {
        &[Client::long_mode]
    };
    let mode = r.pick(modes);
    mode(&client);
    for _ in 0..60 {
        if r.one_in(3) {
            access_device(&mut r, &client);
        }
        let count = r.below(6);
        let steps: Vec<Step> = (0..count).map(|_| step(&mut r)).collect();
        machine.script(steps);
        let result = client.vcpu.run();
        seen.statuses.insert(client.tunnel().exit_status);
        match (result, client.tunnel().status()) {
            (Ok(()), Some(ExitStatus::StateChange)) => break,
            (Ok(()), Some(status)) => assert_ne!(status, ExitStatus::Unknown),
            (Err(_), _) if wild => break,
            (result, status) => panic!("{result:?} {status:?}: {:?}", machine.entry_failures()),
        }
        for _ in 0..r.below(4) {
            request(&mut r, &client, wild);
        }
        // Its PEBS begins or ends: by the processor itself, so not while that is ours.
        if r.one_in(16) {
            toggle_host_msr(&mut r, &client, 0x3f1);
        }
    }
    if !wild {
        assert_eq!(machine.entry_failures(), []);
    }
    for (reason, count) in machine.counts().exits {
        *seen.exits.entry(reason).or_default() += count;
    }
    client.finish();
}

/// Names the seed when a life ends badly.
struct Named(&'static str, u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: seed {}", self.0, self.1);
        }
    }
}

fn lives(profile: fn() -> Profile, wild: bool) {
    let first = std::env::var("SIM_SEED").ok().and_then(|s| s.parse().ok());
    let count = std::env::var("SIM_LIVES").ok().and_then(|s| s.parse().ok());
    let range = match first {
        Some(seed) => seed..seed + count.unwrap_or(1),
        None => 0..count.unwrap_or(60),
    };
    let mut seen = Seen::default();
    for seed in range {
        let profile = profile();
        let _named = Named(profile.name, seed);
        life(seed, profile, wild, &mut seen);
    }
    if first.is_none() && !wild {
        for reason in [0, 1, 10, 12, 28, 30, 31, 32, 48] {
            assert!(
                seen.exits.contains_key(&reason),
                "no exit {reason}: {:?}",
                seen.exits
            );
        }
        // IO, INTERRUPT, HLT, FAST_MMIO.
        for status in [1, 4, 6, 9] {
            assert!(
                seen.statuses.contains(&status),
                "no status {status}: {:?}",
                seen.statuses
            );
        }
    }
}

#[test]
fn on_haswell() {
    lives(Profile::haswell, false);
}

#[test]
fn on_skylake() {
    lives(Profile::skylake_x, false);
}

#[test]
fn without_unrestricted_guest() {
    lives(Profile::no_unrestricted_guest, false);
}

#[test]
fn without_vpid_or_tpr_shadow_and_with_odd_controls() {
    lives(Profile::no_vpid, false);
    lives(Profile::no_tpr_shadow, false);
    lives(Profile::odd_required_bits, false);
}

#[test]
fn with_registers_no_processor_takes() {
    lives(Profile::haswell, true);
}

/// Two vCPUs in two threads, requests and host changes from a third.
#[test]
fn side_by_side() {
    for seed in 0..8 {
        let _named = Named("side by side", seed);
        let machine = Machine::new(Profile::haswell(), 3);
        machine.set_migrate(seed % 2 == 1);
        machine.set_keeps_vmxe(seed % 4 < 2);
        let client = Client::new(&machine);
        client.protected_mode();
        let second = Vm::create_vcpu(&client.vm, 1).unwrap();
        second.set_regs(&client.regs()).unwrap();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (vcpu, salt) in [(client.vcpu.clone(), 1), (second.clone(), 2)] {
                let machine = machine.clone();
                threads.push(scope.spawn(move || {
                    let mut r = Random(seed * 2 + salt);
                    for _ in 0..80 {
                        machine.script((0..r.below(6)).map(|_| step(&mut r)));
                        vcpu.run().unwrap();
                    }
                }));
            }
            let mut r = Random(seed << 32);
            while threads.iter().any(|thread| !thread.is_finished()) {
                request(&mut r, &client, false);
                second.kick();
                std::thread::yield_now();
            }
        });
        assert_eq!(machine.entry_failures(), []);
        drop(second);
        client.finish();
    }
}
