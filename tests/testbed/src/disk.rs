//! The boot disk: a boot sector, an info page that tells it what to load, the kernel and the
//! initramfs, as one flat image. boot.S describes the layout from the other side.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::elf::PvhImage;

/// Bytes in a sector.
pub const SECTOR: usize = 512;
/// Where the boot sector loads the info page.
const INFO: u32 = 0x2_0000;
/// Where it puts the memory map.
const MEMORY_MAP: u32 = 0x2_1000;
const INFO_BYTES: usize = 4096;
const COMMAND_LINE: usize = 0x200;
const EXTENTS: usize = 0x800;
/// The last entry stays zero: it ends the table.
const MAX_EXTENTS: usize = (INFO_BYTES - EXTENTS) / 12 - 1;
/// Runs of zeros of this size are not loaded: memory is zero at power-on.
const CHUNK: usize = 64 * 1024;
/// The initramfs goes above the kernel and the memory it takes early for itself.
const INITRAMFS_LOWEST: u64 = 96 << 20;
const HEADS: u32 = 16;
const SECTORS_PER_TRACK: u32 = 63;

/// What to boot.
pub struct Boot<'a> {
    /// The assembled boot sector, 512 bytes.
    pub boot_sector: &'a [u8],
    /// An uncompressed kernel with a PVH entry.
    pub vmlinux: &'a [u8],
    /// A cpio archive.
    pub initramfs: &'a [u8],
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Bytes of memory of the PC.
    pub memory: u64,
}

/// One stretch of the disk to load to one place.
#[derive(Debug, PartialEq, Eq)]
struct Extent<'a> {
    lba: u32,
    sectors: u32,
    destination: u32,
    data: &'a [u8],
}

/// The size of the finished image, as the BIOS wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders of 16 heads and 63 sectors per track.
    pub cylinders: u32,
}

impl Boot<'_> {
    /// Writes the image; sectors of zeros stay holes in the file.
    ///
    /// # Errors
    /// Something does not fit (memory, extent table, command line, disk), or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<Geometry> {
        let (info, extents) = self.layout()?;
        let end = extents.last().map_or(0, |e| e.lba + e.sectors);
        let cylinders = end.div_ceil(HEADS * SECTORS_PER_TRACK).max(1);
        let bytes = u64::from(cylinders * HEADS * SECTORS_PER_TRACK) * SECTOR as u64;
        let write = || -> std::io::Result<()> {
            let mut file = File::create(path)?;
            file.set_len(bytes)?;
            file.write_all(self.boot_sector)?;
            file.write_all(&info)?;
            for extent in &extents {
                file.seek(SeekFrom::Start(u64::from(extent.lba) * SECTOR as u64))?;
                file.write_all(extent.data)?;
            }
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Geometry { cylinders })
    }

    fn layout(&self) -> Result<(Vec<u8>, Vec<Extent<'_>>)> {
        ensure!(
            self.boot_sector.len() == SECTOR && self.boot_sector.ends_with(&[0x55, 0xaa]),
            "the boot sector must be 512 bytes and end with 55 AA"
        );
        let kernel = PvhImage::parse(self.vmlinux).context("cannot boot this kernel")?;
        let mut lba = 1 + (INFO_BYTES / SECTOR) as u32;
        let mut extents: Vec<Extent<'_>> = Vec::new();
        for segment in &kernel.segments {
            let data = &self.vmlinux[segment.offset..segment.offset + segment.file_size];
            for (start, run) in nonzero_runs(data) {
                let destination = u32::try_from(segment.address + start as u64)
                    .context("the kernel wants to be loaded above 4 GiB")?;
                push(&mut extents, &mut lba, destination, run)?;
            }
        }
        let initramfs = kernel.end().next_multiple_of(2 << 20).max(INITRAMFS_LOWEST);
        let end = initramfs + self.initramfs.len() as u64;
        ensure!(
            end <= self.memory && end < 3 << 30,
            "an initramfs of {} MiB needs a PC with more than {} MiB of memory",
            self.initramfs.len() >> 20,
            end >> 20
        );
        let initramfs = initramfs as u32;
        push(&mut extents, &mut lba, initramfs, self.initramfs)?;
        ensure!(
            extents.len() <= MAX_EXTENTS,
            "the kernel is too fragmented for the boot sector"
        );
        Ok((self.info_page(&kernel, initramfs, &extents)?, extents))
    }

    /// Layouts of hvm_start_info and hvm_modlist_entry: Xen's `public/arch-x86/hvm/start_info.h`.
    fn info_page(
        &self,
        kernel: &PvhImage,
        initramfs: u32,
        extents: &[Extent<'_>],
    ) -> Result<Vec<u8>> {
        let mut page = vec![0; INFO_BYTES];
        let mut put =
            |at: usize, value: u32| page[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(0x00, 0x336e_c578); // magic
        put(0x04, 1); // version: with a memory map
        put(0x0c, 1); // modules
        put(0x10, INFO + 0x40);
        put(0x18, INFO + COMMAND_LINE as u32);
        put(0x28, MEMORY_MAP);
        put(0x40, initramfs);
        put(0x48, self.initramfs.len() as u32);
        put(0x80, kernel.entry);
        for (i, e) in extents.iter().enumerate() {
            let at = EXTENTS + i * 12;
            put(at, e.lba);
            put(at + 4, e.sectors);
            put(at + 8, e.destination);
        }
        let line = self.command_line.as_bytes();
        ensure!(
            line.len() < EXTENTS - COMMAND_LINE,
            "the kernel command line is too long"
        );
        page[COMMAND_LINE..COMMAND_LINE + line.len()].copy_from_slice(line);
        Ok(page)
    }
}

fn push<'a>(
    extents: &mut Vec<Extent<'a>>,
    lba: &mut u32,
    destination: u32,
    data: &'a [u8],
) -> Result<()> {
    let sectors = u32::try_from(data.len().div_ceil(SECTOR))?;
    extents.push(Extent {
        lba: *lba,
        sectors,
        destination,
        data,
    });
    *lba += sectors;
    // 28-bit addressing.
    ensure!(*lba < 1 << 28, "the boot disk is too large");
    Ok(())
}

/// The parts of `data` that are not 64 KiB chunks of zeros, each with its offset.
fn nonzero_runs(data: &[u8]) -> Vec<(usize, &[u8])> {
    static ZEROS: [u8; CHUNK] = [0; CHUNK];
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (i, chunk) in data.chunks(CHUNK).enumerate() {
        // A slice comparison, quick without optimisation as well.
        if chunk == &ZEROS[..chunk.len()] {
            continue;
        }
        let (start, end) = (i * CHUNK, i * CHUNK + chunk.len());
        match runs.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => runs.push((start, end)),
        }
    }
    runs.into_iter()
        .map(|(start, end)| (start, &data[start..end]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::Bytes;
    use crate::elf::tests::sample;

    fn sector() -> Vec<u8> {
        let mut s = vec![0x90; SECTOR];
        s[510..].copy_from_slice(&[0x55, 0xaa]);
        s
    }

    /// Does what boot.S does: loads every extent of the image into a memory.
    fn load(image: &[u8], memory: usize) -> (Vec<u8>, Vec<u8>) {
        let mut ram = vec![0; memory];
        let info = image[SECTOR..SECTOR + 4096].to_vec();
        let b = Bytes(&info);
        let mut at = 0x800;
        loop {
            let [lba, sectors, to] = [0, 4, 8].map(|o| b.u32(at + o).unwrap() as usize);
            if sectors == 0 {
                return (info, ram);
            }
            let data = &image[lba * SECTOR..(lba + sectors) * SECTOR];
            ram[to..to + data.len()].copy_from_slice(data);
            at += 12;
        }
    }

    #[test]
    fn the_image_loads_as_the_boot_sector_reads_it() {
        // Three chunks of zeros in the middle stay out.
        let mut second = vec![0x11; 5 * CHUNK + 100];
        second[CHUNK..4 * CHUNK].fill(0);
        let vmlinux = sample(&second, 0x10_0004);
        let initramfs: Vec<u8> = (0..5000).map(|i| i as u8).collect();
        let boot = Boot {
            boot_sector: &sector(),
            vmlinux: &vmlinux,
            initramfs: &initramfs,
            command_line: "console=ttyS0",
            memory: 128 << 20,
        };
        let path = std::env::temp_dir().join(format!("haxm-disk-{}", std::process::id()));
        let geometry = boot.write(&path).unwrap();
        let image = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();

        assert_eq!(image.len(), geometry.cylinders as usize * 16 * 63 * SECTOR);
        assert!(
            image.len() < 3 * CHUNK + 16 * 63 * SECTOR,
            "zero chunks are not stored"
        );
        let (info, ram) = load(&image, 128 << 20);
        assert_eq!(&ram[0x10_0000..0x10_0010], &[0xaa; 16]);
        assert_eq!(&ram[0x20_0000..0x20_0000 + second.len()], &second[..]);
        let b = Bytes(&info);
        assert_eq!(b.u32(0).unwrap(), 0x336e_c578);
        assert_eq!(b.u32(0x80).unwrap(), 0x10_0004);
        let module = b.u64(0x40).unwrap() as usize;
        assert_eq!(module, 96 << 20);
        assert_eq!(b.u64(0x48).unwrap(), 5000);
        assert_eq!(&ram[module..module + 5000], &initramfs[..]);
        let line = b.u64(0x18).unwrap() as usize - INFO as usize;
        assert_eq!(&info[line..line + 14], b"console=ttyS0\0");
    }

    #[test]
    fn runs_of_zeros_are_left_out() {
        let mut data = vec![0; 4 * CHUNK + 10];
        assert!(nonzero_runs(&data).is_empty());
        data[CHUNK - 1] = 1;
        data[CHUNK] = 1;
        data[4 * CHUNK + 9] = 1;
        let runs: Vec<_> = nonzero_runs(&data)
            .iter()
            .map(|(at, d)| (*at, d.len()))
            .collect();
        assert_eq!(runs, [(0, 2 * CHUNK), (4 * CHUNK, 10)]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (vmlinux, sector) = (sample(&[1; 10], 0), sector());
        let good = || Boot {
            boot_sector: &sector,
            vmlinux: &vmlinux,
            initramfs: &[7; 4096],
            command_line: "",
            memory: 128 << 20,
        };
        assert!(good().layout().is_ok());
        assert!(
            Boot {
                memory: 96 << 20,
                ..good()
            }
            .layout()
            .is_err()
        );
        assert!(
            Boot {
                boot_sector: &[0; 512],
                ..good()
            }
            .layout()
            .is_err()
        );
        let long = "x".repeat(EXTENTS - COMMAND_LINE);
        assert!(
            Boot {
                command_line: &long,
                ..good()
            }
            .layout()
            .is_err()
        );
    }
}
