//! A client of the core, as the device layer is one: a VM with RAM and a vCPU,
//! and the tunnel as a process sees it.

use abi::tunnel::{ExitStatus, FastMmio, Tunnel, TunnelInfo};
use abi::vcpu_state::{SegmentDesc, VcpuState};
use vmx::arch::addr::Hva;
use vmx::fallible::Shared;
use vmx::{Error, Hypervisor, Vcpu, Vm};
use zerocopy::{FromBytes, IntoBytes};

use crate::host::SimHost;
use crate::machine::Machine;
use crate::step::Step;
use crate::user::Process;

/// Bytes of RAM that [`Client::new`] maps from guest address 0.
pub const RAM_SIZE: u64 = 0x20_0000;
/// Where [`Client::long_mode`] puts its page tables.
const TABLES: u64 = 0x10_0000;
/// Where the guest's code starts.
pub const CODE: u64 = 0x1000;

/// A VM with RAM at 0 and one vCPU, in the machine's own process.
pub struct Client {
    /// The vCPU.
    pub vcpu: Shared<Vcpu<SimHost>>,
    /// The VM.
    pub vm: Shared<Vm<SimHost>>,
    /// The hypervisor.
    pub hypervisor: Shared<Hypervisor<SimHost>>,
    /// The process.
    pub process: Process,
    /// Where the process has the guest's RAM.
    pub ram: Hva,
    /// The machine.
    pub machine: Machine,
}

impl Client {
    /// Makes all of it.
    ///
    /// # Panics
    /// If the core refuses.
    #[must_use]
    pub fn new(machine: &Machine) -> Self {
        let hypervisor = Hypervisor::new(machine.host()).expect("a hypervisor");
        let vm = hypervisor.create_vm().expect("a VM");
        let process = machine.process();
        let ram = process.map(RAM_SIZE);
        vm.add_ram_block(ram, RAM_SIZE).expect("a RAM block");
        vm.set_ram(0, RAM_SIZE, ram.0, 0).expect("RAM");
        let vcpu = Vm::create_vcpu(&vm, 0).expect("a vCPU");
        Self {
            vcpu,
            vm,
            hypervisor,
            process,
            ram,
            machine: machine.clone(),
        }
    }

    /// On a machine of its own, a [`Machine::haswell`], in protected mode.
    ///
    /// # Panics
    /// As [`Client::new`].
    #[must_use]
    pub fn protected() -> Self {
        let client = Self::new(&Machine::haswell());
        client.protected_mode();
        client
    }

    /// Writes guest RAM, as the client does.
    pub fn load(&self, gpa: u64, bytes: &[u8]) {
        self.process.poke(Hva(self.ram.0 + gpa), bytes);
    }

    /// Reads guest RAM, as the client does.
    #[must_use]
    pub fn bytes<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.process.peek(Hva(self.ram.0 + gpa), &mut bytes);
        bytes
    }

    /// The vCPU's tunnel.
    #[must_use]
    pub fn tunnel(&self) -> Tunnel {
        tunnel_of(&self.process, &self.vcpu.tunnel_info())
    }

    /// Writes the tunnel's 32-bit word at `offset`.
    pub fn set_tunnel(&self, offset: usize, value: u32) {
        let at = self.vcpu.tunnel_info().va + offset as u64;
        self.process.poke(Hva(at), &value.to_le_bytes());
    }

    /// The I/O buffer.
    #[must_use]
    pub fn io_buffer(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        self.process
            .peek(Hva(self.vcpu.tunnel_info().io_va), &mut bytes);
        bytes
    }

    /// Writes the I/O buffer from `offset`.
    pub fn set_io_buffer(&self, offset: usize, bytes: &[u8]) {
        let at = self.vcpu.tunnel_info().io_va + offset as u64;
        self.process.poke(Hva(at), bytes);
    }

    /// The fast-MMIO record.
    ///
    /// # Panics
    /// Never: the buffer is large enough.
    #[must_use]
    pub fn fast_mmio(&self) -> FastMmio {
        FastMmio::read_from_prefix(&self.io_buffer())
            .expect("64 bytes")
            .0
    }

    /// RUN with more steps for the guest.
    ///
    /// # Panics
    /// If RUN fails or leaves no status.
    pub fn run(&self, steps: impl IntoIterator<Item = Step>) -> ExitStatus {
        self.machine.script(steps);
        self.vcpu
            .run()
            .unwrap_or_else(|error| panic!("RUN: {error:?}; {:?}", self.machine.entry_failures()));
        self.tunnel().status().expect("an exit status")
    }

    /// RUN that must fail.
    ///
    /// # Panics
    /// If it does not.
    pub fn run_fails(&self, steps: impl IntoIterator<Item = Step>) -> Error {
        self.machine.script(steps);
        self.vcpu.run().expect_err("RUN must fail")
    }

    /// The registers.
    ///
    /// # Panics
    /// If the core refuses.
    #[must_use]
    pub fn regs(&self) -> VcpuState {
        self.vcpu.regs().expect("registers")
    }

    /// Changes registers.
    ///
    /// # Panics
    /// If the core refuses.
    pub fn change_regs(&self, change: impl FnOnce(&mut VcpuState)) {
        let mut state = self.regs();
        change(&mut state);
        self.vcpu.set_regs(&state).expect("registers");
    }

    /// Real mode at [`CODE`], segments at 0.
    pub fn real_mode(&self) {
        self.change_regs(|state| {
            state.cs.selector = 0;
            state.cs.base = 0;
            state.rip = CODE;
            state.rsp = 0x8000;
        });
    }

    /// 32-bit protected mode without paging at [`CODE`], flat segments.
    pub fn protected_mode(&self) {
        self.change_regs(|state| {
            state.cr0 = 0x11;
            state.rip = CODE;
            state.rsp = 0x8000;
            flat(state, 0xc09b);
        });
    }

    /// 64-bit mode at [`CODE`]: 2 MB identity pages for the first GB.
    ///
    /// # Panics
    /// If the core refuses.
    pub fn long_mode(&self) {
        let entry = |at: u64, value: u64| self.load(at, &value.to_le_bytes());
        entry(TABLES, (TABLES + 0x1000) | 3);
        entry(TABLES + 0x1000, (TABLES + 0x2000) | 3);
        for n in 0..512 {
            entry(TABLES + 0x2000 + n * 8, n << 21 | 0x83);
        }
        self.set_msr(0xc000_0080, 0x900);
        self.change_regs(|state| {
            state.cr3 = TABLES;
            state.cr4 = 0x20;
            state.cr0 = 0x8000_0011;
            state.rip = CODE;
            state.rsp = 0x8000;
            flat(state, 0xa09b);
            state.tr.ar = 0x8b;
        });
    }

    /// SET_MSRS of one register.
    ///
    /// # Panics
    /// If it is refused.
    pub fn set_msr(&self, number: u32, value: u64) {
        assert!(
            self.try_set_msr(number, value),
            "MSR {number:#x} = {value:#x}"
        );
    }

    /// SET_MSRS of one register; false if it is refused.
    ///
    /// # Panics
    /// If the request fails as a whole.
    #[must_use]
    pub fn try_set_msr(&self, number: u32, value: u64) -> bool {
        let mut data = abi::msr::MsrData {
            nr_msr: 1,
            ..Default::default()
        };
        data.entries[0].entry = u64::from(number);
        data.entries[0].value = value;
        self.vcpu.set_msrs(&mut data).expect("SET_MSRS");
        data.done == 1
    }

    /// GET_MSRS of one register.
    ///
    /// # Panics
    /// If the request fails as a whole.
    #[must_use]
    pub fn msr(&self, number: u32) -> Option<u64> {
        let mut data = abi::msr::MsrData {
            nr_msr: 1,
            ..Default::default()
        };
        data.entries[0].entry = u64::from(number);
        self.vcpu.msrs(&mut data).expect("GET_MSRS");
        (data.done == 1).then_some(data.entries[0].value)
    }

    /// Drops everything and checks that nothing is left.
    pub fn finish(self) {
        let Self {
            vcpu,
            vm,
            hypervisor,
            process,
            ram: _,
            machine,
        } = self;
        drop((vcpu, vm, hypervisor));
        drop(process);
        machine.assert_clean();
    }
}

/// The tunnel of any vCPU of a process.
#[must_use]
pub fn tunnel_of(process: &Process, info: &TunnelInfo) -> Tunnel {
    let mut tunnel = Tunnel::default();
    process.peek(Hva(info.va), tunnel.as_mut_bytes());
    tunnel
}

/// Flat segments; `code` is the access rights of CS.
fn flat(state: &mut VcpuState, code: u32) {
    let segment = |selector, ar| SegmentDesc {
        selector,
        limit: 0xffff_ffff,
        ar,
        ..SegmentDesc::default()
    };
    state.cs = segment(8, code);
    for data in [
        &mut state.ss,
        &mut state.ds,
        &mut state.es,
        &mut state.fs,
        &mut state.gs,
    ] {
        *data = segment(0x10, 0xc093);
    }
    state.tr.selector = 0x18;
    state.tr.limit = 0x67;
    state.tr.ar = 0x8b;
    state.ldt.ar = 0x1_0000;
}
