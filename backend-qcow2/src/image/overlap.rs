//! The places of an image's metadata. A write is refused if two pieces of metadata claim the same cluster.

use super::error::{Error, Result};
use super::open::Image;
use super::units::HostOffset;

/// Clusters `from..to` of one piece of metadata.
#[derive(Clone, Debug)]
pub(crate) struct MetadataRange {
    from: u64,
    to: u64,
    what: &'static str,
}

impl MetadataRange {
    /// The clusters of this piece.
    pub(crate) fn clusters(&self) -> std::ops::Range<u64> {
        self.from..self.to
    }
}

/// Lists all metadata except the L2 tables that only snapshots use, sorted by place.
///
/// # Errors
/// [`super::ErrorKind::Corrupt`] if two pieces overlap.
pub(crate) fn metadata(image: &Image) -> Result<Vec<MetadataRange>> {
    let bits = image.header.cluster_bits;
    let mut pieces = vec![MetadataRange { from: 0, to: 1, what: "the header" }];
    let mut add = |what: &'static str, offset: HostOffset, bytes: u64| {
        if bytes > 0 {
            let from = bits.host_cluster(offset).0;
            pieces.push(MetadataRange { from, to: from.saturating_add(bits.clusters_for(bytes)), what });
        }
    };
    let header = &image.header;
    add("the active L1 table", header.l1_offset, u64::from(header.l1_entries) * 8);
    add("the refcount table", header.reftable_offset, u64::from(header.reftable_clusters) << bits.bits());
    let (snapshots, table_bytes) = image.snapshot_table()?;
    add("the snapshot table", header.snapshots_offset, *table_bytes as u64);
    for s in snapshots {
        add("a snapshot's L1 table", s.l1_offset, u64::from(s.l1_entries) * 8);
    }
    if image.has_valid_bitmaps()
        && let Some(b) = header.bitmaps()?
    {
        add("the bitmap directory", b.directory_offset, b.directory_size);
    }
    if let Some((offset, length)) = header.crypto_header()? {
        add("the encryption header", offset, length);
    }
    if let Some(refcounts) = &image.refcounts {
        for offset in refcounts.block_offsets() {
            add("a refcount block", offset, bits.size());
        }
    }
    let l1 = image.active_l1()?;
    for index in 0..l1.len() {
        if let Some(offset) = l1.l2_offset(index) {
            add("an L2 table", offset, bits.size());
        }
    }
    pieces.sort_unstable_by_key(|p| p.from);
    Ok(pieces)
}

/// Refuses an image whose metadata overlaps.
///
/// # Errors
/// [`super::ErrorKind::Corrupt`], naming both pieces.
pub(crate) fn check(image: &Image) -> Result<()> {
    let pieces = metadata(image)?;
    for pair in pieces.windows(2) {
        if let [a, b] = pair
            && b.from < a.to
        {
            return Err(Error::corrupt(format!(
                "{} and {} both claim cluster {:#x}; a write to one would destroy the other",
                a.what, b.what, b.from
            )));
        }
    }
    Ok(())
}

/// Refuses newly allocated clusters that contain metadata: the refcounts must be wrong then.
pub(crate) fn check_fresh(pieces: &[MetadataRange], first: u64, count: u64) -> Result<()> {
    // The pieces do not overlap, so their ends are sorted like their starts.
    let near = pieces.partition_point(|p| p.to <= first);
    match pieces.get(near).filter(|p| p.from < first.saturating_add(count)) {
        None => Ok(()),
        Some(p) => Err(Error::corrupt(format!(
            "cluster {:#x} is free by its refcount, but holds {}",
            p.from.max(first),
            p.what
        ))),
    }
}
