//! What a domain's current state and each of its snapshots must hold: byte vectors and a tree.

use std::collections::BTreeMap;
use std::sync::Arc;

/// One disk's bytes.
pub type Bytes = Arc<Vec<u8>>;

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its parent's name.
    pub parent: Option<String>,
    /// Each disk's bytes, by target.
    pub disks: BTreeMap<String, Bytes>,
}

/// A domain's tree and its current state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Model {
    /// Every snapshot by name.
    pub points: BTreeMap<String, Point>,
    /// The snapshot that the current state descends from.
    pub current: Option<String>,
    /// The current state, by target.
    pub disks: BTreeMap<String, Bytes>,
}

impl Model {
    /// Writes to a disk.
    pub fn write(&mut self, target: &str, offset: u64, bytes: &[u8]) {
        if let Some(disk) = self.disks.get_mut(target) {
            let start = offset as usize;
            Arc::make_mut(disk)[start..start + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// Takes the snapshot `name`.
    pub fn create(&mut self, name: &str) {
        let point = Point { parent: self.current.take(), disks: self.disks.clone() };
        self.points.insert(name.to_owned(), point);
        self.current = Some(name.to_owned());
    }

    /// Reverts to `name`, after the current state is saved as `save` if that is given.
    pub fn revert(&mut self, name: &str, save: Option<&str>) {
        if let Some(save) = save {
            self.create(save);
        }
        if let Some(point) = self.points.get(name) {
            self.disks = point.disks.clone();
            self.current = Some(name.to_owned());
        }
    }

    /// `name` and its descendants.
    pub fn subtree(&self, name: &str) -> Vec<String> {
        let mut found = vec![name.to_owned()];
        let mut next = 0;
        while next < found.len() {
            let parent = &found[next];
            let children = self.points.iter().filter(|(_, point)| point.parent.as_ref() == Some(parent));
            let children: Vec<String> = children.map(|(name, _)| name.clone()).collect();
            found.extend(children);
            next += 1;
        }
        found
    }

    /// Deletes `names`: the children of each become its parent's.
    pub fn delete(&mut self, names: &[String]) {
        for name in names {
            let Some(gone) = self.points.remove(name) else { continue };
            for other in self.points.values_mut().filter(|point| point.parent.as_ref() == Some(name)) {
                other.parent.clone_from(&gone.parent);
            }
            if self.current.as_ref() == Some(name) {
                self.current = gone.parent;
            }
        }
    }

    /// The tree alone: every snapshot with its parent, and the current one.
    pub(crate) fn tree(&self) -> Tree {
        Tree {
            points: self.points.iter().map(|(name, point)| (name.clone(), point.parent.clone())).collect(),
            current: self.current.clone(),
        }
    }
}

/// Every snapshot with its parent, and the current one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tree {
    pub(crate) points: BTreeMap<String, Option<String>>,
    pub(crate) current: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        let mut model = Model::default();
        model.disks.insert("vda".into(), Arc::new(vec![0; 8]));
        model
    }

    #[test]
    fn point_keeps_state() {
        let mut model = model();
        model.write("vda", 2, &[1, 1]);
        model.create("a");
        model.write("vda", 0, &[2; 8]);
        assert_eq!(*model.points["a"].disks["vda"], [0, 0, 1, 1, 0, 0, 0, 0]);
        model.revert("a", Some("b"));
        assert_eq!(*model.disks["vda"], [0, 0, 1, 1, 0, 0, 0, 0]);
        assert_eq!(*model.points["b"].disks["vda"], [2; 8]);
        assert_eq!(model.current.as_deref(), Some("a"));
    }

    #[test]
    fn delete_moves_children_up() {
        let mut model = model();
        for name in ["a", "b", "c"] {
            model.create(name);
        }
        assert_eq!(model.subtree("b"), ["b", "c"]);
        model.delete(&["b".into()]);
        assert_eq!(model.points["c"].parent.as_deref(), Some("a"));
        model.delete(&["c".into()]);
        assert_eq!(model.current.as_deref(), Some("a"));
    }
}
