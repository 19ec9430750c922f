//! A detached section: disks closed under a paused guest, and reopened.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use camino::Utf8Path;
use qmp::Notice;
use serde_json::{Value, json};
use snapcore::hypervisor::{
    DomainContext, GuestChange, Meeting, OpenChain, PowerAfter, Rendezvous, StepOutcome,
};
use snapcore::{Error, ErrorKind, Result, Target};
use tokio::{task::JoinHandle, time::timeout};

use super::{
    cut::sweep,
    disk::{Disk, QemuChain, identity},
    error::{blocking, to_engine},
    live::QemuDomain,
    mark::Mark,
    served,
    starting::Starting,
};
use crate::{
    discover::Process,
    generation_id,
    graph::{self, Detached, Graph, Stack, remove_layers},
    jobs,
    machine::Machine,
    memory::restore_in_place,
    name::Name,
};

/// Time limit for loading memory.
const LOADING: Duration = Duration::from_secs(600);

/// Time limit for a reset, and for the end of a process.
const SOON: Duration = Duration::from_secs(30);

/// Pauses the guest and closes the files of disks. A disk that is closed already is skipped.
///
/// The guests of a group are paused when all of them can be, and no disk is closed before all are paused.
pub(super) async fn open(live: &QemuDomain, targets: &[Target], together: &dyn Rendezvous) -> Result<()> {
    // 1) Refuse before anything is changed. 2) Delete our unused nodes, which could keep an image open.
    refuse_encrypted(live, targets).await?;
    sweep(live).await?;
    together.meet(Meeting::Ready).await?;
    let begun = Instant::now();
    // 3) Mark the section and pause the guest, in this order (see `mark`).
    let _paused = Mark::open_section(&live.machine).await.map_err(to_engine)?;
    live.section_since().get_or_insert(begun);
    together.meet(Meeting::Paused).await?;
    // 4) Close the chains. A crash here leaves some disks detached under a paused guest; undo reopens those
    //    by their placeholders.
    close_disks(live, targets).await
}

/// Reopens the disks of a section that is to be undone, and resumes the guest, if it ran before.
pub(super) async fn undo_open(live: &QemuDomain, targets: &[Target], chains: &[OpenChain]) -> Result<()> {
    let machine = &live.machine;
    sweep(live).await?;
    // 1) All disks before the guest resumes: it would read zeros from a placeholder.
    for target in targets {
        let Some(disk) = live.disk_of(target) else { continue };
        // A server that was restarted may have opened what the path named in the middle of the section.
        if disk.server.is_some() || disk.open().await.map_err(to_engine)?.placeholder.is_some() {
            attach_disk(disk, chains).await?;
        }
    }
    // 2) Resume while the mark exists: the mark has the record that the guest ran. 3) Remove the mark last. A
    //    crash between the two leaves a mark beside a running guest, which `tidy` removes.
    let mark = Mark::section(machine).await.map_err(to_engine)?;
    if mark == Some(Mark::SectionRan) {
        machine.resume_unless_stopped().await.map_err(to_engine)?;
    }
    *live.section_since() = None;
    Mark::close_section(machine).await.map_err(to_engine)
}

/// Gives disks the chains that their configured paths name. A disk that has its chain already is skipped.
pub(super) async fn attach(live: &QemuDomain, targets: &[Target], chains: &[OpenChain]) -> Result<()> {
    sweep(live).await?;
    for target in targets {
        attach_disk(live.expect(target)?, chains).await?;
    }
    Ok(())
}

/// Undoes [`attach`].
pub(super) async fn undo_attach(live: &QemuDomain, targets: &[Target]) -> Result<()> {
    sweep(live).await?;
    let _paused = Mark::open_section(&live.machine).await.map_err(to_engine)?;
    close_disks(live, targets).await
}

/// Closes the chains of disks. Needs a paused guest, and no unused node of ours in QEMU.
async fn close_disks(live: &QemuDomain, targets: &[Target]) -> Result<()> {
    let machine = &live.machine;
    let mut shared: Vec<(String, Target)> = Vec::new();
    for target in targets {
        let detaching = |error: Error| error.context(format!("closing the files of disk {target}"));
        let Some(disk) = live.disk_of(target) else { continue };
        if let Some(server) = &disk.server {
            served::close(disk, server).await.map_err(detaching)?;
            continue;
        }
        let open = disk.open().await.map_err(to_engine)?;
        let left = match &open.placeholder {
            Some(_) if open.layers.is_empty() => Vec::new(),
            Some(placeholder) => {
                // The placeholder was put on top, and nothing more: end a merge of it, take the chain off,
                // close that.
                stop_fold(machine, placeholder).await.map_err(to_engine).map_err(detaching)?;
                let graph = Graph::read(machine).await.map_err(to_engine)?;
                graph::reopen_backing(machine, &graph, placeholder, None)
                    .await
                    .map_err(to_engine)
                    .map_err(detaching)?;
                let names: Vec<String> = open.layers.iter().map(|layer| layer.node.name.clone()).collect();
                remove_layers(machine, &names).await.map_err(to_engine).map_err(detaching)?
            }
            None => {
                disk.remember(&open);
                let detached = graph::detach_as(machine, &disk.device, disk.placeholder()).await;
                detached.map_err(to_engine).map_err(detaching)?.still_open
            }
        };
        shared.extend(left.into_iter().map(|node| (node, target.clone())));
    }
    if shared.is_empty() {
        return Ok(());
    }
    // An image that two disks of the section share is closed with the last of them.
    let graph = Graph::read(machine).await.map_err(to_engine)?;
    shared.retain(|(node, _)| graph.node(node).is_some());
    match shared.first() {
        None => Ok(()),
        Some((node, target)) => {
            let users: Vec<&str> = graph.users(node).map(|user| user.parent.as_str()).collect();
            let users = users.join(", ");
            let detail = format!("{users} of the same QEMU uses the node {node} of disk {target} too");
            Err(Error::new(ErrorKind::Busy, detail).advise("end its other use, or shut the domain down"))
        }
    }
}

/// Gives one disk its chain.
async fn attach_disk(disk: &Disk, chains: &[OpenChain]) -> Result<()> {
    let machine = &disk.machine;
    let attaching = |error: Error| error.context(format!("attaching the chain of disk {}", disk.target));
    let Some(chain) = chains.iter().find(|chain| chain.target == disk.target) else {
        let detail = format!("no chain was given for disk {}", disk.target);
        return Err(Error::new(ErrorKind::Internal, detail));
    };
    if let Some(server) = &disk.server {
        return served::attach(disk, server, chain).await.map_err(attaching);
    }
    let open = disk.open().await.map_err(to_engine)?;
    let placeholder = match &open.placeholder {
        None if is_chain(&open, chain) => return Ok(()),
        None => {
            let detail = "QEMU has another chain open than the one that its path names";
            return Err(attaching(
                Error::new(ErrorKind::Refused, detail)
                    .advise("shut the domain down, then run `domsnap recover`"),
            ));
        }
        Some(placeholder) => placeholder,
    };
    if !open.layers.is_empty() {
        // The placeholder has a chain: one that was about to be attached, or was not yet taken off. If it is
        // the wanted one, finish the merge; else take it off as `close_disks` does.
        if is_chain(&open, chain) {
            return finish_fold(machine, placeholder, &open).await.map_err(to_engine).map_err(attaching);
        }
        stop_fold(machine, placeholder).await.map_err(to_engine).map_err(attaching)?;
        let graph = Graph::read(machine).await.map_err(to_engine)?;
        graph::reopen_backing(machine, &graph, placeholder, None)
            .await
            .map_err(to_engine)
            .map_err(attaching)?;
        let names: Vec<String> = open.layers.iter().map(|layer| layer.node.name.clone()).collect();
        remove_layers(machine, &names).await.map_err(to_engine).map_err(attaching)?;
    }
    let layers = chain.layers.iter().rev().map(|file| disk.layer(file, Name::node()));
    let detached = Detached {
        device: disk.device.clone(),
        placeholder: Name::new(placeholder.as_str()).map_err(to_engine)?,
        still_open: Vec::new(),
    };
    graph::attach(machine, &detached, &Stack::layers(layers)).await.map_err(to_engine).map_err(attaching)
}

/// Returns true if the open images are this chain.
fn is_chain(open: &QemuChain, chain: &OpenChain) -> bool {
    let named = chain.layers.iter().map(|layer| identity(layer.address.path().as_std_path()));
    open.layers.len() == chain.layers.len()
        && open.layers.iter().zip(named).all(|(layer, named)| named.is_some() && layer.identity == named)
}

/// Ends an interrupted merge of this placeholder, and of no other disk.
async fn stop_fold(machine: &Machine, placeholder: &str) -> crate::Result<()> {
    let job = jobs::fold_job(placeholder);
    if jobs::status(machine, &job).await?.is_none() {
        return Ok(());
    }
    jobs::cancel(machine, &job).await?;
    // Its result does not matter: the chain is read next.
    let _ = jobs::finish(machine, &job, |_| {}).await;
    Ok(())
}

async fn finish_fold(machine: &Machine, placeholder: &str, open: &QemuChain) -> crate::Result<()> {
    stop_fold(machine, placeholder).await?;
    if let Some(top) = open.root() {
        jobs::fold(machine, placeholder, &top.node.name).await?;
    }
    remove_layers(machine, &[placeholder.to_owned()]).await?;
    graph::take_back(machine, placeholder).await
}

/// Refuses encrypted images: here they would be reopened without their secret, so they must not be closed.
async fn refuse_encrypted(live: &QemuDomain, targets: &[Target]) -> Result<()> {
    jobs::dismiss_streams(&live.machine).await.map_err(to_engine)?;
    let nodes =
        live.machine.query("query-named-block-nodes", json!({ "flat": true })).await.map_err(to_engine)?;
    let encrypted = |name: &str| {
        let node =
            nodes.as_array().into_iter().flatten().find(|node| node["node-name"].as_str() == Some(name));
        node.is_some_and(|node| node["encrypted"] == true || node["image"]["encrypted"] == true)
    };
    for target in targets {
        let disk = live.expect(target)?;
        let open = disk.open().await.map_err(to_engine)?;
        let unsupported = |detail: String| {
            Err(Error::new(ErrorKind::Unsupported, detail).advise("shut the domain down, and do it then"))
        };
        if let Some(filter) = &open.filter {
            return unsupported(format!("disk {target} has a {filter} filter on top, which would be lost"));
        }
        if let Some(layer) = open.layers.iter().find(|layer| encrypted(&layer.node.name)) {
            let file = layer.file.as_deref().map(|file| file.display().to_string()).unwrap_or_default();
            return unsupported(format!("{file} of disk {target} is encrypted: it cannot be opened again"));
        }
    }
    Ok(())
}

/// Returns true if the guest is resumed at the end of a section with this mark.
fn resumes(mark: Option<Mark>, power: Option<PowerAfter>) -> bool {
    match power {
        Some(PowerAfter::Running) => true,
        Some(PowerAfter::Paused | PowerAfter::Off) => false,
        None => mark == Some(Mark::SectionRan),
    }
}

/// Ends a detached section.
///
/// If no section is open and the guest runs, or has run and is paused, it was resumed already. Then nothing
/// is done, because memory that is loaded over disks that were written since would not fit them.
pub(super) async fn finish(
    live: &QemuDomain,
    memory: Option<&Utf8Path>,
    reset: bool,
    power: Option<PowerAfter>,
    context: DomainContext<'_>,
) -> Result<StepOutcome> {
    let machine = &live.machine;
    let mut facts = StepOutcome::default();
    let mark = Mark::section(machine).await.map_err(to_engine)?;
    let is_loaded = Mark::Loaded.is_there(machine).await.map_err(to_engine)?;
    let state = machine.run_state().await.map_err(to_engine)?;
    // A QEMU that was started since, and waits for its first `cont`, has the snapshot's disks and no guest.
    let has_run = state.running || is_loaded || !matches!(state.word.as_str(), "prelaunch" | "inmigrate");
    if mark.is_none() && has_run && power != Some(PowerAfter::Off) {
        Mark::close_section(machine).await.map_err(to_engine)?;
        if !state.running {
            let word = state.word;
            facts.notes.push(format!(
                "the guest was resumed before, and is paused now (run state {word:?}): it stays as it is"
            ));
            return Ok(facts);
        }
        if memory.is_some() || reset {
            facts.notes.push("the domain runs already: it was resumed before, or started again".to_owned());
        }
        if power == Some(PowerAfter::Paused) {
            let _paused = machine.pause().await.map_err(to_engine)?;
        }
        return Ok(facts);
    }
    if power == Some(PowerAfter::Off) {
        quit(machine).await?;
        *live.section_since() = None;
        facts.guest = Some(GuestChange::Ended);
        return Ok(facts);
    }
    // A domain that is off later is started from this memory only if the guest cannot have run. Without the
    // note that is not known, and it is not started.
    let address = machine.qmp().socket().to_owned();
    let resumes = resumes(mark, power);
    let mut noted = match memory.is_some() && resumes {
        true => blocking(move || Starting::in_place(&address)).await.ok(),
        false => None,
    };
    // 1) Memory before the guest runs: its disks are those of the snapshot by now.
    if let Some(file) = memory {
        if !is_loaded {
            facts.notes.extend(load(live, file, context).await?);
        }
        facts.guest = Some(GuestChange::Restored);
    }
    if reset {
        if !is_loaded {
            self::reset(machine).await?;
        }
        facts.guest = Some(GuestChange::Reset);
    }
    // 2) Resume before the marks are removed. A crash in between leaves marks beside a running guest, which
    //    `tidy` removes. With the opposite order, a crash would leave a paused guest without a record that it
    //    ran.
    context.together.meet(Meeting::Loaded).await?;
    if resumes {
        if memory.is_some() || reset {
            // From the resume on the guest may run, so it is not loaded again.
            Mark::Loaded.make(machine).await.map_err(to_engine)?;
            if let Some(noted) = &mut noted {
                noted.ready().map_err(to_engine)?;
            }
            machine.cont().await.map_err(to_engine)?;
        } else {
            machine.resume_unless_stopped().await.map_err(to_engine)?;
        }
        facts.downtime = live.section_since().map(|since| since.elapsed());
    }
    *live.section_since() = None;
    // 3) Close the section: a repeated call finds a running guest and no mark, and does nothing.
    Mark::close_section(machine).await.map_err(to_engine)?;
    if resumes && memory.is_some() {
        facts.notes.extend(live.set_clock().await);
    }
    Ok(facts)
}

/// Loads memory. Returns a note if the guest has no fresh generation ID, which ends nothing.
async fn load(live: &QemuDomain, file: &Utf8Path, context: DomainContext<'_>) -> Result<Option<String>> {
    let image = live.unpacked.take(file).await?;
    let length = image.length().map_err(to_engine)?;
    let state = live.machine.run_state().await.map_err(to_engine)?;
    if live.machine.permits(&state).await.map_err(to_engine)?.reset_before_load {
        // QEMU keeps its run state over a load, and refuses to resume a guest that has switched itself off:
        // the state is that of the guest that is about to be replaced. A reset loses nothing: the disks are
        // the snapshot's.
        self::reset(&live.machine).await?;
    }
    // The image is searched while QEMU reads it, because the guest waits.
    let searched = Arc::clone(&image);
    let places = tokio::task::spawn_blocking(move || searched.generation_ids());
    restore_in_place(&live.machine, &image, &[], LOADING).await.map_err(to_engine)?;
    context.progress.bytes(length, length);
    // Before the guest runs: QEMU's notification of it is pending since the memory was loaded.
    Ok(fresh_generation_id(&live.machine, places).await)
}

/// Gives a guest whose memory was loaded a fresh generation ID; returns a note if that was not possible.
async fn fresh_generation_id(
    machine: &Machine,
    places: JoinHandle<crate::Result<Vec<u64>>>,
) -> Option<String> {
    let begun = Instant::now();
    let renewed = match places.await {
        Ok(Ok(places)) => generation_id::renew(machine, &places).await,
        Ok(Err(error)) => Err(error),
        Err(error) => {
            tracing::warn!(%error, "the memory image was not searched for a generation ID");
            return None;
        }
    };
    match renewed {
        Ok(renewed) => {
            tracing::debug!(renewed, took = ?begun.elapsed(), "generation ID");
            None
        }
        Err(error) => Some(generation_id::note(&error)),
    }
}

/// Resets the guest, and waits until it is done.
///
/// A QEMU that was configured to end when its guest reboots treats this as a reboot, so this is switched off
/// before. If the command line said so (`-no-reboot`, `-action reboot=shutdown`), it is switched on again
/// afterwards. No query reports that `set-action` said so at run time: then reboots of the guest reset it
/// from now on.
pub(super) async fn reset(machine: &Machine) -> Result<()> {
    let ends = Process::read(machine).ends_at_reboot();
    let action = |reboot: &'static str| json!({ "reboot": reboot });
    match machine.query("set-action", action("reset")).await {
        // A QEMU before 6.0: it could not be set at run time.
        Err(error) if error.kind() == crate::ErrorKind::Unsupported && !ends => {}
        other => drop(other.map_err(to_engine)?),
    }
    let done = reset_now(machine).await;
    if ends {
        machine.query("set-action", action("shutdown")).await.map_err(to_engine)?;
    }
    done
}

async fn reset_now(machine: &Machine) -> Result<()> {
    let mut events = machine.qmp().events();
    machine.reset().await.map_err(to_engine)?;
    let seen = timeout(SOON, async {
        loop {
            match events.next().await {
                Ok(Notice::Event(event)) if event.name == "RESET" => return Ok(()),
                // It is unknown which events were missed.
                Ok(Notice::Missed(_)) => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(error),
            }
        }
    });
    match seen.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Error::new(ErrorKind::Io, error.to_string()).context("resetting the guest")),
        Err(_) => {
            let detail = format!("QEMU did not report the reset within {} s", SOON.as_secs());
            Err(Error::new(ErrorKind::Io, detail).context("resetting the guest"))
        }
    }
}

/// Ends QEMU, and waits until its process is gone: only then are the images closed.
pub(super) async fn quit(machine: &Machine) -> Result<()> {
    let peer = machine.qmp().peer();
    // QEMU may end before it answers.
    let said = machine.qmp().execute_raw("quit", Value::Null).await;
    let gone = async {
        machine.qmp().closed().await;
        while let Some(peer) = peer
            && is_alive(peer.pid, peer.start_ticks)
        {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    match timeout(SOON, gone).await {
        Ok(()) => Ok(()),
        Err(_) => {
            let said = said.err().map(|error| format!(": {error}")).unwrap_or_default();
            let detail = format!("QEMU has not ended within {} s{said}", SOON.as_secs());
            Err(Error::new(ErrorKind::Io, detail).context("switching the domain off"))
        }
    }
}

/// Returns true if a process, of this start time, still exists and is not a zombie.
pub(super) fn is_alive(pid: u32, start_ticks: Option<u64>) -> bool {
    let Some((state, start)) = stat_of(pid) else { return false };
    start == start_ticks && (!matches!(state, 'Z' | 'X') || has_threads(pid))
}

/// The start time of a process, in clock ticks since boot.
pub(super) fn start_of(pid: u32) -> Option<u64> {
    stat_of(pid).and_then(|(_, start)| start)
}

/// The state and the start time of a process.
fn stat_of(pid: u32) -> Option<(char, Option<u64>)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next().and_then(|state| state.chars().next()).unwrap_or('X');
    // The first one is field 3 of the file, the start is field 22.
    Some((state, fields.nth(18).and_then(|ticks| ticks.parse().ok())))
}

/// Returns true if threads of a process whose first thread has ended still run: they have its files open.
fn has_threads(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
    tasks.into_iter().flatten().flatten().any(|task| task.file_name().to_str() != Some(&pid.to_string()))
}
