//! The devices of one loaded module: load and unload, open and close, and the three entry points
//! for requests.

use core::sync::atomic::{AtomicU32, Ordering};

use abi::{Device, Os, Request};
use vmx::fallible::{NoMemory, Shared};
use vmx::sync::{Lock, LockClass};

use crate::argument::{Argument, BufferedArgument, CopiedArgument, UserArgument};
use crate::hypervisor::{Core, CoreVcpu, CoreVm};
use crate::shim::{Node, Shim};
use crate::status::{Doing, Failure, Status, status};
use crate::table::{NotOpened, Table};
use crate::{system, vcpu, vm};

/// The devices could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadError {
    /// No memory.
    NoMemory,
    /// No system node.
    Node,
}

/// What an open node stands for.
pub(crate) enum Object<C: Core> {
    System,
    Vm(Shared<C::Vm>),
    Vcpu { vm: u32, vcpu: Shared<C::Vcpu> },
}

/// An open node.
pub struct Handle<S: Shim>(Object<S::Core>);

/// An open node, as the shim keeps it with the file. Give it to
/// [`Devices::close`]; merely dropping it leaves the node open for ever.
pub type Opened<S> = Shared<Handle<S>>;

impl<S: Shim> Handle<S> {
    /// The node that was opened.
    #[must_use]
    pub fn node(&self) -> Node {
        match &self.0 {
            Object::System => Node::System,
            Object::Vm(vm) => Node::Vm(vm.id()),
            Object::Vcpu { vm, vcpu } => Node::Vcpu {
                vm: *vm,
                vcpu: vcpu.id(),
            },
        }
    }
}

/// The devices of one loaded module.
pub struct Devices<S: Shim> {
    pub(crate) shim: S,
    pub(crate) core: Shared<S::Core>,
    /// Use [`Devices::os`].
    os: Os,
    /// The number of RUN.
    run: u32,
    table: Lock<S::Mutex, Table<S::Core>>,
    handles: AtomicU32,
    system_handles: AtomicU32,
}

impl<S: Shim> Devices<S> {
    /// Makes the system node, which can be opened from then on: call this
    /// last. `os` picks request numbers and status codes.
    ///
    /// # Errors
    /// See [`LoadError`]; nothing is left behind.
    pub fn load(shim: S, core: Shared<S::Core>, os: Os) -> Result<Self, LoadError> {
        let table =
            Lock::new(LockClass::Devices, Table::new()).map_err(|NoMemory| LoadError::NoMemory)?;
        shim.create_node(Node::System)
            .map_err(|_| LoadError::Node)?;
        Ok(Self {
            shim,
            core,
            os,
            // A system without it has no such number either.
            run: os.number(Request::Run).unwrap_or(u32::MAX),
            table,
            handles: AtomicU32::new(0),
            system_handles: AtomicU32::new(0),
        })
    }

    pub(crate) fn os(&self) -> Os {
        S::OS.unwrap_or(self.os)
    }

    /// The core behind the devices.
    #[must_use]
    pub fn core(&self) -> &Shared<S::Core> {
        &self.core
    }

    /// The shim below the devices.
    #[must_use]
    pub fn shim(&self) -> &S {
        &self.shim
    }

    /// Nodes that are open now. Unload only at 0.
    #[must_use]
    pub fn open_handles(&self) -> u32 {
        self.handles.load(Ordering::Acquire)
    }

    /// System nodes that are open now.
    pub(crate) fn system_handles(&self) -> u32 {
        self.system_handles.load(Ordering::Acquire)
    }

    /// Removes all nodes, and the VMs and vCPUs that nobody has opened. Call
    /// it when nothing is open and nothing can be opened.
    pub fn unload(&self) {
        self.shim.remove_node(Node::System);
        let mut reclaimed = 0_u32;
        loop {
            let taken = self.table.lock().take_any_vcpu();
            let Some((vm, vcpu, object)) = taken else {
                break;
            };
            self.discard(Node::Vcpu { vm, vcpu }, object);
            reclaimed = reclaimed.saturating_add(1);
        }
        loop {
            let taken = self.table.lock().take_any_vm();
            let Some((vm, object)) = taken else {
                break;
            };
            self.discard(Node::Vm(vm), object);
            reclaimed = reclaimed.saturating_add(1);
        }
        if reclaimed != 0 {
            log::info!("unload: {reclaimed} VMs and vCPUs that nobody had opened");
        }
    }

    /// Opens a node.
    ///
    /// # Errors
    /// No such VM or vCPU; opened before; made by another process; no memory.
    pub fn open(&self, node: Node) -> Result<Opened<S>, Status> {
        let opened = match node {
            Node::System => self.open_system(),
            Node::Vm(id) => self.open_vm(id),
            Node::Vcpu { vm, vcpu } => self.open_vcpu(vm, vcpu),
        };
        match opened {
            Ok(opened) => {
                count(&self.handles);
                Ok(opened)
            }
            Err(failure) => Err(status(self.os(), Doing::Open, failure)),
        }
    }

    fn open_system(&self) -> Result<Opened<S>, Failure> {
        let opened = Shared::new(Handle(Object::System))?;
        count(&self.system_handles);
        Ok(opened)
    }

    fn open_vm(&self, id: u32) -> Result<Opened<S>, Failure> {
        let mut table = self.table.lock();
        let vm = table.unopened_vm(id)?;
        vm.check_owner()?;
        let opened = Shared::new(Handle(Object::Vm(vm)))?;
        table.vm_opened(id);
        Ok(opened)
    }

    fn open_vcpu(&self, vm: u32, id: u32) -> Result<Opened<S>, Failure> {
        let mut table = self.table.lock();
        let vcpu = table.unopened_vcpu(vm, id)?;
        vcpu.check_owner()?;
        let opened = Shared::new(Handle(Object::Vcpu { vm, vcpu }))?;
        table.vcpu_opened(vm, id);
        Ok(opened)
    }

    /// Closes a node, after the last request on it has returned. A vCPU ends
    /// here. A VM ends with the last of its own handle and its vCPUs'; vCPUs
    /// of it that nobody has opened end with its own handle.
    pub fn close(&self, opened: Opened<S>) {
        match &opened.0 {
            Object::System => discount(&self.system_handles),
            Object::Vm(vm) => self.close_vm(vm.id()),
            Object::Vcpu { vm, vcpu } => self.close_vcpu(*vm, vcpu.id()),
        }
        // The object ends here, its node gone before.
        drop(opened);
        discount(&self.handles);
    }

    fn close_vm(&self, id: u32) {
        self.table.lock().vm_closed(id);
        loop {
            let taken = self.table.lock().take_unopened_vcpu(id);
            let Some((vcpu, object)) = taken else {
                break;
            };
            self.discard(Node::Vcpu { vm: id, vcpu }, object);
        }
        self.finish_vm(id);
    }

    fn close_vcpu(&self, vm: u32, id: u32) {
        let taken = self.table.lock().take_vcpu(vm, id);
        if let Some(vcpu) = taken {
            self.discard(Node::Vcpu { vm, vcpu: id }, vcpu);
        }
        self.finish_vm(vm);
    }

    fn finish_vm(&self, id: u32) {
        let taken = self.table.lock().take_finished_vm(id);
        if let Some(vm) = taken {
            self.discard(Node::Vm(id), vm);
        }
    }

    /// Removes a node, and only then gives up its object and so its id.
    fn discard<T>(&self, node: Node, object: Shared<T>) {
        self.shim.remove_node(node);
        drop(object);
    }

    /// Ends the VMs that nobody opened while their owners lived: otherwise whoever is killed between the two
    /// requests takes an id away for ever.
    fn end_orphans(&self) {
        loop {
            let taken = self.table.lock().take_orphan();
            let Some((id, vm)) = taken else {
                break;
            };
            self.discard(Node::Vm(id), vm);
        }
    }

    /// Makes a VM and its node; the id.
    pub(crate) fn create_vm(&self) -> Result<u32, Failure> {
        self.end_orphans();
        let vm = Core::create_vm(&self.core)?;
        let id = vm.id();
        if id >= self.os().max_vms() {
            return Err(Failure::NoMemory);
        }
        self.shim
            .create_node(Node::Vm(id))
            .map_err(|_| Failure::NoMemory)?;
        let added = self.table.lock().add_vm(id, vm.clone());
        if added.is_err() {
            self.discard(Node::Vm(id), vm);
            return Err(Failure::NoMemory);
        }
        Ok(id)
    }

    /// Undoes `create_vm`, unless somebody has opened the VM.
    pub(crate) fn undo_create_vm(&self, id: u32) {
        let taken = self.table.lock().take_unopened_vm(id);
        if let Some(vm) = taken {
            self.discard(Node::Vm(id), vm);
        }
    }

    /// Makes a vCPU of an open VM, and its node.
    pub(crate) fn create_vcpu(
        &self,
        vm: &Shared<<S::Core as Core>::Vm>,
        id: u32,
    ) -> Result<(), Failure> {
        let vcpu = CoreVm::create_vcpu(vm, id)?;
        let node = Node::Vcpu {
            vm: vm.id(),
            vcpu: id,
        };
        self.shim.create_node(node).map_err(|_| Failure::NoMemory)?;
        let added = self.table.lock().add_vcpu(vm.id(), id, vcpu.clone());
        if added.is_err() {
            self.discard(node, vcpu);
            return Err(Failure::NoMemory);
        }
        Ok(())
    }

    /// A request whose argument is an address in the caller, or nothing.
    #[cfg_attr(haxm_module, optimize(speed))]
    pub fn ioctl(&self, opened: &Opened<S>, number: u32, argument: u64) -> Status {
        // Far more often than all others together.
        if number == self.run {
            if let Object::Vcpu { vcpu, .. } = &opened.0 {
                return match vcpu::run(&**vcpu) {
                    Ok(()) => Status::DONE,
                    Err(failure) => self.run_failed(failure),
                };
            }
        }
        self.ioctl_by_address(opened, number, argument)
    }

    #[cold]
    fn run_failed(&self, failure: Failure) -> Status {
        let run = Doing::Request(Device::Vcpu, Some(Request::Run));
        status(self.os(), run, failure)
    }

    #[inline(never)]
    fn ioctl_by_address(&self, opened: &Opened<S>, number: u32, argument: u64) -> Status {
        let mut argument = UserArgument {
            shim: &self.shim,
            address: argument,
        };
        self.dispatch(opened, number, &mut argument)
    }

    /// A request whose argument the system has copied to `data`, and copies
    /// back if the result is [`Status::DONE`]. CPUID tables are still copied
    /// through the shim, since the argument is only their address.
    pub fn ioctl_copied(&self, opened: &Opened<S>, number: u32, data: &mut [u8]) -> Status {
        self.dispatch(opened, number, &mut CopiedArgument(data))
    }

    /// A request whose argument is in one buffer for both directions, of
    /// which the caller gave `given` bytes and takes back at most `room`.
    /// Returns the status and how many bytes from the start to give back.
    pub fn ioctl_buffered(
        &self,
        opened: &Opened<S>,
        number: u32,
        buffer: &mut [u8],
        given: usize,
        room: usize,
    ) -> (Status, usize) {
        let mut argument = BufferedArgument::new(buffer, given, room);
        let status = self.dispatch(opened, number, &mut argument);
        let bytes = if status.is_done() {
            argument.written()
        } else {
            0
        };
        (status, bytes)
    }

    #[inline(always)]
    fn dispatch<A: Argument>(&self, opened: &Opened<S>, number: u32, argument: &mut A) -> Status {
        let device = match &opened.0 {
            Object::System => Device::System,
            Object::Vm(_) => Device::Vm,
            Object::Vcpu { .. } => Device::Vcpu,
        };
        let request = self.os().decode(device, number);
        let result = match (&opened.0, request.map(Request::canonical)) {
            (_, None) => Err(Failure::Unknown),
            (Object::System, Some(request)) => system::request(self, request, argument),
            (Object::Vm(vm), Some(request)) => vm::request(self, vm, request, argument),
            (Object::Vcpu { vcpu, .. }, Some(request)) => {
                vcpu::request(self, &**vcpu, request, number, argument)
            }
        };
        match result {
            Ok(()) => Status::DONE,
            Err(failure) => status(self.os(), Doing::Request(device, request), failure),
        }
    }
}

impl From<NotOpened> for Failure {
    fn from(why: NotOpened) -> Self {
        match why {
            NotOpened::Gone => Self::Gone,
            NotOpened::Before => Self::OpenedBefore,
        }
    }
}

fn count(counter: &AtomicU32) {
    counter.fetch_add(1, Ordering::AcqRel);
}

fn discount(counter: &AtomicU32) {
    counter.fetch_sub(1, Ordering::AcqRel);
}
