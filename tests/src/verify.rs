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
/// The crash suites look at thousands of directories, most of which hold the same bytes as one before. What
/// is remembered is that a chain of files with *these bytes* reads as *those*; random layer names are masked.
#[derive(Debug, Default)]
pub struct Memo(HashSet<u64>);

/// Compares every point of the tree of `domain` (called `address` on the command line) with `model`; then the
/// present, by the configured paths; then checks every layer with `qemu-img check`; then looks for leftover
/// files.
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
    let found = list.previous.as_ref().map(|kept| &kept.parent);
    let wanted = model.previous.as_ref().map(|kept| &kept.parent);
    if found != wanted {
        bail!("the replaced state should have the parent {wanted:?}, domsnap says {found:?}");
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

/// Compares the bytes of every point that `list` reports, and the current state; checks layers; looks for
/// leftovers.
///
/// # Errors
/// The first difference.
pub fn every_image(domain: &Domain, list: &List, model: &Model, memo: &mut Memo) -> Result<()> {
    let needed = every_layer(domain, list, model, memo)?;
    leftovers_but(&domain.disks(), &needed, shared_by_clones(domain)?)
}

/// The files of clones: a layer that a clone has a name of stays in the source's directory too.
fn shared_by_clones(domain: &Domain) -> Result<HashSet<u64>> {
    match domain.clones().exists() {
        true => Ok(domain::files(&domain.clones())?.into_values().collect()),
        false => Ok(HashSet::new()),
    }
}

/// The clones in the domain's directory of clones are those of the model, in every byte, and nothing else is
/// there; and the catalogue has those domains, and no other. Nothing is asked where no test makes clones.
///
/// # Errors
/// The first difference.
pub fn clones(domain: &Domain, model: &Model, memo: &mut Memo) -> Result<()> {
    let place = domain.clones();
    if !place.exists() {
        return Ok(());
    }
    let wanted: Vec<&str> = model.clones.keys().map(String::as_str).collect();
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&place)? {
        found.push(entry?.file_name().to_string_lossy().into_owned());
    }
    found.sort_unstable();
    if found != wanted {
        bail!("{} should have {wanted:?}, and has {found:?}", place.display());
    }
    let listed: serde_json::Value = domain.domsnap().done(&["domain", "list", "--json"])?.json()?;
    let names = listed["domains"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|listed| listed["domain"]["name"].as_str());
    let mut names: Vec<&str> = names.filter(|name| *name != domain::NAME).collect();
    names.sort_unstable();
    if names != wanted {
        bail!("the catalogue should have the clones {wanted:?}, and has {names:?}");
    }
    for (name, disks) in &model.clones {
        let mut needed: BTreeSet<PathBuf> = BTreeSet::new();
        for (target, wanted) in disks {
            let image = domain.image_of_clone(name, target);
            bytes(&image, None, wanted, memo).with_context(|| format!("clone {name}"))?;
            for layer in chain(&image)? {
                qemu::check(&layer)?;
                needed.insert(layer);
            }
        }
        leftovers(&place.join(name), &needed)?;
    }
    Ok(())
}

/// As [`every_point`], without a look for leftover files: images that are not the domain's lie beside its
/// own.
///
/// # Errors
/// The first difference.
pub fn every_point_beside_others(domain: &Domain, model: &Model, address: &str) -> Result<()> {
    let list = report::list(&domain.domsnap(), address)?;
    tree(&list, model)?;
    every_layer(domain, &list, model, &mut Memo::default())?;
    Ok(())
}

/// Compares every byte and checks every layer; gives those that are needed.
fn every_layer(domain: &Domain, list: &List, model: &Model, memo: &mut Memo) -> Result<BTreeSet<PathBuf>> {
    let needed = every_byte(domain, list, model, memo)?;
    for layer in &needed {
        let key = fingerprint(layer, "check")?;
        if !memo.0.contains(&key) {
            qemu::check(layer)?;
            memo.0.insert(key);
        }
    }
    Ok(needed)
}

/// As [`every_image`], after a crash in what no journal knows of: a layer may have what
/// [`qemu::check_after_crash`] calls harmless. That is mended, by QEMU, and every byte must then still be
/// what it should be.
///
/// # Errors
/// The first difference.
pub fn every_image_after_crash(domain: &Domain, list: &List, model: &Model, memo: &mut Memo) -> Result<()> {
    for layer in &every_byte(domain, list, model, memo)? {
        let key = fingerprint(layer, "check")?;
        if !memo.0.contains(&key) && qemu::check_after_crash(layer)? {
            qemu::mend(layer)?;
        }
    }
    every_image(domain, list, model, memo)
}

/// Compares the bytes of every point and of the current state; gives the layers that they need.
fn every_byte(domain: &Domain, list: &List, model: &Model, memo: &mut Memo) -> Result<BTreeSet<PathBuf>> {
    let dir = domain.disks();
    let mut needed = BTreeSet::new();
    let snapshots = list.snapshots.iter();
    let snapshots =
        snapshots.map(|found| (found.name.as_str(), &found.points, &model.snapshots[&found.name].disks));
    let kept = list.previous.as_ref().zip(model.previous.as_ref());
    let kept = kept.map(|(found, kept)| ("the replaced state", &found.points, &kept.disks));
    for (name, points, disks) in snapshots.chain(kept) {
        let reported: BTreeSet<_> = points.iter().map(|point| &point.target).collect();
        if !reported.iter().copied().eq(disks.keys()) {
            bail!("{name} should hold {:?}, domsnap reports {reported:?}", disks.keys());
        }
        for point in points {
            let tag = match point.kind {
                Kind::Internal => Some(point.tag.as_deref().context("an internal point without its tag")?),
                Kind::External => None,
            };
            let layer = dir.join(&point.layer);
            bytes(&layer, tag, &disks[&point.target], memo)
                .with_context(|| format!("snapshot {name}, disk {}", point.target))?;
            needed.extend(chain(&layer)?);
        }
    }
    for (target, wanted) in &model.present {
        let path = domain.path(target);
        bytes(&path, None, wanted, memo).with_context(|| format!("the current state of {target}"))?;
        needed.extend(chain(&path)?);
    }
    Ok(needed)
}

/// `image` (or the internal snapshot `tag` in it) reads as `wanted`, through QEMU.
///
/// # Errors
/// The first byte that differs.
pub fn bytes(image: &Path, tag: Option<&str>, wanted: &Bytes, memo: &mut Memo) -> Result<()> {
    let (first, second) = checksums(wanted);
    let key = fingerprint(image, &format!("bytes {tag:?} {first:x} {second:x}"))?;
    if memo.0.contains(&key) {
        return Ok(());
    }
    let mut found = qemu::read(image, tag)?;
    if let Some(tag) = tag
        && found.len() != wanted.len()
    {
        found = read_applied(image, tag)?;
    }
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

/// The bytes of the internal snapshot `tag`, at its own length: `convert -l` reads it at the image's present
/// length, so it is applied to a copy, beside the image for the sake of the backing string.
fn read_applied(image: &Path, tag: &str) -> Result<Vec<u8>> {
    let dir = image.parent().context("an image in no directory")?;
    let copy = tempfile::Builder::new().prefix("judge-").suffix(".qcow2").tempfile_in(dir)?;
    std::fs::copy(image, copy.path())?;
    qemu::img(&["snapshot".as_ref(), "-a".as_ref(), tag.as_ref(), copy.path().as_os_str()])?;
    qemu::read(copy.path(), None)
}

/// The image file that `image` depends on, as its header says, relative to its directory.
///
/// # Errors
/// If it cannot be read, or is no qcow2 where it should be.
pub fn backing(image: &Path) -> Result<Option<PathBuf>> {
    if qemu::format(image) == "raw" {
        return Ok(None);
    }
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

/// A checksum of each half: the standard hasher takes ten times as long for megabytes.
fn checksums(bytes: &[u8]) -> (u32, u32) {
    let (first, second) = bytes.split_at(bytes.len() / 2);
    (crc32fast::hash(first), crc32fast::hash(second))
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
        checksums(&bytes).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// The directory holds the `needed` images, further names of them, and manifests; nothing else.
fn leftovers(dir: &Path, needed: &BTreeSet<PathBuf>) -> Result<()> {
    leftovers_but(dir, needed, HashSet::new())
}

/// As [`leftovers`], but files of these inodes may be there.
fn leftovers_but(dir: &Path, needed: &BTreeSet<PathBuf>, mut inodes: HashSet<u64>) -> Result<()> {
    let files = domain::files(dir)?;
    for image in needed {
        let below = image.strip_prefix(dir).with_context(|| format!("{} is elsewhere", image.display()))?;
        inodes.insert(*files.get(below).with_context(|| format!("{} is not there", image.display()))?);
    }
    for (path, inode) in &files {
        let manifest = path.components().count() == 2
            && path.parent().and_then(Path::extension).is_some_and(|e| e == "domsnap")
            && path.extension().is_some_and(|e| e == "json");
        // The checksum of a copy stands beside it.
        let summed = path.extension().is_some_and(|e| e == "crc32")
            && needed.contains(&dir.join(path.with_extension("")));
        if !manifest && !summed && !inodes.contains(inode) {
            bail!("{} was left behind; the directory holds {:?}", path.display(), files.keys());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Shape;
    use crate::qemu::Write;
    use crate::report::{Point, Snapshot};

    /// One disk with an overlay `a.qcow2` on `a.ds-00000000.qcow2`, which holds the internal snapshot `in`;
    /// both are points, and all is as it should be.
    fn good() -> (Domain, List) {
        let mut domain = Domain::unregistered(&Shape::disks(1)).unwrap();
        let (path, layer) = (domain.path("vda"), domain.disks().join("a.ds-00000000.qcow2"));
        domain.write_everywhere().unwrap();
        qemu::img(&["snapshot".as_ref(), "-c".as_ref(), "in".as_ref(), path.as_os_str()]).unwrap();
        domain.model.create("in");
        domain.write_everywhere().unwrap();
        domain.model.create("out");
        std::fs::rename(&path, &layer).unwrap();
        let args = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "-F", "qcow2", "-b"];
        let args = args.iter().map(std::ffi::OsStr::new);
        qemu::img(&args.chain(["a.ds-00000000.qcow2".as_ref(), path.as_os_str()]).collect::<Vec<_>>())
            .unwrap();
        domain.write_everywhere().unwrap();
        let point = |kind, tag: Option<&str>| Point {
            target: "vda".into(),
            kind,
            layer: layer.clone(),
            tag: tag.map(Into::into),
        };
        let snapshot = |name: &str, parent: Option<&str>, point| Snapshot {
            name: name.into(),
            parent: parent.map(Into::into),
            points: vec![point],
            memory: None,
        };
        let list = List {
            snapshots: vec![
                snapshot("in", None, point(Kind::Internal, Some("in"))),
                snapshot("out", Some("in"), point(Kind::External, None)),
            ],
            current: Some("out".into()),
            previous: None,
        };
        (domain, list)
    }

    fn verdict(domain: &Domain, list: &List) -> Result<()> {
        tree(list, &domain.model)?;
        every_image(domain, list, &domain.model, &mut Memo::default())
    }

    fn said(domain: &Domain, list: &List) -> String {
        format!("{:#}", verdict(domain, list).unwrap_err())
    }

    #[test]
    fn what_is_right_is_found_right() {
        let (domain, list) = good();
        verdict(&domain, &list).unwrap();
    }

    #[test]
    fn one_wrong_sector_of_any_point_is_found() {
        let wrong = [Write { offset: 1 << 20, length: 512, byte: Some(9) }];
        let (domain, list) = good();
        qemu::write(&domain.path("vda"), &wrong).unwrap();
        assert!(said(&domain, &list).contains("the current state of vda"), "{}", said(&domain, &list));
        let (domain, list) = good();
        // Of the frozen layer: all that read through it are wrong, the first one found is reported.
        qemu::write(&domain.disks().join("a.ds-00000000.qcow2"), &wrong).unwrap();
        assert!(said(&domain, &list).contains("snapshot out, disk vda"), "{}", said(&domain, &list));
        let (mut domain, list) = good();
        let internal = domain.model.snapshots.get_mut("in").unwrap().disks.get_mut("vda").unwrap();
        std::sync::Arc::make_mut(internal)[77] ^= 1;
        assert!(said(&domain, &list).contains("the first at 77"), "{}", said(&domain, &list));
    }

    #[test]
    fn a_file_left_behind_is_found() {
        for name in ["a.ds-12345678.qcow2", "a.qcow2.tmp", "guest.domsnap/x.tmp"] {
            let (domain, list) = good();
            std::fs::create_dir(domain.disks().join("guest.domsnap")).unwrap();
            std::fs::write(domain.disks().join("guest.domsnap/a.json"), "{}").unwrap();
            verdict(&domain, &list).unwrap();
            std::fs::write(domain.disks().join(name), "x").unwrap();
            assert!(said(&domain, &list).contains("was left behind"), "{}", said(&domain, &list));
        }
    }

    #[test]
    fn a_leaked_cluster_is_found() {
        let (domain, list) = good();
        // The table of snapshots forgets its only entry: all that it held is leaked.
        let layer = domain.disks().join("a.ds-00000000.qcow2");
        std::fs::OpenOptions::new().write(true).open(layer).unwrap().write_all_at(&[0; 4], 60).unwrap();
        let mut list = list;
        let mut domain = domain;
        list.snapshots.remove(0);
        list.snapshots[0].parent = None;
        domain.model.delete(&["in".into()]);
        assert!(said(&domain, &list).contains("leak"), "{}", said(&domain, &list));
    }

    #[test]
    fn a_wrong_tree_is_found() {
        let (domain, mut list) = good();
        list.current = Some("in".into());
        assert!(said(&domain, &list).contains("current"), "{}", said(&domain, &list));
        list.current = Some("out".into());
        list.snapshots[1].parent = None;
        assert!(said(&domain, &list).contains("the tree"), "{}", said(&domain, &list));
    }

    #[test]
    fn what_the_memo_remembers_is_the_bytes_not_the_file() {
        let (domain, list) = good();
        let mut memo = Memo::default();
        every_image(&domain, &list, &domain.model, &mut memo).unwrap();
        let known = memo.0.len();
        every_image(&domain, &list, &domain.model, &mut memo).unwrap();
        assert_eq!(memo.0.len(), known);
        qemu::write(&domain.path("vda"), &[Write { offset: 0, length: 512, byte: Some(1) }]).unwrap();
        every_image(&domain, &list, &domain.model, &mut memo).unwrap_err();
    }
}
