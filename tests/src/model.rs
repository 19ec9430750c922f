//! What each point of a domain's tree must hold: byte vectors and a tree, kept beside the real thing.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::qemu::Write;

/// One disk's bytes.
pub type Bytes = Arc<Vec<u8>>;

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its parent's name.
    pub parent: Option<String>,
    /// Each disk's bytes, by target.
    pub disks: BTreeMap<String, Bytes>,
}

/// A domain's tree and its present.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Model {
    /// Every snapshot by name.
    pub snapshots: BTreeMap<String, Snapshot>,
    /// The snapshot that the current state grew from.
    pub current: Option<String>,
    /// The current state, by target.
    pub present: BTreeMap<String, Bytes>,
    /// What the last revert replaced, where it is kept.
    pub previous: Option<Snapshot>,
    /// The domains that were made of snapshots: each disk's bytes, by target.
    pub clones: BTreeMap<String, BTreeMap<String, Bytes>>,
}

impl Model {
    /// The snapshot `of` has clones of these names.
    pub fn clone_to(&mut self, names: &[&str], of: &str) {
        let disks = &self.snapshots[of].disks;
        self.clones.extend(names.iter().map(|name| ((*name).to_owned(), disks.clone())));
    }

    /// Writes to a disk of the current state.
    pub fn write(&mut self, target: &str, writes: &[Write]) {
        let bytes = Arc::make_mut(self.present.get_mut(target).expect("a target of the model"));
        for write in writes {
            let (start, end) = (write.offset as usize, (write.offset + write.length) as usize);
            bytes[start..end].fill(write.byte.unwrap_or(0));
        }
    }

    /// The current state gets the name `name`.
    pub fn create(&mut self, name: &str) {
        self.create_of(name, &self.present.keys().cloned().collect::<Vec<_>>());
    }

    /// The current state of `targets` alone gets the name `name`.
    pub fn create_of(&mut self, name: &str, targets: &[String]) {
        let disks = self.present.iter().filter(|(target, _)| targets.contains(target));
        let disks = disks.map(|(target, bytes)| (target.clone(), bytes.clone())).collect();
        let snapshot = Snapshot { parent: self.current.take(), disks };
        assert!(self.snapshots.insert(name.to_owned(), snapshot).is_none(), "{name} exists in the model");
        self.current = Some(name.to_owned());
        self.previous = None;
    }

    /// The current state becomes what `name` holds.
    pub fn revert(&mut self, name: &str) {
        for (target, bytes) in &self.snapshots[name].disks {
            self.present.insert(target.clone(), bytes.clone());
        }
        self.current = Some(name.to_owned());
        self.previous = None;
    }

    /// The current state becomes what `name` holds, and what it was is kept.
    pub fn revert_and_keep(&mut self, name: &str) {
        let reverted = self.snapshots[name].disks.keys();
        let disks = reverted.map(|target| (target.clone(), self.present[target].clone())).collect();
        let previous = Snapshot { parent: self.current.clone(), disks };
        self.revert(name);
        self.previous = Some(previous);
    }

    /// The current state and the one that is kept change places.
    pub fn undo(&mut self) {
        let kept = self.previous.take().expect("a state to go back to");
        let targets = kept.disks.keys();
        let disks = targets.map(|target| (target.clone(), self.present[target].clone())).collect();
        self.previous = Some(Snapshot { parent: self.current.take(), disks });
        self.present.extend(kept.disks);
        self.current = kept.parent;
    }

    /// `name` is called `new`.
    pub fn rename(&mut self, name: &str, new: &str) {
        let snapshot = self.snapshots.remove(name).expect("a snapshot of the model");
        self.snapshots.insert(new.to_owned(), snapshot);
        let kept = self.previous.iter_mut().map(|kept| &mut kept.parent);
        let parents = self.snapshots.values_mut().map(|snapshot| &mut snapshot.parent);
        for parent in parents.chain(kept).chain([&mut self.current]) {
            if parent.as_deref() == Some(name) {
                *parent = Some(new.to_owned());
            }
        }
    }

    /// `name` and all that grew from it.
    pub fn subtree(&self, name: &str) -> Vec<String> {
        let mut found = vec![name.to_owned()];
        let mut next = 0;
        while next < found.len() {
            let parent = found[next].clone();
            let children = self.snapshots.iter().filter(|(_, s)| s.parent.as_ref() == Some(&parent));
            found.extend(children.map(|(name, _)| name.clone()));
            next += 1;
        }
        found
    }

    /// `names` go; what grew from one of them now grows from its parent.
    pub fn delete(&mut self, names: &[String]) {
        for name in names {
            let gone = self.snapshots.remove(name).expect("a snapshot of the model");
            let all = self.snapshots.values_mut().chain(&mut self.previous);
            for other in all.filter(|s| s.parent.as_ref() == Some(name)) {
                other.parent.clone_from(&gone.parent);
            }
            if self.current.as_ref() == Some(name) {
                self.current = gone.parent;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        let mut model = Model::default();
        model.present.insert("vda".into(), Arc::new(vec![0; 8]));
        model
    }

    fn put(byte: u8) -> [Write; 1] {
        [Write { offset: 0, length: 8, byte: Some(byte) }]
    }

    #[test]
    fn a_snapshot_keeps_what_the_present_was() {
        let mut model = model();
        model.write("vda", &put(1));
        model.create("a");
        model.write("vda", &put(2));
        assert_eq!(*model.snapshots["a"].disks["vda"], vec![1; 8]);
        model.revert("a");
        assert_eq!(*model.present["vda"], vec![1; 8]);
    }

    #[test]
    fn an_undo_of_an_undo_is_the_identity() {
        let mut model = model();
        for name in ["a", "b"] {
            model.create(name);
            model.write("vda", &put(name.as_bytes()[0]));
        }
        model.revert_and_keep("a");
        let reverted = model.clone();
        model.undo();
        assert_eq!((model.current.as_deref(), &model.present["vda"][..]), (Some("b"), &[b'b'; 8][..]));
        model.undo();
        assert_eq!(model, reverted);
    }

    #[test]
    fn a_delete_hands_the_children_to_the_parent() {
        let mut model = model();
        for name in ["a", "b", "c"] {
            model.create(name);
        }
        assert_eq!(model.subtree("b"), ["b", "c"]);
        model.delete(&["b".into()]);
        assert_eq!(model.snapshots["c"].parent.as_deref(), Some("a"));
        model.delete(&["c".into()]);
        assert_eq!(model.current.as_deref(), Some("a"));
    }
}
