//! The archive that the kernel unpacks as its first file system: cpio, "newc"
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Uncompressed: it is read from a cache.

use std::collections::BTreeSet;

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// An archive that is being written.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    names: BTreeSet<String>,
}

impl Archive {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// A directory; the first of two of the same name counts.
    pub fn directory(&mut self, name: &str) {
        self.parents(name);
        self.entry(name, DIRECTORY, &[]);
    }

    /// A file, with the directories that it is in.
    pub fn file(&mut self, name: &str, content: &[u8], program: bool) {
        self.parents(name);
        self.entry(name, if program { PROGRAM } else { FILE }, content);
    }

    /// A symbolic link.
    pub fn link(&mut self, name: &str, to: &str) {
        self.parents(name);
        self.entry(name, LINK, to.as_bytes());
    }

    /// Its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn parents(&mut self, name: &str) {
        for (at, _) in name.match_indices('/') {
            self.entry(&name[..at], DIRECTORY, &[]);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        if !self.names.insert(name.to_owned()) {
            return;
        }
        let inode = self.names.len();
        let header =
            [inode as u32, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in header {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
