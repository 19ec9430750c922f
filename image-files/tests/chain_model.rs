//! The chain planner against a model: steps are carried out on layers of plain maps, and after every
//! operation each point and the current image must read as they did when they were taken.
//!
//! Where the domain runs a hypervisor has the active chain open. Then each step is also checked against what
//! may be done to open images, and what the hypervisor does itself is done by the model.

use std::collections::{BTreeMap, BTreeSet};

use image_files::chain::{self, ChainStep};
use image_files::layer_name::{layer_name, layer_path};
use proptest::prelude::*;
use snapcore::backend::{Capabilities, DiskPlan, DiskRequest, DiskState, InternalPoint, Layer};
use snapcore::hypervisor::DiskInstant;
use snapcore::{
    ActivePath, Disk, DiskRecord, Edit, FinishStep, LayerName, Point, PointKind, SnapshotName, Step, Target,
};

const CLUSTERS: u8 = 6;

/// The own mappings of one state of a layer: cluster to content.
type Map = BTreeMap<u8, u32>;

#[derive(Debug, Clone, Default)]
struct Image {
    own: Map,
    tags: BTreeMap<String, Map>,
    backing: Option<LayerName>,
    named: bool,
}

/// The moment at which a step runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Moment {
    Prepare,
    /// In the hypervisor's cut, or at the pivot of its merge.
    Nested,
    /// By itself: in the cut at rest or in a detached section, or after the commit point.
    Alone,
}

#[derive(Debug)]
struct Machine {
    record: DiskRecord,
    images: BTreeMap<LayerName, Image>,
    /// The layer that the configured path names.
    path: LayerName,
    /// The layers that a hypervisor has open, the active layer first; empty in a detached section. `None` if
    /// the domain is off.
    open: Option<Vec<LayerName>>,
    points: BTreeMap<u32, (Point, Map)>,
    current: Map,
    stamp: u32,
    foreign: Vec<(LayerName, Map)>,
}

impl Machine {
    fn new() -> Self {
        let disk = Disk::new(Target::new("vda").unwrap(), "/vm/disk.qcow2", "model");
        let base = layer_name(disk.path(), 0);
        let record = DiskRecord::new(disk, base.clone()).owned(vec![base.clone()]);
        let images = BTreeMap::from([(base.clone(), Image::default())]);
        Self {
            record,
            images,
            path: base,
            open: None,
            points: BTreeMap::new(),
            current: Map::new(),
            stamp: 1,
            foreign: Vec::new(),
        }
    }

    fn read(&self, layer: &LayerName, own: &Map) -> Map {
        let mut shown = match &self.images[layer].backing {
            Some(backing) => self.read(backing, &self.images[backing].own),
            None => Map::new(),
        };
        shown.extend(own.iter().map(|(at, value)| (*at, *value)));
        shown
    }

    fn state(&self) -> DiskState {
        let layers = self.images.iter().map(|(name, image)| {
            Layer::new(name.clone(), layer_path(self.record.disk.path(), name), "model", u64::from(CLUSTERS))
                .named(image.named)
                .backing(image.backing.clone())
                .owned(self.record.owned.contains(name))
                .allocated(image.own.len() as u64)
                .internal(
                    image
                        .tags
                        .keys()
                        .map(|tag| {
                            InternalPoint::new(tag.clone(), u64::from(CLUSTERS), jiff::Timestamp::UNIX_EPOCH)
                        })
                        .collect(),
                )
                .dependents(
                    self.foreign
                        .iter()
                        .filter(|(on, _)| on == name)
                        .map(|_| "/elsewhere/clone.qcow2".into())
                        .collect(),
                )
        });
        let (target, active) = (self.record.disk.target.clone(), self.record.active.clone());
        DiskState::new(target, active, layers.collect()).attached(self.open.is_some())
    }

    fn keep(&self) -> Vec<Point> {
        self.points.values().map(|(point, _)| point.clone()).collect()
    }

    fn plan(&self, request: &DiskRequest) -> snapcore::Result<DiskPlan<ChainStep>> {
        let capabilities = Capabilities::new(PointKind::Internal, 40).both_kinds();
        chain::plan(&self.record, &self.state(), ActivePath::Keep, &capabilities, request, &mut |run| {
            Ok(self.visible(run))
        })
    }

    fn visible(&self, run: &[LayerName]) -> Vec<u64> {
        let mut seen = BTreeSet::new();
        let mut counts: Vec<u64> = run
            .iter()
            .rev()
            .map(|layer| self.images[layer].own.keys().filter(|at| seen.insert(**at)).count() as u64)
            .collect();
        counts.reverse();
        counts
    }

    /// The layers that an image opens, itself first.
    fn chain(&self, top: &LayerName) -> Vec<LayerName> {
        let below = |layer: &LayerName| self.images[layer].backing.clone();
        std::iter::successors(Some(top.clone()), below).collect()
    }

    fn run(&mut self, plan: &DiskPlan<ChainStep>) {
        if self.open.is_none() {
            assert!(plan.instant.is_none() && plan.detached.is_empty());
            assert!(plan.finish.iter().all(|finish| finish.nested.is_empty()));
        }
        plan.prepare.iter().for_each(|step| self.perform_step(step, Moment::Prepare));
        match &plan.instant {
            Some(instant) => {
                self.instant(&instant.take);
                assert!(plan.cut.is_empty(), "it would run when the guest writes already: {:?}", plan.cut);
                instant.nested.iter().for_each(|step| self.perform_step(step, Moment::Nested));
            }
            None => self.in_section(plan.cut.iter().map(|step| (step, &[][..])).collect()),
        }
        self.edit(&plan.commit);
        assert!(plan.detached.iter().all(|finish| finish.nested.is_empty()));
        self.in_section(plan.detached.iter().map(|finish| (&finish.step, &finish.edits[..])).collect());
        plan.finish.iter().for_each(|finish| self.finish(finish));
    }

    fn perform_step(&mut self, step: &Step<ChainStep>, moment: Moment) {
        self.allow(&step.action, moment);
        self.step(step.action.clone());
    }

    /// Performs the hypervisor's part of a snapshot on the disk.
    fn instant(&mut self, instant: &DiskInstant) {
        let open = self.open.as_mut().expect("a hypervisor has the disk open");
        let active = open[0].clone();
        match instant {
            DiskInstant::Overlay { address, format } => {
                let (name, overlay) = self
                    .images
                    .iter()
                    .find(|(name, _)| layer_path(self.record.disk.path(), name) == address.path())
                    .expect("the overlay was made before the instant");
                assert!(address.path().is_absolute() && *format == self.record.disk.format);
                assert!(overlay.own.is_empty() && overlay.backing.as_ref() == Some(&active));
                open.insert(0, name.clone());
            }
            DiskInstant::ByBackend => panic!("what happens to a chain is a hypervisor's to do"),
            DiskInstant::Internal { tag } => {
                let image = self.images.get_mut(&active).unwrap();
                let own = image.own.clone();
                assert!(image.tags.insert(tag.clone(), own).is_none());
            }
        }
    }

    /// Steps that run while nothing has the disk open: all of a disk that is at rest.
    fn in_section(&mut self, steps: Vec<(&Step<ChainStep>, &[Edit])>) {
        if steps.is_empty() {
            return;
        }
        for (Step { action, .. }, _) in &steps {
            if let (Some(open), ChainStep::DropInternal { layer, .. }) = (&self.open, action) {
                assert!(open[1..].contains(layer), "no section is needed for {action:?}");
            }
        }
        let attached = self.open.is_some();
        if attached {
            self.open = Some(Vec::new());
        }
        for (step, edits) in steps {
            self.perform_step(step, Moment::Alone);
            self.edit(edits);
        }
        if attached {
            self.open = Some(self.chain(&self.path));
        }
    }

    /// A step after the commit point, and those nested in it.
    fn finish(&mut self, finish: &FinishStep<ChainStep>) {
        let FinishStep { step: Step { action, .. }, edits, nested, .. } = finish;
        let open = self.open.clone().unwrap_or_default();
        self.perform_step(&finish.step, Moment::Alone);
        self.edit(edits);
        let ChainStep::Merge { run, into, .. } = action else {
            assert!(nested.is_empty(), "{action:?} has no pivot");
            return;
        };
        let top = run.last().unwrap();
        if !open.contains(top) {
            assert!(nested.is_empty(), "{action:?} is of images that no process has open");
            return;
        }
        let at = open.iter().position(|layer| layer == top).unwrap();
        if into != top {
            match at.checked_sub(1) {
                Some(above) => {
                    assert!(nested.is_empty(), "{action:?} does not change what the guest writes to");
                    self.images.get_mut(&open[above]).unwrap().backing = Some(into.clone());
                }
                None => {
                    let [switch] = &nested[..] else {
                        panic!("the path is moved at the pivot, and that is all")
                    };
                    self.perform_step(&switch.step, Moment::Nested);
                    self.edit(&switch.edits);
                    assert_eq!(self.path, *into);
                }
            }
        }
        let left = open.into_iter().filter(|layer| layer == into || !run.contains(layer));
        self.open = Some(left.collect());
    }

    /// Checks that a step is allowed while a hypervisor has images open.
    fn allow(&self, step: &ChainStep, moment: Moment) {
        let Some(open) = &self.open else { return };
        let is_open = |layer: &LayerName| open.contains(layer);
        match step {
            ChainStep::NameLayer { .. } => assert_eq!(moment, Moment::Prepare),
            ChainStep::CreateOverlay { layer, .. } | ChainStep::Materialise { layer, .. } => {
                assert!(moment == Moment::Prepare && !is_open(layer));
            }
            ChainStep::TakeInternal { layer, .. } | ChainStep::ApplyInternal { layer, .. } => {
                assert!(!is_open(layer), "the hypervisor writes to it: {step:?}");
            }
            ChainStep::SwitchActive { .. } => {
                assert!(
                    moment == Moment::Nested || open.is_empty(),
                    "the guest would write elsewhere: {step:?}"
                );
            }
            ChainStep::DropInternal { layer, .. } => {
                assert!(
                    !is_open(layer) || open.first() == Some(layer),
                    "a hypervisor can do that to the active image alone: {step:?}"
                );
            }
            ChainStep::Merge { run, into, .. } if run.iter().any(is_open) => {
                let upwards: Vec<&LayerName> = open.iter().rev().collect();
                let run: Vec<&LayerName> = run.iter().collect();
                assert!(
                    upwards.windows(run.len()).any(|part| part == run),
                    "not in the open chain: {step:?}"
                );
                assert!(
                    run.first() == Some(&into) || run.last() == Some(&into),
                    "a hypervisor merges into an end of a run: {step:?}"
                );
            }
            ChainStep::Merge { .. } => {}
            ChainStep::ForgetInternal { .. } => panic!("no request of this model forces anything"),
            ChainStep::Repoint { child, to } => {
                assert!(
                    !is_open(child) || self.images[child].backing.as_ref() == Some(to),
                    "the hypervisor should have done that: {step:?}"
                );
            }
            ChainStep::Remove { layers } => assert!(!layers.iter().any(is_open), "it is open: {step:?}"),
            ChainStep::Unname { .. } => panic!("the hypervisor knows it by that name: {step:?}"),
            ChainStep::Clone { .. } | ChainStep::PublishClones { .. } => {
                panic!("it is of other domains: {step:?}")
            }
        }
    }

    fn step(&mut self, step: ChainStep) {
        match step {
            ChainStep::NameLayer { layer } => {
                assert_eq!(self.path, layer, "only what the configured path names can be given a name");
                self.images.get_mut(&layer).unwrap().named = true;
            }
            ChainStep::CreateOverlay { layer, on, .. } => {
                assert!(self.images[&on].named, "an overlay must depend on a permanent name");
                let image = Image { backing: Some(on), named: true, ..Image::default() };
                assert!(self.images.insert(layer, image).is_none());
            }
            ChainStep::Materialise { from, tag, layer } => {
                let source = &self.images[&from];
                let image = Image {
                    own: source.tags[&tag.name].clone(),
                    backing: source.backing.clone(),
                    named: true,
                    ..Image::default()
                };
                assert!(self.images.insert(layer, image).is_none());
            }
            ChainStep::TakeInternal { layer, tag } => {
                let image = self.images.get_mut(&layer).unwrap();
                let own = image.own.clone();
                assert!(image.tags.insert(tag, own).is_none());
            }
            ChainStep::SwitchActive { from, to } => {
                assert_eq!(self.path, from);
                assert!(
                    self.images[&from].named && self.images[&to].named,
                    "a layer would lose its only name"
                );
                self.path = to;
            }
            ChainStep::ApplyInternal { layer, tag, safety } => {
                let image = self.images.get_mut(&layer).unwrap();
                if let Some(safety) = safety {
                    assert_eq!(image.tags[&safety], image.own, "the safety tag is not what an undo needs");
                }
                image.own = image.tags[&tag.name].clone();
            }
            ChainStep::DropInternal { layer, tags } => {
                for tag in tags {
                    assert!(self.images.get_mut(&layer).unwrap().tags.remove(&tag.name).is_some());
                }
            }
            ChainStep::ForgetInternal { .. } => panic!("no request of this model forces anything"),
            ChainStep::Merge { run, into, below } => {
                let top = run.last().unwrap();
                assert_eq!(self.images[&run[0]].backing, below, "a run merges onto what its bottom stood on");
                let mut merged = Map::new();
                for layer in &run {
                    merged.extend(self.images[layer].own.clone());
                }
                assert!(
                    self.images[top].tags.is_empty(),
                    "tags of the top would read through a changed chain"
                );
                let image = self.images.get_mut(&into).unwrap();
                assert!(image.tags.is_empty() || into == run[0], "tags would read through a changed chain");
                image.own = merged;
                image.backing = below;
            }
            ChainStep::Repoint { child, to } => self.images.get_mut(&child).unwrap().backing = Some(to),
            ChainStep::Remove { layers } => layers.into_iter().for_each(|layer| self.remove(layer)),
            ChainStep::Unname { layer } => {
                assert_eq!(self.path, layer);
                assert!(self.images.values().all(|other| other.backing.as_ref() != Some(&layer)));
                self.images.get_mut(&layer).unwrap().named = false;
            }
            ChainStep::Clone { .. } | ChainStep::PublishClones { .. } => {
                panic!("it is of other domains: {step:?}")
            }
        }
        // Wherever a crash comes, the configured path opens to a layer that exists.
        assert!(self.images.contains_key(&self.path));
    }

    fn remove(&mut self, layer: LayerName) {
        assert!(self.record.owned.contains(&layer));
        assert_ne!(self.path, layer, "the configured path would be removed's only name");
        let image = self.images.remove(&layer).unwrap();
        assert!(image.tags.is_empty(), "a tag went with its layer");
        assert!(self.images.values().all(|other| other.backing.as_ref() != Some(&layer)));
        assert!(self.foreign.iter().all(|(on, _)| *on != layer), "a foreign image lost its backing file");
    }

    fn edit(&mut self, edits: &[Edit]) {
        for edit in edits {
            match edit.clone() {
                Edit::SetActive { layer, .. } => self.record.active = layer,
                Edit::AddLayer { layer, .. } => self.record.owned.push(layer),
                Edit::RemoveLayer { layer, .. } => self.record.owned.retain(|owned| *owned != layer),
                Edit::MovePoint { from, to, .. } => {
                    for (point, _) in self.points.values_mut().filter(|(point, _)| *point == from) {
                        *point = to.clone();
                    }
                }
                other => panic!("a chain planner has no business with {other:?}"),
            }
        }
    }

    fn verify(&self) {
        assert_eq!(self.path, self.record.active, "the configured path is not the active layer");
        if let Some(open) = &self.open {
            assert_eq!(
                *open,
                self.chain(&self.path),
                "the hypervisor has another chain open than the path names"
            );
        }
        let active = &self.images[&self.record.active];
        assert_eq!(self.read(&self.record.active, &active.own), self.current, "the current");
        for (number, (point, expected)) in &self.points {
            let image = &self.images[&point.layer];
            let own = match &point.tag {
                Some(tag) => &image.tags[tag],
                None => &image.own,
            };
            assert_eq!(self.read(&point.layer, own), *expected, "point {number} at {point:?}");
            assert_ne!(
                *point,
                Point::external(self.record.active.clone()),
                "the guest would write into a point"
            );
        }
        for (on, expected) in &self.foreign {
            assert_eq!(self.read(on, &self.images[on].own), *expected, "a foreign image on {on}");
        }
    }

    fn next_stamp(&mut self) -> u32 {
        self.stamp += 1;
        self.stamp
    }

    fn perform(&mut self, action: &Action) {
        match action {
            Action::Write(at, value) => {
                let active = self.open.as_ref().map_or(&self.record.active, |open| &open[0]).clone();
                self.images.get_mut(&active).unwrap().own.insert(*at, *value);
                self.current.insert(*at, *value);
            }
            Action::Create(kind) => {
                let stamp = self.next_stamp();
                let plan = self
                    .plan(&DiskRequest::Create {
                        kind: Some(*kind),
                        method: None,
                        name: SnapshotName::new(format!("s{stamp}")).unwrap(),
                        overlay: None,
                        keep: self.keep(),
                        stamp,
                    })
                    .unwrap();
                self.run(&plan);
                self.points.insert(stamp, (plan.point.unwrap(), self.current.clone()));
            }
            Action::Revert(which, save) => {
                let Some((to, content)) = self.points.values().nth(which % self.points.len().max(1)).cloned()
                else {
                    return;
                };
                let stamp = self.next_stamp();
                let save = save.then(|| SnapshotName::new(format!("s{stamp}")).unwrap());
                let plan = self
                    .plan(&DiskRequest::Revert { to, save: save.clone(), keep: self.keep(), stamp })
                    .unwrap();
                self.run(&plan);
                if save.is_some() {
                    self.points.insert(stamp, (plan.point.unwrap(), self.current.clone()));
                }
                self.current = content;
            }
            Action::Delete(doomed) => {
                let gone: Vec<u32> = self
                    .points
                    .keys()
                    .enumerate()
                    .filter(|(index, _)| doomed & (1 << (index % 16)) != 0)
                    .map(|(_, number)| *number)
                    .collect();
                let drop: Vec<Point> = gone
                    .iter()
                    .filter_map(|number| self.points.remove(number))
                    .map(|(point, _)| point)
                    .collect();
                let plan = self.plan(&DiskRequest::Delete { drop, keep: self.keep(), force: false }).unwrap();
                self.run(&plan);
                if self.points.is_empty() && self.foreign.is_empty() {
                    assert_eq!(self.images.len(), 1, "nothing is left to keep, yet layers are");
                    if self.open.is_none() {
                        assert!(!self.images[&self.path].named, "one file as in the beginning");
                    }
                }
            }
            Action::Power(on) => self.open = on.then(|| self.chain(&self.path)),
            Action::Clone(which) => {
                // Another program makes an overlay on a frozen layer.
                let frozen: Vec<&LayerName> = self
                    .points
                    .values()
                    .filter(|(point, _)| point.tag.is_none())
                    .map(|(point, _)| &point.layer)
                    .collect();
                if let Some(on) = frozen.get(which % frozen.len().max(1)).copied().cloned() {
                    let content = self.read(&on, &self.images[&on].own);
                    self.foreign.push((on, content));
                }
            }
        }
        self.verify();
    }
}

#[derive(Debug, Clone)]
enum Action {
    Write(u8, u32),
    Create(PointKind),
    Revert(usize, bool),
    Delete(u16),
    Power(bool),
    Clone(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (0..CLUSTERS, any::<u32>()).prop_map(|(at, value)| Action::Write(at, value)),
        2 => Just(Action::Create(PointKind::Internal)),
        3 => Just(Action::Create(PointKind::External)),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(which, save)| Action::Revert(which, save)),
        3 => any::<u16>().prop_map(Action::Delete),
        1 => Just(Action::Delete(u16::MAX)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_point_stays_what_it_was(actions in prop::collection::vec(action(), 1..40)) {
        let mut machine = Machine::new();
        for action in &actions {
            machine.perform(action);
        }
    }

    /// Every point stays what it was while the domain runs.
    #[test]
    fn every_point_is_kept_while_the_domain_runs(actions in prop::collection::vec(action(), 1..40)) {
        let mut machine = Machine::new();
        machine.perform(&Action::Power(true));
        for action in &actions {
            machine.perform(action);
        }
    }

    /// A domain is started and shut down between operations.
    #[test]
    fn domain_starts_and_stops_between_operations(
        actions in prop::collection::vec(
            prop_oneof![
                6 => action(),
                2 => any::<bool>().prop_map(Action::Power),
                1 => any::<usize>().prop_map(Action::Clone),
            ],
            1..40,
        ),
    ) {
        let mut machine = Machine::new();
        for action in &actions {
            machine.perform(action);
        }
    }

    #[test]
    fn images_of_others_are_never_pulled_from_under_them(
        actions in prop::collection::vec(prop_oneof![6 => action(), 1 => any::<usize>().prop_map(Action::Clone)], 1..40),
    ) {
        let mut machine = Machine::new();
        for action in &actions {
            machine.perform(action);
        }
    }
}

#[test]
fn chain_beyond_the_limit_is_refused() {
    let mut machine = Machine::new();
    for _ in 0..39 {
        machine.perform(&Action::Create(PointKind::External));
    }
    let error = machine
        .plan(&DiskRequest::Create {
            kind: Some(PointKind::External),
            method: None,
            name: SnapshotName::new("one-too-many").unwrap(),
            overlay: None,
            keep: machine.keep(),
            stamp: 9999,
        })
        .unwrap_err();
    assert_eq!(error.kind(), snapcore::ErrorKind::Refused);
    assert!(
        error.to_string().contains("the limit is 40") && error.to_string().contains("--internal"),
        "{error}"
    );
}

#[test]
fn the_direction_that_moves_less_is_taken() {
    // A base with everything in it under an overlay with one cluster: the overlay goes down.
    let mut machine = Machine::new();
    for at in 0..CLUSTERS {
        machine.perform(&Action::Write(at, 7));
    }
    machine.perform(&Action::Create(PointKind::External));
    machine.perform(&Action::Write(0, 8));
    let plan =
        machine.plan(&DiskRequest::Delete { drop: machine.keep(), keep: vec![], force: false }).unwrap();
    assert_eq!(plan.finish[0].step.bytes, 1, "{plan:?}");

    // An overlay that hides all of its base: nothing has to be moved up.
    for at in 0..CLUSTERS {
        machine.perform(&Action::Write(at, 9));
    }
    let plan =
        machine.plan(&DiskRequest::Delete { drop: machine.keep(), keep: vec![], force: false }).unwrap();
    assert_eq!(plan.finish[0].step.bytes, 0, "{plan:?}");
}

/// A base, a layer that holds the most, one with a cluster, and an empty one: nothing needs the two in the
/// middle.
fn heavy_in_the_middle() -> Machine {
    let mut machine = Machine::new();
    for (clusters, value) in [(0..2, 1), (2..CLUSTERS, 2), (0..1, 3)] {
        for at in clusters {
            machine.perform(&Action::Write(at, value));
        }
        machine.perform(&Action::Create(PointKind::External));
    }
    machine
}

fn the_merge(plan: &DiskPlan<ChainStep>) -> (Vec<LayerName>, LayerName, u64) {
    let merges: Vec<_> = plan
        .steps()
        .filter_map(|step| match step.action.clone() {
            ChainStep::Merge { run, into, .. } => Some((run, into, step.bytes)),
            _ => None,
        })
        .collect();
    let [merge] = &merges[..] else { panic!("one merge is expected: {plan:?}") };
    merge.clone()
}

/// Layers that are open are merged into the cheaper end of their run.
#[test]
fn open_layers_merge_into_the_cheaper_end() {
    let mut machine = heavy_in_the_middle();
    let everything = DiskRequest::Delete { drop: machine.keep(), keep: vec![], force: false };
    let (run, into, bytes) = the_merge(&machine.plan(&everything).unwrap());
    assert_eq!((into == run[1], bytes), (true, 2), "at rest it is the one that holds the most");
    machine.perform(&Action::Power(true));
    let (run, into, bytes) = the_merge(&machine.plan(&everything).unwrap());
    // The lowest shows one cluster, the layer above the middle one, and the active layer none: all but that
    // one move.
    assert_eq!((run.len(), into == run[0], bytes), (4, true, 5));
    for at in 0..2 {
        machine.perform(&Action::Write(at, 4));
    }
    let (run, into, bytes) = the_merge(&machine.plan(&everything).unwrap());
    assert_eq!((into == run[3], bytes), (true, 4), "the active layer shows two clusters, the lowest none");
    machine.perform(&Action::Delete(u16::MAX));
    assert_eq!(machine.images.len(), 1);
}

/// Layers that no hypervisor has open are merged into any of them while the domain runs.
#[test]
fn closed_layers_merge_into_any_of_them() {
    let mut machine = heavy_in_the_middle();
    // A side branch of its own: the current image is elsewhere.
    let base = machine.points.keys().next().copied().unwrap();
    machine.perform(&Action::Revert(0, true));
    machine.perform(&Action::Power(true));
    let aside: Vec<Point> = machine
        .points
        .iter()
        .filter(|(number, _)| **number != base)
        .map(|(_, (point, _))| point.clone())
        .collect();
    let (saved, middle) = aside.split_last().unwrap();
    let keep = vec![machine.points[&base].0.clone(), saved.clone()];
    let request = DiskRequest::Delete { drop: middle.to_vec(), keep, force: false };
    let (run, into, bytes) = the_merge(&machine.plan(&request).unwrap());
    assert_eq!((run.len(), into == run[0], bytes), (3, true, 1));
    assert!(!machine.open.as_ref().unwrap().contains(&into));
}

/// The path of a running domain moves nested in the cut and in the merge.
#[test]
fn path_moves_within_the_cut_and_the_merge() {
    let mut machine = Machine::new();
    for at in 0..CLUSTERS {
        machine.perform(&Action::Write(at, 7));
    }
    machine.perform(&Action::Power(true));
    let create = DiskRequest::Create {
        kind: Some(PointKind::External),
        method: None,
        name: SnapshotName::new("before").unwrap(),
        overlay: None,
        keep: vec![],
        stamp: 0x77,
    };
    let plan = machine.plan(&create).unwrap();
    let address = "/vm/disk.ds-00000077.qcow2".into();
    let instant = plan.instant.as_ref().unwrap();
    assert_eq!(instant.take, DiskInstant::Overlay { address, format: "model".to_owned() });
    assert!(plan.cut.is_empty());
    let [switch] = &instant.nested[..] else { panic!("{instant:?}") };
    assert!(matches!(switch.action, ChainStep::SwitchActive { .. }), "{switch:?}");

    machine.perform(&Action::Create(PointKind::External));
    machine.perform(&Action::Write(0, 8));
    let plan =
        machine.plan(&DiskRequest::Delete { drop: machine.keep(), keep: vec![], force: false }).unwrap();
    let [merge, remove] = &plan.finish[..] else { panic!("{plan:?}") };
    assert!(matches!(merge.step.action, ChainStep::Merge { .. }), "{merge:?}");
    let [switch] = &merge.nested[..] else { panic!("{merge:?}") };
    assert!(matches!(switch.step.action, ChainStep::SwitchActive { .. }), "{switch:?}");
    assert!(matches!(remove.step.action, ChainStep::Remove { .. }), "{remove:?}");
}

/// A running domain whose active path is new has no step nested in the cut.
#[test]
fn new_active_path_has_no_step_in_the_cut() {
    let mut machine = Machine::new();
    machine.perform(&Action::Power(true));
    let capabilities = Capabilities::new(PointKind::External, 40).both_kinds();
    let plan = |request: &DiskRequest| {
        chain::plan(&machine.record, &machine.state(), ActivePath::New, &capabilities, request, &mut |run| {
            Ok(machine.visible(run))
        })
        .unwrap()
    };
    let create = |kind| DiskRequest::Create {
        kind: Some(kind),
        method: None,
        name: SnapshotName::new("s").unwrap(),
        overlay: None,
        keep: vec![],
        stamp: 0x77,
    };
    let external = plan(&create(PointKind::External));
    let instant = external.instant.as_ref().unwrap();
    assert!(matches!(instant.take, DiskInstant::Overlay { .. }) && instant.nested.is_empty());
    assert_eq!(external.steps().count(), external.prepare.len());
    assert!(matches!(external.prepare.last().unwrap().action, ChainStep::CreateOverlay { .. }));
    let internal = plan(&create(PointKind::Internal));
    assert_eq!(internal.instant.as_ref().unwrap().take, DiskInstant::Internal { tag: "s".to_owned() });
    assert_eq!(internal.steps().count(), 0);
    assert_eq!(internal.point, Some(Point::internal(machine.record.active.clone(), "s")));
}

/// A tag of a frozen open layer is dropped in a detached section, and one of the active layer is not.
#[test]
fn only_tags_of_frozen_layers_need_detaching() {
    let mut machine = Machine::new();
    machine.perform(&Action::Create(PointKind::Internal));
    machine.perform(&Action::Create(PointKind::External));
    machine.perform(&Action::Create(PointKind::Internal));
    machine.perform(&Action::Power(true));
    let tags: Vec<Point> = machine.keep().into_iter().filter(|point| point.tag.is_some()).collect();
    let keep = machine.keep().into_iter().filter(|point| point.tag.is_none()).collect();
    let plan = machine.plan(&DiskRequest::Delete { drop: tags, keep, force: false }).unwrap();
    let of_active = |finish: &FinishStep<ChainStep>| match &finish.step.action {
        ChainStep::DropInternal { layer, .. } => *layer == machine.record.active,
        other => panic!("no tag is dropped by {other:?}"),
    };
    let ([section], [alone]) = (&plan.detached[..], &plan.finish[..]) else { panic!("{plan:?}") };
    assert!(of_active(alone) && !of_active(section), "{plan:?}");
}
