//! The hold on a snapshot that is served.
//!
//! The image's locks alone would refuse a delete, with less to say. The hold names the server, and it lasts
//! until the server's process ends, also if that is killed.

use std::io::Write;

use camino::Utf8Path;
use snapcore::service::{DomainRef, HoldRequest, ReleaseRequest};
use snapcore::{Holder, HoldingProcess, SnapshotName};

use crate::failure::Failure;
use crate::session::Session;

/// A snapshot that is served, with its hold.
pub struct Served {
    domain: DomainRef,
    name: SnapshotName,
    holder: Holder,
}

impl Served {
    /// Holds the snapshot `name` of the domain of `image`; `None` where the catalogue does not have it.
    ///
    /// A server may run as a user who may not write the catalogue. Then it serves without a hold, under the
    /// image's locks alone. It also does while an operation is interrupted, because a change of the records
    /// would recover that first, and the recovery may need the server.
    pub fn hold(session: &Session, image: &Utf8Path, name: &str) -> Option<Self> {
        let owner = session.ask(session.service.belonging(image)).ok()??;
        let listing = &owner.listing;
        let snapshot = listing.snapshots.iter().find(|snapshot| snapshot.name.as_str() == name)?;
        if !listing.catalogued || !listing.unfinished.is_empty() || snapshot.point(&owner.target).is_none() {
            return None;
        }
        let (domain, name) = (DomainRef::Name(listing.domain.name.clone()), snapshot.name.clone());
        let held = |process: &HoldingProcess| {
            Ok::<_, Failure>(Self { domain, name, holder: Holder::new(format!("serve:{}", process.pid))? })
        };
        let attempt = || -> Result<Self, Failure> {
            let process = HoldingProcess::own()?;
            let held = held(&process)?;
            let request = HoldRequest::new(held.name.clone(), held.holder.clone())
                .reason(format!("served from {}", image.file_name().unwrap_or(image.as_str())))
                .process(Some(process));
            session.ask(session.service.hold(&held.domain, request))?;
            Ok(held)
        };
        attempt().map_err(|failure| warn("the snapshot is served without a hold", &failure)).ok()
    }

    /// Releases it. Where that fails, the hold ends with the process all the same.
    pub fn release(self, session: &Session) {
        let request = ReleaseRequest::new(self.name, self.holder).force(true);
        if let Err(failure) = session.ask(session.service.release(&self.domain, request)) {
            warn("the hold of this server ends with its process", &failure);
        }
    }
}

fn warn(what: &str, failure: &Failure) {
    // Where standard error is closed, there is no place for the message.
    let _ = writeln!(std::io::stderr(), "warning: {what}: {}", failure.message());
}
