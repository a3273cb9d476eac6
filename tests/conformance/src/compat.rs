//! System calls as a 32-bit program makes them, from this 64-bit one: by INT 80h, which the kernel takes for the 32-bit
//! table wherever it comes from. So the driver's `compat_ioctl` is called, and what it maps goes below 4 GB.
// UNSAFETY: system calls by hand.
#![expect(unsafe_code)]

use core::arch::asm;

use anyhow::Result;

use crate::client::{Answer, Node, Refused};
use crate::process::in_child;

/// Numbers of 32-bit Linux.
const IOCTL: u32 = 54;
const GETPID: u32 = 20;

/// A system call with three arguments; what the kernel returns, errors negative.
///
/// # Safety
/// As for the system call.
unsafe fn call(number: u32, arguments: [u32; 3]) -> i32 {
    let [first, second, third] = arguments.map(u64::from);
    let mut result = u64::from(number);
    // SAFETY: the caller's. RBX is the compiler's own and is exchanged. Kernels before 4.17 changed R8 to R11.
    unsafe {
        asm!(
            "xchg {first}, rbx",
            "int 0x80",
            "xchg {first}, rbx",
            first = inout(reg) first => _,
            inout("rax") result,
            in("rcx") second,
            in("rdx") third,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    result as i32
}

/// Whether this kernel takes such calls.
pub fn is_there() -> Result<bool> {
    let own = |number| {
        // SAFETY: asks for a number.
        let got = unsafe { call(number, [0; 3]) };
        u8::from(got > 0)
    };
    // Where it does not, INT 80h is a fault, and the child dies of it.
    Ok(in_child(|| own(GETPID)).is_ok_and(|code| code == 1))
}

/// A request with an argument below 4 GB.
pub fn request(node: &Node, number: u32, argument: u64) -> Answer<i32> {
    let argument = u32::try_from(argument).map_err(|_| Refused(libc::ERANGE))?;
    let fd = node.fd() as u32;
    // SAFETY: as in `Node::raw`.
    match unsafe { call(IOCTL, [fd, number, argument]) } {
        error @ ..0 => Err(Refused(-error)),
        done => Ok(done),
    }
}
