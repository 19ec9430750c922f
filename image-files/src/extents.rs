//! Space that a file occupies on its file system, by ranges: from `FIEMAP`, or from `SEEK_DATA` where the
//! file system has no `FIEMAP`.
//!
//! `FIEMAP` also reports reserved space that is not written yet, which `SEEK_DATA` treats as a hole, and
//! blocks that other files share.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Returns the bytes that `ranges` of the file occupy on the file system.
///
/// # Errors
/// The system's.
pub(crate) fn allocated_in(file: &File, ranges: &[Range<u64>]) -> io::Result<u64> {
    let mut bytes = 0u64;
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let counted = match sum_of_extents(file, range) {
            Ok(counted) => counted,
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => data_in(file, range)?,
            Err(errno) => return Err(errno.into()),
        };
        bytes = bytes.saturating_add(counted);
    }
    Ok(bytes)
}

/// The blocks of a file that other files share, and how its data is stored.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    /// Places on the device that another file has too.
    pub(crate) shared: Vec<Range<u64>>,
    /// True if an extent is compressed, so that its length says nothing of its room.
    pub(crate) packed: bool,
    /// Bytes of shared extents beyond the limit, whose places are left out.
    pub(crate) beyond: u64,
}

impl Extents {
    /// Bytes that other files share.
    pub(crate) fn shared_bytes(&self) -> u64 {
        let listed = self.shared.iter().map(|range| range.end.saturating_sub(range.start));
        listed.fold(self.beyond, u64::saturating_add)
    }
}

/// Returns the shared extents of a file, the places of at most `limit` of them; `None` if the file system
/// does not report extents.
///
/// # Errors
/// The system's.
pub(crate) fn extents_of(file: &File, limit: usize) -> io::Result<Option<Extents>> {
    let mut found = Extents::default();
    let visited = visit_extents(file, &(0..u64::MAX), |extent| {
        found.packed |= extent.flags & sys::ENCODED != 0;
        if extent.flags & sys::SHARED == 0 {
            return;
        }
        match found.shared.len() < limit {
            true => found.shared.push(extent.physical..extent.physical.saturating_add(extent.length)),
            false => found.beyond = found.beyond.saturating_add(extent.length),
        }
    });
    match visited {
        Ok(()) => Ok(Some(found)),
        Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn sum_of_extents(file: &File, range: &Range<u64>) -> Result<u64, Errno> {
    let mut bytes = 0u64;
    visit_extents(file, range, |extent| {
        let end = extent.start.saturating_add(extent.length);
        bytes = bytes.saturating_add(end.min(range.end).saturating_sub(extent.start.max(range.start)));
    })?;
    Ok(bytes)
}

fn visit_extents(file: &File, range: &Range<u64>, mut each: impl FnMut(&sys::Extent)) -> Result<(), Errno> {
    let mut at = range.start;
    while at < range.end {
        let extents = sys::extents(file, at, range.end - at)?;
        let Some(last) = extents.last() else { break };
        extents.iter().for_each(&mut each);
        let next = last.start.saturating_add(last.length);
        if last.flags & sys::LAST != 0 || next <= at {
            break;
        }
        at = next;
    }
    Ok(())
}

fn data_in(file: &File, range: &Range<u64>) -> io::Result<u64> {
    let (mut at, mut bytes) = (range.start, 0);
    while at < range.end {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(range.end),
            Err(Errno::NXIO) => break,
            // A file system without holes has data everywhere.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(bytes + (range.end - at)),
            Err(errno) => return Err(errno.into()),
        };
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
            Ok(hole) => hole.min(range.end),
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        bytes += hole - data;
        at = hole.max(at + 1);
    }
    Ok(bytes)
}

/// The only system call of this crate without a safe wrapper.
#[allow(unsafe_code)]
mod sys {
    use std::ffi::c_void;
    use std::fs::File;
    use std::mem::offset_of;

    use rustix::io::Errno;
    use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

    /// `FIEMAP_EXTENT_LAST`.
    pub(super) const LAST: u32 = 1;
    /// `FIEMAP_EXTENT_ENCODED`: compressed, or encrypted.
    pub(super) const ENCODED: u32 = 8;
    /// `FIEMAP_EXTENT_SHARED`.
    pub(super) const SHARED: u32 = 0x2000;
    /// Extents requested at once.
    const COUNT: usize = 64;

    /// One extent.
    pub(super) struct Extent {
        /// Offset in the file.
        pub(super) start: u64,
        /// Offset on the device.
        pub(super) physical: u64,
        /// Bytes.
        pub(super) length: u64,
        pub(super) flags: u32,
    }

    /// `struct fiemap`, without its array.
    #[repr(C)]
    #[derive(Default)]
    struct Head {
        start: u64,
        length: u64,
        flags: u32,
        mapped: u32,
        count: u32,
        reserved: u32,
    }

    /// `struct fiemap_extent`.
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Raw {
        logical: u64,
        physical: u64,
        length: u64,
        reserved: [u64; 2],
        flags: u32,
        reserved_too: [u32; 3],
    }

    #[repr(C)]
    struct Request {
        head: Head,
        extents: [Raw; COUNT],
    }

    // The kernel's sizes (`linux/fiemap.h`).
    const _: () =
        assert!(size_of::<Head>() == 32 && size_of::<Raw>() == 56 && offset_of!(Request, extents) == 32);

    // SAFETY: the opcode is FS_IOC_FIEMAP, whose argument is a `struct fiemap` followed by `count` extents.
    // `Request` has this layout. The kernel writes at most `count` extents, and any bytes are valid values of
    // their fields.
    unsafe impl Ioctl for &mut Request {
        type Output = ();
        const IS_MUTATING: bool = true;
        fn opcode(&self) -> Opcode {
            opcode::read_write::<Head>(b'f', 11)
        }
        fn as_ptr(&mut self) -> *mut c_void {
            std::ptr::from_mut::<Request>(self).cast()
        }
        unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
            Ok(())
        }
    }

    /// Returns the extents of `start..start + length`, only the first ones if there are many.
    pub(super) fn extents(file: &File, start: u64, length: u64) -> Result<Vec<Extent>, Errno> {
        let head = Head { start, length, count: COUNT as u32, ..Head::default() };
        let mut request = Request { head, extents: [Raw::default(); COUNT] };
        // SAFETY: the request outlives the call, and has the layout that this call requires (see above).
        unsafe { ioctl(file, &mut request) }?;
        let found = request.extents.iter().take(request.head.mapped as usize);
        let extent = |raw: &Raw| Extent {
            start: raw.logical,
            physical: raw.physical,
            length: raw.length,
            flags: raw.flags,
        };
        Ok(found.map(extent).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn allocated_ranges_add_up_to_the_blocks() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        for at in [0, 65536, 70000, 500_000] {
            file.write_all_at(&[1; 5000], at).unwrap();
        }
        file.sync_all().unwrap();
        let blocks = || file.metadata().unwrap().blocks() * 512;
        assert_eq!(allocated_in(&file, std::slice::from_ref(&(0..1 << 20))).unwrap(), blocks());
        assert_eq!(allocated_in(&file, std::slice::from_ref(&(131_072..262_144))).unwrap(), 0);
        assert!(allocated_in(&file, std::slice::from_ref(&(65536..69632))).unwrap() == 4096);
        if let Some(extents) = extents_of(&file, 1).unwrap() {
            assert_eq!(extents.shared_bytes(), 0);
        }
    }
}
