//! The cost of a delete, from its plan.

use std::collections::HashSet;
use std::path::Path;

use snapcore::backend::{Certainty, DeleteCost, DiskPlan, DiskState};
use snapcore::{LayerName, Result, shown_size};

use super::{ChainStep, Tag};
use crate::removal::freed_by_removing;

/// The content of images, as far as the cost of a delete depends on it.
pub trait Measure {
    /// Returns what deleting tags of a layer frees. With `leaves`, the layer's own state is given up too, and
    /// becomes that of another of its tags.
    ///
    /// # Errors
    /// Those of the image.
    fn dropped(&mut self, layer: &LayerName, tags: &[Tag], leaves: bool) -> Result<DeleteCost>;

    /// Returns by how much a merge of `run` makes the file of `into` larger or smaller. `has_below` is true
    /// if the run has a backing file. `moved` are the bytes that the plan says are moved.
    ///
    /// # Errors
    /// Those of the images.
    fn merged(&mut self, run: &[LayerName], into: &LayerName, has_below: bool, moved: u64) -> Result<Growth>;

    /// Returns the bytes of a copy of a tag's own data and tables.
    ///
    /// # Errors
    /// Those of the image.
    fn copied(&mut self, layer: &LayerName, tag: &Tag) -> Result<u64>;
}

/// Change of a file's size on the disk, by a merge into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Growth {
    /// Bytes that it takes more.
    pub more: u64,
    /// Bytes that it takes less.
    pub less: u64,
    /// Meaning of the numbers.
    pub certainty: Certainty,
}

/// Returns what the steps of a delete free and move, in bytes: the files that it removes, and the tags that
/// it drops, less what merges add to the files that they write.
///
/// # Errors
/// Those of `measure`.
pub fn cost(plan: &DiskPlan<ChainStep>, state: &DiskState, measure: &mut dyn Measure) -> Result<DeleteCost> {
    let mut parts = Vec::new();
    let (mut more, mut moves) = (0u64, 0u64);
    let mut removed: Vec<&LayerName> = Vec::new();
    // Layers whose content an earlier step has changed: then a later one finds other clusters free.
    let mut changed: HashSet<&LayerName> = HashSet::new();
    let applies = |layer: &LayerName| {
        plan.steps()
            .any(|step| matches!(&step.action, ChainStep::ApplyInternal { layer: own, .. } if own == layer))
    };
    for step in plan.steps() {
        moves = moves.saturating_add(step.bytes);
        match &step.action {
            ChainStep::Remove { layers } => removed.extend(layers),
            ChainStep::DropInternal { layer, tags } => {
                parts.push(measure.dropped(layer, tags, applies(layer))?);
                changed.insert(layer);
            }
            ChainStep::ApplyInternal { layer, .. } if !changed.contains(layer) => {
                parts.push(measure.dropped(layer, &[], true)?);
                changed.insert(layer);
            }
            ChainStep::Merge { run, into, below } => {
                let growth = measure.merged(run, into, below.is_some(), step.bytes)?;
                more = more.saturating_add(growth.more);
                let less = DeleteCost::new(growth.less, 0);
                parts.push(match growth.certainty {
                    _ if run.iter().any(|layer| changed.contains(layer)) => less.but(
                        Certainty::Estimate,
                        format!("{into} loses snapshots before data is merged into it"),
                    ),
                    Certainty::Exact => less.exact(),
                    other => less.but(other, format!("how much {into} grows by the merge is estimated")),
                });
                changed.extend(run);
            }
            ChainStep::ForgetInternal { layer, tags } => parts.push(DeleteCost::default().but(
                Certainty::Unknown,
                format!(
                    "{} in {layer} cannot be read: a delete is refused, and with --force all that they refer to stays",
                    Tag::names(tags)
                ),
            )),
            _ => {}
        }
    }
    parts.push(freed_by_removing(files_of(state, removed), std::iter::empty()));
    let mut cost = DeleteCost::sum(parts);
    if more > cost.frees && cost.certainty == Certainty::Exact {
        let net = shown_size(more - cost.frees);
        cost = cost.but(Certainty::AtMost, format!("nothing is freed: its merges take {net} more than goes"));
    }
    cost.frees = cost.frees.saturating_sub(more);
    cost.moves = moves;
    Ok(cost)
}

/// The files of layers, with the number of names that each loses when it is removed.
pub(super) fn files_of<'a>(
    state: &'a DiskState,
    layers: impl IntoIterator<Item = &'a LayerName>,
) -> impl Iterator<Item = (&'a Path, u64)> {
    layers.into_iter().filter_map(|name| state.layer(name)).map(|layer| {
        // The configured path names the active layer too.
        let names = if layer.name == state.active && layer.named { 2 } else { 1 };
        (layer.path().as_std_path(), names)
    })
}
