//! The block graph under a real guest: chains swapped, images reopened by name, disks detached and attached.

mod kit;

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hypervisor_qemu::{
    ErrorKind, Machine, Name,
    graph::{self, Graph, Layer, Stack, Swap},
    instant::{Cut, DiskCut, SaveMode},
    memory::restore_in_place,
};
use kit::BUDGET;
use testguest::{Guest, GuestOptions, Version};

const LIVE: SaveMode = SaveMode::Live { budget: BUDGET };

/// Moves the configured path to a layer, as the engine does while the guest is paused.
fn move_path(path: &Path, layer: &Path) -> std::io::Result<()> {
    let new = path.with_extension("new");
    fs::hard_link(layer, &new)?;
    fs::rename(&new, path)?;
    fs::File::open(path.parent().expect("a directory"))?.sync_all()
}

/// Freezes each disk under its own layer name, moves the configured paths inside of the cut, and reopens the
/// images by name.
async fn freeze(machine: &Machine, guest: &Guest, tag: &str, layers: &mut [PathBuf]) -> Result<Vec<Name>> {
    let mut cut = Cut::new();
    let mut overlays = Vec::new();
    for (number, device) in guest.targets().into_iter().enumerate() {
        let file = guest.dir().join(format!("vd{number}.{tag}.qcow2"));
        kit::make_overlay(&file, &layers[number], 64)?;
        let name = Name::new(format!("domsnap-{tag}-{number}"))?;
        graph::add_overlay(machine, &Layer::qcow2(name.clone(), &file)).await?;
        cut = cut.disk(DiskCut::Overlay { device, overlay: name.clone() });
        overlays.push((file, name));
    }
    let moves: Vec<_> =
        guest.disks().into_iter().zip(overlays.iter().map(|(file, _)| file.clone())).collect();
    let taken = cut
        .take(machine, async || {
            for (path, layer) in &moves {
                move_path(path, layer)?;
            }
            Ok(())
        })
        .await?;
    println!("{tag}: {:?} stopped for {:?}", taken.method, taken.stopped_for);
    for (number, (file, name)) in overlays.iter().enumerate() {
        let frozen = std::mem::replace(&mut layers[number], file.clone());
        let graph = Graph::read(machine).await?;
        let below =
            graph.node(graph.backing(name.as_str()).context("it depends on something")?).context("a node")?;
        if Path::new(&below.file) != frozen {
            let error = graph::verify_names(machine).await.expect_err("it names the configured path");
            assert!(
                error.kind() == ErrorKind::NameMismatch
                    && error.to_string().contains("no node names the image"),
                "{error}"
            );
            let layer = Layer::qcow2(Name::new(format!("domsnap-{tag}-{number}-b"))?, &frozen);
            assert_eq!(graph::reopen_by_name(machine, name.as_str(), &layer).await?, Vec::<String>::new());
            assert_eq!(
                graph::reopen_by_name(machine, name.as_str(), &layer).await?,
                Vec::<String>::new(),
                "again"
            );
        }
    }
    Ok(overlays.into_iter().map(|(_, name)| name).collect())
}

/// The configured path stays the active image through snapshots under load.
#[tokio::test(flavor = "multi_thread")]
async fn path_stays_the_active_image() -> Result<()> {
    for (version, drive) in kit::versions_and_drives() {
        let options = GuestOptions::new().version(version);
        let mut guest = kit::loaded(if drive { options.drive() } else { options })?;
        let machine = kit::machine(&guest).await?;
        let mut layers = Vec::new();
        for disk in guest.disks() {
            let layer = disk.with_extension("0.qcow2");
            fs::hard_link(&disk, &layer)?;
            layers.push(layer);
        }
        for tag in ["a", "b", "c"] {
            freeze(&machine, &guest, tag, &mut layers).await?;
            kit::sound(&machine).await?;
            guest.expect_no_bad()?;
        }
        assert_eq!(
            kit::chain(&machine, "vda").await?,
            ["domsnap-c-0", "domsnap-b-0", "domsnap-a-0", "domsnap-a-0-b"]
        );
        guest.verify_blocks()?;
        drop(machine);
        // A boot from the configured paths continues from the last state.
        let before = guest.ticks()?;
        guest.restart()?;
        assert!(
            guest.counters_at_boot().iter().all(|counter| counter.is_some_and(|counter| counter >= before))
        );
        guest.expect_no_bad()?;
    }
    Ok(())
}

/// An external snapshot is reverted to in place, repeatedly.
#[tokio::test(flavor = "multi_thread")]
async fn external_snapshot_is_reverted_repeatedly() -> Result<()> {
    for version in kit::versions() {
        for drive in [false, true] {
            let options = GuestOptions::new().version(version);
            let guest = kit::loaded(if drive { options.drive() } else { options })?;
            let machine = kit::machine(&guest).await?;
            let pid = guest.pid();
            let (_, image, _) = kit::snapshot(&machine, &guest, "s", &guest.disks(), LIVE, true).await?;
            let then = guest.ticks()?;
            for round in 0..3 {
                guest.wait_ticks(40)?;
                image.verify()?;
                let overlays = kit::overlays(&machine, &guest, &format!("r{round}"), &guest.disks()).await?;
                let begun = Instant::now();
                let paused = machine.pause().await?;
                let graph = Graph::read(&machine).await?;
                let mut swaps = Vec::new();
                for (device, (_, overlay)) in guest.targets().into_iter().zip(&overlays) {
                    let root = graph.root(&device).context("a root")?;
                    let frozen = graph.chain(root).last().context("a base")?.name.clone();
                    swaps.push(Swap::new(device, overlay.clone(), Stack::node(frozen)));
                }
                graph::swap(&machine, &swaps).await?;
                let swapped = begun.elapsed();
                restore_in_place(&machine, &image, &[], Duration::from_secs(240)).await?;
                machine.resume(paused).await?;
                println!(
                    "{version:?} drive {drive}: chains after {swapped:?}, reverted in {:?}",
                    begun.elapsed()
                );
                kit::sound(&machine).await?;
                let now = guest.ticks()?;
                assert!(now < then + 40, "{now} after {then}");
                guest.expect_no_bad()?;
                guest.verify_blocks()?;
                assert_eq!(kit::chain(&machine, "vda").await?.len(), 2);
            }
            assert_eq!(guest.pid(), pid);
        }
    }
    Ok(())
}

/// Each of many cuts of a guest that never rests is of one instant.
#[tokio::test(flavor = "multi_thread")]
async fn each_of_many_cuts_is_one_instant() -> Result<()> {
    for version in kit::versions() {
        let guest = GuestOptions::new().version(version).tick_ms(0).start()?;
        guest.dirty(40, 100.0)?;
        guest.blocks(128, 0.0)?;
        let machine = kit::machine(&guest).await?;
        let mut on = guest.disks();
        for round in 0..5 {
            let graph = Graph::read(&machine).await?;
            let roots: Vec<_> =
                guest.targets().iter().map(|device| graph.root(device).expect("a root").to_owned()).collect();
            let (_, image, _) =
                kit::snapshot(&machine, &guest, &format!("s{round}"), &on, LIVE, true).await?;
            guest.expect_no_bad()?;
            let overlays = kit::overlays(&machine, &guest, &format!("r{round}"), &on).await?;
            let paused = machine.pause().await?;
            let swaps: Vec<_> = guest
                .targets()
                .into_iter()
                .zip(&overlays)
                .zip(roots)
                .map(|((device, (_, overlay)), root)| Swap::new(device, overlay.clone(), Stack::node(root)))
                .collect();
            assert_eq!(graph::swap(&machine, &swaps).await?, Vec::<String>::new());
            restore_in_place(&machine, &image, &[], Duration::from_secs(240)).await?;
            machine.resume(paused).await?;
            guest.expect_no_bad()?;
            guest.verify_blocks()?;
            kit::sound(&machine).await?;
            on = overlays.into_iter().map(|(file, _)| file).collect();
        }
    }
    Ok(())
}

/// A swap opens another branch; a failure leaves the old chain.
#[tokio::test(flavor = "multi_thread")]
async fn failed_swap_leaves_the_old_chain() -> Result<()> {
    let guest = kit::loaded(GuestOptions::new())?;
    let machine = kit::machine(&guest).await?;
    // Two branches on the current disks.
    let (_, image, _) = kit::snapshot(&machine, &guest, "s", &guest.disks(), LIVE, true).await?;
    let mut layers = Vec::new();
    for (number, disk) in guest.disks().into_iter().enumerate() {
        let layer = guest.dir().join(format!("branch{number}.qcow2"));
        kit::make_overlay(&layer, &disk, 64)?;
        layers.push(layer);
    }
    let overlays = kit::overlays(&machine, &guest, "r", &layers).await?;
    let before = [kit::chain(&machine, "vda").await?, kit::chain(&machine, "vdb").await?];
    let stack = |number: usize, base: &str, file: &Path| -> Result<Stack> {
        let name = Name::new(format!("domsnap-branch{number}"))?;
        Ok(Stack::node(base).and(Layer::qcow2(name, file)))
    };
    let swaps = |second: &Path| -> Result<Vec<Swap>> {
        Ok(vec![
            Swap::new("vda", overlays[0].1.clone(), stack(0, "d0", &layers[0])?),
            Swap::new("vdb", overlays[1].1.clone(), stack(1, "d1", second)?),
        ])
    };
    let error = graph::swap(&machine, &swaps(&layers[1])?).await.expect_err("it runs");
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("runs"), "{error}");
    let paused = machine.pause().await?;
    let no_image = guest.dir().join("no-image");
    fs::write(&no_image, [1; 4096])?;
    for wrong in [&guest.dir().join("missing"), &no_image] {
        let error = graph::swap(&machine, &swaps(wrong)?).await.expect_err("no such layer");
        assert_eq!(error.state_now(), None, "{error}");
        assert_eq!([kit::chain(&machine, "vda").await?, kit::chain(&machine, "vdb").await?], before);
    }
    graph::swap(&machine, &swaps(&layers[1])?).await?;
    restore_in_place(&machine, &image, &[], Duration::from_secs(240)).await?;
    machine.resume(paused).await?;
    assert_eq!(kit::chain(&machine, "vdb").await?, ["domsnap-r1", "domsnap-branch1", "d1"]);
    kit::sound(&machine).await?;
    guest.expect_no_bad()
}

/// A disk is detached, changed offline and attached again in a live QEMU.
#[tokio::test(flavor = "multi_thread")]
async fn disk_is_changed_while_detached() -> Result<()> {
    for (version, drive) in kit::versions_and_drives() {
        let options = GuestOptions::new().version(version);
        let guest = kit::loaded(if drive { options.drive() } else { options })?;
        let machine = kit::machine(&guest).await?;
        let mut cut = Cut::new();
        for device in guest.targets() {
            cut = cut.disk(DiskCut::Internal { device, tag: "s".into() });
        }
        let taken = cut.take(&machine, kit::nothing).await?;
        println!("disk-only: {:?} stopped for {:?}", taken.method, taken.stopped_for);
        let then = guest.ticks()?;
        guest.wait_ticks(60)?;
        let (boots, begun) = (guest.boots(), Instant::now());
        let paused = machine.pause().await?;
        for (device, disk) in guest.targets().into_iter().zip(guest.disks()) {
            let detached = graph::detach(&machine, &device).await?;
            assert_eq!(detached.still_open, Vec::<String>::new());
            let again = graph::detach(&machine, &device).await.expect_err("it is detached");
            assert!(again.to_string().contains("detached already"), "{again}");
            // qemu-img takes the image's lock: no other process has it.
            kit::img(&["snapshot", "-a", "s"], &disk)?;
            // A journal stores it as text.
            let detached = serde_json::from_str(&serde_json::to_string(&detached)?)?;
            let missing = Layer::qcow2(Name::node(), guest.dir().join("missing"));
            let error =
                graph::attach(&machine, &detached, &Stack::layers([missing])).await.expect_err("missing");
            assert!(error.state_now().is_some_and(|state| state.contains("must not run")), "{error}");
            let layer = Layer::qcow2(Name::node(), &disk);
            graph::attach(&machine, &detached, &Stack::layers([layer])).await?;
        }
        machine.reset().await?;
        machine.resume(paused).await?;
        println!("{version:?} drive {drive}: internal disk-only revert in {:?}", begun.elapsed());
        kit::sound(&machine).await?;
        guest.wait_boots(boots + 1)?;
        let found = guest.counters_at_boot();
        assert!(
            found.iter().all(|counter| counter.is_some_and(|counter| counter <= then + 1)),
            "{found:?}, not {then}"
        );
        guest.expect_no_bad()?;
        drop(machine);
        let mut guest = guest;
        guest.quit()?;
        for disk in guest.disks() {
            assert!(kit::img(&["check"], &disk)?.contains("No errors"));
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_image_is_noticed() -> Result<()> {
    let guest = GuestOptions::new().version(Version::New).start()?;
    let machine = kit::machine(&guest).await?;
    graph::verify_names(&machine).await?;
    fs::rename(guest.disk(0), guest.dir().join("elsewhere"))?;
    let error = graph::verify_names(&machine).await.expect_err("gone");
    assert!(
        error.kind() == ErrorKind::NameMismatch
            && error.to_string().contains("f0")
            && error.to_string().contains("gone"),
        "{error}"
    );
    Ok(())
}
