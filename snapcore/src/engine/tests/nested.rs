//! Tests of steps that are nested in a step of the domain: those of several disks run side by side, and a
//! failure of one takes all back.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use camino::Utf8PathBuf;
use tokio::sync::Barrier;
use tokio_util::sync::CancellationToken;

use crate::backend::*;
use crate::catalogue::{Catalogue, Change, Entry, Revision};
use crate::engine::{Engine, Run};
use crate::event::Events;
use crate::fake::{Action, FakeBackend, FakeCatalogue, FakeDisk, Fault, How, When};
use crate::hypervisor::*;
use crate::manifest::{ManifestDirectory, ManifestStore};
use crate::*;

/// A running domain whose cut does nothing but to run what is nested in it.
struct FakeLive {
    seen: DomainInfo,
    /// The time of the last pause.
    pause: Arc<Mutex<Duration>>,
}

#[async_trait]
impl LiveDomain for FakeLive {
    fn seen(&self) -> &DomainInfo {
        &self.seen
    }

    fn disk(&self, _: &Target) -> Option<&dyn AttachedDisk> {
        None
    }

    fn differences(&self, _: &serde_json::Value) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    async fn resume(&self) -> Result<()> {
        Ok(())
    }

    fn limit(&self, _: u64) {}

    async fn apply(&self, _: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome> {
        let begun = Instant::now();
        context.inside.run(None).await?;
        *self.pause.lock().unwrap() = begun.elapsed();
        Ok(StepOutcome::default())
    }

    async fn undo(&self, _: &DomainStep, context: DomainContext<'_>) -> Result<()> {
        context.inside.run(None).await
    }

    async fn clean_up(&self, _: &[OpenChain]) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

/// Carries out a plan whose cut has a step of each of three disks nested in it.
async fn run(backend: &FakeBackend) -> (Result<Run>, Entry) {
    run_on(backend, &DISKS).await
}

/// Carries out a plan whose cut has a step of each disk nested in it.
async fn run_on(backend: &FakeBackend, disks: &[&str]) -> (Result<Run>, Entry) {
    let directory = tempfile::tempdir().unwrap();
    let root = Utf8PathBuf::from_path_buf(directory.path().to_path_buf()).unwrap();
    let mut records = Vec::new();
    for &target in disks {
        let path = root.join(format!("{target}.fake"));
        backend.disks().insert(path.clone(), FakeDisk { data: 1, ..FakeDisk::default() });
        let disk = Disk::new(Target::new(target).unwrap(), path, "fake");
        records.push(backend.adopt(&disk, ActivePath::Keep).await.unwrap());
    }
    let domain = Domain {
        name: DomainName::new("web").unwrap(),
        unregistered: false,
        hypervisor: Hypervisor::NONE,
        host: None,
        control: None,
        active_path: ActivePath::Keep,
        disks: records,
        current: None,
        machines: Vec::new(),
        policy: None,
    };
    let catalogue = FakeCatalogue::default();
    let put = vec![Change::PutDomain(Box::new(domain.clone()), Vec::new())];
    catalogue.commit(&domain.name, Revision::ABSENT, put).await.unwrap();
    let nested = disks.iter().map(|target| Step {
        target: Target::new(*target).unwrap(),
        action: serde_json::to_value(Action::Tag { name: "s1".to_owned() }).unwrap(),
        summary: format!("tag {target}"),
        bytes: 0,
    });
    let cut = DomainStep::Instant {
        disks: Vec::new(),
        running: true,
        memory: None,
        quiesce: Quiesce::No,
        quiesce_limit_ms: 0,
        then: None,
        for_revert: false,
    };
    let plan = Plan {
        cut: vec![CutUnit::Domain {
            step: HypervisorStep { action: cut, summary: "cut".to_owned() },
            nested: nested.collect(),
        }],
        ..Plan::new("create", vec![SnapshotName::new("s1").unwrap()])
    };
    let seen = DomainInfo::new(serde_json::json!({}), true);
    let mut registry = Registry::new();
    registry.register(Arc::new(backend.clone())).unwrap();
    let manifests: Arc<dyn ManifestStore> = Arc::new(ManifestDirectory::new(root.join("vda.fake.domsnap")));
    let live = FakeLive { seen, pause: Arc::clone(&backend.pause) };
    let engine = Engine {
        catalogue: &catalogue,
        registry: &registry,
        events: &Events::default(),
        manifests: &manifests,
        live: Some(&live),
        watched: None,
        seat: None,
    };
    let mut entry = catalogue.load(&domain.name).await.unwrap().unwrap();
    let cancel = CancellationToken::new();
    let ran = engine.run(&mut entry, plan, Vec::new(), &cancel);
    let ran = tokio::time::timeout(Duration::from_secs(20), ran).await.expect("no disk waits for another");
    assert!(catalogue.unfinished(&domain.name).await.unwrap().is_empty());
    (ran, entry)
}

/// Nested steps of several disks run at once: each waits here until all have begun.
#[tokio::test]
async fn nested_steps_of_disks_run_side_by_side() {
    let mut backend = FakeBackend::default();
    backend.meeting = Some(Arc::new(Barrier::new(DISKS.len())));
    let (ran, _) = run(&backend).await;
    assert!(ran.unwrap().happened);
    assert!(backend.world().values().all(|disk| disk.tags.contains_key("s1")));
}

/// The guest is paused for the slowest disk, not for the sum of all: with steps of 50 ms, those of 1, 2, 4
/// and 8 disks are all under way at once. The pauses are printed; they depend on the machine.
#[tokio::test]
async fn pause_does_not_grow_with_disks() {
    let all = ["vda", "vdb", "vdc", "vdd", "vde", "vdf", "vdg", "vdh"];
    let mut of_one = Duration::ZERO;
    for count in [1, 2, 4, 8] {
        let mut backend = FakeBackend::default();
        backend.slow = Some(Duration::from_millis(50));
        let (ran, _) = run_on(&backend, &all[..count]).await;
        assert!(ran.unwrap().happened);
        let (pause, together) = (*backend.pause.lock().unwrap(), backend.under_way.most());
        of_one = if count == 1 { pause } else { of_one };
        let ratio = pause.as_secs_f64() / of_one.as_secs_f64();
        println!("{count} disks: a pause of {pause:.1?}, {ratio:.2} of one disk's; {together} steps at once");
        assert_eq!(together, count, "steps wait for each other");
    }
}

/// If the step of one disk fails, those of the others end first and are taken back with it.
#[tokio::test]
async fn failed_nested_step_takes_all_back() {
    for number in 1..=DISKS.len() {
        for when in [When::Before, When::After] {
            let backend = FakeBackend::default();
            backend.applies.set(vec![Fault { number, when, how: How::Fail(ErrorKind::Io) }]);
            let (ran, entry) = run(&backend).await;
            let error = ran.expect_err("one disk failed");
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
            assert!(backend.world().values().all(|disk| disk.tags.is_empty()), "fault {number}, {when:?}");
            assert_eq!(entry.tree.iter().count(), 0);
        }
    }
}
