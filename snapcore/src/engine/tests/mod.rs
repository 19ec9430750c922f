//! Tests of the engine with a fake backend and a catalogue with faults. After any failure an operation has
//! happened or it has not, and everything else is as before.

mod nested;

use std::collections::BTreeMap;
use std::sync::Arc;

use camino::Utf8PathBuf;
use tokio_util::sync::CancellationToken;

use super::{Engine, Run, Verdict};
use crate::backend::*;
use crate::catalogue::{Catalogue, Change, Entry, OperationState, Revision};
use crate::event::Events;
use crate::fake::{FakeBackend, FakeCatalogue, FakeDisk, Fault, How, When};
use crate::manifest::{ManifestDirectory, ManifestStore};
use crate::plan::{self, DiskInput};
use crate::service::*;
use crate::*;

/// A domain of two disks with two snapshots, `s1` (data 1) and `s2` (data 2), and the current state 3.
struct Bench {
    directory: tempfile::TempDir,
    backend: FakeBackend,
    catalogue: FakeCatalogue,
}

/// The relevant state of a domain: disks, snapshots by name with their parents, and the current one.
#[derive(Debug, Clone, PartialEq)]
struct World {
    disks: BTreeMap<Utf8PathBuf, FakeDisk>,
    snapshots: Vec<(String, Option<String>, usize)>,
    current: Option<String>,
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

fn domain_name() -> DomainName {
    DomainName::new("web").unwrap()
}

/// What an engine borrows beside the catalogue.
struct Tools {
    registry: Registry,
    events: Events,
    manifests: Arc<dyn ManifestStore>,
}

impl Tools {
    /// An engine for domains that do not run.
    fn engine<'a>(&'a self, catalogue: &'a FakeCatalogue) -> Engine<'a> {
        Engine {
            catalogue,
            registry: &self.registry,
            events: &self.events,
            manifests: &self.manifests,
            live: None,
            watched: None,
            seat: None,
        }
    }
}

impl Bench {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let backend = FakeBackend::default();
        let catalogue = FakeCatalogue::default();
        let bench = Self { directory, backend, catalogue };
        let mut disks = Vec::new();
        for target in ["vda", "vdb"] {
            bench.backend.disks().insert(bench.path(target), FakeDisk { data: 1, ..FakeDisk::default() });
            let disk = Disk::new(Target::new(target).unwrap(), bench.path(target), "fake");
            disks.push(bench.backend.adopt(&disk, ActivePath::Keep).await.unwrap());
        }
        let domain = Domain {
            name: domain_name(),
            unregistered: false,
            hypervisor: Hypervisor::NONE,
            host: None,
            control: None,
            active_path: ActivePath::Keep,
            disks,
            current: None,
            machines: Vec::new(),
            policy: None,
        };
        let put = vec![Change::PutDomain(Box::new(domain), Vec::new())];
        bench.catalogue.commit(&domain_name(), Revision::ABSENT, put).await.unwrap();
        for (number, snapshot) in [(1, "s1"), (2, "s2")] {
            bench.write(number);
            bench.run(&create(snapshot), &CancellationToken::new()).await.unwrap();
        }
        bench.write(3);
        bench.backend.applies.set(Vec::new());
        bench.catalogue.commits.set(Vec::new());
        bench
    }

    fn root(&self) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(self.directory.path().to_path_buf()).unwrap()
    }

    fn path(&self, target: &str) -> Utf8PathBuf {
        self.root().join(format!("{target}.fake"))
    }

    fn write(&self, data: u64) {
        for target in ["vda", "vdb"] {
            self.backend.write(&self.path(target), data);
        }
    }

    fn manifests(&self) -> Arc<dyn ManifestStore> {
        Arc::new(ManifestDirectory::new(self.root().join("vda.fake.domsnap")))
    }

    fn registry(&self) -> Registry {
        let mut registry = Registry::new();
        registry.register(Arc::new(self.backend.clone())).unwrap();
        registry
    }

    fn tools(&self) -> Tools {
        Tools { registry: self.registry(), events: Events::default(), manifests: self.manifests() }
    }

    async fn entry(&self) -> Entry {
        self.catalogue.load(&domain_name()).await.unwrap().unwrap()
    }

    async fn world(&self) -> World {
        let entry = self.entry().await;
        let name_of = |id| entry.tree.get(id).unwrap().name.to_string();
        World {
            disks: self.backend.world(),
            snapshots: entry
                .tree
                .iter()
                .map(|s| (s.name.to_string(), s.parent.map(name_of), s.disks.len()))
                .collect(),
            current: entry.domain.current.map(name_of),
        }
    }

    async fn run(&self, request: &Request, cancel: &CancellationToken) -> Result<Run> {
        let mut entry = self.entry().await;
        let mut disks = Vec::new();
        for record in &entry.domain.disks {
            let state = self.backend.inspect(record, InspectDepth::Dependents, None).await?;
            disks.push(DiskInput {
                record: record.clone(),
                state,
                backend: AnyDiskSnapshotter::of(Arc::new(self.backend.clone())),
            });
        }
        let plan = plan::plan(&entry.domain, &entry.tree, &disks, None, None, request).await?;
        let tools = self.tools();
        let engine = tools.engine(&self.catalogue);
        engine.run(&mut entry, plan, Vec::new(), cancel).await
    }

    /// Runs until a fault stops it, as a kill would; then starts the next process.
    async fn run_until_stopped(&mut self, request: &Request) {
        let cancel = CancellationToken::new();
        let stopped = tokio::select! {
            outcome = self.run(request, &cancel) => Err(outcome),
            () = self.catalogue.commits.stopped.notified() => Ok(()),
            () = self.backend.applies.stopped.notified() => Ok(()),
            () = self.backend.undos.stopped.notified() => Ok(()),
        };
        stopped.expect("the fault stops the run");
        self.restart();
    }

    fn restart(&mut self) {
        self.backend = self.backend.after_a_crash();
        self.catalogue = self.catalogue.again();
    }

    /// Recovers, and checks that no operation is left unfinished.
    async fn recover(&self) -> Vec<Run> {
        let tools = self.tools();
        let engine = tools.engine(&self.catalogue);
        let mut runs = Vec::new();
        for operation in self.catalogue.unfinished(&domain_name()).await.unwrap() {
            let mut entry = self.entry().await;
            runs.push(
                engine
                    .resume(&mut entry, operation, Verdict::Unknown, &CancellationToken::new())
                    .await
                    .unwrap(),
            );
        }
        assert_eq!(self.catalogue.unfinished(&domain_name()).await.unwrap(), Vec::new());
        runs
    }

    async fn assert_manifests_match(&self, entry: &Entry) {
        let found = self.manifests().read().unwrap();
        assert_eq!(found.problems, Vec::new());
        let reported = SnapshotTree::new(found.snapshots);
        assert_eq!(reported, entry.tree);
        let catalogue = self.catalogue.identity().await.unwrap();
        assert!(self.manifests().is_current(catalogue, entry));
    }
}

fn create(snapshot: &str) -> Request {
    Request::Create(CreateRequest::new(name(snapshot)))
}

fn requests() -> Vec<Request> {
    vec![
        create("s3"),
        Request::Revert(RevertRequest::new(name("s1"))),
        Request::Revert(RevertRequest::new(name("s1")).save_current(name("saved"))),
        Request::Delete(DeleteRequest::new(vec![name("s1")])),
        Request::Delete(DeleteRequest::new(vec![name("s1"), name("s2")])),
    ]
}

/// Returns the world before and after `request`, and the number of its commits and applies.
async fn reference(request: &Request) -> (World, World, usize, usize) {
    let bench = Bench::new().await;
    let before = clear(&bench, bench.world().await);
    bench.run(request, &CancellationToken::new()).await.unwrap();
    let after = clear(&bench, bench.world().await);
    bench.assert_manifests_match(&bench.entry().await).await;
    assert_ne!(before, after, "the request does something");
    (before, after, bench.catalogue.commits.count(), bench.backend.applies.count())
}

/// The same world, independent of the bench's directory.
fn clear(bench: &Bench, mut world: World) -> World {
    world.disks = world
        .disks
        .into_iter()
        .map(|(path, disk)| (path.strip_prefix(bench.root()).unwrap().to_owned(), disk))
        .collect();
    world
}

fn places(count: usize) -> impl Iterator<Item = (usize, When)> {
    (1..=count).flat_map(|number| [(number, When::Before), (number, When::After)])
}

/// An operation that is stopped at any journal write has happened or it has not, after a recovery.
#[tokio::test]
async fn stop_at_a_journal_write_happens_or_not() {
    for request in requests() {
        let (before, after, commits, _) = reference(&request).await;
        let (mut happened, mut did_not) = (0, 0);
        for (number, when) in places(commits) {
            let mut bench = Bench::new().await;
            bench.catalogue.commits.set(vec![Fault { number, when, how: How::Stop }]);
            bench.run_until_stopped(&request).await;
            bench.recover().await;
            let world = clear(&bench, bench.world().await);
            if world == after {
                happened += 1;
            } else {
                assert_eq!(world, before, "{request:?} stopped {when:?} commit {number}");
                did_not += 1;
            }
        }
        assert!(happened > 0 && did_not > 0, "{request:?}: {happened} {did_not}");
    }
}

/// An operation that is stopped at any step has happened or it has not, after a recovery.
#[tokio::test]
async fn stop_at_a_step_happens_or_not() {
    for request in requests() {
        let (before, after, _, applies) = reference(&request).await;
        for (number, when) in places(applies) {
            let mut bench = Bench::new().await;
            bench.backend.applies.set(vec![Fault { number, when, how: How::Stop }]);
            bench.run_until_stopped(&request).await;
            bench.recover().await;
            bench.assert_manifests_match(&bench.entry().await).await;
            let world = clear(&bench, bench.world().await);
            assert!(
                world == before || world == after,
                "{request:?} stopped {when:?} step {number}: {world:?}"
            );
        }
    }
}

/// A failure at any step before the commit point is undone.
#[tokio::test]
async fn failure_before_commit_is_undone() {
    let request = Request::Revert(RevertRequest::new(name("s1")).save_current(name("saved")));
    let (before, _, _, _) = reference(&request).await;
    for how in [How::Fail(ErrorKind::Io), How::Panic] {
        // Two disks: a prepare step and two cut steps each.
        for (number, when) in places(6) {
            let bench = Bench::new().await;
            bench.backend.applies.set(vec![Fault { number, when, how: how.clone() }]);
            let error = bench.run(&request, &CancellationToken::new()).await.unwrap_err();
            let kind = if matches!(how, How::Panic) { ErrorKind::Internal } else { ErrorKind::Io };
            assert_eq!(error.kind(), kind, "{error}");
            assert_eq!(error.state_now(), Some("rolled back"));
            assert_eq!(clear(&bench, bench.world().await), before);
            assert_eq!(bench.recover().await, Vec::new());
            bench.assert_manifests_match(&bench.entry().await).await;
        }
    }
}

/// A failed undo needs recovery, and recovery undoes.
#[tokio::test]
async fn failed_undo_is_undone_by_recovery() {
    let request = Request::Revert(RevertRequest::new(name("s1")));
    let (before, _, _, _) = reference(&request).await;
    for (number, when) in places(3) {
        let mut bench = Bench::new().await;
        bench.backend.applies.set(vec![Fault {
            number: 4,
            when: When::Before,
            how: How::Fail(ErrorKind::Io),
        }]);
        bench.backend.undos.set(vec![Fault { number, when, how: How::Fail(ErrorKind::Io) }]);
        let error = bench.run(&request, &CancellationToken::new()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NeedsRecovery, "{error}");
        assert!(error.to_string().contains("domsnap recover"), "{error}");
        let operation = bench.catalogue.unfinished(&domain_name()).await.unwrap().remove(0);
        assert_eq!(operation.state, OperationState::Undoing);
        assert_eq!(operation.errors.len(), 2, "{:?}", operation.errors);
        bench.restart();
        let runs = bench.recover().await;
        assert!(!runs[0].happened);
        assert_eq!(clear(&bench, bench.world().await), before);
    }
}

/// A stop inside the undo is recovered.
#[tokio::test]
async fn stop_inside_undo_is_recovered() {
    let request = create("s3");
    let (before, _, _, _) = reference(&request).await;
    for (number, when) in places(4) {
        let mut bench = Bench::new().await;
        bench.backend.applies.set(vec![Fault {
            number: 4,
            when: When::After,
            how: How::Fail(ErrorKind::Io),
        }]);
        bench.backend.undos.set(vec![Fault { number, when, how: How::Stop }]);
        bench.run_until_stopped(&request).await;
        bench.recover().await;
        assert_eq!(clear(&bench, bench.world().await), before);
    }
}

/// A failed finish step needs recovery, and recovery finishes.
#[tokio::test]
async fn failed_finish_is_finished_by_recovery() {
    let request = create("s3");
    let (_, after, _, applies) = reference(&request).await;
    for (number, when) in places(applies).filter(|(number, _)| *number > 4) {
        let mut bench = Bench::new().await;
        bench.backend.applies.set(vec![Fault { number, when, how: How::Fail(ErrorKind::Io) }]);
        let error = bench.run(&request, &CancellationToken::new()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NeedsRecovery, "{error}");
        assert!(error.message().contains("the create happened"), "{error}");
        bench.restart();
        assert!(bench.recover().await[0].happened);
        assert_eq!(clear(&bench, bench.world().await), after);
    }
}

/// A recovery repeats steps that the domain has superseded, before the steps that are left.
#[tokio::test]
async fn recovery_repeats_superseded_steps() {
    let names = vec![name("s1"), name("s2")];
    let request = Request::Delete(DeleteRequest::new(names));
    // Each disk drops s1, then s2.
    for (number, superseded) in [(1, 0), (2, 1), (3, 0), (4, 1)] {
        let mut bench = Bench::new().await;
        bench.backend.applies.set(vec![Fault { number, when: When::Before, how: How::Stop }]);
        bench.run_until_stopped(&request).await;
        let first = r#"Drop { name: "s1" }"#.to_owned();
        bench.backend.superseded.lock().unwrap().push(first.clone());
        bench.recover().await;
        let applied = bench.backend.applied.lock().unwrap().clone();
        // If all later steps of the disk are done, nothing can be lost any more, and the question is not
        // asked.
        assert_eq!(applied.len(), 5 - number + superseded, "stopped at {number}: {applied:?}");
        assert_eq!(applied[0], first, "stopped at {number}: {applied:?}");
        assert!(bench.backend.world().values().all(|disk| disk.tags.is_empty()));
        let entry = bench.entry().await;
        assert!(entry.tree.is_empty());
        bench.assert_manifests_match(&entry).await;
    }
}

/// A recovery asks for the domain's later writes. A run whose disks were locked all the time does not.
#[tokio::test]
async fn only_recovery_asks_for_salvage() {
    let (vda, vdb) = (Target::new("vda").unwrap(), Target::new("vdb").unwrap());
    let mut bench = Bench::new().await;
    bench.backend.applies.set(vec![Fault { number: 4, when: When::After, how: How::Fail(ErrorKind::Io) }]);
    bench.run(&create("s3"), &CancellationToken::new()).await.unwrap_err();
    assert_eq!(bench.backend.undos.count(), 4);
    assert_eq!(*bench.backend.salvaged.lock().unwrap(), []);

    bench.backend.applies.set(vec![Fault { number: 3, when: When::After, how: How::Stop }]);
    bench.run_until_stopped(&create("s3")).await;
    bench.recover().await;
    let found = bench.backend.salvaged.lock().unwrap().clone();
    assert_eq!(found, [(vda.clone(), false), (vdb, true), (vda, true)]);
}

/// A cancel at any step before the commit point undoes the operation; after it, the operation happens.
#[tokio::test]
async fn cancel_undoes_before_commit_only() {
    let request = create("s3");
    let (before, after, _, applies) = reference(&request).await;
    for (number, when) in places(applies) {
        let bench = Bench::new().await;
        let cancel = CancellationToken::new();
        bench.backend.applies.set(vec![Fault { number, when, how: How::Cancel(cancel.clone()) }]);
        match bench.run(&request, &cancel).await {
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Cancelled);
                assert!(number <= 4);
                assert_eq!(clear(&bench, bench.world().await), before);
            }
            Ok(run) => {
                assert!(number > 4 && run.happened && run.postponed.is_empty());
                assert_eq!(clear(&bench, bench.world().await), after);
            }
        }
    }
    let bench = Bench::new().await;
    let cancel = CancellationToken::new();
    cancel.cancel();
    let error = bench.run(&request, &cancel).await.unwrap_err();
    assert_eq!((error.kind(), error.state_now()), (ErrorKind::Cancelled, Some("no changes made")));
}

/// Merges that are cancelled or fail are deferred, and a tidy does them.
#[tokio::test]
async fn stopped_merges_are_deferred_to_tidy() {
    let request = Request::Delete(DeleteRequest::new(vec![name("s1"), name("s2")]));
    let (_, after, _, _) = reference(&request).await;
    for cancels in [true, false] {
        let bench = Bench::new().await;
        let cancel = CancellationToken::new();
        let how = if cancels { How::Cancel(cancel.clone()) } else { How::Fail(ErrorKind::Io) };
        bench.backend.applies.set(vec![Fault { number: 1, when: When::Before, how }]);
        let run = bench.run(&request, &cancel).await.unwrap();
        assert!(run.happened);
        // A cancel stops both disks' merges; a failure only its own disk's.
        let disks: Vec<(&str, u64, u64)> =
            run.postponed.iter().map(|p| (p.subject(), p.steps, p.bytes)).collect();
        match cancels {
            true => assert_eq!(disks, [("vda", 2, 200), ("vdb", 2, 200)]),
            false => assert_eq!(disks, [("vda", 2, 200)]),
        }
        let world = clear(&bench, bench.world().await);
        assert_eq!(world.snapshots, after.snapshots);
        assert_ne!(world.disks, after.disks);
        assert_eq!(bench.recover().await, Vec::new());
        bench.backend.applies.set(Vec::new());
        bench.run(&Request::Tidy, &CancellationToken::new()).await.unwrap();
        assert_eq!(clear(&bench, bench.world().await), after);
    }
}

/// A panic in a merge is not deferred.
#[tokio::test]
async fn panic_in_merge_is_not_deferred() {
    let bench = Bench::new().await;
    bench.backend.applies.set(vec![Fault { number: 1, when: When::Before, how: How::Panic }]);
    let request = Request::Delete(DeleteRequest::new(vec![name("s1")]));
    let error = bench.run(&request, &CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NeedsRecovery);
    assert!(error.to_string().contains("the panic that the test wanted"), "{error}");
}

/// A journal that fails at any write loses nothing.
#[tokio::test]
async fn failing_journal_loses_nothing() {
    for request in requests() {
        let (before, after, commits, _) = reference(&request).await;
        for (number, when) in places(commits) {
            let mut bench = Bench::new().await;
            bench.catalogue.commits.set(vec![Fault { number, when, how: How::Fail(ErrorKind::Io) }]);
            let outcome = bench.run(&request, &CancellationToken::new()).await;
            let early = clear(&bench, bench.world().await);
            match &outcome {
                Ok(_) => assert_eq!(early, after, "{request:?} {when:?} {number}"),
                Err(error) if error.kind() == ErrorKind::NeedsRecovery => {}
                Err(error) if number > 1 => {
                    assert_eq!(early, before, "{request:?} {when:?} {number}: {error}")
                }
                // Nothing was begun. It is not known if the journal has the operation; a recovery finds out.
                Err(_) => {}
            }
            bench.restart();
            bench.recover().await;
            let world = clear(&bench, bench.world().await);
            assert!(world == before || world == after, "{request:?} {when:?} {number}: {world:?}");
        }
    }
}

/// A journal that fails for ever from the commit point on is reported and recovered.
#[tokio::test]
async fn lasting_commit_failure_is_recovered() {
    let request = create("s3");
    let (before, _, commits, _) = reference(&request).await;
    let mut bench = Bench::new().await;
    // Every commit from the third on fails, also those that would record the undo.
    let faults =
        (3..=commits + 20).map(|number| Fault { number, when: When::Before, how: How::Fail(ErrorKind::Io) });
    bench.catalogue.commits.set(faults.collect());
    let error = bench.run(&request, &CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NeedsRecovery);
    assert_eq!(error.state_now(), Some("the disks are as before"));
    assert_eq!(clear(&bench, bench.world().await), before);
    bench.restart();
    bench.recover().await;
    assert_eq!(clear(&bench, bench.world().await), before);
}

/// Another writer of the records stops the operation.
#[tokio::test]
async fn other_writer_stops_the_operation() {
    let bench = Bench::new().await;
    let mut entry = bench.entry().await;
    bench
        .catalogue
        .commit(&domain_name(), entry.revision, vec![Change::Edit(Edit::SetCurrent { id: None })])
        .await
        .unwrap();
    let tools = bench.tools();
    let engine = tools.engine(&bench.catalogue);
    let plan = Plan { commit: vec![Edit::SetCurrent { id: None }], ..Plan::new("create", Vec::new()) };
    let error = engine.run(&mut entry, plan, Vec::new(), &CancellationToken::new()).await.unwrap_err();
    assert_eq!((error.kind(), error.state_now()), (ErrorKind::Busy, Some("no changes made")));
}

/// Manifests that cannot be written are a warning.
#[tokio::test]
async fn unwritable_manifests_are_a_warning() {
    let bench = Bench::new().await;
    std::fs::remove_dir_all(bench.root().join("vda.fake.domsnap")).unwrap();
    std::fs::write(bench.root().join("vda.fake.domsnap"), "in the way").unwrap();
    let run = bench.run(&create("s3"), &CancellationToken::new()).await;
    // A file exists in place of the directory: the snapshot is taken, and the warning names the file.
    match run {
        Ok(run) => assert!(run.warnings[0].contains("vda.fake.domsnap"), "{:?}", run.warnings),
        Err(error) => panic!("{error}"),
    }
    // Without a directory no manifest promises the deleted data, so a delete continues, with the same
    // warning. (A manifest that exists and cannot be removed is refused beforehand.)
    let delete = |snapshot| Request::Delete(DeleteRequest::new(vec![name(snapshot)]));
    let run = bench.run(&delete("s1"), &CancellationToken::new()).await.unwrap();
    assert!(run.warnings[0].contains("vda.fake.domsnap"), "{:?}", run.warnings);
    assert!(bench.backend.world().values().all(|disk| !disk.tags.contains_key("s1")));
    std::fs::remove_file(bench.root().join("vda.fake.domsnap")).unwrap();
    bench.run(&delete("s2"), &CancellationToken::new()).await.unwrap();
    bench.assert_manifests_match(&bench.entry().await).await;
}
