//! The shape of each operation's plan, on two disks: at rest, under a hypervisor that reverts in place, and
//! under one that creates the domain again. The journal's rows of each are read back as the same plan.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use backend_qcow2::Qcow2;
use backend_qcow2::image::{self, Backing, Image, NewImage, NewSnapshot, OpenOptions};
use camino::{Utf8Path, Utf8PathBuf};
use catalogue_sqlite::SqliteCatalogue;
use image_files::chain::ChainStep;
use image_files::layer_name::{layer_name, layer_path};
use snapcore::backend::*;
use snapcore::catalogue::{Catalogue, Change, Revision};
use snapcore::hypervisor::*;
use snapcore::service::*;
use snapcore::*;
use tokio_util::sync::CancellationToken;

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
    _directory: tempfile::TempDir,
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
            disks.push(DiskRecord::new(disk, active.clone()).owned(vec![frozen, active]));
        }
        let snapshot = |name: &str, point: fn(&DiskRecord) -> Point| {
            Snapshot::new(
                SnapshotName::new(name).unwrap(),
                jiff::Timestamp::UNIX_EPOCH,
                disks
                    .iter()
                    .map(|record| DiskPoint::new(record.disk.target.clone(), point(record), 1 << 20))
                    .collect(),
            )
            .consistency(Consistency::Clean)
        };
        let mut first = snapshot("s1", |record| Point::external(record.owned[0].clone()));
        first.memory = Some(MemoryPoint::new(root.join("m"), 1, true));
        let tree = SnapshotTree::new(vec![
            first,
            snapshot("tag", |record| Point::internal(record.owned[0].clone(), "tag")),
            snapshot("active", |record| Point::internal(record.owned[1].clone(), "active")),
        ]);
        let domain = Domain::new(DomainName::new("web").unwrap(), disks)
            .hypervisor(Hypervisor::new("fake").unwrap())
            .control(Some(Control::at("web")));
        Self { _directory: directory, domain, tree }
    }

    /// Plans a request; returns one line for each step of the plan. What is nested is behind `>`.
    async fn shape(&self, under: Under, request: Request) -> Vec<String> {
        let state = tempfile::tempdir().unwrap();
        let state = Utf8Path::from_path(state.path()).unwrap();
        let catalogue = SqliteCatalogue::new(state.join("state"));
        let snapshots = self.tree.iter().cloned().collect();
        let put = vec![Change::PutDomain(Box::new(self.domain.clone()), snapshots)];
        catalogue.commit(&self.domain.name, Revision::ABSENT, put).await.unwrap();
        let mut registry = Registry::new();
        registry.register(Arc::new(Qcow2::new())).unwrap();
        registry.register_hypervisor(Arc::new(Fake(under)));
        let service = Domsnap::new(Arc::new(catalogue), registry);
        let plan = service.plan(&DomainRef::Name(self.domain.name.clone()), &request).await.unwrap();
        assert_eq!(read_back(&plan), plan);
        let json = serde_json::to_value(&plan).unwrap();
        assert_eq!(serde_json::from_value::<Plan>(json).unwrap(), plan);
        plan.steps().map(line).collect()
    }
}

/// A hypervisor that has the images of its domain open, unless that is at rest. Nothing is ever done.
struct Fake(Under);

fn nothing_is_done<T>() -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, "plans are made here, and none is carried out"))
}

#[async_trait]
impl VmStateSaver for Fake {
    fn profile(&self) -> HypervisorProfile {
        let profile = HypervisorProfile::new(Hypervisor::named("fake"), "Fake", "NAME");
        if self.0 == Under::Recreating { profile.recreates() } else { profile }
    }

    fn read_control(&self, control: Control, _: &Utf8Path) -> Result<Control> {
        Ok(control)
    }

    async fn connect(&self, domain: &Domain) -> Result<Option<Arc<dyn LiveDomain>>> {
        let seen = DomainInfo::new(serde_json::json!({}), true);
        let disks = domain.disks.iter().map(|record| {
            let path = record.disk.path();
            let layers = record.owned.iter().map(|layer| layer_path(path, layer)).chain([path.to_owned()]);
            let files = layers.map(|file| file_identity(&file.metadata().unwrap()));
            (record.disk.target.clone(), Attached(files.collect()))
        });
        let live = (self.0 != Under::Rest).then(|| Live { seen, disks: disks.collect() });
        Ok(live.map(|live| Arc::new(live) as Arc<dyn LiveDomain>))
    }

    async fn look(&self, _: &Control) -> Result<DomainInfo> {
        nothing_is_done()
    }

    async fn scan(&self) -> Result<Vec<(Control, DomainInfo)>> {
        Ok(Vec::new())
    }

    async fn check_memory(&self, _: &DiskAddress, _: &dyn Progress) -> Result<()> {
        nothing_is_done()
    }

    async fn start(&self, _: StartFromMemory<'_>) -> Result<StepOutcome> {
        nothing_is_done()
    }

    async fn remove_memory(&self, _: &DiskAddress) -> Result<()> {
        nothing_is_done()
    }
}

struct Live {
    seen: DomainInfo,
    disks: Vec<(Target, Attached)>,
}

#[async_trait]
impl LiveDomain for Live {
    fn seen(&self) -> &DomainInfo {
        &self.seen
    }

    fn processes(&self) -> Vec<u32> {
        vec![std::process::id()]
    }

    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk> {
        self.disks.iter().find(|(name, _)| name == target).map(|(_, disk)| disk as &dyn AttachedDisk)
    }

    fn differences(&self, _: &serde_json::Value) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    async fn resume(&self) -> Result<()> {
        nothing_is_done()
    }

    fn limit(&self, _: u64) {}

    async fn apply(&self, _: &DomainStep, _: DomainContext<'_>) -> Result<StepOutcome> {
        nothing_is_done()
    }

    async fn undo(&self, _: &DomainStep, _: DomainContext<'_>) -> Result<()> {
        nothing_is_done()
    }

    async fn clean_up(&self, _: &[OpenChain]) -> Result<Vec<String>> {
        nothing_is_done()
    }
}

/// The files of a disk that are open.
struct Attached(HashSet<FileIdentity>);

#[async_trait]
impl AttachedDisk for Attached {
    async fn open_files(&self) -> Result<HashSet<FileIdentity>> {
        Ok(self.0.clone())
    }

    async fn merge(
        &self,
        _: &AttachedMerge,
        _: &dyn Inside,
        _: &dyn Progress,
        _: &CancellationToken,
    ) -> Result<()> {
        nothing_is_done()
    }

    async fn drop_internal(&self, _: &[String]) -> Result<()> {
        nothing_is_done()
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
    read.commit(plan.commit.clone()).notes(plan.notes.clone())
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
