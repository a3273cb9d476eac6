//! SET_CPUID and GET_CPUID: a header and a counted table of entries.

use abi::cpuid::CPUID_ENTRIES_OFFSET;
use abi::zerocopy::IntoBytes;
use abi::{CpuidEntry, CpuidHeader, MAX_CPUID_ENTRIES};
use vmx::Error;
use vmx::fallible::try_filled;

use crate::argument::Argument;
use crate::hypervisor::CoreVcpu;
use crate::status::Failure;

/// Bytes of a table with that many entries.
fn table_size(entries: usize) -> usize {
    entries
        .saturating_mul(size_of::<CpuidEntry>())
        .saturating_add(CPUID_ENTRIES_OFFSET)
}

pub(crate) fn set<V: CoreVcpu, A: Argument>(vcpu: &V, table: &A) -> Result<(), Failure> {
    let header: CpuidHeader = table.get()?;
    let total = usize::try_from(header.total).map_err(|_| Failure::CpuidTotal)?;
    table.check_given(table_size(total))?;
    if header.total == 0 {
        return Err(Error::Invalid.into());
    }
    if header.total > MAX_CPUID_ENTRIES {
        return Err(Failure::CpuidTotal);
    }
    let mut entries = try_filled(CpuidEntry::default(), total)?;
    table.read(CPUID_ENTRIES_OFFSET, entries.as_mut_slice().as_mut_bytes())?;
    Ok(vcpu.set_cpuid(&entries)?)
}

pub(crate) fn get<V: CoreVcpu, A: Argument>(vcpu: &V, table: &mut A) -> Result<(), Failure> {
    let header: CpuidHeader = table.get()?;
    table.check_room(size_of::<CpuidHeader>())?;
    let most = usize::try_from(MAX_CPUID_ENTRIES).map_err(|_| Failure::CpuidTotal)?;
    let mut entries = try_filled(CpuidEntry::default(), most)?;
    let count = vcpu.cpuid(&mut entries);
    let filled = entries.get(..count).ok_or(Error::TooBig)?;
    let total = u32::try_from(count).map_err(|_| Failure::CpuidTotal)?;
    let answer = CpuidHeader {
        total,
        pad: header.pad,
    };
    if header.total < total {
        table.write(0, answer.as_bytes())?;
        return Err(Failure::CpuidRoom);
    }
    // The end first: if it does not fit, nothing is written.
    table.write(CPUID_ENTRIES_OFFSET, filled.as_bytes())?;
    table.write(0, answer.as_bytes())
}
