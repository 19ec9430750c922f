//! Steps as lvm2 commands. Applying, undoing and the status of a step start from the volumes that the group
//! has.

use std::thread;
use std::time::{Duration, Instant};

use camino::Utf8Path;
use serde::{Deserialize, Serialize};
use snapcore::backend::{Salvage, StepStatus};
use snapcore::{Error, ErrorKind, LayerName, Result, shown_size};

use crate::command::{CHANGE, Lvm2, MERGE};
use crate::device::{self, DeviceState};
use crate::layers::require_whole;
use crate::lock::VolumeLock;
use crate::names::Volume;
use crate::report::{Row, VolumeGroup, VolumeKind};
use crate::tags;

/// Poll interval and time limit for a volume that should be closed. udev briefly opens new volumes; it closes
/// them by itself.
const LOOK: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(3);

/// Interval in which lvm asks for the progress of a merge, in seconds. Its default is 15, and a guest may be
/// paused until lvm notices the end.
const POLL: &str = "1";

/// An action on a volume, one per step. Layers are volumes of the same group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum LvmStep {
    /// Takes a snapshot of the volume: one command. For a thick snapshot lvm commits its metadata twice.
    Snapshot {
        /// Its name.
        layer: LayerName,
        /// The bytes of its area, if it is a thick one.
        area: Option<u64>,
        /// Its tags.
        tags: Vec<String>,
        /// True if one more tag says how often the volume had been written before.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        counts: bool,
    },
    /// Makes a thin volume with a point's content, beside the volume.
    Clone {
        /// The point.
        point: LayerName,
        /// Name of the new volume.
        layer: LayerName,
        /// True if it is active.
        active: bool,
        /// Its tags, with the operation that made it.
        tags: Vec<String>,
    },
    /// Gives the volume's name to a new one: two renames, the volume first. Between them no volume has the
    /// name.
    Swap {
        /// The new volume.
        new: LayerName,
        /// The name that the previous volume gets.
        old: LayerName,
        /// The operation. It is in the new volume's tags, whatever its name.
        work: String,
        /// The name for data that was written meanwhile.
        kept: LayerName,
        /// State of the new volume when it was made.
        since: DeviceState,
    },
    /// Merges a thick snapshot into the volume, then takes it again under its name. Between the two only the
    /// volume has its data.
    Merge {
        /// The snapshot.
        point: LayerName,
        /// A snapshot of the state before, which an undo merges. Its tags say how often the volume had been
        /// written when it was taken: a running guest had written until then.
        safety: LayerName,
        /// The bytes of its area.
        area: u64,
        /// Its tags when it is taken again, the operation among them.
        tags: Vec<String>,
        /// The operation.
        work: String,
        /// The name for data that was written meanwhile.
        kept: LayerName,
    },
    /// Removes volumes: one command, and each is removed by itself.
    Remove {
        /// Their names.
        layers: Vec<LayerName>,
    },
}

/// The volume on which a step is performed, and the tools for it.
pub(crate) struct StepRunner<'a> {
    pub(crate) lvm: &'a Lvm2,
    pub(crate) volume: &'a Volume,
    /// The configured path.
    pub(crate) path: &'a Utf8Path,
    pub(crate) lock: Option<&'a VolumeLock>,
}

impl StepRunner<'_> {
    pub(crate) fn apply(&self, step: &LvmStep) -> Result<()> {
        match step {
            LvmStep::Snapshot { layer, area, tags, counts } => {
                let since = counts.then(|| tags::of_writes(&DeviceState::now(self.path)));
                self.snapshot(layer, *area, tags, since.as_deref())
            }
            LvmStep::Clone { point, layer, active, tags } => self.clone_point(point, layer, *active, tags),
            LvmStep::Swap { new, old, work, .. } => self.swap(new, old, work),
            LvmStep::Merge { point, area, tags, work, .. } => {
                self.merge_and_take_again(point, *area, tags, work)
            }
            LvmStep::Remove { layers } => self.remove(layers),
        }
    }

    pub(crate) fn undo(&self, step: &LvmStep) -> Result<()> {
        let group = self.group()?;
        match step {
            LvmStep::Snapshot { layer, tags, .. } | LvmStep::Clone { layer, tags, .. } => {
                // The tags suffice: the plain volume of a thick snapshot that was only begun is removed too.
                match group.row(layer.as_str()).filter(|row| has_tags(row, tags)) {
                    Some(_) => self.remove(std::slice::from_ref(layer)),
                    None => Ok(()),
                }
            }
            LvmStep::Swap { new, old, work, .. } => {
                // The previous volume is renamed first. If it still has the configured name, nothing was
                // done.
                if group.row(old.as_str()).is_none() {
                    return Ok(());
                }
                // 1) Move the new volume out of the name, if the second rename was done. 2) Then give the
                //    name back to the previous one. A crash between the two leaves the name absent, and the
                //    undo is repeated.
                if group.row(&self.volume.name).is_some_and(|row| is_of(row, work)) {
                    self.require_closed("its previous state would replace it")?;
                    self.rename(&self.volume.name, new.as_str())?;
                }
                self.rename(old.as_str(), &self.volume.name)
            }
            LvmStep::Merge { point, safety, area, tags, work, .. } => {
                let begun = group.row(point.as_str()).is_none_or(|row| row.merging || is_of(row, work));
                // A safety volume that is no snapshot has none of the data: nothing was begun then.
                if !begun || !group.row(safety.as_str()).is_some_and(|row| self.is_snapshot(row)) {
                    return Ok(());
                }
                // 1) First complete the step, so that the point exists again: a merge consumes it. 2) Only
                //    then merge the safety snapshot, which restores the previous data. A crash in either is
                //    repeated from the volumes that exist.
                self.merge_and_take_again(point, *area, tags, work)?;
                self.merge(safety)
            }
            LvmStep::Remove { .. } => Err(Error::new(
                ErrorKind::Internal,
                "volumes that were removed cannot be brought back: this is a step after the commit point",
            )),
        }
    }

    pub(crate) fn status(&self, step: &LvmStep) -> Result<StepStatus> {
        let group = self.group()?;
        let there = |layer: &LayerName| group.row(layer.as_str());
        let is_thick = matches!(step, LvmStep::Snapshot { area: Some(_), .. });
        Ok(match step {
            LvmStep::Snapshot { layer, tags, .. } | LvmStep::Clone { layer, tags, .. } => {
                match there(layer) {
                    Some(row) if self.is_made(row, tags, is_thick) => StepStatus::Done,
                    Some(row) if is_begun(row, tags, is_thick) => StepStatus::Partly,
                    // The new volume of a revert, under its final name.
                    None if group.row(&self.volume.name).is_some_and(|row| has_tags(row, tags)) => {
                        StepStatus::Done
                    }
                    _ => StepStatus::NotDone,
                }
            }
            LvmStep::Swap { work, .. } => match group.row(&self.volume.name) {
                Some(row) if is_of(row, work) => StepStatus::Done,
                Some(_) => StepStatus::NotDone,
                None => StepStatus::Partly,
            },
            LvmStep::Merge { point, work, .. } => match there(point) {
                Some(row) if is_of(row, work) && self.is_snapshot(row) => StepStatus::Done,
                Some(row) if !row.merging && !is_of(row, work) => StepStatus::NotDone,
                _ => StepStatus::Partly,
            },
            LvmStep::Remove { layers } => {
                match layers.iter().filter(|layer| there(layer).is_some()).count() {
                    0 => StepStatus::Done,
                    left if left == layers.len() => StepStatus::NotDone,
                    _ => StepStatus::Partly,
                }
            }
        })
    }

    /// Saves, as a snapshot with its own name, data that the domain wrote into a volume which an undo would
    /// discard.
    ///
    /// It is durable before this returns, and before anything is undone.
    pub(crate) fn salvage(&self, step: &LvmStep) -> Result<Salvage> {
        let mut group = self.group()?;
        if let LvmStep::Merge { point, .. } = step
            && group.row(point.as_str()).is_some_and(|row| row.merging)
        {
            // No snapshot can be taken of a volume while a merge into it runs. Its content does not change by
            // completing that.
            self.merge(point)?;
            group = self.group()?;
        }
        // `roomy` is the size of an area that also has room for what a domain writes later.
        let (kept, area, roomy) = match step {
            LvmStep::Swap { work, kept, since, .. } => {
                let swapped = group.row(&self.volume.name).is_some_and(|row| is_of(row, work));
                if !swapped || !since.may_have_passed(self.path) {
                    return Ok(Salvage::Nothing);
                }
                (kept, None, 0)
            }
            LvmStep::Merge { point, safety, work, kept, .. } => {
                let begun = group.row(point.as_str()).is_none_or(|row| row.merging || is_of(row, work));
                // A safety volume that is no snapshot was only begun, and nothing after it was.
                let Some(safety) = group.row(safety.as_str()).filter(|row| self.is_snapshot(row)) else {
                    return Ok(Salvage::Nothing);
                };
                // The undo has begun, and completes this merge: lvm takes no snapshot of the volume now.
                if safety.merging {
                    return Ok(Salvage::Nothing);
                }
                if begun && safety.invalid {
                    return self.complete_instead(step);
                }
                let since = safety.parsed_tags().since;
                if !begun || since.is_some_and(|since| !since.may_have_passed(self.path)) {
                    return Ok(Salvage::Nothing);
                }
                // Merging the safety snapshot writes at most the data in it. What the domain writes later
                // goes into this area too.
                let extent = group.extent.max(1);
                let needed = safety.used().div_ceil(extent).saturating_add(2).saturating_mul(extent);
                let roomy = needed.saturating_add(safety.size);
                (kept, Some(if roomy <= group.free { roomy } else { needed }), roomy)
            }
            LvmStep::Snapshot { .. } | LvmStep::Clone { .. } | LvmStep::Remove { .. } => {
                return Ok(Salvage::Nothing);
            }
        };
        let tags = tags::of_work("kept", None);
        let size = match group.row(kept.as_str()) {
            Some(row) if self.is_made(row, &tags, area.is_some()) => row.size,
            found => {
                if found.is_some_and(|row| is_begun(row, &tags, area.is_some())) {
                    self.remove(std::slice::from_ref(kept))?;
                }
                self.snapshot(kept, area, &tags, None)?;
                area.unwrap_or_default()
            }
        };
        let mut message = format!(
            "{}: the volume may have been written after the crash; the revert was undone, and what {} held then is kept as \
             {}/{kept}: remove it when it is of no use",
            self.path, self.volume, self.volume.group
        );
        if size < roomy {
            message += &format!(
                "; its area of {} has little room, and writes to the volume will soon fill it; it is lost then: before the domain \
                 is started, extend it ('lvextend -L+SIZE {}/{kept}', after 'vgextend') or copy it",
                shown_size(size),
                self.volume.group
            );
        }
        if let LvmStep::Merge { point, .. } = step
            && !group.row(point.as_str()).is_some_and(|row| self.is_snapshot(row))
        {
            message += &format!(
                "; {point} was being merged and is taken again from the volume as it is now: it has what was written since"
            );
        }
        Ok(Salvage::Saved(message))
    }

    /// Handles a revert whose safety snapshot overflowed because the domain wrote after a crash. It cannot be
    /// undone any more. The point is completed, so that the operation can end.
    fn complete_instead(&self, step: &LvmStep) -> Result<Salvage> {
        if let LvmStep::Merge { point, safety, area, tags, work, .. } = step {
            self.merge_and_take_again(point, *area, tags, work)?;
            return Ok(Salvage::Stays(
                Vec::new(),
                format!(
                    "{}: the revert cannot be undone: {safety}, which kept the state before it, overflowed by what was written to the volume \
                     after the crash; {} stays as it is now: as {point} was, with what was written since",
                    self.path, self.volume
                ),
            ));
        }
        Ok(Salvage::Nothing)
    }

    fn group(&self) -> Result<std::sync::Arc<VolumeGroup>> {
        self.lvm.group_now(&self.volume.group)
    }

    fn full(&self, layer: &str) -> String {
        self.volume.beside(layer).to_string()
    }

    fn change(&self, args: &[&str], deadline: Duration) -> Result<()> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        self.lvm.change(&self.volume.group, &args, deadline, self.lock.map(|lock| &lock.file))
    }

    /// Takes a snapshot in one command. Only if that fails, it is checked if the snapshot was taken before:
    /// this runs during the guest's pause. `since` is a tag by which it is not known again.
    fn snapshot(
        &self,
        layer: &LayerName,
        area: Option<u64>,
        tags: &[String],
        since: Option<&str>,
    ) -> Result<()> {
        let area = area.map(|bytes| format!("{bytes}b"));
        let origin = self.volume.to_string();
        let mut args = vec!["lvcreate", "-q", "-y", "-s", "-n", layer.as_str()];
        match &area {
            Some(area) => args.extend(["-pr", "-L", area]),
            // Inactive, and skipped at activation, so that it is not written by mistake.
            None => args.push("-ky"),
        }
        for tag in tags.iter().map(String::as_str).chain(since) {
            args.extend(["--addtag", tag]);
        }
        args.push(&origin);
        self.create(layer, tags, area.is_some(), &args)
    }

    fn clone_point(&self, point: &LayerName, layer: &LayerName, active: bool, tags: &[String]) -> Result<()> {
        let origin = self.full(point.as_str());
        let mut args = vec![
            "lvcreate",
            "-q",
            "-y",
            "-s",
            "-kn",
            if active { "-ay" } else { "-an" },
            "-prw",
            "-n",
            layer.as_str(),
        ];
        for tag in tags {
            args.extend(["--addtag", tag]);
        }
        args.push(&origin);
        self.create(layer, tags, false, &args)
    }

    fn create(&self, layer: &LayerName, tags: &[String], is_thick: bool, args: &[&str]) -> Result<()> {
        let Err(error) = self.change(args, CHANGE) else { return Ok(()) };
        let group = self.group()?;
        match group.row(layer.as_str()) {
            Some(row) if self.is_made(row, tags, is_thick) => Ok(()),
            // lvm failed between its two commits, and could not revert the first.
            Some(row) if is_begun(row, tags, is_thick) => {
                Err(match self.remove(std::slice::from_ref(layer)) {
                    Ok(()) => error,
                    Err(left) => {
                        let full = self.full(layer.as_str());
                        error
                            .state(format!("{full} is a plain volume, and cannot be removed: {left}"))
                            .advise(format!("run 'domsnap recover'; or, by hand: 'lvremove {full}'"))
                    }
                })
            }
            Some(_) => Err(Error::new(
                ErrorKind::Exists,
                format!("{} exists, and is not what was to be made", self.full(layer.as_str())),
            )
            .because(error)
            .advise("rename it and try again")),
            None => Err(error),
        }
    }

    /// Returns true if the volume is what a command was to make. For a thick snapshot the tags alone do not
    /// show that.
    fn is_made(&self, row: &Row, tags: &[String], is_thick: bool) -> bool {
        has_tags(row, tags) && (!is_thick || self.is_snapshot(row))
    }

    /// Returns true for a complete thick snapshot of the volume, also while it is being merged.
    fn is_snapshot(&self, row: &Row) -> bool {
        row.kind == VolumeKind::ThickSnapshot && row.origin.as_deref() == Some(self.volume.name.as_str())
    }

    fn swap(&self, new: &LayerName, old: &LayerName, work: &str) -> Result<()> {
        let group = self.group()?;
        match group.row(&self.volume.name) {
            Some(row) if is_of(row, work) => return Ok(()),
            Some(_) => {
                // 1) The new volume must be active: without a device the domain could not start. No process
                //    may have the volume open: it would continue under another name. 2) Free the name. From
                //    here until 3) the name is absent; a crash leaves it so, and `status` reports `Partly`.
                self.require_active(&group, new)?;
                self.require_closed("its user would continue on a volume of another name")?;
                self.rename(&self.volume.name, old.as_str())?;
            }
            None if group.row(old.as_str()).is_some() => {}
            None => {
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!("there is neither {} nor {}", self.volume, self.full(old.as_str())),
                ));
            }
        }
        // 3) Give the name to the new volume. lvm commits each rename durably by itself.
        self.rename(new.as_str(), &self.volume.name)
    }

    /// Refuses a new volume that is not active. If lvm's configuration excludes a volume from activation,
    /// `lvcreate` does not activate it, and reports success.
    fn require_active(&self, group: &VolumeGroup, new: &LayerName) -> Result<()> {
        let full = self.full(new.as_str());
        match group.row(new.as_str()) {
            Some(row) if row.active => Ok(()),
            Some(_) => Err(Error::new(
                ErrorKind::Refused,
                format!("{full} is not active, and is to become {}", self.volume),
            )
            .state(format!("no volume was renamed; {} is as before", self.volume))
            .advise(format!(
                "see activation/volume_list in lvm.conf: it must name the group {}, or a tag of {}; then try again",
                self.volume.group, self.volume
            ))),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no volume {full}, which is to become {}", self.volume),
            )
            .state(format!("no volume was renamed; {} is as before", self.volume))
            .advise("another program removed it; try again")),
        }
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.change(&["lvrename", "-q", "-y", &self.volume.group, from, to], CHANGE)
    }

    fn merge_and_take_again(&self, point: &LayerName, area: u64, tags: &[String], work: &str) -> Result<()> {
        let group = self.group()?;
        match group.row(point.as_str()) {
            Some(row) if is_of(row, work) && self.is_snapshot(row) => return Ok(()),
            // The second command stopped between its two commits: see 3).
            Some(row) if is_of(row, work) && row.kind == VolumeKind::Thick => {
                self.remove(std::slice::from_ref(point))?;
            }
            Some(row) => {
                // 1) A damaged snapshot must not be merged: the merge would stop in the middle. 2) The merge
                //    consumes the point.
                require_whole(self.volume, row)?;
                self.merge(point)?;
            }
            None => {}
        }
        // 3) Take the point again. A crash between 2) and 3) leaves only the volume with its data: a repeated
        //    call finds no point, or a plain volume with the operation's tags, and takes it. A snapshot with
        //    these tags has been taken again.
        self.snapshot(point, Some(area), tags, None)
    }

    /// Merges a thick snapshot into the volume, and waits until it is gone.
    ///
    /// The volume must be closed: otherwise lvm defers the merge until its next activation, and reports
    /// success.
    fn merge(&self, layer: &LayerName) -> Result<()> {
        let full = self.full(layer.as_str());
        let row = |group: &VolumeGroup| group.row(layer.as_str()).cloned();
        self.require_closed("lvm would defer the merge until the volume's next activation")?;
        match row(&*self.group()?) {
            None => return Ok(()),
            // Begun by a command that ended in the middle: the kernel continues it, and lvm must be notified
            // of its end.
            Some(found) if found.merging => {
                let volume = self.volume.to_string();
                self.change(
                    &["lvpoll", "-q", "--interval", POLL, "--polloperation", "merge", &volume],
                    MERGE,
                )?;
            }
            Some(_) => {
                let why = "lvm would defer its merge until the volume's next activation";
                self.wait_closed(&self.volume.beside(layer.as_str()), why)?;
                self.change(&["lvconvert", "-q", "-y", "--interval", POLL, "--merge", &full], MERGE)?;
            }
        }
        match row(&*self.group()?) {
            None => Ok(()),
            Some(found) if found.merging => Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "the merge of {full} was deferred by lvm: another process opened that, or {}, just before",
                    self.volume
                ),
            )
            .state("lvm does it when the volume is activated next")
            .advise(format!(
                "close it, then 'lvchange -an {0}' and 'lvchange -ay {0}', then run 'domsnap recover'",
                self.volume
            ))),
            Some(found) => {
                require_whole(self.volume, &found)?;
                Err(Error::new(ErrorKind::Io, format!("lvm did not merge {full}, and does not say why"))
                    .advise("see 'dmesg', then run 'domsnap recover'"))
            }
        }
    }

    /// Removes those of the volumes that exist, in one command.
    fn remove(&self, layers: &[LayerName]) -> Result<()> {
        let group = self.group()?;
        let mut names = Vec::new();
        for layer in layers {
            let Some(row) = group.row(layer.as_str()) else { continue };
            if *layer == self.volume.layer() {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!("{} was to be removed, and is what the domain writes", self.volume),
                )
                .state("it was not removed"));
            }
            if row.open {
                let volume = self.volume.beside(layer.as_str());
                self.wait_closed(&volume, "it is to be removed")?;
            }
            names.push(self.full(layer.as_str()));
        }
        // Check again: another process may have created a dependent volume since the plan.
        refuse_dependents(&group, layers)?;
        if names.is_empty() {
            return Ok(());
        }
        let mut args = vec!["lvremove", "-q", "-y"];
        args.extend(names.iter().map(String::as_str));
        self.change(&args, CHANGE)
    }

    fn require_closed(&self, why: &str) -> Result<()> {
        self.wait_closed(self.volume, why)
    }

    fn wait_closed(&self, volume: &Volume, why: &str) -> Result<()> {
        wait_closed(self.lvm, volume, why)
    }
}

/// Refuses to remove volumes where lvm would remove others with them.
///
/// # Errors
/// [`ErrorKind::Refused`], naming those.
pub(crate) fn refuse_dependents(group: &VolumeGroup, removed: &[LayerName]) -> Result<()> {
    let along: Vec<String> = group
        .removed_with(removed)
        .iter()
        .map(|row| format!("{}/{} (of {})", group.name, row.name, row.origin.as_deref().unwrap_or_default()))
        .collect();
    match along.is_empty() {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Refused,
            format!("lvm would remove with it what was made of it: {}", along.join(", ")),
        )
        .state("nothing was removed")
        .advise("remove those first with 'lvremove', if they are not needed, and try again ('domsnap recover' where that is asked for)")),
    }
}

/// Waits until no process has a volume open.
///
/// # Errors
/// [`ErrorKind::Busy`] with the user, as far as that is visible.
pub(crate) fn wait_closed(lvm: &Lvm2, volume: &Volume, why: &str) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let group = lvm.group_now(&volume.group)?;
        if !group.row(&volume.name).is_some_and(|row| row.open) {
            return Ok(());
        }
        if Instant::now() >= until {
            break;
        }
        thread::sleep(LOOK);
    }
    let who =
        device::holder(&volume.path()).unwrap_or_else(|| "the kernel does not show the user".to_owned());
    Err(Error::new(ErrorKind::Busy, format!("{volume} is open ({who}), and {why}"))
        .state("it was not touched")
        .advise("shut the domain down, or unmount it; a running domain must be known by its QMP socket"))
}

/// Refuses a volume that its hypervisor has open, together with a user that this machine does not list:
/// another driver of the kernel, or a process outside of this PID namespace. The kernel counts how often the
/// device is open.
///
/// # Errors
/// [`ErrorKind::Busy`] with both counts, if they do not agree within a moment.
pub(crate) fn refuse_unseen_users(lvm: &Lvm2, path: &Utf8Path, volume: &Volume) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let Some(opened) = lvm.openings(volume)? else { return Ok(()) };
        let Some(shown) = device::shown_openings(path) else { return Ok(()) };
        if opened <= shown {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "{volume} is open {opened} times, and the processes of this machine show {shown} of these: it has another \
                     user, which no process shows"
                ),
            )
            .state("no changes made")
            .advise(
                "see 'dmsetup ls --tree', 'lsblk' and 'xl block-list'; a process in another PID namespace (outside of this \
                 container) is seen from there alone: a disk that two write is destroyed",
            ));
        }
        thread::sleep(LOOK);
    }
}

impl LvmStep {
    /// Returns the layers that no other process may use meanwhile; the flag is true if readers count. lvm
    /// neither merges nor removes an open volume. A user of a renamed volume would continue on another
    /// volume's name. A copy of a point that is being written has no consistent state.
    pub(crate) fn needs(&self, volume: &Volume) -> Vec<(LayerName, bool)> {
        match self {
            Self::Snapshot { .. } => Vec::new(),
            Self::Clone { point, .. } => vec![(point.clone(), false)],
            Self::Swap { .. } => vec![(volume.layer(), true)],
            Self::Merge { point, .. } => vec![(volume.layer(), true), (point.clone(), true)],
            Self::Remove { layers } => layers.iter().map(|layer| (layer.clone(), true)).collect(),
        }
    }
}

fn is_of(row: &Row, work: &str) -> bool {
    row.parsed_tags().work.as_deref() == Some(work)
}

/// Returns true for the plain volume that `lvcreate -s` of a thick volume commits first.
fn is_begun(row: &Row, tags: &[String], is_thick: bool) -> bool {
    is_thick && row.kind == VolumeKind::Thick && has_tags(row, tags)
}

fn has_tags(row: &Row, tags: &[String]) -> bool {
    tags.iter().all(|tag| row.tags.contains(tag))
}
