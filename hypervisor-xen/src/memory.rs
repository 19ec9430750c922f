//! The memory image: the file that xl saved, unchanged, and beside it a record with its checksums.
//!
//! ```text
//! NAME.memory.part   xl's output, created before with mode 0600: xl would make it readable for all users
//! NAME.memory.json   the record: length, checksums, whether the guest ran
//! NAME.memory        the save file, when it is complete
//! ```
//!
//! Order of durability: the save file's bytes; then the record; then the save file's own name. So a file of
//! that name is complete and has a record.
//!
//! The file's head (tools/xl/xl.h, `struct save_file_header`): 32 bytes of magic; byte order, mandatory
//! flags, optional flags and the length of the optional data, 32 bits each; in that a 32-bit length and the
//! domain's configuration as JSON.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snapcore::backend::Progress;
use snapcore::{Error, ErrorKind, Result};

const MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
const BYTE_ORDER: u32 = 0x0102_0304;

/// The configuration is JSON, and the stream is of version 2.
const FLAG_JSON: u32 = 1;
const KNOWN_FLAGS: u32 = 3;

/// Longest accepted configuration.
const LONGEST_CONFIG: u32 = 16 << 20;

/// Longest accepted record: it has a checksum of 11 bytes, as text, for each 16 MiB. This is enough for 8 TiB
/// of memory.
const LONGEST_RECORD: u64 = 8 << 20;

/// Bytes per checksum.
const CHUNK: usize = 16 << 20;

const VERSION: u32 = 1;

/// The record beside a save file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// The save file's length, in bytes.
    bytes: u64,
    /// The CRC-32 of each 16 MiB.
    crc32: Vec<u32>,
    /// True if the guest ran at the instant.
    pub(crate) running: bool,
}

pub(crate) fn part_of(file: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{file}.part"))
}

fn record_of(file: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{file}.json"))
}

/// Creates the file for xl to save into: empty, private. Replaces one that a crash left.
pub(crate) fn draft(file: &Utf8Path) -> Result<Utf8PathBuf> {
    let part = part_of(file);
    if file.exists() {
        return Err(Error::new(ErrorKind::Exists, format!("there is a memory image {file} already")));
    }
    make_private(&part)?;
    Ok(part)
}

/// Creates an empty private file, and replaces one of that name.
pub(crate) fn make_private(file: &Utf8Path) -> Result<()> {
    remove_file(file)?;
    let made = confined_files::create_private(file.as_std_path());
    made.map(drop).map_err(|cause| file_error("making", file, cause))
}

/// Makes xl's save file a memory image; returns its length. May be repeated.
pub(crate) fn seal(file: &Utf8Path, running: bool, progress: &dyn Progress) -> Result<u64> {
    let part = part_of(file);
    if file.exists() && !part.exists() {
        return Ok(read_record(file)?.bytes);
    }
    // 1) The save file's bytes are durable, and only then read for the checksums.
    let saved = open(&part).map_err(|cause| file_error("opening", &part, cause))?;
    head(&mut &saved, &part)?;
    saved.sync_all().map_err(|cause| file_error("flushing", &part, cause))?;
    let (bytes, crc32) = checksums(&part, progress)?;
    // 2) The record is durable before the save file gets its name. A crash before 3) leaves `.part` and
    //    perhaps a record: this function can be repeated.
    let record = Record { version: VERSION, bytes, crc32, running };
    let text = serde_json::to_vec(&record).map_err(|cause| {
        Error::new(ErrorKind::Internal, "a record cannot be written as JSON").because(cause)
    })?;
    write_durably(&record_of(file), &text)?;
    // 3) The final name: from here the image counts as complete.
    confined_files::rename(part.as_std_path(), file.as_std_path(), true)
        .map_err(|cause| file_error("naming", file, cause))?;
    flush_directory(file)?;
    Ok(bytes)
}

/// Reads a memory image and checks it against its record.
pub(crate) fn check(file: &Utf8Path, progress: &dyn Progress) -> Result<()> {
    let corrupt = |detail: String| {
        Error::new(ErrorKind::Corrupt, format!("the memory image {file} {detail}"))
            .advise("the snapshot's disks are not concerned: revert with --off, and start the domain then")
    };
    let record = read_record(file)?;
    let mut saved = open(file).map_err(|cause| file_error("opening", file, cause))?;
    let length = saved.metadata().map_err(|cause| file_error("reading", file, cause))?.len();
    if length != record.bytes {
        return Err(corrupt(format!("has {length} bytes, and was saved with {}", record.bytes)));
    }
    head(&mut saved, file)?;
    let (_, found) = checksums(file, progress)?;
    match found.iter().zip(&record.crc32).position(|(found, wanted)| found != wanted) {
        Some(place) => Err(corrupt(format!("is not what was saved, in its bytes from {} on", place * CHUNK))),
        None if found.len() != record.crc32.len() => {
            Err(corrupt("has another number of checksums".to_owned()))
        }
        None => Ok(()),
    }
}

/// Reads the record of a memory image.
pub(crate) fn read_record(file: &Utf8Path) -> Result<Record> {
    let path = record_of(file);
    if !file.exists() {
        return Err(Error::new(ErrorKind::NotFound, format!("the memory image {file} is gone"))
            .advise("the snapshot's disks are not concerned: revert with --off, and start the domain then"));
    }
    let read = || {
        let mut text = Vec::new();
        open(&path)?.take(LONGEST_RECORD).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|cause| file_error("reading", &path, cause))?;
    let record: Record = serde_json::from_slice(&text)
        .map_err(|cause| Error::new(ErrorKind::Corrupt, format!("{path} cannot be read")).because(cause))?;
    match record.version {
        VERSION => Ok(record),
        other => Err(Error::new(ErrorKind::Unsupported, format!("{path} is of version {other}"))
            .advise("it was written by a later domsnap: use that one")),
    }
}

/// Removes a memory image and the remains of one after a crash. A missing file is no error.
pub(crate) fn remove(file: &Utf8Path) -> Result<()> {
    for path in [file.to_owned(), part_of(file), record_of(file)] {
        remove_file(&path)?;
    }
    flush_directory(file)
}

/// Reads the configuration in the head of a save file.
pub(crate) fn head(file: &mut impl Read, path: &Utf8Path) -> Result<Value> {
    let corrupt =
        |detail: &str| Error::new(ErrorKind::Corrupt, format!("{path} is not a save file of xl: {detail}"));
    let short = |cause: io::Error| corrupt("it ends in its head").because(cause);
    let mut magic = [0; 32];
    file.read_exact(&mut magic).map_err(short)?;
    if magic != *MAGIC {
        return Err(corrupt("it does not begin like one"));
    }
    let mut number = || -> Result<u32> {
        let mut bytes = [0; 4];
        file.read_exact(&mut bytes).map_err(short)?;
        Ok(u32::from_le_bytes(bytes))
    };
    let [order, mandatory, _optional, length, json] = [number()?, number()?, number()?, number()?, number()?];
    if order != BYTE_ORDER {
        return Err(corrupt("its byte order is another"));
    }
    if mandatory & !KNOWN_FLAGS != 0 || mandatory & FLAG_JSON == 0 {
        return Err(corrupt(&format!("its flags are {mandatory:#x}, and only {KNOWN_FLAGS:#x} are known")));
    }
    if json > LONGEST_CONFIG || json > length.saturating_sub(4) {
        return Err(corrupt(&format!("its configuration has {json} bytes of {length}")));
    }
    let mut text = Vec::new();
    file.take(u64::from(json)).read_to_end(&mut text).map_err(short)?;
    while text.last() == Some(&0) {
        text.pop();
    }
    serde_json::from_slice(&text).map_err(|cause| corrupt("its configuration is not JSON").because(cause))
}

fn checksums(path: &Utf8Path, progress: &dyn Progress) -> Result<(u64, Vec<u32>)> {
    let mut file = open(path).map_err(|cause| file_error("opening", path, cause))?;
    let total = file.metadata().map_err(|cause| file_error("reading", path, cause))?.len();
    let (mut sums, mut done) = (Vec::new(), 0);
    let mut chunk = Vec::with_capacity(CHUNK);
    loop {
        chunk.clear();
        let read = (&mut file).take(CHUNK as u64).read_to_end(&mut chunk);
        let read = read.map_err(|cause| file_error("reading", path, cause))?;
        if read == 0 {
            return Ok((done, sums));
        }
        sums.push(crc32fast::hash(&chunk));
        done += read as u64;
        progress.bytes(done, total.max(done));
    }
}

/// Writes a small file. Its bytes are durable before it has its name, and the name is durable when this
/// returns.
pub(crate) fn write_durably(path: &Utf8Path, bytes: &[u8]) -> Result<()> {
    let new = Utf8PathBuf::from(format!("{path}.new"));
    make_private(&new)?;
    let write = || -> io::Result<()> {
        let mut file = confined_files::open_to_write(new.as_std_path())?;
        file.write_all(bytes)?;
        file.sync_all()?;
        confined_files::rename(new.as_std_path(), path.as_std_path(), true)
    };
    write().map_err(|cause| file_error("writing", path, cause))?;
    flush_directory(path)
}

pub(crate) fn remove_file(path: &Utf8Path) -> Result<()> {
    confined_files::remove(path.as_std_path())
        .map(|_| ())
        .map_err(|cause| file_error("removing", path, cause))
}

/// Opens a regular file safely, even if other users can write its directory.
fn open(path: &Utf8Path) -> io::Result<File> {
    confined_files::open_regular(path.as_std_path(), false)
}

pub(crate) fn flush_directory(of: &Utf8Path) -> Result<()> {
    match confined_files::sync_directory_of(of.as_std_path()) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(file_error("flushing the directory of", of, cause))
        }
        _ => Ok(()),
    }
}

fn file_error(doing: &str, path: &Utf8Path, cause: io::Error) -> Error {
    file_error_at(doing, path.as_std_path(), cause)
}

fn file_error_at(doing: &str, path: &Path, cause: io::Error) -> Error {
    let kind = match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Io,
    };
    Error::new(kind, format!("{doing} {} failed", path.display())).because(cause)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    struct Silent;
    impl Progress for Silent {
        fn bytes(&self, _: u64, _: u64) {}
    }

    fn save_file(config: &str) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let json = config.len() as u32 + 1;
        for number in [BYTE_ORDER, 3, 0, json + 4, json] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(config.as_bytes());
        bytes.push(0);
        bytes.extend_from_slice(b"LibxlFmt and what follows");
        bytes
    }

    fn saved(directory: &tempfile::TempDir) -> Utf8PathBuf {
        let file = Utf8Path::from_path(directory.path()).unwrap().join("a.memory");
        let part = draft(&file).unwrap();
        assert_eq!(fs::metadata(&part).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&part, save_file("{\"c_info\":{\"name\":\"web\"}}")).unwrap();
        seal(&file, true, &Silent).unwrap();
        file
    }

    /// A sealed memory image is complete and private, and sealing may be repeated.
    #[test]
    fn sealed_memory_is_complete_and_private() {
        let directory = tempfile::tempdir().unwrap();
        let file = saved(&directory);
        check(&file, &Silent).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(seal(&file, true, &Silent).unwrap(), fs::metadata(&file).unwrap().len());
        assert!(read_record(&file).unwrap().running);
        let config = head(&mut File::open(&file).unwrap(), &file).unwrap();
        assert_eq!(config["c_info"]["name"], "web");
        assert_eq!(draft(&file).unwrap_err().kind(), ErrorKind::Exists);
        remove(&file).unwrap();
        remove(&file).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        assert_eq!(check(&file, &Silent).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_memory_image_that_was_cut_or_changed_is_corrupt() {
        let directory = tempfile::tempdir().unwrap();
        let file = saved(&directory);
        let whole = fs::read(&file).unwrap();
        fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        let error = check(&file, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("was saved with"), "{error}");
        let mut changed = whole.clone();
        *changed.last_mut().unwrap() ^= 1;
        fs::write(&file, changed).unwrap();
        assert!(check(&file, &Silent).unwrap_err().to_string().contains("is not what was saved"));
    }

    /// A file that is not a save file is never sealed.
    #[test]
    fn invalid_save_file_is_never_sealed() {
        let directory = tempfile::tempdir().unwrap();
        let file = Utf8Path::from_path(directory.path()).unwrap().join("a.memory");
        let whole = save_file("{}");
        let mut flags = whole.clone();
        flags[36] = 7;
        let mut long = whole.clone();
        long[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
        for bytes in [
            &whole[..0],
            &whole[..40],
            b"another file of more than thirty-two bytes",
            &flags,
            &long,
            &save_file("{"),
        ] {
            fs::write(part_of(&file), bytes).unwrap();
            assert_eq!(seal(&file, true, &Silent).unwrap_err().kind(), ErrorKind::Corrupt);
            assert!(!file.exists());
        }
    }
}
