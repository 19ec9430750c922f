//! In the machine: volume groups, volumes, and what they hold.

mod domsnap;
mod program;
mod volume;

pub use domsnap::{asked, domsnap, done, refused, snapshots};
pub use program::{Output, run, succeed};
pub use volume::{Volume, fill, read_block, write_block};

use std::{env, process::Command};

use anyhow::{Context, Result};

/// The blank disks, by their paths.
///
/// # Errors
/// This is not the machine.
pub fn disks() -> Result<Vec<String>> {
    let disks = env::var("LVMGUEST_PVS").context("this runs in the machine with lvm2 alone")?;
    Ok(disks.split(' ').map(str::to_owned).collect())
}

/// Makes all disks blank again: no volume group is left.
///
/// # Errors
/// Something has a volume open.
pub fn wipe() -> Result<()> {
    let groups = succeed(Command::new("vgs").args(["--noheadings", "-o", "vg_name"]))?;
    for group in groups.stdout.split_whitespace() {
        // What is invalid or suspended goes too.
        let _ = run(Command::new("vgremove").args(["-q", "-f", "-f", group]))?;
    }
    let left = succeed(Command::new("dmsetup").args(["info", "-c", "--noheadings", "-o", "name"]))?;
    for device in left.stdout.lines().filter(|line| !line.contains("No devices")) {
        let _ = run(Command::new("dmsetup").args(["remove", "-f", device.trim()]))?;
    }
    for disk in disks()? {
        // The labels and the metadata of both ends lie in the first MiB.
        let zeros = vec![0; 1 << 20];
        std::os::unix::fs::FileExt::write_all_at(
            &std::fs::File::options().write(true).open(disk)?,
            &zeros,
            0,
        )?;
    }
    for directory in ["/var/lib/domsnap", "/run/lock/domsnap"] {
        match std::fs::remove_dir_all(directory) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
