//! Volumes, and what they hold.

use std::{fs::File, io::Read, os::unix::fs::FileExt, process::Command};

use anyhow::{Context, Result, ensure};

use super::succeed;

/// What is written and compared at a time.
pub const BLOCK: usize = 4096;

/// A logical volume, by its group and name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The volume group.
    pub group: String,
    /// Its name.
    pub name: String,
}

impl Volume {
    /// A thick one of so many MiB, blank: lvm leaves in it what another volume had there.
    ///
    /// # Errors
    /// lvm's own.
    pub fn thick(group: &str, name: &str, mib: u32) -> Result<Self> {
        succeed(Command::new("lvcreate").args([
            "-q",
            "-y",
            "-Wn",
            "-n",
            name,
            "-L",
            &format!("{mib}M"),
            group,
        ]))?;
        let volume = Self { group: group.to_owned(), name: name.to_owned() };
        let device = File::options().write(true).open(volume.path())?;
        for at in 0..u64::from(mib) {
            device.write_all_at(&[0; 1 << 20], at << 20)?;
        }
        device.sync_all()?;
        Ok(volume)
    }

    /// A thin one of so many MiB, in a pool of the group.
    ///
    /// # Errors
    /// lvm's own.
    pub fn thin(group: &str, pool: &str, name: &str, mib: u32) -> Result<Self> {
        let pool = format!("{group}/{pool}");
        succeed(Command::new("lvcreate").args([
            "-q",
            "-y",
            "-Wn",
            "-n",
            name,
            "-V",
            &format!("{mib}M"),
            "--thinpool",
            &pool,
        ]))?;
        Ok(Self { group: group.to_owned(), name: name.to_owned() })
    }

    /// `/dev/GROUP/NAME`.
    pub fn path(&self) -> String {
        format!("/dev/{}/{}", self.group, self.name)
    }

    /// `/dev/mapper/GROUP-NAME`, with the hyphens of either doubled.
    pub fn mapper(&self) -> String {
        format!("/dev/mapper/{}-{}", self.group.replace('-', "--"), self.name.replace('-', "--"))
    }

    /// `GROUP/NAME`.
    pub fn qualified(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }
}

/// Writes one block full of a letter, durably.
///
/// # Errors
/// The device's own.
pub fn write_block(path: &str, block: u64, letter: u8) -> Result<()> {
    let device = File::options().write(true).open(path).with_context(|| path.to_owned())?;
    device
        .write_all_at(&[letter; BLOCK], block * BLOCK as u64)
        .with_context(|| format!("writing to {path}"))?;
    Ok(device.sync_all()?)
}

/// The letter that a block is full of.
///
/// # Errors
/// The device's own; it is full of more than one.
pub fn read_block(path: &str, block: u64) -> Result<u8> {
    let device = File::open(path).with_context(|| path.to_owned())?;
    let mut bytes = [0; BLOCK];
    device.read_exact_at(&mut bytes, block * BLOCK as u64).with_context(|| format!("reading {path}"))?;
    ensure!(bytes.iter().all(|byte| *byte == bytes[0]), "block {block} of {path} is of two writes");
    Ok(bytes[0])
}

/// Writes so many MiB of bytes that compress badly, durably.
///
/// # Errors
/// The device's own.
pub fn fill(path: &str, mib: u64) -> Result<()> {
    let device = File::options().write(true).open(path).with_context(|| path.to_owned())?;
    let mut bytes = vec![0; 1 << 20];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    for at in 0..mib {
        device.write_all_at(&bytes, at << 20).with_context(|| format!("writing to {path}"))?;
    }
    Ok(device.sync_all()?)
}
