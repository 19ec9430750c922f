//! A disk's volumes, read from lvm's report.

use camino::Utf8PathBuf;
use snapcore::{Disk, DiskRecord, DiskState, Error, ErrorKind, Layer, LayerName, Result};

use crate::names::Volume;
use crate::report::{Group, Kind, Row};

/// The volume that a record's disk is.
pub(crate) fn volume_of(record: &DiskRecord) -> Result<Volume> {
    Volume::of_path(&record.disk.path)
}

/// The volume that the domain writes, in the report.
///
/// # Errors
/// [`ErrorKind::NotFound`], with what brings it back where an operation stopped between two renames.
pub(crate) fn present<'a>(group: &'a Group, volume: &Volume) -> Result<&'a Row> {
    group.row(&volume.name).ok_or_else(|| {
        let error = Error::new(ErrorKind::NotFound, format!("there is no volume {volume}"));
        match group.rows.iter().find(|row| volume.is_passing(&row.name) && row.name.ends_with("-old")) {
            Some(row) => error
                .state(format!("a revert stopped half way: it is there as {}", row.name))
                .advise(format!(
                    "run 'domsnap recover'; or, by hand: 'lvrename {} {} {}'",
                    volume.group, row.name, volume.name
                )),
            None => error.advise("check the path; 'lvs' lists the volumes"),
        }
    })
}

/// Takes a disk in.
///
/// # Errors
/// [`ErrorKind::Refused`] or `Unsupported` for a volume of which no points can be taken.
pub(crate) fn adopt(disk: &Disk, volume: &Volume, group: &Group) -> Result<DiskRecord> {
    let row = present(group, volume)?;
    let refuse = |what: &str, advice: &str| {
        Err(Error::new(ErrorKind::Refused, format!("{volume} {what}"))
            .state("nothing was touched")
            .advise(advice))
    };
    match row.kind {
        Kind::Thin | Kind::Thick => {}
        Kind::ThickSnapshot => {
            return refuse(
                "is a thick snapshot, and lvm takes no snapshots of those",
                "use the volume that it is of; or copy it into a volume of its own, best a thin one",
            );
        }
        Kind::Pool => return refuse("is a thin pool", "name a volume in it"),
        Kind::Inner => return refuse("is a part of another volume", "name that one"),
    }
    volume.require_room_for_names()?;
    let active = volume.layer();
    Ok(DiskRecord { disk: disk.clone(), active: active.clone(), owned: vec![active] })
}

/// Everything of the disk.
pub(crate) fn state(record: &DiskRecord, volume: &Volume, group: &Group) -> Result<DiskState> {
    let row = present(group, volume)?;
    let mut layers = vec![layer(volume, row, None, true)];
    for other in &group.rows {
        let name = other.layer();
        let of_it = other.origin.as_deref() == Some(volume.name.as_str()) && other.kind != Kind::Inner;
        let known = record.owned.contains(&name);
        let ours = other.told().ours && volume.is_point(&other.name);
        let leftover = other.told().ours && volume.is_passing(&other.name);
        if other.name == volume.name || leftover || !(of_it || known || ours) {
            continue;
        }
        // A thick snapshot shows what its origin has where its own area has nothing.
        let backing = (other.kind == Kind::ThickSnapshot).then(|| volume.layer());
        layers.push(layer(volume, other, backing, ours || known));
    }
    Ok(DiskState {
        target: record.disk.target.clone(),
        active: volume.layer(),
        layers,
        attached: false,
        on_path: Vec::new(),
        unclear: Vec::new(),
    })
}

fn layer(volume: &Volume, row: &Row, backing: Option<LayerName>, owned: bool) -> Layer {
    Layer {
        name: row.layer(),
        file: file(volume, &row.layer()),
        format: "raw".to_owned(),
        named: true,
        backing,
        owned,
        virtual_size: row.visible_size(),
        allocated: row.allocated(),
        internal: Vec::new(),
        dependents: Vec::new(),
    }
}

/// The device of a layer; there is one while the volume is active.
pub(crate) fn file(volume: &Volume, layer: &LayerName) -> Utf8PathBuf {
    volume.beside(layer.as_str()).path()
}

/// A thick snapshot that overflowed shows nothing any more.
pub(crate) fn require_whole(volume: &Volume, row: &Row) -> Result<()> {
    if !row.invalid {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!("{}/{} overflowed: its area was full, and what it held is lost", volume.group, row.name),
    )
    .state("nothing was touched; the volume itself and all other points are whole")
    .advise("delete that snapshot; give the next ones more room with --lvm-area"))
}
