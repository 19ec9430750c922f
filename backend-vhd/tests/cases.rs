//! Cases that the other suites leave out: other programs' writes, batmaps, footers that differ, odd headers,
//! files that were moved, and the least that a merge may write. `docs/vhd-cases.md` lists where each is.

mod place;
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use backend_vhd::image::{
    Chain, ChainOptions, ErrorKind, FoundBy, Layer, Materialised, Moving, NewImage, OpenOptions, Severity,
    Vhd, find_parent, materialise, merge, visible_bytes, write_into,
};
use place::{Place, read};
use support::{Dice, MIB, Maker, Reference, qemu_reads, seven_zip_reads};

fn open(path: &Path) -> Vhd {
    Vhd::open(path, &OpenOptions::read_only()).unwrap()
}

fn write(path: &Path, at: u64, bytes: &[u8]) {
    let mut chain = Chain::open(path, &ChainOptions::read_write()).unwrap();
    chain.write_at(bytes, at).unwrap();
    chain.flush().unwrap();
}

fn qemu_writes(path: &Path, io: &str) {
    let done = Command::new("qemu-io").args(["-f", "vpc", "-c", io]).arg(path).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn worst(path: &Path, data: bool) -> Option<Severity> {
    open(path).check(data).unwrap().iter().map(|finding| finding.severity).max()
}

fn new_image(path: &Path, new: &NewImage) {
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(path).unwrap();
    write_into(file, path, new).unwrap();
}

/// QEMU writes to an image of ours, then we to it again: the check is clean, and all readers agree (case 3).
#[test]
fn qemu_and_we_write_by_turns() {
    let place = Place::new();
    let path = place.at("x.vhd");
    new_image(&path, &NewImage::new(16 * MIB));
    let mut shown = vec![0; 16 << 20];
    qemu_writes(&path, "write -q -P 17 3M 64k");
    shown[3 << 20..(3 << 20) + 65536].fill(17);
    write(&path, 6 * MIB, &[2; 512]);
    shown[6 << 20..(6 << 20) + 512].fill(2);
    qemu_writes(&path, "write -q -P 19 10M 512");
    shown[10 << 20..(10 << 20) + 512].fill(19);
    write(&path, 3 * MIB + 512, &[4; 1024]);
    shown[(3 << 20) + 512..(3 << 20) + 1536].fill(4);
    assert!(worst(&path, true) <= Some(Severity::Note), "{:?}", open(&path).check(true));
    assert!(read(&path) == shown && Reference::open(&[&path]).read() == shown);
    assert!(qemu_reads(&path, 16 * MIB).unwrap() == shown && seven_zip_reads(&path).unwrap() == shown);
}

/// QEMU writes, by mistake, to a child of ours: its id and its locator are still there, because nothing lies
/// where QEMU stores its first block. The check reports no error, and the block is the child's (case 4).
#[test]
fn child_survives_a_write_of_qemu() {
    let place = Place::new();
    let parent = Maker::new(3, 16 * MIB).put(0, &[5; 4096]).put(4 * MIB, &[6; 4096]);
    place.make("p.vhd", &parent);
    let path = place.at("c.vhd");
    let name = backend_vhd::parent_name_for(
        camino::Utf8Path::from_path(&path).unwrap(),
        camino::Utf8Path::from_path(&place.at("p.vhd")).unwrap(),
    );
    new_image(&path, &NewImage::new(16 * MIB).on(name.unwrap()));
    qemu_writes(&path, "write -q -P 7 4M 512");
    let image = open(&path);
    assert_eq!(image.parent_id().map(|id| id.0), Some(parent.id));
    assert_eq!(find_parent(&image, &[]).unwrap().unwrap().by, FoundBy::Locator);
    drop(image);
    assert!(worst(&path, true) <= Some(Severity::Note), "{:?}", open(&path).check(true));
    let shown = read(&path);
    // QEMU sets every bit of its block: the parent's data is hidden there, and only there.
    assert_eq!((&shown[..4096], &shown[4 << 20..(4 << 20) + 512]), (&[5; 4096][..], &[7; 512][..]));
    assert!(shown[(4 << 20) + 512..6 << 20].iter().all(|byte| *byte == 0));
}

fn tap(size: u64) -> Maker {
    Maker {
        creator: *b"tap\0",
        creator_version: 0x0001_0003,
        batmap: true,
        padding: 0xFF,
        align: 4096,
        ..Maker::new(3, size)
    }
}

/// The batmap of blktap stays where it is through our writes, and never says more than the bitmaps (case 5).
#[test]
fn batmap_is_kept_true() {
    let place = Place::new();
    let parent = tap(16 * MIB).put(0, &[1; 2 << 20]).put(2 * MIB, &[2; 4096]);
    let mut child = Maker { kind: 4, id: [9; 16], ..tap(16 * MIB) };
    (child.parent_id, child.parent_name) = (parent.id, "p.vhd".into());
    let child = child.put(4 * MIB, &[3; 2 << 20]).put(6 * MIB, &[4; 512]);
    place.make("p.vhd", &parent);
    let path = place.make("c.vhd", &child);
    let before = std::fs::read(&path).unwrap();
    write(&path, 6 * MIB, &[5; 4096]);
    write(&path, 8 * MIB, &[6; 2 << 20]);
    let after = std::fs::read(&path).unwrap();
    let batmap = 1536 + 512..1536 + 512 + 1024;
    assert!(before[batmap.clone()].starts_with(b"tdbatmap") && before[batmap.clone()] == after[batmap]);
    assert!(worst(&path, true) <= Some(Severity::Note), "{:?}", open(&path).check(true));
    assert!(read(&path) == Reference::open(&[&path, &place.at("p.vhd")]).read());
}

/// A batmap bit over a partial block is an error that a repair corrects, and a merge is right without it
/// (case 6).
#[test]
fn lying_batmap_is_found_and_never_believed() {
    let place = Place::new();
    let parent = Maker::new(3, 8 * MIB).put(2 * MIB, &[1; 2 << 20]);
    let mut child = Maker { kind: 4, id: [9; 16], batmap_lies: vec![1], ..tap(8 * MIB) };
    (child.parent_id, child.parent_name) = (parent.id, "p.vhd".into());
    let child = child.put(2 * MIB + 512, &[2; 512]);
    let below = place.make("p.vhd", &parent);
    let path = place.make("c.vhd", &child);
    let found = open(&path).check(false).unwrap();
    assert_eq!(found[0].severity, Severity::Error);
    assert!(found[0].text.contains("batmap") && found[0].repairable, "{found:?}");
    let shown = Reference::open(&[&path, &below]).read();
    let target = Vhd::open(&below, &OpenOptions::read_write()).unwrap();
    let mut run = Chain::new([target, open(&path)].map(|image| Layer::Vhd(Box::new(image))).into()).unwrap();
    merge(&mut run, 0, None, &Moving::quietly()).unwrap();
    drop(run);
    assert!(Reference::open(&[&below]).read() == shown, "the merge believed the batmap");
    let mut image = Vhd::open(&path, &OpenOptions::read_write()).unwrap();
    assert_eq!(image.repair().unwrap().len(), 1);
    drop(image);
    assert!(worst(&path, false) <= Some(Severity::Note));
}

/// The size is the current one, also where QEMU goes by the geometry; the check says so, and a copy has that
/// size (case 8).
#[test]
fn geometry_is_not_the_size() {
    let place = Place::new();
    let made = Maker { creator: *b"vpc ", geometry: Some((481, 4, 17)), ..Maker::new(3, 16 * MIB) };
    let path = place.make("x.vhd", &made.put(16 * MIB - 512, &[8; 512]));
    let mut image = open(&path);
    assert_eq!(image.size(), 16 * MIB);
    let found = image.check(false).unwrap();
    assert!(found.iter().any(|finding| finding.text.contains("16746496")), "{found:?}");
    drop(image);
    let copy = place.at("copy.vhd");
    let into = std::fs::File::options().read(true).write(true).create_new(true).open(&copy).unwrap();
    let mut chain = Chain::open(&path, &ChainOptions::read_only()).unwrap();
    materialise(&mut chain, into, &copy, Materialised::Fixed { align: MIB }, &Moving::quietly()).unwrap();
    let shown = qemu_reads(&copy, u64::MAX).unwrap();
    assert!(shown.len() == 16 << 20 && shown.ends_with(&[8; 512]));
}

/// Footers that differ in size or id: the image is read by the one at the end, not written, and a repair
/// writes that one at the start (case 10).
#[test]
fn differing_footers_are_refused_for_writing() {
    let place = Place::new();
    let made = Maker::new(3, 8 * MIB).put(0, &[1; 512]);
    let others = [
        ("size 8388608", Maker { size: 6 * MIB, ..made.clone() }),
        ("id 03030303-", Maker { id: [4; 16], ..made.clone() }),
    ];
    for (message, other) in others {
        let path = place.make("x.vhd", &made);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[..512].copy_from_slice(&support::footer(&other));
        std::fs::write(&path, &bytes).unwrap();
        let mut image = Vhd::open(&path, &OpenOptions::read_write()).unwrap();
        assert_eq!(image.size(), 8 * MIB);
        let error = image.write_at(&[2; 512], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Dirty);
        assert!(error.to_string().contains(message) && error.to_string().contains("at the start"), "{error}");
        assert!(std::fs::read(&path).unwrap() == bytes, "written before the repair");
        image.repair().unwrap();
        drop(image);
        assert!(std::fs::read(&path).unwrap() == made.bytes(), "the repair changed something else");
    }
}

/// A header with 32 bits of ones is read with a note, one with a wrong sum is read and not written, one of
/// version 2 is refused; reading changes no byte (case 15).
#[test]
fn odd_headers_are_read_or_refused() {
    let place = Place::new();
    let plain = Maker::new(3, 8 * MIB).put(0, &[1; 4096]);
    let short: fn(&mut [u8]) = |h| {
        h[8..12].fill(0);
        // Four bytes of ones fewer.
        let sum = u32::from_be_bytes(h[36..40].try_into().unwrap()) + 4 * 0xFF;
        h[36..40].copy_from_slice(&sum.to_be_bytes());
    };
    let wrong: fn(&mut [u8]) = |h| h[39] ^= 1;
    for (change, writable, word) in [(short, true, "data offset"), (wrong, false, "checksum")] {
        let path = place.make("x.vhd", &Maker { header: change, ..plain.clone() });
        let before = std::fs::read(&path).unwrap();
        assert!(read(&path)[..4096] == [1; 4096]);
        let found = open(&path).check(true).unwrap();
        assert!(found.iter().any(|finding| finding.text.contains(word)), "{word}: {found:?}");
        let mut image = Vhd::open(&path, &OpenOptions::read_write()).unwrap();
        assert_eq!(image.require_writable().is_ok(), writable, "{word}");
        assert!(writable || image.repair().is_err());
        assert!(std::fs::read(&path).unwrap() == before, "{word}: changed by a read");
    }
    let second: fn(&mut [u8]) = |h| {
        h[25] = 2;
        let sum = u32::from_be_bytes(h[36..40].try_into().unwrap()) - 1;
        h[36..40].copy_from_slice(&sum.to_be_bytes());
    };
    let path = place.make("x.vhd", &Maker { header: second, ..plain });
    let error = Vhd::open(&path, &OpenOptions::read_only()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

/// A chain that was moved together is found by its relative path; a child or a parent that was moved alone is
/// not, and the message lists what was tried; a renamed parent and one of a renamed directory are found by
/// the id; so is the parent of a child that is reached through a second name elsewhere (case 17).
#[test]
fn moved_files_are_found_or_named() {
    let parent = Maker::new(3, 8 * MIB).put(0, &[1; 4096]);
    let child = Maker::child(&parent, "p.vhd").put(512, &[2; 512]);
    let place = Place::new();
    for name in ["here", "there", "third"] {
        std::fs::create_dir(place.at(name)).unwrap();
    }
    let found = |path: &Path| find_parent(&open(path), &[]).map(|found| found.unwrap().by);
    place.make("there/p.vhd", &parent);
    let top = place.make("there/c.vhd", &child);
    assert_eq!(found(&top).unwrap(), FoundBy::Locator, "the relative path is looked at first");
    std::fs::rename(&top, place.at("here/c.vhd")).unwrap();
    let error = found(&place.at("here/c.vhd")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FileNotFound);
    assert!(error.to_string().contains("tried:") && error.to_string().contains("p.vhd"), "{error}");
    std::fs::rename(place.at("there/p.vhd"), place.at("here/renamed.vhd")).unwrap();
    assert_eq!(found(&place.at("here/c.vhd")).unwrap(), FoundBy::Search);
    std::fs::rename(place.at("here"), place.at("moved")).unwrap();
    assert_eq!(found(&place.at("moved/c.vhd")).unwrap(), FoundBy::Search);
    // A checkpoint of Hyper-V as the parent, under another name.
    std::fs::rename(place.at("moved/renamed.vhd"), place.at("moved/other.avhd")).unwrap();
    assert_eq!(found(&place.at("moved/c.vhd")).unwrap(), FoundBy::Search);
    std::fs::hard_link(place.at("moved/c.vhd"), place.at("third/c.vhd")).unwrap();
    found(&place.at("third/c.vhd")).unwrap_err();
    let allowed = [place.at("moved")];
    assert!(find_parent(&open(&place.at("third/c.vhd")), &allowed).unwrap().is_some());
}

/// An image of 512-byte sectors near the last sector number that a table can state: the allocation fails with
/// "no space", and the image is as it was (case 23).
#[test]
fn full_sector_numbers_are_no_space() {
    let place = Place::new();
    let mut made = Maker::new(3, 8 * MIB).put(0, &[1; 4096]);
    // A sparse file, whose second block is as far behind as a table can say.
    let last = u32::MAX - 4096 - 16;
    made.bat.insert(1, last);
    let path = place.make("x.vhd", &made);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let end = u64::from(last) * 512 + 512 + 2 * MIB;
    std::os::unix::fs::FileExt::write_all_at(&file, &support::footer(&made), end).unwrap();
    drop(file);
    let mut chain = Chain::open(&path, &ChainOptions::read_write()).unwrap();
    chain.write_at(&[2; 512], 0).unwrap();
    chain.write_at(&[3; 512], 2 * MIB).unwrap();
    let error = chain.write_at(&[4; 512], 4 * MIB).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    chain.flush().unwrap();
    drop(chain);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), end + 512);
    assert!(worst(&path, false) <= Some(Severity::Note), "{:?}", open(&path).check(false));
    let mut chain = Chain::open(&path, &ChainOptions::read_only()).unwrap();
    let mut bytes = vec![0; 512];
    for (at, value) in [(0, 2), (2 * MIB, 3), (4 * MIB, 0)] {
        chain.read_at(&mut bytes, at).unwrap();
        assert_eq!(bytes, [value; 512]);
    }
}

/// A layer of many chains: sectors at random places, some of them in every layer.
fn layers(place: &Place, count: u8, dice: &mut Dice) -> Vec<PathBuf> {
    let size = 4 * MIB;
    let mut below = Maker { table_at: 4096, align: 4096, block: 64 << 10, ..Maker::new(3, size) };
    let mut paths = Vec::new();
    for number in 0..count {
        let mut made = below.clone();
        if number > 0 {
            made =
                Maker { table_at: 4096, align: 4096, ..Maker::child(&below, &format!("{}.vhd", number - 1)) };
            made.id = [number + 10; 16];
            made.locators.clear();
        }
        for _ in 0..12 {
            let at = dice.below(size / 8192) * 8192;
            made = made.put(at, &dice.bytes(8192));
        }
        paths.push(place.make(&format!("{number}.vhd"), &made));
        below = made;
    }
    paths
}

/// Eight layers become one in one pass: what is written is the union of their sectors, and the result is that
/// of merging link by link (case 29).
#[test]
fn one_pass_writes_the_union() {
    let place = Place::new();
    let paths = layers(&place, 8, &mut Dice::new(29));
    let top = paths.last().unwrap();
    let shown = read(top);
    let mut run = Chain::open(top, &ChainOptions::read_only().unlocked()).unwrap();
    let visible = visible_bytes(&mut run).unwrap();
    let union: u64 = visible[1..].iter().sum();
    let used = |path: &Path| std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(path).unwrap()) * 512;
    let before = used(&paths[0]);
    let second = place.at("linked");
    std::fs::create_dir(&second).unwrap();
    for path in &paths {
        std::fs::copy(path, second.join(path.file_name().unwrap())).unwrap();
    }
    let writing = OpenOptions::read_write().unlocked();
    let mut opened: Vec<Layer> = paths.iter().map(|path| Layer::Vhd(Box::new(open(path)))).collect();
    opened[0] = Layer::Vhd(Box::new(Vhd::open(&paths[0], &writing).unwrap()));
    let moved = merge(&mut Chain::new(opened).unwrap(), 0, None, &Moving::quietly()).unwrap();
    assert_eq!(moved, union, "each sector that the top shows is moved once");
    assert!(Reference::open(&[&paths[0]]).read() == shown, "one pass");
    // From the top down, link by link.
    for number in (1..paths.len()).rev() {
        let upper = open(&second.join(format!("{number}.vhd")));
        let lower = Vhd::open(&second.join(format!("{}.vhd", number - 1)), &writing).unwrap();
        let mut run = Chain::new([lower, upper].map(|image| Layer::Vhd(Box::new(image))).into()).unwrap();
        merge(&mut run, 0, None, &Moving::quietly()).unwrap();
    }
    assert!(Reference::open(&[&second.join("0.vhd")]).read() == shown, "link by link");
    // The file has the data, its bitmaps, and pages of the table: nothing that holes would not show.
    let used = used(&paths[0]) - before;
    assert!(used <= union + 64 * 8192, "{used} bytes for {union} of data");
}

/// The engine knows which direction moves less: a big layer below a small one has fewer visible bytes to move
/// upwards, and the other way about (case 30).
#[test]
fn visible_bytes_are_counted_by_sectors() {
    let place = Place::new();
    let parent = Maker::new(3, 32 * MIB).put(0, &vec![1; 16 << 20]);
    let child = Maker::child(&parent, "p.vhd").put(512, &[2; 512]).put(20 * MIB, &[3; 1024]);
    place.make("p.vhd", &parent);
    let top = place.make("c.vhd", &child);
    let mut run = Chain::open(&top, &ChainOptions::read_only()).unwrap();
    // Not by blocks: the child stores two of 2 MiB.
    assert_eq!(visible_bytes(&mut run).unwrap(), [(16 << 20) - 512, 1536]);
}

/// A child of which only sectors are stored is reported as one that Xen Orchestra's merge would damage. A
/// copy of it is whole, for readers that know only blocks (case 42).
#[test]
fn partial_child_is_reported_and_its_copy_is_whole() {
    let place = Place::new();
    let parent = Maker::new(3, 8 * MIB).put(0, &Dice::new(1).bytes(4 << 20));
    let child = Maker::child(&parent, "p.vhd").put(512, &[2; 512]);
    place.make("p.vhd", &parent);
    let top = place.make("c.vhd", &child);
    let found = open(&top).check(false).unwrap();
    assert!(found.iter().any(|finding| finding.text.contains("Xen Orchestra")), "{found:?}");
    let copy = place.at("whole.vhd");
    let into = std::fs::File::options().read(true).write(true).create_new(true).open(&copy).unwrap();
    let mut chain = Chain::open(&top, &ChainOptions::read_only()).unwrap();
    materialise(&mut chain, into, &copy, Materialised::Fixed { align: 512 }, &Moving::quietly()).unwrap();
    let shown = read(&top);
    // A reader that knows neither bitmaps nor footers.
    assert!(std::fs::read(&copy).unwrap()[..8 << 20] == shown);
    assert!(qemu_reads(&copy, 8 * MIB).unwrap() == shown && seven_zip_reads(&copy).unwrap() == shown);
    assert_eq!(worst(&copy, true), None);
}

/// A deep chain shows what its layers do, in any order of reads, also between writes to its top, and beyond
/// the ends of layers that are smaller than those above.
#[test]
fn deep_chain_is_read_as_its_layers() {
    let place = Place::new();
    let mut dice = Dice::new(11);
    let mut makers = vec![Maker::new(3, 5 * MIB + 512)];
    for number in 1..9_u64 {
        let mut child = Maker::child(&makers[makers.len() - 1], &format!("{}.vhd", number - 1));
        child.size = 5 * MIB + 512 + number / 3 * MIB;
        child.original = child.size;
        makers.push(child);
    }
    let mut paths = Vec::new();
    for (number, maker) in makers.iter_mut().enumerate() {
        for _ in 0..12 {
            let sectors = 1 + dice.below(40);
            let at = dice.below(maker.size / 512 - sectors) * 512;
            *maker = maker.clone().put(at, &dice.bytes(sectors as usize * 512));
        }
        paths.push(place.at(&format!("{number}.vhd")));
        maker.write(&paths[number]);
    }
    let top = paths[paths.len() - 1].clone();
    let files: Vec<&Path> = paths.iter().rev().map(PathBuf::as_path).collect();
    let mut model = Reference::open(&files).read();
    let mut chain = Chain::open(&top, &ChainOptions::read_write()).unwrap();
    for _ in 0..400 {
        let at = dice.below(model.len() as u64 / 512) * 512;
        let length = (1 + dice.below(200)) as usize * 512;
        let length = length.min(model.len() - at as usize);
        let shown = &mut model[at as usize..at as usize + length];
        if dice.below(4) == 0 {
            let bytes = dice.bytes(length);
            chain.write_at(&bytes, at).unwrap();
            shown.copy_from_slice(&bytes);
        }
        let mut bytes = vec![0; length];
        chain.read_at(&mut bytes, at).unwrap();
        assert!(bytes == shown, "{length} bytes at {at}");
        let piece = chain.piece(at).unwrap().unwrap();
        assert!(piece.start == at && piece.end > at && piece.end <= model.len() as u64);
    }
}
