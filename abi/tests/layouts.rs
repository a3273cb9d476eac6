//! The structures as data: HAXM's offsets typed in a second time, and [`memoffset::span_of!`] as a second
//! way to find them.

use haxm_abi::layout::STRUCTS;
use haxm_abi::zerocopy::{FromBytes, FromZeros, IntoBytes};
use haxm_abi::{ExitStatus, Tunnel, TunnelDebug, TunnelIo, TunnelPageFault, VcpuState};
use memoffset::span_of;

/// Every structure and its size.
const SIZES: [(&str, usize); 21] = [
    ("hax_module_version", 8),
    ("hax_capabilityinfo", 16),
    ("hax_set_memlimit", 16),
    ("hax_alloc_ram_info", 16),
    ("hax_ramblock_info", 24),
    ("hax_set_ram_info", 24),
    ("hax_set_ram_info2", 40),
    ("hax_protect_ram_info", 24),
    ("hax_qemu_version", 8),
    ("hax_tunnel_info", 24),
    ("vmx_msr", 16),
    ("hax_msr_data", 520),
    ("hax_debug_t", 72),
    ("hax_cpuid", 8),
    ("hax_cpuid_entry", 40),
    ("fx_layout", 512),
    ("segment_desc_t", 24),
    ("interruptibility_state_t", 8),
    ("vcpu_state_t", 512),
    ("hax_tunnel", 56),
    ("hax_fastmmio", 56),
];

/// A field of each kind, above all the members of unions: structure, field, offset, size.
const FIELDS: &[(&str, &str, usize, usize)] = &[
    ("hax_capabilityinfo", "mem_quota", 8, 8),
    ("hax_set_ram_info", "flags", 12, 1),
    ("hax_set_ram_info2", "reserved2", 32, 8),
    ("hax_msr_data", "entries", 8, 512),
    ("hax_debug_t", "dr", 8, 64),
    ("hax_cpuid", "entries", 8, 0),
    ("hax_cpuid_entry", "pad", 28, 12),
    ("fx_layout", "fip", 8, 4),
    ("fx_layout", "fcs", 12, 2),
    ("fx_layout", "res2", 14, 2),
    ("fx_layout", "fpu_ip", 8, 8),
    ("fx_layout", "fdp", 16, 4),
    ("fx_layout", "fds", 20, 2),
    ("fx_layout", "res3", 22, 2),
    ("fx_layout", "fpu_dp", 16, 8),
    ("fx_layout", "mmx_2", 288, 128),
    ("segment_desc_t", "ar", 16, 4),
    ("interruptibility_state_t", "raw", 0, 4),
    ("interruptibility_state_t", "pad", 0, 8),
    ("vcpu_state_t", "_regs", 0, 128),
    ("vcpu_state_t", "_ah", 1, 1),
    ("vcpu_state_t", "_cx", 8, 2),
    ("vcpu_state_t", "_edx", 16, 4),
    ("vcpu_state_t", "_bh", 25, 1),
    ("vcpu_state_t", "_sp", 32, 2),
    ("vcpu_state_t", "_rdi", 56, 8),
    ("vcpu_state_t", "_r15", 120, 8),
    ("vcpu_state_t", "_eip", 128, 4),
    ("vcpu_state_t", "_eflags", 136, 4),
    ("vcpu_state_t", "_ldt", 288, 24),
    ("vcpu_state_t", "_pde", 464, 8),
    ("vcpu_state_t", "_efer", 472, 4),
    ("vcpu_state_t", "_interruptibility_state", 504, 8),
    ("hax_tunnel", "_exit_status", 8, 4),
    ("hax_tunnel", "io", 24, 24),
    ("hax_tunnel", "io._direction", 24, 1),
    ("hax_tunnel", "io._df", 25, 1),
    ("hax_tunnel", "io._size", 26, 2),
    ("hax_tunnel", "io._port", 28, 2),
    ("hax_tunnel", "io._count", 30, 2),
    ("hax_tunnel", "io._flags", 32, 1),
    ("hax_tunnel", "io._pad2", 36, 4),
    ("hax_tunnel", "io._vaddr", 40, 8),
    ("hax_tunnel", "mmio", 24, 8),
    ("hax_tunnel", "mmio.gla", 24, 8),
    ("hax_tunnel", "pagefault.gpa", 24, 8),
    ("hax_tunnel", "pagefault.flags", 32, 4),
    ("hax_tunnel", "pagefault.reserved1", 36, 4),
    ("hax_tunnel", "pagefault.reserved2", 40, 8),
    ("hax_tunnel", "state.dummy", 24, 8),
    ("hax_tunnel", "debug.rip", 24, 8),
    ("hax_tunnel", "debug.dr6", 32, 8),
    ("hax_tunnel", "debug.dr7", 40, 8),
    ("hax_tunnel", "apic_base", 48, 8),
    ("hax_fastmmio", "value", 8, 8),
    ("hax_fastmmio", "gpa2", 8, 8),
    ("hax_fastmmio", "direction", 17, 1),
    ("hax_fastmmio", "_cr4", 48, 8),
];

#[test]
fn all_structures_are_listed_with_their_sizes() {
    let found: Vec<_> = STRUCTS.iter().map(|s| (s.name, s.size)).collect();
    assert_eq!(found, SIZES);
}

#[test]
fn fields_lie_where_haxm_has_them() {
    for (structure, name, offset, size) in FIELDS {
        let found = STRUCTS
            .iter()
            .find(|s| s.name == *structure)
            .and_then(|s| s.field(name));
        let found = found.unwrap_or_else(|| panic!("no {structure}.{name}"));
        assert_eq!(
            (found.offset, found.size),
            (*offset, *size),
            "{structure}.{name}"
        );
    }
}

#[test]
fn fields_cover_their_structure_and_have_unique_names() {
    for structure in STRUCTS {
        let mut covered = vec![false; structure.size];
        for (index, field) in structure.fields.iter().enumerate() {
            covered[field.offset..field.offset + field.size].fill(true);
            assert!(
                structure.fields[..index]
                    .iter()
                    .all(|other| other.name != field.name),
                "{}.{} twice",
                structure.name,
                field.name
            );
        }
        assert!(!covered.contains(&false), "{} has a hole", structure.name);
    }
}

#[test]
fn span_of_agrees_with_the_list() {
    let check = |structure: &str, field: &str, span: std::ops::Range<usize>| {
        let found = STRUCTS
            .iter()
            .find(|s| s.name == structure)
            .and_then(|s| s.field(field))
            .expect(field);
        assert_eq!(
            found.offset..found.offset + found.size,
            span,
            "{structure}.{field}"
        );
    };
    check("vcpu_state_t", "_cs", span_of!(VcpuState, cs));
    check("vcpu_state_t", "_regs", span_of!(VcpuState, rax..rip));
    check(
        "vcpu_state_t",
        "_activity_state",
        span_of!(VcpuState, activity_state),
    );
    check("hax_tunnel", "io", span_of!(Tunnel, view));
    check("hax_tunnel", "apic_base", span_of!(Tunnel, apic_base));
    check("fx_layout", "st_mm", span_of!(haxm_abi::FxLayout, st_mm));
    check("hax_fastmmio", "_cr0", span_of!(haxm_abi::FastMmio, cr0));
}

#[test]
fn tunnel_offsets_match_the_views() {
    use haxm_abi::tunnel::{fastmmio_offset, offset};
    let mut bytes = [0_u8; 56];
    bytes[offset::IO_DIRECTION] = 1;
    bytes[offset::IO_DF] = 1;
    bytes[offset::IO_SIZE..][..2].copy_from_slice(&2_u16.to_le_bytes());
    bytes[offset::IO_PORT..][..2].copy_from_slice(&0x3f8_u16.to_le_bytes());
    bytes[offset::IO_COUNT..][..2].copy_from_slice(&32_u16.to_le_bytes());
    bytes[offset::IO_FLAGS] = 1;
    bytes[offset::IO_VADDR..][..8].copy_from_slice(&0x1234_5678_9abc_u64.to_le_bytes());
    bytes[offset::EXIT_STATUS] = 1;
    let tunnel = Tunnel::read_from_bytes(&bytes).expect("56 bytes");
    let io = TunnelIo {
        direction: 1,
        df: 1,
        size: 2,
        port: 0x3f8,
        count: 32,
        flags: 1,
        vaddr: 0x1234_5678_9abc,
        ..TunnelIo::default()
    };
    assert_eq!(tunnel.io(), io);
    assert_eq!(tunnel.status(), Some(ExitStatus::Io));

    let mut bytes = [0_u8; 56];
    bytes[offset::PAGEFAULT_GPA..][..8].copy_from_slice(&0x20_0000_u64.to_le_bytes());
    bytes[offset::PAGEFAULT_FLAGS..][..4].copy_from_slice(&2_u32.to_le_bytes());
    bytes[offset::PAGEFAULT_RESERVED1] = 3;
    bytes[offset::PAGEFAULT_RESERVED2] = 4;
    let tunnel = Tunnel::read_from_bytes(&bytes).expect("56 bytes");
    assert_eq!(
        tunnel.pagefault(),
        TunnelPageFault {
            gpa: 0x20_0000,
            flags: 2,
            reserved1: 3,
            reserved2: 4
        }
    );

    bytes[offset::DEBUG_RIP..][..8].copy_from_slice(&1_u64.to_le_bytes());
    bytes[offset::DEBUG_DR6..][..8].copy_from_slice(&2_u64.to_le_bytes());
    bytes[offset::DEBUG_DR7..][..8].copy_from_slice(&3_u64.to_le_bytes());
    let tunnel = Tunnel::read_from_bytes(&bytes).expect("56 bytes");
    assert_eq!(
        tunnel.debug(),
        TunnelDebug {
            rip: 1,
            dr6: 2,
            dr7: 3
        }
    );

    assert_eq!(
        [
            offset::EXIT_REASON,
            offset::EXIT_STATUS,
            offset::USER_EVENT_PENDING,
            offset::READY_FOR_INTERRUPT_INJECTION,
            offset::REQUEST_INTERRUPT_WINDOW,
            offset::VIEW,
            offset::APIC_BASE,
        ],
        [0, 8, 12, 16, 20, 24, 48]
    );
    assert_eq!(
        [
            fastmmio_offset::GPA,
            fastmmio_offset::VALUE,
            fastmmio_offset::SIZE,
            fastmmio_offset::DIRECTION
        ],
        [0, 8, 16, 17]
    );
}

#[test]
fn registers_by_number_are_the_named_ones() {
    let mut state = VcpuState::new_zeroed();
    let order = std::array::from_fn(|index| index as u64 + 1);
    state.set_regs(order);
    assert_eq!(state.regs(), order);
    assert_eq!((state.rcx, state.rsp, state.r15), (2, 5, 16));
    // HAXM's union `_regs[16]` is these same bytes.
    assert_eq!(
        state.as_bytes()[..128],
        order.map(u64::to_le_bytes).concat()[..]
    );
}

#[test]
fn exit_statuses_are_numbered_from_one_without_a_gap() {
    for (raw, status) in (1..).zip(ExitStatus::ALL) {
        assert_eq!(status.raw(), raw);
        assert_eq!(ExitStatus::from_raw(raw), Some(status));
    }
    for raw in [0, 12, u32::MAX] {
        assert_eq!(ExitStatus::from_raw(raw), None);
    }
}

#[test]
fn unknown_flag_bits_survive() {
    assert_eq!(haxm_abi::RamFlags::from_bits_retain(0x7e).bits(), 0x7e);
    assert_eq!(
        haxm_abi::Capabilities::from_bits_retain(0xfc00).bits(),
        0xfc00
    );
    assert_eq!(haxm_abi::Capabilities::all().bits(), 0x3ff);
}

#[test]
fn cpuid_tables_have_bounds() {
    use haxm_abi::cpuid::cpuid_size;
    assert_eq!(cpuid_size(0), None);
    assert_eq!(cpuid_size(1), Some(48));
    assert_eq!(cpuid_size(64), Some(2568));
    assert_eq!(cpuid_size(65), None);
    assert_eq!(cpuid_size(u32::MAX), None);
}
