//! The steps of an operation on a raw disk.

use std::os::unix::fs::MetadataExt;

use backend_qcow2::freeze_under;
use camino::Utf8Path;
use image_files::clones::{CloneFiles, check_places, clone_plan, require_room};
use image_files::layer_name::{is_layer_name, layer_name, layer_path};
use image_files::names::{self, io_error};
use snapcore::backend::{CloneDisk, ClonePlan, DiskPlan, DiskRequest, DiskState, InstantPlan, Layer};
use snapcore::hypervisor::DiskInstant;
use snapcore::{
    ActivePath, DiskPoint, DiskRecord, Edit, Error, ErrorKind, Group, LayerName, Point, PointKind, Result,
    Step, shown_size,
};

use crate::copy::is_reserved;
use crate::layers::is_device;
use crate::place::can_reflink;
use crate::state::Sort;
use crate::steps::{CopyMethod, RawStep};

/// The methods that a user may request.
pub(crate) const METHODS: [&str; 3] = ["reflink", "copy", "overlay"];

/// Plans the steps of `request`.
pub(crate) fn plan(
    sort: Sort,
    record: &DiskRecord,
    state: &DiskState,
    active_path: ActivePath,
    request: &DiskRequest,
) -> Result<DiskPlan<RawStep>> {
    let mut planner = Planner { sort, record, state, active_path, plan: DiskPlan::default() };
    match request {
        DiskRequest::Create { kind, method, overlay, stamp, .. } => {
            planner.create(*kind, method.as_deref(), overlay.as_ref(), *stamp)?;
        }
        DiskRequest::Revert { to, save, stamp, .. } => planner.revert(to, save.is_some(), *stamp)?,
        DiskRequest::Delete { drop, keep, .. } => planner.delete(drop.is_empty(), keep)?,
        other => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("a raw disk cannot do what was asked: {other:?}"),
            ));
        }
    }
    Ok(planner.plan)
}

/// Plans clones of a point: files that share its blocks, or copies.
pub(crate) fn clones(
    sort: Sort,
    record: &DiskRecord,
    state: &DiskState,
    request: &CloneDisk,
) -> Result<ClonePlan<RawStep>> {
    let (target, layer) = (&record.disk.target, &request.point.layer);
    let Some(point) = state.layer(layer).filter(|_| request.point.tag.is_none() && *layer != state.active)
    else {
        let file = layer_path(record.disk.path(), layer);
        return Err(Error::new(ErrorKind::NotFound, format!("{target}: {file} does not exist"))
            .state("no changes made")
            .advise("bring the file back, or delete the snapshot"));
    };
    check_places(&request.clones, record.disk.path())?;
    let shares = match request.clones.first() {
        Some(place) if !request.full && sort == Sort::Disk => {
            let device = |path: &Utf8Path| std::fs::metadata(path).map(|about| about.dev()).ok();
            let above = place.directory.parent();
            above.and_then(device) == device(point.path()) && can_reflink(&place.directory)?
        }
        _ => false,
    };
    let (method, bytes) = match shares {
        true => (CopyMethod::Reflink, 0),
        false => (CopyMethod::Copy, point.allocated),
    };
    // What the disk has reserved, a clone has too.
    let reserve = is_reserved(point.path());
    require_room(target, &request.clones, if reserve { point.virtual_size.max(bytes) } else { bytes })?;
    // A layer of a raw disk has no name besides the disk's.
    let request = request.clone().active_path(ActivePath::New);
    let make = |files: CloneFiles| {
        let what = match method {
            CopyMethod::Reflink => format!("make {} as a reflink of {layer}", files.image),
            CopyMethod::Copy => format!("copy {layer} into {}", files.image),
        };
        (RawStep::Clone { files, from: layer.clone(), method, reserve, point: None }, what)
    };
    let publish = |places| RawStep::PublishClones { places };
    let mut made = clone_plan(record, &request, &[], bytes, make, publish)?;
    if sort != Sort::Disk {
        finish_state_clones(sort, record, point, &request, &mut made)?;
    } else if bytes > 0 && !request.full {
        made.plan.notes.push(format!(
            "{target}: the file system shares no blocks between files there: {} are copied for each clone",
            shown_size(bytes)
        ));
    }
    Ok(made)
}

/// Completes the clones of a file of a machine's state. A TPM finds its file by its name. Where the clone is
/// to keep the point, the machine's memory comes with it: it has a copy of its own, as of every point.
fn finish_state_clones(
    sort: Sort,
    source: &DiskRecord,
    point: &Layer,
    request: &CloneDisk,
    made: &mut ClonePlan<RawStep>,
) -> Result<()> {
    let mut kept = Vec::new();
    for (step, record) in made.plan.prepare.iter_mut().zip(&mut made.disks) {
        let RawStep::Clone { files, point: keeps, .. } = &mut step.action else { continue };
        if sort == Sort::Tpm {
            files.image = source.disk.path().file_name().unwrap_or_default().to_owned();
            record.disk.address = files.place.directory.join(&files.image).into();
            record.active = LayerName(files.image.clone());
            record.owned = vec![record.active.clone()];
        }
        if request.keep.is_some() {
            let name = layer_name(record.disk.path(), request.stamp);
            record.owned.push(name.clone());
            let target = record.disk.target.clone();
            kept.push(DiskPoint::new(target, Point::external(name.clone()), point.virtual_size));
            *keeps = Some(name);
        }
    }
    made.points = kept;
    Ok(())
}

struct Planner<'a> {
    sort: Sort,
    record: &'a DiskRecord,
    state: &'a DiskState,
    active_path: ActivePath,
    plan: DiskPlan<RawStep>,
}

impl Planner<'_> {
    fn path(&self) -> &Utf8Path {
        self.record.disk.path()
    }

    fn active(&self) -> Result<&Layer> {
        self.state.layer(&self.state.active).ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!("{}: the disk has no active layer", self.record.disk.target),
            )
        })
    }

    fn create(
        &mut self,
        kind: Option<PointKind>,
        method: Option<&str>,
        chosen: Option<&LayerName>,
        stamp: u32,
    ) -> Result<()> {
        let target = &self.record.disk.target;
        if kind == Some(PointKind::Internal) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{target}: {} has no internal snapshots", self.sort.what()),
            )
            .advise("leave --internal out"));
        }
        if self.sort != Sort::Disk {
            return self.copy(CopyMethod::Copy, chosen, stamp);
        }
        let is_device = is_device(self.path());
        let method = match method {
            None | Some("overlay") if is_device => return self.overlay(chosen, stamp),
            Some("reflink" | "copy") if is_device => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "{target}: {} is a device, and nothing can be put beside it or in its place",
                        self.path()
                    ),
                )
                .advise(self.overlay_advice()));
            }
            Some("reflink") if !can_reflink(self.path())? => {
                return Err(self.shares_no_blocks("leave the method to domsnap"));
            }
            Some("reflink") => CopyMethod::Reflink,
            Some("copy") => CopyMethod::Copy,
            Some("overlay") => return self.overlay(chosen, stamp),
            Some(other) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{target}: format raw has no method '{other}'"),
                )
                .advise(format!("its methods are: {}", METHODS.join(", "))));
            }
            None if can_reflink(self.path())? => CopyMethod::Reflink,
            None if self.active_path == ActivePath::New => return self.overlay(chosen, stamp),
            None => return Err(self.shares_no_blocks("keep it on btrfs or xfs")),
        };
        self.copy(method, chosen, stamp)
    }

    /// Makes the point a file of its own.
    fn copy(&mut self, method: CopyMethod, chosen: Option<&LayerName>, stamp: u32) -> Result<()> {
        let target = &self.record.disk.target;
        // It may be another file than the one that was registered.
        self.sort.check_size(self.path(), self.active()?.virtual_size)?;
        if method == CopyMethod::Copy {
            self.require_room(self.active()?.allocated)?;
        }
        let layer = self.new_layer(chosen, stamp)?;
        let live = self.state.attached;
        let bytes = if method == CopyMethod::Copy { self.active()?.allocated } else { 0 };
        if live {
            self.push(Group::Prepare, &RawStep::WriteOut, format!("write {} out", self.path()), 0);
            if method == CopyMethod::Copy && self.sort == Sort::Disk {
                self.plan.notes.push(format!(
                    "{target}: the guest is paused while {} are copied, as requested",
                    shown_size(bytes)
                ));
            }
        }
        let message = match method {
            CopyMethod::Reflink => format!("create {layer} as a reflink of {}", self.path()),
            CopyMethod::Copy => format!("copy {} into {layer}", self.path()),
        };
        let reserve = is_reserved(self.path());
        let copy = RawStep::Copy { from: None, layer: layer.clone(), method, published_later: live, reserve };
        let copy = self.step(&copy, message, bytes);
        if !live {
            self.plan.cut.push(copy);
        } else {
            let (take, nested) = (DiskInstant::ByBackend, vec![copy]);
            self.plan.instant = Some(InstantPlan::new(take, nested));
            let publish = RawStep::Publish { layer: layer.clone() };
            self.push(Group::Cut, &publish, format!("flush and publish {layer}"), 0);
        }
        self.add_layer(&layer);
        self.plan.point = Some(Point::external(layer));
        Ok(())
    }

    fn shares_no_blocks(&self, instead: &str) -> Error {
        let target = &self.record.disk.target;
        let allocated = self.active().map_or(0, |active| active.allocated);
        Error::new(
            ErrorKind::Refused,
            format!(
                "{target}: cannot snapshot {} instantly: its file system has no reflinks",
                self.path()
            ),
        )
        .state("no changes made")
        .advise(format!(
            "take it with --disk {target}=copy ({} to copy), leave it out with --disk {target}=skip, {instead}, or register \
             the domain with --active-path=new for a qcow2 overlay on it",
            shown_size(allocated)
        ))
    }

    /// Refuses a copy without enough space, before anything is begun.
    fn require_room(&self, bytes: u64) -> Result<()> {
        let directory = self.path().parent().unwrap_or(Utf8Path::new("."));
        let room = rustix::fs::statvfs(directory.as_std_path()).map_err(|errno| {
            io_error(errno.into(), format!("cannot ask how much room there is in {directory}"))
        })?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        if free >= bytes {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "{}: a copy needs {}, and {directory} has room for {}",
                self.record.disk.target,
                shown_size(bytes),
                shown_size(free)
            ),
        )
        .state("no changes made")
        .advise("delete snapshots or free space there, and try again"))
    }

    /// Advice on overlays for a device.
    fn overlay_advice(&self) -> String {
        let target = &self.record.disk.target;
        let register = match self.active_path {
            ActivePath::New => "",
            ActivePath::Keep => "register the domain with --active-path=new, and ",
        };
        format!(
            "{register}say where a qcow2 overlay on the device is to be: --disk \
             {target}=external,path=/DIRECTORY/{target}.qcow2; or make it a logical volume, which has snapshots (format lvm)"
        )
    }

    /// Freezes the raw file or device under a qcow2 overlay, which the domain's configuration must name from
    /// then on.
    fn overlay(&mut self, chosen: Option<&LayerName>, stamp: u32) -> Result<()> {
        let target = self.record.disk.target.clone();
        let is_device = is_device(self.path());
        if self.active_path == ActivePath::Keep {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{target}: {} is configured as raw, and must never come to name a qcow2 overlay: whoever opens that as \
                     raw destroys it",
                    self.path()
                ),
            )
            .state("no changes made")
            .advise(match is_device {
                true => self.overlay_advice(),
                false => format!(
                    "register the domain with --active-path=new: then the overlay gets a path of its own, which its \
                     configuration must name, with format qcow2; or take the disk with --disk {target}=copy"
                ),
            }));
        }
        self.refuse_raw_points()?;
        // QEMU's `luks` driver is visible in a running domain. At rest a LUKS header may also be the guest's
        // own.
        if !self.state.attached && image_files::is_luks(self.path()).unwrap_or(false) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{target}: {} begins as a LUKS volume: if QEMU encrypts this disk (driver luks), an overlay would hold what \
                     the guest writes from then on in the clear",
                    self.path()
                ),
            )
            .state("no changes made")
            .advise(format!(
                "take it with --disk {target}=copy or {target}=reflink; or, if the guest encrypts its disk by itself, take it \
                 while the domain runs"
            )));
        }
        let layer = match chosen {
            Some(file) if is_device => self.beside_no_device(file)?,
            None if is_device => {
                let detail = format!("{target}: beside the device {} is no room for an overlay", self.path());
                return Err(Error::new(ErrorKind::Refused, detail)
                    .state("no changes made")
                    .advise(self.overlay_advice()));
            }
            Some(_) => self.new_layer(chosen, stamp)?,
            None => {
                let named = layer_name(&self.path().with_extension("qcow2"), stamp);
                self.new_layer(Some(&named), stamp)?
            }
        };
        let size = self.active()?.virtual_size;
        if !size.is_multiple_of(512) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{target}: {} is {size} bytes long, which no qcow2 overlay can be", self.path()),
            )
            .advise("a disk's size is a multiple of 512 bytes; or take it with =copy"));
        }
        if !is_device && is_reserved(self.path()) {
            self.plan.notes.push(format!(
                "{target}: {} is allocated in full; the new overlay is not, and grows as the guest writes",
                self.path()
            ));
        }
        let step = RawStep::CreateOverlay { layer: layer.clone(), virtual_size: size };
        self.push(Group::Prepare, &step, format!("make the qcow2 overlay {layer} on {}", self.path()), 0);
        // Names of layers are relative to the disk's path, which moves away from a device's directory.
        let base = match is_device {
            true => LayerName(self.path().to_string()),
            false => self.record.active.clone(),
        };
        freeze_under(&mut self.plan, self.record, self.state, &layer, base, is_device);
        Ok(())
    }

    /// Refuses an overlay if the disk has raw points. Under an overlay the disk is qcow2, and its layers are
    /// read as qcow2. A copy of a raw disk must never be: its guest controls the content.
    fn refuse_raw_points(&self) -> Result<()> {
        let record = self.record;
        let points: Vec<&str> =
            record.owned.iter().filter(|layer| **layer != record.active).map(LayerName::as_str).collect();
        if points.is_empty() {
            return Ok(());
        }
        let target = &record.disk.target;
        Err(Error::new(
            ErrorKind::Refused,
            format!("{target}: it has points that are raw files ({}), which no overlay can go with", points.join(", ")),
        )
        .state("no changes made")
        .advise(format!(
            "delete the snapshots that they are of first, or take this one with --disk {target}=copy or {target}=reflink"
        )))
    }

    /// Returns the name of a new overlay on a device: a path elsewhere.
    fn beside_no_device(&self, file: &LayerName) -> Result<LayerName> {
        let path = Utf8Path::new(file.as_str());
        let target = &self.record.disk.target;
        let directory = path.parent().filter(|parent| parent.is_dir() && path.is_absolute());
        if directory.is_none_or(|directory| Some(directory) == self.path().parent()) {
            let detail = format!("{target}: {path} is no path in a directory where an overlay could be");
            return Err(Error::new(ErrorKind::Refused, detail)
                .state("no changes made")
                .advise("give an absolute path, in a directory that exists"));
        }
        names::require_writable_directory_of(path)?;
        self.free(path)?;
        Ok(file.clone())
    }

    fn revert(&mut self, to: &Point, save: bool, stamp: u32) -> Result<()> {
        let target = self.record.disk.target.clone();
        let Some(point) = self.state.layer(&to.layer).filter(|_| to.tag.is_none()) else {
            let file = layer_path(self.path(), &to.layer);
            return Err(Error::new(ErrorKind::NotFound, format!("{target}: {file} does not exist"))
                .state("no changes made")
                .advise("bring the file back, or delete the snapshot"));
        };
        self.refuse_undetermined()?;
        if let Some(overlay) = self.active()?.dependents.first() {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{target}: {overlay} is backed by {}, and a revert would change what it shows",
                    self.path()
                ),
            )
            .state("no changes made")
            .advise("take a snapshot first and rebase the image onto the file that it makes, or remove it"));
        }
        self.sort.check_size(point.path(), point.virtual_size)?;
        let shares = self.sort == Sort::Disk && can_reflink(self.path())?;
        let method = if shares { CopyMethod::Reflink } else { CopyMethod::Copy };
        let new = self.new_layer(None, stamp)?;
        let previous = self.new_layer(None, stamp.wrapping_add(1))?;
        let bytes = if method == CopyMethod::Copy { point.allocated } else { 0 };
        let size = point.virtual_size;
        self.require_room(bytes)?;
        // The disk keeps its reserved space, if the point or the current image has it reserved.
        let wanted = is_reserved(self.path()) || is_reserved(point.path());
        let reserve = wanted && self.require_room(size).is_ok();
        if wanted && !reserve {
            self.plan.notes.push(format!(
                "{target}: {} was allocated in full and is sparse after this, because there is no room for {}; `fallocate -l \
                 {size} {}` reserves it",
                self.path(),
                shown_size(size),
                self.path()
            ));
        }
        let message = match method {
            CopyMethod::Reflink => format!("create {new} as a reflink of {}", to.layer),
            CopyMethod::Copy => format!("copy {} into {new}", to.layer),
        };
        let copy = RawStep::Copy {
            from: Some(to.layer.clone()),
            layer: new.clone(),
            method,
            published_later: false,
            reserve,
        };
        self.push(Group::Prepare, &copy, message, bytes);
        let name = RawStep::Name { layer: previous.clone() };
        self.push(Group::Prepare, &name, format!("give {} the name {previous} too", self.path()), 0);
        let switch = RawStep::Switch { from: previous.clone(), to: new.clone() };
        self.push(Group::Cut, &switch, format!("switch {} to {new}", self.path()), 0);
        let unname = RawStep::Unname { layer: new.clone() };
        self.push(Group::Finish, &unname, format!("remove the name {new}: {} is left", self.path()), 0);
        // The catalogue knows both until they are removed, so that a deferred step can be planned again.
        self.known_until_done(&new);
        if save {
            self.add_layer(&previous);
            self.plan.point = Some(Point::external(previous));
        } else {
            let remove = RawStep::Remove { layers: vec![previous.clone()] };
            self.push(Group::Finish, &remove, format!("remove {previous}: nothing needs it"), 0);
            self.known_until_done(&previous);
        }
        let links = std::fs::metadata(self.path())
            .map_err(|error| io_error(error, format!("cannot look at {}", self.path())))?
            .nlink();
        if links > 1 {
            self.plan.notes.push(format!(
                "{target}: {} has other names (hard links), which go on to name what it is now",
                self.path()
            ));
        }
        Ok(())
    }

    /// Adds a file to the disk's layers at the commit point, and removes it when the step that was planned
    /// last is done.
    fn known_until_done(&mut self, layer: &LayerName) {
        self.add_layer(layer);
        let target = self.record.disk.target.clone();
        if let Some(planned) = self.plan.finish.last_mut() {
            planned.edits.push(Edit::RemoveLayer { target, layer: layer.clone() });
        }
    }

    fn delete(&mut self, tidying: bool, keep: &[Point]) -> Result<()> {
        let mut gone = Vec::new();
        for layer in &self.state.layers {
            // A second name of the current state, which a revert could not remove.
            if layer.name != self.state.active
                && layer.owned
                && !keep.contains(&Point::external(layer.name.clone()))
                && names::same_file(layer.path(), self.path())?
            {
                let unname = RawStep::Unname { layer: layer.name.clone() };
                let message = format!("remove the name {}: {} is left", layer.name, self.path());
                self.push(Group::Finish, &unname, message, 0);
                if let Some(planned) = self.plan.finish.last_mut() {
                    let target = self.record.disk.target.clone();
                    planned.edits.push(Edit::RemoveLayer { target, layer: layer.name.clone() });
                }
                continue;
            }
            let needed = layer.name == self.state.active
                || !layer.owned
                || keep.contains(&Point::external(layer.name.clone()));
            if needed {
                continue;
            }
            let target = &self.record.disk.target;
            if let Some(overlay) = layer.dependents.first() {
                self.plan.notes.push(format!(
                    "{target}: {} ({}) is kept: {overlay} is backed by it",
                    layer.address,
                    shown_size(layer.allocated)
                ));
            } else if is_layer_name(self.path(), layer.name.as_str()) {
                gone.push(layer.name.clone());
            } else {
                let edit = Edit::RemoveLayer { target: target.clone(), layer: layer.name.clone() };
                self.plan.commit.push(edit);
                self.plan.notes.push(format!(
                    "{target}: this disk does not need {} any more; the file stays, because its name is not one of domsnap's: \
                     remove it if nothing else needs it",
                    layer.address
                ));
            }
        }
        // A layer that another program removed is forgotten, and its checksum is removed.
        let lost = self.record.owned.iter().filter(|name| {
            let needed = **name == self.state.active || keep.contains(&Point::external((*name).clone()));
            !needed && self.state.layer(name).is_none() && is_layer_name(self.path(), name.as_str())
        });
        gone.extend(lost.cloned());
        if gone.is_empty() {
            return Ok(());
        }
        match self.refuse_undetermined() {
            Ok(()) => {}
            Err(error) if tidying => {
                self.plan.notes.push(format!("nothing was removed: {error}"));
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        let names = gone.iter().map(LayerName::as_str).collect::<Vec<_>>().join(", ");
        self.push(Group::Finish, &RawStep::Remove { layers: gone.clone() }, format!("remove {names}"), 0);
        if let Some(planned) = self.plan.finish.last_mut() {
            let target = &self.record.disk.target;
            let edit = |layer| Edit::RemoveLayer { target: target.clone(), layer };
            planned.edits.extend(gone.into_iter().map(edit));
        }
        Ok(())
    }

    /// Refuses to remove any point while the backing file of an image is undetermined: it could be a point.
    fn refuse_undetermined(&self) -> Result<()> {
        let Some(undetermined) = self.state.undetermined.first() else { return Ok(()) };
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{}: {} may depend on {} or one of its snapshots: {}",
                self.record.disk.target,
                undetermined.file,
                self.path(),
                undetermined.why
            ),
        )
        .state("no changes made")
        .advise(
            "make the file readable, or move it to another directory if it has nothing to do with this disk",
        ))
    }

    /// Returns the name of a new file beside the disk: the chosen one, or one of ours.
    fn new_layer(&self, chosen: Option<&LayerName>, stamp: u32) -> Result<LayerName> {
        let name = chosen.cloned().unwrap_or_else(|| layer_name(self.path(), stamp));
        if name.as_str().contains('/') {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{}: a point must be in the directory of {}", self.record.disk.target, self.path()),
            )
            .advise("give a file name without a directory"));
        }
        self.free(&layer_path(self.path(), &name))?;
        Ok(name)
    }

    /// Refuses the name of an existing file.
    fn free(&self, file: &Utf8Path) -> Result<()> {
        match names::file_id(file)? {
            Some(_) => {
                Err(Error::new(ErrorKind::Exists, format!("{file} exists, and nothing is written over it"))
                    .advise("choose another name"))
            }
            None => Ok(()),
        }
    }

    fn add_layer(&mut self, layer: &LayerName) {
        self.plan
            .commit
            .push(Edit::AddLayer { target: self.record.disk.target.clone(), layer: layer.clone() });
    }

    fn push(&mut self, group: Group, step: &RawStep, summary: String, bytes: u64) {
        self.plan.push(group, self.step(step, summary, bytes));
    }

    fn step(&self, action: &RawStep, summary: String, bytes: u64) -> Step<RawStep> {
        Step::new(self.record.disk.target.clone(), action.clone(), summary).bytes(bytes)
    }
}
