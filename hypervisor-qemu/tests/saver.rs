//! QEMU through the engine's traits, as an engine drives it: on a real guest under load.

mod kit;
mod run;

use std::{fs, os::unix::fs::FileExt, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use hypervisor_qemu::Qemu;
use kit::BOTH;
use run::{Moves, Run, address, identity};
use snapcore::hypervisor::{
    AttachedMerge, Control, DiskInstant, DomainStep, Inside, PowerAfter, Quiesce, StartFromMemory,
    VmStateSaver,
};
use snapcore::{Consistency, ErrorKind, Target};
use testguest::GuestOptions;
use tokio_util::sync::CancellationToken;

/// A mixed snapshot with memory is reverted to in a detached section.
#[tokio::test(flavor = "multi_thread")]
async fn mixed_snapshot_with_memory_is_reverted() -> Result<()> {
    for version in BOTH {
        for drive in [false, true] {
            let options = GuestOptions::new().version(version);
            let mut run = Run::new(kit::loaded(if drive { options.drive() } else { options })?).await?;
            let then = run.guest.ticks()?;
            let overlay = run.overlay(0)?;
            let internal = (run.targets[1].clone(), DiskInstant::Internal { tag: "s".to_owned() });
            let step = run.instant(vec![overlay, internal], Some("memory"));
            let facts = run.take(&step).await?;
            let taken = facts.taken.context("it was taken")?;
            println!("{version:?} drive {drive}: {} {:?} {:?}", taken.method, facts.downtime, facts.notes);
            assert_eq!((taken.consistency, taken.running), (Consistency::Memory, true));
            assert!(facts.downtime.is_some_and(|downtime| !downtime.is_zero()));
            let memory = run.dir.join("memory");
            let saved = run
                .apply(&DomainStep::SaveMemory { image: address(&memory), tag: "s".to_owned(), compress: 0 })
                .await?;
            assert_eq!(saved.memory_bytes, Some(fs::metadata(&memory)?.len()));
            let reopen = DomainStep::ReopenByName { disks: run.targets.clone() };
            run.apply(&reopen).await?;
            run.apply(&reopen).await?;
            run.sound().await?;
            assert_eq!(
                run.live()?.clean_up(&run.chains()).await?,
                Vec::<String>::new(),
                "all is as it should be"
            );
            run.guest.expect_no_bad()?;

            for (reset, crash) in [(false, false), (false, true), (true, true)] {
                run.guest.wait_ticks(40)?;
                let boots = run.guest.boots();
                let detach = DomainStep::Detach { disks: run.targets.clone(), running: true, restart: None };
                run.apply(&detach).await?;
                run.apply(&detach).await?;
                for number in 0..2 {
                    assert_eq!(run.open_files(number).await?.len(), 0);
                }
                assert_eq!(run.live()?.resume().await.map_err(|error| error.kind()), Err(ErrorKind::Refused));
                if crash {
                    run.reconnect().await?;
                    assert_eq!(run.open_files(1).await?.len(), 0, "the disk is known by its placeholder");
                }
                // Like at rest: another overlay on the frozen image, and the snapshot applied.
                run.layers[0].remove(0);
                run.grow(0)?;
                kit::img(&["snapshot", "-a", "s"], &run.layers[1][0])?;
                let attach = DomainStep::Attach { disks: run.targets.clone(), restart: None };
                run.apply(&attach).await?;
                run.apply(&attach).await?;
                let memory = (!reset).then(|| address(&memory));
                let power = (!reset).then_some(PowerAfter::Running);
                let go_on = DomainStep::Continue { memory, reset, power };
                let facts = run.apply(&go_on).await?;
                assert_eq!(facts.downtime.is_some(), !crash, "{facts:?}");
                if reset {
                    run.guest.wait_boots(boots + 1)?;
                } else {
                    let now = run.guest.ticks()?;
                    assert!(now < then + 60, "{now} after {then}");
                }
                run.sound().await?;
                run.guest.expect_no_bad()?;
                // Repeated, as after a later crash: nothing is loaded over data that was written since.
                run.guest.wait_ticks(30)?;
                let before = run.guest.ticks()?;
                run.apply(&go_on).await?;
                assert!(run.guest.ticks()? >= before);
                if !reset {
                    run.guest.verify_blocks()?;
                }
            }
        }
    }
    Ok(())
}

/// A compressed memory image is loaded in place and started from, and nothing else is left.
#[tokio::test(flavor = "multi_thread")]
async fn compressed_memory_is_loaded_and_started() -> Result<()> {
    for version in kit::versions() {
        let mut run = Run::new(kit::loaded(GuestOptions::new().version(version))?).await?;
        let machine = run.live()?.seen().machine.clone();
        let overlays = vec![run.overlay(0)?, run.overlay(1)?];
        run.take(&run.instant(overlays, Some("memory"))).await?;
        let memory = address(&run.dir.join("memory"));
        let save = DomainStep::SaveMemory { image: memory.clone(), tag: "s".to_owned(), compress: 1 };
        let saved = run.apply(&save).await?;
        let (stored, full) = (saved.memory_bytes.context("a size")?, saved.memory_full.context("a size")?);
        println!("{version:?}: {stored} bytes of {full}");
        assert_eq!(stored, fs::metadata(memory.path())?.len());
        assert!(stored < full / 2, "{stored} of {full}");
        let again = run.apply(&save).await?;
        assert_eq!((again.memory_bytes, again.memory_full), (Some(stored), Some(full)), "it is whole");
        run.apply(&DomainStep::ReopenByName { disks: run.targets.clone() }).await?;
        let files = |run: &Run| -> Result<usize> {
            Ok(fs::read_dir(&run.dir)?
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .filter(|name| name.starts_with(".memory") || name.contains("scratch"))
                .count())
        };
        assert_eq!(files(&run)?, 0);

        // A changed image is refused while the guest runs.
        let file = fs::File::options().read(true).write(true).open(memory.path())?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, stored / 2)?;
        file.write_all_at(&[byte[0] ^ 8], stored / 2)?;
        let error = run.saver.check_memory(&memory, &run::Quiet).await.expect_err("it was changed");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        file.write_all_at(&byte, stored / 2)?;

        // In place: with the unpacked image of the check, and without it, as after a crash.
        let then = run.guest.ticks()?;
        for crash in [false, true] {
            run.guest.wait_ticks(30)?;
            run.saver.check_memory(&memory, &run::Quiet).await?;
            if crash {
                run.saver.release_memory(&memory).await?;
            }
            run.apply(&DomainStep::Detach { disks: run.targets.clone(), running: true, restart: None })
                .await?;
            for number in 0..2 {
                run.layers[number].remove(0);
                run.grow(number)?;
            }
            run.apply(&DomainStep::Attach { disks: run.targets.clone(), restart: None }).await?;
            let power = Some(PowerAfter::Running);
            run.apply(&DomainStep::Continue { memory: Some(memory.clone()), reset: false, power }).await?;
            let now = run.guest.ticks()?;
            assert!(now < then + 30, "{now} after {then}");
            run.guest.wait_ticks(10)?;
            run.guest.expect_no_bad()?;
            run.sound().await?;
            // A repeated step does not load the memory again into a guest that ran and is paused now: its
            // disks are newer.
            let newer = run.guest.ticks()?;
            run.pause().await?;
            let again = DomainStep::Continue { memory: Some(memory.clone()), reset: false, power };
            let notes = run.apply(&again).await?.notes;
            assert!(notes.iter().any(|note| note.contains("paused now")), "{notes:?}");
            run.live()?.resume().await?;
            run.guest.wait_ticks(5)?;
            assert!(run.guest.ticks()? > newer, "it is the guest of before");
            run.guest.expect_no_bad()?;
        }
        assert_eq!(files(&run)?, 0);

        let off = DomainStep::Continue { memory: None, reset: false, power: Some(PowerAfter::Off) };
        run.apply(&off).await?;
        run.guest.wait_end()?;
        run.disconnect();
        for number in 0..2 {
            run.layers[number].remove(0);
            run.grow(number)?;
        }
        let chains = run.chains();
        let start = |machine| StartFromMemory::new(&run.domain, &memory, &chains).machine(Some(machine));
        // The user gets a pipe: the unpacked image ends with this process.
        let mut other = machine.clone();
        other["process"]["uid"] = 4_000_000.into();
        let reported = run.saver.start(start(&other)).await?.start;
        assert!(reported.iter().any(|word| word.ends_with("| zstd -dc")), "{reported:?}");
        assert!(!reported.iter().any(|word| word.contains("/proc/")), "{reported:?}");
        let facts = run.saver.start(start(&machine)).await?;
        assert_eq!(facts.start, Vec::<String>::new(), "{:?}", facts.notes);
        run.reconnect().await?;
        assert!(run.live()?.seen().running);
        run.guest.wait_ticks(20)?;
        run.guest.expect_no_bad()?;
        run.guest.verify_blocks()?;
        run.sound().await?;
        run.apply(&off).await?;
        run.disconnect();
        run.saver.remove_memory(&memory).await?;
        assert!(!memory.path().exists() && files(&run)? == 0);
    }
    Ok(())
}

/// Copies a disk's file, like a backend that takes points itself.
struct Copies {
    from: PathBuf,
    to: PathBuf,
    /// Other moves of the same step.
    moves: Moves,
}

#[async_trait]
impl Inside for Copies {
    async fn run(&self, only: Option<&Target>) -> snapcore::Result<()> {
        self.moves.run(only).await?;
        let copied = fs::copy(&self.from, &self.to);
        copied.map(drop).map_err(|error| snapcore::Error::new(ErrorKind::Io, error.to_string()))
    }

    async fn back(&self, _: Option<&Target>) -> snapcore::Result<()> {
        Err(snapcore::Error::new(ErrorKind::Internal, "nothing here pivots"))
    }
}

/// A raw disk that its backend copies is of the same instant, and is reattached in a detached section.
#[tokio::test(flavor = "multi_thread")]
async fn raw_disk_copied_by_its_backend_is_consistent() -> Result<()> {
    for version in kit::versions() {
        for drive in [false, true] {
            let options = GuestOptions::new().version(version).raw(&[1]);
            let mut run = Run::new(kit::loaded(if drive { options.drive() } else { options })?).await?;
            let then = run.guest.ticks()?;
            let overlay = run.overlay(0)?;
            let step =
                run.instant(vec![overlay, (run.targets[1].clone(), DiskInstant::ByBackend)], Some("memory"));
            let copy = run.dir.join("copy");
            let copies = Copies {
                from: run.guest.disk(1),
                to: copy.clone(),
                moves: run.moves(&[(0, run.layers[0][0].clone())]),
            };
            run.take_with(&step, &copies).await?;
            let memory = run.dir.join("memory");
            run.apply(&DomainStep::SaveMemory { image: address(&memory), tag: "s".to_owned(), compress: 0 })
                .await?;
            run.apply(&DomainStep::ReopenByName { disks: vec![run.targets[0].clone()] }).await?;
            run.sound().await?;

            for crash in [false, true] {
                run.guest.wait_ticks(40)?;
                run.apply(&DomainStep::Detach { disks: run.targets.clone(), running: true, restart: None })
                    .await?;
                assert_eq!(run.open_files(1).await?.len(), 0);
                run.layers[0].remove(0);
                run.grow(0)?;
                // Another file is at the raw disk's path, and the previous one is gone.
                let new = run.dir.join("vdb.new");
                fs::copy(&copy, &new)?;
                fs::rename(&new, run.guest.disk(1))?;
                fs::remove_file(&run.layers[1][0])?;
                fs::hard_link(run.guest.disk(1), &run.layers[1][0])?;
                if crash {
                    run.reconnect().await?;
                }
                run.apply(&DomainStep::Attach { disks: run.targets.clone(), restart: None }).await?;
                assert_eq!(run.open_files(1).await?, run.files(1));
                let go_on = DomainStep::Continue {
                    memory: Some(address(&memory)),
                    reset: false,
                    power: Some(PowerAfter::Running),
                };
                run.apply(&go_on).await?;
                let now = run.guest.ticks()?;
                assert!(now < then + 60, "{now} after {then}");
                run.sound().await?;
                run.guest.expect_no_bad()?;
                run.guest.verify_blocks()?;
            }
        }
    }
    Ok(())
}

/// A cut is undone, and all later writes of the guest are kept.
#[tokio::test(flavor = "multi_thread")]
async fn cut_is_undone_with_later_writes() -> Result<()> {
    for version in kit::versions() {
        for (drive, crash) in [(false, true), (true, false)] {
            let options = GuestOptions::new().version(version);
            let mut run = Run::new(kit::loaded(if drive { options.drive() } else { options })?).await?;
            let before = run.paths();
            let overlays = vec![run.overlay(0)?, run.overlay(1)?];
            let step = run.instant(overlays, Some("memory"));
            run.take(&step).await?;
            assert_ne!(run.paths(), before, "the paths were moved");
            let save = DomainStep::SaveMemory {
                image: address(&run.dir.join("memory")),
                tag: "s".to_owned(),
                compress: 0,
            };
            if crash {
                // The migration continues without a reader of its result.
                run.reconnect().await?;
                let error = run.apply(&save).await.expect_err("the memory is lost");
                assert!(error.to_string().contains("lost"), "{error}");
            }
            run.guest.wait_ticks(40)?;
            let ticks = run.guest.ticks()?;
            run.undo(&save).await?;
            // The undo moves the path back at each disk's pivot.
            if crash {
                for after in [false, true] {
                    let hangs = run::Hangs { moves: run.back(&step), after };
                    run.interrupt(async |run| run.undo_instant_with(&step, &hangs).await).await?;
                }
            }
            run.undo_instant(&step).await?;
            assert_eq!(run.paths(), before, "and moved back");
            run.undo_instant(&step).await?;
            run.undo(&save).await?;
            for (number, file) in before.iter().enumerate() {
                assert_eq!(run.open_files(number).await?.iter().collect::<Vec<_>>(), [file]);
            }
            assert!(!run.dir.join("memory").exists() && !run.dir.join(".memory.part").exists());
            run.sound().await?;
            run.guest.expect_no_bad()?;
            run.guest.verify_blocks()?;
            let now = run.guest.ticks()?;
            assert!(now >= ticks);
            run.disconnect();
            run.guest.restart()?;
            let found = run.guest.counters_at_boot();
            assert!(
                found.iter().all(|counter| counter.is_some_and(|counter| counter + 1 >= now)),
                "{found:?} of {now}"
            );
            // It was started again since: there is nothing to undo.
            run.reconnect().await?;
            run.undo_instant(&step).await?;
            run.sound().await?;
            run.guest.expect_no_bad()?;
        }
    }
    Ok(())
}

/// Layers merge in each direction, with the path moved at the pivot, also after a crash.
#[tokio::test(flavor = "multi_thread")]
async fn layers_merge_in_each_direction() -> Result<()> {
    for version in kit::versions() {
        let mut run = Run::new(kit::loaded(GuestOptions::new().version(version))?).await?;
        for _ in 0..5 {
            let overlay = run.overlay(0)?;
            let step = run.instant(vec![overlay], None);
            let facts = run.take(&step).await?;
            assert_eq!(facts.taken.context("it was taken")?.consistency, Consistency::Crash);
            run.apply(&DomainStep::ReopenByName { disks: run.targets.clone() }).await?;
            run.guest.wait_ticks(15)?;
        }
        // Top first: 5 4 3 2 1 0.
        let layers = run.layers[0].clone();
        let file = |number: usize| address(&layers[5 - number]);
        let string = |number: usize| Some(file(number).name().to_owned());
        let target = run.targets[0].clone();
        let never = CancellationToken::new();
        let quiet = run::Quiet;

        let down = AttachedMerge::new(vec![file(1), file(2)], file(1)).below(Some(file(0))).string(string(1));
        for round in 0..2 {
            let live = run.live()?;
            let disk = live.disk(&target).context("it is attached")?;
            if round == 0 {
                // Limited and cancelled; then one whose caller is dropped.
                live.limit(1 << 16);
                let cancel = CancellationToken::new();
                let cancelling = async {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    cancel.cancel();
                };
                let (ended, ()) = tokio::join!(disk.merge(&down, &(), &quiet, &cancel), cancelling);
                assert_eq!(ended.map_err(|error| error.kind()), Err(ErrorKind::Cancelled));
                assert_eq!(run.open_files(0).await?.len(), 6);
                let merging = disk.merge(&down, &(), &quiet, &never);
                let gone = tokio::time::timeout(Duration::from_millis(100), merging).await;
                ensure!(gone.is_err(), "it is limited: {gone:?}");
                drop(live);
                run.reconnect().await?;
                continue;
            }
            // The limit of a running job is removed.
            let lifting = async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                live.limit(1);
                live.limit(0);
            };
            let (ended, ()) = tokio::join!(disk.merge(&down, &(), &quiet, &never), lifting);
            ended?;
            disk.merge(&down, &(), &quiet, &never).await?;
        }
        run.layers[0].remove(3);
        assert_eq!(run.open_files(0).await?, run.files(0));
        run.sound().await?;

        let up = AttachedMerge::new(vec![file(3), file(4)], file(4)).below(Some(file(1))).string(string(1));
        run.merge(&up, &()).await?;
        run.merge(&up, &()).await?;
        run.layers[0].remove(2);
        assert_eq!(run.open_files(0).await?, run.files(0));
        assert!(
            kit::img(&["info", "-U"], &layers[1])?
                .contains(&format!("backing file: {}", string(1).context("a name")?))
        );
        run.sound().await?;

        // Down from the active image. First the path cannot be moved, then a crash comes before the move.
        let pivot =
            AttachedMerge::new(vec![file(4), file(5)], file(4)).below(Some(file(1))).string(string(4));
        let before = run.paths();
        let error = run.merge(&pivot, &run::Fails).await.expect_err("it fails");
        assert_eq!((error.kind(), error.message()), (ErrorKind::NoSpace, "no space for a link"));
        let hangs = run::Hangs { moves: run.moves(&[(0, layers[1].clone())]), after: false };
        run.interrupt(async |run| run.merge(&pivot, &hangs).await).await?;
        assert_eq!(run.paths(), before);
        run.merge(&pivot, &hangs.moves).await?;
        run.merge(&pivot, &hangs.moves).await?;
        run.layers[0].remove(0);
        assert_eq!(run.open_files(0).await?, run.files(0));
        assert_eq!(run.paths()[0], identity(&layers[1])?);
        run.sound().await?;

        // All into the base, with a crash after the path was moved.
        let run_of_all = vec![file(0), file(1), file(4)];
        let pivot = AttachedMerge::new(run_of_all, file(0));
        let hangs = run::Hangs { moves: run.moves(&[(0, layers[5].clone())]), after: true };
        run.interrupt(async |run| run.merge(&pivot, &hangs).await).await?;
        assert_eq!(run.paths()[0], identity(&layers[5])?);
        run.merge(&pivot, &hangs.moves).await?;
        run.merge(&pivot, &hangs.moves).await?;
        run.layers[0] = vec![layers[5].clone()];
        assert_eq!(run.open_files(0).await?, run.files(0));
        run.sound().await?;
        run.guest.expect_no_bad()?;
        run.guest.verify_blocks()?;

        // Layers that are not in the chain are refused.
        let error = run.merge(&down, &()).await.expect_err("it is gone");
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    }
    Ok(())
}

/// A domain that is off is started from memory, with its previous command.
#[tokio::test(flavor = "multi_thread")]
async fn stopped_domain_is_started_from_memory() -> Result<()> {
    for version in kit::versions() {
        let mut run = Run::new(kit::loaded(GuestOptions::new().version(version))?).await?;
        let machine = run.live()?.seen().machine.clone();
        let overlays = vec![run.overlay(0)?, run.overlay(1)?];
        let step = run.instant(overlays, Some("memory"));
        run.take(&step).await?;
        let memory = address(&run.dir.join("memory"));
        run.apply(&DomainStep::SaveMemory { image: memory.clone(), tag: "s".to_owned(), compress: 0 })
            .await?;
        run.apply(&DomainStep::ReopenByName { disks: run.targets.clone() }).await?;
        run.guest.wait_ticks(30)?;
        let then = run.guest.ticks()?;
        let off = DomainStep::Continue { memory: None, reset: false, power: Some(PowerAfter::Off) };
        run.apply(&off).await?;
        run.guest.wait_end()?;
        run.disconnect();
        assert!(run.saver.connect(&run.domain).await?.is_none(), "it is off");
        let error =
            run.saver.look(run.domain.control.as_ref().context("control")?).await.expect_err("it is off");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");

        for power in [None, Some(PowerAfter::Paused)] {
            for number in 0..2 {
                run.layers[number].remove(0);
                run.grow(number)?;
            }
            run.saver.check_memory(&memory, &run::Quiet).await?;
            let chains = run.chains();
            let start =
                StartFromMemory::new(&run.domain, &memory, &chains).machine(Some(&machine)).power(power);
            let facts = run.saver.start(start).await?;
            assert_eq!(facts.start, Vec::<String>::new(), "{:?}", facts.notes);
            run.reconnect().await?;
            let live = run.live()?;
            assert_eq!(live.seen().running, power.is_none());
            assert_eq!(live.seen().machine, machine, "the same machine, started again");
            assert_eq!(live.differences(&machine)?, Vec::<String>::new());
            live.resume().await?;
            let now = run.guest.ticks()?;
            assert!(now < then, "{now}, not before {then}");
            run.guest.wait_ticks(20)?;
            run.guest.expect_no_bad()?;
            run.guest.verify_blocks()?;
            drop(live);
            run.sound().await?;
            run.apply(&off).await?;
            run.disconnect();
        }

        // A domain that cannot be started is reported.
        let mut other = machine.clone();
        other["process"]["uid"] = 4_000_000.into();
        let start = StartFromMemory::new(&run.domain, &memory, &[]).machine(Some(&other));
        let facts = run.saver.start(start).await?;
        assert!(
            facts.start.iter().any(|word| word == "-incoming") && facts.notes[0].contains("user 4000000")
        );
        let start = StartFromMemory::new(&run.domain, &memory, &[]);
        let facts = run.saver.start(start).await?;
        assert!(facts.start.is_empty() && facts.notes[0].contains("is not known"), "{facts:?}");
        // QEMU's refusal is an error.
        let mut other = machine.clone();
        let args = other["process"]["command_line"].as_array_mut().context("arguments")?;
        let place = args.iter().position(|word| word == "-m").context("-m")?;
        args[place + 1] = "160".into();
        let start = StartFromMemory::new(&run.domain, &memory, &[]).machine(Some(&other));
        let error = run.saver.start(start).await.expect_err("it does not fit");
        assert!(error.kind() == ErrorKind::Io && error.to_string().contains("pc.ram"), "{error}");
        assert!(run.saver.connect(&run.domain).await?.is_none(), "no process is left");
        run.saver.remove_memory(&memory).await?;
        run.saver.remove_memory(&memory).await?;
        assert_eq!(
            run.saver.check_memory(&memory, &run::Quiet).await.expect_err("gone").kind(),
            ErrorKind::NotFound
        );
    }
    Ok(())
}

/// A detached section that is undone leaves the disks and the guest as they were.
#[tokio::test(flavor = "multi_thread")]
async fn undone_detached_section_changes_nothing() -> Result<()> {
    for version in kit::versions() {
        for (runs, crash) in [(true, false), (true, true), (false, true)] {
            let mut run = Run::new(kit::loaded(GuestOptions::new().version(version))?).await?;
            if !runs {
                run.pause().await?;
            }
            let files = [run.open_files(0).await?, run.open_files(1).await?];
            let detach = DomainStep::Detach { disks: run.targets.clone(), running: runs, restart: None };
            run.apply(&detach).await?;
            let attach = DomainStep::Attach { disks: run.targets.clone(), restart: None };
            run.apply(&attach).await?;
            if crash {
                run.reconnect().await?;
            }
            run.undo(&attach).await?;
            assert_eq!(run.open_files(0).await?.len(), 0);
            run.undo(&detach).await?;
            run.undo(&detach).await?;
            assert_eq!([run.open_files(0).await?, run.open_files(1).await?], files);
            run.reconnect().await?;
            assert_eq!(run.live()?.seen().running, runs);
            run.live()?.resume().await?;
            run.sound().await?;
            run.guest.wait_ticks(20)?;
            run.guest.expect_no_bad()?;
            run.guest.verify_blocks()?;
        }
    }
    Ok(())
}

/// A disk that a crash left half detached is detached completely, or reattached.
#[tokio::test(flavor = "multi_thread")]
async fn half_detached_disk_is_finished_or_undone() -> Result<()> {
    for version in BOTH {
        for to_the_end in [false, true] {
            let mut run = Run::new(kit::loaded(GuestOptions::new().version(version))?).await?;
            let detach = DomainStep::Detach { disks: run.targets.clone(), running: true, restart: None };
            let attach = DomainStep::Attach { disks: run.targets.clone(), restart: None };
            run.apply(&detach).await?;
            let placeholders = run.placeholders().await?;
            run.apply(&attach).await?;
            run.half_detach(0, &placeholders[0]).await?;
            assert_eq!(run.open_files(0).await?, run.files(0), "its files are not free");
            if to_the_end {
                run.apply(&detach).await?;
                assert_eq!(run.open_files(0).await?.len(), 0);
                run.apply(&attach).await?;
                run.apply(&DomainStep::Continue { memory: None, reset: false, power: None }).await?;
            } else {
                // A job of another disk is not ended with it.
                let job = "domsnap-j-0123456789ab";
                run.copy_slowly(1, job).await?;
                run.apply(&DomainStep::Attach { disks: vec![run.targets[0].clone()], restart: None }).await?;
                assert!(run.end_job(job).await?, "the job of the other disk was ended");
                run.undo(&detach).await?;
            }
            run.sound().await?;
            assert!(run.live()?.seen().running);
            assert_eq!(run.open_files(0).await?, run.files(0));
            run.guest.wait_ticks(20)?;
            run.guest.expect_no_bad()?;
            run.guest.verify_blocks()?;
        }
    }
    Ok(())
}

/// A snapshot is quiesced, or refused, or has a note with the reason.
#[tokio::test(flavor = "multi_thread")]
async fn quiesce_is_done_refused_or_explained() -> Result<()> {
    let mut run = Run::new(kit::loaded(GuestOptions::new())?).await?;
    run.guest.await_agent()?;
    let overlay = run.overlay(0)?;
    let mut step = run.instant(vec![overlay], None);
    let set = |step: &mut DomainStep, wanted: Quiesce, after: Option<PowerAfter>| {
        if let DomainStep::Instant { quiesce, then, .. } = step {
            (*quiesce, *then) = (wanted, after);
        }
    };
    set(&mut step, Quiesce::Require, Some(PowerAfter::Paused));
    let facts = run.take(&step).await?;
    assert_eq!(facts.taken.context("it was taken")?.consistency, Consistency::Filesystem);
    run.apply(&DomainStep::ReopenByName { disks: run.targets.clone() }).await?;
    run.reconnect().await?;
    assert!(!run.live()?.seen().running, "it was to be paused");
    run.live()?.resume().await?;
    run.guest.expect_no_bad()?;
    run.guest.shell("sync")?;

    run.guest.shell("killall qemu-ga")?;
    kit::until(async || Ok(!run.agent_is_there().await?)).await?;
    let before = run.paths();
    let overlay = run.overlay(0)?;
    let mut step = run.instant(vec![overlay.clone()], None);
    set(&mut step, Quiesce::Require, None);
    let error = run.take(&step).await.expect_err("there is none");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(run.paths(), before);
    run.sound().await?;
    set(&mut step, Quiesce::Try, None);
    let facts = run.take(&step).await?;
    assert_eq!(facts.taken.context("it was taken")?.consistency, Consistency::Crash);
    assert!(facts.notes.iter().any(|note| note.contains("no agent")), "{:?}", facts.notes);
    run.apply(&DomainStep::ReopenByName { disks: run.targets.clone() }).await?;
    run.sound().await?;
    run.guest.expect_no_bad()?;
    Ok(())
}

/// A running domain is described and found, and disks that are left out have a reason.
#[tokio::test(flavor = "multi_thread")]
async fn running_domain_is_described_and_found() -> Result<()> {
    let more = [
        "-drive",
        "if=none,id=cd,media=cdrom,format=raw,file=DIR/cd.iso",
        "-device",
        "virtio-scsi-pci,id=scsi",
        "-device",
        "scsi-cd,drive=cd,id=cd0",
        "-drive",
        "if=none,id=plain,format=raw,file=DIR/plain.raw",
        "-device",
        "scsi-hd,drive=plain",
        "-drive",
        "if=none,id=seed,format=raw,readonly=on,file=DIR/seed.raw",
        "-device",
        "virtio-blk-pci,drive=seed,id=seed0",
    ];
    let options = GuestOptions::new().more(&more).from_boot();
    let options = ["cd.iso", "plain.raw", "seed.raw"]
        .into_iter()
        .fold(options, |options, name| options.file(name, vec![0; 1 << 20]));
    let run = Run::new(options.start()?).await?;
    let live = run.live()?;
    let seen = live.seen();
    println!("{}", seen.summary);
    assert_eq!((seen.name.as_deref(), seen.running), (Some("guest"), true));
    assert_eq!(seen.agent.as_deref().map(|agent| agent.as_std_path()), Some(run.guest.agent_socket()));
    let mut shown: Vec<_> = seen
        .disks
        .iter()
        .map(|disk| {
            (disk.target.as_str(), disk.address.name(), disk.format.as_str(), disk.left_out.is_some())
        })
        .collect();
    shown.sort_unstable();
    assert_eq!(
        shown,
        [
            ("cd0", "cd.iso", "raw", true),
            ("plain", "plain.raw", "raw", false),
            ("seed0", "seed.raw", "raw", true),
            ("vda", "vda.qcow2", "qcow2", false),
            ("vdb", "vdb.qcow2", "qcow2", false),
        ]
    );
    assert!(seen.disks.iter().all(|disk| disk.address.path().is_absolute()));
    let record = seen.machine.to_string();
    assert!(!record.contains("vda.qcow2\",\"driver\"") && record.contains("pc-q35-"), "{record}");

    // A connected client keeps others out, but not itself.
    let control = run.domain.control.clone().context("control")?;
    assert_eq!(&run.saver.look(&control).await?.machine, &seen.machine);
    let begun = std::time::Instant::now();
    let error = Qemu::new().connect(&run.domain).await.map(|_| ()).expect_err("it serves one client");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    println!("busy after {:?}: {error}", begun.elapsed());
    let found = run.saver.scan().await?;
    let found = found.iter().find(|(found, _)| found.address == control.address).context("it is found")?;
    assert_eq!((&found.0.agent, &found.1.machine), (&seen.agent, &seen.machine));

    let mut other = seen.machine.clone();
    other["machine"] = "pc-q35-3.1".into();
    let differences = live.differences(&other)?;
    assert!(differences.len() == 1 && differences[0].contains("pc-q35-3.1"), "{differences:?}");
    assert_eq!(
        live.differences(&serde_json::json!({ "machine": 3 })).expect_err("no record").kind(),
        ErrorKind::Corrupt
    );
    let unserved = Control::at(run.dir.join("unserved").display().to_string());
    assert_eq!(run.saver.look(&unserved).await.expect_err("no server").kind(), ErrorKind::NotFound);
    Ok(())
}
