//! The table of `domsnap xl snapshot-list`, column by column as the prototype's.

use jiff::tz::TimeZone;
use snapcore::{Consistency, Domain, PointKind};

use crate::documents::SnapshotDoc;
use crate::units;

/// The table of these snapshots.
pub fn table(domain: &Domain, snapshots: &[SnapshotDoc], long: bool) -> String {
    let zone = units::zone();
    let mut text = format!(
        "{}\n{:<14}{:<30}{:>26}{:>6}{:>10}\n",
        "-".repeat(69),
        "TAG",
        "NAME",
        "DATE",
        "STATE",
        "DISK ONLY"
    );
    for snapshot in snapshots {
        text.push_str(&row(snapshot, &zone));
        if long {
            text.push_str(&details(domain, snapshot));
        }
    }
    text
}

fn row(snapshot: &SnapshotDoc, zone: &TimeZone) -> String {
    let date = snapshot.created.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S %z").to_string();
    // Letters of `xl list`: running, blocked, paused, shut down, dying. In the last two no snapshot is taken.
    let state = match (&snapshot.memory, snapshot.consistency) {
        (Some(memory), _) if !memory.running => "--p--",
        (Some(_), _) | (None, Consistency::Crash | Consistency::Filesystem) => "r----",
        (None, _) => "-----",
    };
    let disk_only = if snapshot.memory.is_some() { "No" } else { "Yes" };
    let (tag, name) = (snapshot.created.as_second(), snapshot.name.as_str());
    format!("{tag:<14}{name:<30}{date:>26} {state}{disk_only:>10}\n")
}

fn details(domain: &Domain, snapshot: &SnapshotDoc) -> String {
    let description: String =
        snapshot.description.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut text = format!(
        " DESCRIPTION\n {description}\n DISK\n {:>10}{:>14}{:>10}{:<30}\n",
        "DEVICE", "NAME", "FORMAT", "FILE"
    );
    for point in &snapshot.points {
        let format = domain.disk(&point.target).map_or("-", |record| record.disk.format.as_str());
        let file = match point.kind {
            PointKind::Internal => "-",
            PointKind::External => point.layer.as_str(),
        };
        let name = point.tag.as_deref().unwrap_or("-");
        text.push_str(&format!(" {:>10}{name:>14}{format:>10} {file:<29}\n", point.target.as_str()));
    }
    text
}
