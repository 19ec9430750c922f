//! Groups: snapshots of several domains that happen in all of them, or in none. At rest, and of machines that
//! are idle; `live_group` has guests that talk to each other.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use domsnap_tests::domain::{copy_tree, files};
use domsnap_tests::domsnap::{Domsnap, Outcome, status};
use domsnap_tests::idle::{Boot, Idle, has_pattern};
use domsnap_tests::shim::{self, Often};
use domsnap_tests::{qemu, report, seed};
use serde_json::Value;
use testguest::Version;

/// The domains, of which the first decides.
const DOMAINS: [&str; 3] = ["db", "queue", "shop"];
const ALL: &str = "shop,db,queue";

/// What is on the disks at the first snapshot, and now.
const THEN: u8 = 0x11;
const NOW: u8 = 0x22;

/// Domains at rest with a disk each, in directories of their own.
struct Group {
    dir: tempfile::TempDir,
}

impl Group {
    /// With the pattern [`NOW`] on each disk.
    fn new() -> Result<Self> {
        let group = Self { dir: tempfile::Builder::new().prefix("domsnap-group-").tempdir()? };
        for name in DOMAINS {
            let disk = group.disk(name);
            std::fs::create_dir_all(disk.parent().context("a directory")?)?;
            qemu::img(&["create", "-q", "-f", "qcow2", &text(&disk), "1M"])?;
            let place = format!("vda={},format=qcow2", disk.display());
            group.domsnap().done(&["domain", "add", name, "--disk", &place])?;
        }
        group.write(NOW)?;
        Ok(group)
    }

    /// With a snapshot `s1` of the group, which has [`THEN`].
    fn with_snapshot() -> Result<Self> {
        let group = Self::new()?;
        group.write(THEN)?;
        group.domsnap().done(&["create", ALL, "s1", "--group"])?;
        group.write(NOW)?;
        Ok(group)
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("vm")
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.root().join(name).join("vda.qcow2")
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.root().join("state"))
    }

    fn write(&self, pattern: u8) -> Result<()> {
        DOMAINS.iter().try_for_each(|name| write(&self.disk(name), pattern))
    }

    /// What a kill may leave is looked at by path, so the copy comes back to the same place.
    fn restore_from(&self, copy: &Path) -> Result<()> {
        std::fs::remove_dir_all(self.root())?;
        copy_tree(copy, &self.root())
    }

    /// The names of the snapshots, which are the same in all domains.
    fn names(&self) -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for name in DOMAINS {
            let list = report::list(&self.domsnap(), name)?;
            all.insert(list.snapshots.into_iter().map(|snapshot| snapshot.name).collect::<BTreeSet<_>>());
        }
        match all.len() {
            1 => all.pop_first().context("no domain"),
            _ => bail!("the domains have different snapshots: {all:?}"),
        }
    }

    /// All images are sound, each snapshot has its pattern, all disks have the same one, and nothing passing
    /// is left. Gives the pattern.
    fn sound(&self) -> Result<u8> {
        let mut patterns = BTreeSet::new();
        for name in DOMAINS {
            let disk = self.disk(name);
            patterns.insert(pattern_of(&disk, None)?);
            for snapshot in report::list(&self.domsnap(), name)?.snapshots {
                for point in &snapshot.points {
                    let found = pattern_of(&point.layer, point.tag.as_deref())?;
                    let wanted = if snapshot.name == "s1" { THEN } else { NOW };
                    ensure!(found == wanted, "{} of {name} has {found:#x}", snapshot.name);
                }
            }
        }
        for (file, _) in files(&self.root())? {
            let path = self.root().join(&file);
            let shown = text(&file);
            ensure!(
                ![".part", ".domsnap-new", ".domsnap-switch", ".json.tmp"]
                    .iter()
                    .any(|end| shown.ends_with(end)),
                "{shown} is left"
            );
            if path.extension().is_some_and(|extension| extension == "qcow2") {
                qemu::check(&path)?;
            }
        }
        for name in DOMAINS {
            self.domsnap().done(&["check", name])?;
        }
        let pattern = patterns.pop_first().context("no disk")?;
        ensure!(patterns.is_empty(), "the disks have {pattern:#x} and {patterns:?}");
        Ok(pattern)
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn write(disk: &Path, pattern: u8) -> Result<()> {
    let command = format!("write -P {pattern} 256k 64k");
    qemu::run("qemu-io", &["-f", "qcow2", "-c", &command, &text(disk)]).map(drop)
}

/// The byte of which a disk or a snapshot in it has its pattern.
fn pattern_of(image: &Path, tag: Option<&str>) -> Result<u8> {
    let bytes = qemu::read(image, tag)?;
    let part = bytes.get(256 << 10..320 << 10).context("a disk is too short")?;
    ensure!(part.iter().all(|byte| *byte == part[0]), "{} has a torn pattern", image.display());
    Ok(part[0])
}

/// A group is created, shown, planned, reverted and deleted in all domains.
#[test]
fn group_at_rest_is_made_shown_and_removed() -> Result<()> {
    let group = Group::new()?;
    let domsnap = group.domsnap();
    group.write(THEN)?;
    let planned: Value = domsnap.done(&["create", ALL, "s1", "--group", "--dry-run", "--json"])?.json()?;
    let planned = planned["domains"].as_array().context("plans")?;
    let names: Vec<&str> = planned.iter().filter_map(|plan| plan["domain"].as_str()).collect();
    ensure!(names == DOMAINS, "the plans are of {names:?}");
    ensure!(group.names()?.is_empty(), "a dry run has made a snapshot");
    let created: Value = domsnap.done(&["create", ALL, "s1", "--group", "--json"])?.json()?;
    let id = created["group"].as_str().context("an identity")?.to_owned();
    for member in created["domains"].as_array().context("domains")? {
        ensure!(member["snapshot"]["group"]["id"] == *id, "{member}");
        ensure!(member["snapshot"]["group"]["domains"] == serde_json::json!(DOMAINS), "{member}");
    }
    ensure!(domsnap.done(&["list", "db"])?.stdout.contains("[group of 3]"));
    ensure!(domsnap.done(&["show", "shop", "s1"])?.stdout.contains("db, queue, shop, at one instant"));
    ensure!(domsnap.done(&["history", "shop"])?.stdout.contains("create (group)"));

    // In all domains or in none: a name that one of them has refuses all.
    domsnap.done(&["create", "queue", "s2"])?;
    let refused = domsnap.run(&["create", ALL, "s2", "--group"])?.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("domain queue has a snapshot s2 already"), "{refused}");
    domsnap.done(&["delete", "queue", "s2"])?;

    // Manifests have the group: the catalogue can be lost.
    let manifest = group.root().join("shop/vda.qcow2.domsnap");
    let mut found = false;
    for (file, _) in files(&manifest)? {
        found |= std::fs::read_to_string(manifest.join(file)).is_ok_and(|text| text.contains(&id));
    }
    ensure!(found, "no manifest of shop has the group");
    std::fs::remove_dir_all(group.root().join("state"))?;
    for name in DOMAINS {
        domsnap.done(&["import", &text(&group.disk(name)), "--name", name])?;
    }
    let shown: Value = domsnap.done(&["show", "shop", "s1", "--json"])?.json()?;
    ensure!(shown["snapshot"]["group"]["id"] == *id, "{shown}");

    group.write(NOW)?;
    domsnap.done(&["revert", ALL, "s1", "--group", "--json"])?;
    ensure!(group.sound()? == THEN, "the revert did not bring back what the group had");
    let one = domsnap.done(&["delete", "queue", "s1", "--dry-run"])?;
    ensure!(one.stdout.contains("taken at one instant with those of db, shop"), "{one}");
    let deleted: Value = domsnap.done(&["delete", ALL, "s1", "--group", "--json"])?.json()?;
    ensure!(deleted["group"] == *id && group.names()?.is_empty(), "{deleted}");
    ensure!(group.sound()? == THEN, "the delete changed the disks");
    Ok(())
}

/// A snapshot of a group is a snapshot of its domain: it is reverted to and deleted alone, also where those
/// of the others are gone; and the rest of the group is reverted together.
#[test]
fn member_is_used_without_its_group() -> Result<()> {
    let group = Group::with_snapshot()?;
    let domsnap = group.domsnap();
    domsnap.done(&["revert", "queue", "s1"])?;
    ensure!(pattern_of(&group.disk("queue"), None)? == THEN && pattern_of(&group.disk("db"), None)? == NOW);
    let deleted = domsnap.done(&["delete", "queue", "s1"])?;
    ensure!(deleted.stdout.contains("that group is not whole any more"), "{deleted}");
    let refused = domsnap.run(&["revert", ALL, "s1", "--group"])?.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("queue"), "{refused}");
    domsnap.done(&["revert", "shop,db", "s1", "--group"])?;
    ensure!(pattern_of(&group.disk("db"), None)? == THEN && pattern_of(&group.disk("shop"), None)? == THEN);
    domsnap.done(&["delete", "db", "s1"])?;
    domsnap.done(&["delete", "shop", "s1"])?;
    ensure!(group.names()?.is_empty() && group.sound()? == THEN);
    // The name is free again.
    domsnap.done(&["create", ALL, "s1", "--group"])?;
    ensure!(group.sound()? == THEN);
    Ok(())
}

/// What cannot be one group is refused before anything is begun.
#[test]
fn what_is_no_group_is_refused() -> Result<()> {
    let group = Group::with_snapshot()?;
    let domsnap = group.domsnap();
    let refused = |args: &[&str], wanted: i32, why: &str| -> Result<Outcome> {
        let outcome = domsnap.run(args)?.expect_status(wanted)?;
        ensure!(outcome.stderr.contains(why), "it does not say {why:?}: {outcome}");
        Ok(outcome)
    };
    refused(&["create", "db", "s2", "--group"], status::USAGE, "two domains or more")?;
    refused(&["create", "db,shop,db", "s2", "--group"], status::USAGE, "domain db is named twice")?;
    refused(&["create", "db,,shop", "s2", "--group"], status::USAGE, "two domains or more")?;
    refused(&["create", "db,web", "s2", "--group"], status::REFUSED, "there is no domain web")?;
    refused(&["revert", "db,shop", "s9", "--group"], status::REFUSED, "s9")?;
    refused(&["create", ALL, "s1", "--group"], status::REFUSED, "has a snapshot s1 already")?;
    refused(&["revert", ALL, "s1", "--group", "--undo=memory"], status::USAGE, "--undo=memory")?;
    // One file of two domains.
    let shared = group.root().join("shared.qcow2");
    std::fs::hard_link(group.disk("db"), &shared)?;
    let outcome = domsnap.run(&["create", &format!("db,{}", shared.display()), "s2", "--group"])?;
    let declined = matches!(outcome.status, Some(status::USAGE | status::REFUSED));
    ensure!(declined && outcome.stderr.contains("db"), "{outcome}");
    std::fs::remove_file(shared)?;
    // A base that two domains share is no file that one of them writes.
    let base = group.root().join("base.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &text(&base), "1M"])?;
    let overlay = |name: &str| -> Result<String> {
        let path = group.root().join(name);
        let args = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &text(&path)];
        qemu::img(&args)?;
        Ok(text(&path))
    };
    domsnap.done(&["create", &format!("{},{}", overlay("x.qcow2")?, overlay("y.qcow2")?), "s", "--group"])?;
    // Snapshots of one name that were taken one after the other.
    for name in ["db", "shop"] {
        domsnap.done(&["create", name, "alone"])?;
    }
    refused(&["revert", "db,shop", "alone", "--group"], status::REFUSED, "belongs to no group")?;
    domsnap.done(&["create", "db,shop", "two", "--group"])?;
    domsnap.done(&["create", "queue", "two"])?;
    refused(&["delete", ALL, "two", "--group"], status::REFUSED, "belongs to no group")?;
    domsnap.done(&["delete", "queue", "two"])?;
    domsnap.done(&["create", "queue,shop", "three", "--group"])?;
    domsnap.done(&["delete", "shop", "three"])?;
    domsnap.done(&["create", "db,shop", "three", "--group"])?;
    refused(&["revert", ALL, "three", "--group"], status::REFUSED, "different groups")?;
    // A hold in one of them keeps all.
    domsnap.done(&["hold", "shop", "s1", "--holder", "backup"])?;
    refused(&["delete", ALL, "s1", "--group"], status::REFUSED, "held by backup")?;
    ensure!(report::list(&domsnap, "db")?.snapshots.iter().any(|snapshot| snapshot.name == "s1"));
    domsnap.done(&["release", "shop", "s1", "--holder", "backup"])?;
    // Another process has one of the images open.
    let (busy, disk) = (group.disk("queue"), group.disk("queue"));
    let _lock = LockedImage::hold(&disk)?;
    let outcome = domsnap.run(&["create", ALL, "s4", "--group"])?;
    ensure!(outcome.status == Some(status::REFUSED), "{} is locked: {outcome}", busy.display());
    Ok(())
}

/// An image that a QEMU has open.
struct LockedImage {
    _qemu: Idle,
    _dir: tempfile::TempDir,
}

impl LockedImage {
    fn hold(image: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let drive = format!("if=none,id=d,format=qcow2,file={}", image.display());
        let qemu = Idle::start(
            Version::New,
            dir.path(),
            "m",
            &["-drive", &drive, "-device", "virtio-blk-pci,drive=d"],
        )?;
        Ok(Self { _qemu: qemu, _dir: dir })
    }
}

/// An operation of the group, and what it does to the snapshots and the disks.
struct Operation {
    args: &'static [&'static str],
    prepare: fn() -> Result<Group>,
    before: (&'static [&'static str], u8),
    after: (&'static [&'static str], u8),
}

const CREATE: Operation = Operation {
    args: &["create", ALL, "s2", "--group"],
    prepare: Group::with_snapshot,
    before: (&["s1"], NOW),
    after: (&["s1", "s2"], NOW),
};

const REVERT: Operation = Operation {
    args: &["revert", ALL, "s1", "--group"],
    prepare: Group::with_snapshot,
    before: (&["s1"], NOW),
    after: (&["s1"], THEN),
};

const DELETE: Operation = Operation {
    args: &["delete", ALL, "s1", "--group"],
    prepare: Group::with_snapshot,
    before: (&["s1"], NOW),
    after: (&[], NOW),
};

/// Returns true if the operation has happened, in all domains; false if in none.
fn happened(group: &Group, operation: &Operation) -> Result<bool> {
    let found = group.names()?;
    let pattern = group.sound()?;
    let is = |(names, wanted): (&[&str], u8)| {
        found == names.iter().map(|name| (*name).to_owned()).collect() && pattern == wanted
    };
    match (is(operation.before), is(operation.after)) {
        (false, false) => bail!("there are {found:?}, and the disks have {pattern:#x}"),
        (_, after) => Ok(after),
    }
}

/// Kills the operation at one of `DOMSNAP_GROUP_EVERY` of the instants that differ, by default of 48, and
/// recovers the domains one by one, beginning with another one each time: none of them guesses.
fn kill_everywhere(operation: &Operation) -> Result<()> {
    let every = usize::try_from(seed::from_env("DOMSNAP_GROUP_EVERY", 48))?.max(1);
    let group = (operation.prepare)()?;
    let copy = group.dir.path().join("copy");
    copy_tree(&group.root(), &copy)?;
    let (_outputs, file) = shim::outputs()?;
    let counting = shim::counting(shim::watching(group.domsnap(), &group.root())?, &file);
    counting.done(operation.args)?;
    ensure!(happened(&group, operation)?, "undisturbed, it had no effect");
    let operations = shim::counted(&file)?;
    let numbers: Vec<u64> = (0..operations.len())
        .filter(|index| domsnap_tests::crash::is_distinguished(&operations, *index))
        .map(|index| operations[index].number)
        .collect();
    let (mut tried, mut done) = (0, 0);
    for number in numbers.iter().skip(every / 2).step_by(every) {
        group.restore_from(&copy)?;
        let outcome = shim::killing(shim::watching(group.domsnap(), &group.root())?, *number, false)
            .run(operation.args)?;
        let look = || -> Result<bool> {
            ensure!(matches!(outcome.status, None | Some(status::DONE)), "{outcome}");
            for place in 0..DOMAINS.len() {
                let name = DOMAINS[(tried + place) % DOMAINS.len()];
                group.domsnap().done(&["recover", name])?;
            }
            let after = happened(&group, operation)?;
            ensure!(after || outcome.status.is_none(), "it was reported as done");
            if !after {
                group.domsnap().done(operation.args).context("what was undone is done again")?;
                ensure!(happened(&group, operation)?, "done again, it had no effect");
            }
            Ok(after)
        };
        let line = operations.iter().find(|o| o.number == *number).map(|o| o.line.clone());
        done += usize::from(look().with_context(|| format!("killed before {number}: {line:?}"))?);
        tried += 1;
    }
    println!(
        "{:?}: {tried} of {} instants, after {done} of them it had happened",
        operation.args,
        numbers.len()
    );
    ensure!(tried > 0, "nothing was tried");
    Ok(())
}

/// A create that is killed has happened in all domains, or in none.
#[test]
fn killed_create_is_of_all_or_none() -> Result<()> {
    kill_everywhere(&CREATE)
}

/// A revert that is killed has happened in all domains, or in none.
#[test]
fn killed_revert_is_of_all_or_none() -> Result<()> {
    kill_everywhere(&REVERT)
}

/// A delete that is killed has happened in all domains, or in none.
#[test]
fn killed_delete_is_of_all_or_none() -> Result<()> {
    kill_everywhere(&DELETE)
}

/// Where one domain fails, nothing of the operation is left in any, without a recovery; and a failure after
/// the commit point leaves it done in all.
#[test]
fn failed_member_undoes_all() -> Result<()> {
    let every = usize::try_from(seed::from_env("DOMSNAP_GROUP_EVERY", 48))?.max(1);
    let group = (CREATE.prepare)()?;
    let copy = group.dir.path().join("copy");
    copy_tree(&group.root(), &copy)?;
    let (_outputs, file) = shim::outputs()?;
    // The second domain's directory alone: it does not decide.
    let watched = group.root().join("queue");
    shim::counting(shim::watching(group.domsnap(), &watched)?, &file).done(CREATE.args)?;
    let count = shim::counted(&file)?.len();
    let (mut undone, mut errors) = (0, BTreeSet::new());
    for number in (1..=count).step_by(every.div_ceil(6)) {
        group.restore_from(&copy)?;
        let failing =
            shim::failing(shim::watching(group.domsnap(), &watched)?, number as u64, "EIO", Often::Once);
        let outcome = failing.run(CREATE.args)?;
        let look = || -> Result<bool> {
            ensure!(!outcome.panicked(), "it panicked");
            let at_once = matches!(outcome.status, Some(status::FAILED | status::REFUSED));
            if outcome.status == Some(status::NEEDS_RECOVERY) {
                group.domsnap().done(&["recover"])?;
            }
            let after = happened(&group, &CREATE)?;
            ensure!(
                after != at_once || outcome.status == Some(status::NEEDS_RECOVERY),
                "it is not as reported"
            );
            Ok(after)
        };
        let after = look().with_context(|| format!("EIO at {number}: {outcome}"))?;
        undone += usize::from(!after);
        errors.extend(outcome.stderr.contains("rolled back in all 3 domains").then_some(true));
    }
    ensure!(undone > 0 && !errors.is_empty(), "no failure was one of the group ({undone} of {count})");
    Ok(())
}

/// A domain whose part is ready is not committed, undone or given up by itself: the journal of the domain
/// that decides is asked, also where that is in use or is closed by the user.
#[test]
fn ready_member_asks_the_decider() -> Result<()> {
    let group = (CREATE.prepare)()?;
    let copy = group.dir.path().join("copy");
    copy_tree(&group.root(), &copy)?;
    let (_outputs, file) = shim::outputs()?;
    shim::counting(shim::watching(group.domsnap(), &group.root())?, &file).done(CREATE.args)?;
    let commits: Vec<u64> = shim::counted(&file)?
        .into_iter()
        .filter(|o| o.line.starts_with("flush ") && o.line.contains("-wal"))
        .map(|o| o.number)
        .collect();
    // The state of each domain's operation after a kill before each flush of the journal, latest first.
    let states = |group: &Group| -> Result<Vec<String>> {
        let state = |name: &&str| -> Result<String> {
            let history: Value = group.domsnap().done(&["history", name, "--json"])?.json()?;
            let last = history["operations"].as_array().and_then(|all| all.last()).cloned();
            Ok(last.and_then(|last| last["state"].as_str().map(str::to_owned)).unwrap_or_default())
        };
        DOMAINS.iter().map(state).collect()
    };
    let (mut undecided, mut decided) = (false, false);
    for number in commits.iter().rev() {
        if undecided && decided {
            break;
        }
        group.restore_from(&copy)?;
        shim::killing(shim::watching(group.domsnap(), &group.root())?, *number, false).run(CREATE.args)?;
        let found = states(&group)?;
        if !found[1..].contains(&"ready".to_owned()) {
            continue;
        }
        let place = 1 + found[1..].iter().position(|state| state == "ready").context("one is ready")?;
        let (member, decider) = (DOMAINS[place], DOMAINS[0]);
        let committed = ["finishing", "done"].contains(&found[0].as_str());
        let name = |name: &str| -> Result<bool> {
            let list = report::list(&group.domsnap(), name)?;
            Ok(list.snapshots.iter().any(|snapshot| snapshot.name == "s2"))
        };
        if committed && !decided {
            // Closed by the user, the deciding operation lets the others know before.
            group.domsnap().done(&["recover", decider, "--abandon"])?;
            ensure!(name(decider)? && name(member)?, "the decision was lost with its journal");
            decided = true;
        } else if !committed && !undecided {
            // Its recovery is refused while another process works in the deciding domain.
            let lock = hold_lock(&group, decider)?;
            let busy = group.domsnap().run(&["recover", member])?;
            ensure!(busy.status == Some(status::REFUSED) && busy.stderr.contains(decider), "{busy}");
            drop(lock);
            ensure!(states(&group)?[place] == "ready", "it was decided without its decider");
            group.domsnap().done(&["recover", member])?;
            ensure!(!name(member)?, "an undecided operation was committed");
            // The decision stands before it is carried out: the decider cannot commit any more.
            ensure!(states(&group)?[0] == "undoing", "{:?}", states(&group)?);
            undecided = true;
        }
        group.domsnap().done(&["recover"])?;
        happened(&group, &CREATE).with_context(|| format!("killed before {number}: {found:?}"))?;
    }
    ensure!(undecided && decided, "no kill left a member ready (undecided {undecided}, decided {decided})");
    Ok(())
}

/// Locks a domain as a command does that works in it.
fn hold_lock(group: &Group, name: &str) -> Result<std::fs::File> {
    let directory = group.root().join("state/locks");
    let mut found = std::fs::read_dir(&directory)?.flatten();
    let file = found.find(|file| file.file_name().to_string_lossy().contains(name));
    let path = file.with_context(|| format!("no lock of {name} in {}", directory.display()))?.path();
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    file.try_lock().with_context(|| format!("the lock of {name} is taken"))?;
    Ok(file)
}

/// Idle machines, each with a disk, and one domain at rest.
struct Machines {
    machines: Vec<Idle>,
    dir: tempfile::TempDir,
}

impl Machines {
    fn start(count: usize) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("domsnap-group-").tempdir()?;
        let mut machines = Vec::new();
        for number in 0..count {
            let home = dir.path().join(format!("m{number}"));
            std::fs::create_dir(&home)?;
            let disk = home.join("vda.qcow2");
            qemu::img(&["create", "-q", "-f", "qcow2", &text(&disk), "1M"])?;
            Boot::Idle.write(&disk)?;
            let node = format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={}", disk.display());
            let device = "virtio-blk-pci,drive=d0,id=vda,bootindex=1";
            let idle = Idle::start(Version::New, &home, "q", &["-blockdev", &node, "-device", device])?;
            idle.write("vda", NOW)?;
            machines.push(idle);
        }
        let machines = Self { machines, dir };
        for (number, idle) in machines.machines.iter().enumerate() {
            let socket = text(idle.socket());
            machines.domsnap().done(&["domain", "add", &format!("m{number}"), "--qmp", &socket])?;
        }
        Ok(machines)
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.dir.path().join("state"))
    }

    fn names(&self) -> Vec<String> {
        (0..self.machines.len()).map(|number| format!("m{number}")).collect()
    }

    /// Every guest runs, and all domains have the snapshot or none.
    fn sound(&mut self, snapshot: &str) -> Result<bool> {
        let mut has = BTreeSet::new();
        for (number, idle) in self.machines.iter_mut().enumerate() {
            ensure!(idle.is_alive()?, "m{number} has ended: {}", idle.said());
            let state = idle.state()?;
            ensure!(state == "running", "m{number} is {state:?}");
        }
        for (number, name) in self.names().iter().enumerate() {
            let list = report::list(&self.domsnap(), name)?;
            has.insert(list.snapshots.iter().any(|found| found.name == snapshot));
            let disk = self.dir.path().join(name).join("vda.qcow2");
            self.machines[number].flush("vda")?;
            ensure!(has_pattern(&disk, NOW)?, "{name} has lost what it wrote");
        }
        ensure!(has.len() == 1, "some have {snapshot} and some have not");
        Ok(has.contains(&true))
    }
}

/// All guests are paused before any disk is cut, and none goes on before all are cut; so in a revert. The
/// pauses are measured.
#[test]
fn running_guests_are_cut_at_one_instant() -> Result<()> {
    let mut machines = Machines::start(4)?;
    let (_outputs, file) = shim::outputs()?;
    let all = machines.names().join(",");
    let pauses = |args: &[&str], marks: [&str; 3]| -> Result<Vec<u64>> {
        let _ = std::fs::remove_file(&file);
        let counting = shim::counting_commands(shim::preloaded(machines.domsnap()), &file);
        let said: Value = counting.done(&[args, &["--json"]].concat())?.json()?;
        let commands = std::fs::read_to_string(&file)?;
        let of = |name: &str| {
            let is = |(_, line): &(usize, &str)| line.split(' ').next_back() == Some(name);
            let places: Vec<usize> =
                commands.lines().enumerate().filter(is).map(|(place, _)| place).collect();
            places
        };
        let [first, second, third] = marks.map(of);
        let apart = |before: &[usize], after: &[usize]| before.iter().max() < after.iter().min();
        ensure!(
            first.len() >= 4
                && second.len() >= 4
                && third.len() >= 4
                && apart(&first, &second)
                && apart(&second, &third),
            "{marks:?} of {args:?} are at {first:?}, {second:?}, {third:?} of:\n{commands}"
        );
        let domains = said["domains"].as_array().context("domains")?;
        Ok(domains.iter().filter_map(|member| member["outcome"]["downtime_us"].as_u64()).collect())
    };
    let mut measured = Vec::new();
    for number in 0..4 {
        let name = format!("d{number}");
        measured.push(pauses(
            &["create", &all, &name, "--group", "--disk-only"],
            ["stop", "transaction", "cont"],
        )?);
    }
    let worst: Vec<u64> =
        measured.iter().map(|round| round.iter().copied().max().unwrap_or_default()).collect();
    println!("4 guests, disks only: each round's longest pause is {worst:?} us");
    let memory = pauses(&["create", &all, "m", "--group"], ["stop", "transaction", "cont"])?;
    println!("4 guests, with memory: {memory:?} us");
    ensure!(measured.iter().all(|round| round.len() == 4) && memory.len() == 4, "{measured:?} {memory:?}");
    let back = pauses(&["revert", &all, "m", "--group"], ["stop", "snapshot-load", "cont"])?;
    println!("4 guests, reverted with memory: {back:?} us");
    ensure!(machines.sound("m")?, "the snapshot is gone");
    // A domain at rest takes part with its disk.
    let rest = machines.dir.path().join("rest.qcow2");
    qemu::img(&["create", "-q", "-f", "qcow2", &text(&rest), "1M"])?;
    let mixed = format!("m0,{},m1", rest.display());
    let said: Value = machines.domsnap().done(&["create", &mixed, "mixed", "--group", "--json"])?.json()?;
    let memories = said["domains"].as_array().context("domains")?;
    let memories = memories.iter().filter(|member| !member["snapshot"]["memory"].is_null()).count();
    ensure!(memories == 2, "{said}");
    // A guest that its user has paused stays so, and is one of them.
    machines.machines[3].qmp("stop", serde_json::json!({}))?;
    let said: Value = machines.domsnap().done(&["create", &all, "paused", "--group", "--json"])?.json()?;
    let power: Vec<&str> =
        said["domains"].as_array().context("domains")?.iter().filter_map(|d| d["power"].as_str()).collect();
    ensure!(power == ["running", "running", "running", "paused"], "{said}");
    ensure!(machines.machines[3].state()? == "paused", "the paused guest runs");
    machines.domsnap().done(&["revert", &all, "paused", "--group"])?;
    ensure!(machines.machines[3].state()? == "paused", "the paused guest runs after the revert");
    machines.machines[3].qmp("cont", serde_json::json!({}))?;
    machines.domsnap().done(&["delete", &all, "d1", "d2", "m", "--group"])?;
    machines.sound("d0").map(drop)
}

/// Killed at one of its commands to QEMU, domsnap leaves guests that a recovery resumes, and a snapshot of
/// all domains or of none. Where a guest's process dies, the others go on without the snapshot.
#[test]
fn killed_with_guests_paused_they_go_on() -> Result<()> {
    let mut machines = Machines::start(2)?;
    let (_outputs, file) = shim::outputs()?;
    let args = ["create", "m0,m1", "s1", "--group"];
    shim::counting_commands(shim::preloaded(machines.domsnap()), &file).done(&args)?;
    let commands: Vec<String> = std::fs::read_to_string(&file)?.lines().map(str::to_owned).collect();
    let is = |line: &str, name: &str| line.split(' ').next_back() == Some(name);
    // Of all instants those in the pause alone are tried, unless all are to be.
    let first = |name: &str| commands.iter().position(|line| is(line, name));
    let always = [first("stop"), first("transaction"), first("cont")];
    for (place, command) in commands.iter().enumerate() {
        if !seed::tries_all_live() && !always.contains(&Some(place)) {
            continue;
        }
        for sent in [false, true] {
            if machines.sound("s1")? {
                machines.domsnap().done(&["delete", "m0,m1", "s1", "--group"])?;
            }
            let number = place as u64 + 1;
            let killed = shim::killing_at_command(shim::preloaded(machines.domsnap()), number, sent);
            killed.run(&args)?;
            let look = (|| {
                machines.domsnap().done(&["recover", ["m1", "m0"][place % 2]])?;
                machines.domsnap().done(&["recover"])?;
                machines.sound("s1")
            })();
            look.with_context(|| format!("killed {} {command}", if sent { "just after" } else { "before" }))?;
        }
    }
    if machines.sound("s1")? {
        machines.domsnap().done(&["delete", "m0,m1", "s1", "--group"])?;
    }
    // The second guest's process is gone by the time of the cut: the first one has no snapshot and runs.
    let number = first("transaction").context("no cut was seen")? as u64 + 1;
    let stopped = shim::signalling_at_command(shim::preloaded(machines.domsnap()), number, 19);
    let mut command = stopped.command(&args);
    let mut child =
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped()).spawn()?;
    await_stopped(child.id())?;
    machines.machines[1].kill()?;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(i32::try_from(child.id())?).context("a process")?,
        rustix::process::Signal::CONT,
    )?;
    ensure!(!child.wait()?.success(), "a group with a dead guest was created");
    machines.domsnap().done(&["recover"])?;
    let list = report::list(&machines.domsnap(), "m0")?;
    ensure!(list.snapshots.iter().all(|snapshot| snapshot.name != "s1"), "a half of the group is left");
    let state = machines.machines[0].state()?;
    ensure!(state == "running", "the other guest is {state:?}");
    Ok(())
}

fn await_stopped(pid: u32) -> Result<()> {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(120);
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        if stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')) {
            return Ok(());
        }
        ensure!(std::time::Instant::now() < until, "process {pid} does not stop: {stat}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// The commands of the guide's page, each run as it is written there.
#[test]
fn every_command_of_the_page_runs() -> Result<()> {
    let group = Group::new()?;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/groups.md");
    let (mut is_code, mut run) = (false, 0);
    for line in std::fs::read_to_string(page)?.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
            continue;
        }
        let Some(args) = line.strip_prefix("domsnap ").filter(|_| is_code) else { continue };
        let args: Vec<&str> = args.split_whitespace().collect();
        group.domsnap().done(&args).context(line.to_owned())?;
        run += 1;
    }
    ensure!(run >= 7, "only {run} commands are left in the page");
    Ok(())
}
