//! A chain that a server reads and writes from several threads, and does not lose when it is killed.
//!
//! # An acknowledged write
//! 1. The data is in the file, in the kernel's page cache.
//! 2. Sectors and blocks that are new to the image are noted in a file on a `tmpfs`. Their bits and BAT
//!    entries are only in memory, because they may become durable only after the data.
//! 3. The write returns.
//!
//! A flush makes data, bits and entries durable in this order, and then empties the notes. A server that
//! finds notes of its image adopts them before it serves. After a reboot they are void, and each sector is
//! the old one or the new one.

mod child;
mod merge;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use self::child::ServedChild;
pub use self::merge::ServedMerge;
use camino::Utf8Path;
use image_files::names::io_error;
use image_files::{Directory, FileName, Kind, LockMode, lock};

use crate::image::{
    Chain, ChainOptions, Error, ErrorKind, ImageFile, Layer, OpenOptions, Piece, Result, Unflushed, UniqueId,
    Vhd,
};

/// Bytes before the notes: what they belong to.
const HEAD: usize = 64;
const MAGIC: &[u8; 8] = b"dsnpnot1";
/// Notes are flushed away when they are so many bytes.
const MOST_NOTES: u64 = 4 << 20;

/// Options of [`ServedChain::open`].
#[derive(Clone, Debug)]
pub struct ServedOptions {
    /// Directories besides the child's own in which parents may be.
    pub allowed: Vec<PathBuf>,
    /// True if the disk is written.
    pub writable: bool,
    /// The directory of notes, on a `tmpfs`. It is created for this user alone. `None`: each write that is
    /// new to the image is flushed.
    pub notes: Option<PathBuf>,
}

/// The directory of the notes of a user's servers. `None` where the system has no shared memory.
pub fn notes_of(user: u32) -> Option<PathBuf> {
    let shared = Path::new("/dev/shm");
    shared.is_dir().then(|| shared.join(format!("domsnap-{user}")))
}

/// Refuses an image whose server was killed and had acknowledged writes that are not in it, or in an image
/// below it, yet: whatever changes or freezes the image would lose them, and whatever reads it would miss
/// them. The caller has the image's lock, so no server runs.
///
/// # Errors
/// [`snapcore::ErrorKind::Refused`]; the system's.
pub fn require_complete(path: &Utf8Path) -> snapcore::Result<()> {
    // What is wrong with the chain is reported by whatever reads it.
    let layers = match Chain::open(path.as_std_path(), &ChainOptions::read_only().unlocked()) {
        Ok(chain) => chain.into_layers(),
        Err(_) => match Vhd::open(path.as_std_path(), &OpenOptions::read_only().unlocked()) {
            Ok(image) => vec![Layer::Vhd(Box::new(image))],
            Err(_) => return Ok(()),
        },
    };
    require_complete_layers(&layers, path)
}

/// The same for layers that are open already. `path` is the top.
pub(crate) fn require_complete_layers(layers: &[Layer], path: &Utf8Path) -> snapcore::Result<()> {
    for layer in layers {
        let Layer::Vhd(image) = layer else { continue };
        if has_notes(image, path)? {
            return Err(snapcore::Error::new(
                snapcore::ErrorKind::Refused,
                format!(
                    "a server of {path} was killed, and what it had acknowledged is not in the image yet"
                ),
            )
            .state("no changes made")
            .advise(format!(
                "serve it once, which completes it: `domsnap disk serve {path},format=vhd --socket SOCKET`"
            )));
        }
    }
    Ok(())
}

/// Returns true if a server of the image that was killed has left notes, in this boot.
fn has_notes(image: &Vhd, path: &Utf8Path) -> snapcore::Result<bool> {
    let failed = |error| io_error(error, format!("cannot look for what a server of {path} left"));
    let Some(about) = image.file().file().map(File::metadata).transpose().map_err(failed)? else {
        return Ok(false);
    };
    let name = notes_name((about.dev(), about.ino()));
    let users = [rustix::process::geteuid().as_raw(), about.uid(), 0];
    for notes in users.into_iter().filter_map(notes_of).map(|directory| directory.join(&name)) {
        let file = match confined_open(&notes) {
            // A user who may not see them is not the one whose image it is.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) =>
            {
                continue;
            }
            opened => opened.map_err(failed)?,
        };
        let head = head(image.id()).map_err(failed)?;
        let mut found = [0; HEAD];
        let is_ours = file.read_exact_at(&mut found, 0).is_ok() && found == head;
        if is_ours && file.metadata().map_err(failed)?.len() > HEAD as u64 {
            return Ok(true);
        }
    }
    Ok(false)
}

fn confined_open(path: &Path) -> io::Result<File> {
    let (directory, name) = Directory::of(path)?;
    directory.open_file(&name, false, Kind::Regular)
}

fn notes_name((device, inode): (u64, u64)) -> String {
    format!("{device:x}-{inode:x}.notes")
}

/// A chain, open and locked.
#[derive(Debug)]
pub struct ServedChain {
    state: Mutex<State>,
    size: u64,
    writable: bool,
    /// The files whose locks the chain has, the top first. Those of a previous chain may follow.
    files: Vec<Arc<ImageFile>>,
    depth: usize,
}

#[derive(Debug)]
struct State {
    chain: Chain,
    notes: Option<Notes>,
    /// The image into which the top is being merged.
    twin: Option<merge::Twin>,
}

impl ServedChain {
    /// Opens and locks the chain whose top is at `path`. Files that `previous` has locked are locked for
    /// both.
    ///
    /// # Errors
    /// Those of [`Chain::open`]; [`ErrorKind::Locked`]; [`ErrorKind::Corrupt`] for notes that do not fit;
    /// [`ErrorKind::Dirty`] for an image with notes that is opened for reading; the system's.
    pub fn open(path: &Path, options: &ServedOptions, previous: Option<&Self>) -> Result<Self> {
        let opening = ChainOptions {
            allowed: options.allowed.clone(),
            top: if options.writable { OpenOptions::read_write() } else { OpenOptions::read_only() },
            ..ChainOptions::read_only()
        }
        .unlocked();
        // 1) Which files they are. 2) Their locks. 3) Their content, which no process changes any more.
        let found = Chain::open(path, &opening)?;
        complete_parents(&found, options, previous)?;
        let files = lock_all(&found, options.writable, previous)?;
        let mut chain = Chain::open(path, &opening)?;
        let names = |chain: &Chain| {
            chain.layers().iter().map(|layer| identity(layer.file())).collect::<Result<Vec<_>>>()
        };
        if names(&chain)? != names(&found)? {
            return Err(Error::new(ErrorKind::Locked, "its chain changes at this moment")
                .advise("try again")
                .on("open", path));
        }
        let notes = match chain.top_mut() {
            Some(top) => Notes::open(top, options)?,
            None => None,
        };
        let (size, depth) = (chain.size(), chain.layers().len());
        let state = Mutex::new(State { chain, notes, twin: None });
        let mut served = Self { state, size, writable: options.writable, files, depth };
        if options.writable {
            // The previous chain has had its layers locked since they were looked at.
            let had = previous.map(|previous| previous.files.as_slice()).unwrap_or_default();
            let had = had.iter().map(|file| identity(file)).collect::<Result<Vec<_>>>()?;
            served.prepare(&had)?;
        }
        Ok(served)
    }

    /// Makes what a killed server had acknowledged durable, and refuses an image that cannot be written.
    /// `had` are files that a chain of this process had open.
    fn prepare(&mut self, had: &[(u64, u64)]) -> Result<()> {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.chain.require_sound_parents(|file| Ok(had.contains(&identity(file)?)))?;
        let Some(top) = state.chain.top_mut() else {
            return Err(Error::new(ErrorKind::ReadOnly, "the top of the chain is not a VHD"));
        };
        complete(top, state.notes.as_mut())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns true if the disk is written.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The files of the chain, the top first.
    pub fn files(&self) -> &[Arc<ImageFile>] {
        self.files.get(..self.depth).unwrap_or_default()
    }

    /// The identity of the top.
    pub fn id(&self) -> Option<UniqueId> {
        self.lock().chain.top_mut().map(|top| top.id())
    }

    /// Fills `buf` with the disk's bytes from `at`.
    ///
    /// # Errors
    /// As [`Chain::read_at`].
    pub fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let end = at.saturating_add(buf.len() as u64).min(self.size);
        // A block never moves while the chain is open, so its data is read without the lock.
        let mut state = self.lock();
        let mut pieces = Vec::new();
        let mut from = at;
        while from < end
            && let Some(piece) = state.chain.piece(from)?
        {
            let place = match piece.data {
                None => None,
                Some((layer, place)) => {
                    state.chain.layers().get(layer).map(|layer| (Arc::clone(layer.file()), place))
                }
            };
            from = piece.end.min(end);
            pieces.push((from, place));
        }
        drop(state);
        if from < end {
            return Err(Error::new(ErrorKind::Io, "its images were handed on to another chain"));
        }
        let mut left = buf;
        let mut from = at;
        for (to, place) in pieces {
            let (part, rest) = left.split_at_mut((to - from) as usize);
            match place {
                Some((file, place)) => file.read_at(part, place)?,
                None => part.fill(0),
            }
            (from, left) = (to, rest);
        }
        Ok(())
    }

    /// Writes whole sectors. When it returns, the write survives the death of the process.
    ///
    /// # Errors
    /// As [`Chain::write_at`].
    pub fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        let mut state = self.lock();
        let end = at.saturating_add(buf.len() as u64);
        state.chain.write_at(buf, at)?;
        state.note(at, end)?;
        state.repeat(at, end, |twin| twin.write_at(buf, at))
    }

    /// Makes whole sectors zero. As durable as a write.
    ///
    /// # Errors
    /// As [`Chain::zero`].
    pub fn zero(&self, at: u64, length: u64) -> Result<()> {
        let mut state = self.lock();
        let end = at.saturating_add(length);
        state.chain.zero(at, length)?;
        state.note(at, end)?;
        state.repeat(at, end, |twin| twin.zero(at, length))
    }

    /// Returns the space of whole sectors. As durable as a write.
    ///
    /// # Errors
    /// As [`Chain::trim`].
    pub fn trim(&self, at: u64, length: u64) -> Result<()> {
        let mut state = self.lock();
        if state.twin.is_some() {
            // The two images could show different things afterwards.
            return Ok(());
        }
        state.chain.trim(at, length)?;
        state.note(at, at.saturating_add(length))
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    /// As [`Chain::flush`].
    pub fn flush(&self) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.lock().flush()
    }

    /// Returns the pieces from `at` to `end`, `limit` at most.
    ///
    /// # Errors
    /// As [`Chain::piece`].
    pub fn pieces(&self, at: u64, end: u64, limit: usize) -> Result<Vec<Piece>> {
        let mut state = self.lock();
        let (mut at, mut pieces) = (at, Vec::<Piece>::new());
        while at < end
            && let Some(mut piece) = state.chain.piece(at)?
        {
            piece.end = piece.end.min(end);
            at = piece.end;
            let is_full = pieces.len() == limit;
            match pieces.last_mut() {
                Some(last) if last.data.is_some() == piece.data.is_some() => last.end = piece.end,
                _ if is_full => break,
                _ => pieces.push(piece),
            }
        }
        Ok(pieces)
    }
}

impl State {
    /// Notes what a crash of this process would lose of a range.
    fn note(&mut self, at: u64, end: u64) -> Result<()> {
        let unflushed = self.chain.unflushed(at, end)?;
        if unflushed.is_empty() {
            return Ok(());
        }
        let is_noted = match &mut self.notes {
            Some(notes) if notes.length < MOST_NOTES => notes.add(&unflushed).is_ok(),
            _ => false,
        };
        // What cannot be noted is made durable instead.
        if is_noted { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<()> {
        self.chain.flush()?;
        self.flush_twin()?;
        match &mut self.notes {
            Some(notes) => notes.clear(),
            None => Ok(()),
        }
    }
}

/// Refuses an image that cannot be written, and makes what a killed server had acknowledged durable in it.
fn complete(top: &mut Vhd, notes: Option<&mut Notes>) -> Result<()> {
    top.require_writable()?;
    if let Some(notes) = notes {
        let left = notes.read()?;
        if !left.is_empty() {
            top.adopt(&left)?;
            top.flush()?;
        }
        notes.clear()?;
    }
    Ok(())
}

/// Makes durable what a killed server had acknowledged in an image that has a child by now: the child was
/// created, and the server was killed before it went on in it.
fn complete_parents(found: &Chain, options: &ServedOptions, previous: Option<&ServedChain>) -> Result<()> {
    let reading = ServedOptions { writable: false, ..options.clone() };
    for layer in found.layers().iter().rev().skip(1) {
        let Layer::Vhd(image) = layer else { continue };
        // The image that this process serves has its notes in use.
        let had = previous.map(|previous| previous.files.as_slice()).unwrap_or_default();
        let own = identity(image.file())?;
        if had.iter().map(|file| identity(file)).collect::<Result<Vec<_>>>()?.contains(&own) {
            continue;
        }
        match Notes::open(image, &reading) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Dirty && options.writable => {
                let mut parent = Vhd::open(image.path(), &OpenOptions::read_write())?;
                let mut notes = Notes::open(&parent, options)?;
                complete(&mut parent, notes.as_mut())?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn identity(file: &ImageFile) -> Result<(u64, u64)> {
    let about = file.file().map(File::metadata).transpose();
    let about = about.map_err(|error| Error::io("the file cannot be looked at", error))?;
    Ok(about.map(|about| (about.dev(), about.ino())).unwrap_or_default())
}

/// Locks the files of a chain, and returns them, the top first; then those of `previous`, which keeps its own
/// locks until it is dropped. A file of both is locked by the one that `previous` has open: its locks are
/// shared, and those of another would conflict. It gets the name by which `chain` was led to it: the other
/// may be the configured path, which becomes the child's.
fn lock_all(chain: &Chain, writable: bool, previous: Option<&ServedChain>) -> Result<Vec<Arc<ImageFile>>> {
    let had = previous.map(|previous| previous.files.as_slice()).unwrap_or_default();
    let mut files = Vec::new();
    for (number, layer) in chain.layers().iter().rev().enumerate() {
        let wanted = identity(layer.file())?;
        let mut file = Arc::clone(layer.file());
        let mut is_had = false;
        for other in had {
            if identity(other)? == wanted {
                file = Arc::new(other.under(layer.file().path())?);
                is_had = true;
            }
        }
        let mode = if number == 0 && writable { LockMode::Write } else { LockMode::Read };
        if let Some(opened) = file.file() {
            lock(opened, mode).map_err(|error| {
                // A failed lock releases what the file had: the previous chain goes on with a reader's lock.
                let _ = is_had.then(|| lock(opened, LockMode::Read));
                Error::from(error).on("open", file.path())
            })?;
        }
        files.push(file);
    }
    Ok(files)
}

/// The file of notes.
#[derive(Debug)]
struct Notes {
    file: File,
    path: PathBuf,
    head: [u8; HEAD],
    length: u64,
    /// True once the head in the file is known to be this one.
    is_ours: bool,
}

impl Notes {
    /// Opens the notes of the image `top`. Without a directory for them there are none.
    fn open(top: &Vhd, options: &ServedOptions) -> Result<Option<Self>> {
        let Some(directory) = &options.notes else { return Ok(None) };
        if top.header().is_none() {
            return Ok(None); // A fixed image has neither bits nor entries.
        }
        let path = directory.join(notes_name(identity(top.file())?));
        let failed =
            |error: io::Error| Error::io("the notes of a server cannot be kept", error).on("open", &path);
        let head = head(top.id()).map_err(failed)?;
        let make = || -> io::Result<Option<File>> {
            if !options.writable && !directory.exists() {
                return Ok(None);
            }
            let kept = Directory::make_all(directory, 0o700)?;
            let about = kept.about()?;
            if about.uid != rustix::process::geteuid().as_raw() || about.mode & 0o077 != 0 {
                return Err(io::Error::other(format!(
                    "{} is not a directory for this user alone",
                    directory.display()
                )));
            }
            let name = FileName::new(path.file_name().unwrap_or_default()).map_err(io::Error::other)?;
            match kept.look(&name)? {
                Some(_) => kept.open_file(&name, true, Kind::Regular).map(Some),
                None if options.writable => kept.create_new(&name, 0o600).map(Some),
                None => Ok(None),
            }
        };
        let Some(file) = make().map_err(failed)? else { return Ok(None) };
        let length = file.metadata().map_err(failed)?.len();
        let mut notes = Self { file, path: path.clone(), head, length, is_ours: false };
        if !options.writable {
            if notes.read()?.is_empty() {
                return Ok(None);
            }
            let message = "its server was killed, and what it acknowledged is not in the image yet";
            let error = Error::new(ErrorKind::Dirty, message).on("read", top.path());
            return Err(error.advise("serve it for writing once: that completes the image"));
        }
        Ok(Some(notes))
    }

    /// The notes of a killed server; none if they are of another image or were made before a reboot.
    fn read(&mut self) -> Result<Vec<Unflushed>> {
        let mut bytes = Vec::new();
        let mut from = &self.file;
        let failed = |error| Error::io("the notes of a server cannot be read", error).on("read", &self.path);
        io::Seek::seek(&mut from, io::SeekFrom::Start(0)).map_err(failed)?;
        from.take(MOST_NOTES * 2).read_to_end(&mut bytes).map_err(failed)?;
        let notes = bytes.strip_prefix(&self.head);
        self.is_ours = notes.is_some();
        match notes {
            None => Ok(Vec::new()),
            // A note of which only a part is there was not acknowledged.
            Some(notes) => Ok(notes
                .chunks_exact(Unflushed::BYTES)
                .filter_map(|note| note.try_into().ok())
                .map(Unflushed::parse)
                .collect()),
        }
    }

    fn add(&mut self, unflushed: &[Unflushed]) -> Result<()> {
        let bytes: Vec<u8> = unflushed.iter().flat_map(|note| note.to_bytes()).collect();
        self.file.write_all_at(&bytes, self.length).map_err(|error| self.failed(error))?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Removes all notes: what they say is durable.
    fn clear(&mut self) -> Result<()> {
        if self.is_ours && self.length == HEAD as u64 {
            return Ok(());
        }
        // 1) Nothing. 2) The head, so that notes of an earlier boot never follow it.
        let emptied = self.file.set_len(0).and_then(|()| self.file.write_all_at(&self.head, 0));
        emptied.map_err(|error| self.failed(error))?;
        (self.length, self.is_ours) = (HEAD as u64, true);
        Ok(())
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::io("the notes of a server cannot be kept", error).on("write", &self.path)
    }
}

/// The bytes before the notes: this boot, and the image.
fn head(id: UniqueId) -> io::Result<[u8; HEAD]> {
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id")?;
    let mut head = [0; HEAD];
    let text = [&MAGIC[..], &id.0, boot.get(..36).unwrap_or(&boot)].concat();
    if let Some(place) = head.get_mut(..text.len()) {
        place.copy_from_slice(&text);
    }
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{NewImage, ParentName, TimeStamp, write_into};

    const SIZE: u64 = 16 << 20;

    struct Fixture {
        directory: tempfile::TempDir,
        child: PathBuf,
    }

    impl Fixture {
        /// A parent full of ones in its first half, and an empty child.
        fn new() -> Self {
            let directory = tempfile::tempdir_in("/var/tmp").unwrap();
            let (parent, child) = (directory.path().join("p.vhd"), directory.path().join("c.vhd"));
            let id = UniqueId::random();
            let create = |path: &Path, new: &NewImage| {
                let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
                write_into(file, path, new).unwrap();
            };
            create(&parent, &NewImage::new(SIZE).id(id));
            let mut image = Vhd::open(&parent, &OpenOptions::read_write()).unwrap();
            image.write_at(&vec![1; SIZE as usize / 2], 0).unwrap();
            image.flush().unwrap();
            let name = "p.vhd".to_owned();
            let name = ParentName { id, time: TimeStamp::now(), relative: name.clone(), name };
            create(&child, &NewImage::new(SIZE).on(name));
            Self { directory, child }
        }

        fn options(&self) -> ServedOptions {
            let notes = Some(self.directory.path().join("notes"));
            ServedOptions { allowed: Vec::new(), writable: true, notes }
        }

        fn open(&self) -> ServedChain {
            ServedChain::open(&self.child, &self.options(), None).unwrap()
        }
    }

    /// Writes, zeros and trims that are not flushed, on the chain and on a model.
    fn work(chain: &ServedChain, model: &mut [u8], seed: u64) {
        let mut random = seed | 1;
        let mut next = |limit: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % limit
        };
        for number in 0..300 {
            let (at, length) = (next(SIZE / 512 - 64) * 512, (1 + next(40)) * 512);
            let range = at as usize..(at + length) as usize;
            match next(8) {
                0 => {
                    chain.zero(at, length).unwrap();
                    model[range].fill(0);
                }
                _ => {
                    let data = vec![number as u8 | 0x80; length as usize];
                    chain.write_at(&data, at).unwrap();
                    model[range].copy_from_slice(&data);
                }
            }
            if next(100) == 0 {
                chain.flush().unwrap();
            }
        }
    }

    fn content(chain: &ServedChain) -> Vec<u8> {
        let mut bytes = vec![9; SIZE as usize];
        chain.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn model() -> Vec<u8> {
        let mut model = vec![1; SIZE as usize / 2];
        model.resize(SIZE as usize, 0);
        model
    }

    /// What was acknowledged by a process that ended without a flush is there in the next one, several times
    /// over.
    #[test]
    fn unflushed_writes_survive_the_process() {
        let fixture = Fixture::new();
        let mut model = model();
        for seed in 1..6 {
            let chain = fixture.open();
            assert!(content(&chain) == model, "seed {seed}");
            work(&chain, &mut model, seed * 7919);
            assert!(content(&chain) == model, "seed {seed}");
        }
        assert!(content(&fixture.open()) == model);
        // Read alone, without the notes, it is complete too.
        let options = ServedOptions { writable: false, notes: None, ..fixture.options() };
        assert!(content(&ServedChain::open(&fixture.child, &options, None).unwrap()) == model);
    }

    /// Without a place for notes, each write is durable when it returns.
    #[test]
    fn writes_survive_without_notes() {
        let fixture = Fixture::new();
        let options = ServedOptions { notes: None, ..fixture.options() };
        let mut model = model();
        let chain = ServedChain::open(&fixture.child, &options, None).unwrap();
        work(&chain, &mut model, 4711);
        drop(chain);
        assert!(content(&ServedChain::open(&fixture.child, &options, None).unwrap()) == model);
    }

    /// After a reboot the notes are void: each sector is the old one or the new one.
    #[test]
    fn notes_of_another_boot_are_void() {
        let fixture = Fixture::new();
        let (old, mut new) = (model(), model());
        let chain = fixture.open();
        work(&chain, &mut new, 31337);
        drop(chain);
        let notes =
            std::fs::read_dir(fixture.directory.path().join("notes")).unwrap().next().unwrap().unwrap();
        let file = File::options().write(true).open(notes.path()).unwrap();
        file.write_all_at(b"another boot", 24).unwrap();
        let chain = fixture.open();
        let found = content(&chain);
        for (at, sector) in found.chunks(512).enumerate() {
            let range = at * 512..(at + 1) * 512;
            // A sector that was written twice and flushed between may be the one in the middle.
            let middle = sector.iter().all(|byte| *byte == sector[0]);
            assert!(sector == &old[range.clone()] || sector == &new[range] || middle, "sector {at}");
        }
        // Notes of this boot follow the right head.
        let mut model = found;
        work(&chain, &mut model, 99);
        drop(chain);
        assert!(content(&fixture.open()) == model);
    }

    /// A server is killed after the child was created and before it went on in it. Whatever is opened next,
    /// the child for writing included, has what was acknowledged in the parent.
    #[test]
    fn notes_of_a_parent_are_completed() {
        let fixture = Fixture::new();
        let parent = fixture.directory.path().join("p.vhd");
        let chain = ServedChain::open(&parent, &fixture.options(), None).unwrap();
        let mut model = model();
        // A block that is new to the image.
        chain.write_at(&[7; 4096], SIZE - 8192).unwrap();
        model[SIZE as usize - 8192..SIZE as usize - 4096].fill(7);
        drop(chain);
        let reading = ServedOptions { writable: false, ..fixture.options() };
        let error = ServedChain::open(&fixture.child, &reading, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Dirty);
        let chain = fixture.open();
        assert!(content(&chain) == model);
        drop(chain);
        assert!(content(&ServedChain::open(&fixture.child, &reading, None).unwrap()) == model);
    }

    /// An image with notes is not read without them, and one that another program changed is refused.
    #[test]
    fn notes_that_do_not_fit_are_refused() {
        let fixture = Fixture::new();
        let chain = fixture.open();
        chain.write_at(&[7; 512], 0).unwrap();
        drop(chain);
        let reading = ServedOptions { writable: false, ..fixture.options() };
        let error = ServedChain::open(&fixture.child, &reading, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Dirty);
        let mut other = Vhd::open(&fixture.child, &OpenOptions::read_write()).unwrap();
        other.write_at(&[8; 512], 0).unwrap();
        other.flush().unwrap();
        drop(other);
        let before = std::fs::read(&fixture.child).unwrap();
        let error = ServedChain::open(&fixture.child, &fixture.options(), None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(std::fs::read(&fixture.child).unwrap() == before);
    }

    /// The image is locked, and a chain that follows shares the locks.
    #[test]
    fn next_chain_shares_the_locks() {
        let fixture = Fixture::new();
        let chain = fixture.open();
        let error = ServedChain::open(&fixture.child, &fixture.options(), None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        let parent = fixture.directory.path().join("p.vhd");
        let next = ServedChain::open(&parent, &fixture.options(), Some(&chain)).unwrap();
        drop(chain);
        let error = Vhd::open(&parent, &OpenOptions::read_only()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        Vhd::open(&fixture.child, &OpenOptions::read_only()).unwrap();
        drop(next);
        Vhd::open(&parent, &OpenOptions::read_write()).unwrap();
    }

    /// A fixed image is written in place.
    #[test]
    fn fixed_image_is_written() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = directory.path().join("f.vhd");
        let footer = crate::image::Footer::new(
            crate::image::DiskType::Fixed,
            1 << 20,
            UniqueId::random(),
            TimeStamp::now(),
        );
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.write_all_at(footer.bytes(), 1 << 20).unwrap();
        let options = ServedOptions { allowed: Vec::new(), writable: true, notes: None };
        let chain = ServedChain::open(&path, &options, None).unwrap();
        chain.write_at(&[5; 1024], 4096).unwrap();
        chain.zero(4608, 512).unwrap();
        chain.flush().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(
            (bytes.len(), bytes[4096], bytes[4608], &bytes[1 << 20..]),
            ((1 << 20) + 512, 5, 0, footer.bytes())
        );
    }
}
