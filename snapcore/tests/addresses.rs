//! Tests of disks and memory images that are no files: rows of tables in memory, at addresses that only their
//! backend and their hypervisor read. All features of a domain of files work with them, and no local file is
//! made or read.

mod fake;
#[path = "fake/running.rs"]
mod running;

use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use catalogue_sqlite::SqliteCatalogue;
use fake::{FakeBackend, FakeDisk, Fault, How, When};
use running::{MEMORY_BYTES, MemoryRow, RowMachine};
use snapcore::backend::Capabilities;
use snapcore::hypervisor::Control;
use snapcore::service::*;
use snapcore::service::{ImportOptions, RecoveryEnd};
use snapcore::*;
use tokio_util::sync::CancellationToken;

/// The disks of the machine that runs on rows.
const ROWS: [(&str, &str); 2] = [("vda", "table:web/root"), ("vdb", "table:web/data")];

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

    /// A table whose backend takes snapshots while the domain runs.
    fn running() -> Self {
        let mut table = Self::new();
        table.backend.declared = Some(Capabilities::new(PointKind::Internal, 1).live());
        table
    }

    /// Registers the domain that a machine runs.
    async fn add_running(&self, machine: &RowMachine, memory_dir: Option<&str>) -> DomainRef {
        let control = Control::at("web").memory_dir(memory_dir.map(Into::into));
        let spec = self.spec(&ROWS.map(|(_, address)| address)).run_by(RowMachine::NAME, control);
        self.service_with(Some(machine)).domain_add(&spec).await.unwrap();
        DomainRef::parse("web").unwrap()
    }

    /// Makes the guest write the same number to its disks and its memory.
    fn write_all(&self, machine: &RowMachine, number: u64) {
        self.write(number);
        machine.write(number);
    }

    /// Checks that memory and disks are of one instant, and that the guest runs.
    fn assert_all_are(&self, machine: &RowMachine, number: u64) {
        assert_eq!((self.data(), machine.guest()), (vec![number; 2], number));
        assert!(machine.exists() && machine.is_running() && machine.is_attached());
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
        runtime.shutdown_timeout(std::time::Duration::from_secs(60));
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
    let machine = RowMachine::without_table(&ROWS);
    let service = table.service_with(Some(&machine));
    let web = table.add_running(&machine, None).await;
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
    let other = RowMachine::without_table(&[ROWS[0], ("vdb", "table:web/other")]);
    let request = CreateRequest::new(name("s2")).memory(false);
    let drifted = table.service_with(Some(&other)).create(&web, request, go()).await.unwrap_err();
    assert_eq!(drifted.kind(), ErrorKind::Refused);
    assert!(drifted.to_string().contains("has another image open"), "{drifted}");
    table.assert_no_file();
}

/// A domain of rows has snapshots with memory in rows. Each is listed with its address and size. After a
/// revert, also of a domain that is off, the guest goes on in its memory and on its disks. A delete leaves no
/// row.
#[tokio::test]
async fn memory_in_rows_is_saved_restored_and_removed() {
    let table = Table::running();
    let machine = RowMachine::new(&ROWS);
    let (service, web) = (table.service_with(Some(&machine)), table.add_running(&machine, None).await);
    for number in [1, 2] {
        table.write_all(&machine, number);
        let outcome =
            service.create(&web, CreateRequest::new(name(&format!("s{number}"))), go()).await.unwrap();
        assert_eq!(outcome.notes, Vec::<String>::new());
    }
    assert_eq!(machine.table().places, ["ram:web", "ram:web"]);
    let listed = service.list(&web).await.unwrap().snapshots;
    for (snapshot, number) in listed.iter().zip([1, 2]) {
        let memory = snapshot.memory.as_ref().unwrap();
        assert_eq!(memory.image, format!("ram:web/{}", snapshot.id).into());
        assert_eq!(
            (memory.bytes, memory.running, snapshot.consistency),
            (MEMORY_BYTES, true, Consistency::Memory)
        );
        let row = MemoryRow { number, whole: true };
        assert_eq!(machine.table().images.get(&memory.image), Some(&row));
        let shown = service.show(&web, &snapshot.name).await.unwrap();
        assert!(!shown.memory_gone && shown.snapshot == *snapshot);
    }
    for number in [1, 2] {
        table.write_all(&machine, 9);
        let to = name(&format!("s{number}"));
        service.revert(&web, RevertRequest::new(to.clone()), go()).await.unwrap();
        table.assert_all_are(&machine, number);
        machine.end();
        table.write(8);
        service.revert(&web, RevertRequest::new(to), go()).await.unwrap();
        table.assert_all_are(&machine, number);
    }
    service.delete(&web, DeleteRequest::new(vec![name("s1")]), go()).await.unwrap();
    assert_eq!(
        machine.table().images.keys().collect::<Vec<_>>(),
        [&listed[1].memory.as_ref().unwrap().image]
    );
    // Another user removes its row. That is shown; a revert is refused before anything, and a delete is not.
    machine.table().images.clear();
    assert!(service.show(&web, &name("s2")).await.unwrap().memory_gone);
    let error = service.revert(&web, RevertRequest::new(name("s2")), go()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    table.assert_all_are(&machine, 2);
    service.delete(&web, DeleteRequest::new(vec![name("s2")]), go()).await.unwrap();
    assert!(table.names(&web).await.is_empty() && table.backend.rows.as_ref().unwrap().is_empty());
    table.assert_no_file();
}

/// The user can name another place of memory images, in the form of the hypervisor. A full place, a place
/// that the hypervisor does not have, and images that it does not read are refused before anything.
#[tokio::test]
async fn place_of_memory_is_read_by_the_hypervisor() {
    let table = Table::running();
    let machine = RowMachine::new(&ROWS);
    let (service, web) =
        (table.service_with(Some(&machine)), table.add_running(&machine, Some("ram:POOL")).await);
    machine.table().is_full = true;
    let full = service.create(&web, CreateRequest::new(name("s1")), go()).await.unwrap_err();
    assert_eq!((full.kind(), full.state_now()), (ErrorKind::NoSpace, Some("no changes made")), "{full}");
    assert!(machine.table().images.is_empty() && machine.table().places.is_empty() && machine.is_running());
    machine.table().is_full = false;
    service.create(&web, CreateRequest::new(name("s1")), go()).await.unwrap();
    assert_eq!(machine.table().places, ["ram:pool"]);
    assert!(machine.table().images.keys().all(|image| image.as_str().starts_with("ram:pool/")));
    // A hypervisor of files does not read it: nothing is changed, and no row is forgotten.
    let files = RowMachine::without_table(&ROWS);
    let other = table.service_with(Some(&files));
    for error in [
        other.revert(&web, RevertRequest::new(name("s1")), go()).await.unwrap_err(),
        other.delete(&web, DeleteRequest::new(vec![name("s1")]), go()).await.unwrap_err(),
        other.create(&web, CreateRequest::new(name("s2")), go()).await.unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("ram:pool"), "{error}");
    }
    assert_eq!(table.names(&web).await, ["s1"]);
    assert_eq!(machine.table().images.len(), 1);
    assert!(files.is_running());
    service.delete(&web, DeleteRequest::new(vec![name("s1")]), go()).await.unwrap();
    assert!(machine.table().images.is_empty());
    table.assert_no_file();
}

/// Recover undoes or finishes each operation with memory in rows, wherever its process was killed: then there
/// is one whole memory image for each snapshot, memory and disks are of one instant, and each snapshot can be
/// reverted to.
#[test]
fn a_killed_operation_with_memory_in_rows_is_recovered() {
    for operation in ["create", "revert", "keeping revert", "delete"] {
        let mut ends = Vec::new();
        for of_disk in [false, true] {
            for (number, when) in (1..).flat_map(|number| [(number, When::Before), (number, When::After)]) {
                let Some(end) = killed(operation, of_disk, number, when) else { break };
                ends.push(end);
            }
        }
        // A delete is only carried through; every other operation has steps on both sides of its commit.
        let undone = ends.iter().filter(|end| **end == RecoveryEnd::Undone).count();
        assert_eq!(undone == 0, operation == "delete", "{operation}: {ends:?}");
        assert!(ends.len() > undone, "{operation}: {ends:?}");
    }
}

/// Kills an operation at a step of the hypervisor, or of a disk; `None` if it has fewer steps.
fn killed(operation: &str, of_disk: bool, number: usize, when: When) -> Option<RecoveryEnd> {
    let context = format!("{operation}, killed {when:?} step {number}, of a disk: {of_disk}");
    let mut table = Table::running();
    let machine = RowMachine::new(&ROWS);
    let started = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let runtime = started();
    let web = runtime.block_on(async {
        let web = table.add_running(&machine, None).await;
        for number in [1, 2] {
            table.write_all(&machine, number);
            let request = CreateRequest::new(name(&format!("s{number}")));
            table.service_with(Some(&machine)).create(&web, request, go()).await.unwrap();
        }
        table.write_all(&machine, 3);
        web
    });
    let stops = if of_disk { table.backend.applies.clone() } else { machine.steps.clone() };
    stops.set(vec![Fault { number, when, how: How::Stop }]);
    let (service, stopped) = (table.service_with(Some(&machine)), web.clone());
    let done = runtime.block_on(async move {
        let operation = async {
            match operation {
                "create" => service.create(&stopped, CreateRequest::new(name("s3")), go()).await.map(drop),
                // Two operations: the state before the revert is kept by the first.
                "keeping revert" => {
                    let revert = RevertRequest::new(name("s1")).keep(KeepPrevious::Memory);
                    service.revert(&stopped, revert, go()).await.map(drop)
                }
                "revert" => service.revert(&stopped, RevertRequest::new(name("s1")), go()).await.map(drop),
                _ => service.delete(&stopped, DeleteRequest::new(vec![name("s1")]), go()).await.map(drop),
            }
        };
        tokio::select! {
            ended = operation => { ended.unwrap(); true }
            () = stops.stopped.notified() => false,
        }
    });
    runtime.shutdown_timeout(std::time::Duration::from_secs(60));
    if done {
        return None;
    }
    table.backend = table.backend.after_a_crash();
    let machine = machine.after_a_crash();
    let end = started().block_on(async {
        let service = table.service_with(Some(&machine));
        let reports = service.recover(Some(&web), go()).await.unwrap();
        assert!(machine.is_running() && machine.is_attached(), "{context}");
        let now = machine.guest();
        let end = match (operation, &reports[..]) {
            ("keeping revert", _) if now == 1 => RecoveryEnd::Done,
            ("keeping revert", _) => RecoveryEnd::Undone,
            (_, [report]) => report.end,
            _ => panic!("{context}: {reports:?}"),
        };
        assert!(now == 3 || operation.ends_with("revert") && now == 1, "{context}: {now}");
        table.assert_all_are(&machine, now);
        let Listing { snapshots, previous, .. } = service.list(&web).await.unwrap();
        assert_eq!(
            previous.is_some(),
            operation == "keeping revert" && end == RecoveryEnd::Done,
            "{context}"
        );
        let images: Vec<DiskAddress> =
            snapshots.iter().map(|snapshot| snapshot.memory.as_ref().unwrap().image.clone()).collect();
        let mut left: Vec<DiskAddress> = machine.table().images.keys().cloned().collect();
        left.retain(|image| previous.is_none() || images.contains(image));
        assert_eq!(left, images, "{context}");
        assert!(machine.table().images.values().all(|row| row.whole), "{context}");
        assert_eq!(service.check(&web).await.unwrap(), Vec::new(), "{context}");
        for snapshot in snapshots {
            let number = snapshot.name.as_str()[1..].parse().unwrap();
            service.revert(&web, RevertRequest::new(snapshot.name), go()).await.unwrap();
            table.assert_all_are(&machine, number);
        }
        end
    });
    assert!(table.backend.disks().values().all(|row| row.aside.is_empty()), "{context}");
    table.assert_no_file();
    Some(end)
}

/// A domain of rows is restored from its manifests with its memory. A row of memory in another place than the
/// domain's is a manifest's claim, and only the user can confirm it.
#[tokio::test]
async fn memory_rows_of_a_lost_catalogue_are_restored() {
    let table = Table::running();
    let machine = RowMachine::new(&ROWS);
    let (service, web) = (table.service_with(Some(&machine)), table.add_running(&machine, None).await);
    table.write_all(&machine, 1);
    service.create(&web, CreateRequest::new(name("s1")), go()).await.unwrap();
    let image = machine.table().images.keys().next().unwrap().clone();
    let by_address = DomainRef::parse("table:web/root").unwrap();
    let lose = || std::fs::remove_dir_all(table.root().join("state")).unwrap();
    lose();
    let service = table.service_with(Some(&machine));
    service.import(&by_address, ImportOptions::default().trust()).await.unwrap();
    let listed = service.list(&web).await.unwrap().snapshots;
    assert_eq!(listed[0].memory.as_ref().unwrap().image, image);
    table.write_all(&machine, 2);
    service.revert(&web, RevertRequest::new(name("s1")), go()).await.unwrap();
    table.assert_all_are(&machine, 1);
    // The manifest names another domain's row.
    let stolen = DiskAddress::from("ram:other/secret");
    machine.table().images.insert(stolen.clone(), MemoryRow { number: 7, whole: true });
    table.backend.rows.as_ref().unwrap().change_snapshots(|snapshot| {
        snapshot.memory.as_mut().unwrap().image = stolen.clone();
    });
    lose();
    let service = table.service_with(Some(&machine));
    let refused = service.import(&by_address, ImportOptions::default()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
    assert!(refused.to_string().contains("ram:other/secret"), "{refused}");
    assert_eq!(machine.guest(), 1);
    service.import(&by_address, ImportOptions::default().trust()).await.unwrap();
    service.revert(&web, RevertRequest::new(name("s1")), go()).await.unwrap();
    assert_eq!(machine.guest(), 7);
    table.assert_no_file();
}

/// A hypervisor that has a row open for another domain says so by the row's identity.
#[tokio::test]
async fn rows_open_without_a_lock_are_refused() {
    let table = Table::new();
    let web = table.add().await;
    let mut machine = RowMachine::new(&ROWS);
    machine.other_user = Some("neighbour".to_owned());
    let busy = table.service_with(Some(&machine)).create(&web, CreateRequest::new(name("s1")), go()).await;
    let busy = busy.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
    assert!(busy.to_string().contains(" is open in neighbour, which rows runs"), "{busy}");
    assert!(table.names(&web).await.is_empty());
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

/// Records of memory images in files, and of layers and media, have the same JSON as before images had
/// addresses: catalogues, journals and manifests of an older domsnap are read.
#[test]
fn records_of_files_keep_their_form() {
    use serde_json::json;
    use snapcore::hypervisor::{DomainStep, Medium, MemoryPlan, PowerAfter, Restart, RestartSource};

    fn is<T>(value: &T, record: serde_json::Value)
    where
        T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        assert_eq!(serde_json::to_value(value).unwrap(), record);
        assert_eq!(serde_json::from_value::<T>(record).unwrap(), *value);
    }

    let image = || DiskAddress::from("/vm/m");
    is(&MemoryPoint::new("/vm/m", 7, true), json!({ "file": "/vm/m", "bytes": 7, "running": true }));
    is(&MemoryPlan::new("/vm/m", true, 5), json!({ "file": "/vm/m", "live": true, "budget_ms": 5 }));
    is(&DomainStep::CheckMemory { image: image() }, json!({ "do": "check-memory", "file": "/vm/m" }));
    is(&DomainStep::RemoveMemory { image: image() }, json!({ "do": "remove-memory", "file": "/vm/m" }));
    is(
        &DomainStep::SaveMemory { image: image(), tag: "s".to_owned(), compress: 3 },
        json!({ "do": "save-memory", "file": "/vm/m", "tag": "s", "compress": 3 }),
    );
    is(
        &DomainStep::Continue { memory: Some(image()), reset: false, power: Some(PowerAfter::Running) },
        json!({ "do": "continue", "memory": "/vm/m", "reset": false, "power": "running" }),
    );
    is(
        &Restart::new(RestartSource::Memory(image()), true),
        json!({ "from": { "memory": "/vm/m" }, "safety": true, "recreated": false }),
    );
    is(
        &Medium::new("ide1", "raw").address(Some("/vm/cd".into())),
        json!({ "drive": "ide1", "file": "/vm/cd", "format": "raw" }),
    );
    is(
        &Control::at("a").memory_dir(Some("/vm/memory".into())),
        json!({ "address": "a", "memory-dir": "/vm/memory" }),
    );
}
