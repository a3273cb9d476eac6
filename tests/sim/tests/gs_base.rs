//! IA32_KERNEL_GS_BASE, which neither entry nor exit switches and which a guest and a process
//! change without one: exchanged by SWAPGS where that is safe, by MSR accesses elsewhere.

use sim::client::Client;
use sim::{Machine, Profile, Step};

const FS_BASE: u32 = 0xc000_0100;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// Canonical in 57 bits, not in 48.
const WIDE: u64 = 0x00ff_0000_0000_1000;
const CR4_LA57: u64 = 1 << 12;
const CR4_FSGSBASE: u64 = 1 << 16;

fn machine(change: impl FnOnce(&mut Profile)) -> Machine {
    let mut profile = Profile::haswell();
    change(&mut profile);
    Machine::new(profile, 1)
}

/// The host has set these bits of CR4, and VMX operation allows them (SDM A.8 "VMX-Fixed Bits in
/// CR4").
fn set_cr4(profile: &mut Profile, bits: u64) {
    profile.host_cr4 |= bits;
    *profile.msrs.entry(0x489).or_default() |= bits;
}

/// Addresses of 57 bits exist.
fn widen(profile: &mut Profile) {
    profile.linear_bits = 57;
    let sizes = profile.cpuid.entry((0x8000_0008, 0)).or_default();
    sizes.eax = sizes.eax & 0xff | 57 << 8;
}

/// Guest and process each keep their own value, though both change it; whether by SWAPGS.
fn exchanged(machine: &Machine, values: &[u64]) -> bool {
    let client = Client::new(machine);
    client.protected_mode();
    for value in values {
        let before = client.msr(KERNEL_GS_BASE).unwrap();
        machine.set_msr(0, KERNEL_GS_BASE, value ^ 0x1230);
        machine.set_msr(0, FS_BASE, value ^ 0x4560);
        client.run([
            Step::rdmsr(KERNEL_GS_BASE),
            Step::expect_gpr(0, before & 0xffff_ffff),
            Step::expect_gpr(2, before >> 32),
            Step::wrmsr(KERNEL_GS_BASE, *value),
            Step::output(0x80, 1, 0),
        ]);
        // That FS base and this one come back the simulator sees to; but not that it
        // is the process's new value.
        assert_eq!(machine.msr(0, KERNEL_GS_BASE), Some(value ^ 0x1230));
        assert_eq!(machine.msr(0, FS_BASE), Some(value ^ 0x4560));
        assert_eq!(client.msr(KERNEL_GS_BASE), Some(*value));
    }
    let counts = machine.counts();
    let swaps = 2 * values.len() as u64;
    assert!(counts.swapgs == 0 || counts.swapgs == swaps, "{counts:?}");
    client.finish();
    counts.swapgs != 0
}

const VALUES: [u64; 3] = [0x7fff_1234_5000, 0xffff_8880_0000_0000, 0];

#[test]
fn by_swapgs() {
    assert!(exchanged(&machine(|_| {}), &VALUES));
}

#[test]
fn not_without_fsgsbase() {
    assert!(!exchanged(
        &machine(|p| p.host_cr4 &= !CR4_FSGSBASE),
        &VALUES
    ));
}

#[test]
fn not_where_an_nmi_would_find_a_foreign_gs() {
    let machine = Machine::haswell();
    machine.set_tolerates_gs(false);
    assert!(!exchanged(&machine, &VALUES));
}

/// The guest loads by WRMSR what WRGSBASE does not take while CR4.LA57 is clear.
#[test]
fn not_where_addresses_could_be_wider() {
    let values = [WIDE, VALUES[1], 0];
    assert!(!exchanged(&machine(widen), &values));
    let wide = machine(|profile| {
        widen(profile);
        set_cr4(profile, CR4_LA57);
    });
    assert!(exchanged(&wide, &values));
}
