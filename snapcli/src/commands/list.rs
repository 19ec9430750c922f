//! `domsnap list`

use std::collections::BTreeMap;

use anstyle::{AnsiColor, Style};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use snapcore::backend::{DiskState, Layer};
use snapcore::service::{DiskReport, DomainRef, Unfinished};

use crate::answer::Answer;
use crate::args::List;
use crate::documents::{ListAllDoc, ListDoc, PointDoc, PreviousDoc, SnapshotDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::table::{indent, table};
use crate::tree::{self, Signs};
use crate::{
    commands::{
        change::names,
        held::{marks, previous},
        show::memory_size,
    },
    units,
};

/// Lists the snapshots of one domain, or of all.
pub fn run(session: &Session, args: &List) -> Result<Answer, Failure> {
    if let Some(domain) = &args.domain {
        let document = read(session, domain, args)?;
        return Ok(session.reported(document, |document| reported(document, args, None)));
    }
    let mut domains = Vec::new();
    for summary in session.ask(session.service.domains())? {
        domains.push(read(session, &DomainRef::Name(summary.domain.name), args)?);
    }
    Ok(session.reported(ListAllDoc { domains }, |document| {
        if document.domains.is_empty() {
            return "no domains are known; `domsnap domain add` registers one\n".to_owned();
        }
        let parts: Vec<String> = document
            .domains
            .iter()
            .map(|domain| reported(domain, args, Some(&domain.domain.to_string())))
            .collect();
        parts.join("\n")
    }))
}

fn read(session: &Session, domain: &DomainRef, args: &List) -> Result<ListDoc, Failure> {
    let listing = session.ask(session.service.list(domain))?;
    let mut document = ListDoc::of(&listing, session.service.registry());
    if args.disks {
        document.disks = Some(session.ask(session.service.inspect(domain))?);
    }
    Ok(document)
}

fn reported(document: &ListDoc, args: &List, title: Option<&str>) -> String {
    let zone = units::zone();
    let mut text = match (args.tree, document.snapshots.is_empty()) {
        (true, _) => drawn(&document.snapshots, Signs::fitting(), &zone),
        (false, true) => format!("{} has no snapshots\n", document.domain),
        (false, false) => tabled(&document.snapshots, &zone),
    };
    if let Some(state) = &document.previous {
        text.push_str(&previous(document.domain.as_str(), state, Timestamp::now()));
    }
    if let Some(title) = title {
        text = format!("{title}\n{}", indent(&text, "  "));
    }
    for disk in document.disks.iter().flatten() {
        text.push('\n');
        text.push_str(&layers(disk, &document.snapshots, document.previous.as_ref()));
    }
    if document.disks.is_some() {
        text.push_str(&memory(&document.snapshots));
    }
    text + &stopped(&document.unfinished, document.domain.as_str())
}

fn tabled(snapshots: &[SnapshotDoc], zone: &TimeZone) -> String {
    let now = Timestamp::now();
    let rows = snapshots.iter().map(|snapshot| {
        vec![
            if snapshot.current { "*" } else { "" }.to_owned(),
            snapshot.name.to_string(),
            snapshot.parent.as_ref().map_or("-".to_owned(), ToString::to_string),
            units::time(snapshot.created, zone),
            kinds(snapshot),
            consistency(snapshot),
            units::bytes_or_dash(snapshot.size()),
            described(snapshot, now),
        ]
    });
    let described = snapshots.iter().any(|snapshot| !described(snapshot, now).is_empty());
    let columns = ["", "NAME", "PARENT", "CREATED", "KIND", "CONSISTENCY", ">SIZE", "DESCRIPTION"];
    match described {
        true => table(&columns, rows),
        false => table(
            &columns[..7],
            rows.map(|mut row| {
                row.truncate(7);
                row
            }),
        ),
    }
}

/// The description of a snapshot, and what keeps or ends it.
fn described(snapshot: &SnapshotDoc, now: Timestamp) -> String {
    let group = snapshot.group.as_ref().map(|group| format!("group of {}", group.domains.len()));
    let marks = marks(&snapshot.holds, snapshot.deferred, snapshot.expires, now);
    let marks: Vec<String> = group.into_iter().chain((!marks.is_empty()).then_some(marks)).collect();
    match (snapshot.description.as_str(), marks.join("; ")) {
        (text, marks) if marks.is_empty() => text.to_owned(),
        ("", marks) => format!("[{marks}]"),
        (text, marks) => format!("{text} [{marks}]"),
    }
}

/// The kind of a snapshot: int, ext or mixed.
fn kinds(snapshot: &SnapshotDoc) -> String {
    let memory = if snapshot.memory.is_some() { "+mem" } else { "" };
    let skipped: Vec<&str> = snapshot.skipped.iter().map(|disk| disk.target.as_str()).collect();
    let without = if skipped.is_empty() { String::new() } else { format!(" without {}", skipped.join(", ")) };
    format!("{}{memory}{without}", snapshot.kind())
}

fn consistency(snapshot: &SnapshotDoc) -> String {
    // The word of the documents, so that there is one.
    serde_json::to_value(snapshot.consistency)
        .ok()
        .and_then(|word| word.as_str().map(str::to_owned))
        .unwrap_or_default()
}

fn drawn(snapshots: &[SnapshotDoc], signs: Signs, zone: &TimeZone) -> String {
    let places: BTreeMap<_, _> =
        snapshots.iter().enumerate().map(|(index, snapshot)| (&snapshot.name, index)).collect();
    let parents: Vec<Option<usize>> = snapshots
        .iter()
        .map(|snapshot| snapshot.parent.as_ref().and_then(|parent| places.get(parent).copied()))
        .collect();
    let lines = tree::draw(&parents, snapshots.iter().position(|snapshot| snapshot.current), signs);
    let name = |node: Option<usize>| node.map_or("now", |index| snapshots[index].name.as_str());
    let width = |line: &tree::Line| line.graph.chars().count() + name(line.node).len();
    let widest = lines.iter().map(width).max().unwrap_or(0);
    let sizes: Vec<String> =
        snapshots.iter().map(|snapshot| snapshot.size().map(units::bytes).unwrap_or_default()).collect();
    let widest_kind = snapshots.iter().map(|snapshot| kinds(snapshot).len()).max().unwrap_or(0);
    let digits = sizes.iter().map(String::len).max().unwrap_or(0);
    let now = AnsiColor::Green.on_default().bold();
    let dim = Style::new().dimmed();
    let moment = Timestamp::now();
    let mut text = String::new();
    for line in &lines {
        let Some(index) = line.node else {
            text.push_str(&format!("{}{now}now{now:#}\n", line.graph));
            continue;
        };
        let snapshot = &snapshots[index];
        let gap = " ".repeat(widest - width(line));
        let time = units::time(snapshot.created, zone);
        let facts = format!("{time}  {:widest_kind$}  {:>digits$}", kinds(snapshot), sizes[index]);
        let row = match described(snapshot, moment).as_str() {
            "" => format!("{}{}{gap}  {dim}{}{dim:#}", line.graph, snapshot.name, facts.trim_end()),
            message => format!("{}{}{gap}  {dim}{facts}{dim:#}  {message}", line.graph, snapshot.name),
        };
        text.push_str(&row);
        text.push('\n');
    }
    text
}

/// One disk's layers: each file, its size, and what it is there for.
pub fn layers(disk: &DiskReport, snapshots: &[SnapshotDoc], previous: Option<&PreviousDoc>) -> String {
    let record = &disk.record.disk;
    let mut text = format!("{}  {} ({})\n", record.target, record.address, record.format);
    if let Some(problem) = &disk.problem {
        text.push_str(&format!("  cannot be read: {problem}\n"));
    }
    let Some(state) = &disk.state else { return text };
    let rows = state.layers.iter().map(|layer| {
        vec![
            shown_name(layer),
            units::bytes(layer.allocated),
            units::bytes(layer.virtual_size),
            holds(layer, state, disk, snapshots, previous),
        ]
    });
    text.push_str(&indent(&table(&["LAYER", ">ON DISK", ">DISK SIZE", "HOLDS"], rows), "  "));
    text
}

/// The memory images, if there are any.
fn memory(snapshots: &[SnapshotDoc]) -> String {
    let row = |snapshot: &SnapshotDoc| {
        let memory = snapshot.memory.as_ref()?;
        Some(vec![memory.image.to_string(), memory_size(memory), snapshot.name.to_string()])
    };
    let rows: Vec<_> = snapshots.iter().filter_map(row).collect();
    match rows.is_empty() {
        true => String::new(),
        false => format!("\nmemory\n{}", indent(&table(&["FILE", ">SIZE", "OF"], rows), "  ")),
    }
}

fn shown_name(layer: &Layer) -> String {
    match layer.named {
        true => layer.name.to_string(),
        // No file has its permanent name yet: only the configured path leads to it.
        false => layer.address.name().to_owned(),
    }
}

fn holds(
    layer: &Layer,
    state: &DiskState,
    disk: &DiskReport,
    snapshots: &[SnapshotDoc],
    previous: Option<&PreviousDoc>,
) -> String {
    let mut parts = Vec::new();
    if layer.name == state.active {
        parts.push("current state".to_owned());
    }
    let has = |points: &[PointDoc], tag: Option<&str>| {
        points.iter().any(|point| {
            point.target == state.target
                && point.tag.as_deref() == tag
                && same_file(point.layer.as_str(), layer)
        })
    };
    let mine = |snapshot: &&SnapshotDoc, tag: Option<&str>| has(&snapshot.points, tag);
    let replaced = |tag: Option<&str>| previous.is_some_and(|previous| has(&previous.points, tag));
    if replaced(None) {
        parts.push("replaced state".to_owned());
    }
    for snapshot in snapshots.iter().filter(|snapshot| mine(snapshot, None)) {
        parts.push(snapshot.name.to_string());
    }
    for point in &layer.internal {
        match snapshots.iter().find(|snapshot| mine(snapshot, Some(&point.tag))) {
            Some(snapshot) => parts.push(format!("{} (internal)", snapshot.name)),
            None if replaced(Some(&point.tag)) => parts.push("replaced state (internal)".to_owned()),
            None => parts.push(format!("tag {} (of no snapshot)", point.tag)),
        }
    }
    if disk.orphans.contains(&layer.name) {
        parts.push(match state.children(&layer.name).count() {
            0 => "intermediate layer".to_owned(),
            1 => "intermediate layer: 1 layer depends on it".to_owned(),
            n => format!("intermediate layer: {n} layers depend on it"),
        });
    }
    if !layer.owned {
        parts.push("external base image (read-only)".to_owned());
    }
    match layer.dependents.len() {
        0 => {}
        n => parts.push(format!("backing file of {}", units::count(n, "other image"))),
    }
    parts.join(", ")
}

fn same_file(point: &str, layer: &Layer) -> bool {
    point == layer.address.as_str()
        || point.rsplit('/').next() == Some(layer.name.as_str())
        || point == layer.name.as_str()
}

/// Formats interrupted operations and the command to run.
pub fn stopped(unfinished: &[Unfinished], domain: &str) -> String {
    let yellow = AnsiColor::Yellow.on_default();
    let line = |operation: &Unfinished| {
        format!(
            "\n{yellow}a {} of {} stopped half way, or runs just now ({}){yellow:#}; `domsnap recover {domain}` finishes or undoes it\n",
            operation.operation,
            names(&operation.snapshots),
            operation.state
        )
    };
    unfinished.iter().map(line).collect()
}
