//! The commands of lvm2 that the backend runs, against a recorded report of a real group.

use std::sync::{Arc, Mutex};

use backend_lvm::{Answer, Invocation, Lvm, Runner};
use snapcore::backend::{
    AnyDiskSnapshotter, DiskPlan, DiskRequest, DiskSnapshotter, DiskState, Finding, InspectDepth, Progress,
    Salvage, StepContext, StepStatus,
};
use snapcore::hypervisor::DiskInstant;
use snapcore::{ActivePath, Disk, DiskRecord, ErrorKind, LayerName, Point, SnapshotName, Step, Target};
use tokio_util::sync::CancellationToken;

const RECORDED: &str = include_str!("recorded/group.json");

/// Returns the recorded report, and records all other commands. Of these it does only `lvremove`.
struct Recorded {
    report: Mutex<String>,
    commands: Mutex<Vec<String>>,
    /// The command that fails.
    failing: Option<&'static str>,
}

impl Recorded {
    fn of(report: &str) -> Self {
        Self { report: Mutex::new(report.to_owned()), commands: Mutex::default(), failing: None }
    }

    fn commands(&self) -> Vec<String> {
        self.commands.lock().expect("no thread panicked").clone()
    }
}

impl Runner for Recorded {
    fn run(&self, invocation: &Invocation<'_>) -> snapcore::Result<Answer> {
        if invocation.args[0] != "lvs" {
            self.commands.lock().expect("no thread panicked").push(invocation.args.join(" "));
            let (status, stderr) = match self.failing {
                Some(failing) if invocation.args[0] == failing => (5, "it failed".to_owned()),
                _ => (0, String::new()),
            };
            if invocation.args[0] == "lvremove" && status == 0 {
                let mut report = self.report.lock().expect("no thread panicked");
                for removed in invocation.args.iter().filter_map(|arg| arg.strip_prefix("vg/")) {
                    *report = without(&report, removed);
                }
            }
            return Ok(Answer { status: Some(status), stdout: String::new(), stderr });
        }
        let stdout = self.report.lock().expect("no thread panicked").clone();
        Ok(Answer { status: Some(0), stdout, stderr: String::new() })
    }
}

struct Silent;

impl Progress for Silent {
    fn bytes(&self, _: u64, _: u64) {}
}

struct Fixture {
    backend: Arc<AnyDiskSnapshotter>,
    runner: Arc<Recorded>,
    record: DiskRecord,
    state: DiskState,
}

impl Fixture {
    async fn of(path: &str) -> Self {
        Self::with(path, RECORDED).await.expect("it is a disk")
    }

    async fn with(path: &str, report: &str) -> snapcore::Result<Self> {
        Self::by(path, Recorded::of(report)).await
    }

    async fn by(path: &str, runner: Recorded) -> snapcore::Result<Self> {
        let runner = Arc::new(runner);
        let backend = AnyDiskSnapshotter::of(Arc::new(Lvm::by(runner.clone())));
        let disk = Disk::new(Target::new("vda")?, path, "lvm");
        let record = backend.adopt(&disk, ActivePath::Keep).await?;
        let state = backend.inspect(&record, InspectDepth::Dependents, None).await?;
        Ok(Self { backend, runner, record, state })
    }

    async fn plan(&self, request: DiskRequest) -> snapcore::Result<DiskPlan> {
        self.backend.plan(&self.record, &self.state, ActivePath::Keep, &request).await
    }

    async fn status(&self, step: &Step) -> StepStatus {
        let cancel = CancellationToken::new();
        let context = StepContext::new(&self.record, &Silent, &cancel);
        self.backend.status(step, context).await.expect("a status")
    }

    async fn undo(&self, step: &Step) -> snapcore::Result<()> {
        let cancel = CancellationToken::new();
        self.backend.undo(step, StepContext::new(&self.record, &Silent, &cancel)).await
    }

    async fn salvage(&self, step: &Step) -> Salvage {
        let cancel = CancellationToken::new();
        let context = StepContext::new(&self.record, &Silent, &cancel);
        self.backend.salvage(step, true, context).await.expect("an answer")
    }

    async fn apply(&self, plan: &DiskPlan) -> snapcore::Result<Vec<String>> {
        let cancel = CancellationToken::new();
        for step in plan.steps() {
            let context = StepContext::new(&self.record, &Silent, &cancel);
            self.backend.apply(step, context).await?;
        }
        Ok(std::mem::take(&mut *self.runner.commands.lock().expect("no thread panicked")))
    }
}

/// The numbers of steps before the cut, in it, and after the commit point.
fn shape(plan: &DiskPlan) -> (usize, usize, usize) {
    (plan.prepare.len(), plan.cut.len(), plan.finish.len())
}

fn name(text: &str) -> SnapshotName {
    SnapshotName::new(text).expect("a name")
}

fn create() -> DiskRequest {
    DiskRequest::Create {
        kind: None,
        method: None,
        name: name("n"),
        overlay: None,
        keep: Vec::new(),
        stamp: 0xab,
    }
}

fn revert(layer: &str, save: Option<&str>) -> DiskRequest {
    DiskRequest::Revert {
        to: Point::external(LayerName(layer.into())),
        save: save.map(name),
        keep: Vec::new(),
        stamp: 0xab,
    }
}

#[tokio::test]
async fn a_thin_create_is_one_command_in_the_cut() {
    let fixture = Fixture::of("/dev/mapper/vg-thin").await;
    let plan = fixture.plan(create()).await.expect("a plan");
    assert_eq!(shape(&plan), (0, 1, 0));
    assert_eq!(plan.point, Some(Point::external(LayerName("thin.ds-000000ab".into()))));
    assert_eq!(plan.instant, None);
    assert_eq!(
        fixture.apply(&plan).await.expect("done"),
        ["lvcreate -q -y -s -n thin.ds-000000ab -ky --addtag domsnap --addtag domsnap.name=n \
          --addtag domsnap.parent=thin.ds-00000001 vg/thin"]
    );
}

/// A clone of a thin point is one thin snapshot of it, active and writable, with the operation's tag, by
/// which an undo knows it. Thick volumes, copies and names in use are refused.
#[tokio::test]
async fn thin_clone_is_one_command() {
    use snapcore::backend::{CloneDisk, ClonePlace};
    let ask = |name: &str, point: &str| {
        let place = ClonePlace::new(snapcore::DomainName::new(name).unwrap(), "/vm".into(), 0xab);
        CloneDisk::new(Point::external(LayerName(point.into())), vec![place], 0xab)
    };
    let fixture = Fixture::of("/dev/vg/thin").await;
    let plan_of = |request: CloneDisk| {
        let fixture = &fixture;
        async move { fixture.backend.plan_clone(&fixture.record, &fixture.state, &request).await }
    };
    let plan = plan_of(ask("web", "thin.ds-00000001")).await.expect("a plan");
    assert_eq!(plan.disks[0].disk.address.as_str(), "/dev/vg/web-vda");
    assert_eq!(shape(&plan.plan), (1, 0, 0));
    assert_eq!(
        fixture.apply(&plan.plan).await.expect("done"),
        ["lvcreate -q -y -s -kn -ay -prw -n web-vda --addtag domsnap --addtag domsnap.work=000000ab \
          vg/thin.ds-00000001"]
    );
    for (request, kind) in [
        (ask("web", "thin.ds-00000001").full(true), ErrorKind::Refused),
        (ask("web", "thin.ds-00000009"), ErrorKind::NotFound),
        (ask("web", "thin"), ErrorKind::NotFound),
        (ask("a:b", "thin.ds-00000001"), ErrorKind::Unsupported),
        (ask(&"x".repeat(120), "thin.ds-00000001"), ErrorKind::Refused),
    ] {
        assert_eq!(plan_of(request.clone()).await.expect_err("refused").kind(), kind, "{request:?}");
    }
    let thick = Fixture::of("/dev/vg/thick").await;
    let request = ask("web", "thick.ds-00000004");
    let error = thick.backend.plan_clone(&thick.record, &thick.state, &request).await.expect_err("thick");
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.advice().is_some_and(|advice| advice.contains("domsnap domain add")), "{error}");
}

#[tokio::test]
async fn a_thick_create_has_an_area_in_whole_extents() {
    let fixture = Fixture::of("/dev/vg/thick").await;
    let plan = fixture.plan(create()).await.expect("a plan");
    let commands = fixture.apply(&plan).await.expect("done");
    // 20 % of 32 MiB, and one extent more.
    assert!(
        commands.len() == 1 && commands[0].contains("-pr -L 12582912b") && commands[0].ends_with("vg/thick"),
        "{commands:?}"
    );
    assert!(
        plan.notes.iter().any(|note| note.contains("thick.ds-00000003") && note.contains("lost")),
        "{:?}",
        plan.notes
    );
}

/// A volume that a hypervisor has open is snapshotted inside its cut.
#[tokio::test]
async fn open_volume_is_snapshotted_inside_the_cut() {
    let mut fixture = Fixture::of("/dev/vg/thin").await;
    fixture.state.attached = true;
    let plan = fixture.plan(create()).await.expect("a plan");
    assert_eq!(shape(&plan), (0, 0, 0));
    let instant = plan.instant.expect("it takes the volume in the cut");
    assert_eq!((instant.take, instant.nested.len()), (DiskInstant::ByBackend, 1));
}

/// The volume that the domain writes is not a point to revert to.
#[tokio::test]
async fn current_volume_is_not_a_revert_target() {
    let fixture = Fixture::of("/dev/vg/thin").await;
    let error = fixture.plan(revert("thin", None)).await.expect_err("it is the current volume");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("no snapshot"), "{error}");
}

/// A thin revert prepares a volume and gives it the name.
#[tokio::test]
async fn thin_revert_prepares_and_renames() {
    let fixture = Fixture::with("/dev/vg/thin", &prepared()).await.expect("it is a disk");
    let plan = fixture.plan(revert("thin.ds-00000001", Some("kept"))).await.expect("a plan");
    assert_eq!(shape(&plan), (1, 2, 1));
    let commands = fixture.apply(&plan).await.expect("done");
    let begin = |index: usize, message: &str| assert!(commands[index].starts_with(message), "{commands:?}");
    begin(0, "lvcreate -q -y -s -kn -ay -prw -n thin.ds-000000ab-new");
    begin(1, "lvcreate -q -y -s -n thin.ds-000000ab -ky");
    begin(2, "lvrename -q -y vg thin thin.ds-000000ab-old");
    begin(3, "lvrename -q -y vg thin.ds-000000ab-new thin");
    assert_eq!(commands.len(), 4, "the recording has no previous volume to remove: {commands:?}");
}

#[tokio::test]
async fn thick_revert_saves_the_state_before_the_merge() {
    let fixture = Fixture::of("/dev/vg/thick").await;
    let plan = fixture.plan(revert("thick.ds-00000004", None)).await.expect("a plan");
    assert_eq!(shape(&plan), (0, 2, 1));
    assert!(plan.notes.iter().any(|note| note.contains("taken again")), "{:?}", plan.notes);
    assert_eq!(fixture.status(&plan.cut[1]).await, StepStatus::NotDone);
    // The recorded group still has the snapshot after the merge: this is an error, and not a success.
    let error = fixture.apply(&plan).await.expect_err("lvm did not do it");
    assert!(error.to_string().contains("did not merge"), "{error}");
    let commands = fixture.runner.commands.lock().expect("no thread panicked").clone();
    assert!(commands[0].starts_with("lvcreate -q -y -s -n thick.ds-000000ab-old -pr -L"), "{commands:?}");
    assert_eq!(commands[1], "lvconvert -q -y --interval 1 --merge vg/thick.ds-00000004");
}

#[tokio::test]
async fn a_snapshot_that_overflowed_is_refused() {
    let fixture = Fixture::of("/dev/vg/thick").await;
    let error = fixture.plan(revert("thick.ds-00000003", None)).await.expect_err("it is lost");
    assert_eq!(error.kind(), ErrorKind::Refused);
    let found = fixture.backend.check(&fixture.record, &fixture.state).await.expect("findings");
    assert!(
        found.iter().any(|found| found.subject == "vg/thick.ds-00000003" && found.message.contains("lost")),
        "{found:?}"
    );
}

/// Points are removed in one command, and those that are gone are skipped.
#[tokio::test]
async fn points_are_removed_in_one_command() {
    let fixture = Fixture::of("/dev/vg/thick").await;
    let drop = ["thick.ds-00000003", "thick.ds-00000004", "thick.ds-00000099"];
    let drop = drop.map(|layer| Point::external(LayerName(layer.into()))).to_vec();
    let plan =
        fixture.plan(DiskRequest::Delete { drop, keep: Vec::new(), force: false }).await.expect("a plan");
    assert_eq!(
        fixture.apply(&plan).await.expect("done"),
        ["lvremove -q -y vg/thick.ds-00000003 vg/thick.ds-00000004"]
    );
}

/// A volume with a scheduled merge and a full pool are refused.
#[tokio::test]
async fn scheduled_merge_and_full_pool_are_refused() {
    let fixture = Fixture::of("/dev/vg/other").await;
    let error = fixture.plan(create()).await.expect_err("a merge is scheduled");
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("next activation"), "{error}");
    let line = RECORDED.lines().find(|line| line.contains("\"lv_name\":\"tp\"")).expect("the pool");
    let (before, after) = line.split_once("\"data_percent\":\"").expect("how full it is");
    let (_, after) = after.split_once('"').expect("a number");
    let full = RECORDED.replace(line, &format!("{before}\"data_percent\":\"96.10\"{after}"));
    let fixture = Fixture::with("/dev/vg/thin", &full).await.expect("a disk");
    let error = fixture.plan(create()).await.expect_err("the pool is full");
    assert!(error.to_string().contains("96.10 %") && error.to_string().contains("95 %"), "{error}");
}

#[tokio::test]
async fn unknown_points_are_found_by_their_tags() {
    let mut fixture = Fixture::of("/dev/vg/thick").await;
    let found = fixture.backend.discover(&mut fixture.record, &[]).await.expect("snapshots");
    let names: Vec<&str> = found.iter().map(|snapshot| snapshot.name.as_str()).collect();
    assert_eq!(names, ["good"], "what overflowed is no snapshot any more");
    let known = [found[0].disks[0].point.clone()];
    assert!(fixture.backend.discover(&mut fixture.record, &known).await.expect("none").is_empty());
}

#[tokio::test]
async fn parts_and_snapshots_of_volumes_are_no_disks() {
    for (path, message) in [
        ("/dev/vg/tp", "thin pool"),
        ("/dev/vg/tp_tdata", "part of another"),
        ("/dev/vg/thick.ds-00000004", "thick snapshot"),
        ("/dev/vg/none", "no volume"),
        ("/dev/sda1", "no path of a logical volume"),
    ] {
        let error = Fixture::with(path, RECORDED).await.err().expect("refused");
        assert!(error.to_string().contains(message), "{path}: {error}");
    }
}

/// Returns the recorded report with another value in a field of one volume.
fn with_field(volume: &str, field: &str, value: &str) -> String {
    changed(RECORDED, volume, &[(field, value)])
}

/// Returns a report with other values in fields of one volume.
fn changed(report: &str, volume: &str, fields: &[(&str, &str)]) -> String {
    let line = line_of(report, volume);
    let mut new = line.to_owned();
    for (field, value) in fields {
        let start = format!("\"{field}\":\"");
        let (before, after) = new.split_once(&start).expect("the field");
        let (_, after) = after.split_once('"').expect("its end");
        new = format!("{before}{start}{value}\"{after}");
    }
    report.replace(line, &new)
}

fn line_of<'a>(report: &'a str, volume: &str) -> &'a str {
    let name = format!("\"lv_name\":\"{volume}\"");
    report.lines().find(|line| line.contains(&name)).expect("it is there")
}

/// Returns a report without a volume.
fn without(report: &str, volume: &str) -> String {
    report.replace(&format!("{}\n", line_of(report, volume)), "")
}

/// Returns a report with the unit of a thick snapshot's area, which the recording lacks.
fn with_chunk(report: &str, volume: &str, bytes: u32) -> String {
    let line = line_of(report, volume);
    let lock = "\"vg_lock_type\":\"\"";
    report.replace(line, &line.replace(lock, &format!("{lock}, \"chunk_size\":\"{bytes}\"")))
}

/// Returns the recorded report with the new volume of a thin revert with the tests' stamp.
fn prepared() -> String {
    RECORDED.replace("thin.ds-00000002-new", "thin.ds-000000ab-new")
}

/// Returns a report in which a thick snapshot is the plain volume that `lvcreate -s` commits first.
fn begun(report: &str, snapshot: &str, name: &str, tags: &str) -> String {
    let fields = [
        ("origin", ""),
        ("origin_size", ""),
        ("lv_role", "public"),
        ("data_percent", ""),
        ("lv_snapshot_invalid", "-1"),
        ("lv_name", name),
        ("lv_tags", tags),
    ];
    changed(report, snapshot, &fields)
}

/// Returns the recorded report in the middle of a thick revert with the tests' stamp, after its merge: with
/// the safety snapshot, and the point with these tags.
fn merged(safety: &[(&str, &str)], point: &str) -> String {
    let fields = [
        ("lv_snapshot_invalid", "0"),
        ("data_percent", "50.00"),
        ("lv_name", "thick.ds-000000ab-old"),
        ("lv_tags", "domsnap,domsnap.work=000000ab"),
    ];
    let report = changed(RECORDED, "thick.ds-00000004", &[("lv_tags", point)]);
    let report = changed(&report, "thick.ds-00000003", &fields);
    changed(&report, "thick.ds-000000ab-old", safety)
}

/// Tags of the point that a thick revert with the tests' stamp takes again.
const RETAKEN: &str = "domsnap,domsnap.name=good,domsnap.work=000000ab,domsnap.taken=1795428144";

/// Returns the steps of a thick revert with the tests' stamp: the safety snapshot, and the merge.
async fn thick_revert() -> (Step, Step) {
    let fixture = Fixture::of("/dev/vg/thick").await;
    let plan = fixture.plan(revert("thick.ds-00000004", None)).await.expect("a plan");
    (plan.cut[0].clone(), plan.cut[1].clone())
}

/// Kinds of volume whose snapshots are not known to be correct are refused by name when the disk is added.
#[tokio::test]
async fn volumes_of_other_kinds_are_refused_by_name() {
    for kind in [
        "cache",
        "writecache",
        "vdo",
        "mirror",
        "raid1",
        "raid5_ls",
        "raid6_zr",
        "raid10",
        "integrity",
        "error",
        "zero",
        "future-kind",
    ] {
        let error =
            Fixture::with("/dev/vg/thick", &with_field("thick", "segtype", kind)).await.err().expect(kind);
        let message = format!("of type {kind};");
        assert!(error.kind() == ErrorKind::Refused && error.to_string().contains(&message), "{error}");
        assert!(error.advice().is_some_and(|advice| advice.contains("format=raw")), "{error}");
        // A volume that was converted after it was added, in its second segment.
        let mut fixture = Fixture::of("/dev/vg/thick").await;
        let line = RECORDED.lines().find(|line| line.contains("\"lv_name\":\"thick\"")).expect("it is there");
        let second = line.replace("\"linear\"", &format!("\"{kind}\""));
        let report = RECORDED.replace(line, &format!("{line}\n{second}"));
        let runner = Arc::new(Recorded::of(&report));
        fixture.backend = AnyDiskSnapshotter::of(Arc::new(Lvm::by(runner.clone())));
        for request in [create(), revert("thick.ds-00000004", None)] {
            let error = fixture.plan(request).await.expect_err(kind);
            assert!(error.kind() == ErrorKind::Refused && error.to_string().contains(kind), "{error}");
        }
        assert!(runner.commands.lock().expect("no thread panicked").is_empty());
    }
    Fixture::with("/dev/vg/thick", &with_field("thick", "segtype", "striped")).await.expect("it is plain");
    let shared = RECORDED.replace("\"vg_lock_type\":\"\"", "\"vg_lock_type\":\"sanlock\"");
    let error = Fixture::with("/dev/vg/thin", &shared).await.err().expect("it is shared");
    assert!(error.to_string().contains("several machines share (lock type sanlock)"), "{error}");
}

/// A state in which lvm would fail in the middle, or a snapshot would be incomplete, is refused before
/// anything is changed.
#[tokio::test]
async fn volumes_in_the_wrong_state_are_refused() {
    let cases = [
        ("thin", "lv_permissions", "read-only", "is read-only", "lvchange -prw vg/thin"),
        (
            "thin",
            "lv_permissions",
            "read-only-override",
            "read-only on this machine",
            "read_only_volume_list",
        ),
        ("thin", "lv_permissions", "unknown", "could not determine", "lv_permissions"),
        ("thin", "lv_active", "", "not active", "lvchange -ay vg/thin"),
        ("thin", "lv_suspended", "1", "suspended", "--refresh"),
        ("thin", "lv_allocation_locked", "1", "pvmove", "pvmove --abort"),
        ("thin", "lv_health_status", "partial", "reports 'partial'", "lv_health_status"),
        ("tp", "lv_health_status", "metadata_read_only", "vg/tp is not healthy", "lvmthin(7)"),
        ("tp", "lv_check_needed", "1", "vg/tp needs a check", "repair"),
    ];
    for (row, field, value, message, advice) in cases {
        let fixture =
            Fixture::with("/dev/vg/thin", &with_field(row, field, value)).await.expect("it can be added");
        for request in [create(), revert("thin.ds-00000001", Some("kept"))] {
            let error = fixture.plan(request).await.expect_err(value);
            assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
            assert!(error.to_string().contains(message), "{field}={value}: {error}");
            assert!(error.advice().is_some_and(|given| given.contains(advice)), "{field}={value}: {error}");
        }
        assert!(fixture.runner.commands.lock().expect("no thread panicked").is_empty());
    }
    for (field, value, message) in [
        ("vg_missing_pv_count", "1", "physical volumes are missing"),
        ("vg_permissions", "read-only", "group that is read-only"),
    ] {
        let now =
            RECORDED.lines().find_map(|line| line.split_once(&format!("\"{field}\":\""))).expect(field).1;
        let now = now.split_once('"').expect("its end").0;
        let report = RECORDED.replace(&format!("\"{field}\":\"{now}\""), &format!("\"{field}\":\"{value}\""));
        let fixture = Fixture::with("/dev/vg/thin", &report).await.expect("it can be added");
        let error = fixture.plan(create()).await.expect_err(value);
        assert!(error.kind() == ErrorKind::Refused && error.to_string().contains(message), "{error}");
    }
    // The same for the target of a revert.
    for (field, value) in [("lv_health_status", "partial"), ("lv_suspended", "1")] {
        let report = with_field("thin.ds-00000001", field, value);
        let fixture = Fixture::with("/dev/vg/thin", &report).await.expect("it can be added");
        let error = fixture.plan(revert("thin.ds-00000001", None)).await.expect_err(value);
        assert!(
            error.kind() == ErrorKind::Refused && error.to_string().contains("thin.ds-00000001"),
            "{error}"
        );
        fixture.plan(create()).await.expect("the volume itself is whole");
    }
}

/// A merge does not restore a thick volume's previous size, so it is refused; a thin volume is replaced with
/// its size.
#[tokio::test]
async fn a_thick_volume_that_was_resized_is_not_reverted() {
    let tagged = with_field("thick.ds-00000004", "origin_size", "16777216");
    let fixture = Fixture::with("/dev/vg/thick", &tagged).await.expect("it is a disk");
    let error = fixture.plan(revert("thick.ds-00000004", None)).await.expect_err("it grew");
    assert!(error.kind() == ErrorKind::Refused, "{error}");
    assert!(
        error.to_string().contains("had 16777216 bytes") && error.to_string().contains("33554432 now"),
        "{error}"
    );
    assert!(error.advice().is_some_and(|advice| advice.contains("qemu-img convert")), "{error}");
    fixture.plan(create()).await.expect("a new point has the new size");
    let tagged = with_field("thin.ds-00000001", "lv_size", "8388608");
    let fixture = Fixture::with("/dev/vg/thin", &tagged).await.expect("it is a disk");
    fixture.plan(revert("thin.ds-00000001", None)).await.expect("a plan");
}

/// An inactive volume has no node in `/dev`, but it exists.
#[tokio::test]
async fn a_volume_is_gone_where_its_group_has_nothing_of_it() {
    let fixture = Fixture::with("/dev/vg/thin", &with_field("thin", "lv_active", "")).await.expect("a disk");
    assert!(!fixture.backend.is_gone(&fixture.record).await.expect("an answer"));
    // Between the two renames of a revert its points show that it exists.
    let renamed = RECORDED.replace("\"lv_name\":\"thin\"", "\"lv_name\":\"thin.ds-00000002-old\"");
    let runner = Arc::new(Recorded::of(&renamed));
    assert!(!Lvm::by(runner).is_gone(&fixture.record).await.expect("an answer"));
    let mut record = fixture.record.clone();
    record.disk.address = "/dev/vg/never".into();
    record.active = LayerName("never".into());
    record.owned = vec![record.active.clone()];
    assert!(fixture.backend.is_gone(&record).await.expect("an answer"));
}

/// A revert whose safety snapshot overflowed ends with a message and with its point. The recorded group is in
/// the middle of such a revert, which stopped after its merge.
#[tokio::test]
async fn overflowed_safety_snapshot_ends_the_revert() {
    let fixture = Fixture::of("/dev/vg/thick").await;
    let plan = fixture.plan(revert("thick.ds-00000004", None)).await.expect("a plan");
    let merge = plan.steps().find(|step| step.summary.contains("merge")).expect("it merges");
    let later = RECORDED
        .replace("thick.ds-00000003", "thick.ds-000000ab-old")
        .replace("domsnap,domsnap.name=good", "domsnap,domsnap.name=good,domsnap.work=000000ab");
    let fixture = Fixture::with("/dev/vg/thick", &later).await.expect("a disk");
    let salvage = fixture.salvage(merge).await;
    let Salvage::Stays(edits, message) = salvage else { panic!("it would be undone: {salvage:?}") };
    assert!(
        edits.is_empty() && message.contains("overflowed") && message.contains("thick.ds-00000004"),
        "{message}"
    );
    assert!(fixture.runner.commands.lock().expect("no thread panicked").is_empty(), "the point is there");
}

#[tokio::test]
async fn foreign_tag_makes_no_volume_ours() {
    // A linear volume of another user, with the name and the tag of a volume that a revert leaves.
    let line = RECORDED.lines().find(|line| line.contains("\"lv_name\":\"thick\"")).expect("it is there");
    let hostile = line
        .replace("\"lv_name\":\"thick\"", "\"lv_name\":\"thin.ds-0000000f-old\"")
        .replace("\"lv_tags\":\"\"", "\"lv_tags\":\"domsnap\"");
    let point = hostile.replace("thin.ds-0000000f-old", "thin.ds-0000000e");
    let report = RECORDED.replace(line, &format!("{line}\n{hostile}\n{point}"));
    let mut fixture = Fixture::with("/dev/vg/thin", &report).await.expect("it is a disk");
    let one = Point::external(LayerName("thin.ds-00000001".into()));
    let plan = fixture
        .plan(DiskRequest::Delete { drop: vec![one], keep: Vec::new(), force: false })
        .await
        .expect("a plan");
    let commands = fixture.apply(&plan).await.expect("done").join("; ");
    assert!(commands.contains("thin.ds-00000001") && !commands.contains("0000000f"), "{commands}");
    fixture.backend.discover(&mut fixture.record, &[]).await.expect("found");
    assert!(!fixture.record.owned.iter().any(|layer| layer.as_str().contains("0000000e")));
}

/// lvm commits a thick snapshot as a plain volume first. If it fails after that, the snapshot was not taken,
/// and the plain volume is removed.
#[tokio::test]
async fn thick_create_that_was_only_begun_fails() {
    let tags = "domsnap,domsnap.name=n,domsnap.parent=thick.ds-00000004";
    let report = begun(RECORDED, "thick.ds-00000003", "thick.ds-000000ab", tags);
    let failing = Recorded { failing: Some("lvcreate"), ..Recorded::of(&report) };
    let fixture = Fixture::by("/dev/vg/thick", failing).await.expect("it is a disk");
    let plan = fixture.plan(create()).await.expect("a plan");
    assert_eq!(fixture.status(&plan.cut[0]).await, StepStatus::Partly);
    let error = fixture.apply(&plan).await.expect_err("it was only begun");
    assert!(error.to_string().contains("it failed"), "{error}");
    let commands = fixture.runner.commands();
    assert_eq!(commands[1..], ["lvremove -q -y vg/thick.ds-000000ab"], "{commands:?}");
    assert_eq!(fixture.status(&plan.cut[0]).await, StepStatus::NotDone);
    // After a crash, the undo removes it.
    let fixture = Fixture::with("/dev/vg/thick", &report).await.expect("it is a disk");
    fixture.undo(&plan.cut[0]).await.expect("undone");
    assert_eq!(fixture.runner.commands(), ["lvremove -q -y vg/thick.ds-000000ab"]);
}

/// A thick snapshot that exists with its tags although `lvcreate` failed was taken.
#[tokio::test]
async fn thick_create_that_is_complete_succeeds() {
    let tags = "domsnap,domsnap.name=n,domsnap.parent=thick.ds-00000004";
    let fields = [("lv_name", "thick.ds-000000ab"), ("lv_tags", tags), ("lv_time", "1795428143")];
    let report = changed(RECORDED, "thick.ds-00000003", &fields);
    let failing = Recorded { failing: Some("lvcreate"), ..Recorded::of(&report) };
    let fixture = Fixture::by("/dev/vg/thick", failing).await.expect("it is a disk");
    let plan = fixture.plan(create()).await.expect("a plan");
    assert_eq!(fixture.status(&plan.cut[0]).await, StepStatus::Done);
    assert_eq!(fixture.apply(&plan).await.expect("it exists").len(), 1);
}

/// A point that a revert only began to take again is removed and taken again, before the safety snapshot is
/// merged: until then the volume alone has its data.
#[tokio::test]
async fn point_that_was_only_begun_is_taken_again() {
    let (_, merge) = thick_revert().await;
    let report = begun(&merged(&[], RETAKEN), "thick.ds-00000004", "thick.ds-00000004", RETAKEN);
    let fixture = Fixture::with("/dev/vg/thick", &report).await.expect("it is a disk");
    assert_eq!(fixture.status(&merge).await, StepStatus::Partly);
    fixture.undo(&merge).await.expect_err("the recorded group has the safety snapshot after the merge");
    let commands = fixture.runner.commands();
    assert_eq!(commands.len(), 3, "{commands:?}");
    assert_eq!(commands[0], "lvremove -q -y vg/thick.ds-00000004");
    assert!(
        commands[1].starts_with("lvcreate -q -y -s -n thick.ds-00000004 -pr -L 16777216b --addtag domsnap"),
        "{commands:?}"
    );
    assert_eq!(commands[2], "lvconvert -q -y --interval 1 --merge vg/thick.ds-000000ab-old");
    // One that is a snapshot was taken again.
    let fixture = Fixture::with("/dev/vg/thick", &merged(&[], RETAKEN)).await.expect("it is a disk");
    assert_eq!(fixture.status(&merge).await, StepStatus::Done);
}

/// A safety volume that is no snapshot is never merged, and nothing is saved: no merge was begun.
#[tokio::test]
async fn safety_volume_without_data_is_not_merged() {
    let (keep, merge) = thick_revert().await;
    let name = "thick.ds-000000ab-old";
    for point in ["domsnap,domsnap.name=good", RETAKEN] {
        let report = begun(&merged(&[], point), name, name, "domsnap,domsnap.work=000000ab");
        let fixture = Fixture::with("/dev/vg/thick", &report).await.expect("it is a disk");
        assert_eq!(fixture.status(&keep).await, StepStatus::Partly);
        assert_eq!(fixture.salvage(&merge).await, Salvage::Nothing);
        fixture.undo(&merge).await.expect("nothing to undo");
        assert_eq!(fixture.runner.commands(), [] as [&str; 0]);
        fixture.undo(&keep).await.expect("undone");
        assert_eq!(fixture.runner.commands(), ["lvremove -q -y vg/thick.ds-000000ab-old"]);
    }
}

/// While the safety snapshot is merged, the undo has begun: lvm takes no snapshot of the volume then.
#[tokio::test]
async fn nothing_is_saved_while_the_undo_merges() {
    let (_, merge) = thick_revert().await;
    let merging = [("lv_merging", "1"), ("lv_name", "[thick.ds-000000ab-old]")];
    let fixture = Fixture::with("/dev/vg/thick", &merged(&merging, RETAKEN)).await.expect("it is a disk");
    assert_eq!(fixture.salvage(&merge).await, Salvage::Nothing);
    assert_eq!(fixture.runner.commands(), [] as [&str; 0]);
    fixture.undo(&merge).await.expect_err("the recorded merge does not end");
    assert_eq!(fixture.runner.commands(), ["lvpoll -q --interval 1 --polloperation merge vg/thick"]);
}

/// Saved data has an area for what the undo writes and for what the domain writes later; if the group lacks
/// room for that, the message says so. A saved snapshot that was only begun is taken again.
#[tokio::test]
async fn saved_data_has_room_for_later_writes() {
    let (_, merge) = thick_revert().await;
    let report = merged(&[], RETAKEN);
    let little = report.replace("\"vg_free\":\"373293056\"", "\"vg_free\":\"20971520\"");
    assert_ne!(little, report);
    // 50 % of 8 MiB are two extents, as the percentage is rounded; and two more.
    for (report, area, is_short) in [(&report, 16 + 8, false), (&little, 16, true)] {
        let create = format!(
            "lvcreate -q -y -s -n thick.ds-000000ab-kept -pr -L {}b --addtag domsnap --addtag domsnap.work=kept vg/thick",
            area << 20
        );
        let fixture = Fixture::with("/dev/vg/thick", report).await.expect("it is a disk");
        let Salvage::Saved(message) = fixture.salvage(&merge).await else { panic!("it is not saved") };
        assert_eq!(message.contains("lvextend"), is_short, "{message}");
        assert_eq!(fixture.runner.commands(), [create.as_str()]);
        let (kept, tags) = ("thick.ds-000000ab-kept", "domsnap,domsnap.work=kept");
        let line = line_of(report, "thick.ds-000000ab-old");
        let copy = line.replace("thick.ds-000000ab-old", kept);
        let with_kept = report.replace(line, &format!("{line}\n{copy}"));
        let with_kept = begun(&with_kept, kept, kept, tags);
        let fixture = Fixture::with("/dev/vg/thick", &with_kept).await.expect("it is a disk");
        let Salvage::Saved(_) = fixture.salvage(&merge).await else { panic!("it is not saved") };
        assert_eq!(fixture.runner.commands(), ["lvremove -q -y vg/thick.ds-000000ab-kept", create.as_str()]);
    }
}

/// Saved data whose area fills up is warned of.
#[tokio::test]
async fn saved_data_that_fills_up_is_warned_of() {
    let fields = [
        ("lv_snapshot_invalid", "0"),
        ("data_percent", "85.00"),
        ("lv_name", "thick.ds-000000ab-kept"),
        ("lv_tags", "domsnap,domsnap.work=kept"),
    ];
    let report = changed(RECORDED, "thick.ds-00000003", &fields);
    let fixture = Fixture::with("/dev/vg/thick", &report).await.expect("it is a disk");
    let found = fixture.backend.check(&fixture.record, &fixture.state).await.expect("findings");
    let is_it = |found: &&Finding| found.subject == "vg/thick.ds-000000ab-kept";
    assert!(found.iter().find(is_it).is_some_and(|found| found.message.contains("lvextend")), "{found:?}");
}

/// A new volume of a thin revert that has no device now, because it was deactivated, may have been written.
#[tokio::test]
async fn deactivated_volume_counts_as_written() {
    let fixture = Fixture::with("/dev/vg/thin", &prepared()).await.expect("it is a disk");
    let plan = fixture.plan(revert("thin.ds-00000001", None)).await.expect("a plan");
    let swapped = with_field("thin", "lv_tags", "domsnap,domsnap.work=000000ab");
    let fixture = Fixture::with("/dev/vg/thin", &swapped).await.expect("it is a disk");
    let Salvage::Saved(_) = fixture.salvage(&plan.cut[0]).await else { panic!("it is not saved") };
    assert_eq!(
        fixture.runner.commands(),
        [
            "lvcreate -q -y -s -n thin.ds-000000ab-kept -ky --addtag domsnap --addtag domsnap.work=kept vg/thin"
        ]
    );
}

/// A merge is refused where it would overflow any other snapshot that lacks what it writes. The advice is in
/// whole extents, as lvm wants it.
#[tokio::test]
async fn merge_leaves_room_in_every_snapshot() {
    // The point to merge has 3.02 MiB of data; the area of the other snapshot has 8 MiB.
    let (point, other) = ("thick.ds-00000004", "thick.ds-00000003");
    let report = |data: &str, time: &str, access: &str, merged: u32, chunk: u32| {
        let fields = [("lv_snapshot_invalid", "0"), ("data_percent", data), ("lv_time", time)];
        let report = changed(RECORDED, other, &fields);
        let report = changed(&report, point, &[("lv_permissions", access)]);
        with_chunk(&with_chunk(&report, point, merged), other, chunk)
    };
    let (earlier, later) = ("1795428140", "1795428150");
    for (report, is_refused) in [
        // Read-only and with the same chunk: the earlier snapshot has all of it.
        (report("80.00", earlier, "read-only", 4096, 4096), false),
        (report("80.00", earlier, "writeable", 4096, 4096), true),
        (report("80.00", earlier, "read-only", 65536, 4096), true),
        (report("80.00", later, "read-only", 4096, 4096), true),
        // 3.02 of 4 MiB, and 16 times that.
        (report("50.00", later, "read-only", 4096, 4096), false),
        (report("50.00", later, "read-only", 4096, 65536), true),
    ] {
        let fixture = Fixture::with("/dev/vg/thick", &report).await.expect("it is a disk");
        let planned = fixture.plan(revert(point, None)).await;
        assert_eq!(planned.is_err(), is_refused, "{planned:?}\n{}", line_of(&report, other));
        let Err(error) = planned else { continue };
        assert!(error.to_string().contains("would overflow"), "{error}");
        let advice = error.advice().expect("it is refused with advice");
        let more =
            advice.split_once("lvextend -L+").and_then(|(_, rest)| rest.split_once("b vg/")).expect(advice).0;
        assert_eq!(more.parse::<u64>().expect("a number") % (4 << 20), 0, "{advice}");
    }
}

/// The new volume of a thin revert gets the previous one's tags, without domsnap's.
#[tokio::test]
async fn thin_revert_keeps_the_tags_of_the_volume() {
    let tags = "site.a,domsnap,domsnap.from=thin.ds-00000001,domsnap.work=00000001,db";
    let report = changed(&prepared(), "thin", &[("lv_tags", tags)]);
    let fixture = Fixture::with("/dev/vg/thin", &report).await.expect("it is a disk");
    let plan = fixture.plan(revert("thin.ds-00000001", None)).await.expect("a plan");
    let commands = fixture.apply(&plan).await.expect("done");
    assert_eq!(
        commands[0],
        "lvcreate -q -y -s -kn -ay -prw -n thin.ds-000000ab-new --addtag domsnap \
         --addtag domsnap.work=000000ab --addtag domsnap.from=thin.ds-00000001 --addtag site.a --addtag db \
         vg/thin.ds-00000001"
    );
}

/// A new volume that lvm did not activate, or that is missing, gets no name: the domain could not start.
#[tokio::test]
async fn inactive_volume_is_not_swapped_in() {
    let inactive = changed(&prepared(), "thin.ds-000000ab-new", &[("lv_active", "")]);
    for (report, kind) in [(inactive.as_str(), ErrorKind::Refused), (RECORDED, ErrorKind::NotFound)] {
        let fixture = Fixture::with("/dev/vg/thin", report).await.expect("it is a disk");
        let plan = fixture.plan(revert("thin.ds-00000001", None)).await.expect("a plan");
        let error = fixture.apply(&plan).await.expect_err("it is not active");
        assert_eq!(error.kind(), kind, "{error}");
        let names_it = error.advice().is_some_and(|advice| advice.contains("volume_list"));
        assert_eq!(names_it, kind == ErrorKind::Refused, "{error}");
        let commands = fixture.runner.commands();
        assert!(commands.len() == 1 && commands[0].starts_with("lvcreate"), "{commands:?}");
    }
}

/// lvm takes no new volume in a pool whose metadata has less free than 4 MiB, or than a quarter if that is
/// less. That is refused before anything is done.
#[tokio::test]
async fn pool_metadata_has_the_limit_of_lvm() {
    for (percent, size, limit) in [
        ("74.99", 4_u64 << 20, None),
        ("75.00", 4 << 20, Some("75.00 %")),
        ("80.00", 20 << 20, Some("80.00 %")),
        ("89.99", 64 << 20, None),
        ("90.00", 64 << 20, Some("90.00 %")),
    ] {
        let size = size.to_string();
        let report = changed(RECORDED, "tp", &[("metadata_percent", percent), ("lv_metadata_size", &size)]);
        let fixture = Fixture::with("/dev/vg/thin", &report).await.expect("it is a disk");
        let planned = fixture.plan(create()).await;
        match limit {
            None => drop(planned.expect(percent)),
            Some(limit) => {
                let error = planned.expect_err(percent);
                let message = format!("{limit} is the limit");
                assert!(error.to_string().contains(&message), "{percent} of {size}: {error}");
            }
        }
    }
}
