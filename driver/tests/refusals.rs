//! Each way a request or an open is refused, and the number each system's program gets for it. A
//! request that fails has changed nothing.

mod mock;

use abi::zerocopy::IntoBytes;
use abi::{
    CpuidHeader, Device, Direction, MsrData, Os, ProtectRamInfo, RamblockInfo, Request,
    SetMemlimit, SetRamInfo2, VcpuState,
};
use haxm_driver::Node;
use mock::client::{Client, expect};
use mock::{OWNER, USER_BASE, USER_SIZE, World};
use vmx::Error;

const UNSUCCESSFUL: u32 = 0xc000_0001;
const INVALID_HANDLE: u32 = 0xc000_0008;
const INVALID_PARAMETER: u32 = 0xc000_000d;
const INVALID_DEVICE_REQUEST: u32 = 0xc000_0010;
const ACCESS_DENIED: u32 = 0xc000_0022;
const BUFFER_TOO_SMALL: u32 = 0xc000_0023;
const SHARING_VIOLATION: u32 = 0xc000_0043;

const DEVICES: [Device; 3] = [Device::System, Device::Vm, Device::Vcpu];

/// The device takes this request, and does something for it.
fn is_served(os: Os, request: Request) -> bool {
    let inert = matches!(request, Request::DestroyVm | Request::VcpuDestroy);
    os.number(request).is_some() && !inert
}

/// An argument that the layer accepts.
fn good_argument(request: Request) -> Vec<u8> {
    match request {
        Request::SetCpuid => {
            let mut table = vec![0; 48];
            table[0] = 1;
            table
        }
        Request::GetCpuid => {
            let mut table = vec![0; 8 + 18 * 40];
            table[0] = 18;
            table
        }
        _ => vec![0; request.argument().size as usize],
    }
}

fn call_name(request: Request) -> Option<&'static str> {
    Some(match request.canonical() {
        Request::CreateVm => "create_vm",
        Request::VcpuCreate => "create_vcpu",
        Request::AllocRam | Request::AddRamblock => "add_ram_block",
        Request::SetRam | Request::SetRam2 => "set_ram",
        Request::ProtectRam => "protect_ram",
        Request::Run => "run",
        Request::SetMsrs => "set_msrs",
        Request::GetMsrs => "msrs",
        Request::SetRegs => "set_regs",
        Request::GetRegs => "regs",
        Request::VcpuDebug => "set_debug",
        Request::SetCpuid => "set_cpuid",
        _ => return None,
    })
}

/// What the ABI gives for an error of the core.
fn code_of(os: Os, request: Request, error: Error) -> i32 {
    let posix = match (request.canonical(), error) {
        (_, Error::Denied) => -13,
        (Request::CreateVm, _) => -12,
        (Request::VcpuCreate, _) | (_, Error::Invalid | Error::NotWorking) => -22,
        (_, Error::NoMemory | Error::Limit) => -12,
        (_, Error::Busy) => -16,
        (_, Error::Fault) => -14,
        (_, Error::Interrupted) => -4,
        (_, Error::TooBig) => -7,
    };
    let windows = match (request, error) {
        (_, Error::Denied) => ACCESS_DENIED,
        (Request::SetRam | Request::SetRam2 | Request::ProtectRam, Error::Invalid) => {
            INVALID_PARAMETER
        }
        _ => UNSUCCESSFUL,
    };
    expect(os, posix, posix, windows)
}

#[test]
fn every_error_of_the_core_has_its_number() {
    let errors = [
        Error::Invalid,
        Error::NoMemory,
        Error::Busy,
        Error::Denied,
        Error::Limit,
        Error::NotWorking,
        Error::Fault,
        Error::Interrupted,
        Error::TooBig,
    ];
    for os in Os::ALL {
        for request in Request::ALL {
            let (true, Some(name)) = (is_served(os, request), call_name(request)) else {
                continue;
            };
            let client = Client::new(os);
            let handles = client.one_of(request.device());
            for error in errors {
                client.world.state().refuse = Some((name, error));
                let argument = good_argument(request);
                let answer = client.call(&handles[0], request, &argument);
                assert_eq!(
                    answer.code,
                    code_of(os, request, error),
                    "{os:?} {request:?} {error:?}"
                );
                if os != Os::Windows {
                    assert_eq!(answer.bytes, argument, "a refused request wrote something");
                }
                assert!(client.world.take_calls().is_empty());
                assert!(client.world.state().refuse.is_none(), "not reached");
            }
            client.end(handles);
        }
    }
}

#[test]
fn unknown_requests_are_refused_on_every_device() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        let handle_of = |device| match device {
            Device::Vcpu => &handles[0],
            Device::Vm => &handles[1],
            Device::System => &handles[2],
        };
        for device in DEVICES {
            let windows = match device {
                Device::System => INVALID_DEVICE_REQUEST,
                Device::Vm | Device::Vcpu => INVALID_PARAMETER,
            };
            let unknown = expect(os, -38, -78, windows);
            let strange = [0, 1, 0xc0, 0x5401, 0xc008_00ff, 0x4000_2448, u32::MAX];
            let other = Request::ALL.iter().filter_map(|&r| os.number(r));
            for number in strange.into_iter().chain(other) {
                if os.decode(device, number).is_some() {
                    continue;
                }
                let code = match os {
                    Os::Linux => client
                        .devices
                        .ioctl(handle_of(device), number, USER_BASE)
                        .code(),
                    Os::Darwin | Os::NetBsd => client
                        .devices
                        .ioctl_copied(handle_of(device), number, &mut [0; 520])
                        .code(),
                    Os::Windows => {
                        client
                            .call_windows(handle_of(device), number, &[0; 520], 520)
                            .code
                    }
                };
                assert_eq!(code, unknown, "{os:?} {device:?} {number:#x}");
            }
        }
        assert!(client.world.take_calls().is_empty());
        client.end(handles);
    }
}

#[test]
fn destroy_requests_do_nothing() {
    for os in Os::ALL {
        for request in [Request::DestroyVm, Request::VcpuDestroy] {
            if os.number(request).is_none() {
                continue;
            }
            let client = Client::new(os);
            let handles = client.one_of(request.device());
            let answer = client.call(&handles[0], request, &[0; 4]);
            assert_eq!(answer.code, expect(os, 0, -78, INVALID_PARAMETER));
            assert!(client.world.take_calls().is_empty());
            client.end(handles);
        }
    }
}

#[test]
fn another_process_can_only_close() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        assert_eq!(client.create_vcpu(&handles[1], 1), 0);
        let unopened = client.create_vm();
        client.world.take_calls();

        client.world.state().process = OWNER + 1;
        let denied = expect(os, -13, -13, ACCESS_DENIED);
        for request in Request::ALL {
            if os.number(request).is_none() || request.device() == Device::System {
                continue;
            }
            let handle = usize::from(request.device() == Device::Vm);
            let answer = client.call(&handles[handle], request, &good_argument(request));
            assert_eq!(answer.code, denied, "{os:?} {request:?}");
        }
        assert_eq!(client.open_error(Node::Vcpu { vm: 0, vcpu: 1 }), denied);
        assert_eq!(client.open_error(Node::Vm(unopened)), denied);
        assert!(client.world.take_calls().is_empty());

        // The refused opens have not spent the one open.
        client.world.state().process = OWNER;
        let vcpu = client.open(Node::Vcpu { vm: 0, vcpu: 1 });
        let vm = client.open(Node::Vm(unopened));
        client.world.state().process = OWNER + 1;
        client.devices.close(vcpu);
        client.devices.close(vm);
        client.end(handles);
    }
}

#[test]
fn reserved_fields_must_be_zero() {
    let block = RamblockInfo {
        start_va: 0x1000,
        size: 0x1000,
        reserved: 1 << 63,
    };
    let first = SetRamInfo2 {
        size: 0x1000,
        reserved1: 1,
        ..SetRamInfo2::default()
    };
    let second = SetRamInfo2 {
        size: 0x1000,
        reserved2: 1 << 40,
        ..SetRamInfo2::default()
    };
    let protect = ProtectRamInfo {
        size: 0x1000,
        reserved: 1,
        ..ProtectRamInfo::default()
    };
    let cases = [
        (Request::AddRamblock, block.as_bytes()),
        (Request::SetRam2, first.as_bytes()),
        (Request::SetRam2, second.as_bytes()),
        (Request::ProtectRam, protect.as_bytes()),
    ];
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vm);
        for (request, argument) in cases {
            let answer = client.call(&handles[0], request, argument);
            let invalid = expect(os, -22, -22, INVALID_PARAMETER);
            assert_eq!(answer.code, invalid, "{os:?} {request:?}");
            assert!(client.world.take_calls().is_empty());
        }
        client.end(handles);
    }
}

#[test]
fn more_than_31_msrs_are_refused() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        for request in [Request::SetMsrs, Request::GetMsrs] {
            for nr_msr in [32, 33, 0xff, 0x8000, 0xffff] {
                let argument = MsrData {
                    nr_msr,
                    ..MsrData::default()
                };
                let answer = client.call(&handles[0], request, argument.as_bytes());
                assert_eq!(answer.code, expect(os, -14, -14, INVALID_PARAMETER));
            }
        }
        assert!(client.world.take_calls().is_empty());
        client.end(handles);
    }
}

#[test]
fn a_cpuid_table_has_1_to_64_entries() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        for total in [0_u32, 65, 66, 0x1_0000, 0x1999_999a, u32::MAX] {
            let mut table = CpuidHeader { total, pad: 0 }.as_bytes().to_vec();
            table.resize(8 + 40 * 66, 0);
            let answer = client.call(&handles[0], Request::SetCpuid, &table);
            let posix = if total == 0 { -22 } else { -7 };
            let windows = if total <= 66 {
                UNSUCCESSFUL
            } else {
                INVALID_PARAMETER
            };
            assert_eq!(answer.code, expect(os, posix, posix, windows), "{total}");
        }
        assert!(client.world.take_calls().is_empty());
        client.end(handles);
    }
}

#[test]
fn the_memory_limit_cannot_change_under_a_vm_or_wrap() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vm);
        let set = |memory_limit: u64| {
            let limit = SetMemlimit {
                enable_memlimit: 1,
                pad: [0; 7],
                memory_limit,
            };
            client
                .call(&handles[1], Request::SetMemlimit, limit.as_bytes())
                .code
        };
        assert_eq!(set(1), expect(os, -22, -22, UNSUCCESSFUL));
        assert_eq!(client.world.state().memory_limit, None);
        client.end(handles);

        let client = Client::new(os);
        let handles = client.one_of(Device::System);
        let limit = SetMemlimit {
            enable_memlimit: 1,
            pad: [0; 7],
            memory_limit: 1 << 44,
        };
        let answer = client.call(&handles[0], Request::SetMemlimit, limit.as_bytes());
        assert_eq!(answer.code, expect(os, -22, -22, INVALID_PARAMETER));
        assert_eq!(client.world.state().memory_limit, None);
        client.end(handles);
    }
}

#[test]
fn nodes_that_are_gone_or_spent_do_not_open() {
    for os in Os::ALL {
        let client = Client::new(os);
        let gone = expect(os, -19, -19, INVALID_HANDLE);
        let busy = expect(os, -16, -16, SHARING_VIOLATION);
        for node in [
            Node::Vm(0),
            Node::Vm(63),
            Node::Vm(64),
            Node::Vm(u32::MAX),
            Node::Vcpu { vm: 0, vcpu: 0 },
            Node::Vcpu {
                vm: u32::MAX,
                vcpu: u32::MAX,
            },
        ] {
            assert_eq!(client.open_error(node), gone);
        }
        let handles = client.one_of(Device::Vcpu);
        for vcpu in [1, 15, 16, u32::MAX] {
            assert_eq!(client.open_error(Node::Vcpu { vm: 0, vcpu }), gone);
        }
        assert_eq!(client.open_error(Node::Vm(0)), busy);
        assert_eq!(client.open_error(Node::Vcpu { vm: 0, vcpu: 0 }), busy);
        assert_eq!(client.world.state().vms.len(), 1);
        client.end(handles);
    }
}

/// All requests of a POSIX system with an argument, and its size.
fn pointed(os: Os) -> impl Iterator<Item = (Request, u32, u64)> {
    Request::ALL.into_iter().filter_map(move |request| {
        let size = u64::from(request.argument().size);
        let wanted = is_served(os, request) && size != 0;
        wanted.then(|| (request, os.number(request).unwrap(), size))
    })
}

#[test]
fn bad_pointers_fault_and_leave_nothing() {
    for (request, number, size) in pointed(Os::Linux) {
        let end = USER_BASE + USER_SIZE as u64;
        let bad = [
            0,
            1,
            USER_BASE - 1,
            end - size + 1,
            end - 1,
            end,
            1 << 47,
            1 << 63,
            u64::MAX - size + 2,
            u64::MAX - 7,
            u64::MAX,
        ];
        let client = Client::new(Os::Linux);
        let handles = client.one_of(request.device());
        let before = snapshot(&client.world);
        for address in bad {
            client.world.state().copied_in.clear();
            let status = client.devices.ioctl(&handles[0], number, address);
            assert_eq!(status.code(), -14, "{request:?} {address:#x}");
            let done: Vec<_> = client
                .world
                .take_calls()
                .into_iter()
                // What only asks, or is undone.
                .filter(|call| !["regs", "fpu", "create_vm"].contains(&call.as_str()))
                .collect();
            assert!(done.is_empty(), "{request:?} {address:#x}: {done:?}");
            assert!(
                snapshot(&client.world) == before,
                "{request:?} {address:#x}"
            );
        }
        client.end(handles);
    }
}

type Snapshot = (Vec<String>, Vec<u32>, Vec<(u32, u32)>, Vec<u8>);

/// Nodes, VMs, vCPUs and the caller's memory.
fn snapshot(world: &World) -> Snapshot {
    let state = world.state();
    (
        state.nodes.iter().cloned().collect(),
        state.vms.iter().copied().collect(),
        state.vcpus.iter().copied().collect(),
        state.memory.clone(),
    )
}

#[test]
fn a_bad_cpuid_pointer_behind_a_good_one_faults() {
    let end = USER_BASE + USER_SIZE as u64;
    for os in [Os::Linux, Os::Darwin] {
        for request in [Request::SetCpuid, Request::GetCpuid] {
            let client = Client::new(os);
            let handles = client.one_of(Device::Vcpu);
            // Room for the header and all but the last byte of what it counts.
            let edge = end - (8 + 40 * 18) + 1;
            let mut header = [0_u8; 8];
            header[0] = 18;
            client.world.poke(edge, &header);
            client.world.poke(end - 8, &header);
            for address in [
                0,
                USER_BASE - 1,
                edge,
                end - 8,
                end - 7,
                end,
                u64::MAX - 8,
                u64::MAX,
            ] {
                client.world.state().copied_in.clear();
                let argument = address.to_le_bytes();
                let number = os.number(request).unwrap();
                let code = if os == Os::Linux {
                    client.world.poke(mock::client::ARGUMENT, &argument);
                    let at = mock::client::ARGUMENT;
                    client.devices.ioctl(&handles[0], number, at).code()
                } else {
                    let mut data = argument;
                    let devices = &client.devices;
                    devices.ioctl_copied(&handles[0], number, &mut data).code()
                };
                assert_eq!(code, -14, "{os:?} {request:?} {address:#x}");
                let calls = client.world.take_calls();
                assert!(calls.iter().all(|call| call == "cpuid"), "{calls:?}");
            }
            client.end(handles);
        }
    }
}

#[test]
fn short_kernel_copies_are_refused() {
    for os in [Os::Darwin, Os::NetBsd] {
        for (request, number, size) in pointed(os) {
            let client = Client::new(os);
            let handles = client.one_of(request.device());
            for length in 0..usize::try_from(size).unwrap() {
                let mut data = vec![0xee; length];
                let status = client.devices.ioctl_copied(&handles[0], number, &mut data);
                assert_eq!(status.code(), -14, "{os:?} {request:?} {length}");
                assert!(data.iter().all(|&byte| byte == 0xee));
            }
            assert_eq!(client.world.state().vms.len(), handles.len().min(2) - 1);
            client.end(handles);
        }
    }
}

#[test]
fn short_windows_buffers_are_refused() {
    for request in Request::ALL {
        if !is_served(Os::Windows, request) {
            continue;
        }
        let number = Os::Windows.number(request).unwrap();
        let client = Client::new(Os::Windows);
        let handles = client.one_of(request.device());
        let (reads, writes) = match request.argument().direction {
            Direction::None => (false, false),
            Direction::In => (true, false),
            Direction::Out => (false, true),
            Direction::InOut => (true, true),
            Direction::CpuidTable => (true, request == Request::GetCpuid),
        };
        let argument = good_argument(request);
        let full = argument.len();
        let refused = if request == Request::CreateVm {
            BUFFER_TOO_SMALL
        } else {
            INVALID_PARAMETER
        };
        // GET_CPUID needs only the header to be given.
        let needed = if request == Request::GetCpuid {
            8
        } else {
            full
        };
        if reads {
            for given in 0..needed {
                let answer = client.call_windows(&handles[0], number, &argument[..given], full);
                assert_eq!(answer.code, refused as i32, "{request:?} given {given}");
            }
        }
        if writes {
            for room in 0..full {
                let answer = client.call_windows(&handles[0], number, &argument, room);
                assert_eq!(answer.code, refused as i32, "{request:?} room {room}");
            }
        }
        let changed: Vec<_> = client
            .world
            .take_calls()
            .into_iter()
            .filter(|call| !["regs", "fpu", "cpuid"].contains(&call.as_str()))
            .collect();
        assert!(changed.is_empty(), "{request:?}: {changed:?}");
        let room = if writes { full } else { 0 };
        let answer = client.call_windows(&handles[0], number, &argument[..full], room);
        assert_eq!(answer.code, 0, "{request:?}");
        client.end(handles);
    }
}

#[test]
fn lengths_beyond_the_buffer_are_cut_to_it() {
    let client = Client::new(Os::Windows);
    let handles = client.one_of(Device::Vcpu);
    let devices = &client.devices;
    let number = Os::Windows.number(Request::SetRegs).unwrap();
    let mut buffer = [0; 100];
    let (status, bytes) = devices.ioctl_buffered(&handles[0], number, &mut buffer, 512, 512);
    assert_eq!((status.code(), bytes), (INVALID_PARAMETER as i32, 0));
    let mut whole = [0; size_of::<VcpuState>()];
    let (status, _) = devices.ioctl_buffered(&handles[0], number, &mut whole, 4096, 0);
    assert_eq!(status.code(), 0);
    let number = Os::Windows.number(Request::GetRegs).unwrap();
    let (status, bytes) = devices.ioctl_buffered(&handles[0], number, &mut buffer, 0, 512);
    assert_eq!((status.code(), bytes), (INVALID_PARAMETER as i32, 0));
    client.end(handles);
}
