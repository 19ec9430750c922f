//! The table of internal snapshots. It is read whole and written whole, always to a new place.

use std::borrow::Cow;

use zerocopy::{FromBytes, IntoBytes};

use super::error::{Error, ErrorKind, Result, shown};
use super::file::ImageFile;
use super::header::{Header, MAX_L1_BYTES, MAX_SNAPSHOTS};
use super::layout::RawSnapshot;
use super::units::HostOffset;

/// QEMU's `QCOW_MAX_SNAPSHOT_EXTRA_DATA`: bytes of extra data in an entry.
pub const MAX_EXTRA_DATA: usize = 1024;
/// QEMU's `QCOW_MAX_SNAPSHOTS_SIZE`: bytes of the whole table.
pub const MAX_TABLE_BYTES: usize = 1024 * MAX_SNAPSHOTS as usize;
/// Bytes of extra data that the format knows: VM state size, disk size, icount.
const KNOWN_EXTRA: usize = 24;
/// "No icount" on disk.
const NO_ICOUNT: u64 = u64::MAX;
/// Bytes of a typical entry. The first read asks for this much for each snapshot.
const USUAL_ENTRY: usize = 112;

/// One internal snapshot, as stored in the table.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Snapshot {
    pub(crate) id: Vec<u8>,
    pub(crate) name: Vec<u8>,
    /// Offset of its L1 table.
    pub l1_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Time of the snapshot: seconds since 1970.
    pub date_seconds: u32,
    /// Time of the snapshot: nanoseconds within the second.
    pub date_nanoseconds: u32,
    /// Running time of the guest, in nanoseconds.
    pub vm_clock_ns: u64,
    /// Bytes of VM state; 0 without.
    pub vm_state_size: u64,
    /// Bytes of the disk at that time.
    pub disk_size: u64,
    /// QEMU's instruction count, if it was enabled.
    pub icount: Option<u64>,
    /// Extra data beyond what the format defines, kept unchanged.
    pub(crate) unknown_extra: Vec<u8>,
}

impl Snapshot {
    /// The unique id. QEMU uses decimal numbers.
    pub fn id(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.id)
    }

    /// The name. QEMU does not keep names unique; this engine does for its own snapshots.
    pub fn name(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }
}

enum Failure {
    Short,
    Bad(Error),
}

/// Parses `header.snapshot_count` entries from the table's bytes.
///
/// # Errors
/// [`ErrorKind::Corrupt`] or [`ErrorKind::LimitExceeded`]; also if the bytes end before the table does.
pub fn parse(header: &Header, bytes: &[u8]) -> Result<(Vec<Snapshot>, usize)> {
    parse_some(header, bytes).map_err(|f| match f {
        Failure::Bad(e) => e,
        Failure::Short => Error::corrupt(format!(
            "the snapshot table of {} entries does not end within {} bytes",
            header.snapshot_count,
            bytes.len()
        )),
    })
}

fn parse_some(header: &Header, bytes: &[u8]) -> std::result::Result<(Vec<Snapshot>, usize), Failure> {
    let mut found = Vec::new();
    let mut at = 0usize;
    for number in 0..header.snapshot_count {
        at = at.next_multiple_of(8);
        let (snapshot, end) = parse_entry(header, bytes, at).map_err(|f| match f {
            Failure::Bad(e) => {
                Failure::Bad(e.on(format!("read snapshot table entry {number} of"), "".as_ref()))
            }
            Failure::Short => Failure::Short,
        })?;
        found.push(snapshot);
        at = end;
    }
    Ok((found, at))
}

fn parse_entry(header: &Header, bytes: &[u8], at: usize) -> std::result::Result<(Snapshot, usize), Failure> {
    let bad = |detail: String| Failure::Bad(Error::corrupt(detail));
    let raw = bytes.get(at..at + size_of::<RawSnapshot>()).ok_or(Failure::Short)?;
    let raw = RawSnapshot::read_from_bytes(raw).map_err(|_| Failure::Short)?;
    let extra_size = raw.extra_data_size.get() as usize;
    if extra_size > MAX_EXTRA_DATA {
        return Err(bad(format!("it has {extra_size} bytes of extra data; {MAX_EXTRA_DATA} is the limit")));
    }
    let mut from = at + size_of::<RawSnapshot>();
    let mut take = |len: usize| {
        let part = bytes.get(from..from + len).ok_or(Failure::Short)?;
        from += len;
        Ok(part)
    };
    let extra = take(extra_size)?;
    let id = take(usize::from(raw.id_size.get()))?.to_vec();
    let name = take(usize::from(raw.name_size.get()))?.to_vec();
    let word = |n: usize| extra.get(n..n + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);

    let (l1_offset, l1_entries) = (raw.l1_table_offset.get(), raw.l1_size.get());
    let l1_bytes = u64::from(l1_entries) * 8;
    if l1_bytes > MAX_L1_BYTES {
        return Err(bad(format!("its L1 table has {l1_entries} entries; 4194304 is the limit")));
    }
    let end = l1_offset.checked_add(l1_bytes).filter(|end| i64::try_from(*end).is_ok());
    if l1_entries > 0 && (l1_offset == 0 || l1_offset & header.cluster_bits.mask() != 0 || end.is_none()) {
        return Err(bad(format!(
            "invalid L1 table of snapshot \"{}\" (offset {l1_offset:#x})",
            shown(&name)
        )));
    }
    let snapshot = Snapshot {
        id,
        name,
        l1_offset: HostOffset(l1_offset),
        l1_entries,
        date_seconds: raw.date_seconds.get(),
        date_nanoseconds: raw.date_nanoseconds.get(),
        vm_clock_ns: raw.vm_clock_ns.get(),
        vm_state_size: word(0).unwrap_or_else(|| u64::from(raw.vm_state_size.get())),
        // Entries without this field are older than resizing of images with snapshots.
        disk_size: word(8).unwrap_or(header.virtual_size),
        icount: word(16).filter(|n| *n != NO_ICOUNT),
        unknown_extra: extra.get(KNOWN_EXTRA..).unwrap_or_default().to_vec(),
    };
    Ok((snapshot, from))
}

/// Reads the table of an image, usually with one read.
///
/// # Errors
/// As [`parse`], and the system's. It never uses more memory than [`MAX_TABLE_BYTES`] twice.
pub fn read(file: &ImageFile, header: &Header) -> Result<(Vec<Snapshot>, usize)> {
    let fail = |e: Error| e.on("read the snapshot table of", file.path());
    if header.snapshot_count == 0 {
        return Ok((Vec::new(), 0));
    }
    let rest = file.len()?.saturating_sub(header.snapshots_offset.0);
    let most = usize::try_from(rest).unwrap_or(MAX_TABLE_BYTES).min(MAX_TABLE_BYTES);
    let mut want = (header.snapshot_count as usize * USUAL_ENTRY).next_multiple_of(4096).min(most);
    loop {
        let mut bytes = vec![0; want];
        file.read_at(&mut bytes, header.snapshots_offset)?;
        match parse_some(header, &bytes) {
            Ok(found) => return Ok(found),
            Err(Failure::Bad(e)) => return Err(fail(e)),
            Err(Failure::Short) if want < most => want = want.saturating_mul(2).min(most),
            Err(Failure::Short) => {
                return Err(fail(Error::corrupt(format!(
                    "the snapshot table of {} entries does not end within {most} bytes, where the file or the limit \
                     of 64 MiB ends",
                    header.snapshot_count
                ))));
            }
        }
    }
}

/// Encodes a table of these snapshots.
///
/// # Errors
/// [`ErrorKind::LimitExceeded`] for more snapshots, longer names or a larger table than QEMU reads.
pub fn encode(snapshots: &[Snapshot]) -> Result<Vec<u8>> {
    let limit = |detail: String| {
        Error::new(ErrorKind::LimitExceeded, detail).advise("delete snapshots that are not needed")
    };
    if snapshots.len() > MAX_SNAPSHOTS as usize {
        return Err(limit(format!("an image may have {MAX_SNAPSHOTS} snapshots at most")));
    }
    let mut out = Vec::with_capacity(snapshots.len() * USUAL_ENTRY);
    for s in snapshots {
        out.resize(out.len().next_multiple_of(8), 0);
        let size = |bytes: &[u8]| {
            u16::try_from(bytes.len())
                .map_err(|_| limit(format!("\"{}\" is longer than 65535 bytes", shown(bytes))))
        };
        let raw = RawSnapshot {
            l1_table_offset: s.l1_offset.0.into(),
            l1_size: s.l1_entries.into(),
            id_size: size(&s.id)?.into(),
            name_size: size(&s.name)?.into(),
            date_seconds: s.date_seconds.into(),
            date_nanoseconds: s.date_nanoseconds.into(),
            vm_clock_ns: s.vm_clock_ns.into(),
            // A reader that does not know the 64-bit field should see a disk-only snapshot, not a part of the
            // VM state.
            vm_state_size: u32::try_from(s.vm_state_size).unwrap_or(0).into(),
            extra_data_size: ((KNOWN_EXTRA + s.unknown_extra.len()) as u32).into(),
        };
        out.extend_from_slice(raw.as_bytes());
        for word in [s.vm_state_size, s.disk_size, s.icount.unwrap_or(NO_ICOUNT)] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.extend_from_slice(&s.unknown_extra);
        out.extend_from_slice(&s.id);
        out.extend_from_slice(&s.name);
    }
    if out.len() > MAX_TABLE_BYTES {
        return Err(limit(format!(
            "the snapshot table would have {} bytes; {MAX_TABLE_BYTES} is the limit",
            out.len()
        )));
    }
    Ok(out)
}

/// Returns the id of the next snapshot, as QEMU counts: one more than the largest number among the ids.
pub(crate) fn next_id(snapshots: &[Snapshot]) -> Vec<u8> {
    let number = |s: &Snapshot| {
        let digits = s.id.iter().take_while(|b| b.is_ascii_digit()).count();
        s.id.get(..digits)
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| d.parse::<u64>().ok())
            .unwrap_or(0)
    };
    let largest = snapshots.iter().map(number).filter(|n| *n < u64::MAX).max().unwrap_or(0);
    (largest + 1).to_string().into_bytes()
}
