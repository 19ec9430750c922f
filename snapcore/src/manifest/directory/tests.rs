//! Tests of manifests in a directory.

use std::fs::{self, File};

use jiff::Timestamp;

use super::*;
use crate::domain::{ActivePath, Disk, DiskRecord, Domain, Hypervisor};
use crate::name::{DomainName, LayerName, SnapshotName, Target};
use crate::snapshot::{Consistency, DiskPoint, Point, SnapshotRole, SnapshotTree};

fn snapshot(name: &str) -> Snapshot {
    Snapshot {
        id: SnapshotId::fresh(),
        name: SnapshotName::new(name).unwrap(),
        parent: None,
        created: Timestamp::now(),
        description: "tab\there \"quoted\" ünï".to_owned(),
        consistency: Consistency::Clean,
        disks: vec![DiskPoint::new(
            Target::new("vda").unwrap(),
            Point::internal(LayerName("a.layer".into()), name),
            1 << 40,
        )],
        memory: None,
        machine: None,
        skipped: Vec::new(),
        role: SnapshotRole::Snapshot,
        holds: Vec::new(),
        deferred: false,
        expires: None,
        policy: None,
        group: None,
    }
}

fn entry(revision: u64, snapshots: &[Snapshot]) -> Entry {
    let disk = Disk::new(Target::new("vda").unwrap(), "/a", "fake");
    let layer = LayerName("a.layer".into());
    Entry {
        domain: Domain {
            name: DomainName::new("web").unwrap(),
            unregistered: false,
            hypervisor: Hypervisor::NONE,
            host: None,
            control: None,
            active_path: ActivePath::Keep,
            disks: vec![DiskRecord { disk, active: layer.clone(), owned: vec![layer] }],
            current: snapshots.last().map(|snapshot| snapshot.id),
            machines: Vec::new(),
            policy: None,
        },
        tree: SnapshotTree::new(snapshots.to_vec()),
        revision: Revision(revision),
        follows: None,
    }
}

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn manifests(&self) -> ManifestDirectory {
        let root = Utf8Path::from_path(self.directory.path()).unwrap();
        ManifestDirectory::new(root.join(".hidden/web"))
    }

    fn files(&self) -> Vec<String> {
        self.manifests().names().unwrap().into_iter().collect()
    }
}

/// Manifests are read as they were written, and the last deletion removes the directory.
#[test]
fn manifests_are_read_as_written() {
    let place = Place::new();
    let manifests = place.manifests();
    let us = CatalogueId::fresh();
    let (one, two) = (snapshot("s1"), snapshot("s2"));
    let mut before = entry(1, &[]);
    assert!(manifests.is_current(None, &before));
    for after in [
        entry(5, std::slice::from_ref(&one)),
        entry(7, &[one.clone(), two.clone()]),
        entry(9, std::slice::from_ref(&two)),
    ] {
        manifests.write(us, Some(&before), &after).unwrap();
        let found = manifests.read().unwrap();
        assert_eq!(found.problems, Vec::new());
        assert_eq!(SnapshotTree::new(found.snapshots), after.tree);
        let recorded = found.domain.unwrap();
        assert_eq!(
            (recorded.revision, recorded.catalogue, &recorded.domain),
            (after.revision, Some(us), &after.domain)
        );
        assert!(manifests.is_current(Some(us), &after) && !manifests.is_current(Some(us), &before));
        assert!(!manifests.is_current(Some(CatalogueId::fresh()), &after));
        before = after;
    }
    manifests.write(us, Some(&before), &entry(11, &[])).unwrap();
    assert_eq!(fs::read_dir(place.directory.path()).unwrap().count(), 0);
}

/// A stale directory is corrected, and files of other programs stay.
#[test]
fn stale_directory_is_corrected() {
    let place = Place::new();
    let manifests = place.manifests();
    let us = CatalogueId::fresh();
    let (old, kept) = (snapshot("old"), snapshot("kept"));
    manifests.write(us, None, &entry(1, &[old.clone(), kept.clone()])).unwrap();
    let half = format!("{}.json{TEMPORARY_SUFFIX}", SnapshotId::fresh());
    fs::write(manifests.directory.join(&half), "half").unwrap();
    fs::write(manifests.directory.join("readme"), "of another program").unwrap();
    fs::write(manifests.directory.join(format!("{}.json", kept.id)), "damaged").unwrap();
    let now = entry(4, std::slice::from_ref(&kept));
    manifests.write(us, None, &now).unwrap();
    let mut expected = vec![format!("{}.json", kept.id), DOMAIN_FILE.to_owned(), "readme".to_owned()];
    expected.sort();
    assert_eq!(place.files(), expected);
    assert_eq!(manifests.read().unwrap().snapshots, [kept]);
    manifests.write(us, Some(&now), &entry(6, &[])).unwrap();
    assert_eq!(place.files(), ["readme"]);
}

/// Manifests of snapshots that the writer never knew stay.
#[test]
fn unknown_manifests_stay() {
    let place = Place::new();
    let manifests = place.manifests();
    let (us, them) = (CatalogueId::fresh(), CatalogueId::fresh());
    let (ours, theirs, newer) = (snapshot("ours"), snapshot("theirs"), snapshot("newer"));
    manifests.write(them, None, &entry(1, std::slice::from_ref(&theirs))).unwrap();
    manifests.write(us, None, &entry(9, std::slice::from_ref(&newer))).unwrap();
    let stays = [&theirs, &newer].map(|snapshot| format!("{}.json", snapshot.id));
    let here = |place: &Place| stays.iter().all(|name| place.files().contains(name));
    // At revision 4 this catalogue, restored from a backup, does not know what it wrote at 9.
    for before in [None, Some(entry(4, &[]))] {
        manifests.write(us, before.as_ref(), &entry(5, std::slice::from_ref(&ours))).unwrap();
        assert!(here(&place), "{:?}", place.files());
    }
    manifests.write(us, None, &entry(6, &[])).unwrap();
    assert!(here(&place) && place.files().len() == 2, "{:?}", place.files());
    assert!(!manifests.is_current(Some(us), &entry(6, &[])));
    manifests.move_aside(&[Item::Snapshot(theirs.id), Item::Snapshot(ours.id)]).unwrap();
    assert_eq!(manifests.read().unwrap().snapshots, std::slice::from_ref(&newer));
    assert!(place.files().contains(&format!("{}.json.left-out", theirs.id)));
    manifests.write(us, None, &entry(10, &[])).unwrap();
    assert_eq!(place.files(), [format!("{}.json.left-out", theirs.id)]);
}

/// A manifest is known to the catalogue that wrote it or imported it, and to no other.
#[test]
fn manifest_is_known_to_its_catalogue() {
    let (us, them) = (CatalogueId::fresh(), CatalogueId::fresh());
    let recorded = |catalogue, revision| DomainManifest {
        catalogue,
        revision: Revision(revision),
        snapshots: Some(0),
        domain: entry(revision, &[]).domain,
    };
    let ours = entry(7, &[]);
    // Behind: a crash came between the catalogue and the manifests.
    assert!(recorded(Some(us), 7).is_known_to(us, &ours) && recorded(Some(us), 5).is_known_to(us, &ours));
    assert!(!recorded(Some(us), 8).is_known_to(us, &ours));
    assert!(!recorded(Some(them), 3).is_known_to(us, &ours));
    assert!(recorded(None, 7).is_known_to(us, &ours) && !recorded(None, 8).is_known_to(us, &ours));
    let mut of_another = recorded(Some(us), 5);
    of_another.domain.name = DomainName::new("other").unwrap();
    assert!(!of_another.is_known_to(us, &ours));
    let follows = Some(Stamp { catalogue: Some(them), revision: Revision(6) });
    let taken = Entry { follows, ..entry(7, &[]) };
    assert!(recorded(Some(them), 6).is_known_to(us, &taken) && recorded(Some(us), 7).is_known_to(us, &taken));
    assert!(!recorded(Some(them), 7).is_known_to(us, &taken));
}

/// A damaged manifest is refused by name, and stops no other.
#[test]
fn damaged_manifest_is_refused_by_name() {
    let place = Place::new();
    let manifests = place.manifests();
    let all = [snapshot("s1"), snapshot("s2"), snapshot("s3"), snapshot("s4"), snapshot("s5")];
    manifests.write(CatalogueId::fresh(), None, &entry(1, &all)).unwrap();
    let path = |snapshot: &Snapshot| manifests.file_of(snapshot.id);
    let text = |snapshot| fs::read_to_string(path(snapshot)).unwrap();
    fs::write(path(&all[0]), text(&all[0]).replace("s1", "sx")).unwrap();
    fs::write(path(&all[1]), text(&all[1]).replace("manifest\":1", "manifest\":2")).unwrap();
    fs::write(path(&all[2]), text(&all[3])).unwrap();
    let long = File::create(path(&all[4])).unwrap();
    long.set_len(MAX_BYTES + 1).unwrap();
    let found = manifests.read().unwrap();
    assert_eq!(found.snapshots, [all[3].clone()]);
    let why = |snapshot: &Snapshot| {
        let item = Some(Item::Snapshot(snapshot.id));
        &found.problems.iter().find(|problem| problem.item == item).unwrap().why
    };
    assert!(why(&all[0]).contains("checksum"));
    assert!(why(&all[1]).contains("version 2"));
    assert!(why(&all[2]).contains("describes the snapshot"));
    assert!(why(&all[4]).contains("longer than"));
}

/// Fields of a newer program are ignored.
#[test]
fn fields_of_a_newer_program_are_ignored() {
    let content = r#"{"id":"0190a0c0-0000-7000-8000-000000000000","name":"s1","parent":null,
        "created":"2026-11-22T10:00:00Z","consistency":"clean","disks":[],"mood":"good"}"#;
    let crc = crc32fast::hash(content.as_bytes());
    let text = format!(r#"{{"domsnap-manifest":1,"crc32":"{crc:08x}","extra":[],"content":{content}}}"#);
    let snapshot: Snapshot = open_envelope(text.as_bytes()).unwrap();
    assert_eq!(snapshot.name.as_str(), "s1");
}

/// A manifest from the time before disks had addresses is read, and also one with an address. An address that
/// cannot be shown is refused.
#[test]
fn addresses_in_manifests_are_read() {
    let domain = |address: &str| {
        let content = format!(
            r#"{{"revision":3,"name":"web","unregistered":false,"hypervisor":"none","active_path":"keep","disks":[{{"target":"vda","path":"{address}","format":"fake","active":"a.ds-0123abcd.img","owned":["a.ds-0123abcd.img"]}}],"current":null}}"#
        );
        let crc = crc32fast::hash(content.as_bytes());
        open_domain(format!(r#"{{"domsnap-manifest":1,"crc32":"{crc:08x}","content":{content}}}"#).as_bytes())
    };
    let disk = |address: &str| domain(address).unwrap().domain.disks[0].disk.clone();
    assert_eq!(disk("/vm/a.img").local().unwrap(), "/vm/a.img");
    assert_eq!((disk("rbd:pool/a").local(), disk("rbd:pool/a").address.as_str()), (None, "rbd:pool/a"));
    for bad in ["a.img", "/vm/../a", "rbd:", r"rbd:a\u0007"] {
        domain(bad).unwrap_err();
    }
}
