//! Extended page tables: entries, the EPT pointer, INVEPT and INVVPID types.
//!
//! SDM 29.3.2 "EPT Translation Mechanism", 25.6.11 "Extended-Page-Table
//! Pointer (EPTP)", appendix A.10 "VPID and EPT Capabilities".

use bitflags::bitflags;

bitflags! {
    /// An entry of an EPT paging structure.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EptEntry: u64 {
        /// Reads allowed.
        const READ = 1 << 0;
        /// Writes allowed.
        const WRITE = 1 << 1;
        /// Fetches allowed.
        const EXECUTE = 1 << 2;
        /// Leaf: memory type bit 0 of bits 5:3.
        const MEMORY_TYPE_0 = 1 << 3;
        /// Leaf: memory type bit 1.
        const MEMORY_TYPE_1 = 1 << 4;
        /// Leaf: memory type bit 2.
        const MEMORY_TYPE_2 = 1 << 5;
        /// Leaf: ignore the guest's PAT.
        const IGNORE_PAT = 1 << 6;
        /// This entry of a PDPT or a PD maps a page.
        const LARGE = 1 << 7;
        /// Accessed, if the EPTP enables the flags.
        const ACCESSED = 1 << 8;
        /// Dirty, if the EPTP enables the flags.
        const DIRTY = 1 << 9;
        const _ = !0;
    }

    /// IA32_VMX_EPT_VPID_CAP, SDM appendix A.10.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct EptVpidCaps: u64 {
        /// Execute-only entries.
        const EXECUTE_ONLY = 1 << 0;
        /// Page-walk length 4.
        const WALK_4 = 1 << 6;
        /// Paging structures can be write-back.
        const MEMORY_TYPE_WB = 1 << 14;
        /// 2 MB leaves.
        const PAGE_2M = 1 << 16;
        /// 1 GB leaves.
        const PAGE_1G = 1 << 17;
        /// INVEPT exists.
        const INVEPT = 1 << 20;
        /// Accessed and dirty flags.
        const ACCESSED_DIRTY = 1 << 21;
        /// INVEPT for one EPTP.
        const INVEPT_SINGLE = 1 << 25;
        /// INVEPT for all.
        const INVEPT_ALL = 1 << 26;
        /// INVVPID exists.
        const INVVPID = 1 << 32;
        /// INVVPID for one address.
        const INVVPID_ADDRESS = 1 << 40;
        /// INVVPID for one VPID.
        const INVVPID_SINGLE = 1 << 41;
        /// INVVPID for all VPIDs.
        const INVVPID_ALL = 1 << 42;
        /// INVVPID for one VPID, keeping global translations.
        const INVVPID_SINGLE_KEEP_GLOBAL = 1 << 43;
        const _ = !0;
    }
}

/// The memory type "write-back" as an EPT leaf has it, in bits 5:3.
pub const LEAF_WB: u64 = 6 << 3;
/// The physical-address bits 51:12 of an entry.
pub const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;
/// EPTP bits 2:0: write-back paging structures.
pub const EPTP_WB: u64 = 6;
/// EPTP bits 5:3: page-walk length 4, stored as length - 1.
pub const EPTP_WALK_4: u64 = 3 << 3;
/// EPTP bit 6: accessed and dirty flags on.
pub const EPTP_ACCESSED_DIRTY: u64 = 1 << 6;

/// INVEPT types, SDM 31.3 "VMX Instructions", INVEPT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum InveptKind {
    /// Translations derived from one EPTP.
    Single = 1,
    /// All translations.
    All = 2,
}

/// INVVPID types, SDM 31.3 "VMX Instructions", INVVPID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum InvvpidKind {
    /// One linear address of one VPID.
    Address = 0,
    /// One VPID.
    Single = 1,
    /// All VPIDs but 0.
    All = 2,
}
