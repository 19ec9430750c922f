//! Internal snapshots: create, apply, delete.
//!
//! Each operation states what it makes durable before what. All three take effect with one write of the
//! header's sector, and free what is no longer needed after it. The engine keeps the names of its own
//! snapshots unique. A table in which QEMU made several snapshots of one name is refused.

use std::sync::OnceLock;

use super::bitmaps;
use super::error::{Context, Error, ErrorKind, Result, shown};
use super::file::ImageFile;
use super::header::{MAX_L1_BYTES, MAX_SNAPSHOTS};
use super::mapping::{COPIED, Geometry, OFFSET_MASK};
use super::open::Image;
use super::refcount::{Change, Refcounts};
use super::references::{References, clear_copied, set_copied};
use super::snapshot_table::{self, Snapshot};
use super::tables::{self, L1Table};
use super::units::HostOffset;

/// Name and metadata of a new snapshot.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NewSnapshot {
    /// Its name: not empty, and not in the table yet.
    pub name: String,
    /// Time of the snapshot: seconds since 1970.
    pub date_seconds: u32,
    /// Time of the snapshot: nanoseconds within the second.
    pub date_nanoseconds: u32,
    /// Running time of the guest, in nanoseconds.
    pub vm_clock_ns: u64,
    /// QEMU's instruction count.
    pub icount: Option<u64>,
    /// Bytes of VM state that the caller has written behind the disk's end; 0 without.
    pub vm_state_size: u64,
}

impl NewSnapshot {
    /// Makes the description of a snapshot of the disk alone, at this time.
    pub fn new(name: impl Into<String>, date_seconds: u32, date_nanoseconds: u32) -> Self {
        Self {
            name: name.into(),
            date_seconds,
            date_nanoseconds,
            vm_clock_ns: 0,
            icount: None,
            vm_state_size: 0,
        }
    }
}

/// Result of a delete.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Deleted {
    /// Snapshots that were deleted.
    pub snapshots: usize,
    /// Bytes of the file that became free for new clusters.
    pub freed_bytes: u64,
}

/// One L2 table that loses references: its L1 index, its offset, and their number.
struct Loss {
    index: usize,
    offset: u64,
    times: u64,
    /// True if the active L1 has the same table at the same index.
    active: bool,
}

impl Image {
    /// Creates a snapshot of the active state.
    ///
    /// Order:
    ///
    /// 1. In any order: write the new L1 table and snapshot table to free places; clear COPIED bits of the
    ///    active tables; raise refcounts; flush.
    /// 2. Write table entries of new refcount blocks, if any; flush.
    /// 3. Write the header's sector; flush.
    /// 4. Lower the old snapshot table's refcounts; flush.
    ///
    /// That is three flushes, and four with new refcount blocks.
    ///
    /// # Errors
    /// [`ErrorKind::SnapshotExists`], [`ErrorKind::InvalidInput`] for an invalid name,
    /// [`ErrorKind::RefcountOverflow`], [`ErrorKind::LimitExceeded`], [`ErrorKind::Unsupported`] with an
    /// external data file, [`ErrorKind::Corrupt`], the system's. The first five change nothing.
    pub fn create_snapshot(&mut self, new: &NewSnapshot) -> Result<()> {
        self.check_new_snapshot(new).context("create a snapshot in", self.path())?;
        let check = |image: &mut Self| image.check_create(new.vm_state_size > 0);
        let before = self.header.snapshots_offset;
        let done = self.checked("create a snapshot in", check, |image| image.create_snapshot_unguarded(new));
        self.or_repaired(done, |image| match image.header.snapshots_offset == before {
            true => None,
            false => Some(()),
        })
    }

    /// Checks everything that a create would touch, without a write. So a refusal comes before anything is
    /// begun.
    ///
    /// # Errors
    /// As [`Image::create_snapshot`].
    pub fn could_create(&mut self, new: &NewSnapshot) -> Result<()> {
        self.check_new_snapshot(new).context("create a snapshot in", self.path())?;
        self.rehearse("create a snapshot in", |image| image.check_create(new.vm_state_size > 0))
    }

    /// The part of [`Image::could_create`] that does not read tables, for an image that another process
    /// writes.
    ///
    /// # Errors
    /// As [`Image::create_snapshot`].
    pub fn could_take(&self, new: &NewSnapshot) -> Result<()> {
        self.check_new_snapshot(new).context("create a snapshot in", self.path())
    }

    /// Like [`Image::could_create`], for [`Image::apply_snapshot`].
    ///
    /// # Errors
    /// As [`Image::apply_snapshot`].
    pub fn could_apply(&mut self, name: &str) -> Result<()> {
        self.require_own_data("internal snapshots").context("apply a snapshot in", self.path())?;
        self.require_snapshot(name).context("apply a snapshot in", self.path())?;
        self.rehearse("apply a snapshot in", |image| image.check_apply(name))
    }

    /// Like [`Image::could_create`], for [`Image::delete_snapshots`].
    ///
    /// # Errors
    /// As [`Image::delete_snapshots`].
    pub fn could_delete(&mut self, names: &[&str]) -> Result<()> {
        let doomed = self.doomed(names).context("delete snapshots in", self.path())?;
        self.rehearse("delete snapshots in", |image| image.rehearse_delete(&doomed))
    }

    /// Repairs the image after a failed operation, and returns the result. Either the operation was done
    /// after all, or it was not done and nothing is left of it. `outcome` reads from the repaired image which
    /// of the two it is.
    fn or_repaired<T>(&self, done: Result<T>, outcome: impl FnOnce(&Self) -> Option<T>) -> Result<T> {
        let error = match done {
            Ok(value) => return Ok(value),
            Err(error) if !error.is_half_done() => return Err(error),
            Err(error) => error,
        };
        match self.repaired() {
            None => Err(error),
            Some(image) => outcome(&image).ok_or_else(|| error.rolled_back()),
        }
    }

    /// Returns the number of L1 entries that a snapshot of the active state copies, and their L2 tables.
    fn copied_tables(&self, with_vm_state: bool) -> Result<(usize, Vec<u64>)> {
        let l1 = self.active_l1()?;
        // VM state lies behind the disk's end. Without VM state, mappings there are leftovers that no
        // snapshot needs.
        let disk = usize::try_from(self.geometry().l1_entries_for(self.virtual_size())).unwrap_or(usize::MAX);
        let kept = if with_vm_state { l1.len() } else { disk.max(1).min(l1.len()) };
        Ok((kept, (0..kept).filter_map(|n| l1.l2_offset(n)).map(|o| o.0).collect()))
    }

    fn check_create(&mut self, with_vm_state: bool) -> Result<()> {
        let (_, offsets) = self.copied_tables(with_vm_state)?;
        let bytes = self.snapshot_table()?.1 as u64;
        self.check_raise(&offsets, &[])?;
        self.check_release(self.header.snapshots_offset, bytes)
    }

    /// Fails if the refcounts cannot count one more reference to each of these L2 tables and to everything
    /// that they refer to. Entries that the table of the same number in `beside` has at the same place are
    /// exempt.
    fn check_raise(&mut self, offsets: &[u64], beside: &[Option<HostOffset>]) -> Result<()> {
        let geometry = self.geometry();
        let bits = geometry.cluster_bits;
        // A cluster of data has one reference for each snapshot and one more. A compressed cluster usually
        // has one for each of its 512-byte sectors. If that can exceed the maximum, they are counted up in
        // memory.
        let most = (u64::from(self.header.snapshot_count) + 2).saturating_mul(bits.size() / 512);
        let mut counted;
        let (file, refcounts, header) = self.parts()?;
        let (refcounts, change) = match most > refcounts.max() {
            true => {
                counted = Refcounts::load(file, header)?;
                counted.dry_run();
                (&mut counted, Change::Up(1))
            }
            false => (refcounts, Change::Used),
        };
        let mut other = Vec::new();
        let mut references = References::default();
        tables::visit(file, geometry, offsets, |n, bytes| {
            let compare = match beside.get(n).copied().flatten() {
                Some(offset) => {
                    other.resize(bits.bytes(), 0);
                    file.read_at(&mut other, offset)?;
                    Some(&other[..])
                }
                None => None,
            };
            references.fill(geometry, bytes, compare)?;
            references.clusters.push(bits.host_cluster(HostOffset(offsets.get(n).copied().unwrap_or(0))).0);
            refcounts.change(file, &references.clusters, change, |_, _| {})?;
            Ok(false)
        })
    }

    /// Fails if these clusters could not be freed.
    fn check_release(&mut self, at: HostOffset, bytes: u64) -> Result<()> {
        let bits = self.header.cluster_bits;
        let first = bits.host_cluster(at).0;
        let clusters: Vec<u64> = (first..first.saturating_add(bits.clusters_for(bytes))).collect();
        let (file, refcounts, _) = self.parts()?;
        let mut unused = None;
        refcounts.change(file, &clusters, Change::Keep, |n, count| {
            if count == 0 {
                unused = clusters.get(n).copied();
            }
        })?;
        match unused {
            None => Ok(()),
            Some(cluster) => Err(refcounts.not_in_use(cluster)),
        }
    }

    fn check_new_snapshot(&self, new: &NewSnapshot) -> Result<()> {
        self.require_own_data("internal snapshots")?;
        let invalid = |detail: String| Err(Error::new(ErrorKind::InvalidInput, detail));
        if new.name.is_empty() || new.name.len() > usize::from(u16::MAX) || new.name.contains('\0') {
            return invalid(format!(
                "\"{}\" is not a valid name of a snapshot: use 1 to 65535 bytes without NUL",
                shown(new.name.as_bytes())
            ));
        }
        if new.date_nanoseconds >= 1_000_000_000 {
            return invalid(format!("{} nanoseconds are more than a second", new.date_nanoseconds));
        }
        if self.find_snapshot(&new.name)?.is_some() {
            return Err(Error::new(
                ErrorKind::SnapshotExists,
                format!("the image has an internal snapshot \"{}\" already", shown(new.name.as_bytes())),
            )
            .advise("choose another name, or delete that snapshot first"));
        }
        if self.header.snapshot_count >= MAX_SNAPSHOTS {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("the image has {MAX_SNAPSHOTS} snapshots"),
            )
            .advise("delete snapshots that are not needed"));
        }
        Ok(())
    }

    fn create_snapshot_unguarded(&mut self, new: &NewSnapshot) -> Result<()> {
        let geometry = self.geometry();
        let mut l1 = self.active_l1()?.clone();
        let (kept, offsets) = self.copied_tables(new.vm_state_size > 0)?;
        let copy: Vec<u8> = l1.entries.iter().take(kept).flat_map(|e| (e & !COPIED).to_be_bytes()).collect();
        let l1_offset = self.allocate_for(&copy)?;
        let (old, old_bytes) = self.snapshot_table()?.clone();
        let mut snapshots = old;
        snapshots.push(Snapshot {
            id: snapshot_table::next_id(&snapshots),
            name: new.name.clone().into_bytes(),
            l1_offset,
            l1_entries: u32::try_from(kept).unwrap_or(u32::MAX),
            date_seconds: new.date_seconds,
            date_nanoseconds: new.date_nanoseconds,
            vm_clock_ns: new.vm_clock_ns,
            vm_state_size: new.vm_state_size,
            disk_size: self.virtual_size(),
            icount: new.icount,
            unknown_extra: Vec::new(),
        });
        let table = snapshot_table::encode(&snapshots)?;
        let table_offset = self.allocate_for(&table)?;

        let (file, refcounts, header) = self.parts()?;
        let bits = header.cluster_bits;
        let mut references = References::default();
        tables::visit(file, geometry, &offsets, |_, bytes| {
            references.fill(geometry, bytes, None)?;
            refcounts.change(file, &references.clusters, Change::Up(1), |_, _| {})?;
            Ok(clear_copied(geometry, bytes))
        })?;
        let l2_clusters: Vec<u64> = offsets.iter().map(|o| bits.host_cluster(HostOffset(*o)).0).collect();
        refcounts.change(file, &l2_clusters, Change::Up(1), |_, _| {})?;

        if l1.entries.iter().take(kept).any(|e| e & COPIED != 0) {
            l1.entries.iter_mut().take(kept).for_each(|e| *e &= !COPIED);
            file.write_at(&copy, header.l1_offset)?;
        }
        if !copy.is_empty() {
            file.write_at(&copy, l1_offset)?;
        }
        file.write_at(&table, table_offset)?;
        let old_offset = header.snapshots_offset;
        header.snapshots_offset = table_offset;
        header.snapshot_count += 1;
        self.flush_and_switch()?;

        self.l1 = OnceLock::from(l1);
        self.snapshots = OnceLock::from((snapshots, table.len()));
        self.protected = None;
        if old_bytes > 0 {
            self.release(old_offset, old_bytes as u64)?;
            self.flush_metadata()?;
            self.punch_freed()?;
        }
        Ok(())
    }

    /// Allocates clusters for these bytes; none for no bytes.
    fn allocate_for(&mut self, bytes: &[u8]) -> Result<HostOffset> {
        match self.header.cluster_bits.clusters_for(bytes.len() as u64) {
            0 => Ok(HostOffset(0)),
            clusters => self.allocate(clusters),
        }
    }

    /// Makes the active state that of a snapshot, including its size. All snapshots are kept.
    ///
    /// Order:
    ///
    /// 1. In any order: write the new active L1 table to a free place; raise refcounts of what only the
    ///    snapshot has; clear COPIED bits in those tables; mark persistent bitmaps as in use; flush. Write
    ///    table entries of new refcount blocks, if any; flush.
    /// 2. Write the header's sector, which switches L1 table and size at once; flush.
    /// 3. Lower refcounts of what only the old active state had; flush.
    ///
    /// Entries that both have at the same place are not touched. A second apply does nothing.
    ///
    /// VM state is not copied into the active state: a QEMU that loads it reads it from the snapshot.
    ///
    /// Damaged tables of the *old* active state do not stop step 3, at which nothing can be refused any more.
    /// What they refer to stays allocated, as a leak that a check finds and repairs.
    ///
    /// # Errors
    /// [`ErrorKind::SnapshotNotFound`], [`ErrorKind::Unsupported`], [`ErrorKind::Corrupt`], the system's.
    pub fn apply_snapshot(&mut self, name: &str) -> Result<()> {
        self.require_own_data("internal snapshots").context("apply a snapshot in", self.path())?;
        self.require_snapshot(name).context("apply a snapshot in", self.path())?;
        let before = (self.header.l1_offset, self.header.virtual_size);
        let done = self.checked(
            "apply a snapshot in",
            |image| image.check_apply(name),
            |image| image.apply_snapshot_unguarded(name),
        );
        self.or_repaired(done, |image| match (image.header.l1_offset, image.header.virtual_size) == before {
            true => None,
            false => Some(()),
        })
    }

    /// Builds the active L1 table that an apply writes.
    fn applied_l1(&self, name: &str) -> Result<(Snapshot, L1Table)> {
        let geometry = self.geometry();
        let snapshot = self.require_snapshot(name)?.clone();
        let needed = geometry.l1_entries_for(snapshot.disk_size).max(1);
        if needed > MAX_L1_BYTES / 8 {
            return Err(Error::corrupt(format!(
                "snapshot \"{}\" says that its disk has {} bytes, which no L1 table can map",
                shown(&snapshot.name),
                snapshot.disk_size
            )));
        }
        let mut new = self.snapshot_l1(&snapshot)?;
        new.entries.resize(needed as usize, 0);
        new.entries.iter_mut().for_each(|e| *e &= OFFSET_MASK);
        Ok((snapshot, new))
    }

    fn check_apply(&mut self, name: &str) -> Result<()> {
        let (_, new) = self.applied_l1(name)?;
        let old = self.active_l1()?;
        let (offsets, beside): (Vec<u64>, Vec<Option<HostOffset>>) = (0..new.len())
            .filter(|n| new.l2_offset(*n) != old.l2_offset(*n))
            .filter_map(|n| Some((new.l2_offset(n)?.0, old.l2_offset(n))))
            .unzip();
        self.check_raise(&offsets, &beside)?;
        bitmaps::list(self)?;
        self.check_release(self.header.l1_offset, u64::from(self.header.l1_entries) * 8)
    }

    fn apply_snapshot_unguarded(&mut self, name: &str) -> Result<()> {
        let geometry = self.geometry();
        let (snapshot, new) = self.applied_l1(name)?;
        let needed = new.len();
        let old = self.active_l1()?.clone();
        let count = old.len().max(new.len());
        if snapshot.disk_size == self.virtual_size()
            && (0..count).all(|n| old.l2_offset(n) == new.l2_offset(n))
        {
            return Ok(());
        }

        let raw = new.to_bytes();
        let l1_offset = self.allocate_for(&raw)?;
        let (file, refcounts, _) = self.parts()?;
        // 1) References are raised before the header sector makes them. A crash here leaves refcounts that
        //    are too high.
        change_differences(file, refcounts, geometry, &new, &old, Change::Up(1), true)?;
        file.write_at(&raw, l1_offset)?;
        bitmaps::mark_in_use(self)?;
        let (old_offset, old_entries) = (self.header.l1_offset, self.header.l1_entries);
        self.header.l1_offset = l1_offset;
        self.header.l1_entries = needed as u32;
        self.header.virtual_size = snapshot.disk_size;
        // 2) The switch. Before it the old state is whole, after it the snapshot's.
        self.flush_and_switch()?;

        // 3) The references of the old state are durably gone, so their refcounts may go down.
        let (file, refcounts, _) = self.parts()?;
        match change_differences(file, refcounts, geometry, &old, &new, Change::Down(1), false) {
            // The apply is done. A previous state with damaged tables is left behind; the clusters that they
            // claim leak.
            Err(error) if error.kind() == ErrorKind::Corrupt => {}
            result => result?,
        }
        self.l1 = OnceLock::from(new);
        self.release(old_offset, u64::from(old_entries) * 8)?;
        self.flush_metadata()?;
        self.punch_freed()
    }

    /// Returns true if the active state is this snapshot: the same size, and every guest cluster at the same
    /// place. After a crash this shows if an apply was done.
    ///
    /// # Errors
    /// [`ErrorKind::SnapshotNotFound`], [`ErrorKind::Corrupt`], the system's.
    pub fn snapshot_matches_active(&self, name: &str) -> Result<bool> {
        self.matches_active(name).context("compare a snapshot in", self.path())
    }

    fn matches_active(&self, name: &str) -> Result<bool> {
        let snapshot = self.require_snapshot(name)?;
        if snapshot.disk_size != self.virtual_size() {
            return Ok(false);
        }
        let geometry = self.geometry();
        let (ours, theirs) = (self.active_l1()?, self.snapshot_l1(snapshot)?);
        let disk = usize::try_from(geometry.l1_entries_for(snapshot.disk_size)).unwrap_or(usize::MAX);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for index in 0..disk {
            let (x, y) = (ours.l2_offset(index), theirs.l2_offset(index));
            if x == y {
                continue;
            }
            for (offset, table) in [(x, &mut a), (y, &mut b)] {
                table.clear();
                table.resize(geometry.cluster_bits.bytes(), 0);
                if let Some(offset) = offset {
                    self.file.read_at(table, offset)?;
                    clear_copied(geometry, table);
                }
            }
            if a != b {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Deletes any number of snapshots in one pass; all of them or none.
    ///
    /// Order:
    ///
    /// 1. Write a snapshot table without them to a free place, and its refcounts; flush. (Nothing of this if
    ///    no snapshot is left.)
    /// 2. Write the header's sector; flush.
    /// 3. In any order: lower refcounts; set COPIED bits where one reference is left and the active state has
    ///    it; free the old table and the L1 tables of the deleted snapshots; flush.
    ///
    /// That is three flushes for any number of snapshots. A crash in step 3 leaves leaked clusters. The
    /// active state may write some of them in place, because nothing else needs them.
    ///
    /// # Errors
    /// [`ErrorKind::SnapshotNotFound`] (nothing is changed), [`ErrorKind::Corrupt`], the system's.
    pub fn delete_snapshots(&mut self, names: &[&str]) -> Result<Deleted> {
        let doomed = self.doomed(names).context("delete snapshots in", self.path())?;
        if doomed.is_empty() {
            return Ok(Deleted::default());
        }
        let check = |image: &mut Self| image.rehearse_delete(&doomed);
        let done = self.checked("delete snapshots in", check, |image| image.delete_unguarded(&doomed, false));
        self.or_repaired(done, |image| image.without(&doomed))
    }

    /// Removes snapshots from the table and leaves everything that they refer to allocated, as leaked
    /// clusters that `qemu-img check -r leaks` frees. This is for snapshots with damaged tables, whose
    /// references cannot be known.
    ///
    /// Order: as [`Image::delete_snapshots`], but step 3 only frees the old snapshot table.
    ///
    /// # Errors
    /// As [`Image::delete_snapshots`], except for damage in the snapshots themselves.
    pub fn forget_snapshots(&mut self, names: &[&str]) -> Result<Deleted> {
        let doomed = self.doomed(names).context("forget snapshots in", self.path())?;
        if doomed.is_empty() {
            return Ok(Deleted::default());
        }
        let check = |image: &mut Self| {
            let bytes = image.snapshot_table()?.1 as u64;
            image.check_release(image.header.snapshots_offset, bytes)
        };
        let done = self.checked("forget snapshots in", check, |image| image.delete_unguarded(&doomed, true));
        self.or_repaired(done, |image| image.without(&doomed))
    }

    /// Returns the result of a delete if these snapshots are gone.
    fn without(&self, doomed: &[Snapshot]) -> Option<Deleted> {
        let gone = self.snapshots().is_ok_and(|left| !left.iter().any(|s| doomed.contains(s)));
        gone.then_some(Deleted { snapshots: doomed.len(), freed_bytes: 0 })
    }

    /// Performs a delete in memory.
    ///
    /// # Errors
    /// The same as of the delete itself.
    fn rehearse_delete(&self, doomed: &[Snapshot]) -> Result<()> {
        let mut refcounts = Refcounts::load(&self.file, &self.header)?;
        refcounts.dry_run();
        let (left, _) = self.snapshot_table()?;
        let left: Vec<Snapshot> = left.iter().filter(|s| !doomed.contains(s)).cloned().collect();
        let table_bytes = snapshot_table::encode(&left)?.len() as u64;
        match self.header.cluster_bits.clusters_for(table_bytes) {
            0 => {}
            clusters => refcounts.allocate(&self.file, clusters).map(|_| ())?,
        }
        let losses = self.losses(doomed)?;
        let geometry = self.geometry();
        remove_references(&self.file, &mut refcounts, geometry, &losses, self.active_l1()?.len(), false)?;
        let bits = self.header.cluster_bits;
        let mut release = |offset: HostOffset, bytes: u64| {
            let first = bits.host_cluster(offset).0;
            let clusters: Vec<u64> = (first..first.saturating_add(bits.clusters_for(bytes))).collect();
            refcounts.change(&self.file, &clusters, Change::Down(1), |_, _| {})
        };
        for s in doomed {
            release(s.l1_offset, u64::from(s.l1_entries) * 8)?;
        }
        release(self.header.snapshots_offset, self.snapshot_table()?.1 as u64)
    }

    pub(super) fn doomed(&self, names: &[&str]) -> Result<Vec<Snapshot>> {
        let mut doomed: Vec<Snapshot> = Vec::new();
        for name in names {
            let snapshot = self.require_snapshot(name)?;
            if !doomed.contains(snapshot) {
                doomed.push(snapshot.clone());
            }
        }
        Ok(doomed)
    }

    /// Lists the L2 tables that these snapshots refer to. For each L1 index, the one that is also active
    /// comes last.
    fn losses(&self, doomed: &[Snapshot]) -> Result<Vec<Loss>> {
        let active = self.active_l1()?;
        let mut all: Vec<(usize, bool, u64)> = Vec::new();
        for s in doomed {
            let l1 = self.snapshot_l1(s)?;
            all.extend((0..l1.len()).filter_map(|n| {
                let offset = l1.l2_offset(n)?;
                Some((n, active.l2_offset(n) == Some(offset), offset.0))
            }));
        }
        all.sort_unstable();
        let mut losses: Vec<Loss> = Vec::new();
        for (index, active, offset) in all {
            match losses.last_mut() {
                Some(last) if last.index == index && last.offset == offset => last.times += 1,
                _ => losses.push(Loss { index, offset, times: 1, active }),
            }
        }
        Ok(losses)
    }

    /// Deletes snapshots. With `forget`, only the table's entries are removed.
    fn delete_unguarded(&mut self, doomed: &[Snapshot], forget: bool) -> Result<Deleted> {
        let geometry = self.geometry();
        let losses = if forget { Vec::new() } else { self.losses(doomed)? };
        let (mut left, old_bytes) = self.snapshot_table()?.clone();
        left.retain(|s| !doomed.contains(s));
        let table = snapshot_table::encode(&left)?;
        let table_offset = self.allocate_for(&table)?;
        let old_offset = self.header.snapshots_offset;
        self.header.snapshots_offset = table_offset;
        self.header.snapshot_count = u32::try_from(left.len()).unwrap_or(u32::MAX);
        // 1) and 2) The new table, then the header sector. Without a table left there is nothing to make
        //    durable before the header.
        if table.is_empty() {
            self.write_header_sector()?;
            self.file.flush()?;
        } else {
            self.file.write_at(&table, table_offset)?;
            self.flush_and_switch()?;
        }
        self.snapshots = OnceLock::from((left, table.len()));
        self.protected = None;

        // 3) The snapshots are durably gone, so their references may go down. A crash from here on leaks
        //    clusters.
        let mut l1 = self.active_l1()?.clone();
        let (file, refcounts, header) = self.parts()?;
        refcounts.take_freed();
        let touched = remove_references(file, refcounts, geometry, &losses, l1.len(), true)?;
        restore_copied(file, refcounts, geometry, header.l1_offset, &mut l1, &touched)?;
        self.l1 = OnceLock::from(l1);
        self.release(old_offset, old_bytes as u64)?;
        for s in doomed.iter().filter(|_| !forget) {
            self.release(s.l1_offset, u64::from(s.l1_entries) * 8)?;
        }
        let (_, refcounts, header) = self.parts()?;
        let freed_bytes = refcounts.take_freed() << header.cluster_bits.bits();
        self.flush_metadata()?;
        self.punch_freed()?;
        Ok(Deleted { snapshots: doomed.len(), freed_bytes })
    }
}

/// Changes the refcounts of all L2 tables and clusters that `l1` has and `other` does not have at the same
/// place.
fn change_differences(
    file: &ImageFile,
    refcounts: &mut Refcounts,
    geometry: Geometry,
    l1: &L1Table,
    other: &L1Table,
    change: Change,
    clear: bool,
) -> Result<()> {
    let differing: Vec<usize> = (0..l1.len())
        .filter(|n| l1.l2_offset(*n).is_some() && l1.l2_offset(*n) != other.l2_offset(*n))
        .collect();
    let offsets: Vec<u64> = differing.iter().filter_map(|n| l1.l2_offset(*n)).map(|o| o.0).collect();
    let mut references = References::default();
    let mut beside = vec![0; geometry.cluster_bits.bytes()];
    tables::visit(file, geometry, &offsets, |n, bytes| {
        let index = differing.get(n).copied().unwrap_or(usize::MAX);
        let compare = match other.l2_offset(index) {
            Some(offset) => {
                file.read_at(&mut beside, offset)?;
                Some(&beside[..])
            }
            None => None,
        };
        references.fill(geometry, bytes, compare)?;
        let l2 = offsets.get(n).copied().unwrap_or(0);
        references.clusters.push(geometry.cluster_bits.host_cluster(HostOffset(l2)).0);
        refcounts.change(file, &references.clusters, change, |_, _| {})?;
        Ok(clear && clear_copied(geometry, bytes))
    })
}

/// Follow-up work of a delete at one active L1 index.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Touched {
    No,
    /// Something there has one reference left.
    Look,
    /// The L2 table's own COPIED bits are correct already.
    TableDone,
}

/// Removes the references of deleted snapshots. With `write`, an L2 table that now belongs to the active
/// state alone gets its COPIED bits at once, while it is in memory.
fn remove_references(
    file: &ImageFile,
    refcounts: &mut Refcounts,
    geometry: Geometry,
    losses: &[Loss],
    active_len: usize,
    write: bool,
) -> Result<Vec<Touched>> {
    let mut touched = vec![Touched::No; active_len];
    let offsets: Vec<u64> = losses.iter().map(|l| l.offset).collect();
    let mut references = References::default();
    let mut ones: Vec<u32> = Vec::new();
    tables::visit(file, geometry, &offsets, |n, bytes| {
        let Some(loss) = losses.get(n) else { return Ok(false) };
        references.fill(geometry, bytes, None)?;
        ones.clear();
        let slots = &references.slots;
        let change = Change::Down(loss.times);
        refcounts.change(file, &references.clusters, change, |at, left| {
            if left == 1
                && let Some(slot) = slots.get(at)
            {
                ones.push(*slot);
            }
        })?;
        let mut left = 0;
        let own = geometry.cluster_bits.host_cluster(HostOffset(loss.offset)).0;
        refcounts.change(file, &[own], change, |_, now| left = now)?;
        let Some(touched) = touched.get_mut(loss.index) else { return Ok(false) };
        if !ones.is_empty() || left == 1 {
            *touched = Touched::Look;
        }
        if !loss.active || left != 1 {
            return Ok(false);
        }
        // The active one comes last of its index, so these counts are final.
        *touched = Touched::TableDone;
        let mut changed = false;
        if write {
            for slot in &ones {
                changed |= set_copied(geometry, bytes, *slot);
            }
        }
        Ok(changed)
    })?;
    Ok(touched)
}

/// Sets COPIED bits where the refcount has become one: of active L1 entries, and of L2 tables that were not
/// in memory before.
fn restore_copied(
    file: &ImageFile,
    refcounts: &mut Refcounts,
    geometry: Geometry,
    l1_offset: HostOffset,
    l1: &mut L1Table,
    touched: &[Touched],
) -> Result<()> {
    let mut look: Vec<u64> = Vec::new();
    let mut changed = false;
    for (index, touched) in touched.iter().enumerate() {
        let Some(offset) = l1.l2_offset(index) else { continue };
        if *touched == Touched::No || refcounts.get(file, geometry.cluster_bits.host_cluster(offset))? != 1 {
            continue;
        }
        if *touched == Touched::Look {
            look.push(offset.0);
        }
        if let Some(entry) = l1.entries.get_mut(index)
            && *entry & COPIED == 0
        {
            *entry |= COPIED;
            changed = true;
        }
    }
    let mut references = References::default();
    let mut ones: Vec<u32> = Vec::new();
    tables::visit(file, geometry, &look, |_, bytes| {
        ones.clear();
        // The delete is done. A damaged active table keeps its clear bits, which only cost copies.
        let looked = references.fill(geometry, bytes, None).and_then(|()| {
            let slots = &references.slots;
            refcounts.change(file, &references.clusters, Change::Keep, |at, count| {
                if count == 1
                    && let Some(slot) = slots.get(at)
                {
                    ones.push(*slot);
                }
            })
        });
        match looked {
            Err(error) if error.kind() == ErrorKind::Corrupt => {}
            looked => looked?,
        }
        let mut changed = false;
        for slot in &ones {
            changed |= set_copied(geometry, bytes, *slot);
        }
        Ok(changed)
    })?;
    if changed {
        file.write_at(&l1.to_bytes(), l1_offset)?;
    }
    Ok(())
}
