//! Memory that is kept: a guest that is ready is stopped, and its memory and disks go into the cache; other
//! guests of the same options begin there. Both are of one instant, because the guest does not run between
//! them.
//!
//! QEMU 10.0 writes each page at a place of its own (mapped-ram), and reads them back that way; 7.2 knows
//! neither that nor files, and writes a stream through `cat`.

use std::{
    ffi::OsString,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use qmp::Qmp;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::{
    cache::Built,
    monitor,
    options::{GuestOptions, Version},
    qemu::Qemu,
};

const MEMORY: &str = "memory";

/// The directory of the cache with the memory and disks of such a guest; it is made if there is none.
pub(crate) fn get(options: &GuestOptions, built: &Built) -> Result<PathBuf> {
    let inputs = inputs(options, built)?;
    let mut hasher = DefaultHasher::new();
    (&inputs, &options.files).hash(&mut hasher);
    built.once(&format!("state-{:016x}", hasher.finish()), |dir| {
        fs::create_dir(dir)?;
        fs::write(dir.join("inputs"), &inputs)?;
        let advice = "a machine whose memory cannot be kept starts with `GuestOptions::from_boot`";
        save(options, dir)
            .with_context(|| format!("a guest that is ready cannot be kept for other tests ({advice})"))
    })
}

/// Everything that the memory depends on: QEMU, its command line, the disks' size. The guest's build is the
/// directory.
fn inputs(options: &GuestOptions, built: &Built) -> Result<String> {
    let qemu = Qemu::find(options.version)?;
    let line = qemu.command_line(options, built.dir(), "DIR")?;
    let line: Vec<_> = line.iter().map(|word| word.to_string_lossy()).collect();
    Ok(format!("{}\ndisks of {} MiB\n{}\n", qemu.identity()?, options.disk_mib, line.join("\n")))
}

/// Boots such a guest and keeps it.
fn save(options: &GuestOptions, dir: &Path) -> Result<()> {
    let options = GuestOptions { boot: true, parent: None, ..options.clone() };
    let deadline = options.deadline;
    let mut guest = options.clone().start()?;
    guest.await_agent()?;
    guest.wait_ticks(10)?;
    guest.expect_no_bad()?;
    let memory = dir.join(MEMORY);
    monitor::block_on(async || {
        let qmp = monitor::connect(guest.qmp_socket(), deadline).await?;
        let uri = prepare(&qmp, options.version, &memory, "cat >").await?;
        qmp.execute_raw("stop", Value::Null).await?;
        qmp.execute_raw("migrate", json!({ "uri": uri })).await?;
        let until = Instant::now() + deadline;
        loop {
            let now = qmp.execute_raw("query-migrate", Value::Null).await?;
            match now["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => bail!("the memory could not be saved: {now}"),
                _ if Instant::now() > until => bail!("the memory was not saved within {deadline:?}: {now}"),
                _ => sleep(Duration::from_millis(5)).await,
            }
        }
        // A QEMU that ends in order leaves its images in order.
        qmp.execute_raw("quit", Value::Null).await?;
        Ok(())
    })?;
    guest.wait_end()?;
    for disk in guest.disks() {
        fs::copy(&disk, dir.join(disk.file_name().context("a disk has a name")?))?;
    }
    Ok(())
}

/// The arguments that a QEMU is started with to be restored.
pub(crate) fn incoming() -> [OsString; 2] {
    ["-incoming".into(), "defer".into()]
}

/// Puts the memory of `state` into a QEMU that waits for it. It is paused then.
pub(crate) fn restore(options: &GuestOptions, socket: &Path, state: &Path) -> Result<()> {
    let memory = state.join(MEMORY);
    monitor::block_on(async || {
        let qmp = monitor::connect(socket, options.deadline).await?;
        let uri = prepare(&qmp, options.version, &memory, "cat").await?;
        qmp.execute_raw("migrate-incoming", json!({ "uri": uri })).await?;
        let until = Instant::now() + options.deadline;
        loop {
            let status = qmp.execute_raw("query-status", Value::Null).await?["status"].take();
            match status.as_str() {
                Some("inmigrate" | "finish-migrate") if Instant::now() < until => {
                    sleep(Duration::from_millis(2)).await;
                }
                Some("paused" | "prelaunch") => break,
                _ => bail!("a guest that was kept ({}) does not load: QEMU is {status}", state.display()),
            }
        }
        if options.version == Version::New {
            set_mapped_ram(&qmp, false).await?;
        }
        Ok(())
    })
}

/// Makes QEMU ready for such a file, and gives its name for QEMU.
async fn prepare(qmp: &Qmp, version: Version, memory: &Path, cat: &str) -> Result<String> {
    match version {
        Version::New => {
            set_mapped_ram(qmp, true).await?;
            Ok(format!("file:{}", memory.display()))
        }
        Version::Old => {
            let parameters = json!({ "max-bandwidth": 10_u64 << 30 });
            qmp.execute_raw("migrate-set-parameters", parameters).await?;
            Ok(format!("exec:{cat} '{}'", memory.display()))
        }
    }
}

async fn set_mapped_ram(qmp: &Qmp, state: bool) -> Result<()> {
    let capabilities = json!({ "capabilities": [{ "capability": "mapped-ram", "state": state }] });
    qmp.execute_raw("migrate-set-capabilities", capabilities).await?;
    Ok(())
}
