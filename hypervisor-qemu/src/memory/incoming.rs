//! Loads a memory image into a QEMU that was started to wait for one.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::time::sleep;

use super::Image;
use crate::{
    error::{Error, ErrorKind, Result},
    fdset::FdSet,
    machine::Machine,
    migration,
    qcow2::STREAM,
    run_state::RunState,
    stream::Split,
};

/// Loads a memory image into a QEMU that was started with `-incoming defer`. Without `-S` too, the guest runs
/// as soon as it is loaded, if it ran when it was saved. Returns the run state.
///
/// The image is lent as a descriptor, so QEMU needs no rights to its path. Not idempotent: such a QEMU loads
/// one image.
///
/// # Errors
/// [`ErrorKind::Invalid`] if this QEMU does not wait for an image; [`ErrorKind::Failed`] with QEMU's message:
/// that QEMU can only be ended then; [`ErrorKind::Lost`] if it has ended by itself, as older ones do when an
/// image does not fit.
pub async fn restore_deferred(machine: &Machine, image: &Image, deadline: Duration) -> Result<RunState> {
    load(machine, (image.descriptor()?, STREAM), image.path(), deadline).await
}

/// Loads the devices of a memory image that was taken apart into a QEMU that was started with
/// [`Split::arguments`] and `-incoming defer`. Otherwise as [`restore_deferred`].
///
/// # Errors
/// Those of [`restore_deferred`].
pub async fn restore_split(machine: &Machine, split: &Split, deadline: Duration) -> Result<RunState> {
    load(machine, split.descriptor()?, split.devices(), deadline).await
}

/// Loads a stream that begins at an offset of a file.
async fn load(
    machine: &Machine,
    (descriptor, begin): (OwnedFd, u64),
    path: &Path,
    deadline: Duration,
) -> Result<RunState> {
    let attempted = "loading a memory image";
    let subject = path.display().to_string();
    let state = machine.run_state().await?;
    if state.word != "inmigrate" {
        let detail = format!("QEMU does not wait for one: it is in the run state {:?}", state.word);
        return Err(Error::new(ErrorKind::Invalid, attempted, subject, detail)
            .advise("start QEMU with `-incoming defer`, or restore in place"));
    }
    let abilities = machine.abilities().await?;
    let mut arguments = json!({});
    if abilities.exit_on_error {
        arguments["exit-on-error"] = json!(false);
    }
    let mut lent = None;
    if abilities.file_migration {
        let set = FdSet::add(machine, "memory", &[&descriptor]).await?;
        arguments["uri"] = json!(format!("file:{},offset={begin}", set.path()));
        lent = Some(set);
    } else {
        let mut file = File::from(descriptor);
        file.seek(SeekFrom::Start(begin)).map_err(|error| Error::io(attempted, path, error))?;
        let name = "domsnap-memory";
        let given = machine.qmp().get_fd(name, file.as_fd()).await;
        given.map_err(|error| Error::qmp(attempted, &subject, error))?;
        arguments["uri"] = json!(format!("fd:{name}"));
    }
    let started = machine.run(attempted, &subject, "migrate-incoming", arguments).await;
    let loaded = match started {
        Ok(_) => wait(machine, attempted, &subject, deadline).await,
        Err(error) => Err(error),
    };
    if let Some(set) = lent {
        set.remove(machine).await;
    }
    loaded
}

async fn wait(machine: &Machine, attempted: &str, subject: &str, deadline: Duration) -> Result<RunState> {
    let until = Instant::now() + deadline;
    loop {
        migration::status(machine).await?.check(attempted, subject)?;
        let state = machine.run_state().await?;
        if !matches!(state.word.as_str(), "inmigrate" | "finish-migrate") {
            return Ok(state);
        }
        if Instant::now() >= until {
            let detail = format!("it is not loaded within {} s", deadline.as_secs());
            return Err(Error::new(ErrorKind::Timeout, attempted, subject, detail));
        }
        sleep(Duration::from_millis(2)).await;
    }
}
