//! What an operating system's shim gives the device layer, beyond what it gives the core.

use abi::Os;
use vmx::host::UserFault;
use vmx::sync::RawLock;

use crate::hypervisor::Core;

/// A device node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// The system device.
    System,
    /// A VM, by its id.
    Vm(u32),
    /// A vCPU.
    Vcpu {
        /// Id of its VM.
        vm: u32,
        /// Its own id.
        vcpu: u32,
    },
}

/// The node could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeFailed;

/// The device side of an operating system.
///
/// No method is called with a lock of the device layer held, so a node's
/// creation may wait for an open in progress.
pub trait Shim: Send + Sync + 'static {
    /// The core behind the devices.
    type Core: Core;
    /// A lock that sleeps.
    type Mutex: RawLock;
    /// The system whose numbers and codes are used, if this shim is for one
    /// only: what is for others is then left out of the module.
    const OS: Option<Os> = None;

    /// Makes a node that programs can open when this returns. Its owner is
    /// the calling process. [`Node::System`] once, at load. May sleep.
    ///
    /// # Errors
    /// [`NodeFailed`]: no node was made.
    fn create_node(&self, node: Node) -> Result<(), NodeFailed>;

    /// Removes a node made before. Handles that are still open stay valid.
    /// Called from a close of this very node too. May sleep.
    fn remove_node(&self, node: Node);

    /// Copies from the calling process's memory at `user`. May sleep.
    ///
    /// # Errors
    /// See [`UserFault`]; `bytes` may be partly filled.
    fn copy_in(&self, user: u64, bytes: &mut [u8]) -> Result<(), UserFault>;

    /// Copies to the calling process's memory at `user`. May sleep.
    ///
    /// # Errors
    /// See [`UserFault`]; part of it may have been written.
    fn copy_out(&self, user: u64, bytes: &[u8]) -> Result<(), UserFault>;
}
