//! The work folder: everything fetched or built is kept under one root, made once under a name
//! that holds a key of its recipe, and appears there whole or not at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Names another place for the work folder.
pub const ENVIRONMENT: &str = "HAXM_TESTBED_DIR";

/// Prints one line of progress on stderr.
pub fn progress(text: &str) {
    eprintln!("testbed: {text}");
}

/// A short hash (FNV-1a, 64 bits) of a recipe, for names. Not for security.
#[must_use]
pub fn key<P: AsRef<[u8]>>(parts: &[P]) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        // A separator, so that ("ab", "c") differs from ("a", "bc").
        for &byte in part.as_ref().iter().chain(&[0xff]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

/// What tells one large file from another as [`key`] does, eight bytes at a time.
///
/// # Errors
/// The file cannot be read.
pub fn key_of_file(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let words = bytes.chunks_exact(8);
    let rest = words.remainder();
    let hash = words.fold(0_u64, |hash, word| {
        let word = word
            .iter()
            .fold(0, |word, byte| word << 8 | u64::from(*byte));
        (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    });
    Ok(key(&[&hash.to_be_bytes()[..], rest]))
}

/// The work folder.
#[derive(Clone, Debug)]
pub struct WorkFolder {
    root: PathBuf,
}

impl WorkFolder {
    /// `HAXM_TESTBED_DIR`, or `target/testbed` of this workspace.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open() -> Result<Self> {
        let root = std::env::var_os(ENVIRONMENT).map_or_else(
            || workspace_root().join("target").join("testbed"),
            PathBuf::from,
        );
        Self::at(&root)
    }

    /// A work folder at this place, made if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn at(root: &Path) -> Result<Self> {
        fs::create_dir_all(root).with_context(|| {
            format!(
                "cannot make {} ({ENVIRONMENT} names another place)",
                root.display()
            )
        })?;
        Ok(Self {
            root: root.canonicalize()?,
        })
    }

    /// The folder itself: an absolute path.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Makes the folder `name` once: `build` fills a temporary folder, which then takes the name.
    /// Two processes that want the same do the work once; an interrupted build leaves nothing
    /// under the name. What is built must not depend on the path it was built at.
    ///
    /// # Errors
    /// Those of `build`, and of the file system.
    pub fn once(&self, name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let done = self.path(name);
        if done.exists() {
            return Ok(done);
        }
        let _lock = self.lock(name)?;
        if done.exists() {
            return Ok(done);
        }
        let temporary = self.path(&format!("{name}.part"));
        if temporary.exists() {
            fs::remove_dir_all(&temporary)?;
        }
        fs::create_dir_all(&temporary)?;
        build(&temporary)?;
        fs::rename(&temporary, &done)
            .with_context(|| format!("cannot finish {}", done.display()))?;
        Ok(done)
    }

    /// Holds other processes off `name` until it is dropped.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn lock(&self, name: &str) -> Result<File> {
        use rustix::fs::{FlockOperation, flock};
        let path = self.path(&format!(".{name}.lock"));
        let file =
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            progress(&format!("waiting for another process that makes {name}"));
            flock(&file, FlockOperation::LockExclusive)?;
        }
        Ok(file)
    }

    /// Writes a small file whole or not at all.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let temporary = self.path(&format!("{name}.{}.part", std::process::id()));
        fs::write(&temporary, text)?;
        fs::rename(&temporary, self.path(name))?;
        Ok(())
    }

    /// Reads a small file written by [`WorkFolder::write`]; `None` if it is not there.
    #[must_use]
    pub fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path(name)).ok()
    }
}

/// The folder of the workspace's Cargo.toml: above the package that cargo runs, or above this one
/// where it was compiled.
#[must_use]
pub fn workspace_root() -> PathBuf {
    let compiled = Path::new(env!("CARGO_MANIFEST_DIR"));
    let running = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let start = running.or_else(|| std::env::current_dir().ok());
    let is_root = |p: &&Path| p.join("tests").join("testbed").join("Cargo.toml").is_file();
    start
        .as_deref()
        .and_then(|s| s.ancestors().find(is_root))
        .or_else(|| compiled.ancestors().find(is_root))
        .unwrap_or(compiled)
        .to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    fn folder(name: &str) -> WorkFolder {
        let root = std::env::temp_dir().join(format!("haxm-folder-{name}-{}", std::process::id()));
        WorkFolder::at(&root).unwrap()
    }

    #[test]
    fn a_thing_is_made_once_and_a_failure_leaves_nothing() {
        let work = folder("once");
        assert!(work.once("a", |_| bail!("no")).is_err());
        assert!(!work.path("a").exists());
        let made = work
            .once("a", |dir| Ok(fs::write(dir.join("f"), "1")?))
            .unwrap();
        assert_eq!(fs::read(made.join("f")).unwrap(), b"1");
        work.once("a", |_| bail!("made a second time")).unwrap();
        fs::remove_dir_all(work.root()).unwrap();
    }

    #[test]
    fn two_at_once_make_it_once() {
        let work = folder("two");
        let made = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    work.once("a", |_| {
                        made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        std::thread::sleep(std::time::Duration::from_millis(30));
                        Ok(())
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
        fs::remove_dir_all(work.root()).unwrap();
    }

    #[test]
    fn keys_tell_recipes_apart() {
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_eq!(key(&["ab", "c"]), key(&["ab", "c"]));
    }

    #[test]
    fn keys_tell_files_apart() {
        let path = std::env::temp_dir().join(format!("haxm-key-{}", std::process::id()));
        let mut seen = std::collections::BTreeSet::new();
        let mut bytes = vec![0; 27];
        for at in [0, 7, 8, 23, 24, 26] {
            bytes[at] ^= 0x80;
            fs::write(&path, &bytes).unwrap();
            assert!(seen.insert(key_of_file(&path).unwrap()));
            assert!(!seen.insert(key_of_file(&path).unwrap()));
        }
        fs::remove_file(&path).unwrap();
    }
}
