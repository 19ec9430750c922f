//! A VHD that QEMU reads by itself, frozen under a qcow2 overlay. QEMU's driver writes VHDs and makes no
//! children of them; the overlay gets the disk's later writes, and the disk is one of backend-qcow2 from
//! then on ([`backend_qcow2::freeze_under`]).

use camino::Utf8Path;
use image_files::chain::{self, ChainStep};
use image_files::layer_name::layer_name;
use snapcore::backend::{DiskPlan, DiskState};
use snapcore::hypervisor::SeenDisk;
use snapcore::{ActivePath, DiskRecord, Error, ErrorKind, Group, LayerName, PointKind, Result, Step};

use crate::base::{VPC, as_base, size_in_qemu};
use crate::image::{Chain, DiskType, Layer, SECTOR};
use crate::layers::reading;
use crate::refusal::serve_it;

/// The method of such a point, which a user can request.
pub(crate) const OVERLAY: &str = "overlay";

/// Attempts to read an image that QEMU writes: it moves the footer with each block that it allocates.
const ATTEMPTS: usize = 8;

/// Time between two of them.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(25);

/// Plans a point that is the image itself, under an overlay.
///
/// # Errors
/// [`ErrorKind::Refused`] or [`ErrorKind::Unsupported`], with advice; those of the image.
pub(crate) fn plan(
    record: &DiskRecord,
    state: &DiskState,
    active_path: ActivePath,
    kind: Option<PointKind>,
    chosen: Option<&LayerName>,
    stamp: u32,
) -> Result<DiskPlan<ChainStep>> {
    let (target, path) = (&record.disk.target, record.disk.path());
    if kind == Some(PointKind::Internal) {
        return Err(Error::new(ErrorKind::Unsupported, format!("{target}: VHD has no internal snapshots"))
            .state("no changes made")
            .advise("leave --internal out"));
    }
    if active_path == ActivePath::Keep {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{target}: QEMU opens {path} as it is configured, and it must never come to name a qcow2 overlay: whoever \
                 opens that as a VHD or raw destroys it"
            ),
        )
        .state("no changes made")
        .advise(format!(
            "register the domain with --active-path=new: then the overlay gets a path of its own, which its configuration \
             must name, with format qcow2; or {}",
            serve_it(path)
        )));
    }
    if let Some(point) = record.owned.iter().find(|layer| **layer != record.active) {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("{target}: it has snapshots that are VHDs ({point}), which no qcow2 overlay can go with"),
        )
        .state("no changes made")
        .advise("delete these snapshots first, or leave --disk =overlay out while the domain is off"));
    }
    let (format, size) = frozen(path, state.attached)?;
    if !state.attached && begins_as_luks(path)? {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{target}: the disk in {path} begins as a LUKS volume: if QEMU encrypts it (driver luks), an overlay would \
                 hold what the guest writes from then on in the clear"
            ),
        )
        .state("no changes made")
        .advise(format!(
            "take the snapshot without --disk {target}=overlay; or, if the guest encrypts its disk by itself, take it \
             while the domain runs"
        )));
    }
    let layer = match chosen {
        Some(chosen) => chosen.clone(),
        None => layer_name(&path.with_extension("qcow2"), stamp),
    };
    chain::check_overlay_name(record, &layer)?;
    let mut plan = DiskPlan::default();
    let step = ChainStep::CreateOverlay {
        layer: layer.clone(),
        on: record.active.clone(),
        on_format: format.to_owned(),
        virtual_size: size,
        format: Some("qcow2".to_owned()),
    };
    let summary = format!("make the qcow2 overlay {layer} on {path}");
    plan.push(Group::Prepare, Step::new(target.clone(), step, summary));
    backend_qcow2::freeze_under(&mut plan, record, state, &layer, record.active.clone(), false);
    if format == VPC {
        plan.notes.push(format!(
            "{target}: with QEMU's driver vpc below the overlay, QEMU saves no memory of the domain; to have that, {}",
            serve_it(path)
        ));
    }
    Ok(plan)
}

/// Refuses a disk of which QEMU shows another than the image at `path` holds.
///
/// # Errors
/// [`ErrorKind::Refused`] or [`ErrorKind::Unsupported`], with advice; those of the image.
pub(crate) fn require_shown(path: &Utf8Path, seen: &SeenDisk) -> Result<()> {
    let image = reading(path)?;
    let (by, shown, wanted) = match (seen.format.as_str(), seen.part) {
        (VPC, None) if image.disk_type() == DiskType::Fixed => {
            ("QEMU's driver vpc", seen.bytes, image.size())
        }
        (VPC, None) => ("QEMU's driver vpc", seen.bytes, size_in_qemu(&image)?),
        ("raw", Some(part)) if image.disk_type() == DiskType::Fixed => {
            ("QEMU's driver raw", Some(part), image.size())
        }
        (format, _) => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: the running domain has {path} open with format {format}, by which it does not show what the VHD \
                     holds, or domsnap cannot change it",
                    seen.target
                ),
            )
            .state("no changes made")
            .advise(format!("shut the domain down; or {}", serve_it(path))));
        }
    };
    if shown.is_none_or(|shown| shown == wanted) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "{}: {by} shows {} bytes of {path}, whose disk has {wanted}",
            seen.target,
            shown.unwrap_or_default()
        ),
    )
    .state("no changes made")
    .advise(match seen.part {
        Some(_) => format!("start the domain with size={wanted} for it"),
        None => format!("start the domain without force_size_calc for it; or {}", serve_it(path)),
    }))
}

/// Returns how an overlay states the image, and the size of its disk.
fn frozen(path: &Utf8Path, is_written: bool) -> Result<(&'static str, u64)> {
    let mut attempt = 1;
    loop {
        match as_base(path) {
            Err(_) if is_written && attempt < ATTEMPTS => std::thread::sleep(PAUSE),
            done => return done,
        }
        attempt += 1;
    }
}

fn begins_as_luks(path: &Utf8Path) -> Result<bool> {
    let mut first = [0; SECTOR as usize];
    let mut chain = Chain::new(vec![Layer::Vhd(Box::new(reading(path)?))])?;
    if chain.size() < SECTOR {
        return Ok(false);
    }
    chain.read_at(&mut first, 0)?;
    Ok(first.starts_with(&image_files::LUKS))
}
