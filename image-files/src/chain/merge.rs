//! Merges of runs of layers whose lower ones are not needed.

use snapcore::backend::Layer;
use snapcore::{DiskAddress, Edit, Group, LayerName, Point, Result};

use super::{ChainStep, Planner, VisibleBytes, enumeration};

impl Planner<'_> {
    /// Returns the layer above `lower` if the two can become one. What `lower` shows must only be needed by
    /// its only child, and no tag in the child may read through to `lower`.
    fn merges_up(&self, lower: &Layer, keep: &[Point]) -> Option<LayerName> {
        let children = self.children(&lower.name);
        let [only] = children.as_slice() else { return None };
        let child = self.layers.iter().find(|layer| layer.name == *only)?;
        let possible = !self.needed(lower, keep) && child.owned && child.internal.is_empty();
        possible.then(|| child.name.clone())
    }

    /// Plans all possible merges. Returns the points to keep, by their names afterwards.
    pub(super) fn merge_runs(
        &mut self,
        keep: &[Point],
        visible: &mut VisibleBytes<'_>,
    ) -> Result<Vec<Point>> {
        let mut keep = keep.to_vec();
        // Lowest runs first: a later run then refers to its backing file by the final name.
        while let Some(run) = self.lowest_run(&keep) {
            let (Some(bottom), Some(top)) = (run.first().cloned(), run.last().cloned()) else { break };
            let bottom_tags = self.existing(&bottom)?.internal.len();
            let top_layer = self.existing(&top)?.clone();
            let below = self.existing(&bottom)?.backing.clone();
            let moved = visible(&run)?;
            let into = if !top_layer.dependents.is_empty() || !self.made_here(&top) {
                top.clone() // Another program opens this file by its name, or may.
            } else if bottom_tags > 0 {
                bottom.clone() // Its tags are in this file.
            } else {
                let all: u64 = moved.iter().sum();
                // From the top down, so that the top wins a tie: then no file needs another name. A file that
                // another program named keeps its content.
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
                // Tags below and a foreign image above both forbid to remove a file: then the two are not
                // merged.
                let tags = self.layers.iter().any(|l| l.name == *lower && !l.internal.is_empty());
                let dependents = self.layers.iter().any(|l| l.name == *upper && !l.dependents.is_empty());
                let (lower_ours, upper_ours) = (self.made_here(lower), self.made_here(upper));
                // A file that is kept although this disk no longer needs it still needs its backing file.
                let stays = !upper_ours
                    && self
                        .layers
                        .iter()
                        .any(|layer| layer.name == *upper && self.merges_up(layer, keep).is_some());
                let keeps_tags = lower_ours && upper_ours && !dependents;
                (!tags || keeps_tags) && !(lower_ours && stays)
            })
            .collect();
        // A bottom is a lower end that is not the upper end of another link. The one nearest to the base goes
        // first.
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
        let message = format!("merge {} into {into}", enumeration(&others));
        let step = ChainStep::Merge { run: run.to_vec(), into: into.clone(), below: below.clone() };
        self.push(Group::Finish, step, &message, bytes);
        if let Some(merge) = self.plan.finish.last_mut() {
            merge.deferrable = true;
        }
        let (made_here, named_by_others): (Vec<LayerName>, Vec<LayerName>) =
            run.iter().rev().filter(|layer| *layer != into).cloned().partition(|layer| self.made_here(layer));
        for layer in &named_by_others {
            self.edit_last(Edit::RemoveLayer { target: self.target.clone(), layer: layer.clone() });
        }
        if *into != top.name {
            for child in self.children(&top.name) {
                let message = format!("set the backing file of {child} to {into}");
                let step = ChainStep::Repoint { child: child.clone(), to: into.clone() };
                self.push(Group::Finish, step, &message, 0);
                if let Some(layer) = self.layers.iter_mut().find(|layer| layer.name == child) {
                    layer.backing = Some(into.clone());
                }
            }
            if top.name == self.active {
                self.switch(Group::Finish, into);
                if self.is_attached() {
                    self.switch_in_merge();
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
        let kept: Vec<(DiskAddress, Option<LayerName>)> = self
            .layers
            .iter()
            .filter(|layer| named_by_others.contains(&layer.name))
            .map(|layer| (layer.address.clone(), layer.backing.clone()))
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
}
