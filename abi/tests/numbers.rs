//! Request numbers against the table of the ABI, typed in here a second time, and decode against number.

use haxm_abi::{Device, Direction, Os, Request};

/// Name, device, Linux, macOS, Windows, size. NetBSD equals macOS but for GET_CPUID. 0: has none.
const TABLE: [(&str, Device, u32, u32, u32, u32); 27] = [
    (
        "HAX_IOCTL_VERSION",
        Device::System,
        0xc0080020,
        0xc0080020,
        0x40002400,
        8,
    ),
    (
        "HAX_IOCTL_CREATE_VM",
        Device::System,
        0xc0040021,
        0xc0040021,
        0x40002404,
        4,
    ),
    (
        "HAX_IOCTL_DESTROY_VM",
        Device::System,
        0x40040022,
        0x80040022,
        0,
        4,
    ),
    (
        "HAX_IOCTL_CAPABILITY",
        Device::System,
        0x80100023,
        0x40100023,
        0x40002440,
        16,
    ),
    (
        "HAX_IOCTL_SET_MEMLIMIT",
        Device::System,
        0xc0100024,
        0xc0100024,
        0x40002444,
        16,
    ),
    (
        "HAX_VM_IOCTL_VCPU_CREATE_ORIG",
        Device::Vm,
        0x80040080,
        0x40040080,
        0,
        4,
    ),
    (
        "HAX_VM_IOCTL_VCPU_CREATE",
        Device::Vm,
        0xc0040080,
        0xc0040080,
        0x40002408,
        4,
    ),
    (
        "HAX_VM_IOCTL_ALLOC_RAM",
        Device::Vm,
        0xc0100081,
        0xc0100081,
        0x4000240c,
        16,
    ),
    (
        "HAX_VM_IOCTL_SET_RAM",
        Device::Vm,
        0xc0180082,
        0xc0180082,
        0x40002410,
        24,
    ),
    (
        "HAX_VM_IOCTL_VCPU_DESTROY",
        Device::Vm,
        0x80040083,
        0x40040083,
        0x40002414,
        4,
    ),
    (
        "HAX_VM_IOCTL_NOTIFY_QEMU_VERSION",
        Device::Vm,
        0x40080084,
        0x80080084,
        0x40002440,
        8,
    ),
    (
        "HAX_VM_IOCTL_ADD_RAMBLOCK",
        Device::Vm,
        0x40180085,
        0x80180085,
        0x4000244c,
        24,
    ),
    (
        "HAX_VM_IOCTL_SET_RAM2",
        Device::Vm,
        0xc0280086,
        0xc0280086,
        0x40002450,
        40,
    ),
    (
        "HAX_VM_IOCTL_PROTECT_RAM",
        Device::Vm,
        0xc0180087,
        0xc0180087,
        0x40002454,
        24,
    ),
    (
        "HAX_VCPU_IOCTL_RUN",
        Device::Vcpu,
        0x000000c0,
        0x200000c0,
        0x40002418,
        0,
    ),
    (
        "HAX_VCPU_IOCTL_SET_MSRS",
        Device::Vcpu,
        0xc20800c1,
        0xc20800c1,
        0x4000241c,
        520,
    ),
    (
        "HAX_VCPU_IOCTL_GET_MSRS",
        Device::Vcpu,
        0xc20800c2,
        0xc20800c2,
        0x40002420,
        520,
    ),
    (
        "HAX_VCPU_IOCTL_SET_FPU",
        Device::Vcpu,
        0x420000c3,
        0x820000c3,
        0x40002424,
        512,
    ),
    (
        "HAX_VCPU_IOCTL_GET_FPU",
        Device::Vcpu,
        0x820000c4,
        0x420000c4,
        0x40002428,
        512,
    ),
    (
        "HAX_VCPU_IOCTL_SETUP_TUNNEL",
        Device::Vcpu,
        0xc01800c5,
        0xc01800c5,
        0x4000242c,
        24,
    ),
    (
        "HAX_VCPU_IOCTL_INTERRUPT",
        Device::Vcpu,
        0xc00400c6,
        0xc00400c6,
        0x40002430,
        4,
    ),
    (
        "HAX_VCPU_SET_REGS",
        Device::Vcpu,
        0xc20000c7,
        0xc20000c7,
        0x40002434,
        512,
    ),
    (
        "HAX_VCPU_GET_REGS",
        Device::Vcpu,
        0xc20000c8,
        0xc20000c8,
        0x40002438,
        512,
    ),
    ("HAX_VCPU_IOCTL_KICKOFF", Device::Vcpu, 0, 0, 0x4000243c, 0),
    (
        "HAX_IOCTL_VCPU_DEBUG",
        Device::Vcpu,
        0x404800c9,
        0x804800c9,
        0x40002458,
        72,
    ),
    (
        "HAX_VCPU_IOCTL_SET_CPUID",
        Device::Vcpu,
        0x400800ca,
        0x800800ca,
        0x4000245c,
        8,
    ),
    (
        "HAX_VCPU_IOCTL_GET_CPUID",
        Device::Vcpu,
        0x400800cb,
        0x800800cb,
        0x40002460,
        8,
    ),
];

const DEVICES: [Device; 3] = [Device::System, Device::Vm, Device::Vcpu];

fn listed(number: u32) -> Option<u32> {
    (number != 0).then_some(number)
}

#[test]
fn every_request_has_the_numbers_of_the_table() {
    for (request, (name, device, linux, darwin, windows, size)) in
        Request::ALL.into_iter().zip(TABLE)
    {
        assert_eq!(request.name(), name);
        assert_eq!(request.device(), device, "{name}");
        assert_eq!(request.argument().size, size, "{name}");
        assert_eq!(Os::Linux.number(request), listed(linux), "{name} on Linux");
        assert_eq!(
            Os::Darwin.number(request),
            listed(darwin),
            "{name} on macOS"
        );
        let netbsd = if name == "HAX_VCPU_IOCTL_GET_CPUID" {
            0
        } else {
            darwin
        };
        assert_eq!(
            Os::NetBsd.number(request),
            listed(netbsd),
            "{name} on NetBSD"
        );
        assert_eq!(
            Os::Windows.number(request),
            listed(windows),
            "{name} on Windows"
        );
    }
}

#[test]
fn a_number_decodes_to_its_request_on_its_device_only() {
    for os in Os::ALL {
        for request in Request::ALL {
            let Some(number) = os.number(request) else {
                continue;
            };
            for device in DEVICES {
                let expected = if device == request.device() {
                    Some(request)
                } else {
                    // Windows: the one number two devices share.
                    Request::ALL
                        .into_iter()
                        .find(|other| other.device() == device && os.number(*other) == Some(number))
                };
                assert_eq!(
                    os.decode(device, number),
                    expected,
                    "{os:?} {device:?} {request:?}"
                );
            }
        }
    }
}

#[test]
fn windows_shares_910_between_two_devices() {
    assert_eq!(
        Os::Windows.decode(Device::System, 0x40002440),
        Some(Request::Capability)
    );
    assert_eq!(
        Os::Windows.decode(Device::Vm, 0x40002440),
        Some(Request::NotifyQemuVersion)
    );
    assert_eq!(Os::Windows.decode(Device::Vcpu, 0x40002440), None);
    assert_eq!(
        Os::Windows.decode(Device::Vm, 0x40000000 | 0x912 << 2),
        None
    );
    assert_eq!(
        Os::Windows.decode(Device::System, 0x40000000 | 0x912 << 2),
        None
    );
}

#[test]
fn number_sharing_happens_nowhere_else() {
    for os in Os::ALL {
        let shared: Vec<_> = Request::ALL
            .into_iter()
            .flat_map(|a| Request::ALL.into_iter().map(move |b| (a, b)))
            .filter(|(a, b)| a != b && os.number(*a).is_some() && os.number(*a) == os.number(*b))
            .collect();
        let expected: &[_] = match os {
            Os::Windows => &[
                (Request::Capability, Request::NotifyQemuVersion),
                (Request::NotifyQemuVersion, Request::Capability),
            ],
            _ => &[],
        };
        assert_eq!(shared, expected, "{os:?}");
    }
}

#[test]
fn thirty_two_bit_cpuid_callers_are_known_by_the_size() {
    let number = 0x400400ca;
    assert_eq!(
        Os::Linux.decode(Device::Vcpu, number),
        Some(Request::SetCpuid)
    );
    assert_eq!(
        Os::Linux.decode(Device::Vcpu, number + 1),
        Some(Request::GetCpuid)
    );
    assert_eq!(haxm_abi::os::linux::argument_size(number), 4);
    assert_eq!(haxm_abi::os::linux::argument_size(0x400800ca), 8);
    assert_eq!(
        Os::Darwin.decode(Device::Vcpu, 0x800400ca),
        Some(Request::SetCpuid)
    );
    assert_eq!(
        Os::Darwin.decode(Device::Vcpu, 0x800400cb),
        Some(Request::GetCpuid)
    );
    assert_eq!(haxm_abi::os::darwin::argument_size(0x800400cb), 4);
    assert_eq!(Os::NetBsd.decode(Device::Vcpu, 0x800400ca), None);
    assert_eq!(Os::NetBsd.decode(Device::Vcpu, 0x800800cb), None);
    assert_eq!(Os::Linux.decode(Device::Vm, number), None);
}

#[test]
fn encoded_sizes_are_the_argument_sizes() {
    for request in Request::ALL {
        for (os, size_of) in [
            (
                Os::Linux,
                haxm_abi::os::linux::argument_size as fn(u32) -> u32,
            ),
            (Os::Darwin, haxm_abi::os::darwin::argument_size),
            (Os::NetBsd, haxm_abi::os::netbsd::argument_size),
        ] {
            if let Some(number) = os.number(request) {
                assert_eq!(
                    size_of(number),
                    request.argument().size,
                    "{os:?} {request:?}"
                );
            }
        }
        let empty = request.argument().direction == Direction::None;
        assert_eq!(empty, request.argument().size == 0, "{request:?}");
    }
}

#[test]
fn the_old_vcpu_create_is_the_new_one() {
    let old = Os::Linux.decode(Device::Vm, 0x80040080).expect("known");
    assert_eq!(old, Request::VcpuCreateOrig);
    assert_eq!(old.canonical(), Request::VcpuCreate);
    for request in Request::ALL {
        assert!(request == Request::VcpuCreateOrig || request.canonical() == request);
    }
}

#[test]
fn qemu_spells_vcpu_destroy_its_own_way() {
    assert_eq!(
        Os::Linux.decode(Device::Vm, 0x40040083),
        Some(Request::VcpuDestroy)
    );
    assert_eq!(Os::Linux.decode(Device::Vcpu, 0x40040083), None);
}

#[test]
fn strangers_are_nothing() {
    for os in Os::ALL {
        for device in DEVICES {
            // A terminal's TCGETS, a CPUID number of the wrong size, QEMU's KVM_RUN, nothing at all.
            for number in [0x5401, 0x400200ca, 0xae80, 0, u32::MAX] {
                assert_eq!(
                    os.decode(device, number),
                    None,
                    "{os:?} {device:?} {number:#x}"
                );
            }
        }
    }
}
