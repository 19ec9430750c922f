//! Debian packages: downloaded once, unpacked, never installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::process::run;

pub(super) const ADVICE: &str = "the test guest is made of Debian packages: run scripts/install-deps, which also brings apt's lists up \
                      to date, and see that the mirror can be reached";

/// Names the newest cloud kernel by what it depends on.
const KERNEL: &str = "linux-image-cloud-amd64";

pub(super) struct Packages {
    dir: PathBuf,
}

impl Packages {
    /// Those that are kept in a directory.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// The name of the kernel's package: the one that is here, or else the newest one that apt knows.
    pub(super) fn kernel(&self) -> Result<String> {
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            match name.split_once('_') {
                Some((package, _)) if package.starts_with("linux-image-") => return Ok(package.to_owned()),
                _ => {}
            }
        }
        let depends = run(Command::new("apt-cache").args(["depends", KERNEL]), ADVICE)?;
        let found = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: linux-image-"));
        let found =
            found.with_context(|| format!("apt does not say which kernel {KERNEL} stands for: {ADVICE}"))?;
        Ok(format!("linux-image-{found}"))
    }

    /// Unpacks a package into a directory of its own in `work`; downloads it before where it is not here.
    pub(super) fn unpack(&self, package: &str, work: &Path) -> Result<PathBuf> {
        let archive = match self.here(package)? {
            Some(archive) => archive,
            None => self.download(package)?,
        };
        let tree = work.join(package);
        run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&tree), "it is part of dpkg")?;
        Ok(tree)
    }

    fn here(&self, package: &str) -> Result<Option<PathBuf>> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".deb") && name.split_once('_').is_some_and(|(found, _)| found == package) {
                return Ok(Some(entry.path()));
            }
        }
        Ok(None)
    }

    fn download(&self, package: &str) -> Result<PathBuf> {
        let work = tempfile::tempdir_in(&self.dir)?;
        // As whoever runs this: apt's own user may not write here.
        let args = ["-qq", "-o", "APT::Sandbox::User=root", "download", package];
        run(Command::new("apt-get").args(args).current_dir(work.path()), ADVICE)?;
        let Some(entry) = fs::read_dir(work.path())?.next().transpose()? else {
            bail!("apt-get downloaded nothing for {package}: {ADVICE}");
        };
        let archive = self.dir.join(entry.file_name());
        fs::rename(entry.path(), &archive)?;
        Ok(archive)
    }
}
