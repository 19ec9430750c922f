//! `domsnap` on real logical volumes: each group of cases is one boot of the machine that they hold in.

mod crash;
mod live;
mod matrix;
mod served;
mod trouble;
mod users;

use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};
use lvmguest::inside::{self, Volume, read_block, run, succeed, write_block};
use lvmguest::{Group, Machine};

fn thick_snapshots_are_real() -> Result<()> {
    let disk = &inside::disks()?[0];
    succeed(Command::new("vgcreate").args(["-q", "vg", disk]))?;
    let volume = Volume::thick("vg", "o", 32)?;
    write_block(&volume.path(), 0, b'a')?;
    succeed(Command::new("lvcreate").args(["-q", "-s", "-n", "s", "-L", "8M", "vg/o"]))?;
    write_block(&volume.path(), 0, b'b')?;
    ensure!(read_block("/dev/vg/s", 0)? == b'a', "the snapshot shows what was written after it");
    succeed(Command::new("lvconvert").args(["-q", "--merge", "vg/s"]))?;
    ensure!(read_block(&volume.mapper(), 0)? == b'a', "the merge brought nothing back");
    Ok(())
}

fn disks_are_blank_before_each_case() -> Result<()> {
    let groups = succeed(Command::new("vgs").args(["--noheadings", "-o", "vg_name"]))?;
    ensure!(groups.stdout.trim().is_empty(), "{groups}");
    let none = run(Command::new("lvs").arg("vg/o"))?;
    ensure!(none.status != Some(0), "{none}");
    Ok(())
}

static GROUPS: [Group; 12] = [
    Group::new(
        "the machine has real snapshots of volumes",
        Machine::new,
        &[
            ("thick snapshots are real", thick_snapshots_are_real),
            ("disks are blank before each case", disks_are_blank_before_each_case),
        ],
    ),
    Group::new("thin volumes", Machine::new, matrix::THIN),
    Group::new("thick volumes", Machine::new, matrix::THICK),
    Group::new("thick volumes where they are as thin ones", Machine::new, matrix::THICK_AS_THIN),
    Group::new("volumes under a real udev", || Machine::new().udev(true), matrix::UDEV),
    Group::new("volumes of each sort under a real udev", || Machine::new().udev(true), matrix::UDEV_EACH),
    Group::new("volumes in trouble", Machine::new, trouble::CASES),
    Group::new("volumes and crashes", Machine::new, crash::CASES),
    Group::new("volumes that are written between crash and recovery", Machine::new, crash::WRITTEN),
    Group::new("volumes that others use beside a running domain", users::machine, users::CASES),
    Group::new("volumes beside a served disk", users::machine, served::CASES),
    Group::new("guests that run on volumes", live::machine, live::CASES),
];

fn main() -> ExitCode {
    lvmguest::main(&GROUPS)
}
