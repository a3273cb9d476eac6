//! A reproducible initramfs: a `newc` cpio archive whose bytes depend on its contents alone.
//!
//! Entries are sorted, owned by root and dated 1970, and inode numbers count from 1, so the same
//! files always give the same archive and the emulated PC the same tick counts.
//! Format: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// Where a file's bytes come from.
#[derive(Clone, Debug)]
enum Source {
    Bytes(Vec<u8>),
    Host(PathBuf),
}

#[derive(Clone, Debug)]
enum Node {
    Directory,
    File { source: Source, mode: u32 },
    Symlink(String),
    Device { kind: u32, major: u32, minor: u32 },
}

/// The files of an initramfs, by their path in the guest. Parent directories are made as needed.
#[derive(Clone, Debug, Default)]
pub struct Initramfs {
    nodes: BTreeMap<String, Node>,
}

impl Initramfs {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a file with the bytes of a host file, read when the archive is written; executable in
    /// the guest if it is on the host.
    pub fn host_file(&mut self, guest: &str, host: impl Into<PathBuf>) -> &mut Self {
        let host = host.into();
        let executable = fs::metadata(&host).is_ok_and(|m| m.permissions().mode() & 0o111 != 0);
        let mode = if executable { 0o755 } else { 0o644 };
        let source = Source::Host(host);
        self.put(guest, Node::File { source, mode })
    }

    /// Adds a file with these bytes and permission bits.
    pub fn bytes(&mut self, guest: &str, bytes: impl Into<Vec<u8>>, mode: u32) -> &mut Self {
        let source = Source::Bytes(bytes.into());
        self.put(guest, Node::File { source, mode })
    }

    /// Adds an empty directory.
    pub fn directory(&mut self, guest: &str) -> &mut Self {
        self.put(guest, Node::Directory)
    }

    /// Adds a symbolic link at `guest` that points to `target`.
    pub fn symlink(&mut self, guest: &str, target: &str) -> &mut Self {
        self.put(guest, Node::Symlink(target.to_owned()))
    }

    /// Adds a character device node.
    pub fn char_device(&mut self, guest: &str, major: u32, minor: u32) -> &mut Self {
        self.put(
            guest,
            Node::Device {
                kind: S_IFCHR,
                major,
                minor,
            },
        )
    }

    /// Adds a block device node.
    pub fn block_device(&mut self, guest: &str, major: u32, minor: u32) -> &mut Self {
        self.put(
            guest,
            Node::Device {
                kind: S_IFBLK,
                major,
                minor,
            },
        )
    }

    /// Whether something was added at this path.
    #[must_use]
    pub fn contains(&self, guest: &str) -> bool {
        self.nodes.contains_key(&normalized(guest))
    }

    fn put(&mut self, guest: &str, node: Node) -> &mut Self {
        let path = normalized(guest);
        let mut parent = Path::new(&path).parent();
        while let Some(p) = parent.filter(|p| !p.as_os_str().is_empty()) {
            let name = p.to_string_lossy().into_owned();
            self.nodes.entry(name).or_insert(Node::Directory);
            parent = p.parent();
        }
        // A directory added again keeps what it is.
        if matches!(node, Node::Directory) {
            self.nodes.entry(path).or_insert(node);
        } else {
            self.nodes.insert(path, node);
        }
        self
    }

    /// The archive.
    ///
    /// # Errors
    /// A host file cannot be read or is 4 GiB or larger, or a path lies below something that is
    /// not a directory.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut inode = 0;
        for (path, node) in &self.nodes {
            inode += 1;
            let parent = Path::new(path).parent().map(|p| p.to_string_lossy());
            if let Some(parent) = parent.filter(|p| !p.is_empty()) {
                ensure!(
                    matches!(self.nodes.get(parent.as_ref()), Some(Node::Directory)),
                    "initramfs: /{path} lies below /{parent}, which is not a directory"
                );
            }
            let none = (0, 0);
            match node {
                Node::Directory => member(&mut out, inode, path, S_IFDIR | 0o755, none, &[])?,
                Node::Symlink(target) => {
                    member(
                        &mut out,
                        inode,
                        path,
                        S_IFLNK | 0o777,
                        none,
                        target.as_bytes(),
                    )?;
                }
                Node::Device { kind, major, minor } => {
                    member(&mut out, inode, path, kind | 0o600, (*major, *minor), &[])?;
                }
                Node::File { source, mode } => {
                    let read;
                    let data = match source {
                        Source::Bytes(bytes) => bytes,
                        Source::Host(host) => {
                            read = fs::read(host).with_context(|| {
                                format!("initramfs: cannot read {} for /{path}", host.display())
                            })?;
                            &read
                        }
                    };
                    member(&mut out, inode, path, S_IFREG | mode, none, data)?;
                }
            }
        }
        member(&mut out, 0, "TRAILER!!!", 0, (0, 0), &[])?;
        Ok(out)
    }
}

/// Paths are kept without a leading, trailing or doubled slash.
fn normalized(path: &str) -> String {
    let parts: Vec<&str> = path
        .split('/')
        .filter(|p| !p.is_empty() && *p != ".")
        .collect();
    parts.join("/")
}

fn member(
    out: &mut Vec<u8>,
    inode: u32,
    name: &str,
    mode: u32,
    device: (u32, u32),
    data: &[u8],
) -> Result<()> {
    let Ok(size) = u32::try_from(data.len()) else {
        bail!("initramfs: /{name} is too large for a cpio archive");
    };
    let links = if mode & 0o170_000 == S_IFDIR { 2 } else { 1 };
    let name_size = name.len() as u32 + 1;
    // inode mode uid gid links mtime size, device of the file system, device node, name size, check
    let fields = [
        inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0,
    ];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(data);
    pad(out);
    Ok(())
}

/// Header with name, and data, are each padded to four bytes.
fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode, device numbers and data.
    type Member = (String, u32, (u32, u32), Vec<u8>);

    /// Every member; written from the format's description and not from the writer.
    fn parse(mut bytes: &[u8]) -> Vec<Member> {
        let mut members = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[6 + i * 8..14 + i * 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            assert_eq!(
                (field(2), field(3), field(5)),
                (0, 0, 0),
                "owner and time are fixed"
            );
            let (name_size, size) = (field(11) as usize, field(6) as usize);
            let name = std::str::from_utf8(&bytes[110..110 + name_size - 1])
                .unwrap()
                .to_owned();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let start = (110 + name_size).div_ceil(4) * 4;
            let data = bytes[start..start + size].to_vec();
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), start);
                return members;
            }
            members.push((name, field(1), (field(9), field(10)), data));
            bytes = &bytes[(start + size).div_ceil(4) * 4..];
        }
    }

    #[test]
    fn members_come_back_sorted_with_their_parents() {
        let mut fs = Initramfs::new();
        fs.bytes("/usr/bin/b", "bee", 0o755)
            .symlink("/bin", "usr/bin");
        fs.char_device("dev/console", 5, 1)
            .block_device("/dev/sda", 8, 0)
            .directory("/usr/");
        let members = parse(&fs.archive().unwrap());
        let want = [
            ("bin", 0o120_777, (0, 0), "usr/bin"),
            ("dev", 0o040_755, (0, 0), ""),
            ("dev/console", 0o020_600, (5, 1), ""),
            ("dev/sda", 0o060_600, (8, 0), ""),
            ("usr", 0o040_755, (0, 0), ""),
            ("usr/bin", 0o040_755, (0, 0), ""),
            ("usr/bin/b", 0o100_755, (0, 0), "bee"),
        ];
        let want: Vec<_> = want
            .iter()
            .map(|&(n, m, d, t)| (n.to_owned(), m, d, t.as_bytes().to_vec()))
            .collect();
        assert_eq!(members, want);
    }

    #[test]
    fn order_of_adding_does_not_matter() {
        let (mut a, mut b) = (Initramfs::new(), Initramfs::new());
        a.bytes("/a", "1", 0o644).bytes("/b/c", "22", 0o644);
        b.bytes("/b/c", "22", 0o644).bytes("/a", "1", 0o644);
        assert_eq!(a.archive().unwrap(), b.archive().unwrap());
    }

    #[test]
    fn a_file_below_a_file_is_refused() {
        let mut fs = Initramfs::new();
        fs.bytes("/a/b", "", 0o644).bytes("/a", "", 0o644);
        assert!(
            fs.archive()
                .unwrap_err()
                .to_string()
                .contains("not a directory")
        );
    }

    #[test]
    fn a_missing_host_file_is_named() {
        let mut fs = Initramfs::new();
        fs.host_file("/x", "/nonexistent/file");
        assert!(
            fs.archive()
                .unwrap_err()
                .to_string()
                .contains("/nonexistent/file")
        );
    }

    #[test]
    fn the_cpio_program_reads_it() {
        // Only where cpio is installed; `parse` above is the check that always runs.
        let Ok(mut child) = std::process::Command::new("cpio")
            .args(["-t", "--quiet"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
        else {
            return;
        };
        let mut fs = Initramfs::new();
        fs.bytes("/one", "1", 0o644).bytes("/two/three", "3", 0o644);
        use std::io::Write;
        child
            .stdin
            .take()
            .unwrap()
            .write_all(&fs.archive().unwrap())
            .unwrap();
        let out = child.wait_with_output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&out.stdout),
            "one\ntwo\ntwo/three\n"
        );
    }
}
