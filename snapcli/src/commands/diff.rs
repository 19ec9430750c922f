//! `diff`.

use serde::Serialize;
use snapcore::service::{DiffReport, DiffRequest, DiskDiff};
use snapcore::{Error, ErrorKind};

use crate::answer::{self, Answer};
use crate::args::{Diff, DiffFormat};
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;
use crate::units;

/// `domsnap diff`
pub fn run(session: &Session, args: Diff) -> Result<Answer, Failure> {
    let request = DiffRequest::new(args.from).to(args.to).disks(args.disks).exact(args.exact);
    let report = session.ask(session.service.diff(&args.domain, &request))?;
    match args.format {
        Some(DiffFormat::Map) => match &report.disks[..] {
            [only] => Ok(Answer::text(answer::json(&map(only)))),
            several => {
                let targets: Vec<&str> = several.iter().map(|disk| disk.target.as_str()).collect();
                Err(Error::new(
                    ErrorKind::Usage,
                    format!("the form map is of one disk, and {} are compared", several.len()),
                )
                .state("no changes made")
                .advise(format!("name one with --disk: {}", targets.join(", ")))
                .into())
            }
        },
        Some(DiffFormat::Json) => Ok(Answer::document(report)),
        Some(DiffFormat::Table) | None => Ok(session.reported(report, shown)),
    }
}

/// An extent as `qemu-img map --output=json` prints one.
#[derive(Serialize)]
struct Mapped {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
}

/// The whole disk in extents, as if the second state were an overlay on the first one.
fn map(disk: &DiskDiff) -> Vec<Mapped> {
    let mut extents: Vec<Mapped> = Vec::new();
    let unchanged = |start: u64, end: u64| Mapped {
        start,
        length: end.saturating_sub(start),
        depth: 1,
        present: false,
        zero: false,
        data: false,
    };
    let mut at = 0;
    for extent in &disk.extents {
        if extent.start > at {
            extents.push(unchanged(at, extent.start));
        }
        extents.push(Mapped {
            start: extent.start,
            length: extent.length,
            depth: 0,
            present: true,
            zero: extent.zero,
            data: !extent.zero,
        });
        at = extent.start.saturating_add(extent.length);
    }
    if at < disk.to_size {
        extents.push(unchanged(at, disk.to_size));
    }
    extents
}

fn shown(report: &DiffReport) -> String {
    let mut text = String::new();
    for disk in &report.disks {
        let to = report.to.as_ref().map_or("the current state", |name| name.as_str());
        let rows: Vec<Vec<String>> = disk
            .extents
            .iter()
            .map(|extent| {
                let what = if extent.zero { "zeros" } else { "data" };
                vec![extent.start.to_string(), extent.length.to_string(), what.to_owned()]
            })
            .collect();
        let at_most = if disk.exact || disk.changed == 0 { "" } else { "at most " };
        text.push_str(&format!(
            "{}: {at_most}{} differ between {} and {to}\n",
            disk.target,
            units::bytes(disk.changed),
            report.from
        ));
        if disk.from_size != disk.to_size {
            text.push_str(&format!("  the disk has {} bytes, and had {}\n", disk.to_size, disk.from_size));
        }
        if !rows.is_empty() {
            text.push_str(&table(&[">START", ">LENGTH", "CONTENT"], rows));
        }
    }
    for note in &report.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}
