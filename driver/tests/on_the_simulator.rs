//! The device layer on the real core and the simulated machine: what a client does from load to
//! unload, and that nothing is left of it.

use std::collections::BTreeSet;
use std::sync::Mutex;

use abi::zerocopy::{FromBytes, FromZeros, IntoBytes};
use abi::{
    CapabilityInfo, Device, ExitStatus, FxLayout, MsrData, Os, RamblockInfo, Request, SetRamInfo,
    TunnelInfo, VcpuState, VmxMsr,
};
use haxm_driver::{Devices, Node, NodeFailed, Opened, Shim};
use sim::{Machine, Process, Profile, SimHost, SimMutex, Step};
use vmx::Hypervisor;
use vmx::arch::addr::Hva;
use vmx::host::{Host, UserFault, UserSpace};

struct SimShim {
    host: SimHost,
    nodes: Mutex<BTreeSet<String>>,
}

impl Shim for SimShim {
    type Core = Hypervisor<SimHost>;
    type Mutex = SimMutex;

    fn create_node(&self, node: Node) -> Result<(), NodeFailed> {
        let fresh = self.nodes.lock().unwrap().insert(format!("{node:?}"));
        fresh.then_some(()).ok_or(NodeFailed)
    }

    fn remove_node(&self, node: Node) {
        assert!(self.nodes.lock().unwrap().remove(&format!("{node:?}")));
    }

    fn copy_in(&self, user: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        let space = self.host.user_space().map_err(|_| UserFault::NoMemory)?;
        space.read(Hva(user), bytes)
    }

    fn copy_out(&self, user: u64, bytes: &[u8]) -> Result<(), UserFault> {
        let space = self.host.user_space().map_err(|_| UserFault::NoMemory)?;
        space.write(Hva(user), bytes)
    }
}

type Handle = Opened<SimShim>;

/// A loaded module on a simulated machine, and the client's process.
struct Client {
    machine: Machine,
    process: Process,
    devices: Devices<SimShim>,
    argument: Hva,
}

impl Client {
    fn new(profile: Profile) -> Self {
        let machine = Machine::new(profile, 2);
        let shim = SimShim {
            host: machine.host(),
            nodes: Mutex::default(),
        };
        let core = Hypervisor::new(machine.host()).expect("a hypervisor");
        let process = machine.process();
        Self {
            argument: process.map(4096),
            devices: Devices::load(shim, core, Os::Linux).expect("devices"),
            machine,
            process,
        }
    }

    fn open(&self, node: Node) -> Handle {
        self.devices.open(node).expect("opens")
    }

    fn call<T: IntoBytes + FromBytes + abi::zerocopy::Immutable>(
        &self,
        handle: &Handle,
        request: Request,
        argument: &mut T,
    ) -> i32 {
        let number = Os::Linux.number(request).unwrap();
        self.process.poke(self.argument, argument.as_bytes());
        let status = self.devices.ioctl(handle, number, self.argument.0);
        self.process.peek(self.argument, argument.as_mut_bytes());
        status.code()
    }

    fn run(&self, vcpu: &Handle, tunnel: &TunnelInfo) -> ExitStatus {
        let number = Os::Linux.number(Request::Run).unwrap();
        assert_eq!(self.devices.ioctl(vcpu, number, 0).code(), 0);
        let mut status = [0; 4];
        self.process.peek(Hva(tunnel.va + 8), &mut status);
        ExitStatus::from_raw(u32::from_le_bytes(status)).expect("a status")
    }

    fn create_vm(&self) -> u32 {
        let system = self.open(Node::System);
        let mut id = 0xee_u32;
        assert_eq!(self.call(&system, Request::CreateVm, &mut id), 0);
        self.devices.close(system);
        id
    }

    /// Unloads and checks that nothing is left.
    fn end(self) {
        assert_eq!(self.devices.open_handles(), 0);
        self.devices.unload();
        assert!(self.devices.shim().nodes.lock().unwrap().is_empty());
        drop(self.devices);
        self.machine.assert_clean();
    }
}

fn capability(client: &Client) -> (u16, u16) {
    let system = client.open(Node::System);
    let mut info = CapabilityInfo::default();
    assert_eq!(client.call(&system, Request::Capability, &mut info), 0);
    client.devices.close(system);
    (info.wstatus, info.winfo)
}

#[test]
fn a_client_runs_a_guest_from_load_to_unload() {
    let client = Client::new(Profile::haswell());
    assert_eq!(capability(&client), (3, 0x3ff));
    let vm = client.open(Node::Vm(client.create_vm()));

    let ram = client.process.map(0x10_0000);
    let mut block = RamblockInfo {
        start_va: ram.0,
        size: 0x10_0000,
        reserved: 0,
    };
    assert_eq!(client.call(&vm, Request::AddRamblock, &mut block), 0);
    assert_eq!(client.call(&vm, Request::AddRamblock, &mut block), -22);
    let mut map = SetRamInfo {
        pa_start: 0,
        size: 0x10_0000,
        flags: 0,
        pad: [0; 3],
        va: ram.0,
    };
    assert_eq!(client.call(&vm, Request::SetRam, &mut map), 0);

    assert_eq!(client.call(&vm, Request::VcpuCreate, &mut 0_u32), 0);
    assert_eq!(client.call(&vm, Request::VcpuCreate, &mut 0_u32), -22);
    let vcpu = client.open(Node::Vcpu { vm: 0, vcpu: 0 });
    let mut tunnel = TunnelInfo::default();
    assert_eq!(client.call(&vcpu, Request::SetupTunnel, &mut tunnel), 0);
    assert_eq!(tunnel.size, 4096);

    let mut regs = VcpuState::new_zeroed();
    assert_eq!(client.call(&vcpu, Request::GetRegs, &mut regs), 0);
    assert_eq!((regs.rip, regs.cs.base), (0xfff0, 0xffff_0000));
    regs.rbx = 0x1234;
    assert_eq!(client.call(&vcpu, Request::SetRegs, &mut regs), 0);
    let mut fpu = FxLayout::default();
    assert_eq!(client.call(&vcpu, Request::GetFpu, &mut fpu), 0);
    assert_eq!(client.call(&vcpu, Request::SetFpu, &mut fpu), 0);
    let mut msrs = MsrData {
        nr_msr: 2,
        ..MsrData::default()
    };
    msrs.entries[0] = VmxMsr {
        entry: 0x174,
        value: 0x10,
    };
    msrs.entries[1].entry = 0xdead;
    assert_eq!(client.call(&vcpu, Request::SetMsrs, &mut msrs), 0);
    assert_eq!(msrs.done, 1);

    client.machine.script([
        Step::expect_gpr(3, 0x1234),
        Step::output(0x3f8, 1, 0x41),
        Step::hlt(),
    ]);
    assert_eq!(client.run(&vcpu, &tunnel), ExitStatus::Io);
    let mut data = [0; 1];
    client.process.peek(Hva(tunnel.io_va), &mut data);
    assert_eq!(data, [0x41]);
    assert_eq!(client.run(&vcpu, &tunnel), ExitStatus::Hlt);

    client.devices.close(vm);
    client.devices.close(vcpu);
    client.end();
}

#[test]
fn every_order_of_closing_gives_everything_back() {
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let client = Client::new(Profile::haswell());
        for round in 0..2 {
            assert_eq!(client.create_vm(), 0, "the id came back, round {round}");
            let vm = client.open(Node::Vm(0));
            let mut handles = vec![];
            for id in 0..3_u32 {
                assert_eq!(client.call(&vm, Request::VcpuCreate, &mut id.clone()), 0);
            }
            // The third is never opened.
            for vcpu in 0..2 {
                handles.push(Some(client.open(Node::Vcpu { vm: 0, vcpu })));
            }
            handles.push(Some(vm));
            for index in order {
                client.devices.close(handles[index].take().unwrap());
            }
        }
        client.end();
    }
}

#[test]
fn unload_takes_what_nobody_opened() {
    let client = Client::new(Profile::haswell());
    for id in 0..5 {
        assert_eq!(client.create_vm(), id);
    }
    client.end();
}

#[test]
fn ids_run_out_and_come_back() {
    let client = Client::new(Profile::haswell());
    for id in 0..64 {
        assert_eq!(client.create_vm(), id);
    }
    let system = client.open(Node::System);
    assert_eq!(client.call(&system, Request::CreateVm, &mut 0_u32), -12);
    client.devices.close(client.open(Node::Vm(17)));
    assert_eq!(client.create_vm(), 17);
    client.devices.close(system);
    client.end();
}

#[test]
fn another_process_is_refused() {
    let client = Client::new(Profile::haswell());
    let vm = client.open(Node::Vm(client.create_vm()));
    assert_eq!(client.call(&vm, Request::VcpuCreate, &mut 0_u32), 0);
    let vcpu = client.open(Node::Vcpu { vm: 0, vcpu: 0 });
    Process::new(&client.machine).enter(|| {
        for (handle, device) in [(&vm, Device::Vm), (&vcpu, Device::Vcpu)] {
            for request in Request::ALL.iter().filter(|r| r.device() == device) {
                let Some(number) = Os::Linux.number(*request) else {
                    continue;
                };
                let status = client.devices.ioctl(handle, number, client.argument.0);
                assert_eq!(status.code(), -13, "{request:?}");
            }
        }
    });
    client.devices.close(vm);
    client.devices.close(vcpu);
    client.end();
}

#[test]
fn machines_that_cannot_say_so() {
    let create_vm = |client: &Client| {
        let system = client.open(Node::System);
        let code = client.call(&system, Request::CreateVm, &mut 0_u32);
        client.devices.close(system);
        code
    };
    let client = Client::new(Profile::locked_off());
    assert_eq!(capability(&client), (2, 1), "not working: VT");
    assert_eq!(create_vm(&client), -12);
    client.end();

    let client = Client::new(Profile::no_unrestricted_guest());
    assert_eq!(capability(&client), (3, 0x3fb), "all but UG");
    assert_eq!(create_vm(&client), 0);
    client.end();

    // Without EPT the module works without VMs, or says that it does not.
    let client = Client::new(Profile::no_ept());
    let (status, info) = capability(&client);
    assert!(status & 1 == 0 && info == 1 || info & 1 == 0);
    assert_eq!(create_vm(&client), -12);
    client.end();

    let machine = Machine::new(Profile::no_vmx(), 1);
    assert!(Hypervisor::new(machine.host()).is_err());
    machine.assert_clean();
}
