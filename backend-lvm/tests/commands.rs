//! The commands of lvm2 that the backend runs, against a recorded report of a real group.

use std::sync::{Arc, Mutex};

use backend_lvm::{Answer, Invocation, Lvm, Runner};
use snapcore::backend::{
    AnyDiskSnapshotter, DiskPlan, DiskRequest, DiskSnapshotter, DiskState, InspectDepth, Progress, Salvage,
    StepContext, StepStatus,
};
use snapcore::hypervisor::DiskInstant;
use snapcore::{ActivePath, Disk, DiskRecord, ErrorKind, LayerName, Point, SnapshotName, Target};
use tokio_util::sync::CancellationToken;

const RECORDED: &str = include_str!("recorded/group.json");

/// Returns the recorded report, and records all other commands.
struct Recorded {
    report: String,
    commands: Mutex<Vec<String>>,
}

impl Runner for Recorded {
    fn run(&self, invocation: &Invocation<'_>) -> snapcore::Result<Answer> {
        if invocation.args[0] != "lvs" {
            self.commands.lock().expect("no thread panicked").push(invocation.args.join(" "));
            return Ok(Answer { status: Some(0), stdout: String::new(), stderr: String::new() });
        }
        Ok(Answer { status: Some(0), stdout: self.report.clone(), stderr: String::new() })
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
        let runner = Arc::new(Recorded { report: report.to_owned(), commands: Mutex::default() });
        let backend = AnyDiskSnapshotter::of(Arc::new(Lvm::by(runner.clone())));
        let disk = Disk::new(Target::new("vda")?, path, "lvm");
        let record = backend.adopt(&disk, ActivePath::Keep).await?;
        let state = backend.inspect(&record, InspectDepth::Dependents, None).await?;
        Ok(Self { backend, runner, record, state })
    }

    async fn plan(&self, request: DiskRequest) -> snapcore::Result<DiskPlan> {
        self.backend.plan(&self.record, &self.state, ActivePath::Keep, &request).await
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
    let fixture = Fixture::of("/dev/vg/thin").await;
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
    let cancel = CancellationToken::new();
    let context = StepContext::new(&fixture.record, &Silent, &cancel);
    let status = fixture.backend.status(&plan.cut[1], context).await.expect("a status");
    assert_eq!(status, StepStatus::NotDone);
    // The recorded group still has the snapshot after the merge: this is an error, and not a success.
    let error = fixture.apply(&plan).await.expect_err("lvm did not do it");
    assert!(error.to_string().contains("did not merge"), "{error}");
    let commands = fixture.runner.commands.lock().expect("no thread panicked").clone();
    assert!(commands[0].starts_with("lvcreate -q -y -s -n thick.ds-000000ab-old -pr -L"), "{commands:?}");
    assert_eq!(commands[1], "lvconvert -q -y --merge vg/thick.ds-00000004");
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
    let line =
        RECORDED.lines().find(|line| line.contains(&format!("\"lv_name\":\"{volume}\""))).expect(volume);
    let start = format!("\"{field}\":\"");
    let (before, after) = line.split_once(&start).expect("the field");
    let (_, after) = after.split_once('"').expect("its end");
    RECORDED.replace(line, &format!("{before}{start}{value}\"{after}"))
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
        let runner = Arc::new(Recorded { report, commands: Mutex::default() });
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
    let runner = Arc::new(Recorded { report: renamed, commands: Mutex::default() });
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
    let cancel = CancellationToken::new();
    let context = StepContext::new(&fixture.record, &Silent, &cancel);
    let salvage = fixture.backend.salvage(merge, true, context).await.expect("an answer");
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
