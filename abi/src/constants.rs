//! HAXM's named constants as data, with their C names. Values come from the definitions the driver uses.

use crate::cpuid::MAX_CPUID_ENTRIES;
use crate::debug::DebugControl;
use crate::module::{
    COMPAT_VERSION, CURRENT_VERSION, Capabilities, FailReasons, KERNEL32_CS, KERNEL64_CS,
    MAX_VCPUS, MAX_VMS, WINDOWS_DEVICE_TYPE, WORKSTATUS_MASK, WorkStatus,
};
use crate::msr::MSR_ARRAY_LEN;
use crate::ram::{RamFlags, RamPermissions};
use crate::tunnel::{ExitStatus, IO_BUFFER_SIZE, IoDirection, PageFaultFlags};

/// One constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Constant {
    /// HAXM's C name.
    pub name: &'static str,
    /// Its value.
    pub value: u64,
}

macro_rules! constants {
    ($($name:literal = $value:expr;)+) => {
        /// All named constants that are not request numbers.
        pub const CONSTANTS: &[Constant] = &[$(Constant { name: $name, value: $value as u64 }),+];
    };
}

constants! {
    "HAX_CUR_VERSION" = CURRENT_VERSION;
    "HAX_COMPAT_VERSION" = COMPAT_VERSION;
    "HAX_MAX_VMS" = MAX_VMS;
    "HAX_MAX_VCPUS" = MAX_VCPUS;
    "HAX_MAX_MSR_ARRAY" = MSR_ARRAY_LEN;
    "HAX_MAX_CPUID_ENTRIES" = MAX_CPUID_ENTRIES;
    "IOS_MAX_BUFFER" = IO_BUFFER_SIZE;
    "HAX_DEVICE_TYPE" = WINDOWS_DEVICE_TYPE;
    "HAX_KERNEL64_CS" = KERNEL64_CS;
    "HAX_KERNEL32_CS" = KERNEL32_CS;

    "HAX_CAP_STATUS_WORKING" = WorkStatus::WORKING.bits();
    "HAX_CAP_MEMQUOTA" = WorkStatus::MEMQUOTA.bits();
    "HAX_CAP_WORKSTATUS_MASK" = WORKSTATUS_MASK;
    "HAX_CAP_FAILREASON_VT" = FailReasons::VT.bits();
    "HAX_CAP_FAILREASON_NX" = FailReasons::NX.bits();
    "HAX_CAP_EPT" = Capabilities::EPT.bits();
    "HAX_CAP_FASTMMIO" = Capabilities::FASTMMIO.bits();
    "HAX_CAP_UG" = Capabilities::UG.bits();
    "HAX_CAP_64BIT_RAMBLOCK" = Capabilities::RAMBLOCK_64BIT.bits();
    "HAX_CAP_64BIT_SETRAM" = Capabilities::SETRAM_64BIT.bits();
    "HAX_CAP_TUNNEL_PAGE" = Capabilities::TUNNEL_PAGE.bits();
    "HAX_CAP_RAM_PROTECTION" = Capabilities::RAM_PROTECTION.bits();
    "HAX_CAP_DEBUG" = Capabilities::DEBUG.bits();
    "HAX_CAP_IMPLICIT_RAMBLOCK" = Capabilities::IMPLICIT_RAMBLOCK.bits();
    "HAX_CAP_CPUID" = Capabilities::CPUID.bits();

    "HAX_RAM_INFO_ROM" = RamFlags::ROM.bits();
    "HAX_RAM_INFO_STANDALONE" = RamFlags::STANDALONE.bits();
    "HAX_RAM_INFO_INVALID" = RamFlags::INVALID.bits();
    "HAX_RAM_PERM_NONE" = RamPermissions::empty().bits();
    "HAX_RAM_PERM_RWX" = RamPermissions::RWX.bits();
    "HAX_RAM_PERM_MASK" = RamPermissions::all().bits();

    "HAX_IO_OUT" = IoDirection::Out;
    "HAX_IO_IN" = IoDirection::In;
    "HAX_PAGEFAULT_ACC_R" = PageFaultFlags::ACC_R.bits();
    "HAX_PAGEFAULT_ACC_W" = PageFaultFlags::ACC_W.bits();
    "HAX_PAGEFAULT_ACC_X" = PageFaultFlags::ACC_X.bits();
    "HAX_PAGEFAULT_PERM_R" = PageFaultFlags::PERM_R.bits();
    "HAX_PAGEFAULT_PERM_W" = PageFaultFlags::PERM_W.bits();
    "HAX_PAGEFAULT_PERM_X" = PageFaultFlags::PERM_X.bits();

    "HAX_EXIT_IO" = ExitStatus::Io;
    "HAX_EXIT_MMIO" = ExitStatus::Mmio;
    "HAX_EXIT_REALMODE" = ExitStatus::RealMode;
    "HAX_EXIT_INTERRUPT" = ExitStatus::Interrupt;
    "HAX_EXIT_UNKNOWN" = ExitStatus::Unknown;
    "HAX_EXIT_HLT" = ExitStatus::Hlt;
    "HAX_EXIT_STATECHANGE" = ExitStatus::StateChange;
    "HAX_EXIT_PAUSED" = ExitStatus::Paused;
    "HAX_EXIT_FAST_MMIO" = ExitStatus::FastMmio;
    "HAX_EXIT_PAGEFAULT" = ExitStatus::PageFault;
    "HAX_EXIT_DEBUG" = ExitStatus::Debug;

    "HAX_DEBUG_ENABLE" = DebugControl::ENABLE.bits();
    "HAX_DEBUG_STEP" = DebugControl::STEP.bits();
    "HAX_DEBUG_USE_SW_BP" = DebugControl::USE_SW_BP.bits();
    "HAX_DEBUG_USE_HW_BP" = DebugControl::USE_HW_BP.bits();
}
