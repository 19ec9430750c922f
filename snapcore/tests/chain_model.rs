//! The chain planner against a model: steps are carried out on layers of plain maps, and after every operation each
//! point and the present must read as they did when they were taken.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use snapcore::chain::{self, ChainStep};
use snapcore::{
    ActivePath, Capabilities, Disk, DiskPlan, DiskRecord, DiskRequest, DiskState, Edit, InternalPoint, Layer,
    LayerName, Point, PointKind, SnapshotName, Target,
};

const CLUSTERS: u8 = 6;

/// What one state of a layer maps itself: cluster to content.
type Map = BTreeMap<u8, u32>;

#[derive(Debug, Clone, Default)]
struct Image {
    own: Map,
    tags: BTreeMap<String, Map>,
    backing: Option<LayerName>,
    named: bool,
}

#[derive(Debug)]
struct Machine {
    record: DiskRecord,
    images: BTreeMap<LayerName, Image>,
    /// What the configured path names.
    path: LayerName,
    points: BTreeMap<u32, (Point, Map)>,
    present: Map,
    stamp: u32,
    foreign: Vec<(LayerName, Map)>,
}

impl Machine {
    fn new() -> Self {
        let disk = Disk {
            target: Target::new("vda").unwrap(),
            path: "/vm/disk.qcow2".into(),
            format: "model".to_owned(),
        };
        let base = chain::layer_name(&disk.path, 0);
        let record = DiskRecord { disk, active: base.clone(), owned: vec![base.clone()] };
        let images = BTreeMap::from([(base.clone(), Image::default())]);
        Self {
            record,
            images,
            path: base,
            points: BTreeMap::new(),
            present: Map::new(),
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
        let layers = self.images.iter().map(|(name, image)| Layer {
            name: name.clone(),
            file: chain::layer_path(&self.record.disk.path, name),
            format: "model".to_owned(),
            named: image.named,
            backing: image.backing.clone(),
            owned: self.record.owned.contains(name),
            virtual_size: u64::from(CLUSTERS),
            allocated: image.own.len() as u64,
            internal: image
                .tags
                .keys()
                .map(|tag| InternalPoint {
                    tag: tag.clone(),
                    virtual_size: u64::from(CLUSTERS),
                    created: jiff::Timestamp::UNIX_EPOCH,
                    vm_state_size: 0,
                })
                .collect(),
            dependents: self
                .foreign
                .iter()
                .filter(|(on, _)| on == name)
                .map(|_| "/elsewhere/clone.qcow2".into())
                .collect(),
        });
        DiskState {
            target: self.record.disk.target.clone(),
            active: self.record.active.clone(),
            layers: layers.collect(),
            attached: false,
            on_path: Vec::new(),
            unclear: Vec::new(),
        }
    }

    fn keep(&self) -> Vec<Point> {
        self.points.values().map(|(point, _)| point.clone()).collect()
    }

    fn plan(&self, request: &DiskRequest) -> snapcore::Result<DiskPlan> {
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

    fn run(&mut self, plan: &DiskPlan) {
        let mut committed = false;
        for planned in &plan.steps {
            if planned.group == snapcore::Group::Finish && !committed {
                self.edit(&plan.commit);
                committed = true;
            }
            let step: ChainStep = serde_json::from_value(planned.step.action.clone()).unwrap();
            self.step(step);
            self.edit(&planned.edits);
        }
        if !committed {
            self.edit(&plan.commit);
        }
    }

    fn step(&mut self, step: ChainStep) {
        match step {
            ChainStep::NameLayer { layer } => {
                assert_eq!(self.path, layer, "only what the configured path names can be given a name");
                self.images.get_mut(&layer).unwrap().named = true;
            }
            ChainStep::CreateOverlay { layer, on, .. } => {
                assert!(self.images[&on].named, "an overlay must stand on a permanent name");
                let image = Image { backing: Some(on), named: true, ..Image::default() };
                assert!(self.images.insert(layer, image).is_none());
            }
            ChainStep::Materialise { from, tag, layer } => {
                let source = &self.images[&from];
                let image = Image {
                    own: source.tags[&tag].clone(),
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
                image.own = image.tags[&tag].clone();
            }
            ChainStep::DropInternal { layer, tags } => {
                for tag in tags {
                    assert!(self.images.get_mut(&layer).unwrap().tags.remove(&tag).is_some());
                }
            }
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
        let active = &self.images[&self.record.active];
        assert_eq!(self.read(&self.record.active, &active.own), self.present, "the present");
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
                let active = self.record.active.clone();
                self.images.get_mut(&active).unwrap().own.insert(*at, *value);
                self.present.insert(*at, *value);
            }
            Action::Create(kind) => {
                let stamp = self.next_stamp();
                let plan = self
                    .plan(&DiskRequest::Create {
                        kind: Some(*kind),
                        name: SnapshotName::new(format!("s{stamp}")).unwrap(),
                        overlay: None,
                        keep: self.keep(),
                        stamp,
                    })
                    .unwrap();
                self.run(&plan);
                self.points.insert(stamp, (plan.point.unwrap(), self.present.clone()));
            }
            Action::Revert(which, save, undoable) => {
                let Some((to, content)) = self.points.values().nth(which % self.points.len().max(1)).cloned()
                else {
                    return;
                };
                let stamp = self.next_stamp();
                let save = save.then(|| SnapshotName::new(format!("s{stamp}")).unwrap());
                let plan = self
                    .plan(&DiskRequest::Revert {
                        to,
                        save: save.clone(),
                        keep: self.keep(),
                        undoable: *undoable,
                        stamp,
                    })
                    .unwrap();
                assert!(!(*undoable && plan.irrevocable));
                self.run(&plan);
                if save.is_some() {
                    self.points.insert(stamp, (plan.point.unwrap(), self.present.clone()));
                }
                self.present = content;
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
                let plan = self.plan(&DiskRequest::Delete { drop, keep: self.keep() }).unwrap();
                self.run(&plan);
                if self.points.is_empty() && self.foreign.is_empty() {
                    assert_eq!(self.images.len(), 1, "nothing is left to keep, yet layers are");
                    assert!(!self.images[&self.path].named, "one file as in the beginning");
                }
            }
            Action::Clone(which) => {
                // Somebody makes an overlay of his own on a frozen layer.
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
    Revert(usize, bool, bool),
    Delete(u16),
    Clone(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        4 => (0..CLUSTERS, any::<u32>()).prop_map(|(at, value)| Action::Write(at, value)),
        2 => Just(Action::Create(PointKind::Internal)),
        3 => Just(Action::Create(PointKind::External)),
        3 => (any::<usize>(), any::<bool>(), any::<bool>()).prop_map(|(w, s, u)| Action::Revert(w, s, u)),
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
fn a_chain_beyond_the_limit_is_refused_with_words() {
    let mut machine = Machine::new();
    for _ in 0..39 {
        machine.perform(&Action::Create(PointKind::External));
    }
    let error = machine
        .plan(&DiskRequest::Create {
            kind: Some(PointKind::External),
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
    let plan = machine.plan(&DiskRequest::Delete { drop: machine.keep(), keep: vec![] }).unwrap();
    assert_eq!(plan.steps[0].step.bytes, 1, "{plan:?}");

    // An overlay that hides all of its base: nothing has to be moved up.
    for at in 0..CLUSTERS {
        machine.perform(&Action::Write(at, 9));
    }
    let plan = machine.plan(&DiskRequest::Delete { drop: machine.keep(), keep: vec![] }).unwrap();
    assert_eq!(plan.steps[0].step.bytes, 0, "{plan:?}");
}
