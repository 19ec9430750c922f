//! A guest that runs on volumes: the small one of the other live tests, under QEMU inside of this machine.
//! Everything in it is translated twice, so it is slow, and there is little of it.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lvmguest::inside::{done, refused, snapshots, succeed};
use lvmguest::{Machine, TestCase};
use testguest::{Guest, GuestOptions, Version};

use crate::matrix::{Sort, group, volume_of, volumes};

/// Where the machine has the parts that the guest is made of.
const PLACE: &str = "/guest";

const DISK_MIB: u32 = 16;

const NAME: &str = "live";

fn options() -> GuestOptions {
    let options = GuestOptions::new().disk_mib(DISK_MIB.into()).memory_mib(96).tick_ms(50);
    options.device(0, "/dev/vg/root").device(1, "/dev/mapper/vg-data").deadline(Duration::from_secs(600))
}

/// A machine that can run a guest.
pub fn machine() -> Machine {
    let expect = "what the guest in the machine is made of is not here";
    let machine = Machine::new().memory_mib(2560).deadline(Duration::from_secs(1500));
    let machine = machine
        .variable("DOMSNAP_TEST_GUEST", PLACE)
        .program("qemu-system-x86_64", &testguest::parts::program(Version::New).expect(expect));
    options().luggage().expect(expect).iter().fold(machine, |machine, (file, place)| {
        machine.file(&Path::new(PLACE).join(place).to_string_lossy(), file)
    })
}

/// A domain whose first disk is a thin volume, and whose second is a thick one.
struct Live {
    guest: Guest,
    pid: Option<u32>,
}

impl Live {
    fn start() -> Result<Self> {
        group(Sort::Thin)?;
        volume_of(Sort::Thin, "root", DISK_MIB)?;
        volume_of(Sort::Thick, "data", DISK_MIB)?;
        let begun = Instant::now();
        let guest = options().kept(Path::new(PLACE)).start()?;
        println!("        the guest was ready after {:.0?}", begun.elapsed());
        let socket = guest.qmp_socket().to_string_lossy().into_owned();
        done(&["domain", "add", NAME, "--qmp", &socket, "--memory-dir", "/vm"])?;
        guest.blocks(16, 5.0)?;
        guest.wait_ticks(5)?;
        let pid = guest.pid();
        Ok(Self { guest, pid })
    }

    /// It runs on in the same process, and never saw memory and disks of two instants.
    fn sound(&self) -> Result<()> {
        self.guest.wait_ticks(5)?;
        self.guest.expect_no_bad()?;
        self.guest.verify_blocks()?;
        ensure!(self.guest.pid() == self.pid, "it is another QEMU");
        Ok(())
    }

    fn reported(&self, args: &[&str]) -> Result<()> {
        let begun = Instant::now();
        let output = done(args)?;
        println!("{:>7.1} s {}: {}", begun.elapsed().as_secs_f32(), args.join(" "), output.stdout.trim());
        self.sound().with_context(|| args.join(" "))
    }

    /// Takes a snapshot; between which ticks.
    fn create(&self, args: &[&str]) -> Result<(u64, u64)> {
        let before = self.guest.ticks()?;
        self.reported(&[&["create", NAME], args].concat())?;
        Ok((before, self.guest.ticks()?))
    }

    /// Reverts to a snapshot with memory that was taken between two ticks.
    fn revert(&self, name: &str, (before, after): (u64, u64)) -> Result<()> {
        done(&["revert", NAME, name, "--paused"])?;
        let ticks = self.guest.last_tick();
        self.guest.qmp("cont", serde_json::Value::Null)?;
        let now = self.guest.ticks()?;
        println!("        reverted to {name}: it goes on at {now}, and was at {ticks:?}");
        ensure!((before..=after).contains(&now), "it goes on at {now}, not between {before} and {after}");
        self.sound().with_context(|| format!("reverted to {name}"))
    }
}

fn memory_and_volumes_come_back_in_place() -> Result<()> {
    let live = Live::start()?;
    let blank = volumes()?;
    // lvm's count of openings has QEMU's too: what the machine itself uses beside it is found all the same.
    succeed(Command::new("dmsetup").args(["create", "upper", "--table", "0 8 linear /dev/vg/root 0"]))?;
    refused(&["create", NAME, "none"], &["this machine itself", "part of the device upper"])?;
    succeed(Command::new("dmsetup").args(["remove", "upper"]))?;
    let one = live.create(&["one"])?;
    let two = live.create(&["two"])?;
    for (name, ticks) in [("one", one), ("two", two), ("one", one)] {
        live.revert(name, ticks)?;
    }
    live.create(&["disks", "--disk-only"])?;
    // It is paused at its reset: to boot would take it minutes.
    done(&["revert", NAME, "disks", "--paused"])?;
    live.revert("two", two)?;
    live.reported(&["delete", NAME, "one"])?;
    live.reported(&["delete", NAME, "disks", "two"])?;
    ensure!(snapshots(NAME)?.is_empty(), "{:?}", snapshots(NAME)?);
    ensure!(volumes()? == blank, "left behind: {:?}", volumes()?);
    Ok(())
}

pub const CASES: &[TestCase] = &[(
    "a guest that runs on a thin and a thick volume is created with memory and without, reverted in place and deleted",
    memory_and_volumes_come_back_in_place,
)];
