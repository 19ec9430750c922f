//! `domsnap du`

use snapcore::backend::{Certainty, DeleteCost};
use snapcore::service::{SetSize, SizeReport, SnapshotSize};

use crate::answer::Answer;
use crate::args::Du;
use crate::commands::change::names;
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;
use crate::units;

/// Shows the space that snapshots take, and what a delete of them frees.
pub fn run(session: &Session, args: &Du) -> Result<Answer, Failure> {
    let report = session.ask(session.service.sizes(&args.domain, &args.names))?;
    Ok(session.reported(report, reported))
}

fn reported(report: &SizeReport) -> String {
    if report.snapshots.is_empty() && report.previous.is_none() {
        return format!("{} has no snapshots\n", report.domain);
    }
    let named = report.snapshots.iter().map(|snapshot| (snapshot.name.to_string(), snapshot));
    let previous = report.previous.iter().map(|previous| ("(replaced state)".to_owned(), previous));
    let rows: Vec<(String, &SnapshotSize)> = named.chain(previous).collect();
    let cells = rows.iter().map(|(name, size)| {
        vec![
            name.clone(),
            units::bytes_or_dash(size.referenced),
            bytes(&size.alone.total),
            units::bytes_or_dash(size.shared),
        ]
    });
    let mut text = table(&["SNAPSHOT", ">REFERENCED", ">EXCLUSIVE", ">SHARED"], cells);
    if !report.snapshots.is_empty() {
        let all: Vec<_> = report.snapshots.iter().map(|snapshot| snapshot.name.clone()).collect();
        let which = match all.len() {
            n if n > 4 => format!("these {n} snapshots"),
            _ => names(&all),
        };
        text.push_str(&format!("deleting {which} frees {}\n", freed(&report.together.total)));
    }
    let mut reasons: Vec<String> = Vec::new();
    let sizes = rows.iter().map(|(_, size)| &size.alone).chain([&report.together]);
    for reason in sizes.flat_map(reasons_of) {
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }
    for reason in reasons {
        text.push_str(&format!("  {reason}\n"));
    }
    text
}

/// Why the numbers of a set are what they are, disk by disk.
pub fn reasons_of(size: &SetSize) -> Vec<String> {
    let disks = size.disks.iter().map(|disk| (disk.target.as_str(), &disk.delete));
    let parts = disks.chain(size.memory.iter().map(|memory| ("memory", memory)));
    parts.filter_map(|(part, cost)| Some(format!("{part}: {}", cost.why.as_ref()?))).collect()
}

/// The freed bytes, with a word on how certain they are.
pub fn bytes(cost: &DeleteCost) -> String {
    certain(cost.freed(), cost.certainty)
}

/// A number of bytes, with a word on how certain it is.
pub fn certain(bytes: u64, certainty: Certainty) -> String {
    let word = match certainty {
        Certainty::Exact => "",
        Certainty::AtMost => "at most ",
        Certainty::Estimate => "about ",
        Certainty::Unknown if bytes == 0 => return "unknown".to_owned(),
        Certainty::Unknown => "at least ",
    };
    format!("{word}{}", units::bytes(bytes))
}

/// The freed bytes, where they become free, and what is moved.
pub fn freed(cost: &DeleteCost) -> String {
    if cost.certainty == Certainty::Unknown && cost.freed() == 0 {
        return "an unknown amount".to_owned();
    }
    let mut text = match (cost.frees, cost.inside) {
        (frees, 0) => format!("{} on the disk", certain(frees, cost.certainty)),
        (0, inside) => {
            format!("{} inside the images, nothing on the disk", certain(inside, cost.certainty))
        }
        (frees, inside) => {
            format!(
                "{} on the disk, and {} inside the images",
                certain(frees, cost.certainty),
                units::bytes(inside)
            )
        }
    };
    if cost.moves > 0 {
        text.push_str(&format!(", and moves {}", units::bytes(cost.moves)));
    }
    text
}
