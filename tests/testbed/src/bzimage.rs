//! Gets the `vmlinux` out of a `bzImage`: finds the compressed payload by the setup header and
//! hands it to the packer's own program.
//!
//! Setup header: the kernel's `Documentation/arch/x86/boot.rst` (`setup_sects`, `payload_offset`,
//! `payload_length`, boot protocol 2.08).

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::elf::Bytes;

/// How a payload is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    None,
    /// gzip
    Gzip,
    /// lz4, legacy frame
    Lz4,
    /// xz
    Xz,
    /// Zstandard
    Zstd,
}

impl Packing {
    /// Told by its first bytes.
    #[must_use]
    pub fn of(data: &[u8]) -> Option<Self> {
        const MAGIC: [(&[u8], Packing); 5] = [
            (b"\x7fELF", Packing::None),
            (b"\x1f\x8b", Packing::Gzip),
            (b"\x02\x21\x4c\x18", Packing::Lz4),
            (b"\xfd7zXZ\0", Packing::Xz),
            (b"\x28\xb5\x2f\xfd", Packing::Zstd),
        ];
        MAGIC
            .iter()
            .find(|(magic, _)| data.starts_with(magic))
            .map(|(_, p)| *p)
    }

    /// The program that unpacks it from stdin to stdout; also the name of its Debian package,
    /// but for xz (xz-utils).
    fn program(self) -> Option<&'static str> {
        match self {
            Packing::None => None,
            Packing::Gzip => Some("gzip"),
            Packing::Lz4 => Some("lz4"),
            Packing::Xz => Some("xz"),
            Packing::Zstd => Some("zstd"),
        }
    }

    /// Unpacks `data`.
    ///
    /// # Errors
    /// The program is not installed or reports a fault.
    pub fn unpack(self, data: &[u8]) -> Result<Vec<u8>> {
        use std::io::Write;
        let Some(program) = self.program() else {
            return Ok(data.to_vec());
        };
        let mut child = Command::new(program)
            .arg("-dc")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {program} (is its Debian package installed?)"))?;
        let mut stdin = child.stdin.take();
        let out = std::thread::scope(|scope| {
            scope.spawn(move || {
                // A program that stops early says why on stderr.
                drop(stdin.as_mut().map(|s| s.write_all(data)));
                drop(stdin);
            });
            child.wait_with_output()
        })?;
        if !out.status.success() {
            bail!("{program}: {}", String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(out.stdout)
    }
}

/// Where the payload lies, and the size it says it unpacks to.
fn payload(image: &[u8]) -> Result<(&[u8], Packing, Option<u32>)> {
    let bytes = Bytes(image);
    ensure!(
        bytes.at(0x202, 4)? == b"HdrS",
        "no setup header: not a bzImage"
    );
    let version = bytes.u16(0x206)?;
    ensure!(
        version >= 0x208,
        "boot protocol {version:#x} is too old: no payload offset"
    );
    // 0 means 4, for history's sake.
    let sectors = match bytes.at(0x1f1, 1)? {
        [0] => 4,
        [n] => usize::from(*n),
        _ => bail!("no setup_sects"),
    };
    let start = (sectors + 1) * 512 + bytes.u32(0x248)? as usize;
    let data = bytes.at(start, bytes.u32(0x24c)? as usize)?;
    let packing = Packing::of(data).context("the payload is packed in a way not known here")?;
    match packing {
        // gzip keeps the size in its own trailer; an unpacked payload needs none.
        Packing::Gzip | Packing::None => Ok((data, packing, None)),
        // The build appends the unpacked size, which the packers do not know.
        _ => {
            let at = data.len().checked_sub(4).context("the payload is empty")?;
            let size = Bytes(data).u32(at)?;
            Ok((&data[..at], packing, Some(size)))
        }
    }
}

/// The `vmlinux` in a `bzImage`.
///
/// # Errors
/// Not a bzImage, an unknown packing, or a payload that does not unpack to an ELF file of the size
/// the image gives.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    let (data, packing, size) = payload(image)?;
    let out = packing.unpack(data)?;
    if let Some(size) = size {
        ensure!(
            out.len() == size as usize,
            "the payload unpacks to {} bytes, the image says {size}",
            out.len()
        );
    }
    ensure!(
        out.starts_with(b"\x7fELF"),
        "the payload is not an ELF file"
    );
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with `sectors` setup sectors and this payload, 32 bytes into the 32-bit code.
    fn image(sectors: u8, payload: &[u8]) -> Vec<u8> {
        let real = if sectors == 0 {
            4
        } else {
            usize::from(sectors)
        };
        let mut f = vec![0; (real + 1) * 512 + 32];
        f[0x1f1] = sectors;
        f[0x202..0x206].copy_from_slice(b"HdrS");
        f[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        f[0x248..0x24c].copy_from_slice(&32_u32.to_le_bytes());
        f[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        f.extend_from_slice(payload);
        f.extend_from_slice(b"after the payload");
        f
    }

    #[test]
    fn a_plain_payload_comes_out_whole() {
        for sectors in [0, 1, 27] {
            assert_eq!(vmlinux(&image(sectors, b"\x7fELF!")).unwrap(), b"\x7fELF!");
        }
    }

    #[test]
    fn packed_payloads_come_out_whole() {
        let elf: Vec<u8> = b"\x7fELF"
            .iter()
            .copied()
            .chain((0..100_000).map(|i| (i / 7) as u8))
            .collect();
        // gzip and xz are on every Debian; lz4 and zstd are tried where they are.
        for (program, args, needed) in [
            ("gzip", &["-c"][..], true),
            ("xz", &["-c", "--check=crc32"], true),
            ("lz4", &["-l", "-c"], false),
            ("zstd", &["-c"], false),
        ] {
            let dir = std::env::temp_dir().join(format!("haxm-bzimage-{}", std::process::id()));
            std::fs::write(&dir, &elf).unwrap();
            let input = std::fs::File::open(&dir).unwrap();
            let packed = Command::new(program).args(args).stdin(input).output();
            std::fs::remove_file(&dir).unwrap();
            let mut packed = match packed {
                Ok(out) if out.status.success() => out.stdout,
                other => {
                    assert!(!needed, "{program}: {other:?}");
                    continue;
                }
            };
            if program != "gzip" {
                packed.extend_from_slice(&(elf.len() as u32).to_le_bytes());
            }
            assert_eq!(vmlinux(&image(3, &packed)).unwrap(), elf, "{program}");
            // A size that does not fit is noticed.
            if program != "gzip" {
                let end = packed.len();
                packed[end - 4..].copy_from_slice(&1_u32.to_le_bytes());
                assert!(vmlinux(&image(3, &packed)).is_err());
            }
        }
    }

    #[test]
    fn other_files_are_refused() {
        assert!(vmlinux(b"MZ").is_err());
        let mut old = image(1, b"\x7fELF");
        old[0x206..0x208].copy_from_slice(&0x207_u16.to_le_bytes());
        assert!(vmlinux(&old).unwrap_err().to_string().contains("too old"));
        let unknown = vmlinux(&image(1, b"BZh9....")).unwrap_err();
        assert!(unknown.to_string().contains("not known"));
        let mut long = image(1, b"\x7fELF");
        long[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(vmlinux(&long).unwrap_err().to_string().contains("outside"));
    }
}
