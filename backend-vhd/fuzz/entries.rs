//! The functions of the fuzz targets. They are plain functions, so that a test can run them without a fuzzer.
//!
//! An image may be refused; it may not panic, and what is written to one that was accepted is read again.
//! `image` and `resealed` take whole files. The others put the bytes into one structure of a sound image,
//! with right checksums, so that what is behind the checksum is reached.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use backend_vhd::image::{
    BlockSize, Chain, ChainOptions, ImageFile, Layer, Moving, ParentName, Severity, TimeStamp, Unflushed,
    UniqueId, Vhd, find_parent, merge,
};
use image_files::engine::file::Storage;

use crate::support::{Maker, Reference, relative};

/// One entry: takes any bytes.
type Entry = fn(&[u8]);

/// All entries, by the name of their target.
#[allow(dead_code, reason = "a fuzz target uses one entry, the test uses the table")]
pub const ENTRIES: [(&str, Entry); 12] = [
    ("image", image),
    ("resealed", resealed),
    ("footer", footer),
    ("header", header),
    ("bat", bat),
    ("bitmap", bitmap),
    ("locators", locators),
    ("batmap", batmap),
    ("chain", chain),
    ("merged", merged),
    ("changed", changed),
    ("notes", notes),
];

/// Pieces of a disk that are looked at.
const PIECES: usize = 2000;

/// A file in memory.
#[derive(Clone)]
struct Bytes(Arc<Mutex<Vec<u8>>>);

impl Storage for Bytes {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = self.0.lock().expect("no thread panics");
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let n = buf.len().min(bytes.len() - from);
        buf[..n].copy_from_slice(&bytes[from..from + n]);
        Ok(n)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let mut bytes = self.0.lock().expect("no thread panics");
        let end = offset as usize + buf.len();
        assert!(end < 1 << 30, "a write far behind the end of the file");
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(buf);
        Ok(buf.len())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("no thread panics").len() as u64)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().expect("no thread panics").resize(len as usize, 0);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn file(&self) -> Option<&File> {
        None
    }
}

fn open(bytes: &Bytes) -> Option<Vhd> {
    Vhd::from_file(ImageFile::new(Box::new(bytes.clone()), Path::new("/fuzzed.vhd"), true)).ok()
}

/// A whole file: footers, header, locators, BAT, batmap, bitmaps, data.
pub fn image(bytes: &[u8]) {
    let bytes = Bytes(Arc::new(Mutex::new(bytes.to_vec())));
    let Some(mut image) = open(&bytes) else { return };
    let _ = image.check(true);
    let _ = image.locators();
    if let Some(header) = image.header() {
        let _ = header.parent_name();
        assert!(BlockSize::new(header.block().bytes() as u32).is_some());
    }
    let size = image.size();
    let Ok(mut chain) = Chain::new(vec![Layer::Vhd(Box::new(image))]) else { return };
    let mut at = 0;
    for _ in 0..PIECES {
        match chain.piece(at) {
            Ok(Some(piece)) => {
                assert!(piece.end > at && piece.end <= size);
                at = piece.end;
            }
            Ok(None) | Err(_) => break,
        }
    }
    let mut buf = vec![0; size.min(1 << 20) as usize];
    let _ = chain.read_at(&mut buf, 0);
    let from = size - buf.len() as u64;
    let _ = chain.read_at(&mut buf, from);
    let last = (size - 1) / 512 * 512;
    let written = chain.write_at(&[0xA5; 512], last).is_ok() && chain.flush().is_ok();
    drop(chain);
    if written {
        let image = open(&bytes).expect("what was written opens");
        let mut chain = Chain::new(vec![Layer::Vhd(Box::new(image))]).expect("one layer");
        let mut sector = [0; 512];
        chain.read_at(&mut sector, last).expect("what was written is read");
        assert_eq!(sector, [0xA5; 512]);
    } else if let Some(mut image) = open(&bytes) {
        let _ = image.repair();
        let _ = open(&bytes).map(|mut image| image.grow(size + 512));
    }
}

/// The same, with right checksums in footers and header, which a mutation seldom keeps.
pub fn resealed(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    seal_all(&mut bytes);
    image(&bytes);
}

fn seal_all(bytes: &mut [u8]) {
    let end = bytes.len().wrapping_sub(512);
    for (at, len, field) in [(0, 512, 64), (512, 1024, 36), (end, 512, 64)] {
        let Some(part) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..len)) else { continue };
        seal(part, field);
    }
}

fn seal(part: &mut [u8], field: usize) {
    part[field..field + 4].fill(0);
    let sum = part.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    part[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// Bytes of a block of the sound images.
const BLOCK: u64 = 8 << 10;
/// Place of the BAT in them.
const TABLE: usize = 1536;

/// The bottom of a sound chain: four of sixteen blocks are stored.
fn bottom() -> Maker {
    let mut made = Maker { block: BLOCK, id: [7; 16], ..Maker::new(3, 16 * BLOCK) };
    for block in [0, 3, 4, 15] {
        made = made.put(block * BLOCK, &vec![block as u8 + 1; BLOCK as usize]);
    }
    made
}

/// Its child, with some sectors of its own.
fn top() -> Maker {
    let child = Maker::child(&bottom(), "base.vhd");
    child.put(512, &[0x51; 1024]).put(5 * BLOCK, &[0x52; 512]).put(16 * BLOCK - 512, &[0x53; 512])
}

fn sound(make: fn() -> Maker, kept: &'static OnceLock<Vec<u8>>) -> Vec<u8> {
    kept.get_or_init(|| make().bytes()).clone()
}

fn sound_bottom() -> Vec<u8> {
    static KEPT: OnceLock<Vec<u8>> = OnceLock::new();
    sound(bottom, &KEPT)
}

fn sound_top() -> Vec<u8> {
    static KEPT: OnceLock<Vec<u8>> = OnceLock::new();
    sound(top, &KEPT)
}

/// Puts bytes over a part of an image, as far as they fit.
fn over(file: &mut [u8], at: usize, most: usize, bytes: &[u8]) {
    let n = bytes.len().min(most).min(file.len().saturating_sub(at));
    file[at..at + n].copy_from_slice(&bytes[..n]);
}

/// The footer at the end, the copy at the start, or both. The first byte says which.
pub fn footer(bytes: &[u8]) {
    let Some((which, bytes)) = bytes.split_first() else { return };
    let mut file = sound_bottom();
    let end = file.len() - 512;
    for at in [end, 0].into_iter().enumerate().filter(|(n, _)| which & (1 << n) == 0).map(|(_, at)| at) {
        over(&mut file, at, 512, bytes);
    }
    if which & 4 == 0 {
        seal_all(&mut file);
    }
    image(&file);
}

/// The header, and what is behind it.
pub fn header(bytes: &[u8]) {
    let mut file = sound_top();
    over(&mut file, 512, 2048, bytes);
    seal_all(&mut file);
    image(&file);
}

/// The entries of the BAT.
pub fn bat(bytes: &[u8]) {
    let mut file = sound_bottom();
    over(&mut file, TABLE, 64, bytes);
    image(&file);
}

/// The bitmaps of a child. Whatever they are, the chain shows what the reference reader shows.
pub fn bitmap(bytes: &[u8]) {
    let (below, mut file) = (sound_bottom(), sound_top());
    let mut left = bytes;
    for block in [0usize, 5, 15] {
        let entry = &file[TABLE + 4 * block..TABLE + 4 * block + 4];
        let at = u32::from_be_bytes(entry.try_into().expect("four bytes")) as usize * 512;
        let (now, rest) = left.split_at(left.len().min(2));
        over(&mut file, at, 512, now);
        left = rest;
    }
    over(&mut file, TABLE + 64, 448, left);
    let layer = |bytes: &[u8]| {
        open(&Bytes(Arc::new(Mutex::new(bytes.to_vec())))).map(|image| Layer::Vhd(Box::new(image)))
    };
    let layers = vec![layer(&below).expect("sound"), layer(&file).expect("sound but for its bitmaps")];
    let mut chain = Chain::new(layers).expect("two layers");
    let mut shown = vec![0; chain.size() as usize];
    chain.read_at(&mut shown, 0).expect("bitmaps do not keep a chain from being read");
    let parent = Some(Box::new(Reference::new(below, None)));
    assert!(
        shown == Reference::new(file.clone(), parent).read(),
        "the reference reader shows something else"
    );
    image(&file);
}

/// A directory in memory for images that must be files.
fn directory() -> &'static Path {
    static MADE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let made = MADE.get_or_init(|| {
        let place = Path::new("/dev/shm");
        let place = if place.is_dir() { place.to_owned() } else { std::env::temp_dir() };
        tempfile::Builder::new().prefix("vhd-fuzz-").tempdir_in(place).expect("a directory")
    });
    made.path()
}

/// The table of locators and their texts. A parent that is found lies in the child's directory.
pub fn locators(bytes: &[u8]) {
    let mut file = sound_top();
    let (table, texts) = bytes.split_at(bytes.len().min(192));
    over(&mut file, 512 + 576, 192, table);
    // The texts are behind the BAT, in two sectors.
    over(&mut file, TABLE + 512, 1024, texts);
    seal_all(&mut file);
    std::fs::write(directory().join("base.vhd"), sound_bottom()).expect("the parent");
    let storage = Bytes(Arc::new(Mutex::new(file.clone())));
    let path = directory().join("child.vhd");
    if let Ok(child) = Vhd::from_file(ImageFile::new(Box::new(storage), &path, false))
        && let Ok(Some(parent)) = find_parent(&child, &[])
    {
        let own = directory().canonicalize().expect("the directory");
        assert!(parent.path.starts_with(&own), "{} is outside of {}", parent.path.display(), own.display());
    }
    image(&file);
}

/// The batmap of blktap, with its header.
pub fn batmap(bytes: &[u8]) {
    static KEPT: OnceLock<Vec<u8>> = OnceLock::new();
    let tap = || Maker { batmap: true, creator: *b"tap\0", creator_version: 0x0001_0003, ..bottom() };
    let mut file = sound(tap, &KEPT);
    over(&mut file, TABLE + 512, 1024, bytes);
    image(&file);
}

/// Three images, each a child of the one before it, with changes: file, two bytes of a place, value.
fn three(changes: &[u8]) -> [Vec<u8>; 3] {
    let highest = || {
        let mut made = Maker::child(&top(), "child.vhd").put(4 * BLOCK, &[0x54; 1024]);
        made.locators = vec![(*b"W2ru", relative(".\\child.vhd"), 512)];
        made
    };
    static KEPT: OnceLock<Vec<u8>> = OnceLock::new();
    let mut files = [sound_bottom(), sound_top(), sound(highest, &KEPT)];
    for change in changes.chunks_exact(4).take(256) {
        let [number, high, low, value] = change else { continue };
        let file = &mut files[usize::from(number % 3)];
        let at = usize::from(u16::from_be_bytes([*high, *low]));
        // Metadata is at the start and at the end.
        let at = if number & 0x80 == 0 { at % 4096 } else { file.len() - 1 - at % 512 };
        file[at] = *value;
        if number & 0x40 == 0 {
            seal_all(file);
        }
    }
    files
}

/// Three images in files.
pub fn chain(bytes: &[u8]) {
    let names = ["base.vhd", "child.vhd", "top.vhd"];
    for (name, content) in names.iter().zip(three(bytes)) {
        std::fs::write(directory().join(name), content).expect("an image");
    }
    let options = ChainOptions::read_only().unlocked();
    let Ok(mut chain) = Chain::open(&directory().join("top.vhd"), &options) else { return };
    assert!(chain.layers().len() <= 3, "three files make a chain of {}", chain.layers().len());
    let mut shown = vec![0; chain.size().min(1 << 20) as usize];
    let _ = chain.read_at(&mut shown, 0);
}

/// The most bytes of a disk that are compared.
const COMPARED: u64 = 1 << 20;

/// The start of what files in memory show, one on the other. `None` if that cannot be read.
fn shown(files: &[Bytes]) -> Option<Vec<u8>> {
    let mut layers = Vec::new();
    for file in files {
        layers.push(Layer::Vhd(Box::new(open(file)?)));
    }
    let mut chain = Chain::new(layers).ok()?;
    let mut bytes = vec![0; chain.size().min(COMPARED) as usize];
    chain.read_at(&mut bytes, 0).ok()?;
    Some(bytes)
}

fn in_memory(bytes: Vec<u8>) -> Bytes {
    Bytes(Arc::new(Mutex::new(bytes)))
}

/// Compares as much as both have.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.iter().zip(b).all(|(a, b)| a == b)
}

/// A merge of three images into the lowest or the highest of them, by the first byte. What the highest showed
/// is shown afterwards: by the one image after a success, and by all three after an error.
pub fn merged(bytes: &[u8]) {
    let Some((direction, changes)) = bytes.split_first() else { return };
    let into = if direction & 1 == 0 { 0 } else { 2 };
    let files = three(changes).map(in_memory);
    let Some(before) = shown(&files) else { return };
    let layers = files.iter().filter_map(open).map(|image| Layer::Vhd(Box::new(image))).collect();
    let mut chain = Chain::new(layers).expect("they were opened before");
    let done = merge(&mut chain, into, None, &Moving::quietly());
    drop(chain);
    match done {
        Ok(_) => {
            let alone = shown(&files[into..=into]).expect("a merged image is read");
            assert!(same(&alone, &before), "the merged image shows something else");
        }
        Err(error) => {
            let after = shown(&files).expect("a failed merge leaves what can be read");
            assert!(same(&after, &before), "after {error} the chain shows something else");
        }
    }
}

/// Changes of one image, by the first byte: more room, a repair, another parent. Whether they succeed or not,
/// the image shows what it showed; what is added to a disk is zeros.
pub fn changed(bytes: &[u8]) {
    let Some((how, changes)) = bytes.split_first() else { return };
    let files = three(changes);
    let file = in_memory(files[usize::from(how >> 4) % 3].clone());
    let alone = std::slice::from_ref(&file);
    let Some(before) = shown(alone) else { return };
    let Some(mut image) = open(&file) else { return };
    let size = image.size();
    let done = match how % 3 {
        0 => image.grow(size.saturating_add(u64::from(how & 0xc) * BLOCK * 64 + 512)).is_ok(),
        1 => image.repair().is_ok(),
        _ => {
            let name = format!("{}.vhd", "n".repeat(usize::from(*how)));
            let parent =
                ParentName { id: UniqueId([9; 16]), time: TimeStamp::now(), relative: name.clone(), name };
            image.set_parent(&parent).is_ok()
        }
    };
    drop(image);
    let after = shown(alone).expect("a changed image is read");
    assert!(same(&after, &before), "it shows something else, done: {done}");
    // A change that failed may have made the disk larger or not; it never makes it smaller.
    assert!(after.len() >= before.len(), "the disk is smaller");
    assert!(after[before.len()..].iter().all(|byte| *byte == 0), "what was added is not zeros");
}

/// Notes of a server that was killed. Eight bytes each: block, sector of the file, first sector, count. If
/// they are accepted, the image is sound afterwards, and no sector changes that they do not name.
pub fn notes(bytes: &[u8]) {
    let Some((which, bytes)) = bytes.split_first() else { return };
    let file = in_memory(if which & 1 == 0 { sound_top() } else { sound_bottom() });
    let alone = std::slice::from_ref(&file);
    let before = shown(alone).expect("sound");
    let field = |high: u8, low: u8| match u16::from_be_bytes([high, low]) {
        0xffff => u32::MAX,
        other => other.into(),
    };
    let mut named = Vec::new();
    let mut found = Vec::new();
    for note in bytes.chunks_exact(8).take(64) {
        let [block, entry, first, count] = [0, 2, 4, 6].map(|at| field(note[at], note[at + 1]));
        let fields = [block, entry, first, count].map(u32::to_be_bytes).concat();
        found.push(Unflushed::parse(fields.try_into().expect("sixteen bytes")));
        let start = u64::from(block) * BLOCK + u64::from(first) * 512;
        named.push(start..start + u64::from(count) * 512);
    }
    let mut image = open(&file).expect("sound");
    let adopted = image.adopt(&found).and_then(|()| image.flush());
    drop(image);
    let after = shown(alone).expect("it is read after notes were adopted");
    let changed = (0..before.len() as u64).filter(|at| before[*at as usize] != after[*at as usize]);
    for at in changed {
        assert!(adopted.is_ok() && named.iter().any(|range| range.contains(&at)), "byte {at} changed");
    }
    let mut image = open(&file).expect("it opens after notes were adopted");
    let wrong =
        image.check(false).expect("a check").into_iter().find(|finding| finding.severity == Severity::Error);
    assert!(wrong.is_none(), "{wrong:?}");
}
