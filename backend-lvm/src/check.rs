//! Checks of a disk's volumes, their pool and their group.

use snapcore::backend::{Finding, Severity};
use snapcore::{DiskRecord, shown_size};

use crate::layers::require_known_kind;
use crate::names::Volume;
use crate::report::{Row, Share, VolumeGroup, VolumeKind};
use crate::rules::{Rules, WARN_PERCENT};

/// Free part of a thin pool's metadata below which lvm takes no new volumes, in bytes; and the most that it
/// asks for, in percent.
const METADATA_FREE: u64 = 4 << 20;
const METADATA_FREE_PERCENT: u32 = 25;

/// Returns a warning for a thick snapshot's area that overflowed, or will overflow.
pub(crate) fn area_warning(volume: &Volume, row: &Row) -> Option<(Severity, String)> {
    if row.kind != VolumeKind::ThickSnapshot {
        return None;
    }
    let name = format!("{}/{}", volume.group, row.name);
    if row.invalid {
        return Some((
            Severity::Error,
            format!("{name} overflowed: its area was full, and its data is lost; delete the snapshot"),
        ));
    }
    if row.is_cut_off() {
        return Some((
            Severity::Error,
            format!("{name} was made smaller than its data, and a part of that is lost; delete the snapshot"),
        ));
    }
    let full = row.data.filter(|data| data.reaches(WARN_PERCENT) && !row.has_room_for_all())?;
    // An area never needs more than its origin has, and lvm extends it no further.
    let more = shown_size(row.size);
    Some((
        Severity::Warning,
        format!(
            "{name} has {full} of its {} in use: when it is full it is lost; give it more: 'lvextend -L+{}b {name}' (another \
             {more}), or let dmeventd do so: snapshot_autoextend_threshold in lvm.conf",
            shown_size(row.size),
            row.size
        ),
    ))
}

/// Checks a disk's volumes, their pool and their group.
pub(crate) fn check(
    record: &DiskRecord,
    volume: &Volume,
    group: &VolumeGroup,
    rules: &Rules,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |severity, subject: &str, message: String| {
        findings.push(Finding::new(severity, subject, message));
    };
    let Some(current) = group.row(&volume.name) else {
        find(Severity::Error, &volume.to_string(), "the volume does not exist".to_owned());
        return findings;
    };
    if let Err(error) = require_known_kind(volume, current, group) {
        find(Severity::Error, &volume.to_string(), format!("no snapshot can be made: {error}"));
    }
    if group.missing > 0 {
        let message = format!("{} of the group's physical volumes are missing", group.missing);
        find(Severity::Error, &group.name, message);
    }
    let concerned = |row: &&Row| {
        row.name == volume.name
            || record.owned.contains(&row.layer())
            || (row.parsed_tags().ours && (volume.is_point(&row.name) || volume.is_salvaged(&row.name)))
    };
    for row in group.rows.iter().filter(concerned) {
        let subject = format!("{}/{}", group.name, row.name);
        if let Some((severity, message)) = area_warning(volume, row) {
            find(severity, &subject, message);
        }
        if !row.health.is_empty() {
            find(Severity::Error, &subject, format!("lvm reports: {}", row.health));
        }
        if row.merge_failed {
            find(Severity::Error, &subject, "a merge into it failed; 'dmesg' may say why".to_owned());
        }
        if row.merging {
            let message = "lvm is merging a snapshot, or will at the volume's next activation";
            find(Severity::Warning, &subject, message.to_owned());
        }
        if row.suspended {
            let message =
                "it is suspended: its readers and writers wait; resume it with 'dmsetup resume'".to_owned();
            find(Severity::Error, &subject, message);
        }
    }
    if let Some(pool) = group.pool_of(current) {
        let subject = format!("{}/{}", group.name, pool.name);
        if !pool.health.is_empty() {
            find(Severity::Error, &subject, format!("lvm reports for the pool: {}", pool.health));
        }
        if let Some(message) = pool_full(group, pool, rules) {
            find(Severity::Warning, &subject, message);
        }
    }
    let leftovers = group.rows.iter().filter(|row| row.parsed_tags().ours && volume.is_temporary(&row.name));
    for row in leftovers {
        let message =
            "it was left by an operation that did not complete; 'domsnap recover' removes it".to_owned();
        find(Severity::Note, &format!("{}/{}", group.name, row.name), message);
    }
    findings
}

/// Returns the reason why no more points are taken in a pool, with figures.
pub(crate) fn pool_full(group: &VolumeGroup, pool: &Row, rules: &Rules) -> Option<String> {
    let name = format!("{}/{}", group.name, pool.name);
    if let Some(data) = pool.data.filter(|data| data.reaches(rules.pool_data_percent)) {
        return Some(format!(
            "the thin pool {name} has {data} of its {} of data in use, and {} % is the limit: when it is full, writers wait \
             or fail; give it more: 'lvextend -L+SIZE {name}' ({} is free in the group)",
            shown_size(pool.size),
            rules.pool_data_percent,
            shown_size(group.free)
        ));
    }
    let limit = Share::of_percent(rules.pool_metadata_percent).min(lvms_limit(pool));
    let metadata = pool.metadata.filter(|metadata| *metadata >= limit)?;
    let size = pool.metadata_size.map_or_else(String::new, |size| format!(" of its {}", shown_size(size)));
    Some(format!(
        "the thin pool {name} has {metadata}{size} of metadata in use, and {limit} is the limit: when it is full, the pool must be \
         repaired; give it more: 'lvextend --poolmetadatasize +SIZE {name}' ({} is free in the group)",
        shown_size(group.free)
    ))
}

/// Returns the fill level of a pool's metadata from which lvm itself takes no new volumes: it keeps a quarter
/// free, or 4 MiB if that is less (lvm2, `lib/metadata/thin_manip.c`). Without this check the operation would
/// fail in the cut, while a guest is paused.
fn lvms_limit(pool: &Row) -> Share {
    let free = pool.metadata_size.map_or(Share::of_percent(0), |size| Share::of_part(METADATA_FREE, size));
    free.min(Share::of_percent(METADATA_FREE_PERCENT)).rest()
}
