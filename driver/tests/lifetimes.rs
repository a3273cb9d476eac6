//! Who lives how long: every order of closing, objects that nobody opens, creations that fail
//! half way, limits, and threads that do it all at once.

mod mock;

use std::sync::atomic::{AtomicU64, Ordering};

use abi::{Device, Os, Request};
use haxm_driver::{LoadError, Node};
use mock::client::{Client, expect};
use mock::{OWNER, World};

const VM: Node = Node::Vm(0);
const VCPU0: Node = Node::Vcpu { vm: 0, vcpu: 0 };
const VCPU1: Node = Node::Vcpu { vm: 0, vcpu: 1 };

/// All orders of the numbers below `n`.
fn orders(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![vec![]];
    }
    let mut all = Vec::new();
    for shorter in orders(n - 1) {
        for at in 0..n {
            let mut order = shorter.clone();
            order.insert(at, n - 1);
            all.push(order);
        }
    }
    all
}

#[test]
fn any_order_of_closing_ends_everything_at_the_right_moment() {
    let nodes = [Node::System, VM, VCPU0, VCPU1];
    for os in Os::ALL {
        for order in orders(nodes.len()) {
            let client = Client::new(os);
            assert_eq!(client.create_vm(), 0);
            let mut handles = vec![Some(client.open(Node::System)), Some(client.open(VM))];
            for (id, node) in [(0, VCPU0), (1, VCPU1)] {
                assert_eq!(client.create_vcpu(handles[1].as_ref().unwrap(), id), 0);
                handles.push(Some(client.open(node)));
            }
            for closing in order {
                client.devices.close(handles[closing].take().unwrap());
                let open = |index: usize| handles[index].is_some();
                let vm_lives = open(1) || open(2) || open(3);
                let state = client.world.state();
                assert_eq!(state.vms.contains(&0), vm_lives);
                assert_eq!(state.nodes.contains("vm0"), vm_lives);
                for (index, id) in [(2, 0), (3, 1)] {
                    assert_eq!(state.vcpus.contains(&(0, id)), open(index));
                    assert_eq!(state.nodes.contains(&format!("vm0/vcpu{id}")), open(index));
                }
                assert!(state.nodes.contains("HAX"));
            }
            // The id is free again.
            assert_eq!(client.create_vm(), 0);
            client.end(vec![]);
        }
    }
}

#[test]
fn the_system_handle_may_go_first() {
    let client = Client::new(Os::Linux);
    let handles = client.one_of(Device::Vcpu);
    let [vcpu, vm, system] = handles.try_into().ok().unwrap();
    client.devices.close(system);
    assert_eq!(client.call(&vcpu, Request::Run, &[]).code, 0);
    assert_eq!(client.devices.open_handles(), 2);
    client.end(vec![vm, vcpu]);
}

#[test]
fn a_vcpu_outlives_its_vms_handle_and_works() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        let [vcpu, vm, system] = handles.try_into().ok().unwrap();
        client.devices.close(vm);
        assert_eq!(client.call(&vcpu, Request::Run, &[]).code, 0);
        // Its id stays taken, and it does not open again.
        assert_eq!(client.create_vm(), 1);
        assert_eq!(
            client.open_error(VM),
            expect(os, -16, -16, 0xc000_0043),
            "{os:?}"
        );
        client.end(vec![vcpu, system]);
    }
}

#[test]
fn a_vcpu_id_comes_back_when_it_is_closed() {
    let client = Client::new(Os::Linux);
    let handles = client.one_of(Device::Vcpu);
    let [vcpu, vm, system] = handles.try_into().ok().unwrap();
    assert_eq!(client.create_vcpu(&vm, 0), -22);
    client.devices.close(vcpu);
    assert_eq!(client.create_vcpu(&vm, 0), 0);
    let vcpu = client.open(VCPU0);
    client.end(vec![vm, vcpu, system]);
}

#[test]
fn vcpus_nobody_opens_end_with_their_vms_handle() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        let [vcpu0, vm, system] = handles.try_into().ok().unwrap();
        for id in 1..16 {
            assert_eq!(client.create_vcpu(&vm, id), 0);
        }
        let vcpu9 = client.open(Node::Vcpu { vm: 0, vcpu: 9 });
        client.devices.close(vm);
        let left: Vec<_> = client.world.state().vcpus.iter().copied().collect();
        assert_eq!(left, [(0, 0), (0, 9)]);
        client.devices.close(vcpu9);
        assert!(client.world.state().vms.contains(&0));
        client.devices.close(vcpu0);
        assert!(client.world.state().vms.is_empty());
        assert_eq!(client.create_vm(), 0);
        client.end(vec![system]);
    }
}

/// Of three VMs of a process that has ended, one was opened and its handle is still held, by a child.
#[test]
fn a_vm_nobody_opened_gives_its_id_back_when_its_owner_has_ended() {
    for os in Os::ALL {
        let client = Client::new(os);
        client.world.state().process = OWNER + 1;
        for id in 0..3 {
            assert_eq!(client.create_vm(), id);
        }
        let opened = client.open(Node::Vm(1));
        client.world.state().process = OWNER;
        assert_eq!(client.create_vm(), 3);
        client.world.state().ended.insert(OWNER + 1);
        let left =
            |client: &Client| -> Vec<_> { client.world.state().vms.iter().copied().collect() };
        assert_eq!(left(&client), [0, 1, 2, 3]);
        assert_eq!(client.create_vm(), 0);
        assert_eq!(left(&client), [0, 1, 3]);
        assert!(!client.world.state().nodes.contains("vm2"));
        assert_eq!(client.create_vm(), 2);
        // The one that was opened stays, for whoever the handle was handed to.
        client.world.state().process = OWNER + 1;
        assert!(client.world.state().nodes.contains("vm1"));
        assert_eq!(client.create_vcpu(&opened, 0), 0);
        client.end(vec![opened]);
    }
}

#[test]
fn vms_nobody_opens_end_at_unload() {
    for os in Os::ALL {
        let client = Client::new(os);
        for id in 0..5 {
            assert_eq!(client.create_vm(), id);
        }
        let opened = client.open(Node::Vm(3));
        client.devices.close(opened);
        let left: Vec<_> = client.world.state().vms.iter().copied().collect();
        assert_eq!(left, [0, 1, 2, 4]);
        client.end(vec![]);
    }
}

#[test]
fn ids_run_out_at_64_vms_8_on_netbsd_and_16_vcpus() {
    for os in Os::ALL {
        let client = Client::new(os);
        let system = client.open(Node::System);
        let limit = if os == Os::NetBsd { 8 } else { 64 };
        let mut handles = Vec::new();
        for id in 0..limit {
            assert_eq!(client.create_vm(), id);
            handles.push(client.open(Node::Vm(id)));
        }
        let create = || client.call(&system, Request::CreateVm, &[0; 4]).code;
        assert_eq!(create(), expect(os, -12, -12, 0xc000_0001));
        assert_eq!(client.world.state().vms.len(), limit as usize);
        client.devices.close(handles.swap_remove(5));
        assert_eq!(client.create_vm(), 5);

        for id in 0..16 {
            assert_eq!(client.create_vcpu(&handles[0], id), 0);
        }
        let refused = expect(os, -22, -22, 0xc000_0001);
        for id in [0, 15, 16, 17, u32::MAX] {
            assert_eq!(client.create_vcpu(&handles[0], id), refused, "{id}");
        }
        handles.push(system);
        client.end(handles);
    }
}

#[test]
fn a_node_that_cannot_be_made_undoes_its_object() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vm);
        client.world.state().refuse_node = true;
        let answer = client.call(&handles[1], Request::CreateVm, &[0; 4]);
        assert_eq!(answer.code, expect(os, -12, -12, 0xc000_0001));
        client.world.state().refuse_node = true;
        assert_eq!(
            client.create_vcpu(&handles[0], 2),
            expect(os, -22, -22, 0xc000_0001)
        );
        assert_eq!(client.world.state().vms.len(), 1);
        assert_eq!(client.world.state().vcpus.len(), 0);
        assert_eq!(client.create_vm(), 1);
        assert_eq!(client.create_vcpu(&handles[0], 2), 0);
        client.end(handles);
    }
}

#[test]
fn a_vm_whose_id_cannot_be_returned_is_undone() {
    let client = Client::new(Os::Linux);
    let handles = client.one_of(Device::System);
    let number = Os::Linux.number(Request::CreateVm).unwrap();
    for _ in 0..100 {
        let status = client.devices.ioctl(&handles[0], number, 0x10);
        assert_eq!(status.code(), -14);
    }
    assert_eq!(client.create_vm(), 0);
    client.end(handles);
}

#[test]
fn loading_without_a_node_fails() {
    // The node is there already, which the mock's shim would not allow; so
    // a shim that refuses is made of it.
    struct NoNodes(mock::MockShim);
    impl haxm_driver::Shim for NoNodes {
        type Core = mock::MockCore;
        type Mutex = mock::TestLock;
        fn create_node(&self, _: Node) -> Result<(), haxm_driver::NodeFailed> {
            Err(haxm_driver::NodeFailed)
        }
        fn remove_node(&self, node: Node) {
            self.0.remove_node(node);
        }
        fn copy_in(&self, user: u64, bytes: &mut [u8]) -> Result<(), vmx::host::UserFault> {
            self.0.copy_in(user, bytes)
        }
        fn copy_out(&self, user: u64, bytes: &[u8]) -> Result<(), vmx::host::UserFault> {
            self.0.copy_out(user, bytes)
        }
    }
    let world = World::new();
    let loaded = haxm_driver::Devices::load(NoNodes(world.shim()), world.core(), Os::Linux);
    assert_eq!(loaded.err(), Some(LoadError::Node));
}

/// A few bits at a time, the same in every run.
fn next(seed: &AtomicU64) -> u64 {
    let mut x = seed.load(Ordering::Relaxed);
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    seed.store(x, Ordering::Relaxed);
    x >> 11
}

#[test]
fn threads_that_create_open_and_close_leave_nothing() {
    let client = Client::new(Os::Linux);
    std::thread::scope(|scope| {
        for thread in 1..=4_u64 {
            let client = &client;
            scope.spawn(move || {
                let seed = AtomicU64::new(thread.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                let system = client.open(Node::System);
                for _ in 0..300 {
                    // By copied arguments: the threads share the caller's memory.
                    let vm = create_vm_directly(client, &system);
                    let Ok(handle) = client.devices.open(Node::Vm(vm)) else {
                        continue;
                    };
                    let mut handles = vec![];
                    for id in 0..(next(&seed) % 4) as u32 {
                        let number = Os::Linux.number(Request::VcpuCreate).unwrap();
                        let mut data = id.to_le_bytes();
                        let status = client.devices.ioctl_copied(&handle, number, &mut data);
                        assert_eq!(status.code(), 0);
                        if next(&seed) % 3 != 0 {
                            handles.push(client.open(Node::Vcpu { vm, vcpu: id }));
                        }
                    }
                    let at = next(&seed) as usize % (handles.len() + 1);
                    handles.insert(at, handle);
                    while let Some(handle) = handles.pop() {
                        client.devices.close(handle);
                    }
                }
                client.devices.close(system);
            });
        }
    });
    client.end(vec![]);
}

fn create_vm_directly(client: &Client, system: &haxm_driver::Opened<mock::MockShim>) -> u32 {
    let number = Os::Linux.number(Request::CreateVm).unwrap();
    let mut data = [0xee; 4];
    let status = client.devices.ioctl_copied(system, number, &mut data);
    assert_eq!(status.code(), 0);
    u32::from_le_bytes(data)
}
