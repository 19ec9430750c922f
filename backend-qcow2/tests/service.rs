//! The backend under the service: histories of a domain of two disks, with qemu-io as the guest and qemu-img
//! as judge.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use camino::Utf8PathBuf;
use catalogue_sqlite::SqliteCatalogue;
use snapcore::service::{CreateDisk, CreateRequest, DeleteRequest, DomainRef, Domsnap, RevertRequest};
use snapcore::{PointKind, Registry, SnapshotName, Target};
use tokio_util::sync::CancellationToken;

struct Fixture {
    directory: tempfile::TempDir,
    service: Domsnap,
    domain: DomainRef,
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} must be installed (package qemu-utils): {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).unwrap()
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disks = ["a.qcow2", "b.qcow2"].map(|file| directory.path().join(file));
        for disk in &disks {
            run("qemu-img", &["create", "-q", "-f", "qcow2", disk.to_str().unwrap(), "8M"]);
        }
        let mut registry = Registry::new();
        backend_qcow2::register(&mut registry).unwrap();
        let state = Utf8PathBuf::from_path_buf(directory.path().join("state")).unwrap();
        let service = Domsnap::new(Arc::new(SqliteCatalogue::new(state)), registry);
        let paths: Vec<&str> = disks.iter().map(|disk| disk.to_str().unwrap()).collect();
        let domain = DomainRef::parse(&paths.join(",")).unwrap();
        Self { directory, service, domain }
    }

    fn path(&self, file: &str) -> String {
        self.directory.path().join(file).to_str().unwrap().to_owned()
    }

    fn write(&self, byte: u8) {
        for file in ["a.qcow2", "b.qcow2"] {
            let command = format!("write -P {byte} 1M 1M");
            run("qemu-io", &["-f", "qcow2", "-c", &command, &self.path(file)]);
        }
    }

    fn shows(&self, byte: u8) {
        for file in ["a.qcow2", "b.qcow2"] {
            let command = format!("read -P {byte} 1M 1M");
            let said = run("qemu-io", &["-r", "-f", "qcow2", "-c", &command, &self.path(file)]);
            assert!(!said.contains("failed"), "{file} does not show {byte}: {said}");
        }
    }

    fn images_are_clean(&self) {
        for entry in std::fs::read_dir(self.directory.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "qcow2") {
                run("qemu-img", &["check", "-q", path.to_str().unwrap()]);
            }
        }
    }

    async fn create(&self, request: CreateRequest) {
        self.service.create(&self.domain, request, CancellationToken::new()).await.unwrap();
        self.images_are_clean();
    }

    async fn revert(&self, to: &str) {
        self.service
            .revert(&self.domain, RevertRequest::new(name(to)), CancellationToken::new())
            .await
            .unwrap();
        self.images_are_clean();
    }

    async fn delete(&self, names: &[&str]) {
        let names = names.iter().map(|text| name(text)).collect();
        self.service.delete(&self.domain, DeleteRequest::new(names), CancellationToken::new()).await.unwrap();
        self.images_are_clean();
    }

    fn layers(&self) -> usize {
        let count = |path: &Path| path.to_string_lossy().contains(".ds-");
        std::fs::read_dir(self.directory.path())
            .unwrap()
            .filter(|entry| count(&entry.as_ref().unwrap().path()))
            .count()
    }
}

/// A mixed tree keeps every point, and ends as one file for each disk.
#[tokio::test(flavor = "multi_thread")]
async fn mixed_tree_keeps_points_and_ends_as_one_file() {
    let fixture = Fixture::new();
    fixture.write(1);
    fixture.create(CreateRequest::new(name("internal")).kind(PointKind::Internal)).await;
    fixture.write(2);
    fixture.create(CreateRequest::new(name("external")).kind(PointKind::External)).await;
    fixture.write(3);
    let mixed = CreateRequest::new(name("mixed"))
        .disk(Target::new("vda").unwrap(), CreateDisk::Take(PointKind::Internal, None))
        .disk(Target::new("vdb").unwrap(), CreateDisk::Take(PointKind::External, None));
    fixture.create(mixed).await;
    fixture.write(4);
    for (to, byte) in
        [("internal", 1), ("mixed", 3), ("external", 2), ("internal", 1), ("external", 2), ("mixed", 3)]
    {
        fixture.revert(to).await;
        fixture.shows(byte);
        fixture.write(9);
    }
    fixture.delete(&["external"]).await;
    fixture.shows(9);
    for (to, byte) in [("internal", 1), ("mixed", 3)] {
        fixture.revert(to).await;
        fixture.shows(byte);
    }
    fixture.delete(&["internal", "mixed"]).await;
    fixture.shows(3);
    assert_eq!(fixture.layers(), 0, "one file a disk, as in the beginning");
}
