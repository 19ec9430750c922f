//! Whether what a plug-in answers can be: before anybody uses it, and before any of it is recorded.
//!
//! Each check gives, in words, what cannot be.

use std::collections::HashSet;

use camino::{Utf8Component, Utf8Path};
use snapcore::{
    ChainFile, DiskInstant, DiskPlan, DiskRecord, DiskRequest, DiskState, Edit, Finding, Group, Layer,
    LayerName, Point, Target,
};

use crate::protocol::{DiscoverResult, FoundPoint, HelloResult, VERSION};

/// What cannot be, if so.
pub(crate) type Checked = Result<(), String>;

/// The longest name of a layer or of a tag, and the longest text for people, in bytes.
const MAX_TEXT: usize = 4096;

/// The most layers, points, steps or findings of one disk.
const MAX_COUNT: usize = 10_000;

/// The longest action of a step, in bytes of JSON.
const MAX_ACTION: usize = 64 << 10;

/// The most ways, each a short word.
const MAX_WAYS: usize = 16;

pub(crate) fn hello(hello: &HelloResult, name: &str) -> Checked {
    if hello.protocol != VERSION {
        return Err(format!("it speaks the protocol {} and not {VERSION}", hello.protocol));
    }
    if hello.format != name {
        return Err(format!("it is called {name} and serves the format {:?}", hello.format));
    }
    let can = &hello.capabilities;
    if !can.internal && !can.external {
        return Err("it can take no point".to_owned());
    }
    if can.max_depth == 0 {
        return Err("its longest chain has no layer".to_owned());
    }
    let word = |way: &String| {
        (1..=32).contains(&way.len())
            && way.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !["internal", "external", "skip"].contains(&way.as_str())
    };
    if can.ways.len() > MAX_WAYS || !can.ways.iter().all(word) {
        return Err(format!("its ways are no words of their own: {:?}", can.ways));
    }
    Ok(())
}

fn text(what: &str, text: &str) -> Checked {
    if text.is_empty() || text.len() > MAX_TEXT {
        let head: String = text.chars().take(64).collect();
        return Err(format!("{what} is empty or too long: {head:?}"));
    }
    Ok(())
}

/// What names something: anything but nothing, and not endless.
fn name(what: &str, name: &str) -> Checked {
    if name.is_empty() || name.len() > MAX_TEXT || name.contains('\0') {
        let head: String = name.chars().take(64).collect();
        return Err(format!("{what} cannot be a name: {head:?}"));
    }
    Ok(())
}

/// Text for people, on one line.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn count(what: &str, number: usize) -> Checked {
    match number {
        0..=MAX_COUNT => Ok(()),
        _ => Err(format!("{number} {what} are more than a disk can have")),
    }
}

/// A path that means the same to everybody.
pub(crate) fn path(what: &str, path: &Utf8Path) -> Checked {
    let plain = path.is_absolute()
        && path.components().all(|part| matches!(part, Utf8Component::RootDir | Utf8Component::Normal(_)))
        && path.file_name().is_some()
        && path.as_str().len() <= MAX_TEXT
        && !path.as_str().contains('\0');
    match plain {
        true => Ok(()),
        false => Err(format!("{what} is no absolute path without dots: {:?}", path.as_str())),
    }
}

/// Manifests are written and removed there, so it must not be a directory of anything else.
pub(crate) fn manifest_directory(directory: &Utf8Path) -> Checked {
    path("the directory of manifests", directory)?;
    match directory.extension() {
        Some("domsnap") => Ok(()),
        _ => Err(format!("the directory of manifests does not end in .domsnap: {directory}")),
    }
}

fn layer_name(name: &LayerName) -> Checked {
    self::name("a layer's name", name.as_str())
}

fn point(point: &Point) -> Checked {
    layer_name(&point.layer)?;
    point.tag.iter().try_for_each(|tag| name("a tag", tag))
}

pub(crate) fn record(record: &DiskRecord, asked: &snapcore::Disk) -> Checked {
    if record.disk != *asked {
        return Err(format!("it took in another disk: {} at {}", record.disk.target, record.disk.path));
    }
    layer_name(&record.active)?;
    count("layers", record.owned.len())?;
    record.owned.iter().try_for_each(layer_name)?;
    match record.owned.contains(&record.active) {
        true => Ok(()),
        false => Err(format!("the active layer {} is not among its own", record.active)),
    }
}

pub(crate) fn state(state: &DiskState, asked: &DiskRecord) -> Checked {
    if state.target != asked.disk.target {
        return Err(format!("it is the state of another disk: {}", state.target));
    }
    if state.active != asked.active {
        return Err(format!("the active layer is {}, and was asked for as {}", state.active, asked.active));
    }
    count("layers", state.layers.len())?;
    let names: HashSet<&LayerName> = state.layers.iter().map(|layer| &layer.name).collect();
    if names.len() != state.layers.len() {
        return Err("two layers have one name".to_owned());
    }
    if !names.contains(&state.active) {
        return Err(format!("the active layer {} is not there", state.active));
    }
    for layer in &state.layers {
        one_layer(layer, &names)?;
    }
    for layer in &state.layers {
        let mut below = layer.backing.as_ref();
        for _ in 0..=state.layers.len() {
            below = below.and_then(|name| state.layer(name)).and_then(|layer| layer.backing.as_ref());
        }
        if below.is_some() {
            return Err(format!("the layers below {} are a loop", layer.name));
        }
    }
    count("images", state.on_path.len() + state.unclear.len())
}

fn one_layer(layer: &Layer, names: &HashSet<&LayerName>) -> Checked {
    layer_name(&layer.name)?;
    path("a layer's file", &layer.file)?;
    text("a layer's format", &layer.format)?;
    if let Some(below) = layer.backing.as_ref().filter(|below| !names.contains(below)) {
        return Err(format!("{} stands on {below}, which is not there", layer.name));
    }
    count("points", layer.internal.len())?;
    let tags: HashSet<&String> = layer.internal.iter().map(|point| &point.tag).collect();
    if tags.len() != layer.internal.len() {
        return Err(format!("two points of {} have one tag", layer.name));
    }
    layer.internal.iter().try_for_each(|point| name("a tag", &point.tag))?;
    count("dependents", layer.dependents.len())
}

pub(crate) fn discovered(found: &DiscoverResult) -> Checked {
    count("layers", found.layers.len())?;
    count("points", found.points.len())?;
    found.layers.iter().try_for_each(layer_name)?;
    for (index, FoundPoint { point: at, parent, name, .. }) in found.points.iter().enumerate() {
        point(at)?;
        if parent.is_some_and(|parent| parent >= index) {
            return Err(format!("the point {name} derives from one that comes after it"));
        }
    }
    Ok(())
}

/// An edit may change the records of the disk alone: what snapshots there are is not a backend's to say.
fn edit(edit: &Edit, target: &Target) -> Checked {
    let of = match edit {
        Edit::SetActive { target, layer }
        | Edit::AddLayer { target, layer }
        | Edit::RemoveLayer { target, layer } => {
            layer_name(layer)?;
            target
        }
        Edit::MovePoint { target, from, to } => {
            point(from)?;
            point(to)?;
            target
        }
        Edit::SetPath { target, path: to } => {
            path("the configured path", to)?;
            target
        }
        other => return Err(format!("it would change what is not its disk's: {other:?}")),
    };
    match of == target {
        true => Ok(()),
        false => Err(format!("it would change another disk: {of}")),
    }
}

pub(crate) fn edits(all: &[Edit], target: &Target) -> Checked {
    count("edits", all.len())?;
    all.iter().try_for_each(|one| edit(one, target))
}

pub(crate) fn plan(plan: &mut DiskPlan, request: &DiskRequest, attached: bool, target: &Target) -> Checked {
    for planned in &mut plan.steps {
        planned.step.summary = plain(&planned.step.summary);
    }
    for note in &mut plan.notes {
        *note = plain(note);
    }
    count("steps", plan.steps.len())?;
    count("notes", plan.notes.len())?;
    if !plan.steps.is_sorted_by_key(|planned| planned.group) {
        return Err("its steps are not sorted by group".to_owned());
    }
    for planned in &plan.steps {
        let step = &planned.step;
        text("a step's summary", &step.summary)?;
        if step.target != *target {
            return Err(format!("the step '{}' is of another disk: {}", step.summary, step.target));
        }
        if step.action.to_string().len() > MAX_ACTION {
            return Err(format!("the action of '{}' is longer than {MAX_ACTION} bytes", step.summary));
        }
        if planned.group != Group::Finish && (!planned.edits.is_empty() || planned.deferrable) {
            return Err(format!(
                "'{}' comes before the commit point, and has edits or can be put off",
                step.summary
            ));
        }
        if planned.inside && !(attached && planned.group == Group::Cut) {
            return Err(format!("'{}' would run inside an instant that there is not", step.summary));
        }
        edits(&planned.edits, target)?;
    }
    edits(&plan.commit, target)?;
    let taken = match request {
        DiskRequest::Create { .. } => true,
        DiskRequest::Revert { save, .. } => save.is_some(),
        _ => false,
    };
    match (&plan.point, taken) {
        (Some(at), true) => point(at)?,
        (None, false) => {}
        (Some(_), false) => return Err("it takes a point that nobody asked for".to_owned()),
        (None, true) => return Err("it takes no point".to_owned()),
    }
    match (&plan.instant, attached && matches!(request, DiskRequest::Create { .. })) {
        (None, false) | (Some(DiskInstant::ByBackend), true) => Ok(()),
        (None, true) => Err("it does not say that it takes the running domain's disk itself".to_owned()),
        (Some(other), _) => Err(format!("a plug-in takes a running domain's disk itself, not by {other:?}")),
    }
}

pub(crate) fn chain(files: &[ChainFile]) -> Checked {
    if files.is_empty() {
        return Err("the configured path opens nothing".to_owned());
    }
    count("files", files.len())?;
    files.iter().try_for_each(|layer| {
        path("a layer's file", &layer.file)?;
        text("a layer's format", &layer.format)
    })
}

pub(crate) fn words(words: &str) -> Checked {
    text("what it says", words)
}

pub(crate) fn findings(all: &mut [Finding]) -> Checked {
    count("findings", all.len())?;
    all.iter_mut().try_for_each(|one| {
        (one.subject, one.message) = (plain(&one.subject), plain(&one.message));
        text("a finding's subject", &one.subject)?;
        text("a finding", &one.message)
    })
}
