//! Merges layers of a chain while it is served.
//!
//! | the run | what receives | how | ending |
//! |---|---|---|---|
//! | with the top | the top | sectors of the lower layers are written to the top; one that has no parent afterwards gets its zeros too | its parent changes |
//! | with the top | a lower one | the top's sectors are copied down, and each write goes to both | the lower one is served |
//! | below the top | either end | as at rest, through handles of its own | the child's parent changes |
//!
//! Requests are carried out between two steps of a copy. What a step copies is what the chain shows at this
//! moment, so no write is lost.
//!
//! # What is durable before what
//! As in a merge at rest ([`crate::image::merge()`]): the top, read through the run, shows the same at every
//! point. The layers that receive data may show more than the handles of the served chain know: only sectors
//! that an upper layer of the run hides, or that show what they showed before. When the top is merged down,
//! every write that is acknowledged after [`ServedMerge::run`] is in both images and survives the process in
//! both. So the chain may be opened from either of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use camino::Utf8Path;
use image_files::{LockMode, lock};
use snapcore::{Error, ErrorKind, LayerName, Result};

use super::{ServedChain, ServedOptions, State, identity};
use crate::image::{self, Chain, ChainOptions, Layer, Moving, OpenOptions, ParentName, Vhd};
use crate::steps::parent_name;

/// Bytes that are copied before requests get their turn.
const STEP: u64 = 1 << 20;
/// Pieces that are looked at before requests get their turn.
const PIECES: usize = 512;
/// Blocks that are filled with zeros before requests get their turn.
const FILLED: u64 = 8;
/// Bytes that are copied between two flushes.
const BATCH: u64 = 256 << 20;

/// The lower image of a top that is being merged down: it gets each write too.
#[derive(Debug)]
pub(super) struct Twin {
    chain: Chain,
    /// True once it shows what the top shows. Then it is as durable as the top.
    is_ready: bool,
    /// The first write that failed before that.
    failed: Option<image::Error>,
}

impl State {
    /// Repeats a change of the sectors from `at` to `end` on the twin, if there is one.
    pub(super) fn repeat(
        &mut self,
        at: u64,
        end: u64,
        change: impl FnOnce(&mut Chain) -> image::Result<()>,
    ) -> image::Result<()> {
        let Some(twin) = self.twin.as_mut().filter(|twin| twin.failed.is_none()) else { return Ok(()) };
        let mut changed = change(&mut twin.chain);
        if twin.is_ready && changed.is_ok() {
            // It has no notes: what a crash of the process would lose is made durable.
            changed = twin.chain.unflushed(at, end).and_then(|unflushed| match unflushed.is_empty() {
                true => Ok(()),
                false => twin.chain.flush(),
            });
        }
        match changed {
            Err(error) if !twin.is_ready => twin.failed = Some(error),
            other => return other,
        }
        Ok(())
    }

    pub(super) fn flush_twin(&mut self) -> image::Result<()> {
        match self.twin.as_mut().filter(|twin| twin.is_ready) {
            Some(twin) => twin.chain.flush(),
            None => Ok(()),
        }
    }
}

/// The course of a merge. Layers are numbered from the bottom.
#[derive(Debug)]
enum Course {
    /// The top receives the sectors of the layers from `lowest`.
    IntoTop { lowest: usize, below: Option<ParentName> },
    /// The layer `into` receives those of all layers above it.
    TopInto { into: usize },
    /// A layer below the top receives those of others below the top.
    Frozen { first: usize, last: usize, into: usize, below: Option<ParentName> },
}

/// A merge of layers of a served chain.
#[derive(Debug)]
pub struct ServedMerge {
    chain: Arc<ServedChain>,
    options: ServedOptions,
    /// The paths of all layers, the bottom first.
    paths: Vec<PathBuf>,
    course: Course,
}

impl ServedMerge {
    /// Prepares the merge of the layers `run`, the bottom first, into the first or the last of them.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] if they are not in the chain, one on the other, or the chain is only read;
    /// [`ErrorKind::Busy`] if another process reads the layer that receives; those of the images.
    pub fn new(
        chain: &Arc<ServedChain>,
        options: &ServedOptions,
        run: &[PathBuf],
        into: &Path,
    ) -> Result<Self> {
        let refused = |text: String| Error::new(ErrorKind::Refused, text).state("no changes made");
        if !chain.writable {
            return Err(refused("the disk is served read-only".to_owned()));
        }
        let (mut paths, mut files, mut raw) = (Vec::new(), Vec::new(), Vec::new());
        let mut sizes = Vec::new();
        for layer in chain.lock().chain.layers() {
            paths.push(layer.file().path().to_owned());
            files.push(identity(layer.file())?);
            raw.push(matches!(layer, Layer::Raw(_)));
            sizes.push(layer.size());
        }
        let place = |path: &Path| -> Result<usize> {
            let found = file_of(path)?;
            let place = files.iter().position(|file| Some(*file) == found);
            place.ok_or_else(|| refused(format!("{} is not in the chain that is served", path.display())))
        };
        let places = run.iter().map(|path| place(path)).collect::<Result<Vec<_>>>()?;
        let (Some(&first), Some(&last)) = (places.first(), places.last()) else {
            return Err(refused("there is nothing to merge".to_owned()));
        };
        let into_at = place(into)?;
        let is_run = places.iter().copied().eq(first..=last) && first < last;
        if !is_run || !(into_at == first || into_at == last) || raw.get(first) == Some(&true) {
            return Err(refused("the layers are not a run of the chain that is served".to_owned()));
        }
        let top = paths.len() - 1;
        let named = |child: usize, parent: usize| named(&paths, &raw, child, parent);
        let below = match first.checked_sub(1) {
            Some(below) if into_at == last => named(last, below)?,
            _ => None,
        };
        let course = match (last == top, into_at == last) {
            (true, true) => Course::IntoTop { lowest: first, below },
            (true, false) if sizes.get(into_at) != sizes.get(top) => {
                return Err(refused(format!(
                    "{} has another size than the image above it, and the disk is in use",
                    into.display()
                ))
                .advise("shut the domain down, and do it then"));
            }
            (true, false) => Course::TopInto { into: into_at },
            (false, _) => {
                // A parent that cannot be named is refused before anything is moved.
                if into_at == first {
                    named(last + 1, into_at)?;
                }
                Course::Frozen { first, last, into: into_at, below }
            }
        };
        let merge = Self { chain: Arc::clone(chain), options: options.clone(), paths, course };
        merge.lock(into_at, LockMode::Write)?;
        // Its parent changes.
        if last != top && into_at == first {
            merge.lock(last + 1, LockMode::Write)?;
        }
        Ok(merge)
    }

    /// Changes the lock that the chain has on a layer.
    fn lock(&self, layer: usize, mode: LockMode) -> Result<()> {
        let file = self.chain.files().iter().rev().nth(layer);
        let Some(opened) = file.and_then(|file| file.file()) else { return Ok(()) };
        lock(opened, mode).map_err(|error| {
            // A failed lock releases what the file had.
            let _ = lock(opened, LockMode::Read);
            let advice = error.advice();
            let path = self.path(layer).display();
            Error::new(ErrorKind::Busy, format!("locking {path}: {error}")).because(error).advise(advice)
        })
    }

    fn path(&self, layer: usize) -> &Path {
        self.paths.get(layer).map(PathBuf::as_path).unwrap_or(Path::new(""))
    }

    /// Returns true if another image is served afterwards.
    pub fn pivots(&self) -> bool {
        matches!(self.course, Course::TopInto { .. })
    }

    /// Moves the data. `expect` receives the bytes that are to be moved.
    ///
    /// # Errors
    /// Those of the images, [`ErrorKind::Cancelled`]. The chain shows what it showed, and is as before.
    pub fn run(&mut self, expect: &dyn Fn(u64), moving: &Moving<'_>) -> Result<()> {
        match self.course {
            Course::IntoTop { lowest, ref below } => {
                let is_last = below.is_none();
                let top = self.paths.len() - 1;
                let wanted = |layer: usize| (lowest..top).contains(&layer);
                expect(self.count(&wanted)?);
                self.copy(&wanted, moving)?;
                if is_last {
                    self.fill(moving)?;
                }
                Ok(self.chain.flush()?)
            }
            Course::TopInto { into } => {
                let opening = ChainOptions {
                    allowed: self.options.allowed.clone(),
                    top: OpenOptions::read_write(),
                    ..ChainOptions::read_only()
                }
                .unlocked();
                let mut chain = Chain::open(self.path(into), &opening)?;
                self.require(&chain, into)?;
                if let Some(image) = chain.top_mut() {
                    image.require_writable()?;
                }
                self.chain.lock().twin = Some(Twin { chain, is_ready: false, failed: None });
                let wanted = |layer: usize| layer > into;
                expect(self.count(&wanted)?);
                self.copy(&wanted, moving)?;
                self.become_ready()
            }
            Course::Frozen { first, last, into, ref below } => {
                let mut layers = Vec::new();
                for layer in first..=last {
                    let options =
                        if layer == into { OpenOptions::read_write() } else { OpenOptions::read_only() };
                    let opened = Vhd::open(self.path(layer), &options.unlocked())?;
                    let opened = if layer == into { opened.resume()? } else { opened };
                    layers.push(Layer::Vhd(Box::new(opened)));
                }
                let mut run = Chain::new(layers)?;
                let bytes = image::visible_bytes(&mut run)?;
                let others = bytes.iter().enumerate().filter(|(number, _)| first + number != into);
                expect(others.map(|(_, bytes)| bytes).sum());
                image::merge(&mut run, into - first, below.as_ref(), moving)?;
                Ok(())
            }
        }
    }

    /// Refuses a chain whose top is another file than the layer `layer`.
    fn require(&self, chain: &Chain, layer: usize) -> Result<()> {
        let opened = chain.layers().last().map(|top| identity(top.file())).transpose()?;
        let files = self.chain.files();
        let expected = files.iter().rev().nth(layer).map(|file| identity(file)).transpose()?;
        match opened == expected {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Refused,
                format!("{} is another file than the one that is served", self.path(layer).display()),
            )),
        }
    }

    /// Counts the bytes that the chain shows of some layers.
    fn count(&self, wanted: &dyn Fn(usize) -> bool) -> Result<u64> {
        let (mut at, mut count) = (0, 0);
        while at < self.chain.size {
            let mut state = self.chain.lock();
            for _ in 0..PIECES {
                let Some(piece) = state.chain.piece(at)? else { return Ok(count) };
                if piece.data.is_some_and(|(layer, _)| wanted(layer)) {
                    count += piece.end - at;
                }
                at = piece.end;
            }
        }
        Ok(count)
    }

    /// Copies what the chain shows of some layers to its top, or to the twin.
    fn copy(&self, wanted: &dyn Fn(usize) -> bool, moving: &Moving<'_>) -> Result<()> {
        let (mut at, mut unflushed) = (0, 0);
        while at < self.chain.size {
            if (moving.cancelled)() {
                return Err(Error::new(ErrorKind::Cancelled, "the merge was cancelled"));
            }
            let (next, moved) = self.chain.lock().copy_some(at, wanted)?;
            at = next;
            (moving.progress)(moved);
            unflushed += moved;
            if unflushed >= BATCH {
                self.flush_target()?;
                unflushed = 0;
            }
            // The lock is not fair: without this, requests would wait for the whole copy.
            std::thread::yield_now();
        }
        self.flush_target()
    }

    /// Writes the zeros that the top needs without a parent. It has every sector that its parents have. So
    /// the sectors that it has not show zeros, and they still do if the process is killed.
    fn fill(&self, moving: &Moving<'_>) -> Result<()> {
        let (mut block, mut end) = (0, 1);
        while block < end {
            if (moving.cancelled)() {
                return Err(Error::new(ErrorKind::Cancelled, "the merge was cancelled"));
            }
            let mut state = self.chain.lock();
            if let Some(image) = state.chain.top_mut() {
                end = image.blocks();
                // Most blocks of a large disk are not stored.
                for block in block..(block + FILLED).min(end) {
                    image.fill_block(block)?;
                }
            }
            block += FILLED;
            drop(state);
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Makes what was copied durable. The most of it without the lock.
    fn flush_target(&self) -> Result<()> {
        let target = {
            let mut state = self.chain.lock();
            let chain = &mut *state;
            let of = chain.twin.as_mut().map_or(&mut chain.chain, |twin| &mut twin.chain);
            of.layers().last().map(|top| Arc::clone(top.file()))
        };
        if let Some(file) = target.as_ref().and_then(|target| target.file()) {
            file.sync_data()
                .map_err(|error| image::Error::io("copied data cannot be made durable", error))?;
        }
        let mut state = self.chain.lock();
        match &mut state.twin {
            Some(twin) => Ok(twin.chain.flush()?),
            None => Ok(state.flush()?),
        }
    }

    fn become_ready(&self) -> Result<()> {
        let mut state = self.chain.lock();
        let Some(twin) = &mut state.twin else { return Ok(()) };
        if let Some(error) = twin.failed.take() {
            state.twin = None;
            return Err(error.into());
        }
        twin.chain.flush()?;
        twin.is_ready = true;
        Ok(())
    }

    /// Links the images, and opens the chain that is served afterwards. No request uses the chain.
    ///
    /// # Errors
    /// Those of the images. The chain is still to be served.
    pub fn finish(&mut self) -> Result<ServedChain> {
        let top = self.paths.len() - 1;
        let served = match &self.course {
            Course::IntoTop { below, .. } => {
                let mut state = self.chain.lock();
                if let Some(image) = state.chain.top_mut() {
                    match below {
                        Some(below) if image.parent_id() == Some(below.id) => {}
                        Some(below) => image.set_parent(below)?,
                        None => image.become_dynamic()?,
                    }
                }
                top
            }
            Course::TopInto { into } => *into,
            Course::Frozen { first, last, into, .. } => {
                if into == first {
                    // The child's own handle has an older header, and is dropped with the chain.
                    let mut child = Vhd::open(self.path(last + 1), &OpenOptions::read_write().unlocked())?;
                    let raw = vec![false; self.paths.len()];
                    if let Some(parent) = named(&self.paths, &raw, last + 1, *into)? {
                        child.set_parent(&parent)?;
                    }
                }
                top
            }
        };
        let opened = ServedChain::open(self.path(served), &self.options, Some(&self.chain))?;
        self.require(&opened.lock().chain, served)?;
        Ok(opened)
    }
}

impl Drop for ServedMerge {
    fn drop(&mut self) {
        // What the twin has more is a part of a merge that can be repeated.
        self.chain.lock().twin = None;
    }
}

impl State {
    /// Copies some of what the chain shows from `at` on, and returns where to go on and how much it was.
    fn copy_some(&mut self, mut at: u64, wanted: &dyn Fn(usize) -> bool) -> Result<(u64, u64)> {
        let mut moved = 0;
        let mut bytes = Vec::new();
        for _ in 0..PIECES {
            if moved >= STEP {
                break;
            }
            let Some(piece) = self.chain.piece(at)? else { return Ok((u64::MAX, moved)) };
            let Some((layer, place)) = piece.data.filter(|(layer, _)| wanted(*layer)) else {
                at = piece.end;
                continue;
            };
            let end = piece.end.min(at + STEP - moved);
            bytes.resize((end - at) as usize, 0);
            if let Some(source) = self.chain.layers().get(layer) {
                source.file().read_at(&mut bytes, place)?;
            }
            match &mut self.twin {
                Some(Twin { failed: Some(_), .. }) => {}
                Some(twin) => twin.chain.write_at(&bytes, at)?,
                None => self.chain.write_at(&bytes, at)?,
            }
            moved += end - at;
            at = end;
        }
        Ok((at, moved))
    }
}

/// Describes the layer `parent` as the parent of the layer `child`.
fn named(paths: &[PathBuf], raw: &[bool], child: usize, parent: usize) -> Result<Option<ParentName>> {
    let path = |layer: usize| {
        paths
            .get(layer)
            .and_then(|path| Utf8Path::from_path(path))
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "the path of a layer is not UTF-8"))
    };
    let (child, file) = (path(child)?, path(parent)?);
    let is_raw = raw.get(parent) == Some(&true);
    parent_name(child, file, &LayerName(file.to_string()), is_raw).map(Some)
}

fn file_of(path: &Path) -> Result<Option<(u64, u64)>> {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata(path) {
        Ok(about) => Ok(Some((about.dev(), about.ino()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(Error::new(ErrorKind::Io, format!("cannot look at {}", path.display())).because(error))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::image::{NewImage, TimeStamp, UniqueId, write_into};

    const SIZE: u64 = 16 << 20;

    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit
        }
    }

    /// A chain of images, the bottom first, each with data of its own in random places.
    struct Fixture {
        _directory: tempfile::TempDir,
        paths: Vec<PathBuf>,
        model: Vec<u8>,
        options: ServedOptions,
    }

    impl Fixture {
        fn new(layers: usize, seed: u64) -> Self {
            let directory = tempfile::tempdir_in("/var/tmp").unwrap();
            let notes = Some(directory.path().join("notes"));
            let options = ServedOptions { allowed: Vec::new(), writable: true, notes };
            let mut fixture =
                Self { paths: Vec::new(), model: vec![0; SIZE as usize], options, _directory: directory };
            let mut random = Random(seed);
            let mut below: Option<ParentName> = None;
            for number in 0..layers {
                let name = format!("{number}.vhd");
                let path = fixture._directory.path().join(&name);
                let id = UniqueId::random();
                let new = NewImage::new(SIZE).id(id);
                let new = match below.take() {
                    Some(below) => new.on(below),
                    None => new,
                };
                let file =
                    std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
                write_into(file, &path, &new).unwrap();
                below = Some(ParentName { id, time: TimeStamp::now(), relative: name.clone(), name });
                let mut image = Vhd::open(&path, &OpenOptions::read_write()).unwrap();
                for _ in 0..40 {
                    let (at, length) = (random.below(SIZE / 512 - 256) * 512, (1 + random.below(250)) * 512);
                    let byte = (number as u8 + 1) * 16 + random.below(16) as u8;
                    image.write_at(&vec![byte; length as usize], at).unwrap();
                    fixture.model[at as usize..(at + length) as usize].fill(byte);
                }
                image.flush().unwrap();
                drop(image);
                fixture.paths.push(path);
            }
            fixture
        }

        fn open(&self, layer: usize) -> Arc<ServedChain> {
            Arc::new(ServedChain::open(&self.paths[layer], &self.options, None).unwrap())
        }

        fn run(&self, layers: std::ops::RangeInclusive<usize>) -> Vec<PathBuf> {
            self.paths[layers].to_vec()
        }
    }

    fn content(chain: &ServedChain) -> Vec<u8> {
        let mut bytes = vec![9; SIZE as usize];
        chain.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Merges while another thread writes, zeros and trims. Returns the merge when its data is moved.
    fn merge_under_load(
        chain: &Arc<ServedChain>,
        fixture: &mut Fixture,
        run: &[PathBuf],
        into: &Path,
        seed: u64,
    ) -> ServedMerge {
        let mut merge = ServedMerge::new(chain, &fixture.options, run, into).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let model = &mut fixture.model;
            let done = &done;
            let writer = scope.spawn(move || {
                let mut random = Random(seed | 1);
                let mut after = 100;
                while after > 0 {
                    // Some come after the data was moved, before the end.
                    after -= u64::from(done.load(Ordering::SeqCst));
                    work(chain, model, &mut random);
                }
            });
            merge.run(&|_| {}, &Moving::quietly()).unwrap();
            done.store(true, Ordering::SeqCst);
            writer.join().unwrap();
        });
        merge
    }

    fn work(chain: &ServedChain, model: &mut [u8], random: &mut Random) {
        let (at, length) = (random.below(SIZE / 512 - 64) * 512, (1 + random.below(60)) * 512);
        let range = at as usize..(at + length) as usize;
        match random.below(8) {
            0 => {
                chain.zero(at, length).unwrap();
                model[range].fill(0);
            }
            _ => {
                let byte = random.below(255) as u8 + 1;
                chain.write_at(&vec![byte; length as usize], at).unwrap();
                model[range].fill(byte);
            }
        }
        if random.below(50) == 0 {
            chain.flush().unwrap();
        }
    }

    /// Every kind of merge, under load: the disk shows the same, and the merged layers are not in the chain.
    #[test]
    fn merges_under_load_keep_the_content() {
        for (seed, (run, into)) in [
            (0..=3, 3), // into the top, which has no parent then
            (1..=3, 3), // into the top
            (1..=3, 1), // the top into a lower one
            (0..=3, 0), // the top into the base
            (1..=2, 1), // below the top, down
            (1..=2, 2), // below the top, up
            (0..=2, 0),
            (0..=2, 2),
        ]
        .into_iter()
        .enumerate()
        {
            let mut fixture = Fixture::new(4, 77 + seed as u64);
            let chain = fixture.open(3);
            let (files, target) = (fixture.run(run.clone()), fixture.paths[into].clone());
            let mut merge = merge_under_load(&chain, &mut fixture, &files, &target, seed as u64 * 31 + 5);
            chain.flush().unwrap();
            let merged = Arc::new(merge.finish().unwrap());
            drop((merge, chain));
            assert!(content(&merged) == fixture.model, "{run:?} into {into}");
            assert_eq!(merged.files().len(), 4 - (run.end() - run.start()), "{run:?} into {into}");
            let mut random = Random(99);
            for _ in 0..100 {
                work(&merged, &mut fixture.model, &mut random);
            }
            merged.flush().unwrap();
            drop(merged);
            // At rest, without the layers that were merged.
            for layer in run.clone().filter(|layer| *layer != into) {
                std::fs::remove_file(&fixture.paths[layer]).unwrap();
            }
            let top = if *run.end() == 3 { into } else { 3 };
            let chain = fixture.open(top);
            assert!(content(&chain) == fixture.model, "{run:?} into {into}, opened again");
            for layer in &fixture.paths {
                let Ok(mut image) = Vhd::open(layer, &OpenOptions::read_only().unlocked()) else { continue };
                image.require_sound().unwrap();
            }
        }
    }

    /// A top that has no parent afterwards has its zeros before the exchange, in which its guest waits.
    #[test]
    fn zeros_are_written_before_the_exchange() {
        for first in [0, 1] {
            let fixture = Fixture::new(3, 99);
            let chain = fixture.open(2);
            let mut merge =
                ServedMerge::new(&chain, &fixture.options, &fixture.run(first..=2), &fixture.paths[2])
                    .unwrap();
            merge.run(&|_| {}, &Moving::quietly()).unwrap();
            let mut top = Vhd::open(&fixture.paths[2], &OpenOptions::read_only().unlocked()).unwrap();
            let block = top.header().unwrap().block().bytes();
            let is_whole = top.data_bytes().unwrap().is_multiple_of(block);
            assert_eq!(is_whole, first == 0, "{first}");
            assert!(content(&chain) == fixture.model);
            // A process that dies now leaves a child of its parent.
            drop((merge, chain));
            assert!(content(&fixture.open(2)) == fixture.model);
        }
    }

    /// From the end of the move until the pivot, a process that dies leaves both images with every write that
    /// was acknowledged, without a flush.
    #[test]
    fn both_images_are_complete_before_the_pivot() {
        for opened in [3, 1] {
            let mut fixture = Fixture::new(4, 4711);
            let chain = fixture.open(3);
            let (files, target) = (fixture.run(1..=3), fixture.paths[1].clone());
            let merge = merge_under_load(&chain, &mut fixture, &files, &target, 12345);
            let mut random = Random(54321);
            for _ in 0..200 {
                work(&chain, &mut fixture.model, &mut random);
            }
            // Nothing more is written, as when the process is killed.
            drop((merge, chain));
            assert!(content(&fixture.open(opened)) == fixture.model, "opened from layer {opened}");
        }
    }

    /// A merge that is cancelled, or whose process dies in the middle, leaves the disk as it was, and is done
    /// by a repetition.
    #[test]
    fn interrupted_merge_is_repeated() {
        for (run, into) in [(1..=3, 3), (1..=3, 1), (1..=2, 1), (1..=2, 2)] {
            let mut fixture = Fixture::new(4, 815);
            let chain = fixture.open(3);
            let (files, target) = (fixture.run(run.clone()), fixture.paths[into].clone());
            let mut merge = ServedMerge::new(&chain, &fixture.options, &files, &target).unwrap();
            let moved = std::cell::Cell::new(0);
            let moving =
                Moving { progress: &|bytes| moved.set(moved.get() + bytes), cancelled: &|| moved.get() > 0 };
            let error = merge.run(&|_| {}, &moving).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Cancelled, "{run:?} into {into}: {error}");
            drop(merge);
            let mut random = Random(1);
            for _ in 0..100 {
                work(&chain, &mut fixture.model, &mut random);
            }
            drop(chain);
            let chain = fixture.open(3);
            assert!(content(&chain) == fixture.model, "{run:?} into {into}");
            let mut merge = merge_under_load(&chain, &mut fixture, &files, &target, 5);
            chain.flush().unwrap();
            let merged = merge.finish().unwrap();
            assert!(content(&merged) == fixture.model, "{run:?} into {into}, repeated");
        }
    }

    /// Layers that are no run of the chain, and a chain that is only read, are refused.
    #[test]
    fn layers_that_are_no_run_are_refused() {
        let fixture = Fixture::new(4, 3);
        let chain = fixture.open(2);
        let new = |run: &[usize], into: usize| {
            let run: Vec<PathBuf> = run.iter().map(|layer| fixture.paths[*layer].clone()).collect();
            ServedMerge::new(&chain, &fixture.options, &run, &fixture.paths[into]).map(drop)
        };
        new(&[1, 2], 1).unwrap();
        for (run, into) in
            [(&[1, 3][..], 1), (&[2, 3], 2), (&[0, 2], 0), (&[0, 1, 2], 1), (&[1], 1), (&[], 1)]
        {
            let error = new(run, into).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused, "{run:?}");
        }
        let reading = ServedOptions { writable: false, notes: None, ..fixture.options.clone() };
        drop(chain);
        let chain = Arc::new(ServedChain::open(&fixture.paths[3], &reading, None).unwrap());
        assert!(ServedMerge::new(&chain, &reading, &fixture.run(1..=2), &fixture.paths[1]).is_err());
    }
}
