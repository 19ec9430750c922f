//! `create`, `revert` and `delete`.

use std::time::Duration;

use snapcore::hypervisor::{GuestChange, PowerAfter};
use snapcore::service::{CreateRequest, DeleteRequest, DeleteScope, Request, RevertRequest};
use snapcore::service::{DomainRef, Outcome, Postponed, RecoveryEnd};
use snapcore::{Error, ErrorKind, Group, Plan, PointKind, SnapshotName, shell_command};

use crate::answer::Answer;
use crate::args::{Create, CreateRunning, Delete, KeepForUndo, Revert, Then};
use crate::commands::domain::absolute;
use crate::commands::held::default_keep;
use crate::commands::show::memory_size;
use crate::commands::{group, power};
use crate::documents::{ChangeDoc, CreateDoc, PlanDoc, Power, RevertDoc, SnapshotDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::units;

/// `domsnap create`
pub fn create(session: &Session, args: Create) -> Result<Answer, Failure> {
    let group = if args.group { Some(args.domain.each()?) } else { None };
    let name = match (&group, args.name) {
        (Some(domains), None) => group::free_name(session, domains)?,
        (None, name) => or_the_time(session, &args.domain.one()?, name)?,
        (Some(_), Some(name)) => name,
    };
    let mut request = CreateRequest::new(name.clone()).description(args.description);
    if let Some(time) = args.expires {
        request = request.expires(time);
    }
    if let Some(kind) = args.kind.wanted() {
        request = request.kind(kind);
    }
    for (target, how) in args.disks {
        request = request.disk(target, how);
    }
    request = running(request, &args.running);
    match group {
        Some(domains) if args.dry_run => {
            return group::dry_run(session, &domains, &Request::Create(request));
        }
        Some(domains) => return group::create(session, &domains, request),
        None => {}
    }
    let domain = &args.domain.one()?;
    if args.dry_run {
        return dry_run(session, domain, &Request::Create(request));
    }
    let then = request.then;
    let outcome = session.change(session.service.create(domain, request, session.cancel()))?;
    let mut document = created(session, domain, &name, outcome)?;
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
            pause_summary(document.power, &document.outcome),
            remarks(&document.outcome)
        )
    }))
}

/// Adds the options for a running domain to a request.
fn running(mut request: CreateRequest, said: &CreateRunning) -> CreateRequest {
    if said.memory || said.disk_only {
        request = request.memory(said.memory);
    }
    if said.live || said.no_live {
        request = request.live(said.live);
    }
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

/// Formats how long the guest was paused, and by which method; or its state if it did not resume.
pub fn pause_summary(power: Option<Power>, outcome: &Outcome) -> String {
    let method = outcome.method.as_ref().map(|method| format!(" ({method})")).unwrap_or_default();
    match (power, outcome.downtime_us) {
        (None, _) => String::new(),
        (Some(Power::Off), _) => format!("; domain was ended and is off{method}"),
        (Some(Power::Paused), _) => format!("; guest is paused{method}"),
        (Some(Power::Running), Some(time)) => {
            format!("; guest paused for {}{method}", units::duration_us(time))
        }
        (Some(Power::Running), None) => format!("; guest is running{method}"),
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
        let name = or_the_time(session, &args.domain.one()?, name)?;
        request = request.save_current(name.clone());
        saved = Some(name);
    } else {
        let keep = match args.undo {
            Some(keep) => keep,
            None => default_keep()?.unwrap_or(KeepForUndo::Free),
        };
        request = request.keep(keep.into());
    }
    if let Some(power) = args.then.asked() {
        request = request.power(power);
    }
    request.skip = args.skip;
    if args.no_safety {
        request = request.without_safety();
    }
    if let Some(config) = &args.config {
        request = request.config(absolute(config)?);
    }
    if args.group {
        let domains = args.domain.each()?;
        return match args.dry_run {
            true => group::dry_run(session, &domains, &Request::Revert(request)),
            false => group::revert(session, &domains, request),
        };
    }
    let domain = &args.domain.one()?;
    if args.dry_run {
        return dry_run(session, domain, &Request::Revert(request));
    }
    let outcome = session.change(session.service.revert(domain, request, session.cancel()))?;
    let now = power::after_revert(session, domain, &outcome);
    let document = RevertDoc { domain: outcome.domain.clone(), outcome, power: now };
    Ok(session.changed(document, |document| {
        let outcome = &document.outcome;
        let saved = match saved {
            Some(name) => format!("; previous state saved as {name}"),
            None if outcome.kept => {
                let command = shell_command(["domsnap", "undo", document.domain.as_str()]);
                format!("; `{command}` brings the previous state back")
            }
            None => String::new(),
        };
        let mut commands = String::new();
        let started = outcome.started.as_ref().map(|started| started.command.as_slice()).unwrap_or_default();
        for (what, args) in [("started by", started), ("start it with", outcome.start.as_slice())] {
            if !args.is_empty() {
                commands.push_str(&format!("  {what}: {}\n", shell_text(args)));
            }
        }
        let (guest, remarks) = (guest_now(document), remarks(outcome));
        format!("reverted {} to {}{saved}{guest}\n{commands}{remarks}", document.domain, args.name)
    }))
}

/// Formats a revert's effect on the guest, and the guest's state now.
pub fn guest_now(document: &RevertDoc) -> String {
    let outcome = &document.outcome;
    let process = outcome.started.as_ref().and_then(|started| match (started.pid, started.domid) {
        (Some(pid), _) => Some(format!(" (process {pid})")),
        (None, Some(domid)) => Some(format!(" (now domain {domid})")),
        (None, None) => None,
    });
    let process = process.unwrap_or_default();
    let down = outcome.downtime_us.map(|time| format!(" (downtime {})", units::duration_us(time)));
    let down = down.unwrap_or_default();
    use GuestChange as Change;
    let done = match outcome.guest {
        None => {
            return match document.power {
                None => String::new(),
                Some(Power::Running) => format!("; guest is running{down}"),
                Some(Power::Paused) => "; guest is paused".to_owned(),
                Some(Power::Off) => "; domain is off".to_owned(),
            };
        }
        Some(Change::Ended) => return "; domain was ended and is off".to_owned(),
        Some(Change::Restored) => "memory restored",
        Some(Change::Reset) => "guest was reset",
        Some(Change::RecreatedFromMemory) => "domain was destroyed and restored from the snapshot's memory",
        Some(Change::Recreated) => "domain was destroyed and created again, so the guest boots",
        Some(Change::Started) => "domain was started from the snapshot's memory",
        Some(_) => "guest was changed",
    };
    let now = match (outcome.guest, document.power) {
        (Some(Change::Reset), Some(Power::Running)) => String::new(),
        (Some(Change::Reset), Some(Power::Paused)) => " and is paused".to_owned(),
        (Some(Change::Restored), Some(Power::Running)) => ", guest resumed".to_owned(),
        (_, Some(Power::Running)) => ", guest is running".to_owned(),
        (_, Some(Power::Paused)) => ", guest is paused".to_owned(),
        (_, Some(Power::Off)) => ", and is off now".to_owned(),
        (_, None) => String::new(),
    };
    format!("; {done}{process}{now}{down}")
}

/// `domsnap delete`
pub fn delete(session: &Session, args: Delete) -> Result<Answer, Failure> {
    let scope = match (args.children, args.children_only) {
        (true, _) => DeleteScope::WithChildren,
        (_, true) => DeleteScope::ChildrenOnly,
        (false, false) => DeleteScope::Only,
    };
    let request = DeleteRequest::new(args.names).scope(scope).limit(args.limit).force(args.force);
    let request = request.defer(args.defer).expired(args.expired);
    if args.group {
        let domains = args.domain.each()?;
        return match args.dry_run {
            true => group::dry_run(session, &domains, &Request::Delete(request)),
            false => group::delete(session, &domains, request),
        };
    }
    let domain = &args.domain.one()?;
    if args.dry_run {
        return dry_run(session, domain, &Request::Delete(request));
    }
    let outcome = session.change(session.service.delete(domain, request, session.cancel()))?;
    Ok(session.changed(ChangeDoc { domain: outcome.domain.clone(), outcome }, |document| {
        let outcome = &document.outcome;
        let what = match outcome.snapshots.len() {
            0 => format!("no snapshot of {} is deleted now", document.domain),
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
        None => session.ask(session.service.default_name(domain)).map_err(Failure::of_plan),
    }
}

/// Formats what the user should know after an operation, a line each.
pub fn remarks(outcome: &Outcome) -> String {
    let mut text = String::new();
    for report in &outcome.recovered {
        let end = match report.end {
            RecoveryEnd::Done => "was completed first",
            RecoveryEnd::Undone => "was rolled back first",
            RecoveryEnd::Abandoned => "was abandoned",
        };
        text.push_str(&format!(
            "  recovered: the interrupted {} of {} {end}\n",
            report.operation,
            names(&report.snapshots)
        ));
    }
    for note in &outcome.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    for postponed in &outcome.postponed {
        text.push_str(&format!(
            "  deferred: {} ({}); run `domsnap recover {}`\n",
            deferred(postponed),
            units::bytes(postponed.bytes),
            outcome.domain
        ));
    }
    text
}

/// Formats a deferred step and the reason. A reason that begins with the step's name is not preceded by it.
pub fn deferred(postponed: &Postponed) -> String {
    let Postponed { step, reason, .. } = postponed;
    let why = reason.strip_prefix(step.as_str()).and_then(|why| why.strip_prefix(": ")).unwrap_or(reason);
    format!("{}: {step}: {why}", postponed.subject())
}

/// Quotes a command for a shell.
pub fn shell_text(args: &[String]) -> String {
    shell_command(args.iter().map(String::as_str))
}

/// Names, joined.
pub fn names(names: &[SnapshotName]) -> String {
    names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
}

/// The kind as a word.
pub fn kind_word(kind: PointKind) -> &'static str {
    match kind {
        PointKind::Internal => "internal",
        PointKind::External => "external",
    }
}

pub fn dry_run(session: &Session, domain: &DomainRef, request: &Request) -> Result<Answer, Failure> {
    let mut plans = session.ask(session.service.plans(domain, request)).map_err(Failure::of_plan)?;
    let Some(plan) = plans.pop() else {
        return Err(Error::new(ErrorKind::Internal, "no plan was made").into());
    };
    let document = plan_document(domain.to_string(), plans.pop(), plan);
    Ok(session.reported(document, |document| {
        let mut text = String::new();
        if let Some(first) = &document.first {
            text.push_str(&plan_text(&document.domain, first));
            text.push_str("then, planned again when that is done:\n");
        }
        text.push_str(&plan_text(&document.domain, &document.plan));
        text + "no changes made\n"
    }))
}

/// The document on a plan, and on the one that comes `first`.
pub fn plan_document(domain: String, first: Option<Plan>, plan: Plan) -> PlanDoc {
    let guest = plan.guest();
    PlanDoc {
        domain,
        bytes: first.iter().chain([&plan]).map(Plan::bytes).fold(0, u64::saturating_add),
        first,
        plan,
        guest: guest.map(|(change, _)| change),
        power: guest.and_then(|(change, power)| match (change, power) {
            (GuestChange::Ended, _) => Some(Power::Off),
            (_, Some(PowerAfter::Paused)) => Some(Power::Paused),
            (_, Some(PowerAfter::Running)) => Some(Power::Running),
            _ => None,
        }),
    }
}

/// Formats a plan's effect on the guest.
fn guest_then(change: GuestChange, power: Option<PowerAfter>) -> String {
    let what = match change {
        GuestChange::Restored => "the snapshot's memory is restored",
        GuestChange::Reset => "guest is reset",
        GuestChange::RecreatedFromMemory => "domain is destroyed and restored from the snapshot's memory",
        GuestChange::Recreated => "domain is destroyed and created again, so the guest boots",
        GuestChange::Started => "domain is started from the snapshot's memory",
        GuestChange::Ended => return "domain is ended and off".to_owned(),
        _ => "guest is changed",
    };
    let then = match power {
        Some(PowerAfter::Running) => ", then it runs",
        Some(PowerAfter::Paused) => ", then it is paused",
        Some(PowerAfter::Off) | None => "",
    };
    format!("{what}{then}")
}

/// Formats a plan.
pub fn plan_text(domain: &str, plan: &Plan) -> String {
    let mut text = format!(
        "would {} {} of {domain}: {}, {} to move\n",
        plan.operation,
        names(&plan.snapshots),
        units::count(plan.step_count(), "step"),
        units::bytes(plan.bytes())
    );
    let width = plan.steps().map(|placed| placed.subject().len()).max().unwrap_or(0);
    for (group, title) in [
        (Group::Prepare, "prepare (can be rolled back)"),
        (Group::Cut, "switch-over (can be rolled back)"),
        (Group::Finish, "clean-up (always completed)"),
    ] {
        let mut steps = plan.steps().filter(|placed| placed.group == group).peekable();
        if steps.peek().is_some() {
            text.push_str(&format!("  {title}\n"));
        }
        for placed in steps {
            let size = match placed.bytes() {
                0 => String::new(),
                bytes => format!(" ({})", units::bytes(bytes)),
            };
            let wait = if placed.deferrable { "; can be deferred" } else { "" };
            text.push_str(&format!("    {:width$}  {}{size}{wait}\n", placed.subject(), placed.summary()));
        }
    }
    for note in &plan.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    if let Some((change, power)) = plan.guest() {
        text.push_str(&format!("  guest: {}\n", guest_then(change, power)));
    }
    text
}

#[cfg(test)]
mod tests {
    use snapcore::{CutUnit, FinishStep, FinishUnit, Step, Target};

    use super::*;

    #[test]
    fn deferred_step_is_named_once() {
        let postponed = |reason: &str| Postponed {
            target: Some(Target::new("vda").unwrap()),
            step: "merge a into b".to_owned(),
            steps: 2,
            bytes: 7,
            reason: reason.to_owned(),
        };
        let expected = "vda: merge a into b: the disk is full";
        assert_eq!(deferred(&postponed("merge a into b: the disk is full")), expected);
        assert_eq!(deferred(&postponed("the disk is full")), expected);
    }

    #[test]
    fn plan_is_shown_by_group_with_sizes() {
        let step = |summary: &str, bytes| {
            Step::new(Target::new("vda").unwrap(), serde_json::Value::Null, summary).bytes(bytes)
        };
        let merge = FinishStep::new(step("merge a into b", 3 << 20)).deferrable(true);
        let plan = Plan::new("delete", vec![SnapshotName::new("s1").unwrap()])
            .cut(vec![CutUnit::Disk(step("cut it", 0))])
            .finish(vec![FinishUnit::Disk(merge)])
            .notes(vec!["vda: a note".to_owned()]);
        assert_eq!(
            plan_text("web", &plan),
            "would delete s1 of web: 2 steps, 3.00 MiB to move\n  switch-over (can be rolled back)\n    vda  cut it\n  \
             clean-up (always completed)\n    vda  merge a into b (3.00 MiB); can be deferred\n  note: vda: a note\n"
        );
    }
}
