//! Creates and reverts: new layers, and the switch to them.

use snapcore::backend::{InstantPlan, Layer};
use snapcore::hypervisor::DiskInstant;
use snapcore::{
    Edit, Error, ErrorKind, Group, LayerName, Point, PointKind, Result, SnapshotName, shown_size,
};

use super::{ChainStep, Planner, Tag};
use crate::layer_name::{layer_name, layer_path};

impl Planner<'_> {
    pub(super) fn create(
        &mut self,
        kind: PointKind,
        name: &SnapshotName,
        overlay: Option<&LayerName>,
        keep: &[Point],
        stamp: u32,
    ) -> Result<()> {
        let active = self.active.clone();
        match kind {
            PointKind::Internal => {
                let tag = self.free_tag(&active, name, keep)?;
                match self.is_attached() {
                    true => {
                        let take = DiskInstant::Internal { tag: tag.clone() };
                        self.plan.instant = Some(InstantPlan::new(take, Vec::new()));
                    }
                    false => self.take_internal(Group::Cut, &active, &tag),
                }
                self.plan.point = Some(Point::internal(active, tag));
            }
            PointKind::External => {
                let new = match overlay {
                    Some(chosen) => chosen.clone(),
                    None => layer_name(self.record.disk.path(), stamp),
                };
                self.name_active();
                self.overlay(&new, &active)?;
                self.switch(Group::Cut, &new);
                if self.is_attached() {
                    let take = DiskInstant::Overlay {
                        address: layer_path(self.record.disk.path(), &new).into(),
                        format: self.record.disk.format.clone(),
                    };
                    // The path moves while the guest is paused, before it writes to the overlay.
                    let nested = std::mem::take(&mut self.plan.cut);
                    self.plan.instant = Some(InstantPlan::new(take, nested));
                }
                self.plan.point = Some(Point::external(active));
            }
        }
        Ok(())
    }

    pub(super) fn revert(
        &mut self,
        to: &Point,
        save: Option<&SnapshotName>,
        keep: &[Point],
        stamp: u32,
    ) -> Result<()> {
        let active = self.active.clone();
        let holder = self.existing(&to.layer)?.clone();
        let new = layer_name(self.record.disk.path(), stamp);
        let Some(tag) = &to.tag else {
            self.name_active();
            self.overlay(&new, &to.layer)?;
            self.leave(&new, save, keep);
            return Ok(());
        };
        let Some(found) = holder.internal.iter().find(|internal| internal.tag == *tag) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("image {} has no internal snapshot {tag}", holder.address),
            )
            .advise("another tool removed it; delete the snapshot from the catalogue"));
        };
        let (size, found) = (found.virtual_size, Tag::from(found));
        // Applying a tag changes the layer's own state, so that state must not be needed.
        let in_place = holder.owned
            && holder.dependents.is_empty()
            && (holder.name == active || self.made_here(&holder.name))
            && self.children(&holder.name).is_empty()
            && !keep.contains(&Point::external(holder.name.clone()));
        if in_place && holder.name == active {
            // A change of an image that a hypervisor has open must wait for the detached section.
            let before = if self.is_attached() { Group::Cut } else { Group::Prepare };
            let safety = match save {
                Some(name) => {
                    let tag = self.free_tag(&active, name, keep)?;
                    self.take_internal(before, &active, &tag);
                    self.plan.point = Some(Point::internal(active.clone(), tag.as_str()));
                    tag
                }
                None => {
                    // Begins with a dot, so it can never be a snapshot's name.
                    let tag = format!(".domsnap-undo-{stamp:08x}");
                    self.take_internal(before, &active, &tag);
                    let drop = ChainStep::DropInternal { layer: active.clone(), tags: vec![Tag::new(&tag)] };
                    self.push(Group::Finish, drop, "drop the safety copy of the previous state", 0);
                    tag
                }
            };
            self.apply_internal(Group::Cut, &active, found, Some(safety));
            return Ok(());
        }
        self.name_active();
        if in_place {
            // This layer's own state is not needed, so an undo has nothing to restore.
            self.apply_internal(Group::Prepare, &holder.name, found, None);
            self.leave(&holder.name, save, keep);
            return Ok(());
        }
        let bytes = holder.allocated.min(size);
        self.plan.notes.push(format!(
            "{}: other snapshots depend on {}; {tag} is copied to a new image (up to {})",
            self.target,
            holder.address,
            shown_size(bytes)
        ));
        let step = ChainStep::Materialise { from: holder.name.clone(), tag: found, layer: new.clone() };
        self.push(Group::Prepare, step, &format!("copy {tag} out of {} into {new}", holder.name), bytes);
        self.plan.commit.push(Edit::AddLayer { target: self.target.clone(), layer: new.clone() });
        let path = layer_path(self.record.disk.path(), &new);
        let copied = Layer::new(new.clone(), path, self.record.disk.format.as_str(), size);
        self.layers.push(copied.named(true).owned(true).backing(holder.backing).allocated(bytes));
        self.leave(&new, save, keep);
        Ok(())
    }

    /// Switches from the active layer to `to`. The previous layer is kept as a point, or removed if it
    /// contains none.
    fn leave(&mut self, to: &LayerName, save: Option<&SnapshotName>, keep: &[Point]) {
        let previous = self.active.clone();
        self.switch(Group::Cut, to);
        let mut keep = keep.to_vec();
        if save.is_some() {
            keep.push(Point::external(previous.clone()));
            self.plan.point = Some(Point::external(previous));
        }
        self.remove_unneeded(&keep);
    }

    /// The tag of the new snapshot `name`: its name. A snapshot of ours that had this name before it got
    /// another one keeps its tag, so that the image is not changed by a new name; then a number is added.
    fn free_tag(&self, layer: &LayerName, name: &SnapshotName, keep: &[Point]) -> Result<String> {
        let layer = self.existing(layer)?;
        let is_taken = |tag: &str| layer.internal.iter().any(|internal| internal.tag == tag);
        let is_ours = |tag: &str| keep.contains(&Point::internal(layer.name.clone(), tag));
        let name = name.as_str();
        if !is_taken(name) {
            return Ok(name.to_owned());
        }
        if is_ours(name) {
            // An image has fewer than 65536 internal snapshots.
            let mut numbered = (2..=u32::from(u16::MAX) + 1).map(|number| format!("{name}~{number}"));
            if let Some(free) = numbered.find(|tag| !is_taken(tag)) {
                return Ok(free);
            }
        }
        Err(Error::new(
            ErrorKind::Exists,
            format!(
                "image {} has an internal snapshot {name} already, which is not domsnap's",
                layer.address
            ),
        )
        .advise("choose another name, or take it in with 'domsnap import'"))
    }

    /// Gives the active layer a name of its own, before the configured path moves away from it.
    fn name_active(&mut self) {
        let active = self.active.clone();
        let Some(layer) = self.layers.iter_mut().find(|layer| layer.name == active) else { return };
        if !layer.named {
            layer.named = true;
            let message = format!("give {} the permanent name {active}", self.record.disk.path());
            self.push(Group::Prepare, ChainStep::NameLayer { layer: active }, &message, 0);
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
            .advise(match self.capabilities.internal {
                true => "delete snapshots that are not needed, or take this one with --internal",
                false => "delete snapshots that are not needed",
            }));
        }
        let base = self.existing(on)?.clone();
        let step = ChainStep::CreateOverlay {
            layer: new.clone(),
            on: on.clone(),
            on_format: base.format.clone(),
            virtual_size: base.virtual_size,
            format: None,
        };
        self.push(Group::Prepare, step, &format!("create overlay {new} (backing file {on})"), 0);
        self.plan.commit.push(Edit::AddLayer { target: self.target.clone(), layer: new.clone() });
        self.layers.push(
            Layer::new(
                new.clone(),
                layer_path(self.record.disk.path(), new),
                self.record.disk.format.clone(),
                base.virtual_size,
            )
            .named(true)
            .backing(Some(on.clone()))
            .owned(true),
        );
        Ok(())
    }
}
