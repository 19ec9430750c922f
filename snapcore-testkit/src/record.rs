//! The binary record of file operations: written by the shim, read by the power-loss replayer.
//!
//! A record is a fixed head, little-endian (`kind` u8, then u64 `dev`, `ino`, `offset`, `length`, then u32
//! lengths of `path`, `path2` and `data`), followed by those three. A file is records back to back; the last
//! one may be cut short by the death of its writer, and is then ignored.

/// What an operation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// `data` was written at `offset`.
    Write = 1,
    /// The file's length became `length`.
    SetLen = 2,
    /// `length` bytes at `offset` now read as zeros; the file's length did not change.
    Zero = 3,
    /// The file or directory was flushed (fsync, fdatasync).
    Flush = 4,
    /// A new, empty file got the name `path`; an empty `path` is a file with no name yet.
    Create = 5,
    /// A new directory got the name `path`.
    MakeDir = 6,
    /// The file got the further name `path`.
    Link = 7,
    /// The name `path` became `path2`, in place of what had that name.
    Rename = 8,
    /// The name `path` went.
    Unlink = 9,
    /// The names `path` and `path2` changed places.
    Exchange = 10,
    /// Everything was flushed (sync, syncfs).
    FlushAll = 11,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        use Kind::*;
        [Write, SetLen, Zero, Flush, Create, MakeDir, Link, Rename, Unlink, Exchange, FlushAll]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// One operation that succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What was done.
    pub kind: Kind,
    /// Device of the file (after the operation).
    pub dev: u64,
    /// Inode number of the file (after the operation).
    pub ino: u64,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
    /// The name, absolute.
    pub path: Vec<u8>,
    /// The second name of a rename, absolute.
    pub path2: Vec<u8>,
    /// What was written.
    pub data: Vec<u8>,
}

const HEAD: usize = 1 + 4 * 8 + 3 * 4;

impl Record {
    /// A record with no names and no data.
    pub fn new(kind: Kind, dev: u64, ino: u64) -> Record {
        Record { kind, dev, ino, offset: 0, length: 0, path: Vec::new(), path2: Vec::new(), data: Vec::new() }
    }

    /// The record as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD + self.path.len() + self.path2.len() + self.data.len());
        out.push(self.kind as u8);
        for word in [self.dev, self.ino, self.offset, self.length] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for part in [&self.path, &self.path2, &self.data] {
            out.extend_from_slice(&(part.len() as u32).to_le_bytes());
        }
        for part in [&self.path, &self.path2, &self.data] {
            out.extend_from_slice(part);
        }
        out
    }

    /// All whole records in `bytes`.
    ///
    /// # Errors
    /// The offset of a record whose kind is unknown.
    pub fn decode_all(mut bytes: &[u8]) -> Result<Vec<Record>, String> {
        let total = bytes.len();
        let mut records = Vec::new();
        while bytes.len() >= HEAD {
            let word = |i: usize| u64::from_le_bytes(bytes[1 + 8 * i..9 + 8 * i].try_into().unwrap());
            let len =
                |i: usize| u32::from_le_bytes(bytes[33 + 4 * i..37 + 4 * i].try_into().unwrap()) as usize;
            let kind = Kind::from_byte(bytes[0]).ok_or_else(|| {
                format!("record at byte {} has unknown kind {}", total - bytes.len(), bytes[0])
            })?;
            let (a, b, c) = (HEAD + len(0), HEAD + len(0) + len(1), HEAD + len(0) + len(1) + len(2));
            if bytes.len() < c {
                break;
            }
            records.push(Record {
                kind,
                dev: word(0),
                ino: word(1),
                offset: word(2),
                length: word(3),
                path: bytes[HEAD..a].to_vec(),
                path2: bytes[a..b].to_vec(),
                data: bytes[b..c].to_vec(),
            });
            bytes = &bytes[c..];
        }
        Ok(records)
    }
}
