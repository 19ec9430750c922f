//! Persistent dirty bitmaps: lists them, counts them, and marks them as in use before the guest's data
//! changes.
//!
//! This engine does not track writes in bitmaps. Code that changes what the guest sees must inform the users
//! of the bitmaps. The format has the `in_use` flag for that: "the bitmap was not saved correctly and may be
//! inconsistent". QEMU then refuses to build an incremental backup on the bitmap, which is right. Creating a
//! snapshot does not change what the guest sees, so it leaves bitmaps alone.

use zerocopy::FromBytes;

use super::error::{Error, ErrorKind, Result, shown};
use super::header::{AUTOCLEAR_BITMAPS, BitmapsPointer};
use super::layout::RawBitmap;
use super::open::Image;
use super::units::{ClusterBits, HostOffset};

/// QEMU's `QCOW2_MAX_BITMAPS`.
pub const MAX_BITMAPS: u32 = 65535;
/// QEMU's `QCOW2_MAX_BITMAP_DIRECTORY_SIZE`: bytes of the directory.
pub const MAX_DIRECTORY_BYTES: u64 = 1024 * MAX_BITMAPS as u64;
/// QEMU's `BME_MAX_TABLE_SIZE`: entries of a bitmap's table.
pub const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// QEMU's `BME_MAX_NAME_SIZE`.
pub const MAX_NAME: usize = 1023;

const FLAG_IN_USE: u32 = 1;
/// Offset of the flags in an entry.
const FLAGS_AT: usize = 12;

/// One persistent bitmap, as the directory has it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Bitmap {
    /// The bitmap's name.
    pub name: String,
    /// Offset of its table.
    pub table_offset: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// True if the bitmap is marked as unreliable.
    pub in_use: bool,
    /// True if the bitmap records writes.
    pub auto: bool,
    /// One bit stands for `1 << granularity_bits` bytes of the disk.
    pub granularity_bits: u8,
    /// Offset of its entry in the directory.
    at: usize,
}

/// Parses a bitmap directory.
///
/// # Errors
/// [`ErrorKind::Corrupt`] or [`ErrorKind::LimitExceeded`] for an invalid directory.
pub fn parse_directory(bits: ClusterBits, count: u32, bytes: &[u8]) -> Result<Vec<Bitmap>> {
    if count == 0 || count > MAX_BITMAPS {
        return Err(Error::corrupt(format!(
            "the image says it has {count} bitmaps; 1 to {MAX_BITMAPS} may be"
        )));
    }
    let mut found = Vec::new();
    let mut at = 0usize;
    for number in 0..count {
        let short = || {
            Error::corrupt(format!("entry {number} of the bitmap directory leaves its {} bytes", bytes.len()))
        };
        let head = bytes.get(at..at + size_of::<RawBitmap>()).ok_or_else(short)?;
        let raw = RawBitmap::read_from_bytes(head).map_err(|_| short())?;
        let name_size = usize::from(raw.name_size.get());
        let name_at = (at + size_of::<RawBitmap>())
            .checked_add(raw.extra_data_size.get() as usize)
            .ok_or_else(short)?;
        let name = bytes.get(name_at..name_at + name_size).ok_or_else(short)?;
        let (table_offset, table_entries) = (raw.table_offset.get(), raw.table_size.get());
        let end =
            table_offset.checked_add(u64::from(table_entries) * 8).filter(|e| i64::try_from(*e).is_ok());
        let wrong = if name_size == 0 || name_size > MAX_NAME {
            Some(format!("has a name of {name_size} bytes"))
        } else if table_entries > MAX_TABLE_ENTRIES {
            Some(format!("has a table of {table_entries} entries"))
        } else if table_entries > 0 && (table_offset == 0 || table_offset & bits.mask() != 0 || end.is_none())
        {
            Some(format!("has its table at offset {table_offset:#x}"))
        } else if raw.granularity_bits > 63 {
            Some(format!("has granularity_bits of {}", raw.granularity_bits))
        } else {
            None
        };
        if let Some(wrong) = wrong {
            return Err(Error::corrupt(format!("invalid bitmap \"{}\": it {wrong}", shown(name))));
        }
        let flags = raw.flags.get();
        found.push(Bitmap {
            name: String::from_utf8_lossy(name).into_owned(),
            table_offset: HostOffset(table_offset),
            table_entries,
            in_use: flags & FLAG_IN_USE != 0,
            auto: flags & 2 != 0,
            granularity_bits: raw.granularity_bits,
            at,
        });
        at = (name_at + name_size).next_multiple_of(8);
    }
    Ok(found)
}

/// Reads the directory: its pointer and its bytes. Returns `None` if there is none, or if the image marks it
/// as inconsistent.
fn directory(image: &Image) -> Result<Option<(BitmapsPointer, Vec<u8>)>> {
    if image.header.autoclear & AUTOCLEAR_BITMAPS == 0 {
        return Ok(None);
    }
    let Some(pointer) = image.header.bitmaps()? else { return Ok(None) };
    let file_len = image.file.len()?;
    if pointer.directory_size > MAX_DIRECTORY_BYTES {
        return Err(Error::new(
            ErrorKind::LimitExceeded,
            format!(
                "the bitmap directory has {} bytes; {MAX_DIRECTORY_BYTES} is the limit",
                pointer.directory_size
            ),
        ));
    }
    if pointer.directory_offset.checked_add(pointer.directory_size).is_none_or(|end| end.0 > file_len) {
        return Err(Error::corrupt("the bitmap directory lies past the end of the file"));
    }
    let mut bytes = vec![0; pointer.directory_size as usize];
    image.file.read_at(&mut bytes, pointer.directory_offset)?;
    Ok(Some((pointer, bytes)))
}

/// Lists the persistent bitmaps of an image. The list is empty if the image marks them as inconsistent.
///
/// # Errors
/// As [`parse_directory`], and the system's.
pub fn list(image: &Image) -> Result<Vec<Bitmap>> {
    match directory(image)? {
        None => Ok(Vec::new()),
        Some((pointer, bytes)) => parse_directory(image.header.cluster_bits, pointer.count, &bytes),
    }
}

/// Marks every bitmap as unreliable. Returns true if there was one to mark. The mark is durable with the next
/// flush, which must come before the guest's data changes.
pub(crate) fn mark_in_use(image: &Image) -> Result<bool> {
    let Some((pointer, mut bytes)) = directory(image)? else { return Ok(false) };
    let mut changed = false;
    for bitmap in parse_directory(image.header.cluster_bits, pointer.count, &bytes)? {
        if !bitmap.in_use
            && let Some(low_byte) = bytes.get_mut(bitmap.at + FLAGS_AT + 3)
        {
            *low_byte |= FLAG_IN_USE as u8;
            changed = true;
        }
    }
    if changed {
        // One bit of each entry changes. So whatever part of this write reaches the disk is a directory of
        // the same bitmaps.
        image.file.write_at(&bytes, pointer.directory_offset)?;
    }
    Ok(changed)
}
