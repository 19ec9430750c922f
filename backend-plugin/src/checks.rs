//! Checks of a plug-in's answers, before any code uses them and before any of them is recorded.
//!
//! Each check returns a description of what is invalid.

use std::collections::HashSet;

use camino::Utf8Path;
use confined_files::FileName;
use snapcore::backend::{DeleteCost, DiskPlan, DiskRequest, DiskState, Finding, Layer};
use snapcore::hypervisor::{DiskInstant, OpenLayer};
use snapcore::{Disk, DiskAddress, DiskRecord, Edit, LayerName, Point};

use crate::protocol::{DiscoverResult, FoundPoint, HelloResult, VERSION};

/// Result of a check: a description of what is invalid, if anything.
pub(crate) type Checked = Result<(), String>;

/// The longest text for people, and the longest path (`PATH_MAX`), in bytes.
const MAX_TEXT: usize = 4096;

/// The longest name in a path (`NAME_MAX`), in bytes.
const MAX_COMPONENT: usize = 255;

/// The longest name of a format, in bytes.
const MAX_FORMAT: usize = 32;

/// The largest size of anything, in bytes. The largest file of Linux is 8 times as long. Sums of these do not
/// overflow.
const MAX_SIZE: u64 = 1 << 60;

/// The largest number of layers, points, steps or findings of one disk.
const MAX_COUNT: usize = 10_000;

/// The longest action of a step, in bytes of JSON.
const MAX_ACTION: usize = 64 << 10;

/// The largest number of methods, each a short word.
const MAX_METHODS: usize = 16;

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
    let word = |method: &String| {
        (1..=32).contains(&method.len())
            && method.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !["internal", "external", "skip"].contains(&method.as_str())
    };
    if can.methods.len() > MAX_METHODS || !can.methods.iter().all(word) {
        return Err(format!("its methods have invalid or reserved names: {:?}", can.methods));
    }
    Ok(())
}

fn text(what: &str, text: &str) -> Checked {
    if text.is_empty() || text.len() > MAX_TEXT {
        return Err(format!("{what} is empty or too long: {}", head(text)));
    }
    Ok(())
}

/// Checks a name that the plug-in may use as a file name: one component, printable on one line.
fn name(what: &str, name: &str) -> Checked {
    let control = name.chars().any(char::is_control);
    match FileName::new(name) {
        Ok(_) if !control => Ok(()),
        Ok(_) => Err(format!("{what} has a control character: {}", head(name))),
        Err(_) => Err(format!(
            "{what} cannot be a name, of 1 to 255 bytes without '/', '.' and '..': {}",
            head(name)
        )),
    }
}

/// Returns the beginning of an answer, fit for a message.
fn head(text: &str) -> String {
    format!("{:?}", text.chars().take(64).collect::<String>())
}

fn size(what: &str, bytes: u64) -> Checked {
    match bytes {
        0..=MAX_SIZE => Ok(()),
        _ => Err(format!("{what} of {bytes} bytes is more than a disk can have")),
    }
}

/// Makes text for people fit for one line.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn count(what: &str, number: usize) -> Checked {
    match number {
        0..=MAX_COUNT => Ok(()),
        _ => Err(format!("{number} {what} are more than a disk can have")),
    }
}

/// Checks a path: absolute, canonical, and valid for a file system. Control characters are only allowed if
/// the disk's own path `of` has some.
pub(crate) fn path(what: &str, path: &Utf8Path, of: &Utf8Path) -> Checked {
    let is_control = |text: &str| text.chars().any(char::is_control);
    let text = path.as_str();
    let plain = text.starts_with('/')
        && DiskAddress::from(path).check().is_ok()
        && path.file_name().is_some()
        && text.len() < MAX_TEXT
        && text.split('/').all(|part| part.len() <= MAX_COMPONENT)
        && (!is_control(text) || is_control(of.as_str()));
    match plain {
        true => Ok(()),
        false => Err(format!("{what} is not an absolute canonical path: {}", head(text))),
    }
}

/// Checks the address of an image: a plug-in has files and block devices only.
pub(crate) fn address(what: &str, address: &DiskAddress, of: &Utf8Path) -> Checked {
    path(what, Utf8Path::new(address.as_str()), of)
}

fn format(name: &str) -> Checked {
    let word = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    match (1..=MAX_FORMAT).contains(&name.len()) && name.chars().all(word) {
        true => Ok(()),
        false => Err(format!("a layer has an invalid name of a format: {}", head(name))),
    }
}

/// Checks the directory of manifests. Files are written and removed there, so it must not be a directory of
/// anything else.
pub(crate) fn manifest_directory(directory: &Utf8Path, of: &Utf8Path) -> Checked {
    path("the directory of manifests", directory, of)?;
    match directory.extension() {
        Some("domsnap") => Ok(()),
        _ => Err(format!("the directory of manifests does not end in .domsnap: {directory}")),
    }
}

fn layer_name(name: &LayerName) -> Checked {
    self::name("a layer's name", name.as_str())
}

/// Checks the name of a layer that may be an image of another owner, which is known by its path.
fn any_layer_name(name: &LayerName, owned: bool, of: &Utf8Path) -> Checked {
    match name.is_elsewhere() && !owned {
        true => path("the name of a layer elsewhere", Utf8Path::new(name.as_str()), of),
        false => layer_name(name),
    }
}

fn point(point: &Point) -> Checked {
    layer_name(&point.layer)?;
    point.tag.iter().try_for_each(|tag| name("a tag", tag))
}

pub(crate) fn record(record: &DiskRecord, asked: &snapcore::Disk) -> Checked {
    if record.disk != *asked {
        return Err(format!("it took in another disk: {} at {}", record.disk.target, record.disk.path()));
    }
    layer_name(&record.active)?;
    count("layers", record.owned.len())?;
    record.owned.iter().try_for_each(layer_name)?;
    match record.owned.contains(&record.active) {
        true => Ok(()),
        false => Err(format!("the active layer {} is not among its own", record.active)),
    }
}

pub(crate) fn state(state: &mut DiskState, asked: &DiskRecord) -> Checked {
    for undetermined in &mut state.undetermined {
        undetermined.why = plain(&undetermined.why);
    }
    let (state, of) = (&*state, asked.disk.path());
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
        one_layer(layer, &names, of)?;
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
    count("images", state.path_dependents.len().saturating_add(state.undetermined.len()))?;
    state.path_dependents.iter().try_for_each(|image| address("an image", image, of))?;
    state.undetermined.iter().try_for_each(|undetermined| {
        address("a file", &undetermined.file, of)?;
        text("a reason", &undetermined.why)
    })
}

fn one_layer(layer: &Layer, names: &HashSet<&LayerName>, of: &Utf8Path) -> Checked {
    any_layer_name(&layer.name, layer.owned, of)?;
    address("a layer's file", &layer.address, of)?;
    format(&layer.format)?;
    size("a layer", layer.virtual_size)?;
    size("a layer", layer.allocated)?;
    if let Some(below) = layer.backing.as_ref().filter(|below| !names.contains(below)) {
        return Err(format!("{} is backed by {below}, which does not exist", layer.name));
    }
    count("points", layer.internal.len())?;
    let tags: HashSet<&String> = layer.internal.iter().map(|point| &point.tag).collect();
    if tags.len() != layer.internal.len() {
        return Err(format!("two points of {} have one tag", layer.name));
    }
    for point in &layer.internal {
        name("a tag", &point.tag)?;
        size("a point", point.virtual_size)?;
        size("a point's memory", point.vm_state_size)?;
    }
    count("dependents", layer.dependents.len())?;
    layer.dependents.iter().try_for_each(|image| address("a dependent", image, of))
}

pub(crate) fn discovered(found: &DiscoverResult) -> Checked {
    count("layers", found.layers.len())?;
    count("points", found.points.len())?;
    found.layers.iter().try_for_each(layer_name)?;
    for (index, FoundPoint { point: at, parent, name, virtual_size, .. }) in found.points.iter().enumerate() {
        point(at)?;
        size("a point", *virtual_size)?;
        if parent.is_some_and(|parent| parent >= index) {
            return Err(format!("the point {name} derives from one that comes after it"));
        }
    }
    Ok(())
}

/// Checks that an edit only changes the records of this disk: a backend has no say about snapshots. The
/// configured path may get another name in its own directory.
fn edit(edit: &Edit, disk: &Disk) -> Checked {
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
            address("the configured path", to, disk.path())?;
            if to.path().parent() != disk.path().parent() {
                return Err(format!("the configured path would leave its directory: {to}"));
            }
            target
        }
        other => return Err(format!("it would change what is not its disk's: {other:?}")),
    };
    match *of == disk.target {
        true => Ok(()),
        false => Err(format!("it would change another disk: {of}")),
    }
}

pub(crate) fn edits(all: &[Edit], disk: &Disk) -> Checked {
    count("edits", all.len())?;
    all.iter().try_for_each(|one| edit(one, disk))
}

pub(crate) fn plan(plan: &mut DiskPlan, request: &DiskRequest, attached: bool, disk: &Disk) -> Checked {
    let target = &disk.target;
    let nested = plan.instant.iter_mut().flat_map(|instant| &mut instant.nested);
    let before_commit = plan.prepare.iter_mut().chain(nested).chain(&mut plan.cut);
    for step in before_commit.chain(plan.finish.iter_mut().map(|finish| &mut finish.step)) {
        step.summary = plain(&step.summary);
    }
    for note in &mut plan.notes {
        *note = plain(note);
    }
    count("steps", plan.steps().count())?;
    count("notes", plan.notes.len())?;
    plan.notes.iter().try_for_each(|note| text("a note", note))?;
    plan.reserves.iter().try_for_each(|reserves| text("what a kept state reserves", reserves))?;
    for step in plan.steps() {
        text("a step's summary", &step.summary)?;
        size("a step", step.bytes)?;
        if step.target != *target {
            return Err(format!("the step '{}' is of another disk: {}", step.summary, step.target));
        }
        if step.action.to_string().len() > MAX_ACTION {
            return Err(format!("the action of '{}' is longer than {MAX_ACTION} bytes", step.summary));
        }
    }
    for finish in &plan.finish {
        if !finish.nested.is_empty() {
            return Err(format!("steps are nested in '{}', which provides no moment", finish.step.summary));
        }
        edits(&finish.edits, disk)?;
    }
    edits(&plan.commit, disk)?;
    let taken = match request {
        DiskRequest::Create { .. } => true,
        DiskRequest::Revert { save, .. } => save.is_some(),
        _ => false,
    };
    match (&plan.point, taken) {
        (Some(at), true) => point(at)?,
        (None, false) => {}
        (Some(_), false) => return Err("it takes a snapshot that was not requested".to_owned()),
        (None, true) => return Err("it takes no point".to_owned()),
    }
    let take = plan.instant.as_ref().map(|instant| &instant.take);
    match (take, attached && matches!(request, DiskRequest::Create { .. })) {
        (None, false) | (Some(DiskInstant::ByBackend), true) => Ok(()),
        (Some(DiskInstant::ByBackend), false) => {
            Err("it takes the disk in an instant that there is not".to_owned())
        }
        (None, true) => Err("it does not say that it takes the running domain's disk itself".to_owned()),
        (Some(other), _) => Err(format!("a plug-in takes a running domain's disk itself, not by {other:?}")),
    }
}

pub(crate) fn chain(files: &[OpenLayer], of: &Utf8Path) -> Checked {
    if files.is_empty() {
        return Err("the configured path opens nothing".to_owned());
    }
    count("files", files.len())?;
    files.iter().try_for_each(|layer| {
        address("a layer's file", &layer.address, of)?;
        format(&layer.format)
    })
}

pub(crate) fn cost(cost: &mut DeleteCost) -> Checked {
    size("what a delete frees", cost.frees)?;
    size("what a delete frees inside", cost.inside)?;
    cost.why = cost.why.as_deref().map(plain);
    cost.why.as_deref().map_or(Ok(()), |why| text("why it is not exact", why))?;
    size("what a delete moves", cost.moves)
}

pub(crate) fn message(message: &str) -> Checked {
    text("what it says", message)
}

pub(crate) fn findings(all: &mut [Finding]) -> Checked {
    count("findings", all.len())?;
    all.iter_mut().try_for_each(|one| {
        (one.subject, one.message) = (plain(&one.subject), plain(&one.message));
        text("a finding's subject", &one.subject)?;
        text("a finding", &one.message)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use snapcore::Disk;
    use snapcore::backend::Certainty;

    use super::*;

    const LEADING_OUT: [&str; 8] = ["", ".", "..", "a/b", "../a", "/etc/passwd", "a\0b", "a\nb"];

    fn state_with(change: impl Fn(&mut Value)) -> Checked {
        let record = json!({ "target": "vda", "path": "/vm/a.img", "format": "dir", "active": "disk", "owned": ["disk"] });
        let record: DiskRecord = serde_json::from_value(record).unwrap();
        let point =
            json!({ "tag": "t", "virtual_size": 1, "created": "2026-01-01T00:00:00Z", "vm_state_size": 0 });
        let layer = json!({
            "name": "disk", "file": "/vm/a.img", "format": "dir", "named": false, "backing": null, "owned": true,
            "virtual_size": 1, "allocated": 1, "internal": [point], "dependents": ["/vm/b"]
        });
        let mut base = layer.clone();
        (base["name"], base["owned"]) = (json!("/base/b.img"), json!(false));
        let mut state = json!({ "target": "vda", "active": "disk", "layers": [layer, base], "path_dependents": [],
            "undetermined": [{ "file": "/vm/c", "why": "it cannot\nbe read" }] });
        change(&mut state);
        let mut state: DiskState = serde_json::from_value(state).unwrap();
        super::state(&mut state, &record)
    }

    #[test]
    fn names_and_paths_of_a_state_cannot_lead_out() {
        state_with(|_| ()).unwrap();
        let long = "x".repeat(256);
        for bad in LEADING_OUT.into_iter().chain([long.as_str()]) {
            for place in ["/active", "/layers/0/name", "/layers/0/internal/0/tag"] {
                let refused = state_with(|state| *state.pointer_mut(place).unwrap() = json!(bad));
                refused.expect_err(&format!("{place}: {bad:?}"));
            }
        }
        // An image of another owner is known by its path. A layer that would be removed is not.
        state_with(|state| state["layers"][1]["owned"] = json!(true)).unwrap_err();
        let paths = ["", "a", "/a/../b", "/a/./b", "/a//b", "/a\nb", "/a\u{1b}[31m", "/"];
        let (long, deep) = (format!("/{long}"), "/x".repeat(2048));
        for bad in paths.into_iter().chain([long.as_str(), deep.as_str()]) {
            for place in ["/layers/0/file", "/layers/0/dependents/0", "/undetermined/0/file"] {
                let refused = state_with(|state| *state.pointer_mut(place).unwrap() = json!(bad));
                refused.expect_err(&format!("{place}: {bad:?}"));
            }
            if bad.contains('/') {
                state_with(|state| state["layers"][1]["name"] = json!(bad)).expect_err(bad);
            }
            let refused = state_with(|state| state["path_dependents"] = json!([bad]));
            refused.expect_err(&format!("path_dependents: {bad:?}"));
        }
    }

    #[test]
    fn sizes_of_a_state_cannot_overflow() {
        for place in ["/layers/0/virtual_size", "/layers/0/allocated", "/layers/0/internal/0/vm_state_size"] {
            let refused = state_with(|state| *state.pointer_mut(place).unwrap() = json!(u64::MAX));
            assert!(refused.unwrap_err().contains("more than a disk can have"), "{place}");
        }
        super::cost(&mut DeleteCost::new(u64::MAX, 0)).unwrap_err();
        super::cost(&mut DeleteCost::new(0, 0).inside(u64::MAX)).unwrap_err();
        let mut strange = DeleteCost::new(1, 0).but(Certainty::Unknown, "no\u{1b}[31m\nidea");
        super::cost(&mut strange).unwrap();
        assert!(!strange.why.unwrap().contains(char::is_control));
    }

    #[test]
    fn names_of_edits_and_points_cannot_lead_out() {
        let disk: Disk =
            serde_json::from_value(json!({ "target": "vda", "path": "/vm/a.img", "format": "dir" })).unwrap();
        let checked = |edit: Value| edits(&[serde_json::from_value(edit).unwrap()], &disk);
        checked(json!({ "edit": "add-layer", "target": "vda", "layer": "a" })).unwrap();
        checked(json!({ "edit": "set-path", "target": "vda", "path": "/vm/b.img" })).unwrap();
        checked(json!({ "edit": "set-path", "target": "vda", "path": "/other/b.img" })).unwrap_err();
        for bad in LEADING_OUT {
            for edit in ["set-active", "add-layer", "remove-layer"] {
                checked(json!({ "edit": edit, "target": "vda", "layer": bad })).expect_err(bad);
            }
            let found = json!({ "points": [{ "name": "n", "layer": "disk", "tag": bad, "parent": null,
                "created": "2026-01-01T00:00:00Z", "virtual_size": 1 }] });
            discovered(&serde_json::from_value(found).unwrap()).expect_err(bad);
            discovered(&serde_json::from_value(json!({ "layers": [bad] })).unwrap()).expect_err(bad);
        }
    }
}
