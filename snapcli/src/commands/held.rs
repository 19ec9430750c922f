//! `undo`, `hold`, `release`, `rename`, `describe`, `expire` and `history`.

use clap::ValueEnum;
use jiff::Timestamp;
use snapcore::service::{
    AmendRequest, DomainRef, HoldRequest, Outcome, ReleaseRequest, Request, UndoRequest,
};
use snapcore::{Error, ErrorKind, Holder, Result, shell_command};

use crate::answer::Answer;
use crate::args::{Describe, Expire, History, Hold, KeepForUndo, Moment, Release, Rename, Undo};
use crate::commands::change::{dry_run, guest_now, names, remarks};
use crate::commands::du::certain;
use crate::commands::power;
use crate::documents::{ChangeDoc, HistoryDoc, PreviousDoc, RevertDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;
use crate::units;

/// `domsnap undo`
pub fn undo(session: &Session, args: Undo) -> Result<Answer, Failure> {
    let mut request = UndoRequest::new().forget(args.forget);
    if let Some(power) = args.then.asked() {
        request = request.power(power);
    }
    if args.dry_run {
        return dry_run(session, &args.domain, &Request::Undo(request));
    }
    let outcome = session.change(session.service.undo(&args.domain, request, session.cancel()))?;
    if args.forget {
        return Ok(session.changed(ChangeDoc { domain: outcome.domain.clone(), outcome }, |document| {
            let outcome = &document.outcome;
            let what = match outcome.snapshots.is_empty() {
                true => "there is no replaced state of",
                false => "removed the replaced state of",
            };
            format!("{what} {}\n{}", document.domain, remarks(outcome))
        }));
    }
    let now = power::after_revert(session, &args.domain, &outcome);
    let document = RevertDoc { domain: outcome.domain.clone(), outcome, power: now };
    Ok(session.changed(document, |document| {
        let (guest, remarks) = (guest_now(document), remarks(&document.outcome));
        format!(
            "undid the last revert of {}; `domsnap undo {}` undoes this{guest}\n{remarks}",
            document.domain, document.domain
        )
    }))
}

/// `domsnap hold`
pub fn hold(session: &Session, args: Hold) -> Result<Answer, Failure> {
    let holder = holder_or_user(args.holder)?;
    let said = format!("{holder} holds snapshot {}", args.name);
    let request = HoldRequest::new(args.name, holder).reason(args.reason).until(args.until);
    if args.dry_run {
        return dry_run(session, &args.domain, &Request::Hold(request));
    }
    let outcome = session.change(session.service.hold(&args.domain, request))?;
    Ok(changed(session, outcome, &said))
}

/// `domsnap release`
pub fn release(session: &Session, args: Release) -> Result<Answer, Failure> {
    let holder = holder_or_user(args.holder)?;
    let said = format!("released the hold of {holder} on snapshot {}", args.name);
    let request = ReleaseRequest::new(args.name, holder).force(args.force);
    if args.dry_run {
        return dry_run(session, &args.domain, &Request::Release(request));
    }
    let outcome = session.change(session.service.release(&args.domain, request))?;
    Ok(changed(session, outcome, &said))
}

/// `domsnap rename`
pub fn rename(session: &Session, args: Rename) -> Result<Answer, Failure> {
    let said = format!("renamed snapshot {} to {}", args.name, args.new);
    let request = AmendRequest::new(args.name).rename(Some(args.new));
    amend(session, &args.domain, request, args.dry_run, &said)
}

/// `domsnap describe`
pub fn describe(session: &Session, args: Describe) -> Result<Answer, Failure> {
    let said = format!("changed the description of snapshot {}", args.name);
    let request = AmendRequest::new(args.name).description(Some(args.text));
    amend(session, &args.domain, request, args.dry_run, &said)
}

/// `domsnap expire`
pub fn expire(session: &Session, args: Expire) -> Result<Answer, Failure> {
    let Moment(time) = args.time;
    let said = match time {
        Some(time) => {
            format!("set the expiry of snapshot {} to {}", args.name, units::time(time, &units::zone()))
        }
        None => format!("removed the expiry of snapshot {}", args.name),
    };
    let request = AmendRequest::new(args.name).expires(Some(time));
    amend(session, &args.domain, request, args.dry_run, &said)
}

/// `domsnap history`
pub fn history(session: &Session, args: &History) -> Result<Answer, Failure> {
    let operations = session.ask(session.service.history(&args.domain))?;
    Ok(session.reported(HistoryDoc { domain: args.domain.to_string(), operations }, |document| {
        if document.operations.is_empty() {
            return format!("no operation on {} is recorded\n", document.domain);
        }
        let zone = units::zone();
        let rows = document.operations.iter().map(|operation| {
            vec![
                units::time(operation.started, &zone),
                match operation.group {
                    Some(_) => format!("{} (group)", operation.operation),
                    None => operation.operation.clone(),
                },
                operation.state.to_string(),
                names(&operation.snapshots),
                operation.errors.last().cloned().unwrap_or_default(),
            ]
        });
        table(&["STARTED", "OPERATION", "STATE", "SNAPSHOTS", "ERROR"], rows)
    }))
}

fn amend(
    session: &Session,
    domain: &DomainRef,
    request: AmendRequest,
    is_dry: bool,
    said: &str,
) -> Result<Answer, Failure> {
    if is_dry {
        return dry_run(session, domain, &Request::Amend(request));
    }
    let outcome = session.change(session.service.amend(domain, request))?;
    Ok(changed(session, outcome, said))
}

fn changed(session: &Session, outcome: Outcome, said: &str) -> Answer {
    session.changed(ChangeDoc { domain: outcome.domain.clone(), outcome }, |document| {
        format!("{}: {said}\n{}", document.domain, remarks(&document.outcome))
    })
}

/// The holder that the user names; else the user. Of a command under `sudo` it is the one who called it.
fn holder_or_user(said: Option<Holder>) -> Result<Holder> {
    let variables = ["SUDO_USER", "LOGNAME", "USER"];
    let user = || variables.iter().find_map(|name| Holder::new(std::env::var(name).ok()?).ok());
    match said.or_else(|| user().filter(|user| !user.is_automatic())) {
        Some(holder) => Ok(holder),
        None => Holder::new("user"),
    }
}

/// Joins the holders of a snapshot.
pub fn holders(snapshot: &[snapcore::Hold]) -> String {
    snapshot.iter().map(|hold| hold.holder.as_str()).collect::<Vec<_>>().join(", ")
}

/// Formats the state that the last revert of `domain` replaced.
pub fn previous(domain: &str, document: &PreviousDoc, now: Timestamp) -> String {
    let ago = units::ago(document.replaced, now);
    let space = document.frees.map(|bytes| certain(bytes, document.certainty));
    let space = space.unwrap_or_else(|| "size unknown".to_owned());
    let memory = if document.memory.is_some() { " with memory" } else { "" };
    let command = shell_command(["domsnap", "undo", domain]);
    format!("replaced {ago}{memory}, {space}: `{command}` brings it back\n")
}

/// The default of `--undo`, where the user has set one.
pub fn default_keep() -> Result<Option<KeepForUndo>> {
    let Some(said) = std::env::var_os("DOMSNAP_UNDO").filter(|said| !said.is_empty()) else {
        return Ok(None);
    };
    let said = said.to_string_lossy();
    KeepForUndo::from_str(&said, false).map(Some).map_err(|_| {
        Error::new(ErrorKind::Usage, format!("DOMSNAP_UNDO is {said:?}, which is not known"))
            .advise("set it to no, free, disks or memory, or unset it")
    })
}

/// Formats the time at which a snapshot expires.
pub fn expiry(expires: Option<Timestamp>, now: Timestamp) -> Option<String> {
    let expires = expires?;
    let time = units::time(expires, &units::zone());
    Some(if expires <= now { format!("expired {time}") } else { format!("expires {time}") })
}

/// Formats what keeps a snapshot, and what ends it.
pub fn marks(holds: &[snapcore::Hold], deferred: bool, expires: Option<Timestamp>, now: Timestamp) -> String {
    let held = (!holds.is_empty()).then(|| format!("held by {}", holders(holds)));
    let deferred = deferred.then(|| "deleted when released".to_owned());
    held.into_iter().chain(deferred).chain(expiry(expires, now)).collect::<Vec<_>>().join("; ")
}
