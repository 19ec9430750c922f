//! Shows disks as files of a directory, over FUSE: the kernel can attach them to loop devices and mount what
//! is in them.
//!
//! What is written to such a file goes to a scratch file that has no name, and nowhere else. So a file system
//! replays its journal when it is mounted, although the disk itself is only read. The scratch file ends with
//! the process.
//!
//! A process that is killed leaves a mount point that answers with an error, until it is unmounted.

#![forbid(unsafe_code)]

mod directory;
mod scratch;

use std::io;

use camino::Utf8Path;
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};

use directory::Directory;
use scratch::Scratch;

/// The content of a disk that is shown.
pub trait Content: Send + Sync {
    /// Bytes of the disk. A constant.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes at `offset`, all of them within the disk. Several threads call it at once.
    ///
    /// # Errors
    /// The system's, and those of a broken image.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A disk, and the name of its file.
pub struct Shown {
    /// A file name.
    pub name: String,
    /// What is read.
    pub content: Box<dyn Content>,
}

/// Files of disks, for as long as this exists.
pub struct DiskFiles {
    session: Option<BackgroundSession>,
}

impl DiskFiles {
    /// Shows disks as files of `directory`, an empty one. Only this user can reach them. What is written to
    /// them takes room in `scratch`, a directory.
    ///
    /// # Errors
    /// The system's: without `/dev/fuse`, or the right to mount, that of `mount`.
    pub fn show(disks: Vec<Shown>, directory: &Utf8Path, scratch: &Utf8Path) -> io::Result<Self> {
        let files = disks.into_iter().map(|disk| {
            let kept = Scratch::new(disk.content, scratch)?;
            Ok((disk.name, kept))
        });
        let files = Directory::new(files.collect::<io::Result<Vec<_>>>()?);
        let mut config = Config::default();
        config.mount_options =
            vec![MountOption::FSName("domsnap".to_owned()), MountOption::NoDev, MountOption::NoSuid];
        config.acl = SessionACL::Owner;
        let session = Session::new(files, directory.as_std_path(), &config)?.spawn()?;
        Ok(Self { session: Some(session) })
    }

    /// Unmounts the directory.
    ///
    /// # Errors
    /// `Busy` while a file of it is open: it stays mounted until this process ends.
    pub fn end(mut self) -> io::Result<()> {
        self.session.take().map_or(Ok(()), BackgroundSession::umount_and_join)
    }
}
