//! Writing of a whole image in one pass, from its first byte to its last.
//!
//! The places of everything are known before the first byte is written, because they follow from what is
//! mapped and from nothing else:
//!
//! ```text
//! header | refcount table | refcount blocks | L1 table | L2 tables | data clusters, in the guest's order
//! ```
//!
//! So a checksum of the file can be made while it is written, and nothing is written twice. The caller maps
//! the disk first, in ascending order ([`Sequential::map`]), then writes the metadata
//! ([`Sequential::metadata`]) and then the data of each mapped cluster, in the same order.

use std::collections::BTreeMap;
use std::ops::Range;

use super::create::{NewImage, plan};
use super::error::{Error, ErrorKind, Result};
use super::header::Header;
use super::mapping::{COPIED, Geometry, ZERO};
use super::refcount::fill_ones;
use super::units::HostOffset;

/// Mappings of one L2 table, two bits a cluster.
type Map = Box<[u8]>;

const DATA: u8 = 1;
const ZEROS: u8 = 2;

/// The layout of an image that is going to be written.
pub struct Sequential {
    header: Header,
    head: Vec<u8>,
    geometry: Geometry,
    /// By L1 index.
    tables: BTreeMap<u64, Map>,
    clusters: u64,
}

impl std::fmt::Debug for Sequential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sequential").field("clusters", &self.clusters).finish_non_exhaustive()
    }
}

/// Places of the parts, in clusters.
struct Places {
    reftable: u64,
    blocks: u64,
    l1: u64,
    total: u64,
}

impl Sequential {
    /// Begins the layout of an image.
    ///
    /// # Errors
    /// Those of [`super::create()`].
    pub fn new(new: &NewImage) -> Result<Self> {
        let (header, head) = plan(new)?;
        let geometry = Geometry::of(&header);
        if geometry.extended_l2 {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "extended L2 entries are not written in one pass",
            ));
        }
        Ok(Self { header, head, geometry, tables: BTreeMap::new(), clusters: 0 })
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster_bits.size()
    }

    /// Maps a range of the guest's disk: to data that will be written, or to zeros. Clusters that it covers
    /// in part are mapped whole, and data prevail over zeros.
    pub fn map(&mut self, range: Range<u64>, zeros: bool) {
        let bits = self.geometry.cluster_bits.bits();
        let end = range.end.min(self.header.virtual_size);
        if range.start >= end {
            return;
        }
        let per_table = self.geometry.l2_entries();
        for cluster in (range.start >> bits)..=((end - 1) >> bits) {
            let table = self.tables.entry(cluster / per_table);
            let map = table.or_insert_with(|| vec![0; (per_table / 4).max(1) as usize].into_boxed_slice());
            let entry = cluster % per_table;
            let Some(byte) = map.get_mut((entry / 4) as usize) else { continue };
            let shift = entry % 4 * 2;
            let old = *byte >> shift & 3;
            let new = if zeros && old != DATA { ZEROS } else { DATA };
            if new == DATA && old != DATA {
                self.clusters += 1;
            }
            *byte = (*byte & !(3 << shift)) | (new << shift);
        }
    }

    /// Bytes of data that will be written.
    pub fn data_bytes(&self) -> u64 {
        self.clusters << self.geometry.cluster_bits.bits()
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.places().total << self.geometry.cluster_bits.bits()
    }

    fn places(&self) -> Places {
        let bits = self.geometry.cluster_bits;
        let l1 = bits.clusters_for(u64::from(self.header.l1_entries) * 8);
        let fixed = 1 + l1 + self.tables.len() as u64 + self.clusters;
        let per_block = (bits.size() * 8) >> self.header.refcount_order;
        let (mut blocks, mut reftable) = (1, 1);
        loop {
            let total = fixed + reftable + blocks;
            let (b, t) = (total.div_ceil(per_block), total.div_ceil(per_block).div_ceil(bits.size() / 8));
            if b <= blocks && t <= reftable {
                return Places { reftable, blocks, l1, total };
            }
            (blocks, reftable) = (b.max(blocks), t.max(reftable));
        }
    }

    /// Writes everything before the data, in order, by calls of `write`.
    ///
    /// # Errors
    /// [`ErrorKind::LimitExceeded`], and those of `write`.
    pub fn metadata(&self, write: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let places = self.places();
        let at = |cluster: u64| cluster << bits.bits();
        let mut header = self.header.clone();
        header.reftable_clusters = u32::try_from(places.reftable)
            .map_err(|_| Error::new(ErrorKind::LimitExceeded, "the refcount table is too large"))?;
        header.l1_offset = HostOffset(at(1 + places.reftable + places.blocks));
        let mut first = self.head.clone();
        first.resize(bits.bytes(), 0);
        header.write_fields(&mut first);
        write(&first)?;

        let mut table = vec![0; bits.bytes()];
        for number in 0..places.reftable {
            table.fill(0);
            let entries = bits.size() / 8;
            for (n, entry) in table.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let block = number * entries + n as u64;
                if block < places.blocks {
                    *entry = at(1 + places.reftable + block).to_be_bytes();
                }
            }
            write(&table)?;
        }
        let per_block = (bits.size() * 8) >> header.refcount_order;
        for number in 0..places.blocks {
            table.fill(0);
            let used = places.total.saturating_sub(number * per_block).min(per_block);
            fill_ones(header.refcount_order, &mut table, used as usize);
            write(&table)?;
        }
        let first_l2 = 1 + places.reftable + places.blocks + places.l1;
        let mut tables = self.tables.keys().enumerate().peekable();
        for number in 0..places.l1 {
            table.fill(0);
            let entries = bits.size() / 8;
            while let Some((_, index)) = tables.peek()
                && **index < (number + 1) * entries
            {
                if let Some((n, index)) = tables.next()
                    && let Some(entry) =
                        table.as_chunks_mut::<8>().0.get_mut((index - number * entries) as usize)
                {
                    *entry = (at(first_l2 + n as u64) | COPIED).to_be_bytes();
                }
            }
            write(&table)?;
        }
        let mut data = first_l2 + self.tables.len() as u64;
        for map in self.tables.values() {
            table.fill(0);
            for (n, entry) in table.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                match map.get(n / 4).map_or(0, |byte| byte >> (n % 4 * 2) & 3) {
                    DATA => {
                        *entry = (at(data) | COPIED).to_be_bytes();
                        data += 1;
                    }
                    ZEROS => *entry = ZERO.to_be_bytes(),
                    _ => {}
                }
            }
            write(&table)?;
        }
        Ok(())
    }

    /// The ranges of the guest's disk whose data follow the metadata, in order. The last one may end after
    /// the disk: zeros fill the cluster.
    pub fn data(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let bits = self.geometry.cluster_bits.bits();
        let per_table = self.geometry.l2_entries();
        let clusters = self.tables.iter().flat_map(move |(index, map)| {
            let of = move |n: u64| map.get((n / 4) as usize).map_or(0, |byte| byte >> (n % 4 * 2) & 3);
            (0..per_table).filter(move |n| of(*n) == DATA).map(move |n| index * per_table + n)
        });
        let mut clusters = clusters.peekable();
        std::iter::from_fn(move || {
            let first = clusters.next()?;
            let mut end = first + 1;
            while clusters.peek() == Some(&end) {
                clusters.next();
                end += 1;
            }
            Some(first << bits..end << bits)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Backing, Image, OpenOptions, RunLayer, View};
    use super::*;

    /// An image that is written in one pass is sound, and shows what was mapped.
    #[test]
    fn one_pass_gives_a_sound_image() {
        let dir = tempfile::tempdir().unwrap();
        for (number, size) in [(0, 1 << 20), (1, (700 << 20) + 512), (2, 0), (3, 3 << 30)] {
            for backing in [None, Some(Backing { file: "base".into(), format: Some("raw".into()) })] {
                let path = dir.path().join(format!("{number}-{}", backing.is_some()));
                let mut new = NewImage::new(size);
                new.backing = backing.clone();
                let mut layout = Sequential::new(&new).unwrap();
                let mut mapped = vec![];
                for (start, length, zeros) in [
                    (0, 1, false),
                    (200 << 10, 300 << 10, true),
                    (256 << 10, 1, false),
                    (650 << 20, 60 << 20, false),
                ] {
                    let range = start..(start + length as u64);
                    layout.map(range.clone(), zeros);
                    mapped.push((range, zeros));
                }
                let mut file = Vec::new();
                layout
                    .metadata(&mut |bytes| {
                        file.extend_from_slice(bytes);
                        Ok(())
                    })
                    .unwrap();
                let ranges: Vec<_> = layout.data().collect();
                for range in &ranges {
                    for cluster in (range.start..range.end).step_by(65536) {
                        file.extend(std::iter::repeat_n((cluster >> 16) as u8 | 1, 65536));
                    }
                }
                assert_eq!(file.len() as u64, layout.file_bytes());
                assert_eq!(
                    ranges.iter().map(|range| range.end - range.start).sum::<u64>(),
                    layout.data_bytes()
                );
                std::fs::write(&path, &file).unwrap();
                let image = Image::open(&path, &OpenOptions::read_only()).unwrap();
                let report = image.check().unwrap();
                assert!(report.is_clean(), "{report:?}");
                assert_eq!(image.virtual_size(), size);
                assert_eq!(image.header().backing, backing);
                let mut view = View::new(vec![RunLayer::active(&image).unwrap()]).unwrap();
                let mut buf = [0; 1];
                for range in ranges {
                    let at = range.start;
                    view.read_at(&mut buf, at, None).unwrap();
                    assert_eq!(buf[0], (at >> 16) as u8 | 1, "at {at}");
                }
            }
        }
    }
}
