//! The rows of the table, in its order.

/// Which figure of a row is compared.
#[derive(Clone, Copy)]
pub(crate) enum By {
    Median,
    /// For rows whose cost is in few of the samples.
    Mean,
}

#[derive(Clone, Copy)]
pub(crate) enum Target {
    None,
    /// Of KVM's figure.
    Ratio(f64),
    /// At most so much.
    Most(u64),
}

/// A row of the table.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) by: By,
    pub(crate) target: Target,
    /// HAXM 7.8, measured once on the same emulated PC by other means.
    pub(crate) haxm_7_8: Option<u64>,
    /// In the chart.
    pub(crate) drawn: bool,
    /// Held by a ceiling.
    pub(crate) held: bool,
}

const fn row(name: &'static str, what: &'static str) -> Row {
    Row {
        name,
        what,
        by: By::Median,
        target: Target::None,
        haxm_7_8: None,
        drawn: false,
        held: false,
    }
}

impl Row {
    /// The project's aim: at most so much of KVM's figure.
    const fn ratio(mut self, most: f64) -> Self {
        self.target = Target::Ratio(most);
        self
    }

    /// The project's aim: at most so much.
    const fn most(mut self, most: u64) -> Self {
        self.target = Target::Most(most);
        self
    }

    const fn haxm(mut self, figure: u64) -> Self {
        self.haxm_7_8 = Some(figure);
        self
    }

    const fn mean(mut self) -> Self {
        self.by = By::Mean;
        self
    }

    const fn drawn(mut self) -> Self {
        self.drawn = true;
        self
    }

    const fn held(mut self) -> Self {
        self.held = true;
        self
    }
}

/// Rows by what they are about.
pub(crate) const GROUPS: &[(&str, &[Row])] = &[
    ("Exits, as the client sees them", CLIENT),
    ("Exits, as the guest sees them", GUEST),
    ("Memory", MEMORY),
    ("Growth", GROWTH),
    ("Making and unmaking", MAKING),
    ("Whole guests under QEMU", QEMU),
];

const CLIENT: &[Row] = &[
    row("bad_descriptor", "system call that does nothing"),
    row("null_ioctl", "ioctl that no driver knows, on the vCPU").held(),
    row("out", "OUT to user space and back")
        .ratio(0.5)
        .haxm(6222)
        .drawn()
        .held(),
    row("in", "IN from user space").drawn().held(),
    row("mmio_write", "MMIO write to user space")
        .ratio(0.5)
        .haxm(7384)
        .drawn()
        .held(),
    row("mmio_read", "MMIO read from user space")
        .ratio(0.5)
        .haxm(7335)
        .drawn()
        .held(),
    row("mmio_test", "MMIO read from user space by TEST")
        .ratio(0.5)
        .drawn()
        .held(),
    row("outs_4096", "REP OUTSB of 4096 bytes").held(),
    row("outs_4096_exits", "the same: returns to user space").held(),
    row("hlt_wake", "HLT to user space, INTERRUPT, handler, HLT")
        .drawn()
        .held(),
    row("inject", "INTERRUPT to the handler's OUT")
        .drawn()
        .held(),
];

const GUEST: &[Row] = &[
    row("cpuid", "CPUID").ratio(0.3).haxm(5332).drawn().held(),
    row("rdmsr", "RDMSR (IA32_PAT)").drawn().held(),
    row("wrmsr", "WRMSR (IA32_PAT)").drawn().held(),
    row("wrmsr_sysenter", "WRMSR (IA32_SYSENTER_CS)").held(),
    row("cr0_ts", "CR0.TS changed").held(),
    row("cr0_wp", "CR0.WP changed").held(),
    row("cr0_cd", "CR0.CD changed").held(),
    row("cr4_pge", "CR4.PGE changed").held(),
    row("cr4_pae", "CR4.PAE changed").held(),
    row("cr8", "CR8 read, raised and lowered").held(),
];

const MEMORY: &[Row] = &[
    row(
        "host_fault",
        "the kernel's own page fault in a process, mean of 1024 in the quietest of 5 passes",
    )
    .mean(),
    row(
        "touch_first",
        "first touch of a 4 KB page, the same mean, in a row",
    )
    .mean()
    .ratio(0.5)
    .haxm(3989)
    .drawn()
    .held(),
    row("touch_scattered", "the same in no order")
        .mean()
        .drawn(),
    row(
        "touch_host_4k",
        "touch of a 4 KB page the host has, 4 KB backing, the same mean",
    )
    .mean()
    .ratio(0.5)
    .haxm(468)
    .drawn()
    .held(),
    row("fault_2m", "the fault that maps 2 MB the host has")
        .drawn()
        .held(),
    row(
        "touch_host_2m",
        "touch of a 4 KB page, 2 MB backing, the same mean",
    )
    .mean()
    .most(20),
    row("slots_1", "one slot mapped and unmapped, 1 other").drawn(),
    row("slots_100", "the same, 100 others"),
    row("slots_10000", "the same, 10,000 others"),
    row("slots_100000", "the same, 100,000 others"),
    // 0.3 % and 0.01 %.
    row(
        "held_4k",
        "bytes of module memory for 1 GB of RAM in 4 KB leaves",
    )
    .most((1 << 30) / 1000 * 3),
    row("held_4k_host", "the same by what the kernel has less"),
    row(
        "held_2m",
        "bytes of module memory for 1 GB of RAM in 2 MB leaves",
    )
    .most((1 << 30) / 10_000),
    row("held_2m_host", "the same by what the kernel has less"),
];

const GROWTH: &[Row] = &[
    row("out_1_vcpu", "OUT, 1 vCPU in the VM"),
    row("out_16_vcpus", "OUT on one of 16 vCPUs, the most a VM has").held(),
    row("out_16_vcpus_in_turn", "OUT on each of 16 vCPUs in turn").held(),
    row("out_1_vms", "OUT, 1 VM"),
    row("out_16_vms", "OUT in one of 16 VMs").held(),
    row("out_64_vms", "OUT in one of 64 VMs, the most there are").held(),
    row("out_64_vms_in_turn", "OUT in each of 64 VMs in turn").held(),
    row("out_mmio_1_slot", "OUT and MMIO write, 1 slot"),
    row("out_mmio_10000_slots", "OUT and MMIO write, 10,000 slots"),
    row("vm_bytes", "host memory of a VM, bytes"),
    row("vcpu_bytes", "host memory of a vCPU, bytes"),
];

const MAKING: &[Row] = &[
    row("vm_create", "VM created and open"),
    row("vm_close", "VM closed"),
    row("vcpu_create", "vCPU created and open"),
    row("module_load", "module loaded (KVM: three)"),
    row("module_unload", "module unloaded"),
    row("text", "bytes of code and constants in the module")
        .most(200 << 10)
        .haxm(207 << 10)
        .drawn(),
];

const QEMU: &[Row] = &[
    row(
        "linux_microvm",
        "Linux on microvm, QEMU's start to its exit",
    )
    .ratio(1.0)
    .drawn(),
    row("linux_pc", "Linux on pc, QEMU's start to its exit")
        .ratio(1.0)
        .drawn(),
    row("ipi", "mprotect that interrupts the other of 2 vCPUs").drawn(),
    row("ipi_none", "mprotect with the other vCPU idle"),
];

/// All rows.
pub(crate) fn all() -> impl Iterator<Item = &'static Row> {
    GROUPS.iter().flat_map(|(_, rows)| rows.iter())
}
