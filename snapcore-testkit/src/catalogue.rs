//! The contract of a catalogue ([`Catalogue`]), as test cases that every catalogue runs: what its
//! documentation promises, and edits against a model.
//!
//! ```no_run
//! # use std::{process::ExitCode, sync::Arc};
//! # use snapcore::catalogue::Catalogue;
//! # struct Fresh;
//! # impl Fresh { fn new() -> Self { Self } }
//! # fn connect(_: &Fresh) -> Arc<dyn Catalogue> { unimplemented!() }
//! use snapcore_testkit::catalogue::{TestCatalogue, run};
//!
//! impl TestCatalogue for Fresh {
//!     fn open(&self) -> Arc<dyn Catalogue> {
//!         connect(self)
//!     }
//!     fn another(&self) -> Box<dyn TestCatalogue> {
//!         Box::new(Fresh::new())
//!     }
//! }
//!
//! fn main() -> ExitCode {
//!     run(|| Box::new(Fresh::new()))
//! }
//! ```

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use libtest_mimic::{Arguments, Trial};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use snapcore::catalogue::{Catalogue, CatalogueId, Change, Entry, Revision, Stamp};
use snapcore::catalogue::{Operation, OperationId, OperationState, StepState};
use snapcore::hypervisor::DomainStep;
use snapcore::policy::{Policy, PolicyId};
use snapcore::{
    ActivePath, Consistency, CutUnit, Disk, DiskPoint, DiskRecord, Domain, DomainName, Edit, ErrorKind,
    FinishStep, FinishUnit, GroupId, GroupMember, Hold, Holder, HoldingProcess, HypervisorStep, LayerName,
    MemoryPoint, NestedStep, OperationGroup, Plan, PlanStep, Point, SkippedDisk, Snapshot, SnapshotGroup,
    SnapshotId, SnapshotName, SnapshotRole, SnapshotTree, Step, Target,
};

/// A place for a catalogue, empty at first. It lasts as long as this.
pub trait TestCatalogue {
    /// The catalogue, as a process of its own opens it.
    fn open(&self) -> Arc<dyn Catalogue>;

    /// Another store, empty.
    fn another(&self) -> Box<dyn TestCatalogue>;
}

/// Runs each test case on a store of its own: the `main` of a test program with the arguments of every Rust
/// one.
pub fn run(make: fn() -> Box<dyn TestCatalogue>) -> ExitCode {
    let mut cases = vec![
        case(make, "stale_commit_changes_nothing", async |store| stale_commit_changes_nothing(store).await),
        case(make, "failed_transaction_changes_nothing", async |store| {
            failed_transaction_changes_nothing(store).await
        }),
        case(make, "disk_has_one_domain", async |store| disk_has_one_domain(store).await),
        case(make, "operation_reads_as_written", async |store| operation_reads_as_written(store).await),
        case(make, "watch_reports_last_revision", async |store| watch_reports_last_revision(store).await),
        case(make, "lease_excludes_until_dropped", async |store| lease_excludes_until_dropped(store).await),
        case(make, "domains_share_no_snapshots", async |store| domains_share_no_snapshots(store).await),
        case(make, "identity_lasts_and_revisions_grow", async |store| {
            identity_lasts_and_revisions_grow(store).await
        }),
    ];
    cases.push(Trial::test("edits_match_the_model", move || {
        edits_match_the_model(make);
        Ok(())
    }));
    libtest_mimic::run(&Arguments::from_args(), cases).exit_code()
}

fn case(
    make: fn() -> Box<dyn TestCatalogue>,
    name: &str,
    attempt: impl AsyncFnOnce(&dyn TestCatalogue) + Send + 'static,
) -> Trial {
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let store = make();
        runtime.block_on(attempt(&*store));
        Ok(())
    })
}

fn domain_name(text: &str) -> DomainName {
    DomainName::new(text).unwrap()
}

fn target(text: &str) -> Target {
    Target::new(text).unwrap()
}

fn layer(number: u8) -> LayerName {
    LayerName(format!("layer{number}"))
}

fn domain(name: &str, paths: &[&str]) -> Domain {
    let disks = paths.iter().zip(["vda", "vdb", "vdc"]).map(|(path, name)| {
        DiskRecord::new(Disk::new(target(name), *path, "fake"), layer(0)).owned(vec![layer(0)])
    });
    let spec = serde_json::json!({"daily": 7, "before": ["/bin/it's", "\"quoted\""], "min-age": "2d"});
    let policy = Policy::new(policy_id(), serde_json::from_value(spec).unwrap());
    Domain::new(domain_name(name), disks.collect()).active_path(ActivePath::New).policy(Some(policy))
}

fn policy_id() -> PolicyId {
    serde_json::from_value("01900000-0000-7000-8000-000000000001".into()).unwrap()
}

fn put(domain: &Domain) -> Vec<Change> {
    vec![Change::PutDomain(Box::new(domain.clone()), Vec::new())]
}

fn snapshot(number: u8, parent: Option<SnapshotId>) -> Snapshot {
    Snapshot::new(
        SnapshotName::new(format!("s{number}")).unwrap(),
        Timestamp::from_nanosecond(1_700_000_000_123_456_789 + i128::from(number)).unwrap(),
        vec![
            DiskPoint::new(target("vda"), Point::external(layer(number)), u64::from(number)),
            DiskPoint::new(target("vdb"), Point::internal(layer(0), "tag"), (1 << 63) - 1),
        ],
    )
    .parent(parent)
    .description("it's \"quoted\"\n".to_owned())
    .consistency(Consistency::Clean)
    .memory((number > 1).then(|| {
        MemoryPoint::new(format!("/memory/{number}"), 1 << 30, number == 2)
            .full((number == 3).then_some(2 << 30))
    }))
    .machine((number > 1).then(|| "m".to_owned()))
    .skipped(vec![SkippedDisk::new(Target::new("vdz").unwrap(), "/vdz.raw")])
    .holds(if number.is_multiple_of(2) { vec![hold(number)] } else { Vec::new() })
    .group((number == 2).then(|| {
        SnapshotGroup::new(GroupId::fresh(), ["db", "web"].map(|name| DomainName::new(name).unwrap()).into())
    }))
    .deferred(number.is_multiple_of(3))
    .expires(number.is_multiple_of(4).then_some(Timestamp::UNIX_EPOCH))
    .policy(number.is_multiple_of(2).then(policy_id))
}

fn hold(number: u8) -> Hold {
    let until = (number > 3).then(|| Timestamp::from_second(i64::from(number)).unwrap());
    Hold::new(Holder::new(format!("h{number}")).unwrap(), Timestamp::UNIX_EPOCH)
        .reason("it's \"quoted\"".to_owned())
        .until(until)
        .process((number > 5).then(|| HoldingProcess::own().unwrap()))
}

/// A commit that expects another revision changes nothing.
async fn stale_commit_changes_nothing(store: &dyn TestCatalogue) {
    let (one, two) = (store.open(), store.open());
    let web = domain("web", &["/a"]);
    let first = one.commit(&web.name, Revision::ABSENT, put(&web)).await.unwrap();
    let error = two.commit(&web.name, Revision::ABSENT, put(&web)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let edit = |number| vec![Change::Edit(Edit::SetActive { target: target("vda"), layer: layer(number) })];
    let second = two.commit(&web.name, first, edit(1)).await.unwrap();
    assert!(second > first);
    assert_eq!(one.commit(&web.name, first, edit(2)).await.unwrap_err().kind(), ErrorKind::Busy);
    let entry = one.load(&web.name).await.unwrap().unwrap();
    assert_eq!((entry.revision, &entry.domain.disks[0].active), (second, &layer(1)));
    // A domain that was removed and made again is not the one that was read.
    assert_eq!(one.commit(&web.name, second, vec![Change::RemoveDomain]).await.unwrap(), Revision::ABSENT);
    let again = one.commit(&web.name, Revision::ABSENT, put(&web)).await.unwrap();
    assert!(again > second);
}

/// A transaction of which one change fails changes nothing.
async fn failed_transaction_changes_nothing(store: &dyn TestCatalogue) {
    let catalogue = store.open();
    let web = domain("web", &["/a", "/b"]);
    let revision = catalogue.commit(&web.name, Revision::ABSENT, put(&web)).await.unwrap();
    let s1 = snapshot(1, None);
    let changes = vec![
        Change::Edit(Edit::AddSnapshot { snapshot: Box::new(s1.clone()) }),
        Change::Edit(Edit::RemoveSnapshot { id: SnapshotId::fresh() }),
    ];
    let error = catalogue.commit(&web.name, revision, changes).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let entry = catalogue.load(&web.name).await.unwrap().unwrap();
    assert_eq!((entry.revision, entry.tree.len()), (revision, 0));
}

/// A disk belongs to one domain.
async fn disk_has_one_domain(store: &dyn TestCatalogue) {
    let catalogue = store.open();
    let (web, db) = (domain("web", &["/a", "/b"]), domain("db", &["/c", "/b"]));
    catalogue.commit(&web.name, Revision::ABSENT, put(&web)).await.unwrap();
    let error = catalogue.commit(&db.name, Revision::ABSENT, put(&db)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    assert_eq!(catalogue.load(&db.name).await.unwrap(), None);
    let owners = catalogue.owners(&["/b".into(), "/c".into()]).await.unwrap();
    assert_eq!(owners, [("/b".into(), web.name)]);
}

/// An operation is read as it was written.
async fn operation_reads_as_written(store: &dyn TestCatalogue) {
    let catalogue = store.open();
    let web = domain("web", &["/a"]);
    let revision = catalogue.commit(&web.name, Revision::ABSENT, put(&web)).await.unwrap();
    let step = || {
        Step::new(target("vda"), serde_json::json!({"do": "it", "with": [1, "two", null]}), "does it")
            .bytes(1 << 40)
    };
    let of_domain = |action| HypervisorStep::new(action, "does it to all");
    let cut = of_domain(DomainStep::Detach { disks: vec![target("vda")], running: true, restart: None });
    let end = of_domain(DomainStep::Continue { memory: None, reset: true, power: None });
    let moved = Edit::MovePoint {
        target: target("vda"),
        from: Point::external(layer(1)),
        to: Point::internal(layer(2), "t"),
    };
    let mut operation = Operation::new(
        OperationId::fresh(),
        Timestamp::now(),
        Plan::new("create", vec![SnapshotName::new("s1").unwrap()])
            .prepare(vec![PlanStep::Disk(step()), PlanStep::Domain(end.clone())])
            .cut(vec![
                CutUnit::Domain { step: cut.clone(), nested: vec![step(), step()] },
                CutUnit::Domain { step: cut, nested: Vec::new() },
                CutUnit::Disk(step()),
            ])
            .commit(vec![Edit::AddSnapshot { snapshot: Box::new(snapshot(1, None)) }])
            .finish(vec![
                FinishUnit::Domain(end),
                FinishUnit::Disk(
                    FinishStep::new(step())
                        .deferrable(true)
                        .edits(vec![moved.clone()])
                        .nested(vec![NestedStep::new(step()).edits(vec![moved])]),
                ),
                FinishUnit::Disk(FinishStep::new(step())),
            ])
            .notes(vec!["a note".into()]),
    )
    .state(OperationState::Preparing)
    .steps(vec![StepState::Pending; 11])
    .group(Some(OperationGroup::new(
        GroupId::fresh(),
        GroupMember::new(DomainName::new("db").unwrap(), OperationId::fresh()),
    )));
    let revision = catalogue
        .commit(&web.name, revision, vec![Change::Begin(Box::new(operation.clone()))])
        .await
        .unwrap();
    assert_eq!(catalogue.unfinished(&web.name).await.unwrap(), [operation.clone()]);
    assert!(catalogue.domains().await.unwrap()[0].unfinished);
    // What its commit point will record is known when all that comes before is done.
    let edits = vec![Edit::AddSnapshot { snapshot: Box::new(snapshot(2, None)) }];
    let changes = vec![Change::Ready(operation.id, edits.clone())];
    let revision = catalogue.commit(&web.name, revision, changes).await.unwrap();
    (operation.state, operation.plan.commit) = (OperationState::Ready, edits);
    assert_eq!(catalogue.unfinished(&web.name).await.unwrap(), [operation.clone()]);
    let changes = vec![
        Change::Step(operation.id, 8, StepState::Undone),
        Change::Operation(operation.id, OperationState::Undone, Some("it \"failed\"".into())),
    ];
    let revision = catalogue.commit(&web.name, revision, changes).await.unwrap();
    operation.state = OperationState::Undone;
    operation.steps[8] = StepState::Undone;
    operation.errors = vec!["it \"failed\"".into()];
    assert_eq!(catalogue.operation(&web.name, operation.id).await.unwrap(), Some(operation.clone()));
    assert!(catalogue.unfinished(&web.name).await.unwrap().is_empty());
    assert_eq!(catalogue.operations(&web.name).await.unwrap(), [operation.clone()]);
    let nowhere = vec![Change::Step(operation.id, 11, StepState::Done)];
    assert_eq!(catalogue.commit(&web.name, revision, nowhere).await.unwrap_err().kind(), ErrorKind::Internal);
}

/// A watch reports the last revision.
async fn watch_reports_last_revision(store: &dyn TestCatalogue) {
    let (catalogue, other) = (store.open(), store.open());
    let web = domain("web", &["/a"]);
    let mut revision = other.commit(&web.name, Revision::ABSENT, put(&web)).await.unwrap();
    let mut watched = catalogue.watch(&web.name).await.unwrap();
    for number in 1..4 {
        let edit = Change::Edit(Edit::SetActive { target: target("vda"), layer: layer(number) });
        revision = other.commit(&web.name, revision, vec![edit]).await.unwrap();
    }
    loop {
        let seen = std::future::poll_fn(|context| watched.as_mut().poll_next(context)).await.unwrap();
        if seen == revision {
            break;
        }
        assert!(seen < revision);
    }
}

/// A lease excludes others until it is dropped.
async fn lease_excludes_until_dropped(store: &dyn TestCatalogue) {
    let (one, two) = (store.open(), store.open());
    let long = "n".repeat(255);
    for name in ["web", long.as_str()] {
        let held = one.lease(name, "the first", Duration::from_secs(1)).await.unwrap();
        let error = two.lease(name, "the second", Duration::from_secs(1)).await.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.message().contains("the first"), "{error}");
        assert!(!held.lost().is_cancelled());
        drop(held);
        two.lease(name, "the second", Duration::from_secs(1)).await.unwrap();
    }
}

/// The next edit of a test; numbers choose among the snapshots there are.
#[derive(Debug, Clone)]
enum Doing {
    Add,
    Remove(usize),
    Current(Option<usize>),
    Active(u8),
    Own(u8),
    Disown(u8),
    Move(u8, u8),
    Amend(usize, SnapshotRole),
}

fn doing() -> impl Strategy<Value = Doing> {
    prop_oneof![
        4 => Just(Doing::Add),
        2 => any::<usize>().prop_map(Doing::Remove),
        1 => proptest::option::of(any::<usize>()).prop_map(Doing::Current),
        1 => (0..4_u8).prop_map(Doing::Active),
        1 => (0..4_u8).prop_map(Doing::Own),
        1 => (0..4_u8).prop_map(Doing::Disown),
        2 => (0..20_u8, 0..20_u8).prop_map(|(from, to)| Doing::Move(from, to)),
        2 => (any::<usize>(), role()).prop_map(|(which, role)| Doing::Amend(which, role)),
    ]
}

fn role() -> impl Strategy<Value = SnapshotRole> {
    prop_oneof![Just(SnapshotRole::Snapshot), Just(SnapshotRole::Previous), Just(SnapshotRole::Dropped)]
}

/// The model: parents by name, where each snapshot's first disk is, and what is no user's snapshot.
#[derive(Debug, Default, PartialEq)]
struct Model {
    parents: BTreeMap<String, Option<String>>,
    layers: BTreeMap<String, LayerName>,
    roles: BTreeMap<String, SnapshotRole>,
    current: Option<String>,
}

fn model_of(entry: &Entry) -> Model {
    let name = |id: SnapshotId| entry.tree.get(id).unwrap().name.to_string();
    Model {
        parents: entry.tree.iter().map(|s| (s.name.to_string(), s.parent.map(name))).collect(),
        layers: entry.tree.iter().map(|s| (s.name.to_string(), s.disks[0].point.layer.clone())).collect(),
        roles: entry
            .tree
            .iter()
            .filter(|s| s.role != SnapshotRole::Snapshot)
            .map(|s| (s.name.to_string(), s.role))
            .collect(),
        current: entry.domain.current.map(name),
    }
}

/// Edits do to the catalogue what they do to a model.
fn edits_match_the_model(make: fn() -> Box<dyn TestCatalogue>) {
    let mut runner = TestRunner::new(ProptestConfig { cases: 24, ..ProptestConfig::default() });
    let all = proptest::collection::vec(doing(), 1..24);
    let held = runner.run(&all, |all| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let store = make();
        runtime.block_on(async {
            let catalogue = store.open();
            let web = domain("web", &["/a", "/b"]);
            let revision = catalogue.commit(&web.name, Revision::ABSENT, put(&web)).await.unwrap();
            let mut entry = Entry::new(web, SnapshotTree::default(), revision);
            let mut model = Model::default();
            for (number, doing) in (1_u8..).zip(all) {
                let ids: Vec<SnapshotId> = entry.tree.iter().map(|s| s.id).collect();
                let name = |id: SnapshotId| entry.tree.get(id).unwrap().name.to_string();
                let edits = match doing {
                    Doing::Add => {
                        let new = snapshot(number, entry.domain.current);
                        let text = new.name.to_string();
                        model.parents.insert(text.clone(), model.current.clone());
                        model.layers.insert(text.clone(), layer(number));
                        model.current = Some(text);
                        let id = Some(new.id);
                        vec![Edit::AddSnapshot { snapshot: Box::new(new) }, Edit::SetCurrent { id }]
                    }
                    Doing::Remove(which) if !ids.is_empty() => {
                        let id = ids[which % ids.len()];
                        let gone = name(id);
                        let parent = model.parents.remove(&gone).unwrap();
                        model.layers.remove(&gone);
                        model.roles.remove(&gone);
                        for other in model.parents.values_mut().chain([&mut model.current]) {
                            if other.as_ref() == Some(&gone) {
                                *other = parent.clone();
                            }
                        }
                        vec![Edit::RemoveSnapshot { id }]
                    }
                    Doing::Current(which) => {
                        let id = which.filter(|_| !ids.is_empty()).map(|which| ids[which % ids.len()]);
                        model.current = id.map(name);
                        vec![Edit::SetCurrent { id }]
                    }
                    Doing::Amend(which, role) if !ids.is_empty() => {
                        let known = entry.tree.get(ids[which % ids.len()]).unwrap();
                        let old = known.name.to_string();
                        let new = format!("r{number}");
                        for parent in model.parents.values_mut().chain([&mut model.current]) {
                            if parent.as_ref() == Some(&old) {
                                *parent = Some(new.clone());
                            }
                        }
                        let parent = model.parents.remove(&old).unwrap();
                        model.parents.insert(new.clone(), parent);
                        let at = model.layers.remove(&old).unwrap();
                        model.layers.insert(new.clone(), at);
                        if role == SnapshotRole::Previous {
                            for other in
                                model.roles.values_mut().filter(|role| **role == SnapshotRole::Previous)
                            {
                                *other = SnapshotRole::Dropped;
                            }
                        }
                        model.roles.remove(&old);
                        if role != SnapshotRole::Snapshot {
                            model.roles.insert(new.clone(), role);
                        }
                        let mut amended = known.clone();
                        amended.name = SnapshotName::new(new).unwrap();
                        amended.role = role;
                        amended.holds.push(hold(number.wrapping_add(100)));
                        // What the edit does not change may be anything.
                        amended.disks.clear();
                        amended.parent = None;
                        vec![Edit::Amend { snapshot: Box::new(amended) }]
                    }
                    Doing::Amend(..) => continue,
                    Doing::Remove(_) => continue,
                    Doing::Active(number) => {
                        vec![Edit::SetActive { target: target("vdb"), layer: layer(number) }]
                    }
                    Doing::Own(number) => {
                        vec![Edit::AddLayer { target: target("vda"), layer: layer(number) }]
                    }
                    Doing::Disown(number) => {
                        vec![Edit::RemoveLayer { target: target("vda"), layer: layer(number) }]
                    }
                    Doing::Move(from, to) => {
                        for at in model.layers.values_mut().filter(|at| **at == layer(from)) {
                            *at = layer(to);
                        }
                        let (from, to) = (Point::external(layer(from)), Point::external(layer(to)));
                        vec![Edit::MovePoint { target: target("vda"), from, to }]
                    }
                };
                for edit in &edits {
                    edit.apply(&mut entry.domain, &mut entry.tree).unwrap();
                }
                let changes = edits.into_iter().map(Change::Edit).collect();
                entry.revision = catalogue.commit(&entry.domain.name, entry.revision, changes).await.unwrap();
                assert_eq!(model_of(&entry), model);
            }
            // Another process reads what this one wrote.
            let read = store.open().load(&entry.domain.name).await.unwrap().unwrap();
            assert_eq!(read, entry);
        });
        Ok(())
    });
    held.unwrap();
}

/// A change of one domain's snapshots never touches another domain's of the same identity.
async fn domains_share_no_snapshots(store: &dyn TestCatalogue) {
    let catalogue = store.open();
    let (web, copy) = (domain("web", &["/a", "/b"]), domain("copy", &["/c", "/d"]));
    let s1 = snapshot(1, None);
    let with = |domain: &Domain| vec![Change::PutDomain(Box::new(domain.clone()), vec![s1.clone()])];
    catalogue.commit(&web.name, Revision::ABSENT, with(&web)).await.unwrap();
    let revision = catalogue.commit(&copy.name, Revision::ABSENT, with(&copy)).await.unwrap();
    let whole = async || catalogue.load(&web.name).await.unwrap().unwrap().tree.get(s1.id) == Some(&s1);
    assert!(whole().await);
    let moved = vec![Change::Edit(Edit::MovePoint {
        target: target("vda"),
        from: s1.disks[0].point.clone(),
        to: Point::external(layer(9)),
    })];
    let revision = catalogue.commit(&copy.name, revision, moved).await.unwrap();
    assert!(whole().await);
    let gone = vec![Change::Edit(Edit::RemoveSnapshot { id: s1.id })];
    let revision = catalogue.commit(&copy.name, revision, gone).await.unwrap();
    assert!(whole().await);
    catalogue.commit(&copy.name, revision, vec![Change::RemoveDomain]).await.unwrap();
    assert!(whole().await);
}

/// A catalogue keeps its identity, and a domain is newer than what it was imported from.
async fn identity_lasts_and_revisions_grow(store: &dyn TestCatalogue) {
    let catalogue = store.open();
    assert_eq!(catalogue.identity().await.unwrap(), None);
    let web = domain("web", &["/a"]);
    let follows = Stamp::new(Some(CatalogueId::fresh()), Revision(1000));
    let changes = [put(&web), vec![Change::Follow(follows)]].concat();
    let first = catalogue.commit(&web.name, Revision::ABSENT, changes).await.unwrap();
    assert!(first > follows.revision);
    let identity = catalogue.identity().await.unwrap().unwrap();
    let again = store.open();
    assert_eq!(again.identity().await.unwrap(), Some(identity));
    assert_eq!(again.load(&web.name).await.unwrap().unwrap().follows, Some(follows));
    let second = again.commit(&web.name, first, put(&web)).await.unwrap();
    assert!(second > first);
    assert_ne!(store.another().open().identity().await.unwrap(), Some(identity));
}
