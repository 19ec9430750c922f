//! Shared parts of the tests with a live guest: a guest under load, its machine, overlays beside its disks,
//! and the conditions after each operation.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hypervisor_qemu::{
    Machine, Name,
    graph::{self, Graph, Layer},
    instant::{Cut, DiskCut, SaveMode},
    jobs,
    memory::{Draft, Image},
};
use qmp::{Options, Qmp};
use testguest::{Guest, GuestOptions, Version};

pub const BOTH: [Version; 2] = Version::BOTH;

/// The versions of QEMU for what this crate does in the same way with each: the old one with
/// `DOMSNAP_LIVE_EVERY=1` alone.
pub fn versions() -> Vec<Version> {
    match std::env::var("DOMSNAP_LIVE_EVERY").as_deref() {
        Ok("1") => BOTH.to_vec(),
        _ => vec![Version::New],
    }
}

/// Each version of QEMU, with disks by `-blockdev` and by `-drive` (true); of the old one, the first is left
/// out as by [`versions`].
pub fn versions_and_drives() -> impl Iterator<Item = (Version, bool)> {
    let each = BOTH.into_iter().flat_map(|version| [false, true].map(|drive| (version, drive)));
    each.filter(|(version, drive)| *drive || versions().contains(version))
}

pub const BUDGET: Duration = Duration::from_secs(20);

/// A guest that ticks, writes random blocks and dirties memory.
pub fn loaded(options: GuestOptions) -> Result<Guest> {
    let guest = options.start()?;
    guest.dirty(24, 30.0)?;
    guest.blocks(128, 30.0)?;
    guest.wait_ticks(10)?;
    Ok(guest)
}

pub async fn machine(guest: &Guest) -> Result<Machine> {
    machine_at(guest.qmp_socket()).await
}

pub async fn machine_at(socket: &Path) -> Result<Machine> {
    let mut options = Options::default();
    options.await_socket = true;
    options.connect_deadline = Duration::from_secs(120);
    options.deadline = Duration::from_secs(120);
    Ok(Machine::new(Qmp::connect_with(socket, options).await?))
}

/// Makes an empty overlay file.
pub fn make_overlay(file: &Path, on: &Path, mib: u64) -> Result<()> {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(on).arg(file);
    let status = command.arg(format!("{mib}M")).status().context("qemu-img: run scripts/install-deps")?;
    ensure!(status.success(), "qemu-img create failed");
    Ok(())
}

/// Runs qemu-img on an image, and returns its output.
pub fn img(args: &[&str], file: &Path) -> Result<String> {
    let output = Command::new("qemu-img").args(args).arg(file).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

/// Makes an overlay on each active image of a guest and opens it in QEMU; `on` are those images' files.
pub async fn overlays(
    machine: &Machine,
    guest: &Guest,
    tag: &str,
    on: &[PathBuf],
) -> Result<Vec<(PathBuf, Name)>> {
    let mut made = Vec::new();
    for (number, on) in on.iter().enumerate() {
        let file = guest.dir().join(format!("{tag}{number}.qcow2"));
        make_overlay(&file, on, 64)?;
        let name = Name::new(format!("domsnap-{tag}{number}"))?;
        graph::add_overlay(machine, &Layer::qcow2(name.clone(), &file)).await?;
        made.push((file, name));
    }
    Ok(made)
}

/// Makes a cut of all disks of a guest onto overlays.
pub fn onto(guest: &Guest, overlays: &[(PathBuf, Name)]) -> Cut {
    let cuts = guest.targets().into_iter().zip(overlays);
    cuts.fold(Cut::new(), |cut, (device, (_, overlay))| {
        cut.disk(DiskCut::Overlay { device, overlay: overlay.clone() })
    })
}

pub async fn nothing() -> Result<(), hypervisor_qemu::BoxError> {
    Ok(())
}

/// Takes a complete external snapshot: disks onto overlays, memory into an image. Returns the overlays, the
/// image and the method.
pub async fn snapshot(
    machine: &Machine,
    guest: &Guest,
    tag: &str,
    on: &[PathBuf],
    live: SaveMode,
    background: bool,
) -> Result<(Vec<(PathBuf, Name)>, Image, hypervisor_qemu::instant::CutMethod)> {
    let overlays = overlays(machine, guest, tag, on).await?;
    let path = guest.dir().join(format!("{tag}.memory"));
    let mut cut = onto(guest, &overlays).memory(Draft::create(&path)?, live);
    if !background {
        cut = cut.without_background_snapshot().trusting_pre_copy();
    }
    let taken = cut.take(machine, nothing).await?;
    let (method, stopped) = (taken.method, taken.stopped_for);
    let draft = taken.memory.context("memory was asked for")?.wait(|_| {}).await?;
    let image = draft.seal(tag, b"metadata")?;
    image.verify()?;
    println!("{method:?}: stopped for {stopped:?}, image {} MiB", image.length()? >> 20);
    Ok((overlays, image, method))
}

/// Checks the conditions after each operation: every node has the file that it names, and no unused object of
/// ours is left.
pub async fn sound(machine: &Machine) -> Result<()> {
    let said = machine.qmp().socket().with_file_name("stderr");
    let said = || format!("QEMU said: {}", std::fs::read_to_string(said).unwrap_or_default());
    graph::verify_names(machine).await.with_context(said)?;
    let ours = jobs::reconcile(machine).await?;
    ensure!(ours.jobs.is_empty(), "jobs are left: {:?}", ours.jobs);
    ensure!(ours.outgoing.is_none(), "a migration is left: {:?}", ours.outgoing);
    ensure!(ours.lent.is_empty(), "descriptors are left: {:?}", ours.lent);
    for node in &ours.nodes {
        ensure!(!node.users.is_empty(), "the node {} is left, and nothing uses it", node.name);
        ensure!(!node.placeholder, "the placeholder {} is left", node.name);
    }
    let settings = machine.qmp().execute_raw("query-migrate-capabilities", serde_json::Value::Null).await?;
    for setting in settings.as_array().context("a list")? {
        ensure!(setting["state"] == false, "{} is left on", setting["capability"]);
    }
    let parameters = machine.qmp().execute_raw("query-migrate-parameters", serde_json::Value::Null).await?;
    // QEMU 7.2's guest was restored with 10 GiB/s; our own setting differs from both.
    let bandwidth = parameters["max-bandwidth"].as_u64().context("a number")?;
    ensure!([128 << 20, 10 << 30].contains(&bandwidth), "max-bandwidth is left at {bandwidth}");
    Ok(())
}

/// Returns the node names of a device's chain, top first.
pub async fn chain(machine: &Machine, device: &str) -> Result<Vec<String>> {
    let graph = Graph::read(machine).await?;
    let root = graph.root(device).context("it is there")?;
    Ok(graph.chain(root).iter().map(|node| node.name.clone()).collect())
}

/// Starts another QEMU on the guest's directory, with other disks and more arguments.
pub fn start_again(guest: &Guest, disks: &[PathBuf], more: &[&str]) -> Result<Child> {
    let names: Vec<_> = guest.disks().iter().map(|disk| disk.display().to_string()).collect();
    let args = guest.command_line().iter().map(|word| {
        let mut word = word.to_string_lossy().into_owned();
        for (from, to) in names.iter().zip(disks) {
            word = word.replace(from, &to.display().to_string());
        }
        OsString::from(word)
    });
    let args: Vec<_> = args.chain(more.iter().map(OsString::from)).collect();
    let said = std::fs::File::options().append(true).create(true).open(guest.dir().join("stderr"))?;
    let mut command = Command::new(&args[0]);
    Ok(command.args(&args[1..]).stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said).spawn()?)
}

/// Waits until a QEMU has loaded its memory image. The guest is then as it was at the cut: paused, usually.
pub async fn until_loaded(machine: &Machine) -> Result<()> {
    until(async || Ok(machine.run_state().await?.word != "inmigrate")).await
}

/// Waits until a condition is true.
pub async fn until(mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(240);
    while !holds().await? {
        ensure!(Instant::now() < until, "it does not come to hold within a minute");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
