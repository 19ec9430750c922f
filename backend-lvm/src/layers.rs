//! A disk's volumes, read from lvm's report.

use camino::Utf8PathBuf;
use snapcore::backend::{DiskState, Layer};
use snapcore::{Disk, DiskRecord, Error, ErrorKind, LayerName, Result};

use crate::names::Volume;
use crate::report::{Row, VolumeGroup, VolumeKind};

/// Returns the volume of a record's disk.
pub(crate) fn volume_of(record: &DiskRecord) -> Result<Volume> {
    Volume::of_path(record.disk.path())
}

/// Finds the volume that the domain writes in the report.
///
/// # Errors
/// [`ErrorKind::NotFound`]; if an operation stopped between two renames, the advice is how to restore the
/// name.
pub(crate) fn current_row<'a>(group: &'a VolumeGroup, volume: &Volume) -> Result<&'a Row> {
    group.row(&volume.name).ok_or_else(|| {
        let error = Error::new(ErrorKind::NotFound, format!("there is no volume {volume}"));
        match group.rows.iter().find(|row| volume.is_temporary(&row.name) && row.name.ends_with("-old")) {
            Some(row) => error
                .state(format!("a revert did not complete: the volume exists as {}", row.name))
                .advise(format!(
                    "run 'domsnap recover'; or, by hand: 'lvrename {} {} {}'",
                    volume.group, row.name, volume.name
                )),
            None => error.advise("check the path; 'lvs' lists the volumes"),
        }
    })
}

/// Adopts a disk.
///
/// # Errors
/// [`ErrorKind::Refused`] or `Unsupported` for a volume of which no points can be taken.
pub(crate) fn adopt(disk: &Disk, volume: &Volume, group: &VolumeGroup) -> Result<DiskRecord> {
    let row = current_row(group, volume)?;
    require_known_kind(volume, row, group)?;
    volume.require_room_for_names()?;
    let active = volume.layer();
    Ok(DiskRecord::new(disk.clone(), active.clone()).owned(vec![active]))
}

/// Refuses a volume of a kind whose snapshots are not known to be correct: only thin volumes and plain ones
/// are adopted.
///
/// # Errors
/// [`ErrorKind::Refused`], with the kind's name and what to do instead.
pub(crate) fn require_known_kind(volume: &Volume, row: &Row, group: &VolumeGroup) -> Result<()> {
    let refuse = |what: String, advice: String| {
        Err(Error::new(ErrorKind::Refused, format!("{volume} {what}"))
            .state("no changes made")
            .advise(advice))
    };
    match row.kind {
        VolumeKind::Thin | VolumeKind::Thick => {}
        VolumeKind::ThickSnapshot => {
            return refuse(
                "is a thick snapshot, and lvm takes no snapshots of those".to_owned(),
                "use the volume that it is of; or copy it into a volume of its own, best a thin one"
                    .to_owned(),
            );
        }
        VolumeKind::Pool => return refuse("is a thin pool".to_owned(), "name a volume in it".to_owned()),
        VolumeKind::Inner => {
            return refuse("is a part of another volume".to_owned(), "name that one".to_owned());
        }
        VolumeKind::Foreign => {
            return refuse(
                format!(
                    "is a volume of type {}; snapshots are supported of thin, linear and striped volumes only",
                    row.types.join(" and ")
                ),
                instead_of(&row.types, volume),
            );
        }
    }
    match &group.shared {
        Some(lock) => refuse(
            format!(
                "is in a volume group that several machines share (lock type {lock}), which is not supported"
            ),
            "use a volume of a group that is this machine's alone".to_owned(),
        ),
        None => Ok(()),
    }
}

/// Returns advice for the owner of a volume of another kind.
fn instead_of(types: &[String], volume: &Volume) -> String {
    let path = volume.path();
    let overlay = format!(
        "add the disk as '{path},format=raw' with '--active-path new': its snapshots are qcow2 overlays in a directory"
    );
    let plain = match types.iter().map(String::as_str).find(|kind| !matches!(*kind, "linear" | "striped")) {
        Some("cache" | "writecache") => format!("detach its cache ('lvconvert --splitcache {volume}')"),
        Some("mirror" | "raid1") => format!("make it linear ('lvconvert -m0 {volume}')"),
        _ => "copy it into a thin volume".to_owned(),
    };
    format!("{plain}; or {overlay}")
}

/// Returns true if the group has neither the volume nor any volume that was made of it.
pub(crate) fn is_gone(record: &DiskRecord, volume: &Volume, group: &VolumeGroup) -> bool {
    !group.rows.iter().any(|row| {
        row.name == volume.name
            || record.owned.contains(&row.layer())
            || (row.parsed_tags().ours && volume.is_made_of_it(&row.name))
    })
}

/// Describes all volumes of the disk.
pub(crate) fn state(record: &DiskRecord, volume: &Volume, group: &VolumeGroup) -> Result<DiskState> {
    let row = current_row(group, volume)?;
    let mut layers = vec![layer(volume, row, None, true)];
    for other in &group.rows {
        let name = other.layer();
        let of_it = other.origin.as_deref() == Some(volume.name.as_str()) && other.kind != VolumeKind::Inner;
        let known = record.owned.contains(&name);
        let ours = other.parsed_tags().ours && volume.is_point(&other.name);
        let leftover = (other.parsed_tags().ours || known) && volume.is_temporary(&other.name);
        if other.name == volume.name || leftover || !(of_it || known || ours) {
            continue;
        }
        // A thick snapshot shows its origin's data where its own area has none.
        let backing = (other.kind == VolumeKind::ThickSnapshot).then(|| volume.layer());
        layers.push(layer(volume, other, backing, ours || known));
    }
    Ok(DiskState::new(record.disk.target.clone(), volume.layer(), layers))
}

fn layer(volume: &Volume, row: &Row, backing: Option<LayerName>, owned: bool) -> Layer {
    Layer::new(row.layer(), file(volume, &row.layer()), "raw", row.visible_size())
        .named(true)
        .backing(backing)
        .owned(owned)
        .allocated(row.allocated())
}

/// Returns the device of a layer, which exists while the volume is active.
pub(crate) fn file(volume: &Volume, layer: &LayerName) -> Utf8PathBuf {
    volume.beside(layer.as_str()).path()
}

/// Refuses a thick snapshot that is not complete. One that overflowed has lost its data. One whose area was
/// made smaller than its data (lvresize allows that) has lost a part, and a merge would stop in the middle.
pub(crate) fn require_whole(volume: &Volume, row: &Row) -> Result<()> {
    let how = match (row.invalid, row.is_cut_off()) {
        (false, false) => return Ok(()),
        (true, _) => "overflowed: its area was full, and its data is lost",
        (false, true) => "was made smaller than its data, and a part of that is lost",
    };
    Err(Error::new(ErrorKind::Refused, format!("{}/{} {how}", volume.group, row.name))
        .state("no changes made; the volume itself and all other points are whole")
        .advise("delete that snapshot; give the next ones more room with --lvm-area"))
}
