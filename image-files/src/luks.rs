//! Detection of LUKS volumes by the beginning of a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use camino::Utf8Path;

/// The first bytes of a LUKS header, of version 1 and 2.
pub const LUKS: [u8; 6] = *b"LUKS\xba\xbe";

/// Returns true if the file at `path` begins with a LUKS header. A guest that encrypts its whole disk by
/// itself writes one too. So the data may be encrypted outside the guest, but need not be.
///
/// # Errors
/// The system's.
pub fn is_luks(path: &Utf8Path) -> io::Result<bool> {
    // The open does not wait, whatever file the name leads to by now.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let mut head = [0; LUKS.len()];
    match file.read_exact_at(&mut head, 0) {
        Ok(()) => Ok(head == LUKS),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}
