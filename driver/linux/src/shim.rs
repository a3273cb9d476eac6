//! What the device layer asks of Linux: nodes, and copies from and to the caller.

use abi::Os;
use driver::{Node, NodeFailed, Shim};
use vmx::Hypervisor;
use vmx::host::UserFault;

use crate::host::Linux;
use crate::lock::Mutex;
use crate::{ffi, user};

// HAXM_NODE_* of `haxm.h`.
const SYSTEM: u32 = 0;
const VM: u32 = 1;
const VCPU: u32 = 2;

/// A node as the C half names it.
fn numbers(node: Node) -> (u32, u32, u32) {
    match node {
        Node::System => (SYSTEM, 0, 0),
        Node::Vm(vm) => (VM, vm, 0),
        Node::Vcpu { vm, vcpu } => (VCPU, vm, vcpu),
    }
}

/// The node that the C half names so.
pub(crate) const fn node(kind: u32, vm: u32, vcpu: u32) -> Option<Node> {
    match kind {
        SYSTEM => Some(Node::System),
        VM => Some(Node::Vm(vm)),
        VCPU => Some(Node::Vcpu { vm, vcpu }),
        _ => None,
    }
}

impl Shim for Linux {
    type Core = Hypervisor<Self>;
    type Mutex = Mutex;
    const OS: Option<Os> = Some(Os::Linux);

    fn create_node(&self, node: Node) -> Result<(), NodeFailed> {
        let (kind, vm, vcpu) = numbers(node);
        match ffi::haxm_os_node_create(kind, vm, vcpu) {
            0 => Ok(()),
            error => {
                log::warn!("no device node for {node:?}: error {error}");
                Err(NodeFailed)
            }
        }
    }

    fn remove_node(&self, node: Node) {
        let (kind, vm, vcpu) = numbers(node);
        ffi::haxm_os_node_remove(kind, vm, vcpu);
    }

    fn copy_in(&self, user: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        user::copy_in(user, bytes)
    }

    fn copy_out(&self, user: u64, bytes: &[u8]) -> Result<(), UserFault> {
        user::copy_out(user, bytes)
    }
}
