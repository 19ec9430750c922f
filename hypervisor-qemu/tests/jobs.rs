//! Merging under a real guest that writes: commit, stream, the pivot, and what a crash leaves.

mod kit;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use hypervisor_qemu::{
    ErrorKind, Machine, Name,
    graph::{self, Graph},
    jobs::{self, ActiveCommit, LayerCommit, Stream},
};
use kit::BOTH;
use qmp::JobStatus;
use testguest::{Guest, GuestOptions};

/// Makes a chain of overlays on each disk, with writes in between; returns the files of `vda`, bottom first.
async fn chain(machine: &Machine, guest: &Guest, overlays: usize) -> Result<Vec<PathBuf>> {
    let mut on = guest.disks();
    let mut files = vec![on[0].clone()];
    for number in 0..overlays {
        let made =
            kit::overlays(machine, guest, &format!("{}", char::from(b'a' + number as u8)), &on).await?;
        kit::onto(guest, &made).take(machine, kit::nothing).await?;
        guest.wait_ticks(10)?;
        on = made.into_iter().map(|(file, _)| file).collect();
        files.push(on[0].clone());
    }
    Ok(files)
}

fn content_is_right(guest: &Guest) -> Result<()> {
    guest.expect_no_bad()?;
    guest.verify_blocks()?;
    Ok(())
}

/// Layers merge in the middle and upwards, and the active one pivots.
#[tokio::test(flavor = "multi_thread")]
async fn layers_merge_down_up_and_by_pivot() -> Result<()> {
    for version in BOTH {
        for drive in [false, true] {
            let options = GuestOptions::new().version(version);
            let guest = kit::loaded(if drive { options.drive() } else { options })?;
            let machine = kit::machine(&guest).await?;
            let files = chain(&machine, &guest, 5).await?;
            let name = |layer: char| format!("domsnap-{layer}0");
            let base = kit::chain(&machine, "vda").await?.last().context("a base")?.clone();

            // b into a.
            let string = files[1].display().to_string();
            let commit = LayerCommit::new(name('e'), name('b'), name('a'), &string);
            let mut seen = Vec::new();
            assert_eq!(
                jobs::commit_layers(&machine, &commit, |progress| seen.push(progress)).await?,
                Vec::<String>::new()
            );
            ensure!(seen.last().is_some_and(|last| last.current == last.total), "{seen:?}");
            assert_eq!(
                kit::chain(&machine, "vda").await?,
                [name('e'), name('d'), name('c'), name('a'), base.clone()]
            );
            assert!(kit::img(&["info", "-U"], &files[3])?.contains(&format!("backing file: {string}")));
            kit::sound(&machine).await?;
            content_is_right(&guest)?;

            // c into d.
            let string = "a0.qcow2";
            let stream = Stream::all(name('d')).down_to(name('a'), string);
            assert_eq!(jobs::stream(&machine, &stream, |_| {}).await?, Vec::<String>::new());
            assert_eq!(kit::chain(&machine, "vda").await?, [name('e'), name('d'), name('a'), base.clone()]);
            assert!(kit::img(&["info", "-U"], &files[4])?.contains("backing file: a0.qcow2"));
            kit::sound(&machine).await?;
            content_is_right(&guest)?;

            // e into d, which becomes the active image.
            guest.forget_gap();
            let commit = ActiveCommit::new(name('e'), name('d'));
            let (equal, left) = jobs::commit_active(
                &machine,
                &commit,
                |_| {},
                async || {
                    let job = jobs::status(&machine, &commit.job).await?.expect("the job");
                    assert_eq!(job.status, JobStatus::Pending);
                    let compared = tokio::task::block_in_place(|| {
                        std::process::Command::new("qemu-img")
                            .args(["compare", "-U"])
                            .args([&files[5], &files[4]])
                            .output()
                    })?;
                    let said = [compared.stdout, compared.stderr].concat();
                    Ok(String::from_utf8_lossy(&said).into_owned())
                },
            )
            .await?;
            assert!(equal.contains("identical"), "{equal}");
            assert_eq!(left, Vec::<String>::new());
            assert_eq!(kit::chain(&machine, "vda").await?, [name('d'), name('a'), base.clone()]);
            kit::sound(&machine).await?;
            content_is_right(&guest)?;

            // All layers above the base into the base, whose node was not named by us.
            guest.forget_gap();
            let commit = ActiveCommit::new(name('d'), base.clone());
            jobs::commit_active(&machine, &commit, |_| {}, kit::nothing).await?;
            println!("{version:?} drive {drive}: pivot, largest gap {:?}", guest.largest_gap());
            assert_eq!(kit::chain(&machine, "vda").await?, [base]);
            kit::sound(&machine).await?;
            content_is_right(&guest)?;

            // The other disk was not changed by any of this. All of its layers into the active image.
            assert_eq!(kit::chain(&machine, "vdb").await?.len(), 6);
            jobs::stream(&machine, &Stream::all("domsnap-e1"), |_| {}).await?;
            assert_eq!(kit::chain(&machine, "vdb").await?, ["domsnap-e1"]);
            assert!(!kit::img(&["info", "-U"], &guest.dir().join("e1.qcow2"))?.contains("backing file"));
            kit::sound(&machine).await?;
            content_is_right(&guest)?;
        }
    }
    Ok(())
}

/// A job can be limited and cancelled; a failing hook leaves the chain as it was.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_limited_and_cancelled() -> Result<()> {
    for version in BOTH {
        let guest = kit::loaded(GuestOptions::new().version(version))?;
        let machine = kit::machine(&guest).await?;
        chain(&machine, &guest, 2).await?;
        let before = kit::chain(&machine, "vda").await?;
        for number in 0..3 {
            let job = Name::job();
            let work = async {
                match number {
                    0 => {
                        let mut commit = ActiveCommit::new("domsnap-b0", "domsnap-a0");
                        (commit.job, commit.speed) = (job.clone(), 65536);
                        jobs::commit_active(&machine, &commit, |_| {}, kit::nothing).await.map(drop)
                    }
                    1 => {
                        let mut commit = LayerCommit::new("domsnap-b0", "domsnap-a0", "d0", "x");
                        (commit.job, commit.speed) = (job.clone(), 65536);
                        jobs::commit_layers(&machine, &commit, |_| {}).await.map(drop)
                    }
                    _ => {
                        let mut stream = Stream::all("domsnap-b0");
                        (stream.job, stream.speed) = (job.clone(), 65536);
                        jobs::stream(&machine, &stream, |_| {}).await.map(drop)
                    }
                }
            };
            let stop = async {
                while jobs::status(&machine, &job).await?.is_none() {
                    tokio::time::sleep(std::time::Duration::from_millis(2)).await;
                }
                jobs::set_speed(&machine, &job, 32768).await?;
                let raw = jobs::status(&machine, &job).await?;
                ensure!(raw.is_some(), "it is limited, so it runs");
                jobs::cancel(&machine, &job).await?;
                jobs::cancel(&machine, &job).await?;
                Ok(())
            };
            let (ended, stopped) = tokio::join!(work, stop);
            stopped?;
            let error = ended.expect_err("cancelled");
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{number}: {error}");
            assert_eq!(kit::chain(&machine, "vda").await?, before);
            kit::sound(&machine).await?;
        }
        let commit = ActiveCommit::new("domsnap-b0", "domsnap-a0");
        let error =
            jobs::commit_active::<(), _>(&machine, &commit, |_| {}, async || Err("no journal".into())).await;
        let error = error.expect_err("the hook fails");
        assert!(error.kind() == ErrorKind::Hook && error.to_string().contains("no journal"), "{error}");
        assert_eq!(kit::chain(&machine, "vda").await?, before);
        kit::sound(&machine).await?;
        content_is_right(&guest)?;
        for (commit, kind) in [
            (ActiveCommit::new("domsnap-b0", "d1"), ErrorKind::Invalid),
            (ActiveCommit::new("domsnap-b0", "domsnap-b0"), ErrorKind::Invalid),
        ] {
            let error =
                jobs::commit_active(&machine, &commit, |_| {}, kit::nothing).await.expect_err("refused");
            assert_eq!(error.kind(), kind, "{error}");
        }
    }
    Ok(())
}

/// Jobs and nodes that a crash of ours left are found, and finished or removed.
#[tokio::test(flavor = "multi_thread")]
async fn leftovers_of_a_crash_are_found_and_finished() -> Result<()> {
    for version in BOTH {
        let guest = kit::loaded(GuestOptions::new().version(version))?;
        let machine = kit::machine(&guest).await?;
        chain(&machine, &guest, 2).await?;
        // A commit whose caller is dropped in the hook, an overlay that was never used, a job that ended
        // unnoticed.
        let commit = ActiveCommit::new("domsnap-b0", "domsnap-a0");
        let stuck = jobs::commit_active::<(), _>(
            &machine,
            &commit,
            |_| {},
            async || {
                std::future::pending::<()>().await;
                Ok(())
            },
        );
        let mut given_up = Box::pin(stuck);
        let until = std::time::Instant::now() + std::time::Duration::from_secs(240);
        loop {
            let _ = tokio::time::timeout(std::time::Duration::from_millis(50), &mut given_up).await;
            if jobs::status(&machine, &commit.job).await?.is_some_and(|job| job.status == JobStatus::Pending)
            {
                break;
            }
            ensure!(std::time::Instant::now() < until, "it does not come to the pivot");
        }
        drop(given_up);
        kit::overlays(&machine, &guest, "z", &guest.disks()).await?;
        drop(machine);

        let machine = kit::machine(&guest).await?;
        let ours = jobs::reconcile(&machine).await?;
        assert!(ours.state.running && ours.outgoing.is_none() && ours.lent.is_empty());
        let [job] = &ours.jobs[..] else { panic!("{:?}", ours.jobs) };
        assert_eq!((job.id.as_str(), &job.status), (commit.job.as_str(), &JobStatus::Pending));
        let idle = ours.nodes.iter().filter(|node| node.users.is_empty()).map(|node| node.name.as_str());
        let mut idle: Vec<_> = idle.collect();
        idle.sort_unstable();
        assert_eq!(idle, ["domsnap-z0", "domsnap-z1"]);
        // A sweep changes neither the job nor nodes that a device depends on.
        jobs::sweep(&machine, &ours).await?;
        let ours = jobs::reconcile(&machine).await?;
        assert!(
            ours.jobs.len() == 1 && ours.nodes.iter().all(|node| !node.users.is_empty()),
            "{:?}",
            ours.nodes
        );
        jobs::drive_active(&machine, &commit.job, |_| {}, kit::nothing).await?;
        jobs::sweep(&machine, &jobs::reconcile(&machine).await?).await?;
        assert_eq!(kit::chain(&machine, "vda").await?, ["domsnap-a0", "d0"]);
        kit::sound(&machine).await?;
        content_is_right(&guest)?;
        let graph = Graph::read(&machine).await?;
        assert!(graph.node("domsnap-b0").is_none());
        let error = graph::fold(&machine, "d0").await.expect_err("it depends on nothing");
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    Ok(())
}
