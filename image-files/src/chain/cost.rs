//! The cost of a delete, from its plan.

use snapcore::backend::{DeleteCost, DiskPlan, DiskState};
use snapcore::{LayerName, Result};

use super::{ChainStep, Tag};

/// Returns what the steps of a delete free and move, in bytes. What a merge moves is kept, in the layer that
/// receives it. `freed_inside` returns the bytes that deleting tags of a layer frees.
///
/// # Errors
/// Those of `freed_inside`.
pub fn cost(
    plan: &DiskPlan<ChainStep>,
    state: &DiskState,
    mut freed_inside: impl FnMut(&LayerName, &[Tag]) -> Result<u64>,
) -> Result<DeleteCost> {
    let mut cost = DeleteCost::default();
    let mut kept = 0u64;
    for step in plan.steps() {
        cost.moves = cost.moves.saturating_add(step.bytes);
        match &step.action {
            ChainStep::Remove { layers } => {
                let gone = layers.iter().filter_map(|name| state.layer(name)).map(|layer| layer.allocated);
                cost.frees = cost.frees.saturating_add(gone.sum());
            }
            ChainStep::DropInternal { layer, tags } => {
                cost.frees = cost.frees.saturating_add(freed_inside(layer, tags)?);
            }
            ChainStep::Merge { .. } => kept = kept.saturating_add(step.bytes),
            _ => {}
        }
    }
    cost.frees = cost.frees.saturating_sub(kept);
    Ok(cost)
}
