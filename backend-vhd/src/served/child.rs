//! An image that becomes the top of the chain that is served, on the images that are open already.
//!
//! A disk goes on in a new child while its guest is paused. So everything that can be done before is done
//! before: the child is opened, locked and checked while the chain is written
//! ([`ServedChain::prepare_child`]). In the pause the images change hands ([`ServedChain::put_on`]), and no
//! table is read again. The image that was the top is known by its permanent name from then on, because the
//! configured path becomes the child's.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use image_files::{LockMode, lock};

use super::{Notes, ServedChain, ServedOptions, State, complete, identity};
use crate::image::{DEFAULT_DEPTH, Error, ErrorKind, ImageFile, OpenOptions, Result, Vhd, find_parent};

/// A child of the top of a chain that is served: open, locked and checked. Dropped, it gives back its lock.
#[derive(Debug)]
pub struct ServedChild {
    image: Vhd,
    notes: Option<Notes>,
    /// The name of its parent that the child leads to.
    parent: PathBuf,
}

impl ServedChild {
    /// The files of the chain that it will be the top of, the top first, each with its name.
    pub fn files_on<'a>(&'a self, chain: &'a ServedChain) -> impl Iterator<Item = (&'a Path, &'a ImageFile)> {
        let own = (self.image.path(), self.image.file());
        let below = chain.files().iter().enumerate().map(|(number, file)| {
            let name = if number == 0 { self.parent.as_path() } else { file.path() };
            (name, file.as_ref())
        });
        std::iter::once(own).chain(below)
    }
}

impl ServedChain {
    /// Opens, locks and checks the image at `path`, which is to be the next top, while the chain is used.
    /// `None` if it is not a child of the top: it can be opened with its chain only.
    ///
    /// # Errors
    /// As [`ServedChain::open`].
    pub fn prepare_child(&self, path: &Path, options: &ServedOptions) -> Result<Option<ServedChild>> {
        let Some(top) = self.files().first().filter(|_| self.writable && options.writable) else {
            return Ok(None);
        };
        let top = identity(top)?;
        // 1) Which image it is. One that the chain has is locked by the chain.
        let found = Vhd::open(path, &OpenOptions::read_only().unlocked())?;
        let named = identity(found.file())?;
        for file in self.files() {
            if identity(file)? == named {
                return Ok(None);
            }
        }
        let is_on_top = |image: &Vhd| -> Result<Option<PathBuf>> {
            let Some(parent) = find_parent(image, &options.allowed)? else { return Ok(None) };
            let file = ImageFile::open(&parent.path, false)?;
            Ok((!parent.is_raw && identity(&file)? == top).then_some(parent.path))
        };
        let fits = found.size() >= self.size && self.depth < DEFAULT_DEPTH;
        if !fits || is_on_top(&found)?.is_none() {
            return Ok(None);
        }
        // 2) Its lock. 3) Its content, which no process changes any more.
        let mut image = Vhd::open(path, &OpenOptions::read_write())?;
        let parent = is_on_top(&image)?.filter(|_| identity(image.file()).is_ok_and(|file| file == named));
        let Some(parent) = parent else {
            return Err(Error::new(ErrorKind::Locked, "it changes at this moment")
                .advise("try again")
                .on("open", path));
        };
        let mut notes = Notes::open(&image, options)?;
        complete(&mut image, notes.as_mut())?;
        Ok(Some(ServedChild { image, notes, parent }))
    }

    /// Makes `child` the top. No request uses the chain, and everything that was written is durable. This
    /// chain has no image afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`]; the system's. The chain is as before, and the child's lock is given back.
    pub fn put_on(&self, child: ServedChild) -> Result<Self> {
        let ServedChild { image, notes, parent } = child;
        let mut state = self.lock();
        // 1) What can fail. Two names of one file: the chain's own, and the one by which it is read.
        let (Some(own), Some(top)) = (self.files().first(), state.chain.top_mut()) else {
            return Err(Error::new(ErrorKind::ReadOnly, "the top of the chain is not a VHD"));
        };
        let is_same = identity(&ImageFile::open(&parent, false)?)? == identity(own)?;
        if !is_same || image.parent_id() != Some(top.id()) || image.size() < top.size() {
            return Err(Error::new(ErrorKind::Locked, "it is not a child of the image that is served")
                .on("use", image.path()));
        }
        let files: Vec<Arc<ImageFile>> = [Arc::clone(&image.file), Arc::new(own.under(&parent)?)]
            .into_iter()
            .chain(self.files().iter().skip(1).map(Arc::clone))
            .collect();
        let previous = Arc::new(top.file.under(&parent)?);
        // 2) The frozen image may be read by others. A failed lock releases what the file had.
        if let Some(opened) = own.file() {
            lock(opened, LockMode::Read).map_err(|error| {
                let _ = lock(opened, LockMode::Write);
                Error::from(error).on("freeze", &parent)
            })?;
        }
        // 3) The images change hands, which cannot fail.
        let (size, depth) = (image.size(), files.len());
        let chain = state.chain.hand_on(image, previous);
        let state = Mutex::new(State { chain, notes, twin: None });
        Ok(Self { state, size, writable: true, files, depth })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Moving;
    use crate::image::{NewImage, ParentName, TimeStamp, UniqueId, write_into};
    use crate::served::ServedMerge;

    const SIZE: u64 = 16 << 20;

    struct Fixture {
        directory: tempfile::TempDir,
        options: ServedOptions,
    }

    impl Fixture {
        /// A base that is served by a second name, the configured path.
        fn new() -> (Self, Arc<ServedChain>) {
            let directory = tempfile::tempdir_in("/var/tmp").unwrap();
            let notes = Some(directory.path().join("notes"));
            let options = ServedOptions { allowed: Vec::new(), writable: true, notes };
            let fixture = Self { directory, options };
            fixture.create("base.vhd", &NewImage::new(SIZE));
            std::fs::hard_link(fixture.path("base.vhd"), fixture.path("disk.vhd")).unwrap();
            let chain = ServedChain::open(&fixture.path("disk.vhd"), &fixture.options, None).unwrap();
            (fixture, Arc::new(chain))
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn create(&self, name: &str, new: &NewImage) {
            let path = self.path(name);
            let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            write_into(file, &path, new).unwrap();
        }

        fn create_child(&self, name: &str, parent: &str) {
            let id = Vhd::open(&self.path(parent), &OpenOptions::read_only().unlocked()).unwrap().id();
            let parent = ParentName {
                id,
                time: TimeStamp::now(),
                relative: parent.to_owned(),
                name: parent.to_owned(),
            };
            self.create(name, &NewImage::new(SIZE).id(UniqueId::random()).on(parent));
        }

        /// Makes an image the top of `chain`, and moves the configured path to it.
        fn go_on(&self, chain: &ServedChain, name: &str) -> Arc<ServedChain> {
            let child = chain.prepare_child(&self.path(name), &self.options).unwrap().unwrap();
            chain.write_at(&[0xEE; 512], SIZE - 512).unwrap();
            chain.flush().unwrap();
            let next = chain.put_on(child).unwrap();
            std::fs::remove_file(self.path("disk.vhd")).unwrap();
            std::fs::hard_link(self.path(name), self.path("disk.vhd")).unwrap();
            Arc::new(next)
        }
    }

    fn content(chain: &ServedChain) -> Vec<u8> {
        let mut bytes = vec![9; SIZE as usize];
        chain.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// A disk goes on in one child after the other. What was written after a child was prepared is read
    /// through it, the frozen images do not change, and nothing that was acknowledged needs a flush.
    #[test]
    fn children_are_put_on_open_images() {
        let (fixture, mut chain) = Fixture::new();
        let mut model = vec![0; SIZE as usize];
        let mut previous = "base.vhd".to_owned();
        for number in 1..5u8 {
            let at = u64::from(number) * 700 * 512;
            chain.write_at(&[number; 4096], at).unwrap();
            model[at as usize..at as usize + 4096].fill(number);
            let name = format!("{number}.vhd");
            fixture.create_child(&name, &previous);
            let next = fixture.go_on(&chain, &name);
            model[SIZE as usize - 512..].fill(0xEE);
            assert!(content(&next) == model, "{name}");
            let frozen = std::fs::read(fixture.path(&previous)).unwrap();
            // The previous chain has no image, and does not read zeros.
            assert!(chain.read_at(&mut [0; 512], 0).is_err() && chain.write_at(&[0; 512], 0).is_err());
            next.write_at(&[number | 0x80; 1024], at + 512).unwrap();
            model[at as usize + 512..at as usize + 1536].fill(number | 0x80);
            assert!(std::fs::read(fixture.path(&previous)).unwrap() == frozen, "{name} froze nothing");
            // The frozen image is locked for reading, the child for writing.
            let open = |name: &str, how: &OpenOptions| Vhd::open(&fixture.path(name), how).map(drop);
            assert_eq!(open(&name, &OpenOptions::read_only()).unwrap_err().kind(), ErrorKind::Locked);
            open(&previous, &OpenOptions::read_only()).unwrap();
            assert_eq!(open(&previous, &OpenOptions::read_write()).unwrap_err().kind(), ErrorKind::Locked);
            (chain, previous) = (next, name);
        }
        assert!(content(&chain) == model);
        drop(chain);
        let chain = ServedChain::open(&fixture.path("disk.vhd"), &fixture.options, None).unwrap();
        assert!(content(&chain) == model, "without a flush");
        assert_eq!(chain.files().len(), 5);
    }

    /// The images below are known by their permanent names, too, where the child was not prepared and its
    /// chain is opened: a server was started again between the two.
    #[test]
    fn chain_that_is_opened_has_permanent_names() {
        let (fixture, chain) = Fixture::new();
        fixture.create_child("1.vhd", "base.vhd");
        let next = ServedChain::open(&fixture.path("1.vhd"), &fixture.options, Some(&chain)).unwrap();
        let names: Vec<_> = next.files().iter().map(|file| file.path().to_owned()).collect();
        assert_eq!(names, ["1.vhd", "base.vhd"].map(|name| fixture.path(name)));
    }

    /// The images below are known by their permanent names, so they are merged though the configured path is
    /// the child's by then.
    #[test]
    fn chain_that_was_put_together_is_merged() {
        for into in ["base.vhd", "2.vhd"] {
            let (fixture, chain) = Fixture::new();
            chain.write_at(&[1; 4096], 0).unwrap();
            fixture.create_child("1.vhd", "base.vhd");
            let chain = fixture.go_on(&chain, "1.vhd");
            chain.write_at(&[2; 4096], 8192).unwrap();
            fixture.create_child("2.vhd", "1.vhd");
            let chain = fixture.go_on(&chain, "2.vhd");
            chain.write_at(&[3; 512], 8192).unwrap();
            let model = content(&chain);
            let run = ["base.vhd", "1.vhd", "2.vhd"].map(|name| fixture.path(name));
            let mut merge = ServedMerge::new(&chain, &fixture.options, &run, &fixture.path(into)).unwrap();
            merge.run(&|_| {}, &Moving::quietly()).unwrap();
            chain.flush().unwrap();
            let merged = merge.finish().unwrap();
            assert!(content(&merged) == model, "{into}");
            assert_eq!(merged.files().len(), 1, "{into}");
        }
    }

    /// An image that is no child of the top is not prepared, one that another process has is refused, and a
    /// child that is dropped is given back.
    #[test]
    fn only_a_free_child_of_the_top_is_prepared() {
        let (fixture, chain) = Fixture::new();
        fixture.create("other.vhd", &NewImage::new(SIZE));
        fixture.create_child("1.vhd", "base.vhd");
        fixture.create_child("of-other.vhd", "other.vhd");
        let prepare = |name: &str| chain.prepare_child(&fixture.path(name), &fixture.options);
        for name in ["other.vhd", "of-other.vhd", "base.vhd", "disk.vhd"] {
            assert!(prepare(name).unwrap().is_none(), "{name}");
        }
        let other = Vhd::open(&fixture.path("1.vhd"), &OpenOptions::read_only()).unwrap();
        assert_eq!(prepare("1.vhd").unwrap_err().kind(), ErrorKind::Locked);
        drop(other);
        let child = prepare("1.vhd").unwrap().unwrap();
        let again = Vhd::open(&fixture.path("1.vhd"), &OpenOptions::read_only());
        assert_eq!(again.unwrap_err().kind(), ErrorKind::Locked);
        drop(child);
        Vhd::open(&fixture.path("1.vhd"), &OpenOptions::read_only()).unwrap();
        // A child whose parent was replaced meanwhile is refused, and the chain goes on.
        let child = prepare("1.vhd").unwrap().unwrap();
        std::fs::rename(fixture.path("other.vhd"), fixture.path("base.vhd")).unwrap();
        assert_eq!(chain.put_on(child).unwrap_err().kind(), ErrorKind::Locked);
        chain.write_at(&[5; 512], 0).unwrap();
        chain.flush().unwrap();
        let locked = Vhd::open(&fixture.path("disk.vhd"), &OpenOptions::read_only());
        assert_eq!(locked.unwrap_err().kind(), ErrorKind::Locked);
    }
}
