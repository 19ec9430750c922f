//! Tests of declared capabilities: the planner refuses requests that a backend declares it cannot do, before
//! anything is done.

use camino::Utf8PathBuf;

use super::{DiskInput, RunningDomain, plan};
use crate::backend::*;
use crate::fake::{FakeBackend, FakeDisk};
use crate::hypervisor::*;
use crate::service::*;
use crate::*;

/// Plans `requests` for a running domain of one disk, with a backend that declares `can`.
async fn planned(can: Capabilities, requests: &[Request]) -> Vec<Result<Plan>> {
    let mut backend = FakeBackend::default();
    backend.declared = Some(can);
    let path = Utf8PathBuf::from("/disks/root.fake");
    backend.disks().insert(path.clone(), FakeDisk { data: 1, ..FakeDisk::default() });
    let disk = Disk::new(Target::new("vda").unwrap(), path, "fake");
    let record = backend.adopt(&disk, ActivePath::Keep).await.unwrap();
    let state = backend.inspect(&record, InspectDepth::Layers, None).await.unwrap();
    let found = Snapshot {
        id: SnapshotId::fresh(),
        name: SnapshotName::new("s1").unwrap(),
        parent: None,
        created: jiff::Timestamp::UNIX_EPOCH,
        description: String::new(),
        consistency: Consistency::Clean,
        disks: vec![DiskPoint::new(disk.target.clone(), Point::internal(record.active.clone(), "s1"), 4096)],
        memory: None,
        machine: None,
        skipped: Vec::new(),
        role: SnapshotRole::Snapshot,
        holds: Vec::new(),
        deferred: false,
        expires: None,
        policy: None,
        group: None,
    };
    backend.disks().get_mut(disk.path()).unwrap().tags.insert("s1".into(), 1);
    let domain = Domain {
        name: DomainName::new("web").unwrap(),
        unregistered: false,
        hypervisor: Hypervisor::new("fake").unwrap(),
        host: None,
        control: None,
        active_path: ActivePath::Keep,
        disks: vec![record.clone()],
        current: Some(found.id),
        machines: Vec::new(),
        policy: None,
    };
    let seen = DomainInfo::new(serde_json::json!({}), true);
    let alive = RunningDomain {
        profile: HypervisorProfile::new(domain.hypervisor.clone(), "Fake", "NAME"),
        seen: &seen,
        differs: Vec::new(),
        media: Vec::new(),
        memory: Some(std::sync::Arc::new(crate::hypervisor::MemoryDirectory::new("/disks"))),
        cannot_save_memory: None,
        cannot_detach: None,
    };
    let disks = [DiskInput { record, state, backend: AnyDiskSnapshotter::of(std::sync::Arc::new(backend)) }];
    let tree = SnapshotTree::new(vec![found]);
    let mut plans = Vec::new();
    for request in requests {
        plans.push(plan(&domain, &tree, &disks, Some(&alive), None, request).await);
    }
    plans
}

fn requests() -> Vec<Request> {
    let name = |text: &str| SnapshotName::new(text).unwrap();
    vec![
        Request::Create(CreateRequest::new(name("s2")).memory(false)),
        Request::Revert(RevertRequest::new(name("s1"))),
        Request::Delete(DeleteRequest::new(vec![name("s1")])),
    ]
}

/// A backend of disks at rest changes nothing while a guest runs.
#[tokio::test]
async fn backend_at_rest_is_refused_for_a_guest() {
    let at_rest = planned(Capabilities::new(PointKind::Internal, 1), &requests()).await;
    for refused in at_rest {
        let error = refused.expect_err("its points would be of another instant");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("cannot be changed while domain web runs"), "{error}");
    }
    for plan in planned(Capabilities::new(PointKind::Internal, 1).live(), &requests()).await {
        plan.expect("a backend that declares live disks serves them");
    }
    let tidied = planned(Capabilities::new(PointKind::Internal, 1), &[Request::Tidy]).await;
    let tidied = tidied.into_iter().next().unwrap().expect("what has to wait for the domain's end waits");
    assert!(tidied.steps().all(|placed| placed.subject() != "vda"));
}
