//! Names of the device nodes.
//!
//! | | system | VM | vCPU |
//! |---|---|---|---|
//! | POSIX, below `/dev/` | `HAX` | `hax_vm/vmNN` | `hax_vmNN/vcpuMM` |
//! | Windows | `\Device\HAX` | `\Device\hax_vmNN` | `\Device\hax_vmNN_vcpuMM` |
//! | Windows, as a program opens it | `\\.\HAX` | `\\.\hax_vmNN` | `\\.\hax_vmNN_vcpuMM` |
//!
//! Numbers are decimal with at least two digits.

use crate::os::Os;

/// The system device: below `/dev/`, and in Windows' device and symbolic-link folders.
pub const SYSTEM: &str = "HAX";
/// Folder of the device nodes on POSIX hosts.
pub const POSIX_PREFIX: &str = "/dev/";
/// Folder of device objects on Windows.
pub const WINDOWS_DEVICE_PREFIX: &str = "\\Device\\";
/// Folder of the symbolic links on Windows, as the kernel spells it.
pub const WINDOWS_LINK_PREFIX: &str = "\\DosDevices\\";
/// The same as a program spells it.
pub const WINDOWS_USER_PREFIX: &str = "\\\\.\\";

/// Bytes of a [`NodeName`], NUL included. The longest name has two numbers of ten digits.
const CAPACITY: usize = 40;

/// A node's name without its folder, NUL-terminated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeName {
    bytes: [u8; CAPACITY],
    len: usize,
}

impl NodeName {
    const fn new() -> Self {
        Self {
            bytes: [0; CAPACITY],
            len: 0,
        }
    }

    fn text(self, text: &str) -> Self {
        self.bytes(text.as_bytes())
    }

    /// Appends bytes. What does not fit beside the NUL is dropped, which no caller here can reach.
    fn bytes(mut self, bytes: &[u8]) -> Self {
        for &byte in bytes {
            let next = self.len.wrapping_add(1);
            if next < CAPACITY {
                if let Some(place) = self.bytes.get_mut(self.len) {
                    *place = byte;
                    self.len = next;
                }
            }
        }
        self
    }

    /// Appends a number, decimal, at least two digits.
    fn number(self, number: u32) -> Self {
        let mut digits = [b'0'; 10];
        let mut rest = number;
        let mut used = 0_usize;
        for (place, digit) in digits.iter_mut().rev().enumerate() {
            if rest != 0 || place < 2 {
                // The remainder is below 10, so it fits and the sum stays below 0x3a.
                *digit = b'0'.wrapping_add((rest % 10) as u8);
                used = place.wrapping_add(1);
            }
            rest /= 10;
        }
        let start = digits.len().wrapping_sub(used);
        self.bytes(digits.get(start..).unwrap_or(&[]))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.bytes
            .get(..self.len)
            .and_then(|name| core::str::from_utf8(name).ok())
            .unwrap_or("")
    }

    /// The name and the NUL behind it, for a C caller.
    #[must_use]
    pub fn as_bytes_with_nul(&self) -> &[u8] {
        self.bytes.get(..=self.len).unwrap_or(&[0])
    }
}

/// Name of a VM's node, below the folder of [`Os`]'s nodes.
#[must_use]
pub fn vm(os: Os, vm: u32) -> NodeName {
    let name = NodeName::new();
    match os {
        Os::Linux | Os::Darwin | Os::NetBsd => name.text("hax_vm/vm").number(vm),
        Os::Windows => name.text("hax_vm").number(vm),
    }
}

/// Name of a vCPU's node, below the folder of [`Os`]'s nodes.
#[must_use]
pub fn vcpu(os: Os, vm: u32, vcpu: u32) -> NodeName {
    let name = NodeName::new().text("hax_vm").number(vm);
    match os {
        Os::Linux | Os::Darwin | Os::NetBsd => name.text("/vcpu").number(vcpu),
        Os::Windows => name.text("_vcpu").number(vcpu),
    }
}
