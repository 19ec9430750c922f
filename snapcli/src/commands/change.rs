//! `create`, `revert` and `delete`.

use std::time::Duration;

use snapcore::service::{DomainRef, Outcome, Postponed, RecoveryEnd};
use snapcore::{
    CreateRequest, DeleteRequest, DeleteScope, Error, ErrorKind, Group, Plan, PointKind, PowerAfter, Request,
    RevertRequest, SnapshotName,
};

use crate::answer::Answer;
use crate::args::{Create, CreateRunning, Delete, Revert, Then};
use crate::commands::domain::absolute;
use crate::commands::power;
use crate::commands::show::memory_size;
use crate::documents::{ChangeDoc, CreateDoc, PlanDoc, Power, RevertDoc, SnapshotDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::units;

/// `domsnap create`
pub fn create(session: &Session, args: Create) -> Result<Answer, Failure> {
    let name = or_the_time(session, &args.domain, args.name)?;
    let mut request = CreateRequest::new(name.clone()).description(args.description);
    if let Some(kind) = args.kind.wanted() {
        request = request.kind(kind);
    }
    for (target, how) in args.disks {
        request = request.disk(target, how);
    }
    request = running(request, &args.running);
    if args.dry_run {
        return dry_run(session, &args.domain, &Request::Create(request));
    }
    let then = request.then;
    let outcome = session.change(session.service.create(&args.domain, request, session.cancel()))?;
    let mut document = created(session, &args.domain, &name, outcome)?;
    document.power = power::after_create(&document.outcome, then);
    Ok(session.changed(document, |document| {
        let mut points: Vec<String> = document
            .snapshot
            .points
            .iter()
            .map(|point| format!("{} {}", point.target, kind_word(point.kind)))
            .collect();
        points
            .extend(document.snapshot.memory.iter().map(|memory| format!("memory {}", memory_size(memory))));
        format!(
            "created snapshot {name} of {}: {}{}\n{}",
            document.domain,
            points.join(", "),
            stood_still(document),
            remarks(&document.outcome)
        )
    }))
}

/// A request with what is said of a running domain.
fn running(mut request: CreateRequest, said: &CreateRunning) -> CreateRequest {
    if said.memory || said.disk_only {
        request = request.memory(said.memory);
    }
    request = request.live(!said.no_live);
    if let Some(seconds) = said.budget {
        request = request.budget(Duration::from_secs(seconds));
    }
    if let Some(level) = said.compress {
        request = request.compress(level);
    }
    if let Some(freeze) = said.quiesce {
        let limit = said.quiesce_limit.map_or(request.quiesce_limit, Duration::from_secs);
        request = request.quiesce(freeze.into(), limit);
    }
    match said.then.and_then(Then::power) {
        Some(power) => request.then(power),
        None => request,
    }
}

/// How long the guest stood still, and by which way; or what it does instead of going on.
fn stood_still(document: &CreateDoc) -> String {
    let way = document.outcome.way.as_ref().map(|way| format!(" ({way})")).unwrap_or_default();
    match (document.power, document.outcome.downtime_us) {
        (None, _) => String::new(),
        (Some(Power::Off), _) => format!("; the domain is off{way}"),
        (Some(Power::Paused), _) => format!("; the guest stands still{way}"),
        (Some(Power::Running), Some(time)) => {
            format!("; the guest stood still for {}{way}", units::duration_us(time))
        }
        (Some(Power::Running), None) => format!("; the guest goes on{way}"),
    }
}

/// The document on the new snapshot `name`.
pub fn created(
    session: &Session,
    domain: &DomainRef,
    name: &SnapshotName,
    outcome: Outcome,
) -> Result<CreateDoc, Failure> {
    let listing = session.ask(session.service.list(domain))?;
    let Some(snapshot) = listing.snapshots.iter().find(|snapshot| snapshot.name == *name) else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("snapshot {name} of {} was created and is not in the list", listing.domain.name),
        )
        .state("another command deleted it meanwhile")
        .into());
    };
    Ok(CreateDoc {
        domain: outcome.domain.clone(),
        snapshot: SnapshotDoc::of(snapshot, &listing, session.service.registry()),
        outcome,
        power: None,
    })
}

/// `domsnap revert`
pub fn revert(session: &Session, args: Revert) -> Result<Answer, Failure> {
    let mut request = RevertRequest::new(args.name.clone());
    let mut saved = None;
    if let Some(name) = args.save_current {
        let name = or_the_time(session, &args.domain, name)?;
        request = request.save_current(name.clone());
        saved = Some(name);
    }
    let power = match (args.running, args.paused, args.off) {
        (true, ..) => Some(PowerAfter::Running),
        (_, true, _) => Some(PowerAfter::Paused),
        (.., true) => Some(PowerAfter::Off),
        (false, false, false) => None,
    };
    if let Some(power) = power {
        request = request.power(power);
    }
    if args.no_safety {
        request = request.without_safety();
    }
    if let Some(config) = &args.config {
        request = request.config(absolute(config)?);
    }
    if args.dry_run {
        return dry_run(session, &args.domain, &Request::Revert(request));
    }
    let outcome = session.change(session.service.revert(&args.domain, request, session.cancel()))?;
    let now = power::after_revert(session, &args.domain, &outcome);
    let document = RevertDoc { domain: outcome.domain.clone(), outcome, power: now };
    Ok(session.changed(document, |document| {
        let saved = saved.map(|name| format!("; the state before is snapshot {name}")).unwrap_or_default();
        let start = match document.outcome.start.is_empty() {
            true => String::new(),
            false => format!("  start it with: {}\n", shell_words(&document.outcome.start)),
        };
        let (goes_on, remarks) = (goes_on(document), remarks(&document.outcome));
        format!("reverted {} to {}{saved}{goes_on}\n{start}{remarks}", document.domain, args.name)
    }))
}

/// What the guest does after a revert.
fn goes_on(document: &RevertDoc) -> String {
    match (document.power, document.outcome.downtime_us) {
        (None, _) => String::new(),
        (Some(Power::Running), Some(time)) => {
            format!("; the guest goes on, it stood still for {}", units::duration_us(time))
        }
        (Some(Power::Running), None) => "; the guest goes on".to_owned(),
        (Some(Power::Paused), _) => "; the guest stands still".to_owned(),
        (Some(Power::Off), _) => "; the domain is off".to_owned(),
    }
}

/// `domsnap delete`
pub fn delete(session: &Session, args: Delete) -> Result<Answer, Failure> {
    let scope = match (args.children, args.children_only) {
        (true, _) => DeleteScope::WithChildren,
        (_, true) => DeleteScope::ChildrenOnly,
        (false, false) => DeleteScope::Only,
    };
    let request = DeleteRequest::new(args.names).scope(scope).limit(args.limit);
    if args.dry_run {
        return dry_run(session, &args.domain, &Request::Delete(request));
    }
    let outcome = session.change(session.service.delete(&args.domain, request, session.cancel()))?;
    Ok(session.changed(ChangeDoc { domain: outcome.domain.clone(), outcome }, |document| {
        let outcome = &document.outcome;
        let what = match outcome.snapshots.len() {
            0 => format!("nothing to delete of {}", document.domain),
            1 => format!("deleted snapshot {} of {}", names(&outcome.snapshots), document.domain),
            n => format!("deleted {n} snapshots of {}: {}", document.domain, names(&outcome.snapshots)),
        };
        let moved = match outcome.bytes_moved {
            0 => String::new(),
            bytes => format!(" ({} moved)", units::bytes(bytes)),
        };
        format!("{what}{moved}\n{}", remarks(outcome))
    }))
}

fn or_the_time(
    session: &Session,
    domain: &DomainRef,
    name: Option<SnapshotName>,
) -> Result<SnapshotName, Failure> {
    match name {
        Some(name) => Ok(name),
        None => session.ask(session.service.default_name(domain)),
    }
}

/// What a user should know after an operation, a line each.
pub fn remarks(outcome: &Outcome) -> String {
    let mut text = String::new();
    for report in &outcome.recovered {
        let end = match report.end {
            RecoveryEnd::Done => "was finished first",
            RecoveryEnd::Undone => "was undone first",
        };
        text.push_str(&format!(
            "  recovered: the {} of {} that had stopped half way {end}\n",
            report.operation,
            names(&report.snapshots)
        ));
    }
    for note in &outcome.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    for postponed in &outcome.postponed {
        text.push_str(&format!(
            "  put off: {} ({}); `domsnap recover {}` does it\n",
            put_off(postponed),
            units::bytes(postponed.bytes),
            outcome.domain
        ));
    }
    text
}

/// Which merge was put off, and why; a reason that names the step itself is not preceded by it.
pub fn put_off(postponed: &Postponed) -> String {
    let Postponed { target, step, reason, .. } = postponed;
    let why = reason.strip_prefix(step.as_str()).and_then(|why| why.strip_prefix(": ")).unwrap_or(reason);
    format!("{target}: {step}: {why}")
}

/// Words as a shell takes them.
pub fn shell_words(words: &[String]) -> String {
    let plain = |word: &str| {
        !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "_-+=:,./@%".contains(c))
    };
    let quoted = |word: &String| match plain(word) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// Names, joined.
pub fn names(names: &[SnapshotName]) -> String {
    names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
}

/// The kind in a word.
pub fn kind_word(kind: PointKind) -> &'static str {
    match kind {
        PointKind::Internal => "internal",
        PointKind::External => "external",
    }
}

fn dry_run(session: &Session, domain: &DomainRef, request: &Request) -> Result<Answer, Failure> {
    let plan = session.ask(session.service.plan(domain, request))?;
    let document = PlanDoc { domain: domain.to_string(), bytes: plan.bytes(), plan };
    Ok(session.told(document, |document| told_plan(&document.domain, &document.plan)))
}

fn told_plan(domain: &str, plan: &Plan) -> String {
    let mut text = format!(
        "would {} {} of {domain}: {}, {} to move\n",
        plan.operation,
        names(&plan.snapshots),
        units::count(plan.steps.len(), "step"),
        units::bytes(plan.bytes())
    );
    let width = plan.steps.iter().map(|planned| planned.step.target.as_str().len()).max().unwrap_or(0);
    for (group, title) in [
        (Group::Prepare, "prepare (can be undone)"),
        (Group::Cut, "cut (can be undone)"),
        (Group::Finish, "finish (carried through)"),
    ] {
        let mut steps = plan.steps.iter().filter(|planned| planned.group == group).peekable();
        if steps.peek().is_some() {
            text.push_str(&format!("  {title}\n"));
        }
        for planned in steps {
            let size = match planned.step.bytes {
                0 => String::new(),
                bytes => format!(" ({})", units::bytes(bytes)),
            };
            let wait = if planned.deferrable { "; can be put off" } else { "" };
            text.push_str(&format!(
                "    {:width$}  {}{size}{wait}\n",
                planned.step.target, planned.step.summary
            ));
        }
    }
    for note in &plan.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    text.push_str("nothing was touched\n");
    text
}

#[cfg(test)]
mod tests {
    use snapcore::{PlannedStep, Step, Target};

    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell_where_they_must_be() {
        let words = ["qemu", "-name", "a b", "", "it's"].map(str::to_owned);
        assert_eq!(shell_words(&words), "qemu -name 'a b' '' 'it'\\''s'");
    }

    #[test]
    fn what_was_put_off_is_named_once() {
        let postponed = |reason: &str| Postponed {
            target: Target::new("vda").unwrap(),
            step: "merge a into b".to_owned(),
            steps: 2,
            bytes: 7,
            reason: reason.to_owned(),
        };
        let told = "vda: merge a into b: the disk is full";
        assert_eq!(put_off(&postponed("merge a into b: the disk is full")), told);
        assert_eq!(put_off(&postponed("the disk is full")), told);
    }

    #[test]
    fn a_plan_is_told_group_by_group_with_what_it_moves() {
        let step = |group, summary: &str, bytes, deferrable| PlannedStep {
            group,
            step: Step {
                target: Target::new("vda").unwrap(),
                action: serde_json::Value::Null,
                summary: summary.to_owned(),
                bytes,
            },
            edits: Vec::new(),
            deferrable,
            inside: false,
            window: false,
        };
        let plan = Plan {
            operation: "delete".to_owned(),
            snapshots: vec![SnapshotName::new("s1").unwrap()],
            steps: vec![
                step(Group::Cut, "cut it", 0, false),
                step(Group::Finish, "merge a into b", 3 << 20, true),
            ],
            commit: Vec::new(),
            notes: vec!["vda: a note".to_owned()],
        };
        assert_eq!(
            told_plan("web", &plan),
            "would delete s1 of web: 2 steps, 3.00 MiB to move\n  cut (can be undone)\n    vda  cut it\n  \
             finish (carried through)\n    vda  merge a into b (3.00 MiB); can be put off\n  note: vda: a note\n\
             nothing was touched\n"
        );
    }
}
