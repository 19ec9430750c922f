//! Tests of the service with a fake backend: domains by name and by path, the catalogue lost and rebuilt, two
//! users at once.

mod fake;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use catalogue_sqlite::SqliteCatalogue;
use fake::{FakeBackend, FakeDisk, Fault, How, When};
use snapcore::backend::*;
use snapcore::catalogue::OperationState;
use snapcore::service::*;
use snapcore::service::{ImportOptions, RecoveryEnd};
use snapcore::*;
use tokio_util::sync::CancellationToken;

/// A directory with images `a.fake`, `b.fake` and `c.fake`.
struct Place {
    directory: tempfile::TempDir,
    backend: FakeBackend,
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

fn go() -> CancellationToken {
    CancellationToken::new()
}

fn by_name(text: &str) -> DomainRef {
    DomainRef::parse(text).unwrap()
}

impl Place {
    fn new() -> Self {
        let place = Self { directory: tempfile::tempdir().unwrap(), backend: FakeBackend::default() };
        for image in ["a", "b", "c"] {
            std::fs::write(place.image(image), "").unwrap();
            place.backend.disks().insert(place.image(image), FakeDisk { data: 1, ..FakeDisk::default() });
        }
        place
    }

    fn root(&self) -> Utf8PathBuf {
        Utf8Path::from_path(self.directory.path()).unwrap().canonicalize_utf8().unwrap()
    }

    fn image(&self, image: &str) -> Utf8PathBuf {
        self.root().join(format!("{image}.fake"))
    }

    fn images(&self, images: &[&str]) -> DomainRef {
        DomainRef::images(images.iter().map(|image| self.image(image))).unwrap()
    }

    fn state(&self) -> Utf8PathBuf {
        self.root().join("state")
    }

    fn service(&self) -> Domsnap {
        let mut registry = Registry::new();
        registry.register(Arc::new(self.backend.clone())).unwrap();
        Domsnap::new(Arc::new(SqliteCatalogue::new(self.state())), registry)
    }

    fn spec(&self, domain: &str, images: &[&str]) -> DomainSpec {
        images.iter().fold(DomainSpec::new(DomainName::new(domain).unwrap()), |spec, image| {
            spec.disk(Target::new(format!("xvd{image}")).unwrap(), self.image(image), "fake")
        })
    }

    async fn names(&self, reference: &DomainRef) -> Vec<String> {
        let listing = self.service().list(reference).await.unwrap();
        listing.snapshots.iter().map(|snapshot| snapshot.name.to_string()).collect()
    }

    async fn create(&self, reference: &DomainRef, snapshot: &str) -> service::Outcome {
        self.service().create(reference, CreateRequest::new(name(snapshot)), go()).await.unwrap()
    }

    fn lose_the_catalogue(&self) {
        std::fs::remove_dir_all(self.state()).unwrap();
    }
}

#[tokio::test]
async fn reading_makes_nothing() {
    let place = Place::new();
    let reference = place.images(&["a", "b"]);
    let service = place.service();
    assert_eq!(service.domains().await.unwrap(), Vec::new());
    let listing = service.list(&reference).await.unwrap();
    assert!(!listing.catalogued && listing.snapshots.is_empty());
    service.check(&reference).await.unwrap();
    service.plan(&reference, &Request::Create(CreateRequest::new(name("s1")))).await.unwrap();
    assert_eq!(service.recover(None, go()).await.unwrap(), Vec::new());
    assert_eq!(service.list(&by_name("web")).await.unwrap_err().kind(), ErrorKind::NotFound);
    let left: Vec<_> = std::fs::read_dir(place.root()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

/// A reader of an existing catalogue makes no file either.
#[tokio::test]
async fn reader_of_a_catalogue_makes_no_file() {
    let place = Place::new();
    place.create(&place.images(&["a"]), "s1").await;
    let files = || {
        let mut all: Vec<_> = std::fs::read_dir(place.state())
            .unwrap()
            .map(|f| f.unwrap())
            .map(|f| {
                (
                    f.file_name(),
                    f.metadata().unwrap().len(),
                    f.metadata().unwrap().permissions().mode() & 0o777,
                )
            })
            .collect();
        all.sort();
        all
    };
    let before = files();
    for (file, _, mode) in &before {
        assert_eq!(*mode, if file == "locks" { 0o700 } else { 0o600 }, "{file:?}");
    }
    assert_eq!(place.names(&place.images(&["a"])).await, ["s1"]);
    assert_eq!(files(), before);
}

#[tokio::test]
async fn create_revert_and_delete_by_image_paths() {
    let place = Place::new();
    let reference = place.images(&["a", "b"]);
    let outcome = place.create(&reference, "s1").await;
    assert_eq!((outcome.operation.as_str(), outcome.snapshots.len()), ("create", 1));
    place.backend.write(&place.image("a"), 9);
    let service = place.service();
    let listing = service.list(&reference).await.unwrap();
    assert!(listing.catalogued && listing.domain.unregistered);
    assert_eq!(listing.snapshots[0].consistency, Consistency::Clean);
    service
        .revert(&reference, RevertRequest::new(name("s1")).save_current(name("nine")), go())
        .await
        .unwrap();
    assert_eq!(place.backend.world()[&place.image("a")].data, 1);
    let details = service.show(&reference, &name("s1")).await.unwrap();
    assert!(details.current);
    assert_eq!(details.children, [name("nine")]);
    assert_eq!(details.members[0].delete, Some(DeleteCost::new(512, 100)));
    assert_eq!(service.check(&reference).await.unwrap(), Vec::new());
    let request = DeleteRequest::new(vec![name("s1"), name("nine")]);
    let outcome = service.delete(&reference, request, go()).await.unwrap();
    assert_eq!(outcome.bytes_moved, 400);
    assert!(place.names(&reference).await.is_empty());
    assert!(!place.root().join("a.fake.domsnap").exists());
}

/// An unregistered domain is found for every spelling and order of its paths.
#[tokio::test]
async fn unregistered_domain_is_found_by_any_path() {
    let place = Place::new();
    place.create(&place.images(&["a", "b"]), "s1").await;
    std::fs::create_dir(place.root().join("sub")).unwrap();
    std::os::unix::fs::symlink(place.root(), place.root().join("link")).unwrap();
    for root in [place.root().join("sub/.."), place.root().join("link"), place.root().join(".")] {
        for order in [["a", "b"], ["b", "a"]] {
            let paths = order.map(|image| root.join(format!("{image}.fake")));
            assert_eq!(place.names(&DomainRef::images(paths).unwrap()).await, ["s1"]);
        }
    }
}

/// A part of a domain's images is refused, and links are resolved.
#[tokio::test]
async fn part_of_the_images_is_refused() {
    let place = Place::new();
    place.create(&place.images(&["a", "b"]), "s1").await;
    for images in [vec!["a"], vec!["b"], vec!["a", "c"], vec!["a", "b", "c"]] {
        let error = place.service().list(&place.images(&images)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused, "{images:?}");
        assert!(error.advice().unwrap().contains("b.fake"), "{error}");
    }
    std::os::unix::fs::symlink(place.image("c"), place.image("d")).unwrap();
    let listing = place.service().list(&place.images(&["d"])).await.unwrap();
    assert_eq!(listing.domain.disks[0].disk.path(), place.image("c"));
    std::os::unix::fs::symlink("nowhere", place.image("f")).unwrap();
    let error = place.service().list(&place.images(&["f"])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.message().contains("no such file"), "{error}");
    std::fs::hard_link(place.image("a"), place.image("e")).unwrap();
    let error = place.service().list(&place.images(&["e"])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.message().contains("is a layer of disk vda"), "{error}");
}

#[tokio::test]
async fn a_registered_domain_keeps_what_its_images_had() {
    let place = Place::new();
    place.create(&place.images(&["a", "b"]), "s1").await;
    let report = place.service().domain_add(&place.spec("web", &["a", "b"])).await.unwrap();
    assert_eq!(report.restored, [name("s1")]);
    assert_eq!(report.domain.disks[1].disk.target.as_str(), "xvdb");
    assert_eq!(place.names(&by_name("web")).await, ["s1"]);
    assert_eq!(place.names(&place.images(&["a", "b"])).await, ["s1"]);
    let domains = place.service().domains().await.unwrap();
    assert_eq!(domains.len(), 1);
    place.backend.write(&place.image("b"), 5);
    place.service().revert(&by_name("web"), RevertRequest::new(name("s1")), go()).await.unwrap();
    assert_eq!(place.backend.world()[&place.image("b")].data, 1);

    let again = place.service().domain_add(&place.spec("web", &["c"])).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Exists);
    let other = place.service().domain_add(&place.spec("other", &["a", "b"])).await.unwrap_err();
    assert_eq!(other.kind(), ErrorKind::Exists);
    let twice = place.service().domain_add(&place.spec("twice", &["c", "c"])).await.unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::Usage);
}

#[tokio::test]
async fn a_domain_that_was_removed_comes_back_by_import() {
    let place = Place::new();
    place.service().domain_add(&place.spec("web", &["a", "b"])).await.unwrap();
    place.create(&by_name("web"), "s1").await;
    place.create(&by_name("web"), "s2").await;
    let before = place.service().list(&by_name("web")).await.unwrap();
    let removal = place.service().domain_remove(&by_name("web")).await.unwrap();
    assert_eq!((removal.snapshots, removal.manifests), (2, place.root().join("a.fake.domsnap")));
    assert_eq!(place.service().list(&by_name("web")).await.unwrap_err().kind(), ErrorKind::NotFound);
    // One image is enough to import all that the manifests name.
    let report = place.service().import(&place.images(&["a"]), ImportOptions::default()).await.unwrap();
    assert_eq!(report.restored, [name("s1"), name("s2")]);
    let after = place.service().list(&by_name("web")).await.unwrap();
    assert_eq!((after.domain, after.snapshots), (before.domain, before.snapshots));
}

/// A lost catalogue is rebuilt, and missing snapshots are reported.
#[tokio::test]
async fn lost_catalogue_is_rebuilt() {
    let place = Place::new();
    let reference = place.images(&["a", "b"]);
    for snapshot in ["s1", "s2", "s3"] {
        place.create(&reference, snapshot).await;
    }
    let before = place.service().list(&reference).await.unwrap();
    place.lose_the_catalogue();
    place.backend.disks().get_mut(&place.image("b")).unwrap().tags.remove("s2");
    place.backend.disks().get_mut(&place.image("a")).unwrap().tags.insert("foreign".into(), 7);
    let manifest = place.root().join("a.fake.domsnap").join(format!("{}.json", before.snapshots[2].id));
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("\"s3\"", "\"s4\"")).unwrap();

    let report = place.service().import(&reference, ImportOptions::default()).await.unwrap();
    assert_eq!(report.restored, [name("s1")]);
    // The points of the damaged manifest and of the other tool come from the images themselves.
    assert_eq!(report.adopted, [name("foreign"), name("s2"), name("s3")]);
    assert!(report.notes.iter().any(|note| note.contains("checksum")), "{:?}", report.notes);
    assert!(
        report.notes.iter().any(|n| n.contains("s2") && n.contains("no internal snapshot")),
        "{:?}",
        report.notes
    );
    // Manifests that were left out are not read again, and kept.
    let aside = before.snapshots[1..].iter().map(|snapshot| format!("{}.json.left-out", snapshot.id));
    for file in aside {
        assert!(place.root().join("a.fake.domsnap").join(&file).exists(), "{file}");
    }
    let s3 = place.service().show(&reference, &name("s3")).await.unwrap();
    assert_eq!(s3.members.len(), 2);

    let error = place.service().import(&reference, ImportOptions::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.advice().unwrap().contains("--replace"), "{error}");
    let report = place.service().import(&reference, ImportOptions::default().replace()).await.unwrap();
    assert_eq!(report.restored.len(), 4);
    assert_eq!(place.service().check(&reference).await.unwrap(), Vec::new());
}

/// Tags of other tools are listed and used without an import.
#[tokio::test]
async fn foreign_tags_are_used_without_import() {
    let place = Place::new();
    place.backend.disks().get_mut(&place.image("a")).unwrap().tags.insert("theirs".into(), 7);
    let reference = place.images(&["a"]);
    assert_eq!(place.names(&reference).await, ["theirs"]);
    place.service().revert(&reference, RevertRequest::new(name("theirs")), go()).await.unwrap();
    assert_eq!(place.backend.world()[&place.image("a")].data, 7);
    place.service().delete(&reference, DeleteRequest::new(vec![name("theirs")]), go()).await.unwrap();
    assert!(place.backend.world()[&place.image("a")].tags.is_empty());
}

/// A second user of a domain gets the error that it is busy.
#[tokio::test]
async fn second_user_of_a_domain_gets_busy() {
    let place = Place::new();
    let reference = place.images(&["a"]);
    place.create(&reference, "s0").await;
    place.backend.applies.set(vec![Fault { number: 1, when: When::Before, how: How::Stop }]);
    let (first, request) = (place.service(), CreateRequest::new(name("s1")));
    let second_reference = reference.clone();
    let running = tokio::spawn(async move { first.create(&second_reference, request, go()).await });
    place.backend.applies.stopped.notified().await;
    let error = place.service().create(&reference, CreateRequest::new(name("s2")), go()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.message().contains(&format!("process {}", std::process::id())), "{error}");
    // Reading works meanwhile, and reports the operation.
    let listing = place.service().list(&reference).await.unwrap();
    assert_eq!(listing.unfinished[0].state, OperationState::Preparing);
    running.abort();
}

/// The next command recovers the operation of a killed process.
#[test]
fn next_command_recovers_a_killed_process() {
    for (number, end) in [(2, RecoveryEnd::Undone), (6, RecoveryEnd::Done)] {
        let mut place = Place::new();
        let reference = place.images(&["a", "b"]);
        place.backend.applies.set(vec![Fault { number, when: When::Before, how: How::Stop }]);
        // The runtime is dropped in the middle of the operation, as a kill of the process would do.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let (service, backend) = (place.service(), place.backend.clone());
        let stopped_reference = reference.clone();
        runtime.block_on(async move {
            tokio::select! {
                outcome = service.create(&stopped_reference, CreateRequest::new(name("s1")), go()) => panic!("{outcome:?}"),
                () = backend.applies.stopped.notified() => {}
            }
        });
        runtime.shutdown_background();
        place.backend = place.backend.after_a_crash();

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let error = place.service().plan(&reference, &Request::Tidy).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NeedsRecovery);
            let service = place.service();
            let mut events = service.events();
            let outcome = service.create(&reference, CreateRequest::new(name("s2")), go()).await.unwrap();
            assert_eq!(outcome.recovered[0].end, end);
            let mut recovered = false;
            while let Some(event) = events.try_next() {
                recovered |= matches!(event, Event::Recovered { .. });
            }
            assert!(recovered);
            let expected: &[&str] = if end == RecoveryEnd::Done { &["s1", "s2"] } else { &["s2"] };
            assert_eq!(place.names(&reference).await, expected);
            assert!(place.backend.world().values().all(|disk| disk.aside.is_empty()));
            assert_eq!(service.check(&reference).await.unwrap(), Vec::new());
        });
    }
}

/// Recover does deferred merges.
#[tokio::test]
async fn recover_does_deferred_merges() {
    let place = Place::new();
    let reference = place.images(&["a", "b"]);
    place.create(&reference, "s1").await;
    place.backend.applies.set(vec![Fault { number: 1, when: When::Before, how: How::Fail(ErrorKind::Io) }]);
    let outcome =
        place.service().delete(&reference, DeleteRequest::new(vec![name("s1")]), go()).await.unwrap();
    assert_eq!(outcome.postponed.len(), 1);
    assert!(place.backend.world()[&place.image("a")].tags.contains_key("s1"));
    place.backend.applies.set(Vec::new());
    let reports = place.service().recover(Some(&reference), go()).await.unwrap();
    assert_eq!((reports.len(), reports[0].operation.as_str()), (1, "tidy"));
    assert!(place.backend.world().values().all(|disk| disk.tags.is_empty()));
    assert_eq!(place.service().recover(None, go()).await.unwrap(), Vec::new());
}

#[tokio::test]
async fn a_dropped_call_is_undone() {
    let place = Place::new();
    let reference = place.images(&["a"]);
    place.create(&reference, "s0").await;
    let service = place.service();
    let mut events = service.events();
    let mut create = Box::pin(service.create(&reference, CreateRequest::new(name("s1")), go()));
    // Polled once: the operation's own task runs, and the call is dropped.
    let polled = std::future::poll_fn(|context| std::task::Poll::Ready(create.as_mut().poll(context))).await;
    assert!(polled.is_pending());
    drop(create);
    // The lock is free again when the operation has ended, with success or not.
    loop {
        match place.service().create(&reference, CreateRequest::new(name("s2")), go()).await {
            Ok(_) => break,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Busy, "{error}"),
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(place.names(&reference).await, ["s0", "s2"]);
    while let Some(event) = events.try_next() {
        assert!(!matches!(event, Event::Committed { .. }));
    }
}

#[tokio::test]
async fn a_damaged_or_newer_catalogue_says_what_to_do() {
    let place = Place::new();
    let reference = place.images(&["a"]);
    place.create(&reference, "s1").await;
    let database = place.state().join("catalogue.db");
    let connection = rusqlite::Connection::open(&database).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    connection.close().unwrap();
    for outcome in [
        place.service().list(&reference).await.map(|_| ()),
        place.service().create(&reference, CreateRequest::new(name("s2")), go()).await.map(|_| ()),
    ] {
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.message().contains("version 99"), "{error}");
    }
    for file in ["catalogue.db-wal", "catalogue.db-shm"] {
        let _ = std::fs::remove_file(place.state().join(file));
    }
    std::fs::write(
        &database,
        "this is not a database, and longer than a header of one hundred bytes is, to be sure of it..",
    )
    .unwrap();
    let error = place.service().list(&reference).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.advice().unwrap().contains("domsnap import"), "{error}");
}

#[tokio::test]
async fn a_default_name_is_free() {
    let place = Place::new();
    let reference = place.images(&["a"]);
    let first = place.service().default_name(&reference).await.unwrap();
    place.create(&reference, first.as_str()).await;
    let second = place.service().default_name(&reference).await.unwrap();
    assert_ne!(first, second);
    place.create(&reference, second.as_str()).await;
}

#[test]
fn domain_strings_are_names_or_image_paths() {
    assert_eq!(DomainRef::parse("web").unwrap(), DomainRef::Name(DomainName::new("web").unwrap()));
    let images = DomainRef::parse("/vm/a.qcow2,/vm/b.qcow2").unwrap();
    assert_eq!(images.to_string(), "/vm/a.qcow2,/vm/b.qcow2");
    for bad in ["", "a b", "/vm/a,", ",", "/vm/a,/vm/a"] {
        assert_eq!(DomainRef::parse(bad).unwrap_err().kind(), ErrorKind::Usage, "{bad:?}");
    }
}

/// A format has one backend, and the error for an unknown format lists the known ones.
#[test]
fn format_has_one_backend() {
    let mut registry = Registry::new();
    assert_eq!(registry.default_format().unwrap_err().kind(), ErrorKind::NotFound);
    registry.register(Arc::new(FakeBackend::default())).unwrap();
    assert_eq!(registry.default_format().unwrap(), "fake");
    assert_eq!(registry.register(Arc::new(FakeBackend::default())).unwrap_err().kind(), ErrorKind::Exists);
    let error = registry.get("vhd").err().unwrap();
    assert_eq!((error.kind(), error.advice()), (ErrorKind::NotFound, Some("the formats known are: fake")));
}
