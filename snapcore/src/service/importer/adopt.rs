//! Adopts disks: each by its backend, with the layers that the manifest calls the domain's own.

use std::collections::HashSet;

use super::read::{Identity, Matched};
use super::{Importer, Report};
use crate::backend::InspectDepth;
use crate::domain::{ActivePath, Disk, DiskRecord};
use crate::erased::AnyDiskSnapshotter;
use crate::error::Result;
use crate::name::{LayerName, Target};
use crate::state::DiskState;

/// Disks as the domain has them, in its order.
#[derive(Default)]
pub(super) struct Adopted {
    /// Their records.
    pub(super) records: Vec<DiskRecord>,
    /// Their states, read from their images.
    pub(super) states: Vec<DiskState>,
    /// Internal points of the layer that the manifest calls active, which are in the active image now.
    pub(super) copies: HashSet<(Target, LayerName, String)>,
}

impl Importer {
    /// Adopts the disks.
    pub(super) async fn adopt(
        &self,
        matched: &Matched,
        identity: &Identity,
        report: &mut Report,
    ) -> Result<Adopted> {
        let mut adopted = Adopted::default();
        for disk in &matched.disks {
            let backend = self.registry.serving(disk)?;
            let mut record = backend.adopt(disk, identity.active_path).await?;
            let recorded = matched.record_of(disk);
            if let Some(recorded) = recorded {
                if identity.active_path == ActivePath::Keep
                    && is_renamed(&*backend, &record, recorded).await?
                {
                    let active = recorded.active.clone();
                    record = DiskRecord { owned: vec![active.clone()], active, ..record };
                }
                add_layers(matched, &*backend, &mut record, recorded, report).await?;
            }
            let state = backend.inspect(&record, InspectDepth::Layers, None).await?;
            if let Some(recorded) = recorded.filter(|recorded| recorded.active != record.active) {
                let copied = copied_tags(&state, &recorded.active).into_iter();
                let of_manifest = |tag| (recorded.disk.target.clone(), recorded.active.clone(), tag);
                adopted.copies.extend(copied.map(of_manifest));
            }
            adopted.states.push(state);
            adopted.records.push(record);
        }
        Ok(adopted)
    }
}

/// Returns true if the adopted disk and the manifest's are one that was never frozen, so that neither has a
/// file of its permanent name. Then the image at the path is the one that the manifest means, in another file
/// if it was copied.
async fn is_renamed(
    backend: &AnyDiskSnapshotter,
    record: &DiskRecord,
    recorded: &DiskRecord,
) -> Result<bool> {
    Ok(backend.layer_address(record, &record.active) == record.disk.address
        && !recorded.active.is_elsewhere()
        && !backend.has_layer(record, &recorded.active).await?)
}

/// Adds the layers that the manifest calls the domain's own, as far as they exist. A layer outside of the
/// disk's directory must be confirmed by the user, or known to the catalogue. Otherwise a layer of another
/// owner could be merged and removed as the domain's.
async fn add_layers(
    matched: &Matched,
    backend: &AnyDiskSnapshotter,
    record: &mut DiskRecord,
    recorded: &DiskRecord,
    report: &mut Report,
) -> Result<()> {
    let source = &matched.source;
    for layer in &recorded.owned {
        let Disk { target, address, .. } = &record.disk;
        if !source.trust && layer.is_elsewhere() && !source.owns(address, layer) {
            report.notes.push(format!(
                "the layer {layer} lies outside of the directory of disk {target}: it is only read, and never merged or \
                 removed; `domsnap import --trust` confirms that it is the domain's own"
            ));
            continue;
        }
        let exists = backend.has_layer(record, layer).await?;
        if !record.owned.contains(layer) && exists {
            record.owned.push(layer.clone());
        }
    }
    Ok(())
}

/// The internal points of the layer `recorded`, which was active, that the active image has too. A copy that
/// kept no hard links made two files of one image, and the one at the configured path is the one in use.
fn copied_tags(state: &DiskState, recorded: &LayerName) -> Vec<String> {
    let (Some(now), Some(then)) = (state.layer(&state.active), state.layer(recorded)) else {
        return Vec::new();
    };
    then.internal.iter().filter(|point| now.internal.contains(point)).map(|point| point.tag.clone()).collect()
}
