//! Clones with memory of a guest that runs under load: each continues at the instant of the snapshot, with an
//! identity of its own, and no file that clones share ever changes.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use domsnap_tests::domsnap::{Outcome, status};
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::{seed, shim, verify};
use serde_json::{Value, json};
use testguest::{GuestClone, GuestOptions, Version};

/// Time limit of anything that a clone does.
const SOON: Duration = Duration::from_secs(180);

/// Clones in a directory. Their QEMUs are ended when it is dropped.
struct Clones {
    place: PathBuf,
    pids: Vec<u32>,
    begun: Instant,
}

impl Drop for Clones {
    fn drop(&mut self) {
        for pid in &self.pids {
            end(*pid);
        }
    }
}

/// Kills a QEMU of ours, if it still is one.
fn end(pid: u32) {
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if line.contains("qemu") {
        let _ = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
        let until = Instant::now() + Duration::from_secs(10);
        while Path::new(&format!("/proc/{pid}/maps")).exists() && Instant::now() < until {
            sleep(Duration::from_millis(10));
        }
    }
}

impl Clones {
    fn of(live: &Live) -> Result<Clones> {
        let place = live.guest.dir().join("c");
        fs::create_dir(&place)?;
        Ok(Clones { place, pids: Vec::new(), begun: Instant::now() })
    }

    fn to(&self) -> String {
        self.place.display().to_string()
    }

    /// The directory of a clone.
    fn dir(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// Notes the processes that a command started.
    fn started(&mut self, outcome: &Outcome) -> Result<usize> {
        let answer: Value = outcome.json()?;
        let pids = answer["outcome"]["clones"].as_array().into_iter().flatten();
        let pids: Vec<u32> =
            pids.filter_map(|clone| clone["started"]["pid"].as_u64()?.try_into().ok()).collect();
        let one = answer["outcome"]["started"]["pid"].as_u64().and_then(|pid| pid.try_into().ok());
        let before = self.pids.len();
        self.pids.extend(pids.into_iter().chain(one));
        Ok(self.pids.len() - before)
    }

    /// The answer of a clone's QEMU to a command.
    fn ask(&self, name: &str, command: &str, arguments: Value) -> Result<Value> {
        let mut socket = UnixStream::connect(self.dir(name).join("qmp"))?;
        socket.set_read_timeout(Some(SOON))?;
        let mut lines = BufReader::new(socket.try_clone()?).lines();
        let mut answer = || -> Result<Value> {
            for line in lines.by_ref() {
                let line: Value = serde_json::from_str(&line?)?;
                if line["event"].is_null() {
                    return Ok(line);
                }
            }
            bail!("{name} has ended")
        };
        answer()?;
        writeln!(socket, "{}", json!({ "execute": "qmp_capabilities" }))?;
        answer()?;
        let ask = if arguments.is_null() {
            json!({ "execute": command })
        } else {
            json!({ "execute": command, "arguments": arguments })
        };
        writeln!(socket, "{ask}")?;
        let answer = answer()?;
        ensure!(answer["error"].is_null(), "{name}: {command}: {answer}");
        Ok(answer["return"].clone())
    }

    fn clone(&self, name: &str) -> GuestClone {
        GuestClone::at(self.dir(name))
    }

    /// A clone ticks on, and has never found its memory and its disks to be of different instants.
    fn ticks(&self, name: &str) -> Result<()> {
        println!("{:?}: {name} is to tick", self.begun.elapsed());
        self.clone(name).wait_ticks(6)
    }

    /// Runs a line in the guest of a clone; returns its status.
    fn shell(&self, name: &str, line: &str) -> Result<i32> {
        Ok(self.clone(name).shell(line)?.status)
    }
}

/// The files of a kind below a directory.
fn files(place: &Path, end: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(place)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(files(&path, end)?);
        } else if path.to_string_lossy().ends_with(end) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The one file of a kind beside the domain's memory images.
fn of_gold(live: &Live, end: &str) -> Result<PathBuf> {
    let mut found = files(live.guest.dir(), end)?;
    found.retain(|file| !file.starts_with(live.guest.dir().join("c")));
    ensure!(found.len() == 1, "{end}: {found:?}");
    Ok(found.remove(0))
}

/// A guest with a generation ID, a balloon, and a network device that can be unplugged.
fn options() -> GuestOptions {
    GuestOptions::new().generic_kernel().more(&[
        "-device",
        "vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
        "-device",
        "virtio-balloon-pci,id=balloon",
        "-device",
        "pcie-root-port,id=port1,chassis=1,slot=1",
        "-netdev",
        "user,id=n0,restrict=on",
        "-device",
        "virtio-net-pci,netdev=n0,id=nic0,bus=port1,mac=52:54:00:11:22:33,romfile=",
    ])
}

/// Such a guest under a load that many may have at once on two processors.
fn gold() -> Result<Live> {
    let live = Live::of(options())?;
    live.guest.dirty(2, 2.0)?;
    live.guest.blocks(16, 4.0)?;
    Ok(live)
}

/// Five clones of a running guest: each ticks, has an ID of its own, gives memory back, is reverted in place
/// and at rest, and is cloned itself. The domain deletes the snapshot meanwhile. The file of memory that all
/// have mapped never changes.
#[test]
fn clones_continue_from_one_memory() -> Result<()> {
    let mut live = gold()?;
    // A balloon takes pages that have content.
    ensure!(live.guest.shell("head -c 60000000 /dev/urandom > /tmp/used && rm /tmp/used")?.status == 0);
    live.create("s1", &["--external", "--memory"])?;
    let mut clones = Clones::of(&live)?;
    let to = clones.to();
    let refused = live.domsnap().run(&["clone", NAME, "s1", "w", "--to", &to])?;
    ensure!(refused.stderr.contains("--memory") && refused.stderr.contains("--disk-only"), "{refused}");
    refused.expect_status(status::REFUSED)?;
    let args = ["clone", NAME, "s1", "w", "--memory", "--count", "5", "--to", &to];
    let planned = live.domsnap().done(&[&args[..], &["--dry-run"]].concat())?;
    ensure!(planned.stdout.contains("take the memory apart once"), "{planned}");
    ensure!(fs::read_dir(&clones.place)?.count() == 0, "a dry run left something");
    let outcome = live.domsnap().done(&[&args[..], &["--start", "--json"]].concat())?;
    ensure!(clones.started(&outcome)? == 5, "{outcome}");
    let ram = of_gold(&live, ".memory.ram")?;
    let before = fs::read(&ram)?;
    let about = fs::metadata(&ram)?;
    ensure!(about.mode() & 0o777 == 0o400 && about.nlink() == 6, "{about:?}");
    let names = ["w-1", "w-2", "w-3", "w-4", "w-5"];
    let mut ids = BTreeSet::new();
    let mut shares = Vec::new();
    for name in names {
        clones.ticks(name)?;
        ids.insert(clones.ask(name, "query-vm-generation-id", Value::Null)?["guid"].to_string());
        ensure!(clones.ask(name, "query-name", Value::Null)?["name"] == name);
        shares.push(clones.clone(name).share_mib()?);
    }
    println!("Pss of the clones: {shares:?} MiB");
    ensure!(ids.len() == 5, "clones have the same generation ID: {ids:?}");
    ensure!(clones.shell("w-1", "dmesg | grep -q 'virtual machine fork'")? == 0, "its guest saw no other ID");
    // The clock is the host's, though the memory is older, unless a note says that the agent did not answer.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() - 2;
    ensure!(
        clones.shell("w-1", &format!("[ $(date +%s) -ge {now} ]"))? == 0 || outcome.stdout.contains("clock"),
        "its clock is late: {outcome}"
    );
    for name in names {
        let size = 160_u64 << 20;
        clones.ask(name, "balloon", json!({ "value": size }))?;
        let until = Instant::now() + SOON;
        while clones.ask(name, "query-balloon", Value::Null)?["actual"].as_u64().is_none_or(|now| now > size)
        {
            ensure!(Instant::now() < until, "{name} does not give memory back");
            sleep(Duration::from_millis(50));
        }
        clones.ticks(name)?;
        clones.ask(name, "stop", Value::Null)?;
    }
    ensure!(fs::read(&ram)? == before, "a balloon changed the memory of all clones");

    // The domain runs on, and needs its snapshot no more.
    live.delete(&["s1"], &[])?;
    ensure!(files(live.guest.dir(), ".ram")?.len() == 5, "the delete left its part of the memory");
    let ram = &files(&clones.place, ".ram")?[0];
    ensure!(fs::read(ram)? == before, "the delete changed the memory of all clones");
    live.sound()?;
    let list = live.domsnap().done(&["list", "w-1"])?;
    ensure!(list.stdout.contains("s1"), "{list}");

    // In place, and at rest, also after the clone has written.
    live.domsnap().done(&["revert", "w-1", "s1", "--running"])?;
    clones.ticks("w-1")?;
    let pid = clones.pids[1];
    end(pid);
    let outcome = live.domsnap().done(&["revert", "w-2", "s1", "--json"])?;
    ensure!(clones.started(&outcome)? == 1, "{outcome}");
    clones.ticks("w-2")?;

    // A clone of a clone, of its own snapshot and of the one that it began with.
    clones.ask("w-3", "cont", Value::Null)?;
    live.domsnap().done(&["create", "w-3", "own", "--memory"])?;
    clones.ticks("w-3")?;
    for (snapshot, name) in [("own", "x"), ("s1", "y")] {
        let args = ["clone", "w-3", snapshot, name, "--memory", "--start", "--to", &to, "--json"];
        let outcome = live.domsnap().done(&args)?;
        ensure!(clones.started(&outcome)? == 1, "{outcome}");
        clones.ticks(name)?;
        ids.insert(clones.ask(name, "query-vm-generation-id", Value::Null)?["guid"].to_string());
    }
    ensure!(ids.len() == 7, "a clone of a clone has its generation ID: {ids:?}");
    clones.ticks("w-3")?;
    ensure!(fs::read(ram)? == before, "the memory of all clones has changed");
    for name in ["w-1", "w-2", "w-3", "x", "y"] {
        live.domsnap().done(&["check", name])?;
        for target in live.guest.targets() {
            for layer in verify::chain(&clones.dir(name).join(format!("{name}-{target}.qcow2")))? {
                ensure!(layer.starts_with(clones.dir(name)), "{} is not the clone's", layer.display());
            }
        }
    }

    clones.ask("w-4", "cont", Value::Null)?;
    clones.ask("w-5", "cont", Value::Null)?;
    // A clone that is deleted leaves nothing that others need.
    live.domsnap().done(&["delete", "w-4", "s1"])?;
    clones.ticks("w-4")?;
    ensure!(files(&clones.dir("w-4"), ".memory.ram")?.is_empty(), "the delete left the clone's memory");
    clones.ticks("w-5")?;
    drop(clones);
    live.finish()
}

/// Internal snapshots, a script in the guest, and network devices with new addresses. A script that fails
/// leaves a clone that does not run, and says so; the others run.
#[test]
fn clones_get_an_identity() -> Result<()> {
    let mut live = gold()?;
    live.create("s1", &["--internal", "--memory"])?;
    let mut clones = Clones::of(&live)?;
    let to = clones.to();
    let script = live.guest.dir().join("identity");
    fs::write(
        &script,
        "set -e\nhostname \"$DOMSNAP_DOMAIN\"\n[ \"$DOMSNAP_DOMAIN\" != v-2 ] || { echo no >&2; exit 7; }\n",
    )?;
    let script = script.display().to_string();
    let args = [
        "clone",
        NAME,
        "s1",
        "v",
        "--memory",
        "--count",
        "3",
        "--start",
        "--run",
        &script,
        "--network",
        "same",
        "--to",
        &to,
        "--json",
    ];
    let outcome = live.domsnap().run(&args)?.expect_status(status::FAILED)?;
    for said in ["1 of 3 clones", "v-2", "status 7", "these run: v-1, v-3", "domsnap revert v-2 s1"] {
        ensure!(outcome.stdout.contains(said) || outcome.stderr.contains(said), "{said}: {outcome}");
    }
    for name in ["v-1", "v-3"] {
        let pid = clones.ask(name, "query-name", Value::Null)?;
        ensure!(pid["name"] == name, "{pid}");
        clones.pids.extend(pid_of(&clones.dir(name))?);
        clones.ticks(name)?;
        ensure!(
            clones.shell(name, &format!("[ $(hostname) = {name} ]"))? == 0,
            "{name}: the script did not run"
        );
    }
    ensure!(pid_of(&clones.dir("v-2"))?.is_none(), "a clone whose script failed runs");
    let outcome = live.domsnap().done(&["revert", "v-2", "s1", "--json"])?;
    ensure!(clones.started(&outcome)? == 1, "{outcome}");
    clones.ticks("v-2")?;
    ensure!(clones.shell("v-2", "[ $(hostname) = v-2 ]")? != 0, "the script's effect was not reverted");

    let args = ["clone", NAME, "s1", "u", "--memory", "--start", "--network", "swap", "--to", &to, "--json"];
    let outcome = live.domsnap().done(&args)?;
    clones.started(&outcome)?;
    clones.ticks("u")?;
    let filter = clones.ask("u", "query-rx-filter", Value::Null)?;
    ensure!(!filter.to_string().contains("52:54:00:11:22:33"), "the guest has the old address: {filter}");
    ensure!(filter.to_string().contains("52:54:00"), "the guest has no network device: {filter}");
    live.sound()?;
    drop(clones);
    live.finish()
}

/// The QEMU whose sockets are in a directory.
fn pid_of(dir: &Path) -> Result<Option<u32>> {
    Ok(pids_of(dir)?.first().copied())
}

/// All of these.
fn pids_of(dir: &Path) -> Result<Vec<u32>> {
    GuestClone::at(dir).processes()
}

/// Counts a kill. How often QEMU is asked how far it has loaded differs from run to run: a start may be done
/// before the last commands that were counted in another one.
fn was_killed(outcome: &Outcome, kills: &mut u32) -> Result<()> {
    *kills += u32::from(outcome.status.is_none());
    ensure!(outcome.status.is_none_or(|status| status == status::DONE), "it was not killed: {outcome}");
    Ok(())
}

/// domsnap is killed while it starts clones, and while it starts one for a revert. Afterwards each clone
/// runs, or no process of it is left, and it can be started; a revert that was interrupted is completed. None
/// ever has two processes, or one that waits.
fn killed_starts(live: &Live, clones: &Clones) -> Result<()> {
    let names = ["k-1", "k-2"];
    let to = clones.to();
    let args = ["clone", NAME, "s1", "k", "--memory", "--count", "2", "--to", &to, "--start", "--json"];
    let forget = |clones: &Clones| -> Result<()> {
        for name in names {
            pids_of(&clones.dir(name))?.into_iter().for_each(end);
            live.domsnap().done(&["domain", "remove", name])?;
            fs::remove_dir_all(clones.dir(name))?;
        }
        Ok(())
    };
    let running = |clones: &Clones, name: &str| -> Result<bool> {
        let pids = pids_of(&clones.dir(name))?;
        ensure!(pids.len() < 2, "{name} has the processes {pids:?}");
        if pids.is_empty() {
            return Ok(false);
        }
        let state = clones.ask(name, "query-status", Value::Null)?;
        ensure!(state["status"] == "running", "{name} was left as process {pids:?}: {state}");
        Ok(true)
    };
    let (_outputs, file) = shim::outputs()?;
    shim::counting_commands(shim::preloaded(live.domsnap()), &file).done(&args)?;
    let commands = fs::read_to_string(&file)?.lines().count();
    ensure!(commands > 6, "two starts have {commands} commands");
    forget(clones)?;
    let all = seed::tries_all_live();
    let every = if all { 1 } else { commands / 3 };
    let (mut left, mut kills) = ([0, 0], 0);
    // 0: as soon as there is a process, before it answers.
    for (number, place) in (0..=commands).step_by(every.max(1)).enumerate() {
        let context = || format!("killed at command {place} of {commands}");
        if place == 0 {
            let mut child = live.domsnap().command(&args).stdout(std::process::Stdio::null()).spawn()?;
            let until = Instant::now() + SOON;
            while names.iter().all(|name| pid_of(&clones.dir(name)).is_ok_and(|pid| pid.is_none())) {
                ensure!(child.try_wait()?.is_none() && Instant::now() < until, "no clone was started");
                sleep(Duration::from_millis(1));
            }
            child.kill()?;
            child.wait()?;
        } else {
            let killed =
                shim::killing_at_command(shim::preloaded(live.domsnap()), place as u64, number % 2 == 1);
            let outcome = killed.run(&args)?;
            was_killed(&outcome, &mut kills).with_context(context)?;
        }
        let waits = names.iter().filter(|name| pid_of(&clones.dir(name)).is_ok_and(|pid| pid.is_some()));
        left[0] += waits.count();
        // What the next command is that ends them.
        match number % 3 {
            0 => drop(live.domsnap().done(&["recover"]).with_context(context)?),
            1 => {
                for name in names {
                    live.domsnap().done(&["revert", name, "s1"]).with_context(context)?;
                    ensure!(running(clones, name).with_context(context)?, "{}: {name}", context());
                    clones.ticks(name).with_context(context)?;
                }
            }
            _ => {
                for name in names {
                    live.domsnap().done(&["create", name, "next", "--disk-only"]).with_context(context)?;
                }
            }
        }
        for name in names {
            left[1] += usize::from(running(clones, name).with_context(context)?);
            live.domsnap().done(&["check", name]).with_context(context)?;
        }
        forget(clones).with_context(context)?;
    }
    println!("processes after the kills: {}, of which run: {}", left[0], left[1]);
    ensure!(left[0] > 0 && kills > 1, "{kills} kills, no process was ever left");
    kills = 0;

    // A revert that starts its domain.
    live.domsnap().done(&args[..9])?;
    let revert = ["revert", "k-1", "s1", "--json"];
    let (_outputs, file) = shim::outputs()?;
    shim::counting_commands(shim::preloaded(live.domsnap()), &file).done(&revert)?;
    let commands = fs::read_to_string(&file)?.lines().count();
    pids_of(&clones.dir("k-1"))?.into_iter().for_each(end);
    let places = (0..=commands).flat_map(|place| [(place, false), (place, true)]);
    let every = if all { 1 } else { 2 };
    for (place, sent) in places.skip(1).step_by(every) {
        let context = || format!("revert killed at command {place} of {commands}, sent: {sent}");
        if place == 0 {
            let mut child = live.domsnap().command(&revert).stdout(std::process::Stdio::null()).spawn()?;
            let until = Instant::now() + SOON;
            while pid_of(&clones.dir("k-1"))?.is_none() {
                ensure!(child.try_wait()?.is_none() && Instant::now() < until, "it was not started");
                sleep(Duration::from_millis(1));
            }
            child.kill()?;
            child.wait()?;
        } else {
            let outcome =
                shim::killing_at_command(shim::preloaded(live.domsnap()), place as u64, sent).run(&revert)?;
            was_killed(&outcome, &mut kills).with_context(context)?;
        }
        live.domsnap().done(&["recover", "k-1"]).with_context(context)?;
        ensure!(running(clones, "k-1").with_context(context)?, "{}: it does not run", context());
        clones.ticks("k-1").with_context(context)?;
        pids_of(&clones.dir("k-1"))?.into_iter().for_each(end);
    }
    ensure!(kills > 1, "{kills} reverts were killed");
    forget(clones)
}

/// domsnap is killed, or the disk is full, at steps of a command that makes two clones: after `recover` there
/// are both or none, and nothing is left. Then both start from the same memory, which is whole. The domain is
/// off meanwhile.
#[test]
fn clones_with_memory_are_all_or_none() -> Result<()> {
    let mut live = gold()?;
    live.create("s1", &["--external", "--memory"])?;
    live.guest.kill()?;
    let mut clones = Clones::of(&live)?;
    let to = clones.to();
    let args = ["clone", NAME, "s1", "k", "--memory", "--count", "2", "--to", &to];
    let image = of_gold(&live, ".memory")?;
    let before = fs::read(&image)?;
    let forget = || -> Result<()> {
        for name in ["k-1", "k-2"] {
            live.domsnap().done(&["domain", "remove", name])?;
            fs::remove_dir_all(clones.dir(name))?;
        }
        Ok(())
    };
    let apart_again = || -> Result<()> {
        for end in [".memory.ram", ".memory.devices"] {
            let _ = fs::remove_file(of_gold(&live, end)?);
        }
        Ok(())
    };
    let (_outputs, file) = shim::outputs()?;
    shim::counting(shim::watching(live.domsnap(), live.guest.dir())?, &file).done(&args)?;
    let steps: Vec<shim::Counted> = shim::counted(&file)?;
    forget()?;
    apart_again()?;
    let about_memory: Vec<&shim::Counted> =
        steps.iter().filter(|step| step.line.contains(".memory") || step.begins_a_step()).collect();
    ensure!(about_memory.len() > 20, "{} steps are about memory", about_memory.len());
    let all = seed::tries_all_live();
    let every = if all { 1 } else { about_memory.len() / 7 };
    let mut happened = [0, 0];
    let sampled = about_memory.iter().skip(every / 2).step_by(every.max(1));
    // The last but one is after the commit point: the second clone is not registered yet.
    for (number, step) in sampled.chain(about_memory.iter().rev().skip(1).take(1)).enumerate() {
        let watched = shim::watching(live.domsnap(), live.guest.dir())?;
        let context = || format!("operation {} (`{}`)", step.number, step.line);
        let outcome = match number % 3 {
            2 => shim::failing(watched, step.number, "ENOSPC", shim::Often::FromThenOn).run(&args)?,
            _ => shim::killing(watched, step.number, false).run(&args)?,
        };
        ensure!(!outcome.panicked(), "{}: {outcome}", context());
        live.domsnap().done(&["recover", NAME]).with_context(context)?;
        let there = [clones.dir("k-1"), clones.dir("k-2")].map(|dir| dir.exists());
        ensure!(there[0] == there[1], "{}: {there:?}: {outcome}", context());
        let listed = live.domsnap().run(&["list", "k-2"])?.status == Some(status::DONE);
        ensure!(listed == there[0], "{}: listed {listed}, there {there:?}: {outcome}", context());
        ensure!(fs::read(&image)? == before, "{}: the memory image changed", context());
        happened[usize::from(listed)] += 1;
        if listed {
            ensure!(files(&clones.place, ".memory.ram")?.len() == 2, "{}", context());
            forget().with_context(context)?;
        }
        let left: Vec<_> = fs::read_dir(&clones.place)?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.is_empty(), "{}: left {left:?}: {outcome}", context());
    }
    ensure!(happened[0] > 0, "each was carried through: {happened:?}");
    println!("undone and carried through: {happened:?}");

    let killed = killed_starts(&live, &clones);
    for name in ["k-1", "k-2"] {
        pids_of(&clones.dir(name))?.into_iter().for_each(end);
    }
    killed?;

    // RAM and devices that were cut off, and RAM of another user, are not used.
    live.domsnap().done(&args)?;
    forget()?;
    for (end, length) in [(".memory.ram", 4096), (".memory.devices", 3 << 20)] {
        let file = of_gold(&live, end)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        fs::File::options().write(true).open(&file)?.set_len(length)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o400))?;
        live.domsnap().done(&args)?;
        ensure!(fs::metadata(of_gold(&live, end)?)?.len() != length, "{end} was cut off, and is used");
        forget()?;
    }

    // What is cut off after that makes QEMU fail: no process is left, and the clone is registered and stays.
    live.domsnap().done(&args)?;
    let devices =
        clones.dir("k-1").join(files(&clones.dir("k-1"), ".devices")?[0].file_name().context("a name")?);
    let whole = fs::read(&devices)?;
    fs::set_permissions(&devices, fs::Permissions::from_mode(0o600))?;
    let mut spoilt = whole.clone();
    let half = spoilt.len() / 2;
    spoilt[half..].fill(0);
    fs::write(&devices, &spoilt)?;
    fs::set_permissions(&devices, fs::Permissions::from_mode(0o400))?;
    let failed = live.domsnap().run(&["revert", "k-1", "s1"])?.expect_status(status::NEEDS_RECOVERY)?;
    ensure!(pid_of(&clones.dir("k-1"))?.is_none(), "a QEMU is left: {failed}");
    fs::set_permissions(&devices, fs::Permissions::from_mode(0o600))?;
    fs::write(&devices, &whole)?;
    fs::set_permissions(&devices, fs::Permissions::from_mode(0o400))?;
    live.domsnap().done(&["recover", "k-1"])?;
    clones.pids.extend(pid_of(&clones.dir("k-1"))?);
    let outcome = live.domsnap().done(&["revert", "k-2", "s1", "--json"])?;
    ensure!(clones.started(&outcome)? == 1, "{outcome}");
    for name in ["k-1", "k-2"] {
        clones.ticks(name)?;
    }
    for target in live.guest.targets() {
        ensure!(clones.dir("k-2").join(format!("k-2-{target}.qcow2")).exists());
    }
    Ok(())
}

/// A QEMU that cannot map memory read-only: its clones read all of it, and say so. What a machine uses of the
/// host, or of another machine, is refused before anything is made.
#[test]
fn clones_of_other_machines() -> Result<()> {
    let mut live = Live::of(GuestOptions::new().version(Version::Old))?;
    live.create("s1", &["--external", "--memory", "--compress"])?;
    let mut clones = Clones::of(&live)?;
    let to = clones.to();
    let args = ["clone", NAME, "s1", "o", "--memory", "--start", "--count", "2", "--to", &to, "--json"];
    let outcome = live.domsnap().done(&args)?;
    ensure!(clones.started(&outcome)? == 2, "{outcome}");
    ensure!(outcome.stdout.contains("before 8.2"), "{outcome}");
    clones.ticks("o-1")?;
    clones.ticks("o-2")?;
    let refused = live.domsnap().run(&[
        "clone",
        NAME,
        "s1",
        "p",
        "--memory",
        "--start",
        "--network",
        "swap",
        "--run",
        "/nowhere",
        "--to",
        &to,
    ])?;
    ensure!(refused.stderr.contains("/nowhere"), "{refused}");
    refused.expect_status(status::USAGE)?;
    let long = "p".repeat(80);
    let refused = live.domsnap().run(&["clone", NAME, "s1", &long, "--memory", "--to", &to])?;
    ensure!(refused.stderr.contains("107 at most"), "{refused}");
    refused.expect_status(status::REFUSED)?;
    live.create("disks", &["--disk-only"])?;
    let refused = live.domsnap().run(&["clone", NAME, "disks", "q", "--memory", "--to", &to])?;
    ensure!(refused.stderr.contains("has no memory"), "{refused}");
    refused.expect_status(status::REFUSED)?;
    ensure!(fs::read_dir(&clones.place)?.count() == 2, "a refusal left something");
    live.sound()?;
    drop(clones);
    live.finish()
}

/// The commands of the guide's page, each run as it is written there.
#[test]
fn every_command_of_the_memory_page_runs() -> Result<()> {
    let live = Live::unregistered(options())?;
    live.guest.dirty(2, 2.0)?;
    live.guest.blocks(16, 4.0)?;
    let place = live.guest.dir().to_owned();
    let mut clones = Clones { place, pids: Vec::new(), begun: Instant::now() };
    let (qmp, agent) =
        (live.guest.qmp_socket().display().to_string(), live.guest.agent_socket().display().to_string());
    live.domsnap().done(&["domain", "add", "gold", "--qmp", &qmp, "--agent", &agent])?;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/clone-memory.md");
    let place = live.guest.dir().display().to_string();
    let (mut is_code, mut run) = (false, 0);
    for line in fs::read_to_string(page)?.lines() {
        if line.starts_with("```") {
            is_code = !is_code;
            continue;
        }
        let here = line.replace("/srv/vm", &place);
        if !is_code {
            continue;
        }
        match here.split_whitespace().collect::<Vec<_>>()[..] {
            ["domsnap", ref args @ ..] => {
                let json = live.domsnap().done(&[args, &["--json"]].concat()).context(line.to_owned())?;
                clones.started(&json)?;
            }
            ["echo", .., ">", file] => {
                let text = here.split('\'').nth(1).context("a text")?;
                fs::write(file, format!("{text}\n"))?;
            }
            _ => continue,
        }
        run += 1;
    }
    ensure!(run >= 8, "only {run} commands are left in the page");
    for name in ["web-1", "web-3", "app-1", "app-2", "next"] {
        clones.ticks(name)?;
    }
    ensure!(clones.shell("app-2", "[ $(hostname) = app-2 ]")? == 0, "the script did not run");
    Ok(())
}
