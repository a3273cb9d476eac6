//! Every request on every system: it reaches the right call with the right values, and the answer
//! comes back.

mod mock;

use abi::zerocopy::{FromBytes, IntoBytes};
use abi::{
    CapabilityInfo, CpuidEntry, CpuidHeader, Device, FailReasons, FxLayout, MsrData, Os,
    ProtectRamInfo, QemuVersion, RamblockInfo, Request, SetMemlimit, SetRamInfo, SetRamInfo2,
    TunnelInfo, VcpuDebug, VcpuState, VmxMsr,
};
use haxm_driver::{Capability, Node};
use mock::client::Client;
use mock::{CPUID_ENTRIES, msr_value};

/// A request that only carries something in: its argument, and the call it becomes.
fn inputs() -> Vec<(Request, Vec<u8>, &'static str)> {
    let mut fpu = FxLayout {
        fcw: 0x37f,
        ..FxLayout::default()
    };
    fpu.pad[95] = 0x5a;
    vec![
        (
            Request::VcpuCreate,
            7_u32.as_bytes().to_vec(),
            "create_vcpu 0 7",
        ),
        (
            Request::AllocRam,
            abi::AllocRamInfo {
                size: 0xffff_f000,
                pad: 0xdead,
                va: 0x7f00_0000_0000,
            }
            .as_bytes()
            .to_vec(),
            "add_ram_block 0x7f0000000000 0xfffff000",
        ),
        (
            Request::AddRamblock,
            RamblockInfo {
                start_va: 0x1000,
                size: 0x1_0000_0000,
                reserved: 0,
            }
            .as_bytes()
            .to_vec(),
            "add_ram_block 0x1000 0x100000000",
        ),
        (
            Request::SetRam,
            SetRamInfo {
                pa_start: 0xfffc_0000,
                size: 0x4_0000,
                flags: 1,
                pad: [9; 3],
                va: 0x5000,
            }
            .as_bytes()
            .to_vec(),
            "set_ram 0xfffc0000 0x40000 0x5000 0x1",
        ),
        (
            Request::SetRam2,
            SetRamInfo2 {
                pa_start: 0x7_dfff_f000,
                size: 0x2000_0000,
                va: 0x1_4e07_0000,
                flags: 0x8000_0041,
                reserved1: 0,
                reserved2: 0,
            }
            .as_bytes()
            .to_vec(),
            "set_ram 0x7dffff000 0x20000000 0x14e070000 0x80000041",
        ),
        (
            Request::ProtectRam,
            ProtectRamInfo {
                pa_start: 0x20_0000,
                size: 0x1000,
                flags: 7,
                reserved: 0,
            }
            .as_bytes()
            .to_vec(),
            "protect_ram 0x200000 0x1000 0x7",
        ),
        (
            Request::NotifyQemuVersion,
            QemuVersion {
                cur_version: 4,
                least_version: 3,
            }
            .as_bytes()
            .to_vec(),
            "notify_version 4 3",
        ),
        (Request::Run, vec![], "run"),
        (
            Request::SetFpu,
            fpu.as_bytes().to_vec(),
            "set_fpu 0x37f 0x5a",
        ),
        (
            Request::Interrupt,
            0xffff_ff31_u32.as_bytes().to_vec(),
            "interrupt 49",
        ),
        (
            Request::SetRegs,
            VcpuState {
                rax: 0x1122_3344_5566_7788,
                cr4: 0x620,
                ..VcpuState::default()
            }
            .as_bytes()
            .to_vec(),
            "set_regs 0x1122334455667788 0x620",
        ),
        (Request::Kickoff, vec![], "kick"),
        (
            Request::VcpuDebug,
            VcpuDebug {
                control: 9,
                reserved: 5,
                dr: [0, 1, 2, 3, 4, 5, 6, 0x701],
            }
            .as_bytes()
            .to_vec(),
            "set_debug 0x9 0x701",
        ),
        (
            Request::SetCpuid,
            cpuid_table(64),
            "set_cpuid 64 0x4000003f",
        ),
        (Request::SetCpuid, cpuid_table(1), "set_cpuid 1 0x40000000"),
    ]
}

fn cpuid_table(total: u32) -> Vec<u8> {
    let mut bytes = CpuidHeader { total, pad: 0 }.as_bytes().to_vec();
    for index in 0..total {
        let entry = CpuidEntry {
            function: 0x4000_0000 + index,
            ..CpuidEntry::default()
        };
        bytes.extend_from_slice(entry.as_bytes());
    }
    bytes
}

#[test]
fn requests_with_input_reach_the_core() {
    for os in Os::ALL {
        for (request, argument, call) in inputs() {
            if os.number(request).is_none() {
                assert_eq!(request, Request::Kickoff);
                continue;
            }
            let client = Client::new(os);
            let handles = client.one_of(request.device());
            let answer = client.call(&handles[0], request, &argument);
            assert_eq!(answer.code, 0, "{os:?} {request:?}");
            assert_eq!(client.world.take_calls(), [call], "{os:?} {request:?}");
            if os == Os::Windows {
                assert_eq!(answer.bytes, [], "{request:?} gives nothing back");
            } else {
                assert_eq!(answer.bytes, argument, "{os:?} {request:?}");
            }
            client.end(handles);
        }
    }
}

#[test]
fn the_old_number_of_vcpu_create_works() {
    for os in [Os::Linux, Os::Darwin, Os::NetBsd] {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vm);
        let answer = client.call(&handles[0], Request::VcpuCreateOrig, 3_u32.as_bytes());
        assert_eq!(answer.code, 0);
        assert_eq!(client.world.take_calls(), ["create_vcpu 0 3"]);
        assert!(client.world.state().nodes.contains("vm0/vcpu3"));
        client.end(handles);
    }
}

#[test]
fn version_is_one_to_four() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::System);
        let answer = client.call(&handles[0], Request::Version, &[0xee; 8]);
        assert_eq!(answer.code, 0);
        assert_eq!(answer.bytes, [1, 0, 0, 0, 4, 0, 0, 0]);
        client.end(handles);
    }
}

#[test]
fn capability_says_what_works_or_why_not() {
    let able = Capability {
        refusal: None,
        ept: true,
        unrestricted_guest: true,
        memory_quota: Some(1 << 48),
    };
    let cases = [
        (able, (3, 0x3ff, 1 << 48)),
        (
            Capability {
                unrestricted_guest: false,
                memory_quota: None,
                ..able
            },
            (1, 0x3fb, 0),
        ),
        (Capability { ept: false, ..able }, (3, 0x3fe, 1 << 48)),
        (
            Capability {
                refusal: Some(FailReasons::VT),
                memory_quota: Some(7),
                ..able
            },
            (2, 1, 7),
        ),
        (
            Capability {
                refusal: Some(FailReasons::NX),
                memory_quota: None,
                ..able
            },
            (0, 2, 0),
        ),
    ];
    for os in Os::ALL {
        for (capability, (wstatus, winfo, mem_quota)) in cases {
            let client = Client::new(os);
            client.world.state().capability = capability;
            let handles = vec![client.open(Node::System), client.open(Node::System)];
            client.devices.close(client.open(Node::System));
            let answer = client.call(&handles[0], Request::Capability, &[0xee; 16]);
            assert_eq!(answer.code, 0);
            let expected = CapabilityInfo {
                wstatus,
                winfo,
                win_refcount: if os == Os::Windows { 2 } else { 0 },
                mem_quota,
            };
            let got = CapabilityInfo::read_from_bytes(&answer.bytes).unwrap();
            assert_eq!(got, expected, "{os:?}");
            client.end(handles);
        }
    }
}

#[test]
fn the_memory_limit_is_in_megabytes_and_can_be_removed() {
    for os in Os::ALL {
        for (enable, limit) in [(1, Some(6 << 30)), (0x80, Some(6 << 30)), (0, None)] {
            let client = Client::new(os);
            let handles = client.one_of(Device::System);
            let argument = SetMemlimit {
                enable_memlimit: enable,
                pad: [0xff; 7],
                memory_limit: 6 << 10,
            };
            let answer = client.call(&handles[0], Request::SetMemlimit, argument.as_bytes());
            assert_eq!(answer.code, 0);
            assert_eq!(client.world.state().memory_limit, Some(limit));
            client.end(handles);
        }
    }
}

#[test]
fn create_vm_gives_the_lowest_free_id_and_a_node() {
    for os in Os::ALL {
        let client = Client::new(os);
        assert_eq!(client.create_vm(), 0);
        assert_eq!(client.create_vm(), 1);
        assert_eq!(client.create_vm(), 2);
        let middle = client.open(Node::Vm(1));
        client.devices.close(middle);
        assert!(!client.world.state().nodes.contains("vm1"));
        assert_eq!(client.create_vm(), 1);
        assert!(client.world.state().nodes.contains("vm1"));
        client.end(vec![]);
    }
}

#[test]
fn registers_and_fpu_come_back_whole() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        let answer = client.call(&handles[0], Request::GetRegs, &[0xee; 512]);
        let expected = VcpuState {
            rip: 0xfff0,
            ..VcpuState::default()
        };
        assert_eq!((answer.code, &answer.bytes[..]), (0, expected.as_bytes()));
        let answer = client.call(&handles[0], Request::GetFpu, &[0xee; 512]);
        let expected = FxLayout {
            mxcsr: 0x1f80,
            ..FxLayout::default()
        };
        assert_eq!((answer.code, &answer.bytes[..]), (0, expected.as_bytes()));
        assert_eq!(client.world.take_calls(), ["regs", "fpu"]);
        client.end(handles);
    }
}

#[test]
fn the_tunnel_is_where_the_core_says() {
    for os in Os::ALL {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        for _ in 0..2 {
            let answer = client.call(&handles[0], Request::SetupTunnel, &[0xee; 24]);
            let info = TunnelInfo::read_from_bytes(&answer.bytes).unwrap();
            assert_eq!(answer.code, 0);
            assert_eq!((info.va, info.io_va), (0x1111_0000, 0x2222_0000));
            assert_eq!((info.size, info.pad), (4096, [0; 3]));
        }
        client.end(handles);
    }
}

fn msr_argument(count: u16) -> MsrData {
    let mut data = MsrData {
        nr_msr: count,
        done: 0xeeee,
        pad: [0xeeee; 2],
        ..MsrData::default()
    };
    for (index, msr) in (0..).zip(data.entries.iter_mut()) {
        *msr = VmxMsr {
            entry: 0xc000_0080 + index,
            value: index,
        };
    }
    data
}

#[test]
fn msrs_stop_at_the_first_refused_and_say_how_many() {
    for os in Os::ALL {
        for count in [0, 1, 10, 31] {
            for refused in [0, 1, 5, 30, 1000] {
                let client = Client::new(os);
                client.world.state().refused_msr = 0xc000_0080 + refused;
                let handles = client.one_of(Device::Vcpu);
                let argument = msr_argument(count);
                let done = u64::from(count).min(refused);

                let answer = client.call(&handles[0], Request::SetMsrs, argument.as_bytes());
                let mut expected = argument;
                expected.done = u16::try_from(done).unwrap();
                assert_eq!(answer.code, 0);
                assert_eq!(
                    answer.bytes,
                    expected.as_bytes(),
                    "{os:?} {count} {refused}"
                );

                let answer = client.call(&handles[0], Request::GetMsrs, argument.as_bytes());
                for msr in &mut expected.entries[..usize::try_from(done).unwrap()] {
                    msr.value = msr_value(msr.entry);
                }
                assert_eq!(answer.code, 0);
                assert_eq!(
                    answer.bytes,
                    expected.as_bytes(),
                    "{os:?} {count} {refused}"
                );
                client.end(handles);
            }
        }
    }
}

#[test]
fn get_cpuid_tells_the_size_then_gives_the_table() {
    for os in [Os::Linux, Os::Darwin, Os::Windows] {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        let needed = u32::try_from(CPUID_ENTRIES).unwrap();
        for total in [0, 1, needed - 1] {
            let mut table = cpuid_table(total);
            let answer = client.call(&handles[0], Request::GetCpuid, &table);
            table[0] = 18;
            if os == Os::Windows {
                assert_eq!((answer.code, &answer.bytes[..]), (0, &table[..8]));
            } else {
                assert_eq!((answer.code, answer.bytes), (-12, table));
            }
        }
        for total in [needed, needed + 1, 64, 100] {
            let table = cpuid_table(total);
            let answer = client.call(&handles[0], Request::GetCpuid, &table);
            assert_eq!(answer.code, 0, "{os:?} {total}");
            assert_eq!(&answer.bytes[..8], [18, 0, 0, 0, 0, 0, 0, 0]);
            for index in 0..needed {
                let at = 8 + 40 * index as usize;
                let entry = CpuidEntry::read_from_prefix(&answer.bytes[at..]).unwrap().0;
                let expected = CpuidEntry {
                    function: index,
                    eax: !index,
                    ..CpuidEntry::default()
                };
                assert_eq!(entry, expected);
            }
            if os == Os::Windows {
                assert_eq!(answer.bytes.len(), 8 + 40 * CPUID_ENTRIES);
            } else {
                let rest = 8 + 40 * CPUID_ENTRIES..;
                assert_eq!(answer.bytes[rest.clone()], table[rest]);
            }
        }
        client.end(handles);
    }
}

#[test]
fn a_32_bit_program_passes_a_32_bit_pointer() {
    let cases = [
        (Os::Linux, 0x4004_00ca_u32, 0x4004_00cb_u32),
        (Os::Darwin, 0x8004_00ca, 0x8004_00cb),
    ];
    for (os, set, get) in cases {
        let client = Client::new(os);
        let handles = client.one_of(Device::Vcpu);
        // What follows the pointer is not part of it.
        let mut pointer = u32::try_from(mock::client::TABLE)
            .unwrap()
            .to_le_bytes()
            .to_vec();
        if os == Os::Linux {
            pointer.extend_from_slice(&[0xff; 4]);
        }
        client.world.poke(mock::client::ARGUMENT, &pointer);
        let ioctl = |number| {
            client.world.state().copied_in.clear();
            if os == Os::Linux {
                client
                    .devices
                    .ioctl(&handles[0], number, mock::client::ARGUMENT)
            } else {
                let mut data = pointer.clone();
                client.devices.ioctl_copied(&handles[0], number, &mut data)
            }
        };
        client.world.poke(mock::client::TABLE, &cpuid_table(2));
        assert_eq!(ioctl(set).code(), 0);
        assert_eq!(client.world.take_calls(), ["set_cpuid 2 0x40000001"]);
        assert_eq!(ioctl(get).code(), -12);
        assert_eq!(client.world.peek(mock::client::TABLE, 1), [18]);
        client.end(handles);
    }
}

#[test]
fn the_number_two_requests_share_on_windows_goes_by_device() {
    let client = Client::new(Os::Windows);
    let handles = client.one_of(Device::Vm);
    assert_eq!(
        Os::Windows.number(Request::Capability),
        Os::Windows.number(Request::NotifyQemuVersion)
    );
    let answer = client.call_windows(&handles[0], 0x4000_2440, &[4, 0, 0, 0, 1, 0, 0, 0], 0);
    assert_eq!(answer.code, 0);
    assert_eq!(client.world.take_calls(), ["notify_version 4 1"]);
    let answer = client.call_windows(&handles[1], 0x4000_2440, &[], 16);
    assert_eq!((answer.code, answer.bytes[0]), (0, 3));
    client.end(handles);
}
