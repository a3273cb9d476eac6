//! The 21 structures as data, with HAXM's C names.
//!
//! Two independent statements meet here. `assert_layout!` compares each Rust field's place with the numbers
//! of the ABI, written as `start..end`. [`STRUCTS`] takes the place of each C field from the Rust field that
//! represents it and holds no numbers of its own, except where a C union gives a part of a field another
//! name: there `field[start..end]` are bytes within that field.

use crate::assert::size_of_field;
use crate::cpuid::{CPUID_ENTRIES_OFFSET, CpuidEntry, CpuidHeader};
use crate::debug::VcpuDebug;
use crate::module::{CapabilityInfo, ModuleVersion, QemuVersion, SetMemlimit};
use crate::msr::{MsrData, VmxMsr};
use crate::ram::{AllocRamInfo, ProtectRamInfo, RamblockInfo, SetRamInfo, SetRamInfo2};
use crate::tunnel::{
    FastMmio, Tunnel, TunnelDebug, TunnelInfo, TunnelIo, TunnelMmio, TunnelPageFault, TunnelState,
};
use crate::vcpu_state::{FxLayout, InterruptibilityState, SegmentDesc, VcpuState};

/// One C structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Struct {
    /// HAXM's C name, without the word struct.
    pub name: &'static str,
    /// Bytes.
    pub size: usize,
    /// Fields; the members of a union each have their own entry.
    pub fields: &'static [Field],
}

/// One field of a C structure, or one member of a union in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// HAXM's C name; a member of a named union member is `member.field`, as in `offsetof`.
    pub name: &'static str,
    /// Bytes from the start of the structure.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

impl Struct {
    /// The field of that C name.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&'static Field> {
        self.fields.iter().find(|field| field.name == name)
    }
}

/// One field entry: a whole field, bytes of a field, or a field of a view that lies over a field.
macro_rules! field {
    ($ty:ident, $name:literal, $field:ident) => {
        Field {
            name: $name,
            offset: memoffset::offset_of!($ty, $field),
            size: size_of_field(|value: &$ty| &value.$field),
        }
    };
    ($ty:ident, $name:literal, $field:ident, bytes $start:literal, $end:literal) => {{
        assert!($start < $end && $end <= size_of_field(|value: &$ty| &value.$field));
        Field {
            name: $name,
            offset: memoffset::offset_of!($ty, $field) + $start,
            size: $end - $start,
        }
    }};
    ($ty:ident, $name:literal, $field:ident, whole $view:ident) => {{
        assert!(size_of::<$view>() <= size_of_field(|value: &$ty| &value.$field));
        Field {
            name: $name,
            offset: memoffset::offset_of!($ty, $field),
            size: size_of::<$view>(),
        }
    }};
    ($ty:ident, $name:literal, $field:ident, part $view:ident, $part:ident) => {
        Field {
            name: $name,
            offset: memoffset::offset_of!($ty, $field) + memoffset::offset_of!($view, $part),
            size: size_of_field(|value: &$view| &value.$part),
        }
    };
}

/// One structure entry.
macro_rules! layout {
    ($c_name:literal, $ty:ident; $($name:literal = $field:ident $(($($how:tt)+))?),+ $(,)?) => {
        Struct {
            name: $c_name,
            size: size_of::<$ty>(),
            fields: &[$(field!($ty, $name, $field $(, $($how)+)?)),+],
        }
    };
}

/// All 21 structures.
pub const STRUCTS: [Struct; 21] = [
    layout!("hax_module_version", ModuleVersion;
        "compat_version" = compat_version, "cur_version" = cur_version),
    layout!("hax_capabilityinfo", CapabilityInfo;
        "wstatus" = wstatus, "winfo" = winfo, "win_refcount" = win_refcount, "mem_quota" = mem_quota),
    layout!("hax_set_memlimit", SetMemlimit;
        "enable_memlimit" = enable_memlimit, "pad" = pad, "memory_limit" = memory_limit),
    layout!("hax_alloc_ram_info", AllocRamInfo; "size" = size, "pad" = pad, "va" = va),
    layout!("hax_ramblock_info", RamblockInfo;
        "start_va" = start_va, "size" = size, "reserved" = reserved),
    layout!("hax_set_ram_info", SetRamInfo;
        "pa_start" = pa_start, "size" = size, "flags" = flags, "pad" = pad, "va" = va),
    layout!("hax_set_ram_info2", SetRamInfo2;
        "pa_start" = pa_start, "size" = size, "va" = va, "flags" = flags, "reserved1" = reserved1,
        "reserved2" = reserved2),
    layout!("hax_protect_ram_info", ProtectRamInfo;
        "pa_start" = pa_start, "size" = size, "flags" = flags, "reserved" = reserved),
    layout!("hax_qemu_version", QemuVersion;
        "cur_version" = cur_version, "least_version" = least_version),
    layout!("hax_tunnel_info", TunnelInfo; "va" = va, "io_va" = io_va, "size" = size, "pad" = pad),
    layout!("vmx_msr", VmxMsr; "entry" = entry, "value" = value),
    layout!("hax_msr_data", MsrData;
        "nr_msr" = nr_msr, "done" = done, "pad" = pad, "entries" = entries),
    layout!("hax_debug_t", VcpuDebug; "control" = control, "reserved" = reserved, "dr" = dr),
    HAX_CPUID,
    layout!("hax_cpuid_entry", CpuidEntry;
        "function" = function, "index" = index, "flags" = flags, "eax" = eax, "ebx" = ebx, "ecx" = ecx,
        "edx" = edx, "pad" = pad),
    layout!("fx_layout", FxLayout;
        "fcw" = fcw, "fsw" = fsw, "ftw" = ftw, "res1" = res1, "fop" = fop,
        "fip" = fpu_ip(bytes 0, 4), "fcs" = fpu_ip(bytes 4, 6), "res2" = fpu_ip(bytes 6, 8),
        "fpu_ip" = fpu_ip,
        "fdp" = fpu_dp(bytes 0, 4), "fds" = fpu_dp(bytes 4, 6), "res3" = fpu_dp(bytes 6, 8),
        "fpu_dp" = fpu_dp,
        "mxcsr" = mxcsr, "mxcsr_mask" = mxcsr_mask, "st_mm" = st_mm, "mmx_1" = mmx_1, "mmx_2" = mmx_2,
        "pad" = pad),
    layout!("segment_desc_t", SegmentDesc;
        "selector" = selector, "_dummy" = dummy, "limit" = limit, "base" = base, "ar" = ar, "ipad" = ipad),
    INTERRUPTIBILITY_STATE_T,
    VCPU_STATE_T,
    HAX_TUNNEL,
    layout!("hax_fastmmio", FastMmio;
        "gpa" = gpa, "value" = value, "gpa2" = value, "size" = size, "direction" = direction,
        "reg_index" = reg_index, "pad0" = pad0, "_cr0" = cr0, "_cr2" = cr2, "_cr3" = cr3, "_cr4" = cr4),
];

/// The header; its C declaration ends in an array of no length, which takes no space.
const HAX_CPUID: Struct = Struct {
    name: "hax_cpuid",
    size: size_of::<CpuidHeader>(),
    fields: &[
        field!(CpuidHeader, "total", total),
        field!(CpuidHeader, "pad", pad),
        Field {
            name: "entries",
            offset: CPUID_ENTRIES_OFFSET,
            size: 0,
        },
    ],
};

/// A union of the 32-bit state and 64 bits of padding.
const INTERRUPTIBILITY_STATE_T: Struct = Struct {
    name: "interruptibility_state_t",
    size: size_of::<InterruptibilityState>(),
    fields: &[
        field!(InterruptibilityState, "raw", raw),
        Field {
            name: "pad",
            offset: 0,
            size: size_of::<InterruptibilityState>(),
        },
    ],
};

/// The registers, each also under the names of its parts.
const VCPU_STATE_T: Struct = Struct {
    name: "vcpu_state_t",
    size: size_of::<VcpuState>(),
    fields: &{
        use VcpuState as S;
        [
            Field {
                name: "_regs",
                offset: memoffset::offset_of!(S, rax),
                size: memoffset::offset_of!(S, rip) - memoffset::offset_of!(S, rax),
            },
            field!(S, "_al", rax, bytes 0, 1),
            field!(S, "_ah", rax, bytes 1, 2),
            field!(S, "_ax", rax, bytes 0, 2),
            field!(S, "_eax", rax, bytes 0, 4),
            field!(S, "_rax", rax),
            field!(S, "_cl", rcx, bytes 0, 1),
            field!(S, "_ch", rcx, bytes 1, 2),
            field!(S, "_cx", rcx, bytes 0, 2),
            field!(S, "_ecx", rcx, bytes 0, 4),
            field!(S, "_rcx", rcx),
            field!(S, "_dl", rdx, bytes 0, 1),
            field!(S, "_dh", rdx, bytes 1, 2),
            field!(S, "_dx", rdx, bytes 0, 2),
            field!(S, "_edx", rdx, bytes 0, 4),
            field!(S, "_rdx", rdx),
            field!(S, "_bl", rbx, bytes 0, 1),
            field!(S, "_bh", rbx, bytes 1, 2),
            field!(S, "_bx", rbx, bytes 0, 2),
            field!(S, "_ebx", rbx, bytes 0, 4),
            field!(S, "_rbx", rbx),
            field!(S, "_sp", rsp, bytes 0, 2),
            field!(S, "_esp", rsp, bytes 0, 4),
            field!(S, "_rsp", rsp),
            field!(S, "_bp", rbp, bytes 0, 2),
            field!(S, "_ebp", rbp, bytes 0, 4),
            field!(S, "_rbp", rbp),
            field!(S, "_si", rsi, bytes 0, 2),
            field!(S, "_esi", rsi, bytes 0, 4),
            field!(S, "_rsi", rsi),
            field!(S, "_di", rdi, bytes 0, 2),
            field!(S, "_edi", rdi, bytes 0, 4),
            field!(S, "_rdi", rdi),
            field!(S, "_r8", r8),
            field!(S, "_r9", r9),
            field!(S, "_r10", r10),
            field!(S, "_r11", r11),
            field!(S, "_r12", r12),
            field!(S, "_r13", r13),
            field!(S, "_r14", r14),
            field!(S, "_r15", r15),
            field!(S, "_eip", rip, bytes 0, 4),
            field!(S, "_rip", rip),
            field!(S, "_eflags", rflags, bytes 0, 4),
            field!(S, "_rflags", rflags),
            field!(S, "_cs", cs),
            field!(S, "_ss", ss),
            field!(S, "_ds", ds),
            field!(S, "_es", es),
            field!(S, "_fs", fs),
            field!(S, "_gs", gs),
            field!(S, "_ldt", ldt),
            field!(S, "_tr", tr),
            field!(S, "_gdt", gdt),
            field!(S, "_idt", idt),
            field!(S, "_cr0", cr0),
            field!(S, "_cr2", cr2),
            field!(S, "_cr3", cr3),
            field!(S, "_cr4", cr4),
            field!(S, "_dr0", dr0),
            field!(S, "_dr1", dr1),
            field!(S, "_dr2", dr2),
            field!(S, "_dr3", dr3),
            field!(S, "_dr6", dr6),
            field!(S, "_dr7", dr7),
            field!(S, "_pde", pde),
            field!(S, "_efer", efer),
            field!(S, "_sysenter_cs", sysenter_cs),
            field!(S, "_sysenter_eip", sysenter_eip),
            field!(S, "_sysenter_esp", sysenter_esp),
            field!(S, "_activity_state", activity_state),
            field!(S, "pad", pad),
            field!(S, "_interruptibility_state", interruptibility_state),
        ]
    },
};

/// The tunnel with every member of its union.
const HAX_TUNNEL: Struct = Struct {
    name: "hax_tunnel",
    size: size_of::<Tunnel>(),
    fields: &[
        field!(Tunnel, "_exit_reason", exit_reason),
        field!(Tunnel, "pad0", pad0),
        field!(Tunnel, "_exit_status", exit_status),
        field!(Tunnel, "user_event_pending", user_event_pending),
        field!(
            Tunnel,
            "ready_for_interrupt_injection",
            ready_for_interrupt_injection
        ),
        field!(Tunnel, "request_interrupt_window", request_interrupt_window),
        field!(Tunnel, "io", view, whole TunnelIo),
        field!(Tunnel, "io._direction", view, part TunnelIo, direction),
        field!(Tunnel, "io._df", view, part TunnelIo, df),
        field!(Tunnel, "io._size", view, part TunnelIo, size),
        field!(Tunnel, "io._port", view, part TunnelIo, port),
        field!(Tunnel, "io._count", view, part TunnelIo, count),
        field!(Tunnel, "io._flags", view, part TunnelIo, flags),
        field!(Tunnel, "io._pad0", view, part TunnelIo, pad0),
        field!(Tunnel, "io._pad1", view, part TunnelIo, pad1),
        field!(Tunnel, "io._pad2", view, part TunnelIo, pad2),
        field!(Tunnel, "io._vaddr", view, part TunnelIo, vaddr),
        field!(Tunnel, "mmio", view, whole TunnelMmio),
        field!(Tunnel, "mmio.gla", view, part TunnelMmio, gla),
        field!(Tunnel, "pagefault", view, whole TunnelPageFault),
        field!(Tunnel, "pagefault.gpa", view, part TunnelPageFault, gpa),
        field!(Tunnel, "pagefault.flags", view, part TunnelPageFault, flags),
        field!(Tunnel, "pagefault.reserved1", view, part TunnelPageFault, reserved1),
        field!(Tunnel, "pagefault.reserved2", view, part TunnelPageFault, reserved2),
        field!(Tunnel, "state", view, whole TunnelState),
        field!(Tunnel, "state.dummy", view, part TunnelState, dummy),
        field!(Tunnel, "debug", view, whole TunnelDebug),
        field!(Tunnel, "debug.rip", view, part TunnelDebug, rip),
        field!(Tunnel, "debug.dr6", view, part TunnelDebug, dr6),
        field!(Tunnel, "debug.dr7", view, part TunnelDebug, dr7),
        field!(Tunnel, "apic_base", apic_base),
    ],
};
