//! Sizes of files and block devices.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;

use camino::Utf8Path;

/// Returns the bytes of an open file or block device. The metadata of a block device does not have them.
///
/// # Errors
/// The system's.
pub fn size_of(file: &File) -> io::Result<u64> {
    let about = file.metadata()?;
    match about.file_type().is_block_device() {
        true => (&mut &*file).seek(SeekFrom::End(0)),
        false => Ok(about.len()),
    }
}

/// Returns the bytes of the file or block device at `path`.
///
/// # Errors
/// The system's.
pub fn size_at(path: &Utf8Path) -> io::Result<u64> {
    let about = path.metadata()?;
    match about.file_type().is_block_device() {
        true => {
            size_of(&confined_files::open(path.as_std_path(), false, confined_files::Kind::RegularOrBlock)?)
        }
        false => Ok(about.len()),
    }
}
