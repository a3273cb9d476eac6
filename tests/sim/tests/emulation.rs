//! An instruction under way while the client holds its request.

use abi::tunnel::{ExitStatus, offset};
use sim::Step;
use sim::client::{CODE, Client};

/// Device memory.
const DEVICE: u64 = 0xd000_0000;
/// Where the fast-MMIO record has its value.
const VALUE: usize = 8;

/// PUSH of device memory: the stack is used only when the client has answered.
fn pushing() -> Client {
    let client = Client::protected();
    // push dword ptr [d0000000h]
    client.load(CODE, &[0xff, 0x35, 0, 0, 0, 0xd0]);
    let status = client.run([Step::read(DEVICE, 4, 0, 6)]);
    assert_eq!(status, ExitStatus::FastMmio);
    client
}

/// Answers, and lets the guest go on until it is stopped.
fn answer(client: &Client) {
    client.set_io_buffer(VALUE, &0x1122_3344u32.to_le_bytes());
    client.set_tunnel(offset::USER_EVENT_PENDING, 1);
    assert_eq!(client.run([]), ExitStatus::Interrupt);
}

#[test]
fn it_goes_on_with_the_registers_it_began_with() {
    let client = pushing();
    answer(&client);
    assert_eq!(client.bytes::<4>(0x7ffc), 0x1122_3344u32.to_le_bytes());
    assert_eq!(client.regs().rip, CODE + 6);
    client.finish();
}

/// SET_REGS that leaves RIP alone does not give the instruction up, and what it sets counts.
#[test]
fn it_goes_on_with_the_registers_the_client_set() {
    let client = pushing();
    client.change_regs(|state| state.ss.base = 0x1000);
    answer(&client);
    assert_eq!(client.bytes::<4>(0x8ffc), 0x1122_3344u32.to_le_bytes());
    assert_eq!(client.bytes::<4>(0x7ffc), [0; 4]);
    client.finish();
}
