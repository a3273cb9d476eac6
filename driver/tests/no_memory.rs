//! Each allocation of each creation fails once; nothing is left behind.
// UNSAFETY: an allocator that refuses on demand.
#![allow(unsafe_code)]

mod mock;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use abi::{Device, Os, Request};
use haxm_driver::Node;
use mock::client::{Client, expect};

thread_local! {
    /// Allocations of this thread until one fails; negative: none does.
    static UNTIL_REFUSAL: Cell<i32> = const { Cell::new(-1) };
    /// Size from which an allocation counts.
    static REFUSED: Cell<bool> = const { Cell::new(false) };
}

struct Refusing;

// SAFETY: hands out what the system's allocator does, or null.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let left = UNTIL_REFUSAL.get();
        if left == 0 {
            REFUSED.set(true);
        }
        UNTIL_REFUSAL.set(left.max(0) - 1);
        if left == 0 {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: it came from the system allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

/// Runs `attempt` with its first allocation refused, then its second, and so
/// on until none is; returns how many there were.
fn refuse_each(mut attempt: impl FnMut() -> bool) -> u32 {
    for refused in 0..100 {
        UNTIL_REFUSAL.set(refused);
        REFUSED.set(false);
        let done = attempt();
        UNTIL_REFUSAL.set(-1);
        if !REFUSED.get() {
            assert!(done, "nothing was refused, yet it failed");
            return u32::try_from(refused).unwrap();
        }
        assert!(!done, "allocation {refused} was refused without effect");
    }
    panic!("always refused");
}

#[test]
fn opening_is_all_or_nothing() {
    let client = Client::new(Os::Linux);
    let mut handles = client.one_of(Device::Vm);
    assert_eq!(client.create_vcpu(&handles[0], 0), 0);
    for node in [Node::System, Node::Vcpu { vm: 0, vcpu: 0 }] {
        let mut opened = None;
        let allocations = refuse_each(|| {
            let result = client.devices.open(node);
            if let Err(status) = &result {
                assert_eq!(status.code(), expect(Os::Linux, -12, -12, 0));
            }
            opened = result.ok();
            opened.is_some()
        });
        assert_eq!(allocations, 1);
        handles.push(opened.unwrap());
    }
    assert_eq!(client.devices.open_handles(), 4);
    client.end(handles);
}

#[test]
fn cpuid_requests_say_so() {
    let client = Client::new(Os::Windows);
    let handles = client.one_of(Device::Vcpu);
    let number = Os::Windows.number(Request::SetCpuid).unwrap();
    let mut buffer = [0_u8; 48];
    buffer[0] = 1;
    UNTIL_REFUSAL.set(0);
    let (status, bytes) = client
        .devices
        .ioctl_buffered(&handles[0], number, &mut buffer, 48, 48);
    UNTIL_REFUSAL.set(-1);
    assert_eq!((status.code() as u32, bytes), (0xc000_0001, 0));
    assert!(client.world.take_calls().is_empty());
    client.end(handles);
}
