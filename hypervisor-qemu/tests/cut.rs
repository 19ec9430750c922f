//! The cut, and the memory image, on a real guest under load.

mod kit;

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use hypervisor_qemu::{
    ErrorKind,
    discover::{Discovery, Role, compare},
    graph::{self, Graph},
    instant::{Cut, CutMethod, DiskCut, SaveMode, abandon},
    jobs,
    memory::{Draft, restore_deferred, restore_in_place},
};
use kit::{BOTH, BUDGET};
use testguest::{Guest, GuestOptions, Version};

const LIVE: SaveMode = SaveMode::Live { budget: BUDGET };

/// Returns the best method of a live cut.
fn best(version: Version) -> CutMethod {
    match version {
        Version::New => CutMethod::BackgroundSnapshot,
        // There is no KVM here.
        Version::Old => CutMethod::NonLive,
    }
}

/// Restores the image into a new process, on overlays of the frozen disks: the guest continues to tick, and
/// never was BAD.
async fn starts_cold(
    guest: &mut Guest,
    image: &hypervisor_qemu::memory::Image,
    frozen: &[PathBuf],
) -> Result<()> {
    let machine = kit::machine(guest).await?;
    let incoming = image.incoming(machine.abilities().await?)?;
    drop(machine);
    let before = guest.last_tick().context("it ticked")?;
    guest.kill()?;
    let mut disks = Vec::new();
    for (number, frozen) in frozen.iter().enumerate() {
        let disk = guest.dir().join(format!("cold{number}.qcow2"));
        kit::make_overlay(&disk, frozen, 64)?;
        disks.push(disk);
    }
    for args in [&["-incoming", incoming.argument()][..], &["-incoming", "defer", "-S"]] {
        let mut process = kit::start_again(guest, &disks, args)?;
        let machine = kit::machine(guest).await?;
        if args.contains(&"defer") {
            let state = restore_deferred(&machine, image, Duration::from_secs(240)).await?;
            ensure!(!state.running, "{state:?}");
            let error =
                restore_deferred(&machine, image, Duration::from_secs(240)).await.expect_err("it has one");
            ensure!(error.kind() == ErrorKind::Invalid, "{error}");
        } else {
            kit::until_loaded(&machine).await?;
        }
        machine.cont().await?;
        kit::sound(&machine).await?;
        drop(machine);
        let after = guest.ticks()?;
        ensure!(after < before, "it went back: {after} after {before}");
        guest.expect_no_bad()?;
        guest.verify_blocks()?;
        guest.kill()?;
        process.wait()?;
        for (disk, frozen) in disks.iter().zip(frozen) {
            kit::make_overlay(disk, frozen, 64)?;
        }
    }
    Ok(())
}

/// Memory and disks of a live cut are of one instant, also in a new process.
#[tokio::test(flavor = "multi_thread")]
async fn live_cut_is_one_instant() -> Result<()> {
    for version in BOTH {
        let mut guest = kit::loaded(GuestOptions::new().version(version))?;
        let machine = kit::machine(&guest).await?;
        guest.forget_gap();
        let (_, image, method) = kit::snapshot(&machine, &guest, "s", &guest.disks(), LIVE, true).await?;
        assert_eq!(method, best(version));
        kit::sound(&machine).await?;
        println!("{version:?}: largest gap {:?}", guest.largest_gap());
        guest.expect_no_bad()?;
        assert!(kit::img(&["check"], image.path())?.contains("No errors"));
        assert!(kit::img(&["snapshot", "-l"], image.path())?.contains(" s "));
        drop(machine);
        guest.wait_ticks(20)?;
        let disks = guest.disks();
        starts_cold(&mut guest, &image, &disks).await?;
        assert!(kit::img(&["check"], image.path())?.contains("No errors"));
        image.verify()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pre_copy_and_a_paused_guest_give_the_same_image() -> Result<()> {
    for (version, live, background, expected) in [
        (Version::New, LIVE, false, CutMethod::PreCopy { converged: true }),
        (Version::Old, LIVE, false, CutMethod::PreCopy { converged: true }),
        (
            Version::New,
            SaveMode::Live { budget: Duration::ZERO },
            false,
            CutMethod::PreCopy { converged: false },
        ),
        (Version::New, SaveMode::Paused, true, CutMethod::NonLive),
        (Version::New, SaveMode::Paused, false, CutMethod::NonLive),
        (Version::Old, SaveMode::Paused, false, CutMethod::NonLive),
    ] {
        let mut guest = kit::loaded(GuestOptions::new().version(version))?;
        let machine = kit::machine(&guest).await?;
        let (_, image, method) =
            kit::snapshot(&machine, &guest, "s", &guest.disks(), live, background).await?;
        assert_eq!(method, expected, "{version:?}");
        kit::sound(&machine).await?;
        drop(machine);
        guest.wait_ticks(20)?;
        guest.expect_no_bad()?;
        let disks = guest.disks();
        starts_cold(&mut guest, &image, &disks).await.with_context(|| format!("{version:?} {expected:?}"))?;
    }
    Ok(())
}

/// Memory is restored in place, repeatedly, together with internal snapshots of disks.
#[tokio::test(flavor = "multi_thread")]
async fn memory_is_restored_in_place_repeatedly() -> Result<()> {
    for (version, drive) in
        [(Version::New, false), (Version::New, true), (Version::Old, false), (Version::Old, true)]
    {
        let options = GuestOptions::new().version(version);
        let guest = kit::loaded(if drive { options.drive() } else { options })?;
        let machine = kit::machine(&guest).await?;
        let pid = guest.pid();
        let mut cut = Cut::new().memory(Draft::create(guest.dir().join("memory"))?, LIVE);
        for device in guest.targets() {
            cut = cut.disk(DiskCut::Internal { device, tag: "s".into() });
        }
        let taken = cut.take(&machine, kit::nothing).await?;
        println!("{version:?} internal: {:?} stopped for {:?}", taken.method, taken.stopped_for);
        let image = taken.memory.context("memory")?.wait(|_| {}).await?.seal("s", b"")?;
        kit::sound(&machine).await?;
        let then = guest.ticks()?;
        guest.wait_ticks(40)?;
        for _ in 0..2 {
            image.verify()?;
            let begun = std::time::Instant::now();
            let paused = machine.pause().await?;
            let graph = Graph::read(&machine).await?;
            let roots: Vec<_> =
                guest.targets().iter().map(|device| graph.root(device).expect("a root").to_owned()).collect();
            let restored = restore_in_place(&machine, &image, &roots, Duration::from_secs(240)).await?;
            assert!(!restored.state.running);
            machine.resume(paused).await?;
            println!("{version:?}: reverted in {:?}, was {}", begun.elapsed(), restored.state.word);
            kit::sound(&machine).await?;
            let now = guest.ticks()?;
            assert!(now < then + 40, "{now} after {then}");
            guest.expect_no_bad()?;
            guest.verify_blocks()?;
            guest.wait_ticks(40)?;
        }
        assert_eq!(guest.pid(), pid);
        for device in guest.targets() {
            assert!(graph::delete_internal(&machine, &device, "s").await?);
            assert!(!graph::delete_internal(&machine, &device, "s").await?, "it is gone");
        }
        kit::sound(&machine).await?;
        guest.expect_no_bad()?;
    }
    Ok(())
}

/// Eight disks, external and internal, are cut at one instant.
#[tokio::test(flavor = "multi_thread")]
async fn eight_mixed_disks_are_one_instant() -> Result<()> {
    for drive in [false, true] {
        let options = GuestOptions::new().disks(8);
        let guest = kit::loaded(if drive { options.drive() } else { options })?;
        let machine = kit::machine(&guest).await?;
        let overlays = kit::overlays(&machine, &guest, "o", &guest.disks()).await?;
        let mut cut = Cut::new().memory(Draft::create(guest.dir().join("memory"))?, LIVE);
        for (number, (device, (_, overlay))) in guest.targets().into_iter().zip(&overlays).enumerate() {
            cut = cut.disk(match number % 3 {
                0 => DiskCut::Internal { device, tag: "s".into() },
                _ => DiskCut::Overlay { device, overlay: overlay.clone() },
            });
        }
        guest.forget_gap();
        let taken = cut.take(&machine, kit::nothing).await?;
        println!(
            "eight disks, drive {drive}: {:?} stopped for {:?}, gap {:?}",
            taken.method,
            taken.stopped_for,
            guest.largest_gap()
        );
        taken.memory.context("memory")?.wait(|_| {}).await?.seal("s", b"")?;
        // The overlays of internal disks were not used.
        let unused = overlays.iter().step_by(3).map(|(_, name)| name.to_string()).collect::<Vec<_>>();
        assert_eq!(graph::remove_layers(&machine, &unused).await?, Vec::<String>::new());
        kit::sound(&machine).await?;
        guest.expect_no_bad()?;
        let graph = Graph::read(&machine).await?;
        for (number, device) in guest.targets().iter().enumerate() {
            let root = graph.node(graph.root(device).context("a root")?).context("a node")?;
            match number % 3 {
                0 => assert_eq!(root.snapshots.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["s"]),
                _ => assert_eq!(root.name, overlays[number].1.as_str()),
            }
        }
    }
    Ok(())
}

/// A failure at each point of the cut leaves the guest as it was.
#[tokio::test(flavor = "multi_thread")]
async fn failed_cut_leaves_the_guest_as_it_was() -> Result<()> {
    for version in BOTH {
        for (live, background) in [(LIVE, true), (LIVE, false), (SaveMode::Paused, false)] {
            let guest = kit::loaded(GuestOptions::new().version(version))?;
            let machine = kit::machine(&guest).await?;
            let before = [kit::chain(&machine, "vda").await?, kit::chain(&machine, "vdb").await?];
            let draft = || Draft::create(guest.dir().join("memory"));
            let prepare = |cut: Cut| match background {
                true => cut,
                false => cut.without_background_snapshot().trusting_pre_copy(),
            };

            // The hook fails: the cut is complete by then.
            let overlays = kit::overlays(&machine, &guest, "a", &guest.disks()).await?;
            let cut = prepare(kit::onto(&guest, &overlays).memory(draft()?, live));
            let error = cut.take::<(), _>(&machine, async || Err("no space for links".into())).await;
            let error = error.expect_err("the hook fails");
            assert!(
                error.kind() == ErrorKind::Hook && error.to_string().contains("no space for links"),
                "{error}"
            );
            assert_eq!(error.state_now(), None, "all was undone: {error}");
            kit::sound(&machine).await?;
            guest.expect_no_bad()?;

            // The transaction fails: a raw file has no internal snapshots.
            let overlays = kit::overlays(&machine, &guest, "b", &guest.disks()).await?;
            let cut = prepare(kit::onto(&guest, &overlays).memory(draft()?, live));
            let cut = cut.disk(DiskCut::Internal { device: "f0".into(), tag: "s".into() });
            let error = cut.take(&machine, kit::nothing).await.expect_err("a file has no snapshots");
            assert_eq!((error.kind(), error.state_now()), (ErrorKind::Refused, None), "{error}");
            kit::sound(&machine).await?;
            guest.expect_no_bad()?;

            // Nothing is changed.
            let error = Cut::new().disk(DiskCut::Internal { device: "vdz".into(), tag: "s".into() });
            let error = error.take(&machine, kit::nothing).await.expect_err("no such disk");
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert_eq!([kit::chain(&machine, "vda").await?, kit::chain(&machine, "vdb").await?], before);
            assert!(!guest.dir().join("memory").exists() && !guest.dir().join(".memory.part").exists());
            guest.verify_blocks()?;
        }
    }
    Ok(())
}

/// A memory image that cannot be written is an error, and the guest keeps running.
#[tokio::test(flavor = "multi_thread")]
async fn unwritable_memory_image_fails_the_cut() -> Result<()> {
    for version in BOTH {
        let guest = kit::loaded(GuestOptions::new().version(version))?;
        let machine = kit::machine(&guest).await?;
        // A draft on a device that is always full.
        let full = tempfile::tempdir()?;
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
            .arg(full.path())
            .status()?;
        if !status.success() {
            println!("skipped: this user may not mount");
            return Ok(());
        }
        let overlays = kit::overlays(&machine, &guest, "a", &guest.disks()).await?;
        let cut = kit::onto(&guest, &overlays).memory(Draft::create(full.path().join("memory"))?, LIVE);
        let outcome = async {
            let taken = cut.take(&machine, kit::nothing).await?;
            taken.memory.expect("memory").wait(|_| {}).await.map(drop)
        };
        let error = outcome.await.expect_err("no space");
        println!("{error}");
        assert_eq!(error.kind(), ErrorKind::Failed, "{error}");
        assert_eq!(std::fs::read_dir(full.path())?.count(), 0);
        std::process::Command::new("umount").arg(full.path()).status()?;
        kit::sound(&machine).await?;
        guest.expect_no_bad()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_is_paused_stays_paused() -> Result<()> {
    for version in kit::versions() {
        let mut guest = kit::loaded(GuestOptions::new().version(version))?;
        let machine = kit::machine(&guest).await?;
        let paused = machine.pause().await?;
        let (mut on, mut last) = (guest.disks(), None);
        for (tag, live, background) in [("a", LIVE, true), ("b", SaveMode::Paused, true), ("c", LIVE, false)]
        {
            let (overlays, image, method) =
                kit::snapshot(&machine, &guest, tag, &on, live, background).await?;
            let expected = match (version, tag) {
                (Version::New, "a") => CutMethod::BackgroundSnapshot,
                _ => CutMethod::NonLive,
            };
            assert_eq!((method, machine.run_state().await?.word.as_str()), (expected, "paused"), "{tag}");
            last = Some((image, on));
            on = overlays.into_iter().map(|(file, _)| file).collect();
        }
        let overlays = kit::overlays(&machine, &guest, "d", &on).await?;
        kit::onto(&guest, &overlays).take(&machine, kit::nothing).await?;
        assert_eq!(machine.run_state().await?.word, "paused");
        machine.resume(paused).await?;
        kit::sound(&machine).await?;
        guest.expect_no_bad()?;
        drop(machine);
        guest.wait_ticks(20)?;
        let (image, frozen) = last.context("three were made")?;
        assert_eq!(
            fs::read_dir(guest.dir())?
                .filter(|entry| entry
                    .as_ref()
                    .is_ok_and(|entry| entry.file_name().to_string_lossy().contains("scratch")))
                .count(),
            0
        );
        starts_cold(&mut guest, &image, &frozen).await?;
    }
    Ok(())
}

/// A guest with I/O threads loses no interrupt when it is paused. QEMU alone loses one within the first ten
/// pauses or so on a busy machine: the guest then waits for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_of_io_threads_loses_no_interrupt() -> Result<()> {
    let options = GuestOptions::new().iothreads(2).cpus(2).tick_ms(0).from_boot();
    let mut guest = kit::loaded(options)?;
    let machine = kit::machine(&guest).await?;
    for _ in 0..30 {
        let paused = machine.pause().await?;
        kit::sound(&machine).await?;
        machine.resume(paused).await?;
        guest.wait_ticks(2)?;
    }
    // The memory of a guest that was paused like this can be restored, too.
    let on = guest.disks();
    let (_, image, _) = kit::snapshot(&machine, &guest, "a", &on, LIVE, true).await?;
    kit::sound(&machine).await?;
    guest.expect_no_bad()?;
    drop(machine);
    guest.wait_ticks(2)?;
    starts_cold(&mut guest, &image, &on).await
}

/// A machine is described, and each difference that its memory does not survive is listed.
#[tokio::test(flavor = "multi_thread")]
async fn differences_of_machines_are_listed() -> Result<()> {
    for version in kit::versions() {
        let options = GuestOptions::new().version(version).more(&[
            "-drive",
            "if=none,id=cd,media=cdrom",
            "-device",
            "ide-cd,drive=cd,id=cd0",
        ]);
        let guest = options.start()?;
        let machine = kit::machine(&guest).await?;
        let found = Discovery::read(&machine).await?;
        let number = if version == Version::New { "pc-q35-10.0" } else { "pc-q35-7.2" };
        assert_eq!((found.machine.as_str(), found.cpu.model.as_str(), found.cpu.count), (number, "max", 1));
        assert_eq!((found.cpu.option.as_deref(), found.memory.base), (Some("max"), 128 << 20));
        assert!(found.cpu.features.len() > 20 && found.state.running && found.tpms.is_empty());
        assert_eq!(found.process.pid, guest.pid());
        let line: Vec<_> =
            guest.command_line().iter().map(|word| word.to_string_lossy().into_owned()).collect();
        assert_eq!(found.process.command_line[..line.len()], line[..]);
        assert!(
            found.process.unread.is_empty() && !found.process.environment.is_empty(),
            "{:?}",
            found.process.unread
        );
        let roles: Vec<_> = found.drives.iter().map(|drive| (drive.target.as_str(), drive.role)).collect();
        assert_eq!(roles.len(), 3, "{roles:?}");
        for expected in [("vda", Role::Disk), ("vdb", Role::Disk), ("cd0", Role::Removable)] {
            assert!(roles.contains(&expected), "{roles:?}");
        }
        let disk = found.drive("vda").context("vda")?;
        assert_eq!((disk.root(), disk.chain.len()), (Some("d0"), 1));
        let file = disk.chain[0].file.as_ref().context("a file")?;
        assert_eq!((file.name.as_str(), PathBuf::from(&file.file)), ("f0", guest.disk(0)));
        assert!(found.drive("cd").is_some_and(|drive| drive.chain.is_empty()));
        assert_eq!(found.abilities.file_migration, version == Version::New);
        assert!(
            found.abilities.background_snapshot
                && found.abilities.blockdev_reopen
                && found.abilities.block_graph
        );

        let again: Discovery = serde_json::from_str(&serde_json::to_string(&found)?)?;
        assert_eq!(again, found);
        assert_eq!(compare(&found, &Discovery::read(&machine).await?), []);
        drop(machine);
        let other = GuestOptions::new().version(version).cpu("qemu64").memory_mib(160).disks(3).start()?;
        let machine = kit::machine(&other).await?;
        let differences = compare(&found, &Discovery::read(&machine).await?);
        let named: Vec<_> = differences.iter().map(ToString::to_string).collect();
        for expected in [
            "CPU model: recorded max, now qemu64",
            "memory: recorded 128 MiB, now 160 MiB",
            "device /machine/peripheral/vdc: recorded none, now virtio-blk-pci",
            "device /machine/peripheral/cd0: recorded ide-cd",
            "drive vdc: recorded none",
        ] {
            assert!(named.iter().any(|named| named.starts_with(expected)), "{expected} is not in {named:#?}");
        }
    }
    let drive = GuestOptions::new().drive().start()?;
    let machine = kit::machine(&drive).await?;
    let found = Discovery::read(&machine).await?;
    let disk = found.drive("vda").context("vda")?;
    assert!(
        disk.names.contains(&"drive0".to_owned()) && disk.root().is_some_and(|root| root.starts_with('#'))
    );
    kit::sound(&machine).await
}

/// A memory save that a crash of ours left is abandoned.
#[tokio::test(flavor = "multi_thread")]
async fn memory_save_left_by_a_crash_is_abandoned() -> Result<()> {
    for version in BOTH {
        let guest = kit::loaded(GuestOptions::new().version(version))?;
        let machine = kit::machine(&guest).await?;
        let draft = Draft::create(guest.dir().join("memory"))?;
        let (reached, in_hook) = tokio::sync::oneshot::channel();
        let cut = Cut::new().memory(draft, LIVE).take(&machine, async || {
            let _ = reached.send(());
            std::future::pending::<()>().await;
            Ok(())
        });
        // The caller goes away in its hook.
        tokio::select! {
            ended = cut => panic!("{:?}", ended.map(drop)),
            reached = in_hook => reached?,
        }
        drop(machine);
        let machine = kit::machine(&guest).await?;
        let ours = jobs::reconcile(&machine).await?;
        let (word, lent) = if version == Version::New { ("paused", 1) } else { ("postmigrate", 0) };
        assert_eq!((ours.state.word.as_str(), ours.lent.len()), (word, lent), "{ours:?}");
        kit::sound(&machine).await.expect_err("something is left");
        abandon(&machine).await?;
        abandon(&machine).await?;
        machine.cont().await?;
        jobs::sweep(&machine, &jobs::reconcile(&machine).await?).await?;
        kit::sound(&machine).await?;
        guest.expect_no_bad()?;
        assert!(!guest.dir().join("memory").exists());
    }
    Ok(())
}

/// Memory that cannot be write-protected is saved by pre-copy, and the reason is reported.
#[tokio::test(flavor = "multi_thread")]
async fn unprotectable_memory_is_saved_by_pre_copy() -> Result<()> {
    let shared = [
        "-object",
        "memory-backend-file,id=m,size=128M,mem-path=DIR/ram,share=on",
        "-machine",
        "memory-backend=m",
    ];
    let mut guest = kit::loaded(GuestOptions::new().more(&shared))?;
    let machine = kit::machine(&guest).await?;
    let overlays = kit::overlays(&machine, &guest, "s", &guest.disks()).await?;
    let cut = kit::onto(&guest, &overlays).memory(Draft::create(guest.dir().join("memory"))?, LIVE);
    let taken = cut.take(&machine, kit::nothing).await?;
    assert_eq!(taken.method, CutMethod::PreCopy { converged: true });
    let why = taken.why_not.context("it is said why")?;
    assert!(why.contains("Background-snapshot is not compatible with guest memory"), "{why}");
    let image = taken.memory.context("memory")?.wait(|_| {}).await?.seal("s", b"")?;
    kit::sound(&machine).await?;
    guest.expect_no_bad()?;
    drop(machine);
    guest.wait_ticks(20)?;
    let disks = guest.disks();
    starts_cold(&mut guest, &image, &disks).await
}
