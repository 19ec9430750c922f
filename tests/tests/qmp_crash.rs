//! `domsnap` killed before, and just after, every QMP command of an operation on a running domain; then
//! `recover`. The guest runs, its disks are as before the operation or as after it, every snapshot holds what
//! it held, and nothing of ours is left in QEMU.
//!
//! The guest is an idle machine, so that there is time for all of them. In CI every fourth is killed.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::files;
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::idle::{Boot, Idle, has_pattern};
use domsnap_tests::{qemu, report, seed, shim};
use testguest::Version;

const DISKS: [&str; 2] = ["vda", "vdb"];

/// What is on the disks before an operation, at the snapshots that it may return to, and after a write.
const THEN: u8 = 0x11;
const NOW: u8 = 0x22;

struct Machine {
    qemu: Idle,
    dir: tempfile::TempDir,
    held: BTreeMap<String, Vec<Vec<u8>>>,
}

/// Which snapshot holds which bytes is read from the images, never by domsnap.
type Prepare = fn(&mut Machine) -> Result<()>;

struct Operation {
    args: &'static [&'static str],
    /// Makes what it works on, again after each inject: it may be there.
    again: Prepare,
}

impl Machine {
    fn start() -> Result<Self> {
        Self::start_with(false)
    }

    /// `thread`: an I/O thread serves `vda`.
    fn start_with(thread: bool) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("domsnap-qmp-").tempdir()?;
        let disk = |name: &str| dir.path().join(format!("{name}.qcow2"));
        for name in DISKS {
            qemu::img(&["create", "-q", "-f", "qcow2", &disk(name).display().to_string(), "1M"])?;
            Boot::Idle.write(&disk(name))?;
        }
        // One with nodes of the user's, each with a name; one whose nodes QEMU names.
        let named = [
            "-blockdev".to_owned(),
            format!("driver=file,filename={},node-name=f0", disk("vda").display()),
            "-blockdev".to_owned(),
            "driver=qcow2,file=f0,node-name=d0".to_owned(),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive=d0,id=vda,bootindex=1{}", if thread { ",iothread=io" } else { "" }),
            "-drive".to_owned(),
            format!("if=none,id=two,format=qcow2,file={}", disk("vdb").display()),
            "-device".to_owned(),
            "virtio-blk-pci,drive=two,id=vdb".to_owned(),
        ];
        let object = ["-object", "iothread,id=io"];
        let named = named.iter().map(String::as_str);
        let args: Vec<&str> = object.into_iter().filter(|_| thread).chain(named).collect();
        let qemu = Idle::start(Version::New, dir.path(), "m", &args)?;
        Ok(Self { qemu, dir, held: BTreeMap::new() })
    }

    /// The configured path of a disk.
    fn path(&self, disk: &str) -> PathBuf {
        self.dir.path().join(format!("{disk}.qcow2"))
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.dir.path().join("state"))
    }

    fn address(&self) -> String {
        self.qemu.address()
    }

    fn done(&self, args: &[&str]) -> Result<()> {
        let address = self.address();
        self.domsnap().done(&[&[args[0], &address], &args[1..]].concat()).map(drop)
    }

    fn snapshots(&self) -> Result<Vec<report::Snapshot>> {
        Ok(report::list(&self.domsnap(), &self.address())?.snapshots)
    }

    fn there(&self, name: &str) -> Result<bool> {
        Ok(self.held.contains_key(name) && self.snapshots()?.iter().any(|snapshot| snapshot.name == name))
    }

    fn write(&self, pattern: u8) -> Result<()> {
        DISKS.iter().try_for_each(|disk| self.qemu.write(disk, pattern))
    }

    fn create(&mut self, name: &str, more: &[&str]) -> Result<()> {
        self.done(&[&["create", name], more].concat())?;
        self.remember(name)
    }

    fn remember(&mut self, name: &str) -> Result<()> {
        let held = self.contents(name)?;
        self.held.insert(name.to_owned(), held);
        Ok(())
    }

    /// What the points of a snapshot show.
    fn contents(&self, name: &str) -> Result<Vec<Vec<u8>>> {
        let found = self.snapshots()?.into_iter().find(|snapshot| snapshot.name == name);
        let found = found.with_context(|| format!("there is no {name}"))?;
        found.points.iter().map(|point| read(&point.layer, point.tag.as_deref())).collect()
    }

    /// All that must hold after a recovery. Gives whether the disks have `THEN`, or else `NOW`: both the
    /// same.
    fn sound(&mut self) -> Result<bool> {
        ensure!(self.qemu.is_alive()?, "QEMU has ended: {}", self.qemu.said());
        let state = self.qemu.state()?;
        ensure!(state == "running", "the guest is {state:?}");
        DISKS.iter().try_for_each(|disk| self.qemu.flush(disk))?;
        let then = has_pattern(&self.path("vda"), THEN)?;
        let pattern = if then { THEN } else { NOW };
        for disk in DISKS {
            ensure!(has_pattern(&self.path(disk), pattern)?, "{disk} does not have {pattern:#x}");
        }
        for snapshot in self.snapshots()? {
            let Some(held) = self.held.get(&snapshot.name) else { continue };
            let now = self.contents(&snapshot.name)?;
            ensure!(now == *held, "{} holds something else than it did", snapshot.name);
            if let Some(memory) = &snapshot.memory {
                ensure!(memory.file.exists(), "the memory of {} is gone", snapshot.name);
            }
        }
        nothing_left(self.qemu.socket(), &DISKS.map(|disk| (disk, self.path(disk))))?;
        let left = files(self.dir.path())?.into_keys().find(|file| {
            let file = file.to_string_lossy();
            [".part", ".packing", ".domsnap-new"].iter().any(|end| file.ends_with(end))
                || file.contains(".domsnap-probe.")
        });
        ensure!(left.is_none(), "a passing file is left: {left:?}");
        Ok(then)
    }

    fn finish(self) -> Result<()> {
        let Self { qemu, dir, .. } = self;
        qemu.quit()?;
        for entry in std::fs::read_dir(dir.path())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "qcow2") {
                qemu::check_after_crash(&path)?;
            }
        }
        Ok(())
    }
}

fn read(layer: &Path, tag: Option<&str>) -> Result<Vec<u8>> {
    let mut args: Vec<String> = ["convert", "-U", "-f", "qcow2", "-O", "raw"].map(str::to_owned).into();
    if let Some(tag) = tag {
        args.extend(["-l".to_owned(), format!("snapshot.name={tag}")]);
    }
    let raw = tempfile::NamedTempFile::new()?;
    args.extend([layer.display().to_string(), raw.path().display().to_string()]);
    qemu::img(&args)?;
    Ok(std::fs::read(raw.path())?)
}

/// Nothing of ours is in QEMU that does nothing, every node has the file that it names, and each disk's path
/// is what QEMU writes.
fn nothing_left(socket: &Path, disks: &[(&str, PathBuf)]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let machine = hypervisor_qemu::Machine::connect(socket).await?;
        let ours = hypervisor_qemu::jobs::reconcile(&machine).await?;
        ensure!(ours.jobs.is_empty(), "jobs are left: {:?}", ours.jobs);
        ensure!(ours.outgoing.is_none(), "memory is still being written");
        ensure!(ours.lent.is_empty(), "descriptors are left: {:?}", ours.lent);
        let idle = ours.nodes.iter().find(|node| node.placeholder || node.users.is_empty());
        ensure!(idle.is_none(), "a node of ours is left: {idle:?}");
        let files = hypervisor_qemu::graph::verify_names(&machine).await?;
        let graph = hypervisor_qemu::graph::Graph::read(&machine).await?;
        for (disk, path) in disks {
            let node = graph.root(disk).and_then(|root| graph.file(root));
            let active = files.iter().find(|known| Some(known.node.as_str()) == node);
            let about = std::fs::metadata(path)?;
            ensure!(
                active.and_then(|active| active.names) == Some((about.dev(), about.ino())),
                "{disk}: QEMU writes {active:?}, and {} is another file",
                path.display()
            );
        }
        Ok(())
    })
}

/// Kills before, and just after, one of `DOMSNAP_LIVE_EVERY` commands of `operation`, by default of 8.
fn inject(operation: &Operation) -> Result<()> {
    let every = seed::from_env("DOMSNAP_LIVE_EVERY", 8).max(1) as usize;
    inject_where(operation, Machine::start()?, |place, _| place % every == 0)
}

/// Kills before, and just after, those commands of `operation` of which `is_struck` is true.
fn inject_where(
    operation: &Operation,
    mut machine: Machine,
    is_struck: impl Fn(usize, &str) -> bool,
) -> Result<()> {
    let (_outputs, file) = shim::outputs()?;
    (operation.again)(&mut machine).context("before the first")?;
    let address = machine.address();
    let args = [&[operation.args[0], address.as_str()], &operation.args[1..]].concat();
    shim::counting_commands(shim::preloaded(machine.domsnap()), &file).done(&args)?;
    let commands: Vec<String> = std::fs::read_to_string(&file)?.lines().map(str::to_owned).collect();
    ensure!(commands.len() >= 2, "the shim saw {commands:?}");
    check_and_prepare(&mut machine, operation).context("after the one that was counted")?;
    let killed: Vec<_> =
        commands.iter().enumerate().filter(|(place, command)| is_struck(*place, command)).collect();
    ensure!(!killed.is_empty(), "none of these is killed: {commands:?}");
    for (place, command) in killed {
        for sent in [false, true] {
            (operation.again)(&mut machine).with_context(|| format!("before {command}"))?;
            let killed = shim::killing_at_command(shim::preloaded(machine.domsnap()), place as u64 + 1, sent);
            let outcome = killed.run(&args)?;
            let when = if sent { "just after" } else { "before" };
            let healed = (|| {
                ensure!(outcome.status.is_none_or(|status| status == status::DONE), "{outcome}");
                machine.domsnap().done(&["recover"])?;
                check_and_prepare(&mut machine, operation)
            })();
            healed.with_context(|| format!("killed {when} {command} of {args:?}"))?;
        }
    }
    machine.finish()
}

/// Looks whether all is well; takes note of what there is now.
fn check_and_prepare(machine: &mut Machine, operation: &Operation) -> Result<()> {
    let then = machine.sound()?;
    let name = operation.args[1].to_owned();
    let there = machine.snapshots()?.iter().any(|snapshot| snapshot.name == name);
    match operation.args[0] {
        "create" => {
            ensure!(!then, "the disks are those of another time");
            if there {
                machine.remember(&name)?;
                ensure!(has(&machine.contents(&name)?, NOW), "{name} does not hold what the disks had");
                // It can be returned to.
                machine.write(THEN)?;
                machine.done(&["revert", &name, "--running"])?;
                ensure!(!machine.sound()?, "a revert to {name} did not bring back what it holds");
            }
        }
        "delete" => {
            ensure!(!then, "the disks are those of another time");
            if !there {
                machine.held.remove(&name);
            }
        }
        _ => ensure!(there, "{name} is gone"),
    }
    Ok(())
}

fn has(disks: &[Vec<u8>], pattern: u8) -> bool {
    disks.iter().all(|disk| disk.get(256 << 10) == Some(&pattern))
}

/// The snapshot `s` is there, of `THEN`; the disks have `NOW`.
fn past(machine: &mut Machine, more: &[&str]) -> Result<()> {
    if !machine.there("s")? {
        machine.write(THEN)?;
        machine.create("s", more)?;
    }
    machine.write(NOW)
}

/// No snapshot `x`; the disks have `NOW`.
fn without_x(machine: &mut Machine) -> Result<()> {
    if machine.there("x")? {
        machine.done(&["delete", "x"])?;
        machine.held.remove("x");
    }
    machine.write(NOW)
}

macro_rules! kills {
    ($($(#[$about:meta])* $name:ident: $args:expr, $again:expr;)*) => {$(
        $(#[$about])*
        #[test]
        fn $name() -> Result<()> {
            inject(&Operation { args: &$args, again: $again })
        }
    )*};
}

kills! {
    create_internal_with_memory: ["create", "x", "--internal"], without_x;
    create_external_with_memory: ["create", "x", "--external"], without_x;
    create_mixed_paused: ["create", "x", "--no-live", "--disk", "vdb=external"], without_x;
    create_mixed_of_disks: ["create", "x", "--disk-only", "--disk", "vdb=external"], without_x;
    revert_internal_with_memory: ["revert", "s"], |machine| past(machine, &["--internal"]);
    revert_external_with_memory: ["revert", "s"], |machine| past(machine, &["--external"]);
    revert_mixed_with_memory: ["revert", "s"], |machine| past(machine, &["--disk", "vdb=external"]);
    revert_mixed_of_disks: ["revert", "s", "--running"],
        |machine| past(machine, &["--disk-only", "--disk", "vdb=external"]);
    delete_internal: ["delete", "x"], |machine| with_x(machine, &["--internal"]);
    /// The overlays are merged down, and pivot.
    delete_external: ["delete", "x"], |machine| with_x(machine, &["--external", "--disk-only"]);
    /// The tags are in images below the active ones: they are closed for it.
    delete_of_frozen_tags: ["delete", "x"], |machine| under_y(machine, &["--internal", "--disk-only"]);
    /// The layers are in the middle of a chain.
    delete_of_middle_layers: ["delete", "x"], |machine| under_y(machine, &["--external", "--disk-only"]);
}

/// While the guest's requests wait so that it can be stopped: a guest whose disks an I/O thread serves.
#[test]
fn create_while_requests_are_held() -> Result<()> {
    let operation = Operation {
        args: &["create", "x", "--disk-only", "--disk", "vda=external", "--disk", "vdb=internal"],
        again: without_x,
    };
    let of_holding = ["blockdev-mirror", "block-job-cancel", "stop", "job-cancel", "job-dismiss"];
    let is_of_holding = |_, command: &str| of_holding.iter().any(|name| command.ends_with(name));
    inject_where(&operation, Machine::start_with(true)?, is_of_holding)
}

/// Both are killed before memory is loaded. `recover` drops the safety copies of internal reverts, and starts
/// the domain from memory: in that order, because what it starts locks the images.
#[test]
fn both_die_before_memory_is_loaded() -> Result<()> {
    let mut machine = Machine::start()?;
    let (_outputs, file) = shim::outputs()?;
    past(&mut machine, &["--internal"])?;
    let address = machine.address();
    let args = ["revert", address.as_str(), "s"];
    shim::counting_commands(shim::preloaded(machine.domsnap()), &file).done(&args)?;
    let commands = std::fs::read_to_string(&file)?;
    let place = commands.lines().position(|command| command.ends_with("snapshot-load"));
    let place = place.with_context(|| format!("none loads memory: {commands}"))?;
    past(&mut machine, &["--internal"])?;
    let killed = shim::killing_at_command(shim::preloaded(machine.domsnap()), place as u64 + 1, false);
    killed.run(&args)?;
    machine.qemu.kill()?;
    let recovered = machine.domsnap().run(&["recover"])?;
    let ended = (|| {
        let recovered = recovered.expect_status(status::DONE)?;
        ensure!(recovered.stdout.contains("the domain was started"), "{recovered}");
        ensure!(machine.qemu.state()? == "running", "it does not run");
        for disk in DISKS {
            machine.qemu.flush(disk)?;
            let tags = qemu::img(&["snapshot", "-U", "-l", &machine.path(disk).display().to_string()])?;
            ensure!(!tags.contains("domsnap-undo"), "{disk}: a safety copy is left: {tags}");
            ensure!(has_pattern(&machine.path(disk), THEN)?, "{disk} is not as it was");
        }
        Ok(())
    })();
    // What was started is no child of ours.
    let _ = machine.qemu.qmp("quit", serde_json::json!({}));
    ended
}

/// QEMU 10.0 ends by a segmentation fault where it is asked for its nodes while a stream job is concluded and
/// not dismissed.
#[test]
fn a_concluded_stream_ends_no_qemu() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = |name: &str| dir.path().join(name).display().to_string();
    qemu::img(&["create", "-q", "-f", "qcow2", &image("base.qcow2"), "1M"])?;
    let on = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2"];
    qemu::img(&[&on[..], &[&image("d.qcow2")]].concat())?;
    let disk = format!("driver=qcow2,file.driver=file,file.filename={},node-name=d0", image("d.qcow2"));
    let args = ["-blockdev", &disk, "-device", "virtio-blk-pci,drive=d0,id=vda"];
    for (job, wanted) in [("domsnap-m-0123456789abcdef", status::DONE), ("another", status::REFUSED)] {
        let mut qemu = Idle::start(Version::New, dir.path(), "m", &args)?;
        let stream = serde_json::json!({ "job-id": job, "device": "d0", "auto-dismiss": false });
        qemu.qmp("block-stream", stream)?;
        let until = std::time::Instant::now() + std::time::Duration::from_secs(240);
        while qemu.qmp("query-jobs", serde_json::json!({}))?[0]["status"] != "concluded" {
            ensure!(std::time::Instant::now() < until, "the job does not end");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let domsnap = Domsnap::new(&dir.path().join(format!("state-{job}")));
        for args in [&["recover"][..], &["list", &qemu.address()], &["domain", "scan"]] {
            domsnap.run(args)?;
            ensure!(qemu.is_alive()?, "QEMU has ended after {args:?}: {}", qemu.said());
        }
        let created = domsnap.run(&["create", &qemu.address(), "s"])?.expect_status(wanted)?;
        ensure!(qemu.is_alive()?, "QEMU has ended: {}", qemu.said());
        ensure!(wanted == status::DONE || created.stderr.contains("job another"), "{created}");
        qemu.quit()?;
    }
    Ok(())
}

/// SIGHUP (a lost session), SIGINT and SIGTERM before any command of a revert or a create: what was begun is
/// undone, or, past the commit point, carried through. One that was ignored when domsnap was started ends
/// nothing.
#[test]
fn signals_undo_or_are_ignored() -> Result<()> {
    let mut machine = Machine::start()?;
    past(&mut machine, &["--disk", "vdb=external"])?;
    let address = machine.address();
    let (_outputs, file) = shim::outputs()?;
    let (mut undone, mut done) = (0, 0);
    for (args, again) in [
        (["revert", "s"], (|machine| past(machine, &["--disk", "vdb=external"])) as Prepare),
        (["create", "x"], without_x),
    ] {
        let operation =
            Operation { args: if args[0] == "revert" { &["revert", "s"] } else { &["create", "x"] }, again };
        again(&mut machine)?;
        let args = [args[0], address.as_str(), args[1]];
        let _ = std::fs::remove_file(&file);
        shim::counting_commands(shim::preloaded(machine.domsnap()), &file).done(&args)?;
        check_and_prepare(&mut machine, &operation)?;
        let count = std::fs::read_to_string(&file)?.lines().count();
        let signals = [1, 2, 15];
        for place in (0..count).step_by(3) {
            again(&mut machine)?;
            let signal = signals[place / 3 % signals.len()];
            let killed =
                shim::signalling_at_command(shim::preloaded(machine.domsnap()), place as u64 + 1, signal);
            let outcome = killed.run(&args)?;
            match outcome.status {
                Some(status::DONE) => done += 1,
                // Before the first step there is nothing to undo, and it says that.
                Some(status::FAILED) if outcome.stderr.contains("no changes made") => {}
                Some(status::FAILED) => {
                    ensure!(outcome.stderr.contains("rolled back"), "signal {signal}: {outcome}");
                    undone += 1;
                }
                _ => anyhow::bail!("signal {signal} before command {}: {outcome}", place + 1),
            }
            // Nothing is left to be recovered.
            check_and_prepare(&mut machine, &operation)
                .with_context(|| format!("signal {signal}, {place}: {outcome}"))?;
        }
    }
    ensure!(undone > 2 && done > 2, "{undone} were undone, {done} were done");
    without_x(&mut machine)?;
    let ignoring = machine.domsnap().through(&["nohup"]);
    let killed = shim::signalling_at_command(shim::preloaded(ignoring), 1, 1);
    killed.run(&["create", &address, "x"])?.expect_status(status::DONE)?;
    machine.finish()
}

/// `x` is the last snapshot.
fn with_x(machine: &mut Machine, more: &[&str]) -> Result<()> {
    machine.write(NOW)?;
    if !machine.there("x")? {
        machine.create("x", more)?;
    }
    Ok(())
}

/// `x` is there, and the external `y` after it.
fn under_y(machine: &mut Machine, more: &[&str]) -> Result<()> {
    machine.write(NOW)?;
    if !machine.there("x")? {
        if machine.there("y")? {
            machine.done(&["delete", "y"])?;
            machine.held.remove("y");
        }
        machine.create("x", more)?;
        machine.write(NOW)?;
        machine.create("y", &["--external", "--disk-only"])?;
    }
    Ok(())
}
