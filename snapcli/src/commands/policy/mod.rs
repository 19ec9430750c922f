//! `domsnap policy`: snapshots that are taken by a schedule, and which of them are kept.
//!
//! **A run.** 1) The policy is locked, so that its commands run once. 2) An interrupted operation is
//! recovered, and deferred merges are done. 3) If a snapshot is due: the command `before`, the snapshot, the
//! command `after`. If one of them fails, nothing is pruned. 4) What no rule keeps is deleted, oldest first,
//! each in an operation of its own, and the rules decide again under the domain's lock. A failure ends the
//! run. So a kill at any place leaves an operation that is recovered, or nothing, and the next run goes on.

mod hook;
mod program;
mod units;

use camino::Utf8PathBuf;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use snapcore::hypervisor::Quiesce;
use snapcore::policy::{Kind, PolicyReview, PolicySpec, Quiescing};
use snapcore::service::{
    CreateDisk, CreateRequest, DeleteRequest, DomainRef, Listing, PolicyChange, UndoRequest,
};
use snapcore::{DomainName, Error, ErrorKind, SnapshotName};

use crate::answer::Answer;
use crate::args::{Policy, PolicyInstall, PolicyRemove, PolicyRun, PolicyShow};
use crate::commands::change::{names, remarks};
use crate::commands::domain;
use crate::documents::{PolicyInstallDoc, PolicyRemoveDoc, PolicyRunDoc, PolicyShowDoc, UnitDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;
use crate::units as shown;

use hook::Which;
use units::Place;

/// Does what `policy` says.
pub fn run(session: &Session, policy: Policy) -> Result<Answer, Failure> {
    match policy {
        Policy::Run(args) => run_policy(session, &args),
        Policy::Install(args) => install(session, &args),
        Policy::Remove(args) => remove(session, &args),
        Policy::Show(args) => show(session, &args),
    }
}

/// What a run has done so far, for its answer and for its errors.
#[derive(Default)]
struct Done {
    created: Option<SnapshotName>,
    pruned: Vec<SnapshotName>,
    gave_up: bool,
    notes: Vec<String>,
}

impl Done {
    /// A failure that ends the run, with what was done before it.
    fn end(&self, failure: Failure, rest: &str) -> Failure {
        let created = self.created.iter().map(|name| format!("snapshot {name} was created"));
        let pruned = (!self.pruned.is_empty()).then(|| format!("pruned before it: {}", names(&self.pruned)));
        let gave_up = self.gave_up.then(|| "the replaced state was given up".to_owned());
        let done: Vec<String> = gave_up.into_iter().chain(created).chain(pruned).collect();
        match done.is_empty() {
            true => failure,
            false => failure.left(&format!("{}; {rest}", done.join("; "))),
        }
    }
}

fn run_policy(session: &Session, args: &PolicyRun) -> Result<Answer, Failure> {
    let domain = &args.domain;
    if args.dry_run {
        let review = session.ask(session.service.policy_review(domain, true)).map_err(Failure::of_plan)?;
        let created = review.planned.clone();
        return Ok(answer(session, true, &review, Done { created, ..Done::default() }));
    }
    let _turn = session.ask(session.service.policy_turn(domain)).map_err(Failure::of_plan)?;
    let mut done = Done::default();
    let listing = session.ask(session.service.list(domain)).map_err(Failure::of_plan)?;
    // Also where no operation is unfinished: a kill after the end of one leaves manifests that are not up to
    // date, and merges may be deferred.
    match session.change(session.service.recover(Some(domain), session.cancel())) {
        Ok(reports) => {
            for report in reports {
                done.notes.push(format!(
                    "recovered: the {} of {}",
                    report.operation,
                    names(&report.snapshots)
                ));
                done.notes.extend(report.notes);
            }
        }
        Err(failure) if !listing.unfinished.is_empty() => return Err(failure),
        // What is in the way of that is in the way of the snapshot too, whose error says what to do.
        Err(failure) => done.notes.push(format!("not tidied: {}", failure.message())),
    }
    let mut review = session.ask(session.service.policy_review(domain, false)).map_err(Failure::of_plan)?;
    // Both commands are looked at before the first one is run.
    hook::require_fit(&review.policy.spec).map_err(|error| Failure::of(error, false))?;
    give_up_undo(session, domain, &listing, &review.policy.spec, &mut done)?;
    if review.has.is_none() {
        take(session, domain, &review, &mut done)?;
        let looked = session.ask(session.service.policy_review(domain, false));
        review = looked.map_err(|failure| done.end(failure, "nothing was pruned"))?;
    }
    for pruned in review.pruned() {
        prune(session, domain, pruned.id, &pruned.name, &mut done)?;
    }
    Ok(answer(session, false, &review, done))
}

/// Gives up the state that the last revert replaced, if it is older than the policy says.
fn give_up_undo(
    session: &Session,
    domain: &DomainRef,
    listing: &Listing,
    spec: &PolicySpec,
    done: &mut Done,
) -> Result<(), Failure> {
    let (Some(age), Some(previous)) = (spec.keep_undo, &listing.previous) else { return Ok(()) };
    let limit = age.before(Timestamp::now());
    if previous.snapshot.created > limit {
        return Ok(());
    }
    // A revert that came meanwhile has a state of its own, which is younger and stays.
    let request = UndoRequest::new().forget_before(limit);
    let outcome = session.change(session.service.undo(domain, request, session.cancel()))?;
    done.gave_up = !outcome.snapshots.is_empty();
    done.notes.extend(outcome.notes);
    Ok(())
}

/// Takes the snapshot that is due, between the policy's commands.
fn take(
    session: &Session,
    domain: &DomainRef,
    review: &PolicyReview,
    done: &mut Done,
) -> Result<(), Failure> {
    let policy = &review.policy;
    let refused = |error| done.end(Failure::of(error, false), "nothing was pruned");
    let name = policy.name_at(Timestamp::now()).map_err(refused)?;
    let name = session.ask(session.service.free_name(domain, &name))?;
    let hook = |which| hook::run(session, policy, which, &review.domain, &name);
    hook(Which::Before).map_err(|failure| done.end(failure, "nothing was pruned"))?;
    let taken = create(session, domain, review, &name);
    let after = hook(Which::After { taken: taken.is_ok() });
    let outcome = taken.map_err(|failure| match &after {
        Ok(()) => done.end(failure, "nothing was pruned"),
        Err(second) => failure.left(&format!("nothing was pruned; {}", second.message())),
    })?;
    if outcome.operation_id.is_some() {
        done.created = Some(name.clone());
    }
    let said = remarks(&outcome);
    done.notes.extend(said.lines().map(|line| line.trim().trim_start_matches("note: ").to_owned()));
    after.map_err(|failure| done.end(failure, "nothing was pruned; the next run prunes"))
}

fn create(
    session: &Session,
    domain: &DomainRef,
    review: &PolicyReview,
    name: &SnapshotName,
) -> Result<snapcore::service::Outcome, Failure> {
    let spec = &review.policy.spec;
    let mut request = CreateRequest::new(name.clone()).policy(review.policy.id);
    for target in &spec.skip {
        request = request.disk(target.clone(), CreateDisk::Skip);
    }
    if let Some(kind) = spec.kind {
        request = request.kind(Kind::into(kind));
    }
    // A domain that is off has no memory, and its disks are as clean as its shutdown was.
    if !spec.memory {
        request = request.memory(false);
    }
    let runs = session.ask(session.service.running(domain))?.is_some_and(|seen| seen.running);
    let limit = request.quiesce_limit;
    request = match spec.quiesce {
        Quiescing::No => request,
        Quiescing::Try => request.quiesce(Quiesce::Try, limit),
        Quiescing::Require if runs => request.quiesce(Quiesce::Require, limit),
        Quiescing::Require => request,
    };
    session.change(session.service.create(domain, request, session.cancel()))
}

/// Prunes one snapshot. One that the policy keeps by now, because it was held meanwhile for example, stays.
fn prune(
    session: &Session,
    domain: &DomainRef,
    id: snapcore::SnapshotId,
    name: &SnapshotName,
    done: &mut Done,
) -> Result<(), Failure> {
    let rest = "the others are as they were, and the next run prunes them";
    if session.cancel().is_cancelled() {
        let stopped = Error::new(ErrorKind::Cancelled, "the run of the policy was interrupted");
        return Err(done.end(Failure::of(stopped, false), rest));
    }
    let work = session.service.delete(domain, DeleteRequest::pruning(id), session.cancel());
    match session.change(work) {
        Ok(outcome) => {
            done.pruned.push(name.clone());
            let said = remarks(&outcome);
            done.notes.extend(said.lines().map(|line| line.trim().trim_start_matches("note: ").to_owned()));
            Ok(())
        }
        Err(failure) if failure.kind() == ErrorKind::Refused && is_superseded(session, domain, id) => {
            done.notes.push(format!("{name} stays: {}", failure.message()));
            Ok(())
        }
        Err(failure) => Err(done.end(failure, rest)),
    }
}

/// Returns true if the policy does not prune the snapshot any more.
fn is_superseded(session: &Session, domain: &DomainRef, id: snapcore::SnapshotId) -> bool {
    let review = session.ask(session.service.policy_review(domain, false));
    review.is_ok_and(|review| review.pruned().all(|pruned| pruned.id != id))
}

fn answer(session: &Session, is_dry: bool, review: &PolicyReview, done: Done) -> Answer {
    let future = (!review.future.is_empty()).then(|| {
        format!(
            "dated in the future, because the clock was set back: {}; they stay until then, and `domsnap delete` \
             removes them",
            names(&review.future)
        )
    });
    let pruned = match is_dry {
        true => review.pruned().map(|pruned| pruned.name.clone()).collect(),
        false => done.pruned,
    };
    let document = PolicyRunDoc {
        domain: review.domain.clone(),
        dry_run: is_dry,
        has: review.has.clone().filter(|has| done.created.as_ref() != Some(has)),
        created: done.created,
        pruned,
        snapshots: review.snapshots.clone(),
        gave_up_undo: done.gave_up,
        warnings: future.into_iter().collect(),
        notes: done.notes,
    };
    let zone = zone_of(&review.policy.spec);
    let period = review.policy.spec.every().map_or_else(|_| "period".to_owned(), |every| every.noun());
    let text = move |document: &PolicyRunDoc| run_text(document, &period, &zone);
    match is_dry {
        true => session.reported(document, text),
        false => session.changed(document, text),
    }
}

fn zone_of(spec: &PolicySpec) -> TimeZone {
    spec.zone().unwrap_or_else(|_| shown::zone())
}

fn run_text(document: &PolicyRunDoc, period: &str, zone: &TimeZone) -> String {
    let would = if document.dry_run { "would be " } else { "" };
    let created = match (&document.created, &document.has) {
        (Some(created), _) => format!("snapshot {created} {would}created"),
        (None, Some(has)) => format!("no snapshot is due: this {period} has {has}"),
        (None, None) => "no snapshot is due".to_owned(),
    };
    let pruned = match document.pruned.len() {
        0 => "none pruned".to_owned(),
        number => format!("{} {would}pruned", shown::count(number, "snapshot")),
    };
    let mut text = format!("{}: {created}; {pruned}\n", document.domain);
    if document.gave_up_undo {
        text.push_str("  the replaced state was given up: it is older than keep-undo\n");
    }
    for (mark, messages) in [("warning", &document.warnings), ("note", &document.notes)] {
        for message in messages {
            text.push_str(&format!("  {mark}: {message}\n"));
        }
    }
    let kept = |name: &SnapshotName| !document.pruned.contains(name);
    let rows = document.snapshots.iter().map(|snapshot| {
        let reasons: Vec<String> = match &snapshot.prune {
            Some(reason) => vec![reason.to_string()],
            None => snapshot.keep.iter().map(ToString::to_string).collect(),
        };
        vec![
            snapshot.name.to_string(),
            shown::time(snapshot.created, zone),
            if kept(&snapshot.name) { "kept" } else { "pruned" }.to_owned(),
            reasons.join(", "),
        ]
    });
    if !document.snapshots.is_empty() {
        text.push_str(&table(&["SNAPSHOT", "CREATED", "RESULT", "REASON"], rows));
    }
    if document.dry_run {
        text.push_str("no changes made\n");
    }
    text
}

fn install(session: &Session, args: &PolicyInstall) -> Result<Answer, Failure> {
    let listing = session.ask(session.service.list(&args.domain)).map_err(Failure::of_plan)?;
    let name = listing.domain.name.clone();
    let recorded = listing.domain.policy.as_ref();
    let spec = match (&args.file, recorded) {
        (Some(file), _) => policy_of_file(session, file, &name)?,
        (None, Some(recorded)) => recorded.spec.clone(),
        (None, None) => {
            return Err(Error::new(ErrorKind::Usage, format!("domain {name} has no policy"))
                .advise("write [policy] into a domain file, and name the file with --file")
                .into());
        }
    };
    // All that can be refused is, before anything is recorded.
    spec.check()?;
    let fit = |error| Failure::of(error, false);
    hook::require_fit(&spec).map_err(fit)?;
    let place = match args.no_timer {
        true => None,
        false => Some(Place::of(session, args.units.as_deref()).map_err(fit)?),
    };
    let mut units = Vec::new();
    if let Some(place) = &place {
        place.installed(&name).map_err(fit)?;
        place.require_understood(session, &spec)?;
        // The units do not depend on the identity.
        let id = recorded.map_or_else(snapcore::policy::PolicyId::fresh, |recorded| recorded.id);
        let policy = snapcore::policy::Policy::new(id, spec.clone());
        units = place.units(session, &name, &policy).map_err(fit)?;
    }
    let mut document = PolicyInstallDoc {
        domain: name,
        dry_run: args.dry_run,
        policy: recorded.filter(|recorded| recorded.spec == spec).cloned(),
        spec: spec.clone(),
        units: units.iter().map(|(path, text)| UnitDoc { path: path.clone(), text: text.clone() }).collect(),
        enabled: !args.dry_run && place.as_ref().is_some_and(Place::asks_systemd),
        own: Vec::new(),
        others: Vec::new(),
    };
    if args.dry_run {
        return Ok(session.reported(document, install_text));
    }
    let _turn = session.ask(session.service.policy_turn(&args.domain)).map_err(Failure::of_plan)?;
    let changed = session.change(session.service.set_policy(&args.domain, Some(spec), args.adopt))?;
    if let Some(place) = &place {
        let left = "the policy is recorded, and its timer is not complete: the same command tries again";
        place.install(session, &units).map_err(|failure| failure.left(left))?;
    }
    let PolicyChange { policy, own, others, .. } = changed;
    (document.policy, document.own, document.others) = (policy, own, others);
    Ok(session.changed(document, install_text))
}

/// Reads the policy of the domain `name` from a domain file.
fn policy_of_file(
    session: &Session,
    file: &camino::Utf8Path,
    name: &DomainName,
) -> Result<PolicySpec, Failure> {
    let spec = domain::read_file(session, file)?;
    if spec.name != *name {
        return Err(Error::new(ErrorKind::Usage, format!("{file} is the file of domain {}", spec.name))
            .state("no changes made")
            .advise(format!("name the file of domain {name}"))
            .into());
    }
    spec.policy.ok_or_else(|| {
        Error::new(ErrorKind::Usage, format!("{file} has no [policy]"))
            .state("no changes made")
            .advise("add one: [policy], and below it for example daily = 7")
            .into()
    })
}

fn install_text(document: &PolicyInstallDoc) -> String {
    let mut text = match document.dry_run {
        true => format!("would record this policy of {}:\n", document.domain),
        false => format!("recorded the policy of {}:\n", document.domain),
    };
    text.push_str(&rules_text(&document.spec));
    for unit in &document.units {
        match document.dry_run {
            true => text.push_str(&format!(
                "would write {}:\n{}",
                unit.path,
                crate::table::indent(&unit.text, "  ")
            )),
            false => text.push_str(&format!("wrote {}\n", unit.path)),
        }
    }
    if document.enabled {
        text.push_str("systemd runs it; `systemctl list-timers` shows when\n");
    }
    if !document.own.is_empty() {
        let number = shown::count(document.own.len(), "snapshot");
        text.push_str(&format!("{number} of this policy: {}\n", names(&document.own)));
    }
    if !document.others.is_empty() {
        let number = shown::count(document.others.len(), "snapshot");
        text.push_str(&format!(
            "  note: {number} of an earlier policy, which this one never prunes: {}\n",
            names(&document.others)
        ));
    }
    if document.dry_run {
        text.push_str("no changes made\n");
    }
    text
}

/// Formats what a policy says, a line each.
fn rules_text(spec: &PolicySpec) -> String {
    let mut lines = Vec::new();
    if let Ok(every) = spec.every() {
        lines.push(("takes", format!("one in each {}", every.noun())));
    }
    let rules = spec.rules();
    let periods = rules.periods().map(|(rule, number)| (rule.to_string(), number));
    let numbers = [("last".to_owned(), rules.last)].into_iter().chain(periods);
    let kept: Vec<String> =
        numbers.filter(|(_, number)| *number > 0).map(|(rule, number)| format!("{number} {rule}")).collect();
    lines.push(("keeps", if kept.is_empty() { "all".to_owned() } else { kept.join(", ") }));
    lines.extend(spec.min_age.map(|age| ("min-age", age.to_string())));
    lines.extend(spec.zone.clone().map(|zone| ("zone", zone)));
    lines.extend(spec.keep_undo.map(|age| ("keeps undo", age.to_string())));
    for (which, command) in [("before", &spec.before), ("after", &spec.after)] {
        if !command.is_empty() {
            lines.push((which, crate::commands::change::shell_text(command)));
        }
    }
    lines.iter().map(|(what, said)| format!("  {what:<11} {said}\n")).collect()
}

fn remove(session: &Session, args: &PolicyRemove) -> Result<Answer, Failure> {
    let place = Place::of(session, args.units.as_deref());
    let listing = match session.ask(session.service.list(&args.domain)) {
        Ok(listing) => Some(listing),
        // The timer of a domain that is not known any more can be removed too.
        Err(failure) if failure.kind() == ErrorKind::NotFound => {
            let DomainRef::Name(name) = &args.domain else { return Err(failure.of_plan()) };
            match &place {
                Ok(place) if !place.installed(name)?.is_empty() => None,
                _ => return Err(failure.of_plan()),
            }
        }
        Err(failure) => return Err(failure.of_plan()),
    };
    let name = match (&listing, &args.domain) {
        (Some(listing), _) => listing.domain.name.clone(),
        (None, DomainRef::Name(name)) => name.clone(),
        (None, _) => return Err(Error::new(ErrorKind::Internal, "the domain has no name").into()),
    };
    let policy = listing.as_ref().and_then(|listing| listing.domain.policy.clone());
    let own = listing
        .iter()
        .flat_map(|listing| &listing.snapshots)
        .filter(|snapshot| policy.as_ref().is_some_and(|policy| snapshot.policy == Some(policy.id)));
    let snapshots = own.map(|snapshot| snapshot.name.clone()).collect();
    // Without systemd there is no timer, unless the user says where.
    let units = match &place {
        Ok(place) => place.installed(&name).map_err(|error| Failure::of(error, false))?,
        Err(_) => Vec::new(),
    };
    let mut document =
        PolicyRemoveDoc { domain: name.clone(), dry_run: args.dry_run, policy, units, snapshots };
    if args.dry_run {
        return Ok(session.reported(document, remove_text));
    }
    // The timer goes first: a crash after it leaves a policy that nothing runs, and this command can be
    // repeated.
    if listing.is_some() {
        let _turn = session.ask(session.service.policy_turn(&args.domain)).map_err(Failure::of_plan)?;
        if let Ok(place) = &place {
            document.units = place.remove(session, &name)?;
        }
        let left = "the timer is removed; the policy is still recorded";
        let changed = session.change(session.service.set_policy(&args.domain, None, false));
        changed.map_err(|failure| if document.units.is_empty() { failure } else { failure.left(left) })?;
    } else if let Ok(place) = &place {
        document.units = place.remove(session, &name)?;
    }
    Ok(session.changed(document, remove_text))
}

fn remove_text(document: &PolicyRemoveDoc) -> String {
    let would = if document.dry_run { "would remove" } else { "removed" };
    let mut text = match &document.policy {
        Some(_) => format!("{would} the policy of {}\n", document.domain),
        None => format!("{} has no policy\n", document.domain),
    };
    for unit in &document.units {
        text.push_str(&format!("{would} {unit}\n"));
    }
    if !document.snapshots.is_empty() {
        let number = shown::count(document.snapshots.len(), "snapshot");
        text.push_str(&format!("{number} of it stay: {}\n", names(&document.snapshots)));
    }
    if document.dry_run {
        text.push_str("no changes made\n");
    }
    text
}

fn show(session: &Session, args: &PolicyShow) -> Result<Answer, Failure> {
    let listing = session.ask(session.service.list(&args.domain))?;
    let Some(policy) = listing.domain.policy.clone() else {
        return Err(Error::new(ErrorKind::NotFound, format!("domain {} has no policy", listing.domain.name))
            .advise("write [policy] into a domain file, and run `domsnap policy install` with it")
            .into());
    };
    let own: Vec<_> =
        listing.snapshots.iter().filter(|snapshot| snapshot.policy == Some(policy.id)).collect();
    let timer: Option<Utf8PathBuf> = match Place::of(session, args.units.as_deref()) {
        Ok(place) => place.timer(&listing.domain.name),
        Err(_) => None,
    };
    let document = PolicyShowDoc {
        domain: listing.domain.name.clone(),
        policy,
        snapshots: own.iter().map(|snapshot| snapshot.name.clone()).collect(),
        newest: own.last().map(|snapshot| snapshot.created),
        timer,
    };
    Ok(session.reported(document, |document| {
        let spec = &document.policy.spec;
        let mut text = format!("policy of {}\n{}", document.domain, rules_text(spec));
        let newest = match document.newest {
            Some(newest) => {
                format!("{}, the newest {}", document.snapshots.len(), shown::time(newest, &zone_of(spec)))
            }
            None => "none yet".to_owned(),
        };
        let timer = document.timer.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string);
        for (what, said) in [("snapshots", newest), ("timer", timer)] {
            text.push_str(&format!("  {what:<11} {said}\n"));
        }
        text
    }))
}
