//! Random requests with random arguments on every system: whatever comes, the layer keeps its
//! rules (the mock asserts them), gives back no more than fits, and leaves nothing behind.

mod mock;

use abi::{Device, Os, Request};
use haxm_driver::{Node, Opened};
use mock::client::{ARGUMENT, Client, TABLE};
use mock::{MockShim, USER_BASE, USER_SIZE};

/// Numbers that look random and are the same in every run (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Mostly a number the device knows.
fn number(os: Os, node: Node, random: &mut Random) -> u32 {
    let device = match node {
        Node::System => Device::System,
        Node::Vm(_) => Device::Vm,
        Node::Vcpu { .. } => Device::Vcpu,
    };
    let own: Vec<u32> = Request::ALL
        .iter()
        .filter(|request| request.device() == device)
        .filter_map(|request| os.number(*request))
        .collect();
    match random.below(20) {
        0 => random.next() as u32,
        1 => os.number(random.pick(&Request::ALL)).unwrap_or(0),
        _ => random.pick(&own),
    }
}

/// Mostly a node that is there.
fn some_node(client: &Client, random: &mut Random) -> Node {
    let state = client.world.state();
    let vms: Vec<u32> = state.vms.iter().copied().collect();
    let vcpus: Vec<(u32, u32)> = state.vcpus.iter().copied().collect();
    match random.below(20) {
        0 => Node::System,
        1 => Node::Vm(random.next() as u32),
        2..8 if !vms.is_empty() => Node::Vm(random.pick(&vms)),
        8.. if !vcpus.is_empty() => {
            let (vm, vcpu) = random.pick(&vcpus);
            Node::Vcpu { vm, vcpu }
        }
        _ => Node::Vcpu {
            vm: random.below(64) as u32,
            vcpu: random.below(18) as u32,
        },
    }
}

fn one_request(client: &Client, handle: &Opened<MockShim>, random: &mut Random) {
    let number = number(client.os, handle.node(), random);
    let mut bytes = vec![0; random.below(700)];
    let small = random.below(2) == 0;
    bytes.fill_with(|| match (small, random.below(8)) {
        (true, 2..) => 0,
        (true, _) => random.below(18) as u8,
        (false, _) => random.next() as u8,
    });
    client.world.state().copied_in.clear();
    match client.os {
        Os::Linux => {
            client.world.poke(ARGUMENT, &bytes);
            client.world.poke(TABLE, &bytes);
            if random.below(2) == 0 {
                client.world.poke(ARGUMENT, &TABLE.to_le_bytes());
            }
            let edge = USER_BASE + USER_SIZE as u64 - random.next() % 600;
            let anywhere = random.next();
            let address = random.pick(&[ARGUMENT, ARGUMENT, ARGUMENT, edge, anywhere, 0]);
            let code = client.devices.ioctl(handle, number, address).code();
            assert!(code <= 0);
        }
        Os::Darwin | Os::NetBsd => {
            client.world.poke(TABLE, &bytes);
            if random.below(2) == 0 && bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&TABLE.to_le_bytes());
            }
            let status = client.devices.ioctl_copied(handle, number, &mut bytes);
            assert!(status.code() <= 0);
        }
        Os::Windows => {
            let room = random.below(800);
            client.call_windows(handle, number, &bytes, room);
        }
    }
}

#[test]
fn whatever_comes_the_rules_hold() {
    for os in Os::ALL {
        let client = Client::new(os);
        let mut random = Random(0x1234_5678_9abc_def1 + os as u64);
        let mut handles = vec![client.open(Node::System)];
        for _ in 0..20_000 {
            match random.below(10) {
                0 | 1 => {
                    let node = some_node(&client, &mut random);
                    handles.extend(client.devices.open(node).ok());
                }
                2 if handles.len() > 12 => {
                    // The first, a system handle, stays.
                    let at = 1 + random.below(handles.len() - 1);
                    client.devices.close(handles.swap_remove(at));
                }
                _ => {
                    let at = random.below(handles.len());
                    one_request(&client, &handles[at], &mut random);
                }
            }
            assert_eq!(client.devices.open_handles() as usize, handles.len());
        }
        let calls = client.world.take_calls();
        for wanted in [
            "create_vm",
            "create_vcpu",
            "set_ram",
            "set_msrs",
            "run",
            "set_cpuid",
        ] {
            let reached = calls.iter().any(|call| call.starts_with(wanted));
            assert!(reached, "{os:?}: nothing reached {wanted}");
        }
        client.end(handles);
    }
}
