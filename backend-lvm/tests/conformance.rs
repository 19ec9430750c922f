//! The behaviour kit on logical volumes, thin and thick. It runs inside of a machine with lvm2, by this same
//! program.

use std::collections::BTreeSet;
use std::env;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use backend_lvm::Lvm;
use camino::{Utf8Path, Utf8PathBuf};
use libtest_mimic::{Arguments, Failed, Trial};
use lvmguest::Machine;
use lvmguest::inside::{disks, succeed};
use snapcore::DiskRecord;
use snapcore::backend::AnyDiskSnapshotter;
use snapcore_testkit::TestBackend;

/// Test cases that do an operation again for each moment of a fault, for each name, or for many reverts: in
/// this emulated machine, more than an hour. `tests/lvmguest` has suites of its own for that.
/// `DOMSNAP_TEST_LVM_KIT=all` runs these too, and all on thick volumes, where each of the many reverts waits
/// for a merge.
const LONG: [&str; 11] = [
    "any_snapshot_name",
    "revert_repeats",
    "revert_keeps_others",
    "branch_keeps_siblings",
    "crash",
    "kill",
    "random",
    "cancel_is_atomic",
    "writes_before_recovery_kept",
    "_undo_keeps_disk",
    "failed_",
];
const WHICH: &str = "DOMSNAP_TEST_LVM_KIT";

/// Set in the machine: `thin` or `thick`.
const SORT: &str = "DOMSNAP_TEST_LVM_SORT";

/// Volumes of one group; those of one directory have its mark before their names.
struct Volumes {
    thin: bool,
}

impl Volumes {
    fn prepare(&self) -> Result<()> {
        let disks = disks()?;
        let mut args = vec!["-q", "-s", "128k", "vg"];
        args.extend(disks.iter().map(String::as_str));
        succeed(Command::new("vgcreate").args(args))?;
        if self.thin {
            let pool = [
                "-q",
                "-y",
                "--type",
                "thin-pool",
                "-n",
                "tp",
                "-L",
                "400M",
                "--poolmetadatasize",
                "8M",
                "vg",
            ];
            succeed(Command::new("lvcreate").args(pool))?;
        }
        Ok(())
    }

    fn mark(dir: &Utf8Path) -> String {
        let mut hasher = DefaultHasher::new();
        dir.hash(&mut hasher);
        format!("p{:016x}", hasher.finish())
    }

    fn of(dir: &Utf8Path) -> Result<BTreeSet<String>> {
        let listed = succeed(Command::new("lvs").args(["--noheadings", "-o", "lv_name", "vg"]))?;
        let mark = Self::mark(dir);
        Ok(listed
            .stdout
            .split_whitespace()
            .filter_map(|name| name.strip_prefix(&mark))
            .map(str::to_owned)
            .collect())
    }
}

impl TestBackend for Volumes {
    fn backend(&self) -> Arc<AnyDiskSnapshotter> {
        // The kit's guest overwrites its small disks completely between two points.
        AnyDiskSnapshotter::of(Arc::new(Lvm::new().area_percent(150)))
    }

    fn make(&self, dir: &Utf8Path, name: &str, content: &[u8]) -> Result<Utf8PathBuf> {
        let name = format!("{}{name}", Self::mark(dir));
        let size = format!("{}b", content.len());
        let mut args = vec!["-q", "-y", "-Wn", "-n", &name];
        match self.thin {
            true => args.extend(["-V", &size, "--thinpool", "vg/tp"]),
            false => args.extend(["-L", &size, "vg"]),
        }
        succeed(Command::new("lvcreate").args(args))?;
        let path = Utf8PathBuf::from(format!("/dev/vg/{name}"));
        let device = File::options().write(true).open(&path)?;
        device.write_all_at(content, 0)?;
        device.sync_all()?;
        Ok(path)
    }

    fn write(&self, disk: &DiskRecord, offset: u64, bytes: &[u8]) -> Result<()> {
        let device = File::options().write(true).open(disk.disk.path())?;
        device.write_all_at(bytes, offset)?;
        Ok(device.sync_all()?)
    }

    fn hostile_names(&self) -> Vec<String> {
        // Names that lvm2 allows, and that collide with device-mapper's escapes or our own names.
        ["a-b", "a--b", "-", "plus+", "dot.ted", "_under", "x.ds-00000001", "x.ds-zz", "trailing-"]
            .map(str::to_owned)
            .into()
    }

    fn footprint(&self, dir: &Utf8Path) -> Result<BTreeSet<String>> {
        Self::of(dir)
    }

    /// A thin revert is two renames, and lvm defers the merge of a volume that is open.
    fn path_stays(&self) -> bool {
        false
    }

    fn can_lose_power(&self) -> bool {
        false
    }

    /// It is not known which blocks belong to a thin volume alone.
    fn knows_cost(&self) -> bool {
        !self.thin
    }

    fn clear(&self, dir: &Utf8Path) -> Result<()> {
        let names = Self::of(dir)?;
        if names.is_empty() {
            return Ok(());
        }
        let mark = Self::mark(dir);
        let names: Vec<String> = names.iter().map(|name| format!("vg/{mark}{name}")).collect();
        succeed(Command::new("lvremove").args(["-q", "-f", "-y"]).args(names)).map(drop)
    }
}

fn main() -> ExitCode {
    if let Ok(sort) = env::var(SORT) {
        let volumes = Volumes { thin: sort == "thin" };
        // A copy of this program that runs one job of the kit finds the existing group.
        if env::var_os("TESTKIT_CHILD").is_none()
            && let Err(error) = volumes.prepare()
        {
            eprintln!("no volume group can be made: {error:#}");
            return ExitCode::FAILURE;
        }
        return snapcore_testkit::run(volumes);
    }
    let sorts = if all() { &["thin", "thick"][..] } else { &["thin"] };
    let cases = sorts.iter().map(|sort| {
        Trial::test(format!("the behaviour kit on {sort} volumes"), move || {
            outside(sort).map_err(|error| Failed::from(format!("{error:#}")))
        })
    });
    libtest_mimic::run(&Arguments::from_args(), cases.collect()).exit_code()
}

fn all() -> bool {
    env::var(WHICH).is_ok_and(|which| which == "all")
}

fn outside(sort: &str) -> Result<()> {
    let all = all();
    let deadline = Duration::from_secs(if all { 4 * 3600 } else { 1200 });
    let machine = Machine::new().deadline(deadline).variable(SORT, sort);
    let machine = machine.program("kit", &env::current_exe()?);
    let only = env::var("DOMSNAP_TEST_LVM_ONLY").unwrap_or_default();
    let skip: String = match all || !only.is_empty() {
        true => String::new(),
        false => LONG.iter().map(|args| format!(" --skip '{args}'")).collect(),
    };
    let ended = machine.run(&format!("/t/kit --test-threads 1 '{only}'{skip}"))?;
    print!("{}", ended.output);
    match ended.status {
        0 => Ok(()),
        status => bail!("it ended with {status} in the machine:\n{}", ended.output),
    }
}
