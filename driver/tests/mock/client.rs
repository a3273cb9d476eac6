//! A program on each of the four systems: it makes requests the way its system passes arguments.

use abi::{Device, Direction, Os, Request};
use haxm_driver::{Devices, Node, Opened};

use super::{MockShim, USER_BASE, World};

/// Where a POSIX program keeps the argument.
pub(crate) const ARGUMENT: u64 = USER_BASE + 0x100;
/// Where a POSIX program keeps its CPUID table.
pub(crate) const TABLE: u64 = USER_BASE + 0x1000;

/// A loaded module and a program on one system.
pub(crate) struct Client {
    pub(crate) os: Os,
    pub(crate) world: World,
    pub(crate) devices: Devices<MockShim>,
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) code: i32,
    /// The argument as the program sees it afterwards. For a CPUID request,
    /// the table. Windows: cut to what was given back.
    pub(crate) bytes: Vec<u8>,
}

impl Client {
    pub(crate) fn new(os: Os) -> Self {
        let world = World::new();
        let devices = Devices::load(world.shim(), world.core(), os).unwrap();
        Self { os, world, devices }
    }

    pub(crate) fn open(&self, node: Node) -> Opened<MockShim> {
        self.devices.open(node).unwrap()
    }

    pub(crate) fn open_error(&self, node: Node) -> i32 {
        match self.devices.open(node) {
            Ok(_) => 0,
            Err(status) => status.code(),
        }
    }

    /// Makes a request with these bytes as its argument.
    pub(crate) fn call(
        &self,
        opened: &Opened<MockShim>,
        request: Request,
        argument: &[u8],
    ) -> Answer {
        let number = self.os.number(request).expect("this system has it");
        self.world.state().copied_in.clear();
        let is_table = request.argument().direction == Direction::CpuidTable;
        match self.os {
            Os::Linux | Os::Darwin | Os::NetBsd if is_table => {
                self.world.poke(TABLE, argument);
                let pointer = TABLE.to_le_bytes();
                let code = self.call_posix(opened, number, &pointer).code;
                Answer {
                    code,
                    bytes: self.world.peek(TABLE, argument.len()),
                }
            }
            Os::Linux | Os::Darwin | Os::NetBsd => self.call_posix(opened, number, argument),
            Os::Windows => self.call_windows(opened, number, argument, argument.len()),
        }
    }

    fn call_posix(&self, opened: &Opened<MockShim>, number: u32, argument: &[u8]) -> Answer {
        if self.os == Os::Linux {
            self.world.poke(ARGUMENT, argument);
            let code = self.devices.ioctl(opened, number, ARGUMENT).code();
            return Answer {
                code,
                bytes: self.world.peek(ARGUMENT, argument.len()),
            };
        }
        let mut data = argument.to_vec();
        let code = self.devices.ioctl_copied(opened, number, &mut data).code();
        // The kernel copies back only when the request is done.
        let bytes = if code == 0 { data } else { argument.to_vec() };
        Answer { code, bytes }
    }

    pub(crate) fn call_windows(
        &self,
        opened: &Opened<MockShim>,
        number: u32,
        given: &[u8],
        room: usize,
    ) -> Answer {
        let mut buffer = given.to_vec();
        buffer.resize(given.len().max(room), 0xee);
        let (status, bytes) =
            self.devices
                .ioctl_buffered(opened, number, &mut buffer, given.len(), room);
        assert!(bytes <= room, "more is given back than there is room for");
        assert!(status.is_done() || bytes == 0);
        buffer.truncate(bytes);
        Answer {
            code: status.code(),
            bytes: buffer,
        }
    }

    /// Makes a VM through a fresh system handle; its id.
    pub(crate) fn create_vm(&self) -> u32 {
        let system = self.open(Node::System);
        let answer = self.call(&system, Request::CreateVm, &[0xee; 4]);
        assert_eq!(answer.code, 0);
        self.devices.close(system);
        u32::from_le_bytes(answer.bytes.try_into().unwrap())
    }

    /// Makes a vCPU.
    pub(crate) fn create_vcpu(&self, vm: &Opened<MockShim>, id: u32) -> i32 {
        self.call(vm, Request::VcpuCreate, &id.to_le_bytes()).code
    }

    /// An open handle of each device, the VM and vCPU made for it.
    pub(crate) fn one_of(&self, device: Device) -> Vec<Opened<MockShim>> {
        let mut handles = vec![self.open(Node::System)];
        if device != Device::System {
            let vm = self.create_vm();
            handles.insert(0, self.open(Node::Vm(vm)));
            if device == Device::Vcpu {
                assert_eq!(self.create_vcpu(&handles[0], 0), 0);
                handles.insert(0, self.open(Node::Vcpu { vm, vcpu: 0 }));
            }
        }
        self.world.take_calls();
        handles
    }

    /// Closes, unloads, and checks that nothing is left.
    pub(crate) fn end(self, handles: Vec<Opened<MockShim>>) {
        for handle in handles {
            self.devices.close(handle);
        }
        assert_eq!(self.devices.open_handles(), 0);
        self.devices.unload();
        let state = self.world.state();
        assert!(state.nodes.is_empty(), "nodes left: {:?}", state.nodes);
        assert!(state.vms.is_empty(), "VMs left: {:?}", state.vms);
        assert!(state.vcpus.is_empty(), "vCPUs left: {:?}", state.vcpus);
    }
}

/// What a system's programs get for each kind of failure.
pub(crate) fn expect(os: Os, linux: i32, bsd: i32, windows: u32) -> i32 {
    match os {
        Os::Linux => linux,
        Os::Darwin | Os::NetBsd => bsd,
        Os::Windows => windows as i32,
    }
}
