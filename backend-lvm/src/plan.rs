//! Plans the steps of an operation on a volume: a function of the request and of lvm's report.

use std::collections::HashMap;

use snapcore::backend::{CloneDisk, ClonePlan, DiskPlan, DiskRequest, DiskState, InstantPlan};
use snapcore::hypervisor::DiskInstant;
use snapcore::{
    Disk, DiskRecord, Edit, Error, ErrorKind, Group, LayerName, Point, Result, SnapshotName, Step, shown_size,
};

use crate::check::{area_warning, pool_full};
use crate::device::DeviceState;
use crate::layers::{current_row, require_known_kind, require_whole};
use crate::names::Volume;
use crate::report::{Access, Row, VolumeGroup, VolumeKind};
use crate::rules::Rules;
use crate::steps::{LvmStep, refuse_dependents};
use crate::tags;

/// Bytes of a group that other disks of the same operation will use, by volume.
pub(crate) type Reserved = HashMap<Volume, u64>;

/// Plans the steps; returns them and the bytes of the group that they use.
pub(crate) fn plan(
    record: &DiskRecord,
    volume: &Volume,
    group: &VolumeGroup,
    state: &DiskState,
    rules: &Rules,
    reserved: &Reserved,
    request: &DiskRequest,
) -> Result<(DiskPlan<LvmStep>, u64)> {
    let mut planner = Planner {
        record,
        volume,
        group,
        current: current_row(group, volume)?,
        attached: state.attached,
        rules,
        reserved,
        takes: 0,
        plan: DiskPlan::default(),
    };
    match request {
        DiskRequest::Create { name, overlay, stamp, .. } => {
            planner.create(name, overlay.as_ref(), *stamp)?;
        }
        DiskRequest::Revert { to, save, stamp, .. } => planner.revert(to, save.as_ref(), *stamp)?,
        DiskRequest::Delete { drop, keep, .. } => planner.delete(drop, keep)?,
        _ => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{volume}: the backend lvm does not know this request"),
            ));
        }
    }
    Ok((planner.plan, planner.takes))
}

/// Plans clones of a point: thin snapshots of it, in the same pool. lvm gives each its own name at once, and
/// keeps their blocks by itself: the point and the volume may go.
pub(crate) fn clones(
    record: &DiskRecord,
    volume: &Volume,
    group: &VolumeGroup,
    rules: &Rules,
    request: &CloneDisk,
) -> Result<ClonePlan<LvmStep>> {
    let reserved = Reserved::default();
    let planner = Planner {
        record,
        volume,
        group,
        current: current_row(group, volume)?,
        attached: false,
        rules,
        reserved: &reserved,
        takes: 0,
        plan: DiskPlan::default(),
    };
    let target = &record.disk.target;
    let refused = |detail: String, advice: &str| {
        Err(Error::new(ErrorKind::Refused, detail).state("no changes made").advise(advice.to_owned()))
    };
    if planner.current.kind != VolumeKind::Thin {
        return refused(
            format!("{target}: {volume} is no thin volume, and a thick snapshot has no second user"),
            "activate the snapshot and copy it into a new volume (`dd`, `qemu-img convert`), then register that with \
             `domsnap domain add`; or convert the volume to a thin one",
        );
    }
    if request.full {
        return refused(
            format!("{target}: clones of thin volumes share blocks in their pool"),
            "leave --full out: a thin snapshot needs nothing of its origin; or copy it with `qemu-img convert`",
        );
    }
    planner.require_usable()?;
    planner.require_room_in_pool()?;
    let point = &request.point.layer;
    let Some(row) = group.row(point.as_str()).filter(|_| *point != record.active) else {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no volume {}/{point}", volume.group))
            .state("no changes made")
            .advise("another tool removed it; delete the snapshot from the catalogue"));
    };
    require_whole(volume, row)?;
    require_health(&volume.beside(row.name.as_str()), row)?;
    let (mut plan, mut disks) = (planner.plan, Vec::new());
    let work = format!("{:08x}", request.stamp);
    for place in &request.clones {
        let new = volume.beside(format!("{}-{target}", place.domain));
        if new != Volume::of_path(&new.path())? || group.row(&new.name).is_some() {
            return Err(Error::new(ErrorKind::Exists, format!("{target}: there is a volume {new} already"))
                .state("no changes made")
                .advise("choose another name for the clone, or rename that volume with 'lvrename'"));
        }
        new.require_room_for_names()?;
        let layer = new.layer();
        let step = LvmStep::Clone {
            point: row.layer(),
            layer: layer.clone(),
            active: true,
            tags: tags::of_work(&work, None),
        };
        let summary = format!("make {new} as a thin snapshot of {}", row.name);
        plan.prepare.push(Step::new(target.clone(), step, summary));
        let disk = Disk::new(target.clone(), new.path(), record.disk.format.as_str());
        disks.push(DiskRecord::new(disk, layer.clone()).owned(vec![layer]));
    }
    Ok(ClonePlan::new(plan, disks))
}

/// Refuses a volume, point or pool that lvm reports as unhealthy.
///
/// # Errors
/// [`ErrorKind::Refused`], with lvm's message.
fn require_health(volume: &Volume, row: &Row) -> Result<()> {
    let what = match (row.health.as_str(), row.check_needed) {
        ("", false) => return Ok(()),
        ("", true) => "needs a check of its metadata".to_owned(),
        (health, _) => format!("is not healthy: lvm reports '{health}'"),
    };
    Err(Error::new(ErrorKind::Refused, format!("{volume} {what}"))
        .state("no changes made")
        .advise("see 'lvs -a -o +lv_health_status,devices' and lvmthin(7), and repair it first"))
}

fn read_only_group(volume: &Volume) -> Error {
    Error::new(ErrorKind::Refused, format!("{volume} is in a volume group that is read-only"))
        .state("no changes made")
        .advise("see 'vgs -o +vg_permissions'")
}

struct Planner<'a> {
    record: &'a DiskRecord,
    volume: &'a Volume,
    group: &'a VolumeGroup,
    current: &'a Row,
    attached: bool,
    rules: &'a Rules,
    reserved: &'a Reserved,
    takes: u64,
    plan: DiskPlan<LvmStep>,
}

impl Planner<'_> {
    fn create(&mut self, name: &SnapshotName, overlay: Option<&LayerName>, stamp: u32) -> Result<()> {
        if overlay.is_some() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{}: a point of a volume is a volume of the same group, and no file", self.volume),
            )
            .state("no changes made")
            .advise("leave the file out"));
        }
        self.require_usable()?;
        let point = self.volume.point(stamp);
        let tags = tags::of_point(name, self.parent().as_ref());
        let area = self.area(self.rules.cow_bytes(self.current.size, self.group.extent), "a point")?;
        let message = match area {
            None => format!("take the thin snapshot {}/{point}", self.volume.group),
            Some(area) => {
                format!(
                    "take the snapshot {}/{point} with an area of {}",
                    self.volume.group,
                    shown_size(area)
                )
            }
        };
        let snapshot = LvmStep::Snapshot { layer: point.clone(), area, tags, counts: false };
        let snapshot = self.step(snapshot, message, 0);
        match self.attached {
            true => {
                let (take, nested) = (DiskInstant::ByBackend, vec![snapshot]);
                self.plan.instant = Some(InstantPlan::new(take, nested));
            }
            false => self.plan.cut.push(snapshot),
        }
        self.plan.point = Some(Point::external(point));
        self.warn_of_areas(&[]);
        Ok(())
    }

    fn revert(&mut self, to: &Point, save: Option<&SnapshotName>, stamp: u32) -> Result<()> {
        self.require_usable()?;
        let volume = self.volume;
        if to.tag.is_some() || to.layer == self.record.active {
            let detail =
                format!("{}/{} is what the domain writes, and no snapshot of it", volume.group, to.layer);
            return Err(Error::new(ErrorKind::NotFound, detail).state("no changes made"));
        }
        let row = self.group.row(to.layer.as_str()).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no volume {}/{}", volume.group, to.layer))
                .state("no changes made")
                .advise("another tool removed it; delete the snapshot from the catalogue")
        })?;
        require_whole(volume, row)?;
        require_health(&volume.beside(row.name.as_str()), row)?;
        if row.suspended || row.merging || row.locked {
            let state = match (row.suspended, row.merging) {
                (true, _) => "suspended",
                (_, true) => "being merged",
                _ => "being moved",
            };
            return Err(Error::new(ErrorKind::Refused, format!("{}/{} is {state}", volume.group, row.name))
                .state("no changes made")
                .advise("see 'lvs -a' and 'dmsetup info'; a command of lvm that stopped is ended by 'lvchange --refresh'"));
        }
        match self.current.kind {
            VolumeKind::Thin => self.revert_thin(row, save, stamp),
            VolumeKind::Thick
            | VolumeKind::ThickSnapshot
            | VolumeKind::Pool
            | VolumeKind::Inner
            | VolumeKind::Foreign => self.revert_thick(row, save, stamp),
        }
    }

    fn revert_thin(&mut self, row: &Row, save: Option<&SnapshotName>, stamp: u32) -> Result<()> {
        let volume = self.volume;
        self.require_room_in_pool()?;
        // The current volume is renamed, and removed when the revert is complete.
        self.refuse_dependents(&[volume.layer()])?;
        let (new, old, kept) = (volume.replacement(stamp), volume.previous(stamp), volume.salvaged(stamp));
        let work = format!("{stamp:08x}");
        let mut tags = tags::of_work(&work, Some(&row.layer()));
        // The new volume takes this one's place, and other programs and lvm.conf may select it by its tags.
        tags.extend(tags::of_others(&self.current.tags).cloned());
        let active = self.current.active;
        let clone = LvmStep::Clone { point: row.layer(), layer: new.clone(), active, tags };
        self.push(Group::Prepare, clone, format!("create {new} as a copy of {}", row.name), 0);
        if let Some(name) = save {
            let point = volume.point(stamp);
            let tags = tags::of_point(name, self.parent().as_ref());
            let step = LvmStep::Snapshot { layer: point.clone(), area: None, tags, counts: false };
            self.push(Group::Cut, step, format!("keep the current state as {}/{point}", volume.group), 0);
            self.plan.point = Some(Point::external(point));
        }
        let swap =
            LvmStep::Swap { new: new.clone(), old: old.clone(), work, kept, since: DeviceState::fresh() };
        self.push(
            Group::Cut,
            swap,
            format!("rename {} to {old} and {new} to {}", volume.name, volume.name),
            0,
        );
        self.remove_later(old);
        Ok(())
    }

    /// Removes a volume that a revert used temporarily.
    fn remove_later(&mut self, layer: LayerName) {
        let message = format!("remove {layer}");
        self.remove(&[layer], message);
    }

    fn revert_thick(&mut self, row: &Row, save: Option<&SnapshotName>, stamp: u32) -> Result<()> {
        let volume = self.volume;
        if row.kind != VolumeKind::ThickSnapshot {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{}/{} should be a snapshot of {volume}, and is not one", volume.group, row.name),
            )
            .state("no changes made")
            .advise("see 'lvs -o +role,origin'"));
        }
        if row.origin.as_deref() != Some(volume.name.as_str()) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{}/{} is a snapshot of {}, not of {volume}",
                    volume.group,
                    row.name,
                    row.origin.as_deref().unwrap_or("nothing")
                ),
            )
            .state("no changes made"));
        }
        let then = row.visible_size();
        if then != self.current.size {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{volume} had {then} bytes when {} was taken, and has {} now: a merge would not restore the previous size",
                    row.name, self.current.size
                ),
            )
            .state("no changes made")
            .advise(format!(
                "lvm cannot resize a volume that has snapshots: copy what you need from {}, or copy all of it into a new volume \
                 ('qemu-img convert'); a revert gives a thin volume its previous size",
                volume.beside(row.name.as_str()).path()
            )));
        }
        self.require_room_beside(row)?;
        let used = row.used();
        let wanted = self.rules.cow_for(used, self.group.extent);
        // A safety snapshot that becomes a point gets the area of a point. So does a temporary one, if there
        // is enough space: the domain may be started after a crash, and its writes go into that area too.
        let roomy = wanted.max(self.rules.cow_bytes(self.current.size, self.group.extent));
        let wanted = if save.is_some() || roomy <= self.free() { roomy } else { wanted };
        let area = self.area(wanted, "the safety snapshot that a revert needs")?;
        let work = format!("{stamp:08x}");
        let (safety, tags) = match save {
            Some(name) => (volume.point(stamp), tags::of_point(name, self.parent().as_ref())),
            None => (volume.previous(stamp), tags::of_work(&work, None)),
        };
        let message = match save {
            Some(_) => format!("keep the current state as {}/{safety}", volume.group),
            None => format!("keep the current state as {}/{safety} until the revert is done", volume.group),
        };
        let keep = LvmStep::Snapshot { layer: safety.clone(), area, tags, counts: true };
        self.push(Group::Cut, keep, message, 0);
        let merge = LvmStep::Merge {
            point: row.layer(),
            safety: safety.clone(),
            area: row.size,
            tags: tags::retaken(&row.tags, &work, row.time),
            work,
            kept: volume.salvaged(stamp),
        };
        self.push(
            Group::Cut,
            merge,
            format!("merge {} into {}, and take it again", row.name, volume.name),
            used,
        );
        match save {
            Some(_) => {
                self.plan.reserves = Some(format!(
                    "a thick snapshot of the replaced state reserves an area of {}",
                    shown_size(roomy)
                ));
                self.plan.point = Some(Point::external(safety));
            }
            None => {
                self.remove_later(safety);
            }
        }
        self.plan.consumes = true;
        self.plan.notes.push(format!(
            "{}: a merge takes up a thick snapshot, so {} is taken again after it; {} are moved, while a running guest \
             is paused",
            self.record.disk.target,
            row.name,
            shown_size(used)
        ));
        self.warn_of_areas(&[]);
        Ok(())
    }

    fn delete(&mut self, drop: &[Point], keep: &[Point]) -> Result<()> {
        let volume = self.volume;
        let mut layers: Vec<LayerName> = Vec::new();
        for point in drop.iter().filter(|point| !keep.contains(point)) {
            if point.layer != self.record.active && self.group.row(point.layer.as_str()).is_some() {
                layers.push(point.layer.clone());
            }
        }
        layers.sort();
        layers.dedup();
        self.refuse_dependents(&layers)?;
        if !layers.is_empty() && !self.group.writable {
            return Err(read_only_group(volume));
        }
        self.remove(&layers, self.removal(&layers, ""));
        let leftovers = self.leftovers(&layers, keep);
        self.remove(&leftovers, self.removal(&leftovers, ", left by earlier operations"));
        self.warn_of_areas(&layers);
        Ok(())
    }

    /// Finds volumes that earlier operations could not remove: temporary ones of a revert, and points without
    /// a snapshot. A volume that still cannot be removed stays, and blocks nothing.
    fn leftovers(&mut self, dropped: &[LayerName], keep: &[Point]) -> Vec<LayerName> {
        let volume = self.volume;
        let needed = |layer: &LayerName| {
            *layer == self.record.active
                || dropped.contains(layer)
                || keep.iter().any(|point| point.layer == *layer)
        };
        let owned = |row: &Row| self.record.owned.contains(&row.layer());
        let passing = |row: &Row| volume.is_temporary(&row.name) && (row.parsed_tags().ours || owned(row));
        let forgotten = |row: &Row| volume.is_point(&row.name) && owned(row);
        let rows = self.group.rows.iter().filter(|row| passing(row) || forgotten(row));
        let rows = rows.filter(|row| self.group.is_made_for(row, volume) && !needed(&row.layer()));
        let mut layers = Vec::new();
        for row in rows {
            let layer = row.layer();
            let why = match () {
                () if row.open => "it is open".to_owned(),
                () if !self.group.writable => "its volume group is read-only".to_owned(),
                () => match refuse_dependents(self.group, std::slice::from_ref(&layer)) {
                    Ok(()) => {
                        layers.push(layer);
                        continue;
                    }
                    Err(error) => error.to_string(),
                },
            };
            self.plan.notes.push(format!(
                "{}: {}/{layer}, which is of no use any more, cannot be removed now: {why}; run 'domsnap recover' when that \
                 has ended",
                self.record.disk.target, volume.group
            ));
        }
        layers.sort();
        layers
    }

    /// Removes volumes after the commit point.
    ///
    /// From the commit point until their removal the record owns them, whatever their tags say (the volume
    /// that a revert replaced may be the user's first one). So a later plan finds those that could not be
    /// removed.
    fn remove(&mut self, layers: &[LayerName], message: String) {
        if layers.is_empty() {
            return;
        }
        let target = &self.record.disk.target;
        let unknown = layers.iter().filter(|layer| !self.record.owned.contains(layer));
        let known = unknown.map(|layer| Edit::AddLayer { target: target.clone(), layer: layer.clone() });
        self.plan.commit.extend(known);
        let edits =
            layers.iter().map(|layer| Edit::RemoveLayer { target: target.clone(), layer: layer.clone() });
        let edits = edits.collect();
        self.push(Group::Finish, LvmStep::Remove { layers: layers.to_vec() }, message, 0);
        if let Some(remove) = self.plan.finish.last_mut() {
            remove.edits = edits;
        }
    }

    /// Describes the step of a delete.
    fn removal(&self, layers: &[LayerName], why: &str) -> String {
        let names: Vec<&str> = layers.iter().map(LayerName::as_str).collect();
        format!("remove {} of group {}{why}", names.join(", "), self.volume.group)
    }

    fn refuse_dependents(&self, removed: &[LayerName]) -> Result<()> {
        refuse_dependents(self.group, removed).map_err(|error| error.state("no changes made"))
    }

    fn push(&mut self, group: Group, step: LvmStep, summary: String, bytes: u64) {
        self.plan.push(group, self.step(step, summary, bytes));
    }

    fn step(&self, action: LvmStep, summary: String, bytes: u64) -> Step<LvmStep> {
        Step::new(self.record.disk.target.clone(), action, summary).bytes(bytes)
    }

    /// Returns the point from which the current volume derives.
    fn parent(&self) -> Option<LayerName> {
        let points = self.group.points(self.volume);
        match self.current.kind {
            // Points that were taken of this very volume: a revert replaces the volume.
            VolumeKind::Thin => {
                let own =
                    points.iter().rev().find(|row| row.origin.as_deref() == Some(self.volume.name.as_str()));
                own.map(|row| row.layer()).or_else(|| self.current.parsed_tags().from)
            }
            // The point of a revert was taken again, so it is the newest.
            VolumeKind::Thick
            | VolumeKind::ThickSnapshot
            | VolumeKind::Pool
            | VolumeKind::Inner
            | VolumeKind::Foreign => points.last().map(|row| row.layer()),
        }
    }

    /// Refuses a volume of a kind, or in a state, in which a snapshot of it or a revert is not correct.
    fn require_usable(&self) -> Result<()> {
        let (volume, current) = (self.volume, self.current);
        // It may have been converted since it was added.
        require_known_kind(volume, current, self.group)?;
        let refuse = |what: String, advice: String| {
            Err(Error::new(ErrorKind::Refused, format!("{volume} {what}"))
                .state("no changes made")
                .advise(advice))
        };
        if self.group.missing > 0 {
            return refuse(
                format!("is in a group of which {} physical volumes are missing", self.group.missing),
                "bring them back first: 'pvs' shows them".to_owned(),
            );
        }
        if !self.group.writable {
            return Err(read_only_group(volume));
        }
        if !current.active {
            return refuse("is not active".to_owned(), format!("activate it: 'lvchange -ay {volume}'"));
        }
        match current.access {
            Access::Writable => {}
            Access::ReadOnly => {
                return refuse(
                    "is read-only: what is reverted to is written".to_owned(),
                    format!("make it writable: 'lvchange -prw {volume}'"),
                );
            }
            Access::ReadOnlyHere => {
                return refuse(
                    "is active read-only on this machine".to_owned(),
                    "see read_only_volume_list in lvm.conf; then deactivate the volume and activate it again"
                        .to_owned(),
                );
            }
            Access::Unknown => {
                return refuse(
                    "is writable or read-only: lvm could not determine which".to_owned(),
                    format!("see 'lvs -o +lv_permissions {volume}'"),
                );
            }
        }
        if current.suspended {
            return refuse(
                "is suspended: a command of lvm stopped in the middle".to_owned(),
                format!("resume it: 'lvchange --refresh {volume}'"),
            );
        }
        if current.merging {
            return refuse(
                "has a merge in progress, or scheduled for its next activation".to_owned(),
                format!(
                    "shut down the programs that use it and complete the merge: 'lvchange -an {volume}', \
                     'lvchange -ay {volume}'"
                ),
            );
        }
        if current.locked {
            return refuse(
                "is being moved or converted (pvmove)".to_owned(),
                "wait until that has ended ('lvs -a' shows how far it is), or stop it: 'pvmove --abort'"
                    .to_owned(),
            );
        }
        require_health(volume, current)?;
        if let Some(pool) = self.group.pool_of(current) {
            require_health(&volume.beside(pool.name.as_str()), pool)?;
        }
        volume.require_room_for_names()
    }

    /// Returns the bytes of the group that other disks of this operation use.
    fn reserved_by_others(&self) -> u64 {
        let others =
            |(volume, _): &(&Volume, &u64)| **volume != *self.volume && volume.group == self.volume.group;
        self.reserved.iter().filter(others).map(|(_, bytes)| *bytes).sum()
    }

    /// Returns the bytes of the group that are available.
    fn free(&self) -> u64 {
        self.group.free.saturating_sub(self.reserved_by_others())
    }

    /// Returns the area of a thick snapshot; `None` for a thin one. Fails if there is not enough space.
    fn area(&mut self, wanted: u64, what: &str) -> Result<Option<u64>> {
        if self.current.kind == VolumeKind::Thin {
            self.require_room_in_pool()?;
            return Ok(None);
        }
        let (free, others) = (self.free(), self.reserved_by_others());
        if wanted > free {
            let also = match others {
                0 => String::new(),
                others => format!(" (other disks of this operation take {})", shown_size(others)),
            };
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{}: {what} needs {} in group {}, and {} is free{also}",
                    self.volume,
                    shown_size(wanted),
                    self.volume.group,
                    shown_size(free)
                ),
            )
            .state("no changes made")
            .advise(format!(
                "add a disk with 'vgextend {}', delete snapshots, or give points smaller areas with --lvm-area",
                self.volume.group
            )));
        }
        self.takes = self.takes.saturating_add(wanted);
        Ok(Some(wanted))
    }

    fn require_room_in_pool(&self) -> Result<()> {
        let full = self.group.pool_of(self.current).and_then(|pool| pool_full(self.group, pool, self.rules));
        match full {
            Some(message) => Err(Error::new(ErrorKind::Refused, format!("{}: {message}", self.volume))
                .state("no changes made")),
            None => Ok(()),
        }
    }

    /// Refuses a merge that would overflow another snapshot. A merge writes to the volume, and the
    /// overwritten data goes into every other snapshot that does not have it, whatever created it.
    fn require_room_beside(&self, merged: &Row) -> Result<()> {
        for row in self.group.snapshots(self.volume) {
            // An earlier snapshot has each chunk that was overwritten since the merged one was taken. It
            // lacks what was written to the merged one itself, and the rest of chunks larger than its own.
            let is_at_most = |chunk: u64| merged.chunk.is_some_and(|merged| merged <= chunk);
            let has_it = row.time < merged.time
                && merged.access == Access::ReadOnly
                && row.chunk.is_some_and(is_at_most);
            let is_concerned = row.name != merged.name && !row.invalid && !has_it;
            let free = row.size.saturating_sub(row.used());
            // A small chunk that the merge writes takes a whole chunk of its own in the other area.
            let chunks = |row: &Row| row.chunk.unwrap_or_default();
            let times = chunks(row).checked_div(chunks(merged)).unwrap_or(1).max(1);
            let needed = merged.used().saturating_mul(times).min(row.visible_size());
            if is_concerned && needed > free && !row.has_room_for_all() {
                // lvm accepts whole extents.
                let more = self.rules.cow_for(needed, self.group.extent);
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!(
                        "{}/{} would overflow: the merge of {} writes up to {}, and its area has {} left of {}",
                        self.volume.group,
                        row.name,
                        merged.name,
                        shown_size(needed),
                        shown_size(free),
                        shown_size(row.size)
                    ),
                )
                .state("no changes made")
                .advise(format!(
                    "give it more room: 'lvextend -L+{more}b {}/{}'; or delete that snapshot",
                    self.volume.group, row.name
                )));
            }
        }
        Ok(())
    }

    fn warn_of_areas(&mut self, but: &[LayerName]) {
        let target = &self.record.disk.target;
        let warnings = self.group.snapshots(self.volume).filter(|row| !but.contains(&row.layer()));
        let notes: Vec<String> = warnings
            .filter_map(|row| area_warning(self.volume, row))
            .map(|(_, message)| format!("{target}: {message}"))
            .collect();
        self.plan.notes.extend(notes);
    }
}
