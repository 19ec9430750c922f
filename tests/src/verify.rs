//! Comparing what is on disk with the model, through QEMU, and looking for what was left behind.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::domain::{self, Domain};
use crate::model::{Bytes, Model};
use crate::qemu;
use crate::report::{self, Kind, List};

/// What was found right before, so that it need not be read through QEMU again.
///
/// The crash suites look at thousands of directories, most of which hold the same bytes as one before. What is
/// remembered is that a chain of files with *these bytes* reads as *those*; random layer names are masked.
#[derive(Debug, Default)]
pub struct Memo(HashSet<u64>);

/// Compares every point of the tree of `domain` (called `address` on the command line) with `model`; then the present,
/// by the configured paths; then checks every layer with `qemu-img check`; then looks for leftover files.
///
/// # Errors
/// The first difference, with the place and both values.
pub fn every_point(domain: &Domain, model: &Model, address: &str, memo: &mut Memo) -> Result<()> {
    let list = report::list(&domain.domsnap(), address)?;
    tree(&list, model)?;
    every_image(domain, &list, model, memo)
}

/// Compares names, parents and the current snapshot.
///
/// # Errors
/// Both trees, where they differ.
pub fn tree(list: &List, model: &Model) -> Result<()> {
    let found: BTreeMap<_, _> = list.snapshots.iter().map(|s| (s.name.clone(), s.parent.clone())).collect();
    let wanted: BTreeMap<_, _> = model.snapshots.iter().map(|(n, s)| (n.clone(), s.parent.clone())).collect();
    if found != wanted || list.snapshots.len() != wanted.len() {
        bail!("the tree (name: parent) should be {wanted:?}, domsnap lists {found:?}");
    }
    if list.current != model.current {
        bail!("the current snapshot should be {:?}, domsnap says {:?}", model.current, list.current);
    }
    Ok(())
}

/// Compares names alone.
///
/// # Errors
/// Both sets, where they differ.
pub fn names(list: &List, model: &Model) -> Result<()> {
    let mut found: Vec<_> = list.snapshots.iter().map(|s| s.name.as_str()).collect();
    found.sort_unstable();
    if !found.iter().copied().eq(model.snapshots.keys().map(String::as_str)) {
        bail!("the snapshots should be {:?}, domsnap lists {found:?}", model.snapshots.keys());
    }
    Ok(())
}

/// Compares the bytes of every point that `list` tells of, and the present; checks layers; looks for leftovers.
///
/// # Errors
/// The first difference.
pub fn every_image(domain: &Domain, list: &List, model: &Model, memo: &mut Memo) -> Result<()> {
    let dir = domain.disks();
    let mut needed = BTreeSet::new();
    for snapshot in &list.snapshots {
        let disks = &model.snapshots[&snapshot.name].disks;
        let told: BTreeSet<_> = snapshot.points.iter().map(|point| &point.target).collect();
        if !told.iter().copied().eq(disks.keys()) {
            bail!("{} should hold {:?}, domsnap tells of {told:?}", snapshot.name, disks.keys());
        }
        for point in &snapshot.points {
            let tag = match point.kind {
                Kind::Internal => Some(point.tag.as_deref().context("an internal point without its tag")?),
                Kind::External => None,
            };
            let layer = dir.join(&point.layer);
            bytes(&layer, tag, &disks[&point.target], memo)
                .with_context(|| format!("snapshot {}, disk {}", snapshot.name, point.target))?;
            needed.extend(chain(&layer)?);
        }
    }
    for (target, wanted) in &model.present {
        let path = domain.path(target);
        bytes(&path, None, wanted, memo).with_context(|| format!("the present of {target}"))?;
        needed.extend(chain(&path)?);
    }
    for layer in &needed {
        let key = fingerprint(layer, "check")?;
        if !memo.0.contains(&key) {
            qemu::check(layer)?;
            memo.0.insert(key);
        }
    }
    leftovers(&dir, &needed)
}

/// `image` (or the internal snapshot `tag` in it) reads as `wanted`, through QEMU.
///
/// # Errors
/// The first byte that differs.
pub fn bytes(image: &Path, tag: Option<&str>, wanted: &Bytes, memo: &mut Memo) -> Result<()> {
    let mut hasher = DefaultHasher::new();
    hasher.write(wanted);
    let key = fingerprint(image, &format!("bytes {tag:?} {:x}", hasher.finish()))?;
    if memo.0.contains(&key) {
        return Ok(());
    }
    let found = qemu::read(image, tag)?;
    if found.len() != wanted.len() {
        bail!("{} (tag {tag:?}) is {} bytes long, should be {}", image.display(), found.len(), wanted.len());
    }
    if found != **wanted {
        let differ = || (0..found.len()).filter(|at| found[*at] != wanted[*at]);
        let (first, count) = (differ().next().unwrap_or_default(), differ().count());
        bail!(
            "{} (tag {tag:?}) differs in {count} bytes, the first at {first}: {} there, should be {}",
            image.display(),
            found[first],
            wanted[first]
        );
    }
    memo.0.insert(key);
    Ok(())
}

/// The image file that `image` stands on, as its header says, relative to its directory.
///
/// # Errors
/// If it cannot be read, or is no qcow2.
pub fn backing(image: &Path) -> Result<Option<PathBuf>> {
    let file = std::fs::File::open(image).with_context(|| format!("open {}", image.display()))?;
    let mut head = [0; 20];
    file.read_exact_at(&mut head, 0).with_context(|| format!("{} has no header", image.display()))?;
    if &head[..4] != b"QFI\xfb" {
        bail!("{} is no qcow2", image.display());
    }
    let offset = u64::from_be_bytes(head[8..16].try_into()?);
    if offset == 0 {
        return Ok(None);
    }
    let mut name = vec![0; u32::from_be_bytes(head[16..20].try_into()?) as usize];
    file.read_exact_at(&mut name, offset)?;
    let name = String::from_utf8(name)?;
    Ok(Some(image.parent().context("an image in no directory")?.join(name)))
}

/// `image` and every image below it, from the top.
///
/// # Errors
/// If one cannot be read.
pub fn chain(image: &Path) -> Result<Vec<PathBuf>> {
    let mut chain = vec![image.to_owned()];
    while let Some(below) = backing(&chain[chain.len() - 1])? {
        if chain.len() > 300 {
            bail!("the chain of {} has no end", image.display());
        }
        chain.push(below);
    }
    Ok(chain)
}

/// Every byte of the chain of `image`, random parts of layer names masked, and `what` is asked of it.
fn fingerprint(image: &Path, what: &str) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    for layer in chain(image)? {
        let mut bytes = std::fs::read(&layer)?;
        let head = bytes.len().min(65_536);
        let mut at = 0;
        while at + 12 <= head {
            if &bytes[at..at + 4] == b".ds-" {
                bytes[at + 4..at + 12].fill(0);
                at += 12;
            }
            at += 1;
        }
        bytes.len().hash(&mut hasher);
        hasher.write(&bytes);
    }
    Ok(hasher.finish())
}

/// The directory holds the `needed` images, further names of them, and manifests; nothing else.
fn leftovers(dir: &Path, needed: &BTreeSet<PathBuf>) -> Result<()> {
    let files = domain::files(dir)?;
    let mut inodes = HashSet::new();
    for image in needed {
        let below = image.strip_prefix(dir).with_context(|| format!("{} is elsewhere", image.display()))?;
        inodes.insert(*files.get(below).with_context(|| format!("{} is not there", image.display()))?);
    }
    for (path, inode) in &files {
        let manifest = path.components().count() == 2
            && path.parent().and_then(Path::extension).is_some_and(|e| e == "domsnap")
            && path.extension().is_some_and(|e| e == "json");
        if !manifest && !inodes.contains(inode) {
            bail!("{} was left behind; the directory holds {:?}", path.display(), files.keys());
        }
    }
    Ok(())
}
