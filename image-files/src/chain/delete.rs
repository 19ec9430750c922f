//! Deletes: tags are dropped, and layers that are no longer needed are removed or merged.

use snapcore::{ActivePath, DiskAddress, Edit, FinishStep, Group, LayerName, Point, Result, shown_size};

use super::{ChainStep, Planner, Tag, VisibleBytes, neighbours};
use crate::layer_name::layer_path;

impl Planner<'_> {
    pub(super) fn delete(
        &mut self,
        drop: &[Point],
        keep: &[Point],
        visible: &mut VisibleBytes<'_>,
    ) -> Result<()> {
        self.forget_gone(keep);
        self.drop_tags(drop, keep);
        self.remove_unneeded(keep);
        self.empty_carriers(drop, keep);
        let keep = self.merge_runs(keep, visible)?;
        self.note_orphans(&keep);
        self.unname_last(&keep);
        Ok(())
    }

    /// Removes layers from the records whose files are gone and not needed. A step that removed some of its
    /// files and then failed leaves them, because the rest of it is deferred.
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
            let tags: Vec<Tag> =
                layer.internal.iter().filter(|internal| dropped(&internal.tag)).map(Tag::from).collect();
            if tags.is_empty() {
                continue;
            }
            let name = layer.name.clone();
            let message = format!("delete {} inside {name}", Tag::names(&tags));
            if name == self.active && self.is_attached() {
                self.plan.notes.push(format!(
                    "{}: the space of {} stays in {}, for what the guest writes next: QEMU gives it back to the file system \
                     where the disk has discard=unmap",
                    self.target,
                    Tag::names(&tags),
                    layer.address
                ));
            }
            self.layers[index].internal.retain(|internal| !tags.iter().any(|tag| tag.name == internal.tag));
            // A hypervisor can delete tags in the image that it writes, but not in one that it has open
            // read-only.
            let detached = name != self.active && self.open.contains(&name);
            let step = self.step(ChainStep::DropInternal { layer: name, tags }, &message, 0);
            let part = if detached { &mut self.plan.detached } else { &mut self.plan.finish };
            part.push(FinishStep::new(step));
        }
    }

    /// Keeps the layer's file, since another image may use it. So its backing file `below` is kept as well.
    pub(super) fn let_go(&mut self, file: &DiskAddress, below: Option<&LayerName>) {
        if let Some(below) = below.and_then(|name| self.layers.iter_mut().find(|layer| layer.name == *name)) {
            below.dependents.push(file.clone());
        }
        self.plan.notes.push(format!(
            "{}: this disk does not need {file} any more; the file stays, because its name is not one of domsnap's: remove \
             it if nothing else needs it",
            self.target
        ));
    }

    pub(super) fn remove_unneeded(&mut self, keep: &[Point]) {
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
            self.let_go(&layer.address, layer.backing.as_ref());
        }
        self.remove(gone);
    }

    /// Applies a tag to each layer that is only kept for its tags and no longer needs a state of its own.
    /// That frees what a deleted point occupied.
    fn empty_carriers(&mut self, drop: &[Point], keep: &[Point]) {
        let carriers: Vec<(LayerName, Tag)> = self
            .layers
            .iter()
            .filter(|layer| {
                drop.contains(&Point::external(layer.name.clone())) && self.made_here(&layer.name)
            })
            .filter(|layer| !self.needed(layer, keep) && self.children(&layer.name).is_empty())
            .filter_map(|layer| Some((layer.name.clone(), layer.internal.last()?.into())))
            .collect();
        for (layer, tag) in carriers {
            self.apply_internal(Group::Finish, &layer, tag, None);
        }
    }

    fn note_orphans(&mut self, keep: &[Point]) {
        for layer in &self.layers {
            let children = self.children(&layer.name).len();
            let for_others = layer.owned
                && layer.format == self.record.disk.format
                && layer.name != self.active
                && !layer.dependents.is_empty()
                && !keep.contains(&Point::external(layer.name.clone()));
            if for_others {
                self.plan.notes.push(format!(
                    "{}: layer {} ({}) stays: {}",
                    self.target,
                    layer.name,
                    shown_size(layer.allocated),
                    neighbours::standing(&layer.dependents, "it")
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
        let its_own_name = self.record.disk.path() == layer_path(self.record.disk.path(), &only.name);
        let free = only.name == self.active
            && only.named
            && only.dependents.is_empty()
            && self.active_path == ActivePath::Keep
            && !its_own_name
            && !self.is_attached()
            && !keep.contains(&Point::external(only.name.clone()));
        if free {
            let layer = only.name.clone();
            let message = format!("remove the layer name {layer}: {} alone is left", self.record.disk.path());
            self.push(Group::Finish, ChainStep::Unname { layer }, &message, 0);
        }
    }
}
