//! Where is measured: directories, the file systems that they are on, and file systems of our own on loop
//! devices.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::child;

/// The file system that a directory is on: its type, and what it is mounted from.
pub fn file_system(directory: &Path) -> Result<String> {
    let directory = directory.canonicalize()?;
    let table = std::fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let mount = table
        .lines()
        .filter_map(|line| {
            let mut args = line.split(' ');
            let (device, point, kind) = (args.next()?, args.next()?, args.next()?);
            directory.starts_with(point).then_some((point.len(), device, kind))
        })
        // The last of equals is the one mounted over the others.
        .max_by_key(|(length, ..)| *length);
    let (_, device, kind) = mount.with_context(|| format!("{} is on no mount", directory.display()))?;
    Ok(format!("{kind} on {device}"))
}

/// Refuses a directory whose files are in memory: flushes cost nothing there, so nothing could be learnt.
pub fn refuse_memory(directory: &Path) -> Result<()> {
    let kind = file_system(directory)?;
    if kind.starts_with("tmpfs") || kind.starts_with("ramfs") {
        bail!("{} is on {kind}: give a directory on a disk with --dir", directory.display());
    }
    Ok(())
}

/// A file system made for one row, on a loop device over a file; unmounted when dropped.
#[derive(Debug)]
pub struct LoopMount {
    device: PathBuf,
    point: PathBuf,
    mounted: bool,
}

impl LoopMount {
    /// Makes a file of `bytes` in `directory`, a file system of `kind` on it, and mounts that.
    pub fn make(directory: &Path, kind: &str, bytes: u64) -> Result<LoopMount> {
        let backing = directory.join(format!("{kind}.disk"));
        std::fs::File::create(&backing)?.set_len(bytes)?;
        let mkfs: &[&str] = match kind {
            "xfs" => &["-q", "-m", "reflink=1"],
            _ => &["-q"],
        };
        let mut make = child::command(format!("mkfs.{kind}"), mkfs);
        make.env("PATH", search_path());
        child::run(make.arg(&backing))?;
        let mut attach = child::command("losetup", &["--find", "--show"]);
        let device = child::output(attach.env("PATH", search_path()).arg(&backing))?;
        let point = directory.join(kind);
        let mut mount =
            LoopMount { device: PathBuf::from(device.trim()), point: point.clone(), mounted: false };
        std::fs::create_dir(&point)?;
        child::run(child::command("mount", &["-t", kind]).arg(&mount.device).arg(&point))?;
        mount.mounted = true;
        Ok(mount)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.point
    }

    /// Bytes written to the device so far, after all that is dirty has been.
    pub fn written(&self) -> Result<u64> {
        rustix::fs::syncfs(std::fs::File::open(&self.point)?)
            .context("flush the loop device's file system")?;
        let name = self.device.file_name().context("a loop device has a name")?;
        let stat = std::fs::read_to_string(Path::new("/sys/block").join(name).join("stat"))?;
        let sectors =
            stat.split_whitespace().nth(6).context("the block device's statistics are too short")?;
        Ok(sectors.parse::<u64>()? * 512)
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        let mut steps = Vec::new();
        if self.mounted {
            steps.push(child::command("umount", &[self.point.as_os_str()]));
        }
        steps.push(child::command("losetup", &["--detach".as_ref(), self.device.as_os_str()]));
        for mut step in steps {
            if let Err(error) = child::run(step.env("PATH", search_path())) {
                eprintln!("bench: {error:#}");
            }
        }
    }
}

/// Where administrators' programs are, also for those who do not search there.
fn search_path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
