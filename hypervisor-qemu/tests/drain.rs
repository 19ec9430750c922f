//! The drain of a guest with I/O threads, behind a monitor that says what a busy QEMU says.

mod kit;

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    thread,
};

use anyhow::{Context, Result, ensure};
use hypervisor_qemu::Machine;
use serde_json::{Value, json};
use testguest::GuestOptions;

/// A monitor between domsnap and QEMU. While the disks are drained for the first `lies` times, each queue has
/// a request that was taken and is not complete.
struct Monitor {
    socket: PathBuf,
    /// The commands, in their order.
    commands: Arc<Mutex<Vec<String>>>,
}

impl Monitor {
    fn start(qemu: &Path, dir: &Path, lies: usize) -> Result<Self> {
        let socket = dir.join("monitor");
        let listener = UnixListener::bind(&socket)?;
        let commands = Arc::new(Mutex::new(Vec::new()));
        let (heard, qemu) = (commands.clone(), qemu.to_owned());
        thread::spawn(move || -> Result<()> {
            let client = listener.accept()?.0;
            let qemu = UnixStream::connect(qemu)?;
            let names: Arc<Mutex<HashMap<String, String>>> = Arc::default();
            let (asked, mut to_qemu) = (names.clone(), qemu.try_clone()?);
            let from_client = BufReader::new(client.try_clone()?);
            let listed = heard.clone();
            thread::spawn(move || -> Result<()> {
                for line in from_client.lines() {
                    let line = line?;
                    let command: Value = serde_json::from_str(&line)?;
                    let name = command["execute"].as_str().unwrap_or_default().to_owned();
                    asked.lock().unwrap().insert(command["id"].to_string(), name.clone());
                    listed.lock().unwrap().push(name);
                    writeln!(to_qemu, "{line}")?;
                }
                Ok(to_qemu.shutdown(std::net::Shutdown::Both)?)
            });
            let mut to_client = client;
            for line in BufReader::new(qemu).lines() {
                let mut reply: Value = serde_json::from_str(&line?)?;
                let name = names.lock().unwrap().remove(&reply["id"].to_string());
                if name.as_deref() == Some("x-query-virtio-queue-status") && drains(&heard) <= lies {
                    reply["return"]["inuse"] = json!(1);
                }
                writeln!(to_client, "{reply}")?;
            }
            Ok(())
        });
        Ok(Self { socket, commands })
    }

    /// So often the two disks were drained.
    fn drains(&self) -> usize {
        drains(&self.commands)
    }

    fn stops(&self) -> usize {
        self.commands.lock().unwrap().iter().filter(|name| *name == "stop").count()
    }
}

fn drains(commands: &Mutex<Vec<String>>) -> usize {
    commands.lock().unwrap().iter().filter(|name| *name == "blockdev-mirror").count() / 2
}

async fn no_hold_is_left(machine: &Machine) -> Result<()> {
    let jobs = machine.qmp().execute_raw("query-jobs", Value::Null).await?;
    ensure!(jobs == json!([]), "a job is left: {jobs}");
    let nodes = machine.qmp().execute_raw("query-named-block-nodes", json!({ "flat": true })).await?;
    ensure!(!nodes.to_string().contains("domsnap-hn-"), "a node is left: {nodes}");
    Ok(())
}

/// A request that a thread takes while the drain begins would be completed after the stop, and its interrupt
/// lost: the disks are drained until no queue has one.
#[tokio::test(flavor = "multi_thread")]
async fn request_taken_while_the_drain_begins_is_waited_for() -> Result<()> {
    let guest = kit::loaded(GuestOptions::new().iothreads(2).cpus(2).from_boot())?;
    let monitor = Monitor::start(guest.qmp_socket(), guest.dir(), 2)?;
    let machine = kit::machine_at(&monitor.socket).await?;
    let paused = machine.pause().await?;
    assert!(monitor.drains() > 2, "the guest was stopped over a request: {:?}", monitor.commands);
    let commands = monitor.commands.lock().unwrap().clone();
    let stop = commands.iter().position(|name| name == "stop").context("no stop")?;
    let last = commands.iter().rposition(|name| name == "blockdev-mirror").context("no drain")?;
    ensure!(last < stop && monitor.stops() == 1, "it was stopped before the last drain: {commands:?}");
    // Nothing is left of the drains that were given up.
    no_hold_is_left(&machine).await?;
    machine.resume(paused).await?;
    guest.wait_ticks(5)?;
    guest.expect_no_bad()
}

/// Where each drain meets such a request, the guest is stopped without a hold, as QEMU does it: a snapshot of
/// a busy guest is not refused for ever.
#[tokio::test(flavor = "multi_thread")]
async fn guest_that_never_drains_is_stopped_all_the_same() -> Result<()> {
    // Without its load: QEMU alone may lose an interrupt of it.
    let guest = GuestOptions::new().iothreads(2).cpus(2).tick_ms(1000).from_boot().start()?;
    let monitor = Monitor::start(guest.qmp_socket(), guest.dir(), usize::MAX)?;
    let machine = kit::machine_at(&monitor.socket).await?;
    let paused = machine.pause().await?;
    assert_eq!((monitor.drains(), monitor.stops()), (20, 1));
    assert!(!machine.run_state().await?.running);
    no_hold_is_left(&machine).await?;
    machine.resume(paused).await.map(drop)?;
    Ok(())
}
