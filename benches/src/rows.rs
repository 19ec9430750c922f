//! The measurements, in groups that share their images.

mod adding;
mod internal;
mod live;
mod many;
mod merging;
mod nothing;
mod raw;
mod reflink;
mod served;
mod vhd;

use anyhow::Result;

use crate::bench::Bench;
use crate::row::Row;

/// Rows that are measured together.
#[derive(Clone, Copy)]
pub struct Group {
    /// The group's name.
    pub name: &'static str,
    /// The names of its rows.
    pub rows: &'static [&'static str],
    /// Measures all of them.
    pub measure: fn(&Bench) -> Result<Vec<Row>>,
}

/// All groups, in the order of the report.
pub const GROUPS: [Group; 13] = [
    Group { name: "huge", rows: internal::HUGE, measure: internal::huge },
    Group { name: "quarter", rows: internal::QUARTER, measure: internal::quarter },
    Group { name: "many", rows: many::ROWS, measure: many::measure },
    Group { name: "chain", rows: adding::ROWS, measure: adding::measure },
    Group { name: "nothing", rows: nothing::ROWS, measure: nothing::measure },
    Group { name: "merge", rows: merging::MERGE, measure: merging::merge },
    Group { name: "flatten", rows: merging::FLATTEN, measure: merging::flatten },
    Group { name: "xfs", rows: reflink::XFS, measure: reflink::xfs },
    Group { name: "btrfs", rows: reflink::BTRFS, measure: reflink::btrfs },
    Group { name: "raw", rows: raw::ROWS, measure: raw::measure },
    Group { name: "vhd", rows: vhd::ROWS, measure: vhd::measure },
    Group { name: "served", rows: served::ROWS, measure: served::measure },
    Group { name: "live", rows: live::ROWS, measure: live::measure },
];

/// Group and name of every row.
pub fn names() -> impl Iterator<Item = (&'static str, &'static str)> {
    GROUPS.into_iter().flat_map(|group| group.rows.iter().map(move |row| (group.name, *row)))
}
