//! Resizing of the guest's disk.

use std::sync::OnceLock;

use super::bitmaps;
use super::error::{Context, Error, ErrorKind, Result};
use super::header::MAX_L1_BYTES;
use super::mapping::{COPIED, L2Entry, Mapping};
use super::open::Image;
use super::refcount::Change;
use super::references::{References, clear_copied};
use super::tables;
use super::units::HostOffset;

impl Image {
    /// Resizes the disk to this many bytes. Added space reads from the backing file where that is long
    /// enough, and as zeros elsewhere. Removed space is lost.
    ///
    /// Order:
    ///
    /// 1. If the L1 table changes: write the new one to a free place, with a copy of the L2 table in which
    ///    the new end lies. Mark persistent bitmaps as in use; flush.
    /// 2. Write the header's sector, which switches size and table at once; flush.
    /// 3. Free what is no longer needed; flush.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a part of a sector; [`ErrorKind::LimitExceeded`];
    /// [`ErrorKind::Unsupported`] for a version 2 image with snapshots, which may not record their size; the
    /// system's.
    pub fn set_virtual_size(&mut self, size: u64) -> Result<()> {
        self.check_new_size(size).context("resize", self.path())?;
        if size == self.virtual_size() {
            return Ok(());
        }
        self.checked("resize", |image| image.check_resize(size), |image| image.resize(size))
    }

    /// Checks everything that [`Image::resize`] touches: the mappings at the old end and behind the new one.
    fn check_resize(&mut self, size: u64) -> Result<()> {
        let (geometry, old_size) = (self.geometry(), self.virtual_size());
        let first = (size.min(old_size) / geometry.l2_reach()) as usize;
        let end = match size < old_size {
            true => self.active_l1()?.len(),
            false => first + 1,
        };
        self.check_touched(first..end)
    }

    fn check_new_size(&self, size: u64) -> Result<()> {
        if !size.is_multiple_of(512) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{size} bytes are not whole sectors of 512"),
            ));
        }
        if self.geometry().l1_entries_for(size) > MAX_L1_BYTES / 8 {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("{size} bytes are too many for clusters of {}", self.header.cluster_bits.size()),
            )
            .advise("convert the image to larger clusters"));
        }
        if self.header.version == 2 && self.header.snapshot_count > 0 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "a version 2 image with snapshots cannot be resized",
            )
            .advise("make it version 3 with `qemu-img amend -o compat=1.1`"));
        }
        self.require_own_data("resizing by domsnap")
    }

    fn resize(&mut self, size: u64) -> Result<()> {
        let geometry = self.geometry();
        let bits = geometry.cluster_bits;
        let old_size = self.virtual_size();
        let old = self.active_l1()?.clone();
        // Both are bounded by the L1 limit.
        let kept = geometry.l1_entries_for(size.min(old_size)) as usize;
        let needed = geometry.l1_entries_for(size).max(1) as usize;
        if size > old_size {
            self.clear_tail(old_size)?;
        }

        // The L2 table in which the new end lies, without the entries behind the end.
        let mut new = old.clone();
        new.entries.truncate(kept);
        new.entries.resize(needed, 0);
        let cut = bits.clusters_for(size);
        let first_cut = (cut % geometry.l2_entries()) as usize;
        let mut cut_table: Option<(HostOffset, Vec<u8>)> = None;
        if size < old_size
            && first_cut > 0
            && let Some(offset) = old.l2_offset(kept.saturating_sub(1))
        {
            let mut bytes = Vec::new();
            self.read_l2(offset, &mut bytes)?;
            let from = first_cut * geometry.l2_entry_size();
            let tail = bytes.get(from..).unwrap_or_default().to_vec();
            if tail.iter().any(|b| *b != 0) {
                let (file, refcounts, _) = self.parts()?;
                let alone = refcounts.get(file, bits.host_cluster(offset))? == 1;
                if let Some(tail) = bytes.get_mut(from..) {
                    tail.fill(0);
                }
                if !alone {
                    clear_copied(geometry, &mut bytes);
                }
                let at = self.allocate(1)?;
                self.file.write_at(&bytes, at)?;
                if let Some(entry) = new.entries.get_mut(kept - 1) {
                    *entry = at.0 | COPIED;
                }
                let mut whole = vec![0; from];
                whole.extend_from_slice(&tail);
                cut_table = Some((offset, whole));
            }
        }

        let (old_offset, old_entries) = (self.header.l1_offset, self.header.l1_entries);
        let moved = new.entries.len() > old.len()
            || new.entries.iter().zip(&old.entries).any(|(a, b)| a != b)
            || (new.len()..old.len()).any(|n| old.l2_offset(n).is_some());
        if moved {
            let raw = new.to_bytes();
            let at = self.allocate(bits.clusters_for(raw.len() as u64))?;
            self.file.write_at(&raw, at)?;
            self.header.l1_offset = at;
            self.header.l1_entries = needed as u32;
        }
        // 1) The guest's data changes with the switch, so bitmaps are marked before it. `flush_and_switch`
        //    makes this and the new tables durable first.
        bitmaps::mark_in_use(self)?;
        self.header.virtual_size = size;
        // 2) The switch. The old tables are still counted, so a crash after it leaks them at worst.
        self.flush_and_switch()?;
        if !moved {
            return Ok(());
        }

        // Tables that are removed whole lose a reference, and so does everything that they refer to. The
        // table at the end loses only the entries behind it.
        let gone: Vec<u64> = (kept..old.len()).filter_map(|n| old.l2_offset(n)).map(|o| o.0).collect();
        let (file, refcounts, _) = self.parts()?;
        let mut references = References::default();
        tables::visit(file, geometry, &gone, |n, bytes| {
            references.fill(geometry, bytes, None)?;
            references.clusters.push(bits.host_cluster(HostOffset(gone.get(n).copied().unwrap_or(0))).0);
            refcounts.change(file, &references.clusters, Change::Down(1), |_, _| {})?;
            Ok(false)
        })?;
        if let Some((offset, tail)) = cut_table {
            references.fill(geometry, &tail, None)?;
            references.clusters.push(bits.host_cluster(offset).0);
            refcounts.change(file, &references.clusters, Change::Down(1), |_, _| {})?;
        }
        self.l1 = OnceLock::from(new);
        self.release(old_offset, u64::from(old_entries) * 8)?;
        self.flush_metadata()?;
        self.punch_freed()
    }

    /// Zeros the part of the last cluster behind the disk's end, if only this image owns the cluster. That
    /// part would become visible in the larger disk. No reader sees it before, so it may be written in place.
    fn clear_tail(&mut self, end: u64) -> Result<()> {
        let geometry = self.geometry();
        let within = end & geometry.cluster_bits.mask();
        if within == 0 {
            return Ok(());
        }
        let index = (end / geometry.l2_reach()) as usize;
        let Some(offset) = self.active_l1()?.l2_offset(index) else { return Ok(()) };
        let mut bytes = Vec::new();
        let table = self.read_l2(offset, &mut bytes)?;
        let entry: L2Entry = table.entry((end % geometry.l2_reach() / geometry.cluster_bits.size()) as usize);
        if let (Mapping::Data(host), true) = (entry.mapping(geometry)?, entry.is_copied()) {
            let zeros = vec![0; (geometry.cluster_bits.size() - within) as usize];
            self.file.write_at(&zeros, HostOffset(host.0 + within))?;
        }
        Ok(())
    }
}
