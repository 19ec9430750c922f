//! `domsnap domain scan`: what runs on this machine, and how each is registered.

use std::collections::BTreeSet;

use camino::Utf8Path;
use snapcore::DomainName;
use snapcore::service::{DomainRef, Scanned};

use crate::answer::Answer;
use crate::commands::change::shell_text;
use crate::documents::{ScanDoc, ScannedDoc};
use crate::failure::Failure;
use crate::session::Session;

/// Looks for running domains.
pub fn run(session: &Session) -> Result<Answer, Failure> {
    let known = session.ask(session.service.domains())?;
    let mut taken: BTreeSet<DomainName> = known.into_iter().map(|known| known.domain.name).collect();
    let found = session.ask(session.service.scan())?.into_iter();
    let found = found.map(|scanned| document(session, scanned, &mut taken)).collect();
    Ok(session.reported(ScanDoc { found }, |document| match document.found.is_empty() {
        true => NOTHING.to_owned(),
        false => document.found.iter().map(reported).collect::<Vec<_>>().join("\n"),
    }))
}

const NOTHING: &str = "no running domain was found that can be reached\n  \
    a QEMU needs a QMP socket (-qmp unix:PATH,server=on,wait=off) that no other program is connected to, and the caller must be its \
    user or root\n";

fn document(session: &Session, scanned: Scanned, taken: &mut BTreeSet<DomainName>) -> ScannedDoc {
    let Scanned { hypervisor, control, seen, .. } = scanned;
    // By the one name of its socket, whatever its own command line calls it.
    let resolved = match format!("{hypervisor}:{}", control.address).parse::<DomainRef>() {
        Ok(domain) => session.ask(session.service.resolve(&domain)),
        Err(error) => Err(error.into()),
    };
    let (registered, problem) = match resolved {
        Ok(domain) if !domain.unregistered => (Some(domain.name), None),
        Ok(_) => (None, None),
        Err(failure) => (None, Some(failure.message())),
    };
    let mut register = Vec::new();
    if registered.is_none() && problem.is_none() {
        let name = free_name(seen.name.as_deref(), Utf8Path::new(&control.address), taken);
        let place = format!("{hypervisor}:{}", control.address);
        register = ["domsnap", "domain", "add", name.as_str(), "--at", &place].map(str::to_owned).to_vec();
        taken.extend(DomainName::new(name));
    }
    ScannedDoc {
        hypervisor,
        control,
        name: seen.name,
        running: seen.running,
        summary: seen.summary,
        disks: seen.disks,
        registered,
        register,
        problem,
    }
}

/// A name that no domain has, made of what the hypervisor calls it, or else of what its socket is called.
fn free_name(own: Option<&str>, socket: &Utf8Path, taken: &BTreeSet<DomainName>) -> String {
    // With a colon it might be read as the address of a hypervisor.
    let is_name = |name: &&str| !name.contains(':') && DomainName::new(*name).is_ok();
    let wanted = [own, socket.file_stem()].into_iter().flatten().find(is_name);
    let wanted: String = wanted.unwrap_or("domain").chars().take(DomainName::MAX_BYTES - 4).collect();
    let is_free = |name: &str| !taken.iter().any(|taken| taken.as_str() == name);
    let numbered = (2_u64..).map(|number| format!("{wanted}-{number}"));
    let mut names = std::iter::once(wanted.clone()).chain(numbered);
    // There are more numbers than domains.
    names.find(|name| is_free(name)).unwrap_or(wanted)
}

fn reported(found: &ScannedDoc) -> String {
    let state = if found.running { "running" } else { "paused" };
    let name = found.name.as_deref().unwrap_or("unnamed");
    let mut text = format!("{name} ({state}) at {}:{}\n", found.hypervisor, found.control.address);
    text.push_str(&format!("  {}\n", found.summary));
    for disk in &found.disks {
        let why = disk.left_out.as_ref().map(|why| format!("; left out: {why}")).unwrap_or_default();
        text.push_str(&format!("  {}  {} ({}){why}\n", disk.target, disk.address, disk.format));
    }
    text.push_str(&match (&found.registered, &found.problem) {
        (Some(domain), _) => format!("  registered as {domain}\n"),
        (None, Some(problem)) => format!("  cannot be registered as it is: {problem}\n"),
        (None, None) => format!("  register it: {}\n", shell_text(&found.register)),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The suggested name is the hypervisor's or the socket's, and never another domain's.
    #[test]
    fn suggested_name_is_unique() {
        let taken: BTreeSet<DomainName> =
            ["web", "web-2", "db"].into_iter().map(|name| DomainName::new(name).unwrap()).collect();
        let free = |own, socket| free_name(own, Utf8Path::new(socket), &taken);
        assert_eq!(free(Some("mail"), "/run/x.qmp"), "mail");
        assert_eq!(free(Some("web"), "/run/x.qmp"), "web-3");
        assert_eq!(free(None, "/run/db.qmp"), "db-2");
        assert_eq!(free(Some("a b"), "/run/x.qmp"), "x");
        assert_eq!(free(Some("qemu:a"), "/run/ .qmp"), "domain");
    }
}
