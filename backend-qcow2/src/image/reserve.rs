//! The two ends of a merge that changes the disk's size. Before the merge, the L1 table is made large enough.
//! After it, mappings behind the end are freed.

use super::error::{Error, ErrorKind, Result};
use super::header::MAX_L1_BYTES;
use super::mapping::{L2Entry, OFFSET_MASK};
use super::open::Image;
use super::refcount::Change;
use super::tables::L1Table;
use super::units::HostOffset;
use super::writer::drop_references;

/// Makes the active L1 table long enough for a disk of `size` bytes, which the disk does not have yet. The
/// new table is durable before the header sector refers to it, and the old one is freed after that.
///
/// # Errors
/// [`ErrorKind::LimitExceeded`] past 32 MiB of table, and the system's.
pub(super) fn reserve(image: &mut Image, size: u64) -> Result<()> {
    let needed = image.geometry().l1_entries_for(size);
    if needed <= u64::from(image.header.l1_entries) {
        return Ok(());
    }
    if needed * 8 > MAX_L1_BYTES {
        return Err(Error::new(
            ErrorKind::LimitExceeded,
            format!(
                "a disk of {size} bytes is too large for clusters of {}",
                image.header.cluster_bits.size()
            ),
        )
        .advise("convert the image to larger clusters")
        .on("grow", image.path()));
    }
    image.guarded("grow", |image| {
        let bits = image.header.cluster_bits;
        let (old, old_bytes) = (image.header.l1_offset, u64::from(image.header.l1_entries) * 8);
        let mut l1: L1Table = image.active_l1()?.clone();
        l1.entries.resize(needed as usize, 0);
        let mut bytes = l1.to_bytes();
        let at = image.allocate(bits.clusters_for(needed * 8))?;
        bytes.resize(bytes.len().next_multiple_of(bits.bytes()), 0);
        image.file().write_at(&bytes, at)?;
        // 1) The new table and its refcounts are durable. 2) The header sector switches to it, durably.
        // 3) Only then the old table is released.
        image.flush_metadata()?;
        (image.header.l1_offset, image.header.l1_entries) = (at, needed as u32);
        image.flush_and_switch()?;
        image.l1 = l1.into();
        image.protected = None;
        image.release(old, old_bytes)
    })
}

/// Frees what the active state maps behind the disk's end, once a disk has become smaller. The mappings are
/// durably gone before the references to the clusters are removed.
///
/// # Errors
/// The system's.
pub(super) fn trim(image: &mut Image) -> Result<()> {
    let geometry = image.geometry();
    let first = geometry.cluster_bits.clusters_for(image.virtual_size());
    let per_table = geometry.l2_entries();
    let mut l1 = image.active_l1()?.clone();
    let mut dropped = Vec::new();
    let mut buffer = Vec::new();
    let from = usize::try_from(first.div_ceil(per_table)).unwrap_or(usize::MAX);
    let behind = l1.entries.get(from..).is_some_and(|rest| rest.iter().any(|e| e & OFFSET_MASK != 0));
    // The table in which the end lies.
    let mut last: Option<(HostOffset, Vec<u8>)> = None;
    if !first.is_multiple_of(per_table)
        && let Some(offset) = l1.l2_offset((first / per_table) as usize)
        && l1.is_copied((first / per_table) as usize)
    {
        let mut bytes = image.read_l2(offset, &mut buffer)?.bytes.to_vec();
        for n in (first % per_table)..per_table {
            drop_references(geometry, L2Entry::read(geometry, &bytes, n as usize), &mut dropped)?;
            L2Entry::default().write(geometry, &mut bytes, n as usize);
        }
        if bytes != buffer {
            last = Some((offset, bytes));
        }
    }
    if !behind && last.is_none() {
        return Ok(());
    }
    image.guarded("shrink", |image| {
        if let Some((offset, bytes)) = &last {
            image.file().write_at(bytes, *offset)?;
        }
        for index in from..l1.len() {
            let Some(offset) = l1.l2_offset(index) else { continue };
            let table = image.read_l2(offset, &mut buffer)?;
            for n in 0..table.len() {
                drop_references(geometry, table.entry(n), &mut dropped)?;
            }
            dropped.push(geometry.cluster_bits.host_cluster(offset).0);
            if let Some(e) = l1.entries.get_mut(index) {
                *e = 0;
            }
        }
        if behind {
            let at = image.header.l1_offset;
            let bytes = l1.to_bytes();
            image
                .file()
                .write_at(bytes.get(from * 8..).unwrap_or_default(), HostOffset(at.0 + from as u64 * 8))?;
        }
        image.l1 = l1.into();
        // The mappings are durably gone. A crash before the refcounts are lowered leaks these clusters.
        image.flush_metadata()?;
        dropped.sort_unstable();
        let (file, refcounts, _) = image.parts()?;
        refcounts.change(file, &dropped, Change::Down(1), |_, _| {})?;
        image.protected = None;
        image.flush_metadata()
    })
}
