//! A running domain: a guest under load that checks itself, registered with domsnap, and a record of what
//! each of its snapshots held.

pub mod crash;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::Deserialize;
use testguest::{Guest, GuestOptions};

use crate::domsnap::{Domsnap, Outcome, status};
use crate::qemu;
use crate::report::{self, Kind, Point};
use crate::served::{self, Servers};

/// The name under which the guest is registered.
pub const NAME: &str = "live";

/// What one snapshot must hold, for ever.
#[derive(Debug, Clone)]
struct Expected {
    /// Each disk's checksum.
    disks: BTreeMap<String, u64>,
    /// Between which ticks of the guest its instant was, where it has memory.
    memory: Option<(u64, u64)>,
}

/// A running domain and what it must hold.
pub struct Live {
    /// The guest.
    pub guest: Guest,
    state: PathBuf,
    plugins: Option<PathBuf>,
    /// The servers of those of its disks that are served.
    pub servers: Servers,
    held: BTreeMap<String, Expected>,
}

#[derive(Debug, Deserialize)]
struct Answer {
    outcome: Changed,
}

/// The part of a change's answer that the tests rely on.
#[derive(Debug, Deserialize)]
pub struct Changed {
    /// Length of the guest's pause.
    pub downtime_us: Option<u64>,
    /// The method of the instant.
    pub method: Option<String>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// The command that starts the domain.
    #[serde(default)]
    pub start: Vec<String>,
    /// Whether a revert kept what it replaced.
    #[serde(default)]
    pub kept: bool,
}

impl Live {
    /// A guest with two disks under memory and disk load, registered.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn new() -> Result<Live> {
        Live::of(GuestOptions::new())
    }

    /// Another guest under the same load, registered.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn of(options: GuestOptions) -> Result<Live> {
        Live::registered(options, &[])
    }

    /// The same, registered with more arguments.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn registered(options: GuestOptions, more: &[&str]) -> Result<Live> {
        let live = Live::unregistered(options)?;
        live.register(more)?;
        Ok(live)
    }

    /// A guest under load whose disks have these formats for domsnap, of which a plug-in in the directory may
    /// serve some.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn served_by(options: GuestOptions, formats: &[&str], plugins: &Path) -> Result<Live> {
        let mut live = Live::unregistered(options)?;
        live.plugins = Some(plugins.to_owned());
        let disks = live.guest.targets().into_iter().zip(live.guest.disks()).zip(formats);
        let disks = disks.flat_map(|((target, path), format)| {
            ["--disk".to_owned(), format!("{target}={},format={format}", path.display())]
        });
        let args: Vec<String> = disks.collect();
        live.register(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
        Ok(live)
    }

    fn register(&self, more: &[&str]) -> Result<()> {
        let (socket, agent) = (self.guest.qmp_socket(), self.guest.agent_socket());
        let args = ["domain", "add", NAME, "--qmp"].map(|word| word.as_ref());
        let mut args = [&args[..], &[socket.as_os_str(), "--agent".as_ref(), agent.as_os_str()]].concat();
        args.extend(more.iter().map(OsStr::new));
        self.domsnap().done(&args).map(drop)
    }

    /// A guest under load of which domsnap knows nothing.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn unregistered(options: GuestOptions) -> Result<Live> {
        Live::with(options, Servers::default())
    }

    /// A guest under load whose disk `vda` is a VHD that domsnap serves to QEMU, which waits `reconnect`
    /// seconds for a server that is gone; registered.
    ///
    /// # Errors
    /// What failed, as a message.
    pub fn of_served(options: GuestOptions, reconnect: u32) -> Result<Live> {
        let servers = Servers::default();
        let theirs = servers.clone();
        let options = options.served(0, reconnect, move |image, socket| theirs.serve(image, socket));
        let live = Live::with(options, servers)?;
        live.register(&[])?;
        Ok(live)
    }

    fn with(options: GuestOptions, servers: Servers) -> Result<Live> {
        let guest = options.deadline(Duration::from_secs(240)).start()?;
        let state = guest.dir().join("state");
        let live = Live { guest, state, plugins: None, servers, held: BTreeMap::new() };
        live.load()?;
        Ok(live)
    }

    /// Memory and disk load, as a snapshot without memory or a start takes it away.
    ///
    /// # Errors
    /// If the guest does not answer.
    pub fn load(&self) -> Result<()> {
        self.guest.dirty(16, 20.0)?;
        self.guest.blocks(64, 20.0)?;
        self.guest.wait_ticks(5)
    }

    /// `domsnap` with this domain's state directory.
    pub fn domsnap(&self) -> Domsnap {
        let domsnap = Domsnap::new(&self.state);
        match &self.plugins {
            Some(directory) => domsnap.env("DOMSNAP_BACKEND_DIR", directory),
            None => domsnap,
        }
    }

    /// Runs a command and looks whether the guest and QEMU are sound afterwards.
    ///
    /// # Errors
    /// If it fails, or something is wrong afterwards.
    pub fn run(&mut self, args: &[&str]) -> Result<Outcome> {
        let outcome = self.domsnap().done(args)?;
        self.sound().with_context(|| format!("after domsnap {}", args.join(" ")))?;
        Ok(outcome)
    }

    /// Takes a snapshot, looks whether all is sound, and remembers what the snapshot holds.
    ///
    /// # Errors
    /// If it fails, or something is wrong afterwards.
    pub fn create(&mut self, name: &str, more: &[&str]) -> Result<Changed> {
        let before = self.guest.last_tick().unwrap_or_default();
        let args = [&["create", NAME, name, "--json"], more].concat();
        let changed = self.run(&args)?.json::<Answer>()?.outcome;
        let after = self.guest.last_tick().unwrap_or_default();
        self.remember(name, (before, after))?;
        Ok(changed)
    }

    /// Remembers what a snapshot holds that was just taken, between two ticks.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn remember(&mut self, name: &str, ticks: (u64, u64)) -> Result<()> {
        let found = report::list(&self.domsnap(), NAME)?;
        let snapshot = found.snapshots.iter().find(|snapshot| snapshot.name == name);
        let snapshot = snapshot.with_context(|| format!("list does not show {name}"))?;
        let mut disks = BTreeMap::new();
        for point in &snapshot.points {
            disks.insert(point.target.clone(), checksum(point)?);
        }
        let memory = snapshot.memory.as_ref().map(|_| ticks);
        self.held.insert(name.to_owned(), Expected { disks, memory });
        Ok(())
    }

    /// Returns to a snapshot, in place, and looks whether the guest is there: with memory it goes on at the
    /// instant's tick, without it boots, from disks that are of one instant.
    ///
    /// # Errors
    /// If it fails, or the guest is elsewhere.
    pub fn revert(&mut self, name: &str, more: &[&str]) -> Result<Changed> {
        let held = self.held.get(name).cloned().with_context(|| format!("{name} was never taken"))?;
        let (pid, boots) = (self.guest.pid(), self.guest.boots());
        let args = [&["revert", NAME, name, "--json"], more].concat();
        let changed = self.domsnap().done(&args)?.json::<Answer>()?.outcome;
        ensure!(self.guest.pid() == pid, "the QEMU is another process after the revert to {name}");
        if let Some((before, after)) = held.memory {
            ensure!(self.guest.boots() == boots, "the guest booted, although {name} has memory");
            let now = self.guest.ticks()?;
            ensure!(
                (before..after + 200).contains(&now),
                "{name} was taken between the ticks {before} and {after}, and the guest is at {now} after the revert"
            );
        } else {
            self.guest.wait_boots(boots + 1)?;
            ensure!(
                self.guest.counters_at_boot().iter().all(Option::is_some),
                "a disk's counter is not whole"
            );
            self.load()?;
        }
        self.sound().with_context(|| format!("after the revert to {name}"))?;
        Ok(changed)
    }

    /// Deletes snapshots and looks whether all is sound and the others hold what they held.
    ///
    /// # Errors
    /// If it fails, or something is wrong afterwards.
    pub fn delete(&mut self, names: &[&str], more: &[&str]) -> Result<()> {
        self.delete_unverified(names, more)?;
        self.verify()
    }

    /// Deletes snapshots and looks whether all is sound.
    ///
    /// # Errors
    /// If it fails, or something is wrong afterwards.
    pub fn delete_unverified(&mut self, names: &[&str], more: &[&str]) -> Result<()> {
        let args = [&["delete", NAME], names, more].concat();
        self.run(&args)?;
        let left = report::list(&self.domsnap(), NAME)?.snapshots;
        self.held.retain(|name, _| left.iter().any(|snapshot| snapshot.name == *name));
        let wrong = names.iter().find(|name| left.iter().any(|snapshot| snapshot.name == **name));
        match wrong {
            Some(name) => bail!("{name} is there after its delete"),
            None => Ok(()),
        }
    }

    /// A snapshot that is no more.
    pub fn forget(&mut self, name: &str) {
        self.held.remove(name);
    }

    /// Looks whether the guest runs, found memory and disks of one instant at each tick, and QEMU has open
    /// what its nodes name.
    ///
    /// # Errors
    /// What is wrong.
    pub fn sound(&self) -> Result<()> {
        self.guest.wait_ticks(3)?;
        self.guest.expect_no_bad()?;
        self.guest.verify_blocks()?;
        self.names_true()
    }

    /// Every node of QEMU names the file that it has open, each configured path is the image that QEMU
    /// writes, and nothing of ours is left that does nothing.
    ///
    /// # Errors
    /// What is not so.
    pub fn names_true(&self) -> Result<()> {
        let socket = self.guest.qmp_socket().to_owned();
        // Asked before this process has the monitor, which serves one client.
        let paths = self.paths()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let machine = hypervisor_qemu::Machine::connect(&socket).await?;
            let files = hypervisor_qemu::graph::verify_names(&machine).await?;
            let graph = hypervisor_qemu::graph::Graph::read(&machine).await?;
            for (target, path) in self.guest.targets().iter().zip(&paths) {
                if path.with_extension("sock").exists() {
                    is_served(path)?;
                    continue;
                }
                let file = graph.root(target).and_then(|root| graph.file(root));
                let active = files.iter().find(|known| Some(known.node.as_str()) == file);
                let about = fs::metadata(path).with_context(|| path.display().to_string())?;
                ensure!(
                    active.and_then(|active| active.names) == Some((about.dev(), about.ino())),
                    "{target}: QEMU writes {active:?}, and {} is another file",
                    path.display()
                );
            }
            let ours = hypervisor_qemu::jobs::reconcile(&machine).await?;
            ensure!(ours.jobs.is_empty(), "jobs are left: {:?}", ours.jobs);
            ensure!(ours.outgoing.is_none(), "memory is still being written");
            ensure!(ours.nodes.iter().all(|node| !node.placeholder), "a disk is detached");
            let idle = ours.nodes.iter().find(|node| node.users.is_empty());
            ensure!(idle.is_none(), "a node of ours is left that nothing uses: {idle:?}");
            Ok(())
        })
    }

    /// Every snapshot holds what it held when it was taken, and there are no others.
    ///
    /// # Errors
    /// The first that does not.
    pub fn verify(&self) -> Result<()> {
        let found = report::list(&self.domsnap(), NAME)?;
        let names: Vec<&str> = found.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
        ensure!(
            names.len() == self.held.len(),
            "the snapshots are {names:?}, and should be {:?}",
            self.held.keys()
        );
        for snapshot in &found.snapshots {
            let held =
                self.held.get(&snapshot.name).with_context(|| format!("what is {}?", snapshot.name))?;
            ensure!(snapshot.points.len() == held.disks.len(), "{} has lost a disk", snapshot.name);
            for point in &snapshot.points {
                let (now, then) = (checksum(point)?, held.disks.get(&point.target));
                ensure!(
                    Some(&now) == then,
                    "{} of {} holds something else than it did",
                    point.target,
                    snapshot.name
                );
            }
            if let Some(memory) = &snapshot.memory {
                ensure!(memory.file.exists(), "the memory image of {} is gone", snapshot.name);
            }
        }
        Ok(())
    }

    /// The configured paths of the disks, as the domain is registered: with `--active-path=new` they are
    /// others after each change.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn paths(&self) -> Result<Vec<PathBuf>> {
        let shown = self.domsnap().run(&["domain", "show", NAME, "--json"])?;
        if shown.status == Some(status::REFUSED) {
            // Not registered, or not by that name: then nothing changes its paths.
            return Ok(self.guest.disks());
        }
        let shown: serde_json::Value = shown.expect_status(status::DONE)?.json()?;
        let disks = shown["domain"]["disks"].as_array().with_context(|| format!("no disks: {shown}"))?;
        let path = |disk: &serde_json::Value| disk["path"].as_str().map(PathBuf::from);
        disks.iter().map(path).collect::<Option<_>>().with_context(|| format!("no path: {shown}"))
    }

    /// How many image files there are beside the configured paths, as layers of the disks.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn layers(&self) -> Result<usize> {
        let names = fs::read_dir(self.guest.dir())?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().contains(".ds-"));
        Ok(names.count())
    }

    /// Ends the guest and looks at every image on disk.
    ///
    /// # Errors
    /// What qemu-img finds wrong.
    pub fn finish(mut self) -> Result<()> {
        self.guest.quit()?;
        for entry in fs::read_dir(self.guest.dir())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "qcow2") {
                let output =
                    Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(&path).output()?;
                // 3: leaked clusters, which lose nothing.
                if !matches!(output.status.code(), Some(0 | 3)) {
                    bail!("{}: {}", path.display(), String::from_utf8_lossy(&output.stdout));
                }
            }
        }
        Ok(())
    }

    /// Waits until the guest ticks on, for at most a minute.
    ///
    /// # Errors
    /// If it does not.
    pub fn wait_running(&self) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(240);
        loop {
            match self.guest.wait_ticks(1) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() >= until => return Err(error),
                Err(_) => {}
            }
        }
    }
}

/// The server of a disk has open what the configured path names, and nothing is on its way.
fn is_served(path: &Path) -> Result<()> {
    let info = served::ask(&path.with_extension("sock"), &serde_json::json!({ "do": "info" }))?;
    let about = fs::metadata(path).with_context(|| path.display().to_string())?;
    let top = &info["layers"][0];
    ensure!(
        (top["device"].as_u64(), top["inode"].as_u64()) == (Some(about.dev()), Some(about.ino())),
        "{} is another file than what is served: {info}",
        path.display()
    );
    ensure!(info["detached"].is_null() && info["held"] == false, "the disk is detached or held: {info}");
    let phase = &info["merge"]["phase"];
    ensure!(*phase != "moving" && *phase != "ready", "layers are being merged: {info}");
    Ok(())
}

/// A checksum of what a point shows, zeros and all.
fn checksum(point: &Point) -> Result<u64> {
    if point.layer.extension().is_some_and(|extension| extension == "vhd") {
        // Another reader than domsnap's own.
        let run =
            |program: &str| Command::new(program).args(["x", "-so", "-tvhd"]).arg(&point.layer).output();
        let output = run("7zz").or_else(|_| run("7z")).context("7zz is needed: scripts/install-deps")?;
        ensure!(
            output.status.success(),
            "{}: {}",
            point.layer.display(),
            String::from_utf8_lossy(&output.stderr)
        );
        return Ok(sum(0, &output.stdout) ^ output.stdout.len() as u64);
    }
    let raw = tempfile::NamedTempFile::new()?;
    let format = qemu::format(&point.layer);
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-U", "-f", format, "-O", "raw"]);
    let mut image = point.layer.clone();
    match (point.kind, &point.tag) {
        // The plug-in `dir`: copies in a directory beside the file.
        (Kind::Internal, Some(tag)) if format == "raw" => {
            image.as_mut_os_string().push(format!(".points/{tag}"));
        }
        (Kind::Internal, Some(tag)) => {
            command.args(["-l", &format!("snapshot.name={tag}")]);
        }
        _ => {}
    }
    let output = command.arg(&image).arg(raw.path()).output()?;
    ensure!(
        output.status.success(),
        "reading {} of {}: {}",
        point.target,
        point.layer.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    sum_of_file(raw.as_file())
}

/// The checksum of all of a file, of which only what is no hole is read.
fn sum_of_file(file: &fs::File) -> Result<u64> {
    let length = file.metadata()?.len();
    let (mut sum_so_far, mut at) = (0_u64, 0);
    let mut bytes = Vec::new();
    while at < length {
        let from = match seek(file, SeekFrom::Data(at)) {
            Ok(from) => from / BLOCK as u64 * BLOCK as u64,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let to = seek(file, SeekFrom::Hole(from))?.next_multiple_of(BLOCK as u64).min(length);
        bytes.resize(usize::try_from(to - from)?, 0);
        file.read_exact_at(&mut bytes, from)?;
        sum_so_far = sum_so_far.wrapping_add(sum(from, &bytes));
        at = to;
    }
    Ok(sum_so_far ^ length)
}

/// What of a disk is looked at as one.
const BLOCK: usize = 4096;

/// A checksum of what is at `place` of a disk. Zeros do not change it: a hole and written zeros are the same.
fn sum(place: u64, bytes: &[u8]) -> u64 {
    let blocks = bytes.chunks(BLOCK).zip((place..).step_by(BLOCK));
    let written = blocks.filter(|(block, _)| block.iter().any(|byte| *byte != 0));
    // FNV-1a over integers: a difference, not an adversary, is to be found.
    let of_block = |(block, place): (&[u8], u64)| {
        block.chunks(8).fold(0xcbf2_9ce4_8422_2325_u64 ^ place, |sum, chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    };
    written.map(of_block).fold(0, u64::wrapping_add)
}
