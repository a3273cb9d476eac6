//! The table of VMs and vCPUs that have a node, and who has opened them.
//!
//! An entry keeps its object alive. Taking an entry out hands the object to
//! the caller, who removes the node first and drops the object after, with no
//! lock held: only then may another object get the same id, and so the same
//! node name.

use alloc::vec::Vec;

use abi::{MAX_VCPUS, MAX_VMS};
use vmx::fallible::{NoMemory, Shared, TryPush};

use crate::hypervisor::{Core, CoreVm};

/// vCPUs of a VM.
const VCPU_SLOTS: usize = MAX_VCPUS as usize;
/// VMs.
const VM_SLOTS: usize = MAX_VMS as usize;

/// Whether the one open that an object has is spent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Never,
    Open,
    Closed,
}

struct VcpuEntry<C: Core> {
    vcpu: Shared<C::Vcpu>,
    used: Use,
}

struct VmEntry<C: Core> {
    vm: Shared<C::Vm>,
    used: Use,
    vcpus: [Option<VcpuEntry<C>>; VCPU_SLOTS],
}

/// Why an object cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotOpened {
    /// There is none.
    Gone,
    /// It has been opened before.
    Before,
}

/// VMs by id, and in each its vCPUs by id.
pub(crate) struct Table<C: Core> {
    vms: Vec<Option<VmEntry<C>>>,
}

impl<C: Core> Table<C> {
    pub(crate) const fn new() -> Self {
        Self { vms: Vec::new() }
    }

    fn entry(&mut self, vm: u32) -> Option<&mut VmEntry<C>> {
        self.vms.get_mut(usize::try_from(vm).ok()?)?.as_mut()
    }

    fn vcpu_slot(&mut self, vm: u32, vcpu: u32) -> Option<&mut Option<VcpuEntry<C>>> {
        let index = usize::try_from(vcpu).ok()?;
        self.entry(vm)?.vcpus.get_mut(index)
    }

    /// Enters a VM that nobody has opened.
    pub(crate) fn add_vm(&mut self, id: u32, vm: Shared<C::Vm>) -> Result<(), NoMemory> {
        let index = usize::try_from(id).map_err(|_| NoMemory)?;
        if index >= VM_SLOTS {
            return Err(NoMemory);
        }
        while self.vms.len() <= index {
            self.vms.try_push(None)?;
        }
        let slot = self.vms.get_mut(index).ok_or(NoMemory)?;
        *slot = Some(VmEntry {
            vm,
            used: Use::Never,
            vcpus: [const { None }; VCPU_SLOTS],
        });
        Ok(())
    }

    /// Enters a vCPU that nobody has opened.
    pub(crate) fn add_vcpu(
        &mut self,
        vm: u32,
        id: u32,
        vcpu: Shared<C::Vcpu>,
    ) -> Result<(), NoMemory> {
        let slot = self.vcpu_slot(vm, id).ok_or(NoMemory)?;
        *slot = Some(VcpuEntry {
            vcpu,
            used: Use::Never,
        });
        Ok(())
    }

    /// The VM, if it can be opened.
    pub(crate) fn unopened_vm(&mut self, id: u32) -> Result<Shared<C::Vm>, NotOpened> {
        let entry = self.entry(id).ok_or(NotOpened::Gone)?;
        match entry.used {
            Use::Never => Ok(entry.vm.clone()),
            Use::Open | Use::Closed => Err(NotOpened::Before),
        }
    }

    /// The vCPU, if it can be opened.
    pub(crate) fn unopened_vcpu(&mut self, vm: u32, id: u32) -> Result<Shared<C::Vcpu>, NotOpened> {
        let slot = self.vcpu_slot(vm, id).ok_or(NotOpened::Gone)?;
        let entry = slot.as_ref().ok_or(NotOpened::Gone)?;
        match entry.used {
            Use::Never => Ok(entry.vcpu.clone()),
            Use::Open | Use::Closed => Err(NotOpened::Before),
        }
    }

    /// The VM's one open is spent.
    pub(crate) fn vm_opened(&mut self, id: u32) {
        if let Some(entry) = self.entry(id) {
            entry.used = Use::Open;
        }
    }

    /// The vCPU's one open is spent.
    pub(crate) fn vcpu_opened(&mut self, vm: u32, id: u32) {
        if let Some(Some(entry)) = self.vcpu_slot(vm, id) {
            entry.used = Use::Open;
        }
    }

    /// The VM's handle is closed; it stays while it has vCPUs.
    pub(crate) fn vm_closed(&mut self, id: u32) {
        if let Some(entry) = self.entry(id) {
            entry.used = Use::Closed;
        }
    }

    /// Takes a vCPU out whose handle is closed, or that cannot be used.
    pub(crate) fn take_vcpu(&mut self, vm: u32, id: u32) -> Option<Shared<C::Vcpu>> {
        self.vcpu_slot(vm, id)?.take().map(|entry| entry.vcpu)
    }

    /// Takes some vCPU out that nobody has opened.
    pub(crate) fn take_unopened_vcpu(&mut self, vm: u32) -> Option<(u32, Shared<C::Vcpu>)> {
        take_vcpu_if(self.entry(vm)?, |used| used == Use::Never)
    }

    /// Takes a VM out that nobody has opened.
    pub(crate) fn take_unopened_vm(&mut self, id: u32) -> Option<Shared<C::Vm>> {
        self.take_vm_if(id, |entry| entry.used == Use::Never)
    }

    /// Takes some VM out that nobody has opened, and nobody will: its owner has ended. With its id.
    pub(crate) fn take_orphan(&mut self) -> Option<(u32, Shared<C::Vm>)> {
        let orphan = |entry: &VmEntry<C>| entry.used == Use::Never && entry.vm.owner_has_ended();
        (0..)
            .zip(self.vms.iter_mut())
            .find(|(_, slot)| slot.as_ref().is_some_and(orphan))
            .and_then(|(id, slot)| Some((id, slot.take()?.vm)))
    }

    /// Takes a VM out whose handle is closed and that has no vCPUs left.
    pub(crate) fn take_finished_vm(&mut self, id: u32) -> Option<Shared<C::Vm>> {
        self.take_vm_if(id, |entry| {
            entry.used == Use::Closed && entry.vcpus.iter().all(Option::is_none)
        })
    }

    fn take_vm_if(
        &mut self,
        id: u32,
        wanted: impl FnOnce(&VmEntry<C>) -> bool,
    ) -> Option<Shared<C::Vm>> {
        let slot = self.vms.get_mut(usize::try_from(id).ok()?)?;
        if !slot.as_ref().is_some_and(wanted) {
            return None;
        }
        slot.take().map(|entry| entry.vm)
    }

    /// Takes some vCPU out, whatever its use: its VM's id, its own, and itself.
    pub(crate) fn take_any_vcpu(&mut self) -> Option<(u32, u32, Shared<C::Vcpu>)> {
        (0..).zip(self.vms.iter_mut()).find_map(|(vm, entry)| {
            let (id, vcpu) = take_vcpu_if(entry.as_mut()?, |_| true)?;
            Some((vm, id, vcpu))
        })
    }

    /// Takes some VM out, whatever its use, with its id.
    pub(crate) fn take_any_vm(&mut self) -> Option<(u32, Shared<C::Vm>)> {
        (0..)
            .zip(self.vms.iter_mut())
            .find_map(|(id, slot)| Some((id, slot.take()?.vm)))
    }
}

fn take_vcpu_if<C: Core>(
    entry: &mut VmEntry<C>,
    wanted: impl Fn(Use) -> bool,
) -> Option<(u32, Shared<C::Vcpu>)> {
    (0..)
        .zip(entry.vcpus.iter_mut())
        .find(|(_, slot)| slot.as_ref().is_some_and(|vcpu| wanted(vcpu.used)))
        .and_then(|(id, slot)| Some((id, slot.take()?.vcpu)))
}
