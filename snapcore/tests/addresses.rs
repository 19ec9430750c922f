//! Tests of disks that are no files: rows of a table in memory, at addresses that only their backend reads.
//! All features of a domain of files work with them, and no local file is made or read.

mod fake;
#[path = "fake/running.rs"]
mod running;

use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use catalogue_sqlite::SqliteCatalogue;
use fake::{FakeBackend, FakeDisk, Fault, How, When};
use running::RowMachine;
use snapcore::backend::Capabilities;
use snapcore::hypervisor::Control;
use snapcore::service::*;
use snapcore::service::{ImportOptions, RecoveryEnd};
use snapcore::*;
use tokio_util::sync::CancellationToken;

/// A table with the rows `web/root` and `web/data`, and a state directory. The current directory has none of
/// their files.
struct Table {
    directory: tempfile::TempDir,
    backend: FakeBackend,
}

impl Table {
    fn new() -> Self {
        let backend = FakeBackend::of_rows();
        for row in ["table:web/root", "table:web/data"] {
            backend.disks().insert(row.into(), FakeDisk { data: 1, ..FakeDisk::default() });
        }
        Self { directory: tempfile::tempdir().unwrap(), backend }
    }

    fn root(&self) -> &Utf8Path {
        Utf8Path::from_path(self.directory.path()).unwrap()
    }

    fn service(&self) -> Domsnap {
        self.service_with(None)
    }

    fn service_with(&self, machine: Option<&RowMachine>) -> Domsnap {
        let mut registry = Registry::new();
        if let Some(machine) = machine {
            registry.register_hypervisor(Arc::new(machine.clone()));
        }
        registry.register(Arc::new(self.backend.clone())).unwrap();
        Domsnap::new(Arc::new(SqliteCatalogue::new(self.root().join("state"))), registry)
    }

    fn spec(&self, addresses: &[&str]) -> DomainSpec {
        let targets = ["vda", "vdb"].into_iter().map(|target| Target::new(target).unwrap());
        let spec = DomainSpec::new(DomainName::new("web").unwrap());
        targets.zip(addresses).fold(spec, |spec, (target, address)| spec.disk(target, *address, "table"))
    }

    async fn add(&self) -> DomainRef {
        let report =
            self.service().domain_add(&self.spec(&["table:WEB/root", "table:web/data"])).await.unwrap();
        assert_eq!(report.notes, Vec::<String>::new());
        DomainRef::parse("web").unwrap()
    }

    async fn create(&self, domain: &DomainRef, snapshot: &str) {
        self.service().create(domain, CreateRequest::new(name(snapshot)), go()).await.unwrap();
    }

    fn write(&self, data: u64) {
        for row in self.backend.disks().values_mut() {
            row.data = data;
        }
    }

    fn data(&self) -> Vec<u64> {
        self.backend.disks().values().map(|row| row.data).collect()
    }

    async fn names(&self, domain: &DomainRef) -> Vec<String> {
        let listing = self.service().list(domain).await.unwrap();
        listing.snapshots.iter().map(|snapshot| snapshot.name.to_string()).collect()
    }

    /// Checks that only the catalogue was made, here or in the current directory.
    fn assert_no_file(&self) {
        let made: Vec<_> =
            std::fs::read_dir(self.root()).unwrap().map(|file| file.unwrap().file_name()).collect();
        assert_eq!(made, ["state"]);
        assert!(!Utf8PathBuf::from("table:web").exists() && !Utf8PathBuf::from("web").exists());
    }
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

fn go() -> CancellationToken {
    CancellationToken::new()
}

/// A domain of rows is registered, and its snapshots are taken, listed, reverted to, checked and deleted.
#[tokio::test]
async fn a_domain_of_rows_lives_without_a_file() {
    let table = Table::new();
    let web = table.add().await;
    table.create(&web, "s1").await;
    table.write(2);
    table.create(&web, "s2").await;
    assert_eq!(table.names(&web).await, ["s1", "s2"]);
    let shown = table.service().show(&web, &name("s1")).await.unwrap();
    assert_eq!(shown.members[0].address, "table:web/root".into());
    table.service().revert(&web, RevertRequest::new(name("s1")), go()).await.unwrap();
    assert_eq!(table.data(), [1, 1]);
    assert_eq!(table.service().check(&web).await.unwrap(), Vec::new());
    assert_eq!(table.service().domains().await.unwrap()[0].missing, Vec::new());
    table.service().delete(&web, DeleteRequest::new(vec![name("s1"), name("s2")]), go()).await.unwrap();
    assert_eq!(table.names(&web).await, Vec::<String>::new());
    assert!(table.backend.rows.as_ref().unwrap().is_empty());
    assert!(table.backend.disks().values().all(|row| row.tags.is_empty()));
    table.assert_no_file();
}

/// Recover undoes or finishes the operation of a killed process.
#[test]
fn a_killed_operation_on_rows_is_recovered() {
    for (number, end, names) in [(3, RecoveryEnd::Undone, &["s1"][..]), (6, RecoveryEnd::Done, &["s1", "s2"])]
    {
        let mut table = Table::new();
        let started = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let runtime = started();
        let web = runtime.block_on(async {
            let web = table.add().await;
            table.create(&web, "s1").await;
            web
        });
        table.backend.applies.set(vec![Fault { number, when: When::Before, how: How::Stop }]);
        // The runtime is dropped in the middle of the operation, as a kill of the process would do.
        let (service, backend, stopped) = (table.service(), table.backend.clone(), web.clone());
        runtime.block_on(async move {
            tokio::select! {
                outcome = service.create(&stopped, CreateRequest::new(name("s2")), go()) => panic!("{outcome:?}"),
                () = backend.applies.stopped.notified() => {}
            }
        });
        runtime.shutdown_background();
        table.backend = table.backend.after_a_crash();
        started().block_on(async {
            let reports = table.service().recover(Some(&web), go()).await.unwrap();
            assert_eq!(reports.iter().map(|report| report.end).collect::<Vec<_>>(), [end]);
            assert_eq!(table.names(&web).await, names);
            assert_eq!(table.service().check(&web).await.unwrap(), Vec::new());
        });
        assert!(
            table.backend.disks().values().all(|row| row.aside.is_empty() && row.tags.len() == names.len())
        );
        table.assert_no_file();
    }
}

/// A domain runs on rows, and its hypervisor knows them by their names. Its disks are snapshotted at an
/// instant, reverted in a detached section, and only memory needs a directory.
#[tokio::test]
async fn a_running_domain_of_rows_has_snapshots() {
    let mut table = Table::new();
    table.backend.declared = Some(Capabilities::new(PointKind::Internal, 1).live());
    let machine = RowMachine::new(&[("vda", "table:web/root"), ("vdb", "table:web/data")]);
    let service = table.service_with(Some(&machine));
    let spec = table.spec(&["table:web/root", "table:web/data"]);
    service.domain_add(&spec.run_by(RowMachine::NAME, Control::at("web"))).await.unwrap();
    let web = DomainRef::parse("web").unwrap();
    let memory = service.create(&web, CreateRequest::new(name("s0")), go()).await.unwrap_err();
    assert_eq!(memory.kind(), ErrorKind::Refused);
    assert!(memory.to_string().contains("has no directory for memory images"), "{memory}");
    service.create(&web, CreateRequest::new(name("s1")).memory(false), go()).await.unwrap();
    let taken = table.backend.applied.lock().unwrap().clone();
    assert!(taken.iter().filter(|step| step.starts_with("Tag")).count() == 2, "{taken:?}");
    table.write(2);
    service.revert(&web, RevertRequest::new(name("s1")), go()).await.unwrap();
    assert_eq!(table.data(), [1, 1]);
    assert!(machine.is_running());
    // The domain has another row than its record.
    let other = RowMachine::new(&[("vda", "table:web/root"), ("vdb", "table:web/other")]);
    let request = CreateRequest::new(name("s2")).memory(false);
    let drifted = table.service_with(Some(&other)).create(&web, request, go()).await.unwrap_err();
    assert_eq!(drifted.kind(), ErrorKind::Refused);
    assert!(drifted.to_string().contains("has another image open"), "{drifted}");
    table.assert_no_file();
}

/// The manifests of a table restore its domain after the catalogue is lost, from one address.
#[tokio::test]
async fn a_lost_catalogue_is_rebuilt_from_rows() {
    let table = Table::new();
    let web = table.add().await;
    table.create(&web, "s1").await;
    std::fs::remove_dir_all(table.root().join("state")).unwrap();
    let by_address = DomainRef::parse("table:WEB/root").unwrap();
    let report = table.service().import(&by_address, ImportOptions::default()).await.unwrap();
    assert_eq!((report.domain.name.as_str(), report.domain.disks.len()), ("web", 2));
    assert_eq!(table.names(&web).await, ["s1"]);
    table.assert_no_file();
}

/// One row under two spellings is one disk, and an address without a row is refused by its backend.
#[tokio::test]
async fn rows_are_known_by_their_identities() {
    let table = Table::new();
    let twice =
        table.service().domain_add(&table.spec(&["table:web/root", "table:Web/Root"])).await.unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::Usage);
    let absent = table.service().domain_add(&table.spec(&["table:web/none"])).await.unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::NotFound);
    let web = table.add().await;
    let again = Disk::new(Target::new("vdc").unwrap(), "table:WEB/data", "table");
    assert_eq!(table.service().disk_add(&web, again).await.unwrap_err().kind(), ErrorKind::Refused);
    table.service().disk_remove(&web, &Target::new("vdb").unwrap()).await.unwrap();
    assert_eq!(table.service().resolve(&web).await.unwrap().disks.len(), 1);
    table.assert_no_file();
}
