//! The steps of an operation on a disk that is a chain of files: qcow2, VHD, overlays over raw.
//!
//! The planner is a pure function of the disk's layers, of the points that the catalogue wants to keep, and
//! of the request. A backend calls [`plan`] and carries out [`ChainStep`]s. The need for a layer is computed
//! each time from the layers that exist. So a layer that backs another image is never merged or removed.

mod action;
mod cost;
mod delete;
mod merge;
mod neighbours;
mod room;
mod take;

use std::collections::HashSet;

use snapcore::backend::{Capabilities, DiskPlan, DiskRequest, DiskState, Layer};
use snapcore::{
    ActivePath, DiskRecord, Edit, Error, ErrorKind, FinishStep, Group, LayerName, NestedStep, Point, Result,
    Step, Target,
};

pub use self::action::{ChainStep, CloneContent, Tag, room_of_overlay, uses};
pub use self::cost::{Growth, Measure, cost};
pub use self::neighbours::{rebase, unless_tidying};
pub use self::room::require_room;
use crate::layer_name::{is_layer_name, layer_path};
use crate::names;

/// Returns the bytes of each layer of a run (bottom first) that are visible at its top.
pub type VisibleBytes<'a> = dyn FnMut(&[LayerName]) -> Result<Vec<u64>> + Send + 'a;

/// Plans the steps of `request` on a chain of files.
///
/// `visible` is called before a merge, to find the direction that moves least.
///
/// # Errors
/// [`ErrorKind::Refused`], [`ErrorKind::Unsupported`], [`ErrorKind::NotFound`] or [`ErrorKind::Exists`], with
/// advice.
pub fn plan(
    record: &DiskRecord,
    state: &DiskState,
    active_path: ActivePath,
    capabilities: &Capabilities,
    request: &DiskRequest,
    visible: &mut VisibleBytes<'_>,
) -> Result<DiskPlan<ChainStep>> {
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
        DiskRequest::Create { kind, method: _, name, overlay, keep, stamp } => {
            planner.create(kind.unwrap_or(capabilities.preferred), name, overlay.as_ref(), keep, *stamp)?;
        }
        DiskRequest::Revert { to, save, keep, stamp } => {
            neighbours::allow_revert(record, state, active_path)?;
            planner.revert(to, save.as_ref(), keep, *stamp)?;
        }
        DiskRequest::Delete { drop, keep, .. } => {
            planner.delete(drop, keep, visible)?;
            neighbours::allow_merges(record, state, neighbours::is_tidying(request), &mut planner.plan)?;
        }
        _ => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "this version of the backend does not know the request",
            )
            .advise("use a backend of the same version as domsnap"));
        }
    }
    Ok(planner.plan)
}

/// Checks the file that a user chose for an overlay: in the disk's directory, and new.
///
/// # Errors
/// [`ErrorKind::Unsupported`], [`ErrorKind::Exists`]; the system's.
pub fn check_overlay_name(disk: &DiskRecord, overlay: &LayerName) -> Result<()> {
    if overlay.as_str().contains('/') {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{}: an overlay must be in the directory of {}", disk.disk.target, disk.disk.path()),
        )
        .advise("give a file name without a directory: the chain's relative names are looked up there"));
    }
    let file = layer_path(disk.disk.path(), overlay);
    match names::file_id(&file)? {
        Some(_) => {
            Err(Error::new(ErrorKind::Exists, format!("{file} exists, and nothing is written over it"))
                .advise("choose another name"))
        }
        None => Ok(()),
    }
}

/// Lists layers as text: by name, if they are few.
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
    plan: DiskPlan<ChainStep>,
}

impl Planner<'_> {
    /// Returns true if the state of `layer` itself is needed.
    fn needed(&self, layer: &Layer, keep: &[Point]) -> bool {
        layer.name == self.active
            || !layer.owned
            // The image from before the first overlay: it is read, and never written or removed.
            || layer.format != self.record.disk.format
            || !layer.dependents.is_empty()
            || keep.contains(&Point::external(layer.name.clone()))
    }

    /// Returns true if the file of a layer has a name that only domsnap gives.
    fn made_here(&self, layer: &LayerName) -> bool {
        is_layer_name(self.record.disk.path(), layer.as_str())
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

    /// Returns true if a hypervisor has the active chain open.
    fn is_attached(&self) -> bool {
        !self.open.is_empty()
    }

    /// Nests the move of the configured path in the merge before it, which alone provides the moment for it.
    fn switch_in_merge(&mut self) {
        if self.active_path == ActivePath::Keep
            && let Some(FinishStep { step, edits, .. }) = self.plan.finish.pop()
            && let Some(merge) = self.plan.finish.last_mut()
        {
            merge.nested.push(NestedStep::new(step).edits(edits));
        }
    }

    fn take_internal(&mut self, group: Group, layer: &LayerName, tag: &str) {
        let step = ChainStep::TakeInternal { layer: layer.clone(), tag: tag.to_owned() };
        self.push(group, step, &format!("create internal snapshot {tag} in {layer}"), 0);
    }

    fn apply_internal(&mut self, group: Group, layer: &LayerName, tag: Tag, safety: Option<String>) {
        let message = format!("restore internal snapshot {} in {layer}", tag.name);
        self.push(group, ChainStep::ApplyInternal { layer: layer.clone(), tag, safety }, &message, 0);
    }

    fn switch(&mut self, group: Group, to: &LayerName) {
        let from = std::mem::replace(&mut self.active, to.clone());
        let mut edits = vec![Edit::SetActive { target: self.target.clone(), layer: to.clone() }];
        match self.active_path {
            ActivePath::Keep => {
                let message = format!("switch {} to {to}", self.record.disk.path());
                self.push(group, ChainStep::SwitchActive { from, to: to.clone() }, &message, 0);
            }
            ActivePath::New => {
                let path = layer_path(self.record.disk.path(), to);
                self.plan
                    .notes
                    .push(format!("{}: the domain's configuration must now name {path}", self.target));
                edits.push(Edit::SetPath { target: self.target.clone(), path: path.into() });
            }
        }
        match group {
            Group::Prepare | Group::Cut => self.plan.commit.extend(edits),
            Group::Finish => edits.into_iter().for_each(|edit| self.edit_last(edit)),
        }
    }

    /// Removes many layers in one step, with one flush of the directory.
    fn remove(&mut self, layers: Vec<LayerName>) {
        if layers.is_empty() {
            return;
        }
        let it = if layers.len() == 1 { "it" } else { "them" };
        let message =
            format!("remove {}: nothing needs {it}", enumeration(&layers.iter().collect::<Vec<_>>()));
        self.push(Group::Finish, ChainStep::Remove { layers: layers.clone() }, &message, 0);
        for layer in layers {
            self.edit_last(Edit::RemoveLayer { target: self.target.clone(), layer });
        }
    }

    fn push(&mut self, group: Group, step: ChainStep, summary: &str, bytes: u64) {
        self.plan.push(group, self.step(step, summary, bytes));
    }

    fn step(&self, action: ChainStep, summary: &str, bytes: u64) -> Step<ChainStep> {
        Step::new(self.target.clone(), action, summary).bytes(bytes)
    }

    /// Attaches an edit to the finish step that makes it true: the last one planned.
    fn edit_last(&mut self, edit: Edit) {
        let Some(last) = self.plan.finish.last_mut() else { return };
        match last.nested.last_mut() {
            Some(nested) => nested.edits.push(edit),
            None => last.edits.push(edit),
        }
    }
}
