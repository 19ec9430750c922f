//! Kills QEMU in the middle of each operation: this is an error, not a hang, and the disks are intact.

mod kit;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use hypervisor_qemu::{
    Error, ErrorKind, Machine,
    graph::{self, Graph, Layer, Stack, Swap},
    instant::SaveMode,
    jobs::{self, ActiveCommit, LayerCommit, Stream},
    memory::{Draft, restore_in_place},
    quiesce,
};
use kit::BUDGET;
use qmp::Agent;
use rustix::process::{Pid, Signal, kill_process};
use testguest::{Guest, GuestOptions};

const LIVE: SaveMode = SaveMode::Live { budget: BUDGET };

fn kill(guest: &Guest) -> Result<()> {
    let pid = guest.pid().context("it runs")?;
    let pid = Pid::from_raw(i32::try_from(pid)?).context("a process")?;
    Ok(kill_process(pid, Signal::KILL)?)
}

/// Runs an operation and kills QEMU after a while. The operation must end soon, and report the loss if it
/// failed.
async fn killed<T>(
    guest: &Guest,
    after: Duration,
    operation: impl Future<Output = hypervisor_qemu::Result<T>>,
) -> Result<std::result::Result<T, Error>> {
    let killer = async {
        tokio::time::sleep(after).await;
        kill(guest)
    };
    let (ended, done) = tokio::join!(tokio::time::timeout(Duration::from_secs(240), operation), killer);
    done?;
    let outcome = ended.context("it hangs")?;
    if let Err(error) = &outcome {
        ensure!(error.kind() == ErrorKind::Lost, "{error}");
    }
    Ok(outcome)
}

/// Boots the guest from these images, and checks that they have all flushed data.
fn boots_from(guest: &mut Guest, disks: &[PathBuf], ticks: u64) -> Result<()> {
    for (disk, now) in guest.disks().iter().zip(disks) {
        if disk != now {
            std::fs::rename(now, disk)?;
        }
    }
    guest.restart()?;
    let found = guest.counters_at_boot();
    ensure!(
        found.iter().all(|counter| counter.is_some_and(|counter| counter + 1 >= ticks)),
        "{found:?} of {ticks}"
    );
    guest.expect_no_bad()?;
    Ok(())
}

/// Returns the active images after a cut that may have happened or not: an overlay in use has been written.
fn present(guest: &Guest, overlays: &[PathBuf]) -> Vec<PathBuf> {
    let written = |file: &Path| std::fs::metadata(file).is_ok_and(|about| about.len() > 4 << 16);
    if overlays.iter().all(|file| written(file)) { overlays.to_vec() } else { guest.disks() }
}

/// A kill of QEMU in the cut is an error, and the disks are intact.
#[tokio::test(flavor = "multi_thread")]
async fn kill_in_a_cut_leaves_disks_intact() -> Result<()> {
    for version in kit::versions() {
        for (after, live) in
            [(0, LIVE), (6, LIVE), (12, LIVE), (20, LIVE), (100, LIVE), (25, SaveMode::Paused)]
        {
            let mut guest = kit::loaded(GuestOptions::new().version(version))?;
            let machine = kit::machine(&guest).await?;
            let overlays = kit::overlays(&machine, &guest, "s", &guest.disks()).await?;
            let ticks = guest.ticks()?;
            // Read once per connection.
            machine.abilities().await?;
            let cut = kit::onto(&guest, &overlays).memory(Draft::create(guest.dir().join("memory"))?, live);
            let operation = async {
                let taken = cut.take(&machine, kit::nothing).await?;
                taken.memory.expect("memory").wait(|_| {}).await.map(drop)
            };
            let outcome = killed(&guest, Duration::from_millis(after), operation).await?;
            println!("{version:?} {live:?} {after} ms: {:?}", outcome.map_err(|error| error.to_string()));
            assert!(!guest.dir().join("memory").exists() && !guest.dir().join(".memory.part").exists());
            guest.wait_end()?;
            let files: Vec<_> = overlays.into_iter().map(|(file, _)| file).collect();
            let disks = present(&guest, &files);
            if disks == files {
                // Their backing strings name the disks.
                for (number, (disk, file)) in guest.disks().iter().zip(&files).enumerate() {
                    let base = guest.dir().join(format!("base{number}.qcow2"));
                    std::fs::rename(disk, &base)?;
                    kit::img(&["rebase", "-u", "-F", "qcow2", "-b", &base.display().to_string()], file)?;
                }
            }
            boots_from(&mut guest, &disks, ticks)?;
        }
    }
    Ok(())
}

/// A kill of QEMU in a merge is an error, and the chain is intact.
#[tokio::test(flavor = "multi_thread")]
async fn kill_in_a_merge_leaves_the_chain_intact() -> Result<()> {
    for version in kit::versions() {
        for number in 0..4 {
            let mut guest = kit::loaded(GuestOptions::new().version(version))?;
            let machine = kit::machine(&guest).await?;
            let first = kit::overlays(&machine, &guest, "a", &guest.disks()).await?;
            kit::onto(&guest, &first).take(&machine, kit::nothing).await?;
            guest.wait_ticks(20)?;
            let on: Vec<_> = first.iter().map(|(file, _)| file.clone()).collect();
            let second = kit::overlays(&machine, &guest, "b", &on).await?;
            kit::onto(&guest, &second).take(&machine, kit::nothing).await?;
            guest.wait_ticks(20)?;
            let ticks = guest.ticks()?;
            let mut active = ActiveCommit::new("domsnap-b0", "domsnap-a0");
            let mut middle =
                LayerCommit::new("domsnap-b0", "domsnap-a0", "d0", guest.disk(0).display().to_string());
            let mut stream = Stream::all("domsnap-b0");
            (active.speed, middle.speed, stream.speed) = (1 << 16, 1 << 16, 1 << 16);
            let after = Duration::from_millis(100);
            let outcome = match number {
                0 => killed(&guest, after, jobs::commit_active(&machine, &active, |_| {}, kit::nothing))
                    .await?
                    .map(drop),
                1 => killed(&guest, after, jobs::commit_layers(&machine, &middle, |_| {})).await?.map(drop),
                2 => killed(&guest, after, jobs::stream(&machine, &stream, |_| {})).await?.map(drop),
                _ => {
                    // Killed in the hook, when top and base are equal.
                    let commit = ActiveCommit::new("domsnap-b0", "domsnap-a0");
                    let hook = async || {
                        kill(&guest)?;
                        machine.qmp().closed().await;
                        Ok(())
                    };
                    let done = jobs::commit_active(&machine, &commit, |_| {}, hook).await.map(drop);
                    assert_eq!(done.as_ref().map_err(Error::kind), Err(ErrorKind::Lost));
                    done
                }
            };
            let error = outcome.expect_err("it was killed");
            println!("{version:?} {number}: {error}");
            guest.wait_end()?;
            for (file, _) in first.iter().chain(&second) {
                kit::img(&["check", "-r", "leaks"], file)?;
            }
            // After the hook's start the base is right, too: it has all data of the top.
            let now = if number == 3 { first[0].0.clone() } else { second[0].0.clone() };
            let disks: Vec<_> = guest.disks().iter().map(|disk| disk.with_extension("moved")).collect();
            for (number, (disk, moved)) in guest.disks().iter().zip(&disks).enumerate() {
                std::fs::rename(disk, moved)?;
                kit::img(
                    &["rebase", "-u", "-F", "qcow2", "-b", &moved.display().to_string()],
                    &first[number].0,
                )?;
            }
            boots_from(&mut guest, &[now, second[1].0.clone()], ticks)?;
        }
    }
    Ok(())
}

/// A kill of QEMU in a revert or a detach is an error, and not a hang.
#[tokio::test(flavor = "multi_thread")]
async fn kill_in_a_revert_or_detach_is_an_error() -> Result<()> {
    for version in kit::versions() {
        for number in 0..4 {
            let mut guest = kit::loaded(GuestOptions::new().version(version))?;
            let machine = kit::machine(&guest).await?;
            let (_, image, _) = kit::snapshot(&machine, &guest, "s", &guest.disks(), LIVE, true).await?;
            let overlays = kit::overlays(&machine, &guest, "r", &guest.disks()).await?;
            let paused = machine.pause().await?;
            let swaps: Vec<_> = guest
                .targets()
                .into_iter()
                .zip(&overlays)
                .enumerate()
                .map(|(number, (device, (_, overlay)))| {
                    Swap::new(device, overlay.clone(), Stack::node(format!("d{number}")))
                })
                .collect();
            let after = Duration::from_millis([4, 12, 60, 8][number]);
            let operation = async {
                match number {
                    0 | 1 => graph::swap(&machine, &swaps).await.map(drop),
                    2 => {
                        graph::swap(&machine, &swaps).await?;
                        restore_in_place(&machine, &image, &[], Duration::from_secs(240)).await.map(drop)
                    }
                    _ => detach_and_attach(&machine, &guest).await,
                }
            };
            let outcome = killed(&guest, after, operation).await?;
            println!("{version:?} {number}: {:?}", outcome.map_err(|error| error.to_string()));
            assert!(machine.resume(paused).await.is_err());
            guest.wait_end()?;
            // A restore does not write the image, not even one that ends like this.
            image.verify()?;
            // The frozen images are intact.
            let disks = guest.disks();
            for disk in &disks {
                kit::img(&["check", "-r", "leaks"], disk)?;
            }
            boots_from(&mut guest, &disks, 0)?;
        }
    }
    Ok(())
}

async fn detach_and_attach(machine: &Machine, guest: &Guest) -> hypervisor_qemu::Result<()> {
    let graph = Graph::read(machine).await?;
    let files: Vec<_> = graph
        .chain(graph.root("vda").unwrap_or_default())
        .iter()
        .rev()
        .map(|node| Layer::qcow2(hypervisor_qemu::Name::node(), &node.file))
        .collect();
    let _ = guest;
    let detached = graph::detach(machine, "vda").await?;
    graph::attach(machine, &detached, &Stack::layers(files)).await
}

/// A guest is frozen for a cut, and thawed in every case.
#[tokio::test(flavor = "multi_thread")]
async fn guest_is_frozen_for_a_cut_and_thawed() -> Result<()> {
    let guest = kit::loaded(GuestOptions::new())?;
    guest.await_agent()?;
    let machine = kit::machine(&guest).await?;
    let agent = Agent::new(guest.agent_socket());
    let overlays = kit::overlays(&machine, &guest, "s", &guest.disks()).await?;
    let quiesced = quiesce::quiesce(&machine, &agent, quiesce::LIMIT).await?;
    assert_eq!(quiesced.filesystems(), 2);
    assert!(quiesced.left() <= quiesce::LIMIT && quiesced.left() > Duration::from_secs(5));
    kit::onto(&guest, &overlays).take(&machine, kit::nothing).await?;
    let consistency = quiesced.thaw().await;
    assert_eq!(consistency, quiesce::Consistency::Filesystem { filesystems: 2 });
    kit::sound(&machine).await?;
    guest.expect_no_bad()?;
    // The frozen file systems are clean: their journals need no recovery.
    for disk in guest.disks() {
        let raw = disk.with_extension("raw");
        kit::img(&["convert", "-U", "-O", "raw", &disk.display().to_string()], &raw)?;
        let checked = std::process::Command::new("e2fsck").args(["-fn"]).arg(&raw).output()?;
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    }

    // Thawed by a drop, by its limit, and by the next process after a crash.
    drop(quiesce::quiesce(&machine, &agent, quiesce::LIMIT).await?);
    agent.wait_for_thaw(Duration::from_secs(240)).await?;
    guest.shell("sync")?;
    let quiesced = quiesce::quiesce(&machine, &agent, Duration::from_secs(2)).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    agent.wait_for_thaw(Duration::from_secs(240)).await?;
    let consistency = quiesced.thaw().await;
    assert!(matches!(consistency, quiesce::Consistency::Crash { .. }), "{consistency:?}");
    assert_eq!(quiesce::thaw_after_crash(&agent).await?, 0);
    guest.expect_no_bad()?;

    // Without an agent it fails at once, because QEMU reports that the port is closed.
    guest.shell("killall qemu-ga")?;
    let until = std::time::Instant::now() + Duration::from_secs(240);
    loop {
        let begun = std::time::Instant::now();
        let error =
            quiesce::quiesce(&machine, &agent, Duration::from_secs(2)).await.expect_err("there is none");
        if error.kind() == ErrorKind::Unsupported {
            assert!(
                begun.elapsed() < Duration::from_secs(1) && error.to_string().contains("no agent"),
                "{error}"
            );
            return Ok(());
        }
        ensure!(std::time::Instant::now() < until, "{error}");
    }
}

/// A QEMU that hangs is an error within its deadlines, and the guest runs when QEMU continues.
#[tokio::test(flavor = "multi_thread")]
async fn hanging_qemu_is_an_error_in_time() -> Result<()> {
    let guest = kit::loaded(GuestOptions::new())?;
    let pid = Pid::from_raw(i32::try_from(guest.pid().context("it runs")?)?).context("a process")?;
    let qmp = kit::machine(&guest).await?.qmp().within(Duration::from_secs(2));
    let machine = Machine::new(qmp);
    let overlays = kit::overlays(&machine, &guest, "s", &guest.disks()).await?;
    let cut = kit::onto(&guest, &overlays);
    let begun = std::time::Instant::now();
    let stopped = tokio::time::timeout(Duration::from_secs(60), async {
        // Between the pause and the resume.
        cut.take(&machine, async || Ok(kill_process(pid, Signal::STOP)?)).await.map(drop)
    });
    let error = stopped.await.context("it hangs")?.expect_err("it hangs");
    println!("after {:?}: {error}", begun.elapsed());
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let error = machine.pause().await.expect_err("it hangs");
    assert_eq!(error.kind(), ErrorKind::Timeout);
    kill_process(pid, Signal::CONT)?;
    // QEMU runs all commands that were sent, and the guest continues. It would not if the connection were
    // closed now.
    kit::until(async || Ok(machine.run_state().await.is_ok_and(|state| state.running))).await?;
    drop(machine);
    let machine = kit::machine(&guest).await?;
    let ours = jobs::reconcile(&machine).await?;
    assert!(ours.state.running && ours.nodes.len() == 4, "{ours:?}");
    kit::sound(&machine).await?;
    guest.expect_no_bad()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clock_of_a_guest_is_set() -> Result<()> {
    let guest = GuestOptions::new().start()?;
    guest.await_agent()?;
    guest.shell("date -s @86400")?;
    let outcome = hypervisor_qemu::set_guest_clock(&Agent::new(guest.agent_socket())).await;
    let said = String::from_utf8(guest.shell("date +%s")?.stdout)?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let found: u64 = said.trim().parse()?;
    assert!(found.abs_diff(now) < 60, "{found}, not {now}; {outcome:?}");
    outcome?;
    Ok(())
}
