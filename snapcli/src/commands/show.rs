//! `domsnap show`

use jiff::Timestamp;
use snapcore::service::Details;
use snapcore::{Consistency, MemoryPoint};

use crate::answer::Answer;
use crate::args::Show;
use crate::commands::change::{kind_word, names};
use crate::commands::du::{freed, reasons_of};
use crate::commands::held::expiry;
use crate::documents::{DeleteDoc, PointDoc, ShowDoc, SnapshotDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;
use crate::units;

/// Shows one snapshot.
pub fn run(session: &Session, args: &Show) -> Result<Answer, Failure> {
    let details = session.ask(session.service.show(&args.domain, &args.name))?;
    Ok(session.reported(document(details), reported))
}

fn document(details: Details) -> ShowDoc {
    let now = Timestamp::now();
    let Details { domain, snapshot, current, parent, children, members, machine, .. } = details;
    let Details { memory_gone, outside, shared, size, .. } = details;
    let points = members.iter().map(|member| PointDoc {
        target: member.target.clone(),
        kind: member.kind,
        layer: member.address.clone(),
        tag: member.point.tag.clone(),
        virtual_size: member.virtual_size,
        allocated: member.allocated,
    });
    ShowDoc {
        domain,
        snapshot: SnapshotDoc {
            name: snapshot.name,
            id: snapshot.id,
            parent,
            current,
            created: snapshot.created,
            description: snapshot.description,
            consistency: snapshot.consistency,
            points: points.collect(),
            memory: snapshot.memory,
            skipped: snapshot.skipped,
            holds: snapshot.holds.into_iter().filter(|hold| hold.is_active(now)).collect(),
            deferred: snapshot.deferred,
            expires: snapshot.expires,
            policy: snapshot.policy,
            group: snapshot.group,
        },
        children,
        machine,
        memory_gone,
        outside,
        shared,
        size,
        delete: members.into_iter().map(|m| DeleteDoc { target: m.target, cost: m.delete }).collect(),
    }
}

fn reported(document: &ShowDoc) -> String {
    let snapshot = &document.snapshot;
    let mut text = String::new();
    let mut line = |what: &str, said: &str| text.push_str(&format!("{what:<12} {said}\n"));
    line("snapshot", snapshot.name.as_str());
    line("domain", document.domain.as_str());
    if !snapshot.description.is_empty() {
        line("description", &snapshot.description);
    }
    let by = if snapshot.policy.is_some() { ", by a policy" } else { "" };
    line("created", &format!("{}{by}", units::time(snapshot.created, &units::zone())));
    line("consistency", consistency(snapshot.consistency));
    line("parent", snapshot.parent.as_ref().map_or("none", |parent| parent.as_str()));
    let children = match document.children.is_empty() {
        true => "none".to_owned(),
        false => names(&document.children),
    };
    line("children", &children);
    line("current", if snapshot.current { "yes" } else { "no" });
    for hold in &snapshot.holds {
        line("held by", &hold.to_string());
    }
    if snapshot.deferred {
        line("deferred", "it is deleted when its last hold ends");
    }
    if let Some(group) = &snapshot.group {
        let domains: Vec<&str> = group.domains.iter().map(|name| name.as_str()).collect();
        line("group", &format!("{}, at one instant ({})", domains.join(", "), group.id));
    }
    if let Some(expiry) = expiry(snapshot.expires, Timestamp::now()) {
        line("expiry", &expiry);
    }
    line("id", &snapshot.id.to_string());
    if let Some(memory) = &snapshot.memory {
        line("memory", &memory_text(memory, document.memory_gone));
    }
    if let Some(machine) = &document.machine {
        line("machine", machine);
    }
    if !document.outside.is_empty() {
        let but = match snapshot.memory {
            Some(_) => "only in the memory; a revert without it leaves them in their later state",
            None => "a revert leaves them in their later state",
        };
        line("not included", &format!("{}: {but}", document.outside.join(", ")));
    }
    if !document.shared.is_empty() {
        line(
            "not included",
            &format!("{}: a revert leaves them as they are then", document.shared.join(", ")),
        );
    }
    for disk in &snapshot.skipped {
        line("skipped", &format!("{} ({}): the snapshot holds nothing of it", disk.target, disk.image));
    }
    text.push('\n');
    let rows = snapshot.points.iter().map(|point| {
        let file = match &point.tag {
            Some(tag) => format!("{} (tag {tag})", point.layer),
            None => point.layer.to_string(),
        };
        vec![
            point.target.to_string(),
            kind_word(point.kind).to_owned(),
            units::bytes(point.virtual_size),
            units::bytes_or_dash(point.allocated),
            file,
        ]
    });
    text.push_str(&table(&["DISK", "KIND", ">DISK SIZE", ">FILE SIZE", "FILE"], rows));
    text.push('\n');
    let size = &document.size;
    text.push_str(&format!("deleting it would free {}", freed(&size.alone.total)));
    if let (Some(referenced), Some(shared)) = (size.referenced, size.shared) {
        let (referenced, shared) = (units::bytes(referenced), units::bytes(shared));
        text.push_str(&format!("; it refers to {referenced}, and shares {shared} of that"));
    }
    text.push('\n');
    for reason in reasons_of(&size.alone) {
        text.push_str(&format!("  {reason}\n"));
    }
    text
}

fn memory_text(memory: &MemoryPoint, is_gone: bool) -> String {
    let state = if memory.running { "running" } else { "paused" };
    let gone = match (is_gone, memory.image.local()) {
        (true, Some(_)) => "; the file is gone: without it only the disks can be reverted (--off)",
        (true, None) => "; the image is gone: without it only the disks can be reverted (--off)",
        (false, _) => "",
    };
    format!("{}, of a guest that was {state}: {}{gone}", memory_size(memory), memory.image)
}

/// Formats the size of a memory image, as stored and as unpacked.
pub fn memory_size(memory: &MemoryPoint) -> String {
    let stored = units::bytes(memory.bytes);
    match memory.full {
        Some(full) => format!("{stored} ({} unpacked)", units::bytes(full)),
        None => stored,
    }
}

fn consistency(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Crash => "crash: as after a power failure",
        Consistency::Filesystem => "filesystem: flushed and frozen by the guest",
        Consistency::Clean => "clean: the domain was shut down",
        Consistency::Memory => "memory: memory and disks of one instant",
        _ => "unknown: not recorded",
    }
}
