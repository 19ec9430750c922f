//! A file system of a certain kind, made for one test.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Whether a test may mount; where it may not, this says so.
pub fn may_mount(kind: &str) -> bool {
    let root = Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout == b"0\n");
    if !root {
        println!("SKIPPED: only root can mount an {kind} file system");
    }
    root
}

/// A file system on a loop device over a file; unmounted when dropped.
#[derive(Debug)]
pub struct Mounted {
    point: PathBuf,
    domain: PathBuf,
    _dir: tempfile::TempDir,
}

impl Mounted {
    /// Makes and mounts one of `kind` (`btrfs`, `xfs`, `ext4`).
    ///
    /// # Errors
    /// What is missing: root, the loop driver, `mkfs`.
    pub fn make(kind: &str, bytes: u64) -> Result<Mounted> {
        let dir = tempfile::Builder::new().prefix("domsnap-mount-").tempdir()?;
        let (file, point) = (dir.path().join("device"), dir.path().join("mounted"));
        std::fs::File::create(&file)?.set_len(bytes)?;
        std::fs::create_dir(&point)?;
        run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&file)).context("run scripts/install-deps")?;
        run(Command::new("mount").args(["-o", "loop", "-t", kind]).arg(&file).arg(&point))
            .context("mounting needs root, and a kernel that has the file system")?;
        let domain = point.join("domain");
        Ok(Mounted { point, domain, _dir: dir })
    }

    /// As [`Mounted::make`], or a `tmpfs` of that size.
    ///
    /// # Errors
    /// As [`Mounted::make`].
    pub fn make_small(kind: &str, bytes: u64) -> Result<Mounted> {
        if kind != "tmpfs" {
            return Self::make(kind, bytes);
        }
        let dir = tempfile::Builder::new().prefix("domsnap-mount-").tempdir()?;
        let point = dir.path().join("mounted");
        std::fs::create_dir(&point)?;
        let size = format!("size={bytes},mode=0700");
        run(Command::new("mount").args(["-t", kind, "-o", &size, "tmpfs"]).arg(&point))
            .context("mounting needs root")?;
        let domain = point.join("domain");
        Ok(Mounted { point, domain, _dir: dir })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.point
    }

    /// A directory in it for one domain, which may be removed and made again.
    pub fn domain(&self) -> &Path {
        &self.domain
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg(&self.point)) {
            eprintln!("{error:#}");
        }
    }
}

fn run(command: &mut Command) -> Result<()> {
    // Administrators' programs are not where everybody looks.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output =
        command.env("PATH", path).output().with_context(|| format!("{command:?} cannot be started"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
