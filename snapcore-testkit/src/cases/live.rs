//! Running domains: a guest writes to the disks all the time, except while it is paused.
//!
//! The guest and its hypervisor are the kit's own ([`crate::live`]). The guest writes until the very moment
//! of a pause, and again before the step that resumes it is done. So a point that is taken a step too early
//! or too late holds other bytes than the guest had written at the instant.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use snapcore::backend::Capabilities;
use snapcore::hypervisor::{DiskInstant, DomainStep};
use snapcore::service::{DeleteRequest, Request, RevertRequest};
use snapcore::{ActivePath, CutUnit, ErrorKind, Plan, SnapshotName};
use tokio_util::sync::CancellationToken;

use super::{DomainKind, TestCase, trees_with_deletes};
use crate::fault::{Fault, FaultKind, Moment};
use crate::fixture::{Fixture, Method, Op, compare};
use crate::live::{Content, TestGuest, tick_of};
use crate::test_backend::TestBackend;

fn live(can: &Capabilities, subject: &dyn TestBackend) -> bool {
    can.live && subject.active_path() == ActivePath::Keep
}

fn live_trees(can: &Capabilities, subject: &dyn TestBackend) -> bool {
    live(can, subject) && trees_with_deletes(can, subject)
}

pub(super) const CASES: [TestCase; 12] = [
    TestCase::with(
        "live_point_is_of_instant",
        "the point of a running domain holds what its guest had written at the instant, and nothing later",
        live_trees,
        |subject, method| with_guest(subject, method, point_is_of_instant),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_disks_share_instant",
        "the points of two disks of a running domain are of one instant",
        live,
        |subject, method| with_guest(subject, method, disks_share_instant),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_writes_never_reach_point",
        "nothing that the guest of a running domain writes later reaches a point",
        live_trees,
        |subject, method| with_guest(subject, method, writes_never_reach_point),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_revert_is_detached",
        "a revert of a running domain changes its disks only while they are detached",
        live,
        |subject, method| with_guest(subject, method, revert_is_detached),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_delete_keeps_current",
        "a delete on a running domain leaves what its guest writes intact",
        live_trees,
        |subject, method| with_guest(subject, method, delete_keeps_current),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_dry_run_changes_nothing",
        "a dry run on a running domain changes nothing, and does not pause its guest",
        live,
        |subject, method| with_guest(subject, method, dry_run_changes_nothing),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_create_crash_keeps_writes",
        "a create on a running domain that crashes anywhere keeps all writes of its guest",
        live_trees,
        |subject, method| with_guest(subject, method, |fixture| crashing(fixture, create_new)),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_revert_crash_is_atomic",
        "a revert of a running domain that crashes anywhere happened whole or not at all",
        live_trees,
        |subject, method| with_guest(subject, method, |fixture| crashing(fixture, revert_to_other)),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_delete_crash_is_completed",
        "a delete on a running domain that crashes anywhere is completed",
        live_trees,
        |subject, method| with_guest(subject, method, |fixture| crashing(fixture, delete_b)),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_failed_create_is_undone",
        "a create on a running domain that fails anywhere is undone, and its guest goes on",
        live_trees,
        |subject, method| with_guest(subject, method, failing),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_cancel_is_atomic",
        "a create on a running domain that is cancelled anywhere happened whole or not at all",
        live_trees,
        |subject, method| with_guest(subject, method, cancelled),
    )
    .of(DomainKind::Running),
    TestCase::with(
        "live_plan_leaves_points_to_hypervisor",
        "the plan of a running domain's create has each point taken by the hypervisor, or is refused",
        live,
        hypervisor_takes_points,
    )
    .of(DomainKind::RunningByHypervisor),
];

/// Runs the guest of a new domain beside `body`.
fn with_guest(
    subject: &dyn TestBackend,
    method: &Method,
    body: impl FnOnce(&mut Fixture<'_>) -> Result<()>,
) -> Result<()> {
    /// Ends the guest, whatever ends the test case.
    struct Ending(Arc<TestGuest>);

    impl Drop for Ending {
        fn drop(&mut self) {
            self.0.end();
        }
    }

    let mut fixture = Fixture::running(subject, method)?;
    let guest = fixture.guest()?;
    std::thread::scope(|scope| {
        let ending = Ending(guest.clone());
        scope.spawn(|| guest.run(subject));
        let done = guest.write_on(3).and_then(|()| body(&mut fixture));
        drop(ending);
        done
    })
}

impl Fixture<'_> {
    /// Does an operation on a running domain that must succeed.
    fn run_live(&mut self, op: &Op) -> Result<()> {
        let before = self.live_before(op)?;
        self.process()?.run_waiting(op)?.with_context(|| format!("{op:?}"))?;
        ensure!(self.follow(op, &before)?, "{op:?} succeeded, and did not happen");
        Ok(())
    }

    fn create_live(&mut self, name: &str) -> Result<()> {
        self.run_live(&Op::Create(name.to_owned()))
    }

    fn revert_live(&mut self, name: &str) -> Result<()> {
        self.run_live(&Op::Revert { to: name.to_owned(), save: None })
    }

    fn live_before(&mut self, op: &Op) -> Result<Before> {
        let guest = self.guest()?;
        guest.take_instant();
        guest.take_boots();
        if let Op::Revert { to, .. } = op {
            ensure!(self.model.current.as_ref() != Some(to), "only another current snapshot shows a revert");
        }
        Ok(Before { footprint: self.footprint()? })
    }

    /// Brings the model to what an operation made of the domain, and compares. Returns whether it happened.
    fn follow(&mut self, op: &Op, before: &Before) -> Result<bool> {
        let guest = self.guest()?;
        let (tree, boots) = (self.tree()?, guest.take_boots());
        let earlier = self.model.clone();
        if let (Op::Create(_), Some(instant)) = (op, guest.take_instant()) {
            self.model.disks = instant;
        }
        self.update_model(op);
        let happened = tree == self.model.tree();
        if !happened {
            self.model = earlier;
            ensure!(tree == self.model.tree(), "the tree is neither as before nor as after, but {tree:?}");
            let after = self.footprint()?;
            ensure!(after == before.footprint, "it was undone, and left {after:?} of {:?}", before.footprint);
        }
        match (op, happened) {
            (Op::Revert { to, .. }, true) => {
                let found = boots.first().context("the guest was not reset on the disks of the snapshot")?;
                require_same(&format!("the guest boots after a revert to {to}"), found, &self.model.disks)?;
            }
            _ => ensure!(boots.is_empty(), "{op:?} reset the guest"),
        }
        guest.check(self.subject())?;
        Ok(happened)
    }

    /// Every snapshot holds what its instant was.
    fn check_all_live(&mut self) -> Result<()> {
        for name in self.model.points.keys().cloned().collect::<Vec<_>>() {
            if self.model.current.as_ref() != Some(&name) {
                self.revert_live(&name)?;
            }
        }
        self.check_findings()
    }
}

/// What a domain was before an operation.
struct Before {
    footprint: BTreeSet<String>,
}

fn require_same(what: &str, found: &Content, wanted: &Content) -> Result<()> {
    for (target, wanted) in wanted {
        let found = found.get(target).context("a disk of the domain")?;
        compare(found, wanted).with_context(|| {
            let (found, wanted) = (tick_of(found), tick_of(wanted));
            format!("{what}: {target} is of tick {found:?}, and the instant was at {wanted:?}")
        })?;
    }
    Ok(())
}

fn point_is_of_instant(fixture: &mut Fixture<'_>) -> Result<()> {
    let guest = fixture.guest()?;
    for name in ["a", "b"] {
        fixture.create_live(name)?;
        guest.write_on(5)?;
    }
    // Its own current snapshot shows no revert.
    fixture.revert_live("a")?;
    fixture.revert_live("b")?;
    fixture.check_findings()
}

fn disks_share_instant(fixture: &mut Fixture<'_>) -> Result<()> {
    let guest = fixture.guest()?;
    guest.write_on(5)?;
    let op = Op::Create("a".into());
    fixture.process()?.run_waiting(&op)?.context("a create")?;
    guest.write_on(5)?;
    guest.take_boots();
    let op = Op::Revert { to: "a".into(), save: None };
    fixture.process()?.run_waiting(&op)?.context("a revert")?;
    let found = guest.take_boots().pop().context("the guest was not reset on the disks of the snapshot")?;
    let ticks: BTreeSet<_> = found.values().map(tick_of).collect();
    ensure!(ticks.len() == 1, "the disks are of different instants: ticks {ticks:?}");
    guest.check(fixture.subject())
}

fn writes_never_reach_point(fixture: &mut Fixture<'_>) -> Result<()> {
    let guest = fixture.guest()?;
    fixture.create_live("a")?;
    // Each block of the disk that the guest writes at all.
    let blocks = fixture.subject().size() / 4096;
    guest.write_on(blocks)?;
    fixture.create_live("b")?;
    guest.write_on(blocks)?;
    fixture.check_all_live()
}

fn revert_is_detached(fixture: &mut Fixture<'_>) -> Result<()> {
    let guest = fixture.guest()?;
    let trees = fixture.capabilities()?.snapshot_of_snapshot;
    fixture.create_live("a")?;
    guest.write_on(5)?;
    if trees {
        fixture.create_live("b")?;
        fixture.revert_live("a")?;
        guest.write_on(5)?;
        return fixture.revert_live("b");
    }
    guest.take_boots();
    fixture.process()?.run_waiting(&Op::Revert { to: "a".into(), save: None })?.context("a revert")?;
    let found = guest.take_boots().pop().context("the guest was not reset on the disks of the snapshot")?;
    require_same("the guest boots after a revert", &found, &fixture.model.points["a"].disks)?;
    guest.check(fixture.subject())
}

fn delete_keeps_current(fixture: &mut Fixture<'_>) -> Result<()> {
    let guest = fixture.guest()?;
    let before = fixture.footprint()?;
    for name in ["a", "b", "c"] {
        fixture.create_live(name)?;
        guest.write_on(2)?;
    }
    fixture.run_live(&Op::Delete(vec!["b".into()]))?;
    fixture.revert_live("a")?;
    fixture.revert_live("c")?;
    fixture.run_live(&Op::Delete(vec!["a".into(), "c".into()]))?;
    let after = fixture.footprint()?;
    ensure!(before == after, "no snapshot is left, and {after:?} is where {before:?} was");
    fixture.check_findings()
}

fn dry_run_changes_nothing(fixture: &mut Fixture<'_>) -> Result<()> {
    let name = |name: &str| SnapshotName::new(name);
    let create = Request::Create(fixture.process()?.create_request(name("a")?)?);
    let plan = dry_run_of(fixture, &create)?;
    require_taken_by_backend(&plan)?;
    fixture.create_live("a")?;
    dry_run_of(fixture, &Request::Revert(RevertRequest::new(name("a")?)))?;
    let can = fixture.capabilities()?;
    if can.delete_in_chain {
        dry_run_of(fixture, &Request::Delete(DeleteRequest::new(vec![name("a")?])))?;
    }
    if can.snapshot_of_snapshot {
        let create = Request::Create(fixture.process()?.create_request(name("b")?)?);
        require_taken_by_backend(&dry_run_of(fixture, &create)?)?;
    }
    Ok(())
}

/// The plan of a request, the making of which changed nothing.
fn dry_run_of(fixture: &mut Fixture<'_>, request: &Request) -> Result<Plan> {
    let guest = fixture.guest()?;
    let (footprint, tree, pauses) = (fixture.footprint()?, fixture.tree()?, guest.pauses());
    guest.take_boots();
    let plan = fixture.dry_run(request)?.with_context(|| format!("{request:?}"))?;
    ensure!(plan.has_steps(), "the plan of {request:?} has no steps");
    guest.write_on(2)?;
    let after = fixture.footprint()?;
    ensure!(after == footprint, "the plan of {request:?} left {after:?} of {footprint:?}");
    ensure!(fixture.tree()? == tree, "the plan of {request:?} changed the tree");
    ensure!(guest.pauses() == pauses, "the plan of {request:?} paused the guest");
    ensure!(guest.take_boots().is_empty(), "the plan of {request:?} reset the guest");
    guest.check(fixture.subject())?;
    Ok(plan)
}

impl Fixture<'_> {
    fn dry_run(&mut self, request: &Request) -> Result<snapcore::Result<Plan>> {
        let reference = self.reference();
        let process = self.process()?;
        Ok(process.wait(process.service.plan(&reference, request)))
    }
}

/// The instant of a create, with the number of the steps that are nested in it.
fn instant_of(plan: &Plan) -> Result<(&[(snapcore::Target, DiskInstant)], usize)> {
    let instant = plan.cut.iter().find_map(|unit| match unit {
        CutUnit::Domain { step, nested } => match &step.action {
            DomainStep::Instant { disks, .. } => Some((disks.as_slice(), nested.len())),
            _ => None,
        },
        CutUnit::Disk(_) => None,
    });
    instant.context("the plan of a running domain's create has no instant")
}

fn require_taken_by_backend(plan: &Plan) -> Result<()> {
    let (disks, nested) = instant_of(plan)?;
    for (target, instant) in disks {
        ensure!(*instant == DiskInstant::ByBackend, "{target} is left to the hypervisor: {instant:?}");
    }
    ensure!(nested >= disks.len(), "{} disks, and {nested} steps at the instant", disks.len());
    Ok(())
}

fn hypervisor_takes_points(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let mut fixture = Fixture::running(subject, method)?;
    let footprint = fixture.footprint()?;
    let create = fixture.process()?.create_request(SnapshotName::new("a")?)?;
    match fixture.dry_run(&Request::Create(create))? {
        Ok(plan) => {
            let (disks, _) = instant_of(&plan)?;
            for (target, instant) in disks {
                if *instant == DiskInstant::ByBackend {
                    bail!("{target} is taken by the backend: let takes_live_points return true");
                }
            }
        }
        Err(error) => ensure!(
            matches!(error.kind(), ErrorKind::Refused | ErrorKind::Unsupported),
            "the plan fails as {:?}: {error}",
            error.kind()
        ),
    }
    ensure!(fixture.footprint()? == footprint, "a plan changed the disks");
    Ok(())
}

fn create_new(_: &Fixture<'_>) -> Op {
    Op::Create("new".into())
}

fn revert_to_other(fixture: &Fixture<'_>) -> Op {
    let to = if fixture.model.current.as_deref() == Some("a") { "b" } else { "a" };
    Op::Revert { to: to.into(), save: None }
}

fn delete_b(_: &Fixture<'_>) -> Op {
    Op::Delete(vec!["b".into()])
}

/// Makes the snapshots that the operations need which crash or fail, and removes the one that they make.
fn prepare(fixture: &mut Fixture<'_>) -> Result<()> {
    if fixture.model.points.contains_key("new") {
        fixture.run_live(&Op::Delete(vec!["new".into()]))?;
    }
    for name in ["a", "b"] {
        if !fixture.model.points.contains_key(name) {
            fixture.create_live(name)?;
        }
    }
    Ok(())
}

/// Stops domsnap at each moment of an operation, one after the other, while the guest goes on or stands
/// still; recovers each time.
fn crashing(fixture: &mut Fixture<'_>, of: fn(&Fixture<'_>) -> Op) -> Result<()> {
    let guest = fixture.guest()?;
    for number in 1.. {
        prepare(fixture)?;
        let op = of(fixture);
        let before = fixture.live_before(&op)?;
        let at = || format!("{op:?} on a running domain, which crashed at moment {number}");
        let fault = Fault::new(&Moment::BETWEEN, number, FaultKind::Stop);
        let ended = fixture.run_with_faults(&op, vec![fault]).with_context(at)?;
        let crashed = match ended {
            Some(outcome) => {
                outcome.with_context(at)?;
                false
            }
            None => true,
        };
        if crashed {
            // A guest that was not paused writes on, with no domsnap.
            guest.write_on(2).with_context(at)?;
            fixture.recover().with_context(at)?;
        }
        let happened = fixture.follow(&op, &before).with_context(at)?;
        if !crashed {
            ensure!(happened && number > 1, "{op:?} has no moment to crash at");
            return fixture.check_all_live();
        }
    }
    Ok(())
}

/// Cancels a create at each moment, one after the other.
fn cancelled(fixture: &mut Fixture<'_>) -> Result<()> {
    for number in 1.. {
        prepare(fixture)?;
        let op = create_new(fixture);
        let before = fixture.live_before(&op)?;
        let at = || format!("{op:?} on a running domain, cancelled at moment {number}");
        let cancel = CancellationToken::new();
        let fault = Fault::new(&Moment::BETWEEN, number, FaultKind::Cancel(cancel.clone()));
        let ended = fixture.run_cancellable(&op, vec![fault], &cancel).with_context(at)?;
        let outcome = ended.context("nothing stops here")?;
        let fired = fixture.has_fired()?;
        if let Err(error) = &outcome {
            ensure!(error.kind() == ErrorKind::Cancelled, "{}: it says: {error}", at());
        }
        // Nothing is left to a recovery: the guest goes on now.
        let happened = fixture.follow(&op, &before).with_context(at)?;
        ensure!(happened == outcome.is_ok(), "{}: {outcome:?}, and it happened: {happened}", at());
        if !fired {
            ensure!(number > 1, "{op:?} has no moment to be cancelled at");
            return fixture.check_all_live();
        }
        // Deferred steps are done by it.
        fixture.recover().with_context(at)?;
    }
    Ok(())
}

/// Fails a create at each moment, one after the other.
fn failing(fixture: &mut Fixture<'_>) -> Result<()> {
    for number in 1.. {
        prepare(fixture)?;
        let op = create_new(fixture);
        let before = fixture.live_before(&op)?;
        let at = || format!("{op:?} on a running domain, which failed at moment {number}");
        let fault = Fault::new(&Moment::BETWEEN, number, FaultKind::Fail(ErrorKind::NoSpace));
        let Some(outcome) = fixture.run_with_faults(&op, vec![fault]).with_context(at)? else {
            bail!("nothing stops here")
        };
        let fired = fixture.has_fired()?;
        let kind = outcome.as_ref().err().map(snapcore::Error::kind);
        if kind.is_some_and(|kind| kind != ErrorKind::NeedsRecovery) {
            let guest = fixture.guest()?;
            guest
                .check(fixture.subject())
                .with_context(at)
                .context("an undone create, before any recovery")?;
        }
        fixture.recover().with_context(at)?;
        let happened = fixture.follow(&op, &before).with_context(at)?;
        ensure!(happened || kind.is_some(), "{}: it succeeded, and did not happen", at());
        if !fired {
            ensure!(kind.is_none(), "{}: no fault fired, and it failed: {:?}", at(), outcome.err());
            ensure!(number > 1, "{op:?} has no moment to fail at");
            return fixture.check_all_live();
        }
    }
    Ok(())
}
