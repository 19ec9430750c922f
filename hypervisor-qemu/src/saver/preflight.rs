//! Obstacles to a plan on this QEMU, found before anything is begun.
//!
//! 1. The run state must permit it ([`crate::RunState`] has the table).
//! 2. A guest whose file systems must be frozen must have a usable agent.
//! 3. A guest that is to be reset must survive it: its QEMU must not end at a reset.
//! 4. QEMU must be able to open the files that the plan names. A QEMU that gave up its rights, or that runs
//!    in another root, mount namespace, AppArmor profile or SELinux domain, may have its images open and be
//!    unable to reopen them. In a detached section, that would leave the guest without its disks. So QEMU
//!    opens each file in an unused node, in the mode that it will need, and closes it again. An unused node
//!    takes no lock and reads nothing. For a new overlay the check uses an empty file beside it with the
//!    rights, the owner and the labels of the active image.
//! 5. There must be room for the guest's memory, if it is saved.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use serde_json::json;
use snapcore::hypervisor::{DiskInstant, DomainStep, OpenChain, PowerAfter, Quiesce, SeenDisk};
use snapcore::{Edit, Error, ErrorKind, Plan, Result, StepRef, Target};

use super::{
    disk::{Disk, identity},
    error::to_engine,
    live::QemuDomain,
    media, room, served,
};
use crate::{
    discover::Process,
    machine::Machine,
    name::{Name, is_ours},
};

/// Labels that decide who may open a file, copied to the stand-in for a new one.
const LABELS: [&str; 2] = ["security.selinux", "system.posix_acl_access"];

/// Suffix of the stem in the name of a stand-in for a new file.
const STANDS_FOR: &str = "domsnap-probe";

/// Files that QEMU will open.
#[derive(Debug, PartialEq, Eq)]
enum Opens {
    /// The active image again, and a new overlay of this name.
    Overlay(Target, PathBuf),
    /// All layers, the active one for writing; also new layers, if the disk's current state is discarded.
    Chain { target: Target, new_layers: bool },
    /// All layers that belong to the domain, for writing.
    Merge(Target),
}

/// Refuses a plan that this QEMU cannot carry out. With `probe`, QEMU is asked to open the files that it will
/// need. Without it nothing is changed, not even for a moment.
pub(super) async fn check(live: &QemuDomain, plan: &Plan, chains: &[OpenChain], probe: bool) -> Result<()> {
    let untouched = |error: Error| match error.state_now() {
        Some(_) => error,
        None => error.state("no changes made"),
    };
    check_state(live, plan).await.map_err(untouched)?;
    if !probe {
        return Ok(());
    }
    for step in plan.domain_steps() {
        if let DomainStep::Media { media } = step {
            media::check(&live.machine, media).await.map_err(untouched)?;
        }
    }
    room::require(&live.machine, plan).await?;
    for opens in opens(plan) {
        probe_one(live, &opens, chains).await.map_err(untouched)?;
    }
    Ok(())
}

async fn check_state(live: &QemuDomain, plan: &Plan) -> Result<()> {
    let machine = &live.machine;
    let (mut disks, mut memory) = (false, false);
    for placed in plan.steps() {
        let step = match placed.step {
            StepRef::Domain(step) => &step.action,
            StepRef::Disk(step) => {
                disks |= live.disk_of(&step.target).is_some();
                continue;
            }
        };
        match step {
            DomainStep::Instant { disks: taken, memory: wanted, quiesce, running, .. } => {
                disks = true;
                refuse_internal(live, taken).await?;
                served::refuse_formats(live, taken)?;
                memory |= wanted.is_some();
                if *quiesce == Quiesce::Require
                    && wanted.is_none()
                    && let Some(error) = cannot_freeze(live, *running)
                {
                    return Err(error.context("the snapshot must be quiesced"));
                }
            }
            DomainStep::Detach { disks: detached, .. } => {
                disks = true;
                refuse_unfit(live, detached)?;
                refuse_used(live, detached).await?;
            }
            DomainStep::Continue { reset: true, power, .. }
                if *power != Some(PowerAfter::Off) && Process::read(machine).ends_at_reboot() =>
            {
                let detail = "the guest is reset by this, and its QEMU ends where the guest reboots (-no-reboot, or \
                              -action reboot=shutdown): firmware reboots once more after a reset";
                return Err(Error::new(ErrorKind::Refused, detail).advise(
                    "revert it with --off and start it as it is always started, or revert to a snapshot with memory",
                ));
            }
            _ => {}
        }
    }
    if !disks {
        return Ok(());
    }
    refuse_replay(live).await?;
    let state = machine.run_state().await.map_err(to_engine)?;
    let permits = machine.permits(&state).await.map_err(to_engine)?;
    let attempted = "checking the run state of the guest";
    permits.disks.map_err(|refusal| to_engine(machine.refused(attempted, &state, refusal)))?;
    if memory {
        permits.memory.map_err(|refusal| to_engine(machine.refused(attempted, &state, refusal)))?;
    }
    Ok(())
}

/// Refuses to detach disks of which another part of QEMU uses an image, which would stay open.
async fn refuse_used(live: &QemuDomain, targets: &[Target]) -> Result<()> {
    let graph = live.machine.graph().await.map_err(to_engine)?;
    let disks = targets.iter().filter_map(|target| live.disk_of(target));
    let chains: Vec<(&Target, Vec<&str>)> =
        disks.filter_map(|disk| Some((&disk.target, graph.all_below(graph.root(&disk.device)?)))).collect();
    // Images that two of the disks share are closed with the last of them.
    let is_theirs = |name: &str| chains.iter().any(|(_, nodes)| nodes.contains(&name)) || is_ours(name);
    for (target, nodes) in &chains {
        for node in nodes.iter().skip(1) {
            let mut users = graph.users(node);
            let Some(user) = users.find(|user| user.parent_type != "block-job" && !is_theirs(&user.parent))
            else {
                continue;
            };
            let user = if user.parent.is_empty() { "an export" } else { user.parent.as_str() };
            let detail = format!("{user} of the same QEMU uses the node {node} of disk {target} too");
            return Err(Error::new(ErrorKind::Refused, detail)
                .advise("end its other use, or shut the domain down first"));
        }
    }
    Ok(())
}

/// Refuses a QEMU that records its guest's run or replays one. Stopping and saving the guest is not part of
/// the record, and QEMU 10.0 aborts.
async fn refuse_replay(live: &QemuDomain) -> Result<()> {
    let machine = &live.machine;
    // This mode can only be set on QEMU's command line.
    let command = Process::read(machine).command_line;
    if !command.is_empty() && !command.iter().any(|word| word.contains("rr=")) {
        return Ok(());
    }
    let mode = match machine.query("query-replay", serde_json::Value::Null).await {
        Ok(reply) => reply["mode"].as_str().unwrap_or("none").to_owned(),
        Err(error) if error.is_lost() => return Err(to_engine(error)),
        Err(_) => return Ok(()),
    };
    if mode == "none" {
        return Ok(());
    }
    let detail = format!(
        "QEMU records or replays the guest's run (-icount rr=, mode {mode}), and ends where it is stopped or saved"
    );
    Err(Error::new(ErrorKind::Refused, detail).advise("shut the domain down, and do it then"))
}

/// Refuses to detach a disk that could not be attached with its current options.
fn refuse_unfit(live: &QemuDomain, targets: &[Target]) -> Result<()> {
    let is_one = |disk: &&SeenDisk| disk.member.as_ref().is_some_and(|member| targets.contains(member));
    for disk in live.seen.disks.iter().filter(is_one) {
        let Some(why) = &disk.left_out else { continue };
        let detail = format!("disk {} ({}) cannot be detached: {why}", disk.target, disk.address);
        return Err(Error::new(ErrorKind::Refused, detail)
            .advise("change that and try again, or shut the domain down first"));
    }
    Ok(())
}

/// Refuses internal snapshots that QEMU does not take because of a filter above the image.
async fn refuse_internal(live: &QemuDomain, disks: &[(Target, DiskInstant)]) -> Result<()> {
    let graph = live.machine.graph().await.map_err(to_engine)?;
    for (target, _) in disks.iter().filter(|(_, take)| matches!(take, DiskInstant::Internal { .. })) {
        let Some(disk) = live.disk_of(target) else { continue };
        let Some(filter) = graph.root(&disk.device).and_then(|root| graph.internal_snapshot_blocker(root))
        else {
            continue;
        };
        let detail = format!(
            "disk {target} has the {} filter {} on top, through which QEMU takes no internal snapshot",
            filter.driver, filter.name
        );
        return Err(Error::new(ErrorKind::Refused, detail)
            .advise(format!("take an external snapshot of it, with --disk {target}=external")));
    }
    Ok(())
}

/// Returns the reason why the guest's file systems cannot be frozen, as far as it is known without asking its
/// agent.
pub(super) fn cannot_freeze(live: &QemuDomain, running: bool) -> Option<Error> {
    if live.agent.is_none() {
        let detail = "the domain has no guest agent that is known";
        return Some(
            Error::new(ErrorKind::Unsupported, detail).advise(
                "register the domain with the agent's socket, or take the snapshot without --quiesce",
            ),
        );
    }
    (!running).then(|| {
        Error::new(ErrorKind::Refused, "the guest is paused, so its agent cannot answer")
            .advise("let the domain run, or take the snapshot without --quiesce")
    })
}

/// Returns true if the disk has another active image afterwards: applying a tag in place does not change it.
fn gets_new_layer(plan: &Plan, of: &Target) -> bool {
    plan.commit.iter().any(|edit| match edit {
        Edit::SetActive { target, .. } | Edit::SetPath { target, .. } => target == of,
        _ => false,
    })
}

fn opens(plan: &Plan) -> Vec<Opens> {
    let mut all: Vec<Opens> = Vec::new();
    for placed in plan.steps() {
        let more = match placed.step {
            StepRef::Disk(step) if placed.deferrable => vec![Opens::Merge(step.target.clone())],
            StepRef::Disk(_) => Vec::new(),
            StepRef::Domain(step) => match &step.action {
                DomainStep::Instant { disks, .. } => disks
                    .iter()
                    .filter_map(|(target, instant)| match instant {
                        DiskInstant::Overlay { address, .. } => {
                            Some(Opens::Overlay(target.clone(), address.path().as_std_path().to_owned()))
                        }
                        DiskInstant::Internal { .. } | DiskInstant::ByBackend => None,
                    })
                    .collect(),
                DomainStep::Detach { disks, restart, .. } => disks
                    .iter()
                    .map(|target| Opens::Chain {
                        new_layers: restart.is_some() && gets_new_layer(plan, target),
                        target: target.clone(),
                    })
                    .collect(),
                _ => Vec::new(),
            },
        };
        for opens in more {
            if !all.contains(&opens) {
                all.push(opens);
            }
        }
    }
    all
}

async fn probe_one(live: &QemuDomain, opens: &Opens, chains: &[OpenChain]) -> Result<()> {
    let (Opens::Overlay(target, _) | Opens::Chain { target, .. } | Opens::Merge(target)) = opens;
    let Some(disk) = live.disk_of(target) else { return Ok(()) };
    let Some(chain) = chains.iter().find(|chain| chain.target == *target) else { return Ok(()) };
    if let Some(server) = &disk.server {
        return served::preflight(disk, server, chain, matches!(opens, Opens::Merge(_)));
    }
    let open: Vec<_> =
        disk.open().await.map_err(to_engine)?.layers.iter().filter_map(|layer| layer.identity).collect();
    let active = chain.layers.first().map(|layer| layer.address.path().as_std_path());
    for (place, layer) in chain.layers.iter().enumerate() {
        let file = layer.address.path().as_std_path();
        let write = match opens {
            Opens::Overlay(..) if place > 0 => break,
            Opens::Overlay(..) | Opens::Chain { .. } => place == 0,
            Opens::Merge(_) => place == 0 || live.owns(target, file),
        };
        // QEMU does not merge an image that it does not have open.
        let merged_by_us = matches!(opens, Opens::Merge(_))
            && identity(file).is_some_and(|identity| !open.contains(&identity));
        if !merged_by_us {
            can_open(disk, file, write).await?;
        }
    }
    let new = match opens {
        Opens::Overlay(_, file) => Some(file.as_path()),
        Opens::Chain { new_layers: true, .. } => active,
        Opens::Chain { .. } | Opens::Merge(_) => None,
    };
    if let (Some(new), Some(active)) = (new, active)
        && let Some(probe) = Probe::make(new, active)
    {
        can_open(disk, &probe.0, true).await.map_err(|error| {
            error.context(format!("new images beside {} of disk {target}", new.display()))
        })?;
    }
    Ok(())
}

/// Refuses a file that QEMU cannot open, or whose name is another file for QEMU.
async fn can_open(disk: &Disk, file: &Path, write: bool) -> Result<()> {
    let target = &disk.target;
    let refused = |detail: String| {
        Error::new(ErrorKind::Refused, detail).state("no changes made").advise(
            "this QEMU is confined (by the user that it runs as, a chroot, a mount namespace, AppArmor or SELinux): give it \
             access to the directory of its images, or shut the domain down and do it then",
        )
    };
    let Some(text) = file.to_str() else { return Ok(()) };
    // A missing file is not QEMU's fault: the step that opens it reports it.
    let Ok(about) = fs::metadata(file) else { return Ok(()) };
    let ours = identity(file);
    if ours.is_some() && disk.view.identity(file) != ours {
        return Err(refused(format!("for this QEMU, {text} of disk {target} is another file")));
    }
    let driver = if about.file_type().is_block_device() { "host_device" } else { "file" };
    let mode = if write { "for writing" } else { "for reading" };
    open_and_close(&disk.machine, driver, text, write).await.map_err(|error| match error.kind() {
        crate::ErrorKind::Refused => {
            refused(format!("QEMU cannot open {text} of disk {target} {mode}: {}", error.detail()))
        }
        _ => to_engine(error),
    })
}

/// Lets QEMU open a file in an unused node, which reads nothing and takes no lock, and close it again.
pub(super) async fn open_and_close(
    machine: &Machine,
    driver: &str,
    file: &str,
    write: bool,
) -> crate::Result<()> {
    let node = Name::node();
    let added =
        json!({ "driver": driver, "node-name": node.as_str(), "filename": file, "read-only": !write });
    machine.run("checking that QEMU can open a file", file, "blockdev-add", added).await?;
    let closed = json!({ "node-name": node.as_str() });
    machine.run("closing a node", node.as_str(), "blockdev-del", closed).await.map(drop)
}

/// An empty stand-in for a new image; removed when dropped. Its name is always the same, so that leftovers of
/// crashes do not add up: the next one replaces the last.
struct Probe(PathBuf);

impl Probe {
    /// Returns its name, beside an image.
    fn path(beside: &Path) -> Option<PathBuf> {
        let ending =
            beside.extension().map(|ending| format!(".{}", ending.to_string_lossy())).unwrap_or_default();
        let stem = beside.file_stem()?.to_string_lossy().into_owned();
        // The stem of a layer's name is longer than that of the configured path, and is random.
        let stem = stem.split(".ds-").next().unwrap_or(&stem).to_owned();
        Some(beside.with_file_name(format!("{stem}.{STANDS_FOR}{ending}")))
    }

    /// Creates it; `None` if that is not possible: the step that creates the image reports the reason.
    fn make(beside: &Path, like: &Path) -> Option<Self> {
        let path = Self::path(beside)?;
        let create = || File::options().write(true).create_new(true).mode(0o600).open(&path);
        let file = match create() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let left = fs::symlink_metadata(&path).ok()?;
                if !left.is_file() || left.len() > 0 {
                    return None;
                }
                fs::remove_file(&path).ok()?;
                create().ok()?
            }
            made => made.ok()?,
        };
        let probe = Self(path);
        let about = fs::metadata(like).ok().filter(|about| about.is_file())?;
        // Best effort: a new image is created with the same rights.
        let _ = fchown(&file, Some(about.uid()), Some(about.gid()));
        for label in LABELS {
            copy_label(like, &file, label);
        }
        let _ = file.set_permissions(fs::Permissions::from_mode(about.mode() & 0o777));
        Some(probe)
    }
}

/// Removes the stand-ins that a crash left beside these images.
pub(super) fn remove_left<'a>(images: impl IntoIterator<Item = &'a Path>) {
    for path in images.into_iter().filter_map(Probe::path) {
        if fs::symlink_metadata(&path).is_ok_and(|left| left.is_file() && left.len() == 0) {
            let _ = fs::remove_file(&path);
        }
    }
}

fn copy_label(from: &Path, to: &File, label: &str) {
    let mut value = [0_u8; 4096];
    if let Ok(length) = rustix::fs::getxattr(from, label, &mut value)
        && let Some(value) = value.get(..length)
    {
        let _ = rustix::fs::fsetxattr(to, label, value, rustix::fs::XattrFlags::empty());
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
