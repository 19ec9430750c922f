//! [`Draft`]: a memory image that is being written.

use std::{
    fs::File,
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::{
    global_state,
    image::{Image, checksums},
    packed::{self, Packed, Packing},
    record::{LONGEST_METADATA, Record},
};
use crate::{
    error::{Error, ErrorKind, Result},
    qcow2::{self, RECORD, STREAM},
};

/// A memory image that is being written: `.NAME.part` beside its final name, mode 0600. Removed when dropped.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    part: PathBuf,
    file: Option<File>,
}

impl Draft {
    /// Creates a draft. Replaces the remains of an earlier attempt at the same name.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the name is taken; [`ErrorKind::Io`]. Nothing is left behind.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let attempted = "making a memory image";
        let part = Self::part(&path).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, attempted, path.display(), "it has no file name")
        })?;
        if path.symlink_metadata().is_ok() {
            return Err(Error::new(ErrorKind::Invalid, attempted, path.display(), "the file exists")
                .advise("give the snapshot another name, or remove the file if nothing needs it"));
        }
        Self::remove_stale(&path)?;
        let file = confined_files::create_private(&part);
        let file = file.map_err(|error| Error::io(attempted, &part, error))?;
        Ok(Self { path, part, file: Some(file) })
    }

    fn part(path: &Path) -> Option<PathBuf> {
        Self::beside(path, ".part")
    }

    /// The file that the compressed image is written to.
    fn packing(path: &Path) -> Option<PathBuf> {
        Self::beside(path, ".packing")
    }

    fn beside(path: &Path, ending: &str) -> Option<PathBuf> {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name()?);
        name.push(ending);
        Some(path.with_file_name(name))
    }

    /// Removes the remains of a draft of that name after a crash. Does nothing if there are none.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn remove_stale(path: &Path) -> Result<()> {
        for left in [Self::part(path), Self::packing(path)].into_iter().flatten() {
            confined_files::remove(&left)
                .map_err(|error| Error::io("removing the remains of a memory image", &left, error))?;
        }
        Ok(())
    }

    /// Returns its final name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self) -> Result<&File> {
        let gone =
            || Error::new(ErrorKind::Invalid, "writing a memory image", self.path.display(), "it is closed");
        self.file.as_ref().ok_or_else(gone)
    }

    /// Opens the file write-only, as QEMU needs it, positioned at the stream.
    pub(crate) fn writable(&self) -> Result<OwnedFd> {
        let open = || {
            let mut file = confined_files::open_to_write(&self.part)?;
            let (is, made) = (file.metadata()?, self.file.as_ref().map(File::metadata).transpose()?);
            if made.is_some_and(|made| (made.dev(), made.ino()) != (is.dev(), is.ino())) {
                return Err(confined_files::refused("it is another file than the one that was made"));
            }
            io::Seek::seek(&mut file, io::SeekFrom::Start(STREAM))?;
            // Data of a previous attempt must not remain behind the end of this stream.
            file.set_len(STREAM)?;
            Ok(file.into())
        };
        open().map_err(|error: io::Error| Error::io("opening a memory image", &self.part, error))
    }

    /// Run state of the guest when its migration stopped it, by the stream that QEMU has written: after the
    /// migration QEMU itself reports nothing but `postmigrate`. None where the stream does not have it.
    pub(crate) fn run_state_at_the_end(&self) -> Result<Option<String>> {
        global_state::read(self.file()?, STREAM)
            .map_err(|error| Error::io("reading a memory image", &self.part, error))
    }

    /// Returns the number of bytes that QEMU has written.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn written(&self) -> Result<u64> {
        let about = self.file()?.metadata();
        let about = about.map_err(|error| Error::io("reading a memory image", &self.part, error))?;
        Ok(about.len().saturating_sub(STREAM))
    }

    /// Makes it an image: checksums, tables, record, header, durable, named. Blocks while it reads the stream
    /// once, so call it from a thread that may block. The migration must be completed.
    ///
    /// `tag` is the name of the internal snapshot. If disks have internal snapshots of the same instant, it
    /// is their name. `metadata`, 1 MiB at most, is kept in the record and returned by [`Image::metadata`].
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if the data is not a stream of QEMU; [`ErrorKind::Invalid`] for a name or
    /// metadata that does not fit, or if the final name is taken by now; [`ErrorKind::Io`]. After any error
    /// the draft is gone, and no file has the name. One exception: if only the directory's flush failed, the
    /// file is complete, but may be missing after a power loss.
    pub fn seal(mut self, tag: &str, metadata: &[u8]) -> Result<Image> {
        let attempted = "finishing a memory image";
        let failed = |error: io::Error| Error::io(attempted, &self.part, error);
        if metadata.len() > LONGEST_METADATA {
            let detail = format!("its metadata has {} bytes, {LONGEST_METADATA} at most", metadata.len());
            return Err(Error::new(ErrorKind::Invalid, attempted, self.path.display(), detail));
        }
        let file = self.file()?;
        let stream = self.written()?;
        super::image::expect_stream(&self.path, file, stream)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let wrapper = qcow2::wrapper(stream, tag, seconds)?;
        let checksums = checksums(file, STREAM, stream).map_err(failed)?;
        let record = Record { stream, checksums, metadata: metadata.to_vec() };

        // 1) Tables and record, then make them durable together with the stream.
        for (at, bytes) in &wrapper.tables {
            file.write_all_at(bytes, *at).map_err(failed)?;
        }
        file.write_all_at(&record.bytes(), RECORD).map_err(failed)?;
        file.set_len(wrapper.length).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        // 2) The header, which makes the file an image: only after all that it points to. A crash before this
        //    leaves a file that neither QEMU nor `open` accepts.
        file.write_all_at(&wrapper.header, 0).map_err(failed)?;
        file.sync_all().map_err(failed)?;

        // 3) The final name, only for a complete file. A crash before this leaves `.NAME.part`, which
        //    `remove_stale` removes.
        give_name(&self.part, &self.path)?;
        self.file = None;
        flush_directory(&self.path)?;
        Image::open(&self.path)
    }

    /// Like [`Draft::seal`], compressed with zstd at a level of 1 to 19, by several threads. Needs space for
    /// both forms. The draft is removed when the compressed image is complete, durable and has the name.
    ///
    /// # Errors
    /// Those of [`Draft::seal`]; [`ErrorKind::Cancelled`] after [`Packing::stop`]. The error comes with the
    /// draft, which is unchanged: it can be sealed instead.
    pub fn pack(
        self,
        tag: &str,
        metadata: &[u8],
        level: u8,
        packing: &Packing,
    ) -> std::result::Result<Packed, (Error, Self)> {
        match self.packed(tag, metadata, level, packing) {
            Ok(packed) => Ok(packed),
            Err(error) => {
                if let Some(half) = Self::packing(&self.path) {
                    let _ = confined_files::remove(&half);
                }
                Err((error, self))
            }
        }
    }

    fn packed(&self, tag: &str, metadata: &[u8], level: u8, packing: &Packing) -> Result<Packed> {
        let attempted = "compressing a memory image";
        let invalid = |detail: String| Error::new(ErrorKind::Invalid, attempted, self.path.display(), detail);
        if metadata.len() > LONGEST_METADATA || !packed::LEVELS.contains(&level) {
            return Err(invalid(format!("{} bytes of metadata, level {level}", metadata.len())));
        }
        let file = self.file()?;
        let stream = self.written()?;
        super::image::expect_stream(&self.path, file, stream)?;
        // Checks that it can be unpacked later.
        qcow2::wrapper(stream, tag, 0)?;
        let half = Self::packing(&self.path).ok_or_else(|| invalid("it has no file name".to_owned()))?;
        let target = confined_files::remove(&half).and_then(|_| confined_files::create_private(&half));
        let target = target.map_err(|error| Error::io(attempted, &half, error))?;
        let done = packed::pack(file, &target, stream, (tag, metadata), level, packing);
        done.map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => {
                Error::new(ErrorKind::Cancelled, attempted, self.path.display(), "it was cancelled")
            }
            _ => Error::io(attempted, &half, error),
        })?;
        // The compressed file is durable (`packed::pack` flushed it). Name it before the draft is removed: a
        // crash between the two leaves both, and never neither.
        give_name(&half, &self.path)?;
        let removed = confined_files::remove(&self.part);
        removed.map_err(|error| Error::io(attempted, &self.part, error))?;
        flush_directory(&self.path)?;
        Packed::open(&self.path)
    }
}

/// Gives a file its final name, which must be free.
fn give_name(from: &Path, to: &Path) -> Result<()> {
    let attempted = "finishing a memory image";
    match confined_files::rename(from, to, false) {
        Ok(()) => Ok(()),
        // The file system lacks that flag. No other process creates names here, and `create` has checked.
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            confined_files::rename(from, to, true).map_err(|error| Error::io(attempted, from, error))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let detail = "another file has its name by now";
            Err(Error::new(ErrorKind::Invalid, attempted, to.display(), detail))
        }
        Err(error) => Err(Error::io(attempted, from, error)),
    }
}

fn flush_directory(of: &Path) -> Result<()> {
    confined_files::sync_directory_of(of)
        .map_err(|error| Error::io("flushing the directory of a memory image", of, error))
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.file.is_some() {
            let _ = confined_files::remove(&self.part);
        }
    }
}
