//! The directory of the files, as the kernel asks for it.

use std::ffi::OsStr;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyWrite, Request, WriteFlags,
};

use crate::scratch::Scratch;

/// Nothing that the kernel remembers of the directory ever changes.
const FOR_EVER: Duration = Duration::from_secs(86_400);

/// One directory with a file for each disk.
pub(crate) struct Directory {
    files: Vec<(String, Scratch)>,
    owner: (u32, u32),
}

impl Directory {
    pub(crate) fn new(files: Vec<(String, Scratch)>) -> Self {
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { files, owner }
    }

    /// The file of an inode number: they are those of the root and the following.
    fn file(&self, inode: INodeNo) -> Option<&Scratch> {
        let place = inode.0.checked_sub(INodeNo::ROOT.0 + 1)?;
        self.files.get(usize::try_from(place).ok()?).map(|(_, file)| file)
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = match self.file(inode) {
            Some(file) => (FileType::RegularFile, 0o600, file.size()),
            None if inode == INodeNo::ROOT => (FileType::Directory, 0o700, 0),
            None => return None,
        };
        let (uid, gid) = self.owner;
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid,
            gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for Directory {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.files.iter().position(|(file, _)| name == file.as_str());
        let found = found.filter(|_| parent == INodeNo::ROOT);
        let found = found.and_then(|place| self.attributes(INodeNo(INodeNo::ROOT.0 + 1 + place as u64)));
        match found {
            Some(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&FOR_EVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(file) = self.file(inode) else { return reply.error(Errno::EISDIR) };
        match file.read(offset, size.into()) {
            Ok(data) => reply.data(&data),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(file) = self.file(inode) else { return reply.error(Errno::EISDIR) };
        match file.write(offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error.into()),
        }
    }

    /// What is thrown away need not be durable.
    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if inode != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let own = [".", ".."].map(|name| (INodeNo::ROOT, FileType::Directory, name));
        let files = self.files.iter().enumerate().map(|(place, (name, _))| {
            (INodeNo(INodeNo::ROOT.0 + 1 + place as u64), FileType::RegularFile, name.as_str())
        });
        let all =
            own.into_iter().chain(files).enumerate().skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for (place, (inode, kind, name)) in all {
            if reply.add(inode, place as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}
