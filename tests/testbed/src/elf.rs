//! What the boot sector must know of a `vmlinux`: its load segments and its PVH entry point.
//!
//! Formats: the ELF-64 object file format, and Xen's `public/elfnote.h` for the PVH note
//! (name "Xen", type 18, a 32-bit physical address).

use anyhow::{Context, Result, bail, ensure};

/// One segment to put into memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Offset of its bytes in the file.
    pub offset: usize,
    /// Bytes in the file.
    pub file_size: usize,
    /// Bytes in memory; what the file does not give is zero.
    pub memory_size: u64,
}

/// A kernel image that can be entered as PVH.
#[derive(Debug, PartialEq, Eq)]
pub struct PvhImage {
    /// Physical address of the 32-bit entry point.
    pub entry: u32,
    /// The segments, in file order.
    pub segments: Vec<Segment>,
}

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Reads little-endian numbers, refusing what lies outside.
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

impl<'a> Bytes<'a> {
    pub(crate) fn at(&self, offset: usize, len: usize) -> Result<&'a [u8]> {
        offset
            .checked_add(len)
            .and_then(|end| self.0.get(offset..end))
            .with_context(|| format!("{len} bytes at {offset:#x} lie outside the file"))
    }

    pub(crate) fn u16(&self, offset: usize) -> Result<u16> {
        let mut b = [0; 2];
        b.copy_from_slice(self.at(offset, 2)?);
        Ok(u16::from_le_bytes(b))
    }

    pub(crate) fn u32(&self, offset: usize) -> Result<u32> {
        let mut b = [0; 4];
        b.copy_from_slice(self.at(offset, 4)?);
        Ok(u32::from_le_bytes(b))
    }

    pub(crate) fn u64(&self, offset: usize) -> Result<u64> {
        let mut b = [0; 8];
        b.copy_from_slice(self.at(offset, 8)?);
        Ok(u64::from_le_bytes(b))
    }

    fn size(&self, offset: usize) -> Result<usize> {
        Ok(usize::try_from(self.u64(offset)?)?)
    }
}

impl PvhImage {
    /// Parses the headers of an x86-64 `vmlinux`.
    ///
    /// # Errors
    /// Not an ELF-64 file, a header outside the file, or no PVH note (a kernel without CONFIG_PVH).
    pub fn parse(file: &[u8]) -> Result<Self> {
        let bytes = Bytes(file);
        ensure!(bytes.at(0, 5)? == b"\x7fELF\x02", "not a 64-bit ELF file");
        let (table, each, count) = (
            bytes.size(32)?,
            usize::from(bytes.u16(54)?),
            usize::from(bytes.u16(56)?),
        );
        let mut segments = Vec::new();
        let mut entry = None;
        for i in 0..count {
            let header = table + i * each;
            let (offset, file_size) = (bytes.size(header + 8)?, bytes.size(header + 32)?);
            match bytes.u32(header)? {
                PT_LOAD => {
                    bytes.at(offset, file_size)?;
                    segments.push(Segment {
                        address: bytes.u64(header + 24)?,
                        offset,
                        file_size,
                        memory_size: bytes.u64(header + 40)?,
                    });
                }
                PT_NOTE => entry = entry.or(pvh_note(bytes.at(offset, file_size)?)?),
                _ => {}
            }
        }
        let Some(entry) = entry else {
            bail!("the kernel has no PVH entry note (CONFIG_PVH)");
        };
        Ok(Self { entry, segments })
    }

    /// The first physical address above everything the kernel occupies at its start.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.segments
            .iter()
            .map(|s| s.address + s.memory_size)
            .max()
            .unwrap_or(0)
    }
}

fn pvh_note(notes: &[u8]) -> Result<Option<u32>> {
    let bytes = Bytes(notes);
    let mut at = 0;
    while at + 12 <= notes.len() {
        let (name_size, size) = (bytes.u32(at)? as usize, bytes.u32(at + 4)? as usize);
        let name = at + 12;
        let description = name + name_size.next_multiple_of(4);
        if bytes.u32(at + 8)? == XEN_ELFNOTE_PHYS32_ENTRY && bytes.at(name, name_size)? == b"Xen\0"
        {
            return Ok(Some(bytes.u32(description)?));
        }
        at = description + size.next_multiple_of(4);
    }
    Ok(None)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A two-segment kernel: 16 bytes of 0xAA at 1 MiB and `second` at 2 MiB, entry `entry`.
    pub(crate) fn sample(second: &[u8], entry: u32) -> Vec<u8> {
        let mut notes = Vec::new();
        for (kind, value) in [(17_u32, 7_u32), (18, entry)] {
            for word in [4, 4, kind] {
                notes.extend_from_slice(&u32::to_le_bytes(word));
            }
            notes.extend_from_slice(b"Xen\0");
            notes.extend_from_slice(&value.to_le_bytes());
        }
        let mut f = vec![0; 64];
        f[..5].copy_from_slice(b"\x7fELF\x02");
        f[32..40].copy_from_slice(&64_u64.to_le_bytes());
        f[54..56].copy_from_slice(&56_u16.to_le_bytes());
        f[56..58].copy_from_slice(&3_u16.to_le_bytes());
        let data = 64 + 3 * 56;
        let parts: [(u32, u64, &[u8], u64); 3] = [
            (1, 0x10_0000, &[0xaa; 16], 16),
            (1, 0x20_0000, second, second.len() as u64 + 0x1000),
            (4, 0, &notes, 0),
        ];
        let mut at = data as u64;
        for (kind, address, bytes, memory) in parts {
            let mut header = vec![0; 56];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&at.to_le_bytes());
            header[24..32].copy_from_slice(&address.to_le_bytes());
            header[32..40].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            header[40..48].copy_from_slice(&memory.to_le_bytes());
            f.extend_from_slice(&header);
            at += bytes.len() as u64;
        }
        for (_, _, bytes, _) in parts {
            f.extend_from_slice(bytes);
        }
        f
    }

    #[test]
    fn segments_and_entry_are_found() {
        let image = PvhImage::parse(&sample(&[1; 100], 0x1234_5678)).unwrap();
        assert_eq!(image.entry, 0x1234_5678);
        let places: Vec<_> = image
            .segments
            .iter()
            .map(|s| (s.address, s.file_size, s.memory_size))
            .collect();
        assert_eq!(
            places,
            [(0x10_0000, 16, 16), (0x20_0000, 100, 100 + 0x1000)]
        );
        assert_eq!(image.end(), 0x20_0000 + 100 + 0x1000);
    }

    #[test]
    fn a_kernel_without_pvh_is_refused() {
        let mut f = sample(&[1; 4], 1);
        let header = 64 + 2 * 56;
        f[header..header + 4].copy_from_slice(&6_u32.to_le_bytes());
        assert!(PvhImage::parse(&f).unwrap_err().to_string().contains("PVH"));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let f = sample(&[1; 4], 1);
        for len in 0..f.len() {
            assert!(PvhImage::parse(&f[..len]).is_err(), "{len} bytes");
        }
    }
}
