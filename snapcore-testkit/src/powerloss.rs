//! What a directory may hold after the power went.
//!
//! Built from the directory as it was ([`Baseline`]) and the record of every operation since then. The model
//! is harsher than any one file system, and no harsher than what POSIX and Linux promise:
//!
//! - **Data.** What was written to a file before its last flush is there. Of each write (or zeroing) since
//!   then, each 512-byte sector is kept or lost by itself, in any order. A lost sector holds what it held
//!   before.
//! - **Length.** The changes of a file's length since its last flush survive as a prefix: a file may be
//!   shorter than what was written to it, and where it is longer, sectors that were lost read as zeros.
//! - **Names.** Operations on the names of a directory survive up to its last flush, and after that as a
//!   prefix, chosen for each directory by itself. A name may therefore survive whose file was never flushed,
//!   and is empty or partial then. A file whose last name survived the unlink, because the unlink was lost,
//!   has its data.
//! - `fsync` and `fdatasync` are the same; neither makes the file's name durable; `sync_file_range` promises
//!   nothing.
//!
//! Not modelled, and refused with a message: renames and exchanges across directories, since nothing here
//! does them.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use crate::record::{Kind, Record};
use crate::seed::Seed;

/// What a sector is to a drive: written wholly or not at all.
pub const SECTOR: usize = 512;

type Node = usize;

#[derive(Debug, Clone)]
enum Change {
    Write { offset: u64, data: Vec<u8> },
    Zero { offset: u64, length: u64 },
    SetLen(u64),
}

#[derive(Debug, Clone)]
enum NameChange {
    Add(Vec<u8>, Node),
    Remove(Vec<u8>),
    Move(Vec<u8>, Vec<u8>),
    Swap(Vec<u8>, Vec<u8>),
}

type Names = BTreeMap<Vec<u8>, Node>;

#[derive(Debug, Clone)]
enum Body {
    File { durable: Vec<u8>, pending: Vec<Change> },
    Directory { durable: Names, live: Names, pending: Vec<NameChange> },
}

/// A directory tree, as it is durable and as it is.
#[derive(Debug, Clone)]
struct Disk {
    root: PathBuf,
    nodes: Vec<Body>,
    by_inode: HashMap<(u64, u64), Node>,
}

/// A directory as it was before the run, all of it durable.
#[derive(Debug, Clone)]
pub struct Baseline(Disk);

/// How much is lost.
#[derive(Debug, Clone, Copy)]
enum Fate {
    All,
    Nothing,
    /// Each change wholly kept or lost.
    Whole(u64),
    /// Each sector by itself.
    Sectors(u64),
}

impl Baseline {
    /// Reads the tree below `root` (canonical), following hard links by inode. SQLite's `-shm` files are left
    /// out.
    ///
    /// # Errors
    /// What cannot be read, or is neither file nor directory.
    pub fn read(root: &Path) -> Result<Baseline> {
        let mut disk = Disk { root: root.to_owned(), nodes: Vec::new(), by_inode: HashMap::new() };
        disk.read(root)?;
        Ok(Baseline(disk))
    }

    /// The directory at the instant after `done` of `records`, with losses drawn from `seed`, built at
    /// `target`, which must not exist.
    ///
    /// # Errors
    /// A record that does not fit the directory, or what is not modelled.
    pub fn lose_power(&self, records: &[Record], done: usize, seed: u64, target: &Path) -> Result<()> {
        let mut disk = self.0.clone();
        for (number, record) in records[..done].iter().enumerate() {
            disk.apply(record).with_context(|| format!("record {number}: {:?}", record.kind))?;
        }
        disk.resolve(&mut Seed::new(seed));
        disk.build(0, target, &mut HashMap::new())
    }
}

impl Disk {
    fn read(&mut self, path: &Path) -> Result<Node> {
        let meta = fs::symlink_metadata(path).with_context(|| format!("stat {}", path.display()))?;
        let key = (meta.dev(), meta.ino());
        if let Some(&node) = self.by_inode.get(&key) {
            return Ok(node);
        }
        let node = self.nodes.len();
        self.by_inode.insert(key, node);
        if meta.is_file() {
            let durable = fs::read(path).with_context(|| format!("read {}", path.display()))?;
            self.nodes.push(Body::File { durable, pending: Vec::new() });
        } else if meta.is_dir() {
            self.nodes.push(directory());
            let mut names = Names::new();
            for entry in fs::read_dir(path)? {
                let name = entry?.file_name();
                if !name.as_bytes().ends_with(b"-shm") {
                    names.insert(name.as_bytes().to_vec(), self.read(&path.join(&name))?);
                }
            }
            self.nodes[node] = Body::Directory { durable: names.clone(), live: names, pending: Vec::new() };
        } else {
            bail!("{} is neither file nor directory", path.display());
        }
        Ok(node)
    }

    fn node(&self, record: &Record) -> Result<Node> {
        let key = (record.dev, record.ino);
        self.by_inode.get(&key).copied().ok_or_else(|| anyhow!("inode {key:?} was never created"))
    }

    fn file(&mut self, node: Node) -> Result<(&mut Vec<u8>, &mut Vec<Change>)> {
        match &mut self.nodes[node] {
            Body::File { durable, pending } => Ok((durable, pending)),
            Body::Directory { .. } => bail!("a directory is written like a file"),
        }
    }

    /// The directory that holds `path`, and the name in it.
    fn parent(&self, path: &[u8]) -> Result<(Node, Vec<u8>)> {
        let path = Path::new(OsStr::from_bytes(path));
        let below =
            path.strip_prefix(&self.root).with_context(|| format!("{} is not below", path.display()))?;
        let name = below.file_name().context("the root itself is renamed or removed")?;
        let mut node = 0;
        for part in below.parent().into_iter().flat_map(Path::components) {
            let Body::Directory { live, .. } = &self.nodes[node] else { bail!("{part:?} is in a file") };
            node = *live
                .get(part.as_os_str().as_bytes())
                .ok_or_else(|| anyhow!("{} has no {part:?}", path.display()))?;
        }
        Ok((node, name.as_bytes().to_vec()))
    }

    fn change_name(&mut self, directory: Node, change: NameChange) -> Result<()> {
        match &mut self.nodes[directory] {
            Body::Directory { live, pending, .. } => {
                change.apply(live);
                pending.push(change);
                Ok(())
            }
            Body::File { .. } => bail!("a file is used as a directory"),
        }
    }

    fn apply(&mut self, record: &Record) -> Result<()> {
        match record.kind {
            Kind::Write => {
                let node = self.node(record)?;
                let change = Change::Write { offset: record.offset, data: record.data.clone() };
                self.file(node)?.1.push(change);
            }
            Kind::Zero => {
                let node = self.node(record)?;
                let change = Change::Zero { offset: record.offset, length: record.length };
                self.file(node)?.1.push(change);
            }
            Kind::SetLen => {
                let node = self.node(record)?;
                self.file(node)?.1.push(Change::SetLen(record.length));
            }
            Kind::Flush => {
                let node = self.node(record)?;
                self.nodes[node].flush();
            }
            Kind::FlushAll => self.nodes.iter_mut().for_each(Body::flush),
            Kind::Create | Kind::MakeDir => {
                let node = self.nodes.len();
                self.nodes.push(match record.kind {
                    Kind::MakeDir => directory(),
                    _ => Body::File { durable: Vec::new(), pending: Vec::new() },
                });
                // The number may be that of a file that went: from now on it means the new one.
                self.by_inode.insert((record.dev, record.ino), node);
                if !record.path.is_empty() {
                    let (parent, name) = self.parent(&record.path)?;
                    self.change_name(parent, NameChange::Add(name, node))?;
                }
            }
            Kind::Link => {
                let node = self.node(record)?;
                let (parent, name) = self.parent(&record.path)?;
                self.change_name(parent, NameChange::Add(name, node))?;
            }
            Kind::Unlink => {
                let (parent, name) = self.parent(&record.path)?;
                self.change_name(parent, NameChange::Remove(name))?;
            }
            Kind::Rename | Kind::Exchange => {
                let (from, old) = self.parent(&record.path)?;
                let (to, new) = self.parent(&record.path2)?;
                if from != to {
                    bail!("a rename across directories is not modelled");
                }
                self.change_name(
                    from,
                    match record.kind {
                        Kind::Rename => NameChange::Move(old, new),
                        _ => NameChange::Swap(old, new),
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Decides about everything pending.
    fn resolve(&mut self, seed: &mut Seed) {
        let fates = [
            Fate::All,
            Fate::Nothing,
            Fate::Whole(50),
            Fate::Sectors(10),
            Fate::Sectors(50),
            Fate::Sectors(90),
        ];
        // Often everything has one fate; else each file has its own, which is what reorders files against
        // each other.
        let common = seed.chance(40).then(|| seed.pick(&fates));
        for node in &mut self.nodes {
            let fate = common.unwrap_or_else(|| seed.pick(&fates));
            node.resolve(fate, seed);
        }
    }

    fn build(&self, node: Node, target: &Path, built: &mut HashMap<Node, PathBuf>) -> Result<()> {
        match &self.nodes[node] {
            Body::Directory { live, .. } => {
                fs::create_dir(target).with_context(|| format!("create {}", target.display()))?;
                for (name, &child) in live {
                    self.build(child, &target.join(OsStr::from_bytes(name)), built)?;
                }
            }
            Body::File { durable, .. } => {
                if let Some(first) = built.get(&node) {
                    return fs::hard_link(first, target)
                        .with_context(|| format!("link {}", target.display()));
                }
                let file =
                    fs::File::create_new(target).with_context(|| format!("create {}", target.display()))?;
                file.set_len(durable.len() as u64)?;
                for (number, block) in durable.chunks(4096).enumerate() {
                    if block.iter().any(|byte| *byte != 0) {
                        file.write_all_at(block, number as u64 * 4096)?;
                    }
                }
                built.insert(node, target.to_owned());
            }
        }
        Ok(())
    }
}

fn directory() -> Body {
    Body::Directory { durable: Names::new(), live: Names::new(), pending: Vec::new() }
}

impl NameChange {
    fn apply(&self, names: &mut Names) {
        match self {
            NameChange::Add(name, node) => {
                names.insert(name.clone(), *node);
            }
            NameChange::Remove(name) => {
                names.remove(name);
            }
            NameChange::Move(old, new) => {
                if let Some(node) = names.remove(old) {
                    names.insert(new.clone(), node);
                }
            }
            NameChange::Swap(one, other) => {
                if let (Some(&a), Some(&b)) = (names.get(one), names.get(other)) {
                    names.insert(one.clone(), b);
                    names.insert(other.clone(), a);
                }
            }
        }
    }
}

impl Change {
    /// The file's length after this change of a file of length `length`.
    fn length_after(&self, length: u64) -> u64 {
        match self {
            Change::Write { offset, data } => length.max(offset + data.len() as u64),
            Change::Zero { .. } => length,
            Change::SetLen(new) => *new,
        }
    }

    /// Writes the part of this change that `keep` keeps, sector by sector, extending `bytes` where it must.
    fn write(&self, bytes: &mut Vec<u8>, mut keep: impl FnMut() -> bool) {
        let (offset, length) = match self {
            Change::Write { offset, data } => (*offset as usize, data.len()),
            Change::Zero { offset, length } => (*offset as usize, *length as usize),
            Change::SetLen(_) => return,
        };
        let mut at = offset;
        while at < offset + length {
            let end = ((at / SECTOR + 1) * SECTOR).min(offset + length);
            if keep() {
                match self {
                    Change::Write { data, .. } => {
                        if bytes.len() < end {
                            bytes.resize(end, 0);
                        }
                        bytes[at..end].copy_from_slice(&data[at - offset..end - offset]);
                    }
                    Change::Zero { .. } => {
                        let end = end.min(bytes.len());
                        if at < end {
                            bytes[at..end].fill(0);
                        }
                    }
                    Change::SetLen(_) => {}
                }
            }
            at = end;
        }
    }
}

impl Body {
    /// All of it is durable now.
    fn flush(&mut self) {
        match self {
            Body::File { durable, pending } => {
                for change in pending.drain(..) {
                    change.write(durable, || true);
                    durable.resize(change.length_after(durable.len() as u64) as usize, 0);
                }
            }
            Body::Directory { durable, live, pending } => {
                durable.clone_from(live);
                pending.clear();
            }
        }
    }

    /// The power went: what is pending becomes durable, or is lost.
    fn resolve(&mut self, fate: Fate, seed: &mut Seed) {
        match self {
            Body::Directory { durable, live, pending } => {
                let kept = match fate {
                    Fate::All => pending.len(),
                    Fate::Nothing => 0,
                    Fate::Whole(_) | Fate::Sectors(_) => seed.below(pending.len() as u64 + 1) as usize,
                };
                for change in pending.drain(..).take(kept) {
                    change.apply(durable);
                }
                live.clone_from(durable);
            }
            Body::File { durable, pending } => {
                let mut lengths = vec![durable.len() as u64];
                for change in pending.iter() {
                    let last = lengths[lengths.len() - 1];
                    let next = change.length_after(last);
                    if next != last {
                        lengths.push(next);
                    }
                }
                let kept = match fate {
                    Fate::All => lengths.len() - 1,
                    Fate::Nothing => 0,
                    Fate::Whole(_) | Fate::Sectors(_) => seed.below(lengths.len() as u64) as usize,
                };
                let (mut length, mut length_changes) = (lengths[0], 0);
                for change in pending.drain(..) {
                    match fate {
                        Fate::All => change.write(durable, || true),
                        Fate::Nothing => {}
                        Fate::Whole(percent) => {
                            let keep = seed.chance(percent);
                            change.write(durable, || keep);
                        }
                        Fate::Sectors(percent) => change.write(durable, || seed.chance(percent)),
                    }
                    let next = change.length_after(length);
                    length_changes += usize::from(next != length);
                    // A shrinking that survives takes away what was beyond it, also where the file grew again
                    // later.
                    if next < length && length_changes <= kept {
                        durable.truncate(next as usize);
                    }
                    length = next;
                }
                durable.resize(lengths[kept] as usize, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Run {
        dir: tempfile::TempDir,
        records: Vec<Record>,
        baseline: Baseline,
    }

    impl Run {
        /// A directory with a durable file `old` of two sectors of `o`.
        fn new() -> Run {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("root")).unwrap();
            fs::write(dir.path().join("root/old"), [b'o'; 2 * SECTOR]).unwrap();
            let baseline = Baseline::read(&dir.path().join("root")).unwrap();
            Run { dir, records: Vec::new(), baseline }
        }

        fn path(&self, name: &str) -> Vec<u8> {
            self.dir.path().join("root").join(name).as_os_str().as_bytes().to_vec()
        }

        fn old(&self) -> (u64, u64) {
            let meta = fs::metadata(self.dir.path().join("root/old")).unwrap();
            (meta.dev(), meta.ino())
        }

        fn root(&self) -> (u64, u64) {
            let meta = fs::metadata(self.dir.path().join("root")).unwrap();
            (meta.dev(), meta.ino())
        }

        fn push(&mut self, kind: Kind, (dev, ino): (u64, u64), edit: impl FnOnce(&mut Record)) {
            let mut record = Record::new(kind, dev, ino);
            edit(&mut record);
            self.records.push(record);
        }

        fn write(&mut self, file: (u64, u64), offset: u64, data: &[u8]) {
            self.push(Kind::Write, file, |r| {
                r.offset = offset;
                r.data = data.to_vec();
            });
        }

        /// What each name holds after losing power at the end, for many seeds.
        fn outcomes(&self) -> Vec<BTreeMap<String, Vec<u8>>> {
            (0..300)
                .map(|seed| {
                    let target = self.dir.path().join(format!("after{seed}"));
                    self.baseline.lose_power(&self.records, self.records.len(), seed, &target).unwrap();
                    let mut names = BTreeMap::new();
                    for entry in fs::read_dir(&target).unwrap() {
                        let entry = entry.unwrap();
                        let name = entry.file_name().into_string().unwrap();
                        names.insert(name, fs::read(entry.path()).unwrap());
                    }
                    fs::remove_dir_all(&target).unwrap();
                    names
                })
                .collect()
        }
    }

    #[test]
    fn what_was_flushed_survives_every_seed() {
        let mut run = Run::new();
        run.write(run.old(), 0, &[b'n'; SECTOR]);
        run.push(Kind::Flush, run.old(), |_| {});
        let mut wanted = vec![b'n'; SECTOR];
        wanted.extend([b'o'; SECTOR]);
        assert!(run.outcomes().iter().all(|names| names["old"] == wanted));
    }

    /// Sectors since the flush are kept or lost one by one.
    #[test]
    fn unflushed_sectors_are_lost_singly() {
        let mut run = Run::new();
        run.write(run.old(), 0, &[b'n'; 2 * SECTOR]);
        let mut seen = std::collections::BTreeSet::new();
        for names in run.outcomes() {
            let old = &names["old"];
            assert_eq!(old.len(), 2 * SECTOR);
            for sector in old.chunks(SECTOR) {
                assert!(sector.iter().all(|b| *b == sector[0]), "a sector was torn");
            }
            seen.insert((old[0], old[SECTOR]));
        }
        assert_eq!(seen.len(), 4, "each of the four combinations must occur: {seen:?}");
    }

    /// A length that was not flushed may be lost or leave zeros.
    #[test]
    fn unflushed_length_is_lost_or_zeros() {
        let mut run = Run::new();
        run.write(run.old(), 2 * SECTOR as u64, &[b'n'; SECTOR]);
        let (mut short, mut zeros, mut whole) = (false, false, false);
        for names in run.outcomes() {
            let old = &names["old"];
            assert_eq!(&old[..2 * SECTOR], [b'o'; 2 * SECTOR]);
            match old[2 * SECTOR..] {
                [] => short = true,
                [0, ..] => zeros = true,
                [b'n', ..] => whole = true,
                _ => panic!("{:?} was never there", old[2 * SECTOR]),
            }
        }
        assert!(short && zeros && whole);
    }

    /// A truncation and growth never brings back what was cut off.
    #[test]
    fn truncated_bytes_never_return() {
        let mut run = Run::new();
        run.push(Kind::SetLen, run.old(), |r| r.length = SECTOR as u64);
        run.push(Kind::SetLen, run.old(), |r| r.length = 3 * SECTOR as u64);
        for names in run.outcomes() {
            let old = &names["old"];
            assert_eq!(&old[..SECTOR], [b'o'; SECTOR]);
            match old.len() / SECTOR {
                1 => {}
                2 => assert_eq!(old[SECTOR..], [b'o'; SECTOR]),
                3 => assert_eq!(old[SECTOR..], [0; 2 * SECTOR]),
                other => panic!("{other} sectors"),
            }
        }
    }

    /// A name survives without its data unless the file was flushed.
    #[test]
    fn name_survives_without_data() {
        let mut run = Run::new();
        let (path, file) = (run.path("new"), (1, 1));
        run.push(Kind::Create, file, |r| r.path = path);
        run.write(file, 0, b"data");
        run.push(Kind::Flush, run.root(), |_| {});
        let outcomes = run.outcomes();
        assert!(outcomes.iter().all(|names| names.contains_key("new")));
        assert!(outcomes.iter().any(|names| names["new"].is_empty()));
        assert!(outcomes.iter().any(|names| names["new"] == b"data"));
        run.push(Kind::Flush, file, |_| {});
        assert!(run.outcomes().iter().all(|names| names["new"] == b"data"));
    }

    #[test]
    fn name_operations_survive_as_a_prefix() {
        let mut run = Run::new();
        let (new, moved, old) = (run.path("new"), run.path("moved"), run.path("old"));
        run.push(Kind::Create, (1, 1), |r| r.path = new.clone());
        run.push(Kind::Rename, (1, 1), |r| (r.path, r.path2) = (new, moved));
        run.push(Kind::Unlink, (0, 0), |r| r.path = old);
        let mut seen: Vec<Vec<String>> =
            run.outcomes().into_iter().map(|n| n.into_keys().collect()).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen, [vec!["moved"], vec!["moved", "old"], vec!["new", "old"], vec!["old"]]);
    }

    #[test]
    fn hard_links_stay_one_file() {
        let mut run = Run::new();
        let path = run.path("second");
        run.push(Kind::Link, run.old(), |r| r.path = path);
        run.push(Kind::Flush, run.root(), |_| {});
        run.write(run.old(), 0, &[b'n'; SECTOR]);
        assert!(run.outcomes().iter().all(|names| names["second"] == names["old"]));
        let target = run.dir.path().join("linked");
        run.baseline.lose_power(&run.records, run.records.len(), 1, &target).unwrap();
        assert_eq!(fs::metadata(target.join("second")).unwrap().nlink(), 2);
    }

    #[test]
    fn an_inode_number_used_again_is_another_file() {
        let mut run = Run::new();
        let (old, new, number) = (run.path("old"), run.path("new"), run.old());
        run.push(Kind::Unlink, number, |r| r.path = old);
        run.push(Kind::Create, number, |r| r.path = new);
        run.write(number, 0, b"x");
        run.push(Kind::Flush, number, |_| {});
        for names in run.outcomes() {
            assert!(names.get("old").is_none_or(|data| data == &[b'o'; 2 * SECTOR]));
            assert!(names.get("new").is_none_or(|data| data == b"x"));
        }
    }

    #[test]
    fn rename_across_directories_is_refused() {
        let mut run = Run::new();
        let (dir, old, new) = (run.path("dir"), run.path("old"), run.path("dir/old"));
        run.push(Kind::MakeDir, (1, 2), |r| r.path = dir);
        run.push(Kind::Rename, run.old(), |r| (r.path, r.path2) = (old, new));
        let error = run.baseline.lose_power(&run.records, 2, 0, &run.dir.path().join("after")).unwrap_err();
        assert!(format!("{error:#}").contains("across directories"), "{error:#}");
    }
}
