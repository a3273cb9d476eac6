//! Which packages there are: the ones of this machine's release, or those of another release or
//! architecture on the same mirror, by lists of their own that the machine's apt never sees.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command;
use crate::folder::{WorkFolder, key, progress};

/// A set of package lists.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    /// apt's configuration file; the machine's own if `None`.
    config: Option<PathBuf>,
}

impl Archive {
    /// What this machine's apt knows.
    #[must_use]
    pub fn machine() -> Self {
        Self::default()
    }

    /// These suites of Debian's main archive, for an architecture in Debian's words (`amd64`,
    /// `i386`). The lists are fetched when first wanted, into the work folder.
    ///
    /// # Errors
    /// This machine's apt uses no mirror of Debian, or it does not answer.
    pub fn of(work: &WorkFolder, suites: &[&str], architecture: &str) -> Result<Self> {
        let name = format!("apt-{}", key(&[suites, &[architecture]].concat()));
        let lists = work.once(&name, |dir| {
            progress(&format!(
                "reading the package lists of Debian's {} ({architecture})",
                suites.join(" and ")
            ));
            let site = mirror()?;
            let line = |suite: &&str| {
                format!("deb [arch={architecture} signed-by={KEYS}] {site} {suite} main\n")
            };
            let sources: String = suites.iter().map(line).collect();
            fs::write(dir.join("sources.list"), sources)?;
            for folder in ["lists/partial", "cache/archives/partial"] {
                fs::create_dir_all(dir.join(folder))?;
            }
            let config = write_config(dir, architecture)?;
            let mut update = Command::new("apt-get");
            update.args(["-q", "update"]).env("APT_CONFIG", &config);
            command::output(&mut update)
                .map(drop)
                .with_context(|| format!("no package lists for {}", suites.join(", ")))
        })?;
        Ok(Self {
            config: Some(write_config(&lists, architecture)?),
        })
    }

    /// One of apt's programs, reading these lists.
    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        if let Some(config) = &self.config {
            command.env("APT_CONFIG", config);
        }
        command
    }

    /// All package names that begin with `prefix`.
    ///
    /// # Errors
    /// apt-cache cannot be run.
    pub fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let text = command::output(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// What `package` depends on, first alternatives included.
    ///
    /// # Errors
    /// apt-cache cannot be run or does not know it.
    pub fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let text = command::output(self.apt("apt-cache").args(["depends", package]))?;
        let names = text.lines().filter_map(|l| {
            let l = l.trim().trim_start_matches('|');
            l.strip_prefix("Depends: ").map(str::to_owned)
        });
        Ok(names.collect())
    }

    /// Fetches packages without installing them and gives the paths of the files, which are kept.
    ///
    /// # Errors
    /// apt does not know one of them, or the mirror does not answer.
    pub fn fetch(&self, work: &WorkFolder, packages: &[&str]) -> Result<Vec<PathBuf>> {
        // One folder per set: it appears when all of it is there.
        let origin = self.config.as_ref().map(|c| c.display().to_string());
        let name = match &origin {
            None => format!("packages-{}", key(packages)),
            Some(origin) => format!("packages-{}", key(&[&[origin.as_str()], packages].concat())),
        };
        let folder = work.once(&name, |dir| {
            let mut download = self.apt("apt-get");
            download
                .args(["-q", "download"])
                .args(packages)
                .current_dir(dir);
            command::output(&mut download).map(drop).with_context(|| {
                let hint = match &self.config {
                    None => "apt-get update may help".to_owned(),
                    Some(config) => format!(
                        "with {} removed its lists are read anew",
                        config.parent().unwrap_or(config).display()
                    ),
                };
                format!("cannot fetch {} ({hint})", packages.join(" "))
            })
        })?;
        let mut files = Vec::new();
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "deb") {
                files.push(path);
            }
        }
        files.sort();
        ensure!(
            files.len() == packages.len(),
            "{} is not complete: remove it",
            folder.display()
        );
        Ok(files)
    }
}

/// Debian's keys, of the package debian-archive-keyring, which every Debian has.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The mirror that this machine takes Debian's main archive from.
fn mirror() -> Result<String> {
    let text = command::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(SITE) $(RELEASE) $(ORIGIN) $(COMPONENT)",
        "Identifier: Packages",
    ]))?;
    let found = text.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let [site, release, "Debian", "main"] = words.as_slice() else {
            return None;
        };
        (!release.contains('-')).then(|| (*site).to_owned())
    });
    found.context("apt takes nothing from Debian's main archive here: no other release to be had")
}

/// Writes apt's configuration for the lists in `dir`.
fn write_config(dir: &Path, architecture: &str) -> Result<PathBuf> {
    let at = |name: &str| dir.join(name).display().to_string();
    let text = format!(
        "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"/dev/null\";\n\
         Dir::State::lists \"{}\";\nDir::State::status \"/dev/null\";\nDir::Cache \"{}\";\n\
         APT::Architecture \"{architecture}\";\nAPT::Architectures {{ \"{architecture}\"; }};\n\
         APT::Sandbox::User \"\";\n",
        at("sources.list"),
        at("lists"),
        at("cache"),
    );
    let path = dir.join("apt.conf");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
