//! A shim and a core that record what they are asked, refuse on demand, and watch the rules the
//! device layer promises to keep.
// UNSAFETY: a lock for tests.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod client;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use abi::{CpuidEntry, FxLayout, MsrData, TunnelInfo, VcpuDebug, VcpuState};
use haxm_driver::{Capability, Core, CoreVcpu, CoreVm, Node, NodeFailed, Shim};
use vmx::Error;
use vmx::fallible::{NoMemory, Shared};
use vmx::host::UserFault;
use vmx::sync::{LockClass, RawLock};

/// Entries of the mock's CPUID table, as many as HAXM's.
pub(crate) const CPUID_ENTRIES: usize = 18;
/// The process that runs, unless a test says otherwise.
pub(crate) const OWNER: u32 = 100;
/// First address of the caller's memory.
pub(crate) const USER_BASE: u64 = 0x7000_0000;
/// Bytes of it.
pub(crate) const USER_SIZE: usize = 0x4000;

thread_local! {
    static LOCKS_HELD: Cell<u32> = const { Cell::new(0) };
}

/// A mutual exclusion that counts what a thread holds.
pub(crate) struct TestLock {
    taken: Mutex<bool>,
    freed: Condvar,
}

// SAFETY: `taken` is set by one thread at a time, under the standard mutex.
unsafe impl RawLock for TestLock {
    fn new(_: LockClass) -> Result<Self, NoMemory> {
        Ok(Self {
            taken: Mutex::new(false),
            freed: Condvar::new(),
        })
    }

    fn lock(&self) {
        assert_eq!(LOCKS_HELD.get(), 0, "the device layer has one lock");
        let mut taken = self.taken.lock().unwrap();
        while *taken {
            taken = self.freed.wait(taken).unwrap();
        }
        *taken = true;
        LOCKS_HELD.set(1);
    }

    unsafe fn unlock(&self) {
        *self.taken.lock().unwrap() = false;
        LOCKS_HELD.set(0);
        self.freed.notify_one();
    }
}

/// What the mocks know and have seen.
#[derive(Default)]
pub(crate) struct State {
    /// Calls that reached the core, in words.
    pub(crate) calls: Vec<String>,
    /// Nodes that exist.
    pub(crate) nodes: BTreeSet<String>,
    /// VMs and vCPUs that exist.
    pub(crate) vms: BTreeSet<u32>,
    pub(crate) vcpus: BTreeSet<(u32, u32)>,
    /// The next core call with this name fails so.
    pub(crate) refuse: Option<(&'static str, Error)>,
    /// The next creation of a VM's or vCPU's node fails.
    pub(crate) refuse_node: bool,
    /// The process that runs.
    pub(crate) process: u32,
    /// Processes that have ended.
    pub(crate) ended: BTreeSet<u32>,
    pub(crate) capability: Capability,
    /// The caller's memory.
    pub(crate) memory: Vec<u8>,
    /// Addresses copied in since the last `start_request`.
    pub(crate) copied_in: BTreeSet<u64>,
    /// MSR that the mock refuses.
    pub(crate) refused_msr: u64,
    /// Register values to read back.
    pub(crate) regs: BTreeMap<&'static str, u64>,
    pub(crate) memory_limit: Option<Option<u64>>,
}

/// Shared by shim, core and test.
#[derive(Clone)]
pub(crate) struct World(Arc<Mutex<State>>);

impl World {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(State {
            process: OWNER,
            memory: vec![0; USER_SIZE],
            refused_msr: u64::MAX,
            capability: Capability {
                refusal: None,
                ept: true,
                unrestricted_guest: true,
                memory_quota: Some(1 << 48),
            },
            ..State::default()
        })))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, name: &'static str, text: &str) -> Result<(), Error> {
        let mut state = self.state();
        if let Some((refused, error)) = state.refuse
            && refused == name
        {
            state.refuse = None;
            return Err(error);
        }
        state.calls.push(format!("{name}{text}"));
        Ok(())
    }

    /// The calls since the last time, and forgets them.
    pub(crate) fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.state().calls)
    }

    /// Puts bytes into the caller's memory.
    pub(crate) fn poke(&self, address: u64, bytes: &[u8]) {
        let at = usize::try_from(address - USER_BASE).unwrap();
        self.state().memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Bytes of the caller's memory.
    pub(crate) fn peek(&self, address: u64, length: usize) -> Vec<u8> {
        let at = usize::try_from(address - USER_BASE).unwrap();
        self.state().memory[at..at + length].to_vec()
    }

    /// A core for `Devices::load`.
    pub(crate) fn core(&self) -> Shared<MockCore> {
        Shared::new(MockCore {
            world: self.clone(),
        })
        .unwrap()
    }

    /// A shim for `Devices::load`.
    pub(crate) fn shim(&self) -> MockShim {
        MockShim {
            world: self.clone(),
        }
    }
}

/// The caller's memory as a range of the mock's, or a fault.
fn user_range(address: u64, length: usize) -> Result<std::ops::Range<usize>, UserFault> {
    let bad = UserFault::BadAddress;
    let start = usize::try_from(address.checked_sub(USER_BASE).ok_or(bad)?).map_err(|_| bad)?;
    let end = start.checked_add(length).ok_or(bad)?;
    (end <= USER_SIZE).then_some(start..end).ok_or(bad)
}

pub(crate) fn node_name(node: Node) -> String {
    match node {
        Node::System => "HAX".into(),
        Node::Vm(vm) => format!("vm{vm}"),
        Node::Vcpu { vm, vcpu } => format!("vm{vm}/vcpu{vcpu}"),
    }
}

pub(crate) struct MockShim {
    world: World,
}

impl Shim for MockShim {
    type Core = MockCore;
    type Mutex = TestLock;

    fn create_node(&self, node: Node) -> Result<(), NodeFailed> {
        assert_eq!(LOCKS_HELD.get(), 0, "create_node with a lock held");
        let mut state = self.world.state();
        if node != Node::System && std::mem::take(&mut state.refuse_node) {
            return Err(NodeFailed);
        }
        let name = node_name(node);
        assert!(!state.nodes.contains(&name), "{name} exists");
        state.nodes.insert(name);
        Ok(())
    }

    fn remove_node(&self, node: Node) {
        assert_eq!(LOCKS_HELD.get(), 0, "remove_node with a lock held");
        let name = node_name(node);
        assert!(self.world.state().nodes.remove(&name), "no {name}");
    }

    fn copy_in(&self, user: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        assert_eq!(LOCKS_HELD.get(), 0, "copy_in with a lock held");
        let range = user_range(user, bytes.len())?;
        let mut state = self.world.state();
        for address in user..user + bytes.len() as u64 {
            assert!(
                state.copied_in.insert(address),
                "{address:#x} is read twice"
            );
        }
        bytes.copy_from_slice(&state.memory[range]);
        Ok(())
    }

    fn copy_out(&self, user: u64, bytes: &[u8]) -> Result<(), UserFault> {
        assert_eq!(LOCKS_HELD.get(), 0, "copy_out with a lock held");
        let range = user_range(user, bytes.len())?;
        self.world.state().memory[range].copy_from_slice(bytes);
        Ok(())
    }
}

pub(crate) struct MockCore {
    world: World,
}

impl Core for MockCore {
    type Vm = MockVm;
    type Vcpu = MockVcpu;

    fn capability(&self) -> Capability {
        self.world.state().capability
    }

    fn set_memory_limit(&self, limit: Option<u64>) -> Result<(), Error> {
        let mut state = self.world.state();
        if !state.vms.is_empty() {
            return Err(Error::Busy);
        }
        state.memory_limit = Some(limit);
        Ok(())
    }

    fn create_vm(this: &Shared<Self>) -> Result<Shared<MockVm>, Error> {
        this.world.call("create_vm", "")?;
        let id = {
            let mut state = this.world.state();
            let id = (0..64)
                .find(|id| !state.vms.contains(id))
                .ok_or(Error::Limit)?;
            state.vms.insert(id);
            id
        };
        let owner = this.world.state().process;
        Ok(Shared::new(MockVm {
            world: this.world.clone(),
            id,
            owner,
        })?)
    }
}

pub(crate) struct MockVm {
    world: World,
    id: u32,
    owner: u32,
}

impl Drop for MockVm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        assert_eq!(LOCKS_HELD.get(), 0, "a VM dropped with a lock held");
        let mut state = self.world.state();
        state.vms.remove(&self.id);
        let node = node_name(Node::Vm(self.id));
        assert!(
            !state.nodes.contains(&node),
            "{node} outlives its VM, so the next VM {} cannot have one",
            self.id
        );
    }
}

impl CoreVm for MockVm {
    type Vcpu = MockVcpu;

    fn id(&self) -> u32 {
        self.id
    }

    fn check_owner(&self) -> Result<(), Error> {
        if self.world.state().process == self.owner {
            Ok(())
        } else {
            Err(Error::Denied)
        }
    }

    fn owner_has_ended(&self) -> bool {
        self.world.state().ended.contains(&self.owner)
    }

    fn create_vcpu(this: &Shared<Self>, id: u32) -> Result<Shared<MockVcpu>, Error> {
        if id >= 16 {
            return Err(Error::Limit);
        }
        this.world
            .call("create_vcpu", &format!(" {} {id}", this.id))?;
        if !this.world.state().vcpus.insert((this.id, id)) {
            return Err(Error::Busy);
        }
        Ok(Shared::new(MockVcpu {
            vm: this.clone(),
            id,
        })?)
    }

    fn add_ram_block(&self, va: u64, size: u64) -> Result<(), Error> {
        self.world
            .call("add_ram_block", &format!(" {va:#x} {size:#x}"))
    }

    fn set_ram(&self, gpa: u64, size: u64, va: u64, flags: u32) -> Result<(), Error> {
        self.world.call(
            "set_ram",
            &format!(" {gpa:#x} {size:#x} {va:#x} {flags:#x}"),
        )
    }

    fn protect_ram(&self, gpa: u64, size: u64, flags: u32) -> Result<(), Error> {
        self.world
            .call("protect_ram", &format!(" {gpa:#x} {size:#x} {flags:#x}"))
    }

    fn notify_version(&self, current: u32, least: u32) {
        let _ = self
            .world
            .call("notify_version", &format!(" {current} {least}"));
    }
}

pub(crate) struct MockVcpu {
    vm: Shared<MockVm>,
    id: u32,
}

impl Drop for MockVcpu {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        assert_eq!(LOCKS_HELD.get(), 0, "a vCPU dropped with a lock held");
        let mut state = self.vm.world.state();
        state.vcpus.remove(&(self.vm.id, self.id));
        let node = node_name(Node::Vcpu {
            vm: self.vm.id,
            vcpu: self.id,
        });
        assert!(!state.nodes.contains(&node), "{node} outlives its vCPU");
    }
}

impl MockVcpu {
    fn call(&self, name: &'static str, text: &str) -> Result<(), Error> {
        self.vm.world.call(name, text)
    }

    /// A call that cannot be refused.
    fn note(&self, name: &str, text: &str) {
        self.vm.world.state().calls.push(format!("{name}{text}"));
    }
}

/// The MSR the mock answers with: its index, mirrored.
pub(crate) const fn msr_value(entry: u64) -> u64 {
    !entry
}

impl CoreVcpu for MockVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn check_owner(&self) -> Result<(), Error> {
        self.vm.check_owner()
    }

    fn tunnel_info(&self) -> TunnelInfo {
        TunnelInfo {
            va: 0x1111_0000,
            io_va: 0x2222_0000,
            size: 4096,
            pad: [0; 3],
        }
    }

    fn run(&self) -> Result<(), Error> {
        self.call("run", "")
    }

    fn set_regs(&self, regs: &VcpuState) -> Result<(), Error> {
        self.call("set_regs", &format!(" {:#x} {:#x}", regs.rax, regs.cr4))
    }

    fn regs(&self) -> Result<VcpuState, Error> {
        self.call("regs", "")?;
        Ok(VcpuState {
            rip: 0xfff0,
            ..VcpuState::default()
        })
    }

    fn set_fpu(&self, fpu: &FxLayout) {
        self.note("set_fpu", &format!(" {:#x} {:#x}", fpu.fcw, fpu.pad[95]));
    }

    fn fpu(&self) -> FxLayout {
        self.note("fpu", "");
        FxLayout {
            mxcsr: 0x1f80,
            ..FxLayout::default()
        }
    }

    fn set_msrs(&self, msrs: &mut MsrData) -> Result<(), Error> {
        self.call("set_msrs", &format!(" {}", msrs.nr_msr))?;
        let refused = self.vm.world.state().refused_msr;
        let used = &msrs.entries[..usize::from(msrs.nr_msr)];
        let handled = used.iter().take_while(|msr| msr.entry != refused).count();
        msrs.done = u16::try_from(handled).unwrap();
        Ok(())
    }

    fn msrs(&self, msrs: &mut MsrData) -> Result<(), Error> {
        self.call("msrs", &format!(" {}", msrs.nr_msr))?;
        let refused = self.vm.world.state().refused_msr;
        msrs.done = 0;
        for msr in &mut msrs.entries[..usize::from(msrs.nr_msr)] {
            if msr.entry == refused {
                break;
            }
            msr.value = msr_value(msr.entry);
            msrs.done += 1;
        }
        Ok(())
    }

    fn interrupt(&self, vector: u8) {
        self.note("interrupt", &format!(" {vector}"));
    }

    fn set_debug(&self, debug: &VcpuDebug) -> Result<(), Error> {
        self.call(
            "set_debug",
            &format!(" {:#x} {:#x}", debug.control, debug.dr[7]),
        )
    }

    fn set_cpuid(&self, entries: &[CpuidEntry]) -> Result<(), Error> {
        let last = entries.last().map_or(0, |entry| entry.function);
        self.call("set_cpuid", &format!(" {} {last:#x}", entries.len()))
    }

    fn cpuid(&self, entries: &mut [CpuidEntry]) -> usize {
        self.note("cpuid", "");
        for (function, entry) in (0..).zip(entries.iter_mut().take(CPUID_ENTRIES)) {
            entry.function = function;
            entry.eax = !function;
        }
        CPUID_ENTRIES
    }

    fn kick(&self) {
        self.note("kick", "");
    }
}
