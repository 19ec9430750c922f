//! What a test farm does: boot once, take a snapshot, then run a job and revert in place, again and again.
//!
//! ```text
//! cargo run --example revert_loop -- QMP-SOCKET 10 'ssh guest ./job'
//! ```

use std::sync::Arc;

use catalogue_sqlite::SqliteCatalogue;
use snapcore::service::RevertRequest;
use snapcore::service::{CreateRequest, DeleteRequest, DomainRef, Domsnap};
use snapcore::{Error, ErrorKind};
use snapcore::{Registry, Result, SnapshotName};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, rounds, job] = &args[..] else {
        return Err(Error::new(ErrorKind::Usage, "give a QMP socket, a number of rounds and a job"));
    };
    let mut registry = Registry::new();
    registry.register(Arc::new(backend_qcow2::Qcow2::new()))?;
    hypervisor_qemu::register(&mut registry);
    let state = std::env::var("DOMSNAP_STATE_DIR").unwrap_or_else(|_| "/var/lib/domsnap".into());
    let domsnap = Domsnap::new(Arc::new(SqliteCatalogue::new(state)), registry);

    let (domain, booted) = (DomainRef::parse(&format!("qemu:{socket}"))?, SnapshotName::new("booted")?);
    let never = CancellationToken::new();
    domsnap.create(&domain, CreateRequest::new(booted.clone()), never.clone()).await?;
    for round in 1..=rounds.parse::<u32>().unwrap_or(1) {
        let job =
            tokio::task::block_in_place(|| std::process::Command::new("sh").arg("-c").arg(job).status());
        let reverted = domsnap.revert(&domain, RevertRequest::new(booted.clone()), never.clone()).await?;
        println!("round {round}: {job:?}; back after {:?} us", reverted.downtime_us.unwrap_or_default());
    }
    domsnap.delete(&domain, DeleteRequest::new(vec![booted]), never).await.map(drop)
}
