//! The named constants, typed in here a second time.

use haxm_abi::constants::CONSTANTS;

const EXPECTED: [(&str, u64); 50] = [
    ("HAX_CUR_VERSION", 4),
    ("HAX_COMPAT_VERSION", 1),
    ("HAX_MAX_VMS", 64),
    ("HAX_MAX_VCPUS", 16),
    ("HAX_MAX_MSR_ARRAY", 32),
    ("HAX_MAX_CPUID_ENTRIES", 64),
    ("IOS_MAX_BUFFER", 64),
    ("HAX_DEVICE_TYPE", 0x4000),
    ("HAX_KERNEL64_CS", 0x80),
    ("HAX_KERNEL32_CS", 0x08),
    ("HAX_CAP_STATUS_WORKING", 0x1),
    ("HAX_CAP_MEMQUOTA", 0x2),
    ("HAX_CAP_WORKSTATUS_MASK", 0x1),
    ("HAX_CAP_FAILREASON_VT", 0x1),
    ("HAX_CAP_FAILREASON_NX", 0x2),
    ("HAX_CAP_EPT", 0x1),
    ("HAX_CAP_FASTMMIO", 0x2),
    ("HAX_CAP_UG", 0x4),
    ("HAX_CAP_64BIT_RAMBLOCK", 0x8),
    ("HAX_CAP_64BIT_SETRAM", 0x10),
    ("HAX_CAP_TUNNEL_PAGE", 0x20),
    ("HAX_CAP_RAM_PROTECTION", 0x40),
    ("HAX_CAP_DEBUG", 0x80),
    ("HAX_CAP_IMPLICIT_RAMBLOCK", 0x100),
    ("HAX_CAP_CPUID", 0x200),
    ("HAX_RAM_INFO_ROM", 0x1),
    ("HAX_RAM_INFO_STANDALONE", 0x40),
    ("HAX_RAM_INFO_INVALID", 0x80),
    ("HAX_RAM_PERM_NONE", 0),
    ("HAX_RAM_PERM_RWX", 7),
    ("HAX_RAM_PERM_MASK", 7),
    ("HAX_IO_OUT", 0),
    ("HAX_IO_IN", 1),
    ("HAX_PAGEFAULT_ACC_R", 0x1),
    ("HAX_PAGEFAULT_ACC_W", 0x2),
    ("HAX_PAGEFAULT_ACC_X", 0x4),
    ("HAX_PAGEFAULT_PERM_R", 0x10),
    ("HAX_PAGEFAULT_PERM_W", 0x20),
    ("HAX_PAGEFAULT_PERM_X", 0x40),
    ("HAX_EXIT_IO", 1),
    ("HAX_EXIT_MMIO", 2),
    ("HAX_EXIT_REALMODE", 3),
    ("HAX_EXIT_INTERRUPT", 4),
    ("HAX_EXIT_UNKNOWN", 5),
    ("HAX_EXIT_HLT", 6),
    ("HAX_EXIT_STATECHANGE", 7),
    ("HAX_EXIT_PAUSED", 8),
    ("HAX_EXIT_FAST_MMIO", 9),
    ("HAX_EXIT_PAGEFAULT", 10),
    ("HAX_EXIT_DEBUG", 11),
];

const DEBUG_BITS: [(&str, u64); 4] = [
    ("HAX_DEBUG_ENABLE", 1),
    ("HAX_DEBUG_STEP", 2),
    ("HAX_DEBUG_USE_SW_BP", 4),
    ("HAX_DEBUG_USE_HW_BP", 8),
];

#[test]
fn constants_have_haxms_names_and_values() {
    let found: Vec<_> = CONSTANTS.iter().map(|c| (c.name, c.value)).collect();
    assert_eq!(found, [EXPECTED.as_slice(), &DEBUG_BITS].concat());
}
