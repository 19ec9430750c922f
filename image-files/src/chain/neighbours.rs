//! Restrictions by images that are not layers of the disk: no layer that backs one, or may back one, is
//! changed.

use snapcore::backend::{DiskPlan, DiskRequest, DiskState, Undetermined};
use snapcore::{ActivePath, DiskAddress, DiskRecord, Error, ErrorKind, Result, shell_command};

use super::ChainStep;
use crate::layer_name::layer_path;

/// Refuses a revert that would change what an image beside the disk shows.
///
/// # Errors
/// [`ErrorKind::Refused`], with the image and how to make the revert possible.
pub(super) fn allow_revert(record: &DiskRecord, state: &DiskState, active_path: ActivePath) -> Result<()> {
    let path = record.disk.path();
    if let (Some(overlay), ActivePath::Keep) = (state.path_dependents.first(), active_path) {
        let active = state.layer(&state.active);
        let advice = match active.filter(|layer| layer.named) {
            Some(layer) => format!(
                "rebase {} onto the layer that the path names now, which is kept: {}",
                if state.path_dependents.len() == 1 { "it" } else { "each of them" },
                rebase(&layer_path(path, &layer.name), overlay)
            ),
            None => "take an external snapshot first, and rebase the image onto the layer that it freezes: the create \
                     says how"
                .to_owned(),
        };
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{}: {} by that name, and a revert would change what it shows",
                record.disk.target,
                standing(&state.path_dependents, path.as_str())
            ),
        )
        .state("no changes made")
        .advise(advice));
    }
    match refusal(record, state) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Refuses a plan that merges or removes layers while the backing file of an image is undetermined. A plan
/// that no user requested (`tidying`) is emptied instead.
///
/// # Errors
/// [`ErrorKind::Refused`], with the image and advice.
pub(super) fn allow_merges(
    record: &DiskRecord,
    state: &DiskState,
    tidying: bool,
    plan: &mut DiskPlan<ChainStep>,
) -> Result<()> {
    let harmless = |step: &ChainStep| {
        matches!(
            step,
            ChainStep::DropInternal { .. }
                | ChainStep::ForgetInternal { .. }
                | ChainStep::TakeInternal { .. }
        )
    };
    if plan.steps().all(|step| harmless(&step.action)) {
        return Ok(());
    }
    match refusal(record, state) {
        None => Ok(()),
        Some(error) if tidying => {
            *plan = nothing_merged(&error);
            Ok(())
        }
        Some(error) => Err(error),
    }
}

/// Empties a plan that no user requested, if it was refused: the refusal is only noted then.
///
/// # Errors
/// The refusal of any other plan.
pub fn unless_tidying(
    request: &DiskRequest,
    planned: Result<DiskPlan<ChainStep>>,
) -> Result<DiskPlan<ChainStep>> {
    match planned {
        Err(error) if is_tidying(request) => Ok(nothing_merged(&error)),
        planned => planned,
    }
}

/// Returns true for a request that deletes nothing: it only merges what earlier ones have left.
pub(super) fn is_tidying(request: &DiskRequest) -> bool {
    matches!(request, DiskRequest::Delete { drop, .. } if drop.is_empty())
}

fn nothing_merged(error: &Error) -> DiskPlan<ChainStep> {
    DiskPlan::default().notes(vec![format!("nothing was merged: {error}")])
}

fn refusal(record: &DiskRecord, state: &DiskState) -> Option<Error> {
    let Undetermined { file, why, .. } = state.undetermined.first()?;
    let more = match state.undetermined.len() {
        1 => String::new(),
        n => format!(" (and {} more such files)", n - 1),
    };
    Some(
        Error::new(
            ErrorKind::Refused,
            format!(
                "{}: {file} may depend on a layer of {}: {why}{more}",
                record.disk.target, record.disk.path()
            ),
        )
        .state("no changes made")
        .advise(
            "make the file readable, give it a plain path as its backing file with 'qemu-img rebase -u', or move it to \
             another directory if it has nothing to do with this disk",
        ),
    )
}

/// Returns the command that makes `layer` the backing file of `overlay` without touching data.
pub fn rebase(layer: &camino::Utf8Path, overlay: &DiskAddress) -> String {
    let beside = layer.parent() == overlay.path().parent();
    let name = layer.file_name().filter(|name| beside && !name.contains(':')).unwrap_or(layer.as_str());
    let args = ["qemu-img", "rebase", "-u", "-b", name, "-F", "qcow2", overlay.as_str()];
    format!("`{}`", shell_command(args))
}

/// `FILE depends on BASE`, `FILE and 2 other images depend on BASE`; users that are no images, which have
/// their names in brackets, use it.
pub(super) fn standing(dependents: &[DiskAddress], base: &str) -> String {
    let in_brackets = |user: &&DiskAddress| user.as_str().starts_with('(');
    let (users, images): (Vec<_>, Vec<_>) = dependents.iter().partition(in_brackets);
    let mut clauses = match images[..] {
        [] => Vec::new(),
        [one] => vec![format!("{one} depends on {base}")],
        [first, _] => vec![format!("{first} and another image depend on {base}")],
        [first, ..] => vec![format!("{first} and {} other images depend on {base}", images.len() - 1)],
    };
    clauses
        .extend(users.iter().map(|user| format!("{} uses {base}", user.as_str().trim_matches(['(', ')']))));
    clauses.join(", and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Images depend on a layer; a process or another name, which has its own in brackets, uses it.
    #[test]
    fn dependents_are_named_as_what_they_are() {
        let (link, process) = ("(a hard link of it in another directory)", "(a running process)");
        for (dependents, said) in [
            (&["/a"][..], "/a depends on it"),
            (&["/a", "/b"], "/a and another image depend on it"),
            (&["/a", "/b", "/c"], "/a and 2 other images depend on it"),
            (&[link], "a hard link of it in another directory uses it"),
            (
                &[link, "/a", process],
                "/a depends on it, and a hard link of it in another directory uses it, and a running process uses it",
            ),
        ] {
            let dependents: Vec<DiskAddress> = dependents.iter().map(|name| (*name).into()).collect();
            assert_eq!(standing(&dependents, "it"), said);
        }
    }
}
