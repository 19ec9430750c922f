//! The shape of each operation's plan, on two disks: at rest, under a hypervisor that reverts in place, and
//! under one that creates the domain again. The journal's rows of each are read back as the same plan.

use std::path::Path;
use std::sync::Arc;

use backend_qcow2::Qcow2;
use backend_qcow2::image::{self, Backing, Image, NewImage, NewSnapshot, OpenOptions};
use camino::Utf8PathBuf;
use image_files::chain::ChainStep;
use image_files::layer_name::{layer_name, layer_path};
use snapcore::plan::{DiskInput, RunningDomain, plan};
use snapcore::*;

/// The domain's hypervisor.
#[derive(Clone, Copy, PartialEq)]
enum Under {
    Rest,
    InPlace,
    Recreating,
}

/// Two disks, each with a frozen layer under the active one, a tag in each layer, and these snapshots: `s1`,
/// the frozen layers, with memory; `tag`, the tags in them; `active`, the tags in the active layers.
struct Fixture {
    directory: tempfile::TempDir,
    domain: Domain,
    tree: SnapshotTree,
}

impl Fixture {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
        let mut disks = Vec::new();
        for target in ["vda", "vdb"] {
            let path = root.join(format!("{target}.qcow2"));
            let [frozen, active] = [1, 2].map(|stamp| layer_name(&path, stamp));
            let [lower, upper] = [&frozen, &active].map(|layer| layer_path(&path, layer));
            image::create(lower.as_std_path(), &NewImage::new(1 << 20)).unwrap();
            let on = Backing { file: frozen.to_string(), format: Some("qcow2".to_owned()) };
            image::create(upper.as_std_path(), &NewImage::new(1 << 20).on(on)).unwrap();
            tag(lower.as_std_path(), "tag");
            tag(upper.as_std_path(), "active");
            std::fs::hard_link(&upper, &path).unwrap();
            let disk = Disk::new(Target::new(target).unwrap(), path, "qcow2");
            disks.push(DiskRecord { disk, active: active.clone(), owned: vec![frozen, active] });
        }
        let snapshot = |name: &str, point: fn(&DiskRecord) -> Point| Snapshot {
            id: SnapshotId::fresh(),
            name: SnapshotName::new(name).unwrap(),
            parent: None,
            created: jiff::Timestamp::UNIX_EPOCH,
            description: String::new(),
            consistency: Consistency::Clean,
            disks: disks
                .iter()
                .map(|record| DiskPoint::new(record.disk.target.clone(), point(record), 1 << 20))
                .collect(),
            memory: None,
            machine: None,
            skipped: Vec::new(),
        };
        let mut first = snapshot("s1", |record| Point::external(record.owned[0].clone()));
        first.memory = Some(MemoryPoint { file: root.join("m"), bytes: 1, full: None, running: true });
        let tree = SnapshotTree::new(vec![
            first,
            snapshot("tag", |record| Point::internal(record.owned[0].clone(), "tag")),
            snapshot("active", |record| Point::internal(record.owned[1].clone(), "active")),
        ]);
        let domain = Domain {
            name: DomainName::new("web").unwrap(),
            unregistered: false,
            hypervisor: Hypervisor::new("fake").unwrap(),
            host: None,
            control: None,
            active_path: ActivePath::Keep,
            disks,
            current: None,
            machines: Vec::new(),
        };
        Self { directory, domain, tree }
    }

    /// Plans a request; returns one line for each step of the plan. What is nested is behind `>`.
    async fn shape(&self, under: Under, request: Request) -> Vec<String> {
        let mut disks = Vec::new();
        for record in &self.domain.disks {
            let backend = Qcow2::new();
            let mut state = backend.inspect(record, InspectDepth::Dependents, None).await.unwrap();
            state.attached = under != Under::Rest;
            disks.push(DiskInput {
                record: record.clone(),
                state,
                backend: AnyDiskSnapshotter::of(Arc::new(backend)),
            });
        }
        let seen = DomainInfo::new(serde_json::json!({}), true);
        let profile = HypervisorProfile::new(self.domain.hypervisor.clone(), "Fake", "NAME");
        let running = RunningDomain {
            profile: if under == Under::Recreating { profile.recreates() } else { profile },
            seen: &seen,
            differs: Vec::new(),
            media: Vec::new(),
            memory_dir: Utf8PathBuf::from_path_buf(self.directory.path().to_owned()).unwrap(),
            cannot_save_memory: None,
            cannot_detach: None,
        };
        let alive = (under != Under::Rest).then_some(&running);
        let plan = plan(&self.domain, &self.tree, &disks, alive, &request).await.unwrap();
        assert_eq!(read_back(&plan), plan);
        let json = serde_json::to_value(&plan).unwrap();
        assert_eq!(serde_json::from_value::<Plan>(json).unwrap(), plan);
        plan.steps().map(line).collect()
    }
}

fn tag(file: &Path, name: &str) {
    let mut image = Image::open(file, &OpenOptions::read_write()).unwrap();
    image.create_snapshot(&NewSnapshot::new(name, 1, 0)).unwrap();
}

/// The plan as a journal stores and reads it.
fn read_back(plan: &Plan) -> Plan {
    let mut read = Plan::new(plan.operation.clone(), plan.snapshots.clone());
    for row in plan.rows().unwrap() {
        read.push_row(row).unwrap();
    }
    Plan { commit: plan.commit.clone(), notes: plan.notes.clone(), ..read }
}

fn line(placed: PlacedStep<'_>) -> String {
    let action = match placed.step {
        StepRef::Domain(step) => format!("{:?}", step.action),
        StepRef::Disk(step) => {
            format!("{:?}", serde_json::from_value::<ChainStep>(step.action.clone()).unwrap())
        }
    };
    let variant = action.split([' ', '{']).next().unwrap();
    let group = format!("{:?}", placed.group).to_lowercase();
    let nested = if placed.nested { "> " } else { "" };
    let deferrable = if placed.deferrable { " (deferrable)" } else { "" };
    format!("{group} {nested}{} {variant}{deferrable}", placed.subject())
}

fn create(kind: PointKind) -> CreateRequest {
    CreateRequest::new(SnapshotName::new("new").unwrap()).kind(kind)
}

fn revert(name: &str) -> RevertRequest {
    RevertRequest::new(SnapshotName::new(name).unwrap())
}

fn delete(names: &[&str]) -> Request {
    let names = names.iter().map(|name| SnapshotName::new(*name).unwrap());
    Request::Delete(DeleteRequest::new(names.collect()))
}

/// At rest the steps of the disks are all: nothing is nested, and nothing is the domain's.
#[tokio::test(flavor = "multi_thread")]
async fn plans_at_rest_have_disk_steps_alone() {
    let fixture = Fixture::new().await;
    let external = fixture.shape(Under::Rest, Request::Create(create(PointKind::External))).await;
    assert_eq!(
        external,
        [
            "prepare vda CreateOverlay",
            "prepare vdb CreateOverlay",
            "cut vda SwitchActive",
            "cut vdb SwitchActive"
        ]
    );
    let internal = fixture.shape(Under::Rest, Request::Create(create(PointKind::Internal))).await;
    assert_eq!(internal, ["cut vda TakeInternal", "cut vdb TakeInternal"]);
    let in_place = fixture.shape(Under::Rest, Request::Revert(revert("active"))).await;
    assert_eq!(
        in_place,
        [
            "prepare vda TakeInternal",
            "prepare vdb TakeInternal",
            "cut vda ApplyInternal",
            "cut vdb ApplyInternal",
            "finish vda DropInternal",
            "finish vdb DropInternal",
        ]
    );
    let delete = fixture.shape(Under::Rest, delete(&["s1"])).await;
    assert_eq!(delete, ["finish domain RemoveMemory"], "the tags need the layers");
}

/// The path moves nested in the cut; memory is saved after it, and the names follow the commit.
#[tokio::test(flavor = "multi_thread")]
async fn creates_nest_the_paths_in_the_cut() {
    let fixture = Fixture::new().await;
    for under in [Under::InPlace, Under::Recreating] {
        let request = create(PointKind::External).then(PowerAfter::Off);
        let external = fixture.shape(under, Request::Create(request)).await;
        assert_eq!(
            external,
            [
                "prepare vda CreateOverlay",
                "prepare vdb CreateOverlay",
                "cut domain Instant",
                "cut > vda SwitchActive",
                "cut > vdb SwitchActive",
                "cut domain SaveMemory",
                "finish domain ReopenByName",
                "finish domain Continue",
            ]
        );
        let internal = fixture.shape(under, Request::Create(create(PointKind::Internal).memory(false))).await;
        assert_eq!(internal, ["cut domain Instant"]);
    }
}

/// A revert changes the disks between the two ends of a detached section, before the commit point. The guest
/// continues after it, before what is left is removed; a domain that ends does so after that.
#[tokio::test(flavor = "multi_thread")]
async fn reverts_change_disks_in_a_detached_section() {
    let fixture = Fixture::new().await;
    for under in [Under::InPlace, Under::Recreating] {
        let memory = fixture.shape(under, Request::Revert(revert("s1"))).await;
        assert_eq!(
            memory,
            [
                "prepare domain CheckMemory",
                "prepare vda CreateOverlay",
                "prepare vdb CreateOverlay",
                "cut domain Detach",
                "cut vda SwitchActive",
                "cut vdb SwitchActive",
                "cut domain Attach",
                "finish domain Continue",
            ]
        );
        let off = fixture.shape(under, Request::Revert(revert("active").power(PowerAfter::Off))).await;
        assert_eq!(
            off,
            [
                "cut domain Detach",
                "cut vda TakeInternal",
                "cut vda ApplyInternal",
                "cut vdb TakeInternal",
                "cut vdb ApplyInternal",
                "cut domain Attach",
                "finish vda DropInternal",
                "finish vdb DropInternal",
                "finish domain Continue",
            ]
        );
    }
}

/// A delete has finish steps alone. Merges of the active layer have the path's move nested in them. Tags of
/// frozen layers wait for a detached section, which comes before all else.
#[tokio::test(flavor = "multi_thread")]
async fn deletes_have_finish_steps_alone() {
    let fixture = Fixture::new().await;
    let tags = fixture.shape(Under::InPlace, delete(&["tag"])).await;
    assert_eq!(
        tags,
        [
            "finish domain Detach",
            "finish vda DropInternal",
            "finish vdb DropInternal",
            "finish domain Attach",
            "finish domain Continue",
        ]
    );
    let all = fixture.shape(Under::InPlace, delete(&["s1", "active"])).await;
    assert_eq!(
        all,
        [
            "finish vda DropInternal",
            "finish vda Merge (deferrable)",
            "finish > vda SwitchActive",
            "finish vda Remove",
            "finish vdb DropInternal",
            "finish vdb Merge (deferrable)",
            "finish > vdb SwitchActive",
            "finish vdb Remove",
            "finish domain RemoveMemory",
        ]
    );
}
