//! Which steps an operation takes on a disk that is a chain of files: qcow2, VHD, overlays over raw.
//!
//! Everything here is a function of the disk's layers, of the points that the catalogue wants kept, and of the
//! request. A backend calls [`plan`] and carries [`ChainStep`]s out; what a layer is needed for is computed anew each
//! time from the layers that exist, so that a layer which somebody else stands on is never merged or removed.

use std::collections::HashSet;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

mod neighbours;

pub use neighbours::rebase;

use crate::{
    ActivePath, Capabilities, DiskInstant, DiskPlan, DiskRecord, DiskRequest, DiskState, Edit, Error,
    ErrorKind, FileUses, Group, Layer, LayerName, PlannedStep, Point, PointKind, Result, SnapshotName, Step,
    Target, shown_size,
};

/// What is done to a chain of files, one typed action a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum ChainStep {
    /// Gives the layer that the configured path names a file of its permanent name too (a hard link).
    NameLayer {
        /// The layer.
        layer: LayerName,
    },
    /// Makes an empty overlay under its permanent name.
    CreateOverlay {
        /// The new layer.
        layer: LayerName,
        /// What it stands on.
        on: LayerName,
        /// The format of that.
        on_format: String,
        /// Its size, in bytes.
        virtual_size: u64,
    },
    /// Copies an internal snapshot out into a new layer that stands on what the snapshot's layer stands on.
    Materialise {
        /// The layer that holds the snapshot.
        from: LayerName,
        /// The snapshot's tag.
        tag: String,
        /// The new layer.
        layer: LayerName,
    },
    /// Takes an internal snapshot of a layer's own state.
    TakeInternal {
        /// The layer.
        layer: LayerName,
        /// The tag that it gets.
        tag: String,
    },
    /// Moves the configured path from one layer to another.
    SwitchActive {
        /// The layer that it names.
        from: LayerName,
        /// The layer that it is to name.
        to: LayerName,
    },
    /// Makes a layer's own state that of an internal snapshot.
    ApplyInternal {
        /// The layer.
        layer: LayerName,
        /// The snapshot's tag.
        tag: String,
        /// An internal snapshot of the state before: what an undo applies.
        safety: Option<String>,
    },
    /// Deletes internal snapshots of a layer.
    DropInternal {
        /// The layer.
        layer: LayerName,
        /// Their tags.
        tags: Vec<String>,
    },
    /// Takes damaged internal snapshots of a layer out of its table, and leaves what they refer to in use.
    ForgetInternal {
        /// The layer.
        layer: LayerName,
        /// Their tags.
        tags: Vec<String>,
    },
    /// Makes one layer of a run show what the run's top shows, standing on what the run's bottom stands on.
    Merge {
        /// The run, bottom first.
        run: Vec<LayerName>,
        /// The layer of it that receives the others' data.
        into: LayerName,
        /// What it stands on afterwards.
        below: Option<LayerName>,
    },
    /// Makes a layer stand on another layer, which shows the same as the one before.
    Repoint {
        /// The layer whose backing changes.
        child: LayerName,
        /// What it stands on afterwards.
        to: LayerName,
    },
    /// Removes the files of layers, each before those that it stands on.
    Remove {
        /// The layers.
        layers: Vec<LayerName>,
    },
    /// Removes the permanent name of the last layer: the configured path alone is left.
    Unname {
        /// The layer.
        layer: LayerName,
    },
}

/// The least that any new file or table needs of a file system: its blocks are seldom smaller.
const BLOCK: u64 = 4096;

/// The bytes of an empty overlay of a disk of this size, at least: its header, its refcounts, and the table that has 8 bytes for each
/// 512 MiB of the disk.
pub fn room_of_overlay(virtual_size: u64) -> u64 {
    let table = virtual_size.div_ceil(512 << 20).saturating_mul(8);
    table.next_multiple_of(BLOCK).saturating_add(3 * BLOCK)
}

/// What a step of a chain does with files: for [`crate::DiskSnapshotter::uses`]. Nothing for a step that is none of a chain's.
pub fn uses(record: &DiskRecord, step: &Step) -> FileUses {
    let path = &record.disk.path;
    let file = |layer: &LayerName| {
        let own = layer_path(path, layer);
        if own.exists() || *layer != record.active { own } else { path.clone() }
    };
    let mut uses = FileUses::default();
    let Ok(step) = serde_json::from_value::<ChainStep>(step.action.clone()) else { return uses };
    match step {
        ChainStep::NameLayer { layer } => {
            uses.makes.push(layer_path(path, &layer));
            uses.links.push(file(&layer));
        }
        ChainStep::CreateOverlay { layer, virtual_size, .. } => {
            uses.makes.push(layer_path(path, &layer));
            uses.room = room_of_overlay(virtual_size);
        }
        ChainStep::Materialise { layer, .. } => {
            uses.makes.push(layer_path(path, &layer));
            uses.room = 3 * BLOCK;
        }
        ChainStep::SwitchActive { to, .. } => {
            uses.makes.push(path.clone());
            uses.renames.push(path.clone());
            uses.links.push(layer_path(path, &to));
        }
        ChainStep::TakeInternal { layer, .. }
        | ChainStep::ApplyInternal { layer, .. }
        | ChainStep::DropInternal { layer, .. }
        | ChainStep::ForgetInternal { layer, .. } => uses.writes.push(file(&layer)),
        ChainStep::Merge { into, .. } => uses.writes.push(file(&into)),
        ChainStep::Repoint { child, .. } => uses.writes.push(file(&child)),
        ChainStep::Remove { layers } => uses.renames.extend(layers.iter().map(file)),
        ChainStep::Unname { layer } => uses.renames.push(file(&layer)),
    }
    uses
}

/// The permanent name for a layer of the disk at `path`: `<stem>.ds-<8 hex>.<extension>`.
pub fn layer_name(path: &Utf8Path, stamp: u32) -> LayerName {
    let stem = unmarked_stem(path);
    LayerName(match path.extension() {
        Some(extension) => format!("{stem}.ds-{stamp:08x}.{extension}"),
        None => format!("{stem}.ds-{stamp:08x}"),
    })
}

/// Whether `name` is one that [`layer_name`] gives to layers of the disk at `path`. A layer with another name got it from
/// its user or from another tool, who may use the file for something else too: it is never removed.
pub fn is_layer_name(path: &Utf8Path, name: &str) -> bool {
    let stamp = name.rsplit_once(".ds-").and_then(|(_, rest)| rest.get(..8));
    stamp
        .and_then(|stamp| u32::from_str_radix(stamp, 16).ok())
        .is_some_and(|stamp| layer_name(path, stamp).as_str() == name)
}

/// The file name of the disk at `path` without the mark of a layer: the same for all its layers, also where the
/// configured path itself is one ([`ActivePath::New`]).
pub fn disk_name(path: &Utf8Path) -> String {
    match path.extension() {
        Some(extension) => format!("{}.{extension}", unmarked_stem(path)),
        None => unmarked_stem(path).to_owned(),
    }
}

fn unmarked_stem(path: &Utf8Path) -> &str {
    let stem = path.file_stem().unwrap_or("disk");
    match stem.rsplit_once(".ds-") {
        Some((before, mark)) if mark.len() == 8 && mark.bytes().all(|b| b.is_ascii_hexdigit()) => before,
        _ => stem,
    }
}

/// What the user is told of an overlay that a recovery keeps as `aside`: the guest wrote to it from the instant of a create on, the
/// create did not happen, and the disk goes on as its base.
pub fn words_of_kept_overlay(target: &Target, file: &Utf8Path, aside: &Utf8Path, base: &Utf8Path) -> String {
    format!(
        "{target}: the domain wrote into {file}, the overlay of a snapshot that was not taken; what it wrote is kept as {aside}, on {base}: \
         where the domain should go on with that, do not start it on {base}, which would spoil the overlay, but make its configuration \
         name the overlay, with format qcow2; else remove the overlay"
    )
}

/// Where the file of a layer's permanent name is: beside the configured path, unless the name is absolute.
pub fn layer_path(disk_path: &Utf8Path, layer: &LayerName) -> Utf8PathBuf {
    match disk_path.parent() {
        Some(directory) => directory.join(layer.as_str()),
        None => Utf8PathBuf::from(layer.as_str()),
    }
}

/// How many bytes of each layer of a run (bottom first) are visible at its top.
pub type VisibleBytes<'a> = dyn FnMut(&[LayerName]) -> Result<Vec<u64>> + Send + 'a;

/// The steps that fulfil `request` on a chain of files.
///
/// `visible` is asked before a merge, to find the direction that moves least.
///
/// # Errors
/// [`ErrorKind::Refused`], [`ErrorKind::Unsupported`], [`ErrorKind::NotFound`] or [`ErrorKind::Exists`], with what to do.
pub fn plan(
    record: &DiskRecord,
    state: &DiskState,
    active_path: ActivePath,
    capabilities: &Capabilities,
    request: &DiskRequest,
    visible: &mut VisibleBytes<'_>,
) -> Result<DiskPlan> {
    let mut planner = Planner {
        record,
        target: record.disk.target.clone(),
        active_path,
        capabilities,
        open: match state.attached {
            true => state.chain(&state.active).iter().map(|layer| layer.name.clone()).collect(),
            false => HashSet::new(),
        },
        layers: state.layers.clone(),
        active: state.active.clone(),
        plan: DiskPlan::default(),
    };
    match request {
        DiskRequest::Create { kind, way: _, name, overlay, keep: _, stamp } => {
            planner.create(kind.unwrap_or(capabilities.preferred), name, overlay.as_ref(), *stamp)?;
        }
        DiskRequest::Revert { to, save, keep, undoable, stamp } => {
            neighbours::allow_revert(record, state, active_path)?;
            planner.revert(to, save.as_ref(), keep, *undoable, *stamp)?;
        }
        DiskRequest::Delete { drop, keep, .. } => {
            planner.delete(drop, keep, visible)?;
            neighbours::allow_merges(record, state, drop.is_empty(), &mut planner.plan)?;
        }
    }
    planner.plan.steps.sort_by_key(|planned| planned.group);
    Ok(planner.plan)
}

/// Some layers in words: by name, as long as they are few.
fn enumeration(layers: &[&LayerName]) -> String {
    match layers {
        [first, .., last] if layers.len() > 4 => format!("{} layers ({first} to {last})", layers.len()),
        few => few.iter().map(|layer| layer.as_str()).collect::<Vec<_>>().join(", "),
    }
}

struct Planner<'a> {
    record: &'a DiskRecord,
    target: Target,
    active_path: ActivePath,
    capabilities: &'a Capabilities,
    /// The layers that a hypervisor has open: the active chain of an attached disk.
    open: HashSet<LayerName>,
    /// The layers as they will be after the steps planned so far.
    layers: Vec<Layer>,
    active: LayerName,
    plan: DiskPlan,
}

impl Planner<'_> {
    fn create(
        &mut self,
        kind: PointKind,
        name: &SnapshotName,
        overlay: Option<&LayerName>,
        stamp: u32,
    ) -> Result<()> {
        let active = self.active.clone();
        match kind {
            PointKind::Internal => {
                self.free_tag(&active, name)?;
                match self.is_attached() {
                    true => {
                        self.plan.instant = Some(DiskInstant::Internal { tag: name.as_str().to_owned() });
                    }
                    false => self.take_internal(Group::Cut, &active, name.as_str()),
                }
                self.plan.point = Some(Point::internal(active, name.as_str()));
            }
            PointKind::External => {
                let new = match overlay {
                    Some(chosen) => chosen.clone(),
                    None => layer_name(&self.record.disk.path, stamp),
                };
                self.name_active();
                self.overlay(&new, &active)?;
                self.switch(Group::Cut, &new);
                if self.is_attached() {
                    self.plan.instant = Some(DiskInstant::Overlay {
                        file: layer_path(&self.record.disk.path, &new),
                        format: self.record.disk.format.clone(),
                    });
                    self.switch_runs_inside();
                }
                self.plan.point = Some(Point::external(active));
            }
        }
        Ok(())
    }

    fn revert(
        &mut self,
        to: &Point,
        save: Option<&SnapshotName>,
        keep: &[Point],
        undoable: bool,
        stamp: u32,
    ) -> Result<()> {
        let active = self.active.clone();
        let holder = self.existing(&to.layer)?.clone();
        let new = layer_name(&self.record.disk.path, stamp);
        let Some(tag) = &to.tag else {
            self.name_active();
            self.overlay(&new, &to.layer)?;
            self.leave(&new, save, keep);
            return Ok(());
        };
        let Some(found) = holder.internal.iter().find(|internal| internal.tag == *tag) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("image {} has no internal snapshot {tag}", holder.file),
            )
            .advise("another tool removed it; delete the snapshot from the catalogue"));
        };
        let size = found.virtual_size;
        // Applying a tag changes the layer's own state: only where nobody needs that.
        let in_place = holder.owned
            && holder.dependents.is_empty()
            && (holder.name == active || self.made_here(&holder.name))
            && self.children(&holder.name).is_empty()
            && !keep.contains(&Point::external(holder.name.clone()));
        if in_place && holder.name == active {
            // What changes an image that a hypervisor has open must wait for the window.
            let before = if self.is_attached() { Group::Cut } else { Group::Prepare };
            let safety = match save {
                Some(name) => {
                    self.free_tag(&active, name)?;
                    self.take_internal(before, &active, name.as_str());
                    self.plan.point = Some(Point::internal(active.clone(), name.as_str()));
                    Some(name.as_str().to_owned())
                }
                None if undoable => {
                    // Begins with a dot, so it can never be a snapshot's name.
                    let tag = format!(".domsnap-undo-{stamp:08x}");
                    self.take_internal(before, &active, &tag);
                    let drop = ChainStep::DropInternal { layer: active.clone(), tags: vec![tag.clone()] };
                    self.push(Group::Finish, drop, "drop the safety copy of the former state", 0);
                    Some(tag)
                }
                None => None,
            };
            self.plan.irrevocable = safety.is_none();
            self.apply_internal(Group::Cut, &active, tag, safety);
            return Ok(());
        }
        self.name_active();
        if in_place {
            // Nobody needs this layer's own state, so there is nothing that an undo would have to bring back.
            self.apply_internal(Group::Prepare, &holder.name, tag, None);
            self.leave(&holder.name, save, keep);
            return Ok(());
        }
        let bytes = holder.allocated.min(size);
        self.plan.notes.push(format!(
            "{}: other snapshots depend on {}; {tag} is copied to a new image (up to {})",
            self.target,
            holder.file,
            shown_size(bytes)
        ));
        let step = ChainStep::Materialise { from: holder.name.clone(), tag: tag.clone(), layer: new.clone() };
        self.push(Group::Prepare, step, &format!("copy {tag} out of {} into {new}", holder.name), bytes);
        self.plan.commit.push(Edit::AddLayer { target: self.target.clone(), layer: new.clone() });
        self.layers.push(Layer {
            name: new.clone(),
            file: layer_path(&self.record.disk.path, &new),
            format: self.record.disk.format.clone(),
            named: true,
            virtual_size: size,
            owned: true,
            allocated: bytes,
            internal: Vec::new(),
            dependents: Vec::new(),
            ..holder
        });
        self.leave(&new, save, keep);
        Ok(())
    }

    /// Switches from the active layer to `to`; the former one is kept as a point, or removed if nothing is in it.
    fn leave(&mut self, to: &LayerName, save: Option<&SnapshotName>, keep: &[Point]) {
        let former = self.active.clone();
        self.switch(Group::Cut, to);
        let mut keep = keep.to_vec();
        if save.is_some() {
            keep.push(Point::external(former.clone()));
            self.plan.point = Some(Point::external(former));
        }
        self.remove_unneeded(&keep);
    }

    fn delete(&mut self, drop: &[Point], keep: &[Point], visible: &mut VisibleBytes<'_>) -> Result<()> {
        self.forget_gone(keep);
        self.drop_tags(drop, keep);
        self.remove_unneeded(keep);
        self.empty_carriers(drop, keep);
        let keep = self.merge_runs(keep, visible)?;
        self.note_unnamed(&keep);
        self.unname_last(&keep);
        Ok(())
    }

    /// Forgets layers whose files are gone, and that nothing needs: those of a step that removed some of its
    /// files, or all, and failed then, so that the rest of it was deferred.
    fn forget_gone(&mut self, keep: &[Point]) {
        for layer in &self.record.owned {
            let is_there = self.layers.iter().any(|known| known.name == *layer);
            let is_needed = *layer == self.active || keep.iter().any(|point| point.layer == *layer);
            if !is_there && !is_needed {
                let edit = Edit::RemoveLayer { target: self.target.clone(), layer: layer.clone() };
                self.plan.commit.push(edit);
            }
        }
    }

    fn drop_tags(&mut self, drop: &[Point], keep: &[Point]) {
        for index in 0..self.layers.len() {
            let layer = &self.layers[index];
            let dropped = |tag: &str| {
                let point = Point::internal(layer.name.clone(), tag);
                drop.contains(&point) && !keep.contains(&point)
            };
            let tags: Vec<String> = layer
                .internal
                .iter()
                .map(|internal| internal.tag.clone())
                .filter(|tag| dropped(tag))
                .collect();
            if tags.is_empty() {
                continue;
            }
            let name = layer.name.clone();
            let words = format!("delete {} inside {name}", tags.join(", "));
            if name == self.active && self.is_attached() {
                self.plan.notes.push(format!(
                    "{}: the space of {} stays in {}, for what the guest writes next: QEMU gives it back to the file system \
                     where the disk has discard=unmap",
                    self.target,
                    tags.join(", "),
                    layer.file
                ));
            }
            self.layers[index].internal.retain(|internal| !tags.contains(&internal.tag));
            // A hypervisor can do it to what it writes, not to what it has open for reading alone.
            let window = name != self.active && self.open.contains(&name);
            self.push(Group::Finish, ChainStep::DropInternal { layer: name, tags }, &words, 0);
            if let Some(planned) = self.plan.steps.last_mut() {
                planned.window = window;
            }
        }
    }

    /// Whether anybody needs what `layer` itself shows.
    fn needed(&self, layer: &Layer, keep: &[Point]) -> bool {
        layer.name == self.active
            || !layer.owned
            // Whatever stood there before the first overlay: it is read, and never written or removed.
            || layer.format == "raw"
            || !layer.dependents.is_empty()
            || keep.contains(&Point::external(layer.name.clone()))
    }

    /// Whether the file of a layer bears a name that only domsnap gives.
    fn made_here(&self, layer: &LayerName) -> bool {
        is_layer_name(&self.record.disk.path, layer.as_str())
    }

    /// The file of a layer that this disk needs no more stays, because others may need it: so it, too, stands on what
    /// is `below` it.
    fn let_go(&mut self, file: &Utf8Path, below: Option<&LayerName>) {
        if let Some(below) = below.and_then(|name| self.layers.iter_mut().find(|layer| layer.name == *name)) {
            below.dependents.push(file.to_owned());
        }
        self.plan.notes.push(format!(
            "{}: this disk does not need {file} any more; the file stays, because its name is not one of domsnap's: remove \
             it if nothing else needs it",
            self.target
        ));
    }

    fn remove_unneeded(&mut self, keep: &[Point]) {
        let mut gone = Vec::new();
        while let Some(index) = self.layers.iter().position(|layer| {
            !self.needed(layer, keep) && layer.internal.is_empty() && self.children(&layer.name).is_empty()
        }) {
            let layer = self.layers.remove(index);
            if self.made_here(&layer.name) {
                gone.push(layer.name);
                continue;
            }
            self.plan
                .commit
                .push(Edit::RemoveLayer { target: self.target.clone(), layer: layer.name.clone() });
            self.let_go(&layer.file, layer.backing.as_ref());
        }
        self.remove(gone);
    }

    /// A layer that is kept only for the tags in it need not keep a state of its own: what a deleted point held is
    /// given back by making that state one of the tags'.
    fn empty_carriers(&mut self, drop: &[Point], keep: &[Point]) {
        let carriers: Vec<(LayerName, String)> = self
            .layers
            .iter()
            .filter(|layer| {
                drop.contains(&Point::external(layer.name.clone())) && self.made_here(&layer.name)
            })
            .filter(|layer| !self.needed(layer, keep) && self.children(&layer.name).is_empty())
            .filter_map(|layer| Some((layer.name.clone(), layer.internal.last()?.tag.clone())))
            .collect();
        for (layer, tag) in carriers {
            self.apply_internal(Group::Finish, &layer, &tag, None);
        }
    }

    /// Whether `lower` and the layer above it can become one: nobody needs what `lower` shows but its only child,
    /// and nothing inside the child reads through to `lower` on its own account.
    fn merges_up(&self, lower: &Layer, keep: &[Point]) -> Option<LayerName> {
        let children = self.children(&lower.name);
        let [only] = children.as_slice() else { return None };
        let child = self.layers.iter().find(|layer| layer.name == *only)?;
        let possible = !self.needed(lower, keep) && child.owned && child.internal.is_empty();
        possible.then(|| child.name.clone())
    }

    /// Merges what can be merged, and gives the points to keep as they are called afterwards.
    fn merge_runs(&mut self, keep: &[Point], visible: &mut VisibleBytes<'_>) -> Result<Vec<Point>> {
        let mut keep = keep.to_vec();
        // Lowest runs first: a later run then sees what stands below it under its final name.
        while let Some(run) = self.lowest_run(&keep) {
            let (Some(bottom), Some(top)) = (run.first().cloned(), run.last().cloned()) else { break };
            let bottom_tags = self.existing(&bottom)?.internal.len();
            let top_layer = self.existing(&top)?.clone();
            let below = self.existing(&bottom)?.backing.clone();
            let moved = visible(&run)?;
            let into = if !top_layer.dependents.is_empty() || !self.made_here(&top) {
                top.clone() // somebody else opens this file by its name, or may
            } else if bottom_tags > 0 {
                bottom.clone() // its tags live there
            } else {
                let all: u64 = moved.iter().sum();
                // From the top down, so that of equals the top wins: then nothing needs another name.
                // What somebody else named keeps its content.
                let ours = |index: usize| run.get(index).is_some_and(|layer| self.made_here(layer));
                // A hypervisor merges into one of a run's ends.
                let open = run.iter().any(|layer| self.open.contains(layer));
                let possible = |index: usize| !open || index == 0 || index + 1 == run.len();
                let best = moved
                    .iter()
                    .enumerate()
                    .rev()
                    .filter(|(index, _)| ours(*index) && possible(*index))
                    .min_by_key(|(_, own)| all - **own);
                best.and_then(|(index, _)| run.get(index)).unwrap_or(&top).clone()
            };
            let own = run.iter().position(|layer| *layer == into);
            let bytes = moved.iter().enumerate().filter(|(i, _)| Some(*i) != own).map(|(_, b)| b).sum();
            self.merge(&run, &into, below, &top_layer, &keep, bytes);
            for point in keep.iter_mut().filter(|point| **point == Point::external(top.clone())) {
                *point = Point::external(into.clone());
            }
        }
        Ok(keep)
    }

    fn lowest_run(&self, keep: &[Point]) -> Option<Vec<LayerName>> {
        let links: Vec<(LayerName, LayerName)> = self
            .layers
            .iter()
            .filter_map(|lower| Some((lower.name.clone(), self.merges_up(lower, keep)?)))
            .filter(|(lower, upper)| {
                // Tags below and a foreign image above both forbid to give up a file: then they stay two.
                let tags = self.layers.iter().any(|l| l.name == *lower && !l.internal.is_empty());
                let dependents = self.layers.iter().any(|l| l.name == *upper && !l.dependents.is_empty());
                let (lower_ours, upper_ours) = (self.made_here(lower), self.made_here(upper));
                // A file that stays though this disk needs it no more goes on to need what it stands on.
                let stays = !upper_ours
                    && self
                        .layers
                        .iter()
                        .any(|layer| layer.name == *upper && self.merges_up(layer, keep).is_some());
                let keeps_tags = lower_ours && upper_ours && !dependents;
                (!tags || keeps_tags) && !(lower_ours && stays)
            })
            .collect();
        // A bottom is a lower end that is no link's upper end; the one nearest to the base goes first.
        let bottom = links
            .iter()
            .map(|(lower, _)| lower)
            .filter(|lower| links.iter().all(|(_, upper)| upper != *lower))
            .min_by_key(|lower| self.depth(lower))?;
        let mut run = vec![bottom.clone()];
        while let Some((_, upper)) = links.iter().find(|(lower, _)| Some(lower) == run.last()) {
            run.push(upper.clone());
        }
        let top_is_foreign_base =
            run.last().and_then(|top| self.layers.iter().find(|l| l.name == *top)).is_some_and(|top| {
                (!top.dependents.is_empty() || !self.made_here(&top.name))
                    && self.layers.iter().any(|l| l.name == run[0] && !l.internal.is_empty())
            });
        if top_is_foreign_base {
            run.pop();
        }
        Some(run)
    }

    fn merge(
        &mut self,
        run: &[LayerName],
        into: &LayerName,
        below: Option<LayerName>,
        top: &Layer,
        keep: &[Point],
        bytes: u64,
    ) {
        let others: Vec<&LayerName> = run.iter().filter(|layer| *layer != into).collect();
        let words = format!("merge {} into {into}", enumeration(&others));
        let step = ChainStep::Merge { run: run.to_vec(), into: into.clone(), below: below.clone() };
        self.push(Group::Finish, step, &words, bytes);
        if let Some(merge) = self.plan.steps.last_mut() {
            merge.deferrable = true;
        }
        let (made_here, named_by_others): (Vec<LayerName>, Vec<LayerName>) =
            run.iter().rev().filter(|layer| *layer != into).cloned().partition(|layer| self.made_here(layer));
        for layer in &named_by_others {
            self.edit_last(Edit::RemoveLayer { target: self.target.clone(), layer: layer.clone() });
        }
        if *into != top.name {
            for child in self.children(&top.name) {
                let words = format!("set the backing file of {child} to {into}");
                let step = ChainStep::Repoint { child: child.clone(), to: into.clone() };
                self.push(Group::Finish, step, &words, 0);
                if let Some(layer) = self.layers.iter_mut().find(|layer| layer.name == child) {
                    layer.backing = Some(into.clone());
                }
            }
            if top.name == self.active {
                self.switch(Group::Finish, into);
                if self.is_attached() {
                    self.switch_runs_inside();
                }
            }
            if keep.contains(&Point::external(top.name.clone())) {
                let edit = Edit::MovePoint {
                    target: self.target.clone(),
                    from: Point::external(top.name.clone()),
                    to: Point::external(into.clone()),
                };
                self.edit_last(edit);
            }
        }
        self.remove(made_here);
        let kept: Vec<(Utf8PathBuf, Option<LayerName>)> = self
            .layers
            .iter()
            .filter(|layer| named_by_others.contains(&layer.name))
            .map(|layer| (layer.file.clone(), layer.backing.clone()))
            .collect();
        self.layers.retain(|layer| layer.name == *into || !run.contains(&layer.name));
        if let Some(layer) = self.layers.iter_mut().find(|layer| layer.name == *into) {
            layer.backing = below;
            layer.virtual_size = top.virtual_size;
            layer.dependents = top.dependents.clone();
        }
        for (file, below) in kept {
            self.let_go(&file, below.as_ref());
        }
    }

    fn note_unnamed(&mut self, keep: &[Point]) {
        for layer in &self.layers {
            let children = self.children(&layer.name).len();
            let for_others = layer.owned
                && layer.format != "raw"
                && layer.name != self.active
                && !layer.dependents.is_empty()
                && !keep.contains(&Point::external(layer.name.clone()));
            if for_others {
                self.plan.notes.push(format!(
                    "{}: layer {} ({}) stays: {} on it",
                    self.target,
                    layer.name,
                    shown_size(layer.allocated),
                    neighbours::standing(&layer.dependents)
                ));
            }
            if self.needed(layer, keep) || children == 0 {
                continue;
            }
            self.plan.notes.push(format!(
                "{}: layer {} ({}) is kept: {} on it; it is merged when the last of them is deleted",
                self.target,
                layer.name,
                shown_size(layer.allocated),
                match children {
                    1 => "internal snapshots of the layer above depend".to_owned(),
                    n => format!("{n} layers depend"),
                }
            ));
        }
    }

    fn unname_last(&mut self, keep: &[Point]) {
        let [only] = self.layers.iter().filter(|layer| layer.owned).collect::<Vec<_>>()[..] else { return };
        let its_own_name = self.record.disk.path == layer_path(&self.record.disk.path, &only.name);
        let free = only.name == self.active
            && only.named
            && only.dependents.is_empty()
            && self.active_path == ActivePath::Keep
            && !its_own_name
            && !self.is_attached()
            && !keep.contains(&Point::external(only.name.clone()));
        if free {
            let layer = only.name.clone();
            let words = format!("remove the layer name {layer}: {} alone is left", self.record.disk.path);
            self.push(Group::Finish, ChainStep::Unname { layer }, &words, 0);
        }
    }

    fn existing(&self, name: &LayerName) -> Result<&Layer> {
        self.layers.iter().find(|layer| layer.name == *name).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{}: layer {name} does not exist", self.target))
                .advise("run 'domsnap check' to see what is missing")
        })
    }

    fn children(&self, name: &LayerName) -> Vec<LayerName> {
        self.layers.iter().filter(|l| l.backing.as_ref() == Some(name)).map(|l| l.name.clone()).collect()
    }

    fn depth(&self, name: &LayerName) -> usize {
        let mut depth = 0;
        let mut next = Some(name.clone());
        while let Some(layer) = next.and_then(|name| self.layers.iter().find(|layer| layer.name == name)) {
            depth += 1;
            next = layer.backing.clone().filter(|_| depth <= self.layers.len());
        }
        depth
    }

    fn free_tag(&self, layer: &LayerName, name: &SnapshotName) -> Result<()> {
        let layer = self.existing(layer)?;
        if layer.internal.iter().any(|internal| internal.tag == name.as_str()) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!(
                    "image {} has an internal snapshot {name} already, which is not domsnap's",
                    layer.file
                ),
            )
            .advise("choose another name, or take it in with 'domsnap import'"));
        }
        Ok(())
    }

    /// Whether a hypervisor has the active chain open.
    fn is_attached(&self) -> bool {
        !self.open.is_empty()
    }

    /// The configured path is moved at a moment that only the step before can make.
    fn switch_runs_inside(&mut self) {
        if let (ActivePath::Keep, Some(planned)) = (self.active_path, self.plan.steps.last_mut()) {
            planned.inside = true;
        }
    }

    /// The active layer must have a name of its own before the configured path moves away from it.
    fn name_active(&mut self) {
        let active = self.active.clone();
        let Some(layer) = self.layers.iter_mut().find(|layer| layer.name == active) else { return };
        if !layer.named {
            layer.named = true;
            let words = format!("give {} the permanent name {active}", self.record.disk.path);
            self.push(Group::Prepare, ChainStep::NameLayer { layer: active }, &words, 0);
        }
    }

    fn overlay(&mut self, new: &LayerName, on: &LayerName) -> Result<()> {
        let depth = self.depth(on) + 1;
        if depth > self.capabilities.max_depth as usize {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{}: the chain would be {depth} layers deep, and the limit is {}",
                    self.target, self.capabilities.max_depth
                ),
            )
            .advise("delete snapshots that are not needed, or take this one with --internal"));
        }
        let base = self.existing(on)?.clone();
        let step = ChainStep::CreateOverlay {
            layer: new.clone(),
            on: on.clone(),
            on_format: base.format.clone(),
            virtual_size: base.virtual_size,
        };
        self.push(Group::Prepare, step, &format!("create overlay {new} (backing file {on})"), 0);
        self.plan.commit.push(Edit::AddLayer { target: self.target.clone(), layer: new.clone() });
        self.layers.push(Layer {
            file: layer_path(&self.record.disk.path, new),
            name: new.clone(),
            format: self.record.disk.format.clone(),
            named: true,
            backing: Some(on.clone()),
            owned: true,
            virtual_size: base.virtual_size,
            allocated: 0,
            internal: Vec::new(),
            dependents: Vec::new(),
        });
        Ok(())
    }

    fn take_internal(&mut self, group: Group, layer: &LayerName, tag: &str) {
        let step = ChainStep::TakeInternal { layer: layer.clone(), tag: tag.to_owned() };
        self.push(group, step, &format!("create internal snapshot {tag} in {layer}"), 0);
    }

    fn apply_internal(&mut self, group: Group, layer: &LayerName, tag: &str, safety: Option<String>) {
        let step = ChainStep::ApplyInternal { layer: layer.clone(), tag: tag.to_owned(), safety };
        self.push(group, step, &format!("restore internal snapshot {tag} in {layer}"), 0);
    }

    fn switch(&mut self, group: Group, to: &LayerName) {
        let from = std::mem::replace(&mut self.active, to.clone());
        let mut edits = vec![Edit::SetActive { target: self.target.clone(), layer: to.clone() }];
        match self.active_path {
            ActivePath::Keep => {
                let words = format!("switch {} to {to}", self.record.disk.path);
                self.push(group, ChainStep::SwitchActive { from, to: to.clone() }, &words, 0);
            }
            ActivePath::New => {
                let path = layer_path(&self.record.disk.path, to);
                self.plan
                    .notes
                    .push(format!("{}: the domain's configuration must now name {path}", self.target));
                edits.push(Edit::SetPath { target: self.target.clone(), path });
            }
        }
        match group {
            Group::Prepare | Group::Cut => self.plan.commit.extend(edits),
            Group::Finish => edits.into_iter().for_each(|edit| self.edit_last(edit)),
        }
    }

    /// One step for many layers: their names go with one flush of the directory.
    fn remove(&mut self, layers: Vec<LayerName>) {
        if layers.is_empty() {
            return;
        }
        let it = if layers.len() == 1 { "it" } else { "them" };
        let words = format!("remove {}: nothing needs {it}", enumeration(&layers.iter().collect::<Vec<_>>()));
        self.push(Group::Finish, ChainStep::Remove { layers: layers.clone() }, &words, 0);
        for layer in layers {
            self.edit_last(Edit::RemoveLayer { target: self.target.clone(), layer });
        }
    }

    fn push(&mut self, group: Group, step: ChainStep, summary: &str, bytes: u64) {
        let action = serde_json::to_value(&step).unwrap_or_default();
        self.plan.steps.push(PlannedStep {
            group,
            step: Step { target: self.target.clone(), action, summary: summary.to_owned(), bytes },
            edits: Vec::new(),
            deferrable: false,
            inside: false,
            window: false,
        });
    }

    /// Attaches an edit to the finish step that makes it true: the last one planned.
    fn edit_last(&mut self, edit: Edit) {
        if let Some(last) = self.plan.steps.last_mut() {
            last.edits.push(edit);
        }
    }
}
